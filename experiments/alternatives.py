"""Against the alternatives: AdamW, SGD with momentum, signSGD, Muon, quantization-aware training (STE) and GFT.

All methods train the same nets on the same tokens (images). On the text AdamW, Muon and GFT have the settings that won
in batches of 48; everything else is tuned here, on the held-out part, with one seed and two fifths of the steps. The
measure is the last step's, with as many seeds as the table says. STE rounds the weights of every product, at 2 bits by
mean|w| as BitNet b1.58 does, at 4 and 8 bits to a uniform grid as DoReFa does (without its tanh, and with the first and
the last layer rounded too), and keeps latent fp32 weights under AdamW; its activations stay fp32. State per weight is
the weight as it is kept while training, plus what the optimizer keeps. Time and memory are those of the first seed, two
processes side by side with one thread each; energy is modelled (45 nm, docs/energy.md).

Rows named "as few as it takes" may train on fewer tokens: of fifteen lengths and batch sizes, the one of least energy
that is as good on the held-out part as fp32 AdamW after 500 steps of 48 (the best one, where none is), then judged on
the other part. Learning rates scale with the root of the batch size.
"""

from collections.abc import Mapping, Sequence
from statistics import mean

from experiments.rows import (
    QUICK,
    SEEDS,
    Finished,
    Row,
    each,
    grouped_tables,
    make_row,
    markdown,
    settings,
    shortened,
    tune_and_train,  # fmt: skip
    tuning_table,
)
from experiments.sweep import Store, exact, quality, show_quality, steps_to

__all__ = ["tuning_table"]  # for the report

FLOAT = {"warmup": 50, "lr_end": 0.0}
DECAY = FLOAT | {"weight_decay": 0.1}
MUON = {"method": "muon", "lr_end": 0.0, "lr": 8e-3}
GFT = {"method": "gft"}
MOMENTUM = GFT | {"momentum": 0.9}
ADAMW, ADAMW_BF16 = "AdamW", "AdamW, bf16"
HALF = {"precision": "bf16"}
# Batch and steps. k falls to 0 by the last step, so a run cut short is worth little: fewer tokens are other runs.
LENGTHS = ((12, 1000), (12, 1200), (12, 1500), (16, 800), (16, 1200), (24, 500), (24, 550), (24, 600), (24, 800),
           (32, 400), (32, 450), (32, 600), (48, 300), (48, 350), (48, 400))  # fmt: skip


def baselines(*, sgd: Sequence[float], sign: Sequence[float], adam: Sequence[float], ste: Sequence[float],
           muon: Sequence[float]) -> dict[str, tuple[dict, ...]]:  # fmt: skip
    """The baselines with these learning rates to choose from."""
    return {
        ADAMW: each("lr", *adam, **DECAY, method="adamw"),
        ADAMW_BF16: each("lr", *adam, **DECAY, **HALF, method="adamw"),
        "SGD, momentum 0.9": each("lr", *sgd, **FLOAT, method="sgd"),
        "signSGD": each("lr", *sign, **FLOAT, method="signsgd"),
        "Muon": each("muon_lr", *muon, **MUON),
    } | {f"STE, {bits} bits" if bits > 1 else "STE, 1 bit": each("lr", *ste, **DECAY, method="ste", bits=bits)
         for bits in (8, 4, 2, 1)}  # fmt: skip


def shorter(common: dict, **rates: float) -> tuple[dict, ...]:
    """A grid of LENGTHS; `rates` are those of batches of 48."""
    return tuple(
        common | {"batch_size": batch, "steps": steps}
        | {key: round(rate * (batch / 48) ** 0.5, 5) for key, rate in rates.items()}
        for batch, steps in LENGTHS
    )


