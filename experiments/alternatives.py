"""Against the alternatives: AdamW, SGD with momentum, signSGD, Muon, quantization-aware training (STE) and GFT.

The same nets and the same tokens (images) for all. What has a learning rate is tuned on the held-out part, one seed;
GFT, and on the text AdamW and Muon, have the settings that won in the tables above. Three seeds, judged at the last step.
STE rounds the weights of every product, at 2 bits in the manner of BitNet b1.58 (mean|w|), at 4 and 8 bits to a uniform
grid in the manner of DoReFa, and keeps latent fp32 weights under AdamW; its activations stay fp32. State per weight is the
weight itself as it is kept while training and what the optimizer keeps. The time is of runs side by side, one thread each,
other work included; energy is modelled (45 nm, docs/energy.md).
"""

from collections.abc import Mapping, Sequence
from statistics import mean

from experiments.rows import QUICK, SEEDS, Row, finished, make_row, settings, shortened, tune_and_train, tuning_table
from experiments.sweep import Store, show_quality

__all__ = ["tuning_table"]  # for the report

FLOAT = {"warmup": 50, "lr_end": 0.0}
DECAY = FLOAT | {"weight_decay": 0.1}
MEMORY = {"method": "gft", "memory": "int8"}
NO_MEMORY = {"method": "gft", "memory": "none"}
ADAMW = "AdamW"


def rates(common: dict, key: str, *values: float) -> tuple[dict, ...]:
    """A grid of learning rates."""
    return tuple(common | {key: value} for value in values)


def rows_of(config: str, common: dict, gft: Mapping[str, dict], sgd: Sequence[float], sign: Sequence[float],
            adam: Sequence[float], ste: Sequence[float], muon: Sequence[float]) -> tuple[Row, ...]:  # fmt: skip
    """The rivals with these learning rates to choose from, and the rows of GFT."""
    rivals = {
        ADAMW: rates(DECAY | {"method": "adamw"}, "lr", *adam),
        "AdamW, bf16": rates(DECAY | {"method": "adamw", "precision": "bf16"}, "lr", adam[-1]),
        "SGD, momentum 0.9": rates(FLOAT | {"method": "sgd"}, "lr", *sgd),
        "signSGD": rates(FLOAT | {"method": "signsgd"}, "lr", *sign),
        "Muon": rates({"method": "muon", "lr_end": 0.0, "lr": 8e-3}, "muon_lr", *muon) if muon else (),
    } | {f"STE, {bits} bits" if bits > 1 else "STE, 1 bit": rates(DECAY | {"method": "ste", "bits": bits}, "lr", *ste)
         for bits in (8, 4, 2, 1)}  # fmt: skip
    choices = rivals | {name: (chosen,) for name, chosen in gft.items()}
    return tuple(make_row(name, "", config, common, *grid) for name, grid in choices.items() if grid)


# Runs that have less time: flips anneal to nothing by the last step, so that a run cut short is worth little.
SHORT = MEMORY | {"bits": 6, "k": 0.3, "steps": 300}
LM_GFT = {
    "GFT, 6 bits": NO_MEMORY | {"bits": 6, "k": 0.5},
    "GFT, 6 bits, int8 memory": MEMORY | {"bits": 6, "k": 0.3},
    "GFT, 4 bits, int8 memory": MEMORY | {"bits": 4, "k": 0.06, "init_spread": 0.5},
    "GFT, ternary, int8 memory": MEMORY | {"bits": 2, "beta": 0.95, "k": 0.01, "init_spread": 0.6},
    "GFT, 6 bits, int8 memory, 300 steps": SHORT,
    "GFT, 6 bits, int8 memory, bf16, 300 steps": SHORT | {"precision": "bf16"},
}  # fmt: skip
MNIST_GFT = {
    "GFT, 6 bits": NO_MEMORY | {"bits": 6, "k": 0.3},
    "GFT, 4 bits": NO_MEMORY | {"bits": 4, "k": 0.05, "init_spread": 0.5},
    "GFT, 6 bits, int8 memory": MEMORY | {"bits": 6, "k": 0.1},
    "GFT, 4 bits, int8 memory": MEMORY | {"bits": 4, "beta": 0.95, "k": 0.03, "init_spread": 0.5},
    "GFT, ternary, int8 memory": MEMORY | {"bits": 2, "k": 0.005, "init_spread": 0.6},
    "GFT, binary, int8 memory": MEMORY | {"bits": 1, "beta": 0.98, "k": 0.002},
}
GROUPS = {
    "Tiny Shakespeare, 0.8 M weights, 500 steps": rows_of(
        "shakespeare_char_small", {"steps": 500, "eval_every": 50}, LM_GFT,
        sgd=(0.1, 0.3, 1.0), sign=(2e-3, 4e-3, 8e-3), adam=(24e-3,), ste=(8e-3, 24e-3), muon=(48e-3,)),
    "MNIST, MLP 784-256-10, 10 epochs": rows_of(
        "mnist", {"steps": 2350, "batch_size": 256, "eval_every": 235}, MNIST_GFT,
        sgd=(0.01, 0.03, 0.1), sign=(3e-4, 1e-3, 2e-3), adam=(2e-3, 4e-3), ste=(2e-3, 4e-3), muon=()),
}  # fmt: skip


