"""
AdamW, Muon, which of them has which weights, and their rates over time.

    python -m pytest tests/test_optimizer.py
"""
import math

import pytest
import torch

from common import optimizer
from tests.conftest import tiny


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_minimum():
    config = optimizer.OptimizerConfig(warmup_iters=10, lr_decay_iters=110, learning_rate=1.0, min_lr=0.1)
    rates = [optimizer.learning_rate_at(step, config) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])


def test_rates_that_are_not_given_depend_on_the_optimizer():
    for name, rate in (("muon", 4e-2), ("adamw", 5e-3)):
        config = optimizer.OptimizerConfig(optimizer=name)
        assert (config.learning_rate, config.min_lr) == pytest.approx((rate, rate / 10))
    assert optimizer.OptimizerConfig(learning_rate=1.0, min_lr=0.0).min_lr == 0.0


def made_optimizer(model, **changes):
    made = optimizer.make_optimizer(model, optimizer.OptimizerConfig(**changes), torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return made, [[names[id(parameter)] for parameter in group["params"]] for group in made.param_groups]


def test_weight_decay_spares_norms_biases_and_what_encodings_learn():
    model = tiny("learned")
    made, (decayed, spared) = made_optimizer(model, optimizer="adamw")
    assert {name.split(".")[-2] for name in decayed} == {"wte", "c_attn", "c_proj", "c_fc"}
    weights = dict(model.named_parameters())
    assert all(weights[name].dim() == 1 or name == "transformer.wpe.weight" for name in spared)
    assert len(decayed) + len(spared) == len(weights)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    model = tiny("t5")
    made, (qkv, others, embeddings, vectors) = made_optimizer(model)
    assert len(qkv) == 2 and {name.split(".")[-2] for name in qkv} == {"c_attn"}
    assert len(others) == 6 and {name.split(".")[-2] for name in others} == {"c_proj", "c_fc"}
    assert embeddings == ["transformer.wte.weight"] and "transformer.wpe.table" in vectors
    assert len(qkv + others + embeddings + vectors) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.1, 0.1, 0.0]


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.5), (0.3, 0.99)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_follows_its_formula_with_both_betas(name, betas):
    """Three gradients on a norm's weight, which does not decay, and on the embedding, which does."""
    config = optimizer.OptimizerConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5, beta1=betas[0],
                                       beta2=betas[1])
    model = tiny("nope", n_layer=1)
    made = optimizer.make_optimizer(model, config, torch.device("cpu"))
    for parameter, decay in ((model.transformer.ln_f.weight, 0.0), (model.lm_head.weight, 0.5)):
        x, m, v = parameter.detach().double(), 0.0, 0.0
        for t, gradient in enumerate((1.0, -3.0, 0.5), start=1):
            m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
            step = m / (1 - betas[0]**t) / (math.sqrt(v / (1 - betas[1]**t)) + 1e-8)
            x = x - 0.1 * (step + decay * x)
        made.state.clear() if name == "adamw" else made.optimizers[1].state.clear()
        for gradient in (1.0, -3.0, 0.5):
            for other in model.parameters():
                other.grad = torch.zeros_like(other)
            parameter.grad.fill_(gradient)
            made.step()
        torch.testing.assert_close(parameter.detach().double(), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_takes_the_steps_of_pytorch_s_own_muon(dtype):
    """Which rounds to bfloat16: relative to the step, the difference is a rounding error."""
    torch.manual_seed(0)
    start = [torch.randn(48, 16), torch.randn(16, 48), torch.randn(24, 24)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    one = optimizer.Muon([{"params": ours}], lr=0.03, momentum=0.9, weight_decay=0.1, dtype=dtype)
    other = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, weight in zip(ours, theirs, start):
        assert (a - b).norm() < 0.05 * (a - weight).norm()


def test_stacked_matrices_are_orthogonalized_one_by_one():
    torch.manual_seed(0)
    stacked, gradient = torch.nn.Parameter(torch.zeros(48, 16)), torch.randn(48, 16)
    apart = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    stacked.grad = gradient.clone()
    for part, piece in zip(apart, gradient.split(16)):
        part.grad = piece.clone()
    for groups in ([{"params": [stacked], "parts": 3}], [{"params": apart}]):
        optimizer.Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(stacked, torch.cat(apart))


class OnGPU(torch.nn.Parameter):
    """A weight that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_matrices_of_one_shape_are_orthogonalized_together_with_the_same_result(monkeypatch, dtype):
    shapes = [(48, 16), (16, 16), (48, 16), (16, 48), (48, 16)]
    starts, results, stacks = [torch.randn(shape) for shape in shapes], [], []
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    orthogonalize = optimizer.orthogonalized
    monkeypatch.setattr(optimizer, "orthogonalized", lambda x, dtype: stacks.append(x.shape) or orthogonalize(x, dtype))
    for kind in (torch.nn.Parameter, OnGPU):
        weights = [kind(start.clone()) for start in starts]
        groups = [{"params": [weights[0], weights[2]], "parts": 3}, {"params": [weights[i] for i in (1, 3, 4)]}]
        made = optimizer.Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=dtype)
        stacks.clear()
        for step in gradients:
            for weight, gradient in zip(weights, step):
                weight.grad = gradient.clone()
            made.step()
        results.append(weights)
    assert stacks == 2 * [(6, 16, 16), (1, 16, 16), (1, 16, 48), (1, 48, 16)]
    for start, one_by_one, together in zip(starts, *results):
        assert (one_by_one - together).norm() < 0.02 * (one_by_one - start).norm()


def test_muon_computes_in_bfloat16_only_if_the_model_does():
    made = [optimizer.make_optimizer(tiny("hope"), optimizer.OptimizerConfig(), torch.device("cpu"), dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [both.optimizers[0].dtype for both in made] == [torch.float32, torch.float32, torch.bfloat16]


def test_one_step_of_muon_moves_all_directions_of_a_matrix_by_its_rate_and_adamw_the_rest_by_its_own():
    model, idx = tiny("hope", n_embd=64), torch.randint(50, (4, 20))
    config = optimizer.OptimizerConfig(warmup_iters=0, lr_decay_iters=10, weight_decay=0.0, learning_rate=1e-3)
    made = optimizer.make_optimizer(model, config, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(idx, idx)[1].backward()
    assert optimizer.set_learning_rate(made, 0, config) == pytest.approx(1e-3)
    made.step()
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    singular = torch.linalg.svdvals(moved["transformer.h.0.attn.c_proj.weight"])
    assert 0.5 * 0.03 < singular.median() and singular.max() < 1.3 * 0.03  # Newton-Schulz is approximate
    assert moved["transformer.ln_f.weight"].abs().max().item() == pytest.approx(1e-3, rel=1e-2)
    optimizer.set_learning_rate(made, 10, config)  # the end of the schedule: a tenth of both
    assert sorted({group["lr"] for group in made.param_groups}) == pytest.approx([1e-4, 3e-3])
