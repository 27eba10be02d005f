"""Tokenizers: byte pairs equal those of counting again; every text is decoded unchanged."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken brings it
import tiktoken
import torch

from data.tokenizer import PIECES, BPETokenizer, CharTokenizer, count_characters, from_dict, learn

ODD_TEXT = ("emoji 👩‍👩‍👧 🇯🇵 \U0010ffff, 日本語のテキスト、ひらがな, हिन्दी, العربية, "
            + "\r\n\t\x00\x01\x1b\x1c\x7f\x85\u2028<|endoftext|>" + " " * 100 + "x"
            + "".join(map(chr, range(0x400))))


@pytest.fixture(scope="module")
def code():
    """200,000 characters of Python."""
    files = sorted(Path(np.__file__).parent.rglob("lib/*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in files)[:200_000]


@pytest.fixture(scope="module")
def bpe(code):
    return BPETokenizer.learn([code], 400)


def recount_everything(text, n_tokens):
    """The reference: merging is str.replace in a string of ids -> tokens, the text's ids."""
    end = chr(1023)  # of a piece; ids stay below
    pieces = regex.findall(PIECES, text)
    ids = end.join("".join(map(chr, piece.encode())) for piece in pieces)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < n_tokens:
        codes = np.frombuffer(ids.encode("utf-16-le"), dtype=np.uint16).astype(int)
        table = np.bincount(codes[:-1] * 1024 + codes[1:], minlength=2**20)
        table = table.reshape(1024, 1024)[:1023, :1023]
        a, b = map(int, np.unravel_index(table.argmax(), table.shape))  # of equals the smallest
        if table[a, b] == 0:
            break
        ids = ids.replace(chr(a) + chr(b), chr(len(tokens)))
        tokens.append(tokens[a] + tokens[b])
    return tokens, list(map(ord, ids.replace(end, "")))


def assert_same_as_recounted(text, n_tokens):
    tokens, ids = recount_everything(text, n_tokens)
    learned = BPETokenizer.learn([text], n_tokens + 1)  # with the end of a document
    assert learned.vocab_size == len(tokens) + 1
    assert [learned.decode_bytes([i]) for i in range(len(tokens))] == tokens
    assert learned.encode(text).tolist() == ids  # tiktoken splits the text as the training did


def test_merges_equal_those_of_recounting_everything_on_200_kb(code):
    assert len(code) == 200_000
    assert_same_as_recounted(code, 600)


@pytest.mark.parametrize("seed", range(20))
def test_merges_equal_those_of_recounting_everything_on_texts_full_of_ties_and_runs(seed):
    generator = random.Random(seed)
    alphabet = generator.choice(["a", "ab", "aé ", "ab1 \n", "日本 a", "日本、語。", "ไทยក្ខា "])
    runs = (generator.choice(alphabet) * generator.randint(1, 6) for _ in range(60))
    assert_same_as_recounted("".join(runs), 270)


def test_pieces_separate_letters_digits_signs_and_spaces_and_are_not_long():
    pieces = ["abc", "123", " 45", "é", ",", " x", " ", " y", "." * 32, "." * 8, "1" * 32, "1",
              "a" * 32, "a"]
    assert regex.findall(PIECES, "".join(pieces)) == pieces


def test_any_text_is_decoded_unchanged_from_byte_pairs_and_from_its_own_characters(bpe):
    for made in (bpe, learn("char", [ODD_TEXT], "auto", None)):
        ids = made.encode(ODD_TEXT)
        assert made.decode(ids) == ODD_TEXT and made.decode_bytes(ids) == ODD_TEXT.encode()
        assert ids.dtype == np.uint16 and (made.unknown is None or made.unknown not in ids)
        assert made.end_of_document not in ids  # even if a text contains its characters
        assert made.decode([made.end_of_document]) == "<|endoftext|>"
        assert ids.max() < made.vocab_size == made.end_of_document + 1


def test_characters_outside_the_set_share_one_token(bpe):
    made = learn("char", ["any text ü"], "ascii", None)
    assert made.vocab_size == 99  # 95 printable ones, newline, tab, unknown, end of a document
    ids = made.encode("\ta~ü\n日 \r")
    assert (ids == made.unknown).tolist() == [False] * 3 + [True, False, True, False, True]
    assert made.decode(ids) == "\ta~\ufffd\n\ufffd \ufffd"
    for other in (made, bpe):  # a command line that is not UTF-8 gives halves of surrogate pairs
        assert other.decode(other.encode("a\ud83db")) == "a\ufffdb"


def test_runs_of_a_million_equal_characters_are_encoded(bpe):
    for text in ("a" * 10**6, " " * 10**6 + "a", "\n" * 10**6, "日" * 10**6):
        assert bpe.decode(bpe.encode(text)) == text


def test_a_tokenizer_is_restored_from_a_checkpoint_and_from_json(bpe, tmp_path):
    for made in (bpe, CharTokenizer("abc é")):
        torch.save(made.to_dict(), tmp_path / "saved.pt")
        stored = torch.load(tmp_path / "saved.pt", weights_only=True)
        for again in map(from_dict, (stored, json.loads(json.dumps(made.to_dict())))):
            assert again.to_dict() == made.to_dict() and again.vocab_size == made.vocab_size
            assert (again.encode(ODD_TEXT) == made.encode(ODD_TEXT)).all()


def test_gpt2_s_tokens_are_tiktoken_s(monkeypatch):
    """256 bytes take the place of GPT-2's vocabulary, which may have to be downloaded."""
    small = tiktoken.Encoding("small", pat_str="(?s).", special_tokens={"<|endoftext|>": 256},
                              mergeable_ranks={bytes([255 - i]): i for i in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.get)
    made = learn("gpt2", ["any text"], "ascii", 1000)
    assert made.to_dict() == {"kind": "gpt2"} and from_dict(made.to_dict()).vocab_size == 257
    assert made.encode("a").tolist() == [255 - 97] and made.decode([158, 256]) == "a<|endoftext|>"


def test_characters_cut_by_tokens_count_once_wherever_the_ids_are_divided():
    text = "日本語のテキスト、ひらがな👩 and é" * 20
    merged = BPETokenizer.learn([text, "日本"], 264)  # tokens of some bytes of a character
    for made in (BPETokenizer.learn([""], 257), merged, learn("char", [text], "auto", None)):
        ids = made.encode(text)
        for size in (1, 2, 3, 5, 7, 64, len(ids)):
            parts = [ids[i:i + size] for i in range(0, len(ids), size)]
            assert sum(count_characters(made, part) for part in parts) == len(text), size
        assert count_characters(made, [*ids, made.end_of_document]) == len(text)
        assert made.decode(ids[:1]) in ("日", "\ufffd")  # one byte alone is no character
    assert count_characters(CharTokenizer("abc"), [0, 1, 2, 3]) == 4  # an unknown one is one
