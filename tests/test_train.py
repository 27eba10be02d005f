"""
A training run: what makes comparisons fair, the step, the log, checkpoints, resuming, starting from another run.

    python -m pytest tests/test_train.py
    python -m pytest tests/test_train.py -m slow          killed two hundred times
"""
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from common import device as common_device
from common import flags as common_flags
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from common.device import Device
from data.loader import open_dataset, token_tensor
from data.prepare import prepare
from model import GPT, PE
from tests.conftest import (
    TINY_FLAGS,
    assert_same_weights,
    continued,
    full_disk,
    log,
    log_without_seconds,
    processes,
    resumed,
    run,
    unwritable,
)

# --- fair comparison


def test_two_encodings_see_the_same_batches_and_start_from_the_same_shared_weights(dataset, tmp_path, monkeypatch):
    seen = {}
    for pe in PE:
        batches, start = [], {}

        def watched(self, idx, targets=None, cache=None, batches=batches, start=start, forward=GPT.forward):
            if not start:
                start.update({name: value.clone() for name, value in self.state_dict().items()})
            if self.training:
                batches.append((idx.clone(), targets.clone()))
            return forward(self, idx, targets, cache)

        with monkeypatch.context() as patch:
            patch.setattr(GPT, "forward", watched)
            # another interval of evaluation and accumulation, which must not change what is read
            more = ["--eval_interval", "2"] if pe == "hope" else []
            run(dataset, tmp_path / pe, "--pe", pe, "--max_iters", "3", *more)
        seen[pe] = batches, start
    batches, start = seen["nope"]
    assert len(batches) == 3 and not torch.equal(batches[0][0], batches[1][0])
    for pe, (other_batches, other_start) in seen.items():
        assert all(torch.equal(a, b) for one, other in zip(batches, other_batches) for a, b in zip(one, other)), pe
        assert all(torch.equal(start[name], other_start[name]) for name in start), pe


# --- a step


def test_accumulated_small_batches_give_the_step_of_one_large_batch(dataset, tmp_path, monkeypatch):
    """Offsets are drawn per forward, so the large batch is made of the small ones' draws."""
    flags = ["--optimizer", "adamw", "--learning_rate", "2e-3", "--max_iters", "1"]
    small = run(dataset, tmp_path / "small", *flags, "--gradient_accumulation_steps", "3")
    draw = train.training_batch

    def joined(ids, batch_size, block_size, seed, index, device):
        parts = [draw(ids, 4, block_size, seed, i, device) for i in range(3)]
        return tuple(torch.cat(part) for part in zip(*parts))

    monkeypatch.setattr(train, "training_batch", joined)
    large = run(dataset, tmp_path / "large", *flags, "--batch_size", "12")
    for name in small["model"]:
        # Adam's first step is lr * sign(gradient), nearly: where a gradient is a rounding error the sign may differ
        close = (small["model"][name] - large["model"][name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


def new_run(dataset, tmp_path, *flags, rank=0):
    """A Run that has not made a step, in the process of a rank."""
    network, config, _ = train.parse([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "none"), *flags])
    meta, ids = open_dataset(dataset)
    device = Device(config, training_width=network.n_embd)
    device.rank = rank
    ids = {name: token_tensor(part, device.torch_device) for name, part in ids.items()}
    return train.Run(replace(network, vocab_size=meta["vocab_size"]), config, meta, ids, device)


def gradient_norms(one_run):
    """Make a step -> norm of the gradient that the log reports, norm of the gradient that the optimizer receives."""
    received, update = [], one_run.optimizer.step

    def watched(*args, **options):
        gradients = [parameter.grad.flatten() for parameter in one_run.model.parameters()]
        received.append(torch.cat(gradients).norm().item())
        return update(*args, **options)

    one_run.optimizer.step = watched
    one_run.step()
    return one_run.grad_norm.item(), received[0]


def test_the_gradient_is_clipped_to_grad_clip_and_0_means_no_limit(dataset, tmp_path):
    norms = {clip: gradient_norms(new_run(dataset, tmp_path, "--grad_clip", clip)) for clip in ("0", "1e-3", "1e9")}
    norm = norms["1e9"][1]
    assert norm > 0.1 and norms["1e9"] == norms["0"] == pytest.approx((norm, norm))
    assert norms["1e-3"] == pytest.approx((norm, 1e-3), rel=1e-3)  # the log reports the norm before clipping


def test_float16_clips_the_true_gradient_and_not_the_scaled_one(dataset, tmp_path):
    for clip in ("1e-3", "0"):
        flags = "--grad_clip", clip, "--dtype"
        exact, rounded = (gradient_norms(new_run(dataset, tmp_path, *flags, dtype)) for dtype in ("float32", "float16"))
        assert rounded == pytest.approx(exact, rel=0.02)


def test_each_process_draws_its_own_dropout_and_all_start_from_the_same_weights(dataset, tmp_path):
    for dropout, same in (("0.3", False), ("0", True)):
        runs = [new_run(dataset, tmp_path, "--dropout", dropout, rank=rank) for rank in (0, 1)]
        assert all(torch.equal(a, b) for a, b in zip(*(one.model.parameters() for one in runs)))
        losses, idx = [], torch.randint(50, (4, 16))
        for rank in (0, 1):
            one = new_run(dataset, tmp_path, "--dropout", dropout, rank=rank)  # its random state, just set
            losses.append(one.model(idx, idx)[1].item())
        assert (losses[0] == losses[1]) == same


@pytest.mark.parametrize("value, where", [(math.nan, "loss"), (1000.0, "loss"), (math.inf, "gradient"),
                                          (math.nan, "validation loss"), (1000.0, "validation loss")])
def test_a_diverging_run_stops_with_step_and_rate_and_keeps_the_last_good_checkpoint(
        dataset, tmp_path, monkeypatch, fails, value, where):
    """The weights before step 14 are good, those after it are bad: what is saved is what was judged."""
    forward, norm = GPT.forward, torch.nn.utils.clip_grad_norm_
    steps = []

    def diverging(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        steps.extend([1] * self.training)
        bad = len(steps) == 14 and where == ("loss" if self.training else "validation loss")
        return logits, loss + (value if bad else 0)

    monkeypatch.setattr(GPT, "forward", diverging)
    if where == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                            lambda *args: norm(*args) * (value if len(steps) == 14 else 1))
    evaluations = ["--eval_interval", "2"] if where == "validation loss" else ["--save_interval", "7"]
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "30",
                                *evaluations])
    saved = 12 if where == "validation loss" else 10
    assert code == 1 and "step 14" in lines[-1] and "learning rate" in lines[-1] and where in lines[-1]
    assert f"holds step {saved}" in lines[-1]
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["iter"] == saved and all(value.isfinite().all() for value in checkpoint["model"].values())
    assert all(math.isfinite(line["val_loss"] or 0) for line in log(tmp_path) if "val_loss" in line)  # null, not NaN


