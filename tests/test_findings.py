"""
The numbers of README.md and of the pages in experiments/ against the JSON files they come from.

experiments/results/tables.json has, for each page, a line for each row of a table and each
paragraph or item of a list that shows measured numbers, in the order of the page:

    "study.json > groups > name=rope > val_loss ± val_loss_std; effects.json > nll > 0 > mean > 2"

A path starts with a file of experiments/results/. Its steps are keys of a dict, indices of a list,
key=value for the entry of a list that has this value, or * for all entries. "a ± b" as the last
step is both; median or max is that of all values that the steps before lead to. A line with {} is a
pattern for the lines below it, which say what stands there; it stands for no row itself. A number
in place of a path is a setting, not measured.

Measured numbers are those with a decimal point, and percentages, which are 100 times the value. Not
measured are 2410.21216, a paper, or p of 0.75-RoPE.
"""
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

import train
from common.report import mean_and_stderr
from model import GPT, PE, GPTConfig, rotate

PROJECT = Path(__file__).parents[1]
EXPERIMENTS = PROJECT / "experiments"
RESULTS = EXPERIMENTS / "results"
TABLES = json.loads((RESULTS / "tables.json").read_text(encoding="utf-8"))
MEASURED = re.compile(r"(?<![\w.])-?\d+\.\d+(?!\.?\d)(?!-RoPE)(?: %)?|(?<![\w.,])\d+ %")
PAPER_OR_LINK = re.compile(r"\b\d{4}\.\d{5}\b|\]\([^)]*\)")
SUMMARIES = {"median": lambda values: [statistics.median(values)],
             "max": lambda values: [max(values)]}
WORDS = {"README.md": 1100, "experiments/FINDINGS.md": 1300, "experiments/README.md": 700}


def prose(page):
    """A page without its blocks of code and comments."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def units(text):
    """Yield the numbers of each row, paragraph or item that shows some, with its text."""
    text = re.sub(r"\n(?!\n|\||#| *(?:-|\d+\.) )", " ", text)  # a paragraph or an item is a line
    for line in text.splitlines():
        if numbers := MEASURED.findall(PAPER_OR_LINK.sub("", line)):
            yield numbers, line


def entries(value, step):
    """One step of a path -> the values that it leads to."""
    if step == "*":
        return value
    if " ± " in step:
        return [value[key] for key in step.split(" ± ")]
    if "=" in step:
        key, wanted = step.split("=", 1)
        return [next(entry for entry in value if str(entry[key]) == wanted)]
    if isinstance(value, dict):
        return [value[step]]
    ranges = [i.partition(":") for i in step.split(",")]  # 3, or the mean over 3:7
    return [statistics.mean(value[int(a):int(b)]) if b else value[int(a)] for a, _, b in ranges]


def values_of(line):
    """A line -> the values that its paths lead to, in this order. Raises LookupError or
    StopIteration."""
    found = []
    for path in line.split("; "):
        if ".json" not in path:
            found.append(float(path))
            continue
        name, *steps = path.split(" > ")
        summary = SUMMARIES[steps.pop()] if steps[-1] in SUMMARIES else list
        values = [json.loads((RESULTS / name).read_text(encoding="utf-8"))]
        for step in steps:
            values = [entry for value in values for entry in entries(value, step)]
        found += summary(values)
    return found


def expected(lines):
    """The lines of a page in tables.json -> yield the values of each row or paragraph."""
    pattern = "{}"
    for line in lines:
        if "{}" in line:
            pattern = line
        else:
            own = ".json" in line or re.fullmatch(r"[\d.; ]+", line)
            yield values_of(line if own else pattern.replace("{}", line))


def is_rounded(text, value):
    """Within half a unit of the last digit; the file's numbers are rounded, too."""
    number = text.removesuffix(" %")
    value = value if number == text else 100 * value
    digits = len(number.partition(".")[2])
    return abs(float(number) - value) <= 0.5 * 10 ** -digits + 1e-4 * abs(value)


def wrong_numbers(text, lines):
    """Yield what is wrong with the numbers of a page, in words."""
    shown, values = list(units(text)), list(expected(lines))
    for (numbers, line), its in zip(shown, values):
        if len(numbers) != len(its) or not all(map(is_rounded, numbers, its)):
            yield f"{line} has the numbers {numbers}, its files {its}"
    if len(shown) != len(values):
        yield f"{len(shown)} rows and paragraphs have numbers, tables.json has {len(values)}"


@pytest.mark.parametrize("page", TABLES)
def test_numbers_of_a_page_are_those_of_the_json_files(page):
    assert list(wrong_numbers(prose(page), TABLES[page])) == []


