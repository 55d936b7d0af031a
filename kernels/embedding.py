"""A table of integer rows: gather forward, scatter-add of votes backward.

    y[t] = W[token[t]] * s            V[token[t]] += D[t]

Memory: forward T*n bytes and 8*T of tokens read, size(y)*T*n written; votes T*n read, 4*T*n added to a table of
4*rows*n bytes that was written once. No multiplication by a one-hot matrix. The votes are integers, so the order of
the atomic additions does not show. A sum is at most 127 * T.

A token outside the table is an error in torch; a kernel, which cannot raise one, makes its row of y NaN and drops its
votes.
"""

import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl, triton
from kernels.int8_matmul import MAX_REDUCTION, OUTPUT_TYPES

MOST_ROWS = MAX_REDUCTION * 127  # 127 * T still fits int32
BLOCK_T, BLOCK_N = 8, 256  # tokens and columns of a program


# The torch references


def embedding_torch(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`embedding` through torch."""
    return (weight[tokens].to(torch.float32) * scale).to(dtype)


def embedding_votes_torch(d: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """`embedding_votes` through torch."""
    out = torch.zeros(rows, d.shape[1], dtype=torch.int32, device=d.device)
    return out.index_add_(0, tokens, d.to(torch.int32))


# The kernels


@jit
def _embedding_kernel(
    tokens, weight, scale, out, T, rows, n, stride_row, stride_column, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[t, c] = weight[tokens[t], c] * scale for a block of tokens and columns."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(tokens + t, mask=t < T, other=-1)
    known = (token >= 0) & (token < rows)
    inside = (t < T)[:, None] & (c < n)[None, :]
    address = weight + token[:, None] * stride_row + c[None, :] * stride_column
    values = tl.load(address, mask=inside & known[:, None], other=0).to(tl.float32) * tl.load(scale)
    y = tl.where(known[:, None], values, float("nan"))
    tl.store(out + t[:, None] * n + c[None, :], y.to(out.dtype.element_ty), mask=inside)


@jit
def _embedding_votes_kernel(
    d, tokens, out, T, rows, n, stride_row, stride_column, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[tokens[t], c] += d[t, c] for a block of tokens and columns; out starts as zeros."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(tokens + t, mask=t < T, other=-1)
    inside = ((token >= 0) & (token < rows))[:, None] & (c < n)[None, :]
    values = tl.load(d + t[:, None] * stride_row + c[None, :] * stride_column, mask=inside, other=0)
    tl.atomic_add(out + token[:, None] * n + c[None, :], values.to(tl.int32), mask=inside, sem="relaxed")


# Launching


def _grid(tokens: int, n: int) -> tuple[int, int]:
    return triton.cdiv(tokens, BLOCK_T), triton.cdiv(n, BLOCK_N)


@torch.library.custom_op("nanogft::embedding", mutates_args=())
def _embedding(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    tokens, (rows, n) = tokens.contiguous(), weight.shape
    out = torch.empty(*tokens.shape, n, dtype=dtype, device=weight.device)
    _embedding_kernel[_grid(tokens.numel(), n)](
        tokens, weight, scale.to(weight.device, torch.float32), out, tokens.numel(), rows, n, *weight.stride(),
        BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    return out


@_embedding.register_fake
def _(tokens, weight, scale, dtype):
    return weight.new_empty((*tokens.shape, weight.shape[1]), dtype=dtype)


@torch.library.custom_op("nanogft::embedding_votes", mutates_args=())
def _embedding_votes(d: Tensor, tokens: Tensor, rows: int) -> Tensor:
    (t, n), tokens = d.shape, tokens.contiguous()
    out = torch.zeros(rows, n, dtype=torch.int32, device=d.device)
    _embedding_votes_kernel[_grid(t, n)](
        d, tokens, out, t, rows, n, *d.stride(), BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N
    )  # fmt: skip
    return out


@_embedding_votes.register_fake
def _(d, tokens, rows):
    return d.new_empty((rows, d.shape[1]), dtype=torch.int32)


# The public functions


def embedding(tokens: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of weight int8 (rows, n) times scale float32 (): tokens int64 (...) to (..., n) as `dtype`.

    dtype is float32, float16 or bfloat16. Raises ValueError on another type or an empty operand.
    """
    if tokens.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"embedding: got tokens {tuple(tokens.shape)} of a table {tuple(weight.shape)}; neither may be empty"
        )
    if dtype not in OUTPUT_TYPES or weight.dtype != torch.int8:
        raise ValueError(
            f"embedding: got a table of {weight.dtype} and dtype {dtype}; "
            f"need torch.int8 and {', '.join(map(str, OUTPUT_TYPES))}"
        )
    if on_triton(weight):
        return torch.ops.nanogft.embedding(tokens, weight, scale, dtype)
    return embedding_torch(tokens, weight, scale, dtype)


def embedding_votes(d: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Votes of a table of `rows` rows: V[tokens[t]] += D[t]. d int8 (T, n), tokens int64 (T,). Returns int32 (rows, n).

    Raises ValueError if T differs between the two, on empty ones, or on more rows than int32 can sum.
    """
    if d.dim() != 2 or tokens.shape != d.shape[:1] or d.numel() == 0:
        raise ValueError(
            f"embedding_votes: got delta {tuple(d.shape)} and tokens {tuple(tokens.shape)}; "
            f"need (T, n) and (T,), not empty"
        )
    if d.shape[0] > MOST_ROWS:
        raise ValueError(f"embedding_votes: {d.shape[0]} rows can overflow int32; the limit is {MOST_ROWS}")
    if on_triton(d):
        return torch.ops.nanogft.embedding_votes(d, tokens, rows)
    return embedding_votes_torch(d, tokens, rows)


# What `kernels.check` compiles

SHIPPED = [
    Shipped(
        f"{kernel} {ragged or 'round'}", function,
        addresses | dict.fromkeys(("T", "rows", "n", "stride_row"), "i32:1" if ragged else "i32"),
        {"stride_column": 1, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N},
    )
    for ragged in ("", "ragged")
    for kernel, function, addresses in (
        ("gather fp32", _embedding_kernel, {"tokens": "*i64", "weight": "*i8", "scale": "*fp32", "out": "*fp32"}),
        ("gather bf16", _embedding_kernel, {"tokens": "*i64", "weight": "*i8", "scale": "*fp32", "out": "*bf16"}),
        ("votes", _embedding_votes_kernel, {"d": "*i8", "tokens": "*i64", "out": "*i32"}),
    )
]  # fmt: skip
