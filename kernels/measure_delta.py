"""Delta's own scale, and what follows from it, in one pass that only reads.

    sigma = max|delta| / levels

A kernel that writes delta can note the largest |delta| of each part that it writes (`with_largest`). Whoever puts delta
on a grid then measures the note, which has the same largest value, and need not read delta for it. The noise that
rounds delta needs none of this, so that `prepare_delta` draws it in the same launch.

Memory, for delta (T, n) of b bytes an element: b T n read, 16 bytes written; 2 operations an element. For noise 4
bytes written and 100 operations for each row and each column.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, operator, tl, triton, wrap_triton
from kernels.fuse import fused
from kernels.philox import NOISE_PART, check_rng, draw_noise, noise_torch
from kernels.rmsnorm_quantize import check_rows

TINY = torch.finfo(torch.float32).tiny
BLOCK = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}  # rows and columns of a program


# The torch reference


@fused
def absmax_torch(delta: Tensor) -> Tensor:
    """`absmax` in torch."""
    low, high = torch.aminmax(delta)
    return torch.maximum(high, -low).to(torch.float32)


def measure_delta_torch(delta: Tensor, scale: Tensor, votes_scale: Tensor, levels: int) -> Tensor:
    """`measure_delta` in torch."""
    largest = absmax_torch(delta)
    sigma = largest / torch.full_like(largest, levels)  # a GPU multiplies by 1 / levels if that is a Python number
    largest = torch.maximum(votes_scale, sigma).clamp_min(TINY)
    measured = torch.stack((sigma, votes_scale / largest, sigma / largest, scale * sigma))
    votes_scale.copy_(largest)
    return measured


# The kernel


@jit
def block_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's block: its rows (ROWS, 1) and columns (1, COLUMNS), int64, and its mask.

    It takes no pointer: torch.compile believes that a kernel writes to every pointer that a function got from whose
    results it makes the address of a store.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < columns)


@jit
def largest_of(value):
    """The largest |value| of a float32 block: float32, NaN if there is one.

    The bits of positive numbers order as the numbers do, and those of a NaN come after all of them.
    """
    return tl.max(tl.ravel(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=0).to(tl.float32, bitcast=True)


@jit
def _measure(
    delta, scale, votes_scale, scratch, measured, blocks, rows, columns, delta_row, delta_column, LEVELS: tl.constexpr,
    TINY: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block's largest |delta| to scratch[0]; the program that comes last, by scratch[1], writes what follows from it.
    One that is ALONE does so at once: each of the others' atomic operations takes as long as all else."""
    before, own = tl.load(votes_scale), tl.load(scale)  # first, so that they come while delta does
    row, column, mask = block_of(rows, columns, ROWS, COLUMNS)
    value = tl.load(delta + row * delta_row + column * delta_column, mask=mask, other=0.0).to(tl.float32)
    largest, last = largest_of(value), True
    if not ALONE:
        tl.atomic_max(scratch, largest.to(tl.int32, bitcast=True))
        last = tl.atomic_add(scratch + 1, 1) == blocks - 1
    if last:
        if not ALONE:
            largest = tl.atomic_xchg(scratch, 0).to(tl.float32, bitcast=True)  # both are 0 again, for the next launch
            tl.atomic_xchg(scratch + 1, 0)
        place = tl.arange(0, 4)
        none = tl.zeros((4,), tl.float32)
        sigma = tl.div_rn(none + largest, none + LEVELS)
        top = tl.maximum(tl.maximum(none + before, sigma, tl.PropagateNan.ALL), TINY, tl.PropagateNan.ALL)
        tl.debug_barrier()  # every thread has read votes_scale
        tl.store(votes_scale + none.to(tl.int32), top, mask=place == 0)
        ratio = tl.div_rn(tl.where(place == 1, before, sigma), top)
        tl.store(measured + place, tl.where(place == 0, sigma, tl.where(place == 3, sigma * own, ratio)))


