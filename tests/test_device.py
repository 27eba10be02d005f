"""
Where a run computes: devices, number formats, torch.compile, memory; signals; several processes.

    python -m pytest tests/test_device.py
    python -m pytest tests/test_device.py -m slow         a compiler that is missing
"""
import math
import os
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

import eval_extrapolation
import train
from common import device as common_device
from common import flags
from common.checkpoint import load_checkpoint
from common.device import Device, DeviceConfig
from experiments import recall
from model import GPT, PE, GPTConfig
from tests.conftest import PROJECT, TINY_FLAGS, assert_same_weights, log, processes, resumed, run, tiny

CPU = torch.device("cpu")


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
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device).index))
    monkeypatch.setenv("LOCAL_RANK", "2")  # left by something else, if there is no RANK
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert common_device.pick_device(name).index == used
    assert current == ([] if used is None else [used]) and asked == [name if used is None else f"cuda:{used}"]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"),  # the driver's
    RuntimeError("no kernel image is available"), AssertionError("Torch not compiled with CUDA enabled")])
def test_a_gpu_that_is_full_too_old_or_missing_is_refused_with_the_reason(monkeypatch, error):
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(error))
    with pytest.raises(ValueError, match=f"--device cuda cannot be used: {error}; use --device auto or --device cpu"):
        common_device.pick_device("cuda")


@pytest.mark.parametrize("error", [
    ModuleNotFoundError("No module named 'torch.hpu'"), NotImplementedError("Could not run 'aten::empty'")])
def test_a_device_that_is_not_in_this_pytorch_is_refused_in_words_of_the_user(monkeypatch, error):
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(error))
    with pytest.raises(ValueError, match="--device hpu cannot be used: this PyTorch is built without it; use --device"):
        common_device.pick_device("hpu")


@pytest.mark.parametrize("found, taken", [(None, "cpu"), ("mps", "mps"), ("xpu", "xpu")])
def test_auto_takes_the_accelerator_that_there_is(monkeypatch, found, taken):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found and torch.device(found))
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel())
    assert common_device.pick_device("auto").type == taken


