"""experiments/page.py: the page holds what the models and the evaluation give, and its script runs without error."""
import json
import random
import re

import pytest
import torch

import data.prepare
import eval_extrapolation
import train
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from data.loader import document_windows, text_to_score
from eval_extrapolation import score, score_local
from experiments import page
from tests.conftest import TINY_FLAGS
from tests.page_stub import Page

L, FACTOR = 16, 8
HALF_A_STEP = 0.01 + 1e-4  # of 0.02 nats, and what float32 adds

# What could end the script, start a tag, reverse the order of text or be invisible; right to left; marks; white space
HOSTILE = ("</script><!-- <b>&amp;\"' \u202eabc\u202c \u2067x\u2069 שלום עולם\u200f مرحبا e\u0301 "
           "a\tb\u00a0c\u200b\ufeff 𝒳🙂\n")


def make(runs, folder, *arguments):
    """The page of runs, opened."""
    file = folder / "page.html"
    page.main([*runs, "--html", str(file), "--device", "cpu", "--windows", "6", *arguments])
    return Page(file.read_text(encoding="utf-8"))


def short_run(dataset, out_dir, *arguments):
    train.main([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), "--max_iters", "5", *arguments])
    return str(out_dir)


@pytest.fixture(scope="module")
def runs(dataset, finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    windows = ["--pe", "rope", "--window_pattern", "SL", "--window", "4", "--max_iters", "40"]
    return [finished_run, short_run(dataset, folder / "windows", *windows),
            short_run(dataset, folder / "learned", "--pe", "learned")]


@pytest.fixture(scope="module")
def opened(runs, tmp_path_factory):
    return make(runs, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def windows(runs):
    checkpoints = [load_checkpoint(run) for run in runs]
    ids, _, _, tokenizer = text_to_score(checkpoints, runs)
    return document_windows(ids, tokenizer.end_of_document, FACTOR * L, 6), tokenizer


@pytest.fixture(scope="module")
def shown_window(opened, windows):
    """Index of the window that the page shows, found by its text."""
    text = "".join(opened.run("tokens.map(token => vocab[token])"))
    return [windows[1].decode(window.tolist()) for window in windows[0]].index(text)


def numbers(opened, code):
    """A list of losses from the page; undefined is nan."""
    return torch.tensor([float("nan") if x is None else x for x in opened.run(code)])


@pytest.mark.parametrize("i", range(3))
def test_losses_are_those_of_the_evaluation(i, runs, opened, windows, shown_window):
    model = load_model(runs[i])
    expected = {"loss": score(model, windows[0], 128, 6), "localLoss": score_local(model, windows[0], L, 6)}
    for key, losses in expected.items():
        shown = numbers(opened, f"runs[{i}].{key}.slice(1)")
        torch.testing.assert_close(shown, losses[shown_window], atol=HALF_A_STEP, rtol=0, equal_nan=True)


def test_mean_by_bucket_is_that_of_the_evaluation(runs, opened, tmp_path):
    file = tmp_path / "results.json"
    eval_extrapolation.main([*runs, "--windows", "6", "--max_factor", str(FACTOR), "--device", "cpu",
                             "--json", str(file)])
    for i, run in enumerate(json.loads(file.read_text())["runs"]):
        shown = opened.run(f"runs[{i}].mean")
        for mean, bucket in zip(shown, run["buckets"], strict=True):
            assert mean is bucket["nll"] is None or abs(mean - bucket["nll"]) < HALF_A_STEP


def test_passage_is_the_window_closest_to_the_mean(runs, windows, shown_window):
    distance = torch.zeros(6, dtype=torch.float64)
    for run in runs:
        losses = score(load_model(run), windows[0], 128, 6).double()
        for start, end in ((0, L), (L, 2 * L), (2 * L, 4 * L), (4 * L, 8 * L)):
            mean = losses[:, start:end].mean(1)
            distance += 0 if mean.isnan().any() else (mean - mean.mean()) ** 2
    assert shown_window == distance.argmin()


def test_closeness_counts_each_bucket():
    """The second window has the mean of all over the whole, but not in each half; the third has both almost."""
    losses = torch.tensor([[[1., 1, 3, 3], [4, 4, 0, 0], [2.1, 2.1, 2, 2], [0.9, 0.9, 3, 3]]])
    assert page.closest_to_mean(losses, [0, 2, 4]) == 2


def test_expected_tokens_are_the_models(runs, opened, windows, shown_window):
    """Positions beyond L among them; the last L tokens, too, by the loss that the evaluation gives to the right one."""
    window, tokenizer = windows[0][shown_window], windows[1]
    for i in (0, 1):
        model = load_model(runs[i])
        for token in (1, 2, L, L + 1, 3 * L, FACTOR * L):
            with torch.no_grad():
                p, ids = model(window[None, :token])[0][0, -1].softmax(-1).topk(5)
            shown = opened.run(f"[0, 1, 2, 3, 4].map(j => 5 * {token - 1} + j).map(k => "
                               f"[runs[{i}].p[k], vocab[runs[{i}].top[k]]])")
            for (percent, text), probability, id in zip(shown, p.tolist(), ids.tolist()):
                assert abs(percent - 100 * probability) < (1 if percent == 0 else 0.51)
                assert not percent or text == tokenizer.decode([id]) or p.diff().abs().min() < 1e-4  # a tie


def test_probability_of_the_right_token_fits_its_loss(opened):
    found = opened.run("""runs.flatMap(run => [[run, run.loss, 1], [run.local, run.localLoss, L + 1]].flatMap(
        ([part, losses, first]) => part.top.flatMap((top, k) => { const token = first + Math.floor(k / 5);
        return part.p[k] && top == tokens[token] ? [[part.p[k] / 100, Math.exp(-losses[token])]] : []; })))""")
    assert len(found) > 3 * FACTOR * L
    assert max(abs(p - expected) for p, expected in found) < 0.005 + 0.01 + 1e-4


def test_undefined_positions_are_called_so(opened):
    """Learned positions end at L."""
    opened.run(f"choose({L + 1})")
    assert "undefined" in opened.text("detail").split("learned")[1]
    opened.run(f"choose({L})")
    assert "undefined" not in opened.text("detail")


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_random_actions(seed, runs, tmp_path):
    arguments = ([], ["--max_factor", "1"], ["--max_factor", "3"])[seed]
    opened, draw = make(runs, tmp_path, *arguments), random.Random(seed)
    keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "x"]
    for _ in range(200):
        action = draw.randrange(6)
        if action == 0:
            opened.key("text", draw.choice(keys))
        elif action == 1:
            opened.act(f"document.querySelectorAll('label input')[{draw.randrange(5)}].click()")
        elif action == 2:
            opened.act(f"document.querySelectorAll('button')[{draw.randrange(3)}].click()")
        elif action == 3:
            event = draw.choice(["click", "pointermove"])
            opened.act(f"stub.send(spans[{draw.randrange(L + 1)}], '{event}', {{screenX: {draw.random()}}})")
        elif action == 4:
            opened.send("chart", "pointermove", buttons=1, offsetX=draw.randint(-9, 1200))
        else:
            opened.act(f"window.innerWidth = {draw.choice([390, 1280])}; drawGutter(); drawChart(); "
                       "stub.send('window', 'scroll')")
        html = opened.run("stub.html(document.body)").replace("full context: undefined", "")  # learned, beyond L
        assert not re.search(r"\b(NaN|undefined|Infinity)\b|\[object", html)
    assert opened.run("1 <= at && at <= n")


def test_buttons_choose_the_extreme_tokens(opened):
    for run in (0, 1):
        opened.run(f"show(runs[{run}], 'loss')")
        for label, key, best in (("highest loss", "loss", max), ("far tokens help most", "gain", min),
                                 ("harm most", "gain", max)):
            button = opened.run("Object.keys(JUMPS)").index(label)
            opened.act(f"document.querySelectorAll('button')[{button}].click()")
            values = opened.run(f"runs[{run}].{key}.slice(1)")
            assert values[opened.run("at") - 1] == best(values)
            assert opened.run("measure") == key and opened.run(f"chosen == runs[{run}]")


def test_colour_shows_the_chosen_run_and_measure(opened):
    for run in (0, 1):
        for what in ("loss", "gain"):
            opened.run(f"show(runs[{run}], '{what}')")
            values = opened.run(f"runs[{run}].{what}.slice(1)")
            for value, style in zip(values, opened.run("spans.slice(1).map(span => span.style.background)")):
                share = round(80 * min(1, abs(value) / {"loss": 5, "gain": 3}[what]))
                assert ("--better" in style) == (value < 0) and abs(int(re.search(r"(\d+)%", style)[1]) - share) <= 1


def test_keys_and_chart_move_the_choice(opened):
    for key, at in (("Home", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", FACTOR * L),
                    ("ArrowRight", FACTOR * L)):
        opened.key("text", key)
        assert opened.run("at") == at
    opened.send("chart", "pointerdown", buttons=1, offsetX=opened.run("plotWidth()") / 2)
    assert opened.run("at") == FACTOR * L // 2
    assert opened.text("#detail h2").startswith(f"Token {FACTOR * L // 2} ({FACTOR / 2:.1f} L)")


def test_pointing_and_tapping_choose_a_token(opened):
    for token, event, x, at in ((5, "pointermove", 1, 5), (9, "pointermove", 2, 9), (7, "pointermove", 2, 9),  # at rest
                                (7, "click", 2, 7), (0, "click", 3, 1)):
        opened.act(f"stub.send(spans[{token}], '{event}', {{screenX: {x}, screenY: 0}})")
        assert opened.run("at") == at


def test_multiples_of_L_are_marked(opened):
    assert opened.run("spans.flatMap((s, i) => s.classList.contains('mark') ? [i - 1] : [])") == [L, 2 * L, 4 * L]
    labels = opened.run("document.querySelectorAll('#chart text').map(text => text.textContent)")
    assert [label for label in labels if label.endswith("L")] == ["L", "2 L", "4 L", "8 L"]


def test_page_says_how_it_was_made(opened, dataset):
    text = opened.text("intro") + opened.text("notes")
    for part in (f"{FACTOR * L} tokens", "3 runs", f"L = {L}", dataset, "6 windows", "closest to their mean",
                 "0.02 nats"):
        assert part in " ".join(text.split())


# --- Texts that are hard to show --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["char", "bpe"])
def hostile(request, tmp_path_factory):
    """A page of a text of hostile characters, one token each, or byte pairs, of which some are parts of characters."""
    folder = tmp_path_factory.mktemp("hostile")
    for i in range(8):
        (folder / f"{i}.txt").write_text(HOSTILE * (60 + i), encoding="utf-8")
    dataset = data.prepare.prepare(str(folder), request.param, folder / "data", **{
        "char": {"charset": "auto"}, "bpe": {"vocab_size": 265}}[request.param])
    run = short_run(str(dataset), folder / '<img src="x"> & co')
    opened = make([run], folder)
    return request.param, opened, (folder / "page.html").read_text(encoding="utf-8"), load_checkpoint(run)


def test_hostile_text_is_escaped_in_the_file(hostile):
    _, _, html, _ = hostile
    assert html.count("</script>") == html.count("<script") == 2 and "<!--" not in html
    assert not re.search("[\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\u0000-\u0009\u007f-\u009f]", html)


def test_hostile_text_is_shown_as_text(hostile):
    kind, opened, _, _ = hostile
    shown, texts = opened.text("text"), opened.run("tokens.map(token => vocab[token])")
    assert not re.search("[\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\u00a0]", shown)
    assert '<img src="x"> & co' in opened.text("run")
    for sign in ("⏎\n", "⇥\t", "U+00a0", "U+202e", "U+200b", "<b>&amp;\"'", "שלום עולם", "e\u0301", "🙂"):
        assert sign in shown or kind == "bpe"
    # a byte that is a part of a character only is \\x and two digits
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), "".join(texts).encode())
    assert raw in (HOSTILE * 70).encode()
    assert any("\\x" in text for text in texts) == (kind == "bpe")
    assert opened.run("document.querySelectorAll('#text .space').length") == "".join(texts).count(" ") > 10


