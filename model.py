"""
A GPT whose positional encoding (PE) is a switch. One file, to be read from top to bottom:

1. the idea: RoPE, p-RoPE, HoPE   2. the network   3. the other encodings   4. the configuration

Attention by itself ignores the order of tokens: if the tokens that a query sees are shuffled, its
output does not change. A positional encoding adds order. It can act at three places, and each
place is a method of one class:

    embed(x, pos)         on the token embeddings, once       learned, sinusoidal
    rotary(pos)           rotates queries and keys            rope, prope, hope
    bias(q_pos, k_pos)    is added to the attention logits    alibi, t5, kerple, fire

An encoding that overrides none of them is NoPE. GPT.__init__ looks the encoding up by its name.
From then on the network calls all three methods, whatever the encoding is.

Shapes: B sequences, T tokens (Tq queries, Tk keys), C = n_embd channels, H = n_head heads,
D = C / H channels per head, K rotated pairs of channels, V = vocab_size, L = block_size.
Docstrings write "x (B, T) -> y (B, T, C)" for what a function takes and what it returns.
"""
import dataclasses
import math
import operator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# --------------------------------------------------------------------------------------------------
# 1. The idea: the three places of an encoding, and the encodings that rotate


class PositionalEncoding(nn.Module):
    """The three places at which an encoding can act. The base class acts at none of them.

    Angles and biases are float32 in any model. Fixed numbers are plain tensors and not buffers:
    model.to(torch.bfloat16) would round a buffer, and the error of an angle grows with position."""

    max_length = None  # the longest context it is defined for; None: any length

    def __init__(self, config):
        super().__init__()

    def embed(self, x, pos):
        """Token embeddings x (B, T, C) at positions pos (T,) -> (B, T, C)."""
        return x

    def rotary(self, pos):
        """Positions (T,) -> cos, sin of the rotated pairs' angles, float32 (T, K) each; or None."""
        return None

    def bias(self, q_pos, k_pos):
        """Positions (Tq,), (Tk,) -> what is added to the logits, float32 (H, Tq, Tk); or None.

        Values for keys in the future are ignored."""
        return None


class NoPE(PositionalEncoding):
    """No encoding (arXiv 2305.19466): order comes from the causal mask alone, since token n sees n
    tokens and token n + 1 sees one more. No parameters, no cost."""


