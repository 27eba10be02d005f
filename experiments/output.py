"""
What experiments have in common when they report: means over seeds, rounded numbers, pictures.
"""
import math

from common.report import mean_and_stderr
from experiments.groups import group_names, settings_of

# --- Numbers --------------------------------------------------------------------------------------


def names_of(checkpoints):
    """Checkpoints -> the name of each one's group, equal for those that differ in their seed alone:
    several steps of one run are no sample of seeds."""
    return group_names([settings_of(checkpoint | checkpoint["config"])
                        | {"iter": checkpoint["iter"]} for checkpoint in checkpoints])


def mean_over_seeds(runs, names, *keys):
    """Runs, each with its "name" and "seed", and the names of their groups -> for each group its
    name, its seeds, and the means of what the runs have under these keys."""
    groups = {}
    for run, name in zip(runs, names):
        groups.setdefault(name, []).append(run)
    return [{"name": name, "seeds": [run["seed"] for run in group],
             **mean_of([{key: run[key] for key in keys} for run in group])}
            for name, group in groups.items()]


def mean_of(parts):
    """Dicts and lists of the same form -> their mean: each number x that has an x_stderr, with its
    standard error over the parts. Other values are those of the first part; a single part stays."""
    first = parts[0]
    if len(parts) == 1 or not isinstance(first, dict | list):
        return first
    if isinstance(first, list):
        return [mean_of(same) for same in zip(*parts)]
    mean = {key: mean_of([part[key] for part in parts]) for key in first}
    for key in first:
        if f"{key}_stderr" in first:
            values = [part[key] for part in parts]
            mean[key], mean[f"{key}_stderr"] = mean_and_stderr(values)
    return mean


def rounded(value, digits):
    """Floats to so many significant digits, nan to None, through dicts and lists, for JSON."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}")
    return value


# --- Pictures -------------------------------------------------------------------------------------


def draw_line(panel, rows, x, y, error=None, **style):
    """Rows, as dicts -> a line of their values y over x, with a band of one error. Rows that have
    no y are left out."""
    known = [row for row in rows if row and row.get(y) is not None]
    at = [row[x] for row in known]
    panel.plot(at, [row[y] for row in known], **style)
    if error:
        low, high = ([row[y] + sign * (row[error] or 0) for row in known] for sign in (-1, 1))
        panel.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