@pytest.mark.parametrize("factor, ends", [(2.9, True), (3.1, False)])
def test_a_loss_of_three_times_a_uniform_guess_counts_as_diverged_and_less_does_not(dataset, tmp_path, monkeypatch,
                                                                                     factor, ends):
    forward = GPT.forward

    def lossy(self, idx, targets=None, *args, **options):
        logits, loss = forward(self, idx, targets, *args, **options)
        return logits, loss * 0 + factor * math.log(self.config.vocab_size) if self.training else loss

    monkeypatch.setattr(GPT, "forward", lossy)
    if ends:
        assert run(dataset, tmp_path, "--max_iters", "2")["iter"] == 2
    else:
        with pytest.raises(RuntimeError, match="diverged"):
            run(dataset, tmp_path, "--max_iters", "2")


@pytest.mark.parametrize("n_overflows", [3, 100])
def test_gradients_that_overflow_in_float16_are_counted_and_end_the_run_if_none_does_not(dataset, tmp_path, monkeypatch,
                                                                                       capsys, n_overflows):
    """The derivative of a square root of 0 is infinite, while the loss stays as it is."""
    forward, calls = GPT.forward, []

    def overflowing(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        calls.extend([1] * self.training)
        return logits, loss + (0 * self.lm_head.weight.sum()).sqrt() if len(calls) <= n_overflows else loss

    monkeypatch.setattr(GPT, "forward", overflowing)
    flags = ["--dtype", "float16", "--max_iters", "30"]
    if n_overflows == 3:
        run(dataset, tmp_path, *flags)
        assert "in 3 of 30 steps the gradient overflowed" in capsys.readouterr().out
    else:
        with pytest.raises(RuntimeError, match="last 20 gradients overflowed.*--dtype float32.*still holds step 15"):
            run(dataset, tmp_path, *flags)
        assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 15


# --- the log and what is printed


def test_training_learns_and_the_log_has_a_line_per_evaluation(dataset, tmp_path):
    checkpoint = run(dataset, tmp_path, "--max_iters", "100", "--eval_interval", "25", "--learning_rate", "1e-2")
    lines = log(tmp_path)
    assert [line["iter"] for line in lines] == [0, 25, 50, 75, 100]
    assert abs(lines[0]["val_loss"] - math.log(99)) < 0.1 and lines[-1]["val_loss"] < 1.0
    assert lines[-1]["tokens"] == 100 * 4 * 16
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["val_loss"] == min(line["val_loss"] for line in lines) == checkpoint["best_val_loss"]
    assert "optimizer" not in best


def test_a_log_line_has_the_mean_training_loss_since_the_line_before(dataset, tmp_path):
    flags_of = ["--max_iters", "10", "--eval_interval", "6"]
    run(dataset, tmp_path / "each", *flags_of, "--log_interval", "1")
    run(dataset, tmp_path / "means", *flags_of, "--log_interval", "4")
    losses = {line["iter"]: line.get("train_loss") for line in log(tmp_path / "each")}
    assert list(losses) == [*range(11)] and losses[0] is None
    lines = log(tmp_path / "means")
    assert [(line["iter"], "val_loss" in line) for line in lines] == [(0, True), (4, False), (6, True), (8, False),
                                                                     (10, True)]
    for line, first in zip(lines[1:], (1, 5, 7, 9)):
        steps = range(first, line["iter"] + 1)
        assert line["train_loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps), rel=1e-5)
        assert line["tokens"] == line["iter"] * 4 * 16 and line["lr"] > 0 and line["grad_norm"] > 0


def test_if_there_is_no_terminal_each_line_of_the_log_is_printed_once(dataset, tmp_path, capsys):
    run(dataset, tmp_path, "--max_iters", "10", "--log_interval", "2")
    captured = capsys.readouterr()
    printed = [line for line in captured.out.splitlines() if line.startswith("step ")]
    logged = log(tmp_path)
    assert [line["iter"] for line in logged] == [0, 2, 4, 5, 6, 8, 10]
    for text, line in zip(printed, logged, strict=True):
        shown = re.fullmatch(r"step (\d+) of 10, (\d+) s: (.*)", text)
        losses = {name: f"{line[name]:.4f}" for name in ("train_loss", "val_loss") if name in line}
        assert int(shown[1]) == line["iter"] and abs(int(shown[2]) - line["seconds"]) <= 1
        assert dict(part.split() for part in shown[3].split(", ")) == losses
    assert captured.err == ""  # no progress bar in the file of a job


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_there_is_a_progress_bar_and_no_line_per_evaluation(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(dataset, tmp_path, "--max_iters", "10")
    assert "10/10" in sys.stderr.getvalue() and "step 10" not in sys.stdout.getvalue()


def test_what_is_piped_into_a_file_has_the_lines_although_the_terminal_has_the_bar(dataset, tmp_path, monkeypatch,
                                                                                   capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(dataset, tmp_path, "--max_iters", "10")
    assert "10/10" in sys.stderr.getvalue() and "step 10 " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_a_reader_that_leaves_or_a_disk_that_is_full_does_not_end_the_training(dataset, tmp_path, monkeypatch, capsys,
                                                                               kind):
    """As with `train.py | true`, `train.py > /dev/full` and `train.py >&-`. Each line fails, from the first one on."""
    monkeypatch.setattr(sys, "stdout", unwritable(kind))
    code = None
    try:
        common_flags.run(lambda: run(dataset, tmp_path, "--max_iters", "10"))
    except SystemExit as stopped:
        code = stopped.code
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 10
    assert code == (1 if kind == "full" else None) and ("No space left" in capsys.readouterr().err) == (kind == "full")


def test_the_seconds_in_the_log_include_those_before_a_resume(dataset, tmp_path, capsys):
    checkpoint = run(dataset, tmp_path, "--max_iters", "5")
    assert 0 < checkpoint["seconds"] < 100 and log(tmp_path)[-1]["seconds"] == pytest.approx(
        checkpoint["seconds"], abs=1)
    save_checkpoint(tmp_path / "ckpt.pt", {**checkpoint, "seconds": 5000.0})
    started = time.time()
    continued = resumed(tmp_path, "--max_iters", "10")
    elapsed = time.time() - started
    assert 5000 <= log(tmp_path)[-1]["seconds"] <= 5000 + elapsed + 0.01
    assert 5000 <= continued["seconds"] <= 5000 + elapsed
    assert f"{5000 / 60:.1f} minutes" in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    ("--pe hope --hope_cutoff 100", "this is NoPE"), ("--pe hope --hope_cutoff 0", "this is RoPE"),
    ("--pe prope --prope_fraction 1", "this is RoPE"), ("--pe hope", None), ("--pe rope", None)])
def test_an_encoding_that_its_setting_turns_into_another_one_is_named(dataset, tmp_path, capsys, given, words):
    run(dataset, tmp_path, "--max_iters", "1", *given.split())
    out = capsys.readouterr().out
    assert ("this is" in out) == (words is not None) and (words or "") in out


@pytest.mark.parametrize("content", ['{"loss": 3.2}\n', "epoch 1\nepoch 2\n", '{"iter": 7, "loss": 3.2}\n', "[]\n[]\n",
                                     '{"event": "start"}\n{"iter": 0}\n'])
def test_a_new_run_does_not_touch_a_log_that_is_not_its_own(dataset, tmp_path, fails, content):
    (tmp_path / "log.jsonl").write_text(content)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path), "--max_iters", "1"])
    assert code == 2 and len([line for line in lines if "error" in line]) == 1 and "log.jsonl" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == content


