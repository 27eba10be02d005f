"""
Single faults that other tests did not notice: dropout, sampling, initial values, clipping, best.pt, resuming, scores.

    python -m pytest tests/test_faults.py

The expected numbers are computed by hand: for models that predict the same distribution at every position, for
gradients that are given, for layers whose output is known. Most go through main(), as a user's command does.
"""
import base64
import json
import math
import re
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import eval_extrapolation
import sample
import train
from common import device as common_device
from common import optimizer
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import Place
from data.loader import open_dataset, token_tensor
from data.tokenizer import BPETokenizer, CharTokenizer
from model import GPT, PE, GPTConfig
from tests.conftest import TINY_FLAGS
from tests.test_encodings import tiny
from tests.test_training import log, run

CPU = torch.device("cpu")

# --- models and runs to compute with


def constant_checkpoint(probabilities, block_size=8, tokenizer=None):
    """A checkpoint whose model predicts the same probabilities for the characters a, b, ... everywhere.

    The last norm gives (1, 0, 0, 0) whatever it reads, and the first column of the embedding is ln p.
    """
    logits = torch.tensor(probabilities).log()  # (V,)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=len(logits), n_layer=1, n_head=1, n_embd=4, pe="nope"))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = logits
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(4)[0])
    tokenizer = tokenizer or CharTokenizer("ab")
    assert tokenizer.vocab_size == len(logits)
    return {"config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer.to_dict(), "iter": 5,
            "args": {"seed": 1}, "dataset": {"path": "none", "sha256": "0"}}


def evaluate(tmp_path, checkpoints, text, *flags):
    """Score checkpoints (name -> dict) on a text through main() -> name -> its buckets in the JSON."""
    paths = [tmp_path / f"{name}.pt" for name in checkpoints]
    for path, checkpoint in zip(paths, checkpoints.values()):
        save_checkpoint(path, checkpoint)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    eval_extrapolation.main([*map(str, paths), "--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "r.json"),
                             *flags])
    return {made["name"]: made["buckets"] for made in json.loads((tmp_path / "r.json").read_text())["runs"]}


def new_run(dataset, tmp_path, *flags, rank=0):
    """A Run that has not made a step, in the process of a rank."""
    network, config, _ = train.parse([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(tmp_path / "none"), *flags])
    meta, ids = open_dataset(dataset)
    place = Place(config, training_width=network.n_embd)
    place.rank = rank
    ids = {name: token_tensor(part, place.device) for name, part in ids.items()}
    return train.Run(replace(network, vocab_size=meta["vocab_size"]), config, meta, ids, place)


def gradient_norms(one_run):
    """Make a step -> norm of the gradient that the log reports, norm of the gradient that the optimizer receives."""
    received, update = [], one_run.optimizer.step

    def watched(*args, **options):
        gradients = [parameter.grad.flatten() for parameter in one_run.model.parameters()]
        received.append(torch.cat(gradients).norm().item())
        return update(*args, **options)

    one_run.optimizer.step = watched
    one_run.step()
    return one_run.grad_norm.item(), received[0]


# --- dropout


def dropped(x, expected, p):
    """Whether x is expected / (1 - p) with a fraction p of zeros, over some thousand independent numbers."""
    zero = x == 0
    torch.testing.assert_close(x[~zero], (expected / (1 - p))[~zero])
    return abs(zero.float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / x.numel())


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_dropout_acts_on_embeddings_on_the_outputs_of_attention_and_mlp_and_on_attention_weights(p):
    model, idx = tiny("nope", dropout=p, n_layer=1).train(), torch.randint(50, (8, 32))
    block, places = model.transformer.h[0], {}

    def keep_input(module, args):
        places["embedding"] = args[0], model.transformer.wte(idx)

    def keep(name, before):  # what `before` gives is what the dropout at the end of the module reads
        return lambda module, args, output: places.update({name: (output, before["output"])})

    block.register_forward_pre_hook(keep_input)
    for name, module in (("attention", block.attn), ("mlp", block.mlp)):
        projection = {}
        module.c_proj.register_forward_hook(lambda _, args, output, at=projection: at.update(output=output))
        module.register_forward_hook(keep(name, projection))
    model(idx)
    assert places.keys() == {"embedding", "attention", "mlp"}
    for name, (after, before) in places.items():
        assert dropped(after, before, p), name

    # With equal keys, weights are 1 / n for n tokens; with values of 1, the output is the sum of the weights that stay.
    with torch.no_grad():
        block.attn.c_attn.weight.zero_()
        block.attn.c_attn.bias.copy_(torch.cat((torch.zeros(64), torch.ones(32))))
    block.attn.c_proj.register_forward_pre_hook(lambda _, args: places.update(weights=args[0]))
    model(torch.randint(50, (2000, 2)))
    first, second = places["weights"][:, 0, [0, 16]], places["weights"][:, 1, [0, 16]]  # (2000, 2): a number per head
    assert dropped(first, torch.ones(2000, 2), p)
    stay = second * (1 - p) * 2  # of two weights: 0, 1 or 2
    torch.testing.assert_close(stay, stay.round(), atol=1e-5, rtol=0)
    assert abs(stay.mean().item() / 2 - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 8000)


