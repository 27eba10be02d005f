"""
The network around the encodings: GPT-2 to the letter, layers that differ, the cache, generation, settings, compile.

    python -m pytest tests/test_model.py
    python -m pytest tests/test_model.py -m slow          torch.compile with its real compiler
"""
import ast
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import model as model_py
from model import GPT, PE, GPTConfig, KVCache
from tests.conftest import all_logits, tiny
from tests.test_encodings import HEADS, ROTARY, WIDTH, L, angles, bias, embedded, rotated

T = 33  # tokens that most tests read: odd, and more than twice L

# --- the reference: GPT-2 in float64, with two loops over who sees whom


def reference(model, idx):
    """Token ids (T,) -> logits (T, V) float64."""
    config, T = model.config, len(idx)
    w = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def learned(module):
        return {name.split(".")[-1]: value for name, value in w.items() if name.startswith(f"transformer.{module}.")}

    tokens = w["transformer.wte.weight"][idx]
    x = torch.stack([embedded(config.pe, learned("wpe"), token, n) for n, token in enumerate(tokens)])
    for i in range(config.n_layer):
        short = i < config.n_layer - 1 and config.window_pattern[i % len(config.window_pattern)] == "S"
        pe = (config.local_pe or config.pe) if short else config.pe
        base = (config.local_rope_base or config.rope_base) if short else config.rope_base
        values = learned("wpe_local" if short and "wpe_local" in model.transformer else "wpe")
        window = config.window if short and config.window else math.inf
        scaling, logn = (config.rope_scaling, config.attn_scaling) if window > config.block_size else ("none", "none")
        turns, layer = angles(pe, scaling, config.rope_factor, base, config.block_size), f"transformer.h.{i}."
        q, k, v = (part.view(T, HEADS, -1).transpose(0, 1)
                   for part in linear(norm(x, layer + "ln_1"), layer + "attn.c_attn").chunk(3, dim=-1))  # (H, T, D)
        products = rotated(q, range(T), turns) @ rotated(k, range(T), turns).mH
        logits = torch.full((HEADS, T, T), -math.inf, dtype=torch.float64)
        for m in range(T):
            factor = (0.1 * math.log(config.rope_factor) + 1) ** 2 if scaling == "yarn" and turns else 1.0
            seen = min(m + 1, window)
            factor *= max(1.0, math.log(seen) / math.log(config.block_size)) if logn == "logn" else 1.0
            for n in range(m + 1):
                if m - n < window:
                    product = factor * products[:, m, n].real / math.sqrt(WIDTH // HEADS)
                    logits[:, m, n] = product + bias(pe, values, m, n)
        x = x + linear((logits.softmax(-1) @ v).transpose(0, 1).reshape(T, WIDTH), layer + "attn.c_proj")
        hidden = linear(norm(x, layer + "ln_2"), layer + "mlp.c_fc")
        x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), layer + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def network(pe, **changes):
    """A model that the reference can read. Learned positions get an L of T, since they have none beyond it."""
    block_size = T if pe == "learned" else L
    model = tiny(pe, **{"block_size": block_size, "n_head": HEADS, "n_embd": WIDTH, **changes})
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from their zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PLAIN = [dict(pe=pe, attn_scaling=attn) for pe in PE for attn in ("none", "logn")]
PLAIN += [dict(pe=pe, rope_scaling=rope, rope_factor=2.5, attn_scaling=attn)
          for pe in ROTARY for rope in ("pi", "ntk", "yarn") for attn in ("none", "logn")]
MIXED = [dict(pe=pe, local_pe=local_pe) for pe, local_pe in (
    ("hope", None), ("nope", "rope"), ("rope", "hope"), ("alibi", "rope"), ("t5", None), ("prope", "kerple"),
    ("sinusoidal", "hope"), ("fire", "nope"), ("prope", None))]
