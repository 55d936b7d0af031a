"""Cross-entropy of rows of logits, summed over the rows; its gradient is written over the logits.

    top = max(x)     log_sum = log(sum(exp(x - top)))     loss = log_sum + top - x[target]
    delta_x = (exp(x - top - log_sum) - [column == target]) * delta_loss

A net with many outputs has no larger tensor than its logits (GPT-2's for 4,096 tokens: 412 MB in bf16), so there is no
second one of that size: after the backward pass the logits hold delta. Another backward pass that needs them raises
torch's error for a tensor that was changed in place. The largest |delta| of each program's rows falls out on the way.

Memory, for N rows of V logits of b bytes: forward b N V read, 12 N written; backward b N V read, b N V written. About 6
operations and one exp an element, each way. A program takes one long row piece by piece, or several short ones.

Rows of an odd length do not begin at multiples of 16 bytes. Loads and stores of 16 bytes need groups of 8 elements that
do, and masks that take a group whole. So a row is cut into its whole groups and the up to 7 elements at each end. That
fixes the order of the sum, which must not depend on how a batch is split: only where each example begins with a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from kernels.backend import LaunchConfig, jit, on_triton, operator, tl, triton, wrap_triton
from kernels.measure_delta import with_largest
from kernels.rmsnorm_quantize import FLOATS
from kernels.tiles import PART, joined, parts_of

PIECE, SHORT, WARPS = 4096, 2048, 8  # elements a program holds at a time: of a long row, of several short ones


def cross_entropy_torch(logits: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy` in torch, its gradient a tensor of its own."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")


class _InParts(torch.autograd.Function):
    """`cross_entropy_torch` of logits (N, V) and targets (N,), some rows at a time: in fp32 they would take twice the
    memory of 16 bits, and what torch keeps of them and forms in its backward pass several times that."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        found = [
            F.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
            for _, rows in parts_of((1, *logits.shape), 1)
        ]
        # Summed as torch sums losses, -100 left out, so that parts change no bit.
        return F.nll_loss(-joined(found)[:, None], targets.clamp(max=0), reduction="sum")

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy: got create_graph=True, but logits this large have a gradient made part by part; "
                "use cross_entropy_torch"
            )
        logits, targets = ctx.saved_tensors
        delta = torch.empty_like(logits)
        for _, rows in parts_of((1, *logits.shape), 1):
            with torch.enable_grad():
                part = logits[rows].detach().requires_grad_()
                loss = cross_entropy_torch(part, targets[rows])
            (delta[rows],) = torch.autograd.grad(loss, part, grad)
        return delta, None


# The kernels


