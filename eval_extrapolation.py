"""
Perplexity beyond the trained context, of one run or of several side by side on the same tokens:

    python eval_extrapolation.py out/rope out/hope --max_factor 16 --json results.json --plot results.png
    python eval_extrapolation.py out/rope out/hope --rope_scaling none pi ntk yarn --attn_scaling none logn

Long windows, each inside one document, are read once from their first token on. Causal attention makes that one pass
give every context length at once: the token at position n is predicted from the n tokens before it. Perplexity is
then averaged by position, [0, L) [L, 2L) [2L, 4L) ..., with L the trained context. A mean over the whole window would
hide the collapse behind the many tokens that were still predicted well.

Beside it stand the same tokens predicted from at most L tokens of context (windows of L that move on by L / 2, so from
at least L / 2). Where a model does better than that, the longer context helps; where it does worse, it harms.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import cli
from data.prepare import open_dataset, read_text, sha256
from model import GPT, PE, KVCache, RoPE, load_checkpoint
from tokenizer import checkpoint_tokenizer, encode_checked

# ---------------------------------------------------------------------------------------------------------------
# What is scored


def document_windows(ids, end_of_document, length, n_windows):
    """Windows of length + 1 tokens that lie inside one document and do not overlap -> int64 (N, length + 1).

    N is n_windows, spread evenly over all there are, or all of them where there are fewer. Raises ValueError where
    no document is long enough.
    """
    ends = np.append(np.flatnonzero(ids == end_of_document), len(ids))
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = [p for start, end in zip(starts, ends) for p in range(start, end - length, length + 1)]
    if not places:
        raise ValueError(f"no document has the {length + 1:,} tokens of a window, the longest has "
                         f"{max(ends - starts):,}: lower --max_factor or use longer texts")
    chosen = np.linspace(0, len(places) - 1, num=min(n_windows, len(places))).round().astype(int)
    return torch.from_numpy(np.stack([ids[places[i]:places[i] + length + 1] for i in chosen]).astype(np.int64))


def bucket_edges(block_size, max_factor):
    """[0, L, 2L, 4L, ...] up to max_factor * L."""
    edges = [0, block_size]
    while edges[-1] < max_factor * block_size:
        edges.append(min(2 * edges[-1], max_factor * block_size))
    return edges


def windows_at_a_time(config, length, chunk, device):
    """How many windows of a length to score side by side: half a GB on a CPU, half of what is free on a GPU.

    config: a checkpoint's. More side by side are faster, up to a few thousand tokens; the losses are the same.
    """
    C, V = config["n_embd"], config["vocab_size"]
    cached = 2 * config["n_layer"] * C * length           # keys and values of the whole window
    tokens = max(chunk, config["block_size"])             # of a window, in a forward of score or of score_local
    # logits, twice more in the loss; what the widest layer reads and writes. A bias comes on top, once for all windows
    at_work = tokens * (3 * V + 16 * C)
    memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 5e8
    return max(1, int(memory / (4 * (cached + at_work))))


# ---------------------------------------------------------------------------------------------------------------
# Scoring: windows (N, W + 1) -> loss in nats of each of the W predicted tokens (N, W)


@torch.no_grad()
def score(model, windows, chunk, batch_size):
    """Each token given all tokens before it in its window.

    A window passes in chunks through a KV cache, so that neither T x T nor T x V numbers are ever held: the largest
    tensor has batch_size * chunk * max(H * T, V). Tokens past an encoding's limit are nan.
    """
    width = windows.size(1) - 1
    limit = min(width, model.transformer.wpe.max_length or width)
    losses = torch.full((len(windows), width), math.nan, device=windows.device)
    for first in range(0, len(windows), batch_size):
        rows = windows[first:first + batch_size]
        cache = KVCache(limit)
        for start in range(0, limit, chunk):
            end = min(start + chunk, limit)
            losses[first:first + batch_size, start:end] = model(
                rows[:, start:end], rows[:, start + 1:end + 1], cache, reduction="none")[1]
    return losses.cpu()


@torch.no_grad()
def score_local(model, windows, context, batch_size):
    """Each token given at most context tokens, and from the second window of that length on at least context / 2."""
    width = windows.size(1) - 1
    losses, done = torch.empty(len(windows), width, device=windows.device), 0
    for end in [*range(min(context, width), width, max(1, context // 2)), width]:
        start = max(0, end - context)
        for first in range(0, len(windows), batch_size):
            rows = windows[first:first + batch_size]
            new = model(rows[:, start:end], rows[:, start + 1:end + 1], reduction="none")[1]     # (B, end - start)
            losses[first:first + batch_size, done:end] = new[:, done - start:]
        done = end
    return losses.cpu()


def scalings(args, pe):
    """The combinations of the scaling flags' values that an encoding allows -> overrides of its configuration."""
    rope_scalings = args.rope_scaling if issubclass(PE[pe], RoPE) else ["none"]
    return [{"rope_scaling": rope, "rope_factor": 1.0 if rope == "none" else args.rope_factor, "attn_scaling": attn}
            for rope in rope_scalings for attn in args.attn_scaling]


