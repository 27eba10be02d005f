"""
Let a trained model write, and print each token as it is drawn:

    python sample.py --out_dir out/hope --start "def " --max_new_tokens 200
"""
from pathlib import Path

import torch

import cli
from data.prepare import read_text
from model import GPT, load_checkpoint
from tokenizer import checkpoint_tokenizer, encode_checked


def main(argv=None):
    parser = cli.ArgumentParser("Print text from a trained model, token by token.")
    count, add = cli.number(int, 1), parser.add_argument
    add("--out_dir", default="out/default", help="a run's folder, or a checkpoint file")
    add("--start", default="\n", help="the text to go on from; FILE:path reads it from a file")
    add("--num_samples", type=count, default=1, help="how many continuations")
    add("--max_new_tokens", type=count, default=500, help="tokens to write, past block_size too")
    add("--temperature", type=cli.number(float, 0.01), default=0.8, help="below 1: safer, above 1: wilder")
    add("--top_k", type=count, help="choose among the k likeliest tokens; 1: always the likeliest")
    add("--seed", type=cli.number(int, 0, 2**32), default=1, help="another seed, another text")
    cli.add_scaling_arguments(parser)
    cli.add_device_arguments(parser)
    args = parser.parse_args(argv)

    device = cli.pick_device(args.device)
    checkpoint = load_checkpoint(args.out_dir)
    tokenizer = checkpoint_tokenizer(checkpoint)
    start = args.start
    if start.startswith("FILE:"):
        start = read_text(Path(start.removeprefix("FILE:")))
    if not start:
        raise ValueError(f"{args.start} is empty: the model needs at least one token to go on from")
    if unknown := tokenizer.unknown_characters(start):
        print(f"note: the model has never seen {unknown!r} and reads U+FFFD in their place")

    torch.manual_seed(args.seed)
    ids = encode_checked(tokenizer, start, checkpoint)
    idx = torch.from_numpy(ids.astype("int64"))[None].to(device)                             # (1, T)
    # auto is settled once, by the final length: keys in the cache are turned, and must not be turned anew
    factor = max(1.0, (len(ids) + args.max_new_tokens) / checkpoint["config"]["block_size"])
    factor = factor if args.rope_factor == "auto" else args.rope_factor
    model = GPT.from_checkpoint(checkpoint, rope_scaling=args.rope_scaling, attn_scaling=args.attn_scaling,
                                rope_factor=factor).to(device)
    for _ in range(args.num_samples):
        print(start, end="", flush=True)
        with cli.autocast(device, cli.pick_dtype(args.dtype, device)):
            waiting = []                                  # a character may take several byte-pair tokens, up to four
            for token in model.stream(idx, args.max_new_tokens, args.temperature, args.top_k):
                waiting += token[0].tolist()
                text = tokenizer.decode(waiting)
                if not text.endswith("\ufffd") or len(waiting) == 4:
                    print(text, end="", flush=True)
                    waiting = []
        print(tokenizer.decode(waiting) + "\n" + "-" * 80)


if __name__ == "__main__":
    cli.run(main)
