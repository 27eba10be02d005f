"""Sweeps: which runs there are, training that is killed and continued, means in the files."""
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from common.checkpoint import load_checkpoint
from experiments import sweep
from experiments.groups import read_runs, scores_of
from tests.conftest import PROJECT, TINY_FLAGS, assert_same_weights, run

# --- which runs there are


def jobs_of(line, out_dir):
    """-> {folder's name: flags of train.py}."""
    jobs = sweep.make_jobs(line.split(), out_dir)
    return {folder.name: " ".join(argv) for folder, argv in jobs.items()}


def test_every_combination_is_a_run_in_a_folder_of_its_own(tmp_path):
    line = "--seed 3 --pe rope hope --n_layer 1 2 --no-bias --seed 1 2"  # the last --seed counts
    assert jobs_of(line, tmp_path) == {
        f"{pe}-n_layer-{n}-no-bias-seed-{seed}": f"--seed {seed} --pe {pe} --n_layer {n} --no-bias"
        for pe in ("rope", "hope") for n in (1, 2) for seed in (1, 2)}


def test_flags_without_effect_neither_multiply_the_runs_nor_reach_them(tmp_path):
    jobs = jobs_of("--pe rope hope alibi --hope_cutoff 2 1 --rope_base 1e6 --seed 1 2 3", tmp_path)
    assert len(jobs) == 12
    assert jobs["alibi-seed-3"] == "--pe alibi --seed 3"
    assert jobs["rope-rope_base-1000000-seed-1"] == "--pe rope --rope_base 1e6 --seed 1"
    assert "hope-hope_cutoff-2-rope_base-1000000-seed-1" in jobs


def test_an_arrangement_sets_the_layers_and_other_runs_keep_the_flags(tmp_path):
    line = "--pe rope hope:SSL:4 nope+alibi:SL:0 --window_pattern SL --window 8"
    assert jobs_of(line, tmp_path) == {
        "rope-SL-8-seed-1": "--pe rope --window_pattern SL --window 8",
        "hope-SSL-4-seed-1": "--pe hope --window_pattern SSL --window 4",
        "nope+alibi-SL-0-seed-1":
            "--pe nope --window_pattern SL --window 0 --local_pe alibi"}


def test_a_folder_is_named_by_the_flags_that_a_file_does_not_give(tmp_path):
    (tmp_path / "config").write_text("--n_head 4 --rope_base 100 --window_pattern SL --seed 5")
    line = f"--pe rope --n_head 2 @{tmp_path}/config --learning_rate 1e-2 --device cpu"
    assert jobs_of(line, tmp_path) == {
        "rope-SL-0-n_head-2-learning_rate-0.01-seed-5":
            f"@{tmp_path}/config --pe rope --n_head 2 --learning_rate 1e-2 --device cpu"}


def test_a_folder_with_a_run_of_other_flags_is_refused(dataset, tmp_path):
    flags = " ".join([*TINY_FLAGS, "--dataset", dataset, "--max_iters", "5", "--pe", "rope"])
    name, = jobs_of(flags, tmp_path)
    run(dataset, tmp_path / name, "--max_iters", "5", "--pe", "rope")
    assert list(jobs_of(f"{flags} --hope_cutoff 2 --eval_interval 5", tmp_path)) == [name]
    assert sweep.is_complete(tmp_path / name)
    (tmp_path / "config").write_text("--weight_decay 0")
    with pytest.raises(ValueError, match=f"{name} holds a run with other flags"):
        jobs_of(f"{flags} @{tmp_path}/config", tmp_path)


# --- training


@pytest.fixture
def tiny_config(dataset, tmp_path):
    """A file of flags, for @FILE."""
    path = tmp_path / "tiny"
    path.write_text(shlex.join([*TINY_FLAGS, "--max_iters", "100", "--eval_interval", "20",
                                "--dataset", dataset]))
    return f"@{path}"


def sweep_flags(out_dir):
    return ["--windows", "3", "--max_factor", "4", "--jobs", "2", "--out_dir", str(out_dir)]


