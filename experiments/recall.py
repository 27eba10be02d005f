"""
Does a model find again what it has read, further back than it was trained for? Perplexity cannot tell: an encoding
that looks at nothing but the last few tokens keeps it flat.

    python -m experiments.recall --json recall.json --plot recall.png     train small models on two tasks and test them
    python -m experiments.recall out/rope out/hope --json recall_text.json --plot recall_text.png

The tasks, of n tokens each, where filler makes up the length (^ start, . filler, | separator; letters are
drawn anew for each sequence, out of 32 and without repetition):

    copy       ^ c a f b . . . . . . . . . | c a f b        the same again; answers underlined below
                                             = = = =
    binding    ^ c a f b e d . . . . . . . | f b            the second letter of one of the pairs c a, f b, e d
                                               =
    decoy      ^ c a f b e d . . . . . h g | f b            the same, and another pair stands nearer

One model of each encoding learns copy and binding at once, half of each batch, from sequences of even length up to L;
decoys are only tested. Tests have odd lengths up to 16 L, and the same 4 to 8 letters or 3 to 6 pairs at any length:
what grows is the way back to them. In training all pairs are asked for, in random order; in the tests one is.

With runs' folders as arguments it asks language models instead: a passage of held-out text, other text, the passage
again. How much better is it predicted than the same passage at the same place, read there for the first time?
"""
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch.nn import functional as F

import cli
from eval_extrapolation import bucket_edges, choose_text, document_windows, import_pyplot
from experiments.output import add_output_arguments, check_outputs, run_names, save_picture, write_json
from model import GPT, PE, GPTConfig, load_checkpoint
from train import learning_rate_at, make_optimizer

# ---------------------------------------------------------------------------------------------------------------
# Tasks: size, length, generator -> tokens (B, length) and targets (B, length), -1 where no answer is asked for


LETTERS = 32
FILLER, SEPARATOR, START = range(LETTERS, LETTERS + 3)
VOCAB_SIZE = START + 1
COPIED, BOUND = range(4, 9), range(3, 7)                  # how many letters are copied, how many pairs there are
SHORTEST = 2 + 4 * max(BOUND)                             # the shortest sequence with room for every task


def choose(options, generator):
    return options[torch.randint(len(options), (), generator=generator)]


def distinct(size, count, generator):
    """count different letters in random order, for each of size sequences (B, count)."""
    return torch.rand(size, LETTERS, generator=generator).argsort(dim=1)[:, :count]


def with_targets(tokens, answers):
    """Tokens (B, length + 1), the places of the answers among them -> inputs and targets (B, length) each."""
    targets = torch.full_like(tokens, -1)
    targets[:, answers] = tokens[:, answers]
    return tokens[:, :-1], targets[:, 1:]


def copy_task(size, length, generator):
    """-> tokens and targets; the answers are the last 4 to 8."""
    count = choose(COPIED, generator)
    letters = distinct(size, count, generator)
    tokens = torch.full((size, length + 1), FILLER)
    tokens[:, 0], tokens[:, length - count] = START, SEPARATOR
    tokens[:, 1:count + 1] = tokens[:, length - count + 1:] = letters
    return with_targets(tokens, range(length - count + 1, length + 1))


def binding_task(size, length, generator, n_asked=None, decoy=False):
    """-> tokens and targets; n_asked of the pairs (all, if not given) are asked for at the end, in random order."""
    count = choose(BOUND, generator)
    pairs = distinct(size, 2 * count + 2, generator).view(size, count + 1, 2)  # one more, for the decoy
    order = torch.rand(size, count, generator=generator).argsort(dim=1)[:, :n_asked]
    asked = pairs[torch.arange(size)[:, None], order].flatten(1)                          # (B, 2 n_asked)
    tokens = torch.full((size, length + 1), FILLER)
    first = length + 1 - asked.size(1)                    # place of the first question
    tokens[:, 0], tokens[:, first - 1] = START, SEPARATOR
    tokens[:, 1:2 * count + 1] = pairs[:, :count].flatten(1)
    tokens[:, first:] = asked
    if decoy:
        tokens[:, first - 3:first - 1] = pairs[:, count]
    return with_targets(tokens, range(first + 1, length + 1, 2))


