"""
The numbers of README.md and experiments/FINDINGS.md against the JSON files that they come from.

A table with measured numbers has a comment of HTML above it, with one line for each of its rows:

    <!-- numbers
    study.json > groups > name=rope > val_loss ± val_loss_std; study.json > groups > name=rope > buckets > 0,1 > ppl
    -->
    | | loss | [0, 128) | [128, 256) |
    |---|---|---|---|
    | RoPE | 1.274 ± 0.006 | 3.81 | 3.80 |

A path starts with a file of experiments/results/. Its steps are keys of a dict, indices of a list, key=value for the
entry of a list that has this value, or * for all entries. "a ± b" as the last step is both. A line with {} is a pattern
for the lines below it, which say what stands there. A row without measured numbers has the line "-".

Measured numbers are those with a decimal point. Numbers of papers, such as 2410.21216, and p of 0.75-RoPE are none.
"""
import json
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "experiments" / "results"
FINDINGS, README = PROJECT / "experiments" / "FINDINGS.md", PROJECT / "experiments" / "README.md"
PAGES = [PROJECT / "README.md", FINDINGS]
MEASURED = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\d.])(?!-RoPE)")
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")


def without_code(text):
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)


def tables(text):
    """-> for each table with a comment, or with a cell that begins with a number: the lines of the comment above it, or
    None, and those of its rows."""
    text = without_code(text)
    for found in re.finditer(r"(?:<!-- numbers\n((?:(?!-->)[^\n]*\n)*)-->\n+)?((?:^\|[^\n]*\n?)+)", text, re.MULTILINE):
        rows = found[2].splitlines()[2:]
        if found[1] or any(re.search(r"\| -?\d+\.\d", row) for row in rows):
            yield found[1] and found[1].splitlines(), rows


def numbers(row):
    """A row of a table -> its measured numbers, as text."""
    return MEASURED.findall(PAPER.sub("", re.sub(r"\]\([^)]*\)", "]", row)))


def entries(values, step):
    """One step of a path, from each of the values."""
    if step == "*":
        return [entry for value in values for entry in (value if isinstance(value, list) else value.values())]
    if " ± " in step:
        return [value[key] for value in values for key in step.split(" ± ")]
    if "=" in step:
        key, wanted = step.split("=")
        return [next(entry for entry in value if str(entry[key]) == wanted) for value in values]
    return [entry for value in values for entry in (
        [value[int(index)] for index in step.split(",")] if isinstance(value, list) else [value[step]])]


def values_of(line):
    """A line of a comment -> the values that its paths lead to, in this order. Raises LookupError or StopIteration."""
    found = []
    for path in filter(None, map(str.strip, line.split(";"))):
        name, *steps = path.split(" > ")
        values = [json.loads((RESULTS / name).read_text(encoding="utf-8"))]
        for step in steps:
            values = entries(values, step)
        found += values
    return found


def values_by_row(lines):
    pattern = "{}"
    for line in lines:
        if "{}" in line:
            pattern = line
        else:
            yield [] if line == "-" else values_of(line if ".json" in line else pattern.replace("{}", line))


def wrong_numbers(text):
    """A page -> what is wrong with its tables, as lines of text."""
    for lines, rows in tables(text):
        if not lines:
            yield f"no comment names the numbers of the table that begins with {rows[0]}"
            continue
        for row, values in zip(rows, values_by_row(lines), strict=True):
            shown = numbers(row)
            # half a unit of the last digit; the file's numbers are rounded, too
            if len(shown) != len(values) or any(
                    abs(float(number) - value) > 0.5 * 10 ** -len(number.split(".")[1]) + 1e-4 * abs(value)
                    for number, value in zip(shown, values)):
                yield f"{row} has the numbers {shown}, its files {values}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_of_the_tables_are_those_of_the_json_files(page):
    assert list(wrong_numbers(page.read_text(encoding="utf-8"))) == []


def test_a_wrong_number_is_found():
    value, = values_of("study.json > groups > name=rope > buckets > 0 > ppl")
    table = "| | [0, L) |\n|---|---|\n| RoPE, 16 L, 0.75-RoPE, 2410.21216 | {:.2f} |\n"
    comment = "<!-- numbers\nstudy.json > groups > name={} > buckets > 0 > ppl\nrope\n-->\n"
    assert not list(wrong_numbers(comment + table.format(value)))
    assert len(list(wrong_numbers(comment + table.format(value + 0.01)))) == 1
    assert len(list(wrong_numbers(table.format(value)))) == 1  # without a comment


def words(path):
    text = re.sub(r"<!--.*?-->", "", without_code(path.read_text(encoding="utf-8")), flags=re.DOTALL)
    return len(re.findall(r"\S*\w\S*", text))


@pytest.mark.parametrize("path, most", [(FINDINGS, 2500), (README, 700)], ids=("FINDINGS.md", "README.md"))
def test_pages_about_experiments_are_short(path, most):
    assert words(path) <= most


def test_results_that_are_kept_are_named_somewhere():
    texts = [*PAGES, README, *(PROJECT / "config").iterdir()]
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    kept = sorted(path.name for path in RESULTS.iterdir() if not path.name.startswith("bench_"))  # bench.py's docstring
    assert [name for name in kept if name not in text] == []


def test_commands_that_results_name_do_not_rely_on_the_head_of_a_config():
    """The heads of config/cpu_demo have changed since some runs were made."""
    for path in RESULTS.glob("*.json"):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert "@config/" not in command or ("--n_head" in command and "--rope_base" in command), (path.name, command)