def test_dropout_is_off_in_evaluation():
    model, idx = tiny("hope", dropout=0.5), torch.randint(50, (2, 20))
    assert torch.equal(model(idx, idx)[0], tiny("hope", dropout=0.0)(idx, idx)[0])


def test_each_process_draws_its_own_dropout_and_all_start_from_the_same_weights(dataset, tmp_path):
    for dropout, same in (("0.3", False), ("0", True)):
        runs = [new_run(dataset, tmp_path, "--dropout", dropout, rank=rank) for rank in (0, 1)]
        assert all(torch.equal(a, b) for a, b in zip(*(one.model.parameters() for one in runs)))
        losses, idx = [], torch.randint(50, (4, 16))
        for rank in (0, 1):
            one = new_run(dataset, tmp_path, "--dropout", dropout, rank=rank)  # its random state, just set
            losses.append(one.model(idx, idx)[1].item())
        assert (losses[0] == losses[1]) == same


# --- initial values


def deviation(parameter):
    return parameter.detach().std().item()


def test_matrices_that_write_to_the_residual_stream_start_smaller_the_more_of_them_there_are():
    """Their outputs add up: with n of them, each has a variance of 1 / n of that of the other matrices."""
    for n_layer in (2, 8):
        model = GPT(GPTConfig(n_layer=n_layer, n_embd=128))
        for block in model.transformer.h[:2]:
            others = deviation(block.attn.c_attn.weight)
            assert deviation(block.mlp.c_fc.weight) == pytest.approx(others, rel=0.05)
            for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                assert deviation(matrix) == pytest.approx(others / math.sqrt(2 * n_layer), rel=0.05)


def test_biases_start_at_zero_and_norms_at_one():
    for name, parameter in GPT(GPTConfig(n_layer=1)).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == float("ln" in name and name.endswith("weight"))).all(), name


def test_kerple_starts_uniform_between_0_and_2_and_between_0_and_1():
    encoding = GPT(GPTConfig(pe="kerple", n_head=500, n_embd=1000, n_layer=1)).transformer.wpe
    for values, end in ((encoding.r1, 2), (encoding.r2, 1)):
        counts = torch.histc(values.detach(), 5, 0, end)  # how many of the 500 heads are in each fifth
        assert counts.sum() == 500 and counts.min() > 60 and counts.max() < 145


def test_fire_starts_with_its_threshold_at_l_and_as_a_fresh_network_of_linear_layers():
    L, q_pos = 64, torch.arange(200)
    encoding = GPT(GPTConfig(pe="fire", block_size=L, n_head=200, n_embd=200, n_layer=1)).transformer.wpe
    by_distance = encoding.bias(q_pos, q_pos[:1])[:, :, 0]  # (H, Tq): query at n, key at 0
    network = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 200))
    for layer, weight, bias in ((network[0], encoding.weight_1[:, None], encoding.bias_1),
                                (network[2], encoding.weight_2, encoding.bias_2)):
        for own, fresh in ((weight, layer.weight), (bias, layer.bias)):
            assert deviation(own) == pytest.approx(deviation(fresh), rel=0.4 if fresh.numel() < 100 else 0.1)
            own_end, fresh_end = own.abs().max().item(), fresh.abs().max().item()  # uniform: up to the same bound
            assert own_end == pytest.approx(fresh_end, rel=0.15)
            with torch.no_grad():
                fresh.copy_(own)
    x = torch.log1p(0.1 * q_pos) / torch.log1p(0.1 * q_pos.clamp(min=L))  # the paper's c = 0.1
    torch.testing.assert_close(by_distance.T, network(x[:, None]), atol=1e-5, rtol=0)


