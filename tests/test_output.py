"""What experiments share when they report."""
import math

import pytest

from experiments import output
from model import GPTConfig


def checkpoint(seed=1, iter=300, **changes):
    config = vars(GPTConfig(pe="hope"))
    return {"config": config, "iter": iter,
            "args": config | {"optimizer": "muon", "seed": seed, **changes}}


def test_groups_differ_in_the_seed_alone_and_are_named_by_what_differs():
    rates = [checkpoint(learning_rate=0.1, out_dir="a"), checkpoint(learning_rate=0.2, out_dir="b"),
             checkpoint(seed=2, learning_rate=0.1, out_dir="c")]
    assert output.names_of(rates) == [
        "hope learning_rate 0.1", "hope learning_rate 0.2", "hope learning_rate 0.1"]
    steps = [checkpoint(iter=100), checkpoint(), checkpoint(seed=2)]  # no sample of seeds
    assert output.names_of(steps) == ["hope iter 100", "hope iter 300", "hope iter 300"]


def test_means_are_those_of_each_group_and_have_standard_errors_over_seeds():
    def run(name, seed, gain):
        bucket = {"distance": 4, "gain": gain, "gain_stderr": 9.0}
        return {"name": name, "seed": seed, "iter": 5, "needles": [bucket, None]}

    runs = [run("a", 1, 1.0), run("b", 1, 4.0), run("c", 2, 2.0)]
    first, second = output.mean_over_seeds(runs, ["x", "y", "x"], "needles")
    assert first == {"name": "x", "seeds": [1, 2], "needles": [
        {"distance": 4, "gain": 1.5, "gain_stderr": pytest.approx(0.5)}, None]}
    assert second == {"name": "y", "seeds": [1], "needles": runs[1]["needles"]}


def test_floats_are_rounded_to_significant_digits_and_nan_is_none():
    found = output.rounded({"a": [0.000123456, (math.nan, 3)], "b": "c", "d": 123456.0}, 3)
    assert found == {"a": [0.000123, [None, 3]], "b": "c", "d": 123000.0}
