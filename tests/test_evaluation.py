"""
Scores beyond the trained context: one pass equals many, buckets, errors, scalings, tables, the JSON.

    python -m pytest tests/test_evaluation.py

The expected numbers are computed by hand, for models that predict the same distribution at every position.
"""
import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import eval_extrapolation
from common import flags
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from data import loader
from model import PE
from tests.conftest import all_logits, byte_tokenizer, constant_checkpoint, continued, run, tiny, unwritable

CPU = torch.device("cpu")


# --- one pass


@pytest.mark.parametrize("pe", [pe for pe in PE if pe != "learned"])
@pytest.mark.parametrize("chunk", [1, 13, 64, 500])
def test_one_pass_in_chunks_equals_scoring_each_prefix_separately(pe, chunk):
    model, windows = tiny(pe), torch.randint(50, (3, 65))
    losses = eval_extrapolation.score(model, windows, chunk=chunk, batch_size=2)
    for n in (1, 2, 31, 32, 33, 64):
        with torch.no_grad():
            logits, _ = model(windows[:, :n])             # no cache, and nothing behind the n-th token
        expected = -logits[:, 0].log_softmax(-1).gather(1, windows[:, [n]])[:, 0]
        torch.testing.assert_close(losses[:, n - 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pe", ["hope", "alibi"])
def test_losses_do_not_depend_on_how_many_windows_go_side_by_side(pe):
    model, windows = tiny(pe), torch.randint(50, (5, 97))
    one, three, all_five = (eval_extrapolation.score(model, windows, 20, n) for n in (1, 3, 5))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, all_five, atol=1e-5, rtol=0)


def test_learned_is_scored_up_to_its_limit_and_marked_behind_it():
    losses = eval_extrapolation.score(tiny("learned"), torch.randint(50, (2, 65)), chunk=20, batch_size=2)
    assert not losses[:, :32].isnan().any() and losses[:, 32:].isnan().all()
    bucket = eval_extrapolation.summarize(losses, torch.ones(2, 64), losses, [0, 32, 64], [64, 64])[1]
    assert bucket["nll"] is bucket["ppl"] is bucket["stderr"] is None and bucket["ppl_local"] == pytest.approx(math.e)


@pytest.mark.parametrize("width", [16, 32, 50, 96, 100])
def test_local_context_is_at_most_l_and_at_least_half_of_it(width):
    model, windows, L = tiny("rope"), torch.randint(50, (2, width + 1)), 32
    local = eval_extrapolation.score_local(model, windows, L, batch_size=2)
    for n in range(1, width + 1):                         # n tokens stand before the target
        candidates = []
        for context in range(min(n, L // 2), min(n, L) + 1):
            with torch.no_grad():
                logits = all_logits(model, windows[:, n - context:n])[:, -1]
            candidates.append(-logits.log_softmax(-1).gather(1, windows[:, [n]])[:, 0])
        assert min((local[:, n - 1] - c).abs().max() for c in candidates) < 1e-4


def test_as_many_windows_are_scored_at_a_time_as_fit_in_half_a_gigabyte(monkeypatch):
    config = dict(n_layer=4, n_head=1, n_embd=10, block_size=50, vocab_size=20, pe="nope")
    forward = 100 * (3 * 20 + 16 * 10)  # numbers for each token of a chunk
    cache = 2 * 10 * 4 * 1000  # keys and values of four layers and 1,000 tokens
    assert eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU) == int(0.5e9 / 4 / (forward + cache))
    forward = 200 * (3 * 20 + 16 * 10)  # a forward of score_local reads block_size tokens
    config["block_size"] = 200
    assert eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU) == int(0.5e9 / 4 / (forward + cache))
    config["block_size"] = 10**6
    assert eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU) == 1  # never none
    config["block_size"] = 50
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1e9, 8e9))  # free, total: half of what is free
    assert (eval_extrapolation.windows_at_a_time(config, 1000, 100, torch.device("cuda"))
            == eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU))


# --- numbers

THIRDS = [1 / 3, 1 / 3, 1 / 6, 1 / 6]


def evaluate(tmp_path, checkpoints, text, *flags):
    """Score checkpoints (name -> dict) on a text through main() -> name -> its buckets in the JSON."""
    paths = [tmp_path / f"{name}.pt" for name in checkpoints]
    for path, checkpoint in zip(paths, checkpoints.values()):
        save_checkpoint(path, checkpoint)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    eval_extrapolation.main([*map(str, paths), "--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "r.json"),
                             *flags])
    return {made["name"]: made["buckets"] for made in json.loads((tmp_path / "r.json").read_text())["runs"]}


