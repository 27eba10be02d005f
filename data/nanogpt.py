"""
What nanoGPT (https://github.com/karpathy/nanoGPT) does differently, so that its users can go on here: data folders with
meta.pkl or nothing beside the ids, checkpoints that do not hold their tokenizer, flags of other names.
"""
import pickle
import string

import numpy as np

from data.sources import sha256, sha256_of

SHAKESPEARE_CHARS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
GPT2_SIZES = 50257, 50304  # plain, and padded to a multiple of 64

# Flags of nanoGPT that are not here, and what to do instead
FLAGS = {
    "--lr": "it is --learning_rate", "--eval_only": "use python eval_extrapolation.py OUT_DIR",
    "--wandb_log": "losses are in OUT_DIR/log.jsonl, and python -m experiments.curves OUT_DIR draws them",
    "--wandb_project": "losses are in OUT_DIR/log.jsonl", "--wandb_run_name": "losses are in OUT_DIR/log.jsonl",
    "--decay_lr": "for a constant rate, give --min_lr the value of --learning_rate",
    "--always_save_checkpoint": "ckpt.pt is always saved, best.pt if it is the best so far",
    "--backend": "it follows from --device", "--num_epochs": "give --max_iters",
    "--init_from resume": "add --resume", "--init_from scratch": "leave it out",
    **{f"--init_from {name}": "GPT-2's weights are not downloaded; name a ckpt.pt of nanoGPT or a run's folder"
       for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}}


def add_meta_flag(parser):
    parser.add_argument("--meta", help="meta.pkl of nanoGPT with the characters of its checkpoint, which does not "
                        "hold them")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. It never imports a name, so a file cannot run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta_pkl(path):
    """The tokenizer in a meta.pkl, as a tokenizer's to_dict() gives it. Raises ValueError if it is not such a file."""
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]  # id -> character
        chars = "".join(itos[i] for i in range(len(itos)))
    except FileNotFoundError:
        raise
    except Exception as error:  # pickle raises many types
        raise ValueError(f"{path} is damaged or not a meta.pkl of nanoGPT ({error!r})") from error
    if not len(chars) == len(itos) == len(set(chars)):
        raise ValueError(f"{path} does not give one character per id")
    return {"kind": "char", "chars": chars}


def is_data_folder(path):
    """Whether a folder holds ids, but neither a data set of this project nor the remains of one."""
    return (path / "train.bin").exists() and not (path / "meta.json").exists() and not (path / "bpe.tiktoken").exists()


def open_data_folder(path):
    """A folder with train.bin, val.bin and, if its tokens are characters, meta.pkl -> as loader.open_dataset.

    Without meta.pkl the tokens are GPT-2's. There may be no id between documents: then the text is one document."""
    if (path / "meta.pkl").exists():
        tokenizer = read_meta_pkl(path / "meta.pkl")
        vocab_size = len(tokenizer["chars"])
    else:
        tokenizer, vocab_size = {"kind": "gpt2"}, GPT2_SIZES[0]
        print(f"note: {path} has neither meta.json nor meta.pkl; its tokens are taken for GPT-2's, as in nanoGPT")
    files = {part: path / f"{part}.bin" for part in ("train", "val")}
    try:
        splits = {part: np.memmap(file, dtype=np.uint16, mode="c") for part, file in files.items()}
        largest = max(ids.max() for ids in splits.values())
        if largest >= vocab_size:
            raise ValueError(f"it has an id of {largest}, but the largest in the vocabulary is {vocab_size - 1}")
        if tokenizer["kind"] == "gpt2" and largest < 256:
            raise ValueError("its ids are too small for GPT-2's tokens, so meta.json or meta.pkl is missing")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a data folder of nanoGPT or of this project: {error}") from error
    return {"source": str(path), "sha256": sha256("".join(map(sha256_of, files.values())).encode()),
            "tokenizer": tokenizer, "vocab_size": vocab_size,
            "tokens": {part: len(ids) for part, ids in splits.items()}}, splits


def fill_in_tokenizers(checkpoints, meta=None):
    """Set the tokenizer of checkpoints without one (None). meta: path of a meta.pkl with their characters.

    Without it, the size of the vocabulary decides. Raises ValueError if that is unknown or does not fit meta."""
    lacking = [checkpoint for checkpoint in checkpoints if not checkpoint["tokenizer"]]
    if meta and not lacking:
        print("note: --meta has no effect: the checkpoint holds its tokenizer")
    for checkpoint in lacking:
        size = checkpoint["config"]["vocab_size"]
        if meta:
            checkpoint["tokenizer"] = read_meta_pkl(meta)
            if (n_chars := len(checkpoint["tokenizer"]["chars"])) != size:
                raise ValueError(f"{meta} has {n_chars} characters and the checkpoint has {size}")
        elif size in GPT2_SIZES:
            checkpoint["tokenizer"] = {"kind": "gpt2"}
        elif size == len(SHAKESPEARE_CHARS):
            checkpoint["tokenizer"] = {"kind": "char", "chars": SHAKESPEARE_CHARS}
            print("note: the checkpoint does not say which characters its 65 tokens are; nanoGPT's shakespeare_char is "
                  "assumed (--meta PATH/meta.pkl names another set)")
        else:
            raise ValueError(f"this nanoGPT checkpoint has a vocabulary of {size} tokens and does not say which; only "
                             "those of GPT-2 (50257, 50304) and shakespeare_char (65) are known: add --meta "
                             "PATH/meta.pkl")


def adopt_tokenizer(checkpoint, name, meta):
    """Set the tokenizer of a checkpoint without one to that of a data set (name, meta) that has as many tokens."""
    if not checkpoint["tokenizer"] and checkpoint["config"]["vocab_size"] == meta["vocab_size"]:
        checkpoint["tokenizer"] = meta["tokenizer"]
        print(f"note: the checkpoint does not say what its {meta['vocab_size']:,} tokens are; they are taken for those "
              f"of {name}")
    fill_in_tokenizers([checkpoint])
