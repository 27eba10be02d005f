"""
The pictures of experiments/analyze_attention.py, from its JSON:

    python -m experiments.draw_attention attention.json --plot attention.png

    FILE_distance.png     mean attention weight and mean logit, by distance to the key
    FILE_key.png          the same, by position of the key
    FILE_components.png   the logit split into its pairs of channels: the share of each, and what it does beyond L
    FILE_frequency.png    the size of queries and keys in each pair; values, which are never rotated, as control
    FILE_entropy.png      how widely attention spreads as the text grows, with and without log-n scaling

L is the trained context, drawn as a dotted line.
"""
import json
from functools import partial
from pathlib import Path

import numpy as np

from common import flags
from common.report import PICTURES, check_output, import_pyplot, save_picture, styles

WIDTH = 9.5  # inches: text of 11 points is readable at the width at which GitHub shows a picture


def grid(rows, columns, height):
    """An empty picture -> figure, axes (rows, columns). height: inches per row."""
    return import_pyplot().subplots(rows, columns, figsize=(WIDTH, height * rows + 0.7), squeeze=False,
                                    layout="constrained")


def array(values):
    """Nested lists -> float array. None, which JSON holds for nan, becomes nan."""
    return np.array(values, dtype=float)


def middles(run):
    """Where each bin is drawn (bins,). 1 is added, so that 0 has a place on a logarithmic axis."""
    edges = array([*run["starts"], run["length"]])
    return (edges[:-1] + edges[1:] - 1) / 2 + 1


def token_axis(panel, run, label):
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.axvline(run["block_size"] + 0.5, color="gray", linestyle=":")
    panel.set_xlabel(label)


def draw_layers(panel, x, layers):
    """One thin line per layer, light to dark."""
    for i, layer in enumerate(layers):
        shade = str(0.8 - 0.5 * i / max(1, len(layers) - 1))
        panel.plot(x, array(layer), color=shade, linewidth=1, label=f"layer {i + 1}")


def draw_mean(panel, x, found, **style):
    """The mean over layers, with a band of one standard error over windows."""
    mean, stderr = array(found["mean"]), array(found["stderr"])
    panel.plot(x, mean, linewidth=2, **style)
    panel.fill_between(x, mean - stderr, mean + stderr, color=style["color"], alpha=0.2, linewidth=0)


def plot_curves(runs, path, by, label):
    """Attention weight and logit, one row per run. Solid: queries in the second half of L; dashed: of the window."""
    figure, axes = grid(len(runs), 2, 2.5)
    for run, style, row in zip(runs, styles(runs), axes):
        for panel, what in zip(row, ("attention weight", "logit")):
            for group, line in (("inside", "-"), ("beyond", "--")):
                found = run.get(f"{group}/{what.split()[-1]}_by_{by}")
                if found and group == "inside":
                    draw_layers(panel, middles(run), found["layers"])
                if found:
                    draw_mean(panel, middles(run), found, color=style["color"], linestyle=line,
                              label=f"mean, queries {group} L")
            token_axis(panel, run, label if run is runs[-1] else "")
            panel.set(title=run["name"], ylabel=f"mean {what}")
        row[0].set_yscale("log")
        row[0].set_ylim(bottom=1e-4)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_picture(figure, path)


