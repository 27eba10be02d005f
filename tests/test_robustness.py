"""
Nothing lost, nothing silent: kills, signals, full disks, torn files, diverging losses, several processes.

    python -m pytest tests/test_robustness.py
"""
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import data.prepare
import eval_extrapolation
import train
from common import checkpoint as common_checkpoint
from common import device as common_device
from common.checkpoint import load_checkpoint
from data import loader
from model import GPT, GPTConfig
from tests.conftest import TINY_FLAGS
from tests.test_training import assert_same_weights, log, run

# Children start as copies of a process that has imported all this already: seconds saved at each of the kills.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_robustness", "torch._dynamo"])  # AdamW imports the latter when first used


def train_quietly(arguments):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(arguments)


def train_in_a_process(dataset, out_dir, flags):
    """Start a run, or go on with the one in out_dir."""
    arguments = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), *flags]
    resume = ["--resume"] * (Path(out_dir) / "ckpt.pt").exists()
    process = processes.Process(target=train_quietly, args=(arguments + resume,))
    process.start()
    return process


def kill_and_resume(dataset, tmp_path, kills, flags):
    """-> checkpoints of an undisturbed run and of one killed so many times at random moments."""
    torch.set_num_threads(1)
    undisturbed = run(dataset, tmp_path / "whole", *flags)
    wait, path, killed_at = random.Random(0), tmp_path / "killed" / "ckpt.pt", []
    for _ in range(kills):
        before = path.stat().st_mtime_ns if path.exists() else None
        process = train_in_a_process(dataset, tmp_path / "killed", flags)
        while not path.exists() or path.stat().st_mtime_ns == before:  # until it has saved something of its own
            assert process.exitcode is None, "the run ended before it could be killed: give it more steps"
            time.sleep(0.001)
        time.sleep(wait.uniform(0, 0.1))
        process.kill()
        process.join()
        killed_at.append(load_checkpoint(path)["iter"])   # whole, at whatever moment the kill came
    assert killed_at == sorted(killed_at) and len(set(killed_at)) > kills / 2
    process = train_in_a_process(dataset, tmp_path / "killed", flags)
    process.join()
    assert process.exitcode == 0
    return undisturbed, load_checkpoint(tmp_path / "killed" / "ckpt.pt")


def same_log(a, b):
    return [[{k: v for k, v in line.items() if k != "seconds"} for line in log(x)] for x in (a, b)]


def test_killed_twenty_times_and_resumed_a_run_ends_with_the_weights_of_an_undisturbed_one(dataset, tmp_path):
    flags = ["--max_iters", "600", "--save_interval", "3", "--eval_interval", "20", "--dropout", "0.1"]
    whole, killed = kill_and_resume(dataset, tmp_path, 20, flags)
    assert_same_weights(whole, killed)
    a, b = same_log(tmp_path / "whole", tmp_path / "killed")
    assert a == b


@pytest.mark.slow
def test_killed_two_hundred_times(dataset, tmp_path):
    whole, killed = kill_and_resume(dataset, tmp_path, 200, ["--max_iters", "4000", "--save_interval", "2"])
    assert_same_weights(whole, killed)


