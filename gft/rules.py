"""What a layer learns by: a rule, its tiles, and how its votes become flips.

The mathematics of scores and selection lives in kernels/, where fused kernels share it; this file puts it
together for a group of layers that learn alike, so that small layers are scored and selected in one batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gft.clock import Clock
from gft.layers import IntLayer
from kernels import scores as score_rules
from kernels.flip import apply_moves, flip_probability, rank_keys, select, topk_count
from kernels.philox import Stream
from kernels.tiles import stack_tiles, tile_sizes, unstack_tiles

RULES = ("contribution", "gain", "balanced", "spectral")


@dataclass(frozen=True)
class Rule:
    """How votes become flips. Tile sides are in weights; 0 is the whole matrix (ortho) or layer (select)."""

    name: str = "spectral"
    ortho_tile: int = 128
    select_tile: int = 64
    flip_prob: str = "one"
    flip_gamma: float = 1.0


def score(rule: Rule, layers: list[IntLayer], votes: list[Tensor]) -> list[Tensor]:
    """Signed scores of each layer, (out, in): integers for gain and contribution, else float32."""
    if rule.name == "gain":
        return [score_rules.gain(v) for v in votes]
    if rule.name == "contribution":
        return [score_rules.contribution(v, layer.weight) for v, layer in zip(votes, layers, strict=True)]
    if rule.name == "balanced":
        return [score_rules.balanced(v) for v in votes]
    dtype = score_rules.dot_dtype(votes[0].device)
    if rule.ortho_tile == 0:
        return [score_rules.orthogonalise(v.to(torch.float32), dtype) for v in votes]
    scored = score_rules.orthogonalise(stack_tiles(votes, rule.ortho_tile, torch.float32), dtype)
    return unstack_tiles(scored, [tuple(v.shape) for v in votes], torch.float32)


def flip(rule: Rule, layers: list[IntLayer], scores: list[Tensor], k: float, step_size: int, clock: Clock) -> list[int]:
    """Make the moves of one step in place.

    The layers share `bits`; `k` is the share of a tile's weights to flip, `step_size` the largest move in weight
    units. Returns the number of flips of each layer.
    """
    side = rule.select_tile
    if side == 0:  # whole layers differ in length and do not stack
        return [_flip_layer(rule, la, s, k, step_size, clock) for la, s in zip(layers, scores, strict=True)]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    weight = stack_tiles([layer.weight for layer in layers], side, torch.int8).flatten(1)
    score_tiles = stack_tiles(scores, side, scores[0].dtype).flatten(1)
    sizes = [tile_sizes(shape, side) for shape in shapes]
    moved, chosen = _flip_tiles(rule, layers[0], weight, score_tiles, torch.cat(sizes), k, step_size, clock)
    for layer, new in zip(layers, unstack_tiles(moved.view(-1, side, side), shapes, torch.int8), strict=True):
        layer.weight.copy_(new)
    flips = chosen.sum(dim=1).split([len(s) for s in sizes])
    return [int(part.sum()) for part in flips]


def _flip_layer(rule: Rule, layer: IntLayer, scores: Tensor, k: float, step_size: int, clock: Clock) -> int:
    weight, size = layer.weight.view(1, -1), torch.tensor([layer.weight.numel()])
    moved, chosen = _flip_tiles(rule, layer, weight, scores.reshape(1, -1), size, k, step_size, clock)
    weight.copy_(moved)
    return int(chosen.sum())


def _flip_tiles(
    rule: Rule, first: IntLayer, weight: Tensor, scores: Tensor, sizes: Tensor, k: float, step_size: int, clock: Clock
) -> tuple[Tensor, Tensor]:
    """New weights and which were chosen, both (tiles, n); `first` lends its width and its random streams."""
    q, unit = first.q, 2 if first.bits == 1 else 1
    keys = rank_keys(scores, weight, q, unit)
    u = clock.uniform(Stream.TOPK + 16 * first.index, len(sizes))
    chosen = select(keys, topk_count(k, sizes, u).to(keys.device))
    if rule.flip_prob == "score":
        draws = clock.uniform(Stream.FLIP + 16 * first.index, keys.numel()).view(keys.shape)
        chosen &= draws.to(keys.device) < flip_probability(keys, scores, rule.flip_gamma)
    return apply_moves(weight, scores, chosen, q, unit * step_size), chosen
