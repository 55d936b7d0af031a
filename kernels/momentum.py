"""Momentum of votes: one int8 byte per weight that remembers past votes.

    M  <- beta M + V            in the votes' own units
    the rule scores               V + beta M, with the new M (Nesterov's form)
    stored as int8, one scale per tile of 64 x 64: scale = max|M| / 127, rounded up or down at random (`philox.dither`)

`momentum_tile` is what kernels that flip do in registers: 2 bytes for each weight. `accumulate_momentum_` alone reads
4 + 1 and writes 4 + 1 bytes for each: where scores are formed before the kernel that selects.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, tl
from kernels.fuse import fused
from kernels.philox import (
    DITHER_BITS,
    MOMENTUM_COLUMNS_STREAM,
    MOMENTUM_ROWS_STREAM,
    Stream,
    dither,
    dither_at,
    dither_word,
    words_from,
)
from kernels.tiles import (
    block_to_tiles,
    first_tile,
    from_tiles,
    joined,
    parts_of,
    tile_count,
    tile_grid,
    tiles_to_block,
    to_tiles,
)

MOMENTUM_TILE = 64  # one scale per tile of this side
SMALLEST_SCALE = 1e-36  # a momentum faded below this is empty; 1 / scale would overflow


def empty_momentum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for a weight int8 (out, in): the momentum int8 (out, in) and its scales float32 (tiles,)."""
    scale = torch.zeros(tile_count(tuple(weight.shape), MOMENTUM_TILE), device=weight.device)
    return torch.zeros_like(weight, requires_grad=False), scale


# The torch reference


