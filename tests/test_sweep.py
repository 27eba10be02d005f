"""
Sweeps: which runs there are, training that is stopped and continued, and averages over seeds.

    python -m pytest tests/test_sweep.py
"""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_extrapolation
import train
from common.checkpoint import load_checkpoint
from common.flags import PROJECT
from common.groups import group_by_seed, group_names
from experiments import plot_flag, sweep
from model import GPTConfig
from tests.conftest import TINY_FLAGS

# --- which runs there are


def planned(line, tmp_path):
    """A command line -> what differs in the settings of each run."""
    runs = [settings for _, settings in sweep.combinations(sweep.given_flags(line.split()), tmp_path)]
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
    for _, settings in runs:
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


def test_names_of_groups_say_the_layers_and_what_differs_and_nothing_else():
    def named(line, where="nowhere"):
        runs = [settings for _, settings in sweep.combinations(sweep.given_flags(line.split()), where)]
        return group_names([{**run, "seed": 1} for run in runs])

    assert named("--pe rope hope --hope_cutoff 1 2") == ["rope", "hope hope_cutoff 1", "hope hope_cutoff 2"]
    assert named("--pe hope hope:SSSL:16 nope+rope:SSSL:16") == ["hope", "hope:SSSL:16", "nope+rope:SSSL:16"]
    assert named("--pe rope --learning_rate 1e-3 2e-3") == ["rope learning_rate 0.001", "rope learning_rate 0.002"]
    assert named("--optimizer muon adamw") == ["hope optimizer muon", "hope optimizer adamw"]
    assert named("--max_iters 5 6") == ["hope max_iters 5", "hope max_iters 6"]
    assert named("--min_lr 1e-4 2e-4") == ["hope min_lr 0.0001", "hope min_lr 0.0002"]
    assert named("--pe rope:SL:4 --window_pattern SL") == ["rope:SL:4"]


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


