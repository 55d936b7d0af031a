"""The int8 product kernels and the votes against their torch references, bit for bit.

Triton's interpreter cuts fp32 to bfloat16 where a GPU rounds it: there, results of that type are compared with the
cut reference.

    python -m pytest -q tests/kernels/test_triton_matmul.py
"""

import pytest
import torch
from torch import Tensor

import kernels.int8_matmul as module
from kernels.backend import INTERPRETED
from kernels.contribution import PART, votes, votes_torch
from kernels.int8_matmul import (
    MAX_REDUCTION,
    int8_matmul,
    int8_matmul_torch,
    int8_product,
    int8_product_torch,
    launch,
)

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

# M, K, N of a product: less than a tile, an edge in every direction, several tiles, more rows of tiles than a group has
SHAPES = [
    (1, 1, 1), (1, 7, 13), (13, 1, 7), (7, 300, 1), (37, 63, 64), (130, 123, 37), (63, 300, 260), (300, 37, 130),
    (1100, 16, 130),
]  # fmt: skip
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def shape_id(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def int8s(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """Uniform on -127 .. 127, both ends present where there is room."""
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator(rows, columns, seed))
    if x.numel() > 1:
        x.view(-1)[0], x.view(-1)[-1] = 127, -127
    return x.to(device)


def floats(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=generator(rows, columns)).to(device, dtype)


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y float32 as a kernel stores it: rounded, but for bfloat16 in the interpreter."""
    if INTERPRETED and dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -(2**16)).view(torch.float32)
    return y.to(dtype)


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def padded_transposed(x: Tensor) -> Tensor:
    """As the quantizers write it for the votes: strides (1, rows padded to 16), poison behind every column."""
    room = torch.full((x.shape[1], -(-x.shape[0] // 16) * 16), -128, dtype=x.dtype, device=x.device)
    room[:, : x.shape[0]] = x.t()
    return room[:, : x.shape[0]].t()


def every_other(x: Tensor) -> Tensor:
    room = torch.full((2 * x.shape[0], 2 * x.shape[1]), -128, dtype=x.dtype, device=x.device)
    room[::2, ::2] = x
    return room[::2, ::2]


def inner_block(x: Tensor) -> Tensor:
    """A view whose rows begin off 16-byte boundaries, in a room of poison."""
    room = torch.full((x.shape[0] + 5, x.shape[1] + 3), -128, dtype=x.dtype, device=x.device)
    room[2:-3, 1:-2] = x
    return room[2:-3, 1:-2]


def aligned_block(x: Tensor) -> Tensor:
    """A view that the kernel reads in place, though poison follows every row."""
    room = torch.full((x.shape[0] + 2, -(-x.shape[1] // 16) * 16 + 32), -128, dtype=x.dtype, device=x.device)
    room[1:-1, 16 : 16 + x.shape[1]] = x
    return room[1:-1, 16 : 16 + x.shape[1]]


LAYOUTS = [torch.Tensor.contiguous, transposed, padded_transposed, every_other, inner_block, aligned_block]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


# Both kernels: descriptors need sm_90 on a GPU, the interpreter knows them everywhere.
OLD_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


@pytest.fixture(params=["pointers"] if OLD_GPU else ["pointers", "descriptors"])
def way(request, monkeypatch):
    """Which of the two kernels is launched."""
    descriptors = request.param == "descriptors"
    monkeypatch.setattr(module, "_has_copy_engine", lambda device: descriptors)
    return request.param


@shapes
def test_products_equal_the_reference(shape, way, device):
    m, k, n = shape
    a, b = int8s(m, k, device), int8s(k, n, device, 1)
    product = int8_product(a, b)
    assert product.dtype == torch.int32 and product.is_contiguous()
    assert torch.equal(product, int8_product_torch(a, b))


@pytest.mark.parametrize("right", LAYOUTS, ids=lambda layout: layout.__name__)
@layouts
def test_operands_of_any_stride(layout, right, device):
    for m, k, n in ((13, 37, 7), (37, 64, 20)):
        a, b = layout(int8s(m, k, device)), right(int8s(k, n, device, 1))
        assert torch.equal(int8_product(a, b), int8_product_torch(a, b))


def test_expanded_operands(device):
    a, b = int8s(13, 37, device), int8s(37, 7, device, 1)
    for left in (a[:1].expand(13, 37), a[:, :1].expand(13, 37)):
        for right in (b[:1].expand(37, 7), b[:, :1].expand(37, 7)):
            assert torch.equal(int8_product(left, right), int8_product_torch(left, right))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("shape", [(7, 63, 13), (130, 37, 264)], ids=shape_id)
def test_scaled_products_equal_the_reference(shape, per_row, residual, dtype, way, device):
    m, k, n = shape
    x, w = int8s(m, k, device), int8s(n, k, device, 1)
    scale = 0.01 * torch.rand((m, 1) if per_row else (), generator=generator(m)).to(device)
    for layout in (torch.Tensor.contiguous, every_other) if residual else (torch.Tensor.contiguous,):
        added = layout(floats(m, n, device, dtype)) if residual else None
        y = int8_matmul(x, w, scale, added, dtype)
        assert y.dtype == dtype and y.is_contiguous()
        exact = int8_matmul_torch(x, w, scale, added if added is None else added.float())
        assert torch.equal(y, narrowed(exact, dtype))


def test_a_backward_product(device):
    """D W with W as it is stored, out along its rows: the reduced axis is not the contiguous one."""
    d, w = int8s(63, 123, device), int8s(123, 37, device, 1)
    scale = torch.tensor(0.01, device=device)
    assert torch.equal(int8_product(d, w), int8_product_torch(d, w))
    y = int8_matmul(d, w.t(), scale, dtype=torch.float16)
    assert torch.equal(y, int8_matmul_torch(d, w.t(), scale, dtype=torch.float16))


@layouts
@pytest.mark.parametrize("shape", [(1, 7, 13), (63, 1, 1), (300, 37, 64), (1200, 20, 7)], ids=shape_id)
def test_votes_equal_the_reference(shape, layout, device):
    t, out, n = shape
    d, x = layout(int8s(t, out, device)), layout(int8s(t, n, device, 1))
    v = votes(d, x)
    assert v.dtype == torch.int32 and torch.equal(v, votes_torch(d, x))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_sums_by_parts(parts, device, monkeypatch):
    """Parts that end inside K, on its end and, with 7 of 3 blocks, past it."""
    monkeypatch.setattr(module, "_parts", lambda *sizes: parts)
    for k in (37, 256, 300):
        a, b = int8s(70, k, device), int8s(k, 130, device, 1)
        assert torch.equal(int8_product(a, b, split=True), int8_product_torch(a, b))


def test_parts_fill_the_processors():
    for m, n, k in ((64, 64, 65_536), (384, 1536, 16_384), (768, 3072, 65_536)):
        parts = module._parts(m, n, k, 132)
        tiles = -(-m // module.SPLIT_TILE[0]) * -(-n // module.SPLIT_TILE[1])
        assert tiles * parts >= min(132, tiles * module.MOST_PARTS) and parts <= module.MOST_PARTS
    assert module._parts(64, 64, 100, 132) == 1
    assert module._parts(8192, 8192, 65_536, 132) == 1


def test_products_at_the_limit_of_int32(device, monkeypatch):
    monkeypatch.setattr(module, "_parts", lambda *sizes: 2)
    d = torch.full((MAX_REDUCTION + 1, 1), 127, dtype=torch.int8, device=device)
    x = torch.tensor([[127, -127]], dtype=torch.int8, device=device).repeat(MAX_REDUCTION + 1, 1)
    largest = 127 * 127 * MAX_REDUCTION
    assert votes(d[:-1], x[:-1]).tolist() == [[largest, -largest]]
    with pytest.raises(ValueError, match="133145 products can overflow int32; the limit is 133144"):
        int8_product(d.t(), x)
    past = votes(d, x)
    assert past.dtype == torch.int64 and past.tolist() == [[largest + 127 * 127, -largest - 127 * 127]]
    assert PART % 16 == 0 and PART <= MAX_REDUCTION


@pytest.mark.parametrize("shape", [(13, 64, 20), (37, 48, 68)], ids=shape_id)
def test_nothing_is_written_beside_the_result(shape, way, device, monkeypatch):
    """The result as a block of a larger tensor of known values, which must keep them."""
    m, k, n = shape
    band = 4096
    room = torch.full((m * n + 2 * band,), 123456, dtype=torch.int32, device=device)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: room[band:-band].view(m, n))
    a, b = aligned_block(int8s(m, k, device)), aligned_block(int8s(n, k, device, 1))
    before = a.clone(), b.clone()
    product = launch(a, b, None, None, torch.int32)
    assert torch.equal(product, int8_product_torch(a, b.t()))
    assert (room[:band] == 123456).all() and (room[-band:] == 123456).all()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_operands_that_are_aligned_are_not_copied(device):
    x = int8s(7, 64, device)
    assert module._aligned(x) is x
    assert module._aligned(aligned_block(x)).data_ptr() % 16 == 0
    votes_view = padded_transposed(int8s(64, 7, device)).t()
    assert module._aligned(votes_view) is votes_view
    for other in (transposed(x), x[:, :37], inner_block(x), x[:1].expand(7, 64)):
        copy = module._aligned(other)
        assert copy.stride(1) == 1 and copy.stride(0) % 16 == 0 and copy.shape[1] % 16 == 0
        assert torch.equal(copy[:, : other.shape[1]], other) and (copy[:, other.shape[1] :] == 0).all()


def test_twice_the_same(way, device):
    a, b = int8s(130, 300, device), int8s(300, 64, device, 1)
    assert torch.equal(int8_product(a, b), int8_product(a, b))
    assert torch.equal(votes(a.t(), b), votes(a.t(), b))


@pytest.mark.parametrize("a, b, message", [
    ((2, 3, torch.float32), (3, 4, torch.int8), "both operands must be int8"),
    ((2, 3, torch.int8), (4, 3, torch.int8), r"shapes \(2, 3\) and \(4, 3\)"),
    ((0, 3, torch.int8), (3, 4, torch.int8), "empty operand"),
    ((2, 0, torch.int8), (0, 4, torch.int8), "empty operand"),
    ((2, 3, torch.int8), (3, 0, torch.int8), "empty operand"),
], ids=["float", "inner size", "no rows", "no inner", "no columns"])  # fmt: skip
def test_products_refuse(a, b, message, device):
    a, b = (torch.zeros(rows, columns, dtype=dtype, device=device) for rows, columns, dtype in (a, b))
    with pytest.raises(ValueError, match=message):
        int8_product(a, b)


def test_matmul_refuses(device):
    x, w, scale = int8s(5, 8, device), int8s(4, 8, device), torch.tensor(0.1, device=device)
    with pytest.raises(ValueError, match="got dtype torch.int32; it must be one of torch.float32"):
        int8_matmul(x, w, scale, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a scale of shape \(4, 1\); need \(\) or \(5, 1\)"):
        int8_matmul(x, w, torch.ones(4, 1, device=device))
    with pytest.raises(ValueError, match=r"a residual torch.float32 \(5, 4\); it must be torch.float16 \(5, 4\)"):
        int8_matmul(x, w, scale, floats(5, 4, device), torch.float16)
    with pytest.raises(ValueError, match="the kernels address 8388608"):
        launch(x, x[:1].expand(2**23 + 1, 8), None, None, torch.int32)


def test_as_torch_operators(device):
    x, w, scale = int8s(13, 37, device), int8s(20, 37, device, 1), torch.rand(13, 1, device=device) / 100
    checks = ("test_schema", "test_faketensor")
    operator = torch.ops.nanogft.int8_matmul.default
    residual = floats(13, 20, device)
    for arguments in ((x, w, None, None, torch.int32, True), (x, w, scale, residual, torch.float32, False)):
        torch.library.opcheck(operator, arguments, test_utils=checks)

    def both(x, w, scale, d):
        return int8_matmul(x, w, scale, dtype=torch.float16), int8_product(d, w), votes(d, x)

    d = int8s(13, 20, device, 2)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(x, w, scale, d), both(x, w, scale, d), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
