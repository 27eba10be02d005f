"""
A training run: fair comparison, the step, the log, checkpoints, kills, resuming, starting from
another run.
"""
import copy
import errno
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from common import device as common_device
from common.checkpoint import load_checkpoint, load_model
from common.device import Device
from common.optimizer import learning_rate_at
from data.loader import open_dataset, token_tensor, training_batch, validation_batches
from model import GPT, PE
from tests.conftest import (
    TINY_FLAGS,
    assert_same_run,
    assert_same_weights,
    byte_tokenizer,
    continued,
    log,
    processes,
    resumed,
    run,
)


def new_run(dataset, out_dir, *flags):
    """A Run that has not made a step."""
    network, config, _ = train.parse([*TINY_FLAGS, "--dataset", dataset,
                                      "--out_dir", str(out_dir), *flags])
    meta, ids = open_dataset(dataset)
    device = Device(config, training_width=network.n_embd)
    ids = {name: token_tensor(part, device.torch_device) for name, part in ids.items()}
    return train.Run(replace(network, vocab_size=meta["vocab_size"]), config, meta, ids, device)


def restarted(dataset, out_dir, *flags):
    """Start a run, or continue the one in out_dir."""
    resume = ["--resume"] * (Path(out_dir) / "ckpt.pt").exists()
    train.main([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), *flags, *resume])


@pytest.fixture
def measured(monkeypatch):
    """A list of losses: what evaluations of one batch give, one after the other."""
    forward, losses = GPT.forward, []

    def known(self, *args):
        logits, loss = forward(self, *args)
        return logits, loss if self.training else torch.tensor(losses.pop(0))

    monkeypatch.setattr(GPT, "forward", known)
    return losses


@pytest.fixture
def clock(monkeypatch):
    """A list with the time, by which a step takes 25 seconds."""
    now, draw = [1000.0], train.training_batch

    def slow(*args):
        now[0] += 25
        return draw(*args)

    monkeypatch.setattr(train, "training_batch", slow)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


# --- fair comparison


