"""
The experiments, on models whose answers are known beforehand: attention, theory, recall, pictures, logs, benchmark.

    python -m pytest tests/test_experiments.py
"""
import importlib
import json
import math
import shutil
import sys
from functools import partial

import pytest
import torch

import model as model_file
from common import arrangements, report
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import DeviceConfig, Place
from common.report import rounded, run_names
from experiments import (
    analyze_attention,
    bench,
    draw_attention,
    draw_encodings,
    draw_idea,
    plot_log,
    recall,
    tasks,
    theory,
)
from experiments.analyze_attention import attention_inputs, logits_of, measure, pair_logits, pair_swing, position_bins
from model import GPT, PE, GPTConfig, alibi_slopes, frequencies, rotate
from tests.test_encodings import tiny

L = 32
CPU = Place(DeviceConfig(device="cpu", dtype="float32"))


def theta_of(head_dim):
    """RoPE's frequencies in the precision in which the model has them (head_dim / 2,)."""
    return frequencies(head_dim).float()


def constant_attention(pe="rope", distance=None, head=0):
    """A model whose queries and keys ignore the text: zero, or such that one head attends to a distance."""
    model = tiny(pe, block_size=L, n_embd=64)  # 2 heads of 32 channels
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            if distance is not None:
                q = torch.ones(1, 32) * 3
                k = theory.key_that_peaks_at(q, theta_of(32), distance)
                block.attn.c_attn.bias[32 * head:32 * (head + 1)] = q[0]
                block.attn.c_attn.bias[64 + 32 * head:64 + 32 * (head + 1)] = k[0]
    return model


def measured(model, length=2 * L, **options):
    windows = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    starts = position_bins(L, length)
    return {name: x.mean(0) for name, x in measure(model, windows, starts, **options).items()}, starts


# --- looking inside attention


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
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert len(inside) == len(seen) == 2
    for (q, k, _, bias), (expected, mask) in zip(inside, seen):
        for head in range(2):
            torch.testing.assert_close(pair_logits(q[head], k[head]).sum(0), expected[head], atol=1e-4, rtol=0)
        if mask is not None:  # visible or not, or a bias
            expected = expected.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else expected + mask[0]
        torch.testing.assert_close(logits_of(q, k, bias)[:, past], expected[:, past], atol=1e-4, rtol=0)


def test_a_hooked_model_is_left_as_it_was():
    model, idx = tiny("hope"), torch.randint(50, (1, 40))
    before = model(idx)[0]
    attention_inputs(model, idx[0])
    assert torch.equal(model(idx)[0], before) and not model.transformer.h[0].attn._forward_pre_hooks


def test_the_shares_of_the_pairs_are_their_covariance_with_the_logit_and_add_up_to_one():
    model, idx = tiny("rope", block_size=L), torch.randint(50, (2 * L,))
    found = analyze_attention.measure_layer(*attention_inputs(model, idx)[0], L, position_bins(L, 2 * L))
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
    for group in ("inside", "beyond"):
        logit = found[f"{group}/logit_by_distance"][0].nan_to_num(-math.inf)
        assert starts[logit.argmax()] == distance
        weight = found[f"{group}/weight_by_distance"][0].nan_to_num(0)
        assert starts[weight.argmax()] == distance


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
    wavelength = 2 * math.pi / theta_of(32)
    swing = {}
    for pe in ("rope", "hope"):
        found, starts = measured(constant_attention(pe, distance=0), length=8 * L)
        swing[pe] = pair_swing(found["beyond/pair_by_distance"][0], starts, L, beyond=True)
    assert (swing["hope"] < 1e-4).all()
    assert (swing["rope"][wavelength <= L] < 0.1).all()
    assert (swing["rope"][(wavelength > 2.5 * L) & (wavelength < 8 * L)] > 0.5).all()


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
    run = analyze_attention.analyze({"config": vars(model.config), "model": model.state_dict(), "iter": 0},
                                    torch.randint(50, (2, 4 * L)), CPU)
    swing = torch.tensor(run["beyond/pair_swing"]["layers"])
    assert (swing[0] == 0).all() and torch.tensor(run["inside/pair_swing"]["layers"]).isfinite().all()
    assert torch.tensor(run["inside/logit_by_distance"]["mean"])[torch.tensor(starts) < L].isfinite().all()


def test_bins_start_at_every_small_distance_and_at_L():
    for block_size, length in ((32, 32), (100, 400), (128, 512), (7, 50)):
        starts = position_bins(block_size, length)
        assert starts == sorted(set(starts)) and starts[:6] == list(range(6)) and starts[-1] < length
        assert block_size in starts or block_size == length


