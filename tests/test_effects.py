"""
Effects of factors, against sums written out over synthetic losses.

    python -m pytest tests/test_effects.py
"""
import itertools
import json
import math
import statistics

import pytest

from experiments import effects
from model import GPTConfig

HEADS, BASES, ENCODINGS, WINDOWS = (4, 2), (10000.0, 100.0), ("rope", "hope", "nope"), (0, 16)
SEEDS = (1, 2, 3)


def value(seed, n_head, base, pe, window, logn, i):
    """A loss that depends on everything, without any pattern."""
    base = 0 if pe == "nope" and not window else base
    return 2 + math.sin(1000 * (seed + 3 * n_head + base / 7 + 11 * len(pe) + ord(pe[0]) + 1.3 * window + 5 * logn + i))


def make_run(seed, n_head, base, pe, window, logn):
    local = {"local_pe": "rope" if pe == "nope" else None, "window_pattern": "SSSL", "window": window} if window else {}
    config = vars(GPTConfig(n_head=n_head, rope_base=base, pe=pe, **local))
    buckets = [{"start": start, "end": end, "nll": value(seed, n_head, base, pe, window, logn, i),
                "nll_above_local": value(seed, n_head, base, pe, window, logn, i + 100)}
               for i, (start, end) in enumerate(((0, 128), (128, 256)))]
    return {"name": f"{pe} {n_head} {base} {window} {seed}", "pe": pe, "seed": seed, "config": config, "windows": 32,
            "attn_scaling": "logn" if logn else "none", "device": "cpu", "dataset_sha256": "0", "buckets": buckets}


def make_runs(seeds=SEEDS):
    cells = itertools.product(seeds, HEADS, BASES, ENCODINGS, WINDOWS, (0, 1))
    return [make_run(*cell) for cell in cells if not (cell[2] == 100 and cell[3] == "nope" and not cell[4])]


def found(result, measure, factors, levels):
    rows = [row for row in result[measure] if row["factors"] == factors and row["levels"] == levels]
    assert len(rows) == 1
    return rows[0]


def test_an_effect_is_the_mean_difference_of_pairs_and_its_error_that_over_seeds():
    row = found(effects.effects_of(make_runs()), "nll", ["encoding"], [["hope", "rope"]])
    for i in range(2):
        by_seed = [statistics.fmean(value(seed, n_head, base, "hope", window, logn, i)
                                    - value(seed, n_head, base, "rope", window, logn, i)
                                    for n_head, base, window, logn in itertools.product(HEADS, BASES, WINDOWS, (0, 1)))
                   for seed in SEEDS]
        assert row["mean"][i] == pytest.approx(statistics.fmean(by_seed))
        assert row["stderr"][i] == pytest.approx(statistics.stdev(by_seed) / math.sqrt(3))
    assert row["seeds"] == [1, 2, 3]


def test_an_interaction_is_a_difference_of_differences():
    row = found(effects.effects_of(make_runs()), "nll_above_local", ["base", "encoding"],
                [[100.0, 10000.0], ["hope", "rope"]])
    by_seed = [statistics.fmean(
        value(seed, n_head, 100, "hope", window, logn, 101) - value(seed, n_head, 10000, "hope", window, logn, 101)
        - value(seed, n_head, 100, "rope", window, logn, 101) + value(seed, n_head, 10000, "rope", window, logn, 101)
        for n_head, window, logn in itertools.product(HEADS, WINDOWS, (0, 1))) for seed in SEEDS]
    assert row["mean"][1] == pytest.approx(statistics.fmean(by_seed))


def test_a_run_without_rotation_counts_for_every_base():
    row = found(effects.effects_of(make_runs()), "nll", ["base"], [[100.0, 10000.0]])
    cells = list(itertools.product(HEADS, ENCODINGS, WINDOWS, (0, 1)))
    by_seed = [statistics.fmean(value(seed, n_head, 100, *cell, 0) - value(seed, n_head, 1e4, *cell, 0)
                                for n_head, *cell in cells) for seed in SEEDS]
    assert row["mean"][0] == pytest.approx(statistics.fmean(by_seed))


