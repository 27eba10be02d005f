"""
From a data set on the disk to tensors: batches to train and validate on, windows to score.
"""
import json
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import lock
from data.prepare import prepare
from data.sources import read_text, sha256
from data.tokenizer import checkpoint_tokenizer, encode_checked

DEFAULT_DATASET = "data/pysrc_char"

# ---------------------------------------------------------------------------------------------------------------
# Data sets


def open_dataset(path):
    """A data set -> (meta, {"train": ids, "val": ids}), uint16 arrays that are read from the disk when used.

    The default data set is made if it is missing. Raises FileNotFoundError if another one is, and ValueError if the
    files are not those that prepare() wrote, with the command that makes them again.
    """
    path = Path(path)
    if not (path / "meta.json").exists():
        if path != Path(DEFAULT_DATASET):
            raise FileNotFoundError(f"no data set in {path}: make one with `python -m data.prepare --source YOUR_TEXT "
                                    f"--out_dir {path}`")
        path.parent.mkdir(exist_ok=True)
        with lock(path.parent, wait=True):  # two trainings may start at once
            if not (path / "meta.json").exists():
                print(f"preparing {path} from the installed torch and numpy, this takes seconds")
                prepare()
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        return meta, {name: open_ids(path, name, meta) for name in ("train", "val")}
    except (KeyError, TypeError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or was made by another version ({error!r}): make it again with "
                         "`python -m data.prepare`") from error


def open_ids(path, name, meta):
    """The ids in path/name.bin, checked against meta. Raises ValueError if they differ from what prepare() wrote."""
    kind = meta["tokenizer"]["kind"] + f" --vocab_size {meta['vocab_size']}" * ("tiktoken" in meta["tokenizer"])
    remedy = (f"make it again with `python -m data.prepare --source {meta['source']} --tokenizer {kind} "
              f"--out_dir {path}`")
    file = path / f"{name}.bin"
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty: {remedy}")
    ids = np.memmap(file, dtype=np.uint16, mode="c")  # c: what tensors write to it stays in memory
    if len(ids) != meta["tokens"][name]:
        raise ValueError(f"{file} has {len(ids):,} tokens and should have {meta['tokens'][name]:,}: {remedy}")
    if ids.max() >= meta["vocab_size"]:
        raise ValueError(f"{file} has an id of {ids.max()}, but the largest is {meta['vocab_size'] - 1}: {remedy}")
    if sha256(ids) != meta["files"][file.name]:
        raise ValueError(f"{file} was changed since it was made (another sha256): {remedy}")
    return ids


# ---------------------------------------------------------------------------------------------------------------
# Batches to train and validate on: inputs and targets, int64 (B, L) each, the targets one token later


def token_tensor(ids, device):
    """Ids, uint16 (N,), as the tensor that batch_at reads: on the GPU if it fits there, else on the disk.

    On a GPU it may take a tenth of the free memory. A step then only transfers the offsets of its batch.
    """
    ids = torch.from_numpy(ids.view(np.int16))  # the same bits: torch has few operations for uint16
    fits = device.type == "cuda" and 10 * ids.nbytes < torch.cuda.mem_get_info(device)[0]
    return ids.to(device) if fits else ids


def batch_at(ids, offsets, block_size, device):
    """The windows of a token tensor that start at offsets (B,) -> inputs, targets."""
    offsets = torch.from_numpy(offsets).to(ids.device, non_blocking=True)  # (B,)
    rows = ids[offsets[:, None] + torch.arange(block_size + 1, device=ids.device)]  # (B, L + 1)
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory().to(device, non_blocking=True)  # pinned: copied while the GPU computes
    rows = rows.to(device).long() & 0xFFFF  # unsigned again
    return rows[:, :-1], rows[:, 1:]


def training_batch(ids, batch_size, block_size, seed, index, device):
    """The index-th batch of a seed -> inputs, targets. It depends on nothing else, so a resumed run sees the same."""
    offsets = np.random.default_rng((seed, index)).integers(len(ids) - block_size, size=batch_size)
    return batch_at(ids, offsets, block_size, device)


def validation_batches(ids, batch_size, block_size, n_batches, device):
    """Yield n_batches of inputs, targets: windows spread evenly over the text, the same at each call."""
    offsets = np.linspace(0, len(ids) - block_size - 1, num=n_batches * batch_size, dtype=np.int64)
    for part in offsets.reshape(n_batches, batch_size):
        yield batch_at(ids, part, block_size, device)


# ---------------------------------------------------------------------------------------------------------------
# Windows to score


def document_windows(ids, end_of_document, length, n_windows):
    """Windows of length + 1 tokens, each inside one document, that do not overlap -> int64 (N, length + 1).

    N is n_windows, spread evenly over all that exist, or all of them if there are fewer. Raises ValueError if no
    document is long enough.
    """
    ends = np.append(np.flatnonzero(ids == end_of_document), len(ids))
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = [p for start, end in zip(starts, ends) for p in range(start, end - length, length + 1)]
    if not places:
        raise ValueError(f"no document has the {length + 1:,} tokens of a window, the longest has "
                         f"{max(ends - starts):,}: lower --max_factor or use longer texts")
    chosen = np.linspace(0, len(places) - 1, num=min(n_windows, len(places))).round().astype(int)
    return torch.from_numpy(np.stack([ids[places[i]:places[i] + length + 1] for i in chosen]).astype(np.int64))


def text_to_score(checkpoints, names, dataset=None, text=None):
    """What several checkpoints are scored on -> token ids, their source, the text's sha256, the tokenizer.

    A text file, or the validation text of a data set, or that of the first checkpoint's data set. names: of the runs,
    for messages. Raises ValueError if the checkpoints do not share a tokenizer with each other and with the text.
    """
    tokenizer = checkpoint_tokenizer(checkpoints[0])
    for name, checkpoint in zip(names, checkpoints):
        if checkpoint["tokenizer"] != checkpoints[0]["tokenizer"]:
            raise ValueError(f"{name} and {names[0]} have different tokenizers: score them separately")
    if text:
        content = read_text(Path(text))
        return encode_checked(tokenizer, content, checkpoints[0]), text, sha256(content.encode()), tokenizer
    if not dataset and not checkpoints[0]["dataset"]:
        raise ValueError(f"{names[0]} does not say what it was trained on: give a --text to score")
    source = dataset or checkpoints[0]["dataset"]["path"]
    meta, splits = open_dataset(source)
    if meta["tokenizer"] != tokenizer.to_dict():
        raise ValueError(f"{source} was made with another tokenizer than that of {names[0]}: give another --dataset")
    return splits["val"], source, meta["sha256"], tokenizer
