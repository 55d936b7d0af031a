"""The main table: integer transformers against AdamW and Muon on Tiny Shakespeare, at the small CPU size.

Every row is tuned on a part held out of the training text (eval_on = "tune", one seed); the winner of a row's
grid is then trained three times on the whole training part and judged by the loss of its last step on the
usual last 10 % (eval_on = "val").
"""

from dataclasses import replace
from statistics import mean

from experiments.rows import SEEDS, Row, finished, settings, tune_and_train, tuning_table
from experiments.sweep import Cell, Store, show_quality

__all__ = ["tuning_table"]  # for the report
CONFIG = "shakespeare_char_small"


def grid(name: str, common: dict, *choices: dict) -> tuple[Cell, ...]:
    """Cells of one row: `common` settings and one of `choices` each."""
    return tuple(Cell(name, CONFIG).with_(**{"steps": 500} | common | choice) for choice in choices)


MEMORY = {"method": "gft", "memory": "int8"}
PAPER = {"delta": "sign", "rule": "contribution", "embedding_rule": "contribution", "select_tile": 0,
         "flip_prob": "score"}  # fmt: skip

ROWS = (
    Row("AdamW, fp32", "", grid(
        "AdamW, fp32", {"method": "adamw", "warmup": 50, "weight_decay": 0.1, "lr_end": 0.0},
        {"lr": 4e-3}, {"lr": 8e-3}, {"lr": 12e-3}, {"lr": 16e-3}, {"lr": 24e-3}, {"lr": 32e-3},
        {"lr": 8e-3, "lr_end": 0.1},
    )),
    Row("Muon, fp32", "", grid(
        "Muon, fp32", {"method": "muon", "lr": 8e-3, "warmup": 0, "lr_end": 0.0},
        {"muon_lr": 8e-3}, {"muon_lr": 16e-3}, {"muon_lr": 24e-3}, {"muon_lr": 32e-3},
        {"muon_lr": 48e-3}, {"muon_lr": 64e-3},
        {"muon_lr": 16e-3, "warmup": 20}, {"muon_lr": 16e-3, "weight_decay": 0.1},
    )),
    Row("GFT, no memory", "+0.02 / 0", grid(
        "GFT, no memory", {"method": "gft"},
        {"bits": 6, "k": 0.5}, {"bits": 6, "k": 0.4}, {"bits": 6, "k": 0.5, "init_spread": 0.4},
        {"bits": 7, "k": 0.55, "step_size": 2},
    )),
    Row("GFT, int8 memory", "-0.02 / level with Muon", grid(
        "GFT, int8 memory", MEMORY,
        {"bits": 6, "k": 0.2}, {"bits": 6, "k": 0.3}, {"bits": 7, "k": 0.3, "step_size": 2},
        {"bits": 8, "k": 0.4, "step_size": 4},
    )),
    Row("GFT, 4 bits, no memory", "+0.12 / +0.04", grid(
        "GFT, 4 bits, no memory", {"method": "gft", "bits": 4},
        {"k": 0.1, "init_spread": 0.5}, {"k": 0.15, "init_spread": 0.5}, {"k": 0.1, "init_spread": 0.7},
    )),
    Row("GFT, 4 bits, int8 memory", "0 / -0.03", grid(
        "GFT, 4 bits, int8 memory", MEMORY | {"bits": 4},
        {"k": 0.06}, {"k": 0.06, "init_spread": 0.5}, {"k": 0.1, "init_spread": 0.5},
    )),
    Row("GFT, ternary, no memory", "+0.40 / +0.20", grid(
        "GFT, ternary, no memory", {"method": "gft", "bits": 2},
        {"k": 0.015, "init_spread": 0.6}, {"k": 0.05, "init_spread": 1.0, "k_schedule": "quadratic"},
        {"k": 0.03, "init_spread": 0.6, "steps": 250, "batch_size": 96},
        {"k": 0.02, "init_spread": 0.8, "steps": 250, "batch_size": 96},
    )),
    Row("GFT, ternary, int8 memory", "+0.17 / +0.08", grid(
        "GFT, ternary, int8 memory", MEMORY | {"bits": 2, "beta": 0.95},
        {"k": 0.02}, {"k": 0.02, "init_spread": 0.6}, {"k": 0.01, "init_spread": 0.6},
        {"k": 0.005, "init_spread": 0.6}, {"k": 0.005, "init_spread": 0.6, "beta": 0.98},
    )),
    Row("GFT, paper mode", "", grid(
        "GFT, paper mode", {"method": "gft"} | PAPER,
        {"bits": 6, "k": 0.5}, {"bits": 2, "k": 0.5}, {"bits": 2, "k": 0.1},
    )),
)  # fmt: skip


def run(store: Store, jobs: int, quick: bool, common: dict) -> None:
    """Tune every row, then train its winner with each seed."""
    short = {"steps": 12, "warmup": 0, "eval_windows": 20, "compile": "false"} if quick else {}
    rows = [replace(row, cells=row.cells[:2]) for row in ROWS] if quick else ROWS
    tune_and_train(rows, store, jobs, SEEDS[:1] if quick else SEEDS, **short, **common)


def table(store: Store, threads: int = 1) -> str:
    """The table as markdown: the rows whose grid and finals are in the store."""
    lines = [
        "| row | bits | settings chosen on the held-out part | val loss, last step | against AdamW | must / aim | "
        "flips per weight and step | float weights, bytes | optimizer state, bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = list(finished(ROWS, store, threads=threads))
    base = mean(r["val_loss"] for r in found[0][1]) if found and found[0][0] is ROWS[0] else None  # AdamW
    for row, runs in found:
        losses = [r["val_loss"] for r in runs]
        against = "" if base is None else f"{mean(losses) - base:+.4f}"
        lines.append(
            f"| {row.name} | {runs[0]['bits']} | {settings(runs[0])} | {show_quality(runs)} ({len(losses)} seeds) | "
            f"{against} | {row.target} | {mean(r['flips_per_weight_per_step'] for r in runs):.3f} | "
            f"{runs[0]['float_param_bytes']:,} | {runs[0]['optimizer_state_bytes']:,} |"
        )
    return "\n".join(lines)
