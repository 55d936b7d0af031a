"""run/schedule.py: values at the ends and between, warm-up, step sizes as exact fractions; as a torch scheduler."""

import math
from fractions import Fraction

import pytest
import torch

from gft import FlipOptimizer, IntLinear
from run.schedule import Schedule, fraction, scheduled, step_size_at


@pytest.mark.parametrize(
    "kind, values",
    [
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("quadratic", [1.0, 0.5625, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.0]),
        ("constant", [1.0] * 4),
    ],
)
def test_fraction_at_known_points(kind, values):
    assert [fraction(kind, step, 40) for step in (0, 10, 20, 40)] == pytest.approx(values)
    assert fraction(kind, 41, 40) == fraction(kind, 4000, 40) == pytest.approx(values[-1]), "stays past the end"


@pytest.mark.parametrize("kind", ["linear", "quadratic", "cosine"])
def test_fraction_falls_at_every_step(kind):
    values = [fraction(kind, step, 37) for step in range(38)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("kind, middle", [("linear", 0.3), ("quadratic", 0.2), ("cosine", 0.3), ("constant", 0.5)])
def test_scheduled_runs_from_start_to_end(kind, middle):
    end = 0.5 if kind == "constant" else 0.1
    assert scheduled(0.5, 0.1, kind, 0, 100) == pytest.approx(0.5)
    assert scheduled(0.5, 0.1, kind, 100, 100) == pytest.approx(end)
    assert scheduled(0.5, 0.1, kind, 50, 100) == pytest.approx(middle)


def test_warmup_rises_linearly_and_the_fall_starts_where_it_ends():
    values = [scheduled(0.8, 0.0, "linear", step, 14, warmup=4) for step in range(15)]
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]), "the first step already learns"
    assert values[4:] == pytest.approx([0.8 * (10 - n) / 10 for n in range(11)])


def test_warmup_of_the_whole_run_only_rises():
    values = [scheduled(1.0, 0.0, "cosine", step, 5, warmup=5) for step in range(5)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("start", [1, 2, 3, 127])
def test_step_size_falls_from_start_to_one(start):
    sizes = [step_size_at(start, step, 50) for step in range(51)]
    assert sizes[0] == start and sizes[-1] == 1 and set(sizes) <= set(range(1, start + 1))
    assert sizes == sorted(sizes, reverse=True)
    assert all(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize("start, steps", [(3, 9), (2, 7), (127, 500), (10, 20), (7, 14)])
def test_step_size_is_the_rounded_up_line(start, steps):
    for step in range(steps + 1):
        line = Fraction(start * (steps - step), steps)
        assert step_size_at(start, step, steps) == max(1, math.ceil(line)), f"step {step}"


def weight(lr, **group) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], **group}], lr=lr)


LR = {"float": 0.5, "tensor": torch.tensor(0.5, dtype=torch.float64)}


@pytest.mark.parametrize("lr", LR.values(), ids=LR)
@pytest.mark.parametrize("kind, end, warmup", [("linear", 0.0, 0), ("cosine", 0.1, 3), ("constant", 0.5, 2)])
def test_a_schedule_sets_what_scheduled_says(lr, kind, end, warmup):
    optimizer = weight(lr.clone() if isinstance(lr, torch.Tensor) else lr, step_size=4)
    held = optimizer.param_groups[0]["lr"]
    schedule = Schedule(optimizer, 10, end, kind, warmup)
    for step in range(13):
        group = optimizer.param_groups[0]
        assert float(group["lr"]) == pytest.approx(scheduled(0.5, end, kind, step, 10, warmup)), f"step {step}"
        assert group["step_size"] == step_size_at(4, step, 10)
        assert schedule.get_last_lr() == pytest.approx([float(group["lr"])])
        optimizer.step()
        schedule.step()
    assert not isinstance(lr, torch.Tensor) or optimizer.param_groups[0]["lr"] is held, "a graph goes on reading it"


@pytest.mark.parametrize("lr", LR.values(), ids=LR)
def test_a_schedule_is_taken_up_anywhere(lr, recwarn):
    for step in (0, 1, 7, 10, 30):
        optimizer, whole = (weight(lr.clone() if isinstance(lr, torch.Tensor) else lr, step_size=7) for _ in range(2))
        later, schedule = Schedule(optimizer, 10, 0.1, warmup=2), Schedule(whole, 10, 0.1, warmup=2)
        later.go_to(step)
        for _ in range(step):
            whole.step()
            schedule.step()
        for _ in range(3):
            ours, theirs = optimizer.param_groups[0], whole.param_groups[0]
            assert (ours["lr"], ours["step_size"]) == (theirs["lr"], theirs["step_size"])
            for part in (whole, schedule, optimizer, later):
                part.step()
    assert not recwarn.list, "torch warns of a schedule that is ahead of its optimizer"


def test_groups_fall_from_rates_of_their_own():
    optimizer = weight(0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1})
    schedule = Schedule(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.05])
    assert all("step_size" not in group for group in optimizer.param_groups)


def moves(update: str, first: int, steps: int = 6) -> list[int]:
    """The largest move of every step from `first` on; where the run is taken up the schedule goes there at once."""
    layer = IntLinear(64, 64, bits=8, seed=3, index=0)
    flips = FlipOptimizer(layer.parameters(), lr=0.5, rule="gain", step_size=4, update=update)
    schedule, found = Schedule(flips, steps), []
    schedule.go_to(first)
    for _ in range(first, steps):
        before = layer.weight.int()
        layer(torch.randn(32, 64)).square().sum().backward()
        flips.step()
        schedule.step()
        found.append(int((layer.weight - before).abs().max()))
    return found


@pytest.mark.parametrize("first", [0, 3])
def test_moves_of_both_ways_to_update_have_the_step_size_of_their_step(first):
    expected = [step_size_at(4, step, 6) for step in range(first, 6)]
    assert moves("step", first) == moves("backward", first) == expected


def test_a_share_may_be_set_as_a_number_between_steps():
    layer = IntLinear(64, 64)
    flips, found = FlipOptimizer(layer.parameters(), lr=0.5, update="backward"), []
    for lr in (0.0, 0.25, 0.0):
        flips.param_groups[0]["lr"] = lr
        flips.settings_changed()
        before = layer.weight.clone()
        layer(torch.randn(32, 64)).square().sum().backward()
        flips.step()
        found.append(float((layer.weight != before).float().mean()))
    assert found == pytest.approx([0.0, 0.25, 0.0], abs=0.01)
