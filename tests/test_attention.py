"""Looking inside attention, on models whose answers are known beforehand."""
import json
import math
import shutil
from functools import partial

import pytest
import torch

import model as model_file
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import Device, DeviceConfig
from experiments import attention, figures
from experiments.attention import attention_inputs, logits_of, measure, pair_excursion, pair_logits, position_bins
from model import PE, frequencies
from tests.conftest import tiny

L = 32
CPU = Device(DeviceConfig(device="cpu", dtype="float32"))


def constant_attention(pe="rope", distance=None, head=0):
    """A model whose queries and keys ignore the text: zero, or such that one head attends to a distance."""
    model = tiny(pe, block_size=L, n_embd=64)  # 2 heads of 32 channels
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            if distance is not None:
                q = torch.ones(1, 32) * 3
                k = figures.key_that_peaks_at(q, frequencies(32).float(), distance)
                block.attn.c_attn.bias[32 * head:32 * (head + 1)] = q[0]
                block.attn.c_attn.bias[64 + 32 * head:64 + 32 * (head + 1)] = k[0]
    return model


def measured(model, length=2 * L, **options):
    windows = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    starts = position_bins(L, length)
    return {name: x.mean(0) for name, x in measure(model, windows, starts, **options).items()}, starts


def analyzed(model, length=4 * L):
    checkpoint = {"config": vars(model.config), "model": model.state_dict(), "iter": 0}
    return {"name": "a", **attention.analyze(checkpoint, torch.randint(50, (2, length)), CPU)}


LAYERS = [*({"pe": pe} for pe in PE), {"pe": "hope", "window_pattern": "SL", "window": 5},
          {"pe": "nope", "local_pe": "rope", "local_rope_base": 100, "window_pattern": "SL", "window": 5},
          {"pe": "rope", "local_pe": "alibi", "window_pattern": "SL", "window": 0}]


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: "-".join(map(str, layers.values())))
def test_the_pairs_add_up_to_the_logit_of_the_models_own_attention(layers, monkeypatch):
    """Its own attention: what scaled_dot_product_attention is given, in each layer."""
    seen = []
    attend = model_file.F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q[0] @ k[0].transpose(1, 2) / math.sqrt(q.size(-1)), attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", spy)
    length = L if layers["pe"] == "learned" else 3 * L
    model = tiny(**layers, attn_scaling="logn")
    inside = attention_inputs(model, torch.randint(50, (length,)))
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)  # left as it was
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert len(inside) == len(seen) == 2
    for (q, k, _, bias), (expected, mask) in zip(inside, seen):
        for head in range(2):
            torch.testing.assert_close(pair_logits(q[head], k[head]).sum(0), expected[head], atol=1e-4, rtol=0)
        if mask is not None:  # visible or not, or a bias
            expected = expected.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else expected + mask[0]
        torch.testing.assert_close(logits_of(q, k, bias)[:, past], expected[:, past], atol=1e-4, rtol=0)


