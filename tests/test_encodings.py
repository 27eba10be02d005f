"""The encodings of model.py against references that share no code with it: complex numbers for
rotations, plain loops for the rest."""
import cmath
import math

import pytest
import torch
from torch.nn import functional as F

from model import PE, ROTARY, GPTConfig, alibi_slopes, frequencies, rotate, t5_bucket
from tests.conftest import all_logits, tiny

SCALINGS = ["none", "pi", "ntk", "yarn"]
# Six heads are no power of two. Their ten channels are an odd number of pairs.
L, HEADS, WIDTH = 16, 6, 60
SIX_SLOPES = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]  # ALiBi's, from the authors' code


# --- the references, written from the papers; tests/test_model.py builds a whole network on them


def scaled(j, scaling, s, base, block_size, head_dim):
    """Angle per token of pair j when s trained contexts are to look like one."""
    theta = base ** (-2 * j / head_dim)
    if scaling == "pi":
        return theta / s
    if scaling == "ntk":
        return (base * s ** (head_dim / (head_dim - 2))) ** (-2 * j / head_dim)
    if scaling == "yarn":
        def index_of(turns):  # where on the spectrum a pair would have so many turns in L
            return head_dim * math.log(block_size / (turns * 2 * math.pi)) / (2 * math.log(base))
        low, high = max(0, math.floor(index_of(32))), min(head_dim - 1, math.ceil(index_of(1)))
        keep = 1 - min(1, max(0, (j - low) / max(0.001, high - low)))
        return theta * keep + theta / s * (1 - keep)
    return theta


