"""
The positional encodings of model.py against references that share no code with it: complex numbers for rotations,
plain loops for the rest.

    python -m pytest tests/test_encodings.py
"""
import cmath
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, PE, GPTConfig, RoPE, frequencies, rotate

ROTARY = [pe for pe in PE if issubclass(PE[pe], RoPE)]


def tiny(pe, **changes):
    """A small untrained model in evaluation mode, its weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    config = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, pe=pe)
    model = GPT(GPTConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(10)
        for parameter in model.transformer.wpe.parameters():
            parameter.add_(torch.rand_like(parameter))    # what an encoding learns, away from where it starts
    return model


def spectrum(head_dim, pe="rope", **changes):
    """theta of all pairs of a head, 0 for those that are not rotated (D / 2,)."""
    theta = PE[pe](GPTConfig(n_embd=head_dim, n_head=1, pe=pe, **changes)).theta
    return F.pad(theta, (0, head_dim // 2 - len(theta)))


def all_logits(model, idx):
    return model(idx, targets=idx)[0]


# --- the vector that the rotary family is


@pytest.mark.parametrize("head_dim, block_size, base, kept", [
    (64, 128, 1e4, 11), (64, 256, 1e4, 13), (64, 512, 1e4, 16), (64, 1024, 1e4, 18), (64, 2048, 1e4, 21),
    (64, 4096, 1e4, 23), (64, 8192, 1e4, 25), (128, 4096, 1e4, 46), (128, 4096, 5e5, 32), (256, 8192, 1e4, 100)])
def test_hope_keeps_as_many_pairs_as_the_paper_says(head_dim, block_size, base, kept):
    theta = spectrum(head_dim, "hope", block_size=block_size, rope_base=base)
    assert theta.dtype == torch.float32 and theta.shape == (head_dim // 2,)
    expected = [base ** (-2 * j / head_dim) * block_size >= 2 * math.pi for j in range(head_dim // 2)]
    assert [t > 0 for t in theta.tolist()] == expected
    assert (theta > 0).sum() == kept


def test_rope_frequencies_are_powers_of_the_base():
    expected = [1 / 10000 ** (2 * j / 24) for j in range(12)]
    torch.testing.assert_close(frequencies(24), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(spectrum(24), frequencies(24).float())


def test_prope_keeps_the_fastest_int_of_p_d_over_2_pairs_and_does_not_respread_them():
    for head_dim, p in [(256, 0.75), (64, 0.25), (10, 0.5)]:
        kept = int(p * head_dim // 2)
        theta = spectrum(head_dim, "prope", prope_fraction=p)
        assert torch.equal(theta[:kept], spectrum(head_dim)[:kept])
        assert (theta[kept:] == 0).all()


def test_prope_with_p_1_is_rope_and_with_p_0_is_nope():
    idx = torch.randint(50, (2, 40))
    assert torch.equal(all_logits(tiny("prope", prope_fraction=1.0), idx), all_logits(tiny("rope"), idx))
    assert torch.equal(all_logits(tiny("prope", prope_fraction=0.0), idx), all_logits(tiny("nope"), idx))
    half = all_logits(tiny("prope", prope_fraction=0.5), idx)
    assert not torch.allclose(half, all_logits(tiny("rope"), idx), atol=1e-3)


def test_hope_with_a_very_long_context_is_rope_and_with_one_below_2_pi_is_nope():
    idx = torch.randint(50, (2, 40))
    assert torch.equal(all_logits(tiny("hope", block_size=10**6), idx), all_logits(tiny("rope"), idx))
    assert torch.equal(all_logits(tiny("hope", block_size=6), idx), all_logits(tiny("nope"), idx))
    assert not torch.allclose(all_logits(tiny("hope"), idx), all_logits(tiny("rope"), idx), atol=1e-3)


def test_hope_cutoff_counts_turns_inside_the_context():
    for c in (0.5, 1, 2, 4):
        theta = spectrum(64, "hope", block_size=512, hope_cutoff=c)
        turns = [512 / (2 * math.pi * 10000 ** (2 * j / 64)) for j in range(32)]
        assert [t > 0 for t in theta.tolist()] == [n >= c for n in turns]


# --- rotation


@pytest.mark.parametrize("pe", ["rope", "prope", "hope"])
def test_rotation_is_a_product_of_complex_numbers(pe):
    model = tiny(pe, n_embd=60, n_head=6)                 # 6 heads of 10 channels
    positions = torch.tensor([0, 1, 5, 31, 32, 77])       # past L = 32 too
    x = torch.randn(2, 6, len(positions), 10)
    turned = rotate(x, *model.transformer.wpe.rotary(positions))
    for j in range(5):
        theta = 10000 ** (-2 * j / 10)
        turns = {"rope": True, "prope": j < int(0.75 * 10 // 2), "hope": theta >= 2 * math.pi / 32}[pe]
        for t, n in enumerate(positions.tolist()):
            for b in range(2):
                for h in range(6):
                    z = complex(x[b, h, t, j], x[b, h, t, j + 5]) * cmath.exp(1j * n * theta * turns)
                    assert abs(z - complex(turned[b, h, t, j], turned[b, h, t, j + 5])) < 1e-5


@pytest.mark.parametrize("pe", ROTARY)
def test_rotary_scores_depend_on_the_distance_only(pe):
    encoding = tiny(pe).transformer.wpe
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)

    def score(i, j):
        turned_q = rotate(q, *encoding.rotary(torch.tensor([i])))
        turned_k = rotate(k, *encoding.rotary(torch.tensor([j])))
        return (turned_q * turned_k).sum(-1)

    for distance in (0, 1, 7, 40):
        for start in (1, 13, 100):
            torch.testing.assert_close(score(start + distance, start), score(distance, 0), atol=1e-4, rtol=0)
    assert not torch.allclose(score(7, 0), score(0, 0), atol=1e-3)


def test_sinusoidal_interleaves_sines_and_cosines_over_the_model_width():
    x = torch.randn(2, 3, 12)
    y = tiny("sinusoidal", n_embd=12).transformer.wpe.embed(x, torch.tensor([0, 4, 50]))
    for t, n in enumerate((0, 4, 50)):
        for c in range(12):
            wave = (math.sin, math.cos)[c % 2](n / 10000 ** (2 * (c // 2) / 12))
            torch.testing.assert_close(y[:, t, c], x[:, t, c] * math.sqrt(12) + wave, atol=1e-5, rtol=0)


# --- what every encoding must have


@pytest.mark.parametrize("pe", PE)
def test_a_later_token_never_changes_an_earlier_logit(pe):
    model, idx = tiny(pe), torch.randint(50, (1, 32))
    before = all_logits(model, idx)
    for changed in (5, 20, 31):
        other = idx.clone()
        other[0, changed] = (other[0, changed] + 1) % 50
        after = all_logits(model, other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed])
        assert not torch.allclose(after[:, changed], before[:, changed], atol=1e-3)


@pytest.mark.parametrize("pe", [pe for pe in PE if pe != "nope"])
def test_an_encoding_makes_the_order_of_tokens_count_and_nope_alone_does_not(pe):
    """One layer, no causal help: the last token's logits after the tokens before it change places."""
    idx = torch.randint(50, (1, 20))
    swapped = idx[:, [3, 1, 2, 0, *range(4, 20)]]
    assert not torch.allclose(tiny(pe, n_layer=1)(idx)[0], tiny(pe, n_layer=1)(swapped)[0], atol=1e-4)
    torch.testing.assert_close(tiny("nope", n_layer=1)(idx)[0], tiny("nope", n_layer=1)(swapped)[0])


@pytest.mark.parametrize("pe", PE)
def test_the_same_seed_gives_the_same_shared_weights_as_nope(pe):
    def weights(pe):
        torch.manual_seed(7)
        return GPT(GPTConfig(pe=pe)).state_dict()
    reference, own = weights("nope"), weights(pe)
    assert set(reference) <= set(own)
    assert all(torch.equal(reference[name], own[name]) for name in reference)


def test_model_to_bfloat16_does_not_round_the_angles():
    positions = torch.tensor([1000])
    exact = tiny("rope").transformer.wpe.rotary(positions)
    cast = tiny("rope").to(torch.bfloat16).transformer.wpe.rotary(positions)
    assert cast[0].dtype == torch.float32 and torch.equal(exact[0], cast[0])
