"""int8 products: the torch reference against int64, the kernel against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_int8_matmul.py
"""

import pytest
import torch
from torch import Tensor

import kernels.int8_matmul as module
from kernels.int8_matmul import int8_matmul, int8_matmul_torch, int8_product, int8_product_torch
from kernels.limits import MAX_REDUCTION
from tests.kernels.inputs import (
    FLOATS,
    LAYOUTS,
    aligned_block,
    contiguous,
    every_other,
    floats,
    generator,
    guard,
    inner_block,
    int8s,
    kernel_test,
    layouts,
    narrowed,
    opaque,
    readable,
    transposed,
    untouched,
)

# M, K, N
SMALL_SHAPES = [
    (1, 1, 1), (1, 7, 13), (13, 1, 7), (7, 37, 1), (37, 63, 64), (64, 65, 63), (123, 300, 65), (300, 123, 37),
]  # fmt: skip
# Less than a tile, an edge in every direction, several tiles, more rows of tiles than a group has; at the end those
# whose tiles can be copied by descriptor, in the interpreter by 4 programs.
SHAPES = [
    (1, 1, 1), (1, 7, 13), (13, 1, 7), (7, 300, 1), (37, 63, 64), (48, 64, 32), (130, 123, 37), (63, 300, 260),
    (300, 37, 130), (1100, 16, 130), (16, 16, 16), (300, 144, 400), (260, 400, 128),
]  # fmt: skip


# The torch reference


@pytest.fixture(params=["native", "through-fp32"])
def way(request, monkeypatch):
    """How the reference multiplies on a CPU, with int8 instructions or without."""
    if request.param == "through-fp32":
        monkeypatch.setattr(module, "CPU_MULTIPLIES_INT8", False)


@pytest.mark.usefixtures("way")
@layouts
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=readable)
def test_reference_is_exact(shape, layout):
    m, k, n = shape
    a, b = int8s(m, k), int8s(k, n, seed=1)
    expected = a.long() @ b.long()
    for right in LAYOUTS:
        product = int8_product(layout(a), right(b))
        assert product.dtype == torch.int32 and torch.equal(product.long(), expected)
    scale = torch.tensor(0.0371)
    y = int8_matmul(layout(a), layout(b.t()), scale)
    assert y.dtype == torch.float32 and torch.equal(y, expected.to(torch.float32) * scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
def test_reference_scales_and_adds(dtype):
    x, w, residual = int8s(7, 13), int8s(5, 13, seed=1), floats(7, 5, dtype=dtype)
    scale = torch.rand(7, 1, generator=generator(1))
    y = int8_matmul(x, w, scale, residual, dtype)
    exact = (x.long() @ w.t().long()).double() * scale.double() + residual.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-3)


def test_reference_of_an_expanded_operand():
    """One row or column seen many times, with a stride of 0."""
    for m, k, n in SMALL_SHAPES:
        a, b = int8s(m, k), int8s(k, n, seed=1)
        for left in (a, a[:1].expand(m, k), a[:, :1].expand(m, k)):
            for right in (b, b[:1].expand(k, n), b[:, :1].expand(k, n)):
                assert torch.equal(int8_product(left, right).long(), left.long() @ right.long())


