"""
Speed as ratios. What is compared runs in one process, in turns; the median of the rounds counts.

    python -m experiments.bench                                 ten minutes on two CPU cores
    python -m experiments.bench train --pe rope hope hope:SSSL:16 --dtype bfloat16 --json FILE

train     a training step of each --pe against one of nanoGPT's network with AdamW: on a CPU in
          float32, as in its train.py, on a GPU in our number format
generate  1,000 new tokens with the KV cache and without it
evaluate  all buckets to 16 L from one pass against a pass per bucket

--optimizer, --dtype and --compile are for training; the rest is float32, as scripts compute it.
A ratio is the median of the ratios within each round, not the ratio of the medians: two calls that
follow each other are slowed down alike by whatever else the machine does.

Found on two CPU cores with 6 layers of width 384, L = 256, batch 8 (experiments/results/bench_*);
a difference of 0.03 means nothing:

a training step against nope's       rope, prope, hope 1.04 x the time, alibi 1.01, t5 1.08,
                                     kerple 1.04, fire 1.07
tokens per second, nanoGPT's in      hope 0.98 x in float32, 1.60 x in bfloat16
float32 being 1
1,000 new tokens                     14 x faster with the cache
buckets to 16 L                      1.62 x faster from one pass
hope:SSSL:16 against hope            a step 0.99 x the time, an evaluation to 64 L 0.44 x
                                     (4 layers of width 128, L = 128, batch 32)
torch.compile on a CPU               a step 0.90 x the time, after 39 s for the first
Muon against AdamW at its best rate  0.38 x the time to the same loss (config/cpu_demo's size)
"""
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import flags, report
from common.device import Device, DeviceConfig
from common.optimizer import FUSED, OptimizerConfig, make_optimizers
from eval_extrapolation import bucket_edges, score
from experiments.groups import fields_of
from model import GPT, GPTConfig
from train import TrainConfig

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 99}
NEW_TOKENS = 1000


def seconds(call, device):
    """The time that call() takes, including the work that a GPU has queued."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device.torch_device)
    return time.perf_counter() - start


def in_turns(calls, device, repeats, warm_up):
    """{name: call} -> {name: {"seconds": median, "ratio": median of the ratios to the first}}.

    Rounds of warm-up do not count: they compile, and allocate memory."""
    rounds = [{name: seconds(call, device) for name, call in calls.items()}
              for _ in range(warm_up + repeats)][warm_up:]
    first, *_ = calls
    found = {name: {"seconds": statistics.median(times[name] for times in rounds),
                    "ratio": statistics.median(times[name] / times[first] for times in rounds)}
             for name in calls}
    for name, row in found.items():
        print(f"  {name:20} {1000 * row['seconds']:10.1f} ms {row['ratio']:8.3f}", flush=True)
    return found


def training_step(model, optimizers, x, y, autocast):
    """One step as in train.py, without float16's scaler -> the loss before it."""
    with autocast:
        loss = model(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


class NanoGPT(nn.Module):
    """GPT-2 as in nanoGPT (https://github.com/karpathy/nanoGPT), written without any option:
    learned positions, no biases, no cache. The initial weights are PyTorch's."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.positions = nn.Embedding(config.block_size, C)
        self.layers = nn.ModuleList(nn.ModuleList((
            nn.LayerNorm(C, bias=False), nn.Linear(C, 3 * C, False), nn.Linear(C, C, False),
            nn.LayerNorm(C, bias=False), nn.Linear(C, 4 * C, False), nn.Linear(4 * C, C, False)))
            for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx, targets):
        """Token ids (B, T), targets (B, T) -> logits (B, T, V), mean cross-entropy in nats."""
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.tokens(idx) + self.positions(pos)  # (B, T, C)
        for norm_1, qkv, out, norm_2, up, down in self.layers:
            q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                       for part in qkv(norm_1(x)).chunk(3, dim=-1))  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm_2(x))))
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def bench_train(args, config, device):
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, config.block_size),
                         device=device.torch_device)
    theirs, ours = (kind(config).to(device.torch_device) for kind in (NanoGPT, GPT))
    adamw = torch.optim.AdamW(theirs.parameters(), fused=device.type in FUSED)
    optimizers = make_optimizers(ours, OptimizerConfig(optimizer=args.optimizer),
                                 device.torch_device, device.dtype)
    if args.compile:
        torch.compiler.reset()  # torch compiles a function eight times and then no more
        theirs, ours = torch.compile(theirs), torch.compile(ours)
    their_format = nullcontext() if device.type == "cpu" else device.autocast()
    return in_turns({
        "nanoGPT": partial(training_step, theirs, [adamw], x, y, their_format),
        "this GPT": partial(training_step, ours, optimizers, x, y, device.autocast()),
    }, device, args.repeats, warm_up=5)


def without_cache(model, idx, n):
    """Token ids (1, T) -> (1, T + n): the greedy continuation, all of it read again per token."""
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@torch.no_grad()
def bench_generate(args, config, device):
    model = GPT(config).to(device.torch_device).eval()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device.torch_device)
    return in_turns({"with the cache": partial(model.generate, prompt, NEW_TOKENS, top_k=1),
                     "without": partial(without_cache, model, prompt, NEW_TOKENS)},
                    device, repeats=1, warm_up=0)


def score_buckets(model, windows, edges):
    """Losses as in score(), but from a pass per bucket that reads it and all before it."""
    return torch.cat([score(model, windows[:, :end + 1], 128, 2)[:, start:]
                      for start, end in zip(edges, edges[1:])], dim=1)


def bench_evaluate(args, config, device):
    model = GPT(config).to(device.torch_device).eval()
    edges = bucket_edges(config.block_size, 16)
    windows = torch.randint(config.vocab_size, (2, edges[-1] + 1), device=device.torch_device)
    return in_turns({"one pass": partial(score, model, windows, 128, 2),
                     "a pass per bucket": partial(score_buckets, model, windows, edges)},
                    device, args.repeats, warm_up=1)


BENCHMARKS = {"train": bench_train, "generate": bench_generate, "evaluate": bench_evaluate}


def main(argv=None):
    parser = flags.ArgumentParser("Measure speed as ratios, in turns, in one process.")
    parser.add_argument("what", nargs="?", choices=list(BENCHMARKS), help="default: all")
    parser.add_argument("--pe", nargs="+", default=["nope", "hope"],
                        help="encodings or arrangements of layers, as nope+rope:SSSL:32")
    flags.add_flags(parser, GPTConfig, *SIZES)
    flags.add_flags(parser, TrainConfig, "batch_size", "optimizer", "compile", "device", "dtype")
    parser.set_defaults(**SIZES, batch_size=8)
    parser.add_argument("--repeats", type=flags.positive, default=9, help="rounds that count")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in SIZES}
    networks = {pe: GPTConfig(**sizes, **fields_of(pe)) for pe in args.pe}
    if args.json:  # before the work
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    device = Device(DeviceConfig(args.device, args.dtype), training_width=args.n_embd)
    print(f"{device}, {device.dtype}, {args.optimizer}, {sizes}, batch {args.batch_size}")
    result = {"device": str(device), "dtype": str(device.dtype).removeprefix("torch."),
              "optimizer": args.optimizer, "compiled": args.compile, "config": sizes,
              "batch_size": args.batch_size}
    for what in [args.what] if args.what else BENCHMARKS:
        result[what] = {}
        for pe, config in networks.items():
            print(f"{what}, {pe}")
            result[what][pe] = BENCHMARKS[what](args, config, device)
    if args.json:
        report.write_json(args.json, "-m experiments.bench", result)


if __name__ == "__main__":
    flags.run(main)
