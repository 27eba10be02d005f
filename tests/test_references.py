"""
Every encoding's attention logits against a reference written here from the papers: complex numbers for rotations, two
loops over queries and keys for all of them, float64, no code shared with model.py.

    python -m pytest tests/test_references.py
"""
import cmath
import math

import pytest
import torch
from torch.nn import functional as F

from model import PE, alibi_slopes, t5_bucket
from tests.test_encodings import ROTARY, spectrum, tiny

L, HEADS, WIDTH, HEAD_DIM = 16, 6, 60, 10                 # six heads: no power of two; an odd number of pairs each
LENGTH = 37                                               # odd, and more than twice L
SCALINGS = ["none", "pi", "ntk", "yarn"]


# --- the references


WITHOUT_BIAS = {"nope", "learned", "sinusoidal"}


def missing(pe):
    pytest.fail(f"write a reference for {pe} in tests/test_references.py: what it adds to a logit in bias(), how many "
                "pairs it rotates in kept_pairs(), or what it does to an embedding in embedded() (and then add it to "
                "WITHOUT_BIAS)", pytrace=False)


def kept_pairs(pe):
    kept = {"rope": 5, "prope": 3, "hope": sum(10000 ** (-2 * j / 10) * L / (2 * math.pi) >= 1 for j in range(5))}
    return kept[pe] if pe in kept else missing(pe)


def scaled_angle(j, scaling, s, head_dim=HEAD_DIM, block_size=L):
    """Angle per token of pair j when s trained contexts are to look like one."""
    theta = 10000 ** (-2 * j / head_dim)
    if scaling == "pi":
        return theta / s
    if scaling == "ntk":
        return (10000 * s ** (head_dim / (head_dim - 2))) ** (-2 * j / head_dim)
    if scaling == "yarn":
        def index_of(turns):                              # where on the spectrum a pair would have so many turns in L
            return head_dim * math.log(block_size / (turns * 2 * math.pi)) / (2 * math.log(10000))
        low, high = max(0, math.floor(index_of(32))), min(head_dim - 1, math.ceil(index_of(1)))
        keep = 1 - min(1, max(0, (j - low) / (high - low)))
        return theta * keep + theta / s * (1 - keep)
    return theta


