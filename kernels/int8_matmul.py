"""int8 matrix products with int32 accumulation.

    forward   acc = X W^T    X (T, in), W (out, in)      y        = acc * scale
    backward  acc = D W      D (T, out)                  delta_x^ = acc * scale

Exact while the reduced length is at most `MAX_REDUCTION`: 133,144 products of +-127 * +-127 fit in int32.
Memory: T*in + out*in bytes read, 4*T*out written; 2*T*in*out operations.
"""

import torch
from torch import Tensor

from kernels.fuse import fused

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # 133,144
CPU_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported()
MAX_FLOAT_REDUCTION = 2**24 // (127 * 127)  # 1,040: the longest sum that fp32 holds exactly


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product through fp32, in parts short enough: for CPUs whose int8 product is a plain loop."""
    parts = zip(a.split(MAX_FLOAT_REDUCTION, dim=1), b.split(MAX_FLOAT_REDUCTION, dim=0), strict=True)
    return sum((left.float() @ right.float()).to(torch.int32) for left, right in parts)


def _plain(m: Tensor) -> Tensor:
    """m itself if its rows or its columns lie one after another, else a copy whose rows do.

    torch._int_mm on a CPU takes any strides and is wrong on some: an expanded operand (a stride of 0), and a single
    row with strides (1, 1), as the transpose of a column has.
    """
    (rows, columns), (down, across) = m.shape, m.stride()
    by_rows = across == 1 and down >= columns
    by_columns = down == 1 and across >= rows and min(rows, columns) > 1
    return m if by_rows or by_columns else m.clone(memory_format=torch.contiguous_format)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for int8 (M, K) and (K, N) of any stride, values in [-127, 127]: int32 (M, N), exact.

    Raises ValueError on other types or shapes, an empty operand, or K above `MAX_REDUCTION`.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"int8_product: got {a.dtype} and {b.dtype}; both operands must be int8")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"int8_product: got shapes {tuple(a.shape)} and {tuple(b.shape)}; need (M, K) and (K, N)")
    if 0 in (*a.shape, *b.shape):
        raise ValueError(f"int8_product: got an empty operand, {tuple(a.shape)} x {tuple(b.shape)}")
    if a.shape[1] > MAX_REDUCTION:
        raise ValueError(f"int8_product: {a.shape[1]} products can overflow int32; the limit is {MAX_REDUCTION}")
    a, b = _plain(a), _plain(b)
    if not a.is_cuda:
        return torch._int_mm(a, b) if CPU_MULTIPLIES_INT8 else _float_product(a, b)
    # cuBLAS wants more than 16 rows and multiples of 8; zeros add nothing to a sum.
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b = torch.nn.functional.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a, b)[:m, :n]


@fused
def _scaled(accumulator: Tensor, scale: Tensor) -> Tensor:
    return accumulator.to(torch.float32) * scale


def int8_matmul(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """y = (X W^T) * scale: x int8 (T, in), w int8 (out, in), scale float32 (). Returns float32 (T, out)."""
    return _scaled(int8_product(x, w.t()), scale)