def test_t5_starts_as_nope():
    idx, logits = torch.randint(50, (1, 20)), []
    for pe in ("t5", "nope"):
        torch.manual_seed(0)
        logits.append(GPT(GPTConfig(pe=pe, vocab_size=50)).eval()(idx, idx)[0])
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)  # the kernel takes another path


# --- the optimizer and the gradient


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.5), (0.3, 0.99)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_follows_its_formula_with_both_betas(name, betas):
    """Three gradients on a norm's weight, which does not decay, and on the embedding, which does."""
    config = optimizer.OptimizerConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5, beta1=betas[0],
                                       beta2=betas[1])
    model = tiny("nope", n_layer=1)
    made = optimizer.make_optimizer(model, config, torch.device("cpu"))
    for parameter, decay in ((model.transformer.ln_f.weight, 0.0), (model.lm_head.weight, 0.5)):
        x, m, v = parameter.detach().double(), 0.0, 0.0
        for t, gradient in enumerate((1.0, -3.0, 0.5), start=1):
            m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
            step = m / (1 - betas[0]**t) / (math.sqrt(v / (1 - betas[1]**t)) + 1e-8)
            x = x - 0.1 * (step + decay * x)
        made.state.clear() if name == "adamw" else made.optimizers[1].state.clear()
        for gradient in (1.0, -3.0, 0.5):
            for other in model.parameters():
                other.grad = torch.zeros_like(other)
            parameter.grad.fill_(gradient)
            made.step()
        torch.testing.assert_close(parameter.detach().double(), x, atol=1e-5, rtol=0)


def test_the_gradient_is_clipped_to_grad_clip_and_0_means_no_limit(dataset, tmp_path):
    norms = {clip: gradient_norms(new_run(dataset, tmp_path, "--grad_clip", clip)) for clip in ("0", "1e-3", "1e9")}
    norm = norms["1e9"][1]
    assert norm > 0.1 and norms["1e9"] == norms["0"] == pytest.approx((norm, norm))
    assert norms["1e-3"] == pytest.approx((norm, 1e-3), rel=1e-3)  # the log reports the norm before clipping


def test_float16_clips_the_true_gradient_and_not_the_scaled_one(dataset, tmp_path):
    for clip in ("1e-3", "0"):
        flags = "--grad_clip", clip, "--dtype"
        exact, rounded = (gradient_norms(new_run(dataset, tmp_path, *flags, dtype)) for dtype in ("float32", "float16"))
        assert rounded == pytest.approx(exact, rel=0.02)


# --- training


@pytest.mark.parametrize("factor, ends", [(2.9, True), (3.1, False)])
def test_a_loss_of_three_times_a_uniform_guess_counts_as_diverged_and_less_does_not(dataset, tmp_path, monkeypatch,
                                                                                     factor, ends):
    forward = GPT.forward

    def lossy(self, idx, targets=None, *args, **options):
        logits, loss = forward(self, idx, targets, *args, **options)
        return logits, loss * 0 + factor * math.log(self.config.vocab_size) if self.training else loss

    monkeypatch.setattr(GPT, "forward", lossy)
    if ends:
        assert run(dataset, tmp_path, "--max_iters", "2")["iter"] == 2
    else:
        with pytest.raises(RuntimeError, match="diverged"):
            run(dataset, tmp_path, "--max_iters", "2")


@pytest.fixture
def known_validation_losses(monkeypatch):
    """Evaluations find these losses, one after the other."""
    losses, forward = [4.0, 3.0, 5.0, 3.0, 2.5, 6.0], GPT.forward

    def known(self, idx, *args, **options):
        logits, loss = forward(self, idx, *args, **options)
        return logits, loss if self.training else torch.tensor(losses.pop(0))

    monkeypatch.setattr(GPT, "forward", known)


