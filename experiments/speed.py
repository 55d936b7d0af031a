"""Seconds per training step, one run after another with the machine to itself: GFT against AdamW.

Every method runs compiled and as written; each is judged by its faster one. The figure is the median over the
steps of a run, evaluation and compilation left out.
"""

from experiments.sweep import Cell, Store, run_cells

CONFIG = "shakespeare_char_small"
METHODS = (
    ("GFT, no memory", {"method": "gft"}),
    ("GFT, int8 memory", {"method": "gft", "memory": "int8"}),
    ("AdamW, fp32", {"method": "adamw"}),
    ("AdamW, bf16 autocast", {"method": "adamw", "precision": "bf16"}),
    ("Muon, fp32", {"method": "muon"}),
)


def cells(quick: bool, common: dict) -> list[Cell]:
    """Every method compiled and as written."""
    steps = 8 if quick else 60
    return [
        Cell(name, CONFIG).with_(**settings, **common, steps=steps, compile=compiled, warmup=0)
        for name, settings in METHODS
        for compiled in (("false",) if quick else ("true", "false"))
    ]


def run(store: Store, jobs: int, quick: bool, common: dict) -> None:
    """Run the cells one at a time, whatever `jobs` says: two at once would time each other."""
    run_cells(cells(quick, common), store, 1)


def table(store: Store) -> str:
    """The table as markdown."""
    fastest: dict[str, dict] = {}
    times: dict[tuple[str, bool], float] = {}
    for record in store.done.values():
        times[record["label"], record["environment"]["compile"]] = record["step_seconds"]
        best = fastest.setdefault(record["label"], record)
        if record["step_seconds"] < best["step_seconds"]:
            fastest[record["label"]] = record
    if "AdamW, fp32" not in fastest:
        return "Not finished: AdamW is missing."
    base = fastest["AdamW, fp32"]["step_seconds"]
    lines = [
        "| method | ms per step, compiled | as written | against AdamW fp32, each at its fastest | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for label, record in fastest.items():
        written, compiled = times.get((label, False)), times.get((label, True))
        lines.append(
            f"| {label} | {_ms(compiled)} | {_ms(written)} | {record['step_seconds'] / base:.2f}x | "
            f"{record['peak_memory_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"
