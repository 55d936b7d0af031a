"""FlipOptimizer: the torch optimizer that moves integer weights.

    opt = FlipOptimizer(net.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    loss.backward(); opt.step(); scheduler.step()

`lr` is the paper's k, the share of weights that may move in a step. Without `momentum` nothing is kept between steps
but their number. Float parameters belong to a torch optimizer beside it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gft.beside import beside, wait
from gft.distributed import Exchange
from gft.layers import IntLayer, owner_of
from kernels.flip import flip
from kernels.limits import MAX_REDUCTION, RULES
from kernels.momentum import empty_momentum
from kernels.update_rule import UpdateRule

RULE_KEYS = tuple(f.name for f in fields(UpdateRule) if f.name != "bits")  # bits are the layer's


@dataclass
class Stack:
    """Layers of one group whose weights have one shape and keep as many bits, so that one call moves them all.

    group is the number of their param group; flips int64 (L,) counts the moves of each since the optimizer was made.
    """

    group: int
    layers: list[IntLayer]
    numbers: Tensor  # of the layers in the optimizer, int64 (L,): each has random streams of its own
    flips: Tensor


class FlipOptimizer(torch.optim.Optimizer):
    """Moves int8 weights by the votes of the backward passes since the last step.

    params are int8 weights of IntLinear and IntEmbedding layers, or groups of them, as for any torch optimizer. `lr`, a
    float or a float64 tensor, is the share of weights selected, so that torch's schedulers drive it. Of each group:

    rule, ortho_tile              how votes become scores (kernels/scores.py)
    topk_tile                     side of the tiles in which the share is taken, 0 for whole matrices
    momentum                      0, or the decay of an int8 momentum of votes, one byte a weight (kernels/momentum.py)
    step_size                     the largest move in units
    flip_prob, flip_gamma         "one", or "score": a selected weight moves with p = (score / largest)^gamma
    update                        "step", or "backward": moves are made inside the backward pass, so that votes of
                                  one layer at a time are in memory, or of none (kernels/learn.py); a weight
                                  may then be used once between two steps
    max_tokens                    the most tokens whose votes one step sums; past 133,144 votes are int64

    With `process_group`, its ranks train one net, each on its part of the batch (gft/distributed.py); max_tokens are
    those of all. `step`, `flips`, `state_dict` and, with a delta scale of the step, every backward pass then wait
    for the other ranks. Set `exchange.last_pass` before a step's last backward pass: votes then leave during it.

    A step changes no weight and no state where `found_inf`, float32 () on the device, is not 0, or where a delta was
    not finite; `stopped`, float32 () on the device, is then not 0 until the next step.
    Weights of one shape move to one buffer when the optimizer is made, so that no step must copy them: torch.save of
    one of them then writes the buffer, and safetensors saves a state_dict but not, by `save_model`, a net.
    Raises ValueError for a parameter that is not int8, by its name where params are named, and for unknown settings.
    """

    exchange: Exchange | None = None
    _step_supports_amp_scaling = True  # so that a GradScaler reaches `step`, which says that it is not needed

    def __init__(
        self, params: Iterable, lr: float | Tensor = 0.5, *, rule: str = "spectral", ortho_tile: int = 128,
        topk_tile: int = 64, momentum: float = 0.0, step_size: int = 1, flip_prob: str = "one", flip_gamma: float = 1.0,
        update: str = "step", max_tokens: int = MAX_REDUCTION, process_group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        several = process_group is not None and dist.get_world_size(process_group) > 1
        self.exchange = Exchange(process_group) if several else None
        self.layers: list[IntLayer] = []
        self.stacks: list[Stack] = []
        defaults = {
            "lr": lr, "rule": rule, "ortho_tile": ortho_tile, "topk_tile": topk_tile, "momentum": momentum,
            "step_size": step_size, "flip_prob": flip_prob, "flip_gamma": flip_gamma, "update": update,
            "max_tokens": max_tokens,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Each weight's layer gets a buffer for votes, its state and its random streams."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            if not group["params"]:
                raise ValueError("FlipOptimizer: got a group without parameters; it needs weights of integer layers")
            layers = [_layer_of(group, place) for place in range(len(group["params"]))]
            if self.exchange is not None:
                self.exchange.check(group["max_tokens"], group["update"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._adopt(len(self.param_groups) - 1, layers)

    def _adopt(self, number: int, layers: list[IntLayer]) -> None:
        """Make the layers of group `number` ready to train, and stack those of one shape."""
        group = self.param_groups[number]
        device, in_backward = layers[0].weight.device, group["update"] == "backward"
        if not hasattr(self, "found_inf"):
            self.found_inf = self.stopped = torch.zeros((), device=device)
        votes_dtype = torch.int64 if group["max_tokens"] > MAX_REDUCTION else torch.int32
        alike: dict[Any, list[int]] = {}  # the numbers of layers that one call can move
        for layer in layers:
            number_of_layer = len(self.layers)
            layer.first_column = sum(other.delta_width for other in self.layers)
            layer.start_voting(None if in_backward else votes_dtype)
            self.layers.append(layer)
            kind = number_of_layer if in_backward else (layer.weight.shape, layer.keep_bits)
            alike.setdefault(kind, []).append(number_of_layer)
        if self.exchange is not None:
            self.exchange.adopt(layers)
            alike = {kind: own for kind, ns in alike.items() if (own := [n for n in ns if self.exchange.owns(n)])}
        for numbers in alike.values():
            members = [self.layers[i] for i in numbers]
            if self.exchange is None and not in_backward:
                _share_votes(members)
                _share_weights(members)
            flips = torch.zeros(len(numbers), dtype=torch.int64, device=device)
            self.stacks.append(Stack(number, members, torch.tensor(numbers, device=device), flips))
        self.settings_changed()

    def settings_changed(self) -> None:
        """Tell the layers of groups with update = "backward" how they learn in the next backward pass.

        `step` does so too; call it after a change of a group's settings that must not wait for the next step.
        """
        self._match_momentum()
        for stack in self.stacks:
            group, layer = self.param_groups[stack.group], stack.layers[0]
            if group["update"] != "backward":
                continue
            group["lr"] = self._share(group["lr"])  # a tensor, so that a change compiles nothing anew
            state, rule = self.state[layer.weight], self._rule(stack)
            layer.learning = (
                group["lr"], self.found_inf, stack.numbers, stack.flips,
                torch.zeros((), dtype=torch.bool), state.get("momentum"), state.get("momentum_scale"),
                rule.rule, rule.bits, rule.ortho_tile, rule.topk_tile, rule.momentum,
                rule.step_size, rule.flip_prob, rule.flip_gamma,
            )  # fmt: skip

    def _match_momentum(self) -> None:
        """An empty momentum for each weight that needs one, none for others: a group's `momentum` may change later."""
        for stack in self.stacks:
            states = [self.state[layer.weight] for layer in stack.layers]
            if not self.param_groups[stack.group]["momentum"]:
                for state in states:
                    state.pop("momentum", None), state.pop("momentum_scale", None)
            elif any("momentum" not in state for state in states):
                momenta, scales = zip(*(empty_momentum(layer.weight) for layer in stack.layers), strict=True)
                for state, momentum, scale in zip(states, _together(momenta), _together(scales), strict=True):
                    state.setdefault("momentum", momentum), state.setdefault("momentum_scale", scale)

    def _rule(self, stack: Stack) -> UpdateRule:
        group = self.param_groups[stack.group]
        return UpdateRule(bits=stack.layers[0].keep_bits, **{key: group[key] for key in RULE_KEYS})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move weights by the votes of the backward passes since the last step, and clear the votes.

        Nothing is read on the host where Triton kernels make the moves (`unsupported_reason` in kernels/update_rule.py
        says where not), so a step can be captured in a CUDA graph (with `lr` a tensor). Returns what closure returned.
        Raises RuntimeError under a GradScaler, as delta has a scale of its own, and if a layer's weight has been
        replaced since the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_usable()
        self._match_momentum()
        wait()  # for votes of a backward pass that ended in an error
        if self.exchange is not None:
            self._agree()
            self.exchange.collect()
        stop = self.stopped = self._stop()
        for number, group in enumerate(self.param_groups):
            if group["update"] == "step":
                k = self._share(group["lr"])
                for place, stack in enumerate(stack for stack in self.stacks if stack.group == number):
                    if place % 2:
                        beside(k.device, self._flip, stack, k, stop)  # two stacks at a time
                    else:
                        self._flip(stack, k, stop)
                wait()
        if self.exchange is not None:
            self.exchange.spread([layer.weight for layer in self.layers])
        _advance(self.layers, stop)
        self.settings_changed()
        return loss

    def _check_usable(self) -> None:
        """Raises RuntimeError under a GradScaler, or if a layer has another weight than the one that was given."""
        if hasattr(self, "grad_scale"):  # set by a GradScaler, as found_inf is then
            del self.grad_scale
            self.found_inf = torch.zeros((), device=self.layers[0].weight.device)
            raise RuntimeError("FlipOptimizer: integer layers need no GradScaler; call loss.backward() and opt.step()")
        given = [p for group in self.param_groups for p in group["params"]]
        moved = any(layer.weight.device != self.found_inf.device for layer in self.layers)
        if moved or any(layer.weight is not p for layer, p in zip(self.layers, given, strict=True)):
            raise RuntimeError(
                "FlipOptimizer: a layer's weight is not where, or what, it was: load_state_dict(assign=True) or a move "
                "to another device has replaced it; make the optimizer after that"
            )

    def _stop(self) -> Tensor:
        """Not 0, perhaps NaN, where `found_inf` is not, or a layer's delta was not finite in this step: float32 ()."""
        return self.found_inf + 0.0 * torch.stack(self._largest()).sum()  # 0 times an infinity is NaN

    def _largest(self) -> list[Tensor]:
        """Of each layer the largest sigma or delta of this step."""
        return [la.votes_scale if la.delta_history is None else la.delta_history[0] for la in self.layers]

    def _agree(self) -> None:
        """found_inf and each layer's largest become the maximum over ranks."""
        own = [self.found_inf, *self._largest()]
        torch._foreach_copy_(own, list(self.exchange.max(torch.stack(own)).unbind()))

    def _share(self, lr: float | Tensor) -> Tensor:
        """lr as the kernels take it, float64 () on the device."""
        device = self.found_inf.device
        return lr.to(device) if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device)

    def _flip(self, stack: Stack, k: Tensor, stop: Tensor) -> None:
        """The step of one stack."""
        layers, rule = stack.layers, self._rule(stack)
        weights = [layer.weight for layer in layers]
        names = ("momentum", "momentum_scale") if rule.momentum else ()
        changing = [weights, *([self.state[w][name] for w in weights] for name in names)]
        votes, stacked = _stacked([layer.votes for layer in layers]), [_stacked(tensors) for tensors in changing]
        weight, *momentum = stacked if rule.momentum else (*stacked, None, None)
        flip(votes, weight, k, layers[0].rng, stack.numbers, stop, rule, *momentum, stack.flips)
        for tensors, changed in zip(changing, stacked, strict=True):
            if changed.data_ptr() != tensors[0].data_ptr():  # it is a copy
                torch._foreach_copy_(tensors, list(changed.unbind()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop votes of backward passes that no step has used; `set_to_none` is torch's and changes nothing."""
        if self.exchange is not None:
            self.exchange.drop()
        wait()
        _clear(self.layers)
        if newest := [layer.delta_history[0] for layer in self.layers if layer.delta_history is not None]:
            torch._foreach_zero_(newest)
        self.settings_changed()

    @torch.no_grad()
    def flips(self) -> Tensor:
        """Moves since the optimizer was made or loaded: int64 () on the device."""
        own = torch.zeros((), dtype=torch.int64, device=self.found_inf.device)
        for stack in self.stacks:
            own += stack.flips.sum()
        return own if self.exchange is None else self.exchange.sum(own)

    def votes_bytes(self) -> int:
        """Bytes of votes while a step is being made: 4 or 8 per weight, 0 with update = "backward"."""
        return sum(layer.votes.nbytes for layer in self.layers if layer.votes is not None)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with what each layer needs to go on exactly: its step and, if it has one, its delayed scale."""
        for layer in self.layers:
            self.state[layer.weight].update(layer.kept_state())
        found = super().state_dict()
        # Torch has them in the order of first use, which is that of the stacks.
        found["state"] = {number: dict(found["state"][number]) for number in range(len(self.layers))}
        if self.exchange is not None:
            self._complete(found["state"])
        return found

    def _complete(self, states: dict[int, dict[str, Tensor]]) -> None:
        """Add the momentum that other ranks keep."""
        wanted = [bool(group["momentum"]) for group in self.param_groups for _ in group["params"]]
        for number, layer in enumerate(self.layers):
            if wanted[number] and not self.exchange.owns(number):
                states[number]["momentum"], states[number]["momentum_scale"] = empty_momentum(layer.weight)
        none, sent = torch.zeros(0, device=self.found_inf.device), self.exchange.bytes_sent
        for name in ("momentum", "momentum_scale"):
            self.exchange.spread([states[number].get(name, none) for number in range(len(self.layers))])
        self.exchange.bytes_sent = sent  # those of steps alone

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, into the tensors that are there, and start without votes and flips.

        Raises ValueError if it is that of other layers or of another momentum setting.
        """
        whole = list(self.state_dict()["state"].values())
        own = [self.state[p] for group in self.param_groups for p in group["params"]]
        given = [state_dict["state"].get(i, {}) for i in range(len(own))]
        shapes = [[{name: t.shape for name, t in state.items()} for state in states] for states in (whole, given)]
        if len(state_dict["state"]) != len(own) or shapes[0] != shapes[1]:
            raise ValueError(
                f"FlipOptimizer: the state dict does not match: it is that of {_described(given)}, and this optimizer "
                f"has {_described(whole)}; make the optimizer as it was when the state was saved"
            )
        super().load_state_dict(state_dict)
        layers = [owner_of(p) for group in self.param_groups for p in group["params"]]
        for layer, state in zip(layers, own, strict=True):
            for name, tensor in state.items():
                tensor.copy_(self.state[layer.weight][name])
            self.state[layer.weight] = state
        self._adopt_all()  # settings may be others now

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "stacks"):  # a copy, of which torch keeps groups and state alone
            self._adopt_all()

    def _adopt_all(self) -> None:
        self.layers, self.stacks = [], []
        if self.exchange is not None:
            self.exchange.forget()
        for number, group in enumerate(self.param_groups):
            self._adopt(number, [_layer_of(group, place) for place in range(len(group["params"]))])


def _described(states: Sequence[dict[str, Any]]) -> str:
    """Of how many layers states are, with how much momentum."""
    momenta = [state["momentum"].numel() for state in states if "momentum" in state]
    return f"{sum(map(bool, states))} layers, {len(momenta)} with momentum of {sum(momenta):,} bytes in all"


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(L, ...): a view of one tensor, or of several that are one buffer's rows, else a copy."""
    first = tensors[0]
    if not _are_together(tensors):
        return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _are_together(tensors: Sequence[Tensor]) -> bool:
    """Whether these tensors of one shape are one buffer's rows."""
    first, buffers = tensors[0], {t.untyped_storage().data_ptr() for t in tensors}
    rows = [first.storage_offset() + i * first.numel() for i in range(len(tensors))]
    return len(buffers) == 1 and [t.storage_offset() for t in tensors] == rows and all(
        t.is_contiguous() for t in tensors
    )


def _together(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of one shape as the rows of one buffer, so that no step must gather them."""
    return tensors if _are_together(tensors) else torch.stack(tensors).unbind()


def _share_votes(layers: list[IntLayer]) -> None:
    """Let the votes of layers of one shape lie in one buffer, so that no step must gather them."""
    first = layers[0].votes
    votes = torch.zeros((len(layers), *first.shape), dtype=first.dtype, device=first.device)
    for layer, rows in zip(layers, votes.unbind(), strict=True):
        layer.votes = rows


def _share_weights(layers: list[IntLayer]) -> None:
    """As `_share_votes`, but where a weight would not begin on 16 bytes, as products read it faster."""
    if layers[0].weight.nbytes % 16 == 0:
        for layer, rows in zip(layers, _together([layer.weight.data for layer in layers]), strict=True):
            layer.weight.data = rows


def _clear(layers: list[IntLayer]) -> None:
    """Votes, their scales and the rows seen to 0."""
    torch._foreach_zero_([layer.rng[2] for layer in layers])
    torch._foreach_zero_([layer.votes_scale for layer in layers])
    if votes := [layer.votes for layer in layers if layer.votes is not None]:
        torch._foreach_zero_(votes)


def _advance(layers: list[IntLayer], stop: Tensor) -> None:
    """To the next step: the step's number, no votes, histories of delta one further."""
    torch._foreach_add_([layer.rng[1] for layer in layers], 1)
    _clear(layers)
    if histories := [layer.delta_history for layer in layers if layer.delta_history is not None]:
        old = torch.stack(histories)
        moved = torch.nan_to_num(torch.cat([torch.zeros_like(old[:, :1]), old[:, :-1]], dim=1), nan=0.0, posinf=0.0)
        kept = torch.cat([torch.zeros_like(old[:, :1]), old[:, 1:]], dim=1)
        torch._foreach_copy_(histories, list(torch.where(stop != 0, kept, moved).unbind()))


def _layer_of(group: dict[str, Any], place: int) -> IntLayer:
    """The layer of a group's parameter. Raises ValueError, naming the parameter, if it is no integer weight."""
    p = group["params"][place]
    name = group["param_names"][place] if "param_names" in group else f"number {place} of the group"
    if p.dtype != torch.int8:
        raise ValueError(f"FlipOptimizer: parameter {name} is {p.dtype}; it moves int8 weights only, so give this one "
                         "to a torch optimizer such as AdamW")  # fmt: skip
    try:
        return owner_of(p)
    except ValueError as error:
        raise ValueError(f"FlipOptimizer: parameter {name}: {error}") from None


def _check_settings(group: dict[str, Any]) -> None:
    """Raises ValueError naming a setting of the group that is unknown or out of range."""
    choices = {"rule": RULES, "flip_prob": ("one", "score"), "update": ("step", "backward")}
    for name, known in choices.items():
        if group[name] not in known:
            raise ValueError(f"FlipOptimizer: {name} is {group[name]!r}; it must be one of {', '.join(known)}")
    lr = group["lr"]
    ranges = {
        "lr": (lr.dtype == torch.float64 if isinstance(lr, Tensor) else 0 <= lr <= 1, "from 0 to 1, a tensor float64"),
        "momentum": (0 <= group["momentum"] < 1, "from 0 to below 1"),
        "step_size": (group["step_size"] >= 1, "at least 1"),
        "topk_tile": (group["topk_tile"] >= 0, "at least 0"),
        "ortho_tile": (group["ortho_tile"] >= 0, "at least 0"),
        "flip_gamma": (group["flip_gamma"] > 0, "above 0"),
    }
    for name, (right, rule) in ranges.items():
        if not right:
            raise ValueError(f"FlipOptimizer: {name} is {group[name]}; it must be {rule}")
