"""
nanoGPT (https://github.com/karpathy/nanoGPT) as the baseline of experiments/bench.py: its network, and how its train.py
trains with config/train_shakespeare_char.py.
"""
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from common.device import Device, DeviceConfig
from common.optimizer import FUSED
from model import GPTConfig
from train import Run

# Its dropout of 0.2 is left out: the text is read less than once.
SETTINGS = {"optimizer": "adamw", "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0, "lr_decay_iters": None}


class PlainGPT(nn.Module):
    """GPT-2 written without any option: learned positions, no cache."""

    def __init__(self, config):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.config, self.n_head = config, config.n_head
        self.tokens, self.positions = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.layers = nn.ModuleList(nn.ModuleList((
            nn.LayerNorm(C, bias=bias), nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias),
            nn.LayerNorm(C, bias=bias), nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)))
            for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(C, bias=bias), nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for _, _, out, _, _, down in self.layers:  # they write to the residual stream
            nn.init.normal_(out.weight, std=0.02 / (2 * config.n_layer) ** 0.5)
            nn.init.normal_(down.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
        for norm_1, qkv, out, norm_2, up, down in self.layers:
            q, k, v = qkv(norm_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm_2(x))))
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt_device(device):
    """Where it computes, given where ours does: in the same number format, but on a CPU in float32, as its train.py."""
    return Device(DeviceConfig("cpu", "float32")) if device.type == "cpu" else device


def nanogpt_optimizer(model, device):
    """Its AdamW, fused wherever ours is."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == kind] for kind in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": SETTINGS["weight_decay"]},
                              {"params": vectors, "weight_decay": 0.0}], lr=SETTINGS["learning_rate"],
                             betas=(SETTINGS["beta1"], SETTINGS["beta2"]), fused=device.type in FUSED)


def nanogpt_run(sizes, config, meta, ids, device):
    """-> a train.Run with nanoGPT's network and optimizer. sizes: fields of GPTConfig; config: a TrainConfig."""
    run = Run(GPTConfig(**sizes, pe="learned", bias=False), replace(config, **SETTINGS), meta, ids, device)
    torch.manual_seed(config.seed)
    run.model = PlainGPT(run.model.config).to(device.torch_device)
    run.compiled_model = torch.compile(run.model) if run.compiled else run.model
    run.optimizer = nanogpt_optimizer(run.model, device)
    return run
