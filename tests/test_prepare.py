"""
From text to a data set: what is held out, what meta.json says, where the folder is, and that no set replaces another.

    python -m pytest tests/test_prepare.py
"""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import data.prepare
import train
from data import loader
from data.loader import open_dataset
from data.prepare import prepare
from data.sources import SOURCES, Source, sha256
from data.tokenizer import KINDS, load_tokenizer
from tests.conftest import damaged

PROJECT = Path(__file__).resolve().parent.parent
STORY = "It was a dark and stormy night. "


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def content(folder):
    return {name: (folder / name).read_bytes() for name in files_under(folder)}


def documents_of(dataset):
    """The documents of each part of a data set, as text."""
    meta, ids = open_dataset(dataset)
    encoder = load_tokenizer(meta["tokenizer"])
    cut = {name: np.split(part, np.flatnonzero(part == encoder.end_of_document) + 1) for name, part in ids.items()}
    return {name: [encoder.decode(piece[:-1]) for piece in pieces[:-1]] for name, pieces in cut.items()}


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(STORY * 50)
    return path


# --- what is in a data set


def test_documents_are_whole_and_disjoint_and_decode_back(dataset):
    texts = {path.read_text() for path in (Path(dataset).parent / "text0").glob("*.txt")}
    meta, found = open_dataset(dataset)[0], documents_of(dataset)
    assert len(found["train"]) + len(found["val"]) == 40 and set(found["train"]) | set(found["val"]) == texts
    assert [len(found[name]) for name in ("train", "val")] == list(meta["documents"].values())
    assert 0.05 < meta["characters"]["val"] / sum(meta["characters"].values()) <= 0.1


def test_preparing_twice_gives_identical_files(dataset, tmp_path):
    again = prepare(str(Path(dataset).parent / "text0"), "char", tmp_path / "again")
    assert content(again) == content(Path(dataset)) and len(content(again)) == 3


def test_a_single_novel_is_cut_near_its_end(tmp_path, capsys):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "novel.txt").write_text(text)
    data.prepare.main(["--source", str(tmp_path / "novel.txt"), "--out_dir", str(tmp_path / "new" / "folder" / "set")])
    assert documents_of(tmp_path / "new" / "folder" / "set") == {"train": [text[:900]], "val": [text[900:]]}
    assert "the end of the longest" in capsys.readouterr().out


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


def test_a_file_of_five_bytes_is_refused_with_its_size(tmp_path, fails):
    (tmp_path / "five.txt").write_text("hello")
    code, lines = fails(data.prepare, ["--source", str(tmp_path / "five.txt"), "--out_dir", str(tmp_path / "set")])
    assert code == 2 and "has 5 characters" in lines[0] and "at least 10" in lines[0] and "add more text" in lines[0]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_other_scripts_are_decoded_unchanged(tmp_path, kind):
    texts = [f"日本語のテキスト {i}\n" * 20 + "ひらがな👩" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    found = documents_of(prepare(str(tmp_path), kind, tmp_path / "set", charset="auto", vocab_size=300))
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


def test_preparing_needs_memory_for_the_text_and_not_for_wide_ids(novel, tmp_path):
    """Four megabytes of text as one document: int64 ids alone would take 32."""
    size = novel.write_text(STORY * 2**17)
    tracemalloc.start()
    prepare(str(novel), out_dir=tmp_path / "set")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size, f"{peak / size:.1f} bytes per character"


# --- the command


def test_charset_auto_is_advised_only_if_it_was_not_given(novel, tmp_path, capsys):
    novel.write_text("abc " * 500 + "ééé", encoding="utf-8")  # at its end, the validation text
    found = {}
    for charset in ("ascii", "auto"):
        data.prepare.main(["--source", str(novel), "--charset", charset, "--out_dir", str(tmp_path / charset)])
        [found[charset]] = [line for line in capsys.readouterr().out.splitlines() if "no token of their own" in line]
    assert found["ascii"] == "3 characters (0.1%) have no token of their own: --charset auto gives them one"
    assert found["auto"].startswith("3 characters") and "--charset" not in found["auto"]
    assert "validation text" in found["auto"]
    novel.write_text("abc " * 500)
    data.prepare.main(["--source", str(novel), "--out_dir", str(tmp_path / "known")])
    assert "\n0 characters (0.0%) have no token of their own\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--tokenizer bpe --vocab_size 300 --charset auto", ["note: --charset has no effect with --tokenizer bpe"]),
    ("--vocab_size 300", ["note: --vocab_size has no effect with --tokenizer char"]),
    ("--tokenizer bpe --vocab_size 300", []), ("--charset auto", [])])
