"""A table of integer rows: gather forward, scatter-add of votes backward.

    y[t] = W[token[t]] * s            V[token[t]] += D[t]

Memory: forward T*n bytes read, 4*T*n written; votes T*n read, 4*rows*n written. No multiplication by a one-hot matrix.
"""

import torch
from torch import Tensor

from kernels.int8_matmul import MAX_REDUCTION


def embedding(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows of weight int8 (rows, n) times scale float32 (): tokens int64 (...) to float32 (..., n)."""
    return weight[tokens].to(torch.float32) * scale


def embedding_votes(d: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Votes of a table of `rows` rows: V[tokens[t]] += D[t]. d int8 (T, n), tokens int64 (T,). Returns int32 (rows, n)."""
    if d.shape[0] > MAX_REDUCTION * 127:
        raise ValueError(f"embedding_votes: {d.shape[0]} rows can overflow int32; the limit is {MAX_REDUCTION * 127}")
    out = torch.zeros(rows, d.shape[1], dtype=torch.int32, device=d.device)
    return out.index_add_(0, tokens, d.to(torch.int32))
