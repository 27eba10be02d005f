"""
Speed and memory as ratios: everything that is compared runs in one process, in turns, and the median counts.

    python -m experiments.bench                                  all but the last two, half an hour on two CPU cores
    python -m experiments.bench train --n_layer 4 --n_embd 128 --block_size 128 --batch_size 32 --json FILE
    python -m experiments.bench windows --pe hope:SSSL:16 nope+rope:SSSL:16 --n_layer 4 --n_embd 128 --block_size 128
    python -m experiments.bench time_to_loss --compete nanogpt:600 muon:250 adamw:400:5e-3 --seed 1 2 3 --plot FILE.png

train         a step of each encoding against one of nope; a step of this GPT against one of nanoGPT's network
generate      new tokens with the cache and without; how the time per token grows with the position
evaluate      all buckets from one pass against one pass per bucket; how the time grows with the length
memory        peak memory of an evaluation to 64 L, each encoding in its own process
windows       layers with windows against the same network without: a training step, 1,000 new tokens, an evaluation to
              16 L and to 64 L, and what the cache holds
profile       which parts of a training step, not compiled, take its time on the device
compile       a training step through torch.compile against the same step without it
time_to_loss  how long each way to train takes to the loss that the first one ends with (see race())

--optimizer, --dtype and --compile apply to training. nanoGPT's network has AdamW, our format, compiler and kernels, and
on a CPU float32, as in its train.py. All else runs as evaluation and sampling do, in float32. --pe takes encodings or
arrangements of layers (experiments/groups.py).

A ratio is the median of the ratios within each round, not the ratio of the medians: two calls that follow each other
are slowed down alike by whatever else the machine does. nope against itself shows how much of a ratio is chance.

Found on two CPU cores with 6 layers of width 384, L = 256, batch 8 (experiments/results/bench_*.json); a difference of
0.03 means nothing:

a training step against nope's       rope, prope, hope 1.04 x the time, alibi 1.01, t5 1.08, kerple 1.04, fire 1.07
tokens per second, nanoGPT's in      hope 0.98 x in float32, 1.60 x in bfloat16
float32 being 1
1,000 new tokens                     14 x faster with the cache
buckets to 16 L                      1.62 x faster from one pass
hope:SSSL:16 against hope            a step 0.99 x the time, an evaluation to 64 L 0.44 x, the cache 1.07 MB, not 4.10
                                     (the demo's size: 4 layers of width 128, L = 128, batch 32)
torch.compile on a CPU               a step 0.90 x the time, after 39 s for the first: off unless asked for
Muon against AdamW at its best rate  0.38 x the time to the same loss (the demo's size)
"""
import argparse
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common import flags, report
from common.device import Device, DeviceConfig, pick_compile
from common.optimizer import LEARNING_RATES, OptimizerConfig, make_optimizer
from data.loader import open_dataset, token_tensor, training_batch
from eval_extrapolation import bucket_edges, score, windows_at_a_time
from experiments.curves import draw_line
from experiments.groups import fields_of
from experiments.nanogpt import PlainGPT, nanogpt_device, nanogpt_optimizer, nanogpt_run
from model import GPT, PE, GPTConfig, KVCache
from train import Run, TrainConfig

# Dense bfloat16 FLOP/s from the data sheets, by the full name: an "H100 PCIe" is another card.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
              "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12,
              "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


# --- Timing -----------------------------------------------------------------------------------------------------------


def seconds(call, device):
    """The time that call() takes, including the work that a GPU has queued."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def in_turns(calls, repeats, device, warm_up=1):
    """{name: call} -> {name: (median seconds, median ratio to the first)}; warm-up rounds do not count."""
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(warm_up + repeats)][warm_up:]
    first = next(iter(calls))
    return {name: (statistics.median(r[name] for r in rounds), statistics.median(r[name] / r[first] for r in rounds))
            for name in calls}


def print_times(title, results):
    print(f"\n{title}")
    for name, (median, ratio) in results.items():
        print(f"  {name:24} {1000 * median:10.1f} ms   {ratio:6.3f}")
    return {name: {"seconds": median, "ratio": ratio} for name, (median, ratio) in results.items()}


# --- Training ---------------------------------------------------------------------------------------------------------

SETTLE = 5  # warm-up rounds, until malloc keeps as much memory as the largest call needs


def training_step(model, optimizer, x, y, autocast):
    """One step as in train.py, without float16's scaler: forward, backward, clip, update."""
    with autocast:
        loss = model(x, y)[1]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_of(pe, config, optimizer, x, y, device, compiled):
    """-> a function that takes one training step of an arrangement of layers. optimizer: its name."""
    model = GPT(GPTConfig(**config, **fields_of(pe))).to(device.torch_device)
    optimizer = make_optimizer(model, OptimizerConfig(optimizer=optimizer), device.torch_device, device.dtype)
    return partial(training_step, torch.compile(model) if compiled else model, optimizer, x, y, device.autocast())