def test_a_sweep_that_was_killed_continues_and_its_runs_are_those_of_train_py(dataset, tmp_path, monkeypatch, capsys,
                                                                              threads):
    """Killed with all of its processes, and then stopped as by Ctrl-C: both commands are given again."""
    arguments = [*FLAGS, "--dataset", dataset, "--pe", "rope", "hope:SL:4", "--n_head", "2", "--seed", "3",
                 "--jobs", "2", "--windows", "3", "--max_factor", "4", "--out_dir", str(tmp_path / "sweep")]
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
        train.main([*FLAGS, "--dataset", dataset, *layers, "--seed", "3", "--out_dir", str(tmp_path / name)])
        expected = load_checkpoint(tmp_path / name / "ckpt.pt")
        assert checkpoint["iter"] == expected["iter"] == 12
        for key, weight in expected["model"].items():
            assert torch.equal(checkpoint["model"][key], weight), key
    result = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [group["name"] for group in result["groups"]] == ["rope", "hope:SL:4"] and "rope  " in output
    for run, group in zip(result["runs"], result["groups"]):
        assert group["buckets"][2]["ppl"] == run["buckets"][2]["ppl"] and group["seeds"] == [3]
        assert run["parameters"] > 1000 and run["minutes"] > 0 and run["val_loss"] < 10 and run["args"]["seed"] == 3
    rows = list(csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines()))
    assert [row["window_pattern"] for row in rows] == ["L", "SL"] and rows[1]["max_iters"] == "12"
    assert float(rows[0]["ppl [16,32)"]) == result["groups"][0]["buckets"][1]["ppl"]

    # once more: nothing is trained; another flag in the same folder is refused; more values only add runs
    monkeypatch.setattr(sweep.Job, "start", lambda job: pytest.fail("trained again"))
    sweep.main([*arguments, "--recall", "--json", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert [run["buckets"] for run in again["runs"]] == [run["buckets"] for run in result["runs"]]
    assert [row["distance"] for row in again["groups"][0]["recall"]] == [4, 8, 12, 16, 32]
    with pytest.raises(ValueError, match="holds a run with other flags"):
        sweep.main([*arguments, "--batch_size", "5"])
    given = sweep.given_flags(sweep.make_parser().parse_known_args([*arguments, "--hope_cutoff", "1", "2"])[1])
    jobs = sweep.make_jobs({**given, "seed": ["3", "4"]}, tmp_path / "sweep")
    assert [job.steps for job in jobs] == [12, 0, 12, 0, 0, 0]


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
    assert "40/40" in output.err and "4 runs in 1 groups, 0 of them finished" in output.out


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


# --- averages over seeds


def scored(pe, seed, nlls, locals_=None, **changes):
    """A run as eval_extrapolation.py writes it, with these losses in its buckets."""
    buckets = [{"start": 16 * i, "end": 16 * i + 16, "nll": nll, "stderr": 0.1, "ppl": nll and math.exp(nll),
                "ppl_local": math.exp(local), "bits_per_character": nll}
               for i, (nll, local) in enumerate(zip(nlls, locals_ or nlls))]
    run = {"name": f"{pe}_{seed}", "pe": pe, "seed": seed, "block_size": 16, "rope_scaling": "none", "rope_factor": 1.0,
           "attn_scaling": "none", "windows": 4, "dataset_sha256": "abc", "config": vars(GPTConfig(pe=pe)),
           "buckets": buckets}
    return {**run, **changes}


def test_means_deviations_and_paired_differences_over_seeds():
    """The seeds come in different orders, and one group has a seed more."""
    rope = {1: (2.0, 3.0), 2: (2.2, 3.6), 3: (2.1, 2.7)}
    hope = {3: (1.9, 2.0), 1: (2.0, 2.4), 2: (2.05, 2.2), 4: (9.0, 9.0)}
    runs = [scored("rope", seed, nlls, (nlls[0], 2.5)) for seed, nlls in rope.items()]
    runs += [scored("hope", seed, nlls) for seed, nlls in hope.items()]
    first, second = group_by_seed(runs[:5] + runs[6:] + runs[5:6])
    assert (first["name"], first["seeds"], second["name"], second["seeds"]) == ("rope", [1, 2, 3], "hope", [3, 1, 4, 2])
    bucket = first["buckets"][1]
    losses = torch.tensor([3.0, 3.6, 2.7], dtype=torch.float64)
    assert bucket["nll"] == pytest.approx(3.1) and bucket["nll_std"] == pytest.approx(losses.std().item())
    assert bucket["ppl"] == pytest.approx(losses.exp().mean().item())
    assert bucket["ppl_std"] == pytest.approx(losses.exp().std().item())
    assert bucket["nll_above_local"] == pytest.approx(0.6) and bucket["nll_above_first"] == 0
    assert bucket["nll_above_local_stderr"] == pytest.approx(losses.std().item() / math.sqrt(3))
    differences = torch.tensor([2.4 - 3.0, 2.2 - 3.6, 2.0 - 2.7], dtype=torch.float64)  # of seeds 1, 2 and 3
    assert second["buckets"][1]["nll_above_first"] == pytest.approx(differences.mean().item())
    assert second["buckets"][1]["nll_above_first_stderr"] == pytest.approx(differences.std().item() / math.sqrt(3))


def test_one_seed_has_no_error_and_an_encoding_that_ends_at_L_has_no_loss_beyond(capsys, tmp_path):
    groups = group_by_seed([scored("rope", 1, (2.0, 3.0)), scored("learned", 2, (2.0, None), (2.0, 2.1)),
                            scored("learned", 1, (2.2, None), (2.0, 2.1))])
    assert groups[0]["buckets"][0]["ppl_std"] is None and groups[0]["buckets"][0]["nll_above_local_stderr"] is None
    learned = groups[1]["buckets"]
    assert learned[1]["nll"] is learned[1]["ppl_std"] is learned[1]["nll_above_first"] is None
    assert learned[0]["nll_above_first"] == pytest.approx(0.2)  # of seed 1, which both have
    sweep.print_groups(groups)
    assert "learned" in capsys.readouterr().out
    sweep.write_csv(groups, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["ppl [16,32)"] for row in rows] == [str(math.exp(3.0)), ""] and rows[1]["seeds"] == "2 1"


def test_runs_with_other_flags_or_scalings_are_other_groups_and_idle_flags_do_not_count():
    def config(**changes):
        return {"config": vars(GPTConfig(**changes))}

    groups = group_by_seed([scored("rope", 1, (2.0, 3.0)),
                            scored("rope", 2, (2.0, 3.0), **config(pe="rope", hope_cutoff=2)),
                            scored("rope", 1, (2.0, 2.5), rope_scaling="yarn", rope_factor="auto"),
                            scored("rope", 1, (2.0, 2.5), args={"learning_rate": 0.1, "out_dir": "a"}),
                            scored("rope", 2, (2.0, 2.5), args={"learning_rate": 0.1, "out_dir": "b"})])
    assert [group["seeds"] for group in groups] == [[1, 2], [1], [1, 2]]
    assert [group["name"] for group in groups] == ["rope", "rope yarn", "rope learning_rate 0.1"]


@pytest.mark.parametrize("changes, words", [
    ({}, "rope_1, rope_1 have the same flags"), ({"seed": 2, "windows": 5}, "different texts"),
    ({"seed": 2, "dataset_sha256": "other"}, "different texts")])
def test_runs_that_cannot_be_averaged_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        group_by_seed([scored("rope", 1, (2.0, 3.0)), {**scored("rope", 1, (2.0, 3.0)), **changes}])


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


# --- perplexity against a flag


def groups_file(path, *runs):
    """(fields of GPTConfig, losses) of each run -> a file as sweep --json writes it."""
    groups = group_by_seed([scored(changes["pe"], seed, [nll + 0.1 * seed - 0.15 for nll in nlls], block_size=128,
                                   config=vars(GPTConfig(**changes))) for changes, nlls in runs for seed in (1, 2)])
    path.write_text(json.dumps({"groups": groups}))
    return str(path)


def test_groups_become_lines_over_the_flags_value_and_those_without_effect_have_none(tmp_path):
    file = groups_file(tmp_path / "a.json", ({"pe": "hope", "hope_cutoff": 4.0}, (2.0, 3.0)),
                       ({"pe": "hope", "hope_cutoff": 0.5}, (2.1, 3.0)), ({"pe": "rope"}, (2.2, 3.0)),
                       ({"pe": "hope", "hope_cutoff": 2.0, "n_layer": 3}, (2.3, 3.0)),
                       ({"pe": "hope", "hope_cutoff": 1.0, "n_layer": 3}, (2.4, 3.0)))
    other = groups_file(tmp_path / "b.json", ({"pe": "hope", "hope_cutoff": 4.0}, (9.0, 9.0)),
                        ({"pe": "hope", "hope_cutoff": 8.0}, (2.5, 3.0)))
    lines = plot_flag.lines_of(plot_flag.read_groups([file, other]), "hope_cutoff")
    found = {name: [(group["value"], round(group["buckets"][0]["nll"], 6)) for group in line] for name, line in lines}
    assert found == {"hope n_layer 4": [(0.5, 2.1), (4.0, 2.0), (8.0, 2.5)], "rope n_layer 4": [(None, 2.2)],
                     "hope n_layer 3": [(1.0, 2.4), (2.0, 2.3)]}


def test_a_line_over_windows_does_not_have_one_in_its_name(tmp_path):
    layers = {"window_pattern": "SL", "local_pe": "rope"}
    file = groups_file(tmp_path / "a.json", *[({"pe": pe, "window": window, **layers}, (2.0, 3.0))
                                              for pe in ("nope", "rope") for window in (16, 8)])
    lines = plot_flag.lines_of(plot_flag.read_groups([file]), "window")
    assert [(name, [group["value"] for group in line]) for name, line in lines] == [
        ("nope+rope:SL", [8, 16]), ("rope:SL", [8, 16])]


def test_what_follows_from_a_flag_does_not_tell_lines_apart(tmp_path):
    file = Path(groups_file(tmp_path / "a.json", ({"pe": "hope"}, (2.0, 3.0)), ({"pe": "rope"}, (2.0, 3.0))))
    groups = [{**group, "args": {**group["args"], "learning_rate": rate, "min_lr": rate / 10}}
              for rate in (0.2, 0.1) for group in json.loads(file.read_text())["groups"]]
    lines = plot_flag.lines_of(groups, "learning_rate")
    assert [(name, [group["value"] for group in line]) for name, line in lines] == [
        ("hope", [0.1, 0.2]), ("rope", [0.1, 0.2])]


def test_a_flag_without_a_value_where_it_has_no_effect_is_drawn(tmp_path):
    layers = {"pe": "rope", "window_pattern": "SL", "window": 4}
    file = groups_file(tmp_path / "a.json", ({"pe": "rope"}, (2.0, 3.0)),
                       *[({**layers, "local_rope_base": base}, (2.0, 3.0)) for base in (100.0, 1000.0)])
    lines = plot_flag.lines_of(plot_flag.read_groups([file]), "local_rope_base")
    assert [[group["value"] for group in line] for _, line in lines] == [[None], [100, 1000]]


def test_the_fraction_that_HoPE_rotates_and_the_smallest_base_are_marked():
    config = GPTConfig(block_size=128, n_embd=128, n_head=4)
    text, fraction = plot_flag.mark("prope_fraction", config)
    turning = [j for j in range(16) if 128 * 10_000 ** (-j / 16) >= 2 * math.pi]
    assert "HoPE" in text and fraction == len(turning) / 16
    _, base = plot_flag.mark("rope_base", config)
    least = [min(sum(math.cos(m * b ** (-j / 16)) for j in range(16)) for m in range(129))
             for b in (base, 0.98 * base)]
    assert least[0] > -0.05 and least[1] < 0 and plot_flag.mark("hope_cutoff", config) is None


def test_the_picture_has_a_panel_per_range_and_a_dotted_mark(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = [({"pe": "prope", "prope_fraction": p}, (2.0 - p, 3.0)) for p in (0.25, 0.5)]
    runs.append(({"pe": "rope"}, (2.2, 3.2)))
    figures = []
    monkeypatch.setattr(plot_flag.report, "save_picture", lambda figure, path: figures.append(figure))
    file = groups_file(tmp_path / "a.json", *runs)
    plot_flag.main(["prope_fraction", file, "--plot", str(tmp_path / "a.png")])
    first, second = figures[0].axes
    groups = {json.dumps(group["args"]): group["buckets"][0] for group in json.loads(Path(file).read_text())["groups"]}
    quarter, half, rope = groups.values()
    lines = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert lines["rope"] == pytest.approx([rope["ppl"]] * 2) and any("HoPE" in label for label in lines)
    assert any(list(line.get_ydata()) == pytest.approx([quarter["ppl"], half["ppl"]]) for line in first.lines)
    bars = first.containers[0].lines[2][0].get_segments()
    assert [bar[1][1] - bar[0][1] for bar in bars] == pytest.approx([2 * quarter["ppl_std"], 2 * half["ppl_std"]])
    assert first.get_title() == "[0, 16)" and second.get_title() == "[16, 32)"


@pytest.mark.parametrize("flag, words", [("pe", "not a flag with a number"), ("none", "not a flag with a number"),
                                         ("hope_cutoff", "no two groups"), ("block_size", "different --block_size")])
def test_what_cannot_be_drawn_against_a_flag_is_refused_in_one_line(flag, words, tmp_path, fails):
    pytest.importorskip("matplotlib")
    file = groups_file(tmp_path / "a.json", ({"pe": "hope"}, (2.0, 3.0)))
    if flag == "block_size":
        result = json.loads(Path(file).read_text())
        result["groups"].append({**result["groups"][0], "args": {**result["groups"][0]["args"], "block_size": 512},
                                 "buckets": result["groups"][0]["buckets"][:1]})
        Path(file).write_text(json.dumps(result))
    code, lines = fails(plot_flag, [flag, file, "--plot", str(tmp_path / "a.png")])
    assert code == 2 and len(lines) == 1 and words in lines[0]
    for text in ("{}", '{"groups": []}', "x"):
        (tmp_path / "b.json").write_text(text)
        code, lines = fails(plot_flag, [flag, str(tmp_path / "b.json"), "--plot", str(tmp_path / "a.png")])
        assert code == 2 and len(lines) == 1 and "not written by experiments.sweep" in lines[0]
