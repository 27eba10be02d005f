"""
Text to token ids and back. A tokenizer has

    encode(text) -> uint16 array        decode(ids) -> text
    vocab_size, end_of_document         the id that stands between two documents
    to_dict()                           all of it in plain values: meta.json and every checkpoint keep this,
                                        and load_tokenizer() gives the tokenizer back
"""
import string

import numpy as np

PRINTABLE_ASCII = "\t\n" + "".join(chr(c) for c in range(32, 127))


class CharTokenizer:
    """One token a character. Characters outside the set share one token, which reads as U+FFFD."""

    def __init__(self, chars=PRINTABLE_ASCII):
        self.chars = chars
        self.unknown, self.end_of_document = len(chars), len(chars) + 1
        self.vocab_size = len(chars) + 2
        self._id = np.full(0x110000, self.unknown, dtype=np.uint16)  # code point -> id, for all of Unicode
        self._id[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(self, text):
        return self._id[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]

    def decode(self, ids):
        return "".join([*self.chars, "\ufffd", "<|endoftext|>"][i] for i in ids)

    def unknown_characters(self, text):
        """The characters of text that have no token of their own, each once, in order."""
        return "".join(sorted(set(text) - set(self.chars)))

    def to_dict(self):
        return {"kind": "char", "chars": self.chars}


KINDS = {"char": CharTokenizer}

# nanoGPT's shakespeare_char: the characters of tiny Shakespeare, sorted, and no others
NANOGPT_TOKENIZERS = {65: {"kind": "char", "chars": "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase}}


def load_tokenizer(saved):
    """What to_dict() gave -> the tokenizer."""
    kind, *values = saved.values()
    return KINDS[kind](*values)


def checkpoint_tokenizer(checkpoint):
    """The tokenizer of a loaded checkpoint. nanoGPT's hold none: two are known by their vocabulary's size.

    Raises ValueError for a nanoGPT checkpoint with another vocabulary.
    """
    if checkpoint["tokenizer"]:
        return load_tokenizer(checkpoint["tokenizer"])
    size = checkpoint["config"]["vocab_size"]
    if size not in NANOGPT_TOKENIZERS:
        raise ValueError(f"this nanoGPT checkpoint has a vocabulary of {size} and does not say of what: only those of "
                         "GPT-2 (50257, 50304) and shakespeare_char (65) are known")
    return load_tokenizer(NANOGPT_TOKENIZERS[size])


def encode_checked(tokenizer, text, checkpoint):
    """text -> ids that the checkpoint's model has embeddings for. Raises ValueError with the characters it lacks."""
    ids = tokenizer.encode(text)
    if ids.max(initial=0) >= checkpoint["config"]["vocab_size"]:
        raise ValueError(f"the model has no token for {tokenizer.unknown_characters(text)!r}: leave these out")
    return ids
