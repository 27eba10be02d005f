"""
Checkpoints and the log: written whole or not at all, damaged ones named, weights copied to new
models.
"""
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from common.checkpoint import (
    KEYS,
    cut_log,
    load_checkpoint,
    load_model,
    locked,
    replacing,
    save_checkpoint,
    scaling_factor,
)
from model import GPTConfig
from tests.conftest import TINY_FLAGS, Harmful, constant_checkpoint, tiny


def test_a_checkpoint_gives_back_the_model_ready_to_evaluate(tmp_path):
    model = tiny("hope", dropout=0.5)
    save_checkpoint(tmp_path / "ckpt.pt", {
        **constant_checkpoint([1.0] * 4), "config": asdict(model.config),
        "model": model.state_dict()})
    idx = torch.randint(50, (1, 9))
    assert torch.equal(load_model(tmp_path)(idx)[0], model.eval()(idx)[0])
    assert load_model(tmp_path / "ckpt.pt", attn_scaling="logn").config.attn_scaling == "logn"


def test_a_checkpoint_that_is_cut_anywhere_or_would_run_code_is_named(finished_run, tmp_path):
    content, path = Path(finished_run, "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    save_checkpoint(path, {**load_checkpoint(finished_run), "args": Harmful(tmp_path / "executed")})
    lengths = [0, *random.Random(0).sample(range(1, len(content)), 5)]
    for wrong in (path.read_bytes(), *(content[:length] for length in lengths)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"ckpt\.pt is damaged"):
            load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_checkpoint_of_this_project_is_named(finished_run, tmp_path):
    whole = load_checkpoint(finished_run)
    wrong = [{name: whole[name] for name in whole if name != key} for key in KEYS]
    wrong += [{**whole, "config": {**whole["config"], field: value}}
              for field, value in (("pe", "from_elsewhere"), ("exponent", 2.0), ("n_head", 0))]
    for content in (*wrong, torch.zeros(3)):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt is damaged or not a checkpoint of this"):
            load_checkpoint(tmp_path / "a.pt")


def test_the_automatic_factor_is_the_text_over_rope_context_if_that_is_set():
    config = asdict(GPTConfig(block_size=64, rope_context=16))
    assert scaling_factor({"config": config}, 160) == 10


def test_a_file_is_whole_and_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What the name stands for, and what is written, when the file is flushed and renamed."""
    path, events, fsync, rename = tmp_path / "a", [], os.fsync, os.replace
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda number: (
        events.append((path.read_text(), os.fstat(number).st_size)), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (
        events.append((path.read_text(), "renamed")), rename(*names)))
    with replacing(path) as file:
        file.write(b"new!")
    assert events == [("old", 4), ("old", "renamed")] and path.read_text() == "new!"


def test_a_second_training_in_a_folder_is_refused_until_the_first_ends(dataset, tmp_path, fails):
    pytest.importorskip("fcntl")
    arguments = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "out"),
                 "--max_iters", "1"]
    with locked(tmp_path / "out"):
        code, [line] = fails(train, arguments)
    assert code == 2 and "another process" in line and not list(tmp_path.glob("out/*"))
    train.main(arguments)
    assert (tmp_path / "out" / "ckpt.pt").exists()
    with pytest.raises(BlockingIOError), locked(tmp_path / "out"):
        raise BlockingIOError  # such as print() may raise: not about the lock


@pytest.mark.parametrize("torn", ["", '{"iter": 1', '{"iter": 5}', "\0"])
def test_lines_after_the_checkpoint_and_one_cut_short_by_a_kill_are_dropped(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"iter": i}) + "\n" for i in (0, 5, 10)) + torn)
    cut_log(path, 5)
    assert path.read_text() == '{"iter": 0}\n{"iter": 5}\n'


def test_values_of_another_encoding_are_not_taken_for_its_own():
    """KERPLE's r1 in the long layers of one model, in the short layers of the other."""
    old, new = tiny("kerple"), tiny("t5", local_pe="kerple", window_pattern="SL", window=4)
    added, dropped = new.load_state_dict(old.state_dict(), strict=False)
    assert set(dropped) == {"transformer.wpe.r1", "transformer.wpe.r2"}
    assert set(added) == {"transformer.wpe.table", "transformer.wpe_local.r1",
                          "transformer.wpe_local.r2"}
