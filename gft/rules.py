"""What a group of layers learns by, and the random numbers its flips take from the clock.

The mathematics is in kernels/scores.py and kernels/flip.py, where fused kernels share it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gft.clock import Clock
from gft.layers import IntLayer
from kernels.flip import flip
from kernels.philox import Stream
from kernels.scores import score
from kernels.tiles import tile_grid


@dataclass(frozen=True)
class Rule:
    """How votes become flips. Tile sides are in weights; 0 is the whole matrix (ortho) or layer (select)."""

    name: str = "spectral"
    ortho_tile: int = 128
    select_tile: int = 64
    flip_prob: str = "one"
    flip_gamma: float = 1.0

    def tiles(self, layer: IntLayer) -> int:
        """Number of select tiles of a layer."""
        down, across = tile_grid(tuple(layer.weight.shape), self.select_tile) if self.select_tile else (1, 1)
        return down * across


def learn(
    rule: Rule, layers: list[IntLayer], votes: list[Tensor], first_tiles: list[int], index: int, k: float,
    step_size: int, clock: Clock,
) -> list[int]:  # fmt: skip
    """Score the votes (out, in) of layers of one width and flip their weights. Returns the flips of each layer.

    A layer's random words begin at its tile of `first_tiles` in the streams of `index`, that of the group's first
    layer, so they are the same whether the layers of a group learn together or one by one.
    """
    scores = score(rule.name, votes, [layer.weight for layer in layers], rule.ortho_tile)
    if rule.select_tile:
        return _flip(rule, layers, scores, first_tiles, index, k, step_size, clock)
    # Whole layers differ in length and do not stack; each has a stream of its own.
    pairs = zip(layers, scores, strict=True)
    return [_flip(rule, [la], [s], [0], la.index, k, step_size, clock)[0] for la, s in pairs]


def _flip(
    rule: Rule, layers: list[IntLayer], scores: list[Tensor], first_tiles: list[int], index: int, k: float,
    step_size: int, clock: Clock,
) -> list[int]:  # fmt: skip
    side = rule.select_tile
    each = side * side or layers[0].weight.numel()
    places = [(first, rule.tiles(layer)) for first, layer in zip(first_tiles, layers, strict=True)]
    begin, end = places[0][0], places[-1][0] + places[-1][1]
    words = clock.integers(Stream.TOPK + 16 * index, end - begin, begin)
    top = torch.cat([words[first - begin :][:n] for first, n in places])
    draws = None
    if rule.flip_prob == "score":
        draws = torch.cat([clock.uniform(Stream.FLIP + 16 * index, n * each, first * each) for first, n in places])
    return flip(
        [layer.weight for layer in layers], scores, top, bits=layers[0].bits, k=k, step_size=step_size,
        select_tile=side, draws=draws, gamma=rule.flip_gamma,
    )  # fmt: skip
