"""Images: an MLP on MNIST at 6, 4, 2 and 1 bits, and a ViT on Imagenette at 64 x 64 pixels, against fp32 AdamW.

Every row is tuned on a tenth of the training images (eval_on = "tune", one seed, the ViT on half of the epochs); the
winner of a row's grid is then trained three times on all of them and judged by its accuracy after the last step on the
official test images. On MNIST all rows may have larger batches, as few bits need votes of little noise, more epochs,
and random crops of 80 % or more of an image's area, which stand for more digits.
Bytes of weights are those of a file with `bits` bits for each, state is what the optimizer keeps between steps.
"""

from statistics import mean

from experiments.rows import Row, finished_groups, make_row, settings, train_groups, tuning_table
from experiments.sweep import Store, show_quality

__all__ = ["tuning_table"]  # for the report

NO_MEMORY, MEMORY = {"method": "gft", "memory": "none"}, {"method": "gft", "memory": "int8"}
FORTY, EIGHTY = {"batch_size": 1024, "steps": 2350}, {"batch_size": 1024, "steps": 4700}  # epochs of MNIST
SIXTY, LONG = {"batch_size": 4096, "steps": 880}, {"batch_size": 4096, "steps": 1760}
LARGE = {"batch_size": 8192, "steps": 880}
CROP = {"crop_min": 0.8}
TRAINING_IMAGES = {"mnist": 60_000, "imagenette": 9_469}


def mnist(name: str, target: str, common: dict, *choices: dict) -> Row:
    """A row of the MLP: whole digits, batches of 256, 20 epochs and orthogonalised scores unless it says otherwise."""
    usual = {"eval_every": 470, "batch_size": 256, "steps": 4700, "crop_min": 1.0}
    if common["method"] != "gft":
        return make_row(name, target, "mnist_adamw", usual | common, *choices)
    return make_row(name, target, "mnist", usual | {"rule": "spectral"} | common, *choices)


def vit(name: str, target: str, common: dict, *choices: dict) -> Row:
    """A row of the ViT, 10 epochs, tuned on runs of five."""
    config = "imagenette_small" if common["method"] == "gft" else "imagenette_small_adamw"
    shorter = {"steps": 740, **({"warmup": 100} if common["method"] != "gft" else {})}
    return make_row(name, target, config, {"eval_every": 740} | common, *choices, tuned_with=tuple(shorter.items()))


