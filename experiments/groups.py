"""
Groups of runs that differ in their seed alone: which runs belong together, what they are called, means over seeds.

In flags and tables an arrangement names the layers of a network in one word:

    hope               HoPE in all layers
    hope:SSSL:16       the same; three of four layers (S) see the last 16 tokens only
    nope+rope:SSSL:16  no encoding in the full layers (L), RoPE in the short-window layers (S)
    nope+rope:SSSL:0   the same without windows

Settings: a dict of the flags on which a run's result depends, fields of GPTConfig and of train.TrainConfig.
"""
import csv
import io
import json
import math
import re
import statistics
from dataclasses import fields

from common import flags, report
from common.checkpoint import replacing
from model import PE, GPTConfig

# --- Arrangements -----------------------------------------------------------------------------------------------------


def fields_of(text):
    """PE, PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW -> the fields of GPTConfig that it sets.

    Raises ValueError."""
    found = re.fullmatch(r"(\w+)(?:(?:\+(\w+))?:([SL]+):(\d+))?", text)
    if not found:
        raise ValueError(f"--pe {text} is not an arrangement of layers: write PE, PE:PATTERN:WINDOW or "
                         "PE+LOCAL_PE:PATTERN:WINDOW, such as nope+rope:SSSL:16")
    pe, local_pe, pattern, window = found.groups()
    for name in (pe, local_pe):
        if name and name not in PE:
            raise ValueError(f"--pe {text}: there is no encoding {name}, choose from {', '.join(PE)}")
    return {"pe": pe} | ({"local_pe": local_pe, "window_pattern": pattern, "window": int(window)} if pattern else {})


def name_of(config):
    """A GPTConfig -> the text that fields_of reads."""
    if "S" not in config.kinds():
        return config.pe
    local = f"+{config.local_pe}" if config.local_pe not in (None, config.pe) else ""
    return f"{config.pe}{local}:{config.window_pattern}:{config.window}"


IN_WORDS = {"rope": "RoPE", "hope": "HoPE", "prope": "p-RoPE", "nope": "NoPE", "alibi": "ALiBi", "t5": "T5",
            "kerple": "KERPLE", "fire": "FIRE"}


def in_words(name):
    """The name of a group, for pictures: hope:SSSL:16 logn -> HoPE, windows, logn; nope+rope:SSSL:16 -> NoPE in
    full layers, windows."""
    arrangement, *rest = name.split(maxsplit=1)
    pe, *windows = arrangement.split(":")
    full, *local = [IN_WORDS.get(part, part) for part in pe.split("+")]
    layers = f"{full} in full layers, windows" if local else f"{full}, windows" if windows else full
    return ", ".join([layers, *rest])


# --- Which runs belong together ---------------------------------------------------------------------------------------

# Where a run computes and what it saves, but not what it computes.
NO_SETTING = ("out_dir", "resume", "vocab_size", "device", "compile", "log_interval", "save_interval", "save_minutes",
              "keep_every")
IN_THE_NAME = ("pe", "local_pe", "window_pattern", "window")  # of an arrangement, see name_of
DERIVED = ("min_lr", "lr_decay_iters")  # follow from another flag, unless they are given


def network_of(settings):
    return GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig)
                        if settings.get(field.name) not in (None, "auto")})  # of rope_factor


def without_effect(settings):
    """The names of those settings of a run that change nothing."""
    return flags.idle(network_of(settings), settings.get("optimizer"))


def run_settings(args, config):
    """The flags of a run and its network, as dicts -> its settings."""
    return {name: value for name, value in args.items() if name not in NO_SETTING} | config


def group_key(settings):
    """What the runs of a group have in common, as text."""
    idle = without_effect(settings)
    return json.dumps({name: value for name, value in settings.items() if name != "seed" and name not in idle},
                      sort_keys=True)


