"""The baselines: IntLinear's and IntEmbedding's formulas with fp32 weights, rounded ones for "ste"; signSGD, and Muon
that keeps its momentum in fewer bytes or none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gft.weight_grid import initial_weight
from kernels.limits import weight_limit


class FloatLinear(nn.Module):
    """The baselines' layer: IntLinear's formula with fp32 weights, or (`bits`) latent ones rounded to `bits` bits.

    The straight-through estimator passes the gradient to the latent weight as if it had not been rounded; the
    grid is max|w| / Q per matrix, mean|w| at one and two bits.
    """

    def __init__(
        self, in_features: int, out_features: int, gain: float, squared_relu: bool, bits: int | None, seed: int,
        index: int,
    ):  # fmt: skip
        super().__init__()
        start = initial_weight((out_features, in_features), 8, 0.33, seed, index).float()
        self.weight = nn.Parameter(start / start.std() / in_features**0.5)
        self.gain, self.squared_relu, self.bits = gain, squared_relu, bits

    def forward(
        self, x: Tensor, residual: Tensor | None = None, fork: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., in) to (..., out), plus residual (..., out) if given; with `fork`, also x itself, as IntLinear's.

        Beside integer layers that hand on 16 bits the products are fp32 and the output is as the input.
        """
        beside, given = x, None if torch.is_autocast_enabled(x.device.type) else x.dtype
        if given is not None:
            x = x.to(self.weight.dtype)
        if self.squared_relu:
            x = F.relu(x).square()
        y = F.linear(F.rms_norm(x, x.shape[-1:]), fake_quantize(self.weight, self.bits)) * self.gain
        y = y if given is None else y.to(given)
        y = y if residual is None else residual + y
        return (y, beside) if fork else y


class FloatEmbedding(nn.Module):
    """The baselines' embedding: rows of unit variance."""

    def __init__(self, rows: int, width: int, bits: int | None, seed: int, index: int):
        super().__init__()
        start = initial_weight((rows, width), 8, 0.33, seed, index).float()
        self.weight, self.bits = nn.Parameter(start / start.std()), bits

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...) to (..., width)."""
        return F.embedding(tokens, fake_quantize(self.weight, self.bits))


def fake_quantize(w: Tensor, bits: int | None) -> Tensor:
    """w on the grid of `bits` bits, with the gradient of w itself (straight-through); None returns w."""
    if bits is None:
        return w
    q, _ = weight_limit(bits)
    grid = (w.abs().mean() if bits <= 2 else w.abs().amax() / q).detach()
    rounded = torch.where(w < 0, -1.0, 1.0) if bits == 1 else torch.round(w / grid).clamp(-q, q)
    return w + (rounded * grid - w).detach()


class SignSGD(torch.optim.Optimizer):
    """Every weight moves by lr against the sign of its gradient (Bernstein et al. 2018). Weight decay is decoupled."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient. No closure is taken."""
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])


MUON_BLOCK = 2048  # momenta that share a scale, as in the paper


class Muon(torch.optim.Muon):
    """torch's Muon with momentum 0.95, of which `state` is kept between steps.

    fp32    as torch's
    int8    on a linear grid of 255 values in blocks of `MUON_BLOCK`, rounded to nearest (arXiv 2509.23106)
    none    nothing, and no momentum: each row of a gradient is normalised, then the gradient is orthogonalised
            (SWAN, Ma et al., arXiv 2412.13148)
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, state: str = "fp32"):
        momentum = 0.0 if state == "none" else 0.95
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=bool(momentum))
        self.keeps = state

    @torch.no_grad()
    def step(self) -> None:
        """As torch's; what is kept in int8 is float32 during a step. No closure is taken."""
        states = [(p, self.state[p]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, state in states:
            if self.keeps == "none":
                p.grad.div_(p.grad.square().mean(dim=1, keepdim=True).sqrt_().clamp_min_(torch.finfo(p.dtype).tiny))
            elif "momentum_int8" in state:
                blocks = _blocks(state.pop("momentum_int8").float()) * state.pop("momentum_scale")
                state["momentum_buffer"] = blocks.view(-1)[: p.numel()].view(p.shape)
        super().step()
        for p, state in states:
            if self.keeps == "none":
                state.clear()
            elif self.keeps == "int8":
                blocks = _blocks(state.pop("momentum_buffer"))
                state["momentum_scale"] = scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).clamp_min_(1e-30)
                state["momentum_int8"] = torch.round(blocks / scale).to(torch.int8).view(-1)[: p.numel()].view(p.shape)


def _blocks(values: Tensor) -> Tensor:
    """(blocks, MUON_BLOCK), zeros after the last value."""
    return F.pad(values.reshape(-1), (0, -values.numel() % MUON_BLOCK)).view(-1, MUON_BLOCK)