def test_all_effects_and_interactions_of_the_grid_are_there():
    rows = effects.effects_of(make_runs())["nll"]
    single = [row for row in rows if len(row["factors"]) == 1]
    assert [row["factors"][0] for row in single] == ["head size", "base", "encoding", "encoding", "windows", "log-n"]
    assert len(rows) == 6 + math.comb(6, 2) - 1  # the two levels of one factor do not interact


def test_a_seed_counts_where_all_runs_that_an_effect_needs_are_there():
    runs = [run for run in make_runs() if not (run["seed"] == 3 and run["pe"] == "nope")]
    result = effects.effects_of(runs)
    assert found(result, "nll", ["encoding"], [["hope", "rope"]])["seeds"] == [1, 2, 3]
    assert found(result, "nll", ["encoding"], [["nope", "rope"]])["seeds"] == [1, 2]
    assert found(result, "nll", ["base"], [[100.0, 10000.0]])["seeds"] == [1, 2]


def test_factors_that_always_change_together_are_one():
    corners = [run for run in make_runs() if run["pe"] != "nope"
               and (run["config"]["n_head"], run["config"]["rope_base"]) in ((4, 10000), (2, 100))]
    result = effects.effects_of(corners)
    assert list(result["levels"]) == ["head size, base", "encoding", "windows", "log-n"]
    row = found(result, "nll", ["head size, base"], [["64, 100", "32, 10000"]])
    cells = list(itertools.product(("rope", "hope"), WINDOWS, (0, 1)))
    by_seed = [statistics.fmean(value(seed, 2, 100, *cell, 0) - value(seed, 4, 1e4, *cell, 0) for cell in cells)
               for seed in SEEDS]
    assert row["mean"][0] == pytest.approx(statistics.fmean(by_seed))
    unrotated = [make_run(seed, n_head, 500, "nope", 0, logn) for seed in SEEDS for n_head in HEADS for logn in (0, 1)]
    assert effects.effects_of([*corners, *unrotated])["levels"] == {
        **result["levels"], "encoding": ["rope", "hope", "nope"]}  # whatever their base


def test_factors_that_change_together_in_some_runs_only_stay_two():
    """Of the runs that rotate, each head size has one base; NoPE has a head size more, or a second one of a base."""
    corners = [run for run in make_runs() if run["pe"] != "nope" and not run["config"]["window"]
               and (run["config"]["n_head"], run["config"]["rope_base"]) in ((4, 10000), (2, 100))]
    levels = effects.effects_of([*corners, *[make_run(seed, 8, 100, "nope", 0, 0) for seed in SEEDS]])["levels"]
    assert levels == {"head size": [16, 32, 64], "base": [10000, 100], "encoding": ["rope", "hope", "nope"],
                      "log-n": ["none", "logn"]}


def test_a_base_that_changes_with_an_encoding_or_with_windows_is_one_factor_with_it_whatever_that_of_nope_is():
    runs = [make_run(seed, 4, base, pe, window, 0) for seed in SEEDS
            for pe, base, window in (("rope", 100, 0), ("rope", 1e4, 16), ("nope", 500, 0))]
    result = effects.effects_of(runs)
    assert result["levels"] == {"base, windows": ["10000, windows", "100, none"], "encoding": ["rope", "nope"]}
    runs = [make_run(seed, 4, base, pe, 0, 0) for seed in SEEDS
            for pe, base in (("rope", 100), ("hope", 1e4), ("nope", 500))]
    assert list(effects.effects_of(runs)["levels"]) == ["base", "encoding"]  # NoPE has neither base


def changed(run, **changes):
    """A run with other fields, args or config."""
    return {**run, **{key: {**run.get(key, {}), **value} if isinstance(value, dict) else value
                      for key, value in changes.items()}}


