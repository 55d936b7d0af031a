"""Rules: votes to scores, against loops and known singular values; in kernels against the torch references.

    python -m pytest -q tests/kernels/test_scores.py
"""

import math

import pytest
import torch
from torch import Tensor

from kernels import scores as module
from kernels.backend import INTERPRETED, jit, tl, triton
from kernels.limits import RULES
from kernels.scores import balanced, contribution, dot_dtype, gain, orthogonalise, quotient, score, score_block
from kernels.tiles import to_tiles
from kernels.topk import rank
from tests.kernels.inputs import generator, kernel_test, readable
from tests.kernels.update_inputs import BITS, some_votes, some_weight

MATRICES = [(1, 1), (1, 33), (37, 1), (7, 13), (13, 7), (63, 65)]


def scored_by_hand(votes: Tensor, weight: Tensor) -> list:
    """C = -W V; V where C < 0 or W = 0, else no vote; ranked by |C|, by |V| where W = 0."""
    found = []
    for v, w in zip(votes.flatten().tolist(), weight.flatten().tolist(), strict=True):
        c = -w * v
        found.append(math.copysign(abs(c), v) if c < 0 else v if w == 0 else 0)
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", MATRICES, ids=readable)
def test_integer_rules_against_loops(shape, bits):
    weight, votes = some_weight(shape, bits), some_votes(shape)
    wide = votes.long() * 133  # as of a batch past `MAX_REDUCTION`
    for v in (votes, wide, votes.t().contiguous().t()):
        assert torch.equal(gain(v), v)
        s = contribution(v, weight)
        assert s.dtype == torch.int64 and s.flatten().tolist() == scored_by_hand(v, weight)


def test_contribution_past_int32():
    votes = torch.tensor([[2**31 - 1, -(2**31), 2**31 - 1, 2**25]], dtype=torch.int32)
    weight = torch.tensor([[127, -127, 0, 127]], dtype=torch.int8)
    assert contribution(votes, weight).tolist() == [[127 * (2**31 - 1), -127 * 2**31, 2**31 - 1, 127 * 2**25]]


def test_contribution_of_float_votes():
    """As momentum makes them."""
    weight = some_weight((7, 300))
    votes = torch.randn(7, 300, generator=generator(1)) * 1000
    votes[:, ::5] = 0
    s = contribution(votes, weight)
    assert s.dtype == torch.float32
    expected = torch.tensor(scored_by_hand(votes.double(), weight), dtype=torch.float64)
    assert torch.equal(s.flatten(), expected.float())


@pytest.mark.parametrize("bits", [1, 2])
def test_contribution_makes_the_moves_of_gain_possible_at_few_bits(bits):
    """As many moves, for binary and ternary weights: the rule only leaves out what is illegal anyway."""
    q, unit = BITS[bits]
    weight, votes = some_weight((7, 300), bits), some_votes((7, 300))
    of_gain, of_contribution = (rank(s, weight, q, unit) for s in (gain(votes), contribution(votes, weight)))
    assert torch.equal(of_gain > 0, of_contribution > 0)


# Operand types, and what rounding may cost relative to the result (about twice what was measured).
DTYPES = [(torch.float32, 1e-5), (torch.float16, 0.005), (torch.bfloat16, 0.04)]


def known_svd(shape: tuple[int, ...], low: float) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., n, r), singular values (r,) from `low` to 1 a constant ratio apart, V (..., m, r), in float64."""
    *batch, n, m = shape
    count, random = min(n, m), generator(*shape)
    u = torch.linalg.qr(torch.randn(*batch, n, count, dtype=torch.float64, generator=random)).Q
    v = torch.linalg.qr(torch.randn(*batch, m, count, dtype=torch.float64, generator=random)).Q
    return u, torch.logspace(math.log10(low), 0, count, dtype=torch.float64), v


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=readable)
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (13, 37), (64, 64), (123, 65), (3, 37, 37), (2, 3, 13, 7)],
                         ids=readable)  # fmt: skip
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


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=readable)
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


@pytest.mark.parametrize("dtype, loss", DTYPES, ids=readable)
def test_ragged_tiles_equal_the_same_matrix_alone(dtype, loss):
    x = torch.empty(21, 23)
    parts = x[:16, :16], x[:16, 16:], x[16:, :16], x[16:, 16:]
    for part in parts:
        u, values, v = known_svd(tuple(part.shape), 0.2)
        part.copy_(u * values @ v.mT)
    found = orthogonalise(to_tiles(x[None], 16), dtype)
    for tile, alone in zip(found, parts, strict=True):
        height, width = alone.shape
        expected = orthogonalise(alone, dtype)
        assert (tile[:height, :width] - expected).norm() <= loss * expected.norm()
        assert (tile[height:] == 0).all() and (tile[:, width:] == 0).all()


def test_operand_type_of_each_device():
    assert dot_dtype(torch.device("cuda")) == torch.float16
    assert dot_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ortho_tile", [0, 32])
@pytest.mark.parametrize("shape", [(1, 7, 33), (3, 33, 65)], ids=readable)
def test_stacked_matrices_score_as_alone(shape, ortho_tile, rule, monkeypatch):
    """And spectral inside its tiles, which end at a matrix's edge."""
    monkeypatch.setattr(module, "dot_dtype", lambda device: torch.float32)
    votes, weight = some_votes(shape, 900), some_weight(shape)
    found = score(rule, votes, weight, ortho_tile)
    assert found.shape == shape and found.dtype.is_floating_point == (rule in ("balanced", "spectral"))
    for s, v, w in zip(found, votes, weight, strict=True):
        if rule == "gain":
            assert torch.equal(s, v)
        elif rule == "contribution":
            assert torch.equal(s, contribution(v, w))
        elif rule == "balanced":
            torch.testing.assert_close(s, balanced(v), rtol=1e-5, atol=1e-8)
        elif ortho_tile == 0:
            torch.testing.assert_close(s, orthogonalise(v.float(), torch.float32), rtol=1e-4, atol=1e-5)
        else:
            for rows in range(0, shape[1], 32):
                for columns in range(0, shape[2], 32):
                    part = slice(rows, rows + 32), slice(columns, columns + 32)
                    alone = orthogonalise(v[part].float(), torch.float32)
                    torch.testing.assert_close(s[part], alone, rtol=1e-4, atol=1e-5)