def what_a_run_reads(dataset, out_dir, monkeypatch, *flags):
    """-> the weights before the first step, the batches of three steps."""
    batches, start, forward = [], {}, GPT.forward

    def watched(self, idx, targets=None, **options):
        if not start:
            start.update({name: value.clone() for name, value in self.state_dict().items()})
        if self.training:
            batches.append(torch.stack([idx, targets]))
        return forward(self, idx, targets, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", watched)
        run(dataset, out_dir, "--max_iters", "3", *flags)
    return start, batches


def test_all_encodings_see_the_same_batches_and_start_from_the_same_shared_weights(
        dataset, tmp_path, monkeypatch):
    start, batches = what_a_run_reads(dataset, tmp_path / "nope", monkeypatch, "--pe", "nope")
    assert len(batches) == 3 and not torch.equal(batches[0], batches[1])
    for pe in [name for name in PE if name != "nope"]:
        other_start, other_batches = what_a_run_reads(  # evaluations change nothing either
            dataset, tmp_path / pe, monkeypatch, "--pe", pe, "--eval_interval", "2")
        assert all(torch.equal(a, b) for a, b in zip(batches, other_batches, strict=True)), pe
        assert all(torch.equal(start[name], other_start[name]) for name in start), pe
    other_start, others = what_a_run_reads(dataset, tmp_path / "2", monkeypatch, "--seed", "2")
    assert not any(torch.equal(a, b) for a, b in zip(batches, others))
    assert not torch.equal(start["lm_head.weight"], other_start["lm_head.weight"])


# --- a step


@pytest.mark.parametrize("clip", [0, 0.3])
@pytest.mark.parametrize("dtype, least, most", [("float32", 0, 1e-5), ("bfloat16", 1e-3, 0.05),
                                                ("float16", 1e-4, 0.01)])
def test_a_step_gives_the_optimizers_the_clipped_gradient_of_the_mean_loss_of_all_micro_batches(
        dataset, tmp_path, dtype, least, most, clip):
    """Against one large batch in float32, from which the products are off by their rounding."""
    one = new_run(dataset, tmp_path, "--gradient_accumulation_steps", "3", "--dtype", dtype,
                  "--grad_clip", str(clip))
    received = {}
    for optimizer in one.optimizers:
        optimizer.register_step_pre_hook(lambda optimizer, *_: received.update(
            (p, p.grad.clone()) for group in optimizer.param_groups for p in group["params"]))
    for step in range(3):
        model = copy.deepcopy(one.model)  # the weights before the step
        one.step()
        batches = [training_batch(one.ids["train"], 4, 16, 1, 3 * step + i, torch.device("cpu"))
                   for i in range(3)]
        x, y = (torch.cat(part) for part in zip(*batches))
        _, loss = model(x, y)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        norm = gradient.norm().item()
        clipped = gradient * (clip / norm if clip else 1)
        ours = torch.cat([received[p].flatten() for p in one.model.parameters()])
        assert least <= (ours - clipped).norm() / clipped.norm() < most
        assert one.train_loss.item() == pytest.approx(loss.item(), rel=most)
        assert one.grad_norm.item() == pytest.approx(norm, rel=most)  # before clipping
        assert one.scaler.is_enabled() == (dtype == "float16")
        assert one.lr == learning_rate_at(step, one.config)
        assert not any(map(torch.equal, model.parameters(), one.model.parameters()))


@pytest.mark.parametrize("clip", ["0", "1"])
def test_a_gradient_that_overflows_in_float16_changes_no_weight_and_halves_the_scale(
        dataset, tmp_path, monkeypatch, clip):
    """The derivative of a square root of 0 is infinite, while the loss stays as it is. It is in the
    embedding, which is not Muon's."""
    one = new_run(dataset, tmp_path, "--dtype", "float16", "--grad_clip", clip)
    one.step()
    forward, scale, before = GPT.forward, one.scaler.get_scale(), copy.deepcopy(one.model)

    def overflowing(self, *args):
        logits, loss = forward(self, *args)
        return logits, loss + (0 * self.lm_head.weight.sum()).sqrt()

    monkeypatch.setattr(GPT, "forward", overflowing)
    one.step()
    assert all(map(torch.equal, before.parameters(), one.model.parameters()))
    assert one.scaler.get_scale() == scale / 2 and one.iter == 2


def test_dropout_depends_on_seed_step_and_process_alone(dataset, tmp_path, monkeypatch):
    batch = torch.randint(99, (2, 4, 16))
    monkeypatch.setattr(train, "training_batch", lambda *_: batch)

    def loss(seed=1, step=0, rank=0, drawn_before=0):
        one = new_run(dataset, tmp_path, "--dropout", "0.3", "--gradient_accumulation_steps", "2")
        one.config.seed, one.iter, one.device.rank = seed, step, rank
        one.device.n_processes, one.device.sum = 2, lambda tensors: None  # one micro-batch each
        torch.rand(drawn_before)
        one.step()
        return one.train_loss.item()

    assert loss() == loss(drawn_before=7)
    assert len({loss(), loss(seed=2), loss(step=1), loss(rank=1)}) == 4


def test_compile_trains_the_compiled_model(dataset, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile",
                        lambda model: lambda *args: calls.append(1) or model(*args))
    run(dataset, tmp_path, "--max_iters", "3", "--compile")
    assert len(calls) == 3


# --- divergence


GOOD, BAD = 2.9 * math.log(99), 3.1 * math.log(99)  # a uniform guess costs ln 99


@pytest.mark.parametrize("train_loss, val_loss, saved", [
    (GOOD, None, True), (BAD, None, False), (math.nan, None, False),
    (BAD, GOOD, True), (GOOD, BAD, False), (GOOD, math.nan, False)])
def test_weights_are_judged_before_they_are_saved_by_their_validation_loss_if_they_have_one(
        dataset, tmp_path, train_loss, val_loss, saved):
    one = new_run(dataset, tmp_path)
    one.train_loss, one.val_loss = torch.tensor(train_loss), val_loss
    one.evaluated = -1 if val_loss is None else one.iter
    with nullcontext() if saved else pytest.raises(RuntimeError, match="diverged"):
        one.save()
    assert (tmp_path / "ckpt.pt").exists() == saved


def test_a_diverging_run_ends_with_an_error_and_keeps_the_last_good_checkpoint(
        dataset, tmp_path, measured, fails):
    measured[:] = [4.0, 3.0, 3.0, math.nan]
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path),
                                "--eval_interval", "2", "--eval_iters", "1"])
    assert code == 1 and "diverged" in lines[-1] and "step 6" in lines[-1]
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 4
    assert log(tmp_path)[-1]["iter"] == 6 and log(tmp_path)[-1]["val_loss"] is None  # no NaN


