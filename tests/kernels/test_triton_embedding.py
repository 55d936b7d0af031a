"""The embedding kernels against their torch references, bit for bit.

Triton's interpreter cuts fp32 to bfloat16 where a GPU rounds it: there, results of that type are compared with the
cut reference.

    python -m pytest -q tests/kernels/test_triton_embedding.py
"""

import pytest
import torch
from torch import Tensor

import kernels.embedding as module
from kernels.backend import INTERPRETED
from kernels.embedding import embedding, embedding_torch, embedding_votes, embedding_votes_torch

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

# tokens, rows, n
SHAPES = [(1, 1, 1), (7, 13, 1), (1, 65, 300), (37, 7, 63), (63, 300, 37), (123, 5, 257)]


def shape_id(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def int8s(rows: int, columns: int, device: torch.device) -> Tensor:
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator(rows, columns))
    x.view(-1)[-1] = -127
    return x.to(device)


def token_ids(count: int, rows: int, device: torch.device) -> Tensor:
    return torch.randint(0, rows, (count,), generator=generator(count, rows)).to(device)


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y float32 as a kernel stores it: rounded, but for bfloat16 in the interpreter."""
    if INTERPRETED and dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -(2**16)).view(torch.float32)
    return y.to(dtype)


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    room = torch.full((2 * x.shape[0], 2 * x.shape[1]), -128, dtype=x.dtype, device=x.device)
    room[::2, ::2] = x
    return room[::2, ::2]


layouts = pytest.mark.parametrize(
    "layout", [torch.Tensor.contiguous, transposed, every_other], ids=lambda layout: layout.__name__
)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@shapes
def test_gather_equals_the_reference(shape, dtype, layout, device):
    t, rows, n = shape
    weight, scale = layout(int8s(rows, n, device)), torch.tensor(0.0371, device=device)
    tokens = token_ids(2 * t, rows, device)
    for ids in (tokens[:t], tokens[::2], tokens.view(2, t), tokens.view(t, 2).t()):
        y = embedding(ids, weight, scale, dtype)
        assert y.dtype == dtype and torch.equal(y, narrowed(embedding_torch(ids, weight, scale), dtype))


@layouts
@shapes
def test_votes_equal_the_reference(shape, layout, device):
    t, rows, n = shape
    d, tokens = layout(int8s(t, n, device)), token_ids(2 * t, rows, device)[::2]
    v = embedding_votes(d, tokens, rows)
    assert v.dtype == torch.int32 and torch.equal(v, embedding_votes_torch(d, tokens, rows))
    assert torch.equal(v, embedding_votes(d, tokens, rows))


def test_votes_on_one_row_do_not_lose_any(device):
    d = torch.full((700, 3), -127, dtype=torch.int8, device=device)
    tokens = torch.zeros(700, dtype=torch.int64, device=device)
    assert embedding_votes(d, tokens, 2).tolist() == [[-127 * 700] * 3, [0] * 3]


def test_tokens_outside_the_table(device):
    """NaN rows and no votes, and nothing read or written beside the tables."""
    room = torch.full((9, 5), 99, dtype=torch.int8, device=device)
    weight = room[3:6]
    weight.copy_(int8s(3, 5, device))
    tokens = torch.tensor([0, -1, 3, 2, 2**40, -(2**40)], device=device)
    y = embedding(tokens, weight, torch.tensor(0.5, device=device))
    assert torch.equal(y[[0, 3]], weight[[0, 2]].float() * 0.5) and y[[1, 2, 4, 5]].isnan().all()
    v = embedding_votes(int8s(6, 5, device), tokens, 3)
    assert torch.equal(v, embedding_votes_torch(int8s(6, 5, device)[[0, 3]], tokens[[0, 3]], 3))


def test_nothing_is_written_beside_the_result(device, monkeypatch):
    band = 4096
    room = torch.full((13 * 37 + 2 * band,), 3.5, device=device)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: room[band:-band].view(*size))
    weight, tokens = int8s(7, 37, device), token_ids(13, 7, device)
    scale = torch.tensor(0.5, device=device)
    assert torch.equal(embedding(tokens, weight, scale), embedding_torch(tokens, weight, scale))
    assert (room[:band] == 3.5).all() and (room[-band:] == 3.5).all()


def test_refusals(device):
    weight, scale = int8s(3, 5, device), torch.tensor(0.5, device=device)
    tokens = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"tokens \(0,\) of a table \(3, 5\); neither may be empty"):
        embedding(tokens[:0], weight, scale)
    with pytest.raises(ValueError, match="dtype torch.int8; need torch.int8 and torch.float32"):
        embedding(tokens, weight, scale, torch.int8)
    with pytest.raises(ValueError, match=r"delta \(3, 5\) and tokens \(4,\); need \(T, n\) and \(T,\), not empty"):
        embedding_votes(weight, tokens, 3)
    with pytest.raises(ValueError, match="not empty"):
        embedding_votes(weight[:0], tokens[:0], 3)
    past = module.MOST_ROWS + 1
    with pytest.raises(ValueError, match=f"{past} rows can overflow int32"):
        embedding_votes(weight[:1, :1].expand(past, 1), tokens[:1].expand(past), 1)


def test_as_torch_operators(device):
    weight, scale, tokens = int8s(7, 13, device), torch.tensor(0.5, device=device), token_ids(6, 7, device).view(2, 3)
    d = int8s(6, 13, device)
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.nanogft
    torch.library.opcheck(operators.embedding.default, (tokens, weight, scale, torch.float16), test_utils=checks)
    torch.library.opcheck(operators.embedding_votes.default, (d, tokens.view(-1), 7), test_utils=checks)

    def both(tokens, weight, scale, d):
        return embedding(tokens, weight, scale), embedding_votes(d, tokens.reshape(-1), 7)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(tokens, weight, scale, d), both(tokens, weight, scale, d), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
