"""gft/optimizer.py: which weights move, how far, how many; what is kept; what torch's users do with an optimizer."""

import copy
import itertools
import math

import pytest
import torch
from no_reads import NothingIsRead
from torch import nn
from torch.optim import lr_scheduler as schedulers

from gft.layers import Delta, IntEmbedding, IntLinear, int_layers
from gft.optimizer import FlipOptimizer
from kernels.limits import MAX_REDUCTION
from kernels.philox import Stream, uniform

Q = {1: 1, 2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}
VOCAB = 11
DELAYED = Delta(scale="delayed")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_net(bits: int = 6, delta: Delta = Delta(), seed: int = 1, width: int = 70) -> nn.Sequential:
    """An embedding and two matrices, larger than a tile of 64."""
    settings = {"bits": bits, "keep_bits": bits, "delta": delta, "seed": seed}
    return nn.Sequential(
        IntEmbedding(VOCAB, 12, index=0, **settings),
        IntLinear(12, width, index=1, **settings),
        IntLinear(width, VOCAB, squared_relu=True, index=2, **settings),
    )


def blocks_net(delta: Delta) -> nn.Sequential:
    """An embedding and matrices of which each second one has the same shape, as blocks of a transformer have."""
    shapes = [(12, 20), (20, 12), (12, 20), (20, VOCAB)]
    linears = [IntLinear(*shape, index=1 + i, delta=delta, seed=1) for i, shape in enumerate(shapes)]
    return nn.Sequential(IntEmbedding(VOCAB, 12, index=0, delta=delta, seed=1), *linears)


def optimizer(net: nn.Module, lr: float | torch.Tensor = 0.3, embedding_rule="gain", **settings) -> FlipOptimizer:
    """One with the embedding in a group of its own, as train.py makes it."""
    groups = [{"params": [net[0].weight], "rule": embedding_rule}, {"params": [layer.weight for layer in net[1:]]}]
    return FlipOptimizer(groups, lr, **{"ortho_tile": 64} | settings)


def falling(opt: FlipOptimizer, steps: int) -> schedulers.LRScheduler:
    return schedulers.LinearLR(opt, 1.0, 0.0, total_iters=steps)


def tokens_of(step: int, count: int = 16) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=generator(step))