def score_scaled(checkpoint, scaling, windows, edges, args, device):
    """score() of a checkpoint under one of the scalings.

    With rope_factor "auto" each bucket has its own, its end over L, hence its own frequencies and its own pass.
    """
    passes = [(0, edges[-1], scaling["rope_factor"])]
    if scaling["rope_factor"] == "auto":
        block_size = checkpoint["config"]["block_size"]
        passes = [(start, end, max(1.0, end / block_size)) for start, end in zip(edges, edges[1:])]
    losses = torch.empty(len(windows), edges[-1])
    for start, end, factor in passes:
        model = GPT.from_checkpoint(checkpoint, **{**scaling, "rope_factor": factor}).to(device)
        losses[:, start:end] = score(model, windows[:, :end + 1], args.chunk, args.batch_size)[:, start:end]
    return losses


def mean_and_stderr(losses):
    """Losses (N, T) -> their mean, and its standard error over the N windows: tokens of one window are alike."""
    means = losses.double().mean(dim=1)                                                      # (N,)
    return means.mean().item(), (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.nan


def summarize(losses, local_losses, first_losses, edges, characters):
    """Losses (N, W) of a run -> its list of buckets; nll_above_first is what it loses against the first run.

    All runs are scored on the same tokens, so that difference is known far better than either loss.
    """
    buckets = []
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
        nll, stderr = mean_and_stderr(losses[:, start:end])
        above, above_stderr = mean_and_stderr((losses - first_losses)[:, start:end])
        local, _ = mean_and_stderr(local_losses[:, start:end])
        tokens_per_character = len(losses) * (end - start) / characters[i]
        row = {"start": start, "end": end, "nll": nll, "stderr": stderr, "ppl": math.exp(min(nll, 700)),
               "ppl_local": math.exp(min(local, 700)), "bits_per_character": nll * tokens_per_character / math.log(2),
               "nll_above_first": above, "nll_above_first_stderr": above_stderr}
        buckets.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return buckets


# ---------------------------------------------------------------------------------------------------------------
# Showing it


def print_table(runs, key, title):
    """One row a run, one column a bucket."""
    columns = [f"[{bucket['start']:,}, {bucket['end']:,})" for bucket in runs[0]["buckets"]]
    rows = [["", *columns]] + [[run["name"], *(show(bucket, key) for bucket in run["buckets"])] for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]))


