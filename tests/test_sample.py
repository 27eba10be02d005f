"""Sampling: streamed text, seed, temperature, scaling, characters of several tokens."""
import math

import pytest
import torch

import sample
from common.checkpoint import load_model, save_checkpoint
from model import GPT
from tests.conftest import byte_tokenizer, constant_checkpoint


@pytest.fixture
def sampled(finished_run, capsys):
    """sampled(flags) -> the text that sample.py prints for a run, or texts of samples."""
    def call(*flags):
        sample.main([finished_run, *flags])
        *texts, rest = capsys.readouterr().out.split("\n" + "-" * 80 + "\n")
        assert not rest
        return texts[0] if len(texts) == 1 else texts
    return call


def test_texts_follow_the_seed_and_several_samples_differ(sampled):
    texts = [sampled("--max_new_tokens", "30", "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    first, second = sampled("--max_new_tokens", "30", "--num_samples", "2")
    assert first == texts[0] != second


def test_help_shows_the_default_start():
    assert r"(default: '\n')" in " ".join(sample.make_parser().format_help().split())


@pytest.mark.parametrize("given, new, factor", [
    ([], 57, 4), ([], 3, 1), (["--rope_factor", "2"], 57, 2)])
def test_one_factor_scales_the_whole_text(sampled, monkeypatch, given, new, factor):
    used = []
    monkeypatch.setattr(sample, "load_model", lambda checkpoint, **overrides: (
        used.append(overrides) or load_model(checkpoint, **overrides)))
    sampled("--start", "one two", "--max_new_tokens", str(new), "--rope_scaling", "ntk",
            "--attn_scaling", "logn", *given)
    assert used == [{"rope_scaling": "ntk", "rope_factor": factor, "attn_scaling": "logn"}]


def test_a_text_begins_with_its_start_a_text_or_a_file_and_goes_past_block_size(sampled, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    for start, text in (("one two ", "one two "), (f"FILE:{tmp_path / 'a.txt'}", "one\ntwo")):
        found = sampled("--start", start, "--max_new_tokens", "40")
        assert found.startswith(text) and len(found) >= len(text) + 40
    assert sampled("--start", "twö").startswith("note: the model has never seen 1 of the ")
    assert sampled("--start", "") == sampled()  # a newline


def test_endoftext_in_the_start_is_the_token_between_documents(tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path / "run.pt", constant_checkpoint([0.9, 0.1, 1e-30, 1e-30]))
    given = []
    monkeypatch.setattr(GPT, "stream", lambda self, idx, *_: given.append(idx) or [])
    for start in ("a", "a<|endoftext|>b", "a<|endoftext|>"):
        sample.main([str(tmp_path / "run.pt"), "--start", start])
    assert [idx.tolist() for idx in given] == [[[0]], [[0, 3, 1]], [[0, 3]]]


@pytest.mark.parametrize("temperature, top_k, odds", [
    (0, 2, math.inf), (1e-320, 2, math.inf), (1, 1, math.inf), (0.5, 2, 81), (1, 2, 9), (2, 2, 3)])
def test_temperature_divides_the_logits(tmp_path, capsys, temperature, top_k, odds):
    """With p = 0.9 and 0.1: at temperature 2 the odds of 9 become 3, at 0.5 they become 81."""
    save_checkpoint(tmp_path / "run.pt", constant_checkpoint([0.9, 0.1, 1e-30, 1e-30]))
    sample.main([str(tmp_path / "run.pt"), "--start", "a", "--max_new_tokens", "800",
                 "--temperature", str(temperature), "--top_k", str(top_k)])
    text, p = capsys.readouterr().out.split("\n---")[0], 1 / (1 + odds)
    assert len(text) == 801
    assert abs(text.count("b") / 800 - p) <= 5 * math.sqrt(p * (1 - p) / 800)


def streamed(values, capsys):
    """What is printed after each token of byte_tokenizer() (id = byte), and at the end."""
    printed = []

    def tokens():
        for value in values:
            yield torch.tensor([[value]])
            printed.append(capsys.readouterr().out)

    sample.print_stream(tokens(), byte_tokenizer())
    return printed, capsys.readouterr().out.split("\n---")[0]


def test_a_character_of_several_tokens_is_printed_with_its_last_one(capsys):
    printed, rest = streamed("aé€😀b".encode(), capsys)
    assert printed == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"] and rest == ""


def test_bytes_that_are_no_character_are_marked_and_do_not_tear_what_follows(capsys):
    printed, rest = streamed(b"\x80\x80" + "😀".encode() + "€".encode()[:-1], capsys)
    assert "".join(printed) == "\ufffd\ufffd😀" and rest == "\ufffd"
