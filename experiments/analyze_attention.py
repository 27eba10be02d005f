"""
What attention does inside the trained context L and beyond it: the measurements that led to HoPE (arXiv 2410.21216)
and to p-RoPE (arXiv 2410.06205), on any checkpoint.

    python -m experiments.analyze_attention out/rope out/hope --json attention.json --plot attention.png

Prints a table per run. experiments/draw_attention.py describes the pictures.

A logit is a sum over pairs of channels, S = sum_j S_j + bias with S_j = q_j . R((n - m) theta_j) k_j / sqrt(D).
Queries inside the trained context (its second half, [L/2, L)) are compared with those far beyond it ([T/2, T) of a
window of T tokens). Several checkpoints of one run, which train.py --keep_every leaves, show how training gets there.

Layers with a window count the keys in their window only; the pairs' wavelengths are those of the other layers.

Shapes: H heads, T tokens, D channels per head, P = D/2 pairs, Q queries of a group, N windows.
"""
import math
from contextlib import nullcontext

import torch

from common import flags
from common.arrangements import name_of
from common.checkpoint import load_checkpoint, load_model
from common.device import DeviceConfig, Place
from common.report import add_output_flags, check_outputs, print_table, run_names, write_json
from data.loader import add_text_flags, document_windows, text_to_score
from experiments.draw_attention import draw
from model import frequencies, rotate

# --------------------------------------------------------------------------------------------------
# Inside a layer


@torch.no_grad()
def attention_inputs(model, idx, autocast=nullcontext):
    """One forward of idx (T,) -> for each layer q, k, v (H, T, D), rotated and scaled as in the layer, and its bias.

    The bias is (H, T, T) or (1, T, T), -inf for keys outside a window, or None; its values for keys in the future mean
    nothing. The forward runs under autocast(); what is returned is float32, since sums of many terms need it: in
    bfloat16, 256 + 1 is 256.
    """
    layers = []

    def keep(attn, args):
        x, view = args[:2]
        q, k, v = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, dim=-1))
        if view.rotary is not None:
            q, k = rotate(q, *view.rotary), rotate(k, *view.rotary)
        if view.query_scale is not None:
            q = q * view.query_scale
        mask = view.mask
        if mask is not None:  # bool (T, T) or a bias (1, H, T, T)
            mask = torch.where(mask, 0.0, -math.inf)[None] if mask.dtype == torch.bool else mask[0].float()
        layers.append((q[0].float(), k[0].float(), v[0].float(), mask))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
        with autocast():
            model(idx[None])
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def pairs(x):
    """Channels (..., D) -> the two coordinates of each pair (..., 2, P): pair j is channels (j, j + D/2)."""
    return x.unflatten(-1, (2, -1))


def pair_logits(q, k):
    """Queries (Q, D) and keys (T, D) -> S_j, what each pair adds to the logit (P, Q, T)."""
    return torch.einsum("qcp,kcp->pqk", pairs(q), pairs(k)) / math.sqrt(q.size(-1))


def mean_pair_logits(q, k):
    """Queries (H, Q, D) and keys (H, T, D) -> the mean of S_j over heads (P, Q, T)."""
    # the sum over heads of q . k is one product of the heads laid side by side
    wide_q, wide_k = (pairs(x).permute(1, 2, 0, 3).flatten(1, 2) for x in (q, k))  # (Q, 2H, P), (T, 2H, P)
    return torch.einsum("qcp,kcp->pqk", wide_q, wide_k) / (len(q) * math.sqrt(q.size(-1)))


def logits_of(q, k, bias):
    """-> logits (H, T, T), -inf for keys in the future."""
    logits = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    if bias is not None:
        logits = logits + bias
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(future, -math.inf)


# --------------------------------------------------------------------------------------------------
# Statistics


def position_bins(block_size, length):
    """The first tokens of bins for distances and positions: one token wide if small, later 8 bins per octave.

    L is always the start of a bin, so that no bin mixes distances seen in training with others.
    """
    octaves = range(-8 * math.ceil(math.log2(block_size)), 8 * math.ceil(math.log2(length / block_size)) + 1)
    return [0, *sorted(start for start in {round(block_size * 2 ** (n / 8)) for n in octaves} if 0 < start < length)]


