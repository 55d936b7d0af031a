"""Float rows to int8: activations on a fixed grid, delta on one scale per tensor.

    activations  x^ = x / rms(x),  rms over a row;   X = clip(round(x^ * 127 / A), -127, 127)
    delta        D  = clip(floor(delta / sigma + u), -127, 127),   sigma = max|delta| / 127,  u from `philox.dither`

Rounding of activations is to nearest, halves to even. With `squared_relu` the norm is taken of
relu(x)^2, so an MLP's hidden layer is read once. A row of zeros has x^ = 0 and 1 / rms = 0: no delta passes it.

The votes reduce over tokens, and matrix units want the reduced axis contiguous. So the Triton kernels write what they
quantise twice: as rows, and transposed into memory (n, T padded to `VOTES_ALIGNMENT`), handed out as a view (T, n) with
strides (1, padded T); the padding is zero.

Memory, in bytes, for x and delta of b bytes an element, with the copy for the votes (without it, T n less written):

                              read                     written               operations an element
    rmsnorm_quantize          b T n                    2 T n + 4 T           10, two of them fp64
    add_rmsnorm_quantize      2 b T n                  (2 + b) T n + 4 T     11
    absmax                    b T n                    4                     2
    quantize_delta            b T n + 4 (2 T + n)      2 T n                 10

The norm needs a row twice, before and after its sum. A program comes back to its rows while they are still in L1 or L2:
that is why there are as many programs as the GPU runs at once, each walking over blocks of rows (`_norm_blocks`).
"""

import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl, triton
from kernels.fuse import fused
from kernels.philox import dither, dither_at

SMALLEST_SCALE = 1e-36  # a smaller sigma counts as zero; 1 / sigma would overflow
SMALLEST_MEAN_SQUARE = 1e-30  # below this a row counts as zeros, which have no direction to normalise
VOTES_ALIGNMENT = 16  # bytes: rows of the transposed copies start on multiples of it
PROGRAMS_INTERPRETED = 3  # so that tests see a program walk over several blocks
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _squared_relu(x: Tensor) -> Tensor:
    r = torch.relu(x)
    return r * r


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
    """Normalise rows and put them on the int8 grid: x float (T, n) to X int8 (T, n) and 1 / rms float32 (T, 1)."""
    x = x.to(torch.float32)
    if squared_relu:
        x = _squared_relu(x)
    mean_square = row_mean(x * x)
    # By way of fp64: torch's own fp32 square root on a CPU is not always the nearest number, the GPU's is.
    rms = torch.sqrt(mean_square.to(torch.float64)).to(torch.float32)
    inverse_rms = torch.where(mean_square > SMALLEST_MEAN_SQUARE, 1.0 / rms, 0.0)
    grid = torch.round(x * inverse_rms * (127.0 / act_range))
    return grid.clamp(-127, 127).to(torch.int8), inverse_rms


@fused
def absmax_torch(delta: Tensor) -> Tensor:
    """max |delta| as a float32 scalar tensor."""
    return delta.abs().amax().to(torch.float32)


