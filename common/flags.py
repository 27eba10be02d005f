"""
Command-line flags, made from the fields of a dataclass or read from @FILE; an error is one line.

    parser = ArgumentParser("What the script does.")
    add_flags(parser, GPTConfig, "rope_scaling", "attn_scaling")    fields of a dataclass, made by model.setting
    parser.add_argument("--windows", type=parsed(int, at_least=1), default=32, help="...")
"""
import argparse
import dataclasses
import difflib
import errno
import math
import os
import re
import shlex
import shutil
import sys
import typing
from contextlib import suppress
from pathlib import Path

from common.device import is_out_of_memory
from model import ROTARY, GPTConfig, check_value

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
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.hints = hints or {}

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.expand(sys.argv[1:] if args is None else args), namespace)

    def expand(self, args, files=()):
        """Put the words of each @FILE in its place, unless it is the value of a flag, as in --start "@property"."""
        words = []
        for arg in args:
            before = self._option_string_actions.get(words[-1]) if words else None
            wants_value = before is not None and before.nargs in (None, "+")
            if wants_value and before.nargs is None and re.match("-(?!-[a-z])", arg):  # --start "-x": no flag either
                words[-1] += f"={arg}"
            elif arg.startswith("@") and not wants_value:
                words += self.expand(self.words_in(located(arg)[1:], files), [*files, located(arg)[1:]])
            else:
                words.append(arg)
        return words

    def words_in(self, path, files):
        """The words of a file of flags. A backslash is an ordinary character, as paths of Windows have them."""
        try:
            if path in files:
                raise ValueError("it reads itself")
            lexer = shlex.shlex(Path(path).read_text(encoding="utf-8-sig"), posix=True)
            lexer.whitespace_split, lexer.escape = True, ""
            return list(lexer)
        except (OSError, ValueError) as error:
            self.error(f"@{path} cannot be read as a file of flags in UTF-8: {describe(error)}")

    def parse_args(self, args=None, namespace=None):
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
        limits, choices = field.metadata["limits"], field.metadata["limits"].get("one_of", ())
        if kind is bool:
            options = {"action": Switch}
        elif choices:
            options = {"choices": list(choices), "metavar": field.name.upper()}
        else:
            options = {"type": parsed(kind, **limits)}
        words = "; ".join(map(summary, choices.items())) if field.name == "pe" else ", ".join(choices)
        help = ": ".join(filter(None, (", ".join(field.metadata["used_by"]), field.metadata["help"], words)))
        options |= {"default": field.default, "help": help, **changes}
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
    add_flags(group, GPTConfig, "rope_factor", default="auto", help="how many times longer than the trained context "
              "the text is; auto: computed from its length", type=lambda text: text if text == "auto" else factor(text))


def note_idle_factor(args):
    """Tell that a --rope_factor was given without a --rope_scaling that uses it."""
    if args.rope_factor != "auto" and args.rope_scaling in (None, "none", ["none"]):
        print("note: --rope_factor has no effect without --rope_scaling")


def idle(config, optimizer=None):
    """Names of the flags that have no effect with a GPTConfig and an optimizer, as hope_cutoff with pe rope."""
    short = "S" in config.kinds()
    kinds = [config, config.local()] if short else [config]
    encodings, last = {kind.pe for kind in kinds}, kinds[-1]
    alike = config.window == 0 and (last.pe, last.rope_base) == (config.pe, config.rope_base)  # all layers
    scaled = any(kind.rope_scaling != "none" and kind.pe in ROTARY for kind in kinds)
    without_effect = {
        "window_pattern": not short or alike, "window": not short, "local_pe": not short,
        "local_rope_base": not short or last.pe not in ROTARY,
        "rope_base": short and config.local_rope_base and config.pe not in ROTARY,
        "rope_scaling": not scaled, "rope_factor": not scaled,
        "rope_context": not scaled and "hope" not in encodings,  # HoPE's cut follows from it
        "muon_learning_rate": optimizer == "adamw", "muon_momentum": optimizer == "adamw"}
    return {name for name, idle in without_effect.items() if idle} | {
        field.name for field in dataclasses.fields(config)
        if field.metadata["used_by"] and not encodings.intersection(field.metadata["used_by"])}


def command(script, *arguments):
    """A command of this project as a user can paste it into a shell, from the folder and with the Python of now."""
    activated = Path(shutil.which("python") or "").parent == Path(sys.executable).parent
    path = script if Path.cwd() == PROJECT else PROJECT / script
    return shlex.join(map(str, ["python" if activated else sys.executable, path, *arguments]))


# --- Running a script -------------------------------------------------------------------------------------------------

REMEDIES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.ENOENT: "check the path",
            errno.EACCES: "change its permissions or choose another path",
            **dict.fromkeys((errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR), "choose another path")}


class Output:
    """stdout or stderr, of which a failure does not end the work: after the first OSError it goes to os.devnull."""

    def __init__(self, stream):
        self.stream, self.failure = stream or open(os.devnull, "w"), None  # None: closed with >&-
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")  # a console of Windows may not have all characters

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, *text, act="write"):
        try:
            getattr(self.stream, act)(*text)
        except OSError as error:
            self.failure = error
            error.filename = getattr(self.stream, "name", None)  # <stdout>
            with suppress(OSError), open(os.devnull, "w") as null:  # a stream that is no file raises OSError
                os.dup2(null.fileno(), self.stream.fileno())

    def flush(self):
        self.write(act="flush")


def describe(error):
    """An exception in one line; an OSError with its path, its cause and what to do."""
    if isinstance(error, OSError) and error.strerror:
        parts = error.filename, error.strerror, REMEDIES.get(error.errno)
        return ": ".join(str(part) for part in parts if part)
    return " ".join(str(error).split()) or type(error).__name__


def run(main, takes_memory=""):
    """Call main(). Turn a failure into one line on stderr and an exit code.

    2: the command, or a file that it names, has to change (ValueError, a missing file).
    1: it was correct and failed later (OSError, RuntimeError, a missing package). 130: Ctrl-C.
    Any other exception is a defect of this project and keeps its traceback.
    takes_memory: the flags to lower if there is too little."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
        out.flush()
        if out.failure and out.failure.errno not in (errno.EPIPE, errno.EIO):  # a reader or a terminal that has gone
            raise out.failure
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        pass
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        text = describe(error)
        if takes_memory and is_out_of_memory(error):
            text = f"out of memory: lower {takes_memory} ({text})"
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=err)
        wrong_command = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
        sys.exit(2 if isinstance(error, wrong_command) else 1)
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams
