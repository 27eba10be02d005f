"""Looking inside attention, on models whose answers are known beforehand."""
import json
import math
import shutil

import pytest
import torch

import model as model_file
from experiments import attention
from experiments.attention import attention_inputs, logits_of, position_bins
from model import PE, frequencies, rotate
from tests.conftest import run, tiny

L = 32


def constant_attention(pe="rope", distance=None):
    """A model whose queries and keys ignore the text: zero, or such that one of the two heads
    attends to a distance."""
    model = tiny(pe, block_size=L, n_embd=64, qkv_bias=True)  # 2 heads of 32 channels
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            if distance is not None:
                q, angle = torch.full((1, 1, 1, 32), 3.0), distance * frequencies(32).float()
                k = rotate(q, angle.cos()[None], angle.sin()[None])  # undone at that distance
                block.attn.c_attn.bias[:32] = q.flatten()
                block.attn.c_attn.bias[64:96] = k.flatten()
    return model


def measured(model, length=2 * L):
    """-> statistics of each layer, means over two windows, and the starts of the bins."""
    windows = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    found = attention.analyze(model, windows)
    starts, _ = found.pop("starts"), found.pop("length")
    return {name: torch.tensor(x["layers"]) for name, x in found.items()}, starts


# --- inside a layer

LAYERS = [*({"pe": pe} for pe in PE), {"pe": "hope", "window_pattern": "SL", "window": 5},
          {"pe": "nope", "local_pe": "rope", "local_rope_base": 100, "window_pattern": "SL",
           "window": 5}, {"pe": "rope", "local_pe": "alibi", "window_pattern": "SL", "window": 0}]


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: "-".join(map(str, layers.values())))
def test_logits_are_those_that_the_models_own_attention_is_given(layers, monkeypatch):
    attend, seen = model_file.F.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q[0] @ k[0].mT / math.sqrt(q.size(-1)), attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", spy)
    length = L if layers["pe"] == "learned" else 3 * L
    model = tiny(**layers, attn_scaling="logn")
    inside = attention_inputs(model, torch.randint(50, (length,)))
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)  # as it was
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert len(inside) == len(seen) == 2
    for (q, k, _, bias), (expected, mask) in zip(inside, seen):
        if mask is not None and mask.dtype == torch.bool:
            expected = expected.masked_fill(~mask, -math.inf)
        elif mask is not None:
            expected = expected + mask[0]
        found = logits_of(q, k, bias)[:, past]
        torch.testing.assert_close(found, expected[:, past], atol=1e-4, rtol=0)


# --- statistics


@pytest.mark.parametrize("distance", [0, 1, 7, 19])
def test_a_head_built_to_attend_to_a_distance_is_found_there(distance):
    found, starts = measured(constant_attention(distance=distance))
    for name in ("inside/logit", "inside/weight", "beyond/logit", "beyond/weight"):
        curve = found[f"{name}_by_distance"][0].nan_to_num(-math.inf)
        assert starts[curve.argmax()] == distance


