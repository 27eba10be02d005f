"""
Runs that differ in their seed alone, as groups: means, standard deviations and paired differences over seeds.

A run is what the JSON of eval_extrapolation.py holds; a group has the same shape. experiments/sweep.py uses both.

Settings: a dict of the flags on which a run's result depends, fields of GPTConfig and of train.TrainConfig.
"""
import csv
import io
import json
import math
import statistics
from dataclasses import fields

from common import flags, report
from common.arrangements import name_of
from common.checkpoint import replacing
from model import GPTConfig

# --------------------------------------------------------------------------------------------------
# Which runs belong together

# Where a run computes and what it saves, but not what it computes.
NO_SETTING = ("out_dir", "resume", "vocab_size", "device", "compile", "log_interval", "save_interval", "save_minutes",
              "keep_every")
IN_THE_NAME = ("pe", "local_pe", "window_pattern", "window")  # of an arrangement, see name_of
DERIVED = ("min_lr", "lr_decay_iters")  # follow from another flag, unless they are given


def network_of(settings):
    return GPTConfig(**{knob.name: settings[knob.name] for knob in fields(GPTConfig)
                        if settings.get(knob.name) not in (None, "auto")})  # of rope_factor


def without_effect(settings):
    """The names of those settings of a run that change nothing."""
    return flags.idle(network_of(settings), settings.get("optimizer"))


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
    """A name and a flag by which groups differ -> a longer name. Scalings are named as eval_extrapolation.py does."""
    if flag in ("rope_scaling", "attn_scaling"):
        return name if value == "none" else f"{name} {value}"
    return f"{name} {flag} " + (f"{value:g}" if isinstance(value, float) else str(value))


# --------------------------------------------------------------------------------------------------
# Averages over seeds


def over_seeds(name, values):
    """Values of the runs of a group -> {name: mean, name_std: standard deviation}, None if a run has no value."""
    if None in values:
        return {name: None, f"{name}_std": None}
    return {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}


def paired(name, differences):
    """Differences of pairs of values -> {name: mean, name_stderr: its standard error}, None if there are none."""
    if not differences or None in differences:
        return {name: None, f"{name}_stderr": None}
    mean, stderr = report.mean_and_stderr(differences)
    return {name: mean, f"{name}_stderr": None if math.isnan(stderr) else stderr}


def run_settings(args, config):
    """The flags of a run and its network, as dicts -> its settings."""
    return {name: value for name, value in args.items() if name not in NO_SETTING} | config


def members_by_group(runs, settings):
    """Runs and the settings of each -> [(name, [(run, settings), ...])], a group of runs that differ in their seed
    alone each."""
    members = {}
    for run, its in zip(runs, settings):
        members.setdefault(group_key(its), []).append((run, its))
    return list(zip(group_names([group[0][1] for group in members.values()]), members.values()))


def group_by_seed(runs):
    """Runs, as the JSON of eval_extrapolation.py holds them -> groups of runs that differ in their seed alone.

    A group has the keys of a run, without "seed" but with "seeds", and its buckets those of a run's, as means with the
    standard deviation over seeds (ppl_std) or, for differences, the standard error (nll_above_first_stderr, from the
    first group, paired by seed; nll_above_local_stderr, full context from cropped). A run that was scored with several
    scalings belongs to as many groups. Raises ValueError if two runs of a group have the same seed, or if the runs were
    not scored on the same tokens.
    """
    scored = {(run.get("dataset_sha256"), run["windows"], *(bucket["end"] for bucket in run["buckets"]))
              for run in runs}
    if len(scored) > 1:
        raise ValueError("the runs were scored on different texts, or with another --windows or --max_factor: score "
                         "them in one command")
    scalings = ("rope_scaling", "rope_factor", "attn_scaling")
    settings = [run_settings(run.get("args", {}), run["config"] | {name: run[name] for name in scalings})
                for run in runs]
    members = [(name, [{**run, "args": its} for run, its in group]) for name, group in members_by_group(runs, settings)]
    first, groups = members[0][1], []
    for name, group in members:
        seeds = [run["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(", ".join(run["name"] for run in group) + " have the same flags, and two of them the same "
                             "seed: leave one out")
        groups.append({
            "name": name, "pe": group[0]["pe"], "block_size": group[0]["block_size"], "seeds": seeds,
            **over_seeds("val_loss", [run.get("val_loss") for run in group]), "parameters": group[0].get("parameters"),
            **over_seeds("minutes", [run.get("minutes") for run in group]),
            "args": {key: value for key, value in group[0]["args"].items() if key != "seed"},
            "buckets": [mean_bucket(group, first, i) for i in range(len(group[0]["buckets"]))],
            **({"recall": mean_recall(group)} if "recall" in group[0] else {})})
    return groups


def mean_bucket(group, first, i):
    """Bucket i of the runs of a group and of those of the first group -> the group's bucket."""
    def values(key, runs=group):
        return [run["buckets"][i][key] for run in runs]

    bucket = {key: group[0]["buckets"][i][key] for key in ("start", "end")}
    for key in ("nll", "ppl", "ppl_local", "bits_per_character"):
        bucket |= over_seeds(key, values(key))
    if bucket["nll"] is None:
        return {**bucket, **paired("nll_above_first", []), **paired("nll_above_local", [])}
    nll_of_first = dict(zip((run["seed"] for run in first), values("nll", first)))
    bucket |= paired("nll_above_first", [nll - nll_of_first[run["seed"]] for nll, run in zip(values("nll"), group)
                                         if nll_of_first.get(run["seed"]) is not None])
    return bucket | paired("nll_above_local", [nll - math.log(local) for nll, local in
                                               zip(values("nll"), values("ppl_local"))])


def mean_recall(group):
    """-> for each distance the loss that the first reading of a passage saves on the second."""
    return [{"distance": buckets[0]["distance"], **over_seeds("gain", [bucket["gain"] for bucket in buckets])}
            for buckets in zip(*(run["recall"] for run in group)) if None not in buckets]


# --------------------------------------------------------------------------------------------------
# Report


def cell(row, key, digits, error="std"):
    return report.format_cell(row[key], row[f"{key}_{error}"], digits)


def print_groups(groups):
    rows = {group["name"]: [cell(group, "val_loss", 4), " ".join(map(str, group["seeds"])),
                            f"{group['parameters']:,}" if group["parameters"] else "-", cell(group, "minutes", 1)]
            for group in groups}
    report.print_table("lowest validation loss, ± standard deviation over seeds",
                       ["loss", "seeds", "parameters", "minutes"], rows)
    columns = [f"[{bucket['start']:,}, {bucket['end']:,})" for bucket in groups[0]["buckets"]]
    for key, digits, error, shown, title in (
            ("ppl", 2, "std", groups, "perplexity by position, ± standard deviation over seeds"),
            ("ppl_local", 2, "std", groups, "perplexity of the same tokens from at most L tokens of context"),
            ("nll_above_local", 3, "stderr", groups, "loss with the full context above loss with at most L tokens, in "
             "nats per token, ± standard error over seeds"),
            ("nll_above_first", 3, "stderr", groups[1:], f"loss above that of {groups[0]['name']} in nats per token, "
             "paired by seed, ± standard error over seeds")):
        if shown:
            report.print_table(title, columns, {group["name"]: [cell(b, key, digits, error) for b in group["buckets"]]
                                                for group in shown})
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