PATTERNS = ["".join(letters) for n in (1, 2, 3, 4) for letters in itertools.product("SL", repeat=n)]
WINDOWS = [0, 1, 3, L, T + 5]
LAYERS = [dict(MIXED[(i + window) % len(MIXED)], window_pattern=pattern, window=window, n_layer=4)
          for i, pattern in enumerate(PATTERNS) for window in WINDOWS]
LAYERS += [dict(mixed, window_pattern="SSL", window=5, n_layer=4, local_rope_base=500.0, rope_base=3e4)
           for mixed in MIXED]
# a window of more than L tokens is scaled as a layer that sees everything is, a shorter one is not
LAYERS += [dict(pe=pe, local_pe=local_pe, window_pattern="SL", window=window, rope_scaling=rope, rope_factor=4.0,
                attn_scaling="logn")
           for pe, local_pe in (("rope", None), ("nope", "rope"), ("hope", "alibi")) for rope in ("pi", "ntk", "yarn")
           for window in (8, L, L + 1, 0)]


@pytest.mark.parametrize("changes", PLAIN + LAYERS, ids=str)
def test_logits_equal_a_reference_with_loops_over_who_sees_whom(changes):
    model, idx = network(**changes), torch.randint(50, (2, T))
    expected = reference(model, idx[1])
    assert expected.std() > 0.5
    torch.testing.assert_close(all_logits(model, idx)[1].double(), expected, atol=5e-5, rtol=0)


def test_pe_learned_has_the_weight_names_and_shapes_of_nanogpt():
    model = GPT(GPTConfig(pe="learned", n_layer=1, vocab_size=50))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    C, layer = 128, "transformer.h.0."
    assert shapes == {
        "transformer.wte.weight": (50, C), "transformer.wpe.weight": (128, C), "lm_head.weight": (50, C),
        layer + "ln_1.weight": (C,), layer + "ln_1.bias": (C,), layer + "ln_2.weight": (C,), layer + "ln_2.bias": (C,),
        layer + "attn.c_attn.weight": (3 * C, C), layer + "attn.c_attn.bias": (3 * C,),
        layer + "attn.c_proj.weight": (C, C), layer + "attn.c_proj.bias": (C,),
        layer + "mlp.c_fc.weight": (4 * C, C), layer + "mlp.c_fc.bias": (4 * C,),
        layer + "mlp.c_proj.weight": (C, 4 * C), layer + "mlp.c_proj.bias": (C,),
        "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def test_the_loss_is_each_tokens_or_their_mean_without_targets_of_minus_one_and_no_targets_give_the_last_logits():
    model, idx = tiny("hope"), torch.randint(50, (2, 10))
    targets = torch.randint(50, (2, 10))
    logits, loss = model(idx, targets)
    per_token = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, per_token.mean())
    torch.testing.assert_close(model(idx, targets, reduction="none")[1], per_token)
    targets[:, 5:] = -1
    torch.testing.assert_close(model(idx, targets)[1], per_token[:, :5].mean())
    last, none = model(idx)
    assert none is None and last.shape == (2, 1, 50)
    torch.testing.assert_close(last, logits[:, -1:])
    assert model.to(torch.bfloat16)(idx, targets)[1].dtype == torch.float32


# --- layers that see a short window


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


# --- initial values and dropout


@pytest.mark.parametrize("changes, added", [
    *((dict(pe=pe), None) for pe in PE),
    (dict(pe="t5", local_pe="kerple", window_pattern="SL"), ["wpe.table", "wpe_local.r1", "wpe_local.r2"])], ids=str)
def test_the_same_seed_gives_the_same_shared_weights_as_nope(changes, added):
    def weights(**changes):
        torch.manual_seed(7)
        return GPT(GPTConfig(**changes)).state_dict()
    plain, own = weights(pe="nope"), weights(**changes)
    assert plain.keys() <= own.keys() and all(torch.equal(own[name], plain[name]) for name in plain)
    assert added is None or own.keys() - plain.keys() == {f"transformer.{name}" for name in added}


