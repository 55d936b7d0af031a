"""Delta on its int8 grid: the torch reference against float64, the kernels against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_quantize_delta.py
"""

import pytest
import torch
from torch import Tensor

from kernels import fuse
from kernels.measure_delta import absmax, absmax_torch
from kernels.philox import DITHER_BITS, Stream, noise_from, noise_torch, words
from kernels.quantize_delta import largest_of_bits, quantize_delta, quantize_delta_torch, quantize_delta_twice
from tests.kernels.inputs import (
    SHAPES,
    SHORT,
    floats,
    generator,
    guard,
    inner_block,
    kernel_test,
    layouts,
    opaque,
    readable,
    typed_shapes,
    untouched,
)

per_row = pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
SEED, STEP, ROWS_SEEN, FIRST_COLUMN = 2**40 + 7, 6, 2**33 + 5, 1001


def rng_at(rows_seen: int = ROWS_SEEN, step: int = STEP, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([SEED, step, rows_seen], device=device)


def noise_for(delta: Tensor, rng: Tensor, first_column: int) -> Tensor:
    return noise_from(rng, delta.shape[0], first_column, delta.shape[1])


def rounded(delta: Tensor, sigma: Tensor, rng: Tensor, first_column: int, bits: int = 8) -> Tensor:
    return quantize_delta(delta, sigma, noise_for(delta, rng, first_column), bits)


def two_noises(rng: Tensor, rows: int, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
    """int32 (rows, 1) and (columns,), by the torch backend."""
    of_rows, of_columns = noise_torch(rng, rows, first_column, columns).split((rows, columns))
    return of_rows[:, None], of_columns


def scale_of(delta: Tensor, per_row: bool = False, bits: int = 8) -> Tensor:
    largest = delta.float().abs()
    return (largest.amax(dim=1, keepdim=True) if per_row else largest.max()) / largest_of_bits(bits)


def powers_of(scaled: Tensor, bits: int) -> Tensor:
    """t of each value, number by number: the smallest of 1, 2, 4, ... with which its 32 neighbours fit."""
    found, limit = torch.ones_like(scaled), 2 ** (bits - 1) - 1
    for first in range(0, scaled.shape[1], 32):
        for row in range(len(scaled)):
            part = slice(first, first + 32)
            while scaled[row, part].abs().max() > limit * found[row, first] and found[row, first] < 2 ** (8 - bits):
                found[row, part] *= 2
    return found


# The torch reference


@layouts
@per_row
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 13), (37, 123), (64, 64), (65, 63)], ids=readable)
def test_reference_against_float64(shape, bits, per_row, layout):
    """The noise taken from Philox word by word, as the documentation says."""
    delta = torch.randn(shape, generator=generator(*shape)) ** 3
    assert absmax(layout(delta)).item() == max(abs(value) for row in delta.tolist() for value in row)
    sigma = scale_of(delta, per_row, bits)
    d = rounded(layout(delta), sigma, rng_at(), FIRST_COLUMN, bits)
    row = torch.from_numpy(words(SEED, STEP, Stream.ROWS, shape[0], ROWS_SEEN).astype("int64")) >> 32 - DITHER_BITS
    column = torch.from_numpy(words(SEED, STEP, Stream.COLUMNS, shape[1], FIRST_COLUMN).astype("int64"))
    u = ((row[:, None] + (column >> 32 - DITHER_BITS)) % 2**DITHER_BITS).double() / 2**DITHER_BITS
    t, limit = powers_of(delta * (1.0 / sigma), bits), 2 ** (bits - 1) - 1
    exact = delta.double() / sigma.double() / t + u
    near = (exact - exact.round()).abs() < 1e-4
    expected = exact.floor().clamp(-limit, limit) * t
    assert d.dtype == torch.int8
    assert ((d == expected) | (near & ((d - expected).abs() <= t))).all()


def test_reference_never_exceeds_its_levels():
    delta = torch.tensor([[1.0, -1.0, 0.5, 0.0]]).repeat(2**12, 1) * 0.1234567
    top = torch.full((2**12, 1), 2**DITHER_BITS - 1, dtype=torch.int32)
    none = torch.zeros(4, dtype=torch.int32)
    for bits in (8, 4):
        largest, t = largest_of_bits(bits), 2 ** (8 - bits)
        for divisor in (largest, 4 * largest):  # the second as a delayed scale that came out small
            for rows in (two_noises(rng_at(), 2**12, 0, 4)[0], top, top * 0):
                d = quantize_delta_torch(delta, absmax(delta) / divisor, rows, none, bits).int()
                assert d.abs().max() <= largest and (d[:, 0] >= largest - t).all() and (d % t == 0).all()
                assert (d[:, 1] <= t - largest).all() and (d[:, 3] == 0).all()


