"""Curves: the losses in runs' logs, and perplexity against a flag."""
import json
import math

import pytest

from common import report
from experiments import curves
from experiments.groups import group_by_seed
from model import GPTConfig
from tests.test_groups import scored

pytest.importorskip("matplotlib")

# --- losses over training


@pytest.fixture
def logs(tmp_path):
    """write(name, *lines) -> the folder of a run with this log."""
    def write(name, *lines):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                                                  for line in lines))
        return str(folder)
    return write


def log_line(step, **losses):
    return {"iter": step, "tokens": 512 * step, "seconds": 0.5 * step, **losses}


def drawn_lines(monkeypatch, arguments):
    """The arguments of curves -> color, x and y of each line in the picture."""
    figures = []
    monkeypatch.setattr(report, "save_picture", lambda figure, path: figures.append(figure))
    curves.main(arguments)
    return [(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines]


@pytest.mark.parametrize("x, scale", [("iter", 1), ("tokens", 512), ("seconds", 0.5)])
def test_losses_of_all_runs_are_drawn_over_steps_tokens_or_seconds(x, scale, logs, monkeypatch):
    a = logs("a", log_line(0, val_loss=4.0), log_line(10, val_loss=3.0), log_line(20, val_loss=2.0))
    b = logs("b", log_line(0, val_loss=5.0), log_line(30, val_loss=1.0))
    lines = drawn_lines(monkeypatch, [a, b, "--x", x])
    assert lines[0][1:] == ([0, 10 * scale, 20 * scale], [4.0, 3.0, 2.0])
    assert lines[1][1:] == ([0, 30 * scale], [5.0, 1.0]) and len(lines) == 2


def test_training_losses_are_drawn_where_they_are_and_a_line_that_a_kill_cut_short_is_left_out(logs, monkeypatch):
    run = logs("a", log_line(0, val_loss=4.0), log_line(5, train_loss=3.5), log_line(10, val_loss=3.0, train_loss=2.5),
               '{"iter": 20, "tok')
    assert [line[1:] for line in drawn_lines(monkeypatch, [run])] == [([0, 10], [4.0, 3.0]), ([5, 10], [3.5, 2.5])]


def test_a_run_that_diverged_is_drawn_and_summed_up_to_there(logs, monkeypatch, capsys):
    run = logs("a", log_line(0, val_loss=4.0), log_line(10, val_loss=3.0), log_line(20, val_loss=None, train_loss=None))
    assert [line[1:] for line in drawn_lines(monkeypatch, [run])][0] == ([0, 10], [4.0, 3.0])
    assert "3.0000" in capsys.readouterr().out


def test_a_finished_run_is_drawn_in_the_colour_of_its_encoding_and_summed_up(finished_run, tmp_path, monkeypatch,
                                                                             capsys):
    curves.main([finished_run, "--plot", str(tmp_path / "losses.png")])
    assert (tmp_path / "losses.png").stat().st_size > 1000
    lines = drawn_lines(monkeypatch, [finished_run])
    assert {color for color, _, _ in lines} == {report.STYLES["hope"][0]} and lines[0][1] == [0, 5, 10]
    assert f"{min(lines[0][2]):.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("lines, words", [
    ((), "no validation loss"), ((log_line(0, train_loss=1.0),), "no validation loss"), (({"loss": 1},), "not a log"),
    (("[1]\n",), "not a log"), ((log_line(0, val_loss=None),), "no validation loss"), (None, "there is no")])
def test_a_folder_without_losses_is_refused_in_one_line(lines, words, logs, tmp_path, fails):
    run = str(tmp_path / "nothing") if lines is None else logs("a", *lines)
    code, output = fails(curves, [run, "--plot", str(tmp_path / "x.png")])
    assert code == 2 and len(output) == 1 and words in output[0]


# --- perplexity against a flag


def groups_of(*runs):
    """(fields of GPTConfig, losses) of each run -> groups of two seeds, as sweep --json writes them."""
    return group_by_seed([scored(changes["pe"], seed, [nll + 0.1 * seed - 0.15 for nll in nlls], block_size=128,
                                 config=vars(GPTConfig(**changes))) for changes, nlls in runs for seed in (1, 2)])


def groups_file(path, groups):
    path.write_text(json.dumps({"groups": groups}))
    return str(path)


def lines_over(flag, groups):
    return {name: [(group["value"], round(group["buckets"][0]["nll"], 6)) for group in line]
            for name, line in curves.lines_of(groups, flag)}


def test_groups_become_lines_over_the_flags_value_and_those_without_effect_have_none(tmp_path):
    file = groups_file(tmp_path / "a.json", groups_of(
        ({"pe": "hope", "hope_cutoff": 4.0}, (2.0, 3.0)), ({"pe": "hope", "hope_cutoff": 0.5}, (2.1, 3.0)),
        ({"pe": "rope"}, (2.2, 3.0)), ({"pe": "hope", "hope_cutoff": 2.0, "n_layer": 3}, (2.3, 3.0)),
        ({"pe": "hope", "hope_cutoff": 1.0, "n_layer": 3}, (2.4, 3.0))))
    other = groups_file(tmp_path / "b.json", groups_of(({"pe": "hope", "hope_cutoff": 4.0}, (9.0, 9.0)),
                                                       ({"pe": "hope", "hope_cutoff": 8.0}, (2.5, 3.0))))
    assert lines_over("hope_cutoff", curves.read_groups([file, other])) == {
        "hope n_layer 4": [(0.5, 2.1), (4.0, 2.0), (8.0, 2.5)], "rope n_layer 4": [(None, 2.2)],
        "hope n_layer 3": [(1.0, 2.4), (2.0, 2.3)]}


