"""
What a newcomer meets: one line for each mistake, limits, defaults, help texts, files of flags, requirements.

    python -m pytest tests/test_project.py
"""
import importlib.util
import math
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement  # comes with pytest

import data.prepare
import eval_extrapolation
import sample
import train
from model import PE, GPTConfig
from tests.conftest import PROJECT, run

# --- mistakes

# Script -> arguments ({run} {data} {tmp} {learned} {other} are filled in), and words of the message
MISTAKES = {
    train: [
        ("--pe rotary", "nope"), ("--optimizer sgd", "muon"), ("--block-size 64", "--block_size"),
        ("--layers 3", "--n_layer"), ("--max_iters many", "whole number"), ("--learning_rate nan", "number"),
        ("--rope_base inf", "finite number"), ("@{tmp}/none", "none"), ("--dataset {tmp}/none", "data/prepare.py"),
        ("--dataset {data} --block_size 1000000", "smaller --block_size"),
        ("--dataset {data} --n_embd 33 --n_head 2", "divisible"),
        ("--dataset {data} --n_embd 30 --n_head 2 --pe hope", "odd"),
        ("--dataset {data} --n_embd 33 --n_head 1 --pe sinusoidal", "even"),
        ("--dataset {data} --device gpu", "--device cpu"), ("--window few", "whole number"),
        ("--window_pattern SX", "letters S and L"), ("--local_pe learned", "acts on the embeddings"),
        ("--local_pe sinusoidal", "acts on the embeddings"), ("--local_pe rotary", "nope"),
        ("--rope_scaling linear", "yarn"), ("--pe nope --rope_scaling pi", "does not rotate"),
        ("--resume --out_dir {tmp}/none", "no checkpoint"), ("--out_dir {run}", "--resume"),
        ("--resume --out_dir {run} --pe rope", "--pe was hope and is now rope"),
        ("--resume --out_dir {run} --max_iters 5", "10 steps"),
        ("--dataset {data} --out_dir {tmp}/best", "--init_from"),
        ("--resume --out_dir {tmp}/best", "weights only"), ("--resume --out_dir {tmp}/weights", "weights only"),
        ("--init_from {run} --dataset {data} --n_embd 48 --n_head 2", "n_embd (32 there, 48 here)"),
        ("--init_from {run} --dataset {data} --n_layer 3", "n_layer (2 there"),
        ("--init_from {run} --dataset {data} --no-bias", "bias (True there, False here)"),
        ("--init_from {run} --dataset {data} --n_head 4", "n_head (2 there, 4 here)"),
        ("--init_from {tmp}/none --dataset {data}", "no checkpoint"),
        ("--init_from {learned} --dataset {data} --block_size 32", "(16, 32)"),
        ("--init_from {run} --dataset {tmp}/none", "data/prepare.py"),
        ("--init_from {run} --dataset {other}", "another tokenizer")],
    sample: [
        ("--out_dir {tmp}/none", "no checkpoint"), ("--out_dir {run} --start=", "empty"),
        ("--out_dir {run} --start FILE:{tmp}/empty.txt", "empty"), ("--out_dir {run} --start FILE:{tmp}/none", "none")],
    eval_extrapolation: [
        ("", "OUT_DIR"), ("{run} --rope_scaling linear", "yarn"), ("{tmp}/none", "no checkpoint"),
        ("{run} --max_factor 10000", "lower --max_factor"), ("{run} --text {tmp}/short.txt", "longer texts"),
        ("{run} --text {tmp}/none", "none"), ("{run} --dataset {tmp}/none", "data/prepare.py"),
        ("{run} --json {tmp}/none/r.json", "folder"), ("{run} --json {tmp}", "not a file"),
        ("{run} --plot {tmp}/r.docx", ".png"), ("{run} --text=", "empty"), ("{run} --text {tmp}", "directory")],
    data.prepare: [
        ("--source {tmp}/none", "pysrc"), ("--source {tmp}/empty.txt", "no text"), ("--source {tmp}/binary", "binary"),
        ("--source {tmp}/latin1.txt", "iconv"), ("--source {tmp}/utf16.txt", "iconv -f utf-16"),
        ("--source {tmp}/*.none", "pysrc"), ("--source {tmp}/nothing", "no text"), ("--tokenizer words", "char"),
        ("--source {tmp}/short.txt --out_dir {tmp}", "no data set"),
        ("--source {tmp}/short.txt --out_dir {tmp}/set", "add more text"), ("--vocab_size 256", "at least 257"),
        ("--charset utf8", "auto"), ("--documents 0", "at least 1")]}