def test_pages_with_results_are_checked():
    pages = {"README.md", *(f"experiments/{path.name}" for path in EXPERIMENTS.glob("*.md"))}
    assert pages - {"experiments/README.md"} == set(TABLES)


def test_a_wrong_number_is_found():
    lines = ["biases.json > groups > name={} > buckets > 0 > ppl",
             "rope bias False qkv_bias False"]
    value, = values_of(lines[0].replace("{}", lines[1]))
    table = "| | [0, L) |\n|---|---|\n| RoPE, 16 L, 0.75-RoPE, 2410.21216 | {:.2f} |\n"
    text = "In the text it is\n{:.2f}.\n- Or {:.0f} % of one.\n"
    assert not list(wrong_numbers(table.format(value), lines))
    assert not list(wrong_numbers(text.format(value, 100 * value), lines + lines[1:]))
    assert len(list(wrong_numbers(table.format(value + 0.01), lines))) == 1
    assert len(list(wrong_numbers(text.format(value, 100 * value + 1), lines + lines[1:]))) == 1
    assert len(list(wrong_numbers(table.format(value), []))) == 1


def losses(name, i, biases="none", scaling="none"):
    """In a file of results, in the i-th range -> {(encoding, seed): nats per token}. biases: none,
    qkv, all."""
    runs = json.loads((RESULTS / name).read_text(encoding="utf-8"))["runs"]
    return {(run["pe"], run["seed"]): run["buckets"][i]["nll"] for run in runs
            if run["attn_scaling"] == scaling and run["config"]["qkv_bias"] == (biases != "none")
            and run["config"]["bias"] == (biases == "all")}


def hope_minus_rope(*which):
    """What losses() takes -> {seed: nats per token}."""
    nll = losses(*which)
    return {seed: nll["hope", seed] - nll["rope", seed] for pe, seed in nll if pe == "hope"}


BEYOND = (1, 2, 3, 4)  # the ranges beyond L
LIMITS = {3: 4.303, 5: 2.776}  # of the t test: standard errors by number of seeds


def sign_by_test(differences):
    """By a t test over three or five seeds, p = 0.05: 1: positive, -1: negative, 0: neither."""
    mean, stderr = mean_and_stderr(differences)
    limit = LIMITS[len(differences)] * stderr
    return (mean > limit) - (mean < -limit)


@pytest.mark.parametrize("name, biases, scalings, behind, ahead", [
    ("biases.json", "none", ("none", "logn"), (), BEYOND),
    ("long.json", "none", ("none", "logn"), (), (0, *BEYOND)),
    ("biases.json", "qkv", ("none",), (1,), (2, 3, 4)), ("long.json", "qkv", ("none",), (1,), ()),
    ("biases.json", "qkv", ("logn",), (1,), ()), ("long.json", "qkv", ("logn",), (1, 3, 4), ()),
    ("slow_biases.json", "none", ("none", "logn"), (), BEYOND),
    ("slow_biases.json", "qkv", ("none", "logn"), (), (2, 3, 4)),
    ("fast_biases.json", "none", ("none", "logn"), (), BEYOND),
    ("fast_biases.json", "qkv", ("none", "logn"), (), ()),
    ("adamw_biases.json", "none", ("none", "logn"), (), BEYOND),
    ("adamw_biases.json", "qkv", ("none", "logn"), (), BEYOND),
    ("adamw_biases.json", "all", ("none", "logn"), (0,), BEYOND),
    ("adamw_long.json", "none", ("none", "logn"), (), BEYOND),
    ("adamw_long.json", "qkv", ("none", "logn"), (), BEYOND),
    ("small_heads.json", "none", ("none", "logn"), (), BEYOND),
    ("base_1e4.json", "none", ("none", "logn"), (), (2, 3, 4)),
    ("small_heads_all.json", "all", ("none",), (1, 2), ()),
    ("small_heads_all.json", "all", ("logn",), (1,), ()),
    ("base_1e4_all.json", "all", ("none",), (1, 2), ()),
    ("base_1e4_all.json", "all", ("logn",), BEYOND, ())])
def test_where_hope_is_behind_rope_and_where_it_is_ahead(name, biases, scalings, behind, ahead):
    """What the pages say of it."""
    for scaling, i in itertools.product(scalings, range(5)):
        differences = hope_minus_rope(name, i, biases, scaling)
        assert sign_by_test([*differences.values()]) == (i in behind) - (i in ahead)


def test_biases_harm_encodings_without_rotation_in_each_seed():
    """Question 3 of FINDINGS.md, in [L, 2 L)."""
    none, every = losses("others.json", 1), losses("others_all.json", 1, "all")
    for run in itertools.product(("kerple", "alibi", "nope"), (1, 2, 3)):
        assert none[run] < every[run]


