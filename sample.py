"""
Generate text with a trained model, printed token by token:

    python sample.py --out_dir out/hope --start "def " --max_new_tokens 200
"""
from common import flags  # first: see common/__init__.py

# isort: split

import codecs
import sys
from pathlib import Path

import torch

from common.checkpoint import load_checkpoint, load_model, scaling_factor
from common.device import Device, DeviceConfig
from data import nanogpt
from data.sources import read_text, unix_lines
from data.tokenizer import encode_checked, load_tokenizer, shown


def print_stream(tokens, tokenizer):
    """Print tokens (1, 1) as they come, and each character with the last of its tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        print(decoder.decode(tokenizer.decode_bytes(token[0].tolist())), end="", flush=True)
        if failure := getattr(sys.stdout, "failure", None):  # nobody reads it any more, or the disk is full
            raise failure
    print(decoder.decode(b"", final=True) + "\n" + "-" * 80)


def make_parser():
    parser = flags.ArgumentParser("Generate text with a trained model, printed token by token.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("--out_dir", default="out/default", help="a run's folder, or a checkpoint file")
    add("--start", default="\n", help="the text to continue, a newline if not given; FILE:path reads it from a file")
    add("--num_samples", type=count, default=1, help="how many continuations")
    add("--max_new_tokens", type=count, default=500, help="tokens to generate; block_size is no limit")
    add("--temperature", type=flags.parsed(float, at_least=0), default=0.8,
        help="divides the logits: below 1 more predictable, above 1 more random; 0: greedy")
    add("--top_k", type=count, help="sample from the k most likely tokens; 1: greedy")
    nanogpt.add_meta_flag(parser)
    add("--seed", type=flags.parsed(int, at_least=0, at_most=2**32), default=1, help="of the random choices")
    flags.add_scaling_flags(parser)
    flags.add_flags(parser, DeviceConfig)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    flags.note_idle_factor(args)
    device = Device(args)
    checkpoint = load_checkpoint(args.out_dir)
    nanogpt.fill_in_tokenizers([checkpoint], args.meta)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    path = args.start.removeprefix("FILE:")
    start = unix_lines(path) if path == args.start else read_text(Path(path))
    if not start:
        raise ValueError(f"{args.start} is empty: the model needs at least one token to continue")
    if unknown := tokenizer.unknown_characters(start):
        print(f"note: the model has never seen {shown(unknown)} and reads U+FFFD instead")

    torch.manual_seed(args.seed)
    ids = encode_checked(tokenizer, start, checkpoint)
    idx = torch.from_numpy(ids.astype("int64"))[None].to(device.torch_device)  # (1, T)
    overrides = {name: getattr(args, name) for name in ("rope_scaling", "attn_scaling") if getattr(args, name)}
    if args.rope_scaling:  # one factor for the whole text: cached keys are rotated already
        factor = scaling_factor(checkpoint, len(ids) + args.max_new_tokens)
        overrides["rope_factor"] = factor if args.rope_factor == "auto" else args.rope_factor
    model = load_model(checkpoint, **overrides).to(device.torch_device)
    for _ in range(args.num_samples):
        print(start, end="", flush=True)
        with device.autocast():
            print_stream(model.stream(idx, args.max_new_tokens, args.temperature, args.top_k), tokenizer)


if __name__ == "__main__":
    flags.run(main, takes_memory="--max_new_tokens")
