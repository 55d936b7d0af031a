"""The fused learning step against the path through votes in memory: the same flips, exactly."""

import pytest
import torch

from kernels.contribution import votes
from kernels.contribution_flip import contribution_flip
from kernels.embedding import embedding
from kernels.flip import flip
from kernels.memory import MEMORY_TILE, remember_
from kernels.philox import dither_words, integers, uniform
from kernels.scores import RULES, score
from kernels.tiles import tile_grid

SHAPES = [(1, 7), (13, 1), (37, 63), (64, 65), (123, 70)]


def case(shape: tuple[int, int], bits: int):
    generator = torch.Generator().manual_seed(shape[0] * 131 + shape[1])
    q = max(1, 2 ** (bits - 1) - 1)
    d = torch.randint(-127, 128, (29, shape[0]), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (29, shape[1]), dtype=torch.int8, generator=generator)
    w = torch.randint(-q, q + 1, shape, dtype=torch.int8, generator=generator)
    return d, x, torch.where(w == 0, 1, w).to(torch.int8) if bits == 1 else w


def tiles(shape: tuple[int, int], side: int) -> int:
    down, across = tile_grid(shape, side)
    return down * across


@pytest.mark.parametrize("select_tile", [0, 32, 64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_kernel_flips_as_two(shape, rule, select_tile):
    for bits in (1, 2, 6, 8):
        d, x, w = case(shape, bits)
        u = integers(3, 5, 0, tiles(shape, select_tile) if select_tile else 1)
        chosen = {"bits": bits, "k": 0.3, "step_size": 2 if bits == 8 else 1, "select_tile": select_tile}
        one, two = w.clone(), w.clone()
        n = contribution_flip(d, x, one, u, rule=rule, ortho_tile=32, **chosen)
        v = d.t().long() @ x.long()
        assert torch.equal(votes(d, x).long(), v)
        assert [n] == flip([two], score(rule, [votes(d, x)], [two], 32), u, **chosen)
        assert torch.equal(one, two) and (n == 0 or not torch.equal(one, w))
        assert one.abs().max() <= max(1, 2 ** (bits - 1) - 1)
        if rule != "spectral" and rule != "balanced":
            assert (v * (one.long() - w.long()) <= 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_memory_and_chance(shape):
    d, x, w = case(shape, 6)
    n_tiles = tiles(shape, MEMORY_TILE)
    words = tuple(dither_words(1, 2, stream, n_tiles * MEMORY_TILE) for stream in (5, 6))
    u, draws = integers(1, 2, 3, n_tiles), uniform(1, 2, 4, n_tiles * 64 * 64)
    ends = []
    for fused in (True, False):
        weight, memory = w.clone(), (torch.zeros_like(w), torch.zeros(n_tiles, 1, 1))
        for _ in range(3):
            if fused:
                contribution_flip(d, x, weight, u, rule="gain", bits=6, k=0.2, draws=draws, gamma=0.5, memory=memory,
                                  beta=0.8, words=words)  # fmt: skip
            else:
                evidence = remember_(*memory, votes(d, x), 0.8, *words)
                flip([weight], [evidence], u, bits=6, k=0.2, draws=draws, gamma=0.5)
        ends.append((weight, *memory))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert (ends[0][1] != 0).any() and not torch.equal(ends[0][0], w)


def test_layers_stack_as_they_learn_alone():
    """Tiles of several layers in one batch: integers, so each layer learns as it would alone,
    also beside int64 votes."""
    shapes = [(64, 65), (13, 7), (70, 130)]
    weights = [case(shape, 6)[2] for shape in shapes]
    scores = [votes(*case(shape, 6)[:2]) for shape in shapes]
    scores[1] = scores[1].long() + 2**33
    counts = [tiles(shape, 64) for shape in shapes]
    u = integers(0, 0, 0, sum(counts))
    together = [w.clone() for w in weights]
    flips = flip(together, scores, u, bits=6, k=0.25)
    for w, s, part, end, n in zip(weights, scores, u.split(counts), together, flips, strict=True):
        alone = w.clone()
        assert flip([alone], [s], part, bits=6, k=0.25) == [n] and torch.equal(alone, end) and n > 0


def test_whole_matrices_do_not_stack():
    w = torch.zeros(3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="2 matrices and select_tile 0"):
        flip([w, w], [w.int(), w.int()], integers(0, 0, 0, 2), bits=6, k=0.5, select_tile=0)
    with pytest.raises(ValueError, match="'muon'; known are contribution, gain, balanced, spectral"):
        score("muon", [w.int()], [w], 0)


def test_embedding_gathers_rows():
    w = torch.tensor([[1, -2], [3, 4], [-5, 6]], dtype=torch.int8)
    y = embedding(torch.tensor([[2, 0], [2, 1]]), w, torch.tensor(0.5))
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.tensor([[[-2.5, 3.0], [0.5, -1.0]], [[-2.5, 3.0], [1.5, 2.0]]]))