@pytest.mark.parametrize("content", ["", '{"iter": 0, "tok', '{"it', '{"iter": 0, "tokens": 0, "val_loss": 4.6}\n'])
def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(dataset, tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    run(dataset, tmp_path, "--max_iters", "5")
    assert [line["iter"] for line in log(tmp_path)] == [0, 5]


# --- checkpoints


@pytest.fixture
def known_validation_losses(monkeypatch):
    """Evaluations find these losses, one after the other."""
    losses, forward = [4.0, 3.0, 5.0, 3.0, 2.5, 6.0], GPT.forward

    def known(self, idx, *args, **options):
        logits, loss = forward(self, idx, *args, **options)
        return logits, loss if self.training else torch.tensor(losses.pop(0))

    monkeypatch.setattr(GPT, "forward", known)


def test_best_pt_is_written_when_the_validation_loss_is_lower_than_ever_and_only_then(
        dataset, tmp_path, written, known_validation_losses):
    def best_files():
        return [(step, loss) for name, step, loss in written if name == "best.pt"]

    run(dataset, tmp_path, "--eval_iters", "1", "--eval_interval", "2", "--max_iters", "6")  # 4, 3, 5, 3
    assert best_files() == [(0, 4.0), (2, 3.0)]
    assert resumed(tmp_path, "--max_iters", "10")["iter"] == 10  # 2.5, 6; from ckpt.pt: from best.pt there would be 4
    assert best_files() == [(0, 4.0), (2, 3.0), (8, 2.5)]
    best = load_checkpoint(tmp_path)
    assert (best["iter"], best["val_loss"]) == (8, 2.5)


def test_save_interval_and_save_minutes_save_between_evaluations(dataset, tmp_path, written):
    run(dataset, tmp_path / "a", "--max_iters", "7", "--save_interval", "3")
    assert [step for name, step, _ in written if name == "ckpt.pt"] == [0, 3, 5, 6, 7]
    written.clear()
    run(dataset, tmp_path / "b", "--max_iters", "4", "--save_minutes", "0", "--keep_every", "2")
    assert [step for name, step, _ in written if name == "ckpt.pt"] == [0, 1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "b" / "ckpt_000002.pt")["iter"] == 2


def fail_after(n, monkeypatch):
    """torch.save writes half of its n-th file and all later ones, then the disk is full."""
    calls, write = [], torch.save

    def failing(checkpoint, file):
        calls.append(checkpoint)
        if len(calls) >= n:
            file.write(b"half a checkpoint")
            full_disk()
        write(checkpoint, file)

    monkeypatch.setattr(torch, "save", failing)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so_at_the_end(dataset, tmp_path, monkeypatch, fails):
    with monkeypatch.context() as patch:
        fail_after(3, patch)                              # best.pt and ckpt.pt of step 0 are written, no more
        code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "full"),
                                    "--max_iters", "10"])
    assert code == 1 and "No space left" in lines[-1] and "error: " in lines[-1]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["best.pt", "ckpt.pt", "log.jsonl"]
    assert load_checkpoint(tmp_path / "full" / "ckpt.pt")["iter"] == 0
    assert resumed(tmp_path / "full", "--max_iters", "10")["iter"] == 10  # there is room again


