"""
Curves over training and over a flag, and the lines of all other experiments' pictures:

    python -m experiments.curves out/rope out/hope --plot losses.png
    python -m experiments.curves out/rope out/hope --x seconds --plot losses.png
    python -m experiments.curves out/cutoff/sweep.json --x hope_cutoff --plot cutoff.png

Runs' folders: the losses in the log.jsonl that train.py leaves there, of a run that is still training, too. With
markers: validation loss; thin: training loss.

JSON files of experiments.sweep: perplexity against the value of a flag, in one panel per range of positions, with one
line per combination of the other flags and a band of one standard deviation over seeds. A line on which the flag has no
effect is horizontal. For --x prope_fraction the fraction that HoPE rotates is marked, for --x rope_base the smallest
base for L of arXiv 2405.14591.
"""
import json
from pathlib import Path

from common import flags, report
from common.checkpoint import load_checkpoint
from experiments.figures import smallest_base
from experiments.groups import group_names, network_of, without_effect
from model import GPTConfig, HoPE

# --- Lines ------------------------------------------------------------------------------------------------------------


def draw_line(panel, rows, x, y, error=None, **style):
    """Rows, as dicts -> a line of their values y over x, with a band of one error. Rows that have no y are left out."""
    known = [row for row in rows if row and row.get(y) is not None]
    at, mean = [row[x] for row in known], [row[y] for row in known]
    panel.plot(at, mean, **style)
    if error:
        low, high = ([row[y] + sign * (row[error] or 0) for row in known] for sign in (-1, 1))
        panel.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


