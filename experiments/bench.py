"""
Speed and memory as ratios: everything that is compared runs in one process, in turns, and the median counts.

    python -m experiments.bench                                  all four, a quarter of an hour on two CPU cores
    python -m experiments.bench train --n_layer 4 --n_embd 128 --block_size 128 --batch_size 32 --json FILE

train      a step of each encoding against one of nope; a step of this GPT against one of a plain GPT (below)
generate   new tokens with the cache and without; how the time per token grows with the position
evaluate   all buckets from one pass against one pass per bucket; how the time grows with the length
memory     peak memory of an evaluation to 64 L, each encoding in its own process

--optimizer, --dtype and --compile apply to train, where the plain GPT has AdamW and float32. The others run as
evaluation and sampling do on a CPU, in float32.

A ratio is the median of the ratios within each round, not the ratio of the medians: two calls that follow each other
are slowed down alike by whatever else the machine does. nope against itself shows how much of a ratio is chance.
"""
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import flags
from common.device import DeviceConfig, Place, pick_compile
from common.optimizer import OptimizerConfig, make_optimizer
from common.report import check_output, write_json
from eval_extrapolation import bucket_edges, score, windows_at_a_time
from model import GPT, PE, GPTConfig, KVCache
from train import TrainConfig

# Dense bfloat16 FLOP/s from the data sheets, by the full name: an "H100 PCIe" is another card.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
              "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12,
              "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


class PlainGPT(nn.Module):
    """GPT-2 written without any option: the baseline. Same sizes, float32, no cache, positions from a table."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.tokens, self.positions = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.layers = nn.ModuleList(nn.ModuleList((
            nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 4 * C),
            nn.Linear(4 * C, C))) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
        for norm_1, qkv, out, norm_2, up, down in self.layers:
            q, k, v = qkv(norm_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm_2(x))))
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --------------------------------------------------------------------------------------------------
# Timing


def seconds(call, device):
    """The time that call() takes, including the work that a GPU has queued."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(calls, repeats, device, warm_up=1):
    """{name: call} -> {name: (median seconds, median ratio to the first)}; warm-up rounds do not count."""
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(warm_up + repeats)][warm_up:]
    first = next(iter(calls))
    return {name: (statistics.median(r[name] for r in rounds), statistics.median(r[name] / r[first] for r in rounds))
            for name in calls}


def report(title, results):
    print(f"\n{title}")
    for name, (median, ratio) in results.items():
        print(f"  {name:24} {1000 * median:10.1f} ms   {ratio:6.3f}")
    return {name: {"seconds": median, "ratio": ratio} for name, (median, ratio) in results.items()}


# --------------------------------------------------------------------------------------------------
# Training

SETTLE = 5  # warm-up rounds, until malloc keeps as much memory as the largest call needs


def training_step(model, optimizer, x, y, autocast):
    """One step as in train.py, without float16's scaler: forward, backward, clip, update."""
    with autocast:
        loss = model(x, y)[1]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_of(pe, config, optimizer, x, y, place, compiled):
    """-> a function that takes one training step with an encoding. optimizer: its name."""
    model = GPT(GPTConfig(**config, pe=pe)).to(place.device)
    optimizer = make_optimizer(model, OptimizerConfig(optimizer=optimizer), place.device)
    return partial(training_step, torch.compile(model) if compiled else model, optimizer, x, y, place.autocast())


def bench_train(args, config, place):
    compiled = pick_compile(args.compile, place.device)
    x, y = torch.randint(config["vocab_size"], (2, args.batch_size, args.block_size), device=place.device)
    make_step = partial(step_of, config=config, optimizer=args.optimizer, x=x, y=y, place=place, compiled=compiled)
    results = {"dtype": str(place.dtype).removeprefix("torch."), "compiled": compiled, "optimizer": args.optimizer,
               "encodings": {}}
    print(f"\na training step, {place.dtype}: time, that of nope, ratio")
    for pe in PE:  # in pairs: close in time, and malloc is not disturbed by others
        torch.compiler.reset()  # after compiling a function eight times, torch leaves it uncompiled
        timed = in_turns({"": make_step("nope"), pe: make_step(pe)}, args.repeats, place.device, SETTLE)
        (nope, _), (median, ratio) = timed.values()
        print(f"  {pe:24} {1000 * median:10.1f} ms  {1000 * nope:10.1f} ms   {ratio:6.3f}", flush=True)
        results["encodings"][pe] = {"seconds": median, "nope_seconds": nope, "ratio": ratio}
    results["against plain"] = bench_against_plain(args, config, place, x, y, make_step)
    return results


