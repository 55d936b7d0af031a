"""Hybrid networks: some kinds of layer are integer, the others fp32 under AdamW in the same step.

Integer layers have 6 bits and no momentum. The character model (300 steps of 24 windows) is judged by its loss, the ViT
(Imagenette, 64 x 64 pixels, two epochs) by its accuracy too: short runs, to compare choices. Nothing is tuned here: k
is the config's, and the learning rate is that of AdamW's own row for every choice (on the text 24e-3, scaled to batches
of 24). State is what AdamW keeps for its layers.

On both nets the best mixture is an integer MLP with everything else under AdamW; it beats the all-integer and the
all-fp32 net. The first layer and the head are a twentieth of the weights or less: leaving the head to AdamW gains 0.03
nats on the text and a point on the images; leaving the first layer to it gains nothing.
"""

from statistics import mean

from experiments.rows import Finished, Row, grouped_tables, make_row, markdown, train_groups
from experiments.sweep import Store, show_quality, spread

LM = {"steps": 300, "batch_size": 24, "lr": 0.016, "lr_end": 0.0, "warmup": 30, "weight_decay": 0.1}
VIT = {"steps": 296, "lr": 4e-3, "lr_end": 0.0, "warmup": 50, "weight_decay": 0.1, "eval_every": 296}
BYTES = ("int_weight_bytes", "float_param_bytes", "optimizer_state_bytes")
CHOICES = ("all", "{first},attention,mlp", "attention,mlp,head", "attention,mlp", "mlp", "attention", "{first}", "head")


def group(config: str, first: str, common: dict) -> tuple[Row, ...]:
    """Rows of a net whose first layers are of kind `first`: every choice, and all in fp32."""
    choices = [choice.format(first=first) for choice in CHOICES]
    rows = [make_row(choice, config, common | {"int_layers": choice}, {}) for choice in choices]
    return (*rows, make_row("none (AdamW)", config, common | {"method": "adamw"}, {}))


GROUPS = {
    "Tiny Shakespeare, 0.8 M weights": group("shakespeare_char_small", "embedding", LM),
    "Imagenette, 64 x 64 pixels, ViT of 0.8 M weights": group("imagenette_small", "patch", VIT),
}


def run(store: Store, jobs: int, quick: bool) -> None:
    """Train every choice with each seed: the character model, then the ViT."""
    train_groups(GROUPS.values(), store, jobs, quick)


def table(store: Store) -> str:
    """A table for each net as markdown, of the choices that are in the store."""
    return grouped_tables(GROUPS, store, _lines)


def _lines(found: Finished) -> list[str]:
    images = found[0][1][0].get("accuracy") is not None
    heads = ["integer layers", "val loss, last step", *(["accuracy, last step"] if images else []), "seeds",
             "weights changed, share of all in a step", "integer weights, bytes", "float weights, bytes",
             "optimizer state, bytes"]  # fmt: skip
    return markdown(heads, [
        (row.name.replace(",", ", "), spread([r["val_loss"] for r in runs]), *([show_quality(runs)] if images else []),
         str(len(runs)), f"{mean(r['flips_per_weight_per_step'] for r in runs):.3f}",
         *(f"{runs[0][key]:,}" for key in BYTES))
        for row, runs in found
    ])  # fmt: skip
