"""Few bits of six that are kept: other thresholds, grids and ways to change what is read.

The small transformer of the main table, 1,000 steps of 24 windows with the k that won there, on the part held out of
the training text, one seed: differences below 0.01 nats are noise. What a row changes is a function of
experiments/variants.py, or the key that it names. Products take any int8 values, so no grid needs another kernel. Two
bits are read as -1, 0 and 1 unless a row says otherwise.
"""

from experiments.rows import NOTHING_YET, QUICK, markdown
from experiments.sweep import Cell, Store, run_cells

COMMON = {"eval_on": "tune", "seed": 1, "steps": 1000, "batch_size": 24, "method": "gft", "eval_every": 1000}
KEYS = {"levels 4": {"levels": 4}, "keep_bits 7, moves of 2": {"keep_bits": 7, "step_size": 2},
        "keep_bits 8, moves of 4": {"keep_bits": 8, "step_size": 4}}  # fmt: skip
SAME = "as it is"
FOLLOWS, SCALED = "threshold half of the mean size", "scale the mean size"
# bits -> momentum -> k, and what is changed
PLANS = {
    2: {0.9: (0.2, (SAME, "levels 4", "threshold 0.2", "threshold 0.7", FOLLOWS, SCALED, "two scales", "hysteresis 1",
                    "hysteresis 2", "keep_bits 7, moves of 2", "keep_bits 8, moves of 4",
                    "keep_bits 2 in the last fifth, k / 20")),
        0.0: (0.9, (SAME, "levels 4", "threshold 0.2", "threshold 0.7", FOLLOWS, "hysteresis 1",
                    "keep_bits 2 in the last fifth, k / 60"))},
    1: {0.9: (0.4, (SAME, SCALED, "hysteresis 1", "keep_bits 8, moves of 4")), 0.0: (0.9, (SAME,))},
    3: {0.9: (0.3, (SAME, "powers of two, 7 levels", "quantiles, 7 levels"))},
    4: {0.9: (0.3, (SAME, "powers of two, 13 levels", "quantiles, 15 levels", "keep_bits 8, moves of 4"))},
}  # fmt: skip


def cell(bits: int, momentum: float, change: str, **short) -> Cell:
    """One run: `bits` read, `momentum`, and what `change` names."""
    settings = COMMON | {"bits": bits, "k": PLANS[bits][momentum][0]} | KEYS.get(change, {}) | short
    settings |= {"momentum": momentum} if momentum else {}
    variant = "" if change == SAME or change in KEYS else change
    return Cell(f"{bits} bits, {change}", "shakespeare_char_small", variant=variant).with_(**settings)


def cells() -> list[Cell]:
    """All runs, in the order of their tables."""
    return [cell(bits, momentum, change) for bits, by in PLANS.items()
            for momentum, (_, changes) in by.items() for change in changes]  # fmt: skip


def run(store: Store, jobs: int, quick: bool) -> None:
    """Run every cell; `quick` a few steps of one of each kind."""
    few = [cell(2, 0.9, name, **QUICK) for name in ("two scales", "hysteresis 1", PLANS[2][0.9][1][-1])]
    run_cells(few if quick else cells(), store, jobs)


def table(store: Store) -> str:
    """A table for each number of bits, as markdown, of the runs that are in the store."""
    lines: list[str] = []
    for bits, by in PLANS.items():
        changed: dict[str, dict[float, str]] = {}
        for momentum, (_, changes) in by.items():
            usual = store.get(cell(bits, momentum, SAME))
            for change in changes:
                if record := store.get(cell(bits, momentum, change)):
                    changed.setdefault(change, {})[momentum] = _shown(record, usual)
        if changed:
            heads = ("changed", *("momentum" if momentum else "no momentum" for momentum in by))
            rows = [(change, *(found.get(momentum, "") for momentum in by)) for change, found in changed.items()]
            lines += ["", f"### {bits} bit{'s' * (bits > 1)} read", "", *markdown(heads, rows)]
    return "\n".join(lines).strip() or NOTHING_YET


def _shown(record: dict, usual: dict | None) -> str:
    against = f" ({record['val_loss'] - usual['val_loss']:+.3f})" if usual is not None and usual is not record else ""
    return f"{record['val_loss']:.4f}{against}"