def group_names(groups):
    """Settings of groups that all differ -> texts that tell them apart: the layers, and the flags that differ."""
    names = [name_of(network_of(group)) for group in groups]
    groups = [{name: value for name, value in group.items() if name not in without_effect(group)} for group in groups]
    every = dict.fromkeys(name for group in groups for name in group if name not in (*IN_THE_NAME, "seed"))
    for flag in sorted(every, key=lambda flag: flag in DERIVED):
        longer = [with_flag(name, flag, group[flag]) if flag in group else name for name, group in zip(names, groups)]
        if len(set(longer)) > len(set(names)):
            names = longer
    return names


def with_flag(name, flag, value):
    """A name and a flag by which runs differ -> a longer name. Scalings are named as eval_extrapolation.py does."""
    if flag in ("rope_scaling", "attn_scaling"):
        return name if value == "none" else f"{name} {value}"
    return f"{name} {flag} " + (f"{value:.10g}" if isinstance(value, float) else str(value))


def members_by_group(runs, settings):
    """Runs and the settings of each -> [(name, [(run, settings), ...])], a group of runs that differ in their seed
    alone each."""
    members = {}
    for run, its in zip(runs, settings):
        members.setdefault(group_key(its), []).append((run, its))
    return list(zip(group_names([group[0][1] for group in members.values()]), members.values()))


def seeds_of(runs):
    """The seeds of a group's runs. Raises ValueError if two are the same."""
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(", ".join(run["name"] for run in runs) + " have the same flags, and two of them the same "
                         "seed: leave one out")
    return seeds


# --- Means over seeds -------------------------------------------------------------------------------------------------


def over_seeds(key, values, error="std"):
    """The values of a group's runs -> {key: mean, key_std: standard deviation}, or with the standard error, key_stderr.

    The error is None for a single value; both are None if there is no value, or if a run has none."""
    if not values or None in values:
        return {key: None, f"{key}_{error}": None}
    spread = statistics.stdev(values) if len(values) > 1 else None
    if spread is not None and error == "stderr":
        spread /= math.sqrt(len(values))
    return {key: statistics.fmean(values), f"{key}_{error}": spread}


def mean_rows(parts):
    """The same rows of several runs, in lists and dicts -> their mean: a number with a standard error gets that over
    seeds. What is single stays as it is, and so does None."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, list):
        return [mean_rows(same) for same in zip(*parts)]
    if isinstance(first, dict):
        mean = {key: mean_rows([part[key] for part in parts]) for key in first}
        for key in first:
            if f"{key}_stderr" in first:
                mean |= over_seeds(key, [part[key] for part in parts], "stderr")
        return mean
    return first


def group_by_seed(runs):
    """Runs, as the JSON of eval_extrapolation.py holds them -> groups of runs that differ in their seed alone.

    A group has the keys of a run, without "seed" but with "seeds", and its buckets those of a run's, as means with the
    standard deviation over seeds (ppl_std) or, for differences, the standard error (nll_above_first_stderr, from the
    first group, paired by seed; nll_above_local_stderr, full context from cropped). A run that was scored with several
    scalings belongs to as many groups. Raises ValueError if two runs of a group have the same seed, or if the runs were
    not scored on the same tokens."""
    scored = {(run.get("dataset_sha256"), run["windows"], *(bucket["end"] for bucket in run["buckets"]))
              for run in runs}
    if len(scored) > 1:
        raise ValueError("the runs were scored on different texts, or with another --windows or --max_factor: score "
                         "them in one command")
    scalings = ("rope_scaling", "rope_factor", "attn_scaling")
    settings = [run_settings(run.get("args", {}), run["config"] | {name: run[name] for name in scalings})
                for run in runs]
    members = members_by_group(runs, settings)
    first = [run for run, _ in members[0][1]]
    return [mean_run(name, [run for run, _ in group], group[0][1], first) for name, group in members]


def mean_run(name, runs, settings, first):
    """The runs of a group, the settings of one, the runs of the first group -> the group."""
    return {"name": name, "pe": runs[0]["pe"], "block_size": runs[0]["block_size"], "seeds": seeds_of(runs),
            **over_seeds("val_loss", [run.get("val_loss") for run in runs]), "parameters": runs[0].get("parameters"),
            **over_seeds("minutes", [run.get("minutes") for run in runs]),
            "args": {key: value for key, value in settings.items() if key != "seed"},
            "buckets": [mean_bucket(runs, first, i) for i in range(len(runs[0]["buckets"]))],
            **({"recall": mean_recall(runs)} if "recall" in runs[0] else {})}


def mean_bucket(runs, first, i):
    """Bucket i of the runs of a group and of those of the first group -> the group's bucket."""
    rows, firsts = ({run["seed"]: run["buckets"][i] for run in group} for group in (runs, first))
    row = next(iter(rows.values()))
    bucket = {"start": row["start"], "end": row["end"]}
    for key in ("nll", "ppl", "ppl_local", "bits_per_character"):
        bucket |= over_seeds(key, [row[key] for row in rows.values()])
    above_first, above_local = [], []
    if bucket["nll"] is not None:
        above_first = [row["nll"] - firsts[seed]["nll"] for seed, row in rows.items()
                       if seed in firsts and firsts[seed]["nll"] is not None]
        above_local = [row["nll"] - math.log(row["ppl_local"]) for row in rows.values()]
    return {**bucket, **over_seeds("nll_above_first", above_first, "stderr"),
            **over_seeds("nll_above_local", above_local, "stderr")}


