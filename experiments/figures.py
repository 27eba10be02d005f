"""
The picture of RoPE and HoPE in README.md:

    python -m experiments.figures --head_dim 64 --rope_base 100 --plot idea.png

A circle per pair, RoPE above HoPE (arXiv 2410.21216). Pairs that HoPE does not rotate stay at
angle 0.
"""
import math

from torch.nn import functional as F

from common import flags, report
from model import GPTConfig, HoPE, RoPE


def draw_pair(panel, theta, L, color):
    """The circle of a pair that rotates by theta radians per token (0: it does not). Angle 0 is at
    the top."""
    from matplotlib.patches import Circle, Wedge

    panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
    panel.axis("off")
    if theta == 0:
        panel.add_patch(Circle((0, 0), 1, fill=False, color="gray"))
        panel.plot(0, 1, "o", color=color, markersize=9, clip_on=False)
        panel.text(0, 0, "not\nrotated", ha="center", va="center")
        return
    turns = theta * L / (2 * math.pi)
    seen = 360 * min(1, turns)  # degrees, clockwise
    panel.add_patch(Wedge((0, 0), 1, 90 - seen, 90, facecolor=color, edgecolor=color,
                          label="filled: seen at distances up to L"))
    if turns < 1:
        panel.add_patch(Wedge((0, 0), 1, 90, 450 - seen, facecolor="white", edgecolor="gray",
                              hatch="////", label="hatched: never seen in training"))
    else:
        text = "1 turn" if round(turns) == 1 else f"{turns:.0f}\nturns"
        panel.text(0, 0, text, ha="center", va="center", color="white")
    panel.text(0, -1.2, f"{2 * math.pi / theta:,.0f}", ha="center", va="top")


def draw_idea(config, path):
    """At most eight pairs of a head of a GPTConfig."""
    figure = report.import_pyplot().figure(figsize=(9.5, 5.2))
    L, rope, hope = config.block_size, RoPE(config).theta, HoPE(config).theta
    hope = F.pad(hope, (0, len(rope) - len(hope)))  # (pairs,), 0: not rotated
    for part, pe, theta, title in zip(figure.subfigures(2, 1), ("rope", "hope"), (rope, hope), (
            "RoPE rotates all pairs: beyond L, slow ones meet new angles",
            "HoPE rotates only the pairs that have seen the whole circle")):
        shown, color = theta[::max(1, len(theta) // 8)][:8].tolist(), report.STYLES[pe][1]
        part.suptitle(title, color=color)
        for panel, frequency in zip(part.subplots(1, len(shown), squeeze=False)[0], shown):
            draw_pair(panel, frequency, L, color)
        part.supxlabel("tokens per turn", fontsize="medium")
    figure.supxlabel(f"one circle per pair of channels ({len(shown)} of {len(theta)} pairs are "
                     "shown): its angles, clockwise from the top", fontsize="medium")
    report.save_picture(figure, figure.axes[len(shown) - 1], "Which angles are new beyond the "
                        f"trained context, L = {L} tokens?", path)


def main(argv=None):
    parser = flags.ArgumentParser("A picture of RoPE and HoPE (needs matplotlib).")
    parser.add_argument("--head_dim", type=flags.positive, default=32, help="channels of the head")
    flags.add_flags(parser, GPTConfig, "block_size", "rope_base", "hope_cutoff")
    parser.add_argument("--plot", default="idea.png", metavar="FILE.png", help="the picture")
    args = parser.parse_args(argv)
    draw_idea(GPTConfig(n_embd=args.head_dim, n_head=1, block_size=args.block_size,
                        rope_base=args.rope_base, hope_cutoff=args.hope_cutoff), args.plot)


if __name__ == "__main__":
    flags.run(main)