def test_best_pt_is_written_when_the_validation_loss_is_lower_than_ever_and_only_then(
        dataset, tmp_path, monkeypatch, known_validation_losses):
    save, written = train.save_checkpoint, []

    def watched(path, checkpoint):
        if path.name == "best.pt":
            written.append((checkpoint["iter"], checkpoint["val_loss"]))
        save(path, checkpoint)

    monkeypatch.setattr(train, "save_checkpoint", watched)
    flags = ["--eval_iters", "1", "--eval_interval", "2"]
    run(dataset, tmp_path, *flags, "--max_iters", "6")  # 4, 3, 5, 3
    assert written == [(0, 4.0), (2, 3.0)]
    train.main(["--resume", "--out_dir", str(tmp_path), "--max_iters", "10"])  # 2.5, 6
    assert written == [(0, 4.0), (2, 3.0), (8, 2.5)]
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best["iter"], best["val_loss"]) == (8, 2.5) and load_checkpoint(tmp_path / "ckpt.pt")["iter"] == 10


def test_a_file_that_cannot_be_written_does_not_count_as_written(dataset, tmp_path, monkeypatch):
    one_run = new_run(dataset, tmp_path)

    def full(path, checkpoint):
        raise OSError("No space left on device")

    one_run.iter = 3
    monkeypatch.setattr(train, "save_checkpoint", full)
    one_run.evaluate()
    one_run.save()
    assert one_run.best_val_loss == math.inf and one_run.saved == 0 and "No space" in str(one_run.write_error)
    monkeypatch.setattr(train, "save_checkpoint", lambda path, checkpoint: None)
    one_run.evaluate()
    one_run.save()
    assert one_run.best_val_loss == one_run.val_loss and one_run.saved == 3


def test_scoring_and_sampling_a_folder_take_best_pt_if_there_is_one(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "best.pt", constant_checkpoint([1.0, 1e-30, 1e-30, 1e-30]))
    save_checkpoint(tmp_path / "run" / "ckpt.pt", constant_checkpoint([1e-30, 1.0, 1e-30, 1e-30]))
    (tmp_path / "a.txt").write_text("a" * 100)
    eval_extrapolation.main([str(tmp_path / "run"), "--text", str(tmp_path / "a.txt"), "--max_factor", "2", "--json",
                             str(tmp_path / "r.json")])
    [scored] = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert scored["buckets"][0]["nll"] == pytest.approx(0, abs=1e-6)
    for written in "ab":
        capsys.readouterr()
        sample.main(["--out_dir", str(tmp_path / "run"), "--start", "b", "--max_new_tokens", "9"])
        assert capsys.readouterr().out.startswith("b" + 9 * written + "\n")
        (tmp_path / "run" / "best.pt").unlink(missing_ok=True)


def test_resuming_takes_ckpt_pt(dataset, tmp_path, known_validation_losses):
    run(dataset, tmp_path, "--eval_iters", "1", "--eval_interval", "2", "--max_iters", "4")  # 4, 3, 5
    assert load_checkpoint(tmp_path)["iter"] == 2
    _, _, checkpoint = train.parse(["--resume", "--out_dir", str(tmp_path), "--max_iters", "6"])
    assert checkpoint["iter"] == 4


COMPUTED = ["--learning_rate 1e-4", "--muon_learning_rate 1e-4", "--optimizer adamw", "--min_lr 1e-5", "--beta2 0.9",
            "--muon_momentum 0.8", "--weight_decay 0.3", "--warmup_iters 5", "--lr_decay_iters 99", "--grad_clip 0.7",
            "--batch_size 5", "--gradient_accumulation_steps 2", "--seed 2", "--dropout 0.1", "--dtype bfloat16",
            "--block_size 17", "--n_layer 3", "--no-bias", "--hope_cutoff 2", "--init_from elsewhere"]


@pytest.mark.parametrize("flag", COMPUTED)
def test_a_resumed_run_refuses_to_compute_something_else(finished_run, fails, flag):
    code, lines = fails(train, ["--resume", "--out_dir", finished_run, "--max_iters", "20", *flag.split()])
    name = flag.split()[0].replace("--no-", "--")
    assert code == 2 and len(lines) == 1 and f"{name} was " in lines[0], lines


