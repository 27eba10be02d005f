"""The picture of RoPE and HoPE."""
import math

import pytest
from matplotlib.figure import Figure

from experiments import figures
from model import frequencies


@pytest.mark.parametrize("theta, seen, hatched, text", [
    (0.5, 360, 0, "10\nturns"), (2 * math.pi / 112, 360, 0, "1 turn"),
    (2 * math.pi / 128, 360, 0, "1 turn"), (2 * math.pi / 256, 180, 180, "256"),
    (2 * math.pi / 512, 90, 270, "512"), (0, 0, 0, "not\nrotated")])
def test_the_picture_of_a_pair_shows_the_angles_seen_within_L_and_the_rest(
        theta, seen, hatched, text):
    panel = Figure().subplots()
    figures.draw_pair(panel, theta, 128, "red")
    wedges = [patch for patch in panel.patches if hasattr(patch, "theta1")]
    degrees = {hatch: sum(w.theta2 - w.theta1 for w in wedges if bool(w.get_hatch()) == hatch)
               for hatch in (False, True)}
    assert degrees == {False: pytest.approx(seen), True: pytest.approx(hatched)}
    assert panel.texts[0].get_text() == text


def test_the_idea_is_drawn_with_the_pairs_that_the_model_rotates(monkeypatch, tmp_path):
    drawn, draw = [], figures.draw_pair
    monkeypatch.setattr(figures, "draw_pair", lambda panel, theta, *args: (
        drawn.append(theta), draw(panel, theta, *args)))
    figures.main(["--head_dim", "32", "--block_size", "128", "--plot", str(tmp_path / "idea.png")])
    rope = frequencies(32).float()[::2].tolist()
    assert drawn == rope + [theta if 2 * math.pi / theta <= 128 else 0 for theta in rope]
    assert (tmp_path / "idea.png").stat().st_size > 1000