def will_compile(args, device):
    return pick_compile(args.compile, device.torch_device, args.n_embd, steps=1000)  # as if for a long training


def step_maker(args, config, device):
    """-> a function from an arrangement of layers to its training step, all on the same batch."""
    x, y = torch.randint(config["vocab_size"], (2, args.batch_size, args.block_size), device=device.torch_device)
    return partial(step_of, config=config, optimizer=args.optimizer, x=x, y=y, device=device,
                   compiled=will_compile(args, device))


def bench_train(args, config, device):
    make_step, compiled = step_maker(args, config, device), will_compile(args, device)
    results = {"dtype": str(device.dtype).removeprefix("torch."), "compiled": compiled, "optimizer": args.optimizer,
               "encodings": {}}
    print(f"\na training step, {device.dtype}: time, that of nope, ratio")
    for pe in PE:  # in pairs: close in time, and malloc is not disturbed by others
        torch.compiler.reset()  # after compiling a function eight times, torch leaves it uncompiled
        timed = in_turns({"": make_step("nope"), pe: make_step(pe)}, args.repeats, device.torch_device, SETTLE)
        (nope, _), (median, ratio) = timed.values()
        print(f"  {pe:24} {1000 * median:10.1f} ms  {1000 * nope:10.1f} ms   {ratio:6.3f}", flush=True)
        results["encodings"][pe] = {"seconds": median, "nope_seconds": nope, "ratio": ratio}
    results["against plain"] = bench_against_plain(args, config, device, make_step)
    return results


def plain_step(args, config, x, y, device):
    """-> a function that takes one training step of nanoGPT's network, as step_of does for ours."""
    own_device = nanogpt_device(device)
    model = PlainGPT(GPTConfig(**config)).to(device.torch_device)
    optimizer = nanogpt_optimizer(model, device)
    model = torch.compile(model) if will_compile(args, device) else model
    return partial(training_step, model, optimizer, x, y, own_device.autocast()), own_device.dtype


def bench_against_plain(args, config, device, make_step):
    torch.compiler.reset()
    x, y = make_step.keywords["x"], make_step.keywords["y"]
    plain, dtype = plain_step(args, config, x, y, device)
    name = f"plain GPT, {str(dtype).removeprefix('torch.')}"
    calls = {name: plain, "ours, learned": make_step("learned"), "ours, hope": make_step("hope")}
    timed = in_turns(calls, args.repeats, device.torch_device, SETTLE)
    found = print_times(f"a training step, {device.dtype}, {args.optimizer}, against a {name} with AdamW", timed)
    for name, (median, _) in timed.items():
        print(f"  {name:24} {x.numel() / median:10,.0f} tokens/s")
    if device.type == "cuda":
        peak = PEAK_FLOPS.get(str(device))
        weights = sum(p.numel() for p in GPT(GPTConfig(**config)).parameters())
        # 6 per weight and token for forward and backward, 12 per layer, channel and pair of tokens for attention
        flops = x.numel() * (6 * weights + 12 * args.n_layer * args.n_embd * args.block_size) / timed["ours, hope"][0]
        print(f"  {flops / 1e12:.1f} TFLOP/s" + (f", {flops / peak:.1%} of the card's bfloat16 peak" if peak else ""))
    return found


def bench_compile(args, config, device):
    make_step, results = step_maker(args, config, device), {}
    for pe in args.pe or ["hope"]:
        torch.compiler.reset()
        calls = {"as it is": make_step(pe, compiled=False), "compiled": make_step(pe, compiled=True)}
        first = seconds(calls["compiled"], device.torch_device)
        results[pe] = print_times(f"a training step of {pe}, {device.dtype}; compiled, the first takes {first:.0f} s",
                                  in_turns(calls, args.repeats, device.torch_device, SETTLE))
        results[pe]["compiled"]["first step"] = first
    return results


