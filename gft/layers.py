"""Layers whose weights are small integers: IntLinear and IntEmbedding.

Both hold int8 buffers and no Parameter. In the backward pass a layer puts delta on its int8 grid, keeps
the int8 operands of its votes and hands delta on; `FlipOptimizer.step` turns the operands into flips.
autograd carries delta between layers but has no weight to differentiate. What makes it call a layer's
backward at all, even where the input needs no delta, is `tap`: a leaf of zero elements.

    y = (X W^T) s A / 127     X = RMSNorm(x) on the int8 grid     s = gain / (sqrt(in) std(W)), fixed at the start
    y = W[token] s            an embedding                        s = gain / std(W)
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gft.clock import Clock
from kernels.backend import on_triton
from kernels.contribution import add_votes, votes
from kernels.embedding import embedding, embedding_votes
from kernels.int8_matmul import int8_matmul, int8_product
from kernels.philox import Stream, normal
from kernels.quantize import absmax, quantize_delta, rmsnorm_quantize
from kernels.rmsnorm import rmsnorm_backward

HALVES = (torch.float16, torch.bfloat16)
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


_made = itertools.count()
_layers: weakref.WeakValueDictionary[int, "IntLayer"] = weakref.WeakValueDictionary()


class IntLayer(nn.Module, ABC):
    """What IntLinear and IntEmbedding share: the weight, its scale, and the operands held until the step.

    `held` is a list of (D, operand, sigma): one entry after one backward pass. From the second on, votes are
    summed instead, so micro-batches cost one integer matrix however many there are. Rounding words go to rows in the
    order of the backward passes: a layer used twice in one forward pass learns rightly, but not bit for bit alike for
    every number of micro-batches.
    """

    def __init__(
        self, shape: tuple[int, int], bits: int, fan_in: int, gain: float, spread: float, seed: int, index: int | None
    ):
        super().__init__()
        self._take_handle()
        index = next(_made) if index is None else index
        self.bits, self.q, self.index = bits, largest_weight(bits), index
        weight = initial_weight(shape, bits, spread, seed, index)
        std = weight.to(torch.float64).std(correction=0).item()
        if std == 0:
            raise ValueError(
                f"{type(self).__name__}: all {weight.numel()} first weights are equal and give no scale; raise spread"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.tensor(gain / (fan_in**0.5 * std), dtype=torch.float32))
        self.tap = torch.zeros(0, requires_grad=True)
        self.delta_kind, self.delta_scale, self.delta_levels = "int8", "step", 127
        self.watched = False  # a monitor wants to know the share of delta at the limit of int8
        self.learn_now: Callable[[IntLayer], None] | None = None  # set where weights flip inside the backward pass
        # Training state, kept by the optimizer's state_dict: a net that only samples has none.
        self.register_buffer("delta_history", None, persistent=False)
        self.attach(Clock(seed))

    def _take_handle(self) -> None:
        """A number by which a backward pass finds this layer; a copy needs its own.

        The lowest one that is free: compiled graphs have it as a constant, and then fit a later net of the same shapes.
        """
        self.handle = next(number for number in itertools.count() if number not in _layers)
        _layers[self.handle] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._take_handle()

    def attach(self, clock: Clock) -> None:
        """Take step and random words from `clock`; FlipOptimizer calls this."""
        self.clock = clock
        self.first_column = clock.reserve_columns(self.delta_width)
        self.forget()

    @property
    @abstractmethod
    def delta_width(self) -> int:
        """Columns of this layer's delta."""

    def set_delta(self, kind: str, scale: str, bits: int = 8) -> None:
        """kind "int8" or "sign" (what enters the votes), scale "step" or "delayed" (from the last DELAY steps), and the
        bits of delta on its grid: 8, or fewer in the same byte."""
        self.delta_kind, self.delta_scale, self.delta_levels = kind, scale, 2 ** (bits - 1) - 1
        self.take_history(torch.zeros(DELAY) if scale == "delayed" else None)

    def take_history(self, largest: Tensor | None) -> None:
        """Set the largest |delta| of the last DELAY steps, newest first, float32 (DELAY,); zeros before the first."""
        self.delta_history = None if largest is None else largest.to(self.weight.device, copy=True)
        self.measured = largest is not None and bool((largest > 0).any())

    @property
    def calibrating(self) -> bool:
        """A delayed scale that has seen no step yet: deltas are measured row by row, and no weight moves."""
        return self.delta_scale == "delayed" and not self.measured

    def drop_votes(self) -> None:
        """Drop votes and the operands of votes."""
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.summed: Tensor | None = None
        self.summed_sigma: Tensor | None = None

    def forget(self) -> None:
        """Drop what was held for a step that will not be taken."""
        self.drop_votes()
        self.rows_seen = 0
        self.saturation = 0.0
        self.largest_delta: Tensor | None = None

    def words_for(self, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rounding words of the next `count` tokens, int32 (count, 1), and of the columns, int32 (width,)."""
        first, self.rows_seen = self.rows_seen, self.rows_seen + count
        return self.clock.rows(first, count, device), self.clock.columns(self.first_column, width, device)

    def delayed_sigma(self, delta: Tensor) -> Tensor:
        """Scale of delta from earlier steps, float32 (T, 1), and note delta's own largest value for later ones.

        In the first step there are no earlier ones: every row has a scale of its own, which no split of the batch
        can change, and no vote is held.
        """
        largest = absmax(delta)
        self.largest_delta = largest if self.largest_delta is None else torch.maximum(self.largest_delta, largest)
        if self.calibrating:
            return delta.abs().amax(dim=-1, keepdim=True).float() / self.delta_levels
        return (self.delta_history.amax() * (HEADROOM / self.delta_levels)).expand(len(delta), 1).contiguous()

    def hold(self, d: Tensor, operand: Tensor, sigma: Tensor) -> None:
        """Keep the int8 operands of this pass's votes until the step."""
        if self.calibrating:
            return
        if self.watched:
            self.saturation = max(self.saturation, (d.abs() >= self.delta_levels).float().mean().item())
        if self.held:
            self._sum_held()
        self.held.append((d, operand, sigma))
        if self.learn_now is not None:
            self.learn_now(self)

    def add(self, d: Tensor, operand: Tensor, sigma: Tensor) -> None:
        """As `hold`, but form the votes now: for operands whose memory is used again at once."""
        self.hold(d, operand, sigma)
        self._sum_held()

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

    @abstractmethod
    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        """Votes (out, in) of one pass from its int8 operands."""

    def has_votes(self) -> bool:
        """Whether a backward pass has been here since the last step."""
        return bool(self.held) or self.summed is not None

    def take_votes(self) -> Tensor | None:
        """Votes (out, in) of all passes since the last step, or None if there were none; what was held is dropped."""
        if not self.has_votes():
            return None
        self._sum_held()
        return self.summed

    def finish_step(self) -> None:
        """Record this step's largest delta for a delayed scale and drop what was held."""
        if self.delta_scale == "delayed" and self.largest_delta is not None:
            self.delta_history = torch.roll(self.delta_history, 1)
            self.delta_history[0] = torch.nan_to_num(self.largest_delta, nan=0.0, posinf=0.0)
            self.measured = self.measured or bool(self.largest_delta > 0)
        self.forget()


class IntLinear(IntLayer):
    """y = RMSNorm(x) W^T with integer W, int8 products and no bias. Input (..., in), output (..., out).

    The output is float32, or as the input if that has 16 bits; norms, scales and sums are fp32 either way.
    `gain` scales the output, `squared_relu` puts relu(x)^2 in front of the norm, `spread` is the standard
    deviation of the initial weights in units of Q, `act_range` the A of the activation grid. With `seed`, `index` fixes
    the initial weights; without one, layers made one after another differ.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int = 6, gain: float = 1.0, squared_relu: bool = False,
        spread: float = 0.33, act_range: float = 6.0, seed: int = 1, index: int | None = None,
    ):  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        super().__init__((out_features, in_features), bits, in_features, gain, spread, seed, index)
        self.squared_relu, self.act_range = squared_relu, act_range

    @property
    def delta_width(self) -> int:
        return self.out_features

    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        return votes(d, operand)

    def operands(self) -> tuple[Tensor, Tensor] | None:
        """The int8 operands (D, X) of the only pass since the last step; None if its votes are formed or there
        were several."""
        return self.held[0][:2] if self.summed is None and len(self.held) == 1 else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in) float to (..., out), plus residual (..., out) if given. Raises ValueError on another width
        or an empty batch."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"IntLinear: got rows of {x.shape[-1]}; this layer takes {self.in_features}")
        if x.numel() == 0:
            raise ValueError(f"IntLinear: got an empty batch {tuple(x.shape)}; it needs at least one row")
        return _IntLinearFunction.apply(
            x, residual, self.tap, self.weight, self.scale, self.act_range, self.squared_relu,
            (self.delta_kind, self.delta_scale, self.delta_levels, self.handle), torch.is_grad_enabled(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, squared_relu={self.squared_relu}"


class IntEmbedding(IntLayer):
    """y = W[token] s with integer W (rows, width). Tokens int64 of any shape, output (..., width) of type `dtype`."""

    def __init__(self, rows: int, width: int, bits: int = 6, gain: float = 1.0, spread: float = 0.33, seed: int = 1,
                 index: int | None = None, dtype: torch.dtype = torch.float32):  # fmt: skip
        self.rows, self.width, self.dtype = rows, width, dtype
        super().__init__((rows, width), bits, 1, gain, spread, seed, index)

    @property
    def delta_width(self) -> int:
        return self.width

    def _votes(self, d: Tensor, operand: Tensor) -> Tensor:
        return embedding_votes(d, operand, self.rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (...) to (..., width). Raises ValueError on an empty batch."""
        if tokens.numel() == 0:
            raise ValueError(f"IntEmbedding: got an empty batch {tuple(tokens.shape)}; it needs at least one token")
        return _IntEmbeddingFunction.apply(
            tokens, self.tap, self.weight, self.scale,
            (self.delta_kind, self.delta_scale, self.delta_levels, self.handle), self.dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.width}, bits={self.bits}"


# What a backward pass asks of its layer. A compiled graph reaches the layer through an opaque operator and the layer's
# number; run eagerly, the layer is called directly. The operators change the layer behind the graph's back, so their
# results are used (the words in D, what `hold` returns as the tap's gradient): that keeps them in the graph, in order.


@torch.library.custom_op("nanogft::delta_words", mutates_args=())
def _delta_words(delta: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    rows, columns = _layers[handle].words_for(delta.shape[0], delta.shape[1], delta.device)
    return rows.clone(), columns.clone()


@_delta_words.register_fake
def _(delta: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    return delta.new_empty((delta.shape[0], 1), dtype=torch.int32), delta.new_empty(delta.shape[1], dtype=torch.int32)


@torch.library.custom_op("nanogft::delayed_sigma", mutates_args=())
def _delayed_sigma(delta: Tensor, handle: int) -> Tensor:
    return _layers[handle].delayed_sigma(delta)


@_delayed_sigma.register_fake
def _(delta: Tensor, handle: int) -> Tensor:
    return delta.new_empty((delta.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("nanogft::hold", mutates_args=())
def _hold(d: Tensor, operand: Tensor, sigma: Tensor, after: Tensor, handle: int) -> Tensor:
    # The graph may use the operands' memory again as soon as this returns.
    layer = _layers[handle]
    if layer.learn_now is not None:
        layer.hold(d, operand, sigma)
    elif on_triton(d):
        layer.hold(_copy(d), _copy(operand), sigma.clone())  # votes are formed and used up in one kernel, at the step
    else:
        layer.add(d, operand, sigma.clone())
    return torch.zeros(0)


@_hold.register_fake
def _(d: Tensor, operand: Tensor, sigma: Tensor, after: Tensor, handle: int) -> Tensor:
    return torch.empty(0)


def _copy(columns: Tensor) -> Tensor:
    """A copy whose columns, not rows, lie one after another: how kernels want the operands of votes."""
    return columns.t().clone(memory_format=torch.contiguous_format).t()


def _quantise(delta: Tensor, kind: str, scale: str, levels: int, handle: int) -> tuple[Tensor, Tensor, Tensor]:
    """delta (T, n) on its int8 grid: D int8, what of it votes int8, sigma float32 () or (T, 1)."""
    compiling = torch.compiler.is_compiling()
    rows, columns = _delta_words(delta, handle) if compiling else _layers[handle].words_for(*delta.shape, delta.device)
    if scale == "delayed":
        sigma = _delayed_sigma(delta, handle) if compiling else _layers[handle].delayed_sigma(delta)
    else:
        sigma = absmax(delta) / levels
    d, voter = quantize_delta(delta, sigma, rows, columns)
    if scale == "delayed" and levels < 127:  # a delta above all of the last steps'
        d, voter = d.clamp(-levels, levels), voter.clamp(-levels, levels)
    return d, torch.sign(delta).to(torch.int8) if kind == "sign" else voter, sigma


def _keep(d: Tensor, operand: Tensor, sigma: Tensor, after: Tensor, handle: int) -> Tensor:
    """Give the operands of the votes to the layer, once `after` is there:
    a layer that learns at once changes its weight.

    Returns the gradient of the layer's tap.
    """
    if torch.compiler.is_compiling():
        return _hold(d, operand, sigma, after, handle)
    _layers[handle].hold(d, operand, sigma)
    return torch.zeros(0)


class _IntLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, tap, weight, scale, act_range, squared_relu, about_delta, learning):
        dtype = x.dtype if x.dtype in HALVES else torch.float32
        flat = x.reshape(-1, weight.shape[1]).to(dtype).contiguous()
        grid, voter, inverse_rms = rmsnorm_quantize(flat, act_range, squared_relu, learning)
        ctx.save_for_backward(flat, voter, inverse_rms, weight, scale)
        ctx.squared_relu, ctx.delta, ctx.shape, ctx.dtype = squared_relu, about_delta, x.shape, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        if residual is not None:
            residual = residual.reshape(-1, weight.shape[0]).to(dtype)
        y = int8_matmul(grid, weight, scale * (act_range / 127.0), residual, dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, delta):
        flat, voter, inverse_rms, weight, scale = ctx.saved_tensors
        d, d_voter, sigma = _quantise(delta.reshape(-1, weight.shape[0]), *ctx.delta)
        delta_x, after = None, d
        if ctx.needs_input_grad[0]:
            if flat.dtype in HALVES:
                after = int8_matmul(d, weight.t(), scale * sigma, None, flat.dtype)
                delta_x = rmsnorm_backward(after, torch.ones_like(scale), flat, inverse_rms, ctx.squared_relu)
            else:
                after = int8_product(d, weight)
                delta_x = rmsnorm_backward(after, scale * sigma, flat, inverse_rms, ctx.squared_relu)
            delta_x = delta_x.view(ctx.shape).to(ctx.dtype)
        tap = _keep(d_voter, voter, sigma, after, ctx.delta[-1])
        delta_residual = delta.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None
        return delta_x, delta_residual, tap, None, None, None, None, None, None


class _IntEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, tap, weight, scale, about_delta, dtype):
        ctx.save_for_backward(tokens)
        ctx.delta = about_delta
        return embedding(tokens, weight, scale, dtype)

    @staticmethod
    def backward(ctx, delta):
        (tokens,) = ctx.saved_tensors
        d, voter, sigma = _quantise(delta.reshape(-1, delta.shape[-1]), *ctx.delta)
        tap = _keep(voter, tokens.reshape(-1), sigma, d, ctx.delta[-1])
        return None, tap, None, None, None, None
