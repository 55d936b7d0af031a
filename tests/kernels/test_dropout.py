"""Dropout: the mask, its backward pass, and the kernel against the reference.

    python -m pytest -q tests/kernels/test_dropout.py
"""

import pytest
import torch

from kernels.dropout import dropout, dropout_torch, dropped
from kernels.measure_delta import largest_noted
from kernels.philox import make_rng
from tests.kernels.inputs import FLOATS, contiguous, equal, every_other, floats, kernel_test, readable, transposed

SHAPES = [(1, 1), (3, 8), (33, 257), (70, 96), (5, 1024)]


def rng_at(step=3, row=0, device="cpu"):
    rng = make_rng(11, device)
    rng[1], rng[2] = step, row
    return rng


@kernel_test
@pytest.mark.parametrize("layout", [contiguous, transposed, every_other], ids=readable)
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@pytest.mark.parametrize("shape", SHAPES, ids=readable)
def test_kernel_equals_the_reference(shape, dtype, layout, device):
    x = layout(floats(*shape, device, dtype))
    for p, group in ((0.2, 1), (0.7, shape[1] if shape[1] < 9 else 1)):
        found = dropped(x, p, rng_at(row=5, device=device), 1000, group)
        assert equal(found, dropout_torch(x, p, rng_at(row=5, device=device), 1000, group))
        assert largest_noted(found).max() == found.abs().max().float()


@kernel_test
def test_kernel_drops_groups_of_columns(device):
    x = torch.ones(64, 96, device=device)
    found = dropped(x, 0.5, rng_at(device=device), 7, 32)
    assert torch.equal(found, dropout_torch(x, 0.5, rng_at(device=device), 7, 32))
    assert torch.equal(found.view(64, 3, 32).amin(dim=2), found.view(64, 3, 32).amax(dim=2))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_a_share_p_is_zero_and_the_mean_stays(p):
    found = dropped(torch.ones(512, 300), p, rng_at())
    assert set(found.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
    assert abs((found == 0).float().mean() - p) < 0.01 and abs(found.mean() - 1) < 0.01


def test_the_mask_is_a_function_of_step_row_and_column():
    x = torch.ones(40, 30)
    whole = dropped(x, 0.3, rng_at(), 100)
    assert torch.equal(dropped(x[16:], 0.3, rng_at(row=16), 100), whole[16:])
    assert torch.equal(dropped(x[:, 7:], 0.3, rng_at(), 107), whole[:, 7:])
    for other in (dropped(x, 0.3, rng_at(step=4), 100), dropped(x, 0.3, rng_at(row=1), 100), dropped(x, 0.3, rng_at())):
        assert 0.2 < (other != whole).float().mean() < 0.6  # 2 p (1 - p) = 0.42 of independent masks


@kernel_test
def test_delta_passes_where_the_value_did(device):
    x = floats(20, 33, device).requires_grad_()
    rng = rng_at(device=device)
    y, delta = dropout(x, 0.4, rng, 9), floats(20, 33, device, seed=1)
    y.backward(delta)
    passed = dropped(torch.ones_like(delta), 0.4, rng, 9) != 0
    assert torch.equal(x.grad, dropped(delta, 0.4, rng, 9)) and torch.equal(y != 0, passed & (x != 0))


def test_wrong_arguments_are_told():
    x = torch.ones(4, 6)
    for wrong, why in (((x, 1.0, rng_at()), "below 1"), ((x, 0.1, rng_at(), 0, 4), "whole groups"),
                       ((x, 0.1, torch.zeros(3)), "int64"), ((x.long(), 0.1, rng_at()), "int64")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            dropped(*wrong)
