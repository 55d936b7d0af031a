"""A table of integer rows: gather forward, scatter-add of votes backward.

    y[t] = W[token[t]] * s            V[token[t]] += D[t]

Memory: forward T*n bytes and 8*T of tokens read, size(y)*T*n written; votes T*n read, 4*T*n added in place. No
multiplication by a one-hot matrix. The votes are integers, so the order of the atomic additions does not show. The sum
of one pass is at most 127 * T.

A token outside the table is an error in torch. A kernel, which cannot raise one, makes its row of y NaN and drops its
votes.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, opaque_operator, operator, tl, triton, wrap_triton
from kernels.int8_matmul import OUTPUT_TYPES
from kernels.limits import MAX_REDUCTION
from kernels.votes import rescale_torch_, rescale_triton_

MOST_ROWS = MAX_REDUCTION * 127  # 127 * T still fits int32
BLOCK = {"BLOCK_T": 8, "BLOCK_N": 256}  # tokens and columns of a program


# The torch references


def embedding_torch(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`embedding` in torch."""
    return (weight[tokens].to(torch.float32) * scale).to(dtype)


@opaque_operator("accumulate_embedding_votes_torch", fake=lambda *_: None, mutates_args=("votes",))
def accumulate_embedding_votes_torch(
    d: Tensor, tokens: Tensor, votes: Tensor, old_ratio: Tensor | None = None, new_ratio: Tensor | None = None
) -> None:
    """`accumulate_embedding_votes` in torch."""
    only = old_ratio is None or old_ratio.item() == 0  # the first pass of a step: its new ratio is 1
    new = (votes if only else torch.zeros_like(votes)).index_add_(0, tokens, d.to(votes.dtype))
    if not only:
        rescale_torch_(votes, new, old_ratio, new_ratio)


# The kernels


