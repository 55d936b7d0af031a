"""Votes: what the batch would have each weight do.

    V = D^T X           (out, in), exact integers
    C = -W * V          the paper's contribution: negative where the weight's present value raises the loss

V[o, i] is the gradient of the loss by weight (o, i) in units of sigma * A / 127: a positive vote asks
the weight to fall. One int32 sum holds `MAX_REDUCTION` tokens; longer batches are summed in int64 by parts.
Memory: T*(in + out) bytes read, 4*in*out written; 2*T*in*out operations.
"""

import torch
from torch import Tensor

from kernels.int8_matmul import MAX_REDUCTION, int8_product


def votes(d: Tensor, x: Tensor) -> Tensor:
    """V = D^T X for d int8 (T, out), x int8 (T, in): int32 (out, in), or int64 past `MAX_REDUCTION` rows."""
    if d.shape[0] != x.shape[0]:
        raise ValueError(f"votes: got {d.shape[0]} rows of delta and {x.shape[0]} of activations; they must agree")
    if d.shape[0] <= MAX_REDUCTION:
        return int8_product(d.t(), x)
    parts = zip(d.split(MAX_REDUCTION), x.split(MAX_REDUCTION), strict=True)
    return sum(int8_product(dp.t(), xp).to(torch.int64) for dp, xp in parts)


def add_votes(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """a + b, widened to int64 when a sum of `bound` tokens no longer fits int32."""
    return a + b if bound <= MAX_REDUCTION else a.to(torch.int64) + b.to(torch.int64)
