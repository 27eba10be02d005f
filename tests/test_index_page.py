"""docs/index.html: its mathematics is that of model.py, and no control breaks it."""
import math
import random
from pathlib import Path

import pytest
import torch

from model import PE, GPTConfig, rotate
from tests.page_stub import Page

HTML = (Path(__file__).parent.parent / "docs" / "index.html").read_text(encoding="utf-8")
NAMES = "rope", "prope", "hope", "nope"
double = torch.float64


@pytest.fixture
def page():
    return Page(HTML)


def random_settings(generator, L=(5, 9), D=(3, 9)):
    draw = generator.uniform
    return {"pe": generator.choice(NAMES), "L": 2 ** generator.randint(*L), "D": 2 ** generator.
            randint(*D), "base": round(10 ** draw(1, 6), 1), "c": 2 ** draw(-2, 6),
            "p": round(draw(0, 1), 2)}


def call(page, code, **values):
    """The value of JavaScript in which s is values and r the page's rotation(s)."""
    return page.run(f"(() => {{ const s = {values}, r = rotation(s); return {code}; }})()")


def sums_of_model(s):
    """Settings -> theta (K,), and the logits of a query and equal keys by distance (16 L + 1,)."""
    encoding = PE[s["pe"]](GPTConfig(
        pe=s["pe"], n_embd=s["D"], n_head=1, block_size=s["L"], rope_base=s["base"],
        hope_cutoff=s["c"], prope_fraction=s["p"]))
    same = torch.ones(1, 1, 16 * s["L"] + 1, s["D"])
    rotary = encoding.rotary(torch.arange(16 * s["L"] + 1))
    keys = same if rotary is None else rotate(same, *rotary)
    return getattr(encoding, "theta", torch.empty(0)), (keys @ keys[0, 0, 0] / s["D"])[0, 0]


