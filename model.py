"""
A GPT whose positional encoding (PE) is a switch. One file, meant to be read from top to bottom.

Attention by itself has no idea of order: shuffle the tokens that a query sees and its output is the same. A
positional encoding adds order, and it can do so at three places. Each is a method of one class:

    embed(x, pos)         once, to the token embeddings       learned, sinusoidal
    rotary(pos)           angles by which q and k are turned  rope, prope, hope
    bias(q_pos, k_pos)    a term added to attention's logits  alibi, t5, kerple, fire

An encoding that overrides none of them is NoPE. The network calls all three and never asks for a name.

Shapes in the margins: B sequences, T tokens (Tq queries, Tk keys), C = n_embd channels, H = n_head heads,
D = C / H channels of a head, K rotated pairs of channels, V = vocab_size.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------
# Positional encodings


def rope_frequencies(head_dim, pe="rope", *, block_size=None, base=10000.0, prope_fraction=0.75, hope_cutoff=1.0,
                     scaling="none", factor=1.0):
    """Angle theta_j, in radians per token, by which pair j of a head turns: float32 (head_dim / 2,), fastest first.

    RoPE (RoFormer, arXiv 2104.09864, sec. 3.2.2) sets theta_j = base^(-2j / head_dim). The other members of the
    family keep its fastest pairs as they are and give the rest theta = 0, which is no rotation at all:

        rope     all pairs
        prope    the fastest prope_fraction of them (arXiv 2410.06205, sec. 6)
        hope     those that finish hope_cutoff turns inside the trained context, theta_j >= hope_cutoff * 2 pi / L
                 with L = block_size in tokens (arXiv 2410.21216, sec. 4)
        nope     none

    scaling slows the turning pairs down so that factor times the trained context looks like the trained one:

        pi       position interpolation: theta / factor (arXiv 2306.15595, eq. 4)
        ntk      a larger base, base * factor^(d / (d - 2)): fastest pair kept, slowest divided by factor
        yarn     pairs with over 32 turns in L kept, those with under 1 turn divided by factor, a ramp between, over
                 the pair's index as in the authors' code (arXiv 2309.00071; its temperature is in GPT.query_scale)

    Raises ValueError for an odd head_dim, an unknown name, or a missing block_size where the formula needs one.
    """
    if head_dim % 2:
        raise ValueError(f"a rotary encoding turns pairs of channels, but a head has {head_dim} of them, an odd "
                         "number: choose n_embd and n_head so that n_embd / n_head is even")
    if block_size is None and (pe == "hope" or scaling == "yarn"):
        raise ValueError("hope and yarn depend on the trained context: pass block_size")
    j = torch.arange(head_dim // 2, dtype=torch.float64)  # float64 until the end: K must not hang on a rounding
    theta = base ** (-2 * j / head_dim)                                                      # (D/2,)
    turns = theta * (block_size or 0) / (2 * math.pi)     # how often each pair turns in the trained context

    # All members keep the fastest pairs, so that one number says which. It does not change with the scaling:
    # what the model was trained with decides.
    n_rotated = {"rope": head_dim // 2, "prope": int(prope_fraction * head_dim // 2),
                 "hope": int((turns >= hope_cutoff).sum()), "nope": 0}
    if pe not in n_rotated:
        raise ValueError(f"rope_frequencies knows {', '.join(n_rotated)}, not {pe!r}")

    # YaRN's ramp runs over the pair's index, between the (real-valued) indices at which a pair has 32 turns and 1.
    first, last = (head_dim * math.log((block_size or 1) / (2 * math.pi * n)) / (2 * math.log(base)) for n in (32, 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    ramp = ((j - first) / max(last - first, 0.001)).clamp(0, 1)                              # 0: keep, 1: divide

    scaled = {"none": theta, "pi": theta / factor,
              "ntk": theta * factor ** (-2 * j / max(head_dim - 2, 1)),  # the larger base, multiplied out
              "yarn": theta * (1 - ramp) + theta / factor * ramp}
    if scaling not in scaled:
        raise ValueError(f"rope_scaling is one of {', '.join(scaled)}, not {scaling!r}")
    return torch.where(j < n_rotated[pe], scaled[scaling], 0.0).float()                      # (D/2,)


def rotate(x, cos, sin):
    """Turn the first K pairs of each head; x (B, H, T, D), cos and sin (T, K). A pair is channels (j, j + D/2).

    RoFormer pairs neighbours (2j, 2j + 1); halves, as in Llama, are the same up to the order of the channels. Queries
    and keys turned by position * theta have a dot product that depends on the difference of positions alone. The
    pairs from K on pass through: their part of the logit is a plain dot product, blind to position.
    """
    K, half = cos.size(-1), x.size(-1) // 2
    # a and b: the two coordinates of each turning pair, (B, H, T, K). One split, not four slices: backward of a slice
    # fills a whole tensor with zeros, backward of a split is one concatenation.
    a, still_a, b, still_b = x.split((K, half - K, K, half - K), dim=-1)
    # cos and sin are float32, so the products are too, whatever x is
    turned_a, turned_b = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    return torch.cat((turned_a, still_a, turned_b, still_b), dim=-1)                         # (B, H, T, D)


class PositionalEncoding(nn.Module):
    """The three places at which an encoding can act; by default it acts at none of them."""

    max_length = None                                     # the longest context it has a value for; None: no limit

    def __init__(self, config):
        super().__init__()

    def reset_parameters(self):
        """Initialise what is learned. GPT calls it last, so that all encodings leave the same shared weights."""

    def embed(self, x, pos):
        """Token embeddings x (B, T, C) at positions pos (T,) -> (B, T, C)."""
        return x

    def rotary(self, pos):
        """Positions (T,) -> cos, sin of the angles of the K turning pairs, float32 (T, K) each; or None."""
        return None

    def bias(self, q_pos, k_pos):
        """Positions (Tq,), (Tk,) -> what to add to the logits, float32 (H, Tq, Tk); or None. GPT masks the future."""
        return None

    def _apply(self, fn, recurse=True):
        """What .to(), .cuda() and their like call: fixed numbers, kept as plain tensors, move along but stay float32.

        As buffers they would be rounded by .to(torch.bfloat16), and the error of an angle grows with the position.
        """
        super()._apply(fn, recurse)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(fn(value).device))
        return self


class NoPE(PositionalEncoding):
    """No encoding (arXiv 2305.19466). The causal mask alone tells order: token n sees n tokens, token n + 1 one more.

    Costs nothing.
    """


class Learned(PositionalEncoding):
    """A vector per position, learned and added to the token embedding (GPT-2). Undefined past the trained context.

    x_n + w_n; block_size * n_embd parameters, one addition a forward.
    """

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))            # (L, C)
        self.max_length = config.block_size

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x, pos):
        return x + F.embedding(pos, self.weight)                                             # (B, T, C)


class Sinusoidal(PositionalEncoding):
    """Sines and cosines added to the token embedding ("Attention is all you need", arXiv 1706.03762, sec. 3.5).

    sqrt(C) x_n + (sin n theta_0, cos n theta_0, sin n theta_1, ...), theta_i = 10000^(-2i / C); no parameters, one
    addition a forward. The factor sqrt(C) is the paper's (sec. 3.4), whose tokens start at a standard deviation of 1;
    ours start at 0.02 sqrt(C), smaller than the wave's 0.7, and have to grow.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.n_embd % 2:
            raise ValueError(f"sinusoidal fills the channels in pairs, so n_embd must be even, not {config.n_embd}")
        self.theta = rope_frequencies(config.n_embd)      # RoPE took its spectrum from here  (C/2,)

    def embed(self, x, pos):
        angle = pos[:, None] * self.theta                                                    # (T, C/2)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)                    # (T, C) interleaved
        return x * math.sqrt(x.size(-1)) + wave.to(x.dtype)


