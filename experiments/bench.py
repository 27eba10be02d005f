"""
How fast it is, as ratios: everything that is compared runs in one process, in turns, and the median counts.

    python -m experiments.bench                                  all four, a quarter of an hour on two CPU cores
    python -m experiments.bench train --n_layer 4 --n_embd 128 --block_size 128 --batch_size 32 --json FILE

train      a step of each encoding against nope's; our step against that of a plain GPT (below), tokens per second
generate   new tokens with the cache and without, and how the time per token grows with the position
evaluate   all buckets from one pass against a pass for each; how the time grows with the length
memory     peak memory of an evaluation to 64 L, each encoding in a process of its own

--dtype and --compile are for train; the others run as evaluation and sampling do on a CPU, in float32.

A ratio is the median of the ratios within each round, not the ratio of the medians: two calls that follow each other
share whatever slows the machine down. nope against itself says how much of a ratio is chance.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import cli
import train
from eval_extrapolation import bucket_edges, score, windows_at_a_time
from model import GPT, PE, GPTConfig, KVCache

# Dense bfloat16 FLOP/s as the maker's data sheets give them, by the whole name: an "H100 PCIe" is another card.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
              "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12,
              "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


class PlainGPT(nn.Module):
    """GPT-2 as one writes it down first: the baseline. Same sizes, float32, no cache, positions from a table."""

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


# ---------------------------------------------------------------------------------------------------------------
# Timing


def seconds(call, device):
    """How long call() takes, what a GPU still has to do included."""
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


# ---------------------------------------------------------------------------------------------------------------
# What is measured


def training_step(model, optimizer, x, y, autocast):
    """One step as train.py does it, but for float16's scaler: forward, backward, clip, update."""
    with autocast:
        loss = model(x, y)[1]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_train(args, config, device):
    x, y = torch.randint(config["vocab_size"], (2, args.batch_size, args.block_size), device=device)
    flags = train.make_parser().parse_args([])
    dtype, compiled = cli.pick_dtype(args.dtype, device, args.n_embd), cli.pick_compile(args.compile, device)

    def step_of(pe):
        model = GPT(GPTConfig(**config, pe=pe)).to(device)
        fast_model = torch.compile(model) if compiled else model
        return partial(training_step, fast_model, train.make_optimizer(model, flags, device), x, y,
                       cli.autocast(device, dtype))

    settle = 5                                            # rounds until malloc keeps the memory that the largest needs
    results = {"dtype": str(dtype).removeprefix("torch."), "compiled": compiled, "encodings": {}}
    print(f"\na training step, {dtype}: time, that of nope, ratio")
    for pe in PE:                                         # in pairs: close in time, and malloc is not upset by others
        torch.compiler.reset()                            # it compiles a function eight times and then leaves it slow
        calls = {"": step_of("nope"), pe: step_of(pe)}
        (nope, _), (median, ratio) = in_turns(calls, args.repeats, device, settle).values()
        print(f"  {pe:24} {1000 * median:10.1f} ms  {1000 * nope:10.1f} ms   {ratio:6.3f}", flush=True)
        results["encodings"][pe] = {"seconds": median, "nope_seconds": nope, "ratio": ratio}

    torch.compiler.reset()
    plain = PlainGPT(GPTConfig(**config)).to(device)
    plain_step = partial(training_step, plain, torch.optim.AdamW(plain.parameters()), x, y,
                         cli.autocast(device, torch.float32))
    timed = in_turns({"plain GPT, float32": plain_step, "ours, learned": step_of("learned"),
                      "ours, hope": step_of("hope")}, args.repeats, device, settle)
    results["against plain"] = report(f"a training step, {dtype}, against a plain GPT in float32", timed)
    for name, (median, _) in timed.items():
        print(f"  {name:24} {x.numel() / median:10,.0f} tokens/s")
    if device.type == "cuda":
        peak = PEAK_FLOPS.get(cli.device_name(device))
        weights = sum(p.numel() for p in GPT(GPTConfig(**config)).parameters())
        # 6 per weight and token for forward and backward, 12 per layer, channel and pair of tokens for attention
        flops = x.numel() * (6 * weights + 12 * args.n_layer * args.n_embd * args.block_size) / timed["ours, hope"][0]
        print(f"  {flops / 1e12:.1f} TFLOP/s" + (f", {flops / peak:.1%} of the card's bfloat16 peak" if peak else ""))
    return results