def frequencies(head_dim, base=10000.0):
    """theta_j = base^(-2j / head_dim) radians per token, j = 0 ... head_dim / 2 - 1, fastest first.

    -> (head_dim / 2,) float64, so that rounding cannot change how many pairs an encoding rotates.
    """
    j = torch.arange(head_dim // 2, dtype=torch.float64)
    return base ** (-2 * j / head_dim)


class RoPE(PositionalEncoding):
    """Rotary encoding (RoFormer, arXiv 2104.09864, eq. 16): rotates pair j by position * theta_j.

    A query at position m and a key at n have the logit sum_j q_j . R((n - m) theta_j) k_j, before
    the division by sqrt(D): positions enter through the distance m - n alone. No parameters.

    A pair that needs more than L tokens for a turn meets, beyond L, angles that never occurred in
    training. That is one reason why RoPE can fail there; HoPE tests it."""

    def __init__(self, config):
        super().__init__(config)
        theta = frequencies(config.n_embd // config.n_head, config.rope_base)  # (D / 2,)
        n_rotated = self.n_rotated(theta, config)  # before scaling, which changes no pair's turns
        if config.rope_scaling != "none":
            L = config.rope_context or config.block_size
            theta = SCALINGS[config.rope_scaling](theta, config.rope_base, L, config.rope_factor)
        self.theta = theta[:n_rotated].float()  # (K,)

    def n_rotated(self, theta, config):
        """theta (D / 2,) -> how many pairs are rotated, fastest first. The rotary encodings differ
        only here."""
        return len(theta)

    def rotary(self, pos):
        if len(self.theta) == 0:
            return None
        angle = pos[:, None] * self.theta.to(pos.device, non_blocking=True)  # (T, K)
        return angle.cos(), angle.sin()


class PRoPE(RoPE):
    """p-RoPE (Round and Round We Go!, arXiv 2410.06205, sec. 6): rotates the fastest fraction p.

    theta_j for j < floor(p D / 2), else 0: what the slow pairs add to a logit depends on the tokens
    alone. p = 1 is RoPE, p = 0 is NoPE. p does not depend on L, so pairs that need more than L
    tokens for a turn may be rotated."""

    def n_rotated(self, theta, config):
        return int(config.prope_fraction * len(theta))


class HoPE(RoPE):
    """HoPE (High-frequency rotary position encoding, arXiv 2410.21216, sec. 4): rotates the pairs
    that complete a turn within the trained context, theta_j >= 2 pi / L.

    With hope_cutoff (1 in the paper): theta_j >= 2 pi hope_cutoff / L. L is block_size, or
    rope_context if that is set. The other pairs are not rotated. No parameters.

    The distances of the training cover the circle of such a pair in steps of theta_j: no angle
    beyond L is far from one that has occurred."""

    def n_rotated(self, theta, config):
        L = config.rope_context or config.block_size
        turns = theta * L / (2 * math.pi)  # turns of each pair within the trained context
        return int((turns >= config.hope_cutoff).sum())


def rotate(x, cos, sin):
    """Rotate the first K pairs of each head: x (B, H, T, D); cos and sin (T, K) -> (B, H, T, D).

    A pair is the channels (j, j + D / 2), as in Llama. RoFormer pairs (2j, 2j + 1), which is the
    same up to the order of the channels. The other pairs pass through: their part of the logit is
    a plain dot product, independent of position."""
    K, half = cos.size(-1), x.size(-1) // 2
    # One split instead of four slices: the backward of each slice would allocate all of x.
    a, a_rest, b, b_rest = x.split((K, half - K, K, half - K), dim=-1)
    # cos and sin are float32, and so are the products, whatever the type of x.
    rotated_a, rotated_b = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    return torch.cat((rotated_a, a_rest, rotated_b, b_rest), dim=-1)

# --------------------------------------------------------------------------------------------------
# 2. The network


class LayerPositions(NamedTuple):
    """What a layer needs to know about positions. Computed once per forward for the short-window
    layers (S), which see the last tokens only, and once for the full layers (L)."""

    rotary: tuple | None  # cos and sin (T, K)
    mask: torch.Tensor | None  # added to the logits (1, H, T, Tk), or True for visible keys (T, Tk)
    query_scale: torch.Tensor | None  # factors on the queries (T, 1)
    window: int  # tokens that a query sees, itself included; 0: all


class KVCache:
    """Keys and values of the tokens read so far: the next token then costs a single query.

    A layer with a window keeps window - 1 tokens. For the others, room for max_length tokens is
    allocated at the first use. Keys are stored rotated by their own position, which later tokens do
    not change. No gradient reaches what is stored. A cache belongs to one model."""

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0  # tokens read
        self.store = {}  # attention layer -> its keys and values
        self.next = {}  # layer with a window -> the same, once the tokens that are read now count

    def append(self, layer, k, v, window):
        """Store a layer's k and v (B, H, T, D) -> the keys and values that these T tokens see.

        They count after advance() alone, so an interrupted forward leaves the cache as it was.
        Raises ValueError if another model has read the tokens before."""
        B, H, T, D = k.shape
        if self.length and layer not in self.store:
            raise ValueError("a KVCache belongs to one model: make a new one for each")
        if window:
            if self.length:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.store[layer], (k, v)))
            first = max(0, k.size(2) - window + 1)  # of those that the next token sees
            self.next[layer] = [x[:, :, first:].detach().clone() for x in (k, v)]
            return k, v  # (B, H, at most window - 1 + T, D)
        if not self.length:
            self.store[layer] = [k.new_empty(B, H, self.max_length, D) for _ in range(2)]
        end = self.length + T
        for stored, new in zip(self.store[layer], (k, v)):
            stored[:, :, self.length:end] = new.detach()
        return [x[:, :, :end] for x in self.store[layer]]  # (B, H, length + T, D)

    def advance(self, length):
        """All layers have appended their part of `length` tokens."""
        self.store.update(self.next)
        self.length = length

    @staticmethod
    def refuse_backward(gradient):
        raise RuntimeError("a KVCache keeps no gradients: train without a cache")