class RoPE(PositionalEncoding):
    """Rotary encoding (RoFormer, arXiv 2104.09864, eq. 16): pair j of q and of k is turned by position * theta_j.

    logit(m, n) = sum_j q_j . R((n - m) theta_j) k_j. Depends on n - m alone and has no parameters; it costs two
    products and a sum per turning channel of q and k. Slow pairs, which never finish a turn in L tokens, meet
    angles past L that they have not seen in training: there RoPE breaks.
    """

    kind = "rope"                                         # which pairs turn: a name that rope_frequencies knows

    def __init__(self, config):
        super().__init__(config)
        theta = rope_frequencies(config.n_embd // config.n_head, self.kind, block_size=config.block_size,
                                 base=config.rope_base, prope_fraction=config.prope_fraction,
                                 hope_cutoff=config.hope_cutoff, scaling=config.rope_scaling, factor=config.rope_factor)
        self.theta = theta[theta > 0]                                                        # (K,)

    def rotary(self, pos):
        if len(self.theta) == 0:                          # nothing turns: this is NoPE
            return None
        angle = pos[:, None] * self.theta                                                    # (T, K)
        return angle.cos(), angle.sin()                                                  # (T, K) each


class PRoPE(RoPE):
    """p-RoPE (Round and Round We Go!, arXiv 2410.06205, sec. 6): only the fastest fraction p of the pairs turns.

    theta_j as in RoPE for j < floor(p d / 2), else 0. The slow pairs become channels for what a token means, which no
    distance can blur. p = 1 is RoPE, p = 0 is NoPE. Cheaper than RoPE by the pairs left out. p does not look at
    the trained context: what is left may still hold pairs slower than L.
    """

    kind = "prope"


