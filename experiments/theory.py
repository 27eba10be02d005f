"""
Statements about a single attention head, shown by construction (1 to 3: Round and Round We Go!, arXiv 2410.06205):

    python -m experiments.theory --json theory.json --plot theory.png

1. RoPE does not make attention decay with distance. For Gaussian queries and keys the expected logit is 0 at every
   distance. It decays if query and key are equal, for example vectors of ones.
2. A head can attend to any single distance r: with k = R^r q the logit is largest there.
3. A head without positions gives equal tokens equal weights, so it cannot find the previous token in a run of equal
   tokens. A head with rotation can.
4. RoPE's base bounds the context in which a head prefers keys similar to its query (Base of RoPE Bounds Context Length,
   arXiv 2405.14591). It does at distance m if sum_j cos(m theta_j) >= 0: the smallest base for which this holds at all
   m <= L grows with L.

Shapes: D channels of the head, K = D / 2 rotated pairs, N queries or samples.
"""
import math

import torch

from common import flags
from common.report import STYLES, add_output_flags, check_outputs, import_pyplot, save_picture, write_json
from model import GPTConfig, RoPE, rotate


def rotation(theta, positions):
    """Frequencies theta (K,) and positions (T,) -> cos, sin (T, K), as model.rotate takes them."""
    angle = positions[:, None] * theta
    return angle.cos(), angle.sin()


def logits_by_distance(q, k, theta, n_distances):
    """Queries and keys (N, D) -> q . R(-r theta) k for keys r = 0, 1, ... tokens before the query (N, distances)."""
    keys = rotate(k[:, None, None].expand(-1, 1, n_distances, -1), *rotation(theta, -torch.arange(n_distances)))
    return (q[:, None] * keys[:, 0]).sum(-1)  # (N, distances)


def gaussian_logits(theta, n_distances, n_samples, seed):
    """Independent Gaussian q and k -> logits / sqrt(D) (N, distances): mean 0, standard deviation 1 at any distance."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n_samples, 2 * len(theta), generator=generator)
    return logits_by_distance(q, k, theta, n_distances) / math.sqrt(2 * len(theta))


def key_that_peaks_at(q, theta, distance):
    """k = R^r q: q (N, D) rotated forward by r = distance tokens, which the distance to a query undoes.

    At that distance each pair adds |q_j|^2, its largest possible value.
    """
    return rotate(q[:, None, None], *rotation(theta, torch.tensor([distance])))[:, 0, 0]


def attention_in_a_run(theta, length, scale, distance=1):
    """The weights of the last of `length` equal tokens on all of them, by distance (length,).

    The query is all ones times scale, and the key is the one that peaks at distance. theta of zeros is NoPE.
    """
    q = scale * torch.ones(1, 2 * len(theta))
    k = key_that_peaks_at(q, theta, distance)
    return (logits_by_distance(q, k, theta, length)[0] / math.sqrt(2 * len(theta))).softmax(-1)


def smallest_base(length, n_pairs):
    """-> the smallest base, in steps of 1 %, with sum_j cos(m theta_j) >= 0 at all distances m <= length."""
    distance, j = torch.arange(length + 1, dtype=torch.float64)[:, None], torch.arange(n_pairs, dtype=torch.float64)
    base = 1.0
    while (distance * base ** (-j / n_pairs)).cos().sum(1).min() < 0:
        base *= 1.01
    return base


def compute(theta, n_distances, n_samples, seed):
    """-> the statements in numbers, as the JSON holds them."""
    random = gaussian_logits(theta, n_distances, n_samples, seed)  # (N, distances)
    ones = torch.ones(1, 2 * len(theta))
    q = torch.randn(1, 2 * len(theta), generator=torch.Generator().manual_seed(seed))
    peaks = {r: logits_by_distance(q, key_that_peaks_at(q, theta, r), theta, n_distances)[0] / q.square().sum()
             for r in (0, 10, 50, 200) if r < n_distances}
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


def draw(found, path):
    pyplot = import_pyplot()
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
        color, marker = STYLES[name]
        axes[2].plot(found["scales"], weights, label=name, color=color, marker=marker)
    axes[2].set(title="3. The previous one of 32 equal tokens: RoPE can find it, NoPE cannot",
                xlabel="size of the entries of q and k", ylabel="attention weight")
    for panel in axes:
        panel.legend()
    save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Statements about a single attention head, shown by construction.")
    add, parsed = parser.add_argument, flags.parsed
    add("--head_dim", type=parsed(int, at_least=2), default=64, help="channels of the head")
    add("--distances", type=parsed(int, at_least=1), default=256, help="longest distance in tokens")
    add("--samples", type=parsed(int, at_least=2), default=2000, help="number of Gaussian queries and keys")
    add("--seed", type=parsed(int, at_least=0), default=1, help="determines them")
    add_output_flags(parser, "the first three statements")
    args = parser.parse_args(argv)
    check_outputs(args)
    theta = RoPE(GPTConfig(pe="rope", n_embd=args.head_dim, n_head=1)).theta  # (K,)
    found = compute(theta, args.distances, args.samples, args.seed)
    print_statements(found)
    if args.json:
        write_json(args.json, "-m experiments.theory", {"seed": args.seed, "device": "cpu", **found}, digits=4)
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    flags.run(main)