# --- Sampling and evaluation ------------------------------------------------------------------------------------------


@torch.no_grad()
def bench_generate(args, config, device):
    where = device.torch_device
    model = GPT(GPTConfig(**config, pe="hope")).to(where).eval()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)

    def uncached(n):
        idx = prompt
        for _ in range(n):
            idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)

    results = {}
    for n in (100, 1000):
        calls = {"cached": partial(model.generate, prompt, n, top_k=1), "uncached": partial(uncached, n)}
        timed = in_turns(calls, 1, where, warm_up=0) if n > 100 else in_turns(calls, args.repeats, where)
        results[n] = print_times(f"{n:,} new tokens, hope: time, and ratio to cached", timed)

    results["by position"] = {}
    print("\ntime per new token by position, and its ratio to that at 100")
    for pe in PE:
        model = GPT(GPTConfig(**config, pe=pe)).to(where).eval()
        if model.transformer.wpe.max_length is not None:  # no position 4,000
            continue
        times = seconds_by_position(model, where)
        results["by position"][pe] = times
        print(f"  {pe:12} " + "  ".join(f"{p:,}: {1000 * t:.2f} ms, {t / times[100]:.2f}" for p, t in times.items()))
    return results


def seconds_by_position(model, device):
    """Position -> median seconds of a new token there."""
    cache, times = KVCache(4200), {}
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for position in (100, 1000, 4000):
        model(token.expand(1, position - cache.length), cache=cache)
        times[position] = statistics.median(seconds(partial(model, token, cache=cache), device) for _ in range(40))
    return times


def bench_evaluate(args, config, device):
    where, results, L = device.torch_device, {}, args.block_size
    for pe in ("hope", "alibi"):
        model = GPT(GPTConfig(**config, pe=pe)).to(where).eval()
        windows = torch.randint(config["vocab_size"], (2, 16 * L + 1), device=where)

        def one_pass(length, model=model, windows=windows):
            score(model, windows[:, :length + 1], args.chunk, 2)

        def each_length(one_pass=one_pass):
            for end in bucket_edges(L, 16)[1:]:
                one_pass(end)

        calls = {"one pass to 16 L": partial(one_pass, 16 * L), "a pass per bucket": each_length,
                 "one pass to 8 L": partial(one_pass, 8 * L), "one pass to 4 L": partial(one_pass, 4 * L)}
        results[pe] = print_times(f"evaluation of 2 windows, {pe}: time, and ratio to the first",
                                  in_turns(calls, args.repeats, where))
    return results


def bench_memory(args, config, device):
    """Peak memory, each encoding in a fresh process: a process's maximum covers everything that it has run."""
    results = {}
    if sys.platform == "win32":
        print("\nmemory: left out, Windows does not tell a process its peak memory")
        return results
    print("\npeak memory of scoring windows of 64 L as the evaluation does, including the interpreter and torch")
    for pe in PE:
        if PE[pe](GPTConfig(**config, pe=pe)).max_length is not None:
            continue
        code = (f"from experiments import bench; bench.score_long({config!r}, {pe!r}, {64 * args.block_size}, "
                f"{args.chunk}, {str(device.torch_device)!r})")
        results[pe] = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        print(f"  {pe:12} {results[pe]:.2f} GB")
    return results


def score_long(config, pe, length, chunk, device):
    """Score as many windows as the evaluation takes at a time; print the peak memory in GB, on a GPU the GPU's."""
    device = torch.device(device)
    n_windows = min(32, windows_at_a_time(config, length, chunk, device))
    model = GPT(GPTConfig(**config, pe=pe)).to(device).eval()
    score(model, torch.randint(config["vocab_size"], (n_windows, length + 1), device=device), chunk, n_windows)
    status = Path("/proc/self/status")
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 1e9)
    elif status.exists():  # Linux, whose ru_maxrss includes the process that started this one
        print(int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9)
    else:
        import resource  # not on Windows

        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9)  # macOS counts in bytes


# --- Layers with windows ----------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_bytes(model, n_tokens):
    """What the KV cache holds after n_tokens."""
    cache = KVCache(n_tokens)
    model(torch.zeros(1, n_tokens, dtype=torch.long, device=model.lm_head.weight.device), cache=cache)
    return sum(stored.nbytes for layer in cache.store.values() for stored in layer)


