"""
Checkpoints, written and read: written atomically, read without executing code.

A checkpoint is a dict of plain values and tensors: config (GPTConfig), model (weights), tokenizer, args (flags of the
run), dataset (path, sha256), iter, val_loss and, in ckpt.pt, everything that --resume needs.
"""
import json
import math
import os
import shlex
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from common.flags import command, describe
from model import GPT, GPTConfig

# --- Atomic writes ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Open a file beside `path` for writing, and rename it to `path` once it is complete and on the disk.

    Whenever the process is killed, `path` is the old file or the new one. Raises OSError, for example on a full disk;
    the old file is then kept."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def lock(folder, wait):
    """Hold an existing folder for this process alone. Another process waits (wait=True) or gets a BlockingIOError."""
    try:
        import fcntl
    except ImportError:  # Windows: there is no lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks
            print(f"note: {folder} cannot be locked ({error.strerror}): let only one process write to it")
        yield
    finally:
        os.close(handle)


@contextmanager
def exclusive(out_dir, rank):
    """Make the folder of a run and hold it, in the process of rank 0. Raises ValueError if another run holds it."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    try:
        with lock(out_dir, wait=False) if rank == 0 else nullcontext():
            yield
    except BlockingIOError as error:
        raise ValueError(f"another process is training in {out_dir}: choose another --out_dir") from error


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Write a checkpoint. Raises OSError if that fails; the file that was there before is kept."""
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__ or error  # torch's own hides the disk's
        raise OSError(f"{path} could not be written, the previous file is kept: {describe(cause)}") from error


def load_checkpoint(path):
    """A checkpoint file, or the one in a run's folder (best.pt, else ckpt.pt) -> dict.

    Reads nanoGPT's ckpt.pt too, which holds neither dataset nor tokenizer (None). Executes nothing in the file
    (weights_only). Raises OSError if it cannot be read, ValueError if it is not a checkpoint of either project."""
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
    if not path.exists():
        raise FileNotFoundError(missing(path))
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            if "model_args" in checkpoint:
                checkpoint = from_nanogpt(checkpoint)
            absent = {"model": {}, "tokenizer": None, "args": {}, "dataset": None, "iter": 0}
            checkpoint = {**absent, **checkpoint}
            check_kinds(checkpoint, KINDS)
            if checkpoint["dataset"]:
                check_kinds(checkpoint["dataset"], {"path": str, "sha256": str})
            checkpoint["args"].setdefault("seed", None)
            checkpoint["dataset"] = checkpoint["dataset"] or None
        except Exception as error:  # torch raises a dozen types here; the remedy is the same for all
            others = [other.name for other in sorted(path.parent.glob("*.pt")) if other != path]
            raise ValueError(f"{path} is damaged or not a checkpoint of this project ({type(error).__name__})"
                             + (f"; the same folder holds {', '.join(others)}" if others else "")) from error
    try:
        checkpoint["config"] = asdict(GPTConfig(**checkpoint["config"]))  # with fields that came later
    except (TypeError, ValueError) as error:  # a field or an encoding that this model.py does not have
        words = str(error).removeprefix("GPTConfig.__init__() ")
        raise ValueError(f"{path} needs another model.py than this one: {words}") from error
    return checkpoint


KINDS = {"config": dict, "model": dict, "args": dict, "iter": int, "tokenizer": dict | None, "dataset": dict | None}


def check_kinds(found, kinds):
    """Raises KeyError or TypeError if something is missing in a dict or of another type. kinds: name -> type."""
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} is {found[name]!r:.50}")


def missing(path):
    """What to do if there is no checkpoint at a path: the runs below it, the weights beside it, a new run."""
    run = path.parent if path.suffix == ".pt" else path
    if inside := sorted({str(file.parent) for file in run.glob("*/*.pt")}):
        return f"{run} is not a run but holds {len(inside)}: name them: {shlex.join(inside)}"
    if others := sorted(run.glob("*.pt")):
        start = command("train.py", "--init_from", others[0], "--out_dir", f"{run}_next")
        return f"{run} has no {path.name}, and {others[0].name} holds weights only: start from them with `{start}`"
    return f"no checkpoint at {path}: train one with `{command('train.py', '--out_dir', run)}`"


