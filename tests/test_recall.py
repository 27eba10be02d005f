"""Recall: the tasks, models whose answers are known beforehand, passages that are read twice."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress

import pytest
import torch

from common.checkpoint import load_checkpoint
from common.device import Device
from experiments import groups, recall, tasks
from model import GPTConfig, NoPE
from tests.conftest import PROJECT, full_disk, tiny

# --- tasks


@pytest.mark.parametrize("length", [26, 27, 63, 200])
def test_copy_asks_for_the_sequence_that_follows_the_start(length):
    tokens, targets = tasks.copy_task(4, length, tasks.generator_for(1))
    assert tokens.shape == targets.shape == (4, length)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        asked = [i for i, t in enumerate(target) if t >= 0]
        assert asked == list(range(length - len(asked), length)) and len(asked) in tasks.COPIED
        assert row[0] == tasks.START and row[asked[0]] == tasks.SEPARATOR
        assert [target[i] for i in asked] == row[1:len(asked) + 1] and len(set(row[1:len(asked) + 1])) == len(asked)
        assert row[len(asked) + 1:asked[0]] == [tasks.FILLER] * (asked[0] - len(asked) - 1)


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("length", [26, 63, 200])
def test_binding_asks_for_the_second_letter_of_a_pair_and_a_decoy_is_another_pair(length, decoy):
    tokens, targets = tasks.binding_task(8, length, tasks.generator_for(2), n_asked=1, decoy=decoy)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        assert [i for i, t in enumerate(target) if t >= 0] == [length - 1] and row[-2] == tasks.SEPARATOR
        first = row.index(tasks.FILLER)
        bound = dict(zip(row[1:first:2], row[2:first:2]))
        assert len(bound) in tasks.BOUND and bound[row[-1]] == target[-1]
        assert (row[-3] != tasks.FILLER) == decoy and (not decoy or row[-4] not in bound)


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
    letters = [i for i in range(1, row.index(tasks.SEPARATOR)) if row[i] != tasks.FILLER]
    places = letters[::3]
    assert letters == [i + j for i in places for j in range(3)]
    return [tuple(row[i:i + 3]) for i in places], places


@pytest.mark.parametrize("length", [38, 63, 200, 1023])
def test_match_asks_for_one_of_nine_triples_and_four_others_share_a_letter_with_it(length):
    asked_for, places_seen = set(), set()
    for seed in range(20):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), testing=True)
        assert tokens.shape == targets.shape == (8, length)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            assert [i for i, t in enumerate(target) if t >= 0] == [length - 1] and row[-3] == tasks.SEPARATOR
            triples, places = triples_of(row)
            assert len({c for *_, c in triples}) == len(triples) == 9
            assert len({token for triple in triples for token in triple}) == 15
            asked = (*row[-2:], target[-1])
            asked_for.add(triples.index(asked))
            places_seen |= set(places)
            assert [sum(triple[i] == asked[i] for triple in triples) for i in range(3)] == [3, 3, 1]
    assert asked_for == set(range(9))
    assert min(places_seen) <= 1 + length // 20 and max(places_seen) >= length - 5 - length // 20


def test_in_training_match_asks_for_up_to_three_triples_of_grids_of_all_sizes_in_random_order():
    sizes, layouts, orders, neighbours = set(), set(), set(), set()
    for seed in range(80):
        tokens, targets = tasks.match_task(4, 38 + 2 * (seed % 14), tasks.generator_for(seed))
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            answers = [i for i, t in enumerate(target) if t >= 0]
            order = [triples.index((row[i - 1], row[i], target[i])) for i in answers]
            assert len(set(order)) == len(order) == min(3, len(triples)) and row[answers[0] - 2] == tasks.SEPARATOR
            size = len({a for a, *_ in triples}), len({b for _, b, _ in triples})
            assert size[0] * size[1] == len(triples)
            if size == (3, 3):
                orders.add(tuple(order))
                neighbours.add(tuple(x == y for x, y in zip(*triples[:2])))
        sizes.add(size)
        layouts.add(tuple(token == tasks.FILLER for token in row))
    assert sizes == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)} and len(layouts) > 50
    assert len(orders) > 25 and neighbours == {(True, False, False), (False, True, False), (False, False, False)}


@pytest.mark.parametrize("length", [39, 63, 200, 1023])
def test_a_crowd_has_no_filler_and_every_triple_but_one_matches_in_one_letter_of_two(length):
    places = set()
    for seed in range(6):
        tokens, targets = tasks.match_task(8, length, tasks.generator_for(seed), testing=True, crowd=True)
        for row, target in zip(tokens.tolist(), targets.tolist()):
            triples, _ = triples_of(row)
            a, b, c = *row[-2:], target[-1]
            assert row.count(tasks.FILLER) <= 2 and len(triples) == (length - 4) // 3
            places.add(triples.index((a, b, c)))
            others = [triple for triple in triples if triple != (a, b, c)]
            assert len(others) == len(triples) - 1
            first = [triple for triple in others if triple[0] == a and triple[1] != b]
            second = [triple for triple in others if triple[0] != a and triple[1] == b]
            assert len(first) + len(second) == len(others) and 0 <= len(second) - len(first) <= 1
            assert all(triple[2] not in (a, b, c) for triple in others)
            assert len({token for triple in others for token in triple}) > (length > 100) * 15
    assert len(places) > 2


def test_the_generator_takes_any_seed_that_the_flag_takes():
    numbers = {tasks.generator_for(2**32, 1024, i).initial_seed() for i in range(15)}
    assert len(numbers) == 15


# --- training and testing


class Answers(torch.nn.Module):
    """A model that answers each token with what a function of the tokens and targets (B, T) returns."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.transformer = answer, torch.nn.Module()
        self.transformer.wpe = NoPE(None)

    def forward(self, tokens, targets=None, cache=None):
        return torch.nn.functional.one_hot(self.answer(tokens, targets), tasks.VOCAB_SIZE).float(), None


