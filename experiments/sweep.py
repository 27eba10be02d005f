"""
Train a model for each combination of flags, score all of them, and average over seeds:

    python -m experiments.sweep @config/cpu_demo --pe rope hope alibi --hope_cutoff 1 2 --seed 1 2 3 --out_dir out/sweep

Every flag of train.py can have several values. A flag without effect, as --hope_cutoff with rope, does not multiply the
runs. --pe also takes arrangements of layers such as nope+rope:SSSL:16 (experiments/groups.py).

Several runs (--jobs) train at a time, each in a process with one thread. If the sweep is stopped or killed, give the
same command again: finished runs are kept and the others continue. A run's folder is named by its layers, its seed and
the flags that are not in the @config file. So more values, more seeds or another sweep only add runs to OUT_DIR.

Runs that differ in their seed alone form a group. Tables, sweep.json, sweep.csv and sweep.png in OUT_DIR have one line
per group: means and standard deviations over seeds, and differences from the first group, paired by seed, with their
standard errors. The JSON holds every run as well.

    python -m experiments.sweep --json_in FILE...       the same for runs that eval_extrapolation.py --json has scored
"""
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import eval_extrapolation
import train
from common import flags, report
from common.checkpoint import load_checkpoint, lock
from common.device import Device, stop_signals
from experiments import recall
from experiments.groups import (
    IN_THE_NAME,
    NO_SETTING,
    fields_of,
    group_by_seed,
    group_key,
    group_names,
    in_words,
    name_of,
    network_of,
    print_groups,
    with_flag,
    without_effect,
    write_csv,
)

# --- Which runs there are ---------------------------------------------------------------------------------------------


def given_flags(argv):
    """["--pe", "rope", "hope", "--no-bias"] -> {"pe": ["rope", "hope"], "bias": ["False"]}. The last one counts."""
    given = {}
    for word in argv:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            off = name.startswith("no-")
            values = given[name.removeprefix("no-")] = ["False"] if off else [value] if value else []
        elif not given:
            raise ValueError(f"{word!r} does not belong to a flag: write --NAME VALUE ...")
        else:
            values.append(word)
    return given


def as_argv(chosen):
    """{"pe": "rope", "bias": None} -> ["--pe", "rope", "--bias"]."""
    return [word for name, value in chosen.items() for word in (f"--{name}", value) if word is not None]


def settings_of(network, config):
    """GPTConfig and TrainConfig, as objects -> all that a run's result depends on, as a dict."""
    return {name: value for name, value in {**asdict(network), **asdict(config)}.items() if name not in NO_SETTING}