class HoPE(RoPE):
    """High-frequency rotary encoding (HoPE, arXiv 2410.21216): the pairs slower than the context do not turn.

    theta_j as in RoPE where theta_j >= hope_cutoff * 2 pi / L, else 0. Every angle a turning pair can take, mod
    2 pi, has then been seen in training. Cheaper than RoPE by the pairs left out.
    """

    kind = "hope"


# The other family does not touch queries and keys and adds a number to each logit, by head and distance. One bias a
# forward, shared by all layers. What distance it gives to keys in the future does not matter: they are masked.


def alibi_slopes(n_head):
    """ALiBi's slope of each head: float32 (n_head,). 2^(-8h / n_head) for h = 1 ... n_head, a power of two.

    Another n_head takes the slopes of the power of two below it, then every other slope of twice that power.
    """
    power = 2 ** int(math.log2(n_head))                   # the power of two at or below n_head
    slopes = 2 ** (-8 / power * torch.arange(1, power + 1, dtype=torch.float64))
    between = 2 ** (-4 / power * torch.arange(1, 2 * power, 2, dtype=torch.float64))         # 1st, 3rd, ... of 2 power
    return torch.cat((slopes, between[:n_head - power])).float()                             # (H,)


class ALiBi(PositionalEncoding):
    """Attention with linear biases (arXiv 2108.12409, sec. 3): -m_h * distance, the slopes m_h fixed.

    No parameters; one product per head, query and key. Far tokens count less by construction: perplexity stays flat
    past L since each head looks no further than a few 1 / m_h tokens back.
    """

    def __init__(self, config):
        super().__init__(config)
        self.slopes = alibi_slopes(config.n_head)                                            # (H,)

    def bias(self, q_pos, k_pos):
        return self.slopes[:, None, None] * (k_pos - q_pos[:, None])                         # (H, Tq, Tk)


def t5_bucket(distance, num_buckets=32, max_distance=128):
    """T5's bucket of each distance (in tokens, any shape; below 0 counts as 0): int64 of the same shape.

    The first half of the buckets holds one distance each, the second half grows by a constant factor and ends at
    max_distance, from where on all share the last (arXiv 1910.10683, sec. 2.1, causal).
    """
    half = num_buckets // 2                               # buckets of one distance each
    distance = distance.clamp(min=0)
    fraction = torch.log(distance.clamp(min=half) / half) / math.log(max_distance / half)    # 0 at half, 1 at the end
    far = half + (fraction * (num_buckets - half)).long()                                    # half, ... on a log scale
    return torch.where(distance < half, distance, far.clamp(max=num_buckets - 1))


