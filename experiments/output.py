"""What the experiments share: where results go, and how they are written."""
import json
import re
import sys
from pathlib import Path

import cli
from eval_extrapolation import import_pyplot


def add_output_arguments(parser, pictures):
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", metavar="FILE.png", help=f"draw {pictures} (needs matplotlib)")
    cli.add_device_arguments(parser)


def check_outputs(args):
    """What would fail at the end is better known before the work. Raises ValueError or ImportError."""
    if args.plot:
        import_pyplot()
        cli.check_output(args.plot, cli.PICTURES)
    if args.json:
        cli.check_output(args.json)


def write_json(path, script, result):
    """result with the command in front, numbers to four digits, a row of numbers a line."""
    text = json.dumps({"command": " ".join(["python -m", script, *sys.argv[1:]]), **rounded(result)}, indent=1)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)
    cli.write_text(path, text + "\n")


def rounded(value):
    """Floats to four significant digits, nan to None (JSON knows no nan), through lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return value


def save_picture(figure, path):
    """Panels that nothing was drawn into are left out; a palette of 256 colours makes the file a third as large."""
    from PIL import Image  # comes with matplotlib

    for panel in figure.axes:
        panel.set_visible(panel.has_data())
    figure.savefig(path, dpi=80)
    import_pyplot().close(figure)
    if Path(path).suffix == ".png":
        with Image.open(path) as image:
            image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def run_names(paths):
    """The shortest ends of the paths that tell them apart, without .pt: out/rope, or out/rope/ckpt_000100."""
    for n in range(1, 10):
        names = [str(Path(*Path(path).with_suffix("").parts[-n:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)
