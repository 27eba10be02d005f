"""From a data set on the disk to tensors: how sets are found, batches, and what is scored."""
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.loader import document_windows, open_dataset, text_to_score, token_tensor
from data.prepare import prepare
from data.sources import SOURCES, sha256
from data.tokenizer import from_dict
from tests.conftest import Harmful

CPU = torch.device("cpu")


def test_the_default_data_set_is_made_once_and_beside_the_project(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "project" / "loader.py"))
    monkeypatch.setitem(SOURCES, "pysrc", lambda: made.append(1) or ["def f(): pass\n" * 30])
    monkeypatch.chdir(tmp_path)
    metas = [open_dataset(loader.DEFAULT_SET)[0] for _ in range(2)]
    assert metas[0] == metas[1] and metas[0]["arguments"]["source"] == ["pysrc"] and made == [1]
    assert len(list(tmp_path.glob("project/pysrc_char/*.*"))) == 3


def test_a_data_set_of_that_name_in_the_current_folder_comes_first(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(other, loader.DEFAULT_SET)
    assert open_dataset(loader.DEFAULT_SET)[0] == open_dataset(other)[0]


def test_a_data_set_that_was_cut_short_is_called_damaged(dataset, tmp_path):
    for name in ("train.bin", "val.bin", "meta.json"):
        path = shutil.copytree(dataset, tmp_path / name) / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="damaged.*delete .* and make it again"):
            open_dataset(path.parent)


@pytest.fixture
def nanogpt(tmp_path):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    text = "the quick brown fox jumps over the lazy dog\n" * 100
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype=np.uint16)
    ids[:4000].tofile(tmp_path / "train.bin")
    ids[4000:].tofile(tmp_path / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


def test_a_data_folder_of_nanogpt_is_one_document_of_its_characters_or_of_gpt2_s_tokens(nanogpt):
    meta, ids = open_dataset(nanogpt)
    tokenizer = from_dict(meta["tokenizer"])
    assert tokenizer.decode(ids["train"][:9]) == "the quick" and tokenizer.chars[0] == "\n"
    assert meta["vocab_size"] == tokenizer.vocab_size  # so that unknown characters have a token
    windows = document_windows(ids["val"], tokenizer.end_of_document, 50, 100)
    assert len(windows) == len(ids["val"]) // 51
    np.ones(100, dtype=np.uint16).tofile(nanogpt / "val.bin")
    assert open_dataset(nanogpt)[0]["sha256"] != meta["sha256"]
    (nanogpt / "meta.pkl").unlink()
    meta, _ = open_dataset(nanogpt)
    assert meta["tokenizer"] == {"kind": "gpt2"} and meta["vocab_size"] == 50257


@pytest.mark.parametrize("dtype, factor", [("uint32", 1), ("uint16", 2000)])
@pytest.mark.parametrize("characters", [True, False])
def test_ids_of_another_width_or_another_vocabulary_are_refused(nanogpt, dtype, factor, characters):
    for part in ("train", "val"):
        ids = factor * np.fromfile(nanogpt / f"{part}.bin", np.uint16).astype(int)  # at most 27 x
        ids.astype(dtype).tofile(nanogpt / f"{part}.bin")
    if not characters:
        (nanogpt / "meta.pkl").unlink()
    with pytest.raises(ValueError, match=r"val.bin has to hold ids below .* as a uint16"):
        open_dataset(nanogpt)


def test_a_meta_pkl_is_read_without_executing_it(nanogpt):
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps({"itos": Harmful(nanogpt / "executed")}))
    with pytest.raises(ValueError, match="meta.pkl is not nanoGPT's"):
        open_dataset(nanogpt)
    assert not (nanogpt / "executed").exists()


@pytest.mark.parametrize("meta", [{"vocab_size": 50304}, {"itos": {0: "the", 1: " quick"}}])
def test_a_meta_pkl_without_a_character_for_each_id_is_refused(nanogpt, meta):
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="meta.pkl has no itos of single characters"):
        open_dataset(nanogpt)


def test_a_training_batch_depends_on_seed_and_index_and_its_targets_are_one_token_later():
    ids = token_tensor(np.arange(1000, dtype=np.uint16), CPU)
    for seed, index in ((1, 2), (2, 1)):
        x, y = loader.training_batch(ids, 5, 12, seed, index, CPU)
        starts = np.random.default_rng((seed, index)).integers(1000 - 12, size=5)
        assert x.shape == (5, 12) and torch.equal(x + 1, y) and x[:, 0].tolist() == starts.tolist()


def test_a_batch_has_the_ids_above_32767_too():  # although the tensor is int16
    ids = np.random.default_rng(0).integers(2**16, size=500).astype(np.uint16)
    offsets = np.array([0, 17, 400, 489])
    x, y = loader.batch_at(token_tensor(ids, CPU), offsets, 10, CPU)
    assert ids.max() > 60000 and x.dtype == y.dtype == torch.int64
    assert x.tolist() == [ids[i:i + 10].tolist() for i in offsets]
    assert y.tolist() == [ids[i + 1:i + 11].tolist() for i in offsets]


def test_a_token_tensor_on_the_cpu_is_the_file_and_no_copy_and_does_not_write_it(dataset):
    ids, before = open_dataset(dataset)[1]["train"], Path(dataset, "train.bin").read_bytes()
    tensor = token_tensor(ids, CPU)
    assert isinstance(ids, np.memmap) and tensor.data_ptr() == ids.ctypes.data
    tensor[0] = 9
    assert ids[0] == 9 and Path(dataset, "train.bin").read_bytes() == before


def test_validation_windows_are_spread_over_the_whole_text_and_the_same_each_time():
    ids = token_tensor(np.arange(1000, dtype=np.uint16), CPU)
    batches, again = (list(loader.validation_batches(ids, 3, 10, 4, CPU)) for _ in range(2))
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert len(batches) == 4 and starts[0] == 0 and batches[-1][1][-1, -1] == 999
    assert (starts.diff() - 989 / 11).abs().max() < 1.5
    assert all(torch.equal(y, x + 1) and x.shape == (3, 10) for x, y in batches)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again))


def test_windows_lie_inside_one_document_and_do_not_overlap():
    sizes = np.random.default_rng(0).integers(5, 300, size=40)
    ids = np.concatenate([np.append(np.arange(size) + 1000 * i, 65535)
                          for i, size in enumerate(sizes)]).astype(np.uint16)
    windows = document_windows(ids, 65535, 20, 10**6)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()  # and no end-of-document id
    assert len(set(windows.flatten().tolist())) == windows.numel()
    assert len(windows) == sum(size // 21 for size in sizes)
    some = document_windows(ids, 65535, 20, 8)
    assert len(some) == 8 and torch.equal(some[[0, -1]], windows[[0, -1]])
    longest = max(sizes)
    assert len(document_windows(ids, 65535, longest - 1, 9)) == 1
    with pytest.raises(ValueError, match=f"tokens of a window, the longest has {longest}"):
        document_windows(ids, 65535, longest, 9)


def checkpoint_of(path):
    """As much of a checkpoint as text_to_score reads, of a run that was trained on a data set."""
    meta, _ = open_dataset(path)
    trained_on = {"path": str(path), "sha256": meta["sha256"]}
    return {"tokenizer": meta["tokenizer"], "dataset": trained_on}


@pytest.fixture
def other(tmp_path):
    """A data set of another text, with the same tokenizer as `dataset`."""
    path = tmp_path / "other.txt"
    path.write_text("one two three " * 200)
    return prepare(str(path), out_dir=tmp_path / "other", charset="ascii")


def test_a_data_set_that_was_replaced_after_training_is_scored_only_if_named(dataset, other):
    checkpoint = checkpoint_of(dataset)
    ids, source, digest, _ = text_to_score([checkpoint], ["run"])
    assert (source, digest) == (dataset, checkpoint["dataset"]["sha256"])
    assert (ids == open_dataset(dataset)[1]["val"]).all()
    checkpoint["dataset"]["path"] = str(other)
    with pytest.raises(ValueError, match="not the text that run was trained on.*--dataset or"):
        text_to_score([checkpoint], ["run"])
    ids, _, digest, _ = text_to_score([checkpoint], ["run"], dataset=str(other))
    assert digest == open_dataset(other)[0]["sha256"] and len(ids) == 281


def test_runs_and_texts_of_different_tokenizers_are_not_scored_together(dataset, tmp_path):
    source = str(Path(dataset).parent / "text0")
    a = checkpoint_of(dataset)
    b = checkpoint_of(prepare(source, "bpe", tmp_path / "set", vocab_size=300))
    with pytest.raises(ValueError, match="b and a have different tokenizers"):
        text_to_score([a, b], ["a", "b"])
    with pytest.raises(ValueError, match="made with another tokenizer than that of a"):
        text_to_score([a], ["a"], dataset=str(tmp_path / "set"))


def test_a_text_is_scored_and_its_unknown_characters_are_counted(dataset, tmp_path, capsys):
    for text, note in (("abcd ыщь", "note: the model has never seen 3 of 8 characters\n"),
                       ("abcd", "")):
        path = tmp_path / "book.txt"
        path.write_text(text, encoding="utf-8")
        ids, _, digest, made = text_to_score([checkpoint_of(dataset)], ["run"], text=str(path))
        assert made.decode(ids[:4]) == "abcd" and digest == sha256(text.encode())
        assert capsys.readouterr().out == note


def test_a_text_is_divided_at_endoftext_and_no_window_crosses_a_border(dataset, tmp_path):
    (tmp_path / "stories.txt").write_text("one two<|endoftext|>\nthree<|endoftext|>\n")
    ids, _, _, tokenizer = text_to_score([checkpoint_of(dataset)], ["run"],
                                         text=str(tmp_path / "stories.txt"))
    windows = document_windows(ids, tokenizer.end_of_document, 5, 9)
    assert [tokenizer.decode(row) for row in windows] == ["one tw", "\nthree"]