TASKS = tasks.EASY.tested | tasks.HARD.tested


def accuracies(answer, task, end=128):
    return recall.test(Answers(answer), TASKS[task][0], end // 2, end, 20, 1, torch.device("cpu"),
                       tasks.HARD.shortest)


def test_accuracy_is_1_for_a_model_that_knows_and_as_stated_for_a_guess():
    for task, (_, chance) in TASKS.items():
        assert accuracies(lambda tokens, targets: targets.clamp(min=0), task)["accuracy"] == 1
        blind = accuracies(lambda tokens, targets: torch.full_like(tokens, 3), task)
        assert abs(blind["accuracy"] - 1 / 32) < 4 * blind["accuracy_stderr"] + 0.01
        assert blind["exact"] < 0.1 and (chance is None or 1 / 32 < chance < 0.5)
    first = accuracies(lambda tokens, targets: tokens[:, 2:3].expand_as(tokens), "binding")  # of the first pair, always
    assert abs(first["accuracy"] - TASKS["binding"][1]) < 4 * first["accuracy_stderr"]

    def third_of_one_that_shares(letter):
        """The third letter of a random triple that has the first (1) or second (2) letter of the question."""
        def answer(tokens, targets):
            place = letter - 3  # of the letter in the question
            share = (tokens[:, :-3] == tokens[:, place:place + 1 or None]) * torch.rand(tokens[:, :-3].shape)
            return tokens.gather(1, share.argmax(1, keepdim=True) + 3 - letter).expand_as(tokens)
        return answer

    for letter in (1, 2):
        found = accuracies(third_of_one_that_shares(letter), "match")
        assert abs(found["accuracy"] - TASKS["match"][1]) < 4 * found["accuracy_stderr"]


def test_a_model_that_takes_the_nearest_pair_falls_for_every_decoy():
    found = accuracies(lambda tokens, targets: tokens.roll(2, dims=1), "decoy")
    assert found["decoy"] == 1 and found["accuracy"] < 0.1
    found = accuracies(lambda tokens, targets: tokens.roll(3, dims=1), "crowd")
    assert found["decoy"] == 1 and found["accuracy"] < 0.2


