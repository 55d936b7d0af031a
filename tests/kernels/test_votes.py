"""Votes D^T X: the torch reference against int64, the kernel against the reference, bit for bit.

    python -m pytest -q tests/kernels/test_votes.py
"""

import pytest
import torch
from torch import Tensor

import kernels.int8_matmul as int8_matmul_module
import kernels.votes as module
from kernels import backend
from kernels.backend import INTERPRETED
from kernels.limits import MAX_REDUCTION
from kernels.votes import accumulate_votes, accumulate_votes_torch, votes_torch
from tests.kernels.inputs import LAYOUTS, inner_block, int8s, kernel_test, layouts, opaque, readable
from tests.kernels.update_inputs import fenced, some_rng, some_votes, torch_backend, unharmed

# T, out, in
SHAPES = [(1, 1, 1), (1, 7, 33), (7, 33, 1), (63, 1, 7), (65, 63, 65), (130, 65, 130), (200, 64, 64)]
SHAPES += [(640, 144, 272), (16, 16, 16)]  # aligned, so that a kernel can copy tiles by descriptor
SHORT = [(1, 7, 33), (65, 63, 65)]
RATIOS = [None, (1.0, 0.3721), (0.3721, 1.0), (1.0, 1.0), (0.0, 1.0), (0.5, 1.0)]
sizes = pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)


