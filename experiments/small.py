"""The main table: integer transformers against AdamW and Muon on Tiny Shakespeare, at the small CPU size.

Every row is tuned on a part held out of the training text (eval_on = "tune", one seed); the best setting of a row is
then trained three times on the whole training part and judged by the loss of its last step on the usual last 10 %
(eval_on = "val").
"""

from dataclasses import replace
from statistics import mean

from experiments.rows import SEEDS, Row, finished, make_row, markdown, settings, tune_and_train, tuning_table
from experiments.sweep import Store, exact, show_quality

__all__ = ["tuning_table"]  # for the report
PAPER = {"delta": "sign", "rule": "contribution", "embedding_rule": "contribution", "topk_tile": 0,
         "flip_prob": "score"}  # fmt: skip


def row(name: str, common: dict, *choices: dict) -> Row:
    """A row of the small transformer, 500 steps unless a choice says otherwise."""
    return make_row(name, "shakespeare_char_small", {"steps": 500} | common, *choices)


GFT = {"method": "gft"}
MOMENTUM = GFT | {"momentum": 0.9}
ROWS = (
    row("AdamW, fp32", {"method": "adamw", "warmup": 50, "weight_decay": 0.1, "lr_end": 0.0},
        {"lr": 4e-3}, {"lr": 8e-3}, {"lr": 12e-3}, {"lr": 16e-3}, {"lr": 24e-3}, {"lr": 32e-3},
        {"lr": 8e-3, "lr_end": 0.1}),
    row("Muon, fp32", {"method": "muon", "lr": 8e-3, "warmup": 0, "lr_end": 0.0},
        {"muon_lr": 8e-3}, {"muon_lr": 16e-3}, {"muon_lr": 24e-3}, {"muon_lr": 32e-3},
        {"muon_lr": 48e-3}, {"muon_lr": 64e-3},
        {"muon_lr": 16e-3, "warmup": 20}, {"muon_lr": 16e-3, "weight_decay": 0.1}),
    row("GFT, no momentum", GFT,
        {"bits": 6, "k": 0.5}, {"bits": 6, "k": 0.4}, {"bits": 6, "k": 0.5, "init_std": 0.4},
        {"bits": 7, "k": 0.55, "step_size": 2}),
    row("GFT, momentum", MOMENTUM,
        {"bits": 6, "k": 0.2}, {"bits": 6, "k": 0.3}, {"bits": 7, "k": 0.3, "step_size": 2},
        {"bits": 8, "k": 0.4, "step_size": 4}),
    row("GFT, 4 bits, no momentum", GFT | {**exact(4)},
        {"k": 0.1, "init_std": 0.5}, {"k": 0.15, "init_std": 0.5}, {"k": 0.1, "init_std": 0.7}),
    row("GFT, 4 bits, momentum", MOMENTUM | {**exact(4)},
        {"k": 0.06}, {"k": 0.06, "init_std": 0.5}, {"k": 0.1, "init_std": 0.5}),
    row("GFT, ternary, no momentum", GFT | {**exact(2)},
        {"k": 0.015, "init_std": 0.6}, {"k": 0.05, "init_std": 1.0, "k_schedule": "quadratic"},
        {"k": 0.03, "init_std": 0.6, "steps": 250, "batch_size": 96},
        {"k": 0.02, "init_std": 0.8, "steps": 250, "batch_size": 96}),
    row("GFT, ternary, momentum", MOMENTUM | {**exact(2), "momentum": 0.95},
        {"k": 0.02}, {"k": 0.02, "init_std": 0.6}, {"k": 0.01, "init_std": 0.6},
        {"k": 0.005, "init_std": 0.6}, {"k": 0.005, "init_std": 0.6, "momentum": 0.98}),
    row("GFT, paper mode", GFT | PAPER, {"bits": 6, "k": 0.5}, {**exact(2), "k": 0.5}, {**exact(2), "k": 0.1}),
)  # fmt: skip


def run(store: Store, jobs: int, quick: bool, common: dict) -> None:
    """Tune every row, then train its winner with each seed."""
    short = {"steps": 12, "warmup": 0, "eval_windows": 20, "compile": "false"} if quick else {}
    rows = [replace(row, cells=row.cells[:2]) for row in ROWS] if quick else ROWS
    tune_and_train(rows, store, jobs, SEEDS[:1] if quick else SEEDS, **short, **common)


def table(store: Store, threads: int = 1) -> str:
    """The table as markdown: the rows whose grid and finals are in the store."""
    heads = ("row", "bits", "settings chosen on the held-out part", "val loss, last step", "against AdamW",
             "flips per weight and step", "float weights, bytes", "optimizer state, bytes")  # fmt: skip
    found = list(finished(ROWS, store, threads=threads))
    base = mean(r["val_loss"] for r in found[0][1]) if found and found[0][0] is ROWS[0] else None  # AdamW
    lines = []
    for row, runs in found:
        first, against = runs[0], "" if base is None else f"{mean(r['val_loss'] for r in runs) - base:+.4f}"
        lines.append((
            row.name, str(first["bits"]), settings(first), f"{show_quality(runs)} ({len(runs)} seeds)", against,
            f"{mean(r['flips_per_weight_per_step'] for r in runs):.3f}", f"{first['float_param_bytes']:,}",
            f"{first['optimizer_state_bytes']:,}",
        ))  # fmt: skip
    return "\n".join(markdown(heads, lines))
