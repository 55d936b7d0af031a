"""Philox4x32-10 and what is drawn from it, against published vectors, Triton's generator and plain statistics.

    python -m pytest -q tests/kernels/test_philox.py

Seeds are fixed, so the statistical bounds (in standard errors) either always hold or never do.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.backend import jit, tl
from kernels.philox import (
    DITHER_BITS,
    NOISE_BLOCK,
    Stream,
    dither,
    dither_at,
    dither_word,
    make_rng,
    noise_from,
    noise_torch,
    normal,
    philox_words,
    uniform,
    uniform_from,
    words,
    words_from,
    words_torch,
)
from kernels.philox_words import philox4x32
from tests.kernels.inputs import kernel_test, opaque

ROOT = Path(__file__).resolve().parents[2]
ONES = 0xFFFFFFFF

# Philox4x32-10 in the known-answer file of the Random123 library: counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def z_mean(x: torch.Tensor, mean: float, deviation: float) -> float:
    """How many standard errors the mean of x lies from where it should."""
    return abs(x.double().mean().item() - mean) / (deviation / math.sqrt(x.numel()))


def top_bits(seed: int, step: int, stream: int, n: int, start: int = 0) -> torch.Tensor:
    """The noise that `dither` takes: int32 (n,)."""
    return torch.tensor([int(word) >> (32 - DITHER_BITS) for word in words(seed, step, stream, n, start)]).int()


# The generator


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)) == expected


def test_arrays_of_counters_equal_single_ones():
    counters = [counter for counter, _, _ in KNOWN_ANSWERS]
    key = (0xA4093822, 0x299F31D0)
    together = philox4x32(tuple(np.array(column, dtype=np.uint64) for column in zip(*counters)), key)
    for i, counter in enumerate(counters):
        assert [int(word[i]) for word in together] == [int(word) for word in philox4x32(counter, key)]


@pytest.mark.parametrize("seed, step, stream, group", [(0, 0, 0, 0), (0x299F31D0A4093822, 7, 3, 0x2168C234C90FDAA2)])
def test_words_place_the_counter_and_the_key(seed, step, stream, group):
    """(g low, g high, step, stream) and (seed low, seed high), as Triton kernels build them."""
    expected = philox4x32((group & ONES, group >> 32, step, stream), (seed & ONES, seed >> 32))
    assert words(seed, step, stream, 4, 4 * group).tolist() == [int(word) for word in expected]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 63, 2**34 - 3, 2**40 + 1])
@pytest.mark.parametrize("n", [0, 1, 7, 37, 64])
def test_any_part_is_a_slice_of_the_whole(n, start):
    first = start - start % 8
    whole = words(11, 12, 13, start - first + n + 5, first)
    part = words(11, 12, 13, n, start)
    assert part.shape == (n,) and np.array_equal(part, whole[start - first : start - first + n])
    assert torch.equal(uniform(11, 12, 13, n, start), torch.from_numpy(part / 2.0**32))


@pytest.mark.parametrize("a, b", [((1, 0, 0), (2, 0, 0)), ((1, 0, 0), (1 + 2**32, 0, 0)), ((1, 0, 0), (-1, 0, 0)),
                                  ((1, 5, 0), (1, 6, 0)), ((1, 5, 0), (1, 5, 1)), ((1, 5, 6), (1, 6, 5))], ids=str)
def test_seed_step_and_stream_each_matter(a, b):
    assert np.array_equal(words(*a, 64), words(*a, 64))
    assert (words(*a, 64) == words(*b, 64)).sum() <= 1


def test_streams_are_distinct():
    """And below 16: stream + 16 * layer is a stream of a layer."""
    ids = [value for name, value in vars(Stream).items() if name.isupper()]
    assert len(ids) == len(set(ids)) == 12 and max(ids) < 16


TRITON_SCRIPT = """
import sys, torch, triton, triton.language as tl

@triton.jit
def draw(out, seed, first, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, first + lane)
    tl.store(out + 4 * lane, a)
    tl.store(out + 4 * lane + 1, b)
    tl.store(out + 4 * lane + 2, c)
    tl.store(out + 4 * lane + 3, d)

for seed, first in ((0, 0), (1234, 1), (0x1234567890ABCDEF, 1000003)):
    out = torch.empty(4 * 64, dtype=torch.int32)
    draw[(1,)](out, seed, first, BLOCK=64)
    print(*(word & 0xFFFFFFFF for word in out.tolist()))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_equals_triton_randint4x(tmp_path):
    script = tmp_path / "draw.py"  # a jit function is read from its file
    script.write_text(TRITON_SCRIPT)
    done = subprocess.run([sys.executable, str(script)], env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for (seed, first), line in zip(((0, 0), (1234, 1), (0x1234567890ABCDEF, 1000003)), lines):
        assert words(seed, 0, 0, 256, 4 * first).tolist() == line


# Distributions


def test_uniform_moments():
    u = uniform(3, 1, 4, 200_000)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    for power in (1, 2, 3):
        mean = 1 / (power + 1)
        assert z_mean(u**power, mean, math.sqrt(1 / (2 * power + 1) - mean * mean)) < 4
    cells = torch.histc(u, bins=64, min=0, max=1)
    chi2 = ((cells - 3125) ** 2 / 3125).sum().item()
    assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)
    for lag in (1, 2, 3, 4):  # the words of one counter, and the next counter's
        assert z_mean((u[:-lag] - 0.5) * (u[lag:] - 0.5), 0, 1 / 12) < 4


