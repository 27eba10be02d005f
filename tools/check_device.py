"""
Does this device compute what the CPU computes, and how fast does it train? Once on a new machine:

    python tools/check_device.py --device cuda --speed          exit code 1 if a check fails

A line per encoding and number format shows four errors, as shares of the norm of what is right:
logits and gradients against float64 on the CPU; logits when a later token changes, which no query
may see; logits through the KV cache. Some versions of PyTorch compute attention wrongly on some
devices, without an error: it sees later tokens (issue 195910 there), or misreads cached keys
(169222, 182285). --speed trains some steps with each config for GPUs, compiled and not, beside
what config/laptop_char computes for an RTX 4060 Laptop, compiled.
"""
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's folder

from common import flags
from common.device import Device, DeviceConfig
from model import GPT, PE, GPTConfig, KVCache
from train import Run, parse

NETWORKS = {pe: {"pe": pe} for pe in PE} | {
    "windows": {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 16}}
LENGTH = 192  # tokens; some kernels were wrong at this length and right at 128
ROUNDING = {"float32": 1e-3, "bfloat16": 0.04, "float16": 0.005}  # four times what was seen
COMPUTED = {"laptop_char": "5-6 minutes, 2.0 GB", "laptop_overnight": "138-186 minutes, 3.9 GB"}


def make_network(changes):
    """A small network whose attention is far from uniform, so that a wrong mask or angle shows."""
    network = GPT(GPTConfig(block_size=LENGTH, vocab_size=99, n_layer=2, n_head=2, n_embd=64,
                            **changes)).eval()
    for weight in network.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    return network


def compute(network, idx, autocast):
    """Token ids (1, T) -> logits (1, T, V), the gradient of the loss by all weights (N,), and the
    logits from a KV cache: of two long pieces of the text, then of one token at a time."""
    cache, pieces = KVCache(LENGTH), idx.split([100, LENGTH - 108, *[1] * 8], dim=1)
    with autocast:
        logits, loss = network(idx, idx)
        with torch.no_grad():
            cached = torch.cat([network(piece, piece, cache)[0] for piece in pieces], dim=1)
    (1024 * loss).backward()  # else small gradients would be zero in float16
    gradient = torch.cat([weight.grad.flatten() for weight in network.parameters()]) / 1024
    return [x.detach().cpu().double() for x in (logits, gradient, cached)]


def check(name, changes, device):
    """Print the errors of a network of NETWORKS -> whether all are within their limits."""
    torch.manual_seed(0)
    network, idx = make_network(changes), torch.randint(99, (1, LENGTH))
    other = torch.cat((idx[:, :-1], (idx[:, -1:] + 1) % 99), dim=1)
    double = copy.deepcopy(network).double()
    exact, exact_gradient, _ = compute(double, idx, torch.autocast("cpu", enabled=False))
    network, idx, other = (x.to(device.torch_device) for x in (network, idx, other))
    logits, gradient, cached = compute(network, idx, device.autocast())
    changed, *_ = compute(network, other, device.autocast())

    dtype, line, correct = str(device.dtype).removeprefix("torch."), "", True
    for what, found, right, limit in (
            ("logits", logits, exact, ROUNDING[dtype]),
            ("gradients", gradient, exact_gradient, ROUNDING[dtype]),
            ("later tokens", changed[:, :-1], logits[:, :-1], 1e-5),  # the same operations
            ("cache", cached, logits, ROUNDING[dtype])):
        error = ((found - right).norm() / right.norm()).item()
        wrong = not error <= limit  # nan is wrong, too
        line += f"  {what} {error:.1e}{' WRONG' if wrong else ''}"
        correct = correct and not wrong
    print(f"{name:10} {dtype:8}{line}", flush=True)
    return correct


def speed(name, *changes, steps=10):
    """Train with config/NAME, and other flags, on random tokens, not compiled and compiled."""
    config_file = Path(__file__).resolve().parent.parent / "config" / name
    network, config, _ = parse([f"@{config_file}", "--out_dir", "out/speed", "--sample_chars", "0",
                                *changes])
    network = replace(network, vocab_size=8192 if "bpe8192" in config.dataset else 98)
    device = Device(config, training_width=network.n_embd)
    ids = {"train": torch.randint(network.vocab_size, (10**6,)).short().to(device.torch_device)}
    for compiled in (False, True):
        run = Run(network, replace(config, compile=compiled), {}, ids, device)
        for i in range(3 + steps):
            run.step()
            run.train_loss.item()  # waits for the device
            if i == 2:  # by now it is compiled, and memory is allocated
                start = time.perf_counter()
        seconds = (time.perf_counter() - start) / steps
        memory = "-"
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            torch.cuda.reset_peak_memory_stats()
        print(f"{name}, {'' if compiled else 'not '}compiled: {run.tokens_per_step / seconds:,.0f}"
              f" tokens/s, {config.max_iters * seconds / 60:.0f} minutes in all, {memory} GB;"
              f" computed: {COMPUTED.get(name, '-')}", flush=True)


def main(argv=None):
    parser = flags.ArgumentParser("Check what a device computes, and how fast it trains.")
    flags.add_flags(parser, DeviceConfig, "device")
    parser.add_argument("--speed", action="store_true", help="train with the configs for GPUs")
    args = parser.parse_args(argv)
    devices = [Device(DeviceConfig(args.device, dtype)) for dtype in ROUNDING]
    print(f"PyTorch {torch.__version__} on {devices[0]}")
    found = [check(name, changes, device) for name, changes in NETWORKS.items()
             for device in devices]
    for name in COMPUTED if args.speed else ():
        speed(name, "--device", args.device)
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    flags.run(main)