# --- the log


def test_training_learns_from_the_tokens_that_the_log_counts(dataset, tmp_path):
    run(dataset, tmp_path, "--max_iters", "100", "--eval_interval", "50", "--learning_rate", "1e-2")
    lines = log(tmp_path)
    assert abs(lines[0]["val_loss"] - math.log(99)) < 0.1 and lines[-1]["val_loss"] < 1.0
    assert [line["tokens"] for line in lines] == [0, 50 * 4 * 16, 100 * 4 * 16]


def test_the_validation_loss_is_the_mean_over_all_batches_without_dropout(dataset, tmp_path):
    one = new_run(dataset, tmp_path, "--dropout", "0.5", "--eval_iters", "3", "--dtype", "bfloat16")
    one.evaluate()
    assert one.model.training
    one.model.eval()
    with one.device.autocast():
        losses = [one.model(x, y)[1].item() for x, y in validation_batches(
            one.ids["val"], 4, 16, 3, torch.device("cpu"))]
    assert one.val_loss == sum(losses) / 3


def test_a_log_line_has_the_mean_training_loss_since_the_line_before(dataset, tmp_path):
    given = ["--max_iters", "10", "--eval_interval", "6"]
    run(dataset, tmp_path / "each", *given, "--log_interval", "1")
    run(dataset, tmp_path / "means", *given, "--log_interval", "4")
    losses = {line["iter"]: line.get("train_loss") for line in log(tmp_path / "each")}
    assert list(losses) == [*range(11)] and losses[0] is None
    lines = log(tmp_path / "means")
    assert [(line["iter"], "val_loss" in line) for line in lines] == [
        (0, True), (4, False), (6, True), (8, False), (10, True)]
    for line, first in zip(lines[1:], (1, 5, 7, 9)):
        since = [losses[step] for step in range(first, line["iter"] + 1)]
        assert line["train_loss"] == pytest.approx(sum(since) / len(since), rel=1e-5)
        assert line["lr"] > 0 and line["grad_norm"] > 0


def test_samples_are_logged_and_printed_and_change_no_bit_of_the_run(dataset, tmp_path, capsys):
    given = ["--max_iters", "10", "--dropout", "0.3"]
    silent = run(dataset, tmp_path / "silent", *given)
    assert not any("sample" in line for line in log(tmp_path / "silent"))
    capsys.readouterr()
    torch.manual_seed(5)
    assert_same_weights(silent, run(dataset, tmp_path / "talking", *given, "--sample_chars", "30"))
    printed = capsys.readouterr().out.splitlines()
    for line in log(tmp_path / "talking"):
        assert len(line["sample"]) == 30
        at = next(i for i, text in enumerate(printed) if text.startswith(f"step {line['iter']} of"))
        assert printed[at + 1] == f"    {line['sample']!r}"
    one = new_run(dataset, tmp_path / "new", "--dropout", "0.5", "--sample_chars", "4")
    torch.manual_seed(7)
    one.sample()
    assert torch.initial_seed() == 7 and one.model.training


def test_a_sample_of_byte_pairs_is_cut_to_its_characters(dataset, tmp_path, monkeypatch):
    one = new_run(dataset, tmp_path, "--sample_chars", "3")
    one.tokenizer, idx = byte_tokenizer(), []
    monkeypatch.setattr(GPT, "generate", lambda self, start, n, temperature: (
        idx.append(start.tolist()) or torch.tensor([[10, *"añb".encode()]])))
    assert one.sample() == "añb" and idx == [[[10]]]


