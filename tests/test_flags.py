"""Flags from fields and files, flags without effect, failures in one line."""
import errno
import io
import re
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch

import data.prepare
import eval_extrapolation
import sample
import train
from common import flags
from model import GPT, PE, GPTConfig
from tests.conftest import all_logits, run


def test_flags_in_a_file_are_read_and_those_behind_it_win(tmp_path):
    (tmp_path / "small").write_text("# a comment\n--n_layer 3   # one\n\n--n_embd 48 --pe rope\n")
    (tmp_path / "more").write_text(f"@{tmp_path / 'small'}\n--n_head 6 --out_dir 'a folder'\n")
    network, config, _ = train.parse([f"@{tmp_path / 'more'}", "--pe", "prope"])
    assert (network.n_layer, network.n_embd, network.pe, network.n_head) == (3, 48, "prope", 6)
    assert config.out_dir == "a folder"


def test_each_field_is_a_flag_with_its_type_and_default():
    parser = flags.ArgumentParser("A test.")
    flags.add_flags(parser, GPTConfig)
    flags.add_flags(parser, train.TrainConfig)
    assert vars(parser.parse_args([])) == {
        field.name: field.default for field in (*fields(GPTConfig), *fields(train.TrainConfig))}
    given = parser.parse_args("--bias --no-qkv_bias --n_layer 3 --rope_base 9 --pe t5".split())
    assert (given.bias, given.qkv_bias, given.n_layer, given.pe) == (True, False, 3, "t5")
    assert isinstance(given.rope_base, float)


@pytest.mark.parametrize("script", [train, sample, eval_extrapolation, data.prepare])
def test_help_is_printed_and_has_the_defaults_that_say_something(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "(default: " in text
    assert "None" not in text and "(default: False)" not in text


@pytest.mark.parametrize("pe", PE)
@pytest.mark.parametrize("around", [{}] + [{"window_pattern": "SSL", "window": 5, "local_pe": pe}
                                           for pe in ("nope", "rope", "prope", "hope", "t5")])
def test_the_settings_without_effect_are_those_that_change_no_network(pe, around):
    def logits(**settings):
        torch.manual_seed(0)
        config = GPTConfig(block_size=16, vocab_size=20, n_layer=3, n_head=2, n_embd=32, pe=pe,
                           **around, **settings)
        model = GPT(config).eval()
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_attn.weight.mul_(20)
            return config, all_logits(model, torch.arange(16)[None])

    config, plain = logits()
    values = {"rope_base": 50.0, "prope_fraction": 0.25, "hope_cutoff": 0.3}
    assert flags.without_effect(config) == {
        name for name, value in values.items() if torch.equal(logits(**{name: value})[1], plain)}


@pytest.mark.parametrize("given, names", [
    ("--pe alibi --rope_base 3 --prope_fraction 0.5", ["prope_fraction", "rope_base"]),
    ("--pe hope --hope_cutoff 100", ["NoPE"]), ("--pe hope --hope_cutoff 0", ["RoPE"]),
    ("--pe hope --hope_cutoff 0.9", []), ("--pe rope", [])])
def test_a_flag_without_effect_is_named_at_the_start_and_one_that_gives_another_encoding(
        dataset, tmp_path, capsys, given, names):
    run(dataset, tmp_path, "--max_iters", "1", *given.split())
    found = re.findall(r"^note.*(?:--(\w+) has no effect|this is (\w+))", capsys.readouterr().out,
                       re.M)
    assert [flag or encoding for flag, encoding in found] == names


@pytest.mark.parametrize("error, code, words", [
    (ValueError("one\nline"), 2, "one line"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
    (MemoryError(), 1, "lower --batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "lower --batch_size"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "lower --batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower --batch_size")])
def test_a_failure_is_one_line_and_an_exit_code(capsys, monkeypatch, error, code, words):
    monkeypatch.setattr("sys.argv", ["a/folder/script.py"])
    with pytest.raises(SystemExit) as stopped:
        flags.run(Mock(side_effect=error))
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == code and line.startswith("script.py: error: ") and words in line


def test_a_defect_keeps_its_trace_ctrl_c_gives_130_and_success_nothing(capsys):
    with pytest.raises(KeyError):
        flags.run(Mock(side_effect=KeyError("a defect")))
    with pytest.raises(SystemExit) as stopped:
        flags.run(Mock(side_effect=KeyboardInterrupt))
    assert stopped.value.code == 130
    flags.run(Mock())
    assert capsys.readouterr() == ("", "")


def test_text_that_the_encoding_of_the_output_lacks_ends_no_script(monkeypatch):
    """As on Windows, if the output goes to a file."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    flags.run(lambda: print("café 日"))
    assert written.getvalue().strip() == b"caf\xe9 ?"
