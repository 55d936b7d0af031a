"""The fused learning step against the path through votes in memory: one kernel or two, the same bits.

    python -m pytest -q tests/kernels/test_triton_contribution_flip.py
"""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.contribution import votes
from kernels.contribution_flip import Matrix, contribution_flip, contribution_flip_torch, learn_step
from kernels.philox import dither_words, integers
from kernels.tiles import tile_grid

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

SHAPES = [(1, 7), (13, 1), (37, 63), (64, 64), (123, 150)]
LAYOUTS = ["rows", "columns", "padded columns", "every other"]


def generator(*seed: object) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def operand(tokens: int, n: int, salt: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (tokens, n), dtype=torch.int8, generator=generator(tokens, n, salt)).to(device)


def some_weight(shape: tuple[int, int], bits: int, device: torch.device) -> Tensor:
    q = max(1, 2 ** (bits - 1) - 1)
    w = torch.randint(-q, q + 1, shape, dtype=torch.int8, generator=generator(*shape, bits))
    return (torch.where(w == 0, 1, w).to(torch.int8) if bits == 1 else w).to(device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another place, extreme values around them."""
    tokens, n = x.shape
    if layout == "rows":
        return x
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "every other":
        band = torch.full((2 * tokens, 2 * n), 127, dtype=torch.int8, device=x.device)
        band[::2, ::2] = x
        return band[::2, ::2]
    band = torch.full((n + 2, -(-tokens // 16) * 16 + 32), -127, dtype=torch.int8, device=x.device)
    band[1:-1, 16 : 16 + tokens] = x.t()
    return band[1:-1, 16 : 16 + tokens].t()


def tiles(shape: tuple[int, int], side: int) -> int:
    down, across = tile_grid(shape, side)
    return down * across


def memory_of(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    stored = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator(*shape)).to(device)
    return stored, torch.rand(tiles(shape, 64), 1, 1, generator=generator(*shape)).to(device) * 50


@pytest.mark.parametrize("memory", [False, True], ids=["no memory", "memory"])
@pytest.mark.parametrize("rule, bits, ortho_tile, select_tile", [
    ("gain", 1, 128, 64), ("gain", 8, 128, 32), ("contribution", 6, 128, 64),
    ("spectral", 6, 128, 64), ("spectral", 2, 64, 64),
])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_kernel_as_two(shape, rule, bits, ortho_tile, select_tile, memory, device):
    tokens = {1: 1, 13: 300, 37: 129, 64: 128, 123: 37}[shape[0]]
    d, x = operand(tokens, shape[0], 1, device), operand(tokens, shape[1], 2, device)
    ends = []
    for fused in (True, False):
        w = some_weight(shape, bits, device)
        kept = memory_of(shape, device) if memory else None
        flips = learn_step(
            [Matrix(w, 3, 5, kept)], [(d, x)], rule=rule, bits=bits, k=0.3, ortho_tile=ortho_tile,
            select_tile=select_tile, seed=1, step=2, index=1, fused=fused, step_size=2 if bits == 8 else 1,
        )  # fmt: skip
        ends.append((w, flips, *(kept or ())))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert ends[0][1].item() == (ends[0][0] != some_weight(shape, bits, device)).sum()


@pytest.mark.parametrize("rule", ["gain", "contribution", "balanced"])
def test_public_function_against_torch(rule, device):
    """Words handed in, as the functions beside the kernels take them."""
    shape, cpu = (70, 130), torch.device("cpu")
    d, x = operand(45, 70, 1, cpu), operand(45, 130, 2, cpu)
    n = tiles(shape, 64)
    words = tuple(dither_words(1, 2, stream, n * 64) for stream in (4, 5))
    u = integers(1, 2, 3, n)
    settings = {"rule": rule, "bits": 6, "k": 0.2, "beta": 0.8}
    theirs, their_memory = some_weight(shape, 6, cpu), memory_of(shape, cpu)
    backend.use("torch")
    flips = contribution_flip_torch(d, x, theirs, u, memory=their_memory, words=words, **settings)
    backend.use("triton")
    mine, my_memory = some_weight(shape, 6, device), memory_of(shape, device)
    on_device = tuple(w.to(device) for w in words)
    d, x = d.to(device), x.to(device)
    assert contribution_flip(d, x, mine, u, memory=my_memory, words=on_device, **settings) == flips > 0
    # balanced divides by norms, whose sums depend on the device
    assert (mine.cpu() != theirs).sum() <= (0.01 * flips if rule == "balanced" else 0)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(my_memory, their_memory, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device):
    shape, tokens = (37, 63), 141
    d, x = operand(tokens, 37, 1, device), operand(tokens, 63, 2, device)
    expected = some_weight(shape, 6, device)
    flips = learn_step([Matrix(expected)], [votes(d, x)], rule="gain", bits=6, k=0.3)
    band = torch.full((63, 80), 99, dtype=torch.int8, device=device)
    view = band[5:42, 7:70] if layout != "columns" else band[:, 7:44].t()
    view.copy_(some_weight(shape, 6, device))
    operands = [(laid_out(d, layout), laid_out(x, layout))]
    found = learn_step([Matrix(view)], operands, rule="gain", bits=6, k=0.3, fused=True)
    assert torch.equal(view, expected) and torch.equal(found, flips)
    view.fill_(99)
    assert (band == 99).all()


def test_several_layers_of_different_lengths(device):
    shapes, tokens = [(130, 70), (1, 7), (64, 200)], [300, 1, 129]
    operands = [
        (operand(t, s[0], 1, device), operand(t, s[1], 2, device)) for s, t in zip(shapes, tokens, strict=True)
    ]
    firsts = [0, 6, 7]
    together = [some_weight(s, 4, device) for s in shapes]
    settings = {"rule": "gain", "bits": 4, "k": 0.1, "seed": -3, "step": 9, "index": 4}
    matrices = [Matrix(w, i, first) for i, (w, first) in enumerate(zip(together, firsts, strict=True))]
    flips = learn_step(matrices, operands, fused=True, **settings)
    for i, (shape, pair, first) in enumerate(zip(shapes, operands, firsts, strict=True)):
        alone = some_weight(shape, 4, device)
        n = learn_step([Matrix(alone, i, first)], [pair], fused=True, **settings)
        assert torch.equal(alone, together[i]) and n.item() == flips[i].item()


@pytest.mark.parametrize("value", [127, -127])
def test_longest_sum(value, device):
    """All products of one sign over many tokens: sums past 2^24 stay exact."""
    d = torch.full((2000, 2), value, dtype=torch.int8, device=device)
    x = torch.full((2000, 3), 127, dtype=torch.int8, device=device)
    x[-1, 1] = 126
    w = torch.zeros(2, 3, dtype=torch.int8, device=device)
    learn_step([Matrix(w)], [(d, x)], rule="gain", bits=6, k=2 / 3, fused=True)
    assert torch.equal(w, torch.tensor([[1, 0, 1]] * 2, dtype=torch.int8, device=device) * (-1 if value > 0 else 1))


def test_clear_errors(device):
    w = torch.zeros(4, 5, dtype=torch.int8, device=device)
    good = operand(3, 4, 1, device), operand(3, 5, 2, device)
    settings = {"rule": "gain", "bits": 6, "k": 0.1}
    for operands, message in [
        ((good[0][:0], good[1][:0]), "empty batch"), ((good[0].float(), good[1]), "must be int8"),
        ((good[0], good[1][:2]), "needs"), ((good[1], good[0]), "needs"), (torch.zeros(5, 4), "must agree"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            learn_step([Matrix(w)], [operands], **settings)
    with pytest.raises(ValueError, match="select_tile is 48"):
        learn_step([Matrix(w)], [good], select_tile=48, **settings)
    with pytest.raises(ValueError, match="leave `fused` out"):
        learn_step([Matrix(w)], [good], rule="balanced", bits=6, k=0.1, fused=True)
    with pytest.raises(ValueError, match="0 matrices and 1 votes"):
        learn_step([], [good], **settings)


def test_operator_passes_torchs_checks(device):
    w = some_weight((5, 16), 6, device)
    pair = [operand(7, 5, 1, device)], [operand(7, 16, 2, device)]
    arguments = ([w], [], [], *pair, [], [0], [0], [2**31, 1, 2, 2, 6, 1], "gain", 128, 64, 0.9)
    torch.library.opcheck(torch.ops.nanogft.contribution_flip.default, arguments)


def test_a_compiled_step(device):
    d, x = operand(45, 37, 1, device), operand(45, 63, 2, device)
    one, two = some_weight((37, 63), 6, device), some_weight((37, 63), 6, device)

    def step(weight: Tensor, d: Tensor, x: Tensor) -> Tensor:
        return learn_step([Matrix(weight)], [(d, x)], rule="gain", bits=6, k=0.3, fused=True)

    flips = step(one, d, x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(two, d, x), flips) and torch.equal(one, two) and flips.item() > 0
