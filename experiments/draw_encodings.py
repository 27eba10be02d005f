"""
What each encoding adds to the attention logit, by distance between query and key:

    python -m experiments.draw_encodings out/rope out/hope out/alibi --plot encodings.png

One panel per run, or two if its layers differ (S and L), computed from its checkpoint through the three methods of
model.PositionalEncoding:

    bias      the bias itself, one line per head
    rotary    the logit of a query and a key of all ones: 2 / sqrt(D) sum_j cos(distance theta_j)
    embed     the dot product of the vectors added at two positions, over their mean square, averaged over positions

The line of a layer with a window ends where the window does.
"""
import math

import torch

from common import flags
from common.checkpoint import load_model
from common.report import PICTURES, check_output, import_pyplot, save_picture, styles
from model import rotate


@torch.no_grad()
def logit_by_distance(model, length, layers="L"):
    """The term that a model's L or S layers add -> what it is, and its values at distances 0 ... length - 1 (lines,
    length), nan where it is undefined or outside the window."""
    name, lines = encoding_by_distance(model.encodings[layers], model.config, length)
    if layers == "S" and model.config.window:
        lines = lines.clone()
        lines[:, model.config.window:] = math.nan
    return name, lines


def encoding_by_distance(pe, config, length):
    """The same for an encoding, without a window."""
    pos = torch.arange(length)
    bias = pe.bias(pos[-1:], pos)
    if bias is not None:
        return "bias per head", bias[:, 0].flip(-1)  # (H, length)
    rotary = pe.rotary(pos)
    if rotary is not None:
        ones = torch.ones(1, 1, length, config.n_embd // config.n_head)
        rotated = rotate(ones, *rotary)[0, 0]  # (length, D)
        return "logit of ones", (rotated @ rotated[0] / math.sqrt(rotated.size(-1)))[None]
    known = pos[:min(length, pe.max_length or length)]
    added = pe.embed(torch.zeros(1, len(known), config.n_embd), known)[0]  # (known, C)
    products = added @ added.T / added.pow(2).sum(-1).mean().clamp(min=1e-9)
    line = torch.full((length,), math.nan)
    line[:len(known)] = torch.stack([products.diagonal(-distance).mean() for distance in known.tolist()])
    return "dot product", line[None]


def panels_of(model):
    """-> the panels of a model: "S" and "L", or one of them if all of its layers are the same."""
    config = model.config
    local = config.local()
    differ = local.window or (local.pe, local.rope_base) != (config.pe, config.rope_base)
    return sorted(set(config.kinds()), reverse=True) if differ else ["L"]


def draw(models, max_factor, path):
    """One panel per model and kind of layer."""
    panels = [(model, layers) for model in models for layers in panels_of(model)]
    pes = [model.configs[layers].pe for model, layers in panels]
    pyplot, columns = import_pyplot(), min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(9.5, 2.6 * rows), squeeze=False, layout="constrained")
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    for panel, (model, layers), pe, style in zip(axes.flat, panels, pes, styles([{"pe": pe} for pe in pes])):
        L = model.config.block_size
        kind, lines = logit_by_distance(model, max_factor * L, layers)
        for line in lines:
            panel.plot(line, color=style["color"], linewidth=1.2)
        panel.axvline(L, color="gray", linestyle=":")
        panel.set_xlim(-0.04 * max_factor * L, 1.04 * max_factor * L)
        panel.set_xticks([0, L, max_factor * L], ["0", "L", f"{max_factor} L"])
        where = f" in {layers} layers" if len(panels_of(model)) > 1 else ""
        panel.set_title(f"{pe}{where}\n{kind}", fontsize=11)
    figure.supxlabel("distance between query and key (tokens)", fontsize="medium")
    save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Draw what encodings add to the attention logit, by distance (needs matplotlib).")
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders or checkpoint files")
    add("--plot", default="encodings.png", metavar="FILE.png", help="the picture")
    add("--max_factor", type=flags.parsed(int, at_least=1), default=4, help="longest distance in multiples of L")
    args = parser.parse_args(argv)
    import_pyplot()
    check_output(args.plot, PICTURES)
    draw([load_model(path) for path in args.runs], args.max_factor, args.plot)


if __name__ == "__main__":
    flags.run(main)
