"""
What a newcomer meets: one line for each mistake, the published demo, documents that agree with the
code; what the code promises about itself.
"""
import ast
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement  # comes with pytest

import data.prepare
import eval_extrapolation
import sample
import train
from experiments import curves
from model import PE
from tests.conftest import PROJECT, TINY_FLAGS, log, run

CORE = [path for name in ("*.py", "common/*.py", "data/*.py") for path in PROJECT.glob(name)]


def text_of(name):
    return (PROJECT / name).read_text(encoding="utf-8")


# --- mistakes

# Script -> arguments ({run} {data} {tmp} ... are filled in), and what the message names
MISTAKES = {
    train: [
        ("--pe rotary", "nope"), ("--block 64", "--block"), ("--dropout 1", "dropout"),
        ("--max_iters many", "--max_iters"), ("--max_iters 0", "max_iters"),
        ("@{tmp}/none", "none"), ("--dataset {tmp}/none", "data.prepare"),
        ("--dataset {data} --block_size 1000000", "--block_size"), ("--device gpu", "--device"),
        ("--out_dir {run}", "--resume"), ("--out_dir {best}", "--resume"),
        ("--resume --out_dir {tmp}/none", "no checkpoint"),
        ("--resume --out_dir {run} --dataset {other}", "tokenizer"),
        ("--init_from {run} --dataset {data} --n_embd 48", "--init_from"),
        ("--init_from {learned} --dataset {data} --block_size 32", "--init_from")],
    sample: [
        ("{tmp}/none", "no checkpoint"), ("{run} --start FILE:{tmp}/none", "none"),
        ("{run} --rope_scaling yarn --rope_factor 0", "rope_factor")],
    eval_extrapolation: [
        ("", "OUT_DIR"), ("{tmp}/none", "no checkpoint"), ("{run} --rope_scaling linear", "yarn"),
        ("{run} --rope_scaling yarn --rope_factor 0", "rope_factor"),
        ("{run} --max_factor 10000", "--max_factor"), ("{run} --max_factor 0", "--max_factor"),
        ("{run} --text {tmp}/short.txt", "longer"), ("{run} --dataset {other}", "tokenizer")],
    data.prepare: [
        ("--source {tmp}/none", "none"), ("{tmp}/short.txt", "--help"),
        ("--source {tmp}/latin1.txt", "UTF-8")]}


@pytest.fixture(scope="module")
def places(dataset, finished_run, tmp_path_factory):
    """Folders that mistakes name."""
    tmp = tmp_path_factory.mktemp("places")
    run(dataset, tmp / "learned", "--pe", "learned", "--max_iters", "5")
    (tmp / "text.txt").write_text("another text of other letters\n" * 200)
    other = data.prepare.prepare(str(tmp / "text.txt"), "char", tmp / "other", charset="auto")
    (tmp / "short.txt").write_text("short")
    (tmp / "latin1.txt").write_bytes("caf\u00e9".encode("latin1"))
    (tmp / "best").mkdir()
    shutil.copy(Path(finished_run, "best.pt"), tmp / "best")
    return {"run": finished_run, "data": dataset, "tmp": tmp, "other": other, "best": tmp / "best",
            "learned": tmp / "learned"}


@pytest.mark.parametrize("script, arguments, named", [
    (script, *row) for script, rows in MISTAKES.items() for row in rows])
