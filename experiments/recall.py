"""
Does a model find again what it has read, further back than it was trained for? Perplexity does not show this: a model
that looks at nothing but the last few tokens has a flat perplexity.

    python -m experiments.recall --json recall.json --plot recall.png     train small models on two tasks and test them
    python -m experiments.recall --pe rope hope rope:SL:16 hope:SL:16 nope+rope:SL:16 --seed 1 2 3 --jobs 2 --json FILE
    python -m experiments.recall --hard --pe hope kerple --json hard.json --plot hard.png      a harder look-up
    python -m experiments.recall out/rope out/hope --json recall_text.json --plot recall_text.png

A task is to copy letters or to look one up; experiments/tasks.py shows all of them. One model per encoding and seed
learns copy and binding, or match (--hard), from sequences of even length up to L. Tests have odd lengths up to 16 L.

--pe names encodings or arrangements of layers (experiments/groups.py). A command that was killed continues where it
was if it is given again with the same --json.

With runs' folders as arguments, language models are tested instead: a passage of held-out text, other text, the
passage again. How much better is it predicted than the same passage at the same position, read for the first time?
There, another window's passage stands in place of the first reading. A needle is a passage with its tokens shuffled;
in place of its first reading stands another needle. So the gain does not count what any needle tells: that shuffled
text occurs. A needle's first half tells which one it is, and predictions of its second half are scored.

Shapes: B sequences, T tokens, N windows, V size of the vocabulary.
"""
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch.nn import functional as F

from common import flags, report
from common.checkpoint import load_checkpoint, load_model, replacing
from common.device import Device, DeviceConfig, check_computation
from common.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from data.loader import add_text_flags, document_windows, text_to_score
from eval_extrapolation import bucket_edges
from experiments.curves import draw_line, token_axis
from experiments.groups import fields_of, in_words, mean_rows, members_by_group, name_of, run_settings
from experiments.tasks import (
    EASY,
    EXACT_CHANCE,
    HARD,
    LETTERS,
    ONLY_TESTED,
    SEPARATOR,
    VOCAB_SIZE,
    choose,
    generator_for,
    pick,
)
from model import GPT, PE, GPTConfig, KVCache
from train import TrainConfig

LEARNED = 0.95  # accuracy inside L below which a model has not learned the task


def tasks_of(args):
    return HARD if args.hard else EASY


def mean_over_seeds(runs, settings):
    """Runs and the settings of each -> the mean of each group of runs that differ in their seed alone, with standard
    errors over seeds. Several checkpoints of one run are no seeds: the runs then stay as they are."""
    members, means = members_by_group(runs, settings), []
    for name, group in members:
        same, seeds = [run for run, _ in group], [its["seed"] for _, its in group]
        if len(set(seeds)) < len(seeds):
            return runs
        means.append({"name": name if len(members) < len(runs) else same[0]["name"], "pe": same[0]["pe"],
                      "seeds": seeds, **{key: mean_rows([run[key] for run in same])
                                         for key in ("tasks", "distances", "needles") if key in same[0]}})
    return means


# --- Training and testing ---------------------------------------------------------------------------------------------


def optimizer_config(args):
    config = OptimizerConfig(**{field.name: getattr(args, field.name) for field in fields(OptimizerConfig)})
    config.lr_decay_iters = config.lr_decay_iters or args.max_iters
    return config


