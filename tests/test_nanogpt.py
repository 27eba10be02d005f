"""
nanoGPT's data folders, and its checkpoints, which hold no tokenizer.

    python -m pytest tests/test_nanogpt.py
"""
import pickle

import numpy as np
import pytest

import eval_extrapolation
import sample
import train
from common.checkpoint import load_checkpoint
from data.loader import document_windows, open_dataset, text_to_score
from data.nanogpt import fill_in_tokenizers
from data.prepare import prepare
from data.tokenizer import CharTokenizer, load_tokenizer
from tests.conftest import TINY_FLAGS, Harmful

# --- data folders


@pytest.fixture
def nanogpt(tmp_path):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    text = "the quick brown fox jumps over the lazy dog\n" * 100
    chars = sorted(set(text))
    folder = tmp_path / "fox_char"
    folder.mkdir()
    for name, part in (("train", text[:4000]), ("val", text[4000:])):
        np.array([chars.index(c) for c in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_data_folder_of_nanogpt_trains_samples_and_is_scored(nanogpt, tmp_path, capsys):
    meta, ids = open_dataset(nanogpt)
    assert meta["vocab_size"] == 28 and load_tokenizer(meta["tokenizer"]).decode(ids["train"][:9]) == "the quick"
    windows = document_windows(ids["val"], load_tokenizer(meta["tokenizer"]).end_of_document, 50, 100)
    assert len(windows) == len(ids["val"]) // 51  # the text is one document
    train.main([*TINY_FLAGS, "--dataset", str(nanogpt), "--out_dir", str(tmp_path / "run"), "--max_iters", "5"])
    capsys.readouterr()
    sample.main(["--out_dir", str(tmp_path / "run"), "--start", "the fox", "--max_new_tokens", "20"])
    eval_extrapolation.main([str(tmp_path / "run"), "--windows", "3", "--max_factor", "2"])
    out = capsys.readouterr().out
    assert out.startswith("the fox") and "perplexity by position" in out
    checkpoint = load_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="no token for 'T'"):  # there is no id for unknown characters
        (tmp_path / "other.txt").write_text("The fox " * 50)
        text_to_score([checkpoint], ["run"], text=str(tmp_path / "other.txt"))


def test_ids_without_a_character_are_refused_in_a_folder_and_in_a_text_to_score(nanogpt, tmp_path):
    text = "the quick brown fox jumps over the lazy dog\n" * 100
    (tmp_path / "fox.txt").write_text(text + "caf\u00e9", encoding="utf-8")  # at its end, the validation text
    out_dir = prepare(str(tmp_path / "fox.txt"), out_dir=tmp_path / "set", charset="auto")
    checkpoint = {"tokenizer": None, "dataset": None, "config": {"vocab_size": 28}}
    with pytest.raises(ValueError, match="set has characters for which run has no token"):
        text_to_score([checkpoint], ["run"], dataset=str(out_dir), meta=nanogpt / "meta.pkl")
    np.array([27, 28], dtype=np.uint16).tofile(nanogpt / "val.bin")
    with pytest.raises(ValueError, match="an id of 28, but the largest in the vocabulary is 27"):
        open_dataset(nanogpt)


def test_a_meta_pkl_is_read_without_executing_it(nanogpt, tmp_path):
    for value in ({"itos": Harmful(tmp_path / "executed")}, {"stoi": {}}, {"itos": {0: "ab"}}, {"itos": {1: "a"}}):
        (nanogpt / "meta.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match="meta.pkl"):
            open_dataset(nanogpt)
    (nanogpt / "meta.pkl").write_bytes(b"torn")
    with pytest.raises(ValueError, match="meta.pkl is damaged"):
        open_dataset(nanogpt)
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_neither_meta_is_taken_for_gpt2_s_tokens_or_refused(nanogpt, capsys):
    (nanogpt / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="meta.json or meta.pkl is missing"):
        open_dataset(nanogpt)  # ids below 28
    for name in ("train", "val"):
        np.array([31373, 995, 50256] * 10, dtype=np.uint16).tofile(nanogpt / f"{name}.bin")
    meta, ids = open_dataset(nanogpt)
    assert meta["vocab_size"] == 50257 and meta["tokenizer"] == {"kind": "gpt2"} and "GPT-2" in capsys.readouterr().out
    assert len(document_windows(ids["val"], 50256, 1, 100)) == 10  # there, documents end with GPT-2's id
    digest = meta["sha256"]
    np.array([31373, 995, 995] * 10, dtype=np.uint16).tofile(nanogpt / "val.bin")
    assert open_dataset(nanogpt)[0]["sha256"] != digest
    (nanogpt / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match="fox_char is not a data folder.*multiple"):
        open_dataset(nanogpt)


# --- checkpoints


def tokenizer_of(vocab_size, meta=None, saved=None):
    """The tokenizer of a checkpoint, which holds `saved`, after it was filled in."""
    checkpoint = {"tokenizer": saved, "config": {"vocab_size": vocab_size}}
    fill_in_tokenizers([checkpoint], meta)
    return load_tokenizer(checkpoint["tokenizer"])


def test_65_tokens_are_taken_for_shakespeare_s_characters_with_a_note(capsys):
    made = tokenizer_of(65)
    assert made.encode("\n !3:;?AZaz").tolist() == [0, 1, 2, 9, 10, 11, 12, 13, 38, 39, 64]  # as in nanoGPT's meta.pkl
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note:") and "65" in line and "shakespeare_char" in line and "--meta" in line


def test_a_meta_pkl_names_the_characters_of_a_nanogpt_checkpoint(tmp_path, capsys):
    path = tmp_path / "meta.pkl"
    for chars in ("абвгд", "".join(map(chr, range(200, 265)))):
        path.write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {}}))
        made = tokenizer_of(len(chars), path)
        assert made.decode(range(len(chars))) == chars and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="has 65 characters and the checkpoint has 80"):
        tokenizer_of(80, path)
    with pytest.raises(FileNotFoundError):
        tokenizer_of(65, tmp_path / "none")
    own = CharTokenizer("abc").to_dict()
    assert tokenizer_of(5, path, own).to_dict() == own and "no effect" in capsys.readouterr().out


def test_the_size_of_a_nanogpt_vocabulary_names_gpt2_s_tokens_or_asks_for_meta():
    checkpoints = [{"tokenizer": None, "config": {"vocab_size": size}} for size in (50257, 50304)]
    fill_in_tokenizers(checkpoints)
    assert [checkpoint["tokenizer"] for checkpoint in checkpoints] == [{"kind": "gpt2"}] * 2
    with pytest.raises(ValueError, match="80 tokens.*--meta"):
        tokenizer_of(80)