def run(store: Store, jobs: int, quick: bool, common: dict) -> None:
    """Tune and train the character model's rows, then the MLP's."""
    for n, rows in enumerate(GROUPS.values()):
        if quick:
            tune_and_train(shortened(rows)[::4] if n else shortened(rows)[:10], store, jobs, SEEDS[:1], **QUICK, **common)
        else:
            tune_and_train(rows, store, jobs, SEEDS, apart=True, **common)


def joules_to(record: dict, target: float) -> float | None:
    """Modelled joules of training until an evaluation reaches `target` (loss, of images accuracy); None if none does."""
    images = record.get("accuracy") is not None
    for step, value in record.get("curve", ()):
        if value >= target if images else value <= target:
            return record["energy_model_joules"] * step / record["steps"]
    return None


def mean_joules_to(runs: Sequence[dict], target: float) -> float | None:
    """The mean over runs that all reach `target`, None if one does not."""
    each = [joules_to(r, target) for r in runs]
    return None if None in each else mean(each)


def table(store: Store, threads: int = 1) -> str:
    """Both tables of each net as markdown, of the rows that are in the store."""
    lines = []
    for title, rows in GROUPS.items():
        found = [(row, runs) for row, runs in finished(rows, store, threads=threads) if not any(r.get("diverged") for r in runs)]
        if found:
            lines += ["", f"### {title}", "", *_methods(found), *_energy(found)]
    return "\n".join(lines).strip() or "Nothing is finished yet."


def _methods(found: Sequence[tuple[Row, list[dict]]]) -> list[str]:
    """Quality and what it costs, a line for each method."""
    measure = "val loss" if found[0][1][0].get("accuracy") is None else "accuracy"
    lines = [f"| method | {measure}, last step | seeds | updates per weight and step | state per weight, bytes | "
             "peak memory, MiB | ms per step | chosen |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row, runs in found:
        first = runs[0]
        state = first["int_weight_bytes"] + first["float_param_bytes"] + first["optimizer_state_bytes"]
        rate = [part for part in settings(first).split(", ") if part.split(" ")[0] in ("lr", "muon_lr", "k", "beta")]
        lines.append(
            f"| {row.name} | {show_quality(runs)} | {len(runs)} | {mean(r['flips_per_weight_per_step'] for r in runs):.3f} | "
            f"{state / first['weights']:.2f} | {mean(r['peak_memory_bytes'] for r in runs) / 2**20:.0f} | "
            f"{1000 * mean(r['step_seconds'] for r in runs):.1f} | {', '.join(rate)} |"
        )
    return lines


def _energy(found: Sequence[tuple[Row, list[dict]]]) -> list[str]:
    """Modelled energy for a million tokens, and until what AdamW had at its end is reached."""
    base = dict((row.name, runs) for row, runs in found).get(ADAMW)
    if base is None:
        return []
    images = base[0].get("accuracy") is not None
    target = mean(r["accuracy" if images else "val_loss"] for r in base)
    whole = mean(r["energy_model_joules"] for r in base)
    unit = "images" if images else "tokens"
    goal = f"{100 * target:.2f} %" if images else f"{target:.4f}"

    def per_million(runs: Sequence[dict]) -> float:
        return mean(1e6 * r["energy_model_joules"] / r["tokens"] for r in runs)

    lines = ["", f"Energy, modelled. The goal is what fp32 AdamW has at its last step, {goal}, for {whole:.2f} J; a method has "
             "reached it at the first evaluation of every seed that is as good.", "",
             f"| method | joules per million {unit} | AdamW's, times less | joules to the goal | AdamW's, times less | measured |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row, runs in found:
        needed = whole if runs is base else mean_joules_to(runs, target)
        goal_text = ("not reached", "") if needed is None else (f"{needed:.2f}", f"{whole / needed:.2f}x")
        measured = [j for r in runs if (j := r.get("energy_measured_joules")) is not None]
        lines.append(
            f"| {row.name} | {per_million(runs):.2f} | {per_million(base) / per_million(runs):.2f}x | {goal_text[0]} | "
            f"{goal_text[1]} | {f'{mean(measured):.1f} J' if measured else 'n/a'} |"
        )
    reasons = {r.get("energy_note", "").partition("measured: ")[2] for _, runs in found for r in runs} - {""}
    return [*lines, "", f"Measured: {'; '.join(sorted(reasons))}."] if reasons else lines
