"""Matrices as tiles, in torch and in a kernel, against loops.

    python -m pytest -q tests/kernels/test_tiles.py
"""

import pytest
import torch
from torch import Tensor

from kernels.backend import jit, tl
from kernels.tiles import (
    block_to_tiles,
    first_tile,
    from_tiles,
    parts_of,
    tile_count,
    tile_grid,
    tile_sizes,
    tiles_to_block,
    to_tiles,
)
from tests.kernels.inputs import generator, kernel_test, readable

SHAPES = [(1, 1), (1, 7), (7, 1), (13, 37), (33, 13), (63, 65), (64, 64), (65, 130), (300, 7)]


def tile_by_tile(matrix: Tensor, side: int) -> list[list[list]]:
    """The contract in loops: tiles row by row, elements row by row, zeros past the edge."""
    height, width = matrix.shape
    padded = [row + [0] * side for row in matrix.tolist()] + [[0] * (width + side)] * side
    return [
        [row[left : left + side] for row in padded[top : top + side]]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("side", [1, 7, 13, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_tiles_against_loops_and_back(shape, side, count):
    plain = torch.randint(1, 2**40, (count, *shape), generator=generator(*shape))
    expected = [tile for matrix in plain for tile in tile_by_tile(matrix, side)]
    for stack in (plain, plain.mT.contiguous().mT, plain.repeat_interleave(2, dim=2)[:, :, ::2]):
        tiles = to_tiles(stack, side)
        assert tiles.dtype == stack.dtype and tiles.tolist() == expected
        assert torch.equal(from_tiles(tiles, shape), plain)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=readable)
def test_tiles_keep_their_type(dtype):
    stack = torch.randint(-127, 128, (3, 13, 37), generator=generator(2)).to(dtype)
    tiles = to_tiles(stack, 7)
    assert tiles.dtype == dtype and torch.equal(from_tiles(tiles, (13, 37)), stack)


@pytest.mark.parametrize("side", [1, 7, 13, 64, 0])
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_grid_count_and_sizes(shape, side):
    ones = torch.ones(1, *shape)
    tiles = to_tiles(ones, side) if side else ones
    down, across = tile_grid(shape, side)
    sizes = tile_sizes(shape, side)
    assert down * across == tile_count(shape, side) == len(tiles)
    assert sizes.dtype == torch.int64 and sizes.tolist() == tiles.sum(dim=(1, 2)).tolist()


@pytest.mark.parametrize("side", [1, 7, 64, 0])
@pytest.mark.parametrize("part", [1, 100, 7 * 13 * 37, 10**6])
def test_parts_cover_a_stack_in_order(part, side, monkeypatch):
    """Of whole matrices, or bands of whole tiles of one matrix; no larger than they must be."""
    monkeypatch.setattr("kernels.tiles.PART", part)
    for count, out, inner in ((1, 1, 1), (5, 13, 37), (3, 300, 7)):
        stack = torch.arange(count * out * inner).view(count, out, inner)
        found = [(stack[matrices, rows], rows) for matrices, rows in parts_of((count, out, inner), side)]
        assert torch.equal(torch.cat([piece.flatten() for piece, _ in found]), stack.flatten())
        for piece, rows in found:
            smallest = out * inner if side == 0 else min(side, out) * inner
            assert piece.numel() <= max(part, smallest) and (len(piece) == 1 or piece.shape[1] == out)
            if side:
                tile = to_tiles(stack[:1], side)[first_tile(rows.start, inner, side)]
                assert tile[0, 0] == stack[0, rows.start, 0]


@jit
def _tiles_kernel(x, tiles, back, M: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    cut = block_to_tiles(tl.load(x + place), SIDE)
    count: tl.constexpr = (M // SIDE) * (N // SIDE)
    tile = tl.arange(0, count)[:, None] * (SIDE * SIDE) + tl.arange(0, SIDE * SIDE)[None, :]
    tl.store(tiles + tile, cut)
    tl.store(back + place, tiles_to_block(cut, M, N, SIDE))


@kernel_test
@pytest.mark.parametrize("shape, side", [((64, 64), 64), ((64, 64), 32), ((128, 64), 32), ((32, 128), 32)])
def test_blocks_in_a_kernel_are_cut_as_in_torch(shape, side, device):
    x = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator(*shape)).to(device)
    tiles = torch.empty(tile_count(shape, side), side, side, dtype=torch.int32, device=device)
    back = torch.empty(shape, dtype=torch.int32, device=device)
    _tiles_kernel[(1,)](x, tiles, back, M=shape[0], N=shape[1], SIDE=side)
    assert torch.equal(tiles, to_tiles(x[None], side)) and torch.equal(back, x)