def test_the_seconds_in_the_log_include_those_before_a_resume(dataset, tmp_path, capsys):
    checkpoint = run(dataset, tmp_path, "--max_iters", "5")
    assert 0 < checkpoint["seconds"] < 100 and log(tmp_path)[-1]["seconds"] == pytest.approx(
        checkpoint["seconds"], abs=1)
    save_checkpoint(tmp_path / "ckpt.pt", {**checkpoint, "seconds": 5000.0})
    started = time.time()
    train.main(["--resume", "--out_dir", str(tmp_path), "--max_iters", "10"])
    elapsed = time.time() - started
    assert 5000 <= log(tmp_path)[-1]["seconds"] <= 5000 + elapsed + 0.01
    assert 5000 <= load_checkpoint(tmp_path / "ckpt.pt")["seconds"] <= 5000 + elapsed
    assert f"{5000 / 60:.1f} minutes" in capsys.readouterr().out


@pytest.mark.parametrize("width, has_units, expected", [
    (255, True, torch.float32), (256, True, torch.bfloat16), (1024, True, torch.bfloat16),
    (1024, False, torch.float32), (0, True, torch.float32)])  # 0: to score and to sample
def test_a_cpu_with_bfloat16_units_trains_in_bfloat16_at_width_256_or_more(monkeypatch, width, has_units, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units, raising=False)
    monkeypatch.setattr(common_device, "HAS_BFLOAT16", lambda: has_units, raising=False)
    assert Place(common_device.DeviceConfig(device="cpu"), training_width=width).dtype == expected
    assert Place(common_device.DeviceConfig(device="cpu", dtype="float16"), training_width=width).dtype == torch.float16


def test_the_memory_that_training_is_said_to_need_is_the_sum_of_its_parts():
    network = GPTConfig(block_size=4, vocab_size=10, n_layer=2, n_embd=8)
    weights = 2 * 12 * 8 * 8 + 10 * 8  # four matrices per layer, and the embedding
    kept = 3 * 4 * 2 * 22 * 8  # 22 vectors for each of 3 x 4 tokens and 2 layers
    logits = 3 * 4 * 3 * 10  # with their gradient and their softmax, always in float32
    assert common_device.memory_estimate(network, 3, torch.float32) == 16 * weights + 4 * kept + 4 * logits
    assert common_device.memory_estimate(network, 3, torch.bfloat16) == 16 * weights + 2 * kept + 4 * logits


# --- scores


THIRDS = [1 / 3, 1 / 3, 1 / 6, 1 / 6]


def test_the_loss_perplexity_and_bits_of_a_constant_model_are_those_of_its_distribution(tmp_path):
    probabilities = {"a": 0.5, "b": 0.125}
    [buckets] = evaluate(tmp_path, {"run": constant_checkpoint([*probabilities.values(), 0.25, 0.125])},
                         "ab" * 500, "--max_factor", "4", "--windows", "5").values()
    nll = (math.log(2) + math.log(8)) / 2  # every second token is an a
    assert [(bucket["start"], bucket["end"]) for bucket in buckets] == [(0, 8), (8, 16), (16, 32)]
    for bucket in buckets:
        assert bucket["nll"] == pytest.approx(nll, abs=1e-5) and bucket["stderr"] == pytest.approx(0, abs=1e-6)
        assert bucket["ppl"] == bucket["ppl_local"] == pytest.approx(4, abs=1e-4)
        assert bucket["bits_per_character"] == pytest.approx(2, abs=1e-5)
        assert bucket["nll_above_first"] == bucket["nll_above_first_stderr"] == 0