def heat_maps(figure, runs, panels, name, label):
    """One map of layers by pairs (layers, P) per run, all on one scale. The red line is HoPE's cut-off: pairs to its
    right take more than L tokens per turn."""
    for panel in panels:
        panel.axis("off")
    drawn = [(array(run[name]["layers"]), run, panel) for run, panel in zip(runs, panels) if name in run]
    highest = max((layers.max() for layers, _, _ in drawn), default=0)
    for layers, run, panel in drawn:
        panel.axis("on")
        panel.grid(False)
        image = panel.imshow(layers, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        panel.set_xticks([])
        panel.set_yticks(range(len(layers)), range(1, len(layers) + 1))
        panel.axvline(sum(tokens <= run["block_size"] for tokens in run["wavelength"]) - 0.5, color="red")
    if drawn:
        drawn[0][2].set_ylabel("layer")
        figure.colorbar(image, ax=list(panels), label=label)


def pair_axis(figure, runs, panels):
    for run, panel in zip(runs, panels):
        n_pairs, rotated = len(run["wavelength"]), max(run.get("rotated", {"L": run["n_turning"]}).values())
        shown = range(0, n_pairs, max(1, n_pairs * len(runs) // 24))
        panel.set_xticks(shown, [f"{run['wavelength'][j]:,.0f}" if j < rotated else "–" for j in shown],
                         rotation=90)
    figure.supxlabel("tokens per turn of the pair (–: not rotated)", fontsize="medium")


def plot_components(runs, path):
    """One column per run: S_j by distance in the first layer without a window, then its share, its swing inside L and
    its excursion beyond L."""
    figure, axes = grid(4, len(runs), 2.2)
    for run, panel in zip(runs, axes[0]):
        curves = array((run.get("beyond/pair_by_distance") or run["inside/pair_by_distance"])["first_layer"])
        curves = curves - curves[:, array(run["starts"]) < run["block_size"]].mean(-1, keepdims=True)  # (P, bins)
        for j, curve in enumerate(curves):
            color = import_pyplot().cm.plasma(0.9 * j / max(1, len(curves) - 1))
            panel.plot(middles(run), curve, color=color, linewidth=1)
        token_axis(panel, run, "1 + distance (tokens)" if run is runs[len(runs) // 2] else "")
        panel.set_title(run["name"], fontsize="small")
    axes[0, 0].set_ylabel("$S_j$ (logits), dark: fast pairs,\nfirst layer that sees all")
    heat_maps(figure, runs, axes[1], "inside/pair_share", "share of variance,\ninside L")
    heat_maps(figure, runs, axes[2], "inside/pair_swing", "std. of $S_j$ by distance,\ninside L (logits)")
    heat_maps(figure, runs, axes[3], "beyond/pair_swing", "excursion of $S_j$\nbeyond L (logits)")
    pair_axis(figure, runs, axes[3])
    save_picture(figure, path)


def plot_frequency(runs, path):
    figure, axes = grid(3, len(runs), 1.9)
    for name, row in zip(("queries", "keys", "values"), axes):
        heat_maps(figure, runs, row, f"norm/{name[0]}", f"mean 2-norm\nof {name}")
    for run, panel in zip(runs, axes[0]):
        panel.set_title(run["name"], fontsize="small")
    pair_axis(figure, runs, axes[2])
    save_picture(figure, path)


def plot_entropy(runs, path):
    figure, axes = grid(1, len(runs), 3.4)
    for run, style, panel in zip(runs, styles(runs), axes[0]):
        x = middles(run)
        draw_layers(panel, x, run["entropy"]["layers"])
        for name, line, label in (("entropy", "-", "mean"), ("entropy_logn", "--", "mean with log-n scaling")):
            draw_mean(panel, x, run[name], color=style["color"], linestyle=line, label=label)
        panel.plot(x, np.log(x), color="gray", linestyle="-.", label="ln n: uniform attention")
        token_axis(panel, run, "1 + position of the query (tokens)" if run is runs[len(runs) // 2] else "")
        panel.set_title(run["name"], fontsize="small")
    axes[0, 0].set_ylabel("entropy of attention (nats)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_picture(figure, path)


DRAWINGS = {"distance": partial(plot_curves, by="distance", label="1 + distance to the key (tokens)"),
            "key": partial(plot_curves, by="key", label="1 + position of the key (tokens)"),
            "components": plot_components, "frequency": plot_frequency, "entropy": plot_entropy}


def draw(runs, path):
    """Runs, as the JSON holds them -> FILE_distance.png and the others, for path FILE.png."""
    path = Path(path)
    for name, plot in DRAWINGS.items():
        plot(runs, path.with_name(f"{path.stem}_{name}{path.suffix}"))


def main(argv=None):
    parser = flags.ArgumentParser("Draw what experiments.analyze_attention has measured (needs matplotlib).")
    parser.add_argument("json", metavar="FILE.json", help="what experiments.analyze_attention --json wrote")
    parser.add_argument("--plot", metavar="FILE.png", required=True, help="first and last part of the pictures' names")
    args = parser.parse_args(argv)
    check_output(args.plot, PICTURES)
    result = json.loads(Path(args.json).read_text(encoding="utf-8"))
    if "inside/pair_share" not in result.get("runs", [{}])[0]:
        raise ValueError(f"{args.json} was not written by experiments.analyze_attention")
    draw(result["runs"], args.plot)


if __name__ == "__main__":
    flags.run(main)