def random_checkpoint(**changes):
    """A model with random weights, whose losses depend on all that it sees."""
    model = tiny("rope", vocab_size=4, block_size=16, **changes)
    return {**constant_checkpoint(THIRDS), "config": asdict(model.config), "model": model.state_dict()}


def test_buckets_average_their_own_positions_and_the_error_is_over_windows():
    losses = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 8.0, 8.0]])
    local = losses - torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 2.0]])
    first, second = eval_extrapolation.summarize(losses, local, losses - 1, [0, 2, 4], [4, 8])
    assert (first["nll"], second["nll"]) == (2.0, 7.0) and first["stderr"] == 0 and second["stderr"] == pytest.approx(1)
    assert second["ppl"] == pytest.approx(math.exp(7)) and second["nll_above_first"] == 1
    assert first["nll_above_local"] == first["nll_above_local_stderr"] == 0
    assert (second["nll_above_local"], second["nll_above_local_stderr"]) == (2.0, pytest.approx(0.5))
    assert second["ppl_local"] == pytest.approx(math.exp(5))
    assert first["bits_per_character"] == pytest.approx(2 / math.log(2))
    assert second["bits_per_character"] == pytest.approx(3.5 / math.log(2))  # two characters a token
    assert eval_extrapolation.bucket_edges(8, 16) == [0, 8, 16, 32, 64, 128]
    assert eval_extrapolation.bucket_edges(8, 6) == [0, 8, 16, 32, 48]


def test_the_loss_perplexity_and_bits_of_a_constant_model_are_those_of_its_distribution(tmp_path):
    probabilities = {"a": 0.5, "b": 0.125}
    [buckets] = evaluate(tmp_path, {"run": constant_checkpoint([*probabilities.values(), 0.25, 0.125])},
                         "ab" * 500, "--max_factor", "4", "--windows", "5").values()
    nll = (math.log(2) + math.log(8)) / 2  # every second token is an a
    assert [(bucket["start"], bucket["end"]) for bucket in buckets] == [(0, 8), (8, 16), (16, 32)]
    for bucket in buckets:
        assert bucket["nll"] == pytest.approx(nll, abs=1e-5) and bucket["stderr"] == pytest.approx(0, abs=1e-6)
        assert bucket["ppl"] == bucket["ppl_local"] == pytest.approx(4, abs=1e-4)
        assert bucket["bits_per_character"] == pytest.approx(2, abs=1e-5)
        assert bucket["nll_above_first"] == bucket["nll_above_first_stderr"] == 0


def test_the_loss_above_the_first_run_is_the_difference_on_the_same_tokens(tmp_path, capsys):
    """Windows of a alone and of b alone: the losses differ by window, and so do the differences."""
    first, second = [0.5, 0.25, 0.125, 0.125], [0.25, 0.5 / 3, 0.25, 1 / 3]
    text = ("a" * 17 + "b" * 17) * 2
    scored = evaluate(tmp_path, {"one": constant_checkpoint(first), "two": constant_checkpoint(second)}, text,
                      "--max_factor", "2", "--windows", "4", "--all_tables")
    differences = [math.log(first[i] / second[i]) for i in (0, 1)]  # ln 2, ln 1.5
    for bucket in scored["two"]:
        assert bucket["nll_above_first"] == pytest.approx(sum(differences) / 2, abs=1e-5)
        spread = abs(differences[0] - differences[1]) / 2  # the standard deviation of four values is 2 / sqrt(3) of it
        assert bucket["nll_above_first_stderr"] == pytest.approx(spread / math.sqrt(3), abs=1e-5)
    assert all(bucket["nll_above_first"] == 0 for bucket in scored["one"])
    above = re.search(r"minus that of one.*?\n.*?\ntwo +(\S+) ± (\S+)", capsys.readouterr().out, re.DOTALL)
    assert [float(number) for number in above.groups()] == [round(sum(differences) / 2, 3),
                                                            round(spread / math.sqrt(3), 3)]


def test_the_error_of_a_perplexity_is_that_of_the_loss_times_the_perplexity(tmp_path, capsys):
    probabilities = [0.5, 0.01, 0.25, 0.24]
    [[bucket, _]] = evaluate(tmp_path, {"run": constant_checkpoint(probabilities)}, "a" * 17 + "b" * 17,
                             "--max_factor", "2", "--windows", "2").values()
    losses = [-math.log(p) for p in probabilities[:2]]
    nll, stderr = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert bucket["nll"] == pytest.approx(nll, abs=1e-5) and bucket["stderr"] == pytest.approx(stderr, abs=1e-5)
    ppl = math.exp(nll)
    assert f"{ppl:.2f} ± {stderr * ppl:.2f}" in capsys.readouterr().out and ppl > 10