def test_the_loss_above_the_first_run_is_the_difference_on_the_same_tokens(tmp_path, capsys):
    """Windows of a alone and of b alone: the losses differ by window, and so do the differences."""
    first, second = [0.5, 0.25, 0.125, 0.125], [0.25, 0.5 / 3, 0.25, 1 / 3]
    text = ("a" * 17 + "b" * 17) * 2
    scored = evaluate(tmp_path, {"one": constant_checkpoint(first), "two": constant_checkpoint(second)}, text,
                      "--max_factor", "2", "--windows", "4")
    differences = [math.log(first[i] / second[i]) for i in (0, 1)]  # ln 2, ln 1.5
    for bucket in scored["two"]:
        assert bucket["nll_above_first"] == pytest.approx(sum(differences) / 2, abs=1e-5)
        spread = abs(differences[0] - differences[1]) / 2  # the standard deviation of four values is 2 / sqrt(3) of it
        assert bucket["nll_above_first_stderr"] == pytest.approx(spread / math.sqrt(3), abs=1e-5)
    assert all(bucket["nll_above_first"] == 0 for bucket in scored["one"])
    above = re.search(r"above that of one.*?\n.*?\ntwo +(\S+) ± (\S+)", capsys.readouterr().out, re.DOTALL)
    assert [float(number) for number in above.groups()] == [round(sum(differences) / 2, 3),
                                                            round(spread / math.sqrt(3), 3)]


def test_the_error_of_a_perplexity_is_that_of_the_loss_times_the_perplexity(tmp_path, capsys):
    probabilities = [0.5, 0.01, 0.25, 0.24]
    [[bucket, _]] = evaluate(tmp_path, {"run": constant_checkpoint(probabilities)}, "a" * 17 + "b" * 17,
                             "--max_factor", "2", "--windows", "2").values()
    losses = [-math.log(p) for p in probabilities[:2]]
    nll, stderr = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert bucket["nll"] == pytest.approx(nll, abs=1e-5) and bucket["stderr"] == pytest.approx(stderr, abs=1e-5)
    ppl = math.exp(nll)
    assert f"{ppl:.2f} ± {stderr * ppl:.2f}" in capsys.readouterr().out and ppl > 10


@pytest.mark.parametrize("order", [(8, 16), (16, 8)])
def test_runs_of_two_trained_contexts_share_the_columns_of_the_shorter_one(tmp_path, order):
    checkpoints = {f"L{size}": constant_checkpoint([0.5, 0.25, 0.125, 0.125], size) for size in order}
    scored = evaluate(tmp_path, checkpoints, "ab" * 500, "--max_factor", "4", "--windows", "3")
    assert list(scored) == [f"L{size}" for size in order]
    for buckets in scored.values():
        assert [(bucket["start"], bucket["end"]) for bucket in buckets] == [(0, 8), (8, 16), (16, 32)]
        assert [bucket["nll"] for bucket in buckets] == pytest.approx([math.log(8) / 2] * 3, abs=1e-5)


def random_checkpoint(**changes):
    """A model with random weights, whose losses depend on all that it sees."""
    model = tiny("rope", vocab_size=4, block_size=16, **changes)
    return {**constant_checkpoint(THIRDS), "config": asdict(model.config), "model": model.state_dict()}


def test_flags_that_change_no_score_are_noted(tmp_path, capsys):
    text = "ab" * 100
    evaluate(tmp_path, {"still": constant_checkpoint(THIRDS)}, text, "--rope_scaling", "pi", "--max_factor", "2",
             "--dataset", "data/any")
    out = capsys.readouterr().out
    assert "note: --rope_scaling has no effect on still" in out and "note: --dataset has no effect with --text" in out


def test_weights_of_another_step_than_most_are_named(tmp_path, capsys):
    steps = {"a": 40, "b": 20, "c": 40}
    checkpoints = {name: {**constant_checkpoint(THIRDS), "iter": step} for name, step in steps.items()}
    evaluate(tmp_path, checkpoints, "ab" * 100, "--max_factor", "2")
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: not all weights")]
    assert note.startswith("note: not all weights are of step 40 ") and note.endswith(": b of step 20")


def test_as_many_windows_are_scored_at_a_time_as_fit_in_half_a_gigabyte():
    config = dict(n_layer=4, n_head=1, n_embd=10, block_size=50, vocab_size=20, pe="nope")
    forward = 100 * (3 * 20 + 16 * 10)  # numbers for each token of a chunk
    cache = 2 * 10 * 4 * 1000  # keys and values of four layers and 1,000 tokens
    assert eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU) == int(0.5e9 / 4 / (forward + cache))
    config |= dict(window_pattern="SL", window=30)
    cache = 2 * 10 * (2 * 1000 + 2 * (30 + 100))  # a layer with a window keeps the window and the chunk
    assert eval_extrapolation.windows_at_a_time(config, 1000, 100, CPU) == int(0.5e9 / 4 / (forward + cache))
    assert eval_extrapolation.windows_at_a_time(config | dict(block_size=10**6), 1000, 100, CPU) == 1


