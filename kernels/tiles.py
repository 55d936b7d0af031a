"""Matrices as tiles: (L, out, in) <-> (L * tiles, side, side), ragged edges padded with zeros.

Tiles of a matrix are numbered row by row, and the elements of a tile row by row too; both orders are part of the
contract of top-k, whose ties go to the lower index. Matrices of one shape are stacked: L is 1 for a single one.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import jit, tl


def tile_grid(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """How many tiles of side x side cover a matrix, downwards and across; a side of 0 is the whole matrix."""
    return (-(-shape[0] // side), -(-shape[1] // side)) if side else (1, 1)


def tile_count(shape: tuple[int, int], side: int) -> int:
    """Number of tiles of a matrix."""
    down, across = tile_grid(shape, side)
    return down * across


def to_tiles(matrices: Tensor, side: int) -> Tensor:
    """(L, out, in) to (L * tiles, side, side), zeros past the edge."""
    rows, columns = tile_grid(tuple(matrices.shape[1:]), side)
    bottom, right = rows * side - matrices.shape[1], columns * side - matrices.shape[2]
    if bottom or right:
        matrices = pad(matrices, (0, right, 0, bottom))
    return rearrange(matrices, "l (r a) (c b) -> (l r c) a b", a=side, b=side)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`: (L * tiles, side, side) to (L, out, in); shape is (out, in)."""
    rows, columns = tile_grid(shape, tiles.shape[-1])
    matrices = rearrange(tiles, "(l r c) a b -> l (r a) (c b)", r=rows, c=columns)
    return matrices[:, : shape[0], : shape[1]]


def tile_sizes(shape: tuple[int, int], side: int) -> Tensor:
    """Number of weights in each tile of a matrix, ragged ones counted as they are: int64 (tiles,)."""
    if side == 0:
        return torch.tensor([shape[0] * shape[1]])
    rows, columns = tile_grid(shape, side)
    heights = [min(side, shape[0] - r * side) for r in range(rows)]
    widths = [min(side, shape[1] - c * side) for c in range(columns)]
    return torch.tensor([h * w for h in heights for w in widths])


@jit
def block_to_tiles(x, SIDE: tl.constexpr):
    """In a kernel: a block (M, N), multiples of SIDE, to (tiles, SIDE * SIDE), numbered as above."""
    down: tl.constexpr = x.shape[0] // SIDE
    across: tl.constexpr = x.shape[1] // SIDE
    x = tl.reshape(x, (down, SIDE, across, SIDE))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (down * across, SIDE * SIDE))


@jit
def tiles_to_block(tiles, M: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr):
    """The inverse of `block_to_tiles`: (tiles, SIDE * SIDE) to (M, N)."""
    x = tl.reshape(tiles, (M // SIDE, N // SIDE, SIDE, SIDE))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (M, N))
