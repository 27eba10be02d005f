"""Pictures of encodings, and what the papers prove about a single head."""
import json
import math

import pytest
import torch

from experiments import figures
from experiments.attention import attention_inputs, logits_of
from model import frequencies, rotate
from tests.conftest import tiny


def theta_of(head_dim):
    """RoPE's frequencies in the precision in which the model has them (head_dim / 2,)."""
    return frequencies(head_dim).float()


# --- the idea


@pytest.mark.parametrize("theta, seen, hatched", [
    (0.5, 360, 0), (2 * math.pi / 128, 360, 0), (2 * math.pi / 256, 180, 180),
    (2 * math.pi / 512, 90, 270), (0, 0, 0)])
def test_the_picture_of_a_pair_shows_the_angles_seen_within_L_and_the_rest(theta, seen, hatched):
    panel = pytest.importorskip("matplotlib.figure").Figure().subplots()
    figures.draw_pair(panel, theta, 128, "red")
    wedges = [patch for patch in panel.patches if hasattr(patch, "theta1")]
    degrees = {hatch: sum(w.theta2 - w.theta1 for w in wedges if bool(w.get_hatch()) == hatch)
               for hatch in (False, True)}
    assert degrees == {False: pytest.approx(seen), True: pytest.approx(hatched)}
    assert ("not\nrotated" in [text.get_text() for text in panel.texts]) == (theta == 0)


def test_the_idea_is_drawn_with_the_pairs_that_the_model_rotates(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "draw_pair", lambda panel, theta, *_: drawn.append(theta))
    figures.main(["idea", "--head_dim", "32", "--block_size", "128",
                  "--plot", str(tmp_path / "idea.png")])
    rope = theta_of(32)[::2].tolist()
    assert drawn == rope + [theta if 2 * math.pi / theta <= 128 else 0 for theta in rope]
    assert (tmp_path / "idea.png").stat().st_size > 1000


# --- statements about a single head


def test_logits_by_distance_are_what_rotating_query_and_key_gives():
    q, k, theta = torch.randn(3, 16), torch.randn(3, 16), theta_of(16)
    logits = figures.logits_by_distance(q, k, theta, 20)
    turned = [rotate(x[:, None, None], *figures.rotation(theta, torch.tensor([position])))
              for x, position in ((q, 40), (k, 40 - 13))]
    expected = (turned[0] * turned[1]).sum(-1).flatten()
    torch.testing.assert_close(logits[:, 13], expected, atol=1e-4, rtol=1e-4)


def test_gaussian_queries_and_keys_give_no_decay_in_expectation():
    logits = figures.gaussian_logits(theta_of(32), 200, n_samples=4000)  # (4000, 200)
    mean, stderr = logits.mean(0), logits.std(0) / math.sqrt(4000)
    assert (mean.abs() < 5 * stderr).all()
    torch.testing.assert_close(logits.std(0), torch.ones(200), atol=0.05, rtol=0)
    ones = torch.ones(1, 32)
    same = figures.logits_by_distance(ones, ones, theta_of(32), 200)[0]
    assert same[0] == 32 and same[100:].mean() < 16  # decay, which is no law


@pytest.mark.parametrize("distance", [0, 3, 50, 500])
def test_a_key_rotated_by_r_peaks_at_distance_r(distance):
    theta, q = theta_of(64), torch.randn(5, 64)
    k = figures.key_that_peaks_at(q, theta, distance)
    logits = figures.logits_by_distance(q, k, theta, 1000)
    assert (logits.argmax(-1) == distance).all()
    torch.testing.assert_close(logits[:, distance], q.square().sum(-1))  # the largest possible


def test_a_nope_head_cannot_find_the_previous_of_equal_tokens_and_a_rope_head_can():
    """NoPE with any weights, here those of a random layer; RoPE by construction."""
    q, k, _, bias = attention_inputs(tiny("nope"), torch.full((12,), 7))[0]
    weights = logits_of(q, k, bias).softmax(-1)  # (H, T, T)
    torch.testing.assert_close(weights[:, -1], torch.full((2, 12), 1 / 12))
    assert figures.attention_in_a_run(theta_of(32), 12, scale=8.0)[1] > 0.99
    assert figures.attention_in_a_run(torch.zeros(16), 12, scale=8.0)[1] == pytest.approx(1 / 12)


def test_just_below_the_smallest_base_a_distance_within_the_context_has_a_negative_sum():
    def lowest(base, length, n_pairs):
        return min(sum(math.cos(m * base ** (-j / n_pairs)) for j in range(n_pairs))
                   for m in range(length + 1))

    for length, n_pairs in ((64, 8), (128, 16), (300, 32)):
        base = figures.smallest_base(length, n_pairs)
        assert lowest(base, length, n_pairs) >= 0 > lowest(base / 1.01, length, n_pairs)
    assert figures.smallest_base(1024, 64) == pytest.approx(4.3e3, rel=0.02)  # the paper's


def test_the_statements_are_written_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(["theory", "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    found = json.loads((tmp_path / "t.json").read_text())
    assert all(max(peak) == pytest.approx(1, rel=1e-3) for peak in found["peaks"].values())
    assert found["smallest_base"]["128"] == pytest.approx(figures.smallest_base(128, 16), rel=1e-3)
    assert max(found["previous"]["rope"]) > 0.99
    assert max(found["previous"]["nope"]) == pytest.approx(1 / 32, rel=1e-3)
    assert (tmp_path / "t.png").stat().st_size > 1000
