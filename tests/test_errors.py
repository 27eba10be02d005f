"""
What a newcomer can do wrong gets one line that names the cause and the remedy, and an exit code; never a traceback.

    python -m pytest tests/test_errors.py
"""
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import data.prepare
import eval_extrapolation
import sample
import train
from common.checkpoint import load_checkpoint, save_checkpoint
from experiments import bench, draw_encodings
from model import GPT, GPTConfig

# script, arguments ({run}, {data}, {tmp} are filled in), exit code, words of the message
MISTAKES = [
    (train, ["--pe", "rotary"], 2, "nope"),
    (train, ["--block-size", "64"], 2, "--block_size"),
    (train, ["--layers", "3"], 2, "--n_layer"),
    (train, ["--max_iters", "many"], 2, "whole number"),
    (train, ["--max_iters", "0"], 2, "at least 1"),
    (train, ["--learning_rate", "nan"], 2, "number"),
    (train, ["--rope_base", "inf"], 2, "finite number"),
    (train, ["--dropout", "1.5"], 2, "below 1"),
    (train, ["@{tmp}/none"], 2, "none"),
    (train, ["--dataset", "{tmp}/none"], 2, "data.prepare"),
    (train, ["--dataset", "{data}", "--block_size", "1000000"], 2, "smaller --block_size"),
    (train, ["--dataset", "{data}", "--n_embd", "33", "--n_head", "2"], 2, "divisible"),
    (train, ["--dataset", "{data}", "--n_embd", "30", "--n_head", "2", "--pe", "hope"], 2, "odd"),
    (train, ["--dataset", "{data}", "--n_embd", "33", "--n_head", "1", "--pe", "sinusoidal"], 2, "even"),
    (train, ["--dataset", "{data}", "--rope_base", "0.5"], 2, "above 1"),
    (train, ["--dataset", "{data}", "--device", "gpu"], 2, "--device cpu"),
    (train, ["--resume", "--out_dir", "{tmp}/none"], 2, "no checkpoint"),
    (train, ["--resume", "--out_dir", "{run}", "--pe", "rope"], 2, "--pe was hope and is now rope"),
    (train, ["--resume", "--out_dir", "{run}", "--max_iters", "5"], 2, "10 steps"),
    (train, ["--out_dir", "{run}"], 2, "--resume"),
    (sample, ["--out_dir", "{tmp}/none"], 2, "no checkpoint"),
    (sample, ["--out_dir", "{tmp}/torn"], 2, "damaged"),
    (sample, ["--out_dir", "{run}", "--start", ""], 2, "empty"),
    (sample, ["--out_dir", "{run}", "--start", "FILE:{tmp}/empty.txt"], 2, "empty"),
    (sample, ["--out_dir", "{run}", "--start", "FILE:{tmp}/none"], 2, "none"),
    (sample, ["--out_dir", "{run}", "--temperature", "0"], 2, "at least"),
    (sample, ["--out_dir", "{run}", "--rope_factor", "0.5"], 2, "at least 1"),
    (eval_extrapolation, [], 2, "OUT_DIR"),
    (eval_extrapolation, ["{run}", "--rope_scaling", "linear"], 2, "yarn"),
    (eval_extrapolation, ["{tmp}/none"], 2, "no checkpoint"),
    (eval_extrapolation, ["{run}", "--windows", "0"], 2, "at least 1"),
    (eval_extrapolation, ["{run}", "--max_factor", "10000"], 2, "lower --max_factor"),
    (eval_extrapolation, ["{run}", "--text", "{tmp}/short.txt"], 2, "longer texts"),
    (eval_extrapolation, ["{run}", "--text", "{tmp}/none"], 2, "none"),
    (eval_extrapolation, ["{run}", "--dataset", "{tmp}/none"], 2, "data.prepare"),
    (eval_extrapolation, ["{run}", "--json", "{tmp}/none/r.json"], 2, "folder"),
    (eval_extrapolation, ["{run}", "--json", "{tmp}"], 2, "not a file"),
    (eval_extrapolation, ["{run}", "--plot", "{tmp}/r.docx"], 2, ".png"),
    (eval_extrapolation, ["{run}", "--text", ""], 2, "empty"),
    (eval_extrapolation, ["{run}", "--text", "{tmp}"], 2, "directory"),
    (draw_encodings, ["{run}", "--plot", "{tmp}/none/r.png"], 2, "folder"),
    (bench, ["speed"], 2, "memory"),
    (bench, ["train", "--json", "{tmp}"], 2, "not a file"),
    (data.prepare, ["--source", "{tmp}/none"], 2, "pysrc"),
    (data.prepare, ["--source", "{tmp}/empty.txt"], 2, "no text"),
    (data.prepare, ["--source", "{tmp}/binary"], 2, "binary"),
    (data.prepare, ["--source", "{tmp}/latin1.txt"], 2, "iconv"),
    (data.prepare, ["--source", "{tmp}/short.txt", "--out_dir", "{tmp}"], 2, "no data set"),
    (data.prepare, ["--tokenizer", "words"], 2, "char"),
    (data.prepare, ["--source", "{tmp}/short.txt", "--out_dir", "{tmp}/set"], 2, "add more text"),
    (data.prepare, ["--source", "{tmp}/utf16.txt"], 2, "iconv -f utf-16"),
    (data.prepare, ["--source", "{tmp}/*.none"], 2, "pysrc"),
    (data.prepare, ["--source", "{tmp}/nothing"], 2, "no text"),
    (data.prepare, ["--vocab_size", "256"], 2, "at least 257"),
    (data.prepare, ["--charset", "utf8"], 2, "auto"),
    (data.prepare, ["--documents", "0"], 2, "at least 1"),
]


