"""
The losses of runs in one picture, from the log.jsonl that train.py leaves in each folder:

    python -m experiments.plot_log out/rope out/hope --plot losses.png
    python -m experiments.plot_log out/* --x seconds --plot losses.png

With markers: validation loss; thin: training loss, if the log has it. Works while a run is still training.
"""
import json
from pathlib import Path

from common import flags, report
from common.checkpoint import load_checkpoint

X_AXES = {"iter": "optimizer steps", "tokens": "tokens trained on", "seconds": "training time (seconds)"}


def read_log(out_dir):
    """The lines of a run's log, as dicts. Raises FileNotFoundError or ValueError if there is no loss to be seen.

    A last line that is still being written, or that a kill cut short, is ignored.
    """
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
    if not any("val_loss" in line for line in lines):
        raise ValueError(f"{path} has no validation loss yet: wait for the first evaluation")
    return lines


def read_run(name, out_dir):
    """-> {"name", "pe", "log"}. The encoding is in the checkpoint, which a run that has just started does not have."""
    log = read_log(out_dir)
    try:
        pe = load_checkpoint(out_dir)["config"]["pe"]
    except (OSError, ValueError):
        pe = "unknown"
    return {"name": name, "pe": pe, "log": log}


def curve(run, x, y):
    """-> x and y of all lines of the log that have y."""
    return zip(*[(line[x], line[y]) for line in run["log"] if y in line])


def draw(runs, x, path):
    figure, panel = report.import_pyplot().subplots(figsize=(9.5, 5.5), layout="constrained")
    for run, style in zip(runs, report.styles(runs)):
        panel.plot(*curve(run, x, "val_loss"), label=run["name"], markersize=5, **style)
        if any("train_loss" in line for line in run["log"]):
            panel.plot(*curve(run, x, "train_loss"), color=style["color"], linewidth=0.8, alpha=0.5)
    panel.set(xlabel=X_AXES[x], ylabel="loss (nats per token)", title="validation loss (thin: training loss)")
    figure.legend(loc="outside lower center", ncols=4)
    report.save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Print and draw the losses of runs, finished or not (needs matplotlib).")
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="folders of runs")
    add("--x", choices=X_AXES, default="iter", help="what the losses are drawn over")
    add("--plot", default="losses.png", metavar="FILE.png", help="the picture")
    args = parser.parse_args(argv)
    report.import_pyplot()
    report.check_output(args.plot, report.PICTURES)
    runs = [read_run(name, out_dir) for name, out_dir in zip(report.run_names(args.runs), args.runs)]
    rows = {}
    for run in runs:
        last, lowest = run["log"][-1], min(line["val_loss"] for line in run["log"] if "val_loss" in line)
        rows[run["name"]] = [report.format_cell(lowest, digits=4), f"{last['iter']:,}", f"{last['tokens']:,}",
                             f"{last['seconds'] / 60:,.1f}"]
    report.print_table("losses in nats per token", ["lowest validation loss", "steps", "tokens", "minutes"], rows)
    draw(runs, args.x, args.plot)


if __name__ == "__main__":
    flags.run(main)