def loss_of(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of predicting 3 t + 1 mod VOCAB."""
    return nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % VOCAB, reduction="sum")


def train(
    net: nn.Module, opt: FlipOptimizer, first: int, last: int, scheduler=None, parts: list[int] | None = None
) -> list[int]:
    """Steps on batches that depend on the step alone, in micro-batches of the sizes `parts`; the flips of each."""
    flips = []
    for step in range(first, last):
        before = int(opt.flips())
        for part in tokens_of(step).split(parts or [16]):
            loss_of(net, part).backward()
        opt.step()
        flips.append(int(opt.flips()) - before)
        if scheduler:
            scheduler.step()
    return flips


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [layer.weight.clone() for layer in int_layers(net)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Every value of a setting occurs, each rule with both values of every other setting.
COVER = [
    # bits, rule, topk_tile, ortho_tile, step_size, momentum, flip_prob, delta
    (1, "contribution", 64, 0, 1, 0, "one", "int8"),
    (1, "spectral", 0, 64, 3, 0.9, "score", "sign"),
    (2, "gain", 0, 64, 3, 0.9, "one", "sign"),
    (2, "balanced", 64, 0, 1, 0, "score", "int8"),
    (3, "spectral", 64, 64, 3, 0, "one", "sign"),
    (3, "contribution", 0, 64, 3, 0.9, "score", "sign"),
    (4, "balanced", 0, 64, 3, 0.9, "one", "sign"),
    (5, "gain", 64, 0, 1, 0, "score", "int8"),
    (6, "spectral", 64, 0, 1, 0.9, "one", "int8"),
    (7, "contribution", 64, 64, 3, 0, "one", "int8"),
    (8, "gain", 64, 64, 3, 0, "one", "int8"),
    (8, "spectral", 0, 0, 3, 0, "score", "int8"),
    (8, "balanced", 64, 64, 1, 0.9, "one", "int8"),
]


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("bits, rule, topk, ortho, size, momentum, prob, delta", COVER, ids=lambda v: str(v))
def test_weights_stay_on_their_grid(bits, rule, topk, ortho, size, momentum, prob, delta, update):
    """Wherever they start, weights stay integers in [-Q, Q] and none moves further than the step size."""
    net, q, unit = tiny_net(bits, Delta(delta)), Q[bits], 2 if bits == 1 else 1
    for index, layer in enumerate(net):
        layer.weight.copy_(torch.where(torch.rand(layer.weight.shape, generator=generator(index)) < 0.5, -q, q))
    opt = optimizer(
        net, 0.5, rule, rule=rule, topk_tile=topk, ortho_tile=ortho, step_size=size, momentum=momentum, flip_prob=prob,
        update=update,
    )  # fmt: skip
    for step in range(6):
        before = weights(net)
        (flips,) = train(net, opt, step, step + 1)
        changes = [a.int() - b.int() for a, b in zip(weights(net), before, strict=True)]
        assert all(w.dtype == torch.int8 and w.abs().max() <= q for w in weights(net))
        assert max(int(c.abs().max()) for c in changes) <= unit * size
        assert flips == sum(int((c != 0).sum()) for c in changes) > 0, "every flip counted moves its weight"
        if bits == 1:
            assert all((w != 0).all() for w in weights(net))


@pytest.mark.parametrize("rule", ["contribution", "gain", "balanced", "spectral"])
def test_moves_go_against_the_votes(rule):
    """One step lowers sum(V W), the first-order loss; under all rules but spectral, weight by weight."""
    net = tiny_net()
    opt = optimizer(net, 0.2, rule, rule=rule)
    loss_of(net, tokens_of(0)).backward()
    votes, before = [layer.votes.long() for layer in net], weights(net)
    opt.step()
    for v, old, new in zip(votes, before, weights(net), strict=True):
        change = new.long() - old.long()
        assert (v * change).sum() < 0
        if rule != "spectral":
            assert (v * change <= 0).all() and (v[change != 0] != 0).all()
        if rule == "contribution":
            moved = (change != 0) & (old != 0)
            assert (new[moved].abs() < old[moved].abs()).all() and moved.any(), "weights only shrink; zeros may leave"


def test_a_group_learns_by_a_rule_of_its_own():
    ends = {}
    for rules in (("spectral", "gain"), ("gain", "gain"), ("spectral", "spectral")):
        net = tiny_net()
        train(net, optimizer(net, 0.2, rules[1], rule=rules[0]), 0, 1)
        ends[rules] = weights(net)
    mixed, gain, spectral = ends.values()
    assert torch.equal(mixed[0], gain[0]) and not torch.equal(gain[0], spectral[0]) and not same(mixed[1:], gain[1:])


def expected_step(weight, votes, q, unit, width, k, u, side):
    """The gain rule told in loops: tiles row by row, legal moves by |V|, lower index first. Returns W, flips."""
    rows, columns = weight.shape
    side_r, side_c = (side, side) if side else (rows, columns)
    new, flips, tile = weight.clone(), 0, 0
    for top, left in itertools.product(range(0, rows, side_r), range(0, columns, side_c)):
        rows_here, columns_here = range(top, min(top + side_r, rows)), range(left, min(left + side_c, columns))
        cells = list(itertools.product(rows_here, columns_here))
        legal = []
        for place, (r, c) in enumerate(cells):
            v, w = int(votes[r, c]), int(weight[r, c])
            direction = (v < 0) - (v > 0)
            if v and -q <= w + unit * direction <= q:
                legal.append((-abs(v), place, r, c, direction))
        for _, _, r, c, direction in sorted(legal)[: math.floor(k * len(cells) + float(u[tile]))]:
            new[r, c] = max(-q, min(q, int(weight[r, c]) + width * direction))
            flips += 1
        tile += 1
    return new, flips


@pytest.mark.parametrize("k", [0.0, 0.01, 0.3, 1.0], ids=lambda k: f"k{k}")
@pytest.mark.parametrize("side", [0, 4, 64])
@pytest.mark.parametrize("bits, size", [(1, 1), (1, 3), (2, 1), (3, 3), (8, 1)], ids=lambda v: str(v))
def test_gain_against_brute_force(bits, size, side, k):
    """Rows of +-1 make every X +-21, so votes of a sign delta tie often and are often zero; many moves are illegal."""
    layer = IntLinear(10, 7, bits, seed=9, delta=Delta("sign"), keep_bits=bits)
    q = Q[bits]
    at_limit = torch.rand(7, 10, generator=generator(1)) < 0.7
    layer.weight.copy_(torch.where(at_limit, layer.weight.sign() * q, layer.weight))
    opt = FlipOptimizer(layer.parameters(), k, rule="gain", topk_tile=side)
    ties = False
    for step, moves in enumerate((size, (2 * size + 2) // 3, 1)):
        opt.param_groups[0]["step_size"] = moves
        x = torch.where(torch.rand(5, 10, generator=generator(step)) < 0.5, -1.0, 1.0)
        layer(x).backward(torch.randint(-1, 2, (5, 7), generator=generator(step + 50)).float())
        votes, before, flips_before = layer.votes.clone(), layer.weight.clone(), int(opt.flips())
        tiles = math.ceil(7 / side) * math.ceil(10 / side) if side else 1
        u = uniform(9, step, Stream.TOPK, tiles)
        unit = 2 if bits == 1 else 1
        wanted, flips = expected_step(before, votes, q, unit, unit * moves, k, u, side)
        opt.step()
        assert int(opt.flips()) - flips_before == flips and torch.equal(layer.weight, wanted)
        ties |= votes.abs().unique().numel() < votes.numel() / 4 and bool((votes == 0).any())
    assert ties


@pytest.mark.parametrize("rule", ["gain", "balanced", "spectral"])
def test_count_of_every_tile_is_exact(rule):
    """floor(k n + u) flips in a tile of n weights, ragged ones included, wherever as many moves are legal."""
    layer = IntLinear(150, 70, seed=4)
    opt = FlipOptimizer(layer.parameters(), 0.0123, rule=rule, ortho_tile=64)
    for step in range(4):
        before = layer.weight.clone()
        x, delta = torch.randn(8, 150, generator=generator(step)), torch.randn(8, 70, generator=generator(step + 9))
        layer(x).backward(delta)
        opt.step()
        u = uniform(4, step, Stream.TOPK, 6)
        changed = layer.weight != before
        for tile, (r, c) in enumerate(itertools.product((0, 64), (0, 64, 128))):
            part = changed[r : r + 64, c : c + 64]
            assert part.sum() == math.floor(0.0123 * part.numel() + float(u[tile]))


def test_small_k_is_right_on_average():
    layer = IntLinear(16, 16)
    opt = FlipOptimizer(layer.parameters(), 0.3 / 256, rule="gain")
    flips = []
    for step in range(200):
        layer(torch.randn(2, 16, generator=generator(step))).backward(torch.randn(2, 16, generator=generator(step + 1)))
        opt.step()
        flips.append(int(opt.flips()) - sum(flips))
    assert set(flips) == {0, 1} and 40 <= sum(flips) <= 80


@pytest.mark.parametrize("lr", [0.4, torch.tensor(0.4, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_linear_lr_drives_k_to_zero(lr, update):
    net = tiny_net()
    opt = optimizer(net, lr.clone() if isinstance(lr, torch.Tensor) else lr, rule="gain", update=update)
    flips = train(net, opt, 0, 12, falling(opt, 10))
    n = sum(w.numel() for w in weights(net))
    assert flips[0] == pytest.approx(0.4 * n, rel=0.01) and flips[5] == pytest.approx(0.2 * n, rel=0.01)
    assert all(a > b for a, b in zip(flips[:10], flips[1:10], strict=False))
    assert flips[10:] == [0, 0]


def test_lr_as_a_tensor_moves_the_same_weights():
    ends = []
    for lr in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        net = tiny_net()
        opt = optimizer(net, lr)
        train(net, opt, 0, 4, falling(opt, 8))
        ends.append((weights(net), [float(group["lr"]) for group in opt.param_groups]))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == pytest.approx(ends[1][1])


@pytest.mark.parametrize("scheduler", [
    lambda opt: schedulers.CosineAnnealingLR(opt, 4), lambda opt: schedulers.StepLR(opt, 1, 0.5),
    lambda opt: schedulers.LambdaLR(opt, [lambda step: 1 - step / 4, lambda step: 0.0]),
], ids=["cosine", "step", "lambda"])  # fmt: skip
def test_other_schedulers_of_torch(scheduler):
    net = tiny_net()
    opt = optimizer(net, 0.4, rule="gain")
    found = scheduler(opt)
    for step in range(3):
        n = [w.numel() for w in weights(net)]
        wanted = [group["lr"] * count for group, count in zip(opt.param_groups, (n[0], sum(n[1:])), strict=True)]
        assert train(net, opt, step, step + 1, found)[0] == pytest.approx(sum(wanted), abs=5)
    assert opt.param_groups[0]["lr"] < 0.4


def test_flip_prob_score_follows_its_exponent():
    """Of the selected weights each flips with p = (|S| / largest)^gamma: the largest always does."""
    share = {}
    for prob, gamma in (("one", 1.0), ("score", 1.0), ("score", 4.0)):
        layer = IntLinear(64, 64, bits=8, init_std=0.1)
        opt = FlipOptimizer(layer.parameters(), 1.0, rule="gain", flip_prob=prob, flip_gamma=gamma)
        layer(torch.randn(8, 64, generator=generator(1))).backward(torch.randn(8, 64, generator=generator(2)))
        votes, before = layer.votes.double(), layer.weight.clone()
        p = (votes.abs() / votes.abs().max()) ** gamma if prob == "score" else (votes != 0).double()
        opt.step()
        flips = int(opt.flips())
        assert abs(flips - p.sum()) <= 4 * (p * (1 - p)).sum() ** 0.5
        assert (layer.weight != before)[votes.abs() == votes.abs().max()].all()
        share[prob, gamma] = flips / votes.numel()
    assert share["one", 1.0] > 0.95 > 2 * share["score", 1.0] > 4 * share["score", 4.0] > 0


@pytest.mark.parametrize("update", ["step", "backward"])
def test_momentum_can_be_raised_from_zero_and_lowered_to_it_later(update):
    net = tiny_net()
    opt = optimizer(net, update=update)
    train(net, opt, 0, 1)
    for group in opt.param_groups:
        group["momentum"] = 0.9
    opt.settings_changed()
    train(net, opt, 1, 2)
    assert all(opt.state[w]["momentum"].any() for w in net.parameters())
    for group in opt.param_groups:
        group["momentum"] = 0.0
    opt.settings_changed()
    train(net, opt, 2, 3)
    assert not any("momentum" in opt.state[w] for w in net.parameters())
    optimizer(tiny_net(), update=update).load_state_dict(opt.state_dict())


def test_momentum_repeats_past_votes():
    """After one vote, a step of no delta still moves weights the way the momentum says, which fades by its decay."""
    layer = IntLinear(32, 32, bits=8)
    opt = FlipOptimizer(layer.parameters(), 1.0, rule="gain", momentum=0.5)
    layer(torch.randn(64, 32, generator=generator(1))).backward(torch.randn(64, 32, generator=generator(2)))
    votes = layer.votes.clone()
    opt.step()
    stored, scale = opt.state[layer.weight]["momentum"], opt.state[layer.weight]["momentum_scale"]
    assert stored.dtype == torch.int8 and stored.abs().max() == 127
    assert ((stored * scale.view(1, 1)) - votes).abs().max() <= scale.item() * 1.001, "M = V after the first step"
    assert scale.item() == pytest.approx(votes.abs().max().item() / 127)
    before = layer.weight.clone()
    layer(torch.randn(1, 32, generator=generator(3))).backward(torch.zeros(1, 32))
    opt.step()
    sure = (before.abs() < 127) & (votes.abs() > 2 * scale.item())
    assert torch.equal((layer.weight.int() - before)[sure].sign(), -votes[sure].sign())
    assert scale.item() == pytest.approx(votes.abs().max().item() / 127 * 0.5, rel=0.01)


# What is kept, and what is not


@pytest.mark.parametrize("update, tokens, each", [("step", 100, 4), ("step", 10**6, 8), ("backward", 100, 0)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("delta, floats", [(Delta(), 0), (DELAYED, 17)], ids=["step", "delayed"])
def test_no_hidden_floats(update, tokens, each, momentum, delta, floats):
    """After a step: no float per weight anywhere, no state or one byte a weight, votes of 4, 8 or no bytes a weight."""
    net = tiny_net(delta=delta)
    n = sum(w.numel() for w in weights(net))
    opt = optimizer(net, momentum=momentum, update=update, max_tokens=tokens)
    train(net, opt, 0, 2)
    assert opt.votes_bytes() == each * n
    assert not any(p.is_floating_point() or p.grad is not None for p in net.parameters())
    held = [t for state in opt.state.values() for name, t in state.items() if name != "rng"]
    state = [t for t in held if t.dtype == torch.int8]
    assert sum(t.nbytes for t in state) == (n if momentum else 0)
    # 1 + 2 + 2 scales of 64 x 64 momentum tiles
    assert sum(t.numel() for t in held if t.is_floating_point() and t.dim() and len(t) != 17) == (5 if momentum else 0)
    buffers = sum(b.numel() for b in net.buffers() if b.is_floating_point())
    assert buffers == 3 * (2 + floats), "a scale, a votes_scale and a delayed history for each layer"


@pytest.mark.parametrize("max_tokens, dtype", [(MAX_REDUCTION, torch.int32), (MAX_REDUCTION + 1, torch.int64)])
def test_votes_are_wide_where_a_step_has_many_tokens(max_tokens, dtype):
    net = tiny_net()
    opt = optimizer(net, max_tokens=max_tokens)
    assert {layer.votes.dtype for layer in net} == {dtype}
    narrow = tiny_net()
    train(net, opt, 0, 3)
    train(narrow, optimizer(narrow), 0, 3)
    assert same(weights(net), weights(narrow))


def test_votes_past_int32_are_exact():
    """140,000 tokens of about 127 * 127 in two micro-batches; without `max_tokens` one pass of as many is refused."""
    half = 70_000
    layer, twin = (IntLinear(2, 2, act_range=1.0, index=0) for _ in range(2))
    x, delta = torch.ones(half, 2), torch.tensor([1.0, -1.0]).expand(half, 2)
    opt = FlipOptimizer(layer.parameters(), rule="gain", max_tokens=2 * half)
    wanted, before = torch.zeros(2, 2, dtype=torch.int64), layer.weight.clone()
    for part in range(2):
        layer(x).backward(delta)
        FlipOptimizer(twin.parameters(), rule="gain")  # an int32 buffer of zeros
        twin.rng[2] = part * half
        twin(x).backward(delta)
        wanted += twin.votes
    assert torch.equal(layer.votes, wanted) and wanted.abs().min() > 2**31
    opt.step()
    assert ((layer.weight.int() - before).sign() == -wanted.sign())[layer.weight != before].all() and opt.flips() >= 1
    with pytest.raises(ValueError, match=f"{2 * half} rows can overflow int32.*max_tokens={2 * half}"):
        twin(torch.ones(2 * half, 2)).backward(torch.ones(2 * half, 2))


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("delta", [Delta(), DELAYED], ids=["step's scale", "delayed"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resumed_in_the_middle_it_ends_the_same(momentum, delta, update, tmp_path):
    """Through torch.save, as any torch optimizer; a half-voted step is not part of the state."""
    settings = dict(momentum=momentum, flip_prob="score", step_size=2, update=update)
    whole = blocks_net(delta)
    opt = optimizer(whole, **settings)
    scheduler = falling(opt, 8)
    train(whole, opt, 0, 4, scheduler)
    torch.save([part.state_dict() for part in (whole, opt, scheduler)], tmp_path / "saved.pt")
    train(whole, opt, 4, 8, scheduler)

    resumed = blocks_net(delta)
    for layer in resumed:
        layer.weight.zero_()
    late = optimizer(resumed, **settings)
    later = falling(late, 8)
    train(resumed, late, 30, 31)
    if update == "step":
        loss_of(resumed, tokens_of(77)).backward()
    for part, state in zip((resumed, late, later), torch.load(tmp_path / "saved.pt"), strict=True):
        part.load_state_dict(state)
    train(resumed, late, 4, 8, later)
    assert same(weights(whole), weights(resumed)) and not same(weights(whole), weights(blocks_net(delta)))
    ours, theirs = opt.state_dict(), late.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in ours["state"].items():
        assert state.keys() == theirs["state"][number].keys()
        assert all(torch.equal(t, theirs["state"][number][name]) for name, t in state.items())


def test_a_state_dict_is_as_torchs():
    opt = optimizer(tiny_net(delta=DELAYED), momentum=0.9)
    state = opt.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0], [1, 2]]
    assert [group["rule"] for group in state["param_groups"]] == ["gain", "spectral"]
    assert set(state["state"][2]) == {"momentum", "momentum_scale", "rng", "delta_history"}
    assert set(optimizer(tiny_net()).state_dict()["state"][0]) == {"rng"}


def test_two_runs_are_equal_and_another_seed_is_not():
    def final(seed):
        net = tiny_net(seed=seed)
        start = tiny_net(seed=1).state_dict()
        net.load_state_dict(start)  # the same weights: only the noise differs
        train(net, optimizer(net, momentum=0.9, flip_prob="score"), 0, 4)
        return weights(net)

    assert same(final(1), final(1)) and not same(final(1), final(2))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("delta", [Delta(), DELAYED], ids=["step", "delayed"])
def test_zero_grad_drops_votes_their_place_in_the_random_stream_and_their_scale(set_to_none, delta):
    ends = []
    for detour in (False, True):
        net = tiny_net(delta=delta)
        opt = optimizer(net)
        train(net, opt, 0, 1)
        if detour:
            (100 * loss_of(net, tokens_of(77))).backward()
            assert all(layer.votes.any() and layer.rng[2] > 0 for layer in net)
            opt.zero_grad(set_to_none)
            assert not any(layer.votes.any() or layer.votes_scale or layer.rng[2] for layer in net)
        train(net, opt, 1, 4)
        ends.append(weights(net))
    assert same(*ends)


def test_step_drops_the_votes_it_used_and_momentum_goes_on_without_any():
    """As torch's SGD does where a gradient is zero."""
    net = tiny_net()
    opt = optimizer(net, momentum=0.9)
    train(net, opt, 0, 1)
    assert not any(layer.votes.any() for layer in net)
    before, scales = weights(net), [opt.state[layer.weight]["momentum_scale"].clone() for layer in net]
    opt.step()
    assert all(layer.rng.tolist() == [1, 2, 0] for layer in net)
    assert not any(map(torch.equal, before, weights(net)))
    for layer, scale in zip(net, scales, strict=True):
        torch.testing.assert_close(opt.state[layer.weight]["momentum_scale"], 0.9 * scale)


def test_without_momentum_a_step_without_votes_moves_nothing():
    net = tiny_net()
    opt = optimizer(net)
    before = weights(net)
    opt.step()
    assert same(before, weights(net)) and opt.flips() == 0


def test_a_delayed_scale_that_has_seen_no_delta_still_carries_one():
    """A layer first used after step 0 measures then, and hands delta on to what is in front of it."""
    layer = IntLinear(8, 4, delta=DELAYED)
    opt = FlipOptimizer(layer.parameters())
    opt.step()
    x = torch.randn(6, 8, generator=generator(0)).requires_grad_()
    layer(x).backward(torch.randn(6, 4, generator=generator(1)))
    assert (x.grad != 0).any()


def test_a_vote_of_a_nan_does_not_stay_in_a_delayed_scale():
    layer = IntLinear(8, 4, delta=DELAYED)
    opt = FlipOptimizer(layer.parameters())
    for delta in (torch.ones(3, 4), torch.full((3, 4), math.nan), torch.ones(3, 4)):
        layer(torch.randn(3, 8, generator=generator(0))).backward(delta)
        opt.step()
    assert layer.delta_history.isfinite().all() and layer.delta_history.max() == 1


# Two ways to update


def ending(update: str, compile: str | None, delta: Delta = Delta(), parts: list[int] | None = None, **settings):
    """Weights, momenta and flips after four steps; `compile` names a backend of torch.compile."""
    torch._dynamo.reset()
    net = tiny_net(delta=delta)
    opt = optimizer(net, 0.3, update=update, **settings)
    call = torch.compile(net, backend=compile, fullgraph=True, dynamic=False) if compile else net
    flips = train(call, opt, 0, 4, falling(opt, 8), parts)
    state = [t for w in net.parameters() for t in opt.state[w].values()]
    return weights(net), [t.clone() for t in state], flips


def assert_same_end(a: tuple, b: tuple) -> None:
    assert same(a[0], b[0]) and same(a[1], b[1]) and a[2] == b[2] and sum(a[2][1:]) > 100


COMPILED = "aot_eager"
WAYS = [
    {}, {"momentum": 0.9}, {"rule": "gain", "momentum": 0.9}, {"rule": "contribution"},
    {"rule": "balanced", "momentum": 0.5}, {"topk_tile": 0, "ortho_tile": 0}, {"step_size": 2, "flip_prob": "score"},
    {"delta": DELAYED, "momentum": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_moves_in_the_backward_pass_are_those_of_the_step(settings):
    assert_same_end(ending("step", None, **settings), ending("backward", None, **settings))


def test_compiled_in_one_graph_both_ways_to_update_move_as_written():
    plain = ending("step", None, momentum=0.9)
    for update in ("step", "backward"):
        assert_same_end(plain, ending(update, COMPILED, momentum=0.9))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_micro_batches_with_a_delayed_scale_are_one_batch(momentum):
    """Votes of embedding and matrices, summed over passes of different sizes; the first step only measures."""
    whole = ending("step", None, DELAYED, momentum=momentum)
    assert whole[2][0] == 0
    for parts in ([8, 8], [1] * 16, [3, 13]):
        assert_same_end(whole, ending("step", None, DELAYED, parts, momentum=momentum))


def test_compiled_micro_batches_with_a_delayed_scale_are_one_batch():
    whole = ending("step", None, DELAYED, momentum=0.9)
    assert_same_end(whole, ending("step", COMPILED, DELAYED, [8, 8], momentum=0.9))


def twice(layer: nn.Module):
    return lambda x: layer(x) + layer(torch.relu(x))


@pytest.mark.parametrize("compile", [None, COMPILED])
def test_a_layer_used_twice_is_refused_where_its_weight_moves_in_the_backward_pass(compile):
    """It would move after its first use. The next steps work again."""
    torch._dynamo.reset()
    layer = IntLinear(8, 8)
    opt = FlipOptimizer(layer.parameters(), rule="gain", update="backward")
    call = torch.compile(twice(layer), backend=compile, fullgraph=True) if compile else twice(layer)
    x = torch.randn(6, 8, generator=generator(0))
    with pytest.raises(ValueError, match='used twice in one step with update = "backward".*update = "step"'):
        call(x).sum().backward()
    opt.zero_grad()
    layer(x).sum().backward()
    with pytest.raises(ValueError, match="used twice in one step"):
        layer(x).sum().backward()  # a second micro-batch
    opt.step()
    layer(x).sum().backward()


@pytest.mark.parametrize("compile", [None, COMPILED])
def test_a_layer_used_twice_votes_twice_at_the_step(compile):
    torch._dynamo.reset()
    layer = IntLinear(8, 8, index=0)
    FlipOptimizer(layer.parameters(), rule="gain")
    x = torch.randn(6, 8, generator=generator(0))
    (torch.compile(twice(layer), backend=compile, fullgraph=True) if compile else twice(layer))(x).backward(x)
    both = IntLinear(8, 8, index=0)
    FlipOptimizer(both.parameters(), rule="gain")
    for each in (torch.relu(x), x):  # in the order of the backward passes
        both(each).backward(x)
    assert layer.rng[2] == both.rng[2] == 12
    assert torch.equal(layer.votes, both.votes) or (layer.votes - both.votes).abs().max() <= 6 * 127


# Steps that must change nothing, and steps that wait for nothing


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_found_inf_stops_weights_momentum_and_delayed_scales(update, backend, request):
    if backend == "triton":
        request.getfixturevalue("on_triton")
    net = tiny_net(delta=DELAYED, width=32)
    opt = optimizer(net, momentum=0.9, update=update, rule="gain")
    train(net, opt, 0, 2)

    def kept():
        state = [t for w in net.parameters() for name, t in opt.state[w].items() if name.startswith("momentum")]
        return [t.clone() for t in (*weights(net), *state, *(layer.delta_history[1:] for layer in net))]

    before, flips = kept(), int(opt.flips())
    opt.found_inf.fill_(1)
    train(net, opt, 2, 3)
    assert same(before, kept()) and int(opt.flips()) == flips
    assert all(layer.votes is None or not layer.votes.any() for layer in net)
    assert all(layer.rng.tolist() == [1, 3, 0] for layer in net)
    opt.found_inf.zero_()
    train(net, opt, 3, 4)
    changed = [not torch.equal(a, b) for a, b in zip(before, kept(), strict=True)]
    assert all(changed[:3]) and all(changed[-3:]) and int(opt.flips()) > flips


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("delta", [None, DELAYED, Delta(kind="sign")], ids=["step", "delayed", "sign"])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_delta_that_is_not_finite_moves_nothing(update, delta, value, backend, request):
    """Its votes would be noise. The next step learns as if nothing had been."""
    if backend == "triton":
        request.getfixturevalue("on_triton")
    net = tiny_net(width=32) if delta is None else tiny_net(delta=delta, width=32)
    opt = optimizer(net, momentum=0.9, update=update, rule="gain")
    train(net, opt, 0, 2)
    before = [t.clone() for t in (*weights(net), *(opt.state[w]["momentum"] for w in net.parameters()))]
    (loss_of(net, tokens_of(2)) * value).backward()
    opt.step()
    after = [*weights(net), *(opt.state[w]["momentum"] for w in net.parameters())]
    assert same(before, after) and not any(layer.votes is not None and layer.votes.any() for layer in net)
    assert opt.stopped != 0
    train(net, opt, 3, 4)
    assert opt.stopped == 0
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], weights(net), strict=True))


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_step_reads_nothing_on_the_host(update, on_triton):
    """Forward, backward, the flag of a bad loss, step and schedule, with kernels as on a GPU."""
    net = tiny_net(delta=DELAYED, width=32)
    opt = optimizer(net, torch.tensor(0.3, dtype=torch.float64), "gain", rule="spectral", momentum=0.9, update=update)
    scheduler, tokens, before = falling(opt, 8), tokens_of(0), weights(net)
    with NothingIsRead():
        for _ in range(2):
            loss = loss_of(net, tokens)
            torch.maximum(opt.found_inf, (~torch.isfinite(loss)).float(), out=opt.found_inf)
            loss.backward()
            opt.step()
            scheduler.step()
            opt.zero_grad()
    assert not any(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))


