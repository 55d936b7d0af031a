"""Flips: votes in, int8 weights changed in place.

    V  ->  (momentum: V + beta M)  ->  scores S  ->  in every tile the m legal moves of largest |S|  ->  W

The Triton kernel keeps a tile in registers from votes to moves, and takes a stack of equal matrices at
once, (L, out, in). Memory: 4 (votes) + 2 (weights) bytes for each weight, 2 more with momentum; for spectral 15 fp16
products of an ortho_tile: 30 * ortho_tile * out * in operations. kernels/learn.py starts from D and X instead of votes
and shares every step after them. Rules that look past a tile are scored before (kernels/scores.py), and the kernel
takes their scores as it takes votes.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, capability_of, jit, on_triton, tl, triton
from kernels.limits import weight_limit
from kernels.momentum import MOMENTUM_TILE, accumulate_momentum_, momentum_block
from kernels.philox import Stream, words_from
from kernels.scores import ORTHO_TILES, score, score_block
from kernels.tiles import first_tile, from_tiles, parts_of, tile_count, tile_sizes, to_tiles
from kernels.topk import apply_moves, flip_probability, rank, select, topk_block, topk_count
from kernels.update_rule import (
    UpdateRule,
    check_update,
    unscored_reason,
    unsupported_reason,
    warps_of,
)

# The torch reference


def flip_torch(
    votes: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, stop: Tensor, rule: UpdateRule,
    momentum: Tensor | None = None, momentum_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flip` in torch, part by part: the tensors in between would be several times as large as all that is kept."""
    flips = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    if stop.item():
        return flips
    for matrices, rows in _learning_apart(weight, rule):
        s, w, of = votes[matrices, rows], weight[matrices, rows], layers[matrices]
        if momentum is not None:
            kept = momentum[matrices, rows], momentum_scale[matrices]
            s = accumulate_momentum_(*kept, s, rule.momentum, rng, of, stop, rows.start)
        s = score(rule.rule, s, w, rule.ortho_tile)
        flips[matrices] += select_and_move(s, w, k, rng, of, rule, rows.start)
    return flips


def _learning_apart(weight: Tensor, rule: UpdateRule) -> Iterable[tuple[slice, slice]]:
    """Parts of a stack that learn apart: slices of matrices and of rows."""
    spectral = rule.rule == "spectral"
    if on_triton(weight) or weight.is_cuda or spectral and rule.ortho_tile not in ORTHO_TILES:
        # The kernel of momentum takes whole matrices, and products of a smaller batch may be rounded otherwise.
        return [(slice(0, weight.shape[0]), slice(0, weight.shape[1]))]
    sides = [rule.topk_tile] + [rule.ortho_tile] * spectral + [MOMENTUM_TILE] * (rule.momentum > 0)
    return parts_of(tuple(weight.shape), 0 if rule.rule == "balanced" else math.lcm(*sides))


def _tiled(matrices: Tensor, side: int) -> Tensor:
    """(L, out, in) to (L * tiles, side * side), or of whole matrices (L, out * in)."""
    return (to_tiles(matrices, side) if side else matrices).flatten(1)