def test_pairs_frequencies_and_sums_are_those_of_the_model(page):
    generator = random.Random(0)
    for _ in range(200):
        s = random_settings(generator)
        theta, sums = sums_of_model(s)
        P, found_theta, found_sums = call(page, "[r.P, r.theta, [...sumByDistance(r)]]", **s)
        assert (len(found_theta), P) == (len(theta), s["D"] // 2), s
        torch.testing.assert_close(torch.tensor(found_theta, dtype=double), theta.double(),
                                   rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(found_sums, dtype=double), sums.double(),
                                   rtol=0, atol=1e-3)  # float32 angles of 8192 radians


def test_what_is_new_follows_from_the_definitions(page):
    """Brute force over all pairs of a distance and a trained distance."""
    generator, seen = random.Random(1), set()
    for _ in range(40):
        s = random_settings(generator, L=(5, 6), D=(3, 5))
        theta = torch.tensor(call(page, "r.theta", **s), dtype=double)
        angle = torch.arange(16 * s["L"] + 1)[:, None] * theta  # (16 L + 1, K)
        new_angle = ((theta * s["L"] < 2 * math.pi)
                     & (angle % (2 * math.pi) > theta * s["L"])).any(1)
        turns = (angle[:, None] - angle[:s["L"] + 1]) / (2 * math.pi)  # (16 L + 1, L + 1, K)
        zero = torch.zeros(*turns.shape[:2], 1)  # there may be no pair
        gap = 360 * torch.cat(((turns - turns.round()).abs(), zero), dim=-1).amax(-1)
        new_combination = gap.amin(1) > 45
        likes = [0, s["L"], 5 * s["L"], 16 * s["L"]]
        found = call(page, f"({{...findNew(r), like: {likes}.map(m => mostSimilar(r, m)[1])}})",
                     **s)
        for name, new in (("angles", new_angle), ("combinations", new_combination)):
            assert list(found[name].values()) == new.int().tolist(), s
            share = found["new" + name.capitalize()]
            assert share == pytest.approx(new[s["L"] + 1:].double().mean().item()), s
            seen.add((name, 0 < share < 1))
        assert found["like"] == pytest.approx(gap[likes].amin(1).tolist(), abs=1e-6), s
    assert len(seen) == 4  # none, all and some of the distances were met


@pytest.mark.parametrize("logn", [0, 1])
def test_attention_is_the_softmax_with_and_without_logn(page, logn):
    s = {"pe": "hope", "L": 64, "D": 16, "base": 1e3, "c": 1, "p": 1, "sharp": 11, "logn": logn}
    sums = sums_of_model(s)[1]
    for n in (1, 4, 5, 64, 65, 700):
        scale = 11 * (max(1, math.log(n) / math.log(64)) if logn else 1)
        weights = (scale * sums[:n]).softmax(0)
        found = call(page, f"attention(s, sumByDistance(r), {n})", **s)
        assert list(found["weights"].values()) == pytest.approx(weights.tolist(), rel=1e-2)
        shares = [weights[a:b].sum().item() for a, b in ((0, 4), (4, 64), (64, n))]
        assert found["shares"] == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize("name", ["few pairs", "many pairs"])
def test_the_highest_sums_are_marked(page, name):
    page.act(f'set(PRESETS["{name}"])')
    s = page.run("s")
    L, sums = s["L"], sums_of_model(s)[1]
    within, beyond = L // 16 + 1 + sums[L // 16 + 1:L].argmax(), L + 1 + sums[L + 1:].argmax()
    assert page.text("peaks").replace(",", "").startswith(
        f"Highest sum between L/16 and L: A {sums[within]:.2f} at distance {within}. "
        f"Highest beyond L: B {sums[beyond]:.2f} at distance {beyond}.")


def test_charts_and_play_move_the_distance(page):
    for chart, x, buttons, m in (("sum", 500, 0, 300), ("sum", 500, 1, 1024),  # half of 16 L
                                 ("weights", -50, 1, 0), ("weights", 1100, 1, 2048)):
        page.send(chart, "pointermove", clientX=x, buttons=buttons)
        assert page.run("s.m") == m
    page.click("play")  # from the end, it begins again
    assert 0 < page.run("s.m") < 1024


def test_100_random_actions_leave_an_address_that_makes_the_page_again(page):
    draw = random.Random(2).randint
    actions = [
        lambda: page.click(f"pe-{NAMES[draw(0, 3)]}"), lambda: page.click("logn"),
        lambda: page.click("play"),
        lambda: page.act(f"$('presets').children[{draw(0, 3)}].click()"),
        lambda: page.send("sum", "pointerdown", buttons=1, clientX=draw(-50, 1100)),
        lambda: page.input("m", draw(0, page.run("r.far"))),
        *(lambda key=key, last=last: page.input(key, draw(-8, last)) for key, last in (
            ("L", 8), ("D", 7), ("base", 120), ("c", 24), ("p", 20), ("sharp", 12)))]
    for i in range(100):
        actions[draw(0, len(actions) - 1)]()
        page.check_content()
        assert 0 <= page.run("s.m") <= page.run("r.far")
        if i % 20 == 0:
            page.run("playing = false")
            page.input("m", 77)
            again = Page(HTML, hash=page.run("location.hash"))
            assert again.run("s") == page.run("s") and again.text("cards") == page.text("cards")
            assert again.run("[+$('logn').checked, +$('m').value]") == [again.run("s.logn"), 77]


@pytest.mark.parametrize("hash", (
    "#L=abc&pe=xyz&m=NaN&c=Infinity", "#L=-5&D=-1&base=0&c=0&p=-1&m=-1", "#L=1e999&m=1e999",
    "#pe=__proto__&__proto__=1", "#L&%E0%A4%A&%=%", "#L=100&D=7&m=2.5", "#pe=<b>&m=<script>"))
def test_garbage_in_the_address_becomes_values_that_controls_can_show(hash):
    page = Page(HTML, hash=hash, width=360)
    page.check_content()
    s = page.run("s")
    assert s["pe"] in NAMES and s["logn"] in (0, 1) and s["m"] in range(16 * s["L"] + 1)
    for key, (_, first, last, *_) in page.run("SLIDERS").items():
        assert s[key] in [page.run(f"SLIDERS.{key}[3]({i})") for i in range(first, last + 1)]
