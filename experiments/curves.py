"""
Curves over training and over a flag:

    python -m experiments.curves out/rope out/hope --plot losses.png
    python -m experiments.curves out/rope out/hope --x seconds --plot losses.png
    python -m experiments.curves out/cutoff/sweep.json --x hope_cutoff --plot cutoff.png

Runs' folders: the losses in the log.jsonl that train.py leaves there, also of a run that is still
training. With markers: validation loss; thin: training loss.

JSON files of experiments.sweep: perplexity against the value of a flag, in one panel per range of
positions, with one line per combination of the other flags and a band of one standard deviation
over seeds. A line on which the flag has no effect is horizontal.
"""
import json
import re
from pathlib import Path

from pandas.api.types import is_numeric_dtype

from common import flags, report
from common.checkpoint import load_checkpoint
from experiments.groups import (
    FOLLOWS,
    group_names,
    over_seeds,
    read_runs,
    scores_of,
    settings_of,
    without_nan,
)
from experiments.output import draw_line, legend_above, save_picture

X_AXES = {"iter": "optimizer steps", "tokens": "tokens trained on",
          "seconds": "training time (seconds)"}


def read_log(out_dir):
    """The lines of a run's log, as dicts, without one that is still being written."""
    text = Path(out_dir, "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def draw_losses(folders, x, path):
    figure, panel = report.import_pyplot().subplots(figsize=(9.5, 5.5), layout="constrained")
    styles = report.styles([load_checkpoint(folder)["config"] for folder in folders])
    for folder, name, style in zip(folders, report.run_names(folders), styles):
        log = read_log(folder)
        draw_line(panel, log, x, "val_loss", label=name, markersize=5, **style)
        draw_line(panel, log, x, "train_loss", color=style["color"], linewidth=0.8, alpha=0.5)
    panel.set(xlabel=X_AXES[x], ylabel="loss (nats per token)",
              title="validation loss (thin: training loss)")
    panel.xaxis.set_major_formatter("{x:,.10g}")
    legend_above(figure, panel)
    save_picture(figure, path)


def lines_over(flag, runs):
    """Scored runs -> a table with a row per line of the picture, value of the flag (nan where it
    has no effect) and range: the line's pe, ppl and ppl_std over seeds.

    Raises ValueError if the runs do not differ in the flag, or if its values are no numbers."""
    scores = scores_of(runs)
    if flag not in scores or not is_numeric_dtype(scores[flag]) or scores[flag].nunique() < 2:
        raise ValueError(f"--x {flag} is not a flag of which these runs have several numbers; for "
                         f"folders of runs name one of {', '.join(X_AXES)}")
    names = group_names([settings_of(run) | {flag: None, FOLLOWS.get(flag, flag): None}
                         for run in runs])
    if flag == "window":  # the default stands in the names
        names = [re.sub(r":\d+", "", name) for name in names]
    scores["line"] = [names[run] for run in scores["run"]]
    return over_seeds(scores, ["line", "pe", flag, "start", "end"], {"ppl": "std"}).reset_index()


def draw_range(panel, table, flag, styles):
    """The perplexities in one range of positions, against the flag."""
    for (name, line), style in zip(table.groupby("line", sort=False), styles):
        for ppl in line.loc[line[flag].isna(), "ppl"]:
            panel.axhline(ppl, label=name, color=style["color"], linestyle=style["linestyle"])
        rows = without_nan(line.dropna(subset=[flag]).sort_values(flag)).to_dict("records")
        if rows:
            draw_line(panel, rows, flag, "ppl", "ppl_std", label=name, markersize=5, **style)
    values = sorted(table[flag].dropna().unique())
    if values[0] > 0 and values[-1] > 8 * values[0]:
        panel.set_xscale("log")
    panel.set_xticks(values, [f"{value:,.10g}" for value in values], fontsize="x-small",
                     rotation=90 if values[-1] > 10_000 else 0)
    panel.xaxis.minorticks_off()
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:,.10g}")
    panel.yaxis.set_minor_formatter("{x:,.10g}")


def draw_flag(runs, flag, path):
    table = lines_over(flag, runs)
    styles = report.styles(table.drop_duplicates("line").to_dict("records"))
    ranges = table.groupby(["start", "end"])
    figure, (panels,) = report.import_pyplot().subplots(
        1, len(ranges), figsize=(1 + 2.4 * len(ranges), 4.2), squeeze=False, sharey=True,
        layout="constrained")
    for panel, ((start, end), rows) in zip(panels, ranges):
        draw_range(panel, rows, flag, styles)
        panel.set(title=f"[{start:,}, {end:,})")
    panels[0].set_ylabel("perplexity per token")
    figure.supxlabel(f"--{flag}; ± standard deviation over seeds", fontsize="medium")
    legend_above(figure, panels[0])
    save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Draw the losses of runs, complete or not, or the perplexity of "
                                  "sweeps against the value of a flag (needs matplotlib).")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="OUT_DIR|FILE.json",
        help="folders of runs, or JSON files of experiments.sweep")
    add("--x", default="iter", metavar="NAME", help=f"for folders of runs {', '.join(X_AXES)}; for "
        "sweeps a flag of train.py with numbers for values, such as hope_cutoff")
    add("--plot", default="curves.png", metavar="FILE.png", help="the picture")
    args = parser.parse_args(argv)
    if args.x in X_AXES:
        draw_losses(args.inputs, args.x, args.plot)
    else:
        draw_flag(read_runs(args.inputs), args.x, args.plot)


if __name__ == "__main__":
    flags.run(main)
