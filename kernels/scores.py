"""Rules: votes V (out, in) to signed scores S of the same shape. A weight's move is -sign(S); |S| ranks it.

    gain          S = V                       |V| is the first-order fall of the loss for one unit
    contribution  S = V max(|W|, 1)           where C = -W V < 0 or W = 0, else 0: the paper's, zeros given a vote
    balanced      S = V, rows and columns scaled to unit norm in turn, three rounds (Sinkhorn)
    spectral      S = V with its singular values pushed to one, inside each ortho_tile or as a whole

`gain` and `contribution` are integers and exact on every backend. The float rules start from V in fp32;
`spectral` multiplies fp16 operands into fp32 sums.

The Newton-Schulz iteration and its coefficients are those of Muon (Jordan et al., 2024): five steps of
X <- a X + (b A + c A A) X, A = X X^T, take singular values in (0, 1] to about one.
"""

import torch
from torch import Tensor

from kernels.fuse import fused

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SINKHORN_ROUNDS = 3
TINY = 1e-20


def gain(votes: Tensor) -> Tensor:
    """The votes themselves, integers (out, in)."""
    return votes


def contribution(votes: Tensor, weight: Tensor) -> Tensor:
    """Votes of weights that work against the loss or are zero, ranked by |W V|: int64 (out, in).

    |S| < 2^38 for votes of `MAX_REDUCTION` tokens, which is why it is never formed in int32.
    """
    v, w = votes.to(torch.int64), weight.to(torch.int64)
    return torch.where((w * v > 0) | (w == 0), v * w.abs().clamp_min(1), 0)


def balanced(votes: Tensor) -> Tensor:
    """Rows, then columns, to unit norm, `SINKHORN_ROUNDS` times: float32 (out, in). Rows of zeros stay zero."""
    s = votes.to(torch.float32)
    for _ in range(SINKHORN_ROUNDS):
        s = s / s.norm(dim=-1, keepdim=True).clamp_min(TINY)
        s = s / s.norm(dim=-2, keepdim=True).clamp_min(TINY)
    return s


def _native_fp16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _dot(a: Tensor, b: Tensor, native: bool) -> Tensor:
    """fp16 (..., n, k) @ (..., k, m) with fp32 sums, rounded to fp16; in fp32 where the CPU has no fp16 dot."""
    return a @ b if native else (a.float() @ b.float()).half()


@fused
def _polynomial(a: Tensor, a_squared: Tensor) -> Tensor:
    _, b, c = NEWTON_SCHULZ
    return (b * a.float() + c * a_squared.float()).half()


@fused
def _advance(x: Tensor, product: Tensor) -> Tensor:
    return (NEWTON_SCHULZ[0] * x.float() + product.float()).half()


def orthogonalise(x: Tensor) -> Tensor:
    """Singular values of each matrix to about one: float32 (..., n, m) to float32, zeros to zeros."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    native = _native_fp16(x.device)
    norm = x.flatten(-2).norm(dim=-1)[..., None, None]
    x = (x / norm.clamp_min(TINY)).half()
    for _ in range(NEWTON_SCHULZ_STEPS):
        a = _dot(x, x.mT, native)
        x = _advance(x, _dot(_polynomial(a, _dot(a, a, native)), x, native))
    return x.float()
