"""
Turn text into a data set that train.py and eval_extrapolation.py read:

    python -m data.prepare                                    the .py files of the installed torch and numpy
    python -m data.prepare --source my_novel.txt              your own file, or a folder of them

A data set is a folder with train.bin and val.bin (token ids as uint16, each document followed by an
end-of-document id) and meta.json (tokenizer, counts, sha256).
"""
import hashlib
import importlib.util
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np

import cli
from tokenizer import CharTokenizer, load_tokenizer

DEFAULT_DATASET = "data/pysrc_char"
VAL_FRACTION = 0.1

# ---------------------------------------------------------------------------------------------------------------
# Sources: each gives a list of documents, as text


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


def read_path(path):
    """The user's own text: a file, or all text files under a folder. Raises ValueError where there is none."""
    if path.is_file():
        return [read_text(path)]
    documents, skipped = {}, []
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            try:
                documents.setdefault(read_text(file))
            except ValueError:
                skipped.append(file.name)
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8 text, as {skipped[0]}")
    return list(documents)


def read_text(path):
    """One file as text with Unix line ends. Raises ValueError where it is not UTF-8 text."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: convert it, as with `iconv -f latin1 -t utf-8`") from error
    if "\0" in text:
        raise ValueError(f"{path} is a binary file: only text can be read")
    return text.replace("\r\n", "\n")


# name -> reader, and the packages whose versions decide what it reads
SOURCES = {"pysrc": (read_pysrc, ("torch", "numpy"))}

# ---------------------------------------------------------------------------------------------------------------
# Documents -> data set


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def split(documents):
    """Hold out about a tenth for validation, by whole documents. -> (training documents, validation documents)

    The order of the documents' sha256 decides who is held out, so that neither file names nor a seed do. Too few
    documents for that, as with a single novel: the last tenth of the longest one is held out.
    """
    total = sum(map(len, documents))
    train, val, val_size = [], [], 0
    for document in sorted(documents, key=lambda text: sha256(text.encode())):
        fits = val_size + len(document) <= VAL_FRACTION * total
        (val if fits else train).append(document)
        val_size += fits * len(document)
    if val_size < VAL_FRACTION * total / 2:
        train = sorted(train + val, key=len)
        longest = train.pop()
        cut = len(longest) - int(VAL_FRACTION * total)
        if cut <= 0:
            raise ValueError("these documents cannot be split into training and validation text: add more text")
        print("too few documents to hold out whole ones: the end of the longest is the validation text")
        train, val = train + [longest[:cut]], [longest[cut:]]
    return train, val


def prepare(source="pysrc", tokenizer="char", out_dir=None):
    """Make the data set and return its folder. Raises ValueError where the source has no usable text."""
    path = Path(source)
    if source in SOURCES:
        read, packages = SOURCES[source]
        documents = read()
    elif path.exists():
        documents, packages = read_path(path), ()
    else:
        raise ValueError(f"--source {source}: neither a file or folder nor one of {', '.join(SOURCES)}")
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"--source {source}: there is no text in it")
    out_dir = Path(out_dir or f"data/{path.stem if source not in SOURCES else source}_{tokenizer}")
    if out_dir.exists() and not (out_dir / "meta.json").exists():
        raise ValueError(f"{out_dir} exists and is no data set: name another --out_dir, nothing was touched")

    encoder = {"char": CharTokenizer}[tokenizer]()
    meta = {"source": source, "packages": {name: metadata.version(name) for name in packages},
            "sha256": sha256("\0".join(documents).encode()),          # of the text, whatever the tokenizer
            "tokenizer": encoder.to_dict(), "vocab_size": encoder.vocab_size,
            "documents": {}, "characters": {}, "tokens": {}, "files": {}}
    # Written beside its place and renamed when whole: whoever looks sees the old set, the new one, or none.
    new_dir, old_dir = out_dir.with_name(f".{out_dir.name}.new"), out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(new_dir, ignore_errors=True)
    shutil.rmtree(old_dir, ignore_errors=True)
    new_dir.mkdir(parents=True)
    for name, part in zip(("train", "val"), split(documents)):
        ids = np.concatenate([piece for text in part for piece in (encoder.encode(text), [encoder.end_of_document])])
        ids = ids.astype(np.uint16).tobytes()
        (new_dir / f"{name}.bin").write_bytes(ids)
        meta["documents"][name], meta["characters"][name] = len(part), sum(map(len, part))
        meta["tokens"][name], meta["files"][f"{name}.bin"] = len(ids) // 2, sha256(ids)
    (new_dir / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    if out_dir.exists():
        os.replace(out_dir, old_dir)
    os.replace(new_dir, out_dir)
    shutil.rmtree(old_dir, ignore_errors=True)
    return out_dir


def open_dataset(path):
    """A prepared data set -> (meta, {"train": ids, "val": ids}); the ids are read from disk as they are needed.

    The default set is made on the spot. Raises FileNotFoundError for another one, ValueError for a damaged one.
    """
    path = Path(path)
    if not (path / "meta.json").exists():
        if path != Path(DEFAULT_DATASET):
            raise FileNotFoundError(f"no data set in {path}: make one with `python -m data.prepare --source YOUR_TEXT "
                                    f"--out_dir {path}`")
        print(f"preparing {path} from the installed torch and numpy, a matter of seconds")
        prepare()
    meta = json.loads((path / "meta.json").read_text())
    splits = {name: np.memmap(path / f"{name}.bin", dtype=np.uint16, mode="r") for name in ("train", "val")}
    for name, ids in splits.items():
        if len(ids) != meta["tokens"][name]:
            raise ValueError(f"{path}/{name}.bin does not belong to its meta.json: prepare {path} anew")
    return meta, splits


def main(argv=None):
    parser = cli.ArgumentParser("Turn text into a data set: train.bin, val.bin, meta.json.")
    parser.add_argument("--source", default="pysrc",
                        help=f"{', '.join(SOURCES)}, or the path of a text file or of a folder of them")
    parser.add_argument("--tokenizer", default="char", choices=["char"], help="char: one token a character")
    parser.add_argument("--out_dir", help="the folder to make; data/SOURCE_TOKENIZER if not given")
    args = parser.parse_args(argv)

    out_dir = prepare(args.source, args.tokenizer, args.out_dir)
    meta, splits = open_dataset(out_dir)
    for name, ids in splits.items():
        characters = meta["characters"][name]
        print(f"{name:5}  {meta['documents'][name]:,} documents  {characters:,} characters  {len(ids):,} tokens")
    unknown = sum(int((ids == load_tokenizer(meta["tokenizer"]).unknown).sum()) for ids in splits.values())
    print(f"vocabulary {meta['vocab_size']} tokens; {unknown:,} characters have no token of their own")
    print(f"text sha256 {meta['sha256']}")
    print(f"train on it with: python train.py --dataset {out_dir}")


if __name__ == "__main__":
    cli.run(main)
