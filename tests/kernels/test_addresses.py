"""In the interpreter a kernel whose mask is lost fails (tests/addresses.py), whatever it does with the address.

    python -m pytest -q tests/kernels/test_addresses.py
"""

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETED, jit, tl
from tests.kernels.inputs import contiguous, int32s, readable

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="addresses are seen in the interpreter alone")


@jit
def _load_kernel(x, out, n, MASKED: tl.constexpr):
    at = tl.arange(0, 16)
    values = tl.load(x + at, mask=at < n, other=0) if MASKED else tl.load(x + at)
    tl.store(out + at, values, mask=at < n)


@jit
def _store_kernel(x, out, n, MASKED: tl.constexpr):
    at = tl.arange(0, 16)
    if MASKED:
        tl.store(out + at, at, mask=at < n)
    else:
        tl.store(out + at, at)


@jit
def _atomic_add_kernel(x, out, n, MASKED: tl.constexpr):
    at = tl.arange(0, 16)
    if MASKED:
        tl.atomic_add(out + at, at, mask=at < n)
    else:
        tl.atomic_add(out + at, at)


@jit
def _wrong_mask_kernel(x, out, n, MASKED: tl.constexpr):
    at = tl.arange(0, 16)
    tl.atomic_max(out + at, at, mask=at < (n if MASKED else n + 1))


@jit
def _atomic_cas_kernel(x, out, n, MASKED: tl.constexpr):
    at = tl.arange(0, 16)
    tl.atomic_cas(out + (tl.minimum(at, n - 1) if MASKED else at), at, at)


@jit
def _scalar_kernel(x, out, n, MASKED: tl.constexpr):
    tl.store(out, tl.load(x + (0 if MASKED else -1)))


@jit
def _descriptor_kernel(x, out, n, MASKED: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, (n if MASKED else n + 1,), (1,), (16,))
    tl.store(out + tl.arange(0, 16), rows.load([0]), mask=tl.arange(0, 16) < n)


KERNELS = [
    (_load_kernel, "load at 3 of 16 addresses outside the launch's arguments, the first 1 bytes from x"),
    (_store_kernel, "store at 3 of 16 addresses outside the launch's arguments, the first 1 bytes from out"),
    (_atomic_add_kernel, "atomic at 3 of 16 addresses"),
    (_wrong_mask_kernel, "atomic at 1 of 14 addresses"),
    (_atomic_cas_kernel, "atomic_cas at 3 of 16 addresses"),
    (_scalar_kernel, "load at 1 of 1 addresses outside the launch's arguments, the first 4 bytes from x"),
    (_descriptor_kernel, "load at 1 of 14 addresses"),
]


def in_a_room(x: Tensor) -> Tensor:
    """With other numbers before and after it."""
    room = torch.full((64,), 77, dtype=x.dtype)
    room[16 : 16 + x.numel()] = x
    return room[16 : 16 + x.numel()]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("layout", [contiguous, in_a_room], ids=readable)
@pytest.mark.parametrize("kernel, words", KERNELS, ids=[kernel.__name__ for kernel, _ in KERNELS])
def test_a_lost_mask_is_seen(kernel, words, layout):
    x, out = layout(int32s(1, 13)[0]), layout(torch.zeros(13, dtype=torch.int32))
    before = out.clone()
    with pytest.raises(Exception, match=f"{kernel.__name__}: {words}"):
        kernel[(1,)](x=x, out=out, n=13, MASKED=False)
    assert torch.equal(out, before)
    kernel[(1,)](x, out, 13, MASKED=True)
