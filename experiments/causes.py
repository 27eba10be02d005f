"""
Why the loss rises beyond the trained context L: three causes, and biases, which keep it low, each
removed at evaluation from trained models.

    python -m experiments.causes score out/grid/*seed-* --json causes.json

Unknown angles. A pair that does not complete a turn within L tokens (a slow pair) meets, beyond L,
angles between query and key that never occurred in training. "angles clamped" gives the slow pairs
of keys that are L or more tokens away the angle of distance L - 1. Fast pairs, and all pairs at
smaller distances, keep theirs. ReRoPE (J. Su) clamps the distance of all pairs in this way. "angles
halved" and "angles 0", those of half this distance and of none, are known from training, too.

Dilution. A query at position n >= L compares n + 1 keys. "L keys sampled" lets it see the nearest
L / 2, and L / 2 of the others, drawn at random for each query and layer (heads and windows share
the draw). "log-n" multiplies its logits by ln(n + 1) / ln L. For comparison, "last L keys" removes
all that is far: no distance beyond L, no more keys than L.

Noise. The logits of the fast pairs are sums of few waves over distance. Where many of them line up,
far tokens get large logits whatever they say. "fast pairs silent" leaves the fast pairs out of the
logits of keys that are L or more tokens away.

All these act in the full layers only.

Biases. Those of queries and keys, a and b, add a R((n - m) theta) b to each logit, a function of
the distance alone. "a R b removed" subtracts it; "biases of q and k 0" removes what a does with
keys and b with queries, too. Both act in all layers and at all distances of networks with biases.

Shapes: N windows, B of them at a time, T tokens, H heads, D channels per head, K rotated pairs.
"""
import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from common import flags, report
from common.checkpoint import load_checkpoint, load_model
from data.loader import document_windows, text_to_score
from eval_extrapolation import bucket_edges, bucket_mean
from experiments import output
from experiments.attention import check_rotary, heads, qk_biases
from model import rotate

# --- A forward with explicit logits, in which one thing is changed --------------------------------


@dataclass(frozen=True)
class Change:
    """What is changed in the full layers, for keys that are L or more tokens away and queries that
    see more than L; biases in all layers, everywhere."""

    clamped: float | None = None  # slow pairs have the angle of this share of distance L - 1
    silent: bool = False  # the fast pairs are left out
    keys: str = "all"  # that a query sees: all, sampled or last
    logn: bool = False
    biases: str = "true"  # of queries, a, and keys, b: true, 0, or "no a R b"


CHANGES = {
    "nothing": Change(),
    "angles clamped": Change(clamped=1),
    "angles halved": Change(clamped=0.5),
    "angles 0": Change(clamped=0),
    "fast pairs silent": Change(silent=True),
    "L keys sampled": Change(keys="sampled"),
    "log-n": Change(logn=True),
    "all three": Change(clamped=1, silent=True, keys="sampled"),
    "last L keys": Change(keys="last"),
    "biases of q and k 0": Change(biases="0"),
    "a R b removed": Change(biases="no a R b"),
}


def far_rotations(theta, pos, L, change):
    """(cos, sin) (T, K) for queries, and for keys that are far from them: a clamped angle is the
    same at all distances."""
    slow, angle = theta * L < 2 * math.pi, pos[:, None] * theta
    for_q = for_k = angle
    if change.clamped is not None:
        for_q = torch.where(slow, change.clamped * (L - 1) * theta, angle)
        for_k = torch.where(slow, 0.0, angle)
    heard = slow.float() if change.silent else torch.ones_like(theta)  # (K,)
    return (for_q.cos() * heard, for_q.sin() * heard), (for_k.cos(), for_k.sin())


