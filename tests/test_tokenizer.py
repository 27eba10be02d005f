"""Tokenizers: byte pairs are learned as described; every text is decoded unchanged."""
import json
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
def bpe():
    return BPETokenizer.learn([Path(__file__).read_text(encoding="utf-8")], 400)


@pytest.mark.parametrize("vocab_size, n_merges", [(257, 0), (259, 2), (300, 4)])
def test_the_most_frequent_pair_of_a_piece_becomes_a_token_until_there_are_enough_or_no_more(
        vocab_size, n_merges):
    """The pieces are "12121212" and " 12121212"."""
    learned = BPETokenizer.learn(["12121212 12121212"], vocab_size)
    expected = [bytes([i]) for i in range(256)]
    expected += [b"12", b"1212", b"12121212", b" 12121212"][:n_merges]
    assert learned.vocab_size == len(expected) + 1  # with the end of a document
    assert [learned.decode_bytes([i]) for i in range(len(expected))] == expected
    if n_merges == 4:  # tiktoken splits the text as the training did
        assert learned.encode("12121212 12121212").tolist() == [258, 259]


def test_pieces_separate_letters_digits_signs_and_spaces_and_are_not_long():
    pieces = ["abc", "123", " 45", "é", ",", " x", " ", " y", "." * 32, "." * 8, "1" * 32, "1",
              "a" * 32, "a", " " * 32, " " * 7, " a"]
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