@fused
def momentum_step(
    momentum: Tensor, scale: Tensor, votes: Tensor, beta: float, row_noise: Tensor, col_noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, tile by tile: momentum int8 and votes integer (tiles, n, n), scale float32 (tiles,), noise int32
    (tiles, n, 1) and (tiles, 1, n). Returns V + beta M float32, the new momentum int8, the new scale."""
    v = votes.to(torch.float32)
    m = momentum.to(torch.float32).mul_(scale[:, None, None]).mul_(beta).add_(v)
    top = m.abs().amax(dim=(1, 2))
    new_scale = top / torch.full_like(top, 127.0)  # a GPU multiplies by 1 / 127 where the divisor is a Python number
    new_scale = torch.where(new_scale > SMALLEST_SCALE, new_scale, 0.0)
    inv_scale = torch.where(new_scale > 0, 1.0 / new_scale, 0.0)
    rounded = (m * inv_scale[:, None, None]).add_(dither(row_noise, col_noise)).floor_().clamp_(-127, 127)
    return m.mul_(beta).add_(v), rounded.to(torch.int8), new_scale


def momentum_noise(rng: Tensor, layers: Tensor, tiles: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Rounding noise for `tiles` tiles, from number `first` on, of each of the stacked momenta: int32 (L * tiles, n, 1)
    and (L * tiles, 1, n)."""
    n = MOMENTUM_TILE

    def draw(stream: int) -> Tensor:
        return (words_from(rng, stream, tiles * n, first * n, layers) >> (32 - DITHER_BITS)).to(torch.int32)

    return draw(Stream.MOMENTUM_ROWS).view(-1, n, 1), draw(Stream.MOMENTUM_COLUMNS).view(-1, 1, n)


def accumulate_momentum_torch_(
    momentum: Tensor, scale: Tensor, votes: Tensor, beta: float, rng: Tensor, layers: Tensor, first_row: int = 0
) -> Tensor:
    """`accumulate_momentum_` in torch, part by part."""
    found = []
    for matrices, rows in parts_of(tuple(momentum.shape), MOMENTUM_TILE):
        m, v = momentum[matrices, rows], votes[matrices, rows]
        shape = tuple(m.shape[1:])
        first, tiles = first_tile(first_row + rows.start, shape[1], MOMENTUM_TILE), tile_count(shape, MOMENTUM_TILE)
        of_tiles = scale[matrices, first : first + tiles]
        evidence, new, new_scale = momentum_step(
            to_tiles(m, MOMENTUM_TILE), of_tiles.flatten(), to_tiles(v, MOMENTUM_TILE), beta,
            *momentum_noise(rng, layers[matrices], tiles, first),
        )  # fmt: skip
        m.copy_(from_tiles(new, shape))
        of_tiles.copy_(new_scale.view_as(of_tiles))
        found.append(from_tiles(evidence, shape))
    return joined([part.flatten() for part in found]).view(votes.shape)


# The kernel


@jit
def momentum_tile(v, momentum, inside, scales, real, row_noise, col_noise, beta, SIDE: tl.constexpr):
    """`momentum_step` for a block of whole momentum tiles in registers, in place. Returns V + beta M float32 (M, N).

    v (M, N), zeros past the edge; momentum and inside: pointers and mask of its momentum (M, N); scales and real: those
    of the scales (tiles,); noise int32 (tiles, SIDE). Multiplications and additions must not be contracted.
    """
    M: tl.constexpr = v.shape[0]
    N: tl.constexpr = v.shape[1]
    v = block_to_tiles(v.to(tl.float32), SIDE)
    scale = tl.load(scales, mask=real, other=0.0)[:, None]
    m = beta * (block_to_tiles(tl.load(momentum, mask=inside, other=0), SIDE).to(tl.float32) * scale) + v
    new_scale = tl.div_rn(tl.max(tl.abs(m), 1), tl.full((v.shape[0],), 127.0, tl.float32))
    new_scale = tl.where(new_scale > 1e-36, new_scale, 0.0)
    divisor = tl.where(new_scale > 0, new_scale, 1.0)
    inv_scale = tl.where(new_scale > 0, tl.div_rn(tl.full((v.shape[0],), 1.0, tl.float32), divisor), 0.0)
    # M is formed again: kept since the maximum was taken, it would not fit into registers beside V.
    m = beta * (block_to_tiles(tl.load(momentum, mask=inside, other=0, volatile=True), SIDE).to(tl.float32) * scale) + v
    u = tl.reshape(dither_at(row_noise[:, :, None], col_noise[:, None, :]), v.shape)
    # floor takes a negative subnormal for 0 on a GPU; m is whole votes, and its share of the maximum never that small.
    rounded = tl.floor(m * inv_scale[:, None] + u)
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
    tl.store(momentum, tiles_to_block(rounded, M, N, SIDE), mask=inside)
    tl.store(scales, new_scale, mask=real)
    return tiles_to_block(v + beta * m, M, N, SIDE)


@jit
def momentum_block(v, momentum, scale, inside, row, column, out, inner, rng, layer, beta, SIDE: tl.constexpr):
    """`momentum_tile` for the block whose first weight is (row, column) of a matrix (out, inner).

    momentum and inside: pointers and mask of the block's momentum (M, N); scale points to the matrix's first scale.
    """
    M: tl.constexpr = v.shape[0]
    N: tl.constexpr = v.shape[1]
    tile = tl.arange(0, (M // SIDE) * (N // SIDE))
    tile_row, tile_column = row // SIDE + tile // (N // SIDE), column // SIDE + tile % (N // SIDE)
    real = (tile_row * SIDE < out) & (tile_column * SIDE < inner)
    tile = tile_row * tl.cdiv(inner, SIDE) + tile_column
    element = (tile[:, None] * SIDE + tl.arange(0, SIDE)[None, :]).to(tl.int64)
    seed, step = tl.load(rng), tl.load(rng + 1)
    row_noise = dither_word(seed, step, 16 * layer + MOMENTUM_ROWS_STREAM, element)
    col_noise = dither_word(seed, step, 16 * layer + MOMENTUM_COLUMNS_STREAM, element)
    return momentum_tile(v, momentum, inside, scale + tile, real, row_noise, col_noise, beta, SIDE)


@jit
def _momentum_kernel(
    evidence, momentum, scale, votes, rng, layers, stop, out, inner, beta, SIDE: tl.constexpr
):  # fmt: skip
    """One tile of one matrix of the stack."""
    if tl.load(stop) != 0:
        return
    place = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(inner, SIDE)
    row, column = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    down, right = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    inside = (down < out - row) & (right < inner - column)
    offsets = (place * out + row) * inner + column + down * inner + right
    v = tl.load(votes + offsets, mask=inside, other=0)
    v = momentum_block(
        v, momentum + offsets, scale + place * (tl.cdiv(out, SIDE) * across), inside, row, column, out, inner, rng,
        tl.load(layers + place), beta, SIDE,
    )  # fmt: skip
    tl.store(evidence + offsets, v, mask=inside)


def accumulate_momentum_(
    momentum: Tensor, scale: Tensor, votes: Tensor, beta: float, rng: Tensor, layers: Tensor, stop: Tensor,
    first_row: int = 0,
) -> Tensor:  # fmt: skip
    """M <- beta M + V for a stack of matrices, in place. Returns the evidence V + beta M, float32 (L, out, in).

    momentum int8 (L, out, in), scale float32 (L, tiles), both contiguous; votes integer (L, out, in); rng as in
    kernels.philox; layers int64 (L,) numbers the streams of noise; where stop, float32 (), is not 0 nothing changes,
    and the evidence is not to be used. In torch momentum and votes may be a band of whole tiles, from `first_row` of
    the matrices on, whose tiles are all in scale.
    """
    if not on_triton(momentum):
        if stop.item():
            return votes.to(torch.float32)
        return accumulate_momentum_torch_(momentum, scale, votes, beta, rng, layers, first_row)
    count, out, inner = momentum.shape
    down, across = tile_grid((out, inner), MOMENTUM_TILE)
    evidence = torch.zeros(momentum.shape, dtype=torch.float32, device=momentum.device)
    _momentum_kernel[(down * across, count)](
        evidence=evidence,
        momentum=momentum,
        scale=scale,
        votes=votes.contiguous(),
        rng=rng,
        layers=layers,
        stop=stop,
        out=out,
        inner=inner,
        beta=beta,
        SIDE=MOMENTUM_TILE,
        enable_fp_fusion=False,
        num_warps=8,
    )
    return evidence


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check momentum` compiles."""
    pointers = {"evidence": "*fp32", "momentum": "*i8", "scale": "*fp32", "votes": "*i32", "rng": "*i64",
                "layers": "*i64", "stop": "*fp32"}  # fmt: skip
    numbers = {"out": "i32", "inner": "i32", "beta": "fp32"}
    constants = {"SIDE": MOMENTUM_TILE, "enable_fp_fusion": False, "num_warps": 8}
    return [LaunchConfig("momentum", _momentum_kernel, pointers | numbers, constants)]
