"""Vote memory: one byte per weight that remembers past votes (`memory = "int8"`).

    M  <- beta M + V            in the votes' own units
    the rule scores               V + beta M, with the new M
    stored as int8, one scale per tile: scale = max|M| / 127, rounded up or down at random (`philox.dither`)

`remember_tile` is what kernels that learn do in registers: 2 bytes for each weight. `remember_` alone reads 4 + 1 and
writes 4 + 1 bytes for each: for rules that look at whole matrices.
"""

import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl
from kernels.fuse import fused
from kernels.philox import dither, dither_at
from kernels.tiles import block_from, blocks_of, from_tiles, to_tiles

MEMORY_TILE = 64  # one scale per tile of this side
SMALLEST_SCALE = 1e-36  # a memory faded below this is empty; 1 / scale would overflow


@fused
def remember(
    stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the memory, tile by tile.

    stored int8 (tiles, n, n), scale float32 (tiles, 1, 1), votes integer (tiles, n, n), dither words int32
    (tiles, n, 1) and (tiles, 1, n). Returns V + beta M float32, the new stored int8, the new scale.
    """
    v = votes.to(torch.float32)
    m = beta * (stored.to(torch.float32) * scale) + v
    new_scale = m.abs().amax(dim=(1, 2), keepdim=True) / 127.0
    new_scale = torch.where(new_scale > SMALLEST_SCALE, new_scale, 0.0)
    inverse = torch.where(new_scale > 0, 1.0 / new_scale, 0.0)
    rounded = torch.floor(m * inverse + dither(rows, columns)).clamp(-127, 127).to(torch.int8)
    return v + beta * m, rounded, new_scale


def remember_torch_(stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor) -> Tensor:
    """`remember_` in torch."""
    shape = tuple(stored.shape)
    evidence, new, new_scale = remember(
        to_tiles(stored, MEMORY_TILE), scale, to_tiles(votes, MEMORY_TILE), beta,
        rows.view(-1, MEMORY_TILE, 1), columns.view(-1, 1, MEMORY_TILE),
    )  # fmt: skip
    stored.copy_(from_tiles(new, shape))
    scale.copy_(new_scale)
    return from_tiles(evidence, shape)


@jit
def remember_tile(v, stored, inside, scales, real, row_words, column_words, beta, SIDE: tl.constexpr):
    """`remember` for a block of whole memory tiles in registers, in place. Returns V + beta M float32 (M, N).

    v (M, N), zeros past the edge; stored and inside: pointers and mask of its memory (M, N); scales and real: those of
    the scales (tiles,); dither words int32 (tiles, SIDE). Multiplications and additions must not be contracted.
    """
    M: tl.constexpr = v.shape[0]
    N: tl.constexpr = v.shape[1]
    v = blocks_of(v.to(tl.float32), SIDE)
    scale = tl.load(scales, mask=real, other=0.0)[:, None]
    m = beta * (blocks_of(tl.load(stored, mask=inside, other=0), SIDE).to(tl.float32) * scale) + v
    new_scale = tl.div_rn(tl.max(tl.abs(m), 1), tl.full((v.shape[0],), 127.0, tl.float32))
    new_scale = tl.where(new_scale > 1e-36, new_scale, 0.0)
    divisor = tl.where(new_scale > 0, new_scale, 1.0)
    inverse = tl.where(new_scale > 0, tl.div_rn(tl.full((v.shape[0],), 1.0, tl.float32), divisor), 0.0)
    # M is formed again: kept since the maximum was taken, it would not fit into registers beside V.
    m = beta * (blocks_of(tl.load(stored, mask=inside, other=0, volatile=True), SIDE).to(tl.float32) * scale) + v
    u = tl.reshape(dither_at(row_words[:, :, None], column_words[:, None, :]), v.shape)
    # floor takes a negative subnormal for 0 on a GPU; m is whole votes, and its share of the maximum never that small.
    rounded = tl.floor(m * inverse[:, None] + u)
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
    tl.store(stored, block_from(rounded, M, N, SIDE), mask=inside)
    tl.store(scales, new_scale, mask=real)
    return block_from(v + beta * m, M, N, SIDE)


@jit
def _remember_kernel(
    evidence, stored, scale, votes, row_words, column_words, out, inner, down, across, beta, SIDE: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    tiles_across = tl.cdiv(inner, SIDE)
    row = (tile // tiles_across * SIDE + tl.arange(0, SIDE))[:, None]
    column = (tile % tiles_across * SIDE + tl.arange(0, SIDE))[None, :]
    inside = (row < out) & (column < inner)
    flat = row * inner + column
    one = tile + tl.arange(0, 1)
    element = tile * SIDE + tl.arange(0, SIDE)[None, :]
    v = tl.load(votes + row * down + column * across, mask=inside, other=0)
    v = remember_tile(
        v, stored + flat, inside, scale + one, one >= 0, tl.load(row_words + element), tl.load(column_words + element),
        beta, SIDE,
    )  # fmt: skip
    tl.store(evidence + flat, v, mask=inside)


@torch.library.custom_op("nanogft::remember", mutates_args=("stored", "scale"))
def _remember(stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor) -> Tensor:
    evidence = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    _remember_kernel[(scale.numel(),)](
        evidence, stored, scale, votes, rows, columns, *stored.shape, *votes.stride(), beta, SIDE=MEMORY_TILE,
        enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
    return evidence


@_remember.register_fake
def _(stored, scale, votes, beta, rows, columns):
    return stored.new_empty(stored.shape, dtype=torch.float32)


def remember_(stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor) -> Tensor:
    """`remember` for a matrix, in place: stored int8 (out, in), scale float32 (tiles, 1, 1), votes integer (out, in).

    rows and columns are int32 dither words, MEMORY_TILE of each for every tile. Returns V + beta M float32 (out, in).
    """
    if not on_triton(stored):
        return remember_torch_(stored, scale, votes, beta, rows, columns)
    own = stored.contiguous()
    evidence = torch.ops.nanogft.remember(own, scale, votes, beta, rows.contiguous(), columns.contiguous())
    if own is not stored:
        stored.copy_(own)
    return evidence


def shipped() -> list[Shipped]:
    """What `python -m kernels.check memory` compiles."""
    pointers = {"evidence": "*fp32", "stored": "*i8", "scale": "*fp32", "votes": "*i32", "row_words": "*i32",
                "column_words": "*i32"}  # fmt: skip
    numbers = {"out": "i32", "inner": "i32", "down": "i32", "across": "i32", "beta": "fp32"}
    return [Shipped("remember", _remember_kernel, pointers | numbers, {"SIDE": MEMORY_TILE}, num_warps=8)]
