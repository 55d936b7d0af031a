"""Blocks of a matrix, and the vote memory that is kept one block at a time.

    python -m pytest -q tests/kernels/test_tiles.py
"""

import pytest
import torch
from torch import Tensor

from kernels.memory import remember
from kernels.philox import DITHER_BITS, Stream, dither_words
from kernels.tiles import from_tiles, stack_tiles, tile_grid, tile_sizes, to_tiles, unstack_tiles

SHAPES = [(1, 1), (1, 7), (7, 1), (13, 37), (37, 13), (63, 65), (64, 64), (65, 123), (300, 7)]


def shape_id(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tile_by_tile(matrix: Tensor, side: int) -> list[list[list]]:
    """The contract in loops: tiles row by row, elements row by row, zeros past the edge."""
    height, width = matrix.shape
    rows = matrix.tolist()
    padded = [row + [0] * side for row in rows] + [[0] * (width + side)] * side
    return [
        [row[left : left + side] for row in padded[top : top + side]]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


@pytest.mark.parametrize("side", [1, 7, 13, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_tiles_against_loops_and_back(shape, side):
    plain = torch.randint(1, 2**40, shape, generator=generator(1))
    for matrix in (plain, plain.t().contiguous().t(), plain.repeat_interleave(2, dim=1)[:, ::2]):
        tiles = to_tiles(matrix, side)
        assert tiles.dtype == matrix.dtype and tiles.tolist() == tile_by_tile(matrix, side)
        assert torch.equal(from_tiles(tiles, shape), plain)
    rows, columns = tile_grid(shape, side)
    sizes = tile_sizes(shape, side)
    assert rows * columns == len(tiles) and sizes.dtype == torch.int64
    assert sizes.tolist() == (tiles > 0).sum(dim=(1, 2)).tolist() and sizes.sum() == plain.numel()


def test_tiles_keep_small_integers():
    weight = torch.randint(-127, 128, (13, 37), dtype=torch.int8, generator=generator(2))
    tiles = to_tiles(weight, 7)
    assert tiles.dtype == torch.int8 and torch.equal(from_tiles(tiles, (13, 37)), weight)


def test_stacked_tiles_of_several_matrices_against_loops_and_back():
    matrices = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator(3)) for shape in SHAPES]
    matrices = [m.t().contiguous().t() if i % 2 else m for i, m in enumerate(matrices)]
    stacked = stack_tiles(matrices, 13, torch.int16)
    assert stacked.dtype == torch.int16
    assert stacked.tolist() == [tile for matrix in matrices for tile in tile_by_tile(matrix, 13)]
    for matrix, found in zip(matrices, unstack_tiles(stacked, SHAPES, torch.int8), strict=True):
        assert found.dtype == torch.int8 and found.is_contiguous() and torch.equal(found, matrix)


# memory


def words(step: int, tiles: int, side: int) -> tuple[Tensor, Tensor]:
    rows = dither_words(1, step, Stream.MEMORY_ROWS, tiles * side).view(tiles, side, 1)
    return rows, dither_words(1, step, Stream.MEMORY_COLUMNS, tiles * side).view(tiles, 1, side)


def some_votes(tiles: int, side: int, step: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Each tile of another size, the last one empty."""
    votes = torch.randint(-1000, 1001, (tiles, side, side), generator=generator(step))
    votes = votes * 10 ** torch.arange(tiles)[:, None, None]
    votes[-1] = 0
    return votes.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("side", [1, 7, 37])
def test_memory_against_float64(side, beta, dtype):
    tiles = 4
    stored, scale = torch.zeros(tiles, side, side, dtype=torch.int8), torch.zeros(tiles, 1, 1)
    for step in range(12):
        votes = some_votes(tiles, side, step, dtype)
        rows, columns = words(step, tiles, side)
        exact = beta * stored.double() * scale.double() + votes
        score, stored, scale = remember(stored, scale, votes, beta, rows, columns)
        assert score.dtype == torch.float32 and stored.dtype == torch.int8 and scale.dtype == torch.float32
        largest = exact.abs().amax(dim=(1, 2), keepdim=True)
        assert ((score - (votes + beta * exact)).abs() <= 1e-6 * (votes.abs() + largest)).all()
        torch.testing.assert_close(scale.double(), largest / 127, rtol=1e-6, atol=0)
        unit = (stored.double() * scale.double() - exact) / scale.double().clamp_min(1e-30)
        assert (unit.abs() <= 1 + 1e-4).all() and stored.abs().max() <= 127
        u = (rows.double() + columns.double()) % 2**DITHER_BITS / 2**DITHER_BITS
        ratio = exact / scale.double().clamp_min(1e-30) + u
        near = (ratio - ratio.round()).abs() < 1e-4
        assert (near | (stored == ratio.floor().clamp(-127, 127))).all()
        assert (stored[-1] == 0).all() and (scale[-1] == 0).all() and (score[-1] == 0).all()


def test_memory_is_unbiased():
    seeds, side = 4000, 5
    votes = some_votes(2, side, 3)
    rows, columns = words(0, 2 * seeds, side)
    many = votes.repeat(seeds, 1, 1)
    nothing, no_scale = torch.zeros_like(many, dtype=torch.int8), torch.zeros(2 * seeds, 1, 1)
    _, stored, scale = remember(nothing, no_scale, many, 0.9, rows, columns)
    mean = stored.double().view(seeds, 2, side, side).mean(dim=0)
    exact = votes / scale[:2].double().clamp_min(1e-30)
    fraction = exact - exact.floor()
    # 4.5 standard errors of 25 means; 1e-4 allows for fp32's ratio near 127.
    assert ((mean - exact).abs() <= 4.5 * (fraction * (1 - fraction) / seeds).sqrt() + 1e-4).all()


def test_memory_of_one_tile_does_not_touch_another():
    votes, (rows, columns) = some_votes(3, 13, 1), words(1, 3, 13)
    stored = torch.randint(-127, 128, (3, 13, 13), dtype=torch.int8, generator=generator(5))
    scale = torch.tensor([2.0, 3.0, 4.0])[:, None, None]
    whole = remember(stored, scale, votes, 0.9, rows, columns)
    for i in range(3):
        part = slice(i, i + 1)
        alone = remember(stored[part], scale[part], votes[part], 0.9, rows[part], columns[part])
        assert all(torch.equal(one, all_tiles[part]) for one, all_tiles in zip(alone, whole))


def test_memory_without_votes_fades_to_nothing():
    """Scales shrink by beta each step, down to where 1 / scale is no longer a number."""
    stored = torch.tensor([[[127, 12], [-60, 0]]], dtype=torch.int8)
    scale = torch.ones(1, 1, 1)
    for step in range(200):
        exact = 0.5 * stored.double() * scale.double()
        _, stored, scale = remember(stored, scale, torch.zeros(1, 2, 2, dtype=torch.int32), 0.5, *words(step, 1, 2))
        error = (stored.double() * scale.double() - exact).abs().max().item()
        assert stored[0, 1, 1] == 0 and torch.isfinite(scale).all()
        assert error <= scale.item() * 1.001 or (scale.item() == 0 and error < 1e-30)
    assert (stored == 0).all() and (scale == 0).all()
