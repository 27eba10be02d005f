"""
Command-line flags, made from the fields of a dataclass or read from @FILE; an error is one line.

    parser = ArgumentParser("What the script does.")
    add_flags(parser, GPTConfig, "rope_scaling", "attn_scaling")    fields of a dataclass, made by model.setting
    parser.add_argument("--windows", type=parsed(int, at_least=1), default=32, help="...")
"""
import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
import typing
from pathlib import Path

from model import GPTConfig, check_value

PROJECT = Path(__file__).resolve().parent.parent


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Each flag with its default, unless that says nothing (None, or False for a switch)."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reads flags from a file with @FILE (# starts a comment) and fails in one line.

    hints: flags that do not exist, or "--flag value", -> what to do instead."""

    def __init__(self, description, hints=None):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=HelpFormatter)
        self.hints = hints or {}

    def convert_arg_line_to_args(self, line):
        return map(located, shlex.split(line, comments=True))

    def parse_args(self, args=None, namespace=None):
        args = list(map(located, sys.argv[1:] if args is None else args))
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.explain(unknown[0].split("=")[0]))
        for name, value in vars(args).items():
            if value == "":
                self.error(f"--{name} is empty: give it a value or leave it out")
            if f"--{name} {value}" in self.hints and not Path(value).exists():
                self.error(f"there is no --{name} {value} here: {self.hints[f'--{name} {value}']}")
        return args

    def explain(self, name):
        """An argument that does not exist -> what may have been meant."""
        if name in self.hints:
            return f"there is no {name} here: {self.hints[name]}"
        if Path(located(f"@{name}")[1:]).is_file():
            return f"unknown argument {name!r}: a file of flags is given as @{name}"
        close = difflib.get_close_matches(name, self._option_string_actions, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"unknown argument {name!r}: {hint}--help lists all"

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def located(arg):
    """@config/NAME is a file relative to the current folder or, if there is none, to the project's."""
    known = arg.startswith("@") and not Path(arg[1:]).exists() and (PROJECT / arg[1:]).exists()
    return f"@{PROJECT / arg[1:]}" if known else arg


class Switch(argparse.Action):
    """--name, --no-name, --name=True and --name=False, for the values True and False."""

    def __init__(self, option_strings, dest, **options):
        names = [option_strings[0], option_strings[0].replace("--", "--no-", 1)]
        super().__init__(names, dest, nargs="?", metavar="True|False", **options)

    def __call__(self, parser, namespace, value, option):
        words = {"true": True, "1": True, "false": False, "0": False}
        if value is not None and value.lower() not in words:
            parser.error(f"{option} takes True or False, or no value, not {value!r}")
        on = value is None or words[value.lower()]
        setattr(namespace, self.dest, on != option.startswith("--no-"))


def parsed(kind, **limits):
    """A `type=` for argparse: text -> str, int or finite float within limits such as at_least=1."""
    def parse(text):
        try:
            value = kind(text)
            if kind is float and not math.isfinite(value):
                raise ValueError
        except ValueError:
            words = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        try:
            check_value(value, limits)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value
    return parse


def add_flags(parser, config, *names, **changes):
    """Add a flag for each field of a dataclass, or for those named.

    changes: options of add_argument that replace what the field says, as nargs="+"."""
    for field in dataclasses.fields(config):
        if names and field.name not in names:
            continue
        # int | None, for a value that need not be given, is parsed as int
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        limits = field.metadata["limits"]
        if kind is bool:
            options = {"action": Switch}
        elif "one_of" in limits:
            options = {"choices": list(limits["one_of"]), "metavar": field.name.upper()}
        else:
            options = {"type": parsed(kind, **limits)}
        choices = limits.get("one_of", ())
        words = "; ".join(map(summary, choices.items())) if choices and field.name == "pe" else ", ".join(choices)
        options |= {"default": field.default, "help": f"{field.metadata['help']}{': ' * bool(words)}{words}", **changes}
        parser.add_argument(f"--{field.name}", **options)


def summary(row):
    """A name and its class -> "name: the first sentence of its docstring", without the source in parentheses."""
    text = re.sub(r"\s*\([^()]*(arXiv|GPT-2)[^()]*\)", "", " ".join((row[1].__doc__ or "").split()))
    return f"{row[0]}: {text.partition('. ')[0].rstrip('.')}"


def add_scaling_flags(parser, several=False):
    """--rope_scaling, --rope_factor, --attn_scaling; several: --rope_scaling and --attn_scaling take several values."""
    group = parser.add_argument_group("beyond the trained context, without training")
    changes, factor = {"nargs": "+"} if several else {}, parsed(float, at_least=1)
    changes |= {"default": None}
    add_flags(group, GPTConfig, "rope_scaling", "attn_scaling", **changes)  # None: as in training
    add_flags(group, GPTConfig, "rope_factor", default="auto", help="how many trained contexts should look like one; "
              "auto: as many as there are", type=lambda text: text if text == "auto" else factor(text))


def note_idle_factor(args):
    """Tell that a --rope_factor was given without a --rope_scaling that uses it."""
    if args.rope_factor != "auto" and args.rope_scaling in (None, "none", ["none"]):
        print("note: --rope_factor has no effect without --rope_scaling")


def idle(config, optimizer=None):
    """Names of the flags that have no effect with a GPTConfig and an optimizer, as hope_cutoff with pe rope."""
    short = "S" in config.kinds()
    encodings = {config.pe, config.local_pe if short else None}
    names = {field.name for field in dataclasses.fields(config)
             if field.metadata["used_by"] and not encodings.intersection(field.metadata["used_by"])}
    if not short:
        names |= {"window_pattern", "window", "local_pe", "local_rope_base"}
    if config.rope_scaling == "none":
        names |= {"rope_factor"} | (set() if "hope" in encodings else {"rope_context"})  # HoPE's cut follows from it
    if optimizer == "adamw":
        names |= {"muon_learning_rate", "muon_momentum"}
    return names


def run(main):
    """Call main(). Turn a failure into one line on stderr and an exit code.

    2: the command, or a file that it names, has to change (ValueError, a missing file).
    1: it was correct and failed later (OSError, RuntimeError, a missing package). 130: Ctrl-C.
    Any other exception is a defect of this project and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console of Windows may not have all characters
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        wrong_command = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
        sys.exit(2 if isinstance(error, wrong_command) else 1)
