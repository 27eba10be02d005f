"""
From a data set on the disk to tensors: how sets are found, checked, batches, and what is scored.

    python -m pytest tests/test_loader.py
"""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_extrapolation
import sample
import train
from data.loader import (
    batch_at,
    document_windows,
    open_dataset,
    text_to_score,
    token_tensor,
    training_batch,
    validation_batches,
)
from data.prepare import prepare
from tests.conftest import TINY_FLAGS

CPU = torch.device("cpu")


# --- data sets


def changed_copy(dataset, tmp_path, name, change):
    folder = tmp_path / "changed"
    shutil.copytree(dataset, folder)
    content = bytearray((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("name, change, words", [
    ("train.bin", lambda content: content.__setitem__(slice(100, 102), b"\x63\x00"), "id of 99"),
    ("val.bin", lambda content: content.__setitem__(slice(100, 102), b"\x05\x00"), "changed since"),
    ("val.bin", lambda content: content.__delitem__(slice(-8, None)), "should have"),
    ("meta.json", lambda content: content.__delitem__(slice(-20, None)), "damaged")],
    ids=["id out of range", "another id", "cut short", "meta cut short"])
def test_a_stale_or_edited_data_set_is_refused_with_the_command_that_makes_it_anew(
        dataset, tmp_path, fails, name, change, words):
    folder = changed_copy(dataset, tmp_path, name, change)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", folder, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and len(lines) == 1 and words in lines[0] and "data/prepare.py --" in lines[0]
    assert not (tmp_path / "out").exists()


# --- batches


def test_targets_are_the_inputs_one_token_later():
    x, y = training_batch(token_tensor(np.arange(1000, dtype=np.uint16), CPU), 5, 12, 3, 7, CPU)
    assert x.shape == y.shape == (5, 12) and torch.equal(x + 1, y)
    assert len(set(x[:, 0].tolist())) == 5


def test_a_batch_has_the_ids_of_the_file_above_32767_too(tmp_path):
    """The tensor holds 16 bits with a sign, and GPT-2's vocabulary needs them without."""
    ids = np.random.default_rng(0).integers(2**16, size=500).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    tensor = token_tensor(np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="c"), CPU)
    offsets = np.array([0, 17, 400, 489])
    x, y = batch_at(tensor, offsets, 10, CPU)
    assert ids.max() > 60000 and x.dtype == y.dtype == torch.int64
    for row, i in enumerate(offsets):
        assert x[row].tolist() == ids[i:i + 10].tolist() and y[row].tolist() == ids[i + 1:i + 11].tolist()


def test_a_token_tensor_on_the_cpu_is_the_file_itself_and_no_copy(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="c")
    tensor = token_tensor(ids, CPU)
    assert tensor.data_ptr() == ids.ctypes.data
    tensor[0] = 9
    assert ids[0] == 9 and np.fromfile(tmp_path / "train.bin", dtype=np.uint16)[0] == 0  # and the disk is not written


@pytest.mark.parametrize("free, stays", [(4000, "cpu"), (4001, "meta")])
def test_tokens_move_to_the_gpu_where_they_take_less_than_a_tenth_of_its_free_memory(monkeypatch, free, stays):
    """A device without memory plays the GPU: what is asked is where the 400 bytes end up."""
    class Device:
        type = "cuda"

    to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: to(tensor, "meta"))
    assert token_tensor(np.zeros(200, dtype=np.uint16), Device()).device.type == stays


def test_validation_windows_are_spread_over_the_whole_text_and_the_same_each_time():
    ids = token_tensor(np.arange(1000, dtype=np.uint16), CPU)
    batches = list(validation_batches(ids, 3, 10, 4, CPU))
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert len(batches) == 4 and starts[0] == 0 and batches[-1][1][-1, -1] == 999
    assert (starts.diff() - 989 / 11).abs().max() < 1.5
    assert all(torch.equal(y, x + 1) and x.shape == (3, 10) for x, y in batches)
    again = list(validation_batches(ids, 3, 10, 4, CPU))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again))


# --- what is scored


def test_windows_lie_inside_one_document_and_do_not_overlap():
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 300, size=40)
    ids = np.concatenate([np.append(np.arange(size) + 1000 * i, 65535) for i, size in enumerate(sizes)])
    windows = document_windows(ids.astype(np.uint16), 65535, 20, 10**6)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()  # one document each, and no end-of-document id
    assert len(set(windows.flatten().tolist())) == windows.numel()
    some = document_windows(ids.astype(np.uint16), 65535, 20, 8)
    assert len(some) == 8 and torch.equal(some[0], windows[0]) and torch.equal(some[-1], windows[-1])


