"""run/schedule.py: values at the ends and between, warm-up, the step size against exact fractions."""

import math
from fractions import Fraction

import pytest

from run.schedule import KINDS, fraction, scheduled, step_size_at


@pytest.mark.parametrize(
    "kind, values",
    [
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("quadratic", [1.0, 0.5625, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.0]),
        ("constant", [1.0] * 4),
    ],
    ids=KINDS,
)
def test_fraction_at_known_points(kind, values):
    assert [fraction(kind, step, 40) for step in (0, 10, 20, 40)] == pytest.approx(values)
    assert fraction(kind, 41, 40) == fraction(kind, 4000, 40) == pytest.approx(values[-1]), "stays past the end"


@pytest.mark.parametrize("kind", ["linear", "quadratic", "cosine"])
def test_fraction_falls_at_every_step(kind):
    values = [fraction(kind, step, 37) for step in range(38)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="'exponential'.*linear, quadratic, cosine, constant"):
        fraction("exponential", 0, 10)


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