def rotary_logit(q, k, m, n, pe, scaling="none", s=1.0):
    total = 0.0
    for j in range(HEAD_DIM // 2):
        angle = scaled_angle(j, scaling, s) if j < kept_pairs(pe) else 0.0
        zq = complex(q[j], q[j + 5]) * cmath.exp(1j * m * angle)
        zk = complex(k[j], k[j + 5]) * cmath.exp(1j * n * angle)
        total += (zq * zk.conjugate()).real
    return total


def slopes(n):
    power = 1
    while power * 2 <= n:
        power *= 2
    exact = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    if power == n:
        return exact
    double = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return exact + double[::2][:n - power]


def bucket(n):
    if n < 16:
        return n
    return min(31, 16 + math.floor(math.log(n / 16) / math.log(128 / 16) * 16 + 1e-9))


def bias(pe, weights, h, m, n):
    """What the pe adds to head h's logit of query m and key n; weights are those it learned, in float64."""
    distance = m - n
    if pe == "alibi":
        return -slopes(HEADS)[h] * distance
    if pe == "t5":
        return weights["table"][bucket(distance)][h]
    if pe == "kerple":
        return -weights["r1"][h] * math.log(1 + weights["r2"][h] * distance)
    if pe == "fire":
        def psi(x):
            return math.log(abs(weights["c"]) * x + 1)
        x = psi(distance) / (psi(max(m, abs(weights["multiplier"] * L))) + 1e-6)
        hidden = [max(0.0, float(w * x + b)) for w, b in zip(weights["weight_1"], weights["bias_1"])]
        return sum(w * y for w, y in zip(weights["weight_2"][h], hidden)) + weights["bias_2"][h]
    return 0.0 if pe in WITHOUT_BIAS or pe in ROTARY else missing(pe)


def embedded(pe, token, n, weights):
    """The embedding of a token at position n, before the first layer."""
    if pe == "learned":
        return token + weights["weight"][n]
    if pe == "sinusoidal":
        wave = [(math.sin, math.cos)[c % 2](n / 10000 ** (2 * (c // 2) / WIDTH)) for c in range(WIDTH)]
        return token * math.sqrt(WIDTH) + torch.tensor(wave, dtype=torch.float64)
    return token


def reference_logits(model, idx, scaling="none", s=1.0, logn=False):
    """Logits of the first layer's attention, (H, T, T) float64, minus infinity in the future."""
    pe = model.config.pe
    learned = {name: p.detach().double() for name, p in model.transformer.wpe.named_parameters()}
    attention, norm = model.transformer.h[0].attn.c_attn, model.transformer.h[0].ln_1
    rows = []
    for n, token in enumerate(idx.tolist()):
        x = embedded(pe, model.transformer.wte.weight[token].detach().double(), n, learned)
        x = (x - x.mean()) / math.sqrt(x.var(unbiased=False) + 1e-5) * norm.weight.double() + norm.bias.double()
        rows.append((attention.weight.double() @ x + attention.bias.double()).detach())
    logits = torch.full((HEADS, len(idx), len(idx)), -math.inf, dtype=torch.float64)
    for h in range(HEADS):
        for m in range(len(idx)):
            q = rows[m][h * HEAD_DIM:(h + 1) * HEAD_DIM]
            factor = (0.1 * math.log(s) + 1) ** 2 if scaling == "yarn" else 1.0
            factor *= max(1.0, math.log(m + 1) / math.log(L)) if logn else 1.0
            for n in range(m + 1):
                k = rows[n][WIDTH + h * HEAD_DIM:WIDTH + (h + 1) * HEAD_DIM]
                product = rotary_logit(q, k, m, n, pe, scaling, s) if pe in ROTARY else float(q @ k)
                logits[h, m, n] = factor * product / math.sqrt(HEAD_DIM) + bias(pe, learned, h, m, n)
    return logits


# --- the model's own


def own_logits(model, idx, monkeypatch):
    """The logits whose softmax the first layer takes, read off at its call of scaled_dot_product_attention."""
    calls, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, is_causal=False, **more):
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                             # (1, H, T, T)
        if is_causal:
            assert attn_mask is None
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        calls.append(logits if attn_mask is None else logits + attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **more)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", watched)
        model(idx[None])
    return calls[0][0]


def small(pe, **changes):
    model = tiny(pe, block_size=LENGTH if pe == "learned" else L, n_head=HEADS, n_embd=WIDTH, n_layer=1, **changes)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(0.3)
    return model


@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize("pe", PE)
def test_attention_logits_equal_the_reference(pe, logn, monkeypatch):
    model = small(pe, attn_scaling="logn" if logn else "none")
    idx = torch.randint(50, (LENGTH,))
    # learned has no position past its L, so there its L is the whole length and log-n has nothing to do
    expected = reference_logits(model, idx, logn=logn and pe != "learned")
    assert expected[expected.isfinite()].std() > 0.05
    torch.testing.assert_close(own_logits(model, idx, monkeypatch).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("pe", ROTARY)
def test_scaled_attention_logits_equal_the_reference(pe, scaling, logn, monkeypatch):
    model = small(pe, rope_scaling=scaling, rope_factor=2.5, attn_scaling="logn" if logn else "none")
    idx = torch.randint(50, (LENGTH,))
    expected = reference_logits(model, idx, scaling, 2.5, logn)
    torch.testing.assert_close(own_logits(model, idx, monkeypatch).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pe", ["t5", "kerple", "fire"])
def test_gradients_of_learned_biases_equal_finite_differences_of_the_reference(pe):
    encoding = small(pe).transformer.wpe
    length, step = 9, 1e-6
    mix = torch.randn(HEADS, length, length, dtype=torch.float64).tril()
    encoding.zero_grad()
    positions = torch.arange(length)
    (encoding.bias(positions, positions) * mix).sum().backward()
    weights = {name: p.detach().double().clone() for name, p in encoding.named_parameters()}

    def total():
        return sum(float(mix[h, m, n] * bias(pe, weights, h, m, n))
                   for h in range(HEADS) for m in range(length) for n in range(m + 1))

    for name, parameter in encoding.named_parameters():
        flat = weights[name].view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 4)):  # some of each kind
            start = flat[i].item()
            flat[i] = start + step
            above = total()
            flat[i] = start - step
            below = total()
            flat[i] = start
            expected = (above - below) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, i)


# --- the pieces


def test_alibi_slopes_of_6_8_and_12_heads():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert alibi_slopes(12).tolist()[:8] == alibi_slopes(8).tolist()
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor([2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5]))
    for n in range(1, 40):
        torch.testing.assert_close(alibi_slopes(n), torch.tensor(slopes(n)))


def test_t5_buckets_of_distances_0_to_300():
    found = t5_bucket(torch.arange(301))
    assert found.dtype == torch.int64 and found.tolist() == [bucket(n) for n in range(301)]
    assert found[:17].tolist() == list(range(17)) and found[127] == 31 and found[300] == 31
    assert (t5_bucket(torch.arange(-5, 0)) == 0).all()    # the future has no buckets
    assert t5_bucket(torch.tensor([3, 4, 63, 64, 500]), num_buckets=8, max_distance=64).tolist() == [3, 4, 7, 7, 7]


@pytest.mark.parametrize("head_dim, block_size, s", [(32, 128, 16.0), (64, 512, 4.0), (128, 4096, 2.5)])
def test_ends_of_the_spectrum_under_each_scaling(head_dim, block_size, s):
    def theta(scaling, factor):
        return spectrum(head_dim, block_size=block_size, rope_scaling=scaling, rope_factor=factor)

    plain = theta("none", s)
    for scaling in SCALINGS:
        torch.testing.assert_close(theta(scaling, 1.0), plain)
    torch.testing.assert_close(theta("pi", s), plain / s)
    for scaling in ("ntk", "yarn"):
        assert theta(scaling, s)[0] == plain[0]           # the fastest pair is left alone
        torch.testing.assert_close(theta(scaling, s)[-1], plain[-1] / s, rtol=1e-6, atol=0)
        assert (theta(scaling, s).diff() < 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim, block_size", [(128, 4096), (64, 512), (32, 128)])
def test_scaled_frequencies_of_real_models_equal_the_reference(head_dim, block_size, scaling):
    found = spectrum(head_dim, block_size=block_size, rope_scaling=scaling, rope_factor=8.0)
    expected = [scaled_angle(j, scaling, 8.0, head_dim, block_size) for j in range(head_dim // 2)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_yarn_keeps_pairs_of_over_32_turns_and_divides_those_under_one():
    theta, scaled = (spectrum(128, block_size=4096, rope_scaling=name, rope_factor=8.0) for name in ("none", "yarn"))
    turns, ratio = theta * 4096 / (2 * math.pi), scaled / theta
    torch.testing.assert_close(ratio[turns > 34], torch.ones_like(ratio[turns > 34]))
    torch.testing.assert_close(ratio[turns < 0.9], torch.full_like(ratio[turns < 0.9], 1 / 8))
    assert ((ratio > 1 / 8) & (ratio < 1)).sum() > 10     # and a ramp between


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("pe", ["prope", "hope"])
def test_scaling_does_not_change_which_pairs_turn(pe, scaling):
    kept = [spectrum(64, pe, block_size=128, rope_scaling=s, rope_factor=16.0) > 0 for s in ("none", scaling)]
    assert torch.equal(*kept)


@pytest.mark.parametrize("pe", ROTARY)
@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_a_factor_of_1_changes_nothing(pe, scaling):
    idx = torch.randint(50, (1, 20))
    torch.testing.assert_close(tiny(pe, rope_scaling=scaling)(idx)[0], tiny(pe)(idx)[0])


@pytest.mark.parametrize("pe", PE)
def test_logn_changes_nothing_inside_the_trained_context_and_something_past_it(pe):
    idx = torch.randint(50, (1, 32 if pe == "learned" else 60))
    plain, scaled = (tiny(pe, attn_scaling=scaling)(idx, idx)[0] for scaling in ("none", "logn"))
    torch.testing.assert_close(plain[:, :32], scaled[:, :32])
    assert pe == "learned" or (plain[:, 40:] - scaled[:, 40:]).abs().max() > 1e-3


@pytest.mark.parametrize("stored", [-1.0, 0.0, 0.005])
def test_kerple_uses_at_least_0_01_whatever_is_stored_and_keeps_a_gradient(stored):
    encoding = tiny("kerple").transformer.wpe
    with torch.no_grad():
        encoding.r1.fill_(stored)
        encoding.r2.fill_(1.0)
    positions = torch.arange(5)
    bias = encoding.bias(positions, positions)
    assert (bias[:, 4, 0] <= -0.01 * math.log(5)).all()
    bias.sum().backward()
    assert (encoding.r1.grad != 0).all() and encoding.r1[0] == stored
