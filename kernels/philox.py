"""Philox4x32-10: randomness as a function of (seed, step, stream, element).

    words(seed, step, stream, n, start)[e] = word (start + e) % 4 of
        philox4x32_10(counter = (g low, g high, step, stream), key = (seed low, seed high)),   g = (start + e) // 4

Nothing random is a state, so nothing random is checkpointed, and any part of a batch can draw its own
numbers without knowing the rest. The generator is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011); `tl.randint4x` is the same function with step = stream = 0.

Rounding needs one number per element of delta, millions a step. `dither` makes them out of one word per
row and one per column, u[t, c] = (a[t] + b[c]) mod 1. Every u is uniform and every two are independent
(two in one row differ by b[c] - b[c'], themselves independent), which is all that the mean and the
variance of a rounded sum depend on; only the four corners of a rectangle are tied together. It costs
rows + columns draws instead of rows x columns.

Training reads `rng`, an int64 tensor (3,) = [seed, step, rows seen in this step] on the layer's device, so that a step
can be captured in a CUDA graph: kernels load it (`philox_words`, `dither_word` and `dither_at` below are called by
every kernel that is random), `words_from`, `uniform_from` and `noise_from` are for torch. `_words_kernel` and
`_noise_kernel` fill a tensor on the GPU: 8 or 4 bytes written, 10 rounds (about 80 integer operations) for each word.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, opaque_operator, operator, tl, triton, wrap_triton
from kernels.philox_words import Stream, words

DITHER_BITS = 23  # a + b then fits 24 bits, which fp32 holds exactly
NOISE_BLOCK = 8192  # elements of noise that torch draws, and keeps, at once
WORDS_BLOCK = 1024  # words of a program
NOISE_PART = 256  # numbers of noise that a program draws


def uniform(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) with 32 bits each: float64 on the CPU, shape (n,)."""
    return torch.from_numpy(words(seed, step, stream, n, start) * 2.0**-32)


def normal(seed: int, step: int, stream: int, n: int, start: int = 0) -> Tensor:
    """Standard normal numbers by the inverse distribution function: float64 on the CPU, shape (n,)."""
    return torch.special.ndtri(uniform(seed, step, stream, n, start) + 2.0**-33)


def dither(row_noise: Tensor, col_noise: Tensor) -> Tensor:
    """u[t, c] in [0, 1) from int32 noise: rows (..., T, 1) and columns (..., 1, C) give float32 (..., T, C)."""
    return (row_noise + col_noise).bitwise_and_(2**DITHER_BITS - 1).to(torch.float32).mul_(2.0**-DITHER_BITS)


def check_rng(name: str, rng: Tensor) -> None:
    """Raises ValueError where rng has not the shape and the type of `make_rng`'s."""
    if rng.shape != (3,) or rng.dtype != torch.int64:
        raise ValueError(f"{name}: got rng {rng.dtype} {tuple(rng.shape)}; it is torch.int64 (3,)")


def make_rng(seed: int, device: torch.device | str | None = None) -> Tensor:
    """int64 (3,): the seed's low 64 bits, step 0, no rows seen."""
    low = seed & (2**64 - 1)
    return torch.tensor([low - 2**64 if low >> 63 else low, 0, 0], device=device)


# In kernels

ROWS_STREAM = tl.constexpr(Stream.ROWS) if triton else None
COLUMNS_STREAM = tl.constexpr(Stream.COLUMNS) if triton else None
TOPK_STREAM = tl.constexpr(Stream.TOPK) if triton else None
MOMENTUM_ROWS_STREAM = tl.constexpr(Stream.MOMENTUM_ROWS) if triton else None
MOMENTUM_COLUMNS_STREAM = tl.constexpr(Stream.MOMENTUM_COLUMNS) if triton else None


@jit
def philox_words(seed, step, stream, element):
    """`words` in a kernel: the uint32 word of each element, int64 (a block or a scalar); the rest are scalars."""
    element = tl.cast(element, tl.int64)
    group = element >> 2
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    step32, stream32 = tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, step32, stream32)
    place = element & 3
    return tl.where(place < 2, tl.where(place == 0, word_0, word_1), tl.where(place == 2, word_2, word_3))


@jit
def dither_word(seed, step, stream, element):
    """`noise_from` in a kernel: the int32 noise in [0, 2^23) of each element, int64 as for `philox_words`."""
    return (philox_words(seed, step, stream, element) >> 9).to(tl.int32)


@jit
def draw_noise(noise, rng, rows, columns, first_column, part, PART: tl.constexpr):
    """Numbers part * PART and on of `noise_from`, to noise int32 (rows + columns,)."""
    place = part.to(tl.int64) * PART + tl.arange(0, PART)
    seed, step, rows_seen = tl.load(rng), tl.load(rng + 1), tl.load(rng + 2)
    of_row = place < rows
    stream = tl.where(of_row, ROWS_STREAM, COLUMNS_STREAM)
    element = tl.where(of_row, rows_seen + place, first_column + place - rows)
    tl.store(noise + place, dither_word(seed, step, stream, element), mask=place < rows + columns)


