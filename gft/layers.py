"""Layers whose weights are small integers: IntLinear and IntEmbedding.

A weight is an int8 `nn.Parameter` without a gradient. In the backward pass a layer puts delta on its int8 grid, hands
delta on, and adds D^T X to its `votes`, a buffer that is to an integer weight what `.grad` is to a float one. autograd
carries delta between layers but has no weight to differentiate. What makes it call a layer's backward at all, even
where the input needs no delta, is `tap`: a leaf of zero elements.

    y = (X W^T) s A / 127     X = RMSNorm(x) on the int8 grid     s = gain / (sqrt(in) std(W)), fixed at the start
    y = W[token] s            an embedding                        s = gain / std(W)

W is what the products read. With `bits` below `keep_bits` that is coarser than the weight that is kept
(gft/weight_grid.py).
"""

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gft.beside import beside, wait_for
from gft.distributed import Place, max_over_ranks, noise_rng, votes_ready
from gft.weight_grid import initial_weight, read_weight
from kernels.embedding import accumulate_embedding_votes, embedding
from kernels.int8_matmul import int8_matmul, int8_product
from kernels.learn import learn_in_backward
from kernels.limits import THRESHOLDS, kept_bits, threshold_of, weight_limit
from kernels.measure_delta import absmax, largest_noted, note_as, prepare_delta
from kernels.philox import make_rng, noise_from
from kernels.quantize_delta import largest_of_bits, quantize_delta, quantize_delta_twice
from kernels.rmsnorm_backward import rmsnorm_backward
from kernels.rmsnorm_quantize import rmsnorm_quantize, rmsnorm_quantize_twice
from kernels.votes import accumulate_votes

HALVES = (torch.float16, torch.bfloat16)
DELAY = 16  # steps whose largest delta sets a delayed scale
HEADROOM = 2.0  # a delayed scale leaves this much room over that largest delta

_made = itertools.count()
_layers: "weakref.WeakSet[IntLayer]" = weakref.WeakSet()


def owner_of(weight: Tensor) -> "IntLayer":
    """The layer whose weight this is. Raises ValueError if it is no layer's.

    Found by search, because deepcopy drops attributes set on a Parameter.
    """
    for layer in _layers:
        if layer.weight is weight:
            return layer
    raise ValueError(f"a {weight.dtype} {tuple(weight.shape)} parameter belongs to no living IntLinear or IntEmbedding")