@fused
def quantize_delta_torch(delta: Tensor, sigma: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """delta / sigma rounded up or down at random: float (T, n) to D int8 (T, n)."""
    inverse = torch.where(sigma > SMALLEST_SCALE, 1.0 / sigma, 0.0)
    return torch.floor(delta.to(torch.float32) * inverse + dither(rows, columns)).clamp(-127, 127).to(torch.int8)


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
    """round(v) clipped to [-127, 127], halves to even, in the low byte of an int32.

    Adding 1.5 * 2^23 leaves the integer in the last bits of the mantissa, in two's complement.
    """
    return (tl.minimum(tl.maximum(v, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True)


@jit
def rounded_down(v):
    """floor(v) clipped to [-127, 127]: int32. On a GPU `tl.floor` takes subnormal numbers, negative ones too, as 0."""
    v = tl.minimum(tl.maximum(v, -127.0), 127.0)
    q = v.to(tl.int32)
    return q - (v < q.to(tl.float32)).to(tl.int32)


@jit
def _store_rows(out, q, first_row, first_column, rows, columns):
    """Low bytes of q int32 (P, G, L) to out int8 (T, n), contiguous: row first_row + P g + p, column first_column + l.

    In two dimensions: for a store of the loads' own shape Triton would spread 16 elements to a thread in both, and the
    loads of a warp would no longer lie side by side.
    """
    R: tl.constexpr = q.shape[0] * q.shape[1]
    row, column = first_row + tl.arange(0, R)[:, None], first_column + tl.arange(0, q.shape[2])[None, :]
    value = tl.reshape(tl.permute(q.to(tl.int8), (1, 0, 2)), [R, q.shape[2]])
    tl.store(out + row * columns + column, value, mask=(row < rows) & (column < columns))


@jit
def _store_transposed(votes, q, first_row, first_column, columns, padded):
    """Low bytes of q int32 (P, G, L) to votes (n, padded T), contiguous, in words of P neighbouring tokens.

    A thread holds the P tokens of a word, so only words, a quarter as many as bytes, change hands between threads.
    """
    P: tl.constexpr = q.shape[0]
    words = tl.trans(tl.sum((q & 0xFF) << (8 * tl.arange(0, P))[:, None, None], axis=0))
    column = (first_column + tl.arange(0, q.shape[2]))[:, None]
    word = (first_row // P + tl.arange(0, q.shape[1]))[None, :]
    pointer = votes + column.to(tl.int64) * (padded // P) + word
    tl.store(pointer, words.to(votes.dtype.element_ty), mask=(column < columns) & (word < padded // P))


@jit
def _load_sum(
    x, residual, row, column, rows, columns, x_row, x_column, residual_row, residual_column, ADD: tl.constexpr
):  # fmt: skip
    """x, or x + residual rounded to x's type; zeros outside."""
    mask = (row < rows) & (column < columns)
    value = tl.load(x + row * x_row + column.to(tl.int64) * x_column, mask=mask, other=0.0)
    if ADD:
        other = tl.load(residual + row * residual_row + column.to(tl.int64) * residual_column, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    return value


@jit
def _activation(value, SQUARED_RELU: tl.constexpr):
    """What is normalised: value or relu(value)^2, float32."""
    v = value.to(tl.float32)
    if SQUARED_RELU:
        v = tl.maximum(v, 0.0)
        v = v * v
    return v


@jit
def _rmsnorm_quantize_kernel(
    x, residual, total, grid, votes, inverse_rms, rows, columns, padded,
    x_row, x_column, residual_row, residual_column, steps,
    ADD: tl.constexpr, SQUARED_RELU: tl.constexpr, FOR_VOTES: tl.constexpr,
    PACK: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A program walks over blocks of PACK * GROUPS rows, each twice, PIECES times LANES columns at once.

    Blocks are (PACK, GROUPS, LANES): Triton gives the last axis to the lanes of a warp, the middle one to the warps and
    the first to the registers, so that a row is summed inside one warp and a thread holds PACK neighbouring tokens.
    """
    R: tl.constexpr = PACK * GROUPS
    tl.static_assert(LANES % 32 == 0)
    within = tl.arange(0, PACK)[:, None] + PACK * tl.arange(0, GROUPS)[None, :]
    lanes = tl.arange(0, LANES)[None, None, :]
    for block in range(tl.program_id(0), tl.cdiv(padded, R), tl.num_programs(0)):
        first_row = tl.cast(block, tl.int64) * R
        rows_2 = first_row + within
        row = rows_2[:, :, None]
        sums = tl.zeros([PACK, GROUPS, 32], tl.float64)
        for first in range(0, columns, PIECES * LANES):
            for piece in tl.static_range(PIECES):
                column = first + piece * LANES + lanes
                value = _load_sum(
                    x, residual, row, column, rows, columns, x_row, x_column, residual_row, residual_column, ADD
                )
                if ADD:
                    tl.store(total + row * columns + column, value, mask=(row < rows) & (column < columns))
                v = _activation(value, SQUARED_RELU)
                # The columns of one thread first: few fp64 sums to keep, and to exchange once at the end.
                sums += tl.sum(tl.reshape((v * v).to(tl.float64), [PACK, GROUPS, 32, LANES // 32]), axis=3)
        mean_square = mean_of(tl.sum(sums, axis=2), columns)
        inverse = reciprocal(tl.sqrt_rn(tl.where(mean_square > 1e-30, mean_square, 0.0)), 0.0)
        tl.store(inverse_rms + rows_2, inverse, mask=rows_2 < rows)
        for first in range(0, columns, PIECES * LANES):
            for piece in tl.static_range(PIECES):
                column = first + piece * LANES
                value = _load_sum(
                    x, residual, row, column + lanes, rows, columns, x_row, x_column, residual_row, residual_column, ADD
                )
                q = _nearest(_activation(value, SQUARED_RELU) * inverse[:, :, None] * steps)
                _store_rows(grid, q, first_row, column, rows, columns)
                if FOR_VOTES:
                    _store_transposed(votes, q, first_row, column, columns, padded)


@jit
def _absmax_kernel(delta, largest, n, BLOCK: tl.constexpr, LOOPS: tl.constexpr):
    """largest int32: the bits of max |delta|, which order as the numbers do (a NaN above all): atomics are exact."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * LOOPS)
    top = tl.zeros([BLOCK], tl.int32)
    for loop in tl.static_range(LOOPS):
        place = first + loop * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(delta + place, mask=place < n, other=0.0).to(tl.float32)
        top = tl.maximum(top, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(largest, tl.max(top, axis=0), sem="relaxed")


@jit
def _quantize_delta_kernel(
    delta, sigma, row_words, column_words, grid, votes, rows, columns, padded,
    delta_row, delta_column, sigma_row, word_row, word_column,
    FOR_VOTES: tl.constexpr, PACK: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """PACK * GROUPS rows, every num_programs(1)-th chunk of LANES columns, laid out as in the norm's kernel."""
    first_row = tl.program_id(0).to(tl.int64) * (PACK * GROUPS)
    row = (first_row + tl.arange(0, PACK)[:, None] + PACK * tl.arange(0, GROUPS)[None, :])[:, :, None]
    inverse = reciprocal(tl.load(sigma + row * sigma_row, mask=row < rows, other=0.0), 1e-36)
    row_word = tl.load(row_words + row * word_row, mask=row < rows, other=0)
    for first_column in range(tl.program_id(1) * LANES, columns, tl.num_programs(1) * LANES):
        column = (first_column + tl.arange(0, LANES))[None, None, :]
        wide_column = column.to(tl.int64)
        mask = (row < rows) & (column < columns)
        value = tl.load(delta + row * delta_row + wide_column * delta_column, mask=mask, other=0.0)
        column_word = tl.load(column_words + wide_column * word_column, mask=column < columns, other=0)
        q = rounded_down(value.to(tl.float32) * inverse + dither_at(row_word, column_word))
        _store_rows(grid, q, first_row, first_column, rows, columns)
        if FOR_VOTES:
            # Past the last row q is 0, as the padding must be: floor(u).
            _store_transposed(votes, q, first_row, first_column, columns, padded)


def _rows_and_columns(name: str, t: Tensor) -> tuple[int, int]:
    """Shape of a float matrix with at least one element, or ValueError."""
    if t.dim() != 2 or 0 in t.shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; it needs (T, n) with at least one row and one column")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name}: got {t.dtype}; it takes {', '.join(str(dtype) for dtype in FLOATS)}")
    return t.shape[0], t.shape[1]


def padded_rows(rows: int) -> int:
    """Rows as the transposed copy for the votes has them in memory: a multiple of `VOTES_ALIGNMENT`."""
    return -(-rows // VOTES_ALIGNMENT) * VOTES_ALIGNMENT


def empty_votes(like: Tensor, for_votes: bool) -> Tensor:
    """Memory for the votes' copy of a matrix (T, n): int8 (T, n) with strides (1, padded T); (0, n) if not wanted."""
    rows, columns = like.shape
    if not for_votes:
        return torch.empty((0, columns), dtype=torch.int8, device=like.device)
    return torch.empty((columns, padded_rows(rows)), dtype=torch.int8, device=like.device).t()[:rows]


def _votes_words(votes: Tensor, padded: int, pack: int) -> Tensor:
    """The transposed copy's memory, in words of `pack` tokens."""
    whole = votes.as_strided((votes.shape[1], padded), (padded, 1))
    return whole.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[pack])


def _norm_blocks(columns: int, itemsize: int, add: bool) -> dict[str, int]:
    """PACK, GROUPS, LANES, PIECES and num_warps for rows of `columns` elements.

    One warp for each group. As rows grow a program takes fewer (32, then 16), so that what all programs come back to
    stays in an H200's 50 MB of L2 up to 4,096 columns of 16 bits; longer rows are partly read from memory twice.
    """
    lanes = 32 * 16 // itemsize  # 16 bytes a lane
    chunks = -(-columns // lanes)
    row_bytes = columns * itemsize
    pack, groups = (4, 8) if row_bytes <= 4096 else (2, 16) if row_bytes <= 8192 else (1, 16)
    # As many loads in flight as divide the chunks best and leave two programs of 8 warps room for their registers.
    most = 2 if add else 4 if pack * 16 // itemsize <= 16 else 3
    pieces = min(range(1, most + 1), key=lambda p: (-(-chunks // p) * p, -p))
    return {"PACK": pack, "GROUPS": groups, "LANES": lanes, "PIECES": pieces, "num_warps": groups}


def _programs(device: torch.device, num_warps: int) -> int:
    """Programs that run at once: 16 warps to a multiprocessor."""
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // num_warps)


@torch.library.custom_op("nanogft::rmsnorm_quantize", mutates_args=())
def _rmsnorm_quantize(
    x: Tensor, residual: Tensor | None, act_range: float, squared_relu: bool, for_votes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + residual (nothing without one), X, X for the votes (nothing if not wanted), 1 / rms."""
    rows, columns = x.shape
    padded = padded_rows(rows)
    total = torch.empty((0 if residual is None else rows, columns), dtype=x.dtype, device=x.device)
    grid = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    votes = empty_votes(x, for_votes)
    inverse_rms = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    blocks = _norm_blocks(columns, x.element_size(), residual is not None)
    other = x if residual is None else residual
    programs = min(triton.cdiv(padded, blocks["PACK"] * blocks["GROUPS"]), _programs(x.device, blocks["num_warps"]))
    _rmsnorm_quantize_kernel[(programs,)](
        x, other, total, grid, _votes_words(votes, padded, blocks["PACK"]) if for_votes else grid, inverse_rms,
        rows, columns, padded, *x.stride(), *other.stride(), 127.0 / act_range,
        ADD=residual is not None, SQUARED_RELU=squared_relu, FOR_VOTES=for_votes, **blocks, enable_fp_fusion=False,
    )  # fmt: skip
    return total, grid, votes, inverse_rms


@_rmsnorm_quantize.register_fake
def _(x, residual, act_range, squared_relu, for_votes):
    total = x.new_empty((0 if residual is None else x.shape[0], x.shape[1]))
    inverse_rms = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=torch.int8), empty_votes(x, for_votes), inverse_rms


ABSMAX_BLOCK, ABSMAX_LOOPS = 4096, 4


@torch.library.custom_op("nanogft::absmax", mutates_args=())
def _absmax(delta: Tensor) -> Tensor:
    flat = delta.t().reshape(-1) if delta.dim() == 2 and delta.t().is_contiguous() else delta.reshape(-1)
    largest = torch.zeros((), dtype=torch.int32, device=delta.device)
    programs = triton.cdiv(flat.numel(), ABSMAX_BLOCK * ABSMAX_LOOPS)
    _absmax_kernel[(programs,)](flat, largest, flat.numel(), BLOCK=ABSMAX_BLOCK, LOOPS=ABSMAX_LOOPS, num_warps=8)
    return largest.view(torch.float32)


@_absmax.register_fake
def _(delta):
    return delta.new_empty((), dtype=torch.float32)


# With fewer columns than threads Triton converts the layout of the words; with more, that of the whole block.
DELTA_PACK, DELTA_LANES, DELTA_CHUNKS, DELTA_WARPS = 4, 128, 4, 8


def _delta_groups(itemsize: int) -> int:
    """Groups of rows in a block of `_quantize_delta_kernel`: at 16 bytes a lane a warp has two of 16-bit elements."""
    return DELTA_WARPS * 4 // itemsize


@torch.library.custom_op("nanogft::quantize_delta", mutates_args=())
def _quantize_delta(
    delta: Tensor, sigma: Tensor, row_words: Tensor, column_words: Tensor, for_votes: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = delta.shape
    padded, groups = padded_rows(rows), _delta_groups(delta.element_size())
    grid = torch.empty((rows, columns), dtype=torch.int8, device=delta.device)
    votes = empty_votes(delta, for_votes)
    programs = (triton.cdiv(padded, DELTA_PACK * groups), triton.cdiv(columns, DELTA_CHUNKS * DELTA_LANES))
    _quantize_delta_kernel[programs](
        delta, sigma, row_words, column_words, grid, _votes_words(votes, padded, DELTA_PACK) if for_votes else grid,
        rows, columns, padded, *delta.stride(), sigma.stride(0) if sigma.numel() > 1 else 0,
        row_words.stride(0), column_words.stride(0), FOR_VOTES=for_votes, PACK=DELTA_PACK, GROUPS=groups,
        LANES=DELTA_LANES, num_warps=DELTA_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return grid, votes


@_quantize_delta.register_fake
def _(delta, sigma, row_words, column_words, for_votes):
    return delta.new_empty(delta.shape, dtype=torch.int8), empty_votes(delta, for_votes)


def rmsnorm_quantize(
    x: Tensor, act_range: float, squared_relu: bool = False, for_votes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows and put them on the int8 grid.

    x float32, float16 or bfloat16 (T, n) of any stride, act_range = A. Returns X int8 (T, n), the same values laid out
    for the votes (X itself on the torch backend, or without `for_votes`) and 1 / rms float32 (T, 1), 0 for rows of
    zeros. Raises ValueError on another shape or type, or an empty batch.
    """
    _rows_and_columns("rmsnorm_quantize", x)
    if not on_triton(x):
        grid, inverse_rms = rmsnorm_quantize_torch(x, act_range, squared_relu)
        return grid, grid, inverse_rms
    _, grid, votes, inverse_rms = torch.ops.nanogft.rmsnorm_quantize(x, None, act_range, squared_relu, for_votes)
    return grid, votes if for_votes else grid, inverse_rms


def add_rmsnorm_quantize(
    x: Tensor, residual: Tensor, act_range: float, for_votes: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rmsnorm_quantize` of x + residual, both (T, n) of one type: the sum in that type, then what that returns."""
    _rows_and_columns("add_rmsnorm_quantize", x)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rmsnorm_quantize: got {tuple(x.shape)} {x.dtype} and {tuple(residual.shape)} {residual.dtype}; "
            "x and residual need one shape and one type"
        )
    if not on_triton(x):
        total = x + residual
        return total, *rmsnorm_quantize(total, act_range)
    total, grid, votes, inverse_rms = torch.ops.nanogft.rmsnorm_quantize(x, residual, act_range, False, for_votes)
    return total, grid, votes if for_votes else grid, inverse_rms


def absmax(delta: Tensor) -> Tensor:
    """max |delta| as a float32 scalar tensor; exact, so it does not depend on how the rows are split.

    delta float of any shape; one that is neither contiguous nor the transpose of such a matrix is copied on a GPU.
    Raises ValueError if it is empty.
    """
    if delta.numel() == 0:
        raise ValueError(f"absmax: got shape {tuple(delta.shape)}; it needs at least one element")
    return torch.ops.nanogft.absmax(delta) if on_triton(delta) else absmax_torch(delta)


def quantize_delta(
    delta: Tensor, sigma: Tensor, rows: Tensor, columns: Tensor, for_votes: bool = True
) -> tuple[Tensor, Tensor]:
    """delta / sigma rounded up or down at random: delta float (T, n) of any stride, words int32 (T, 1) and (n,).

    sigma is float32 () for the tensor or (T, 1) for each row. Returns D int8 (T, n), 0 where sigma is 0, and the same
    values laid out for the votes (D itself on the torch backend, or without `for_votes`). Raises ValueError on other
    shapes.
    """
    count, width = _rows_and_columns("quantize_delta", delta)
    if sigma.numel() not in (1, count) or rows.numel() != count or columns.numel() != width:
        raise ValueError(
            f"quantize_delta: got delta {tuple(delta.shape)}, sigma {tuple(sigma.shape)}, words {tuple(rows.shape)} "
            f"and {tuple(columns.shape)}; sigma is () or (T, 1), the words (T, 1) and (n,)"
        )
    if not on_triton(delta):
        d = quantize_delta_torch(delta, sigma, rows, columns)
        return d, d
    d, votes = torch.ops.nanogft.quantize_delta(delta, sigma, rows.reshape(-1), columns.reshape(-1), for_votes)
    return d, votes if for_votes else d


def shipped() -> list[Shipped]:
    """What the launchers run on a GPU, for row-contiguous inputs: each type, short and long rows, every option once."""
    word = {1: "*i8", 2: "*i16", 4: "*i32"}
    found = []
    for dtype, columns, squared_relu, add, for_votes in (
        (torch.float32, 768, False, False, True), (torch.float32, 3072, True, False, True),
        (torch.float16, 384, False, True, True), (torch.bfloat16, 768, False, False, True),
        (torch.bfloat16, 1024, False, True, True), (torch.bfloat16, 3072, True, False, True),
        (torch.bfloat16, 768, False, False, False), (torch.float32, 16384, False, True, True),
    ):  # fmt: skip
        blocks = _norm_blocks(columns, dtype.itemsize, add)
        warps, float_ = blocks.pop("num_warps"), "*" + FLOATS[dtype]
        signature = {
            "x": float_, "residual": float_, "total": float_, "grid": "*i8",
            "votes": word[blocks["PACK"]] if for_votes else "*i8", "inverse_rms": "*fp32", "rows": "i32",
            "columns": "i32", "padded": "i32", "x_row": "i32", "residual_row": "i32", "steps": "fp32",
        }  # fmt: skip
        constants = {"x_column": 1, "residual_column": 1}
        constants |= {"ADD": add, "SQUARED_RELU": squared_relu, "FOR_VOTES": for_votes}
        name = f"{'add_' if add else ''}rmsnorm_quantize {FLOATS[dtype]} {columns}"
        name += " squared_relu" if squared_relu else ""
        name += "" if for_votes else " no votes"
        found.append(Shipped(name, _rmsnorm_quantize_kernel, signature, constants | blocks, warps))
    for dtype, float_ in FLOATS.items():
        signature = {"delta": "*" + float_, "largest": "*i32", "n": "i32"}
        constants = {"BLOCK": ABSMAX_BLOCK, "LOOPS": ABSMAX_LOOPS}
        found.append(Shipped(f"absmax {float_}", _absmax_kernel, signature, constants, num_warps=8))
        signature = {
            "delta": "*" + float_, "sigma": "*fp32", "row_words": "*i32", "column_words": "*i32", "grid": "*i8",
            "votes": "*i32", "rows": "i32", "columns": "i32", "padded": "i32", "delta_row": "i32", "sigma_row": "i32",
        }  # fmt: skip
        constants = {"delta_column": 1, "word_row": 1, "word_column": 1, "FOR_VOTES": True, "PACK": DELTA_PACK}
        constants |= {"GROUPS": _delta_groups(dtype.itemsize), "LANES": DELTA_LANES}
        found.append(Shipped(f"quantize_delta {float_}", _quantize_delta_kernel, signature, constants, DELTA_WARPS))
    return found