def test_auto_takes_the_cpu_where_the_gpu_is_too_old_and_says_so_but_not_where_it_is_full(monkeypatch, capsys):
    """Whoever has a GPU would not notice before the morning that a training runs on the CPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(RuntimeError("no kernel image is available")))
    assert common_device.pick_device("auto").type == "cpu" and "no kernel image" in capsys.readouterr().out
    monkeypatch.setattr(torch, "ones", lambda *size, device: Kernel(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(ValueError, match="out of memory"):
        common_device.pick_device("auto")


def test_dtype_follows_what_the_device_can(monkeypatch):
    cuda, mps, cpu = (torch.device(name) for name in ("cuda", "mps", "cpu"))
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert common_device.pick_dtype("auto", cuda, training_width=32) == expected
        assert common_device.pick_dtype("auto", cuda) == torch.float32  # scores can be compared with those of a CPU
    assert common_device.pick_dtype("auto", mps) == common_device.pick_dtype("auto", cpu) == torch.float32
    assert common_device.pick_dtype("float16", cpu) == torch.float16


@pytest.mark.parametrize("width, has_units, expected", [
    (255, True, torch.float32), (256, True, torch.bfloat16), (1024, True, torch.bfloat16),
    (1024, False, torch.float32), (0, True, torch.float32)])  # 0: to score and to sample
def test_a_cpu_with_bfloat16_units_trains_in_bfloat16_at_width_256_or_more(monkeypatch, width, has_units, expected):
    monkeypatch.setattr(common_device, "HAS_BFLOAT16", has_units)
    assert Device(DeviceConfig(device="cpu"), training_width=width).dtype == expected
    assert Device(DeviceConfig(device="cpu", dtype="float16"), training_width=width).dtype == torch.float16


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_random_state_of_the_device_is_saved_and_restored(monkeypatch, kind):
    device, restored = Device(DeviceConfig(device="cpu")), []
    device.type = kind
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", restored.append)
    state = device.get_rng_state()
    drawn = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn) and restored == [torch.tensor([7])]
    device.type = "cpu"
    device.set_rng_state(state)  # a run that goes on elsewhere
    assert torch.equal(torch.rand(3), drawn) and len(restored) == 1


@pytest.mark.parametrize("works", [True, False])
def test_compile_is_on_by_itself_only_where_it_pays_and_works(monkeypatch, capsys, works):
    tried = []

    def compiling(function):
        def call(x):
            tried.append(x)
            if not works:
                raise TypeError("no C compiler\nand much more")
        return call

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(torch, "ones", lambda *size, device: device)
    cuda, mps, pick = torch.device("cuda"), torch.device("mps"), common_device.pick_compile
    for device, width, steps in ((cuda, 255, 1000), (cuda, 256, 999), (CPU, 256, 1000), (mps, 256, 1000)):
        assert pick(None, device, width, steps) is False and not tried  # it would not pay
    assert pick(False, cuda, 256, 1000) is False and not tried
    assert pick(None, cuda, 256, 1000) is works and pick(None, cuda, 1024, 10**6) is works and tried == [cuda, cuda]
    said = "note: torch.compile fails here (TypeError: no C compiler) and is not used\n"
    assert capsys.readouterr().out == ("" if works else 2 * said)
    for device in (cuda, CPU):
        if works:
            assert pick(True, device, 32, 1) is True
        else:
            with pytest.raises(RuntimeError, match=r"no C compiler\): use --no-compile"):
                pick(True, device, 32, 1)


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_one_line_with_a_remedy_that_works(dataset, tmp_path):
    """In a process of its own: one that has compiled before looks for no compiler again."""
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, PROJECT / "train.py", *TINY_FLAGS, "--max_iters", "1", "--dataset", dataset, "--out_dir",
               str(tmp_path / "run"), "--compile"]
    failed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and "torch.compile fails here" in last and "Traceback" not in failed.stderr
    assert last.endswith("): use --no-compile")
    subprocess.run([*command, "--no-compile"], env=env, check=True, timeout=300)


# --- a device that computes wrongly


ATTENTION = F.scaled_dot_product_attention


def leaking(q, k, v, attn_mask, is_causal, dropout_p):
    """The mask once per group of four queries, as in PyTorch's issue 195910."""
    last = torch.arange(q.size(2))[:, None] // 4 * 4 + 3
    return ATTENTION(q, k, v, torch.arange(k.size(2)) <= last if is_causal else attn_mask)


def misreading(q, k, v, attn_mask, is_causal, dropout_p):
    """A single query finds each key beside the value of another."""
    return ATTENTION(q, k.roll(1, dims=2) if q.size(2) == 1 else k, v, attn_mask, is_causal=is_causal)


def unscaled(q, k, v, attn_mask, is_causal, dropout_p):
    return ATTENTION(q * 1.5, k, v, attn_mask, is_causal=is_causal)


def broken(q, k, v, attn_mask, is_causal, dropout_p):
    return q * math.nan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention, fault", [
    (leaking, "attention sees later tokens"), (misreading, "keys from the cache"), (unscaled, "differ from the CPU's"),
    (broken, "computes wrongly"), (None, None)])