def test_a_killed_sweep_gives_the_weights_of_train_py(tiny_config, dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out_dir = tmp_path / "sweep"
    argv = [tiny_config, "--pe", "hope:SL:4"]
    folder = out_dir / "hope-SL-4-seed-1"
    process = sweep.start(folder, *sweep.make_jobs(argv, out_dir).values())
    while not sweep.is_started(folder) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert sweep.is_started(folder) and not sweep.is_complete(folder)

    sweep.main([*argv, *sweep_flags(out_dir)])
    layers = "--max_iters 100 --pe hope --window_pattern SL --window 4".split()
    assert_same_weights(load_checkpoint(folder / "ckpt.pt"),
                        run(dataset, tmp_path / "undisturbed", *layers))
    assert "hope:SL:4" in capsys.readouterr().out
    result = json.loads((out_dir / "sweep.json").read_text())
    assert [group["name"] for group in result["groups"]] == ["hope:SL:4"]
    table = pd.read_csv(out_dir / "sweep.csv").set_index(["name", "start"])
    assert table.loc[("hope:SL:4", 32), "nll"] == result["runs"][0]["buckets"][2]["nll"]
    assert (out_dir / "sweep.png").stat().st_size > 1000


class Ended:
    """A training process that has ended."""

    def poll(self):
        return 0

    def terminate(self):
        pass


def test_a_run_that_fails_is_named_and_the_others_are_scored(tiny_config, dataset, tmp_path,
                                                             monkeypatch, fails):
    pytest.importorskip("matplotlib")

    def start(folder, argv):
        if argv[-1] != "2":
            run(dataset, folder, *argv[1:])
        return Ended()

    monkeypatch.setattr(sweep, "start", start)
    code, lines = fails(sweep, [tiny_config, *sweep_flags(tmp_path / "sweep"), "--max_iters", "5",
                                "--pe", "rope", "--seed", "1", "2", "3"])
    assert code == 1 and "seed-2" in lines[-1] and "seed-1" not in lines[-1]
    group, = json.loads((tmp_path / "sweep/sweep.json").read_text())["groups"]
    assert group["seeds"] == [1, 3]


def test_a_signal_ends_the_runs_and_starts_no_others(tmp_path, monkeypatch):
    processes = []

    def start(folder, argv):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        processes.append(Ended() if folder.name == "a" else subprocess.Popen(command))
        return processes[-1]

    sleep = time.sleep
    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(time, "sleep",
                        lambda seconds: os.kill(os.getpid(), signal.SIGTERM) or sleep(seconds))
    assert sweep.train_all({tmp_path / name: [] for name in "abc"}, 2) == signal.SIGTERM
    assert len(processes) == 2 and processes[1].returncode == -signal.SIGTERM


# --- means over seeds


def assert_close(found, expected):
    """Numbers of published groups, through dicts and lists."""
    if isinstance(expected, dict):
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-9)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["study", "scaling"])
def test_runs_of_a_published_file_give_its_groups(name, tmp_path, capsys):
    path = PROJECT / f"experiments/results/{name}.json"
    sweep.main(["--json_in", str(path), "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["groups"]
    expected = json.loads(path.read_text())["groups"]
    for group in expected:
        del group["args"]  # now None where a flag has no effect
    assert_close(found, expected)
    first, mean = found[0], "{val_loss:.4f} ± {val_loss_std:.4f}".format(**found[0])
    assert f"{first['name']} " in (output := capsys.readouterr().out) and mean in output


def test_the_flags_of_a_group_are_those_with_an_effect():
    runs = read_runs([PROJECT / "experiments/results/study.json"])
    groups = {group["name"]: group["args"] for group in sweep.groups_of(runs, scores_of(runs))}
    assert groups["prope"]["prope_fraction"] == 0.75 and groups["rope"]["prope_fraction"] is None
    assert groups["alibi"]["rope_base"] is None and groups["rope"]["rope_base"] == 10000
    assert groups["nope+rope:SSSL:16"]["window"] == 16 and "seed" not in groups["rope"]


@pytest.mark.parametrize("line, words", [
    ("--pe rotary", "rotary"), ("rope", "'rope'"), ("--dataset a b", "one value"),
    ("--json_in {tmp}/a.json --pe hope", "leave out --pe"),
    ("--json_in {tmp}/a.json", "holds no scores")])
def test_mistakes_get_one_line_before_anything_is_trained(line, words, tmp_path, monkeypatch,
                                                          fails):
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("training"))
    (tmp_path / "a.json").write_text('{"runs": [{"name": "rope"}]}')
    code, lines = fails(sweep, [*line.format(tmp=tmp_path).split(), "--out_dir", str(tmp_path)])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
