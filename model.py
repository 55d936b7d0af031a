"""One Transformer for every method and task: integer layers (gft), latent weights (ste) or fp32 (adamw, muon, ...).

Pre-norm blocks with a parameter-free RMSNorm in front of every weight matrix (it lives in the layer),
RoPE, normalised queries and keys, squared ReLU, no bias, no learned gain: with method "gft" the net has no
float parameter at all, unless `int_layers` leaves some kinds of layer in fp32.

    text     attention is causal over a sliding window of `context` keys, so a text may be longer than the context it
             was trained at
    images   a ViT: patches through an integer layer, attention among all of them, positions by RoPE over rows and
             columns, the mean of all patches to the head
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from decoder import ATTENTION_SCALE, ROPE_BASE
from gft.baselines import FloatEmbedding, FloatLinear
from gft.layers import Delta, IntEmbedding, IntLinear
from kernels.backend import on_triton
from kernels.dropout import dropout
from kernels.heads import split_heads
from run import checkpoint
from run.config import LAYER_KINDS, Config
from run.errors import UserError
from run.packed import load_packed

IMAGE_ROPE_BASE = 100.0  # positions are row and column numbers, a few dozen at most


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
    keep_bits: int = 0
    levels: int = 3
    init_std: float = 0.33
    act_range: float = 6.0
    delta: str = "int8"
    delta_bits: int = 8
    delta_scale: str = "step"
    precision: str = "fp32"
    dropout: float = 0.0
    int_layers: tuple[str, ...] = LAYER_KINDS
    model: str = "transformer"  # or "mlp"
    image: tuple[int, int, int] | None = None  # height, width and channels; None for text
    patch: int = 8

    @property
    def activations(self) -> torch.dtype:
        """What goes from layer to layer; autocast decides for a baseline."""
        return torch.bfloat16 if self.method == "gft" and self.precision == "bf16" else torch.float32

    @classmethod
    def from_config(cls, config: Config, vocab_size: int, image: tuple[int, int, int] | None = None) -> "ModelConfig":
        """Pick the model's keys out of a run.config.Config; vocab_size is the number of outputs,
        classes with images."""
        taken = {f.name for f in fields(cls)} - {"vocab_size", "int_layers", "image"}
        own = {key: getattr(config, key) for key in taken}
        return cls(vocab_size, **own, int_layers=config.integer_kinds, image=image)


class LayerFactory:
    """Makes the layers of a net in order; the order is a layer's identity in the random streams."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed, self.made = config, seed, 0
        self.delta = Delta(config.delta, config.delta_scale, config.delta_bits)

    def _next(self) -> int:
        self.made += 1
        return self.made - 1

    @property
    def _latent_bits(self) -> int | None:
        return self.config.bits if self.config.method == "ste" else None

    def _integer(self, kind: str) -> bool:
        return self.config.method == "gft" and kind in self.config.int_layers

    def linear(
        self, kind: str, in_features: int, out_features: int, gain: float = 1.0, squared_relu: bool = False
    ) -> nn.Module:
        """A linear layer with its norm, integer or not as method and `int_layers` ask; kind is one of LAYER_KINDS."""
        c = self.config
        if self._integer(kind):
            return IntLinear(
                in_features, out_features, c.bits, gain, squared_relu, c.init_std, c.act_range, self.seed,
                self._next(), self.delta, c.keep_bits, c.levels,
            )  # fmt: skip
        return FloatLinear(in_features, out_features, gain, squared_relu, self._latent_bits, self.seed, self._next())

    def embedding(self, rows: int, width: int) -> nn.Module:
        """A table of unit-variance rows, of the kind the method asks for."""
        c = self.config
        if self._integer("embedding"):
            return IntEmbedding(
                rows, width, c.bits, 1.0, c.init_std, self.seed, self._next(), c.activations, self.delta,
                c.keep_bits, c.levels,
            )
        return FloatEmbedding(rows, width, self._latent_bits, self.seed, self._next())


