"""
What scripts show: tables, JSON files, pictures, means with their standard errors.
"""
import json
import math
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from common.checkpoint import replacing
from common.flags import idle
from model import RoPE

PICTURES = (".png", ".pdf", ".svg")

# --------------------------------------------------------------------------------------------------
# Numbers


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


def print_model(model):
    """Print the size of a GPT, its encoding, and which pairs of channels a rotary one rotates."""
    config, pe = model.config, model.transformer.wpe
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"network   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}: {size / 1e6:.2f} M "
          "parameters")
    print(f"encoding  {config.pe}, trained context L = {config.block_size} tokens")
    if isinstance(pe, RoPE):
        wavelengths = (2 * math.pi / pe.theta).tolist()
        n_pairs = config.n_embd // config.n_head // 2
        same = {0: ": this is NoPE", n_pairs: ": this is RoPE"}.get(len(wavelengths), "") if config.pe != "rope" else ""
        print(f"          {len(wavelengths)} of {n_pairs} pairs of channels rotate in each head{same}; tokens per "
              "turn: " + " ".join(f"{tokens:,.{int(tokens < 20)}f}" for tokens in wavelengths))
    if "S" in config.kinds():
        local = config.local()
        print(f"          layers {config.kinds()}: S layers have {local.pe} and see "
              + (f"{config.window} tokens" if config.window else "everything"))


def describe_run(run, taken=None):
    """Print what is about to happen, so that a wrong flag is noticed before the training."""
    config, n_train, network = run.config, len(run.ids["train"]), run.model.config
    print_model(run.model)
    changed = {knob.name for settings in (network, config) for knob in fields(settings)
               if getattr(settings, knob.name) != knob.default}
    if without_effect := sorted(changed & idle(network, config.optimizer)):
        print(f"note      no effect on this run: {', '.join(f'--{name}' for name in without_effect)}")
    print(f"text      {config.dataset}: {n_train:,} tokens to train on, {len(run.ids['val']):,} to validate on; "
          f"sha256 {run.meta['sha256'][:16]}")
    total = run.tokens_per_step * config.max_iters
    print(f"training  {config.max_iters:,} steps of {run.tokens_per_step:,} tokens: {total / 1e6:.1f} M, "
          f"{total / n_train:.2g} x the text")
    print(f"device    {run.place}, {str(run.place.dtype).removeprefix('torch.')}, seed {config.seed}"
          + ", compiled: the first step takes a minute" * run.compiled)
    if taken:
        same, new, dropped = taken
        print(f"weights   {len(same)} tensors from {config.init_from}; new: {', '.join(new) or 'none'}; left out: "
              f"{', '.join(dropped) or 'none'}")
    if run.iter:
        print(f"resuming  after step {run.iter:,}")
        if config.max_iters > run.iter >= config.lr_decay_iters:
            print(f"note      the schedule ended at step {config.lr_decay_iters:,}: the learning rate stays at its "
                  "minimum")


def show_progress(run, bar):
    """Losses and speed in the progress bar."""
    if run.train_loss is not None:
        val = {} if run.val_loss is None else {"val": f"{run.val_loss:.3f}"}
        rate = (bar.format_dict["rate"] or 0) * run.tokens_per_step
        bar.set_postfix(loss=f"{run.train_loss.item():.3f}", **val, tokens_per_s=f"{rate:,.0f}", refresh=False)


def describe_result(run, stopped):
    """Print how a run has ended and what to do next."""
    out_dir = run.config.out_dir
    if stopped:
        print(f"stopped after step {run.iter:,}, everything is saved; continue with: python train.py --resume "
              f"--out_dir {out_dir}")
        return
    print(f"lowest validation loss {run.best_val_loss:.4f} nats per token; {(time.time() - run.started) / 60:.1f} "
          f"minutes; saved in {out_dir}")
    print(f"score it beyond the trained context:  python eval_extrapolation.py {out_dir}")
    print(f"read what it writes:                  python sample.py --out_dir {out_dir}")


# --------------------------------------------------------------------------------------------------
# Files


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
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file that can be written: choose another name")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: pictures can be written as {', '.join(suffixes)}")


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
    result = {"command": " ".join(["python", script, *sys.argv[1:]]), "torch": torch.__version__, **result}
    text = json.dumps(rounded(result, digits), indent=1)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


# --------------------------------------------------------------------------------------------------
# Pictures

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

    Several runs of one encoding share its colour and differ in line style.
    """
    lines, count, found = ("-", "--", ":", "-."), {}, []
    for run in runs:
        i = count[run["pe"]] = count.get(run["pe"], -1) + 1
        color, marker = STYLES.get(run["pe"], ("#666666", "*"))
        found.append({"color": color, "marker": marker, "linestyle": lines[i % len(lines)]})
    return found


def save_picture(figure, path):
    """Write a picture. A palette of 256 colours makes a .png a third as large."""
    figure.savefig(path, dpi=110)
    import_pyplot().close(figure)
    if Path(path).suffix == ".png":
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as image:
            image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
