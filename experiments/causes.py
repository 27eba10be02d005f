"""
Why the loss rises beyond the trained context L: three causes, each removed at evaluation from trained models.

    python -m experiments.causes score out/factorial/*seed-* --json causes.json
    python -m experiments.causes noise out/factorial --scores 1.json 2.json 3.json --json noise.json
    python -m experiments.causes train equal @config/cpu_demo --pe hope --n_head 2 --out_dir out/equal
    python -m experiments.causes score out/equal --spacing equal
    python -m experiments.causes heads out/factorial/*seed-1 --json heads.json

Unknown angles. A pair that does not complete a turn within L tokens (a slow pair) meets, beyond L, angles between
query and key that never occurred in training. "angles clamped" gives the slow pairs of keys that are L or more tokens
away the angle of distance L - 1; "angles 0" gives them the angle 0. Fast pairs, and all pairs at smaller distances,
keep theirs. ReRoPE (J. Su) clamps the distance of all pairs in this way.

Dilution. A query at position n >= L compares n + 1 keys. "L keys sampled" lets it see the nearest L / 2, and L / 2 of
the others, drawn at random for each query and layer (heads and windows share the draw). "log-n" multiplies its logits
by ln(n + 1) / ln L. For comparison, "last L keys" removes all that is far: no distance beyond L, no more keys than L.

Noise. The logits of the fast pairs are sums of few waves over distance. Where many of them meet in phase, far tokens
get large logits whatever they say. "fast pairs silent" leaves the fast pairs out of the logits of keys that are L or
more tokens away. `score` gives the highest peak of the mean logit beyond L; `noise` compares it with the rise of the
loss over the models of a study.
`train` trains HoPE with as many pairs between the same slowest and fastest, in another spacing: "equal" steps of
frequency, whose waves all meet again and again; "late", of 1,000 random draws the one whose waves meet least.
train.py and other experiments refuse such a checkpoint; give the spacing again to score it.

`heads` lists the heads of full layers by how much they look at the previous token, within L, and says which pairs
point there (arXiv 2410.06205: the fastest ones).

Runs that the file of `score --json` holds already are kept, and not scored again if neither their flags nor their step
have changed: a command that was killed continues where it was.
All changes act in the full layers only. Shapes: B windows, T tokens, H heads, D channels per head, K rotated pairs.
"""
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F

import train
from common import flags, report
from common.checkpoint import load_checkpoint, load_model
from data.loader import document_windows, text_to_score
from eval_extrapolation import bucket_edges, bucket_mean
from experiments.attention import heads, layer_heads, pairs, placed
from experiments.groups import members_by_group, over_seeds, run_settings, seeds_of
from experiments.sweep import read_runs
from model import PE, ROTARY, HoPE, rotate

# --------------------------------------------------------------------------------------------------
# A forward with explicit logits, in which one thing is changed


@dataclass(frozen=True)
class Change:
    """What is changed in the full layers, for keys that are L or more tokens away and queries that see more than L."""

    slow: str = "true"  # angle of the slow pairs: true, clamped or 0
    silent: bool = False  # the fast pairs are left out
    keys: str = "all"  # that a query sees: all, sampled or last
    logn: bool = False


CHANGES = {
    "nothing": Change(),
    "angles clamped": Change("clamped"),
    "angles 0": Change("0"),
    "fast pairs silent": Change(silent=True),
    "L keys sampled": Change(keys="sampled"),
    "log-n": Change(logn=True),
    "angles clamped, fast pairs silent": Change("clamped", silent=True),
    "angles clamped, L keys sampled": Change("clamped", keys="sampled"),
    "angles clamped, log-n": Change("clamped", logn=True),
    "fast pairs silent, log-n": Change(silent=True, logn=True),
    "all three": Change("clamped", silent=True, keys="sampled"),
    "last L keys": Change(keys="last"),
}


