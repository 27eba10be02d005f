"""
What each encoding adds to attention's logit, as a function of the distance between query and key:

    python -m experiments.draw_encodings out/rope out/hope out/alibi --plot encodings.png

One panel a run, drawn from its checkpoint through the three methods of model.PositionalEncoding and no others:

    bias      the bias itself, one line a head
    rotary    the logit of a query and a key that are all ones: 2 / sqrt(D) sum_j cos(distance theta_j)
    embed     the dot product of what is added at two positions, over its mean square, averaged over positions
"""
import math

import torch

import cli
from eval_extrapolation import import_pyplot
from model import GPT, rotate


@torch.no_grad()
def logit_by_distance(model, length):
    """-> what kind of term it is, and its values at distances 0 ... length - 1 (lines, length), nan where undefined."""
    pe, config = model.transformer.wpe, model.config
    pos = torch.arange(length)
    bias = pe.bias(pos[-1:], pos)
    if bias is not None:
        return "bias, a line a head", bias[:, 0].flip(-1)                                    # (H, length)
    rotary = pe.rotary(pos)
    if rotary is not None:
        ones = torch.ones(1, 1, length, config.n_embd // config.n_head)
        turned = rotate(ones, *rotary)[0, 0]                                                 # (length, D)
        return "logit of all-ones q and k", (turned @ turned[0] / math.sqrt(turned.size(-1)))[None]
    known = pos[:min(length, pe.max_length or length)]
    added = pe.embed(torch.zeros(1, len(known), config.n_embd), known)[0]                    # (n, C)
    products = added @ added.T / added.pow(2).sum(-1).mean().clamp(min=1e-9)
    line = torch.full((length,), math.nan)
    line[:len(known)] = torch.stack([products.diagonal(-distance).mean() for distance in known.tolist()])
    return "dot product of added vectors", line[None]


def main(argv=None):
    parser = cli.ArgumentParser("Draw what encodings add to the logit, by distance (needs matplotlib).")
    parser.add_argument("runs", nargs="+", metavar="OUT_DIR", help="runs' folders or checkpoint files")
    parser.add_argument("--plot", default="encodings.png", help="the picture")
    parser.add_argument("--max_factor", type=cli.number(int, 1), default=4, help="longest distance, in multiples of L")
    args = parser.parse_args(argv)
    pyplot = import_pyplot()
    cli.check_output(args.plot, cli.PICTURES)

    rows = math.ceil(len(args.runs) / 5)
    columns = math.ceil(len(args.runs) / rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.6 * columns, 2.4 * rows), squeeze=False,
                                   layout="constrained")
    for axis in axes.flat[len(args.runs):]:
        axis.axis("off")
    for axis, path in zip(axes.flat, args.runs):
        model = GPT.from_checkpoint(path)
        L = model.config.block_size
        kind, lines = logit_by_distance(model, args.max_factor * L)
        for line in lines:
            axis.plot(line, linewidth=1)
        axis.axvline(L, color="gray", linestyle=":")
        axis.set_xticks([0, L, args.max_factor * L], ["0", "L", f"{args.max_factor} L"])
        axis.set_title(f"{model.config.pe}\n", fontsize=11)
        axis.text(0.5, 1.03, kind, transform=axis.transAxes, ha="center", fontsize=7, color="gray")
        axis.tick_params(labelsize=7)
    figure.supxlabel("distance between query and key (tokens)", fontsize=9)
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    cli.run(main)
