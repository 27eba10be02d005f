"""
Flags from fields and files, nanoGPT's commands, flags without effect, failures in one line.

    python -m pytest tests/test_flags.py
"""
import io
import re
import sys

import pytest

import eval_extrapolation
import sample
import train
from common import flags
from model import GPT
from tests.conftest import run


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


# --- failures


def test_a_run_time_failure_is_one_line_and_exit_code_1(finished_run, monkeypatch, fails):
    monkeypatch.setattr(GPT, "stream", lambda *_: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    assert fails(sample, ["--out_dir", finished_run]) == (1, ["sample.py: error: out of memory"])


def test_a_console_without_all_characters_gets_a_substitute(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", write_through=True))
    flags.run(lambda: print("4.80 ± 0.23 \u4e2d"))
    assert raw.getvalue().decode("cp1252").split() == ["4.80", "±", "0.23", "?"]