def test_a_document_of_exactly_one_window_gives_one_and_a_shorter_one_none():
    ids = np.array([1, 2, 3, 4, 0, 5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 14, 15, 0], dtype=np.uint16)
    assert document_windows(ids, 0, 3, 100).tolist() == [[1, 2, 3, 4], [8, 9, 10, 11], [12, 13, 14, 15]]
    with pytest.raises(ValueError, match="the 10 tokens of a window, the longest has 8"):
        document_windows(ids, 0, 9, 100)


def checkpoint_of(path):
    """As much of a checkpoint as text_to_score asks for, of a run that was trained on a data set."""
    meta, _ = open_dataset(path)
    return {"tokenizer": meta["tokenizer"], "config": {"vocab_size": meta["vocab_size"]},
            "dataset": {"path": str(path), "sha256": meta["sha256"]}}


def test_a_data_set_that_was_replaced_after_the_training_is_not_scored_unless_it_is_named(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    checkpoint = checkpoint_of(tmp_path / "set")
    ids, source, digest, _ = text_to_score([checkpoint], ["run"])
    assert (source, digest) == (str(tmp_path / "set"), checkpoint["dataset"]["sha256"])
    assert (ids == open_dataset(dataset)[1]["val"]).all()
    (tmp_path / "other.txt").write_text("one two three " * 200)
    shutil.rmtree(tmp_path / "set")
    prepare(str(tmp_path / "other.txt"), out_dir=tmp_path / "set")
    with pytest.raises(ValueError, match="not the text that run was trained on.*--dataset or --text"):
        text_to_score([checkpoint], ["run"])
    ids, _, digest, _ = text_to_score([checkpoint], ["run"], dataset=str(tmp_path / "set"))
    assert digest == open_dataset(tmp_path / "set")[0]["sha256"] and len(ids) == 281


def test_runs_that_were_trained_on_different_texts_are_noted(dataset, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("one two three " * 200)
    other = prepare(str(tmp_path / "other.txt"), out_dir=tmp_path / "other")
    capsys.readouterr()
    runs = [checkpoint_of(dataset), checkpoint_of(other)]
    text_to_score(runs[:1] * 2, ["a", "b"])
    assert capsys.readouterr().out == ""
    text_to_score(runs, ["first", "second"])
    [line] = capsys.readouterr().out.splitlines()
    assert "different texts" in line and f"first on {dataset}" in line and f"second on {other}" in line


def test_runs_and_texts_of_different_tokenizers_are_not_scored_together(dataset, tmp_path):
    other = prepare(str(Path(dataset).parent / "text0"), "bpe", tmp_path / "set", vocab_size=300)
    a, b = checkpoint_of(dataset), checkpoint_of(other)
    with pytest.raises(ValueError, match="b and a have different tokenizers"):
        text_to_score([a, b], ["a", "b"])
    with pytest.raises(ValueError, match="made with another tokenizer than that of a"):
        text_to_score([a], ["a"], dataset=str(other))
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        text_to_score([{**a, "dataset": None}], ["a"])


def test_characters_of_a_text_that_the_model_has_never_seen_are_named(dataset, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("abcdefg " + "".join(map(chr, range(0x430, 0x450))), encoding="utf-8")
    ids, _, _, tokenizer = text_to_score([checkpoint_of(dataset)], ["run"], text=str(tmp_path / "book.txt"))
    assert (ids == tokenizer.unknown).sum() == 32
    [line] = capsys.readouterr().out.splitlines()
    assert "32 of the 40 characters (80.0%)" in line and "'абвгдежзийклмнопрсту' and 12 more" in line
    (tmp_path / "book.txt").write_text("abcdefg " * 10)
    text_to_score([checkpoint_of(dataset)], ["run"], text=str(tmp_path / "book.txt"))
    assert capsys.readouterr().out == ""


def test_a_byte_pair_run_trains_samples_and_is_scored_without_its_data_folder(dataset, tmp_path, capsys):
    out_dir = prepare(str(Path(dataset).parent / "text0"), "bpe", tmp_path / "set", vocab_size=300)
    train.main([*TINY_FLAGS, "--dataset", str(out_dir), "--out_dir", str(tmp_path / "run"), "--max_iters", "5"])
    out_dir.rename(tmp_path / "gone")
    (tmp_path / "book.txt").write_text("one two three " * 200)
    capsys.readouterr()
    sample.main(["--out_dir", str(tmp_path / "run"), "--start", "one twö", "--max_new_tokens", "20"])
    eval_extrapolation.main([str(tmp_path / "run"), "--text", str(tmp_path / "book.txt"), "--windows", "3",
                             "--max_factor", "2"])
    out = capsys.readouterr().out
    assert out.startswith("one twö") and "perplexity by position" in out
