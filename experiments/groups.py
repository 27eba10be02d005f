"""
Tables of runs: names of networks, runs that differ in their seed alone, means over seeds.

In flags and tables an arrangement names the layers of a network in one word:

    hope               HoPE in all layers
    hope:SSSL:16       the same; three of four layers (S) see the last 16 tokens only
    nope+rope:SSSL:16  no encoding in the full layers (L), RoPE in the short-window layers (S)
    nope+rope:SSSL:0   the same without windows

Scores are one pandas.DataFrame with a row per run and range of positions. Its columns are the run's
flags, "run" (its index), "name" (that of its group), what was measured for the run (val_loss,
minutes) and for the range (start, end, nll, ppl, ppl_local, ...).
"""
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd

from common.flags import without_effect
from model import PE, GPTConfig

# --- Names ----------------------------------------------------------------------------------------


def fields_of(text):
    """PE, PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW -> the fields of GPTConfig that it sets.

    Raises ValueError."""
    found = re.fullmatch(r"(\w+)(?:(?:\+(\w+))?:([SL]+):(\d+))?", text)
    if not found or {found[1], found[2] or "nope"} - set(PE):
        raise ValueError(f"--pe {text} is not an arrangement of layers: write PE, "
                         "PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW, such as "
                         f"nope+rope:SSSL:16, with the encodings {', '.join(PE)}")
    pe, local_pe, pattern, window = found.groups()
    if not pattern:
        return {"pe": pe}
    return {"pe": pe, "local_pe": local_pe, "window_pattern": pattern, "window": int(window)}


def name_of(config):
    """A GPTConfig -> the text that fields_of reads."""
    if "S" not in config.kinds():
        return config.pe
    local = f"+{config.local_pe}" if config.local_pe not in (None, config.pe) else ""
    return f"{config.pe}{local}:{config.window_pattern}:{config.window}"


def in_words(name):
    """The name of a group, for readers: as README.md names the demo's networks."""
    for flags, words in {"nope+rope:SSSL:16": "windows", " bias True qkv_bias True": ", all biases",
                         " bias False": "", " qkv_bias False": "", " qkv_bias True": ", QKV biases",
                         " logn": ", log-n"}.items():
        name = name.replace(flags, words)
    return name


# --- Settings: {flag: value} ----------------------------------------------------------------------

# Where a run computes and what it saves, but not what it computes.
NO_SETTING = ("out_dir", "resume", "device", "compile", "log_interval", "sample_chars",
              "save_interval", "save_minutes", "keep_every")
# Those and what name_of says are not added to the name of a group.
NOT_IN_NAMES = (*NO_SETTING, "pe", "local_pe", "window_pattern", "window", "seed")
SCALING_FLAGS = ("rope_scaling", "rope_factor", "attn_scaling")  # set by the evaluation
FOLLOWERS = ("min_lr", "lr_decay_iters")  # of learning_rate and max_iters, unless they are given


def network_of(settings):
    """Settings, those of an older run too -> GPTConfig. A rope_factor of "auto" counts as none."""
    return GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig)
                        if settings.get(field.name) not in (None, "auto")})


def settings_of(run):
    """A scored run -> the flags on which its scores depend; None for one without effect."""
    settings = run["args"] | run["config"] | {name: run[name] for name in SCALING_FLAGS}
    network = network_of(settings)
    settings, idle = asdict(network) | settings, without_effect(network)  # an older run lacks some
    return {name: None if name in idle else value for name, value in settings.items()
            if name not in NO_SETTING}


def with_flag(name, flag, value):
    """A name and a flag by which runs differ -> a longer name. Scalings are named as
    eval_extrapolation.py does."""
    if value is None or (flag in SCALING_FLAGS and value == "none"):
        return name
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return f"{name} {text}" if flag in ("rope_scaling", "attn_scaling") else f"{name} {flag} {text}"


def group_names(settings):
    """Settings of runs -> a name for each, of its layers and of flags by which the runs differ.

    Those that differ in their seed alone have the same name."""
    names = [name_of(network_of(its)) for its in settings]
    every = dict.fromkeys(flag for its in settings for flag in its)
    for flag in sorted(every, key=lambda flag: flag in FOLLOWERS):
        longer = [with_flag(name, flag, its.get(flag)) for name, its in zip(names, settings)]
        if flag not in NOT_IN_NAMES and len(set(longer)) > len(set(names)):
            names = longer
    return names


# --- Scores ---------------------------------------------------------------------------------------


def read_runs(paths):
    """JSON files -> all runs in them. Raises ValueError if one holds no scored runs."""
    runs = []
    for path in paths:
        found = json.loads(Path(path).read_text(encoding="utf-8")).get("runs")
        if not found or "buckets" not in found[0]:
            raise ValueError(f"{path} holds no scores: name a file that eval_extrapolation.py "
                             "--json or a sweep has written")
        runs += found
    return runs


def scores_of(runs):
    """Runs, as the JSON of eval_extrapolation.py holds them -> the table of their scores.

    nll_above_first is the difference from the first group, paired by seed, and nan for a seed that
    is not there; nll_above_local that of the full context from at most the last L tokens.
    Raises ValueError if they were not scored on the same tokens, or if two are the same run."""
    if len({(run["dataset_sha256"], run["windows"], *(bucket["end"] for bucket in run["buckets"]))
            for run in runs}) > 1:
        raise ValueError("the runs were scored on different texts, or with another --windows, "
                         "--max_factor or --block_size: score them in one command")
    settings = [settings_of(run) for run in runs]
    scores = pd.DataFrame([
        its | {"name": name, "run": i, "val_loss": run.get("val_loss"),
               "minutes": run.get("minutes")} | bucket
        for i, (run, its, name) in enumerate(zip(runs, settings, group_names(settings)))
        for bucket in run["buckets"]])
    if (twice := scores.duplicated(["name", "seed", "start"])).any():
        name, seed = scores.loc[twice, ["name", "seed"]].iloc[0]
        raise ValueError(f"two runs of {name} have the same flags and seed {seed}: leave one out")
    scores["nll_above_local"] = scores["nll"] - np.log(scores["ppl_local"])
    first = scores.loc[scores["name"] == scores["name"][0], ["seed", "start", "nll"]]
    paired = scores.merge(first, "left", ["seed", "start"], suffixes=("", "_first"))
    scores["nll_above_first"] = paired["nll"] - paired["nll_first"]
    return scores


def over_seeds(scores, by, errors):
    """Scores -> a table with a row per group of rows that agree in the columns `by`.

    errors: {column: "std" or "stderr"}; each gets the column's mean, and column_std or
    column_stderr, its standard deviation or standard error (nan for a single value)."""
    groups = scores.groupby(by, sort=False, dropna=False)
    means = groups[list(errors)].mean()
    for column, error in errors.items():
        means[f"{column}_{error}"] = groups[column].agg("sem" if error == "stderr" else "std")
    return means


def without_nan(table):
    """A DataFrame or Series -> the same with None for nan, for JSON."""
    return table.astype(object).where(table.notna(), None)
