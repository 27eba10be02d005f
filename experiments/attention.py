"""
What attention does inside the trained context L and beyond it: the measurements that led to HoPE (arXiv 2410.21216)
and to p-RoPE (arXiv 2410.06205), on any checkpoint.

    python -m experiments.attention out/rope out/hope --json attention.json --plot attention.png
    python -m experiments.attention --json_in attention.json --plot attention.png       the pictures alone

Prints a table per run, and draws

    FILE_distance.png     mean attention weight and mean logit, by distance to the key
    FILE_entropy.png      how widely attention spreads as the text grows, with and without log-n scaling
    FILE_components.png   how far each pair's part of the logit leaves, beyond L, its range from training

A logit is a sum over pairs of channels, S = sum_j S_j + bias with S_j = q_j . R((n - m) theta_j) k_j / sqrt(D).
Queries inside the trained context (its second half, [L/2, L)) are compared with those far beyond it ([T/2, T) of a
window of T tokens). Several checkpoints of one run, which train.py --keep_every leaves, show how training gets there.

Short-window layers count the keys in their window only; the pairs' wavelengths are those of the full layers.

Shapes: H heads, T tokens, D channels per head, P = D/2 pairs, Q queries of a group, N windows.
"""
import math
from contextlib import nullcontext
from pathlib import Path

import torch

from common import flags, report
from common.checkpoint import load_checkpoint, load_model
from common.device import Device, DeviceConfig
from data.loader import add_text_flags, document_windows, text_to_score
from experiments.curves import draw_line, legend_above, token_axis
from experiments.groups import name_of
from model import frequencies, rotate

# --- Inside a layer ---------------------------------------------------------------------------------------------------


def heads(attn, x):
    """x (B, T, C) -> the layer's queries, keys and values (B, H, T, D), before rotation."""
    return [t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, dim=-1)]


@torch.no_grad()
def layer_heads(model, idx):
    """One forward of idx (B, T) -> for each layer q, k and v, before rotation, and its LayerPositions."""
    layers = []

    def keep(attn, args):
        layers.append((*heads(attn, args[0]), args[1]))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def placed(q, k, positions):
    """q and k (B, H, T, D), rotated and scaled as in their layer."""
    if positions.rotary is not None:
        q, k = rotate(q, *positions.rotary), rotate(k, *positions.rotary)
    return (q if positions.query_scale is None else q * positions.query_scale), k


def attention_inputs(model, idx, autocast=nullcontext):
    """One forward of idx (T,) -> for each layer q, k, v (H, T, D), rotated and scaled as in the layer, and its bias.

    The bias is (H, T, T) or (1, T, T), -inf for keys outside a window, or None; its values for keys in the future mean
    nothing. The forward runs under autocast(); what is returned is float32, since sums of many terms need it: in
    bfloat16, 256 + 1 is 256."""
    layers = []
    with autocast():
        found = layer_heads(model, idx[None])
    for q, k, v, positions in found:
        q, k, mask = *placed(q, k, positions), positions.mask
        if mask is not None:  # bool (T, T) or a bias (1, H, T, T)
            mask = torch.where(mask, 0.0, -math.inf)[None] if mask.dtype == torch.bool else mask[0].float()
        layers.append((q[0].float(), k[0].float(), v[0].float(), mask))
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


# --- Statistics -------------------------------------------------------------------------------------------------------


def position_bins(block_size, length):
    """The first tokens of bins for distances and positions: one token wide if small, later 8 bins per octave.

    L is always the start of a bin, so that no bin mixes distances seen in training with others."""
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
    """The mean of Cov(S_j, S) over heads and queries, divided by the mean of Var(S) -> (P,). Both are over the visible
    keys (Q, T) of a query.

    The shares of all pairs add up to 1, less the share of the bias. What is equal for all keys of a query does not
    change attention and is not counted. q (H, Q, D), k (H, T, D), logits S (H, Q, T)."""
    count = visible.sum(-1, keepdim=True)  # (Q, 1)
    S = logits.masked_fill(~visible, 0)
    S = (S - S.sum(-1, keepdim=True) / count).masked_fill(~visible, 0)  # less its mean over the query's keys
    # sum over keys of S_j * S without computing S_j: q_j . (sum over keys of S * k_j)
    covariance = pairs(q * (S @ k) / (count * math.sqrt(q.size(-1)))).sum(-2)  # (H, Q, P)
    variance = (S.square().sum(-1, keepdim=True) / count).mean((0, 1))  # (1,)
    return covariance.mean((0, 1)) / variance.clamp(min=1e-12)


