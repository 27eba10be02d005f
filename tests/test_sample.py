"""
Sampling: streamed text, its seed, temperature, scaling, characters of several tokens.

    python -m pytest tests/test_sample.py
"""
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import sample
from common import flags
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from data.tokenizer import load_tokenizer
from model import GPT
from tests.conftest import byte_tokenizer, constant_checkpoint, unwritable


def test_sampling_streams_past_block_size_and_maps_unknown_characters(finished_run, capsys):
    sample.main(["--out_dir", finished_run, "--start", "one tw\u00f6 ", "--max_new_tokens", "40", "--top_k", "5"])
    out = capsys.readouterr().out
    assert "never seen 'ö'" in out
    text = out.split("instead\n")[1]
    assert text.startswith("one twö ") and len(text.split("\n---")[0]) >= 48


def test_sampling_follows_its_seed(finished_run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        sample.main(["--out_dir", finished_run, "--max_new_tokens", "30", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_sampling_under_auto_scaling_uses_one_factor_for_the_whole_text(finished_run, capsys):
    sample.main(["--out_dir", finished_run, "--start", "one two", "--max_new_tokens", "57", "--top_k", "1",
                 "--rope_scaling", "ntk", "--attn_scaling", "logn"])
    model = load_model(finished_run, rope_scaling="ntk", rope_factor=64 / 16, attn_scaling="logn")
    tokenizer = load_tokenizer(load_checkpoint(finished_run)["tokenizer"])
    idx = torch.tensor(tokenizer.encode("one two").astype(np.int64))[None]
    for _ in range(57):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert capsys.readouterr().out.split("\n---")[0] == tokenizer.decode(idx[0].tolist())


def test_temperature_0_is_greedy(finished_run, capsys):
    texts = []
    for given in ("--temperature 0 --seed 1", "--temperature 0 --seed 2", "--top_k 1"):
        sample.main(["--out_dir", finished_run, "--max_new_tokens", "30", *given.split()])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_all_kinds_of_line_ends_are_read_alike_as_argument_and_from_a_file(finished_run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\nthree\n")
    texts = []
    for start in ("one\ntwo\nthree\n", "one\rtwo\r\nthree\n", f"FILE:{tmp_path / 'a.txt'}"):
        sample.main(["--out_dir", finished_run, "--max_new_tokens", "30", "--start", start])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("one\ntwo\nthree\n")


@pytest.mark.parametrize("kind, code", [("pipe", None), ("full", 1)])
def test_sampling_ends_when_its_reader_leaves(finished_run, monkeypatch, kind, code):
    asked, stream = [], GPT.stream

    def watched(*args):
        for token in stream(*args):
            asked.append(token)
            yield token

    monkeypatch.setattr(GPT, "stream", watched)
    monkeypatch.setattr(sys, "stdout", unwritable(kind))
    with pytest.raises(SystemExit) if code else nullcontext():
        flags.run(lambda: sample.main(["--out_dir", finished_run, "--max_new_tokens", "500"]))
    assert len(asked) == 1


def test_temperature_divides_the_logits(tmp_path, capsys):
    """With p = 0.9 and 0.1: at temperature 2 the odds of 9 become 3, at 0.5 they become 81."""
    save_checkpoint(tmp_path / "run.pt", constant_checkpoint([0.9, 0.1, 1e-30, 1e-30]))
    for temperature, odds in (("0.5", 81), ("1", 9), ("2", 3)):
        sample.main(["--out_dir", str(tmp_path / "run.pt"), "--start", "a", "--temperature", temperature,
                     "--max_new_tokens", "800", "--top_k", "2"])
        text = capsys.readouterr().out.split("\n---")[0]
        assert len(text) == 801
        p = 1 / (1 + odds)
        assert abs(text.count("b") / 800 - p) < 5 * math.sqrt(p * (1 - p) / 800)


def streamed(values, capsys):
    """What print_stream has printed after each token of byte_tokenizer() (id = byte), and at the end."""
    printed = []

    def tokens():
        for value in values:
            yield torch.tensor([[value]])
            printed.append(capsys.readouterr().out)

    sample.print_stream(tokens(), byte_tokenizer())
    return printed, capsys.readouterr().out.split("\n---")[0]


def test_a_character_of_several_tokens_is_printed_with_its_last_one(capsys):
    assert streamed("aé€😀b".encode(), capsys)[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_a_character_that_the_last_token_leaves_incomplete_is_marked(capsys):
    printed, rest = streamed("a€".encode()[:-1], capsys)
    assert printed == ["a", "", ""] and rest == "\ufffd"


def test_stray_bytes_do_not_hold_back_or_tear_what_follows(capsys):
    printed, rest = streamed(b"\x80" * 9 + b"a", capsys)
    assert "".join(printed) + rest == 9 * "\ufffd" + "a"
    assert len("".join(printed[:8])) >= 5 and printed[-1].endswith("a")  # shown within four tokens
    printed, rest = streamed(b"\x80" + "😀b".encode(), capsys)
    assert "".join(printed) + rest == "\ufffd😀b"
