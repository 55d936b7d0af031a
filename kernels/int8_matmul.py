"""int8 matrix products with int32 accumulation.

    forward   acc = X W^T    X (T, in), W (out, in)      y        = acc * scale (+ residual)
    backward  acc = D W      D (T, out)                  delta_x^ = acc * scale

Exact while the reduced length K is at most `MAX_REDUCTION`: 133,144 products of +-127 * +-127 fit in int32. The product
with the scale and the sum with the residual are taken in fp32, each rounded, then rounded once to the type of y.
Memory for (M, K) x (K, N): M*K + N*K bytes read, M*N*size(y) written, as much read for a residual; 2*M*N*K operations.

Tensor cores want both operands contiguous along K, rows on 16-byte boundaries. Activations, deltas and the
quantizers' copies for the votes come like that; any other operand (W^T in the backward pass, a sliced view) is copied
first, its bytes read and written once more. There are two kernels. `_int8_matmul_kernel` moves tiles through
pointers, from sm_80 on. `_int8_matmul_tma_kernel` has them moved by the copy engine of sm_90 and later, which costs
no registers for addresses; its persistent form walks over several tiles, and one's results are written while the next
one's operands come. It needs rows of the result on 16-byte boundaries. Tiles are numbered in groups of rows: programs
that run at the same time share operands in L2. With SPLIT > 1 different programs sum parts of K with integer atomics,
exact in any order.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl, triton, tuned
from kernels.fuse import fused

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # 133,144
CPU_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported()
MAX_FLOAT_REDUCTION = 2**24 // (127 * 127)  # 1,040: the longest sum that fp32 holds exactly
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


def int8_product_torch(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for int8 (M, K) and (K, N), none of them 0 and K at most `MAX_REDUCTION`: int32 (M, N)."""
    a, b = _plain(a), _plain(b)
    if not a.is_cuda:
        return torch._int_mm(a, b) if CPU_MULTIPLIES_INT8 else _float_product(a, b)
    # cuBLAS wants more than 16 rows and multiples of 8; zeros add nothing to a sum.
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b = torch.nn.functional.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a, b)[:m, :n]


