"""
Where does a model lose the thread? A page that shows one passage, each token coloured by its loss.

    python -m experiments.page out/demo/rope out/demo/hope --names RoPE HoPE --html out/page.html

The passage is one of --windows that begin at a line: the one whose losses are closest to their
mean, so that nobody picks it. page.html is copied with the data as JSON in place of the word DATA:

    {"root": path of the project, "scripts": [file beside the page, ...], "L", "source", "windows",
     "vocab": [text, ...], "tokens", "runs": [{"name", "mean", "full": PART, "local": PART}, ...]}
    PART: {"loss", "top", "p"}

full is given the full context; local holds the same from position L on, given the last L tokens.
p are the probabilities of the five likeliest tokens at each position in per cent, 0 for those below
1 %, and top the tokens that are not 0. mean is the mean loss of each bucket over all windows.
tokens and top are indices in vocab. A loss is 1 + its number of steps of 0.02 nats, or 0 where the
encoding is undefined. All of these are text: the number i is the character chr(35 + i), in UTF-8
one byte if i is below 93, which most are.
"""
import json
import math
import os
import unicodedata
from pathlib import Path

import torch
from torch.nn import functional as F

from common import flags
from common.checkpoint import load_checkpoint, load_model, replacing
from common.device import Device, DeviceConfig
from common.report import run_names
from data.loader import add_text_flags, document_windows, text_to_score
from eval_extrapolation import bucket_edges, score, score_local

TEMPLATE = Path(__file__).with_suffix(".html")

# --- What is shown ------------------------------------------------------------------------------


def windows_from_lines(ids, tokenizer, length, margin, n_windows):
    """Windows (N, length + 1) that begin at a line if one begins within the first margin tokens."""
    windows = document_windows(ids, tokenizer.end_of_document, length + margin, n_windows)
    ends = [id for id in windows.unique().tolist() if tokenizer.decode_bytes([id])[-1:] == b"\n"]
    new_line = torch.isin(windows[:, :margin], torch.tensor(ends, dtype=torch.int64))
    first = torch.where(new_line.any(1), new_line.int().argmax(1) + 1, 0).tolist()
    return torch.stack([window[i:i + length + 1] for window, i in zip(windows, first)])


def closest_to_mean(losses, edges):
    """Losses of the runs on all windows (R, N, W) -> the window whose means by run and bucket are
    closest to those of all windows, by the sum of squares. Undefined losses do not count."""
    means = torch.stack([losses[:, :, start:end].mean(-1)
                         for start, end in zip(edges, edges[1:])], dim=-1)  # (R, N, buckets)
    distances = (means - means.mean(1, keepdim=True)).nan_to_num().square().sum((0, 2))
    return int(distances.argmin())


