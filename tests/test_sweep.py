"""Sweeps: which runs there are, training that is stopped and continued."""
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_extrapolation
import train
from common.checkpoint import load_checkpoint, save_checkpoint
from common.flags import PROJECT
from experiments import sweep
from model import GPTConfig
from tests.conftest import TINY_FLAGS

# --- which runs there are


def planned(line, tmp_path):
    """A command line -> what differs in the settings of each run."""
    runs = [settings for _, settings, _ in sweep.combinations(sweep.given_flags(line.split()), tmp_path)]
    differing = [name for name in runs[0] if len({run[name] for run in runs}) > 1]
    return [{name: run[name] for name in differing} for run in runs]


def test_flags_are_read_with_all_their_values_and_the_last_one_counts():
    assert sweep.given_flags("--pe rope hope --no-bias --seed=3 --pe alibi nope --compile True False".split()) == {
        "pe": ["alibi", "nope"], "bias": ["False"], "seed": ["3"], "compile": ["True", "False"]}


def test_every_combination_is_a_run(tmp_path):
    assert planned("--n_layer 1 2 --seed 1 2 --bias True False", tmp_path) == [
        {"n_layer": n, "seed": seed, "bias": bias} for n in (1, 2) for seed in (1, 2) for bias in (True, False)]


@pytest.mark.parametrize("line, n_runs", [
    ("--pe rope hope alibi --hope_cutoff 1 2 --seed 1 2 3", 12), ("--pe rope rope", 1),
    ("--pe hope --window 8 16 --local_pe rope nope", 1), ("--pe hope --window_pattern L SL --window 8 16", 3),
    ("--optimizer muon adamw --muon_learning_rate 0.01 0.02 --muon_momentum 0.9 0.95", 5),
    ("--pe rope alibi --rope_base 100 1000", 3), ("--rope_factor 2 4", 1)])
def test_flags_without_effect_do_not_multiply_the_runs(line, n_runs, tmp_path):
    runs = sweep.combinations(sweep.given_flags(line.split()), tmp_path)
    assert len(runs) == n_runs
    defaults = vars(GPTConfig())
    for _, settings, _ in runs:
        if settings["pe"] != "hope":
            assert settings["hope_cutoff"] == defaults["hope_cutoff"]  # what has no effect has its default


def test_an_arrangement_sets_all_that_it_says_and_other_runs_keep_the_flags(tmp_path):
    line = "--pe rope hope:SSL:4 nope+rope:SL:0 --window_pattern SL --window 8 --local_pe alibi"
    assert planned(line, tmp_path) == [
        {"pe": "rope", "window_pattern": "SL", "window": 8, "local_pe": "alibi"},
        {"pe": "hope", "window_pattern": "SSL", "window": 4, "local_pe": None},
        {"pe": "nope", "window_pattern": "SL", "window": 0, "local_pe": "rope"}]


def test_flags_can_come_from_a_file_and_be_replaced(tmp_path):
    parser = sweep.make_parser()
    args, rest = parser.parse_known_args([f"@{PROJECT}/config/cpu_demo", "--jobs", "3", "--seed", "4", "5"])
    given = sweep.given_flags(rest)
    assert args.jobs == 3 and given["seed"] == ["4", "5"] and given["compile"] == ["False"]
    assert len(sweep.combinations(given, tmp_path)) == 2


# --- training, stopped and continued

FLAGS = [*TINY_FLAGS, "--max_iters", "12", "--eval_interval", "2"]