@pytest.mark.parametrize("script, arguments, code, words", MISTAKES,
                         ids=[f"{script.__name__} {' '.join(arguments)}" for script, arguments, *_ in MISTAKES])
def test_a_mistake_gets_one_line_and_an_exit_code(script, arguments, code, words,
                                                  finished_run, dataset, tmp_path, fails):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / "utf16.txt").write_text("text of Windows", encoding="utf-16")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "torn").write_bytes(Path(finished_run, "ckpt.pt").read_bytes()[:1000])
    before = {path: path.read_bytes() for path in [*Path(finished_run).iterdir(), *tmp_path.rglob("*.*")]}
    arguments = [text.format(run=finished_run, data=dataset, tmp=tmp_path) for text in arguments]
    if script is train and "--out_dir" not in arguments:
        arguments += ["--out_dir", str(tmp_path / "out")]

    found_code, lines = fails(script, arguments)

    assert found_code == code
    assert len(lines) == 1 and "error: " in lines[0] and words in lines[0], lines
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_time_failure_is_one_line_and_exit_code_1(finished_run, monkeypatch, fails):
    monkeypatch.setattr(GPT, "stream", lambda *_: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    assert fails(sample, ["--out_dir", finished_run]) == (1, ["sample.py: error: out of memory"])


def test_a_missing_matplotlib_is_said_before_anything_is_computed(finished_run, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, lines = fails(eval_extrapolation, [finished_run, "--plot", str(tmp_path / "r.png")])
    assert code == 1 and len(lines) == 1 and "pip install matplotlib" in lines[0]


def test_a_text_changed_since_the_run_is_refused(finished_run, dataset, tmp_path, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "data")
    meta = tmp_path / "data" / "meta.json"
    meta.write_text(meta.read_text().replace('"sha256": "', '"sha256": "0'))
    checkpoint = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    checkpoint["args"]["dataset"] = str(tmp_path / "data")
    save_checkpoint(tmp_path / "run" / "ckpt.pt", checkpoint)
    code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "20"])
    assert code == 2 and "sha256" in lines[0]


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


def test_every_number_that_can_be_given_has_the_limits_that_it_should_have():
    limited = {knob.name for config in (GPTConfig, train.TrainConfig) for knob in fields(config)
               if knob.metadata["limits"] and "one_of" not in knob.metadata["limits"]}
    assert LIMITS.keys() <= limited  # one that you have added need not be in the table
    for name, values in LIMITS.items():
        for i, value in enumerate(values.split()):
            argv = ["--n_head", "1", "--pe", "nope", f"--{name}={value}"]
            if i % 2 == 0:
                network, config, _ = train.parse(argv)
                assert float(getattr(network, name, getattr(config, name, None))) == float(value)
            else:
                with pytest.raises((SystemExit, ValueError)):
                    train.parse(argv)


@pytest.mark.parametrize("script, limits", [
    (sample, {"num_samples": "1 0", "max_new_tokens": "1 0", "temperature": "0.01 0", "top_k": "1 0",
              "seed": f"0 -1 {2**32} {2**32 + 1}", "rope_factor": "1 0.9"}),
    (eval_extrapolation, {"max_factor": f"1 0 {2**16} {2**16 + 1}", "windows": "1 0", "batch_size": "1 0",
                          "chunk": "1 0", "rope_factor": "1 0.9"})])
def test_numbers_beyond_a_limit_are_refused_before_anything_is_read(fails, tmp_path, script, limits):
    out_dir = ["--out_dir", str(tmp_path / "none")] if script is sample else [str(tmp_path / "none")]
    for name, values in limits.items():
        for i, value in enumerate(values.split()):
            _, lines = fails(script, [*out_dir, f"--{name}={value}"])
            assert ("no checkpoint" in lines[-1]) == (i % 2 == 0), (name, value)


def test_the_defaults_that_the_documented_numbers_were_made_with(capsys):
    text = {}
    for script in (sample, eval_extrapolation):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        text[script] = " ".join(capsys.readouterr().out.split())
    for script, defaults in ((eval_extrapolation, {"max_factor": 16, "windows": 32, "chunk": 128}),
                             (sample, {"num_samples": 1, "max_new_tokens": 500, "temperature": 0.8, "seed": 1})):
        for name, value in defaults.items():
            assert re.search(rf"--{name} {name.upper()} [^()]*\(default: {value}\)", text[script]), name


def test_help_lists_every_flag_with_a_word_on_each(capsys):
    for script in (train, sample, eval_extrapolation, data.prepare):
        with pytest.raises(SystemExit) as stopped:
            script.main(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "usage" in text and "None" not in text


def test_every_field_of_the_configurations_is_a_flag_of_train_or_comes_with_the_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    names = {knob.name for config in (GPTConfig, train.TrainConfig) for knob in fields(config)}
    assert {name for name in names if f"--{name} " not in text} == {"vocab_size", "attn_scaling"}
