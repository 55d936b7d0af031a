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
from run.schedule import KINDS as SCHEDULES
from run.schedule import scheduled, step_size_at
from kernels.backend import on_triton
from kernels.contribution_flip import Matrix, learn_step, why_not
from kernels.memory import MEMORY_TILE, remember_
from kernels.philox import Stream, dither_words
from kernels.scores import RULES
from kernels.tiles import tile_grid


@dataclass
class LayerStep:
    """What a watched layer did in a step: its votes (out, in) and the number of weights flipped."""

    layer: IntLayer
    votes: Tensor
    flips: int


@dataclass
class Group:
    """Layers that learn by one rule at one width, and the tile at which each begins in the group's random words."""

    rule: Rule
    layers: list[IntLayer] = field(default_factory=list)
    first_tiles: dict[int, int] = field(default_factory=dict)
    tiles: int = 0

    def add(self, layer: IntLayer) -> None:
        """Append a layer."""
        self.layers.append(layer)
        self.first_tiles[layer.index] = self.tiles
        self.tiles += self.rule.tiles(layer)


class FlipOptimizer:
    """Moves the integer weights of `model` by their votes.

    rule, ortho_tile, select_tile, flip_prob, flip_gamma: see kernels/scores.py and kernels/flip.py; embedding_rule is
    the rule of IntEmbedding layers. k falls from `k` to `k_end` over `steps` as `k_schedule` says ("linear",
    "quadratic", "cosine", "constant"), after `k_warmup` steps of rise. step_size is the largest move in weight units at
    the start; it falls to 1. memory "int8" keeps one byte per weight (kernels/memory.py), with decay beta. delta "sign"
    lets only the sign of delta vote; delta_bits below 8 gives delta fewer levels; delta_scale "delayed" scales delta by
    the largest maximum of the last 16 steps, so that micro-batches add up to exactly the one big batch; its first step
    only measures. flip_at "backward" lets every layer learn as soon as its delta has passed, so that no operands are
    held until the step: the same weights for less memory. A layer used twice in a step is then refused.

    Raises ValueError if the model has no integer layer or a setting is unknown.
    """

    def __init__(
        self, model: nn.Module, *, k: float = 0.5, k_end: float = 0.0, k_schedule: str = "linear", k_warmup: int = 0,
        steps: int = 1000, rule: str = "spectral", embedding_rule: str = "balanced", ortho_tile: int = 128,
        select_tile: int = 64, flip_prob: str = "one", flip_gamma: float = 1.0, step_size: int = 1,
        memory: str = "none", beta: float = 0.9, delta: str = "int8", delta_scale: str = "step", seed: int = 1,
        flip_at: str = "step", delta_bits: int = 8,
    ):  # fmt: skip
        known = {
            "rule": (rule, RULES), "embedding_rule": (embedding_rule, RULES),
            "flip_prob": (flip_prob, ("one", "score")),
            "memory": (memory, ("none", "int8")), "delta": (delta, ("int8", "sign")),
            "delta_scale": (delta_scale, ("step", "delayed")), "k_schedule": (k_schedule, SCHEDULES),
            "flip_at": (flip_at, ("step", "backward")),
        }  # fmt: skip
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"FlipOptimizer: {name} is {value!r}; it must be one of {', '.join(choices)}")
        ranges = {
            "k": (k, 0 <= k <= 1, "from 0 to 1"), "k_end": (k_end, 0 <= k_end <= 1, "from 0 to 1"),
            "steps": (steps, steps >= 1, "at least 1"), "k_warmup": (k_warmup, k_warmup >= 0, "at least 0"),
            "step_size": (step_size, step_size >= 1, "at least 1"), "beta": (beta, 0 <= beta < 1, "from 0 to below 1"),
            "select_tile": (select_tile, select_tile >= 0, "at least 0"),
            "ortho_tile": (ortho_tile, ortho_tile >= 0, "at least 0"),
            "flip_gamma": (flip_gamma, flip_gamma > 0, "above 0"),
            "delta_bits": (delta_bits, 2 <= delta_bits <= 8, "from 2 to 8"),
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
        self.group_of: dict[int, Group] = {}
        for index, layer in enumerate(self.layers):
            layer.index = index
            layer.attach(self.clock)
            layer.set_delta(delta, delta_scale, delta_bits)
            own = replace(hidden, name=embedding_rule) if isinstance(layer, IntEmbedding) else hidden
            group = groups.setdefault((own, layer.bits), Group(own))
            group.add(layer)
            self.group_of[layer.index] = group
        self.groups = list(groups.values())
        self.flips: list[Tensor] = []  # of the step, on the device
        self.learned: set[int] = set()
        for layer in self.layers:
            layer.learn_now = self._learn_now if flip_at == "backward" else None
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
        for group in self.groups:
            self._learn(group, group.layers)
        for layer in self.layers:
            layer.finish_step()
        flips, self.flips, self.learned = self.flips, [], set()
        self.clock.advance(self.clock.step + 1)
        return int(torch.cat(flips).sum()) if flips else 0

    @torch.no_grad()
    def _learn_now(self, layer: IntLayer) -> None:
        """The step of one layer, called in its backward pass."""
        if layer.index in self.learned:
            raise ValueError(
                f"FlipOptimizer: integer layer {layer.index} had a second backward pass in one step, and flip_at = "
                "backward moved its weights in the first; take flip_at = step for micro-batches and for layers used "
                "twice"
            )
        self.learned.add(layer.index)
        self._learn(self.group_of[layer.index], [layer])
        layer.drop_votes()

    def _learn(self, group: Group, layers: list[IntLayer]) -> None:
        """Flip weights of a group's layers and note how many, without waiting for a GPU to have counted them."""
        layers = [layer for layer in layers if layer.has_votes()]
        if not layers:
            return
        k = scheduled(self.k, self.k_end, self.k_schedule, self.clock.step, self.steps, self.k_warmup)
        size = step_size_at(self.start_size, self.clock.step, self.steps)
        first_tiles, index = [group.first_tiles[layer.index] for layer in layers], group.layers[0].index
        observed = self.observer is not None and any(layer.watched for layer in layers)
        if on_triton(layers[0].weight) and not why_not(group.rule.select_tile, group.rule.flip_prob):
            places = zip(layers, first_tiles, strict=True)
            matrices = [Matrix(la.weight, la.index, first, self.memories.get(la.index)) for la, first in places]
            # The fused kernel never writes votes down; who wants to see them makes it two kernels, which flip alike.
            votes = [None if observed or isinstance(la, IntEmbedding) else la.operands() for la in layers]
            votes = [layer.take_votes() if v is None else v for layer, v in zip(layers, votes, strict=True)]
            rule = group.rule
            flips = learn_step(
                matrices, votes, rule=rule.name, bits=layers[0].bits, k=k, step_size=size, ortho_tile=rule.ortho_tile,
                select_tile=rule.select_tile, seed=self.clock.seed, step=self.clock.step, index=index, beta=self.beta,
            )  # fmt: skip
        else:
            votes = [layer.take_votes() for layer in layers]
            evidence = [self._remember(la, v) for la, v in zip(layers, votes, strict=True)] if self.memories else votes
            flips = torch.tensor(learn(group.rule, layers, evidence, first_tiles, index, k, size, self.clock))
        self.flips.append(flips)
        if observed:
            for row in zip(layers, votes, flips.tolist(), strict=True):
                self.observer(LayerStep(*row))

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
