"""Groups of runs that differ in their seed alone: arrangements, names, means over seeds."""
import csv
import math

import pytest
import torch

from experiments import groups, sweep
from experiments.groups import group_by_seed, group_names
from model import GPTConfig


@pytest.mark.parametrize("text, fields", [
    ("hope", {"pe": "hope"}),
    ("hope:SSSL:16", {"pe": "hope", "local_pe": None, "window_pattern": "SSSL", "window": 16}),
    ("nope+rope:SL:0", {"pe": "nope", "local_pe": "rope", "window_pattern": "SL", "window": 0})])
def test_an_arrangement_is_read_and_named(text, fields):
    assert groups.fields_of(text) == fields
    assert groups.name_of(GPTConfig(**fields)) == text


@pytest.mark.parametrize("text", ["", "rotary", "hope:SL", "hope:16", "hope+rope", "hope:SL:-1", "hope:SXL:4",
                                  "+rope:SL:4", "nope+rotary:SL:4", "hope:SL:4:5"])
def test_what_is_no_arrangement_is_refused(text):
    with pytest.raises(ValueError, match="--pe"):
        groups.fields_of(text)


def test_names_of_groups_say_the_layers_and_what_differs_and_nothing_else():
    def named(line, where="nowhere"):
        runs = [settings for _, settings, _ in sweep.combinations(sweep.given_flags(line.split()), where)]
        return group_names([{**run, "seed": 1} for run in runs])

    assert named("--pe rope hope --hope_cutoff 1 2") == ["rope", "hope hope_cutoff 1", "hope hope_cutoff 2"]
    assert named("--pe hope hope:SSSL:16 nope+rope:SSSL:16") == ["hope", "hope:SSSL:16", "nope+rope:SSSL:16"]
    assert named("--pe rope --learning_rate 1e-3 2e-3") == ["rope learning_rate 0.001", "rope learning_rate 0.002"]
    assert named("--optimizer muon adamw") == ["hope optimizer muon", "hope optimizer adamw"]
    assert named("--max_iters 5 6") == ["hope max_iters 5", "hope max_iters 6"]
    assert named("--min_lr 1e-4 2e-4") == ["hope min_lr 0.0001", "hope min_lr 0.0002"]
    assert named("--pe rope:SL:4 --window_pattern SL") == ["rope:SL:4"]
    assert named("--rope_base 100 1e6") == ["hope rope_base 100", "hope rope_base 1000000"]


def scored(pe, seed, nlls, locals_=None, **changes):
    """A run as eval_extrapolation.py writes it, with these losses in its buckets."""
    buckets = [{"start": 16 * i, "end": 16 * i + 16, "nll": nll, "stderr": 0.1, "ppl": nll and math.exp(nll),
                "ppl_local": math.exp(local), "bits_per_character": nll}
               for i, (nll, local) in enumerate(zip(nlls, locals_ or nlls))]
    run = {"name": f"{pe}_{seed}", "pe": pe, "seed": seed, "block_size": 16, "rope_scaling": "none", "rope_factor": 1.0,
           "attn_scaling": "none", "windows": 4, "dataset_sha256": "abc", "config": vars(GPTConfig(pe=pe)),
           "buckets": buckets}
    return {**run, **changes}


@pytest.mark.parametrize("name, words", [
    ("hope", "HoPE"), ("rope:SSSL:16 logn", "RoPE, windows, logn"), ("learned", "learned"),
    ("nope+rope:SSSL:16 max_iters 9", "NoPE in full layers, windows, max_iters 9")])
def test_names_in_pictures_are_those_that_people_say(name, words):
    assert groups.in_words(name) == words