@pytest.mark.parametrize("changes, words", [
    ({"dataset_sha256": "1"}, "text (0, 1)"), ({"windows": 16}, "windows (16, 32)"),
    ({"args": {"optimizer": "adamw", "max_iters": 600}}, "optimizer (adamw, muon); max_iters (300, 600)"),
    ({"config": {"hope_cutoff": 2.0}}, "hope_cutoff (1.0, 2.0)"),
    ({"rope_scaling": "yarn"}, "rope_scaling (none, yarn)"),
    ({"buckets": [{"start": 0, "end": 128, "nll": 1.0, "nll_above_local": 0.0}]}, "last range (128, 256)"),
    ({"buckets": [{"start": 0, "end": 256, "nll": None, "nll_above_local": None}]}, "no loss beyond")])
def test_runs_that_differ_in_more_than_their_levels_are_refused_in_one_line(changes, words):
    runs = [changed(run, args={"optimizer": "muon", "max_iters": 300}) for run in make_runs()]
    i = next(i for i, run in enumerate(runs) if run["pe"] == "hope")
    runs[i] = changed(runs[i], **changes)
    with pytest.raises(ValueError) as error:
        effects.effects_of(runs)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_without_effect_may_differ():
    runs = [changed(run, args={"optimizer": "adamw", "muon_momentum": 0.1 * run["seed"], "out_dir": run["name"]})
            for run in make_runs()]
    expected = effects.effects_of(runs)
    for run in runs:
        if run["pe"] != "hope":
            run["config"] = {**run["config"], "hope_cutoff": 3.0}
    assert effects.effects_of(runs) == expected


def test_every_encoding_has_its_place_and_rope_is_the_first():
    runs = [make_run(seed, 4, 1e4, pe, 0, 0) for seed in SEEDS for pe in ("kerple", "nope", "alibi", "hope", "rope")]
    assert effects.effects_of(runs)["levels"] == {"encoding": ["rope", "hope", "nope", "alibi", "kerple"]}


def test_only_runs_with_some_levels_are_selected():
    runs = effects.selected(make_runs(), ["windows=none", "head size=64", "base=100"])
    assert len(runs) == 3 * 2 * 2  # seeds, rope and hope, log-n
    left = {(run["pe"], run["config"]["n_head"], run["config"]["window"]) for run in runs}
    assert left == {("rope", 2, 0), ("hope", 2, 0)}
    both = effects.selected(make_runs(), ["windows=none", "head size=64,32", "base=100"])
    assert {run["config"]["n_head"] for run in both} == {2, 4} and len(both) == 2 * len(runs)
    for wrong in ("head", "head size", "base=7"):
        with pytest.raises(ValueError, match=f"--only {wrong}"):
            effects.selected(runs, [wrong])


def test_two_runs_of_one_cell_and_seed_are_refused():
    runs = make_runs()
    with pytest.raises(ValueError, match="same levels and seed"):
        effects.effects_of([*runs, runs[5]])


@pytest.mark.parametrize("t, degrees, p", [(12.706, 1, 0.05), (4.3027, 2, 0.05), (2.7764, 4, 0.05), (-9.9248, 2, 0.01),
                                           (0, 2, 1), (math.inf, 2, 0), (-math.inf, 1, 0), (math.nan, 2, math.nan)])
def test_p_values_are_those_of_students_table(t, degrees, p):
    assert effects.p_value(t, degrees) == pytest.approx(p, rel=1e-3, abs=0, nan_ok=True)


def test_one_seed_has_no_errors_and_no_large_interactions():
    rows = effects.effects_of(make_runs(seeds=(1,)))["nll"]
    assert all(math.isnan(error) for row in rows for error in row["stderr"])
    assert not any(effects.is_large(row) for row in rows)


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = []
    for seed in SEEDS:
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(json.dumps({"runs": make_runs(seeds=(seed,))}))
    effects.main([*map(str, paths), "--json", str(tmp_path / "effects.json"), "--plot", str(tmp_path / "effects.png")])
    written = json.loads((tmp_path / "effects.json").read_text())
    expected = effects.effects_of(make_runs())
    assert written["levels"] == expected["levels"] and written["seeds"] == [1, 2, 3]
    assert written["nll"][0]["mean"] == pytest.approx(expected["nll"][0]["mean"], rel=1e-4)
    printed = capsys.readouterr().out
    assert "encoding hope - rope" in printed and "base 100 - 10000" in printed
    assert (tmp_path / "effects.png").stat().st_size > 5000