@jit
def _embedding_kernel(
    tokens, weight, scale, out, T, rows, n, weight_row, weight_column, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[t, c] = weight[tokens[t], c] * scale for a block of tokens and columns."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(tokens + t, mask=t < T, other=-1)
    known = (token >= 0) & (token < rows)  # is in the table
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (c < n)[None, :]
    address = weight + token[:, None] * weight_row + c[None, :] * weight_column
    values = tl.load(address, mask=inside & known[:, None], other=0).to(tl.float32) * tl.load(scale)
    y = tl.where(known[:, None], values, float("nan"))
    tl.store(out + t[:, None] * n + c[None, :], y.to(out.dtype.element_ty), mask=inside)


@jit
def _embedding_votes_kernel(
    d, tokens, votes, new, old_ratio, T, rows, n, d_row, d_column, votes_row, votes_column,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """votes[tokens[t], c] += d[t, c] for a block of tokens and columns; to `new` instead if an old ratio is not 0."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(tokens + t, mask=t < T, other=-1)
    known = (token >= 0) & (token < rows)  # is in the table
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = known[:, None] & (c < n)[None, :]
    values = tl.load(d + t[:, None] * d_row + c[None, :] * d_column, mask=inside, other=0)
    place = token[:, None] * votes_row + c[None, :] * votes_column
    values = values.to(votes.dtype.element_ty)
    if old_ratio is None:
        tl.atomic_add(votes + place, values, mask=inside, sem="relaxed")
    elif tl.load(old_ratio) == 0:
        tl.atomic_add(votes + place, values, mask=inside, sem="relaxed")
    else:
        tl.atomic_add(new + place, values, mask=inside, sem="relaxed")


# Launching


def _grid(tokens: int, n: int) -> tuple[int, int]:
    return triton.cdiv(tokens, BLOCK["BLOCK_T"]), triton.cdiv(n, BLOCK["BLOCK_N"])


@operator("embedding")
def _embedding(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    (rows, n), count = weight.shape, tokens.numel()
    out = torch.empty((*tokens.shape, n), dtype=dtype, device=weight.device)
    wrap_triton(_embedding_kernel)[_grid(count, n)](
        tokens=tokens.contiguous(),
        weight=weight,
        scale=scale,
        out=out,
        T=count,
        rows=rows,
        n=n,
        weight_row=weight.stride(0),
        weight_column=weight.stride(1),
        **BLOCK,
    )
    return out


@operator("accumulate_embedding_votes", mutates_args=("votes", "new"))
def _accumulate_embedding_votes(
    d: Tensor, tokens: Tensor, votes: Tensor, new: Tensor | None, old_ratio: Tensor | None
) -> None:
    (count, n), rows = d.shape, votes.shape[0]
    wrap_triton(_embedding_votes_kernel)[_grid(count, n)](
        d=d,
        tokens=tokens.contiguous(),
        votes=votes,
        new=new,
        old_ratio=old_ratio,
        T=count,
        rows=rows,
        n=n,
        d_row=d.stride(0),
        d_column=d.stride(1),
        votes_row=votes.stride(0),
        votes_column=votes.stride(1),
        **BLOCK,
    )


# The public functions


def embedding(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of weight int8 (rows, n) times scale float32 (): tokens int64 (...) to (..., n) as `dtype`.

    dtype is float32, float16 or bfloat16. Raises ValueError on another type or an empty operand.
    """
    if tokens.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"embedding: got tokens {tuple(tokens.shape)} of a table {tuple(weight.shape)}; neither may be empty"
        )
    if dtype not in OUTPUT_TYPES or weight.dtype != torch.int8 or scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(
            f"embedding: got a table of {weight.dtype}, a scale {scale.dtype} {tuple(scale.shape)} and dtype {dtype}; "
            f"need torch.int8, torch.float32 () and one of {', '.join(map(str, OUTPUT_TYPES))}"
        )
    if on_triton(weight):
        return _embedding(tokens, weight, scale, dtype)
    return embedding_torch(tokens, weight, scale, dtype)


def accumulate_embedding_votes(
    d: Tensor, tokens: Tensor, votes: Tensor, old_ratio: Tensor | None = None, new_ratio: Tensor | None = None
) -> None:
    """votes[tokens[t]] += d[t], in place, with the ratios of `accumulate_votes` if given.

    d int8 (T, n), tokens int64 (T,), votes int32 or int64 (rows, n), of any stride. Several passes fit votes of int32
    while they have at most `MOST_ROWS` tokens together; the caller counts them. Raises ValueError on other shapes or
    types, an empty batch, or more tokens than that in one pass.
    """
    if d.dim() != 2 or votes.dim() != 2 or tokens.shape != d.shape[:1] or votes.shape[1] != d.shape[1] or 0 in d.shape:
        raise ValueError(
            f"accumulate_embedding_votes: got delta {tuple(d.shape)}, tokens {tuple(tokens.shape)} and votes "
            f"{tuple(votes.shape)}; need (T, n), (T,) and (rows, n), not empty"
        )
    if votes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"accumulate_embedding_votes: got votes {votes.dtype}; they are torch.int32 or torch.int64")
    if votes.dtype == torch.int32 and d.shape[0] > MOST_ROWS:
        raise ValueError(
            f"accumulate_embedding_votes: {d.shape[0]} rows can overflow int32, which holds {MOST_ROWS}; "
            "use int64 votes"
        )
    if old_ratio is not None and not votes.is_contiguous():
        raise ValueError("accumulate_embedding_votes: got ratios and votes with gaps; with ratios they are contiguous")
    if not on_triton(d):
        accumulate_embedding_votes_torch(d, tokens, votes, old_ratio, new_ratio)
        return
    new = None if old_ratio is None else torch.zeros_like(votes)
    _accumulate_embedding_votes(d, tokens, votes, new, old_ratio)
    if new is not None:
        rescale_triton_(votes, new, old_ratio, new_ratio)


def launch_configs() -> list[LaunchConfig]:
    """Both kernels, of round and of ragged sizes."""
    found = []
    for sizes in ("i32", "i32:1"):
        ragged = " ragged" * (sizes != "i32")
        gather = {"tokens": "*i64", "weight": "*i8", "scale": "*fp32", "out": "*bf16"}
        gather |= dict.fromkeys(("T", "rows", "n", "weight_row"), sizes)
        constants = {"weight_column": 1} | BLOCK
        found.append(LaunchConfig(f"gather{ragged}", _embedding_kernel, gather, constants, exact=True))
        scatter = {"d": "*i8", "tokens": "*i64", "old_ratio": "*fp32"}
        scatter |= dict.fromkeys(("votes", "new"), "*i64" if ragged else "*i32")
        scatter |= dict.fromkeys(("T", "rows", "n", "d_row", "votes_row"), sizes)
        constants = {"d_column": 1, "votes_column": 1} | BLOCK
        found.append(LaunchConfig(f"votes{ragged}", _embedding_votes_kernel, scatter, constants, exact=True))
    return found
