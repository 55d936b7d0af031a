"""NaN and infinity: noticed on the device in every step, traced to where they began once a run has stopped for them."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gft.layers import IntLayer, int_layers

KINDS = {"embedding": "embedding", "qkv": "attention", "out": "attention", "head": "head"}  # others are of the MLP


def note(found_inf: Tensor, value: Tensor) -> None:
    """Set `found_inf`, float32 (), to 1 if `value` () is not finite. Nothing is read on the host."""
    torch.maximum(found_inf, (~torch.isfinite(value)).float(), out=found_inf)


def largest(tensors: Iterable[Tensor | None]) -> Tensor:
    """The largest absolute value of all that are there: NaN if one is NaN, 0 of none."""
    return nn.utils.get_total_norm([t for t in tensors if t is not None], math.inf)


def origin(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> str:
    """What is not finite, the first in a step: a float weight, what a layer puts out, the error (delta) it is handed.

    Empty if nothing is in these batches. Integer layers do not learn afterwards: their votes are taken away.
    """
    for name, p in net.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            return f"the float weights of {_layer(net, name.removesuffix('.weight'))} became {_value(p)}"
    found: list[str] = []

    def look(what: str, name: str, tensor: Tensor) -> None:
        if not found and not torch.isfinite(tensor).all():
            found.append(f"{what} {_layer(net, name)} became {_value(tensor)}")

    def watch(name: str, y: Tensor | tuple[Tensor, Tensor]) -> None:
        y = y[0] if isinstance(y, tuple) else y  # beside the input, handed through
        look("the activations behind", name, y)
        y.register_hook(lambda delta: look("the error (delta) behind", name, delta))

    for layer in int_layers(net):
        layer.start_voting(None)
    layers = [(name, module) for name, module in net.named_modules() if hasattr(module, "weight")]
    hooks = [m.register_forward_hook(lambda m, x, y, name=name: watch(name, y)) for name, m in layers]
    for x, y in batches:
        loss_of(net(x), y).backward()
        net.zero_grad()
        if found:
            break
    for hook in hooks:
        hook.remove()
    return found[0] if found else ""


def _layer(net: nn.Module, name: str) -> str:
    number_format = "integer" if isinstance(net.get_submodule(name), IntLayer) else "float"
    return f"{name} ({KINDS.get(name.rpartition('.')[2], 'mlp')}, {number_format})"


def _value(tensor: Tensor) -> str:
    return "nan" if tensor.isnan().any() else "inf"
