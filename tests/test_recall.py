"""Recall: the tasks, models whose answers are known beforehand, passages that are read twice."""
import json

import pytest
import torch

from common.device import Device, DeviceConfig
from experiments import recall, tasks
from model import GPTConfig, NoPE

CPU = torch.device("cpu")

# --- tasks


@pytest.mark.parametrize("length", [26, 27, 63, 200])
def test_copy_asks_for_the_sequence_that_follows_the_start(length):
    tokens, targets = tasks.copy_task(4, length, tasks.generator_for(1))
    assert tokens.shape == targets.shape == (4, length)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        asked = [i for i, t in enumerate(target) if t >= 0]
        n = len(asked)
        assert n in tasks.COPIED and asked == list(range(length - n, length))
        assert row[0] == tasks.START and row[asked[0]] == tasks.SEPARATOR
        assert [target[i] for i in asked] == row[1:n + 1] and len(set(row[1:n + 1])) == n
        assert set(row[n + 1:asked[0]]) == {tasks.FILLER}


@pytest.mark.parametrize("length", [26, 63, 200])
def test_binding_asks_for_the_second_letter_of_a_pair(length):
    tokens, targets = tasks.binding_task(8, length, tasks.generator_for(2), testing=True)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        assert [i for i, t in enumerate(target) if t >= 0] == [length - 1]
        assert row[-2] == tasks.SEPARATOR
        first = row.index(tasks.FILLER)
        bound = dict(zip(row[1:first:2], row[2:first:2]))
        assert len(bound) in tasks.BOUND and bound[row[-1]] == target[-1]
        assert len({*bound, *bound.values()}) == 2 * len(bound)


def test_in_training_all_bindings_are_asked_for_in_random_order():
    tokens, targets = tasks.binding_task(8, 40, tasks.generator_for(3))
    orders = set()
    for row, target in zip(tokens.tolist(), targets.tolist()):
        bound = dict(zip(row[1::2], row[2:row.index(tasks.FILLER):2]))
        asked = {row[i]: t for i, t in enumerate(target) if t >= 0}
        assert asked == bound
        orders.add(tuple(list(bound).index(letter) for letter in asked))
    assert len(orders) > 4


def triples_of(row):
    """The triples before the separator, in order, and their places."""
    end = row.index(tasks.SEPARATOR)
    letters = [i for i in range(1, end) if row[i] != tasks.FILLER]
    places = letters[::3]
    assert letters == [i + j for i in places for j in range(3)]
    return [tuple(row[i:i + 3]) for i in places], places


@pytest.mark.parametrize("length", [38, 63, 200, 1023])
def test_match_asks_for_one_of_nine_triples_and_four_others_share_a_letter_with_it(length):
    asked_for, seen = set(), set()
    for seed in range(20):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), testing=True)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            assert [i for i, t in enumerate(target) if t >= 0] == [length - 1]
            assert row[-3] == tasks.SEPARATOR
            triples, places = triples_of(row)
            assert len({c for *_, c in triples}) == len(triples) == 9
            assert len({token for triple in triples for token in triple}) == 15
            asked = (*row[-2:], target[-1])
            asked_for.add(triples.index(asked))
            seen |= set(places)
            shared = [sum(triple[i] == asked[i] for triple in triples) for i in range(3)]
            assert shared == [3, 3, 1]
    assert asked_for == set(range(9))
    assert min(seen) <= 1 + length // 20 and max(seen) >= length - 5 - length // 20


def test_in_training_match_asks_for_up_to_three_triples_of_grids_of_all_sizes_in_random_order():
    sizes, layouts, orders = set(), set(), set()
    for seed in range(80):
        length = 38 + 2 * (seed % 14)
        tokens, targets = tasks.match_task(4, length, tasks.generator_for(seed))
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            answers = [i for i, t in enumerate(target) if t >= 0]
            order = [triples.index((row[i - 1], row[i], target[i])) for i in answers]
            assert len(set(order)) == len(order) == min(3, len(triples))
            assert row[answers[0] - 2] == tasks.SEPARATOR
            size = len({a for a, *_ in triples}), len({b for _, b, _ in triples})
            assert size[0] * size[1] == len(triples)
            sizes.add(size)
            orders |= {tuple(order)} if size == (3, 3) else set()
            layouts.add(tuple(token == tasks.FILLER for token in row))
    assert sizes == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
    assert len(layouts) > 50 and len(orders) > 25


