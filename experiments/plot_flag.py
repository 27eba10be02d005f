"""
What a flag does: perplexity against its value, from the JSON of a sweep.

    python -m experiments.sweep @config/cpu_demo --pe hope --hope_cutoff 0.5 1 2 4 8 --out_dir out/cutoff
    python -m experiments.plot_flag hope_cutoff out/cutoff/sweep.json --plot cutoff.png

One panel per range of positions, one line per combination of the other flags, with the standard deviation over seeds. A
line on which the flag has no effect is horizontal. For --prope_fraction the fraction that HoPE rotates (K pairs) is
marked, for --rope_base the smallest base for L of arXiv 2405.14591.
"""
import json
from pathlib import Path

from common import flags, report
from common.groups import group_names, network_of, without_effect
from experiments.theory import smallest_base
from model import GPTConfig, HoPE

FOLLOWS = {"learning_rate": "min_lr", "max_iters": "lr_decay_iters"}  # flag -> another that changes with it


def read_groups(paths):
    """JSON files of sweeps -> their groups; of two equal ones the first. Raises ValueError."""
    found = {}
    for path in paths:
        try:
            groups = json.loads(Path(path).read_text(encoding="utf-8"))["groups"]
            assert groups
            found |= {json.dumps(group["args"], sort_keys=True): group for group in groups} | found
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} was not written by experiments.sweep") from error
    return list(found.values())


def lines_of(groups, flag):
    """-> [(name, groups in the order of the flag's values)], a line each. The value is None where it has no effect.

    Raises ValueError if the groups cannot be drawn against the flag, or not in one picture.
    """
    active = [flag not in without_effect(group["args"]) for group in groups]
    values = [group["args"].get(flag) for group in groups]
    if not all(type(value) in (int, float) for value, counts in zip(values, active) if counts) or not any(active):
        raise ValueError(f"--{flag} is not a flag with a number for a value in these sweeps")
    if len({tuple(bucket["end"] for bucket in group["buckets"]) for group in groups}) > 1:
        raise ValueError("the sweeps have different --block_size or --max_factor: draw a picture of each")
    lines = {}
    for group, value, counts in zip(groups, values, active):
        rest = {name: value for name, value in group["args"].items() if name not in (flag, FOLLOWS.get(flag))}
        lines.setdefault(json.dumps([rest, counts], sort_keys=True), []).append(
            {**group, "args": rest, "value": value if counts else None})
    if max(map(len, lines.values())) < 2:
        raise ValueError(f"no two groups of these sweeps differ in --{flag} alone: give the sweep several values of it")
    names = group_names([line[0]["args"] for line in lines.values()])
    if flag == "window":  # the default stands in the names
        names = [name.replace(f":{GPTConfig.window}", "") for name in names]
    return [(name, sorted(line, key=lambda group: group["value"] or 0)) for name, line in zip(names, lines.values())]


def mark(flag, config):
    """A value of the flag that follows from L, for a GPTConfig -> (text, value), or None."""
    n_pairs = config.n_embd // config.n_head // 2
    if flag == "prope_fraction":
        return "HoPE rotates", len(HoPE(config).theta) / n_pairs
    if flag == "rope_base":
        return f"smallest base for {config.block_size:,} tokens", round(smallest_base(config.block_size, n_pairs))
    return None


def draw(lines, flag, path):
    groups = [group for _, line in lines for group in line]
    buckets, values = groups[0]["buckets"], sorted({group["value"] for group in groups} - {None})
    figure, panels = report.import_pyplot().subplots(1, len(buckets), figsize=(1 + 2.4 * len(buckets), 4.2),
                                                     layout="constrained", squeeze=False, sharey=True)
    styles = report.styles([line[0] for _, line in lines])
    marks = {mark(flag, network_of(group["args"])) for group in groups}
    for i, panel in enumerate(panels[0]):
        for (name, line), style in zip(lines, styles):
            known = [(group["value"], group["buckets"][i]["ppl"], group["buckets"][i]["ppl_std"] or 0)
                     for group in line if group["buckets"][i]["ppl"] is not None]
            if known and known[0][0] is None:
                panel.axhline(known[0][1], label=name, color=style["color"], linestyle=style["linestyle"])
            elif known:
                panel.errorbar(*zip(*[(x, ppl) for x, ppl, _ in known]), [std for *_, std in known], label=name,
                               capsize=2, markersize=5, **style)
        for text, value in marks - {None}:
            panel.axvline(value, color="gray", linestyle=":", label=f"{text}: {value:,g}")
        if values[0] > 0 and values[-1] > 8 * values[0]:
            panel.set_xscale("log", base=2 if values[-1] < 1000 else 10)
        panel.set_xticks(values, [f"{value:g}" for value in values], fontsize="x-small")
        panel.xaxis.minorticks_off()
        panel.set(title=f"[{buckets[i]['start']:,}, {buckets[i]['end']:,})")
    low, high = panels[0, 0].get_ylim()
    if high > 2 * low:
        panels[0, 0].set_yscale("log")
        panels[0, 0].yaxis.set_major_formatter("{x:g}")
        panels[0, 0].yaxis.set_minor_formatter("{x:g}")
    panels[0, 0].set_ylabel("perplexity per token")
    figure.supxlabel(f"--{flag}; ± standard deviation over seeds", fontsize="medium")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    report.save_picture(figure, path)


def main(argv=None):
    parser = flags.ArgumentParser("Draw perplexity against the value of a flag (needs matplotlib).")
    add = parser.add_argument
    add("flag", help="a flag of train.py with numbers for values, without the dashes, such as hope_cutoff")
    add("sweeps", nargs="+", metavar="FILE.json", help="what experiments.sweep --json wrote")
    add("--plot", default="flag.png", metavar="FILE.png", help="the picture")
    args = parser.parse_args(argv)
    report.import_pyplot()
    report.check_output(args.plot, report.PICTURES)
    draw(lines_of(read_groups(args.sweeps), args.flag), args.flag, args.plot)


if __name__ == "__main__":
    flags.run(main)
