"""
Train a model for each combination of flags, score all of them, and average over seeds:

    python -m experiments.sweep @config/cpu_demo --pe rope hope alibi --hope_cutoff 1 2 \\
        --seed 1 2 3 --out_dir out/sweep
    python -m experiments.sweep --json_in FILE...    average what eval_extrapolation.py wrote

Every flag of train.py can have several values. A flag that an encoding does not use, as hope_cutoff
with rope, does not multiply the runs. --pe also takes arrangements of layers such as
nope+rope:SSSL:16 (experiments/groups.py).

Several runs (--jobs) train at a time, each in a process with one thread. If the sweep is stopped or
killed, give the same command again: complete runs are kept and the others continue. A run's folder
is named by its layers, its seed and the flags that are not in an @file: more values only add runs.

Runs that differ in their seed alone form a group. OUT_DIR gets sweep.json with groups and runs, and
sweep.png: means and standard deviations over seeds, and differences from the first group, paired by
seed, with their standard errors.
"""
import itertools
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common import flags, report
from common.checkpoint import load_checkpoint
from common.device import Device, DeviceConfig, stop_signals
from eval_extrapolation import choose_windows, plot, score_runs
from eval_extrapolation import make_parser as make_scoring_parser
from experiments import groups
from train import parse

PROJECT = Path(__file__).parents[1]

# --- Which runs there are -------------------------------------------------------------------------


def values_by_flag(words):
    """["--pe", "rope", "hope", "--bias"] -> {"pe": ["rope", "hope"], "bias": []}."""
    given = {}
    for word in words:
        if word.startswith("--"):
            values = given[word[2:]] = []
        elif given:
            values.append(word)
        else:
            raise ValueError(f"{word!r} does not belong to a flag: write --NAME VALUE ...")
    return given


def combinations(given):
    """{flag: its values} -> yield {flag: value}, in which an arrangement is the flags that it sets.
    The value of a switch is None."""
    for values in itertools.product(*(values or [None] for values in given.values())):
        chosen = dict(zip(given, values))
        layers = groups.fields_of(chosen["pe"]) if "pe" in chosen else {}
        yield chosen | {flag: str(value) for flag, value in layers.items() if value is not None}


def as_argv(chosen):
    """{"pe": "rope", "bias": None} -> ["--pe", "rope", "--bias"]."""
    return [word for flag, value in chosen.items()
            for word in (f"--{flag}", value) if word is not None]


def make_jobs(words, out_dir):
    """Words such as @config/cpu_demo --pe rope hope -> {folder: flags of train.py}.

    Raises ValueError, or exits as train.py does, if train.py would refuse a run."""
    files = [word for word in words if word.startswith("@")]
    given = values_by_flag([word for word in words if word not in files])
    if len(given.get("dataset", ())) > 1:
        raise ValueError("--dataset takes one value here: runs are compared on the same text")
    jobs = {}
    for chosen in combinations(given):
        argv = [*files, *as_argv(chosen), "--out_dir", str(out_dir)]
        network, config, _ = parse(argv)
        idle = flags.without_effect(network)
        chosen = {flag: value for flag, value in chosen.items() if flag not in idle}
        settings, name = asdict(network) | asdict(config), groups.name_of(network)
        for flag in chosen:
            if flag.removeprefix("no-") not in (*groups.NOT_IN_NAMES, "dataset"):
                name = groups.with_flag(name, flag, settings.get(flag, ""))
        folder = out_dir / re.sub(r"[^\w.=+-]+", "-", f"{name} seed {config.seed}")
        stored = load_checkpoint(folder / "ckpt.pt")["args"] if is_started(folder) else settings
        kept = settings.keys() - idle - {"vocab_size", *groups.NO_SETTING}
        if any(stored.get(flag, settings[flag]) != settings[flag] for flag in kept):
            raise ValueError(f"{folder} holds a run with other flags: choose another --out_dir")
        jobs[folder] = [*files, *as_argv(chosen)]
    return jobs


# --- Training and scoring -------------------------------------------------------------------------


def is_started(folder):
    return (folder / "ckpt.pt").exists()


def is_complete(folder):
    checkpoint = load_checkpoint(folder / "ckpt.pt") if is_started(folder) else None
    return checkpoint is not None and checkpoint["evaluated"] >= checkpoint["args"]["max_iters"]