@dataclass(frozen=True)
class Delta:
    """How delta becomes int8: `kind` "int8" or "sign" is what enters the votes; `scale` "step" takes its largest value
    now, "delayed" that of the last `DELAY` steps; `bits` from 2 to 8 are those of its grid, in a byte however few."""

    kind: str = "int8"
    scale: str = "step"
    bits: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown setting."""
        if self.kind not in ("int8", "sign") or self.scale not in ("step", "delayed") or not 2 <= self.bits <= 8:
            raise ValueError(
                f"Delta: got kind {self.kind!r}, scale {self.scale!r}, bits {self.bits}; kind is int8 or sign, scale "
                "step or delayed, bits 2 to 8"
            )


class Voting(NamedTuple):
    """What a training pass needs of its layer, in the words of IntLayer."""

    rng: Tensor
    votes: Tensor | None
    scale: Tensor
    votes_scale: Tensor
    scratch: Tensor
    delta_history: Tensor | None
    learning: tuple[Any, ...] | None
    kind: str  # Delta's
    delta_bits: int
    first_column: int
    place: Place | None
    reading: tuple[int, int, int, int]  # the arguments of `read_weight`


class IntLayer(nn.Module):
    """What IntLinear and IntEmbedding share: the weight, its scale, and what a training step needs.

    rng             int64 (3,): seed, step, and rows seen in this step; the noise that rounds delta is a function of it
    votes           int32 or int64 (out, in), None until an optimizer is made for the weight
    votes_scale     float32 (): the largest sigma of this step's passes, not finite if one was not
    scratch         int32 (2,): of prepare_delta
    delta_history   float32 (1 + DELAY,): largest |delta| of this step so far and of the last ones; for a delayed scale
    delta_width     columns of this layer's delta, whose noise the optimizer gives a place of its own
    learning        what `learn_in_backward` wants besides the operands; None with update = "step"
    place           among the ranks that train it together; None of one process

    Rounding noise goes to rows in the order of the backward passes: a layer used twice in one forward pass trains
    correctly, but its weights depend on the number of micro-batches. One layer's backward passes must not run at the
    same time on two streams.
    """

    def __init__(
        self, shape: tuple[int, int], bits: int, keep_bits: int, fan_in: int, gain: float, init_std: float,
        seed: int, index: int | None, delta: Delta, levels: int,
    ):  # fmt: skip
        super().__init__()
        index = next(_made) if index is None else index
        self.bits, self.keep_bits = bits, kept_bits(bits, keep_bits)
        if not 1 <= bits <= self.keep_bits <= 8:
            raise ValueError(
                f"{type(self).__name__}: got bits {bits} and keep_bits {keep_bits}; a weight has 1 to 8 bits, and "
                "keeps at least those that are read"
            )
        if levels not in THRESHOLDS or (levels == 4 and self.keep_bits == 2):
            raise ValueError(
                f"{type(self).__name__}: got levels {levels} and keep_bits {keep_bits}; two bits are read as 3 levels "
                "or, of a weight that keeps more, as 4"
            )
        self.levels = levels if bits == 2 else 3
        self.threshold = threshold_of(self.keep_bits, init_std, self.levels)
        weight = initial_weight(shape, self.keep_bits, init_std, seed, index)
        std = self.read(weight).to(torch.float64).std(correction=0).item()
        if std == 0:
            raise ValueError(
                f"{type(self).__name__}: all {weight.numel()} initial weights are equal, so no scale can be computed; "
                "raise init_std"
            )
        self.q, self.delta = weight_limit(self.keep_bits)[0], delta
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.tensor(gain / (fan_in**0.5 * std), dtype=torch.float32))
        # Training state, saved by the optimizer's state_dict where it outlives a step.
        self.register_buffer("rng", make_rng(seed), persistent=False)
        self.register_buffer("votes", None, persistent=False)
        self.register_buffer("votes_scale", torch.zeros(()), persistent=False)
        self.register_buffer("scratch", torch.zeros(2, dtype=torch.int32), persistent=False)
        history = torch.zeros(1 + DELAY) if delta.scale == "delayed" else None
        self.register_buffer("delta_history", history, persistent=False)
        self.first_column = 0  # of this layer's columns in the noise; the optimizer gives each layer its own
        self.learning: tuple[Any, ...] | None = None
        self.place: Place | None = None
        self.tap = torch.zeros(0, requires_grad=True)
        _layers.add(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.learning = self.place = None  # a copy is no part of the optimizer that the original learns by
        _layers.add(self)

    def _apply(self, fn, recurse: bool = True) -> "IntLayer":
        """Moves between devices. Scales stay float32 under .half() and .bfloat16(): those are for activations."""
        floats = {name: t for name, t in self._buffers.items() if t is not None and t.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in floats.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = before.to(self._buffers[name].device)
        if self.weight.dtype != torch.int8:
            raise TypeError(f"{type(self).__name__}: its weight is int8 and cannot become {self.weight.dtype}")
        self.tap = torch.zeros(0, device=self.weight.device, requires_grad=True)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:
            errors.append(f"{prefix}weight: got {given.dtype}; {type(self).__name__} takes int8 weights in [-{self.q}, "
                          f"{self.q}], so round them to its grid first")  # fmt: skip
        elif given is not None and (wrong := self._off_grid(given)):
            errors.append(f"{prefix}weight: {wrong}")
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _off_grid(self, weight: Tensor) -> str:
        """What is wrong with int8 weights that this layer cannot hold, "" if nothing is."""
        largest = max(abs(int(end)) for end in weight.aminmax()) if weight.numel() else 0  # -128 has no abs in int8
        if largest > self.q:
            return f"has values up to {largest}; {self.keep_bits} bits hold [-{self.q}, {self.q}]"
        return "has zeros; 1 bit holds -1 and 1" if self.keep_bits == 1 and bool((weight == 0).any()) else ""

    def read(self, weight: Tensor | None = None) -> Tensor:
        """What the products read of this layer's weight, or of another one kept as it is: int8."""
        kept = self.weight if weight is None else weight
        return read_weight(kept, self.bits, self.keep_bits, self.threshold, self.levels)

    def _bits(self) -> str:
        kept = f", keep_bits={self.keep_bits}" if self.keep_bits != self.bits else ""
        return f"bits={self.bits}{kept}" + (", levels=4" if self.levels == 4 else "")

    def start_voting(self, dtype: torch.dtype | None) -> None:
        """Allocate the votes buffer, int32 or int64; None means that votes are not stored."""
        self.votes = None if dtype is None else torch.zeros(self.weight.shape, dtype=dtype, device=self.weight.device)
        self.votes_scale.zero_()
        self.learning = self.place = None

    def kept_state(self) -> dict[str, Tensor]:
        """What must be saved of this layer, beside its weight, to go on exactly."""
        return {"rng": self.rng} | ({} if self.delta_history is None else {"delta_history": self.delta_history})

    def _voting(self) -> Voting:
        reading = (self.bits, self.keep_bits, self.threshold, self.levels)
        return Voting(
            self.rng, self.votes, self.scale, self.votes_scale, self.scratch, self.delta_history, self.learning,
            self.delta.kind, self.delta.bits, self.first_column, self.place, reading,
        )  # fmt: skip


