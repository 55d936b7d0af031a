"""The Transformer of model.py one token after another, in numpy: what sample.py runs on a CPU.

A new token is a few dozen products of one row, which numpy starts in a microsecond and torch in ten; and nothing waits
for torch to be imported. Every layer is integer here, and its sums are exact; norms, softmax and scales are fp32, as
torch's are but for the last digit.

    decoder = Decoder(tensors, cfg, vocab_size)
    logits = decoder.feed([[token, token, ...]])     (1, V), after the last of them
    decoder.repeat(64)                               64 texts go on from here
    logits = decoder.feed(tokens)                    (64, 1) to (64, V)
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.limits import threshold_of, weight_limit
from run.config import Config

Floats = NDArray[np.float32]
ATTENTION_SCALE = 1.5  # times 1 / sqrt(head_dim); queries and keys have unit rms
ROPE_BASE = 10_000.0
EPSILON = np.finfo(np.float32).eps  # of torch's rms_norm
SMALLEST_MEAN_SQUARE = 1e-30  # a row below it counts as zeros, as in kernels/rmsnorm_quantize.py
CHUNK = 512  # tokens of a prompt fed at once: memory grows with its square, not with the prompt's


def supports(cfg: Config) -> bool:
    """Whether a Decoder can run a net of these settings: a text model, all integer, with fp32 between its layers."""
    return not cfg.of_images and cfg.integer_kinds == cfg.layer_kinds and cfg.precision == "fp32"


def read_weight(weight: NDArray[np.int8], cfg: Config) -> NDArray[np.int8]:
    """What the products read of a kept weight, as gft/weight_grid.py has it."""
    if cfg.bits == cfg.kept_bits:
        return weight
    if cfg.bits == 1:
        return (weight >> 7) | 1
    if cfg.bits == 2:
        threshold = threshold_of(cfg.kept_bits, cfg.init_std, cfg.levels)
        if cfg.levels == 4:
            return ((weight >> 7) | 1) * np.where(np.abs(weight) > threshold, np.int8(3), np.int8(1))
        return (weight > threshold).astype(np.int8) - (weight < -threshold)
    ratio = np.float32(weight_limit(cfg.bits)[0] / weight_limit(cfg.kept_bits)[0])
    return np.rint(weight.astype(np.float32) * ratio).astype(np.int8)


class Layer:
    """RMSNorm, the int8 grid, the integer product, one scale: `IntLinear` of gft/layers.py."""

    def __init__(self, weight: NDArray[np.int8], scale: np.float32, cfg: Config):
        out, inner = weight.shape
        # Floats hold these integers: fp32 as long as no sum can pass 2^24, the largest up to which it has them all.
        exact = np.float32 if inner * 127 * weight_limit(cfg.bits, cfg.levels)[0] < 2**24 else np.float64
        self.weight = np.ascontiguousarray(read_weight(weight, cfg).T, dtype=exact)
        self.grid, self.scale = np.float32(127 / cfg.act_range), scale * np.float32(cfg.act_range / 127)

    def __call__(self, x: Floats) -> Floats:
        """x (rows, in) to (rows, out)."""
        x = x * inverse_rms(x, SMALLEST_MEAN_SQUARE)
        x *= self.grid
        np.rint(x, out=x)
        np.maximum(x, -127, out=x)
        np.minimum(x, 127, out=x)
        y = (x @ self.weight).astype(np.float32, copy=False)
        y *= self.scale
        return y


def inverse_rms(x: Floats, least: float, added: float = 0.0) -> Floats:
    """1 / rms of the last axis, which stays; the mean square is summed in fp64, at least `least`, and has `added`."""
    sums = np.einsum("...i,...i->...", x, x, dtype=np.float64)[..., None]
    mean_square = np.maximum(sums / x.shape[-1], least) + added
    return (1 / np.sqrt(mean_square)).astype(np.float32)


class Decoder:
    """A net and, for each layer, keys and values of the last `context` tokens of every text it goes on with.

    `tensors` are the model's of a checkpoint, int8 weights and fp32 scales by their names. Raises ValueError if one is
    missing, or of another shape, or has values that its grid has not.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], cfg: Config, vocab_size: int):
        d, gone = cfg.d_model, dict(tensors)

        def take(name: str, *shape: int) -> tuple[NDArray[np.int8], np.float32]:
            weight, scale = gone.pop(f"{name}.weight", None), gone.pop(f"{name}.scale", None)
            if weight is None or scale is None or weight.dtype != np.int8 or (weight.shape, scale.shape) != (shape, ()):
                raise ValueError(f"{name} is not {shape} int8 with one scale")
            if np.abs(weight.astype(np.int16)).max() > weight_limit(cfg.kept_bits)[0]:
                raise ValueError(f"{name} has weights beyond {cfg.kept_bits} bits")
            return weight, np.float32(scale)

        table, scale = take("embedding", vocab_size, d)
        self.embedding = read_weight(table, cfg).astype(np.float32) * scale
        parts = {"qkv": (3 * d, d), "out": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
        self.blocks = [{name: Layer(*take(f"blocks.{i}.{name}", *shape), cfg) for name, shape in parts.items()}
                       for i in range(cfg.n_layer)]  # fmt: skip
        self.head = Layer(*take("head", vocab_size, d), cfg)
        if gone:
            raise ValueError(f"{', '.join(gone)} belong to no layer")
        self.n_head, self.context, self.seen = cfg.n_head, cfg.context, 0
        empty = np.zeros((1, cfg.n_head, 0, d // cfg.n_head), np.float32)
        self.caches = [(empty, empty)] * cfg.n_layer
        half = np.float32(ROPE_BASE) ** (-np.arange(0, d // cfg.n_head, 2, dtype=np.float32) / (d // cfg.n_head))
        self.frequency = half.astype(np.float32)

    def repeat(self, texts: int) -> None:
        """So many texts go on from the one that has been fed."""
        self.caches = [tuple(np.repeat(part, texts, axis=0) for part in cache) for cache in self.caches]

    def feed(self, tokens: ArrayLike) -> Floats:
        """Logits float32 (B, V) after the last of `tokens`, ints (B, T) that follow those fed before."""
        tokens = np.asarray(tokens)
        for first in range(0, tokens.shape[1], CHUNK):
            x = self._blocks(tokens[:, first : first + CHUNK])
        return self.head(x)

    def _blocks(self, tokens: NDArray[np.int64]) -> Floats:
        """(B, T) to what the head reads of each text's last token, (B, d)."""
        (texts, count), x = tokens.shape, self.embedding[tokens.ravel()]
        positions = np.arange(self.seen, self.seen + count, dtype=np.float32)
        angle = np.outer(positions, self.frequency)[None, :, None, None]  # (1, T, 1, 1, hd / 2)
        cos, sin = np.cos(angle), np.sin(angle)
        for number, block in enumerate(self.blocks):
            qkv = block["qkv"](x).reshape(texts, count, 3, self.n_head, -1)
            x = x + block["out"](self._attend(qkv, cos, sin, number))
            hidden = np.maximum(block["up"](x), 0)
            x = x + block["down"](hidden * hidden)
        self.seen += count
        return x.reshape(texts, count, -1)[:, -1]

    def _attend(self, qkv: Floats, cos: Floats, sin: Floats, number: int) -> Floats:
        """(B, T, 3, H, hd) to (B * T, d)."""
        qk, half = qkv[:, :, :2], qkv.shape[-1] // 2
        qk = qk * inverse_rms(qk, 0.0, EPSILON)
        low, high = qk[..., :half], qk[..., half:]
        qk = np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        k, v = (np.concatenate(pair, axis=2) for pair in zip(self.caches[number], (k, v), strict=True))
        self.caches[number] = k[:, :, -self.context :], v[:, :, -self.context :]
        queries, keys = q.shape[2], k.shape[2]
        if queries == 1:
            k, v = self.caches[number]
        scores = q @ k.swapaxes(2, 3)
        scores *= np.float32(ATTENTION_SCALE / q.shape[3] ** 0.5)
        if queries > 1:
            back = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
            scores[:, :, (back < 0) | (back >= self.context)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return (scores @ v).transpose(0, 2, 1, 3).reshape(qkv.shape[0] * queries, -1)
