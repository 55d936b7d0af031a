"""What a group of layers learns by, and the random numbers its flips take from the clock.

The mathematics is in kernels/scores.py and kernels/flip.py, where fused kernels share it.
"""

from dataclasses import dataclass

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


def learn(rule: Rule, layers: list[IntLayer], votes: list[Tensor], k: float, step_size: int, clock: Clock) -> list[int]:
    """Score the votes (out, in) of layers of one width and flip their weights. Returns the flips of each layer."""
    scores = score(rule.name, votes, [layer.weight for layer in layers], rule.ortho_tile)
    if rule.select_tile:
        return _flip(rule, layers, scores, k, step_size, clock)
    # Whole layers differ in length and do not stack.
    return [_flip(rule, [la], [s], k, step_size, clock)[0] for la, s in zip(layers, scores, strict=True)]


def _flip(rule: Rule, layers: list[IntLayer], scores: list[Tensor], k: float, step_size: int, clock: Clock) -> list[int]:
    side, first = rule.select_tile, 16 * layers[0].index
    grids = [tile_grid(tuple(layer.weight.shape), side) if side else (1, 1) for layer in layers]
    tiles = sum(down * across for down, across in grids)
    each = side * side or layers[0].weight.numel()
    draws = clock.uniform(Stream.FLIP + first, tiles * each) if rule.flip_prob == "score" else None
    return flip(
        [layer.weight for layer in layers], scores, clock.integers(Stream.TOPK + first, tiles), bits=layers[0].bits, k=k,
        step_size=step_size, select_tile=side, draws=draws, gamma=rule.flip_gamma,
    )  # fmt: skip
