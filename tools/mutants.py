"""
Mutation testing: which share of single faults at random places of the core do the tests notice?

    make mutants                        100 faults, about half an hour on two cores
    make mutants SAMPLE=20 SEED=7

cosmic-ray puts them in, one at a time, into copies of the project: another operator or comparison,
a number one larger or smaller, True for False, a condition negated, a loop that is not entered.
Each place is equally likely, and then each of its faults. A fault is noticed if a test fails or
takes too long. Survivors are shown as diffs.
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
# Tests of a file that is not test_NAME.py.
OWN = {"model": ("encodings", "model"), "eval_extrapolation": ("evaluation",)}
# The moments of kills are random, so that the test of them can fail by itself on a busy machine.
# torchrun is slow.
SKIPPED = "not killed_at_random and not torchrun"


def command(files):
    """Run test files one after the other until a test fails."""
    return f"{sys.executable} -m pytest -q -x -p no:cacheprovider -k '{SKIPPED}' {' '.join(files)}"


def in_order(module, seconds):
    """The test files of a module, then all others, fast ones first. seconds: of each file."""
    stem = Path(module).stem
    own = [f"tests/test_{name}.py" for name in OWN.get(stem, (stem,))]
    return sorted(seconds, key=lambda file: (file not in own, seconds[file]))


def work_in_a_copy(folder):
    copy = tempfile.mkdtemp(dir=folder)
    skipped = shutil.ignore_patterns(".*", "out", "__pycache__", Path(sys.prefix).name)
    shutil.copytree(PROJECT, copy, ignore=skipped, dirs_exist_ok=True)
    os.chdir(copy)
    os.environ["OMP_NUM_THREADS"] = "1"
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (2**34,) * 2)  # a fault may ask for any amount of memory


def try_file(file):
    """Run a test file without any fault -> seconds, and what pytest prints if a test fails."""
    started = time.time()
    outcome, output = run_tests(command([file]), 3600)
    return time.time() - started, "" if outcome == TestOutcome.SURVIVED else output


def try_fault(fault, files, timeout):
    """-> seconds, the diff, and the line of the test that fails; None if all pass."""
    started = time.time()
    result = mutate_and_test([fault], command(files), timeout)
    seconds = time.time() - started
    if result.test_outcome == TestOutcome.SURVIVED:
        return seconds, result.diff, None
    failed = [line for line in result.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return seconds, result.diff, failed[0][:150] if failed else "timeout"


def main(n, seed):
    places, generator, survivors = {}, random.Random(seed), 0  # (module, line, column) -> faults
    os.chdir(PROJECT)
    for item in _all_work_items(sorted(path for name in CORE for path in Path().glob(name)), {}):
        [fault] = item.mutations
        places.setdefault((str(fault.module_path), *fault.start_pos), []).append(fault)
    chosen = [generator.choice(places[place]) for place in generator.sample(sorted(places), n)]
    files = sorted(map(str, Path("tests").glob("test_*.py")))
    with tempfile.TemporaryDirectory() as folder, \
            multiprocessing.Pool(2, work_in_a_copy, [folder]) as workers:
        tried = workers.map(try_file, files, chunksize=1)
        if failures := "".join(output[-3000:] for _, output in tried):
            sys.exit(f"the tests fail without any fault:\n{failures}")
        seconds = {file: taken for file, (taken, _) in zip(files, tried)}
        timeout = 60 + 3 * sum(seconds.values())  # a fault may make a loop endless
        results = [workers.apply_async(
            try_fault, (fault, in_order(fault.module_path, seconds), timeout)) for fault in chosen]
        for i, result in enumerate(results):
            seconds_taken, diff, failed = result.get()
            fault, survivors = chosen[i], survivors + (failed is None)
            print(f"{i + 1:4} {seconds_taken:4.0f} s  {fault.module_path}:{fault.start_pos[0]}  "
                  f"{failed or 'SURVIVED'}")
            print("" if failed else f"{diff}\n", end="", flush=True)
    print(f"{n - survivors} of {n} faults noticed ({1 - survivors / n:.0%}), drawn from "
          f"{len(places):,} places")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
