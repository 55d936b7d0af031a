"""The kernels of quantize.py and rmsnorm.py against their torch references, bit for bit.

    python -m pytest -q tests/kernels/test_triton_quantize.py

Triton's interpreter cuts numbers to bfloat16 where a GPU rounds them: there, and only for outputs of that type, the
last bit may differ.
"""

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETED
from kernels.philox import Stream, dither_words
from kernels.quantize import (
    absmax,
    absmax_torch,
    add_rmsnorm_quantize,
    quantize_delta,
    quantize_delta_torch,
    rmsnorm_quantize,
    rmsnorm_quantize_torch,
)
from kernels.rmsnorm import MAX_COLUMNS, rmsnorm_backward, rmsnorm_backward_torch

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

SHAPES = [(1, 1), (1, 300), (7, 1), (13, 37), (37, 7), (63, 123), (123, 64), (300, 13)]
SHORT = [(1, 1), (13, 37), (63, 123)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every shape in float32, a few in the others: the type changes the block, not what is masked.
typed_shapes = pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in SHAPES), *((shape, dtype) for dtype in DTYPES[1:] for shape in SHORT)],
    ids=lambda value: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
short = pytest.mark.parametrize("shape", SHORT, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
squared = pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])

LAYOUTS = {
    "rows": lambda t: t,
    "columns": lambda t: t.t().contiguous().t(),
    "narrow": lambda t: guarded(t)[1],
    "strided": lambda t: t.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3],
}
layouts = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A view equal to t inside a frame of the worst values, and the whole: (whole, view)."""
    worst = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).min
    whole = torch.full((t.shape[0] + 4, t.shape[1] + 6), worst, dtype=t.dtype, device=t.device)
    view = whole[2:-2, 3:-3]
    view.copy_(t)
    return whole, view


def floats(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(1000 * shape[0] + shape[1] + seed)
    sizes = torch.logspace(-2, 2, shape[0])[:, None]
    x = torch.randn(shape, generator=generator) * sizes
    if shape[0] > 2:
        x[1] = 0
    return x.to(dtype).to(device)


def equal(found: Tensor, expected: Tensor) -> bool:
    """torch.equal; in the interpreter bfloat16 may differ in the last bit."""
    if not INTERPRETED or found.dtype != torch.bfloat16:
        return torch.equal(found, expected)
    distance = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    return found.shape == expected.shape and expected.dtype == torch.bfloat16 and distance.max().item() <= 1


def assert_grid(found: tuple[Tensor, Tensor, Tensor], x: Tensor, act_range: float, squared_relu: bool) -> None:
    """What `rmsnorm_quantize` returned for x is right, and the votes' copy is laid out as promised."""
    grid, votes, inverse_rms = found
    expected_grid, expected_inverse = rmsnorm_quantize_torch(x, act_range, squared_relu)
    assert grid.dtype == torch.int8 and grid.is_contiguous() and torch.equal(grid, expected_grid)
    assert torch.equal(inverse_rms, expected_inverse)
    assert_votes(votes, expected_grid)


def assert_votes(votes: Tensor, expected: Tensor) -> None:
    padded = -(-expected.shape[0] // 16) * 16
    assert votes.dtype == torch.int8 and votes.stride() == (1, padded) and torch.equal(votes, expected)
    memory = votes.as_strided((votes.shape[1], padded), (padded, 1))
    assert (memory[:, votes.shape[0] :] == 0).all()


@typed_shapes
@squared
def test_activations(shape, dtype, squared_relu, device):
    x = floats(shape, dtype, device)
    assert_grid(rmsnorm_quantize(x, 6.0, squared_relu), x, 6.0, squared_relu)


@short
@layouts
def test_activations_of_any_layout(shape, layout, device):
    x = floats(shape, torch.float32, device)
    assert_grid(rmsnorm_quantize(layout(x), 6.0), x, 6.0, False)


@pytest.mark.parametrize(
    "n, dtype",
    [(700, torch.float32), (1100, torch.float32), (2100, torch.float32), (1100, torch.float16), (2100, torch.bfloat16)],
    ids=str,
)
def test_activations_of_long_rows(n, dtype, device):
    """Each size of block, and several rounds of each loop."""
    x = floats((19, n), dtype, device)
    assert_grid(rmsnorm_quantize(x, 6.0, True), x, 6.0, True)


@pytest.mark.parametrize("act_range", [0.01, 4.0, 1e4], ids=str)
def test_activations_clip_and_round_as_the_reference(act_range, device):
    x = floats((13, 123), torch.float32, device)
    assert_grid(rmsnorm_quantize(x, act_range), x, act_range, False)


def test_halves_go_to_even(device):
    row = torch.tensor([[1.0, -1.0, 1.0, -1.0]], device=device)
    for value, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (126.5, 126), (200.0, 127)):
        assert rmsnorm_quantize(row, 127 / value)[0].tolist() == [[expected, -expected, expected, -expected]]


