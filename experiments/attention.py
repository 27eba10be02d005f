"""
What attention does inside the trained context L and beyond it: measurements that led to HoPE (arXiv
2410.21216) and to p-RoPE (arXiv 2410.06205), on any checkpoint.

    python -m experiments.attention out/rope out/hope --json attention.json --plot attention.png
    python -m experiments.attention out/rope out/hope --heads --json heads.json
    python -m experiments.attention out/qkv_bias --biases --json biases.json --plot biases.png

Prints the entropy of attention by layer, and plots the mean logit by distance to the key, of
queries in [L/2, L), "inside L", and in [T/2, T) of windows of T tokens, "beyond L"; the JSON has
the weights, too. Short-window layers count the keys in their window only.

--heads lists the heads of full layers by how much they look at the previous token, within L, and
the pairs of channels that point there (arXiv 2410.06205: the fastest ones). A logit is a sum over
pairs, S = sum_j S_j with S_j = q_j . R((n - m) theta_j) k_j / sqrt(D).

--biases shows what biases of queries, a, and keys, b, add to the logits of each head: a function of
the distance d alone, a . R(d theta) b / sqrt(D), at d = 0, 1, 2, ....

Shapes: N windows, H heads, T tokens, D channels per head, P = D/2 pairs, Q queries of a group.
"""
import math

import torch
from torch.nn import functional as F

from common import flags, report
from common.checkpoint import load_checkpoint, load_model
from common.device import Device, DeviceConfig
from data.loader import add_text_flags, document_windows, text_to_score
from experiments import output
from experiments.groups import name_of
from model import ROTARY, rotate

# --- Inside a layer -------------------------------------------------------------------------------


def heads(attn, x):
    """x (B, T, C) -> the layer's queries, keys and values (B, H, T, D), before rotation."""
    return [t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2)
            for t in attn.c_attn(x).chunk(3, dim=-1)]


def qk_biases(attn):
    """-> the biases a of the layer's queries and b of its keys (H, D)."""
    a, b, _ = attn.c_attn.bias.unflatten(0, (3, attn.n_head, -1))
    return a, b


@torch.no_grad()
def attention_inputs(model, idx):
    """One forward of idx (T,) -> for each layer q, k, v (H, T, D), rotated and scaled as there, and
    its bias (H or 1, T, T), -inf for keys outside a window, or None."""
    layers = []

    def keep(attn, args):
        (q, k, v), positions, bias = heads(attn, args[0]), args[1], args[1].mask
        if positions.rotary is not None:
            q, k = rotate(q, *positions.rotary), rotate(k, *positions.rotary)
        if positions.query_scale is not None:
            q = q * positions.query_scale
        if bias is not None:  # bool (T, T), True for visible keys, or (1, H, T, T)
            bias = torch.where(bias, 0.0, -math.inf)[None] if bias.dtype == torch.bool else bias[0]
        layers.append((q[0], k[0], v[0], bias))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
        model(idx[None])
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def logits_of(q, k, bias):
    """-> logits (H, T, T), -inf for keys in the future."""
    logits = q @ k.mT / math.sqrt(q.size(-1))
    if bias is not None:
        logits = logits + bias
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(future, -math.inf)


# --- Statistics -----------------------------------------------------------------------------------


def position_bins(block_size, length):
    """The first tokens of bins for distances and positions: one token wide if small, later 8 bins
    per octave. L is always the start of a bin, so that no bin mixes known distances with others."""
    octaves = range(-8 * math.ceil(math.log2(block_size)),
                    8 * math.ceil(math.log2(length / block_size)) + 1)
    starts = {round(block_size * 2 ** (n / 8)) for n in octaves}
    return [0, *sorted(start for start in starts if 0 < start < length)]


