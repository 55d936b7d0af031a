"""The table of integer rows: its torch references against loops, its kernels against the references, bit for bit.

    python -m pytest -q tests/kernels/test_embedding.py
"""

import pytest
import torch
from torch import Tensor

from kernels.embedding import MOST_ROWS, accumulate_embedding_votes, embedding, embedding_torch
from kernels.votes import rescaled
from tests.kernels.inputs import (
    FLOATS,
    generator,
    guard,
    inner_block,
    int8s,
    kernel_test,
    layouts,
    narrowed,
    opaque,
    readable,
    untouched,
)

# tokens, rows, n
SHAPES = [(1, 1, 1), (7, 13, 1), (1, 65, 300), (37, 7, 63), (63, 300, 37), (123, 5, 257)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=readable)
votes_types = pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=readable)


def token_ids(count: int, rows: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randint(0, rows, (count,), generator=generator(count, rows)).to(device)


def old_votes(rows: int, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """What an earlier pass left."""
    large = 2**40 if dtype == torch.int64 else 2**20
    return torch.randint(-large, large, (rows, n), dtype=dtype, generator=generator(rows, n)).to(device)


def summed(d: Tensor, tokens: Tensor, votes: Tensor) -> Tensor:
    """The votes and those of d, in a loop."""
    total = votes.tolist()
    for token, delta in zip(tokens.tolist(), d.tolist(), strict=True):
        total[token] = [vote + value for vote, value in zip(total[token], delta, strict=True)]
    return torch.tensor(total, dtype=votes.dtype, device=votes.device)


# The torch references


def test_gather_against_a_loop():
    weight, tokens = int8s(7, 5), token_ids(6, 7).view(2, 3)
    y = embedding(tokens, weight, torch.tensor(0.25))
    for row, line in zip(tokens.tolist(), y.tolist(), strict=True):
        assert line == [[0.25 * value for value in weight[token].tolist()] for token in row]


@layouts
@votes_types
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 1), (300, 7, 37), (123, 65, 64)], ids=readable)
def test_votes_against_a_loop(shape, dtype, layout):
    t, rows, n = shape
    d, tokens, votes = int8s(t, n), token_ids(t, rows), old_votes(rows, n, dtype)
    expected = summed(d, tokens, votes)
    given = layout(votes)
    assert accumulate_embedding_votes(layout(d), tokens, given) is None
    assert given.dtype == dtype and torch.equal(given, expected)


def test_votes_at_the_limit_of_int32():
    one, zero = torch.full((1, 1), 127, dtype=torch.int8), torch.zeros(1, dtype=torch.int64)
    votes = torch.zeros(1, 1, dtype=torch.int32)
    # 2^24 rows are past what a float32 sum would hold.
    accumulate_embedding_votes(one.expand(2**24 + 1, 1), zero.expand(2**24 + 1), votes)
    assert votes.item() == 127 * (2**24 + 1)
    past = MOST_ROWS + 1
    assert MOST_ROWS == 133_144 * 127
    with pytest.raises(ValueError, match=f"{past} rows can overflow int32.*use int64 votes"):
        accumulate_embedding_votes(one.expand(past, 1), zero.expand(past), votes)
    wide = votes.long()
    accumulate_embedding_votes(one.expand(past, 1), zero.expand(past), wide)
    assert wide.item() == 127 * (2**24 + 1 + past)


def test_a_token_outside_the_table_is_an_error():
    d, tokens, votes = int8s(1, 1), torch.tensor([3]), torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        accumulate_embedding_votes(d, tokens, votes)
    with pytest.raises(IndexError, match="out of bounds"):
        embedding(tokens, int8s(3, 1), torch.tensor(1.0))


# The kernels


@kernel_test
@layouts
@shapes
def test_gather_kernel(shape, layout, device):
    t, rows, n = shape
    weight, scale = layout(int8s(rows, n, device)), torch.tensor(0.0371, device=device)
    tokens = token_ids(2 * t, rows, device)
    for ids in (tokens[:t], tokens[::2], tokens.view(2, t), tokens.view(t, 2).t()):
        assert torch.equal(embedding(ids, weight, scale), embedding_torch(ids, weight, scale))


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@shapes
def test_gather_kernel_in_every_type(shape, dtype, device):
    t, rows, n = shape
    weight, scale, ids = int8s(rows, n, device), torch.tensor(0.0371, device=device), token_ids(t, rows, device)
    y = embedding(ids, weight, scale, dtype)
    assert y.dtype == dtype and torch.equal(y, narrowed(embedding_torch(ids, weight, scale), dtype))


@kernel_test
@layouts
@votes_types
@shapes
def test_votes_kernel(shape, dtype, layout, device):
    t, rows, n = shape
    d, tokens, votes = int8s(t, n, device), token_ids(2 * t, rows, device)[::2], old_votes(rows, n, dtype, device)
    expected = summed(d, tokens, votes)
    given = layout(votes)
    around = None if given._base is None else given._base.clone()
    accumulate_embedding_votes(layout(d), tokens, given)
    assert torch.equal(given, expected)
    if around is not None:  # nothing beside the view has changed
        view = around.as_strided(given.shape, given.stride(), given.storage_offset())
        view.copy_(expected)
        assert torch.equal(given._base, around)