@pytest.mark.parametrize("readings, dropout, too_many", [
    (10, "0", False), (11, "0", True), (30, "0.1", False), (31, "0.1", True)])
def test_the_number_of_readings_is_printed_with_a_warning_if_it_is_large(
        dataset, tmp_path, capsys, readings, dropout, too_many):
    steps = readings * len(open_dataset(dataset)[1]["train"]) // 64
    train.describe(new_run(dataset, tmp_path, "--max_iters", str(steps), "--dropout", dropout),
                   None)
    printed = capsys.readouterr().out
    assert f" {readings}.00 readings of the text" in printed
    assert ("overfitting is likely: try more --dropout" in printed) == too_many


def test_a_run_whose_training_loss_alone_falls_is_told_once_after_three_evaluations(
        dataset, tmp_path, capsys, measured):
    measured[:] = [4.0, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
    run(dataset, tmp_path, "--eval_iters", "1", "--max_iters", "30", "--learning_rate", "1e-2")
    [note] = [text for text in capsys.readouterr().out.split("\nstep ") if "overfitting:" in text]
    assert note.startswith("20 of 30") and "since step 5, whose weights best.pt" in note


def test_lines_have_the_time_left_and_the_last_ones_name_what_can_be_done(
        dataset, tmp_path, capsys, clock):
    run(dataset, tmp_path, "--max_iters", "15")
    printed = capsys.readouterr().out.splitlines()
    lines = [text.partition(": ")[0] for text in printed if text.startswith("step")]
    assert lines == ["step 0 of 15, 00:00", "step 5 of 15, 02:05, 04:10 left",
                     "step 10 of 15, 04:10, 02:05 left", "step 15 of 15, 06:15, 00:00 left"]
    assert [text.split(":  ")[1].strip() for text in printed[-3:]] == [
        f"python eval_extrapolation.py {tmp_path}", f"python sample.py {tmp_path}",
        f"python -m experiments.curves {tmp_path} --plot {tmp_path}/losses.png"]


def test_a_reader_that_leaves_ends_the_run_with_an_exit_code_after_its_step_is_saved(
        dataset, tmp_path, monkeypatch, at_batch, fails):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
    at_batch(3, lambda: os.close(reader))
    code, lines = fails(train, [*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path)])
    print("nothing fails when Python flushes at its end", flush=True)
    assert (code, lines) == (1, []) and load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 5


# --- checkpoints