def test_normal_moments():
    x = normal(3, 1, 5, 200_000)
    assert x.dtype == torch.float64 and torch.isfinite(x).all()
    assert z_mean(x, 0, 1) < 4
    assert z_mean(x**2, 1, math.sqrt(2)) < 4
    assert z_mean(x**3, 0, math.sqrt(15)) < 4
    assert z_mean(x**4, 3, math.sqrt(96)) < 4
    assert torch.equal(normal(3, 1, 5, 9, 13), x[13:22])


def test_normal_is_finite_at_the_extreme_words(monkeypatch):
    monkeypatch.setattr("kernels.philox.words", lambda *_: np.array([0, ONES], dtype=np.uint64))
    low, high = normal(0, 0, 0, 2).tolist()
    assert -7 < low < -6 and high == pytest.approx(-low, rel=1e-6)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 63), (37, 1), (13, 65)])
def test_dither_is_the_sum_modulo_one_exactly(rows, columns):
    limit = 2**DITHER_BITS
    a = torch.cat([torch.tensor([limit - 1]), torch.arange(rows - 1) * 997]).int()
    b = torch.cat([torch.tensor([limit - 1]), torch.arange(columns - 1) * 131_071 % limit]).int()
    u = dither(a[:, None], b[None, :])
    expected = (a[:, None].double() + b[None, :].double()) % limit / limit
    assert u.dtype == torch.float32 and torch.equal(u.double(), expected) and u.max() < 1


def test_dither_is_uniform_and_pairwise_independent():
    n = 100_000  # independent 2 x 2 rectangles
    rows, columns = noise_torch(torch.tensor([5, 0, 0]), 2 * n, 0, 2 * n).split(2 * n)
    corners = dither(rows.view(n, 2, 1), columns.view(n, 1, 2)).double().flatten(1)
    for corner in corners.unbind(1):
        assert z_mean(corner, 1 / 2, math.sqrt(1 / 12)) < 4
        assert z_mean(corner**2, 1 / 3, math.sqrt(4 / 45)) < 4
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        for wave in (1, 2, 3):  # dependence modulo one hides from plain correlations, not from these
            for sign in (1, -1):
                angle = 2 * math.pi * wave * (corners[:, i] + sign * corners[:, j])
                assert z_mean(angle.cos(), 0, math.sqrt(0.5)) < 4.5
                assert z_mean(angle.sin(), 0, math.sqrt(0.5)) < 4.5
        both = ((corners[:, i] < 0.3) & (corners[:, j] < 0.6)).double()
        assert z_mean(both, 0.18, math.sqrt(0.18 * 0.82)) < 4


def test_variance_of_a_rounded_sum_is_that_of_independent_rounding():
    steps, x = 4000, 0.3
    rows = torch.stack([top_bits(1, step, Stream.ROWS, 8) for step in range(steps)])[:, :, None]
    columns = torch.stack([top_bits(1, step, Stream.COLUMNS, 4) for step in range(steps)])[:, None, :]
    sums = torch.floor(x + dither(rows, columns)).double().sum(dim=(1, 2))
    assert z_mean(sums, 32 * x, math.sqrt(32 * x * (1 - x))) < 4
    # The relative standard error of a variance is sqrt((kurtosis - 1) / steps), under 4 % here.
    assert sums.var().item() == pytest.approx(32 * x * (1 - x), rel=0.1)


# What training draws: from (seed, step, rows seen) in a tensor


@pytest.mark.parametrize("seed, stored", [(0, 0), (7, 7), (2**63 - 1, 2**63 - 1), (2**63 + 5, 5 - 2**63), (-1, -1),
                                          (2**64 + 3, 3)])  # fmt: skip
def test_a_new_rng(seed, stored):
    rng = make_rng(seed)
    assert rng.dtype == torch.int64 and rng.tolist() == [stored, 0, 0]
    assert words_torch(rng, 3, 5).tolist() == words(seed, 0, 3, 5).tolist()


noises = pytest.mark.parametrize("rows, columns", [(1, 1), (7, 300), (NOISE_BLOCK, 3), (3, 2 * NOISE_BLOCK + 5)])
places = pytest.mark.parametrize("row, first_column", [(0, 0), (2**33 + 5, 1), (NOISE_BLOCK - 1, NOISE_BLOCK - 2)])