class IntLinear(IntLayer):
    """y = RMSNorm(x) W^T with integer W, int8 products and no bias. Input (..., in), output (..., out).

    The output is float32, or as the input if that has 16 bits; norms, scales and sums are fp32 either way.
    `bits` are those of a weight as the products read it, `keep_bits` those it keeps, of which 0 makes at least six;
    two bits have 3 `levels`, -1, 0, 1, or 4, -3, -1, 1, 3.
    `gain` scales the output, `squared_relu` puts relu(x)^2 in front of the norm, `init_std` is the standard
    deviation of the initial weights in units of Q, `act_range` the A of the activation grid. With `seed`, `index` fixes
    the initial weights; without one, layers made one after another differ.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int = 6, gain: float = 1.0, squared_relu: bool = False,
        init_std: float = 0.33, act_range: float = 6.0, seed: int = 1, index: int | None = None, delta: Delta = Delta(),
        keep_bits: int = 0, levels: int = 3,
    ):  # fmt: skip
        shape = out_features, in_features
        super().__init__(shape, bits, keep_bits, in_features, gain, init_std, seed, index, delta, levels)
        self.in_features, self.out_features = in_features, out_features
        self.delta_width = out_features
        self.squared_relu, self.act_range = squared_relu, act_range

    def forward(
        self, x: Tensor, residual: Tensor | None = None, fork: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., in) float to (..., out), plus residual (..., out) if given.

        With `fork`, returns also x (a view of it, not to be changed in place). What takes that one, past this layer, as
        a residual connection does, has its delta added in this layer's own backward pass. Raises ValueError on another
        width or an empty batch.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"IntLinear: got rows of {x.shape[-1]}; this layer takes {self.in_features}")
        if x.numel() == 0:
            raise ValueError(f"IntLinear: got an empty batch {tuple(x.shape)}; it needs at least one row")
        if not torch.is_grad_enabled():  # nothing to keep for a backward pass, at half the time of a single row
            y, *_ = _linear(x, residual, self.read(), self.scale, self.act_range, self.squared_relu)
            return (y, x) if fork else y
        return _IntLinearFunction.apply(
            x, residual, fork, self.tap, self.weight, self.act_range, self.squared_relu, *self._voting()
        )

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.in_features}, {self.out_features}, {self._bits()}, squared_relu={self.squared_relu}"


class IntEmbedding(IntLayer):
    """y = W[token] s with integer W (rows, width). Tokens int64 of any shape, output (..., width) of type `dtype`."""

    def __init__(
        self, rows: int, width: int, bits: int = 6, gain: float = 1.0, init_std: float = 0.33, seed: int = 1,
        index: int | None = None, dtype: torch.dtype = torch.float32, delta: Delta = Delta(),
        keep_bits: int = 0, levels: int = 3,
    ):  # fmt: skip
        super().__init__((rows, width), bits, keep_bits, 1, gain, init_std, seed, index, delta, levels)
        self.rows, self.width, self.dtype = rows, width, dtype
        self.delta_width = width

    def _apply(self, fn, recurse: bool = True) -> "IntEmbedding":
        """The output's type follows .half(), .bfloat16() and .float()."""
        super()._apply(fn, recurse)
        dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        self.dtype = dtype if dtype in (*HALVES, torch.float32) else self.dtype
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (...) to (..., width). Raises ValueError on an empty batch."""
        if tokens.numel() == 0:
            raise ValueError(f"IntEmbedding: got an empty batch {tuple(tokens.shape)}; it needs at least one token")
        return _IntEmbeddingFunction.apply(tokens, self.tap, self.weight, self.dtype, *self._voting())

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.rows}, {self.width}, {self._bits()}"


def int_layers(module: nn.Module) -> list[IntLayer]:
    """The integer layers of a net, in the order of its modules."""
    return [layer for layer in module.modules() if isinstance(layer, IntLayer)]


def delayed_sigma(delta: Tensor, delta_history: Tensor, levels: int) -> Tensor:
    """Scale of delta (T, n) from earlier steps, float32 (T, 1); delta's own largest value is noted in delta_history[0].

    In the first step there are no earlier ones: every row has its own scale, which no split of the batch can change.
    """
    largest = absmax(delta)
    delta_history[0] = torch.maximum(delta_history[0], largest)
    earlier = delta_history[1:].amax() * (HEADROOM / levels)
    own = delta.abs().amax(dim=-1, keepdim=True).float() / levels
    return torch.where(earlier > 0, earlier, own) + (largest - largest)  # NaN, for all layers below, if not finite


def _to_int8(
    delta: Tensor, voting: Voting, by_columns: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | tuple[()]]:
    """delta (..., n) to D int8 (T, n), what of D votes int8, the layer's scale * sigma (() or, delayed, (T, 1)), and
    the ratios that bring the votes so far and the new ones to one scale. Signs and delayed scales need none.

    `by_columns`: how the votes will be read.
    """
    noted, delta = largest_noted(delta), delta.reshape(-1, delta.shape[-1])
    rng, place, bits, delta_history = voting.rng, voting.place, voting.delta_bits, voting.delta_history
    wait_for(rng)  # if this layer was used twice, and votes of one use are still being summed
    quantize = quantize_delta_twice if by_columns else _quantize_once
    if place is not None:
        rng = noise_rng(rng, delta.shape[0], place)
    about_noise = rng, delta.shape[0], voting.first_column, delta.shape[1]
    if delta_history is None:
        # The largest of each part, or of each rank, has the same scale as the whole.
        whole = delta if noted is None else noted[None]
        whole = whole if place is None else max_over_ranks(absmax(whole), place.handle).view(1, 1)
        scales = voting.scale, voting.votes_scale, voting.scratch
        measured, noise = prepare_delta(whole, *scales, largest_of_bits(bits), *about_noise)
        d, voter = quantize(delta, measured[0], noise, bits)
        scaled, ratios = measured[3], (measured[1], measured[2]) if voting.kind == "int8" else ()
    else:
        sigma = delayed_sigma(delta, delta_history, largest_of_bits(bits))
        d, voter = quantize(delta, sigma, noise_from(*about_noise), bits)
        scaled, ratios = voting.scale * sigma, ()
    voter = torch.sign(delta).to(torch.int8) if voting.kind == "sign" else voter
    if delta_history is not None:  # the first step only measures
        voter = torch.where(delta_history[1:].amax() > 0, voter, 0)
    return d, voter, scaled, ratios


def _quantize_once(*arguments: Any) -> tuple[Tensor, Tensor]:
    d = quantize_delta(*arguments)
    return d, d


def _vote(
    voting: Voting, weight: Tensor, voter: Tensor, operand: Tensor, ratios: tuple[Tensor, Tensor] | tuple[()]
) -> None:
    """Let one backward pass vote: into the layer's buffer, or (update = "backward") straight into moves of the weight.

    voter int8 (T, out); operand is X int8 (T, in), or the tokens int64 (T,) of an embedding.
    """
    rng, votes, place = voting.rng, voting.votes, voting.place
    if voting.learning is not None:
        k, found_inf, *others = voting.learning
        largest = voting.votes_scale if voting.delta_history is None else voting.delta_history[0]
        stop = torch.maximum(found_inf, (~torch.isfinite(largest)).float())  # such a delta says nothing of weights
        learn_in_backward(voter, operand, weight, rng, k, stop, *others)
    elif votes is None:  # no optimizer moves this weight
        pass
    elif operand.dtype != torch.int64 and place is None:
        beside(voter.device, accumulate_votes, voter, operand, votes, rng, *ratios, in_backward=True)
    elif operand.dtype != torch.int64:
        accumulate_votes(voter, operand, votes, rng, *ratios)
    else:
        accumulate_embedding_votes(voter, operand, votes, *ratios)
        rng[2] += len(voter)
    if votes is not None and place is not None:
        votes_ready(votes, place.handle, place.number)


def _linear(
    x: Tensor, residual: Tensor | None, read: Tensor, scale: Tensor, act_range: float, squared_relu: bool,
    votes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (..., out), the rows of x (T, in), X int8 (T, in) and 1 / rms (T, 1); `read`: the weight as it is read.

    With `votes`, X as votes read it fastest.
    """
    dtype = x.dtype if x.dtype in HALVES else torch.float32
    flat = x.reshape(-1, read.shape[1]).to(dtype).contiguous()
    if votes:
        x_int8, inv_rms, kept = rmsnorm_quantize_twice(flat, act_range, squared_relu)
    else:
        x_int8, inv_rms = rmsnorm_quantize(flat, act_range, squared_relu)
        kept = x_int8
    if residual is not None:
        residual = residual.reshape(-1, read.shape[0]).to(dtype)
    y = int8_matmul(x_int8, read, scale, residual, dtype, act_range / 127.0, inv_rms)
    return y.view(*x.shape[:-1], read.shape[0]), flat, kept, inv_rms


