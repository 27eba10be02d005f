"""The network around the encodings: GPT-2 to the letter, layers that differ, cache, generation.

    python -m pytest tests/test_model.py -m slow          torch.compile with its real compiler
"""
import itertools
import math

import pytest
import torch

from model import GPT, PE, ROTARY, GPTConfig, KVCache
from tests.conftest import all_logits, tiny
from tests.test_encodings import HEADS, WIDTH, L, angles, bias, embedded, rotated

T = 33  # tokens that most tests read: odd, and more than twice L

# --- the reference: GPT-2 in float64, with two loops over who sees whom


def is_short(config, i):
    return i < config.n_layer - 1 and config.window_pattern[i % len(config.window_pattern)] == "S"


def layer_settings(config, i):
    """What differs between layers -> (pe, base, window, scaling, attn_scaling) of layer i."""
    pe, base, window = config.pe, config.rope_base, math.inf
    if is_short(config, i):
        pe, base = config.local_pe or pe, config.local_rope_base or base
        window = config.window or window
    if window <= config.block_size:  # no distance beyond L
        return pe, base, window, "none", "none"
    return pe, base, window, config.rope_scaling, config.attn_scaling


def attention(x, config, i, learned):
    """Queries, keys and values x (T, 3 C) of layer i -> (T, C)."""
    pe, base, window, scaling, logn = layer_settings(config, i)
    T = len(x)
    q, k, v = (part.view(T, HEADS, -1).transpose(0, 1) for part in x.chunk(3, dim=-1))  # (H, T, D)
    turns = angles(pe, scaling, config.rope_factor, base, config.block_size)
    products = (rotated(q, range(T), turns) @ rotated(k, range(T), turns).mH).real
    logits = torch.full((HEADS, T, T), -math.inf, dtype=torch.float64)
    for m in range(T):
        factor = 1 / math.sqrt(WIDTH // HEADS)
        if scaling == "yarn" and turns:
            factor *= (0.1 * math.log(config.rope_factor) + 1) ** 2
        if logn == "logn":
            factor *= max(1.0, math.log(min(m + 1, window)) / math.log(config.block_size))
        for n in range(m + 1):
            if m - n < window:
                logits[:, m, n] = factor * products[:, m, n] + bias(pe, learned, m, n)
    return (logits.softmax(-1) @ v).transpose(0, 1).reshape(T, WIDTH)


def reference(model, idx):
    """Token ids (T,) -> logits (T, V) float64."""
    config = model.config
    w = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def learned(module):
        prefix = f"transformer.{module}."
        return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}

    x = torch.stack([embedded(config.pe, learned("wpe"), w["transformer.wte.weight"][token], n)
                     for n, token in enumerate(idx)])
    for i in range(config.n_layer):
        own = is_short(config, i) and "wpe_local" in model.transformer
        layer, values = f"transformer.h.{i}.", learned("wpe_local" if own else "wpe")
        qkv = linear(norm(x, layer + "ln_1"), layer + "attn.c_attn")
        x = x + linear(attention(qkv, config, i, values), layer + "attn.c_proj")
        hidden = linear(norm(x, layer + "ln_2"), layer + "mlp.c_fc")
        x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), layer + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def network(pe, **changes):
    """A model that the reference can read. Learned positions get an L of T: none exist beyond."""
    sizes = dict(block_size=T if pe == "learned" else L, n_head=HEADS, n_embd=WIDTH, bias=True)
    model = tiny(pe, **sizes | changes)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from their zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PLAIN = [dict(pe=pe, attn_scaling=attn) for pe in PE for attn in ("none", "logn")]
PLAIN += [dict(pe=pe, rope_scaling=rope, rope_factor=2.5, attn_scaling=attn)
          for pe in ROTARY for rope in ("pi", "ntk", "yarn") for attn in ("none", "logn")]
PLAIN += [dict(pe="rope", bias=bias, qkv_bias=qkv) for bias, qkv in (
    (False, None), (False, True), (True, False))]
MIXED = [dict(pe=pe, local_pe=local_pe) for pe, local_pe in (
    ("hope", None), ("nope", "rope"), ("rope", "hope"), ("alibi", "rope"), ("t5", None),
    ("prope", "kerple"), ("sinusoidal", "hope"), ("fire", "nope"), ("prope", None))]
PATTERNS = ["".join(letters) for n in (1, 2, 3) for letters in itertools.product("SL", repeat=n)]
LAYERS = [dict(MIXED[(i + window) % len(MIXED)], window_pattern=pattern, window=window, n_layer=4)
          for i, pattern in enumerate([*PATTERNS, "SSSL"]) for window in (0, 1, 3, L, T + 5)]
LAYERS += [dict(mixed, window_pattern="SSL", window=5, n_layer=4, local_rope_base=500.0,
                rope_base=3e4) for mixed in MIXED]