@jit
def _measure_delta_kernel(
    delta, scale, votes_scale, scratch, measured, noise, rng, rows, columns, delta_row, delta_column, noise_rows,
    noise_columns, first_column, LEVELS: tl.constexpr, TINY: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The first programs measure a block of delta each. If there is `noise`, those after them draw a part of it each:
    so small are both that most of a launch of its own would be its beginning and its end."""
    bands = tl.cdiv(rows, ROWS)
    if tl.program_id(0) < bands:
        _measure(
            delta, scale, votes_scale, scratch, measured, bands * tl.num_programs(1), rows, columns, delta_row,
            delta_column, LEVELS, TINY, ALONE, ROWS, COLUMNS,
        )  # fmt: skip
    if noise is not None:
        if tl.program_id(0) >= bands:
            part = (tl.program_id(0) - bands) * tl.num_programs(1) + tl.program_id(1)
            draw_noise(noise, rng, noise_rows, noise_columns, first_column, part, PART)


# Launching


def grid_of(rows: int, columns: int, block: dict[str, int] = BLOCK) -> tuple[int, int]:
    return triton.cdiv(rows, block["ROWS"]), triton.cdiv(columns, block["COLUMNS"])


def _row_of(columns: int) -> dict[str, int]:
    """The block for one row, as a note of largest values is: all of it for one program, if it is not too long."""
    return {"ROWS": 1, "COLUMNS": min(16384, max(128, triton.next_power_of_2(columns))), "num_warps": 8}


def _launch_measure_delta(
    delta: Tensor, scale: Tensor, votes_scale: Tensor, scratch: Tensor, levels: int, noise: Tensor | None = None,
    rng: Tensor | None = None, noise_rows: int = 0, first_column: int = 0, noise_columns: int = 0,
) -> Tensor:  # fmt: skip
    rows, columns = delta.shape
    measured = torch.empty((4,), dtype=torch.float32, device=delta.device)
    block = BLOCK if rows > 1 else _row_of(columns)
    bands, across = grid_of(rows, columns, block)
    drawing = triton.cdiv(triton.cdiv(noise_rows + noise_columns, NOISE_PART), across)
    wrap_triton(_measure_delta_kernel)[(bands + drawing, across)](
        delta=delta,
        scale=scale,
        votes_scale=votes_scale,
        scratch=scratch,
        measured=measured,
        noise=noise,
        rng=rng,
        rows=rows,
        columns=columns,
        delta_row=delta.stride(0),
        delta_column=delta.stride(1),
        noise_rows=noise_rows,
        noise_columns=noise_columns,
        first_column=first_column,
        LEVELS=levels,
        TINY=TINY,
        ALONE=(bands, across) == (1, 1),
        PART=NOISE_PART,
        **block,
    )
    return measured


@operator("measure_delta", mutates_args=("votes_scale", "scratch"))
def _measure_delta(delta: Tensor, scale: Tensor, votes_scale: Tensor, scratch: Tensor, levels: int) -> Tensor:
    return _launch_measure_delta(delta, scale, votes_scale, scratch, levels)


@operator("prepare_delta", mutates_args=("votes_scale", "scratch"))
def _prepare_delta(
    delta: Tensor, scale: Tensor, votes_scale: Tensor, scratch: Tensor, levels: int, rng: Tensor, rows: int,
    first_column: int, columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    noise = torch.empty((rows + columns,), dtype=torch.int32, device=delta.device)
    about_noise = (noise, rng, rows, first_column, columns)
    return _launch_measure_delta(delta, scale, votes_scale, scratch, levels, *about_noise), noise


def with_largest(delta: Tensor, largest: Tensor) -> Tensor:
    """delta, with the largest |delta| of each part of it noted for whoever puts it on a grid: float32 (parts,).

    The note goes with this tensor alone, not with a view or a copy, and is void once delta is changed in place. Torch
    does not count changes through `.data` or by a collective: hand on a copy after those.
    """
    if not torch.compiler.is_compiling():
        delta.largest = (largest, delta._version)
    return delta


def largest_noted(delta: Tensor) -> Tensor | None:
    """What `with_largest` noted, float32 (parts,), if it still holds."""
    if torch.compiler.is_compiling():
        return None
    largest, version = getattr(delta, "largest", (None, 0))
    return largest if version == delta._version else None


def note_as(view: Tensor, delta: Tensor) -> None:
    """Note for a view of delta what is noted for delta."""
    if (largest := largest_noted(delta)) is not None:
        with_largest(view, largest)


def absmax(delta: Tensor) -> Tensor:
    """max |delta| as a float32 scalar tensor; exact, so it does not depend on how the rows are split.

    delta float of any shape and stride. Raises ValueError if it is empty.
    """
    if delta.numel() == 0:
        raise ValueError(f"absmax: got shape {tuple(delta.shape)}; it needs at least one element")
    if not on_triton(delta):
        return absmax_torch(delta)
    none = torch.zeros((), dtype=torch.float32, device=delta.device)
    scratch = torch.zeros((2,), dtype=torch.int32, device=delta.device)
    rows = delta if delta.dim() == 2 else delta.reshape(-1, delta.shape[-1] if delta.dim() else 1)
    return _measure_delta(rows, none, none.clone(), scratch, 1)[0]


def measure_delta(delta: Tensor, scale: Tensor, votes_scale: Tensor, scratch: Tensor, levels: int = 127) -> Tensor:
    """Delta's own scale and the three numbers that follow from it, float32 (4,):

        sigma = max|delta| / levels
        votes_scale / top and sigma / top, where top = max(votes_scale, sigma), which becomes the new votes_scale
        scale * sigma

    delta float (T, n) of any stride; scale, the weight's, and votes_scale float32 (); scratch int32 (2,), zeros before
    and after. Where delta has a NaN, so has the result. Raises ValueError on another shape or type of delta.
    """
    check_rows("measure_delta", delta)
    if not on_triton(delta):
        return measure_delta_torch(delta, scale, votes_scale, levels)
    return _measure_delta(delta, scale, votes_scale, scratch, levels)


def prepare_delta(
    delta: Tensor, scale: Tensor, votes_scale: Tensor, scratch: Tensor, levels: int, rng: Tensor, rows: int,
    first_column: int, columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`measure_delta`, and `noise_from` for rounding: all that delta waits for on its way to the grid, in one launch.

    `rows` and `columns` are those to be rounded: delta (T, n) may be a note about them. Raises ValueError as they do.
    """
    check_rows("prepare_delta", delta)
    check_rng("prepare_delta", rng)
    if not on_triton(delta):
        noise = noise_torch(rng, rows, first_column, columns)
        return measure_delta_torch(delta, scale, votes_scale, levels), noise
    return _prepare_delta(delta, scale, votes_scale, scratch, levels, rng, rows, first_column, columns)


def launch_configs() -> list[LaunchConfig]:
    """Row-contiguous inputs of 32 and of 16 bits, and a note; each also with noise."""
    found = []
    pointers = {"scratch": "*i32"} | dict.fromkeys(("scale", "votes_scale", "measured"), "*fp32")
    shape = {"rows": "i32", "columns": "i32", "delta_row": "i32"}
    noise = {"noise": "*i32", "rng": "*i64"} | dict.fromkeys(("noise_rows", "noise_columns", "first_column"), "i32")
    for name, float_, block in (("fp32", "fp32", BLOCK), ("bf16", "bf16", BLOCK), ("note", "fp32", _row_of(16384))):
        constants = {"delta_column": 1, "LEVELS": 127, "TINY": TINY, "ALONE": name == "note", "PART": NOISE_PART}
        constants |= block
        signature = {"delta": f"*{float_}"} | pointers | shape
        for about, given, left in (("", {}, noise), (" and noise", noise, {})):
            found.append(LaunchConfig(
                name + about, _measure_delta_kernel, signature | given, constants | dict.fromkeys(left), exact=True
            ))  # fmt: skip
    return found
