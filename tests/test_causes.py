"""Interventions at evaluation, against logits written out pair by pair."""
import json
import math

import pytest
import torch

import eval_extrapolation
from common.checkpoint import load_checkpoint, save_checkpoint
from experiments import causes
from experiments.causes import CHANGES, Change
from tests.conftest import tiny

L, T = 16, 50


def make_model(**fields):
    model = tiny(**{"block_size": L, "rope_base": 100.0, "qkv_bias": True} | fields)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # losses that differ
        for block in model.transformer.h:
            if block.attn.c_attn.bias is not None:
                block.attn.c_attn.bias.normal_()
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(40, (3, T + 1), generator=torch.Generator().manual_seed(1))


def own_losses(model, windows):
    return model(windows[:, :-1], windows[:, 1:], reduction="none")[1]


# --- against the model's own attention

ARRANGEMENTS = [{"pe": "rope"}, {"pe": "hope"}, {"pe": "prope", "prope_fraction": 0.5},
                {"pe": "nope"}, {"pe": "rope", "qkv_bias": False},
                {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 5}]
YARN, LOGN = {"rope_scaling": "yarn", "rope_factor": 4.0}, {"attn_scaling": "logn"}
SCALED = [{"pe": "rope", **LOGN}, {"pe": "rope", **YARN}, {"pe": "hope", **YARN, **LOGN},
          {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": L + 4, **YARN,
           **LOGN}]


@pytest.mark.parametrize("fields", ARRANGEMENTS + SCALED, ids=str)
@pytest.mark.parametrize("chunk", [7, 256])
def test_without_a_change_losses_are_the_models_own(fields, chunk, windows):
    model = make_model(**fields)
    found = causes.losses_of(model, windows, Change(), chunk=chunk)
    torch.testing.assert_close(found, own_losses(model, windows))


def test_the_last_L_keys_are_a_window(windows):
    """Of one layer, a token's loss then depends on its last L tokens alone."""
    model = make_model(pe="rope", n_layer=1)
    losses = causes.losses_of(model, windows, Change(keys="last"))
    for end in (L + 3, 40):
        cut = windows[:, end - L:end + 1]
        torch.testing.assert_close(losses[:, end - 1], own_losses(model, cut)[:, -1])


# --- against logits written out


def expected_logit(q, k, a, b, n, m, theta, rotated, change):
    """q and k (T, D / 2), a and b (D / 2,), complex: the logit of query n and key m, pair by pair.
    """
    total = 0
    for j, frequency in enumerate(theta):
        fast, far, angle = frequency * L >= 2 * math.pi, n - m >= L, 0
        if j < rotated:
            angle = (n - m) * frequency
            if far and fast and change.silent:
                continue
            if far and not fast and change.clamped is not None:
                angle = change.clamped * (L - 1) * frequency
        product = q[n, j] * k[m, j].conj()
        if change.biases != "true":
            product -= a[j] * b[j].conj()
        if change.biases == "0":
            product -= (q[n, j] - a[j]) * b[j].conj() + a[j] * (k[m, j] - b[j]).conj()
        total += (product * complex(math.cos(angle), math.sin(angle))).real
    sharper = max(1, math.log(n + 1) / math.log(L)) if change.logn else 1
    return total / math.sqrt(2 * len(theta)) * sharper


