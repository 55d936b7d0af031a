"""Delta through the norm: the torch reference against autograd, the kernel against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_rmsnorm_backward.py
"""

import pytest
import torch

from kernels.measure_delta import largest_noted
from kernels.rmsnorm_backward import rmsnorm_backward, rmsnorm_backward_torch
from kernels.rmsnorm_quantize import MAX_COLUMNS, rmsnorm_quantize, rmsnorm_quantize_torch
from tests.kernels.inputs import (
    FLOATS,
    SHORT,
    equal,
    floats,
    generator,
    guard,
    inner_block,
    int8s,
    int32s,
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
@pytest.mark.parametrize("shape", [(1, 7), (13, 37), (64, 64), (37, 300)], ids=readable)
def test_reference_against_autograd(shape, squared_relu, layout):
    x = torch.randn(shape, generator=generator(*shape)) * torch.logspace(-2, 2, shape[0])[:, None]
    x[:, 0] = x[:, 0].abs()  # so that relu leaves something in every row
    product = torch.randint(-(2**24), 2**24, shape, dtype=torch.int32, generator=generator(*shape))
    for scale in (torch.tensor(3e-6), torch.rand(shape[0], 1, generator=generator(1)) + 0.5):
        wide = x.double().requires_grad_()
        inner = torch.relu(wide) ** 2 if squared_relu else wide
        x_hat = inner / inner.square().mean(dim=1, keepdim=True).sqrt()
        (expected,) = torch.autograd.grad(x_hat, wide, product.double() * scale.double())
        inv_rms = rmsnorm_quantize(x, 6.0, squared_relu)[1]
        delta = rmsnorm_backward(layout(product), scale, layout(x), inv_rms, squared_relu)
        assert delta.dtype == torch.float32
        size = (product * scale * inv_rms).abs().amax(dim=1, keepdim=True).double()
        size = size * (2 * x.abs().amax(dim=1, keepdim=True) if squared_relu else 1)
        assert ((delta - expected).abs() <= 3e-6 * size).all()


@squared
def test_a_row_of_zeros_stays_zero_both_ways(squared_relu):
    x = floats(3, 37)
    x[1] = -torch.rand(37, generator=generator(1)) if squared_relu else 0.0
    x_int8, inv_rms = rmsnorm_quantize(x, 6.0, squared_relu)
    delta = rmsnorm_backward(int8s(3, 37).int(), torch.tensor(0.1), x, inv_rms, squared_relu)
    assert (x_int8[1] == 0).all() and (x_int8[0] != 0).any()
    # An amplified row would set the scale of the whole tensor's delta and round every other row away.
    assert (delta[1] == 0).all() and torch.isfinite(delta).all()


@squared
@pytest.mark.parametrize("n", [1, 7, 64, 123, 300])
def test_rows_do_not_depend_on_their_batch(n, squared_relu):
    """Bit for bit: micro-batches must see what the whole batch sees."""
    x, product, scale = floats(63, n), int8s(63, n).int() * 1009, torch.tensor(0.01)
    inv_rms = rmsnorm_quantize(x, 6.0, squared_relu)[1]
    delta = rmsnorm_backward(product, scale, x, inv_rms, squared_relu)
    for part in (slice(0, 1), slice(13, 20), slice(20, 63)):
        some = rmsnorm_backward(product[part], scale, x[part], inv_rms[part], squared_relu)
        assert torch.equal(some, delta[part])


# The kernel


def inputs(rows, columns, device, dtype=torch.float32, squared_relu=False):
    """x, the product, its scale and 1 / rms."""
    x = floats(rows, columns, device, dtype)
    inv_rms = rmsnorm_quantize_torch(x, 6.0, squared_relu)[1]
    return int32s(rows, columns, device), torch.tensor(3e-9, device=device), x, inv_rms


@kernel_test
@typed_shapes
@squared
def test_kernel(shape, dtype, squared_relu, device):
    given = inputs(*shape, device, dtype, squared_relu)
    delta = rmsnorm_backward(*given, squared_relu)
    assert delta.dtype == dtype and equal(delta, rmsnorm_backward_torch(*given, squared_relu))
    assert shape[0] <= 2 or (delta[1] == 0).all()


@kernel_test
@typed_shapes
@squared
def test_residual(shape, dtype, squared_relu, device):
    """It is added to what is already of x's type, as a sum of two deltas would be."""
    given, residual = inputs(*shape, device, dtype, squared_relu), floats(*shape, device, dtype, seed=4)
    before = residual.clone()
    delta = rmsnorm_backward(*given, squared_relu, residual)
    assert delta.dtype == dtype and equal(delta, rmsnorm_backward(*given, squared_relu) + residual)
    assert torch.equal(largest_noted(delta).max(), delta.float().abs().max())
    if dtype != torch.bfloat16:  # the interpreter cuts both roundings of that
        assert torch.equal(delta, rmsnorm_backward_torch(*given, squared_relu, residual))
    assert torch.equal(residual, before)


@kernel_test
@pytest.mark.parametrize("shape", SHORT, ids=readable)
@layouts
def test_kernel_with_any_layout(shape, layout, device):
    product, _, x, inv_rms = inputs(*shape, device)
    scale = torch.rand(shape[0], 1, generator=generator(2)).to(device) * 1e-9
    found = rmsnorm_backward(layout(product), layout(scale), layout(x), layout(inv_rms))
    assert torch.equal(found, rmsnorm_backward_torch(product, scale, x, inv_rms))
    residual = floats(*shape, device, seed=4)
    found = rmsnorm_backward(product, scale, x, inv_rms, False, layout(residual))
    assert torch.equal(found, rmsnorm_backward_torch(product, scale, x, inv_rms, False, residual))


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
def test_kernel_with_float_products_and_long_rows(dtype, device):
    _, _, x, inv_rms = inputs(5, 3000, device)
    product, one = floats(5, 3000, device, dtype, seed=3), torch.tensor(1.0, device=device)
    found = rmsnorm_backward(product, one, x, inv_rms)
    assert torch.equal(found, rmsnorm_backward_torch(product, one, x, inv_rms))
    before = product.clone()
    assert torch.equal(found, rmsnorm_backward(product, None, x, inv_rms)) and torch.equal(product, before)
    assert torch.equal(found, rmsnorm_backward_torch(product, None, x, inv_rms)) and torch.equal(product, before)


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    product, scale, x, inv_rms = inputs(37, 63, device)
    product, x = inner_block(product), inner_block(x)
    before = product._base.clone(), x._base.clone()
    expected = rmsnorm_backward_torch(product, scale, x, inv_rms)
    bands = guard(monkeypatch)
    assert torch.equal(rmsnorm_backward(product, scale, x, inv_rms), expected) and untouched(bands)
    assert torch.equal(product._base, before[0])
    assert torch.equal(x._base.view(torch.int32), before[1].view(torch.int32))


@kernel_test
def test_twice_is_the_same(device):
    given = inputs(123, 300, device, torch.float16)
    assert torch.equal(rmsnorm_backward(*given), rmsnorm_backward(*given))


@kernel_test
def test_as_a_torch_operator(device):
    torch.library.opcheck(torch.ops.nanogft.rmsnorm_backward, (*inputs(13, 37, device), True, None))
    traced = opaque(rmsnorm_backward)
    for rows in (13, 20):  # the second with sizes that are symbols
        given = inputs(rows, 37, device)
        assert torch.equal(traced(*given), rmsnorm_backward(*given))


@kernel_test
def test_refusals(device):
    product, scale, x, inv_rms = inputs(3, 5, device)
    with pytest.raises(ValueError, match="need one shape"):
        rmsnorm_backward(product[:2], scale, x, inv_rms)
    with pytest.raises(ValueError, match="need one shape"):
        rmsnorm_backward(product[:0], scale, x[:0], inv_rms[:0])
    with pytest.raises(ValueError, match="the product int32 or float"):
        rmsnorm_backward(product.to(torch.int8), scale, x, inv_rms)
    with pytest.raises(ValueError, match=r"inv_rms \(T, 1\)"):
        rmsnorm_backward(product, scale, x, inv_rms[:, 0])
    with pytest.raises(ValueError, match="for 3 rows"):
        rmsnorm_backward(product, scale.expand(2), x, inv_rms)
    for bad in (x[:2], x.half()):
        with pytest.raises(ValueError, match="got residual"):
            rmsnorm_backward(product, scale, x, inv_rms, False, bad)
    long = torch.ones(1, MAX_COLUMNS + 1, device=device)
    with pytest.raises(ValueError, match="use the torch backend"):
        rmsnorm_backward(long, scale, long, inv_rms[:1])
