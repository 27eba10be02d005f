"""
Interventions at evaluation, against logits written out pair by pair.

    python -m pytest tests/test_causes.py
"""
import json
import math
from pathlib import Path

import pytest
import torch

import eval_extrapolation
import train
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from experiments import causes
from experiments.attention import heads
from experiments.causes import CHANGES, Change
from model import GPT, PE, GPTConfig, HoPE
from tests.conftest import TINY_FLAGS

L, T = 16, 50


def make_model(**fields):
    """An untrained network with large weights, so that attention is far from uniform."""
    torch.manual_seed(0)
    defaults = {"block_size": L, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 32, "rope_base": 100.0}
    model = GPT(GPTConfig(**defaults | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(40, (3, T + 1), generator=torch.Generator().manual_seed(1))


def own_losses(model, windows):
    return model(windows[:, :-1], windows[:, 1:], reduction="none")[1]


ARRANGEMENTS = [{"pe": "rope"}, {"pe": "hope"}, {"pe": "prope", "prope_fraction": 0.5}, {"pe": "nope"},
                {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 5}]


YARN, LOGN = {"rope_scaling": "yarn", "rope_factor": 4.0}, {"attn_scaling": "logn"}
SCALED = [{"pe": "rope", **LOGN}, {"pe": "rope", **YARN}, {"pe": "hope", **YARN, **LOGN}, {"pe": "nope", **LOGN},
          {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": L + 4, **YARN, **LOGN}]


@pytest.mark.parametrize("fields", ARRANGEMENTS + SCALED, ids=str)
@pytest.mark.parametrize("chunk", [7, 256])
def test_without_a_change_losses_are_the_models_own(fields, chunk, windows):
    model = make_model(**fields)
    torch.testing.assert_close(causes.losses_of(model, windows, Change(), chunk=chunk), own_losses(model, windows))


@pytest.mark.parametrize("fields", ARRANGEMENTS, ids=str)
def test_logn_is_that_of_the_model(fields, windows):
    model = make_model(**fields)
    expected = own_losses(make_model(**fields, attn_scaling="logn"), windows)
    torch.testing.assert_close(causes.losses_of(model, windows, Change(logn=True)), expected)
    assert (expected - own_losses(model, windows)).abs().max() > 0.01


def test_the_last_L_keys_are_a_window(windows):
    """A network whose full layers are replaced by short-window layers of L tokens, but for the last one."""
    model = make_model(pe="rope", n_layer=1)
    losses = causes.losses_of(model, windows, Change(keys="last"))
    for end in (L + 3, 40):  # of one layer, a token's loss depends on its last L tokens alone
        cut = windows[:, end - L:end + 1]
        torch.testing.assert_close(losses[:, end - 1], own_losses(model, cut)[:, -1])


def expected_attention(model, x, change):
    """Double loops over queries and keys, complex numbers for pairs: the first layer's attention on x (T, C)."""
    attn, config = model.transformer.h[0].attn, model.config
    D = config.n_embd // config.n_head
    all_theta = [config.rope_base ** (-2 * j / D) for j in range(D // 2)]
    rotated = len(all_theta) if config.pe == "rope" else sum(theta * L >= 2 * math.pi for theta in all_theta)
    qkv, heads = attn.c_attn(x).double(), []
    for h in range(config.n_head):
        q, k, v = (qkv[:, part * config.n_embd + h * D:part * config.n_embd + (h + 1) * D] for part in range(3))
        q, k = (torch.complex(t[:, :D // 2], t[:, D // 2:]) for t in (q, k))
        rows = []
        for n in range(len(x)):
            logits = []
            for m in range(n + 1):
                total = 0
                for j, theta in enumerate(all_theta):
                    fast, far = theta * L >= 2 * math.pi, n - m >= L
                    angle = (n - m) * theta if j < rotated else 0
                    if far and not fast and change.slow != "true" and j < rotated:
                        angle = (L - 1) * theta if change.slow == "clamped" else 0
                    if not (far and fast and change.silent and j < rotated):
                        total += (q[n, j] * k[m, j].conj() * complex(math.cos(angle), math.sin(angle))).real
                logits.append(total / math.sqrt(D) * (max(1, math.log(n + 1) / math.log(L)) if change.logn else 1))
            rows.append(torch.stack(logits).softmax(0) @ v[:n + 1])
        heads.append(torch.stack(rows))
    return attn.c_proj(torch.cat(heads, dim=1).float())


@pytest.mark.parametrize("pe", ["rope", "hope"])
@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change.keys == "all"])
def test_changed_logits_are_those_written_out_pair_by_pair(name, pe):
    model, x = make_model(pe=pe), torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = causes.attention(model, model.transformer.h[0].attn, x, "L", CHANGES[name], None, chunk=9)
        torch.testing.assert_close(found[0], expected_attention(model, x[0], CHANGES[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_no_change_touches_what_lies_within_the_trained_context(name, windows):
    model = make_model(pe="rope")
    changed, own = causes.losses_of(model, windows, CHANGES[name]), own_losses(model, windows)
    torch.testing.assert_close(changed[:, :L], own[:, :L])
    if name != "nothing":
        assert (changed[:, L:] - own[:, L:]).abs().max() > 0.01


def test_changes_leave_short_window_layers_alone(windows):
    model = make_model(pe="rope", window_pattern="SL", window=5)
    x = torch.randn(1, T, 32)
    for change in CHANGES.values():
        with torch.no_grad():
            found, own = (causes.attention(model, model.transformer.h[0].attn, x, "S", a_change, None, 256)
                          for a_change in (change, Change()))
        assert torch.equal(found, own)


def test_a_query_sees_the_nearest_keys_and_a_random_choice_of_the_others():
    generator = torch.Generator().manual_seed(0)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    draws = torch.stack([causes.sampled_keys(distance, L, generator) for _ in range(400)])  # (400, Tq, Tk)
    assert not draws[:, distance < 0].any()
    assert draws[:, (distance >= 0) & (distance < L // 2)].all()
    assert torch.equal(draws.sum(dim=2), torch.arange(1, 61).clamp(max=L).expand(400, 60))
    share = draws[:, 59, :60 - L // 2].double().mean(dim=0)  # how often each of 52 far keys is among 8
    assert (share - 8 / 52).abs().max() < 5 * math.sqrt(8 / 52 / 400)
    assert not torch.equal(draws[0, 58, :50], draws[0, 59, :50])


def test_sampling_is_repeatable_and_the_same_for_any_batch_size(windows):
    model = make_model(pe="hope")
    a, b = (causes.losses_of(model, windows, Change(keys="sampled"), batch_size=size) for size in (1, 3))
    torch.testing.assert_close(a, b)
    assert (a - causes.losses_of(model, windows, Change(keys="sampled"), seed=1)).abs().max() > 0.01


def test_only_changes_that_make_a_difference_are_scored():
    assert list(causes.changes_of(make_model(pe="rope"))) == list(CHANGES)
    hope = {name for name, change in CHANGES.items() if change.slow == "true"} | {"all three"}
    assert set(causes.changes_of(make_model(pe="hope"))) == hope
    assert not any("log-n" in name for name in causes.changes_of(make_model(pe="rope", attn_scaling="logn")))
    assert list(causes.changes_of(make_model(pe="nope"))) == ["nothing", "L keys sampled", "log-n", "last L keys"]


@pytest.mark.parametrize("fields", [{"pe": "alibi"}, {"pe": "learned"}, {"pe": "sinusoidal"},
                                    {"pe": "rope", "local_pe": "alibi", "window_pattern": "SL", "window": 5}], ids=str)
def test_biases_and_encodings_of_the_embeddings_are_refused(fields, windows):
    model = make_model(**fields)
    for call in (lambda: causes.losses_of(model, windows, Change()), lambda: causes.peaks(model, windows),
                 lambda: causes.previous_token_heads(model, windows)):
        with pytest.raises(ValueError, match=f"not in {fields.get('local_pe', fields['pe'])}"):
            call()


def test_a_local_encoding_that_no_layer_has_is_not_refused(windows):
    model = make_model(pe="rope", local_pe="alibi")  # without windows
    torch.testing.assert_close(causes.losses_of(model, windows, Change()), own_losses(model, windows))


def test_scores_are_paired_differences_and_groups_the_means_of_seeds(windows):
    edges, models = [0, L, 2 * L, 48], [make_model(pe="rope"), make_model(pe="rope", rope_base=50.0)]
    config = vars(models[0].config)
    runs = [{"name": str(seed), "seed": seed, "args": {"seed": seed}, "config": config, "peak": 1.0 + seed,
             "changes": causes.score(model, windows, edges)} for seed, model in enumerate(models)]
    own, changed = (causes.losses_of(models[0], windows, change) for change in (Change(), Change("clamped")))
    row = runs[0]["changes"]["angles clamped"][2]
    assert row["nll"] == pytest.approx(changed[:, 32:48].mean().item(), rel=1e-5)
    by_window = (changed - own)[:, 32:48].mean(dim=1)
    assert row["above"] == pytest.approx(by_window.mean().item(), abs=1e-5)
    assert row["above_stderr"] == pytest.approx((by_window.std() / math.sqrt(3)).item(), rel=1e-3)
    group, = causes.mean_changes(runs)
    rows = [run["changes"]["angles clamped"] for run in runs]
    assert group["seeds"] == [0, 1] and group["peak"] == 1.5 and group["peak_stderr"] == pytest.approx(0.5)
    mean = sum(ranges[2]["above"] for ranges in rows) / 2
    assert group["changes"]["angles clamped"]["ranges"][2]["above"] == pytest.approx(mean)
    removed = [-ranges[2]["above"] / (run["changes"]["nothing"][2]["nll"] - run["changes"]["nothing"][0]["nll"])
               for ranges, run in zip(rows, runs)]
    assert group["changes"]["angles clamped"]["removed"] == pytest.approx(sum(removed) / 2)
    assert group["changes"]["angles clamped"]["removed_stderr"] == pytest.approx(abs(removed[0] - removed[1]) / 2)


# --- noise


def test_the_highest_peak_is_that_of_the_mean_cosine():
    theta = torch.tensor([1.0, 0.3, 0.11])
    expected = max(sum(math.cos(d * t) for t in theta.tolist()) / 3 for d in range(16, 200))
    assert causes.highest_peak(theta, 16, 200) == pytest.approx(expected)


def test_spacings_keep_the_ends_and_the_number_of_pairs_and_differ_in_their_peaks():
    config = GPTConfig(block_size=128, n_head=2, n_embd=128, pe="hope")
    own, equal, late = (pe(config).theta for pe in (HoPE, causes.spaced("equal"), causes.spaced("late")))
    for theta in (equal, late):
        assert len(theta) == len(own) == 11
        torch.testing.assert_close(theta[[0, -1]], own[[0, -1]])
        assert (theta.diff() < 0).all() and theta.dtype == torch.float32
    torch.testing.assert_close(equal.diff(), (own[-1] - own[0]).expand(10) / 10)
    low, middle, high = (causes.highest_peak(theta, 128, 2048) for theta in (late, own, equal))
    assert low < middle < high and high > 0.95


def test_a_spacing_replaces_hope_for_its_context_only():
    own = PE["hope"]
    with causes.in_spacing("equal"):
        assert make_model(pe="hope", n_embd=64).transformer.wpe.theta.diff().std() < 1e-6
    with causes.in_spacing(None):
        assert PE["hope"] is own
    assert PE["hope"] is own


def test_the_peak_is_that_of_the_mean_logit_of_independent_tokens(windows):
    model = make_model(pe="rope", n_layer=1)
    theta = [t for t in model.transformer.wpe.theta.tolist() if t * L >= 2 * math.pi]
    block, n = model.transformer.h[0], len(theta)
    with torch.no_grad():
        q, k, _ = heads(block.attn, block.ln_1(model.transformer.wte(windows[:, :L])))  # (3, 2, L, 16)
    values, pos = [], torch.arange(L)
    for h in range(2):
        tokens_q, tokens_k = (torch.complex(t[:, h, :, :n], t[:, h, :, 8:8 + n]).flatten(0, 1) for t in (q, k))
        products = (tokens_q[:, None] * tokens_k.conj()).flatten(0, 1)  # every query with every key
        mean = [(products * torch.polar(torch.ones(n), d * torch.tensor(theta))).real.sum(1).mean().item()
                for d in range(16 * L)]
        cos, sin = model.transformer.wpe.rotary(pos)
        rotated_q, rotated_k = (torch.complex(t[:, h, :, :8], t[:, h, :, 8:]) * torch.complex(cos, sin) for t in (q, k))
        logits = (rotated_q[:, :, None] * rotated_k[:, None].conj()).real.sum(-1)  # (3, L, L)
        std = torch.cat([logits[:, i, :i + 1].flatten() for i in range(L)]).std().item()
        values.append((max(mean[L:]) - sum(mean[:L]) / L) / std)
    assert causes.peaks(model, windows) == pytest.approx(sum(values) / 2, rel=1e-3)


def test_without_fast_pairs_there_is_no_peak(windows):
    assert causes.peaks(make_model(pe="nope"), windows) == 0
    assert causes.peaks(make_model(pe="prope", prope_fraction=0.0), windows) == 0


def test_rank_correlation():
    assert causes.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert causes.rank_correlation([1, 2, 3, 4], [5, 1, 0, -9]) == pytest.approx(-1)
    assert causes.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)


def test_correlations_are_taken_in_each_seed():
    rows = [{"pe": pe, "seed": seed, "peak": peak, "rise": sign * peak + 0.1 * (pe == "hope")}
            for pe in ("rope", "hope") for seed, sign in ((1, 1), (2, -1)) for peak in (0.1, 0.35, 0.6)]
    found = {(row["pe"], row["seed"]): (row["models"], round(row["rank_correlation"], 9))
             for row in causes.correlations(rows)}
    assert found["rope", 1] == (3, 1) and found["hope", 2] == (3, -1) and found["all", 1][0] == 6


# --- heads


@pytest.mark.parametrize("fields", ARRANGEMENTS, ids=str)
def test_weights_and_shares_of_a_head_are_those_written_out(fields, windows):
    model = make_model(**fields)
    rows = causes.previous_token_heads(model, windows)
    theta = (model.encodings["L"].theta.tolist() if fields["pe"] != "nope" else [])
    band = [0 if 2 * math.pi / t < 16 else 2 for t in theta] + [3] * (8 - len(theta))  # L = 16: no turn in between
    layer = len(model.transformer.h) - 1  # the last one is full in all of them
    inputs = []
    hook = model.transformer.h[layer].attn.register_forward_pre_hook(lambda attn, args: inputs.append(args[0]))
    with torch.no_grad():
        model(windows[:, :L])
        hook.remove()
        q, k, _ = heads(model.transformer.h[layer].attn, inputs[0])
    q, k = (torch.complex(t[..., :8], t[..., 8:]) for t in (q / 4, k))
    angles = torch.tensor([*theta, *[0.0] * (8 - len(theta))])
    for h in range(2):
        weights, above = [], []
        for window in range(3):
            for n in range(L // 2, L):
                turn = torch.polar(torch.ones(n + 1, 8), (n - torch.arange(n + 1))[:, None] * angles)
                logits = (q[window, h, n] * k[window, h, :n + 1].conj() * turn).real  # (n + 1, 8)
                weights.append(logits.sum(1).softmax(0)[n - 1])
                above.append(logits[n - 1] - logits.mean(0))
        above, row = torch.stack(above).mean(0), rows[-2:][h]
        assert (row["layer"], row["head"]) == (layer + 1, h + 1)
        assert row["weight"] == pytest.approx(torch.stack(weights).mean().item(), rel=1e-3)
        assert row["logit"] == pytest.approx(above.sum().item(), rel=1e-3, abs=1e-4)
        expected = [sum(a for a, b in zip(above.tolist(), band) if b == i) / above.sum().item() for i in range(4)]
        assert row["shares"] == pytest.approx(expected, rel=1e-2, abs=1e-3)


# --- the command


def test_windows_are_some_of_those_that_the_evaluation_scores(finished_run):
    args = causes.make_parser().parse_args(["score", finished_run, "--max_factor", "4", "--windows", "16"])
    scored = eval_extrapolation.make_parser().parse_args([finished_run, "--max_factor", "4"])
    checkpoints = [load_checkpoint(finished_run)]
    windows, edges, _, text_sha256 = eval_extrapolation.choose_windows(scored, checkpoints, ["hope"])
    _, found, found_edges, scored_on = causes.text_windows(args, [finished_run])
    assert torch.equal(found, windows[::2]) and found_edges == edges and scored_on["dataset_sha256"] == text_sha256


@pytest.mark.parametrize("wanted, there, used", [(16, 24, 16), (32, 24, 24), (8, 24, 8), (16, 5, 5)])
def test_a_short_text_gives_as_many_windows_as_it_can(wanted, there, used, finished_run, monkeypatch):
    windows = torch.arange(there)
    monkeypatch.setattr(causes, "document_windows", lambda *_: windows)
    args = causes.make_parser().parse_args(["score", finished_run, "--windows", str(wanted)])
    _, found, _, scored_on = causes.text_windows(args, [finished_run])
    assert torch.equal(found, windows[::max(1, there // wanted)][:used]) and scored_on["windows"] == len(found) == used


def test_the_commands_score_train_and_compare(finished_run, dataset, tmp_path, capsys, fails):
    causes.main(["score", finished_run, "--max_factor", "4", "--windows", "4", "--json", str(tmp_path / "causes.json")])
    written = json.loads((tmp_path / "causes.json").read_text())
    assert "adds" in capsys.readouterr().out
    assert written["command"].startswith("python -m experiments.causes") and written["groups"][0]["seeds"] == [1]
    assert [row["end"] for row in written["runs"][0]["changes"]["nothing"]] == [16, 32, 64]

    causes.main(["heads", finished_run, "--max_factor", "2", "--windows", "2", "--json", str(tmp_path / "heads.json")])
    run, = json.loads((tmp_path / "heads.json").read_text())["runs"]
    assert len(run["heads"]) == 4 and run["heads"][0]["weight"] >= run["heads"][1]["weight"]

    for spacing in ("equal", "late"):
        out_dir = str(tmp_path / spacing)
        causes.main(["train", spacing, *TINY_FLAGS, "--dataset", dataset, "--out_dir", out_dir, "--max_iters", "2",
                     "--pe", "hope", "--n_embd", "64", "--rope_base", "10"])
    causes.main(["score", out_dir, "--spacing", "late", "--max_factor", "2", "--windows", "2"])
    with causes.in_spacing("late"):
        late = load_model(out_dir).transformer.wpe.theta
    causes.main(["train", "late", "--resume", "--out_dir", out_dir, "--max_iters", "3"])
    assert torch.equal(load_checkpoint(out_dir)["model"]["transformer.wpe.theta"], late)
    for script, arguments in ((eval_extrapolation, [out_dir]), (causes, ["score", out_dir]),
                              (train, ["--resume", "--out_dir", out_dir, "--max_iters", "4"])):
        code, lines = fails(script, arguments)  # HoPE with its own spacing would be another network
        assert code == 2 and len(lines) == 1 and ("do not fit" in lines[0] or "not resumed" in lines[0])


def copies(finished_run, folder, *changes):
    """Checkpoints of a finished run in which args, config or iter are changed -> their paths."""
    paths = []
    for name, change in changes:
        checkpoint = load_checkpoint(finished_run)
        paths.append(str(folder / f"{name}.pt"))
        save_checkpoint(paths[-1], {key: {**value, **change.get(key, {})} if isinstance(value, dict)
                                    else change.get(key, value) for key, value in checkpoint.items()})
    return paths


def test_a_run_is_scored_again_only_if_its_flags_its_step_or_the_windows_have_changed_and_others_are_kept(
        finished_run, tmp_path, monkeypatch, fails):
    file, scored, score = str(tmp_path / "causes.json"), [], causes.score
    monkeypatch.setattr(causes, "score", lambda *args: scored.append(1) or score(*args))

    def names_after(names_and_changes, windows="2"):
        """-> how many runs were scored, names of all runs in the file."""
        scored.clear()
        causes.main(["score", *copies(finished_run, tmp_path, *names_and_changes), "--max_factor", "2", "--windows",
                     windows, "--json", file])
        return len(scored), [run["name"] for run in json.loads(Path(file).read_text())["runs"]]

    rate = 0.0123456789  # more digits than the file has
    a, b = ("a", {}), ("b", {"args": {"seed": 2, "learning_rate": rate}})
    assert names_after([a, b]) == (2, ["a", "b"])
    assert names_after([a, b]) == (0, ["a", "b"]) and names_after([b]) == (0, ["a", "b"])
    assert names_after([("b", {"args": {"seed": 2}})]) == (1, ["a", "b"])
    assert names_after([("a", {"iter": 4})]) == (1, ["b", "a"])
    assert names_after([("a", {"config": {"attn_scaling": "logn"}})]) == (1, ["b", "a"])
    assert names_after([("c", {"args": {"seed": 3}})]) == (1, ["b", "a", "c"])
    assert names_after([("c", {"args": {"seed": 3}})], windows="1") == (1, ["c"])  # nothing else fits these windows
    again, = copies(finished_run, tmp_path, ("d", {"args": {"seed": 3}}))
    code, lines = fails(causes, ["score", again, "--max_factor", "2", "--windows", "1", "--json", file])
    assert code == 2 and len(lines) == 1 and "c, d have the same flags, and two of them the same seed" in lines[0]


def test_groups_differ_in_the_seed_alone_and_are_named_by_what_differs(finished_run, tmp_path):
    paths = copies(finished_run, tmp_path, ("a", {"args": {"seed": 1}}), ("b", {"args": {"seed": 2}}),
                   ("c", {"args": {"seed": 1, "learning_rate": 0.5, "out_dir": "c"}}))
    causes.main(["score", *paths, "--max_factor", "2", "--windows", "2", "--json", str(tmp_path / "causes.json")])
    groups = json.loads((tmp_path / "causes.json").read_text())["groups"]
    rate = load_checkpoint(finished_run)["args"]["learning_rate"]
    assert [(group["name"], group["seeds"]) for group in groups] == [
        (f"hope learning_rate {rate:g}", [1, 2]), ("hope learning_rate 0.5", [1])]


@pytest.mark.parametrize("line, words", [
    ("score", "score what"), ("heads", "heads what"), ("noise", "noise what"), ("noise {tmp}", "--scores"),
    ("noise {tmp} {run} --scores {tmp}/a.json", "noise takes the folder"), ("score {run} --max_factor 1", "at least 2"),
    ("noise {tmp} --scores {tmp}/none.json", "none.json"), ("noise {tmp} --scores {tmp}/nope.json", "run that rotates"),
    *[(f"{command} {{tmp}}/{name}.json", f"{name}.json was not written by") for name in "abcd"
      for command in ("noise {tmp} --scores", "score {run} --json")]])
def test_mistakes_get_one_line(line, words, finished_run, tmp_path, fails):
    for name, text in (("a", '{"runs": [{"name"'), ("b", "[1]"), ("c", '{"runs": [{"name": "rope", "heads": []}]}'),
                       ("d", "{}")):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "nope.json").write_text(json.dumps({"runs": [
        {"pe": "nope", "attn_scaling": "none", "config": vars(GPTConfig(pe="nope")), "buckets": [{}]}]}))
    code, lines = fails(causes, line.format(run=finished_run, tmp=tmp_path).split())
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


def test_noise_needs_scores_and_compares_models(finished_run, tmp_path, capsys):
    eval_extrapolation.main([finished_run, "--windows", "2", "--json", str(tmp_path / "scores.json")])
    causes.main(["noise", str(Path(finished_run).parent), "--scores", str(tmp_path / "scores.json"), "--windows", "2",
                 "--json", str(tmp_path / "noise.json")])
    row, = json.loads((tmp_path / "noise.json").read_text())["runs"]
    scored, = json.loads((tmp_path / "scores.json").read_text())["runs"]
    assert row["rise"] == pytest.approx(scored["buckets"][-1]["nll"] - scored["buckets"][0]["nll"], rel=1e-3)
    assert math.isfinite(row["peak"])


def test_two_pairs_have_no_other_spacing():
    with causes.in_spacing("equal"), pytest.raises(ValueError, match="rotates 2 pairs"):
        make_model(pe="hope", n_embd=32)


def test_an_unknown_spacing_is_refused(fails):
    code, lines = fails(causes, ["train", "@config/cpu_demo"])
    assert code == 2 and len(lines) == 1 and "train equal or late" in lines[0]
