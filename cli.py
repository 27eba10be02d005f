"""What the scripts share: flags with @config files, errors of one line, the choice of device and of number format."""
import argparse
import difflib
import importlib.util
import math
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

PICTURES = (".png", ".pdf", ".svg")                       # what --plot can write


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Each flag with its default, where it has one that says something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reads arguments from a file with `@FILE` (# starts a comment) and fails in one line."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=HelpFormatter)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            self.error(f"unknown argument {unknown[0]!r}: {hint}--help lists all")
        for name, value in vars(args).items():
            if value == "":
                self.error(f"--{name} is empty: give it a value or leave it out")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low=None, high=None):
    """A `type=` for argparse: a finite int or float inside [low, high]; all else is refused with the range."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        inside = value is not None and math.isfinite(value)
        inside = inside and (low is None or low <= value) and (high is None or value <= high)
        if not inside:
            words = {int: "a whole number", float: "a number"}[kind]
            bounds = " and ".join([f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None))
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}{' of ' * bool(bounds)}{bounds}")
        return value
    return parse


def check_output(path, suffixes=None):
    """Whether a file can be written at path, asked before the work is done. Raises ValueError where it can not."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path} to: make it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be written: name another")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: pictures can be written as {', '.join(suffixes)}")


def lock(path, wait):
    """Open a file for this process alone, until it is closed. Another one waits, or gets a BlockingIOError."""
    file = open(path, "a")
    try:
        import fcntl  # not on Windows, where nobody stands guard

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    return file


def write_text(path, text):
    """Write a file beside its place, then rename: what stands there is whole, the old one or the new one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def run(main):
    """Call main() and turn a failure into one line on stderr and an exit code.

    2: the command, or a file that it names, has to change (ValueError, a file that is not there or no file).
    1: it was right and failed on the way (OSError, RuntimeError, a missing package). 130: Ctrl-C.
    Anything else is a defect of this project and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                               # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError,
                                         NotADirectoryError)) else 1)


def add_device_arguments(parser):
    add = parser.add_argument_group("where and in which number format it runs").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...; auto takes the best there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the matrix products; auto: bfloat16 on GPUs that have it, float16 on older ones, float32 elsewhere, "
             "but for training at width 256 and more on CPUs that multiply bfloat16")


def add_scaling_arguments(parser, **several):
    """--rope_scaling, --rope_factor, --attn_scaling; nargs="+" lets a script compare several values."""
    add = parser.add_argument_group("past the trained context, without training").add_argument
    none = ["none"] if several else "none"
    add("--rope_scaling", default=none, choices=["none", "pi", "ntk", "yarn"], **several,
        help="slow the turning pairs of rope, prope and hope down")
    add("--rope_factor", default="auto", type=lambda text: text if text == "auto" else number(float, 1)(text),
        help="how many trained contexts are to look like one; auto: as many as there are")
    add("--attn_scaling", default=none, choices=["none", "logn"], **several,
        help="logn: multiply the logits of the n-th query by ln n / ln L past L")


def pick_device(name):
    """--device -> torch.device. Raises ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: each process has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: there is no such device here; use --device auto or --device cpu") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                     # so that what asks for the current GPU gets this one
    return device


def device_name(device):
    """How results name their device: a GPU's own name, or how many threads a CPU gave."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


def pick_dtype(name, device, training_width=0):
    """--dtype -> torch.dtype. A CPU gets bfloat16 only to train wide models: narrow ones gain little from it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and training_width >= 256 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return torch.bfloat16
    return torch.float32


def pick_compile(choice, device):
    """--compile, --no-compile or neither (None) -> bool. By itself only where Triton can make kernels for the GPU."""
    if choice is not None or device.type != "cuda":
        return bool(choice)
    # Triton builds what launches a kernel in C, against Python's headers
    compiler = any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang")))
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()
    return (importlib.util.find_spec("triton") is not None and compiler and headers
            and torch.cuda.get_device_capability(device) >= (7, 0))  # its oldest: Volta


def autocast(device, dtype):
    """Matrix products in dtype, sums and norms in float32; nothing at all for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
