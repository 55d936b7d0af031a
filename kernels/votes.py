"""Votes: what the batch would have each weight do.

    V = D^T X           (out, in), exact integers
    C = -W * V          the paper's contribution: negative where the weight's present value raises the loss

V[o, i] is the gradient of the loss by weight (o, i) in units of sigma * A / 127: a positive vote asks the weight to
fall. One int32 sum holds `MAX_REDUCTION` tokens; votes of longer batches are int64 and their products are taken in
parts. Memory: T*(in + out) bytes read, 4*in*out read and written; 2*T*in*out operations.

A backward pass adds its votes to a buffer. Where each pass of a step had its own scale of delta (sigma), the buffer is
in units of the largest so far, and both are rescaled to the new largest: rounded, so not independent of the split.
"""

import itertools

import torch
from torch import Tensor

from kernels.backend import (
    INTERPRETED,
    LaunchConfig,
    describable,
    describe,
    jit,
    mul_rn,
    on_triton,
    opaque_operator,
    operator,
    processors,
    tl,
    triton,
    wrap_triton,
)
from kernels.int8_matmul import int8_product_torch
from kernels.limits import MAX_REDUCTION
from kernels.tiles import parts_of
from kernels.transpose import by_columns

TOKENS_SUMMED = MAX_REDUCTION // 16 * 16  # at a time, of a long batch
# Side of a program's block of votes, and the tokens of one step through the operands. RAGGED is for operands that are
# not loaded in words of 16 bytes, where each byte takes an address.
ALIGNED = {"BLOCK": 128, "TOKENS": 128, "num_warps": 8}
RAGGED = {"BLOCK": 64, "TOKENS": 32, "num_warps": 4}
RESCALED = 1024  # votes of a program that rescales
WAVES, SHORTEST = 1, 4  # programs for each of a GPU's processors, and the fewest steps that one makes


def votes_torch(d: Tensor, x: Tensor) -> Tensor:
    """V = D^T X of d int8 (T, out), x int8 (T, in): int32 (out, in), or int64 past `MAX_REDUCTION` rows."""
    if d.shape[0] <= MAX_REDUCTION:
        return int8_product_torch(d.t(), x)
    parts = zip(d.split(TOKENS_SUMMED), x.split(TOKENS_SUMMED), strict=True)
    return sum(int8_product_torch(dp.t(), xp).to(torch.int64) for dp, xp in parts)


def rescaled(votes: Tensor, new: Tensor, old_ratio: Tensor, new_ratio: Tensor) -> Tensor:
    """votes * old_ratio + new * new_ratio to the nearest integer, halves to even: float64 (out, in)."""
    return torch.round(votes.double() * old_ratio + new.double() * new_ratio)


def rescale_torch_(votes: Tensor, new: Tensor, old_ratio: Tensor, new_ratio: Tensor) -> None:
    """votes <- `rescaled`, int32 or int64, contiguous: some rows at a time, as each vote takes 40 bytes meanwhile."""
    for _, rows in parts_of((1, *votes.shape), 1):
        votes[rows] = rescaled(votes[rows], new[rows], old_ratio, new_ratio)


@opaque_operator("accumulate_votes_torch", fake=lambda *_: None, mutates_args=("votes", "rng"))
def accumulate_votes_torch(
    d: Tensor, x: Tensor, votes: Tensor, rng: Tensor, old_ratio: Tensor | None = None, new_ratio: Tensor | None = None
) -> None:
    """`accumulate_votes` in torch."""
    first = old_ratio is not None and old_ratio.item() == 0  # pass of a step: its new ratio is 1
    if first and votes.dtype == torch.int32:
        int8_product_torch(d.t(), x, out=votes)
    elif first:
        votes.copy_(votes_torch(d, x))
    elif old_ratio is None:
        votes.add_(votes_torch(d, x))
    else:
        rescale_torch_(votes, votes_torch(d, x), old_ratio, new_ratio)
    rng[2] += d.shape[0]