def test_interrupted_from_the_keyboard_a_process_saves_and_resumes(dataset, tmp_path):
    flags = ["--max_iters", "3000", "--eval_interval", "1000", "--save_minutes", "60"]
    process = train_in_a_process(dataset, tmp_path, flags)
    while not (tmp_path / "ckpt.pt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130 and 0 < load_checkpoint(tmp_path / "ckpt.pt")["iter"] < 3000


def test_a_second_interrupt_does_not_wait(dataset, tmp_path, monkeypatch):
    draw = train.training_batch

    def interrupting(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(train, "training_batch", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path, "--max_iters", "3")


# --- files


def test_a_checkpoint_cut_anywhere_is_named_damaged_and_its_neighbour_offered(finished_run, tmp_path, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "ckpt.pt"
    content = path.read_bytes()
    for length in [0, *random.Random(0).sample(range(1, len(content)), 9)]:
        path.write_bytes(content[:length])
        code, lines = fails(train, ["--resume", "--out_dir", str(path.parent)])
        assert code == 2 and len(lines) == 1 and "damaged" in lines[0] and "best.pt" in lines[0]
        assert path.read_bytes() == content[:length]


def fail_after(n, monkeypatch):
    """torch.save writes half of its n-th file and all later ones, then the disk is full."""
    calls, write = [], torch.save

    def failing(checkpoint, file):
        calls.append(checkpoint)
        if len(calls) >= n:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, file)

    monkeypatch.setattr(torch, "save", failing)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so_at_the_end(dataset, tmp_path, monkeypatch, fails, capsys):
    run(dataset, tmp_path / "whole", "--max_iters", "5")
    with monkeypatch.context() as patch:
        fail_after(3, patch)                              # best.pt and ckpt.pt of step 0 are written, no more
        code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "full"),
                                    "--max_iters", "10"])
    assert code == 1 and "No space left" in lines[-1] and "error: " in lines[-1]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["best.pt", "ckpt.pt", "log.jsonl"]
    assert load_checkpoint(tmp_path / "full" / "ckpt.pt")["iter"] == 0
    train.main(["--resume", "--out_dir", str(tmp_path / "full"), "--max_iters", "10"])  # there is room again
    assert load_checkpoint(tmp_path / "full" / "ckpt.pt")["iter"] == 10


def test_a_failed_save_on_the_way_is_a_warning_and_training_goes_on(dataset, tmp_path, monkeypatch, capsys):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "12")
    save, calls = train.save_checkpoint, []

    def failing_once(path, checkpoint):
        calls.append(path)
        if len(calls) in (3, 4):                          # those of step 5
            raise OSError("disk full")
        save(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", failing_once)
    assert_same_weights(whole, run(dataset, tmp_path / "full", "--max_iters", "12"))
    assert "disk full; training continues" in capsys.readouterr().out
    latest, best = (load_checkpoint(tmp_path / "full" / name) for name in ("ckpt.pt", "best.pt"))
    assert latest["best_val_loss"] == best["val_loss"] == best["best_val_loss"]  # of the file that is there
    a, b = same_log(tmp_path / "whole", tmp_path / "full")
    assert a == b


def test_save_interval_and_save_minutes_save_between_evaluations(dataset, tmp_path, monkeypatch):
    save, saved = train.save_checkpoint, []

    def watched(path, checkpoint):
        saved.append((path.name, checkpoint["iter"]))
        save(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", watched)
    run(dataset, tmp_path / "a", "--max_iters", "7", "--save_interval", "3")
    assert [step for name, step in saved if name == "ckpt.pt"] == [0, 3, 5, 6, 7]
    saved.clear()
    run(dataset, tmp_path / "b", "--max_iters", "4", "--save_minutes", "0", "--keep_every", "2")
    assert [step for name, step in saved if name == "ckpt.pt"] == [0, 1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "b" / "ckpt_000002.pt")["iter"] == 2


def changed_copy(dataset, tmp_path, name, change):
    folder = tmp_path / "changed"
    shutil.copytree(dataset, folder)
    content = bytearray((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("name, change, words", [
    ("train.bin", lambda content: content.__setitem__(slice(100, 102), b"\x63\x00"), "id of 99"),
    ("val.bin", lambda content: content.__setitem__(slice(100, 102), b"\x05\x00"), "changed since"),
    ("val.bin", lambda content: content.__delitem__(slice(-8, None)), "should have"),
    ("meta.json", lambda content: content.__delitem__(slice(-20, None)), "damaged")],
    ids=["id out of range", "another id", "cut short", "meta cut short"])
def test_a_stale_or_edited_data_set_is_refused_with_the_command_that_makes_it_anew(
        dataset, tmp_path, fails, name, change, words):
    folder = changed_copy(dataset, tmp_path, name, change)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", folder, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and len(lines) == 1 and words in lines[0] and "python -m data.prepare" in lines[0]
    assert not (tmp_path / "out").exists()


# --- numbers


@pytest.mark.parametrize("value, where", [(math.nan, "loss"), (1000.0, "loss"), (math.inf, "gradient")])
def test_a_diverging_run_stops_with_step_and_rate_and_keeps_the_last_good_checkpoint(
        dataset, tmp_path, monkeypatch, fails, value, where):
    forward, norm = GPT.forward, torch.nn.utils.clip_grad_norm_
    steps = []

    def diverging(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        steps.extend([1] * self.training)
        return logits, loss + (value if self.training and len(steps) == 14 and where == "loss" else 0)

    monkeypatch.setattr(GPT, "forward", diverging)
    if where == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                            lambda *args: norm(*args) * (value if len(steps) == 14 else 1))
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "30",
                                "--save_interval", "7"])
    assert code == 1 and "step 14" in lines[-1] and "learning rate" in lines[-1] and "holds step 10" in lines[-1]
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["iter"] == 10 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")],
                         ids=lambda error: type(error).__name__)
def test_out_of_memory_names_the_flags_to_lower_and_an_estimate(dataset, tmp_path, monkeypatch, fails, error):
    def forward(*_):
        raise error
    monkeypatch.setattr(GPT, "forward", forward)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path)])
    assert code == 1 and "--batch_size" in lines[-1] and " GB" in lines[-1]