class CausalSelfAttention(nn.Module):
    """x (B, T, C) -> (B, T, C). Applies what LayerPositions holds; knows no encoding by name."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout  # of attention weights

    def forward(self, x, positions, cache=None):
        B, T, C = x.size()  # with a cache, T counts the new tokens only
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if positions.rotary is not None:
            q, k = rotate(q, *positions.rotary), rotate(k, *positions.rotary)
        if positions.query_scale is not None:
            q = q * positions.query_scale.to(q.dtype)
        if cache is not None:
            k, v = cache.append(self, k, v, positions.window)  # (B, H, Tk, D)
        # Without a mask the kernel builds the causal one itself and can take its fast path.
        # is_causal must be a Python bool; under torch.compile, T > 1 is symbolic.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=positions.mask,
            is_causal=True if positions.mask is None and T > 1 else False,
            dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """x (B, T, C) -> (B, T, C), each token by itself."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()  # exact, as in nanoGPT; GPT-2's is an approximation by tanh
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP. Each is added to the residual stream x (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, positions, cache=None):
        x = x + self.attn(self.ln_1(x), positions, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with a choice of encoding. With pe="learned" it is the GPT-2 of nanoGPT, weight names
    included."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=None,  # the encoding, under GPT-2's name for its table of positions; drawn below
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, module in self.named_modules():
            self._init_weights(name, module)
        # Encodings last: with one seed all other weights are then the same, whatever the encoding.
        self.transformer["wpe"] = PE[config.pe](config)
        # Short-window layers share the encoding, and what it learns, with the full layers unless
        # theirs differs.
        self.configs = {"L": config, "S": config.local()}
        self.encodings = {"L": self.transformer.wpe, "S": self.transformer.wpe}
        different = {(c.pe, c.rope_base, c.rope_scaling) for c in self.configs.values()}
        if "S" in config.kinds() and len(different) > 1:
            self.encodings["S"] = PE[self.configs["S"].pe](self.configs["S"])
            self.transformer["wpe_local"] = self.encodings["S"]

    def _init_weights(self, name, module):
        # GPT-2's: standard deviation 0.02, divided by sqrt(2 n_layer) for the 2 n_layer matrices
        # that write to the residual stream, since their outputs add up there.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        """Token ids idx (B, T) -> logits, loss.

        With targets (B, T): logits (B, T, V) and the cross-entropy in nats; targets of -1 are
        ignored. The loss is the mean, or with reduction="none" that of each token, float32 (B, T).
        Without targets: logits of the last position (B, 1, V), and None.
        With a KVCache, idx continues the tokens in the cache; a backward raises RuntimeError.
        Raises ValueError if there are no tokens, more than the encoding or the cache has room for,
        a cache of another model, targets of another shape or, with a mean, only targets of -1 (on a
        GPU, where this check would cost a wait, and if compiled, that mean is nan)."""
        past = 0 if cache is None else cache.length
        self.check_input(idx, targets, past, cache, reduction)
        pos = torch.arange(past + idx.size(1), device=idx.device)
        kinds, embedded = self.config.kinds(), self.transformer.wte(idx)

        x = self.transformer.drop(self.transformer.wpe.embed(embedded, pos[past:]))  # (B, T, C)
        positions = {kind: self.layer_positions(kind, pos, past) for kind in sorted(set(kinds))}
        for block, kind in zip(self.transformer.h, kinds):
            x = block(x, positions[kind], cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(len(pos))
            if x.requires_grad:
                x.register_hook(cache.refuse_backward)

        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                               reduction=reduction)  # a number, or (B T,)
        return logits, (loss.view_as(targets) if reduction == "none" else loss)

    def check_input(self, idx, targets, past, cache, reduction):
        """Raise the ValueErrors of forward."""
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"idx must hold tokens (B, T), not {tuple(idx.shape)}")
        for room, words in ((self.transformer.wpe.max_length, f"pe {self.config.pe} is defined for "
                             "at most"), (cache and cache.max_length, "the cache has room for")):
            if room is not None and past + idx.size(1) > room:
                raise ValueError(f"{words} {room} tokens, not for {past + idx.size(1)}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} differ from idx {tuple(idx.shape)}")
        on_cpu = idx.device.type == "cpu" and not torch.compiler.is_compiling()
        if targets is not None and reduction == "mean" and on_cpu and (targets == -1).all():
            raise ValueError("all targets are -1, so there is no mean loss")

    def layer_positions(self, kind, pos, past):
        """The LayerPositions of the layers of one kind, "S" or "L", for queries at pos[past:] and
        the keys that they see."""
        config, pe = self.configs[kind], self.encodings[kind]
        window = config.window if kind == "S" else 0
        oldest = max(0, past - window + 1) if window else 0
        q_pos, k_pos = pos[past:], pos[oldest:]
        with torch.autocast(pos.device.type, enabled=False):  # float32, as PositionalEncoding says
            rotary, bias = pe.rotary(q_pos), pe.bias(q_pos, k_pos)
        mask = self.attention_mask(bias, q_pos, k_pos, window)
        query_scale = self.query_scale(config, q_pos, window, rotary is not None)
        return LayerPositions(rotary, mask, query_scale, window)

    def attention_mask(self, bias, q_pos, k_pos, window):
        """Bias (H, Tq, Tk) or None -> the mask of LayerPositions: causal, within the window."""
        plain = len(q_pos) in (1, len(k_pos)) and not 0 < window < len(k_pos)
        if bias is None and plain:
            return None  # a single query that sees all keys, or plain causal attention
        visible = k_pos <= q_pos[:, None]  # (Tq, Tk)
        if window:
            visible &= k_pos > q_pos[:, None] - window
        if bias is None:
            return visible
        device, dtype = bias.device.type, self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # the kernel wants the type of the queries
        return torch.where(visible, bias, -math.inf).to(dtype)[None]  # (1, H, Tq, Tk)

    def query_scale(self, config, pos, window, rotated):
        """Queries at pos (T,), each of which sees at most `window` tokens (0: all) -> query_scale
        of LayerPositions, float32 (T, 1), or None.

        yarn: (0.1 ln factor + 1)^2 (arXiv 2309.00071, eqs. 21 and 22). The authors multiply cos and
        sin, and so q and k, by its square root; here q gets it all, pairs not rotated included.
        logn: max(1, ln n / ln L) for a query that sees n tokens. It offsets that attention
        spreads as the number of keys grows (J. Su; learned in arXiv 2501.19399). A bias is not
        multiplied."""
        scale = None
        if config.rope_scaling == "yarn" and rotated:
            scale = torch.full((len(pos), 1), (0.1 * math.log(config.rope_factor) + 1) ** 2,
                               device=pos.device)
        if config.attn_scaling == "logn":
            seen = pos[:, None] + 1  # tokens (T, 1)
            seen = seen.clamp(max=window) if window else seen
            logn = (torch.log(seen) / math.log(config.block_size)).clamp(min=1)
            scale = logn if scale is None else scale * logn
        return scale

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T); yield each new token (B, 1) as it is drawn.

        temperature=0 (below 1e-6) and top_k=1 are greedy. Without dropout, also while training.
        Can run beyond the trained context; learned positions see the last block_size tokens only.
        Raises ValueError, when the first token is asked for, if idx has no tokens, temperature is
        negative or top_k is below 1."""
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError("temperature must be at least 0 and top_k at least 1 or None, not "
                             f"{temperature} and {top_k}")
        if temperature < 1e-6:
            temperature, top_k = 1.0, 1
        limit = self.transformer.wpe.max_length or math.inf
        cache, new = KVCache(idx.size(-1) + max_new_tokens), idx
        for _ in range(max_new_tokens):
            training = self.training
            try:
                if training:  # the switch costs a sixth of the time per token
                    self.train(False)
                if idx.size(-1) <= limit:
                    logits, _ = self(new, cache=cache)  # (B, 1, V)
                else:  # the window slides, and every token gets a new position
                    logits, _ = self(idx[:, -limit:])
            finally:
                if training:
                    self.train()
            logits = logits[:, -1].float() / temperature  # (B, V)
            if top_k is not None:  # exactly k, of equal logits too, so that k = 1 is greedy
                logits, tokens = logits.topk(min(top_k, logits.size(-1)))  # (B, k)
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            new = new if top_k is None else tokens.gather(1, new)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> idx and its continuation (B, T + max_new_tokens). Errors as in stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

# --------------------------------------------------------------------------------------------------
# 3. The other encodings: on the embeddings, on the logits; ways to slow a rotation down


class Learned(PositionalEncoding):
    """A learned vector per position, added to the token embedding (GPT-2): x_n + w_n.

    L C parameters. Undefined beyond the trained context."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(0.02 * torch.randn(config.block_size, config.n_embd))  # (L, C)
        self.max_length = config.block_size

    def embed(self, x, pos):
        return x + F.embedding(pos, self.weight)


class Sinusoidal(PositionalEncoding):
    """Sines and cosines added to the embedding (Attention is all you need, arXiv 1706.03762).

    sqrt(C) x_n + (sin n theta_0, cos n theta_0, sin n theta_1, ...), theta_j = 10000^(-2j / C)
    (secs. 3.4 and 3.5). No parameters. sqrt(C) x_n starts with a standard deviation of 0.02
    sqrt(C), 0.23 at C = 128, so the sines and cosines (0.7) dominate until it has grown."""

    def __init__(self, config):
        super().__init__(config)
        self.theta = frequencies(config.n_embd).float()  # (C / 2,)

    def embed(self, x, pos):
        angle = pos[:, None] * self.theta.to(pos.device, non_blocking=True)  # (T, C / 2)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # (T, C) interleaved
        return x * math.sqrt(x.size(-1)) + wave.to(x.dtype)


def alibi_slopes(n_head):
    """ALiBi's slope of each head, float32 (n_head,): 2^(-8h / n_head), h = 1 ... n_head.

    If n_head is not a power of two: the slopes of the next lower power, then every other one of
    twice that power."""
    power = 2 ** int(math.log2(n_head))
    slopes = 2 ** (-8 / power * torch.arange(1, power + 1, dtype=torch.float64))
    between = 2 ** (-4 / power * torch.arange(1, 2 * power, 2, dtype=torch.float64))
    return torch.cat((slopes, between[:n_head - power])).float()


class ALiBi(PositionalEncoding):
    """Attention with linear biases (arXiv 2108.12409, sec. 3): -m_h * distance, m_h fixed.

    No parameters. Perplexity stays flat beyond L because far tokens hardly count: a head looks back
    a few times 1 / m_h tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.slopes = alibi_slopes(config.n_head)  # (H,)

    def bias(self, q_pos, k_pos):
        slopes = self.slopes.to(q_pos.device, non_blocking=True)
        return slopes[:, None, None] * (k_pos - q_pos[:, None])


def t5_bucket(distance, num_buckets=32, max_distance=128):
    """T5's bucket of each distance, int64 of the same shape. Negative distances count as 0.

    The first half of the buckets holds one distance each. Those of the second half grow by a
    constant factor up to max_distance; all longer distances share the last bucket."""
    half = num_buckets // 2
    distance = distance.clamp(min=0)
    fraction = torch.log(distance.clamp(min=half) / half) / math.log(max_distance / half)
    far = half + (fraction * (num_buckets - half)).long()
    return torch.where(distance < half, distance, far.clamp(max=num_buckets - 1))


class T5(PositionalEncoding):
    """T5's relative bias (arXiv 1910.10683, sec. 2.1): a learned number per head and bucket.

    32 H parameters, shared by the layers as in the paper. Unlike there, logits are divided by
    sqrt(D). The table starts at zero, so that the model starts as NoPE."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(32, config.n_head))

    def bias(self, q_pos, k_pos):
        bucket = t5_bucket(q_pos[:, None] - k_pos)  # (Tq, Tk)
        return F.embedding(bucket, self.table.float()).permute(2, 0, 1)  # (H, Tq, Tk)


class KERPLE(PositionalEncoding):
    """KERPLE, logarithmic kernel (arXiv 2205.09921): -r1 ln(1 + r2 distance), r1 and r2 learned.

    2 H parameters, shared by the layers (the authors give each layer its own). r1 and r2 are at
    least 0.01, as in the authors' code: smaller values are reflected, since a clamp would have no
    gradient."""

    def __init__(self, config):
        super().__init__(config)
        self.r1 = nn.Parameter(2 * torch.rand(config.n_head))
        self.r2 = nn.Parameter(torch.rand(config.n_head))

    def bias(self, q_pos, k_pos):
        r1, r2 = (0.01 + (r.float() - 0.01).abs()[:, None, None] for r in (self.r1, self.r2))
        distance = (q_pos[:, None] - k_pos).clamp(min=0)  # (Tq, Tk)
        return -r1 * torch.log1p(r2 * distance)  # (H, Tq, Tk)


class FIRE(PositionalEncoding):
    """FIRE (arXiv 2310.04418, sec. 3): the output of a small network for distance / position.

    f(psi(distance) / psi(max(i, threshold))) with psi(x) = ln(|c| x + 1), the query's position i
    and f: 1 -> 32 -> H with a ReLU. The argument of f is in [0, 1] at any length. 33 H + 66
    parameters, shared by the layers (the paper's FIRE-S). c is learned, and so is the threshold,
    which starts at L (there: 512).
    """

    def __init__(self, config):
        super().__init__(config)
        self.block_size = config.block_size
        self.c = nn.Parameter(torch.tensor(0.1))
        self.multiplier = nn.Parameter(torch.tensor(1.0))  # of the threshold
        hidden, out = nn.Linear(1, 32), nn.Linear(32, config.n_head)  # drawn as PyTorch does
        self.weight_1, self.bias_1 = nn.Parameter(hidden.weight[:, 0].detach()), hidden.bias
        self.weight_2, self.bias_2 = out.weight, out.bias

    def bias(self, q_pos, k_pos):
        c, threshold = self.c.float().abs(), (self.multiplier.float() * self.block_size).abs()
        distance = (q_pos[:, None] - k_pos).clamp(min=0)  # (Tq, Tk)
        reach = torch.maximum(q_pos, threshold)[:, None]  # (Tq, 1)
        x = torch.log1p(c * distance) / (torch.log1p(c * reach) + 1e-6)  # (Tq, Tk) in [0, 1]
        hidden = F.relu(x[..., None] * self.weight_1.float() + self.bias_1.float())  # (Tq, Tk, 32)
        bias = hidden @ self.weight_2.float().T + self.bias_2.float()  # (Tq, Tk, H)
        return bias.permute(2, 0, 1)  # (H, Tq, Tk)

# Three ways to slow the rotation down, so that a model trained on L = block_size tokens can read
# factor * L. Each takes all frequencies theta (D / 2,) and the base that they were made with.


def pi(theta, base, block_size, factor):
    """Position interpolation: theta / factor (arXiv 2306.15595, eq. 4)."""
    return theta / factor


def ntk(theta, base, block_size, factor):
    """NTK-aware (arXiv 2309.00071, sec. 3.1): the base times factor^(D / (D - 2)), which keeps the
    fastest pair and divides the slowest by factor."""
    j = torch.arange(len(theta), dtype=theta.dtype)
    return theta * factor ** (-2 * j / max(2 * len(theta) - 2, 1))


def yarn(theta, base, block_size, factor):
    """YaRN (arXiv 2309.00071): keep pairs with over 32 turns in L, divide those with under 1 turn.

    In between, a linear ramp over the pair's index, as in the authors' code (in the paper: over the
    number of turns). The limits head_dim - 1 and 0.001 are those of that code, too. YaRN's
    temperature is in GPT.query_scale."""
    head_dim = 2 * len(theta)
    j = torch.arange(len(theta), dtype=theta.dtype)
    first, last = (head_dim * math.log(block_size / (2 * math.pi * turns)) / (2 * math.log(base))
                   for turns in (32, 1))  # index, not an integer yet, of the pair with these turns
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    ramp = ((j - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: keep, 1: divide
    return theta * (1 - ramp) + theta / factor * ramp


SCALINGS = {"pi": pi, "ntk": ntk, "yarn": yarn}

PE = {"nope": NoPE, "learned": Learned, "sinusoidal": Sinusoidal, "rope": RoPE, "prope": PRoPE,
      "hope": HoPE, "alibi": ALiBi, "t5": T5, "kerple": KERPLE, "fire": FIRE}
ROTARY = [name for name, encoding in PE.items() if issubclass(encoding, RoPE)]

# --------------------------------------------------------------------------------------------------
# 4. The configuration


def setting(default, help, used_by=(), **limits):
    """A field of a configuration: default, a line of help, the encodings that use it (none named:
    all), and limits such as at_least=1. Command-line flags are made from these fields."""
    metadata = {"help": help, "used_by": used_by, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


LIMITS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt,
          "below": operator.lt, "one_of": lambda value, choices: value in choices}


def check_value(value, limits, name="it"):
    """Raise ValueError if a value is outside the limits of its field."""
    for limit, bound in limits.items():
        if not LIMITS[limit](value, bound):
            words = ", ".join(bound) if limit == "one_of" else bound
            raise ValueError(f"{name} must be {limit.replace('_', ' ')} {words}, not {value}")


@dataclass
class GPTConfig:
    """Everything that defines the network. Most fields are flags of train.py.

    Raises ValueError if a value is outside its limits or if values do not fit each other."""

    block_size: int = setting(128, "trained context L in tokens", at_least=2)
    vocab_size: int = setting(256, "size of the vocabulary; set by the tokenizer", at_least=1)
    n_layer: int = setting(4, "number of blocks", at_least=1)
    n_head: int = setting(4, "attention heads per block", at_least=1)
    n_embd: int = setting(128, "channels", at_least=1)
    dropout: float = setting(0.0, "probability; 0.1 to 0.2 if a small text is read many times",
                             at_least=0, below=1)
    bias: bool = setting(True, "biases in linear layers and norms, as in GPT-2")
    pe: str = setting("hope", "positional encoding", one_of=PE)
    rope_base: float = setting(10000.0, "base of theta_j = base^(-2j/D)", used_by=ROTARY, above=1)
    prope_fraction: float = setting(0.75, "fraction p of the pairs that is rotated",
                                    used_by=("prope",), at_least=0, at_most=1)
    hope_cutoff: float = setting(1.0, "rotate the pairs with at least this many turns within L",
                                 used_by=("hope",), at_least=0)
    window_pattern: str = setting("L", "S for a short-window layer, L for a full layer, such as "
                                  "SSSL; repeated over the layers; the last is always L")
    window: int = setting(0, "tokens that a query of a short-window layer sees, itself included; "
                          "0: all", at_least=0)
    local_pe: str | None = setting(None, "encoding of the short-window layers; default: that of pe",
                                   one_of=PE)
    local_rope_base: float | None = setting(None, "rope_base of the short-window layers; default: "
                                            "that of the full layers", above=1)
    rope_scaling: str = setting("none", "slow the rotation of rope, prope and hope down for "
                                "contexts longer than the trained one, in layers that see more "
                                "than L tokens", one_of=("none", *SCALINGS))
    rope_factor: float = setting(1.0, "how many times longer; 1 scales nothing", at_least=1)
    rope_context: int | None = setting(None, "trained context that rope_scaling and HoPE use, "
                                       "for a network that was first trained on another one; "
                                       "default: block_size", at_least=2)
    attn_scaling: str = setting("none", "logn: multiply the logits of the n-th query by "
                                "ln n / ln L if it sees n > L tokens", one_of=("none", "logn"))

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_value(value, field.metadata["limits"], field.name)
        head_dim, rotary = self.n_embd // self.n_head, self.rotary_names()
        acts_on_embeddings = PE[self.local_pe or "nope"].embed is not PositionalEncoding.embed
        for wrong, message in (
            (not self.window_pattern or set(self.window_pattern) - set("SL"),
             f"window_pattern must consist of the letters S and L, not {self.window_pattern!r}"),
            (self.n_embd % self.n_head,
             f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}"),
            (rotary and head_dim % 2,
             f"{' and '.join(rotary)} rotates pairs of channels, so n_embd / n_head must be even, "
             f"not {head_dim}, an odd number"),
            (self.pe == "sinusoidal" and self.n_embd % 2,
             f"sinusoidal needs an even n_embd, not {self.n_embd}"),
            (self.rope_scaling != "none" and not rotary,
             f"rope_scaling needs a rotary encoding: {self.pe} does not rotate"),
            (acts_on_embeddings,
             f"local_pe {self.local_pe} acts on the embeddings, which all layers share"),
        ):
            if wrong:
                raise ValueError(message)

    def rotary_names(self):
        """The rotary ones among pe and local_pe."""
        return [pe for pe in (self.pe, self.local_pe) if pe in ROTARY]

    def kinds(self):
        """The kind of each layer: S for a short-window layer, L for a full one."""
        return (self.window_pattern * self.n_layer)[:self.n_layer - 1] + "L"

    def local(self):
        """The configuration of the short-window layers. A window of at most L tokens contains no
        distance beyond L, so nothing is scaled there."""
        pe, within = self.local_pe or self.pe, 0 < self.window <= self.block_size
        base = self.local_rope_base if pe in ROTARY else None
        return replace(self, pe=pe, rope_base=base or self.rope_base, local_pe=None,
                       rope_scaling="none" if within or pe not in ROTARY else self.rope_scaling,
                       attn_scaling="none" if within else self.attn_scaling)
