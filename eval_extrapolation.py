"""
Perplexity beyond the trained context, of one run or of several side by side on the same tokens:

    python eval_extrapolation.py out/rope out/hope --max_factor 16 --json results.json --plot results.png
    python eval_extrapolation.py out/rope out/hope --rope_scaling none pi ntk yarn --attn_scaling none logn

Long windows, each inside one document, are read once, from their first token on. With causal attention one pass gives
every context length at once: at position n, which counts from 0, the model has read n + 1 tokens and predicts the
next one. Perplexity, exp(loss in nats per token), is averaged by position, [0, L) [L, 2L) [2L, 4L) ..., L being the
trained context: a mean over the whole window would hide a collapse among the tokens that are still predicted well.

The same tokens are also predicted from at most L tokens of context (windows of L that advance by L / 2, hence from at
least L / 2). If the full context does better than this, the far tokens help; if it does worse, they harm.
"""
from common import flags, report  # first: see common/__init__.py

# isort: split

import math
import statistics
from dataclasses import replace

import torch

from common.checkpoint import load_checkpoint, load_model, scaling_factor
from common.device import Device, DeviceConfig, check_computation
from data.loader import add_text_flags, document_windows, text_to_score
from data.tokenizer import count_characters
from model import GPTConfig, KVCache

# --- What is scored ---------------------------------------------------------------------------------------------------


def bucket_edges(block_size, max_factor):
    """[0, L, 2L, 4L, ...] up to max_factor * L."""
    edges = [0, block_size]
    while edges[-1] < max_factor * block_size:
        edges.append(min(2 * edges[-1], max_factor * block_size))
    return edges


def windows_at_a_time(config, length, chunk, device):
    """How many windows of a length fit side by side in half a GB, or in half of a GPU's free memory, for a checkpoint's
    config."""
    C, V = config["n_embd"], config["vocab_size"]
    cached = 2 * C * length * config["n_layer"]  # keys and values
    # of one forward of score or score_local: logits, twice more in the loss, and the widest layer's in- and outputs
    activations = max(chunk, config["block_size"]) * (3 * V + 16 * C)
    memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 5e8
    return max(1, int(memory / (4 * (cached + activations))))


def can_scale(config):
    """Whether --rope_scaling changes a network: some layer that rotates sees more than L tokens."""
    return bool(config.rotary_names()) and "rope_scaling" not in flags.idle(replace(config, rope_scaling="pi"))


def scalings(args, config):
    """The combinations of the scaling flags' values that a configuration allows -> overrides of it. Values that are not
    given stay as they were in training."""
    config = GPTConfig(**config)
    rope_scalings = args.rope_scaling if args.rope_scaling and can_scale(config) else [config.rope_scaling]
    factors = {"none": 1.0} if args.rope_scaling else {config.rope_scaling: config.rope_factor}
    return [{"rope_scaling": rope, "rope_factor": factors.get(rope, args.rope_factor), "attn_scaling": attn}
            for rope in rope_scalings for attn in args.attn_scaling or [config.attn_scaling]]


# --- Scoring: windows (N, W + 1) -> loss in nats of each of the W predicted tokens (N, W) -----------------------------


