"""Draws docs/step.png, one training step of one integer layer: python docs/draw_step.py

The matrices in the middle are computed here, for a layer of 8 x 8 weights with k = 0.25.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Patch

FLOAT, INT8, EDGE = "#f1ece2", "#cfe3f7", "#3b3b3b"
SIDE, TOKENS, K, LIMIT = 8, 32, 0.25, 31
FORWARD, BACKWARD, MATRIX_TOP, CELL = 6.4, 0.6, 4.75, 0.285


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, votes, scores and moves of a small layer, each (8, 8)."""
    rng = np.random.default_rng(5)
    loud = np.array([3, 1, 1, 0.4, 1, 2, 0.5, 1])
    x = np.rint(rng.normal(size=(TOKENS, SIDE)) * 21 * loud[::-1]).clip(-127, 127)
    d = np.rint(rng.normal(size=(TOKENS, SIDE)) * 21 * loud).clip(-127, 127)
    weight = np.rint(rng.normal(size=(SIDE, SIDE)) * 0.33 * LIMIT).clip(-LIMIT, LIMIT)
    votes = d.T @ x
    u, _, v = np.linalg.svd(votes)
    scores = u @ v  # what the Newton-Schulz steps of `spectral` approach
    legal = abs(weight - np.sign(scores)) <= LIMIT
    ranked = np.argsort(-np.where(legal, abs(scores), 0), axis=None)
    moves = np.zeros(SIDE * SIDE)
    moves[ranked[: int(K * SIDE * SIDE)]] = 1
    return weight, votes, scores, -np.sign(scores) * moves.reshape(SIDE, SIDE)


def box(ax, x: float, y: float, text: str, colour: str, width: float = 1.4, height: float = 0.74) -> None:
    """A box with its centre at (x, y)."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02",
                                facecolor=colour, edgecolor=EDGE, linewidth=1))  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=12)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], text: str = "", up: float = 0.1) -> None:
    """An arrow with a label above its middle."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.3})
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + up, text, ha="center", va="bottom", fontsize=10)


def matrix(ax, x: float, values: np.ndarray, title: str, below: str, show: str = "", mark: np.ndarray | None = None):
    """An 8 x 8 matrix whose left edge is x: red is positive, blue negative; `show` formats the numbers in the cells."""
    top, side = MATRIX_TOP, CELL * SIDE
    limit = abs(values).max()
    place = (x, x + side, top - side, top)
    ax.imshow(values, cmap="RdBu_r", vmin=-1.6 * limit, vmax=1.6 * limit, extent=place, zorder=2)
    for i in range(SIDE):
        for j in range(SIDE):
            moved = mark is not None and mark[i, j]
            if show and (values[i, j] or not show.startswith("+")):
                ax.text(x + (j + 0.5) * CELL, top - (i + 0.5) * CELL, format(int(values[i, j]), show), zorder=3,
                        ha="center", va="center", fontsize=7.5, weight="bold" if moved else "normal")  # fmt: skip
            if moved:
                ax.add_patch(plt.Rectangle((x + j * CELL, top - (i + 1) * CELL), CELL, CELL, fill=False, linewidth=1.5,
                                           edgecolor="black", zorder=4))  # fmt: skip
    ax.add_patch(plt.Rectangle((x, top - side), side, side, fill=False, edgecolor=EDGE, linewidth=0.8, zorder=3))
    ax.text(x + side / 2, top + 0.12, title, ha="center", va="bottom", fontsize=11)
    ax.text(x + side / 2, top - side - 0.12, below, ha="center", va="top", fontsize=10)


def draw(path: Path) -> None:
    """Write the picture."""
    fig = plt.figure(figsize=(14, 6))
    ax = fig.add_axes((0, 0, 1, 1))
    first, middle, last = 0.9, 3.7, 14.4
    half, centre = CELL * SIDE / 2, MATRIX_TOP - CELL * SIDE / 2
    matrices = (middle, 6.5, 9.3, 12.1)
    for y, name in ((FORWARD, "1 forward"), (centre, "3 update"), (BACKWARD, "2 backward")):
        ax.text(-1.9, y, name, fontsize=13, weight="bold", va="center")
    boxes = ((first, "x", "δ of x", FLOAT), (middle, "X", "D", INT8), (last, "y", "δ of y", FLOAT))
    for x, above, below, colour in boxes:
        box(ax, x, FORWARD, above, colour)
        box(ax, x, BACKWARD, below, colour)
    arrow(ax, (first + 0.75, FORWARD), (middle - 0.75, FORWARD), "RMSNorm,\nround")
    product = "int8 product  X Wᵀ,  summed in int32,  times a fixed scale"
    arrow(ax, (middle + 0.75, FORWARD), (last - 0.75, FORWARD), product)
    arrow(ax, (last, FORWARD - 0.42), (last, BACKWARD + 0.42))
    ax.text(last + 0.15, centre, "later\nlayers,\nthe loss,\nand back", ha="left", va="center", fontsize=10)
    arrow(ax, (last - 0.75, BACKWARD), (middle + 0.75, BACKWARD))
    ax.text(12.6, BACKWARD + 0.1, "divide by σ, round", ha="center", va="bottom", fontsize=10)
    arrow(ax, (middle - 0.75, BACKWARD), (first + 0.75, BACKWARD), "D W, scaled,\nback through\nthe norm")

    weight, votes, scores, moves = example()
    matrix(ax, matrices[0] - half, votes, "votes  V = Dᵀ X", "exact int32 sums")
    matrix(ax, matrices[1] - half, scores, "scores  S = rule(V)", "no direction is louder\nthan the others")
    below = "one unit, for the k = 25 %\nwith the largest |S|"
    matrix(ax, matrices[2] - half, moves, "moves, against the sign of S", below, "+d", moves != 0)
    below = "integers from -31 to 31 (6 bits);\nV and S are cleared"
    matrix(ax, matrices[3] - half, weight + moves, "new weights W", below, "d", moves != 0)
    for left, right in zip(matrices[:-1], matrices[1:], strict=True):
        arrow(ax, (left + half + 0.06, centre), (right - half - 0.06, centre))
    arrow(ax, (middle, FORWARD - 0.42), (middle, MATRIX_TOP + 0.45))
    arrow(ax, (middle, BACKWARD + 0.42), (middle, MATRIX_TOP - 2 * half - 0.42))

    names = (("float: activations x, y and their errors δ", FLOAT), ("int8", INT8))
    ax.legend(handles=[Patch(facecolor=c, edgecolor=EDGE, label=n) for n, c in names], loc="lower center", ncols=2,
              frameon=False, bbox_to_anchor=(0.53, 0.0), fontsize=10)  # fmt: skip
    ax.set(xlim=(-2, 15.7), ylim=(-0.25, 7.3), aspect="equal")
    ax.axis("off")
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(Path(__file__).with_name("step.png"))
