"""
Layers that see a short window: who sees whom, the encoding of each kind of layer, the cache, the scalings.

    python -m pytest tests/test_windows.py
"""
import itertools
import math

import pytest
import torch

from model import GPT, GPTConfig, KVCache
from tests.test_encodings import all_logits, tiny
from tests.test_references import bias as reference_bias

L, T, HEADS, WIDTH = 16, 24, 6, 60  # what the references of tests/test_references.py are written for
PATTERNS = ["".join(letters) for n in (1, 2, 3, 4) for letters in itertools.product("SL", repeat=n)]
ENCODINGS = [("hope", None), ("nope", "rope"), ("rope", "hope"), ("alibi", "rope"), ("t5", None), ("prope", "kerple"),
             ("sinusoidal", "hope"), ("fire", "nope")]


def windowed(pe="hope", local_pe=None, pattern="SL", window=3, **changes):
    changes = {"block_size": L, "n_head": HEADS, "n_embd": WIDTH, "n_layer": 4, **changes}
    model = tiny(pe, window_pattern=pattern, window=window, local_pe=local_pe, **changes)
    if "wpe_local" in model.transformer:
        with torch.no_grad():
            for parameter in model.transformer.wpe_local.parameters():
                parameter.add_(torch.rand_like(parameter))
    return model


BIASES = ("alibi", "t5", "kerple", "fire")


# --- the reference: GPT-2 in float64, with two loops over who sees whom


def n_rotated(pe):
    hope = sum(10000 ** (-2 * j / 10) * L / (2 * math.pi) >= 1 for j in range(5))
    return {"rope": 5, "prope": 3, "hope": hope}.get(pe, 0)


def rotated(x, pe, base):
    """Channels of a head (T, 10) as complex pairs, each turned by position times theta_j."""
    z = torch.complex(x[:, :5], x[:, 5:])
    for j in range(n_rotated(pe)):
        for n in range(len(x)):
            z[n, j] *= complex(math.cos(n * base ** (-2 * j / 10)), math.sin(n * base ** (-2 * j / 10)))
    return z