BALANCED = {"rule": "balanced"}
MNIST = (
    mnist("AdamW, fp32", "", {"method": "adamw"},
          {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3}, {"lr": 4e-3} | FORTY,
          CROP | {"lr": 2e-3}, CROP | {"lr": 4e-3}, CROP | {"lr": 1e-3, "steps": 9400},
          CROP | {"lr": 2e-3, "steps": 9400}, CROP | {"lr": 2e-3, "steps": 14100}),
    mnist("6 bits, no memory", "97.8 / 98.4", NO_MEMORY | {"bits": 6},
          {"k": 0.3}, {"k": 0.2} | FORTY, BALANCED | {"k": 0.3}, BALANCED | {"k": 0.3} | FORTY,
          BALANCED | {"k": 0.15} | FORTY, BALANCED | CROP | {"k": 0.3} | FORTY,
          BALANCED | {"k": 0.3, "crop_min": 0.6} | FORTY, BALANCED | CROP | {"k": 0.3} | EIGHTY),
    mnist("4 bits, no memory", "97.2 / 98.2", NO_MEMORY | {"bits": 4, "init_spread": 0.5},
          {"k": 0.05} | FORTY, BALANCED | {"k": 0.1}, BALANCED | {"k": 0.05} | FORTY, BALANCED | {"k": 0.05} | SIXTY,
          BALANCED | CROP | {"k": 0.05} | SIXTY, BALANCED | CROP | {"k": 0.05} | LONG),
    mnist("ternary, no memory", "96.8 / 97.8", NO_MEMORY | {"bits": 2, "init_spread": 0.6},
          {"k": 0.01} | SIXTY, BALANCED | {"k": 0.02} | FORTY, BALANCED | {"k": 0.01} | SIXTY,
          BALANCED | {"k": 0.02} | SIXTY, BALANCED | {"k": 0.02} | LARGE, BALANCED | CROP | {"k": 0.02} | LONG,
          BALANCED | CROP | {"k": 0.02, "select_tile": 16} | LARGE),
    mnist("binary, no memory", "95.5 / 97.5", NO_MEMORY | {"bits": 1},
          {"k": 0.01} | SIXTY, BALANCED | {"k": 0.005} | FORTY, BALANCED | {"k": 0.01} | SIXTY,
          BALANCED | {"k": 0.005} | SIXTY, BALANCED | {"k": 0.01} | LARGE,
          BALANCED | {"k": 0.01} | LARGE | {"steps": 1760}, BALANCED | {"k": 0.01, "select_tile": 32} | LARGE),
    mnist("6 bits, int8 memory", "98.0 / 98.6", MEMORY | {"bits": 6},
          {"k": 0.1}, BALANCED | {"k": 0.1}, BALANCED | {"k": 0.1} | FORTY, BALANCED | {"k": 0.05} | FORTY,
          BALANCED | CROP | {"k": 0.1} | FORTY, BALANCED | CROP | {"k": 0.1} | EIGHTY),
    mnist("4 bits, int8 memory", "97.9 / 98.5", MEMORY | BALANCED | {"bits": 4, "init_spread": 0.5},
          {"k": 0.03, "beta": 0.95}, {"k": 0.03} | FORTY, {"k": 0.03, "beta": 0.95} | FORTY,
          CROP | {"k": 0.03} | FORTY, CROP | {"k": 0.03} | EIGHTY),
    mnist("ternary, int8 memory", "97.3 / 98.3", MEMORY | BALANCED | {"bits": 2, "init_spread": 0.6},
          {"k": 0.005}, {"k": 0.005, "beta": 0.95} | FORTY, {"k": 0.005} | SIXTY, {"k": 0.01} | SIXTY,
          CROP | {"k": 0.005} | FORTY, CROP | {"k": 0.005} | EIGHTY, CROP | {"k": 0.005} | LONG,
          CROP | {"k": 0.005, "select_tile": 16} | LONG, CROP | {"k": 0.005} | LONG | {"steps": 3520}),
    mnist("binary, int8 memory", "96.5 / 98.0", MEMORY | BALANCED | {"bits": 1},
          {"k": 0.002, "beta": 0.98}, {"k": 0.002, "beta": 0.98} | FORTY, {"k": 0.002, "beta": 0.95} | SIXTY,
          {"k": 0.005} | SIXTY, {"k": 0.002, "beta": 0.95} | EIGHTY, {"k": 0.002, "beta": 0.95} | LONG,
          CROP | {"k": 0.002, "beta": 0.95} | LONG, CROP | {"k": 0.002, "beta": 0.95, "select_tile": 16} | LONG,
          CROP | {"k": 0.005, "beta": 0.95, "select_tile": 16} | LONG),
)  # fmt: skip
VIT = (
    vit("AdamW, fp32", "", {"method": "adamw"}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3}),
    vit("6 bits, no memory", "AdamW - 1.5 / better", NO_MEMORY | {"bits": 6}, {"k": 0.5}, {"k": 0.3}),
    vit("6 bits, int8 memory", "", MEMORY | {"bits": 6}, {"k": 0.2}, {"k": 0.3}),
)
GROUPS = {"MNIST, MLP 784-256-10": MNIST, "Imagenette, 64 x 64 pixels, ViT of 0.8 M weights": VIT}


def run(store: Store, jobs: int, quick: bool, common: dict) -> None:
    """Tune and train MNIST, then the ViT."""
    train_groups(GROUPS.values(), store, jobs, quick, common)


def table(store: Store, threads: int = 1) -> str:
    """A table for each data set as markdown: the rows whose grid and finals are in the store."""
    lines = []
    for title, rows, found in finished_groups(GROUPS, store, threads):
        lines += ["", f"### {title}", "",
                  "| row | accuracy, last step | seeds | against AdamW, points | must / aim | epochs | "
                  "flips per weight and step | weights, bytes | optimizer state, bytes | "
                  "settings chosen on the held-out part |",
                  "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        base = mean(r["accuracy"] for r in found[0][1]) if found[0][0] is rows[0] else None
        for row, runs in found:
            against = "" if base is None else f"{100 * (mean(r['accuracy'] for r in runs) - base):+.2f}"
            first = runs[0]
            lines.append(
                f"| {row.name} | {show_quality(runs)} | {len(runs)} | {against} | {row.target} | "
                f"{first['tokens'] / TRAINING_IMAGES[first['settings']['data']]:.0f} | "
                f"{mean(r['flips_per_weight_per_step'] for r in runs):.4f} | "
                f"{first['packed_weight_bytes'] or first['float_param_bytes']:,} | "
                f"{first['optimizer_state_bytes']:,} | {chosen(first)} |"
            )
    return "\n".join(lines).strip() or "Nothing is finished yet."


def chosen(record: dict) -> str:
    """The winner's settings, but memory, which the row's name tells, and that digits are whole."""
    return ", ".join(part for part in settings(record).split(", ") if not part.startswith(("memory ", "crop_min 1.0")))
