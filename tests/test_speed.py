"""
What makes it fast must not change what comes out; and what is on by default where.

    python -m pytest tests/test_speed.py
    python -m pytest tests/test_speed.py -m slow          a compiler that is missing

How fast it is, `python -m experiments.bench` says: a time is no test, since it depends on who else uses the machine.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch

import eval_extrapolation
import train
from common import device as common_device
from data import loader
from model import PE
from tests.conftest import TINY_FLAGS
from tests.test_encodings import tiny

CPU = torch.device("cpu")


def test_a_batch_has_the_ids_of_the_file_above_32767_too(tmp_path):
    """The tensor holds 16 bits with a sign, and GPT-2's vocabulary needs them without."""
    ids = np.random.default_rng(0).integers(2**16, size=500).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    tensor = loader.token_tensor(np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="c"), CPU)
    offsets = np.array([0, 17, 400, 489])
    x, y = loader.batch_at(tensor, offsets, 10, CPU)
    assert ids.max() > 60000 and x.dtype == y.dtype == torch.int64
    for row, i in enumerate(offsets):
        assert x[row].tolist() == ids[i:i + 10].tolist() and y[row].tolist() == ids[i + 1:i + 11].tolist()


def test_a_token_tensor_on_the_cpu_is_the_file_itself_and_no_copy(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="c")
    tensor = loader.token_tensor(ids, CPU)
    assert tensor.data_ptr() == ids.ctypes.data
    tensor[0] = 9
    assert ids[0] == 9 and np.fromfile(tmp_path / "train.bin", dtype=np.uint16)[0] == 0  # and the disk is not written


@pytest.mark.parametrize("free, stays", [(4000, "cpu"), (4001, "meta")])
def test_tokens_move_to_the_gpu_where_they_take_less_than_a_tenth_of_its_free_memory(monkeypatch, free, stays):
    """A device without memory plays the GPU: what is asked is where the 400 bytes end up."""
    class Device:
        type = "cuda"

    to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: to(tensor, "meta"))
    assert loader.token_tensor(np.zeros(200, dtype=np.uint16), Device()).device.type == stays


@pytest.mark.parametrize("gpu, triton, c_compiler, headers, expected", [
    ((8, 6), True, "gcc", True, True), ((7, 0), True, "clang", True, True), ((8, 6), True, "/opt/cc", True, True),
    ((6, 1), True, "gcc", True, False), ((8, 6), False, "gcc", True, False), ((8, 6), True, None, True, False),
    ((8, 6), True, "gcc", False, False)])
def test_compile_is_on_by_itself_only_where_triton_runs(monkeypatch, tmp_path, gpu, triton, c_compiler, headers,
                                                        expected):
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda *which: str(tmp_path))
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if name == c_compiler else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    cuda = torch.device("cuda")
    assert common_device.pick_compile(None, cuda) is expected
    assert common_device.pick_compile(True, cuda) is True and common_device.pick_compile(False, cuda) is False
    assert common_device.pick_compile(None, CPU) is common_device.pick_compile(None, torch.device("mps")) is False