def reference(model, idx):
    config = model.config
    w = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = w["transformer.wte.weight"][idx]
    if config.pe == "sinusoidal":
        wave = [[(math.sin, math.cos)[c % 2](n / 10000 ** (2 * (c // 2) / WIDTH)) for c in range(WIDTH)]
                for n in range(len(idx))]
        x = x * math.sqrt(WIDTH) + torch.tensor(wave, dtype=torch.float64)
    for i in range(config.n_layer):
        short = i < config.n_layer - 1 and config.window_pattern[i % len(config.window_pattern)] == "S"
        pe = (config.local_pe or config.pe) if short else config.pe
        base = (config.local_rope_base or config.rope_base) if short else config.rope_base
        module = "wpe_local" if short and "wpe_local" in model.transformer else "wpe"
        learned = {name.split(".")[-1]: value.tolist() for name, value in w.items()
                   if name.startswith(f"transformer.{module}.")}
        layer, heads = f"transformer.h.{i}.", []
        q, k, v = linear(norm(x, layer + "ln_1"), layer + "attn.c_attn").chunk(3, dim=-1)
        for h in range(HEADS):
            cut = slice(10 * h, 10 * h + 10)
            products = (rotated(q[:, cut], pe, base) @ rotated(k[:, cut], pe, base).conj().T).real / math.sqrt(10)
            logits = torch.full((len(idx), len(idx)), -math.inf, dtype=torch.float64)
            for m in range(len(idx)):
                for n in range(m + 1):
                    if not (short and config.window) or m - n < config.window:
                        logits[m, n] = products[m, n]
                        if pe in BIASES:
                            logits[m, n] += reference_bias(pe, learned, h, m, n)
            heads.append(logits.softmax(-1) @ v[:, cut])
        x = x + linear(torch.cat(heads, -1), layer + "attn.c_proj")
        hidden = linear(norm(x, layer + "ln_2"), layer + "mlp.c_fc")
        x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), layer + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("window", [0, 1, 3, L, T + 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_equal_a_reference_with_loops_over_who_sees_whom(pattern, window):
    pe, local_pe = ENCODINGS[(PATTERNS.index(pattern) + window) % len(ENCODINGS)]
    model = windowed(pe, local_pe, pattern, window)
    idx = torch.randint(50, (T if window != L else 20,))
    torch.testing.assert_close(all_logits(model, idx[None])[0].double(), reference(model, idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("encodings", ENCODINGS, ids=str)
def test_every_arrangement_of_encodings_equals_the_reference(encodings):
    model = windowed(*encodings, pattern="SSL", window=5, local_rope_base=500.0, rope_base=3e4)
    if "hope" in encodings:  # the reference's cut is that of base 10000
        model = windowed(*encodings, pattern="SSL", window=5)
    idx = torch.randint(50, (T,))
    torch.testing.assert_close(all_logits(model, idx[None])[0].double(), reference(model, idx), atol=1e-4, rtol=0)


def test_local_rope_base_is_that_of_the_s_layers_alone():
    model = windowed("prope", None, local_rope_base=500.0, rope_base=3e4)
    assert model.transformer.wpe_local.theta[1].item() == pytest.approx(500 ** -0.2)
    assert model.transformer.wpe.theta[1].item() == pytest.approx(3e4 ** -0.2)


# --- what follows from it


@pytest.mark.parametrize("pe", ["hope", "t5", "learned"])
def test_the_pattern_l_is_the_plain_network_to_the_bit(pe):
    idx = torch.randint(50, (2, 30))
    plain = tiny(pe)
    for changes in ({"window_pattern": "L", "window": 4}, {"window_pattern": "LLL", "local_pe": "rope"}):
        assert torch.equal(all_logits(tiny(pe, **changes), idx), all_logits(plain, idx))
        assert tiny(pe, **changes).state_dict().keys() == plain.state_dict().keys()


def test_the_last_layer_sees_everything_and_the_pattern_is_tiled():
    kinds = {pattern: GPTConfig(n_layer=6, window_pattern=pattern).kinds() for pattern in ("S", "SL", "SSSL", "LLS")}
    assert kinds == {"S": "SSSSSL", "SL": "SLSLSL", "SSSL": "SSSLSL", "LLS": "LLSLLL"}


def test_a_token_outside_every_window_changes_nothing_where_no_l_layer_reaches():
    """Two S layers of window 4 reach 6 tokens back; the logits are read before the last layer."""
    model, idx = windowed("hope", "rope", "SSL", 4, n_layer=3), torch.randint(50, (1, T))
    seen = []
    model.transformer.h[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    for changed in (0, 10):
        other = idx.clone()
        other[0, changed] = (other[0, changed] + 1) % 50
        seen.clear()
        model(idx), model(other)
        differs = (seen[0] - seen[1])[0].abs().amax(-1) > 1e-6
        assert differs[changed:changed + 7].all() and not differs[:changed].any() and not differs[changed + 7:].any()


@pytest.mark.parametrize("window", [0, 1, 3, 20, 100])
@pytest.mark.parametrize("encodings", ENCODINGS, ids=str)
def test_cached_logits_equal_uncached_ones_in_chunks_of_any_size(encodings, window):
    model, idx = windowed(*encodings, pattern="SSL", window=window), torch.randint(50, (2, T))
    whole = all_logits(model, idx)
    for sizes in ([1] * T, [20, 1, 1, 2], [4, 4, 4, 12], [T]):
        cache = KVCache(T)
        with torch.no_grad():
            pieces = [model(part, part, cache)[0] for part in idx.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


def test_the_cache_of_an_s_layer_holds_a_window_and_no_more():
    model, cache = windowed(window=5, pattern="SSSL"), KVCache(500)
    with torch.no_grad():
        for part in torch.randint(50, (1, 400)).split(80, dim=1):
            model(part, cache=cache)
    held = [cache.store[block.attn][0].untyped_storage().nbytes() // (4 * WIDTH) for block in model.transformer.h]
    assert held == [4, 4, 4, 500]


@pytest.mark.parametrize("rope_scaling", ["pi", "ntk", "yarn"])
def test_scalings_act_on_the_layers_that_can_see_beyond_the_trained_context(rope_scaling):
    scaled = {"rope_scaling": rope_scaling, "rope_factor": 4.0, "attn_scaling": "logn"}
    pos = torch.arange(64)
    for window, changes in ((8, False), (L, False), (L + 1, True), (0, True)):
        plain, model = windowed("rope", None, window=window), windowed("rope", None, window=window, **scaled)
        short, far = (model.view(kind, pos, 0) for kind in "SL")
        assert torch.equal(short.rotary[0], plain.view("S", pos, 0).rotary[0]) != changes
        assert (short.query_scale is not None) == changes
        assert not torch.equal(far.rotary[0], plain.view("L", pos, 0).rotary[0]) and far.query_scale is not None


def test_yarn_s_temperature_does_not_act_on_layers_that_do_not_rotate():
    model = windowed("nope", "rope", window=0, rope_scaling="yarn", rope_factor=4.0)
    assert model.view("L", torch.arange(40), 0).query_scale is None
    assert model.view("S", torch.arange(40), 0).query_scale[0].item() == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize("changes, words", [
    ({"window_pattern": "SX"}, "letters S and L"), ({"window_pattern": ""}, "letters S and L"),
    ({"window_pattern": "sl"}, "letters S and L"), ({"window": -1}, "window must be at least 0"),
    ({"local_pe": "learned"}, "acts on the embeddings"), ({"local_pe": "sinusoidal"}, "acts on the embeddings"),
    ({"local_pe": "rotary"}, "local_pe must be one of nope"),
    ({"local_rope_base": 1.0}, "local_rope_base must be above 1"),
    ({"pe": "nope", "local_pe": "rope", "n_embd": 60, "n_head": 4}, "odd number"),
    ({"pe": "nope", "local_pe": "alibi", "rope_scaling": "pi"}, "does not rotate")])
def test_a_configuration_of_layers_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**changes)


def test_learned_values_of_both_kinds_of_layers_start_as_alone_and_leave_the_shared_weights():
    def weights(**changes):
        torch.manual_seed(3)
        return GPT(GPTConfig(**changes)).state_dict()
    plain, mixed = weights(pe="nope"), weights(pe="t5", local_pe="kerple", window_pattern="SL", window=4)
    assert all(torch.equal(mixed[name], value) for name, value in plain.items())
    assert set(mixed) - set(plain) == {"transformer.wpe.table", "transformer.wpe_local.r1", "transformer.wpe_local.r2"}