def test_the_shares_of_the_pairs_are_their_covariance_with_the_logit_and_add_up_to_one():
    model, idx = tiny("rope", block_size=L), torch.randint(50, (2 * L,))
    found = attention.measure_layer(*attention_inputs(model, idx)[0], L, position_bins(L, 2 * L))
    torch.testing.assert_close(found["inside/pair_share"].sum(), torch.tensor(1.0))
    q, k, _, _ = attention_inputs(model, idx)[0]
    covariance, variance = torch.zeros(8), 0.0
    for head in range(2):
        parts = pair_logits(q[head], k[head])  # (P, T, T)
        for i in range(L // 2, L):
            seen = parts[:, i, :i + 1] - parts[:, i, :i + 1].mean(-1, keepdim=True)  # (P, i + 1)
            covariance += (seen * seen.sum(0)).mean(-1)
            variance += seen.sum(0).square().mean()
    torch.testing.assert_close(found["inside/pair_share"], covariance / variance, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("distance", [0, 1, 7, 19])
def test_a_head_built_to_attend_to_a_distance_is_found_there(distance):
    found, starts = measured(constant_attention(distance=distance))
    for name in ("inside/logit", "inside/weight", "beyond/logit", "beyond/weight"):
        assert starts[found[f"{name}_by_distance"][0].nan_to_num(-math.inf).argmax()] == distance


def test_uniform_attention_has_entropy_ln_n_and_weight_1_over_n_and_no_favourite_distance():
    found, starts = measured(constant_attention())
    for i, start in enumerate(starts[:8]):  # bins of one token
        assert found["entropy"][0, i].item() == pytest.approx(math.log(start + 1), abs=1e-5)
    expected = sum(1 / (n + 1) for n in range(L // 2, L)) / (L // 2)
    assert found["inside/weight_by_distance"][0, 3].item() == pytest.approx(expected, abs=1e-6)
    assert found["inside/weight_by_key"][0, 3].item() == pytest.approx(expected, abs=1e-6)
    assert (found["inside/logit_by_distance"].nan_to_num() == 0).all()


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


def test_beyond_L_slow_pairs_leave_their_range_and_pairs_that_complete_a_turn_do_not():
    """q = k in one of two heads: S_j is 9 cos(distance * theta_j) / sqrt(32). HoPE lets no pair leave."""
    wavelength = 2 * math.pi / frequencies(32).float()
    swing = {}
    for pe in ("rope", "hope"):
        found, starts = measured(constant_attention(pe, distance=0), length=8 * L)
        swing[pe] = pair_excursion(found["beyond/pair_by_distance"][0], starts, L)
    assert (swing["hope"] < 1e-4).all()
    assert (swing["rope"][wavelength <= L] < 0.1).all()
    assert (swing["rope"][(wavelength > 2.5 * L) & (wavelength < 8 * L)] > 0.5).all()


def test_an_excursion_is_how_far_a_curve_leaves_its_range_up_to_L_at_distances_that_all_queries_have():
    curves = torch.tensor([[2.0, 3.0, math.nan, 1.5, 3.2, 9.0], [2.0, 3.0, 3.0, 3.0, 2.0, 9.0]])
    assert pair_excursion(curves, starts=[0, 1, 2, 4, 8, 16], block_size=4).tolist() == [0.5, 0]


def test_logn_scaling_sharpens_attention_beyond_L_only():
    plain, starts = measured(tiny("hope", block_size=L), length=4 * L)
    scaled, _ = measured(tiny("hope", block_size=L, attn_scaling="logn"), length=4 * L)
    inside = torch.tensor(starts) < L
    torch.testing.assert_close(plain["entropy"][:, inside], scaled["entropy"][:, inside])
    assert (plain["entropy"][:, ~inside] > scaled["entropy"][:, ~inside]).all()


@pytest.mark.parametrize("pe", ["hope", "alibi"])
def test_a_layer_with_a_window_has_statistics_of_its_window_only(pe):
    """The window is a bool mask for hope and part of the bias for alibi. L = 32, 8 tokens in the first layer."""
    model = tiny(pe, block_size=L, window_pattern="SL", window=8)
    found, starts = measured(model, length=4 * L)
    for name in ("inside/weight_by_distance", "beyond/logit_by_distance", "beyond/pair_by_distance"):
        assert found[name][0, ..., :8].isfinite().all() and found[name][0, ..., 8:].isnan().all()
        assert found[name][1].isfinite().sum() > found[name][0].isfinite().sum()
    assert found["beyond/weight_by_distance"][0, :8].sum() == pytest.approx(1, abs=1e-4)
    assert found["entropy"][0].max() < math.log(8) < found["entropy"][1].max()
    assert found["inside/pair_share"].isfinite().all()
    run = analyzed(model)
    assert (torch.tensor(run["beyond/pair_excursion"]["layers"])[0] == 0).all()
    assert torch.tensor(run["inside/logit_by_distance"]["mean"])[torch.tensor(starts) < L].isfinite().all()


def test_bins_start_at_every_small_distance_and_at_L():
    for block_size, length in ((32, 32), (100, 400), (128, 512), (7, 50)):
        starts = position_bins(block_size, length)
        assert starts == sorted(set(starts)) and starts[:6] == list(range(6)) and starts[-1] < length
        assert block_size in starts or block_size == length


def test_analysis_of_checkpoints_prints_a_table_and_writes_json_and_pictures(finished_run, tmp_path, capsys):
    """With L = 16, some queries inside L have 9 keys: 16 times their mean weight at distances below 16 was above 1."""
    pytest.importorskip("matplotlib")
    kept = shutil.copy(f"{finished_run}/best.pt", str(tmp_path / "ckpt_000010.pt"))
    attention.main([kept, "--windows", "2", "--device", "cpu", "--json", str(tmp_path / "a.json"),
                    "--plot", str(tmp_path / "a.png")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [run["name"] for run in result["runs"]] == ["ckpt_000010"] and result["runs"][0]["iter"] == 10
    assert {"command", "device", "dataset_sha256"} <= set(result)
    assert all((tmp_path / f"a_{name}.png").stat().st_size > 1000 for name in attention.DRAWINGS)
    header, *rows = capsys.readouterr().out.split("after 10 steps")[1].splitlines()[1:]
    assert "of nearest 8" in header and len(rows) == 4
    assert all(0 < float(row.split()[8]) <= 1 for row in rows), rows


def test_an_encoding_without_values_beyond_L_is_analyzed_inside_alone():
    run = analyzed(tiny("learned"))
    assert run["length"] == 32 and "inside/pair_share" in run and "beyond/pair_share" not in run
    assert run["rotated"] == {"L": 0}


def test_layers_with_windows_are_named_and_have_no_weight_on_keys_that_no_query_sees(capsys):
    run = analyzed(tiny("nope", local_pe="hope", window_pattern="SL", window=8))
    assert run["layers"] == "nope+hope:SL:8" and run["rotated"] == {"L": 0, "S": 2}
    attention.print_summary(run)
    text = capsys.readouterr().out
    short, long = (row.split() for row in text.splitlines() if row.startswith("[16, 32)"))
    assert "0 in full layers, 2 in short-window layers" in text and "nan" not in text
    assert short[7] == "-" and float(long[7]) > 0  # the weight of the first 4 keys


def test_statistics_do_not_suffer_from_the_number_format_of_the_forward():
    """Sums of more than 256 terms stop growing in bfloat16: mean logits of 25 then came out as 16."""
    model = constant_attention(distance=7)
    exact, _ = measured(model, length=8 * L)
    found, _ = measured(model, length=8 * L, autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    for name, expected in exact.items():
        atol = 0.01 * expected.nan_to_num().abs().max().item()
        torch.testing.assert_close(found[name], expected, atol=atol, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("max_factor, block_sizes", [(2, [16]), (1, [16]), (2, [16, 32]), (1, [32, 64]), (4, [16, 64])])
def test_runs_are_analyzed_at_their_own_L_at_any_length(max_factor, block_sizes, finished_run, tmp_path):
    """Runs whose L differ, and windows of L or 2 L, used to end in an IndexError or in nan."""
    checkpoint, paths = load_checkpoint(finished_run), []
    for block_size in block_sizes:  # the weights of HoPE do not depend on L
        paths.append(str(tmp_path / f"{block_size}.pt"))
        save_checkpoint(paths[-1], {**checkpoint, "config": {**checkpoint["config"], "block_size": block_size}})
    attention.main([*paths, "--max_factor", str(max_factor), "--windows", "2", "--device", "cpu",
                    "--json", str(tmp_path / "a.json")])
    for run, block_size in zip(json.loads((tmp_path / "a.json").read_text())["runs"], block_sizes):
        assert (run["block_size"], run["length"]) == (block_size, max_factor * block_size)
        for name in ("entropy", "entropy_logn", "norm/q", "inside/pair_share"):
            assert None not in run[name]["mean"]
        assert ("beyond/pair_share" in run) == (max_factor > 1)
        assert ("beyond/pair_excursion" in run) == (max_factor > 2)  # at 2 L, all queries have distances up to L only


def test_pictures_of_attention_are_drawn_from_the_json_at_2_L_too(finished_run, tmp_path, capsys, fails):
    """At 2 L there is no excursion beyond L to draw."""
    pytest.importorskip("matplotlib")
    attention.main([finished_run, "--windows", "2", "--device", "cpu", "--max_factor", "2",
                    "--json", str(tmp_path / "a.json")])
    attention.main(["--json_in", str(tmp_path / "a.json"), "--plot", str(tmp_path / "b.png")])
    assert all((tmp_path / f"b_{name}.png").stat().st_size > 1000 for name in ("distance", "entropy"))
    assert "b_components.png is not drawn" in capsys.readouterr().out and not (tmp_path / "b_components.png").exists()
    (tmp_path / "other.json").write_text('{"runs": [{"name": "rope"}]}')
    code, lines = fails(attention, ["--json_in", str(tmp_path / "other.json"), "--plot", str(tmp_path / "c.png")])
    assert code == 2 and "was not written by" in lines[0]


@pytest.mark.parametrize("arguments, words", [
    (["{tmp}/none"], "no checkpoint"), (["{run}", "--json", "{tmp}/none/a.json"], "folder"), ([], "name OUT_DIR"),
    (["{run}", "--json_in", "{tmp}/a.json"], "name OUT_DIR"), (["--json_in", "{tmp}/a.json"], "with --plot"),
    (["{run}", "--max_factor", "100000"], "lower --max_factor")])
def test_mistakes_get_one_line_and_exit_code_2(arguments, words, finished_run, tmp_path, fails):
    code, lines = fails(attention, [text.format(tmp=tmp_path, run=finished_run) for text in arguments])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