@pytest.mark.parametrize("order", [(8, 16), (16, 8)])
def test_runs_of_two_trained_contexts_share_the_columns_of_the_shorter_one(tmp_path, order):
    checkpoints = {f"L{size}": constant_checkpoint([0.5, 0.25, 0.125, 0.125], size) for size in order}
    scored = evaluate(tmp_path, checkpoints, "ab" * 500, "--max_factor", "4", "--windows", "3")
    assert list(scored) == [f"L{size}" for size in order]
    for buckets in scored.values():
        assert [(bucket["start"], bucket["end"]) for bucket in buckets] == [(0, 8), (8, 16), (16, 32)]
        assert [bucket["nll"] for bucket in buckets] == pytest.approx([math.log(8) / 2] * 3, abs=1e-5)


def test_the_local_score_has_the_whole_trained_context_of_each_run(tmp_path):
    """Inside L it is the score itself, to the last token, whatever the L of the other runs is."""
    text = "".join("ab"[i * i % 7 % 2] for i in range(500))
    short, long = random_checkpoint(), random_checkpoint()
    long["config"]["block_size"] = 32
    scored = evaluate(tmp_path, {"short": short, "long": long}, text, "--max_factor", "4", "--windows", "4")
    same = {name: [bucket["ppl_local"] == pytest.approx(bucket["ppl"], rel=1e-5) for bucket in buckets]
            for name, buckets in scored.items()}
    assert same == {"short": [True, False, False], "long": [True, True, False]}


def test_bits_per_character_count_the_characters_that_begin_in_the_predicted_tokens(tmp_path):
    """17 tokens. Bucket one predicts tokens 1 to 8 (two characters begin), bucket two tokens 9 to 16 (all ASCII)."""
    checkpoint = constant_checkpoint([1 / 257] * 257, tokenizer=byte_tokenizer())
    [buckets] = evaluate(tmp_path, {"run": checkpoint}, "日本語" + "abcdefgh", "--max_factor", "2", "--windows",
                         "1").values()
    bits = math.log2(257)
    assert [bucket["bits_per_character"] for bucket in buckets] == pytest.approx([bits * 8 / 2, bits], rel=1e-5)


# --- scalings


def test_scaled_runs_stand_beside_unscaled_ones_and_auto_gives_each_bucket_its_own_factor(finished_run, tmp_path):
    eval_extrapolation.main([finished_run, "--max_factor", "4", "--windows", "3",
                             "--rope_scaling", "none", "pi", "yarn", "--attn_scaling", "none", "logn",
                             "--json", str(tmp_path / "r.json")])
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [r["name"] for r in runs] == ["hope", "hope logn", "hope pi", "hope pi logn", "hope yarn", "hope yarn logn"]
    plain, scaled = runs[0]["buckets"], runs[2]["buckets"]
    assert plain[0] == scaled[0]                          # inside L the factor is 1
    checkpoint = load_checkpoint(finished_run)
    dataset = loader.open_dataset(checkpoint["dataset"]["path"])[1]["val"]
    windows = loader.document_windows(dataset, 98, 64, 3)
    for bucket, factor in zip(scaled[1:], (2.0, 4.0)):
        model = load_model(checkpoint, rope_scaling="pi", rope_factor=factor)
        with torch.no_grad():
            logits = all_logits(model, windows[:, :bucket["end"]])
        losses = -logits.log_softmax(-1).gather(-1, windows[:, 1:bucket["end"] + 1, None])[..., 0]
        assert bucket["nll"] == pytest.approx(losses[:, bucket["start"]:].mean().item(), abs=1e-5)


@pytest.mark.parametrize("changes, scales", [
    (dict(pe="hope"), True), (dict(pe="alibi"), False), (dict(pe="nope", local_pe="rope"), False),
    (dict(pe="rope", local_pe="nope"), True), (dict(pe="nope", local_pe="rope", window=33), True)])
def test_scaling_is_tried_where_a_layer_rotates_and_sees_more_than_l_tokens(changes, scales):
    config = tiny(**{"window_pattern": "SL" if "local_pe" in changes else "L", "window": 4, **changes}).config
    assert eval_extrapolation.can_scale(config) == scales
    args = SimpleNamespace(rope_scaling=["none", "pi"], rope_factor="auto", attn_scaling=None)
    assert len(eval_extrapolation.scalings(args, vars(config))) == 1 + scales


