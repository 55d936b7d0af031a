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

from kernels.philox import DITHER_BITS, Stream, dither, dither_words, normal, philox4x32, uniform, words
from kernels.quantize import absmax, quantize_delta

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
    """(g low, g high, step, stream) and (seed low, seed high), as Triton kernels will build them."""
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
    ids = [value for name, value in vars(Stream).items() if name.isupper()]
    assert len(ids) == len(set(ids)) == 10


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
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for (seed, first), line in zip(((0, 0), (1234, 1), (0x1234567890ABCDEF, 1000003)), lines):
        assert words(seed, 0, 0, 256, 4 * first).tolist() == line


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


def test_dither_words_are_the_top_bits():
    drawn = dither_words(9, 8, 7, 300, 5)
    assert drawn.dtype == torch.int32
    assert drawn.tolist() == [int(word) >> (32 - DITHER_BITS) for word in words(9, 8, 7, 300, 5)]


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 63), (37, 1), (13, 65)])
def test_dither_is_the_sum_modulo_one_exactly(rows, columns):
    limit = 2**DITHER_BITS
    a = torch.cat([torch.tensor([limit - 1]), torch.arange(rows - 1) * 997]).int()
    b = torch.cat([torch.tensor([limit - 1]), torch.arange(columns - 1) * 131_071 % limit]).int()
    u = dither(a[:, None], b[None, :])
    expected = (a[:, None].double() + b[None, :].double()) % limit / limit
    assert u.dtype == torch.float32 and torch.equal(u.double(), expected) and u.max() < 1


def rectangles(n: int, step: int = 0) -> torch.Tensor:
    """n independent 2 x 2 dithers, (n, 2, 2)."""
    rows = dither_words(5, step, Stream.ROWS, 2 * n).view(n, 2, 1)
    return dither(rows, dither_words(5, step, Stream.COLUMNS, 2 * n).view(n, 1, 2)).double()


def test_dither_is_uniform_and_pairwise_independent():
    u = rectangles(100_000)
    for corner in u.flatten(1).unbind(1):
        assert z_mean(corner, 1 / 2, math.sqrt(1 / 12)) < 4
        assert z_mean(corner**2, 1 / 3, math.sqrt(4 / 45)) < 4
    corners = u.flatten(1)
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
    rows = torch.stack([dither_words(1, step, Stream.ROWS, 8) for step in range(steps)])[:, :, None]
    columns = torch.stack([dither_words(1, step, Stream.COLUMNS, 4) for step in range(steps)])[:, None, :]
    sums = torch.floor(x + dither(rows, columns)).double().sum(dim=(1, 2))
    assert z_mean(sums, 32 * x, math.sqrt(32 * x * (1 - x))) < 4
    # The relative standard error of a variance is sqrt((kurtosis - 1) / steps), under 4 % here.
    assert sums.var().item() == pytest.approx(32 * x * (1 - x), rel=0.1)


def test_stochastic_rounding_is_unbiased():
    steps, n = 4000, 37
    delta = torch.linspace(-1, 1, n)[None, :].repeat(2, 1) ** 3
    sigma = absmax(delta) / 127
    target = delta.double() / sigma.double()
    total = torch.zeros(2, n, dtype=torch.float64)
    for step in range(steps):
        d, _ = quantize_delta(delta, sigma, dither_words(2, step, Stream.ROWS, 2)[:, None],
                           dither_words(2, step, Stream.COLUMNS, n))
        assert (d.double() - target).abs().max() < 1 + 1e-4
        total += d
    fraction = target - target.floor()
    error = (fraction * (1 - fraction) / steps).sqrt()
    # 74 bounds at 4.5 standard errors; 1e-4 allows for fp32's delta / sigma near 127.
    assert ((total / steps - target).abs() <= 4.5 * error + 1e-4).all()
