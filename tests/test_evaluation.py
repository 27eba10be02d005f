"""Scores beyond the trained context: one pass equals many, buckets, errors, scalings, tables.

The expected numbers are computed by hand, for models that predict the same everywhere."""
import io
import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import eval_extrapolation
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from data import loader
from eval_extrapolation import bucket_edges, score, score_local, summarize
from model import PE
from tests.conftest import all_logits, byte_tokenizer, constant_checkpoint, tiny

# --- one pass


def loss_of_next(model, windows, start, n):
    """Loss of token n of each window, given its tokens from start on, read without a cache."""
    logits = all_logits(model, windows[:, start:n])[:, -1]
    return -logits.log_softmax(-1).gather(1, windows[:, [n]])[:, 0]


@pytest.mark.parametrize("pe", [pe for pe in PE if pe != "learned"])
@pytest.mark.parametrize("chunk", [1, 13, 64, 500])
def test_one_pass_in_chunks_equals_scoring_each_prefix_separately(pe, chunk):
    model, windows = tiny(pe), torch.randint(50, (3, 65))
    losses = score(model, windows, chunk, batch_size=2)
    for n in (1, 2, 31, 32, 33, 64):
        expected = loss_of_next(model, windows, 0, n)
        torch.testing.assert_close(losses[:, n - 1], expected, atol=1e-4, rtol=0)


def test_learned_is_scored_up_to_its_limit_and_marked_behind_it():
    losses = score(tiny("learned"), torch.randint(50, (2, 65)), chunk=20, batch_size=2)
    assert not losses[:, :32].isnan().any() and losses[:, 32:].isnan().all()
    bucket = summarize(losses, torch.ones(2, 64), losses, [0, 32, 64], [64, 64])[1]
    assert bucket["nll"] is bucket["ppl"] is bucket["stderr"] is None
    assert bucket["ppl_local"] == pytest.approx(math.e)


@pytest.mark.parametrize("width", [16, 32, 50, 96, 100])
def test_local_context_is_that_of_windows_of_l_that_advance_by_half_of_it(width):
    model, windows, L = tiny("rope"), torch.randint(50, (3, width + 1)), 32
    local = score_local(model, windows, L, batch_size=2)
    for n in range(1, width + 1):  # n tokens stand before the target
        end = min(width, L + L // 2 * math.ceil(max(0, n - L) / (L // 2)))
        expected = loss_of_next(model, windows, max(0, end - L), n)
        torch.testing.assert_close(local[:, n - 1], expected, atol=1e-4, rtol=0)


# --- numbers


def evaluate(tmp_path, checkpoints, text, *flags):
    """Score checkpoints (name -> dict) on a text through main() -> name -> what the JSON says."""
    paths = [tmp_path / f"{name}.pt" for name in checkpoints]
    for path, checkpoint in zip(paths, checkpoints.values()):
        save_checkpoint(path, checkpoint)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    eval_extrapolation.main([*map(str, paths), "--text", str(tmp_path / "text.txt"),
                             "--json", str(tmp_path / "r.json"), *flags])
    return {run["name"]: run for run in json.loads((tmp_path / "r.json").read_text())["runs"]}


def random_checkpoint(pe="rope", **changes):
    """A model with random weights, whose losses depend on all that it sees."""
    model = tiny(pe, **{"vocab_size": 4, "block_size": 16, **changes})
    return {**constant_checkpoint([1 / 4] * 4), "config": asdict(model.config),
            "model": model.state_dict()}


def test_buckets_average_their_own_positions_and_the_error_is_over_windows():
    losses = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 8.0, 8.0]])
    local = losses - torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 2.0]])
    first, second = summarize(losses, local, losses - 1, [0, 2, 4], [4, 8])
    assert bucket_edges(8, 16) == [0, 8, 16, 32, 64, 128]
    assert bucket_edges(8, 6) == [0, 8, 16, 32, 48]
    e = math.exp
    assert first == pytest.approx({
        "start": 0, "end": 2, "nll": 2, "stderr": 0, "ppl": e(2), "ppl_local": e(2),
        "nll_above_first": 1, "nll_above_first_stderr": 0,
        "nll_above_local": 0, "nll_above_local_stderr": 0,
        "bits_per_character": 2 / math.log(2)})
    assert second == pytest.approx({
        "start": 2, "end": 4, "nll": 7, "stderr": 1, "ppl": e(7), "ppl_local": e(5),
        "nll_above_first": 1, "nll_above_first_stderr": 0,
        "nll_above_local": 2, "nll_above_local_stderr": 0.5,
        "bits_per_character": 3.5 / math.log(2)})  # two characters a token


