"""docs/live.js reads as model.py does, with the weights of the demo, and the page shows it."""
import json
import math
import re
from dataclasses import asdict

import pytest
import quickjs
import torch

from data.tokenizer import PRINTABLE_ASCII, CharTokenizer
from model import GPT, GPTConfig
from tests.conftest import PROJECT
from tests.page_stub import Page
from tools import live_weights

DOCS = PROJECT / "docs"
LIVE = (DOCS / "live.js").read_text(encoding="utf-8")
FORWARD = LIVE[:LIVE.index("// --- The reader's text")]
L, LONG = 16, 64  # of the small networks; tokens that they read


def small_network(pe):
    """A network with weights large enough that every part of it matters -> model, saved."""
    tokenizer = CharTokenizer(PRINTABLE_ASCII)
    model = GPT(GPTConfig(block_size=L, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=32, pe=pe, rope_base=100.0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.25 + (weight.dim() == 1))
    checkpoint = {"config": asdict(model.config), "model": model.state_dict(),
                  "tokenizer": tokenizer.to_dict()}
    return model, live_weights.network(pe, checkpoint)


def decoded(parts):
    """Independent of live.js: characters -> weights."""
    characters = [chr(code) for code in [*range(35, 127), *range(256, 768)]]
    numbers = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(len(characters))]
    value = dict(zip(characters, numbers))
    return sum(part["step"] * torch.tensor([value[c] for c in part["text"]]) for part in parts)


def losses(context, i, ids):
    """Of ids[1:], as network i of NETWORKS reads ids."""
    code = (f"(() => {{ const ids = {ids}, network = new Network(NETWORKS[{i}]);"
            "return ids.slice(1).map((next, t) => -Math.log(network.read(ids[t])[next])); })()")
    return torch.tensor(json.loads(context.eval(code).json()))


def context_with(networks):
    context = quickjs.Context()
    context.eval(networks)
    context.eval(FORWARD)
    return context


@pytest.mark.parametrize("pe", ["rope", "hope"])
def test_the_script_computes_what_the_model_does(pe):
    """With the rounded weights, to four times the trained context."""
    model, saved = small_network(pe)
    original, ids = model.state_dict(), torch.randint(99, (1, LONG + 1))
    state = {key: decoded(parts).view_as(original[key]) for key, parts in saved["weights"].items()}
    for key, weight in state.items():
        error = (weight - original[key]).abs().max() / original[key].square().mean().sqrt()
        assert error <= 0.501 / (36 if original[key].dim() == 2 and "wte" not in key else 1000)
    model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    expected = model(ids[:, :-1], ids[:, 1:], reduction="none")[1][0].detach()
    context = context_with(f"const NETWORKS = {json.dumps([saved])};")
    torch.testing.assert_close(losses(context, 0, ids[0].tolist()), expected, atol=1e-3, rtol=1e-4)


def test_the_script_and_the_weights_are_small():
    assert FORWARD.count("\n") <= 150 and max(map(len, LIVE.splitlines())) <= 100
    assert (DOCS / "weights.js").stat().st_size <= 2_000_000


@pytest.mark.parametrize("length", [16, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("i", [0, 1])
def test_the_weights_beside_the_page_read_its_passage_as_the_demo_did(i, length):
    """The page has the losses of the weights before rounding, in steps of 0.02 nats."""
    page = Page((DOCS / "text.html").read_text(encoding="utf-8"))
    expected = torch.tensor(page.run(f"runs[{i}].loss.slice(1, {length + 1})"))
    text = "".join(page.run(f"tokens.slice(0, {length + 1}).map(token => vocab[token])"))
    context = context_with((DOCS / "weights.js").read_text(encoding="utf-8"))
    assert context.eval(f"NETWORKS[{i}].name") == page.run(f"runs[{i}].name")
    ids = CharTokenizer(context.eval("NETWORKS[0].chars")).encode(text).tolist()
    error = (losses(context, i, ids) - expected).abs()
    assert error.mean() <= 0.02 and error.max() <= 0.15


@pytest.fixture(scope="module")
def opened():
    page = Page((DOCS / "text.html").read_text(encoding="utf-8"))
    assert page.run("[...document.querySelectorAll('script')].map(s => s.src ?? '')")[-2:] == [
        "weights.js", "live.js"]
    page.act(f"const NETWORKS = {json.dumps([small_network(pe)[1] for pe in ('rope', 'hope')])};")
    page.act(LIVE)
    return page


def read(page, text):
    page.input("own", text)
    for _ in range(1000):
        if page.run("isRead()"):
            return
        page.act("0")
    raise AssertionError("the text is not read to its end")


@pytest.mark.parametrize("text", ["", "a", "ab", "a" * (L + 1), "x = 1\n" * 9, "<b>&é🙂\u202e" * 9])
def test_the_page_shows_losses_of_the_readers_text(opened, text):
    read(opened, text)
    opened.check_content()
    assert opened.run("ids") == CharTokenizer(PRINTABLE_ASCII).encode(text).tolist()
    rows = opened.run("[...document.querySelectorAll('#own_table td')].map(td => td.textContent)")
    for i in (0, 1):
        found = opened.run(f"ownLosses[{i}].slice(1)")
        for shown, part in zip(rows[2 * i:], (found[:L], found[L:])):
            mean = math.exp(sum(part) / len(part)) if part else math.nan
            assert shown == (f"{mean:.2f}" if part else "–")
        colours = opened.run(f"ownSpans[{i}].map(span => span.style.background)")
        shares = [int(re.search(r"(\d+)%", colour)[1]) for colour in colours[1:]]
        assert all(abs(share - 80 * min(1, loss / 5)) <= 1 for share, loss in zip(shares, found))


def test_a_change_in_the_text_gives_what_reading_it_anew_gives(opened):
    read(opened, "def f(x):\n    return x + 1\n")
    read(opened, "def f(x):\n    return y\n")
    changed = opened.run("ownLosses")
    read(opened, "")
    read(opened, "def f(x):\n    return y\n")
    assert opened.run("ownLosses") == changed and len(changed[0]) == 23
