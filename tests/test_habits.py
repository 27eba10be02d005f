"""
What users do: resume, kill, sweep, use nanoGPT's commands, work from another folder, run jobs without a terminal.

    python -m pytest tests/test_habits.py
"""
import errno
import io
import os
import re
import shutil
import signal
import sys
import tomllib
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement  # comes with pytest
from torch import distributed

import eval_extrapolation
import sample
import train
from common import flags
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import DeviceConfig, Place
from model import PE, GPTConfig
from tests.conftest import TINY_FLAGS
from tests.test_encodings import tiny
from tests.test_robustness import processes
from tests.test_training import assert_same_weights, log, run

PROJECT = Path(train.__file__).parent


def without_seconds(out_dir):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in log(out_dir)]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- files


@pytest.mark.parametrize("failing", ["best.pt", "log.jsonl"])
def test_at_the_last_step_ckpt_pt_is_saved_even_if_another_file_fails_and_the_exit_code_is_1(
        dataset, tmp_path, monkeypatch, fails, failing):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "10")
    save, append = train.save_checkpoint, train.append_log

    def save_or_fail(path, checkpoint):
        (full_disk if path.name == failing and checkpoint["iter"] == 10 else save)(path, checkpoint)

    def append_or_fail(path, line):
        (full_disk if path.name == failing and line["iter"] == 10 else append)(path, line)

    monkeypatch.setattr(train, "save_checkpoint", save_or_fail)
    monkeypatch.setattr(train, "append_log", append_or_fail)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "full"), "--max_iters",
                                "10"])
    assert code == 1 and "error: " in lines[-1] and "No space left" in lines[-1]
    assert_same_weights(whole, load_checkpoint(tmp_path / "full" / "ckpt.pt"))


@pytest.mark.parametrize("content", ['{"loss": 3.2}\n', "epoch 1\nepoch 2\n", '{"iter": 7, "loss": 3.2}\n', "[]\n[]\n",
                                     '{"event": "start"}\n{"iter": 0}\n'])
def test_a_new_run_does_not_touch_a_log_that_is_not_its_own(dataset, tmp_path, fails, content):
    (tmp_path / "log.jsonl").write_text(content)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "1"])
    assert code == 2 and len([line for line in lines if "error" in line]) == 1 and "log.jsonl" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == content


