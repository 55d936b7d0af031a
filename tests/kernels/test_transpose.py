"""kernels/transpose.py: the same numbers, each column in one piece."""

import pytest
import torch

from kernels.transpose import by_columns
from tests.kernels.inputs import LAYOUTS, int8s, kernel_test, readable
from tests.kernels.update_inputs import fenced, unharmed


@kernel_test
@pytest.mark.parametrize("layout", LAYOUTS, ids=readable)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 1), (65, 63), (130, 200)], ids=readable)
def test_columns_lie_in_one_piece(shape, layout, device):
    x = int8s(*shape, device)
    found = by_columns(layout(x))
    assert torch.equal(found, x) and (found.stride(0) == 1 or shape[0] == 1)


@kernel_test
def test_what_lies_right_is_not_copied(device):
    x = int8s(5, 7, device)
    assert by_columns(x.t().contiguous().t()).stride() == (1, 5)
    for t in (x.t(), x[:1]):
        assert by_columns(t).data_ptr() == t.data_ptr()


@kernel_test
def test_nothing_outside_is_read_into_it(device):
    inside, bands = fenced(int8s(65, 63, device))
    assert torch.equal(by_columns(inside), inside) and unharmed(bands)