def test_a_flag_that_the_tokenizer_ignores_is_noted(novel, tmp_path, capsys, flags, words):
    data.prepare.main(["--source", str(novel), "--out_dir", str(tmp_path / "set"), *flags.split()])
    assert [line for line in capsys.readouterr().out.splitlines() if "no effect" in line] == words


def remedy(message):
    """The command in a message, as a list."""
    return shlex.split(message.split("`")[1])


def test_data_prepare_is_a_script_for_any_folder_and_names_the_encoding_of_each_file(tmp_path):
    (tmp_path / "novel.txt").write_text("Grüße aus Ærø. " * 100, encoding="utf-8")
    script = PROJECT / "data" / "prepare.py"
    own = tuple(f"{path}:" for folder in ("data", "common", ".") for path in (PROJECT / folder).glob("*.py"))

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
                              errors="replace", env={**os.environ, "PYTHONWARNDEFAULTENCODING": "1"})
        lines = done.stderr.splitlines()
        # installed packages may lie in the project's folder, and their warnings are theirs
        assert not [line for line in lines if "EncodingWarning" in line and line.startswith(own)]
        return done.returncode, lines

    code, lines = python(script, "--source", "novel.txt", "--out_dir", "set")
    assert code == 0, lines
    (tmp_path / "set" / "val.bin").write_bytes(b"")
    code, lines = python("-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import data.loader; "
                         "data.loader.open_dataset('set')")
    assert code == 1 and remedy(lines[-1])[1] == str(script)


@pytest.mark.parametrize("flags", [
    ["--charset", "auto", "--documents", "25"], ["--tokenizer", "bpe", "--vocab_size", "300"]], ids=["char", "bpe"])