def test_rows_without_a_direction(device):
    x = floats((7, 37), torch.float32, device)
    x[2] = 1e-16  # mean square below SMALLEST_MEAN_SQUARE
    x[3] = 1e-14
    found = rmsnorm_quantize(x, 6.0)
    assert_grid(found, x, 6.0, False)
    assert found[2][2] == 0 and (found[0][2] == 0).all() and found[2][3] > 0


@typed_shapes
def test_activations_of_a_sum(shape, dtype, device):
    x, residual = floats(shape, dtype, device), floats(shape, dtype, device, seed=1)
    total, *found = add_rmsnorm_quantize(x, residual, 6.0)
    assert total.dtype == dtype and equal(total, x + residual)
    assert_grid(tuple(found), total, 6.0, False)


@short
@layouts
def test_a_sum_of_any_layout(shape, layout, device):
    x, residual = floats(shape, torch.float16, device), floats(shape, torch.float16, device, seed=1)
    for a, b in ((layout(x), residual), (x, layout(residual))):
        total, *found = add_rmsnorm_quantize(a, b, 6.0)
        assert torch.equal(total, x + residual)
        assert_grid(tuple(found), total, 6.0, False)


def test_a_sum_of_long_rows(device):
    x, residual = floats((19, 1100), torch.float32, device), floats((19, 1100), torch.float32, device, seed=1)
    total, *found = add_rmsnorm_quantize(x, residual, 6.0)
    assert torch.equal(total, x + residual)
    assert_grid(tuple(found), total, 6.0, False)


def test_without_the_copy_for_the_votes(device):
    x, words = floats((13, 37), torch.float32, device), (rows_of(13, device), columns_of(37, device))
    grid, votes, _ = rmsnorm_quantize(x, 6.0, for_votes=False)
    assert votes is grid and torch.equal(grid, rmsnorm_quantize(x, 6.0)[0])
    _, grid, votes, _ = add_rmsnorm_quantize(x, x, 6.0, for_votes=False)
    assert votes is grid and torch.equal(grid, rmsnorm_quantize(x + x, 6.0)[0])
    d, votes = quantize_delta(x, absmax(x) / 127, *words, for_votes=False)
    assert votes is d and torch.equal(d, quantize_delta(x, absmax(x) / 127, *words)[0])


# delta


def rows_of(count: int, device: torch.device) -> Tensor:
    return dither_words(5, 6, Stream.ROWS, count, device=device)[:, None]


def columns_of(count: int, device: torch.device) -> Tensor:
    return dither_words(5, 6, Stream.COLUMNS, count, device=device)


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (300, 200)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_absmax(shape, dtype, device):
    x = floats(shape, dtype, device)
    for t in (x, x.abs(), -x.abs()):
        assert absmax(t).dtype == torch.float32 and torch.equal(absmax(t), absmax_torch(t))


@layouts
def test_absmax_of_any_layout(layout, device):
    x = floats((63, 37), torch.float32, device)
    assert torch.equal(absmax(layout(x)), absmax_torch(x))
    assert torch.equal(absmax(x.flatten()), absmax_torch(x)) and torch.equal(absmax(x[0, 0]), x[0, 0].abs())


def test_absmax_sees_infinities_and_nans(device):
    x = floats((63, 37), torch.float32, device)
    x[62, 36] = -float("inf")
    assert absmax(x) == float("inf")
    x[0, 0] = -float("nan")
    assert absmax(x).isnan()