@torch.no_grad()
def likeliest(model, window, context):
    """A window (W + 1,) -> the five tokens that the model expects most at each position, and their
    probabilities (W, 5) each, given at most `context` tokens, in the windows of score_local."""
    width, done, found = len(window) - 1, 0, []
    for end in [*range(min(context, width), width, max(1, context // 2)), width]:
        start = max(0, end - context)
        logits, _ = model(window[None, start:end], window[None, start + 1:end + 1])
        logits = F.pad(logits[0, done - start:].float(), (0, 5), value=-math.inf)  # at least five
        found.append(logits.softmax(-1).topk(5))
        done = end
    return (torch.cat([x.indices for x in found]).cpu(), torch.cat([x.values for x in found]).cpu())


def part_of_page(losses, top, p):
    """Losses (W,), the likeliest tokens and their probabilities (at most W, 5) -> a PART."""
    percent = (100 * p).round() * (p >= 0.01)
    return {"loss": loss_steps(losses), "top": top[percent > 0], "p": percent}


def describe(name, model, losses, window, at, edges):
    """A run and its losses (N, W), the window (W + 1,) with index `at` -> the page's data."""
    L, limit = edges[1], min(edges[-1], model.transformer.wpe.max_length or edges[-1])
    top, p = likeliest(model, window, L)
    means = [losses[:, start:end].mean() for start, end in zip(edges, edges[1:])]
    return {"name": name, "mean": loss_steps(torch.stack(means)),
            "full": part_of_page(losses[at], *likeliest(model, window[:limit + 1], limit)),
            "local": part_of_page(score_local(model, window[None], L, 1)[0, L:], top[L:], p[L:])}


def make_page(args, checkpoints, names, device):
    """-> the page's data, with tensors for what becomes text."""
    contexts = {checkpoint["config"]["block_size"] for checkpoint in checkpoints}
    if len(contexts) > 1:
        raise ValueError(f"the runs differ in block_size ({', '.join(map(str, sorted(contexts)))}):"
                         " a page shows runs of one trained context")
    ids, source, _, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text)
    edges = bucket_edges(*contexts, args.max_factor)
    windows = windows_from_lines(ids, tokenizer, edges[-1], edges[1], args.windows)
    windows = windows.to(device.torch_device)
    models = [load_model(checkpoint).to(device.torch_device) for checkpoint in checkpoints]
    with device.autocast():
        losses = [score(model, windows, chunk=128, batch_size=8) for model in models]
        at = closest_to_mean(torch.stack(losses), edges)
        runs = [describe(name, model, own, windows[at], at, edges)
                for name, model, own in zip(names, models, losses)]
    vocab, tokens = number_tokens(windows[at].cpu(), runs)
    root = os.path.relpath(TEMPLATE.parents[1], Path(args.html).parent)
    texts = [tokenizer.decode_bytes([i]).decode(errors="backslashreplace") for i in vocab]
    return {"root": root.replace(os.sep, "/"), "scripts": args.scripts, "L": edges[1],
            "source": str(source), "windows": len(windows), "vocab": texts, "tokens": tokens,
            "runs": runs}


# --- How it is stored ---------------------------------------------------------------------------


def loss_steps(losses):
    """Losses in nats -> 1 + steps of 0.02 nats, undefined ones -> 0. At most 500 nats."""
    return (1 + (losses.clamp(max=500) / 0.02).round()).nan_to_num(0)


def number_tokens(tokens, runs):
    """Number the tokens that occur anew -> their ids, and tokens with the new numbers. Those in
    runs are changed."""
    parts = [run[key] for run in runs for key in ("full", "local")]
    lists = [tokens, *(part["top"] for part in parts)]
    ids, numbers = torch.cat(lists).unique(return_inverse=True)
    tokens, *tops = numbers.split([len(part) for part in lists])
    for part, top in zip(parts, tops):
        part["top"] = top
    return ids.tolist(), tokens


def encode(tensor):
    """Integers -> a character each."""
    return "".join(chr(35 + number) for number in tensor.flatten().long().tolist())


def fill_template(data):
    """-> the page's HTML. Characters that could end the script element, or that are invisible or
    change the order of the text, are escaped."""
    text = json.dumps(data, default=encode, ensure_ascii=False, separators=(",", ":"))
    text = "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
                   else c for c in text.replace("<", "\\u003c"))
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)


# --- The command --------------------------------------------------------------------------------


def main(argv=None):
    parser = flags.ArgumentParser("Write a page that shows a passage as several runs read it.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="folders of runs, or checkpoints")
    add("--names", nargs="+", help="names of the runs; default: of their folders")
    add("--html", metavar="FILE.html", required=True, help="write the page to this file")
    add("--scripts", nargs="+", default=[], metavar="FILE.js", help="scripts beside the page that "
        "it loads; docs/text.html: weights.js live.js")
    add_text_flags(parser)
    add("--max_factor", type=flags.positive, default=8,
        help="length of the passage, in multiples of block_size")
    add("--windows", type=flags.positive, default=32, help="windows to choose the passage from")
    flags.add_flags(parser, DeviceConfig)
    args = parser.parse_args(argv)
    checkpoints = [load_checkpoint(path) for path in args.runs]
    names = args.names or run_names(args.runs)
    if len(names) != len(args.runs):
        raise ValueError(f"{len(args.runs)} runs need as many --names, not {len(names)}")
    data = make_page(args, checkpoints, names, Device(DeviceConfig(args.device, args.dtype)))
    page = fill_template(data).encode()
    Path(args.html).parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.html) as file:
        file.write(page)
    print(f"{len(data['tokens']) - 1:,} tokens of {data['source']} as {len(names)} runs read them: "
          f"{args.html} ({len(page) / 1024:.0f} KB), to be opened in a browser")


if __name__ == "__main__":
    flags.run(main)
