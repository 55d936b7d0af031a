"""The first weights of a run from those of another (--init_from): other steps, k, bits, text, images or method.

A layer stands for a real matrix: W s of integers as they are read, w gain of floats. Layers of the same kind are copied
exactly. So are integers that keep the same number of bits, even if fewer of them are now read. Otherwise a float layer
takes the matrix as it is, an integer one on the grid that is nearest in squares,

    W = clip(round(M / u), -Q, Q),   u = the best of 80 units up to max|M| / Q,   s = |M| / |W|  (Frobenius norms)

so that its outputs keep their size. (With one or two bits read of more, u is what makes W as wide as first weights.)
Characters, tokens and classes keep their rows of embedding and head, by name; others get those of a new net, as does a
first layer of another shape.
"""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gft.baselines import FloatLinear, fake_quantize
from gft.convert import to_grid
from gft.layers import IntLayer
from run.config import Config, show
from run.errors import UserError

SHAPE = ("model", "n_layer", "n_head", "d_model")  # keys that must be the same
SHOWN = 12  # new characters or classes that are named


def check_shape(cfg: Config, old: Config, head: object) -> None:
    """Raises UserError(code=2) if a net of cfg cannot start from one of `old`, which is saved in `head`."""
    keys = [key for key in SHAPE if key != "n_head" or cfg.model == "transformer"]
    if wrong := [key for key in keys if getattr(cfg, key) != getattr(old, key)]:
        have = "; ".join(f"{key} = {show(getattr(old, key))} there, {show(getattr(cfg, key))} here" for key in wrong)
        same = " ".join(f"--{key} {getattr(old, key)}" for key in wrong)
        raise UserError(f"init_from: {head} is a net of another shape: {have}; to start from it, give {same}", code=2)


@torch.no_grad()
def take_weights(net: nn.Module, old: nn.Module, saved: Mapping[str, Any], old_saved: Mapping[str, Any]) -> list[str]:
    """Give `net`, new and of the same shape, the weights of `old`; `saved` is what data.task.Task.saved gives of each.

    Returns what must be said of it, in lines.
    """
    rows, lines = _known(names_of(saved), names_of(old_saved), "classes" if "classes" in saved else "tokens")
    for name, layer in net.named_modules():
        if not hasattr(layer, "weight"):
            continue
        source = old.get_submodule(name)
        some = rows if name == "head" or (name == "embedding" and "tokenizer" in saved) else None
        if layer.weight.shape[1] != source.weight.shape[1] or (
            some is None and len(layer.weight) != len(source.weight)
        ):
            lines.append(f"{name} is new: it is {_size(layer)} here, {_size(source)} there")
        elif some is None or some[0]:
            _take(layer, source, some)
    return lines


def names_of(saved: Mapping[str, Any]) -> list[Any]:
    """What the rows of the head stand for: names of classes, or the bytes of each token (GPT-2's: its number)."""
    if "classes" in saved:
        return list(saved["classes"])
    tokenizer = saved["tokenizer"]
    if tokenizer["kind"] == "char":
        return [c.encode("utf-8", "surrogatepass") for c in sorted(set(tokenizer["chars"]))]
    return [base64.b64decode(token) for token in tokenizer["ranks"]] if "ranks" in tokenizer else list(range(50257))


def _known(new: list[Any], old: list[Any], what: str) -> tuple[tuple[list[int], list[int]] | None, list[str]]:
    """Rows here and there that stand for the same, None if all do, and what is to be said."""
    if new == old:
        return None, []
    there = {name: row for row, name in enumerate(old)}
    here = [row for row, name in enumerate(new) if name in there]
    fresh = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in new if name not in there]
    line = f"{len(here)} of {len(new)} {what} have their rows from there"
    if fresh:
        line += f"; new: {', '.join(map(repr, fresh[:SHOWN]))}{', ...' if len(fresh) > SHOWN else ''}"
    return (here, [there[new[row]] for row in here]), [line]


def _size(layer: nn.Module) -> str:
    return " x ".join(map(str, layer.weight.shape))


def _take(layer: nn.Module, source: nn.Module, rows: tuple[list[int], list[int]] | None) -> None:
    """Give `layer` the weights of `source`; only some rows, (here, there), if these are named."""
    here, there = rows or (slice(None), slice(None))
    integers = isinstance(layer, IntLayer) and isinstance(source, IntLayer)
    same = integers and all(
        getattr(layer, name) == getattr(source, name) for name in ("bits", "threshold", "levels")
    )
    if integers and layer.keep_bits == source.keep_bits and layer.bits <= source.bits:
        layer.weight[here] = source.weight[there].to(layer.weight.device)
        sizes = source.read()[there].float().norm().cpu(), layer.read()[here].float().norm().cpu()
        layer.scale.copy_(source.scale if same else source.scale.cpu() * sizes[0] / sizes[1])
        return
    if not integers and type(layer) is type(source) and layer.bits == source.bits:
        layer.weight[here] = source.weight[there].to(layer.weight.device)
        return
    matrix = _matrix(layer)
    matrix[here] = _matrix(source)[there]
    if isinstance(layer, IntLayer):
        layer.weight.copy_(to_grid(matrix, layer))
        layer.scale.fill_((matrix.norm() / layer.read().float().norm()).item())
    else:
        layer.weight.copy_(matrix / _gain(layer))


def _gain(layer: nn.Module) -> float:
    return layer.gain if isinstance(layer, FloatLinear) else 1.0


def _matrix(layer: nn.Module) -> Tensor:
    """The real matrix that a layer stands for, on the CPU."""
    if isinstance(layer, IntLayer):
        return (layer.read() * layer.scale).cpu()
    return (fake_quantize(layer.weight, layer.bits) * _gain(layer)).cpu()
