"""int8 matrix products with int32 accumulation.

    forward   acc = X W^T    X (T, in), W (out, in)      y        = acc * scale (+ residual)
    backward  acc = D W      D (T, out)                  delta_x^ = acc * scale

Exact while the reduced length K is at most `MAX_REDUCTION`: 133,144 products of +-127 * +-127 fit in int32. The product
with the scale and the sum with the residual are taken in fp32, each rounded, then rounded once to the type of y.
Memory for (M, K) x (K, N): M*K + N*K bytes read, M*N*size(y) written, as much read for a residual; 2*M*N*K operations.

Operands are read through their strides, but for W in the backward product, of which kernels/transpose.py makes a copy.
Tiles are numbered in groups of rows, so that programs that run at the same time share operands in L2. On GPUs that copy
tiles by descriptor (sm_90 and newer) a program makes one tile after another, and loads the next while it stores. Short
sums, which end as soon as they are under way, are a quarter faster so; long ones are a tenth slower.
"""

import torch
from torch import Tensor

from kernels.backend import (
    LaunchConfig,
    describable,
    describe,
    jit,
    mul_rn,
    on_triton,
    operator,
    processors,
    tl,
    triton,
    wrap_triton,
)
from kernels.fuse import fused
from kernels.limits import MAX_REDUCTION
from kernels.tiles import joined, parts_of
from kernels.transpose import by_columns

CPU_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported()
MAX_FLOAT_REDUCTION = 2**24 // (127 * 127)  # 1,040: the longest sum that fp32 holds exactly
TORCH_COLUMNS = 4096  # of a product of many outputs at a time, so that its sums in int32 and fp32 stay small
OUTPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


# The torch reference


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


def _cuda_operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b as cuBLAS multiplies int8: a by rows, b by columns, more than 16 rows of a, K and N multiples of 8.

    What is added is zeros, which add nothing to a sum.
    """
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b = torch.nn.functional.pad(b.t(), (0, -k % 8, 0, -n % 8))
    return a.contiguous(), b.contiguous().t()


def int8_product_torch(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b for int8 (M, K) and (K, N), none of them 0 and K at most `MAX_REDUCTION`: int32 (M, N), `out` if given."""
    if a.is_cuda:
        product = torch._int_mm(*_cuda_operands(a, b))[: a.shape[0], : b.shape[1]]
    elif CPU_MULTIPLIES_INT8:
        return torch._int_mm(_plain(a), _plain(b), out=out)
    else:
        product = _float_product(_plain(a), _plain(b))
    return product if out is None else out.copy_(product)