def test_the_remedy_for_a_damaged_set_makes_the_same_set_again(tmp_path, monkeypatch, capsys, flags):
    folder = tmp_path / "O'Neill's notes"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.md").write_text(f"Grüße von Dokument {i}. " * 20, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    data.prepare.main(["--source", f"{folder.name}/*.md", "--out_dir", "my set", *flags])
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert printed[1:] == [str(PROJECT / "train.py"), "--dataset", "my set"]
    meta, whole = open_dataset("my set")[0], content(tmp_path / "my set")
    Path("my set/train.bin").write_bytes(b"\0\0" * 10)
    monkeypatch.chdir(PROJECT)  # the remedy does not depend on the folder
    with pytest.raises(ValueError, match="damaged.*should have.*: delete this folder and") as error:
        open_dataset(tmp_path / "my set")
    _, script, *arguments = remedy(str(error.value))
    assert script == "data/prepare.py"
    shutil.rmtree(tmp_path / "my set")
    data.prepare.main(arguments)
    found = content(tmp_path / "my set")
    assert found.pop("meta.json") and whole.pop("meta.json") and found == whole
    assert {**open_dataset(tmp_path / "my set")[0], "source": f"{folder.name}/*.md"} == meta  # its source as typed


# --- where data sets are, and that none takes the place of another


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, another folder as the current one, and a small default source."""
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(data.prepare, "PROJECT", tmp_path / "project")
    monkeypatch.setitem(SOURCES, "pysrc", Source(lambda: [f"def f{i}(): return {i}\n" * 30 for i in range(30)]))
    return tmp_path / "project"


def test_names_of_data_sets_say_source_and_tokenizer(project):
    Path("My Novel.txt").write_text(STORY * 50)
    assert prepare("My Novel.txt") == project / "data" / "My_Novel_char"
    assert prepare("*.txt", "bpe", vocab_size=300) == project / "data" / "text_bpe300"
    assert [kind.label for kind in KINDS.values()] == ["char", "bpe{vocab_size}", "gpt2"]


@pytest.mark.parametrize("name", ["pysrc.txt", "PySrc.md"])
def test_a_users_file_does_not_become_the_default_data_set(project, name):
    Path(name).write_text("These are the user's own words. " * 100)
    own = prepare(name)
    meta, _ = open_dataset(loader.DEFAULT_DATASET)
    assert meta["source"] == "pysrc" and open_dataset(own)[0]["source"] == name
    assert sorted(path.name.lower() for path in (project / "data").iterdir()) == ["pysrc_char", "pysrc_text_char"]


def test_data_sets_are_found_in_the_current_folder_first_and_then_in_the_project(project):
    Path("a.txt").write_text(STORY * 50)
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


def test_a_text_that_is_named_as_a_data_set_is_answered_with_the_command_that_makes_one_of_it(project, fails):
    Path("my notes").mkdir()
    for name in ("novel.txt", "my notes/a.md"):
        Path(name).write_text(f"{STORY} {name} " * 50)
    for name, made in (("novel.txt", "novel_char"), ("my notes", "my_notes_char")):
        code, [line] = fails(train, ["--dataset", name])
        _, script, *arguments = remedy(line)
        assert code == 2 and script == str(PROJECT / "data" / "prepare.py")
        data.prepare.main(arguments)
        assert sorted(open_dataset(made)[1]) == ["train", "val"]
    code, [line] = fails(train, ["--dataset", "no such"])
    assert code == 2 and remedy(line)[2:] == ["--source", "YOUR_TEXT", "--out_dir", str(project / "data" / "no such")]


def test_trainings_that_start_at_once_make_the_default_data_set_once(project, monkeypatch):
    """Threads play the processes: a lock is of an open file, whoever opened it."""
    made, write = [], data.prepare.write_dataset

    def write_slowly(*arguments):
        made.append(arguments)
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(data.prepare, "write_dataset", write_slowly)
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(open_dataset, [loader.DEFAULT_DATASET] * 4))
    assert len(made) == 1 and all(meta == results[0][0] for meta, _ in results)


def test_the_same_data_set_is_kept_and_one_of_another_text_or_other_arguments_is_refused(project, fails, capsys):
    for name in "ab":
        Path(name).mkdir()
        Path(name, "notes.txt").write_text(f"These are the notes in folder {name}. " * 100)
        Path(name, "more.txt").write_text(f"And more of folder {name}. " * 100)
    data.prepare.main(["--source", "a/notes.txt"])
    data.prepare.main(["--source", "a/*.txt"])
    out_dir = project / "data" / "notes_char"
    first, written, summary = content(out_dir), os.stat(out_dir / "train.bin"), capsys.readouterr().out.splitlines()
    data.prepare.main(["--source", "a/notes.txt"])
    kept = capsys.readouterr().out.splitlines()
    assert f"{out_dir} holds this data set already: it is kept" in kept and set(summary[:6]) < set(kept)
    assert os.stat(out_dir / "train.bin") == written
    for flags, words in (
            (["--source", "b/notes.txt"], "a/notes.txt'] and is now ["),
            (["--source", "b/*.txt"], "a/*.txt'] and is now ["),  # both would be data/text_char
            (["--source", "a/notes.txt", "--charset", "auto"], "--charset was ascii and is now auto"),
            (["--source", "a/notes.txt", "--documents", "1"], "--documents was None and is now 1")):
        code, lines = fails(data.prepare, flags)
        assert code == 2 and len(lines) == 1 and words in lines[0], lines
        assert "another --out_dir" in lines[0] and "delete this folder" in lines[0]
    Path("a/notes.txt").write_text("The notes were edited. " * 100)
    code, lines = fails(data.prepare, ["--source", "a/notes.txt"])
    assert code == 2 and "the text of its source has changed" in lines[0] and content(out_dir) == first
    shutil.rmtree(out_dir)
    data.prepare.main(["--source", "a/notes.txt"])
    assert open_dataset(out_dir)[0]["sha256"] == sha256(Path("a/notes.txt").read_bytes())


@pytest.mark.parametrize("name, words", [("meta.json", "meta.json is damaged"), ("val.bin", "val.bin was changed")])
def test_a_damaged_data_set_is_neither_kept_nor_replaced(novel, tmp_path, fails, name, words):
    flags = ["--source", str(novel), "--out_dir", str(tmp_path / "set")]
    data.prepare.main(flags)
    (tmp_path / "set" / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} .*delete this folder and make it again"):
        open_dataset(tmp_path / "set")
    code, lines = fails(data.prepare, flags)
    assert code == 2 and len(lines) == 1 and words in lines[0] and "delete this folder" in lines[0]
    assert (tmp_path / "set" / name).read_text() == "{"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_meta_json_lacks_or_holds_of_another_type_is_no_traceback(novel, tmp_path, kind):
    arguments = ["--source", str(novel), "--tokenizer", kind, "--out_dir", str(tmp_path / "set")]
    data.prepare.main(arguments)
    path = tmp_path / "set" / "meta.json"
    for keys, changed in damaged(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        needed = keys[0] == "tokenizer" or len(keys) == 1 and keys[0] in {*data.prepare.META, *data.prepare.COUNTS}
        for act in (lambda: open_dataset(tmp_path / "set"), lambda: data.prepare.main(arguments)):
            with pytest.raises(ValueError, match="damaged.*delete this folder") if needed else suppress(ValueError):
                act()


@pytest.mark.parametrize("name", ["meta.json", "train.bin"])
def test_a_set_that_lacks_a_file_is_called_damaged(novel, tmp_path, name):
    prepare(str(novel), "bpe", tmp_path / "set", vocab_size=300)
    (tmp_path / "set" / name).unlink()
    with pytest.raises(ValueError, match="damaged.*No such file.*delete this folder and make it again with"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("prepared", [True, False])
def test_a_data_set_is_not_written_over_a_folder_that_holds_more(dataset, tmp_path, fails, prepared):
    folder = tmp_path / "mine"
    shutil.copytree(dataset, folder) if prepared else folder.mkdir()
    (folder / "precious.txt").write_text("do not lose me")
    before = content(folder)
    code, lines = fails(data.prepare, ["--source", str(folder / "precious.txt"), "--out_dir", str(folder)])
    assert code == 2 and ("precious.txt" in lines[0] or not prepared and "holds no data set" in lines[0])
    assert content(folder) == before


def test_a_symbolic_link_to_a_data_set_stays_one(novel, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "set"
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    for _ in range(2):  # to a missing folder, and to a full one
        prepare(str(novel), out_dir=link)
        assert link.is_symlink() and open_dataset(link)[0]["source"] == str(novel)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "novel.txt", "set"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


# --- interruptions


def test_a_folder_that_the_system_does_not_rename_is_one_line_and_leaves_nothing(novel, tmp_path, monkeypatch, fails):
    """Windows does not rename a folder with an open file."""
    def replace(source, _):
        raise PermissionError(13, "Access is denied", str(source))

    monkeypatch.setattr(os, "replace", replace)
    code, lines = fails(data.prepare, ["--source", str(novel), "--out_dir", str(tmp_path / "set")])
    assert code == 1 and len(lines) == 1 and "Access is denied" in lines[0] and os.listdir(tmp_path) == ["novel.txt"]


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
def test_killed_at_any_moment_it_leaves_the_whole_set_or_none(novel, tmp_path):
    out_dir = tmp_path / "set"
    arguments = str(novel), "bpe", out_dir, "ascii", 260
    left, moment, died = set(), 0, True
    while died:
        moment += 1
        died = prepare_and_die(moment, *arguments)
        left.add(out_dir.exists())
        prepare(*arguments)  # what was left does not matter
        assert files_under(tmp_path) == ["novel.txt", "set/bpe.tiktoken", "set/meta.json", "set/train.bin",
                                         "set/val.bin"]
        meta, _ = open_dataset(out_dir)
        assert all(sha256((out_dir / name).read_bytes()) == digest for name, digest in meta["files"].items())
        shutil.rmtree(out_dir)
    assert left == {False, True} and moment > 10