# a window of more than L tokens is scaled as a layer that sees everything is, a shorter one is not
LAYERS += [dict(pe=pe, local_pe=local_pe, window_pattern="SL", window=window, rope_scaling=rope,
                rope_factor=4.0, attn_scaling="logn")
           for pe, local_pe in (("rope", None), ("nope", "rope"), ("hope", "alibi"))
           for rope in ("pi", "ntk", "yarn") for window in (8, L, L + 1, 0)]


@pytest.mark.parametrize("changes", PLAIN + LAYERS, ids=str)
def test_logits_equal_a_reference_with_loops_over_who_sees_whom(changes):
    model, idx = network(**changes), torch.randint(50, (2, T))
    expected = reference(model, idx[1])
    assert expected.std() > 0.5
    torch.testing.assert_close(all_logits(model, idx)[1].double(), expected, atol=5e-5, rtol=0)


def test_pe_learned_has_the_weight_names_and_shapes_of_nanogpt_and_a_tied_embedding():
    model = GPT(GPTConfig(pe="learned", n_layer=1, vocab_size=50, bias=True))
    C, layer = 128, "transformer.h.0."
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "transformer.wte.weight": (50, C), "transformer.wpe.weight": (128, C),
        layer + "ln_1.weight": (C,), layer + "ln_1.bias": (C,),
        layer + "attn.c_attn.weight": (3 * C, C), layer + "attn.c_attn.bias": (3 * C,),
        layer + "attn.c_proj.weight": (C, C), layer + "attn.c_proj.bias": (C,),
        layer + "ln_2.weight": (C,), layer + "ln_2.bias": (C,),
        layer + "mlp.c_fc.weight": (4 * C, C), layer + "mlp.c_fc.bias": (4 * C,),
        layer + "mlp.c_proj.weight": (C, 4 * C), layer + "mlp.c_proj.bias": (C,),
        "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), "lm_head.weight": (50, C)}
    assert model.transformer.wte.weight is model.lm_head.weight


def test_the_loss_is_each_tokens_or_the_mean_over_targets_that_are_not_minus_one():
    model, idx, targets = tiny("hope"), torch.randint(50, (2, 10)), torch.randint(50, (2, 10))
    logits, loss = model(idx, targets)
    per_token = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, per_token.mean())
    torch.testing.assert_close(model(idx, targets, reduction="none")[1], per_token)
    targets[:, 5:] = -1
    torch.testing.assert_close(model(idx, targets)[1], per_token[:, :5].mean())
    assert model.to(torch.bfloat16)(idx, targets)[1].dtype == torch.float32


def test_without_targets_there_are_the_last_logits_and_no_loss():
    model, idx = tiny("hope"), torch.randint(50, (2, 10))
    last, loss = model(idx)
    assert loss is None and last.shape == (2, 1, 50)
    torch.testing.assert_close(last, all_logits(model, idx)[:, -1:])


# --- initial values and dropout


@pytest.mark.parametrize("changes", [
    *(dict(pe=pe) for pe in PE), dict(pe="rope", bias=True),
    dict(pe="t5", local_pe="kerple", window_pattern="SL"),
    dict(pe="kerple", window_pattern="SL", local_rope_base=50.0)], ids=str)
def test_the_same_seed_gives_the_same_shared_weights_as_nope(changes):
    def weights(**changes):
        torch.manual_seed(7)
        return GPT(GPTConfig(**changes)).state_dict()

    plain, own = weights(pe="nope"), weights(**changes)
    assert plain.keys() <= own.keys()
    assert all(torch.equal(own[name], plain[name]) for name in plain)
    assert ("transformer.wpe_local.r1" in own) == ("local_pe" in changes)


@pytest.mark.parametrize("n_layer", [2, 8])
def test_matrices_that_write_to_the_residual_stream_start_smaller_the_more_there_are(n_layer):
    model = GPT(GPTConfig(pe="learned", n_embd=256, n_layer=n_layer, vocab_size=1000, bias=True))
    expected = {"wte": 0.02, "wpe": 0.02, "lm_head": 0.02, "c_attn": 0.02, "c_fc": 0.02,
                "c_proj": 0.02 / math.sqrt(2 * n_layer)}
    for name, parameter in model.named_parameters():
        module, kind = name.split(".")[-2:]
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(expected[module], rel=0.05), name
        else:  # biases start at zero, and norms at one
            assert (parameter == float("ln" in module and kind == "weight")).all(), name


def test_dropout_acts_on_embeddings_and_on_the_outputs_of_attention_and_mlp():
    model, places = tiny("nope", dropout=0.3, n_layer=1).train(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda module, *_, name=name: places.append((name, module.p)))
    model(torch.randint(50, (8, 32)))
    layer = "transformer.h.0."
    assert places == [("transformer.drop", 0.3), (layer + "attn.resid_dropout", 0.3),
                      (layer + "mlp.dropout", 0.3)]