LM_GRIDS = baselines(sgd=(0.1, 0.3, 1.0, 3.0), sign=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3), adam=(24e-3,),
                  ste=(4e-3, 8e-3, 16e-3, 32e-3), muon=(48e-3,)) | {
    "GFT, 6 bits": (GFT | {"bits": 6, "k": 0.5},),
    "GFT, 6 bits, bf16": (GFT | HALF | {"bits": 6, "k": 0.5},),
    "GFT, 6 bits, momentum": (MOMENTUM | {"bits": 6, "k": 0.3},),
    "GFT, 4 bits, momentum": (MOMENTUM | {**exact(4), "k": 0.06, "init_std": 0.5},),
    "GFT, ternary, momentum": (MOMENTUM | {**exact(2), "momentum": 0.95, "k": 0.01, "init_std": 0.6},),
}  # fmt: skip
LM_FEWER = {
    f"{name}, bf16, as few as it takes": shorter(common | HALF, **rates) for name, common, rates in (
        (ADAMW, DECAY | {"method": "adamw"}, {"lr": 24e-3}),
        ("Muon", MUON, {"muon_lr": 48e-3, "lr": 8e-3}),
        ("GFT, 6 bits", GFT | {"bits": 6, "k": 0.5}, {}),
        ("GFT, 6 bits, momentum", MOMENTUM | {"bits": 6, "k": 0.3}, {}),
    )
}  # fmt: skip
MNIST_GRIDS = baselines(sgd=(0.03, 0.1, 0.3, 1.0), sign=(3e-4, 1e-3, 3e-3, 1e-2), adam=(4e-3, 8e-3, 16e-3, 32e-3),
                     ste=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3), muon=(4e-3, 12e-3, 36e-3)) | {
    "GFT, 6 bits": each("k", 0.1, 0.2, 0.3, **GFT, bits=6),
    "GFT, 4 bits": each("k", 0.03, 0.06, 0.12, 0.24, **GFT, **exact(4), init_std=0.5),
    "GFT, 6 bits, momentum": each("k", 0.05, 0.1, 0.2, **MOMENTUM, bits=6),
    "GFT, 4 bits, momentum": each("k", 0.015, 0.03, 0.06, **GFT, **exact(4), momentum=0.95, init_std=0.5),
    "GFT, ternary, momentum": each("k", 0.00125, 0.0025, 0.005, **MOMENTUM, **exact(2), init_std=0.6),
    "GFT, binary, momentum": each("k", 0.001, 0.002, 0.004, **GFT, **exact(1), momentum=0.98),
}  # fmt: skip


def rows_of(config: str, common: dict, grids: Mapping[str, tuple[dict, ...]], fewer: Mapping[str, tuple[dict, ...]],
            tuned_with: dict) -> tuple[Row, ...]:  # fmt: skip
    """A row for each grid, tuned on shorter runs, and for each of `fewer`, which need no more than be AdamW's equal."""
    shorter_runs = tuple(tuned_with.items())
    rows = [make_row(name, config, common, *grid, tuned_with=shorter_runs) for name, grid in grids.items()]
    rows += [make_row(name, config, common, *grid, enough=rows[0].cells[0]) for name, grid in fewer.items()]
    return tuple(rows)


GROUPS = {
    "Tiny Shakespeare, 0.8 M weights, 500 steps": rows_of(
        "shakespeare_char_small", {"steps": 500, "eval_every": 100}, LM_GRIDS, LM_FEWER, {"steps": 200}),
    "MNIST, MLP 784-256-10, 10 epochs": rows_of(
        "mnist", {"steps": 2350, "batch_size": 256, "eval_every": 235, "crop_min": 1.0}, MNIST_GRIDS, {},
        {"steps": 940}),
}  # fmt: skip


def run(store: Store, jobs: int, quick: bool) -> None:
    """Tune the rows of both nets, then train them with one seed after the other."""
    if quick:
        rows = [row for n, group in enumerate(GROUPS.values()) for row in shortened(group)[:: 4 if n else 2]]
        tune_and_train(rows, store, jobs, SEEDS[:1], **QUICK)
    else:
        tune_and_train([row for group in GROUPS.values() for row in group], store, jobs, SEEDS, apart=True)


def joules_to(runs: Sequence[dict], target: float) -> float | None:
    """Modelled joules of training until the mean of `runs` reaches `target` (loss, of images accuracy) at an
    evaluation; None if it does not, or a run diverged."""
    step = steps_to(runs, target)
    return None if step is None else runs[0]["energy_model_joules"] * step / runs[0]["steps"]


