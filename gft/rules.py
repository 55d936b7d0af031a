"""What a layer learns by: a rule, its tiles, and how its votes become flips.

The mathematics of scores and selection lives in kernels/, where fused kernels share it; this file puts it
together for a group of layers that learn alike, so that small layers are scored and selected in one batch.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from gft.clock import Clock
from gft.layers import IntLayer
from kernels import scores as score_rules
from kernels.flip import apply_moves, flip_probability, rank_keys, select, topk_count
from kernels.philox import Stream
from kernels.tiles import from_tiles, tile_sizes, to_tiles

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
    tiles = [to_tiles(v, rule.ortho_tile) for v in votes]
    scored = score_rules.orthogonalise(torch.cat(tiles).to(torch.float32), dtype).split([len(t) for t in tiles])
    return [from_tiles(s, tuple(v.shape)) for s, v in zip(scored, votes, strict=True)]


def _blocks(matrix: Tensor, side: int) -> Tensor:
    """(out, in) to (tiles, weights of a tile); side 0 is one tile."""
    return rearrange(to_tiles(matrix, side), "t a b -> t (a b)") if side else matrix.reshape(1, -1)


def _unblock(blocks: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    return from_tiles(rearrange(blocks, "t (a b) -> t a b", a=side), shape) if side else blocks.view(shape)


def flip(rule: Rule, layers: list[IntLayer], scores: list[Tensor], k: float, step_size: int, clock: Clock) -> list[Tensor]:
    """Make the moves of one step in place.

    The layers share `bits`; `k` is the share of a tile's weights to flip, `step_size` the largest move in weight
    units. Returns a bool (out, in) for each layer, True where the weight was chosen.
    """
    side = rule.select_tile
    if side == 0 and len(layers) > 1:  # whole layers differ in length and do not stack
        return [flip(rule, [la], [s], k, step_size, clock)[0] for la, s in zip(layers, scores, strict=True)]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    weight = torch.cat([_blocks(layer.weight, side) for layer in layers])
    score_blocks = torch.cat([_blocks(s, side) for s in scores])
    sizes = [tile_sizes(shape, side) if side else torch.tensor([shape[0] * shape[1]]) for shape in shapes]
    counts = [len(s) for s in sizes]

    q, unit = layers[0].q, 2 if layers[0].bits == 1 else 1
    keys = rank_keys(score_blocks, weight, q, unit)
    u = clock.uniform(Stream.TOPK + 16 * layers[0].index, sum(counts))
    chosen = select(keys, topk_count(k, torch.cat(sizes), u).to(keys.device))
    if rule.flip_prob == "score":
        draws = clock.uniform(Stream.FLIP + 16 * layers[0].index, keys.numel()).view(keys.shape)
        chosen &= draws.to(keys.device) < flip_probability(keys, score_blocks, rule.flip_gamma)
    moved = apply_moves(weight, score_blocks, chosen, q, unit * step_size)
    flipped = []
    for layer, shape, new, mask in zip(layers, shapes, moved.split(counts), chosen.split(counts), strict=True):
        layer.weight.copy_(_unblock(new, shape, side))
        flipped.append(_unblock(mask, shape, side))
    return flipped
