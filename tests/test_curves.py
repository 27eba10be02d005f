"""Curves: the losses in runs' logs, and perplexity against a flag."""
import json
import math

import pytest

from common import report
from experiments import curves
from tests.test_groups import scored

pytest.importorskip("matplotlib")


@pytest.fixture
def figure_of(monkeypatch):
    """figure_of(arguments) -> the figure that curves draws."""
    def draw(arguments):
        figures = []
        monkeypatch.setattr(curves, "save_picture", lambda figure, path: figures.append(figure))
        curves.main(arguments)
        return figures[0]
    return draw


def lines_in(panel):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in panel.lines}


# --- losses over training


@pytest.mark.parametrize("x", ["iter", "tokens", "seconds"])
def test_the_losses_of_a_run_are_drawn_in_the_colour_of_its_encoding(x, finished_run, figure_of):
    log = curves.read_log(finished_run)
    panel, = figure_of([finished_run, "--x", x]).axes
    assert {line.get_color() for line in panel.lines} == {report.STYLES["hope"][0]}
    assert [list(line.get_ydata()) for line in panel.lines] == [
        [line["val_loss"] for line in log], [line["train_loss"] for line in log[1:]]]
    assert list(panel.lines[0].get_xdata()) == [line[x] for line in log]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iter": 0, "val_loss": 4.0}\n{"iter": 20, "tok')
    assert curves.read_log(tmp_path) == [{"iter": 0, "val_loss": 4.0}]


# --- perplexity against a flag


def runs_of(*rows):
    """(fields of GPTConfig, loss) of each row -> runs of two seeds, the loss in a first range."""
    return [scored(network["pe"], seed, (nll + 0.1 * seed - 0.15, 3.0),
                   **{name: value for name, value in network.items() if name != "pe"})
            for network, nll in rows for seed in (1, 2)]


def drawn(flag, runs):
    """-> {line: [(value of the flag or None, ppl in the first range)]}."""
    found = {}
    table = curves.lines_over(flag, runs)
    for row in table[table["start"] == 0].to_dict("records"):
        value = None if math.isnan(row[flag]) else row[flag]
        found.setdefault(row["line"], []).append((value, row["ppl"]))
    return found


def ppl(nll):
    return pytest.approx((math.exp(nll - 0.05) + math.exp(nll + 0.05)) / 2)


def test_runs_become_lines_over_the_flag_and_one_without_effect_has_no_value():
    runs = runs_of(({"pe": "hope", "hope_cutoff": 4.0}, 2.0), ({"pe": "hope"}, 2.1),
                   ({"pe": "rope"}, 2.2), ({"pe": "hope", "hope_cutoff": 2.0, "n_layer": 3}, 2.3))
    assert drawn("hope_cutoff", runs) == {
        "hope n_layer 4": [(4.0, ppl(2.0)), (1.0, ppl(2.1))], "rope n_layer 4": [(None, ppl(2.2))],
        "hope n_layer 3": [(2.0, ppl(2.3))]}


def test_a_line_over_windows_does_not_have_one_in_its_name():
    runs = runs_of(*[({"pe": pe, "window": window, "window_pattern": "SL", "local_pe": "rope"}, 2.0)
                     for pe in ("nope", "rope") for window in (16, 8)])
    assert drawn("window", runs) == dict.fromkeys(
        ("nope+rope:SL", "rope:SL"), [(16, ppl(2.0)), (8, ppl(2.0))])


def test_what_follows_from_a_flag_does_not_tell_lines_apart():
    runs = [{**run, "args": {**run["args"], "learning_rate": rate, "min_lr": rate / 10}}
            for rate in (0.2, 0.1) for run in runs_of(({"pe": "hope"}, 2.0))]
    assert drawn("learning_rate", runs) == {"hope": [(0.2, ppl(2.0)), (0.1, ppl(2.0))]}


def test_the_picture_has_a_panel_per_range_and_a_band_of_one_standard_deviation(tmp_path,
                                                                               figure_of):
    runs = runs_of(({"pe": "prope", "prope_fraction": 0.5}, 1.5),
                   ({"pe": "prope", "prope_fraction": 0.25}, 1.75), ({"pe": "rope"}, 2.2))
    (tmp_path / "a.json").write_text(json.dumps({"runs": runs}))
    first, second = figure_of([str(tmp_path / "a.json"), "--x", "prope_fraction"]).axes
    assert first.get_title() == "[0, 16)" and second.get_title() == "[16, 32)"
    lines = lines_in(first)
    assert lines["prope"] == ([0.25, 0.5], [ppl(1.75), ppl(1.5)])
    assert lines["rope"][1] == [ppl(2.2)] * 2  # horizontal
    band, = (polygon.get_paths()[0].vertices.tolist() for polygon in first.collections)
    heights = [y for x, y in band if x == 0.25]
    deviation = (math.exp(1.8) - math.exp(1.7)) / math.sqrt(2)
    assert max(heights) - min(heights) == pytest.approx(2 * deviation)


@pytest.mark.parametrize("flag", ["pe", "none", "hope_cutoff"])
def test_a_flag_without_several_numbers_is_refused(flag):
    with pytest.raises(ValueError, match=f"--x {flag} is not a flag"):
        curves.lines_over(flag, runs_of(({"pe": "hope"}, 2.0), ({"pe": "rope"}, 2.0)))
