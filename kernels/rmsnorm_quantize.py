"""Rows to int8: RMSNorm without a learned gain, then a fixed grid.

    x^ = x / rms(x),  rms over a row          X = clip(round(x^ * 127 / A), -127, 127)

Rounding is to nearest, halves to even. With `squared_relu` the norm is taken of relu(x)^2, so an MLP's hidden layer is
read once. A row of zeros has x^ = 0 and 1 / rms = 0: no delta passes it. A row with a NaN, an infinity or numbers whose
squares overflow has 1 / rms = NaN, which `int8_matmul` and the backward pass hand on: int8 could not say it.

Memory, for x of b bytes an element: b T n bytes read, T n + 4 T written; about 10 operations an element, two of them
fp64. A program holds whole rows in its registers, so x is read once; that limits a row to `MAX_COLUMNS`.

Votes read X by columns on a GPU (kernels/transpose.py), so `rmsnorm_quantize_twice` writes it that way too: T n more.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, operator, tl, triton, wrap_triton
from kernels.fuse import fused

SMALLEST_MEAN_SQUARE = 1e-30  # below this a row counts as zeros, which have no direction to normalise
MAX_COLUMNS = 16384  # the longest row a program of 16 warps holds in its registers
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# The torch reference


def row_mean(products: Tensor) -> Tensor:
    """Mean of each row, float32 (T, n) to (T, 1), summed in fp64: rounded to fp32, it no longer depends on the order.

    So the reference, the interpreter and a GPU find the same number, but for one row in some hundred million. Compiled
    for a CPU, fp32 sums in the compiler's order take its place: they save a twentieth of a step.
    """
    if torch.compiler.is_compiling() and not products.is_cuda:
        return products.mean(dim=-1, keepdim=True)
    return products.to(torch.float64).mean(dim=-1, keepdim=True).to(torch.float32)


@fused
def rmsnorm_quantize_torch(x: Tensor, act_range: float, squared_relu: bool = False) -> tuple[Tensor, Tensor]:
    """`rmsnorm_quantize` in torch."""
    x = x.to(torch.float32)
    if squared_relu:
        x = torch.relu(x).square_()
    mean_square = row_mean(x * x)
    # By way of fp64: torch's own fp32 square root on a CPU is not always the nearest number, the GPU's is.
    rms = torch.sqrt(mean_square.to(torch.float64)).to(torch.float32)
    inv_rms = torch.where(mean_square > SMALLEST_MEAN_SQUARE, rms.reciprocal(), 0.0)
    inv_rms = inv_rms + (mean_square - mean_square)  # NaN where the mean is not finite
    # In place where a pass over memory costs more than the arithmetic, here and in the other references.
    rounded = (x * inv_rms).mul_(127.0 / act_range).round_()
    return rounded.clamp_(-127, 127).to(torch.int8), inv_rms


# The kernel


@jit
def mean_of(sums, columns):
    """sums / columns in fp64, rounded to fp32: what `row_mean` does."""
    return (sums / columns).to(tl.float32)


@jit
def reciprocal(x, smallest: tl.constexpr):
    """1 / x, rounded to nearest, where x > smallest, else 0: float32, at least one dimension."""
    safe = tl.where(x > smallest, x, 1.0)
    return tl.where(x > smallest, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), safe), 0.0)


@jit
def _nearest(v):
    """round(v) clipped to [-127, 127], halves to even: int8.

    Adding 1.5 * 2^23 leaves the integer in the last bits of the mantissa, in two's complement.
    """
    return (tl.minimum(tl.maximum(v, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def _load(pointers, mask, SQUARED_RELU: tl.constexpr):
    """What is normalised, float32."""
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if SQUARED_RELU:
        value = tl.where(value < 0.0, 0.0, value)  # tl.maximum makes 0 of a NaN
        value = value * value
    return value


@jit
def _inverse_rms(mean_square):
    """1 / rms of rows: 0 for zeros, NaN for what is not finite."""
    inverse = reciprocal(tl.sqrt_rn(tl.where(mean_square > 1e-30, mean_square, 0.0)), 0.0)
    return tl.where(mean_square < float("inf"), inverse, float("nan"))


@jit
def _rmsnorm_quantize_kernel(
    x, x_int8, inv_rms, rows, columns, x_row, x_column, steps,
    SQUARED_RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; steps = 127 / A."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    pointers = x + row[:, None] * x_row + column.to(tl.int64) * x_column
    value = _load(pointers, mask, SQUARED_RELU)
    inverse = _inverse_rms(mean_of(tl.sum((value * value).to(tl.float64), axis=1), columns))
    tl.store(inv_rms + row, inverse, mask=row < rows)
    nearest = _nearest(value * inverse[:, None] * tl.cast(steps, tl.float32))
    tl.store(x_int8 + row[:, None] * columns + column, nearest, mask=mask)


@jit
def _rmsnorm_quantize_twice_kernel(
    x, x_int8, x_turned, inv_rms, rows, columns, x_row, x_column, steps,
    SQUARED_RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same by rows and by columns. ROWS of 32 make pieces of columns as long as memory transfers, and are too many
    for registers: it goes along them twice, COLUMNS at a time, first to sum, then to round what the cache still has.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, COLUMNS // 8), tl.float64)  # a thread's own, so that threads need not meet in the loop
    for start in tl.range(0, columns, COLUMNS, loop_unroll_factor=2):  # with the loads of two blocks under way
        column = start + tl.arange(0, COLUMNS)[None, :]
        pointers = x + row * x_row + column.to(tl.int64) * x_column
        value = _load(pointers, (row < rows) & (column < columns), SQUARED_RELU)
        sums += tl.sum(tl.reshape((value * value).to(tl.float64), (ROWS, COLUMNS // 8, 8)), axis=2)
    inverse = _inverse_rms(mean_of(tl.sum(sums, axis=1, keep_dims=True), columns))
    tl.store(inv_rms + row, inverse, mask=row < rows)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < columns)
        pointers = x + row * x_row + column.to(tl.int64) * x_column
        value = _load(pointers, mask, SQUARED_RELU)
        nearest = _nearest(value * inverse * tl.cast(steps, tl.float32))
        tl.store(x_int8 + row * columns + column, nearest, mask=mask)
        turned = x_turned + tl.trans(column).to(tl.int64) * rows + tl.trans(row)
        tl.store(turned, tl.trans(nearest), mask=tl.trans(mask))


# Launching


def row_blocks(columns: int) -> dict[str, int]:
    """ROWS, COLUMNS and num_warps: short rows share a program of 4 warps, long ones have a warp for 1,024 elements."""
    width = max(triton.next_power_of_2(int(columns)), 32)
    rows = max(1, 2048 // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": max(4, rows * width // 1024)}


def twice_blocks(columns: int) -> dict[str, int]:
    """The same where X is written by columns too: 16 elements a thread, so that a processor holds 1,024 threads."""
    width = 128 if columns <= 512 else 256
    return {"ROWS": 32, "COLUMNS": width, "num_warps": width // 16}


def _arguments(x: Tensor, act_range: float, squared_relu: bool) -> dict[str, Any]:
    """What both kernels take, with memory for X and 1 / rms."""
    rows, columns = x.shape
    return {
        "x": x,
        "x_int8": torch.empty((rows, columns), dtype=torch.int8, device=x.device),
        "inv_rms": torch.empty((rows, 1), dtype=torch.float32, device=x.device),
        "rows": rows,
        "columns": columns,
        "x_row": x.stride(0),
        "x_column": x.stride(1),
        "steps": 127.0 / act_range,
        "SQUARED_RELU": squared_relu,
    }


@operator("rmsnorm_quantize")
def _rmsnorm_quantize(x: Tensor, act_range: float, squared_relu: bool) -> tuple[Tensor, Tensor]:
    arguments = _arguments(x, act_range, squared_relu)
    blocks = row_blocks(x.shape[1])
    wrap_triton(_rmsnorm_quantize_kernel)[(triton.cdiv(x.shape[0], blocks["ROWS"]),)](**arguments, **blocks)
    return arguments["x_int8"], arguments["inv_rms"]


@operator("rmsnorm_quantize_twice")
def _rmsnorm_quantize_twice(x: Tensor, act_range: float, squared_relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(x, act_range, squared_relu)
    turned = torch.empty((x.shape[1], x.shape[0]), dtype=torch.int8, device=x.device)
    blocks = twice_blocks(x.shape[1])
    wrap_triton(_rmsnorm_quantize_twice_kernel)[(triton.cdiv(x.shape[0], blocks["ROWS"]),)](
        x_turned=turned, **arguments, **blocks
    )
    return arguments["x_int8"], arguments["inv_rms"], turned


def check_rows(name: str, t: Tensor) -> None:
    """Raise ValueError unless t is a float matrix with at least one element."""
    if t.dim() != 2 or 0 in t.shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; it needs (T, n) with at least one row and one column")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name}: got {t.dtype}; it takes {', '.join(str(dtype) for dtype in FLOATS)}")


def check_width(name: str, t: Tensor) -> None:
    """Raise ValueError if a row of t is longer than a program can hold."""
    if t.shape[1] > MAX_COLUMNS:
        raise ValueError(
            f"{name}: got rows of {t.shape[1]}; the Triton kernel holds {MAX_COLUMNS}, use the torch backend"
        )


def rmsnorm_quantize(x: Tensor, act_range: float, squared_relu: bool = False) -> tuple[Tensor, Tensor]:
    """Normalise rows and put them on the int8 grid.

    x float32, float16 or bfloat16 (T, n) of any stride, act_range = A. Returns X int8 (T, n) and 1 / rms float32 (T,
    1), 0 for rows of zeros and NaN for rows that are not finite, whose X means nothing. Raises ValueError on another
    shape or type, an empty batch, or rows over `MAX_COLUMNS` on the Triton backend.
    """
    check_rows("rmsnorm_quantize", x)
    if not on_triton(x):
        return rmsnorm_quantize_torch(x, act_range, squared_relu)
    check_width("rmsnorm_quantize", x)
    return _rmsnorm_quantize(x, act_range, squared_relu)


def rmsnorm_quantize_twice(x: Tensor, act_range: float, squared_relu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`rmsnorm_quantize`, and the same X as `accumulate_votes` reads it fastest: on a GPU a copy by columns."""
    if not on_triton(x):
        x_int8, inv_rms = rmsnorm_quantize(x, act_range, squared_relu)
        return x_int8, inv_rms, x_int8
    check_rows("rmsnorm_quantize", x)
    check_width("rmsnorm_quantize", x)
    x_int8, inv_rms, turned = _rmsnorm_quantize_twice(x, act_range, squared_relu)
    return x_int8, inv_rms, turned.t()


def launch_configs() -> list[LaunchConfig]:
    """Row-contiguous inputs of each type, short and long rows, both activations, X once and twice."""
    found = []
    for dtype, columns, squared_relu in (
        (torch.float32, 384, False), (torch.float16, 768, False), (torch.bfloat16, 3072, True),
        (torch.float32, MAX_COLUMNS, True),
    ):  # fmt: skip
        float_ = FLOATS[dtype]
        signature = {
            "x": f"*{float_}", "x_int8": "*i8", "inv_rms": "*fp32", "rows": "i32", "columns": "i32", "x_row": "i32",
            "steps": "fp32",
        }  # fmt: skip
        name = f"rmsnorm_quantize {float_} {columns}{' squared_relu' * squared_relu}"
        for kernel, blocks, also, times in (
            (_rmsnorm_quantize_kernel, row_blocks(columns), {}, ""),
            (_rmsnorm_quantize_twice_kernel, twice_blocks(columns), {"x_turned": "*i8"}, " twice"),
        ):
            constants = {"x_column": 1, "SQUARED_RELU": squared_relu} | blocks
            found.append(LaunchConfig(name + times, kernel, signature | also, constants, exact=True))
    return found