@pytest.mark.parametrize("read", [
    lambda t: t[0].item(), lambda t: int(t[1]), lambda t: 2 if t[0] else 3, torch.nonzero, lambda t: t[t > 1],
    lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.new_tensor([1, 2]), lambda t: torch.equal(t, t),
], ids=["item", "int", "if", "nonzero", "mask", "tolist", "numpy", "constant", "equal"])  # fmt: skip
def test_the_mode_refuses_to_read(read):
    with NothingIsRead(), pytest.raises(AssertionError):
        read(torch.arange(4))
    read(torch.arange(4))


# As torch's users know an optimizer


def test_param_groups_have_settings_of_their_own():
    """Groups of one optimizer move as optimizers of their own would, but for their place in the random streams."""
    net = tiny_net()
    opt = FlipOptimizer([{"params": net[0].weight, "lr": 0.0}, {"params": net[1].weight, "lr": 1.0, "step_size": 3},
                         {"params": net[2].weight, "momentum": 0.5}], 0.2, rule="gain")  # fmt: skip
    before = weights(net)
    train(net, opt, 0, 1)
    changes = [(a.int() - b).abs() for a, b in zip(weights(net), before, strict=True)]
    assert not changes[0].any() and (changes[1] != 0).float().mean() > 0.8 and changes[1].max() == 3
    assert (changes[2] != 0).float().mean() == pytest.approx(0.2, abs=0.01)
    assert [set(opt.state[layer.weight]) for layer in net] == [set(), set(), {"momentum", "momentum_scale"}]
    opt.param_groups[0]["lr"] = 0.5
    train(net, opt, 1, 2)
    assert not torch.equal(net[0].weight, before[0])


