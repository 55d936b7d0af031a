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
"""

import numpy as np
import torch
from torch import Tensor


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


def dither_words(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Row or column words for `dither`: int32 in [0, 2^23) on the CPU, shape (n,)."""
    return torch.from_numpy((words(seed, step, stream, n, start) >> np.uint64(32 - DITHER_BITS)).astype(np.int32))


def dither(rows: Tensor, columns: Tensor) -> Tensor:
    """u[t, c] in [0, 1) from int32 words: rows (..., T, 1) and columns (..., 1, C) give float32 (..., T, C)."""
    return ((rows + columns) & (2**DITHER_BITS - 1)).to(torch.float32) * 2.0**-DITHER_BITS
