"""Shared by the tests: a tiny text, a data set made of it, and a way to call the scripts as the command line does."""
import random

import pytest
import torch

import data.prepare
import train
from common import flags
from model import GPT, GPTConfig

TINY_FLAGS = ["--block_size", "16", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--batch_size", "4",
              "--warmup_iters", "2", "--eval_interval", "5", "--eval_iters", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """40 documents of 200 to 2,000 words that follow each other by simple rules, prepared with the char tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    for i in range(40):
        words = ["one"]
        for _ in range(generator.randint(200, 2000)):
            words.append(generator.choice({"one": ["two", "three"], "two": ["three"], "three": ["one"]}[words[-1]]))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return str(data.prepare.prepare(str(folder), "char", folder.parent / "tiny_char"))


@pytest.fixture(scope="session")
def finished_run(dataset, tmp_path_factory):
    """The folder of a HoPE run of ten steps."""
    out_dir = str(tmp_path_factory.mktemp("out") / "hope")
    train.main([*TINY_FLAGS, "--dataset", dataset, "--out_dir", out_dir, "--max_iters", "10"])
    return out_dir


@pytest.fixture
def fails(monkeypatch, capsys):
    """fails(script, arguments) calls a script's main as the command line does; -> exit code, the lines on stderr."""
    def call(script, arguments):
        monkeypatch.setattr("sys.argv", [script.__file__, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            flags.run(script.main)
        return stopped.value.code, capsys.readouterr().err.splitlines()
    return call


def tiny(pe, **changes):
    """A small untrained model in evaluation mode, its weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    config = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, pe=pe)
    model = GPT(GPTConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(10)
        for parameter in model.transformer.wpe.parameters():
            parameter.add_(torch.rand_like(parameter))    # what an encoding learns, away from where it starts
    return model
