"""Images: an MLP on MNIST at 6, 4, 2 and 1 bits, and a ViT on Imagenette at 64 x 64 pixels, against fp32 AdamW.

Every row is tuned on a tenth of the training images (eval_on = "tune", one seed, the ViT on half of the epochs); the
best setting of a row is then trained three times on all of them and judged by its accuracy after the last step on the
official test images. On MNIST every row may use larger batches (few bits need votes with little noise), more epochs,
and random crops of at least 80 % of an image's area, which act as more digits. Weight bytes are those of a file with
`bits` bits per weight; state is what the optimizer keeps between steps.
"""

from statistics import mean

from experiments.rows import Finished, Row, grouped_tables, make_row, markdown, settings, train_groups, tuning_table
from experiments.sweep import Store, exact, show_quality

__all__ = ["tuning_table"]  # for the report

GFT = {"method": "gft"}
MOMENTUM = GFT | {"momentum": 0.9}
FORTY, EIGHTY = {"batch_size": 1024, "steps": 2350}, {"batch_size": 1024, "steps": 4700}  # epochs of MNIST
SIXTY, LONG = {"batch_size": 4096, "steps": 880}, {"batch_size": 4096, "steps": 1760}
LARGE = {"batch_size": 8192, "steps": 880}
CROP = {"crop_min": 0.8}
TRAINING_IMAGES = {"mnist": 60_000, "imagenette": 9_469}


def mnist(name: str, common: dict, *choices: dict) -> Row:
    """A row of the MLP: whole digits, batches of 256, 20 epochs and orthogonalised scores unless it says otherwise."""
    usual = {"eval_every": 470, "batch_size": 256, "steps": 4700, "crop_min": 1.0}
    if common["method"] != "gft":
        return make_row(name, "mnist_adamw", usual | common, *choices)
    return make_row(name, "mnist", usual | {"rule": "spectral"} | common, *choices)


def vit(name: str, common: dict, *choices: dict) -> Row:
    """A row of the ViT, 10 epochs, tuned on runs of five."""
    config = "imagenette_small" if common["method"] == "gft" else "imagenette_small_adamw"
    shorter = {"steps": 740, **({"warmup": 100} if common["method"] != "gft" else {})}
    return make_row(name, config, {"eval_every": 740} | common, *choices, tuned_with=tuple(shorter.items()))