def bench_windows(args, config, device):
    where, L, results = device.torch_device, args.block_size, {}
    make_step = step_maker(args, config, device)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)
    text = torch.randint(config["vocab_size"], (1, 64 * L + 1), device=where)
    for name in args.pe or [f"hope:SSSL:{max(1, L // 8)}"]:
        pair = (fields_of(name)["pe"], name)  # without windows and with them
        torch.compiler.reset()
        steps = in_turns({pe: make_step(pe) for pe in pair}, args.repeats, where, SETTLE)
        found = results[name] = {"a training step": print_times(f"a training step, {device.dtype}", steps)}
        models = {pe: GPT(GPTConfig(**config, **fields_of(pe))).to(where).eval() for pe in pair}
        for title, repeats, call in (
                ("1,000 new tokens", 3, lambda model: model.generate(prompt, 1000, top_k=1)),
                ("evaluation of a window of 16 L", 5, lambda model: score(model, text[:, :16 * L + 1], args.chunk, 1)),
                ("evaluation of a window of 64 L", 3, lambda model: score(model, text, args.chunk, 1))):
            calls = {pe: partial(call, model) for pe, model in models.items()}
            found[title] = print_times(title, in_turns(calls, min(repeats, args.repeats), where))
        found["cache in bytes after 1,000 tokens"] = held = {pe: cache_bytes(models[pe], 1000) for pe in pair}
        print("\ncache after 1,000 tokens: " + ", ".join(f"{pe} {size / 1e6:.2f} MB" for pe, size in held.items()))
    return results


# --- Time to a loss ---------------------------------------------------------------------------------------------------


def competitor(text):
    """"muon:250" or "adamw:600:5e-3" -> name, steps, learning rate or None. For argparse."""
    name, *numbers = text.split(":")
    if len(numbers) not in {"nanogpt": [1], **dict.fromkeys(LEARNING_RATES, [1, 2])}.get(name, []):
        raise argparse.ArgumentTypeError(f"{text!r} is not a way to train: write nanogpt:STEPS, muon:STEPS, "
                                         "adamw:STEPS or adamw:STEPS:LEARNING_RATE")
    steps, *rate = numbers
    return name, flags.parsed(int, at_least=1)(steps), flags.parsed(float, above=0)(rate[0]) if rate else None


def make_runs(args, config, device, seed, out_dir):
    """-> {name: a train.Run for each competitor and, but for nanogpt, each --pe}."""
    meta, ids = open_dataset(args.dataset)
    ids, runs = {name: token_tensor(part, device.torch_device) for name, part in ids.items()}, {}
    sizes = {**config, "vocab_size": meta["vocab_size"]}
    settings = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    for name, steps, rate in args.compete:
        chosen = TrainConfig(**{**settings, "seed": seed, "max_iters": steps, "out_dir": out_dir, "learning_rate": rate,
                                "optimizer": "adamw" if name == "nanogpt" else name})
        label = name + (f" {rate:g}" if rate else "") + f", {steps} steps"
        if name == "nanogpt":
            runs[label] = nanogpt_run(sizes, chosen, meta, ids, nanogpt_device(device))
            continue
        for pe in args.pe or ["hope"]:
            runs[f"{pe} {label}"] = Run(GPTConfig(**sizes, **fields_of(pe)), chosen, meta, ids, device)
    if len(runs) > 8 and next(iter(runs.values())).compiled:
        raise ValueError(f"{len(runs)} runs are too many: in a process torch compiles a function eight times and then "
                         "leaves it uncompiled; race eight at most, or add --no-compile")
    return runs


def race(runs, device, eval_interval):
    """Train runs at the same time in one process -> {name: its evaluations, with the seconds that its steps took}.

    The run that is least far in its own schedule takes the next step, so that whatever else the machine does slows all
    of them alike. Evaluations are not timed."""
    for run in runs.values():  # compile, and allocate memory, before the clock runs
        x, y = training_batch(run.ids["train"], run.config.batch_size, run.model.config.block_size, 0, 0, device)
        with run.device.autocast():
            run.compiled_model(x, y)[1].backward()
        run.optimizer.zero_grad(set_to_none=True)
    clocks, curves = dict.fromkeys(runs, 0.0), {name: [] for name in runs}
    while unfinished := [name for name, run in runs.items() if run.iter < run.config.max_iters]:
        name = min(unfinished, key=lambda name: runs[name].iter / runs[name].config.max_iters)
        run = runs[name]
        clocks[name] += seconds(run.step, device)
        if run.iter % eval_interval == 0 or run.iter == run.config.max_iters:
            curves[name].append({"iter": run.iter, "tokens": run.iter * run.tokens_per_step, "seconds": clocks[name],
                                 **run.evaluate()})
    return curves


