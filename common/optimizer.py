"""
How weights are updated: the optimizer, and its learning rate over time.
"""
import math
from dataclasses import dataclass

import torch

from model import knob


@dataclass
class OptimizerConfig:
    learning_rate: float = knob(2e-3, "the highest, after warm-up", at_least=0)
    min_lr: float = knob(2e-4, "the last", at_least=0)
    warmup_iters: int = knob(50, "steps from 0 to learning_rate", at_least=0)
    lr_decay_iters: int | None = knob(None, "steps until min_lr; default: max_iters", at_least=1)
    weight_decay: float = knob(0.1, "on matrices", at_least=0)
    beta1: float = knob(0.9, "AdamW's", at_least=0, below=1)
    beta2: float = knob(0.99, "AdamW's", at_least=0, below=1)


def make_optimizer(model, config, device):
    """AdamW. Matrices decay; biases, norms and everything that an encoding learns do not."""
    decay = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decay[parameter.dim() >= 2 and not name.startswith("transformer.wpe.")].append(parameter)
    groups = [{"params": decay[True], "weight_decay": config.weight_decay},
              {"params": decay[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in ("cpu", "cuda", "mps"))


def learning_rate_at(step, config):
    """Linear warm-up over warmup_iters steps, then half a cosine to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    decay_iters = max(1, config.lr_decay_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / decay_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