def test_an_unknown_rule_is_named():
    w = torch.zeros(1, 3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="'muon'; known are contribution, gain, balanced, spectral"):
        score("muon", w.int(), w, 0)


# In a kernel


@jit
def _score_kernel(votes, weight, out, RULE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    place = tl.program_id(0) * M * N + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, score_block(tl.load(votes + place), weight + place, place >= 0, RULE))


def in_a_kernel(rule: str, votes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores of blocks (B, M, N)."""
    out = torch.empty(votes.shape, dtype=dtype, device=votes.device)
    _score_kernel[(len(votes),)](votes, weight, out, RULE=rule, M=votes.shape[1], N=votes.shape[2])
    return out


@kernel_test
@pytest.mark.parametrize("bits", BITS)
def test_integer_rules_in_a_kernel(bits, device):
    votes, weight = some_votes((2, 32, 64)).to(device), some_weight((2, 32, 64), bits).to(device)
    for v in (votes, votes.long() * 133, votes.float() * 0.7):
        assert torch.equal(in_a_kernel("gain", v, weight, v.dtype), v)
        expected = contribution(v, weight)
        assert torch.equal(in_a_kernel("contribution", v, weight, expected.dtype), expected)


@jit
def _quotient_kernel(x, divisors, out, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, quotient(tl.load(x + place), tl.load(divisors + tl.program_id(0))))


@kernel_test
def test_quotients_are_those_of_a_division(device):
    """Of norms of every size that occurs, and of numbers up to them."""
    g, tiles, size = generator(5), 60, 4096
    norms = torch.rand(tiles, generator=g) + 1
    norms[:6] = torch.tensor([1.0, 2 - 2**-23, 1 + 2**-23, 1.5, 2 - 2**-22, 1 + 2**-22])
    norms *= 2.0 ** torch.randint(0, 40, (tiles,), generator=g)
    norms[-1] = 1e-20
    x = norms[:, None] * (2 * torch.rand(tiles, size, generator=g) - 1) * torch.rand(tiles, size, generator=g) ** 8
    x[:, 0], x[:, 1], x[:, 2] = 0, norms, -norms
    x[6:30] = x[6:30].round()
    x[x.abs() < 1e-30] = 0
    x, norms, out = x.to(device), norms.to(device), torch.empty(tiles, size, device=device)
    _quotient_kernel[(tiles,)](x, norms, out, SIZE=size)
    expected = x / norms[:, None]
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if INTERPRETED and version < (3, 9):  # its fma rounds twice
        torch.testing.assert_close(out, expected, rtol=3e-7, atol=0)
    else:
        assert torch.equal(out, expected)


@kernel_test
@pytest.mark.parametrize("side", [32, 64, 128])
def test_spectral_in_a_kernel(side, device):
    """fp16 rounds where torch's does, sums in another order: within fp16's precision of each other."""
    votes = some_votes((4, side, side), 3000)
    votes[1, side // 2 :] = 0  # a ragged tile
    votes[2] = 0
    votes[3] *= 40_000
    votes = votes.to(device)
    found = in_a_kernel("spectral", votes, torch.zeros_like(votes, dtype=torch.int8), torch.float32)
    expected = orthogonalise(votes.float(), torch.float16)
    assert (found[2] == 0).all() and (found[1, side // 2 :] == 0).all()
    error = (found - expected).norm(dim=(1, 2))
    assert (error <= 0.002 * expected.norm(dim=(1, 2))).all()
    again = in_a_kernel("spectral", votes, torch.zeros_like(votes, dtype=torch.int8), torch.float32)
    assert torch.equal(found, again)
