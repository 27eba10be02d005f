"""
Effects of factors: what each choice changes in the loss, averaged over all the others.

    python eval_extrapolation.py out/factorial/*seed-1 --attn_scaling none logn --json 1.json      the same for 2 and 3
    python -m experiments.effects 1.json 2.json 3.json --json effects.json --plot effects.png
    python -m experiments.effects 1.json 2.json 3.json --only windows=none encoding=rope,hope      of these alone

The runs are a grid: every combination of the factors' levels, once per seed. The effect of a level is its loss minus
that of the factor's first level, paired by seed and by the levels of the other factors, and averaged over the latter.
That is one number per seed; their mean and its standard error are shown. The interaction of two levels is the
difference of two such effects: one factor's effect at the other's level minus that at the other's first level.
Interactions larger than two standard errors are shown. Few seeds make this a weak test, so numbers with p < 0.05 have a
star (two-sided, by Student's t, for normal errors).

A seed counts for an effect if all runs that the effect needs are there. A run without rotation counts for every base.
Two factors that always change together, as in runs of two corners of a larger grid, count as one.
"""
import itertools
import math

import torch

from common import flags, report
from eval_extrapolation import can_scale
from experiments.groups import IN_WORDS, network_of, run_settings, without_effect
from experiments.sweep import read_runs
from model import PE, GPTConfig

# name -> what a run's level is. The first level in the order of LEVELS is the one that others are compared with.
FACTORS = {
    "head size": lambda run, config: config.n_embd // config.n_head,
    "base": lambda run, config: config.rope_base,
    "encoding": lambda run, config: config.pe,
    "windows": lambda run, config: "windows" if "S" in config.kinds() else "none",
    "log-n": lambda run, config: run["attn_scaling"],
}
LEVELS = {"head size": sorted, "base": lambda levels: sorted(levels, reverse=True),
          "encoding": lambda levels: sorted(levels, key=["rope", "hope", "prope", *PE].index),
          "windows": sorted, "log-n": lambda levels: sorted(levels, reverse=True)}
# Settings in which runs may differ: those that make the levels, and the seed
VARIED = ("pe", "local_pe", "n_head", "rope_base", "prope_fraction", "window_pattern", "window", "attn_scaling", "seed")
MEASURES = {"nll": "loss", "nll_above_local": "loss with the full context minus loss with at most L tokens"}


def check_alike(runs):
    """Raises ValueError if runs differ in anything but their levels and seeds, or if one has no loss in a range."""
    found = {}  # name of a setting -> its values in the runs in which it has an effect
    for run in runs:
        if any(bucket["nll"] is None for bucket in run["buckets"]):
            raise ValueError(f"{run['name']} has no loss beyond its trained context: leave it out")
        scaling = {name: run[name] for name in ("rope_scaling", "rope_factor") if name in run}
        settings = run_settings(run.get("args", {}), run["config"] | scaling)
        idle = without_effect(settings)
        its = {name: value for name, value in settings.items() if name not in VARIED and name not in idle}
        if can_scale(network_of(settings)):  # not to be scaled is a setting, too
            its["rope_scaling"] = settings["rope_scaling"]
        its |= {"text": run["dataset_sha256"], "windows": run["windows"], "last range": run["buckets"][-1]["end"]}
        for name, value in its.items():
            found.setdefault(name, set()).add(value)
    if differ := [f"{name} ({', '.join(sorted(map(str, values)))})"
                  for name, values in found.items() if len(values) > 1]:
        raise ValueError(f"the runs differ in {'; '.join(differ)}: compare runs that differ in their levels alone")


