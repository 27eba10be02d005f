"""
From a data set on the disk to tensors: batches to train and validate on, windows to score.
"""
from pathlib import Path

import numpy as np
import torch

from data import nanogpt
from data.prepare import command, dataset_path, prepare, read_meta, remedy
from data.sources import DATA_SET_FILES, read_text, sha256
from data.tokenizer import encode_checked, load_tokenizer, shown

DEFAULT_DATASET = "data/pysrc_char"

# --- Data sets --------------------------------------------------------------------------------------------------------


def open_dataset(name):
    """A data set -> (meta, {"train": ids, "val": ids}), uint16 arrays that are read from the disk when used.

    name is resolved by dataset_path. A folder of nanoGPT's is read as well. The default data set is made if it is
    missing. Raises FileNotFoundError if another one is, and ValueError if the files are not those that prepare() wrote,
    with the command that makes them again."""
    path = dataset_path(name)
    if nanogpt.is_data_folder(path):
        return nanogpt.open_data_folder(path)
    if not any((path / file).exists() for file in DATA_SET_FILES):
        if path.exists():  # a text, or a folder of texts
            raise ValueError(f"{path} is no data set: make one of it with `{command('--source', path)}`")
        if path != dataset_path(DEFAULT_DATASET):
            new = command("--source", "YOUR_TEXT", "--out_dir", path)
            raise FileNotFoundError(f"no data set in {path}: make one with `{new}`")
        print(f"preparing {path} from the installed torch and numpy, this takes seconds")
        prepare()
    meta = read_meta(path)
    try:
        return meta, {part: open_ids(path / f"{part}.bin", meta["vocab_size"], meta["tokens"][part],
                                     meta["files"][f"{part}.bin"]) for part in ("train", "val")}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy(path, meta['arguments'])}") from error


def open_ids(file, vocab_size, n_tokens, known_sha256):
    """The token ids in a file. Raises ValueError if they are not those that prepare() wrote."""
    if (size := file.stat().st_size) != 2 * n_tokens:
        raise ValueError(f"{file.name} has {size:,} bytes and should have {2 * n_tokens:,}")
    ids = np.memmap(file, dtype=np.uint16, mode="c")  # c: what tensors write to it stays in memory
    if ids.max() >= vocab_size:
        raise ValueError(f"{file.name} has an id of {ids.max()}, but the largest in the vocabulary is {vocab_size - 1}")
    if sha256(ids) != known_sha256:
        raise ValueError(f"{file.name} was changed since it was made: its sha256 differs")
    return ids


def open_to_train(name, block_size, checkpoint=None, same_text=False):
    """open_dataset for a training with windows of block_size tokens, which may continue from a checkpoint.

    Raises ValueError if a part is shorter than a window, if the checkpoint has another tokenizer or, with same_text, if
    it was trained on another text."""
    meta, ids = open_dataset(name)
    for part, tokens in ids.items():
        if len(tokens) <= block_size:
            raise ValueError(f"{name}/{part}.bin has {len(tokens)} tokens and a window needs block_size + 1 = "
                             f"{block_size + 1}: use more text or a smaller --block_size")
    if checkpoint:
        nanogpt.adopt_tokenizer(checkpoint, name, meta)
        if checkpoint["tokenizer"] != meta["tokenizer"]:
            raise ValueError(f"{name} has another tokenizer than the checkpoint: name another --dataset")
    if same_text and checkpoint["dataset"]["sha256"] != meta["sha256"]:
        raise ValueError(f"{name} is not the text that the run was trained on: the sha256 differs")
    return meta, ids


# --- Batches to train and validate on: inputs and targets, int64 (B, L) each, the targets one token later -------------


def token_tensor(ids, device):
    """Ids, uint16 (N,), as the tensor that batch_at reads: on the GPU if it fits there, else on the disk.

    On a GPU it may take a tenth of the free memory. A step then only transfers the offsets of its batch."""
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


# --- Windows to score -------------------------------------------------------------------------------------------------


