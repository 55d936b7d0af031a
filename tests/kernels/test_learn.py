"""Learning in one kernel: D and X to moves, exactly as votes in memory and then `flip`.

    python -m pytest -q tests/kernels/test_learn.py
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels.learn as module
from kernels import backend
from kernels.backend import INTERPRETED
from kernels.embedding import accumulate_embedding_votes
from kernels.flip import flip
from kernels.learn import learn, learn_in_backward
from kernels.limits import MAX_REDUCTION
from kernels.update_rule import UpdateRule
from kernels.votes import accumulate_votes
from tests.kernels.inputs import LAYOUTS, generator, inner_block, int8s, kernel_test, layouts, opaque
from tests.kernels.update_inputs import (
    fenced,
    share,
    some_layers,
    some_momentum,
    some_rng,
    some_weight,
    torch_backend,
    unharmed,
)

Case = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def case(tokens: int, out: int, inner: int, rule: UpdateRule, device: torch.device | str = "cpu") -> Case:
    """D, X, a weight (1, out, in), and its momentum and scales where the rule has it."""
    kept = some_momentum((1, out, inner)) if rule.momentum else (None, None)
    tensors = int8s(tokens, out, seed=1), int8s(tokens, inner, seed=2), some_weight((1, out, inner), rule.bits), *kept
    return copied(tensors, device)


def copied(tensors: tuple, device: torch.device | str) -> tuple:
    return tuple(None if t is None else t.clone().to(device) for t in tensors)


def learned(tensors: Case, rule: UpdateRule, k: float = 0.3, stop: float = 0.0) -> Tensor:
    """`learn`, in place; the flips."""
    d, x, weight, *kept = tensors
    device = weight.device
    return learn(
        d, x, weight, share(k, device), some_rng(device), some_layers(1, device), torch.tensor(stop, device=device),
        rule, *kept,
    )  # fmt: skip


def voted_and_flipped(tensors: Case, rule: UpdateRule, k: float = 0.3) -> Tensor:
    """The same through votes in memory."""
    d, x, weight, *kept = tensors
    device = weight.device
    votes = torch.zeros(weight.shape, dtype=torch.int64 if len(d) > MAX_REDUCTION else torch.int32, device=device)
    accumulate_votes(d, x, votes[0], some_rng(device))
    return flip(
        votes, weight, share(k, device), some_rng(device), some_layers(1, device), torch.zeros((), device=device),
        rule, *kept,
    )  # fmt: skip


def equal(a: tuple, b: tuple) -> bool:
    return all(s is t is None or torch.equal(s.cpu(), t.cpu()) for s, t in zip(a, b, strict=True))


# The torch reference


@pytest.mark.parametrize("rule", ["gain", "contribution", "balanced", "spectral"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("topk_tile", [0, 32, 64])
@pytest.mark.parametrize("tokens, out, inner", [(1, 1, 7), (29, 33, 1), (130, 63, 65), (7, 65, 130)])
def test_reference_is_votes_then_flip(tokens, out, inner, topk_tile, momentum, rule):
    for bits in (1, 2, 6, 8):
        settings = UpdateRule(rule, bits, 32, topk_tile, momentum, step_size=2 if bits == 8 else 1)
        one = case(tokens, out, inner, settings)
        two, before = copied(one, "cpu"), one[2].clone()
        flips = learned(one, settings)
        assert torch.equal(voted_and_flipped(two, settings), flips) and equal(one, two)
        assert flips.dtype == torch.int64 and flips.tolist() == [(one[2] != before).sum()]
        if rule in ("gain", "contribution") and not momentum:
            v = one[0].long().t() @ one[1].long()
            assert (v * (one[2][0].long() - before[0].long()) <= 0).all()


# The kernel

# T, out, in; rule; bits, ortho_tile, topk_tile, step_size
CASES = [
    (1, 1, 7, UpdateRule("gain", 1, 128, 64)),
    (130, 33, 65, UpdateRule("gain", 8, 128, 64, step_size=3)),
    (63, 33, 1, UpdateRule("gain", 2, 128, 32)),
    (65, 65, 7, UpdateRule("gain", 6, 128, 128)),
    (130, 63, 63, UpdateRule("contribution", 6, 128, 64)),
    (7, 7, 65, UpdateRule("contribution", 8, 128, 32)),
    (65, 63, 65, UpdateRule("spectral", 6, 64, 64)),
    (33, 33, 7, UpdateRule("spectral", 2, 64, 32)),
    (200, 65, 130, UpdateRule("spectral", 6, 128, 64)),
    (7, 130, 63, UpdateRule("spectral", 8, 128, 128)),
]


@kernel_test
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tokens, out, inner, rule", CASES, ids=lambda value: getattr(value, "rule", str(value)))
def test_kernel_learns_as_two_kernels(tokens, out, inner, rule, momentum, device):
    """The same bits under every rule, spectral too; nothing is written outside."""
    rule = replace(rule, momentum=momentum)
    two = case(tokens, out, inner, rule, device)
    before = two[2].clone()
    one, bands = list(two[:2]), []
    for tensor in two[2:]:
        inside, pair = (None, ()) if tensor is None else fenced(tensor)
        one.append(inside)
        bands += [pair] if pair else []
    flips = learned(tuple(one), rule)
    assert torch.equal(voted_and_flipped(two, rule), flips) and equal(tuple(one), two) and unharmed(*bands)
    assert flips.device.type == device.type and flips.tolist() == [(one[2] != before).sum()]


@kernel_test
@pytest.mark.parametrize("rule", ["gain", "contribution", "balanced"])
def test_kernel_against_the_reference(rule, device):
    """Across backends; no cast of votes to float may differ."""
    settings = UpdateRule(rule, 6, momentum=0.8)
    theirs = case(65, 33, 130, settings)
    mine = copied(theirs, device)
    with torch_backend():
        expected = learned(theirs, settings)
    assert torch.equal(learned(mine, settings).cpu(), expected) and expected > 0
    # balanced divides by norms, whose sums depend on the device
    assert (mine[2].cpu() != theirs[2]).sum() <= (0.01 * expected if rule == "balanced" else 0)
    assert equal(mine[3:], theirs[3:])


@kernel_test
@pytest.mark.parametrize("k", [0.0, 1.0])
def test_none_and_all(k, device):
    rule = UpdateRule("gain", momentum=0.9)
    theirs = case(7, 33, 63, rule)
    mine, before = copied(theirs, device), theirs[2].clone()
    with torch_backend():
        expected = learned(theirs, rule, k)
    assert torch.equal(learned(mine, rule, k).cpu(), expected) and equal(mine, theirs)
    assert (k > 0) or torch.equal(mine[2].cpu(), before)


@kernel_test
@layouts
def test_any_layout(layout, device):
    rule = UpdateRule("gain")
    d, x, weight, *kept = case(65, 33, 63, rule, device)
    expected = weight.clone()
    flips = voted_and_flipped((d, x, expected, *kept), rule)
    right = LAYOUTS[(LAYOUTS.index(layout) + 1) % len(LAYOUTS)]
    assert torch.equal(learned((layout(d), right(x), weight, *kept), rule), flips) and torch.equal(weight, expected)


@kernel_test
def test_operands_stay_as_they_are(device):
    rule = UpdateRule("gain", momentum=0.9)
    d, x, *rest = case(65, 33, 63, rule, device)
    d, x = inner_block(d), inner_block(x)
    before = d._base.clone(), x._base.clone()
    learned((d, x, *rest), rule)
    assert torch.equal(d._base, before[0]) and torch.equal(x._base, before[1])


@kernel_test
@pytest.mark.parametrize("value", [127, -127])
def test_longest_sum(value, device, monkeypatch):
    """All products of one sign over as many tokens as int32 holds: sums past 2^24 stay exact."""
    if INTERPRETED:
        longer = {"TOKENS": 2048, "num_warps": 4, "num_stages": 2}  # fewer and longer steps through the operands
        monkeypatch.setattr(module, "launch_of", lambda side: longer)
    d = torch.full((MAX_REDUCTION, 2), value, dtype=torch.int8, device=device)
    x = torch.full((MAX_REDUCTION, 3), 127, dtype=torch.int8, device=device)
    x[-1, 1] = 126
    w = torch.zeros(1, 2, 3, dtype=torch.int8, device=device)
    assert learned((d, x, w, None, None), UpdateRule("gain", topk_tile=32), 2 / 3).item() == 4
    assert torch.equal(w[0], torch.tensor([[1, 0, 1]] * 2, dtype=torch.int8, device=device) * (-1 if value > 0 else 1))


@kernel_test
def test_more_tokens_than_int32_holds_vote_in_memory(device, monkeypatch):
    for name in ("kernels.learn", "kernels.votes"):
        monkeypatch.setattr(f"{name}.MAX_REDUCTION", 100)
    monkeypatch.setattr("kernels.votes.TOKENS_SUMMED", 96)
    rule = UpdateRule("contribution", momentum=0.9)
    for tokens in (100, 101, 200):
        theirs = case(tokens, 7, 33, rule)
        mine = copied(theirs, device)
        with torch_backend():
            expected = learned(theirs, rule)
        assert torch.equal(learned(mine, rule).cpu(), expected) and equal(mine, theirs)


@kernel_test
@pytest.mark.parametrize("rule", [
    UpdateRule("balanced"), UpdateRule("spectral", ortho_tile=0), UpdateRule("gain", topk_tile=0),
    UpdateRule("gain", flip_prob="score"),
], ids=lambda rule: f"{rule.rule}-{rule.topk_tile}-{rule.flip_prob}")  # fmt: skip
def test_what_the_kernel_does_not_do_goes_through_votes(rule, device):
    rule = replace(rule, momentum=0.9)
    one = case(65, 33, 63, rule, device)
    two = copied(one, device)
    assert torch.equal(learned(one, rule), voted_and_flipped(two, rule)) and equal(one, two)


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
@pytest.mark.parametrize("rule", [UpdateRule("gain", momentum=0.9), UpdateRule("balanced", momentum=0.9)],
                         ids=lambda rule: rule.rule)  # fmt: skip
def test_nothing_changes_at_a_stop(rule, where, device):
    backend.use("torch" if where == "torch" else "triton")
    tensors = case(7, 33, 63, rule, device)
    before = copied(tensors, device)
    assert learned(tensors, rule, 1.0, stop=1.0).tolist() == [0] and equal(tensors, before)


@kernel_test
def test_twice_is_the_same(device):
    rule = UpdateRule("spectral", ortho_tile=64, momentum=0.9)
    first = case(130, 65, 63, rule, device)
    second = copied(first, device)
    assert torch.equal(learned(first, rule), learned(second, rule)) and equal(first, second)


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
def test_refusals(where, device):
    backend.use("torch" if where == "torch" else "triton")
    rule = UpdateRule("gain")
    d, x, weight, *kept = case(5, 3, 4, rule, device)
    for operands, message in (
        ((d[:0], x[:0]), "0 rows of delta and 0 of activations; they must agree, and not be 0"),
        ((d, x[:4]), "5 rows of delta and 4 of activations"),
        ((x, d), r"votes \(1, 4, 3\) for a weight \(1, 3, 4\); they must agree"),
        ((d.float(), x), "delta torch.float32 and activations torch.int8; both must be int8"),
        ((d, x.int()), "both must be int8"),
    ):
        with pytest.raises(ValueError, match=message):
            learned((*operands, weight, *kept), rule)
    with pytest.raises(ValueError, match="its buffer or its scales are missing"):
        learned((d, x, weight, None, None), replace(rule, momentum=0.9))
    with pytest.raises(ValueError, match=r"votes \(1, 3, 4\) for a weight \(3, 3, 4\)"):  # a stack has no one X
        learned((d, x, weight.expand(3, 3, 4).contiguous(), *kept), rule)


# In the backward pass


def backward_arguments(tensors: Case, rule: UpdateRule, operand: Tensor, used: bool = False) -> tuple:
    """Of `learn_in_backward`, for one weight (out, in) as a layer has it."""
    d, _, weight, stored, scale = tensors
    device = weight.device
    flips = torch.full((1,), 40, device=device)
    kept = (None, None) if stored is None else (stored[0], scale[0])
    return (
        d, operand, weight[0], some_rng(device), share(0.3, device), torch.zeros((), device=device),
        some_layers(1, device), flips, torch.tensor(used), *kept, rule.rule, rule.bits, rule.ortho_tile,
        rule.topk_tile, rule.momentum, rule.step_size, rule.flip_prob, rule.flip_gamma,
    )  # fmt: skip


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
@pytest.mark.parametrize("rule", [
    UpdateRule("gain", 6, momentum=0.9), UpdateRule("contribution", 8, topk_tile=32, step_size=2),
    UpdateRule("balanced", 6, momentum=0.9), UpdateRule("gain", topk_tile=0, flip_prob="score", flip_gamma=0.5),
], ids=lambda rule: f"{rule.rule}-{rule.topk_tile}")  # fmt: skip
def test_in_the_backward_pass(rule, where, device):
    """What `learn` does, its flips added to those made before, and a mark that it was done."""
    backend.use("torch" if where == "torch" else "triton")
    one = case(65, 33, 63, rule, device)
    two = copied(one, device)
    arguments = backward_arguments(one, rule, one[1])
    assert learn_in_backward(*arguments) is None
    flips, used = arguments[7:9]
    assert torch.equal(learned(two, rule) + 40, flips) and equal(one, two) and used.item() and flips > 40
    assert arguments[3].tolist() == some_rng().tolist()


@kernel_test
@pytest.mark.parametrize("where", ["kernel", "torch"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_embedding_in_the_backward_pass(momentum, where, device):
    """Its operand are tokens, whose rows of delta are summed."""
    backend.use("torch" if where == "torch" else "triton")
    rule = UpdateRule("gain", momentum=momentum)
    _, d, weight, *kept = case(65, 19, 33, rule, device)  # D int8 (65, 33) for a table of 19 rows
    tokens = torch.randint(0, 19, (65,), generator=generator(1)).to(device)
    one = d, None, weight, *kept
    two = copied(one, device)
    arguments = backward_arguments(one, rule, tokens)
    learn_in_backward(*arguments)
    votes = torch.zeros(1, 19, 33, dtype=torch.int32, device=device)
    accumulate_embedding_votes(d, tokens, votes[0])
    expected = flip(
        votes, two[2], share(0.3, device), some_rng(device), some_layers(1, device), torch.zeros((), device=device),
        rule, *two[3:],
    )  # fmt: skip
    assert torch.equal(arguments[7], expected + 40) and equal(one[2:], two[2:]) and expected > 0


@kernel_test
def test_a_second_use_is_refused_and_changes_nothing(device):
    rule = UpdateRule("gain", momentum=0.9)
    tensors = case(7, 33, 63, rule, device)
    before = copied(tensors, device)
    arguments = backward_arguments(tensors, rule, tensors[1], used=True)
    with pytest.raises(ValueError, match='used twice in one step with update = "backward".* take update = "step"'):
        learn_in_backward(*arguments)
    assert equal(tensors, before) and arguments[7].item() == 40
    once = backward_arguments(tensors, rule, tensors[1])
    learn_in_backward(*once)
    with pytest.raises(ValueError, match="used twice in one step"):
        learn_in_backward(*once)


@kernel_test
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_as_a_torch_operator(momentum, device):
    rule = UpdateRule("gain", momentum=momentum)
    tensors = case(13, 7, 33, rule, device)
    torch.library.opcheck(torch.ops.nanogft.learn_in_backward, backward_arguments(tensors, rule, tensors[1]))

    mine, theirs = copied(tensors, device), copied(tensors, device)
    after, expected = (backward_arguments(t, rule, t[1]) for t in (mine, theirs))
    opaque(learn_in_backward)(*after)
    learn_in_backward(*expected)
    assert equal(mine, theirs) and torch.equal(after[7], expected[7]) and after[8].item()