def levels_of(runs):
    """Runs of eval_extrapolation.py's JSON -> (levels of each factor, the index of each run in the grid).

    levels: factor -> its levels, the reference first; only factors with several. An index has one entry per factor. A
    run that does not rotate has one index per base.
    """
    configs = [GPTConfig(**run["config"]) for run in runs]
    values = [{name: level(run, config) for name, level in FACTORS.items()} for run, config in zip(runs, configs)]
    rotating = [value for value, config in zip(values, configs) if config.rotary_names()] or values
    levels = {name: LEVELS[name](list({value[name] for value in (rotating if name == "base" else values)}))
              for name in FACTORS}
    levels = {name: found for name, found in levels.items() if len(found) > 1}
    for a, b in itertools.combinations(list(levels), 2):
        known = b if a == "base" else a  # the base of a run that does not rotate means nothing
        pairs = {(value[a], value[b]) for value in (rotating if "base" in (a, b) else values)}
        if len(pairs) == len(levels[a]) == len(levels[b]) and [set(column) for column in zip(*pairs)] == [
                set(levels[a]), set(levels[b])]:
            pairs = sorted(pairs, key=lambda pair: levels[a].index(pair[0]))
            texts = {pair[known == b]: ", ".join(map(as_text, pair)) for pair in pairs}
            for value in values:
                value[f"{a}, {b}"] = texts[value[known]]
            levels = {f"{a}, {b}": list(texts.values())} | {
                name: found for name, found in levels.items() if name not in (a, b)}
            break
    indices = []
    for value, config in zip(values, configs):
        bases = [value["base"]] if config.rotary_names() else levels.get("base", [value["base"]])
        indices.append([tuple(found.index({**value, "base": base}[name]) for name, found in levels.items())
                        for base in bases])
    return levels, indices


def as_text(level):
    return f"{level:g}" if isinstance(level, (int, float)) else level


def grid(runs, levels, indices, seeds, measure):
    """-> float64, one axis per factor, then (seeds, ranges); nan where there is no run. Raises ValueError."""
    shape = [len(found) for found in levels.values()]
    values = torch.full((*shape, len(seeds), len(runs[0]["buckets"])), math.nan, dtype=torch.float64)
    for run, places in zip(runs, indices):
        for place in places:
            cell = values[(*place, seeds.index(run["seed"]))]
            if not cell.isnan().all():
                raise ValueError(f"{run['name']} has the same levels and seed as another run: leave one out")
            cell[:] = torch.tensor([bucket[measure] for bucket in run["buckets"]])
    return values


def change(values, axes_and_levels):
    """The effect of one level, or the interaction of several, for each seed: grid -> (seeds, ranges).

    axes_and_levels: the axis of a factor -> the level that is compared with the first one.
    """
    for axis in sorted(axes_and_levels, reverse=True):
        values = values.select(axis, axes_and_levels[axis]) - values.select(axis, 0)
    return values.reshape(-1, *values.shape[-2:]).mean(dim=0)