@torch.no_grad()
def bench_generate(args, config, device):
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
    print("\ntime per new token by position, each against that at 100")
    for pe in PE:
        if pe == "learned":                               # it has no position 4,000
            continue
        model = GPT(GPTConfig(**config, pe=pe)).to(device).eval()
        cache = KVCache(4200)
        times, idx = {}, torch.zeros(1, 100, dtype=torch.long, device=device)
        for position in (100, 1000, 4000):
            model(idx[:, :1].expand(1, position - cache.length), cache=cache)
            times[position] = statistics.median(seconds(lambda: model(idx[:, :1], cache=cache), device)  # noqa: B023
                                                for _ in range(40))
        results["by position"][pe] = times
        print(f"  {pe:12} " + "  ".join(f"{p:,}: {1000 * t:.2f} ms, {t / times[100]:.2f}" for p, t in times.items()))
    return results


def bench_evaluate(args, config, device):
    results, L = {}, args.block_size
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


def bench_memory(args, config, device):
    """Peak memory needs a fresh process: the maximum of one that has run something else is that of both."""
    results = {}
    print("\npeak memory of scoring windows of 64 L as the evaluation does, the interpreter and torch included")
    for pe in PE:
        if pe == "learned":
            continue
        code = (f"from experiments import bench; bench.score_long({config!r}, {pe!r}, {64 * args.block_size}, "
                f"{args.chunk}, {str(device)!r})")
        results[pe] = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        print(f"  {pe:12} {results[pe]:.2f} GB")
    return results


def score_long(config, pe, length, chunk, device):
    """Score as many windows as go at a time and print the peak of this process's memory (of the GPU's, on a GPU)."""
    device = torch.device(device)
    n_windows = min(32, windows_at_a_time(config, length, chunk, device))
    model = GPT(GPTConfig(**config, pe=pe)).to(device).eval()
    score(model, torch.randint(config["vocab_size"], (n_windows, length + 1), device=device), chunk, n_windows)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 1e9)
    else:                                                 # Linux counts in kB, macOS in bytes
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9)


BENCHMARKS = {"train": bench_train, "generate": bench_generate, "evaluate": bench_evaluate, "memory": bench_memory}


def main(argv=None):
    parser = cli.ArgumentParser("Measure speed and memory as ratios, in turns, in one process.")
    count, add = cli.number(int, 1), parser.add_argument
    add("what", nargs="*", default=list(BENCHMARKS), help=f"some of {', '.join(BENCHMARKS)}")
    add("--n_layer", type=count, default=6, help="blocks")
    add("--n_head", type=count, default=6, help="attention heads a block")
    add("--n_embd", type=count, default=384, help="channels")
    add("--block_size", type=count, default=256, help="trained context in tokens, L")
    add("--batch_size", type=count, default=8, help="windows a training step")
    add("--vocab_size", type=count, default=99, help="size of the vocabulary")
    add("--chunk", type=count, default=128, help="tokens of a window at a time, in evaluations")
    add("--repeats", type=count, default=9, help="rounds that the median is taken of")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the models that train; as in train.py")
    add("--json", help="write the results to this file")
    cli.add_device_arguments(parser)
    args = parser.parse_args(argv)
    for name in args.what:
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")

    if args.json:
        cli.check_output(args.json)
    config = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    GPTConfig(**config)                                   # refuses sizes that do not go together
    device = cli.pick_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")        # as train.py does
    print(f"{cli.device_name(device)}, torch {torch.__version__}: {args.n_layer} layers, width {args.n_embd}, "
          f"T = {args.block_size}, batch {args.batch_size}")
    result = {"command": " ".join(["python -m experiments.bench", *sys.argv[1:]]), "device": cli.device_name(device),
              "torch": torch.__version__, "config": config, "batch_size": args.batch_size}
    for name in args.what:
        torch.manual_seed(0)
        result[name] = BENCHMARKS[name](args, config, device)
    if args.json:
        cli.write_text(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
