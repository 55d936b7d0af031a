"""loss.png: training and validation loss of a run, and its flips, drawn from metrics.jsonl."""

import json
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; what follows an unfinished or damaged line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def draw(metrics: Path, png: Path, title: str, unit: str = "token") -> None:
    """Draw the curves of `metrics` into `png`; losses are in nats per `unit`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    flips = [(r["step"], r["flips"]) for r in records if "flips" in r]
    integer = any(f < 1 for _, f in flips)
    figure, axes = plt.subplots(
        2 if integer else 1, 1, figsize=(7, 5.5 if integer else 4), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [3, 1] if integer else [1]}, layout="constrained",
    )  # fmt: skip
    top = axes[0, 0]
    if train:
        top.plot(*zip(*train, strict=True), color="0.7", linewidth=0.8, label="training batch")
    if val:
        top.plot(*zip(*val, strict=True), color="C0", marker="o", markersize=3, label="validation")
        step, loss = val[-1]
        top.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center", color="C0")
    top.set(ylabel=f"loss, nats per {unit}", title=title)
    top.grid(alpha=0.3)
    if train or val:
        top.legend(frameon=False)
    if integer:
        axes[1, 0].plot(*zip(*flips, strict=True), color="C1", linewidth=0.9)
        axes[1, 0].set(ylabel="flips per weight", ylim=(0, None))
        axes[1, 0].grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(png, dpi=110)
    plt.close(figure)