def test_a_mistake_gets_one_line_and_an_exit_code_and_changes_nothing(
        places, tmp_path, fails, script, arguments, named):
    arguments = [text.format(**places) for text in arguments.split()]
    if script is train:
        arguments = ["--out_dir", str(tmp_path / "out"), "--max_iters", "1", *arguments]
    before = {path: path.read_bytes() for name in ("run", "tmp")
              for path in Path(places[name]).rglob("*.*")}
    code, lines = fails(script, arguments)
    assert code == 2 and len(lines) == 1 and "error: " in lines[0] and named in lines[0], lines
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("name", ["train.py", "data/prepare.py", "experiments/page.py"])
def test_a_script_that_is_started_by_its_path_runs_or_says_how_it_is_started(name, tmp_path):
    """From any folder, and although other packages have the names of ours."""
    for other in ("common", "data"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "__init__.py").touch()
    ended = subprocess.run([sys.executable, PROJECT / name, "--help"], cwd=tmp_path, text=True,
                           capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    if name == "train.py":
        assert ended.returncode == 0 and ended.stdout.startswith("usage")
    else:
        [line] = ended.stderr.splitlines()
        assert line.endswith(f"python -m {name.removesuffix('.py').replace('/', '.')}")


def test_common_is_the_first_module_of_ours_that_an_experiment_imports():
    """experiments/common.py, which stands in for it, then says how the script is started."""
    ours = {path.stem for path in [*PROJECT.glob("*.py"), PROJECT / "common", PROJECT / "data"]}
    for path in (PROJECT / "experiments").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported = [name for name in re.findall(r"^(?:from|import) (\w+)", text, re.M)
                    if name in {*ours, "experiments"}]
        assert "__main__" not in text or imported[0] == "common", path


# --- what is published can be repeated


def test_the_demo_in_the_readme_was_made_with_the_commands_of_make_demo():
    """Each setting of its runs, defaults included, and what they were scored on."""
    published = json.loads(text_of("experiments/results/cpu_demo.json"))
    commands = dict(re.findall(r"^(\w+) = (@config.*)", text_of("Makefile"), re.M))
    free = {"out_dir", "vocab_size", "save_interval", "keep_every", "compile", "sample_chars"}
    for one in published["runs"]:
        network, config, _ = train.parse([*shlex.split(commands[one["name"]]), "--out_dir", "none"])
        ours = {**asdict(network), **asdict(config)}
        assert {name: value for name, value in one["args"].items() if name not in free} == {
            name: value for name, value in ours.items() if name not in free}
    args = eval_extrapolation.make_parser().parse_args(shlex.split(published["command"])[2:])
    assert {one["windows"] for one in published["runs"]} == {args.windows}
    assert published["runs"][0]["buckets"][-1]["end"] == args.max_factor * 128


def test_the_commands_and_links_of_the_readme_and_the_files_in_config_are_right(monkeypatch):
    monkeypatch.chdir(PROJECT)
    commands = re.findall(r"^ *python train.py (.*)", text_of("README.md"), re.M)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of("README.md"))
    assert len(commands) >= 5 and len(links) >= 5
    for command in commands + [f"@{path}" for path in Path("config").iterdir()]:
        if "--resume" in command:  # needs a run: see the commands of a night
            continue
        train.parse([*shlex.split(command), "--out_dir", "nowhere"])
    assert not [target for target in links if not Path(target).exists()]


SCRIPTS = {"train.py": train, "sample.py": sample, "eval_extrapolation.py": eval_extrapolation,
           "data.prepare": data.prepare, "experiments.curves": curves}


def test_the_commands_of_a_night_work_one_after_the_other(tmp_path, monkeypatch, capsys):
    """Of docs/night.md, with small networks. Those of experiments/NIGHT.md are parsed."""
    commands = re.findall(r"^python (?:-m )?(\S+) (.*)", text_of("docs/night.md"), re.M)
    monkeypatch.chdir(tmp_path)
    Path("config").symlink_to(PROJECT / "config")
    words = random.Random(0).choices("It was “dark”. Été – ‘old’\n".split(" "), k=6000)
    Path("my_novel.txt").write_text(" ".join(words), encoding="utf-8")
    small = (f"{' '.join(TINY_FLAGS)} --sample_chars 9 --no-compile --max_iters 8 "
             "--gradient_accumulation_steps 1").split()
    for script, given in commands:
        longer = ["--max_iters", "12"] if "--resume" in given else small
        SCRIPTS[script].main(shlex.split(given) + (longer if script == "train.py" else []))
    printed = capsys.readouterr().out
    assert len(commands) >= 9 and "step 12 of 12" in printed and "perplexity by position" in printed
    assert Path("out/novel/losses.png").exists() and not log("out/novel")[0]["sample"].isascii()
    planned = re.findall(r"^python train.py (.*)", text_of("experiments/NIGHT.md"), re.M)
    for command in planned:
        train.parse(shlex.split(command))
    assert len(planned) == 5


