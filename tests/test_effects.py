"""Effects of factors, against sums that are written out over losses without any pattern."""
import itertools
import json
import math
import statistics

import pytest

from experiments import effects
from tests.test_groups import scored

HEADS, BASES, ENCODINGS, WINDOWS = (4, 2), (10000.0, 100.0), ("rope", "hope", "nope"), (0, 16)
SEEDS = (1, 2, 3)


def loss(seed, n_head, base, pe, window, logn, i):
    """The loss of a run in range i, or what its context adds there (i = 2, 3)."""
    base = 0 if pe == "nope" and not window else base
    return 2 + math.sin(1000 * (seed + 3 * n_head + base / 7 + 11 * len(pe) + ord(pe[0])
                                + 1.3 * window + 5 * logn + i))


def make_run(*cell):
    seed, n_head, base, pe, window, logn = cell
    network = {"n_head": n_head, "rope_base": base}
    if window:
        network |= {"local_pe": "rope" if pe == "nope" else None, "window_pattern": "SSSL",
                    "window": window}
    nlls = [loss(*cell, i) for i in (0, 1)]
    local = [nll - loss(*cell, i + 2) for i, nll in enumerate(nlls)]
    return {**scored(pe, seed, nlls, local, **network), "attn_scaling": "logn" if logn else "none"}


def make_runs(seeds=SEEDS):
    cells = itertools.product(seeds, HEADS, BASES, ENCODINGS, WINDOWS, (0, 1))
    return [make_run(*cell) for cell in cells
            if not (cell[2] == 100 and cell[3] == "nope" and not cell[4])]


def row_of(result, measure, *comparisons):
    """The row of an effect ("encoding", "hope", "rope") or of an interaction of two."""
    factors, levels = [row[0] for row in comparisons], [list(row[1:]) for row in comparisons]
    row, = (row for row in result[measure] if (row["factors"], row["levels"]) == (factors, levels))
    return row


def test_an_effect_is_the_mean_difference_of_pairs_and_its_error_that_over_seeds():
    row = row_of(effects.effects_of(make_runs()), "nll", ("encoding", "hope", "rope"))
    for i in (0, 1):
        by_seed = [statistics.fmean(loss(seed, n_head, base, "hope", *rest, i)
                                    - loss(seed, n_head, base, "rope", *rest, i)
                                    for n_head, base, *rest in itertools.product(
                                        HEADS, BASES, WINDOWS, (0, 1))) for seed in SEEDS]
        assert row["mean"][i] == pytest.approx(statistics.fmean(by_seed))
        assert row["stderr"][i] == pytest.approx(statistics.stdev(by_seed) / math.sqrt(3))
        t = row["mean"][i] / row["stderr"][i]
        assert row["p"][i] == pytest.approx(1 - abs(t) / math.sqrt(t * t + 2))  # two degrees
    assert row["seeds"] == [1, 2, 3]


def test_an_interaction_is_a_difference_of_differences():
    row = row_of(effects.effects_of(make_runs()), "nll_above_local", ("base", 100.0, 10000.0),
                 ("encoding", "hope", "rope"))
    signs = ((1, 100.0, "hope"), (-1, 1e4, "hope"), (-1, 100.0, "rope"), (1, 1e4, "rope"))
    by_seed = [statistics.fmean(sum(sign * loss(seed, n_head, base, pe, *rest, 3)
                                    for sign, base, pe in signs)
                                for n_head, *rest in itertools.product(HEADS, WINDOWS, (0, 1)))
               for seed in SEEDS]
    assert row["mean"][1] == pytest.approx(statistics.fmean(by_seed))


def test_a_run_without_rotation_counts_for_every_base():
    row = row_of(effects.effects_of(make_runs()), "nll", ("base", 100.0, 10000.0))
    cells = list(itertools.product(HEADS, ENCODINGS, WINDOWS, (0, 1)))
    by_seed = [statistics.fmean(loss(seed, n_head, 100, *rest, 0)
                                - loss(seed, n_head, 1e4, *rest, 0) for n_head, *rest in cells)
               for seed in SEEDS]
    assert row["mean"][0] == pytest.approx(statistics.fmean(by_seed))


