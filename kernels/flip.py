"""Flips: in every tile the m legal moves of largest |S|, exactly m, ties to the lower index.

    move of a weight   -sign(S), `unit` wide (1; 2 for binary weights, where it is W -> -W)
    legal              the moved weight stays in [-Q, Q]; S = 0 is no move
    m                  floor(k n + u) for a tile of n weights, u uniform from Philox, in 32-bit fixed point

`rank_keys` turns scores into integers that compare as |S| does, so that one integer selection serves the
exact rules and the float ones. `flip_prob`: a selected weight moves with p = (|S| / largest |S| of its
tile)^gamma, or always.

The Triton kernel keeps a block of tiles in registers (`learn_block`, which the fused kernel of contribution_flip.py
ends with too). Memory: 4 (votes) + 2 (weights) bytes for each weight, 2 more with the vote memory; about 30 passes over
registers find the threshold (`choose`). Random words are drawn in the kernel, or given.
"""


import numpy as np
import torch
from torch import Tensor

from kernels.backend import Shipped, jit, on_triton, tl
from kernels.fuse import fused
from kernels.groups import (
    FIELDS,
    NUMBERS,
    find_matrix,
    launch,
    learning_kernel,
    limits,
    of_one_type,
    on_boundaries,
    place_block,
)
from kernels.memory import remember_tile
from kernels.philox import dither_word, philox_words
from kernels.scores import contribution_tile, orthogonalise_tile
from kernels.tiles import block_from, blocks_of, stack_tiles, tile_sizes, unstack_tiles


@fused(dynamic=False)
def rank_keys(scores: Tensor, weight: Tensor, q: int, unit: int) -> Tensor:
    """Integers ordered as |S| for legal moves, 0 for the others.

    scores int32, int64 or float32, weight int8, both (tiles, n). Returns int32 (float scores: the bits of |S|,
    which order as the numbers do) or int64. Raises ValueError for scores of another float type.
    """
    if scores.is_floating_point() and scores.dtype != torch.float32:
        raise ValueError(f"rank_keys: got scores of {scores.dtype}; float scores must be float32")
    # Small integers are exact in fp32, which vectorises best. S = 0 needs no case of its own: its key is 0.
    legal = (weight.to(torch.float32) - torch.where(scores > 0, float(unit), -float(unit))).abs() <= q
    if scores.dtype == torch.float32:
        return torch.where(legal, scores.abs(), 0.0).view(torch.int32)
    return torch.where(legal, scores.to(torch.int64).abs(), 0)


def fixed_point(k: float) -> int:
    """k in [0, 1] in units of 2^-32, so that every backend forms m in integers."""
    return round(k * 2**32)


def topk_count(k: float, sizes: Tensor, words: Tensor) -> Tensor:
    """m = floor(k n + u), at most n: sizes int64 (tiles,), u = words / 2^32, words int64 (tiles,) below 2^32.
    int64 (tiles,)."""
    return torch.minimum((fixed_point(k) * sizes + words) >> 32, sizes)


def select_reference(keys: Tensor, m: Tensor) -> Tensor:
    """The contract in three lines: the m[tile] largest positive keys, ties to the lower index. bool (tiles, n)."""
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return (rank < m[:, None]) & (keys > 0)


def select(keys: Tensor, m: Tensor) -> Tensor:
    """`select_reference` by partition instead of sorting: keys int32 or int64 (tiles, n), m int64 (tiles,)."""
    if keys.is_cuda:
        return select_reference(keys, m)
    values, chosen = keys.numpy(), np.zeros(keys.shape, dtype=bool)
    n = values.shape[1]
    wanted = m.clamp_max(n).numpy()
    for count in np.unique(wanted):
        if count == 0:
            continue
        tiles = np.flatnonzero(wanted == count)
        part = values[tiles]
        threshold = np.partition(part, n - count, axis=1)[:, n - count, None]
        mask = part >= threshold
        # More keys at the threshold than places left: the lower indices have them.
        crowded = np.flatnonzero(mask.sum(axis=1) > count)
        if crowded.size:
            above, level = part[crowded] > threshold[crowded], part[crowded] == threshold[crowded]
            left = count - above.sum(axis=1, keepdims=True)
            mask[crowded] = above | (level & (np.cumsum(level, axis=1) <= left))
        chosen[tiles] = mask & (part > 0)
    return torch.from_numpy(chosen)


