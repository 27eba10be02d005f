"""The benchmark: what it compares, its baseline, and races whose clock is known."""
import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from common.device import Device, DeviceConfig
from experiments import bench
from model import GPT, PE
from tests.conftest import tiny

CPU = Device(DeviceConfig(device="cpu", dtype="float32"))

TINY_BENCH = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --repeats 1 --device cpu".split()


def test_the_benchmark_can_be_imported_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as if there were no such module
    importlib.reload(bench)


def test_the_benchmark_compares_every_encoding_with_nope(tmp_path, capsys):
    sizes = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --vocab_size 11 --repeats 1".split()
    bench.main(["train", "evaluate", *sizes, "--device", "cpu", "--dtype", "float32",
                "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["train"]["encodings"]) == set(PE) and set(result["evaluate"]) == {"hope", "alibi"}
    for found in result["train"]["encodings"].values():
        assert found["ratio"] == pytest.approx(found["seconds"] / found["nope_seconds"])  # of a single round
    assert result["config"]["n_embd"] == 16 and "tokens/s" in capsys.readouterr().out


def test_the_benchmark_of_windows_compares_with_the_same_network_without(tmp_path, monkeypatch, capsys):
    generated = []  # 1,000 tokens take a while
    monkeypatch.setattr(GPT, "generate", lambda model, prompt, n, top_k: generated.append((model.config.window, n)))
    bench.main(["windows", *TINY_BENCH, "--pe", "nope+rope:SL:3", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["windows"]["nope+rope:SL:3"]
    assert all(set(row) == {"nope", "nope+rope:SL:3"} for row in found.values()) and len(found) == 5
    # keys and values of 16 channels in float32: 1,000 tokens in each layer, or window - 1 = 2 in the first
    assert found["cache in bytes after 1,000 tokens"] == {"nope": 2 * 128 * 1000, "nope+rope:SL:3": 128 * 1002}
    assert found["a training step"]["nope"]["ratio"] == 1 and "0.26 MB" in capsys.readouterr().out
    assert set(generated) == {(0, 1000), (3, 1000)}


def test_the_benchmark_of_the_compiler_takes_the_same_step_compiled_and_not(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model.config.pe) or model)
    bench.main(["compile", *TINY_BENCH, "--pe", "hope", "alibi", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["compile"]
    assert compiled == list(found) == ["hope", "alibi"] and all(row["compiled"]["ratio"] > 0 for row in found.values())
    assert all(row["as it is"]["ratio"] == 1 and row["compiled"]["first step"] > 0 for row in found.values())


@pytest.fixture
def gpu(monkeypatch):
    """A device that says it is a GPU with bfloat16, played by the CPU."""
    device = Device(DeviceConfig(device="cpu", dtype="bfloat16"))
    device.type, device.autocast = "cuda", lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    return device


def arguments(*more):
    args = bench.make_parser().parse_args([*TINY_BENCH, *more])
    return args, {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}


def test_on_a_gpu_the_baseline_has_our_number_format_compiler_and_kernels(gpu, monkeypatch, capsys):
    compiled, formats, fused, step = [], set(), [], bench.training_step

    def training_step(model, optimizer, x, y, autocast):
        with autocast:
            formats.add((type(model).__name__, model(x, y)[0].dtype))
        fused.extend(group["fused"] for group in getattr(optimizer, "optimizers", [optimizer])[-1].param_groups)
        step(model, optimizer, x, y, autocast)

    monkeypatch.setattr(bench, "training_step", training_step)
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    args, config = arguments("--compile")
    bench.bench_against_plain(args, config, gpu, bench.step_maker(args, config, gpu))
    assert formats == {("PlainGPT", torch.bfloat16), ("GPT", torch.bfloat16)} and all(fused)
    assert [name for name in compiled if "GPT" in name] == ["PlainGPT", "GPT", "GPT"]
    assert "plain GPT, bfloat16" in capsys.readouterr().out
    assert bench.nanogpt_device(gpu) is gpu and bench.nanogpt_device(CPU).dtype == torch.float32


def test_the_profile_counts_the_time_of_a_gpu_where_there_is_one(gpu, monkeypatch):
    device_types = torch.autograd.DeviceType
    events = [SimpleNamespace(key=key, device_type=kind, self_cpu_time_total=cpu, self_device_time_total=device)
              for key, kind, cpu, device in (("aten::mm", device_types.CPU, 1e6, 6e6),
                                             ("aten::gelu", device_types.CPU, 3e6, 2e6),
                                             ("sm80_gemm_mm", device_types.CUDA, 0, 6e6))]  # the kernel of the first

    class Profiler:
        def __enter__(self):
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    args, config = arguments()
    on_gpu, on_cpu = (bench.bench_profile(args, config, device) for device in (gpu, CPU))
    assert (on_gpu["seconds"], on_gpu["shares"]["matrix products"]) == (8, 0.75)
    assert (on_cpu["seconds"], on_cpu["shares"]["matrix products"]) == (4, 0.25)


def test_more_runs_than_torch_compiles_in_a_process_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("train.pick_compile", lambda choice, *_: choice)
    names = ["--dataset", dataset, "--compete", *[f"muon:{n}" for n in range(1, 10)]]
    assert len(bench.make_runs(*arguments("--no-compile", *names), CPU, 1, str(tmp_path))) == 9
    with pytest.raises(ValueError, match="9 runs are too many"):
        bench.make_runs(*arguments("--compile", *names), CPU, 1, str(tmp_path))


def test_the_baseline_is_nanogpts_network_with_nanogpts_settings(dataset, tmp_path):
    """Its weights, put into a GPT with learned positions, which is GPT-2, give the same logits."""
    args = bench.make_parser().parse_args(["time_to_loss", *TINY_BENCH, "--dataset", dataset, "--compete", "nanogpt:7"])
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    run = bench.make_runs(args, sizes, CPU, 3, str(tmp_path))["nanogpt, 7 steps"]
    plain, model = run.model, GPT(run.model.config)
    weights = {"transformer.wte.weight": plain.tokens.weight, "transformer.wpe.weight": plain.positions.weight,
               "transformer.ln_f.weight": plain.norm.weight, "lm_head.weight": plain.head.weight}
    for i, layer in enumerate(plain.layers):
        for name, part in zip(("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"), layer):
            weights[f"transformer.h.{i}.{name}.weight"] = part.weight
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in model.state_dict().items()}
    for name, weight in model.state_dict().items():  # the same initial distribution
        assert weights[name].std().item() == pytest.approx(weight.std().item(), rel=0.35, abs=1e-6)
    model.load_state_dict(weights)
    tokens = torch.randint(run.model.config.vocab_size, (2, 8))
    for ours, theirs in zip(model(tokens, tokens), plain(tokens, tokens)):
        torch.testing.assert_close(ours, theirs)
    rates = []
    for _ in range(7):
        run.step()
        rates.append(run.lr)
    assert rates[0] == pytest.approx(1e-3 / 101) and run.config.lr_decay_iters == 7
    assert type(run.optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0]
    assert sum(w.numel() for group in run.optimizer.param_groups for w in group["params"]) == sum(
        w.numel() for w in plain.parameters())


class Clockwork:
    """A run whose steps are noted; each lowers the loss by 0.1."""

    def __init__(self, name, steps, taken):
        self.name, self.taken, self.iter, self.tokens_per_step = name, taken, 0, 5
        self.config, self.device = bench.TrainConfig(max_iters=steps, batch_size=2), CPU
        self.model = self.compiled_model = tiny("nope")
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.ids = {"train": torch.zeros(100, dtype=torch.int16)}

    def step(self):
        self.iter += 1
        self.taken.append(self.name)

    def evaluate(self):
        return {"val_loss": 5 - 0.1 * self.iter}


def test_a_race_advances_all_runs_by_the_same_part_of_their_schedule_and_times_their_steps_only(monkeypatch):
    taken = []
    monkeypatch.setattr(bench, "seconds", lambda call, device: call() or {"a": 1.0, "b": 3.0}[taken[-1]])
    curves = bench.race({"a": Clockwork("a", 9, taken), "b": Clockwork("b", 3, taken)}, torch.device("cpu"), 2)
    assert "".join(taken) == "abaaabaaabaa"
    assert [(point["iter"], point["seconds"], point["tokens"]) for point in curves["a"]] == [
        (n, n, 5 * n) for n in (2, 4, 6, 8, 9)]
    assert [(point["iter"], point["seconds"]) for point in curves["b"]] == [(2, 6), (3, 9)]
    found = bench.reached({**curves, "fast": [{"iter": 1, "tokens": 7, "seconds": 3.0, "val_loss": 4.0},
                                              {"iter": 2, "tokens": 14, "seconds": 30.0, "val_loss": 1.0}]})
    assert found["a"] == {"last loss": pytest.approx(4.1), "loss by then": pytest.approx(4.1), "steps": 9, "tokens": 45,
                          "seconds": 9, "ratio": 1}
    assert found["b"]["seconds"] == found["b"]["ratio"] == math.inf and found["b"]["loss by then"] == pytest.approx(4.7)
    assert found["fast"]["ratio"] == pytest.approx(1 / 3) and found["fast"]["loss by then"] == 4.0


def test_time_to_loss_prints_medians_over_seeds_and_draws_them(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bench.main(["time_to_loss", *TINY_BENCH, "--dataset", dataset, "--seed", "1", "2", "--eval_interval", "2",
                "--eval_iters", "1", "--compete", "nanogpt:4", "muon:4", "adamw:4:1e-9", "--pe", "hope:SL:2",
                "--warmup_iters", "1", "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")])
    result = json.loads((tmp_path / "t.json").read_text())["time_to_loss"]
    names = ["nanogpt, 4 steps", "hope:SL:2 muon, 4 steps", "hope:SL:2 adamw 1e-09, 4 steps"]
    assert list(result["medians"]) == names and result["seeds"] == [1, 2] and len(result["races"]) == 2
    assert [point["iter"] for point in result["races"][1][names[1]]] == [2, 4]
    assert result["medians"][names[0]]["ratio"] == 1 and result["medians"][names[2]]["seconds"] is None
    assert "medians over 2 seeds" in capsys.readouterr().out and (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of the parent is counted on Linux only")
def test_the_memory_of_an_encoding_does_not_include_that_of_the_benchmark_itself(monkeypatch, capsys):
    ballast = torch.ones(400_000_000)  # 1.6 GB
    monkeypatch.setattr(bench, "PE", {"nope": PE["nope"]})
    bench.main(["memory", *"--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --device cpu".split()])
    gigabytes = float(capsys.readouterr().out.split()[-2])
    assert 0.05 < gigabytes < 1.2 and len(ballast)


@pytest.mark.parametrize("arguments, words", [
    (["time_to_loss", "--compete", "sgd:10"], "not a way to train"), (["speed"], "no benchmark"),
    (["time_to_loss", "--compete", "nanogpt:10:1e-3"], "nanogpt:STEPS"), (["windows", "--pe", "hope:S"], "arrangement"),
    (["time_to_loss", "--compete", "muon:0"], "at least 1")])
def test_mistakes_get_one_line_and_exit_code_2(arguments, words, tmp_path, fails):
    code, lines = fails(bench, [text.format(tmp=tmp_path) for text in arguments])
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
