"""Top-k: in every tile the m legal moves of largest |S|, exactly m, ties to the lower index.

    move of a weight   -sign(S), one unit (2 for binary weights, where it is W -> -W)
    legal              the moved weight stays in [-Q, Q]; S = 0 is no move
    m                  floor(k n + u) for a tile of n weights, u uniform from Philox, in 32-bit fixed point

`rank` turns scores into integers that compare as |S| does, so that one integer selection serves the exact rules and
the float ones. On a GPU a tile stays in registers: a search guesses numbers and counts the ranks that reach them until
just m do (`choose`), and where too many are equal to the m-th another finds the last index that still gets a place.
A search takes 7 to 10 passes over registers as a rule, where one bit by bit took 17 to 31. (One search over 64-bit keys
with the index in the low bits needs twice the registers, and spills.)
"""

import numpy as np
import torch
from torch import Tensor

from kernels.backend import jit, tl
from kernels.fuse import fused
from kernels.philox import TOPK_STREAM, philox_words


def fixed_point(k: Tensor) -> Tensor:
    """k in [0, 1], float64, in units of 2^-32: int64, so that every backend forms m in integers."""
    return torch.floor(k * 2.0**32 + 0.5).to(torch.int64)


@fused(dynamic=False)
def rank(scores: Tensor, weight: Tensor, q: int, unit: int) -> Tensor:
    """Integers ordered as |S| for legal moves, 0 for the others.

    scores int32, int64 or float32, weight int8, both (tiles, n). Returns int32 (float scores: the bits of |S|,
    which order as the numbers do) or int64. Raises ValueError for scores of another float type.
    """
    if scores.is_floating_point() and scores.dtype != torch.float32:
        raise ValueError(f"rank: got scores of {scores.dtype}; float scores must be float32")
    # Small integers are exact in fp32, which vectorises best. S = 0 needs no case of its own: its rank is 0.
    # 1 where sign(S) W is at least unit - Q, else 0. By arithmetic, which vectorises, as masks of bools do not.
    legal = torch.sign(scores).to(torch.float32).mul_(weight.to(torch.float32)).add_(q - unit + 1).clamp_(0, 1)
    if scores.dtype == torch.float32:
        return legal.mul_(scores.abs()).view(torch.int32)
    return torch.abs(scores.to(torch.int64)).mul_(legal.to(torch.int64))


def topk_count(k: Tensor, sizes: Tensor, words: Tensor) -> Tensor:
    """m = floor(k n + u), at most n: k float64 (), sizes int64 (tiles,), u = words / 2^32, words int64 (tiles,) below
    2^32. Returns int64 (tiles,)."""
    return torch.minimum((fixed_point(k) * sizes + words) >> 32, sizes)


def select_reference(ranks: Tensor, m: Tensor) -> Tensor:
    """The contract in three lines: the m[tile] largest positive ranks, ties to the lower index. bool (tiles, n)."""
    order = torch.sort(ranks, dim=1, descending=True, stable=True).indices
    place = torch.arange(ranks.shape[1], device=ranks.device).expand_as(order)
    return (torch.empty_like(order).scatter_(1, order, place) < m[:, None]) & (ranks > 0)


def select(ranks: Tensor, m: Tensor) -> Tensor:
    """`select_reference` by partition instead of sorting: ranks int32 or int64 (tiles, n), m int64 (tiles,)."""
    if ranks.is_cuda:
        return select_reference(ranks, m)
    values, chosen = ranks.numpy(), np.zeros(ranks.shape, dtype=bool)
    n = values.shape[1]
    wanted = m.clamp_max(n).numpy()
    for count in np.unique(wanted[wanted > 0]):
        tiles = np.flatnonzero(wanted == count)
        part = np.partition(values[tiles], n - count, axis=1)
        threshold = np.maximum(part[:, n - count], 1)
        mask = values[tiles] >= threshold[:, None]
        # More ranks at the threshold than places left: the lower indices have them.
        crowded = np.flatnonzero(part[:, : n - count].max(axis=1, initial=0) == threshold)
        if crowded.size:
            rows = values[tiles[crowded]]
            above, level = rows > threshold[crowded, None], rows == threshold[crowded, None]
            left = count - above.sum(axis=1, keepdims=True)
            mask[crowded] = above | (level & (np.cumsum(level, axis=1) <= left))
        chosen[tiles] = mask
    return torch.from_numpy(chosen)


def flip_probability(ranks: Tensor, scores: Tensor, gamma: float) -> Tensor:
    """p = (|S| / largest legal |S| of the tile)^gamma: float64 (tiles, n), 0 for illegal moves."""
    magnitude = torch.where(ranks > 0, scores.abs().to(torch.float64), 0.0)
    return (magnitude / magnitude.amax(dim=1, keepdim=True).clamp_min(1e-300)) ** gamma


