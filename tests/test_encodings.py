"""
The positional encodings of model.py against references that share no code with it: complex numbers for rotations,
plain loops for the rest.

    python -m pytest tests/test_encodings.py
"""
import cmath
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, PE, GPTConfig, RoPE, alibi_slopes, frequencies, rotate, t5_bucket
from tests.conftest import all_logits, tiny

ROTARY = [pe for pe in PE if issubclass(PE[pe], RoPE)]
WITHOUT_BIAS = {"nope", "learned", "sinusoidal"}
SCALINGS = ["none", "pi", "ntk", "yarn"]
L, HEADS, WIDTH = 16, 6, 60  # six heads: no power of two; ten channels per head: an odd number of pairs


# --- the references, written from the papers; tests/test_model.py builds a whole network on them


def missing(pe):
    pytest.fail(f"write a reference for {pe} in tests/test_encodings.py: what it adds to a logit in bias(), how many "
                "pairs it rotates in kept_pairs(), or what it does to an embedding in embedded() (and then add it to "
                "WITHOUT_BIAS)", pytrace=False)


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
        keep = 1 - min(1, max(0, (j - low) / (high - low)))
        return theta * keep + theta / s * (1 - keep)
    return theta


def kept_pairs(pe, base, block_size, head_dim):
    kept = {"rope": head_dim // 2, "prope": int(0.75 * head_dim // 2),
            "hope": sum(base ** (-2 * j / head_dim) * block_size >= 2 * math.pi for j in range(head_dim // 2))}
    return kept[pe] if pe in kept else missing(pe)


def angles(pe, scaling="none", s=1.0, base=10000.0, block_size=L, head_dim=WIDTH // HEADS):
    """Angle per token of each pair that is rotated, fastest first."""
    n_rotated = kept_pairs(pe, base, block_size, head_dim) if pe in ROTARY else 0
    return [scaled(j, scaling, s, base, block_size, head_dim) for j in range(n_rotated)]


def rotated(x, positions, angles):
    """Queries or keys (..., T, D) float64 -> their pairs of channels as turned complex numbers (..., T, D / 2)."""
    z = torch.complex(*x.chunk(2, dim=-1))
    for t, n in enumerate(positions):
        for j, angle in enumerate(angles):
            z[..., t, j] *= cmath.exp(1j * n * angle)
    return z


def slopes(n_head):
    power = 1
    while power * 2 <= n_head:
        power *= 2
    exact = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    double = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return exact + double[::2][:n_head - power]


def bucket(n):
    if n < 16:
        return n
    return min(31, 16 + math.floor(math.log(n / 16) / math.log(128 / 16) * 16 + 1e-9))


def bias(pe, learned, m, n):
    """What is added to the logits of query m and key n: one number per head, or one for all; learned: in float64."""
    distance = m - n
    if pe == "alibi":
        return -torch.tensor(slopes(HEADS), dtype=torch.float64) * distance
    if pe == "t5":
        return learned["table"][bucket(distance)]
    if pe == "kerple":
        return -learned["r1"] * torch.log(1 + learned["r2"] * distance)
    if pe == "fire":
        def psi(x):
            return math.log(abs(learned["c"]) * x + 1)
        x = psi(distance) / (psi(max(m, abs(learned["multiplier"] * L))) + 1e-6)
        hidden = (learned["weight_1"] * x + learned["bias_1"]).clamp(min=0)
        return learned["weight_2"] @ hidden + learned["bias_2"]
    return 0.0 if pe in WITHOUT_BIAS or pe in ROTARY else missing(pe)


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
    encoding = tiny(pe, n_head=HEADS, n_embd=WIDTH, n_layer=1, **{"block_size": L, **changes}).transformer.wpe
    return encoding, {name: value.detach().double() for name, value in encoding.named_parameters()}


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
def test_what_is_added_to_logits_and_embeddings_equals_the_reference(pe):
    """For queries 30 to 36 and keys 5 to 36, as the cache of a layer with a window has them."""
    encoding, learned = encoding_of(pe, block_size=37 if pe == "learned" else L)
    q_pos, k_pos = torch.arange(30, 37), torch.arange(5, 37)
    added = encoding.bias(q_pos, k_pos)
    added = torch.zeros(HEADS, 7, 32) if added is None else added
    expected = added.double()  # values for keys in the future are ignored
    for m in range(30, 37):
        for n in range(5, m + 1):
            expected[:, m - 30, n - 5] = bias(pe, learned, m, n)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added.double(), expected, atol=1e-5, rtol=0)
    x = torch.randn(2, 7, WIDTH)
    expected = [[embedded(pe, learned, token, n) for n, token in enumerate(row, start=30)] for row in x.double()]
    torch.testing.assert_close(encoding.embed(x, q_pos).double(), torch.stack([*map(torch.stack, expected)]),
                               atol=1e-5, rtol=0)
    assert encoding.to(torch.bfloat16).embed(x.to(torch.bfloat16), q_pos).dtype == torch.bfloat16


@pytest.mark.parametrize("pe", ["t5", "kerple", "fire"])
def test_gradients_of_learned_biases_equal_finite_differences_of_the_reference(pe):
    encoding, learned = encoding_of(pe)
    positions, step = torch.arange(9), 1e-6
    mix = torch.randn(HEADS, 9, 9, dtype=torch.float64).tril()
    (encoding.bias(positions, positions) * mix).sum().backward()

    def total():
        return sum(float((mix[:, m, n] * bias(pe, learned, m, n)).sum()) for m in range(9) for n in range(m + 1))

    for name, parameter in encoding.named_parameters():
        flat = learned[name].view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 4)):  # some of each kind
            start, sums = flat[i].item(), []
            for value in (start + step, start - step, start):
                flat[i] = value
                sums.append(total())
            expected = (sums[0] - sums[1]) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, i)


