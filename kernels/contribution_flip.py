"""The whole learning step of a layer: int8 operands in, int8 weights changed in place.

    V = D^T X  ->  (memory)  ->  scores S  ->  top-k of legal moves in every tile  ->  W

The reference is the composition of the kernels it fuses, so the fused path and the two-kernel path (votes, then `flip`)
share one selection and agree exactly. Memory of a fused kernel: T*(in + out) + 2*out*in bytes, and twice out*in more
with the vote memory; votes and scores need none. 2*T*in*out int8 operations, and for spectral 15 fp16 products of an
ortho_tile: 30*ortho_tile*out*in.

A program owns a block of whole tiles, sums its votes over all tokens in registers and lets `flip.learn_block` do the
rest there. Both operands come with their tokens contiguous (`along_tokens`; the quantizers write them so), as int8
tensor cores want them. Blocks of several matrices, of different sizes and batches, go into one launch (groups.py).
`learn_step` chooses between this and the two-kernel path.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Shipped, on_triton, tl, triton
from kernels.contribution import votes
from kernels.flip import SELECT_TILES, fixed_point, flip, learn_block
from kernels.groups import FIELDS, NUMBERS, find_matrix, launch, learning_kernel, of_one_type, signed
from kernels.int8_matmul import MAX_REDUCTION
from kernels.memory import MEMORY_TILE, remember_
from kernels.philox import Stream, dither_words
from kernels.scores import score


def contribution_flip_torch(
    d: Tensor, x: Tensor, weight: Tensor, top_words: Tensor, *, rule: str, bits: int, k: float, step_size: int = 1,
    ortho_tile: int = 128, select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
    memory: tuple[Tensor, Tensor] | None = None, beta: float = 0.9, words: tuple[Tensor, Tensor] | None = None,
) -> int:  # fmt: skip
    """`contribution_flip` from the kernels it fuses, each of which has a version in torch."""
    v = votes(d, x)
    if memory is not None:
        v = remember_(*memory, v, beta, *words)
    s = score(rule, [v], [weight], ortho_tile)
    chosen = {"bits": bits, "k": k, "step_size": step_size, "select_tile": select_tile, "draws": draws, "gamma": gamma}
    return flip([weight], s, top_words, **chosen)[0]


@learning_kernel
def _contribution_flip_kernel(
    table, flips, matrices, share, seed, step, stream, beta, q, unit, width,
    RULE: tl.constexpr, MEMORY: tl.constexpr, GIVEN: tl.constexpr, SELECT: tl.constexpr,
    MATRICES: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tl.static_assert(K >= 32)  # int8 products need that many
    _, row, top, left = find_matrix(table, matrices, MATRICES, FIELDS, M, N)
    out, inner, tokens = tl.load(row + 1), tl.load(row + 2), tl.load(row + 15).to(tl.int32)
    d_stride, x_stride = tl.multiple_of(tl.load(row + 9), 16), tl.multiple_of(tl.load(row + 11), 16)
    d = tl.multiple_of(tl.load(row + 8).to(tl.pointer_type(tl.int8)) + top * d_stride, 16)
    x = tl.multiple_of(tl.load(row + 10).to(tl.pointer_type(tl.int8)) + left * x_stride, 16)
    # Past the edge the last row is read again and its votes dropped below: a mask here would slow every load.
    d_row = tl.minimum(tl.arange(0, M), (out - top - 1).to(tl.int32))[:, None]
    x_row = tl.minimum(tl.arange(0, N), (inner - left - 1).to(tl.int32))[:, None]
    token = tl.arange(0, K)[None, :]
    d_at = d + d_row * d_stride.to(tl.int32) + token
    x_at = x + x_row * x_stride.to(tl.int32) + token
    v = tl.zeros((M, N), tl.int32)
    for _ in range(tokens // K):
        v = tl.dot(tl.load(d_at), tl.trans(tl.load(x_at)), v, out_dtype=tl.int32)
        d_at += K
        x_at += K
    if tokens % K > 0:
        rest = token < tokens % K
        v = tl.dot(
            tl.load(d_at, mask=rest, other=0), tl.trans(tl.load(x_at, mask=rest, other=0)), v, out_dtype=tl.int32
        )
    inside = (tl.arange(0, M)[:, None] < out - top) & (tl.arange(0, N)[None, :] < inner - left)
    v = tl.where(inside, v, 0)
    learn_block(
        v, table, flips, matrices, share, seed, step, stream, beta, q, unit, width,
        RULE, MEMORY, GIVEN, SELECT, MATRICES, FIELDS,
    )  # fmt: skip


FUSED_RULES = ("gain", "contribution", "spectral")
ORTHO_TILES = (32, 64, 128)
OLD_COMPILER = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
SMALLEST_SHARE = 0.5  # of the GPU's processors that the programs of the fused kernel must fill


@dataclass(frozen=True)
class Matrix:
    """A weight that learns: int8 (out, in), the number of its layer (streams of the memory), its first tile in the
    random words of its group, and (stored, scale) of `memory.remember_` if votes are remembered."""

    weight: Tensor
    index: int = 0
    first_tile: int = 0
    memory: tuple[Tensor, Tensor] | None = None


def why_not(select_tile: int, flip_prob: str = "one") -> str:
    """Why `learn_step` cannot make these flips, "" if it can: for the caller to take the torch functions and say so."""
    if select_tile not in SELECT_TILES:
        return f"select_tile is {select_tile}; the kernels select in tiles of {', '.join(map(str, SELECT_TILES))}"
    if flip_prob != "one":
        return f"flip_prob is {flip_prob}; the kernels move every selected weight"
    return ""


def why_not_in_a_block(
    rule: str, ortho_tile: int, select_tile: int, memory: bool, capability: tuple[int, int] = (9, 0)
) -> str:  # fmt: skip
    """Why scores cannot be formed in the kernel that selects, "" if they can:
    if not, they go through memory, as float32."""
    if rule not in FUSED_RULES:
        return f"rule is {rule}; it looks at whole matrices"
    side = max(select_tile, MEMORY_TILE if memory else 0)
    if rule == "spectral" and (ortho_tile not in ORTHO_TILES or ortho_tile < side):
        return f"ortho_tile is {ortho_tile}; a block of {', '.join(map(str, ORTHO_TILES))} must hold tiles of {side}"
    if rule == "spectral" and ortho_tile == 128 and capability[0] != 9:
        return (
            f"this GPU is sm_{capability[0]}{capability[1]}; only on sm_90 products of 128 x 128 fit into registers, "
            "64 x 64 do on all"
        )
    if rule == "spectral" and capability[0] > 9 and OLD_COMPILER:
        return f"triton {triton.__version__} cannot compile its products for sm_{capability[0]}{capability[1]}; 3.8 can"
    return ""


def along_tokens(operand: Tensor) -> Tensor:
    """The operand (T, n) with its columns contiguous on 16-byte boundaries:
    itself if they are, as the quantizers write them."""
    tokens, n = operand.shape
    contiguous = operand.stride(0) == 1 and operand.stride(1) >= tokens
    if contiguous and operand.stride(1) % 16 == 0 and operand.data_ptr() % 16 == 0:
        return operand
    columns = torch.empty((n, -(-tokens // 16) * 16), dtype=torch.int8, device=operand.device)
    columns[:, :tokens] = operand.t()
    return columns.t()[:tokens]


def fused_block(rule: str, ortho_tile: int, select_tile: int) -> tuple[int, int]:
    """Rows and columns of the block a program of the fused kernel owns."""
    if rule == "spectral":
        return ortho_tile, ortho_tile
    return (max(64, select_tile), 128) if rule == "contribution" else (128, 128)


FUSED_K = 128  # tokens of one step through the operands


def fused_launch(block: tuple[int, int]) -> tuple[int, int]:
    """Warps and pipeline stages of the fused kernel."""
    return (8, 3) if block[1] == 128 else (4, 4)


@torch.library.custom_op("nanogft::contribution_flip", mutates_args=("weights", "stored", "scales"))
def _contribution_flip(
    weights: list[Tensor], stored: list[Tensor], scales: list[Tensor], d: list[Tensor], x: list[Tensor],
    words: list[Tensor], numbers: list[int], firsts: list[int], settings: list[int], rule: str, ortho_tile: int,
    select_tile: int, beta: float,
) -> Tensor:  # fmt: skip
    left, right = [along_tokens(t) for t in d], [along_tokens(t) for t in x]
    operands = [
        (a.data_ptr(), a.stride(1), b.data_ptr(), b.stride(1), len(a)) for a, b in zip(left, right, strict=True)
    ]
    block = fused_block(rule, ortho_tile, select_tile)
    warps, stages = fused_launch(block)
    constants = {"RULE": rule, "SELECT": select_tile, "K": FUSED_K}
    return launch(
        _contribution_flip_kernel, constants, {"num_warps": warps, "num_stages": stages}, block,
        weights, stored, scales, operands, words, numbers, firsts, tuple(settings), beta,
    )  # fmt: skip


@_contribution_flip.register_fake
def _(weights, stored, scales, d, x, words, numbers, firsts, settings, rule, ortho_tile, select_tile, beta):
    return weights[0].new_empty(len(weights), dtype=torch.int64)


def _check(matrices: Sequence[Matrix], operands: Sequence[Tensor | tuple[Tensor, Tensor]], bits: int, k: float) -> None:
    if len(matrices) != len(operands) or not matrices:
        raise ValueError(
            f"learn_step: got {len(matrices)} matrices and {len(operands)} votes; give one for each, at least one"
        )
    if not 1 <= bits <= 8 or not 0 <= k <= 1:
        raise ValueError(f"learn_step: got bits {bits} and k {k}; bits go from 1 to 8, k from 0 to 1")
    for matrix, given in zip(matrices, operands, strict=True):
        shape = tuple(matrix.weight.shape)
        if matrix.weight.dtype != torch.int8 or len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"learn_step: got a weight {matrix.weight.dtype} {shape}; it must be int8 (out, in), not empty"
            )
        if (matrix.memory is None) != (matrices[0].memory is None):
            raise ValueError("learn_step: some matrices have a memory and some have none; call it for each kind")
        if isinstance(given, Tensor):
            if tuple(given.shape) != shape:
                raise ValueError(f"learn_step: got votes {tuple(given.shape)} for a weight {shape}; they must agree")
            continue
        d, x = given
        if d.dtype != torch.int8 or x.dtype != torch.int8:
            raise ValueError(f"learn_step: got D of {d.dtype} and X of {x.dtype}; operands of votes must be int8")
        if d.dim() != 2 or x.dim() != 2 or len(d) != len(x) or (d.shape[1], x.shape[1]) != shape:
            raise ValueError(
                f"learn_step: got D {tuple(d.shape)} and X {tuple(x.shape)}; "
                f"a weight {shape} needs (T, out) and (T, in)"
            )
        if len(d) == 0:
            raise ValueError("learn_step: got an empty batch; votes need at least one token")


def _fills(matrices: Sequence[Matrix], block: tuple[int, int]) -> bool:
    """Whether the fused kernel has enough programs; if not, votes are summed in parts by more of them,
    then flipped."""
    device = matrices[0].weight.device
    if device.type != "cuda":
        return True
    grids = [-(-m.weight.shape[0] // block[0]) * -(-m.weight.shape[1] // block[1]) for m in matrices]
    return sum(grids) >= SMALLEST_SHARE * torch.cuda.get_device_properties(device).multi_processor_count


def learn_step(
    matrices: Sequence[Matrix], operands: Sequence[Tensor | tuple[Tensor, Tensor]], *, rule: str, bits: int,
    k: float, step_size: int = 1, ortho_tile: int = 128, select_tile: int = 64, seed: int = 0, step: int = 0,
    index: int = 0, beta: float = 0.9, words: tuple[Tensor, ...] = (), fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """One step of a group of matrices that learn by one rule at one width, in as few launches as can be.

    operands are, for each matrix, the pair D int8 (T, out), X int8 (T, in), or votes int32 or int64 (out, in), or for
    ready scores float32 under rule "gain". index is that of the group's first layer, whose stream rounds m. Weights and
    memories are changed in place. Random words are drawn in the kernels, or for a single matrix given: dither words of
    rows and columns, top-k words. fused None decides by the number of tiles. Returns the flips of each matrix, int64
    (matrices,) on the device, without waiting for it. Raises ValueError on shapes or types that do not agree and for
    what `why_not` names.
    """
    _check(matrices, operands, bits, k)
    if problem := why_not(select_tile):
        raise ValueError(f"learn_step: {problem}; use kernels.scores and kernels.flip")
    weights = [m.weight for m in matrices]
    kept = [m.memory for m in matrices if m.memory is not None]
    stored, scales = [memory for memory, _ in kept], [scale for _, scale in kept]
    numbers, firsts = [m.index for m in matrices], [m.first_tile for m in matrices]
    settings = [fixed_point(k), signed(seed), step, Stream.TOPK + 16 * index, bits, step_size]
    given = [w.to(weights[0].device) for w in words]
    capability = torch.cuda.get_device_capability(weights[0].device) if weights[0].is_cuda else (9, 0)
    in_a_block = not why_not_in_a_block(rule, ortho_tile, select_tile, bool(kept), capability)
    pairs = all(not isinstance(o, Tensor) and len(o[0]) <= MAX_REDUCTION for o in operands)
    if fused is None:
        fused = pairs and in_a_block and _fills(matrices, fused_block(rule, ortho_tile, select_tile))
    if fused:
        if not (pairs and in_a_block):
            raise ValueError(
                "learn_step: the fused kernel takes pairs of operands of at most "
                f"{MAX_REDUCTION} tokens and rules within a block; leave `fused` out"
            )
        flips = torch.ops.nanogft.contribution_flip(
            weights, stored, scales, [d for d, _ in operands], [x for _, x in operands], given, numbers, firsts,
            settings, rule, ortho_tile, select_tile, beta,
        )  # fmt: skip
    else:
        formed = [o if isinstance(o, Tensor) else votes(*o) for o in operands]
        if not in_a_block:
            if kept:
                formed = [_remembered(m, v, seed, step, beta, given) for m, v in zip(matrices, formed, strict=True)]
            formed, rule, stored, scales = score(rule, formed, weights, ortho_tile), "gain", [], []
        flips = torch.ops.nanogft.flip(
            weights, stored, scales, of_one_type(formed), given, numbers, firsts,
            settings, rule, ortho_tile, select_tile, beta,
        )  # fmt: skip
    return flips


def _remembered(matrix: Matrix, v: Tensor, seed: int, step: int, beta: float, given: list[Tensor]) -> Tensor:
    stored, scale = matrix.memory
    streams = (Stream.MEMORY_ROWS + 16 * matrix.index, Stream.MEMORY_COLUMNS + 16 * matrix.index)
    n = scale.numel() * MEMORY_TILE
    rows, columns = given[:2] or [dither_words(seed, step, s, n, device=v.device) for s in streams]
    return remember_(stored, scale, v, beta, rows, columns)


def contribution_flip(
    d: Tensor, x: Tensor, weight: Tensor, top_words: Tensor, *, rule: str, bits: int, k: float, step_size: int = 1,
    ortho_tile: int = 128, select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
    memory: tuple[Tensor, Tensor] | None = None, beta: float = 0.9, words: tuple[Tensor, Tensor] | None = None,
) -> int:  # fmt: skip
    """Learn from one batch: d int8 (T, out), x int8 (T, in), weight int8 (out, in), changed in place.

    top_words (flip's words), draws, k, step_size, select_tile and gamma as in `flip.flip`; rule and ortho_tile as in
    `scores.score`; memory is (stored, scale) of `memory.remember_`, changed in place, and words its dither words.
    Returns the number of flips.
    """
    settings = {"rule": rule, "bits": bits, "k": k, "step_size": step_size, "ortho_tile": ortho_tile, "beta": beta}
    if on_triton(weight) and draws is None and not why_not(select_tile):
        given = (*(words or (top_words, top_words)), top_words)
        matrix = Matrix(weight, memory=memory)
        return int(learn_step([matrix], [(d, x)], select_tile=select_tile, words=given, **settings))
    return contribution_flip_torch(
        d, x, weight, top_words, select_tile=select_tile, draws=draws, gamma=gamma, memory=memory, words=words,
        **settings,
    )  # fmt: skip


def shipped() -> list[Shipped]:
    """What `python -m kernels.check contribution_flip` compiles: the rules, with and without memory, at each block."""
    found, signature = [], {"table": "*i64", "flips": "*i64", **NUMBERS}
    for rule, ortho_tile, memory in itertools.product(FUSED_RULES, (64, 128), (False, True)):
        if rule != "spectral" and ortho_tile == 64:
            continue
        M, N = fused_block(rule, ortho_tile, 64)
        warps, stages = fused_launch((M, N))
        constants = {
            "RULE": rule, "MEMORY": memory, "GIVEN": False, "SELECT": 64, "MATRICES": 16, "FIELDS": FIELDS,
            "M": M, "N": N, "K": FUSED_K,
        }  # fmt: skip
        name = f"contribution_flip {rule} {M}x{N}{' memory' if memory else ''}"
        instructions = ("int8", "fp16") if rule == "spectral" else ("int8",)
        where = (90,) if rule == "spectral" and M == 128 else (80, 90, 100)
        found.append(Shipped(name, _contribution_flip_kernel, signature, constants, warps, stages, instructions, where))
    return found