@pytest.mark.parametrize("n_layer", [2, 8])
def test_matrices_that_write_to_the_residual_stream_start_smaller_the_more_of_them_there_are(n_layer):
    """Their outputs add up: with n of them, each has a variance of 1 / n of that of the other matrices."""
    model = GPT(GPTConfig(pe="learned", n_embd=256, n_layer=n_layer, vocab_size=1000))
    for embedding in (model.transformer.wte, model.transformer.wpe):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.transformer.h:
        for matrix in (block.attn.c_attn, block.mlp.c_fc):
            assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for matrix in (block.attn.c_proj, block.mlp.c_proj):
            assert matrix.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * n_layer), rel=0.05)


def test_biases_start_at_zero_and_norms_at_one():
    for name, parameter in GPT(GPTConfig(n_layer=1)).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == float("ln" in name and name.endswith("weight"))).all(), name


def test_a_new_model_guesses_among_all_tokens_and_its_embedding_is_tied():
    model = GPT(GPTConfig(n_embd=256, n_layer=8, vocab_size=1000))
    assert model.transformer.wte.weight is model.lm_head.weight
    loss = model(torch.randint(1000, (4, 64)), torch.randint(1000, (4, 64)))[1].item()
    assert abs(loss - math.log(1000)) < 0.1


def dropped(x, expected, p):
    """Whether x is expected / (1 - p) with a fraction p of zeros, over some thousand independent numbers."""
    zero = x == 0
    torch.testing.assert_close(x[~zero], (expected / (1 - p))[~zero])
    return abs(zero.float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / x.numel())


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_dropout_acts_on_embeddings_on_the_outputs_of_attention_and_mlp_and_on_attention_weights(p):
    model, idx = tiny("nope", dropout=p, n_layer=1).train(), torch.randint(50, (8, 32))
    block, places = model.transformer.h[0], {}

    def keep(name):  # what a projection gives is what the dropout at the end of its module reads
        module = getattr(block, name)
        module.c_proj.register_forward_hook(lambda _, args, output: places.update({name: [output]}))
        module.register_forward_hook(lambda _, args, output: places[name].append(output))

    block.register_forward_pre_hook(lambda _, args: places.update(embedding=[model.transformer.wte(idx), args[0]]))
    keep("attn")
    keep("mlp")
    model(idx)
    assert places.keys() == {"embedding", "attn", "mlp"}
    for name, (before, after) in places.items():
        assert dropped(after, before, p), name

    # With equal keys, weights are 1 / n for n tokens; with values of 1, the output is the sum of the weights that stay.
    with torch.no_grad():
        block.attn.c_attn.weight.zero_()
        block.attn.c_attn.bias.copy_(torch.cat((torch.zeros(64), torch.ones(32))))
    block.attn.c_proj.register_forward_pre_hook(lambda _, args: places.update(weights=args[0]))
    model(torch.randint(50, (2000, 2)))
    first, second = places["weights"][:, 0, [0, 16]], places["weights"][:, 1, [0, 16]]  # (2000, 2): a number per head
    assert dropped(first, torch.ones(2000, 2), p)
    stay = second * (1 - p) * 2  # of two weights: 0, 1 or 2
    torch.testing.assert_close(stay, stay.round(), atol=1e-5, rtol=0)
    assert abs(stay.mean().item() / 2 - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 8000)


def test_dropout_is_off_in_evaluation():
    model, idx = tiny("hope", dropout=0.5), torch.randint(50, (2, 20))
    assert torch.equal(all_logits(model, idx), all_logits(tiny("hope", dropout=0.0), idx))


# --- the cache and generation

IN_PIECES = [[T], [1] * T, [7, 1, T - 8], [T - 1, 1], [20, 1, 1, T - 22], [4, 4, 4, T - 12],
             *([prompt, 1, 1, 1, 3, T - prompt - 6] for prompt in (1, 7, L, L + 3))]