def reached(curves):
    """Curves of race() -> {name: when it reached the last loss of the first one, and its own last loss}.

    Numbers are infinite if it did not. "loss by then": its lowest loss in the time that the first one took in all."""
    baseline = next(iter(curves.values()))
    target, found = baseline[-1]["val_loss"], {}
    never = dict.fromkeys(("iter", "tokens", "seconds"), math.inf)
    for name, curve in curves.items():
        at = next((point for point in curve if point["val_loss"] <= target), never)
        in_time = [point["val_loss"] for point in curve if point["seconds"] <= baseline[-1]["seconds"]]
        found[name] = {"last loss": curve[-1]["val_loss"], "loss by then": min(in_time, default=math.inf),
                       "steps": at["iter"], "tokens": at["tokens"], "seconds": at["seconds"]}
    first = next(iter(found.values()))["seconds"]
    return {name: {**row, "ratio": row["seconds"] / first} for name, row in found.items()}


def bench_time_to_loss(args, config, device):
    """Each seed is a race of its own; the table shows medians over seeds."""
    races, results = [], []
    for seed in args.seed:
        with tempfile.TemporaryDirectory() as folder:  # a Run writes best.pt
            races.append(race(make_runs(args, config, device, seed, folder), device.torch_device, args.eval_interval))
        results.append(reached(races[-1]))
        for name, row in results[-1].items():
            print(f"  seed {seed}  {name:32} {row['seconds']:8.1f} s   last loss {row['last loss']:.4f}", flush=True)
    medians = {name: {key: statistics.median(result[name][key] for result in results) for key in row}
               for name, row in results[0].items()}
    medians = {name: {key: value if math.isfinite(value) else None for key, value in row.items()}
               for name, row in medians.items()}
    digits = {"last loss": 4, "loss by then": 4, "steps": 0, "tokens": 0, "seconds": 1, "ratio": 3}
    rows = {name: ["-" if row[key] is None else f"{row[key]:,.{n}f}" for key, n in digits.items()]
            for name, row in medians.items()}
    report.print_table(f"time to the loss that {next(iter(medians))} ends with, medians over {len(args.seed)} seeds; "
                       "loss by then: in the time that this takes; -: not reached", list(digits), rows)
    if args.plot:
        plot_races(races, args.plot)
    return {"medians": medians, "seeds": args.seed, "races": races}


def plot_races(races, path):
    """Validation loss against minutes; one line per seed."""
    figure, panel = report.import_pyplot().subplots(figsize=(9.5, 5.5), layout="constrained")
    for i, name in enumerate(races[0]):
        for race_, label in zip(races, (name, *[None] * len(races))):
            rows = [{**point, "minutes": point["seconds"] / 60} for point in race_[name]]
            draw_line(panel, rows, "minutes", "val_loss", color=f"C{i}", label=label, linewidth=1.5)
    target = statistics.median(next(iter(curves.values()))[-1]["val_loss"] for curves in races)
    panel.axhline(target, color="gray", linestyle="--", linewidth=1)
    panel.set(xlabel="training time (minutes)", ylabel="validation loss (nats per token)")
    panel.legend()
    report.save_picture(figure, path)


# --- Where the time of a step goes ------------------------------------------------------------------------------------

# Part of a step -> words in the names of its operators; the first part that matches counts. Only Muon multiplies
# stacks of matrices (bmm).
PARTS = {"attention": ("scaled_dot_product", "flash_attention"), "Muon": ("bmm",), "AdamW": ("fused_adam",),
         "matrix products": ("mm", "linear"), "norms": ("layer_norm",), "GELU": ("gelu",),
         "loss": ("softmax", "nll_loss"), "rotation, sums, copies": ("mul", "add", "sub", "cat", "copy", "sum", "lerp")}


