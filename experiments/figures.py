"""
Pictures about rotary encodings alone, that need no trained model:

    python -m experiments.figures idea --plot idea.png
    python -m experiments.figures theory --json theory.json --plot theory.png

idea: a circle per pair, RoPE above HoPE (arXiv 2410.21216). Filled: the angles at distances up to
L. Hatched: the rest, which RoPE enters beyond L. The pairs that HoPE does not rotate stay at
angle 0.

theory: statements about a single head, shown by construction (1 to 3: Round and Round We Go!,
arXiv 2410.06205):
1. RoPE does not make attention decay with distance. For Gaussian queries and keys the expected
   logit is 0 at every distance. It decays if query and key are equal, for example vectors of ones.
2. A head can attend to any single distance r: with k = R^r q the logit is largest there.
3. A head without positions gives equal tokens equal weights, so it cannot find the previous token
   in a run of equal tokens. A head with rotation can.
4. RoPE's base bounds the context in which a head prefers keys similar to its query (Base of RoPE
   Bounds Context Length, arXiv 2405.14591). It does at distance m if sum_j cos(m theta_j) >= 0: the
   smallest base for which this holds at all m <= L grows with L.

Shapes: D channels of a head, P = D / 2 pairs, K of them rotated, N queries or samples.
"""
import math

import torch
from torch.nn import functional as F

from common import flags, report
from experiments.output import rounded, save_picture
from model import GPTConfig, HoPE, RoPE, rotate

# --- The idea -------------------------------------------------------------------------------------


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
    panel.add_patch(Wedge((0, 0), 1, 90 - seen, 90, facecolor=color, edgecolor=color))
    if turns < 1:
        panel.add_patch(Wedge((0, 0), 1, 90, 450 - seen, facecolor="white", edgecolor="gray",
                              hatch="////"))
    else:
        panel.text(0, 0, f"{turns:.0f}\nturns", ha="center", va="center", color="white")
    panel.text(0, -1.2, f"{2 * math.pi / theta:,.0f}", ha="center", va="top")