@jit
def votes_block(
    d, x, rows, columns, out, inner, first, last, d_row, d_column, x_row, x_column, TOKENS: tl.constexpr
):  # fmt: skip
    """V of a block in registers, of tokens first to last: rows int64 (M,), columns int64 (N,) are its place.

    Returns int32 (M, N).
    """
    v = tl.zeros((rows.shape[0], columns.shape[0]), tl.int32)
    for start in range(first, last, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        d_tile = tl.load(
            d + rows[:, None] * d_column + token[None, :] * d_row,
            mask=(rows < out)[:, None] & (token < last)[None, :], other=0,
        )  # fmt: skip
        x_tile = tl.load(
            x + token[:, None] * x_row + columns[None, :] * x_column,
            mask=(token < last)[:, None] & (columns < inner)[None, :], other=0,
        )  # fmt: skip
        v = tl.dot(d_tile, x_tile, v, out_dtype=tl.int32)
    return v


@jit
def _rescaled(votes, new, old_ratio, new_ratio):
    """`rescaled` in a kernel."""
    both = mul_rn(votes.to(tl.float64), old_ratio.to(tl.float64)) + mul_rn(new.to(tl.float64), new_ratio.to(tl.float64))
    return (both + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: to the nearest integer, halves to even


@jit
def _rescale_kernel(votes, new, old_ratio, new_ratio, size, BLOCK: tl.constexpr):
    """BLOCK votes, unless the old ratio is 0."""
    old_share = tl.load(old_ratio)
    if old_share != 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(votes + place, mask=place < size, other=0)
        value = _rescaled(value, tl.load(new + place, mask=place < size, other=0), old_share, tl.load(new_ratio))
        tl.store(votes + place, value.to(votes.dtype.element_ty), mask=place < size)


@jit
def _first_pass(old_ratio, RESCALE: tl.constexpr):
    """Whether votes are added as they are: always, or in a step's first pass, when they are 0 and the new ratio 1."""
    if RESCALE:
        first_pass = tl.load(old_ratio) == 0
    else:
        first_pass = tl.full((), 1, tl.int1)
    return first_pass


@jit
def _tokens_of(first_pass, tokens, share):
    """The first and last token that a program takes: its share, or of votes that are rescaled, and so rounded once, all
    for the first program of a block and none for the others."""
    part = tl.program_id(2)
    first = tl.where(first_pass, part * share, tl.where(part == 0, 0, tokens))
    return first, tl.where(first_pass, tl.minimum((part + 1) * share, tokens), tokens)


@jit
def _rescale_block(v, votes, old_ratio, new_ratio, row, column, out, inner):
    """`_rescaled` of a block in memory, whose first vote is (row, column), and of v."""
    down, right = tl.arange(0, v.shape[0])[:, None], tl.arange(0, v.shape[1])[None, :]
    place = votes + (row.to(tl.int64) * inner + column) + (down * inner + right)  # 32 bits do inside a block
    inside = (down < out - row) & (right < inner - column)
    new = _rescaled(tl.load(place, mask=inside, other=0), v, tl.load(old_ratio), tl.load(new_ratio))
    tl.store(place, new.to(votes.dtype.element_ty), mask=inside)


@jit
def _add_block(v, votes, row, column, out, inner):
    """Programs that have other tokens of the block add to the same votes, in any order: these are integers."""
    down, right = tl.arange(0, v.shape[0])[:, None], tl.arange(0, v.shape[1])[None, :]
    place = votes + (row.to(tl.int64) * inner + column) + (down * inner + right)
    inside = (down < out - row) & (right < inner - column)
    tl.atomic_add(place, v.to(votes.dtype.element_ty), mask=inside, sem="relaxed")


@jit
def _count_rows(rng, tokens):
    """The first program of all adds the tokens to rng's rows."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(rng + 2, tl.load(rng + 2) + tokens)


@jit
def _votes_kernel(
    d, x, votes, v_tiles, rng, old_ratio, new_ratio, out, inner, tokens, share, d_row, d_column, x_row, x_column,
    RESCALE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of V, of `share` of the tokens. v_tiles, if given, is a descriptor of V: the GPU's copy engine then
    adds a block as a whole, where threads would add number by number."""
    tl.static_assert(TOKENS >= 32, "an int8 dot reduces at least 32 elements")
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    rows, columns = row.to(tl.int64) + tl.arange(0, BLOCK), column.to(tl.int64) + tl.arange(0, BLOCK)
    first_pass = _first_pass(old_ratio, RESCALE)
    first, last = _tokens_of(first_pass, tokens, share)
    v = votes_block(d, x, rows, columns, out, inner, first, last, d_row, d_column, x_row, x_column, TOKENS)
    if first_pass:
        if v_tiles is None:
            _add_block(v, votes, row, column, out, inner)
        else:
            v_tiles.atomic_add([row, column], v)
    elif tl.program_id(2) == 0:
        if RESCALE:
            # By quarters, for whose fp64 numbers there are registers.
            QUARTER: tl.constexpr = BLOCK // 4
            pairs = tl.split(tl.permute(tl.reshape(v, (BLOCK, 2, 2, QUARTER)), (0, 3, 1, 2)))
            for pair in tl.static_range(2):
                quarters = tl.split(pairs[pair])
                for half in tl.static_range(2):
                    start = column + (2 * half + pair) * QUARTER
                    _rescale_block(quarters[half], votes, old_ratio, new_ratio, row, start, out, inner)
                    tl.debug_barrier()  # so that quarters are not loaded together
    _count_rows(rng, tokens)


def _share(d: Tensor, step: int, blocks: int) -> int:
    """How many tokens one program takes, a multiple of `step`, so that there are about `WAVES` programs for each
    processor."""
    programs = max(1, WAVES * processors(d) // blocks)
    return step * max(SHORTEST, triton.cdiv(triton.cdiv(len(d), step), programs))


@operator("accumulate_votes", mutates_args=("votes", "rng"))
def accumulate_votes_triton(
    d: Tensor, x: Tensor, votes: Tensor, rng: Tensor, old_ratio: Tensor | None = None, new_ratio: Tensor | None = None
) -> None:
    """`accumulate_votes` on a GPU."""
    (rows, out), inner = d.shape, x.shape[1]
    if rows > MAX_REDUCTION and old_ratio is not None:  # rounded once, as in torch, not once a part
        new = torch.zeros_like(votes)
        accumulate_votes_triton(d, x, new, rng)
        votes.copy_(rescaled(votes, new, old_ratio, new_ratio))
        return
    d, x = by_columns(d), by_columns(x)
    parts = [(d, x)] if rows <= MAX_REDUCTION else zip(d.split(TOKENS_SUMMED), x.split(TOKENS_SUMMED), strict=True)
    aligned = all(size % 16 == 0 for size in (rows, d.stride(1), x.stride(1), d.storage_offset(), x.storage_offset()))
    blocks = ALIGNED if aligned else RAGGED
    described = not INTERPRETED and votes.dtype == torch.int32 and describable(votes)  # the interpreter has no engine
    down, across = triton.cdiv(out, blocks["BLOCK"]), triton.cdiv(inner, blocks["BLOCK"])
    for d_part, x_part in parts:
        share = _share(d_part, blocks["TOKENS"], down * across)
        wrap_triton(_votes_kernel)[(down, across, triton.cdiv(len(d_part), share))](
            d=d_part,
            x=x_part,
            votes=votes,
            v_tiles=describe(votes, blocks["BLOCK"], blocks["BLOCK"]) if described else None,
            rng=rng,
            old_ratio=old_ratio,
            new_ratio=new_ratio,
            out=out,
            inner=inner,
            tokens=len(d_part),
            share=share,
            d_row=d_part.stride(0),
            d_column=d_part.stride(1),
            x_row=x_part.stride(0),
            x_column=x_part.stride(1),
            RESCALE=old_ratio is not None,
            **blocks,
            num_stages=3,
        )


@operator("rescale_votes", mutates_args=("votes",))
def rescale_triton_(votes: Tensor, new: Tensor, old_ratio: Tensor, new_ratio: Tensor) -> None:
    """`rescale_torch_` on a GPU; where old_ratio is 0 votes stay as they are."""
    wrap_triton(_rescale_kernel)[(triton.cdiv(votes.numel(), RESCALED),)](
        votes=votes,
        new=new,
        old_ratio=old_ratio,
        new_ratio=new_ratio,
        size=votes.numel(),
        BLOCK=RESCALED,
    )


def accumulate_votes(
    d: Tensor, x: Tensor, votes: Tensor, rng: Tensor, old_ratio: Tensor | None = None, new_ratio: Tensor | None = None
) -> None:
    """votes <- votes * old_ratio + D^T X * new_ratio, and rng[2] grows by T.

    d int8 (T, out), x int8 (T, in) of any stride; votes int32 or int64 (out, in), contiguous; ratios float32 (), of the
    buffer's and of d's scale to the larger of both: without them votes are added as they are. An old ratio of 0 says
    that all votes are 0. Raises ValueError on other types, on shapes that do not agree and on more than `MAX_REDUCTION`
    rows for int32.
    """
    (rows, out), inner = d.shape, x.shape[1]
    if x.shape[0] != rows or votes.shape != (out, inner) or rows == 0:
        raise ValueError(
            f"accumulate_votes: got D {tuple(d.shape)}, X {tuple(x.shape)} and votes {tuple(votes.shape)}; "
            "need (T, out), (T, in) and (out, in), T at least 1"
        )
    if d.dtype != torch.int8 or x.dtype != torch.int8:
        raise ValueError(f"accumulate_votes: got D {d.dtype} and X {x.dtype}; both must be int8")
    if votes.dtype not in (torch.int32, torch.int64) or not votes.is_contiguous():
        raise ValueError(f"accumulate_votes: got votes {votes.dtype}; they must be int32 or int64, and contiguous")
    if rows > MAX_REDUCTION and votes.dtype != torch.int64:
        raise ValueError(
            f"accumulate_votes: {rows} rows can overflow int32, which holds {MAX_REDUCTION}; give the optimizer "
            f"max_tokens={rows} or more (votes become int64), or split the batch"
        )
    if on_triton(d):
        accumulate_votes_triton(d, x, votes, rng, old_ratio, new_ratio)
    else:
        accumulate_votes_torch(d, x, votes, rng, old_ratio, new_ratio)


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check votes` compiles."""
    found = []
    for blocks, described, rescale in itertools.product((ALIGNED, RAGGED), (True, False), (True, False)):
        side, ragged = blocks["BLOCK"], blocks is RAGGED
        signature = {"d": "*i8", "x": "*i8", "votes": "*i32", "rng": "*i64"}
        signature |= {"old_ratio": "*fp32", "new_ratio": "*fp32"} if rescale else {}
        signature |= {"v_tiles": f"tensordesc<i32[{side}, {side}]>"} if described else {}
        signature |= dict.fromkeys(("out", "inner", "share"), "i32")
        signature |= dict.fromkeys(("tokens", "d_column", "x_column"), "i32:1" if ragged else "i32")
        constants = {"d_row": 1, "x_row": 1, "RESCALE": rescale, **blocks}
        constants |= {name: None for name in ("old_ratio", "new_ratio", "v_tiles") if name not in signature}
        name = f"votes {side}x{side}{' rescaled' * rescale}{' ragged' * ragged}{' by descriptor' * described}"
        found.append(LaunchConfig(
            name, _votes_kernel, signature, constants, ("int8",), (90, 100) if described else (80, 90, 100),
        ))  # fmt: skip
    numbers = {"votes": "*i32", "new": "*i32", "old_ratio": "*fp32", "new_ratio": "*fp32", "size": "i32"}
    return [*found, LaunchConfig("rescale", _rescale_kernel, numbers, {"BLOCK": RESCALED})]
