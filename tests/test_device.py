"""Where a run computes: devices, number formats, signals, the processes of torchrun."""
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import distributed

import train
from common import device as common_device
from common import flags
from common.checkpoint import load_checkpoint
from common.device import Device, DeviceConfig, pick_device, pick_dtype
from model import GPT, GPTConfig
from tests.conftest import PROJECT, TINY_FLAGS, assert_same_run, log, processes, resumed, run

# --- devices and number formats


@pytest.mark.parametrize("name, local_rank, named", [
    ("cuda", None, "cuda"), ("cuda", 1, "cuda:1"), ("cuda:0", 1, "cuda:0"), ("gpu", None, "gpu")])
def test_a_device_that_is_missing_is_refused_and_torchrun_gives_each_process_its_own(
        name, local_rank, named):
    with pytest.raises(ValueError, match=rf"--device {named} cannot be used"):
        pick_device(name, local_rank)


def test_training_takes_a_format_that_the_device_has_and_scores_are_float32(monkeypatch):
    cuda, mps, cpu = map(torch.device, ("cuda", "mps", "cpu"))
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, has_it=has_it: has_it)
        monkeypatch.setattr(common_device, "HAS_BFLOAT16", has_it)
        assert pick_dtype("auto", cuda, training_width=32) == expected
        assert pick_dtype("auto", cpu, training_width=256) == (
            torch.bfloat16 if has_it else torch.float32)
        assert {pick_dtype("auto", cuda), pick_dtype("auto", cpu), pick_dtype("auto", mps, 256),
                pick_dtype("auto", cpu, training_width=255)} == {torch.float32}
        assert pick_dtype("float16", cpu, training_width=256) == torch.float16


# --- signals

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]  # Windows has no SIGHUP


