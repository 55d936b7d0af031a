"""FlipOptimizer: the step that moves integer weights.

    opt = FlipOptimizer(model, k=0.5, steps=500)
    loss.backward(); opt.step()

It finds the integer layers of any module, so it stands next to a torch.optim optimizer for the float layers
of a hybrid net. Without `memory` it keeps nothing between steps but the step's number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gft.clock import Clock
from gft.layers import IntEmbedding, IntLayer
from gft.rules import Rule, learn
from gft.schedule import KINDS as SCHEDULES
from gft.schedule import scheduled, step_size_at
from kernels.memory import MEMORY_TILE, remember_
from kernels.philox import Stream, dither_words
from kernels.scores import RULES
from kernels.tiles import tile_grid


@dataclass
class LayerStep:
    """What one layer did in a step, for a monitor: its votes (out, in) and the number of weights flipped."""

    layer: IntLayer
    votes: Tensor
    flips: int


@dataclass
class Group:
    """Layers that learn by one rule at one width."""

    rule: Rule
    layers: list[IntLayer] = field(default_factory=list)


class FlipOptimizer:
    """Moves the integer weights of `model` by their votes.

    rule, ortho_tile, select_tile, flip_prob, flip_gamma: see kernels/scores.py and kernels/flip.py;
    embedding_rule is the rule of IntEmbedding layers. k falls from `k` to `k_end` over `steps` as `k_schedule`
    says ("linear", "quadratic", "cosine", "constant"), after `k_warmup` steps of rise. step_size is the largest move in weight
    units at the start; it falls to 1. memory "int8" keeps one byte per weight (kernels/memory.py), with decay beta.
    delta "sign" lets only the sign of delta vote; delta_scale "delayed" scales delta by the largest maximum of the
    last 16 steps, so that micro-batches add up to exactly the one big batch; its first step only measures.

    Raises ValueError if the model has no integer layer or a setting is unknown.
    """

    def __init__(
        self, model: nn.Module, *, k: float = 0.5, k_end: float = 0.0, k_schedule: str = "linear", k_warmup: int = 0,
        steps: int = 1000, rule: str = "spectral", embedding_rule: str = "balanced", ortho_tile: int = 128,
        select_tile: int = 64, flip_prob: str = "one", flip_gamma: float = 1.0, step_size: int = 1,
        memory: str = "none", beta: float = 0.9, delta: str = "int8", delta_scale: str = "step", seed: int = 1,
    ):  # fmt: skip
        known = {
            "rule": (rule, RULES), "embedding_rule": (embedding_rule, RULES), "flip_prob": (flip_prob, ("one", "score")),
            "memory": (memory, ("none", "int8")), "delta": (delta, ("int8", "sign")),
            "delta_scale": (delta_scale, ("step", "delayed")), "k_schedule": (k_schedule, SCHEDULES),
        }  # fmt: skip
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"FlipOptimizer: {name} is {value!r}; it must be one of {', '.join(choices)}")
        ranges = {
            "k": (k, 0 <= k <= 1, "from 0 to 1"), "k_end": (k_end, 0 <= k_end <= 1, "from 0 to 1"),
            "steps": (steps, steps >= 1, "at least 1"), "k_warmup": (k_warmup, k_warmup >= 0, "at least 0"),
            "step_size": (step_size, step_size >= 1, "at least 1"), "beta": (beta, 0 <= beta < 1, "from 0 to below 1"),
            "select_tile": (select_tile, select_tile >= 0, "at least 0"),
            "ortho_tile": (ortho_tile, ortho_tile >= 0, "at least 0"), "flip_gamma": (flip_gamma, flip_gamma > 0, "above 0"),
        }  # fmt: skip
        for name, (value, right, rule_text) in ranges.items():
            if not right:
                raise ValueError(f"FlipOptimizer: {name} is {value}; it must be {rule_text}")
        self.layers = [m for m in model.modules() if isinstance(m, IntLayer)]
        if not self.layers:
            raise ValueError("FlipOptimizer: the model has no IntLinear or IntEmbedding layer to train")
        self.k, self.k_end, self.k_schedule, self.k_warmup, self.steps = k, k_end, k_schedule, k_warmup, steps
        self.start_size, self.memory, self.beta = step_size, memory, beta
        self.clock = Clock(seed)
        self.observer: Callable[[LayerStep], None] | None = None
        hidden = Rule(rule, ortho_tile, select_tile, flip_prob, flip_gamma)
        groups: dict[tuple[Rule, int], Group] = {}
        for index, layer in enumerate(self.layers):
            layer.index = index
            layer.attach(self.clock)
            layer.set_delta(delta, delta_scale)
            own = replace(hidden, name=embedding_rule) if isinstance(layer, IntEmbedding) else hidden
            groups.setdefault((own, layer.bits), Group(own)).layers.append(layer)
        self.groups = list(groups.values())
        self.memories: dict[int, tuple[Tensor, Tensor]] = {}
        if memory == "int8":
            self.memories = {layer.index: self._empty_memory(layer) for layer in self.layers}

    @staticmethod
    def _empty_memory(layer: IntLayer) -> tuple[Tensor, Tensor]:
        down, across = tile_grid(tuple(layer.weight.shape), MEMORY_TILE)
        scale = torch.zeros(down * across, 1, 1, device=layer.weight.device)
        return torch.zeros_like(layer.weight), scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop votes of backward passes that no step has used; `set_to_none` is torch.optim's and changes nothing."""
        for layer in self.layers:
            layer.forget()

    @torch.no_grad()
    def step(self) -> int:
        """Flip weights by the votes of the backward passes since the last step. Returns the number of flips."""
        step = self.clock.step
        k = scheduled(self.k, self.k_end, self.k_schedule, step, self.steps, self.k_warmup)
        size = step_size_at(self.start_size, step, self.steps)
        flips = sum(self._learn(group, k, size) for group in self.groups)
        for layer in self.layers:
            layer.finish_step()
        self.clock.advance(step + 1)
        return flips

    def _learn(self, group: Group, k: float, size: int) -> int:
        taken = [(layer, v) for layer in group.layers if (v := layer.take_votes()) is not None]
        if not taken:
            return 0
        layers, votes = (list(column) for column in zip(*taken, strict=True))
        evidence = [self._remember(la, v) for la, v in zip(layers, votes, strict=True)] if self.memories else votes
        flips = learn(group.rule, layers, evidence, k, size, self.clock)
        if self.observer is not None:
            for row in zip(layers, votes, flips, strict=True):
                self.observer(LayerStep(*row))
        return sum(flips)

    def _remember(self, layer: IntLayer, votes: Tensor) -> Tensor:
        stored, scale = self.memories[layer.index]
        streams = (Stream.MEMORY_ROWS + 16 * layer.index, Stream.MEMORY_COLUMNS + 16 * layer.index)
        n = scale.numel() * MEMORY_TILE
        rows, columns = (dither_words(self.clock.seed, self.clock.step, s, n).to(stored.device) for s in streams)
        return remember_(stored, scale, votes, self.beta, rows, columns)

    def state_bytes(self) -> int:
        """Bytes of state per weight kept between steps: 0, or one per weight with the int8 memory."""
        return sum(stored.numel() * stored.element_size() for stored, _ in self.memories.values())

    def scale_bytes(self) -> int:
        """Bytes of scales kept between steps: of memory tiles and of delayed deltas (layer scales are the layers')."""
        histories = [layer.delta_history for layer in self.layers if layer.delta_history is not None]
        return sum(t.numel() * t.element_size() for t in [s for _, s in self.memories.values()] + histories)

    def state_dict(self) -> dict[str, Tensor]:
        """All that must be saved to go on exactly: the step, the delayed scales and the memory if there are any."""
        state = {"step": torch.tensor(self.clock.step)}
        for layer in self.layers:
            if layer.delta_history is not None:
                state[f"delta_history.{layer.index}"] = layer.delta_history
        for index, (stored, scale) in self.memories.items():
            state[f"memory.{index}"], state[f"memory_scale.{index}"] = stored, scale
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of `state_dict`. Raises ValueError if it is that of another model or memory setting."""
        own = self.state_dict()
        if set(own) != set(state) or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("FlipOptimizer: this state has other layers or another memory setting than the optimizer")
        self.zero_grad()
        for index, (stored, scale) in self.memories.items():
            stored.copy_(state[f"memory.{index}"])
            scale.copy_(state[f"memory_scale.{index}"])
        for layer in self.layers:
            if layer.delta_history is not None:
                layer.take_history(state[f"delta_history.{layer.index}"])
        self.clock.advance(int(state["step"]))
