"""Changes of the code that experiments try, by name: other ways to read few bits of a weight, and more.

    use("hysteresis 2")    from now on layers and optimizer of this process work that way

What is read may be any int8 values, as products do not ask how many different ones there are. `levels` are in units of
the kept weight, whose first values have a standard deviation of 10.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

import gft.baselines
import gft.layers
from gft.optimizer import FlipOptimizer
from gft.weight_grid import read_weight
from kernels.limits import THRESHOLDS, weight_limit

Read = Callable[[Tensor, int, int, int], Tensor]  # as gft.weight_grid.read_weight, without levels
STD = 0.33 * weight_limit(6)[0]  # of first weights in units of the kept grid


def threshold(stds: float) -> Read:
    """At two bits, 0 up to another number of standard deviations."""
    def read(weight: Tensor, bits: int, keep_bits: int, usual: int) -> Tensor:
        return read_weight(weight, bits, keep_bits, round(usual * stds / THRESHOLDS[3]))

    return read


def half_of_mean(weight: Tensor, bits: int, keep_bits: int, usual: int) -> Tensor:
    """At two bits, 0 up to half of the mean |w| there is now, as BitNet b1.58 rounds: the threshold follows."""
    size = weight.abs().float()
    return (torch.sign(weight) * (size > size.mean() / 2)).to(torch.int8)


def scaled_by_mean(weight: Tensor, bits: int, keep_bits: int, usual: int) -> Tensor:
    """The usual reading times four times the mean |w| there is now: the scale follows."""
    mean = torch.round(4 * weight.abs().float().mean())
    return (read_weight(weight, bits, keep_bits, usual) * mean.clamp(max=127)).to(torch.int8)


def two_scales(weight: Tensor, bits: int, keep_bits: int, usual: int) -> Tensor:
    """At two bits, instead of -1 and 1 four times the mean of what lies there, as trained ternary quantization has."""
    def level(there: Tensor) -> Tensor:
        return torch.round(4 * (weight * there).float().sum() / there.sum().clamp(min=1)).clamp(-127, 127)

    below, above = weight < -usual, weight > usual
    return (below * level(below) + above * level(above)).to(torch.int8)


def table(edges: Sequence[float], levels: Sequence[int]) -> Read:
    """Of |w|: levels[i] below edges[i], the last one beyond all edges."""
    def read(weight: Tensor, bits: int, keep_bits: int, usual: int) -> Tensor:
        size = weight.abs().float()
        level = torch.full_like(weight, levels[0])
        for edge, here in zip(edges, levels[1:], strict=True):
            level = torch.where(size >= edge, here, level)
        return (level * torch.sign(weight)).to(torch.int8)

    return read


def quantiles(count: int) -> Read:
    """`count` levels, an odd number, each the mean of as many first weights as every other."""
    normal = NormalDist(0, STD)
    ends = [normal.inv_cdf(n / count) for n in range(1, count)]
    density = [0.0, *(normal.pdf(end) * STD**2 for end in ends), 0.0]
    means = [count * (low - high) for low, high in zip(density, density[1:], strict=False)]
    unit = 127 / means[-1] / 2  # room for nothing: the largest level is read as 64
    half = means[count // 2 :]
    return table(ends[count // 2 :], [round(unit * mean) for mean in half])


def hysteresis(jump: int) -> Callable[[], None]:
    """A weight that comes to be read otherwise goes `jump` units further the same way, so that it does not turn back
    at once. This needs no memory."""
    def install() -> None:
        step = FlipOptimizer.step

        @torch.no_grad()
        def stepped(self: FlipOptimizer, closure: Callable | None = None):
            before = [layer.read().clone() for layer in self.layers]
            loss = step(self, closure)
            for layer, old in zip(self.layers, before, strict=True):
                way = torch.sign(layer.read() - old)
                layer.weight.copy_((layer.weight.to(torch.int16) + jump * way).clamp(-layer.q, layer.q))
            return loss

        FlipOptimizer.step = stepped

    return install


def annealed(share: float, fewer: float) -> Callable[[], None]:
    """In the last `share` of a run a weight keeps no more than is read of it, and k is divided by `fewer`."""
    def install() -> None:
        step = FlipOptimizer.step

        @torch.no_grad()
        def stepped(self: FlipOptimizer, closure: Callable | None = None):
            late = all(group["lr"] <= share * group["initial_lr"] for group in self.param_groups)
            rates = [group["lr"] for group in self.param_groups]
            for layer in self.layers if late else ():
                if layer.keep_bits != layer.bits:
                    layer.weight.copy_(layer.read())
                    layer.keep_bits, layer.q = layer.bits, weight_limit(layer.bits)[0]
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr / fewer if late else lr
            loss = step(self, closure)
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr
            return loss

        FlipOptimizer.step = stepped

    return install


def embedding_k(factor: float) -> Callable[[], None]:
    """The share of the embedding's rows that move is k times `factor`: the first group is that of embeddings."""
    def install() -> None:
        step = FlipOptimizer.step

        def stepped(self: FlipOptimizer, closure: Callable | None = None):
            group = self.param_groups[0]
            lr, group["lr"] = group["lr"], group["lr"] * factor
            loss = step(self, closure)
            group["lr"] = lr
            return loss

        FlipOptimizer.step = stepped

    return install