@fused(dynamic=False)
def _moved(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    step = torch.sign(scores).to(torch.float32).mul_(chosen.to(torch.float32)).mul_(width)
    return step.neg_().add_(weight.to(torch.float32)).clamp_(-q, q).to(torch.int8)


def apply_moves(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    """W - width * sign(S) clipped to [-Q, Q] where chosen: int8 (tiles, n). `width` is step size times unit."""
    # A mask of bytes vectorises, one of bools does not.
    return _moved(weight, scores, chosen.view(torch.int8), q, width)


@jit
def keys_of(s, w, Q: tl.constexpr, UNIT: tl.constexpr):
    """`rank` in a kernel, twice, plus 1 where S > 0: one number holds what is compared and the direction of the move.

    Scores int32 or float32 give uint32, int64 (below 2^61) give int64; weights w are int8.
    """
    target = w.to(tl.int32) - tl.where(s > 0, UNIT, -UNIT)
    legal = (target <= Q) & (target >= -Q)  # past the edge S is 0
    if s.dtype == tl.int64:
        size = tl.abs(s)
    elif s.dtype == tl.float32:
        size = tl.abs(s).to(tl.uint32, bitcast=True)
    else:
        size = tl.abs(s).to(tl.uint32)
    return tl.where(legal & (s != 0), (size << 1) | (s > 0).to(size.dtype), 0)


@jit
def _search(keys, m, FLOAT: tl.constexpr):
    """A number that just m ranks of a tile reach, or if there is none the m-th largest rank, and how many reach it.

    keys (M, N) are those of `keys_of`; FLOAT says that ranks are bits of floats, whose values are then interpolated. If
    fewer than m ranks are positive the number is 0, which all reach; if m is 0 it is the largest rank, the count 0.
    """
    size: tl.constexpr = keys.shape[0] * keys.shape[1]
    top = tl.max(keys) >> 1
    # At least m ranks reach `low`, fewer reach `high` + 1. `over` and `under` are the distances of those two counts
    # from m, as |count - m| / (count + m): about log(count / m) / 2, as a tail falls exponentially.
    low, high, reached = tl.where(m > 0, top - top, top), top, tl.where(m > 0, size, 0)
    over, under = tl.abs(m - size).to(tl.float32) / (m + size).to(tl.float32), tl.full((), 1.0, tl.float32)
    passes = tl.full((), 0, tl.int32)
    while (low < high) & (reached != m):
        share = over / (over + under)
        if FLOAT:
            first, last = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
            guess = (first + (last - first) * share).to(keys.dtype, bitcast=True)
        else:
            guess = low + ((high - low + 1).to(tl.float32) * share).to(keys.dtype)
        # Every sixth guess lies in the middle, which bounds the passes whatever the ranks are: some 200 at the worst.
        guess = tl.where(passes % 6 == 5, low + (high - low + 1) // 2, guess)
        guess = tl.minimum(tl.maximum(guess, low + 1), high)
        count = tl.sum((keys >= (guess << 1)).to(tl.int32))
        enough, distance = count >= m, tl.abs(count - m).to(tl.float32) / (count + m).to(tl.float32)
        # As in the Illinois variant of regula falsi, the end that stays counts for less each time: it would else hardly
        # move where the tail is curved.
        over, under = tl.where(enough, distance, over * 0.8), tl.where(enough, under * 0.8, distance)
        low, high = tl.where(enough, guess, low), tl.where(enough, high, guess - 1)
        reached = tl.where(enough, count, reached)
        passes += 1
    return low, reached


@jit
def choose(keys, m, FLOAT: tl.constexpr):
    """`select` for a tile in registers: its m of largest rank. Returns bool (M, N); a rank of 0 is never chosen.

    keys (M, N) are those of `keys_of`, with ranks below 2^31 or, of int64, 2^61; M N is a power of two up to 2^15.
    FLOAT: scores are float32.
    """
    threshold, reached = _search(keys, m, FLOAT)
    if (reached != m) & (threshold > 0):
        # More ranks at the threshold than places left: the lower indices have them.
        size: tl.constexpr = keys.shape[0] * keys.shape[1]
        index = tl.arange(0, keys.shape[0])[:, None] * keys.shape[1] + tl.arange(0, keys.shape[1])[None, :]
        above = (keys >> 1) > threshold
        turn = tl.where((keys >> 1) == threshold, (index - size) * -2, 0)  # keys of ranks size - index
        last, _ = _search(turn, m - tl.sum(above.to(tl.int32)), False)
        keys = tl.where(above | (turn >= (last << 1)), keys, 0)
    # An odd number below the keys chosen: an even one above all keys might not fit.
    return keys > tl.where(m > 0, (tl.maximum(threshold, 1) << 1) - 1, (threshold << 1) + 1)


@jit
def topk_block(s, w, row, column, out, inner, k, rng, layer, Q: tl.constexpr, UNIT: tl.constexpr):
    """The moves of a tile of scores (side, side), whose first weight is (row, column) of a matrix (out, inner).

    -sign(S) where a weight moves, else 0: int8 (side, side). k is a pointer to float64, rng one to (seed, step); layer
    is the number of the matrix, which has a random stream of its own to round m.
    """
    side: tl.constexpr = s.shape[0]
    size = (tl.minimum(out - row, side) * tl.minimum(inner - column, side)).to(tl.int64)
    element = row // side * tl.cdiv(inner, side) + column // side
    word = philox_words(tl.load(rng), tl.load(rng + 1), 16 * layer + TOPK_STREAM, element).to(tl.int64)
    share = tl.floor(tl.load(k) * 4294967296.0 + 0.5).to(tl.int64)
    m = tl.minimum((share * size + word) >> 32, size).to(tl.int32)
    keys = keys_of(s, w, Q, UNIT)
    return tl.where(choose(keys, m, s.dtype == tl.float32), tl.where((keys & 1) != 0, -1, 1), 0).to(tl.int8)