class T5(PositionalEncoding):
    """T5's relative bias (arXiv 1910.10683, sec. 2.1): a learned number per head and bucket of distances.

    32 H parameters, one lookup per query and key. As in the paper the layers share the table; unlike it, the logits
    keep their 1 / sqrt(D). The table starts at zero, which is NoPE.
    """

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(32, config.n_head))                            # (32, H)

    def reset_parameters(self):
        nn.init.zeros_(self.table)

    def bias(self, q_pos, k_pos):
        bucket = t5_bucket(q_pos[:, None] - k_pos)                                           # (Tq, Tk)
        return F.embedding(bucket, self.table.float()).permute(2, 0, 1)                      # (H, Tq, Tk)


class KERPLE(PositionalEncoding):
    """KERPLE with the logarithmic kernel (arXiv 2205.09921): -r1 ln(1 + r2 distance), r1 and r2 learned per head.

    2 H parameters (the authors give each layer its own), one logarithm per head, query and key. Between ALiBi and no
    decay: how far a head looks is learned.
    """

    lowest = 0.01                                         # r1 and r2 stay above this, as in the authors' code

    def __init__(self, config):
        super().__init__(config)
        self.r1 = nn.Parameter(torch.empty(config.n_head))                                   # (H,)
        self.r2 = nn.Parameter(torch.empty(config.n_head))                                   # (H,)

    def reset_parameters(self):
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def bias(self, q_pos, k_pos):
        with torch.no_grad():                             # the stored values move, so that no gradient is lost
            self.r1.clamp_(min=self.lowest)
            self.r2.clamp_(min=self.lowest)
        r1, r2 = self.r1.float()[:, None, None], self.r2.float()[:, None, None]          # (H, 1, 1) each
        distance = (q_pos[:, None] - k_pos).clamp(min=0)                                     # (Tq, Tk)
        return -r1 * torch.log1p(r2 * distance)                                              # (H, Tq, Tk)


class FIRE(PositionalEncoding):
    """FIRE (arXiv 2310.04418, sec. 3): a small network of the distance, measured against how far back one could look.

    f(psi(distance) / psi(max(i, threshold))) with psi(x) = ln(|c| x + 1) and f: 1 -> 32 -> H with a ReLU between; i is
    the query's position. The argument stays in [0, 1] at any length. 33 H + 66 parameters, shared by the layers (the
    paper's FIRE-S); 32 products per query and key and again per head. The threshold starts at L (the paper's at 512).
    """

    def __init__(self, config):
        super().__init__(config)
        self.c = nn.Parameter(torch.empty(()))            # how soon distances are lumped together
        self.multiplier = nn.Parameter(torch.empty(()))   # of the threshold
        self.block_size = config.block_size
        self.weight_1, self.bias_1 = (nn.Parameter(torch.empty(32)) for _ in range(2))       # (32,)
        self.weight_2 = nn.Parameter(torch.empty(config.n_head, 32))                         # (H, 32)
        self.bias_2 = nn.Parameter(torch.empty(config.n_head))                               # (H,)

    def reset_parameters(self):
        nn.init.constant_(self.c, 0.1)
        nn.init.constant_(self.multiplier, 1.0)
        for parameter, n_inputs in ((self.weight_1, 1), (self.bias_1, 1), (self.weight_2, 32), (self.bias_2, 32)):
            nn.init.uniform_(parameter, -n_inputs ** -0.5, n_inputs ** -0.5)  # PyTorch's own for linear layers

    def bias(self, q_pos, k_pos):
        c, threshold = self.c.float().abs(), (self.multiplier.float() * self.block_size).abs()
        distance = (q_pos[:, None] - k_pos).clamp(min=0)                                     # (Tq, Tk)
        reach = torch.maximum(q_pos, threshold)[:, None]                                     # (Tq, 1)
        x = torch.log1p(c * distance) / (torch.log1p(c * reach) + 1e-6)                      # (Tq, Tk) in [0, 1]
        hidden = F.relu(x[..., None] * self.weight_1.float() + self.bias_1.float())          # (Tq, Tk, 32)
        return (hidden @ self.weight_2.float().T + self.bias_2.float()).permute(2, 0, 1)     # (H, Tq, Tk)


