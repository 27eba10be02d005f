"""
Checkpoints and the log: written whole or not at all, damaged ones named, nanoGPT's read, weights copied to new models.

    python -m pytest tests/test_checkpoint.py
"""
import errno
import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import eval_extrapolation
import sample
import train
from common import checkpoint as common_checkpoint
from common.checkpoint import copy_matching_weights, load_checkpoint, load_model, save_checkpoint
from model import GPT, GPTConfig
from tests.conftest import TINY_FLAGS, Harmful, all_logits, constant_checkpoint, damaged, run, tiny


def test_checkpoints_give_back_the_model(tmp_path):
    model, path = tiny("hope"), tmp_path / "ckpt.pt"
    torch.save({"config": vars(model.config), "model": model.state_dict()}, path)
    idx = torch.randint(50, (1, 9))
    assert torch.equal(load_model(tmp_path)(idx)[0], model(idx)[0])
    assert load_model(path, attn_scaling="logn").config.attn_scaling == "logn"
    with pytest.raises(FileNotFoundError, match="train.py"):
        load_checkpoint(tmp_path / "none")


def test_a_checkpoint_is_read_without_executing_it(finished_run, tmp_path, fails):
    torch.save({**load_checkpoint(finished_run), "args": Harmful(tmp_path / "executed")}, tmp_path / "ckpt.pt")
    for script, arguments in ((train, ["--resume", "--out_dir"]), (sample, ["--out_dir"]), (eval_extrapolation, [])):
        code, lines = fails(script, [*arguments, str(tmp_path)])
        assert code == 2 and len(lines) == 1 and "ckpt.pt" in lines[0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("script, arguments", [
    (train, ["--resume", "--out_dir", "{run}"]), (train, ["--init_from", "{run}/ckpt.pt"]),
    (sample, ["--out_dir", "{run}/ckpt.pt"]), (eval_extrapolation, ["{run}/ckpt.pt"])],
    ids=["resume", "init_from", "sample", "eval"])
def test_a_checkpoint_cut_anywhere_is_named_damaged_and_its_neighbour_offered(finished_run, tmp_path, fails, script,
                                                                              arguments):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "ckpt.pt"
    content = path.read_bytes()
    for length in [0, *random.Random(0).sample(range(1, len(content)), 9)]:
        path.write_bytes(content[:length])
        code, lines = fails(script, [text.format(run=path.parent) for text in arguments])
        assert code == 2 and len(lines) == 1 and "damaged" in lines[0] and "best.pt" in lines[0]
        assert path.read_bytes() == content[:length]


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


def test_scoring_and_sampling_a_folder_take_best_pt_if_there_is_one(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "best.pt", constant_checkpoint([1.0, 1e-30, 1e-30, 1e-30]))
    save_checkpoint(tmp_path / "run" / "ckpt.pt", constant_checkpoint([1e-30, 1.0, 1e-30, 1e-30]))
    (tmp_path / "a.txt").write_text("a" * 100)
    eval_extrapolation.main([str(tmp_path / "run"), "--text", str(tmp_path / "a.txt"), "--max_factor", "2", "--json",
                             str(tmp_path / "r.json")])
    [scored] = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert scored["buckets"][0]["nll"] == pytest.approx(0, abs=1e-6)
    for written in "ab":
        capsys.readouterr()
        sample.main(["--out_dir", str(tmp_path / "run"), "--start", "b", "--max_new_tokens", "9"])
        assert capsys.readouterr().out.startswith("b" + 9 * written + "\n")
        (tmp_path / "run" / "best.pt").unlink(missing_ok=True)


def test_a_nanogpt_checkpoint_is_the_same_network(tmp_path, capsys):
    """Its keys and quirks: model_args, compiled weights' prefix, causal masks stored as attn.bias, no tokenizer."""
    model = tiny("learned", vocab_size=65, bias=False)
    weights = {"_orig_mod." + name: value for name, value in model.state_dict().items()}
    weights |= {f"_orig_mod.transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": weights, "model_args": {name: getattr(model.config, name) for name in names}, "iter_num": 5,
                "best_val_loss": torch.tensor(1.0), "optimizer": {}, "config": {"dataset": "shakespeare_char"}},
               tmp_path / "ckpt.pt")
    idx = torch.randint(65, (2, 32))
    assert torch.equal(all_logits(load_model(tmp_path), idx), all_logits(model, idx))

    (tmp_path / "text.txt").write_text("To be, or not to be: " * 20)
    sample.main(["--out_dir", str(tmp_path), "--start", "ROMEO:", "--max_new_tokens", "40"])
    eval_extrapolation.main([str(tmp_path), "--text", str(tmp_path / "text.txt"), "--max_factor", "2"])
    out = capsys.readouterr().out
    assert "ROMEO:" in out and "[32, 64)" in out
    with pytest.raises(ValueError, match="no token for '#'"):
        sample.main(["--out_dir", str(tmp_path), "--start", "#"])
    with pytest.raises(ValueError, match="--text"):
        eval_extrapolation.main([str(tmp_path)])


@pytest.mark.parametrize("name", ["tokenizer", "args", "dataset", "iter", "model", "config", "optimizer", "scaler",
                                  "rng", "seconds", "logged", "best_val_loss", "loss_sum", "threads"])
