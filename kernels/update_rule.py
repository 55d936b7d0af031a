"""How votes become moves: the settings that kernels/flip.py and kernels/learn.py share, and what their kernels can do.

The rule of an update is fixed by a few settings (`UpdateRule`). Some need torch in place of a kernel, or scores
formed before it: `unsupported_reason` and `unscored_reason` say which and why.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.momentum import MOMENTUM_TILE
from kernels.scores import unorthogonalised_reason
from kernels.tiles import tile_count

TOPK_TILES = (32, 64, 128)  # sides that the kernels are made for
BLOCK_RULES = ("gain", "contribution", "spectral")  # those that look at no more than a block


@dataclass(frozen=True)
class UpdateRule:
    """How votes become moves. Sides of tiles are in weights; 0 is the whole matrix.

    rule and ortho_tile: kernels/scores.py; momentum is its decay, 0 for none; step_size is the largest move in units;
    flip_prob "one" moves every selected weight, "score" with p = (|S| / largest of the tile)^flip_gamma.
    """

    rule: str = "spectral"
    bits: int = 6
    ortho_tile: int = 128
    topk_tile: int = 64
    momentum: float = 0.0
    step_size: int = 1
    flip_prob: str = "one"
    flip_gamma: float = 1.0


def unsupported_reason(rule: UpdateRule) -> str:
    """Why no Triton kernel makes these flips, "" if one does; torch makes them otherwise."""
    if rule.topk_tile not in TOPK_TILES:
        return f"topk_tile is {rule.topk_tile}; the kernels select in tiles of {', '.join(map(str, TOPK_TILES))}"
    if rule.flip_prob != "one":
        return f"flip_prob is {rule.flip_prob}; the kernels move every selected weight"
    return ""


def unscored_reason(rule: UpdateRule, capability: tuple[int, int] = (9, 0)) -> str:
    """Why scores cannot be formed in the kernel that selects, "" if they can; they are formed before it otherwise.

    A block of that kernel is one tile. (Blocks of several were wrong on an H100 with triton 3.6, and no faster.)
    """
    if rule.rule not in BLOCK_RULES:
        return f"rule is {rule.rule}; it looks at whole matrices"
    if rule.momentum and rule.topk_tile != MOMENTUM_TILE:
        return f"topk_tile is {rule.topk_tile}; tiles of momentum are {MOMENTUM_TILE}"
    if rule.rule == "spectral" and rule.ortho_tile != rule.topk_tile:
        return f"ortho_tile is {rule.ortho_tile} and topk_tile {rule.topk_tile}; they must agree"
    return unorthogonalised_reason(rule.ortho_tile, capability) if rule.rule == "spectral" else ""


def warps_of(side: int) -> int:
    """Warps of a program that owns a tile of this side."""
    return 8 if side == 128 else 4


def check_update(
    shape: tuple[int, ...], weight: Tensor, rule: UpdateRule, momentum: Tensor | None, momentum_scale: Tensor | None
) -> tuple[int, int, int]:
    """The shape (L, out, in) of weight. Raises ValueError if votes of `shape`, weight and momentum do not agree."""
    if weight.dtype != torch.int8 or weight.dim() != 3 or 0 in weight.shape or not weight.is_contiguous():
        raise ValueError(
            f"weight update: got a weight {weight.dtype} {tuple(weight.shape)}; "
            "it must be int8 (L, out, in), contiguous, not empty"
        )
    if tuple(shape) != tuple(weight.shape):
        raise ValueError(f"weight update: got votes {tuple(shape)} for a weight {tuple(weight.shape)}; they must agree")
    wanted = rule.momentum > 0
    if (momentum is not None) != wanted or (momentum_scale is not None) != wanted:
        found = "missing" if wanted else "given"
        raise ValueError(f"weight update: momentum is {rule.momentum} and its buffer or its scales are {found}")
    if momentum is not None:
        tiles = tile_count(tuple(weight.shape[1:]), MOMENTUM_TILE)
        if momentum.shape != weight.shape or tuple(momentum_scale.shape) != (weight.shape[0], tiles):
            raise ValueError(
                f"weight update: got momentum {tuple(momentum.shape)} and scales {tuple(momentum_scale.shape)}; "
                f"need {tuple(weight.shape)} and {(weight.shape[0], tiles)}"
            )
        if momentum.dtype != torch.int8 or momentum_scale.dtype != torch.float32:
            raise ValueError(
                f"weight update: got momentum {momentum.dtype} and scales {momentum_scale.dtype}; need int8 and float32"
            )
        if not momentum.is_contiguous() or not momentum_scale.is_contiguous():
            raise ValueError(
                f"weight update: got strides {momentum.stride()} of momentum and {momentum_scale.stride()} of its "
                "scales; both must be contiguous"
            )
    if not 1 <= rule.bits <= 8:
        raise ValueError(f"weight update: got bits {rule.bits}; weights have 1 to 8 bits")
    return tuple(weight.shape)
