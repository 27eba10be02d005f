"""
The numbers of README.md and experiments/FINDINGS.md against the JSON files that they come from.

A table with measured numbers has a comment of HTML above it, with one line for each of its rows:

    <!-- numbers
    study.json > groups > name=rope > loss ± loss_std; study.json > groups > name=rope > buckets > 0
    -->
    | | loss | [0, 128) |
    |---|---|---|
    | RoPE | 1.274 ± 0.006 | 3.81 |

A path starts with a file of experiments/results/. Its steps are keys of a dict, indices of a list,
key=value for the entry of a list that has this value, or * for all entries. "a ± b" as the last
step is both. A line with {} is a pattern for the lines below it, which say what stands there. A row
without measured numbers has the line "-".

Measured numbers are those with a decimal point, but not 2410.21216, a paper, or p of 0.75-RoPE.
"""
import json
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "experiments" / "results"
FINDINGS, README = PROJECT / "experiments" / "FINDINGS.md", PROJECT / "experiments" / "README.md"
PAGES = [PROJECT / "README.md", FINDINGS, FINDINGS.with_name("RULES.md")]
MEASURED = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\d.])(?!-RoPE)")
PAPER_OR_LINK = re.compile(r"\b\d{4}\.\d{5}\b|\]\([^)]*\)")
COMMENT_AND_TABLE = re.compile(
    r"(?:<!-- numbers\n((?:(?!-->).*\n)*)-->\n+)?((?:^\|.*\n?)+)", re.MULTILINE)


def prose(path):
    """A page without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)


def entries(value, step):
    """One step of a path -> the values that it leads to."""
    if step == "*":
        return value
    if " ± " in step:
        return [value[key] for key in step.split(" ± ")]
    if "=" in step:
        key, wanted = step.split("=")
        return [next(entry for entry in value if str(entry[key]) == wanted)]
    return [value[int(i)] for i in step.split(",")] if isinstance(value, list) else [value[step]]


def values_of(line):
    """A line of a comment -> the values that its paths lead to, in this order. Raises LookupError
    or StopIteration."""
    found = []
    for path in line.split(";"):
        name, *steps = path.strip().split(" > ")
        values = [json.loads((RESULTS / name).read_text(encoding="utf-8"))]
        for step in steps:
            values = [entry for value in values for entry in entries(value, step)]
        found += values
    return found


def values_by_row(lines):
    pattern = "{}"
    for line in lines:
        if "{}" in line:
            pattern = line
        else:
            line = line if ".json" in line else pattern.replace("{}", line)
            yield values_of(line.strip("; ")) if ".json" in line else []


def is_rounded(text, value):
    """Within half a unit of the last digit; the file's numbers are rounded, too."""
    return abs(float(text) - value) <= 0.5 * 10 ** -len(text.split(".")[1]) + 1e-4 * abs(value)


def wrong_numbers(text):
    """Yield what is wrong with the tables of a page, in words."""
    for comment, table in COMMENT_AND_TABLE.findall(text):
        rows = table.splitlines()[2:]
        if not comment and any(re.search(r"\| -?\d+\.\d", row) for row in rows):
            yield f"no comment names the numbers of the table that begins with {rows[0]}"
        if comment:
            for row, values in zip(rows, values_by_row(comment.splitlines()), strict=True):
                shown = MEASURED.findall(PAPER_OR_LINK.sub("", row))
                if len(shown) != len(values) or not all(map(is_rounded, shown, values)):
                    yield f"{row} has the numbers {shown}, its files {values}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_of_the_tables_are_those_of_the_json_files(page):
    assert list(wrong_numbers(prose(page))) == []


def test_a_wrong_number_is_found():
    value, = values_of("study.json > groups > name=rope > buckets > 0 > ppl")
    table = "| | [0, L) |\n|---|---|\n| RoPE, 16 L, 0.75-RoPE, 2410.21216 | {:.2f} |\n"
    comment = "<!-- numbers\nstudy.json > groups > name={} > buckets > 0 > ppl\nrope\n-->\n"
    assert not list(wrong_numbers(comment + table.format(value)))
    assert len(list(wrong_numbers(comment + table.format(value + 0.01)))) == 1
    assert len(list(wrong_numbers(table.format(value)))) == 1  # without a comment


def test_pages_about_experiments_are_short():
    for path, most in ((FINDINGS, 2600), (README, 700)):
        text = re.sub(r"<!--.*?-->", "", prose(path), flags=re.DOTALL)
        assert len(re.findall(r"\S*\w\S*", text)) <= most, path.name


def test_results_that_are_kept_are_named_somewhere():
    pages = [*PAGES, README, *RESULTS.glob("*.md"), *(PROJECT / "config").iterdir()]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    kept = [path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".png")]
    # bench.py's docstring names those of bench.py
    assert [name for name in kept if name not in text and not name.startswith("bench_")] == []


def test_commands_that_results_name_do_not_rely_on_the_head_of_a_config():
    """The heads of config/cpu_demo have changed since some runs were made."""
    for path in RESULTS.glob("*.json"):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        own = "--n_head" in command and "--rope_base" in command
        assert own or "@config/" not in command, (path.name, command)