def test_a_checkpoint_that_lacks_something_is_read_without_it_or_refused_in_one_line(finished_run, tmp_path, fails,
                                                                                   name):
    checkpoint = load_checkpoint(Path(finished_run, "ckpt.pt"))
    optional = name in ("seconds", "logged", "best_val_loss", "threads")
    for i, change in enumerate(("absent",) if optional else ("absent", None, 5, "text", [], {})):
        (tmp_path / str(i)).mkdir()
        changed = {key: value for key, value in checkpoint.items() if key != name}
        save_checkpoint(tmp_path / str(i) / "ckpt.pt", changed if change == "absent" else {**changed, name: change})
        for script, arguments in ((train, "--resume --max_iters 11 --out_dir RUN"),
                                  (train, "--init_from RUN --max_iters 1 --device cpu --out_dir RUN/new"),
                                  (sample, "--max_new_tokens 2 --out_dir RUN"),
                                  (eval_extrapolation, "--windows 1 --max_factor 1 RUN")):
            try:
                script.main([word.replace("RUN", str(tmp_path / str(i))) for word in arguments.split()])
            except (ValueError, OSError) as error:
                assert not isinstance(error, BlockingIOError)


def test_a_checkpoint_that_does_not_say_which_text_it_was_trained_on_is_called_damaged(tmp_path):
    for _, changed in damaged({"path": "a", "sha256": "0"}):
        save_checkpoint(tmp_path / "a.pt", {"config": {}, "dataset": changed})
        with pytest.raises(ValueError, match="a.pt is damaged"):
            load_checkpoint(tmp_path / "a.pt")


# --- weights that start another model


def test_the_same_weights_give_the_same_logits_after_init():
    source, model = tiny("hope"), GPT(GPTConfig(**asdict(tiny("hope").config)))
    copy_matching_weights(model, {"config": asdict(source.config), "model": source.state_dict()})
    idx = torch.randint(50, (1, 20))
    assert torch.equal(all_logits(model.eval(), idx), all_logits(source, idx))


def test_values_of_another_encoding_are_not_taken_for_its_own():
    """KERPLE's r1 in the long layers of one model, in the short layers of the other."""
    old, new = tiny("kerple"), tiny("t5", local_pe="kerple", window_pattern="SL", window=4)
    taken, added, dropped = copy_matching_weights(new, {"config": asdict(old.config), "model": old.state_dict()})
    assert set(dropped) == {"transformer.wpe.r1", "transformer.wpe.r2"}
    assert set(added) == {"transformer.wpe.table", "transformer.wpe_local.r1", "transformer.wpe_local.r2"}


# --- the folder of a run, and its log


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(finished_run, monkeypatch, fails):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(common_checkpoint, "open", denied, raising=False)  # root may read anything
    code, [line] = fails(sample, ["--out_dir", finished_run])
    assert code == 1 and "best.pt: Permission denied: change its permissions" in line and "damaged" not in line


def test_a_write_that_fails_names_the_cause_and_not_what_torch_makes_of_it(tmp_path):
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OSError, match="a.pt could not be written, the previous file is kept: File too large"):
            save_checkpoint(tmp_path / "a.pt", {"weights": [torch.zeros(10**6), torch.zeros(10**6)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert torch.load(tmp_path / "a.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_where_folders_cannot_be_locked_training_goes_on_with_a_note(dataset, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(dataset, tmp_path, "--max_iters", "2")["iter"] == 2
    [note] = [line for line in capsys.readouterr().out.splitlines() if "lock" in line]
    assert note.startswith(f"note: {tmp_path} cannot be locked (No locks available)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null_in_the_log(tmp_path, value):
    common_checkpoint.append_log(tmp_path / "log.jsonl", {"iter": 3, "val_loss": value, "lr": 0.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"iter": 3, "val_loss": null, "lr": 0.5}\n'


def test_a_new_run_puts_the_log_of_one_whose_checkpoints_are_gone_aside(tmp_path, capsys):
    content = "".join(json.dumps({"iter": i, "tokens": 64 * i}) + "\n" for i in (0, 5))
    (tmp_path / "log.jsonl").write_text(content)
    common_checkpoint.cut_log(tmp_path / "log.jsonl", -1)
    [aside] = tmp_path.glob("log_before_*.jsonl")
    assert aside.read_text() == content and (tmp_path / "log.jsonl").read_text() == ""
    assert str(aside) in capsys.readouterr().out


def test_two_processes_do_not_train_in_one_folder(dataset, tmp_path, fails):
    (tmp_path / "out").mkdir()
    with common_checkpoint.lock(tmp_path / "out", wait=False):
        code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "out")])
    assert code == 2 and "another process" in lines[0] and not list(tmp_path.glob("out/*.pt"))


def test_a_log_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for torn in ('{"iter": 1', "{}", "5", "\0"):
        path.write_text("".join(json.dumps({"iter": i}) + "\n" for i in (0, 5, 10)) + torn)
        common_checkpoint.cut_log(path, 5)
        assert path.read_text() == '{"iter": 0}\n{"iter": 5}\n'
