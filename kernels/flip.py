"""Flips: in every tile the m legal moves of largest |S|, exactly m, ties to the lower index.

    move of a weight   -sign(S), `unit` wide (1; 2 for binary weights, where it is W -> -W)
    legal              the moved weight stays in [-Q, Q]; S = 0 is no move
    m                  floor(k n + u) for a tile of n weights, u uniform from Philox, in 32-bit fixed point

`rank_keys` turns scores into integers that compare as |S| does, so that one integer selection serves the
exact rules and the float ones. `flip_prob`: a selected weight moves with p = (|S| / largest |S| of its
tile)^gamma, or always.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.fuse import fused
from kernels.tiles import stack_tiles, tile_sizes, unstack_tiles


@fused(dynamic=False)
def rank_keys(scores: Tensor, weight: Tensor, q: int, unit: int) -> Tensor:
    """Integers ordered as |S| for legal moves, 0 for the others.

    scores int32, int64 or float32, weight int8, both (tiles, n). Returns int32 (float scores: the bits of |S|,
    which order as the numbers do) or int64. Raises ValueError for scores of another float type.
    """
    if scores.is_floating_point() and scores.dtype != torch.float32:
        raise ValueError(f"rank_keys: got scores of {scores.dtype}; float scores must be float32")
    # Small integers are exact in fp32, which vectorises best. S = 0 needs no case of its own: its key is 0.
    legal = (weight.to(torch.float32) - torch.where(scores > 0, float(unit), -float(unit))).abs() <= q
    if scores.dtype == torch.float32:
        return torch.where(legal, scores.abs(), 0.0).view(torch.int32)
    return torch.where(legal, scores.to(torch.int64).abs(), 0)


def fixed_point(k: float) -> int:
    """k in [0, 1] in units of 2^-32, so that every backend forms m in integers."""
    return round(k * 2**32)


def topk_count(k: float, sizes: Tensor, words: Tensor) -> Tensor:
    """m = floor(k n + u), at most n: sizes int64 (tiles,), u = words / 2^32, words int64 (tiles,) below 2^32. int64 (tiles,)."""
    return torch.minimum((fixed_point(k) * sizes + words) >> 32, sizes)


def select_reference(keys: Tensor, m: Tensor) -> Tensor:
    """The contract in three lines: the m[tile] largest positive keys, ties to the lower index. bool (tiles, n)."""
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return (rank < m[:, None]) & (keys > 0)


def select(keys: Tensor, m: Tensor) -> Tensor:
    """`select_reference` by partition instead of sorting: keys int32 or int64 (tiles, n), m int64 (tiles,)."""
    if keys.is_cuda:
        return select_reference(keys, m)
    values, chosen = keys.numpy(), np.zeros(keys.shape, dtype=bool)
    n = values.shape[1]
    wanted = m.clamp_max(n).numpy()
    for count in np.unique(wanted):
        if count == 0:
            continue
        tiles = np.flatnonzero(wanted == count)
        part = values[tiles]
        threshold = np.partition(part, n - count, axis=1)[:, n - count, None]
        mask = part >= threshold
        # More keys at the threshold than places left: the lower indices have them.
        crowded = np.flatnonzero(mask.sum(axis=1) > count)
        if crowded.size:
            above, level = part[crowded] > threshold[crowded], part[crowded] == threshold[crowded]
            left = count - above.sum(axis=1, keepdims=True)
            mask[crowded] = above | (level & (np.cumsum(level, axis=1) <= left))
        chosen[tiles] = mask & (part > 0)
    return torch.from_numpy(chosen)


def flip_probability(keys: Tensor, scores: Tensor, gamma: float) -> Tensor:
    """p = (|S| / largest legal |S| of the tile)^gamma: float64 (tiles, n), 0 for illegal moves."""
    magnitude = torch.where(keys > 0, scores.abs().to(torch.float64), 0.0)
    return (magnitude / magnitude.amax(dim=1, keepdim=True).clamp_min(1e-300)) ** gamma


@fused(dynamic=False)
def _moved(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    step = torch.where(scores > 0, float(width), torch.where(scores < 0, -float(width), 0.0))
    return (weight.to(torch.float32) - step * chosen.to(torch.float32)).clamp(-q, q).to(torch.int8)


def apply_moves(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    """W - width * sign(S) clipped to [-Q, Q] where chosen: int8 (tiles, n). `width` is step size times unit."""
    return _moved(weight, scores, chosen.view(torch.int8), q, width)  # a mask of bytes vectorises, one of bools does not


def flip(
    weights: list[Tensor], scores: list[Tensor], words: Tensor, *, bits: int, k: float, step_size: int = 1,
    select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
) -> list[int]:  # fmt: skip
    """Make the moves of one step in matrices of `bits` bits, in place.

    weights int8 and scores, (out, in) each; k is the share of a tile's weights to flip, step_size the largest move in
    weight units. words int64 (tiles,) below 2^32 round m, tiles numbered over all matrices; draws float64, one for each
    weight of each tile, switches on p = (|S| / largest)^gamma. select_tile 0 takes one whole matrix as its tile.
    Returns the flips of each matrix. Raises ValueError if select_tile is 0 and there are several matrices.
    """
    if select_tile == 0 and len(weights) > 1:
        raise ValueError(f"flip: got {len(weights)} matrices and select_tile 0; whole matrices do not stack, give one")
    shapes = [tuple(w.shape) for w in weights]
    if select_tile:
        sizes = [tile_sizes(shape, select_tile) for shape in shapes]
        weight = stack_tiles(weights, select_tile, torch.int8).flatten(1)
        widest = max((s.dtype for s in scores), key=lambda dtype: dtype.itemsize)  # votes of long batches are int64
        score = stack_tiles(scores, select_tile, widest).flatten(1)
    else:
        sizes = [torch.tensor([weights[0].numel()])]
        weight, score = weights[0].reshape(1, -1), scores[0].reshape(1, -1)
    q, unit = (1, 2) if bits == 1 else (max(1, 2 ** (bits - 1) - 1), 1)
    keys = rank_keys(score, weight, q, unit)
    chosen = select(keys, topk_count(k, torch.cat(sizes), words).to(keys.device))
    if draws is not None:
        chosen &= draws.view(keys.shape).to(keys.device) < flip_probability(keys, score, gamma)
    moved = apply_moves(weight, score, chosen, q, unit * step_size)
    if select_tile:
        new = unstack_tiles(moved.view(-1, select_tile, select_tile), shapes, torch.int8)
    else:
        new = [moved.view(shapes[0])]
    for w, value in zip(weights, new, strict=True):
        w.copy_(value)
    return [int(part.count_nonzero()) for part in chosen.split([len(s) for s in sizes])]