def measure_group(q, k, logits, weights, start, bin_of, n_bins):
    """All statistics of a group of queries, the first at position `start`: name -> tensor, means over heads.

    q (H, Q, D), k (H, T, D), logits and weights (H, Q, T), bin_of (T,): the bin of each distance or position."""
    position = torch.arange(k.size(1), device=k.device)
    distance = position[start:start + q.size(1), None] - position  # (Q, T)
    visible = logits.isfinite().all(0)  # neither in the future nor outside a window
    by_distance, by_key = bin_of[distance[visible]], bin_of.expand_as(visible)[visible]  # (visible,) each
    return {"weight_by_distance": binned_mean(weights.mean(0)[visible], by_distance, n_bins),
            "weight_by_key": binned_mean(weights.mean(0)[visible], by_key, n_bins),
            "logit_by_distance": binned_mean(logits.mean(0)[visible], by_distance, n_bins),
            "pair_by_distance": binned_mean(mean_pair_logits(q, k)[:, visible], by_distance, n_bins),
            "pair_share": pair_share(q, k, logits, visible)}


def measure_layer(q, k, v, bias, block_size, starts):
    """All statistics of one layer in one window: name -> tensor. Means are over heads and queries.

    entropy       of attention in nats, by position of the query (bins,)
    norm/q, k, v  2-norm of each pair, mean over tokens and heads (P,), as in a figure of arXiv 2410.06205
    and for each group of queries, such as inside/weight_by_distance:
    weight_by_distance, weight_by_key, logit_by_distance (bins,)
    pair_by_distance   S_j (P, bins)
    pair_share         see pair_share (P,)"""
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


def pair_excursion(curves, starts, block_size):
    """How far a pair's mean logit S_j by distance (..., P, bins) leaves, at distances above L, the range of its values
    at distances up to L, which is what the layers were trained on -> (..., P), in logits.

    Distances above T/2, which not all queries have, are left out; T has to be above 2 L. nan, for distances outside a
    window, is ignored."""
    starts = torch.tensor(starts)
    known, new = curves[..., starts < block_size], curves[..., (starts >= block_size) & (starts <= starts[-1] / 2)]
    low = known.nan_to_num(math.inf).amin(-1, keepdim=True)
    high = known.nan_to_num(-math.inf).amax(-1, keepdim=True)
    return ((new - high).clamp(min=0) + (low - new).clamp(min=0)).nan_to_num().amax(-1)


def analyze(checkpoint, windows, device):
    """A loaded checkpoint and windows (N, T), T at least its L -> its run, as the JSON holds it."""
    config = checkpoint["config"]
    L, head_dim = config["block_size"], config["n_embd"] // config["n_head"]
    if head_dim % 2:
        raise ValueError(f"a head has {head_dim} channels, an odd number, which cannot be analysed in pairs")
    model, scaled = (load_model(checkpoint, attn_scaling=how).to(device.torch_device) for how in ("none", "logn"))
    length = min(windows.size(1), model.transformer.wpe.max_length or windows.size(1))
    starts = position_bins(L, length)
    found = measure(model, windows[:, :length], starts, device.autocast)
    found["entropy_logn"] = measure(scaled, windows[:, :length], starts, device.autocast)["entropy"]
    run = summarize(found)
    for group in query_groups(L, length):
        curves = torch.tensor(run.pop(f"{group}/pair_by_distance")["layers"])  # (layers, P, bins): too much for a file
        if group == "beyond" and length > 2 * L:
            run["beyond/pair_excursion"] = {"layers": pair_excursion(curves, starts, L).tolist()}
    rotated = {}  # pairs, by the kind of a layer
    for kind in sorted(set(model.config.kinds())):
        rotary = model.encodings[kind].rotary(torch.zeros(1, device=device.torch_device))
        rotated[kind] = 0 if rotary is None else rotary[0].size(-1)
    return {"pe": config["pe"], "layers": name_of(model.config), "block_size": L, "length": length,
            "iter": checkpoint["iter"], "seed": checkpoint.get("args", {}).get("seed"), "windows": len(windows),
            "starts": starts, "wavelength": (2 * math.pi / frequencies(head_dim, model.config.rope_base)).tolist(),
            "rotated": rotated, **run}