def test_a_device_that_computes_wrongly_is_named_before_it_is_used(monkeypatch, dtype, attention, fault):
    """The CPU plays the device: attention has a fault inside autocast()."""
    device, model, inside = Device(DeviceConfig(device="cpu", dtype=dtype)), tiny("rope", block_size=128), []

    @contextmanager
    def autocast():
        inside.append(True)
        with torch.autocast("cpu", dtype=device.dtype, enabled=dtype != "float32"):
            yield
        inside.clear()

    def attend(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0):
        call = attention if inside and attention else ATTENTION
        return call(q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(device, "autocast", autocast)
    common_device.check_computation(model, device)  # nothing: it is a CPU
    device.type = "mps"
    random_state = torch.get_rng_state()
    if attention:
        with pytest.raises(RuntimeError, match=f"{fault}.*--device cpu" if "PU" not in fault else fault):
            common_device.check_computation(model, device)
    else:
        common_device.check_computation(model, device)
    assert torch.equal(torch.get_rng_state(), random_state)  # a run on a GPU draws the numbers that one on a CPU draws


@pytest.mark.parametrize("script", [train, eval_extrapolation, recall])
def test_scripts_check_the_device_before_they_use_it(script, dataset, finished_run, tmp_path, monkeypatch, fails):
    def wrong(model, device):
        raise RuntimeError(f"{type(model).__name__}s are computed wrongly on {device}")

    monkeypatch.setattr(script, "check_computation", wrong)
    arguments = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path)] if script is train else [
        finished_run, "--max_factor", "2", "--device", "cpu"]
    code, lines = fails(script, arguments)
    assert code == 1 and "GPTs are computed wrongly on cpu" in lines[-1] and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{"pe": pe} for pe in PE] + [
    {"pe": "learned", "block_size": 2}, {"pe": "nope", "vocab_size": 1}, {"pe": "hope", "dropout": 0.5},
    {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 3}])
def test_rounding_is_not_taken_for_a_fault(changes, dtype):
    device = Device(DeviceConfig(device="cpu", dtype=dtype))
    device.type, device.autocast = "mps", lambda: torch.autocast("cpu", dtype=device.dtype, enabled=dtype != "float32")
    common_device.check_computation(tiny(**changes), device)


GPU = os.environ.get("NANOHOPE_TEST_DEVICE")


@pytest.mark.skipif(not GPU, reason="set NANOHOPE_TEST_DEVICE to cuda, mps or xpu")
def test_a_gpu_computes_what_the_cpu_computes_and_resumes_exactly(dataset, tmp_path):
    for pe in PE:
        for dtype in ("float32", "float16", "bfloat16"):
            device = Device(DeviceConfig(device=GPU, dtype=dtype))
            common_device.check_computation(tiny(pe).to(device.torch_device), device)
    flags = ["--device", GPU, "--dropout", "0.2", "--lr_decay_iters", "20"]
    whole = run(dataset, tmp_path / "whole", *flags, "--max_iters", "20")
    run(dataset, tmp_path / "parts", *flags, "--max_iters", "10")
    assert_same_weights(whole, resumed(tmp_path / "parts", "--max_iters", "20"))


# --- memory


@pytest.mark.parametrize("changes", [
    {}, {"block_size": 64, "n_layer": 3, "n_embd": 96}, {"vocab_size": 2000}, {"pe": "rope"}, {"pe": "nope"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_that_training_is_said_to_need_is_what_the_backward_pass_keeps_and_the_weights(dtype, changes):
    model, kept = GPT(GPTConfig(**{"block_size": 128, "vocab_size": 99, **changes})), {}
    idx = torch.randint(99, (8, model.config.block_size))

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # once, however many views of it there are; alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits, _ = model(idx, idx)
    weights = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.parameters()}
    activations = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    needed = 4 * sum(weights.values()) + activations + 4 * logits.numel()  # gradients and two moments; of the logits
    assert 0.8 < common_device.memory_estimate(model.config, len(idx), dtype) / needed < 1.25


def test_the_memory_that_is_needed_and_the_free_memory_of_a_gpu_are_said_first(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "memory_estimate", lambda *_: 2.34e9)
    for free, words in ((None, "about 2.3 GB needed"), (7.8e9, "about 2.3 GB needed, 7.8 GB free")):
        monkeypatch.setattr(Device, "free_memory", lambda device, free=free: free)
        run(dataset, tmp_path / words, "--max_iters", "1")
        assert f"memory    {words}\n" in capsys.readouterr().out


@pytest.mark.parametrize("error, words, explained", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), " GB", True), (MemoryError(), " GB", True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), " GB", True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal memory access", False)])
def test_out_of_memory_names_the_flags_to_lower_and_an_estimate_and_another_error_is_shown_as_it_is(
        dataset, tmp_path, monkeypatch, fails, error, words, explained):
    def forward(*_):
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path)])
    assert code == 1 and words in lines[-1] and ("--batch_size" in lines[-1]) == explained


