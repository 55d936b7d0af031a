"""One Transformer for every method: integer layers (gft), latent weights (ste) or fp32 (adamw, muon).

Pre-norm blocks with a parameter-free RMSNorm in front of every weight matrix (it lives in the layer),
RoPE, normalised queries and keys, squared ReLU, no bias, no learned gain: with method "gft" the net has no
float parameter at all. Attention is causal over a sliding window of `context` keys, so a text may be longer
than the context it was trained at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gft.baselines import FloatEmbedding, FloatLinear
from gft.layers import IntEmbedding, IntLinear

ATTENTION_SCALE = 1.5  # times 1 / sqrt(head_dim); queries and keys have unit rms
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class ModelConfig:
    """What fixes the shape of a net and of its layers."""

    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    context: int = 64
    method: str = "gft"
    bits: int = 6
    init_spread: float = 0.33
    act_range: float = 6.0

    @classmethod
    def from_config(cls, config, vocab_size: int) -> "ModelConfig":
        """Pick the model's keys out of a gft.config.Config."""
        keys = ("n_layer", "n_head", "d_model", "context", "method", "bits", "init_spread", "act_range")
        return cls(vocab_size, **{key: getattr(config, key) for key in keys})


class LayerFactory:
    """Makes the layers of a net in order; the order is a layer's identity in the random streams."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed, self.made = config, seed, 0

    def _next(self) -> int:
        self.made += 1
        return self.made - 1

    @property
    def _latent_bits(self) -> int | None:
        return self.config.bits if self.config.method == "ste" else None

    def linear(self, in_features: int, out_features: int, gain: float = 1.0, squared_relu: bool = False) -> nn.Module:
        """A linear layer with its norm, of the kind the method asks for."""
        c = self.config
        if c.method == "gft":
            return IntLinear(
                in_features, out_features, c.bits, gain, squared_relu, c.init_spread, c.act_range, self.seed, self._next()
            )
        return FloatLinear(in_features, out_features, gain, squared_relu, self._latent_bits, self.seed, self._next())

    def embedding(self, rows: int, width: int) -> nn.Module:
        """A table of unit-variance rows, of the kind the method asks for."""
        c = self.config
        if c.method == "gft":
            return IntEmbedding(rows, width, c.bits, 1.0, c.init_spread, self.seed, self._next())
        return FloatEmbedding(rows, width, self._latent_bits, self.seed, self._next())


def rope_table(first: int, count: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin of positions first .. first + count - 1: float32 (2, count, head_dim / 2)."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(first, first + count, device=device, dtype=torch.float32), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def normalise_rotate(x: Tensor, table: Tensor) -> Tensor:
    """RMS-normalise queries or keys over head_dim, then rotate pairs (i, i + head_dim / 2): (B, H, T, hd)."""
    x = F.rms_norm(x, x.shape[-1:])
    a, b = x.chunk(2, dim=-1)
    cos, sin = table
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def heads(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 d) to queries, keys and values, each (B, H, T, hd), queries and keys normalised and rotated."""
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=n_head)
    return normalise_rotate(q, table), normalise_rotate(k, table), v


def window_mask(queries: int, keys: int, context: int, device: torch.device) -> Tensor:
    """True where the query, the last of `queries` being the newest of `keys`, may look: itself and context - 1 back."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (back >= 0) & (back < context)


class Cache:
    """Keys and values of the last `context` tokens of each layer, and how many tokens have gone by."""

    def __init__(self, n_layer: int):
        self.seen = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer


class Block(nn.Module):
    """x + attention, then x + MLP; the last matrix of each is scaled by 1 / sqrt(2 n_layer)."""

    def __init__(self, config: ModelConfig, make: LayerFactory):
        super().__init__()
        d, residual_gain = config.d_model, (2 * config.n_layer) ** -0.5
        self.n_head, self.context = config.n_head, config.context
        self.qkv = make.linear(d, 3 * d)
        self.out = make.linear(d, d, gain=residual_gain)
        self.up = make.linear(d, 4 * d)
        self.down = make.linear(4 * d, d, gain=residual_gain, squared_relu=True)

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """x (B, T, d) to (B, T, d); table from `rope_table`."""
        x = x + self.out(self.attend(self.qkv(x), table, cache, layer))
        return x + self.down(self.up(x))

    def attend(self, qkv: Tensor, table: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """(B, T, 3 d) to (B, T, d)."""
        q, k, v = heads(qkv, table, self.n_head)
        if cache is not None:
            if cache.layers[layer] is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache.layers[layer], (k, v), strict=True))
            cache.layers[layer] = (k[:, :, -self.context :], v[:, :, -self.context :])
        scale = ATTENTION_SCALE / q.shape[-1] ** 0.5
        n, keys = q.shape[2], k.shape[2]
        if n == keys <= self.context:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            mask = window_mask(n, keys, self.context, q.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return rearrange(y, "b h t d -> b t (h d)")


class Transformer(nn.Module):
    """A causal language model. tokens int64 (B, T) to logits float32 (B, T, vocab)."""

    def __init__(self, config: ModelConfig, seed: int = 1):
        super().__init__()
        self.config = config
        make = LayerFactory(config, seed)
        self.embedding = make.embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, make) for _ in range(config.n_layer))
        self.head = make.linear(config.d_model, config.vocab_size)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `forward(tokens, cache=...)`; `batch_size` rows are fixed by the first tokens fed."""
        return Cache(self.config.n_layer)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, vocab). With a cache, `tokens` follow those it has seen, at the same cost however many those are."""
        first = cache.seen if cache else 0
        head_dim = self.config.d_model // self.config.n_head
        table = rope_table(first, tokens.shape[1], head_dim, tokens.device)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, table, cache, layer)
        if cache:
            cache.seen += tokens.shape[1]
        return self.head(x)