def train(config, args, seed, device):
    """-> a model trained on the tasks, and the loss of its last step in nats per answer."""
    torch.manual_seed(seed)
    model, schedule, tasks = GPT(config).to(device).train(), optimizer_config(args), tasks_of(args)
    optimizer = make_optimizer(model, schedule, device)
    for step in range(args.max_iters):
        generator = generator_for(seed, step)
        length = choose(range(tasks.shortest, config.block_size + 1, 2), generator)  # even
        shares = [task(args.batch_size // len(tasks.trained), length, generator) for task in tasks.trained]
        tokens, targets = (torch.cat(parts).to(device) for parts in zip(*shares))  # (B, length)
        set_learning_rate(optimizer, step, schedule)
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), loss.item()


def most_likely(model, tokens, targets, chunk=1024):
    """Tokens (B, T) -> the model's choice of each next token (B, T). Long sequences pass in chunks, to save memory."""
    length = tokens.size(1)
    cache = KVCache(length) if length > chunk else None
    return torch.cat([model(tokens[:, at:at + chunk], targets[:, at:at + chunk], cache)[0].argmax(-1)
                      for at in range(0, length, chunk)], dim=1)


@torch.no_grad()
def test(model, task, start, end, n_batches, seed, device, shortest):
    """Accuracy at odd lengths in (start, end], from `shortest` on -> {"accuracy", "exact", "decoy" and their standard
    errors}, or None if the encoding is undefined there.

    exact: share of sequences without a mistake. decoy: share of answers that are the last letter before the separator.
    The standard errors are over batches, since the sequences of a batch have the same length."""
    lengths = range(max(start + 1, shortest) | 1, end + 1, 2)
    if model.transformer.wpe.max_length is not None and end > model.transformer.wpe.max_length:
        return None
    rows = []
    for i in range(n_batches):
        generator = generator_for(seed, end, i)
        tokens, targets = (x.to(device) for x in task(16, choose(lengths, generator), generator))
        answer = most_likely(model, tokens, targets)  # (B, T)
        asked = targets >= 0
        right = (answer == targets) & asked
        # the last token before the separator: a letter in a crowd or if there is a decoy, else mostly filler
        recent = tokens.gather(1, (tokens == SEPARATOR).int().argmax(1, keepdim=True) - 1)  # (B, 1)
        rows.append([right.sum() / asked.sum(), (right == asked).all(1).float().mean(),
                     ((answer == recent) & asked).sum() / asked.sum()])
    bucket = {"start": start, "end": end}
    for name, values in zip(("accuracy", "exact", "decoy"), torch.tensor(rows).T):
        bucket[name], bucket[f"{name}_stderr"] = report.mean_and_stderr(values)
    return bucket


def train_and_test(config, seed, args, device):
    """One network and seed -> its run, as the JSON holds it. In float32: so small a network gains nothing from less."""
    torch.set_num_threads(1)  # nor from a second thread
    edges, name = bucket_edges(args.block_size, args.max_factor), name_of(config)
    started, cpu = time.time(), time.process_time()
    model, loss = train(config, args, seed, device)
    suite = tasks_of(args)
    tasks = {task: [test(model, make, start, end, args.batches, seed, device, suite.shortest)
                    for start, end in zip(edges, edges[1:])]
             for task, (make, _) in suite.tested.items()}
    inside = ", ".join(f"{task} {buckets[0]['accuracy']:.3f}" for task, buckets in tasks.items())
    print(f"{name:16} seed {seed}   {time.time() - started:5.0f} s   accuracy inside L: {inside}", flush=True)
    return {"name": name, "pe": config.pe, "seed": seed, "config": asdict(config), "loss": loss,
            "seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu, "tasks": tasks}


def end_with_parent():
    """A process of side_by_side ends at Ctrl-C, without a word, and when its parent has ended in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def side_by_side(function, work, jobs):
    """Yield (key, function(*arguments)) for each item of a dict {key: arguments}.

    jobs > 1: so many at a time, in processes of their own, each as soon as it is done. If one fails, its exception is
    raised after the others are done. The processes end if the caller stops."""
    if jobs == 1 or not work:
        yield from ((key, function(*arguments)) for key, arguments in work.items())
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(function, *arguments): key for key, arguments in work.items()}
        try:
            for future in as_completed(futures):
                if not future.exception():
                    yield futures[future], future.result()
        except BaseException:  # KeyboardInterrupt and GeneratorExit, too
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    for future in futures:
        future.result()  # raises what failed first in the order of the work


def finished(path):
    """The file of a command that was interrupted -> its runs by key. Raises ValueError if it is damaged."""
    with suppress(ValueError):  # no JSON, or no UTF-8
        done = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(done, dict):
            return done
    raise ValueError(f"{path}, finished models of an interrupted command, is damaged: delete it to train them again")


def train_and_test_all(args, device):
    """-> the run of each network and seed. Finished ones are kept in a file beside --json until all are done."""
    least = 3 * tasks_of(args).shortest // 2  # so that training has sequences of several lengths
    if args.block_size < least:
        raise ValueError(f"--block_size {args.block_size} is too short for the tasks: use {least} or more")
    args.attn_scaling = args.attn_scaling or "none"
    common = {name: getattr(args, name) for name in (*NETWORK, "attn_scaling")}
    networks = [GPTConfig(vocab_size=VOCAB_SIZE, **{**common, **fields_of(pe)}) for pe in args.pe]
    settings = {name: value for name, value in vars(args).items() if name not in (*NETWORK, "pe", "seed", *NO_SETTING)}
    jobs = {json.dumps([asdict(config), seed, settings]): (config, seed) for config in networks for seed in args.seed}
    kept = Path(f"{args.json}.partial") if args.json else None
    done = finished(kept) if kept and kept.exists() else {}
    missing = [key for key in jobs if key not in done]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} models are in {kept}")
    work = {key: (*jobs[key], args, device) for key in missing}
    with closing(side_by_side(train_and_test, work, args.jobs)) as runs:
        for key, run in runs:
            done[key] = run
            if kept:
                with replacing(kept) as file:
                    file.write(json.dumps(done).encode())
    return [done[key] for key in jobs]


# --- Language models --------------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_in_text(model, windows, passages, distance, scored_from=1):
    """A passage, text, and the passage again, starting `distance` tokens after its first start.

    windows (N, at least distance + P): text, which passages (N, P) replace at both places -> accuracy, and loss in nats
    per token: of the passage's "first" reading, of its "second", and "unseen", at the same position if the passage of
    another row replaces the first reading; "gain", the loss saved by the first reading. Tokens of the passage before
    scored_from are not counted; nothing announces the first one. N is 2 or more. None beyond an encoding's limit."""
    limit, passage = model.transformer.wpe.max_length, passages.size(1)
    if limit is not None and distance + passage > limit:
        return None
    text = windows[:, :distance + passage].clone()  # (N, T)
    text[:, :passage] = text[:, distance:] = passages
    other = text.clone()
    other[:, :passage] = passages.roll(1, dims=0)  # of the same kind
    found = {}
    for row, rows in enumerate(zip(text, other)):
        logits, _ = model(torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:])  # (2, T - 1, V)
        target = passages[row, scored_from:]  # (P - scored_from,)
        for name, which, at in (("first", 0, 0), ("second", 0, distance), ("unseen", 1, distance)):
            predicted = logits[which, at + scored_from - 1:at + passage - 1].float()  # (P - scored_from, V)
            found.setdefault(f"{name}_accuracy", []).append((predicted.argmax(-1) == target).float().mean())
            found.setdefault(f"{name}_loss", []).append(F.cross_entropy(predicted, target))
    found = {name: torch.stack(values).cpu() for name, values in found.items()}  # (N,) each; MPS has no float64
    found["gain"] = found["unseen_loss"] - found["second_loss"]
    bucket = {"distance": distance, "length": distance + passage}
    for name, values in found.items():
        bucket[name], bucket[f"{name}_stderr"] = report.mean_and_stderr(values)
    return bucket


def passages_to_repeat(args, checkpoints, names, device):
    """-> windows (N, T), passages (N, P), needles (N, P), distances between their two readings, the text's sha256."""
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text, args.meta)
    L = min(checkpoint["config"]["block_size"] for checkpoint in checkpoints)
    passage = L // 4
    if passage < 2:
        raise ValueError(f"block_size {L} is too short: a passage is a quarter of it and needs 2 tokens or more")
    distances = [passage, 2 * passage, 3 * passage, *bucket_edges(L, args.max_factor)[1:-1]]
    windows = document_windows(ids, tokenizer.end_of_document, distances[-1] + passage, args.windows).to(device)
    if len(windows) < 2:
        raise ValueError("the text has room for one window only, and two are needed: use a longer one or a lower "
                         "--max_factor")
    print(f"{len(windows)} passages of {passage} tokens of {source} (sha256 {text_sha256[:16]}), repeated; L = {L} "
          "tokens")
    passages = windows[:, :passage]
    shuffled = torch.rand(passages.shape, generator=generator_for(L)).argsort(dim=1).to(device)
    return windows, passages, pick(passages, shuffled), distances, text_sha256