def test_arrows_follow_the_direction_of_the_script(hostile):
    kind, opened, _, _ = hostile
    at = opened.run("tokens.findIndex((token, i) => i && /^[א-ת]+$/.test(vocab[token]))")
    if at > 0:
        opened.run(f"choose({at})")
        opened.key("text", "ArrowLeft")
        assert opened.run("at") == at + 1
    assert at > 0 or kind == "bpe"


def test_hostile_page_survives_every_token(hostile):
    opened = hostile[1]
    opened.key("text", "Home")
    for _ in range(FACTOR * L):
        opened.run("choose(at + 1, 'nearest')")
        opened.check_content()


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused(finished_run, hostile, fails, tmp_path):
    other = str(tmp_path / "other.pt")
    save_checkpoint(other, hostile[3])
    code, lines = fails(page, [finished_run, other, "--html", str(tmp_path / "page.html")])
    assert code == 2 and len(lines) == 1 and "different tokenizers" in lines[0]
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("arguments, words", [
    (["{tmp}/none", "--html", "{tmp}/a.html"], "no checkpoint"), (["{run}", "--html", "{tmp}/none/a.html"], "folder"),
    (["{run}", "--html", "{tmp}"], "not a file"), (["{run}"], "--html"),
    (["{run}", "--html", "{tmp}/a.html", "--max_factor", "60000"], "lower --max_factor"),
    (["{run}", "--html", "{tmp}/a.html", "--text", "{tmp}/none.txt"], "none.txt"),
    (["{run}", "--html", "{tmp}/a.html", "--dataset", "{tmp}/none"], "no data set")])
