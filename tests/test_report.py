"""What scripts show: names, numbers, colours, pictures."""
import json
import math

import pytest

import eval_extrapolation
from common import report
from common.report import rounded, run_names


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names(["out/rope", "out/hope/"]) == ["rope", "hope"]
    assert run_names(["out/rope/ckpt_000100.pt", "out/hope/ckpt_000100.pt"]) == ["rope/ckpt_000100", "hope/ckpt_000100"]


def test_results_keep_four_digits_and_no_nan():
    assert rounded({"a": [1.23456, math.nan, {"b": 3}], "c": "x"}, digits=4) == {"a": [1.235, None, {"b": 3}], "c": "x"}


def test_text_is_written_as_it_is_and_the_command_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "my  runs/[ 1 ]"])
    report.write_json(tmp_path / "a.json", "-m experiments.x", {"rows": [["a  b", "[ 1 ]"], [1, 2.5], []]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["rows"] == [["a  b", "[ 1 ]"], [1, 2.5], []] and "  [1, 2.5]" in text
    assert json.loads(text)["command"] == "python -m experiments.x 'my  runs/[ 1 ]'"


@pytest.mark.parametrize("text", [
    "{", "[]", "5", "null", "{}", '{"runs": []}', '{"runs": 5}', '{"runs": {"a": 1}}', '{"runs": [["a"]]}',
    '{"runs": [{"a": 1}, {"b": 1}]}', '{"runs": [{"a": []}]}', "\xff", None])
def test_a_json_file_of_another_kind_is_named_and_one_of_this_kind_is_read(text, tmp_path):
    path = tmp_path / "x.json"
    path.mkdir() if text is None else path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="x.json was not written by y$"):
        report.read_json(path, "runs", "a", "y")
    (tmp_path / "z.json").write_text('{"runs": [{"a": 1}], "b": 2}')
    assert report.read_json(tmp_path / "z.json", "runs", "a", "y") == {"runs": [{"a": 1}], "b": 2}
    with pytest.raises(FileNotFoundError):
        report.read_json(tmp_path / "none.json", "runs", "a", "y")


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


def test_names_at_the_end_of_lines_keep_their_order_do_not_overlap_and_stay_in_the_panel():
    pytest.importorskip("matplotlib")
    figure, axes = report.import_pyplot().subplots()
    axes.set_ylim(0, 2)
    report.label_ends(axes, [(2, "a", "red"), (1.99, "b", "red"), (1, "c", "red"), (0.01, "d", "red"), (0, "e", "red")])
    names, heights = zip(*((label.get_text().strip(), label.xy[1]) for label in axes.texts))
    assert names == ("e", "d", "c", "b", "a")  # drawn from the lowest
    assert heights == pytest.approx([0, 0.06, 0.5, 0.94, 1])
    report.import_pyplot().close(figure)
