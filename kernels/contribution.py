"""Votes: what the batch would have each weight do.

    V = D^T X           (out, in), exact integers
    C = -W * V          the paper's contribution: negative where the weight's present value raises the loss

V[o, i] is the gradient of the loss by weight (o, i) in units of sigma * A / 127: a positive vote asks
the weight to fall. One int32 sum holds `MAX_REDUCTION` tokens; longer batches are summed in int64 by parts.
Memory: T*(in + out) bytes read, 4*in*out written; 2*T*in*out operations.

The kernel is that of `kernels.int8_matmul` on D^T and X^T. The reduced axis is the token: operands that come as views
of transposed copies, strides (1, T padded to 16), are read as they are, others are copied first. A layer has fewer
tiles than a large GPU has processors, so the tokens are shared out and the parts added with integer atomics, exact in
any order: each part adds to another 4*in*out bytes.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import Shipped
from kernels.int8_matmul import MAX_REDUCTION, int8_product, int8_product_torch, shipped_by_parts

PART = MAX_REDUCTION // 16 * 16  # tokens of one sum of a long batch; parts begin on 16-byte boundaries


def _summed(product: Callable[[Tensor, Tensor], Tensor], d: Tensor, x: Tensor) -> Tensor:
    if d.shape[0] <= MAX_REDUCTION:
        return product(d.t(), x)
    parts = zip(d.split(PART), x.split(PART), strict=True)
    return sum(product(dp.t(), xp).to(torch.int64) for dp, xp in parts)


def votes_torch(d: Tensor, x: Tensor) -> Tensor:
    """`votes` of the same operands, through torch."""
    return _summed(int8_product_torch, d, x)


def votes(d: Tensor, x: Tensor) -> Tensor:
    """V = D^T X for d int8 (T, out), x int8 (T, in) of any stride: int32 (out, in), or int64 past `MAX_REDUCTION` rows.

    Raises ValueError if the numbers of rows differ, and as `int8_product` does.
    """
    if d.shape[0] != x.shape[0]:
        raise ValueError(f"votes: got {d.shape[0]} rows of delta and {x.shape[0]} of activations; they must agree")
    return _summed(functools.partial(int8_product, split=True), d, x)


def add_votes(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """a + b, widened to int64 when a sum of `bound` tokens no longer fits int32."""
    return a + b if bound <= MAX_REDUCTION else a.to(torch.int64) + b.to(torch.int64)


def shipped() -> list[Shipped]:
    """What `python -m kernels.check contribution` compiles: the product's kernel with the tokens shared out."""
    return [shipped_by_parts("i32"), shipped_by_parts("i32:1")]
