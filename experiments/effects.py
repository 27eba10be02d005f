"""
Effects of factors: what each choice changes in the loss, averaged over all the others.

    python eval_extrapolation.py out/factorial/*seed-1 --attn_scaling none logn --json 1.json
    python -m experiments.effects 1.json 2.json 3.json --json effects.json
    python -m experiments.effects 1.json 2.json 3.json --only windows=none encoding=rope,hope

The runs are a grid: every combination of the factors' levels, once per seed. The effect of a level
is its loss minus that of the factor's first level, paired by seed and by the levels of the other
factors, and averaged over the latter. That is one number per seed; their mean and its standard
error are shown. The interaction of two levels is the difference of two such effects: one factor's
effect at the other's level minus that at the other's first level. Interactions larger than two
standard errors are shown. Few seeds make this a weak test, so numbers with p < 0.05 have a star
(two-sided, by Student's t, for normal errors).

A seed counts for an effect if all runs that the effect needs are there. A run without rotation
counts for every base.
"""
import itertools
import math

import pandas as pd
import torch

from common import flags, report
from experiments.groups import read_runs, scores_of, settings_of, without_nan
from model import PE

ENCODINGS = list(dict.fromkeys(["rope", "hope", "prope", *PE]))
FACTORS = {  # name -> place of a level: the others are compared with the first one
    "head size": int, "base": lambda base: -base, "encoding": ENCODINGS.index,
    "biases": ["none", "qkv", "all"].index, "windows": ["none", "windows"].index,
    "log-n": ["none", "logn"].index}
# Flags in which runs may differ: those that make the levels, and the seed
VARIED = ("pe", "local_pe", "n_head", "rope_base", "prope_fraction", "bias", "qkv_bias",
          "window_pattern", "window", "attn_scaling", "seed")
MEASURES = {"nll": "loss",
            "nll_above_local": "loss with the full context minus loss with at most L tokens"}


def with_levels(scores):
    """Scores -> the same with a column per factor. A run without rotation has a row per base."""
    bases = scores["rope_base"].dropna().unique().tolist()  # nan without rotation
    windows = scores["window_pattern"].str.contains("S").map({True: "windows", False: "none"})
    biases = scores["qkv_bias"].map({True: "qkv", False: "none"})
    scores = scores.assign(**{
        "head size": scores["n_embd"] // scores["n_head"],
        "base": [bases if pd.isna(base) else base for base in scores["rope_base"]],
        "encoding": scores["pe"], "biases": biases.mask(scores["bias"], "all"),
        "windows": windows, "log-n": scores["attn_scaling"]})
    return scores.explode("base")


def as_text(level):
    return f"{level:g}" if isinstance(level, (int, float)) else level


def selected(scores, only):
    """The rows with the levels ["FACTOR=LEVEL[,LEVEL...]", ...]. Raises ValueError if there are
    none."""
    for text in only:
        factor, _, wanted = text.partition("=")
        if factor not in FACTORS:
            raise ValueError(f"--only {text}: the factors are {', '.join(FACTORS)}")
        scores = scores[scores[factor].map(as_text).isin(wanted.split(","))]
        if scores.empty:
            raise ValueError(f"--only {text} leaves no run")
    return scores


def p_value(t, degrees):
    """Two-sided p of Student's t: P(|T| > t), by the integral of its density."""
    angle = torch.linspace(math.atan(abs(t) / math.sqrt(degrees)), math.pi / 2, 10_001,
                           dtype=torch.float64)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return 2 * scale * torch.trapezoid(angle.cos().clamp(min=0) ** (degrees - 1), angle).item()