def bench_against_plain(args, config, place, x, y, make_step):
    torch.compiler.reset()
    plain = PlainGPT(GPTConfig(**config)).to(place.device)
    optimizer = torch.optim.AdamW(plain.parameters())
    calls = {"plain GPT, float32": partial(training_step, plain, optimizer, x, y, nullcontext()),
             "ours, learned": make_step("learned"), "ours, hope": make_step("hope")}
    timed = in_turns(calls, args.repeats, place.device, SETTLE)
    found = report(f"a training step, {place.dtype}, against a plain GPT in float32", timed)
    for name, (median, _) in timed.items():
        print(f"  {name:24} {x.numel() / median:10,.0f} tokens/s")
    if place.device.type == "cuda":
        peak = PEAK_FLOPS.get(str(place))
        weights = sum(p.numel() for p in GPT(GPTConfig(**config)).parameters())
        # 6 per weight and token for forward and backward, 12 per layer, channel and pair of tokens for attention
        flops = x.numel() * (6 * weights + 12 * args.n_layer * args.n_embd * args.block_size) / timed["ours, hope"][0]
        print(f"  {flops / 1e12:.1f} TFLOP/s" + (f", {flops / peak:.1%} of the card's bfloat16 peak" if peak else ""))
    return found


# --------------------------------------------------------------------------------------------------
# Sampling and evaluation


@torch.no_grad()
def bench_generate(args, config, place):
    device = place.device
    model = GPT(GPTConfig(**config, pe="hope")).to(device).eval()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)

    def uncached(n):
        idx = prompt
        for _ in range(n):
            idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)

    results = {}
    for n in (100, 1000):
        calls = {"cached": partial(model.generate, prompt, n, top_k=1), "uncached": partial(uncached, n)}
        timed = in_turns(calls, 1, device, warm_up=0) if n > 100 else in_turns(calls, args.repeats, device)
        results[n] = report(f"{n:,} new tokens, hope: time, and ratio to cached", timed)

    results["by position"] = {}
    print("\ntime per new token by position, and its ratio to that at 100")
    for pe in PE:
        model = GPT(GPTConfig(**config, pe=pe)).to(device).eval()
        if model.transformer.wpe.max_length is not None:  # no position 4,000
            continue
        times = seconds_by_position(model, device)
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


def bench_evaluate(args, config, place):
    device, results, L = place.device, {}, args.block_size
    for pe in ("hope", "alibi"):
        model = GPT(GPTConfig(**config, pe=pe)).to(device).eval()
        windows = torch.randint(config["vocab_size"], (2, 16 * L + 1), device=device)

        def one_pass(length, model=model, windows=windows):
            score(model, windows[:, :length + 1], args.chunk, 2)

        def each_length(one_pass=one_pass):
            for end in bucket_edges(L, 16)[1:]:
                one_pass(end)

        calls = {"one pass to 16 L": partial(one_pass, 16 * L), "a pass per bucket": each_length,
                 "one pass to 8 L": partial(one_pass, 8 * L), "one pass to 4 L": partial(one_pass, 4 * L)}
        results[pe] = report(f"evaluation of 2 windows, {pe}: time, and ratio to the first",
                             in_turns(calls, args.repeats, device))
    return results


def bench_memory(args, config, place):
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
                f"{args.chunk}, {str(place.device)!r})")
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


BENCHMARKS = {"train": bench_train, "generate": bench_generate, "evaluate": bench_evaluate, "memory": bench_memory}


def main(argv=None):
    parser = flags.ArgumentParser("Measure speed and memory as ratios, in turns, in one process.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("what", nargs="*", default=list(BENCHMARKS), help=f"some of {', '.join(BENCHMARKS)}")
    flags.add_flags(parser, GPTConfig, "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    parser.set_defaults(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=99)
    add("--batch_size", type=count, default=8, help="windows per training step")
    add("--chunk", type=count, default=128, help="tokens of a window per forward, in evaluations")
    add("--repeats", type=count, default=9, help="rounds over which the median is taken")
    flags.add_flags(parser, OptimizerConfig, "optimizer")
    flags.add_flags(parser, TrainConfig, "compile")
    add("--json", metavar="FILE", help="write the results to this file")
    flags.add_flags(parser, DeviceConfig)
    args = parser.parse_args(argv)
    for name in args.what:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    if args.json:
        check_output(args.json)
    config = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    GPTConfig(**config)  # raises ValueError if the sizes do not fit each other
    place = Place(args, training_width=args.n_embd)
    if place.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in train.py
    print(f"{place}, torch {torch.__version__}: {args.n_layer} layers, width {args.n_embd}, T = {args.block_size}, "
          f"batch {args.batch_size}")
    result = {"device": str(place), "config": config, "batch_size": args.batch_size}
    for name in args.what:
        torch.manual_seed(0)
        result[name] = BENCHMARKS[name](args, config, place)
    if args.json:
        write_json(args.json, "-m experiments.bench", result)


if __name__ == "__main__":
    flags.run(main)
