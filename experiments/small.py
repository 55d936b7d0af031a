"""The main table: integer transformers against float ones on Tiny Shakespeare, at the small CPU size.

Every row sees 1.536 M characters: 500 steps of 48 windows, or as many as its batch size makes of them. A row is tuned,
its batch size included, on a part held out of the training text (eval_on = "tune", one seed); the best setting is then
trained with three seeds on the whole training part and judged by the loss of its last step on the usual last 10 %
(eval_on = "val"). Rows that lie around AdamW and Muon have five seeds; rows that keep fewer than six bits have batches
of 48 and 96 alone.

Bits are those that products read of a weight and those that it keeps. Muon has AdamW for embedding and head, 2 % of the
weights. "Muon, int8" keeps its momentum in int8 (arXiv 2509.23106), SWAN none (arXiv 2412.13148): they are the float
methods with as little state as GFT. STE is quantization-aware training: latent fp32 weights, rounded in every product.
Updates until AdamW's loss: how often a weight has moved, on average, when the loss is first as good as AdamW's last.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from experiments.rows import (
    SEEDS,
    Row,
    each,
    finals,
    finished,
    make_row,
    markdown,
    settings,
    tune_and_train,
    tuning_table,
)
from experiments.sweep import Store, exact, run_cells, show_quality, steps_to

__all__ = ["tuning_table"]  # for the report
PAPER = {"delta": "sign", "rule": "contribution", "embedding_rule": "contribution", "topk_tile": 0,
         "flip_prob": "score"}  # fmt: skip


def row(name: str, common: dict, *choices: dict, variant: str = "") -> Row:
    """A row of the small transformer, 500 steps unless a choice says otherwise."""
    return make_row(name, "shakespeare_char_small", {"steps": 500} | common, *choices, variant=variant)


TWELVE, HALF = {"batch_size": 12, "steps": 2000}, {"batch_size": 24, "steps": 1000}
GFT, FOUR = {"method": "gft"}, {"bits": 2, "levels": 4}
MOMENTUM = GFT | {"momentum": 0.9}
ADAMW = {"warmup": 50, "weight_decay": 0.1, "lr_end": 0.0}
MUON = {"warmup": 0, "lr": 8e-3, "lr_end": 0.0}
BASELINE = "AdamW, fp32"
ROWS = (
    row(BASELINE, ADAMW | {"method": "adamw"},
        *each("lr", 4e-3, 8e-3, 12e-3, 16e-3, 24e-3, 32e-3), {"lr": 8e-3, "lr_end": 0.1},
        *each("lr", 4e-3, 8e-3, 16e-3, 24e-3, **HALF), *each("lr", 2e-3, 4e-3, 8e-3, 16e-3, **TWELVE)),
    row("Muon, fp32", MUON | {"method": "muon"},
        *each("muon_lr", 8e-3, 16e-3, 24e-3, 32e-3, 48e-3, 64e-3),
        {"muon_lr": 16e-3, "warmup": 20}, {"muon_lr": 16e-3, "weight_decay": 0.1},
        *each("muon_lr", 24e-3, 32e-3, 48e-3, 64e-3, **HALF), *each("muon_lr", 24e-3, 32e-3, 48e-3, **TWELVE)),
    row("Muon, int8", MUON | {"method": "muon", "muon_state": "int8"},
        *each("muon_lr", 32e-3, 48e-3, 64e-3, **HALF), {"muon_lr": 48e-3}, {"muon_lr": 32e-3} | TWELVE),
    row("SWAN", MUON | {"method": "muon", "muon_state": "none"},
        {"muon_lr": 8e-3}, *each("muon_lr", 4e-3, 16e-3, 32e-3, 64e-3, 96e-3, 128e-3, 192e-3, **HALF),
        {"muon_lr": 96e-3} | TWELVE),
    row("GFT, 6 bits", GFT | {"bits": 6},
        *each("k", 0.4, 0.5), {"k": 0.5, "init_std": 0.4}, {"k": 0.55, "bits": 7, "step_size": 2},
        *each("k", 0.3, 0.4, 0.5, **HALF), *each("k", 0.3, 0.4, **TWELVE)),
    row("GFT, 6 bits, momentum", MOMENTUM | {"bits": 6},
        *each("k", 0.2, 0.3), {"k": 0.3, "bits": 7, "step_size": 2}, {"k": 0.4, "bits": 8, "step_size": 4},
        *each("k", 0.2, 0.3, 0.4, 0.5, **HALF), {"k": 0.3, "momentum": 0.95} | HALF,
        *each("k", 0.2, 0.3, **TWELVE)),
    *(row(f"GFT, {name}", GFT | bits, *each("k", 0.3, 0.5, 0.7, 0.9, **HALF), {"k": 0.9}, *each("k", *short, **TWELVE))
      for name, bits, *short in (
          ("4 bits", {"bits": 4}, 0.7), ("ternary", {"bits": 2}, 0.5, 0.7, 0.9), ("binary", {"bits": 1}, 0.7, 0.9))),
    row("GFT, 2 bits of four levels", GFT | FOUR, *each("k", 0.5, 0.7, 0.9, **HALF), {"k": 0.9},
        *each("k", 0.7, **TWELVE)),
    *(row(f"GFT, {name}, momentum", MOMENTUM | bits, *each("k", *shares, **HALF), {"k": full}, {"k": short} | TWELVE)
      for name, bits, full, short, *shares in (
          ("2 bits of four levels", FOUR, 0.4, 0.2, 0.2, 0.3, 0.4), ("4 bits", {"bits": 4}, 0.4, 0.2, 0.2, 0.3, 0.4),
          ("ternary", {"bits": 2}, 0.3, 0.12, 0.12, 0.2, 0.3), ("binary", {"bits": 1}, 0.5, 0.3, 0.2, 0.3, 0.4, 0.6))),
    *(row(f"STE, {name}, AdamW", ADAMW | {"method": "ste", "bits": bits}, {"lr": 16e-3},
          *each("lr", 4e-3, 8e-3, **HALF), {"lr": 8e-3} | TWELVE)
      for name, bits in (("4 bits", 4), ("ternary", 2), ("binary", 1))),
    *(row(f"STE, {name}, Muon", MUON | {"method": "ste", "ste_optimizer": "muon", "bits": bits},
          *each("muon_lr", 32e-3, 48e-3, 64e-3, **HALF), {"muon_lr": 32e-3} | TWELVE)
      for name, bits in (("4 bits", 4), ("ternary", 2), ("binary", 1))),
    row("STE, 2 bits of four levels, Muon", MUON | {"method": "ste", "ste_optimizer": "muon", "bits": 2},
        *each("muon_lr", 32e-3, 48e-3, 64e-3, **HALF), {"muon_lr": 32e-3} | TWELVE,
        variant="four levels of latent weights"),
    row("GFT, 4 bits kept", GFT | exact(4),
        *each("k", 0.1, 0.15, init_std=0.5), {"k": 0.1, "init_std": 0.7}),
    row("GFT, 4 bits kept, momentum", MOMENTUM | exact(4),
        {"k": 0.06}, *each("k", 0.06, 0.1, init_std=0.5)),
    row("GFT, ternary kept", GFT | exact(2),
        {"k": 0.015, "init_std": 0.6}, {"k": 0.05, "init_std": 1.0, "k_schedule": "quadratic"},
        {"k": 0.03, "init_std": 0.6, "steps": 250, "batch_size": 96},
        {"k": 0.02, "init_std": 0.8, "steps": 250, "batch_size": 96}),
    row("GFT, ternary kept, momentum", MOMENTUM | exact(2) | {"momentum": 0.95},
        {"k": 0.02}, *each("k", 0.005, 0.01, 0.02, init_std=0.6),
        {"k": 0.005, "init_std": 0.6, "momentum": 0.98}),
    row("GFT, paper mode", GFT | PAPER, {"bits": 6, "k": 0.5}, *each("k", 0.1, 0.5, **exact(2))),
)  # fmt: skip


MORE_SEEDS = (4, 5)
CLOSE = (BASELINE, "SWAN", "Muon, fp32", "Muon, int8", "GFT, 6 bits, momentum", "GFT, 4 bits, momentum",
         "GFT, ternary, momentum", "STE, ternary, AdamW", "STE, ternary, Muon")  # fmt: skip


def run(store: Store, jobs: int, quick: bool) -> None:
    """Tune every row, then train its winner with each seed, rows that are close with two more."""
    short = {"steps": 12, "warmup": 0, "eval_windows": 20, "compile": "false"} if quick else {}
    rows = [replace(row, cells=row.cells[:2]) for row in ROWS] if quick else ROWS
    tune_and_train(rows, store, jobs, SEEDS[:1] if quick else SEEDS, **short)
    if not quick:
        close = [row for row in rows if row.name in CLOSE]
        run_cells([cell for row in close for cell in finals(row, store, MORE_SEEDS)], store, jobs)


def updates_until(runs: Sequence[dict], target: float) -> str:
    """Moves of a weight, on average, until the mean loss of runs is `target`; "" where it is not reached.

    k falls linearly to 0, so that of T steps the first t make 1 - (1 - t / T)^2 of all moves.
    """
    step, steps = steps_to(runs, target), runs[0]["steps"]
    if step is None:
        return ""
    moves = mean(r["flips_per_weight_per_step"] for r in runs) * steps
    return f"{moves * (1 - (1 - step / steps) ** 2) if runs[0]['method'] == 'gft' else step:.0f}"


def table(store: Store) -> str:
    """The table as markdown: the rows whose grid and finals are in the store."""
    heads = ("row", "bits read / kept", "val loss, last step", "seeds", "against AdamW",
             "bytes per weight: weight + state", "moves of a weight per step", "updates until AdamW's loss",
             "chosen on the held-out part")  # fmt: skip
    found = list(finished(ROWS, store, (*SEEDS, *MORE_SEEDS)))
    base = mean(r["val_loss"] for r in found[0][1]) if found and found[0][0] is ROWS[0] else None
    lines = []
    for row, runs in found:
        first, against = runs[0], "" if base is None else f"{mean(r['val_loss'] for r in runs) - base:+.4f}"
        weights = first["int_weight_bytes"] + first["float_param_bytes"]
        lines.append((
            row.name, bits_of(first), show_quality(runs), str(len(runs)), against,
            f"{weights / first['weights']:.0f} + {first['optimizer_state_bytes'] / first['weights']:.3g}",
            f"{mean(r['flips_per_weight_per_step'] for r in runs):.3f}",
            "" if base is None else updates_until(runs, base), settings(first),
        ))  # fmt: skip
    return "\n".join(markdown(heads, lines))


def bits_of(record: dict) -> str:
    """Bits that are read of a weight and that it keeps."""
    kept = {"gft": record.get("keep_bits") or record["settings"].get("keep_bits", record["bits"]), "ste": 32}
    return f"{record['bits']} / {kept.get(record['method'], 32)}"