def draw_idea(config, path):
    """At most eight pairs of a head of a GPTConfig."""
    figure = report.import_pyplot().figure(figsize=(9.5, 4.6), layout="constrained")
    from matplotlib.patches import Patch

    L, rope, hope = config.block_size, RoPE(config).theta, HoPE(config).theta
    hope = F.pad(hope, (0, len(rope) - len(hope)))  # (P,), 0: not rotated
    for part, name, theta, title in zip(figure.subfigures(2, 1), ("rope", "hope"), (rope, hope), (
            "RoPE: beyond L tokens, slow pairs enter angles never seen in training",
            "HoPE: rotates only the pairs that have seen the whole circle")):
        shown, color = theta[::max(1, len(theta) // 8)][:8].tolist(), report.STYLES[name][0]
        part.suptitle(title, fontsize=13, fontweight="bold", color=color)
        for panel, frequency in zip(part.subplots(1, len(shown), squeeze=False)[0], shown):
            draw_pair(panel, frequency, L, color)
        part.supxlabel("tokens per turn" if name == "rope" else "", fontsize="medium")
    title = ("One circle per pair of channels: its angles, clockwise from the top, at distances of "
             "0 to L tokens")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title=title, handles=[
        Patch(facecolor="dimgray", label=f"angles seen within the trained context, L = {L} tokens"),
        Patch(facecolor="white", edgecolor="gray", hatch="////", label="never seen in training")])
    save_picture(figure, path)


# --- Statements about a single head ---------------------------------------------------------------


def rotation(theta, positions):
    """Frequencies theta (K,), positions (T,) -> cos, sin (T, K), as model.rotate takes them."""
    angle = positions[:, None] * theta
    return angle.cos(), angle.sin()


def logits_by_distance(q, k, theta, n_distances):
    """Queries and keys (N, D) -> q . R(-r theta) k for keys r = 0, 1, ... tokens before the query
    (N, distances)."""
    turns = rotation(theta, -torch.arange(n_distances))
    keys = rotate(k[:, None, None].expand(-1, 1, n_distances, -1), *turns)
    return (q[:, None] * keys[:, 0]).sum(-1)  # (N, distances)


def gaussian_logits(theta, n_distances, n_samples, seed=1):
    """Independent Gaussian q and k -> logits / sqrt(D) (N, distances): mean 0, standard deviation 1
    at any distance."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n_samples, 2 * len(theta), generator=generator)
    return logits_by_distance(q, k, theta, n_distances) / math.sqrt(2 * len(theta))


def key_that_peaks_at(q, theta, distance):
    """k = R^r q: q (N, D) rotated forward by r = distance tokens, which the distance to a query
    undoes. At that distance each pair adds |q_j|^2, its largest possible value."""
    return rotate(q[:, None, None], *rotation(theta, torch.tensor([distance])))[:, 0, 0]


def attention_in_a_run(theta, length, scale):
    """The weights of the last of `length` equal tokens on all of them, by distance (length,).

    The query is all ones times scale; the key peaks at distance 1. theta of zeros is NoPE."""
    q = scale * torch.ones(1, 2 * len(theta))
    k = key_that_peaks_at(q, theta, 1)
    return (logits_by_distance(q, k, theta, length)[0] / math.sqrt(2 * len(theta))).softmax(-1)


def smallest_base(length, n_pairs):
    """-> the smallest base, in steps of 1 %, with sum_j cos(m theta_j) >= 0 at all distances
    m <= length. It is no threshold: with a larger base the sum can be negative again."""
    distance = torch.arange(length + 1, dtype=torch.float64)[:, None]
    j, base = torch.arange(n_pairs, dtype=torch.float64), 1.0
    while (distance * base ** (-j / n_pairs)).cos().sum(1).min() < 0:
        base *= 1.01
    return base


def statements(theta, n_distances=256, n_samples=2000):
    """Frequencies (K,) -> the statements in numbers, as the JSON holds them."""
    random = gaussian_logits(theta, n_distances, n_samples)  # (N, distances)
    ones, scales = torch.ones(1, 2 * len(theta)), [0.5 * i for i in range(17)]
    q = torch.randn(1, 2 * len(theta), generator=torch.Generator().manual_seed(1))
    peaks = {r: logits_by_distance(q, key_that_peaks_at(q, theta, r), theta, n_distances)[0]
             for r in (0, 10, 50, 200)}
    return {"gaussian_mean": random.mean(0).tolist(),
            "gaussian_stderr": (random.std(0) / math.sqrt(n_samples)).tolist(),
            "ones": (logits_by_distance(ones, ones, theta, n_distances)[0] / len(ones[0])).tolist(),
            "peaks": {str(r): (peak / q.square().sum()).tolist() for r, peak in peaks.items()},
            "scales": scales,
            "previous": {name: [attention_in_a_run(angles, 32, scale)[1].item() for scale in scales]
                         for name, angles in (("rope", theta), ("nope", 0 * theta))},
            "smallest_base": {str(length): smallest_base(length, len(theta))
                              for length in (64, 128, 256, 512, 1024)}}


def draw_statements(found, path):
    """The first three."""
    figure, axes = report.import_pyplot().subplots(3, 1, figsize=(9, 8), layout="constrained")
    mean, stderr = torch.tensor(found["gaussian_mean"]), torch.tensor(found["gaussian_stderr"])
    axes[0].plot(found["ones"], color="gray", linestyle="--", label="q = k = ones")
    axes[0].plot(mean, color="black", label="q, k Gaussian: mean ± 2 standard errors")
    axes[0].fill_between(range(len(mean)), mean - 2 * stderr, mean + 2 * stderr, color="black",
                         alpha=0.2)
    axes[0].set(title="1. RoPE: no decay with distance in expectation", ylabel="logit")
    for r, peak in found["peaks"].items():
        axes[1].plot(peak, label=f"r = {r}", linewidth=1.2, marker="o", markevery=[int(r)])
    axes[1].set(title="2. RoPE: a key made for distance r is found there", ylabel="logit / |q|²",
                xlabel="distance between query and key (tokens)")
    for name, weights in found["previous"].items():
        color, marker = report.STYLES[name]
        axes[2].plot(found["scales"], weights, label=name, color=color, marker=marker)
    axes[2].set(title="3. The previous one of 32 equal tokens: RoPE can find it, NoPE cannot",
                xlabel="size of the entries of q and k", ylabel="attention weight")
    for panel in axes:
        panel.legend()
    save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Pictures about rotary encodings (need matplotlib).")
    parser.add_argument("what", choices=("idea", "theory"), help="the picture")
    parser.add_argument("--head_dim", type=flags.positive, default=32, help="channels of the head")
    flags.add_flags(parser, GPTConfig, "block_size", "rope_base", "hope_cutoff")
    report.add_output_flags(parser, "the picture")
    args = parser.parse_args(argv)
    args.plot = args.plot or f"{args.what}.png"
    report.check_outputs(args)
    config = GPTConfig(n_embd=args.head_dim, n_head=1, block_size=args.block_size,
                       rope_base=args.rope_base, hope_cutoff=args.hope_cutoff)
    if args.what == "idea":
        draw_idea(config, args.plot)
        return
    found = statements(RoPE(config).theta)
    if args.json:
        report.write_json(args.json, "-m experiments.figures", rounded(
            {"seed": 1, "device": "cpu", **found}, 4))
    draw_statements(found, args.plot)


if __name__ == "__main__":
    flags.run(main)
