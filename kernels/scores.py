"""Rules: votes V (out, in) to signed scores S of the same shape. A weight's move is -sign(S); |S| ranks it.

    gain          S = V                       |V| is the first-order fall of the loss for one unit
    contribution  S = V max(|W|, 1)           where C = -W V < 0 or W = 0, else 0: the paper's, zeros given a vote
    balanced      S = V, rows and columns scaled to unit norm in turn, three rounds (kernels/balanced.py)
    spectral      S = V with its singular values pushed to one, inside each ortho_tile or as a whole

`gain` and `contribution` are integers and exact on every backend. The float rules start from V in fp32;
`spectral` multiplies 16-bit operands (`dot_dtype`) into fp32 sums.

The Newton-Schulz iteration and its coefficients are those of Muon (Jordan et al., 2024): five steps of
X <- a X + (b A + c A A) X, A = X X^T, take singular values in (0, 1] to about one.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, capability_of, jit, on_triton, tl, triton
from kernels.balanced import TINY, balanced
from kernels.fuse import fused
from kernels.limits import RULES
from kernels.tiles import from_tiles, to_tiles

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ORTHO_TILES = (32, 64, 128)  # sides that a kernel orthogonalises
OLD_COMPILER = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


def gain(votes: Tensor) -> Tensor:
    """The votes themselves, integers (out, in)."""
    return votes


def contribution(votes: Tensor, weight: Tensor) -> Tensor:
    """Votes of weights that work against the loss or are zero, ranked by |W V|: int64 (out, in),
    float32 of float votes.

    |S| < 2^38 for votes of `MAX_REDUCTION` tokens, which is why it is never formed in int32.
    """
    v = votes if votes.is_floating_point() else votes.to(torch.int64)
    w = weight.to(v.dtype)
    return torch.where((w * v > 0) | (w == 0), v * w.abs().clamp_min(1), 0)


def dot_dtype(device: torch.device) -> torch.dtype:
    """Operand type of the spectral rule's products: fp16 on a GPU; on a CPU bf16 if it multiplies that, else fp32."""
    if device.type == "cuda":
        return torch.float16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def orthogonalise(x: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Singular values of each matrix to about one: float32 (..., n, m) to float32, zeros to zeros.

    Operands are `dtype`, sums inside a product fp32. The last step adds its two terms in fp32,
    so that scores seldom tie.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT, dtype).mT
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    # In fp64, rounded once: the sum then does not depend on the order in which a kernel's layout takes it.
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).to(torch.float32)
    x = (x / norm.clamp_min(TINY)).to(dtype)
    a, b, c = NEWTON_SCHULZ
    for step in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if step == NEWTON_SCHULZ_STEPS - 1:
            return (torch.bmm(polynomial, x).float() + a * x.float()).view(shape)
        x = torch.baddbmm(x, polynomial, x, beta=a)


def score(rule: str, votes: Tensor, weight: Tensor, ortho_tile: int) -> Tensor:
    """Signed scores of a stack of matrices: integers for gain and contribution of integer votes, else float32.

    votes integer or float32 (L, out, in), weight int8 (L, out, in); ortho_tile is the side of spectral's tiles, 0 for
    whole matrices. Returns (L, out, in). Raises ValueError for an unknown rule.
    """
    if rule == "gain":
        return gain(votes)
    if rule == "contribution":
        return contribution(votes, weight)
    if rule == "balanced":
        return balanced(votes)
    if rule != "spectral":
        raise ValueError(f"score: got rule {rule!r}; known are {', '.join(RULES)}")
    if on_triton(votes) and not unorthogonalised_reason(ortho_tile, capability_of(votes)):
        return orthogonalise_tiles(votes, ortho_tile)
    dtype = dot_dtype(votes.device)
    if ortho_tile == 0:
        return orthogonalise(votes.to(torch.float32), dtype)
    return _from_tiles(orthogonalise(_to_float_tiles(votes, ortho_tile), dtype), tuple(votes.shape[1:]))


def unorthogonalised_reason(ortho_tile: int, capability: tuple[int, int] = (9, 0)) -> str:
    """Why no kernel orthogonalises such tiles, "" if one does; torch does it otherwise."""
    if ortho_tile not in ORTHO_TILES:
        return f"ortho_tile is {ortho_tile}; kernels orthogonalise tiles of {', '.join(map(str, ORTHO_TILES))}"
    if ortho_tile == 128 and capability[0] != 9:
        return f"this GPU is sm_{capability[0]}{capability[1]}; products of 128 x 128 fit into registers on sm_90 alone"
    if capability[0] > 9 and OLD_COMPILER:
        return f"triton {triton.__version__} cannot compile its products for sm_{capability[0]}{capability[1]}; 3.8 can"
    return ""


