"""
The cache and lower precision change nothing that counts: every encoding, every scaling, in pieces of any size.

    python -m pytest tests/test_cache.py
"""
import math

import pytest
import torch

from model import PE, KVCache
from tests.test_encodings import ROTARY, all_logits, tiny

L = 32
VARIANTS = [(pe, "none", attn) for pe in PE for attn in ("none", "logn")]
VARIANTS += [(pe, rope, attn) for pe in ROTARY for rope in ("pi", "ntk", "yarn") for attn in ("none", "logn")]


def variant(pe, rope_scaling, attn_scaling):
    return tiny(pe, rope_scaling=rope_scaling, rope_factor=1.5, attn_scaling=attn_scaling)


@pytest.mark.parametrize("prompt", [1, 7, L, L + 3])
@pytest.mark.parametrize("names", VARIANTS, ids=" ".join)
def test_cached_logits_equal_uncached_ones(names, prompt):
    """A prompt at once, then token by token, then pieces of 3 and of 5: as one pass without a cache gives them."""
    model = variant(*names)
    total = prompt + 11
    if names[0] == "learned":                             # it has nothing past L, cached or not
        total, prompt = min(total, L), min(prompt, L - 11)
    idx, cache = torch.randint(50, (2, total)), KVCache(total)
    with torch.no_grad():
        pieces = [model(part, part, cache)[0] for part in idx.split([prompt, 1, 1, 1, 3, total - prompt - 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), all_logits(model, idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [1, 7, L, L + 3])
@pytest.mark.parametrize("names", VARIANTS, ids=" ".join)
def test_greedy_text_with_the_cache_is_that_without(names, prompt):
    model, idx = variant(*names), torch.randint(50, (1, prompt))
    text = idx
    for _ in range(8):
        context = text[:, -L:] if names[0] == "learned" else text
        with torch.no_grad():
            text = torch.cat((text, model(context)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 8, top_k=1), text)


# A number of bfloat16 has 8 bits of mantissa (relative rounding error up to 2^-9), one of float16 has 11 (2^-12). Every
# layer rounds its input, its products and its output, and with attention far from uniform, as here, a logit's error is
# multiplied by the softmax. Ten roundings' worth, relative to the spread of the logits, is what we allow.
TOLERANCE = {torch.bfloat16: 10 * 2 ** -9, torch.float16: 10 * 2 ** -12}


@pytest.mark.parametrize("how", ["autocast", "to"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pe", PE)
def test_sixteen_bits_stay_near_float32_far_past_the_trained_context(pe, dtype, how):
    idx = torch.randint(50, (2, L if pe == "learned" else 8 * L))
    exact = all_logits(tiny(pe), idx)
    if how == "to":
        rounded = all_logits(tiny(pe).to(dtype), idx)
    else:
        with torch.autocast("cpu", dtype=dtype):
            rounded = all_logits(tiny(pe), idx)
    error = (rounded.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert error < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("pe", PE)
def test_compiled_model_gives_the_same_logits_and_gradients(pe):
    model, idx = tiny(pe), torch.randint(50, (2, L))
    logits, loss = model(idx, idx)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled_logits, compiled_loss = torch.compile(model)(idx, idx)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_logits, logits, atol=1e-4, rtol=0)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)
    assert math.isfinite(loss)
