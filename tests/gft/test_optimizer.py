"""gft/optimizer.py and gft/rules.py: which weights move, how far, how many, and what is kept for the next step."""

import itertools
import math

import pytest
import torch
from torch import nn

from gft.layers import IntEmbedding, IntLinear
from gft.optimizer import FlipOptimizer
from kernels.philox import Stream, uniform

Q = {1: 1, 2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}
VOCAB = 11


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_net(bits: int = 6) -> nn.Sequential:
    """An embedding and two matrices, one of them larger than a tile of 64."""
    return nn.Sequential(
        IntEmbedding(VOCAB, 12, bits, index=0),
        IntLinear(12, 70, bits, index=1),
        IntLinear(70, VOCAB, bits, squared_relu=True, index=2),
    )


def loss_of(net: nn.Module, step: int, count: int = 16) -> torch.Tensor:
    """Loss of predicting 3 t + 1 mod VOCAB on a batch that depends on the step alone."""
    tokens = torch.randint(0, VOCAB, (count,), generator=generator(step))
    return nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % VOCAB, reduction="sum")


def train(net: nn.Module, opt: FlipOptimizer, first: int, last: int) -> list[int]:
    flips = []
    for step in range(first, last):
        loss_of(net, step).backward()
        flips.append(opt.step())
    return flips


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [m.weight.clone() for m in net.modules() if isinstance(m, (IntLinear, IntEmbedding))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Every value of a setting occurs, each rule with both values of every other setting.
COVER = [
    # bits, rule, select, ortho, size, memory, flip_prob, delta
    (1, "contribution", 64, 0, 1, "none", "one", "int8"),
    (1, "spectral", 0, 64, 3, "int8", "score", "sign"),
    (2, "gain", 0, 64, 3, "int8", "one", "sign"),
    (2, "balanced", 64, 0, 1, "none", "score", "int8"),
    (3, "spectral", 64, 64, 3, "none", "one", "sign"),
    (3, "contribution", 0, 64, 3, "int8", "score", "sign"),
    (4, "balanced", 0, 64, 3, "int8", "one", "sign"),
    (5, "gain", 64, 0, 1, "none", "score", "int8"),
    (6, "spectral", 64, 0, 1, "int8", "one", "int8"),
    (7, "contribution", 64, 64, 3, "none", "one", "int8"),
    (8, "gain", 64, 64, 3, "none", "one", "int8"),
    (8, "spectral", 0, 0, 3, "none", "score", "int8"),
    (8, "balanced", 64, 64, 1, "int8", "one", "int8"),
]


@pytest.mark.parametrize("bits, rule, select, ortho, size, memory, prob, delta", COVER, ids=lambda v: str(v))
def test_weights_stay_on_their_grid(bits, rule, select, ortho, size, memory, prob, delta):
    """Wherever they start, weights stay integers in [-Q, Q] and none moves further than the step size."""
    net, q, unit = tiny_net(bits), Q[bits], 2 if bits == 1 else 1
    for index, layer in enumerate(net):
        layer.weight.copy_(torch.where(torch.rand(layer.weight.shape, generator=generator(index)) < 0.5, -q, q))
    opt = FlipOptimizer(
        net, rule=rule, embedding_rule=rule, select_tile=select, ortho_tile=ortho, step_size=size, memory=memory,
        flip_prob=prob, delta=delta, k=0.5, steps=12,
    )  # fmt: skip
    for step in range(12):
        before = weights(net)
        flips = train(net, opt, step, step + 1)[0]
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
    opt = FlipOptimizer(net, rule=rule, embedding_rule=rule, ortho_tile=64, k=0.2)
    loss_of(net, 0).backward()
    votes, before = [layer.take_votes().clone() for layer in net], weights(net)
    opt.step()
    for v, old, new in zip(votes, before, weights(net), strict=True):
        change = new.long() - old.long()
        assert (v * change).sum() < 0
        if rule != "spectral":
            assert (v * change <= 0).all() and (v[change != 0] != 0).all()
        if rule == "contribution":
            moved = (change != 0) & (old != 0)
            assert (new[moved].abs() < old[moved].abs()).all() and moved.any(), "weights only shrink; zeros may leave"


def test_embeddings_learn_by_a_rule_of_their_own():
    ends = {}
    for rules in (("spectral", "gain"), ("gain", "gain"), ("spectral", "spectral")):
        net = tiny_net()
        train(net, FlipOptimizer(net, rule=rules[0], embedding_rule=rules[1], ortho_tile=64, k=0.2), 0, 1)
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
    layer = IntLinear(10, 7, bits)
    q = Q[bits]
    at_limit = torch.rand(7, 10, generator=generator(1)) < 0.7
    layer.weight.copy_(torch.where(at_limit, layer.weight.sign() * q, layer.weight))
    opt = FlipOptimizer(
        layer, rule="gain", select_tile=side, step_size=size, k=k, k_schedule="constant", delta="sign", seed=9, steps=3
    )
    ties = False
    for step in range(3):
        x = torch.where(torch.rand(5, 10, generator=generator(step)) < 0.5, -1.0, 1.0)
        layer(x).backward(torch.randint(-1, 2, (5, 7), generator=generator(step + 50)).float())
        votes, before = layer.take_votes().clone(), layer.weight.clone()
        tiles = math.ceil(7 / side) * math.ceil(10 / side) if side else 1
        u = uniform(9, step, Stream.TOPK, tiles)
        unit, moves = 2 if bits == 1 else 1, (size, (2 * size + 2) // 3, 1)[step]
        wanted, flips = expected_step(before, votes, q, unit, unit * moves, k, u, side)
        assert opt.step() == flips and torch.equal(layer.weight, wanted)
        ties |= votes.abs().unique().numel() < votes.numel() / 4 and bool((votes == 0).any())
    assert ties


@pytest.mark.parametrize("rule", ["gain", "balanced", "spectral"])
def test_count_of_every_tile_is_exact(rule):
    """floor(k n + u) flips in a tile of n weights, ragged ones included, wherever as many moves are legal."""
    layer = IntLinear(150, 70)
    opt = FlipOptimizer(layer, rule=rule, ortho_tile=64, k=0.0123, k_schedule="constant", seed=4)
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
    opt = FlipOptimizer(layer, rule="gain", k=0.3 / 256, k_schedule="constant")
    flips = []
    for step in range(200):
        layer(torch.randn(2, 16, generator=generator(step))).backward(torch.randn(2, 16, generator=generator(step + 1)))
        flips.append(opt.step())
    assert set(flips) == {0, 1} and 40 <= sum(flips) <= 80


def test_k_falls_to_zero_over_the_run():
    net = tiny_net()
    flips = train(net, FlipOptimizer(net, rule="gain", embedding_rule="gain", k=0.4, steps=10), 0, 12)
    n = sum(w.numel() for w in weights(net))
    assert flips[0] == pytest.approx(0.4 * n, rel=0.01) and flips[5] == pytest.approx(0.2 * n, rel=0.01)
    assert all(a > b for a, b in zip(flips[:10], flips[1:10], strict=False))
    assert flips[10:] == [0, 0]


def test_flip_prob_score_follows_its_exponent():
    """Of the selected weights each flips with p = (|S| / largest)^gamma: the largest always does."""
    share = {}
    for prob, gamma in (("one", 1.0), ("score", 1.0), ("score", 4.0)):
        layer = IntLinear(64, 64, bits=8, spread=0.1)
        opt = FlipOptimizer(layer, rule="gain", k=1.0, flip_prob=prob, flip_gamma=gamma, k_schedule="constant")
        layer(torch.randn(8, 64, generator=generator(1))).backward(torch.randn(8, 64, generator=generator(2)))
        votes, before = layer.take_votes().double(), layer.weight.clone()
        p = (votes.abs() / votes.abs().max()) ** gamma if prob == "score" else (votes != 0).double()
        flips = opt.step()
        assert abs(flips - p.sum()) <= 4 * (p * (1 - p)).sum() ** 0.5
        assert (layer.weight != before)[votes.abs() == votes.abs().max()].all()
        share[prob, gamma] = flips / votes.numel()
    assert share["one", 1.0] > 0.95 > 2 * share["score", 1.0] > 4 * share["score", 4.0] > 0


def test_memory_repeats_past_votes():
    """After one vote, a step of no delta still moves weights the way the memory says, which fades by beta."""
    layer = IntLinear(32, 32, bits=8)
    opt = FlipOptimizer(layer, rule="gain", memory="int8", beta=0.5, k=1.0, k_schedule="constant")
    layer(torch.randn(64, 32, generator=generator(1))).backward(torch.randn(64, 32, generator=generator(2)))
    votes = layer.take_votes().clone()
    opt.step()
    stored, scale = opt.memories[0]
    assert stored.dtype == torch.int8 and stored.abs().max() == 127
    assert ((stored * scale.view(1, 1)) - votes).abs().max() <= scale.item() * 1.001, "M = V after the first step"
    assert scale.item() == pytest.approx(votes.abs().max().item() / 127)
    before = layer.weight.clone()
    layer(torch.randn(1, 32, generator=generator(3))).backward(torch.zeros(1, 32))
    opt.step()
    sure = (before.abs() < 127) & (votes.abs() > 2 * scale.item())
    assert torch.equal((layer.weight.int() - before)[sure].sign(), -votes[sure].sign())
    assert scale.item() == pytest.approx(votes.abs().max().item() / 127 * 0.5, rel=0.01)


def test_bytes_of_state_and_scales():
    net = tiny_net()
    n = sum(w.numel() for w in weights(net))
    assert sum(p.numel() for p in net.parameters()) == 0
    plain = FlipOptimizer(net)
    assert (plain.state_bytes(), plain.scale_bytes(), set(plain.state_dict())) == (0, 0, {"step"})
    # 1 + 2 + 2 tiles of 64 x 64, four bytes each; 16 maxima for each of three layers
    memory = FlipOptimizer(net, memory="int8")
    assert (memory.state_bytes(), memory.scale_bytes()) == (n, 5 * 4)
    assert FlipOptimizer(net, memory="int8", delta_scale="delayed").scale_bytes() == 5 * 4 + 3 * 16 * 4
    assert FlipOptimizer(net).scale_bytes() == 0


@pytest.mark.parametrize("delta_scale", ["step", "delayed"])
@pytest.mark.parametrize("memory", ["none", "int8"])
def test_resumed_in_the_middle_it_ends_the_same(memory, delta_scale):
    settings = dict(k=0.3, steps=8, memory=memory, delta_scale=delta_scale, ortho_tile=64)
    settings |= dict(flip_prob="score", step_size=2)
    whole = tiny_net()
    opt = FlipOptimizer(whole, **settings)
    train(whole, opt, 0, 4)
    saved = [{name: t.clone() for name, t in part.state_dict().items()} for part in (whole, opt)]
    train(whole, opt, 4, 8)

    resumed = tiny_net()
    for layer in resumed:
        layer.weight.zero_()
    late = FlipOptimizer(resumed, **settings)
    resumed.load_state_dict(saved[0])
    late.load_state_dict(saved[1])
    train(resumed, late, 4, 8)
    assert same(weights(whole), weights(resumed)) and not same(weights(whole), weights(tiny_net()))
    assert all(torch.equal(a, late.state_dict()[name]) for name, a in opt.state_dict().items())


def test_two_runs_are_equal_and_another_seed_is_not():
    def final(seed):
        net = tiny_net()
        train(net, FlipOptimizer(net, k=0.3, steps=6, memory="int8", flip_prob="score", ortho_tile=64, seed=seed), 0, 6)
        return weights(net)

    assert same(final(1), final(1)) and not same(final(1), final(2))


def test_zero_grad_drops_votes_and_their_place_in_the_random_stream():
    ends = []
    for detour in (False, True):
        net = tiny_net()
        opt = FlipOptimizer(net, k=0.3, ortho_tile=64)
        if detour:
            loss_of(net, 77).backward()
            opt.zero_grad()
            assert all(layer.take_votes() is None for layer in net)
        train(net, opt, 0, 2)
        ends.append(weights(net))
    assert same(*ends)


def test_step_drops_the_votes_it_used_and_without_any_only_advances():
    net = tiny_net()
    opt = FlipOptimizer(net, k=0.3, memory="int8", ortho_tile=64)
    train(net, opt, 0, 1)
    before, state = weights(net), {name: t.clone() for name, t in opt.state_dict().items()}
    assert opt.step() == 0 and same(before, weights(net))
    state["step"] += 1
    assert all(torch.equal(t, opt.state_dict()[name]) for name, t in state.items()) and state["step"] == 2


def test_a_delayed_scale_that_has_seen_no_delta_still_carries_one():
    """A layer first used after step 0 measures then, and hands delta on to what is in front of it."""
    layer = IntLinear(8, 4)
    opt = FlipOptimizer(layer, delta_scale="delayed")
    opt.step()
    x = torch.randn(6, 8, generator=generator(0)).requires_grad_()
    layer(x).backward(torch.randn(6, 4, generator=generator(1)))
    assert (x.grad != 0).any()


def test_observer_sees_votes_and_flips():
    net, seen = tiny_net(), []
    opt = FlipOptimizer(net, k=0.3, rule="gain", embedding_rule="gain")
    opt.observer = seen.append
    for layer in net:
        layer.watched = True
    before = weights(net)
    flips = train(net, opt, 0, 1)[0]
    assert [row.layer for row in seen] == list(net) and flips == sum(row.flips for row in seen)
    for row, old in zip(seen, before, strict=True):
        assert row.flips == int((row.layer.weight != old).sum()) and row.votes.shape == old.shape


SETTINGS = [
    {"rule": "muon"}, {"embedding_rule": "Gain"}, {"flip_prob": "half"}, {"memory": "fp32"}, {"delta": "bf16"},
    {"delta_scale": "later"}, {"k_schedule": "exponential"}, {"k": 1.5}, {"k": -0.1}, {"k_end": 2.0}, {"steps": 0},
    {"k_warmup": -1}, {"step_size": 0}, {"beta": 1.0}, {"select_tile": -4}, {"ortho_tile": -4}, {"flip_gamma": 0.0},
    {"delta_bits": 9}, {"delta_bits": 1},
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_wrong_setting_is_named(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.*{next(iter(setting.values()))}"):
        FlipOptimizer(tiny_net(), **setting)


def test_a_model_without_integer_layers():
    with pytest.raises(ValueError, match="no IntLinear or IntEmbedding"):
        FlipOptimizer(nn.Linear(3, 3))


def test_foreign_state_is_refused_and_nothing_taken():
    plain, memory = FlipOptimizer(tiny_net()), FlipOptimizer(tiny_net(), memory="int8")
    other = FlipOptimizer(nn.Sequential(IntLinear(8, 8), IntLinear(8, 9), IntLinear(9, 9)), memory="int8")
    adamw = torch.optim.AdamW(nn.Linear(3, 3).parameters()).state_dict()
    for state in (plain.state_dict() | {"step": torch.tensor(5), "more": torch.zeros(1)}, other.state_dict(), adamw):
        with pytest.raises(ValueError, match="other layers or another memory"):
            memory.load_state_dict(state)
    with pytest.raises(ValueError, match="other layers or another memory"):
        plain.load_state_dict(memory.state_dict())
    assert int(memory.state_dict()["step"]) == 0