def test_language_models(args, device):
    """-> the result, as the JSON holds it."""
    checkpoints, names, runs = [load_checkpoint(path) for path in args.runs], report.run_names(args.runs), []
    scaling = {"attn_scaling": args.attn_scaling} if args.attn_scaling else {}  # else as the checkpoint has it
    windows, passages, needles, distances, text_sha256 = passages_to_repeat(args, checkpoints, names,
                                                                            device.torch_device)
    for name, checkpoint in zip(names, checkpoints):
        model = load_model(checkpoint, **scaling).to(device.torch_device)
        check_computation(model, device)
        with device.autocast():
            found = {"distances": [copy_in_text(model, windows, passages, distance) for distance in distances],
                     "needles": [copy_in_text(model, windows, needles, distance, passages.size(1) // 2)
                                 for distance in distances]}
        runs.append({"name": name, "pe": checkpoint["config"]["pe"], "block_size": checkpoint["config"]["block_size"],
                     "iter": checkpoint["iter"], **found})
    chance = windows.flatten().bincount().max().item() / windows.numel()
    means = mean_over_seeds(runs, [run_settings(checkpoint["args"], checkpoint["config"])
                                   for checkpoint in checkpoints])
    return {"dataset_sha256": text_sha256, "most_frequent_token": chance, "distances": distances, "runs": runs,
            "means": means}


# --- Report: a bucket is None if the encoding is undefined there ------------------------------------------------------


def cells(buckets, key):
    return [report.format_cell(bucket[key], bucket[f"{key}_stderr"]) if bucket else "-" for bucket in buckets]


def print_tasks(runs, means, edges, suite):
    """Tables of accuracy by length: of each run and of the means over seeds, if there are several seeds."""
    columns = [f"({start:,}, {end:,}]" for start, end in zip(edges, edges[1:])]
    several = len(means) < len(runs)
    each = {f"{run['name']}, seed {run['seed']}" if several else run["name"]: run for run in runs}
    if several:
        each |= {f"{mean['name']}, mean of {len(mean['seeds'])}": mean for mean in means}
    for task, (_, chance) in suite.tested.items():
        lowest = 0 if task in ONLY_TESTED else LEARNED
        rows = {name + " *" * (run["tasks"][task][0]["accuracy"] < lowest): cells(run["tasks"][task], "accuracy")
                for name, run in each.items()}
        report.print_table(f"{task}: accuracy by length, ± standard error; blind guess {1 / LETTERS:.3f}"
                           + (f", best guess {suite.guess} {chance:.3f}" if chance else ""), columns, rows)
    for task, key, title in (
            ("copy", "exact", f"sequences without a mistake; best guess {suite.guess} {EXACT_CHANCE:.3f}"),
            ("decoy", "decoy", "answers that are the decoy's"),
            ("crowd", "decoy", "answers that are the nearest triple's")):
        if task in suite.tested:
            rows = {run["name"]: cells(run["tasks"][task], key) for run in means}
            report.print_table(f"{task}: share of {title}", columns, rows)
    print(f"*: below {LEARNED} inside L: not learned in these steps, so that the accuracy beyond L says little")
    print("± of a run: over batches of test sequences" + "; ± of a mean: over seeds" * several)
    if any(None in row for run in runs for row in run["tasks"].values()):
        print("-: the encoding is undefined at these lengths")


def print_text(runs, distances, chance):
    """Tables of runs, or of means over seeds."""
    columns = [f"{distance:,}" for distance in distances]
    for what, words in (("distances", "passage"), ("needles", "second half of a needle")):
        for key, title in (("second_accuracy", "accuracy on the second reading, by distance from the first in tokens; "
                                               f"most frequent token {chance:.3f}"),
                           ("unseen_accuracy", "accuracy on the same tokens at the same position, read for the first "
                                               "time"),
                           ("gain", "loss in nats per token saved by the first reading")):
            report.print_table(f"{words}: {title}", columns, {run["name"]: cells(run[what], key) for run in runs})
    print("±: standard error over seeds; for a run with one seed, over passages")
    if any(None in run["distances"] for run in runs):
        print("-: the encoding is undefined at these distances")


def plot_lines(panel, runs, rows, x, y, guesses, L):
    """One line per run over its row of buckets, with a band of one standard error, named at its end.

    x, y: keys of a bucket. guesses: the values of dashed lines."""
    ends = []
    for run, style, buckets in zip(runs, report.styles(runs), rows):
        draw_line(panel, buckets, x, y, f"{y}_stderr", **style)
        ends += [(bucket[y], in_words(run["name"]), style["color"]) for bucket in buckets if bucket][-1:]
    for guess in guesses:
        panel.axhline(guess, color="gray", linestyle="--", linewidth=1)
    token_axis(panel, L, sorted({bucket[x] for buckets in rows for bucket in buckets if bucket}))
    report.label_ends(panel, sorted(ends, reverse=True))


def plot_tasks(runs, suite, path):
    panels = [(f"{name}: accuracy", name, "accuracy", [1 / LETTERS] + [chance] * bool(chance))
              for name, (_, chance) in suite.tested.items()]
    if "decoy" in suite.tested:
        panels.append(("decoy: answers that are the decoy's", "decoy", "decoy", ()))
    n_rows = len(panels) // 2
    figure, axes = report.import_pyplot().subplots(n_rows, 2, figsize=(12, 0.4 + 3.9 * n_rows), layout="constrained",
                                                   squeeze=False)
    for panel, (title, name, key, guesses) in zip(axes.flat, panels):
        rows = [run["tasks"][name] for run in runs]
        panel.set(title=title, ylim=(-0.03, 1.03), ylabel="share of answers")
        plot_lines(panel, runs, rows, "end", key, guesses, rows[0][0]["end"])
    figure.supxlabel("length of the sequence, at most (tokens); dotted: L; dashed: a blind guess and, higher, the best "
                     "guess", fontsize="medium")
    report.save_picture(figure, path)


def plot_text(runs, chance, L, path):
    figure, axes = report.import_pyplot().subplots(2, 2, figsize=(12, 8), layout="constrained")
    for column, (what, title) in zip(axes.T, (("distances", "a passage"), ("needles", "a needle: shuffled tokens"))):
        rows = [run[what] for run in runs]
        for panel, key, guess, unit in ((column[0], "second_accuracy", chance, "accuracy on the second reading"),
                                        (column[1], "gain", 0, "nats per token saved by the first reading")):
            plot_lines(panel, runs, rows, "distance", key, [guess], L)
            panel.set(title=title, ylabel=unit)
    figure.supxlabel("distance between the readings (tokens); dotted: L, dashed: guessing", fontsize="medium")
    report.save_picture(figure, path)


NETWORK = ("block_size", "n_layer", "n_head", "n_embd", "rope_base", "prope_fraction", "hope_cutoff", "window_pattern",
           "window", "local_pe", "local_rope_base")
NO_SETTING = ("jobs", "json", "plot", "device", "dtype")  # flags on which the results do not depend


def make_parser():
    parser = flags.ArgumentParser("Recall beyond the trained context: small models trained to copy and to look up or, "
                                  "given runs' folders, language models that read a passage twice.")
    parsed, count = flags.parsed, flags.parsed(int, at_least=1)
    parser.add_argument("runs", nargs="*", metavar="OUT_DIR", help="runs' folders or checkpoints of language models")
    parser.add_argument("--max_factor", type=parsed(int, at_least=2), default=16,
                        help="longest context in multiples of block_size")
    flags.add_flags(parser, GPTConfig, "attn_scaling", default=None)  # None: none or, with OUT_DIR, the checkpoint's

    group = parser.add_argument_group("tasks (without OUT_DIR)")
    group.add_argument("--pe", nargs="+", default=list(PE), metavar="PE", help="networks to train: encodings, "
                       "PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW, such as nope+rope:SSSL:16")
    flags.add_flags(group, GPTConfig, *NETWORK)
    group.add_argument("--hard", action="store_true", help="a look-up with distractors that match in part, in place "
                       "of copy and binding")
    flags.add_flags(group, TrainConfig, "max_iters")
    flags.add_flags(group, TrainConfig, "seed", nargs="+", default=[1])
    names = [field.name for field in fields(OptimizerConfig) if field.name != "learning_rate"]
    flags.add_flags(group, OptimizerConfig, "learning_rate", help="AdamW's, after warm-up")
    flags.add_flags(group, OptimizerConfig, *names)
    group.add_argument("--batch_size", type=parsed(int, at_least=2), default=32,
                       help="sequences per step")
    group.add_argument("--jobs", type=count, default=1, help="models to train at once, each in a process of its own")
    group.add_argument("--batches", type=count, default=16, help="tests of 16 sequences, per task and range of lengths")
    parser.set_defaults(block_size=64, n_layer=2, n_embd=64, max_iters=2000,
                        learning_rate=3e-3, muon_learning_rate=1e-2)

    group = parser.add_argument_group("language models (with OUT_DIR)")
    add_text_flags(group)
    group.add_argument("--windows", type=parsed(int, at_least=2), default=32, help="passages to average over")
    report.add_output_flags(parser, "accuracy by length")
    flags.add_flags(parser, DeviceConfig)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    report.check_outputs(args)
    device = Device(args)
    if args.runs:
        result = test_language_models(args, device)
        print_text(result["means"], result["distances"], result["most_frequent_token"])
    else:
        runs = train_and_test_all(args, device.torch_device)
        means = mean_over_seeds(runs, [run["config"] | {"seed": run["seed"]} for run in runs])
        suite = tasks_of(args)
        print_tasks(runs, means, bucket_edges(args.block_size, args.max_factor), suite)
        guesses = {name: chance for name, (_, chance) in suite.tested.items()}
        result = {"flags": {**vars(args), **asdict(optimizer_config(args))}, "chance_blind": 1 / LETTERS,
                  "chance_in_part": guesses,
                  "chance_exact_without_order": EXACT_CHANCE if "copy" in suite.tested else None,
                  "runs": runs, "means": means}
    if args.json:
        result = {"seed": args.seed, "device": str(device), **result}
        report.write_json(args.json, "-m experiments.recall", result, digits=4)
        Path(f"{args.json}.partial").unlink(missing_ok=True)
    if args.plot and args.runs:
        plot_text(result["means"], result["most_frequent_token"], result["runs"][0]["block_size"], args.plot)
    elif args.plot:
        plot_tasks(result["means"], suite, args.plot)


if __name__ == "__main__":
    flags.run(main)