def mean_over(options, probability):
    return sum(map(probability, options)) / len(options)


# Name -> the task as it is tested; what a guesser gets who knows which answers the text holds but not where: for copy
# the letters that have not come yet, else the second letters of all pairs. A blind one gets 1 / 32.
TASKS = {
    "copy": (copy_task, mean_over(COPIED, lambda n: sum(1 / i for i in range(1, n + 1)) / n)),
    "binding": (lambda *args: binding_task(*args, n_asked=1), mean_over(BOUND, lambda n: 1 / n)),
    "decoy": (lambda *args: binding_task(*args, n_asked=1, decoy=True), mean_over(BOUND, lambda n: 1 / (n + 1))),
}
LEARNED = 0.95                                            # accuracy inside L from which on longer lengths say something
EXACT_CHANCE = mean_over(COPIED, lambda n: 1 / math.factorial(n))


def generator_for(*numbers):
    """Random numbers that depend on these numbers alone, the same for every encoding."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------
# Training and testing


def train(config, args, device):
    """A model trained on copy and binding; -> model, loss of the last step in nats an answer."""
    torch.manual_seed(args.seed)
    model = GPT(config).to(device).train()
    optimizer = make_optimizer(model, args, device)
    for step in range(args.max_iters):
        generator = generator_for(args.seed, step)
        length = choose(range(SHORTEST, config.block_size + 1, 2), generator)                # even
        halves = [task(args.batch_size // 2, length, generator) for task in (copy_task, binding_task)]
        tokens, targets = (torch.cat(parts).to(device) for parts in zip(*halves))            # (B, length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), loss.item()


def mean_and_stderr(values):
    """Mean of (N,), and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


@torch.no_grad()
def test(model, task, start, end, n_batches, seed, device):
    """Accuracy at odd lengths in (start, end] -> {"accuracy", "exact", "decoy" and their standard errors}.

    exact: share of sequences without a mistake. decoy: share of answers that are the last letter before the separator.
    Sequences of a batch have the same length, so batches are what the error is taken over.
    """
    lengths = range(max(start, SHORTEST) | 1, end + 1, 2)
    if model.transformer.wpe.max_length is not None and end > model.transformer.wpe.max_length:
        return None
    rows = []
    for i in range(n_batches):
        generator = generator_for(seed, end, i)
        tokens, targets = (x.to(device) for x in task(16, choose(lengths, generator), generator))
        answer = model(tokens, targets)[0].argmax(-1)                                        # (B, T)
        asked = targets >= 0
        right = (answer == targets) & asked
        # the token two before the first question's separator; filler, which is no answer, unless there is a decoy
        recent = tokens.gather(1, asked.int().argmax(1, keepdim=True) - 2)                   # (B, 1)
        rows.append([right.sum() / asked.sum(), (right == asked).all(1).float().mean(),
                     ((answer == recent) & asked).sum() / asked.sum()])
    bucket = {"start": start, "end": end}
    for name, values in zip(("accuracy", "exact", "decoy"), torch.tensor(rows).T):
        bucket[name], bucket[f"{name}_stderr"] = mean_and_stderr(values)
    return bucket



def train_and_test(pe, args, device):
    """One encoding -> its run, as the JSON holds it."""
    torch.set_num_threads(1)                              # so small a network gains nothing from a second one
    edges = bucket_edges(args.block_size, args.max_factor)
    config = GPTConfig(pe=pe, vocab_size=VOCAB_SIZE, **{name: getattr(args, name) for name in SIZES})
    started, cpu = time.time(), time.process_time()
    model, loss = train(config, args, device)
    tasks = {name: [test(model, task, start, end, args.batches, args.seed, device)
                    for start, end in zip(edges, edges[1:])] for name, (task, _) in TASKS.items()}
    inside = ", ".join(f"{name} {buckets[0]['accuracy']:.3f}" for name, buckets in tasks.items())
    print(f"{pe:10} {time.time() - started:5.0f} s   accuracy inside L: {inside}", flush=True)
    return {"name": pe, "pe": pe, "loss": loss, "seconds": time.time() - started,
            "cpu_seconds": time.process_time() - cpu, "tasks": tasks}