def sampled_keys(distance, L, generator):
    """Distances (Tq, Tk) -> which keys a query sees: the nearest L / 2 and at most L / 2 of those
    further back."""
    near = (distance >= 0) & (distance < L // 2)
    draw = torch.rand(distance.shape, generator=generator).masked_fill(distance < L // 2, -1)
    last_drawn = draw.topk(min(L - L // 2, draw.size(1)), dim=1).values[:, -1:].clamp(min=0)
    return near | (draw >= last_drawn)


def attention(model, attn, x, kind, change, generator, chunk):
    """The attention of a layer of a kind ("S", "L") on x (B, T, C) -> (B, T, C), changed."""
    config, pe, pos = model.configs[kind], model.encodings[kind], torch.arange(x.size(1))
    L, change = config.block_size, change if kind == "L" else Change(biases=change.biases)
    window = config.window if kind == "S" else L if change.keys == "last" else 0
    q, k, v = heads(attn, x)
    if change.biases != "true":
        a, b = (bias[:, None].expand_as(q[:1]) for bias in qk_biases(attn))  # (1, H, T, D)
        if change.biases == "0":
            q, k = q - a, k - b
        else:  # as one more sequence, whose logits are a R b
            q, k = torch.cat((q, a)), torch.cat((k, b))
    q, rotary, far_q = q / math.sqrt(q.size(-1)), pe.rotary(pos), None
    scaled = replace(config, attn_scaling="logn") if change.logn else config
    if (scale := model.query_scale(scaled, pos, window, rotary is not None)) is not None:
        q = q * scale
    if rotary is not None:
        if change.clamped is not None or change.silent:
            for_q, for_k = far_rotations(pe.theta, pos, L, change)
            far_q, far_k = rotate(q, *for_q), rotate(k, *for_k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    outputs = []
    for start in range(0, len(pos), chunk):
        end = min(start + chunk, len(pos))
        oldest = max(0, start - window + 1) if window else 0
        distance = pos[start:end, None] - pos[oldest:end]  # (Tq, Tk)
        logits = q[:, :, start:end] @ k[:, :, oldest:end].mT  # (B, H, Tq, Tk)
        if far_q is not None:
            far_logits = far_q[:, :, start:end] @ far_k[:, :, oldest:end].mT
            logits = torch.where(distance < L, logits, far_logits)
        if change.biases == "no a R b":
            logits = logits[:-1] - logits[-1]
        visible = distance >= 0
        if change.keys == "sampled":
            visible = sampled_keys(distance, L, generator)
        if window:
            visible = visible & (distance < window)
        weights = logits.masked_fill_(~visible, -math.inf).softmax(dim=-1)
        outputs.append(weights @ v[:, :, oldest:end])
    return attn.c_proj(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))


@torch.no_grad()
def losses_of(model, windows, change, seed=0, batch_size=2, chunk=256):
    """Windows (N, T + 1) -> loss of each predicted token (N, T) under a Change.

    Raises ValueError if an encoding does not act by rotation."""
    check_rotary(model)
    losses = []
    for rows in windows.split(batch_size):
        generator = torch.Generator().manual_seed(seed)
        x = model.transformer.wte(rows[:, :-1])
        for block, kind in zip(model.transformer.h, model.config.kinds()):
            x = x + attention(model, block.attn, block.ln_1(x), kind, change, generator, chunk)
            x = x + block.mlp(block.ln_2(x))
        logits = model.lm_head(model.transformer.ln_f(x))
        losses.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    return torch.cat(losses)


def score(model, windows, edges):
    """-> {change: {"ranges", "removed"}}: in each range the loss, and what it is above that without
    a change, both with errors over windows; "removed" is the share of the rise of the loss, from
    the first range to the last, that the change removes."""
    found, own = {}, None
    for name, change in CHANGES.items():
        if change.biases != "true" and not model.config.qkv_bias:
            continue
        losses = losses_of(model, windows, change)
        own = losses if own is None else own
        ranges = []
        for start, end in zip(edges, edges[1:]):
            (nll, nll_stderr), (above, above_stderr) = (
                bucket_mean(x, start, end) for x in (losses, losses - own))
            ranges.append({"start": start, "end": end, "nll": nll, "nll_stderr": nll_stderr,
                           "above": above, "above_stderr": above_stderr})
        if name == "nothing":
            rise = (ranges[-1]["nll"] - ranges[0]["nll"]) or math.nan
        found[name] = {"ranges": ranges, "removed": -above / rise, "removed_stderr": math.nan}
    return found


# --- The command ----------------------------------------------------------------------------------


def score_runs(args):
    """-> the result, as the JSON holds it."""
    checkpoints, names = [load_checkpoint(path) for path in args.runs], report.run_names(args.runs)
    ids, _, text_sha256, tokenizer = text_to_score(checkpoints, names)
    L, runs = min(checkpoint["config"]["block_size"] for checkpoint in checkpoints), []
    edges = bucket_edges(L, args.max_factor)
    # some of the 32 windows that eval_extrapolation.py scores
    windows = document_windows(ids, tokenizer.end_of_document, edges[-1], 32)
    windows = windows[::max(1, len(windows) // args.windows)][:args.windows]
    for name, checkpoint in zip(names, checkpoints):
        runs.append({"name": name, "seed": checkpoint["args"]["seed"], "iter": checkpoint["iter"],
                     "args": checkpoint["args"], "config": checkpoint["config"],
                     "changes": score(load_model(checkpoint), windows, edges)})
        print(f"{name}: complete", flush=True)
    groups = output.mean_over_seeds(runs, output.names_of(checkpoints), "changes")
    return {"device": f"cpu ({torch.get_num_threads()} threads)", "max_factor": args.max_factor,
            "windows": len(windows), "block_size": L, "dataset_sha256": text_sha256,
            "groups": groups, "runs": runs}


def print_group(group):
    rows = {}
    for name, change in group["changes"].items():
        key = "nll" if name == "nothing" else "above"
        numbers = [(row[key], row[f"{key}_stderr"]) for row in change["ranges"]]
        numbers.append((change["removed"], change["removed_stderr"]))
        rows[name] = [report.format_cell(*number) for number in numbers]
    columns = [f"[{row['start']:,}, {row['end']:,})" for row in change["ranges"]]
    report.print_table(
        f"{group['name']}, seeds {group['seeds']}: loss with nothing changed, then what each "
        "change adds, in nats per token, and the share of the rise that it removes, ± standard "
        "error over seeds (over windows if there is one)", [*columns, "removed"], rows)


def make_parser():
    parser = flags.ArgumentParser("Why the loss rises beyond the trained context: causes removed.")
    add = parser.add_argument
    add("command", choices=["score"])
    add("runs", nargs="+", metavar="OUT_DIR", help="folders of runs")
    add("--max_factor", type=flags.positive, default=16, help="longest context, in multiples of "
        "block_size")
    add("--windows", type=int, choices=(1, 2, 4, 8, 16, 32), default=16, help="windows to average "
        "over, of the 32 that eval_extrapolation.py scores")
    add("--json", metavar="FILE", help="write the results to this file")
    parser.set_defaults(plot=None)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    report.check_outputs(args)
    result = score_runs(args)
    if args.json:
        report.write_json(args.json, "-m experiments.causes", output.rounded(result, 5))
    for group in result["groups"]:
        print_group(group)


if __name__ == "__main__":
    flags.run(main)
