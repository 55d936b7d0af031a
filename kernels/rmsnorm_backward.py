"""Delta through the RMSNorm without a gain in front of an integer layer.

    x^ = x / rms(x)            delta_x = (delta_x^ - x^ * mean(x^ * delta_x^)) / rms(x)

Behind a squared ReLU, x = relu(y)^2 and delta_y = delta_x * 2 relu(y). Where x also goes past the layer, as in a
residual block, the delta that comes back that way is added.

A program notes the largest |delta| that it writes, so that whoever puts delta on a grid need not read it for that.

Memory, for x of b bytes an element and an int32 product: (4 + b) T n + 8 T bytes read, b T n written; about 12
operations an element, two of them fp64. A program holds its rows in registers: one read.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, mul_rn, on_triton, operator, tl, triton, wrap_triton
from kernels.fuse import fused
from kernels.measure_delta import largest_of, with_largest
from kernels.rmsnorm_quantize import FLOATS, MAX_COLUMNS, check_width, mean_of, row_blocks, row_mean

PRODUCTS = {torch.int32: "i32", **FLOATS}


@fused
def rmsnorm_backward_torch(
    product: Tensor, scale: Tensor | None, x: Tensor, inv_rms: Tensor, squared_relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`rmsnorm_backward` in torch."""
    delta_hat = product.to(torch.float32)
    delta_hat = delta_hat.clone() if scale is None else delta_hat * scale
    wide = x.to(torch.float32)
    if squared_relu:
        wide = torch.relu(wide)
    x_hat = (wide * wide).mul_(inv_rms) if squared_relu else wide * inv_rms
    delta = delta_hat.sub_(x_hat.mul_(row_mean(x_hat * delta_hat))).mul_(inv_rms)
    if squared_relu:
        delta = delta.mul_(wide.mul_(2.0))
    delta = delta.to(x.dtype)
    return delta if residual is None else delta.add_(residual)