# --- signals


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(dataset, tmp_path, at_batch, capsys, stop_signal):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "12")
    at_batch(7, lambda: os.kill(os.getpid(), stop_signal))
    with pytest.raises(SystemExit) as ended:
        run(dataset, tmp_path / "parts", "--max_iters", "12")
    assert ended.value.code == 128 + stop_signal
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["iter"] == 8
    assert f"--resume --out_dir {tmp_path / 'parts'}" in capsys.readouterr().out
    assert_same_weights(whole, resumed(tmp_path / "parts"))
    assert [line["iter"] for line in log(tmp_path / "parts")] == [0, 5, 10, 12]


def test_a_second_interrupt_does_not_wait(dataset, tmp_path, at_batch):
    at_batch(0, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path, "--max_iters", "3")


def refuse(number, frame):
    raise AssertionError(f"signal {number} was not received by train.py")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_sighup_saves_as_sigterm_does_unless_nohup_ignores_it(dataset, tmp_path, at_batch):
    at_batch(7, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, refuse)  # by default it would end pytest
    try:
        with pytest.raises(SystemExit) as ended:
            run(dataset, tmp_path / "stopped", "--max_iters", "12")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run(dataset, tmp_path / "nohup", "--max_iters", "12")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.value.code == 128 + signal.SIGHUP
    assert [load_checkpoint(tmp_path / name / "ckpt.pt")["iter"] for name in ("stopped", "nohup")] == [8, 12]


def train_at_a_terminal_that_closes(hangup, arguments):
    """With a terminal as a process started by ssh has it. It closes in the eighth step, as at the end of a session."""
    import fcntl  # not on Windows
    import termios

    signal.signal(signal.SIGHUP, hangup)
    os.setsid()
    terminal, own = os.openpty()
    fcntl.ioctl(own, termios.TIOCSCTTY, 0)
    for stream in (1, 2):
        os.dup2(own, stream)
    os.close(own)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    draw = train.training_batch

    def closing(*args):
        if args[4] == 7:
            os.close(terminal)
        return draw(*args)

    train.training_batch = closing
    try:
        flags.run(lambda: train.main(arguments))  # which lets no failure of its output end it
    finally:
        sys.stdout = sys.stderr = None  # multiprocessing would flush them


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
@pytest.mark.parametrize("hangup, code, steps", [(signal.SIG_DFL, 129, 8), (signal.SIG_IGN, 0, 12)],
                         ids=["plain", "nohup"])
def test_a_closed_ssh_session_saves_although_nothing_can_be_printed(dataset, tmp_path, hangup, code, steps):
    process = processes.Process(target=train_at_a_terminal_that_closes, args=(hangup, [
        *TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "12"]))
    process.start()
    process.join(60)
    assert process.exitcode == code and load_checkpoint(tmp_path / "ckpt.pt")["iter"] == steps


# --- several processes


