"""loss.png: training and validation loss of a run, and its flips, drawn from metrics.jsonl."""

import json
import os
from pathlib import Path

NUMBERS = ("step", "loss", "val_loss", "flips")  # of a record


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; what follows an unfinished or damaged line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # no JSON; numbers or lists without end
            break
        if not isinstance(record, dict) or record.get("step") is None:
            break
        if not all(_plain(record.get(name)) for name in NUMBERS):
            break
        records.append(record)
    return records


def _plain(value: object) -> bool:
    """Whether a number can be compared and drawn; NaN can, and what is not there."""
    return value is None or (isinstance(value, (int, float)) and not abs(value) > 1e100)


def draw(metrics: Path, png: Path, title: str, unit: str = "token") -> None:
    """Draw the curves of `metrics` into `png`; losses are in nats per `unit`.

    A viewer never sees half a picture: it is written beside `png` and renamed. Raises OSError, with `png` as its
    filename, if it cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second to import; pyplot and its windows are not needed

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    flips = [(r["step"], r["flips"]) for r in records if "flips" in r]
    integer = any(f < 1 for _, f in flips)
    figure = Figure(figsize=(7, 5.5 if integer else 4))
    heights = [3, 1] if integer else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    top, bottom = axes[0], axes[-1]
    if train:
        top.plot(*zip(*train, strict=True), color="0.7", linewidth=0.8, label="training batch")
    if val:
        top.plot(*zip(*val, strict=True), color="C0", marker="o", markersize=3, label="validation")
        step, loss = val[-1]
        top.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center", color="C0")
    top.set_ylabel(f"loss, nats per {unit}")
    top.set_title(title, y=1.0)  # a fixed place: looking for one would draw the axes twice
    top.grid(alpha=0.3)
    if train or val:
        top.legend(frameon=False)
    if integer:
        bottom.plot(*zip(*flips, strict=True), color="C1", linewidth=0.9)
        bottom.set(ylabel="flips per weight", ylim=(0, None))
        bottom.grid(alpha=0.3)
    bottom.set_xlabel("step")
    figure.align_ylabels(axes)
    figure.subplots_adjust(left=0.1, right=0.97, top=0.93, bottom=0.1)
    temporary = png.with_name(png.name + ".tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, png)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(png)) from None
