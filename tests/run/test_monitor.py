"""What the monitor measures, against counts by hand, and when it warns."""

import math

import pytest
import torch
from torch import nn

from gft.layers import IntEmbedding, IntLinear
from gft.optimizer import FlipOptimizer
from run.monitor import Monitor, warnings


def trained(steps: int, every: int, update: str = "step"):
    """Step, report, weights of every step so far, layer; row 2 of the layer gets no vote."""
    net = nn.ModuleDict({"only": IntLinear(8, 6, bits=3, keep_bits=3, index=0)})
    layer = net["only"]
    optimizer = FlipOptimizer(net.parameters(), 0.5, rule="gain", update=update)
    monitor = Monitor(net, every, seed=1)
    history = [layer.weight.clone()]
    for step in range(steps):
        monitor.before_backward(step)
        generator = torch.Generator().manual_seed(step)
        delta = torch.randn(16, 6, generator=generator)
        delta[:, 2] = 0
        layer(torch.randn(16, 8, generator=generator)).backward(delta)
        monitor.before_step()
        optimizer.step()
        history.append(layer.weight.clone())
        yield step, monitor.report(), history, layer


@pytest.mark.parametrize("update", ["step", "backward"])
def test_shares_are_those_of_the_weights(update):
    seen = 0
    for step, report, history, layer in trained(6, 3, update):
        assert bool(report) == (step in (2, 5))
        if not report:
            continue
        seen += 1
        row, weight = report["layers"]["only"], layer.weight
        assert report["monitor"] == row
        assert row["flips"] == pytest.approx((history[-1] != history[-2]).float().mean().item(), abs=1e-5)
        assert row["at_limit"] == pytest.approx((weight.abs() == 3).float().mean().item(), abs=1e-5)
        assert row["zeros"] == pytest.approx((weight == 0).float().mean().item(), abs=1e-5)
        if update == "step":
            assert row["dead_rows"] == pytest.approx(1 / 6, abs=1e-5)
        else:
            assert "dead_rows" not in row, "votes were never in memory"
    assert seen == 2


def test_undone_moves_are_counted():
    """By hand on every weight; the monitor follows a sample drawn with replacement, here of the whole layer's size."""
    reports = [(report, list(history)) for _, report, history, _ in trained(8, 1)]
    (report, history), earlier = reports[-1], [r for r, _ in reports[:-1]]
    moves = [(b.int() - a.int()).sign() for a, b in zip(history, history[1:])]
    last, undone, moved = torch.zeros_like(moves[0]), 0, 0
    for move in moves:
        back, again = (move != 0) & (move == -last), (move != 0) & (last != 0)
        undone, moved = int(back.sum()), int(again.sum())  # of the last step
        last = torch.where(move != 0, move, last)
    assert 0 < undone < moved
    assert report["layers"]["only"]["undone"] == pytest.approx(undone / moved, abs=0.25)
    assert earlier[0]["layers"]["only"]["undone"] == 0, "no move has been seen before the first"


def test_a_move_is_compared_with_the_last_one_seen():
    """Between two looks weights move unseen; what is compared is the direction of the steps looked at."""
    seen = [report["layers"]["only"]["undone"] for step, report, _, _ in trained(9, 3) if report]
    assert seen[0] == 0 and len(seen) == 3 and any(share > 0 for share in seen[1:])


def test_the_mean_is_taken_over_layers_and_nothing_is_kept():
    net = nn.Sequential(IntEmbedding(7, 8, index=0), IntLinear(8, 4, index=1), nn.Linear(4, 4))
    optimizer = FlipOptimizer([net[0].weight, net[1].weight], rule="gain")
    monitor = Monitor(net, 1, seed=1)
    monitor.before_backward(0)
    net(torch.tensor([0, 3])).sum().backward()
    monitor.before_step()
    optimizer.step()
    report = monitor.report()
    assert set(report["layers"]) == {"0", "1"}, "float layers are not measured"
    assert report["layers"]["0"]["dead_rows"] == pytest.approx(5 / 7, abs=1e-5), "tokens that did not occur"
    for key, mean in report["monitor"].items():
        assert mean == pytest.approx(sum(row[key] for row in report["layers"].values()) / 2, abs=2e-5)
    assert not monitor.before and monitor.report() == {}


def test_a_frozen_layer_has_no_votes_to_look_at():
    net = nn.Sequential(IntLinear(8, 8, index=0), IntLinear(8, 4, index=1))
    optimizer = FlipOptimizer([net[0].weight], rule="gain")
    monitor = Monitor(net, 1, seed=1)
    monitor.before_backward(0)
    net(torch.randn(5, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    monitor.before_step()
    optimizer.step()
    report = monitor.report()
    assert report["layers"]["1"]["flips"] == 0 and "dead_rows" not in report["layers"]["1"]
    assert report["monitor"]["dead_rows"] == report["layers"]["0"]["dead_rows"]
    assert report["monitor"]["flips"] == pytest.approx(report["layers"]["0"]["flips"] / 2, abs=1e-5)


def test_a_net_without_integer_layers_has_nothing_to_measure():
    monitor = Monitor(nn.Linear(3, 3), 1, seed=1)
    monitor.before_backward(0)
    monitor.before_step()
    assert monitor.report() == {}


def test_other_steps_copy_nothing():
    net = nn.Sequential(IntLinear(8, 4))
    monitor = Monitor(net, 10, seed=1)
    for step in (0, 5, 8):
        monitor.before_backward(step)
        assert not monitor.before
    monitor.before_backward(9)
    assert torch.equal(monitor.before["0"], net[0].weight) and monitor.before["0"] is not net[0].weight


FALLING = [3.0, 2.5, 2.3, 2.2, 2.1, 2.0, 1.95]
FLAT = [3.0, 2.4, 2.4, 2.4, 2.4, 2.4]
MEGA = 2**20


@pytest.mark.parametrize(
    "losses, progress, resident, expected",
    [
        (FALLING, 0.5, [500 * MEGA] * 7, set()),
        (FLAT, 0.3, [], {"plateau"}),
        (FLAT, 0.9, [], set()),
        ([3.0, 2.4, 2.3, 2.9], 0.3, [], {"collapse"}),
        ([4.1, 4.1], 0.3, [], {"collapse"}),
        ([4.1], 0.02, [], set()),
        (FALLING, 0.5, [400 * MEGA, 500 * MEGA, 550 * MEGA, 700 * MEGA], {"memory"}),
        (FALLING, 0.5, [100 * MEGA, 500 * MEGA, 510 * MEGA, 520 * MEGA], set()),
    ],
)
def test_warnings(losses, progress, resident, expected):
    found = warnings(losses, progress, math.log(65), resident)
    assert set(found) == expected
    assert all(len(text) > 20 for text in found.values())


def test_limits_and_zeros_are_those_of_what_is_read():
    net = nn.ModuleDict({"only": IntLinear(8, 6, bits=2, index=0)})
    layer = net["only"]
    optimizer, monitor = FlipOptimizer(net.parameters(), 0.5, rule="gain"), Monitor(net, 1, seed=1)
    monitor.before_backward(0)
    layer(torch.ones(2, 8)).sum().backward()
    monitor.before_step()
    optimizer.step()
    row, read = monitor.report()["layers"]["only"], layer.read()
    assert 0 < row["zeros"] == pytest.approx((read == 0).float().mean().item(), abs=1e-5)
    assert 0 < row["at_limit"] == pytest.approx((read != 0).float().mean().item(), abs=1e-5)
