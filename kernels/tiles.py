"""Matrices as blocks: (out, in) <-> (tiles, side, side), ragged edges padded with zeros.

Tiles are numbered row by row, and the elements of a tile row by row too; both orders are part of the
contract of top-k, whose ties go to the lower index.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad


def tile_grid(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """How many tiles of side x side cover a matrix, downwards and across."""
    return -(-shape[0] // side), -(-shape[1] // side)


def to_tiles(matrix: Tensor, side: int) -> Tensor:
    """(out, in) to (tiles, side, side), zeros past the edge."""
    rows, columns = tile_grid(tuple(matrix.shape), side)
    bottom, right = rows * side - matrix.shape[0], columns * side - matrix.shape[1]
    if bottom or right:
        matrix = pad(matrix, (0, right, 0, bottom))
    return rearrange(matrix, "(r a) (c b) -> (r c) a b", a=side, b=side)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`: (tiles, side, side) to (out, in)."""
    rows, _ = tile_grid(shape, tiles.shape[-1])
    return rearrange(tiles, "(r c) a b -> (r a) (c b)", r=rows)[: shape[0], : shape[1]]


def tile_sizes(shape: tuple[int, int], side: int) -> Tensor:
    """Number of weights in each tile, ragged ones counted as they are: int64 (tiles,)."""
    rows, columns = tile_grid(shape, side)
    heights = [min(side, shape[0] - r * side) for r in range(rows)]
    widths = [min(side, shape[1] - c * side) for c in range(columns)]
    return torch.tensor([h * w for h in heights for w in widths])