def effect_of(grid, comparison):
    """A grid (a row per cell and seed, a column per range), and {factor: (level, reference)} ->
    the effect, or the interaction of several, as the JSON holds it."""
    for factor, (level, reference) in comparison.items():
        grid = grid.xs(level, level=factor) - grid.xs(reference, level=factor)
    by_seed = grid.groupby("seed").agg(lambda losses: losses.mean(skipna=False)).dropna()
    mean, stderr = by_seed.mean(), by_seed.sem()
    p = (mean / stderr).map(lambda t: p_value(t, max(len(by_seed) - 1, 1)))
    return {"factors": list(comparison), "levels": list(map(list, comparison.values())),
            "seeds": by_seed.index.tolist(),
            **{name: without_nan(numbers).tolist()
               for name, numbers in (("mean", mean), ("stderr", stderr), ("p", p))}}


def effects_of(runs, only=()):
    """Scored runs -> the levels of each factor that has several, and by measure the effect of each
    level and the interaction of each two, as the JSON holds them.

    Raises ValueError if the runs cannot be compared."""
    scores = selected(with_levels(scores_of(runs)), only)
    if differ := [flag for flag in settings_of(runs[0])
                  if flag not in VARIED and scores[flag].nunique() > 1]:
        raise ValueError(f"the runs differ in {', '.join(differ)}: compare runs that differ in "
                         "their levels and seeds alone")
    levels = {name: sorted(scores[name].dropna().unique().tolist(), key=place)
              for name, place in FACTORS.items()}
    levels = {name: its for name, its in levels.items() if len(its) > 1}
    if not levels:
        raise ValueError("there is nothing to compare: no factor has two levels")
    seeds, index = sorted(scores["seed"].unique().tolist()), [*levels, "seed"]
    single = [{name: (level, its[0])} for name, its in levels.items() for level in its[1:]]
    double = [a | b for a, b in itertools.combinations(single, 2) if a.keys() != b.keys()]
    cells = pd.MultiIndex.from_product([*levels.values(), seeds], names=index)
    result = {"seeds": seeds, "levels": levels,
              "ranges": scores[["start", "end"]].drop_duplicates().to_numpy().tolist()}
    for measure in MEASURES:
        grid = scores.pivot(index=index, columns="start", values=measure).reindex(cells)
        result[measure] = [effect_of(grid, comparison) for comparison in single + double]
    if not any(row["seeds"] for row in result["nll"]):
        raise ValueError("no seed has a run of every combination of levels: select with --only")
    return result


def print_effects(result):
    columns = [*(f"[{start:,}, {end:,})" for start, end in result["ranges"]), "seeds"]
    for measure, words in MEASURES.items():
        rows = {}
        for row in result[measure]:
            numbers = list(zip(row["mean"], row["stderr"], row["p"]))
            if len(row["factors"]) == 1 or any(
                    stderr is not None and abs(mean) > 2 * stderr for mean, stderr, _ in numbers):
                name = " x ".join(
                    f"{factor} {as_text(level)} - {as_text(reference)}"
                    for factor, (level, reference) in zip(row["factors"], row["levels"]))
                cells = [report.format_cell(mean, stderr)
                         + (" *" if p is not None and p < 0.05 else "")
                         for mean, stderr, p in numbers]
                rows[name] = [*cells, " ".join(map(str, row["seeds"]))]
        report.print_table(
            f"effects, and interactions larger than two standard errors, on the {words}, in nats "
            "per token, ± standard error over seeds", columns, rows)


def main(argv=None):
    parser = flags.ArgumentParser(
        "Effects of factors on the loss by position, averaged over all other factors.")
    parser.add_argument("scores", nargs="+", metavar="FILE",
                        help="what eval_extrapolation.py --json or a sweep wrote")
    parser.add_argument("--only", nargs="+", default=[], metavar="FACTOR=LEVEL[,LEVEL...]",
                        help="leave out all other runs; such as windows=none encoding=rope,hope "
                        "'head size=64'")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.set_defaults(plot=None)
    args = parser.parse_args(argv)
    report.check_outputs(args)
    runs = read_runs(args.scores)
    result = effects_of(runs, args.only)
    if args.json:
        report.write_json(args.json, "-m experiments.effects", {
            **{key: runs[0][key] for key in ("device", "windows", "dataset_sha256")}, **result})
    print_effects(result)


if __name__ == "__main__":
    flags.run(main)
