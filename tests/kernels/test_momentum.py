"""Momentum of votes: the torch reference against float64, the kernel against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_momentum.py
"""

import pytest
import torch
from torch import Tensor

from kernels.momentum import MOMENTUM_TILE, accumulate_momentum_, empty_momentum, momentum_noise, momentum_step
from kernels.philox import DITHER_BITS, Stream, words
from kernels.tiles import to_tiles
from tests.kernels.inputs import every_other, generator, kernel_test, readable, transposed
from tests.kernels.update_inputs import SEED, STEP, fenced, some_momentum, some_rng, some_votes, torch_backend, unharmed

SHAPES = [(1, 1, 1), (1, 1, 7), (3, 7, 1), (3, 33, 65), (1, 65, 130), (1, 63, 64)]


def top_bits(stream: int, count: int, step: int = STEP) -> Tensor:
    """Noise, int32 (count,)."""
    return torch.tensor([int(word) >> (32 - DITHER_BITS) for word in words(SEED, step, stream, count)]).int()


def some_noise(step: int, tiles: int, side: int) -> tuple[Tensor, Tensor]:
    rows = top_bits(Stream.MOMENTUM_ROWS, tiles * side, step).view(tiles, side, 1)
    return rows, top_bits(Stream.MOMENTUM_COLUMNS, tiles * side, step).view(tiles, 1, side)


def tiles_of_votes(tiles: int, side: int, step: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Each tile of another size, the last one empty."""
    votes = torch.randint(-1000, 1001, (tiles, side, side), generator=generator(step))
    votes = votes * 10 ** torch.arange(tiles)[:, None, None]
    votes[-1] = 0
    return votes.to(dtype)


# The torch reference


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("side", [1, 7, 33])
def test_step_against_float64(side, beta, dtype):
    tiles = 4
    stored, scale = torch.zeros(tiles, side, side, dtype=torch.int8), torch.zeros(tiles)
    for step in range(12):
        votes = tiles_of_votes(tiles, side, step, dtype)
        rows, columns = some_noise(step, tiles, side)
        old = beta * stored.double() * scale.double()[:, None, None]
        exact = old + votes
        rounding = 1e-6 * (old.abs() + votes.abs())  # where the two nearly cancel, more than 1e-6 of their sum
        evidence, stored, scale = momentum_step(stored, scale, votes, beta, rows, columns)
        assert evidence.dtype == torch.float32 and stored.dtype == torch.int8 and scale.dtype == torch.float32
        largest = exact.abs().amax(dim=(1, 2))
        assert ((evidence - (votes + beta * exact)).abs() <= 2 * rounding).all()
        assert ((scale.double() - largest / 127).abs() <= rounding.amax(dim=(1, 2)) / 127).all()
        unit = scale.double().clamp_min(1e-30)[:, None, None]
        slack = 1e-4 + 2 * rounding / unit
        assert ((stored - exact / unit).abs() <= 1 + slack).all() and stored.abs().max() <= 127
        u = (rows.double() + columns.double()) % 2**DITHER_BITS / 2**DITHER_BITS
        ratio = exact / unit + u
        near = (ratio - ratio.round()).abs() < slack
        assert (near | (stored == ratio.floor().clamp(-127, 127))).all()
        assert (stored[-1] == 0).all() and (scale[-1] == 0).all() and (evidence[-1] == 0).all()


def test_rounding_is_unbiased():
    seeds, side = 4000, 5
    votes = tiles_of_votes(2, side, 3)
    many = votes.repeat(seeds, 1, 1)
    nothing, no_scale = torch.zeros_like(many, dtype=torch.int8), torch.zeros(2 * seeds)
    _, stored, scale = momentum_step(nothing, no_scale, many, 0.9, *some_noise(0, 2 * seeds, side))
    mean = stored.double().view(seeds, 2, side, side).mean(dim=0)
    exact = votes / scale[:2].double().clamp_min(1e-30)[:, None, None]
    fraction = exact - exact.floor()
    # 4.5 standard errors of 25 means; 1e-4 allows for fp32's ratio near 127.
    assert ((mean - exact).abs() <= 4.5 * (fraction * (1 - fraction) / seeds).sqrt() + 1e-4).all()


def test_tiles_are_independent():
    votes, (rows, columns) = tiles_of_votes(3, 13, 1), some_noise(1, 3, 13)
    stored = torch.randint(-127, 128, (3, 13, 13), dtype=torch.int8, generator=generator(5))
    scale = torch.tensor([2.0, 3.0, 4.0])
    whole = momentum_step(stored, scale, votes, 0.9, rows, columns)
    for i in range(3):
        part = slice(i, i + 1)
        alone = momentum_step(stored[part], scale[part], votes[part], 0.9, rows[part], columns[part])
        assert all(torch.equal(one, all_tiles[part]) for one, all_tiles in zip(alone, whole, strict=True))


def test_without_votes_it_fades_to_nothing():
    """Scales shrink by beta each step, down to where 1 / scale is no longer a number."""
    stored = torch.tensor([[[127, 12], [-60, 0]]], dtype=torch.int8)
    scale = torch.ones(1)
    for step in range(200):
        exact = 0.5 * stored.double() * scale.double()
        nothing = torch.zeros(1, 2, 2, dtype=torch.int32)
        _, stored, scale = momentum_step(stored, scale, nothing, 0.5, *some_noise(step, 1, 2))
        error = (stored.double() * scale.double() - exact).abs().max().item()
        assert stored[0, 1, 1] == 0 and torch.isfinite(scale).all()
        assert error <= scale.item() * 1.001 or (scale.item() == 0 and error < 1e-30)
    assert (stored == 0).all() and (scale == 0).all()


def test_noise_of_stacked_momenta():
    """A layer's streams are its own; their elements go tile by tile."""
    rows, columns = momentum_noise(some_rng(), torch.tensor([5, 0]), 3)
    assert rows.dtype == columns.dtype == torch.int32
    n = MOMENTUM_TILE
    assert rows.shape == (6, n, 1) and columns.shape == (6, 1, n)
    for found, stream in ((rows, Stream.MOMENTUM_ROWS), (columns, Stream.MOMENTUM_COLUMNS)):
        assert torch.equal(found.flatten(), torch.cat([top_bits(stream + 16 * layer, 3 * n) for layer in (5, 0)]))


@pytest.mark.parametrize("shape, tiles", [((1, 7), 1), ((65, 130), 6), ((64, 64), 1)])
def test_empty_momentum(shape, tiles):
    weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.int8), requires_grad=False)
    stored, scale = empty_momentum(weight)
    assert stored.dtype == torch.int8 and stored.shape == shape and (stored == 0).all()
    assert scale.dtype == torch.float32 and scale.shape == (tiles,) and (scale == 0).all()
    assert type(stored) is Tensor


