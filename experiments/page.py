"""
Where does a model lose the thread? A page to look at: one passage, each token coloured by its loss.

    python -m experiments.page out/demo/rope out/demo/hope out/demo/windows --html out/demo/page.html

The passage is one of the windows that eval_extrapolation.py scores (--max_factor and --windows as there): the one whose
losses are closest to their mean, so that nobody picks it. page.html says what can be seen; it is copied with the data
as JSON in its place:

    {"L", "source", "windows", "vocab": [text, ...], "tokens", "runs": [{"name", "mean", "loss", "top", "p", "local":
     {"loss", "top", "p"}}, ...]}

tokens and top are indices in vocab. p are the probabilities of the five likeliest tokens at each position in per cent,
0 for those below 1 %, and top the tokens that are not 0. They are given the full context; local holds the same from
position L on, given the last L tokens. mean is the mean loss of each bucket over all windows. A loss is 1 + its number
of steps of 0.02 nats, or 0 where the encoding is undefined. All of these are text: the number i is the character
chr(35 + i), in UTF-8 one byte if it is below 93, which most are. The second and third p are one number, as are the
fourth and fifth: a >= b become a (a + 1) / 2 + b.
"""
import json
import math
from functools import partial
from pathlib import Path

import regex
import torch
from torch.nn import functional as F

from common import flags
from common.checkpoint import load_checkpoint, load_model, replacing
from common.device import Device, DeviceConfig
from common.report import check_output, run_names
from data.loader import add_text_flags, document_windows, text_to_score
from eval_extrapolation import bucket_edges, score, score_local, windows_at_a_time

TEMPLATE = Path(__file__).with_suffix(".html")
CHUNK, LIKELIEST, NATS_PER_STEP, FIRST_CHARACTER = 128, 5, 0.02, 35
# Characters that would end or hide the script element, or reorder the text of the file
UNSAFE = regex.compile(r"<(?=[/!])|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]")

# --- What is shown ----------------------------------------------------------------------------------------------------


def closest_to_mean(losses, edges):
    """Losses of the runs on all windows (R, N, W) -> the window whose means by run and bucket are closest to those of
    all windows, by the sum of squares. Where a loss is undefined, it is so in all windows and does not count."""
    means = torch.stack([losses[:, :, a:b].mean(-1) for a, b in zip(edges, edges[1:])], dim=-1)  # (R, N, buckets)
    return int((means - means.mean(1, keepdim=True)).nan_to_num().square().sum((0, 2)).argmin())


def predictions(model, scoring, window):
    """What a scoring function of eval_extrapolation.py makes of a window (W + 1,).

    Returns the losses (W,), nan where undefined, and for the positions before that the ids of the likeliest tokens and
    their probabilities (W, LIKELIEST). Some tokens are predicted several times. The scoring function decides which time
    counts: the model gives it the number of each prediction in place of the loss."""
    kept = []  # one row per prediction: loss, ids, probabilities

    def keep(model, args, output):
        logits, loss = output  # (1, T, V), (1, T)
        logits = F.pad(logits[0].float(), (0, max(0, LIKELIEST - logits.size(-1))), value=-math.inf)
        likeliest = logits.softmax(-1).topk(LIKELIEST)
        first = len(kept)
        kept.extend(zip(loss[0].cpu(), likeliest.indices.cpu(), likeliest.values.cpu()))
        return logits, torch.arange(first, len(kept), device=loss.device, dtype=loss.dtype)[None]

    hook = model.register_forward_hook(keep)
    try:
        numbers = scoring(model, window[None])[0]  # (W,)
    finally:
        hook.remove()
    loss, top, p = map(torch.stack, zip(*(kept[int(number)] for number in numbers if not number.isnan())))
    return torch.cat([loss, numbers[len(loss):]]), top, p


def describe(name, model, losses, device, window, edges):
    """One run and its losses on all windows (N, W) -> what the page holds of it, as tensors."""
    L, run = edges[1], {}
    with device.autocast():
        for key, start, scoring in (("full", 0, partial(score, chunk=CHUNK, batch_size=1)),
                                    ("local", L, partial(score_local, context=L, batch_size=1))):
            loss, top, p = predictions(model, scoring, window)
            percent = (100 * p[start:]).round() * (p[start:] >= 0.01)
            run[key] = {"loss": loss_steps(loss[start:]), "top": top[start:][percent > 0], "p": in_pairs(percent)}
    mean = [losses[:, a:b].mean() for a, b in zip(edges, edges[1:])]
    return {"name": name, "mean": loss_steps(torch.stack(mean)), **run.pop("full"), **run}