def test_encodings(args, device):
    """-> a run for each encoding, --jobs of them at a time."""
    if args.block_size < 2 * SHORTEST:
        raise ValueError(f"--block_size {args.block_size} is too short for the tasks: take {2 * SHORTEST} or more")
    one = partial(train_and_test, args=args, device=device)
    if args.jobs == 1:
        return list(map(one, args.pe))
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(one, args.pe))


# ---------------------------------------------------------------------------------------------------------------
# Language models


@torch.no_grad()
def copy_in_text(model, windows, passage, distance):
    """A passage, the text that follows it, and the passage again distance tokens after its first start.

    windows (N, at least distance + passage). -> accuracy and loss in nats a token: of the passage's "first" reading,
    of its "second", and "unseen", at the same place when other text stood where it was read first; "gain", the loss
    that having read it saves. Its first token, which nothing announces, is left out. None past an encoding's limit.
    """
    limit = model.transformer.wpe.max_length
    if limit is not None and distance + passage > limit:
        return None
    text = windows[:, :distance + passage].clone()                                           # (N, T)
    text[:, distance:] = text[:, :passage]
    other = text.clone()
    other[:, :passage] = windows.roll(1, dims=0)[:, :passage]
    found = {}
    for row, rows in enumerate(zip(text, other)):
        logits, _ = (model(torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:]))             # (2, T - 1, V)
        target = text[row, 1:passage]                                                        # (passage - 1,)
        for name, which, at in (("first", 0, 0), ("second", 0, distance), ("unseen", 1, distance)):
            predicted = logits[which, at:at + passage - 1].float()                           # (passage - 1, V)
            found.setdefault(f"{name}_accuracy", []).append((predicted.argmax(-1) == target).float().mean())
            found.setdefault(f"{name}_loss", []).append(F.cross_entropy(predicted, target))
    found = {name: torch.stack(values) for name, values in found.items()}                    # (N,) each
    found["gain"] = found["unseen_loss"] - found["second_loss"]
    bucket = {"distance": distance, "length": distance + passage}
    for name, values in found.items():
        bucket[name], bucket[f"{name}_stderr"] = mean_and_stderr(values)
    return bucket


def test_language_models(args, device):
    """-> the runs as the JSON holds them, sha256 of the text, chance."""
    checkpoints = [load_checkpoint(path) for path in args.runs]
    ids, source, text_sha256, tokenizer = choose_text(args, checkpoints)
    L = min(checkpoint["config"]["block_size"] for checkpoint in checkpoints)
    passage = L // 4
    distances = [passage, 2 * passage, 3 * passage, *bucket_edges(L, args.max_factor)[1:-1]]
    windows = document_windows(ids, tokenizer.end_of_document, distances[-1] + passage, args.windows).to(device)
    if len(windows) < 2:
        raise ValueError("this text has room for one window only and two are needed: use a longer one or a lower "
                         "--max_factor")
    chance = windows.flatten().bincount().max().item() / windows.numel()
    print(f"{len(windows)} passages of {passage} tokens of {source} (sha256 {text_sha256[:16]}), repeated, on "
          f"{cli.device_name(device)}; L = {L} tokens")
    runs = []
    for name, checkpoint in zip(run_names(args.runs), checkpoints):
        model = GPT.from_checkpoint(checkpoint, attn_scaling=args.attn_scaling).to(device)
        runs.append({"name": name, "pe": checkpoint["config"]["pe"], "block_size": checkpoint["config"]["block_size"],
                     "iter": checkpoint["iter"],
                     "distances": [copy_in_text(model, windows, passage, distance) for distance in distances]})
    return runs, text_sha256, chance, distances