def query_groups(block_size, length):
    """Name -> first and last + 1 of its queries, which all have about the same number of keys."""
    groups = {"inside": (block_size // 2, min(block_size, length)), "beyond": (length // 2, length)}
    return groups if length >= 2 * block_size else {"inside": groups["inside"]}


def measure_layer(q, k, v, bias, block_size, starts):
    """Statistics of one layer in one window, means over heads and queries: name -> tensor.

    norm/q, k, v  2-norm of each pair, mean over tokens (P,)
    and for each group of queries, such as inside/weight_by_distance: entropy in nats,
    weight_by_distance, logit_by_distance (bins,), whose first distances are `starts`"""
    position = torch.arange(q.size(1), device=q.device)
    bin_of = torch.bucketize(position, torch.tensor(starts, device=q.device), right=True) - 1
    found = {f"norm/{name}": x[:, :block_size].unflatten(-1, (2, -1)).norm(dim=-2).mean((0, 1))
             for name, x in (("q", q), ("k", k), ("v", v))}
    for group, (start, end) in query_groups(block_size, q.size(1)).items():
        logits = logits_of(q, k, bias)[:, start:end]  # (H, Q, T)
        weights, visible = logits.softmax(-1), logits.isfinite().all(0)  # (Q, T)
        bins = bin_of[(position[start:end, None] - position)[visible]]  # (visible,)
        count = torch.bincount(bins, minlength=len(starts))
        found[f"{group}/entropy"] = torch.special.entr(weights).sum(-1).mean()
        for name, x in (("weight", weights), ("logit", logits)):
            total = x.new_zeros(len(starts)).index_add_(0, bins, x.mean(0)[visible])
            found[f"{group}/{name}_by_distance"] = total / count  # nan if there are none
    return found


def analyze(model, windows):
    """A model and windows (N, T), T at least its L -> its statistics, as the JSON holds them: means
    in each layer, means over layers, and their standard errors over windows."""
    length = min(windows.size(1), model.transformer.wpe.max_length or windows.size(1))
    starts = position_bins(model.config.block_size, length)
    found = [[measure_layer(*layer, model.config.block_size, starts)
              for layer in attention_inputs(model, window[:length])] for window in windows]
    result = {"length": length, "starts": starts}
    for name in found[0][0]:
        x = torch.tensor([[layer[name].tolist() for layer in layers] for layers in found])
        mean = x.nanmean(1)  # (N, ...); a layer with a window has none for the distances beyond it
        result[name] = {"layers": x.mean(0).tolist(), "mean": mean.mean(0).tolist(),
                        "stderr": (mean.std(0) / math.sqrt(len(x))).tolist()}  # nan for one window
    return result


def print_run(run):
    groups = query_groups(run["block_size"], run["length"])
    ln_n = [torch.log(torch.arange(*of) + 1.0).mean().item() for of in groups.values()]
    layers = zip(*(run[f"{group}/entropy"]["layers"] for group in groups))
    rows = {"uniform: ln n": ln_n} | {f"layer {i}": row for i, row in enumerate(layers, 1)}
    report.print_table(
        f"{run['name']}: {run['layers']} after {run['iter']:,} steps, L = {run['block_size']}; "
        "entropy of attention in nats",
        [f"queries [{start:,}, {end:,})" for start, end in groups.values()],
        {name: [f"{value:.2f}" for value in row] for name, row in rows.items()})


# --- Heads that look at the previous token --------------------------------------------------------

BANDS = ("turn below 16 tokens", "16 to L", "above L", "not rotated")


def check_rotary(model):
    """Raises ValueError if an encoding acts on the embeddings or adds a bias to the logits."""
    for kind in set(model.config.kinds()):
        if (pe := model.configs[kind].pe) not in ("nope", *ROTARY):
            raise ValueError(f"this is measured in encodings that rotate and in nope, not in {pe}")


def previous_token(q, k):
    """q, k (H, L, D) -> the mean weight on the previous token (H,), and what each pair adds to its
    logit above that of all keys (H, P). Queries are at [L/2, L)."""
    L = q.size(1)
    rows = torch.arange(L // 2, L)  # (Q,)
    seen = torch.arange(L) <= rows[:, None]  # (Q, L)
    of_pairs = (x.unflatten(-1, (2, -1)) for x in (q[:, rows], k))  # pair j: channels j and j + P
    by_pair = torch.einsum("hqcp,hkcp->hqkp", *of_pairs) / math.sqrt(q.size(-1))
    weights = by_pair.sum(-1).masked_fill(~seen, -math.inf).softmax(-1)  # (H, Q, L)
    mean = (by_pair * seen[..., None]).sum(2) / seen.sum(1)[:, None]  # (H, Q, P)
    previous = (slice(None), torch.arange(len(rows)), rows - 1)
    return weights[previous].mean(1), (by_pair[previous] - mean).mean(1)


def previous_token_heads(model, windows):
    """windows (N, T) -> the heads of the full layers, as the JSON holds them, those that look most
    at the previous token first: weight on it, its logit, and the share of each band of pairs."""
    check_rotary(model)
    n_pairs, found = model.config.n_embd // model.config.n_head // 2, []
    windows = windows[:, :model.config.block_size]
    theta = getattr(model.encodings["L"], "theta", torch.empty(0))
    turn = F.pad(2 * math.pi / theta, (0, n_pairs - len(theta)), value=math.inf)  # tokens (P,)
    band = (turn >= 16).long() + (turn > windows.size(1)) + turn.isinf()
    inputs = [attention_inputs(model, window) for window in windows]
    for layer, kind in enumerate(model.config.kinds()):
        if kind == "L":
            parts = [previous_token(*of_window[layer][:2]) for of_window in inputs]
            weight, above = (torch.stack(part).mean(0) for part in zip(*parts))  # (H,), (H, P)
            for head, logits in enumerate(above):
                shares = torch.zeros(len(BANDS)).index_add(0, band, logits / logits.sum())
                found.append({"layer": layer + 1, "head": head + 1, "weight": weight[head].item(),
                              "logit": logits.sum().item(), "shares": shares.tolist()})
    return {"heads": sorted(found, key=lambda row: -row["weight"])}


def print_heads(run):
    report.print_table(
        f"{run['name']}: heads of full layers; the share of each band in the logit of the previous "
        "token", ["weight on it", "its logit", *BANDS], {
            f"layer {row['layer']}, head {row['head']}": [
                f"{value:.2f}" for value in (row["weight"], row["logit"], *row["shares"])]
            for row in run["heads"]})


# --- What biases of queries and keys add to a logit -----------------------------------------------


def biases_by_distance(model, windows):
    """windows (N, T) -> the heads, as the JSON holds them: the values at distances below T, nan
    outside of the layer's window. Raises ValueError if there are no such biases or no rotation."""
    check_rotary(model)
    if not model.config.qkv_bias:
        raise ValueError("--biases needs networks with biases of queries and keys")
    found, distances = [], torch.arange(windows.size(1))
    for layer, (block, kind) in enumerate(zip(model.transformer.h, model.config.kinds()), 1):
        a, b = qk_biases(block.attn)
        a = a[None, :, None].expand(-1, -1, len(distances), -1)  # (1, H, T, D)
        if (rotary := model.encodings[kind].rotary(distances)) is not None:
            a = rotate(a, *rotary)
        values = (a[0] @ b[..., None])[..., 0] / math.sqrt(b.size(-1))  # (H, T)
        if kind == "S" and model.config.window:
            values[:, model.config.window:] = math.nan
        found += [{"layer": layer, "head": head, "values": row.tolist()}
                  for head, row in enumerate(values, 1)]
    return {"heads": found}


def print_biases(run):
    distances = [0, *(2 ** i for i in range((run["length"] - 1).bit_length()))]
    report.print_table(
        f"{run['name']}: what biases add to a logit, by the distance to the key",
        list(map(str, distances)), {
            f"layer {row['layer']}, head {row['head']}": [
                f"{row['values'][d]:.2f}" for d in distances] for row in run["heads"]})


# --- Pictures -------------------------------------------------------------------------------------


def draw_biases(run, style, panels):
    """A panel per layer, a line per head."""
    for row in run["heads"]:
        panel = panels[row["layer"] - 1]
        panel.plot(range(1, run["length"] + 1), row["values"], label=f"head {row['head']}")
        panel.set_title(f"layer {row['layer']}")
    panels[0].set_ylabel(f"{style['label']}:\nadded to the logit")


def draw_attention(run, style, panels):
    """The logit, in one panel."""
    edges = [*run["starts"], run["length"]]
    at = [(start + end - 1) / 2 + 1 for start, end in zip(edges, edges[1:])]  # 1: log axis
    inside = run["inside/logit_by_distance"]
    for layer in inside["layers"]:
        panels[0].plot(at, layer, color="0.7", linewidth=1)
    panels[0].lines[0].set_label("queries inside L, each layer")
    for group, line in (("inside", "-"), ("beyond", "--")):
        if found := run.get(f"{group}/logit_by_distance"):
            panels[0].plot(at, found["mean"], line, color=style["color"], linewidth=2,
                           label=f"queries {group} L, mean")
    panels[0].set_ylabel(f"{style['label']}:\nmean logit")


def plot(runs, draw, question, path):
    """A row per run, which draw(run, style, panels) fills."""
    n_panels = runs[0]["heads"][-1]["layer"] if draw is draw_biases else 1
    figure, axes = report.import_pyplot().subplots(
        len(runs), n_panels, figsize=(9.5, 2.3 * len(runs) + 1.5), squeeze=False, sharey=True)
    for run, style, panels in zip(runs, report.styles(runs), axes):
        draw(run, style, panels)
        for panel in panels:
            ticks = {1, 4, 16, run["block_size"], run["length"]}
            report.token_axis(panel, run["block_size"], sorted(ticks))
    figure.supxlabel("1 + distance to the key (tokens)", fontsize="medium")
    report.save_picture(figure, axes[0, 0], question, path)


# --- The command ----------------------------------------------------------------------------------

# what is measured of a model and windows, how it is printed and drawn, what the picture answers
KINDS = {"attention": (analyze, print_run, draw_attention, "Do keys beyond L get high logits?"),
         "heads": (previous_token_heads, print_heads, None, None),
         "biases": (biases_by_distance, print_biases, draw_biases,
                    "What do biases of queries and keys add to a logit?")}


def measure_runs(args, device, measure, show):
    """-> the result, as the JSON holds it."""
    checkpoints, names = [load_checkpoint(path) for path in args.runs], report.run_names(args.runs)
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text)
    lengths = [args.max_factor * checkpoint["config"]["block_size"] for checkpoint in checkpoints]
    windows = document_windows(ids, tokenizer.end_of_document, max(lengths), args.windows)
    print(f"{len(windows)} windows, each inside one document of {source}")
    runs = []
    for name, checkpoint, length in zip(names, checkpoints, lengths):
        model = load_model(checkpoint).to(device.torch_device)
        run = {"name": name, "pe": model.config.pe, "layers": name_of(model.config),
               "block_size": model.config.block_size, "length": length,
               "iter": checkpoint["iter"], "seed": checkpoint["args"]["seed"],
               **measure(model, windows[:, :length].to(device.torch_device))}
        show(run)
        runs.append(run)
    return {"device": str(device), "dataset_sha256": text_sha256, "windows": len(windows),
            "bands": BANDS, "runs": runs}


def main(argv=None):
    parser = flags.ArgumentParser("Analyse attention inside the trained context and beyond it.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders or checkpoints")
    add("--heads", action="store_true", help="list the heads that look at the previous token")
    add("--biases", action="store_true",
        help="the function of distance that biases of queries and keys make")
    add_text_flags(parser)
    add("--max_factor", type=flags.positive, default=4, help="length of a run's windows in "
        "multiples of its block_size; memory grows with its square")
    add("--windows", type=flags.positive, default=8, help="windows to average over")
    report.add_output_flags(parser, "the logit, or the function, by distance")
    flags.add_flags(parser, DeviceConfig, "device")
    args = parser.parse_args(argv)
    report.check_outputs(args)
    kind = "heads" if args.heads else "biases" if args.biases else "attention"
    device = Device(DeviceConfig(args.device if kind == "attention" else "cpu"))
    measure, show, draw, question = KINDS[kind]
    result = measure_runs(args, device, measure, show)
    if args.json:
        report.write_json(args.json, "-m experiments.attention", output.rounded(result, 4))
    if args.plot and draw:
        plot(result["runs"], draw, question, args.plot)


if __name__ == "__main__":
    flags.run(main)
