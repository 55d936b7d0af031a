"""What a flip run looks like from inside: measurements per layer, and plain warnings of known failures.

    flips         flips per weight in the step
    at_limit      share of weights at -Q or Q              zeros       share of weights at 0
    saturation    share of int8 delta at +-127 (the largest alone is 1 element; a clipped scale is many); 0 for signs
    dead_rows     share of output rows no vote reached
    undone        of the moves of a sample of weights since the last report, the share that took back the move before

The warnings are for what the paper reports as signs of failure: an early plateau, a collapse when bits are
few, memory that grows.
"""

import math

import torch
from torch import Tensor

from gft.layers import IntLayer
from gft.optimizer import FlipOptimizer, LayerStep
from kernels.philox import Stream, uniform

SAMPLE = 1024  # weights per layer whose moves are followed
PLATEAU_EVALUATIONS, PLATEAU_FALL = 4, 0.003
COLLAPSE_RISE = 0.25
GROWTH_SHARE, GROWTH_BYTES = 0.25, 64 * 2**20


class Monitor:
    """Follows the layers of a FlipOptimizer; `report` is due every `every` steps."""

    def __init__(self, optimizer: FlipOptimizer, names: dict[int, str], every: int, seed: int):
        self.optimizer, self.names, self.every = optimizer, names, every
        self.rows: dict[str, dict[str, float]] = {}
        self.due = False
        self.followed = _Followed(optimizer.layers, seed)
        optimizer.observer = self._observe

    def before(self, step: int) -> None:
        """Call before the backward pass of `step`."""
        self.due = (step + 1) % self.every == 0
        for layer in self.optimizer.layers:
            layer.watched = self.due

    def _observe(self, done: LayerStep) -> None:
        layer, weight = done.layer, done.layer.weight
        self.rows[self.names[layer.index]] = {
            "flips": done.flips / weight.numel(),
            "at_limit": _share(weight.abs() == layer.q),
            "zeros": _share(weight == 0),
            "saturation": layer.saturation,
            "dead_rows": _share((done.votes == 0).all(dim=1)),
        }

    def report(self) -> dict[str, dict]:
        """Call after every step. Measurements, if it was a due one: "layers", and "monitor", their mean; else empty."""
        self.followed.update()
        layers, self.rows = self.rows, {}
        if not layers:
            return {}
        for index, share in self.followed.take_undone().items():
            if self.names[index] in layers:
                layers[self.names[index]]["undone"] = share
        keys = next(iter(layers.values())).keys()
        mean = {key: round(sum(row[key] for row in layers.values()) / len(layers), 5) for key in keys}
        rounded = {name: {key: round(value, 5) for key, value in row.items()} for name, row in layers.items()}
        return {"monitor": mean, "layers": rounded}


class _Followed:
    """The last moves of some weights of every layer, side by side in one vector: it costs every step."""

    def __init__(self, layers: list[IntLayer], seed: int):
        self.layers = layers
        self.at = []
        for layer in layers:
            n = layer.weight.numel()
            at = uniform(seed, 0, Stream.MONITOR + 16 * layer.index, min(SAMPLE, n)) * n
            self.at.append(at.long().to(layer.weight.device))
        self.value = self._values()
        self.last = torch.zeros_like(self.value)
        self.moves = torch.zeros_like(self.value, dtype=torch.int32)
        self.undone = torch.zeros_like(self.moves)

    def _values(self) -> Tensor:
        return torch.cat([la.weight.view(-1)[at] for la, at in zip(self.layers, self.at, strict=True)]).to(torch.int16)

    def update(self) -> None:
        now = self._values()
        direction = torch.sign(now - self.value)
        self.moves += direction.abs()
        self.undone += direction * self.last == -1
        self.last = torch.where(direction != 0, direction, self.last)
        self.value = now

    def take_undone(self) -> dict[int, float]:
        sizes = [len(at) for at in self.at]
        counts = zip(self.layers, self.moves.split(sizes), self.undone.split(sizes), strict=True)
        shares = {la.index: int(undone.sum()) / max(int(moves.sum()), 1) for la, moves, undone in counts}
        self.moves.zero_()
        self.undone.zero_()
        return shares


def _share(mask: Tensor) -> float:
    return mask.float().mean().item()


def warnings(losses: list[float], progress: float, chance: float, resident: list[int]) -> dict[str, str]:
    """Known signs of failure in a run so far, by name.

    losses: validation loss at each evaluation, nats; progress: share of the run done; chance: loss of a uniform
    guess (log of the vocabulary); resident: bytes held at each evaluation, the first after the first step.
    """
    found = {}
    if not all(math.isfinite(loss) for loss in losses):
        return {"collapse": "the loss is not finite"}
    best, last = min(losses), losses[-1]
    if len(losses) > PLATEAU_EVALUATIONS and progress <= 0.6:
        fall = min(losses[:-PLATEAU_EVALUATIONS]) - min(losses[-PLATEAU_EVALUATIONS:])
        if fall < PLATEAU_FALL * last:
            found["plateau"] = (
                f"early plateau: the validation loss fell by {fall:.3f} in the last {PLATEAU_EVALUATIONS} evaluations "
                f"with {1 - progress:.0%} of the run to go; try a smaller k (flips undo each other), a larger batch "
                "or --memory int8"
            )
    if last > best + COLLAPSE_RISE or (progress >= 0.2 and last > 0.97 * chance):
        found["collapse"] = (
            f"collapse: the validation loss is {last:.3f}, its best was {best:.3f} and guessing gives {chance:.3f}; "
            "few bits need a smaller k; try k / 4, more bits or --memory int8"
        )
    if len(resident) > 3 and resident[-1] - resident[1] > max(GROWTH_BYTES, GROWTH_SHARE * resident[1]):
        found["memory"] = (
            f"memory grows: {resident[1] / 2**20:.0f} MiB early in the run, {resident[-1] / 2**20:.0f} MiB now; "
            "something keeps tensors between steps"
        )
    return found