def test_the_loss_above_the_first_run_is_the_difference_on_the_same_tokens(tmp_path):
    """Two windows of a alone and two of b alone: losses and their differences vary by window."""
    first, second = [0.5, 0.25, 0.125, 0.125], [0.25, 0.5 / 3, 0.25, 1 / 3]
    checkpoints = {"one": constant_checkpoint(first), "two": constant_checkpoint(second)}
    scored = evaluate(tmp_path, checkpoints, ("a" * 17 + "b" * 17) * 2, "--max_factor", "2",
                      "--windows", "4")
    a, b = (math.log(first[i] / second[i]) for i in (0, 1))  # ln 2 and ln 1.5
    for bucket in scored["two"]["buckets"]:
        assert bucket["nll_above_first"] == pytest.approx((a + b) / 2, abs=1e-5)
        # the standard deviation of four values at +- (a - b) / 2, divided by sqrt(4)
        stderr = (a - b) / 2 / math.sqrt(3)
        assert bucket["nll_above_first_stderr"] == pytest.approx(stderr, abs=1e-5)
    assert all(bucket["nll_above_first"] == 0 for bucket in scored["one"]["buckets"])


def test_runs_that_differ_share_the_columns_of_the_shorter_one_and_are_named(tmp_path, capsys):
    checkpoints = {f"L{size}": constant_checkpoint([1 / 4] * 4, size) for size in (16, 8)}
    scored = evaluate(tmp_path, checkpoints, "ab" * 500, "--max_factor", "4")
    notes = [line for line in capsys.readouterr().out.splitlines() if "runs differ" in line]
    assert len(notes) == 1 and "'L16': 16" in notes[0] and "'L8': 8" in notes[0]  # not the steps
    for run in scored.values():
        assert [bucket["end"] for bucket in run["buckets"]] == [8, 16, 32]


def test_the_local_score_has_the_whole_trained_context_of_each_run(tmp_path):
    """Inside L it is the score itself, whatever the L of the other runs is."""
    text = "".join("ab"[i * i % 7 % 2] for i in range(500))
    checkpoints = {"short": random_checkpoint(), "long": random_checkpoint(block_size=32)}
    scored = evaluate(tmp_path, checkpoints, text, "--max_factor", "4", "--windows", "4")
    same = {name: [bucket["ppl_local"] == pytest.approx(bucket["ppl"], rel=1e-5)
                   for bucket in run["buckets"]] for name, run in scored.items()}
    assert same == {"short": [True, False, False], "long": [True, True, False]}


def test_bits_per_character_count_the_characters_that_begin_in_the_predicted_tokens(tmp_path):
    """Of 17 tokens, 1 to 8 begin two characters, and 9 to 16 are ASCII."""
    checkpoint = constant_checkpoint([1 / 257] * 257, tokenizer=byte_tokenizer())
    run = evaluate(tmp_path, {"run": checkpoint}, "日本語abcdefgh", "--max_factor", "2")["run"]
    first, second = run["buckets"]
    assert first["ppl"] == second["ppl_local"] == pytest.approx(257, abs=0.01)
    assert first["bits_per_character"] == pytest.approx(math.log2(257) * 8 / 2, abs=1e-4)
    assert second["bits_per_character"] == pytest.approx(math.log2(257), abs=1e-4)


# --- scalings


