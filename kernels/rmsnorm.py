"""Delta through the parameter-free RMSNorm in front of an integer layer.

    x^ = x / rms(x)            delta_x = (delta_x^ - x^ * mean(x^ * delta_x^)) / rms(x) + residual

Behind a squared ReLU, x = relu(y)^2 and delta_y = delta_x * 2 relu(y). The residual, a delta that came round the layer,
is added in fp32 before the result is rounded to x's type.

Memory, for x of b bytes an element and an int32 product: (4 + b) T n + 8 T bytes read, b T n more with a residual;
b T n written; about 12 operations an element, two of them fp64. A program holds its rows in registers: one read.
"""

import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl, triton
from kernels.fuse import fused
from kernels.quantize import FLOATS, mean_of, row_mean

MAX_COLUMNS = 16384  # the longest row a program of 16 warps holds in its registers
PRODUCTS = {torch.int32: "i32", **FLOATS}


@fused
def rmsnorm_backward_torch(
    product: Tensor, scale: Tensor, x: Tensor, inverse_rms: Tensor, squared_relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`rmsnorm_backward` in torch."""
    delta_hat = product.to(torch.float32) * scale
    wide = x.to(torch.float32)
    if squared_relu:
        wide = torch.relu(wide)
    x_hat = wide * wide * inverse_rms if squared_relu else wide * inverse_rms
    delta = (delta_hat - x_hat * row_mean(x_hat * delta_hat)) * inverse_rms
    if squared_relu:
        delta = delta * (2.0 * wide)
    if residual is not None:
        delta = delta + residual.to(torch.float32)
    return delta.to(x.dtype)


@jit
def _rmsnorm_backward_kernel(
    product, scale, x, inverse_rms, residual, out, rows, columns,
    product_row, product_column, scale_row, x_row, x_column, residual_row, residual_column,
    SQUARED_RELU: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    wide_column = column.to(tl.int64)
    mask = (row < rows) & (column < columns)
    value = tl.load(product + row * product_row + wide_column * product_column, mask=mask, other=0).to(tl.float32)
    wide = tl.load(x + row * x_row + wide_column * x_column, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)
    delta_hat = value * tl.load(scale + row * scale_row, mask=row < rows, other=0.0)
    if SQUARED_RELU:
        wide = tl.maximum(wide, 0.0)
        x_hat = wide * wide * inverse
    else:
        x_hat = wide * inverse
    mean = mean_of(tl.sum((x_hat * delta_hat).to(tl.float64), axis=1), columns)
    delta = (delta_hat - x_hat * mean[:, None]) * inverse
    if SQUARED_RELU:
        delta = delta * (2.0 * wide)
    if ADD:
        pointer = residual + row * residual_row + wide_column * residual_column
        delta += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, delta.to(out.dtype.element_ty), mask=mask)


def _blocks(columns: int) -> dict[str, int]:
    """ROWS, COLUMNS and num_warps: short rows share a program of 4 warps, long ones have a warp for 1,024 elements."""
    width = max(triton.next_power_of_2(columns), 32)
    rows = max(1, 2048 // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": max(4, rows * width // 1024)}


@torch.library.custom_op("nanogft::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(
    product: Tensor, scale: Tensor, x: Tensor, inverse_rms: Tensor, squared_relu: bool, residual: Tensor | None
) -> Tensor:
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    other = x if residual is None else residual
    blocks = _blocks(columns)
    _rmsnorm_backward_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        product, scale, x, inverse_rms.contiguous(), other, out, rows, columns, *product.stride(),
        scale.stride(0) if scale.numel() > 1 else 0, *x.stride(), *other.stride(),
        SQUARED_RELU=squared_relu, ADD=residual is not None, **blocks, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@_rmsnorm_backward.register_fake
def _(product, scale, x, inverse_rms, squared_relu, residual):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rmsnorm_backward(
    product: Tensor, scale: Tensor, x: Tensor, inverse_rms: Tensor, squared_relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """delta of the layer's input from the integer product D W, or from delta_x^ itself.

    product int32 or float (T, n), scale float32 () or (T, 1) so that delta_x^ = product * scale; x float (T, n) as it
    entered `rmsnorm_quantize`, inverse_rms float32 (T, 1); residual float (T, n), added to the result. Any strides.
    Returns (T, n) of x's type. Raises ValueError on other shapes or types, an empty batch, or rows over `MAX_COLUMNS`
    on the Triton backend.
    """
    others = [product] if residual is None else [product, residual]
    if x.dim() != 2 or 0 in x.shape or any(t.shape != x.shape for t in others):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, *others))
        raise ValueError(f"rmsnorm_backward: got {shapes}; x, product and residual need one shape (T, n), not empty")
    if x.dtype not in FLOATS or product.dtype not in PRODUCTS or inverse_rms.numel() != x.shape[0]:
        raise ValueError(
            f"rmsnorm_backward: got x {x.dtype}, product {product.dtype}, inverse_rms {tuple(inverse_rms.shape)}; "
            f"x is float, the product int32 or float, inverse_rms (T, 1)"
        )
    if scale.numel() not in (1, x.shape[0]):
        raise ValueError(f"rmsnorm_backward: got scale {tuple(scale.shape)} for {x.shape[0]} rows; it is () or (T, 1)")
    if not on_triton(x):
        return rmsnorm_backward_torch(product, scale, x, inverse_rms, squared_relu, residual)
    if x.shape[1] > MAX_COLUMNS:
        raise ValueError(
            f"rmsnorm_backward: got rows of {x.shape[1]}; the Triton kernel holds {MAX_COLUMNS}, use the torch backend"
        )
    return torch.ops.nanogft.rmsnorm_backward(product, scale, x, inverse_rms, squared_relu, residual)


def shipped() -> list[Shipped]:
    """What the launcher runs on a GPU, for row-contiguous inputs: each type, short and long rows, every option once."""
    found = []
    for dtype, product, columns, squared_relu, add in (
        (torch.float32, torch.int32, 384, False, False), (torch.float32, torch.int32, 3072, True, False),
        (torch.float16, torch.float16, 768, False, True), (torch.bfloat16, torch.int32, 768, False, True),
        (torch.bfloat16, torch.int32, 3072, True, False), (torch.bfloat16, torch.float32, MAX_COLUMNS, False, True),
        (torch.float32, torch.int32, 64, False, True),
    ):  # fmt: skip
        blocks = _blocks(columns)
        warps, float_ = blocks.pop("num_warps"), "*" + FLOATS[dtype]
        signature = {
            "product": "*" + PRODUCTS[product], "scale": "*fp32", "x": float_, "inverse_rms": "*fp32",
            "residual": float_, "out": float_, "rows": "i32", "columns": "i32", "product_row": "i32",
            "scale_row": "i32", "x_row": "i32", "residual_row": "i32",
        }  # fmt: skip
        constants = {"product_column": 1, "x_column": 1, "residual_column": 1, "SQUARED_RELU": squared_relu, "ADD": add}
        name = f"rmsnorm_backward {FLOATS[dtype]} {columns}"
        name += (" squared_relu" if squared_relu else "") + (" add" if add else "")
        found.append(Shipped(name, _rmsnorm_backward_kernel, signature, constants | blocks, warps))
    return found
