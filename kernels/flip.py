"""Flips: in every tile the m legal moves of largest |S|, exactly m, ties to the lower index.

    move of a weight   -sign(S), `unit` wide (1; 2 for binary weights, where it is W -> -W)
    legal              the moved weight stays in [-Q, Q]; S = 0 is no move
    m                  floor(k n + u) for a tile of n weights, u uniform from Philox

`rank_keys` turns scores into integers that compare as |S| does, so that one integer selection serves the
exact rules and the float ones. `flip_prob`: a selected weight moves with p = (|S| / largest |S| of its
tile)^gamma, or always.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.fuse import fused


@fused
def rank_keys(scores: Tensor, weight: Tensor, q: int, unit: int) -> Tensor:
    """Integers ordered as |S| for legal moves, 0 for the others.

    scores int32, int64 or float32, weight int8, both (tiles, n). Returns int32 (float scores: the bits of |S|,
    which order as the numbers do) or int64.
    """
    direction = torch.sign(scores).to(torch.int16)
    legal = (weight.to(torch.int16) - unit * direction).abs() <= q
    if scores.dtype == torch.float32:
        return torch.where(legal, scores.abs(), 0.0).view(torch.int32)
    return torch.where(legal, scores.to(torch.int64).abs(), 0)


def topk_count(k: float, sizes: Tensor, u: Tensor) -> Tensor:
    """m = floor(k n + u), at most n: sizes int64 (tiles,), u float64 (tiles,) in [0, 1). Returns int64 (tiles,)."""
    return torch.minimum(torch.floor(k * sizes.to(torch.float64) + u).to(torch.int64), sizes)


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
    for count in np.unique(m.numpy()):
        if count == 0:
            continue
        tiles = np.flatnonzero(m.numpy() == count)
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


@fused
def apply_moves(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    """W - width * sign(S) clipped to [-Q, Q] where chosen: int8 (tiles, n). `width` is step size times unit."""
    moved = (weight.to(torch.int16) - width * torch.sign(scores).to(torch.int16)).clamp(-q, q)
    return torch.where(chosen, moved, weight.to(torch.int16)).to(torch.int8)
