"""
Continuing from a checkpoint with another encoding, context or text: what carries over, what is new, what is refused.

    python -m pytest tests/test_init_from.py
"""
import shutil
from dataclasses import asdict

import pytest
import torch

import eval_extrapolation
import train
from common.checkpoint import init_weights, load_checkpoint, load_model
from data.prepare import prepare
from model import GPT, GPTConfig
from tests.conftest import TINY_FLAGS
from tests.test_encodings import all_logits, tiny
from tests.test_training import log, run

TINY_RUN = TINY_FLAGS[:TINY_FLAGS.index("--n_layer")][2:] + TINY_FLAGS[TINY_FLAGS.index("--batch_size"):]


def continued(start, dataset, out_dir, *flags):
    """Flags of the network are not given: they come from the checkpoint."""
    train.main([*TINY_RUN, "--dataset", dataset, "--out_dir", str(out_dir), "--init_from", str(start), *flags])
    return load_checkpoint(out_dir / "ckpt.pt")


def test_a_run_that_starts_from_another_has_its_weights_and_a_new_schedule(finished_run, dataset, tmp_path, capsys):
    best = load_checkpoint(finished_run)
    checkpoint = continued(finished_run, dataset, tmp_path / "next", "--max_iters", "5", "--eval_interval", "5")
    assert checkpoint["config"] == best["config"] and checkpoint["iter"] == 5
    assert log(tmp_path / "next")[0]["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)
    assert log(tmp_path / "next")[0]["iter"] == 0 and checkpoint["args"]["lr_decay_iters"] == 5
    out = capsys.readouterr().out
    assert f"{len(best['model'])} tensors from {finished_run}; new: none; left out: none" in out


def test_dropping_the_rotation_keeps_every_weight(finished_run, dataset, tmp_path):
    checkpoint = continued(finished_run, dataset, tmp_path / "drope", "--pe", "nope", "--max_iters", "5")
    assert checkpoint["config"]["pe"] == "nope"
    assert checkpoint["model"].keys() == load_checkpoint(finished_run)["model"].keys()


def test_what_only_the_new_encoding_has_is_initialised_and_named(finished_run, dataset, tmp_path, capsys):
    continued(finished_run, dataset, tmp_path / "t5", "--pe", "t5", "--max_iters", "5")
    assert "new: transformer.wpe.table; left out: none" in capsys.readouterr().out
    continued(tmp_path / "t5", dataset, tmp_path / "back", "--pe", "rope", "--max_iters", "5")
    assert "left out: transformer.wpe.table" in capsys.readouterr().out


def test_values_of_another_encoding_are_not_taken_for_its_own():
    """KERPLE's r1 in the long layers of one model, in the short layers of the other."""
    old, new = tiny("kerple"), tiny("t5", local_pe="kerple", window_pattern="SL", window=4)
    taken, added, dropped = init_weights(new, {"config": asdict(old.config), "model": old.state_dict()})
    assert set(dropped) == {"transformer.wpe.r1", "transformer.wpe.r2"}
    assert set(added) == {"transformer.wpe.table", "transformer.wpe_local.r1", "transformer.wpe_local.r2"}


def test_a_longer_context_with_scaling_rotates_as_the_checkpoint_does_where_it_was_trained(finished_run, dataset,
                                                                                            tmp_path):
    checkpoint = continued(finished_run, dataset, tmp_path / "pi", "--pe", "rope", "--block_size", "64",
                           "--rope_scaling", "pi", "--rope_factor", "4", "--max_iters", "5")
    assert checkpoint["config"]["rope_context"] == 16
    theta = load_model(finished_run, pe="rope").transformer.wpe.theta
    assert torch.equal(load_model(checkpoint).transformer.wpe.theta, (theta.double() / 4).float())


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_the_scalings_start_from_rope_context_and_hope_s_cut_is_that_of_it(scaling):
    def theta(pe, **changes):
        return tiny(pe, n_embd=64, n_head=1, rope_scaling=scaling, rope_factor=4.0, **changes).transformer.wpe.theta

    for pe in ("rope", "hope"):
        longer = theta(pe, block_size=512, rope_context=128)
        assert torch.equal(longer, theta(pe, block_size=128)) and len(longer) == (32 if pe == "rope" else 11)


def test_a_model_trained_with_scaling_is_scored_with_it_unless_another_is_asked_for(finished_run, dataset, tmp_path):
    continued(finished_run, dataset, tmp_path / "pi", "--pe", "rope", "--block_size", "32", "--rope_scaling", "pi",
              "--rope_factor", "2", "--max_iters", "5")
    config = load_checkpoint(tmp_path / "pi")["config"]
    parse = eval_extrapolation.make_parser().parse_args
    assert eval_extrapolation.scalings(parse(["x"]), config) == [
        {"rope_scaling": "pi", "rope_factor": 2.0, "attn_scaling": "none"}]
    assert eval_extrapolation.scalings(parse(["x", "--rope_scaling", "none", "yarn"]), config) == [
        {"rope_scaling": "none", "rope_factor": 1.0, "attn_scaling": "none"},
        {"rope_scaling": "yarn", "rope_factor": "auto", "attn_scaling": "none"}]


def test_a_nanogpt_checkpoint_can_be_continued_on_a_text_of_as_many_characters_and_says_so(dataset, tmp_path, capsys):
    old = run(dataset, tmp_path / "learned", "--pe", "learned", "--max_iters", "5")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": old["model"], "model_args": {name: old["config"][name] for name in names}, "iter_num": 5,
                "config": {}}, tmp_path / "nanogpt.pt")
    capsys.readouterr()
    continued(tmp_path / "nanogpt.pt", dataset, tmp_path / "next", "--max_iters", "5")
    assert "does not say what its 99 tokens are" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("another text of other letters\n" * 200)
    other = prepare(str(tmp_path / "text.txt"), "char", tmp_path / "other", charset="auto")
    with pytest.raises(ValueError, match="vocabulary"):
        continued(tmp_path / "nanogpt.pt", str(other), tmp_path / "more", "--max_iters", "5")


