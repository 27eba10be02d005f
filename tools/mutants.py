"""
Mutation testing: which share of single faults at random places of the core do the tests notice?

    make mutants                        100 faults, about half an hour on two cores
    make mutants SAMPLE=20 SEED=7

cosmic-ray puts them in, one at a time, into copies of the project: another operator or comparison, a number one larger
or smaller, True for False, a condition negated, a loop that is not entered. Each place is equally likely, and then each
of its faults. A fault is noticed if a test fails or takes too long. Survivors are shown as diffs.
"""
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome

PROJECT = Path(__file__).resolve().parent.parent
CORE = "model.py", "train.py", "eval_extrapolation.py", "sample.py", "common/*.py", "data/*.py"
# Test files are run until one fails: first those of the module, then the others, fast ones first.
OWN = {"model": "encodings faults windows", "train": "faults habits training", "checkpoint": "habits training",
       "eval_extrapolation": "faults training", "sample": "faults training", "device": "speed faults habits",
       "flags": "errors habits", "report": "training faults experiments", "optimizer": "training", "loader": "data",
       "prepare": "data", "sources": "data", "tokenizer": "tokenizer data"}
ALL = "faults encodings model windows init_from errors training habits references speed cache tokenizer data robustness"


def command(module=""):
    names = dict.fromkeys(f"{OWN.get(Path(module).stem, '')} {ALL} experiments sweep".split())
    chance = "-k 'not killed_twenty_times'"  # its moments are random: it can fail by itself on a busy machine
    return f"{sys.executable} -m pytest -q -x -p no:cacheprovider {chance} " + " ".join(
        f"tests/test_{name}.py" for name in names)


def work_in_a_copy(folder):
    copy = tempfile.mkdtemp(dir=folder)
    skipped = shutil.ignore_patterns(".*", "out", "__pycache__", Path(sys.prefix).name)
    shutil.copytree(PROJECT, copy, ignore=skipped, dirs_exist_ok=True)
    os.chdir(copy)
    os.environ["OMP_NUM_THREADS"] = "1"
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (2**34,) * 2)  # a fault may ask for any amount of memory


def try_fault(fault):
    """-> seconds, the diff, and the line of the test that fails; None if all pass."""
    started = time.time()
    result = mutate_and_test([fault], command(fault.module_path), timeout=900)
    failed = [line for line in result.output.splitlines() if line.startswith(("FAILED", "ERROR"))] + ["timeout"]
    survived = result.test_outcome == TestOutcome.SURVIVED
    return time.time() - started, result.diff, None if survived else failed[0][:150]


def main(n, seed):
    places, generator, survivors = {}, random.Random(seed), 0  # (module, line, column) -> faults
    os.chdir(PROJECT)
    for item in _all_work_items(sorted(path for name in CORE for path in Path().glob(name)), {}):
        [fault] = item.mutations
        places.setdefault((str(fault.module_path), *fault.start_pos), []).append(fault)
    chosen = [generator.choice(places[place]) for place in generator.sample(sorted(places), n)]
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Pool(2, work_in_a_copy, [folder]) as workers:
        outcome, output = workers.apply(run_tests, [command(), 3600])
        if outcome != TestOutcome.SURVIVED:
            sys.exit(f"the tests fail without any fault:\n{output[-3000:]}")
        for i, (seconds, diff, failed) in enumerate(workers.imap(try_fault, chosen)):
            fault, survivors = chosen[i], survivors + (failed is None)
            print(f"{i + 1:4} {seconds:4.0f} s  {fault.module_path}:{fault.start_pos[0]}  {failed or 'SURVIVED'}")
            print("" if failed else f"{diff}\n", end="", flush=True)
    print(f"{n - survivors} of {n} faults noticed ({1 - survivors / n:.0%}), drawn from {len(places):,} places")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
