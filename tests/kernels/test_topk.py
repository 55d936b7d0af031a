"""Top-k of legal moves against brute force: which moves are legal, which are chosen, how many, and what they do.

    python -m pytest -q tests/kernels/test_topk.py
"""

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import jit, tl
from kernels.limits import weight_limit
from kernels.philox import Stream, words_torch
from kernels.topk import (
    apply_moves,
    choose,
    fixed_point,
    flip_probability,
    keys_of,
    rank,
    select,
    select_reference,
    topk_count,
)
from tests.kernels.inputs import generator, kernel_test, readable
from tests.kernels.update_inputs import BITS, share, some_rng, some_votes, some_weight

selections = pytest.mark.parametrize("choice", [select, select_reference], ids=["partition", "reference"])


# Selection


def chosen_by_hand(ranks: list[int], m: int) -> set[int]:
    """Take the largest positive rank left, the first of equals, m times."""
    left = {i: value for i, value in enumerate(ranks) if value > 0}
    chosen = set()
    while left and len(chosen) < m:
        best = max(left.values())
        index = min(i for i, value in left.items() if value == best)
        chosen.add(index)
        del left[index]
    return chosen


def some_ranks(tiles: int, n: int, levels: int, dtype: torch.dtype) -> Tensor:
    """Few levels make most ranks tie, zeros included; large ones, next to each other."""
    base = 2**31 - 1 - levels if dtype == torch.int32 else 2**38
    ranks = torch.randint(0, levels, (tiles, n), generator=generator(n, levels))
    return torch.where(ranks > 0, ranks + base, 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)
@pytest.mark.parametrize("n", [1, 2, 7, 13, 33, 64, 65])
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_selection_against_brute_force(n, levels, dtype):
    """Every m from none to all, mixed in one call."""
    ranks = some_ranks(n + 1, n, levels, dtype)
    ranks[n // 2] = 0
    m = torch.randperm(n + 1, generator=generator(n))
    found = select(ranks, m)
    assert found.dtype == torch.bool and found.shape == ranks.shape
    assert torch.equal(found, select_reference(ranks, m))
    for row, count, picks in zip(ranks.tolist(), m.tolist(), found):
        assert set(picks.nonzero().flatten().tolist()) == chosen_by_hand(row, count)
    assert torch.equal(found.sum(dim=1), torch.minimum(m, (ranks > 0).sum(dim=1)))


@selections
def test_ties_go_to_the_lower_index(choice):
    ranks = torch.tensor([[5, 9, 5, 0, 9, 5, 9], [3, 3, 3, 3, 3, 3, 3], [0, 0, 1, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
    picks = choice(ranks, torch.tensor([4, 3, 5, 2]))
    assert [row.nonzero().flatten().tolist() for row in picks] == [[0, 1, 4, 6], [0, 1, 2], [2], [5, 6]]


@selections
def test_selection_of_none_all_and_more_than_there_are(choice):
    ranks = torch.tensor([[4, 3, 0, 1]] * 4)
    picks = choice(ranks, torch.tensor([0, 4, 5, 100]))
    assert picks.int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0, 1]]


def test_ranks_past_32_bits_are_told_apart():
    """All five agree in their low 32 bits."""
    ranks = (torch.arange(1, 6, dtype=torch.int64) << 32)[None, :] + 7
    assert select(ranks, torch.tensor([2])).tolist() == [[False, False, False, True, True]]


def test_selection_in_a_large_tile():
    ranks = torch.randint(0, 300, (3, 123 * 300), generator=generator(1), dtype=torch.int32)
    m = torch.tensor([1, 9001, 36_899])
    assert torch.equal(select(ranks, m), select_reference(ranks, m))


# Legal moves


def test_limits_of_the_widths():
    assert {bits: weight_limit(bits) for bits in range(1, 9)} == BITS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=readable)
def test_ranks_and_moves_of_every_weight(bits, dtype):
    """Each allowed weight with a vote for up, none and down."""
    q, unit = BITS[bits]
    allowed = [-1, 1] if bits == 1 else list(range(-q, q + 1))
    weight = torch.tensor(allowed, dtype=torch.int8).repeat(3)[None, :]
    scores = torch.tensor([-7, 0, 7]).repeat_interleave(len(allowed))[None, :].to(dtype)
    ranks = rank(scores, weight, q, unit)
    assert ranks.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)
    moved = apply_moves(weight, scores, ranks > 0, q, unit)
    assert moved.dtype == torch.int8
    for w, s, value, new in zip(weight[0].tolist(), scores[0].tolist(), ranks[0].tolist(), moved[0].tolist()):
        target = w - unit * ((s > 0) - (s < 0))
        legal = s != 0 and -q <= target <= q
        assert (value > 0) == legal and new == (target if legal else w) and new in allowed