def tied() -> None:
    """Embedding and head are one matrix: both vote for it, each in its own units, and the embedding's rule moves it.

    Votes become the gradient of the loss by one factor for each layer (its sigma, scale and the unit of X), so that
    they are added as such, on a grid of 2^30. In a float net the head reads the embedding's weight over sqrt(width).
    """
    import train

    make, step = train.make_net, FlipOptimizer.step

    def made(*arguments) -> torch.nn.Module:
        net = make(*arguments)
        if isinstance(net.embedding, gft.layers.IntEmbedding):
            net.head.weight.copy_(net.embedding.weight)
        else:
            net.head.weight, net.head.gain = net.embedding.weight, net.head.gain / net.embedding.weight.shape[1] ** 0.5
        return net

    @torch.no_grad()
    def stepped(self: FlipOptimizer, closure: Callable | None = None):
        embedding = next(la for la in self.layers if isinstance(la, gft.layers.IntEmbedding))
        head = next(la for la in self.layers[::-1] if la.weight.shape == embedding.weight.shape)
        unit = embedding.votes_scale * embedding.scale
        gradient = embedding.votes.double() * unit
        gradient += head.votes.double() * (head.votes_scale * head.scale * head.act_range / 127)
        embedding.votes.copy_(torch.round(gradient * (2.0**30 / gradient.abs().max())))
        head.votes.zero_()
        loss = step(self, closure)
        head.weight.copy_(embedding.weight)
        return loss

    train.make_net, FlipOptimizer.step = made, stepped


def four_levels_of_latent_weights() -> None:
    """Quantization-aware training at two bits with the four values that GFT's `levels = 4` has, -3, -1, 1 and 3 units.

    The unit is half the step that loses least of a normal distribution in four equal steps (Max, 1960): 0.996 standard
    deviations, of which the mean size is sqrt(2 / pi).
    """
    usual = gft.baselines.fake_quantize

    def fake_quantize(w: Tensor, bits: int | None) -> Tensor:
        if bits != 2:
            return usual(w, bits)
        unit = w.detach().abs().mean() * (0.996 / 2 / (2 / math.pi) ** 0.5)
        level = torch.where(w.abs() > 2 * unit, 3.0, 1.0) * torch.where(w < 0, -1.0, 1.0)
        return w + (level * unit - w).detach()

    gft.baselines.fake_quantize = fake_quantize


READS: dict[str, Read] = {
    **{f"threshold {stds}": threshold(stds) for stds in (0.2, 0.7)},
    "threshold half of the mean size": half_of_mean,
    "scale the mean size": scaled_by_mean,
    "two scales": two_scales,
    "powers of two, 7 levels": table([3, 9, 18], [0, 1, 2, 4]),
    "powers of two, 13 levels": table([0.5, 1.5, 3, 6, 12, 24], [0, 1, 2, 4, 8, 16, 32]),
    **{f"quantiles, {count} levels": quantiles(count) for count in (7, 15)},
}
OTHERS: dict[str, Callable[[], None]] = {
    **{f"hysteresis {jump}": hysteresis(jump) for jump in (1, 2)},
    **{f"keep_bits 2 in the last fifth, k / {fewer}": annealed(0.2, fewer) for fewer in (20, 60)},
    **{f"embedding's k times {factor}": embedding_k(factor) for factor in (0.25, 0.5, 2.0)},
    "tied": tied,
    "four levels of latent weights": four_levels_of_latent_weights,
}


def use(name: str) -> None:
    """Make the change that `name` says. Raises KeyError on an unknown name."""
    if name in READS:
        gft.layers.read_weight = lambda *arguments: READS[name](*arguments[:4])
    else:
        OTHERS[name]()