def test_training_and_test_lengths_are_disjoint_and_sequences_depend_on_the_seed_alone(monkeypatch):
    lengths = []

    def noting(task):
        return lambda size, length, *rest: lengths.append(length) or task(size, length, *rest)

    for start, end in ((0, 64), (63, 66), (64, 128), (512, 1024)):
        recall.test(Answers(lambda tokens, targets: tokens), noting(tasks.copy_task), start, end, 5, 1,
                    torch.device("cpu"), 26)
        assert all(length % 2 == 1 and max(start, 25) < length <= end for length in lengths[-5:])
    monkeypatch.setattr(tasks.EASY, "trained", (noting(tasks.copy_task),))
    args = recall.make_parser().parse_args(["--max_iters", "5", "--n_embd", "16"])
    recall.train(GPTConfig(vocab_size=tasks.VOCAB_SIZE, n_embd=16, block_size=64), args, 1, torch.device("cpu"))
    assert all(length % 2 == 0 and length <= 64 for length in lengths[-5:])
    one, same, other = (tasks.copy_task(4, 40, tasks.generator_for(*seed))[0] for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("pe", ["learned", "t5", "hope:SL:5"])
def test_sequences_that_pass_in_chunks_get_the_same_answers(pe):
    model, tokens = tiny(**groups.fields_of(pe), block_size=40), torch.randint(50, (3, 37))
    whole = recall.most_likely(model, tokens, tokens)
    assert torch.equal(whole, model(tokens, tokens)[0].argmax(-1)) and whole.shape == tokens.shape
    torch.testing.assert_close(recall.most_likely(model, tokens, tokens, chunk=8), whole)


RECALL = ["--max_iters", "1", "--n_embd", "16", "--max_factor", "2", "--batches", "1", "--device", "cpu"]


def test_a_few_steps_of_recall_write_json_and_picture_and_leave_out_learned_beyond_L(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main([*RECALL, "--pe", "hope", "learned", "--json", str(tmp_path / "r.json"),
                 "--plot", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    hope, learned = result["runs"]
    assert hope["tasks"]["copy"][1]["accuracy"] is not None and learned["tasks"]["copy"][1] is None
    assert {"command", "seed", "device", "chance_in_part"} <= set(result)
    assert "best guess" in capsys.readouterr().out and (tmp_path / "r.png").exists()


def test_a_few_steps_of_the_hard_tasks_write_tables_json_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main([*RECALL, "--hard", "--pe", "hope", "--json", str(tmp_path / "r.json"),
                 "--plot", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["runs"][0]["tasks"].keys() == {"match", "crowd"} and result["flags"]["hard"]
    assert result["chance_in_part"] == {"match": 0.3333, "crowd": None} and result["chance_exact_without_order"] is None
    output = capsys.readouterr().out
    for words in ("match: accuracy", "crowd: accuracy", "matches one letter of two 0.333", "nearest triple's"):
        assert words in output
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_recall_of_several_seeds_is_averaged_and_a_killed_command_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    arguments = [*RECALL, "--pe", "hope", "nope+rope:SL:4", "--seed", "1", "2", "--json", str(tmp_path / "r.json")]
    trained, train_and_test = [], recall.train_and_test

    def stopping(config, seed, args, device):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((groups.name_of(config), seed))
        return train_and_test(config, seed, args, device)

    monkeypatch.setattr(recall, "train_and_test", stopping)
    with pytest.raises(KeyboardInterrupt):
        recall.main(arguments)
    assert not (tmp_path / "r.json").exists()
    trained.clear()
    recall.main(arguments)
    assert trained == [("nope+rope:SL:4", 2)] and [path.name for path in tmp_path.iterdir()] == ["r.json"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for name in ("hope", "nope+rope:SL:4") for seed in (1, 2)]
    assert result["runs"][3]["config"]["local_pe"] == "rope" and result["runs"][3]["config"]["window"] == 4
    for i, mean in enumerate(result["means"]):
        values = [run["tasks"]["copy"][1]["accuracy"] for run in result["runs"][2 * i:2 * i + 2]]
        assert mean["tasks"]["copy"][1]["accuracy"] == pytest.approx(sum(values) / 2, abs=1e-3)
        assert mean["tasks"]["copy"][1]["accuracy_stderr"] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-3)
    assert "hope, seed 2" in capsys.readouterr().out


def test_recall_trains_with_the_flags_of_the_network_and_with_the_seed(monkeypatch):
    """--local_pe and --window have no effect here, since the arrangement sets them, and --attn_scaling none inside L;
    every other flag has one."""
    def run(*flags):
        args = recall.make_parser().parse_args([*RECALL, "--max_iters", "3", "--pe", "hope:SL:4", *flags])
        return recall.train_and_test_all(args, torch.device("cpu"))[0]

    monkeypatch.setattr(recall, "test", lambda *args: {"accuracy": 0.0})
    plain = run()["loss"]
    assert run()["loss"] == plain
    assert run("--hard")["tasks"].keys() == {"match", "crowd"}
    idle = ("--local_pe", "--window", "--attn_scaling")
    for flag in (("--local_pe", "rope"), ("--window", "2"), ("--rope_base", "100"), ("--local_rope_base", "100"),
                 ("--hope_cutoff", "11"), ("--seed", "2"), ("--optimizer", "adamw"), ("--muon_learning_rate", "0.1"),
                 ("--attn_scaling", "logn"), ("--hard",)):
        changed = run(*flag)
        assert (changed["loss"] == plain) == (flag[0] in idle), flag
        assert (changed["config"]["attn_scaling"] == "logn") == (flag[0] == "--attn_scaling")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
@pytest.mark.parametrize("send, stop_signal", [(os.kill, signal.SIGTERM), (os.kill, signal.SIGINT),
                                               (os.killpg, signal.SIGINT)])
def test_processes_end_with_their_parent_and_at_ctrl_c(send, stop_signal, tmp_path):
    wait = "import os, time; open(str(os.getpid()), 'w'); time.sleep(600)"
    program = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job with & ignores it
               "from common import flags; from experiments.recall import side_by_side; "
               f"flags.run(lambda: list(side_by_side(exec, dict.fromkeys(range(4), ({wait!r},)), jobs=2)))")
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(PROJECT)}, start_new_session=True)
    try:
        while len(list(tmp_path.iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        send(parent.pid, stop_signal)
        _, errors = parent.communicate(timeout=30)  # until all have ended, since all have this stderr
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == (130 if stop_signal == signal.SIGINT else -signal.SIGTERM)
    assert len(list(tmp_path.iterdir())) == 2 and "Traceback" not in errors


def test_processes_end_if_their_results_cannot_be_kept(tmp_path):
    late = f"import time; time.sleep(10); open({str(tmp_path / 'late')!r}, 'w')"
    work = {"done": ("",), "late": (late,), "later": (late,)}
    with pytest.raises(OSError, match="full"), closing(recall.side_by_side(exec, work, 2)) as found:
        assert next(found) == ("done", None)
        raise OSError("full disk")
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()


@pytest.mark.parametrize("end, error", [("1 / 0", ZeroDivisionError), ("os._exit(1)", BrokenProcessPool)])
def test_what_is_done_is_kept_if_an_earlier_one_fails_or_is_killed(end, error, tmp_path):
    wait = ("import os, time\nlatest = time.time() + 20\n"
            f"while not os.path.exists({str(tmp_path / 'done')!r}) and time.time() < latest: time.sleep(0.01)\n")
    work, found = {"fails": (wait + end,), "done": ("",)}, []
    with pytest.raises(error), closing(recall.side_by_side(exec, work, 2)) as results:
        for key, _ in results:
            found.append(key)
            (tmp_path / "done").touch()
    assert found == ["done"]


def test_models_are_kept_as_they_are_done_and_reported_in_the_order_of_the_command(tmp_path, monkeypatch):
    ended, kept = [], tmp_path / "r.json.partial"

    def backwards(function, work, jobs):
        assert not kept.exists()
        try:
            for i, key in enumerate(reversed(work), 1):
                yield key, {"seed": work[key][1]}
                assert len(json.loads(kept.read_text())) == i
        finally:
            ended.append(True)

    monkeypatch.setattr(recall, "side_by_side", backwards)
    args = recall.make_parser().parse_args([*RECALL, "--pe", "hope", "--seed", "3", "1", "2", "--json",
                                            str(tmp_path / "r.json")])
    assert [run["seed"] for run in recall.train_and_test_all(args, torch.device("cpu"))] == [3, 1, 2]
    kept.unlink()
    monkeypatch.setattr(recall, "replacing", full_disk)
    with pytest.raises(OSError):
        recall.train_and_test_all(args, torch.device("cpu"))
    assert len(ended) == 2  # not left to wait for what still runs


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"\xff"])
def test_a_damaged_file_of_finished_models_is_named(content, tmp_path, fails):
    kept = tmp_path / "r.json.partial"
    kept.write_bytes(content)
    code, lines = fails(recall, [*RECALL, "--json", str(tmp_path / "r.json")])
    assert code == 2 and len(lines) == 1 and str(kept) in lines[0] and "delete it" in lines[0], lines
    assert kept.read_bytes() == content


# --- language models


def test_a_repeated_passage_is_scored_at_its_second_position():
    """A model that repeats the token before the current one is right on a text of period 2 only."""
    period = torch.tensor([3, 4]).repeat(40)[None].repeat(2, 1)  # (2, 80)
    model = Answers(lambda tokens, targets: tokens.roll(1, dims=1))
    found = recall.copy_in_text(model, period, period[:, :8], distance=16)
    assert found["second_accuracy"] == 1 and found["gain"] == 0 and found["length"] == 24
    mixed = torch.randint(30, (2, 80), generator=torch.Generator().manual_seed(0))
    assert recall.copy_in_text(model, mixed, mixed[:, :8], distance=16)["second_accuracy"] < 0.5


class OnMPS(torch.Tensor):
    """A tensor of a device that has no float64, as has whatever is computed from it."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        result = super().__torch_function__(function, types, arguments, keywords or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return result


def test_passages_are_scored_on_devices_without_float64(monkeypatch):
    monkeypatch.setattr(torch, "as_tensor", lambda x, dtype: x.to(dtype))  # which a subclass hears of
    windows = torch.randint(30, (3, 50))
    model = Answers(lambda tokens, targets: tokens.roll(1, dims=1))
    expected = recall.copy_in_text(model, windows, windows[:, :8], 24)
    there = windows.as_subclass(OnMPS)
    with pytest.raises(TypeError):
        there.double()
    assert recall.copy_in_text(model, there, there[:, :8], 24) == expected


def test_a_needle_stands_at_both_places_and_its_second_half_alone_is_scored():
    windows, needles = torch.randint(30, (3, 50)), torch.randint(30, (3, 8))
    seen, right_from = [], 4

    def knows_the_second_half(tokens, targets):
        seen.append(tokens)
        right = torch.arange(tokens.size(1)) % 24 >= right_from - 1  # of the needles at 0 and 24
        return torch.where(right, targets, torch.full_like(targets, 31))

    model = Answers(knows_the_second_half)
    assert recall.copy_in_text(model, windows, needles, 24, scored_from=4)["second_accuracy"] == 1
    for row, (text, other) in enumerate(seen):
        assert torch.equal(text[:8], needles[row]) and torch.equal(text[24:], needles[row, :7])
        assert torch.equal(other[:8], needles[row - 1]) and torch.equal(other[8:], text[8:])
        assert torch.equal(text[8:24], windows[row, 8:24])
    assert recall.copy_in_text(model, windows, needles, 24, scored_from=3)["second_accuracy"] == pytest.approx(0.8)


def test_that_shuffled_text_has_occurred_is_no_gain():
    """Text counts up, needles do not. A model that is right once it has read a needle, any needle, gains nothing."""
    windows = (torch.randint(30, (4, 1)) + torch.arange(40)) % 30
    needles = recall.pick(windows[:, :8], torch.rand(4, 8).argsort(1))

    def right_after_shuffled_text(tokens, targets):
        shuffled = ((tokens[:, 1:8] - tokens[:, :7]) % 30 != 1).any(1, keepdim=True)
        return torch.where(shuffled, targets, torch.full_like(targets, 31))

    found = recall.copy_in_text(Answers(right_after_shuffled_text), windows, needles, 24, scored_from=4)
    assert found["second_accuracy"] == found["unseen_accuracy"] == 1 and found["gain"] == 0
    found = recall.copy_in_text(Answers(right_after_shuffled_text), windows, windows[:, :8], 24)
    assert found["second_accuracy"] == found["unseen_accuracy"] == 0  # in text, nothing is shuffled


def test_in_context_copying_by_checkpoints_writes_json_and_picture(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recall.main([finished_run, "--max_factor", "4", "--windows", "3", "--device", "cpu",
                 "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    result = json.loads((tmp_path / "t.json").read_text())
    for what in ("distances", "needles"):
        assert [bucket["distance"] for bucket in result["runs"][0][what]] == [4, 8, 12, 16, 32]
    output = capsys.readouterr().out
    assert "most frequent token" in output and len(result["dataset_sha256"]) == 64
    gain = output.split("needle: loss")[1].splitlines()[2].split()
    assert float(gain[1]) == pytest.approx(result["runs"][0]["needles"][0]["gain"], abs=1e-3)
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_needles_are_shuffled_passages_scored_from_their_middle(finished_run, monkeypatch):
    calls = []
    monkeypatch.setattr(recall, "copy_in_text", lambda model, windows, passages, distance, scored_from=1:
                        calls.append((windows, passages, distance, scored_from)))
    args = recall.make_parser().parse_args([finished_run, "--max_factor", "2", "--windows", "9", "--device", "cpu"])
    recall.test_language_models(args, Device(args))
    passages, needles = calls[:len(calls) // 2], calls[len(calls) // 2:]
    assert [call[2:] for call in passages] == [(distance, 1) for distance in (4, 8, 12, 16)]
    assert [call[2:] for call in needles] == [(distance, 2) for distance in (4, 8, 12, 16)]
    for (windows, passage, *_), (_, needle, *_) in zip(passages, needles):
        assert torch.equal(passage, windows[:, :4]) and not torch.equal(needle, passage)
        assert torch.equal(needle.sort().values, passage.sort().values)
        assert torch.equal(needle, needles[0][1])  # the same at every distance


def test_a_checkpoint_keeps_its_attn_scaling_unless_the_flag_is_given(finished_run, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(finished_run)
    torch.save({**checkpoint, "config": {**checkpoint["config"], "attn_scaling": "logn"}}, tmp_path / "logn.pt")
    used = []
    monkeypatch.setattr(recall, "copy_in_text", lambda model, *rest: used.append(model.config.attn_scaling))
    for given in ([], ["--attn_scaling", "none"], ["--attn_scaling", "logn"]):
        arguments = [finished_run, str(tmp_path / "logn.pt"), "--max_factor", "2", "--windows", "2", "--device", "cpu"]
        args = recall.make_parser().parse_args([*arguments, *given])
        recall.test_language_models(args, Device(args))
    assert used == [how for how in ("none", "logn", "none", "none", "logn", "logn") for _ in range(8)]


def test_in_context_copying_is_averaged_over_seeds_and_over_nothing_else():
    def run(name, gain):
        bucket = {"distance": 4, "gain": gain, "gain_stderr": 9.0}
        return {"name": name, "pe": "hope", "distances": [bucket, None], "needles": [bucket]}

    def settings(**changes):
        return groups.run_settings({"seed": 1, "out_dir": "a", "learning_rate": 0.1, **changes},
                                   vars(GPTConfig(pe="hope")))

    runs = [run("a", 1.0), run("b", 4.0), run("c", 2.0)]
    found = recall.mean_over_seeds(runs, [settings(), settings(learning_rate=0.2), settings(seed=2, out_dir="b")])
    assert [(mean["name"], mean["seeds"]) for mean in found] == [
        ("hope learning_rate 0.1", [1, 2]), ("hope learning_rate 0.2", [1])]
    for what in ("distances", "needles"):
        assert found[0][what][0] == {"distance": 4, "gain": 1.5, "gain_stderr": pytest.approx(0.5)}
        assert found[1][what] == runs[1][what]
    assert found[0]["distances"][1] is None
    assert recall.mean_over_seeds(runs[:2], [settings(), settings()]) == runs[:2]  # two checkpoints of one run
    found = recall.mean_over_seeds(runs[:2], [settings(), settings(learning_rate=0.2)])  # two runs
    assert [(mean["name"], mean["needles"]) for mean in found] == [(run["name"], run["needles"]) for run in runs[:2]]


@pytest.mark.parametrize("arguments, words", [
    (["--pe", "rotary"], "nope"), (["--pe", "hope:SL"], "not an arrangement"), (["{tmp}/none"], "no checkpoint"),
    (["--block_size", "38"], "use 39 or more"), (["--hard", "--block_size", "56"], "use 57 or more"),
    (["--pe", "nope+learned:SL:4"], "local_pe learned"), (["--window_pattern", "SXL"], "letters"),
    (["--seed", "-1"], "at least 0")])
def test_mistakes_get_one_line_and_exit_code_2(arguments, words, tmp_path, fails):
    code, lines = fails(recall, [text.format(tmp=tmp_path) for text in arguments])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