def test_binary_moves_change_the_sign():
    weight = torch.tensor([[-1, -1, 1, 1]], dtype=torch.int8)
    scores = torch.tensor([[-5, 5, -5, 5]])
    ranks = rank(scores, weight, 1, 2)
    assert ranks.tolist() == [[5, 0, 0, 5]]
    assert apply_moves(weight, scores, ranks > 0, 1, 2).tolist() == [[1, -1, 1, -1]]


def test_ranks_order_as_the_size_of_the_scores_does():
    extremes = torch.tensor([[-(2**31), 2**31 - 1, 1, -1, 0]], dtype=torch.int32)
    zero = torch.zeros(1, 5, dtype=torch.int8)
    assert rank(extremes, zero, 127, 1).tolist() == [[2**31, 2**31 - 1, 1, 1, 0]]
    wide = torch.tensor([[2**38, -(2**38) - 1, 2**32, -(2**33), 0]])
    assert rank(wide, zero, 127, 1).tolist() == [[2**38, 2**38 + 1, 2**32, 2**33, 0]]
    ends = torch.tensor([1e-45, -1e-40, 1e-38, -3e38, 0.0, -0.0])
    scores = torch.cat([torch.randn(290, generator=generator(2)), ends])
    ranks = rank(scores[None, :], torch.zeros(1, 296, dtype=torch.int8), 127, 1)[0]
    assert torch.equal(ranks.argsort(stable=True), scores.abs().argsort(stable=True)) and (ranks[-2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=readable)
def test_scores_of_other_float_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"got scores of {dtype}; float scores must be float32"):
        rank(torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=torch.int8), 1, 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 2, 5, 127])
def test_wide_moves_stop_at_the_limit(bits, width):
    q, unit = BITS[bits]
    weight = some_weight((4, 300), bits)
    scores = some_votes((4, 300)).to(torch.float32)
    chosen = torch.rand(4, 300, generator=generator(width)) < 0.5
    moved = apply_moves(weight, scores, chosen, q, width * unit)
    expected = [
        max(-q, min(q, w - width * unit * ((s > 0) - (s < 0)))) if c else w
        for w, s, c in zip(weight.flatten().tolist(), scores.flatten().tolist(), chosen.flatten().tolist())
    ]
    assert moved.dtype == torch.int8 and moved.flatten().tolist() == expected


# How many, and with what probability


def test_fixed_point():
    for k, expected in ((0.0, 0), (1.0, 2**32), (0.5, 2**31), (2.0**-33, 1), (2.0**-34, 0), (1 / 3, 1431655765)):
        found = fixed_point(share(k))
        assert found.dtype == torch.int64 and found.item() == expected


def test_count_of_moves():
    sizes = torch.tensor([4096, 4096, 37, 1, 1, 63, 100])
    u = (torch.tensor([0.0, 0.9, 0.5, 0.5, 0.4999, 1 - 2**-32, 0.0], dtype=torch.float64) * 2**32).long()
    assert topk_count(share(0.5), sizes, u).tolist() == [2048, 2048, 19, 1, 0, 32, 50]
    assert topk_count(share(0.0), sizes, u).tolist() == [0] * 7
    assert topk_count(share(1.0), sizes, u).tolist() == sizes.tolist()
    assert topk_count(share(0.5), sizes, u).dtype == torch.int64