# ---------------------------------------------------------------------------------------------------------------
# Showing it


def print_table(title, columns, rows):
    """rows: name -> a bucket's mean and standard error for each column, or None where there is no value."""
    print(f"\n{title}")
    print(" " * 22 + "".join(column.rjust(16) for column in columns))
    for name, cells in rows.items():
        print(name.ljust(22) + "".join(("-" if cell is None else f"{cell[0]:.3f} ± {cell[1]:.3f}").rjust(16)
                                       for cell in cells))


def cells(buckets, key):
    return [bucket and (bucket[key], bucket[f"{key}_stderr"]) for bucket in buckets]


def print_tasks(runs, edges):
    columns = [f"({start:,}, {end:,}]" for start, end in zip(edges, edges[1:])]
    for name, (_, chance) in TASKS.items():
        rows = {run["name"] + " *" * (run["tasks"][name][0]["accuracy"] < LEARNED):
                cells(run["tasks"][name], "accuracy") for run in runs}
        print_table(f"{name}: accuracy by length, ± standard error; blind guess {1 / LETTERS:.3f}, best guess that "
                    f"ignores order {chance:.3f}", columns, rows)
    print_table(f"copy: share of sequences without a mistake; best guess that ignores order {EXACT_CHANCE:.3f}",
                columns, {run["name"]: cells(run["tasks"]["copy"], "exact") for run in runs})
    print_table("decoy: share of answers that are the decoy's", columns,
                {run["name"]: cells(run["tasks"]["decoy"], "decoy") for run in runs})
    print(f"*: below {LEARNED} inside L: not learned in these steps, so that what happens past L says little")


def print_text(runs, distances, chance):
    columns = [f"{distance:,}" for distance in distances]
    for key, title in (("second_accuracy", f"accuracy on the second reading, by distance from the first in tokens; "
                                           f"most frequent token {chance:.3f}"),
                       ("unseen_accuracy", "accuracy on the same tokens at the same place, read for the first time"),
                       ("gain", "loss in nats a token saved by having read it before"),
                       ("second_loss", "loss on the second reading"), ("first_loss", "loss on the first reading")):
        print_table(title, columns, {run["name"]: cells(run["distances"], key) for run in runs})


def plot_lines(panel, x, runs, rows, chances):
    """A line a run, with a band of a standard error."""
    for i, run in enumerate(runs):
        known = [(at, *cell) for at, cell in zip(x, rows[run["name"]]) if cell is not None]
        at, mean, stderr = torch.tensor(known).T
        color = f"C{i % 10}"
        panel.plot(at, mean, color=color, marker="osD^vPX*<>"[i % 10], markersize=5, label=run["name"])
        panel.fill_between(at, mean - stderr, mean + stderr, color=color, alpha=0.15, linewidth=0)
    for chance in chances:
        panel.axhline(chance, color="gray", linestyle="--", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(x, [f"{at:,}" for at in x])


def plot_tasks(runs, edges, path):
    pyplot = import_pyplot()
    panels = {**{f"{name}: accuracy": (name, "accuracy", (1 / LETTERS, chance)) for name, (_, chance) in TASKS.items()},
              "decoy: share of answers that are the decoy's": ("decoy", "decoy", ())}
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for panel, (title, (name, key, chances)) in zip(axes.flat, panels.items()):
        plot_lines(panel, edges[1:], runs, {run["name"]: cells(run["tasks"][name], key) for run in runs}, chances)
        panel.axvline(edges[1], color="gray", linestyle=":")
        panel.set_ylim(-0.03, 1.03)
        panel.set_title(title)
        panel.set_xlabel("longest sequences of the bucket (tokens); dotted: L, dashed: guessing")
    axes[0, 1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_picture(figure, path)


def plot_text(runs, distances, chance, path):
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.3), layout="constrained")
    for panel, key, chances, title in (
            (axes[0], "second_accuracy", (chance,), "accuracy on the second reading of a passage"),
            (axes[1], "gain", (0,), "loss saved by having read it before (nats a token)")):
        plot_lines(panel, distances, runs, {run["name"]: cells(run["distances"], key) for run in runs}, chances)
        panel.axvline(runs[0]["block_size"], color="gray", linestyle=":")
        panel.set_title(title)
        panel.set_xlabel("distance between the readings (tokens); dotted: L")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_picture(figure, path)


