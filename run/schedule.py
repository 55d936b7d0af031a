"""How a learning rate (for FlipOptimizer the share k) falls over a run, as a torch scheduler."""

import math

import torch

from gft.optimizer import FlipOptimizer


def fraction(kind: str, step: int, steps: int) -> float:
    """From 1 at step 0 towards 0 at `steps`: "linear", "quadratic", "cosine" or "constant" (always 1)."""
    t = min(step / steps, 1.0)
    if kind == "linear":
        return 1.0 - t
    if kind == "quadratic":
        return (1.0 - t) ** 2
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * t))
    return 1.0


def scheduled(start: float, end: float, kind: str, step: int, steps: int, warmup: int = 0) -> float:
    """Value at `step` of `steps`: a linear rise over `warmup` steps, then from `start` to `end` as `kind` says."""
    if step < warmup:
        return start * (step + 1) / warmup
    return end + (start - end) * fraction(kind, step - warmup, max(steps - warmup, 1))


def step_size_at(start: int, step: int, steps: int) -> int:
    """Largest move in weight units: falls linearly from `start`, rounded up, and is 1 at the end."""
    return max(1, -(-start * (steps - step) // steps))


class Schedule(torch.optim.lr_scheduler.LRScheduler):
    """`scheduled` for every group's lr, from what it is now to `end`; a group's step_size falls to 1 with it."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, steps: int, end: float = 0.0, kind: str = "linear", warmup: int = 0
    ):
        self.steps, self.end, self.kind, self.warmup = steps, end, kind, warmup
        self.step_sizes = [group.get("step_size") for group in optimizer.param_groups]
        for group in optimizer.param_groups:  # numbers, so that the schedule never waits for a GPU
            group.setdefault("initial_lr", float(group["lr"]))
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The lr of every group at the present step."""
        return [scheduled(lr, self.end, self.kind, self.last_epoch, self.steps, self.warmup) for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """On to the next step."""
        super().step(epoch)
        self._set_step_sizes()

    def _set_step_sizes(self) -> None:
        changed = False
        for group, start in zip(self.optimizer.param_groups, self.step_sizes, strict=True):
            if start is not None:
                before, group["step_size"] = group["step_size"], step_size_at(start, self.last_epoch, self.steps)
                changed |= group["step_size"] != before
        if changed and isinstance(self.optimizer, FlipOptimizer):
            self.optimizer.settings_changed()

    def go_to(self, step: int) -> None:
        """Set the lr of `step`, as when a run is taken up again."""
        self.last_epoch = step
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._set_step_sizes()