@typed_shapes
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
def test_delta(shape, dtype, per_row, device):
    delta = floats(shape, dtype, device)
    sigma = delta.float().abs().amax(dim=1, keepdim=True) / 127 if per_row else absmax(delta) / 127
    words = rows_of(shape[0], device), columns_of(shape[1], device)
    d, votes = quantize_delta(delta, sigma, *words)
    expected = quantize_delta_torch(delta, sigma, *words)
    assert d.dtype == torch.int8 and d.is_contiguous() and torch.equal(d, expected)
    assert_votes(votes, expected)


@short
@layouts
def test_delta_of_any_layout(shape, layout, device):
    delta, sigma = floats(shape, torch.float32, device), torch.rand(shape[0], 1, device=device) + 0.01
    rows, columns = rows_of(shape[0], device), columns_of(shape[1], device)
    d, votes = quantize_delta(layout(delta), layout(sigma), layout(rows), layout(columns[None, :])[0])
    expected = quantize_delta_torch(delta, sigma, rows, columns)
    assert torch.equal(d, expected)
    assert_votes(votes, expected)


def test_delta_of_long_rows(device):
    delta, words = floats((37, 1300), torch.float16, device), (rows_of(37, device), columns_of(1300, device))
    d, votes = quantize_delta(delta, absmax(delta) / 127, *words)
    assert torch.equal(d, quantize_delta_torch(delta, absmax(delta) / 127, *words))
    assert_votes(votes, d)


def test_delta_at_the_edges(device):
    """Clipping both ways, a sigma of zero, and a number far below one: its floor is -1 unless u lifts it."""
    delta = torch.tensor([[1.0, -1.0, 1e30, -1e30], [1e-42, -1e-42, 0.0, -0.0]], device=device)
    rows = torch.tensor([[0], [0]], dtype=torch.int32, device=device)
    columns = torch.tensor([0, 0, 2**23 - 1, 0], dtype=torch.int32, device=device)
    for sigma, expected in ((1.0, [[1, -1, 127, -127], [0, -1, 0, 0]]), (0.0, [[0] * 4] * 2), (1e-3, None)):
        found = quantize_delta(delta, torch.tensor(sigma, device=device), rows, columns)
        assert torch.equal(found[0], quantize_delta_torch(delta, torch.tensor(sigma, device=device), rows, columns))
        assert torch.equal(*found) and (expected is None or found[0].tolist() == expected)


# backward


def products(shape: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator).to(device)


@typed_shapes
@squared
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_rmsnorm_backward(shape, dtype, squared_relu, with_residual, device):
    x, product, scale = floats(shape, dtype, device), products(shape, device), torch.tensor(3e-9, device=device)
    inverse = rmsnorm_quantize(x, 6.0, squared_relu)[2]
    residual = floats(shape, dtype, device, seed=2) if with_residual else None
    delta = rmsnorm_backward(product, scale, x, inverse, squared_relu, residual)
    assert delta.dtype == dtype
    assert equal(delta, rmsnorm_backward_torch(product, scale, x, inverse, squared_relu, residual))
    assert with_residual or shape[0] <= 2 or (delta[1] == 0).all()


@short
@layouts
def test_rmsnorm_backward_of_any_layout(shape, layout, device):
    x, product = floats(shape, torch.float32, device), products(shape, device)
    residual = floats(shape, torch.float16, device, seed=2)
    scale, inverse = torch.rand(shape[0], 1, device=device) * 1e-9, rmsnorm_quantize(x, 6.0)[2]
    found = rmsnorm_backward(layout(product), layout(scale), layout(x), layout(inverse), False, layout(residual))
    assert torch.equal(found, rmsnorm_backward_torch(product, scale, x, inverse, False, residual))


@dtypes
def test_rmsnorm_backward_of_float_products_and_long_rows(dtype, device):
    x, product = floats((5, 3000), torch.float32, device), floats((5, 3000), dtype, device, seed=3)
    inverse, one = rmsnorm_quantize(x, 6.0)[2], torch.tensor(1.0, device=device)
    found = rmsnorm_backward(product, one, x, inverse)
    assert torch.equal(found, rmsnorm_backward_torch(product, one, x, inverse))


# all