@pytest.fixture(scope="module")
def learned(dataset, tmp_path_factory):
    """The folder of a run with learned positions."""
    out_dir = tmp_path_factory.mktemp("learned")
    run(dataset, out_dir, "--pe", "learned", "--max_iters", "5")
    return out_dir


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A data set with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("another text of other letters\n" * 200)
    return data.prepare.prepare(str(folder / "text.txt"), "char", folder / "set", charset="auto")


@pytest.mark.parametrize("script, arguments, words", [(script, *row) for script, rows in MISTAKES.items()
                                                      for row in rows])
def test_a_mistake_gets_one_line_and_an_exit_code(script, arguments, words, finished_run, dataset, learned, other,
                                                  tmp_path, fails):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / "utf16.txt").write_text("text of Windows", encoding="utf-16")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    for folder, name in (("best", "best.pt"), ("weights", "ckpt.pt")):
        (tmp_path / folder).mkdir()
        shutil.copy(Path(finished_run) / "best.pt", tmp_path / folder / name)
    before = {path: path.read_bytes() for path in [*Path(finished_run).iterdir(), *tmp_path.rglob("*.*")]}
    places = {"run": finished_run, "data": dataset, "learned": learned, "other": other, "tmp": tmp_path}
    arguments = [text.format(**places) for text in arguments.split()]
    if script is train and "--out_dir" not in arguments:
        arguments += ["--out_dir", str(tmp_path / "out")]

    code, lines = fails(script, arguments)

    assert code == 2 and len(lines) == 1 and "error: " in lines[0] and words in lines[0], lines
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(tmp_path.glob("out/*.pt"))


# Flag -> the last value that is accepted, the first that is refused, at each end of what is allowed.
LIMITS = {
    "block_size": "2 1", "n_layer": "1 0", "n_head": "1 0", "n_embd": "1 0", "dropout": "0 -0.1 0.9 1",
    "rope_base": "1.1 1", "prope_fraction": "0 -0.1 1 1.1", "hope_cutoff": "0 -0.1", "window": "0 -1",
    "local_rope_base": "1.1 1", "rope_factor": "1 0.9", "rope_context": "2 1", "learning_rate": "1e-9 0",
    "muon_learning_rate": "0 -0.1", "muon_momentum": "0 -0.1 0.9 1", "min_lr": "0 -0.1", "warmup_iters": "0 -1",
    "lr_decay_iters": "1 0", "weight_decay": "0 -0.1", "beta1": "0 -0.1 0.9 1", "beta2": "0 -0.1 0.9 1",
    "seed": f"0 -1 {2**32} {2**32 + 1}", "max_iters": "1 0", "batch_size": "1 0", "gradient_accumulation_steps": "1 0",
    "grad_clip": "0 -0.1", "eval_interval": "1 0", "eval_iters": "1 0", "log_interval": "1 0", "save_interval": "1 0",
    "save_minutes": "0 -0.1", "keep_every": "1 0"}


def test_every_number_that_can_be_given_has_the_limits_that_it_should_have(fails):
    limited = {field.name for config in (GPTConfig, train.TrainConfig) for field in fields(config)
               if field.metadata["limits"] and "one_of" not in field.metadata["limits"]}
    assert LIMITS.keys() <= limited  # one that you have added need not be in the table
    for name, values in LIMITS.items():
        for i, value in enumerate(values.split()):
            argv = ["--n_head", "1", "--pe", "nope", f"--{name}={value}"]
            if i % 2 == 0:
                network, config, _ = train.parse(argv)
                assert float(getattr(network, name, getattr(config, name, None))) == float(value)
            else:
                code, lines = fails(train, argv)
                assert code == 2 and len(lines) == 1, lines
                assert re.search(rf"--{name}\b.* (at least|at most|above|below) ", lines[0]), lines


@pytest.mark.parametrize("script, limits", [
    (sample, {"num_samples": "1 0", "max_new_tokens": "1 0", "temperature": "0 -0.1", "top_k": "1 0",
              "seed": f"0 -1 {2**32} {2**32 + 1}", "rope_factor": "1 0.9"}),
    (eval_extrapolation, {"max_factor": f"1 0 {2**16} {2**16 + 1}", "windows": "1 0", "batch_size": "1 0",
                          "chunk": "1 0", "rope_factor": "1 0.9"})])
def test_numbers_beyond_a_limit_are_refused_before_anything_is_read(fails, tmp_path, script, limits):
    out_dir = ["--out_dir", str(tmp_path / "none")] if script is sample else [str(tmp_path / "none")]
    for name, values in limits.items():
        for i, value in enumerate(values.split()):
            code, lines = fails(script, [*out_dir, f"--{name}={value}"])
            words = f"--{name}: .* (at least|at most) " if i % 2 else "no checkpoint"
            assert code == 2 and len(lines) == 1 and re.search(words, lines[0]), lines