@pytest.mark.parametrize("k", [1, 2, 7, 37, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_reference_of_a_transposed_column(k, n):
    """Its only row has strides (1, 1)."""
    d, x = int8s(k, 1), int8s(k, n, seed=1)
    assert d.t().stride() == (1, 1)
    assert torch.equal(int8_product(d.t(), x).long(), d.t().long() @ x.long())
    assert torch.equal(int8_product(x.t(), d).long(), x.t().long() @ d.long())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sign", [1, -1])
def test_reference_at_the_limit_of_int32(sign):
    assert MAX_REDUCTION == 133_144
    d = torch.full((MAX_REDUCTION + 1, 2), 127, dtype=torch.int8)
    x = torch.full((MAX_REDUCTION + 1, 3), sign * 127, dtype=torch.int8)
    expected = torch.full((2, 3), sign * 127 * 127 * MAX_REDUCTION)
    assert torch.equal(int8_product(d[:-1].t(), x[:-1]).long(), expected)
    with pytest.raises(ValueError, match="133145 products can overflow int32; the limit is 133144"):
        int8_product(d.t(), x)


@pytest.mark.parametrize("right", LAYOUTS, ids=readable)
@layouts
def test_cublas_is_given_what_it_multiplies(layout, right):
    """a by rows, b by columns, more than 16 rows, K and N multiples of 8; whatever the layout, the same product."""
    for m, k, n in ((1, 1, 1), (7, 37, 13), (17, 64, 24), (37, 63, 64)):
        a, b = int8s(m, k), int8s(k, n, seed=1)
        left, across = module._cuda_operands(layout(a), right(b))
        assert left.is_contiguous() and across.t().is_contiguous()
        assert left.shape[0] > 16 and left.shape[1] % 8 == 0 and across.shape[1] % 8 == 0
        assert torch.equal((left.long() @ across.long())[:m, :n], a.long() @ b.long())


# The kernel


@pytest.fixture(params=["chosen", "ALIGNED", "RAGGED"])
def tile(request, monkeypatch):
    """The tile that is launched."""
    if request.param != "chosen":
        monkeypatch.setattr(module, "_blocks", lambda a, b: getattr(module, request.param))


@kernel_test
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_kernel(shape, device):
    m, k, n = shape
    a, b = int8s(m, k, device), int8s(k, n, device, 1)
    product = int8_product(a, b)
    assert product.dtype == torch.int32 and product.is_contiguous()
    assert torch.equal(product, int8_product_torch(a, b))


@kernel_test
@pytest.mark.parametrize("right", LAYOUTS, ids=readable)
@layouts
def test_kernel_with_any_layout(layout, right, device):
    for m, k, n in ((13, 37, 7), (37, 64, 20)):
        a, b = layout(int8s(m, k, device)), right(int8s(k, n, device, 1))
        assert torch.equal(int8_product(a, b), int8_product_torch(a, b))


@kernel_test
def test_kernel_with_expanded_operands(device):
    a, b = int8s(13, 37, device), int8s(37, 7, device, 1)
    for left in (a[:1].expand(13, 37), a[:, :1].expand(13, 37)):
        for right in (b[:1].expand(37, 7), b[:, :1].expand(37, 7)):
            assert torch.equal(int8_product(left, right), int8_product_torch(left, right))


@kernel_test
@pytest.mark.usefixtures("tile")
def test_scaled_products_in_each_tile(device):
    x, w = int8s(130, 37, device), int8s(200, 37, device, 1)
    scale = 0.01 * torch.rand(130, 1, generator=generator(1)).to(device)
    residual = floats(130, 200, device)
    assert torch.equal(int8_matmul(x, w, scale, residual), int8_matmul_torch(x, w, scale, residual))


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("shape", [(7, 63, 13), (130, 37, 264)], ids=readable)
def test_scaled_products(shape, per_row, residual, dtype, device):
    m, k, n = shape
    x, w = int8s(m, k, device), int8s(n, k, device, 1)
    scale = 0.01 * torch.rand((m, 1) if per_row else (), generator=generator(m)).to(device)
    for layout in (contiguous, every_other) if residual else (contiguous,):
        added = layout(floats(m, n, device, dtype)) if residual else None
        y = int8_matmul(x, w, scale, added, dtype)
        assert y.dtype == dtype and y.is_contiguous()
        exact = int8_matmul_torch(x, w, scale, added if added is None else added.float())
        assert torch.equal(y, narrowed(exact, dtype))


@kernel_test
def test_a_factor_of_the_scale(device):
    """The scale is multiplied first, then the sum: each product is rounded once."""
    x, w, scale = int8s(63, 37, device), int8s(40, 37, device, 1), torch.tensor(0.013, device=device)
    y = int8_matmul(x, w, scale, factor=6 / 127)
    assert torch.equal(y, int8_matmul_torch(x, w, scale, factor=6 / 127))
    assert torch.equal(y, int8_matmul(x, w, scale * (6 / 127)))


@kernel_test
@pytest.mark.usefixtures("tile")
def test_a_row_without_a_norm_is_nan(device):
    x, w, scale = int8s(63, 37, device), int8s(40, 37, device, 1), torch.tensor(0.013, device=device)
    inv_rms = floats(63, 1, device).abs()
    inv_rms[17] = float("nan")
    expected = int8_matmul_torch(x, w, scale, factor=0.1)
    expected[17] = float("nan")
    for product in (int8_matmul, int8_matmul_torch):
        torch.testing.assert_close(product(x, w, scale, factor=0.1, inv_rms=inv_rms), expected, rtol=0, atol=0,
                                   equal_nan=True)  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("tile")
def test_a_backward_product(device):
    """D W with W as it is stored, out along its rows: the reduced axis is not the contiguous one."""
    d, w = int8s(63, 123, device), int8s(123, 37, device, 1)
    scale = torch.tensor(0.01, device=device)
    assert torch.equal(int8_product(d, w), int8_product_torch(d, w))
    y = int8_matmul(d, w.t(), scale, dtype=torch.float16)
    assert torch.equal(y, int8_matmul_torch(d, w.t(), scale, dtype=torch.float16))


def test_tiles_by_situation():
    x, w = int8s(64, 64), int8s(48, 64)
    assert module._blocks(x, w.t()) is module.ALIGNED and module._blocks(x, w[:, :48]) is module.ALIGNED
    assert module._blocks(aligned_block(x), transposed(w).t()) is module.ALIGNED
    for ragged in (every_other, inner_block):
        assert module._blocks(ragged(x), w.t()) is module.RAGGED and module._blocks(x, ragged(w).t()) is module.RAGGED
    assert module._blocks(x[:, :63], w[:, :63].t()) is module.RAGGED


@kernel_test
def test_kernel_at_the_limit_of_int32(device):
    d = torch.full((1, MAX_REDUCTION), 127, dtype=torch.int8, device=device)
    x = torch.tensor([[127, -127]], dtype=torch.int8, device=device).expand(MAX_REDUCTION, 2)
    largest = 127 * 127 * MAX_REDUCTION
    assert int8_product(d, x).tolist() == [[largest, -largest]]


@kernel_test
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("shape", [(13, 64, 20), (37, 48, 68)], ids=readable)
def test_nothing_outside_is_touched(shape, device, monkeypatch):
    m, k, n = shape
    a, b = aligned_block(int8s(m, k, device)), aligned_block(int8s(n, k, device, 1))
    before, expected = (a._base.clone(), b._base.clone()), int8_product_torch(a, b.t())
    bands = guard(monkeypatch)
    assert torch.equal(int8_product(a, b.t()), expected) and untouched(bands)
    assert torch.equal(a._base, before[0]) and torch.equal(b._base, before[1])


@kernel_test
def test_twice_is_the_same(device):
    a, b = int8s(130, 300, device), int8s(300, 64, device, 1)
    assert torch.equal(int8_product(a, b), int8_product(a, b))


@kernel_test
def test_as_a_torch_operator(device):
    x, w, scale = int8s(13, 37, device), int8s(20, 37, device, 1), torch.rand(13, 1, device=device) / 100
    residual = floats(13, 20, device)
    for arguments in ((x, w.t(), None, None, torch.int32), (x, w.t(), scale, residual, torch.float32)):
        torch.library.opcheck(torch.ops.nanogft.int8_matmul, arguments)

    def both(x: Tensor, w: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return int8_matmul(x, w, scale, dtype=torch.float16), int8_product(d, w)

    traced = opaque(both)
    for rows in (13, 20):  # the second with sizes that are symbols
        given = int8s(rows, 37, device), w, torch.tensor(0.01, device=device), int8s(rows, 20, device, 2)
        assert all(torch.equal(found, expected) for found, expected in zip(traced(*given), both(*given), strict=True))


# Refusals, on either backend


@pytest.fixture(params=["torch", "triton"])
def backend_and_device(request, device):
    """The device of the backend that refuses."""
    if request.param == "torch":
        return torch.device("cpu")
    request.getfixturevalue("on_triton")
    return device


@pytest.mark.parametrize("a, b, message", [
    ((2, 3, torch.float32), (3, 4, torch.int8), "both operands must be int8"),
    ((2, 3, torch.int8), (3, 4, torch.int32), "both operands must be int8"),
    ((2, 3, torch.int8), (4, 3, torch.int8), r"shapes \(2, 3\) and \(4, 3\)"),
    ((0, 3, torch.int8), (3, 4, torch.int8), "empty operand"),
    ((2, 0, torch.int8), (0, 4, torch.int8), "empty operand"),
    ((2, 3, torch.int8), (3, 0, torch.int8), "empty operand"),
], ids=["float", "int32", "inner size", "no rows", "no inner", "no columns"])  # fmt: skip
def test_products_refuse(a, b, message, backend_and_device):
    a, b = (torch.zeros(rows, columns, dtype=dtype, device=backend_and_device) for rows, columns, dtype in (a, b))
    with pytest.raises(ValueError, match=message):
        int8_product(a, b)


def test_products_refuse_a_vector():
    with pytest.raises(ValueError, match=r"need \(M, K\) and \(K, N\)"):
        int8_product(int8s(2, 3)[0], int8s(3, 4))


def test_matmul_refuses(backend_and_device):
    device = backend_and_device
    x, w, scale = int8s(5, 8, device), int8s(4, 8, device), torch.tensor(0.1, device=device)
    with pytest.raises(ValueError, match="empty operand"):
        int8_matmul(x[:0], w, scale)
    with pytest.raises(ValueError, match="got dtype torch.int32; it must be one of torch.float32"):
        int8_matmul(x, w, scale, dtype=torch.int32)
    for wrong in (torch.ones(4, 1, device=device), scale.double()):
        with pytest.raises(ValueError, match=r"need torch.float32 \(\) or \(5, 1\)"):
            int8_matmul(x, w, wrong)
    with pytest.raises(ValueError, match=r"got inv_rms torch.float32 \(5,\); need torch.float32 \(T, 1\)"):
        int8_matmul(x, w, scale, inv_rms=torch.ones(5, device=device))
    with pytest.raises(ValueError, match=r"a residual torch.float32 \(5, 4\); it must be torch.float16 \(5, 4\)"):
        int8_matmul(x, w, scale, floats(5, 4, device), torch.float16)
