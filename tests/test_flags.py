"""
Flags from fields and files, nanoGPT's commands, flags without effect, failures in one line.

    python -m pytest tests/test_flags.py
"""
import errno
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import eval_extrapolation
import sample
import train
from common import flags
from model import GPT, PE, GPTConfig
from tests.conftest import PROJECT, run, unwritable


def test_flags_in_a_file_are_read_and_those_behind_it_win(tmp_path):
    (tmp_path / "small").write_text("# a comment\n--n_layer 3   # and another\n\n--n_embd 48 --pe rope\n")
    network, _, _ = train.parse([f"@{tmp_path / 'small'}", "--pe", "prope"])
    assert (network.n_layer, network.n_embd, network.pe) == (3, 48, "prope")


def test_a_file_of_flags_is_found_from_any_folder_and_one_s_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, config, _ = train.parse(["@config/cpu_demo"])
    assert config.out_dir == "out/default" and config.dataset.endswith("pysrc_char")
    network, _, _ = train.parse(["@config/cpu_windows"])  # which reads @config/cpu_demo
    assert network.window_pattern == "SSSL" and network.n_embd == 128
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "cpu_demo").write_text("--n_embd 64")
    assert train.parse(["@config/cpu_demo"])[0].n_embd == 64


def test_switches_can_be_given_a_value_as_in_nanogpt():
    for argument, value in (("--compile=False", False), ("--compile=True", True), ("--no-compile", False),
                            ("--compile", True)):
        _, config, _ = train.parse([argument, "--out_dir", "nowhere"])
        assert config.compile is value, argument
    for argument, value in (("--bias=False", False), ("--bias=true", True), ("--bias", True),
                            ("--no-bias=False", True)):
        network, _, _ = train.parse([argument, "--out_dir", "nowhere"])
        assert network.bias is value, argument


@pytest.mark.parametrize("argument, words", [
    ("--lr=1e-3", "--learning_rate"), ("--wandb_log=True", "log.jsonl"), ("--eval_only=True", "eval_extrapolation.py"),
    ("config/cpu_demo", "@config/cpu_demo"), ("--decay_lr=False", "--min_lr"), ("--init_from=resume", "--resume"),
    ("--init_from=scratch", "leave"), ("--init_from=gpt2", "not downloaded"), ("--init_from=gpt2-xl", "not downloaded"),
    ("--compile=perhaps", "True or False")])
def test_a_command_of_nanogpt_is_met_with_what_to_do_here(tmp_path, fails, argument, words):
    code, lines = fails(train, [argument, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


# --- flags without effect


@pytest.mark.parametrize("given, without_effect", [
    ("--pe rope --hope_cutoff 3", ["hope_cutoff"]), ("--pe alibi --rope_base 3", ["rope_base"]),
    ("--pe hope --hope_cutoff 3", []), ("--window 4", ["window"]), ("--rope_factor 4", ["rope_factor"]),
    ("--pe hope --rope_context 8", []), ("--pe rope --rope_context 8", ["rope_context"]),
    ("--pe prope --prope_fraction 0.5 --rope_base 500", []), ("--local_rope_base 9", ["local_rope_base"]),
    ("--pe rope --prope_fraction 0.5 --hope_cutoff 2", ["hope_cutoff", "prope_fraction"]),
    ("--pe nope --local_pe hope --window_pattern SL --window 4 --hope_cutoff 3", []),
    ("--optimizer adamw --muon_momentum 0.5", ["muon_momentum"])])
def test_a_flag_that_changes_nothing_is_noted_in_one_line(dataset, tmp_path, capsys, given, without_effect):
    run(dataset, tmp_path, "--max_iters", "1", *given.split())
    notes = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert len(notes) == bool(without_effect)
    assert re.findall(r"--(\w+)", " ".join(notes)) == without_effect


@pytest.mark.parametrize("script, given", [
    (eval_extrapolation, "--windows 2 --max_factor 2 --rope_factor 4 RUN"),
    (sample, "--max_new_tokens 3 --rope_factor 4 --out_dir RUN")], ids=["eval", "sample"])
def test_a_rope_factor_without_scaling_is_noted_when_scoring_and_sampling(finished_run, capsys, script, given):
    for more, noted in (([], True), (["--rope_scaling", "pi"], False)):
        script.main([*given.split()[:-1], finished_run, *more])
        notes = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
        assert len(notes) == noted and all(line.startswith("note") and "--rope_factor" in line for line in notes)


VALUES = {"rope_base": [500.0], "prope_fraction": [0.25], "hope_cutoff": [0.3], "window_pattern": ["S", "SL"],
          "window": [5, 40], "local_pe": ["nope", "rope", "hope", "t5"], "local_rope_base": [500.0],
          "rope_factor": [3.0], "rope_context": [200]}
AROUND = [{}, {"rope_scaling": "yarn", "rope_factor": 2.0}, {"window_pattern": "S", "window": 5},
          {"window_pattern": "S", "window": 40, "rope_scaling": "yarn", "rope_factor": 2.0},
          *({"window_pattern": "SSL", "local_pe": pe, **more} for pe in ("hope", "rope", "alibi")
            for more in ({}, {"local_rope_base": 50.0}, {"rope_scaling": "yarn", "rope_factor": 2.0}))]


@pytest.mark.parametrize("pe", PE)
def test_the_flags_without_effect_are_those_that_change_no_network(pe):
    """Networks are built with and without each value, and their logits compared."""
    def logits(**settings):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32, pe=pe, **settings)).eval()
        read = idx[:, :model.transformer.wpe.max_length]
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_attn.weight.mul_(20)
            return model(read, read)[0], model

    idx = torch.randint(20, (1, 50))
    for around in AROUND:
        for name, values in VALUES.items():
            settings = [{**around, name: value} for value in [None, *values]]
            settings[0].pop(name)
            try:
                (plain, model), *others = [logits(**setting) for setting in settings]
            except ValueError:  # a scaling that needs a rotary encoding, ...
                continue
            changed = not all(torch.equal(plain, other) for other, _ in others)
            idle = [name in flags.idle(other.config) for _, other in others]
            assert all(idle) == (not changed), (around, name, changed, idle)