def flip_probability(keys: Tensor, scores: Tensor, gamma: float) -> Tensor:
    """p = (|S| / largest legal |S| of the tile)^gamma: float64 (tiles, n), 0 for illegal moves."""
    magnitude = torch.where(keys > 0, scores.abs().to(torch.float64), 0.0)
    return (magnitude / magnitude.amax(dim=1, keepdim=True).clamp_min(1e-300)) ** gamma


@fused(dynamic=False)
def _moved(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    step = torch.where(scores > 0, float(width), torch.where(scores < 0, -float(width), 0.0))
    return (weight.to(torch.float32) - step * chosen.to(torch.float32)).clamp(-q, q).to(torch.int8)


def apply_moves(weight: Tensor, scores: Tensor, chosen: Tensor, q: int, width: int) -> Tensor:
    """W - width * sign(S) clipped to [-Q, Q] where chosen: int8 (tiles, n). `width` is step size times unit."""
    # A mask of bytes vectorises, one of bools does not.
    return _moved(weight, scores, chosen.view(torch.int8), q, width)


def flip_torch(
    weights: list[Tensor], scores: list[Tensor], words: Tensor, *, bits: int, k: float, step_size: int = 1,
    select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
) -> list[int]:  # fmt: skip
    """`flip` in torch."""
    if select_tile == 0 and len(weights) > 1:
        raise ValueError(f"flip: got {len(weights)} matrices and select_tile 0; whole matrices do not stack, give one")
    shapes = [tuple(w.shape) for w in weights]
    if select_tile:
        sizes = [tile_sizes(shape, select_tile) for shape in shapes]
        weight = stack_tiles(weights, select_tile, torch.int8).flatten(1)
        widest = max((s.dtype for s in scores), key=lambda dtype: dtype.itemsize)  # votes of long batches are int64
        score = stack_tiles(scores, select_tile, widest).flatten(1)
    else:
        sizes = [torch.tensor([weights[0].numel()])]
        weight, score = weights[0].reshape(1, -1), scores[0].reshape(1, -1)
    q, unit = limits(bits)
    keys = rank_keys(score, weight, q, unit)
    chosen = select(keys, topk_count(k, torch.cat(sizes), words).to(keys.device))
    if draws is not None:
        chosen &= draws.view(keys.shape).to(keys.device) < flip_probability(keys, score, gamma)
    moved = apply_moves(weight, score, chosen, q, unit * step_size)
    if select_tile:
        new = unstack_tiles(moved.view(-1, select_tile, select_tile), shapes, torch.int8)
    else:
        new = [moved.view(shapes[0])]
    for w, value in zip(weights, new, strict=True):
        w.copy_(value)
    return [int(part.count_nonzero()) for part in chosen.split([len(s) for s in sizes])]


@jit
def choose(keys, m, SIDE: tl.constexpr):
    """`select` for tiles in registers: the m (tiles,) largest of keys (tiles, SIDE * SIDE), uint32 or int64.
    Returns bool.

    A key is twice the rank, plus a bit that does not count; 0 is never chosen. The m-th largest rank is found by
    halving the range of values it can have, all tiles at once, counting keys on the way. Where more keys have it than
    there are places left, the row and then the column of the last to get one are found by counting those of each row.
    """
    reach = tl.sum((keys > 0).to(tl.int32), 1)  # ranks >= low: at least m
    above = tl.zeros_like(reach)  # ranks >= high: fewer than m
    m = tl.minimum(m, reach)
    high = (tl.max(keys, 1) >> 1) + 1
    low = tl.where(m > 0, tl.full(high.shape, 1, high.dtype), high)
    reach = tl.where(m > 0, reach, 0)
    while tl.max(((reach > m) & (high - low > 1)).to(tl.int32), 0) > 0:
        middle = low + ((high - low) >> 1)
        count = tl.sum((keys >= (middle << 1)[:, None]).to(tl.int32), 1)
        split = (reach > m) & (high - low > 1)
        up, down = split & (count >= m), split & (count < m)
        low, reach = tl.where(up, middle, low), tl.where(up, count, reach)
        high, above = tl.where(down, middle, high), tl.where(down, count, above)

    low, high = low << 1, high << 1
    places = m - above
    row = tl.arange(0, SIDE)
    last_row, last_column = tl.full(m.shape, SIDE, tl.int32), tl.zeros_like(m)
    if tl.max((reach > m).to(tl.int32), 0) > 0:
        square = tl.reshape(keys, (keys.shape[0], SIDE, SIDE))
        tied = (square >= low[:, None, None]) & (square < high[:, None, None])
        until = tl.cumsum(tl.sum(tied.to(tl.int32), 2), 1)
        few = until < places[:, None]
        last_row = tl.where(reach > m, tl.sum(few.to(tl.int32), 1), SIDE)
        places -= tl.max(tl.where(few, until, 0), 1)
        here = tied & (row[None, :, None] == last_row[:, None, None])
        until = tl.cumsum(tl.sum(here.to(tl.int32), 1), 1)
        last_column = tl.sum((until < places[:, None]).to(tl.int32), 1)
    cut = last_row * SIDE + last_column
    index = tl.arange(0, SIDE * SIDE)
    return keys >= tl.where(index[None, :] <= cut[:, None], low[:, None], high[:, None])


@jit
def learn_block(
    v, table, flips, matrices, share, seed, step, stream, beta, q, unit, width,
    RULE: tl.constexpr, MEMORY: tl.constexpr, GIVEN: tl.constexpr, SELECT: tl.constexpr,
    MATRICES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """All that follows the votes of this program's block (M, N): memory, scores, selection, moves.

    v int32, int64 or float32, zeros past the edge. GIVEN takes random words from memory; otherwise they are drawn here.
    """
    M: tl.constexpr = v.shape[0]
    N: tl.constexpr = v.shape[1]
    if MEMORY:
        SIDE: tl.constexpr = 64
        tl.static_assert(M % SIDE == 0 and N % SIDE == 0)
        TILES: tl.constexpr = (M // SIDE) * (N // SIDE)
        _, row, top, left = find_matrix(table, matrices, MATRICES, FIELDS, M, N, True)
        out, inner = tl.load(row + 1), tl.load(row + 2)
        tile = tl.arange(0, TILES)
        tile_row, tile_column = top // SIDE + tile // (N // SIDE), left // SIDE + tile % (N // SIDE)
        real = (tile_row * SIDE < out) & (tile_column * SIDE < inner)
        tile = tile_row * tl.cdiv(inner, SIDE) + tile_column
        element = tile[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        if GIVEN:
            row_words = tl.load(
                tl.load(row + 12).to(tl.pointer_type(tl.int32)) + element, mask=real[:, None], other=0
            )
            column_words = tl.load(
                tl.load(row + 13).to(tl.pointer_type(tl.int32)) + element, mask=real[:, None], other=0
            )
        else:
            index = tl.load(row + 4)
            row_words = dither_word(seed, step, 4 + 16 * index, element)
            column_words = dither_word(seed, step, 5 + 16 * index, element)
        stored, inside = place_block(tl.load(row + 5), tl.load(row + 17), tl.int8, out, inner, top, left, M, N)
        scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + tile
        v = remember_tile(v, stored, inside, scales, real, row_words, column_words, beta, SIDE)

    if RULE == "spectral":
        tl.static_assert(M == N)
        v = orthogonalise_tile(v.to(tl.float32))

    own, row, top, left = find_matrix(table, matrices, MATRICES, FIELDS, M, N, True)
    out, inner = tl.load(row + 1), tl.load(row + 2)
    weights, inside = place_block(tl.load(row + 3), tl.load(row + 16), tl.int8, out, inner, top, left, M, N)
    w = tl.load(weights, mask=inside, other=0)
    if RULE == "contribution":
        v = contribution_tile(v, w)

    # One number holds rank and direction: |S| above, the sign in the lowest bit.
    target = w.to(tl.int32) - tl.where(v > 0, unit, -unit)
    legal = (target <= q) & (target >= -q)  # past the edge S is 0
    if v.dtype == tl.int64:
        keys = tl.abs(v) * 2 + (v > 0)
        keys = tl.where(legal & (v != 0), keys, 0)
    else:
        if v.dtype == tl.float32:
            size = tl.abs(v).to(tl.uint32, bitcast=True)
        else:
            # Past what votes can be; twice it must fit 32 bits.
            size = tl.minimum(tl.abs(v).to(tl.uint32), 0x7FFFFFFE)
        keys = tl.where(legal & (size > 0), (size << 1) + (v > 0).to(tl.uint32), 0)

    PLACES: tl.constexpr = (M // SELECT) * (N // SELECT)
    place = tl.arange(0, PLACES)
    place_row, place_column = top // SELECT + place // (N // SELECT), left // SELECT + place % (N // SELECT)
    height = tl.maximum(tl.minimum(out - place_row * SELECT, SELECT), 0)
    size = height * tl.maximum(tl.minimum(inner - place_column * SELECT, SELECT), 0)
    place = place_row * tl.cdiv(inner, SELECT) + place_column
    if GIVEN:
        word = tl.load(tl.load(row + 14).to(tl.pointer_type(tl.int64)) + place, mask=size > 0, other=0)
    else:
        word = philox_words(seed, step, stream, tl.load(row + 7) + place).to(tl.int64)
    m = tl.minimum((share * size + word) >> 32, size).to(tl.int32)

    stacked = blocks_of(keys, SELECT)
    chosen = choose(stacked, m, SELECT)
    tl.atomic_add(flips + own, tl.sum(tl.sum(chosen.to(tl.int32), 1), 0).to(tl.int64))
    marked = block_from(tl.where(chosen, tl.where(stacked & 1 == 1, -1, 1), 0).to(tl.int8), M, N, SELECT)
    moved = tl.load(weights, mask=inside, other=0).to(tl.int32) + marked.to(tl.int32) * width
    tl.store(weights, tl.minimum(tl.maximum(moved, -q), q).to(tl.int8), mask=inside)


@learning_kernel
def _flip_kernel(
    table, flips, matrices, share, seed, step, stream, beta, q, unit, width,
    RULE: tl.constexpr, MEMORY: tl.constexpr, GIVEN: tl.constexpr, SELECT: tl.constexpr, VOTES: tl.constexpr,
    MATRICES: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    _, row, top, left = find_matrix(table, matrices, MATRICES, FIELDS, M, N)
    votes, inside = place_block(
        tl.load(row + 8), tl.load(row + 9), VOTES, tl.load(row + 1), tl.load(row + 2), top, left, M, N
    )
    v = tl.load(votes, mask=inside, other=0)
    learn_block(
        v, table, flips, matrices, share, seed, step, stream, beta, q, unit, width,
        RULE, MEMORY, GIVEN, SELECT, MATRICES, FIELDS,
    )  # fmt: skip


SELECT_TILES = (32, 64, 128)
MEMORY_SIDE = 64


def flip_block(rule: str, ortho_tile: int, select_tile: int, memory: bool) -> int:
    """Side of the block a program of the flip kernel owns."""
    return ortho_tile if rule == "spectral" else max(select_tile, MEMORY_SIDE if memory else 0)


@torch.library.custom_op("nanogft::flip", mutates_args=("weights", "stored", "scales"))
def _flip(
    weights: list[Tensor], stored: list[Tensor], scales: list[Tensor], votes: list[Tensor], words: list[Tensor],
    numbers: list[int], firsts: list[int], settings: list[int], rule: str, ortho_tile: int, select_tile: int,
    beta: float,
) -> Tensor:  # fmt: skip
    kinds = {torch.int32: tl.int32, torch.int64: tl.int64, torch.float32: tl.float32}
    side = flip_block(rule, ortho_tile, select_tile, bool(stored))
    votes = [on_boundaries(v) for v in votes]
    return launch(
        _flip_kernel, {"RULE": rule, "SELECT": select_tile, "VOTES": kinds[votes[0].dtype]},
        {"num_warps": 8 if side == 128 else 4, "num_stages": 1}, (side, side), weights, stored, scales,
        [(v.data_ptr(), v.stride(0)) for v in votes], words, numbers, firsts, tuple(settings), beta,
    )  # fmt: skip


@_flip.register_fake
def _(weights, stored, scales, votes, words, numbers, firsts, settings, rule, ortho_tile, select_tile, beta):
    return weights[0].new_empty(len(weights), dtype=torch.int64)


def flip(
    weights: list[Tensor], scores: list[Tensor], words: Tensor, *, bits: int, k: float, step_size: int = 1,
    select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
) -> list[int]:  # fmt: skip
    """Make the moves of one step in matrices of `bits` bits, in place.

    weights int8 and scores, (out, in) each; k is the share of a tile's weights to flip, step_size the largest move in
    weight units. words int64 (tiles,) below 2^32 round m, tiles numbered over all matrices; draws float64, one for each
    weight of each tile, switches on p = (|S| / largest)^gamma. select_tile 0 takes one whole matrix as its tile.
    Returns the flips of each matrix. Raises ValueError if select_tile is 0 and there are several matrices.
    """
    if not on_triton(weights[0]) or draws is not None or select_tile not in SELECT_TILES:
        return flip_torch(
            weights, scores, words, bits=bits, k=k, step_size=step_size, select_tile=select_tile, draws=draws,
            gamma=gamma,
        )  # fmt: skip
    scores, words = of_one_type(scores), words.to(weights[0].device)
    counts = [len(tile_sizes(tuple(w.shape), select_tile)) for w in weights]
    settings = [fixed_point(k), 0, 0, 0, bits, step_size]
    flips = [
        torch.ops.nanogft.flip(
            [weight], [], [], [s], [part, part, part], [0], [0], settings, "gain", 0, select_tile, 0.0
        )
        for weight, s, part in zip(weights, scores, words.split(counts), strict=True)
    ]
    return torch.cat(flips).tolist()


def shipped() -> list[Shipped]:
    """What `python -m kernels.check flip` compiles: integer and float scores,
    and the rules whose scores are formed here."""
    found = []
    for rule, votes, ortho_tile, memory in [
        ("gain", "int32", 0, False), ("gain", "float32", 0, False), ("gain", "int64", 0, False),
        ("gain", "int32", 0, True), ("contribution", "int32", 0, False), ("contribution", "int32", 0, True),
        ("spectral", "int32", 64, False), ("spectral", "int32", 64, True), ("spectral", "int32", 128, False),
        ("spectral", "int32", 128, True),
    ]:  # fmt: skip
        side = flip_block(rule, ortho_tile, 64, memory)
        kind = {"int32": tl.int32, "int64": tl.int64, "float32": tl.float32}[votes]
        constants = {"RULE": rule, "MEMORY": memory, "GIVEN": False, "SELECT": 64, "VOTES": kind, "MATRICES": 16,
                     "FIELDS": FIELDS, "M": side, "N": side}  # fmt: skip
        name = f"flip {rule} of {votes} {side}x{side}{' memory' if memory else ''}"
        instructions = ("fp16",) if rule == "spectral" else ()
        signature = {"table": "*i64", "flips": "*i64", **NUMBERS}
        where = (90,) if side == 128 else (80, 90, 100)
        found.append(Shipped(name, _flip_kernel, signature, constants, 8 if side == 128 else 4, 1, instructions, where))
    return found