def test_dropout_acts_on_attention_weights():
    """The first token has one weight, 1. With values of 1, an output is 0 or 1 / (1 - p)."""
    model, outputs = tiny("nope", dropout=0.3, n_layer=1, qkv_bias=True).train(), []
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.fill_(1.0)
    attn.c_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(torch.randint(50, (4000, 1)))
    one_per_head = outputs[0][:, 0, [0, 16]]
    kept = one_per_head[one_per_head != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7))
    assert len(kept) / 8000 == pytest.approx(0.7, abs=5 * math.sqrt(0.7 * 0.3 / 8000))


# --- the cache and generation

IN_PIECES = [[T], [1] * T, [7, 1, T - 8], [T - 1, 1], [20, 1, 1, T - 22], [4, 4, 4, T - 12],
             *([prompt, 1, 1, 1, 3, T - prompt - 6] for prompt in (1, 7, L, L + 3))]
CACHED = PLAIN + [
    dict(mixed, window_pattern="SSL", window=window, n_layer=4, attn_scaling="logn")
    for mixed in MIXED for window in (0, 1, 3, 20, 100)]


@pytest.mark.parametrize("changes", CACHED, ids=str)
def test_cached_logits_equal_uncached_ones_in_chunks_of_any_size(changes):
    model, idx = network(**changes), torch.randint(50, (2, T))
    whole = all_logits(model, idx)
    for sizes in IN_PIECES:
        cache = KVCache(T)
        pieces = [model(part, part, cache)[0] for part in idx.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
        assert cache.length == T


def test_the_cache_of_an_s_layer_holds_a_window_and_no_gradients():
    model = network("hope", window_pattern="SSSL", window=5, n_layer=4)
    cache = KVCache(500)
    for part in torch.randint(50, (1, 400)).split(80, dim=1):
        model(part, cache=cache)
    held = [cache.store[block.attn] for block in model.transformer.h]
    room = [keys.untyped_storage().nbytes() // (4 * WIDTH) for keys, _ in held]
    assert room == [4, 4, 4, 500]
    assert not any(stored.requires_grad for pair in held for stored in pair)


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_generation_goes_past_block_size_and_equals_uncached_greedy_decoding(changes):
    model = tiny(**changes)  # L = 32
    for prompt in (1, 7, 28, 32, 35):
        text = idx = torch.randint(50, (2, prompt))
        for _ in range(8):
            context = text[:, -32:] if changes["pe"] == "learned" else text
            best = model(context)[0][:, -1].argmax(-1, keepdim=True)
            text = torch.cat((text, best), dim=1)
        assert torch.equal(model.generate(idx, 8, top_k=1), text)


def test_of_equal_logits_no_more_than_top_k_are_drawn():
    model, idx = tiny("hope", vocab_size=5), torch.zeros(300, 1, dtype=torch.long)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for top_k, kinds in ((1, 1), (3, 3), (500, 5)):  # the last is the whole vocabulary
        assert len(set(model.generate(idx, 1, top_k=top_k)[:, 1].tolist())) == kinds


def test_learned_refuses_to_read_past_its_table():
    with pytest.raises(ValueError, match="at most 32 tokens"):
        tiny("learned")(torch.zeros(1, 33, dtype=torch.long))


# --- configuration and torch.compile


@pytest.mark.parametrize("wrong, words", [
    (dict(n_layer=0), "must be at least 1"), (dict(prope_fraction=1.5), "must be at most 1"),
    (dict(local_rope_base=1.0), "must be above 1"), (dict(n_embd=130), "divisible"),
    (dict(pe="nope", local_pe="rope", n_embd=12, n_head=4), "even, not 3"),
    (dict(pe="nope", local_pe="alibi", rope_scaling="pi"), "does not rotate"),
    (dict(pe="sinusoidal", n_embd=9, n_head=1), "even n_embd, not 9"),
    (dict(local_pe="learned"), "local_pe must be one of nope, rope"),
    (dict(window_pattern=""), "letters S and L"), (dict(window_pattern="SX"), "letters S and L")])
def test_a_configuration_that_makes_no_sense_is_refused_with_its_cause(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**wrong)


@pytest.mark.parametrize("pe", PE)
def test_a_training_step_compiles_to_one_graph_once(pe):
    """fullgraph refuses to go back to Python; later steps find the graph of the first one."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, idx = tiny(pe).train(), torch.randint(50, (3, 2, 32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in idx:
        loss = compiled(batch, batch)[1]
        torch.testing.assert_close(loss, model(batch, batch)[1])
        loss.backward()
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pe", PE)
def test_compiled_model_gives_the_same_logits_and_gradients(pe):
    model, idx = tiny(pe), torch.randint(50, (2, 32))
    logits, loss = model(idx, idx)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    compiled_logits, compiled_loss = torch.compile(model)(idx, idx)
    compiled = torch.autograd.grad(compiled_loss, list(model.parameters()))
    torch.testing.assert_close(compiled_logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(compiled, gradients, atol=1e-4, rtol=1e-3)