def start(folder, argv):
    """-> the process that trains a run, or continues it. Its output goes to train.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, PROJECT / "train.py", *argv, "--out_dir", str(folder)]
    command += ["--resume"] if is_started(folder) else []
    with open(folder / "train.txt", "a", encoding="utf-8") as output:
        # One thread, so that the result does not depend on --jobs.
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def train_all(jobs, at_a_time):
    """Train the jobs that are not complete -> the number of the signal that stopped it, or None."""
    waiting, running = [folder for folder in jobs if not is_complete(folder)], []
    print(f"runs: {len(jobs)}, complete: {len(jobs) - len(waiting)}, at a time: {at_a_time}")
    with stop_signals("stopping the runs, which save") as signals, tqdm(
            total=len(waiting), unit="run", mininterval=30) as bar:
        while running or (waiting and not signals):
            while waiting and len(running) < at_a_time and not signals:
                folder = waiting.pop(0)
                running.append(start(folder, jobs[folder]))
            if signals:
                for process in running:
                    process.terminate()  # train.py then saves
            time.sleep(0.2)
            alive = [process for process in running if process.poll() is None]
            bar.update(len(running) - len(alive))
            running = alive
    return signals[0] if signals else None


def score(folders, args):
    """-> the runs as the JSON of eval_extrapolation.py holds them."""
    names, checkpoints = report.run_names(folders), [load_checkpoint(folder) for folder in folders]
    options = make_scoring_parser().parse_args(
        [*map(str, folders), f"--max_factor={args.max_factor}", f"--windows={args.windows}"])
    device = Device(DeviceConfig(checkpoints[0]["args"]["device"]))
    *text, sha256 = choose_windows(options, checkpoints, names)
    runs = score_runs(options, checkpoints, names, *text, device)
    return [run | {"dataset_sha256": sha256} for run in runs]


def train_and_score(args, words):
    """-> the scored runs, and the folders of those that failed. Exits if a signal stops it."""
    jobs = make_jobs(words, Path(args.out_dir))
    if number := train_all(jobs, args.jobs):
        print("stopped, everything is saved; give the same command again to continue")
        sys.exit(128 + number)
    complete = [folder for folder in jobs if is_complete(folder)]
    if not complete:
        raise RuntimeError(f"no run is complete: see {next(iter(jobs))}/train.txt")
    return score(complete, args), [str(folder) for folder in jobs if folder not in complete]


# --- Results --------------------------------------------------------------------------------------

TOTALS = {"val_loss": "std", "minutes": "std"}  # column -> kind of its error
RANGES = {"nll": "std", "ppl": "std", "ppl_local": "std", "bits_per_character": "std",
          "nll_above_first": "stderr", "nll_above_local": "stderr"}


def groups_of(runs):
    """Scored runs -> the groups, as the JSON holds them: means over seeds."""
    scores = groups.scores_of(runs)
    whole = scores[scores["start"] == 0]  # a row per run
    totals = groups.over_seeds(whole, ["name"], TOTALS)
    ranges = groups.over_seeds(scores, ["name", "start", "end"], RANGES)
    found = []
    for name, rows in whole.groupby("name", sort=False):
        run = runs[rows["run"].iloc[0]]
        found.append({
            "name": name, "pe": run["pe"], "block_size": run["block_size"],
            "seeds": rows["seed"].tolist(), "parameters": run.get("parameters"),
            **groups.without_nan(totals.loc[name]).to_dict(),
            "args": {flag: value for flag, value in groups.settings_of(run).items()
                     if flag != "seed"},
            "buckets": groups.without_nan(ranges.loc[name].reset_index()).to_dict("records")})
    return found


def print_groups(found):
    report.print_table(
        "means over seeds, ± standard deviation", ["lowest validation loss", "seeds"],
        {group["name"]: [report.format_cell(group["val_loss"], group["val_loss_std"], 4),
                         " ".join(map(str, group["seeds"]))] for group in found})
    columns = [f"[{row['start']:,}, {row['end']:,})" for row in found[0]["buckets"]]
    for key, error, digits, title in (
            ("ppl", "ppl_std", 2, "perplexity by position, ± standard deviation"),
            ("nll_above_local", "nll_above_local_stderr", 3, "loss with the full context minus "
             "loss with the last L tokens, in nats per token, ± standard error; negative: far "
             "tokens help")):
        report.print_table(title, columns, {
            group["name"]: [report.format_cell(row[key], row[error], digits)
                            for row in group["buckets"]] for group in found})


def make_parser():
    parser = flags.ArgumentParser(
        "Train a model for each combination of flags of train.py, each with one or several values, "
        "score all of them, and average over seeds.")
    add = parser.add_argument
    add("--out_dir", default="out/sweep", help="folder for the runs and the results")
    add("--jobs", type=flags.positive, help="runs at a time, each with one thread",
        default=1 if torch.cuda.is_available() else os.cpu_count())
    add("--json_in", nargs="+", metavar="FILE", help="train nothing: average over seeds what "
        "eval_extrapolation.py --json wrote, or an earlier sweep")
    add("--max_factor", type=flags.positive, default=16,
        help="longest context that is scored, in multiples of block_size")
    add("--windows", type=flags.positive, default=32, help="windows to average over")
    report.add_output_flags(parser, "perplexity by position")
    return parser


def main(argv=None):
    args, words = make_parser().parse_known_args(argv)
    if args.json_in and words:
        raise ValueError(f"--json_in trains nothing: leave out {words[0]}")
    if not args.json_in:
        args.json = args.json or f"{args.out_dir}/sweep.json"
        args.plot = args.plot or f"{args.out_dir}/sweep.png"
    report.check_outputs(args)
    if args.json_in:
        runs, failed = groups.read_runs(args.json_in), []
    else:
        runs, failed = train_and_score(args, words)
    found = groups_of(runs)
    if args.json:
        report.write_json(args.json, "-m experiments.sweep", {"groups": found, "runs": runs})
    if args.plot:
        plot([group | {"name": groups.in_words(group["name"])} for group in found], args.plot)
    print_groups(found)
    if failed:
        raise RuntimeError(f"failed, see the train.txt in {', '.join(failed)}")


if __name__ == "__main__":
    flags.run(main)