def test_a_group_added_later_is_as_one_given_at_once():
    at_once, later = tiny_net(), tiny_net()
    opt = optimizer(at_once, momentum=0.9)
    late = FlipOptimizer([{"params": [later[0].weight], "rule": "gain"}], 0.3, momentum=0.9, ortho_tile=64)
    assert later[1].votes is None
    late.add_param_group({"params": [layer.weight for layer in later[1:]]})
    assert train(at_once, opt, 0, 3) == train(later, late, 0, 3) and same(weights(at_once), weights(later))


def test_a_group_that_is_refused_is_not_added():
    net = tiny_net()
    opt = FlipOptimizer([net[1].weight], rule="gain")
    front = nn.Linear(3, 3)
    for group in ({"params": [net[2].weight, front.weight]}, {"params": [net[2].weight], "rule": "muon"}):
        with pytest.raises(ValueError, match="number 1 of the group|muon"):
            opt.add_param_group(group)
    assert len(opt.param_groups) == 1 and net[2].votes is None
    train(net, opt, 0, 1)
    opt.add_param_group({"params": [net[2].weight]})
    assert train(net, opt, 1, 2)[0] > 0


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_deep_copy_of_net_and_optimizer_goes_on_alike(update):
    net = tiny_net(delta=DELAYED)
    opt = optimizer(net, momentum=0.9, update=update)
    train(net, opt, 0, 3)
    twin, other = copy.deepcopy((net, opt))
    assert [p for group in other.param_groups for p in group["params"]] == list(twin.parameters())
    before = weights(twin)
    flips = train(net, opt, 3, 6)
    assert same(before, weights(twin)), "the original's steps leave the copy alone"
    assert train(twin, other, 3, 6) == flips and same(weights(net), weights(twin))