def test_biases_other_than_qkv_help_rope_trained_with_adamw():
    """DETAILS.md: All - QKV in each range."""
    for i in range(5):
        qkv, every = (losses("adamw_biases.json", i, biases) for biases in ("qkv", "all"))
        assert sign_by_test([every[run] - qkv[run] for run in qkv if run[0] == "rope"]) == -1


def test_after_1500_steps_p_rope_with_8_pairs_is_better_than_hope_in_one_range():
    for i in range(5):
        hope, prope = losses("long.json", i), losses("long_others.json", i)
        differences = [prope["prope", seed] - hope["hope", seed] for seed in (1, 2, 3)]
        assert sign_by_test(differences) == -(i == 1)


@pytest.mark.parametrize("name, larger", [("adamw_biases.json", ()), ("adamw_long.json", (4,))])
def test_where_hopes_lead_is_larger_with_adamw_than_with_muon(name, larger):
    """Question 6 of RULES.md."""
    for i in range(5):
        muon, adamw = hope_minus_rope("biases.json", i), hope_minus_rope(name, i)
        assert sign_by_test([adamw[seed] - muon[seed] for seed in adamw]) == -(i in larger)


def test_biases_that_learn_at_0_04_add_more_than_2_nats_to_the_key_1_token_back_in_37_of_40_heads():
    added = values_of("biases_distance.json > runs > * > heads > * > values > 1")
    assert (sum(value > 2 for value in added), len(added)) == (37, 40)


def test_the_seed_of_the_demo_is_that_of_the_rule():
    """RULES.md: the one whose ratio RoPE / HoPE in [2 L, 4 L), without biases, is the median."""
    differences = hope_minus_rope("biases.json", 2)
    by_ratio = sorted(range(1, 6), key=lambda seed: -differences[seed])
    _, config, _ = train.parse([f"@{PROJECT}/config/cpu_demo"])
    assert config.seed == by_ratio[2]


@pytest.mark.parametrize("page", WORDS)
def test_pages_are_short(page):
    text = PAPER_OR_LINK.sub("]", prose(page))
    assert len(re.findall(r"[A-Za-z][\w'-]*", text)) <= WORDS[page]


def test_results_that_are_kept_are_shown_somewhere():
    pages = [*map(PROJECT.joinpath, TABLES), EXPERIMENTS / "README.md", EXPERIMENTS / "bench.py",
             *(PROJECT / "docs").glob("*.html"), *(PROJECT / "config").iterdir(),
             PROJECT / "tools" / "index_numbers.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in pages) + json.dumps(TABLES)
    kept = [path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".png")]
    assert [name for name in kept
            if name not in text and name != "tables.json" and not name.startswith("bench_")] == []


# --- claims of PAPERS.md that hold by construction


def logits_by_distance(q, k, theta):
    """q and k (N, D), theta (K,) -> q . R(distance) k (N, 128) for distances 0 to 127."""
    angle = torch.arange(128)[:, None] * theta
    rotated = rotate(k[:, None].expand(-1, 128, -1), angle.cos(), angle.sin())
    return torch.einsum("nd,ntd->nt", q, rotated)


def test_logits_of_gaussian_vectors_do_not_decay_and_a_key_can_peak_at_any_distance():
    theta = PE["rope"](GPTConfig(n_head=2, n_embd=128, rope_base=100)).theta
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4000, 64, generator=generator)
    logits = logits_by_distance(q, k, theta)
    assert logits.mean(0).abs().max() < 4.5 * math.sqrt(64 / 4000)  # standard errors
    for distance in (0, 1, 40, 127):
        angle = torch.tensor([-distance])[:, None] * theta
        key = rotate(q[:4, None], angle.cos(), angle.sin())[:, 0]
        assert logits_by_distance(q[:4], key, theta).argmax(1).tolist() == [distance] * 4


def test_a_head_without_encoding_weighs_equal_tokens_equally():
    """So it cannot point to the previous token, whatever it learns."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=8, n_layer=1, n_head=1, n_embd=16, pe="nope"))
    logits = model(torch.full((1, 32), 3), torch.zeros(1, 32, dtype=torch.long))[0][0]
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5)


@pytest.mark.parametrize("pe, falls", [("rope", True), ("hope", False)])
def test_of_equal_vectors_the_logit_of_rope_falls_with_distance_and_that_of_hope_does_not(
        pe, falls):
    config = GPTConfig(block_size=128, n_head=2, n_embd=128, rope_base=10000, pe=pe)
    logits = logits_by_distance(*torch.ones(2, 1, 64), PE[pe](config).theta)[0]
    assert (logits[64:].mean() < 0.8 * logits[16:32].mean()) == falls
