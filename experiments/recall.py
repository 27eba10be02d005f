"""
Does a model find again what it has read, further back than it was trained for? Perplexity does not
show this: a model that looks at nothing but the last few tokens has a flat perplexity.

    python -m experiments.recall --json recall.json --plot recall.png
    python -m experiments.recall --pe rope hope hope:SL:16 --seed 1 2 3 --json FILE
    python -m experiments.recall --hard --pe hope kerple --json hard.json --plot hard.png
    python -m experiments.recall out/rope out/hope --json text.json --plot text.png

Without folders of runs, small models are trained and tested: to copy letters and to look one up, or
with --hard to look one up among distractors (experiments/tasks.py shows the tasks). One model per
encoding and seed learns from sequences of even length up to L. Tests have odd lengths up to 16 L.
--pe names encodings or arrangements of layers (experiments/groups.py). A model trains in one
thread: on many cores, give several commands, one per encoding.

With folders of runs, these language models are tested: they read a passage of held-out text, other
text, the passage again. How much better is it predicted than the same passage at the same position,
read for the first time? There, another row's passage stands in place of the first reading. A needle
is a passage with its tokens shuffled; in place of its first reading stands another needle, so that
the gain does not count that shuffled text occurs. The first half of a needle identifies it, and
predictions of its second half are scored.

Shapes: B sequences, T tokens, N windows, P tokens of a passage, V size of the vocabulary.
"""
import time
from contextlib import nullcontext
from dataclasses import asdict, fields

import torch
from torch.nn import functional as F

from common import flags, report
from common.checkpoint import load_checkpoint, load_model
from common.device import Device, DeviceConfig
from common.optimizer import OptimizerConfig, make_optimizers, set_learning_rate
from data.loader import add_text_flags, document_windows, text_to_score
from eval_extrapolation import bucket_edges
from experiments import output
from experiments.bench import training_step
from experiments.groups import fields_of, in_words, name_of
from experiments.tasks import EASY, HARD, LETTERS, VOCAB_SIZE, choose, generator_for, pick
from model import GPT, PE, GPTConfig
from train import TrainConfig

# the arrangement sets the other fields
NETWORK = ("block_size", "n_layer", "n_head", "n_embd", "bias", "qkv_bias", "rope_base",
           "prope_fraction", "hope_cutoff", "local_rope_base")

# --- Small models: training and testing -----------------------------------------------------------


def tasks_of(args):
    return HARD if args.hard else EASY