class _IntLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, fork, tap, weight, act_range, squared_relu, *voting):
        voting = Voting(*voting)
        votes = voting.votes is not None or voting.learning is not None
        read = read_weight(weight, *voting.reading)
        y, *kept = _linear(x, residual, read, voting.scale, act_range, squared_relu, votes)
        ctx.save_for_backward(*kept)
        ctx.weight, ctx.squared_relu, ctx.voting = weight, squared_relu, voting
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return (y, x.view_as(x)) if fork else y

    @staticmethod
    def backward(ctx, delta, forked=None):
        flat, x_int8, inv_rms = ctx.saved_tensors
        weight = read_weight(ctx.weight, *ctx.voting.reading)
        d, voter, scaled, ratios = _to_int8(delta, ctx.voting, by_columns=True)
        delta_x = None
        if ctx.needs_input_grad[0]:
            if forked is not None:
                forked = forked.reshape(flat.shape).to(flat.dtype)
            if flat.dtype in HALVES:
                # delta_x^ in 16 bits: D int8 (T, out) times W int8 (out, in), summed in int32, scaled, rounded once
                product, factor = int8_matmul(d, weight.t(), scaled, None, flat.dtype), None
            else:
                product, factor = int8_product(d, weight), scaled  # int32 (T, in), exact
            rows = rmsnorm_backward(product, factor, flat, inv_rms, ctx.squared_relu, forked)
            delta_x = rows.view(ctx.shape).to(ctx.dtype)
            if ctx.dtype == rows.dtype:
                note_as(delta_x, rows)
        _vote(ctx.voting, ctx.weight, voter, x_int8, ratios)  # after the product, which reads the weight
        delta_residual = delta.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None
        return delta_x, delta_residual, *[None] * (5 + len(ctx.voting))


class _IntEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, tap, weight, dtype, *voting):
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.voting = weight, Voting(*voting)
        return embedding(tokens, read_weight(weight, *ctx.voting.reading), ctx.voting.scale, dtype)

    @staticmethod
    def backward(ctx, delta):
        (tokens,) = ctx.saved_tensors
        _, voter, _, ratios = _to_int8(delta, ctx.voting, by_columns=False)
        _vote(ctx.voting, ctx.weight, voter, tokens.reshape(-1), ratios)
        return None, *[None] * (3 + len(ctx.voting))