@torch.no_grad()
def score(model, windows, chunk, batch_size):
    """Loss of each token given all tokens before it in its window.

    A window passes in chunks through a KV cache, so that the largest tensor has batch_size * chunk * max(H T, V)
    numbers instead of T x T or T x V. Tokens beyond an encoding's limit are nan."""
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
    """Loss of each token given at most `context` tokens, and at least half as many if there are so many before it."""
    width = windows.size(1) - 1
    losses = torch.empty(len(windows), width, device=windows.device)
    ends = [*range(min(context, width), width, max(1, context // 2)), width]  # L, 1.5 L, 2 L, ...
    done = 0
    for end in ends:
        start = max(0, end - context)
        for first in range(0, len(windows), batch_size):
            rows = windows[first:first + batch_size]
            new = model(rows[:, start:end], rows[:, start + 1:end + 1], reduction="none")[1]  # (B, end - start)
            losses[first:first + batch_size, done:end] = new[:, done - start:]
        done = end
    return losses.cpu()


def score_scaled(checkpoint, scaling, windows, edges, chunk, batch_size):
    """score() of a checkpoint under one of the scalings. With rope_factor "auto" each bucket has a pass and a factor of
    its own, its end divided by the context before scaling."""
    passes = [(0, edges[-1], scaling["rope_factor"])]
    if scaling["rope_factor"] == "auto":
        passes = [(start, end, scaling_factor(checkpoint, end)) for start, end in zip(edges, edges[1:])]
    losses = torch.empty(len(windows), edges[-1])
    for start, end, factor in passes:
        model = load_model(checkpoint, **{**scaling, "rope_factor": factor}).to(windows.device)
        losses[:, start:end] = score(model, windows[:, :end + 1], chunk, batch_size)[:, start:end]
    return losses


def bucket_mean(losses, start, end):
    """Losses (N, W) -> mean over a bucket, and its standard error over windows: tokens of one window are alike."""
    return report.mean_and_stderr(losses[:, start:end].double().mean(dim=1))


def exp(loss):
    return math.exp(min(loss, 700))  # exp(710) overflows


def summarize(losses, local_losses, first_losses, edges, characters):
    """Losses (N, W) of a run -> its list of buckets. characters: how many there are in each bucket, over all windows.

    nll_above_first is the difference from the first run, nll_above_local that from the run itself with at most L tokens
    of context: negative if it gains from what is further back. The tokens are the same, so that both are known much
    better than a loss."""
    buckets = []
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
        (nll, stderr), (local, _) = (bucket_mean(x, start, end) for x in (losses, local_losses))
        tokens_per_character = len(losses) * (end - start) / characters[i]
        row = {"start": start, "end": end, "nll": nll, "stderr": stderr, "ppl": exp(nll),
               "ppl_local": exp(local), "bits_per_character": nll * tokens_per_character / math.log(2)}
        for key, others in (("nll_above_first", first_losses), ("nll_above_local", local_losses)):
            row[key], row[f"{key}_stderr"] = bucket_mean(losses - others, start, end)
        buckets.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return buckets


# --- Showing it -------------------------------------------------------------------------------------------------------


def cell_text(bucket, key):
    """A number of a bucket as text, with its standard error over windows if there is one."""
    value, stderr = bucket[key], bucket.get(f"{key}_stderr")
    if key == "ppl" and value is not None and bucket["stderr"] is not None:
        stderr = bucket["stderr"] * value  # d exp(x) = exp(x) dx
    return report.format_cell(value, stderr, digits=2 if key.startswith("ppl") else 3)


def print_tables(runs, all_tables):
    """The two tables that answer most questions, or all of them."""
    columns = [f"[{bucket['start']:,}, {bucket['end']:,})" for bucket in runs[0]["buckets"]]
    tables = [("ppl", runs, "perplexity by position, ± standard error over windows"),
              ("nll_above_local", runs, "loss with the full context minus loss with the last L tokens, in nats per "
               "token, ± standard error; negative: far tokens help")]
    if all_tables:
        tables += [("ppl_local", runs, "perplexity of the same tokens from at most the last L tokens"),
                   ("bits_per_character", runs, "bits per character"),
                   ("nll_above_first", runs[1:], f"loss minus that of {runs[0]['name']}, in nats per token, ± standard "
                    "error of the difference on the same tokens")]
    for key, shown, title in tables:
        if shown:
            report.print_table(title, columns, {run["name"]: [cell_text(b, key) for b in run["buckets"]]
                                                for run in shown})
    if any(bucket["nll"] is None for run in runs for bucket in run["buckets"]):
        print("-: the encoding is undefined at these positions")
    if any(run["rope_factor"] == "auto" for run in runs):
        print("pi, ntk, yarn: each column is a pass of its own, with frequencies for texts as long as its end")


def plot(runs, path):
    """Perplexity by position, all runs in one picture; dotted: the same tokens from at most the last L tokens."""
    pyplot = report.import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    known = [[b for b in run["buckets"] if b["nll"] is not None] for run in runs]
    lines = sorted(zip(runs, known, report.styles(runs)), key=lambda line: -line[1][-1]["nll"])  # by the last point
    for run, buckets, style in lines:
        at = [math.sqrt((b["start"] or b["end"] / 2) * b["end"]) for b in buckets]  # middle, on a log axis
        errors = [b.get("stderr", b.get("nll_std")) or 0 for b in buckets]  # over windows, or over seeds for groups
        low, high = ([math.exp(b["nll"] + sign * error) for b, error in zip(buckets, errors)] for sign in (-1, 1))
        axes.plot(at, [b["ppl"] for b in buckets], label=run["name"], linewidth=2, markersize=6, **style)
        axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(at, [b["ppl_local"] for b in buckets], color=style["color"], linestyle=(0, (1, 1)), linewidth=1,
                  alpha=0.7)
    edges = [b["end"] for b in runs[0]["buckets"]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.axvline(edges[0], color="gray", linestyle=":")
    axes.annotate(f" trained context, L = {edges[0]}", (edges[0], 0.97), xycoords=("data", "axes fraction"),
                  va="top", color="gray")
    axes.set_xlabel("position in the text (tokens); dotted lines: the same tokens from at most the last L tokens")
    axes.set_ylabel("perplexity per token")
    if len(runs) <= 6:
        report.label_ends(axes, [(buckets[-1]["ppl"], run["name"], style["color"]) for run, buckets, style in lines])
    else:
        figure.legend(loc="outside right center")
    report.save_picture(figure, path)


def make_parser():
    parser = flags.ArgumentParser("Score runs beyond their trained context, side by side on the same tokens.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="folders of runs (best.pt is scored, if it exists) or checkpoints")
    add_text_flags(parser)
    add("--max_factor", type=flags.parsed(int, at_least=1, at_most=2**16), default=16,
        help="longest context, in multiples of block_size")
    add("--windows", type=count, default=32, help="windows to average over")
    add("--batch_size", type=count, help="windows at a time: affects memory, not results; default: as many as fit in "
        "half a GB, or in half of a GPU's free memory")
    add("--all_tables", action="store_true", help="also print the perplexity from at most L tokens, bits per "
        "character, and differences from the first run; the JSON holds all of them")
    add("--chunk", type=count, default=128, help="tokens of a window at a time: affects memory, not results")
    report.add_output_flags(parser, "perplexity by position")
    flags.add_scaling_flags(parser, several=True)
    flags.add_flags(parser, DeviceConfig)
    return parser


def choose_windows(args, checkpoints, names):
    """-> windows (N, W + 1), bucket edges, characters per bucket, sha256 of the text: the same for all runs."""
    steps = {name: checkpoint["iter"] for name, checkpoint in zip(names, checkpoints)}
    most = statistics.mode(steps.values())
    if others := [f"{name} of step {step:,}" for name, step in steps.items() if step != most]:
        print(f"note: not all weights are of step {most:,} (best.pt is that of the lowest validation loss): "
              + ", ".join(others))
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text, args.meta)
    contexts = [checkpoint["config"]["block_size"] for checkpoint in checkpoints]
    L = min(contexts)
    if len(set(contexts)) > 1:
        print("note: the runs differ in block_size, and the shortest sets the buckets: "
              + ", ".join(f"{name} {context}" for name, context in zip(names, contexts)))
    edges = bucket_edges(L, args.max_factor)
    windows = document_windows(ids, tokenizer.end_of_document, edges[-1], args.windows)
    if len(windows) < args.windows:
        print(f"note: the text has room for {len(windows)} such windows, not {args.windows}")
    characters = [sum(count_characters(tokenizer, row) for row in windows[:, a + 1:b + 1].numpy())
                  for a, b in zip(edges, edges[1:])]
    print(f"scoring {len(windows)} windows of {edges[-1]:,} tokens, each inside one document of {source} "
          f"(sha256 {text_sha256[:16]}); L = {L} tokens")
    return windows, edges, characters, text_sha256


def score_runs(args, checkpoints, names, windows, edges, characters, device):
    """-> what the JSON holds of each run and scaling."""
    batch_size = args.batch_size or min(
        windows_at_a_time(checkpoint["config"], edges[-1], args.chunk, device.torch_device)
        for checkpoint in checkpoints)
    runs, first_losses = [], None
    windows = windows.to(device.torch_device)
    for name, checkpoint in zip(names, checkpoints):
        config = checkpoint["config"]
        model = load_model(checkpoint).to(device.torch_device)
        check_computation(model, device)
        with device.autocast():  # L tokens need no scaling but that of the training: one score for all
            local_losses = score_local(model, windows, config["block_size"], batch_size)
        for scaling in scalings(args, config):
            with device.autocast():
                losses = score_scaled(checkpoint, scaling, windows, edges, args.chunk, batch_size)
            if not losses[:, :config["block_size"]].isfinite().all():
                raise ValueError(f"{name} gives NaN or infinite losses: its weights are damaged, or training diverged")
            first_losses = losses if first_losses is None else first_losses
            label = [name, *(scaling[key] for key in ("rope_scaling", "attn_scaling") if scaling[key] != "none")]
            runs.append({"name": " ".join(label), "pe": config["pe"], "block_size": config["block_size"], **scaling,
                         "config": config, "windows": len(windows), "device": str(device),
                         "iter": checkpoint["iter"], "seed": checkpoint["args"]["seed"], "args": checkpoint["args"],
                         "val_loss": checkpoint.get("best_val_loss"), "minutes": checkpoint.get("seconds", 0) / 60,
                         "parameters": sum(p.numel() for p in model.parameters()),
                         "buckets": summarize(losses, local_losses, first_losses, edges, characters)})
    return runs


def main(argv=None):
    args = make_parser().parse_args(argv)
    report.check_outputs(args)
    flags.note_idle_factor(args)
    device = Device(args)
    checkpoints, names = [load_checkpoint(path) for path in args.runs], report.run_names(args.runs)
    fixed = [name for name, checkpoint in zip(names, checkpoints)
             if not can_scale(GPTConfig(**checkpoint["config"]))]
    if args.rope_scaling and fixed:
        print(f"note: --rope_scaling has no effect on {', '.join(fixed)}: no layer rotates and sees more than L tokens")
    windows, edges, characters, text_sha256 = choose_windows(args, checkpoints, names)
    runs = score_runs(args, checkpoints, names, windows, edges, characters, device)
    if args.json:  # first: a reader of the tables that leaves costs nothing
        report.write_json(args.json, "eval_extrapolation.py", {
            "runs": [{**run, "dataset_sha256": text_sha256} for run in runs]})
    if args.plot:
        plot(runs, args.plot)
    print_tables(runs, args.all_tables)


if __name__ == "__main__":
    flags.run(main, takes_memory="--batch_size, --chunk or --max_factor")