PE = {"nope": NoPE, "learned": Learned, "sinusoidal": Sinusoidal, "rope": RoPE, "prope": PRoPE, "hope": HoPE,
      "alibi": ALiBi, "t5": T5, "kerple": KERPLE, "fire": FIRE}

# ---------------------------------------------------------------------------------------------------------------
# The network


class KVCache:
    """Keys and values of the tokens read so far, so that the next token costs one query and not a whole forward.

    Room for max_length tokens is taken at the first use, in the shape, type and device of what is stored.
    Keys are stored as turned by their own position, which later tokens do not change.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0                                   # tokens stored; GPT.forward moves it on
        self.store = {}                                   # attention layer -> its keys and values

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) of one layer behind the others; -> all its keys and values (B, H, length + T, D)."""
        if layer not in self.store:
            B, H, _, D = k.shape                          # room for max_length tokens instead of these T
            self.store[layer] = k.new_empty(B, H, self.max_length, D), v.new_empty(B, H, self.max_length, D)
        start, end = self.length, self.length + k.size(2)
        keys, values = self.store[layer]                                                 # (B, H, max_length, D) each
        keys[:, :, start:end], values[:, :, start:end] = k.detach(), v.detach()  # for reading only: no gradients
        return keys[:, :, :end], values[:, :, :end]                                      # (B, H, end, D) each


class CausalSelfAttention(nn.Module):
    """x (B, T, C) -> (B, T, C). Rotates if it gets a rotation, adds a bias if it gets one: no encoding has a branch.

    rotary: cos and sin, (T, K) each; mask: what GPT.attention_mask gives; query_scale (T, 1); each may be None.
    """

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes what the heads found
        self.resid_dropout = nn.Dropout(config.dropout)   # on what is added to the residual stream
        self.n_head = config.n_head
        self.dropout = config.dropout                     # on the attention weights

    def forward(self, x, rotary=None, mask=None, query_scale=None, cache=None):
        B, T, C = x.size()                                # with a cache, T counts the new tokens only
        q, k, v = self.c_attn(x).split(C, dim=2)                                             # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))         # (B, H, T, D) each
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)         # values stay: what is seen has no position
        if query_scale is not None:
            q = q * query_scale.to(q.dtype)                                              # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self, k, v)                                                  # (B, H, Tk, D)
        # Without a mask the kernel makes the causal one itself, which keeps the flash path; one query sees all keys.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)            # heads side by side again
        return self.resid_dropout(self.c_proj(y))                                        # (B, T, C)