def test_nothing_outside_is_touched(device):
    """The frames around the inputs are as before, and none of their NaNs came in."""
    whole, x = guarded(floats((37, 63), torch.float32, device))
    before = whole.clone()
    words, (_, frame) = (rows_of(37, device), columns_of(63, device)), guarded(products((37, 63), device))
    outputs = [*rmsnorm_quantize(x, 6.0), *add_rmsnorm_quantize(x, x, 6.0), absmax(x)]
    outputs += quantize_delta(x, absmax(x) / 127, *words)
    outputs.append(rmsnorm_backward(frame, absmax(x) * 1e-9, x, outputs[2], False, x))
    assert torch.equal(whole.view(torch.int32), before.view(torch.int32))
    assert all(not output.isnan().any() for output in outputs if output.is_floating_point())


def test_twice_is_the_same(device):
    x, words = floats((123, 300), torch.float16, device), (rows_of(123, device), columns_of(300, device))
    runs = []
    for _ in range(2):
        grid, votes, inverse = rmsnorm_quantize(x, 6.0)
        delta = rmsnorm_backward(products((123, 300), device), absmax(x) * 1e-9, x, inverse)
        runs.append((grid, votes, inverse, delta, *quantize_delta(x, absmax(x) / 127, *words)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_are_sound(device):
    x, words = floats((13, 37), torch.float32, device), (rows_of(13, device)[:, 0], columns_of(37, device))
    one, ops = torch.tensor(1.0, device=device), torch.ops.nanogft
    for residual in (None, x.clone()):
        for for_votes in (True, False):
            torch.library.opcheck(ops.rmsnorm_quantize, (x, residual, 6.0, False, for_votes))
        torch.library.opcheck(ops.rmsnorm_backward, (products((13, 37), device), one, x, x[:, :1], True, residual))
    torch.library.opcheck(ops.absmax, (x,))
    torch.library.opcheck(ops.quantize_delta, (x, one, *words, True))


def test_they_trace(device):
    def all_of_them(x: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
        grid, votes, inverse = rmsnorm_quantize(x, 6.0)
        delta = rmsnorm_backward(grid.to(torch.int32), absmax(x), x, inverse, residual=x)
        return [grid, votes, inverse, delta, *quantize_delta(delta, absmax(delta) / 127, rows, columns),
                *add_rmsnorm_quantize(x, delta, 6.0)]  # fmt: skip

    traced = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    for shape in ((13, 37), (20, 37)):  # the second with sizes that are symbols
        inputs = floats(shape, torch.float32, device), rows_of(shape[0], device), columns_of(shape[1], device)
        for found, expected in zip(traced(*inputs), all_of_them(*inputs), strict=True):
            assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_refusals(device):
    x = floats((3, 5), torch.float32, device)
    one = torch.tensor(1.0, device=device)
    inverse, product = torch.ones(3, 1, device=device), torch.ones(3, 5, dtype=torch.int32, device=device)
    for function in (lambda t: rmsnorm_quantize(t, 6.0), lambda t: add_rmsnorm_quantize(t, t, 6.0)):
        for bad in (x[:0], x[:, :0], x[0]):
            with pytest.raises(ValueError, match="at least one row and one column"):
                function(bad)
        with pytest.raises(ValueError, match="it takes torch.float32"):
            function(x.double())
    with pytest.raises(ValueError, match="one shape and one type"):
        add_rmsnorm_quantize(x, x.half(), 6.0)
    with pytest.raises(ValueError, match="at least one element"):
        absmax(x[:0])
    with pytest.raises(ValueError, match="sigma is"):
        quantize_delta(x, one.expand(2), rows_of(3, device), columns_of(5, device))
    with pytest.raises(ValueError, match="sigma is"):
        quantize_delta(x, one, rows_of(3, device), columns_of(4, device))
    with pytest.raises(ValueError, match="need one shape"):
        rmsnorm_backward(product[:2], one, x, inverse)
    with pytest.raises(ValueError, match="need one shape"):
        rmsnorm_backward(product[:0], one, x[:0], inverse[:0])
    with pytest.raises(ValueError, match="the product int32 or float"):
        rmsnorm_backward(product.to(torch.int8), one, x, inverse)
    with pytest.raises(ValueError, match="for 3 rows"):
        rmsnorm_backward(product, one.expand(2), x, inverse)
    long = torch.ones(1, MAX_COLUMNS + 1, device=device)
    with pytest.raises(ValueError, match="use the torch backend"):
        rmsnorm_backward(long, one, long, inverse[:1])
