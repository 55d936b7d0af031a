"""What the tests of an update share: weights, votes, momentum, random streams, and matrices between guard bands."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import backend
from kernels.momentum import MOMENTUM_TILE
from kernels.tiles import tile_count
from tests.kernels.inputs import generator

BITS = {1: (1, 2), 2: (1, 1), 3: (3, 1), 4: (7, 1), 5: (15, 1), 6: (31, 1), 7: (63, 1), 8: (127, 1)}  # Q, a move's unit
SEED, STEP = 2**40 + 11, 3


@contextmanager
def torch_backend() -> Iterator[None]:
    """Everything goes to the torch references."""
    before = backend.chosen()
    backend.use("torch")
    try:
        yield
    finally:
        backend.use(before)


def some_weight(shape: tuple[int, ...], bits: int = 6, seed: int = 0) -> Tensor:
    """Every allowed value, the two limits often: int8."""
    q, unit = BITS[bits]
    random = generator(*shape, bits, seed)
    if unit == 2:
        return (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(torch.int8)
    return torch.randint(-q - 2, q + 3, shape, generator=random).clamp(-q, q).to(torch.int8)


def some_votes(shape: tuple[int, ...], levels: int = 0, seed: int = 0) -> Tensor:
    """int32 votes of all sizes up to the largest possible, a third of them zero; few `levels` make them tie."""
    random = generator(*shape, levels, seed)
    if levels:
        return torch.randint(-levels, levels + 1, shape, generator=random, dtype=torch.int32)
    size = 10.0 ** torch.randint(0, 10, shape, generator=random).double()
    votes = (torch.rand(shape, generator=random, dtype=torch.float64) * 2 - 1) * size.clamp_max(2**31 - 1)
    return torch.where(torch.rand(shape, generator=random) < 1 / 3, 0, votes.to(torch.int32))


def some_momentum(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A momentum int8 (L, out, in) and its scales float32 (L, tiles)."""
    random = generator(*shape, seed)
    tiles = tile_count(shape[1:], MOMENTUM_TILE)
    stored = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
    return stored, torch.rand(shape[0], tiles, generator=random) * 50


def some_rng(device: torch.device | str = "cpu", step: int = STEP) -> Tensor:
    """[seed, step, rows seen]."""
    return torch.tensor([SEED, step, 5], device=device)


def some_layers(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers of `count` stacked matrices, which are neither neighbours nor in order: int64 (count,)."""
    return torch.tensor([5, 2, 9][:count], device=device)


def share(k: float, device: torch.device | str = "cpu") -> Tensor:
    """k as the kernels read it: float64 ()."""
    return torch.tensor(k, dtype=torch.float64, device=device)


def fenced(x: Tensor, band: int = 4096) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A contiguous copy of x, and the bands of its worst value before and after it."""
    worst = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min
    room = torch.full((x.numel() + 2 * band,), worst, dtype=x.dtype, device=x.device)
    inside = room[band : band + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, (room[:band], room[band + x.numel() :])


def unharmed(*bands: tuple[Tensor, Tensor]) -> bool:
    """Whether bands of `fenced` hold what they held."""
    return all(
        bool(band.isnan().all() if band.is_floating_point() else (band == torch.iinfo(band.dtype).min).all())
        for pair in bands
        for band in pair
    )