class MLP(nn.Module):
    """Each token by itself: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)  # four times as wide, as in GPT-2
        self.gelu = nn.GELU()                             # the exact one, with erf
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))                            # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream x (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rotary=None, mask=None, query_scale=None, cache=None):
        # pre-norm: the residual stream itself is never normalised, so gradients reach the first layer unhindered
        x = x + self.attn(self.ln_1(x), rotary, mask, query_scale, cache)                    # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                                    # (B, T, C)


@dataclass
class GPTConfig:
    """All that defines the network; every field is a flag. Raises ValueError where values do not fit."""

    block_size: int = 128            # L: tokens of context in training
    vocab_size: int = 256            # V: set by the tokenizer
    n_layer: int = 4
    n_head: int = 4                  # H
    n_embd: int = 128                # C
    dropout: float = 0.0             # for small texts that are read many times
    bias: bool = True                # bias in linear layers and norms; GPT-2 has it, newer models leave it out
    pe: str = "hope"                 # a key of PE
    rope_base: float = 10000.0       # the slowest pair turns once in 2 pi rope_base^(1 - 2 / D) tokens
    prope_fraction: float = 0.75     # p-RoPE: fraction of the pairs that turns
    hope_cutoff: float = 1.0         # HoPE: turns in L tokens that a pair needs to be kept
    rope_scaling: str = "none"       # none, pi, ntk, yarn: for contexts longer than the trained one, at inference
    rope_factor: float = 1.0         # how many times longer
    attn_scaling: str = "none"       # none, logn: sharper attention past L, at inference

    def __post_init__(self):
        if self.pe not in PE:
            raise ValueError(f"pe is one of {', '.join(PE)}, not {self.pe!r}")
        for name, low in dict(block_size=2, vocab_size=1, n_layer=1, n_head=1, n_embd=1, rope_factor=1).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: heads have equal shares")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not 0 <= self.prope_fraction <= 1:
            raise ValueError(f"prope_fraction must be between 0 and 1, not {self.prope_fraction}")
        if not self.rope_base > 1:
            raise ValueError(f"rope_base must be above 1, not {self.rope_base}")
        if not self.hope_cutoff >= 0:
            raise ValueError(f"hope_cutoff must not be negative, as {self.hope_cutoff} is")
        if self.rope_scaling not in ("none", "pi", "ntk", "yarn"):
            raise ValueError(f"rope_scaling is one of none, pi, ntk, yarn, not {self.rope_scaling!r}")
        if self.attn_scaling not in ("none", "logn"):
            raise ValueError(f"attn_scaling is none or logn, not {self.attn_scaling!r}")
        if self.rope_scaling != "none" and not issubclass(PE[self.pe], RoPE):
            raise ValueError(f"rope_scaling {self.rope_scaling!r} needs a rotary encoding, and {self.pe} turns nothing")


class GPT(nn.Module):
    """GPT-2 with a choice of positional encoding. With pe="learned" it is GPT-2, weight names included."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=PE[config.pe](config),                    # GPT-2's name for its table of positions; here any encoding
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: what a token means and what predicts it
        for name, module in self.named_modules():
            self._init_weights(name, module)
        self.transformer.wpe.reset_parameters()           # last, see there

    def _init_weights(self, name, module):
        # GPT-2's: normal with standard deviation 0.02, divided by sqrt(2 n_layer) where a layer writes into the
        # residual stream, since 2 n_layer such contributions add up there. Norms keep PyTorch's ones and zeros.
        if name.startswith("transformer.wpe"):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def attention_mask(self, q_pos, k_pos):
        """What scaled_dot_product_attention adds to the logits, (1, H, Tq, Tk), or which keys it uses, (Tq, Tk).

        Or None where it needs neither: plain causal attention, or a single query that is the last token.
        """
        bias = self.transformer.wpe.bias(q_pos, k_pos)                                       # (H, Tq, Tk)
        if bias is None and len(q_pos) in (1, len(k_pos)):
            return None
        visible = k_pos <= q_pos[:, None]                                                    # (Tq, Tk)
        if bias is None:
            return visible
        # the kernel wants the type of the queries
        device, dtype = bias.device.type, self.lm_head.weight.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        return torch.where(visible, bias, -math.inf).to(dtype)[None]                         # (1, H, Tq, Tk)

    def query_scale(self, pos):
        """Factors on the queries, hence on the logits, for contexts past the trained one: (T, 1), or None.

        yarn: (0.1 ln factor + 1)^2, the softmax temperature of arXiv 2309.00071, eqs. 21 and 22. It is on the whole
        logit; the authors' code puts its root on cos and sin, which is the same where all pairs turn.
        logn: max(1, ln n / ln L) for the n-th token, so that attention over more keys stays as sharp (proposed by
        J. Su; arXiv 2501.19399 has a learned relative). A bias is not multiplied, only what q and k have to say.
        """
        config = self.config
        if config.rope_scaling != "yarn" and config.attn_scaling == "none":
            return None
        scale = torch.ones(len(pos), 1, device=pos.device)                                   # (T, 1)
        if config.rope_scaling == "yarn":
            scale = scale * (0.1 * math.log(config.rope_factor) + 1) ** 2
        if config.attn_scaling == "logn":
            scale = scale * (torch.log(pos[:, None] + 1) / math.log(config.block_size)).clamp(min=1)  # 1 inside L
        return scale

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        """Token ids idx (B, T) -> logits, loss.

        With targets (B, T): logits (B, T, V) and the cross-entropy in nats, targets of -1 left out: its mean, or with
        reduction="none" that of each token, float32 (B, T).
        Without: logits of the last position (B, 1, V), and None. With a KVCache, idx continues what the cache holds.
        Raises ValueError where the encoding (learned) or the cache has no place for so many tokens.
        """
        past = 0 if cache is None else cache.length
        end = past + idx.size(1)
        pe = self.transformer.wpe
        if pe.max_length is not None and end > pe.max_length:
            raise ValueError(f"pe {self.config.pe!r} has no value past {pe.max_length} tokens, and {end} were given")
        if cache is not None and end > cache.max_length:
            raise ValueError(f"the cache has room for {cache.max_length} tokens, and {end} were given")
        k_pos = torch.arange(end, device=idx.device)                                         # (Tk,)
        q_pos = k_pos[past:]                                                                 # (T,)

        # All that depends on positions is computed here, once, and shared by the layers.
        x = self.transformer.drop(pe.embed(self.transformer.wte(idx), q_pos))                # (B, T, C)
        rotary = pe.rotary(q_pos)                                                            # (T, K) twice, or None
        mask = self.attention_mask(q_pos, k_pos)                                             # (1, H, T, Tk), or None
        query_scale = self.query_scale(q_pos)                                                # (T, 1), or None
        for block in self.transformer.h:
            x = block(x, rotary, mask, query_scale, cache)                                   # (B, T, C)
        if cache is not None:
            cache.length = end                            # only now, when all layers have stored theirs
        x = self.transformer.ln_f(x)                                                         # (B, T, C)

        if targets is None:
            return self.lm_head(x[:, [-1]]), None                                            # (B, 1, V)
        logits = self.lm_head(x)                                                             # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction=reduction)
        return logits, loss.view_as(targets) if reduction == "none" else loss

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) and yield each new token (B, 1) as it is drawn. top_k=1 is greedy.

        Past the trained context, encodings without a limit go on; learned sees the last block_size tokens alone.
        """
        limit = self.transformer.wpe.max_length or math.inf
        cache, new = KVCache(idx.size(1) + max_new_tokens), idx
        for _ in range(max_new_tokens):
            if idx.size(1) <= limit:
                logits, _ = self(new, cache=cache)                                           # (B, 1, V)
            else:                                         # the window slides, so that every position is a new one
                logits, _ = self(idx[:, -limit:])
            logits = logits[:, -1].float() / temperature                                     # (B, V)
            if top_k is not None:
                lowest = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                logits = logits.masked_fill(logits < lowest, -math.inf)
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)                # (B, 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) with max_new_tokens more behind it: (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    @classmethod
    def from_checkpoint(cls, path, **overrides):
        """The model of a checkpoint (a path, or what load_checkpoint gave), ready to evaluate.

        overrides replace fields of its configuration that the weights do not depend on, as rope_scaling="yarn".
        """
        checkpoint = path if isinstance(path, dict) else load_checkpoint(path)
        model = cls(GPTConfig(**{**checkpoint["config"], **overrides}))
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:                     # a page of shapes
            raise ValueError("the checkpoint's weights do not fit its configuration") from error
        return model.eval()


def load_checkpoint(path):
    """A checkpoint file, or the one in a run's folder (best.pt, else ckpt.pt) -> dict with config, model, ...

    nanoGPT's ckpt.pt is read too; it brings neither text nor tokenizer (None).
    Nothing in the file is executed (weights_only). Raises FileNotFoundError, or ValueError for a file that is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
    if not path.exists():
        run = path.parent if path.suffix == ".pt" else path
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py --out_dir {run}`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "model_args" in checkpoint:                    # nanoGPT's: the same network with learned positions
            weights = {name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()
                       if not name.endswith(".attn.bias")}  # older ones store their causal mask under this name
            checkpoint = {"config": {**checkpoint["model_args"], "pe": "learned"}, "model": weights,
                          "iter": checkpoint["iter_num"], "args": {"seed": None}, "dataset": None, "tokenizer": None}
        GPTConfig(**checkpoint["config"])
    except Exception as error:                            # torch raises a dozen types here; to the user they are one
        others = [other.name for other in sorted(path.parent.glob("*.pt")) if other != path]
        raise ValueError(f"{path} is damaged, or no checkpoint of this project ({type(error).__name__})"
                         + (f"; beside it there is {', '.join(others)}" if others else "")) from error
    return checkpoint
