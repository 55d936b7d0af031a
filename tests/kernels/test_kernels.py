"""Products, votes, quantizers and norm against plain int64 or float64 formulas.

    python -m pytest -q tests/kernels/test_kernels.py
"""

import pytest
import torch
from torch import Tensor

import kernels.int8_matmul as int8_matmul_module
from kernels import fuse
from kernels.contribution import add_votes, votes
from kernels.embedding import embedding_votes
from kernels.int8_matmul import MAX_REDUCTION, int8_matmul, int8_product
from kernels.philox import DITHER_BITS, Stream, dither_words
from kernels.quantize import absmax, quantize_delta, rmsnorm_quantize
from kernels.rmsnorm import rmsnorm_backward

# M, K, N of a product
PRODUCTS = [(1, 1, 1), (1, 7, 13), (13, 1, 7), (7, 37, 1), (37, 63, 64), (64, 65, 63), (123, 300, 65), (300, 123, 37)]
MATRICES = [(1, 1), (1, 300), (300, 1), (7, 13), (37, 123), (64, 64), (65, 63), (123, 37)]


def shape_id(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def int8s(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Uniform on -127 .. 127, both ends present where there is room."""
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator(rows, columns, seed))
    if x.numel() > 1:
        x.view(-1)[0], x.view(-1)[-1] = 127, -127
    return x


def floats(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(rows, columns, seed))


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    """x as the even columns and rows of a larger matrix whose other elements are poison."""
    room = torch.full((2 * x.shape[0], 2 * x.shape[1]), 99, dtype=x.dtype)
    room[::2, ::2] = x
    return room[::2, ::2]


def inner_block(x: Tensor) -> Tensor:
    room = torch.full((x.shape[0] + 5, x.shape[1] + 3), 99, dtype=x.dtype)
    room[2:-3, 1:-2] = x
    return room[2:-3, 1:-2]


LAYOUTS = [torch.Tensor.contiguous, transposed, every_other, inner_block]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


# products and votes


@layouts
@pytest.mark.parametrize("native", [True, False], ids=["native", "through-fp32"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=shape_id)
def test_products_and_votes_are_exact(shape, native, layout, monkeypatch):
    if not native:
        monkeypatch.setattr(int8_matmul_module, "CPU_MULTIPLIES_INT8", False)
    m, k, n = shape
    a, b = int8s(m, k), int8s(k, n, 1)
    expected = a.long() @ b.long()
    for right in LAYOUTS:
        product = int8_product(layout(a), right(b))
        assert product.dtype == torch.int32 and torch.equal(product.long(), expected)
    v = votes(layout(a.t()), layout(b))
    assert v.dtype == torch.int32 and torch.equal(v.long(), expected)
    scale = torch.tensor(0.0371)
    y = int8_matmul(layout(a), layout(b.t()), scale)
    assert y.dtype == torch.float32 and torch.equal(y, expected.to(torch.float32) * scale)


def test_product_of_an_expanded_operand():
    """One row or column seen many times, with a stride of 0."""
    for m, k, n in PRODUCTS:
        a, b = int8s(m, k), int8s(k, n, 1)
        for left in (a, a[:1].expand(m, k), a[:, :1].expand(m, k)):
            for right in (b, b[:1].expand(k, n), b[:, :1].expand(k, n)):
                assert torch.equal(int8_product(left, right).long(), left.long() @ right.long())


@pytest.mark.parametrize("k", [1, 2, 7, 37, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_votes_of_one_output(k, n):
    """delta of one column: its transpose is a row of strides (1, 1)."""
    d, x = int8s(k, 1), int8s(k, n, 1)
    assert d.t().stride() == (1, 1)
    assert torch.equal(votes(d, x).long(), d.t().long() @ x.long())
    assert torch.equal(int8_product(x.t(), d).long(), x.t().long() @ d.long())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("native", [True, False], ids=["native", "through-fp32"])
def test_products_at_the_limit_of_int32(native, monkeypatch, sign):
    assert MAX_REDUCTION == 133_144
    if not native:
        monkeypatch.setattr(int8_matmul_module, "CPU_MULTIPLIES_INT8", False)
    d = torch.full((MAX_REDUCTION + 1, 2), 127, dtype=torch.int8)
    x = torch.full((MAX_REDUCTION + 1, 3), sign * 127, dtype=torch.int8)
    expected = torch.full((2, 3), sign * 127 * 127 * MAX_REDUCTION)
    assert torch.equal(int8_product(d[:-1].t(), x[:-1]).long(), expected)
    with pytest.raises(ValueError, match="133145 products can overflow int32; the limit is 133144"):
        int8_product(d.t(), x)
    at, past = votes(d[:-1], x[:-1]), votes(d, x)
    assert at.dtype == torch.int32 and torch.equal(at.long(), expected)
    assert past.dtype == torch.int64 and torch.equal(past, expected + sign * 127 * 127)


def test_votes_of_more_rows_than_int32_holds():
    rows = 2 * MAX_REDUCTION + 37
    d, x = int8s(rows, 3), int8s(rows, 2, 1)
    v = votes(d, x)
    assert v.dtype == torch.int64 and torch.equal(v, d.long().t() @ x.long())


def test_added_votes_widen_before_they_overflow():
    half = torch.full((2, 2), 127 * 127 * (MAX_REDUCTION // 2), dtype=torch.int32)
    within = add_votes(half, half, MAX_REDUCTION)
    assert within.dtype == torch.int32 and torch.equal(within.long(), 2 * half.long())
    beyond = add_votes(add_votes(half, half, MAX_REDUCTION), half, MAX_REDUCTION + 1)
    assert beyond.dtype == torch.int64 and torch.equal(beyond, 3 * half.long())
    assert torch.equal(add_votes(beyond, half, 2 * MAX_REDUCTION), 4 * half.long())


@pytest.mark.parametrize("a, b, message", [
    (torch.zeros(2, 3), int8s(3, 4), "both operands must be int8"),
    (int8s(2, 3), int8s(3, 4).int(), "both operands must be int8"),
    (int8s(2, 3), int8s(4, 3), r"shapes \(2, 3\) and \(4, 3\)"),
    (int8s(2, 3)[0], int8s(3, 4), r"need \(M, K\) and \(K, N\)"),
    (int8s(0, 3), int8s(3, 4), "empty operand"), (int8s(2, 0), int8s(0, 4), "empty operand"),
    (int8s(2, 3), int8s(3, 0), "empty operand"),
], ids=["float", "int32", "inner size", "vector", "no rows", "no inner", "no columns"])
def test_products_refuse(a, b, message):
    with pytest.raises(ValueError, match=message):
        int8_product(a, b)


def test_votes_and_absmax_refuse():
    with pytest.raises(ValueError, match="5 rows of delta and 4 of activations"):
        votes(int8s(5, 2), int8s(4, 2))
    with pytest.raises(ValueError, match="empty operand"):
        votes(int8s(0, 2), int8s(0, 3))
    with pytest.raises(ValueError, match="empty operand"):
        int8_matmul(int8s(0, 2), int8s(3, 2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="at least one element"):
        absmax(torch.empty(0, 4))


@layouts
@pytest.mark.parametrize("tokens, rows, n", [(1, 1, 1), (7, 13, 1), (300, 7, 37), (123, 65, 64)])
def test_embedding_votes_against_a_loop(tokens, rows, n, layout):
    d = int8s(tokens, n)
    ids = torch.randint(0, rows, (tokens,), generator=generator(tokens))
    expected = [[0] * n for _ in range(rows)]
    for token, delta in zip(ids.tolist(), d.tolist()):
        expected[token] = [total + value for total, value in zip(expected[token], delta)]
    v = embedding_votes(layout(d), ids, rows)
    assert v.dtype == torch.int32 and v.tolist() == expected


def test_embedding_votes_at_the_limit_of_int32():
    one = torch.full((1, 1), 127, dtype=torch.int8)
    zero = torch.zeros(1, dtype=torch.int64)
    # 2^24 rows are past what a float32 sum would hold.
    assert embedding_votes(one.expand(2**24 + 1, 1), zero.expand(2**24 + 1), 1).item() == 127 * (2**24 + 1)
    past = MAX_REDUCTION * 127 + 1
    with pytest.raises(ValueError, match=f"{past} rows can overflow int32"):
        embedding_votes(one.expand(past, 1), zero.expand(past), 1)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        embedding_votes(one, zero + 3, 3)


# activations


@layouts
@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])
@pytest.mark.parametrize("shape", MATRICES, ids=shape_id)
def test_activations_against_float64(shape, squared_relu, layout):
    x = floats(*shape) * torch.logspace(-8, 8, shape[0])[:, None]
    wide = x.double()
    if squared_relu:
        wide = wide.clamp_min(0) ** 2
    rms = wide.square().mean(dim=1, keepdim=True).sqrt()
    alive = rms[:, 0] > 1e-14
    exact = wide[alive] / rms[alive] * 127 / 6
    grid, _, inverse = rmsnorm_quantize(layout(x), 6.0, squared_relu)
    assert grid.dtype == torch.int8 and inverse.shape == (shape[0], 1)
    torch.testing.assert_close(inverse[alive].double(), 1 / rms[alive], rtol=1e-6, atol=0)
    clipped = exact.round().clamp(-127, 127)
    near_half = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert ((grid[alive] == clipped) | (near_half & ((grid[alive] - clipped).abs() <= 1))).all()
    assert (grid[(rms == 0)[:, 0]] == 0).all()


def test_activations_round_halves_to_even_and_clip_evenly():
    row = torch.ones(1, 4) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    for value, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (126.5, 126), (200.0, 127)):
        assert rmsnorm_quantize(row, 127 / value)[0].tolist() == [[expected, -expected, expected, -expected]]
    outlier = torch.cat([torch.tensor([-1e4, 1e4]), torch.zeros(298)])[None, :]
    assert rmsnorm_quantize(outlier, 6.0)[0][0, :3].tolist() == [-127, 127, 0]


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])
def test_a_row_of_zeros_stays_zero_both_ways(squared_relu):
    x = floats(3, 37)
    x[1] = -x[1].abs() if squared_relu else 0.0
    grid, _, inverse = rmsnorm_quantize(x, 6.0, squared_relu)
    delta = rmsnorm_backward(int8s(3, 37).int(), torch.tensor(0.1), x, inverse, squared_relu)
    assert (grid[1] == 0).all() and (grid[0] != 0).any()
    # An amplified row would set the scale of the whole tensor's delta and round every other row away.
    assert (delta[1] == 0).all() and torch.isfinite(delta).all()


# delta


def dithers(rows: int, columns: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return dither_words(1, step, Stream.ROWS, rows)[:, None], dither_words(1, step, Stream.COLUMNS, columns)


@layouts
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("shape", MATRICES, ids=shape_id)
def test_delta_against_float64(shape, per_row, layout):
    delta = floats(*shape) ** 3
    assert absmax(layout(delta)).item() == max(abs(value) for row in delta.tolist() for value in row)
    sigma = (delta.abs().amax(dim=1, keepdim=True) if per_row else delta.abs().max()) / 127
    rows, columns = dithers(*shape)
    d, _ = quantize_delta(layout(delta), sigma, rows, columns)
    u = (rows.double() + columns.double()) % 2**DITHER_BITS / 2**DITHER_BITS
    exact = delta.double() / sigma.double() + u
    near = (exact - exact.round()).abs() < 1e-4
    expected = exact.floor().clamp(-127, 127)
    assert d.dtype == torch.int8
    assert ((d == expected) | (near & ((d - expected).abs() <= 1))).all()


def test_delta_never_exceeds_127():
    delta = torch.tensor([[1.0, -1.0, 0.5, 0.0]]).repeat(2**12, 1) * 0.1234567
    top = torch.full((2**12, 1), 2**DITHER_BITS - 1, dtype=torch.int32)
    none = torch.zeros(4, dtype=torch.int32)
    for sigma in (absmax(delta) / 127, absmax(delta) / 500):  # the second as a delayed scale that came out small
        for rows in (dithers(2**12, 4)[0], top, top * 0):
            d = quantize_delta(delta, sigma, rows, none)[0].int()
            assert d.abs().max() <= 127 and (d[:, 0] >= 126).all() and (d[:, 1] <= -126).all() and (d[:, 3] == 0).all()


def test_delta_with_a_scale_of_zero():
    rows, columns = dithers(3, 5)
    for delta in (torch.zeros(3, 5), floats(3, 5)):
        assert (quantize_delta(delta, torch.tensor(0.0), rows, columns)[0] == 0).all()
    delta = floats(3, 5)
    delta[1] = 0
    sigma = delta.abs().amax(dim=1, keepdim=True) / 127
    d, _ = quantize_delta(delta, sigma, rows, columns)
    assert (d[1] == 0).all() and d[0].abs().max() >= 126
    assert torch.equal(d[2:], quantize_delta(delta[2:], sigma[2:], rows[2:], columns)[0])


# norm


@layouts
@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])
@pytest.mark.parametrize("shape", [(1, 7), (13, 37), (64, 64), (37, 300)], ids=shape_id)
def test_rmsnorm_backward_against_autograd(shape, squared_relu, layout):
    x = floats(*shape) * torch.logspace(-2, 2, shape[0])[:, None]
    x[:, 0] = x[:, 0].abs()  # so that relu leaves something in every row
    accumulator = torch.randint(-(2**24), 2**24, shape, dtype=torch.int32, generator=generator(*shape))
    for scale in (torch.tensor(3e-6), torch.rand(shape[0], 1, generator=generator(1)) + 0.5):
        wide = x.double().requires_grad_()
        inner = torch.relu(wide) ** 2 if squared_relu else wide
        x_hat = inner / inner.square().mean(dim=1, keepdim=True).sqrt()
        (expected,) = torch.autograd.grad(x_hat, wide, accumulator.double() * scale.double())
        inverse = rmsnorm_quantize(x, 6.0, squared_relu)[2]
        delta = rmsnorm_backward(layout(accumulator), scale, layout(x), inverse, squared_relu)
        assert delta.dtype == torch.float32
        size = (accumulator * scale * inverse).abs().amax(dim=1, keepdim=True).double()
        size = size * (2 * x.abs().amax(dim=1, keepdim=True) if squared_relu else 1)
        assert ((delta - expected).abs() <= 3e-6 * size).all()


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])
@pytest.mark.parametrize("n", [1, 7, 64, 123, 300])
def test_rows_do_not_depend_on_their_batch(n, squared_relu):
    """Bit for bit: micro-batches must see what the whole batch sees."""
    x, accumulator, scale = floats(63, n), int8s(63, n).int() * 1009, torch.tensor(0.01)
    rows, columns = dithers(63, n)
    grid, _, inverse = rmsnorm_quantize(x, 6.0, squared_relu)
    delta = rmsnorm_backward(accumulator, scale, x, inverse, squared_relu)
    d, _ = quantize_delta(delta, absmax(delta) / 127, rows, columns)
    for part in (slice(0, 1), slice(13, 20), slice(20, 63)):
        some_grid, _, some_inverse = rmsnorm_quantize(x[part], 6.0, squared_relu)
        some = rmsnorm_backward(accumulator[part], scale, x[part], some_inverse, squared_relu)
        assert torch.equal(some_grid, grid[part]) and torch.equal(some_inverse, inverse[part])
        assert torch.equal(some, delta[part])
        assert torch.equal(quantize_delta(some, absmax(delta) / 127, rows[part], columns)[0], d[part])


@pytest.mark.skipif(fuse.compiler() is None, reason="torch.compile needs a C++ compiler and Python's headers")
def test_fused_functions_agree_with_plain_ones():
    """Through torch.compile a sum may run in another order and a product be fused, so a rounding may tip over."""
    rows, columns = dithers(123, 300)
    x = floats(123, 300)
    sigma = absmax(x) / 127
    plain = (*rmsnorm_quantize(x, 6.0)[::2], quantize_delta(x, sigma, rows, columns)[0])
    fuse.enable(True)
    try:
        fused = (*rmsnorm_quantize(x, 6.0)[::2], quantize_delta(x, sigma, rows, columns)[0])
    finally:
        fuse.enable(False)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=0)
    for one, other in ((fused[0], plain[0]), (fused[2], plain[2])):
        assert one.dtype == torch.int8
        assert (one != other).float().mean() < 1e-3 and (one.int() - other).abs().max() <= 1
