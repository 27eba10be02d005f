"""
Pictures about encodings alone, that need no training or just a trained model:

    python -m experiments.figures idea --plot idea.png                            the angles of a pair within L
    python -m experiments.figures encodings out/rope out/alibi --plot logit.png   what is added to the logit
    python -m experiments.figures theory --json theory.json --plot theory.png     statements about a single head

idea: a circle per pair, RoPE above HoPE (arXiv 2410.21216). Filled: the angles at distances up to L. Hatched: the rest,
which RoPE enters beyond L. The pairs that HoPE does not rotate stay at angle 0.

encodings: one panel per run, or one per kind of layer if these differ, from its checkpoint: the bias itself, one line
per head; of a rotary encoding the logit of a query and a key of all ones, 2 / sqrt(D) sum_j cos(distance theta_j); of
what is added to the embeddings the dot product at two positions, over the mean square, averaged over positions.

theory: statements about a single head, shown by construction (1 to 3: Round and Round We Go!, arXiv 2410.06205):
1. RoPE does not make attention decay with distance. For Gaussian queries and keys the expected logit is 0 at every
   distance. It decays if query and key are equal, for example vectors of ones.
2. A head can attend to any single distance r: with k = R^r q the logit is largest there.
3. A head without positions gives equal tokens equal weights, so it cannot find the previous token in a run of equal
   tokens. A head with rotation can.
4. RoPE's base bounds the context in which a head prefers keys similar to its query (Base of RoPE Bounds Context Length,
   arXiv 2405.14591). It does at distance m if sum_j cos(m theta_j) >= 0: the smallest base for which this holds at all
   m <= L grows with L.

Shapes: D channels of a head, P = D / 2 pairs, K of them rotated, N queries or samples.
"""
import math

import torch
from torch.nn import functional as F

from common import flags, report
from common.checkpoint import load_model
from model import GPTConfig, HoPE, RoPE, rotate

# --- The idea ---------------------------------------------------------------------------------------------------------

TITLES = {"rope": "RoPE: beyond L tokens, slow pairs enter angles never seen in training",
          "hope": "HoPE: rotates only the pairs that have seen the whole circle"}


def draw_pair(panel, theta, L, color):
    """The circle of a pair that rotates by theta radians per token (0: it does not). Angle 0 is at the top."""
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
        panel.add_patch(Wedge((0, 0), 1, 90, 450 - seen, facecolor="white", edgecolor="gray", hatch="////"))
    else:
        panel.text(0, 0, f"{turns:.0f}\nturns", ha="center", va="center", color="white")
    panel.text(0, -1.2, f"{2 * math.pi / theta:,.0f}", ha="center", va="top")


