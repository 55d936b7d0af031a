"""RMSNorm and the int8 grid: the torch reference against float64, the kernel against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_rmsnorm_quantize.py
"""

import pytest
import torch

from kernels import fuse
from kernels.rmsnorm_quantize import MAX_COLUMNS, rmsnorm_quantize, rmsnorm_quantize_torch, rmsnorm_quantize_twice
from tests.kernels.inputs import (
    SHORT,
    equal,
    floats,
    guard,
    inner_block,
    kernel_test,
    layouts,
    opaque,
    readable,
    squared,
    typed_shapes,
    untouched,
)

# The torch reference


@layouts
@squared
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 13), (37, 123), (64, 64), (65, 63)], ids=readable)
def test_reference_against_float64(shape, squared_relu, layout):
    x = floats(*shape, decades=8)
    wide = x.double()
    if squared_relu:
        wide = wide.clamp_min(0) ** 2
    rms = wide.square().mean(dim=1, keepdim=True).sqrt()
    alive = rms[:, 0] > 1e-14
    exact = wide[alive] / rms[alive] * 127 / 6
    x_int8, inv_rms = rmsnorm_quantize(layout(x), 6.0, squared_relu)
    assert x_int8.dtype == torch.int8 and inv_rms.shape == (shape[0], 1)
    torch.testing.assert_close(inv_rms[alive].double(), 1 / rms[alive], rtol=1e-6, atol=0)
    clipped = exact.round().clamp(-127, 127)
    near_half = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert ((x_int8[alive] == clipped) | (near_half & ((x_int8[alive] - clipped).abs() <= 1))).all()
    assert (x_int8[(rms == 0)[:, 0]] == 0).all()


def test_reference_rounds_halves_to_even_and_clips_evenly():
    row = torch.ones(1, 4) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    for value, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (126.5, 126), (200.0, 127)):
        assert rmsnorm_quantize(row, 127 / value)[0].tolist() == [[expected, -expected, expected, -expected]]
    outlier = torch.cat([torch.tensor([-1e4, 1e4]), torch.zeros(298)])[None, :]
    assert rmsnorm_quantize(outlier, 6.0)[0][0, :3].tolist() == [-127, 127, 0]


@squared
@pytest.mark.parametrize("n", [1, 7, 64, 123, 300])
def test_rows_do_not_depend_on_their_batch(n, squared_relu):
    """Bit for bit: micro-batches must see what the whole batch sees."""
    x = floats(63, n)
    x_int8, inv_rms = rmsnorm_quantize(x, 6.0, squared_relu)
    for part in (slice(0, 1), slice(13, 20), slice(20, 63)):
        some_int8, some_inv_rms = rmsnorm_quantize(x[part], 6.0, squared_relu)
        assert torch.equal(some_int8, x_int8[part]) and torch.equal(some_inv_rms, inv_rms[part])


@pytest.mark.skipif(fuse.compiler() is None, reason="torch.compile needs a C++ compiler and Python's headers")
def test_fused_reference_agrees_with_the_plain_one():
    """Through torch.compile a sum may run in another order and a product be fused, so a rounding may tip over."""
    x = floats(123, 300)
    plain = rmsnorm_quantize(x, 6.0)
    fuse.enable(True)
    try:
        fused = rmsnorm_quantize(x, 6.0)
    finally:
        fuse.enable(False)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=0)
    assert fused[0].dtype == torch.int8
    assert (fused[0] != plain[0]).float().mean() < 1e-3 and (fused[0].int() - plain[0]).abs().max() <= 1


# The kernel


def assert_like_the_reference(found, x, act_range=6.0, squared_relu=False):
    x_int8, inv_rms = rmsnorm_quantize_torch(x, act_range, squared_relu)
    assert found[0].dtype == torch.int8 and found[0].is_contiguous() and torch.equal(found[0], x_int8)
    assert torch.equal(found[1], inv_rms)


@kernel_test
@typed_shapes
@squared
def test_kernel(shape, dtype, squared_relu, device):
    x = floats(*shape, device, dtype)
    assert_like_the_reference(rmsnorm_quantize(x, 6.0, squared_relu), x, 6.0, squared_relu)


@kernel_test
@pytest.mark.parametrize("shape", SHORT, ids=readable)
@layouts
def test_kernel_with_any_layout(shape, layout, device):
    x = floats(*shape, device)
    assert_like_the_reference(rmsnorm_quantize(layout(x), 6.0), x)


@kernel_test
@pytest.mark.parametrize("n, dtype", [
    (700, torch.float32), (2100, torch.float16), (3000, torch.bfloat16), (MAX_COLUMNS, torch.float32),
], ids=str)  # fmt: skip
def test_kernel_with_long_rows(n, dtype, device):
    x = floats(5, n, device, dtype)
    assert_like_the_reference(rmsnorm_quantize(x, 6.0, True), x, 6.0, True)


@kernel_test
@pytest.mark.parametrize("act_range", [0.01, 4.0, 1e4], ids=str)
def test_kernel_clips_and_rounds_as_the_reference(act_range, device):
    x = floats(13, 123, device)
    assert_like_the_reference(rmsnorm_quantize(x, act_range), x, act_range)