@jit
def dither_at(row_noise, col_noise):
    """`dither` in a kernel: u float32 in [0, 1) from int32 noise that broadcasts, say (T, 1) and (1, C)."""
    return ((row_noise + col_noise) & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07  # 2^-23, exactly


@jit
def _words_kernel(out, rng, layers, stream_id, start, count, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    if layers is not None:
        stream_id += 16 * tl.load(layers + row)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = philox_words(tl.load(rng), tl.load(rng + 1), stream_id, start + place)
    tl.store(out + row * count + place, word.to(tl.int64), mask=place < count)


@jit
def _noise_kernel(noise, rng, rows, columns, first_column, PART: tl.constexpr):
    draw_noise(noise, rng, rows, columns, first_column, tl.program_id(0), PART)


# For torch


def _empty_words(rng: Tensor, stream: int, count: int, start: int = 0, layers: Tensor | None = None) -> Tensor:
    return rng.new_empty(count if layers is None else (len(layers), count))


@opaque_operator("words_torch", fake=_empty_words)
def words_torch(rng: Tensor, stream: int, count: int, start: int = 0, layers: Tensor | None = None) -> Tensor:
    """`words_from` in torch. It reads `rng` on the host."""
    seed, step = rng[:2].tolist()
    streams = stream if layers is None else stream + 16 * layers.cpu().numpy()
    return torch.from_numpy(words(seed, step, streams, count, start).astype(np.int64)).to(rng.device)


@operator("words")
def words_triton(rng: Tensor, stream: int, count: int, start: int = 0, layers: Tensor | None = None) -> Tensor:
    """`words_from` on a GPU."""
    shape = (count,) if layers is None else (layers.shape[0], count)
    out = torch.empty(shape, dtype=torch.int64, device=rng.device)
    wrap_triton(_words_kernel)[(triton.cdiv(count, WORDS_BLOCK), 1 if layers is None else layers.shape[0])](
        out=out,
        rng=rng,
        layers=layers,
        stream_id=stream,
        start=start,
        count=count,
        BLOCK=WORDS_BLOCK,
    )
    return out


def words_from(rng: Tensor, stream: int, count: int, start: int = 0, layers: Tensor | None = None) -> Tensor:
    """Words start .. start + count - 1 of the step for `stream`: int64 (count,) below 2^32, on rng's device.

    With `layers`, int64 (L,), those of each layer's own stream: (L, count). Where Triton kernels run, nothing is read
    on the host.
    """
    return (words_triton if on_triton(rng) else words_torch)(rng, stream, count, start, layers)


def uniform_from(rng: Tensor, stream: int, count: int, start: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) with 32 bits each: float64 (count,) on rng's device."""
    return words_from(rng, stream, count, start).to(torch.float64) * 2.0**-32


@functools.lru_cache(maxsize=8)
def _noise_block(seed: int, step: int, stream: int, block: int) -> Tensor:
    """Noise of elements block * NOISE_BLOCK and on: int32 (NOISE_BLOCK,). All layers of a step share a few blocks."""
    found = words(seed, step, stream, NOISE_BLOCK, block * NOISE_BLOCK) >> np.uint64(32 - DITHER_BITS)
    return torch.from_numpy(found.astype(np.int32))


def _noise(seed: int, step: int, stream: int, start: int, count: int) -> Tensor:
    first, last = start // NOISE_BLOCK, (start + count - 1) // NOISE_BLOCK
    parts = []
    for block in range(first, last + 1):
        begin = block * NOISE_BLOCK
        parts.append(_noise_block(seed, step, stream, block)[max(start - begin, 0) : start + count - begin])
    return torch.cat(parts)


def _empty_noise(
    rng: Tensor, rows: int, first_column: int, columns: int, row_stream: int = 0, col_stream: int = 0
) -> Tensor:
    return rng.new_empty((rows + columns,), dtype=torch.int32)


@opaque_operator("noise_torch", fake=_empty_noise)
def noise_torch(
    rng: Tensor, rows: int, first_column: int, columns: int, row_stream: int = Stream.ROWS,
    col_stream: int = Stream.COLUMNS,
) -> Tensor:  # fmt: skip
    """`noise_from` in torch. It reads `rng` on the host."""
    seed, step, row = rng.tolist()
    of_rows = _noise(seed, step, row_stream, row, rows)
    return torch.cat([of_rows, _noise(seed, step, col_stream, first_column, columns)]).to(rng.device)


@operator("noise")
def noise_triton(rng: Tensor, rows: int, first_column: int, columns: int) -> Tensor:
    """`noise_from` on a GPU."""
    noise = torch.empty((rows + columns,), dtype=torch.int32, device=rng.device)
    wrap_triton(_noise_kernel)[(triton.cdiv(rows + columns, NOISE_PART),)](
        noise=noise,
        rng=rng,
        rows=rows,
        columns=columns,
        first_column=first_column,
        PART=NOISE_PART,
    )
    return noise


def noise_from(rng: Tensor, rows: int, first_column: int, columns: int) -> Tensor:
    """What `dither` wants for the next `rows` tokens, then for `columns` columns from `first_column` on.

    int32 (rows + columns,) in [0, 2^23), on rng's device. Drawn once, not by each block of delta that needs it. Raises
    ValueError on another shape or type of rng.
    """
    check_rng("noise_from", rng)
    return (noise_triton if on_triton(rng) else noise_torch)(rng, rows, first_column, columns)


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check philox` compiles."""
    signature = {"out": "*i64", "rng": "*i64", "layers": "*i64", "stream_id": "i32", "start": "i32", "count": "i32"}
    noise = {"noise": "*i32", "rng": "*i64", "rows": "i32", "columns": "i32", "first_column": "i32"}
    return [
        LaunchConfig("words", _words_kernel, signature, {"BLOCK": WORDS_BLOCK}),
        LaunchConfig("noise", _noise_kernel, noise, {"PART": NOISE_PART}),
    ]
