"""From text to a data set: what is held out, what meta.json says, no set replaces another."""
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data.prepare
import train
from data.loader import open_dataset
from data.prepare import prepare, split
from data.sources import SOURCES, sha256
from data.tokenizer import from_dict
from tests.conftest import PROJECT

STORY = "It was a dark and stormy night. "


def content(folder):
    """Relative path -> bytes, of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def documents_of(dataset):
    """The documents of each part of a data set, as text."""
    meta, ids = open_dataset(dataset)
    encoder, found = from_dict(meta["tokenizer"]), {}
    for part in ids:
        ends = np.flatnonzero(ids[part] == encoder.end_of_document)
        assert ends[-1] == len(ids[part]) - 1
        pieces = np.split(ids[part], ends + 1)[:-1]
        found[part] = [encoder.decode(piece[:-1]) for piece in pieces]
    return found


@pytest.fixture
def novel(tmp_path):
    (tmp_path / "novel.txt").write_text(STORY * 50)
    return tmp_path / "novel.txt"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_documents_of_any_script_are_whole_and_decode_back_and_meta_counts_them(tmp_path, kind):
    texts = [f"日本語のテキスト {i}\n" * 20 + "ひらがな👩" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text, encoding="utf-8")
    out_dir = prepare(str(tmp_path), kind, tmp_path / "set", charset="auto", vocab_size=300)
    found, (meta, ids) = documents_of(out_dir), open_dataset(out_dir)
    assert sorted(found["train"] + found["val"]) == sorted(texts) and len(found["val"]) == 3
    for part in ids:
        assert meta["documents"][part] == len(found[part])
        assert meta["tokens"][part] == len(ids[part])
        assert meta["characters"][part] == sum(map(len, found[part]))
    assert meta["vocab_size"] == from_dict(meta["tokenizer"]).vocab_size
    assert meta["arguments"] == {"source": [str(tmp_path)], "tokenizer": kind, "charset": "auto",
                                 "vocab_size": 300}
    assert meta["sha256"] == sha256("\0".join(texts).encode())


def test_which_documents_are_held_out_does_not_depend_on_their_order():
    groups = [(f"document {i} " * (10 + i % 7),) for i in range(60)]
    assert split(groups) == split(groups[::-1])


def test_the_end_of_the_longest_is_held_out_if_whole_documents_give_less_than_a_twentieth():
    long = "".join(chr(97 + i % 26) for i in range(950))
    assert split([(long,)]) == ([long[:855]], [long[855:]])
    train, val = split([("z" * 49,), (long,)])  # 49 of 999 are too few
    assert (train, val) == (["z" * 49, long[:-99]], [long[-99:]])
    assert split([("a" * 60,), (long,)]) == ([long], ["a" * 60])  # 60 of 1,010 are enough


def test_each_character_of_ones_own_training_text_has_a_token_unless_ascii_is_asked_for(
        novel, tmp_path, monkeypatch):
    novel.write_text("ночь " * 500 + "ééé", encoding="utf-8")  # at its end, the validation text
    monkeypatch.setitem(SOURCES, "known", lambda: [novel.read_text(encoding="utf-8")])
    for source, charset, unknown in ((str(novel), None, 0), (str(novel), "ascii", 4 * 450 + 3),
                                     ("known", None, 4 * 450 + 3), ("known", "auto", 0)):
        meta, _ = open_dataset(prepare(source, "char", tmp_path / f"{source}-{charset}", charset))
        assert meta["unknown_characters"]["train"] == unknown
    assert meta["unknown_characters"]["val"] == 3 and meta["tokenizer"]["chars"] == " ночь"


@pytest.mark.parametrize("n, advice", [(999, False), (1000, True)])
def test_a_thousand_characters_are_many_and_byte_pairs_are_advised(n, advice, novel, capsys):
    novel.write_text("".join(map(chr, range(0x4E00, 0x4E00 + n))) * 20, encoding="utf-8")
    data.prepare.main(["--source", str(novel), "--out_dir", str(novel.parent / "set")])
    assert ("note: 1,000 different characters" in capsys.readouterr().out) == advice


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("n_tokens", [10, 10**5, 10**10])
def test_the_next_command_reads_the_text_as_often_as_it_says_but_not_too_often(
        has_gpu, n_tokens, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.chdir(PROJECT)
    data.prepare.print_command(Path("data/novel"), n_tokens)
    printed = capsys.readouterr().out
    [(said, command, name)] = re.findall(
        r" (\S+) readings of the text:\n    python train.py (@config/(\w+).*)", printed)
    assert ("note: this is little text" in printed) == (n_tokens == 10)
    network, config, _ = train.parse(command.split())
    assert name == ("laptop_char" if has_gpu else "night_cpu") and network.dropout
    assert 15 <= config.max_iters / config.eval_interval <= 20 or config.max_iters == 1
    assert (config.dataset, config.out_dir) == ("data/novel", "out/novel")
    tokens = (config.max_iters * config.batch_size * config.gradient_accumulation_steps
              * network.block_size)
    assert float(said) == pytest.approx(tokens / n_tokens, abs=0.051)
    assert 20 < tokens / n_tokens < 23 or config.max_iters == 1 or n_tokens == 10**10


def test_names_of_data_sets_say_source_and_tokenizer(novel, monkeypatch):
    monkeypatch.chdir(novel.parent)
    for name in ("My Novel.txt", "pysrc.md"):  # which does not become the default data set
        shutil.copy(novel, name)
    monkeypatch.setitem(SOURCES, "pysrc", lambda: [STORY * 50])
    assert prepare() == Path("data/pysrc_char")
    assert prepare("My Novel.txt") == Path("data/My_Novel_text_char")
    assert prepare("pysrc.md") == Path("data/pysrc_text_char")
    assert prepare("*.md", "bpe", vocab_size=300) == Path("data/text_bpe300")


def test_the_same_data_set_is_kept_and_any_other_is_refused(novel, tmp_path, fails):
    flags = ["--source", str(novel), "--out_dir", str(tmp_path / "set")]
    data.prepare.main(flags)
    first, written = content(tmp_path / "set"), os.stat(tmp_path / "set" / "train.bin")
    data.prepare.main(flags)
    assert os.stat(tmp_path / "set" / "train.bin") == written
    for other, edited in ((["--charset", "ascii"], ""), (["--vocab_size", "300"], ""), ([], "!")):
        novel.write_text(STORY * 50 + edited)
        code, [line] = fails(data.prepare, [*flags, *other])
        assert code == 2 and "choose another --out_dir, or delete this folder" in line
        assert content(tmp_path / "set") == first
    (tmp_path / "set" / "meta.json").unlink()  # now a folder that is no data set
    assert fails(data.prepare, flags)[0] == 2 and len(content(tmp_path / "set")) == 2


def test_trainings_that_start_at_once_make_the_data_set_once(novel, tmp_path, monkeypatch):
    """The second one finds the set when it wants to rename its own."""
    prepare(str(novel), out_dir=tmp_path / "first")
    replace = os.replace

    def replace_late(source, target):
        shutil.copytree(tmp_path / "first", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    prepare(str(novel), out_dir=tmp_path / "set")
    assert content(tmp_path / "set") == content(tmp_path / "first")
    assert sorted(os.listdir(tmp_path)) == ["first", "novel.txt", "set"]


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


def prepare_and_die(moment, *arguments):
    """Prepare in a process that kills itself before its moment-th touch of the disk -> did it?"""
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
    whole = content(prepare(str(novel), out_dir=tmp_path / "whole"))
    assert whole.keys() == {"train.bin", "val.bin", "meta.json"}
    out_dir, left, moment, died = tmp_path / "set", set(), 0, True
    while died:
        moment += 1
        died = prepare_and_die(moment, str(novel), "char", out_dir)
        left.add(out_dir.exists())
        prepare(str(novel), out_dir=out_dir)  # what was left does not matter
        assert content(out_dir) == whole
        shutil.rmtree(out_dir)
    assert left == {False, True} and moment > 6
