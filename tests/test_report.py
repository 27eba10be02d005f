"""What scripts show: names, numbers, tables, JSON, colours."""
import io
import itertools
import json
import math
import os
import subprocess
import sys

import pytest

import data.prepare
import eval_extrapolation
from common import report
from common.report import format_cell, run_names
from data import sources, tokenizer
from tests.conftest import PROJECT


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names(["out/rope", "out/hope/"]) == ["rope", "hope"]
    assert run_names(["rope/ckpt_10.pt", "a/hope/ckpt_10.pt"]) == ["rope/ckpt_10", "hope/ckpt_10"]


def test_a_standard_error_is_that_of_a_mean_and_a_single_value_has_none():
    assert report.mean_and_stderr([1, 2, 3, 6]) == pytest.approx((3, math.sqrt(14 / 3 / 4)))
    mean, stderr = report.mean_and_stderr([5])
    assert mean == 5 and math.isnan(stderr)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_work_shows_a_bar_on_a_terminal_alone_after_a_second(monkeypatch):
    for stream, seconds, shown in ((Terminal(), 2, True), (Terminal(), 0, False),
                                   (io.StringIO(), 2, False)):
        monkeypatch.setattr("sys.stderr", stream)
        clock = itertools.count(step=seconds)
        monkeypatch.setattr("tqdm.std.time", lambda clock=clock: next(clock))
        assert list(report.progress("abc", "reading", "file")) == ["a", "b", "c"]
        assert ("reading" in stream.getvalue() and "/3" in stream.getvalue()) == shown


def test_preparing_and_scoring_have_bars(finished_run, tmp_path, monkeypatch):
    seen = []
    for module in (sources, tokenizer, data.prepare, report):
        monkeypatch.setattr(module, "progress", lambda items, what, _: seen.append(what) or items)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 50)
    data.prepare.prepare(str(tmp_path), "bpe", tmp_path / "set", vocab_size=260)
    assert seen == ["reading", "learning byte pairs", "encoding train.bin", "encoding val.bin"]
    seen.clear()
    eval_extrapolation.main([finished_run, "--windows", "2", "--max_factor", "2"])
    assert seen == ["scoring", "last L tokens", "full context"]


def test_cells_have_an_error_if_there_is_one_and_columns_are_aligned(capsys):
    cells = [format_cell(None), format_cell(-0.0001), format_cell(1.5, 0.25, 2), format_cell(2e6),
             format_cell(1.0, math.nan)]
    assert cells == ["-", "0.000", "1.50 ± 0.25", "2.0e+06", "1.000"]
    report.print_table("title", ["x", "long"], {"a": cells[:2], "bcd": cells[2:4]})
    assert capsys.readouterr().out.splitlines() == [
        "", "title", "               x     long", "a              -    0.000",
        "bcd  1.50 ± 0.25  2.0e+06"]


def test_the_command_in_a_json_file_can_be_pasted_and_nan_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "my  runs/[ 1 ]"])
    report.write_json(tmp_path / "a.json", "-m experiments.x", {"rows": []})
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["command"] == "python -m experiments.x 'my  runs/[ 1 ]'"
    with pytest.raises(ValueError):
        report.write_json(tmp_path / "a.json", "x", {"nll": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == saved


def test_the_first_run_of_an_encoding_has_a_solid_line_and_others_of_it_differ():
    pes = ("rope", "hope", "rope", "rope", "hope", "mine", "yours", "mine")
    found = report.styles([{"name": pe, "pe": pe} for pe in pes])
    assert [style["linestyle"] for style in found] == ["-", "-", "--", "-.", "--", "-", "-", "--"]
    colors = [style["color"] for style in found]
    assert colors[0] == colors[2] and colors[5] == colors[7] and len(set(colors)) == 4


def test_a_notebook_keeps_its_own_backend_and_a_command_opens_no_window(monkeypatch):
    code = ("from common import report; pyplot = report.import_pyplot(); "
            "print(pyplot.get_backend())")
    for backend, expected in (("svg", "svg"), (None, "agg")):
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "DISPLAY": ":7"}
        environment.pop("MPLBACKEND", None)
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                               env=environment | ({"MPLBACKEND": backend} if backend else {}))
        assert ended.stdout.strip().lower() == expected