def test_means_deviations_and_paired_differences_over_seeds():
    """The seeds come in different orders, and one group has a seed more."""
    rope = {1: (2.0, 3.0), 2: (2.2, 3.6), 3: (2.1, 2.7)}
    hope = {3: (1.9, 2.0), 1: (2.0, 2.4), 2: (2.05, 2.2), 4: (9.0, 9.0)}
    runs = [scored("rope", seed, nlls, (nlls[0], 2.5)) for seed, nlls in rope.items()]
    runs += [scored("hope", seed, nlls) for seed, nlls in hope.items()]
    first, second = group_by_seed(runs[:5] + runs[6:] + runs[5:6])
    assert (first["name"], first["seeds"], second["name"], second["seeds"]) == ("rope", [1, 2, 3], "hope", [3, 1, 4, 2])
    bucket = first["buckets"][1]
    losses = torch.tensor([3.0, 3.6, 2.7], dtype=torch.float64)
    assert bucket["nll"] == pytest.approx(3.1) and bucket["nll_std"] == pytest.approx(losses.std().item())
    assert bucket["ppl"] == pytest.approx(losses.exp().mean().item())
    assert bucket["ppl_std"] == pytest.approx(losses.exp().std().item())
    assert bucket["nll_above_local"] == pytest.approx(0.6) and bucket["nll_above_first"] == 0
    assert bucket["nll_above_local_stderr"] == pytest.approx(losses.std().item() / math.sqrt(3))
    differences = torch.tensor([2.4 - 3.0, 2.2 - 3.6, 2.0 - 2.7], dtype=torch.float64)  # of seeds 1, 2 and 3
    assert second["buckets"][1]["nll_above_first"] == pytest.approx(differences.mean().item())
    assert second["buckets"][1]["nll_above_first_stderr"] == pytest.approx(differences.std().item() / math.sqrt(3))


def test_one_seed_has_no_error_and_an_encoding_that_ends_at_L_has_no_loss_beyond(capsys, tmp_path):
    found = group_by_seed([scored("rope", 1, (2.0, 3.0)), scored("learned", 2, (2.0, None), (2.0, 2.1)),
                           scored("learned", 1, (2.2, None), (2.0, 2.1))])
    assert found[0]["buckets"][0]["ppl_std"] is None and found[0]["buckets"][0]["nll_above_local_stderr"] is None
    learned = found[1]["buckets"]
    assert learned[1]["nll"] is learned[1]["ppl_std"] is learned[1]["nll_above_first"] is None
    assert learned[0]["nll_above_first"] == pytest.approx(0.2)  # of seed 1, which both have
    after = group_by_seed([scored("learned", 1, (2.2, None), (2.0, 2.1)), scored("rope", 1, (2.0, 3.0))])[1]
    assert after["buckets"][1]["nll_above_first"] is None and after["buckets"][1]["nll"] == 3
    groups.print_groups(found)
    output = capsys.readouterr().out
    assert "learned" in output and output.count("\n\n") == 2 and "minus loss with the last L tokens" in output
    groups.print_groups(found, all_tables=True)
    assert "loss minus that of rope" in capsys.readouterr().out
    groups.write_csv(found, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["ppl [16,32)"] for row in rows] == [str(math.exp(3.0)), ""] and rows[1]["seeds"] == "2 1"


def test_runs_with_other_flags_or_scalings_are_other_groups_and_idle_flags_do_not_count():
    def config(**changes):
        return {"config": vars(GPTConfig(**changes))}

    found = group_by_seed([scored("rope", 1, (2.0, 3.0)),
                           scored("rope", 2, (2.0, 3.0), **config(pe="rope", hope_cutoff=2)),
                           scored("rope", 1, (2.0, 2.5), rope_scaling="yarn", rope_factor="auto"),
                           scored("rope", 1, (2.0, 2.5), args={"learning_rate": 0.1, "out_dir": "a"}),
                           scored("rope", 2, (2.0, 2.5), args={"learning_rate": 0.1, "out_dir": "b"})])
    assert [group["seeds"] for group in found] == [[1, 2], [1], [1, 2]]
    assert [group["name"] for group in found] == ["rope", "rope yarn", "rope learning_rate 0.1"]


@pytest.mark.parametrize("changes, words", [
    ({}, "rope_1, rope_1 have the same flags"), ({"seed": 2, "windows": 5}, "different texts"),
    ({"seed": 2, "dataset_sha256": "other"}, "different texts")])
def test_runs_that_cannot_be_averaged_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        group_by_seed([scored("rope", 1, (2.0, 3.0)), {**scored("rope", 1, (2.0, 3.0)), **changes}])
