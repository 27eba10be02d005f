"""AdamW, Muon, which of them has which weights, and their rates over time."""
import pytest
import torch

from common import optimizer
from common.optimizer import Muon, OptimizerConfig
from tests.conftest import tiny


def make_optimizers(model, dtype=torch.float32, **settings):
    config = OptimizerConfig(**settings)
    return optimizer.make_optimizers(model, config, torch.device("cpu"), dtype)


def names_by_group(model, optimizers):
    """-> for each group of the optimizers, the weight decay and the names of its weights."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(group["weight_decay"], [names[parameter] for parameter in group["params"]])
            for each in optimizers for group in each.param_groups]


def modules(names):
    return {name.split(".")[-2] for name in names}


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_minimum():
    config = OptimizerConfig(warmup_iters=10, lr_decay_iters=110, learning_rate=1.0, min_lr=0.1)
    rates = [optimizer.learning_rate_at(step, config) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])


def test_rates_that_are_not_given_depend_on_the_optimizer():
    for name, rate in (("muon", 4e-2), ("adamw", 5e-3)):
        config = OptimizerConfig(optimizer=name)
        assert (config.learning_rate, config.min_lr) == pytest.approx((rate, rate / 10))
    assert OptimizerConfig(learning_rate=1.0, min_lr=0.0).min_lr == 0.0


def test_weight_decay_spares_norms_biases_and_what_encodings_learn():
    model = tiny("learned", bias=True)
    [adamw] = make_optimizers(model, optimizer="adamw")
    (decay, decayed), (none, spared) = names_by_group(model, [adamw])
    assert (decay, none) == (0.1, 0)
    assert modules(decayed) == {"wte", "c_attn", "c_proj", "c_fc"}
    sizes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert all(sizes[name] == 1 or name == "transformer.wpe.weight" for name in spared)
    assert sorted(decayed + spared) == sorted(sizes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_betas_of_the_configuration_are_adamw_s(name):
    adamw = make_optimizers(tiny("nope"), optimizer=name, beta1=0.8, beta2=0.95)[0]
    assert [group["betas"] for group in adamw.param_groups] == [(0.8, 0.95)] * 2


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    model = tiny("t5", bias=True)
    adamw, muon = make_optimizers(model)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    (_, embeddings), (_, vectors) = names_by_group(model, [adamw])
    (_, qkv), (_, others) = names_by_group(model, [muon])
    assert len(qkv) == 2 and modules(qkv) == {"c_attn"} and muon.param_groups[0]["parts"] == 3
    assert len(others) == 6 and modules(others) == {"c_proj", "c_fc"}
    assert embeddings == ["transformer.wte.weight"] and "transformer.wpe.table" in vectors
    assert len(qkv + others + embeddings + vectors) == len(list(model.parameters()))
    decays = [decay for decay, _ in names_by_group(model, [adamw, muon])]
    assert decays == [0.1, 0, 0.1, 0.1]


def moved(weights, gradients, parts=1, **settings):
    """Weights after a step of Muon for each list of gradients."""
    made = [torch.nn.Parameter(weight.clone()) for weight in weights]
    muon = Muon([{"params": made, "parts": parts}], **{"dtype": torch.float32, **settings})
    for step in gradients:
        for weight, gradient in zip(made, step):
            weight.grad = gradient.clone()
        muon.step()
    return [weight.detach() for weight in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_takes_the_steps_of_pytorch_s_own_muon(dtype):
    """Which rounds to bfloat16: relative to the step, the difference is a rounding error."""
    start = [torch.randn(40, 16), torch.randn(16, 40), torch.randn(24, 24)]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(4)]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in start]
    settings = dict(lr=0.03, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, **settings)
    for step in gradients:
        for weight, gradient in zip(theirs, step):
            weight.grad = gradient.clone()
        reference.step()
    for a, b, weight in zip(moved(start, gradients, dtype=dtype, **settings), theirs, start):
        assert (a - b).norm() < 0.05 * (a - weight).norm()


def test_stacked_matrices_are_orthogonalized_one_by_one():
    settings, gradient = dict(lr=0.1, momentum=0.9, weight_decay=0.0), torch.randn(48, 16)
    gradient[32:] = 0  # which has no direction
    [stacked] = moved([torch.zeros(48, 16)], [[gradient]], parts=3, **settings)
    apart = moved(3 * [torch.zeros(16, 16)], [gradient.split(16)], **settings)
    torch.testing.assert_close(stacked, torch.cat(apart))


class OnGPU(torch.nn.Parameter):
    """A weight that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def test_a_gpu_orthogonalizes_matrices_of_a_shape_together_with_the_same_result(monkeypatch):
    start = [torch.randn(shape) for shape in ((48, 16), (16, 16), (48, 16), (16, 48))]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(2)]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    expected = moved(start, gradients, **settings)
    stacks, orthogonalized = [], optimizer.orthogonalized
    monkeypatch.setattr(optimizer, "orthogonalized", lambda x, dtype: (
        stacks.append(tuple(x.shape)) or orthogonalized(x, dtype)))
    monkeypatch.setattr("torch.nn.Parameter", OnGPU)
    found = moved(start, gradients, **settings)
    assert stacks == 2 * [(2, 48, 16), (1, 16, 16), (1, 16, 48)]
    torch.testing.assert_close(found, expected)


def test_muon_computes_in_bfloat16_only_if_the_model_does():
    found = [make_optimizers(tiny("hope"), dtype)[1].dtype
             for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert found == [torch.float32, torch.float32, torch.bfloat16]


def test_adamw_and_muon_follow_one_schedule_each_at_its_own_rate():
    config = OptimizerConfig(warmup_iters=0, lr_decay_iters=10, learning_rate=1e-3)
    both = optimizer.make_optimizers(tiny("hope"), config, torch.device("cpu"))
    for step, share in ((0, 1), (10, 0.1)):
        rate = optimizer.set_learning_rate(both, step, config)
        rates = [group["lr"] for each in both for group in each.param_groups]
        assert rates == pytest.approx([rate, rate, 3e-2 * share, 3e-2 * share])
        assert rate == pytest.approx(1e-3 * share)
