"""What a net says about images, for people: a picture of some predictions, and a table of every class.

    from data.pictures import draw_predictions, per_class_table
    draw_predictions(out / "predictions.png", data.val, data.val_labels, probabilities, data.classes)
    print(per_class_table(data.val_labels, probabilities.argmax(1), data.classes))

The picture shows images spread evenly over all of them, which nobody has picked, and below them, apart, mistakes made
with the greatest confidence.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = 8
INCHES = 1.45  # width of an image with its margin
CAPTION_INCHES, HEADING_INCHES, HEADING_WIDTH = 0.6, 0.35, 6.0
CAPTION_LETTERS = 17  # so many fit under an image
WRONG = "#c1121f"


def choose(labels: np.ndarray, probabilities: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images to draw: indices spread evenly over all, and those of the surest mistakes.

    A third of `count` is for mistakes; there may be fewer. Of equally sure ones the first counts. One may be in both.
    """
    predicted, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    mistakes = wrong[np.argsort(-sure[wrong], kind="stable")][: count // 3]
    spread = min(len(labels), count - count // 3)
    return np.linspace(0, len(labels) - 1, spread).round().astype(np.int64), mistakes


def caption(label: int, probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """The class predicted and its probability; below, of a mistake, the true class and its own."""
    predicted = int(probabilities.argmax())
    says = f"{_short(classes[predicted])}\n{_percent(probabilities[predicted])}"
    if predicted == label:
        return says
    return f"{says}, but it is\n{_short(classes[label])} ({_percent(probabilities[label])})"


def draw_predictions(
    png: Path,
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    count: int = 24,
) -> None:
    """Draw up to `count` of the images (N, H, W, C) uint8 with labels (N,) and probabilities (N, classes) into `png`.

    Raises OSError if `png` cannot be written.
    """
    from matplotlib.figure import Figure

    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    spread, mistakes = choose(labels, probabilities, count)
    predicted = probabilities.argmax(axis=1)
    wrong = predicted != labels
    right = (~wrong[spread]).sum()
    heading = f"Spread evenly: {len(spread)} of {len(labels):,} images, {right} right; below each, what the net says"
    parts = [(spread, heading)]
    if len(mistakes):
        parts.append((mistakes, f"Mistakes made with the greatest confidence: {len(mistakes)} of {wrong.sum():,}"))
    shape = images.shape[1] / images.shape[2]
    columns = min(COLUMNS, max(len(chosen) for chosen, _ in parts))
    heights = [-(-len(chosen) // columns) * (INCHES * shape + CAPTION_INCHES) + HEADING_INCHES for chosen, _ in parts]
    figure = Figure(figsize=(max(columns * INCHES, HEADING_WIDTH), sum(heights)), layout="constrained")
    areas = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for area, (chosen, heading) in zip(areas, parts, strict=True):
        area.suptitle(heading, fontsize=10)
        axes = area.subplots(-(-len(chosen) // columns), columns, squeeze=False).flatten()
        for ax in axes:
            ax.set_axis_off()
        for ax, index in zip(axes, chosen.tolist()):
            _draw_one(ax, images[index], caption(labels[index], probabilities[index], classes), bool(wrong[index]))
    figure.savefig(png, dpi=110)


def _draw_one(ax, image: np.ndarray, text: str, wrong: bool) -> None:
    if image.shape[-1] == 1:
        ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        ax.imshow(image)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], anchor="N")
    for spine in ax.spines.values():
        spine.set(visible=wrong, color=WRONG, linewidth=3)
    ax.set_xlabel(text, fontsize=8, color=WRONG if wrong else "black", parse_math=False)


def per_class_table(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> str:
    """A table, Markdown that is aligned as plain text: for each class how many images there are, the share predicted
    right, and the class it is most often taken for; of equals the first. The last row is about all images.

    labels and predicted are class numbers (N,).
    """
    labels, predicted = (np.asarray(numbers).astype(np.int64) for numbers in (labels, predicted))
    n = len(classes)
    table = np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)  # row: what it is; column: what is said
    right = table.diagonal()
    mistakes = table - np.diag(right)
    rows = [("class", "images", "right", "most often taken for")]
    rows += [
        (classes[c], f"{table[c].sum():,}", _share(right[c], table[c].sum()), _mistake(mistakes[c], classes))
        for c in range(n)
    ]
    rows.append(("all", f"{table.sum():,}", _share(right.sum(), table.sum()), ""))
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {a:<{w}} | {b:>{x}} | {c:>{y}} | {d:<{z}} |" for a, b, c, d in rows for w, x, y, z in [widths]]
    w, x, y, z = widths
    lines.insert(1, f"|{'-' * (w + 2)}|{'-' * (x + 1)}:|{'-' * (y + 1)}:|{'-' * (z + 2)}|")
    return "\n".join(lines)


def _mistake(counts: np.ndarray, classes: Sequence[str]) -> str:
    return f"{classes[counts.argmax()]} ({counts.max():,})" if counts.any() else "-"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f} %"


def _short(name: str) -> str:
    return textwrap.shorten(name, CAPTION_LETTERS, placeholder="...") if " " in name else name[:CAPTION_LETTERS]