def from_nanogpt(checkpoint):
    """A checkpoint of nanoGPT, the same network with learned positions -> one of this project."""
    weights = {name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()
               if not name.endswith(".attn.bias")}  # the causal mask, which older versions store under this name
    return {"config": {**checkpoint["model_args"], "pe": "learned"}, "model": weights, "iter": checkpoint["iter_num"]}


def scaling_factor(checkpoint, length):
    """How many contexts of the training are in `length` tokens, at least 1: what --rope_factor auto stands for."""
    config = checkpoint["config"]
    return max(1.0, length / (config["rope_context"] or config["block_size"]))


def load_model(checkpoint, **overrides):
    """A path, or what load_checkpoint returned -> the GPT, ready to evaluate.

    overrides replace fields of its configuration that the weights do not depend on, such as rope_scaling="yarn".
    Raises ValueError if the weights do not fit the configuration."""
    if not isinstance(checkpoint, dict):
        checkpoint = load_checkpoint(checkpoint)
    model = GPT(GPTConfig(**{**checkpoint["config"], **overrides}))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:  # a page of shapes
        raise ValueError("the weights of the checkpoint do not fit its configuration") from error
    return model.eval()


def copy_matching_weights(model, checkpoint):
    """Copy the weights of a checkpoint into a model -> (names copied, names that are new, names left out).

    What an encoding has learned is copied if the encoding is the same. Raises ValueError if the network around it
    differs, with what differs."""
    was, now = checkpoint["config"], asdict(model.config)
    fixed = [name for name in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")
             if was[name] != now[name]]
    if fixed:
        raise ValueError("--init_from cannot change " + ", ".join(f"{name} ({was[name]} there, {now[name]} here)"
                                                                  for name in fixed) + ": leave these flags out")
    weights, own = checkpoint["model"], model.state_dict()
    old, new = GPTConfig(**was), model.config
    changed = tuple(f"transformer.{module}." for module, a, b in (
        ("wpe", old.pe, new.pe), ("wpe_local", old.local().pe, new.local().pe)) if a != b)
    copied = {name: value for name, value in weights.items() if name in own and not name.startswith(changed)}
    for name, value in copied.items():
        if value.shape != own[name].shape:
            raise ValueError(f"--init_from: {name} has shape {tuple(value.shape)} there and {tuple(own[name].shape)} "
                             "here; learned positions cannot change their block_size: choose another --pe or the same "
                             "--block_size")
    new_names = model.load_state_dict(copied, strict=False).missing_keys
    return list(copied), new_names, [name for name in weights if name not in copied]


# --- log.jsonl, one JSON object per line ------------------------------------------------------------------------------


def append_log(path, line):
    """Add a line. JSON has no nan, so a number that is not finite becomes null."""
    line = {name: value if math.isfinite(value) else None for name, value in line.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut_log(path, last_iter):
    """Drop the lines after a step, which a resumed run writes again, and a last line that a kill cut short.

    last_iter: the step that the run resumes from; -1 for a new run. If a new run finds the log of an earlier one whose
    checkpoints are gone, that log is renamed. Raises ValueError, and leaves the file as it is, if it is not this
    project's."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    opening, rows = '{"iter": ', []  # of a line
    with suppress(ValueError, KeyError, TypeError):  # up to a line that a kill cut short
        for line in lines:
            rows.append((int(json.loads(line)["iter"]), line))
    older = [line for step, line in rows if last_iter < 0 < step]
    if lines and not opening.startswith(lines[0][:len(opening)]) or not all('"tokens": ' in line for line in older):
        raise ValueError(f"{path} is not the log of this run: move it or choose another --out_dir")
    if older:
        aside = path.with_name(f"log_before_{time.time():.0f}.jsonl")
        os.replace(path, aside)
        print(f"note: {path} is that of an earlier run and is now {aside}")
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for step, line in rows if step <= last_iter).encode())