def test_auto_gives_each_bucket_its_own_factor_and_changes_none_within_l(finished_run, tmp_path):
    eval_extrapolation.main([
        finished_run, "--max_factor", "4", "--windows", "3", "--rope_scaling", "none", "pi", "yarn",
        "--attn_scaling", "none", "logn", "--json", str(tmp_path / "r.json")])
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [run["name"] for run in runs] == [
        "hope", "hope logn", "hope pi", "hope pi logn", "hope yarn", "hope yarn logn"]
    plain, scaled = runs[1]["buckets"], runs[3]["buckets"]
    assert plain[0] == scaled[0]  # where the factor is 1
    checkpoint = load_checkpoint(finished_run)
    meta, ids = loader.open_dataset(checkpoint["dataset"]["path"])
    windows = loader.document_windows(ids["val"], 98, 64, 3)
    for bucket, factor in zip(scaled[1:], (2.0, 4.0)):
        model = load_model(checkpoint, rope_scaling="pi", rope_factor=factor,
                           attn_scaling="logn")
        expected = torch.stack([loss_of_next(model, windows, 0, n)
                                for n in range(bucket["start"] + 1, bucket["end"] + 1)])
        assert bucket["nll"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert runs[0]["dataset_sha256"] == meta["sha256"] and runs[0]["windows"] == 3


MIXED = dict(window_pattern="SL", window=4)


@pytest.mark.parametrize("changes, scales", [
    (dict(pe="alibi"), False), (dict(pe="nope", local_pe="rope"), False),
    (dict(pe="nope", local_pe="rope", **MIXED), False),
    (dict(pe="rope", local_pe="nope", **MIXED), True),
    (dict(MIXED, pe="nope", local_pe="rope", window=32), False),
    (dict(MIXED, pe="nope", local_pe="rope", window=33), True)])
def test_scaling_is_tried_where_a_layer_rotates_and_sees_more_than_l_tokens(changes, scales):
    config = tiny(**changes).config
    args = SimpleNamespace(rope_scaling=["none", "pi"], rope_factor=None, attn_scaling=None)
    assert len(eval_extrapolation.scalings(args, vars(config))) == 1 + scales


def test_a_model_trained_with_scaling_is_scored_with_it_unless_another_is_asked_for():
    config = vars(tiny("rope", rope_scaling="pi", rope_factor=2.0).config)
    parse = eval_extrapolation.make_parser().parse_args
    assert eval_extrapolation.scalings(parse(["x"]), config) == [
        {"rope_scaling": "pi", "rope_factor": 2.0, "attn_scaling": "none"}]
    args = parse(["x", "--rope_scaling", "none", "yarn", "--attn_scaling", "logn"])
    assert eval_extrapolation.scalings(args, config) == [
        {"rope_scaling": "none", "rope_factor": 1.0, "attn_scaling": "logn"},
        {"rope_scaling": "yarn", "rope_factor": "auto", "attn_scaling": "logn"}]


# --- what is written


def cell(bucket, key, digits):
    """What a table says of a bucket; the error of exp(nll) is exp(nll) times that of nll."""
    if bucket[key] is None:
        return "-"
    stderr = bucket["stderr"] * bucket["ppl"] if key == "ppl" else bucket[f"{key}_stderr"]
    return f"{bucket[key]:z.{digits}f} ± {stderr:.{digits}f}"


def test_tables_and_json_hold_the_same_and_the_picture_has_a_curve_for_each_run(tmp_path, capsys):
    checkpoints = {pe: random_checkpoint(pe) for pe in ("hope", "rope", "learned")}
    scored = evaluate(tmp_path, checkpoints, "abba" * 100, "--max_factor", "4",
                      "--plot", str(tmp_path / "new" / "r.svg"))
    ppl, gain = capsys.readouterr().out.split("\n\n")[1:]
    for name, run in scored.items():
        assert (run["pe"], run["block_size"], run["seed"]) == (name, 16, 1)
        for table, key, digits in ((ppl, "ppl", 2), (gain, "nll_above_local", 3)):
            [line] = [line for line in table.splitlines() if line.startswith(name)]
            expected = [cell(bucket, key, digits) for bucket in run["buckets"]]
            assert [text.strip() for text in line.split("  ")[1:] if text] == expected
    assert "[0, 16)" in ppl and "[32, 64)" in ppl
    assert (tmp_path / "new" / "r.svg").read_text().count("<!-- learned -->") == 1  # in the legend


def test_a_missing_matplotlib_is_reported_before_anything_is_computed(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, [line] = fails(eval_extrapolation, ["out/none", "--plot", "r.png"])
    assert code == 1 and "pip install matplotlib" in line


def test_in_the_picture_of_many_runs_each_name_and_the_labels_are_whole(monkeypatch):
    names = ["_old", "a$b", "$x$", *(f"a run with a long name, {i}" for i in range(9))]
    bucket = {"nll": 1.0, "ppl": math.e, "ppl_local": 3.0, "stderr": 0.1}
    drawn, buckets = [], [{**bucket, "start": 0, "end": 128}, {**bucket, "start": 128, "end": 256}]
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    runs = [{"name": name, "pe": "rope", "buckets": buckets} for name in names]
    eval_extrapolation.plot(runs, io.BytesIO())
    [legend], [axes] = drawn[0].legends, drawn[0].axes
    assert {name.lstrip("_").replace("$", r"\$") for name in names} <= {
        text.get_text() for text in legend.get_texts()}
    for shown in (legend, axes.xaxis.label, axes.yaxis.label):
        box, whole = shown.get_window_extent(), drawn[0].bbox
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1 and whole.y0 <= box.y0 <= box.y1 <= whole.y1


def test_a_reader_of_the_tables_that_leaves_costs_no_result(tmp_path, monkeypatch):
    def leave(runs):
        raise BrokenPipeError

    monkeypatch.setattr(eval_extrapolation, "print_tables", leave)
    with pytest.raises(BrokenPipeError):
        evaluate(tmp_path, {"run": random_checkpoint()}, "ab" * 200)
    assert json.loads((tmp_path / "r.json").read_text())["runs"]