# --- Table ------------------------------------------------------------------------------------------------------------


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
    names = {"L": "full layers", "S": "short-window layers"}
    kinds = ", ".join(f"{n} in {names[kind]}" if len(run["rotated"]) > 1 else f"{n}"
                      for kind, n in run["rotated"].items())
    report.print_table(f"{run['name']}: {run['layers']} after {run['iter']:,} steps, L = {L}. Of "
                       f"{len(run['wavelength'])} pairs per head are rotated: {kinds}. By position of the query:",
                       ["entropy (nats)", "with log-n", "ln n", "weight of first 4 keys", f"of nearest {n_near}",
                        "pairs with the largest share"], rows)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def grid(rows, columns, height):
    """An empty picture -> figure, axes (rows, columns). height: inches per row."""
    return report.import_pyplot().subplots(rows, columns, figsize=(9.5, height * rows + 0.7), squeeze=False,
                                           layout="constrained")


def curve(run, values, errors=None):
    """Values by bin -> rows for draw_line. at: the middle of the bin, plus 1, to have 0 on a logarithmic axis."""
    edges = [*run["starts"], run["length"]]
    return [{"at": (start + end - 1) / 2 + 1, "mean": value, "stderr": error}
            for start, end, value, error in zip(edges, edges[1:], values, errors or values)]


def draw_layers(panel, run, layers):
    """One thin line per layer, light to dark."""
    for i, layer in enumerate(layers):
        shade = str(0.8 - 0.5 * i / max(1, len(layers) - 1))
        draw_line(panel, curve(run, layer), "at", "mean", color=shade, linewidth=1, label=f"layer {i + 1}")


def draw_mean(panel, run, found, **style):
    """The mean over layers, with a band of one standard error over windows."""
    draw_line(panel, curve(run, found["mean"], found["stderr"]), "at", "mean", "stderr", linewidth=2, **style)


def octaves(run):
    """Ticks for distances and positions."""
    return [2 ** i for i in range(0, int(math.log2(run["length"])) + 1, 2)]


def plot_distance(runs, path):
    """Attention weight and logit, one row per run. Solid: queries in the second half of L; dashed: of the window."""
    figure, axes = grid(len(runs), 2, 2.5)
    for run, style, row in zip(runs, report.styles(runs), axes):
        for panel, what in zip(row, ("weight", "logit")):
            for group, line in (("inside", "-"), ("beyond", "--")):
                found = run.get(f"{group}/{what}_by_distance")
                if found and group == "inside":
                    draw_layers(panel, run, found["layers"])
                if found:
                    draw_mean(panel, run, found, color=style["color"], linestyle=line,
                              label=f"mean, queries {group} L")
            token_axis(panel, run["block_size"] + 0.5, octaves(run))
            panel.set(title=run["name"], ylabel={"weight": "mean attention weight", "logit": "mean logit"}[what],
                      xlabel="1 + distance to the key (tokens)" if run is runs[-1] else "")
        row[0].set_yscale("log")
        row[0].set_ylim(bottom=1e-4)
    legend_above(figure, axes[0, 0])
    report.save_picture(figure, path)


