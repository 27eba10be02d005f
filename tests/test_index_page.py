"""docs/index.html: its mathematics is model.py's, its numbers are measured, nothing breaks it."""
import math
import random
from pathlib import Path

import pytest
import torch

from model import GPT, PE, GPTConfig, rotate
from tests.page_stub import Page
from tools.index_numbers import learned, numbers

HTML = (Path(__file__).parent.parent / "docs" / "index.html").read_text(encoding="utf-8")
NAMES = "rope", "prope", "hope", "nope"
double = torch.float64


@pytest.fixture
def page():
    return Page(HTML)


def random_settings(generator):
    draw = generator.uniform
    return {"pe": generator.choice(NAMES), "L": 2 ** generator.randint(5, 9), "D": 2 ** generator.
            randint(3, 9), "base": round(10 ** draw(1, 6), 1), "c": 2 ** draw(-2, 6),
            "p": round(draw(0, 1), 2), "sharp": round(draw(1, 32), 1), "draw": 3, "bias": 0}


def call(page, code, **values):
    """The value of JavaScript in which s is values and r the page's rotation(s)."""
    return page.run(f"(() => {{ const s = {values}, r = rotation(s); return {code}; }})()")


def logits_of_model(s, angles):
    """Settings, angle of the key's arrow in each pair -> theta (K,), logits by distance to 4 L."""
    encoding = PE[s["pe"]](GPTConfig(
        pe=s["pe"], n_embd=s["D"], n_head=1, block_size=s["L"], rope_base=s["base"],
        hope_cutoff=s["c"], prope_fraction=s["p"]))
    queries = torch.cat((torch.ones(s["D"] // 2), torch.zeros(s["D"] // 2)))
    queries = queries.expand(1, 1, 4 * s["L"] + 1, -1)  # arrows of length 1, all at angle 0
    rotary = encoding.rotary(torch.arange(4 * s["L"] + 1))
    queries = queries if rotary is None else rotate(queries, *rotary)
    key = torch.cat((torch.cos(angles), torch.sin(angles))).float()
    theta = getattr(encoding, "theta", torch.empty(0))
    return theta, (queries @ key)[0, 0] * s["sharp"] / len(angles)


def test_pairs_frequencies_and_logits_are_those_of_the_model(page):
    generator = random.Random(0)
    for _ in range(40):
        s = random_settings(generator)
        P, K, theta, others = call(page, "[r.P, r.K, r.theta, logits(r).others]", **s)
        assert [other["m"] for other in others] == list(range(1, 4 * s["L"] + 1))[
            max(1, s["L"] // 128) - 1::max(1, s["L"] // 128)]
        other = generator.choice(others)
        phi = call(page, f"r.theta.map((_, j) => randomAngle(j, {other['m']}, r.draw))", **s)
        expected_theta, expected = logits_of_model(s, torch.zeros(P))
        found = torch.tensor(call(page, f"distances({4 * s['L']}, 1e9).map(logits(r).A)", **s))
        atol = 2e-3 * s["sharp"]  # float32 angles there
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=atol)
        _, expected = logits_of_model(s, -torch.tensor(phi, dtype=double))
        assert other["logit"] == pytest.approx(expected[other["m"]].item(), abs=atol)
        assert (K, P) == (len(expected_theta), s["D"] // 2) and not any(theta[K:]), s
        torch.testing.assert_close(torch.tensor(theta[:K], dtype=double), expected_theta.double(),
                                   rtol=1e-6, atol=0)


@pytest.mark.parametrize("pe", ("rope", "hope"))
def test_others_are_random_keys(page, pe):
    """Higher than A, over all draws: as often as keys with independent uniform angles."""
    s = page.run("s") | {"pe": pe}
    ranges = (1, 128), (129, 512)
    found = [[call(page, f"shareHigher(logits(r), {a}, {b})", **s | {"draw": draw})
              for a, b in ranges] for draw in range(1, 21)]
    _, A = logits_of_model(s, torch.zeros(32))
    angles = torch.rand(20_000, 32, generator=torch.Generator().manual_seed(1)) * 2 * math.pi
    expected = (angles.cos().sum(1) * s["sharp"] / 32 > A[:, None]).double().mean(1)
    expected = torch.stack([expected[a:b + 1].mean() for a, b in ranges])
    torch.testing.assert_close(torch.tensor(found, dtype=double).mean(0), expected, rtol=0,
                               atol=0.03)


def test_an_angle_is_new_if_no_trained_distance_has_it(page):
    generator, seen = random.Random(1), set()
    for _ in range(40):
        s = random_settings(generator)
        theta = torch.tensor(call(page, "r.theta", **s), dtype=double)
        distances = torch.tensor([0, 1, s["L"] // 2, s["L"], *range(s["L"] + 1, 4 * s["L"], 7)])
        angles = distances[:, None] * theta % (2 * math.pi)
        new = ((theta * s["L"] < 2 * math.pi) & (angles > theta * s["L"])).sum(1).tolist()
        assert call(page, f"{distances.tolist()}.map(m => countNew(r, m))", **s) == new, s
        seen.update(new)
    assert len(seen) > 10


@pytest.mark.parametrize("logn, bias", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_shares_of_the_attention_are_those_of_a_softmax(page, logn, bias):
    """Other keys have the mean of e^logit over all angles, a Bessel function for each pair."""
    s = page.run("s") | {"pe": "hope", "logn": logn, "bias": bias}
    A = torch.tensor(call(page, "distances(8, 8).map(logits(r).A)", **s))
    octaves = torch.tensor(page.run("MEASURED.biases.hope")) * bias
    for n in (3, 128, 129, 1000):
        scale = max(1, math.log(n) / math.log(128)) if logn else 1
        at = torch.log2(torch.arange(n) + 1.0)
        low, high = (octaves[x.long()] for x in (at.floor(), at.ceil()))
        others = (scale * (low + (at - at.floor()) * (high - low))).exp()
        others *= torch.special.i0(torch.tensor(scale * 8 / 32, dtype=double)) ** 32
        others[2] = (scale * A[2]).exp()
        weights = others / others.sum()
        parts = [weights[2], weights[:128].sum() - weights[2], weights[128:].sum()]
        found = torch.tensor(call(page, f"shares(r, logits(r), {n})", **s))
        torch.testing.assert_close(found, torch.tensor(parts), atol=1e-4, rtol=0)


def test_others_with_a_higher_logit_than_A_are_counted(page):
    s = page.run("s") | {"L": 32}
    others, A = call(page, "[logits(r).others, distances(128, 128).map(logits(r).A)]", **s)
    for a, b in ((0, 32), (33, 128), (7, 7)):
        higher = [other["logit"] > A[other["m"]] for other in others if a <= other["m"] <= b]
        assert call(page, f"shareHigher(logits(r), {a}, {b})", **s) == sum(higher) / len(higher)


def test_the_numbers_are_those_of_the_results(page):
    assert numbers() in HTML, "run python tools/index_numbers.py"
    page.act("go(6)")
    for row in page.run("MEASURED.perplexity.filter(row => !row.bias && !row.logn)"):
        assert all(f"{value:.2f}" in page.text("picture") for value in row["ppl"])
    held = page.run("Math.round(100 * MEASURED.held)")
    assert f"{held}\xa0% of the rise" in page.text("reading")
    assert page.run("MEASURED.perplexity.every(row => row.ppl.every("
                    "(x, i) => !i || x > MEASURED.local[row.bias][i]))")  # dashed: the lowest
    page.click("bias")
    assert "8.8 times" in page.text("reading") and "14.00" not in page.text("picture")


def test_what_biases_add_is_measured_as_the_model_computes_it():
    torch.manual_seed(0)
    model = GPT(GPTConfig(pe="hope", qkv_bias=True, block_size=32, n_embd=32, n_head=2,
                          n_layer=1, rope_base=100))
    attention, positions = model.transformer.h[0].attn, torch.arange(512)
    torch.nn.init.normal_(attention.c_attn.bias)
    q, k = (x.view(1, 1, 2, 16).transpose(1, 2) for x in attention.c_attn.bias[:64].split(32))
    q = rotate(q.expand(-1, -1, 512, -1), *model.transformer.wpe.rotary(positions))
    mean = (q @ k.transpose(2, 3) / 4).mean((0, 1, 3))  # by distance
    parts = mean[:1], mean[1:2], mean[2:5], mean[5:11]
    assert learned(model)[:4].tolist() == pytest.approx([part.mean().item() for part in parts])


def test_keys_and_buttons_walk_through_the_steps(page):
    for i in range(1, 8):
        assert page.run("s.step") == i
        words = page.text("text").split()
        assert len(words) <= 60 and page.text("title") and page.text("reading"), len(words)
        assert page.run("$('picture').children.length") > 0
        page.key("title", "ArrowRight") if i % 2 else page.click("next")
    page.key("m", "ArrowLeft")  # moves the slider
    assert page.run("s.step") == 7
    page.key("title", "ArrowLeft")
    page.click("back")
    assert page.run("s.step") == 5
    page.key("m", "PageUp")  # presenter remotes
    page.key("title", "PageUp")
    assert page.run("s.step") == 3
    page.key("m", "PageDown")
    assert page.run("s.step") == 4


def test_space_plays_and_a_pointer_moves_the_distance(page):
    page.key("title", " ")
    assert page.run("[s.m > 10, !!playing]") == [True, True]
    page.send("picture", "pointermove", clientX=page.run("W - 8"), buttons=1)
    assert page.run("[s.m, !!playing]") == [128, False]
    page.send("picture", "pointermove", clientX=300, buttons=0)
    assert page.run("s.m") == 128


@pytest.mark.parametrize("width", [360, 1000])
def test_200_random_actions_leave_an_address_that_makes_the_page_again(width):
    page, draw = Page(HTML, width=width), random.Random(width).randint
    actions = [
        *(lambda id=id: page.click(id) for id in (*NAMES, "bias", "logn", "play", "back", "next")),
        lambda: page.click(f"step-{draw(1, 7)}"),
        lambda: page.key("title", ("ArrowLeft", "ArrowRight", "PageUp", " ")[draw(0, 3)]),
        lambda: page.send("picture", "pointerdown", buttons=1, clientX=draw(-50, 1100)),
        lambda: page.input("m", draw(0, page.run("far"))),
        *(lambda key=key, last=last: page.input(key, draw(-8, last)) for key, last in (
            ("L", 8), ("D", 7), ("base", 120), ("c", 24), ("p", 20), ("sharp", 10), ("draw", 20)))]
    for i in range(200):
        actions[draw(0, len(actions) - 1)]()
        page.check_content()
        assert 0 <= page.run("s.m") <= page.run("far")
        if i % 40 == 0:
            page.act("play(false)")
            again = Page(HTML, hash=page.run("location.hash"), width=width)
            assert again.run("s") == page.run("s") and again.text() == page.text()


@pytest.mark.parametrize("hash", (
    "#L=abc&pe=xyz&m=NaN&c=Infinity&step=8", "#L=-5&D=-1&base=0&c=0&p=-1&m=-1&step=7",
    "#L=1e999&m=1e999&step=1.5", "#pe=__proto__&step=__proto__", "#L=100&D=7&m=2.5&step=7"))
def test_garbage_in_the_address_becomes_values_that_controls_can_show(hash):
    page = Page(HTML, hash=hash, width=360)
    page.check_content()
    s = page.run("s")
    assert s["pe"] in NAMES and s["logn"] in (0, 1) and s["m"] in range(page.run("far") + 1)
    for key, (_, first, last, *_) in page.run("SLIDERS").items():
        assert s[key] in [page.run(f"SLIDERS.{key}[3]({i})") for i in range(first, last + 1)]