@pytest.fixture
def refused():
    """Signals that train.py does not handle fail the test. Some shells have them ignored."""
    def refuse(number, frame):
        pytest.fail(f"signal {number} was not received by train.py")

    before = [signal.signal(number, refuse) for number in SIGNALS]
    yield refuse
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_completes_the_step_saves_and_prints_how_to_continue(
        dataset, tmp_path, at_batch, capsys, refused, number):
    """At step 8 neither a line of the log nor an evaluation is due."""
    given = ["--max_iters", "12", "--eval_interval", "9", "--dropout", "0.1"]
    run(dataset, tmp_path / "whole", *given)
    at_batch(7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        run(dataset, tmp_path / "parts", *given)
    assert ended.value.code == 128 + number and signal.getsignal(number) == refused
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["iter"] == 8
    assert f"--resume --out_dir {tmp_path / 'parts'}" in capsys.readouterr().out
    resumed(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("stopped_at", [0, 5, 10])
def test_a_signal_leaves_an_evaluation_half_done_and_no_step_begins(
        dataset, tmp_path, monkeypatch, capsys, refused, stopped_at):
    """The evaluations are at steps 0, 5 and 10. A line of the log is due at step 5 without it."""
    given = ["--max_iters", "10", "--log_interval", "1", "--eval_iters", "3"]
    left = [stopped_at / 5]  # evaluations that are not disturbed
    run(dataset, tmp_path / "whole", *given)
    batches = train.validation_batches

    def stopping(*args):
        for i, batch in enumerate(batches(*args)):
            if i == 1 and left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)
            assert i < 2 or left[0] != 0, "the evaluation goes on"
            yield batch
        left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_batches", stopping)
        with pytest.raises(SystemExit):
            run(dataset, tmp_path / "parts", *given)
    printed = capsys.readouterr().out.splitlines()[-1]
    if stopped_at == 0:
        assert printed == "stopped before the first step" and not list(tmp_path.glob("parts/*.pt"))
        run(dataset, tmp_path / "parts", *given)
    else:
        assert printed.startswith(f"stopped after step {stopped_at}, which is saved")
        assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["iter"] == stopped_at
        resumed(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_ctrl_c_prints_at_once_what_happens_and_a_second_one_does_not_wait(
        dataset, tmp_path, at_batch, refused, capfd):
    printed = []

    def press():
        for _ in range(2):
            printed.append(capfd.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)

    at_batch(0, press)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path, "--max_iters", "3")
    assert printed[1] == ("\nstopping after this step, then saving; Ctrl-C again ends at once\n")


def test_a_signal_saves_although_nobody_reads_what_is_printed(dataset, tmp_path, at_batch, refused):
    reader, writer = os.pipe()
    os.close(reader)
    own = os.dup(2)

    def press():
        os.dup2(writer, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        os.dup2(own, 2)

    at_batch(2, press)
    with pytest.raises(SystemExit):
        run(dataset, tmp_path, "--max_iters", "5")
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 3


def test_a_training_in_a_thread_as_in_a_notebook_runs_without_handlers(dataset, tmp_path, refused):
    thread = threading.Thread(target=run, args=(dataset, tmp_path, "--max_iters", "2"))
    thread.start()
    thread.join()
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 2
    assert {signal.getsignal(number) for number in SIGNALS} == {refused}


def train_at_a_terminal_that_closes(arguments):
    """With a terminal as a process started by ssh has it. It closes in the eighth step."""
    import fcntl  # not on Windows
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    terminal, own = os.openpty()
    fcntl.ioctl(own, termios.TIOCSCTTY, 0)
    for stream in (1, 2):
        os.dup2(own, stream)
    os.close(own)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    draw = train.training_batch
    train.training_batch = lambda *args: (os.close(terminal) if args[4] == 7 else None,
                                          draw(*args))[1]
    flags.run(lambda: train.main(arguments))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_closed_ssh_session_saves_although_nothing_can_be_printed(dataset, tmp_path):
    process = processes.Process(target=train_at_a_terminal_that_closes, args=([
        *TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "12"],))
    process.start()
    process.join(60)
    assert process.exitcode == 129 and load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 8


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_nohup_goes_on_when_the_session_ends(dataset, tmp_path, at_batch, refused):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_batch(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run(dataset, tmp_path, "--max_iters", "6")["iter"] == 6


# --- several processes


def test_a_rank_that_a_cluster_left_in_the_environment_is_not_torchrun_s(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    device = Device(DeviceConfig(device="cpu"))
    assert (device.rank, device.n_processes) == (0, 1)
    with device.processes():
        pass  # connects to nobody


def train_as_rank(rank, port, arguments):
    """One of two processes. The parent process plays torchrun."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", TORCHELASTIC_RUN_ID="1",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")  # the parent's store
    flags.run(lambda: train.main(arguments))


def run_by_two(*arguments):
    """Train in two processes -> their exit codes."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [processes.Process(target=train_as_rank, args=(rank, store.port, arguments))
             for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    return [process.exitcode for process in ranks]


def run_by_torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    ended = subprocess.run([*command, PROJECT / "train.py", *arguments], timeout=120,
                           stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [ended.returncode] * 2


FOUR = "--max_iters 10 --gradient_accumulation_steps 4 --learning_rate 2e-3".split()


@pytest.mark.parametrize("run_two", [run_by_two, run_by_torchrun], ids=["", "torchrun"])
def test_two_processes_take_the_steps_of_one(dataset, tmp_path, run_two):
    given = [*FOUR, "--muon_learning_rate", "2e-3"]
    one = run(dataset, tmp_path / "one", *given)
    assert run_two(*TINY_FLAGS, *given, "--dataset", dataset,
                   "--out_dir", str(tmp_path / "two")) == [0, 0]
    two = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    for ours, theirs in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["iter"], name)
    torch.manual_seed(1)
    start = GPT(GPTConfig(**one["config"])).state_dict()
    for name, value in one["model"].items():  # where a gradient is rounding, a step may differ
        off = (value - two["model"][name]).norm() / (value - start[name]).norm()
        assert off < 0.05, name


def test_two_processes_resumed_end_with_the_weights_of_an_uninterrupted_run(dataset, tmp_path):
    given = [*TINY_FLAGS, *FOUR, "--dataset", dataset, "--dropout", "0.2", "--lr_decay_iters", "10"]
    assert run_by_two(*given, "--out_dir", str(tmp_path / "whole")) == [0, 0]
    assert run_by_two(*given, "--out_dir", str(tmp_path / "parts"), "--max_iters", "5") == [0, 0]
    assert run_by_two("--resume", "--out_dir", str(tmp_path / "parts"), "--max_iters",
                      "10") == [0, 0]
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_processes_that_cannot_share_the_micro_batches_evenly_are_refused(dataset, tmp_path):
    assert run_by_two(*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path),
                      "--gradient_accumulation_steps", "3") == [2, 2]
