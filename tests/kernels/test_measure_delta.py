"""Delta's scale: the kernel against the reference, bit for bit, and the notes that spare it reading delta.

    python -m pytest -q tests/kernels/test_measure_delta.py
"""

import pytest
import torch
from torch import Tensor

from kernels.measure_delta import (
    absmax,
    absmax_torch,
    largest_noted,
    measure_delta,
    measure_delta_torch,
    note_as,
    prepare_delta,
    with_largest,
)
from kernels.philox import noise_torch
from tests.kernels.inputs import FLOATS, SHAPES, floats, guard, inner_block, kernel_test, layouts, readable, untouched


def test_absmax_refuses_an_empty_tensor():
    with pytest.raises(ValueError, match="at least one element"):
        absmax(torch.empty(0, 4))


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5000), (1, 17000)], ids=readable)
def test_absmax(shape, dtype, device):
    x = floats(*shape, device, dtype)
    for t in (x, x.abs(), -x.abs()):
        assert absmax(t).dtype == torch.float32 and torch.equal(absmax(t), absmax_torch(t))


@kernel_test
@layouts
def test_absmax_with_any_layout(layout, device):
    x = floats(63, 37, device)
    assert torch.equal(absmax(layout(x)), absmax_torch(x))
    for t in (x.flatten(), x[0, 0], x.view(7, 9, 37)):
        assert torch.equal(absmax(t), absmax_torch(t))


@kernel_test
def test_absmax_sees_infinities_and_nans(device):
    x = floats(63, 37, device)
    x[62, 36] = -float("inf")
    assert absmax(x) == float("inf")
    x[0, 0] = -float("nan")
    assert absmax(x).isnan()


def scales_at(device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight's scale, and scratch for `measure_delta`."""
    return torch.tensor(0.0123, device=device), torch.zeros(2, dtype=torch.int32, device=device)


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@pytest.mark.parametrize("shape", [(1, 1), (13, 37), (63, 123), (1, 5000), (1, 17000)], ids=readable)
@pytest.mark.parametrize("before", [0.0, 1e-3, 1e6, float("nan")], ids=["first", "smaller", "larger", "nan"])
def test_measure_delta(shape, dtype, before, device):
    """sigma, the two ratios and scale * sigma, all bits; votes_scale takes the larger, scratch is zeros again."""
    delta, (scale, scratch) = floats(*shape, device, dtype), scales_at(device)
    for levels in (127, 7):
        given, wanted = torch.tensor(before, device=device), torch.tensor(before, device=device)
        expected = measure_delta_torch(delta, scale, wanted, levels)
        measured = measure_delta(delta, scale, given, scratch, levels)
        assert measured.shape == (4,) and torch.equal(measured.nan_to_num(-1), expected.nan_to_num(-1))
        assert torch.equal(given.nan_to_num(-1), wanted.nan_to_num(-1)) and not scratch.any()


@kernel_test
@pytest.mark.parametrize("shape", [(1, 1), (13, 37), (63, 623), (1, 5000), (1, 17000)], ids=readable)
@pytest.mark.parametrize("rows, columns", [(1, 1), (37, 300), (300, 1700)])
def test_prepare_delta(shape, rows, columns, device):
    """What `measure_delta` gives, and the noise of other rows and columns: those that a note is about."""
    delta, (scale, scratch) = floats(*shape, device), scales_at(device)
    given, wanted = torch.tensor(1e-3, device=device), torch.tensor(1e-3, device=device)
    expected = measure_delta_torch(delta, scale, wanted, 127)
    about_noise = torch.tensor([2**40 + 7, 6, 2**33 + 5], device=device), rows, 1001, columns
    measured, noise = prepare_delta(delta, scale, given, scratch, 127, *about_noise)
    assert torch.equal(measured, expected) and torch.equal(given, wanted) and not scratch.any()
    assert noise.dtype == torch.int32 and torch.equal(noise, noise_torch(*about_noise))


def test_prepare_delta_refuses_what_is_no_rng():
    delta, (scale, scratch) = floats(3, 5), scales_at(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"prepare_delta: .* it is torch.int64 \(3,\)"):
        prepare_delta(delta, scale, torch.tensor(0.0), scratch, 127, torch.zeros(2, dtype=torch.int64), 3, 0, 5)


def test_measure_delta_means_what_it_says():
    scale, scratch = scales_at(torch.device("cpu"))
    votes_scale = torch.tensor(0.0)
    for largest, top in ((2.54, 0.02), (1.27, 0.02), (12.7, 0.1)):
        before = votes_scale.item()
        measured = measure_delta(torch.tensor([[0.5, -largest]]), scale, votes_scale, scratch)
        wanted = torch.tensor([largest / 127, before / top, largest / 127 / top, largest / 127 * 0.0123])
        torch.testing.assert_close(measured, wanted)
        assert abs(votes_scale.item() - top) < 1e-8


@kernel_test
def test_measure_delta_hands_on_what_is_not_finite(device):
    delta, (scale, scratch) = floats(63, 37, device), scales_at(device)
    for bad in (float("inf"), -float("inf"), float("nan")):
        delta[41, 3] = bad
        votes_scale = torch.tensor(0.5, device=device)
        measured = measure_delta(delta, scale, votes_scale, scratch)
        assert not measured[0].isfinite() and not votes_scale.isfinite() and not scratch.any()


def test_what_is_noted_holds_until_delta_changes():
    delta = with_largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), torch.tensor([3.0, 2.0]))
    assert largest_noted(delta).tolist() == [3.0, 2.0]
    view, copy = delta.view(4), delta * 1
    assert largest_noted(view) is None and largest_noted(copy) is None
    note_as(view, delta)
    assert largest_noted(view).tolist() == [3.0, 2.0]
    delta.mul_(2)
    assert largest_noted(delta) is None and largest_noted(view) is None


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    delta = inner_block(floats(37, 63, device))
    before, largest, (scale, scratch) = delta._base.clone(), absmax_torch(delta), scales_at(device)
    rng = torch.tensor([1, 2, 3], device=device)
    bands, votes_scale = guard(monkeypatch), torch.tensor(0.0, device=device)
    assert torch.equal(absmax(delta), largest)
    sigma = largest / torch.full_like(largest, 127)  # a GPU multiplies by 1 / 127 if that is a Python number
    assert torch.equal(measure_delta(delta, scale, votes_scale, scratch)[0], sigma)
    prepare_delta(delta, scale, votes_scale, scratch, 127, rng, 37, 5, 63)
    assert untouched(bands) and torch.equal(delta._base.view(torch.int32), before.view(torch.int32))


@kernel_test
def test_as_a_torch_operator(device):
    delta, (scale, scratch) = floats(13, 37, device), scales_at(device)
    given = delta, scale, torch.tensor(0.0, device=device), scratch, 127
    torch.library.opcheck(torch.ops.nanogft.measure_delta, given)
    torch.library.opcheck(torch.ops.nanogft.prepare_delta, (*given, torch.tensor([1, 2, 3], device=device), 13, 5, 37))