def test_few_bits_follow_their_neighbours():
    """A large value costs only the 31 beside it their small digits."""
    delta = torch.full((1, 64), 1.0)
    delta[0, 0] = 112.0
    d = quantize_delta_torch(delta, torch.tensor(1.0), *two_noises(rng_at(), 1, 0, 64), 4)
    assert d[0, 0] == 112 and set(d[0, 1:32].tolist()) <= {0, 16} and (d[0, 32:] == 1).all()


def test_reference_with_a_scale_of_zero():
    for delta in (torch.zeros(3, 5), floats(3, 5)):
        assert (rounded(delta, torch.tensor(0.0), rng_at(), 0) == 0).all()
    delta = floats(3, 5)  # its second row is zeros
    sigma = scale_of(delta, per_row=True)
    d = rounded(delta, sigma, rng_at(), 0)
    assert (d[1] == 0).all() and d[0].abs().max() >= 126


def test_rows_do_not_depend_on_their_batch():
    """Bit for bit: a micro-batch that begins at row t has the noise of row t."""
    delta = floats(63, 123)
    sigma = absmax(delta) / 127
    d = rounded(delta, sigma, rng_at(100), 5)
    for first, last in ((0, 1), (13, 20), (20, 63)):
        assert torch.equal(rounded(delta[first:last], sigma, rng_at(100 + first), 5), d[first:last])


def test_rounding_is_unbiased():
    steps, n = 4000, 37
    delta = torch.linspace(-1, 1, n)[None, :].repeat(2, 1) ** 3
    sigma = absmax(delta) / 127
    target = delta.double() / sigma.double()
    total = torch.zeros(2, n, dtype=torch.float64)
    for step in range(steps):
        d = rounded(delta, sigma, rng_at(0, step), 0)
        assert (d.double() - target).abs().max() < 1 + 1e-4
        total += d
    fraction = target - target.floor()
    error = (fraction * (1 - fraction) / steps).sqrt()
    # 74 bounds at 4.5 standard errors; 1e-4 allows for fp32's delta / sigma near 127.
    assert ((total / steps - target).abs() <= 4.5 * error + 1e-4).all()


@pytest.mark.skipif(fuse.compiler() is None, reason="torch.compile needs a C++ compiler and Python's headers")
def test_fused_reference_agrees_with_the_plain_one():
    """Through torch.compile a product and a sum may be one rounding, so a rounding may tip over."""
    x = floats(123, 300)
    sigma = absmax(x) / 127
    plain = rounded(x, sigma, rng_at(), 0)
    fuse.enable(True)
    try:
        fused = rounded(x, sigma, rng_at(), 0)
    finally:
        fuse.enable(False)
    assert fused.dtype == torch.int8
    assert (fused != plain).float().mean() < 1e-3 and (fused.int() - plain).abs().max() <= 1


# The kernels


def reference(delta: Tensor, sigma: Tensor, rng: Tensor, first_column: int, bits: int = 8) -> Tensor:
    return quantize_delta_torch(delta, sigma, *two_noises(rng, delta.shape[0], first_column, delta.shape[1]), bits)


@kernel_test
@typed_shapes
@per_row
def test_kernel(shape, dtype, per_row, device):
    delta, rng = floats(*shape, device, dtype), rng_at(device=device)
    for bits in (8, 4, 2):
        sigma = scale_of(delta, per_row, bits)
        d = rounded(delta, sigma, rng, FIRST_COLUMN, bits)
        assert d.dtype == torch.int8 and d.is_contiguous()
        assert torch.equal(d, reference(delta, sigma, rng, FIRST_COLUMN, bits))


@kernel_test
@pytest.mark.parametrize("shape", SHORT, ids=readable)
@layouts
def test_kernel_with_any_layout(shape, layout, device):
    delta, rng = floats(*shape, device), rng_at(device=device)
    sigma = torch.rand(shape[0], 1, generator=generator(1)).to(device) + 0.01
    d = rounded(layout(delta), layout(sigma), rng, 3)
    assert torch.equal(d, reference(delta, sigma, rng, 3))


@kernel_test
@pytest.mark.parametrize("rows_seen, first_column, step", [(0, 0, 0), (1, 1, 2**32 - 1), (2**34 - 3, 2**20 + 1, 5)])
def test_kernel_takes_the_noise_of_its_rows_and_columns(rows_seen, first_column, step, device):
    delta, rng = floats(37, 300, device), rng_at(rows_seen, step, device)
    sigma = absmax(delta) / 3
    assert torch.equal(rounded(delta, sigma, rng, first_column), reference(delta, sigma, rng, first_column))