def train(config, args, seed, device):
    """-> a model trained on the tasks, and the loss of its last step in nats per answer."""
    torch.manual_seed(seed)
    model, tasks = GPT(config).to(device).train(), tasks_of(args)
    schedule = TrainConfig(max_iters=args.max_iters, **{
        field.name: getattr(args, field.name) for field in fields(OptimizerConfig)})
    optimizers = make_optimizers(model, schedule, device)
    for step in range(args.max_iters):
        generator = generator_for(seed, step)
        length = choose(range(tasks.shortest, config.block_size + 1, 2), generator)  # even
        parts = [task(args.batch_size // len(tasks.trained), length, generator)
                 for task in tasks.trained]
        tokens, targets = (torch.cat(part).to(device) for part in zip(*parts))  # (B, length)
        set_learning_rate(optimizers, step, schedule)
        loss = training_step(model, optimizers, tokens, targets, nullcontext())
    return model.eval(), loss.item()


@torch.no_grad()
def test(model, task, start, end, n_batches, seed, device, shortest):
    """Accuracy at odd lengths in (start, end], from `shortest` on -> a bucket with "accuracy" and
    its standard error over batches, whose sequences have one length each; or None if the encoding
    is undefined there."""
    if end > (model.transformer.wpe.max_length or end):
        return None
    lengths, accuracies = range(max(start + 1, shortest) | 1, end + 1, 2), []
    for i in range(n_batches):
        generator = generator_for(seed, end, i)
        tokens, targets = (x.to(device) for x in task(16, choose(lengths, generator), generator))
        right = model(tokens, targets)[0].argmax(-1) == targets  # (B, T)
        accuracies.append(right.sum() / (targets >= 0).sum())
    accuracy, stderr = report.mean_and_stderr(torch.stack(accuracies).cpu())
    return {"start": start, "end": end, "accuracy": accuracy, "accuracy_stderr": stderr}


def train_and_test(config, seed, args, device):
    """-> the run of a network, as the JSON holds it. In float32 and one thread: so small a network
    gains nothing from less or more."""
    torch.set_num_threads(1)
    started, tasks = time.monotonic(), tasks_of(args)
    edges = bucket_edges(args.block_size, args.max_factor)
    model, loss = train(config, args, seed, device)
    found = {name: [test(model, task, start, end, args.batches, seed, device, tasks.shortest)
                    for start, end in zip(edges, edges[1:])]
             for name, (task, _) in tasks.tested.items()}
    inside = ", ".join(f"{name} {buckets[0]['accuracy']:.3f}" for name, buckets in found.items())
    seconds = time.monotonic() - started
    print(f"{name_of(config):16} seed {seed}   {seconds:5.0f} s   accuracy inside L: {inside}",
          flush=True)
    return {"name": name_of(config), "pe": config.pe, "seed": seed, "config": asdict(config),
            "loss": loss, "seconds": seconds, "tasks": found}


def train_and_test_all(args, device):
    """-> the run of each network and seed."""
    if args.block_size < tasks_of(args).shortest:
        raise ValueError(f"--block_size must be at least {tasks_of(args).shortest} for the tasks")
    network = {name: getattr(args, name) for name in (*NETWORK, "attn_scaling")}
    configs = [GPTConfig(vocab_size=VOCAB_SIZE, **network | fields_of(pe)) for pe in args.pe]
    return [train_and_test(config, seed, args, device) for config in configs for seed in args.seed]


# --- Language models ------------------------------------------------------------------------------


@torch.no_grad()
def copy_in_text(model, windows, passages, distance, scored_from=1):
    """A passage, text, and the passage again, starting `distance` tokens after its first start.

    windows (N, at least distance + P): text, which passages (N, P) replace at both places
    -> accuracy and loss in nats per token: of the passage's "second" reading, and "unseen", at the
    same position if the passage of another row replaces the first reading; "gain", the loss saved
    by the first reading; or None beyond an encoding's limit. Tokens of the passage before
    scored_from are not counted; nothing announces the first one."""
    P = passages.size(1)
    if distance + P > (model.transformer.wpe.max_length or distance + P):
        return None
    text = windows[:, :distance + P].clone()  # (N, T)
    text[:, :P] = text[:, distance:] = passages
    other = text.clone()
    other[:, :P] = passages.roll(1, dims=0)  # of the same kind
    found = {}
    for row, rows in enumerate(zip(text, other)):
        rows = torch.stack(rows)  # (2, T)
        logits, _ = model(rows[:, :-1], rows[:, 1:])  # (2, T - 1, V)
        target = passages[row, scored_from:]  # (P - scored_from,)
        predictions = logits[:, distance + scored_from - 1:distance + P - 1].float()
        for name, predicted in zip(("second", "unseen"), predictions):
            right = (predicted.argmax(-1) == target).float().mean()
            found.setdefault(f"{name}_accuracy", []).append(right)
            found.setdefault(f"{name}_loss", []).append(F.cross_entropy(predicted, target))
    found = {name: torch.stack(values).cpu() for name, values in found.items()}  # (N,) each
    found["gain"] = found["unseen_loss"] - found["second_loss"]
    bucket = {"distance": distance, "length": distance + P}
    for name, values in found.items():
        bucket[name], bucket[f"{name}_stderr"] = report.mean_and_stderr(values)
    return bucket


def passages_to_repeat(args, checkpoints, names):
    """-> windows (N, T), passages (N, P), needles (N, P), distances between their two readings, the
    text's sha256."""
    ids, source, text_sha256, tokenizer = text_to_score(checkpoints, names, args.dataset, args.text)
    L = min(checkpoint["config"]["block_size"] for checkpoint in checkpoints)
    P = L // 4
    distances = [P, 2 * P, 3 * P, *bucket_edges(L, args.max_factor)[1:-1]]
    windows = document_windows(ids, tokenizer.end_of_document, distances[-1] + P, args.windows)
    if len(windows) < 2:
        raise ValueError("two windows are needed: use a longer text, or a higher --windows")
    print(f"{len(windows)} passages of {P} tokens of {source} (sha256 {text_sha256[:16]}), "
          f"repeated; L = {L} tokens")
    passages = windows[:, :P]
    shuffled = torch.rand(passages.shape, generator=generator_for(L)).argsort(dim=1)
    return windows, passages, pick(passages, shuffled), distances, text_sha256


def test_language_models(args, device):
    """-> the result, as the JSON holds it."""
    checkpoints, names = [load_checkpoint(path) for path in args.runs], report.run_names(args.runs)
    *texts, distances, text_sha256 = passages_to_repeat(args, checkpoints, names)
    windows, passages, needles = (text.to(device.torch_device) for text in texts)
    middle, runs = needles.size(1) // 2, []
    for name, checkpoint in zip(names, checkpoints):
        model = load_model(checkpoint, attn_scaling=args.attn_scaling).to(device.torch_device)
        with device.autocast():
            found = {"distances": [copy_in_text(model, windows, passages, distance)
                                   for distance in distances],
                     "needles": [copy_in_text(model, windows, needles, distance, middle)
                                 for distance in distances]}
        config = checkpoint["config"]
        runs.append({"name": name, "pe": config["pe"], "block_size": config["block_size"],
                     "iter": checkpoint["iter"], "seed": checkpoint["args"]["seed"], **found})
    chance = windows.flatten().bincount().max().item() / windows.numel()
    return {"dataset_sha256": text_sha256, "attn_scaling": args.attn_scaling,
            "most_frequent_token": chance, "distances": distances,
            "runs": runs, "means": output.mean_over_seeds(
                runs, output.names_of(checkpoints), "pe", "distances", "needles")}


# --- Report ---------------------------------------------------------------------------------------


def show(panels, runs, x, xlabel, L, path):
    """Print a table per panel and, if there is a path, plot the panels over the key x of a bucket.

    panels: (title, key of a bucket, the buckets of each run, what guesses have). A bucket is None
    if the encoding is undefined there."""
    ticks = sorted({bucket[x] for row in panels[0][2] for bucket in row if bucket})
    for title, key, rows, guesses in panels:
        report.print_table(
            f"{title} by {xlabel}, ± standard error over seeds (over sequences if there is one); "
            f"guesses: {', '.join(f'{guess:.3f}' for guess in guesses)}",
            [f"{tick:,}" for tick in ticks], {
                run["name"]: [report.format_cell(bucket[key], bucket[f"{key}_stderr"])
                              if bucket else "-" for bucket in row]
                for run, row in zip(runs, rows)})
    if not path:
        return
    styles = report.styles([run | {"name": in_words(run["name"])} for run in runs])
    n_rows = len(panels) // 2
    figure, axes = report.import_pyplot().subplots(
        n_rows, 2, figsize=(12, 1 + 3.9 * n_rows), squeeze=False)
    for panel, (title, key, rows, guesses) in zip(axes.flat, panels):
        for row, style in zip(rows, styles):
            output.draw_line(panel, row, x, key, f"{key}_stderr", **style)
        for guess in guesses:
            panel.axhline(guess, color="gray", linestyle="--", linewidth=1)
        if "accuracy" in key:
            panel.set_ylim(-0.03, 1.03)
        report.token_axis(panel, L, ticks)
        panel.set_title(title)
    figure.supxlabel(f"{xlabel}; gray dashes: guesses, shaded: ± standard error",
                     fontsize="medium")
    report.save_picture(figure, axes[0, 0], "What is found again beyond L?", path)


def show_tasks(means, args):
    panels = [(f"{name}: accuracy", "accuracy", [run["tasks"][name] for run in means],
               [1 / LETTERS] if chance is None else [1 / LETTERS, chance])
              for name, (_, chance) in tasks_of(args).tested.items()]
    show(panels, means, "end", "length (tokens, at most)", args.block_size, args.plot)
    print("below 0.95 in the first column: not learned in these steps, the rest then says little")


def show_text(means, chance, L, path):
    panels = [(f"{words}: {title}", key, [run[what] for run in means], [guess])
              for what, words in (("distances", "passage"), ("needles", "needle"))
              for key, title, guess in (
                  ("second_accuracy", "accuracy on the second reading", chance),
                  ("gain", "nats per token saved by the first reading", 0))]
    show(panels, means, "distance", "distance between the readings (tokens)", L, path)


def make_parser():
    parser = flags.ArgumentParser(
        "Recall beyond the trained context: small models trained to copy and to look up or, given "
        "runs' folders, language models that read a passage twice.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="OUT_DIR", help="runs' folders or checkpoints")
    add("--max_factor", type=flags.positive, default=16,
        help="longest context in multiples of block_size")
    flags.add_flags(parser, GPTConfig, "attn_scaling")
    report.add_output_flags(parser, "accuracy by length or distance")
    flags.add_flags(parser, DeviceConfig)

    group = parser.add_argument_group("small models (without OUT_DIR)")
    group.add_argument("--pe", nargs="+", default=list(PE), metavar="PE", help="networks to train: "
                       "encodings, PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW")
    flags.add_flags(group, GPTConfig, *NETWORK)
    group.add_argument("--hard", action="store_true", help="a look-up with distractors that match "
                       "in part, in place of copy and binding")
    flags.add_flags(group, TrainConfig, "max_iters", "batch_size")
    flags.add_flags(group, TrainConfig, "seed", nargs="+", default=[1])
    flags.add_flags(group, OptimizerConfig)
    group.add_argument("--batches", type=flags.positive, default=16,
                       help="tests of 16 sequences, per task and range of lengths")
    parser.set_defaults(block_size=64, n_layer=2, n_embd=64, max_iters=2000, learning_rate=3e-3,
                        muon_learning_rate=1e-2)

    group = parser.add_argument_group("language models (with OUT_DIR)")
    add_text_flags(group)
    group.add_argument("--windows", type=flags.positive, default=32, help="passages to average")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    report.check_outputs(args)
    device = Device(DeviceConfig(args.device, args.dtype))
    if args.runs:
        result = test_language_models(args, device)
    else:
        runs = train_and_test_all(args, device.torch_device)
        means = output.mean_over_seeds(runs, [run["name"] for run in runs], "pe", "tasks")
        guesses = {name: chance for name, (_, chance) in tasks_of(args).tested.items()}
        result = {"flags": vars(args), "runs": runs, "chance_blind": 1 / LETTERS,
                  "chance_in_part": guesses, "means": means}
    if args.json:
        report.write_json(args.json, "-m experiments.recall", output.rounded(
            {"seed": args.seed, "device": str(device), **result}, 4))
    if args.runs:
        show_text(result["means"], result["most_frequent_token"], result["runs"][0]["block_size"],
                  args.plot)
    else:
        show_tasks(result["means"], args)


if __name__ == "__main__":
    flags.run(main)