def test_small_fractions_are_right_on_average():
    draws, size, k = 20_000, 63, 0.0123
    u = words_torch(some_rng(), Stream.TOPK, draws)
    m = topk_count(share(k), torch.full((draws,), size), u).double()
    odd = k * size % 1
    assert abs(m.mean().item() - k * size) < 4 * math.sqrt(odd * (1 - odd) / draws)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_flip_probability(gamma):
    scores = torch.tensor([[8, -4, 2, 0, -16], [0, 0, 0, 0, 0], [-1, 2**38, 1, 2**37, 0]])
    ranks = scores.abs()
    ranks[0, 4] = 0  # the largest of its tile, and illegal
    p = flip_probability(ranks, scores, gamma)
    ratios = [[1, 1 / 2, 1 / 4, 0, 0], [0] * 5, [2**-38, 1, 2**-38, 1 / 2, 0]]
    expected = torch.tensor([[ratio**gamma for ratio in row] for row in ratios], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    tiny = torch.tensor([[1e-40, -1e-45]])
    assert flip_probability(torch.tensor([[2, 1]]), tiny, gamma)[0, 0] == 1


# In a kernel


@jit
def _choose_kernel(ranks, m, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLOAT: tl.constexpr):
    tile = tl.program_id(0)
    place = tile * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    keys = tl.load(ranks + place)
    if keys.dtype == tl.int32:
        keys = keys.to(tl.uint32, bitcast=True)
    keys = (keys << 1) + (place % 3 == 0).to(keys.dtype)  # the direction of a move does not count
    tl.store(out + place, choose(keys, tl.load(m + tile), FLOAT).to(tl.int8))


def chosen_in_a_kernel(ranks: Tensor, m: Tensor, floats: bool = False) -> Tensor:
    out = torch.empty(ranks.shape, dtype=torch.int8, device=ranks.device)
    tiles, n = ranks.shape
    rows = max(1, 2 ** (n.bit_length() // 2))
    _choose_kernel[(tiles,)](ranks, m.to(torch.int32), out, ROWS=rows, COLUMNS=n // rows, FLOAT=floats)
    return out.bool()


@kernel_test
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)
@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("n", [1, 2, 64, 256, 4096])
def test_selection_in_a_kernel(n, levels, dtype, device):
    """Every m from none to all, among few levels and many, with a tile of zeros."""
    tiles = 64 if n <= 256 else 8
    ranks = some_ranks(tiles, n, levels, dtype).to(device)
    ranks[5] = 0
    m = (torch.arange(tiles) * (n + 1) // (tiles - 1)).clamp_max(n).to(device)
    assert m[0] == 0 and m[-1] == n
    found = chosen_in_a_kernel(ranks, m)
    assert torch.equal(found, select_reference(ranks, m)) and not found[5].any()


def hard_ranks(n: int) -> dict[str, Tensor]:
    """Ranks int32 (n,) on which a search that interpolates goes wrong or takes long."""
    g, place, top = generator(n), torch.arange(n), 2**31 - 1
    return {
        "all equal": torch.full((n,), 7),
        "all the largest": torch.full((n,), top),
        "two values": torch.where(torch.rand(n, generator=g) < 0.3, top, 1),
        "spread exponentially": (2.0 ** (31 * torch.rand(n, generator=g, dtype=torch.float64))).long().clamp_max(top),
        "next to each other, at the top": top - place,
        "three large ones": torch.where(place % (n // 3) == 1, top - place, place),
        "few legal": torch.where(place % 50 == 9, place + 1000, 0),
        "one legal": torch.where(place == n - 1, 1, 0),
    }


@kernel_test
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)
@pytest.mark.parametrize("case", hard_ranks(64))
def test_selection_among_hard_ranks(case, dtype, device):
    """From no move to all, with the ranks as integers and as the bits of floats."""
    n = 1024
    ranks = hard_ranks(n)[case].to(dtype)
    if dtype == torch.int64:
        ranks = ranks << 29  # the low 32 bits alone do not tell them apart
    m = torch.tensor([0, 1, 3, n // 5, n // 2, n - 1, n], device=device)
    tiles = ranks.expand(len(m), n).contiguous().to(device)
    assert torch.equal(chosen_in_a_kernel(tiles, m), select_reference(tiles, m))
    if dtype == torch.int32:
        tiles = tiles.clamp_max(0x7F7FFFFF)  # the bits of the largest float
        assert torch.equal(chosen_in_a_kernel(tiles, m, floats=True), select_reference(tiles, m))


@kernel_test
@pytest.mark.parametrize("kind", ["normal", "powers", "subnormal", "equal"])
def test_selection_of_floats_in_a_kernel(kind, device):
    n = 4096
    normal = torch.randn(n, generator=generator(3))
    scores = {
        "normal": normal,
        "powers": 10 ** (12 * normal),
        "subnormal": normal * 1e-42,
        "equal": normal.sign() * (normal.abs() > 0.5) * 0.1,
    }[kind]
    ranks = rank(scores[None, :], torch.zeros(1, n, dtype=torch.int8), 31, 1)
    m = torch.tensor([0, 1, 13, n // 5, n // 2, n - 1, n], device=device)
    tiles = ranks.expand(len(m), n).contiguous().to(device)
    assert torch.equal(chosen_in_a_kernel(tiles, m, floats=True), select_reference(tiles, m))


@kernel_test
def test_ties_go_to_the_lower_index_in_a_kernel(device):
    ranks = torch.tensor([[5, 9, 5, 0, 9, 5, 9, 0], [3] * 8, [0, 0, 1, 0, 0, 0, 0, 0], [0] * 8], device=device)
    m = torch.tensor([4, 3, 5, 8], device=device)
    expected = [[0, 1, 4, 6], [0, 1, 2], [2], []]
    for dtype in (torch.int32, torch.int64):
        picks = chosen_in_a_kernel(ranks.to(dtype), m)
        assert [row.nonzero().flatten().tolist() for row in picks] == expected


@kernel_test
def test_the_largest_ranks_in_a_kernel(device):
    """The largest a rank can be, and ranks of 64 bits that agree in their low 32."""
    top = torch.tensor([[2**31 - 1, 2**31 - 2, 2**31 - 1, 1]], dtype=torch.int32, device=device)
    for m, expected in ((0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        assert chosen_in_a_kernel(top, torch.tensor([m], device=device))[0].nonzero().flatten().tolist() == expected
    wide = (torch.arange(1, 5, device=device) << 32)[None, :] + 7
    assert chosen_in_a_kernel(wide, torch.tensor([2], device=device)).tolist() == [[False, False, True, True]]


@jit
def _keys_kernel(scores, weight, out, Q: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, keys_of(tl.load(scores + place), tl.load(weight + place), Q, UNIT).to(tl.int64))


@kernel_test
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=readable)
def test_keys_in_a_kernel(bits, dtype, device):
    (q, unit), shape = BITS[bits], (32, 64)
    weight, scores = some_weight(shape, bits).to(device), some_votes(shape).to(device)
    scores = scores.long() * 133 if dtype == torch.int64 else scores.to(dtype)
    if dtype == torch.float32:
        scores[0, :4] = torch.tensor([1e-45, -1e-40, -0.0, -3e38], device=device)
    ranks = rank(scores, weight, q, unit).long()
    out = torch.empty(shape, dtype=torch.int64, device=device)
    _keys_kernel[(1,)](scores, weight, out, Q=q, UNIT=unit, M=32, N=64)
    assert torch.equal(out >> 1, ranks) and torch.equal((out & 1)[ranks > 0], (scores > 0).long()[ranks > 0])