@fused(dynamic=False)
def _to_float_tiles(votes: Tensor, side: int) -> Tensor:
    return to_tiles(votes.to(torch.float32), side)


@fused(dynamic=False)
def _from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    return from_tiles(tiles, shape).contiguous()


# The kernel


@jit
def quotient(x, divisor):
    """x / divisor, rounded once: float32 numbers x and one divisor that is at least 1e-20 and at least |x|.

    The steps are those of a GPU's division, which forms the inverse of each divisor anew and branches to look for
    numbers near the ends of float32. Of such x, below 1e-30, the last bit may differ, which fp16 does not see.
    """
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), divisor)
    q = x * inverse
    q = tl.fma(tl.fma(-q, divisor, x), inverse, q)
    return tl.fma(tl.fma(-q, divisor, x), inverse, q)


@jit
def orthogonalise_tile(v):
    """`orthogonalise` of one square tile in registers, rounded to fp16 where torch's is: float32 (n, n) to float32.

    `TINY`, `NEWTON_SCHULZ` and all `NEWTON_SCHULZ_STEPS` but the last, which ends in fp32, are written out here.
    """
    wide = v.to(tl.float64)
    norm = tl.sqrt(tl.sum(wide * wide)).to(tl.float32)
    x = quotient(v, tl.maximum(norm, 1e-20)).to(tl.float16)
    for _ in range(4):
        gram = tl.dot(x, tl.trans(x)).to(tl.float16)
        polynomial = (tl.dot(gram, gram) * 2.0315 + gram.to(tl.float32) * -4.775).to(tl.float16)
        x = (tl.dot(polynomial, x) + x.to(tl.float32) * 3.4445).to(tl.float16)
    gram = tl.dot(x, tl.trans(x)).to(tl.float16)
    polynomial = (tl.dot(gram, gram) * 2.0315 + gram.to(tl.float32) * -4.775).to(tl.float16)
    return tl.dot(polynomial, x).to(tl.float16).to(tl.float32) + x.to(tl.float32) * 3.4445


@jit
def contribution_tile(v, w):
    """`contribution` in registers: int64 of integer votes, float32 of float votes."""
    if v.dtype == tl.float32:
        wide = w.to(tl.float32)
    else:
        v = v.to(tl.int64)
        wide = w.to(tl.int64)
    return tl.where((wide * v > 0) | (w == 0), v * tl.where(w == 0, 1, tl.abs(w.to(tl.int32))).to(v.dtype), 0)


@jit
def score_block(v, weight, inside, RULE: tl.constexpr):
    """Scores of a block (M, N) of votes in a kernel: the rule is "gain", "contribution" or "spectral" (M = N).

    weight and inside: pointers and mask of the block's weights, read by the rule that looks at them.
    """
    if RULE == "spectral":
        s = orthogonalise_tile(v.to(tl.float32))
    elif RULE == "contribution":
        s = contribution_tile(v, tl.load(weight, mask=inside, other=0))
    else:
        s = v
    return s


@jit
def _orthogonalise_kernel(votes, scores, out, inner, SIDE: tl.constexpr):
    """One tile of one matrix of the stack."""
    across = tl.cdiv(inner, SIDE)
    row, column = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    down, right = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    inside = (down < out - row) & (right < inner - column)
    offsets = (tl.program_id(1).to(tl.int64) * out + row) * inner + column + down * inner + right
    v = tl.load(votes + offsets, mask=inside, other=0)
    tl.store(scores + offsets, orthogonalise_tile(v.to(tl.float32)), mask=inside)


def orthogonalise_tiles(votes: Tensor, side: int) -> Tensor:
    """`orthogonalise` of the tiles of a stack by the kernel: votes of any type (L, out, in) to float32."""
    count, out, inner = votes.shape
    scores = torch.empty(votes.shape, dtype=torch.float32, device=votes.device)
    _orthogonalise_kernel[(triton.cdiv(out, side) * triton.cdiv(inner, side), count)](
        votes=votes.contiguous(),
        scores=scores,
        out=out,
        inner=inner,
        SIDE=side,
        enable_fp_fusion=False,
        num_warps=8,
        num_stages=1,
    )
    return scores


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check scores` compiles: votes, and evidence, which is float32."""
    signature = {"votes": "*i32", "scores": "*fp32", "out": "i32", "inner": "i32"}
    return [
        LaunchConfig(
            f"orthogonalise {type_} {side}x{side}", _orthogonalise_kernel, signature | {"votes": f"*{type_}"},
            {"SIDE": side, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}, ("fp16",),
            (90,) if side == 128 else (80, 90, 100), spills=8 * (side == 128),
        )
        for type_, side in (("i32", 64), ("fp32", 128), ("i32", 128))
    ]  # fmt: skip