def make_page(args, checkpoints, names, device):
    """-> the page's data, with tensors for what becomes text."""
    contexts = {checkpoint["config"]["block_size"] for checkpoint in checkpoints}
    if len(contexts) > 1:
        raise ValueError(f"the runs differ in block_size ({', '.join(map(str, sorted(contexts)))}): a page shows runs "
                         "of one trained context")
    ids, source, _, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text, args.meta)
    edges = bucket_edges(*contexts, args.max_factor)
    windows = document_windows(ids, tokenizer.end_of_document, edges[-1], args.windows).to(device.torch_device)
    models, losses = [load_model(checkpoint).to(device.torch_device) for checkpoint in checkpoints], []
    for name, checkpoint, model in zip(names, checkpoints, models):
        batch_size = windows_at_a_time(checkpoint["config"], edges[-1], CHUNK, device.torch_device)
        with device.autocast():
            losses.append(score(model, windows, CHUNK, batch_size))
        if not losses[-1][:, :edges[1]].isfinite().all():
            raise ValueError(f"{name} gives NaN or infinite losses: its weights are damaged, or training diverged")
    window = windows[closest_to_mean(torch.stack(losses), edges)]
    runs = [describe(name, model, own, device, window, edges) for name, model, own in zip(names, models, losses)]
    vocab, tokens = number_tokens(window.cpu(), [part for run in runs for part in (run, run["local"])])
    return {"L": edges[1], "source": str(source), "windows": len(windows), "tokens": tokens, "runs": runs,
            "vocab": [tokenizer.decode_bytes([token]).decode(errors="backslashreplace") for token in vocab]}


# --- How it is stored -------------------------------------------------------------------------------------------------


def loss_steps(losses):
    """Losses in nats -> 1 + steps of NATS_PER_STEP, undefined ones -> 0. At most 500 nats."""
    return (1 + (losses.clamp(max=500) / NATS_PER_STEP).round()).nan_to_num(0)


def in_pairs(p):
    """Falling percentages (W, 5) -> the first, and two pairs as a number each (W, 3)."""
    a, b = p[:, 1::2], p[:, 2::2]
    return torch.cat([p[:, :1], a * (a + 1) / 2 + b], dim=1)


def number_tokens(tokens, parts):
    """Number the tokens that occur anew, the most frequent ones first. Changes "top" of the parts.

    Returns the ids in this order, and tokens with their new numbers."""
    ids, counts = torch.cat([tokens, *(part["top"] for part in parts)]).unique(return_counts=True)
    order = ids[counts.argsort(descending=True, stable=True)]
    number = torch.zeros(int(ids.max()) + 1, dtype=torch.long)
    number[order] = torch.arange(len(order))
    for part in parts:
        part["top"] = number[part["top"]]
    return order.tolist(), number[tokens]


def encode(tensor):
    """Integers -> a character each."""
    return "".join(chr(FIRST_CHARACTER + number) for number in tensor.flatten().long().tolist())


def fill_template(data):
    """-> the page's HTML."""
    text = json.dumps(data, default=encode, ensure_ascii=False, separators=(",", ":"))
    text = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)


# --- The command ------------------------------------------------------------------------------------------------------


def make_parser():
    parser = flags.ArgumentParser("Write a page that shows a passage as several runs read it, token by token.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("runs", nargs="+", metavar="OUT_DIR", help="runs' folders (best.pt is read, if there is one) or checkpoints")
    add("--html", metavar="FILE.html", required=True, help="write the page to this file")
    add_text_flags(parser)
    add("--max_factor", type=flags.parsed(int, at_least=1, at_most=2**16), default=8,
        help="length of the passage, in multiples of block_size")
    add("--windows", type=count, default=32, help="windows to choose the passage from")
    flags.add_flags(parser, DeviceConfig)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    check_output(args.html)
    checkpoints, names = [load_checkpoint(path) for path in args.runs], run_names(args.runs)
    data = make_page(args, checkpoints, names, Device(args))
    page = fill_template(data).encode()
    with replacing(args.html) as file:
        file.write(page)
    print(f"{len(data['tokens']) - 1:,} tokens of {data['source']} as {len(names)} runs read them: {args.html} "
          f"({len(page) / 1024:.0f} KB), to be opened in a browser")


if __name__ == "__main__":
    flags.run(main)
