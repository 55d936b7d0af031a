"""The rule `balanced`: the reference against loops, the kernels against the reference.

    python -m pytest -q tests/kernels/test_balanced.py
"""

import math

import pytest
import torch
from torch import Tensor

from kernels import balanced as module
from kernels.balanced import balanced, balanced_torch
from kernels.scores import score
from tests.kernels.inputs import (
    every_other,
    generator,
    guard,
    inner_block,
    kernel_test,
    readable,
    transposed,
    untouched,
)
from tests.kernels.update_inputs import some_votes

SHAPES = [(1, 1), (1, 33), (37, 1), (7, 13), (65, 33), (7, 300), (300, 7), (2, 33, 48), (3, 5, 70)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=readable)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within a few roundings of each number: norms are sums of squares, in which nothing cancels."""
    near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
    return found.dtype == torch.float32 and found.shape == expected.shape and near


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=readable)
def test_reference_against_loops(shape):
    votes = some_votes(shape)
    votes[0] = 0
    s = [[float(v) for v in row] for row in votes.tolist()]
    for _ in range(3):
        s = [[v / (math.hypot(*row) or 1) for v in row] for row in s]
        norms = [math.hypot(*column) or 1 for column in zip(*s)]
        s = [[v / norm for v, norm in zip(row, norms)] for row in s]
    found = balanced_torch(votes)
    assert found.dtype == torch.float32 and (found[0] == 0).all()
    torch.testing.assert_close(found.double(), torch.tensor(s, dtype=torch.float64), rtol=1e-5, atol=1e-12)


@kernel_test
@shapes
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=readable)
def test_kernels(shape, dtype, device):
    """Votes of all sizes up to 2^31, of int64 2^53; rows and columns of zeros."""
    votes = some_votes(shape).to(device, dtype) * (2**22 if dtype == torch.int64 else 1)
    if dtype == torch.float32:
        votes *= 0.37
    for zeros in (False, True):
        if zeros:
            votes[..., ::3, :] = 0
            votes[..., :, 1::4] = 0
        found = balanced(votes)
        assert close(found, balanced_torch(votes)) and torch.equal(found == 0, votes == 0)
        assert torch.equal(found, balanced(votes)) and found.is_contiguous()
        if len(shape) == 3:
            assert torch.equal(score("balanced", votes, None, 64), found)
            assert all(close(s, balanced(v)) for s, v in zip(found, votes, strict=True))
    assert not balanced(torch.zeros_like(votes)).any()


@kernel_test
def test_huge_and_tiny_side_by_side(device):
    """Norms of rows and columns that differ by as much as votes can."""
    votes = torch.ones(40, 300, dtype=torch.int64)
    votes[::2] = 2**53
    votes[:, ::3] *= -1
    votes[:, 5] = votes[3] = 0
    votes[0, 5] = votes[3, 0] = 1
    votes = votes.to(device)
    assert close(balanced(votes), balanced_torch(votes))
    assert close(balanced(votes.float() * 1e-3), balanced_torch(votes.float() * 1e-3))


@kernel_test
def test_what_is_not_finite_stays_so(device):
    """So that a fault in votes is not hidden in the moves."""
    for fault in (float("nan"), float("inf")):
        votes = torch.randn(9, 40, generator=generator(0)).to(device)
        votes[4, 7] = fault
        assert torch.equal(balanced(votes).isnan(), balanced_torch(votes).isnan())


@kernel_test
@pytest.mark.parametrize("layout", [transposed, every_other, inner_block], ids=readable)
def test_layouts(layout, device):
    votes = some_votes((65, 33)).to(device)
    assert torch.equal(balanced(layout(votes)), balanced(votes))


@kernel_test
@pytest.mark.parametrize("shape", [(1, 1), (65, 33), (2, 7, 300)], ids=readable)
def test_nothing_else_is_touched(shape, device, monkeypatch):
    votes = some_votes(shape).to(device)
    before, expected = votes.clone(), balanced(votes)
    bands = guard(monkeypatch)
    found = balanced(votes)
    assert torch.equal(found, expected) and torch.equal(votes, before)
    assert untouched(bands)


@kernel_test
def test_many_strips_and_long_rows(device, monkeypatch):
    """More strips than are added up at once, of one block or of several; rows of which a block holds one, and rows too
    long for the kernels."""
    for shape in ((300, 70), (9, 2100)):
        votes = some_votes(shape).to(device)
        monkeypatch.setattr(module, "SUMS", {"STRIPS": 4, "COLUMNS": 256, "num_warps": 4})
        for warps in (1, 4, 16):
            monkeypatch.setattr(module, "WARPS", warps)
            assert close(balanced(votes), balanced_torch(votes))
    monkeypatch.setattr(module, "MAX_COLUMNS", 2099)
    assert torch.equal(balanced(votes), balanced_torch(votes))


@kernel_test
def test_a_matrix_has_the_same_scores_in_any_stack(device):
    votes = torch.randint(-99, 100, (4, 200, 65), generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(balanced(votes), torch.cat([balanced(matrix[None]) for matrix in votes]))
