"""Sweeps: which runs there are, training that is killed and continued, means in the files."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from common.checkpoint import load_checkpoint
from experiments import output, sweep
from tests.conftest import PROJECT, TINY_FLAGS, assert_same_weights, run


def jobs_of(line, out_dir, *words):
    """-> {folder's name: flags of train.py}."""
    jobs = sweep.make_jobs([*line.split(), *words], out_dir)
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


def test_the_path_of_a_text_makes_no_name_of_a_folder_too_long(tmp_path):
    text = "/a/long/path" * 30
    assert jobs_of(f"--pe rope --dataset {text}", tmp_path) == {
        "rope-seed-1": f"--pe rope --dataset {text}"}


def test_an_arrangement_sets_the_layers_and_other_runs_keep_the_flags(tmp_path):
    line = "--pe rope hope:SSL:4 nope+alibi:SL:0 --window_pattern SL --window 8"
    assert jobs_of(line, tmp_path) == {
        "rope-SL-8-seed-1": "--pe rope --window_pattern SL --window 8",
        "hope-SSL-4-seed-1": "--pe hope --window_pattern SSL --window 4",
        "nope+alibi-SL-0-seed-1":
            "--pe nope --window_pattern SL --window 0 --local_pe alibi"}


def test_a_folder_is_named_by_the_flags_that_a_file_does_not_give(tmp_path):
    (tmp_path / "config").write_text("--n_head 4 --rope_base 100 --window_pattern SL --seed 5")
    by_hand = "--pe rope --n_head 2 --learning_rate 1e-2 --device cpu"
    assert jobs_of(by_hand, tmp_path, f"@{tmp_path}/config") == {
        "rope-SL-0-n_head-2-learning_rate-0.01-seed-5": f"@{tmp_path}/config {by_hand}"}


def test_a_folder_with_a_run_of_other_flags_is_refused(dataset, tmp_path):
    words = "--max_iters 5 --pe rope", tmp_path, *TINY_FLAGS, "--dataset", dataset
    name, = jobs_of(*words)
    run(dataset, tmp_path / name, "--max_iters", "5", "--pe", "rope")
    assert list(jobs_of(*words, "--hope_cutoff", "2")) == [name]
    assert sweep.is_complete(tmp_path / name)
    (tmp_path / "config").write_text("--weight_decay 0")
    with pytest.raises(ValueError, match=f"{name} holds a run with other flags"):
        jobs_of(*words, f"@{tmp_path}/config")


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
    assert result["groups"][0]["buckets"][2]["nll"] == result["runs"][0]["buckets"][2]["nll"]
    assert (out_dir / "sweep.png").stat().st_size > 1000


ENDED = SimpleNamespace(poll=lambda: 0, terminate=lambda: None)  # a training process


def test_a_run_that_fails_is_named_and_the_others_are_scored(tiny_config, dataset, tmp_path,
                                                             monkeypatch, fails):

    def start(folder, argv):
        if argv[-1] != "2":
            run(dataset, folder, *argv[1:])
        return ENDED

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
        processes.append(ENDED if folder.name == "a" else subprocess.Popen(command))
        return processes[-1]

    sleep = time.sleep
    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(time, "sleep",
                        lambda seconds: os.kill(os.getpid(), signal.SIGTERM) or sleep(seconds))
    assert sweep.train_all({tmp_path / name: [] for name in "abc"}, 2) == signal.SIGTERM
    assert len(processes) == 2 and processes[1].returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ["study", "scaling"])
def test_runs_of_a_published_file_give_its_groups(name, tmp_path):
    path = PROJECT / f"experiments/results/{name}.json"
    sweep.main(["--json_in", str(path), "--json", str(tmp_path / "a.json")])
    found, expected = (json.loads(file.read_text())["groups"]
                       for file in (tmp_path / "a.json", path))
    args = {group["name"]: group.pop("args") for group in [*expected, *found]}
    assert args["rope"]["rope_base"] == 10000 and args["rope"]["hope_cutoff"] is None
    assert "seed" not in args["rope"]
    assert output.rounded(found, 5) == output.rounded(expected, 5)


@pytest.mark.parametrize("line, words", [
    ("--pe rotary", "rotary"), ("rope", "'rope'"), ("--dataset a b", "one value"),
    ("--json_in a.json --pe hope", "leave out --pe")])
def test_mistakes_get_one_line_before_anything_is_trained(line, words, monkeypatch, fails):
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("training"))
    code, lines = fails(sweep, line.split())
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
