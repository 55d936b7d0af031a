"""Flips: the torch reference against brute force, the kernel against the reference, move by move.

    python -m pytest -q tests/kernels/test_flip.py
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels import scores as scores_module
from kernels.flip import flip
from kernels.momentum import accumulate_momentum_
from kernels.philox import Stream, words
from kernels.scores import score, unorthogonalised_reason
from kernels.update_rule import UpdateRule, unscored_reason, unsupported_reason
from tests.kernels.inputs import kernel_test, readable
from tests.kernels.update_inputs import (
    BITS,
    SEED,
    STEP,
    fenced,
    share,
    some_layers,
    some_momentum,
    some_rng,
    some_votes,
    some_weight,
    torch_backend,
    unharmed,
)

Case = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def case(shape: tuple[int, int, int], rule: UpdateRule, levels: int = 300, dtype: torch.dtype = torch.int32) -> Case:
    """Votes, weight, and momentum with its scales where the rule has it."""
    votes = some_votes(shape, levels)
    votes = votes.long() * 2**22 if dtype == torch.int64 else votes.to(dtype)
    kept = some_momentum(shape) if rule.momentum else (None, None)
    return votes, some_weight(shape, rule.bits), *kept


def to_device(tensors: Case, device: torch.device) -> Case:
    return tuple(None if t is None else t.clone().to(device) for t in tensors)


def flipped(tensors: Case, rule: UpdateRule, k: float, stop: float = 0.0) -> Tensor:
    """`flip`, in place in `tensors`; the flips of each matrix."""
    votes, weight, *kept = tensors
    device = weight.device
    return flip(
        votes, weight, share(k, device), some_rng(device), some_layers(len(weight), device),
        torch.tensor(stop, device=device), rule, *kept,
    )  # fmt: skip


def agree(tensors: Case, rule: UpdateRule, k: float, device: torch.device) -> Tensor:
    """Flip by the kernel, between guard bands, and by the reference: everything equal. Returns the weights after it."""
    theirs, before = to_device(tensors, torch.device("cpu")), tensors[1]
    with torch_backend():
        expected = flipped(theirs, rule, k)
    mine, bands = [], []
    for tensor in to_device(tensors, device):
        inside, pair = (None, ()) if tensor is None else fenced(tensor)
        mine.append(inside)
        bands += [pair] if pair else []
    flips = flipped(tuple(mine), rule, k)
    assert flips.dtype == torch.int64 and flips.device.type == device.type and torch.equal(flips.cpu(), expected)
    assert all(a is None or torch.equal(a.cpu(), b) for a, b in zip(mine, theirs, strict=True))
    assert unharmed(*bands)
    moved = (mine[1].cpu() != before).flatten(1).sum(dim=1)
    assert torch.equal(moved, expected), "every flip counted moves its weight"
    return mine[1].cpu()


# The torch reference


def flipped_by_hand(
    votes: Tensor, weight: Tensor, side: int, q: int, unit: int, size: int, k: float
) -> list[list[int]]:  # fmt: skip
    """Gain, weight by weight, on one matrix of a stack: the first of `some_layers`."""
    rows, columns = weight.shape
    tall, wide = (side, side) if side else (rows, columns)
    w, v = weight.tolist(), votes.tolist()
    tile = 0
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            places = [(r, c) for r in range(top, min(top + tall, rows)) for c in range(left, min(left + wide, columns))]
            u = int(words(SEED, STEP, Stream.TOPK + 16 * int(some_layers(1)[0]), 1, tile)[0])
            m = (int(k * 2**32 + 0.5) * len(places) + u) // 2**32
            legal = [(r, c) for r, c in places if v[r][c] and abs(w[r][c] - unit * (1 if v[r][c] > 0 else -1)) <= q]
            for r, c in sorted(legal, key=lambda place: -abs(v[place[0]][place[1]]))[:m]:  # a stable sort
                move = unit * size * (1 if v[r][c] > 0 else -1)
                w[r][c] = max(-q, min(q, w[r][c] - move))
            tile += 1
    return w


@pytest.mark.parametrize("k", [0.0, 0.013, 0.37, 1.0])
@pytest.mark.parametrize("topk_tile", [0, 7, 32, 64, 128])
@pytest.mark.parametrize("bits, size", [(1, 1), (2, 1), (6, 1), (8, 5)])
def test_reference_against_brute_force(bits, size, topk_tile, k):
    rule = UpdateRule("gain", bits, topk_tile=topk_tile, step_size=size)
    for shape, levels in (((1, 7), 0), ((33, 65), 3), ((65, 130), 0)):
        votes, weight, *_ = case((1, *shape), rule, levels)
        expected = flipped_by_hand(votes[0], weight[0], topk_tile, *BITS[bits], size, k)
        layers = some_layers(1)
        before = weight.clone()
        flips = flip(votes, weight, share(k), some_rng(), layers, torch.zeros(()), rule)
        assert weight[0].tolist() == expected and weight.dtype == torch.int8
        assert flips.tolist() == [(weight != before).sum()]


@pytest.mark.parametrize("rule", ["gain", "contribution", "balanced", "spectral"])
def test_reference_flips_by_its_scores(rule):
    """A rule's flips are gain's flips of its scores."""
    settings = UpdateRule(rule, ortho_tile=32)
    votes, weight, *_ = case((3, 33, 65), settings)
    scores, other = score(rule, votes, weight, 32), weight.clone()
    flips = flipped((votes, weight, None, None), settings, 0.3)
    assert torch.equal(flipped((scores, other, None, None), UpdateRule("gain"), 0.3), flips)
    assert torch.equal(other, weight) and (flips > 0).all()


def test_reference_scores_the_momentum():
    rule = UpdateRule("gain", momentum=0.8)
    votes, weight, stored, scale = case((3, 33, 65), rule)
    other, kept, layers = weight.clone(), (stored.clone(), scale.clone()), some_layers(3)
    evidence = accumulate_momentum_(*kept, votes, 0.8, some_rng(), layers, torch.zeros(()))
    flips = flipped((votes, weight, stored, scale), rule, 0.3)
    assert torch.equal(flipped((evidence, other, None, None), UpdateRule("gain"), 0.3), flips)
    assert torch.equal(other, weight) and torch.equal(stored, kept[0]) and torch.equal(scale, kept[1])


@pytest.mark.parametrize("topk_tile", [0, 32])
def test_reference_flips_with_a_probability(topk_tile):
    """A selected weight moves where its own number is below p; each matrix has its own numbers."""
    rule = UpdateRule("gain", topk_tile=topk_tile, flip_prob="score", flip_gamma=0.5)
    votes, weight, *_ = case((3, 33, 65), rule)
    selected, found = weight.clone(), weight.clone()
    flipped((votes, selected, None, None), replace(rule, flip_prob="one"), 0.3)
    flips = flipped((votes, found, None, None), rule, 0.3)
    layers, area = some_layers(3), topk_tile**2 or 33 * 65
    side = topk_tile or 65
    expected = selected.clone()
    for place, layer in enumerate(layers.tolist()):
        numbers = words(SEED, STEP, Stream.FLIP + 16 * layer, area * (6 if topk_tile else 1))
        for tile in range(6 if topk_tile else 1):
            top, left = tile // 3 * side, tile % 3 * side
            part = slice(top, top + side), slice(left, left + side)
            v, w = votes[place][part], weight[place][part]
            legal = (v != 0) & ((w - v.sign()).abs() <= 31)
            p = (torch.where(legal, v.abs(), 0).double() / torch.where(legal, v.abs(), 0).max()).sqrt()
            u = torch.from_numpy(numbers[tile * area : (tile + 1) * area] / 2.0**32)
            u = u.view(side, side)[: v.shape[0], : v.shape[1]] if topk_tile else u.view(33, 65)
            expected[place][part] = torch.where(u < p, selected[place][part], w)
    assert torch.equal(found, expected) and torch.equal(flips, (found != weight).flatten(1).sum(dim=1))
    assert ((found == weight) & (selected != weight)).any() and (flips > 0).all()


def test_reference_of_stacked_matrices_is_that_of_single_ones():
    rule = UpdateRule("gain", momentum=0.9)
    together = case((3, 33, 65), rule)
    alone = to_device(together, torch.device("cpu"))
    flips, layers = flipped(together, rule, 0.3), some_layers(3)
    for i in range(3):
        votes, weight, stored, scale = (t[i : i + 1] for t in alone)
        count = flip(votes, weight, share(0.3), some_rng(), layers[i : i + 1], torch.zeros(()), rule, stored, scale)
        assert count.item() == flips[i].item()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


PARTED = [
    UpdateRule("spectral", ortho_tile=128, momentum=0.9), UpdateRule("spectral", ortho_tile=32, topk_tile=32),
    UpdateRule("spectral", ortho_tile=0, momentum=0.9), UpdateRule("spectral", ortho_tile=7, topk_tile=64),
    UpdateRule("balanced", momentum=0.9), UpdateRule("balanced", topk_tile=0),
    UpdateRule("gain", topk_tile=0, momentum=0.9), UpdateRule("gain", topk_tile=96, momentum=0.9, step_size=3),
    UpdateRule("contribution", topk_tile=32, flip_prob="score", momentum=0.9),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 300, 65), (3, 257, 20), (3, 33, 130)], ids=readable)
@pytest.mark.parametrize("rule", PARTED, ids=lambda rule: f"{rule.rule}-{rule.ortho_tile}-{rule.topk_tile}")
def test_reference_in_parts_is_that_of_the_whole(rule, shape, monkeypatch):
    """Parts of single rows of tiles, of a few, of one matrix and of two."""
    whole = case(shape, rule)
    given = to_device(whole, torch.device("cpu"))
    flips = flipped(whole, rule, 0.3)
    for part in (1, 130 * shape[2], shape[1] * shape[2], 2 * shape[1] * shape[2]):
        monkeypatch.setattr("kernels.tiles.PART", part)
        mine = to_device(given, torch.device("cpu"))
        assert torch.equal(flipped(mine, rule, 0.3), flips)
        assert all(a is None or torch.equal(a, b) for a, b in zip(mine, whole, strict=True))


# The kernel

# L, out, in; topk_tile; momentum; step_size; votes' type and levels (0: all sizes). A program owns 32 to 128 rows.
CASES = [
    ((1, 1, 1), 64, 0.0, 1, torch.int32, 0),
    ((3, 1, 7), 64, 0.9, 1, torch.int32, 0),
    ((1, 33, 1), 128, 0.0, 3, torch.int64, 0),
    ((1, 33, 65), 32, 0.0, 1, torch.int32, 2),
    ((3, 7, 63), 32, 0.9, 1, torch.int64, 3),
    ((1, 65, 33), 64, 0.0, 5, torch.float32, 2),
    ((1, 63, 130), 128, 0.9, 1, torch.int32, 900),
    ((1, 33, 20), 32, 0.9, 2, torch.float32, 5),
]


@kernel_test
@pytest.mark.parametrize("name, bits", [("gain", 1), ("gain", 2), ("gain", 6), ("gain", 8), ("contribution", 2),
                                        ("contribution", 8)])  # fmt: skip
@pytest.mark.parametrize("shape, topk_tile, momentum, step_size, dtype, levels", CASES, ids=readable)
def test_kernel(shape, topk_tile, momentum, step_size, dtype, levels, name, bits, device):
    """Exactly the reference's moves and momentum; ties, zeros and illegal moves; nothing is written outside."""
    rule = UpdateRule(name, bits, topk_tile=topk_tile, momentum=momentum, step_size=step_size)
    after = agree(case(shape, rule, levels, dtype), rule, 0.37, device)
    assert after.abs().max() <= BITS[bits][0] and (bits > 1 or (after != 0).all())