def test_a_failed_save_on_the_way_is_a_warning_and_training_goes_on(dataset, tmp_path, monkeypatch, capsys):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "12")
    save, calls = train.save_checkpoint, []

    def failing_once(path, checkpoint):
        calls.append(path)
        if len(calls) in (3, 4):                          # those of step 5
            raise OSError("disk full")
        save(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", failing_once)
    assert_same_weights(whole, run(dataset, tmp_path / "full", "--max_iters", "12"))
    assert "disk full; training continues" in capsys.readouterr().out
    latest, best = (load_checkpoint(tmp_path / "full" / name) for name in ("ckpt.pt", "best.pt"))
    assert latest["best_val_loss"] == best["val_loss"] == best["best_val_loss"]  # of the file that is there
    assert log_without_seconds(tmp_path / "whole") == log_without_seconds(tmp_path / "full")


@pytest.mark.parametrize("failing", ["best.pt", "log.jsonl"])
def test_at_the_last_step_ckpt_pt_is_saved_even_if_another_file_fails_and_the_exit_code_is_1(
        dataset, tmp_path, monkeypatch, fails, failing):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "10")
    save, append = train.save_checkpoint, train.append_log

    def save_or_fail(path, checkpoint):
        (full_disk if path.name == failing and checkpoint["iter"] == 10 else save)(path, checkpoint)

    def append_or_fail(path, line):
        (full_disk if path.name == failing and line["iter"] == 10 else append)(path, line)

    monkeypatch.setattr(train, "save_checkpoint", save_or_fail)
    monkeypatch.setattr(train, "append_log", append_or_fail)
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "full"), "--max_iters",
                                "10"])
    assert code == 1 and "error: " in lines[-1] and "No space left" in lines[-1]
    assert_same_weights(whole, load_checkpoint(tmp_path / "full" / "ckpt.pt"))


