"""Matrices as tiles: (L, out, in) <-> (L * tiles, side, side), ragged edges padded with zeros.

Tiles of a matrix are numbered row by row, and the elements of a tile row by row too; both orders are part of the
contract of top-k, whose ties go to the lower index. Matrices of one shape are stacked: L is 1 for a single one.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import jit, tl

PART = 2**20  # elements that torch takes at a time where each of them needs many bytes for a moment


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


def first_tile(row: int, inner: int, side: int) -> int:
    """The number of the tile that begins at `row` of a matrix (out, inner)."""
    return row // side * tile_grid((0, inner), side)[1] if side else 0


def _share(count: int, most: int) -> int:
    """The size of equal shares of `count`, but for the last, of which none is above `most` or, if that is 0, 1."""
    return -(-count // -(-count // max(1, most)))


def parts_of(shape: tuple[int, int, int], side: int) -> Iterator[tuple[slice, slice]]:
    """A stack (L, out, in) in parts of about `PART` elements, in the order of memory: slices of matrices and of rows.

    A part is some whole matrices, or of a large one a band whose rows are a multiple of `side`; 0 keeps it whole. For
    torch.compile, which merges passes over memory itself, all is one part.
    """
    count, out, inner = shape
    if torch.compiler.is_compiling():
        yield slice(0, count), slice(0, out)
        return
    together, height = _share(count, PART // (out * inner)), out
    if side and out * inner > PART:
        height = _share(-(-out // side), PART // (side * inner)) * side
    for first in range(0, count, together):
        for row in range(0, out, height):
            yield slice(first, first + together), slice(row, row + height)


def joined(found: list[Tensor], dim: int = 0) -> Tensor:
    """What was made part by part as one tensor; a single part as it is."""
    return found[0] if len(found) == 1 else torch.cat(found, dim)


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