def test_an_error_that_only_speaks_of_memory_is_shown_as_it_is(dataset, tmp_path, monkeypatch, fails):
    def forward(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(GPT, "forward", forward)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path)])
    assert code == 1 and "illegal memory access" in lines[-1] and "--batch_size" not in lines[-1]


# --- devices and processes


def test_dtype_follows_what_the_device_can(monkeypatch):
    cuda, mps, cpu = (torch.device(name) for name in ("cuda", "mps", "cpu"))
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert common_device.pick_dtype("auto", cuda) == expected
    assert common_device.pick_dtype("auto", mps) == common_device.pick_dtype("auto", cpu) == torch.float32
    assert common_device.pick_dtype("float16", cpu) == torch.float16


def test_float16_trains_with_a_gradient_scaler_and_resumes_exactly(dataset, tmp_path):
    """The path of GPUs without bfloat16, run on the CPU: the same code, scaler included."""
    flags = ["--dtype", "float16", "--lr_decay_iters", "20"]
    whole = run(dataset, tmp_path / "whole", *flags, "--max_iters", "20")
    assert whole["scaler"]["scale"] > 1 and log(tmp_path / "whole")[-1]["val_loss"] < 4.4
    run(dataset, tmp_path / "parts", *flags, "--max_iters", "10")
    train.main(["--resume", "--out_dir", str(tmp_path / "parts"), "--max_iters", "20"])
    assert_same_weights(whole, load_checkpoint(tmp_path / "parts" / "ckpt.pt"))


def test_a_run_goes_on_where_auto_means_another_number_format(dataset, tmp_path, monkeypatch):
    """Begun on a CPU, continued on a GPU without bfloat16, where the scaler starts anew; and back again."""
    run(dataset, tmp_path, "--max_iters", "4")
    for steps, dtype in (("8", torch.float16), ("12", torch.float32)):
        monkeypatch.setattr(common_device, "pick_dtype", lambda *_, dtype=dtype, **__: dtype)
        train.main(["--resume", "--out_dir", str(tmp_path), "--max_iters", steps])
        checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
        assert checkpoint["iter"] == int(steps) and bool(checkpoint["scaler"]) == (dtype == torch.float16)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_take_the_steps_of_one(dataset, tmp_path, optimizer):
    flags = ["--max_iters", "10", "--gradient_accumulation_steps", "4", "--optimizer", optimizer,
             "--learning_rate", "2e-3", "--muon_learning_rate", "2e-3"]
    one = run(dataset, tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
               *TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "two"), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    two = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two")):
        assert a["iter"] == b["iter"] and a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), abs=1e-4)
    torch.manual_seed(1)
    start = GPT(GPTConfig(**one["config"])).state_dict()
    for name, value in one["model"].items():
        if optimizer == "adamw":
            # as with accumulation: where a gradient is a rounding error, Adam's sign may differ
            assert ((value - two["model"][name]).abs() < 1e-4).float().mean() > 0.99, name
        else:  # Muon rounds to bfloat16, and small singular values become large: relative to the way from the start
            assert (value - two["model"][name]).norm() < 0.1 * (value - start[name]).norm(), name