@pytest.fixture
def written(monkeypatch):
    """A list of the checkpoints that train.py writes: (name of the file, step)."""
    save, files = train.save_checkpoint, []

    def watched(path, checkpoint):
        files.append((path.name, checkpoint["iter"]))
        save(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", watched)
    return files


def test_best_pt_is_written_after_ckpt_pt_when_the_validation_loss_is_lower_than_ever(
        dataset, tmp_path, written, measured):
    measured[:] = [4.0, 3.0, 5.0, 3.0, 2.5, 6.0]
    run(dataset, tmp_path, "--eval_iters", "1", "--eval_interval", "2", "--max_iters", "6")
    assert written == [("ckpt.pt", 0), ("ckpt.pt", 2), ("best.pt", 2),
                       ("ckpt.pt", 4), ("ckpt.pt", 6)]
    written.clear()
    resumed(tmp_path, "--max_iters", "10")
    assert written == [("ckpt.pt", 8), ("best.pt", 8), ("ckpt.pt", 10)]
    best = load_checkpoint(tmp_path)
    assert (best["iter"], best["best_val_loss"], best["best_iter"]) == (8, 2.5, 8)
    assert "optimizers" not in best


def test_save_minutes_save_between_evaluations_and_seconds_count_those_before_a_resume(
        dataset, tmp_path, written, clock):
    run(dataset, tmp_path, "--max_iters", "7", "--eval_interval", "7", "--save_minutes", "1")
    assert [step for name, step in written if name == "ckpt.pt"] == [0, 3, 6, 7]
    clock[0] += 5000
    assert resumed(tmp_path, "--max_iters", "9")["seconds"] == 9 * 25
    assert [line["seconds"] for line in log(tmp_path)] == [0, 175, 225]


# --- kills and full disks


class Killed(BaseException):
    pass


def interrupt(n, error, monkeypatch):
    """The n-th event on the disk raises an error, and so does each after it. A killed process does
    not remove its unfinished files, either."""
    left, names = [n], [(os, "fsync"), (os, "replace"), (train, "append_log")]

    def watch(place, name):
        call = getattr(place, name)

        def watched(*args, **options):
            left[0] -= 1
            if left[0] <= 0:
                raise error
            return call(*args, **options)

        monkeypatch.setattr(place, name, watched)

    for place, name in names + [(Path, "unlink")] * isinstance(error, Killed):
        watch(place, name)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_at_any_event_on_the_disk_and_resumed_a_run_is_that_of_an_undisturbed_one(
        dataset, tmp_path, monkeypatch, error):
    flags = ["--max_iters", "6", "--eval_interval", "3", "--log_interval", "2",
             "--dropout", "0.1"]
    run(dataset, tmp_path / "whole", *flags)
    for n in itertools.count(1):
        try:
            with monkeypatch.context() as patch:
                interrupt(n, error, patch)
                run(dataset, tmp_path / "parts", *flags)
                break  # the run was over before the n-th event
        except type(error):
            assert isinstance(error, Killed) or not list(tmp_path.glob("parts/*.tmp"))
            restarted(dataset, tmp_path / "parts", *flags)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        shutil.rmtree(tmp_path / "parts")
    assert n > 15


def train_quietly(*arguments):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    restarted(*arguments)


@pytest.mark.parametrize("kills, steps, interval", [
    (20, 400, 50), pytest.param(200, 4000, 100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_a_run_ends_as_an_undisturbed_one(
        dataset, tmp_path, kills, steps, interval):
    flags = ["--max_iters", str(steps), "--eval_interval", str(interval), "--dropout", "0.1"]
    run(dataset, tmp_path / "whole", *flags)
    wait, path, saved = random.Random(0), tmp_path / "killed" / "ckpt.pt", []
    for _ in range(kills):
        before = path.stat().st_mtime_ns if path.exists() else None
        process = processes.Process(target=train_quietly, args=(
            dataset, path.parent, *flags, "--save_minutes", "0"))
        process.start()
        while not path.exists() or path.stat().st_mtime_ns == before:  # until it saves something
            assert process.exitcode is None, "the run was over before it was killed"
            time.sleep(0.001)
        time.sleep(wait.uniform(0, 0.1))
        process.kill()
        process.join()
        saved.append(load_checkpoint(path)["iter"])  # whole, at whatever moment the kill came
    assert saved == sorted(saved) and len(set(saved)) > kills / 2
    resumed(path.parent, "--save_minutes", "1000")
    (path.parent / "best.pt.tmp").unlink(missing_ok=True)  # of a kill while it was written
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# --- resuming


@pytest.mark.parametrize("flags", ["--pe hope", "--pe learned --optimizer adamw",
                                   "--dtype float16", "--init_from RUN"])
def test_ten_steps_resumed_for_ten_more_are_a_run_of_twenty(finished_run, dataset, tmp_path, flags):
    """float16 is the path of GPUs without bfloat16: the same code, gradient scaler included."""
    flags = [finished_run if flag == "RUN" else flag for flag in flags.split()]
    flags += ["--dropout", "0.2", "--lr_decay_iters", "20", "--sample_chars", "9"]
    whole = run(dataset, tmp_path / "whole", *flags, "--max_iters", "20")
    run(dataset, tmp_path / "parts", *flags, "--max_iters", "10")
    resumed(tmp_path / "parts", "--max_iters", "20")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert log(tmp_path / "whole")[-1]["val_loss"] < 4.4
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["scaler"] == whole["scaler"]


def test_a_run_can_continue_where_auto_means_another_number_format(dataset, tmp_path, monkeypatch):
    """Begun on a CPU, continued on a GPU without bfloat16, and back again."""
    run(dataset, tmp_path, "--max_iters", "4")
    for steps, dtype in ((8, torch.float16), (12, torch.float32)):
        monkeypatch.setattr(common_device, "pick_dtype", lambda *_, dtype=dtype: dtype)
        checkpoint = resumed(tmp_path, "--max_iters", str(steps))
        assert checkpoint["iter"] == steps
        assert bool(checkpoint["scaler"]) == (dtype == torch.float16)


def test_a_resumed_run_refuses_to_compute_something_else(finished_run, fails):
    free = ("vocab_size attn_scaling resume out_dir dataset max_iters device compile eval_interval "
            "eval_iters log_interval sample_chars save_minutes").split()
    others = {"pe": "rope", "local_pe": "rope", "optimizer": "adamw", "dtype": "bfloat16",
              "rope_scaling": "pi", "window_pattern": "SL", "init_from": "elsewhere"}
    for name, value in load_checkpoint(Path(finished_run, "ckpt.pt"))["args"].items():
        if name not in free:
            value = others[name] if name in others else (value or 0) + 1
            given = [f"--{name}"] if name.endswith("bias") else [f"--{name}", str(value)]
            code, lines = fails(train, ["--resume", "--out_dir", finished_run, *given])
            assert code == 2 and len(lines) == 1 and f"--{name} was " in lines[0], lines


def test_a_resumed_run_may_go_on_for_longer_at_the_lowest_rate_and_evaluate_more_often(
        finished_run, dataset, tmp_path, monkeypatch):
    """And its folder may have moved, here to the default one."""
    shutil.copytree(finished_run, tmp_path / "out" / "default")
    monkeypatch.chdir(tmp_path)
    train.main("--resume --max_iters 14 --eval_interval 2 --eval_iters 3 --log_interval 1 "
               "--save_minutes 1 --device cpu".split())
    lines = log(tmp_path / "out" / "default")
    assert [line["iter"] for line in lines] == [0, 5, 10, 11, 12, 13, 14]
    assert [line["iter"] for line in lines if "val_loss" in line] == [0, 5, 10, 12, 14]
    assert lines[-1]["lr"] == pytest.approx(4e-3)


def test_a_moved_data_set_can_be_named_but_no_changed_one(finished_run, dataset, tmp_path, fails):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "moved")
    resumed(tmp_path / "run", "--max_iters", "12", "--dataset", str(tmp_path / "moved"))
    path = tmp_path / "moved" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "0" * 64}))
    code, [line] = fails(train, ["--resume", "--out_dir", str(tmp_path / "run")])
    assert code == 2 and "sha256" in line


# --- starting from another run


def test_a_run_that_starts_from_another_has_its_weights_and_a_new_schedule(
        finished_run, dataset, tmp_path):
    best = load_checkpoint(finished_run)
    checkpoint = continued(finished_run, dataset, tmp_path / "next")
    assert checkpoint["config"] == best["config"] and checkpoint["iter"] == 5
    first = log(tmp_path / "next")[0]
    assert first["val_loss"] == pytest.approx(best["best_val_loss"], abs=1e-6)
    assert first["iter"] == 0 and checkpoint["args"]["lr_decay_iters"] == 5


def test_a_longer_context_with_scaling_rotates_as_the_checkpoint_does_where_it_was_trained(
        finished_run, dataset, tmp_path):
    checkpoint = continued(finished_run, dataset, tmp_path / "pi", "--pe", "rope", "--block_size",
                           "64", "--rope_scaling", "pi", "--rope_factor", "4")
    assert checkpoint["config"]["rope_context"] == 16
    theta = load_model(finished_run, pe="rope").transformer.wpe.theta
    assert torch.equal(load_model(checkpoint).transformer.wpe.theta, (theta.double() / 4).float())