@fused
def _scaled(accumulator: Tensor, scale: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = accumulator.to(torch.float32) * scale
    if residual is not None:
        y = y + residual.to(torch.float32)
    return y if dtype == torch.float32 else y.to(dtype)


def int8_matmul_torch(
    x: Tensor, w: Tensor, scale: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(X W^T) * scale + residual in `dtype`, for the operands `int8_matmul` admits."""
    return _scaled(int8_product_torch(x, w.t()), scale, residual, dtype)


# The kernels


@jit
def _tile_corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: numbered down GROUP rows of tiles, then across."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    return (group * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@jit
def _write_tile(
    sums, out, scale, residual, row, column, M, N, stride_scale, stride_rm, stride_rn,
    SCALED: tl.constexpr, RESIDUAL: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Scale a tile of sums, add the residual and store it, or add the sums to those of other parts of K."""
    rows, columns = tl.arange(0, sums.shape[0]), tl.arange(0, sums.shape[1])
    inside = (rows < M - row)[:, None] & (columns < N - column)[None, :]
    row, column = row.to(tl.int64), column.to(tl.int64)
    place = out + (row * N + column) + rows[:, None].to(tl.int64) * N + columns[None, :]
    if ATOMIC:
        tl.atomic_add(place, sums, mask=inside, sem="relaxed")
    else:
        y = sums
        if SCALED:
            scales = tl.load(scale + row * stride_scale + rows * stride_scale, mask=rows < M - row, other=0.0)
            y = y.to(tl.float32) * scales[:, None]
        if RESIDUAL:
            added = residual + (row * stride_rm + column * stride_rn)
            added += rows[:, None] * stride_rm + columns[None, :] * stride_rn
            y += tl.load(added, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@jit
def _int8_matmul_kernel(
    a, b, out, scale, residual, M, N, blocks_k, blocks_am, blocks_bn, stride_scale, stride_rm, stride_rn,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of a (M, K) times b (N, K) transposed.

    K and the distance of rows come in blocks of 16 bytes: so the compiler sees what the launcher has made true, and
    loads whole blocks.
    """
    tl.static_assert(BLOCK_K % 32 == 0, "an int8 dot reduces at least 32 elements")
    K = blocks_k * 16
    part = tl.program_id(0) % SPLIT
    row, column = _tile_corner(tl.program_id(0) // SPLIT, M, N, BLOCK_M, BLOCK_N, GROUP)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    start = part * steps * BLOCK_K
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = tl.multiple_of(a, 16) + rows[:, None] * (blocks_am * 16) + (start + k)[None, :]
    b_tile = tl.multiple_of(b, 16) + columns[None, :] * (blocks_bn * 16) + (start + k)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for first in range(start, tl.minimum(start + steps * BLOCK_K, K), BLOCK_K):
        a_values = tl.load(a_tile, mask=(rows < M)[:, None] & (k < K - first)[None, :], other=0)
        b_values = tl.load(b_tile, mask=(columns < N)[None, :] & (k < K - first)[:, None], other=0)
        sums = tl.dot(a_values, b_values, sums, out_dtype=tl.int32)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    _write_tile(
        sums, out, scale, residual, row, column, M, N, stride_scale, stride_rm, stride_rn, SCALED, RESIDUAL, SPLIT > 1
    )


@jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@jit
def _write_box(sums, out, scales, residual, row, column, SCALED: tl.constexpr, RESIDUAL: tl.constexpr):
    """What `_write_tile` does, through descriptors, which cut off what lies past the edges."""
    y = sums
    if SCALED:
        y = y.to(tl.float32) * scales[:, None]
    if RESIDUAL:
        y += residual.load([row, column]).to(tl.float32)
    out.store([row, column], y.to(out.dtype))


@jit
def _write_boxes(sums, out, scales, residual, row, column, SCALED: tl.constexpr, RESIDUAL: tl.constexpr):
    """128 columns in two boxes of 64: a box waits in shared memory for the copy engine, beside the operands."""
    left, right = _halves(sums)
    _write_box(left, out, scales, residual, row, column, SCALED, RESIDUAL)
    _write_box(right, out, scales, residual, row, column + 64, SCALED, RESIDUAL)


@jit
def _int8_matmul_tma_kernel(
    a, b_128, b_256, out, scale, residual, M, N, K, stride_scale, SCALED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Tiles of a (M, K) times b (N, K) transposed. All but the scale are descriptors, which read zeros past the edges:
    of boxes (128, 128) of a, (128, 128) and (256, 128) of b, (128, 64) of out and residual."""
    tl.static_assert(BLOCK_M == 128 and BLOCK_K == 128, "the boxes of a")
    tl.static_assert(BLOCK_N == 128 or BLOCK_N == 256, "the boxes of b")
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        row, column = _tile_corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for first in range(0, K, BLOCK_K):
            a_values = a.load([row, first])
            if BLOCK_N == 256:
                b_values = b_256.load([column, first])
            else:
                b_values = b_128.load([column, first])
            sums = tl.dot(a_values, b_values.T, sums, out_dtype=tl.int32)
        scales = None
        if SCALED:
            rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
            scales = tl.load(scale + rows * stride_scale, mask=rows < M, other=0.0)
        if BLOCK_N == 256:
            left, right = _halves(sums)
            _write_boxes(left, out, scales, residual, row, column, SCALED, RESIDUAL)
            _write_boxes(right, out, scales, residual, row, column + 128, SCALED, RESIDUAL)
        else:
            _write_boxes(sums, out, scales, residual, row, column, SCALED, RESIDUAL)


# Launching

BOX_M, BOX_N, BOX_K = 128, 64, 128  # of the descriptors: rows of operands, columns of what is written, bytes along K
GROUP = 8  # rows of tiles that neighbouring programs share
TMA_TILES = [  # (BLOCK_N, PERSISTENT, num_warps, num_stages): what shared memory holds beside 128 x 64 boxes of fp32
    (256, True, 8, 3),
    (256, False, 8, 4),
    (128, False, 4, 2),  # two programs share a multiprocessor: one computes while the other writes
]
TILES = [(128, 128, 128, 8, 3), (64, 64, 128, 4, 3)]  # (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), pointers
SPLIT_TILE = (128, 64, 128, 8, 3)
SPLIT_COST = 512  # what adding a tile to memory costs, in elements of K
MOST_PARTS = 32
INTERPRETED_PROCESSORS = 2  # so that a program of the persistent kernel walks over several tiles in tests, too
WIDEST = 2**23  # columns of the result: offsets inside a tile are 32-bit


def _tile_constants(block_m: int, block_n: int, block_k: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": GROUP}


@functools.cache
def _tuned_pointers() -> Callable:
    configs = [triton.Config(_tile_constants(*tile[:3]), num_warps=tile[3], num_stages=tile[4]) for tile in TILES]
    return tuned(configs, ["M", "N", "blocks_k"])(_int8_matmul_kernel)


@functools.cache
def _tuned_tma() -> Callable:
    configs = [
        triton.Config(
            {**_tile_constants(BOX_M, block_n, BOX_K), "PERSISTENT": persistent}, num_warps=warps, num_stages=stages
        )
        for block_n, persistent, warps, stages in TMA_TILES
    ]
    return tuned(configs, ["M", "N", "K"])(_int8_matmul_tma_kernel)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    """Whether tiles can be fetched and stored through descriptors: from sm_90 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(m: Tensor) -> Tensor:
    """m int8 (rows, K) as the kernels want it: K contiguous and a multiple of 16, rows on 16-byte boundaries.

    Itself if it is like that, else a copy with zeros behind each row.
    """
    rows, k = m.shape
    if m.stride(1) == 1 and m.stride(0) % 16 == 0 and m.stride(0) >= k and k % 16 == 0 and m.data_ptr() % 16 == 0:
        return m
    copy = m.new_empty(rows, triton.cdiv(k, 16) * 16)
    copy[:, k:] = 0
    copy[:, :k] = m
    return copy


def _on_boundaries(m: Tensor) -> bool:
    """Whether m can be described to the copy engine: rows contiguous, apart, on 16-byte boundaries."""
    row, column = m.stride()
    return column == 1 and row >= m.shape[1] and row * m.element_size() % 16 == 0 and m.data_ptr() % 16 == 0


def _parts(m: int, n: int, k: int, processors: int) -> int:
    """Into how many parts to split K so that the tiles of a small result keep all processors busy."""
    tiles = triton.cdiv(m, SPLIT_TILE[0]) * triton.cdiv(n, SPLIT_TILE[1])
    if tiles >= 4 * processors:
        return 1

    def time(parts: int) -> float:
        return triton.cdiv(tiles * parts, 2 * processors) * (k / parts + SPLIT_COST)

    return min(range(1, min(MOST_PARTS, triton.cdiv(k, SPLIT_COST)) + 1), key=time)


def launch(
    a: Tensor, b: Tensor, scale: Tensor | None, residual: Tensor | None, dtype: torch.dtype, split: bool = False
) -> Tensor:
    """(a b^T) * scale + residual as `dtype` (M, N): int8 a (M, K), b (N, K) of any stride; without a scale, int32 sums.

    `split` allows parts of K to be added up in memory: for int32 results with few tiles.
    Raises ValueError for N above 2^23.
    """
    (m, k), n = a.shape, b.shape[0]
    if n > WIDEST:
        raise ValueError(f"int8 product: got {n} columns; the kernels address {WIDEST}; split the second operand")
    a, b = _aligned(a), _aligned(b)
    k = a.shape[1]
    scaled = scale is not None
    if scaled:
        scale = scale.to(a.device, torch.float32)
    stride_scale = scale.stride(0) if scaled and scale.numel() > 1 else 0
    switches = {"SCALED": scaled, "RESIDUAL": residual is not None, "enable_fp_fusion": False}
    parts = _parts(m, n, k, _processors(a.device)) if split else 1
    if parts > 1:
        out = torch.zeros(m, n, dtype=dtype, device=a.device)
        block_m, block_n, block_k, warps, stages = SPLIT_TILE
        _int8_matmul_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * parts,)](
            a, b, out, None, None, m, n, k // 16, a.stride(0) // 16, b.stride(0) // 16, 0, 0, 0,
            SPLIT=parts, **switches, **_tile_constants(block_m, block_n, block_k), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    if _has_copy_engine(a.device) and _on_boundaries(out):
        if residual is not None and not _on_boundaries(residual):
            residual = residual.contiguous()
        _launch_tma(a, b, out, scale, stride_scale, residual, switches)
        return out
    stride_rm, stride_rn = residual.stride() if residual is not None else (0, 0)
    _tuned_pointers()[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)](
        a, b, out, scale, residual, m, n, k // 16, a.stride(0) // 16, b.stride(0) // 16,
        stride_scale, stride_rm, stride_rn, SPLIT=1, **switches,
    )  # fmt: skip
    return out


def _launch_tma(
    a: Tensor, b: Tensor, out: Tensor, scale: Tensor | None, stride_scale: int, residual: Tensor | None, switches: dict
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = a.shape, b.shape[0]
    processors = _processors(a.device)

    def described(t: Tensor, *box: int) -> TensorDescriptor:
        return TensorDescriptor(t, list(t.shape), list(t.stride()), list(box))

    def grid(meta: dict) -> tuple[int]:
        tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
        return (min(tiles, processors) if meta["PERSISTENT"] else tiles,)

    _tuned_tma()[grid](
        described(a, BOX_M, BOX_K), described(b, BOX_M, BOX_K), described(b, 2 * BOX_M, BOX_K),
        described(out, BOX_M, BOX_N), scale, residual if residual is None else described(residual, BOX_M, BOX_N),
        m, n, k, stride_scale, **switches,
    )  # fmt: skip


@torch.library.custom_op("nanogft::int8_matmul", mutates_args=())
def _int8_matmul(
    a: Tensor, b: Tensor, scale: Tensor | None, residual: Tensor | None, dtype: torch.dtype, split: bool
) -> Tensor:
    return launch(a, b, scale, residual, dtype, split)


@_int8_matmul.register_fake
def _(a, b, scale, residual, dtype, split):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


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


def int8_product(a: Tensor, b: Tensor, split: bool = False) -> Tensor:
    """a @ b for int8 (M, K) and (K, N) of any stride, values in [-127, 127]: int32 (M, N), exact.

    `split` lets a GPU add up parts of K in memory: worth it where M and N are small and K is long.
    Raises ValueError on other types or shapes, an empty operand, or K above `MAX_REDUCTION`.
    """
    _check(a, b)
    if on_triton(a):
        return torch.ops.nanogft.int8_matmul(a, b.t(), None, None, torch.int32, split)
    return int8_product_torch(a, b)


def int8_matmul(
    x: Tensor, w: Tensor, scale: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = (X W^T) * scale + residual: x int8 (T, in), w int8 (out, in), scale float32 () or (T, 1), residual (T, out).

    y and the residual are of `dtype`: float32, float16 or bfloat16. Raises ValueError as `int8_product` does, and on
    another type or a residual that does not match.
    """
    across = w.t()
    _check(x, across)
    if dtype not in OUTPUT_TYPES:
        raise ValueError(f"int8_matmul: got dtype {dtype}; it must be one of {', '.join(map(str, OUTPUT_TYPES))}")
    if scale.dim() and scale.numel() != 1 and tuple(scale.shape) != (x.shape[0], 1):
        raise ValueError(f"int8_matmul: got a scale of shape {tuple(scale.shape)}; need () or ({x.shape[0]}, 1)")
    if residual is not None and (residual.dtype != dtype or residual.shape != (x.shape[0], w.shape[0])):
        raise ValueError(
            f"int8_matmul: got a residual {residual.dtype} {tuple(residual.shape)}; "
            f"it must be {dtype} {(x.shape[0], w.shape[0])}, as y is"
        )
    if on_triton(x):
        return torch.ops.nanogft.int8_matmul(x, w, scale, residual, dtype, False)
    return _scaled(int8_product_torch(x, across), scale, residual, dtype)


# What `kernels.check` compiles


def shipped() -> list[Shipped]:
    """Every tile with every epilogue: int32 sums, scaled, with a residual, of ragged sizes.
    By parts: kernels.contribution."""
    return [
        *_shipped("i32"), *_shipped("fp32"), *_shipped("bf16", residual=True), *_shipped("fp32", residual=True),
        *_shipped("bf16", ragged=True),
    ]  # fmt: skip


def _shipped(out: str, residual: bool = False, ragged: bool = False) -> list[Shipped]:
    """The tiles of both kernels for results of Triton's type `out`; those other than i32 are scaled."""
    whole, scaled = "i32:1" if ragged else "i32", out != "i32"
    label = out + " + residual" * residual + " ragged" * ragged
    common = {"M": whole, "N": whole} | ({"scale": "*fp32", "stride_scale": whole} if scaled else {})
    constants = {"SCALED": scaled, "RESIDUAL": residual} | ({} if scaled else {"scale": None, "stride_scale": 0})

    signature = common | {"a": "*i8", "b": "*i8", "out": f"*{out}", "blocks_k": whole}
    signature |= {"blocks_am": whole, "blocks_bn": whole}
    signature |= {"residual": f"*{out}", "stride_rm": whole} if residual else {}
    fixed = {"SPLIT": 1, "stride_rn": 1} if residual else {"SPLIT": 1, "residual": None, "stride_rm": 0, "stride_rn": 0}
    through_pointers = [
        Shipped(
            f"{'x'.join(map(str, tile))} {label}", _int8_matmul_kernel, signature,
            constants | fixed | _tile_constants(*tile), warps, stages, ("int8",),
        )
        for *tile, warps, stages in TILES
    ]  # fmt: skip

    operand, written = f"tensordesc<i8[{BOX_M}, {BOX_K}]>", f"tensordesc<{out}[{BOX_M}, {BOX_N}]>"
    wide = f"tensordesc<i8[{2 * BOX_M}, {BOX_K}]>"
    described = common | {"a": operand, "b_128": operand, "b_256": wide, "out": written, "K": whole}
    described |= {"residual": written} if residual else {}
    fixed = {} if residual else {"residual": None}
    return through_pointers + [
        Shipped(
            f"tma {BOX_M}x{block_n}x{BOX_K}{' persistent' * persistent} {label}", _int8_matmul_tma_kernel, described,
            constants | fixed | _tile_constants(BOX_M, block_n, BOX_K) | {"PERSISTENT": persistent},
            warps, stages, ("int8",), (90, 100),
        )
        for block_n, persistent, warps, stages in TMA_TILES
    ]  # fmt: skip


def shipped_by_parts(whole: str) -> Shipped:
    """The tile of sums by parts, for sizes of Triton's type `whole`."""
    *tile, warps, stages = SPLIT_TILE
    sizes = dict.fromkeys(("M", "N", "blocks_k", "blocks_am", "blocks_bn"), whole)
    unused = {"scale": None, "residual": None, "stride_scale": 0, "stride_rm": 0, "stride_rn": 0}
    return Shipped(
        f"{'x'.join(map(str, tile))} i32 by parts{' ragged' * whole.endswith(':1')}", _int8_matmul_kernel,
        {"a": "*i8", "b": "*i8", "out": "*i32"} | sizes,
        _tile_constants(*tile) | unused | {"SPLIT": 4, "SCALED": False, "RESIDUAL": False}, warps, stages, ("int8",),
    )  # fmt: skip
