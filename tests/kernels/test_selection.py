"""Rules and flips against brute force: which moves are legal, which are chosen, and what they do.

    python -m pytest -q tests/kernels/test_selection.py
"""

import math

import pytest
import torch
from torch import Tensor

from kernels.flip import apply_moves, flip_probability, rank_keys, select, select_reference, topk_count
from kernels.philox import Stream, integers
from kernels.scores import balanced, contribution, dot_dtype, gain, orthogonalise
from kernels.tiles import to_tiles

BITS = {1: (1, 2), 2: (1, 1), 3: (3, 1), 4: (7, 1), 6: (31, 1), 8: (127, 1)}  # bits: Q and a move's unit
MATRICES = [(1, 1), (1, 37), (37, 1), (7, 13), (13, 7), (63, 65)]


def shape_id(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def some_votes(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """int32 votes of all sizes up to the largest possible, a third of them zero."""
    random = generator(*shape, seed)
    size = 10.0 ** torch.randint(0, 10, shape, generator=random).double()
    votes = (torch.rand(shape, generator=random, dtype=torch.float64) * 2 - 1) * size.clamp_max(2**31 - 1)
    return torch.where(torch.rand(shape, generator=random) < 1 / 3, 0, votes.to(torch.int32))


def some_weights(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    """Every allowed value, the two limits often."""
    q, unit = BITS[bits]
    random = generator(*shape, bits, seed)
    if unit == 2:
        return (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(torch.int8)
    return torch.randint(-q - 2, q + 3, shape, generator=random).clamp(-q, q).to(torch.int8)


# selection


def chosen_by_hand(keys: list[int], m: int) -> set[int]:
    """Take the largest positive key left, the first of equals, m times."""
    left = {i: key for i, key in enumerate(keys) if key > 0}
    chosen = set()
    while left and len(chosen) < m:
        best = max(left.values())
        index = min(i for i, key in left.items() if key == best)
        chosen.add(index)
        del left[index]
    return chosen


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 13, 37, 64, 65])
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_selection_against_brute_force(n, levels, dtype):
    """Few levels make most keys tie, zeros included; every m from none to all, mixed in one call."""
    base = 2**31 - 1 - levels if dtype == torch.int32 else 2**38
    tiles = n + 1
    keys = torch.randint(0, levels, (tiles, n), generator=generator(n, levels))
    keys = torch.where(keys > 0, keys + base, 0).to(dtype)
    keys[n // 2] = 0
    m = torch.randperm(tiles, generator=generator(n))
    found = select(keys, m)
    assert found.dtype == torch.bool and found.shape == keys.shape
    assert torch.equal(found, select_reference(keys, m))
    for row, count, picks in zip(keys.tolist(), m.tolist(), found):
        assert set(picks.nonzero().flatten().tolist()) == chosen_by_hand(row, count)
    assert torch.equal(found.sum(dim=1), torch.minimum(m, (keys > 0).sum(dim=1)))


@pytest.mark.parametrize("choose", [select, select_reference], ids=["partition", "reference"])
def test_ties_go_to_the_lower_index(choose):
    keys = torch.tensor([[5, 9, 5, 0, 9, 5, 9], [3, 3, 3, 3, 3, 3, 3], [0, 0, 1, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
    picks = choose(keys, torch.tensor([4, 3, 5, 2]))
    assert [row.nonzero().flatten().tolist() for row in picks] == [[0, 1, 4, 6], [0, 1, 2], [2], [5, 6]]


@pytest.mark.parametrize("choose", [select, select_reference], ids=["partition", "reference"])
def test_selection_of_none_all_and_more_than_there_are(choose):
    keys = torch.tensor([[4, 3, 0, 1]] * 4)
    picks = choose(keys, torch.tensor([0, 4, 5, 100]))
    assert picks.int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0, 1]]


def test_keys_past_32_bits_are_told_apart():
    """All five agree in their low 32 bits."""
    keys = (torch.arange(1, 6, dtype=torch.int64) << 32)[None, :] + 7
    assert select(keys, torch.tensor([2])).tolist() == [[False, False, False, True, True]]


def test_selection_in_a_large_tile():
    keys = torch.randint(0, 300, (3, 123 * 300), generator=generator(1), dtype=torch.int32)
    m = torch.tensor([1, 9001, 36_899])
    assert torch.equal(select(keys, m), select_reference(keys, m))


# legal moves


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_keys_and_moves_of_every_weight(bits, dtype):
    """Each allowed weight with a vote for up, none and down."""
    q, unit = BITS[bits]
    allowed = [-1, 1] if bits == 1 else list(range(-q, q + 1))
    weight = torch.tensor(allowed, dtype=torch.int8).repeat(3)[None, :]
    scores = torch.tensor([-7, 0, 7]).repeat_interleave(len(allowed))[None, :].to(dtype)
    keys = rank_keys(scores, weight, q, unit)
    assert keys.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)
    moved = apply_moves(weight, scores, keys > 0, q, unit)
    assert moved.dtype == torch.int8
    for w, s, key, new in zip(weight[0].tolist(), scores[0].tolist(), keys[0].tolist(), moved[0].tolist()):
        target = w - unit * ((s > 0) - (s < 0))
        legal = s != 0 and -q <= target <= q
        assert (key > 0) == legal and new == (target if legal else w) and new in allowed


def test_binary_moves_change_the_sign():
    weight = torch.tensor([[-1, -1, 1, 1]], dtype=torch.int8)
    scores = torch.tensor([[-5, 5, -5, 5]])
    keys = rank_keys(scores, weight, 1, 2)
    assert keys.tolist() == [[5, 0, 0, 5]]
    assert apply_moves(weight, scores, keys > 0, 1, 2).tolist() == [[1, -1, 1, -1]]


def test_keys_order_as_the_size_of_the_scores_does():
    extremes = torch.tensor([[-(2**31), 2**31 - 1, 1, -1, 0]], dtype=torch.int32)
    zero = torch.zeros(1, 5, dtype=torch.int8)
    assert rank_keys(extremes, zero, 127, 1).tolist() == [[2**31, 2**31 - 1, 1, 1, 0]]
    wide = torch.tensor([[2**38, -(2**38) - 1, 2**32, -(2**33), 0]])
    assert rank_keys(wide, zero, 127, 1).tolist() == [[2**38, 2**38 + 1, 2**32, 2**33, 0]]
    ends = torch.tensor([1e-45, -1e-40, 1e-38, -3e38, 0.0, -0.0])
    scores = torch.cat([torch.randn(290, generator=generator(2)), ends])
    keys = rank_keys(scores[None, :], torch.zeros(1, 296, dtype=torch.int8), 127, 1)[0]
    assert torch.equal(keys.argsort(stable=True), scores.abs().argsort(stable=True)) and (keys[-2:] == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 2, 5, 127])
def test_wide_moves_stop_at_the_limit(bits, width):
    q, unit = BITS[bits]
    weight = some_weights((4, 300), bits)
    scores = some_votes((4, 300)).to(torch.float32)
    chosen = torch.rand(4, 300, generator=generator(width)) < 0.5
    moved = apply_moves(weight, scores, chosen, q, width * unit)
    expected = [
        max(-q, min(q, w - width * unit * ((s > 0) - (s < 0)))) if c else w
        for w, s, c in zip(weight.flatten().tolist(), scores.flatten().tolist(), chosen.flatten().tolist())
    ]
    assert moved.dtype == torch.int8 and moved.flatten().tolist() == expected


# how many, and with what probability


def test_count_of_moves():
    sizes = torch.tensor([4096, 4096, 37, 1, 1, 63, 100])
    u = (torch.tensor([0.0, 0.9, 0.5, 0.5, 0.4999, 1 - 2**-32, 0.0], dtype=torch.float64) * 2**32).long()
    assert topk_count(0.5, sizes, u).tolist() == [2048, 2048, 19, 1, 0, 32, 50]
    assert topk_count(0.0, sizes, u).tolist() == [0] * 7
    assert topk_count(1.0, sizes, u).tolist() == sizes.tolist()
    assert topk_count(0.5, sizes, u).dtype == torch.int64


def test_small_fractions_are_right_on_average():
    draws, size, k = 20_000, 63, 0.0123
    m = topk_count(k, torch.full((draws,), size), integers(1, 2, Stream.TOPK, draws)).double()
    share = k * size % 1
    assert abs(m.mean().item() - k * size) < 4 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_flip_probability(gamma):
    scores = torch.tensor([[8, -4, 2, 0, -16], [0, 0, 0, 0, 0], [-1, 2**38, 1, 2**37, 0]])
    keys = scores.abs()
    keys[0, 4] = 0  # the largest of its tile, and illegal
    p = flip_probability(keys, scores, gamma)
    ratios = [[1, 1 / 2, 1 / 4, 0, 0], [0] * 5, [2**-38, 1, 2**-38, 1 / 2, 0]]
    expected = torch.tensor([[ratio**gamma for ratio in row] for row in ratios], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    tiny = torch.tensor([[1e-40, -1e-45]])
    assert flip_probability(torch.tensor([[2, 1]]), tiny, gamma)[0, 0] == 1


# rules


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", MATRICES, ids=shape_id)
def test_integer_rules_against_loops(shape, bits):
    """C = -W V; V where C < 0 or W = 0, else no vote; ranked by |C|, by |V| where W = 0."""
    weight, votes = some_weights(shape, bits), some_votes(shape)
    wide = votes.long() * 133  # as of a batch past `MAX_REDUCTION`
    for v in (votes, wide, votes.t().contiguous().t()):
        assert torch.equal(gain(v), v)
        s = contribution(v, weight)
        assert s.dtype == torch.int64
        for one, w, score in zip(v.flatten().tolist(), weight.flatten().tolist(), s.flatten().tolist()):
            c = -w * one
            if c < 0 or (w == 0 and one != 0):
                assert (score > 0) == (one > 0) and abs(score) == (abs(c) if w else abs(one))
            else:
                assert score == 0


def test_contribution_past_int32():
    votes = torch.tensor([[2**31 - 1, -(2**31), 2**31 - 1, 2**25]], dtype=torch.int32)
    weight = torch.tensor([[127, -127, 0, 127]], dtype=torch.int8)
    assert contribution(votes, weight).tolist() == [[127 * (2**31 - 1), -127 * 2**31, 2**31 - 1, 127 * 2**25]]


@pytest.mark.parametrize("bits", [1, 2])
def test_contribution_makes_the_moves_of_gain_possible_at_few_bits(bits):
    """As many moves, for binary and ternary weights: the rule only leaves out what is illegal anyway."""
    q, unit = BITS[bits]
    weight, votes = some_weights((7, 300), bits), some_votes((7, 300))
    of_gain, of_contribution = (rank_keys(s, weight, q, unit) for s in (gain(votes), contribution(votes, weight)))
    assert torch.equal(of_gain > 0, of_contribution > 0)


@pytest.mark.parametrize("shape", MATRICES, ids=shape_id)
def test_balanced_against_loops(shape):
    votes = some_votes(shape)
    votes[0] = 0
    s = [[float(v) for v in row] for row in votes.tolist()]
    for _ in range(3):
        s = [[v / (math.hypot(*row) or 1) for v in row] for row in s]
        norms = [math.hypot(*column) or 1 for column in zip(*s)]
        s = [[v / norm for v, norm in zip(row, norms)] for row in s]
    found = balanced(votes)
    assert found.dtype == torch.float32 and (found[0] == 0).all()
    torch.testing.assert_close(found.double(), torch.tensor(s, dtype=torch.float64), rtol=1e-5, atol=1e-12)


# operand types, and what rounding may cost relative to the result (about twice what was measured)
DTYPES = [(torch.float32, 1e-5), (torch.float16, 0.005), (torch.bfloat16, 0.04)]


def known_svd(shape: tuple[int, ...], low: float) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., n, r), singular values (r,) from `low` to 1 a constant ratio apart, V (..., m, r), in float64."""
    *batch, n, m = shape
    rank, random = min(n, m), generator(*shape)
    u = torch.linalg.qr(torch.randn(*batch, n, rank, dtype=torch.float64, generator=random)).Q
    v = torch.linalg.qr(torch.randn(*batch, m, rank, dtype=torch.float64, generator=random)).Q
    return u, torch.logspace(math.log10(low), 0, rank, dtype=torch.float64), v


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (13, 37), (64, 64), (123, 65), (3, 37, 37), (2, 3, 13, 7)],
                         ids=shape_id)
def test_spectral_makes_singular_values_one(shape, dtype, loss):
    """The polynomial acts on singular values alone: 3.4445 s - 4.775 s^3 + 2.0315 s^5, five times."""
    for low in (0.2, 0.01):
        u, values, v = known_svd(shape, low)
        x = u * values @ v.mT
        pushed = values / values.norm()
        for _ in range(5):
            pushed = 3.4445 * pushed - 4.775 * pushed**3 + 2.0315 * pushed**5
        expected = u * pushed @ v.mT
        for size in (1.0, 1e7):
            found = orthogonalise((x * size).float(), dtype)
            assert found.shape == shape and found.dtype == torch.float32
            assert ((found - expected).norm(dim=(-2, -1)) <= loss * math.sqrt(len(values))).all()
            if low == 0.2:
                around_one = torch.linalg.svdvals(found.double())
                assert around_one.min() > 0.6 and around_one.max() < 1.3
                aligned = (u.mT @ found.double() @ v).diagonal(dim1=-2, dim2=-1)
                assert (aligned > 0.6).all() and (aligned < 1.3).all()


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=str)
def test_spectral_tiles_are_independent(dtype, loss):
    tiles = torch.randn(4, 37, 37, generator=generator(3))
    tiles[1] = 0
    found = orthogonalise(tiles, dtype)
    assert (found[1] == 0).all() and torch.isfinite(found).all()
    other = tiles.clone()
    other[2] = torch.randn(37, 37, generator=generator(4)) * 1e6
    again = orthogonalise(other, dtype)
    assert [torch.equal(one, two) for one, two in zip(found, again)] == [True, True, False, True]
    for i in (0, 3):
        alone = orthogonalise(tiles[i], dtype)
        assert (alone - found[i]).norm() <= loss * alone.norm()


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=str)
def test_ragged_tiles_equal_the_same_matrix_alone(dtype, loss):
    x = torch.empty(21, 23)
    for part in (x[:16, :16], x[:16, 16:], x[16:, :16], x[16:, 16:]):
        u, values, v = known_svd(tuple(part.shape), 0.2)
        part.copy_(u * values @ v.mT)
    found = orthogonalise(to_tiles(x, 16), dtype)
    for tile, alone in zip(found, (x[:16, :16], x[:16, 16:], x[16:, :16], x[16:, 16:])):
        height, width = alone.shape
        expected = orthogonalise(alone, dtype)
        assert (tile[:height, :width] - expected).norm() <= loss * expected.norm()
        assert (tile[height:] == 0).all() and (tile[:, width:] == 0).all()


def test_operand_type_of_each_device():
    assert dot_dtype(torch.device("cuda")) == torch.float16
    assert dot_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
