"""Layers whose weights are small integers: IntLinear and IntEmbedding.

Both hold int8 buffers and no Parameter. In the backward pass a layer puts delta on its int8 grid, keeps
the int8 operands of its votes and hands delta on; `FlipOptimizer.step` turns the operands into flips.
autograd carries delta between layers but has no weight to differentiate. What makes it call a layer's
backward at all, even where the input needs no delta, is `tap`: a leaf of zero elements.

    y = (X W^T) s A / 127     X = RMSNorm(x) on the int8 grid     s = gain / (sqrt(in) std(W)), fixed at the start
    y = W[token] s            an embedding                        s = gain / std(W)
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gft.clock import Clock
from kernels.contribution import add_votes, embedding_votes, votes
from kernels.int8_matmul import int8_matmul, int8_product
from kernels.philox import Stream, normal
from kernels.quantize import absmax, quantize_delta, quantize_delta_rows, rmsnorm_quantize
from kernels.rmsnorm import rmsnorm_backward

DELAY = 16  # steps whose largest delta sets a delayed scale
HEADROOM = 2.0  # a delayed scale leaves this much room over that largest delta


def largest_weight(bits: int) -> int:
    """Q: weights lie in [-Q, Q]. bits 1 is {-1, 1}, bits 2 is ternary."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits}; weights have 1 to 8 bits")
    return max(1, 2 ** (bits - 1) - 1)


def initial_weight(shape: tuple[int, int], bits: int, spread: float, seed: int, index: int) -> Tensor:
    """round(N(0, spread * Q)) clipped to [-Q, Q], or the sign at one bit: int8 of `shape`, from Philox."""
    q = largest_weight(bits)
    z = normal(seed, 0, Stream.INIT + 16 * index, shape[0] * shape[1]).view(shape)
    if bits == 1:
        return torch.where(z < 0, -1, 1).to(torch.int8)
    return torch.round(z * (spread * q)).clamp(-q, q).to(torch.int8)