def test_all_effects_and_interactions_of_the_grid_are_there_and_rope_is_compared_with():
    result = effects.effects_of(make_runs())
    assert result["levels"] == {"head size": [32, 64], "base": [10000, 100],
                                "encoding": ["rope", "hope", "nope"],
                                "windows": ["none", "windows"], "log-n": ["none", "logn"]}
    assert result["ranges"] == [[0, 16], [16, 32]]
    assert len(result["nll"]) == 6 + math.comb(6, 2) - 1  # levels of one factor do not interact


def test_a_seed_counts_where_all_runs_that_an_effect_needs_are_there():
    runs = [run for run in make_runs() if not (run["seed"] == 3 and run["pe"] == "nope")]
    result = effects.effects_of(runs)
    assert row_of(result, "nll", ("encoding", "hope", "rope"))["seeds"] == [1, 2, 3]
    assert row_of(result, "nll", ("encoding", "nope", "rope"))["seeds"] == [1, 2]
    assert row_of(result, "nll", ("base", 100.0, 10000.0))["seeds"] == [1, 2]
    for row in effects.effects_of(make_runs(seeds=(1,)))["nll"]:
        assert row["stderr"] == row["p"] == [None, None]


def test_runs_are_selected_by_their_levels():
    only = ["windows=none", "head size=64", "base=100", "encoding=rope,hope"]
    result = effects.effects_of(make_runs(), only)
    assert result["levels"] == {"encoding": ["rope", "hope"], "log-n": ["none", "logn"]}
    expected = [loss(seed, 2, 100, pe, 0, 1, 0) - loss(seed, 2, 100, pe, 0, 0, 0)
                for seed in SEEDS for pe in ("hope", "rope")]
    row = row_of(result, "nll", ("log-n", "logn", "none"))
    assert row["mean"][0] == pytest.approx(statistics.fmean(expected))


def test_biases_are_none_those_of_queries_keys_and_values_or_all_which_older_runs_do_not_say():
    kinds = ((2.0, False, False), (2.5, False, True), (3.5, True, True))
    runs = [scored("rope", seed, (nll + seed / 10, 2.0), bias=bias, qkv_bias=qkv_bias)
            for nll, bias, qkv_bias in kinds for seed in (1, 2)]
    for run in runs[-2:]:
        del run["config"]["qkv_bias"], run["args"]["qkv_bias"]
    result = effects.effects_of(runs)
    assert result["levels"] == {"biases": ["none", "qkv", "all"]}
    for level, mean in (("qkv", 0.5), ("all", 1.5)):
        row = row_of(result, "nll", ("biases", level, "none"))
        assert row["mean"] == pytest.approx([mean, 0]) and row["seeds"] == [1, 2]


def test_runs_that_are_no_grid_of_levels_and_seeds_are_refused():
    corners = [run for run in make_runs() if run["pe"] != "nope"
               and (run["config"]["n_head"], run["config"]["rope_base"]) in ((4, 1e4), (2, 100))]
    other_optimizer = scored("rope", 4, (2.0, 2.0), args={"optimizer": "adamw"})
    for runs, words in ((corners, "every combination"),
                        ([*make_runs(), other_optimizer], "differ in optimizer")):
        with pytest.raises(ValueError, match=words):
            effects.effects_of(runs)


@pytest.mark.parametrize("t, degrees, p", [
    (12.706, 1, 0.05), (2.7764, 4, 0.05), (-9.9248, 2, 0.01), (0, 2, 1), (math.nan, 2, math.nan)])
def test_p_values_are_those_of_students_table(t, degrees, p):
    assert effects.p_value(t, degrees) == pytest.approx(p, rel=1e-3, abs=0, nan_ok=True)


def test_the_command_writes_all_and_prints_interactions_if_they_are_large(tmp_path, capsys):
    (tmp_path / "runs.json").write_text(json.dumps({"runs": make_runs()}))
    effects.main([str(tmp_path / "runs.json"), "--json", str(tmp_path / "effects.json")])
    expected = effects.effects_of(make_runs())
    written = json.loads((tmp_path / "effects.json").read_text())
    assert {key: written[key] for key in expected} == expected
    large = [row for row in expected["nll"] + expected["nll_above_local"]
             if len(row["factors"]) == 2 and any(
                 abs(mean) > 2 * stderr for mean, stderr in zip(row["mean"], row["stderr"]))]
    assert capsys.readouterr().out.count(" x ") == len(large) > 0
