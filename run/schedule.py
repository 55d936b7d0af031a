"""How a quantity falls (or stays) over a run: the share of weights k, the step size, the learning rate."""

import math

KINDS = ("linear", "quadratic", "cosine", "constant")


def fraction(kind: str, step: int, steps: int) -> float:
    """From 1 at step 0 towards 0 at `steps`: "linear", "quadratic", "cosine" or "constant" (always 1)."""
    t = min(step / steps, 1.0)
    if kind == "linear":
        return 1.0 - t
    if kind == "quadratic":
        return (1.0 - t) ** 2
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * t))
    if kind == "constant":
        return 1.0
    raise ValueError(f"schedule: got {kind!r}; known are {', '.join(KINDS)}")


def scheduled(start: float, end: float, kind: str, step: int, steps: int, warmup: int = 0) -> float:
    """Value at `step` of `steps`: a linear rise over `warmup` steps, then from `start` to `end` as `kind` says."""
    if step < warmup:
        return start * (step + 1) / warmup
    return end + (start - end) * fraction(kind, step - warmup, max(steps - warmup, 1))


def step_size_at(start: int, step: int, steps: int) -> int:
    """Largest move in weight units: falls linearly from `start`, rounded up, and is 1 at the end."""
    return max(1, -(-start * (steps - step) // steps))