BASELINE = "AdamW, fp32"
BALANCED = {"rule": "balanced"}
FOUR = {"bits": 2, "levels": 4}
CONFIG = BALANCED | CROP | {"batch_size": 1024}  # as configs/mnist.toml has it: 80 epochs
MNIST = (
    mnist(BASELINE, {"method": "adamw"},
          {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3}, {"lr": 4e-3} | FORTY,
          CROP | {"lr": 2e-3}, CROP | {"lr": 4e-3}, CROP | {"lr": 1e-3, "steps": 9400},
          CROP | {"lr": 2e-3, "steps": 9400}, CROP | {"lr": 2e-3, "steps": 14100}),
    mnist("6 bits, no momentum", GFT | {"bits": 6},
          {"k": 0.3}, {"k": 0.2} | FORTY, BALANCED | {"k": 0.3}, BALANCED | {"k": 0.3} | FORTY,
          BALANCED | {"k": 0.15} | FORTY, BALANCED | CROP | {"k": 0.3} | FORTY,
          BALANCED | {"k": 0.3, "crop_min": 0.6} | FORTY, BALANCED | CROP | {"k": 0.3} | EIGHTY),
    mnist("4 bits, no momentum", GFT | {**exact(4), "init_std": 0.5},
          {"k": 0.05} | FORTY, BALANCED | {"k": 0.1}, BALANCED | {"k": 0.05} | FORTY, BALANCED | {"k": 0.05} | SIXTY,
          BALANCED | CROP | {"k": 0.05} | SIXTY, BALANCED | CROP | {"k": 0.05} | LONG),
    mnist("ternary, no momentum", GFT | {**exact(2), "init_std": 0.6},
          {"k": 0.01} | SIXTY, BALANCED | {"k": 0.02} | FORTY, BALANCED | {"k": 0.01} | SIXTY,
          BALANCED | {"k": 0.02} | SIXTY, BALANCED | {"k": 0.02} | LARGE, BALANCED | CROP | {"k": 0.02} | LONG,
          BALANCED | CROP | {"k": 0.02, "topk_tile": 16} | LARGE),
    mnist("binary, no momentum", GFT | {**exact(1)},
          {"k": 0.01} | SIXTY, BALANCED | {"k": 0.005} | FORTY, BALANCED | {"k": 0.01} | SIXTY,
          BALANCED | {"k": 0.005} | SIXTY, BALANCED | {"k": 0.01} | LARGE,
          BALANCED | {"k": 0.01} | LARGE | {"steps": 1760}, BALANCED | {"k": 0.01, "topk_tile": 32} | LARGE),
    mnist("6 bits, momentum", MOMENTUM | {"bits": 6},
          {"k": 0.1}, BALANCED | {"k": 0.1}, BALANCED | {"k": 0.1} | FORTY, BALANCED | {"k": 0.05} | FORTY,
          BALANCED | CROP | {"k": 0.1} | FORTY, BALANCED | CROP | {"k": 0.1} | EIGHTY),
    mnist("4 bits, momentum", MOMENTUM | BALANCED | {**exact(4), "init_std": 0.5},
          {"k": 0.03, "momentum": 0.95}, {"k": 0.03} | FORTY, {"k": 0.03, "momentum": 0.95} | FORTY,
          CROP | {"k": 0.03} | FORTY, CROP | {"k": 0.03} | EIGHTY),
    mnist("ternary, momentum", MOMENTUM | BALANCED | {**exact(2), "init_std": 0.6},
          {"k": 0.005}, {"k": 0.005, "momentum": 0.95} | FORTY, {"k": 0.005} | SIXTY, {"k": 0.01} | SIXTY,
          CROP | {"k": 0.005} | FORTY, CROP | {"k": 0.005} | EIGHTY, CROP | {"k": 0.005} | LONG,
          CROP | {"k": 0.005, "topk_tile": 16} | LONG, CROP | {"k": 0.005} | LONG | {"steps": 3520}),
    mnist("binary, momentum", MOMENTUM | BALANCED | {**exact(1)},
          {"k": 0.002, "momentum": 0.98}, {"k": 0.002, "momentum": 0.98} | FORTY,
          {"k": 0.002, "momentum": 0.95} | SIXTY, {"k": 0.005} | SIXTY,
          {"k": 0.002, "momentum": 0.95} | EIGHTY, {"k": 0.002, "momentum": 0.95} | LONG,
          CROP | {"k": 0.002, "momentum": 0.95} | LONG, CROP | {"k": 0.002, "momentum": 0.95, "topk_tile": 16} | LONG,
          CROP | {"k": 0.005, "momentum": 0.95, "topk_tile": 16} | LONG),
    mnist("4 bits read, no momentum", GFT | CONFIG | {"bits": 4}, {"k": 0.3}),
    mnist("ternary read, no momentum", GFT | CONFIG | {"bits": 2},
          {"k": 0.3}, {"k": 0.1}, {"k": 0.6}, {"k": 0.3} | LONG, {"k": 0.6} | LONG, {"k": 0.3, "topk_tile": 16} | LONG,
          {"k": 0.3, "rule": "spectral"} | LONG),
    mnist("binary read, no momentum", GFT | CONFIG | {"bits": 1},
          {"k": 0.3}, {"k": 0.6}, {"k": 0.3} | LONG, {"k": 0.6} | LONG, {"k": 0.3, "topk_tile": 16} | LONG),
    mnist("4 bits read, momentum", MOMENTUM | CONFIG | {"bits": 4}, {"k": 0.3}),
    mnist("ternary read, momentum", MOMENTUM | CONFIG | {"bits": 2},
          {"k": 0.3}, {"k": 0.1}, {"k": 0.3} | LONG, {"k": 0.03}, {"k": 0.03, "topk_tile": 16} | LONG,
          {"k": 0.1, "rule": "spectral"} | LONG),
    mnist("2 bits of four levels read, no momentum", GFT | CONFIG | FOUR,
          {"k": 0.3}, {"k": 0.3} | LONG, {"k": 0.3, "topk_tile": 16} | LONG),
    mnist("2 bits of four levels read, momentum", MOMENTUM | CONFIG | FOUR, {"k": 0.3}, {"k": 0.1}),
    mnist("binary read, momentum", MOMENTUM | CONFIG | {"bits": 1},
          {"k": 0.3}, {"k": 0.1}, {"k": 0.3} | LONG, {"k": 0.03}, {"k": 0.1, "topk_tile": 16},
          {"k": 0.1, "momentum": 0.95}),
)  # fmt: skip
VIT = (
    vit(BASELINE, {"method": "adamw"}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3}),
    vit("6 bits, no momentum", GFT | {"bits": 6}, {"k": 0.5}, {"k": 0.3}),
    vit("6 bits, momentum", MOMENTUM | {"bits": 6}, {"k": 0.2}, {"k": 0.3}),
    vit("ternary read, momentum", MOMENTUM | {"bits": 2}, {"k": 0.2}, {"k": 0.3}),
    vit("ternary read, no momentum", GFT | {"bits": 2}, {"k": 0.3}, {"k": 0.5}),
    vit("binary read, momentum", MOMENTUM | {"bits": 1}, {"k": 0.3}, {"k": 0.2}),
    vit("binary read, no momentum", GFT | {"bits": 1}, {"k": 0.3}, {"k": 0.5}),
    vit("4 bits read, momentum", MOMENTUM | {"bits": 4}, {"k": 0.3}, {"k": 0.2}),
    vit("4 bits read, no momentum", GFT | {"bits": 4}, {"k": 0.3}, {"k": 0.5}),
)
GROUPS = {"MNIST, MLP 784-256-10": MNIST, "Imagenette, 64 x 64 pixels, ViT of 0.8 M weights": VIT}


def run(store: Store, jobs: int, quick: bool) -> None:
    """Tune and train MNIST, then the ViT."""
    train_groups(GROUPS.values(), store, jobs, quick)


def table(store: Store) -> str:
    """A table for each data set as markdown: the rows whose grid and finals are in the store."""
    return grouped_tables(GROUPS, store, _lines)


def _lines(found: Finished) -> list[str]:
    heads = ("row", "accuracy, last step", "seeds", "against AdamW, points", "epochs", "flips per weight and step",
             "weights, bytes", "optimizer state, bytes", "settings chosen on the held-out part")  # fmt: skip
    base = mean(r["accuracy"] for r in found[0][1]) if found[0][0].name == BASELINE else None
    lines = []
    for row, runs in found:
        first = runs[0]
        against = "" if base is None else f"{100 * (mean(r['accuracy'] for r in runs) - base):+.2f}"
        lines.append((
            row.name, show_quality(runs), str(len(runs)), against,
            f"{first['tokens'] / TRAINING_IMAGES[first['settings']['data']]:.0f}",
            f"{mean(r['flips_per_weight_per_step'] for r in runs):.4f}",
            f"{first['packed_weight_bytes'] or first['float_param_bytes']:,}", f"{first['optimizer_state_bytes']:,}",
            ", ".join(part for part in settings(first).split(", ") if part != "crop_min 1.0"),  # digits as they are
        ))  # fmt: skip
    return markdown(heads, lines)
