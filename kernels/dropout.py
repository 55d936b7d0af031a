"""Dropout whose mask is a function of (seed, step, row, column) and is kept nowhere.

    y[t, c] = x[t, c] / (1 - p) where u[t, c // group] >= p, else 0

u in [0, 1) is `philox.dither` of one word for the row and one for the column: word rng[2] + t of stream DROPOUT_ROWS,
word first_column + c // group of stream DROPOUT_COLUMNS, of Philox(seed = rng[0], step = rng[1]). With a `group` of
more than one column, those columns are kept or dropped together. The backward pass makes the same mask again.

Any two elements are independent over steps, but within one step a row's mask is a pattern that all rows share, shifted
by the row's word. For rounding that is all that counts; for dropout, the losses in LOG.md were measured with it.

Memory, for x of b bytes an element: b T n read, b T n written; 6 operations an element, and 100 for each row and column
of a program's block.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, mul_rn, on_triton, operator, tl, wrap_triton
from kernels.fuse import fused
from kernels.measure_delta import block_of, grid_of, largest_of, with_largest
from kernels.philox import Stream, check_rng, dither, dither_at, dither_word, noise_torch
from kernels.rmsnorm_quantize import FLOATS, check_rows

BLOCK = {"ROWS": 32, "COLUMNS": 256, "num_warps": 8}


# The torch reference


@fused
def _dropped(x: Tensor, row_noise: Tensor, col_noise: Tensor, p: float, group: int) -> Tensor:
    keep = dither(row_noise, col_noise) >= p
    return torch.where(keep.repeat_interleave(group, dim=1), x.to(torch.float32) * (1 / (1 - p)), 0.0).to(x.dtype)


def dropout_torch(x: Tensor, p: float, rng: Tensor, first_column: int, group: int) -> Tensor:
    """`dropped` in torch."""
    rows, columns = x.shape[0], x.shape[1] // group
    noise = noise_torch(rng, rows, first_column, columns, Stream.DROPOUT_ROWS, Stream.DROPOUT_COLUMNS)
    row_noise, col_noise = noise.split((rows, columns))
    return _dropped(x, row_noise[:, None], col_noise, p, group)


# The kernel


@jit
def _dropout_kernel(
    x, out, largest, rng, rows, columns, x_row, x_column, first_column, p, factor, GROUP: tl.constexpr,
    ROW_STREAM: tl.constexpr, COLUMN_STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements, and the largest of what is written."""
    row, column, mask = block_of(rows, columns, ROWS, COLUMNS)
    value = tl.load(x + row * x_row + column * x_column, mask=mask, other=0.0).to(tl.float32)
    seed, step, rows_seen = tl.load(rng), tl.load(rng + 1), tl.load(rng + 2)
    row_noise = dither_word(seed, step, ROW_STREAM, rows_seen + row)
    col_noise = dither_word(seed, step, COLUMN_STREAM, first_column + column // GROUP)
    keep = dither_at(row_noise, col_noise) >= p
    y = tl.where(keep, mul_rn(value, tl.zeros_like(value) + factor), 0.0).to(out.dtype.element_ty)
    tl.store(out + row * columns + column, y, mask=mask)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + part, largest_of(tl.where(mask, y.to(tl.float32), 0.0)))


# Launching


@operator("dropout")
def _dropout(x: Tensor, p: float, rng: Tensor, first_column: int, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    grid = grid_of(rows, columns, BLOCK)
    largest = torch.empty((grid[0] * grid[1],), dtype=torch.float32, device=x.device)
    wrap_triton(_dropout_kernel)[grid](
        x=x,
        out=out,
        largest=largest,
        rng=rng,
        rows=rows,
        columns=columns,
        x_row=x.stride(0),
        x_column=x.stride(1),
        first_column=first_column,
        p=p,
        factor=1 / (1 - p),
        GROUP=group,
        ROW_STREAM=Stream.DROPOUT_ROWS,
        COLUMN_STREAM=Stream.DROPOUT_COLUMNS,
        **BLOCK,
    )
    return out, largest


def dropped(x: Tensor, p: float, rng: Tensor, first_column: int = 0, group: int = 1) -> Tensor:
    """x with a share p of its elements, or of its groups of columns, 0 and the others divided by 1 - p.

    x float (T, n) of any stride; p in [0, 1); rng int64 (3,) = [seed, step, row of the step that x begins with]; n a
    multiple of `group`. Returns (T, n) of x's type, on the Triton backend with its largest value noted
    (`with_largest`). Raises ValueError on other shapes, types or p.
    """
    check_rows("dropout", x)
    if not 0 <= p < 1 or x.shape[1] % group:
        raise ValueError(f"dropout: got p {p} and groups of {group} columns for x {tuple(x.shape)}; p is at least 0 "
                         "and below 1, and columns are whole groups")  # fmt: skip
    check_rng("dropout", rng)
    if not on_triton(x):
        return dropout_torch(x, p, rng, first_column, group)
    return with_largest(*_dropout(x, p, rng, first_column, group))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, rng, first_column, group):
        ctx.save_for_backward(rng)
        ctx.setting = first_column, group
        ctx.p = p
        return dropped(x, p, rng, first_column, group)

    @staticmethod
    def backward(ctx, delta):
        (rng,) = ctx.saved_tensors
        return dropped(delta, ctx.p, rng, *ctx.setting), None, None, None, None


def dropout(x: Tensor, p: float, rng: Tensor, first_column: int = 0, group: int = 1) -> Tensor:
    """`dropped` of x (T, n), with the backward pass of a product by the mask. rng must not change before that."""
    return _Dropout.apply(x, p, rng, first_column, group)


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check dropout` compiles."""
    constants = {"x_column": 1, "GROUP": 1, "ROW_STREAM": Stream.DROPOUT_ROWS, "COLUMN_STREAM": Stream.DROPOUT_COLUMNS}
    constants |= BLOCK
    found = []
    for float_ in FLOATS.values():
        signature = {"x": f"*{float_}", "out": f"*{float_}", "largest": "*fp32", "rng": "*i64"}
        signature |= dict.fromkeys(("rows", "columns", "x_row", "first_column"), "i32")
        signature |= {"p": "fp32", "factor": "fp32"}
        found.append(LaunchConfig(f"dropout {float_}", _dropout_kernel, signature, constants, exact=True))
    return found
