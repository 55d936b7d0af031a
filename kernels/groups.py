"""Many matrices, of different sizes, in one launch: the table on the device that says where everything lies.

`flip` and `contribution_flip` end in the same moves and start in the same way: `launch` writes a row of FIELDS
integers for each matrix (its blocks, sizes and addresses) and starts one program a block; in it `find_matrix` tells
which block of which matrix it owns, and `place_block` gives pointers to it. Blocks are whole tiles, so programs never
meet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.backend import jit, tl, triton

# What kernels read of each matrix, int64: the number of its first program, rows, columns, addresses of weight, layer
# index for the streams of the memory, addresses of memory and its scales, its first select tile in the group's stream,
# address of votes or D, its stride, address and stride of X, addresses of given words (rows, columns, top-k), tokens,
# strides of weight and memory.
FIELDS = 18
# Numbers that change from step to step; promises about them (":1" makes none) would compile the kernel again
# and again.
NUMBERS = {
    "matrices": "i32:1", "share": "i64:1", "seed": "i64:1", "step": "i32:1", "stream": "i32:1", "beta": "fp32",
    "q": "i32:1", "unit": "i32:1", "width": "i32:1",
}  # fmt: skip
_tables: dict[tuple, Tensor] = {}


@jit
def find_matrix(
    table, matrices, MATRICES: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Which block is this program's: the number of its matrix, that one's row of the table,
    the block's first row and column.

    Programs go down eight blocks before they go across one, so that those that run together share operands in L2. AGAIN
    has the compiler read it all anew instead of keeping it in registers until then.
    """
    program = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, MATRICES)
    firsts = tl.load(table + numbers * FIELDS, mask=numbers < matrices, other=2**62, volatile=AGAIN)
    own = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    row = table + own * FIELDS
    block = program - tl.load(row)
    down, across = tl.cdiv(tl.load(row + 1), M), tl.cdiv(tl.load(row + 2), N)
    band = block // (8 * across)
    height = tl.minimum(down - 8 * band, 8)
    inside = block - band * 8 * across
    return own, row, (8 * band + inside % height) * M, (inside // height) * N


@jit
def place_block(
    address, stride, DTYPE: tl.constexpr, out, inner, top, left, M: tl.constexpr, N: tl.constexpr
):
    """Pointers and mask of the block (M, N) at (top, left) of the matrix (out, inner) at an address.

    The launcher sees to it (`on_boundaries`) that addresses are multiples of 16 bytes, strides of 16 elements, and that
    rows are followed by zeros up to the next 16 columns. The mask lets those through, so that 16 weights are read at
    once.
    """
    base = tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + (top * stride + left), 16)
    stride = tl.multiple_of(stride.to(tl.int32), 16)
    down, across = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    width = tl.multiple_of(tl.minimum((inner + 15) // 16 * 16 - left, N).to(tl.int32), 16)
    inside = (down < tl.minimum(out - top, M).to(tl.int32)) & (across < width)
    return base + (down * stride + across), inside


def learning_kernel(function: Callable) -> Any:
    """A Triton kernel compiled once for all values of `NUMBERS`."""
    return function if triton is None else triton.jit(function, do_not_specialize=list(NUMBERS))


def limits(bits: int) -> tuple[int, int]:
    """Q, the largest weight of `bits` bits, and the unit of a move."""
    return (1, 2) if bits == 1 else (max(1, 2 ** (bits - 1) - 1), 1)


def signed(number: int) -> int:
    """The int64 with the low 64 bits of a number: kernels and operators take no wider integers."""
    number &= 2**64 - 1
    return number - 2**64 if number >> 63 else number


def of_one_type(votes: Sequence[Tensor]) -> list[Tensor]:
    """Votes of several matrices in the one type that holds them all: float32, else int64, else int32."""
    types = {v.dtype for v in votes}
    wide = torch.float32 if torch.float32 in types else torch.int64 if torch.int64 in types else torch.int32
    return [v.to(wide) for v in votes]


def on_boundaries(matrix: Tensor) -> Tensor:
    """The matrix (out, in) itself if its rows begin and end on 16-byte boundaries,
    else a copy with zeros up to the next."""
    rows, columns = matrix.shape
    contiguous = matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0
    if contiguous and columns % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    copy = torch.zeros((rows, -(-columns // 16) * 16), dtype=matrix.dtype, device=matrix.device)[:, :columns]
    return copy.copy_(matrix)


def table_of(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Rows of `FIELDS` integers on the device: int64. The last ones made are kept: a step's addresses seldom change."""
    key = (device, *rows)
    if key not in _tables:
        if len(_tables) >= 64:
            _tables.clear()
        _tables[key] = torch.tensor(rows, dtype=torch.int64).to(device)
    return _tables[key]


def launch(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], block: tuple[int, int],
    weights: Sequence[Tensor], stored: Sequence[Tensor], scales: Sequence[Tensor],
    operands: Sequence[tuple[int, ...]], words: Sequence[Tensor], numbers: Sequence[int], firsts: Sequence[int],
    settings: tuple[int, ...], beta: float,
) -> Tensor:  # fmt: skip
    """Start a learning kernel on every block of every matrix. Returns the flips of each, int64 (matrices,).

    operands are, for each matrix, (address of votes, stride) or (address of D, stride, address of X, stride, tokens);
    settings are (share, seed, step, stream, bits, step size); words, if any, are dither words of rows and columns and
    top-k words.
    """
    share, seed, step, stream, bits, step_size = settings
    own = [on_boundaries(w) for w in weights]
    kept = [on_boundaries(memory) for memory in stored]
    given = [t.data_ptr() for t in words] if words else [0, 0, 0]
    rows, programs = [], 0
    for i, w in enumerate(own):
        memory, scale, pitch = (kept[i].data_ptr(), scales[i].data_ptr(), kept[i].stride(0)) if kept else (0, 0, 0)
        left, d_stride, x, x_stride, tokens = (*operands[i], 0, 0, 0)[:5]
        rows.append(
            (programs, *w.shape, w.data_ptr(), numbers[i], memory, scale, firsts[i], left, d_stride, x, x_stride,
             *given, tokens, w.stride(0), pitch)
        )  # fmt: skip
        programs += triton.cdiv(w.shape[0], block[0]) * triton.cdiv(w.shape[1], block[1])
    device = weights[0].device
    flips = torch.zeros(len(weights), dtype=torch.int64, device=device)
    q, unit = limits(bits)
    kernel[(programs,)](
        table_of(rows, device), flips, len(weights), share, signed(seed), step, stream, beta, q, unit, unit * step_size,
        MEMORY=bool(stored), GIVEN=bool(words), MATRICES=triton.next_power_of_2(len(weights)), FIELDS=FIELDS,
        M=block[0], N=block[1], enable_fp_fusion=False, **constants, **options,
    )  # fmt: skip
    for theirs, ours in zip([*weights, *stored], own + kept, strict=True):
        if ours is not theirs:
            theirs.copy_(ours)
    return flips