CACHED = PLAIN + [dict(mixed, window_pattern="SSL", window=window, n_layer=4, attn_scaling="logn")
                  for mixed in MIXED for window in (0, 1, 3, 20, 100)]


@pytest.mark.parametrize("changes", CACHED, ids=str)
def test_cached_logits_equal_uncached_ones_in_chunks_of_any_size(changes):
    model, idx = network(**changes), torch.randint(50, (2, T))
    with torch.no_grad():
        whole = all_logits(model, idx)
        for sizes in IN_PIECES:
            cache = KVCache(T)
            pieces = [model(part, part, cache)[0] for part in idx.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
            assert cache.length == T


def test_the_cache_of_an_s_layer_holds_a_window_and_no_more():
    model, cache = network("hope", window_pattern="SSSL", window=5, n_layer=4), KVCache(500)
    for part in torch.randint(50, (1, 400)).split(80, dim=1):
        model(part, cache=cache)
    held = [cache.store[block.attn] for block in model.transformer.h]
    assert [keys.untyped_storage().nbytes() // (4 * WIDTH) for keys, _ in held] == [4, 4, 4, 500]
    assert not any(stored.requires_grad for pair in held for stored in pair)


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_generation_goes_past_block_size_and_equals_uncached_greedy_decoding(changes):
    model = tiny(**changes)  # L = 32
    for prompt in (1, 7, 28, 32, 35):
        text = idx = torch.randint(50, (2, prompt))
        for _ in range(8):
            context = text[:, -32:] if changes["pe"] == "learned" else text
            text = torch.cat((text, model(context)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(model.generate(idx, 8, top_k=1), text)


def test_generation_samples_within_top_k_and_follows_the_seed():
    model, idx = tiny("rope"), torch.randint(50, (1, 5))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(idx, 30, temperature=1.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    best_three = model(idx)[0][0, -1].topk(3).indices.tolist()
    assert set(model.generate(idx.expand(200, -1), 1, temperature=100.0, top_k=3)[:, -1].tolist()) == set(best_three)


def test_temperature_divides_the_logits_and_sampling_keeps_no_gradients():
    model, idx, texts, gradients = tiny("hope"), torch.randint(50, (1, 5)), [], []
    model.lm_head.register_forward_hook(lambda _, args, logits: gradients.append(logits.requires_grad))
    for temperature, scale in ((1 / 64, 1), (1, 64), (1, 1)):
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(scale)  # whose bias is 0: logits are multiplied
        torch.manual_seed(1)
        texts.append(model.generate(idx, 30, temperature))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2]) and not any(gradients)


def test_top_k_larger_than_the_vocabulary_is_all_of_it():
    model, idx = tiny("hope", vocab_size=3), torch.zeros(300, 1, dtype=torch.long)
    assert set(model.generate(idx, 1, top_k=500)[:, 1].tolist()) == {0, 1, 2}


def test_of_equal_logits_no_more_than_top_k_are_drawn_and_greedy_does_not_depend_on_the_seed():
    model, idx, texts = tiny("hope"), torch.zeros(300, 1, dtype=torch.long), []
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert len(set(model.generate(idx, 1, top_k=3)[:, 1].tolist())) == 3
    for seed in (1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(idx, 3, temperature=0))
    assert torch.equal(*texts)


def test_learned_refuses_to_read_past_its_table_and_a_cache_past_its_room():
    with pytest.raises(ValueError, match="at most 32 tokens"):
        tiny("learned")(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="room for 4"):
        tiny("rope")(torch.zeros(1, 5, dtype=torch.long), cache=KVCache(4))


@pytest.mark.parametrize("changes", [dict(pe="hope"), dict(pe="t5", window_pattern="SL", window=4, n_layer=4)], ids=str)
def test_a_forward_that_is_interrupted_leaves_the_cache_as_it_was(changes):
    model, idx = tiny(**changes), torch.randint(50, (2, 20))

    def interrupt(*_):
        raise KeyboardInterrupt

    for first in (0, 9):
        cache = KVCache(20)
        with torch.no_grad():
            pieces = [model(idx[:, :first], idx[:, :first], cache)[0]] if first else []
            for layer in (0, 1, -1):
                hook = model.transformer.h[layer].mlp.register_forward_pre_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(idx[:1 + bool(first), first:first + 5].flip(1), cache=cache)
                hook.remove()
            pieces.append(model(idx[:, first:], idx[:, first:], cache)[0])
            torch.testing.assert_close(torch.cat(pieces, dim=1), all_logits(model, idx), atol=1e-4, rtol=0)


def test_a_cache_refuses_a_backward_and_a_second_model():
    model, idx, cache = tiny("hope"), torch.randint(50, (1, 9)), KVCache(20)
    model(idx, cache=cache)
    logits, loss = model(idx, idx, cache)
    for value in (loss, logits.sum(), loss + model.lm_head.weight.sum()):
        with pytest.raises(RuntimeError, match="no gradients: train without a cache"):
            value.backward(retain_graph=True)
    assert all(parameter.grad is None for block in model.transformer.h for parameter in block.parameters())
    for other in (tiny("hope"), tiny("hope", window_pattern="SL", window=4)):
        with pytest.raises(ValueError, match="one model"):
            other(idx[:, :1], cache=cache)


@pytest.mark.parametrize("wrong, words", [
    (dict(temperature=-0.5), "temperature must be at least 0"), (dict(temperature=math.nan), "not nan"),
    (dict(top_k=0), "top_k at least 1"), (dict(top_k=-1), "top_k at least 1"), (dict(idx=(2, 0)), r"\(2, 0\)"),
    (dict(idx=(5,)), r"\(5,\)"), (dict(idx=(0, 5)), r"\(0, 5\)")], ids=str)
def test_generation_refuses_what_makes_no_sense(wrong, words):
    idx = torch.zeros(wrong.pop("idx", (1, 5)), dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        tiny("hope").generate(idx, 3, **wrong)


def test_temperature_0_is_greedy_and_so_is_one_close_to_0():
    model, idx = tiny("hope"), torch.randint(50, (2, 5))
    greedy = model.generate(idx, 20, top_k=1)
    for temperature in (0, 0.0, 1e-320, 1e-30, 1e-9):
        assert torch.equal(model.generate(idx, 20, temperature, top_k=7), greedy)


def test_generation_has_no_dropout_and_leaves_the_model_in_its_mode():
    idx, model = torch.randint(50, (1, 5)), tiny("hope", dropout=0.6)
    greedy = model.generate(idx, 20, top_k=1)
    for training in (True, False):
        model.train(training)
        for token in model.stream(idx, 20, top_k=1):
            assert model.training == training
            idx = torch.cat((idx, token), dim=1)
        assert torch.equal(idx, greedy) and model.transformer.drop.training == training
        idx = idx[:, :5]


def test_a_generation_that_is_interrupted_leaves_the_model_in_its_mode():
    def interrupt(*_):
        raise KeyboardInterrupt

    model = tiny("hope").train()
    model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1)
    assert model.training and model.transformer.h[0].mlp.training


def test_targets_of_another_shape_or_all_minus_one_are_refused():
    model, idx = tiny("hope"), torch.randint(50, (2, 5))
    for targets in (idx[:, :4], idx.T, idx[0]):
        with pytest.raises(ValueError, match="differ from idx"):
            model(idx, targets)
    with pytest.raises(ValueError, match="all targets are -1"):
        model(idx, torch.full_like(idx, -1))
    assert (model(idx, torch.full_like(idx, -1), reduction="none")[1] == 0).all()


# --- configuration


@pytest.mark.parametrize("wrong, words", [
    (dict(pe="rotary"), "hope"), (dict(n_embd=130), "divisible"), (dict(n_layer=0), "at least"),
    (dict(dropout=1.0), "dropout"), (dict(prope_fraction=1.5), "prope_fraction"), (dict(rope_base=0.5), "rope_base"),
    (dict(attn_scaling="log"), "logn"), (dict(pe="nope", rope_scaling="yarn"), "rotary"),
    (dict(pe="hope", n_embd=12, n_head=4), "odd"), (dict(pe="nope", local_pe="rope", n_embd=12, n_head=4), "odd"),
    (dict(pe="nope", local_pe="alibi", rope_scaling="pi"), "does not rotate"),
    (dict(window_pattern="SX"), "letters S and L"), (dict(window_pattern=""), "letters S and L"),
    (dict(window_pattern="sl"), "letters S and L"), (dict(window=-1), "window must be at least 0"),
    (dict(local_pe="learned"), "acts on the embeddings"), (dict(local_pe="sinusoidal"), "acts on the embeddings"),
    (dict(local_pe="rotary"), "local_pe must be one of nope"),
    (dict(local_rope_base=1.0), "local_rope_base must be above 1")], ids=str)
def test_a_configuration_that_makes_no_sense_is_refused_with_its_cause(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**wrong)


# --- torch.compile


@pytest.mark.parametrize("pe", PE)
def test_a_training_step_compiles_to_one_graph_once(pe):
    """fullgraph refuses whatever would send it back to Python; the steps after the first find the graph ready."""
    graphs = []
    model, idx = tiny(pe).train(), torch.randint(50, (3, 2, 32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for batch in idx:
        loss = compiled(batch, batch)[1]
        torch.testing.assert_close(loss, model(batch, batch)[1])
        loss.backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("pe", ["nope", "learned", "hope", "alibi"])
def test_one_graph_serves_all_lengths_and_attention_is_causal_by_a_plain_bool(pe):
    """Where the number of tokens is a symbol, T > 1 is one too, which the attention kernels do not take."""
    causal, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        causal.extend(node.kwargs.get("is_causal") for node in graph.graph.nodes
                      if node.op == "call_function" and "scaled_dot_product" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    model = tiny(pe)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (8, 13, 21, 30):
        idx = torch.randint(50, (2, length))
        torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
    assert len(graphs) == 1 and len(causal) == model.config.n_layer and {type(value) for value in causal} == {bool}


@pytest.mark.slow
@pytest.mark.parametrize("pe", PE)
def test_compiled_model_gives_the_same_logits_and_gradients(pe):
    model, idx = tiny(pe), torch.randint(50, (2, 32))
    logits, loss = model(idx, idx)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled_logits, compiled_loss = torch.compile(model)(idx, idx)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_logits, logits, atol=1e-4, rtol=0)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


# --- the file, which is to be read from top to bottom and can be copied out alone

SOURCE = ast.parse(Path(model_py.__file__).read_text(encoding="utf-8"))


def test_model_py_imports_nothing_of_the_project_and_opens_no_file():
    nodes = list(ast.walk(SOURCE))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == {"torch", "torch.nn"} and not imported & {"os", "io", "pathlib", "shutil", "importlib"}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"open", "load", "save", "from_file", "__import__", "exec", "eval"}


def test_model_py_goes_from_the_idea_to_the_network_to_other_encodings_to_the_configuration():
    places = {node.name: node for node in SOURCE.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    names = list(places)
    assert names[:7] == ["PositionalEncoding", "NoPE", "frequencies", "RoPE", "PRoPE", "HoPE", "rotate"]
    assert names.index("GPT") < names.index("Learned") and names[-1] == "GPTConfig"
    [forward] = [node for node in places["GPT"].body if getattr(node, "name", "") == "forward"]
    assert forward.lineno < 400