def kept_pairs(pe, base, block_size, head_dim):
    turns = [base ** (-2 * j / head_dim) * block_size / (2 * math.pi) for j in range(head_dim // 2)]
    return {"rope": head_dim // 2, "prope": int(0.75 * head_dim // 2),
            "hope": sum(n >= 1 for n in turns)}[pe]


def angles(pe, scaling="none", s=1.0, base=10000.0, block_size=L, head_dim=WIDTH // HEADS):
    """Angle per token of each pair that is rotated, fastest first."""
    n_rotated = kept_pairs(pe, base, block_size, head_dim) if pe in ROTARY else 0
    return [scaled(j, scaling, s, base, block_size, head_dim) for j in range(n_rotated)]


def rotated(x, positions, angles):
    """Queries or keys (..., T, D) float64 -> their pairs as complex numbers (..., T, D / 2)."""
    z = torch.complex(*x.chunk(2, dim=-1))
    for t, n in enumerate(positions):
        for j, angle in enumerate(angles):
            z[..., t, j] *= cmath.exp(1j * n * angle)
    return z


def bucket(n):
    if n < 16:
        return n
    return min(31, 16 + math.floor(math.log(n / 16) / math.log(128 / 16) * 16 + 1e-9))


def bias(pe, learned, m, n):
    """What is added to the logits of query m and key n: a number per head, or one for all.

    learned: the values that the encoding has learned, float64."""
    distance = m - n
    if pe == "alibi":
        return -torch.tensor(SIX_SLOPES, dtype=torch.float64) * distance
    if pe == "t5":
        return learned["table"][bucket(distance)]
    if pe == "kerple":
        return -learned["r1"] * torch.log(1 + learned["r2"] * distance)
    if pe == "fire":
        def psi(x):
            return torch.log(abs(learned["c"]) * x + 1)
        x = psi(distance) / (psi(max(m, abs(learned["multiplier"] * L))) + 1e-6)
        hidden = (learned["weight_1"] * x + learned["bias_1"]).clamp(min=0)
        return learned["weight_2"] @ hidden + learned["bias_2"]
    return 0.0


def embedded(pe, learned, token, n):
    """The embedding (C,) of a token at position n, before the first layer."""
    if pe == "learned":
        return token + learned["weight"][n]
    if pe == "sinusoidal":
        C = len(token)
        wave = [(math.sin, math.cos)[c % 2](n / 10000 ** (2 * (c // 2) / C)) for c in range(C)]
        return token * math.sqrt(C) + torch.tensor(wave, dtype=torch.float64)
    return token


# --- the three places at which an encoding acts


def encoding_of(pe, **changes):
    """An encoding with learned values away from where they start, and these in float64."""
    sizes = dict(n_head=HEADS, n_embd=WIDTH, n_layer=1, block_size=L)
    encoding = tiny(pe, **{**sizes, **changes}).transformer.wpe
    for parameter in encoding.parameters():
        if parameter.dim() == 0:  # FIRE's c and multiplier, whose sign does not count
            parameter.data.neg_()
    return encoding, {name: x.detach().double() for name, x in encoding.named_parameters()}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("pe", ROTARY)
def test_rotation_is_a_product_of_complex_numbers(pe, scaling):
    encoding, _ = encoding_of(pe, rope_scaling=scaling, rope_factor=4.0)
    positions = [0, 1, 5, 15, 16, 77]  # past L too
    x = torch.randn(2, HEADS, len(positions), WIDTH // HEADS)
    cos, sin = encoding.rotary(torch.tensor(positions))
    turned = torch.complex(*rotate(x, cos, sin).double().chunk(2, dim=-1))
    expected = rotated(x.double(), positions, angles(pe, scaling, 4.0))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)
    x = x.to(torch.bfloat16)  # of which only the result is rounded
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).to(torch.bfloat16))


@pytest.mark.parametrize("pe", PE)
def test_a_bias_equals_its_formula_pair_by_pair(pe):
    """For queries 30 to 36 and keys 5 to 36, as the cache of a layer with a window has them."""
    encoding, learned = encoding_of(pe)
    added = encoding.bias(torch.arange(30, 37), torch.arange(5, 37))
    added = torch.zeros(HEADS, 7, 32) if added is None else added
    expected = added.double()  # values for keys in the future are ignored
    for m in range(30, 37):
        for n in range(5, m + 1):
            expected[:, m - 30, n - 5] = bias(pe, learned, m, n)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pe", ["t5", "kerple", "fire"])
def test_gradients_of_learned_biases_equal_those_of_the_reference(pe):
    encoding, learned = encoding_of(pe)
    positions, mix = torch.arange(9), torch.randn(HEADS, 9, 9, dtype=torch.float64).tril()
    (encoding.bias(positions, positions) * mix).sum().backward()
    for value in learned.values():
        value.requires_grad_()
    sum((mix[:, m, n] * bias(pe, learned, m, n)).sum()
        for m in range(9) for n in range(m + 1)).backward()
    for name, parameter in encoding.named_parameters():
        expected = learned[name].grad
        torch.testing.assert_close(parameter.grad.double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pe", PE)
def test_under_autocast_angles_and_biases_are_float32_and_only_the_mask_is_rounded(pe):
    model, pos = tiny(pe), torch.arange(32)
    exact = model.layer_positions("L", pos, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotary, mask, *_ = model.layer_positions("L", pos, 0)
    assert all(map(torch.equal, rotary or (), exact.rotary or ()))
    assert mask is exact.mask is None or torch.equal(mask, exact.mask.to(torch.bfloat16))
    converted = model.to(torch.bfloat16).layer_positions("L", pos, 0).mask
    assert mask is None or converted.dtype == torch.bfloat16


# --- which pairs are rotated


def spectrum(head_dim, pe="rope", **changes):
    """theta of all pairs of a head, 0 for those that are not rotated (D / 2,)."""
    theta = PE[pe](GPTConfig(n_embd=head_dim, n_head=1, pe=pe, **changes)).theta
    return F.pad(theta, (0, head_dim // 2 - len(theta)))


@pytest.mark.parametrize("head_dim, block_size, base, kept", [
    (64, 128, 1e4, 11), (64, 256, 1e4, 13), (64, 512, 1e4, 16), (64, 1024, 1e4, 18),
    (64, 2048, 1e4, 21), (64, 4096, 1e4, 23), (64, 8192, 1e4, 25), (128, 4096, 1e4, 46),
    (128, 4096, 5e5, 32), (256, 8192, 1e4, 100)])
def test_hope_keeps_as_many_pairs_as_the_paper_says(head_dim, block_size, base, kept):
    theta = spectrum(head_dim, "hope", block_size=block_size, rope_base=base)
    assert frequencies(head_dim).dtype == torch.float64  # rounding could change their number
    assert kept == kept_pairs("hope", base, block_size, head_dim)
    assert [t > 0 for t in theta.tolist()] == [True] * kept + [False] * (head_dim // 2 - kept)


# the last: as many turns as the fastest pair has
@pytest.mark.parametrize("cutoff", [0.5, 1, 2, 4, 512 / (2 * math.pi)])
def test_hope_cutoff_counts_turns_inside_the_context(cutoff):
    theta = spectrum(64, "hope", block_size=512, hope_cutoff=cutoff)
    turns = [512 / (2 * math.pi * 10000 ** (2 * j / 64)) for j in range(32)]
    assert [t > 0 for t in theta.tolist()] == [n >= cutoff for n in turns] and theta[0] == 1


def test_prope_keeps_the_fastest_int_of_p_d_over_2_pairs_and_does_not_respread_them():
    for head_dim, p in [(256, 0.75), (64, 0.25), (10, 0.5), (64, 1.0), (64, 0.0)]:
        kept = int(p * head_dim // 2)
        theta = spectrum(head_dim, "prope", prope_fraction=p)
        assert torch.equal(theta[:kept], spectrum(head_dim)[:kept])
        assert (theta[kept:] == 0).all()


def test_hope_with_a_very_long_context_is_rope_and_with_one_below_2_pi_is_nope():
    idx = torch.randint(50, (2, 40))
    rope, nope, hope, long, short = (all_logits(tiny(pe, **changes), idx) for pe, changes in (
        ("rope", {}), ("nope", {}), ("hope", {}), ("hope", dict(block_size=10**6)),
        ("hope", dict(block_size=6, rope_scaling="yarn", rope_factor=4.0))))
    assert torch.equal(long, rope) and torch.equal(short, nope)
    assert not torch.allclose(hope, rope, atol=1e-3)


# --- scalings


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim, block_size, s, base", [
    (32, 128, 16.0, 1e4), (64, 512, 4.0, 1e4), (128, 4096, 2.5, 1e4), (64, 512, 1.0, 1e4),
    (16, 6, 4.0, 1e4), (32, 128, 8.0, 4.0)])  # yarn's ramp: no width; beyond all pairs
def test_scaled_frequencies_equal_the_reference(head_dim, block_size, s, base, scaling):
    found = spectrum(head_dim, block_size=block_size, rope_scaling=scaling, rope_factor=s,
                     rope_base=base)
    expected = angles("rope", scaling, s, base, block_size, head_dim)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("pe, kept", [("rope", 32), ("prope", 24), ("hope", 11)])
def test_scalings_start_from_rope_context_and_do_not_change_which_pairs_turn(pe, kept, scaling):
    scaled = dict(rope_scaling=scaling, rope_factor=16.0)
    longer = spectrum(64, pe, block_size=512, rope_context=128, **scaled)
    assert torch.equal(longer, spectrum(64, pe, block_size=128, **scaled))
    assert (longer > 0).sum() == kept


# --- biases and their initial values


def test_alibi_slopes_of_8_and_12_heads():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    twelve = torch.tensor([*eight, 2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])
    assert alibi_slopes(8).tolist() == eight
    torch.testing.assert_close(alibi_slopes(12), twelve)


def test_t5_buckets_of_distances_0_to_300():
    found = t5_bucket(torch.arange(301))
    assert found.dtype == torch.int64 and found.tolist() == [bucket(n) for n in range(301)]
    assert (t5_bucket(torch.arange(-5, 0)) == 0).all()  # the future has no buckets


def test_kerple_reflects_values_below_0_01_and_keeps_their_gradient():
    encoding, positions = tiny("kerple").transformer.wpe, torch.arange(5)
    encoding.r2.data.fill_(1.0)
    for stored, used in ((-1.0, 1.02), (0.0, 0.02), (0.005, 0.015), (0.5, 0.5)):
        encoding.r1.data.fill_(stored)
        bias = encoding.bias(positions, positions)[:, 4, 0]
        torch.testing.assert_close(bias, torch.full((2,), -used * math.log(5)))
        [gradient] = torch.autograd.grad(bias.sum(), encoding.r1)
        assert (gradient != 0).all()


def fresh(pe):
    """An encoding of many heads, as it starts."""
    return PE[pe](GPTConfig(pe=pe, n_head=500, n_embd=1000))


def test_t5_starts_as_nope_and_kerple_uniform_between_0_and_2_and_between_0_and_1():
    assert (fresh("t5").table == 0).all()
    for values, end in ((fresh("kerple").r1, 2), (fresh("kerple").r2, 1)):
        counts = torch.histc(values.detach(), 5, 0, end)  # heads in each fifth of the range
        assert counts.sum() == 500 and counts.min() > 60 and counts.max() < 145


def test_fire_starts_with_its_threshold_at_l_and_with_the_weights_of_fresh_linear_layers():
    """Which PyTorch draws uniformly between plus and minus 1 / sqrt(number of inputs)."""
    encoding = fresh("fire")
    assert encoding.c.item() == pytest.approx(0.1) and encoding.multiplier == 1
    for values, inputs in ((encoding.weight_1, 1), (encoding.bias_1, 1),
                           (encoding.weight_2, 32), (encoding.bias_2, 32)):
        values = values.detach() * math.sqrt(inputs)
        assert 0.8 < values.abs().max() <= 1
        assert values.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.4)


# --- what every encoding must have


# Ten roundings, relative to the spread of the logits. The relative error of one is up to 2^-9 in
# bfloat16 and 2^-12 in float16. Every layer rounds its input, its products and its output.
TOLERANCE = {torch.bfloat16: 10 * 2 ** -9, torch.float16: 10 * 2 ** -12}


@pytest.mark.parametrize("how", ["autocast", "to"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pe", PE)
def test_sixteen_bits_stay_near_float32_far_past_the_trained_context(pe, dtype, how):
    idx = torch.randint(50, (2, 32 if pe == "learned" else 8 * 32))
    exact, model = all_logits(tiny(pe), idx), tiny(pe)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        rounded = all_logits(model if how == "autocast" else model.to(dtype), idx)
    error = (rounded.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert error < TOLERANCE[dtype]
