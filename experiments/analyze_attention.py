"""
What attention does inside the trained context and beyond it, seen from inside: the measurements that led to HoPE
(arXiv 2410.21216) and to p-RoPE (arXiv 2410.06205), on any checkpoint.

    python -m experiments.analyze_attention out/rope out/hope --json attention.json --plot attention.png

    FILE_distance.png     mean attention weight and mean logit, by distance and by position of the key
    FILE_components.png   the logit taken apart into its pairs of channels: what each adds, and what it does past L
    FILE_frequency.png    how much of queries and keys lies in which pair; values, which are never turned, as control
    FILE_entropy.png      over how many keys attention spreads as the text grows, with and without log-n scaling

A logit is a sum over pairs of channels, S = sum_j S_j + bias, S_j = q_j . R((n - m) theta_j) k_j / sqrt(D). What the
queries inside the trained context do (its second half, [L/2, L)) is set beside those far beyond ([T/2, T) of a window
of T tokens). Several checkpoints of one run, as train.py --keep_every leaves them, show how it came about.

Shapes: H heads, T tokens, D channels of a head, P = D/2 pairs, Q queries of a group, N windows.
"""
import math
from pathlib import Path

import torch

import cli
from eval_extrapolation import choose_text, document_windows, import_pyplot
from experiments.output import add_output_arguments, check_outputs, run_names, save_picture, write_json
from model import GPT, load_checkpoint, rope_frequencies, rotate

# ---------------------------------------------------------------------------------------------------------------
# Looking inside


@torch.no_grad()
def attention_inputs(model, idx):
    """One forward of idx (T,) -> for each layer q, k, v (H, T, D), turned and scaled as the layer does, and its bias.

    The bias is (H, T, T), or None; what it holds for keys in the future means nothing.
    """
    layers = []

    def keep(attn, args):
        x, rotary, mask, query_scale = args[:4]
        q, k, v = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, dim=-1))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if query_scale is not None:
            q = q * query_scale
        layers.append((q[0].float(), k[0].float(), v[0].float(), None if mask is None else mask[0].float()))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
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


def logits_of(q, k, bias):
    """-> logits (H, T, T), -inf for keys in the future."""
    logits = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    if bias is not None:
        logits = logits + bias
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(future, -math.inf)


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def position_bins(block_size, length):
    """First tokens of bins for distances and positions: one token wide where they are small, then 8 an octave.

    L is always the start of a bin, so that no bin mixes what was seen in training with what was not.
    """
    octaves = range(-8 * math.ceil(math.log2(block_size)), 8 * math.ceil(math.log2(length / block_size)) + 1)
    return [0, *sorted(start for start in {round(block_size * 2 ** (n / 8)) for n in octaves} if 0 < start < length)]


def binned_mean(values, index, n_bins):
    """Values (..., N) and the bin of each (N,) -> the mean of each bin (..., n_bins); nan where a bin is empty."""
    total = values.new_zeros(*values.shape[:-1], n_bins).index_add_(-1, index, values)
    return total / torch.bincount(index, minlength=n_bins)


