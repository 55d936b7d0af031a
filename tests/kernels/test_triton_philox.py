"""Philox in Triton kernels against the numpy version.

    python -m pytest -q tests/kernels/test_triton_philox.py
"""

import pytest
import torch

from kernels.backend import jit, tl
from kernels.philox import dither, dither_at, dither_words, dither_words_torch, philox_words, words

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

KEYS = [
    (0, 0, 0, 0), (1, 1, 1, 1), (11, 12, 13, 5), (-1, 2**32 - 1, 19, 2**34 - 3), (2**63 + 5, 1, 16 * 7 + 4, 2**40 + 1),
]  # fmt: skip


@jit
def _words_kernel(out, seed, step, stream, start, n, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    if SCALAR:
        element = start + tl.program_id(0).to(tl.int64)
        tl.store(out + tl.program_id(0), philox_words(seed, step, stream, element).to(tl.int64))
    else:
        place = tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + place, philox_words(seed, step, stream, start + place).to(tl.int64), mask=place < n)


@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "block"])
@pytest.mark.parametrize("seed, step, stream, start", [key for key in KEYS if key[0] < 2**63])
def test_words_of_single_elements_and_of_blocks(seed, step, stream, start, scalar, device):
    n = 9 if scalar else 61
    out = torch.empty(64, dtype=torch.int64, device=device)
    _words_kernel[(n if scalar else 1,)](out, seed, step, stream, start, n, SCALAR=scalar, BLOCK=64)
    assert out[:n].tolist() == words(seed, step, stream, n, start).tolist()


@pytest.mark.parametrize("n", [1, 7, 37, 1023, 1025, 3000])
@pytest.mark.parametrize("seed, step, stream, start", KEYS)
def test_dither_words_are_those_of_the_cpu(seed, step, stream, start, n, device):
    drawn = dither_words(seed, step, stream, n, start, device)
    assert drawn.dtype == torch.int32 and drawn.device.type == device.type
    assert torch.equal(drawn.cpu(), dither_words_torch(seed, step, stream, n, start))
    assert torch.equal(drawn, dither_words(seed, step, stream, n, start, device))


def test_no_dither_words(device):
    assert dither_words(1, 2, 3, 0, device=device).shape == (0,)


def test_dither_words_without_a_device_lie_on_the_cpu():
    assert dither_words(1, 2, 3, 5).device.type == "cpu"


@jit
def _dither_kernel(rows, columns, out, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    tl.store(out + row * C + column, dither_at(tl.load(rows + row), tl.load(columns + column)))


def test_dither_in_a_kernel_is_the_reference(device):
    rows, columns = dither_words(3, 4, 0, 32, device=device), dither_words(3, 4, 1, 64, device=device)
    rows[:2], columns[:2] = 2**23 - 1, torch.tensor([2**23 - 1, 0], device=device)
    out = torch.empty(32, 64, device=device)
    _dither_kernel[(1,)](rows, columns, out, R=32, C=64)
    assert torch.equal(out, dither(rows[:, None], columns[None, :])) and out.max() < 1


def test_the_operator_is_sound(device):
    torch.library.opcheck(torch.ops.nanogft.dither_words, (1, 2, 3, 37, 4, device))


def test_dither_words_trace(device):
    def draw(step: int) -> torch.Tensor:
        return dither_words(1, step, 3, 37, device=device)

    traced = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(2).cpu(), dither_words_torch(1, 2, 3, 37))