def expected_attention(model, x, change, window=T):
    """Loops over heads, queries, keys and pairs: the first layer's attention on x (T, C)."""
    attn, config = model.transformer.h[0].attn, model.config
    C, D = config.n_embd, config.n_embd // config.n_head
    theta = [config.rope_base ** (-2 * j / D) for j in range(D // 2)]
    n_fast = sum(frequency * L >= 2 * math.pi for frequency in theta)
    rotated = len(theta) if config.pe == "rope" else n_fast
    qkv, heads = attn.c_attn(x).double(), []
    for start in range(0, C, D):
        q, k, v = (qkv[:, part + start:part + start + D] for part in (0, C, 2 * C))
        a, b = (attn.c_attn.bias[part + start:part + start + D] for part in (0, C))
        q, k, a, b = (torch.complex(*t.double().chunk(2, dim=-1)) for t in (q, k, a, b))
        rows = []
        for n in range(len(x)):
            seen = range(max(0, n - window + 1), n + 1)
            logits = [expected_logit(q, k, a, b, n, m, theta, rotated, change) for m in seen]
            rows.append(torch.stack(logits).softmax(0) @ v[seen.start:n + 1])
        heads.append(torch.stack(rows))
    return attn.c_proj(torch.cat(heads, dim=1).float())


def check_attention(model, kind, change, expected_change, window=T):
    attn, x = model.transformer.h[0].attn, torch.randn(1, 40, 32)
    with torch.no_grad():
        found = causes.attention(model, attn, x, kind, change, None, chunk=9)
        expected = expected_attention(model, x[0], expected_change, window)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pe", ["rope", "hope"])
@pytest.mark.parametrize("name", [name for name in CHANGES if CHANGES[name].keys == "all"])
def test_changed_logits_are_those_written_out_pair_by_pair(name, pe):
    check_attention(make_model(pe=pe), "L", CHANGES[name], CHANGES[name])


@pytest.mark.parametrize("name", CHANGES)
def test_in_short_window_layers_biases_alone_are_changed(name):
    model = make_model(pe="rope", window_pattern="SL", window=L + 4)
    check_attention(model, "S", CHANGES[name], Change(biases=CHANGES[name].biases), L + 4)


# --- sampled keys


def test_a_query_sees_the_nearest_keys_and_a_random_choice_of_the_others():
    generator = torch.Generator().manual_seed(0)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    draws = torch.stack([causes.sampled_keys(distance, L, generator) for _ in range(400)])
    assert not draws[:, distance < 0].any()
    assert draws[:, (distance >= 0) & (distance < L // 2)].all()
    assert torch.equal(draws.sum(dim=2), torch.arange(1, 61).clamp(max=L).expand(400, 60))
    share = draws[:, 59, :60 - L // 2].double().mean(dim=0)  # how often each of 52 is among 8
    assert (share - 8 / 52).abs().max() < 5 * math.sqrt(8 / 52 / 400)
    assert not torch.equal(draws[0, 58, :50], draws[0, 59, :50])


def test_sampling_is_repeatable_and_the_same_for_any_batch_size(windows):
    model, sampled = make_model(pe="hope"), Change(keys="sampled")
    a, b = (causes.losses_of(model, windows, sampled, batch_size=size) for size in (1, 3))
    torch.testing.assert_close(a, b)
    assert (a - causes.losses_of(model, windows, sampled, seed=1)).abs().max() > 0.01


# --- what is scored


@pytest.mark.parametrize("pe", ["alibi", "learned"])
def test_biases_and_encodings_of_the_embeddings_are_refused(pe, windows):
    with pytest.raises(ValueError, match=f"not in {pe}"):
        causes.losses_of(make_model(pe=pe), windows, Change())


def test_scores_are_differences_from_the_same_windows_without_a_change(windows):
    model = make_model(pe="rope", qkv_bias=False)
    found = causes.score(model, windows, [0, L, 2 * L, 48])
    assert list(found) == [name for name in CHANGES if CHANGES[name].biases == "true"]
    own, changed = (causes.losses_of(model, windows, CHANGES[name])
                    for name in ("nothing", "angles clamped"))
    row = found["angles clamped"]["ranges"][2]
    assert row["nll"] == pytest.approx(changed[:, 32:48].mean().item(), rel=1e-5)
    by_window = (changed - own)[:, 32:48].mean(dim=1)
    assert row["above"] == pytest.approx(by_window.mean().item(), abs=1e-5)
    stderr = (by_window.std() / math.sqrt(3)).item()
    assert row["above_stderr"] == pytest.approx(stderr, rel=1e-3)
    rise = (own[:, 32:48].mean() - own[:, :L].mean()).item()
    expected = -by_window.mean().item() / rise
    assert found["angles clamped"]["removed"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n_windows, used", [(16, slice(None, None, 2)), (32, slice(None))])
def test_windows_are_some_of_those_that_the_evaluation_scores(
        n_windows, used, finished_run, monkeypatch):
    scored = []
    monkeypatch.setattr(causes, "score", lambda model, windows, edges: scored.append(windows))
    flags = [finished_run, "--max_factor", "4", "--windows", str(n_windows)]
    causes.score_runs(causes.make_parser().parse_args(["score", *flags]))
    args = eval_extrapolation.make_parser().parse_args([finished_run, "--max_factor", "4"])
    windows, *_ = eval_extrapolation.choose_windows(args, [load_checkpoint(finished_run)], ["a"])
    assert torch.equal(scored[0], windows[used])


def test_the_command_averages_over_seeds(finished_run, tmp_path):
    checkpoint = load_checkpoint(finished_run)
    for seed in (1, 2):
        args = {**checkpoint["args"], "seed": seed}
        weights = {name: seed * weight for name, weight in checkpoint["model"].items()}
        save_checkpoint(tmp_path / f"{seed}.pt", {**checkpoint, "args": args, "model": weights})
    file = tmp_path / "causes.json"
    causes.main(["score", str(tmp_path / "1.pt"), str(tmp_path / "2.pt"), "--max_factor", "4",
                 "--windows", "4", "--json", str(file)])
    result = json.loads(file.read_text())
    group, = result["groups"]
    assert (group["name"], group["seeds"], result["windows"]) == ("hope", [1, 2], 4)
    change = group["changes"]["log-n"]
    removed = [run["changes"]["log-n"]["removed"] for run in result["runs"]]
    assert change["removed"] == pytest.approx(sum(removed) / 2, rel=1e-3)