def combinations(given, out_dir, config=()):
    """Flags with several values -> [(argv, settings, name)], one for each run: flags of train.py, and what they mean.

    The name says the layers and the flags that are not in config, those of an @config file. Raises ValueError, or exits
    as train.py does, if train.py would refuse a run."""
    found = {}
    for values in itertools.product(*(values or [None] for values in given.values())):
        chosen = dict(zip(given, values))
        arrangement = fields_of(chosen["pe"]) if chosen.get("pe") else {}
        if len(arrangement) > 1:  # it sets all of them
            chosen = {name: value for name, value in chosen.items() if name not in IN_THE_NAME}
        chosen |= {name: str(value) for name, value in arrangement.items() if value is not None}
        settings = settings_of(*train.parse([*as_argv(chosen), "--out_dir", str(out_dir)])[:2])
        chosen = {name: value for name, value in chosen.items() if name not in without_effect(settings)}
        settings = settings_of(*train.parse([*as_argv(chosen), "--out_dir", str(out_dir)])[:2])
        name = name_of(network_of(settings))
        for flag, value in chosen.items():
            new = flag not in config or (config[flag] or [None]) != [value]
            if new and flag in settings and flag not in (*IN_THE_NAME, "seed"):
                name = with_flag(name, flag, settings[flag])
        found.setdefault(json.dumps(settings), (as_argv(chosen), settings, name))
    return list(found.values())


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One run of train.py."""

    argv: list
    settings: dict
    group: str  # the name of its group, by what differs within the sweep
    folder: Path
    process: subprocess.Popen | None = None
    steps: int = 0  # done
    failure: str | None = None  # what train.py said

    def __str__(self):
        return f"{self.group}, seed {self.settings['seed']}"

    def is_finished(self):
        return self.steps >= self.settings["max_iters"]

    def is_locked(self):
        """Whether another process trains there: a sweep that was killed leaves its runs running."""
        try:
            with lock(self.folder, wait=False):
                return False
        except (BlockingIOError, FileNotFoundError) as error:
            return isinstance(error, BlockingIOError)

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = (self.folder / "ckpt.pt").exists()
        if not resume:  # killed before its first checkpoint, it may have left this
            (self.folder / "best.pt").unlink(missing_ok=True)
        command = [sys.executable, str(flags.PROJECT / "train.py"), *self.argv, "--out_dir", str(self.folder)]
        with open(self.folder / "train.txt", "a", encoding="utf-8") as output:
            # One thread, so that the result does not depend on --jobs. Its own session: Ctrl-C reaches the sweep alone.
            self.process = subprocess.Popen(
                [*command, *["--resume"] * resume], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"})

    def last_logged(self):
        """The last line of the log, {} if there is none yet or if it is being written."""
        try:
            return json.loads((self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return {}

    def follow(self):
        """Read the steps done from the log -> whether the process has ended. Raises ValueError if it was refused."""
        ended = self.process.poll() is not None
        self.steps = max(self.steps, self.last_logged().get("iter", 0))
        if ended and self.process.returncode:
            lines = (self.folder / "train.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            self.failure = lines[-1] if self.process.returncode > 0 else f"killed by signal {-self.process.returncode}"
            if self.process.returncode == 2:
                raise ValueError(f"{self}: {self.failure}")
        return ended


def make_jobs(given, out_dir, config=()):
    """Flags with several values, and those of an @config file -> the Jobs. A run that out_dir holds already is found by
    its settings, whatever its folder is called.

    Raises ValueError if a folder holds another run."""
    runs = combinations(given, out_dir, config)
    groups = {group_key(settings): settings for _, settings, _ in runs}
    names = dict(zip(groups, group_names(groups.values())))
    there, jobs = {}, []  # settings, as text -> folder, steps done
    for path in sorted(out_dir.glob("*/ckpt.pt")):
        checkpoint = load_checkpoint(path)
        settings = {name: value for name, value in checkpoint["args"].items() if name not in NO_SETTING}
        there[json.dumps(settings, sort_keys=True)] = path.parent, checkpoint["iter"]
    taken = {folder for folder, _ in there.values()}
    for argv, settings, name in runs:
        job, key = Job(argv, settings, names[group_key(settings)], None), json.dumps(settings, sort_keys=True)
        job.folder = out_dir / re.sub(r"[^\w.=+-]+", "-", f"{name} seed {settings['seed']}")
        if key in there:
            job.folder, job.steps = there[key]
        elif job.folder in taken:
            raise ValueError(f"{job.folder} holds a run with other flags: choose another --out_dir")
        taken.add(job.folder)
        jobs.append(job)
    return jobs


def train_all(jobs, at_a_time):
    """Train what is not finished -> the number of the signal that stopped it, or None."""
    waiting, running = [job for job in jobs if not job.is_finished()], []
    print(f"runs: {len(jobs)}, groups: {len({job.group for job in jobs})}, finished: {len(jobs) - len(waiting)}, at a "
          f"time: {at_a_time}")
    with stop_signals() as signals, tqdm(total=sum(job.settings["max_iters"] for job in jobs), unit="step", smoothing=0,
                                         initial=sum(job.steps for job in jobs), dynamic_ncols=True) as bar:
        try:
            while (waiting or running) and not signals:
                free = (job for job in list(waiting) if not job.is_locked())
                for job in itertools.islice(free, at_a_time - len(running)):
                    job.start()
                    waiting.remove(job)
                    running.append(job)
                time.sleep(0.2)
                for job in list(running):
                    if job.follow():
                        running.remove(job)
                        if job.failure:
                            tqdm.write(f"{job} failed: {job.failure}; see {job.folder}/train.txt")
                bar.set_postfix(runs=f"{sum(job.is_finished() for job in jobs)}/{len(jobs)}", refresh=False)
                if new := sum(job.steps for job in jobs) - bar.n:
                    bar.update(new)
                elif sys.stderr.isatty():
                    bar.refresh()  # the clock
        finally:
            for job in running:
                job.process.terminate()  # train.py then saves
            for job in running:
                job.process.wait()
    return signals[0] if signals else None


# --- Scoring ----------------------------------------------------------------------------------------------------------


def score(jobs, args, given):
    """-> the runs as the JSON of eval_extrapolation.py holds them."""
    folders, on = [str(job.folder) for job in jobs], ["--device", *given["device"]] if "device" in given else []
    checkpoints, names = [load_checkpoint(folder) for folder in folders], [str(job) for job in jobs]
    options = eval_extrapolation.make_parser().parse_args(
        [*folders, *on, "--max_factor", str(args.max_factor), "--windows", str(args.windows)])
    device = Device(options)
    *text, text_sha256 = eval_extrapolation.choose_windows(options, checkpoints, names)
    runs = eval_extrapolation.score_runs(options, checkpoints, names, *text, device)
    for run, job in zip(runs, jobs):  # best.pt is scored, and the log has the time of the whole run
        run |= {"dataset_sha256": text_sha256, "minutes": job.last_logged().get("seconds", 60 * run["minutes"]) / 60}
    if args.recall:
        options = recall.make_parser().parse_args([*folders, *on, "--max_factor", str(args.max_factor)])
        for run, found in zip(runs, recall.test_language_models(options, device)["runs"]):
            run["recall"] = found["distances"]
    return runs


def show(runs, args, **origin):
    """Print the tables; write the files that args names."""
    groups = group_by_seed(runs)
    print_groups(groups, args.all_tables)
    if args.json:
        report.write_json(args.json, "-m experiments.sweep", {**origin, "groups": groups, "runs": runs})
    if args.csv:
        write_csv(groups, args.csv)
    if args.plot:
        eval_extrapolation.plot([{**group, "name": in_words(group["name"])} for group in groups], args.plot)


def make_parser():
    parser = flags.ArgumentParser("Train a model for each combination of flags, score all of them, and average over "
                                  "seeds. All flags of train.py can be given, with one or several values each; --pe "
                                  "also takes arrangements of layers such as nope+rope:SSSL:16.")
    count, add = flags.parsed(int, at_least=1), parser.add_argument
    add("--out_dir", default="out/sweep", help="folder for the runs, sweep.json, sweep.csv and sweep.png")
    add("--jobs", type=count, default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
        help="runs at a time, each with one thread; on a CPU, as many as it has")
    add("--json_in", nargs="+", metavar="FILE", help="train nothing: average over seeds what eval_extrapolation.py "
        "--json wrote, or an earlier sweep")
    add("--max_factor", type=flags.parsed(int, at_least=2), default=16, help="longest context that is scored, in "
        "multiples of block_size")
    add("--windows", type=count, default=32, help="windows to average over")
    add("--recall", action="store_true", help="also measure whether the models use a passage that they have read "
        "before (experiments.recall OUT_DIR)")
    add("--all_tables", action="store_true", help="also print the perplexity with the last L tokens alone and "
        "the differences from the first group; the files hold them in any case")
    add("--csv", metavar="FILE", help="write the groups to this file; default: OUT_DIR/sweep.csv")
    report.add_output_flags(parser, "perplexity by position")
    return parser


def read_runs(paths):
    """JSON files -> all runs in them. Raises ValueError if one holds no scored runs."""
    return [run for path in paths for run in report.read_json(
        path, "runs", ("buckets", "config"), "eval_extrapolation.py --json or by a sweep")["runs"]]


def checked_flags(rest):
    """Flags of train.py with several values -> {name: values}. Raises ValueError if a sweep cannot vary one."""
    given = given_flags(rest)
    if "resume" in given:
        raise ValueError("a sweep always resumes: give the same command again, without --resume")
    for name in ("dataset", "device"):
        if len(given.get(name, ())) > 1:
            raise ValueError(f"--{name} takes one value here: runs are compared on the same text and device")
    return given


def average(args, rest):
    """--json_in: the runs in JSON files, as groups."""
    if rest:
        raise ValueError(f"--json_in trains nothing: leave out {rest[0]}")
    report.check_outputs(args)
    if args.csv:
        report.check_output(args.csv)
    runs = read_runs(args.json_in)
    show(runs, args, json_in_made_by=[json.loads(Path(path).read_text(encoding="utf-8")).get("command")
                                      for path in args.json_in])


def main(argv=None):
    parser = make_parser()
    words = [flags.located(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, rest = parser.parse_known_args(words)
    if args.json_in:
        average(args, rest)
        return
    given, out_dir = checked_flags(rest), Path(args.out_dir)
    config = given_flags(parser.parse_known_args([word for word in words if word.startswith("@")])[1])
    jobs = make_jobs(given, out_dir, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    args.json, args.csv = args.json or str(out_dir / "sweep.json"), args.csv or str(out_dir / "sweep.csv")
    if importlib.util.find_spec("matplotlib"):
        args.plot = args.plot or str(out_dir / "sweep.png")
    report.check_outputs(args)
    report.check_output(args.csv)
    if stopped := train_all(jobs, args.jobs):
        print("stopped, everything is saved; give the same command again to continue")
        sys.exit(128 + stopped)
    finished = [job for job in jobs if not job.failure]
    if not finished:
        raise RuntimeError(f"no run has finished: see {jobs[0].folder}/train.txt")
    show(score(finished, args, given), args)
    print(f"\nwritten: {args.json}, {args.csv}, {args.plot or 'no picture, which needs matplotlib'}")
    if len(finished) < len(jobs):
        raise RuntimeError(f"{len(jobs) - len(finished)} of {len(jobs)} runs failed and are left out: "
                           + "; ".join(str(job) for job in jobs if job.failure))


if __name__ == "__main__":
    flags.run(main)
