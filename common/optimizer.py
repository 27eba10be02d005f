"""
How weights are updated: the optimizer, and its learning rates over time.
"""
import math
from dataclasses import dataclass

import torch

from model import setting

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which AdamW passes over the weights once per step
LEARNING_RATES = {"muon": 4e-2, "adamw": 5e-3}  # AdamW's, beside Muon and alone, for config/cpu_demo


@dataclass
class OptimizerConfig:
    """The optimizer's settings; each field is a flag. Learning rates are per step."""

    optimizer: str = setting("muon", "muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for "
                             "all", one_of=tuple(LEARNING_RATES))
    learning_rate: float | None = setting(None, f"AdamW's, after warm-up; default: {LEARNING_RATES['muon']} beside "
                                          f"Muon, {LEARNING_RATES['adamw']} alone", above=0)
    muon_learning_rate: float = setting(3e-2, "Muon's learning rate, on the same schedule", at_least=0)
    muon_momentum: float = setting(0.9, "Muon: decay of the average gradient", at_least=0, below=1)
    min_lr: float | None = setting(None, "learning rate at lr_decay_iters and after; default: a tenth", at_least=0)
    warmup_iters: int = setting(50, "steps from 0 to learning_rate", at_least=0)
    lr_decay_iters: int | None = setting(None, "steps until min_lr; default: max_iters", at_least=1)
    weight_decay: float = setting(0.1, "of matrices; biases, norms and encodings have none", at_least=0)
    beta1: float = setting(0.9, "AdamW: decay of the average gradient", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW: decay of the average squared gradient", at_least=0, below=1)

    def __post_init__(self):
        self.learning_rate = self.learning_rate or LEARNING_RATES[self.optimizer]
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr


def orthogonalized(x, dtype):
    """Matrices x (..., rows, columns) with their singular values replaced by about 1 (0.7 to 1.2), computed in dtype.

    Five Newton-Schulz iterations x <- a x + (b A + c A A) x with A = x x^T. Each is an odd polynomial of x, so that it
    acts on the singular values alone. The coefficients are Keller Jordan's."""
    x = x.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # x x^T is the smaller one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # all singular values at most 1
    for _ in range(5):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum, for weight matrices (K. Jordan, https://kellerjordan.github.io/posts/muon).

    The gradient of a matrix usually has a few large singular values, so that a step along it moves few directions.
    Muon takes the (Nesterov) momentum of the gradient and replaces its singular values by about 1: every direction
    moves by the same amount. It keeps one number per weight where AdamW keeps two.

    It differs from torch.optim.Muon in two points. The matrices of a group can consist of `parts` stacked ones, such as
    q, k and v in c_attn, which are orthogonalized one by one. And dtype is that of the orthogonalization:
    torch.optim.Muon always takes bfloat16, which is 40 times slower than float32 on CPUs without units for it."""

    def __init__(self, groups, lr, momentum, weight_decay, dtype):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for weight in group["params"]:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"]).unflatten(0, (group["parts"], -1))
                # A GPU multiplies all matrices of a shape at once: the time goes into starting kernels. A CPU gains
                # nothing from that, and copying costs it a fifth.
                key = weight if weight.device.type == "cpu" else weight.shape
                stacks.setdefault(key, []).append((weight, update))  # (parts, rows, columns)
            for pairs in stacks.values():
                weights, updates = zip(*pairs)
                rate = group["lr"] * max(1, updates[0].size(1) / updates[0].size(2)) ** 0.5
                steps = orthogonalized(torch.cat(updates), self.dtype).reshape(-1, *weights[0].shape)
                for weight, step in zip(weights, steps):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-rate)


class Optimizers:
    """Several optimizers that behave as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self.optimizers}

    def load_state_dict(self, state):
        for optimizer in self.optimizers:
            optimizer.load_state_dict(state[type(optimizer).__name__])


def make_optimizer(model, config, device, dtype=torch.float32):
    """The optimizer of an OptimizerConfig; dtype: that of the model's matrix products.

    Matrices decay; biases, norms and what an encoding learns do not."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        vector = parameter.dim() < 2 or name.startswith("transformer.wpe")
        kind = vectors if vector else matrices if name.startswith("transformer.h.") else embeddings
        kind.append(parameter)
    decaying = embeddings if config.optimizer == "muon" else embeddings + matrices
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                              fused=device.type in FUSED)
    if config.optimizer == "adamw":
        return adamw
    qkv = [block.attn.c_attn.weight for block in model.transformer.h]
    others = [matrix for matrix in matrices if not any(matrix is weight for weight in qkv)]
    muon = Muon([{"params": qkv, "parts": 3}, {"params": others}], config.muon_learning_rate, config.muon_momentum,
                config.weight_decay, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return Optimizers(muon, adamw)


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
