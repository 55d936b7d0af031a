"""Philox4x32-10 in numpy: see kernels/philox.py, which says what it is for. Nothing here waits for torch."""

import numpy as np

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


class Stream:
    """What a number is drawn for: one id per use, plus 16 times the number of a layer where layers draw apart."""

    ROWS, COLUMNS, TOPK, FLIP, MOMENTUM_ROWS, MOMENTUM_COLUMNS, BATCH, INIT, SAMPLE, MONITOR, DROPOUT_ROWS, \
        DROPOUT_COLUMNS = range(12)


def philox4x32(counter: tuple, key: tuple[int, int], rounds: int = 10) -> tuple:
    """Four 32-bit words for each counter; counters are numpy uint64 arrays (or ints) below 2^32."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = (product_1 >> 32) ^ (c1 ^ k0), product_1 & MASK
        c2, c3 = (product_0 >> 32) ^ (c3 ^ k1), product_0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def words(seed: int, step: int, stream: int | np.ndarray, n: int, start: int = 0) -> np.ndarray:
    """Words of elements start .. start + n - 1 as uint64 values below 2^32, shape (n,); (L, n) of L streams."""
    first, last = start // 4, (start + n + 3) // 4
    group = np.arange(first, last, dtype=np.uint64)
    streams = np.asarray(stream, dtype=np.uint64)[..., None] & np.uint64(MASK)
    counter = (group & np.uint64(MASK), group >> np.uint64(32), step & MASK, streams)
    four = np.broadcast_arrays(*philox4x32(counter, (seed & MASK, (seed >> 32) & MASK)))
    flat = np.stack(four, axis=-1).reshape(*streams.shape[:-1], -1)
    return flat[..., start - 4 * first : start - 4 * first + n]