@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_whole_matrices_are_their_tiles(shape):
    """`accumulate_momentum_` in torch is `momentum_step` on tiles, padded with zeros, with the layers' noise."""
    (stored, scale), votes = some_momentum(shape), some_votes(shape, 9000)
    layers = torch.tensor([4, 9, 2][: shape[0]])
    noise = momentum_noise(some_rng(), layers, scale.shape[1])
    expected = momentum_step(to_tiles(stored, 64), scale.flatten(), to_tiles(votes, 64), 0.9, *noise)
    evidence = accumulate_momentum_(stored, scale, votes, 0.9, some_rng(), layers, torch.zeros(()))
    assert torch.equal(to_tiles(evidence, 64), expected[0])
    assert torch.equal(to_tiles(stored, 64), expected[1]) and torch.equal(scale.flatten(), expected[2])


# The kernel


@kernel_test
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_kernel(shape, dtype, device):
    """Three steps, votes of all sizes and in any layout; nothing is written outside."""
    layers, stop = torch.tensor([4, 9, 2][: shape[0]]), torch.zeros(())
    theirs = some_momentum(shape)
    (stored, bands), (scale, scale_bands) = (fenced(t.to(device)) for t in theirs)
    for step, layout in enumerate((Tensor.contiguous, transposed, every_other)):
        votes = some_votes(shape, 0 if step else 900, step).to(dtype)
        votes = votes * 2**31 if dtype == torch.int64 else votes
        with torch_backend():
            expected = accumulate_momentum_(*theirs, votes, 0.9, some_rng(step=step), layers, stop)
        given = torch.stack([layout(matrix) for matrix in votes.to(device)])
        given = layout(votes[0].to(device))[None] if shape[0] == 1 else given
        rng = some_rng(device, step)
        evidence = accumulate_momentum_(stored, scale, given, 0.9, rng, layers.to(device), stop.to(device))
        assert evidence.dtype == torch.float32 and torch.equal(evidence.cpu(), expected)
        assert torch.equal(stored.cpu(), theirs[0]) and torch.equal(scale.cpu(), theirs[1])
    assert (stored != 0).any() and unharmed(bands, scale_bands)


@kernel_test
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.99])
def test_kernel_fades_to_nothing(beta, device):
    """Without votes, from a scale near the smallest that is kept."""
    stored, _ = some_momentum((1, 7, 33))
    scale, stop, layers = torch.tensor([[1.1e-36]]), torch.zeros(()), torch.tensor([0])
    found, found_scale = stored.clone().to(device), scale.clone().to(device)
    votes = torch.zeros(1, 7, 33, dtype=torch.int32)
    for step in range(2):
        with torch_backend():
            expected = accumulate_momentum_(stored, scale, votes, beta, some_rng(step=step), layers, stop)
        evidence = accumulate_momentum_(
            found, found_scale, votes.to(device), beta, some_rng(device, step), layers.to(device), stop.to(device)
        )
        assert torch.equal(evidence.cpu(), expected)
        assert torch.equal(found.cpu(), stored) and torch.equal(found_scale.cpu(), scale)
    assert beta == 0.99 or ((stored == 0).all() and scale == 0)


@kernel_test
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_nothing_changes_at_a_stop(name, device):
    stored, scale = (t.to(device) for t in some_momentum((3, 7, 33)))
    before = stored.clone(), scale.clone()
    votes, layers = some_votes((3, 7, 33), 900).to(device), torch.tensor([4, 9, 2], device=device)
    for stop in (1.0, 2.0):
        given = stored, scale, votes, 0.9, some_rng(device), layers, torch.tensor(stop, device=device)
        if name == "torch":
            with torch_backend():
                accumulate_momentum_(*given)
        else:
            accumulate_momentum_(*given)
        assert torch.equal(stored, before[0]) and torch.equal(scale, before[1])


@kernel_test
def test_twice_is_the_same(device):
    votes, layers = some_votes((1, 65, 33), 900).to(device), torch.tensor([4], device=device)
    ends = []
    for _ in range(2):
        stored, scale = (t.to(device) for t in some_momentum((1, 65, 33)))
        evidence = accumulate_momentum_(
            stored, scale, votes, 0.9, some_rng(device), layers, torch.zeros((), device=device)
        )
        ends.append((stored, scale, evidence))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