@pytest.mark.parametrize("pe", ["sinusoidal", "rope", "prope", "hope", "alibi"])
def test_fixed_numbers_follow_the_device_of_the_positions_and_are_never_rounded(pe):
    """They are no part of the model's state, so a compiled model need not be compiled again."""
    def act(model, device):
        encoding, pos = model.transformer.wpe, torch.arange(1001, device=device)
        x = torch.zeros(1, 1001, 32, device=device)
        return encoding.embed(x, pos), *(encoding.rotary(pos) or ()), encoding.bias(pos, pos)

    exact = act(tiny(pe), "cpu")
    for a, b in zip(exact, act(tiny(pe).to(torch.bfloat16), "cpu")):
        assert a is b is None or torch.equal(a, b) and b.dtype == torch.float32
    assert all(x is None or x.device.type == "meta" for x in act(tiny(pe).to("meta"), "meta"))


@pytest.mark.parametrize("pe", PE)
def test_under_autocast_angles_and_biases_are_float32_and_only_the_mask_is_rounded(pe):
    model, pos = tiny(pe), torch.arange(32)
    exact = model.layer_positions("L", pos, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotary, mask, *_ = model.layer_positions("L", pos, 0)
    assert all(map(torch.equal, rotary or (), exact.rotary or ()))
    assert mask is exact.mask is None or torch.equal(mask, exact.mask.to(torch.bfloat16))
    assert mask is None or model.to(torch.bfloat16).layer_positions("L", pos, 0).mask.dtype == torch.bfloat16


# --- which pairs are rotated


def spectrum(head_dim, pe="rope", **changes):
    """theta of all pairs of a head, 0 for those that are not rotated (D / 2,)."""
    theta = PE[pe](GPTConfig(n_embd=head_dim, n_head=1, pe=pe, **changes)).theta
    return F.pad(theta, (0, head_dim // 2 - len(theta)))


def test_rope_frequencies_are_powers_of_the_base():
    expected = [1 / 10000 ** (2 * j / 24) for j in range(12)]
    torch.testing.assert_close(frequencies(24), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(spectrum(24), frequencies(24).float())


@pytest.mark.parametrize("head_dim, block_size, base, kept", [
    (64, 128, 1e4, 11), (64, 256, 1e4, 13), (64, 512, 1e4, 16), (64, 1024, 1e4, 18), (64, 2048, 1e4, 21),
    (64, 4096, 1e4, 23), (64, 8192, 1e4, 25), (128, 4096, 1e4, 46), (128, 4096, 5e5, 32), (256, 8192, 1e4, 100)])
def test_hope_keeps_as_many_pairs_as_the_paper_says(head_dim, block_size, base, kept):
    theta = spectrum(head_dim, "hope", block_size=block_size, rope_base=base)
    assert theta.dtype == torch.float32 and theta.shape == (head_dim // 2,)
    expected = [base ** (-2 * j / head_dim) * block_size >= 2 * math.pi for j in range(head_dim // 2)]
    assert [t > 0 for t in theta.tolist()] == expected and sum(expected) == kept


@pytest.mark.parametrize("cutoff", [0.5, 1, 2, 4, 512 / (2 * math.pi)])  # the last: as many turns as the fastest pair
def test_hope_cutoff_counts_turns_inside_the_context(cutoff):
    theta = spectrum(64, "hope", block_size=512, hope_cutoff=cutoff)
    turns = [512 / (2 * math.pi * 10000 ** (2 * j / 64)) for j in range(32)]
    assert [t > 0 for t in theta.tolist()] == [n >= cutoff for n in turns] and theta[0] == 1


def test_prope_keeps_the_fastest_int_of_p_d_over_2_pairs_and_does_not_respread_them():
    for head_dim, p in [(256, 0.75), (64, 0.25), (10, 0.5)]:
        kept = int(p * head_dim // 2)
        theta = spectrum(head_dim, "prope", prope_fraction=p)
        assert torch.equal(theta[:kept], spectrum(head_dim)[:kept])
        assert (theta[kept:] == 0).all()


def test_prope_with_p_1_is_rope_and_with_p_0_is_nope():
    idx = torch.randint(50, (2, 40))
    assert torch.equal(all_logits(tiny("prope", prope_fraction=1.0), idx), all_logits(tiny("rope"), idx))
    for changes in ({}, {"rope_scaling": "yarn", "rope_factor": 4.0}):  # whose temperature is for layers that rotate
        assert torch.equal(all_logits(tiny("prope", prope_fraction=0.0, **changes), idx), all_logits(tiny("nope"), idx))
    half = all_logits(tiny("prope", prope_fraction=0.5), idx)
    assert not torch.allclose(half, all_logits(tiny("rope"), idx), atol=1e-3)


def test_hope_with_a_very_long_context_is_rope_and_with_one_below_2_pi_is_nope():
    idx = torch.randint(50, (2, 40))
    assert torch.equal(all_logits(tiny("hope", block_size=10**6), idx), all_logits(tiny("rope"), idx))
    assert torch.equal(all_logits(tiny("hope", block_size=6), idx), all_logits(tiny("nope"), idx))
    assert not torch.allclose(all_logits(tiny("hope"), idx), all_logits(tiny("rope"), idx), atol=1e-3)


# --- scalings


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim, block_size, s, base", [
    (32, 128, 16.0, 1e4), (64, 512, 4.0, 1e4), (128, 4096, 2.5, 1e4), (32, 128, 8.0, 1e4), (64, 512, 8.0, 1e4),
    (128, 4096, 8.0, 1e4), (64, 512, 1.0, 1e4), (32, 128, 8.0, 4.0)])  # the last: yarn's ramp ends beyond all pairs
def test_scaled_frequencies_of_real_models_equal_the_reference(head_dim, block_size, s, base, scaling):
    plain, found = (spectrum(head_dim, block_size=block_size, rope_scaling=name, rope_factor=s, rope_base=base)
                    for name in ("none", scaling))
    expected = angles("rope", scaling, s, base, block_size, head_dim)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)
    assert (found.diff() < 0).all()
    if scaling in ("ntk", "yarn") and base == 1e4:  # the fastest pair is left alone, the slowest is divided by s
        assert found[0] == plain[0]
        torch.testing.assert_close(found[-1], plain[-1] / s, rtol=1e-6, atol=0)


def test_yarn_keeps_pairs_of_over_32_turns_and_divides_those_under_one():
    theta, scaled = (spectrum(128, block_size=4096, rope_scaling=name, rope_factor=8.0) for name in ("none", "yarn"))
    turns, ratio = theta * 4096 / (2 * math.pi), scaled / theta
    torch.testing.assert_close(ratio[turns > 34], torch.ones_like(ratio[turns > 34]))
    torch.testing.assert_close(ratio[turns < 0.9], torch.full_like(ratio[turns < 0.9], 1 / 8))
    assert ((ratio > 1 / 8) & (ratio < 1)).sum() > 10  # and a ramp between


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("pe, kept", [("rope", 32), ("prope", 24), ("hope", 11)])
def test_the_scalings_start_from_rope_context_and_do_not_change_which_pairs_turn(pe, kept, scaling):
    scaled = dict(rope_scaling=scaling, rope_factor=16.0)
    longer = spectrum(64, pe, block_size=512, rope_context=128, **scaled)
    assert torch.equal(longer, spectrum(64, pe, block_size=128, **scaled)) and (longer > 0).sum() == kept


# --- biases and their initial values


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
    assert (t5_bucket(torch.arange(-5, 0)) == 0).all()  # the future has no buckets
    assert t5_bucket(torch.tensor([3, 4, 63, 64, 500]), num_buckets=8, max_distance=64).tolist() == [3, 4, 7, 7, 7]


def test_t5_starts_as_nope():
    idx, logits = torch.randint(50, (1, 20)), []
    for pe in ("t5", "nope"):
        torch.manual_seed(0)
        logits.append(all_logits(GPT(GPTConfig(pe=pe, vocab_size=50)).eval(), idx))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)  # the kernel takes another path


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


def test_kerple_starts_uniform_between_0_and_2_and_between_0_and_1():
    encoding = GPT(GPTConfig(pe="kerple", n_head=500, n_embd=1000, n_layer=1)).transformer.wpe
    for values, end in ((encoding.r1, 2), (encoding.r2, 1)):
        counts = torch.histc(values.detach(), 5, 0, end)  # how many of the 500 heads are in each fifth
        assert counts.sum() == 500 and counts.min() > 60 and counts.max() < 145


def test_fire_starts_with_its_threshold_at_l_and_as_a_fresh_network_of_linear_layers():
    L, q_pos = 64, torch.arange(200)
    encoding = GPT(GPTConfig(pe="fire", block_size=L, n_head=200, n_embd=200, n_layer=1)).transformer.wpe
    by_distance = encoding.bias(q_pos, q_pos[:1])[:, :, 0]  # (H, Tq): query at n, key at 0
    network = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 200))
    for layer, weight, bias in ((network[0], encoding.weight_1[:, None], encoding.bias_1),
                                (network[2], encoding.weight_2, encoding.bias_2)):
        for own, fresh in ((weight, layer.weight), (bias, layer.bias)):
            assert own.std().item() == pytest.approx(fresh.std().item(), rel=0.4 if fresh.numel() < 100 else 0.1)
            own_end, fresh_end = own.abs().max().item(), fresh.abs().max().item()  # uniform: up to the same bound
            assert own_end == pytest.approx(fresh_end, rel=0.15)
            with torch.no_grad():
                fresh.copy_(own)
    x = torch.log1p(0.1 * q_pos) / torch.log1p(0.1 * q_pos.clamp(min=L))  # the paper's c = 0.1
    torch.testing.assert_close(by_distance.T, network(x[:, None]), atol=1e-5, rtol=0)


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


# A number of bfloat16 has 8 bits of mantissa (relative rounding error up to 2^-9), one of float16 has 11 (2^-12). Every
# layer rounds its input, its products and its output, and with attention far from uniform, as here, a logit's error is
# multiplied by the softmax. Ten roundings' worth, relative to the spread of the logits, is what we allow.
TOLERANCE = {torch.bfloat16: 10 * 2 ** -9, torch.float16: 10 * 2 ** -12}


@pytest.mark.parametrize("how", ["autocast", "to"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pe", PE)
def test_sixteen_bits_stay_near_float32_far_past_the_trained_context(pe, dtype, how):
    idx = torch.randint(50, (2, 32 if pe == "learned" else 8 * 32))
    exact = all_logits(tiny(pe), idx)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        rounded = all_logits(tiny(pe).to(torch.float32 if how == "autocast" else dtype), idx)
    error = (rounded.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert error < TOLERANCE[dtype]