def document_windows(ids, end_of_document, length, n_windows):
    """Windows of length + 1 tokens, each inside one document, that do not overlap -> int64 (N, length + 1).

    N is n_windows, spread evenly over all that exist, or all of them if there are fewer. Raises ValueError if no
    document is long enough."""
    ends = np.append(np.flatnonzero(ids == end_of_document), len(ids))
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = [p for start, end in zip(starts, ends) for p in range(start, end - length, length + 1)]
    if not places:
        raise ValueError(f"no document has the {length + 1:,} tokens of a window, the longest has "
                         f"{max(ends - starts):,}: lower --max_factor or use longer texts")
    chosen = np.linspace(0, len(places) - 1, num=min(n_windows, len(places))).round().astype(int)
    return torch.from_numpy(np.stack([ids[places[i]:places[i] + length + 1] for i in chosen]).astype(np.int64))


def add_text_flags(parser):
    """--dataset, --text and --meta, as text_to_score takes them."""
    parser.add_argument("--dataset", help="folder whose validation text is read; default: that of the runs")
    parser.add_argument("--text", help="read this text file instead, as one document")
    nanogpt.add_meta_flag(parser)


def text_to_score(checkpoints, names, dataset=None, text=None, meta=None):
    """What several checkpoints are scored on -> token ids, their source, the text's sha256, the tokenizer.

    The ids are those of a text file, or of the validation text of a data set, or of the first checkpoint's data set.
    names: of the runs, for messages. meta: path of a meta.pkl with the characters of nanoGPT's checkpoints. Prints what
    makes the scores hard to compare. Raises ValueError if the checkpoints do not share a tokenizer with each other and
    with the text, or if the first one's data set was changed after its training."""
    nanogpt.fill_in_tokenizers(checkpoints, meta)
    saved = checkpoints[0]["tokenizer"]
    for name, checkpoint in zip(names, checkpoints):
        if checkpoint["tokenizer"] != saved:
            raise ValueError(f"{name} and {names[0]} have different tokenizers: score them separately")
    note_training_texts(checkpoints, names)
    if dataset and text:
        print("note: --dataset has no effect with --text")
    tokenizer = load_tokenizer(saved)
    smallest = min(checkpoints, key=lambda checkpoint: checkpoint["config"]["vocab_size"])  # it may have been padded
    if text:
        content = read_text(Path(text))
        ids = encode_checked(tokenizer, content, smallest)
        if unknown := tokenizer.unknown_characters(content):
            n = int((ids == tokenizer.unknown).sum())
            print(f"note: the model has never seen {n:,} of the {len(content):,} characters ({n / len(content):.1%}) "
                  f"and reads U+FFFD in their place: {shown(unknown)}")
        return ids, text, sha256(content.encode()), tokenizer
    source, data, ids = dataset_to_score(checkpoints[0]["dataset"], names[0], dataset)
    if data["tokenizer"] != saved:
        raise ValueError(f"{source} was made with another tokenizer than that of {names[0]}: give another --dataset")
    if ids.max(where=ids != tokenizer.end_of_document, initial=0) >= smallest["config"]["vocab_size"]:
        raise ValueError(f"{source} has characters for which {names[0]} has no token: give another --dataset")
    return ids, source, data["sha256"], tokenizer


def note_training_texts(checkpoints, names):
    """Tell if the checkpoints were trained on different texts."""
    texts = {}  # sha256 -> a run that was trained on this text
    for name, checkpoint in zip(names, checkpoints):
        if checkpoint["dataset"]:
            texts.setdefault(checkpoint["dataset"]["sha256"], f"{name} on {checkpoint['dataset']['path']}")
    if len(texts) > 1:
        print("note: the runs were trained on different texts: "
              + ", ".join(f"{run} (sha256 {digest[:16]})" for digest, run in texts.items()))


def dataset_to_score(trained_on, name, dataset):
    """The data set that is asked for, or the one a run was trained on -> its path, meta, ids of its validation text."""
    if not dataset and not trained_on:
        raise ValueError(f"{name} does not say what it was trained on: give a --dataset or a --text to score")
    source = dataset or trained_on["path"]
    meta, splits = open_dataset(source)
    if not dataset and meta["sha256"] != trained_on["sha256"]:
        raise ValueError(f"{source} is not the text that {name} was trained on (its sha256 differs), and its "
                         "validation text may contain training text: name what to score with --dataset or --text")
    return source, meta, splits["val"]