@kernel_test
def test_kernel_at_the_edges(device):
    """Clipping both ways, a sigma of zero, and numbers far below one: -1 or 0, as the noise says."""
    delta = torch.tensor([[1.0, -1.0, 1e30, -1e30], [1e-42, -1e-42, 0.0, -0.0]], device=device)
    rng = rng_at(device=device)
    for sigma in (torch.tensor(value, device=device) for value in (1.0, 0.0, 1e-3, 1e-36, 2e-36)):
        d = rounded(delta, sigma, rng, 0)
        assert torch.equal(d, reference(delta, sigma, rng, 0))
        assert (sigma > 0) or (d == 0).all()


@kernel_test
def test_kernel_without_a_lift(device):
    """Where the noise is 0, the smallest negative number goes to -1 and a whole number stays."""
    rng, column = rng_at(device=device), 4_893_256  # of stream COLUMNS: its word and that of row ROWS_SEEN cancel
    assert sum(int(word) for word in two_noises(rng, 1, column, 1)) == 2**DITHER_BITS
    for value, expected in ((-1e-42, -1), (1e-42, 0), (-3.0, -3), (3.0, 3), (-0.0, 0), (126.5, 126), (-126.5, -127)):
        delta, one = torch.tensor([[value]], device=device), torch.tensor(1.0, device=device)
        assert rounded(delta, one, rng, column).item() == expected
        assert reference(delta, one, rng, column).item() == expected


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    delta, rng = inner_block(floats(37, 63, device)), rng_at(device=device)
    before = delta._base.clone()
    largest = absmax_torch(delta)
    expected = reference(delta, largest / 127, rng, 3)
    bands = guard(monkeypatch)
    assert torch.equal(rounded(delta, largest / 127, rng, 3), expected)
    assert untouched(bands)
    assert torch.equal(delta._base.view(torch.int32), before.view(torch.int32)) and rng.tolist() == rng_at().tolist()


@kernel_test
@pytest.mark.parametrize("shape", [*SHAPES, (64, 128), (130, 65)], ids=readable)
def test_kernel_by_columns_too(shape, device):
    delta, rng = floats(*shape, device), rng_at(device=device)
    d, turned = quantize_delta_twice(delta, scale_of(delta), noise_for(delta, rng, FIRST_COLUMN))
    assert d.is_contiguous() and turned.t().is_contiguous() and torch.equal(d, turned)
    assert torch.equal(d, reference(delta, scale_of(delta), rng, FIRST_COLUMN))


@kernel_test
def test_twice_is_the_same(device):
    delta, rng = floats(123, 300, device, torch.float16), rng_at(device=device)
    sigma = absmax(delta) / 127
    assert torch.equal(rounded(delta, sigma, rng, 0), rounded(delta, sigma, rng, 0))


@kernel_test
def test_as_torch_operators(device):
    operators, rng = torch.ops.nanogft, rng_at(device=device)
    delta, sigma = floats(13, 37, device), torch.tensor(1.0, device=device)
    noise = noise_for(delta, rng, 3)
    torch.library.opcheck(operators.quantize_delta, (delta, sigma, noise, 8))
    torch.library.opcheck(operators.quantize_delta_twice, (delta, sigma, noise, 8))

    def both(delta: Tensor, rng: Tensor) -> Tensor:
        return rounded(delta, absmax(delta) / 127, rng, 3)

    traced = opaque(both)
    for rows in (13, 20):  # the second with sizes that are symbols
        delta = floats(rows, 37, device)
        assert torch.equal(traced(delta, rng), both(delta, rng))


@kernel_test
def test_refusals(device):
    x, one, rng = floats(3, 5, device), torch.tensor(1.0, device=device), rng_at(device=device)
    noise = noise_for(x, rng, 0)
    for bad in (x[:0], x[:, :0], x[0]):
        with pytest.raises(ValueError, match="at least one row and one column"):
            quantize_delta(bad, one, noise)
    with pytest.raises(ValueError, match="it takes torch.float32"):
        quantize_delta(x.double(), one, noise)
    with pytest.raises(ValueError, match=r"sigma is \(\) or \(T, 1\)"):
        quantize_delta(x, one.expand(2), noise)
    for bad in (rng[:2], rng.int()):
        with pytest.raises(ValueError, match=r"it is torch.int64 \(3,\)"):
            noise_for(x, bad, 0)
    for bad in (noise[:7], noise.float(), noise.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"it is torch.int32 \(T \+ n,\), contiguous"):
            quantize_delta(x, one, bad)
    for bits in (1, 9):
        with pytest.raises(ValueError, match="they are 2 to 8"):
            quantize_delta(x, one, noise, bits)
    with pytest.raises(ValueError, match="at least one element"):
        absmax(x[:0])