@jit
def _cut(rows, V, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """A program's rows (ROWS, 1): their numbers, where they begin in memory, where the whole groups of each begin, all
    int64, and how many elements these have, int32; then the places (ROWS, 16) of what is left at both ends, and their
    mask."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    begin = row * V
    end = tl.where(row < rows, begin + V, begin)
    first, last = (begin + GROUP - 1) // GROUP * GROUP, end // GROUP * GROUP
    side = tl.arange(0, 16)[None, :]
    ends = tl.where(side < 8, begin + side, tl.maximum(first, last) + side - 8)
    return row, begin, first, (last - first).to(tl.int32), ends, ends < tl.where(side < 8, tl.minimum(first, end), end)


@jit
def _take_in(top, total, x):
    """The largest of what rows have had so far, (ROWS, 1), and their sum of exp(x - largest), with x (ROWS, n) too."""
    larger = tl.maximum(top, tl.max(x, axis=1)[:, None])
    base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf minus itself would be NaN
    return larger, total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=1)[:, None]


@jit
def _cross_entropy_kernel(
    logits, targets, losses, norms, rows, V, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """ROWS whole rows: their losses, and top and log_sum to norms (2, rows). A NaN or +inf makes the sum NaN."""
    row, begin, first, size, ends, mask = _cut(rows, V, ROWS, GROUP)
    column = tl.arange(0, COLUMNS)[None, :]
    top, total = tl.full((ROWS, 1), float("-inf"), tl.float32), tl.zeros((ROWS, 1), tl.float32)
    if GROUP > 1:
        top, total = _take_in(top, total, tl.load(logits + ends, mask=mask, other=float("-inf")).to(tl.float32))
    for start in range(0, V // GROUP * GROUP, COLUMNS):
        x = tl.load(logits + first + (start + column), mask=start + column < size, other=float("-inf"))
        top, total = _take_in(top, total, x.to(tl.float32))
    log_sum = tl.log(total)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    known = (target >= 0) & (target < V)
    wanted = tl.load(logits + begin + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(norms + row, top, mask=row < rows)
    tl.store(norms + rows + row, log_sum, mask=row < rows)
    tl.store(losses + row, log_sum + (top - wanted), mask=row < rows)


@jit
def _delta(x, top, log_sum, is_target, grad, mask):
    """delta in x's type, and the bits of |delta|, 0 outside the mask: these order as the numbers do, NaN above all."""
    delta = ((tl.exp(x.to(tl.float32) - top - log_sum) - is_target.to(tl.float32)) * grad).to(x.dtype)
    return delta, tl.where(mask, delta.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@jit
def _cross_entropy_backward_kernel(
    logits, targets, norms, grad, largest, rows, V, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, and the largest |delta| in them."""
    row, begin, first, size, ends, ends_mask = _cut(rows, V, ROWS, GROUP)
    column = tl.arange(0, COLUMNS)[None, :]
    top = tl.load(norms + row, mask=row < rows, other=0.0)
    log_sum = tl.load(norms + rows + row, mask=row < rows, other=0.0)
    target = begin + tl.load(targets + row, mask=row < rows, other=-1)
    factor = tl.load(grad)
    most = tl.zeros((ROWS,), tl.int32)
    if GROUP > 1:
        ends_x = tl.load(logits + ends, mask=ends_mask, other=0.0)
        ends_delta, ends_bits = _delta(ends_x, top, log_sum, ends == target, factor, ends_mask)
        tl.debug_barrier()  # the ends are so few that several threads read each of them: all have done so
        tl.store(logits + ends, ends_delta, mask=ends_mask)
        most = tl.max(ends_bits, axis=1)
    bits, groups, target_in_groups = tl.zeros((ROWS, COLUMNS), tl.int32), logits + first, (target - first).to(tl.int32)
    for start in range(0, V // GROUP * GROUP, COLUMNS):
        place = start + column
        mask = place < size
        x = tl.load(groups + place, mask=mask, other=0.0)
        delta, found = _delta(x, top, log_sum, place == target_in_groups, factor, mask)
        tl.store(groups + place, delta, mask=mask)
        bits = tl.maximum(bits, found)
    most = tl.max(tl.maximum(most, tl.max(bits, axis=1)), axis=0)
    tl.store(largest + tl.program_id(0), most.to(tl.float32, bitcast=True))


# Launching


def _blocks(shape: tuple[int, ...]) -> dict[str, int]:
    """For logits of this shape, whose first axis is that of the examples."""
    group = 8 if math.prod(shape[1:]) % 8 == 0 else 1
    columns = min(PIECE, max(64, triton.next_power_of_2(shape[-1] // group * group)))
    return {"ROWS": max(1, SHORT // columns), "COLUMNS": columns, "GROUP": group, "num_warps": WARPS}


@operator("cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, V = targets.numel(), logits.shape[-1]
    losses = torch.empty((rows,), dtype=torch.float32, device=logits.device)
    norms = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    blocks = _blocks(logits.shape)
    wrap_triton(_cross_entropy_kernel)[(triton.cdiv(rows, blocks["ROWS"]),)](
        logits=logits,
        targets=targets,
        losses=losses,
        norms=norms,
        rows=rows,
        V=V,
        **blocks,
    )
    return losses, norms


@operator("cross_entropy_backward", mutates_args=("logits",))
def _cross_entropy_backward(logits: Tensor, targets: Tensor, norms: Tensor, grad: Tensor) -> Tensor:
    rows, V = targets.numel(), logits.shape[-1]
    blocks = _blocks(logits.shape)
    programs = triton.cdiv(rows, blocks["ROWS"])
    largest = torch.empty((programs,), dtype=torch.float32, device=logits.device)
    wrap_triton(_cross_entropy_backward_kernel)[(programs,)](
        logits=logits,
        targets=targets,
        norms=norms,
        grad=grad,
        largest=largest,
        rows=rows,
        V=V,
        **blocks,
    )
    return largest


class _CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        losses, norms = _cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, norms)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: got create_graph=True, but its gradient takes the place of the logits; "
                               "use cross_entropy_torch")  # fmt: skip
        logits, targets, norms = ctx.saved_tensors  # raises if the logits were changed, by an earlier call of this too
        delta = logits.detach()
        largest = _cross_entropy_backward(delta, targets, norms, grad)
        increment_version(delta)  # the logits' as well; not every kind of operator does it
        return with_largest(delta, largest), None


def _made_by_a_layer(logits: Tensor) -> bool:
    """Not so are leaves and their views: these are someone's parameters, and must not be written over."""
    base = logits if logits._base is None else logits._base
    return logits.grad_fn is not None and not (base.is_leaf and base.requires_grad)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over rows, nats, float32 (): logits float (..., V), targets int64 (...).

    The first axis is that of the examples: how a batch of them is split changes no bit of delta.

    In Triton, where the logits have a backward pass of their own and nothing compiles, *the backward pass writes their
    gradient over the logits*: read nothing from them afterwards. A later backward pass that needs them, a second one of
    this loss, or one with create_graph raises RuntimeError. `with_largest` goes with the gradient. A target outside
    0 .. V - 1 makes the loss NaN there; torch leaves -100 out, and refuses others. Raises ValueError on other shapes or
    types, or an empty batch. In torch create_graph raises for more than `PART` logits only.
    """
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape or logits.numel() == 0:
        raise ValueError(f"cross_entropy: got logits {tuple(logits.shape)} and targets {tuple(targets.shape)}; "
                         "they are (..., V) and (...), not empty")  # fmt: skip
    if logits.dtype not in FLOATS or targets.dtype != torch.int64:
        raise ValueError(f"cross_entropy: got logits {logits.dtype} and targets {targets.dtype}; logits are float32, "
                         "float16 or bfloat16, targets int64")  # fmt: skip
    if torch.compiler.is_compiling():
        return cross_entropy_torch(logits, targets)
    if not on_triton(logits) or not _made_by_a_layer(logits):
        if logits.numel() <= PART:
            return cross_entropy_torch(logits, targets)
        return _InParts.apply(logits.flatten(0, -2), targets.flatten())
    return _CrossEntropyFunction.apply(logits.contiguous(), targets.flatten())


def launch_configs() -> list[LaunchConfig]:
    """Long rows and short ones, with and without whole groups, of each type."""
    found = []
    for float_, shape, size in (
        ("bf16", (4, 1024, 50257), "i32:1"), ("bf16", (4096, 50257), "i32:1"), ("fp32", (64, 256, 65), "i32:1"),
        ("fp32", (64, 10), "i32:1"), ("fp16", (1024, 1008), "i32"),
    ):  # fmt: skip
        blocks = _blocks(shape)
        shared = {"logits": f"*{float_}", "targets": "*i64", "norms": "*fp32", "rows": "i32", "V": size}
        forward, backward = shared | {"losses": "*fp32"}, shared | {"grad": "*fp32", "largest": "*fp32"}
        name = f"{float_} {shape[-1]} by {blocks['GROUP']}"
        found.append(LaunchConfig(f"forward {name}", _cross_entropy_kernel, forward, blocks))
        found.append(LaunchConfig(f"backward {name}", _cross_entropy_backward_kernel, backward, blocks))
    return found
