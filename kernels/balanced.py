"""The rule `balanced`: rows, then columns, of the votes to unit norm, `SINKHORN_ROUNDS` times (Sinkhorn).

    s = v r c        r (out,) and c (in,) are 1 at first
    a round          r <- r / |rows of s|, then c <- c / |columns of s|; where a norm is 0 nothing changes

The reference divides the matrix itself. The kernels keep r and c in float32 and read v once a round: a program has
whole rows, so it knows their new r, and hands on its sums of squares of the columns of s. A small kernel adds those up,
always in the same order, and makes c. s = (v r) c then has the reference's numbers but for rounding, and v r does not
overflow: it is at most out^((rounds - 1) / 2).

Memory, for votes of b bytes: (rounds + 1) b out in read, 4 out in written, and 8 in for each strip and round; the
reference compiled for a GPU takes 8 out in a half-round. About 6 operations an element and round. A program holds rows
in its registers, which limits them to `MAX_COLUMNS`.
"""

import math

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, processors, tl, triton
from kernels.fuse import fused

SINKHORN_ROUNDS = 3
TINY = 1e-20
MAX_COLUMNS = 8192
WARPS = 16  # of one matrix' strips on a processor: all of them run at once, so none is left to run alone
SUMS = {"STRIPS": 256, "COLUMNS": 16, "num_warps": 8}  # a block of the strips' sums of squares


@fused
def balanced_torch(votes: Tensor) -> Tensor:
    """`balanced` in torch."""
    s = votes.to(torch.float32, copy=True)
    for _ in range(SINKHORN_ROUNDS):
        s /= s.norm(dim=-1, keepdim=True).clamp_min(TINY)
        s /= s.norm(dim=-2, keepdim=True).clamp_min(TINY)
    return s


# The kernels


@jit
def _inverse_norm(square):
    """1 / sqrt(square), 1 of 0: zeros stay zero, and r and c finite. No votes have norms between 0 and `TINY`."""
    norm = tl.sqrt_rn(tl.where(square == 0.0, 1.0, square))
    return tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)


@jit
def _load(votes, r, row, last, valid, inner, FIRST: tl.constexpr):
    """Whole rows of votes, and their r."""
    mask = (row < last)[:, None] & valid[None, :]
    v = tl.load(votes + row.to(tl.int64)[:, None] * inner, mask=mask, other=0)
    return v, tl.load(r + row, mask=(row < last) & (not FIRST), other=1.0)