def test_resuming_on_a_full_disk_keeps_the_log(finished_run, tmp_path, monkeypatch, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "20"])
    assert code == 1 and "No space left" in lines[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_file_that_cannot_be_written_does_not_count_as_written(dataset, tmp_path, monkeypatch):
    one_run = new_run(dataset, tmp_path)
    for _ in range(3):
        one_run.step()
    monkeypatch.setattr(train, "save_checkpoint", full_disk)
    one_run.evaluate()
    one_run.save()
    assert one_run.best_val_loss == math.inf and one_run.saved == 0 and "No space" in str(one_run.write_error)
    monkeypatch.setattr(train, "save_checkpoint", lambda path, checkpoint: None)
    one_run.evaluate()
    one_run.save()
    assert one_run.best_val_loss == one_run.val_loss and one_run.saved == 3


# --- resuming


@pytest.mark.parametrize("flags", [
    "--pe hope --optimizer muon", "--pe hope --optimizer adamw", "--pe learned --optimizer muon",
    "--pe learned --optimizer adamw", "--dtype float16", "--init_from RUN"])
def test_ten_steps_resumed_for_ten_more_give_the_weights_of_twenty(finished_run, dataset, tmp_path, flags):
    """float16 is the path of GPUs without bfloat16: the same code, gradient scaler included."""
    flags = [finished_run if flag == "RUN" else flag for flag in flags.split()]
    flags += ["--dropout", "0.2", "--lr_decay_iters", "20"]
    whole = run(dataset, tmp_path / "whole", *flags, "--max_iters", "20")
    run(dataset, tmp_path / "parts", *flags, "--max_iters", "10")
    assert_same_weights(whole, resumed(tmp_path / "parts", "--max_iters", "20"))
    assert log_without_seconds(tmp_path / "whole") == log_without_seconds(tmp_path / "parts")
    assert log(tmp_path / "whole")[-1]["val_loss"] < 4.4
    assert "float16" not in flags or whole["scaler"]["scale"] > 1


def test_a_run_goes_on_where_auto_means_another_number_format(dataset, tmp_path, monkeypatch):
    """Begun on a CPU, continued on a GPU without bfloat16, where the scaler starts anew; and back again."""
    run(dataset, tmp_path, "--max_iters", "4")
    for steps, dtype in (("8", torch.float16), ("12", torch.float32)):
        monkeypatch.setattr(common_device, "pick_dtype", lambda *_, dtype=dtype, **__: dtype)
        checkpoint = resumed(tmp_path, "--max_iters", steps)
        assert checkpoint["iter"] == int(steps) and bool(checkpoint["scaler"]) == (dtype == torch.float16)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("interval", ["3", "5"])
@pytest.mark.parametrize("killed_at", [1, 3, 4, 5, 7, 9, 10, 12])
def test_killed_anywhere_and_resumed_the_log_has_each_line_once(dataset, tmp_path, at_batch, killed_at, interval):
    """Lines every 3 or 5 steps, checkpoints every 4, evaluations every 10."""
    settings = ["--max_iters", "13", "--log_interval", interval, "--save_interval", "4", "--eval_interval", "10"]
    whole = run(dataset, tmp_path / "whole", *settings)

    def kill():
        raise Killed

    at_batch(killed_at, kill)
    with pytest.raises(Killed):
        run(dataset, tmp_path / "killed", *settings)
    assert_same_weights(whole, resumed(tmp_path / "killed"))
    assert log_without_seconds(tmp_path / "killed") == log_without_seconds(tmp_path / "whole")


def train_quietly(arguments):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(arguments)


def train_in_a_process(dataset, out_dir, *flags):
    """Start a run, or go on with the one in out_dir."""
    arguments = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), *flags]
    resume = ["--resume"] * (Path(out_dir) / "ckpt.pt").exists()
    process = processes.Process(target=train_quietly, args=(arguments + resume,))
    process.start()
    return process


