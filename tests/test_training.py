"""
From text to a scored model: prepare, train, resume, sample, evaluate; and what makes a comparison fair.

    python -m pytest tests/test_training.py
"""
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import data.prepare
import data.sources
import eval_extrapolation
import sample
import train
from common import optimizer
from common.checkpoint import load_checkpoint, load_model
from data import loader
from data.tokenizer import load_tokenizer
from model import GPT, PE
from tests.conftest import TINY_FLAGS
from tests.test_encodings import all_logits, tiny


def run(dataset, out_dir, *flags):
    train.main([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), *flags])
    return load_checkpoint(Path(out_dir) / "ckpt.pt")


def log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def assert_same_weights(a, b):
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


# --- data


def test_documents_are_whole_and_disjoint_and_decode_back(dataset):
    meta, ids = loader.open_dataset(dataset)
    tokenizer = load_tokenizer(meta["tokenizer"])
    texts = {path.read_text() for path in (Path(dataset).parent / "text0").glob("*.txt")}
    found = {name: tokenizer.decode(part).split("<|endoftext|>")[:-1] for name, part in ids.items()}
    assert len(found["train"]) + len(found["val"]) == 40 and set(found["train"]) | set(found["val"]) == texts
    assert [len(found[name]) for name in ("train", "val")] == list(meta["documents"].values())
    assert 0.05 < meta["characters"]["val"] / sum(meta["characters"].values()) <= 0.1


def test_preparing_twice_gives_identical_files(dataset, tmp_path):
    source = str(Path(dataset).parent / "text0")
    again = data.prepare.prepare(source, "char", tmp_path / "again")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (again / name).read_bytes() == (Path(dataset) / name).read_bytes()


def test_a_single_novel_is_cut_near_its_end(tmp_path, capsys):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "novel.txt").write_text(text)
    data.prepare.main(["--source", str(tmp_path / "novel.txt"), "--out_dir", str(tmp_path / "set")])
    meta, ids = loader.open_dataset(tmp_path / "set")
    tokenizer = load_tokenizer(meta["tokenizer"])
    assert tokenizer.decode(ids["train"][:-1]) == text[:900] and tokenizer.decode(ids["val"][:-1]) == text[900:]
    assert "the end of the longest" in capsys.readouterr().out


def test_the_default_text_needs_no_network_and_holds_long_documents():
    documents = data.sources.read_pysrc()
    assert sum(map(len, documents)) > 30e6
    assert sum(len(text) > 50_000 for text in documents) > 150
    assert len(set(documents)) == len(documents)


# --- fair comparison


def test_two_encodings_see_the_same_batches_and_start_from_the_same_shared_weights(dataset, tmp_path, monkeypatch):
    seen = {}
    for pe in PE:
        batches, start = [], {}

        def watched(self, idx, targets=None, cache=None, batches=batches, start=start, forward=GPT.forward):
            if not start:
                start.update({name: value.clone() for name, value in self.state_dict().items()})
            if self.training:
                batches.append((idx.clone(), targets.clone()))
            return forward(self, idx, targets, cache)

        with monkeypatch.context() as patch:
            patch.setattr(GPT, "forward", watched)
            # another interval of evaluation and accumulation, which must not change what is read
            more = ["--eval_interval", "2"] if pe == "hope" else []
            run(dataset, tmp_path / pe, "--pe", pe, "--max_iters", "3", *more)
        seen[pe] = batches, start
    batches, start = seen["nope"]
    assert len(batches) == 3 and not torch.equal(batches[0][0], batches[1][0])
    for pe, (other_batches, other_start) in seen.items():
        assert all(torch.equal(a, b) for one, other in zip(batches, other_batches) for a, b in zip(one, other)), pe
        assert all(torch.equal(start[name], other_start[name]) for name in start), pe


def test_targets_are_the_inputs_one_token_later():
    cpu = torch.device("cpu")
    x, y = loader.training_batch(loader.token_tensor(np.arange(1000, dtype=np.uint16), cpu), 5, 12, 3, 7, cpu)
    assert x.shape == y.shape == (5, 12) and torch.equal(x + 1, y)
    assert len(set(x[:, 0].tolist())) == 5


