"""tools/check_device.py finds devices that compute wrongly; the CPU plays them."""
import math
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from common.device import Device, DeviceConfig
from model import PE
from tests.conftest import PROJECT
from tools import check_device

ATTENTION = F.scaled_dot_product_attention


def leaking(q, k, v, attn_mask=None, is_causal=False, **_):
    """The causal mask once per group of four queries, as in PyTorch's issue 195910."""
    last = torch.arange(q.size(2))[:, None] // 4 * 4 + 3
    return ATTENTION(q, k, v, torch.arange(k.size(2)) <= last if is_causal else attn_mask)


def misreading(q, k, v, attn_mask=None, is_causal=False, **_):
    """A single query finds each key beside the value of another."""
    k = k.roll(1, dims=2) if q.size(2) == 1 else k
    return ATTENTION(q, k, v, attn_mask, is_causal=is_causal)


def not_scaled(q, k, v, attn_mask=None, is_causal=False, **_):
    return ATTENTION(q * 1.5, k, v, attn_mask, is_causal=is_causal)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return 1.2 * gradient


def wrong_backward(q, k, v, attn_mask=None, is_causal=False, **_):
    return ATTENTION(WrongGradient.apply(q), k, v, attn_mask, is_causal=is_causal)


def undefined(q, *_, **__):
    return q * math.nan


@pytest.mark.parametrize("dtype", check_device.ROUNDING)
@pytest.mark.parametrize("fault, check", [
    (leaking, "later tokens"), (misreading, "cache"), (not_scaled, "logits"),
    (wrong_backward, "gradients"), (undefined, "logits"), (None, None)])
def test_a_fault_of_attention_is_found_and_named(monkeypatch, capsys, dtype, fault, check):
    def attend(q, *rest, **options):  # the reference is float64
        faulty = fault and q.dtype != torch.float64
        return (fault if faulty else ATTENTION)(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    device = Device(DeviceConfig("cpu", dtype))
    assert check_device.check("rope", {"pe": "rope"}, device) == (fault is None)
    found = re.findall(r"(later tokens|\w+) \S+ WRONG", capsys.readouterr().out)
    assert check in found if fault else not found


def test_every_encoding_passes_on_a_cpu_and_a_failure_sets_the_exit_code(monkeypatch, capsys):
    for rounding in (check_device.ROUNDING["float32"], 0):
        monkeypatch.setattr(check_device, "ROUNDING", {"float32": rounding})
        with pytest.raises(SystemExit) as ended:
            check_device.main(["--device", "cpu"])
        assert ended.value.code == (rounding == 0)
        found = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
        assert found == [*PE, "windows"]


def test_speed_is_that_of_the_steps_after_the_first_three(monkeypatch, capsys):
    """A clock by which a step takes two seconds, and a compiled one, one."""
    compiled, steps, time = [], [], [0.0]
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    step = check_device.Run.step

    def timed_step(run):
        steps.append(run.config.compile)
        time[0] += (1 if run.config.compile else 2) * (1 if run.iter >= 3 else 100)
        step(run)

    monkeypatch.setattr(check_device.Run, "step", timed_step)
    monkeypatch.setattr(check_device.time, "perf_counter", lambda: time[0])
    check_device.speed("laptop_char", "--device", "cpu", "--n_layer", "1", "--n_embd", "24",
                       "--n_head", "2", "--block_size", "8", "--batch_size", "4",
                       "--max_iters", "300", steps=2)
    slow, fast = capsys.readouterr().out.splitlines()
    assert slow.startswith("laptop_char, not compiled: 16 tokens/s, 10 minutes in all")
    assert fast.startswith("laptop_char, compiled: 32 tokens/s, 5 minutes in all")
    assert len(compiled) == 1 and steps == [False] * 5 + [True] * 5


def test_the_script_starts_from_any_folder(tmp_path):
    command = [sys.executable, PROJECT / "tools" / "check_device.py", "--help"]
    assert "--speed" in subprocess.run(command, cwd=tmp_path, check=True, capture_output=True,
                                       text=True).stdout
