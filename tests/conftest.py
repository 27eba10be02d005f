"""Shared by the tests: a tiny text, runs and models, and ways to call and interrupt the scripts.

Tests run on the CPU with one thread, whatever the machine has.
"""
import base64
import json
import multiprocessing
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import data.prepare
import train
from common import flags
from common.checkpoint import load_checkpoint
from data.tokenizer import BPETokenizer, CharTokenizer
from model import GPT, GPTConfig

PROJECT = Path(train.__file__).resolve().parent
TINY_FLAGS = ("--block_size 16 --n_layer 2 --n_head 2 --n_embd 32 --batch_size 4 --warmup_iters 2 "
              "--eval_interval 5 --eval_iters 2 --sample_chars 0 --device cpu").split()

torch.set_num_threads(1)  # the bits of a sum depend on their number
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when a GPU is first asked for
torch.accelerator.current_accelerator = lambda check_available=False: None

# Children are copies of a process that has imported all this: seconds saved at each of them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.conftest", "torch._dynamo"])  # AdamW imports the latter


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- data and runs


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """40 documents of 200 to 2,000 words that follow each other by simple rules, as characters."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    next_words = {"one": ["two", "three"], "two": ["three"], "three": ["one"]}
    for i in range(40):
        words = ["one"]
        for _ in range(generator.randint(200, 2000)):
            words.append(generator.choice(next_words[words[-1]]))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return str(data.prepare.prepare(str(folder), "char", folder.parent / "tiny_char",
                                     charset="ascii"))


def run(dataset, out_dir, *flags):
    """Train a tiny model -> its ckpt.pt."""
    train.main([*TINY_FLAGS, "--dataset", dataset, "--out_dir", str(out_dir), *flags])
    return load_checkpoint(Path(out_dir) / "ckpt.pt")


def resumed(out_dir, *flags):
    """Continue a run -> its ckpt.pt."""
    train.main(["--resume", "--out_dir", str(out_dir), *flags])
    return load_checkpoint(Path(out_dir) / "ckpt.pt")


def continued(start, dataset, out_dir, *flags):
    """Train five steps from the weights of another run, with the network's flags from there -> its
    ckpt.pt."""
    run_flags = TINY_FLAGS[TINY_FLAGS.index("--batch_size"):]
    train.main([*run_flags, "--dataset", dataset, "--out_dir", str(out_dir),
                "--init_from", str(start), "--max_iters", "5", *flags])
    return load_checkpoint(Path(out_dir) / "ckpt.pt")


def log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def assert_same_weights(a, b):
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def assert_same_run(a, b):
    """Two folders hold the same run: latest and best weights, log, and no other files."""
    for name in ("ckpt.pt", "best.pt"):
        ours, theirs = load_checkpoint(Path(a) / name), load_checkpoint(Path(b) / name)
        assert_same_weights(ours, theirs)
        assert ours["iter"] == theirs["iter"] and ours["best_val_loss"] == theirs["best_val_loss"]
    ours, theirs = ([{**line, "seconds": 0} for line in log(folder)] for folder in (a, b))
    assert ours == theirs
    assert {path.name for path in Path(a).iterdir()} == {path.name for path in Path(b).iterdir()}


@pytest.fixture(scope="session")
def finished_run(dataset, tmp_path_factory):
    """The folder of a HoPE run of ten steps."""
    out_dir = str(tmp_path_factory.mktemp("out") / "hope")
    run(dataset, out_dir, "--max_iters", "10")
    return out_dir


# --- models


def tiny(pe, **changes):
    """A small untrained model, ready to evaluate. Its weights are large: attention is far from
    uniform."""
    torch.manual_seed(0)
    config = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, pe=pe)
    model = GPT(GPTConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(10)
        for encoding in dict.fromkeys(model.encodings.values()):
            for parameter in encoding.parameters():  # away from where they start
                parameter.add_(torch.rand_like(parameter))
    return model


def all_logits(model, idx):
    """Token ids (B, T) -> logits of all positions (B, T, V)."""
    return model(idx, targets=idx)[0]


def constant_checkpoint(probabilities, block_size=8, tokenizer=None):
    """A checkpoint whose model predicts the same probabilities for the characters a, b, ...
    everywhere.

    The last norm gives (1, 0, 0, 0) whatever it reads, and the first column of the embedding is
    ln p."""
    logits = torch.tensor(probabilities).log()  # (V,)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=len(logits), n_layer=1, n_head=1,
                          n_embd=4, pe="nope", bias=True))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = logits
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(4)[0])
    tokenizer = tokenizer or CharTokenizer("ab")
    assert tokenizer.vocab_size == len(logits)
    return {"config": asdict(model.config), "model": model.state_dict(),
            "tokenizer": tokenizer.to_dict(), "iter": 5, "best_val_loss": 1.0, "seconds": 0.0,
            "args": {"seed": 1}, "dataset": {"path": "none", "sha256": "0"}}


def byte_tokenizer():
    """A tokenizer of the 256 bytes, so that a Japanese character is three tokens."""
    return BPETokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n"
                                for i in range(256)))


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- ways to call and interrupt


@pytest.fixture
def fails(monkeypatch, capsys):
    """fails(script, arguments) calls a script's main as the command line does; -> exit code, the
    lines on stderr."""
    def call(script, arguments):
        monkeypatch.setattr("sys.argv", [script.__file__, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            flags.run(script.main)
        return stopped.value.code, capsys.readouterr().err.splitlines()
    return call


@pytest.fixture
def at_batch(monkeypatch):
    """at_batch(index, act): act() is called when the training draws that batch first, in the middle
    of a step."""
    def at(index, act):
        draw, acts = train.training_batch, [act]

        def watched(*args):
            if args[4] == index and acts:
                acts.pop()()
            return draw(*args)

        monkeypatch.setattr(train, "training_batch", watched)
    return at