def test_analysis_of_checkpoints_writes_json_and_its_pictures(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    kept = shutil.copy(f"{finished_run}/best.pt", str(tmp_path / "ckpt_000010.pt"))
    analyze_attention.main([kept, "--windows", "2", "--device", "cpu", "--json", str(tmp_path / "a.json"),
                            "--plot", str(tmp_path / "a.png")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [run["name"] for run in result["runs"]] == ["ckpt_000010"] and result["runs"][0]["iter"] == 10
    assert {"command", "device", "dataset_sha256"} <= set(result)
    assert all((tmp_path / f"a_{name}.png").stat().st_size > 1000 for name in draw_attention.DRAWINGS)
    assert "after 10 steps" in capsys.readouterr().out


def test_an_encoding_without_values_beyond_L_is_analyzed_inside_alone():
    checkpoint = {"config": vars(tiny("learned").config), "model": tiny("learned").state_dict(), "iter": 0}
    run = analyze_attention.analyze(checkpoint, torch.randint(50, (2, 128)), CPU)
    assert run["length"] == 32 and "inside/pair_share" in run and "beyond/pair_share" not in run
    assert run["n_turning"] == 0


def test_layers_with_windows_are_named_and_have_no_weight_on_keys_that_no_query_sees(capsys):
    model = tiny("nope", local_pe="hope", window_pattern="SL", window=8)
    checkpoint = {"config": vars(model.config), "model": model.state_dict(), "iter": 0}
    run = {"name": "a", **analyze_attention.analyze(checkpoint, torch.randint(50, (2, 128)), CPU)}
    assert run["layers"] == "nope+hope:SL:8" and run["n_turning"] == 0 and run["rotated"] == {"L": 0, "S": 2}
    analyze_attention.print_summary(run)
    text = capsys.readouterr().out
    short, long = (row.split() for row in text.splitlines() if row.startswith("[16, 32)"))
    assert "0 in L layers, 2 in S layers" in text and "nan" not in text
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
    analyze_attention.main([*paths, "--max_factor", str(max_factor), "--windows", "2", "--device", "cpu",
                            "--json", str(tmp_path / "a.json")])
    for run, block_size in zip(json.loads((tmp_path / "a.json").read_text())["runs"], block_sizes):
        assert (run["block_size"], run["length"]) == (block_size, max_factor * block_size)
        for name in ("entropy", "entropy_logn", "norm/q", "inside/pair_share"):
            assert None not in run[name]["mean"]
        assert all(None not in layer for layer in run["inside/pair_swing"]["layers"])
        assert ("beyond/pair_share" in run) == (max_factor > 1)
        assert ("beyond/pair_swing" in run) == (max_factor > 2)  # at 2 L, all queries have distances up to L only


def test_the_summary_does_not_count_more_attention_than_there_is(finished_run, capsys):
    """With L = 16, some queries inside L have 9 keys: 16 times their mean weight at distances below 16 was above 1."""
    analyze_attention.main([finished_run, "--windows", "2", "--device", "cpu"])
    header, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert "of nearest 8" in header and len(rows) == 4
    assert all(0 < float(row.split()[8]) <= 1 for row in rows), rows


def test_pictures_of_attention_are_drawn_from_the_json_at_2_L_too(finished_run, tmp_path, monkeypatch, fails):
    """At 2 L there is no excursion beyond L to draw."""
    pytest.importorskip("matplotlib")
    analyze_attention.main([finished_run, "--windows", "2", "--device", "cpu", "--max_factor", "2",
                            "--json", str(tmp_path / "a.json")])
    monkeypatch.setattr(draw_attention, "DRAWINGS", {"components": draw_attention.plot_components})
    draw_attention.main([str(tmp_path / "a.json"), "--plot", str(tmp_path / "b.png")])
    assert (tmp_path / "b_components.png").stat().st_size > 1000
    (tmp_path / "other.json").write_text('{"runs": [{"name": "rope"}]}')
    code, lines = fails(draw_attention, [str(tmp_path / "other.json"), "--plot", str(tmp_path / "c.png")])
    assert code == 2 and "was not written by" in lines[0]


# --- what the papers prove


def test_gaussian_queries_and_keys_give_no_decay_in_expectation():
    logits = theory.gaussian_logits(theta_of(32), 200, n_samples=4000, seed=1)  # (4000, 200)
    mean, stderr = logits.mean(0), logits.std(0) / math.sqrt(4000)
    assert (mean.abs() < 5 * stderr).all()
    torch.testing.assert_close(logits.std(0), torch.ones(200), atol=0.05, rtol=0)
    ones = torch.ones(1, 32)
    same = theory.logits_by_distance(ones, ones, theta_of(32), 200)[0]
    assert same[0] == 32 and same[100:].mean() < 16  # decay, which is no law


@pytest.mark.parametrize("distance", [0, 3, 50, 500])
def test_a_key_rotated_by_r_peaks_at_distance_r(distance):
    theta, q = theta_of(64), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    logits = theory.logits_by_distance(q, theory.key_that_peaks_at(q, theta, distance), theta, 1000)
    assert (logits.argmax(-1) == distance).all()
    torch.testing.assert_close(logits[:, distance], q.square().sum(-1))  # and is as large as it can be


def test_a_nope_head_cannot_find_the_previous_of_equal_tokens_and_a_rope_head_can():
    """NoPE with any weights, here those of a random layer; RoPE by construction."""
    same = torch.full((12,), 7)
    q, k, _, bias = attention_inputs(tiny("nope"), same)[0]
    weights = logits_of(q, k, bias).softmax(-1)  # (H, T, T)
    torch.testing.assert_close(weights[:, -1], torch.full((2, 12), 1 / 12))
    assert theory.attention_in_a_run(theta_of(32), 12, scale=8.0)[1] > 0.99
    assert theory.attention_in_a_run(torch.zeros(16), 12, scale=8.0)[1] == pytest.approx(1 / 12)


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_has_the_format_that_its_name_says_and_few_colours(tmp_path, suffix, start):
    figure = report.import_pyplot().figure()
    report.save_picture(figure, tmp_path / f"a{suffix}")
    picture = (tmp_path / f"a{suffix}").read_bytes()
    assert picture.startswith(start) and (suffix != ".png" or picture[25] == 3)  # 3: with a palette


def test_at_the_smallest_base_no_distance_within_the_context_has_a_negative_sum_of_cosines_and_just_below_it_one_has():
    def lowest(base, length, n_pairs):
        return min(sum(math.cos(m * base ** (-j / n_pairs)) for j in range(n_pairs)) for m in range(length + 1))

    for length, n_pairs in ((64, 8), (128, 16), (300, 32)):
        base = theory.smallest_base(length, n_pairs)
        assert lowest(base, length, n_pairs) >= 0 > lowest(base / 1.01, length, n_pairs)
    assert theory.smallest_base(1024, 64) == pytest.approx(4.3e3, rel=0.02)  # the paper's, for 128 channels


def test_logits_by_distance_are_what_rotating_query_and_key_gives():
    q, k, theta = torch.randn(3, 16), torch.randn(3, 16), theta_of(16)
    logits = theory.logits_by_distance(q, k, theta, 20)
    turn = [theory.rotation(theta, torch.tensor([position])) for position in (40, 40 - 13)]
    expected = (rotate(q[:, None, None], *turn[0]) * rotate(k[:, None, None], *turn[1])).sum(-1).flatten()
    torch.testing.assert_close(logits[:, 13], expected, atol=1e-4, rtol=1e-4)


# --- recall


@pytest.mark.parametrize("length", [26, 27, 63, 200])
def test_copy_asks_for_the_sequence_that_follows_the_start(length):
    tokens, targets = tasks.copy_task(4, length, tasks.generator_for(1))
    assert tokens.shape == targets.shape == (4, length)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        asked = [i for i, t in enumerate(target) if t >= 0]
        assert asked == list(range(length - len(asked), length)) and len(asked) in tasks.COPIED
        assert row[0] == tasks.START and row[asked[0]] == tasks.SEPARATOR
        assert [target[i] for i in asked] == row[1:len(asked) + 1] and len(set(row[1:len(asked) + 1])) == len(asked)
        assert row[len(asked) + 1:asked[0]] == [tasks.FILLER] * (asked[0] - len(asked) - 1)


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("length", [26, 63, 200])
def test_binding_asks_for_the_second_letter_of_a_pair_and_a_decoy_is_another_pair(length, decoy):
    tokens, targets = tasks.binding_task(8, length, tasks.generator_for(2), n_asked=1, decoy=decoy)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        assert [i for i, t in enumerate(target) if t >= 0] == [length - 1] and row[-2] == tasks.SEPARATOR
        first = row.index(tasks.FILLER)
        bound = dict(zip(row[1:first:2], row[2:first:2]))
        assert len(bound) in tasks.BOUND and bound[row[-1]] == target[-1]
        assert (row[-3] != tasks.FILLER) == decoy and (not decoy or row[-4] not in bound)


def test_in_training_all_bindings_are_asked_for_in_random_order():
    tokens, targets = tasks.binding_task(8, 40, tasks.generator_for(3))
    orders = set()
    for row, target in zip(tokens.tolist(), targets.tolist()):
        bound = dict(zip(row[1::2], row[2:row.index(tasks.FILLER):2]))
        asked = {row[i]: t for i, t in enumerate(target) if t >= 0}
        assert asked == bound
        orders.add(tuple(list(bound).index(letter) for letter in asked))
    assert len(orders) > 4


def triples_of(row):
    """The triples before the separator, in order, and their places."""
    letters = [i for i in range(1, row.index(tasks.SEPARATOR)) if row[i] != tasks.FILLER]
    places = letters[::3]
    assert letters == [i + j for i in places for j in range(3)]
    return [tuple(row[i:i + 3]) for i in places], places


@pytest.mark.parametrize("length", [38, 63, 200, 1023])
def test_match_asks_for_one_of_nine_triples_and_four_others_share_a_letter_with_it(length):
    asked_for, places_seen = set(), set()
    for seed in range(20):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), testing=True)
        assert tokens.shape == targets.shape == (8, length)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            assert [i for i, t in enumerate(target) if t >= 0] == [length - 1] and row[-3] == tasks.SEPARATOR
            triples, places = triples_of(row)
            assert len({c for *_, c in triples}) == len(triples) == 9
            assert len({token for triple in triples for token in triple}) == 15
            asked = (*row[-2:], target[-1])
            asked_for.add(triples.index(asked))
            places_seen |= set(places)
            assert [sum(triple[i] == asked[i] for triple in triples) for i in range(3)] == [3, 3, 1]
    assert asked_for == set(range(9))
    assert min(places_seen) <= 1 + length // 20 and max(places_seen) >= length - 5 - length // 20


def test_in_training_match_asks_for_up_to_three_triples_of_grids_of_all_sizes_in_random_order():
    sizes, layouts, orders, neighbours = set(), set(), set(), set()
    for seed in range(80):
        tokens, targets = tasks.match_task(4, 38 + 2 * (seed % 14), tasks.generator_for(seed))
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            answers = [i for i, t in enumerate(target) if t >= 0]
            order = [triples.index((row[i - 1], row[i], target[i])) for i in answers]
            assert len(set(order)) == len(order) == min(3, len(triples)) and row[answers[0] - 2] == tasks.SEPARATOR
            size = len({a for a, *_ in triples}), len({b for _, b, _ in triples})
            assert size[0] * size[1] == len(triples)
            if size == (3, 3):
                orders.add(tuple(order))
                neighbours.add(tuple(x == y for x, y in zip(*triples[:2])))
        sizes.add(size)
        layouts.add(tuple(token == tasks.FILLER for token in row))
    assert sizes == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)} and len(layouts) > 50
    assert len(orders) > 25 and neighbours == {(True, False, False), (False, True, False), (False, False, False)}