@pytest.mark.parametrize("pe", PE)
def test_a_training_step_compiles_to_one_graph_once(pe):
    """fullgraph refuses whatever would send it back to Python; the steps after the first find the graph ready."""
    graphs = []
    model, idx = tiny(pe).train(), torch.randint(50, (3, 2, 32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for batch in idx:
        loss = compiled(batch, batch)[1]
        torch.testing.assert_close(loss, model(batch, batch)[1])
        loss.backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("pe", ["sinusoidal", "rope", "prope", "hope", "alibi"])
def test_fixed_numbers_follow_the_device_of_the_positions_and_are_never_rounded(pe):
    """They are no part of the model's state, so a compiled model need not be compiled again."""
    def act(model, device):
        encoding, pos = model.transformer.wpe, torch.arange(300, device=device)
        x = torch.zeros(1, 300, 32, device=device)
        return encoding.embed(x, pos), *(encoding.rotary(pos) or ()), encoding.bias(pos, pos)

    exact = act(tiny(pe), "cpu")
    for a, b in zip(exact, act(tiny(pe).to(torch.bfloat16), "cpu")):
        assert a is b is None or torch.equal(a, b) and b.dtype == torch.float32
    assert all(x is None or x.device.type == "meta" for x in act(tiny(pe).to("meta"), "meta"))


class Kernel:
    """A tensor on a GPU that this machine does not have."""

    def __init__(self, error=None):
        self.error = error

    def __matmul__(self, other):
        if self.error:
            raise self.error
        return self

    def sum(self):
        return self

    def item(self):
        return 1.0


@pytest.mark.parametrize("rank, name, used", [(None, "cuda:1", 1), (None, "cuda", None), ("2", "cuda", 2),
                                              ("2", "cuda:1", 1)])
def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch, rank, name, used):
    """Random numbers, free memory and synchronisation are those of the current GPU. torchrun names it by LOCAL_RANK,
    unless a user names it."""
    asked, current = [], []
    monkeypatch.setattr(torch, "ones", lambda *size, device: asked.append(device) or Kernel())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setenv("LOCAL_RANK", "2")  # left by something else, if there is no RANK
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert common_device.pick_device(name).index == used
    assert current == ([] if used is None else [used]) and asked == [name if used is None else f"cuda:{used}"]


@pytest.mark.parametrize("name, error, raised, words", [
    ("cuda", torch.OutOfMemoryError("CUDA out of memory"), RuntimeError, "its memory is full"),
    ("cuda", RuntimeError("CUDA error: out of memory"), RuntimeError, "its memory is full"),  # from the driver
    ("cuda", RuntimeError("no kernel image is available"), ValueError, "does not support")])
def test_a_gpu_that_is_full_or_too_old_is_named_as_such(monkeypatch, name, error, raised, words):
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(error))
    with pytest.raises(raised, match=words):
        common_device.pick_device(name)


def test_auto_takes_the_cpu_where_the_gpu_is_too_old_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(RuntimeError("no kernel image is available")))
    assert common_device.pick_device("auto").type == "cpu" and "no kernel image" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_one_line_with_a_remedy_that_works(dataset, tmp_path):
    """In a process of its own: one that has compiled before looks for no compiler again."""
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "run"), "--compile"]
    failed = subprocess.run([sys.executable, "train.py", *flags], env=env, capture_output=True, text=True, timeout=300)
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and "torch.compile failed" in last and "Traceback" not in failed.stderr
    remedy = last.split("python train.py ")[1].split(". ")[0].split()
    assert remedy == ["--resume", "--no-compile", "--out_dir", str(tmp_path / "run")]
    train.main(remedy)


def test_windows_at_a_time_stay_inside_half_a_gigabyte_down_to_one():
    config = dict(n_layer=6, n_embd=384, vocab_size=99, block_size=256)
    kept = {}
    for length in (256, 1024, 4096, 16384):
        kept[length] = n = eval_extrapolation.windows_at_a_time(config, length, 128, CPU)
        keys_and_values = n * 2 * 6 * length * 384 * 4
        assert 2e8 < keys_and_values + n * 256 * (3 * 99 + 16 * 384) * 4 <= 5e8
    assert kept[256] > kept[1024] > kept[4096] > kept[16384] == 1
    assert eval_extrapolation.windows_at_a_time({**config, "vocab_size": 2**20}, 16384, 128, CPU) == 1  # never none


@pytest.mark.parametrize("pe", ["hope", "alibi"])
def test_losses_do_not_depend_on_how_many_windows_go_side_by_side(pe):
    model, windows = tiny(pe), torch.randint(50, (5, 97))
    one, three, all_five = (eval_extrapolation.score(model, windows, 20, n) for n in (1, 3, 5))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, all_five, atol=1e-5, rtol=0)
