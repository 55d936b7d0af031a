"""Delta to int8 on one scale, rounded up or down at random.

    D = clip(floor(delta / (sigma t) + u), -L, L) t        sigma = max|delta| / (L 2^(8 - bits)),   L = 2^(bits - 1) - 1

With 8 bits L is 127 and t 1. With fewer, each `GROUP` values of a row share t, the smallest power of two from 1 to
2^(8 - bits) with which they fit: bits and a quarter of a bit each, kept in a byte, so that D is exact in int8 products.

u in [0, 1) is `philox.dither` of one word for the row and one for the column: word rng[2] + t of stream ROWS for row t,
word first_column + c of stream COLUMNS for column c, of Philox(seed = rng[0], step = rng[1]). They come as `noise`,
from `prepare_delta` (kernels/measure_delta.py) or `noise_from` (kernels/philox.py).

Memory, for delta of b bytes an element: b T n read, T n written; 10 operations an element. Votes read D by columns on
a GPU (kernels/transpose.py), so `quantize_delta_twice` writes it that way too.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, mul_rn, on_triton, operator, tl, wrap_triton
from kernels.fuse import fused
from kernels.measure_delta import BLOCK, block_of, grid_of
from kernels.philox import dither, dither_at
from kernels.rmsnorm_quantize import check_rows, reciprocal
from kernels.tiles import joined, parts_of

SMALLEST_SCALE = 1e-36  # a smaller sigma counts as zero; 1 / sigma would overflow
SQUARE = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}  # where D is written by columns too
GROUP = 32  # values of a row that share a power of two


# The torch references


def largest_of_bits(bits: int) -> int:
    """The largest |D|: 127 for 8 bits, 112 for 4."""
    return (2 ** (bits - 1) - 1) << (8 - bits)


def _powers(scaled: Tensor, bits: int) -> Tensor:
    """t of each value: float32 (T, n), for delta / sigma float32 (T, n)."""
    columns, limit = scaled.shape[1], 2 ** (bits - 1) - 1
    groups = torch.nn.functional.pad(scaled.abs(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP)).amax(dim=2)
    powers = torch.ones_like(groups)
    for shift in range(8 - bits):
        powers = torch.where(groups > limit << shift, 2.0 ** (shift + 1), powers)
    return powers.repeat_interleave(GROUP, dim=1)[:, :columns]


@fused
def quantize_delta_torch(
    delta: Tensor, sigma: Tensor, row_noise: Tensor, col_noise: Tensor, bits: int = 8
) -> Tensor:
    """`quantize_delta` in torch, from int32 noise (T, 1) and (n,)."""
    inverse = torch.where(sigma > SMALLEST_SCALE, 1.0 / sigma, 0.0)
    scaled, limit = delta.to(torch.float32) * inverse, 2 ** (bits - 1) - 1
    if bits == 8:
        return scaled.add_(dither(row_noise, col_noise)).floor_().clamp_(-limit, limit).to(torch.int8)
    powers = _powers(scaled, bits)
    rounded = (scaled / powers).add_(dither(row_noise, col_noise)).floor_()
    return rounded.clamp_(-limit, limit).mul_(powers).to(torch.int8)


# The kernels


@jit
def rounded_down(v, LIMIT: tl.constexpr):
    """floor(v) clipped to [-LIMIT, LIMIT], NaN to 0: int32. (On a GPU `tl.floor` takes subnormal numbers as 0.)"""
    v = tl.where(v == v, tl.minimum(tl.maximum(v, -1.0 * LIMIT), 1.0 * LIMIT), 0.0)
    q = v.to(tl.int32)
    return q - (v < q.to(tl.float32)).to(tl.int32)


@jit
def _quantize_delta_kernel(
    delta, sigma, noise, d_int8, d_turned, rows, columns, delta_row, delta_column, sigma_row, BITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements, by rows and, if there is a d_turned, to that by columns."""
    row, column, mask = block_of(rows, columns, ROWS, COLUMNS)
    value = tl.load(delta + row * delta_row + column * delta_column, mask=mask, other=0.0).to(tl.float32)
    inverse = reciprocal(tl.load(sigma + row * sigma_row, mask=row < rows, other=0.0), 1e-36)
    row_noise = tl.load(noise + row, mask=row < rows, other=0)
    col_noise = tl.load(noise + rows + column, mask=column < columns, other=0)
    scaled, LIMIT = mul_rn(value, inverse), tl.constexpr(2 ** (BITS - 1) - 1)
    if BITS == 8:
        q = rounded_down(scaled + dither_at(row_noise, col_noise), LIMIT)
    else:
        most = tl.max(tl.abs(tl.reshape(scaled, (ROWS, COLUMNS // GROUP, GROUP))), axis=2)
        shift = tl.zeros(most.shape, tl.int32)
        for i in tl.static_range(8 - BITS):
            shift = tl.where(most > (LIMIT << i), i + 1, shift)
        shift = tl.broadcast_to(shift[:, :, None], (ROWS, COLUMNS // GROUP, GROUP)).reshape(ROWS, COLUMNS)
        share = ((127 - shift) << 23).to(tl.float32, bitcast=True)  # 2^-shift
        q = rounded_down(mul_rn(scaled, share) + dither_at(row_noise, col_noise), LIMIT) << shift
    tl.store(d_int8 + row * columns + column, q.to(tl.int8), mask=mask)
    if d_turned is not None:
        tl.store(d_turned + tl.trans(column) * rows + tl.trans(row), tl.trans(q.to(tl.int8)), mask=tl.trans(mask))


# Launching


def _launch_quantize_delta(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int, d_turned: Tensor | None) -> Tensor:
    rows, columns = delta.shape
    d_int8 = torch.empty((rows, columns), dtype=torch.int8, device=delta.device)
    block = BLOCK if d_turned is None else SQUARE
    wrap_triton(_quantize_delta_kernel)[grid_of(rows, columns, block)](
        delta=delta,
        sigma=sigma,
        noise=noise,
        d_int8=d_int8,
        d_turned=d_turned,
        rows=rows,
        columns=columns,
        delta_row=delta.stride(0),
        delta_column=delta.stride(1),
        sigma_row=sigma.stride(0) if sigma.numel() > 1 else 0,
        BITS=bits,
        GROUP=GROUP,
        **block,
    )
    return d_int8


@operator("quantize_delta")
def _quantize_delta(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int) -> Tensor:
    return _launch_quantize_delta(delta, sigma, noise, bits, None)


@operator("quantize_delta_twice")
def _quantize_delta_twice(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    turned = torch.empty((delta.shape[1], delta.shape[0]), dtype=torch.int8, device=delta.device)
    return _launch_quantize_delta(delta, sigma, noise, bits, turned), turned


def quantize_delta(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int = 8) -> Tensor:
    """delta / sigma rounded up or down at random.

    delta float (T, n) of any stride, sigma float32 () for the tensor or (T, 1) for each row, noise int32 (T + n,) as
    `noise_from` draws it; bits from 2 to 8. Returns D int8 (T, n), clipped to `largest_of_bits`, 0 where sigma is 0.
    Raises ValueError on other shapes or types.
    """
    _check(delta, sigma, noise, bits)
    if not on_triton(delta):
        (row_noise, col_noise), sigma = noise.split(delta.shape), sigma.view(-1, 1).expand(len(delta), 1)
        return joined([
            quantize_delta_torch(delta[rows], sigma[rows], row_noise[rows, None], col_noise, bits)
            for _, rows in parts_of((1, *delta.shape), 1)
        ])
    return _quantize_delta(delta, sigma, noise, bits)


def quantize_delta_twice(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """`quantize_delta`, and the same D as `accumulate_votes` reads it fastest: on a GPU a copy by columns."""
    if not on_triton(delta):
        d = quantize_delta(delta, sigma, noise, bits)
        return d, d
    _check(delta, sigma, noise, bits)
    d, turned = _quantize_delta_twice(delta, sigma, noise, bits)
    return d, turned.t()


def _check(delta: Tensor, sigma: Tensor, noise: Tensor, bits: int) -> None:
    check_rows("quantize_delta", delta)
    if sigma.numel() != 1 and sigma.shape != (delta.shape[0], 1):
        raise ValueError(
            f"quantize_delta: got delta {tuple(delta.shape)} and sigma {tuple(sigma.shape)}; sigma is () or (T, 1)"
        )
    if noise.shape != (sum(delta.shape),) or noise.dtype != torch.int32 or not noise.is_contiguous():
        raise ValueError(
            f"quantize_delta: got delta {tuple(delta.shape)} and noise {noise.dtype} {tuple(noise.shape)}; it is "
            "torch.int32 (T + n,), contiguous"
        )
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_delta: got bits {bits}; they are 2 to 8")


def launch_configs() -> list[LaunchConfig]:
    """Row-contiguous inputs of 32 and of 16 bits."""
    found = []
    shape = {"rows": "i32", "columns": "i32", "delta_row": "i32"}
    for float_ in ("fp32", "bf16"):
        signature = {"delta": f"*{float_}", "sigma": "*fp32", "noise": "*i32", "d_int8": "*i8"} | shape
        for name, block, bits in (("8 bits", BLOCK, 8), ("4 bits", BLOCK, 4), ("8 bits twice", SQUARE, 8)):
            constants = {"delta_column": 1, "sigma_row": 0, "BITS": bits, "GROUP": GROUP, "d_turned": None} | block
            given = signature | ({"d_turned": "*i8"} if block is SQUARE else {})
            constants = {key: value for key, value in constants.items() if key not in given}
            found.append(LaunchConfig(f"{float_} {name}", _quantize_delta_kernel, given, constants, exact=True))
    return found