def binned_mean(values, index, n_bins):
    """Values (..., N) and the bin of each (N,) -> the mean of each bin (..., n_bins), nan if a bin is empty."""
    total = values.new_zeros(*values.shape[:-1], n_bins).index_add_(-1, index, values)
    return total / torch.bincount(index, minlength=n_bins)


def query_groups(block_size, length):
    """Name -> first and last + 1 of its queries, which all have about the same number of keys."""
    groups = {"inside": (block_size // 2, min(block_size, length)), "beyond": (length // 2, length)}
    return groups if length >= 2 * block_size else {"inside": groups["inside"]}


def pair_share(q, k, logits, visible):
    """Cov(S_j, S) / Var(S) over the visible keys (Q, T) of a query, averaged over heads and queries -> (P,).

    The shares of all pairs add up to 1, less the share of the bias. What is equal for all keys of a query does not
    change attention and is not counted. q (H, Q, D), k (H, T, D), logits S (H, Q, T).
    """
    count = visible.sum(-1, keepdim=True)  # (Q, 1)
    S = logits.masked_fill(~visible, 0)
    S = (S - S.sum(-1, keepdim=True) / count).masked_fill(~visible, 0)  # less its mean over the query's keys
    # sum over keys of S_j * S without computing S_j: q_j . (sum over keys of S * k_j)
    covariance = pairs(q * (S @ k) / (count * math.sqrt(q.size(-1)))).sum(-2)  # (H, Q, P)
    variance = (S.square().sum(-1, keepdim=True) / count).mean((0, 1))  # (1,)
    return covariance.mean((0, 1)) / variance.clamp(min=1e-12)


def measure_group(q, k, logits, weights, start, bin_of, n_bins):
    """All statistics of a group of queries, the first at position `start`: name -> tensor, means over heads.

    q (H, Q, D), k (H, T, D), logits and weights (H, Q, T), bin_of (T,): the bin of each distance or position.
    """
    position = torch.arange(k.size(1), device=k.device)
    distance = position[start:start + q.size(1), None] - position  # (Q, T)
    visible = logits.isfinite().all(0)  # neither in the future nor outside a window
    bins = {"distance": bin_of[distance[visible]], "key": bin_of.expand_as(visible)[visible]}  # (visible,) each
    found = {"pair_by_distance": binned_mean(mean_pair_logits(q, k)[:, visible], bins["distance"], n_bins),
             "pair_share": pair_share(q, k, logits, visible)}
    for name, x in (("weight", weights), ("logit", logits)):
        mean = x.mean(0)[visible]
        for what, index in bins.items():
            found[f"{name}_by_{what}"] = binned_mean(mean, index, n_bins)
    return found


def measure_layer(q, k, v, bias, block_size, starts):
    """All statistics of one layer in one window: name -> tensor. Means are over heads and queries.

    entropy       of attention in nats, by position of the query (bins,)
    norm/q, k, v  2-norm of each pair, mean over tokens and heads (P,), as in a figure of arXiv 2410.06205
    and for each group of queries, such as inside/weight_by_distance:
    weight_by_distance, weight_by_key, logit_by_distance, logit_by_key (bins,)
    pair_by_distance   S_j (P, bins)
    pair_share         see pair_share (P,)
    """
    T, n_bins = q.size(1), len(starts)
    position = torch.arange(T, device=q.device)
    bin_of = torch.bucketize(position, torch.tensor(starts, device=q.device), right=True) - 1  # (T,)
    logits = logits_of(q, k, bias)  # (H, T, T)
    weights = logits.softmax(-1)
    found = {"entropy": binned_mean(torch.special.entr(weights).sum(-1).mean(0), bin_of, n_bins)}
    for name, x in (("q", q), ("k", k), ("v", v)):
        found[f"norm/{name}"] = pairs(x[:, :block_size]).norm(dim=-2).mean((0, 1))
    for group, (start, end) in query_groups(block_size, T).items():
        rows = slice(start, end)
        stats = measure_group(q[:, rows], k, logits[:, rows], weights[:, rows], start, bin_of, n_bins)
        found |= {f"{group}/{name}": value for name, value in stats.items()}
    return found


def measure(model, windows, starts, autocast=nullcontext):
    """Windows (N, T) -> name -> statistics of each window and layer (N, layers, ...). autocast: for the forward."""
    rows = []
    for window in windows:
        layers = [measure_layer(*layer, model.config.block_size, starts)
                  for layer in attention_inputs(model, window, autocast)]
        rows.append({name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def summarize(found):
    """Each statistic: its mean in each layer, its mean over layers, and the standard error of that over windows."""
    summary = {}
    for name, x in found.items():  # (N, layers, ...)
        overall = x.nanmean(1)  # a layer with a window has no mean for the distances beyond it
        stderr = overall.std(0) / math.sqrt(len(x)) if len(x) > 1 else torch.full_like(overall[0], math.nan)
        summary[name] = {"layers": x.mean(0).tolist(), "mean": overall.mean(0).tolist(), "stderr": stderr.tolist()}
    return summary


def pair_swing(curves, starts, block_size, beyond):
    """How much a pair's mean logit depends on distance: S_j by distance (..., P, bins) -> (..., P), in logits.

    Inside: its standard deviation over the distances up to L (over bins, so that short distances count more).
    Beyond: how far it leaves, at distances above L, the range of its values at distances up to L, which is what the
    layers were trained on. Distances above T/2, which not all queries have, are left out; T has to be above 2 L.
    nan, for distances outside a window, is ignored.
    """
    starts = torch.tensor(starts)
    known = curves[..., starts < block_size]
    if not beyond:
        count = (~known.isnan()).sum(-1)
        return ((known - known.nanmean(-1, keepdim=True)).square().nansum(-1) / (count - 1).clamp(min=1)).sqrt()
    new = curves[..., (starts >= block_size) & (starts <= starts[-1] / 2)]
    low = known.nan_to_num(math.inf).amin(-1, keepdim=True)
    high = known.nan_to_num(-math.inf).amax(-1, keepdim=True)
    return ((new - high).clamp(min=0) + (low - new).clamp(min=0)).nan_to_num().amax(-1)


def analyze(checkpoint, windows, place):
    """A loaded checkpoint and windows (N, T), T at least its L -> its run, as the JSON holds it."""
    config = checkpoint["config"]
    L, head_dim = config["block_size"], config["n_embd"] // config["n_head"]
    if head_dim % 2:
        raise ValueError(f"a head has {head_dim} channels, an odd number, which cannot be analysed in pairs")
    model, scaled = (load_model(checkpoint, attn_scaling=how).to(place.device) for how in ("none", "logn"))
    length = min(windows.size(1), model.transformer.wpe.max_length or windows.size(1))
    starts = position_bins(L, length)
    found = measure(model, windows[:, :length], starts, place.autocast)
    found["entropy_logn"] = measure(scaled, windows[:, :length], starts, place.autocast)["entropy"]
    run, kinds = summarize(found), model.config.kinds()
    first = kinds.index("L")  # the last layer is one
    for group in query_groups(L, length):
        curves = torch.tensor(run[f"{group}/pair_by_distance"]["layers"])  # (layers, P, bins)
        # of the first layer that sees everything: all layers would be most of the file
        run[f"{group}/pair_by_distance"] = {"first_layer": curves[first].tolist()}
        if group == "inside" or length > 2 * L:
            run[f"{group}/pair_swing"] = {"layers": pair_swing(curves, starts, L, group == "beyond").tolist()}
    rotated = {}  # pairs, by the kind of a layer
    for kind in sorted(set(kinds)):
        rotary = model.encodings[kind].rotary(torch.zeros(1, device=place.device))
        rotated[kind] = 0 if rotary is None else rotary[0].size(-1)
    return {"pe": config["pe"], "layers": name_of(model.config), "block_size": L, "length": length,
            "iter": checkpoint["iter"], "seed": checkpoint.get("args", {}).get("seed"), "windows": len(windows),
            "starts": starts, "wavelength": (2 * math.pi / frequencies(head_dim, model.config.rope_base)).tolist(),
            "n_turning": rotated["L"], "rotated": rotated, **run}


# --------------------------------------------------------------------------------------------------
# Report


def part_of(run, values, start, end):
    """Mean of the bins (..., bins) that start in [start, end), weighted by their width -> (...)."""
    edges = torch.tensor([*run["starts"], run["length"]], dtype=torch.float)
    width = torch.where((edges[:-1] >= start) & (edges[:-1] < end), edges.diff(), 0.0)  # (bins,)
    values = torch.tensor(values)
    width = torch.where(values.isnan(), 0, width)
    return (values.nan_to_num() * width).sum(-1) / width.sum(-1)


def print_summary(run):
    L, n_near, rows = run["block_size"], min(16, run["block_size"] // 2), {}
    for group, (start, end) in query_groups(L, run["length"]).items():
        ln_n = torch.log(torch.arange(start, end) + 1.0).mean()
        by_key, by_distance = (run[f"{group}/weight_by_{what}"]["layers"] for what in ("key", "distance"))
        for layer, share in enumerate(run[f"{group}/pair_share"]["layers"]):
            entropy, scaled = (part_of(run, run[name]["layers"][layer], start, end)
                               for name in ("entropy", "entropy_logn"))
            first = 4 * part_of(run, by_key[layer], 0, 4)
            top = torch.tensor(share).topk(min(3, len(share))).indices.tolist()
            rows[f"[{start:,}, {end:,}), layer {layer + 1}"] = [
                f"{entropy:.2f}", f"{scaled:.2f}", f"{ln_n:.2f}",
                "-" if first.isnan() else f"{first:.3f}",  # outside the windows of all queries
                f"{n_near * part_of(run, by_distance[layer], 0, n_near):.3f}",
                ", ".join(f"{j} ({share[j]:.0%})" for j in top)]
    kinds = ", ".join(f"{n} in {kind} layers" if len(run["rotated"]) > 1 else f"{n}"
                      for kind, n in run["rotated"].items())
    print_table(f"{run['name']}: {run['layers']} after {run['iter']:,} steps, L = {L}. Of {len(run['wavelength'])} "
                f"pairs per head are rotated: {kinds}. By position of the query:",
                ["entropy (nats)", "with log-n", "ln n", "weight of first 4 keys", f"of nearest {n_near}",
                 "pairs with the largest share"], rows)


def main(argv=None):
    parser = flags.ArgumentParser("Analyse the attention of runs, inside the trained context and beyond it.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders (best.pt is read, if there is one) or checkpoints")
    add_text_flags(parser)
    add("--max_factor", type=count, default=4,
        help="length of a run's windows in multiples of its block_size; memory grows with its square")
    add("--windows", type=count, default=8, help="windows to average over")
    add_output_flags(parser, "five pictures, FILE_distance.png, FILE_key.png, FILE_components.png, "
                             "FILE_frequency.png and FILE_entropy.png")
    flags.add_flags(parser, DeviceConfig)
    args = parser.parse_args(argv)
    check_outputs(args)
    place, names = Place(args), run_names(args.runs)

    checkpoints = [load_checkpoint(path) for path in args.runs]
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text, args.meta)
    lengths = [args.max_factor * checkpoint["config"]["block_size"] for checkpoint in checkpoints]
    windows = document_windows(ids, tokenizer.end_of_document, max(lengths), args.windows)[:, :-1].to(place.device)
    print(f"reading {len(windows)} windows of {args.max_factor} L, {max(lengths):,} tokens, each inside one document "
          f"of {source} (sha256 {text_sha256[:16]}), on {place}")
    runs = []
    for name, checkpoint, length in zip(names, checkpoints, lengths):
        runs.append({"name": name, **analyze(checkpoint, windows[:, :length], place)})
        print_summary(runs[-1])
    if args.json:
        write_json(args.json, "-m experiments.analyze_attention",
                   {"device": str(place), "dataset_sha256": text_sha256, "runs": runs}, digits=4)
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    flags.run(main)