def query_groups(block_size, length):
    """Name -> first and last + 1 of its queries. All queries of a group have about the same number of keys."""
    groups = {"inside": (block_size // 2, min(block_size, length)), "beyond": (length // 2, length)}
    return groups if length >= 2 * block_size else {"inside": groups["inside"]}


def measure_layer(q, k, v, bias, block_size, starts):
    """All statistics of one layer in one window: name -> tensor. Means are over heads and queries.

    entropy       of attention in nats, by position of the query (bins,)
    norm/q, k, v  2-norm of each pair, mean over tokens and heads (P,): a figure of arXiv 2410.06205
    and for each group of queries
    weight_by_distance, weight_by_key, logit_by_distance, logit_by_key (bins,)
    pair_by_distance   S_j (P, bins)
    pair_share         Cov(S_j, S) / Var(S) over the keys of a query (P,): they add up to 1, less the bias' share.
                       What is equal for all keys of a query does not change attention and is left out.
    """
    T, D, n_bins = q.size(1), q.size(-1), len(starts)
    position = torch.arange(T, device=q.device)
    bin_of = torch.bucketize(position, torch.tensor(starts, device=q.device), right=True) - 1    # (T,)
    logits = logits_of(q, k, bias)                                                           # (H, T, T)
    weights = logits.softmax(-1)                                                             # (H, T, T)
    found = {"entropy": binned_mean(torch.special.entr(weights).sum(-1).mean(0), bin_of, n_bins)}
    for name, x in (("q", q), ("k", k), ("v", v)):
        found[f"norm/{name}"] = pairs(x[:, :block_size]).norm(dim=-2).mean((0, 1))           # (P,)

    for group, (start, end) in query_groups(block_size, T).items():
        visible = position <= position[start:end, None]                                      # (Q, T)
        distance = (position[start:end, None] - position)[visible]                           # (visible,)
        by = {"distance": bin_of[distance], "key": bin_of[position.expand_as(visible)[visible]]}
        for name, x in (("weight", weights), ("logit", logits)):
            mean = x[:, start:end].mean(0)[visible]
            for what, index in by.items():
                found[f"{group}/{name}_by_{what}"] = binned_mean(mean, index, n_bins)        # (bins,)
        # the mean over heads of q . k is one product of the heads laid side by side
        wide_q, wide_k = (pairs(x).permute(1, 2, 0, 3).flatten(1, 2) for x in (q[:, start:end], k))  # (T, 2H, P)
        mean = torch.einsum("qcp,kcp->pqk", wide_q, wide_k) / (len(q) * math.sqrt(D))        # (P, Q, T)
        found[f"{group}/pair_by_distance"] = binned_mean(mean[:, visible], by["distance"], n_bins)  # (P, bins)

        count = visible.sum(-1, keepdim=True)                                                # (Q, 1)
        S = logits[:, start:end].masked_fill(~visible, 0)                                    # (H, Q, T)
        S = (S - S.sum(-1, keepdim=True) / count).masked_fill(~visible, 0)  # less its mean over the query's keys
        # sum over keys of S_j * S, without ever holding S_j: q_j . (sum over keys of S * k_j)
        covariance = pairs(q[:, start:end] * (S @ k) / (count * math.sqrt(D))).sum(-2)       # (H, Q, P)
        variance = (S.square().sum(-1, keepdim=True) / count).mean((0, 1))                   # (1,)
        found[f"{group}/pair_share"] = covariance.mean((0, 1)) / variance.clamp(min=1e-12)   # (P,)
    return found


def measure(model, windows, starts):
    """Windows (N, T) -> name -> statistics of each window and layer (N, layers, ...)."""
    rows = []
    for window in windows:
        layers = [measure_layer(*layer, model.config.block_size, starts) for layer in attention_inputs(model, window)]
        rows.append({name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def summarize(found):
    """Each statistic as its mean in each layer, its mean over layers, and that one's standard error over windows."""
    summary = {}
    for name, x in found.items():                                                            # (N, layers, ...)
        overall = x.mean(1)
        stderr = overall.std(0) / math.sqrt(len(x)) if len(x) > 1 else torch.full_like(overall[0], math.nan)
        summary[name] = {"layers": x.mean(0).tolist(), "mean": overall.mean(0).tolist(), "stderr": stderr.tolist()}
    return summary


def pair_swing(curves, starts, block_size, beyond):
    """How much a pair's mean logit depends on distance: S_j by distance (..., P, bins) -> (..., P), in logits.

    Inside: its standard deviation over the distances up to L (over bins, so that near ones count more).
    Beyond: how far past L it leaves the range it has for distances up to L, that is, what no layer was trained to
    expect. Distances above T/2, which not all queries have, are left out.
    """
    starts = torch.tensor(starts)
    known = curves[..., starts < block_size]
    if not beyond:
        return known.std(-1)
    past = curves[..., (starts >= block_size) & (starts <= starts[-1] / 2)]
    low, high = known.amin(-1, keepdim=True), known.amax(-1, keepdim=True)
    return ((past - high).clamp(min=0) + (low - past).clamp(min=0)).amax(-1)


def analyze(checkpoint, windows, device, autocast):
    """A loaded checkpoint and windows (N, T) -> what the JSON holds of it."""
    config = checkpoint["config"]
    L = config["block_size"]
    model, scaled = (GPT.from_checkpoint(checkpoint, attn_scaling=how).to(device) for how in ("none", "logn"))
    length = min(windows.size(1), model.transformer.wpe.max_length or windows.size(1))
    starts = position_bins(L, length)
    with autocast:
        found = measure(model, windows[:, :length], starts)
        found["entropy_logn"] = measure(scaled, windows[:, :length], starts)["entropy"]
    run = summarize(found)
    for group in query_groups(L, length):
        curves = torch.tensor(run[f"{group}/pair_by_distance"]["layers"])                    # (layers, P, bins)
        run[f"{group}/pair_swing"] = {"layers": pair_swing(curves, starts, L, group == "beyond").tolist()}
        run[f"{group}/pair_by_distance"] = {"first_layer": curves[0].tolist()}  # all of them would be most of the file
    theta = rope_frequencies(config["n_embd"] // config["n_head"], base=config["rope_base"])
    rotary = model.transformer.wpe.rotary(torch.zeros(1, device=device))
    return {"pe": config["pe"], "block_size": L, "length": length, "iter": checkpoint["iter"],
            "seed": checkpoint.get("args", {}).get("seed"), "windows": len(windows), "starts": starts,
            "wavelength": (2 * math.pi / theta).tolist(),
            "n_turning": 0 if rotary is None else rotary[0].size(-1), **run}


# ---------------------------------------------------------------------------------------------------------------
# Showing it


def part_of(run, values, start, end):
    """Mean over bins (..., bins) of those that start in [start, end) -> (...), each as wide as it is."""
    edges = torch.tensor([*run["starts"], run["length"]], dtype=torch.float)
    width = torch.where((edges[:-1] >= start) & (edges[:-1] < end), edges.diff(), 0.0)       # (bins,)
    values = torch.tensor(values)
    width = torch.where(values.isnan(), 0, width)
    return (values.nan_to_num() * width).sum(-1) / width.sum(-1)


def print_summary(run):
    L, length = run["block_size"], run["length"]
    groups = query_groups(L, length)
    print(f"\n{run['name']}: {run['pe']} after {run['iter']:,} steps, L = {L}; of a head's "
          f"{len(run['wavelength'])} pairs {run['n_turning']} turn")
    print("queries at         layer  entropy (log-n)  ln n    on first 4 keys  on nearest 16   largest pairs by share")
    for group, (start, end) in groups.items():
        ln_n = torch.log(torch.arange(start, end) + 1.0).mean()
        weight = run[f"{group}/weight_by_key"]["layers"], run[f"{group}/weight_by_distance"]["layers"]
        for layer in range(len(weight[0])):
            entropy = [part_of(run, run[name]["layers"][layer], start, end) for name in ("entropy", "entropy_logn")]
            share = torch.tensor(run[f"{group}/pair_share"]["layers"][layer])
            top = ", ".join(f"{j} ({share[j]:.0%})" for j in share.topk(min(3, len(share))).indices.tolist())
            print(f"[{start:,}, {end:,})".ljust(18) + f"{layer + 1:7}  {entropy[0]:7.2f} ({entropy[1]:5.2f})"
                  f"{ln_n:8.2f}{4 * part_of(run, weight[0][layer], 0, 4):17.3f}"
                  f"{16 * part_of(run, weight[1][layer], 0, 16):15.3f}   {top}")


COLUMNS = {"weight_by_distance": ("distance to the key (tokens)", "mean attention weight"),
           "weight_by_key": ("position of the key", "mean attention weight"),
           "logit_by_distance": ("distance to the key (tokens)", "mean logit"),
           "logit_by_key": ("position of the key", "mean logit")}


def grid(runs, columns, width, height):
    """An empty picture with a row a run -> pyplot, figure, axes (rows, columns)."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(len(runs), columns, figsize=(width * columns, height * len(runs) + 0.3),
                                   squeeze=False, layout="constrained")
    return pyplot, figure, axes


def middles(run):
    """Where a bin is drawn; + 1 so that 0 has a place on a logarithmic axis."""
    edges = [*run["starts"], run["length"]]
    return [(a + b - 1) / 2 + 1 for a, b in zip(edges, edges[1:])]


def token_axis(axes, run, label):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(run["block_size"] + 0.5, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel(f"{label}, counted from 1" if "position" in label else f"1 + {label}")


def plot_distance(runs, path):
    """Weight and logit: a row a run; solid: queries in the second half of L, dashed: in that of the whole window."""
    pyplot, figure, axes = grid(runs, len(COLUMNS), 3.6, 2.9)
    for run, row in zip(runs, axes):
        for (name, (label, what)), panel in zip(COLUMNS.items(), row):
            for group, style in zip(query_groups(run["block_size"], run["length"]), "- --".split()):
                found, x = run[f"{group}/{name}"], middles(run)
                for i, layer in enumerate(found["layers"] if group == "inside" else ()):
                    color = pyplot.cm.viridis(i / max(1, len(found["layers"]) - 1))
                    panel.plot(x, layer, color=color, linewidth=0.8, label=f"layer {i + 1}, inside L")
                mean, stderr = torch.tensor(found["mean"]), torch.tensor(found["stderr"])
                panel.plot(x, mean, style, color="black", linewidth=1.6, label=f"mean, {group} L")
                panel.fill_between(x, mean - stderr, mean + stderr, color="black", alpha=0.2, linewidth=0)
            token_axis(panel, run, label)
            panel.set_ylabel(what)
            panel.set_title(run["name"], fontsize=10)
            if "weight" in name:
                panel.set_yscale("log")
                panel.set_ylim(bottom=1e-4)
    axes[0, 0].legend(fontsize=6)
    save_picture(figure, path)


def heat_maps(figure, runs, panels, name, title):
    """One picture of layers by pairs (layers, P) a run, in the same colours.

    The axis says how many tokens a turn takes; the red line is HoPE's cut: to its right it takes more than L.
    """
    drawn = [(run, panel) for run, panel in zip(runs, panels) if name in run]
    highest = max((torch.tensor(run[name]["layers"]).max().item() for run, _ in drawn), default=0)
    for run, panel in drawn:
        image = panel.imshow(run[name]["layers"], aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        n_pairs, n_cut = len(run["wavelength"]), sum(tokens <= run["block_size"] for tokens in run["wavelength"])
        shown = range(0, n_pairs, max(1, n_pairs // 8))
        panel.set_xticks(shown, [f"{run['wavelength'][j]:,.0f}" if j < run["n_turning"] else "still" for j in shown],
                         rotation=90, fontsize=7)
        panel.set_yticks(range(len(run[name]["layers"])), range(1, len(run[name]["layers"]) + 1))
        panel.axvline(n_cut - 0.5, color="red", linewidth=1)
        panel.set_xlabel("tokens a turn of the pair", fontsize=8)
        panel.set_ylabel("layer")
        panel.set_title(f"{run['name']}: {title}", fontsize=9)
        figure.colorbar(image, ax=panel)


def plot_components(runs, path):
    """S_j by distance in the first layer, and by layer and pair: share, swing inside L, what lies outside past L."""
    pyplot, figure, axes = grid(runs, 4, 3.7, 2.9)
    for run, panel in zip(runs, axes[:, 0]):
        group = list(query_groups(run["block_size"], run["length"]))[-1]
        curves = torch.tensor(run[f"{group}/pair_by_distance"]["first_layer"])                # (P, bins)
        curves = curves - curves[:, torch.tensor(run["starts"]) < run["block_size"]].mean(-1, keepdim=True)
        for j, curve in enumerate(curves):
            panel.plot(middles(run), curve, color=pyplot.cm.plasma(0.9 * j / max(1, len(curves) - 1)), linewidth=0.9)
        token_axis(panel, run, "distance to the key (tokens)")
        panel.set_title(f"{run['name']}: S_j, layer 1, less its mean inside L", fontsize=9)
        panel.set_ylabel("logit; dark: fast pairs")
    heat_maps(figure, runs, axes[:, 1], "inside/pair_share", "share of variance, inside L")
    heat_maps(figure, runs, axes[:, 2], "inside/pair_swing", "std. of S_j(distance), inside L")
    heat_maps(figure, runs, axes[:, 3], "beyond/pair_swing", "excursion of S_j past L")
    save_picture(figure, path)


def plot_frequency(runs, path):
    pyplot, figure, axes = grid(runs, 3, 3.9, 2.5)
    for name, panels in zip("qkv", axes.T):
        heat_maps(figure, runs, panels, f"norm/{name}", f"mean 2-norm of {name}")
    save_picture(figure, path)


def plot_entropy(runs, path):
    """Per layer and without log-n; the mean also with it (dashed); gray: as high as it could be, ln n."""
    pyplot, figure, axes = grid(runs[:1], len(runs), 3.6, 3.2)
    for run, panel in zip(runs, axes[0]):
        x = torch.tensor(middles(run))
        for i, layer in enumerate(run["entropy"]["layers"]):
            color = pyplot.cm.viridis(i / max(1, len(run["entropy"]["layers"]) - 1))
            panel.plot(x, layer, color=color, linewidth=0.8, label=f"layer {i + 1}")
        for name, style, label in (("entropy", "-", "mean"), ("entropy_logn", "--", "mean with log-n scaling")):
            mean, stderr = torch.tensor(run[name]["mean"]), torch.tensor(run[name]["stderr"])
            panel.plot(x, mean, style, color="black", linewidth=1.6, label=label)
            panel.fill_between(x, mean - stderr, mean + stderr, color="black", alpha=0.2, linewidth=0)
        panel.plot(x, x.log(), color="gray", linewidth=1, label="ln n: all keys alike")
        token_axis(panel, run, "position of the query")
        panel.set_ylabel("entropy of attention (nats)")
        panel.set_title(run["name"], fontsize=10)
    axes[0, 0].legend(fontsize=7)
    save_picture(figure, path)


PICTURES = {"distance": plot_distance, "components": plot_components, "frequency": plot_frequency,
            "entropy": plot_entropy}

# ---------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = cli.ArgumentParser("Look inside the attention of runs, inside the trained context and beyond it.")
    count, add = cli.number(int, 1), parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders (best.pt is read, if there is one) or checkpoints")
    add("--dataset", help="folder whose validation text is read; the runs' own if not given")
    add("--text", help="read this text file instead")
    add("--max_factor", type=count, default=4, help="length of a window in multiples of the smallest block_size; "
        "memory grows with its square")
    add("--windows", type=count, default=8, help="windows to average over")
    add_output_arguments(parser, "four pictures, FILE_distance.png, FILE_components.png, FILE_frequency.png and "
                         "FILE_entropy.png")
    args = parser.parse_args(argv)
    check_outputs(args)
    device = cli.pick_device(args.device)
    autocast = cli.autocast(device, cli.pick_dtype(args.dtype, device))

    checkpoints = [load_checkpoint(path) for path in args.runs]
    ids, source, text_sha256, tokenizer = choose_text(args, checkpoints)
    length = args.max_factor * min(checkpoint["config"]["block_size"] for checkpoint in checkpoints)
    windows = document_windows(ids, tokenizer.end_of_document, length, args.windows)[:, :-1].to(device)
    print(f"reading {len(windows)} windows of {length:,} tokens, each inside one document of {source} "
          f"(sha256 {text_sha256[:16]}), on {cli.device_name(device)}")
    runs = []
    for name, checkpoint in zip(run_names(args.runs), checkpoints):
        runs.append({"name": name, **analyze(checkpoint, windows, device, autocast)})
        print_summary(runs[-1])

    if args.json:
        write_json(args.json, "experiments.analyze_attention",
                   {"device": cli.device_name(device), "dataset_sha256": text_sha256, "runs": runs})
    for name, draw in PICTURES.items() if args.plot else ():
        path = Path(args.plot)
        draw(runs, path.with_name(f"{path.stem}_{name}{path.suffix or '.png'}"))


if __name__ == "__main__":
    cli.run(main)
