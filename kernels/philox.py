"""Philox4x32-10: randomness as a function of (seed, step, stream, element).

    words(seed, step, stream, n, start)[e] = word (start + e) % 4 of
        philox4x32_10(counter = (g low, g high, step, stream), key = (seed low, seed high)),   g = (start + e) // 4

Nothing random is a state, so nothing random is checkpointed, and any part of a batch can draw its own
numbers without knowing the rest. The generator is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011); `tl.randint4x` is the same function with step = stream = 0.

Rounding needs one number per element of delta, millions a step. `dither` makes them out of one word per
row and one per column, u[t, c] = (a[t] + b[c]) mod 1. Every u is uniform and every two are independent
(two in one row differ by b[c] - b[c'], themselves independent), which is all that the mean and the
variance of a rounded sum depend on; only the four corners of a rectangle are tied together. It costs
rows + columns draws instead of rows x columns.

Kernels draw what they need where they need it: `philox_words`, `dither_word` and `dither_at` below are called by every
kernel that is random. `_dither_words_kernel` fills a tensor on the GPU: 4 bytes written, 10 rounds (about 80 integer
operations) for each word.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl, triton

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
DITHER_BITS = 23  # a + b then fits 24 bits, which fp32 holds exactly


class Stream:
    """What a number is drawn for: one id per use, so that no two uses share numbers."""

    ROWS, COLUMNS, TOPK, FLIP, MEMORY_ROWS, MEMORY_COLUMNS, BATCH, INIT, SAMPLE, MONITOR = range(10)


def philox4x32(counter: tuple, key: tuple[int, int], rounds: int = 10) -> tuple:
    """Four 32-bit words for each counter; counters are numpy uint64 arrays (or ints) below 2^32."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    low, shift = np.uint64(MASK), np.uint64(32)
    for _ in range(rounds):
        product_0, product_1 = np.uint64(MULTIPLIER_0) * c0, np.uint64(MULTIPLIER_1) * c2
        c0 = (product_1 >> shift) ^ c1 ^ np.uint64(k0)
        c1 = product_1 & low
        c2 = (product_0 >> shift) ^ c3 ^ np.uint64(k1)
        c3 = product_0 & low
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def words(seed: int, step: int, stream: int, n: int, start: int = 0) -> np.ndarray:
    """Words of elements start .. start + n - 1 as uint64 values below 2^32, shape (n,)."""
    first, last = start // 4, (start + n + 3) // 4
    group = np.arange(first, last, dtype=np.uint64)
    counter = (group & np.uint64(MASK), group >> np.uint64(32), step & MASK, stream & MASK)
    four = np.broadcast_arrays(*philox4x32(counter, (seed & MASK, (seed >> 32) & MASK)))
    return np.stack(four, axis=1).reshape(-1)[start - 4 * first : start - 4 * first + n]


def integers(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """`words` as a tensor: int64 on the CPU, shape (n,)."""
    return torch.from_numpy(words(seed, step, stream, n, start).astype(np.int64))


def uniform(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) with 32 bits each: float64 on the CPU, shape (n,)."""
    return torch.from_numpy(words(seed, step, stream, n, start) * 2.0**-32)


def normal(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Standard normal numbers by the inverse distribution function: float64 on the CPU, shape (n,)."""
    return torch.special.ndtri(uniform(seed, step, stream, n, start) + 2.0**-33)


def dither_words_torch(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Row or column words for `dither`: int32 in [0, 2^23) on the CPU, shape (n,)."""
    return torch.from_numpy((words(seed, step, stream, n, start) >> np.uint64(32 - DITHER_BITS)).astype(np.int32))


def dither(rows: Tensor, columns: Tensor) -> Tensor:
    """u[t, c] in [0, 1) from int32 words: rows (..., T, 1) and columns (..., 1, C) give float32 (..., T, C)."""
    return ((rows + columns) & (2**DITHER_BITS - 1)).to(torch.float32) * 2.0**-DITHER_BITS


@jit
def philox_words(seed, step, stream, element):
    """`words` in a kernel: the uint32 word of each element, int64 (a block or a scalar); the rest are scalars."""
    element = tl.cast(element, tl.int64)
    group = element >> 2
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    step32, stream32 = tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, step32, stream32)
    place = element & 3
    return tl.where(place < 2, tl.where(place == 0, word_0, word_1), tl.where(place == 2, word_2, word_3))


@jit
def dither_word(seed, step, stream, element):
    """`dither_words` in a kernel: the int32 word in [0, 2^23) of each element, int64 as for `philox_words`."""
    return (philox_words(seed, step, stream, element) >> 9).to(tl.int32)


@jit
def dither_at(row_words, column_words):
    """`dither` in a kernel: u float32 in [0, 1) from int32 words that broadcast, say (T, 1) and (1, C)."""
    return ((row_words + column_words) & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07  # 2^-23, exactly


@jit
def _dither_words_kernel(out, seed, step, stream, start, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, dither_word(seed, step, stream, start + place), mask=place < n)


DITHER_BLOCK = 1024


@torch.library.custom_op("nanogft::dither_words", mutates_args=())
def _dither_words(seed: int, step: int, stream: int, n: int, start: int, device: torch.device) -> Tensor:
    out = torch.empty(n, dtype=torch.int32, device=device)
    _dither_words_kernel[(triton.cdiv(n, DITHER_BLOCK),)](out, seed, step, stream, start, n, BLOCK=DITHER_BLOCK)
    return out


@_dither_words.register_fake
def _(seed, step, stream, n, start, device):
    return torch.empty(n, dtype=torch.int32, device=device)


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of a number: operators take no wider integers."""
    number &= 2**64 - 1
    return number - 2**64 if number >> 63 else number


def dither_words(
    seed: int, step: int, stream: int, n: int, start: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Row or column words for `dither`: int32 in [0, 2^23), shape (n,), on `device` (None: the CPU).

    They are the same on every device; on a GPU a kernel draws them there.
    """
    device = torch.device("cpu" if device is None else device)
    if n == 0 or not on_triton(torch.zeros(0, device=device)):
        return dither_words_torch(seed, step, stream, n, start).to(device)
    return torch.ops.nanogft.dither_words(_signed(seed), step & MASK, stream & MASK, n, start, device)


def shipped() -> list[Shipped]:
    """What the launcher runs on a GPU."""
    signature = {"out": "*i32", "seed": "i64", "step": "i32", "stream": "i32", "start": "i32", "n": "i32"}
    return [Shipped("dither_words", _dither_words_kernel, signature, {"BLOCK": DITHER_BLOCK})]