@fused
def _scaled(accumulator: Tensor, scale: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = accumulator.to(torch.float32).mul_(scale)
    if residual is not None:
        y.add_(residual)
    return y if dtype == torch.float32 else y.to(dtype)


def int8_matmul_torch(
    x: Tensor, w: Tensor, scale: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32,
    factor: float = 1.0, inv_rms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`int8_matmul` in torch."""
    scale = scale * factor
    if inv_rms is not None:
        scale = scale + (inv_rms - inv_rms)  # NaN where inv_rms is
    return joined([
        _scaled(int8_product_torch(x, w[rows].t()), scale, None if residual is None else residual[:, rows], dtype)
        for _, rows in parts_of((1, len(w), len(x)), TORCH_COLUMNS)
    ], dim=1)  # fmt: skip


# The kernel


@jit
def _tile_corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: they are numbered down GROUP rows of tiles, then across."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    return (group * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@jit
def _scaled_tile(
    sums, scale, residual, inv_rms, factor, rows, columns, M, N, scale_row, residual_row, residual_column
):  # fmt: skip
    """A tile of sums, times the scale and plus the residual where these are given."""
    y = sums
    if scale is not None:
        scales = tl.load(scale + rows * scale_row, mask=rows < M, other=0.0) * tl.cast(factor, tl.float32)
        if inv_rms is not None:
            norm = tl.load(inv_rms + rows, mask=rows < M, other=0.0)
            scales = tl.where(norm == norm, scales, norm)
        y = mul_rn(y.to(tl.float32), scales[:, None])
    if residual is not None:
        added = residual + rows[:, None] * residual_row + columns[None, :] * residual_column
        y += tl.load(added, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
    return y


@jit
def _int8_matmul_kernel(
    a, b, out, scale, residual, inv_rms, factor, M, N, K, a_row, a_k, b_k, b_column, scale_row, residual_row,
    residual_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of a (M, K) times b (K, N), scaled and added to the residual where these are given."""
    tl.static_assert(BLOCK_K >= 32, "an int8 dot reduces at least 32 elements")
    row, column = _tile_corner(tl.program_id(0).to(tl.int64), M, N, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_columns = (rows < M)[:, None], (columns < N)[None, :]
    a_tile = a + rows[:, None] * a_row + k[None, :] * a_k
    b_tile = b + k[:, None] * b_k + columns[None, :] * b_column
    block = tl.full((), BLOCK_K, tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(0, K // BLOCK_K):
        a_values = tl.load(a_tile, mask=in_rows, other=0)
        b_values = tl.load(b_tile, mask=in_columns, other=0)
        sums = tl.dot(a_values, b_values, sums, out_dtype=tl.int32)
        a_tile += block * a_k
        b_tile += block * b_k
    if K % BLOCK_K != 0:
        # Its own pointers: with those of the loop, triton 3.6 runs out of registers inside the loop.
        rest = K // BLOCK_K * BLOCK_K + k
        a_rest = a + rows[:, None] * a_row + rest[None, :] * a_k
        b_rest = b + rest[:, None] * b_k + columns[None, :] * b_column
        a_values = tl.load(a_rest, mask=in_rows & (rest < K)[None, :], other=0)
        b_values = tl.load(b_rest, mask=in_columns & (rest < K)[:, None], other=0)
        sums = tl.dot(a_values, b_values, sums, out_dtype=tl.int32)
    y = _scaled_tile(
        sums, scale, residual, inv_rms, factor, rows, columns, M, N, scale_row, residual_row, residual_column
    )  # fmt: skip
    tl.store(out + rows[:, None] * N + columns[None, :], y.to(out.dtype.element_ty), mask=in_rows & in_columns)


@jit
def _int8_matmul_by_descriptor_kernel(
    a, b, out, scale, residual, inv_rms, factor, M, N, K, scale_row, residual_row, residual_column, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile of a (M, K) times the transpose of b (N, K); a, b and out are descriptors."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), programs, flatten=True):
        row, column = _tile_corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for k in range(0, K, BLOCK_K):
            sums = tl.dot(a.load([row, k]), b.load([column, k]).T, sums, out_dtype=tl.int32)
        rows, columns = (row + tl.arange(0, BLOCK_M)).to(tl.int64), (column + tl.arange(0, BLOCK_N)).to(tl.int64)
        y = _scaled_tile(
            sums, scale, residual, inv_rms, factor, rows, columns, M, N, scale_row, residual_row, residual_column
        )  # fmt: skip
        out.store([row, column], y.to(out.dtype))


# Launching

ALIGNED = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}
RAGGED = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
LONGEST_DESCRIBED = 1536  # sums, on an H100
DESCRIBED = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4}


def _blocks(a: Tensor, b: Tensor) -> dict[str, int]:
    """The tile: RAGGED where operands are not loaded in words of 16 bytes, since each byte then takes an address."""
    strides = (*a.stride(), *b.stride())
    whole = all(size % 16 == 0 for size in (a.shape[1], a.storage_offset(), b.storage_offset()))
    aligned = whole and not any(size != 1 and size % 16 for size in strides) and 1 in a.stride() and 1 in b.stride()
    return ALIGNED if aligned else RAGGED


def _launch_by_descriptor(
    a: Tensor, b: Tensor, scale: Tensor | None, residual: Tensor | None, factor: float, inv_rms: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    (m, n), blocks = out.shape, DESCRIBED
    tile = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    programs = min(processors(a), triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]))
    wrap_triton(_int8_matmul_by_descriptor_kernel)[(programs,)](
        a=describe(a, tile[0], tile[2]),
        b=describe(b, tile[1], tile[2]),
        out=describe(out, tile[0], tile[1]),
        scale=scale,
        residual=residual,
        inv_rms=inv_rms,
        factor=factor,
        M=m,
        N=n,
        K=a.shape[1],
        scale_row=scale.stride(0) if scale is not None and scale.numel() > 1 else 0,
        residual_row=residual.stride(0) if residual is not None else 0,
        residual_column=residual.stride(1) if residual is not None else 0,
        programs=programs,
        **blocks | {"num_stages": _stages(out.itemsize, residual is not None)},
    )


def _stages(itemsize: int, residual: bool) -> int:
    """How many tiles of the operands lie in shared memory, beside what the result needs there."""
    return DESCRIBED["num_stages"] - (residual and itemsize == 4)


@operator("int8_matmul")
def _int8_matmul(
    a: Tensor, b: Tensor, scale: Tensor | None, residual: Tensor | None, dtype: torch.dtype, factor: float = 1.0,
    inv_rms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(a @ b) * (scale * factor) + residual as `dtype` (M, N); without a scale, int32 sums."""
    (m, k), n = a.shape, b.shape[1]
    b = by_columns(b)  # W, in D W; rows of the other operand always lie in one piece
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    if k <= LONGEST_DESCRIBED and describable(a, b.t(), out):
        _launch_by_descriptor(a, b.t(), scale, residual, factor, inv_rms, out)
        return out
    blocks = _blocks(a, b)
    wrap_triton(_int8_matmul_kernel)[(triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"]),)](
        a=a,
        b=b,
        out=out,
        scale=scale,
        residual=residual,
        inv_rms=inv_rms,
        factor=factor,
        M=m,
        N=n,
        K=k,
        a_row=a.stride(0),
        a_k=a.stride(1),
        b_k=b.stride(0),
        b_column=b.stride(1),
        scale_row=scale.stride(0) if scale is not None and scale.numel() > 1 else 0,
        residual_row=residual.stride(0) if residual is not None else 0,
        residual_column=residual.stride(1) if residual is not None else 0,
        **blocks,
    )
    return out


# The public functions


def _check(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"int8_product: got {a.dtype} and {b.dtype}; both operands must be int8")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"int8_product: got shapes {tuple(a.shape)} and {tuple(b.shape)}; need (M, K) and (K, N)")
    if 0 in (*a.shape, *b.shape):
        raise ValueError(f"int8_product: got an empty operand, {tuple(a.shape)} x {tuple(b.shape)}")
    if a.shape[1] > MAX_REDUCTION:
        raise ValueError(f"int8_product: {a.shape[1]} products can overflow int32; the limit is {MAX_REDUCTION}")


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for int8 (M, K) and (K, N) of any stride, values in [-127, 127]: int32 (M, N), exact.

    Raises ValueError on other types or shapes, an empty operand, or K above `MAX_REDUCTION`.
    """
    _check(a, b)
    return _int8_matmul(a, b, None, None, torch.int32) if on_triton(a) else int8_product_torch(a, b)


def int8_matmul(
    x: Tensor, w: Tensor, scale: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32,
    factor: float = 1.0, inv_rms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = (X W^T) * (scale * factor) + residual: x int8 (T, in), w int8 (out, in), scale float32 () or (T, 1), residual
    (T, out).

    y and the residual are of `dtype`: float32, float16 or bfloat16. Rows whose inv_rms, float32 (T, 1) by rows, is NaN
    are NaN. Raises ValueError as `int8_product` does, and on another type or a residual that does not match.
    """
    across = w.t()
    _check(x, across)
    if dtype not in OUTPUT_TYPES:
        raise ValueError(f"int8_matmul: got dtype {dtype}; it must be one of {', '.join(map(str, OUTPUT_TYPES))}")
    if scale.dtype != torch.float32 or scale.numel() != 1 and scale.shape != (x.shape[0], 1):
        raise ValueError(
            f"int8_matmul: got a scale {scale.dtype} {tuple(scale.shape)}; need torch.float32 () or ({x.shape[0]}, 1)"
        )
    if residual is not None and (residual.dtype != dtype or residual.shape != (x.shape[0], w.shape[0])):
        raise ValueError(
            f"int8_matmul: got a residual {residual.dtype} {tuple(residual.shape)}; "
            f"it must be {dtype} {(x.shape[0], w.shape[0])}, as y is"
        )
    if inv_rms is not None and (inv_rms.shape != (x.shape[0], 1) or inv_rms.dtype != torch.float32):
        raise ValueError(f"int8_matmul: got inv_rms {inv_rms.dtype} {tuple(inv_rms.shape)}; need torch.float32 (T, 1)")
    if on_triton(x):
        return _int8_matmul(x, across, scale, residual, dtype, factor, inv_rms)
    return int8_matmul_torch(x, w, scale, residual, dtype, factor, inv_rms)


# What `kernels.check` compiles


def _launch_config(
    blocks: dict[str, int], out: str, residual: bool = False, sizes: str = "i32"
) -> LaunchConfig:  # fmt: skip
    """A product whose result has Triton's type `out`, scaled if that is a float. `sizes` is the type of M and N."""
    whole, scaled = "i32:1" if blocks is RAGGED else "i32", out != "i32"
    signature = {"a": "*i8", "b": "*i8", "out": f"*{out}", "M": sizes, "N": sizes, "factor": "fp32"}
    signature |= dict.fromkeys(("K", "a_row", "b_column"), whole)
    constants = {"a_k": 1, "b_k": 1, "scale_row": 0} | blocks
    signature |= {"scale": "*fp32"} if scaled else {}
    signature |= {"inv_rms": "*fp32"} if residual else {}
    constants |= ({} if scaled else {"scale": None}) | ({} if residual else {"inv_rms": None})
    signature |= {"residual": f"*{out}", "residual_row": whole} if residual else {}
    constants |= {"residual_column": 1} if residual else {"residual": None, "residual_row": 0, "residual_column": 0}
    name = f"{'x'.join(str(size) for size in list(blocks.values())[:3])} {out}"
    name += " + residual" * residual + " ragged" * (sizes != "i32")
    return LaunchConfig(name, _int8_matmul_kernel, signature, constants, ("int8",), exact=True)


def _described_config(out: str, residual: bool) -> LaunchConfig:
    """A product by descriptors whose result has Triton's type `out`."""
    m, n, k = list(DESCRIBED.values())[:3]
    signature = {"a": f"tensordesc<i8[{m}, {k}]>", "b": f"tensordesc<i8[{n}, {k}]>", "factor": "fp32"}
    signature |= {"out": f"tensordesc<{out}[{m}, {n}]>"} | dict.fromkeys(("M", "N", "K"), "i32") | {"programs": "i32:1"}
    constants = {"scale": None, "inv_rms": None, "residual": None, "scale_row": 0, "residual_row": 0}
    constants |= {"residual_column": 1} | DESCRIBED | {"num_stages": _stages(2 if out == "bf16" else 4, residual)}
    given = {} if out == "i32" else {"scale": "*fp32"}
    given |= {"inv_rms": "*fp32", "residual": f"*{out}", "residual_row": "i32"} if residual else {}
    constants = {name: value for name, value in constants.items() if name not in given}
    return LaunchConfig(
        f"by descriptor {out}{' + residual' * residual}", _int8_matmul_by_descriptor_kernel, signature | given,
        constants, ("int8",), (90, 100), exact=True,
    )  # fmt: skip


def launch_configs() -> list[LaunchConfig]:
    """Each tile, and every kind of result."""
    return [
        *(_described_config(out, residual) for out in ("bf16", "fp32") for residual in (False, True)),
        _described_config("i32", False),
        _launch_config(ALIGNED, "bf16", residual=True),
        _launch_config(ALIGNED, "fp32"),
        _launch_config(ALIGNED, "bf16"),
        _launch_config(ALIGNED, "i32"),
        _launch_config(RAGGED, "fp32", residual=True, sizes="i32:1"),
        _launch_config(RAGGED, "i32", sizes="i32:1"),
    ]
