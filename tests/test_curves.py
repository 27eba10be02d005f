"""Curves: the losses in runs' logs."""
import json

import pytest

from common import report
from experiments import curves


@pytest.mark.parametrize("x", ["iter", "tokens", "seconds"])
def test_the_losses_of_a_run_are_drawn_in_the_colour_of_its_encoding(
        x, finished_run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_picture", lambda figure, *_: figures.append(figure))
    curves.main([finished_run, "--x", x, "--plot", "unused.png", "--json", f"{tmp_path}/a.json"])
    log, (panel,) = curves.read_log(finished_run), figures[0].axes
    assert {line.get_color() for line in panel.lines} == {report.STYLES["hope"][1]}
    assert [list(line.get_ydata()) for line in panel.lines] == [
        [line["val_loss"] for line in log], [line["train_loss"] for line in log[1:]]]
    assert list(panel.lines[0].get_xdata()) == [line[x] for line in log]
    [written] = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert written["log"] == log and written["args"]["max_iters"] == log[-1]["iter"]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iter": 0, "val_loss": 4.0}\n{"iter": 20, "tok')
    assert curves.read_log(tmp_path) == [{"iter": 0, "val_loss": 4.0}]