def test_the_code_that_the_readme_shows_stands_in_model_py():
    """Line by line, and in this order; "..." leaves lines out."""
    [shown] = re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    parts = [part.strip("\n") for part in re.split(r"^ *\.\.\.\n|\n\n\n", shown, flags=re.M)]
    places = [text_of("model.py").find(f"\n{part}\n") for part in parts]
    assert "class HoPE" in shown and -1 not in places and places == sorted(places)


def test_the_example_of_contributing_is_an_encoding(tmp_path):
    blocks = re.findall(r"^ +```python\n(.*?)^ +```", text_of("CONTRIBUTING.md"), re.M | re.DOTALL)
    field, encoding, row, _ = [textwrap.dedent(block).strip("\n") for block in blocks]
    assert sum(len(part.splitlines()) for part in (field, encoding, row)) <= 15
    model, old_row = text_of("model.py"), row.removesuffix(', "powerlaw": PowerLaw}').strip() + "}"
    assert model.count("\nPE = {") == model.count(old_row) == 1
    field = textwrap.indent(field, "    ")
    model = re.sub(r"(?<=\n)    hope_cutoff: .*?(?=\n    \w+: )",
                   lambda old: f"{old[0]}\n{field}", model, flags=re.DOTALL)
    model = model.replace("\nPE = {", f"\n{encoding}\n\n\nPE = {{").replace(old_row, row)
    (tmp_path / "with_powerlaw.py").write_text(model, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("with_powerlaw", tmp_path / "with_powerlaw.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8,
                              pe="powerlaw", powerlaw_exponent=2.0)
    bias = module.PE["powerlaw"](config).bias(torch.arange(4), torch.arange(4))
    expected = [-2 * math.log(1 + distance) for distance in (3, 2, 1, 0)]
    torch.testing.assert_close(bias[1, 3], torch.tensor(expected))
    assert module.GPT(config)(torch.zeros(1, 8, dtype=torch.int64))[0].isfinite().all()


def test_the_code_for_a_notebook_runs(monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setitem(PE, "mine", None)  # the code replaces it; afterwards it is gone
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text_of("CONTRIBUTING.md"), re.M | re.DOTALL):
        exec(block, names)
    names["loss"].backward()
    assert names["model"].transformer.wpe.log_theta.grad.abs().sum() > 0
    assert names["table"].round(2).loc["hope bias False qkv_bias False"].tolist()[:2] == [4.01, 4.0]


# --- what the code promises about itself


def test_the_core_is_short():
    texts = [path.read_text(encoding="utf-8") for path in CORE]
    assert sum(text.count("\n") for text in texts) <= 2693 and sum(map(len, texts)) <= 140_000
    assert all(text.endswith("\n") for text in texts if text)
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100


def imports_of(path):
    """The first names of all modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("files, allowed", [
    ("model.py", "torch"), ("common/*.py", "common model torch numpy matplotlib tqdm fcntl"),
    ("data/*.py", "data common model torch numpy tiktoken rustbpe"),
    ("[!m]*.py", "data common model torch numpy tqdm"),
    ("experiments/*.py", "experiments train eval_extrapolation sample data common model torch "
                         "numpy tqdm matplotlib pandas")])
def test_imports_point_one_way(files, allowed):
    """And pandas is an experiment's, matplotlib and rustbpe are in a file each of the core."""
    for path in PROJECT.glob(files):
        assert imports_of(path) <= {*sys.stdlib_module_names, *allowed.split()}, path
    for package in ("matplotlib", "rustbpe"):
        assert sum(package in imports_of(path) for path in CORE) == 1


def test_pyproject_and_the_requirements_name_the_same_packages_and_the_constraints_fit_them():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    required, for_tests, pins = (re.findall(r"^[a-z].*", text_of(f"{name}.txt"), re.M)
                                 for name in ("requirements", "requirements-dev", "constraints"))
    assert project["dependencies"] == required and len(required) == 4
    assert project["optional-dependencies"]["dev"] == for_tests
    pinned = dict(line.split("==") for line in pins)
    for needed in map(Requirement, required + for_tests):
        assert needed.specifier.contains(pinned[needed.name])