@kernel_test
def test_votes_on_one_row_do_not_lose_any(device):
    d = torch.full((700, 3), -127, dtype=torch.int8, device=device)
    votes = torch.zeros((2, 3), dtype=torch.int32, device=device)
    accumulate_embedding_votes(d, torch.zeros(700, dtype=torch.int64, device=device), votes)
    assert votes.tolist() == [[-127 * 700] * 3, [0] * 3]


@kernel_test
def test_kernels_with_tokens_outside_the_table(device):
    """NaN rows and no votes, and nothing read or written beside the tables."""
    weight = inner_block(int8s(3, 5, device))
    tokens = torch.tensor([0, -1, 3, 2, 2**40, -(2**40)], device=device)
    y = embedding(tokens, weight, torch.tensor(0.5, device=device))
    assert torch.equal(y[[0, 3]], weight[[0, 2]].float() * 0.5) and y[[1, 2, 4, 5]].isnan().all()
    d, room = int8s(6, 5, device), torch.full((9, 5), 77, dtype=torch.int32, device=device)
    accumulate_embedding_votes(d, tokens, room[3:6])
    assert torch.equal(room[3:6], 77 + torch.stack([d[0], torch.zeros_like(d[0]), d[3]]).int())
    assert (room[:3] == 77).all() and (room[6:] == 77).all()


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    weight, tokens, scale = int8s(7, 37, device), token_ids(13, 7, device), torch.tensor(0.5, device=device)
    expected = embedding_torch(tokens, weight, scale)
    bands = guard(monkeypatch)
    assert torch.equal(embedding(tokens, weight, scale), expected) and untouched(bands)


@kernel_test
def test_twice_is_the_same(device):
    d, tokens = int8s(300, 37, device), token_ids(300, 5, device)
    first, second = (old_votes(5, 37, torch.int32, device) for _ in range(2))
    accumulate_embedding_votes(d, tokens, first)
    accumulate_embedding_votes(d, tokens, second)
    assert torch.equal(first, second)


@kernel_test
@pytest.mark.parametrize("old", [0.0, 0.25], ids=["first pass", "later"])
def test_votes_with_ratios(old, device):
    """As `accumulate_votes` has them: both rescaled and rounded once; in a step's first pass there are none yet."""
    d, tokens = int8s(300, 37, device), token_ids(300, 5, device)
    votes = old_votes(5, 37, torch.int32, device) if old else torch.zeros(5, 37, dtype=torch.int32, device=device)
    ratios = torch.tensor(old, device=device), torch.tensor(0.3 if old else 1.0, device=device)
    new = torch.zeros(5, 37, dtype=torch.int64).index_add_(0, tokens.cpu(), d.cpu().long())
    expected = rescaled(votes.cpu(), new, *(r.cpu() for r in ratios))
    accumulate_embedding_votes(d, tokens, votes, *ratios)
    assert torch.equal(votes.cpu().double(), expected)


@kernel_test
def test_as_torch_operators(device):
    weight, scale, tokens = int8s(7, 13, device), torch.tensor(0.5, device=device), token_ids(6, 7, device).view(2, 3)
    d, votes = int8s(6, 13, device), old_votes(7, 13, torch.int32, device)
    torch.library.opcheck(torch.ops.nanogft.embedding, (tokens, weight, scale, torch.float16))
    torch.library.opcheck(torch.ops.nanogft.accumulate_embedding_votes_torch, (d, tokens.view(-1), votes))
    torch.library.opcheck(torch.ops.nanogft.accumulate_embedding_votes, (d, tokens.view(-1), votes, None, None))

    def both(tokens: Tensor, weight: Tensor, scale: Tensor, d: Tensor, votes: Tensor) -> Tensor:
        accumulate_embedding_votes(d, tokens.reshape(-1), votes)
        return embedding(tokens, weight, scale)

    traced, mine, other = opaque(both), votes.clone(), votes.clone()
    assert torch.equal(traced(tokens, weight, scale, d, mine), both(tokens, weight, scale, d, other))
    assert torch.equal(mine, other) and not torch.equal(mine, votes)


@kernel_test
def test_refusals(device):
    weight, scale = int8s(3, 5, device), torch.tensor(0.5, device=device)
    tokens = torch.zeros(4, dtype=torch.int64, device=device)
    votes = torch.zeros(3, 5, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"tokens \(0,\) of a table \(3, 5\); neither may be empty"):
        embedding(tokens[:0], weight, scale)
    for dtype, wrong in ((torch.int8, scale), (torch.float32, scale.double()), (torch.float32, scale.expand(2))):
        with pytest.raises(ValueError, match=r"need torch.int8, torch.float32 \(\) and one of torch.float32"):
            embedding(tokens, weight, wrong, dtype)
    for d, ids, table in (
        (weight, tokens, votes), (weight[0], tokens[:3], votes), (weight[:0], tokens[:0], votes),
        (weight[:, :4], tokens[:3], votes), (weight, tokens[:3], votes[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"need \(T, n\), \(T,\) and \(rows, n\), not empty"):
            accumulate_embedding_votes(d, ids, table)
    with pytest.raises(ValueError, match="they are torch.int32 or torch.int64"):
        accumulate_embedding_votes(weight, tokens[:3], votes.float())