# ---------------------------------------------------------------------------------------------------------------

SIZES = ("block_size", "n_layer", "n_head", "n_embd")


def make_parser():
    parser = cli.ArgumentParser("Recall beyond the trained context: small models trained to copy and to look up, or, "
                                "given runs' folders, language models that meet a passage again.")
    count, amount = cli.number(int, 1), cli.number(float, 0)
    parser.add_argument("runs", nargs="*", metavar="OUT_DIR", help="runs' folders or checkpoints of language models")
    parser.add_argument("--max_factor", type=cli.number(int, 2), default=16,
                        help="longest context, in multiples of block_size")

    add = parser.add_argument_group("tasks (without OUT_DIR)").add_argument
    add("--pe", nargs="+", choices=PE, default=list(PE), metavar="PE", help=f"encodings to train: {', '.join(PE)}")
    add("--seed", type=cli.number(int, 0), default=1, help="decides the sequences and the initial weights")
    add("--block_size", type=count, default=64, help="trained context in tokens, L")
    add("--n_layer", type=count, default=2, help="blocks: one to find the token before, one to look for it")
    add("--n_head", type=count, default=4, help="attention heads a block")
    add("--n_embd", type=count, default=64, help="channels")
    add("--max_iters", type=count, default=2000, help="steps, the same for every encoding")
    add("--batch_size", type=cli.number(int, 2), default=32, help="sequences a step, half of each task")
    add("--learning_rate", type=amount, default=3e-3, help="the highest, after warm-up")
    add("--jobs", type=count, default=1, help="encodings trained at a time, each in a process with one thread")
    add("--batches", type=count, default=16, help="tests of 16 sequences, for each task and range of lengths")
    parser.set_defaults(min_lr=3e-4, warmup_iters=50, weight_decay=0.1, beta1=0.9, beta2=0.99)

    add = parser.add_argument_group("language models (with OUT_DIR)").add_argument
    add("--dataset", help="folder whose validation text is read; the runs' own if not given")
    add("--text", help="read this text file instead")
    add("--windows", type=cli.number(int, 2), default=32, help="passages to average over")
    add("--attn_scaling", default="none", choices=["none", "logn"], help="as in GPTConfig, at the test")
    add_output_arguments(parser, "accuracy by length into this file")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.lr_decay_iters = args.max_iters
    check_outputs(args)
    device = cli.pick_device(args.device)
    if args.runs:
        with cli.autocast(device, cli.pick_dtype(args.dtype, device)):
            runs, text_sha256, chance, distances = test_language_models(args, device)
        print_text(runs, distances, chance)
        result = {"dataset_sha256": text_sha256, "most_frequent_token": chance}
    else:
        # float32 throughout: so small a network is not faster in anything else
        runs, edges = test_encodings(args, device), bucket_edges(args.block_size, args.max_factor)
        print_tasks(runs, edges)
        chances = {name: chance for name, (_, chance) in TASKS.items()}
        result = {"flags": vars(args), "chance_blind": 1 / LETTERS, "chance_without_order": chances,
                  "chance_exact_without_order": EXACT_CHANCE}
    if any(None in row for run in runs for row in (run["tasks"].values() if "tasks" in run else [run["distances"]])):
        print("-: the encoding has no value at these lengths")
    if args.json:
        write_json(args.json, "experiments.recall",
                   {"seed": args.seed, "device": cli.device_name(device), **result, "runs": runs})
    if args.plot and args.runs:
        plot_text(runs, distances, chance, args.plot)
    elif args.plot:
        plot_tasks(runs, edges, args.plot)


if __name__ == "__main__":
    cli.run(main)