def test_a_log_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for torn in ('{"iter": 1', "{}", "5", "\0"):
        path.write_text("".join(json.dumps({"iter": i}) + "\n" for i in (0, 5, 10)) + torn)
        common_checkpoint.cut_log(path, 5)
        assert path.read_text() == '{"iter": 0}\n{"iter": 5}\n'


def test_trainings_that_start_at_once_make_the_default_data_set_once(dataset, tmp_path, monkeypatch):
    """Threads play the processes: a lock is of an open file, whoever opened it."""
    made = []

    def prepare_slowly():
        time.sleep(0.2)
        made.append(shutil.copytree(dataset, tmp_path / "set"))

    monkeypatch.setattr(loader, "DEFAULT_DATASET", str(tmp_path / "set"))
    monkeypatch.setattr(loader, "prepare", prepare_slowly)
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(loader.open_dataset, [tmp_path / "set"] * 4))
    assert len(made) == 1 and all(meta == results[0][0] for meta, _ in results)


def test_two_processes_do_not_train_in_one_folder(dataset, tmp_path, fails):
    (tmp_path / "out").mkdir()
    with common_checkpoint.lock(tmp_path / "out", wait=False):
        code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and "another process" in lines[0] and not list(tmp_path.glob("out/*.pt"))


def test_weights_alone_are_neither_resumed_nor_overwritten(finished_run, tmp_path, dataset, fails):
    (tmp_path / "run").mkdir()
    shutil.copy(Path(finished_run) / "best.pt", tmp_path / "run" / "best.pt")
    flags = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "run")]
    code, lines = fails(train, flags)
    assert code == 2 and "holds a run" in lines[0]
    shutil.copy(Path(finished_run) / "best.pt", tmp_path / "run" / "ckpt.pt")
    code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run")])
    assert code == 2 and "weights only" in lines[0]


def test_a_run_of_broken_weights_is_named_and_not_scored(finished_run, tmp_path, fails):
    checkpoint = load_checkpoint(finished_run)
    checkpoint["model"]["lm_head.weight"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "nan.pt")
    code, lines = fails(eval_extrapolation, [str(tmp_path / "nan.pt"), "--windows", "2", "--max_factor", "2"])
    assert code == 2 and "damaged" in lines[0]


def test_a_data_set_is_not_written_over_a_folder_that_holds_more(dataset, tmp_path, fails):
    folder = tmp_path / "mine"
    shutil.copytree(dataset, folder)
    (folder / "precious.txt").write_text("do not lose me")
    code, lines = fails(data.prepare, ["--source", str(folder / "precious.txt"), "--out_dir", str(folder)])
    assert code == 2 and "precious.txt" in lines[0] and (folder / "precious.txt").exists()


def test_a_moved_data_set_can_be_named_at_resume_but_not_another_tokenizers(finished_run, dataset, tmp_path, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "moved")
    train.main(["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "12",
                "--dataset", str(tmp_path / "moved")])
    meta = json.loads((tmp_path / "moved" / "meta.json").read_text())
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    (tmp_path / "moved" / "meta.json").write_text(json.dumps(meta))
    code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "14"])
    assert code == 2 and "tokenizer" in lines[0]
