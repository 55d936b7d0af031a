"""Figures of sweeps: lines with error bars over the values of one setting, several panels side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

PANEL_INCHES = (4.6, 3.6)

Point = tuple[str, Sequence[float]]  # a value of the setting, and what each seed reached there


@dataclass(frozen=True)
class Panel:
    """One plot: `lines` by their name, each a list of points in order."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]


def draw(png: Path, panels: Sequence[Panel]) -> None:
    """Draw `panels` into `png`, making its folder. Raises OSError if it cannot be written."""
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)


def spaced_by_logarithm(values: Sequence[float]) -> bool:
    """Whether ascending values lie more evenly by their logarithms than as they are."""
    def unevenness(of: Sequence[float]) -> float:
        gaps = [b - a for a, b in pairwise(of)]
        return max(gaps) / min(gaps)

    return len(values) > 2 and values[0] > 0 and unevenness([math.log(v) for v in values]) < unevenness(values)


def _draw_panel(axes, panel: Panel) -> None:
    names = list(dict.fromkeys(x for points in panel.lines.values() for x, _ in points))
    try:
        places, line = {name: float(name) for name in names}, "-"
    except ValueError:  # names have no order: nothing lies between them
        places, line = {name: float(n) for n, name in enumerate(names)}, "none"
    for n, (label, points) in enumerate(panel.lines.items()):
        aside = 0.0 if line == "-" else 0.12 * (n - (len(panel.lines) - 1) / 2)
        xs = [places[x] + aside for x, _ in points]
        order = sorted(range(len(xs)), key=xs.__getitem__)
        means = [mean(values) for _, values in points]
        bars = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar(
            [xs[i] for i in order], [means[i] for i in order], yerr=[bars[i] for i in order], color=f"C{n}",
            marker="o", markersize=4, linewidth=1.3, linestyle=line, elinewidth=1, capsize=3, label=label,
        )  # fmt: skip
    spots = sorted(places.values())
    if spaced_by_logarithm(spots):
        axes.set_xscale("log")
        axes.minorticks_off()
    texts = [names[list(places.values()).index(spot)] for spot in spots]
    crowded = sum(map(len, texts)) > 40
    axes.set_xticks(spots, texts, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.3)
    if any(panel.lines):
        axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")
