"""docs/index.html, without a browser: its mathematics is that of model.py, and no control breaks it."""
import math
import random
import re
from pathlib import Path

import pytest
import torch

from model import PE, GPTConfig, frequencies, rotate
from tests.page_stub import Page, check_file

HTML = (Path(__file__).parent.parent / "docs" / "index.html").read_text(encoding="utf-8")
NAMES = "rope", "prope", "hope", "nope"


@pytest.fixture
def page():
    return Page(HTML)


@pytest.fixture(scope="module")
def mathematics():
    """A page of which only the functions are used."""
    return Page(HTML)


def random_settings(generator, largest_L=512):
    return {"pe": generator.choice(NAMES), "L": 2 ** generator.randint(5, int(math.log2(largest_L))),
            "D": 2 ** generator.randint(3, 9), "base": round(10 ** generator.uniform(1, 6), 1),
            "c": 2 ** generator.uniform(-2, 6), "p": generator.randint(0, 20) / 20}


def call(page, code, **values):
    """The value of JavaScript in which s is values and r the page's rotation(s)."""
    return page.run(f"(() => {{ const s = {values}, r = rotation(s); return {code}; }})()".replace("True", "true"))


def sums_of_model(s):
    """-> what model.py makes of the settings: theta (K,), and the logits of a query and equal keys (16 L + 1,)."""
    encoding = PE[s["pe"]](GPTConfig(pe=s["pe"], n_embd=s["D"], n_head=1, block_size=s["L"], rope_base=s["base"],
                                     hope_cutoff=s["c"], prope_fraction=s["p"]))
    same = torch.ones(1, 1, 16 * s["L"] + 1, s["D"])
    rotary = encoding.rotary(torch.arange(16 * s["L"] + 1))
    keys = same if rotary is None else rotate(same, *rotary)
    return getattr(encoding, "theta", torch.empty(0)), (keys @ keys[0, 0, 0] / s["D"])[0, 0]


def test_file():
    check_file(HTML)
    assert len(HTML.encode()) <= 25_000
    # play would have such a text read out 60 times a second
    assert not re.search(r"aria-live|<output|role=\"?(status|alert)", HTML)


