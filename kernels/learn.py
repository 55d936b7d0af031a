"""The whole learning step of a matrix inside the backward pass: int8 operands in, int8 weights changed in place.

    V = D^T X  ->  (momentum)  ->  scores S  ->  top-k of legal moves in every tile  ->  W

Where the rule looks at no more than a top-k tile, votes never reach memory: a program sums those of its block over all
tokens in registers and does what kernels/flip.py does there; both are made of the same device functions and agree
exactly. Memory: T*(in + out) + 2*out*in bytes, twice out*in more with momentum; 2*T*in*out int8 operations, and for
spectral 30*ortho_tile*out*in of fp16. Such rules are gain, contribution, and spectral with an ortho_tile like its
topk_tile (`unscored_reason`). For others, as the default with its tiles of 128 and 64, one matrix' votes lie in memory
for a moment.

A weight may be used once between two steps: a second pass would move it by votes that knew the weight before the first.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, capability_of, jit, on_triton, opaque_operator, tl, triton
from kernels.embedding import accumulate_embedding_votes
from kernels.flip import flip, flip_torch, learning_configs, move_block
from kernels.limits import MAX_REDUCTION, weight_limit
from kernels.transpose import by_columns
from kernels.update_rule import (
    UpdateRule,
    check_update,
    unscored_reason,
    unsupported_reason,
)
from kernels.votes import accumulate_votes, votes_block, votes_torch


def launch_of(side: int) -> dict[str, int]:
    """Tokens of one step through the operands, num_warps and num_stages, for tiles of this side."""
    if side == 128:  # four times the registers
        return {"TOKENS": 64, "num_warps": 8, "num_stages": 2}
    return {"TOKENS": 128, "num_warps": 4, "num_stages": 4}


def learn_torch(
    d: Tensor, x: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, stop: Tensor, rule: UpdateRule,
    momentum: Tensor | None = None, momentum_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`learn` in torch: votes, then what `flip` does."""
    return flip_torch(votes_torch(d, x)[None], weight, k, rng, layers, stop, rule, momentum, momentum_scale)


