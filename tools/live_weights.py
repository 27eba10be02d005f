"""
Write the weights of the two networks that read the reader's own text on docs/text.html:

    python tools/live_weights.py out/demo/rope out/demo/hope --names RoPE HoPE

docs/live.js has the network. Each weight becomes a whole number of steps, of 1/36 of the root mean
square of its tensor, which is about 8 bits. The number is stored as a character: 0, 1, -1, 2, ...
take the printable ASCII from # on, which are one byte in UTF-8, then the letters from U+0100 on.
Embeddings and norms, which are few and count more, have a second part: what the first leaves over,
in finer steps. The two networks have 1.9 MB.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's folder

from common.checkpoint import load_checkpoint, load_model

ROOT = Path(__file__).resolve().parent.parent
USED = "pe", "block_size", "n_layer", "n_head", "n_embd", "rope_base", "hope_cutoff"
OTHERS = {"bias": False, "qkv_bias": False, "rope_scaling": "none", "attn_scaling": "none",
          "rope_context": None}  # the only values that live.js knows


def encode(numbers):
    """Integers -> a character each."""
    order = torch.where(numbers > 0, 2 * numbers - 1, -2 * numbers)
    codes = torch.where(order < 92, order + 35, order + 164)
    assert codes.max() < 0x300, "characters that combine with others begin here"
    return "".join(map(chr, codes.tolist()))


def parts_of(weight, count):
    """A tensor -> `count` parts {"step", "text"} that add up to it."""
    rest, parts = weight.flatten().double(), []
    for _ in range(count):
        step = float(f"{rest.square().mean().sqrt() / 36:.4g}")
        numbers = (rest / step).round()
        rest = rest - step * numbers
        parts.append({"step": step, "text": encode(numbers.long())})
    return parts


def network(name, checkpoint):
    """-> what live.js needs to know about a run."""
    model = load_model(checkpoint)
    config = model.config
    assert config.pe in ("rope", "hope") and "S" not in config.kinds()
    assert all(getattr(config, key) == value for key, value in OTHERS.items())
    weights = {key: parts_of(weight, 2 if "ln_" in key or "wte" in key else 1)
               for key, weight in model.state_dict().items() if key != "lm_head.weight"}  # tied
    return {"name": name, "config": {key: getattr(config, key) for key in USED},
            "chars": checkpoint["tokenizer"]["chars"], "weights": weights}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Weights for docs/live.js.")
    parser.add_argument("runs", nargs="+", metavar="OUT_DIR", help="runs of rope or hope")
    parser.add_argument("--names", nargs="+", required=True, help="names of the runs")
    parser.add_argument("--file", type=Path, default=ROOT / "docs" / "weights.js")
    args = parser.parse_args(argv)
    networks = [network(*pair) for pair in zip(args.names, map(load_checkpoint, args.runs))]
    text = json.dumps(networks, ensure_ascii=False, indent=0)
    args.file.write_text(f"const NETWORKS = {text};\n", encoding="utf-8")


if __name__ == "__main__":
    main()