@pytest.mark.parametrize("content", ["", '{"iter": 0, "tok', '{"it', '{"iter": 0, "tokens": 0, "val_loss": 4.6}\n'])
def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(dataset, tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    run(dataset, tmp_path, "--max_iters", "5")
    assert [line["iter"] for line in log(tmp_path)] == [0, 5]


def test_resuming_on_a_full_disk_keeps_the_log(finished_run, tmp_path, monkeypatch, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "20"])
    assert code == 1 and "No space left" in lines[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


# --- losses that can be seen


def test_a_log_line_has_the_mean_training_loss_since_the_line_before(dataset, tmp_path):
    flags_of = ["--max_iters", "10", "--eval_interval", "6"]
    run(dataset, tmp_path / "each", *flags_of, "--log_interval", "1")
    run(dataset, tmp_path / "means", *flags_of, "--log_interval", "4")
    losses = {line["iter"]: line.get("train_loss") for line in log(tmp_path / "each")}
    assert list(losses) == [*range(11)] and losses[0] is None
    lines = log(tmp_path / "means")
    assert [(line["iter"], "val_loss" in line) for line in lines] == [(0, True), (4, False), (6, True), (8, False),
                                                                     (10, True)]
    for line, first in zip(lines[1:], (1, 5, 7, 9)):
        steps = range(first, line["iter"] + 1)
        assert line["train_loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps), rel=1e-5)
        assert line["tokens"] == line["iter"] * 4 * 16 and line["lr"] > 0 and line["grad_norm"] > 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("interval", ["3", "5"])
@pytest.mark.parametrize("killed_at", [1, 3, 4, 5, 7, 9, 10, 12])
def test_killed_anywhere_and_resumed_the_log_has_each_line_once(dataset, tmp_path, monkeypatch, killed_at, interval):
    """Lines every 3 or 5 steps, checkpoints every 4, evaluations every 10."""
    settings = ["--max_iters", "13", "--log_interval", interval, "--save_interval", "4", "--eval_interval", "10"]
    run(dataset, tmp_path / "whole", *settings)
    draw = train.training_batch

    def killing(*args):
        if args[4] == killed_at:  # index of the batch
            raise Killed
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_batch", killing)
        with pytest.raises(Killed):
            run(dataset, tmp_path / "killed", *settings)
    train.main(["--resume", "--out_dir", str(tmp_path / "killed")])
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")


def test_if_there_is_no_terminal_each_line_of_the_log_is_printed_once(dataset, tmp_path, capsys):
    run(dataset, tmp_path, "--max_iters", "10", "--log_interval", "2")
    captured = capsys.readouterr()
    printed = [line for line in captured.out.splitlines() if line.startswith("iter ")]
    assert [int(line.split(",")[0].split()[1]) for line in printed] == [0, 2, 4, 5, 6, 8, 10]
    for line, logged in zip(printed, log(tmp_path)):
        shown = dict(part.split() for part in line.split(", "))
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(logged, rel=1e-5)
    assert captured.err == ""  # no progress bar in the file of a job


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_there_is_a_progress_bar_and_no_line_per_evaluation(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(dataset, tmp_path, "--max_iters", "10")
    assert "10/10" in sys.stderr.getvalue() and "iter " not in sys.stdout.getvalue()


def test_what_is_piped_into_a_file_has_the_lines_although_the_terminal_has_the_bar(dataset, tmp_path, monkeypatch,
                                                                                   capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(dataset, tmp_path, "--max_iters", "10")
    assert "10/10" in sys.stderr.getvalue() and "iter 10," in capsys.readouterr().out


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_reader_that_leaves_or_a_disk_that_is_full_does_not_end_the_training(dataset, tmp_path, monkeypatch, error):
    """As with `train.py | head -1` or `train.py > log`. What fails is each line, here from the first evaluation on."""
    class Closed(io.StringIO):
        def write(self, text):
            if text.startswith("iter"):
                raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    run(dataset, tmp_path, "--max_iters", "10")
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 10


# --- signals


@pytest.fixture
def at_the_eighth_step(monkeypatch):
    """Call a function in the middle of the eighth step."""
    def at(act):
        draw = train.training_batch
        monkeypatch.setattr(train, "training_batch", lambda *args: (args[4] == 7 and act(), draw(*args))[1])
    return at


def refuse(number, frame):
    raise AssertionError(f"signal {number} was not received by train.py")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_sighup_saves_as_sigterm_does_unless_nohup_ignores_it(dataset, tmp_path, at_the_eighth_step):
    at_the_eighth_step(lambda: os.kill(os.getpid(), signal.SIGHUP))
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


def train_at_a_terminal_that_closes(arguments):
    """With a terminal as a process started by ssh has it. It closes in the eighth step, as at the end of a session."""
    import fcntl  # not on Windows
    import termios

    torch.set_num_threads(1)
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
    train.main(arguments)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_closed_ssh_session_saves_although_nothing_can_be_printed(dataset, tmp_path):
    process = processes.Process(target=train_at_a_terminal_that_closes, args=(
        [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "12"],))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP and load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 8


# --- several processes


def train_as_rank(rank, runs, ports, report):
    """Several trainings, one after the other, in one of two processes. The parent process plays torchrun."""
    torch.set_num_threads(1)
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


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_random_state_of_the_device_is_saved_and_restored(monkeypatch, device):
    place, restored = Place(DeviceConfig(device="cpu")), []
    place.device = SimpleNamespace(type=device)
    monkeypatch.setattr(getattr(torch, device), "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(getattr(torch, device), "set_rng_state", restored.append)
    state = place.get_rng_state()
    drawn = torch.rand(3)
    place.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn) and restored == [torch.tensor([7])]
    place.device = SimpleNamespace(type="cpu")
    place.set_rng_state(state)  # a run that goes on elsewhere
    assert torch.equal(torch.rand(3), drawn) and len(restored) == 1


# --- flags without effect


@pytest.mark.parametrize("given, without_effect", [
    ("--pe rope --hope_cutoff 3", ["hope_cutoff"]), ("--pe alibi --rope_base 3", ["rope_base"]),
    ("--pe hope --hope_cutoff 3", []), ("--window 4", ["window"]), ("--rope_factor 4", ["rope_factor"]),
    ("--pe prope --prope_fraction 0.5 --rope_base 500", []), ("--local_rope_base 9", ["local_rope_base"]),
    ("--pe rope --prope_fraction 0.5 --hope_cutoff 2", ["hope_cutoff", "prope_fraction"]),
    ("--pe nope --local_pe hope --window_pattern SL --window 4 --hope_cutoff 3", []),
    ("--optimizer adamw --muon_momentum 0.5", ["muon_momentum"])])
def test_a_flag_that_changes_nothing_is_noted_in_one_line(dataset, tmp_path, capsys, given, without_effect):
    run(dataset, tmp_path, "--max_iters", "1", *given.split())
    notes = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert len(notes) == bool(without_effect)
    assert re.findall(r"--(\w+)", " ".join(notes)) == without_effect


@pytest.mark.parametrize("given, words", [
    ("--pe hope --hope_cutoff 100", "this is NoPE"), ("--pe hope --hope_cutoff 0", "this is RoPE"),
    ("--pe prope --prope_fraction 1", "this is RoPE"), ("--pe hope", None), ("--pe rope", None)])
def test_an_encoding_that_its_setting_turns_into_another_one_is_named(dataset, tmp_path, capsys, given, words):
    run(dataset, tmp_path, "--max_iters", "1", *given.split())
    out = capsys.readouterr().out
    assert ("this is" in out) == (words is not None) and (words or "") in out


@pytest.mark.parametrize("script, given", [
    (eval_extrapolation, "{run} --windows 2 --max_factor 2 --rope_factor 4"),
    (sample, "--out_dir {run} --max_new_tokens 3 --rope_factor 4")], ids=["eval", "sample"])
def test_a_rope_factor_without_scaling_is_noted_when_scoring_and_sampling(finished_run, capsys, script, given):
    for more, noted in (([], True), (["--rope_scaling", "pi"], False)):
        script.main([*given.format(run=finished_run).split(), *more])
        notes = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
        assert len(notes) == noted and all(line.startswith("note") and "--rope_factor" in line for line in notes)


# --- nanoGPT's commands


def test_switches_can_be_given_a_value_as_in_nanogpt():
    for argument, name, value in (("--compile=False", "compile", False), ("--compile=True", "compile", True),
                                  ("--no-compile", "compile", False), ("--compile", "compile", True)):
        _, config, _ = train.parse([argument, "--out_dir", "nowhere"])
        assert getattr(config, name) is value, argument
    for argument, value in (("--bias=False", False), ("--bias=true", True), ("--bias", True),
                            ("--no-bias=False", True)):
        network, _, _ = train.parse([argument, "--out_dir", "nowhere"])
        assert network.bias is value, argument


@pytest.mark.parametrize("argument, words", [
    ("--lr=1e-3", "--learning_rate"), ("--wandb_log=True", "log.jsonl"), ("--eval_only=True", "eval_extrapolation.py"),
    ("config/cpu_demo", "@config/cpu_demo"), ("--decay_lr=False", "--min_lr"), ("--init_from=resume", "--resume"),
    ("--init_from=scratch", "leave"), ("--init_from=gpt2", "not downloaded"), ("--init_from=gpt2-xl", "not downloaded"),
    ("--compile=perhaps", "True or False")])
def test_a_command_of_nanogpt_is_met_with_what_to_do_here(tmp_path, monkeypatch, fails, argument, words):
    code, lines = fails(train, [argument, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_file_of_flags_is_found_from_any_folder_and_one_s_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, config, _ = train.parse(["@config/cpu_demo"])
    assert config.out_dir == "out/default" and config.dataset.endswith("pysrc_char")
    network, _, _ = train.parse(["@config/cpu_windows"])  # which reads @config/cpu_demo
    assert network.window_pattern == "SSSL" and network.n_embd == 128
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "cpu_demo").write_text("--n_embd 64")
    assert train.parse(["@config/cpu_demo"])[0].n_embd == 64


# --- checkpoints and folders that are named


@pytest.mark.parametrize("change, word", [({"pe": "from_elsewhere"}, "from_elsewhere"), ({"exponent": 2.0}, "exponent"),
                                          ({"rope_scaling": "longrope"}, "longrope")])
def test_a_checkpoint_of_another_model_py_is_not_called_damaged(finished_run, tmp_path, fails, change, word):
    checkpoint = load_checkpoint(finished_run)
    save_checkpoint(tmp_path / "a.pt", {**checkpoint, "config": {**checkpoint["config"], **change}})
    for script, arguments in ((sample, ["--out_dir"]), (eval_extrapolation, []), (train, ["--init_from"])):
        code, lines = fails(script, [*arguments, str(tmp_path / "a.pt")])
        assert code == 2 and len(lines) == 1 and word in lines[0] and "damaged" not in lines[0]


def test_for_the_parent_folder_of_a_sweep_its_runs_are_offered(finished_run, tmp_path, fails):
    for name in ("rope", "hope"):
        shutil.copytree(finished_run, tmp_path / "sweep" / name)
    for script, arguments in ((eval_extrapolation, []), (sample, ["--out_dir"]), (train, ["--init_from"]),
                              (train, ["--resume", "--out_dir"])):
        code, lines = fails(script, [*arguments, str(tmp_path / "sweep")])
        assert code == 2 and len(lines) == 1, lines
        assert all(str(tmp_path / "sweep" / name) in lines[0] for name in ("rope", "hope"))


def test_runs_of_different_contexts_are_scored_with_a_note(dataset, finished_run, tmp_path, capsys):
    run(dataset, tmp_path / "longer", "--block_size", "32", "--max_iters", "1")
    capsys.readouterr()
    eval_extrapolation.main([str(tmp_path / "longer"), finished_run, "--windows", "2", "--max_factor", "4"])
    [note] = [line for line in capsys.readouterr().out.splitlines() if "block_size" in line and "note" in line]
    assert "longer 32" in note and "hope 16" in note


# --- help and output


def test_help_shows_every_default_that_says_something(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--dropout DROPOUT [^-]*\(default: 0\.0\)", text)
    for knob in (*fields(GPTConfig), *fields(train.TrainConfig)):
        if knob.name in train.NETWORK_FLAGS and knob.default not in (None, False):
            assert re.search(rf"--{knob.name} .*?\(default: {re.escape(str(knob.default))}\)", text), knob.name


def test_help_says_what_each_encoding_is(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, encoding in PE.items():
        [first] = re.findall(r"^\w+", encoding.__doc__)
        assert re.search(rf"[:;] {name}: {first}\b", text), name


def test_a_console_without_all_characters_gets_a_substitute(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", write_through=True))
    flags.run(lambda: print("4.80 ± 0.23 \u4e2d"))
    assert raw.getvalue().decode("cp1252").split() == ["4.80", "±", "0.23", "?"]


# --- torch.compile


@pytest.mark.parametrize("pe", ["nope", "learned", "hope", "alibi"])
def test_one_graph_serves_all_lengths_and_attention_is_causal_by_a_plain_bool(pe):
    """Where the number of tokens is a symbol, T > 1 is one too, which the attention kernels do not take."""
    causal, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        causal.extend(node.kwargs.get("is_causal") for node in graph.graph.nodes
                      if node.op == "call_function" and "scaled_dot_product" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    model = tiny(pe)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (8, 13, 21, 30):
        idx = torch.randint(50, (2, length))
        torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
    assert len(graphs) == 1 and len(causal) == model.config.n_layer and {type(value) for value in causal} == {bool}


# --- packages


def test_pyproject_and_the_requirements_name_the_same_packages_and_the_constraints_fit_them():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = {name: re.findall(r"^[a-z].*", (PROJECT / f"{name}.txt").read_text(), re.M)
             for name in ("requirements", "requirements-dev", "constraints")}
    assert project["dependencies"] == lines["requirements"]
    assert project["optional-dependencies"]["dev"] == lines["requirements-dev"]
    pins = dict(line.split("==") for line in lines["constraints"])
    for line in lines["requirements"] + lines["requirements-dev"]:
        needed = Requirement(line)
        assert needed.specifier.contains(pins[needed.name])
    sources = [*PROJECT.glob("*.py"), *PROJECT.glob("common/*.py"), *PROJECT.glob("data/*.py")]
    imported = {name for path in sources for name in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)}
    known = {Requirement(line).name for line in lines["requirements"]} | set(sys.stdlib_module_names)
    assert imported <= known | {"common", "data", "model"}
