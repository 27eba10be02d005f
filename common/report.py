"""
What scripts show: tables, JSON files, pictures, means with their standard errors.
"""
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from common.checkpoint import replacing

PICTURES = (".png", ".pdf", ".svg")

# --- Numbers ----------------------------------------------------------------------------------------------------------


def mean_and_stderr(values):
    """Values (N,) -> their mean and its standard error, nan for a single value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def format_cell(mean, stderr=None, digits=3):
    """A number as text, with its standard error if it has one; "-" for None."""
    if mean is None:
        return "-"
    text = f"{mean:z.{digits}f}" if mean < 1e5 else f"{mean:.1e}"  # z: no -0.000
    return text if stderr is None or math.isnan(stderr) else f"{text} ± {stderr:.{digits}f}"


def print_table(title, columns, rows):
    """rows: name -> the text of each column."""
    table = [["", *columns]] + [[name, *cells] for name, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]))


def run_names(paths):
    """The shortest ends of the paths that tell runs apart, without .pt: rope, or rope/ckpt_000100."""
    for n in range(1, 10):
        names = [str(Path(*Path(str(path).removesuffix(".pt")).parts[-n:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)


# --- Files ------------------------------------------------------------------------------------------------------------


def add_output_flags(parser, picture):
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", metavar="FILE.png", help=f"draw {picture} (needs matplotlib)")


def check_outputs(args):
    """Find out before the work whether --json and --plot can be written. Raises ValueError or ImportError."""
    for path, suffixes in ((args.json, None), (args.plot, PICTURES)):
        if path:
            check_output(path, suffixes)
    if args.plot:
        import_pyplot()


def check_output(path, suffixes=None):
    """Raises ValueError if no file can be written at path."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path} to: make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: choose another folder or change the permissions of this one")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file that can be written: choose another name")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: pictures can be written as {', '.join(suffixes)}")


def read_json(path, rows, keys, writer):
    """A JSON file with a list of dicts under the name rows, each with keys whose values are not empty -> all of it.

    Raises ValueError if it is another file. writer: what writes such files."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        is_whole = bool(found[rows]) and all(row[key] for row in found[rows] for key in keys)
    except (IsADirectoryError, ValueError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} was not written by {writer}")
    return found


def rounded(value, digits):
    """Floats to so many significant digits, nan to None (JSON has no nan), through lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part, digits) for part in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}")
    return value


def write_json(path, script, result, digits=17):
    """Write result, preceded by the command and the version of torch. A list of numbers takes one line."""
    result = {"command": shlex.join(["python", *script.split(), *sys.argv[1:]]), "torch": torch.__version__, **result}
    text = json.dumps(rounded(result, digits), indent=1)
    text = re.sub(r"\[\n\s*([^][{}]*?)\n\s*\]", lambda row: "[" + re.sub(r"\n\s*", " ", row[1]) + "]", text)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


# --- Pictures ---------------------------------------------------------------------------------------------------------

# One colour and marker per encoding in all pictures. The smallest distance between two of the colours is 20 (CIEDE2000)
# as seen with deuteranopia, 26 with normal vision.
STYLES = {
    "rope": ("#a42100", "o"), "hope": ("#2664f0", "s"), "prope": ("#ffb906", "D"), "nope": ("#000000", "x"),
    "learned": ("#85bffa", "v"), "sinusoidal": ("#8e7a8f", "^"), "alibi": ("#47ddbc", "P"), "t5": ("#92935b", "X"),
    "kerple": ("#1b564f", "<"), "fire": ("#3f016f", ">")}


def import_pyplot():
    """matplotlib.pyplot, for files only. Raises ImportError with the remedy."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # no window, no display
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    pyplot.rcParams.update({"font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.25})
    return pyplot


def styles(runs):
    """Runs with a "pe" each -> colour, marker and line style of each, by encoding.

    Several runs of one encoding share its colour and differ in line style."""
    lines, count, found = ("-", "--", ":", "-."), {}, []
    for run in runs:
        i = count[run["pe"]] = count.get(run["pe"], -1) + 1
        color, marker = STYLES.get(run["pe"], ("#666666", "*"))
        found.append({"color": color, "marker": marker, "linestyle": lines[i % len(lines)]})
    return found


def label_ends(axes, lines):
    """Name lines at the right edge of their panel instead of in a legend. lines: (last value, name, colour), from the
    top; names that would overlap move apart, within the panel if there is room."""
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = [to_panel.transform((axes.get_xlim()[1], value))[1] for value, _, _ in lines]
    for i in range(1, len(lines)):
        heights[i] = min(heights[i], heights[i - 1] - 0.06)
    lowest = -0.06
    for (_, name, color), height in reversed(list(zip(lines, heights))):
        lowest = max(height, lowest + 0.06)
        axes.annotate(f" {name}", (1, lowest), xycoords="axes fraction", va="center", color=color, weight="bold")


def save_picture(figure, path):
    """Write a picture. A palette of 256 colours makes a .png a third as large."""
    figure.savefig(path, dpi=110)
    import_pyplot().close(figure)
    if Path(path).suffix == ".png":
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as image:
            image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