def mean_recall(runs):
    """-> for each distance the loss that the first reading of a passage saves on the second."""
    return [{"distance": rows[0]["distance"], **over_seeds("gain", [row["gain"] for row in rows])}
            for rows in zip(*(run["recall"] for run in runs)) if None not in rows]


# --- Tables -----------------------------------------------------------------------------------------------------------

TABLES = (  # key of a bucket, its error, digits, title
    ("ppl", "std", 2, "perplexity by position, ± standard deviation over seeds"),
    ("nll_above_local", "stderr", 3, "loss with the full context minus loss with the last L tokens, in nats per token, "
     "± standard error over seeds; negative: far tokens help"),
    ("ppl_local", "std", 2, "perplexity of the same tokens from at most L tokens of context"),
    ("nll_above_first", "stderr", 3, "loss minus that of {first}, in nats per token, paired by seed, ± standard error "
     "over seeds"))


def cell(row, key, digits, error="std"):
    return report.format_cell(row[key], row[f"{key}_{error}"], digits)


def print_groups(groups, all_tables=False):
    """Tables of the groups: two by position, or all four."""
    rows = {group["name"]: [cell(group, "val_loss", 4), " ".join(map(str, group["seeds"])),
                            f"{group['parameters']:,}" if group["parameters"] else "-", cell(group, "minutes", 1)]
            for group in groups}
    report.print_table("lowest validation loss, ± standard deviation over seeds",
                       ["loss", "seeds", "parameters", "minutes"], rows)
    columns = [f"[{bucket['start']:,}, {bucket['end']:,})" for bucket in groups[0]["buckets"]]
    for key, error, digits, title in TABLES if all_tables else TABLES[:2]:
        report.print_table(title.format(first=groups[0]["name"]), columns, {
            group["name"]: [cell(bucket, key, digits, error) for bucket in group["buckets"]] for group in groups})
    if all(group.get("recall") for group in groups):
        report.print_table("nats per token saved by having read the passage before, by distance, ± standard deviation",
                           [f"{row['distance']:,}" for row in groups[0]["recall"]],
                           {group["name"]: [cell(row, "gain", 3) for row in group["recall"]] for group in groups})


def write_csv(groups, path):
    """One row per group: its flags, and a column for each number."""
    rows = []
    for group in groups:
        row = {key: value for key, value in group.items() if key not in ("args", "buckets", "recall")}
        row |= {"seeds": " ".join(map(str, group["seeds"])), **group["args"]}
        for bucket in group["buckets"]:
            at = f"[{bucket['start']},{bucket['end']})"
            row |= {f"{key} {at}": value for key, value in bucket.items() if key not in ("start", "end")}
        for found in group.get("recall", ()):
            row |= {f"{key} at {found['distance']}": found[key] for key in ("gain", "gain_std")}
        rows.append(row)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        text.detach()