@noises
@places
def test_noise_is_the_top_bits_of_the_words(rows, columns, row, first_column):
    """In one block of the cache and in several."""
    found = noise_torch(torch.tensor([-9, 8, row]), rows, first_column, columns)
    row_noise, col_noise = found.split((rows, columns))
    assert found.dtype == torch.int32
    assert torch.equal(row_noise, top_bits(-9, 8, Stream.ROWS, rows, row))
    assert torch.equal(col_noise, top_bits(-9, 8, Stream.COLUMNS, columns, first_column))


KEYS = [
    (0, 0, 0, 0), (1, 1, 1, 1), (11, 12, 13, 5), (-1, 2**32 - 1, 19, 2**34 - 3), (5 - 2**63, 1, 16 * 7 + 4, 2**40 + 1),
]  # fmt: skip


@kernel_test
@pytest.mark.parametrize("count", [1, 7, 37, 1023, 1025, 3000])
@pytest.mark.parametrize("seed, step, stream, start", KEYS)
def test_words_and_uniform_numbers(seed, step, stream, start, count, device):
    rng, before = torch.tensor([seed, step, 9], device=device), [seed, step, 9]
    found = words_from(rng, stream, count, start)
    assert found.dtype == torch.int64 and found.device.type == device.type and rng.tolist() == before
    assert found.tolist() == words(seed, step, stream, count, start).tolist()
    assert torch.equal(found, words_torch(rng, stream, count, start))
    u = uniform_from(rng, stream, count, start)
    assert u.dtype == torch.float64 and torch.equal(u.cpu(), uniform(seed, step, stream, count, start))


@kernel_test
@noises
@places
def test_noise(rows, columns, row, first_column, device):
    rng = torch.tensor([-9, 8, row], device=device)
    found = noise_from(rng, rows, first_column, columns)
    assert torch.equal(found, noise_torch(rng, rows, first_column, columns)) and rng.tolist() == [-9, 8, row]


@kernel_test
def test_no_words(device):
    rng = torch.tensor([1, 2, 0], device=device)
    assert words_from(rng, 3, 0).shape == words_torch(rng, 3, 0).shape == (0,)


@kernel_test
def test_as_torch_operators(device):
    rng = torch.tensor([1, 2, 3], device=device)
    for operator in (torch.ops.nanogft.words, torch.ops.nanogft.words_torch):
        torch.library.opcheck(operator, (rng, 3, 37, 4))
    for operator in (torch.ops.nanogft.noise, torch.ops.nanogft.noise_torch):
        torch.library.opcheck(operator, (rng, 3, 4, 5))

    def draw(rng: torch.Tensor) -> torch.Tensor:
        return words_from(rng, 3, 37)

    traced = opaque(draw)
    for step in (2, 5):  # the same code, another step
        rng = torch.tensor([1, step, 0], device=device)
        assert traced(rng).tolist() == words(1, step, 3, 37).tolist()


# In a kernel


@jit
def _draw_kernel(out, noises, seed, step, stream_id, start, n, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    if SCALAR:
        place = tl.program_id(0)
        element = start + place.to(tl.int64)
        tl.store(out + place, philox_words(seed, step, stream_id, element).to(tl.int64))
        tl.store(noises + place, dither_word(seed, step, stream_id, element))
    else:
        place = tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + place, philox_words(seed, step, stream_id, start + place).to(tl.int64), mask=place < n)
        tl.store(noises + place, dither_word(seed, step, stream_id, start + place), mask=place < n)


@kernel_test
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "block"])
@pytest.mark.parametrize("seed, step, stream, start", KEYS)
def test_words_of_single_elements_and_of_blocks(seed, step, stream, start, scalar, device):
    n = 5 if scalar else 61
    out = torch.empty(64, dtype=torch.int64, device=device)
    noises = torch.empty(64, dtype=torch.int32, device=device)
    _draw_kernel[(n if scalar else 1,)](out, noises, seed, step, stream, start, n, SCALAR=scalar, BLOCK=64)
    assert out[:n].tolist() == words(seed, step, stream, n, start).tolist()
    assert torch.equal(noises[:n].cpu(), top_bits(seed, step, stream, n, start))


@jit
def _dither_kernel(rows, columns, out, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    tl.store(out + row * C + column, dither_at(tl.load(rows + row), tl.load(columns + column)))


@kernel_test
def test_dither_in_a_kernel_is_the_reference(device):
    rows, columns = top_bits(3, 4, 0, 32).to(device), top_bits(3, 4, 1, 64).to(device)
    rows[:2], columns[:2] = 2**23 - 1, torch.tensor([2**23 - 1, 0], device=device)
    out = torch.empty(32, 64, device=device)
    _dither_kernel[(1,)](rows, columns, out, R=32, C=64)
    assert torch.equal(out, dither(rows[:, None], columns[None, :])) and out.max() < 1
