"""
The network around the encodings: GPT-2 to the letter, the cache, generation, configuration and checkpoints.

    python -m pytest tests/test_model.py
"""
import math

import pytest
import torch

import eval_extrapolation
import sample
from common.checkpoint import load_checkpoint, load_model
from model import GPT, PE, GPTConfig, KVCache
from tests.test_encodings import all_logits, tiny


def gpt2_logits(weights, idx, n_layer, n_head):
    """GPT-2 with learned positions, written down from its paper with plain matrix products, in float64."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    rows = []
    for tokens in idx:
        x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:len(tokens)]
        for i in range(n_layer):
            layer = f"transformer.h.{i}."
            q, k, v = linear(norm(x, layer + "ln_1"), layer + "attn.c_attn").chunk(3, dim=-1)
            heads = []
            for a, b, c in zip(q.chunk(n_head, -1), k.chunk(n_head, -1), v.chunk(n_head, -1)):
                scores = a @ b.T / math.sqrt(a.size(-1))
                scores[torch.ones_like(scores).triu(1).bool()] = -math.inf
                heads.append(scores.softmax(-1) @ c)
            x = x + linear(torch.cat(heads, -1), layer + "attn.c_proj")
            hidden = linear(norm(x, layer + "ln_2"), layer + "mlp.c_fc")
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, layer + "mlp.c_proj")
        rows.append(norm(x, "transformer.ln_f") @ w["lm_head.weight"].T)
    return torch.stack(rows)


def test_pe_learned_is_gpt2():
    model = tiny("learned")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from their zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    idx = torch.randint(50, (2, 32))
    expected = gpt2_logits(model.state_dict(), idx, n_layer=2, n_head=2)
    torch.testing.assert_close(all_logits(model, idx).double(), expected, atol=1e-4, rtol=1e-4)


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


def test_initial_weights_are_gpt2s_and_the_embedding_is_tied():
    model = GPT(GPTConfig(n_embd=256, n_layer=8, vocab_size=1000))
    assert model.transformer.wte.weight is model.lm_head.weight
    assert abs(model.transformer.wte.weight.std() - 0.02) < 1e-3
    assert abs(model.transformer.h[3].mlp.c_proj.weight.std() - 0.02 / 4) < 3e-4
    logits, loss = model(torch.randint(1000, (4, 64)), torch.randint(1000, (4, 64)))
    assert abs(loss.item() - math.log(1000)) < 0.1        # a guess among all tokens


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


@pytest.mark.parametrize("pe", PE)
@pytest.mark.parametrize("pieces", [(32,), (1,) * 32, (7, 1, 24), (31, 1)])
def test_reading_in_pieces_through_the_cache_gives_the_logits_of_one_pass(pe, pieces):
    model, idx, cache = tiny(pe), torch.randint(50, (2, 32)), KVCache(32)
    logits = torch.cat([all_logits_cached(model, part, cache) for part in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, all_logits(model, idx), atol=1e-4, rtol=0)
    assert cache.length == 32


def all_logits_cached(model, idx, cache):
    return model(idx, targets=idx, cache=cache)[0]


@pytest.mark.parametrize("pe", PE)
def test_generation_goes_past_block_size_and_equals_uncached_greedy_decoding(pe):
    model, idx = tiny(pe), torch.randint(50, (2, 30))
    text = idx
    for _ in range(12):                                   # L = 32: the last ten are beyond it
        context = text[:, -32:] if pe == "learned" else text
        text = torch.cat((text, model(context)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 12, top_k=1), text)


def test_generation_samples_within_top_k_and_follows_the_seed():
    model, idx = tiny("rope"), torch.randint(50, (1, 5))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(idx, 30, temperature=1.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    best_three = model(idx)[0][0, -1].topk(3).indices.tolist()
    for seed in range(20):
        torch.manual_seed(seed)
        assert model.generate(idx, 1, temperature=100.0, top_k=3)[0, -1] in best_three


def test_learned_refuses_to_read_past_its_table_and_a_cache_past_its_room():
    with pytest.raises(ValueError, match="at most 32 tokens"):
        tiny("learned")(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="room for 4"):
        tiny("rope")(torch.zeros(1, 5, dtype=torch.long), cache=KVCache(4))


@pytest.mark.parametrize("wrong, words", [
    (dict(pe="rotary"), "hope"), (dict(n_embd=130), "divisible"), (dict(n_layer=0), "at least"),
    (dict(dropout=1.0), "dropout"), (dict(prope_fraction=1.5), "prope_fraction"), (dict(rope_base=0.5), "rope_base"),
    (dict(attn_scaling="log"), "logn"), (dict(pe="nope", rope_scaling="yarn"), "rotary")])
def test_a_configuration_that_makes_no_sense_is_refused_with_its_cause(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**wrong)


def test_a_rotary_encoding_on_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="odd"):
        GPT(GPTConfig(n_embd=12, n_head=4, pe="hope"))


def test_checkpoints_give_back_the_model_and_a_damaged_one_is_named(tmp_path):
    model = tiny("hope")
    path = tmp_path / "ckpt.pt"
    torch.save({"config": vars(model.config), "model": model.state_dict()}, path)
    idx = torch.randint(50, (1, 9))
    assert torch.equal(load_model(tmp_path)(idx)[0], model(idx)[0])
    assert load_model(path, attn_scaling="logn").config.attn_scaling == "logn"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="train.py"):
        load_checkpoint(tmp_path / "none")


def test_a_nanogpt_checkpoint_is_the_same_network(tmp_path, capsys):
    """Its keys and quirks: model_args, compiled weights' prefix, causal masks stored as attn.bias, no tokenizer."""
    model = tiny("learned", vocab_size=65, bias=False)
    weights = {"_orig_mod." + name: value for name, value in model.state_dict().items()}
    weights |= {f"_orig_mod.transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": weights, "model_args": {name: getattr(model.config, name) for name in names}, "iter_num": 5,
                "best_val_loss": torch.tensor(1.0), "optimizer": {}, "config": {"dataset": "shakespeare_char"}},
               tmp_path / "ckpt.pt")
    idx = torch.randint(65, (2, 32))
    assert torch.equal(all_logits(load_model(tmp_path), idx), all_logits(model, idx))

    (tmp_path / "text.txt").write_text("To be, or not to be: " * 20)
    sample.main(["--out_dir", str(tmp_path), "--start", "ROMEO:", "--max_new_tokens", "40"])
    eval_extrapolation.main([str(tmp_path), "--text", str(tmp_path / "text.txt"), "--max_factor", "2"])
    out = capsys.readouterr().out
    assert "ROMEO:" in out and "[32, 64)" in out
    with pytest.raises(ValueError, match="no token for '#'"):
        sample.main(["--out_dir", str(tmp_path), "--start", "#"])
    with pytest.raises(ValueError, match="--text"):
        eval_extrapolation.main([str(tmp_path)])