def far_rotations(theta, pos, L, change):
    """(cos, sin) (T, K) for queries and for keys that are far apart: a clamped angle is one for all distances."""
    slow, angle = theta * L < 2 * math.pi, pos[:, None] * theta
    constant = {"clamped": (L - 1) * theta, "0": torch.zeros_like(theta)}.get(change.slow)
    for_q, for_k = (angle, angle) if constant is None else (
        torch.where(slow, constant, angle), torch.where(slow, 0.0, angle))
    heard = slow.float() if change.silent else torch.ones_like(theta)  # (K,)
    return (for_q.cos() * heard, for_q.sin() * heard), (for_k.cos(), for_k.sin())


def sampled_keys(distance, L, generator):
    """Distances (Tq, Tk) -> which keys a query sees: the nearest L / 2 and at most L / 2 of those further back."""
    near = (distance >= 0) & (distance < L // 2)
    draw = torch.rand(distance.shape, generator=generator).masked_fill(distance < L // 2, -1)
    last_drawn = draw.topk(min(L - L // 2, draw.size(1)), dim=1).values[:, -1:].clamp(min=0)
    return near | (draw >= last_drawn)


def attention(model, attn, x, kind, change, generator, chunk):
    """The attention layer of a kind ("S", "L") on x (B, T, C) -> (B, T, C), changed if it sees everything."""
    config, pe, pos = model.configs[kind], model.encodings[kind], torch.arange(x.size(1))
    L, change = config.block_size, change if kind == "L" else Change()
    window = config.window if kind == "S" else L if change.keys == "last" else 0
    q, k, v = heads(attn, x)
    q, rotary, far_q = q / math.sqrt(q.size(-1)), pe.rotary(pos), None
    scaled = replace(config, attn_scaling="logn") if change.logn else config
    if (scale := model.query_scale(scaled, pos, window, rotary is not None)) is not None:
        q = q * scale
    if rotary is not None:
        if change.slow != "true" or change.silent:
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
            logits = torch.where(distance < L, logits, far_q[:, :, start:end] @ far_k[:, :, oldest:end].mT)
        visible = sampled_keys(distance, L, generator) if change.keys == "sampled" else distance >= 0
        if window:
            visible = visible & (distance < window)
        outputs.append(logits.masked_fill_(~visible, -math.inf).softmax(dim=-1) @ v[:, :, oldest:end])
    return attn.c_proj(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))


def check_encodings(model):
    """Raises ValueError if an encoding acts on the embeddings or adds a bias to the logits."""
    for kind in set(model.config.kinds()):
        if (pe := model.configs[kind].pe) not in ("nope", *ROTARY):
            raise ValueError(f"causes are measured in encodings that rotate, and in nope, not in {pe}")


@torch.no_grad()
def losses_of(model, windows, change, seed=0, batch_size=2, chunk=256):
    """Windows (N, T + 1) -> loss of each predicted token (N, T) under a Change. Raises ValueError for biases."""
    check_encodings(model)
    losses = []
    for rows in windows.split(batch_size):
        generator, x = torch.Generator().manual_seed(seed), model.transformer.wte(rows[:, :-1])
        for block, kind in zip(model.transformer.h, model.config.kinds()):
            x = x + attention(model, block.attn, block.ln_1(x), kind, change, generator, chunk)
            x = x + block.mlp(block.ln_2(x))
        logits = model.lm_head(model.transformer.ln_f(x))
        losses.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    return torch.cat(losses)


def changes_of(model):
    """The Changes that differ for a model, by name: without slow pairs, or with log-n scaling, some are the same."""
    theta, found = getattr(model.encodings["L"], "theta", torch.empty(0)), {}
    slow = theta * model.config.block_size < 2 * math.pi
    for name, change in CHANGES.items():
        change = replace(change, slow=change.slow if slow.any() else "true", silent=change.silent and not slow.all(),
                         logn=change.logn and model.config.attn_scaling == "none")
        found.setdefault(change, name)
    return {name: change for change, name in found.items()}


def score(model, windows, edges):
    """-> {change: its ranges}: loss, and what it is above that without a change, both with errors over windows."""
    losses, result = {}, {}
    for name, change in changes_of(model).items():
        losses[name] = losses_of(model, windows, change)
        result[name] = []
        for start, end in zip(edges, edges[1:]):
            nll, stderr = bucket_mean(losses[name], start, end)
            above, above_stderr = bucket_mean(losses[name] - losses["nothing"], start, end)
            result[name].append({"start": start, "end": end, "nll": nll, "stderr": stderr, "above": above,
                                 "above_stderr": above_stderr})
    return result


# --------------------------------------------------------------------------------------------------
# Noise: where waves meet in phase


def highest_peak(theta, first, last):
    """Frequencies (K,) -> the largest mean of cos(distance theta_j) over distances first <= distance < last."""
    return torch.cos(torch.arange(first, last)[:, None] * theta.double()).mean(dim=1).max().item()


def late(theta, L, n_draws=1000):
    """As many frequencies between the same ends: of random draws the one with the lowest peak in [L / 2, 16 L)."""
    generator, slowest, fastest = torch.Generator().manual_seed(0), theta[-1].log(), theta[0].log()
    draws = torch.rand(n_draws, len(theta) - 2, generator=generator).sort(descending=True).values
    draws = (slowest + (fastest - slowest) * draws).exp()
    candidates = [torch.cat((theta[:1], draw, theta[-1:])) for draw in draws]
    return min(candidates, key=lambda candidate: highest_peak(candidate, L // 2, 16 * L))


SPACINGS = {"equal": lambda theta, L: torch.linspace(theta[0], theta[-1], len(theta)), "late": late}


def spaced(spacing):
    """HoPE with as many pairs between the same slowest and fastest, in another spacing. Raises ValueError for two.

    Checkpoints hold its frequencies, as a buffer, so that HoPE with its own refuses them."""
    class Spaced(HoPE):
        def __init__(self, config):
            super().__init__(config)
            if len(self.theta) < 3:
                raise ValueError(f"HoPE rotates {len(self.theta)} pairs here, and both ends stay: give it larger heads")
            theta = self.theta
            del self.theta
            self.register_buffer("theta", SPACINGS[spacing](theta, config.block_size))

    return Spaced


@torch.no_grad()
def peaks(model, windows, max_factor=16):
    """How high the mean logit of the fast pairs rises beyond L, from what queries and keys are within L.

    windows (N, at least L). For each full layer and head: the mean query and the mean key, before rotation, over tokens
    of [0, L); the mean logit of a key at each distance if the two do not depend on each other; its highest value in
    [L, max_factor L) minus its mean in [0, L), divided by the standard deviation of the logits in [0, L).
    -> the mean over layers and heads; 0 if no fast pair rotates.
    """
    check_encodings(model)
    L, found, theta = model.config.block_size, [], getattr(model.encodings["L"], "theta", torch.empty(0))
    theta = theta[theta * L >= 2 * math.pi]  # (F,)
    if len(theta) == 0:
        return 0.0
    n_pairs, K = model.config.n_embd // model.config.n_head // 2, len(theta)
    turn = torch.exp(1j * torch.arange(max_factor * L)[:, None] * theta.double())  # (distances, F)
    seen = torch.ones(L, L, dtype=torch.bool).tril()
    for kind, (q, k, _, positions) in zip(model.config.kinds(), layer_heads(model, windows[:, :L])):  # (N, H, L, D)
        if kind == "L":
            mean_q, mean_k = (torch.complex(t[..., :K], t[..., n_pairs:n_pairs + K]).mean(dim=(0, 2)) for t in (q, k))
            mean = (mean_q * mean_k.conj() * turn[:, None]).real.sum(dim=-1)  # (distances, H)
            logits = rotate(q, *positions.rotary) @ rotate(k, *positions.rotary).mT  # (N, H, L, L)
            std = torch.stack([logits[:, head][:, seen].std() for head in range(logits.size(1))])
            found.append((mean[L:].max(dim=0).values - mean[:L].mean(dim=0)) / std)
    return torch.stack(found).mean().item()


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks. No ties are expected."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


# --------------------------------------------------------------------------------------------------
# Heads that look at the previous token

BANDS = ("turn below 16 tokens", "16 to L", "above L", "not rotated")


@torch.no_grad()
def previous_token_heads(model, windows):
    """windows (N, at least L) -> for each head of a full layer its mean weight on the previous token, and the share of
    each band of pairs in the mean logit of the previous token above that of all keys. Queries are at [L / 2, L).
    """
    check_encodings(model)
    L, found, theta = model.config.block_size, [], getattr(model.encodings["L"], "theta", torch.empty(0))
    n_pairs = model.config.n_embd // model.config.n_head // 2
    turn = F.pad(2 * math.pi / theta, (0, n_pairs - len(theta)), value=math.inf)  # (P,) tokens
    band = torch.where(turn < 16, 0, torch.where(turn <= L, 1, torch.where(turn.isfinite(), 2, 3)))
    rows = torch.arange(L // 2, L)
    seen, at = torch.arange(L) <= rows[:, None], torch.arange(len(rows))
    for layer, (q, k, _, positions) in enumerate(layer_heads(model, windows[:, :L]), 1):
        if model.config.kinds()[layer - 1] == "L":
            q, k = placed(q, k, positions)
            q, k = pairs(q[:, :, rows] / math.sqrt(q.size(-1))), pairs(k)
            by_pair = torch.einsum("nhqcp,nhkcp->hnqkp", q, k)  # (H, N, Tq, L, P)
            weights = by_pair.sum(-1).masked_fill(~seen, -math.inf).softmax(-1)  # (H, N, Tq, L)
            mean = (by_pair * seen[..., None]).sum(3) / seen.sum(1)[:, None]  # (H, N, Tq, P) of all keys
            above = (by_pair[:, :, at, rows - 1] - mean).mean((1, 2))  # (H, P)
            for head in range(len(above)):
                shares = torch.zeros(len(BANDS)).index_add(0, band, above[head] / above[head].sum())
                found.append({"layer": layer, "head": head + 1, "weight": weights[head][:, at, rows - 1].mean().item(),
                              "logit": above[head].sum().item(), "shares": shares.tolist()})
    return found


# --------------------------------------------------------------------------------------------------
# Commands

SCORED = 32  # windows, by default of eval_extrapolation.py
DIGITS = 5  # in the JSON


def text_windows(args, folders):
    """-> checkpoints, windows, edges, and what they were scored on, as the JSON says it: of the 32 windows that
    eval_extrapolation.py scores, or of as many as the text has room for, the number of --windows, spread evenly."""
    checkpoints = [load_checkpoint(folder) for folder in folders]
    ids, _, text_sha256, tokenizer = text_to_score(checkpoints, report.run_names(folders))
    edges = bucket_edges(min(checkpoint["config"]["block_size"] for checkpoint in checkpoints), args.max_factor)
    windows = document_windows(ids, tokenizer.end_of_document, edges[-1], SCORED)
    windows = windows[::max(1, len(windows) // args.windows)][:args.windows]
    return checkpoints, windows, edges, {
        "spacing": args.spacing, "max_factor": args.max_factor, "windows": len(windows), "block_size": edges[1],
        "dataset_sha256": text_sha256}


def groups_of(runs):
    """Runs -> [(name, runs)], in groups that differ in their seed alone. Raises ValueError if a seed occurs twice."""
    groups = members_by_group(runs, [run_settings(run["args"], run["config"]) for run in runs])
    groups = [(name, [run for run, _ in members]) for name, members in groups]
    for _, members in groups:
        seeds_of(members)
    return groups


def mean_changes(runs):
    """Scored runs -> for each group and change, means and standard errors over seeds.

    "removed" is the share of the rise of the loss, from the first range to the last, that a change removes.
    """
    groups = []
    for group, members in groups_of(runs):
        changes = {}
        for name in members[0]["changes"]:
            scored = [run["changes"][name] for run in members]
            removed = [-row[-1]["above"] / (before[-1]["nll"] - before[0]["nll"])  # [0, L) has no change
                       for row, before in zip(scored, (run["changes"]["nothing"] for run in members))]
            ranges = [{"start": rows[0]["start"], "end": rows[0]["end"],
                       **over_seeds("nll", [row["nll"] for row in rows], "stderr"),
                       **over_seeds("above", [row["above"] for row in rows], "stderr")} for rows in zip(*scored)]
            changes[name] = {"ranges": ranges, **over_seeds("removed", removed, "stderr")}
        groups.append({"name": group, "seeds": seeds_of(members),
                       **over_seeds("peak", [run["peak"] for run in members], "stderr"), "changes": changes})
    return groups


def show_groups(groups):
    columns = [*(f"[{row['start']:,}, {row['end']:,})" for row in groups[0]["changes"]["nothing"]["ranges"]), "removed"]
    for group in groups:
        rows = {}
        for name, change in group["changes"].items():
            key = "nll" if name == "nothing" else "above"
            rows[name] = [report.format_cell(row[key], row[f"{key}_stderr"]) for row in change["ranges"]]
            rows[name].append(report.format_cell(change["removed"], change["removed_stderr"], 2))
        peak = report.format_cell(group["peak"], group["peak_stderr"], 2)
        print(f"\n{group['name']}, seeds {group['seeds']}, highest peak {peak}")
        report.print_table("loss with nothing changed, then what each change adds, in nats per token, and the share of "
                           "the rise that it removes, ± standard error over seeds", columns, rows)


def write(args, scored_on, runs, **found):
    """Write --json, if it is given."""
    if args.json:
        report.write_json(args.json, "-m experiments.causes", {
            "device": f"cpu ({torch.get_num_threads()} threads)", **scored_on,
            "seeds": sorted({run["seed"] for run in runs}), **found, "runs": runs}, DIGITS)


def earlier_runs(path, scored_on):
    """The runs that the file of --json holds already, if they were scored on the same windows. Raises ValueError if the
    file is another one."""
    if not (path and Path(path).exists()):
        return []
    found = report.read_json(path, "runs", ("args", "config", "changes"), "this version of experiments.causes score")
    return found["runs"] if scored_on.items() <= found.items() else []


def score_command(args):
    checkpoints, windows, edges, scored_on = text_windows(args, args.runs)
    named = [report.rounded({"name": name, "seed": checkpoint["args"]["seed"], "iter": checkpoint["iter"],
                             "args": checkpoint["args"], "config": checkpoint["config"]}, DIGITS)
             for name, checkpoint in zip(report.run_names(args.runs), checkpoints)]
    by_name = {run["name"]: run for run in named}
    runs = {run["name"]: run for run in earlier_runs(args.json, scored_on)
            if by_name.get(run["name"], {}).items() <= run.items()}  # as it is now, or not named
    groups_of([*(runs | by_name).values()])  # before the work: is a seed there twice?
    for run, checkpoint in zip(named, checkpoints):
        if run["name"] not in runs:
            model = load_model(checkpoint)
            runs[run["name"]] = run | {"peak": peaks(model, windows, args.max_factor),
                                       "changes": score(model, windows, edges)}
            done = list(runs.values())  # written after each run, since many take long
            write(args, scored_on, done, groups=mean_changes(done))
        print(f"{run['name']}: done", flush=True)
    show_groups(mean_changes(list(runs.values())))


def correlations(rows):
    """Peaks and rises of models -> their rank correlation in each seed, over all encodings and for each."""
    found = []
    for pe in (None, *dict.fromkeys(row["pe"] for row in rows)):
        for seed in sorted({row["seed"] for row in rows}):
            some = [row for row in rows if row["seed"] == seed and pe in (None, row["pe"])]
            if len(some) > 2:
                value = rank_correlation([row["peak"] for row in some], [row["rise"] for row in some])
                found.append({"pe": pe or "all", "seed": seed, "models": len(some), "rank_correlation": value})
    return found


def noise_command(args):
    """Peaks of all scored models that rotate and have no windows, and the rise of their loss."""
    if not args.scores or len(args.runs) > 1:
        raise ValueError("noise takes the folder that holds the runs, and --scores with their losses")
    scored = [run for run in read_runs(args.scores) if run["attn_scaling"] == "none" and run["pe"] in ROTARY
              and "S" not in run["config"]["window_pattern"]]
    if not scored:
        raise ValueError("--scores holds no run that rotates, without windows and log-n scaling")
    checkpoints, windows, _, scored_on = text_windows(args, [Path(args.runs[0]) / run["name"] for run in scored])
    rows = [{"name": run["name"], "pe": run["pe"], "seed": run["seed"],
             "peak": peaks(load_model(checkpoint), windows, args.max_factor),
             "rise": run["buckets"][-1]["nll"] - run["buckets"][0]["nll"]}
            for run, checkpoint in zip(scored, checkpoints)]
    found = correlations(rows)
    report.print_table("highest peak beyond L, in standard deviations of the logits, and rise of the loss from the "
                       "first range to the last", ["peak", "rise"],
                       {row["name"]: [f"{row[key]:.3f}" for key in ("peak", "rise")] for row in rows})
    report.print_table("rank correlation of the two", ["models", "correlation"], {
        f"{row['pe']}, seed {row['seed']}": [str(row["models"]), f"{row['rank_correlation']:.2f}"] for row in found})
    write(args, scored_on, rows, correlations=found)


def heads_command(args):
    checkpoints, windows, _, scored_on = text_windows(args, args.runs)
    runs = []
    for name, checkpoint in zip(report.run_names(args.runs), checkpoints):
        rows = sorted(previous_token_heads(load_model(checkpoint), windows), key=lambda row: -row["weight"])
        runs.append({"name": name, "seed": checkpoint["args"]["seed"], "heads": rows})
        report.print_table(f"{name}: heads of full layers; the share of each band in the logit of the previous token",
                           ["weight on it", "its logit", *BANDS], {
            f"layer {row['layer']}, head {row['head']}": [
                f"{value:.2f}" for value in (row["weight"], row["logit"], *row["shares"])] for row in rows})
    write(args, scored_on, runs, bands=BANDS)


COMMANDS = {"score": score_command, "noise": noise_command, "heads": heads_command}


def make_parser():
    parser = flags.ArgumentParser("Why the loss rises beyond the trained context: three causes, each removed.")
    add = parser.add_argument
    add("command", choices=COMMANDS, help="or: train SPACING, followed by the flags of train.py")
    add("runs", nargs="*", metavar="OUT_DIR", help="folders of runs; noise: the folder that holds the scored runs")
    add("--scores", nargs="+", metavar="FILE", help="noise: what eval_extrapolation.py --json wrote")
    add("--spacing", choices=tuple(SPACINGS), help="score: that HoPE was trained with")
    add("--max_factor", type=flags.parsed(int, at_least=2), default=16, help="longest context, in "
        "multiples of block_size")
    add("--windows", type=int, choices=(1, 2, 4, 8, 16, 32), default=16, help="windows to average over, of the 32 that "
        "eval_extrapolation.py scores")
    add("--json", metavar="FILE", help="write the results to this file")
    return parser


def in_spacing(spacing):
    """A context in which "hope" is HoPE with this spacing of its frequencies; None: its own."""
    return patch.dict(PE, hope=spaced(spacing)) if spacing else nullcontext()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        if argv[1:2] not in [[spacing] for spacing in SPACINGS]:
            raise ValueError(f"train what? Write: train {' or '.join(SPACINGS)}, and the flags of train.py")
        with in_spacing(argv[1]):
            train.main(argv[2:])
        return
    args = make_parser().parse_args(argv)
    if not args.runs:
        raise ValueError(f"{args.command} what? Name OUT_DIR, a folder")
    if args.json:
        report.check_output(args.json)
    with in_spacing(args.spacing):
        COMMANDS[args.command](args)


if __name__ == "__main__":
    flags.run(main)
