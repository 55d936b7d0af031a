"""What a flip run looks like from inside: measurements per layer, and plain warnings of known failures.

    flips         flips per weight in the step
    at_limit      share of weights at -Q or Q              zeros       share of weights at 0
    dead_rows     share of output rows that no vote reached (not measured with update = "backward")
    undone        of the moves of a sample of weights, the share that took back the move seen before

The warnings are for what the paper reports as signs of failure: an early plateau, a collapse when bits are
few, memory that grows.
"""

import torch
from torch import Tensor, nn

from gft.layers import IntLayer
from kernels.limits import weight_limit
from kernels.philox import Stream, uniform

SAMPLE = 1024  # weights per layer whose moves are compared
PLATEAU_EVALUATIONS, PLATEAU_FALL = 4, 0.003
COLLAPSE_RISE = 0.25
GROWTH_SHARE, GROWTH_BYTES = 0.25, 64 * 2**20


class Monitor:
    """Looks at the integer layers of a net in every `every`-th step; the other steps cost nothing."""

    def __init__(self, net: nn.Module, every: int, seed: int):
        self.layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, IntLayer)}
        self.every = every
        self.sample = {name: self._places(layer, i, seed) for i, (name, layer) in enumerate(self.layers.items())}
        self.before: dict[str, Tensor] = {}  # weights at the start of the step
        self.dead_rows: dict[str, float] = {}
        self.moved: dict[str, Tensor] = {}  # the direction in which each sampled weight was last seen to move

    @staticmethod
    def _places(layer: IntLayer, index: int, seed: int) -> Tensor:
        n = layer.weight.numel()
        places = uniform(seed, 0, Stream.MONITOR + 16 * index, min(SAMPLE, n)) * n
        return places.long().to(layer.weight.device)

    def before_backward(self, step: int) -> None:
        """Call before the backward pass of `step`."""
        due = (step + 1) % self.every == 0
        self.before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()} if due else {}

    @property
    def looks(self) -> bool:
        """Whether this step is measured."""
        return bool(self.before)

    def before_step(self) -> None:
        """Call between the backward pass and the optimizer's step."""
        voting = {name: self.layers[name].votes for name in self.before if self.layers[name].votes is not None}
        self.dead_rows = {name: _share((votes == 0).all(dim=1)) for name, votes in voting.items()}

    def report(self) -> dict[str, dict]:
        """Call after the step. Measurements, if it was a due one: "layers", and "monitor", their mean; else empty."""
        if not self.before:
            return {}
        rows = {name: self._look(name, self.layers[name]) for name in self.before}
        self.before = {}
        found: dict[str, list[float]] = {}
        for row in rows.values():
            for key, value in row.items():
                found.setdefault(key, []).append(value)
        mean = {key: round(sum(values) / len(values), 5) for key, values in found.items()}
        return {"monitor": mean, "layers": rows}

    def _look(self, name: str, layer: IntLayer) -> dict[str, float]:
        weight, at = layer.weight, self.sample[name]
        change = weight.to(torch.int16) - self.before[name].to(torch.int16)
        moved = torch.sign(change.view(-1)[at])
        last = self.moved.get(name, torch.zeros_like(moved))
        self.moved[name] = torch.where(moved != 0, moved, last)
        moves = int((moved * last != 0).sum())
        read, (limit, _) = layer.read(weight), weight_limit(layer.bits)  # what the products see of it
        found = {
            "flips": _share(change != 0), "at_limit": _share(read.abs() == limit), "zeros": _share(read == 0),
            "undone": int((moved * last < 0).sum()) / max(moves, 1),
        }  # fmt: skip
        if name in self.dead_rows:
            found["dead_rows"] = self.dead_rows[name]
        return {key: round(value, 5) for key, value in found.items()}


def _share(mask: Tensor) -> float:
    return mask.float().mean().item()


def warnings(losses: list[float], progress: float, chance: float, resident: list[int]) -> dict[str, str]:
    """Known signs of failure in a run so far, by name.

    losses: validation loss at each evaluation, nats; progress: share of the run done; chance: loss of a uniform
    guess (log of the vocabulary); resident: bytes held at each evaluation, the first after the first step.
    """
    found = {}
    best, last = min(losses), losses[-1]
    if len(losses) > PLATEAU_EVALUATIONS and progress <= 0.6:
        fall = min(losses[:-PLATEAU_EVALUATIONS]) - min(losses[-PLATEAU_EVALUATIONS:])
        if fall < PLATEAU_FALL * last:
            found["plateau"] = (
                f"early plateau: the validation loss fell by {fall:.3f} in the last {PLATEAU_EVALUATIONS} evaluations "
                f"with {1 - progress:.0%} of the run to go; try a smaller k (flips undo each other), a larger batch "
                "or --momentum 0.9"
            )
    if last > best + COLLAPSE_RISE or (progress >= 0.2 and last > 0.97 * chance):
        found["collapse"] = (
            f"collapse: the validation loss is {last:.3f}, its best was {best:.3f} and guessing gives {chance:.3f}; "
            "few bits need a smaller k; try k / 4, more bits or --momentum 0.9"
        )
    if len(resident) > 3 and resident[-1] - resident[1] > max(GROWTH_BYTES, GROWTH_SHARE * resident[1]):
        found["memory"] = (
            f"memory grows: {resident[1] / 2**20:.0f} MiB early in the run, {resident[-1] / 2**20:.0f} MiB now; "
            "something keeps tensors between steps"
        )
    return found