def rope_table(first: int, count: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and signed sin of positions first .. first + count - 1: float32 (2, count, head_dim)."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(first, first + count, device=device, dtype=torch.float32), frequency)
    return rotation(angle)


def rotation(angle: Tensor) -> Tensor:
    """Angles (T, hd / 2) of pairs (i, i + hd / 2) to what multiplies each element and its partner: (2, T, hd)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


def image_rope_table(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and signed sin for patches row by row: half of the pairs turn with the row, half with the column.

    float32 (2, rows * columns, head_dim); head_dim must be a multiple of 4.
    """
    frequency = IMAGE_ROPE_BASE ** (-torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim)
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angle = torch.cat([torch.outer(p.flatten().float(), frequency) for p in (row, column)], dim=1)
    return rotation(angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (i, i + hd / 2) of x (B, T, H, hd) as `table` says."""
    straight, across = table[:, :, None]  # (T, 1, hd) each: cos, and sin with its sign
    return (x * straight + x.roll(x.shape[-1] // 2, dims=-1) * across).to(x.dtype)


def heads(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 d) to queries, keys and values, each (B, T, H, hd), queries and keys normalised and rotated."""
    queries_keys, v = rearrange(qkv, "b t (three h d) -> three b t h d", three=3, h=n_head).split((2, 1))
    q, k = F.rms_norm(queries_keys, v.shape[-1:])
    return rotate(q, table), rotate(k, table), v[0]


def window_mask(queries: int, keys: int, context: int, device: torch.device) -> Tensor:
    """True where the query, the last of `queries` being the newest of `keys`, may look: itself and context - 1 back."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (back >= 0) & (back < context)


def attention(q: Tensor, k: Tensor, v: Tensor, **masking) -> Tensor:
    """torch's attention of q (B, H, T, hd) over k and v (B, H, keys, hd), `is_causal` or with an `attn_mask`.

    On a CPU it computes in fp32 whatever it is given: torch's 16-bit backward pass takes four times as long there.
    """
    scale = ATTENTION_SCALE / q.shape[-1] ** 0.5
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **masking)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale, **masking)
    return y.to(v.dtype)


class Cache:
    """Keys and values of the last `context` tokens of each layer, and how many tokens have gone by."""

    def __init__(self, n_layer: int):
        self.seen = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def repeat(self, rows: int) -> None:
        """So many texts go on from the one that has been fed."""
        self.layers = [tuple(part.repeat(rows, 1, 1, 1) for part in layer) for layer in self.layers]


class Block(nn.Module):
    """x + attention, then x + MLP; the last matrix of each is scaled by 1 / sqrt(2 n_layer)."""

    def __init__(self, config: ModelConfig, make: LayerFactory):
        super().__init__()
        d, residual_gain = config.d_model, (2 * config.n_layer) ** -0.5
        self.n_head, self.context, self.causal = config.n_head, config.context, config.image is None
        self.dropout = config.dropout
        self.qkv = make.linear("attention", d, 3 * d)
        self.out = make.linear("attention", d, d, gain=residual_gain)
        self.up = make.linear("mlp", d, 4 * d)
        self.down = make.linear("mlp", 4 * d, d, gain=residual_gain, squared_relu=True)

    def forward(
        self, x: Tensor, table: Tensor, cache: Cache | None = None, layer: int = 0, rng: Tensor | None = None
    ) -> Tensor:
        """x (B, T, d) to (B, T, d); table from `rope_table`, rng as for `Transformer.forward`."""
        qkv, x = self.qkv(x, fork=True)
        x = self._branch(self.out, self.attend(qkv, table, cache, layer, rng), x, 3 * layer + 1, rng)
        hidden, x = self.up(x, fork=True)
        return self._branch(self.down, hidden, x, 3 * layer + 2, rng)

    def _branch(self, last: nn.Module, y: Tensor, x: Tensor, place: int, rng: Tensor | None) -> Tensor:
        """x plus what the branch's last layer makes of y, some of which is dropped in training."""
        return last(y, residual=x) if rng is None else x + self._drop(last(y), place, rng)

    def _drop(self, x: Tensor, place: int, rng: Tensor, group: int = 1) -> Tensor:
        """x (B, T, d) with a share of its groups of columns dropped; each place in the net has its own noise."""
        return dropout(x.flatten(0, 1), self.dropout, rng, place * x.shape[-1], group).view(x.shape)

    def attend(
        self, qkv: Tensor, table: Tensor, cache: Cache | None, layer: int, rng: Tensor | None = None
    ) -> Tensor:
        """(B, T, 3 d) to (B, T, d)."""
        split = split_heads if on_triton(qkv) and not torch.compiler.is_compiling() else heads
        # (B, H, T, hd) for attention; in memory they stay as they are, so that its output is already a row a token.
        q, k, v = split(qkv, table, self.n_head)
        if rng is not None:  # values in place of attention's weights, for which torch's kernels take no mask of ours
            v = self._drop(v.flatten(2), 3 * layer, rng, group=v.shape[-1]).view(v.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            if cache.layers[layer] is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache.layers[layer], (k, v), strict=True))
            newest = (k[:, :, -self.context :], v[:, :, -self.context :])
            cache.layers[layer] = newest
            k, v = newest if q.shape[2] == 1 else (k, v)
        n, keys = q.shape[2], k.shape[2]
        if not self.causal or (n == 1 and keys <= self.context):
            y = attention(q, k, v)
        elif n == keys <= self.context:
            y = attention(q, k, v, is_causal=True)
        else:
            y = attention(q, k, v, attn_mask=window_mask(n, keys, self.context, q.device))
        return rearrange(y, "b h t d -> b t (h d)")


class Transformer(nn.Module):
    """A causal language model, tokens int64 (B, T) to logits (B, T, vocab);
    or a ViT, images (B, C, H, W) to (B, classes)."""

    def __init__(self, config: ModelConfig, seed: int = 1):
        super().__init__()
        self.config = config
        make = LayerFactory(config, seed)
        if config.image is None:
            self.embedding = make.embedding(config.vocab_size, config.d_model)
        else:
            self.embedding = make.linear("patch", config.patch**2 * config.image[2] + 1, config.d_model)
        self.blocks = nn.ModuleList(Block(config, make) for _ in range(config.n_layer))
        self.head = make.linear("head", config.d_model, config.vocab_size)

    def new_cache(self) -> Cache:
        """An empty cache for `forward(tokens, cache=...)`; the first tokens fed fix its batch."""
        return Cache(self.config.n_layer)

    def forward(self, x: Tensor, cache: Cache | None = None, rng: Tensor | None = None) -> Tensor:
        """Logits of tokens (B, T) or images (B, C, H, W). With a cache, tokens follow those it has seen, at the same
        cost however many those are. With rng, int64 (3,) = [seed, step, row of the step's B T that x begins with],
        `dropout` is at work."""
        if self.config.image is not None:
            return self._classify(x, rng)
        first = cache.seen if cache else 0
        table = rope_table(first, x.shape[1], self.config.d_model // self.config.n_head, x.device)
        h = self.embedding(x).to(self.config.activations)
        for layer, block in enumerate(self.blocks):
            h = block(h, table, cache, layer, rng)
        if cache:
            cache.seen += x.shape[1]
        return self.head(h)

    def _classify(self, images: Tensor, rng: Tensor | None) -> Tensor:
        side = self.config.patch
        patches = rearrange(images, "b z (r p) (c q) -> b (r c) (p q z)", p=side, q=side)
        # The norm in front of the layer takes away a patch's contrast; a constant beside the pixels keeps it readable.
        h = self.embedding(F.pad(patches, (0, 1), value=1.0).to(self.config.activations))
        rows, columns = (n // side for n in images.shape[2:])
        table = image_rope_table(rows, columns, self.config.d_model // self.config.n_head, images.device)
        for layer, block in enumerate(self.blocks):
            h = block(h, table, None, layer, rng)
        return self.head(h.mean(dim=1))


class MLP(nn.Module):
    """Fully connected, squared ReLU: images (B, C, H, W) to logits (B, classes) through n_layer hidden layers of
    d_model.

    With one hidden layer of 256 it is the network of the paper's MNIST experiment.
    """

    def __init__(self, config: ModelConfig, seed: int = 1):
        super().__init__()
        self.config = config
        make = LayerFactory(config, seed)
        widths = [math.prod(config.image), *[config.d_model] * config.n_layer]
        pairs = enumerate(pairwise(widths))
        self.blocks = nn.ModuleList(make.linear("mlp", a, b, squared_relu=i > 0) for i, (a, b) in pairs)
        self.head = make.linear("head", config.d_model, config.vocab_size, squared_relu=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W)."""
        h = images.flatten(1).to(self.config.activations)
        for layer in self.blocks:
            h = layer(h)
        return self.head(h)


def make_net(config: ModelConfig, seed: int = 1) -> Transformer | MLP:
    """The net that config describes."""
    return MLP(config, seed) if config.model == "mlp" else Transformer(config, seed)


def compiled_whole(net: nn.Module) -> bool:
    """Whether torch.compile gets the whole net. On a GPU a net of integer layers consists of kernels but for its
    attention; a CUDA graph does what else a compiler would: it launches them."""
    return any(p.is_floating_point() or not p.is_cuda for p in net.parameters())


def load_net(
    folder: Path, name: str = "", option: str = "--checkpoint {}"
) -> tuple[Transformer | MLP, dict[str, Any], Path]:
    """The net of a checkpoint in `folder`, on the CPU, what else is saved with it, and its JSON. In place of a folder
    it may be a packed file (run/packed.py), which is then returned for the JSON.

    Without a name it is "best", or "last" where there is no best. Raises UserError, which recommends `option`, if the
    checkpoint cannot be used.
    """
    if folder.is_file():
        arrays, meta = load_packed(folder)
        tensors, head = {name: torch.from_numpy(array) for name, array in arrays.items()}, folder
    else:
        name = name or ("best" if checkpoint.exists(folder, "best") else "last")
        tensors, meta = checkpoint.load(folder, name, option)
        head = folder / f"{name}.json"
    cfg = checkpoint.config_of(meta, head)
    _check_meta(meta, cfg, tensors, head)
    image = tuple(meta["image"]) if "image" in meta else None
    net = make_net(ModelConfig.from_config(cfg, meta["vocab_size"], image), cfg.seed)
    try:
        net.load_state_dict(checkpoint.group(tensors, "model"))
    except RuntimeError as error:
        raise UserError(f"{head} does not fit this version's network: {error}") from error
    return net, meta, head


def _check_meta(meta: dict[str, Any], cfg: Config, tensors: dict[str, Tensor], head: Path) -> None:
    """Raises UserError where a JSON says of outputs or images what cannot be; anyone can write one with a good hash."""
    checkpoint.require(meta, head, vocab_size=int)
    fits = len(tensors.get("model.head.weight", ())) == meta["vocab_size"]
    if "image" in meta:
        checkpoint.require(meta, head, image=list, classes=list, mean=list, std=list)
        image, mean, std = meta["image"], meta["mean"], meta["std"]
        whole = len(image) == 3 and all(type(size) is int and 0 < size <= 1024 for size in image)
        square = whole and image[0] == image[1] and (cfg.model == "mlp" or image[0] % cfg.patch == 0)
        pixels = whole and len(mean) == len(std) == image[2] and all(isinstance(share, float) for share in mean + std)
        fits = fits and square and pixels and len(meta["classes"]) == meta["vocab_size"]
    if not fits:
        raise UserError(f"{head} does not fit this version's network: its head, its classes or the form of its images")