def train_as_rank(rank, runs, ports, report):
    """Several trainings, one after the other, in one of two processes. The parent process plays torchrun."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      TORCHELASTIC_USE_AGENT_STORE="True")  # the parent's store, at MASTER_PORT
    save, saved = train.save_checkpoint, []

    def watched(path, checkpoint):
        saved.append((path.name, checkpoint["iter"]))
        save(path, checkpoint)

    train.save_checkpoint = watched
    results = []
    for arguments, port in zip(runs, ports):
        os.environ["MASTER_PORT"] = str(port)
        saved.clear()
        try:
            train.main(arguments)
            results.append([step for name, step in saved if name == "ckpt.pt"])
        except BaseException:
            results.append(traceback.format_exc())
    report.send(results)


STEPS = "--max_iters 10 --gradient_accumulation_steps 4 --learning_rate 2e-3 --muon_learning_rate 2e-3".split()


@pytest.fixture(scope="module")
def two_processes(dataset, tmp_path_factory):
    """The folder of runs of two processes, and what each gave: the steps of its ckpt.pt, or a traceback."""
    folder = tmp_path_factory.mktemp("two")
    new = [*TINY_FLAGS, "--dataset", dataset, "--gradient_accumulation_steps", "2", "--dropout", "0.2",
           "--lr_decay_iters", "20", "--eval_interval", "100"]
    runs = {"whole": [*new, "--out_dir", f"{folder}/whole", "--max_iters", "20"]}
    for stop in (10, 7):
        runs[f"to {stop}"] = [*new, "--out_dir", f"{folder}/{stop}", "--max_iters", str(stop)]
        runs[f"from {stop}"] = ["--resume", "--out_dir", f"{folder}/{stop}", "--max_iters", "20"]
    runs["minutes"] = [*new, "--out_dir", f"{folder}/minutes", "--max_iters", "25", "--save_minutes", "0"]
    for name in ("muon", "adamw"):
        runs[name] = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", f"{folder}/{name}", *STEPS, "--optimizer", name]
    runs["odd"] = [*new, "--out_dir", f"{folder}/odd", "--gradient_accumulation_steps", "3"]
    stores = [distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in runs]
    ports, pipes = [store.port for store in stores], [processes.Pipe() for _ in range(2)]  # 0: any free port
    ranks = [processes.Process(target=train_as_rank, args=(rank, list(runs.values()), ports, pipes[rank][1]))
             for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        results = [pipe.recv() if pipe.poll(120) else ["no answer"] * len(runs) for pipe, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
    return folder, dict(zip(runs, results[0]))


@pytest.mark.parametrize("stop", [10, 7])
def test_two_processes_resumed_at_any_step_end_with_the_weights_of_an_uninterrupted_run(two_processes, stop):
    """Each has its own dropout, hence its own random state. At step 7 they do not agree on signals and the clock."""
    folder, saved = two_processes
    assert (saved["whole"], saved[f"to {stop}"], saved[f"from {stop}"]) == ([0, 20], [0, stop], [20])
    assert_same_weights(load_checkpoint(folder / "whole" / "ckpt.pt"), load_checkpoint(folder / str(stop) / "ckpt.pt"))


def test_two_processes_save_once_if_save_minutes_have_passed_and_not_until_they_agree_again(two_processes):
    assert two_processes[1]["minutes"] == [0, 10, 20, 25]


def test_processes_that_cannot_share_the_micro_batches_evenly_are_refused(two_processes):
    assert "ValueError: 2 processes cannot share --gradient_accumulation_steps 3 evenly" in two_processes[1]["odd"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_take_the_steps_of_one(dataset, tmp_path, two_processes, optimizer):
    folder, saved = two_processes
    assert saved[optimizer] == [0, 5, 10]
    one, two = run(dataset, tmp_path, *STEPS, "--optimizer", optimizer), load_checkpoint(folder / optimizer / "ckpt.pt")
    for a, b in zip(log(tmp_path), log(folder / optimizer), strict=True):
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


def test_a_group_of_processes_ends_with_its_run(dataset, tmp_path):
    """Else its threads live until the interpreter ends, and sometimes abort the process then. A fresh process, because
    what it has imported, and when, decides."""
    program = """if True:
        import sys, weakref
        import train
        from torch import distributed
        destroy = distributed.destroy_process_group

        def watched():
            group = weakref.ref(distributed.group.WORLD)
            destroy()
            print("the group", "ended" if group() is None else "is still there")

        distributed.destroy_process_group = watched
        train.main(sys.argv[1:])"""
    as_rank_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", program, *TINY_FLAGS, "--dataset", dataset, "--out_dir", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **as_rank_0}, cwd=PROJECT)
    assert "the group ended" in ended.stdout, ended.stdout + ended.stderr


def test_torchrun_starts_such_processes(dataset, tmp_path, two_processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               PROJECT / "train.py", *TINY_FLAGS, "--dataset", dataset, "--out_dir", tmp_path / "run", *STEPS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    a, b = (load_checkpoint(path / "ckpt.pt") for path in (tmp_path / "run", two_processes[0] / "muon"))
    assert_same_weights(a, b)