def p_value(t, degrees):
    """Two-sided p of Student's t: P(|T| > t), by the integral of its density."""
    angle = torch.linspace(math.atan(abs(t) / math.sqrt(degrees)), math.pi / 2, 10_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return 2 * scale * torch.trapezoid(angle.cos().clamp(min=0) ** (degrees - 1), angle).item()


def over_seeds(values, seeds):
    """(seeds, ranges) -> means, standard errors and p values by range, over the seeds without nan."""
    there = ~values.isnan().any(dim=1)
    columns = [report.mean_and_stderr(column) for column in values[there].T]
    t = [mean / stderr if stderr else math.nan for mean, stderr in columns]
    return {"seeds": [seed for seed, is_there in zip(seeds, there.tolist()) if is_there],
            "mean": [mean for mean, _ in columns], "stderr": [stderr for _, stderr in columns],
            "p": [p_value(value, max(int(there.sum()) - 1, 1)) for value in t]}


def effects_of(runs):
    """-> what the JSON holds: levels, ranges, the effect of each level and the interaction of each two, by measure.

    Raises ValueError if the runs cannot be compared."""
    check_alike(runs)
    levels, indices = levels_of(runs)
    seeds, names = sorted({run["seed"] for run in runs}), list(levels)
    single = [{axis: level} for axis, name in enumerate(names) for level in range(1, len(levels[name]))]
    double = [a | b for a, b in itertools.combinations(single, 2) if set(a) != set(b)]
    result = {"levels": levels, "ranges": [[bucket["start"], bucket["end"]] for bucket in runs[0]["buckets"]]}
    for measure in MEASURES:
        values = grid(runs, levels, indices, seeds, measure)
        result[measure] = [
            {"factors": [names[axis] for axis in one],
             "levels": [[levels[names[axis]][level], levels[names[axis]][0]] for axis, level in one.items()],
             **over_seeds(change(values, one), seeds)} for one in single + double]
    return result


def name_of(row):
    """{"factors": ["base"], "levels": [[100, 10000]]} -> "base 100 - 10000"."""
    return " x ".join(f"{factor} {as_text(level)} - {as_text(first)}"
                      for factor, (level, first) in zip(row["factors"], row["levels"]))


def is_large(row):
    """Whether an effect is larger than two standard errors in a range."""
    return any(abs(mean) > 2 * stderr for mean, stderr in zip(row["mean"], row["stderr"]))


def print_effects(result):
    columns = [*(f"[{start:,}, {end:,})" for start, end in result["ranges"]), "seeds"]
    for measure, title in MEASURES.items():
        effects = [row for row in result[measure] if len(row["factors"]) == 1]
        interactions = [row for row in result[measure] if len(row["factors"]) == 2 and is_large(row)]
        for kind, rows in (("effects on the", effects),
                           ("interactions larger than two standard errors: the", interactions)):
            table = {}
            for row in rows:
                cells = [report.format_cell(mean, stderr) + (" *" if p < 0.05 else "")
                         for mean, stderr, p in zip(row["mean"], row["stderr"], row["p"])]
                table[name_of(row)] = [*cells, " ".join(map(str, row["seeds"]))]
            report.print_table(f"{kind} {title}, in nats per token, ± standard error over seeds", columns, table)


def plot(result, path):
    """One panel per factor: the effect of each of its levels by range, with two standard errors."""
    pyplot, factors = report.import_pyplot(), list(result["levels"])
    figure, panels = pyplot.subplots(1, len(factors), figsize=(0.8 + 2.9 * len(factors), 3.6), layout="constrained",
                                     sharey=True, squeeze=False)
    L, at = result["ranges"][0][1], range(len(result["ranges"]))
    for axes, factor in zip(panels[0], factors):
        for i, row in enumerate(row for row in result["nll"] if row["factors"] == [factor]):
            errors = [0 if math.isnan(stderr) else 2 * stderr for stderr in row["stderr"]]
            level, first = (IN_WORDS.get(level, as_text(level)) for level in row["levels"][0])
            axes.errorbar([x + 0.08 * i for x in at], row["mean"], errors, marker="osD"[i % 3], capsize=3,
                          label=f"{level} instead of {first}")
        axes.axhline(0, color="gray", linewidth=1)
        axes.set_xticks(at, [f"{end // L} L" for _, end in result["ranges"]])
        axes.set_title(factor)
        axes.set_xlabel("position, up to")
        axes.legend(fontsize=9)
    panels[0][0].set_ylabel("change of the loss, nats per token,\n± two standard errors")
    report.save_picture(figure, path)


def selected(runs, only):
    """The runs that have the levels ["FACTOR=LEVEL[,LEVEL...]", ...]. Raises ValueError if there are none."""
    for text in only:
        factor, _, wanted = text.partition("=")
        if factor not in FACTORS:
            raise ValueError(f"--only {text}: write FACTOR=LEVEL[,LEVEL...]; the factors are {', '.join(FACTORS)}")
        runs = [run for run in runs if as_text(FACTORS[factor](run, GPTConfig(**run["config"]))) in wanted.split(",")]
        if not runs:
            raise ValueError(f"--only {text} leaves no run")
    return runs


def main(argv=None):
    parser = flags.ArgumentParser("Effects of factors on the loss by position, averaged over all other factors.")
    parser.add_argument("scores", nargs="+", metavar="FILE", help="what eval_extrapolation.py --json wrote")
    parser.add_argument("--only", nargs="+", default=[], metavar="FACTOR=LEVEL[,LEVEL...]",
                        help="leave out all other runs; such as windows=none encoding=rope,hope 'head size=64'")
    report.add_output_flags(parser, "the effect of each factor by position")
    args = parser.parse_args(argv)
    report.check_outputs(args)
    runs = selected(read_runs(args.scores), args.only)
    result = effects_of(runs)
    print_effects(result)
    if args.json:
        report.write_json(args.json, "-m experiments.effects", {
            "device": runs[0]["device"], "windows": runs[0]["windows"], "dataset_sha256": runs[0]["dataset_sha256"],
            "seeds": sorted({run["seed"] for run in runs}), **result}, digits=5)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    flags.run(main)
