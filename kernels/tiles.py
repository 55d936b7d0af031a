"""Matrices as blocks: (out, in) <-> (tiles, side, side), ragged edges padded with zeros.

Tiles are numbered row by row, and the elements of a tile row by row too; both orders are part of the
contract of top-k, whose ties go to the lower index.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import jit, tl
from kernels.fuse import fused


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


@fused(dynamic=False)
def stack_tiles(matrices: list[Tensor], side: int, dtype: torch.dtype) -> Tensor:
    """Tiles of several matrices one after another, as `dtype`: (all tiles, side, side)."""
    return torch.cat([to_tiles(matrix.to(dtype), side) for matrix in matrices])


@fused(dynamic=False)
def unstack_tiles(tiles: Tensor, shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """The inverse of `stack_tiles`: matrices of `shapes`, as `dtype`, each contiguous."""
    counts = [(grid := tile_grid(shape, tiles.shape[-1]))[0] * grid[1] for shape in shapes]
    parts = zip(tiles.split(counts), shapes, strict=True)
    return [from_tiles(part, shape).to(dtype).contiguous() for part, shape in parts]


@jit
def blocks_of(x, SIDE: tl.constexpr):
    """On a GPU: (M, N) to (blocks, SIDE * SIDE), numbered as above. M and N are multiples of SIDE;
    only names change places."""
    down: tl.constexpr = x.shape[0] // SIDE
    across: tl.constexpr = x.shape[1] // SIDE
    x = tl.reshape(x, (down, SIDE, across, SIDE))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (down * across, SIDE * SIDE))


@jit
def block_from(blocks, M: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr):
    """The inverse of `blocks_of`: (blocks, SIDE * SIDE) to (M, N)."""
    x = tl.reshape(blocks, (M // SIDE, N // SIDE, SIDE, SIDE))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (M, N))
