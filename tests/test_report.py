"""What scripts show: names, numbers, colours, pictures."""
import json
import math
import shlex

import pytest

import eval_extrapolation
from common import report
from common.report import rounded, run_names


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names(["out/rope", "out/hope/"]) == ["rope", "hope"]
    assert run_names(["out/rope/ckpt_000100.pt", "out/hope/ckpt_000100.pt"]) == ["rope/ckpt_000100", "hope/ckpt_000100"]


def test_results_keep_four_digits_and_no_nan():
    assert rounded({"a": [1.23456, math.nan, {"b": 3}], "c": "x"}, digits=4) == {"a": [1.235, None, {"b": 3}], "c": "x"}


def test_the_command_in_a_json_file_can_be_pasted(tmp_path, monkeypatch):
    words = ["out/my run", "--text", "it's here.txt", "@config/cpu_demo"]
    monkeypatch.setattr("sys.argv", ["eval_extrapolation.py", *words])
    report.write_json(tmp_path / "r.json", "eval_extrapolation.py", {})
    command = json.loads((tmp_path / "r.json").read_text())["command"]
    assert shlex.split(command) == ["python", "eval_extrapolation.py", *words] and command.endswith(" @config/cpu_demo")


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    for flag in ("--json", "--plot"):
        code, lines = fails(eval_extrapolation, [str(tmp_path / "none"), flag, str(tmp_path / "r.png")])
        assert code == 2 and len(lines) == 1 and "r.png cannot be written" in lines[0]


def test_the_first_run_of_an_encoding_has_a_solid_line_and_others_of_it_differ():
    found = report.styles([{"pe": pe} for pe in ("rope", "hope", "rope", "rope", "hope", "mine")])
    assert [style["linestyle"] for style in found] == ["-", "-", "--", ":", "--", "-"]
    assert found[0]["color"] == found[2]["color"] != found[1]["color"]


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_has_the_format_that_its_name_says_and_few_colours(tmp_path, suffix, start):
    figure = report.import_pyplot().figure()
    report.save_picture(figure, tmp_path / f"a{suffix}")
    picture = (tmp_path / f"a{suffix}").read_bytes()
    assert picture.startswith(start) and (suffix != ".png" or picture[25] == 3)  # 3: with a palette