@jit
def _rows_kernel(
    votes, r, c, squares, out, inner, strip, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The new r of a strip of rows, and its sums of squares of each column of s. In the FIRST round r and c are 1."""
    matrix, strips = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    first = tl.program_id(0) * strip
    last = tl.minimum(first + strip, out)
    down, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = column < inner
    votes += matrix * out * inner + column[None, :]
    r += matrix * out
    factor = tl.load(c + matrix * inner + column, mask=valid & (not FIRST), other=1.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # added up over rows once, at the end
    v, old = _load(votes, r, first + down, last, valid, inner, FIRST)
    for row in range(first, last, ROWS):
        # The next rows are on their way while these are summed.
        next_v, next_old = _load(votes, r, row + ROWS + down, last, valid, inner, FIRST)
        s = v.to(tl.float32) * old[:, None] * factor[None, :]
        inverse = _inverse_norm(tl.sum(s * s, axis=1))
        tl.store(r + row + down, old * inverse, mask=row + down < last)
        s *= inverse[:, None]
        total += s * s
        v, old = next_v, next_old
    sums = squares + (matrix * strips + tl.program_id(0)) * inner + column
    tl.store(sums, tl.sum(total, axis=0), mask=valid)


@jit
def _columns_kernel(squares, c, strips, inner, FIRST: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr):
    """The new c of COLUMNS columns."""
    matrix = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < inner
    squares += matrix * strips * inner + column[None, :]
    c += matrix * inner + column
    total = tl.zeros((STRIPS, COLUMNS), tl.float32)
    for start in range(0, strips, STRIPS):
        strip = start + tl.arange(0, STRIPS)
        mask = (strip < strips)[:, None] & valid[None, :]
        total += tl.load(squares + strip.to(tl.int64)[:, None] * inner, mask=mask, other=0.0)
    old = tl.load(c, mask=valid & (not FIRST), other=1.0)
    tl.store(c, old * _inverse_norm(tl.sum(total, axis=0)), mask=valid)


@jit
def _scale_kernel(votes, r, c, scores, out, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """s of ROWS whole rows."""
    matrix = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row < out)[:, None] & (column < inner)[None, :]
    place = (matrix * out + row)[:, None] * inner + column[None, :]
    of_row = tl.load(r + matrix * out + row, mask=row < out, other=0.0)
    of_column = tl.load(c + matrix * inner + column, mask=column < inner, other=0.0)
    v = tl.load(votes + place, mask=mask, other=0).to(tl.float32)
    tl.store(scores + place, v * of_row[:, None] * of_column[None, :], mask=mask)


# Launching


def _blocks(columns: int) -> dict[str, int]:
    """ROWS and COLUMNS of a block, and num_warps: 16 elements a thread."""
    width = max(triton.next_power_of_2(columns), 32)
    rows = max(1, 2048 // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": rows * width // 512}


def _balanced(votes: Tensor) -> Tensor:
    """`balanced` by the kernels: contiguous votes (L, out, in)."""
    count, out, inner = votes.shape
    blocks = _blocks(inner)
    # For each matrix, however many are stacked: the strips give sums their order.
    programs = triton.cdiv(processors(votes) * WARPS, blocks["num_warps"])
    strip = triton.cdiv(out, programs * blocks["ROWS"]) * blocks["ROWS"]
    strips = triton.cdiv(out, strip)
    scores = torch.empty(votes.shape, dtype=torch.float32, device=votes.device)
    r = torch.empty((count, out), dtype=torch.float32, device=votes.device)
    c = torch.empty((count, inner), dtype=torch.float32, device=votes.device)
    squares = torch.empty((count, strips, inner), dtype=torch.float32, device=votes.device)
    sums = (triton.cdiv(inner, SUMS["COLUMNS"]), count)
    for i in range(SINKHORN_ROUNDS):
        _rows_kernel[(strips, count)](
            votes=votes, r=r, c=c, squares=squares, out=out, inner=inner, strip=strip, FIRST=i == 0, **blocks
        )  # fmt: skip
        _columns_kernel[sums](squares=squares, c=c, strips=strips, inner=inner, FIRST=i == 0, **SUMS)
    _scale_kernel[(triton.cdiv(out, blocks["ROWS"]), count)](
        votes=votes, r=r, c=c, scores=scores, out=out, inner=inner, **blocks
    )  # fmt: skip
    return scores


def balanced(votes: Tensor) -> Tensor:
    """Rows, then columns, to unit norm, `SINKHORN_ROUNDS` times: votes of any type (..., out, in) to float32.

    Rows and columns of zeros stay zero.
    """
    out, inner = votes.shape[-2:]
    if not on_triton(votes) or inner > MAX_COLUMNS:
        return balanced_torch(votes)
    return _balanced(votes.contiguous().view(math.prod(votes.shape[:-2]), out, inner)).view(votes.shape)


def launch_configs() -> list[LaunchConfig]:
    """Votes of every type, and rows of several lengths."""
    signature = {"squares": "*fp32", "c": "*fp32", "strips": "i32:1", "inner": "i32"}
    found = [LaunchConfig("columns", _columns_kernel, signature, SUMS | {"FIRST": False})]
    for type_, columns in (("i32", 33), ("i32", 768), ("i64", 768), ("fp32", 4096), ("i32", MAX_COLUMNS)):
        name, blocks = f"{type_} {columns}", _blocks(columns)
        numbers = {"out": "i32:1", "inner": "i32:1" if columns % 16 else "i32"}
        shared = {"votes": f"*{type_}", "r": "*fp32", "c": "*fp32"} | numbers
        found.append(LaunchConfig(f"scale {name}", _scale_kernel, shared | {"scores": "*fp32"}, blocks))
        signature = shared | {"squares": "*fp32", "strip": "i32:1"}
        for first in (True, False):
            label, constants = f"rows {name}{' first' * first}", blocks | {"FIRST": first}
            found.append(LaunchConfig(label, _rows_kernel, signature, constants))
    return found
