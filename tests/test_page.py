"""experiments/page.py: the page holds what models and evaluation give, and its script works."""
import random
import re

import pytest
import torch

import data.prepare
from common.checkpoint import load_checkpoint, load_model
from data.loader import text_to_score
from eval_extrapolation import score, score_local
from experiments import page
from tests.conftest import PROJECT, run
from tests.page_stub import Page

L, FACTOR = 16, 8
EDGES = 0, L, 2 * L, 4 * L, 8 * L
HALF_A_STEP = 0.01 + 1e-4  # of 0.02 nats, and what float32 adds

# What could end the script, start a tag, reverse the order of text or be invisible; marks; white
# space; a tag character, which is invisible and beyond U+FFFF
HOSTILE = ("</script><!-- <b>&amp;\"' \u202eabc\u202c \u2067x\u2069 שלום עולם\u200f e\u0301 "
           "a\tb\u00a0c\u200b\ufeff \U000e0041 𝒳🙂\n")


def make(runs, folder, *arguments):
    """The page of runs, opened."""
    page.main([*runs, "--html", str(folder / "page.html"), "--device", "cpu", "--windows", "6",
               *arguments])
    return Page((folder / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(dataset, finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    windows = "--pe rope --window_pattern SL --window 4 --max_iters 40".split()
    run(dataset, folder / "windows", *windows)
    run(dataset, folder / "learned", "--pe", "learned", "--max_iters", "5")
    return [finished_run, f"{folder}/windows", f"{folder}/learned"]


@pytest.fixture(scope="module")
def opened(runs, tmp_path_factory):
    return make(runs, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def windows(runs):
    checkpoints = [load_checkpoint(run) for run in runs]
    ids, _, _, tokenizer = text_to_score(checkpoints, runs)
    return page.windows_from_lines(ids, tokenizer, FACTOR * L, L, 6), tokenizer


@pytest.fixture(scope="module")
def shown_window(opened, windows):
    """Index of the window that the page shows, found by its text."""
    text = "".join(opened.run("tokens.map(token => vocab[token])"))
    return [windows[1].decode(window.tolist()) for window in windows[0]].index(text)


@pytest.mark.parametrize("i", range(3))
def test_losses_and_their_means_are_those_of_the_evaluation(i, runs, opened, windows, shown_window):
    model = load_model(runs[i])
    full, local = score(model, windows[0], 128, 6), score_local(model, windows[0], L, 6)
    means = torch.stack([full[:, a:b].mean() for a, b in zip(EDGES, EDGES[1:])])
    for code, expected in (("loss.slice(1)", full[shown_window]), ("mean", means),
                           ("localLoss.slice(1)", local[shown_window])):
        shown = [float("nan") if x is None else x for x in opened.run(f"runs[{i}].{code}")]
        torch.testing.assert_close(torch.tensor(shown), expected, atol=HALF_A_STEP, rtol=0,
                                   equal_nan=True)


def test_windows_begin_at_a_line_if_one_begins_near():
    class Tokenizer:
        end_of_document = 99

        def decode_bytes(self, ids):
            return b"\n" if ids == [7] else b"a"

    ids = torch.tensor([1, 2, 7, 3, 4, 5, 6, 8, 99, *range(20, 28), 99, *[7] * 8]).numpy()
    found = page.windows_from_lines(ids, Tokenizer(), 4, 3, 9)
    assert found.tolist() == [[3, 4, 5, 6, 8], [20, 21, 22, 23, 24], [7] * 5]


def test_the_page_opens_where_far_text_harms_most_and_has_links_and_names(runs, tmp_path):
    opened = make(runs[:2], tmp_path / "a", "--names", "RoPE, <biases>", "b")
    assert opened.run("[measure, at]") == ["gain", opened.run("highest(['gain', 1])")]
    assert opened.text("run") == "RoPE, <biases>b" and "likelier" in opened.text("coloured")
    targets = opened.run("$('notes').querySelectorAll('a').map(a => a.getAttribute('href'))")
    assert all((tmp_path / "a" / path).resolve().exists() for path in targets if "//" not in path)
    with pytest.raises(ValueError, match="--names"):
        make(runs[:2], tmp_path, "--names", "one")


def test_the_page_in_docs_is_of_the_present_template():
    html = (PROJECT / "docs" / "text.html").read_text(encoding="utf-8")
    before, after = page.TEMPLATE.read_text(encoding="utf-8").split("DATA")
    assert html.startswith(before) and html.endswith(after) and len(html.encode()) <= 150_000
    assert re.search(r"RoPE.*HoPE.*biases.*windows", Page(html).text("run"))


def test_the_passage_is_closest_to_the_mean_in_each_bucket_of_each_run():
    edges = [0, 2, 4, 8]
    for _ in range(20):
        losses = torch.rand(2, 6, 8)
        losses[1, :, 4:] = float("nan")  # beyond a learned encoding
        means = [losses[0, :, 0:2].mean(1), losses[0, :, 2:4].mean(1), losses[0, :, 4:8].mean(1),
                 losses[1, :, 0:2].mean(1), losses[1, :, 2:4].mean(1)]
        distances = [sum((mean[i] - mean.mean()) ** 2 for mean in means) for i in range(6)]
        assert page.closest_to_mean(losses, edges) == min(range(6), key=lambda i: distances[i])


@pytest.mark.parametrize("i", [0, 1])
def test_expected_tokens_are_the_models(i, runs, opened, windows, shown_window):
    """Given all tokens before, also beyond L, and given the last L or fewer."""
    window, tokenizer, model = windows[0][shown_window], windows[1], load_model(runs[i])
    for key, first, token, start in (  # the local windows begin at multiples of L / 2
            *(("full", 1, token, 0) for token in (1, 2, L, L + 1, 3 * L, FACTOR * L)),
            ("local", L + 1, L + 1, L // 2), ("local", L + 1, 3 * L, 2 * L),
            ("local", L + 1, 3 * L + 1, 5 * L // 2)):
        p, ids = model(window[None, start:token])[0][0, -1].softmax(-1).topk(5)
        shown = opened.run(f"[0, 1, 2, 3, 4].map(j => 5 * {token - first} + j).map(k => "
                           f"[runs[{i}].{key}.p[k], vocab[runs[{i}].{key}.top[k]]])")
        for (percent, text), probability, id in zip(shown, p.tolist(), ids.tolist()):
            assert abs(percent - 100 * probability) < (1 if percent == 0 else 0.51)
            tie = p.diff().abs().min() < 1e-4
            assert not percent or text == tokenizer.decode([id]) or tie


@pytest.mark.parametrize("token", [1, L, L + 1, 5 * L])
def test_a_chosen_token_is_shown_with_what_each_run_expected(token, opened):
    opened.run(f"choose({token})")
    for i in (0, 1):
        for part, key, first in ((1, "full", 1), (2, "local", L + 1))[:1 if token <= L else 2]:
            shown = opened.run(f"$('detail').children[{i + 1}].children[{part}].children"
                               ".slice(1).map(guess => guess.children[1].textContent)")
            p = opened.run(f"runs[{i}].{key}.p.slice(5 * {token - first}, 5 * {token - first} + 5)")
            percent = [int(re.sub(r"\D", "", text)) for text in shown]
            assert percent == pytest.approx([x for x in p if x], abs=1)  # the right one is exact


@pytest.mark.parametrize("seed, factor", [(0, 8), (1, 1), (2, 3)])
def test_two_hundred_random_actions(seed, factor, runs, tmp_path):
    opened, draw = make(runs, tmp_path, "--max_factor", str(factor)), random.Random(seed)
    keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "x"]
    actions = [
        lambda: opened.key("text", draw.choice(keys)),
        lambda: opened.act(f"$$('label input')[{draw.randrange(5)}].click()"),
        lambda: opened.act(f"$$('button')[{draw.randrange(3)}].click()"),
        lambda: opened.act(f"stub.send(spans[{draw.randrange(L + 1)}], 'click', {{}})"),
        lambda: opened.send("chart", "pointermove", buttons=1, offsetX=draw.randint(-9, 1200)),
        lambda: opened.act(f"window.innerWidth = {draw.choice([390, 1280])}; drawGutter(); "
                           "drawChart(); stub.send('window', 'scroll')")]
    opened.run("globalThis.$$ = selector => document.querySelectorAll(selector); 0")
    for _ in range(200):
        draw.choice(actions)()
        content = opened.run("stub.content()").replace("context: undefined", "")  # learned
        assert not re.search(r"\b(NaN|undefined|Infinity)\b|\[object", content)
        assert opened.run("1 <= at && at <= n")


@pytest.mark.parametrize("label, key, best, full", [
    ("least expected", "loss", max, 5), ("helps most", "gain", min, 3),
    ("far text harms most", "gain", max, 3)])
def test_a_button_chooses_the_extreme_token_and_colours_all(label, key, best, full, opened):
    for i in (0, 1):
        opened.run(f"show(runs[{i}], 'loss')")
        opened.act(f"$('jump').children[{opened.run('Object.keys(JUMPS)').index(label)}].click()")
        values = opened.run(f"runs[{i}].{key}.slice(1)")
        assert values[opened.run("at") - 1] == best(values)
        for value, colour in zip(values, opened.run("spans.slice(1).map(s => s.style.background)")):
            share = int(re.search(r"(\d+)%", colour)[1])
            assert ("--better" in colour) == (value < 0)
            assert abs(share - round(80 * min(1, abs(value) / full))) <= 1


def test_keys_chart_and_pointer_move_the_choice(opened):
    end = FACTOR * L
    for key, at in (("Home", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 1),
                    ("End", end), ("ArrowRight", end)):
        opened.key("text", key)
        assert opened.run("at") == at
    opened.send("chart", "pointerdown", buttons=1, offsetX=opened.run("plotWidth()") / 2)
    assert opened.text("#detail h2").startswith(f"Token {end // 2} ({FACTOR / 2:.1f} L)")
    for token, event, x, at in ((5, "pointermove", 1, 5), (9, "pointermove", 2, 9),
                                (7, "pointermove", 2, 9),  # the text moves, the pointer rests
                                (7, "click", 2, 7), (0, "click", 3, 1)):
        opened.act(f"stub.send(spans[{token}], '{event}', {{screenX: {x}, screenY: 0}})")
        assert opened.run("at") == at


@pytest.mark.parametrize("kind, options", [("char", {"charset": "auto"}),
                                           ("bpe", {"vocab_size": 265})])
def test_hostile_text_is_escaped_in_the_file_and_shown_as_text(kind, options, tmp_path):
    """Characters are one token each; of byte pairs, some are parts of characters."""
    folder = tmp_path / "<" / "script><!--"  # the page names it
    folder.mkdir(parents=True)
    for i in range(8):
        (folder / f"{i}.txt").write_text(HOSTILE * (60 + i), encoding="utf-8")
    dataset = data.prepare.prepare(str(folder), kind, folder / "data", **options)
    run(str(dataset), folder / '<img src="x"> & co', "--max_iters", "5")
    opened = make([f'{folder}/<img src="x"> & co'], tmp_path)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script") == 2 and "<!--" not in html
    invisible = "[\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0041]"
    assert not re.search(invisible, html) and not re.search(invisible, opened.text("text"))
    assert '<img src="x"> & co' in opened.text("run")
    shown, texts = opened.text("text"), "".join(opened.run("tokens.map(token => vocab[token])"))
    for sign in ("⏎\n", "⇥\t", "U+00a0", "U+202e", "U+e0041", "<b>&amp;\"'", "e\u0301", "🙂"):
        assert sign in shown or kind == "bpe"
    # a byte that is a part of a character only is \\x and two digits
    whole = re.sub(rb"\\x([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()),
                   texts.encode())
    assert whole in (HOSTILE * 70).encode() and ("\\x" in texts) == (kind == "bpe")
    for _ in range(FACTOR * L):
        opened.run("choose(at + 1, 'nearest')")
        opened.check_content()