def case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"):
    """D, X, and votes already there: small enough that the sum fits int32."""
    tokens, out, inner = shape
    votes = (some_votes((out, inner)).to(torch.int64) // 2).to(dtype)
    return int8s(tokens, out, device, 1), int8s(tokens, inner, device, 2), votes.to(device)


def as_tensors(ratios: tuple[float, float] | None, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    return () if ratios is None else tuple(torch.tensor(ratio, device=device) for ratio in ratios)


def expected_votes(d: Tensor, x: Tensor, votes: Tensor, ratios: tuple[float, float] | None) -> list[list[int]]:
    """In Python's numbers. round() takes halves to even."""
    new = d.cpu().long().t() @ x.cpu().long()
    if ratios is None:
        return (votes.cpu().long() + new).tolist()
    old_ratio, new_ratio = (torch.tensor(ratio).item() for ratio in ratios)
    return [
        [round(a * old_ratio + b * new_ratio) for a, b in zip(row, added)]
        for row, added in zip(votes.tolist(), new.tolist())
    ]


# The torch reference


@pytest.fixture(params=["native", "through-fp32"])
def way(request, monkeypatch):
    """How the reference multiplies on a CPU, with int8 instructions or without."""
    if request.param == "through-fp32":
        monkeypatch.setattr(int8_matmul_module, "CPU_MULTIPLIES_INT8", False)


@pytest.mark.usefixtures("way")
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_reference_is_exact(shape, layout):
    d, x, _ = case(shape, torch.int32)
    for right in LAYOUTS:
        found = votes_torch(layout(d), right(x))
        assert found.dtype == torch.int32 and torch.equal(found.long(), d.long().t() @ x.long())


@pytest.mark.parametrize("tokens", [1, 2, 7, 37, 64])
@pytest.mark.parametrize("inner", [1, 2, 7, 64])
def test_reference_of_one_output(tokens, inner):
    """delta of one column: its transpose is a row of strides (1, 1)."""
    d, x = int8s(tokens, 1), int8s(tokens, inner, seed=1)
    assert d.t().stride() == (1, 1)
    assert torch.equal(votes_torch(d, x).long(), d.t().long() @ x.long())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sign", [1, -1])
def test_reference_at_the_limit_of_int32(sign):
    assert MAX_REDUCTION == 133_144
    d = torch.full((MAX_REDUCTION + 1, 2), 127, dtype=torch.int8)
    x = torch.full((MAX_REDUCTION + 1, 3), sign * 127, dtype=torch.int8)
    expected = torch.full((2, 3), sign * 127 * 127 * MAX_REDUCTION)
    at, past = votes_torch(d[:-1], x[:-1]), votes_torch(d, x)
    assert at.dtype == torch.int32 and torch.equal(at.long(), expected)
    assert past.dtype == torch.int64 and torch.equal(past, expected + sign * 127 * 127)


def test_reference_of_more_rows_than_int32_holds():
    rows = 2 * MAX_REDUCTION + 37
    d, x = int8s(rows, 3), int8s(rows, 2, seed=1)
    found = votes_torch(d, x)
    assert found.dtype == torch.int64 and torch.equal(found, d.long().t() @ x.long())


@sizes
@pytest.mark.parametrize("ratios", RATIOS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_reference_adds_and_rescales(shape, ratios, dtype):
    d, x, votes = case(shape, dtype)
    expected, rng = expected_votes(d, x, votes, ratios), some_rng()
    before = rng.tolist()
    accumulate_votes(d, x, votes, rng, *as_tensors(ratios))
    assert votes.dtype == dtype and votes.tolist() == expected
    assert rng.tolist() == [*before[:2], before[2] + shape[0]]


def test_halves_go_to_the_even_neighbour():
    d, x = torch.zeros(1, 6, dtype=torch.int8), torch.ones(1, 1, dtype=torch.int8)
    votes = torch.tensor([[-3], [-1], [1], [3], [5], [7]])
    accumulate_votes(d, x, votes, some_rng(), *as_tensors((0.5, 1.0)))
    assert votes.flatten().tolist() == [-2, 0, 0, 2, 2, 4]


def test_votes_of_int64_sum_past_int32():
    d = torch.full((1000, 1), 127, dtype=torch.int8)
    votes = torch.tensor([[2**31 - 5]])
    for _ in range(2):
        accumulate_votes(d, d, votes, some_rng())
    assert votes.item() == 2**31 - 5 + 2 * 127 * 127 * 1000


# The kernel


def agrees(d: Tensor, x: Tensor, votes: Tensor, ratios: tuple[float, float] | None, device) -> bool:
    """Whether kernel and reference end with equal votes and equal rng."""
    found, expected, rng, there = votes.clone(), votes.clone(), some_rng(device), some_rng(device)
    accumulate_votes(d, x, found, rng, *as_tensors(ratios, device))
    accumulate_votes_torch(d, x, expected, there, *as_tensors(ratios, device))
    return torch.equal(found, expected) and torch.equal(rng, there) and found.dtype == votes.dtype


@kernel_test
@sizes
@pytest.mark.parametrize("ratios", RATIOS[:4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_kernel(shape, ratios, dtype, device):
    assert agrees(*case(shape, dtype, device), ratios, device)


@kernel_test
@pytest.mark.parametrize("right", LAYOUTS, ids=readable)
@layouts
def test_kernel_with_any_layout(layout, right, device):
    d, x, votes = case((63, 33, 65), torch.int32, device)
    assert agrees(layout(d), right(x), votes, None, device)
    assert agrees(layout(d[:1]), right(x[:1]), votes, (1.0, 0.3), device)


@kernel_test
def test_kernel_of_an_expanded_operand(device):
    """One row or column seen many times, with a stride of 0."""
    d, x, votes = case((65, 7, 33), torch.int32, device)
    for left in (d[:1].expand(65, 7), d[:, :1].expand(65, 7)):
        assert agrees(left, x, votes, None, device)


@kernel_test
@pytest.mark.parametrize("ratios", [(0.0, 1.0), (0.5, 1.0), (1.0, 1 - 2**-24), (2**-24, 1.0)], ids=str)
def test_kernel_rounds_as_the_reference(ratios, device):
    """Halves, and products of 55 bits, which a sum that rounds once would round otherwise."""
    d, x, _ = case((65, 33, 65), torch.int32, device)
    votes = torch.arange(-1000, 1145, device=device).view(33, 65) * 999_983 * (ratios[0] > 0)
    for dtype in (torch.int32, torch.int64):
        assert agrees(d, x, votes.to(dtype), ratios, device)
        assert agrees(d * 0, x, votes.to(dtype), ratios, device)


@kernel_test
@pytest.mark.parametrize("ratios", [None, (0.0, 1.0), (0.5, 1.0)], ids=str)
def test_kernel_shares_the_tokens_of_a_block_out(ratios, device, monkeypatch):
    """Several programs to a block, the last with few tokens; votes that are rescaled are rounded once all the same."""
    monkeypatch.setattr(module, "_share", lambda tokens, step, *_: step)
    for tokens in (64, 65, 200, 384):
        d, x, votes = case((tokens, 65, 33), torch.int32, device)
        assert agrees(d, x, votes * (ratios != (0.0, 1.0)), ratios, device)


@kernel_test
def test_kernel_at_the_limit_of_int32(device, monkeypatch):
    if INTERPRETED:  # a small block, and few long steps through the operands
        monkeypatch.setattr(module, "RAGGED", {"BLOCK": 16, "TOKENS": 8192, "num_warps": 4})
    d = torch.full((MAX_REDUCTION, 1), 127, dtype=torch.int8, device=device)
    votes = torch.zeros(1, 2, dtype=torch.int32, device=device)
    accumulate_votes(d, torch.cat([d, -d], dim=1), votes, some_rng(device))
    assert votes.tolist() == [[127 * 127 * MAX_REDUCTION, -127 * 127 * MAX_REDUCTION]]


@kernel_test
@pytest.mark.parametrize("tokens", [99, 100, 101, 150, 293])
def test_kernel_takes_long_batches_in_parts(tokens, device, monkeypatch):
    """With a limit of 100 tokens: within it one sum, past it several into int64 votes, rounded once."""
    monkeypatch.setattr(module, "MAX_REDUCTION", 100)
    monkeypatch.setattr(module, "TOKENS_SUMMED", 96)
    d, x, votes = case((tokens, 7, 33), torch.int64, device)
    for ratios in (None, (1.0, 0.3721), (0.3721, 1.0)):
        assert agrees(d, x, votes, ratios, device)
        with torch_backend():
            found = votes.clone()
            accumulate_votes(d, x, found, some_rng(device), *as_tensors(ratios, device))
        assert found.tolist() == expected_votes(d, x, votes, ratios)


@kernel_test
@sizes
def test_nothing_outside_is_touched(dtype, device):
    d, x, votes = case((65, 33, 130), dtype, device)
    d, x = inner_block(d), inner_block(x)
    before = d._base.clone(), x._base.clone()
    for ratios in (None, (0.3721, 1.0)):
        found, votes_bands = fenced(votes)
        rng, rng_bands = fenced(some_rng(device))
        accumulate_votes(d, x, found, rng, *as_tensors(ratios, device))
        assert found.tolist() == expected_votes(d, x, votes, ratios)
        assert unharmed(votes_bands, rng_bands)
    assert torch.equal(d._base, before[0]) and torch.equal(x._base, before[1])


@kernel_test
def test_twice_is_the_same(device):
    d, x, votes = case((130, 65, 33), torch.int32, device)
    first, second = votes.clone(), votes.clone()
    for found in (first, second):
        accumulate_votes(d, x, found, some_rng(device), *as_tensors((1.0, 0.7), device))
    assert torch.equal(first, second)


@kernel_test
def test_micro_batches_add_up(device):
    """The votes of parts in any order are those of the whole."""
    d, x, votes = case((130, 33, 65), torch.int32, device)
    whole, parts = votes.clone(), votes.clone()
    accumulate_votes(d, x, whole, some_rng(device))
    rng = some_rng(device)
    for first, last in ((63, 130), (0, 1), (1, 63)):
        accumulate_votes(d[first:last], x[first:last], parts, rng)
    assert torch.equal(parts, whole) and rng[2] == some_rng()[2] + 130


@kernel_test
def test_as_torch_operators(device):
    d, x, votes = case((13, 7, 33), torch.int32, device)
    for operator in (torch.ops.nanogft.accumulate_votes, torch.ops.nanogft.accumulate_votes_torch):
        for ratios in (None, (0.5, 1.0)):
            torch.library.opcheck(operator, (d, x, votes.clone(), some_rng(device), *as_tensors(ratios, device)))

    def vote(d: Tensor, x: Tensor, votes: Tensor, rng: Tensor) -> None:
        accumulate_votes(d, x, votes, rng)
        accumulate_votes(d, x, votes, rng)

    traced = opaque(vote)
    for tokens in (13, 20):  # the second with sizes that are symbols
        d, x, votes = case((tokens, 7, 33), torch.int32, device)
        found, expected, rng, there = votes.clone(), votes.clone(), some_rng(device), some_rng(device)
        traced(d, x, found, rng)
        vote(d, x, expected, there)
        assert torch.equal(found, expected) and torch.equal(rng, there)


@kernel_test
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_refusals(name, device):
    backend.use(name)
    d, x, votes = case((5, 2, 3), torch.int32, device)
    rng = some_rng(device)
    for operands in ((d[:0], x[:0], votes), (d, x[:4], votes), (d, x, votes.t()), (x, d, votes)):
        with pytest.raises(ValueError, match=r"need \(T, out\), \(T, in\) and \(out, in\), T at least 1"):
            accumulate_votes(*operands, rng)
    for operands in ((d.float(), x), (d, x.int())):
        with pytest.raises(ValueError, match="both must be int8"):
            accumulate_votes(*operands, votes, rng)
    for bad in (votes.float(), votes.t().contiguous().t()):
        with pytest.raises(ValueError, match="they must be int32 or int64, and contiguous"):
            accumulate_votes(d, x, bad, rng)
    long = d[:1].expand(MAX_REDUCTION + 1, 2), x[:1].expand(MAX_REDUCTION + 1, 3)
    with pytest.raises(ValueError, match="133145 rows can overflow int32, which holds 133144; .*max_tokens=133145"):
        accumulate_votes(*long, votes, rng)
    assert rng.tolist() == some_rng().tolist()