def bench_profile(args, config, device):
    """Share of each part in the time of a training step on the device, and the speed of its matrix products.

    Not compiled: a kernel that the compiler has made belongs to several parts."""
    step = step_maker(args, config, device)("hope", compiled=False)
    for _ in range(SETTLE):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(args.repeats):
            step()
    spent = dict.fromkeys([*PARTS, "rest (Python, batch, embedding)"], 0.0)
    clock = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"  # microseconds of all steps
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # operators; their kernels are listed again
            matching = [part for part, words in PARTS.items() if any(word in event.key for word in words)]
            spent[(matching or list(spent)[-1:])[0]] += getattr(event, clock) / 1e6 / args.repeats  # seconds per step
    total, C = sum(spent.values()), args.n_embd
    flops = 6 * args.batch_size * args.block_size * (12 * args.n_layer * C * C + args.vocab_size * C)
    x = torch.randn(1024, 1024, dtype=device.dtype, device=device.torch_device)
    fastest = 2 * 1024 ** 3 / min(seconds(lambda: x @ x, device.torch_device) for _ in range(20))
    print(f"\na training step of hope, {args.optimizer}, {device.dtype}: {1000 * total:.0f} ms on {device}")
    for part, time_spent in spent.items():
        print(f"  {part:32} {time_spent / total:6.1%}")
    reached = flops / spent["matrix products"]
    print(f"  matrix products: {reached / 1e9:.0f} GFLOP/s, {reached / fastest:.0%} of those of 1024 x 1024")
    return {"optimizer": args.optimizer, "dtype": str(device.dtype).removeprefix("torch."), "seconds": total,
            "shares": {part: time_spent / total for part, time_spent in spent.items()},
            "flops_per_second": reached, "flops_per_second_1024": fastest}


BENCHMARKS = {"train": bench_train, "generate": bench_generate, "evaluate": bench_evaluate, "memory": bench_memory,
              "windows": bench_windows, "profile": bench_profile, "compile": bench_compile,
              "time_to_loss": bench_time_to_loss}


def make_parser():
    parser = flags.ArgumentParser("Measure speed and memory as ratios, in turns, in one process.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    default = [name for name in BENCHMARKS if name not in ("compile", "time_to_loss")]
    add("what", nargs="*", default=default, help=f"some of {', '.join(BENCHMARKS)}")
    flags.add_flags(parser, GPTConfig, "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    parser.set_defaults(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=99)
    add("--batch_size", type=count, default=8, help="windows per training step")
    add("--chunk", type=count, default=128, help="tokens of a window per forward, in evaluations")
    add("--repeats", type=count, default=9, help="rounds over which the median is taken")
    add("--pe", nargs="+", metavar="PE", help="windows, compile, time_to_loss: encodings or arrangements of layers, as "
        "nope+rope:SSSL:32; default: HoPE, for windows with SSSL and L / 8")
    flags.add_flags(parser, TrainConfig, "compile")
    report.add_output_flags(parser, "time_to_loss: loss against minutes")
    flags.add_flags(parser, DeviceConfig)
    group = parser.add_argument_group("time_to_loss; the optimizer's flags are for muon and adamw, not for nanogpt")
    group.add_argument("--compete", nargs="+", type=competitor, metavar="NAME:STEPS",
                       default=[("nanogpt", 600, None), ("muon", 300, None), ("adamw", 600, None)],
                       help="nanogpt:STEPS, muon:STEPS, adamw:STEPS:LEARNING_RATE, ...; the first sets the loss; "
                            "default: nanogpt:600 muon:300 adamw:600")
    flags.add_flags(group, TrainConfig, "dataset", "eval_iters")
    flags.add_flags(group, TrainConfig, "seed", nargs="+", default=[1])
    flags.add_flags(group, TrainConfig, "eval_interval", default=10, help="steps between evaluations")
    names = {field.name for field in fields(OptimizerConfig)} - {"learning_rate", "lr_decay_iters"}
    flags.add_flags(group, OptimizerConfig, *names)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    for name in args.what:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    for pe in args.pe or ():
        fields_of(pe)  # raises ValueError
    report.check_outputs(args)
    config = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    GPTConfig(**config)  # raises ValueError if the sizes do not fit each other
    device = Device(args, training_width=args.n_embd)
    print(f"{device}, torch {torch.__version__}: {args.n_layer} layers, width {args.n_embd}, T = {args.block_size}, "
          f"batch {args.batch_size}")
    result = {"device": str(device), "config": config, "batch_size": args.batch_size}
    for name in args.what:
        torch.manual_seed(0)
        result[name] = BENCHMARKS[name](args, config, device)
    if args.json:
        report.write_json(args.json, "-m experiments.bench", result)


if __name__ == "__main__":
    flags.run(main)