def test_uniform_attention_has_entropy_ln_n_and_weight_1_over_n_and_no_favourite_distance():
    found, _ = measured(constant_attention())
    for group, positions in (("inside", range(L // 2, L)), ("beyond", range(L, 2 * L))):
        entropy = sum(math.log(n + 1) for n in positions) / len(positions)
        weight = sum(1 / (n + 1) for n in positions) / len(positions)
        assert found[f"{group}/entropy"][0].item() == pytest.approx(entropy, rel=1e-5)
        assert found[f"{group}/weight_by_distance"][0, 3].item() == pytest.approx(weight, rel=1e-5)
        assert (found[f"{group}/logit_by_distance"].nan_to_num() == 0).all()


def test_a_pair_with_a_planted_norm_is_where_the_norms_say():
    model = tiny("rope", block_size=L)
    with torch.no_grad():
        for at in (5, 5 + 8):  # pair 5 of head 0's q
            model.transformer.h[1].attn.c_attn.weight[at] *= 20
    found, _ = measured(model)
    assert found["norm/q"][1].argmax() == 5
    assert found["norm/q"][1, 5] > 3 * found["norm/q"][1].median()
    for name, layer in (("k", 1), ("v", 1), ("q", 0)):
        assert found[f"norm/{name}"][layer].max() < 2 * found[f"norm/{name}"][layer].median()


def test_norms_are_those_of_tokens_within_L():
    model, windows = tiny("rope", block_size=L), torch.randint(50, (2, 2 * L))
    whole, cut = (attention.analyze(model, part)["norm/k"] for part in (windows, windows[:, :L]))
    assert whole["mean"] == pytest.approx(cut["mean"])


@pytest.mark.parametrize("pe", ["hope", "alibi"])
def test_a_layer_with_a_window_has_statistics_of_its_window_only(pe):
    """The window is a bool mask for hope and part of the bias for alibi. It is 8 of L = 32."""
    model = tiny(pe, block_size=L, window_pattern="SL", window=8)
    found, starts = measured(model, length=4 * L)
    for name in ("inside/weight", "beyond/logit"):
        name = f"{name}_by_distance"
        assert found[name][0, ..., :8].isfinite().all() and found[name][0, ..., 8:].isnan().all()
        assert found[name][1].isfinite().sum() > found[name][0].isfinite().sum()
    assert found["beyond/weight_by_distance"][0, :8].sum() == pytest.approx(1, abs=1e-4)
    assert found["beyond/entropy"][0] < math.log(8) < found["beyond/entropy"][1]
    windows = torch.randint(50, (2, 4 * L))
    mean = torch.tensor(attention.analyze(model, windows)["inside/logit_by_distance"]["mean"])
    assert mean[torch.tensor(starts) < L].isfinite().all()


def test_bins_start_at_every_small_distance_and_at_L():
    for block_size, length in ((32, 32), (100, 400), (128, 512), (7, 50)):
        starts = position_bins(block_size, length)
        assert starts == sorted(set(starts)) and starts[:6] == list(range(6))
        assert starts[-1] < length and (block_size in starts or block_size == length)


# --- heads that look at the previous token

ROTATED = [{"pe": "rope"}, {"pe": "prope", "prope_fraction": 0.5}, {"pe": "nope"},
           {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 5}]

@pytest.mark.parametrize("layers", ROTATED, ids=str)
def test_weights_and_shares_of_a_head_are_those_written_out(layers):
    model, windows = tiny(**layers, rope_base=100), torch.randint(50, (3, 2 * L))
    theta = [] if layers["pe"] == "nope" else model.transformer.wpe.theta.tolist()
    turns = [2 * math.pi / t for t in theta] + [math.inf] * (8 - len(theta))
    band = [sum([turn >= 16, turn > L, turn == math.inf]) for turn in turns]
    weights, above = torch.zeros(2), torch.zeros(2, 8)
    for window in windows[:, :L]:
        q, k, _, _ = attention_inputs(model, window)[1]  # the last layer is a full one
        q, k = (torch.complex(t[..., :8], t[..., 8:]) for t in (q, k))
        for head in range(2):
            for n in range(L // 2, L):
                logits = (q[head, n] * k[head, :n + 1].conj()).real / 4  # (n + 1, pairs)
                weights[head] += logits.sum(1).softmax(0)[n - 1] / (3 * L / 2)
                above[head] += (logits[n - 1] - logits.mean(0)) / (3 * L / 2)
    rows = attention.previous_token_heads(model, windows)["heads"]
    assert len(rows) == (2 if "window" in layers else 4)  # those of full layers
    found = [row for row in rows if row["layer"] == 2]
    assert sorted(row["head"] for row in found) == [1, 2]
    assert found[0]["weight"] >= found[1]["weight"]
    for row in found:
        head, logit = row["head"] - 1, above[row["head"] - 1].sum().item()
        assert row["weight"] == pytest.approx(weights[head].item(), rel=1e-3)
        assert row["logit"] == pytest.approx(logit, rel=1e-3, abs=1e-4)
        shares = torch.zeros(4).index_add(0, torch.tensor(band), above[head]) / logit
        torch.testing.assert_close(torch.tensor(row["shares"]), shares, rtol=1e-2, atol=1e-3)


# --- what biases of queries and keys add to a logit


@pytest.mark.parametrize("layers", ROTATED, ids=str)
def test_the_function_of_distance_is_that_of_the_biases_written_out(layers):
    model = tiny(**layers, rope_base=100, qkv_bias=True)
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_attn.bias)
    heads = attention.biases_by_distance(model, torch.zeros(1, 2 * L))["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for found in heads:
        start, window = 16 * (found["head"] - 1), 2 * L
        n_rotated = {"rope": 8, "prope": 4, "nope": 0}[layers["pe"]]
        if "window" in layers and found["layer"] == 1:
            n_rotated, window = 8, 5
        bias = model.transformer.h[found["layer"] - 1].attn.c_attn.bias.detach()
        a, b = (torch.complex(*bias[at:at + 16].chunk(2)) for at in (start, 32 + start))
        theta = torch.tensor([100 ** (-j / 8) if j < n_rotated else 0 for j in range(8)])
        expected = (a * b.conj() * torch.exp(1j * theta * torch.arange(2 * L)[:, None])).real.sum(1)
        expected[window:] = math.nan
        torch.testing.assert_close(torch.tensor(found["values"]), expected / 4, equal_nan=True,
                                   atol=1e-4, rtol=0)


def test_a_network_without_biases_of_queries_and_keys_has_no_function_of_distance():
    with pytest.raises(ValueError, match="needs networks with biases"):
        attention.biases_by_distance(tiny("rope"), torch.zeros(1, L))


# --- the command


def test_the_command_prints_tables_and_writes_json_and_pictures(finished_run, dataset, tmp_path,
                                                                capsys):
    kept = shutil.copy(f"{finished_run}/best.pt", str(tmp_path / "ckpt_000010.pt"))
    attention.main([kept, "--windows", "2", "--device", "cpu", "--json", str(tmp_path / "a.json"),
                    "--plot", str(tmp_path / "a.png")])
    found, = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert (found["name"], found["iter"], found["layers"]) == ("ckpt_000010", 10, "hope")
    assert (tmp_path / "a.png").stat().st_size > 1000
    attention.main([kept, "--heads", "--windows", "2", "--json", str(tmp_path / "h.json")])
    found, = json.loads((tmp_path / "h.json").read_text())["runs"]
    assert len(found["heads"]) == 4 and "layer 2, head 2" in capsys.readouterr().out
    run(dataset, tmp_path / "qkv_bias", "--qkv_bias", "--max_iters", "5")
    attention.main([str(tmp_path / "qkv_bias"), "--biases", "--json", str(tmp_path / "b.json"),
                    "--plot", str(tmp_path / "b.png")])
    found, = json.loads((tmp_path / "b.json").read_text())["runs"]
    assert [len(head["values"]) for head in found["heads"]] == [4 * 16] * 4
    assert "layer 2, head 2" in capsys.readouterr().out
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_an_encoding_without_values_beyond_L_is_analyzed_inside_alone():
    found = attention.analyze(tiny("learned"), torch.randint(50, (2, 4 * L)))
    assert found["length"] == 32 and "inside/entropy" in found and "beyond/entropy" not in found