def test_resume_of_a_run_that_started_from_another_does_not_start_again(finished_run, dataset, tmp_path):
    whole = continued(finished_run, dataset, tmp_path / "whole", "--max_iters", "10", "--lr_decay_iters", "10")
    continued(finished_run, dataset, tmp_path / "parts", "--max_iters", "5", "--lr_decay_iters", "10")
    train.main(["--resume", "--out_dir", str(tmp_path / "parts"), "--max_iters", "10"])
    parts = load_checkpoint(tmp_path / "parts" / "ckpt.pt")
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


def test_resume_may_evaluate_more_often_and_says_when_the_schedule_is_over(finished_run, dataset, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    train.main(["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "14", "--eval_interval", "2"])
    assert [line["iter"] for line in log(tmp_path / "run")] == [0, 5, 10, 12, 14]
    assert "the schedule ended at step 10" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--n_embd", "48", "--n_head", "2"], "n_embd (32 there, 48 here)"), (["--n_layer", "3"], "n_layer (2 there"),
    (["--no-bias"], "bias (True there, False here)"), (["--n_head", "4"], "n_head (2 there, 4 here)"),
    (["--window_pattern", "SX"], "letters S and L"), (["--window", "-3"], "at least 0"),
    (["--window", "few"], "whole number"), (["--local_pe", "learned"], "acts on the embeddings"),
    (["--local_pe", "sinusoidal"], "acts on the embeddings"), (["--local_pe", "rotary"], "nope"),
    (["--local_rope_base", "1"], "above 1"), (["--rope_scaling", "linear"], "yarn"),
    (["--rope_factor", "0.5"], "at least 1"), (["--pe", "nope", "--rope_scaling", "pi"], "does not rotate"),
    (["--rope_context", "1"], "at least 2"), (["--init_from", "{tmp}/none"], "no checkpoint"),
    (["--init_from", "{tmp}/torn.pt"], "damaged"), (["--init_from", "{learned}", "--block_size", "32"], "(16, 32)"),
    (["--init_from", "{run}", "--dataset", "{tmp}/none"], "data.prepare"), (["--optimizer", "sgd"], "muon"),
    (["--muon_learning_rate", "-1"], "at least 0"), (["--learning_rate", "0"], "above 0")])
def test_what_cannot_carry_over_or_makes_no_sense_is_one_line(flags, words, finished_run, learned, dataset, tmp_path,
                                                              fails):
    (tmp_path / "torn.pt").write_bytes(b"half a checkpoint")
    flags = [flag.format(tmp=tmp_path, run=finished_run, learned=learned) for flag in flags]
    start = [] if "--init_from" in flags else ["--init_from", finished_run]
    data = [] if "--dataset" in flags else ["--dataset", dataset]
    code, lines = fails(train, [*TINY_RUN, *data, "--out_dir", str(tmp_path / "out"), *start, *flags])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.fixture(scope="session")
def learned(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    run(dataset, folder, "--pe", "learned", "--max_iters", "5")
    return folder


def test_another_tokenizer_is_refused(finished_run, tmp_path, fails):
    (tmp_path / "text.txt").write_text("another text of other letters\n" * 200)
    other = prepare(str(tmp_path / "text.txt"), "char", tmp_path / "other", charset="auto")
    code, lines = fails(train, [*TINY_RUN, "--dataset", str(other), "--out_dir", str(tmp_path / "out"), "--init_from",
                                finished_run])
    assert code == 2 and "another tokenizer" in lines[0]


def test_the_same_weights_give_the_same_logits_after_init():
    source, model = tiny("hope"), GPT(GPTConfig(**asdict(tiny("hope").config)))
    init_weights(model, {"config": asdict(source.config), "model": source.state_dict()})
    idx = torch.randint(50, (1, 20))
    assert torch.equal(all_logits(model.eval(), idx), all_logits(source, idx))