@pytest.fixture
def threads():
    """torch has its number of threads again after a test."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def checkpoints_of(out_dir):
    return {path.parent.name: load_checkpoint(path) for path in Path(out_dir).glob("*/ckpt.pt")}


@pytest.fixture
def tiny_config(dataset, tmp_path):
    """A file of flags, for @FILE."""
    path = tmp_path / "tiny"
    path.write_text(shlex.join([*FLAGS, "--dataset", dataset]))
    return f"@{path}"


def test_a_sweep_that_was_killed_continues_and_its_runs_are_those_of_train_py(tiny_config, tmp_path, monkeypatch,
                                                                              capsys, threads):
    """Killed with all of its processes, and then stopped as by Ctrl-C: both commands are given again."""
    arguments = [tiny_config, "--pe", "rope", "hope:SL:4", "--n_head", "2", "--seed", "3", "--jobs", "2",
                 "--windows", "3", "--max_factor", "4", "--out_dir", str(tmp_path / "sweep")]
    command = [sys.executable, "-m", "experiments.sweep", *arguments]
    for how in (signal.SIGKILL, signal.SIGINT):
        before = {name: checkpoint["iter"] for name, checkpoint in checkpoints_of(tmp_path / "sweep").items()}
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while time.time() < deadline:
            now = {name: checkpoint["iter"] for name, checkpoint in checkpoints_of(tmp_path / "sweep").items()}
            if len(now) == 2 and sum(now.values()) > sum(before.values()) or process.poll() is not None:
                break
            time.sleep(0.02)
        os.kill(process.pid, how)
        process.communicate()
    killed = checkpoints_of(tmp_path / "sweep")
    assert set(killed) == {"rope-seed-3", "hope-SL-4-seed-3"}

    sweep.main(arguments)
    output = capsys.readouterr().out
    torch.set_num_threads(1)  # as the runs of a sweep
    for (name, checkpoint), layers in zip(sorted(checkpoints_of(tmp_path / "sweep").items()), (
            ["--pe", "hope", "--window_pattern", "SL", "--window", "4"], ["--pe", "rope"])):
        train.main([tiny_config, *layers, "--seed", "3", "--out_dir", str(tmp_path / name)])
        expected = load_checkpoint(tmp_path / name / "ckpt.pt")
        assert checkpoint["iter"] == expected["iter"] == 12
        for key, weight in expected["model"].items():
            assert torch.equal(checkpoint["model"][key], weight), key
    result = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [group["name"] for group in result["groups"]] == ["rope", "hope:SL:4"] and "rope  " in output
    for run, group in zip(result["runs"], result["groups"]):
        assert group["buckets"][2]["ppl"] == run["buckets"][2]["ppl"] and group["seeds"] == [3]
        assert run["parameters"] > 1000 and run["val_loss"] < 10 and run["args"]["seed"] == 3
        log = (tmp_path / "sweep" / f"{group['name'].replace(':', '-')}-seed-3" / "log.jsonl").read_text()
        assert run["minutes"] == json.loads(log.splitlines()[-1])["seconds"] / 60 > 0  # of all steps, not of best.pt
    rows = list(csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines()))
    assert [row["window_pattern"] for row in rows] == ["L", "SL"] and rows[1]["max_iters"] == "12"
    assert float(rows[0]["ppl [16,32)"]) == result["groups"][0]["buckets"][1]["ppl"]

    # once more: nothing is trained; more values only add runs
    monkeypatch.setattr(sweep.Job, "start", lambda job: pytest.fail("trained again"))
    sweep.main([*arguments, "--recall", "--json", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert [run["buckets"] for run in again["runs"]] == [run["buckets"] for run in result["runs"]]
    assert [row["distance"] for row in again["groups"][0]["recall"]] == [4, 8, 12, 16, 32]
    given = sweep.given_flags(sweep.make_parser().parse_known_args([*arguments, "--hope_cutoff", "1", "2"])[1])
    jobs = sweep.make_jobs({**given, "seed": ["3", "4"]}, tmp_path / "sweep")
    assert [job.steps for job in jobs] == [12, 0, 12, 0, 0, 0]


def test_a_folder_is_named_by_what_its_config_does_not_say_so_that_two_sweeps_can_share_theirs(tmp_path):
    config = sweep.given_flags(["--n_head", "4", "--rope_base", "10000", "--no-bias"])

    def folders(line):
        jobs = sweep.make_jobs({**config, **sweep.given_flags(line.split())}, tmp_path, config)
        return [job.folder.name for job in jobs]

    assert folders("--pe rope hope:SL:4 --seed 1 2") == ["rope-seed-1", "rope-seed-2", "hope-SL-4-seed-1",
                                                         "hope-SL-4-seed-2"]
    assert folders("--pe rope --n_head 2 --rope_base 1e6") == ["rope-n_head-2-rope_base-1000000-seed-1"]
    assert folders("--pe rope --n_head 4 --bias --learning_rate 0.1") == ["rope-bias-True-learning_rate-0.1-seed-1"]
    assert folders("--pe nope --rope_base 1e6 --hope_cutoff 2") == ["nope-seed-1"]  # without effect


def test_a_run_is_found_by_its_settings_whatever_its_folder_is_called_and_another_one_is_never_overwritten(tmp_path):
    def save(folder, **changes):
        _, settings, _ = sweep.combinations({"pe": ["rope"]}, tmp_path)[0]
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder / "ckpt.pt", {"config": vars(GPTConfig(pe="rope")), "iter": 7,
                                                        "args": {**settings, "out_dir": "elsewhere", **changes}})

    save("rope-n_head-4-seed-1")
    job, = sweep.make_jobs({"pe": ["rope"]}, tmp_path)
    assert (job.folder.name, job.steps) == ("rope-n_head-4-seed-1", 7)
    save("rope-seed-2", batch_size=5, seed=2)
    for given, folder in (({"pe": ["rope"], "seed": ["2"]}, "rope-seed-2"),
                          ({"pe": ["hope:SL:4", "hope+hope:SL:4"]}, "hope-SL-4-seed-1")):  # the same, in two ways
        with pytest.raises(ValueError, match=f"{folder} holds a run with other flags"):
            sweep.make_jobs(given, tmp_path)


class Process:
    """A training that ends at once, with an exit code."""

    def __init__(self, code):
        self.returncode, self.terminated = code, False

    def poll(self):
        return self.returncode

    def terminate(self):
        self.terminated = True

    def wait(self):
        pass


def jobs_that_end(tmp_path, monkeypatch, codes, steps=10):
    """Jobs of seeds 1, 2, ..., whose processes end with these codes."""
    def start(job):
        job.folder.mkdir(exist_ok=True)
        (job.folder / "train.txt").write_text("training\ntrain.py: error: of this kind\n")
        (job.folder / "log.jsonl").write_text(json.dumps({"iter": steps}) + "\n")
        job.process = Process(codes[job.settings["seed"] - 1])

    monkeypatch.setattr(sweep.Job, "start", start)
    seeds = [str(seed) for seed in range(1, len(codes) + 1)]
    return sweep.make_jobs({"max_iters": [str(steps)], "seed": seeds}, tmp_path)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    jobs = jobs_that_end(tmp_path, monkeypatch, [0, 1, 0, -9])
    assert sweep.train_all(jobs, 2) is None
    assert [job.failure for job in jobs] == [None, "train.py: error: of this kind", None, "killed by signal 9"]
    output = capsys.readouterr()
    assert "hope, seed 2 failed: train.py: error: of this kind" in output.out
    assert "40/40" in output.err and "runs: 4, groups: 1, finished: 0" in output.out


def test_a_run_that_train_py_refuses_ends_the_sweep_and_stops_the_others(tmp_path, monkeypatch):
    jobs = jobs_that_end(tmp_path, monkeypatch, [2, None, 0])
    with pytest.raises(ValueError, match="hope, seed 1: train.py: error: of this kind"):
        sweep.train_all(jobs, 2)
    assert jobs[1].process.terminated and jobs[2].process is None


def test_a_folder_in_which_another_process_trains_is_left_alone_until_that_ends(tmp_path, monkeypatch):
    jobs, started, looked = jobs_that_end(tmp_path, monkeypatch, [0, 0]), [], []
    start = sweep.Job.start
    monkeypatch.setattr(sweep.Job, "start", lambda job: started.append(job.settings["seed"]) or start(job))
    monkeypatch.setattr(sweep.Job, "is_locked",
                        lambda job: job is jobs[0] and not looked.append(job) and len(looked) < 3)
    sweep.train_all(jobs, 1)
    assert started == [2, 1]
    monkeypatch.undo()
    with sweep.lock(jobs[0].folder, wait=False):
        assert jobs[0].is_locked() and not jobs[1].is_locked()
    assert not jobs[0].is_locked()


def test_what_eval_extrapolation_wrote_is_averaged_and_drawn(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    eval_extrapolation.main([finished_run, "--windows", "3", "--max_factor", "4", "--device", "cpu",
                             "--json", str(tmp_path / "one.json")])
    result = json.loads((tmp_path / "one.json").read_text())
    other = {**result["runs"][0], "seed": 2}
    (tmp_path / "two.json").write_text(json.dumps({"runs": [other]}))
    sweep.main(["--json_in", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--json", str(tmp_path / "g.json"),
                "--plot", str(tmp_path / "g.png"), "--csv", str(tmp_path / "g.csv")])
    group, = json.loads((tmp_path / "g.json").read_text())["groups"]
    assert group["seeds"] == [1, 2] and group["buckets"][0]["ppl"] == pytest.approx(other["buckets"][0]["ppl"])
    assert (tmp_path / "g.png").stat().st_size > 1000 and "± 0.00" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [
    ("--pe rotary", "no encoding rotary"), ("--pe hope:SL", "not an arrangement"), ("--heads 2", "unknown argument"),
    ("--hope_cutoff -1", "at least 0"), ("--resume", "without --resume"), ("--dataset a b", "one value"),
    ("rope", "'rope'"), ("--pe rope --window_pattern SXL", "letters"), ("--n_layer", "expected one argument"),
    ("--jobs 0", "at least 1"),
    ("--pe alibi rope --rope_scaling yarn", "alibi does not rotate"), ("--lr 1e-3", "it is --learning_rate"),
    ("--json_in {tmp}/none.json", "none.json"), ("--json_in {tmp}/a.json --pe hope", "leave out --pe"),
    ("--json_in {tmp}/a.json", "was not written by"), ("--plot {tmp}/a.gif", "pictures"),
    ("--out_dir {tmp}/run", "holds a run")])
def test_mistakes_get_one_line_and_exit_code_2_before_anything_is_trained(line, words, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(sweep.Job, "start", lambda job: pytest.fail("training"))
    (tmp_path / "a.json").write_text('{"runs": [{"name": "rope"}]}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.pt").touch()
    arguments = line.format(tmp=tmp_path).split()
    if "--json_in" not in arguments and "--out_dir" not in arguments:
        arguments += ["--out_dir", str(tmp_path / "sweep")]
    code, lines = fails(sweep, arguments)
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