def test_step_hooks_and_closure():
    net, called = tiny_net(), []
    opt = optimizer(net)
    opt.register_step_pre_hook(lambda *_: called.append(("before", bool(net[1].votes.any()))))
    opt.register_step_post_hook(lambda *_: called.append(("after", bool(net[1].votes.any()))))

    def closure():
        opt.zero_grad()
        loss = loss_of(net, tokens_of(0))
        loss.backward()
        called.append(("closure", torch.is_grad_enabled()))
        return loss

    plain = tiny_net()
    with torch.no_grad():
        expected = loss_of(plain, tokens_of(0))
        assert torch.equal(opt.step(closure), expected)
    assert called == [("before", False), ("closure", True), ("after", False)]
    train(plain, optimizer(plain), 0, 1)
    assert same(weights(net), weights(plain))
    assert opt.step() is None


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradscaler_is_refused_and_can_be_left_out(unscaled):
    net = tiny_net()
    opt = optimizer(net)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, tokens_of(0))).backward()
    if unscaled:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="FlipOptimizer: integer layers need no GradScaler.*opt.step()"):
        scaler.step(opt)
    opt.zero_grad()
    assert train(net, opt, 0, 1)[0] > 0


SETTINGS = [
    {"rule": "muon"}, {"flip_prob": "half"}, {"update": "later"}, {"lr": 1.5}, {"lr": -0.1}, {"momentum": 1.0},
    {"momentum": -0.5}, {"step_size": 0}, {"topk_tile": -4}, {"ortho_tile": -4}, {"flip_gamma": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_wrong_setting_is_named(setting):
    net = tiny_net()
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*{next(iter(setting.values()))}"):
        FlipOptimizer(net.parameters(), **setting)


def test_lr_as_a_tensor_must_be_float64():
    """k in float32 is another number of moves."""
    net = tiny_net()
    with pytest.raises(ValueError, match="lr is 0.3.*float64"):
        FlipOptimizer(net.parameters(), torch.tensor(0.3))


@pytest.mark.parametrize("net, params, error", [
    (nn.Linear(3, 3), lambda net: net.parameters(), "number 0 of the group is torch.float32.*AdamW"),
    (nn.Sequential(IntLinear(3, 3), nn.Linear(3, 3)), lambda net: net.named_parameters(), "1.weight is torch.float32"),
    (IntLinear(3, 3), lambda net: [copy.deepcopy(net.weight)],
     r"number 0 .*torch.int8 \(3, 3\) parameter belongs to no living"),
    (nn.Identity(), lambda net: net.parameters(), "empty parameter list"),
    (nn.Identity(), lambda net: [{"params": net.parameters()}], "a group without parameters"),
], ids=["floats", "named", "no layer's", "none", "an empty group"])  # fmt: skip
def test_what_it_cannot_move_is_refused_by_name(net, params, error):
    with pytest.raises(ValueError, match=error):
        FlipOptimizer(params(net))


def test_named_parameters_keep_their_names():
    net = tiny_net()
    opt = FlipOptimizer(net.named_parameters(), rule="gain")
    assert opt.param_groups[0]["param_names"] == ["0.weight", "1.weight", "2.weight"]
    twin = tiny_net()
    FlipOptimizer(twin.named_parameters(), rule="gain").load_state_dict(opt.state_dict())
    assert train(net, opt, 0, 1)[0] > 0


def test_foreign_state_is_refused_and_nothing_taken():
    nets = [tiny_net(), tiny_net(), nn.ModuleList([IntLinear(8, 8), IntLinear(8, 9)]), tiny_net(delta=DELAYED),
            nn.ModuleList([IntLinear(8, 8), IntLinear(8, 9), IntLinear(9, 9)])]  # fmt: skip
    momenta = (0.9, 0.0, 0.9, 0.9, 0.9)
    opt, *others = (FlipOptimizer(net.parameters(), momentum=m) for net, m in zip(nets, momenta, strict=True))
    front = nn.Linear(3, 3)
    adamw = torch.optim.AdamW(front.parameters())
    front(torch.ones(3)).sum().backward()
    adamw.step()
    train(nets[0], opt, 0, 1)
    before = copy.deepcopy(opt.state_dict()["state"])
    for other in (*others, adamw):
        with pytest.raises(ValueError, match="the state dict does not match"):
            opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the state dict does not match"):
        others[0].load_state_dict(opt.state_dict())
    for number, state in opt.state_dict()["state"].items():
        assert all(torch.equal(t, before[number][name]) for name, t in state.items())


@pytest.mark.parametrize("saved", [
    {"update": "backward"}, {"update": "step"}, {"topk_tile": 32}, {"max_tokens": 10**6},
], ids=str)  # fmt: skip
def test_settings_come_with_a_state(saved):
    """As with any torch optimizer; what follows from them is made anew."""
    net, other = tiny_net(), tiny_net()
    opt = optimizer(net, momentum=0.9, **saved)
    late = optimizer(other, momentum=0.9, **({"update": "backward"} if saved == {"update": "step"} else {}))
    train(net, opt, 0, 2)
    train(other, late, 5, 6)
    other.load_state_dict(net.state_dict())
    late.load_state_dict(opt.state_dict())
    assert late.votes_bytes() == opt.votes_bytes() and late.flips() == 0
    assert train(net, opt, 2, 5) == train(other, late, 2, 5) and same(weights(net), weights(other))


def test_two_optimizers_may_share_layers():
    """Votes lie in the buffer of the newer one, which has more layers than the older one asks for."""
    layers = [IntLinear(64, 64, seed=i) for i in range(3)]
    older = FlipOptimizer([layer.weight for layer in layers[:2]], rule="gain")
    FlipOptimizer([layer.weight for layer in layers], rule="gain")
    before = [layer.weight.clone() for layer in layers]
    nn.Sequential(*layers)(torch.randn(32, 64)).sum().backward()
    older.step()
    changed = [not torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True)]
    assert changed == [True, True, False]


def test_layers_of_one_shape_move_as_one_wherever_they_lie(monkeypatch):
    """In one buffer from the start, without a copy, and gathered for the step where somebody has moved one away."""
    nets = [nn.Sequential(*(IntLinear(64, 64, seed=i, index=0) for i in range(3))) for _ in range(2)]
    optimizers = [FlipOptimizer(net.parameters(), rule="gain", momentum=0.9) for net in nets]
    assert same(weights(nets[0]), [IntLinear(64, 64, seed=i, index=0).weight for i in range(3)]), "values stay"
    for layer in nets[1]:
        layer.weight.data = layer.weight.data.clone()
        state = optimizers[1].state[layer.weight]
        state["momentum"] = state["momentum"].clone()
    copied, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, values: copied.append(to) or copy_(to, values))
    for net, opt, copies in zip(nets, optimizers, (0, 4), strict=True):
        for step in range(2):
            net(torch.randn(32, 64, generator=generator(step))).sum().backward()
            opt.step()
        assert len(copied) == copies
    assert optimizers[0].flips() == optimizers[1].flips() > 0 and same(weights(nets[0]), weights(nets[1]))
    assert same(*([state["momentum"] for state in opt.state.values()] for opt in optimizers))