def kill_and_resume(dataset, tmp_path, kills, save_interval, *flags):
    """Weights and log of a run that is killed so many times at random moments are those of an undisturbed one."""
    undisturbed = run(dataset, tmp_path / "whole", *flags)
    wait, path, killed_at = random.Random(0), tmp_path / "killed" / "ckpt.pt", []
    for _ in range(kills):
        before = path.stat().st_mtime_ns if path.exists() else None
        process = train_in_a_process(dataset, tmp_path / "killed", *flags, "--save_interval", save_interval)
        while not path.exists() or path.stat().st_mtime_ns == before:  # until it has saved something of its own
            assert process.exitcode is None, "the run ended before it could be killed: give it more steps"
            time.sleep(0.001)
        time.sleep(wait.uniform(0, 0.1))
        process.kill()
        process.join()
        killed_at.append(load_checkpoint(path)["iter"])   # whole, at whatever moment the kill came
    assert killed_at == sorted(killed_at) and len(set(killed_at)) > kills / 2
    process = train_in_a_process(dataset, tmp_path / "killed", *flags, "--save_interval", "1000000")
    process.join()
    assert process.exitcode == 0
    assert_same_weights(undisturbed, load_checkpoint(path))
    assert log_without_seconds(tmp_path / "whole") == log_without_seconds(tmp_path / "killed")


def test_killed_twenty_times_and_resumed_a_run_ends_with_the_weights_of_an_undisturbed_one(dataset, tmp_path):
    kill_and_resume(dataset, tmp_path, 20, "3", "--max_iters", "600", "--eval_interval", "50", "--dropout", "0.1")


@pytest.mark.slow
def test_killed_two_hundred_times(dataset, tmp_path):
    kill_and_resume(dataset, tmp_path, 200, "2", "--max_iters", "4000", "--eval_interval", "100")


COMPUTED = ["--learning_rate 1e-4", "--muon_learning_rate 1e-4", "--optimizer adamw", "--min_lr 1e-5", "--beta2 0.9",
            "--muon_momentum 0.8", "--weight_decay 0.3", "--warmup_iters 5", "--lr_decay_iters 99", "--grad_clip 0.7",
            "--batch_size 5", "--gradient_accumulation_steps 2", "--seed 2", "--dropout 0.1", "--dtype bfloat16",
            "--block_size 17", "--n_layer 3", "--no-bias", "--hope_cutoff 2", "--init_from elsewhere"]


@pytest.mark.parametrize("flag", COMPUTED)
def test_a_resumed_run_refuses_to_compute_something_else(finished_run, fails, flag):
    code, lines = fails(train, ["--resume", "--out_dir", finished_run, "--max_iters", "20", *flag.split()])
    name = flag.split()[0].replace("--no-", "--")
    assert code == 2 and len(lines) == 1 and f"{name} was " in lines[0], lines