def test_a_model_trained_with_scaling_is_scored_with_it_unless_another_is_asked_for(finished_run, dataset, tmp_path):
    config = continued(finished_run, dataset, tmp_path / "pi", "--pe", "rope", "--block_size", "32", "--rope_scaling",
                       "pi", "--rope_factor", "2")["config"]
    parse = eval_extrapolation.make_parser().parse_args
    assert eval_extrapolation.scalings(parse(["x"]), config) == [
        {"rope_scaling": "pi", "rope_factor": 2.0, "attn_scaling": "none"}]
    assert eval_extrapolation.scalings(parse(["x", "--rope_scaling", "none", "yarn"]), config) == [
        {"rope_scaling": "none", "rope_factor": 1.0, "attn_scaling": "none"},
        {"rope_scaling": "yarn", "rope_factor": "auto", "attn_scaling": "none"}]


# --- commands


def test_evaluation_writes_the_table_the_json_and_the_picture(dataset, finished_run, tmp_path, capsys):
    run(dataset, tmp_path / "rope", "--pe", "rope", "--max_iters", "10")
    run(dataset, tmp_path / "learned", "--pe", "learned", "--max_iters", "10")
    capsys.readouterr()
    files = [tmp_path / "r.json", tmp_path / "r.png"]
    eval_extrapolation.main([finished_run, str(tmp_path / "rope"), str(tmp_path / "learned"), "--windows", "5",
                             "--max_factor", "4", "--json", str(files[0]), "--plot", str(files[1])])
    out = capsys.readouterr().out
    assert "[0, 16)  " in out and "[32, 64)" in out and "±" in out and "is undefined" in out
    assert [out.count(words) for words in ("perplexity", "minus loss with the last L tokens", "bits")] == [1, 1, 0]
    runs = json.loads(files[0].read_text())["runs"]
    assert [(r["name"], r["pe"], r["block_size"], r["windows"]) for r in runs] == [
        ("hope", "hope", 16, 5), ("rope", "rope", 16, 5), ("learned", "learned", 16, 5)]
    assert runs[0]["dataset_sha256"] == loader.open_dataset(dataset)[0]["sha256"]
    assert [(b["start"], b["end"]) for b in runs[0]["buckets"]] == [(0, 16), (16, 32), (32, 64)]
    assert {"nll", "stderr", "ppl", "ppl_local"} <= set(runs[0]["buckets"][0])
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_a_reader_that_leaves_costs_no_result(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stdout", unwritable(kind))
    with pytest.raises(SystemExit) if kind == "full" else nullcontext():
        flags.run(lambda: evaluate(tmp_path, {"run": constant_checkpoint(THIRDS)}, "ab" * 100, "--max_factor", "2",
                                   "--plot", str(tmp_path / "r.png")))
    assert json.loads((tmp_path / "r.json").read_text())["runs"] and (tmp_path / "r.png").exists()


def test_a_text_file_is_scored_without_any_data_folder_and_flags_that_change_no_score_are_noted(tmp_path, capsys):
    evaluate(tmp_path, {"still": constant_checkpoint(THIRDS)}, "ab" * 100, "--rope_scaling", "pi", "--max_factor", "2",
             "--dataset", "data/any")
    out = capsys.readouterr().out
    assert "text.txt" in out
    assert "note: --rope_scaling has no effect on still" in out and "note: --dataset has no effect with --text" in out


def test_weights_of_another_step_than_most_are_named(tmp_path, capsys):
    steps = {"a": 40, "b": 20, "c": 40}
    checkpoints = {name: {**constant_checkpoint(THIRDS), "iter": step} for name, step in steps.items()}
    evaluate(tmp_path, checkpoints, "ab" * 100, "--max_factor", "2")
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: not all weights")]
    assert note.startswith("note: not all weights are of step 40 ") and note.endswith(": b of step 20")


def test_runs_of_different_contexts_are_scored_with_a_note(dataset, finished_run, tmp_path, capsys):
    run(dataset, tmp_path / "longer", "--block_size", "32", "--max_iters", "1")
    capsys.readouterr()
    eval_extrapolation.main([str(tmp_path / "longer"), finished_run, "--windows", "2", "--max_factor", "4"])
    [note] = [line for line in capsys.readouterr().out.splitlines() if "block_size" in line and "note" in line]
    assert "longer 32" in note and "hope 16" in note


def test_a_run_of_broken_weights_is_named_and_not_scored(finished_run, tmp_path, fails):
    checkpoint = load_checkpoint(finished_run)
    checkpoint["model"]["lm_head.weight"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "nan.pt")
    code, lines = fails(eval_extrapolation, [str(tmp_path / "nan.pt"), "--windows", "2", "--max_factor", "2"])
    assert code == 2 and "damaged" in lines[0]


def test_a_missing_matplotlib_is_said_before_anything_is_computed(finished_run, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, lines = fails(eval_extrapolation, [finished_run, "--plot", str(tmp_path / "r.png")])
    assert code == 1 and len(lines) == 1 and "pip install matplotlib" in lines[0]