@kernel_test
def test_kernel_rounds_halves_to_even(device):
    row = torch.tensor([[1.0, -1.0, 1.0, -1.0]], device=device)
    for value, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (126.5, 126), (200.0, 127)):
        assert rmsnorm_quantize(row, 127 / value)[0].tolist() == [[expected, -expected, expected, -expected]]


@kernel_test
def test_kernel_with_rows_that_have_no_direction(device):
    x = floats(7, 37, device)
    x[2] = 1e-16  # mean square below SMALLEST_MEAN_SQUARE
    x[3] = 1e-14
    found = rmsnorm_quantize(x, 6.0)
    assert_like_the_reference(found, x)
    assert found[1][2] == 0 and (found[0][2] == 0).all() and found[1][3] > 0


@squared
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25], ids=str)
def test_rows_that_are_not_finite_have_no_norm(value, backend, squared_relu, device, request):
    """int8 could not say it. The square of 1e25 is infinite."""
    if backend == "triton":
        request.getfixturevalue("on_triton")
    x = floats(7, 37, device)
    clean = rmsnorm_quantize(x, 6.0, squared_relu)
    x[2, 5] = value
    x_int8, inv_rms = rmsnorm_quantize(x, 6.0, squared_relu)
    others = [0, 1, 3, 4, 5, 6]
    assert inv_rms[2].isnan()
    assert torch.equal(inv_rms[others], clean[1][others]) and torch.equal(x_int8[others], clean[0][others])


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    x = inner_block(floats(37, 63, device))
    whole = x._base
    before = whole.clone()
    x_int8, inv_rms = rmsnorm_quantize_torch(x, 6.0)
    bands = guard(monkeypatch)
    found = *rmsnorm_quantize(x, 6.0), *rmsnorm_quantize_twice(x, 6.0)
    expected = x_int8, inv_rms, x_int8, inv_rms, x_int8
    assert untouched(bands) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(whole.view(torch.int32), before.view(torch.int32))


def assert_twice_like_the_reference(found, x, act_range=6.0, squared_relu=False):
    assert_like_the_reference(found[:2], x, act_range, squared_relu)
    assert found[2].t().is_contiguous() and torch.equal(found[2], found[0])


@kernel_test
@typed_shapes
@squared
def test_kernel_by_columns_too(shape, dtype, squared_relu, device):
    x = floats(*shape, device, dtype)
    assert_twice_like_the_reference(rmsnorm_quantize_twice(x, 6.0, squared_relu), x, 6.0, squared_relu)


@kernel_test
@pytest.mark.parametrize("shape", SHORT, ids=readable)
@layouts
def test_kernel_by_columns_too_with_any_layout(shape, layout, device):
    x = floats(*shape, device)
    assert_twice_like_the_reference(rmsnorm_quantize_twice(layout(x), 6.0), x)


@kernel_test
@pytest.mark.parametrize("rows, n", [(64, 512), (5, 513), (33, 768), (3, MAX_COLUMNS)], ids=str)
def test_kernel_by_columns_too_with_long_rows(rows, n, device):
    x = floats(rows, n, device, torch.bfloat16)
    x[0, -1] = float("nan")
    found, expected = rmsnorm_quantize_twice(x, 6.0), rmsnorm_quantize_torch(x, 6.0)
    assert found[1][0].isnan() and torch.equal(found[1][1:], expected[1][1:])
    assert torch.equal(found[0][1:], expected[0][1:]) and torch.equal(found[2], found[0])


def test_the_reference_needs_no_copy():
    x_int8, _, again = rmsnorm_quantize_twice(floats(7, 37), 6.0)
    assert again is x_int8


@kernel_test
def test_twice_is_the_same(device):
    x = floats(123, 300, device, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(rmsnorm_quantize(x, 6.0), rmsnorm_quantize(x, 6.0), strict=True))


@kernel_test
def test_as_a_torch_operator(device):
    for operator in (torch.ops.nanogft.rmsnorm_quantize, torch.ops.nanogft.rmsnorm_quantize_twice):
        torch.library.opcheck(operator, (floats(13, 37, device), 6.0, False))
    for function in (rmsnorm_quantize, rmsnorm_quantize_twice):
        traced = opaque(lambda x, function=function: function(x, 6.0, True))
        for rows in (13, 20):  # the second with sizes that are symbols
            x = floats(rows, 37, device)
            for found, expected in zip(traced(x), function(x, 6.0, True), strict=True):
                assert equal(found, expected) and found.stride() == expected.stride()


@kernel_test
def test_refusals(device):
    x = floats(3, 5, device)
    for bad in (x[:0], x[:, :0], x[0]):
        with pytest.raises(ValueError, match="at least one row and one column"):
            rmsnorm_quantize(bad, 6.0)
    with pytest.raises(ValueError, match="it takes torch.float32"):
        rmsnorm_quantize(x.double(), 6.0)
    with pytest.raises(ValueError, match=f"rows of {MAX_COLUMNS + 1}.*use the torch backend"):
        rmsnorm_quantize(torch.ones(1, MAX_COLUMNS + 1, device=device), 6.0)
    with pytest.raises(ValueError, match=f"rows of {MAX_COLUMNS + 1}"):
        rmsnorm_quantize_twice(torch.ones(1, MAX_COLUMNS + 1, device=device), 6.0)