# --- help and defaults


@pytest.fixture
def help_of(capsys):
    """help_of(script) -> what --help prints, in one line."""
    def call(script):
        with pytest.raises(SystemExit) as stopped:
            script.main(["--help"])
        assert stopped.value.code == 0
        return " ".join(capsys.readouterr().out.split())
    return call


def test_the_defaults_that_the_documented_numbers_were_made_with(help_of):
    for script, defaults in ((eval_extrapolation, {"max_factor": 16, "windows": 32, "chunk": 128}),
                             (sample, {"num_samples": 1, "max_new_tokens": 500, "temperature": 0.8, "seed": 1})):
        text = help_of(script)
        for name, value in defaults.items():
            assert re.search(rf"--{name} {name.upper()} [^()]*\(default: {value}\)", text), name


@pytest.mark.parametrize("script", [train, sample, eval_extrapolation, data.prepare])
def test_help_has_no_default_that_says_nothing(help_of, script):
    text = help_of(script)
    assert text.startswith("usage") and "None" not in text


def test_every_field_of_the_configurations_is_a_flag_of_train_or_comes_with_the_text(help_of):
    text = help_of(train)
    names = {field.name for config in (GPTConfig, train.TrainConfig) for field in fields(config)}
    assert {name for name in names if f"--{name} " not in text} == {"vocab_size", "attn_scaling"}


def test_help_shows_every_default_that_says_something(help_of):
    text = help_of(train)
    assert re.search(r"--dropout DROPOUT [^-]*\(default: 0\.0\)", text)
    for field in (*fields(GPTConfig), *fields(train.TrainConfig)):
        if field.name not in ("vocab_size", "attn_scaling") and field.default not in (None, False):
            assert re.search(rf"--{field.name} .*?\(default: {re.escape(str(field.default))}\)", text), field.name


def test_help_says_what_each_encoding_is(help_of):
    text = help_of(train)
    for name, encoding in PE.items():
        [first] = re.findall(r"^\w+", encoding.__doc__)
        assert re.search(rf"[:;] {name}: {first}\b", text), name


# --- files of the project


@pytest.mark.parametrize("path", sorted((PROJECT / "config").iterdir()), ids=lambda path: path.name)
def test_every_file_in_config_is_accepted_by_train(path):
    train.parse([f"@{path}", "--out_dir", "nowhere"])


def test_pyproject_and_the_requirements_name_the_same_packages_and_the_constraints_fit_them():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = {name: re.findall(r"^[a-z].*", (PROJECT / f"{name}.txt").read_text(encoding="utf-8"), re.M)
             for name in ("requirements", "requirements-dev", "constraints")}
    assert project["dependencies"] == lines["requirements"]
    assert project["optional-dependencies"]["dev"] == lines["requirements-dev"]
    pins = dict(line.split("==") for line in lines["constraints"])
    for line in lines["requirements"] + lines["requirements-dev"]:
        needed = Requirement(line)
        assert needed.specifier.contains(pins[needed.name])


@pytest.mark.parametrize("files, project", [
    ("model.py", ""), ("common/*.py", "common model"), ("data/*.py", "data common model"),
    ("[!m]*.py", "data common model"),
    ("experiments/*.py", "experiments train eval_extrapolation sample data common model matplotlib")])