def token_axis(panel, L, ticks):
    """Tokens on a logarithmic axis, with a dotted line at the trained context."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.axvline(L, color="gray", linestyle=":")


def legend_above(figure, panel, columns=4):
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


# --- Losses over training ---------------------------------------------------------------------------------------------

X_AXES = {"iter": "optimizer steps", "tokens": "tokens trained on", "seconds": "training time (seconds)"}


def read_log(out_dir):
    """The lines of a run's log, as dicts. Raises FileNotFoundError or ValueError if there is no loss to be seen.

    A last line that is still being written, or that a kill cut short, is ignored."""
    path = Path(out_dir, "log.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: name the folder of a run, made by train.py --out_dir")
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    if not all(isinstance(line, dict) and line.keys() >= X_AXES.keys() for line in lines):
        raise ValueError(f"{path} is not a log of train.py: a line lacks one of {', '.join(X_AXES)}")
    if all(line.get("val_loss") is None for line in lines):  # null if it is not finite
        raise ValueError(f"{path} has no validation loss: wait for the first evaluation, unless the training diverged")
    return lines


def read_run(name, out_dir):
    """-> {"name", "pe", "log"}. The encoding is in the checkpoint, which a run that has just started does not have."""
    log = read_log(out_dir)
    try:
        pe = load_checkpoint(out_dir)["config"]["pe"]
    except (OSError, ValueError):
        pe = "unknown"
    return {"name": name, "pe": pe, "log": log}


def print_losses(runs):
    rows = {}
    for run in runs:
        last = run["log"][-1]
        lowest = min(line["val_loss"] for line in run["log"] if line.get("val_loss") is not None)
        rows[run["name"]] = [report.format_cell(lowest, digits=4), f"{last['iter']:,}", f"{last['tokens']:,}",
                             f"{last['seconds'] / 60:,.1f}"]
    report.print_table("losses in nats per token", ["lowest validation loss", "steps", "tokens", "minutes"], rows)


def draw_losses(runs, x, path):
    figure, panel = report.import_pyplot().subplots(figsize=(9.5, 5.5), layout="constrained")
    for run, style in zip(runs, report.styles(runs)):
        draw_line(panel, run["log"], x, "val_loss", label=run["name"], markersize=5, **style)
        if any("train_loss" in line for line in run["log"]):
            draw_line(panel, run["log"], x, "train_loss", color=style["color"], linewidth=0.8, alpha=0.5)
    panel.set(xlabel=X_AXES[x], ylabel="loss (nats per token)", title="validation loss (thin: training loss)")
    panel.xaxis.set_major_formatter("{x:,.10g}")
    legend_above(figure, panel)
    report.save_picture(figure, path)


# --- Perplexity over the value of a flag ------------------------------------------------------------------------------

FOLLOWS = {"learning_rate": "min_lr", "max_iters": "lr_decay_iters"}  # flag -> another that changes with it


def read_groups(paths):
    """JSON files of sweeps -> their groups; of two equal ones the first. Raises ValueError."""
    found, writer = {}, (f"experiments.sweep: --x takes {', '.join(X_AXES)} for folders of runs, and a flag for JSON "
                         "files of sweeps")
    for path in paths:
        for group in report.read_json(path, "groups", ("args", "buckets"), writer)["groups"]:
            found.setdefault(json.dumps(group["args"], sort_keys=True), group)
    return list(found.values())


def lines_of(groups, flag):
    """-> [(name, groups in the order of the flag's values)], a line each. The value is None where it has no effect.

    Raises ValueError if the groups cannot be drawn against the flag, or not in one picture."""
    active = [flag not in without_effect(group["args"]) for group in groups]
    values = [group["args"].get(flag) for group in groups]
    if not all(type(value) in (int, float) for value, counts in zip(values, active) if counts) or not any(active):
        raise ValueError(f"--{flag} is not a flag with a number for a value in these sweeps")
    if len({tuple(bucket["end"] for bucket in group["buckets"]) for group in groups}) > 1:
        raise ValueError("the sweeps have different --block_size or --max_factor: draw a picture of each")
    lines = {}
    for group, value, counts in zip(groups, values, active):
        rest = {name: value for name, value in group["args"].items() if name not in (flag, FOLLOWS.get(flag))}
        lines.setdefault(json.dumps([rest, counts], sort_keys=True), []).append(
            {**group, "args": rest, "value": value if counts else None})
    if max(map(len, lines.values())) < 2:
        raise ValueError(f"no two groups of these sweeps differ in --{flag} alone: give the sweep several values of it")
    names = group_names([line[0]["args"] for line in lines.values()])
    if flag == "window":  # the default stands in the names
        names = [name.replace(f":{GPTConfig.window}", "") for name in names]
    return [(name, sorted(line, key=lambda group: group["value"] or 0)) for name, line in zip(names, lines.values())]


def mark(flag, config):
    """A value of the flag that follows from L, for a GPTConfig -> (text, value), or None."""
    n_pairs = config.n_embd // config.n_head // 2
    if flag == "prope_fraction":
        return "HoPE rotates", len(HoPE(config).theta) / n_pairs
    if flag == "rope_base":
        return f"smallest base for {config.block_size:,} tokens", round(smallest_base(config.block_size, n_pairs))
    return None


def draw_range(panel, lines, styles, i, marks):
    """Perplexity in bucket i over the flag's values."""
    for (name, line), style in zip(lines, styles):
        rows = [{"value": group["value"], **group["buckets"][i]} for group in line]
        if rows[0]["value"] is not None:
            draw_line(panel, rows, "value", "ppl", "ppl_std", label=name, markersize=5, **style)
        elif rows[0]["ppl"] is not None:
            panel.axhline(rows[0]["ppl"], label=name, color=style["color"], linestyle=style["linestyle"])
    for text, value in marks:
        panel.axvline(value, color="gray", linestyle=":", label=f"{text}: {value:,.10g}")
    values = sorted({group["value"] for _, line in lines for group in line} - {None})
    if values[0] > 0 and values[-1] > 8 * values[0]:
        panel.set_xscale("log", base=2 if values[-1] < 1000 else 10)
    panel.set_xticks(values, [f"{value:,.10g}" for value in values], fontsize="x-small",
                     rotation=90 if values[-1] > 10_000 else 0)
    panel.xaxis.minorticks_off()
    bucket = lines[0][1][0]["buckets"][i]
    panel.set(title=f"[{bucket['start']:,}, {bucket['end']:,})")


def draw_flag(lines, flag, path):
    groups = [group for _, line in lines for group in line]
    n_ranges, styles = len(groups[0]["buckets"]), report.styles([line[0] for _, line in lines])
    marks = {mark(flag, network_of(group["args"])) for group in groups} - {None}
    figure, (panels,) = report.import_pyplot().subplots(1, n_ranges, figsize=(1 + 2.4 * n_ranges, 4.2), squeeze=False,
                                                        layout="constrained", sharey=True)
    for i, panel in enumerate(panels):
        draw_range(panel, lines, styles, i, marks)
    low, high = panels[0].get_ylim()
    if high > 2 * low:
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:,.10g}")
        panels[0].yaxis.set_minor_formatter("{x:,.10g}")
    panels[0].set_ylabel("perplexity per token")
    several = any(len(group["seeds"]) > 1 for group in groups)
    figure.supxlabel(f"--{flag}" + "; ± standard deviation over seeds" * several, fontsize="medium")
    legend_above(figure, panels[0])
    report.save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Draw the losses of runs, finished or not, or the perplexity of sweeps against the "
                                  "value of a flag (needs matplotlib).")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="OUT_DIR|FILE.json", help="folders of runs, or JSON files of experiments.sweep")
    add("--x", default="iter", metavar="NAME", help=f"for folders of runs {', '.join(X_AXES)}; for sweeps a flag of "
        "train.py with numbers for values, without the dashes, such as hope_cutoff")
    add("--plot", default="curves.png", metavar="FILE.png", help="the picture")
    args = parser.parse_args(argv)
    report.import_pyplot()
    report.check_output(args.plot, report.PICTURES)
    if args.x in X_AXES:
        runs = [read_run(name, out_dir) for name, out_dir in zip(report.run_names(args.inputs), args.inputs)]
        print_losses(runs)
        draw_losses(runs, args.x, args.plot)
    else:
        draw_flag(lines_of(read_groups(args.inputs), args.x), args.x, args.plot)


if __name__ == "__main__":
    flags.run(main)