def test_resume_may_evaluate_more_often_and_says_when_the_schedule_is_over(finished_run, dataset, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    resumed(tmp_path / "run", "--max_iters", "14", "--eval_interval", "2")
    assert [line["iter"] for line in log(tmp_path / "run")] == [0, 5, 10, 12, 14]
    assert "the schedule ends at step 10, so from there on" in capsys.readouterr().out


@pytest.mark.parametrize("given", [("--max_iters", "8"), ("--eval_interval", "4"), ("--log_interval", "8")])
def test_a_run_that_was_stopped_between_evaluations_may_evaluate_as_soon_as_it_is_resumed(
        dataset, tmp_path, at_batch, given):
    at_batch(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(dataset, tmp_path, "--max_iters", "10")
    last = resumed(tmp_path, *given)["iter"]
    assert last == (8 if "--max_iters" in given else 10)
    assert {line["iter"]: line for line in log(tmp_path)}[last]["train_loss"] > 0


@pytest.mark.parametrize("factor, noted", [("1", True), ("2", False)])
def test_a_scaling_by_1_is_noted(dataset, tmp_path, capsys, factor, noted):
    run(dataset, tmp_path, "--max_iters", "1", "--rope_scaling", "yarn", "--rope_factor", factor)
    assert ("--rope_scaling scales nothing" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("steps, noted", [(["--max_iters", "12"], True), ([], False)])
def test_a_run_that_is_stopped_before_its_schedule_ends_and_goes_further_is_told_where_it_ends(
        dataset, tmp_path, capsys, at_batch, steps, noted):
    at_batch(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(dataset, tmp_path, "--max_iters", "10")
    capsys.readouterr()
    resumed(tmp_path, *steps)
    assert ("the schedule ends at step 10, so from there on" in capsys.readouterr().out) == noted


def test_another_number_of_threads_is_noted_when_a_run_is_resumed(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    resumed(tmp_path / "run", "--max_iters", "11")
    assert "threads before" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        assert resumed(tmp_path / "run", "--max_iters", "12")["threads"] == 2
    finally:
        torch.set_num_threads(1)
    assert "1 threads before, 2 now" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["from elsewhere", "set"])
def test_a_run_finds_its_data_set_from_any_folder(dataset, tmp_path, monkeypatch, name):
    """Named relative to the folder where the training was started; old checkpoints hold such names, too."""
    shutil.copytree(dataset, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    checkpoint = run(name, tmp_path / "run", "--max_iters", "2")
    assert checkpoint["dataset"]["path"] == checkpoint["args"]["dataset"] == str(tmp_path / name)
    monkeypatch.chdir("/")
    assert resumed(tmp_path / "run", "--max_iters", "3")["iter"] == 3
    old = {**checkpoint, "dataset": {**checkpoint["dataset"], "path": name}, "args": {**checkpoint["args"],
                                                                                      "dataset": name}}
    save_checkpoint(tmp_path / "run" / "ckpt.pt", old)
    monkeypatch.chdir(tmp_path)
    assert resumed(tmp_path / "run", "--max_iters", "3")["dataset"]["path"] == str(tmp_path / name)


def test_the_project_s_own_data_sets_are_named_relative_to_it_so_that_it_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("data/novel", "novel", str(common_flags.PROJECT / "data" / "novel")):
        assert train.parse(["--dataset", given])[1].dataset == str(Path("data", "novel"))


def test_weights_are_judged_before_they_are_saved_between_evaluations_too(dataset, tmp_path, fails):
    """The loss of step 1 is good, and the weights after it are bad: they are kept out of ckpt.pt."""
    for when in ("--save_interval", "--eval_interval", "--keep_every"):
        out_dir = tmp_path / when
        code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), "--max_iters", "8",
                                    "--warmup_iters", "0", "--optimizer", "adamw", "--learning_rate", "50", when, "1"])
        assert code == 1 and "diverged" in lines[-1] and "at step 1," in lines[-1] and "holds step 0" in lines[-1]
        assert load_checkpoint(out_dir / "ckpt.pt")["iter"] == 0 and not list(out_dir.glob("ckpt_*.pt"))


def test_the_command_that_continues_a_stopped_run_can_be_pasted_from_where_it_was_printed(dataset, tmp_path, capsys,
                                                                                          at_batch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at_batch(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(dataset, "a folder's name", "--max_iters", "6")
    [command] = re.findall("continue with: (.*)", capsys.readouterr().out)
    python, script, *arguments = shlex.split(command)
    assert Path(script).samefile(train.__file__) and shutil.which(python)
    train.main(arguments)
    assert load_checkpoint(Path("a folder's name", "ckpt.pt"))["iter"] == 6


# --- a folder may hold any of a run's files


@pytest.mark.parametrize("step", [0, 10])
@pytest.mark.parametrize("names", [names for n in range(4) for names in itertools.combinations(
    ("ckpt.pt", "best.pt", "log.jsonl"), n)], ids=" ".join)
def test_for_any_of_its_files_a_run_can_be_started_or_continued_or_says_how(dataset, tmp_path, names, step):
    """Each command that is printed is run, until one works; no file with a step more than 0 is replaced."""
    folder = tmp_path / "run"
    run(dataset, folder, "--max_iters", "10", *(["--eval_interval", "99"] if not step else []))
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    if not step and "best.pt" in names:
        save_checkpoint(folder / "best.pt", {**load_checkpoint(folder / "best.pt"), "iter": 0})
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    start = [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(folder)]
    for command in (start, ["--resume", "--out_dir", str(folder)]):
        at_once = command is start and not step and "ckpt.pt" not in names  # there is nothing to lose
        for _ in range(3):  # commands that lead to each other
            try:
                train.main([*command, "--max_iters", "10"])
                break
            except (ValueError, FileNotFoundError) as error:
                assert not at_once, error
                if "add --resume" in str(error):
                    command = ["--resume", "--out_dir", str(folder)]
                else:
                    [printed] = re.findall("`(.*)`", str(error))
                    command = [*shlex.split(printed)[2:], "--dataset", dataset, *TINY_FLAGS]
        else:
            pytest.fail(f"{names}: no command works")
        if step and "ckpt.pt" not in names:
            now = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            assert set(kept.values()) <= set(now.values())
        for path in tmp_path.glob("run*"):
            shutil.rmtree(path)
        folder.mkdir()
        for name, content in kept.items():
            (folder / name).write_bytes(content)


def test_a_moved_data_set_can_be_named_at_resume_but_not_another_tokenizers_or_a_changed_text(
        finished_run, dataset, tmp_path, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "moved")
    resumed(tmp_path / "run", "--max_iters", "12", "--dataset", str(tmp_path / "moved"))
    path = tmp_path / "moved" / "meta.json"
    meta = json.loads(path.read_text())
    other_characters = {**meta["tokenizer"], "chars": meta["tokenizer"]["chars"][::-1]}
    for change, words in (({"tokenizer": other_characters}, "tokenizer"), ({"sha256": "0" * 64}, "sha256")):
        path.write_text(json.dumps({**meta, **change}))
        code, lines = fails(train, ["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "14"])
        assert code == 2 and words in lines[0]


def test_if_best_pt_is_gone_the_best_of_what_follows_takes_its_place(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    lowest = {**load_checkpoint(tmp_path / "run" / "ckpt.pt"), "best_val_loss": 0.001}
    save_checkpoint(tmp_path / "run" / "ckpt.pt", lowest)
    checkpoint = resumed(tmp_path / "run", "--max_iters", "12", "--eval_interval", "2")
    assert load_checkpoint(tmp_path / "run" / "best.pt")["val_loss"] == checkpoint["best_val_loss"] > 1


# --- starting from another run


def test_a_run_that_starts_from_another_has_its_weights_and_a_new_schedule(finished_run, dataset, tmp_path, capsys):
    best = load_checkpoint(finished_run)
    checkpoint = continued(finished_run, dataset, tmp_path / "next", "--eval_interval", "5")
    assert checkpoint["config"] == best["config"] and checkpoint["iter"] == 5
    assert log(tmp_path / "next")[0]["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)
    assert log(tmp_path / "next")[0]["iter"] == 0 and checkpoint["args"]["lr_decay_iters"] == 5
    out = capsys.readouterr().out
    assert f"{len(best['model'])} tensors from {finished_run}; new: none; left out: none" in out


def test_dropping_the_rotation_keeps_every_weight(finished_run, dataset, tmp_path):
    checkpoint = continued(finished_run, dataset, tmp_path / "drope", "--pe", "nope")
    assert checkpoint["config"]["pe"] == "nope"
    assert checkpoint["model"].keys() == load_checkpoint(finished_run)["model"].keys()


def test_what_only_the_new_encoding_has_is_initialised_and_named(finished_run, dataset, tmp_path, capsys):
    continued(finished_run, dataset, tmp_path / "t5", "--pe", "t5")
    assert "new: transformer.wpe.table; left out: none" in capsys.readouterr().out
    continued(tmp_path / "t5", dataset, tmp_path / "back", "--pe", "rope")
    assert "left out: transformer.wpe.table" in capsys.readouterr().out


def test_a_longer_context_with_scaling_rotates_as_the_checkpoint_does_where_it_was_trained(finished_run, dataset,
                                                                                            tmp_path):
    checkpoint = continued(finished_run, dataset, tmp_path / "pi", "--pe", "rope", "--block_size", "64",
                           "--rope_scaling", "pi", "--rope_factor", "4")
    assert checkpoint["config"]["rope_context"] == 16
    theta = load_model(finished_run, pe="rope").transformer.wpe.theta
    assert torch.equal(load_model(checkpoint).transformer.wpe.theta, (theta.double() / 4).float())


def test_a_nanogpt_checkpoint_can_be_continued_on_a_text_of_as_many_characters_and_says_so(dataset, tmp_path, capsys):
    old = run(dataset, tmp_path / "learned", "--pe", "learned", "--max_iters", "5")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": old["model"], "model_args": {name: old["config"][name] for name in names}, "iter_num": 5,
                "config": {}}, tmp_path / "nanogpt.pt")
    capsys.readouterr()
    continued(tmp_path / "nanogpt.pt", dataset, tmp_path / "next")
    assert "does not say what its 99 tokens are" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("another text of other letters\n" * 200)
    other = prepare(str(tmp_path / "text.txt"), "char", tmp_path / "other", charset="auto")
    with pytest.raises(ValueError, match="vocabulary"):
        continued(tmp_path / "nanogpt.pt", str(other), tmp_path / "more")