def test_accumulated_small_batches_give_the_step_of_one_large_batch(dataset, tmp_path, monkeypatch):
    """Offsets are drawn per forward, so the large batch is made of the small ones' draws."""
    flags = ["--optimizer", "adamw", "--learning_rate", "2e-3", "--max_iters", "1"]
    small = run(dataset, tmp_path / "small", *flags, "--gradient_accumulation_steps", "3")
    draw = train.training_batch

    def joined(ids, batch_size, block_size, seed, index, device):
        parts = [draw(ids, 4, block_size, seed, i, device) for i in range(3)]
        return tuple(torch.cat(part) for part in zip(*parts))

    monkeypatch.setattr(train, "training_batch", joined)
    large = run(dataset, tmp_path / "large", *flags, "--batch_size", "12")
    for name in small["model"]:
        # Adam's first step is lr * sign(gradient), nearly: where a gradient is a rounding error the sign may differ
        close = (small["model"][name] - large["model"][name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


# --- training


def test_training_learns_and_the_log_has_a_line_per_evaluation(dataset, tmp_path):
    checkpoint = run(dataset, tmp_path, "--max_iters", "100", "--eval_interval", "25", "--learning_rate", "1e-2")
    lines = log(tmp_path)
    assert [line["iter"] for line in lines] == [0, 25, 50, 75, 100]
    assert abs(lines[0]["val_loss"] - math.log(99)) < 0.1 and lines[-1]["val_loss"] < 1.0
    assert lines[-1]["tokens"] == 100 * 4 * 16
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["val_loss"] == min(line["val_loss"] for line in lines) == checkpoint["best_val_loss"]
    assert "optimizer" not in best


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_minimum():
    config = optimizer.OptimizerConfig(warmup_iters=10, lr_decay_iters=110, learning_rate=1.0, min_lr=0.1)
    rates = [optimizer.learning_rate_at(step, config) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1])


def made_optimizer(model, **changes):
    made = optimizer.make_optimizer(model, optimizer.OptimizerConfig(**changes), torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return made, [[names[id(parameter)] for parameter in group["params"]] for group in made.param_groups]


def test_weight_decay_spares_norms_biases_and_what_encodings_learn():
    model = tiny("learned")
    made, (decayed, spared) = made_optimizer(model, optimizer="adamw")
    assert {name.split(".")[-2] for name in decayed} == {"wte", "c_attn", "c_proj", "c_fc"}
    weights = dict(model.named_parameters())
    assert all(weights[name].dim() == 1 or name == "transformer.wpe.weight" for name in spared)
    assert len(decayed) + len(spared) == len(weights)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    model = tiny("t5")
    made, (qkv, others, embeddings, vectors) = made_optimizer(model)
    assert len(qkv) == 2 and {name.split(".")[-2] for name in qkv} == {"c_attn"}
    assert len(others) == 6 and {name.split(".")[-2] for name in others} == {"c_proj", "c_fc"}
    assert embeddings == ["transformer.wte.weight"] and "transformer.wpe.table" in vectors
    assert len(qkv + others + embeddings + vectors) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.1, 0.1, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_takes_the_steps_of_pytorch_s_own_muon(dtype):
    """Which rounds to bfloat16: relative to the step, the difference is a rounding error."""
    torch.manual_seed(0)
    start = [torch.randn(48, 16), torch.randn(16, 48), torch.randn(24, 24)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    one = optimizer.Muon([{"params": ours}], lr=0.03, momentum=0.9, weight_decay=0.1, dtype=dtype)
    other = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, weight in zip(ours, theirs, start):
        assert (a - b).norm() < 0.05 * (a - weight).norm()


def test_stacked_matrices_are_orthogonalized_one_by_one():
    torch.manual_seed(0)
    stacked, gradient = torch.nn.Parameter(torch.zeros(48, 16)), torch.randn(48, 16)
    apart = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    stacked.grad = gradient.clone()
    for part, piece in zip(apart, gradient.split(16)):
        part.grad = piece.clone()
    for groups in ([{"params": [stacked], "parts": 3}], [{"params": apart}]):
        optimizer.Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(stacked, torch.cat(apart))


def test_muon_computes_in_bfloat16_only_if_the_model_does():
    made = [optimizer.make_optimizer(tiny("hope"), optimizer.OptimizerConfig(), torch.device("cpu"), dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [both.optimizers[0].dtype for both in made] == [torch.float32, torch.float32, torch.bfloat16]


def test_one_step_of_muon_moves_all_directions_of_a_matrix_by_its_rate_and_adamw_the_rest_by_its_own():
    model, idx = tiny("hope", n_embd=64), torch.randint(50, (4, 20))
    config = optimizer.OptimizerConfig(warmup_iters=0, lr_decay_iters=10, weight_decay=0.0, learning_rate=1e-3)
    made = optimizer.make_optimizer(model, config, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(idx, idx)[1].backward()
    assert optimizer.set_learning_rate(made, 0, config) == pytest.approx(1e-3)
    made.step()
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    singular = torch.linalg.svdvals(moved["transformer.h.0.attn.c_proj.weight"])
    assert 0.5 * 0.03 < singular.median() and singular.max() < 1.3 * 0.03  # Newton-Schulz is approximate
    assert moved["transformer.ln_f.weight"].abs().max().item() == pytest.approx(1e-3, rel=1e-2)
    optimizer.set_learning_rate(made, 10, config)  # the end of the schedule: a tenth of both
    assert sorted({group["lr"] for group in made.param_groups}) == pytest.approx([1e-4, 3e-3])


def test_rates_that_are_not_given_depend_on_the_optimizer():
    for name, rate in (("muon", 4e-2), ("adamw", 5e-3)):
        config = optimizer.OptimizerConfig(optimizer=name)
        assert (config.learning_rate, config.min_lr) == pytest.approx((rate, rate / 10))
    assert optimizer.OptimizerConfig(learning_rate=1.0, min_lr=0.0).min_lr == 0.0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("pe", ["hope", "learned"])
def test_ten_steps_resumed_for_ten_more_give_the_weights_of_twenty(dataset, tmp_path, pe, optimizer):
    flags = ["--pe", pe, "--optimizer", optimizer, "--dropout", "0.2", "--lr_decay_iters", "20"]
    whole = run(dataset, tmp_path / "whole", *flags, "--max_iters", "20")
    run(dataset, tmp_path / "parts", *flags, "--max_iters", "10")
    train.main(["--resume", "--out_dir", str(tmp_path / "parts"), "--max_iters", "20"])
    assert_same_weights(whole, load_checkpoint(tmp_path / "parts" / "ckpt.pt"))
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in log(tmp_path / name)]
             for name in ("whole", "parts")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(dataset, tmp_path, monkeypatch, capsys, stop_signal):
    whole = run(dataset, tmp_path / "whole", "--max_iters", "12")
    draw = train.training_batch

    def interrupting(*args):
        if args[4] == 7:                                  # index of the batch: in the middle of the eighth step
            os.kill(os.getpid(), stop_signal)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_batch", interrupting)
        with pytest.raises(SystemExit) as ended:
            run(dataset, tmp_path / "parts", "--max_iters", "12")
    assert ended.value.code == 128 + stop_signal
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["iter"] == 8
    assert f"--resume --out_dir {tmp_path / 'parts'}" in capsys.readouterr().out
    train.main(["--resume", "--out_dir", str(tmp_path / "parts")])
    assert_same_weights(whole, load_checkpoint(tmp_path / "parts" / "ckpt.pt"))
    assert [line["iter"] for line in log(tmp_path / "parts")] == [0, 5, 10, 12]


def test_flags_in_a_file_are_read_and_those_behind_it_win(tmp_path):
    (tmp_path / "small").write_text("# a comment\n--n_layer 3   # and another\n\n--n_embd 48 --pe rope\n")
    network, _, _ = train.parse([f"@{tmp_path / 'small'}", "--pe", "prope"])
    assert (network.n_layer, network.n_embd, network.pe) == (3, 48, "prope")


@pytest.mark.parametrize("path", sorted(Path("config").iterdir()))
def test_every_file_in_config_is_accepted_by_train(path):
    train.parse([f"@{path}", "--out_dir", "nowhere"])


# --- sampling


def test_sampling_streams_past_block_size_and_maps_unknown_characters(finished_run, capsys):
    sample.main(["--out_dir", finished_run, "--start", "one tw\u00f6 ", "--max_new_tokens", "40", "--top_k", "5"])
    out = capsys.readouterr().out
    assert "never seen 'ö'" in out
    text = out.split("instead\n")[1]
    assert text.startswith("one twö ") and len(text.split("\n---")[0]) >= 48


def test_sampling_follows_its_seed(finished_run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        sample.main(["--out_dir", finished_run, "--max_new_tokens", "30", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


# --- evaluation


@pytest.mark.parametrize("pe", [pe for pe in PE if pe != "learned"])
@pytest.mark.parametrize("chunk", [1, 13, 64, 500])
def test_one_pass_in_chunks_equals_scoring_each_prefix_separately(pe, chunk):
    model, windows = tiny(pe), torch.randint(50, (3, 65))
    losses = eval_extrapolation.score(model, windows, chunk=chunk, batch_size=2)
    for n in (1, 2, 31, 32, 33, 64):
        with torch.no_grad():
            logits, _ = model(windows[:, :n])             # no cache, and nothing behind the n-th token
        expected = -logits[:, 0].log_softmax(-1).gather(1, windows[:, [n]])[:, 0]
        torch.testing.assert_close(losses[:, n - 1], expected, atol=1e-4, rtol=0)


def test_learned_is_scored_up_to_its_limit_and_marked_behind_it():
    losses = eval_extrapolation.score(tiny("learned"), torch.randint(50, (2, 65)), chunk=20, batch_size=2)
    assert not losses[:, :32].isnan().any() and losses[:, 32:].isnan().all()
    bucket = eval_extrapolation.summarize(losses, torch.ones(2, 64), losses, [0, 32, 64], [64, 64])[1]
    assert bucket["nll"] is bucket["ppl"] is bucket["stderr"] is None and bucket["ppl_local"] == pytest.approx(math.e)


@pytest.mark.parametrize("width", [16, 32, 50, 96, 100])
def test_local_context_is_at_most_l_and_at_least_half_of_it(width):
    model, windows, L = tiny("rope"), torch.randint(50, (2, width + 1)), 32
    local = eval_extrapolation.score_local(model, windows, L, batch_size=2)
    for n in range(1, width + 1):                         # n tokens stand before the target
        candidates = []
        for context in range(min(n, L // 2), min(n, L) + 1):
            with torch.no_grad():
                logits = all_logits(model, windows[:, n - context:n])[:, -1]
            candidates.append(-logits.log_softmax(-1).gather(1, windows[:, [n]])[:, 0])
        assert min((local[:, n - 1] - c).abs().max() for c in candidates) < 1e-4


def test_scaled_runs_stand_beside_unscaled_ones_and_auto_gives_each_bucket_its_own_factor(finished_run, tmp_path):
    eval_extrapolation.main([finished_run, "--max_factor", "4", "--windows", "3",
                             "--rope_scaling", "none", "pi", "yarn", "--attn_scaling", "none", "logn",
                             "--json", str(tmp_path / "r.json")])
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [r["name"] for r in runs] == ["hope", "hope logn", "hope pi", "hope pi logn", "hope yarn", "hope yarn logn"]
    plain, scaled = runs[0]["buckets"], runs[2]["buckets"]
    assert plain[0] == scaled[0]                          # inside L the factor is 1
    checkpoint = load_checkpoint(finished_run)
    dataset = loader.open_dataset(checkpoint["dataset"]["path"])[1]["val"]
    windows = loader.document_windows(dataset, 98, 64, 3)
    for bucket, factor in zip(scaled[1:], (2.0, 4.0)):
        model = load_model(checkpoint, rope_scaling="pi", rope_factor=factor)
        with torch.no_grad():
            logits = all_logits(model, windows[:, :bucket["end"]])
        losses = -logits.log_softmax(-1).gather(-1, windows[:, 1:bucket["end"] + 1, None])[..., 0]
        assert bucket["nll"] == pytest.approx(losses[:, bucket["start"]:].mean().item(), abs=1e-5)


def test_sampling_under_auto_scaling_uses_one_factor_for_the_whole_text(finished_run, capsys):
    sample.main(["--out_dir", finished_run, "--start", "one two", "--max_new_tokens", "57", "--top_k", "1",
                 "--rope_scaling", "ntk", "--attn_scaling", "logn"])
    model = load_model(finished_run, rope_scaling="ntk", rope_factor=64 / 16, attn_scaling="logn")
    tokenizer = load_tokenizer(load_checkpoint(finished_run)["tokenizer"])
    idx = torch.tensor(tokenizer.encode("one two").astype(np.int64))[None]
    for _ in range(57):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert capsys.readouterr().out.split("\n---")[0] == tokenizer.decode(idx[0].tolist())


def test_windows_lie_inside_one_document_and_do_not_overlap():
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 300, size=40)
    ids = np.concatenate([np.append(np.arange(size) + 1000 * i, 65535) for i, size in enumerate(sizes)])
    windows = loader.document_windows(ids.astype(np.uint16), 65535, 20, 10**6)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()  # one document each, and no end-of-document id
    assert len(set(windows.flatten().tolist())) == windows.numel()
    some = loader.document_windows(ids.astype(np.uint16), 65535, 20, 8)
    assert len(some) == 8 and torch.equal(some[0], windows[0]) and torch.equal(some[-1], windows[-1])


def test_buckets_average_their_own_positions_and_the_error_is_over_windows():
    losses = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 8.0, 8.0]])
    local = losses - torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 2.0]])
    first, second = eval_extrapolation.summarize(losses, local, losses - 1, [0, 2, 4], [4, 8])
    assert (first["nll"], second["nll"]) == (2.0, 7.0) and first["stderr"] == 0 and second["stderr"] == pytest.approx(1)
    assert second["ppl"] == pytest.approx(math.exp(7)) and second["nll_above_first"] == 1
    assert first["nll_above_local"] == first["nll_above_local_stderr"] == 0
    assert (second["nll_above_local"], second["nll_above_local_stderr"]) == (2.0, pytest.approx(0.5))
    assert second["ppl_local"] == pytest.approx(math.exp(5))
    assert first["bits_per_character"] == pytest.approx(2 / math.log(2))
    assert second["bits_per_character"] == pytest.approx(3.5 / math.log(2))  # two characters a token
    assert eval_extrapolation.bucket_edges(8, 16) == [0, 8, 16, 32, 64, 128]
    assert eval_extrapolation.bucket_edges(8, 6) == [0, 8, 16, 32, 48]


def test_evaluation_writes_the_table_the_json_and_the_picture(dataset, finished_run, tmp_path, capsys):
    run(dataset, tmp_path / "rope", "--pe", "rope", "--max_iters", "10")
    run(dataset, tmp_path / "learned", "--pe", "learned", "--max_iters", "10")
    capsys.readouterr()
    files = [tmp_path / "r.json", tmp_path / "r.png"]
    eval_extrapolation.main([finished_run, str(tmp_path / "rope"), str(tmp_path / "learned"), "--windows", "5",
                             "--max_factor", "4", "--json", str(files[0]), "--plot", str(files[1])])
    out = capsys.readouterr().out
    assert "[0, 16)  " in out and "[32, 64)" in out and "±" in out and "is undefined" in out
    runs = json.loads(files[0].read_text())["runs"]
    assert [(r["name"], r["pe"], r["block_size"], r["windows"]) for r in runs] == [
        ("hope", "hope", 16, 5), ("rope", "rope", 16, 5), ("learned", "learned", 16, 5)]
    assert runs[0]["dataset_sha256"] == loader.open_dataset(dataset)[0]["sha256"]
    assert [(b["start"], b["end"]) for b in runs[0]["buckets"]] == [(0, 16), (16, 32), (32, 64)]
    assert {"nll", "stderr", "ppl", "ppl_local"} <= set(runs[0]["buckets"][0])
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_evaluation_scores_a_text_file_without_any_data_folder(finished_run, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("one two three " * 50)
    eval_extrapolation.main([finished_run, "--text", str(tmp_path / "book.txt"), "--windows", "3", "--max_factor", "2"])
    assert "book.txt" in capsys.readouterr().out
