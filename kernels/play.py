"""One update of a small matrix, step by step, in a terminal: what kernels/flip.py does to a large one.

    python -m kernels.play flip                         4 x 8 weights of 3 bits, rule gain
    python -m kernels.play flip --rule spectral --k 0.5 --seed 2
    python -m kernels.play flip --pause                 Enter goes on to the next step

Every number is computed by the functions that training uses, and the result is compared with that of `flip` itself.
"""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.flip import flip
from kernels.limits import RULES, weight_limit
from kernels.philox import Stream, make_rng, words_from
from kernels.scores import score
from kernels.tiles import from_tiles, tile_sizes, to_tiles
from kernels.topk import apply_moves, rank, select, topk_count
from kernels.update_rule import UpdateRule
from kernels.votes import accumulate_votes

OUT, IN, TOKENS, TILE = 4, 8, 3, 4


def show(matrix: Tensor, text: Callable[[float], str] = "{:g}".format) -> str:
    """A matrix (rows, columns) with a bar between its tiles."""
    cells = [[text(value) for value in row] for row in matrix.tolist()]
    width = max(len(cell) for row in cells for cell in row)
    lines = []
    for r, row in enumerate(cells):
        parts = ["  ".join(cell.rjust(width) for cell in row[c : c + TILE]) for c in range(0, len(row), TILE)]
        lines += [""] * (r > 0 and r % TILE == 0) + ["    " + "  |  ".join(parts)]
    return "\n".join(lines)


def steps(rule: UpdateRule, k: float, seed: int) -> list[str]:
    """The texts of one update's steps. Raises AssertionError if `flip` does anything else."""
    q, unit = weight_limit(rule.bits)
    numbers = torch.Generator().manual_seed(seed)
    weight = torch.randint(-q, q + 1, (1, OUT, IN), generator=numbers, dtype=torch.int8)
    weight = torch.where(weight == 0, 1, weight) if rule.bits == 1 else weight
    d = torch.randint(-9, 10, (TOKENS, OUT), generator=numbers, dtype=torch.int8)
    x = torch.randint(-9, 10, (TOKENS, IN), generator=numbers, dtype=torch.int8)
    rng, layers, stop = make_rng(seed), torch.zeros(1, dtype=torch.int64), torch.zeros(())
    share = torch.tensor(k, dtype=torch.float64)

    votes = torch.zeros((1, OUT, IN), dtype=torch.int32)
    accumulate_votes(d, x, votes[0], rng)
    terms = " + ".join(f"{a} * {b}" for a, b in zip(d[:, 0].tolist(), x[:, 0].tolist(), strict=True))
    scores = score(rule.rule, votes, weight, rule.ortho_tile)

    def tiled(matrix: Tensor) -> Tensor:
        return to_tiles(matrix, TILE).flatten(1)

    def untiled(tiles: Tensor) -> Tensor:
        return from_tiles(tiles.unflatten(1, (TILE, TILE)), (OUT, IN))[0]

    ranks = rank(tiled(scores), tiled(weight), q, unit)
    sizes = tile_sizes((OUT, IN), TILE)
    words = words_from(rng, Stream.TOPK, len(sizes), layers=layers).flatten()
    m = topk_count(share, sizes, words)
    chosen = select(ranks, m)
    moved = untiled(apply_moves(tiled(weight), tiled(scores), chosen, q, unit))
    before, moves = weight[0].clone(), moved - weight[0]
    blocked = (untiled(ranks) == 0) & (scores[0] != 0)
    counts = "; ".join(
        f"tile {i}: floor({k:g} * {n} + {u:.2f}) = {count}"
        for i, (n, u, count) in enumerate(zip(sizes.tolist(), (words / 2**32).tolist(), m.tolist(), strict=True))
    )
    flips = flip(votes.clone(), weight, share, rng, layers, stop, rule)
    assert torch.equal(weight[0], moved) and int(flips) == int((moves != 0).sum())
    given = f"the error D ({TOKENS} x {OUT}) and the input X ({TOKENS} x {IN})"
    return [
        f"1. Weights W, {OUT} outputs x {IN} inputs, of {rule.bits} bits: each in [-{q}, {q}]. "
        f"The bar separates tiles of {TILE} x {TILE}.\n\n{show(before)}",
        f"2. A backward pass brings, for {TOKENS} tokens, {given}, both int8.\n\nD\n{show(d)}\n\nX\n{show(x)}",
        f"3. Votes V = D^T X: the weight gradient, in integers. The first is {terms} = {int(votes[0, 0, 0])}.\n\n"
        f"{show(votes[0])}",
        f"4. The rule {rule.rule!r} makes scores S of them{' (here V itself)' if rule.rule == 'gain' else ''}. "
        "A weight is to move against the sign of S;\n   |S| says how urgently.\n\n"
        f"{show(scores[0], '{:.3g}'.format)}",
        f"5. A move past -{q} or {q} is not legal. {int(blocked.sum())} of {OUT * IN} are not (x).\n\n"
        f"{show(blocked, lambda b: 'x' if b else '.')}",
        f"6. How many move: the share k = {k:g} of each tile, rounded up or down at random, so that it is right on "
        f"average.\n\n    {counts}",
        f"7. In each tile the legal moves of largest |S| are made, one step of {unit} each.\n\n"
        f"{show(moves, lambda v: f'{v:+d}' if v else '.')}",
        f"8. The new weights; {int(flips)} of {OUT * IN} moved. V is cleared: nothing else is kept.\n\n"
        f"{show(moved)}\n\nkernels.flip.flip gives the same weights.",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Print the steps. Raises SystemExit for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m kernels.play", description=__doc__.split("\n")[0])
    parser.add_argument("operation", choices=["flip"])
    parser.add_argument("--rule", choices=RULES, default="gain", help="how votes become scores (default: %(default)s)")
    parser.add_argument("--k", type=float, default=0.23, help="share of the weights that move (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=3, choices=range(1, 9), help="of a weight (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another matrix (default: %(default)s)")
    parser.add_argument("--pause", action="store_true", help="wait for Enter after each step")
    args = parser.parse_args(argv)
    if not 0 <= args.k <= 1:
        parser.error(f"--k {args.k}: a share is from 0 to 1")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed {args.seed}: it is from 0 to 2^64 - 1")
    try:
        for text in steps(UpdateRule(args.rule, args.bits, ortho_tile=TILE, topk_tile=TILE), args.k, args.seed):
            print(text, flush=True)
            input() if args.pause else print(flush=True)
    except EOFError:
        parser.exit(1, "error: standard input has ended; without --pause all steps are printed at once\n")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it exits
        parser.exit(1, f"error: cannot write to standard output: {error.strerror}\n")


if __name__ == "__main__":
    main()