def _untiled(tiles: Tensor, side: int, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_tiled`; shape is (out, in)."""
    return from_tiles(tiles.unflatten(1, (side, side)), shape) if side else tiles.unflatten(1, shape)


def select_and_move(
    scores: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, rule: UpdateRule, first_row: int = 0
) -> Tensor:
    """The last step of `flip_torch`: scores (L, out, in) to moves of weight, in place. Returns the flips int64 (L,).

    Both may be a band of whole tiles, from `first_row` of the matrices on.
    """
    flips = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    for matrices, rows in parts_of(tuple(weight.shape), rule.topk_tile):
        part = scores[matrices, rows], weight[matrices, rows]
        flips[matrices] += _select_and_move(*part, k, rng, layers[matrices], rule, first_row + rows.start)
    return flips


def _select_and_move(
    scores: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, rule: UpdateRule, first_row: int
) -> Tensor:
    """`select_and_move` of one part."""
    count, *shape = weight.shape
    side, tiles, area = rule.topk_tile, tile_count(tuple(shape), rule.topk_tile), rule.topk_tile**2 or weight[0].numel()
    first = first_tile(first_row, shape[1], side)

    def draw(stream: int, each: int) -> Tensor:
        return words_from(rng, stream, tiles * each, first * each, layers).flatten()

    w, s, (q, unit) = _tiled(weight, side), _tiled(scores, side), weight_limit(rule.bits)
    ranks = rank(s, w, q, unit)
    sizes = tile_sizes(tuple(shape), side).to(weight.device).repeat(count)
    chosen = select(ranks, topk_count(k, sizes, draw(Stream.TOPK, 1)))
    if rule.flip_prob == "score":
        uniform = draw(Stream.FLIP, area).to(torch.float64) * 2.0**-32
        chosen &= uniform.view(ranks.shape) < flip_probability(ranks, s, rule.flip_gamma)
    moved = apply_moves(w, s, chosen, q, unit * rule.step_size)
    weight.copy_(_untiled(moved, side, tuple(shape)))
    return chosen.view(count, -1).sum(dim=1)


# The kernel


@jit
def move_block(
    v, weight, momentum, momentum_scale, flips, inside, row, column, out, inner, k, rng, layer, beta, step_size,
    RULE: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, MOMENTUM: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A block's votes v become moves of its weights: momentum, scores, top-k, and the count of moves added to `flips`.

    `weight` and `momentum` point to the block's elements, `momentum_scale` to the matrix's first scale.
    """
    if MOMENTUM:
        v = momentum_block(
            v, momentum, momentum_scale, inside, row, column, out, inner, rng, layer, beta, SIDE
        )  # fmt: skip
    s = score_block(v, weight, inside, RULE)
    w = tl.load(weight, mask=inside, other=0)  # not before: scores need the registers
    moves = topk_block(s, w, row, column, out, inner, k, rng, layer, Q, UNIT)
    moved = w.to(tl.int32) + moves.to(tl.int32) * (UNIT * step_size)
    tl.store(weight, tl.minimum(tl.maximum(moved, -Q), Q).to(tl.int8), mask=inside)
    tl.atomic_add(flips, tl.sum(tl.abs(moves.to(tl.int32))).to(tl.int64))


@jit
def _flip_kernel(
    votes, weight, momentum, momentum_scale, flips, k, rng, layers, stop, out, inner, beta, step_size,
    RULE: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, MOMENTUM: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """One block of one matrix of the stack."""
    if tl.load(stop) != 0:
        return
    place = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(inner, SIDE)
    row, column = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    down, right = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    inside = (down < out - row) & (right < inner - column)
    corner = (place * out + row) * inner + column  # int64; 32 bits do inside a block
    offsets = down * inner + right
    layer = tl.load(layers + place)
    v = tl.load(votes + corner + offsets, mask=inside, other=0)
    scales = place * (tl.cdiv(out, SIDE) * across)
    move_block(
        v, weight + corner + offsets, momentum + corner + offsets if MOMENTUM else None,
        momentum_scale + scales if MOMENTUM else None, flips + place, inside, row, column, out, inner, k, rng, layer,
        beta, step_size, RULE, Q, UNIT, MOMENTUM, SIDE,
    )  # fmt: skip


def flip(
    votes: Tensor, weight: Tensor, k: Tensor, rng: Tensor, layers: Tensor, stop: Tensor, rule: UpdateRule,
    momentum: Tensor | None = None, momentum_scale: Tensor | None = None, flips: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Make one step's moves in a stack of equal matrices, in place.

    votes int32, int64 (below 2^53) or float32 (L, out, in), weight int8 (L, out, in); momentum int8 like weight and
    momentum_scale float32 (L, tiles) where the rule has momentum; all but votes contiguous. k float64 () is the share
    of a tile's weights to move, rng int64 (seed, step, ...), layers int64 (L,) the numbers of the matrices, which give
    each its own random streams. Where stop, float32 (), is not 0 nothing changes. Returns the flips of each matrix,
    int64 (L,), added to `flips` if given, on the device, without waiting for it unless torch makes the moves. Raises
    ValueError on shapes that do not agree and on other types.
    """
    if votes.dtype not in (torch.int32, torch.int64, torch.float32):
        raise ValueError(f"flip: got votes {votes.dtype}; they must be int32, int64 or float32")
    count, out, inner = check_update(votes.shape, weight, rule, momentum, momentum_scale)
    flips = torch.zeros(count, dtype=torch.int64, device=weight.device) if flips is None else flips
    if not on_triton(weight) or unsupported_reason(rule):
        return flips.add_(flip_torch(votes, weight, k, rng, layers, stop, rule, momentum, momentum_scale))
    if unscored_reason(rule, capability_of(weight)):
        if momentum is not None:
            votes = accumulate_momentum_(momentum, momentum_scale, votes, rule.momentum, rng, layers, stop)
        votes = score(rule.rule, votes, weight, rule.ortho_tile)
        # What is left is to select and move: by "gain" the kernel takes what it is given as scores.
        rule, momentum, momentum_scale = replace(rule, rule="gain", momentum=0.0), None, None
    side = rule.topk_tile
    q, unit = weight_limit(rule.bits)
    _flip_kernel[(triton.cdiv(out, side) * triton.cdiv(inner, side), count)](
        votes=votes.contiguous(),
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
        beta=rule.momentum,
        step_size=rule.step_size,
        RULE=rule.rule,
        Q=q,
        UNIT=unit,
        MOMENTUM=momentum is not None,
        SIDE=side,
        enable_fp_fusion=False,
        num_warps=warps_of(side),
        num_stages=1,
    )
    return flips


def learning_configs(name: str, kernel, operands: dict[str, str], constants: dict) -> list[LaunchConfig]:
    """Launch configurations of a kernel that ends in moves: every rule, with and without momentum, in tiles of 64."""
    pointers = operands | {
        "weight": "*i8", "momentum": "*i8", "momentum_scale": "*fp32", "flips": "*i64", "k": "*fp64", "rng": "*i64",
        "layers": "*i64", "stop": "*fp32",
    }  # fmt: skip
    numbers = dict.fromkeys(("out", "inner", "step_size"), "i32") | {"beta": "fp32"}
    if "d" in operands:
        numbers |= dict.fromkeys(("tokens", "d_column", "x_column"), "i32")
    found = []
    side = 64
    for rule, decay in (("gain", 0.0), ("gain", 0.9), ("contribution", 0.9), ("spectral", 0.0), ("spectral", 0.9)):
        given = pointers | numbers
        fixed = {"RULE": rule, "Q": 31, "UNIT": 1, "MOMENTUM": decay > 0, "SIDE": side}
        fixed |= {"num_warps": warps_of(side), "num_stages": 1, "enable_fp_fusion": False} | constants
        if not decay:
            for absent in ("momentum", "momentum_scale"):
                del given[absent]
                fixed[absent] = None
        products = (("int8",) if "d" in operands else ()) + (("fp16",) if rule == "spectral" else ())
        label = f"{name} {rule} {side}x{side}{' momentum' if decay else ''}"
        found.append(LaunchConfig(label, kernel, given, fixed, products))
    return found


def launch_configs() -> list[LaunchConfig]:
    """What `python -m kernels.check flip` compiles: votes int32, and scores float32 that torch has formed."""
    scored = learning_configs("flip scores", _flip_kernel, {"votes": "*fp32"}, {})[0]
    return [scored, *learning_configs("flip", _flip_kernel, {"votes": "*i32"}, {})]
