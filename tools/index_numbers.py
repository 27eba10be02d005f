"""
Put the measured numbers of experiments/results/ into docs/index.html, in place of those there:

    python tools/index_numbers.py
    python tools/index_numbers.py --runs out/biases/*qkv_bias*     # biases_learned.json, too

The perplexities are those of GROUPS: to show another encoding, add its group. Two numbers are about
RoPE from L to 2 L: the share of its rise of the loss that goes if slow pairs keep the angle of
distance (L - 1) / 2 (held; causes.json), and by how much its perplexity is multiplied if biases
lose their function of distance (without; causes_qkv.json). biases_learned.json holds what biases a
of queries and b of keys add to each logit at distance m, a . R(m theta) b / sqrt(D), per encoding
the mean over heads, layers and runs, around m = 0, 1, 3, 7, 15, ...: the i-th number is the mean
over 2^(i - 1/2) <= m + 1 < 2^(i + 1/2).
"""
import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's folder

from common.checkpoint import load_model
from common.report import write_json
from experiments.attention import biases_by_distance

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "index.html"
GROUPS = [("biases.json", f"{pe} bias False qkv_bias {qkv}{logn}")
          for pe in ("rope", "hope") for qkv in (False, True) for logn in ("", " logn")]
GROUPS += [("others.json", f"{pe}{logn}") for pe in ("prope prope_fraction 0.25", "nope")
           for logn in ("", " logn")]


def learned(model):
    """What biases add to the logits, the mean over heads and layers, at the distances above."""
    m = torch.arange(16 * model.config.block_size)
    heads = biases_by_distance(model, m[None])["heads"]
    mean = torch.tensor([head["values"] for head in heads]).mean(0)
    octaves = torch.log2(m + 1.0).round()
    return torch.stack([mean[octaves == i].mean() for i in octaves.unique()])


def losses(file, change):
    """RoPE's losses in [0, L) and [L, 2 L) under a change of experiments/causes.py."""
    groups = json.loads((RESULTS / file).read_text(encoding="utf-8"))["groups"]
    rope = next(group for group in groups if group["name"] == "rope")
    return [x["nll"] for x in rope["changes"][change]["ranges"][:2]]


def as_list(values):
    return f"[{', '.join(f'{x:z.2f}' for x in values)}]"


def numbers():
    """-> the lines of JavaScript that hold the numbers."""
    rows, local, seeds = [], {}, {}
    for file, name in GROUPS:
        groups = json.loads((RESULTS / file).read_text(encoding="utf-8"))["groups"]
        group = next(group for group in groups if group["name"] == name)
        bias, logn = group["args"]["qkv_bias"], group["args"]["attn_scaling"] == "logn"
        ppl, std, cropped = (as_list(x[key] for x in group["buckets"])
                             for key in ("ppl", "ppl_std", "ppl_local"))
        settings = f'pe: "{group["pe"]}", bias: {bias:d}, logn: {logn:d}'
        rows.append(f"    {{{settings}, ppl: {ppl}, std: {std}}},")
        seeds.setdefault(len(group["seeds"]), set()).add(group["pe"])
        if group["pe"] == "hope":
            local[bias] = cropped  # given at most L tokens, the encodings are alike
    assert seeds == {5: {"rope", "hope"}, 3: {"prope", "nope"}}, "the page says this in words"
    near, far = losses("causes.json", "nothing")
    held = (far - losses("causes.json", "angles halved")[1]) / (far - near)
    without = math.exp(losses("causes_qkv.json", "a R b removed")[1]
                       - losses("causes_qkv.json", "nothing")[1])
    biases = json.loads((RESULTS / "biases_learned.json").read_text(encoding="utf-8"))["mean"]
    biases = ",\n    ".join(f"{pe}: {as_list(values)}" for pe, values in biases.items())
    return "\n".join([
        "const MEASURED = {", f"  local: [{local[False]}, {local[True]}], "
        f"held: {held:.2f}, without: {without:.1f},",
        "  perplexity: [", *rows, "  ],", f"  biases: {{{biases}}},", "};"])


def main():
    parser = argparse.ArgumentParser(description="Numbers for docs/index.html.")
    parser.add_argument("--runs", nargs="+", metavar="OUT_DIR", help="measure what biases add")
    args = parser.parse_args()
    if args.runs:
        found = defaultdict(list)
        for model in map(load_model, args.runs):
            found[model.config.pe].append(learned(model))
        mean = {pe: torch.stack(rows).mean(0).tolist() for pe, rows in found.items()}
        write_json(RESULTS / "biases_learned.json", "tools/index_numbers.py", {"mean": mean})
    old = PAGE.read_text(encoding="utf-8")
    new = re.sub(r"const MEASURED = .*?\n};(?=\n)", lambda _: numbers(), old, flags=re.DOTALL)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
