"""
Three statements on what one attention head can do, shown by construction (Round and Round We Go!, arXiv 2410.06205):

    python -m experiments.theory --json theory.json --plot theory.png

1. RoPE does not make attention decay with distance. For queries and keys drawn from a Gaussian the expected logit is
   0 at every distance; decay is seen where query and key are the same, as a vector of ones.
2. A head can look at any distance r, sharply: with k = R^r q the logit is largest there.
3. A head without positions cannot tell two equal tokens apart, so it cannot find the previous token in a run of equal
   ones; with rotation it can.
"""
import math

import torch

import cli
from eval_extrapolation import import_pyplot
from experiments.output import add_output_arguments, check_outputs, save_picture, write_json
from model import rope_frequencies, rotate


def rotation(theta, positions):
    """Angles theta (K,) and positions (T,) -> cos, sin (T, K) as model.rotate takes them."""
    angle = positions[:, None] * theta
    return angle.cos(), angle.sin()


def logits_by_distance(q, k, theta, n_distances):
    """Queries and keys (N, D) -> q . R(-r theta) k for keys r = 0, 1, ... tokens before the query (N, distances)."""
    keys = rotate(k[:, None, None].expand(-1, 1, n_distances, -1), *rotation(theta, -torch.arange(n_distances)))
    return (q[:, None] * keys[:, 0]).sum(-1)                                                 # (N, distances)


def gaussian_logits(theta, n_distances, n_samples, seed):
    """Independent Gaussian q and k -> logits / sqrt(D) (n_samples, distances): mean 0, deviation 1 at any distance."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n_samples, 2 * len(theta), generator=generator)
    return logits_by_distance(q, k, theta, n_distances) / math.sqrt(2 * len(theta))


def key_that_peaks_at(q, theta, distance):
    """k = R^r q: turned forward by r = distance tokens, so that it meets q (N, D) when it stands r tokens earlier.

    There each pair adds |q_j|^2, the most it can.
    """
    return rotate(q[:, None, None], *rotation(theta, torch.tensor([distance])))[:, 0, 0]


def attention_in_a_run(theta, length, scale, distance=1):
    """Weights (length,) of the last of equal tokens on all of them, by distance, in a head built to look back.

    The query is all ones times scale, the key is the one that peaks at distance. theta of zeros is NoPE.
    """
    q = scale * torch.ones(1, 2 * len(theta))
    k = key_that_peaks_at(q, theta, distance)
    return (logits_by_distance(q, k, theta, length)[0] / math.sqrt(2 * len(theta))).softmax(-1)


def main(argv=None):
    parser = cli.ArgumentParser("Three statements on what one attention head can do, shown by construction.")
    count = cli.number(int, 1)
    parser.add_argument("--head_dim", type=cli.number(int, 2), default=64, help="channels of the head")
    parser.add_argument("--distances", type=count, default=256, help="how far back to look, in tokens")
    parser.add_argument("--samples", type=cli.number(int, 2), default=2000, help="Gaussian queries and keys")
    parser.add_argument("--seed", type=cli.number(int, 0), default=1, help="decides them")
    add_output_arguments(parser, "the three statements into this file")
    args = parser.parse_args(argv)
    check_outputs(args)
    theta, n = rope_frequencies(args.head_dim), args.distances                               # (D/2,)

    random = gaussian_logits(theta, n, args.samples, args.seed)                              # (N, n)
    mean, stderr = random.mean(0), random.std(0) / math.sqrt(args.samples)
    ones = torch.ones(1, args.head_dim)
    same = logits_by_distance(ones, ones, theta, n)[0] / args.head_dim                       # (n,)
    q = torch.randn(1, args.head_dim, generator=torch.Generator().manual_seed(args.seed))
    wanted = [distance for distance in (0, 10, 50, 200) if distance < n]
    peaks = {r: logits_by_distance(q, key_that_peaks_at(q, theta, r), theta, n)[0] / q.square().sum() for r in wanted}
    scales = [0.5 * i for i in range(17)]
    previous = {name: [attention_in_a_run(angles, 32, scale)[1].item() for scale in scales]
                for name, angles in (("rope", theta), ("nope", 0 * theta))}

    print(f"1. Gaussian q and k, {args.samples:,} samples: mean logit {mean[:16].mean():+.4f} over the 16 nearest "
          f"distances, {mean[-16:].mean():+.4f} over the 16 farthest; standard error of one {stderr.mean():.4f}")
    print("2. k = R^r q peaks at distance " + ", ".join(f"{peak.argmax()} for r = {r}" for r, peak in peaks.items()))
    print(f"3. weight on the previous of 32 equal tokens, at most: RoPE {max(previous['rope']):.3f}, "
          f"NoPE {max(previous['nope']):.3f} = 1/32")
    if args.json:
        write_json(args.json, "experiments.theory", {
            "seed": args.seed, "device": "cpu", "gaussian_mean": mean.tolist(), "gaussian_stderr": stderr.tolist(),
            "ones": same.tolist(), "peaks": {str(r): peak.tolist() for r, peak in peaks.items()},
            "scales": scales, "previous": previous})
    if args.plot:
        pyplot = import_pyplot()
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        axes[0].plot(same, color="C1", label="q = k = ones")
        axes[0].plot(mean, color="C0", label=f"q, k Gaussian: mean of {args.samples:,}")
        axes[0].fill_between(range(n), mean - 2 * stderr, mean + 2 * stderr, alpha=0.3, label="± 2 standard errors")
        axes[0].set_title("1. no decay in expectation")
        axes[0].set_ylabel("logit")
        for r, peak in peaks.items():
            axes[1].plot(peak, label=f"r = {r}", linewidth=1)
        axes[1].set_title("2. k = R^r q peaks at distance r")
        axes[1].set_ylabel("logit / |q|²")
        for name, weights in previous.items():
            axes[2].plot(scales, weights, label=name)
        axes[2].set_title("3. previous token among 32 equal ones")
        axes[2].set_xlabel("size of the entries of q and k")
        axes[2].set_ylabel("attention weight")
        for panel in axes[:2]:
            panel.set_xlabel("distance (tokens)")
        for panel in axes:
            panel.legend(fontsize=8)
        save_picture(figure, args.plot)


if __name__ == "__main__":
    cli.run(main)
