"""Tables of runs: arrangements, names of groups, means over seeds."""
import math
import re
from dataclasses import asdict

import pytest
import torch

from common import report
from experiments import groups
from model import GPTConfig
from train import TrainConfig

RANGES = {"nll": "std", "ppl": "std", "nll_above_first": "stderr", "nll_above_local": "stderr"}


def scored(pe, seed, nlls, locals_=None, args=(), **network):
    """A run as the evaluation's JSON holds it, with these losses in its ranges."""
    config = asdict(GPTConfig(pe=pe, **network))
    buckets = [{"start": 16 * i, "end": 16 * i + 16, "nll": nll, "ppl": nll and math.exp(nll),
                "ppl_local": math.exp(local)}
               for i, (nll, local) in enumerate(zip(nlls, locals_ or nlls))]
    return {"name": f"{pe}-{seed}", "pe": pe, "seed": seed, "windows": 4, "dataset_sha256": "abc",
            "device": "cpu", **{name: config[name] for name in groups.SCALING_FLAGS},
            "config": config, "args": {**config, **asdict(TrainConfig(seed=seed)), **dict(args)},
            "buckets": buckets}


@pytest.mark.parametrize("name, words", [
    ("nope+rope:SSSL:16 qkv_bias False", "windows"), ("hope:SL:4 logn", "HoPE:SL:4, log-n"),
    ("rope qkv_bias False", "RoPE"), ("rope bias False qkv_bias False", "RoPE"),
    ("hope bias False qkv_bias True logn", "HoPE, QKV biases, log-n"),
    ("rope bias True qkv_bias True", "RoPE, all biases"), ("rope_qkv_bias", "RoPE, QKV biases"),
    ("windows", "windows"), ("rope50", "rope50"), ("rope/ckpt_000100", "RoPE/ckpt_000100")])
def test_pictures_name_networks_as_the_readme_does(name, words):
    pe = re.match("hope|rope|", name)[0] or "nope"
    assert report.styles([{"name": groups.in_words(name), "pe": pe}])[0]["label"] == words


@pytest.mark.parametrize("text", [
    "rotary", "hope:SL", "hope+rope", "hope+rotary:SL:4", "hope:SXL:4", "hope:SL:4:5"])
def test_what_is_no_arrangement_is_refused(text):
    with pytest.raises(ValueError, match="not an arrangement"):
        groups.fields_of(text)


def names(*runs):
    return groups.group_names([groups.settings_of(run) for run in runs])


def test_a_name_says_the_layers_and_the_flags_that_differ_and_have_an_effect():
    def hope(**changes):
        return scored("hope", 1, (2.0,), **changes)

    assert names(scored("rope", 1, (2.0,), hope_cutoff=2.0), hope(), hope(hope_cutoff=2.0)) == [
        "rope", "hope hope_cutoff 1", "hope hope_cutoff 2"]
    for local_pe, name in (("rope", "hope+rope:SL:4"), ("hope", "hope:SL:4")):
        assert names(hope(window_pattern="SL", window=4, local_pe=local_pe)) == [name]
    assert names(hope(rope_base=1e6), hope(rope_base=100.0)) == [
        "hope rope_base 1000000", "hope rope_base 100"]
    assert names(hope(args={"max_iters": 5, "lr_decay_iters": 5}),
                 hope(args={"max_iters": 6, "lr_decay_iters": 6})) == [
        "hope max_iters 5", "hope max_iters 6"]
    assert names(hope(), {**hope(), "rope_scaling": "yarn", "rope_factor": "auto"}) == [
        "hope", "hope yarn"]


def test_runs_that_differ_in_their_seed_folder_or_idle_flags_have_one_name():
    assert names(scored("rope", 1, (2.0,), args={"out_dir": "a", "device": "cpu"}),
                 scored("rope", 2, (2.0,), args={"out_dir": "b", "device": "cuda"}),
                 scored("rope", 3, (2.0,), hope_cutoff=4.0)) == ["rope"] * 3


def means(runs):
    """Runs -> {(name, start): means over seeds}."""
    table = groups.over_seeds(groups.scores_of(runs), ["name", "start"], RANGES)
    return table.to_dict("index")


def test_means_deviations_and_differences_that_are_paired_by_seed():
    """The seeds come in different orders, and the second group has one that the first has not."""
    rope = {1: (2.0, 3.0), 2: (2.2, 3.6), 3: (2.1, 2.7)}
    hope = {3: (1.9, 2.0), 1: (2.0, 2.4), 4: (9.0, 9.0), 2: (2.05, 2.2)}
    found = means([scored("rope", seed, nlls, (nlls[0], 2.5)) for seed, nlls in rope.items()]
                  + [scored("hope", seed, nlls) for seed, nlls in hope.items()])
    row, losses = found["rope", 16], torch.tensor([3.0, 3.6, 2.7], dtype=torch.float64)
    assert row["nll"] == pytest.approx(3.1)
    assert row["nll_std"] == pytest.approx(losses.std().item())
    assert row["ppl"] == pytest.approx(losses.exp().mean().item())
    assert row["ppl_std"] == pytest.approx(losses.exp().std().item())
    assert row["nll_above_local"] == pytest.approx(0.6) and row["nll_above_first"] == 0
    assert row["nll_above_local_stderr"] == pytest.approx(losses.std().item() / math.sqrt(3))
    differences = torch.tensor([2.4 - 3.0, 2.2 - 3.6, 2.0 - 2.7], dtype=torch.float64)
    row = found["hope", 16]
    assert row["nll_above_first"] == pytest.approx(differences.mean().item())
    assert row["nll_above_first_stderr"] == pytest.approx(differences.std().item() / math.sqrt(3))


def test_one_seed_has_no_error_and_learned_positions_have_no_loss_beyond_L():
    found = means([scored("rope", 1, (2.0, 3.0)), scored("learned", 2, (2.0, None), (2.0, 2.1)),
                   scored("learned", 1, (2.2, None), (2.0, 2.1))])
    assert math.isnan(found["rope", 0]["ppl_std"])
    assert found["learned", 0]["nll_above_first"] == pytest.approx(0.2)  # of seed 1
    assert all(math.isnan(value) for value in found["learned", 16].values())


@pytest.mark.parametrize("changes, words", [
    ({}, "rope have the same flags and seed 1"), ({"seed": 2, "windows": 5}, "different texts"),
    ({"seed": 2, "dataset_sha256": "other"}, "different texts")])
def test_runs_that_cannot_be_averaged_are_refused(changes, words):
    run = scored("rope", 1, (2.0, 3.0))
    with pytest.raises(ValueError, match=words):
        groups.scores_of([run, {**run, **changes}])