def plot_entropy(runs, path):
    figure, axes = grid(1, len(runs), 3.4)
    for run, style, panel in zip(runs, report.styles(runs), axes[0]):
        draw_layers(panel, run, run["entropy"]["layers"])
        for name, line, label in (("entropy", "-", "mean"), ("entropy_logn", "--", "mean with log-n scaling")):
            draw_mean(panel, run, run[name], color=style["color"], linestyle=line, label=label)
        at = [row["at"] for row in curve(run, run["starts"])]
        panel.plot(at, [math.log(n) for n in at], color="gray", linestyle="-.", label="ln n: uniform attention")
        token_axis(panel, run["block_size"] + 0.5, octaves(run))
        panel.set_xlabel("1 + position of the query (tokens)" if run is runs[len(runs) // 2] else "")
        panel.set_title(run["name"], fontsize="small")
    axes[0, 0].set_ylabel("entropy of attention (nats)")
    legend_above(figure, axes[0, 0])
    report.save_picture(figure, path)


def plot_components(runs, path):
    """pair_excursion by layer and pair, a map per run, all on one scale. The red line is HoPE's cut-off: pairs to its
    right take more than L tokens per turn."""
    runs = [run for run in runs if "beyond/pair_excursion" in run]  # not of an encoding that ends at L, nor at 2 L
    if not runs:
        print(f"{path} is not drawn: no run has distances beyond L; use a higher --max_factor")
        return
    figure, axes = grid(1, len(runs), 2.6)
    maps = [run["beyond/pair_excursion"]["layers"] for run in runs]
    highest = max(value for layers in maps for layer in layers for value in layer)
    for run, layers, panel in zip(runs, maps, axes[0]):
        image = panel.imshow(layers, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        panel.grid(False)
        n_pairs, rotated = len(run["wavelength"]), max(run["rotated"].values())
        shown = range(0, n_pairs, max(1, n_pairs * len(runs) // 24))
        panel.set_xticks(shown, [f"{run['wavelength'][j]:,.0f}" if j < rotated else "–" for j in shown], rotation=90)
        panel.set_yticks(range(len(layers)), range(1, len(layers) + 1))
        panel.axvline(sum(tokens <= run["block_size"] for tokens in run["wavelength"]) - 0.5, color="red")
        panel.set_title(run["name"], fontsize="small")
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="excursion of $S_j$\nbeyond L (logits)")
    figure.supxlabel("tokens per turn of the pair (–: not rotated)", fontsize="medium")
    report.save_picture(figure, path)


DRAWINGS = {"distance": plot_distance, "entropy": plot_entropy, "components": plot_components}


def draw(runs, path):
    """Runs, as the JSON holds them -> FILE_distance.png and the others, for path FILE.png."""
    path = Path(path)
    for name, plot in DRAWINGS.items():
        plot(runs, path.with_name(f"{path.stem}_{name}{path.suffix}"))


def analyze_all(args):
    """-> the result, as the JSON holds it."""
    device, names = Device(args), report.run_names(args.runs)
    checkpoints = [load_checkpoint(path) for path in args.runs]
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text, args.meta)
    lengths = [args.max_factor * checkpoint["config"]["block_size"] for checkpoint in checkpoints]
    windows = document_windows(ids, tokenizer.end_of_document, max(lengths), args.windows)
    windows = windows[:, :-1].to(device.torch_device)
    print(f"reading {len(windows)} windows of {args.max_factor} L, {max(lengths):,} tokens, each inside one document "
          f"of {source} (sha256 {text_sha256[:16]}), on {device}")
    runs = []
    for name, checkpoint, length in zip(names, checkpoints, lengths):
        runs.append({"name": name, **analyze(checkpoint, windows[:, :length], device)})
        print_summary(runs[-1])
    return {"device": str(device), "dataset_sha256": text_sha256, "runs": runs}


def main(argv=None):
    parser = flags.ArgumentParser("Analyse the attention of runs, inside the trained context and beyond it.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("runs", nargs="*", metavar="OUT_DIR", help="runs' folders (best.pt is read, if there is one) or checkpoints")
    add("--json_in", metavar="FILE", help="measure nothing: draw with --plot what --json wrote")
    add_text_flags(parser)
    add("--max_factor", type=count, default=4,
        help="length of a run's windows in multiples of its block_size; memory grows with its square")
    add("--windows", type=count, default=8, help="windows to average over")
    report.add_output_flags(parser, f"a picture FILE_NAME.png for NAME in {', '.join(DRAWINGS)}")
    flags.add_flags(parser, DeviceConfig)
    args = parser.parse_args(argv)
    report.check_outputs(args)
    if bool(args.runs) == bool(args.json_in):
        raise ValueError("name OUT_DIR..., the folders of runs, or --json_in FILE")
    if args.json_in and not args.plot:
        raise ValueError("--json_in measures nothing: name a picture with --plot")
    result = analyze_all(args) if args.runs else {"runs": report.read_json(
        args.json_in, "runs", ["inside/pair_share"], "experiments.attention --json")["runs"]}
    if args.json:
        report.write_json(args.json, "-m experiments.attention", result, digits=4)
    if args.plot:
        draw(result["runs"], args.plot)


if __name__ == "__main__":
    flags.run(main)