@pytest.mark.parametrize("length", [39, 63, 200, 1023])
def test_a_crowd_has_no_filler_and_every_triple_but_one_matches_in_one_letter_of_two(length):
    places = set()
    for seed in range(6):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), True, crowd=True)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            a, b, c = *row[-2:], target[-1]
            assert row.count(tasks.FILLER) <= 2 and len(triples) == (length - 4) // 3
            places.add(triples.index((a, b, c)))
            others = [triple for triple in triples if triple != (a, b, c)]
            assert len(others) == len(triples) - 1
            first = sum(triple[0] == a and triple[1] != b for triple in others)
            second = sum(triple[0] != a and triple[1] == b for triple in others)
            assert first + second == len(others) and 0 <= second - first <= 1
            assert all(triple[2] not in (a, b, c) for triple in others)
            assert len({token for triple in others for token in triple}) > (length > 100) * 15
    assert len(places) > 2


# --- training and testing


class Answers(torch.nn.Module):
    """A model that answers each token with what a function of tokens and targets (B, T) returns."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.transformer = answer, torch.nn.Module()
        self.transformer.wpe = NoPE(None)

    def forward(self, tokens, targets=None):
        answers = self.answer(tokens, targets)
        return torch.nn.functional.one_hot(answers, tasks.VOCAB_SIZE).float(), None


TASKS = tasks.EASY.tested | tasks.HARD.tested


def accuracy(answer, task):
    """-> mean, standard error at lengths of 65 to 127."""
    found = recall.test(Answers(answer), TASKS[task][0], 64, 128, 20, 1, CPU, tasks.HARD.shortest)
    return found["accuracy"], found["accuracy_stderr"]


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_is_1_for_a_model_that_knows_and_1_in_32_for_a_blind_guess(task):
    assert accuracy(lambda tokens, targets: targets.clamp(min=0), task) == (1, 0)
    mean, stderr = accuracy(lambda tokens, targets: torch.full_like(tokens, 3), task)
    assert abs(mean - 1 / tasks.LETTERS) < 4 * stderr + 0.01


def test_the_best_guesses_have_the_accuracy_that_is_stated():
    mean, stderr = accuracy(lambda tokens, targets: tokens[:, 2:3].expand_as(tokens), "binding")
    assert abs(mean - TASKS["binding"][1]) < 4 * stderr  # the first pair's letter, always

    def third_of_one_that_shares(letter):
        """The third letter of a random triple with the first (1) or second (2) asked letter."""
        def answer(tokens, targets):
            before, asked = tokens[:, :-3], tokens[:, letter - 3:][:, :1]
            share = (before == asked) * torch.rand(before.shape)
            third = share.argmax(1, keepdim=True) + 3 - letter
            return tokens.gather(1, third).expand_as(tokens)
        return answer

    for letter in (1, 2):
        mean, stderr = accuracy(third_of_one_that_shares(letter), "match")
        assert abs(mean - TASKS["match"][1]) < 4 * stderr
    letters = [(n, given) for n in tasks.COPIED for given in range(n)]
    expected = sum(1 / (n - given) / n for n, given in letters) / len(tasks.COPIED)
    assert TASKS["copy"][1] == pytest.approx(expected)


def test_training_and_test_lengths_are_disjoint(monkeypatch):
    lengths = []

    def noting(size, length, generator):
        lengths.append(length)
        return tasks.copy_task(size, length, generator)

    for start, end in ((0, 64), (63, 66), (64, 128), (512, 1024)):
        recall.test(Answers(lambda tokens, targets: tokens), noting, start, end, 5, 1, CPU, 26)
        assert all(length % 2 == 1 and max(start, 25) < length <= end for length in lengths[-5:])
    monkeypatch.setattr(tasks.EASY, "trained", (noting,))
    args = recall.make_parser().parse_args(["--max_iters", "5"])
    recall.train(GPTConfig(vocab_size=tasks.VOCAB_SIZE, n_embd=16, block_size=64), args, 1, CPU)
    assert all(length % 2 == 0 and length <= 64 for length in lengths[-5:])


RECALL = "--max_iters 2 --n_embd 16 --max_factor 2 --batches 1 --device cpu".split()


def test_small_models_are_averaged_over_seeds(tmp_path):
    recall.main([*RECALL, "--hard", "--pe", "hope:SL:4", "learned", "--seed", "1", "2",
                 "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["chance_in_part"] == {"match": 0.3333, "crowd": None}
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        ("hope:SL:4", 1), ("hope:SL:4", 2), ("learned", 1), ("learned", 2)]
    hope, learned = result["means"]
    assert hope["seeds"] == [1, 2] and hope["tasks"]["crowd"][1]["accuracy"] is not None
    assert learned["tasks"]["match"][1] is None  # beyond L
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_recall_trains_with_the_flags_of_the_network_and_with_the_seed(monkeypatch):
    def run(*flags):
        args = recall.make_parser().parse_args([*RECALL, "--pe", "hope:SL:4", *flags])
        return recall.train_and_test_all(args, CPU)[0]

    monkeypatch.setattr(recall, "test", lambda *args: {"accuracy": 0.0})
    plain = run()["loss"]
    assert run()["loss"] == plain
    for flag in (("--rope_base", "100"), ("--local_rope_base", "100"), ("--hope_cutoff", "11"),
                 ("--seed", "2"), ("--optimizer", "adamw"), ("--muon_learning_rate", "0.1"),
                 ("--hard",), ("--bias",), ("--qkv_bias",)):
        assert run(*flag)["loss"] != plain, flag
    assert run("--attn_scaling", "logn")["config"]["attn_scaling"] == "logn"


# --- language models


def test_a_needle_stands_at_both_places_and_its_second_half_alone_is_scored():
    windows, needles, seen = torch.randint(30, (3, 50)), torch.randint(30, (3, 8)), []

    def knows_the_second_half(tokens, targets):
        seen.append(tokens)
        right = torch.arange(tokens.size(1)) % 24 >= 3  # of the needles at 0 and 24
        return torch.where(right, targets, 31)

    model = Answers(knows_the_second_half)
    found = recall.copy_in_text(model, windows, needles, 24, scored_from=4)
    assert found["second_accuracy"] == 1
    for row, (text, other) in enumerate(seen):
        assert torch.equal(text[:8], needles[row]) and torch.equal(text[24:], needles[row, :7])
        assert torch.equal(other[:8], needles[row - 1]) and torch.equal(other[8:], text[8:])
        assert torch.equal(text[8:24], windows[row, 8:24])
    for options, accuracy in (({"scored_from": 3}, 4 / 5), ({}, 4 / 7)):
        found = recall.copy_in_text(model, windows, needles, 24, **options)
        assert found["second_accuracy"] == pytest.approx(accuracy) and found["gain"] == 0
        assert found["unseen_accuracy"] == found["second_accuracy"] and found["length"] == 32


def test_language_models_write_json_and_picture(finished_run, tmp_path):
    recall.main([finished_run, "--max_factor", "4", "--windows", "3", "--device", "cpu",
                 "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    result = json.loads((tmp_path / "t.json").read_text())
    for what in ("distances", "needles"):
        buckets = result["runs"][0][what]
        assert [bucket["distance"] for bucket in buckets] == [4, 8, 12, 16, 32]
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_needles_are_shuffled_passages_scored_from_their_middle(finished_run, monkeypatch):
    calls, scalings = [], set()

    def record(model, *rest):
        calls.append(rest)
        scalings.add(model.config.attn_scaling)

    monkeypatch.setattr(recall, "copy_in_text", record)
    flags = [finished_run, "--max_factor", "2", "--windows", "9", "--attn_scaling", "logn"]
    recall.test_language_models(recall.make_parser().parse_args(flags), Device(DeviceConfig("cpu")))
    assert scalings == {"logn"}
    passages, needles = calls[:4], calls[4:]
    assert [call[2:] for call in passages] == [(distance,) for distance in (4, 8, 12, 16)]
    assert [call[2:] for call in needles] == [(distance, 2) for distance in (4, 8, 12, 16)]
    for (windows, passage, *_), (_, needle, *_) in zip(passages, needles):
        assert torch.equal(passage, windows[:, :4]) and not torch.equal(needle, passage)
        assert torch.equal(needle.sort().values, passage.sort().values)
        assert torch.equal(needle, needles[0][1])  # the same at every distance
