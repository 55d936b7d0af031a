"""Seconds per training step, one run after another with the machine to itself: GFT against AdamW.

Every method runs compiled and not compiled; it is judged by the faster of the two. The time is the median over a run's
steps, without evaluation and compilation. Other work on the machine can slow compiled runs by a fifth, so theirs is the
median of three runs that alternate with those of the other methods.
"""

from statistics import median

from experiments.rows import markdown
from experiments.sweep import Cell, Store, run_cells

CONFIG = "shakespeare_char_small"
BASELINE = "AdamW, fp32"
METHODS = (
    ("GFT, no momentum", {"method": "gft"}),
    ("GFT, momentum", {"method": "gft", "momentum": 0.9}),
    (BASELINE, {"method": "adamw"}),
    ("AdamW, bf16 autocast", {"method": "adamw", "precision": "bf16"}),
    ("Muon, fp32", {"method": "muon"}),
)


def cells(quick: bool) -> list[Cell]:
    """Every method compiled and not compiled, with torch's choice of threads; a quick run is uncompiled, with one."""
    steps, threads = (8, 1) if quick else (60, 0)
    rounds = [("false", 1)] if quick else [("true", 1), ("true", 2), ("true", 3), ("false", 1)]
    return [
        Cell(name, CONFIG).with_(**settings, threads=threads, steps=steps, compile=compiled, seed=seed, warmup=0)
        for compiled, seed in rounds
        for name, settings in METHODS
    ]


def run(store: Store, jobs: int, quick: bool) -> None:
    """Run the cells one at a time, whatever `jobs` says: two at once would time each other."""
    run_cells(cells(quick), store, 1, apart=not quick)


def table(store: Store) -> str:
    """The table as markdown."""
    runs: dict[tuple[str, bool], list[float]] = {}
    memory: dict[str, int] = {}
    for record in store.done.values():
        runs.setdefault((record["label"], record["environment"]["compile"]), []).append(record["step_seconds"])
        memory[record["label"]] = max(memory.get(record["label"], 0), record["peak_memory_bytes"])
    times = {key: median(seconds) for key, seconds in runs.items()}
    fastest = {name: min(t for (label, _), t in times.items() if label == name) for name in memory}
    if BASELINE not in fastest:
        return "Not finished: AdamW is missing."
    heads = ("method", "ms per step, compiled", "not compiled", "against AdamW fp32, each at its fastest",
             "peak memory, MiB")  # fmt: skip
    return "\n".join(markdown(heads, [
        (name, _ms(times.get((name, True))), _ms(times.get((name, False))), f"{seconds / fastest[BASELINE]:.2f}x",
         f"{memory[name] / 2**20:.0f}")
        for name, seconds in fastest.items()
    ]))  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"