def test_a_line_over_windows_does_not_have_one_in_its_name():
    groups = groups_of(*[({"pe": pe, "window": window, "window_pattern": "SL", "local_pe": "rope"}, (2.0, 3.0))
                         for pe in ("nope", "rope") for window in (16, 8)])
    assert lines_over("window", groups) == dict.fromkeys(("nope+rope:SL", "rope:SL"), [(8, 2.0), (16, 2.0)])


def test_what_follows_from_a_flag_does_not_tell_lines_apart():
    groups = [{**group, "args": {**group["args"], "learning_rate": rate, "min_lr": rate / 10}} for rate in (0.2, 0.1)
              for group in groups_of(({"pe": "hope"}, (2.0, 3.0)), ({"pe": "rope"}, (2.0, 3.0)))]
    assert lines_over("learning_rate", groups) == dict.fromkeys(("hope", "rope"), [(0.1, 2.0), (0.2, 2.0)])


def test_a_flag_without_a_value_where_it_has_no_effect_is_drawn():
    layers = {"pe": "rope", "window_pattern": "SL", "window": 4}
    groups = groups_of(({"pe": "rope"}, (2.0, 3.0)), *[({**layers, "local_rope_base": base}, (2.0, 3.0))
                                                       for base in (100.0, 1000.0)])
    assert list(lines_over("local_rope_base", groups).values()) == [[(None, 2.0)], [(100, 2.0), (1000, 2.0)]]


def test_the_fraction_that_HoPE_rotates_and_the_smallest_base_are_marked():
    config = GPTConfig(block_size=128, n_embd=128, n_head=4)
    text, fraction = curves.mark("prope_fraction", config)
    turning = [j for j in range(16) if 128 * 10_000 ** (-j / 16) >= 2 * math.pi]
    assert "HoPE" in text and fraction == len(turning) / 16
    _, base = curves.mark("rope_base", config)
    least = [min(sum(math.cos(m * b ** (-j / 16)) for j in range(16)) for m in range(129))
             for b in (base, 0.98 * base)]
    assert least[0] > -0.05 and least[1] < 0 and curves.mark("hope_cutoff", config) is None


def test_the_picture_has_a_panel_per_range_and_a_dotted_mark(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save_picture", lambda figure, path: drawn.append(figure))
    groups = groups_of(*[({"pe": "prope", "prope_fraction": p}, (2.0 - p, 3.0)) for p in (0.25, 0.5)],
                       ({"pe": "rope"}, (2.2, 3.2)))
    curves.main([groups_file(tmp_path / "a.json", groups), "--x", "prope_fraction", "--plot", str(tmp_path / "a.png")])
    first, second = drawn[0].axes
    quarter, half, rope = (group["buckets"][0] for group in groups)
    lines = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert lines["rope"] == pytest.approx([rope["ppl"]] * 2) and any("HoPE" in label for label in lines)
    assert any(y == pytest.approx([quarter["ppl"], half["ppl"]]) for y in lines.values())
    band, = (polygon.get_paths()[0].vertices.tolist() for polygon in first.collections)
    for x, bucket in ((0.25, quarter), (0.5, half)):  # one standard deviation on both sides
        ends = [y for at, y in band if at == x]
        assert max(ends) - min(ends) == pytest.approx(2 * bucket["ppl_std"])
    assert first.get_title() == "[0, 16)" and second.get_title() == "[16, 32)"


@pytest.mark.parametrize("flag, words", [("pe", "not a flag with a number"), ("none", "not a flag with a number"),
                                         ("hope_cutoff", "no two groups"), ("block_size", "different --block_size")])
def test_what_cannot_be_drawn_against_a_flag_is_refused_in_one_line(flag, words, tmp_path, fails):
    group, = groups_of(({"pe": "hope"}, (2.0, 3.0)))
    longer = {**group, "args": {**group["args"], "block_size": 512}, "buckets": group["buckets"][:1]}
    file = groups_file(tmp_path / "a.json", [group, longer] if flag == "block_size" else [group])
    (tmp_path / "b.json").write_text("x")
    none, empty = groups_file(tmp_path / "c.json", []), tmp_path / "d.json"
    empty.write_text("{}")
    for path, said in ((file, words), *[(path, "not written by experiments.sweep") for path in (
            str(tmp_path / "b.json"), none, str(empty))]):
        code, lines = fails(curves, [path, "--x", flag, "--plot", str(tmp_path / "a.png")])
        assert code == 2 and len(lines) == 1 and said in lines[0]