def test_pairs_frequencies_and_sums_are_those_of_the_model(mathematics):
    generator = random.Random(0)
    for _ in range(200):
        s = random_settings(generator)
        theta, sums = sums_of_model(s)
        K, P, found_theta, found_sums = call(mathematics, "[r.K, r.P, r.theta, [...sumByDistance(r)]]", **s)
        assert (K, P) == (len(theta), s["D"] // 2), s
        torch.testing.assert_close(torch.tensor(found_theta, dtype=torch.float32), theta, rtol=1e-6, atol=0)
        # the model's angles are float32: the error of 16 L = 8192 radians
        torch.testing.assert_close(torch.tensor(found_sums, dtype=torch.float32), sums, rtol=0, atol=1e-3)


def test_what_is_new_follows_from_the_definitions(mathematics):
    """Brute force over all pairs of a distance and a trained distance."""
    generator, seen = random.Random(1), set()
    for _ in range(40):
        s = random_settings(generator, 64) | {"D": 2 ** generator.randint(3, 5)}
        theta = torch.tensor(call(mathematics, "r.theta", **s), dtype=torch.float64)
        angle = torch.arange(16 * s["L"] + 1)[:, None] * theta  # (16 L + 1, K)
        slow = theta * s["L"] < 2 * math.pi
        angle_is_new = (slow & (angle % (2 * math.pi) > theta * s["L"])).any(1)
        turns = (angle[:, None] - angle[:s["L"] + 1]) / (2 * math.pi)  # (16 L + 1, L + 1, K)
        gap = 360 * (turns - turns.round()).abs().amax(-1) if len(theta) else torch.zeros(turns.shape[:2])
        combination_is_new = gap.amin(1) > 45
        likes = "[0, r.L, 5 * r.L, r.far].map(m => mostSimilar(r, m)[1])"
        found = call(mathematics, f"({{...findNew(r), likes: {likes}}})", **s)
        assert list(found["angles"].values()) == angle_is_new.int().tolist(), s
        assert list(found["combinations"].values()) == combination_is_new.int().tolist(), s
        for share, new in (("newAngles", angle_is_new), ("newCombinations", combination_is_new)):
            assert found[share] == pytest.approx(new[s["L"] + 1:].double().mean().item()), s
        likes = [gap[m].min().item() for m in (0, s["L"], 5 * s["L"], 16 * s["L"])]
        assert found["likes"] == pytest.approx(likes, abs=1e-6), s
        seen |= {(share, 0 < found[share] < 1) for share in ("newAngles", "newCombinations")}
    assert len(seen) == 4  # none, all and some of the distances were met


def test_attention_is_the_softmax_with_and_without_logn(mathematics):
    for logn in (0, 1):
        s = {"pe": "hope", "L": 64, "D": 16, "base": 1e3, "c": 1, "p": 1, "sharp": 11, "logn": logn}
        _, sums = sums_of_model(s)
        for n in (1, 4, 5, 64, 65, 700):
            scale = 11 * (max(1, math.log(n) / math.log(64)) if logn else 1)
            weights = (scale * sums[:n]).softmax(0)
            found = call(mathematics, f"attention(s, sumByDistance(r), {n})", **s)
            assert list(found["weights"].values()) == pytest.approx(weights.tolist(), rel=1e-2)
            shares = [weights[a:b].sum().item() for a, b in ((0, 4), (4, 64), (64, n))]
            assert found["shares"] == pytest.approx(shares, abs=1e-3)


def test_marks_the_highest_sums(page):
    for name in ("few pairs", "many pairs"):
        page.run(f'set(PRESETS["{name}"]); stub.settle(5)')
        s = page.run("s")
        _, sums = sums_of_model(s)
        within = s["L"] // 16 + 1 + sums[s["L"] // 16 + 1:s["L"]].argmax().item()
        beyond = s["L"] + 1 + sums[s["L"] + 1:].argmax().item()
        assert page.text("peaks").replace(",", "").startswith(
            f"Highest sum between L/16 and L: A {sums[within]:.2f} at distance {within}. "
            f"Highest beyond L: B {sums[beyond]:.2f} at distance {beyond}.")


def test_every_control_through_its_range(page):
    for name in NAMES:
        page.click(f"pe-{name}")
        assert page.run("s.pe") == name
        page.check_content()
    page.click("pe-hope")
    for key in page.run("Object.keys(SLIDERS)"):
        before, (first, last) = page.run(f"s.{key}"), page.run(f"SLIDERS.{key}.slice(1, 3)")
        values = set()
        for i in range(first, last + 1):
            page.input(key, i)
            page.check_content()
            assert page.run(f"+$('{key}').value") == i  # else the arrow keys get no further
            values.add(page.run(f"s.{key}"))
        assert len(values) == last - first + 1
        page.run(f"set({{{key}: {before}}}); stub.settle(5)")
    for m in (0, 1, 127, 128, 129, 1000, 2048):
        page.input("m", m)
        assert page.run("s.m") == m and f"{m:,}".replace(",", "") in page.text("where").replace(",", "")
        page.check_content()
    for _ in range(2):
        page.click("logn")
        page.check_content()
    assert page.run("s.logn") == 0


def test_presets(page):
    page.input("sharp", 8)
    page.click("logn")
    for i, name in enumerate(page.run("Object.keys(PRESETS)")):
        page.click(page.run(f"$('presets').children[{i}].id ||= 'preset-{i}'"))
        page.check_content()
        assert page.run("s") == page.run(f"PRESETS['{name}']") | {"sharp": 16, "logn": 1}  # these two are kept
        assert page.run("readAddress()") == page.run("s")  # controls can show it
    few, many = (page.run(f"rotation(PRESETS['{name}']).K") for name in ("few pairs", "many pairs"))
    assert few < 5 and many > 30


def test_charts_and_play_move_the_distance(page):
    page.send("sum", "pointermove", clientX=500, buttons=0)
    assert page.run("s.m") == 300
    page.send("sum", "pointermove", clientX=500, buttons=1)
    assert page.run("s.m") == 1024  # half of 16 L
    for outside, m in ((-50, 0), (1100, 2048), (500, 1024)):  # a pointer that leaves the chart while it is pressed
        page.send("weights", "pointermove", clientX=outside, buttons=1)
        assert page.run("s.m") == m
    page.click("play")
    moved = page.run("s.m")
    assert moved > 1024
    page.click("play")
    page.run("stub.settle(5)")
    assert page.run("s.m") == moved
    page.check_content()


def test_200_random_actions(page):
    generator = random.Random(2)
    ids = page.run("[...$('presets').children].slice(0, 3).map((button, i) => button.id = 'preset-' + i)")
    for _ in range(200):
        key = generator.choice(("L", "D", "base", "c", "p", "sharp", "m", "m", "pe", "logn", "play", "preset", "chart"))
        if key == "pe":
            page.click(f"pe-{generator.choice(NAMES)}")
        elif key in ("logn", "play"):
            page.click(key)
        elif key == "preset":
            page.click(generator.choice(ids))
        elif key == "chart":
            page.send(generator.choice(("strip", "sum", "weights")), "pointerdown", buttons=1,
                      clientX=generator.randint(-50, 1100))
        elif key == "m":
            page.input("m", generator.randint(0, page.run("r.far")))
        else:
            first, last = page.run(f"SLIDERS.{key}.slice(1, 3)")
            last = {"L": 8, "D": 7}.get(key, last)  # more takes seconds here
            page.input(key, generator.randint(first, last))
        page.check_content()
        assert 0 <= page.run("s.m") <= page.run("r.far")


def test_the_address_holds_the_state(page):
    generator = random.Random(3)
    for _ in range(5):
        page.click(f"pe-{generator.choice(NAMES)}")
        for key in ("L", "D", "base", "c", "p", "sharp"):
            first, last = page.run(f"SLIDERS.{key}.slice(1, 3)")
            page.input(key, generator.randint(first, 8 if key == "L" else last))
        page.click("logn")
        page.input("m", generator.randint(0, 300))
        again = Page(HTML, hash=page.run("location.hash"))
        assert again.run("s") == page.run("s")
        assert again.run("[+$('logn').checked, +$('m').value]") == page.run("[s.logn, s.m]")
        assert all(again.text(part) == page.text(part) for part in ("cards", "angles", "peaks", "dilution", "where"))
    page.run("location.hash = '#L=64&pe=nope'; window.dispatchEvent(new Event('hashchange')); stub.settle(5)")
    assert page.run("[s.L, s.pe, r.K]") == [64, "nope", 0]


@pytest.mark.parametrize("hash", (
    "#", "#L", "#L=&D=&base=&m=", "#L=abc&pe=xyz", "#L=-5&D=-1&base=0&c=0&p=-1", "#L=1e999&m=1e999",
    "#m=NaN&c=Infinity", "#m=-1", "#m=99999999", "#pe=constructor", "#pe=__proto__&__proto__=1", "#%E0%A4%A&%=%",
    "#L=100&D=7&base=3.3&m=2.5", "#p=2&sharp=-1&logn=2", "#L=64&L=128", "#<script>alert(1)</script>", "#pe=<b>&m=<b>"))
def test_garbage_in_the_address(hash):
    page = Page(HTML, hash=hash)
    page.check_content()
    s = page.run("s")
    assert set(s) == {"pe", "L", "D", "base", "c", "p", "m", "sharp", "logn"}
    assert s["pe"] in NAMES and s["logn"] in (0, 1) and s["m"] in range(16 * s["L"] + 1)
    for key, (_, first, last, *_) in page.run("SLIDERS").items():
        assert any(s[key] == page.run(f"SLIDERS.{key}[3]({i})") for i in range(first, last + 1))
    assert "alert" not in page.run("stub.html(document.body)")


def test_narrow_windows_and_labels():
    page = Page(HTML, width=360)
    page.check_content()
    assert page.run("[...document.querySelectorAll('input')].every(input => input.closest('label')"
                    " || document.querySelector(`label[for=\"${input.id}\"]`))")
    assert float(frequencies(page.run("s.D"), page.run("s.base"))[1]) == pytest.approx(page.run("r.theta[1]"))