def test_the_local_score_has_the_whole_trained_context_of_each_run(tmp_path):
    """Inside L it is the score itself, to the last token, whatever the L of the other runs is."""
    text = "".join("ab"[i * i % 7 % 2] for i in range(500))
    short, long = random_checkpoint(), random_checkpoint()
    long["config"]["block_size"] = 32
    scored = evaluate(tmp_path, {"short": short, "long": long}, text, "--max_factor", "4", "--windows", "4")
    same = {name: [bucket["ppl_local"] == pytest.approx(bucket["ppl"], rel=1e-5) for bucket in buckets]
            for name, buckets in scored.items()}
    assert same == {"short": [True, False, False], "long": [True, True, False]}


def bytes_and_pairs():
    """A tokenizer of the 256 bytes, so that a Japanese character is three tokens."""
    return BPETokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))


def test_bits_per_character_count_the_characters_that_begin_in_the_predicted_tokens(tmp_path):
    """17 tokens. Bucket one predicts tokens 1 to 8 (two characters begin), bucket two tokens 9 to 16 (all ASCII)."""
    tokenizer = bytes_and_pairs()
    checkpoint = constant_checkpoint([1 / 257] * 257, tokenizer=tokenizer)
    [buckets] = evaluate(tmp_path, {"run": checkpoint}, "日本語" + "abcdefgh", "--max_factor", "2", "--windows",
                         "1").values()
    bits = math.log2(257)
    assert [bucket["bits_per_character"] for bucket in buckets] == pytest.approx([bits * 8 / 2, bits], rel=1e-5)


# --- sampling


def test_temperature_divides_the_logits(tmp_path, capsys):
    """With p = 0.9 and 0.1: at temperature 2 the odds of 9 become 3, at 0.5 they become 81."""
    save_checkpoint(tmp_path / "run.pt", constant_checkpoint([0.9, 0.1, 1e-30, 1e-30]))
    for temperature, odds in (("0.5", 81), ("1", 9), ("2", 3)):
        sample.main(["--out_dir", str(tmp_path / "run.pt"), "--start", "a", "--temperature", temperature,
                     "--max_new_tokens", "800", "--top_k", "2"])
        text = capsys.readouterr().out.split("\n---")[0]
        assert len(text) == 801
        p = 1 / (1 + odds)
        assert abs(text.count("b") / 800 - p) < 5 * math.sqrt(p * (1 - p) / 800)


def streamed(values, capsys):
    """What print_stream has printed after each token of bytes_and_pairs() (id = byte), and at the end."""
    printed = []

    def tokens():
        for value in values:
            yield torch.tensor([[value]])
            printed.append(capsys.readouterr().out)

    sample.print_stream(tokens(), bytes_and_pairs())
    return printed, capsys.readouterr().out.split("\n---")[0]


def test_a_character_of_several_tokens_is_printed_with_its_last_one(capsys):
    assert streamed("aé€😀b".encode(), capsys)[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_a_character_that_the_last_token_leaves_incomplete_is_marked(capsys):
    printed, rest = streamed("a€".encode()[:-1], capsys)
    assert printed == ["a", "", ""] and rest == "\ufffd"


def test_stray_bytes_do_not_hold_back_or_tear_what_follows(capsys):
    printed, rest = streamed(b"\x80" * 9 + b"a", capsys)
    assert "".join(printed) + rest == 9 * "\ufffd" + "a"
    assert len("".join(printed[:8])) >= 5 and printed[-1].endswith("a")  # shown within four tokens
    printed, rest = streamed(b"\x80" + "😀b".encode(), capsys)
    assert "".join(printed) + rest == "\ufffd😀b"


@pytest.mark.parametrize("pe", PE)
def test_top_k_larger_than_the_vocabulary_is_all_of_it(pe):
    torch.manual_seed(0)
    model, idx = tiny(pe, vocab_size=3), torch.zeros(300, 1, dtype=torch.long)
    assert set(model.generate(idx, 1, top_k=500)[:, 1].tolist()) == {0, 1, 2}
