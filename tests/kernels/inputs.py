"""What the kernels' tests share: operands, shapes, layouts in memory, and how results are compared.

Triton's interpreter cuts fp32 to bfloat16 where a GPU rounds it. There, results of that type are compared with a cut
reference (`narrowed`), or may differ in the last bit (`equal`).
"""

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETED

FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# For tests of the Triton kernels. Those of the torch references do without.
kernel_test = pytest.mark.usefixtures("on_triton", "poisoned_memory")


def readable(value: object) -> str | None:
    """Test ids: 7x13 for a shape, float16 for a type, a function's name."""
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return "x".join(map(str, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def int8s(rows: int, columns: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Uniform on -127 .. 127, both ends present where there is room."""
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator(rows, columns, seed))
    if x.numel() > 1:
        x.view(-1)[0], x.view(-1)[-1] = 127, -127
    return x.to(device)


def int32s(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform on all of int32."""
    shape = (rows, columns)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator(*shape)).to(device)


def floats(
    rows: int, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
    decades: int = 2,
) -> Tensor:  # fmt: skip
    """Normal numbers in rows of very different sizes, 10^-decades to 10^decades, one of them all zeros."""
    sizes = torch.logspace(-decades, decades, rows)[:, None]
    x = torch.randn(rows, columns, generator=generator(rows, columns, seed)) * sizes
    if rows > 2:
        x[1] = 0
    return x.to(device, dtype)


# Ragged shapes, and a few for what need not be tried with all of them.
SHAPES = [(1, 1), (1, 300), (7, 1), (13, 37), (37, 7), (63, 123), (123, 64), (300, 13)]
SHORT = [(1, 1), (13, 37), (63, 123)]

# Every shape in float32, a few in the others: the type changes the loads, not what is masked.
typed_shapes = pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in SHAPES), *((shape, dtype) for dtype in FLOATS[1:] for shape in SHORT)],
    ids=readable,
)
squared = pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])


# Layouts: a tensor equal to the one given. Whatever lies between its elements is the worst value there is.


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    worst = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full((rows, columns), worst, dtype=like.dtype, device=like.device)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """Columns lie one after another."""
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    """Neither rows nor columns are contiguous."""
    room = _room(x, 2 * x.shape[0], 3 * x.shape[1])
    room[::2, ::3] = x
    return room[::2, ::3]


def inner_block(x: Tensor) -> Tensor:
    """Rows begin off 16-byte boundaries."""
    room = _room(x, x.shape[0] + 5, x.shape[1] + 3)
    room[2:-3, 1:-2] = x
    return room[2:-3, 1:-2]


def aligned_block(x: Tensor) -> Tensor:
    """Rows begin on 16-byte boundaries, though something else follows each of them."""
    room = _room(x, x.shape[0] + 2, -(-x.shape[1] // 16) * 16 + 32)
    room[1:-1, 16 : 16 + x.shape[1]] = x
    return room[1:-1, 16 : 16 + x.shape[1]]


LAYOUTS = [contiguous, transposed, every_other, inner_block, aligned_block]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=readable)


# Comparing


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y float32 as a kernel stores it: rounded, but for bfloat16 in the interpreter."""
    if INTERPRETED and dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -(2**16)).view(torch.float32)
    return y.to(dtype)


def equal(found: Tensor, expected: Tensor) -> bool:
    """torch.equal; in the interpreter bfloat16 may differ in the last bit."""
    if not INTERPRETED or found.dtype != torch.bfloat16:
        return torch.equal(found, expected)
    distance = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    return found.shape == expected.shape and expected.dtype == torch.bfloat16 and distance.max().item() <= 1


def opaque(function):
    """The function compiled whole, without a C++ compiler: it must trace, and operators' shapes must be right."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


BAND = 4096  # elements before and after a guarded result


def guard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Have torch.empty and torch.zeros hand out memory between bands of known bytes; `untouched` looks at those."""
    bands = []
    empty = torch.empty

    def guarded(shape, dtype, device, value: int) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        room = empty(count + 2 * BAND, dtype=torch.uint8, device=device).fill_(0x5A)
        bands.append((room[:BAND], room[BAND + count :]))
        return room[BAND : BAND + count].fill_(value).view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: guarded(shape, dtype, device, 0xFF))
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: guarded(shape, dtype, device, 0))
    return bands


def untouched(bands: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether something was allocated, and nothing was written beside it."""
    return bool(bands) and all((band == 0x5A).all() for pair in bands for band in pair)