@jit
def _rmsnorm_backward_kernel(
    product, scale, x, inv_rms, residual, out, largest, rows, columns, product_row, product_column, scale_row, x_row,
    x_column, inv_row, residual_row, residual_column,
    SQUARED_RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    wide_column = column.to(tl.int64)
    mask = (row < rows) & (column < columns)
    delta_hat = tl.load(product + row * product_row + wide_column * product_column, mask=mask, other=0).to(tl.float32)
    wide = tl.load(x + row * x_row + wide_column * x_column, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inv_rms + row * inv_row, mask=row < rows, other=0.0)
    if scale is not None:
        delta_hat = mul_rn(delta_hat, tl.load(scale + row * scale_row, mask=row < rows, other=0.0))
    if SQUARED_RELU:
        wide = tl.maximum(wide, 0.0)
        x_hat = wide * wide * inverse
    else:
        x_hat = wide * inverse
    mean = mean_of(tl.sum((x_hat * delta_hat).to(tl.float64), axis=1), columns)
    delta = mul_rn(delta_hat - mul_rn(x_hat, mean[:, None]), tl.broadcast_to(inverse, delta_hat.shape))
    if SQUARED_RELU:
        delta = mul_rn(delta, 2.0 * wide)
    delta = delta.to(out.dtype.element_ty)
    if residual is not None:
        beside = tl.load(residual + row * residual_row + wide_column * residual_column, mask=mask, other=0.0)
        delta = (delta.to(tl.float32) + beside.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * columns + column, delta, mask=mask)
    tl.store(largest + tl.program_id(0), largest_of(tl.where(mask, delta.to(tl.float32), 0.0)))


@operator("rmsnorm_backward")
def _rmsnorm_backward(
    product: Tensor, scale: Tensor | None, x: Tensor, inv_rms: Tensor, squared_relu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    blocks = row_blocks(columns)
    programs = triton.cdiv(rows, blocks["ROWS"])
    largest = torch.empty((programs,), dtype=torch.float32, device=x.device)
    wrap_triton(_rmsnorm_backward_kernel)[(programs,)](
        product=product,
        scale=scale,
        x=x,
        inv_rms=inv_rms,
        residual=residual,
        out=out,
        largest=largest,
        rows=rows,
        columns=columns,
        product_row=product.stride(0),
        product_column=product.stride(1),
        scale_row=scale.stride(0) if scale is not None and scale.numel() > 1 else 0,
        x_row=x.stride(0),
        x_column=x.stride(1),
        inv_row=inv_rms.stride(0),
        residual_row=0 if residual is None else residual.stride(0),
        residual_column=0 if residual is None else residual.stride(1),
        SQUARED_RELU=squared_relu,
        **blocks,
    )
    return out, largest


def rmsnorm_backward(
    product: Tensor, scale: Tensor | None, x: Tensor, inv_rms: Tensor, squared_relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """delta of the layer's input from the integer product D W, or from delta_x^ itself.

    product int32 or float (T, n), scale float32 () or (T, 1) so that delta_x^ = product * scale, None for 1; x float
    (T, n) as it entered `rmsnorm_quantize`, inv_rms float32 (T, 1), residual (T, n) of x's type or None. Any strides.
    Returns (T, n) of x's type, on the Triton backend with its largest value noted (`with_largest`). Raises ValueError
    on other shapes or types, an empty batch, or rows over `MAX_COLUMNS` on the Triton backend.
    """
    if x.dim() != 2 or 0 in x.shape or product.shape != x.shape:
        raise ValueError(
            f"rmsnorm_backward: got x {tuple(x.shape)} and product {tuple(product.shape)}; "
            f"they need one shape (T, n), not empty"
        )
    if x.dtype not in FLOATS or product.dtype not in PRODUCTS or inv_rms.shape != (x.shape[0], 1):
        raise ValueError(
            f"rmsnorm_backward: got x {x.dtype}, product {product.dtype}, inv_rms {tuple(inv_rms.shape)}; "
            f"x is float, the product int32 or float, inv_rms (T, 1)"
        )
    if scale is not None and scale.numel() not in (1, x.shape[0]):
        raise ValueError(f"rmsnorm_backward: got scale {tuple(scale.shape)} for {x.shape[0]} rows; it is () or (T, 1)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"rmsnorm_backward: got residual {residual.dtype} {tuple(residual.shape)}; it must be as x, "
                         f"{x.dtype} {tuple(x.shape)}")  # fmt: skip
    if not on_triton(x):
        return rmsnorm_backward_torch(product, scale, x, inv_rms, squared_relu, residual)
    check_width("rmsnorm_backward", x)
    return with_largest(*_rmsnorm_backward(product, scale, x, inv_rms, squared_relu, residual))


def launch_configs() -> list[LaunchConfig]:
    """Row-contiguous inputs of each type, short and long rows, both activations."""
    found = []
    for dtype, product, columns, squared_relu, residual in (
        (torch.float32, torch.int32, 384, False, True), (torch.float16, torch.float16, 768, False, False),
        (torch.float32, torch.int32, 3072, True, False), (torch.bfloat16, torch.int32, MAX_COLUMNS, False, True),
    ):  # fmt: skip
        blocks = row_blocks(columns)
        float_ = "*" + FLOATS[dtype]
        signature = {
            "product": "*" + PRODUCTS[product], "scale": "*fp32", "x": float_, "inv_rms": "*fp32", "out": float_,
            "largest": "*fp32",
            "rows": "i32", "columns": "i32", "product_row": "i32", "x_row": "i32",
        }  # fmt: skip
        signature |= {"residual": float_, "residual_row": "i32"} if residual else {}
        constants = {"scale_row": 0, "product_column": 1, "x_column": 1, "inv_row": 1, "SQUARED_RELU": squared_relu}
        if product != torch.int32:
            del signature["scale"]
            constants["scale"] = None
        constants |= {"residual_column": 1} if residual else {"residual": None, "residual_row": 0, "residual_column": 0}
        name = f"rmsnorm_backward {FLOATS[dtype]} {columns}{' squared_relu' * squared_relu}{' residual' * residual}"
        found.append(LaunchConfig(name, _rmsnorm_backward_kernel, signature, constants | blocks, exact=True))
    return found
