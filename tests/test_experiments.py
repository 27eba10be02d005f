"""
The experiments on models whose answer is known before they are asked.

    python -m pytest tests/test_experiments.py
"""
import json
import math
import shutil

import pytest
import torch

import experiments.analyze_attention as analyze_attention
import experiments.recall as recall
import experiments.theory as theory
import model as model_file
from experiments.analyze_attention import attention_inputs, logits_of, measure, pair_logits, pair_swing, position_bins
from experiments.output import rounded, run_names
from model import PE, GPTConfig, rope_frequencies, rotate
from tests.test_encodings import tiny

L = 32


def constant_attention(pe="rope", distance=None, head=0):
    """A model whose queries and keys do not look at the text: zero, or such that a head attends to a distance."""
    model = tiny(pe, block_size=L, n_embd=64)                                                # 2 heads of 32 channels
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            if distance is not None:
                q = torch.ones(1, 32) * 3
                k = theory.key_that_peaks_at(q, rope_frequencies(32), distance)
                block.attn.c_attn.bias[32 * head:32 * (head + 1)] = q[0]
                block.attn.c_attn.bias[64 + 32 * head:64 + 32 * (head + 1)] = k[0]
    return model


def measured(model, length=2 * L):
    windows = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    starts = position_bins(L, length)
    return {name: x.mean(0) for name, x in measure(model, windows, starts).items()}, starts


# --- looking inside attention