def table(store: Store) -> str:
    """Both tables of each net as markdown, of the rows that are in the store."""
    return grouped_tables(GROUPS, store, lambda found: [*_methods(found), *_energy(found)])


def _methods(found: Finished) -> list[str]:
    """Quality and what it costs, a line for each method."""
    measure = "val loss" if found[0][1][0].get("accuracy") is None else "accuracy"
    heads = ("method", f"{measure}, last step", "seeds", "updates per weight and step", "state per weight, bytes",
             "peak memory, MiB", "ms per step", "chosen")  # fmt: skip
    lines = []
    for row, runs in found:
        first = runs[0]
        state = first["int_weight_bytes"] + first["float_param_bytes"] + first["optimizer_state_bytes"]
        chosen = ("lr", "muon_lr", "k", "momentum", *(("steps", "batch_size") if row.enough else ()))
        lines.append((
            row.name, show_quality(runs), str(len(runs)), f"{mean(r['flips_per_weight_per_step'] for r in runs):.3f}",
            f"{state / first['weights']:.2f}", f"{first['peak_memory_bytes'] / 2**20:.0f}",
            f"{1000 * first['step_seconds']:.1f}",
            ", ".join(part for part in settings(first).split(", ") if part.split(" ")[0] in chosen),
        ))  # fmt: skip
    return markdown(heads, lines)


def _energy(found: Finished) -> list[str]:
    """Modelled energy for a million tokens, and until what AdamW had at its end is reached."""
    named = {row.name: runs for row, runs in found}
    base, half = named.get(ADAMW), named.get(ADAMW_BF16)
    if base is None or any(r.get("diverged") for r in base):
        return []
    images = base[0].get("accuracy") is not None
    goal = mean(quality(r) for r in base)
    whole, whole_half = (mean(r["energy_model_joules"] for r in runs) if runs else None for runs in (base, half))

    def per_million(runs: Sequence[dict]) -> float:
        return mean(1e6 * r["energy_model_joules"] / r["tokens"] for r in runs)

    def times(joules: float | None, needed: float | None) -> str:
        return "" if joules is None or needed is None else f"{joules / needed:.2f}x"

    lines = []
    for row, runs in found:
        needed = joules_to(runs, goal)
        reached = "not reached" if needed is None else f"{needed:.2f}"
        if len(runs) < len(base):  # AdamW's first seeds may have had an easier goal
            needed, reached = None, "seeds missing"
        # Of runs side by side a counter gives the sum.
        measured = [j for r in runs if r.get("jobs") == 1 and (j := r.get("energy_measured_joules")) is not None]
        lines.append((
            row.name, f"{per_million(runs):.2f}", times(per_million(base), per_million(runs)), reached,
            times(whole, needed), times(whole_half, needed), f"{mean(measured):.1f} J" if measured else "n/a",
        ))  # fmt: skip
    asked = f"{100 * goal:.2f} %" if images else f"{goal:.4f}"
    heads = ("method", f"joules per million {'images' if images else 'tokens'}", "fp32 AdamW's, times less",
             "joules to the goal", "fp32 AdamW's, times less", "bf16 AdamW's for all its steps, times less",
             "measured")  # fmt: skip
    return ["", f"Energy, modelled. The goal is what fp32 AdamW has at its last step, {asked} as the mean of "
            f"{len(base)} seeds, for {whole:.2f} J; a method has reached it at the first evaluation at which the mean "
            "of its own, as many, is as good.", "", *markdown(heads, lines), *_why_not_measured(found)]  # fmt: skip


def _why_not_measured(found: Finished) -> list[str]:
    """What the runs say of their energy counters."""
    records = [r for _, runs in found for r in runs]
    reasons = {r.get("energy_note", "").partition("measured: ")[2] for r in records} - {""}
    if any(r.get("energy_measured_joules") is not None and r.get("jobs") != 1 for r in records):
        reasons = {"n/a: of runs side by side a counter gives the sum (--jobs 1 takes them one by one)"}
    return ["", f"Measured: {'; '.join(sorted(reasons))}."] if reasons else []