class IntLayer(nn.Module):
    """What IntLinear and IntEmbedding share: the weight, its scale, and the operands held until the step.

    `held` is a list of (D, operand, sigma): one entry after one backward pass. From the second on, votes are
    summed instead, so micro-batches cost one integer matrix however many there are.
    """

    def __init__(self, shape: tuple[int, int], bits: int, fan_in: int, gain: float, spread: float, seed: int, index: int):
        super().__init__()
        self.bits, self.q, self.index = bits, largest_weight(bits), index
        weight = initial_weight(shape, bits, spread, seed, index)
        std = weight.to(torch.float64).std(correction=0).item()
        if std == 0:
            raise ValueError(f"{type(self).__name__}: all {weight.numel()} initial weights are equal; raise init spread")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.tensor(gain / (fan_in**0.5 * std), dtype=torch.float32))
        self.tap = torch.zeros(0, requires_grad=True)
        self.delta_kind, self.delta_scale = "int8", "step"
        self.register_buffer("delta_history", None)
        self.attach(Clock(seed))

    def attach(self, clock: Clock) -> None:
        """Take step and random words from `clock`; FlipOptimizer calls this."""
        self.clock = clock
        self.first_column = clock.reserve_columns(self.delta_width)
        self.forget()

    @property
    def delta_width(self) -> int:
        """Columns of this layer's delta."""
        raise NotImplementedError

    def set_delta(self, kind: str, scale: str) -> None:
        """kind "int8" or "sign" (what enters the votes), scale "step" or "delayed" (see design of DELAY)."""
        self.delta_kind, self.delta_scale = kind, scale
        self.delta_history = torch.zeros(DELAY, device=self.weight.device) if scale == "delayed" else None

    @property
    def calibrating(self) -> bool:
        """First step of a delayed scale: deltas are measured row by row, and no weight moves."""
        return self.delta_scale == "delayed" and self.clock.step == 0

    def forget(self) -> None:
        """Drop what was held for a step that will not be taken."""
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.summed: Tensor | None = None
        self.summed_sigma: Tensor | None = None
        self.rows_seen = 0
        self.largest_delta: Tensor | None = None

    def receive(self, delta: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise delta float32 (T, n), hold the operands of the votes, return (D int8, sigma () or (T, 1))."""
        rows = self.clock.rows(self.rows_seen, len(delta), delta.device)
        columns = self.clock.columns(self.first_column, delta.shape[1], delta.device)
        self.rows_seen += len(delta)
        largest = absmax(delta)
        self.largest_delta = largest if self.largest_delta is None else torch.maximum(self.largest_delta, largest)
        if self.calibrating:
            return quantize_delta_rows(delta, rows, columns)
        if self.delta_scale == "delayed":
            sigma = self.delta_history.amax() * (HEADROOM / 127.0)
        else:
            sigma = largest / 127.0
        d = quantize_delta(delta, sigma, rows, columns)
        if self.held:
            self._sum_held()
        self.held.append((torch.sign(delta).to(torch.int8) if self.delta_kind == "sign" else d, operand, sigma))
        return d, sigma

    def _sum_held(self) -> None:
        """Turn held operands into votes and add them to the sum, on one sigma."""
        for d, operand, sigma in self.held:
            v = self._votes(d, operand)
            if self.summed is None:
                self.summed, self.summed_sigma = v, sigma
            elif self.delta_scale == "delayed" or self.delta_kind == "sign":
                self.summed = add_votes(self.summed, v, self.rows_seen)
            else:
                # Each pass had its own scale: bring both to the larger one. Rounded, so not independent of the split.
                top = torch.maximum(self.summed_sigma, sigma).clamp_min(torch.finfo(torch.float32).tiny)
                both = self.summed.double() * (self.summed_sigma / top) + v.double() * (sigma / top)
                self.summed, self.summed_sigma = torch.round(both).to(torch.int64), top
        self.held = []

    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        raise NotImplementedError

    def take_votes(self) -> Tensor | None:
        """Votes (out, in) of all passes since the last step, or None if there were none; what was held is dropped."""
        if not self.held and self.summed is None:
            return None
        if self.summed is None and len(self.held) == 1:
            d, operand, _ = self.held[0]
            result = self._votes(d, operand)
        else:
            self._sum_held()
            result = self.summed
        return result

    def finish_step(self) -> None:
        """Record this step's largest delta for a delayed scale and drop what was held."""
        if self.delta_scale == "delayed" and self.largest_delta is not None:
            self.delta_history = torch.roll(self.delta_history, 1)
            self.delta_history[0] = self.largest_delta
        self.forget()


class IntLinear(IntLayer):
    """y = RMSNorm(x) W^T with integer W, int8 products and no bias. Input (..., in), output float32 (..., out).

    `gain` scales the output, `squared_relu` puts relu(x)^2 in front of the norm, `spread` is the standard
    deviation of the initial weights in units of Q, `act_range` the A of the activation grid. `index` tells
    layers of one model apart: it chooses their random streams.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int = 6, gain: float = 1.0, squared_relu: bool = False,
        spread: float = 0.33, act_range: float = 6.0, seed: int = 1, index: int = 0,
    ):  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        super().__init__((out_features, in_features), bits, in_features, gain, spread, seed, index)
        self.squared_relu, self.act_range = squared_relu, act_range

    @property
    def delta_width(self) -> int:
        return self.out_features

    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        return votes(d, operand)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) float to (..., out) float32. Raises ValueError on another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"IntLinear: got rows of {x.shape[-1]}; this layer takes {self.in_features}")
        return _IntLinearFunction.apply(x, self.tap, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, squared_relu={self.squared_relu}"


class IntEmbedding(IntLayer):
    """y = W[token] s with integer W (rows, width). Tokens int64 of any shape, output float32 (..., width)."""

    def __init__(self, rows: int, width: int, bits: int = 6, gain: float = 1.0, spread: float = 0.33, seed: int = 1, index: int = 0):
        self.rows, self.width = rows, width
        super().__init__((rows, width), bits, 1, gain, spread, seed, index)

    @property
    def delta_width(self) -> int:
        return self.width

    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        return embedding_votes(d, operand, self.rows)

    @torch.compiler.disable
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (...) to float32 (..., width)."""
        return _IntEmbeddingFunction.apply(tokens, self.tap, self)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.width}, bits={self.bits}"


class _IntLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tap: Tensor, layer: IntLinear) -> Tensor:
        flat = x.reshape(-1, layer.in_features).to(torch.float32)
        if flat.shape[0] == 0:
            raise ValueError(f"IntLinear: got an empty batch {tuple(x.shape)}; it needs at least one row")
        grid, inverse_rms = rmsnorm_quantize(flat, layer.act_range, layer.squared_relu)
        ctx.save_for_backward(flat, grid, inverse_rms)
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        y = int8_matmul(grid, layer.weight, layer.scale * (layer.act_range / 127.0))
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        flat, grid, inverse_rms = ctx.saved_tensors
        layer = ctx.layer
        d, sigma = layer.receive(delta.reshape(-1, layer.out_features), grid)
        delta_x = None
        if ctx.needs_input_grad[0]:
            product = int8_product(d, layer.weight)
            delta_x = rmsnorm_backward(product, layer.scale * sigma, flat, inverse_rms, layer.squared_relu)
            delta_x = delta_x.view(ctx.shape).to(ctx.dtype)
        return delta_x, torch.zeros(0), None


class _IntEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, tap: Tensor, layer: IntEmbedding) -> Tensor:
        ctx.layer, ctx.tokens = layer, tokens.reshape(-1)
        return layer.weight[tokens].to(torch.float32) * layer.scale

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        ctx.layer.receive(delta.reshape(-1, ctx.layer.width), ctx.tokens)
        return None, torch.zeros(0), None