@pytest.mark.parametrize("pe", PE)
def test_the_pairs_add_up_to_the_logit_of_the_models_own_attention(pe, monkeypatch):
    """Its own: what scaled_dot_product_attention is given, in each layer."""
    seen = []
    attend = model_file.F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q[0] @ k[0].transpose(1, 2) / math.sqrt(q.size(-1)), attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", spy)
    length = L if pe == "learned" else 3 * L
    model = tiny(pe, attn_scaling="logn")
    inside = attention_inputs(model, torch.randint(50, (length,)))
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert len(inside) == len(seen) == 2
    for (q, k, _, bias), (expected, mask) in zip(inside, seen):
        for head in range(2):
            torch.testing.assert_close(pair_logits(q[head], k[head]).sum(0), expected[head], atol=1e-4, rtol=0)
        expected = expected if mask is None else expected + mask[0]
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
        parts = pair_logits(q[head], k[head])                                                # (P, T, T)
        for i in range(L // 2, L):
            seen = parts[:, i, :i + 1] - parts[:, i, :i + 1].mean(-1, keepdim=True)          # (P, i + 1)
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
    for i, start in enumerate(starts[:8]):                                                   # bins of one token
        assert found["entropy"][0, i].item() == pytest.approx(math.log(start + 1), abs=1e-5)
    expected = sum(1 / (n + 1) for n in range(L // 2, L)) / (L // 2)
    assert found["inside/weight_by_distance"][0, 3].item() == pytest.approx(expected, abs=1e-6)
    assert found["inside/weight_by_key"][0, 3].item() == pytest.approx(expected, abs=1e-6)
    assert (found["inside/logit_by_distance"].nan_to_num() == 0).all()


def test_a_pair_with_a_planted_norm_is_where_the_norms_say():
    model = tiny("rope", block_size=L)
    with torch.no_grad():
        for at in (5, 5 + 8):                                                                # pair 5 of head 0's q
            model.transformer.h[1].attn.c_attn.weight[at] *= 20
    found, _ = measured(model)
    assert found["norm/q"][1].argmax() == 5
    assert found["norm/q"][1, 5] > 3 * found["norm/q"][1].median()
    for name, layer in (("k", 1), ("v", 1), ("q", 0)):
        assert found[f"norm/{name}"][layer].max() < 2 * found[f"norm/{name}"][layer].median()


def test_past_L_slow_pairs_leave_their_range_and_pairs_that_have_turned_once_do_not():
    """q = k in one of two heads: S_j is 9 cos(distance * theta_j) / sqrt(32). HoPE lets no pair leave."""
    wavelength = 2 * math.pi / rope_frequencies(32)
    swing = {}
    for pe in ("rope", "hope"):
        found, starts = measured(constant_attention(pe, distance=0), length=8 * L)
        swing[pe] = pair_swing(found["beyond/pair_by_distance"][0], starts, L, beyond=True)
    assert (swing["hope"] < 1e-4).all()
    assert (swing["rope"][wavelength <= L] < 0.1).all()
    assert (swing["rope"][(wavelength > 2.5 * L) & (wavelength < 8 * L)] > 0.5).all()


def test_logn_scaling_sharpens_attention_past_L_only():
    plain, starts = measured(tiny("hope", block_size=L), length=4 * L)
    scaled, _ = measured(tiny("hope", block_size=L, attn_scaling="logn"), length=4 * L)
    inside = torch.tensor(starts) < L
    torch.testing.assert_close(plain["entropy"][:, inside], scaled["entropy"][:, inside])
    assert (plain["entropy"][:, ~inside] > scaled["entropy"][:, ~inside]).all()


def test_bins_start_at_every_small_distance_and_at_L():
    for block_size, length in ((32, 32), (100, 400), (128, 512), (7, 50)):
        starts = position_bins(block_size, length)
        assert starts == sorted(set(starts)) and starts[:6] == list(range(6)) and starts[-1] < length
        assert block_size in starts or block_size == length


def test_analysis_of_checkpoints_writes_json_and_four_pictures(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    kept = shutil.copy(f"{finished_run}/best.pt", str(tmp_path / "ckpt_000010.pt"))
    analyze_attention.main([kept, "--windows", "2", "--device", "cpu", "--json", str(tmp_path / "a.json"),
                            "--plot", str(tmp_path / "a.png")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [run["name"] for run in result["runs"]] == ["ckpt_000010"] and result["runs"][0]["iter"] == 10
    assert {"command", "device", "dataset_sha256"} <= set(result)
    assert all((tmp_path / f"a_{name}.png").stat().st_size > 1000 for name in analyze_attention.PICTURES)
    assert "after 10 steps" in capsys.readouterr().out


def test_an_encoding_without_values_past_L_is_analyzed_inside_alone():
    checkpoint = {"config": vars(tiny("learned").config), "model": tiny("learned").state_dict(), "iter": 0}
    run = analyze_attention.analyze(checkpoint, torch.randint(50, (2, 128)), torch.device("cpu"), torch.no_grad())
    assert run["length"] == 32 and "inside/pair_share" in run and "beyond/pair_share" not in run
    assert run["n_turning"] == 0


# --- what the papers prove


def test_gaussian_queries_and_keys_give_no_decay_in_expectation():
    logits = theory.gaussian_logits(rope_frequencies(32), 200, n_samples=4000, seed=1)       # (4000, 200)
    mean, stderr = logits.mean(0), logits.std(0) / math.sqrt(4000)
    assert (mean.abs() < 5 * stderr).all()
    torch.testing.assert_close(logits.std(0), torch.ones(200), atol=0.05, rtol=0)
    ones = torch.ones(1, 32)
    same = theory.logits_by_distance(ones, ones, rope_frequencies(32), 200)[0]
    assert same[0] == 32 and same[100:].mean() < 16                                          # the decay that is no law


@pytest.mark.parametrize("distance", [0, 3, 50, 500])
def test_a_key_turned_by_r_peaks_at_distance_r(distance):
    theta, q = rope_frequencies(64), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    logits = theory.logits_by_distance(q, theory.key_that_peaks_at(q, theta, distance), theta, 1000)
    assert (logits.argmax(-1) == distance).all()
    torch.testing.assert_close(logits[:, distance], q.square().sum(-1))                      # and with no loss there


def test_a_nope_head_cannot_find_the_previous_of_equal_tokens_and_a_rope_head_can():
    """NoPE with any weights at all, here of a random layer; RoPE by hand."""
    same = torch.full((12,), 7)
    q, k, _, bias = attention_inputs(tiny("nope"), same)[0]
    weights = logits_of(q, k, bias).softmax(-1)                                              # (H, T, T)
    torch.testing.assert_close(weights[:, -1], torch.full((2, 12), 1 / 12))
    assert theory.attention_in_a_run(rope_frequencies(32), 12, scale=8.0)[1] > 0.99
    assert theory.attention_in_a_run(torch.zeros(16), 12, scale=8.0)[1] == pytest.approx(1 / 12)


def test_logits_by_distance_are_what_rotating_query_and_key_gives():
    q, k, theta = torch.randn(3, 16), torch.randn(3, 16), rope_frequencies(16)
    logits = theory.logits_by_distance(q, k, theta, 20)
    turn = [theory.rotation(theta, torch.tensor([position])) for position in (40, 40 - 13)]
    expected = (rotate(q[:, None, None], *turn[0]) * rotate(k[:, None, None], *turn[1])).sum(-1).flatten()
    torch.testing.assert_close(logits[:, 13], expected, atol=1e-4, rtol=1e-4)


# --- recall


@pytest.mark.parametrize("length", [26, 27, 63, 200])
def test_copy_asks_for_the_sequence_that_follows_the_start(length):
    tokens, targets = recall.copy_task(4, length, recall.generator_for(1))
    assert tokens.shape == targets.shape == (4, length)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        asked = [i for i, t in enumerate(target) if t >= 0]
        assert asked == list(range(length - len(asked), length)) and len(asked) in recall.COPIED
        assert row[0] == recall.START and row[asked[0]] == recall.SEPARATOR
        assert [target[i] for i in asked] == row[1:len(asked) + 1] and len(set(row[1:len(asked) + 1])) == len(asked)
        assert row[len(asked) + 1:asked[0]] == [recall.FILLER] * (asked[0] - len(asked) - 1)


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("length", [26, 63, 200])
def test_binding_asks_for_the_second_letter_of_a_pair_and_a_decoy_is_another_pair(length, decoy):
    tokens, targets = recall.binding_task(8, length, recall.generator_for(2), n_asked=1, decoy=decoy)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        assert [i for i, t in enumerate(target) if t >= 0] == [length - 1] and row[-2] == recall.SEPARATOR
        first = row.index(recall.FILLER)
        bound = dict(zip(row[1:first:2], row[2:first:2]))
        assert len(bound) in recall.BOUND and bound[row[-1]] == target[-1]
        assert (row[-3] != recall.FILLER) == decoy and (not decoy or row[-4] not in bound)


def test_in_training_all_bindings_are_asked_for():
    tokens, targets = recall.binding_task(8, 40, recall.generator_for(3))
    for row, target in zip(tokens.tolist(), targets.tolist()):
        bound = dict(zip(row[1::2], row[2:row.index(recall.FILLER):2]))
        assert {row[i]: t for i, t in enumerate(target) if t >= 0} == bound


class Answers(torch.nn.Module):
    """A model that gives each token the answer that a function of the tokens (B, T) names."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.transformer = answer, torch.nn.Module()
        self.transformer.wpe = model_file.NoPE(None)

    def forward(self, tokens, targets=None):
        return torch.nn.functional.one_hot(self.answer(tokens, targets), recall.VOCAB_SIZE).float(), None


def accuracies(answer, task, end=128):
    return recall.test(Answers(answer), recall.TASKS[task][0], end // 2, end, 20, 1, torch.device("cpu"))


def test_accuracy_is_1_for_a_model_that_knows_and_as_stated_for_one_that_guesses():
    for task, (_, chance) in recall.TASKS.items():
        assert accuracies(lambda tokens, targets: targets.clamp(min=0), task)["accuracy"] == 1
        blind = accuracies(lambda tokens, targets: torch.full_like(tokens, 3), task)
        assert abs(blind["accuracy"] - 1 / 32) < 4 * blind["accuracy_stderr"] + 0.01
        assert blind["exact"] < 0.1 and 1 / 32 < chance < 0.5
    first = accuracies(lambda tokens, targets: tokens[:, 2:3].expand_as(tokens), "binding")  # of the first pair, always
    assert abs(first["accuracy"] - recall.TASKS["binding"][1]) < 4 * first["accuracy_stderr"]


def test_a_model_that_takes_the_nearest_pair_falls_for_every_decoy():
    found = accuracies(lambda tokens, targets: tokens.roll(2, dims=1), "decoy")
    assert found["decoy"] == 1 and found["accuracy"] < 0.1


def test_training_and_test_lengths_are_disjoint_and_sequences_depend_on_the_seed_alone(monkeypatch):
    lengths = []

    def noting(task):
        return lambda size, length, *rest: lengths.append(length) or task(size, length, *rest)

    for start, end in ((0, 64), (64, 128), (512, 1024)):
        recall.test(Answers(lambda tokens, targets: tokens), noting(recall.copy_task), start, end, 5, 1,
                    torch.device("cpu"))
        assert all(length % 2 == 1 and start < length <= end for length in lengths[-5:])
    monkeypatch.setattr(recall, "copy_task", noting(recall.copy_task))
    args = recall.make_parser().parse_args(["--max_iters", "5", "--n_embd", "16"])
    recall.train(GPTConfig(vocab_size=recall.VOCAB_SIZE, n_embd=16, block_size=64), args, torch.device("cpu"))
    assert all(length % 2 == 0 and length <= 64 for length in lengths[-5:])
    one, same, other = (recall.copy_task(4, 40, recall.generator_for(*seed))[0] for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_few_steps_of_recall_write_json_and_picture_and_leave_out_learned_past_L(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main(["--pe", "hope", "learned", "--max_iters", "2", "--n_embd", "16", "--max_factor", "2", "--batches", "2",
                 "--device", "cpu", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    hope, learned = result["runs"]
    assert hope["tasks"]["copy"][1]["accuracy"] is not None and learned["tasks"]["copy"][1] is None
    assert {"command", "seed", "device", "chance_without_order"} <= set(result)
    assert "best guess" in capsys.readouterr().out and (tmp_path / "r.png").exists()


def test_a_repeated_passage_is_scored_at_its_second_place():
    """A model that says which token it just read two tokens ago is right on a text of period 2 alone."""
    period = torch.tensor([3, 4]).repeat(40)[None].repeat(2, 1)                              # (2, 80)
    model = Answers(lambda tokens, targets: tokens.roll(1, dims=1))
    found = recall.copy_in_text(model, period, passage=8, distance=16)
    assert found["second_accuracy"] == 1 and found["gain"] == 0 and found["length"] == 24
    mixed = torch.randint(30, (2, 80), generator=torch.Generator().manual_seed(0))
    assert recall.copy_in_text(model, mixed, passage=8, distance=16)["second_accuracy"] < 0.5


def test_in_context_copying_by_checkpoints_writes_json(finished_run, tmp_path, capsys):
    recall.main([finished_run, "--max_factor", "4", "--windows", "3", "--device", "cpu",
                 "--json", str(tmp_path / "t.json")])
    result = json.loads((tmp_path / "t.json").read_text())
    assert [bucket["distance"] for bucket in result["runs"][0]["distances"]] == [4, 8, 12, 16, 32]
    assert "most frequent token" in capsys.readouterr().out and len(result["dataset_sha256"]) == 64


# --- what the experiments share


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names(["out/rope", "out/hope/"]) == ["rope", "hope"]
    assert run_names(["out/rope/ckpt_000100.pt", "out/hope/ckpt_000100.pt"]) == ["rope/ckpt_000100", "hope/ckpt_000100"]


def test_results_keep_four_digits_and_no_nan():
    assert rounded({"a": [1.23456, math.nan, {"b": 3}], "c": "x"}) == {"a": [1.235, None, {"b": 3}], "c": "x"}


@pytest.mark.parametrize("script, arguments, words", [
    (analyze_attention, ["{tmp}/none"], "no checkpoint"), (analyze_attention, [], "OUT_DIR"),
    (analyze_attention, ["{run}", "--json", "{tmp}/none/a.json"], "folder"),
    (analyze_attention, ["{run}", "--max_factor", "100000"], "lower --max_factor"),
    (recall, ["--pe", "rotary"], "nope"), (recall, ["--block_size", "20"], "too short"),
    (recall, ["{tmp}/none"], "no checkpoint"), (theory, ["--head_dim", "7"], "odd")])
def test_mistakes_get_one_line_and_exit_code_2(script, arguments, words, finished_run, tmp_path, fails):
    code, lines = fails(script, [text.format(tmp=tmp_path, run=finished_run) for text in arguments])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