def draw_idea(config, path):
    """At most eight pairs of a head of a GPTConfig."""
    figure = report.import_pyplot().figure(figsize=(9.5, 4.6), layout="constrained")
    from matplotlib.patches import Patch

    L, rope, hope = config.block_size, RoPE(config).theta, HoPE(config).theta
    encodings = {"rope": rope, "hope": F.pad(hope, (0, len(rope) - len(hope)))}  # (P,), 0: not rotated
    for part, (name, theta) in zip(figure.subfigures(2, 1), encodings.items()):
        shown, color = theta[::max(1, len(theta) // 8)][:8].tolist(), report.STYLES[name][0]
        part.suptitle(TITLES[name], fontsize=13, fontweight="bold", color=color)
        for panel, frequency in zip(part.subplots(1, len(shown), squeeze=False)[0], shown):
            draw_pair(panel, frequency, L, color)
        part.supxlabel("tokens per turn" if name == "rope" else "", fontsize="medium")
    title = "One circle per pair of channels: its angles, clockwise from the top, at distances of 0 to L tokens"
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title=title, handles=[
        Patch(facecolor="dimgray", label=f"angles seen within the trained context, L = {L} tokens"),
        Patch(facecolor="white", edgecolor="gray", hatch="////", label="never seen in training")])
    report.save_picture(figure, path)


# --- What encodings add to the logit ----------------------------------------------------------------------------------


def encoding_by_distance(pe, config, length):
    """An encoding -> what it adds, and that at distances 0 ... length - 1 (lines, length), nan if undefined."""
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


@torch.no_grad()
def logit_by_distance(model, length, kind="L"):
    """The same for a model's full (L) or short-window layers (S), nan outside the window."""
    name, lines = encoding_by_distance(model.encodings[kind], model.config, length)
    if kind == "S" and model.config.window:
        lines = lines.clone()
        lines[:, model.config.window:] = math.nan
    return name, lines


def kinds_that_differ(model):
    """-> the kinds of a model's layers, "S" and "L", or "L" if all of its layers are the same."""
    config, local = model.config, model.config.local()
    differ = local.window or (local.pe, local.rope_base) != (config.pe, config.rope_base)
    return sorted(set(config.kinds()), reverse=True) if differ else ["L"]


def draw_encodings(models, max_factor, path):
    """One panel per model and kind of layer."""
    panels = [(model, kind) for model in models for kind in kinds_that_differ(model)]
    pes, columns = [model.configs[kind].pe for model, kind in panels], min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = report.import_pyplot().subplots(rows, columns, figsize=(9.5, 2.6 * rows), squeeze=False,
                                                   layout="constrained")
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    for panel, (model, kind), pe, style in zip(axes.flat, panels, pes, report.styles([{"pe": pe} for pe in pes])):
        L = model.config.block_size
        what, lines = logit_by_distance(model, max_factor * L, kind)
        for line in lines:
            panel.plot(line, color=style["color"], linewidth=1.2)
        panel.axvline(L, color="gray", linestyle=":")
        panel.set_xlim(-0.04 * max_factor * L, 1.04 * max_factor * L)
        panel.set_xticks([0, L, max_factor * L], ["0", "L", f"{max_factor} L"])
        where = {"S": ", short windows", "L": ", full layers"}[kind] if len(kinds_that_differ(model)) > 1 else ""
        panel.set_title(f"{pe}{where}\n{what}", fontsize=11)
    figure.supxlabel("distance between query and key (tokens)", fontsize="medium")
    report.save_picture(figure, path)


# --- Statements about a single head -----------------------------------------------------------------------------------


def rotation(theta, positions):
    """Frequencies theta (K,) and positions (T,) -> cos, sin (T, K), as model.rotate takes them."""
    angle = positions[:, None] * theta
    return angle.cos(), angle.sin()


def logits_by_distance(q, k, theta, n_distances):
    """Queries and keys (N, D) -> q . R(-r theta) k for keys r = 0, 1, ... tokens before the query (N, distances)."""
    keys = rotate(k[:, None, None].expand(-1, 1, n_distances, -1), *rotation(theta, -torch.arange(n_distances)))
    return (q[:, None] * keys[:, 0]).sum(-1)  # (N, distances)


def gaussian_logits(theta, n_distances, n_samples, seed=1):
    """Independent Gaussian q and k -> logits / sqrt(D) (N, distances): mean 0, standard deviation 1 at any distance."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n_samples, 2 * len(theta), generator=generator)
    return logits_by_distance(q, k, theta, n_distances) / math.sqrt(2 * len(theta))


def key_that_peaks_at(q, theta, distance):
    """k = R^r q: q (N, D) rotated forward by r = distance tokens, which the distance to a query undoes.

    At that distance each pair adds |q_j|^2, its largest possible value."""
    return rotate(q[:, None, None], *rotation(theta, torch.tensor([distance])))[:, 0, 0]


def attention_in_a_run(theta, length, scale, distance=1):
    """The weights of the last of `length` equal tokens on all of them, by distance (length,).

    The query is all ones times scale, and the key is the one that peaks at distance. theta of zeros is NoPE."""
    q = scale * torch.ones(1, 2 * len(theta))
    k = key_that_peaks_at(q, theta, distance)
    return (logits_by_distance(q, k, theta, length)[0] / math.sqrt(2 * len(theta))).softmax(-1)


def smallest_base(length, n_pairs):
    """-> the smallest base, in steps of 1 %, with sum_j cos(m theta_j) >= 0 at all distances m <= length.

    It is no threshold: with a larger base the sum can be negative again."""
    distance, j = torch.arange(length + 1, dtype=torch.float64)[:, None], torch.arange(n_pairs, dtype=torch.float64)
    base = 1.0
    while (distance * base ** (-j / n_pairs)).cos().sum(1).min() < 0:
        base *= 1.01
    return base


def statements(theta, n_distances=256, n_samples=2000):
    """Frequencies (K,) -> the statements in numbers, as the JSON holds them."""
    random = gaussian_logits(theta, n_distances, n_samples)  # (N, distances)
    ones = torch.ones(1, 2 * len(theta))
    q = torch.randn(1, 2 * len(theta), generator=torch.Generator().manual_seed(1))
    peaks = {r: logits_by_distance(q, key_that_peaks_at(q, theta, r), theta, n_distances)[0] / q.square().sum()
             for r in (0, 10, 50, 200)}
    scales = [0.5 * i for i in range(17)]
    return {"gaussian_mean": random.mean(0).tolist(),
            "gaussian_stderr": (random.std(0) / math.sqrt(n_samples)).tolist(),
            "ones": (logits_by_distance(ones, ones, theta, n_distances)[0] / len(ones[0])).tolist(),
            "peaks": {str(r): peak.tolist() for r, peak in peaks.items()}, "scales": scales,
            "previous": {name: [attention_in_a_run(angles, 32, scale)[1].item() for scale in scales]
                         for name, angles in (("rope", theta), ("nope", 0 * theta))},
            "smallest_base": {str(length): smallest_base(length, len(theta)) for length in (64, 128, 256, 512, 1024)}}


def print_statements(found):
    mean = torch.tensor(found["gaussian_mean"])
    stderr = torch.tensor(found["gaussian_stderr"]).mean()
    previous = {name: max(weights) for name, weights in found["previous"].items()}
    print(f"1. Gaussian q and k: mean logit {mean[:16].mean():+.4f} over the 16 shortest distances, "
          f"{mean[-16:].mean():+.4f} over the 16 longest; standard error at one distance {stderr:.4f}")
    print("2. k = R^r q peaks at distance " + ", ".join(f"{torch.tensor(peak).argmax()} for r = {r}"
                                                        for r, peak in found["peaks"].items()))
    print(f"3. largest weight on the previous of 32 equal tokens: RoPE {previous['rope']:.3f}, "
          f"NoPE {previous['nope']:.3f} = 1/32")
    print("4. smallest base: " + ", ".join(f"{base:,.0f} for L = {int(length):,}"
                                           for length, base in found["smallest_base"].items()))


def draw_statements(found, path):
    """The first three."""
    pyplot = report.import_pyplot()
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 8), layout="constrained")
    mean, stderr = torch.tensor(found["gaussian_mean"]), torch.tensor(found["gaussian_stderr"])
    axes[0].plot(found["ones"], color="gray", linestyle="--", label="q = k = ones")
    axes[0].plot(mean, color="black", label="q, k Gaussian: mean ± 2 standard errors")
    axes[0].fill_between(range(len(mean)), mean - 2 * stderr, mean + 2 * stderr, color="black", alpha=0.2)
    axes[0].set(title="1. RoPE: no decay with distance in expectation", ylabel="logit")
    for i, (r, peak) in enumerate(found["peaks"].items()):
        axes[1].plot(peak, label=f"r = {r}", linewidth=1.2, color=pyplot.cm.viridis(0.3 * i), marker="o",
                     markevery=[int(r)])
    axes[1].set(title="2. RoPE: a key made for distance r is found there", ylabel="logit / |q|²")
    for panel in axes[:2]:
        panel.set_xlabel("distance between query and key (tokens)")
    for name, weights in found["previous"].items():
        color, marker = report.STYLES[name]
        axes[2].plot(found["scales"], weights, label=name, color=color, marker=marker)
    axes[2].set(title="3. The previous one of 32 equal tokens: RoPE can find it, NoPE cannot",
                xlabel="size of the entries of q and k", ylabel="attention weight")
    for panel in axes:
        panel.legend()
    report.save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Pictures about encodings (need matplotlib).")
    add = parser.add_argument
    add("what", choices=("idea", "encodings", "theory"), help="the picture")
    add("runs", nargs="*", metavar="OUT_DIR", help="encodings: runs' folders or checkpoints")
    add("--head_dim", type=flags.parsed(int, at_least=2), default=32, help="idea, theory: channels of the head")
    flags.add_flags(parser, GPTConfig, "block_size", "rope_base", "hope_cutoff")
    add("--max_factor", type=flags.parsed(int, at_least=1), default=4, help="encodings: longest distance, in "
        "multiples of L")
    report.add_output_flags(parser, "the picture")
    args = parser.parse_args(argv)
    args.plot = args.plot or f"{args.what}.png"
    report.check_outputs(args)
    if (args.what == "encodings") != bool(args.runs):
        raise ValueError("encodings needs runs' folders, the other pictures need none")
    if args.json and args.what != "theory":
        raise ValueError("--json: theory alone has numbers to write")
    config = GPTConfig(n_embd=args.head_dim, n_head=1, block_size=args.block_size, rope_base=args.rope_base,
                       hope_cutoff=args.hope_cutoff)
    if args.what == "idea":
        draw_idea(config, args.plot)
    elif args.what == "encodings":
        draw_encodings([load_model(run) for run in args.runs], args.max_factor, args.plot)
    else:
        found = statements(RoPE(config).theta)
        print_statements(found)
        if args.json:
            report.write_json(args.json, "-m experiments.figures", {"seed": 1, "device": "cpu", **found}, digits=4)
        draw_statements(found, args.plot)


if __name__ == "__main__":
    flags.run(main)
