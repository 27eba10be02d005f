"""experiments/bench.py: what is compared is the same work, and a ratio is what it says."""
import json

import pytest
import torch

from common.device import Device, DeviceConfig
from eval_extrapolation import bucket_edges, score
from experiments import bench
from model import GPT, GPTConfig
from tests.conftest import tiny

CPU = Device(DeviceConfig(device="cpu", dtype="float32"))
SIZES = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --vocab_size 11 --batch_size 2".split()


def test_the_baseline_is_gpt2_without_biases():
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=False,
                       pe="learned")
    theirs, ours = bench.NanoGPT(config), GPT(config)
    weights = {"transformer.wte": theirs.tokens, "transformer.wpe": theirs.positions,
               "transformer.ln_f": theirs.norm, "lm_head": theirs.head}
    names = "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
    for i, layer in enumerate(theirs.layers):
        weights |= {f"transformer.h.{i}.{name}": part for name, part in zip(names, layer)}
    ours.load_state_dict({f"{name}.weight": part.weight for name, part in weights.items()})
    idx, targets = torch.randint(11, (2, 3, 8))
    for a, b in zip(ours(idx, targets), theirs(idx, targets)):
        torch.testing.assert_close(a, b)


def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds_after_the_warm_up(monkeypatch):
    times = iter([9, 1, 9, 1,  1, 3, 2, 1, 4, 4])  # ratios 3, 0.5, 1; medians 2 and 3
    monkeypatch.setattr(bench, "seconds", lambda call, device: next(times))
    found = bench.in_turns({"a": None, "b": None}, CPU, repeats=3, warm_up=2)
    assert found == {"a": {"seconds": 2, "ratio": 1}, "b": {"seconds": 3, "ratio": 1}}


def test_both_ways_to_generate_and_to_evaluate_give_the_same():
    model, prompt = tiny("hope"), torch.tensor([[3, 1, 4]])
    assert torch.equal(bench.without_cache(model, prompt, 40), model.generate(prompt, 40, top_k=1))
    windows, edges = torch.randint(50, (2, 16 * 32 + 1)), bucket_edges(32, 16)
    torch.testing.assert_close(bench.score_buckets(model, windows, edges),
                               score(model, windows, 128, 2))


def test_a_training_step_moves_each_weight_and_leaves_no_gradient():
    model = tiny("kerple").train()
    before = [weight.clone() for weight in model.parameters()]
    x, y = torch.randint(50, (2, 4, 8))
    optimizers = bench.make_optimizers(model, bench.OptimizerConfig(), CPU.torch_device)
    bench.training_step(model, optimizers, x, y, CPU.autocast())
    for old, new in zip(before, model.parameters()):
        assert not torch.equal(old, new) and new.grad is None


def test_each_benchmark_writes_a_row_for_each_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "NEW_TOKENS", 3)
    file = tmp_path / "new" / "b.json"
    bench.main([*SIZES, "--pe", "alibi", "nope+rope:SL:3", "--repeats", "1", "--device", "cpu",
                "--json", str(file)])
    result = json.loads(file.read_text())
    for what, (first, second) in {"train": ("nanoGPT", "this GPT"), "generate": (
            "with the cache", "without"), "evaluate": ("one pass", "a pass per bucket")}.items():
        assert list(result[what]) == ["alibi", "nope+rope:SL:3"]
        for row in result[what].values():  # of a single round
            assert row[second]["ratio"] == pytest.approx(
                row[second]["seconds"] / row[first]["seconds"])