@pytest.mark.parametrize("length", [39, 63, 200, 1023])
def test_a_crowd_has_no_filler_and_every_triple_but_one_matches_in_one_letter_of_two(length):
    places = set()
    for seed in range(6):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), testing=True, crowd=True)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            a, b, c = *row[-2:], target[-1]
            assert row.count(tasks.FILLER) <= 2 and len(triples) == (length - 4) // 3
            places.add(triples.index((a, b, c)))
            others = [triple for triple in triples if triple != (a, b, c)]
            assert len(others) == len(triples) - 1
            first = [triple for triple in others if triple[0] == a and triple[1] != b]
            second = [triple for triple in others if triple[0] != a and triple[1] == b]
            assert len(first) + len(second) == len(others) and 0 <= len(second) - len(first) <= 1
            assert all(triple[2] not in (a, b, c) for triple in others)
            assert len({token for triple in others for token in triple}) > (length > 100) * 15
    assert len(places) > 2


class Answers(torch.nn.Module):
    """A model that answers each token with what a function of the tokens and targets (B, T) returns."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.transformer = answer, torch.nn.Module()
        self.transformer.wpe = model_file.NoPE(None)

    def forward(self, tokens, targets=None, cache=None):
        return torch.nn.functional.one_hot(self.answer(tokens, targets), tasks.VOCAB_SIZE).float(), None


TASKS = tasks.EASY.tested | tasks.HARD.tested


def accuracies(answer, task, end=128):
    return recall.test(Answers(answer), TASKS[task][0], end // 2, end, 20, 1, torch.device("cpu"),
                       tasks.HARD.shortest)


def test_accuracy_is_1_for_a_model_that_knows_and_as_stated_for_a_guess():
    for task, (_, chance) in TASKS.items():
        assert accuracies(lambda tokens, targets: targets.clamp(min=0), task)["accuracy"] == 1
        blind = accuracies(lambda tokens, targets: torch.full_like(tokens, 3), task)
        assert abs(blind["accuracy"] - 1 / 32) < 4 * blind["accuracy_stderr"] + 0.01
        assert blind["exact"] < 0.1 and (chance is None or 1 / 32 < chance < 0.5)
    first = accuracies(lambda tokens, targets: tokens[:, 2:3].expand_as(tokens), "binding")  # of the first pair, always
    assert abs(first["accuracy"] - TASKS["binding"][1]) < 4 * first["accuracy_stderr"]

    def third_of_one_that_shares(letter):
        """The third letter of a random triple that has the first (1) or second (2) letter of the question."""
        def answer(tokens, targets):
            place = letter - 3  # of the letter in the question
            share = (tokens[:, :-3] == tokens[:, place:place + 1 or None]) * torch.rand(tokens[:, :-3].shape)
            return tokens.gather(1, share.argmax(1, keepdim=True) + 3 - letter).expand_as(tokens)
        return answer

    for letter in (1, 2):
        found = accuracies(third_of_one_that_shares(letter), "match")
        assert abs(found["accuracy"] - TASKS["match"][1]) < 4 * found["accuracy_stderr"]


def test_a_model_that_takes_the_nearest_pair_falls_for_every_decoy():
    found = accuracies(lambda tokens, targets: tokens.roll(2, dims=1), "decoy")
    assert found["decoy"] == 1 and found["accuracy"] < 0.1
    found = accuracies(lambda tokens, targets: tokens.roll(3, dims=1), "crowd")
    assert found["decoy"] == 1 and found["accuracy"] < 0.2


def test_training_and_test_lengths_are_disjoint_and_sequences_depend_on_the_seed_alone(monkeypatch):
    lengths = []

    def noting(task):
        return lambda size, length, *rest: lengths.append(length) or task(size, length, *rest)

    for start, end in ((0, 64), (63, 66), (64, 128), (512, 1024)):
        recall.test(Answers(lambda tokens, targets: tokens), noting(tasks.copy_task), start, end, 5, 1,
                    torch.device("cpu"), 26)
        assert all(length % 2 == 1 and max(start, 25) < length <= end for length in lengths[-5:])
    monkeypatch.setattr(tasks.EASY, "trained", (noting(tasks.copy_task),))
    args = recall.make_parser().parse_args(["--max_iters", "5", "--n_embd", "16"])
    recall.train(GPTConfig(vocab_size=tasks.VOCAB_SIZE, n_embd=16, block_size=64), args, 1, torch.device("cpu"))
    assert all(length % 2 == 0 and length <= 64 for length in lengths[-5:])
    one, same, other = (tasks.copy_task(4, 40, tasks.generator_for(*seed))[0] for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_few_steps_of_recall_write_json_and_picture_and_leave_out_learned_beyond_L(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main(["--pe", "hope", "learned", "--max_iters", "2", "--n_embd", "16", "--max_factor", "2", "--batches", "2",
                 "--device", "cpu", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    hope, learned = result["runs"]
    assert hope["tasks"]["copy"][1]["accuracy"] is not None and learned["tasks"]["copy"][1] is None
    assert {"command", "seed", "device", "chance_in_part"} <= set(result)
    assert "best guess" in capsys.readouterr().out and (tmp_path / "r.png").exists()


RECALL = ["--max_iters", "1", "--n_embd", "16", "--max_factor", "2", "--batches", "1", "--device", "cpu"]


def test_a_few_steps_of_the_hard_tasks_write_tables_json_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [*RECALL, "--pe", "hope", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    recall.main(["--hard", *arguments])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["runs"][0]["tasks"].keys() == {"match", "crowd"} and result["flags"]["hard"]
    assert result["chance_in_part"] == {"match": 0.3333, "crowd": None} and result["chance_exact_without_order"] is None
    output = capsys.readouterr().out
    for words in ("match: accuracy", "crowd: accuracy", "matches one letter of two 0.333", "nearest triple's"):
        assert words in output
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_the_generator_takes_any_seed_that_the_flag_takes():
    numbers = {tasks.generator_for(2**32, 1024, i).initial_seed() for i in range(15)}
    assert len(numbers) == 15


def test_recall_of_several_seeds_is_averaged_and_a_killed_command_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    arguments = [*RECALL, "--pe", "hope", "nope+rope:SL:4", "--seed", "1", "2", "--json", str(tmp_path / "r.json")]
    trained, train_and_test = [], recall.train_and_test

    def stopping(config, seed, args, device):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((arrangements.name_of(config), seed))
        return train_and_test(config, seed, args, device)

    monkeypatch.setattr(recall, "train_and_test", stopping)
    with pytest.raises(KeyboardInterrupt):
        recall.main(arguments)
    assert not (tmp_path / "r.json").exists()
    trained.clear()
    recall.main(arguments)
    assert trained == [("nope+rope:SL:4", 2)] and [path.name for path in tmp_path.iterdir()] == ["r.json"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for name in ("hope", "nope+rope:SL:4") for seed in (1, 2)]
    assert result["runs"][3]["config"]["local_pe"] == "rope" and result["runs"][3]["config"]["window"] == 4
    for i, mean in enumerate(result["means"]):
        values = [run["tasks"]["copy"][1]["accuracy"] for run in result["runs"][2 * i:2 * i + 2]]
        assert mean["tasks"]["copy"][1]["accuracy"] == pytest.approx(sum(values) / 2, abs=1e-3)
        assert mean["tasks"]["copy"][1]["accuracy_stderr"] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-3)
    assert "hope, seed 2" in capsys.readouterr().out


def test_recall_trains_with_the_flags_of_the_network_and_with_the_seed(monkeypatch):
    """--local_pe and --window have no effect here, since the arrangement sets them, and --attn_scaling none inside L;
    every other flag has one."""
    def run(*flags):
        args = recall.make_parser().parse_args([*RECALL, "--max_iters", "3", "--pe", "hope:SL:4", *flags])
        return recall.train_and_test_all(args, torch.device("cpu"))[0]

    monkeypatch.setattr(recall, "test", lambda *args: {"accuracy": 0.0})
    plain = run()["loss"]
    assert run()["loss"] == plain
    assert run("--hard")["tasks"].keys() == {"match", "crowd"}
    idle = ("--local_pe", "--window", "--attn_scaling")
    for flag in (("--local_pe", "rope"), ("--window", "2"), ("--rope_base", "100"), ("--local_rope_base", "100"),
                 ("--hope_cutoff", "11"), ("--seed", "2"), ("--optimizer", "adamw"), ("--muon_learning_rate", "0.1"),
                 ("--attn_scaling", "logn"), ("--hard",)):
        changed = run(*flag)
        assert (changed["loss"] == plain) == (flag[0] in idle), flag
        assert (changed["config"]["attn_scaling"] == "logn") == (flag[0] == "--attn_scaling")


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: "-".join(map(str, layers.values())))
def test_sequences_that_pass_in_chunks_get_the_same_answers(layers):
    model, tokens = tiny(**layers, block_size=40), torch.randint(50, (3, 37))
    whole = recall.most_likely(model, tokens, tokens)
    assert torch.equal(whole, model(tokens, tokens)[0].argmax(-1)) and whole.shape == tokens.shape
    torch.testing.assert_close(recall.most_likely(model, tokens, tokens, chunk=8), whole)


@pytest.mark.parametrize("text, fields", [
    ("hope", {"pe": "hope"}),
    ("hope:SSSL:16", {"pe": "hope", "local_pe": None, "window_pattern": "SSSL", "window": 16}),
    ("nope+rope:SL:0", {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 0})])
def test_an_arrangement_is_read_and_named(text, fields):
    assert arrangements.fields_of(text) == fields
    assert arrangements.name_of(GPTConfig(**fields)) == text


@pytest.mark.parametrize("text", ["", "rotary", "hope:SL", "hope:16", "hope+rope", "hope:SL:-1", "hope:SXL:4",
                                  "+rope:SL:4", "nope+rotary:SL:4", "hope:SL:4:5"])
def test_what_is_no_arrangement_is_refused(text):
    with pytest.raises(ValueError, match="--pe"):
        arrangements.fields_of(text)


def test_a_repeated_passage_is_scored_at_its_second_position():
    """A model that repeats the token before the current one is right on a text of period 2 only."""
    period = torch.tensor([3, 4]).repeat(40)[None].repeat(2, 1)  # (2, 80)
    model = Answers(lambda tokens, targets: tokens.roll(1, dims=1))
    found = recall.copy_in_text(model, period, period[:, :8], distance=16)
    assert found["second_accuracy"] == 1 and found["gain"] == 0 and found["length"] == 24
    mixed = torch.randint(30, (2, 80), generator=torch.Generator().manual_seed(0))
    assert recall.copy_in_text(model, mixed, mixed[:, :8], distance=16)["second_accuracy"] < 0.5


def test_a_needle_stands_at_both_places_and_its_second_half_alone_is_scored():
    windows, needles = torch.randint(30, (3, 50)), torch.randint(30, (3, 8))
    seen, right_from = [], 4

    def knows_the_second_half(tokens, targets):
        seen.append(tokens)
        right = torch.arange(tokens.size(1)) % 24 >= right_from - 1  # of the needles at 0 and 24
        return torch.where(right, targets, torch.full_like(targets, 31))

    model = Answers(knows_the_second_half)
    assert recall.copy_in_text(model, windows, needles, 24, scored_from=4)["second_accuracy"] == 1
    for row, (text, other) in enumerate(seen):
        assert torch.equal(text[:8], needles[row]) and torch.equal(text[24:], needles[row, :7])
        assert torch.equal(other[:8], windows[row - 1, :8]) and torch.equal(other[8:], text[8:])
        assert torch.equal(text[8:24], windows[row, 8:24])
    assert recall.copy_in_text(model, windows, needles, 24, scored_from=3)["second_accuracy"] == pytest.approx(0.8)


def test_in_context_copying_by_checkpoints_writes_json_and_picture(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main([finished_run, "--max_factor", "4", "--windows", "3", "--device", "cpu",
                 "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    result = json.loads((tmp_path / "t.json").read_text())
    for what in ("distances", "needles"):
        assert [bucket["distance"] for bucket in result["runs"][0][what]] == [4, 8, 12, 16, 32]
    output = capsys.readouterr().out
    assert "most frequent token" in output and len(result["dataset_sha256"]) == 64
    gain = output.split("needles: loss")[1].splitlines()[2].split()
    assert float(gain[1]) == pytest.approx(result["runs"][0]["needles"][0]["gain"], abs=1e-3)
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_needles_are_shuffled_passages_scored_from_their_middle(finished_run, monkeypatch):
    calls = []
    monkeypatch.setattr(recall, "copy_in_text", lambda model, windows, passages, distance, scored_from=1:
                        calls.append((windows, passages, distance, scored_from)))
    args = recall.make_parser().parse_args([finished_run, "--max_factor", "2", "--windows", "9", "--device", "cpu"])
    recall.test_language_models(args, Place(args))
    passages, needles = calls[:len(calls) // 2], calls[len(calls) // 2:]
    assert [call[2:] for call in passages] == [(distance, 1) for distance in (4, 8, 12, 16)]
    assert [call[2:] for call in needles] == [(distance, 2) for distance in (4, 8, 12, 16)]
    for (windows, passage, *_), (_, needle, *_) in zip(passages, needles):
        assert torch.equal(passage, windows[:, :4]) and not torch.equal(needle, passage)
        assert torch.equal(needle.sort().values, passage.sort().values)
        assert torch.equal(needle, needles[0][1])  # the same at every distance


def test_in_context_copying_is_averaged_over_seeds_and_over_nothing_else():
    def run(name, gain):
        bucket = {"distance": 4, "gain": gain, "gain_stderr": 9.0}
        return {"name": name, "pe": "hope", "distances": [bucket, None], "needles": [bucket]}

    def checkpoint(**changes):
        args = {"seed": 1, "out_dir": "a", "learning_rate": 0.1, **changes}
        return {"config": vars(GPTConfig(pe="hope")), "args": args}

    runs = [run("a", 1.0), run("b", 4.0), run("c", 2.0)]
    found = recall.mean_over_seeds_in_text(runs, [checkpoint(), checkpoint(learning_rate=0.2),
                                                  checkpoint(seed=2, out_dir="b")])
    assert [(mean["name"], mean["seeds"]) for mean in found] == [
        ("hope learning_rate 0.1", [1, 2]), ("hope learning_rate 0.2", [1])]
    for what in ("distances", "needles"):
        assert found[0][what][0] == {"distance": 4, "gain": 1.5, "gain_stderr": pytest.approx(0.5)}
        assert found[1][what] == runs[1][what]
    assert found[0]["distances"][1] is None
    for changes in ({"learning_rate": 0.2}, {}):  # another run, or another checkpoint of the same one
        assert recall.mean_over_seeds_in_text(runs[:2], [checkpoint(), checkpoint(**changes)]) == runs[:2]


# --- what encodings add to the logit, and the idea in one picture


def test_what_an_encoding_adds_is_drawn_as_it_is():
    kind, lines = draw_encodings.logit_by_distance(tiny("alibi"), 100)
    assert kind.startswith("bias")
    torch.testing.assert_close(lines, -alibi_slopes(2)[:, None] * torch.arange(100.0))
    for pe in ("rope", "hope", "prope"):
        model = tiny(pe)
        theta = torch.zeros(8)
        theta[:len(model.transformer.wpe.theta)] = model.transformer.wpe.theta
        expected = 2 / math.sqrt(16) * torch.cos(torch.arange(100)[:, None] * theta).sum(-1)
        torch.testing.assert_close(draw_encodings.logit_by_distance(model, 100)[1][0], expected, atol=1e-4, rtol=0)
    line = draw_encodings.logit_by_distance(tiny("learned"), 100)[1][0]
    assert line[:32].isfinite().all() and line[32:].isnan().all() and line[0] == pytest.approx(1)
    line = draw_encodings.logit_by_distance(tiny("sinusoidal"), 100)[1][0]
    torch.testing.assert_close(line, torch.cos(torch.arange(100)[:, None] * theta_of(32)).mean(-1), atol=1e-4, rtol=0)


def test_layers_that_differ_are_drawn_one_by_one_and_end_with_their_window(monkeypatch):
    pytest.importorskip("matplotlib")
    model = tiny("nope", local_pe="alibi", window_pattern="SL", window=7)
    for layers, expected in (("S", -alibi_slopes(2)[:, None] * torch.arange(7.0)), ("L", torch.zeros(1, 7))):
        lines = draw_encodings.logit_by_distance(model, 50, layers)[1]
        torch.testing.assert_close(lines[:, :7], expected)
        assert lines[:, 7:].isnan().all() == (layers == "S")
    figures = []
    monkeypatch.setattr(draw_encodings, "save_picture", lambda figure, path: figures.append(figure))
    draw_encodings.draw([model, tiny("rope"), tiny("rope", window_pattern="SL"),
                         tiny("hope", window_pattern="SL", window=4)], 2, "x.png")
    titles = [panel.get_title().split("\n")[0] for panel in figures[0].axes]
    assert [title for title in titles if title] == ["alibi in S layers", "nope in L layers", "rope", "rope",
                                                    "hope in S layers", "hope in L layers"]


@pytest.mark.parametrize("theta, seen, hatched", [
    (0.5, 360, 0), (2 * math.pi / 128, 360, 0), (2 * math.pi / 256, 180, 180), (2 * math.pi / 512, 90, 270), (0, 0, 0)])
def test_the_picture_of_a_pair_shows_the_angles_seen_within_L_and_the_rest(theta, seen, hatched):
    panel = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw_idea.draw_pair(panel, theta, 128, "red")
    wedges = [patch for patch in panel.patches if hasattr(patch, "theta1")]
    assert sum(w.theta2 - w.theta1 for w in wedges if not w.get_hatch()) == pytest.approx(seen)
    assert sum(w.theta2 - w.theta1 for w in wedges if w.get_hatch()) == pytest.approx(hatched)
    assert ("not\nrotated" in [text.get_text() for text in panel.texts]) == (theta == 0)


def test_the_idea_is_drawn_with_the_pairs_that_the_model_rotates(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(draw_idea, "draw_pair", lambda panel, theta, L, color: drawn.append(theta))
    draw_idea.main(["--head_dim", "32", "--block_size", "128", "--plot", str(tmp_path / "idea.png")])
    expected = theta_of(32)[::2].tolist()
    assert drawn == expected + [theta if 2 * math.pi / theta <= 128 else 0 for theta in expected]
    assert (tmp_path / "idea.png").stat().st_size > 1000


# --- logs


@pytest.fixture
def logs(tmp_path):
    """write(name, *lines) -> the folder of a run with this log."""
    def write(name, *lines):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                                                  for line in lines))
        return str(folder)
    return write


def log_line(step, **losses):
    return {"iter": step, "tokens": 512 * step, "seconds": 0.5 * step, **losses}


def drawn_lines(monkeypatch, arguments):
    """The arguments of plot_log -> color, x and y of each line in the picture."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(report, "save_picture", lambda figure, path: figures.append(figure))
    plot_log.main(arguments)
    return [(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines]


@pytest.mark.parametrize("x, scale", [("iter", 1), ("tokens", 512), ("seconds", 0.5)])
def test_losses_of_all_runs_are_drawn_over_steps_tokens_or_seconds(x, scale, logs, monkeypatch):
    a = logs("a", log_line(0, val_loss=4.0), log_line(10, val_loss=3.0), log_line(20, val_loss=2.0))
    b = logs("b", log_line(0, val_loss=5.0), log_line(30, val_loss=1.0))
    lines = drawn_lines(monkeypatch, [a, b, "--x", x])
    assert lines[0][1:] == ([0, 10 * scale, 20 * scale], [4.0, 3.0, 2.0])
    assert lines[1][1:] == ([0, 30 * scale], [5.0, 1.0]) and len(lines) == 2


def test_training_losses_are_drawn_where_the_log_has_them_also_between_evaluations(logs, monkeypatch):
    run = logs("a", log_line(0, val_loss=4.0), log_line(5, train_loss=3.5), log_line(10, val_loss=3.0, train_loss=2.5))
    assert [line[1:] for line in drawn_lines(monkeypatch, [run])] == [([0, 10], [4.0, 3.0]), ([5, 10], [3.5, 2.5])]


def test_a_log_line_that_a_kill_cut_short_is_left_out(logs, monkeypatch):
    run = logs("a", log_line(0, val_loss=4.0), log_line(10, val_loss=3.0), '{"iter": 20, "tok')
    assert [line[1:] for line in drawn_lines(monkeypatch, [run])] == [([0, 10], [4.0, 3.0])]


def test_a_finished_run_is_drawn_in_the_colour_of_its_encoding_and_summed_up(finished_run, monkeypatch, capsys):
    lines = drawn_lines(monkeypatch, [finished_run])
    assert {color for color, _, _ in lines} == {report.STYLES["hope"][0]} and lines[0][1] == [0, 5, 10]
    assert f"{min(lines[0][2]):.4f}" in capsys.readouterr().out


def test_the_picture_of_losses_is_written(finished_run, tmp_path):
    pytest.importorskip("matplotlib")
    plot_log.main([finished_run, "--plot", str(tmp_path / "losses.png")])
    assert (tmp_path / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize("lines, words", [
    ((), "no validation loss"), ((log_line(0, train_loss=1.0),), "no validation loss"), (({"loss": 1},), "not a log"),
    (("[1]\n",), "not a log"), (None, "there is no")])
def test_a_folder_without_losses_is_refused_in_one_line(lines, words, logs, tmp_path, fails):
    pytest.importorskip("matplotlib")
    run = str(tmp_path / "nothing") if lines is None else logs("a", *lines)
    code, output = fails(plot_log, [run, "--plot", str(tmp_path / "x.png")])
    assert code == 2 and len(output) == 1 and words in output[0]


# --- benchmark


def test_the_benchmark_can_be_imported_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as if there were no such module
    importlib.reload(bench)


def test_the_benchmark_compares_every_encoding_with_nope(tmp_path, capsys):
    sizes = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --vocab_size 11 --repeats 1".split()
    bench.main(["train", "evaluate", *sizes, "--device", "cpu", "--dtype", "float32",
                "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["train"]["encodings"]) == set(PE) and set(result["evaluate"]) == {"hope", "alibi"}
    for found in result["train"]["encodings"].values():
        assert found["ratio"] == pytest.approx(found["seconds"] / found["nope_seconds"])  # of a single round
    assert result["config"]["n_embd"] == 16 and "tokens/s" in capsys.readouterr().out


TINY_BENCH = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --repeats 1 --device cpu".split()


def test_the_benchmark_of_windows_compares_with_the_same_network_without(tmp_path, monkeypatch, capsys):
    generated = []  # 1,000 tokens take a while
    monkeypatch.setattr(GPT, "generate", lambda model, prompt, n, top_k: generated.append((model.config.window, n)))
    bench.main(["windows", *TINY_BENCH, "--pe", "nope+rope:SL:3", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["windows"]["nope+rope:SL:3"]
    assert all(set(row) == {"nope", "nope+rope:SL:3"} for row in found.values()) and len(found) == 5
    # keys and values of 16 channels in float32: 1,000 tokens in each layer, or window - 1 = 2 in the first
    assert found["cache in bytes after 1,000 tokens"] == {"nope": 2 * 128 * 1000, "nope+rope:SL:3": 128 * 1002}
    assert found["a training step"]["nope"]["ratio"] == 1 and "0.26 MB" in capsys.readouterr().out
    assert set(generated) == {(0, 1000), (3, 1000)}


def test_the_benchmark_of_the_compiler_takes_the_same_step_compiled_and_not(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model.config.pe) or model)
    bench.main(["compile", *TINY_BENCH, "--pe", "hope", "alibi", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["compile"]
    assert compiled == list(found) == ["hope", "alibi"] and all(row["compiled"]["ratio"] > 0 for row in found.values())
    assert all(row["as it is"]["ratio"] == 1 and row["compiled"]["first step"] > 0 for row in found.values())


def test_the_baseline_is_nanogpts_network_with_nanogpts_settings(dataset, tmp_path):
    """Its weights, put into a GPT with learned positions, which is GPT-2, give the same logits."""
    args = bench.make_parser().parse_args(["time_to_loss", *TINY_BENCH, "--dataset", dataset, "--compete", "nanogpt:7"])
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    run = bench.make_runs(args, sizes, CPU, 3, str(tmp_path))["nanogpt, 7 steps"]
    plain, model = run.model, GPT(run.model.config)
    weights = {"transformer.wte.weight": plain.tokens.weight, "transformer.wpe.weight": plain.positions.weight,
               "transformer.ln_f.weight": plain.norm.weight, "lm_head.weight": plain.head.weight}
    for i, layer in enumerate(plain.layers):
        for name, part in zip(("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"), layer):
            weights[f"transformer.h.{i}.{name}.weight"] = part.weight
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in model.state_dict().items()}
    for name, weight in model.state_dict().items():  # the same initial distribution
        assert weights[name].std().item() == pytest.approx(weight.std().item(), rel=0.35, abs=1e-6)
    model.load_state_dict(weights)
    tokens = torch.randint(run.model.config.vocab_size, (2, 8))
    for ours, theirs in zip(model(tokens, tokens), plain(tokens, tokens)):
        torch.testing.assert_close(ours, theirs)
    rates = []
    for _ in range(7):
        run.step()
        rates.append(run.lr)
    assert rates[0] == pytest.approx(1e-3 / 101) and run.config.lr_decay_iters == 7
    assert type(run.optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0]
    assert sum(w.numel() for group in run.optimizer.param_groups for w in group["params"]) == sum(
        w.numel() for w in plain.parameters())


class Clockwork:
    """A run whose steps are noted; each lowers the loss by 0.1."""

    def __init__(self, name, steps, taken):
        self.name, self.taken, self.iter, self.tokens_per_step = name, taken, 0, 5
        self.config, self.place = bench.TrainConfig(max_iters=steps, batch_size=2), CPU
        self.model = self.fast_model = tiny("nope")
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.ids = {"train": torch.zeros(100, dtype=torch.int16)}

    def step(self):
        self.iter += 1
        self.taken.append(self.name)

    def evaluate(self):
        return {"val_loss": 5 - 0.1 * self.iter}


def test_a_race_advances_all_runs_by_the_same_part_of_their_schedule_and_times_their_steps_only(monkeypatch):
    taken = []
    monkeypatch.setattr(bench, "seconds", lambda call, device: call() or {"a": 1.0, "b": 3.0}[taken[-1]])
    curves = bench.race({"a": Clockwork("a", 9, taken), "b": Clockwork("b", 3, taken)}, torch.device("cpu"), 2)
    assert "".join(taken) == "abaaabaaabaa"
    assert [(point["iter"], point["seconds"], point["tokens"]) for point in curves["a"]] == [
        (n, n, 5 * n) for n in (2, 4, 6, 8, 9)]
    assert [(point["iter"], point["seconds"]) for point in curves["b"]] == [(2, 6), (3, 9)]
    found = bench.reached({**curves, "fast": [{"iter": 1, "tokens": 7, "seconds": 3.0, "val_loss": 4.0},
                                              {"iter": 2, "tokens": 14, "seconds": 30.0, "val_loss": 1.0}]})
    assert found["a"] == {"last loss": pytest.approx(4.1), "loss by then": pytest.approx(4.1), "steps": 9, "tokens": 45,
                          "seconds": 9, "ratio": 1}
    assert found["b"]["seconds"] == found["b"]["ratio"] == math.inf and found["b"]["loss by then"] == pytest.approx(4.7)
    assert found["fast"]["ratio"] == pytest.approx(1 / 3) and found["fast"]["loss by then"] == 4.0


def test_time_to_loss_prints_medians_over_seeds_and_draws_them(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bench.main(["time_to_loss", *TINY_BENCH, "--dataset", dataset, "--seed", "1", "2", "--eval_interval", "2",
                "--eval_iters", "1", "--compete", "nanogpt:4", "muon:4", "adamw:4:1e-9", "--pe", "hope:SL:2",
                "--warmup_iters", "1", "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    result = json.loads((tmp_path / "t.json").read_text())["time_to_loss"]
    names = ["nanogpt, 4 steps", "hope:SL:2 muon, 4 steps", "hope:SL:2 adamw 1e-09, 4 steps"]
    assert list(result["medians"]) == names and result["seeds"] == [1, 2] and len(result["races"]) == 2
    assert [point["iter"] for point in result["races"][1][names[1]]] == [2, 4]
    assert result["medians"][names[0]]["ratio"] == 1 and result["medians"][names[2]]["seconds"] is None
    assert "medians over 2 seeds" in capsys.readouterr().out and (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of the parent is counted on Linux only")
def test_the_memory_of_an_encoding_does_not_include_that_of_the_benchmark_itself(monkeypatch, capsys):
    ballast = torch.ones(400_000_000)  # 1.6 GB
    monkeypatch.setattr(bench, "PE", {"nope": PE["nope"]})
    bench.main(["memory", *"--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --device cpu".split()])
    gigabytes = float(capsys.readouterr().out.split()[-2])
    assert 0.05 < gigabytes < 1.2 and len(ballast)


# --- what the experiments share


def test_the_first_run_of_an_encoding_has_a_solid_line_and_others_of_it_differ():
    found = report.styles([{"pe": pe} for pe in ("rope", "hope", "rope", "rope", "hope", "mine")])
    assert [style["linestyle"] for style in found] == ["-", "-", "--", ":", "--", "-"]
    assert found[0]["color"] == found[2]["color"] != found[1]["color"]


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names(["out/rope", "out/hope/"]) == ["rope", "hope"]
    assert run_names(["out/rope/ckpt_000100.pt", "out/hope/ckpt_000100.pt"]) == ["rope/ckpt_000100", "hope/ckpt_000100"]


def test_results_keep_four_digits_and_no_nan():
    assert rounded({"a": [1.23456, math.nan, {"b": 3}], "c": "x"}, digits=4) == {"a": [1.235, None, {"b": 3}], "c": "x"}


@pytest.mark.parametrize("script, arguments, words", [
    (analyze_attention, ["{tmp}/none"], "no checkpoint"), (analyze_attention, [], "OUT_DIR"),
    (draw_idea, ["--head_dim", "7"], "odd"), (draw_encodings, ["{tmp}/none"], "no checkpoint"),
    (analyze_attention, ["{run}", "--json", "{tmp}/none/a.json"], "folder"),
    (analyze_attention, ["{run}", "--max_factor", "100000"], "lower --max_factor"),
    (recall, ["--pe", "rotary"], "nope"), (recall, ["--block_size", "38"], "use 39 or more"),
    (recall, ["--hard", "--block_size", "56"], "use 57 or more"),
    (recall, ["--pe", "hope:SL"], "not an arrangement"), (recall, ["--seed", "-1"], "at least 0"),
    (recall, ["--pe", "nope+learned:SL:4"], "local_pe learned"), (recall, ["--window_pattern", "SXL"], "letters"),
    (bench, ["time_to_loss", "--compete", "sgd:10"], "not a way to train"), (bench, ["speed"], "no benchmark"),
    (bench, ["time_to_loss", "--compete", "nanogpt:10:1e-3"], "nanogpt:STEPS"),
    (bench, ["time_to_loss", "--compete", "muon:0"], "at least 1"),
    (bench, ["windows", "--pe", "hope:S"], "arrangement"),
    (recall, ["{tmp}/none"], "no checkpoint"), (theory, ["--head_dim", "7"], "odd")])
def test_mistakes_get_one_line_and_exit_code_2(script, arguments, words, finished_run, tmp_path, fails):
    code, lines = fails(script, [text.format(tmp=tmp_path, run=finished_run) for text in arguments])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