def test_bad_input_is_one_line(arguments, words, finished_run, fails, tmp_path):
    code, lines = fails(page, [part.format(tmp=tmp_path, run=finished_run) for part in arguments])
    assert code == 2 and words in lines[-1]
    assert not list(tmp_path.glob("*.html*"))


def test_runs_of_different_contexts_are_refused(dataset, finished_run, fails, tmp_path):
    other = short_run(dataset, tmp_path / "other", "--block_size", "8")
    code, lines = fails(page, [finished_run, other, "--html", str(tmp_path / "page.html")])
    assert code == 2 and len(lines) == 1 and "block_size" in lines[0]


def test_damaged_weights_are_refused(finished_run, fails, tmp_path):
    checkpoint = load_checkpoint(finished_run)
    checkpoint["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    save_checkpoint(tmp_path / "damaged.pt", checkpoint)
    code, lines = fails(page, [str(tmp_path / "damaged.pt"), "--html", str(tmp_path / "page.html"), "--windows", "2"])
    assert code == 2 and len(lines) == 1 and "damaged gives NaN" in lines[0]


def test_a_text_of_ones_own_is_shown(finished_run, tmp_path):
    (tmp_path / "own.txt").write_text("three one two " * 40)
    opened = make([finished_run], tmp_path, "--text", str(tmp_path / "own.txt"), "--max_factor", "2")
    assert "".join(opened.run("tokens.map(token => vocab[token])")) in "three one two " * 40
    assert "own.txt" in opened.text("notes") and opened.run("n") == 2 * L
