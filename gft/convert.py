"""Turn the nn.Linear layers of a trained or new float net into integer ones, to be trained on by flips.

    gft.convert(net)                       weights rounded to a grid of 6 bits: nearly the same function
    gft.convert(net, bits=4, start="new")  new integer weights, whose products have the old ones' size
    flips = FlipOptimizer([layer.weight for layer in gft.int_layers(net)], lr=0.02)
    adamw = AdamW([p for p in net.parameters() if p.is_floating_point()], lr=1e-4)

A converted layer computes IntLinear(x) * rms(x) + bias. IntLinear normalises its input; the factor gives the size back,
so that the net computes what it did, up to the rounding of weights and activations. The bias stays a float.
"""

import torch
from torch import Tensor, nn

from gft.layers import IntLayer, IntLinear
from kernels.limits import weight_limit

SAMPLE = 1 << 16  # weights by which a unit is chosen


class ConvertedLinear(nn.Module):
    """An nn.Linear whose matrix is an IntLinear: x (..., in) to (..., out), with the bias it had."""

    def __init__(self, integer: IntLinear, bias: nn.Parameter | None):
        super().__init__()
        self.integer, self.bias = integer, bias

    def forward(self, x: Tensor) -> Tensor:
        """IntLinear(x) * rms(x) + bias, in the type of x if that has 16 bits."""
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        y = self.integer(x) * (mean_square + 1e-30).sqrt().to(x.dtype)  # a root of 0 has no derivative
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def convert(
    net: nn.Module, bits: int = 6, keep_bits: int = 0, start: str = "round", keep: str | tuple[str, ...] = (),
    seed: int = 1, levels: int = 3,
) -> nn.Module:  # fmt: skip
    """Replace every nn.Linear inside `net`, in place, by a `ConvertedLinear`; returns net.

    `bits`, `keep_bits` and `levels` are IntLinear's. `start` is "round" (weights rounded to the grid) or "new" (drawn
    afresh by `seed`; for a matrix of zeros, as wide as nn.Linear begins). `keep` names a layer or several that stay as
    they are, as `named_modules` does ("head", "blocks.0.mlp"), with all inside them. Subclasses of nn.Linear, such as
    the projection inside nn.MultiheadAttention, stay too. Hooks of a replaced layer are gone.
    Raises ValueError for an unknown `start` or name, where nothing is to be converted, for a weight that two modules
    share and for a layer that cannot be converted; `net` is then as it was.
    """
    modules = dict(net.named_modules())
    keep = (keep,) if isinstance(keep, str) else keep
    if start not in ("round", "new"):
        raise ValueError(f"convert: got start {start!r}; it is 'round' or 'new'")
    if unknown := [name for name in keep if name not in modules]:
        raise ValueError(f"convert: keep names {', '.join(unknown)}; net has {', '.join(filter(None, modules))}")
    kept = [name + "." for name in keep]
    chosen = {name: layer for name, layer in modules.items()
              if type(layer) is nn.Linear and name and not f"{name}.".startswith(tuple(kept))}  # fmt: skip
    if not chosen:
        raise ValueError(f"convert: {type(net).__name__} has no nn.Linear inside it to convert")
    owners: dict[int, list[str]] = {}
    for name, layer in net.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(layer, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    for name, layer in chosen.items():
        sharing = owners.get(id(layer.weight), [])
        if not sharing:
            raise ValueError(f"convert: {name}: a hook such as weight_norm or pruning computes its weight; remove the "
                             f"hook, or keep=({name!r},) leaves the layer as it is")  # fmt: skip
        if len(sharing) > 1:
            raise ValueError(f"convert: {' and '.join(sharing)} share one weight; keep=({name!r},) leaves it")
    converted = {}
    for index, (name, layer) in enumerate(chosen.items()):
        try:
            integer = IntLinear(
                layer.in_features, layer.out_features, bits, keep_bits=keep_bits, seed=seed, index=index, levels=levels
            )
            converted[name] = _converted(layer, integer, start)
        except ValueError as error:
            raise ValueError(f"convert: {name}: {error}; keep=({name!r},) leaves the layer as it is") from None
    for name, layer in converted.items():
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, layer)
    for module in modules.values():  # torch's fused inference would read the float weights itself
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return net


def _converted(layer: nn.Linear, integer: IntLinear, start: str) -> ConvertedLinear:
    """`layer` with the weights of `integer`, which take its own."""
    matrix = layer.weight.detach().float().cpu()
    norm = matrix.norm()
    if not norm.isfinite():
        raise ValueError("its weight has values that are not finite")
    if start == "round":
        if norm == 0:
            raise ValueError("its weight is all zeros, which no scale can bring back; start='new' draws another")
        integer.weight.copy_(to_grid(matrix, integer))
    elif norm == 0:
        norm = torch.tensor((layer.out_features / 3) ** 0.5)  # of nn.Linear's first weights, of variance 1 / (3 in)
    integer.scale.fill_((norm / integer.read().float().norm()).item())
    return ConvertedLinear(integer, layer.bias).to(layer.weight.device).train(layer.training)


def to_grid(matrix: Tensor, layer: IntLayer) -> Tensor:
    """A float matrix as weights that `layer` could keep, int8: what it reads of them is nearest to the matrix.

    The unit is the best of 80, in squares; with one or two bits read of more it makes W as wide as first weights.
    Where no zero can be read, one in the matrix takes the sign that the layer's weight has there: its average is 0.
    """
    negative = (matrix < 0) | (matrix == 0) & (layer.weight.to(matrix.device) < 0)
    if layer.keep_bits == 1:
        return torch.where(negative, -1, 1).to(torch.int8)
    if layer.bits <= 2 < layer.keep_bits:  # as wide as its own, for which the threshold is made
        steps = layer.weight.float().std().item() / matrix.std()
    else:
        q, _ = weight_limit(layer.bits)
        some = matrix.flatten()[:: max(1, matrix.numel() // SAMPLE)]
        units = matrix.abs().amax() / q * torch.logspace(-1.7, 0, 80)
        errors = [(some - torch.round(some / unit).clamp(-q, q) * unit).square().sum() for unit in units]
        steps = layer.q / q / units[torch.stack(errors).argmin()]
    grid = torch.round(matrix * steps).clamp(-layer.q, layer.q).to(torch.int8)
    reads_no_zero = layer.bits == 1 or layer.levels == 4  # what is kept as 0 reads as +1, as -1 below it
    return torch.where(negative & (grid == 0), -1, grid) if reads_no_zero else grid