def test_imports_point_one_way_and_need_no_package_that_is_not_required(files, project):
    imported = {name for path in PROJECT.glob(files)
                for name in re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M)}
    required = re.findall(r"^[a-z]+", (PROJECT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert imported <= {*required, *sys.stdlib_module_names, *project.split()}


def test_the_training_commands_of_the_readme_and_of_make_demo_are_accepted_and_its_links_lead_somewhere():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ *python train.py (.*)", readme, re.M)
    commands += re.findall(r"^\w+ = (@config.*)", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(commands) >= 10
    for command in commands:
        train.parse([*shlex.split(command), "--out_dir", "nowhere"])
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme):
        assert (PROJECT / target).exists(), target


def test_the_code_that_the_readme_shows_stands_in_model_py():
    """Line by line, and in this order; "..." leaves lines out."""
    readme, model = ((PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "model.py"))
    [shown] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    parts = [part.strip("\n") for part in re.split(r"^ *\.\.\.\n|\n\n\n", shown, flags=re.MULTILINE)]
    assert len(parts) == 4 and "class HoPE" in parts[2]
    places = [model.find(f"\n{part}\n") for part in parts]
    assert -1 not in places and places == sorted(places)


def test_the_example_of_contributing_is_an_encoding(tmp_path):
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    field, encoding, row, _ = [textwrap.dedent(block).strip("\n") for block in
                               re.findall(r"^ +```python\n(.*?)^ +```", text, flags=re.DOTALL | re.MULTILINE)]
    assert len(encoding.splitlines()) + len(row.splitlines()) + len(field.splitlines()) <= 15
    model = (PROJECT / "model.py").read_text(encoding="utf-8")
    old_row = row.removesuffix(', "powerlaw": PowerLaw}').strip() + "}"
    assert model.count("\nPE = {") == model.count(old_row) == 1
    model = re.sub(r"(?<=\n)    hope_cutoff: .*?(?=\n    \w+: )",
                   lambda old: old[0] + "\n" + textwrap.indent(field, "    "), model, flags=re.DOTALL)
    model = model.replace("\nPE = {", f"\n{encoding}\n\n\nPE = {{").replace(old_row, row)
    (tmp_path / "with_powerlaw.py").write_text(model, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("with_powerlaw", tmp_path / "with_powerlaw.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8, pe="powerlaw",
                              powerlaw_exponent=2.0)
    bias = module.PE["powerlaw"](config).bias(torch.arange(4), torch.arange(4))
    torch.testing.assert_close(bias[1, 3], torch.tensor([-2 * math.log(1 + distance) for distance in (3, 2, 1, 0)]))
    assert module.GPT(config)(torch.zeros(1, 8, dtype=torch.int64))[0].isfinite().all()


# What README.md promises -> the test that proves it
PROMISES = {
    "default text is the Python source of the installed torch and numpy":
        "test_sources.py::test_the_default_text_needs_no_network_and_holds_long_documents",
    "they differ in this method alone":
        "test_encodings.py::test_hope_with_a_very_long_context_is_rope_and_with_one_below_2_pi_is_nope",
    "rotates the fastest fraction p of the pairs":
        "test_encodings.py::test_prope_keeps_the_fastest_int_of_p_d_over_2_pairs_and_does_not_respread_them",
    "hope_cutoff is 1 in the paper": "test_encodings.py::test_hope_keeps_as_many_pairs_as_the_paper_says",
    "each inside one document": "test_loader.py::test_windows_lie_inside_one_document_and_do_not_overlap",
    "undefined beyond L": "test_evaluation.py::test_learned_is_scored_up_to_its_limit_and_marked_behind_it",
    "`--init_from` continues a run with another encoding or context":
        "test_train.py::test_dropping_the_rotation_keeps_every_weight",
    "With `--pe learned` it is GPT-2": "test_checkpoint.py::test_a_nanogpt_checkpoint_is_the_same_network",
    "one pass over a long window scores every context length":
        "test_evaluation.py::test_one_pass_in_chunks_equals_scoring_each_prefix_separately",
    "an example of 15 lines": "test_project.py::test_the_example_of_contributing_is_an_encoding",
    "**Ctrl-C saves**": "test_device.py::test_a_signal_finishes_the_step_saves_and_says_how_to_go_on",
    "a full disk": "test_train.py::test_a_full_disk_keeps_the_checkpoint_before_and_says_so_at_the_end",
    "a diverging loss leaves the last good checkpoint":
        "test_train.py::test_a_diverging_run_stops_with_step_and_rate_and_keeps_the_last_good_checkpoint",
    "a resumed run ends with the same bits":
        "test_train.py::test_killed_twenty_times_and_resumed_a_run_ends_with_the_weights_of_an_undisturbed_one",
    "all encodings get the same batches, initial shared weights":
        "test_train.py::test_two_encodings_see_the_same_batches_and_start_from_the_same_shared_weights",
    "and scored tokens": "test_evaluation.py::test_the_loss_above_the_first_run_is_the_difference_on_the_same_tokens",
    "**Errors are one line** with cause and remedy": "test_project.py::test_a_mistake_gets_one_line_and_an_exit_code",
    "**Checkpoints execute nothing**": "test_checkpoint.py::test_a_checkpoint_is_read_without_executing_it",
}


@pytest.mark.parametrize("promise", PROMISES)
def test_what_the_readme_promises_stands_there_and_has_its_test(promise):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert promise in " ".join(readme.split())
    file, test = PROMISES[promise].split("::")
    assert f"\ndef {test}(" in (PROJECT / "tests" / file).read_text(encoding="utf-8")


def test_each_point_of_what_one_can_rely_on_is_among_the_promises():
    readme = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    _, *points = readme[readme.index("## What you can rely on"):readme.index("MIT license")].split(" - **")
    assert points and all(any(promise.strip("*") in point for promise in PROMISES) for point in points)
