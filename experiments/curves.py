"""
Losses of runs, while they train or after, in one picture:

    python -m experiments.curves out/rope out/hope --plot losses.png
    python -m experiments.curves out/rope out/hope --x seconds --plot losses.png --json losses.json

With markers: validation loss; thin: training loss. train.py leaves them in a run's log.jsonl.
"""
import json
from pathlib import Path

from common import flags, report
from common.checkpoint import load_checkpoint
from experiments.output import draw_line

X_AXES = {"iter": "optimizer steps", "tokens": "tokens trained on",
          "seconds": "training time (seconds)"}


def read_log(out_dir):
    """The lines of a run's log, as dicts, without one that is still being written."""
    text = Path(out_dir, "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def plot(runs, x, path):
    figure, panel = report.import_pyplot().subplots(figsize=(9.5, 5.5))
    for run, style in zip(runs, report.styles(runs)):
        draw_line(panel, run["log"], x, "val_loss", markersize=5, **style)
        draw_line(panel, run["log"], x, "train_loss", color=style["color"], linewidth=0.8,
                  alpha=0.5)
    panel.set(xlabel=f"{X_AXES[x]}\nwith markers: validation; thin: training",
              ylabel="loss (nats per token)")
    panel.xaxis.set_major_formatter("{x:,.10g}")
    panel.ticklabel_format(axis="y", useOffset=False)
    report.save_picture(figure, panel, "How does the loss fall?", path)


def main(argv=None):
    parser = flags.ArgumentParser("Plot the losses of runs, complete or not (needs matplotlib).")
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="folders of runs")
    add("--x", choices=X_AXES, default="iter", help="the horizontal axis")
    add("--plot", required=True, metavar="FILE.png", help="the picture to write")
    add("--json", metavar="FILE", help="write logs and flags of the runs to this file")
    args = parser.parse_args(argv)
    named = zip(args.runs, report.run_names(args.runs), map(load_checkpoint, args.runs))
    runs = [{"name": name, "pe": checkpoint["config"]["pe"], "args": checkpoint["args"],
             "dataset_sha256": checkpoint["dataset"]["sha256"], "log": read_log(folder)}
            for folder, name, checkpoint in named]
    plot(runs, args.x, args.plot)
    if args.json:
        report.write_json(args.json, "-m experiments.curves", {"runs": runs})


if __name__ == "__main__":
    flags.run(main)