def show(bucket, key):
    """A number of a bucket as text, with its standard error where there is one."""
    value, digits = bucket[key], 2 if key.startswith("ppl") else 3
    if value is None:
        return "-"
    stderr = {"ppl": bucket["stderr"] and bucket["stderr"] * value,  # d exp(x) = exp(x) dx
              "nll_above_first": bucket["nll_above_first_stderr"]}.get(key)
    text = f"{value:.{digits}f}" if value < 1e5 else f"{value:.1e}"
    return text if stderr is None else f"{text} ± {stderr:.{digits}f}"


def import_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")                             # files only: no window, no display needed
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    return pyplot


def plot(runs, path):
    """Perplexity by position, all runs in one picture; dashed: the same tokens with at most L of context."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    last_known = [[b["nll"] for b in run["buckets"] if b["nll"] is not None][-1] for run in runs]
    for _, run in sorted(zip(last_known, runs), key=lambda pair: -pair[0]):  # legend in the order of the ends
        i = runs.index(run)                               # but a run keeps its colour
        buckets = [b for b in run["buckets"] if b["nll"] is not None]
        at = [math.sqrt((b["start"] or b["end"] / 2) * b["end"]) for b in buckets]           # middle, on a log axis
        low, high = ([math.exp(b["nll"] + sign * (b["stderr"] or 0)) for b in buckets] for sign in (-1, 1))
        style = {"color": f"C{i % 10}", "marker": "osD^vPX*<>"[i % 10]}
        axes.plot(at, [b["ppl"] for b in buckets], label=run["name"], markersize=5, **style)
        axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(at, [b["ppl_local"] for b in buckets], color=style["color"], linestyle="--", linewidth=0.8, alpha=0.6)
    edges = [b["end"] for b in runs[0]["buckets"]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.axvline(edges[0], color="gray", linestyle=":")
    axes.annotate(f" trained context, L = {edges[0]}", (edges[0], 0.98), xycoords=("data", "axes fraction"),
                  va="top", color="gray")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("perplexity (lower is better)")
    figure.legend(loc="outside right center", title="dashed: at most\nL of context")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = cli.ArgumentParser("Score runs beyond their trained context, side by side on the same tokens.")
    count, add = cli.number(int, 1), parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders (best.pt is scored, if there is one) or checkpoints")
    add("--dataset", help="folder whose validation text is scored; the runs' own if not given")
    add("--text", help="score this text file instead: one document, say a book")
    add("--max_factor", type=cli.number(int, 1, 2**16), default=16, help="longest context, in multiples of block_size")
    add("--windows", type=count, default=32, help="windows to average over")
    add("--json", help="write the results to this file")
    add("--plot", help="draw them into this file, as .png (needs matplotlib)")
    add("--batch_size", type=count,
        help="windows at a time: memory, not results; if not given, as fit into half a GB, or half a GPU's free memory")
    add("--chunk", type=count, default=128, help="tokens of a window at a time: memory, not results")
    cli.add_scaling_arguments(parser, nargs="+")
    cli.add_device_arguments(parser)
    return parser


def choose_text(args, checkpoints):
    """-> token ids to score, their name, the text's sha256, and the tokenizer that all runs share."""
    tokenizer = checkpoint_tokenizer(checkpoints[0])
    for path, checkpoint in zip(args.runs, checkpoints):
        if checkpoint["tokenizer"] != checkpoints[0]["tokenizer"]:
            raise ValueError(f"{path} and {args.runs[0]} read text with different tokenizers: score them one by one")
    if args.text:
        text = read_text(Path(args.text))
        return encode_checked(tokenizer, text, checkpoints[0]), args.text, sha256(text.encode()), tokenizer
    if not args.dataset and not checkpoints[0]["dataset"]:
        raise ValueError(f"{args.runs[0]} does not say what it was trained on: name a --text to score")
    source = args.dataset or checkpoints[0]["dataset"]["path"]
    meta, splits = open_dataset(source)
    if meta["tokenizer"] != tokenizer.to_dict():
        raise ValueError(f"{source} was made with another tokenizer than {args.runs[0]}: name another --dataset")
    return splits["val"], source, meta["sha256"], tokenizer


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.plot:
        import_pyplot()                                   # a missing package is better known before the work
        cli.check_output(args.plot, cli.PICTURES)
    if args.json:
        cli.check_output(args.json)
    device = cli.pick_device(args.device)
    autocast = cli.autocast(device, cli.pick_dtype(args.dtype, device))
    checkpoints = [load_checkpoint(path) for path in args.runs]
    names = [Path(path).name if Path(path).is_dir() else path for path in args.runs]
    names = names if len(set(names)) == len(names) else args.runs

    # The windows, the same for all runs. The shortest L sets the buckets.
    if len({checkpoint["iter"] for checkpoint in checkpoints}) > 1:
        print("note: the runs differ in training steps: "
              + ", ".join(f"{name} {checkpoint['iter']:,}" for name, checkpoint in zip(names, checkpoints)))
    ids, source, text_sha256, tokenizer = choose_text(args, checkpoints)
    L = min(checkpoint["config"]["block_size"] for checkpoint in checkpoints)
    edges = bucket_edges(L, args.max_factor)
    windows = document_windows(ids, tokenizer.end_of_document, edges[-1], args.windows)
    if len(windows) < args.windows:
        print(f"note: the text has room for {len(windows)} such windows, not {args.windows}")
    characters = [sum(len(tokenizer.decode(row)) for row in windows[:, a + 1:b + 1].numpy())
                  for a, b in zip(edges, edges[1:])]
    print(f"scoring {len(windows)} windows of {edges[-1]:,} tokens, each inside one document of {source} "
          f"(sha256 {text_sha256[:16]}), on {cli.device_name(device)}; L = {L} tokens")

    args.batch_size = args.batch_size or min(windows_at_a_time(checkpoint["config"], edges[-1], args.chunk, device)
                                             for checkpoint in checkpoints)
    runs, first_losses = [], None
    windows = windows.to(device)
    for name, checkpoint in zip(names, checkpoints):
        config = checkpoint["config"]
        with autocast:                                    # within L nothing is scaled: one local score serves all
            local_losses = score_local(GPT.from_checkpoint(checkpoint).to(device), windows, config["block_size"],
                                       args.batch_size)
        for scaling in scalings(args, config["pe"]):
            with autocast:
                losses = score_scaled(checkpoint, scaling, windows, edges, args, device)
            if not losses[:, :config["block_size"]].isfinite().all():
                raise ValueError(f"{name} predicts numbers that are none: its weights are damaged, or it diverged")
            first_losses = losses if first_losses is None else first_losses
            label = [name, *(scaling[key] for key in ("rope_scaling", "attn_scaling") if scaling[key] != "none")]
            runs.append({"name": " ".join(label), "pe": config["pe"], "block_size": config["block_size"], **scaling,
                         "windows": len(windows), "device": cli.device_name(device), "dataset_sha256": text_sha256,
                         "iter": checkpoint["iter"], "seed": checkpoint["args"]["seed"],
                         "buckets": summarize(losses, local_losses, first_losses, edges, characters)})

    print_table(runs, "ppl", "perplexity by position, ± standard error")
    print_table(runs, "ppl_local", "perplexity of the same tokens from at most block_size tokens of context")
    print_table(runs, "bits_per_character", "bits per character")
    if len(runs) > 1:
        print_table(runs[1:], "nll_above_first", f"loss above that of {runs[0]['name']} in nats per token, "
                                                 "± standard error of the difference on the same tokens")
    if any(bucket["nll"] is None for run in runs for bucket in run["buckets"]):
        print("-: the encoding has no value at these positions")
    if args.rope_factor == "auto" and any(run["rope_scaling"] != "none" for run in runs):
        print("pi, ntk, yarn: each column is a pass of its own, with frequencies for texts as long as its end")

    if args.json:
        result = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "runs": runs}
        cli.write_text(args.json, json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    cli.run(main)
