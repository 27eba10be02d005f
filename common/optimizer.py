"""
How weights are updated: the optimizer, and its learning rates over time.
"""
import math
from dataclasses import dataclass

import torch

from model import knob

LEARNING_RATES = {"muon": 4e-2, "adamw": 5e-3}  # AdamW's, beside Muon and alone, for config/cpu_demo


@dataclass
class OptimizerConfig:
    optimizer: str = knob("muon", "muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all",
                          one_of=LEARNING_RATES)
    learning_rate: float | None = knob(None, "AdamW's, after warm-up; default: 4e-2 beside Muon, 5e-3 alone",
                                       above=0)
    muon_learning_rate: float = knob(3e-2, "Muon's, on the same schedule", at_least=0)
    muon_momentum: float = knob(0.9, "Muon's", at_least=0, below=1)
    min_lr: float | None = knob(None, "the last learning_rate; default: a tenth of it", at_least=0)
    warmup_iters: int = knob(50, "steps from 0 to learning_rate", at_least=0)
    lr_decay_iters: int | None = knob(None, "steps until min_lr; default: max_iters", at_least=1)
    weight_decay: float = knob(0.1, "on matrices", at_least=0)
    beta1: float = knob(0.9, "AdamW's", at_least=0, below=1)
    beta2: float = knob(0.99, "AdamW's", at_least=0, below=1)

    def __post_init__(self):
        self.learning_rate = self.learning_rate or LEARNING_RATES[self.optimizer]
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr


class MuonAndAdamW:
    """Two optimizers that behave as one: Muon for the matrices of the blocks, AdamW for everything else.

    The gradient of a matrix usually has a few large singular values, so that a step along it moves few directions.
    Muon takes the momentum of the gradient and replaces all its singular values by about 1, with five Newton-Schulz
    iterations, which are matrix products: every direction moves by the same amount. It keeps one moment per weight
    where AdamW keeps two. Embeddings and vectors are not maps between channels and stay with AdamW.
    Source: Keller Jordan et al., https://kellerjordan.github.io/posts/muon; in PyTorch since 2.9 as torch.optim.Muon.
    """

    def __init__(self, matrices, adamw, config):
        self.muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, momentum=config.muon_momentum,
                                     weight_decay=config.weight_decay)
        self.adamw = adamw
        self.param_groups = [*self.muon.param_groups, *adamw.param_groups]

    def step(self):
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none=True):
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def make_optimizer(model, config, device):
    """The optimizer of an OptimizerConfig. Matrices decay; biases, norms and what an encoding learns do not."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        vector = parameter.dim() < 2 or name.startswith("transformer.wpe")
        kind = vectors if vector else matrices if name.startswith("transformer.h.") else embeddings
        kind.append(parameter)
    decaying = embeddings if config.optimizer == "muon" else embeddings + matrices
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                              fused=device.type in ("cpu", "cuda", "mps"))
    return MuonAndAdamW(matrices, adamw, config) if config.optimizer == "muon" else adamw


def learning_rate_at(step, config):
    """Linear warm-up over warmup_iters steps, then half a cosine to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    decay_iters = max(1, config.lr_decay_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / decay_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def set_learning_rate(optimizer, step, config):
    """Give each group of an optimizer its learning rate for a step -> AdamW's."""
    lr = learning_rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr if "betas" in group else config.muon_learning_rate * lr / config.learning_rate
    return lr