@jit
def _learn_kernel(
    d, x, weight, momentum, momentum_scale, flips, k, rng, layers, stop, out, inner, tokens,
    d_row, d_column, x_row, x_column, beta, step_size,
    RULE: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, MOMENTUM: tl.constexpr, SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of the matrix."""
    if tl.load(stop) != 0:
        return
    across = tl.cdiv(inner, SIDE)
    row, column = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    rows, columns = row.to(tl.int64) + tl.arange(0, SIDE), column.to(tl.int64) + tl.arange(0, SIDE)
    v = votes_block(d, x, rows, columns, out, inner, 0, tokens, d_row, d_column, x_row, x_column, TOKENS)
    down, right = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    inside = (down < out - row) & (right < inner - column)
    corner = row.to(tl.int64) * inner + column  # 32 bits do inside a block
    offsets = down * inner + right
    layer = tl.load(layers)
    move_block(
        v, weight + corner + offsets, momentum + corner + offsets if MOMENTUM else None, momentum_scale, flips, inside,
        row, column, out, inner, k, rng, layer, beta, step_size, RULE, Q, UNIT, MOMENTUM, SIDE,
    )  # fmt: skip


def learn(
    d: Tensor, x: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, stop: Tensor, rule: UpdateRule,
    momentum: Tensor | None = None, momentum_scale: Tensor | None = None, flips: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Learn from one batch: d int8 (T, out), x int8 (T, in) of any stride; weight int8 (1, out, in) changes in place.

    The other arguments, and what is returned and raised, are those of `flip`.
    """
    _, out, inner = check_update((1, d.shape[1], x.shape[1]), weight, rule, momentum, momentum_scale)
    if len(d) != len(x) or len(d) == 0:
        raise ValueError(
            f"learn: got {len(d)} rows of delta and {len(x)} of activations; they must agree, and not be 0"
        )
    if d.dtype != torch.int8 or x.dtype != torch.int8:
        raise ValueError(f"learn: got delta {d.dtype} and activations {x.dtype}; both must be int8")
    flips = torch.zeros(1, dtype=torch.int64, device=weight.device) if flips is None else flips
    if not on_triton(weight):
        return flips.add_(learn_torch(d, x, weight, k, rng, layers, stop, rule, momentum, momentum_scale))
    if unsupported_reason(rule) or unscored_reason(rule, capability_of(weight)) or len(d) > MAX_REDUCTION:
        votes = torch.zeros(weight.shape, dtype=torch.int64 if len(d) > MAX_REDUCTION else torch.int32, device=d.device)
        accumulate_votes(d, x, votes[0], rng.clone())
        return flip(votes, weight, k, rng, layers, stop, rule, momentum, momentum_scale, flips)
    d, x = by_columns(d), by_columns(x)
    side = rule.topk_tile
    q, unit = weight_limit(rule.bits)
    _learn_kernel[(triton.cdiv(out, side) * triton.cdiv(inner, side),)](
        d=d,
        x=x,
        weight=weight,
        momentum=momentum,
        momentum_scale=momentum_scale,
        flips=flips,
        k=k,
        rng=rng,
        layers=layers,
        stop=stop,
        out=out,
        inner=inner,
        tokens=len(d),
        d_row=d.stride(0),
        d_column=d.stride(1),
        x_row=x.stride(0),
        x_column=x.stride(1),
        beta=rule.momentum,
        step_size=rule.step_size,
        RULE=rule.rule,
        Q=q,
        UNIT=unit,
        MOMENTUM=momentum is not None,
        SIDE=side,
        enable_fp_fusion=False,
        **launch_of(side),
    )
    return flips


@opaque_operator(
    "learn_in_backward", fake=lambda *_: None,
    mutates_args=("weight", "flips", "used", "momentum", "momentum_scale"),
)  # fmt: skip
def learn_in_backward(
    d: Tensor, operand: Tensor, weight: Tensor, rng: Tensor, k: Tensor, stop: Tensor, layers: Tensor,
    flips: Tensor, used: Tensor, momentum: Tensor | None, momentum_scale: Tensor | None,
    rule: str, bits: int, ortho_tile: int, topk_tile: int, beta: float, step_size: int,
    flip_prob: str, flip_gamma: float,
) -> None:  # fmt: skip
    """`learn` as an operator that a compiled backward pass can call, for one weight int8 (out, in).

    An embedding's votes, and those of rules and tiles that `_learn_kernel` does not know, lie in memory for a moment.
    operand is X int8 (T, in), or the tokens int64 (T,) of an embedding. flips int64 (1,) grows by the moves made;
    used, a bool on the CPU whatever the device, says that this weight has learned since the last step. Raises
    ValueError if it has: the host knows that without waiting for the device.
    """
    if used.item():
        raise ValueError(
            f'a weight {tuple(weight.shape)} was used twice in one step with update = "backward", which moved it after '
            'the first use; '
            'take update = "step" for micro-batches and for layers used more than once'
        )
    used.fill_(True)
    settings = UpdateRule(rule, bits, ortho_tile, topk_tile, beta, step_size, flip_prob, flip_gamma)
    kept = (None, None) if momentum is None else (momentum[None], momentum_scale[None])
    if operand.dtype == torch.int64:
        votes = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        accumulate_embedding_votes(d, operand, votes)
        flip(votes[None], weight[None], k, rng, layers, stop, settings, *kept, flips)
    else:
        learn(d, operand, weight[None], k, rng, layers, stop, settings, *kept, flips)


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check learn` compiles: the rules, with and without momentum."""
    constants = launch_of(64) | {"d_row": 1, "x_row": 1}
    return learning_configs("learn", _learn_kernel, {"d": "*i8", "x": "*i8"}, constants)