@kernel_test
@pytest.mark.parametrize("bits", BITS)
def test_every_width(bits, device):
    rule = UpdateRule("gain", bits)
    agree(case((1, 33, 63), rule, 5), rule, 0.013 if bits % 2 else 0.5, device)


@kernel_test
@pytest.mark.parametrize("name", ["gain", "contribution"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_none_and_all(name, momentum, device):
    """k = 0 moves nothing, though momentum takes in the votes; k = 1 makes every legal move."""
    rule = UpdateRule(name, momentum=momentum)
    tensors = case((1, 7, 63), rule, 2)
    assert torch.equal(agree(tensors, rule, 0.0, device), tensors[1])
    after = agree(tensors, rule, 1.0, device)
    if not momentum:
        votes, weight, *_ = tensors
        scores = score(name, votes, weight, 0)
        assert torch.equal(after, (weight - scores.sign()).clamp(-31, 31).to(torch.int8))


@kernel_test
@pytest.mark.parametrize("topk_tile", [32, 64])
def test_counts_are_exact(topk_tile, device):
    """Where every move is legal: m = floor(k n + u) in every tile, ragged ones as they are."""
    rule, layer = UpdateRule("gain", topk_tile=topk_tile), int(some_layers(1)[0])
    votes, weight = torch.ones(1, 65, 33, dtype=torch.int32, device=device), torch.zeros(1, 65, 33, dtype=torch.int8)
    weight = weight.to(device)
    flipped((votes, weight, None, None), rule, 0.1)
    across = -(-33 // topk_tile)
    for tile in range(-(-65 // topk_tile) * across):
        top, left = tile // across * topk_tile, tile % across * topk_tile
        part = weight[0, top : top + topk_tile, left : left + topk_tile]
        u = int(words(SEED, STEP, Stream.TOPK + 16 * layer, 1, tile)[0])
        m = (int(0.1 * 2**32 + 0.5) * part.numel() + u) // 2**32
        moved = (part.flatten() == -1).tolist()
        assert moved == [True] * m + [False] * (part.numel() - m), "ties go to the lower index"


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
def test_k_is_rounded_to_units_of_32_bits(where, device):
    """At a word so large that one unit makes one move: half a unit is rounded up to it, less is none."""
    backend.use("torch" if where == "torch" else "triton")
    layers = torch.tensor([873_744], device=device)
    assert words(SEED, STEP, Stream.TOPK + 16 * 873_744, 1) == 2**32 - 1471
    votes = torch.ones(1, 64, 64, dtype=torch.int32, device=device)
    for k, expected in ((2.0**-32, 1), (2.0**-33, 1), (0.49 * 2.0**-32, 0)):
        weight, stop = torch.zeros(1, 64, 64, dtype=torch.int8, device=device), torch.zeros((), device=device)
        flips = flip(votes, weight, share(k, device), some_rng(device), layers, stop, UpdateRule("gain"))
        assert flips.item() == expected and weight[0, 0, 0] == -expected


@kernel_test
def test_flips_are_added_to_those_given(device):
    votes, weight = torch.full((1, 5, 7), 9, dtype=torch.int32, device=device), torch.zeros(1, 5, 7, dtype=torch.int8)
    so_far = torch.tensor([2**40], device=device)
    layers, stop = some_layers(1, device), torch.zeros((), device=device)
    found = flip(
        votes, weight.to(device), share(1.0, device), some_rng(device), layers, stop, UpdateRule("gain"), flips=so_far
    )  # fmt: skip
    assert found is so_far and so_far.item() == 2**40 + 35


@kernel_test
def test_largest_sums(device):
    """The largest votes that int32 sums can be, and int64 votes that differ only above their low 32 bits."""
    largest = 133_144 * 127 * 127
    v = torch.tensor([[[largest, -largest, largest - 1, 1]]], dtype=torch.int32, device=device)
    wide = (torch.arange(1, 5, device=device) << 32)[None, None, :] + 7
    for votes, expected in ((v, [-1, 1, 0, 0]), (wide, [0, 0, -1, -1])):
        w = torch.zeros(1, 1, 4, dtype=torch.int8, device=device)
        assert flipped((votes, w, None, None), UpdateRule("gain"), 0.5).item() == 2
        assert w.flatten().tolist() == expected
    w = torch.tensor([[[127, -127, 126, 127]]], dtype=torch.int8, device=device)  # |W V| needs 38 bits
    rule = UpdateRule("contribution", 8)
    assert flipped((v, w, None, None), rule, 0.5).item() == 2 and w.flatten().tolist() == [126, -126, 126, 127]


@kernel_test
@pytest.mark.parametrize("name", ["gain", "contribution"])
def test_steps_add_up(name, device):
    """Weights and momentum after three steps."""
    rule = UpdateRule(name, momentum=0.9)
    theirs = case((1, 33, 63), rule)
    mine = to_device(theirs, device)
    for step in range(3):
        theirs[0].copy_(some_votes((1, 33, 63), 0 if step else 900, step))
        mine[0].copy_(theirs[0])
        with torch_backend():
            expected = flipped(theirs, rule, 0.2)
        assert torch.equal(flipped(mine, rule, 0.2).cpu(), expected)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, theirs, strict=True))


@kernel_test
@pytest.mark.parametrize("ortho_tile, topk_tile, momentum, bits", [
    (32, 32, 0.0, 6), (64, 32, 0.9, 6), (64, 64, 0.0, 2), (128, 64, 0.9, 8), (128, 128, 0.0, 1),
])  # fmt: skip
def test_spectral(ortho_tile, topk_tile, momentum, bits, device, monkeypatch):
    """Equal counts and momentum. Norms are summed in another order, which moves some fp16 roundings."""
    monkeypatch.setattr(scores_module, "dot_dtype", lambda device: torch.float16)
    rule = UpdateRule("spectral", bits, ortho_tile, topk_tile, momentum)
    assert (unscored_reason(rule) == "") == (ortho_tile == topk_tile)
    theirs = case((1, 65, 63), rule, 3000)
    mine = to_device(theirs, device)
    with torch_backend():
        expected = flipped(theirs, rule, 0.3)
    flips = flipped(mine, rule, 0.3)
    assert torch.equal(flips.cpu(), expected) and (flips > 0).all()
    different = (mine[1].cpu() != theirs[1]).sum()
    assert different <= 0.04 * flips.sum()
    assert not momentum or all(torch.equal(a.cpu(), b) for a, b in zip(mine[2:], theirs[2:], strict=True))


@kernel_test
@pytest.mark.parametrize("name, ortho_tile", [("balanced", 128), ("spectral", 0), ("spectral", 32)])
def test_scores_that_look_past_a_block_are_formed_in_torch(name, ortho_tile, device):
    rule = UpdateRule(name, 6, ortho_tile, 64, momentum=0.9)
    assert unscored_reason(rule)
    mine = to_device(case((3, 7, 63), rule, 3000), device)
    votes, weight, stored, scale = to_device(mine, device)
    flips = flipped(mine, rule, 0.3)
    stop, layers = torch.zeros((), device=device), some_layers(3, device)
    evidence = accumulate_momentum_(stored, scale, votes, 0.9, some_rng(device), layers, stop)
    scores = score(name, evidence, weight, ortho_tile)
    expected = flipped((scores, weight, None, None), UpdateRule("gain", topk_tile=64), 0.3)
    assert torch.equal(flips, expected) and (flips > 0).all() and torch.equal(mine[1], weight)
    assert torch.equal(mine[2], stored) and torch.equal(mine[3], scale)


@kernel_test
@pytest.mark.parametrize("topk_tile, flip_prob", [(0, "one"), (48, "one"), (64, "score")])
def test_selections_that_no_kernel_makes_are_torchs(topk_tile, flip_prob, device):
    rule = UpdateRule("gain", topk_tile=topk_tile, momentum=0.9, flip_prob=flip_prob)
    assert unsupported_reason(rule)
    agree(case((3, 33, 65), rule), rule, 0.3, device)


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
@pytest.mark.parametrize("rule", [
    UpdateRule("gain", momentum=0.9), UpdateRule("contribution"), UpdateRule("spectral", ortho_tile=64, momentum=0.9),
    UpdateRule("balanced", momentum=0.9), UpdateRule("gain", topk_tile=0, momentum=0.9),
], ids=lambda rule: f"{rule.rule}-{rule.topk_tile}-{rule.momentum}")  # fmt: skip
def test_nothing_changes_at_a_stop(rule, where, device):
    tensors = case((1, 33, 63), rule)
    backend.use("torch" if where == "torch" else "triton")
    mine = to_device(tensors, device)
    flips = flipped(mine, rule, 1.0, stop=1.0)
    assert flips.dtype == torch.int64 and flips.tolist() == [0]
    assert all(a is None or torch.equal(a.cpu(), b) for a, b in zip(mine, tensors, strict=True))


@kernel_test
def test_twice_is_the_same(device):
    rule = UpdateRule("spectral", ortho_tile=64, momentum=0.9)
    first = to_device(case((1, 65, 63), rule), device)
    second = to_device(first, device)
    assert torch.equal(flipped(first, rule, 0.3), flipped(second, rule, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kernel_test
def test_votes_of_any_layout(device):
    rule = UpdateRule("gain")
    votes, weight, *_ = to_device(case((3, 7, 33), rule), device)
    ends = []
    for layout in (votes, votes.mT.contiguous().mT, votes.repeat_interleave(2, dim=1)[:, ::2]):
        ends.append(weight.clone())
        flipped((layout, ends[-1], None, None), rule, 0.3)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_what_the_kernels_leave_to_torch():
    assert unsupported_reason(UpdateRule(topk_tile=64)) == "" and unsupported_reason(UpdateRule(topk_tile=128)) == ""
    assert "topk_tile is 0; the kernels select in tiles of 32, 64, 128" in unsupported_reason(UpdateRule(topk_tile=0))
    assert "flip_prob is score" in unsupported_reason(UpdateRule(flip_prob="score"))
    assert unscored_reason(UpdateRule("gain", ortho_tile=0, momentum=0.9)) == ""
    assert unscored_reason(UpdateRule("spectral", ortho_tile=64), (8, 0)) == ""
    assert "rule is balanced" in unscored_reason(UpdateRule("balanced"))
    assert "ortho_tile is 128 and topk_tile 64" in unscored_reason(UpdateRule("spectral"))
    held = UpdateRule("gain", topk_tile=32)
    assert unscored_reason(held) == "" and "momentum are 64" in unscored_reason(replace(held, momentum=0.9))
    assert "ortho_tile is 0;" in unorthogonalised_reason(0) and unorthogonalised_reason(128) == ""
    assert "sm_80" in unorthogonalised_reason(128, (8, 0)) and unorthogonalised_reason(64, (8, 0)) == ""
    assert "sm_100" in unscored_reason(UpdateRule("spectral", ortho_tile=128, topk_tile=128), (10, 0))


def test_an_old_compiler_does_not_score_on_new_gpus(monkeypatch):
    monkeypatch.setattr(scores_module, "OLD_COMPILER", True)
    assert "cannot compile its products for sm_100" in unscored_reason(UpdateRule("spectral", ortho_tile=64), (10, 0))
    assert unscored_reason(UpdateRule("spectral", ortho_tile=64), (9, 0)) == ""


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
def test_refusals(where, device):
    backend.use("torch" if where == "torch" else "triton")
    plain, rule = UpdateRule("gain"), UpdateRule("gain", momentum=0.9)
    votes, weight, stored, scale = to_device(case((3, 7, 33), rule), device)
    refused = [
        (plain, (votes[:2], weight, None, None), r"votes \(2, 7, 33\) for a weight \(3, 7, 33\); they must agree"),
        (plain, (votes[:, :, :5], weight, None, None), "they must agree"),
        (plain, (votes[0], weight[0], None, None), r"must be int8 \(L, out, in\), contiguous, not empty"),
        (plain, (votes, weight.int(), None, None), "torch.int32 .* must be int8"),
        (plain, (votes.mT, weight.mT, None, None), "contiguous"),
        (plain, (votes[:0], weight[:0], None, None), "not empty"),
        (plain, (votes.double(), weight, None, None), "votes torch.float64; they must be int32, int64 or float32"),
        (plain, (votes, weight, stored, scale), "momentum is 0.0 and its buffer or its scales are given"),
        (rule, (votes, weight, None, None), "momentum is 0.9 and its buffer or its scales are missing"),
        (rule, (votes, weight, stored, None), "momentum is 0.9 and its buffer or its scales are missing"),
        (rule, (votes, weight, stored[:2], scale), r"momentum \(2, 7, 33\) .* need \(3, 7, 33\) and \(3, 1\)"),
        (rule, (votes, weight, stored, scale[0]), r"scales \(1,\); need"),
        (rule, (votes, weight, stored.int(), scale), "need int8 and float32"),
        (rule, (votes, weight, stored, scale.double()), "need int8 and float32"),
        (rule, (votes, weight, stored.mT.contiguous().mT, scale), "must be contiguous"),
        (UpdateRule("gain", 0), (votes, weight, None, None), "bits 0; weights have 1 to 8 bits"),
        (UpdateRule("gain", 9), (votes, weight, None, None), "bits 9; weights have 1 to 8 bits"),
        (UpdateRule("muon"), (votes, weight, None, None), "'muon'; known are contribution, gain, balanced, spectral"),
    ]
    before = weight.clone(), stored.clone()
    for settings, tensors, message in refused:
        with pytest.raises(ValueError, match=message):
            flipped(tensors, settings, 0.3)
    assert torch.equal(weight, before[0]) and torch.equal(stored, before[1])