# --- values that look like files or flags, and files of flags


@pytest.mark.parametrize("value", ["@torch.no_grad()", "@config/cpu_demo", "@", "-x", "-", "--- x", "-1"])
def test_the_value_of_a_flag_may_begin_like_a_file_or_a_flag(value):
    parser = flags.ArgumentParser("")
    parser.add_argument("--start")
    parser.add_argument("--several", nargs="+")
    parser.add_argument("--n_layer", type=int)
    args = parser.parse_args(["--start", value, "--n_layer", "3"])
    assert args.start == value and args.n_layer == 3
    if value.startswith("@"):
        assert parser.parse_args(["--several", value]).several == [value]


def test_a_flag_without_its_value_does_not_take_the_next_flag_for_it(fails):
    code, lines = fails(sample, ["--start", "--max_new_tokens", "5"])
    assert code == 2 and len(lines) == 1 and "expected one argument" in lines[0]


def test_a_file_of_flags_may_come_from_windows(tmp_path):
    (tmp_path / "flags").write_bytes(b"\xef\xbb\xbf--n_layer 3\r\n--out_dir C:\\runs\\new --dataset 'a b'\r\n")
    network, config, _ = train.parse([f"@{tmp_path / 'flags'}"])
    assert network.n_layer == 3 and config.out_dir == "C:\\runs\\new" and config.dataset.endswith("a b")


@pytest.mark.parametrize("content, words", [(b'--out_dir "a', "No closing quotation"), (b'"@FILE"', "it reads itself"),
                                            ("--n_layer 3".encode("utf-16"), "UTF-8"), (None, "Is a directory")])
def test_a_file_of_flags_that_cannot_be_read_is_named_with_the_cause(tmp_path, fails, content, words):
    path = tmp_path / "flags"
    path.mkdir() if content is None else path.write_bytes(content.replace(b"FILE", str(path).encode()))
    code, lines = fails(train, [f"@{path}"])
    assert code == 2 and len(lines) == 1 and str(path) in lines[0] and words in lines[0], lines


# --- what is printed


def test_a_command_names_a_script_that_exists_from_any_folder_and_quotes_what_has_to_be(tmp_path, monkeypatch):
    for folder in (flags.PROJECT, tmp_path):
        monkeypatch.chdir(folder)
        python, script, *arguments = shlex.split(flags.command("train.py", "--out_dir", tmp_path / "it's here"))
        assert Path(script).samefile(train.__file__) and arguments == ["--out_dir", str(tmp_path / "it's here")]
        assert Path(shutil.which(python)).parent == Path(sys.executable).parent


@pytest.mark.parametrize("error, words", [
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: No such file or directory: check"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied: change its permissions"),
    (OSError("in\nwords"), "in words"), (MemoryError(), "MemoryError")])
def test_an_error_is_described_with_path_cause_and_remedy(error, words):
    assert flags.describe(error).startswith(words)


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_no_print_ends_the_work(monkeypatch, kind):
    done = []

    def work():
        for i in range(3):
            print("a line")
            sys.stderr.write("and another\n")
            done.append(i)

    streams = unwritable(kind), unwritable("pipe")
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    try:
        flags.run(work)
    except SystemExit as stopped:
        assert kind == "full" and stopped.code == 1
    assert done == [0, 1, 2] and (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("cause, code", [(errno.EIO, None), (errno.EPIPE, None), (errno.ENOSPC, 1), (errno.EFBIG, 1)])
def test_a_terminal_that_has_gone_is_no_failure_and_a_disk_that_is_full_is_one(monkeypatch, capsys, cause, code):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(cause, "cause")

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit) if code else nullcontext():
        flags.run(lambda: print("text"))
    assert ("error" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_names_the_flags_to_lower(capsys, error):
    def work():
        raise error

    with pytest.raises(SystemExit) as stopped:
        flags.run(work, takes_memory="--max_new_tokens")
    assert stopped.value.code == 1 and "out of memory: lower --max_new_tokens" in capsys.readouterr().err


# --- failures


def test_a_run_time_failure_is_one_line_and_exit_code_1(finished_run, monkeypatch, fails):
    monkeypatch.setattr(GPT, "stream", lambda *_: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    assert fails(sample, ["--out_dir", finished_run]) == (1, ["sample.py: error: out of memory"])


def test_a_console_without_all_characters_gets_a_substitute(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", write_through=True))
    flags.run(lambda: print("4.80 ± 0.23 \u4e2d"))
    assert raw.getvalue().decode("cp1252").split() == ["4.80", "±", "0.23", "?"]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval_extrapolation.py", "data/prepare.py",
                                    "-m data.prepare", "-m experiments.sweep"])
def test_ctrl_c_while_torch_is_imported_prints_no_traceback(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    ended = subprocess.run([sys.executable, *script.split()], cwd=PROJECT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
