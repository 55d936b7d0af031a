"""Loss against size.

Transformers of four blocks on English Wikipedia in 512 tokens learned from it, half a token for each weight in batches
of 12 windows of 64: equal tokens for every method. Each point is the best of what was tried on the part held out of the
training text, four values or fewer of the learning rate (of k), at a width of 384 one, for AdamW three; one seed.
"""

from pathlib import Path

from experiments.plots import Panel
from experiments.plots import draw as draw_panels
from experiments.rows import NOTHING_YET, QUICK, Row, each, make_row, markdown, settings, tuning_table
from experiments.sweep import Store, best_of, run_cells

__all__ = ["tuning_table"]  # for the report

VOCABULARY, BLOCKS, CONTEXT, BATCH, TOKENS_PER_WEIGHT = 512, 4, 64, 12, 0.5
COMMON = {
    "data": "wikipedia_en/train_00.txt.xz", "tokenizer": "bpe", "vocab_size": VOCABULARY, "eval_on": "tune", "seed": 1,
    "n_layer": BLOCKS, "context": CONTEXT, "batch_size": BATCH, "eval_windows": 1000, "compile": "true",
}  # fmt: skip
GFT, MOMENTUM = {"method": "gft"}, {"method": "gft", "momentum": 0.9}
EIGHT_BITS = MOMENTUM | {"bits": 8, "step_size": 4}  # moves begin as large as one of 6 bits
ADAMW = {"method": "adamw", "warmup": 50, "weight_decay": 0.1, "lr_end": 0.0}
MUON = {"method": "muon", "warmup": 0, "lr": 8e-3, "lr_end": 0.0}
# width -> method -> the key that is tuned, and its values
CHOICES = {
    64: {"AdamW": (8e-3, 16e-3, 32e-3, 64e-3), "Muon": (24e-3, 48e-3, 96e-3), "GFT": (0.3, 0.5, 0.7, 0.9),
         "GFT, momentum": (0.2, 0.4, 0.6, 0.8), "GFT, 8 bits, momentum": (0.4, 0.6, 0.8)},
    128: {"AdamW": (4e-3, 8e-3, 16e-3, 32e-3), "Muon": (24e-3, 48e-3, 96e-3), "GFT": (0.3, 0.5, 0.7),
          "GFT, momentum": (0.2, 0.4, 0.6), "GFT, 8 bits, momentum": (0.2, 0.4)},
    256: {"AdamW": (2e-3, 4e-3, 8e-3), "Muon": (24e-3, 48e-3), "GFT": (0.3, 0.5),
          "GFT, momentum": (0.05, 0.1, 0.2, 0.4), "GFT, 8 bits, momentum": (0.1, 0.2)},
    384: {"AdamW": (1e-3, 2e-3, 4e-3), "Muon": (36e-3,), "GFT": (0.4,), "GFT, momentum": (0.1,),
          "GFT, 8 bits, momentum": (0.2,)},
}
METHODS = {"AdamW": (ADAMW, "lr"), "Muon": (MUON, "muon_lr"), "GFT": (GFT, "k"), "GFT, momentum": (MOMENTUM, "k"),
           "GFT, 8 bits, momentum": (EIGHT_BITS, "k")}  # fmt: skip


def weights(width: int) -> int:
    """Of a net without biases: blocks of 12 width^2, embedding and head."""
    return 12 * BLOCKS * width**2 + 2 * VOCABULARY * width


def row(width: int, method: str) -> Row:
    """A point of the figure: a method at a width, with what it is tuned over."""
    steps = round(TOKENS_PER_WEIGHT * weights(width) / (BATCH * CONTEXT))
    shape = {"d_model": width, "n_head": width // 32, "steps": steps, "eval_every": steps}
    common, key = METHODS[method]
    choices = each(key, *CHOICES[width][method])
    return make_row(f"{method}, {width}", "shakespeare_char_small", COMMON | shape | common, *choices)


def run(store: Store, jobs: int, quick: bool) -> None:
    """Run every cell, the small nets first; `quick` a few steps of one cell a method, on the usual text."""
    if quick:
        few = [row(64, method).cells[0].with_(**QUICK, data="tinyshakespeare") for method in METHODS]
        run_cells(few, store, jobs)
        return
    run_cells([cell for width in CHOICES for name in METHODS for cell in row(width, name).cells], store, jobs)


def points(store: Store) -> dict[str, dict[int, dict]]:
    """The best finished run by method and width."""
    found: dict[str, dict[int, dict]] = {}
    for method in METHODS:
        for width in CHOICES:
            if done := [cell for cell in row(width, method).cells if store.get(cell)]:
                found.setdefault(method, {})[width] = store.get(best_of(done, store))
    return found


def table(store: Store) -> str:
    """Loss by width and method, and what was chosen, as markdown."""
    found = points(store)
    if not found:
        return NOTHING_YET
    lines = []
    for width in CHOICES:
        here = {method: by[width] for method, by in found.items() if width in by}
        if here:
            base = here.get("AdamW")
            lines.append((str(width), f"{weights(width):,}", f"{next(iter(here.values()))['tokens']:,}", *(
                _shown(here.get(method), base, METHODS[method][1]) for method in METHODS)))
    heads = ("width", "weights", "tokens", *METHODS)
    return "\n".join(["![Loss against size](docs/figures/scaling.png)", "", *markdown(heads, lines)])


def _shown(record: dict | None, base: dict | None, key: str) -> str:
    if record is None:
        return ""
    chosen = next(part for part in settings(record).split(", ") if part.startswith(f"{key} "))
    against = "" if base is None or base is record else f"{record['val_loss'] - base['val_loss']:+.3f}; "
    return f"{record['val_loss']:.4f} ({against}{chosen})"


def draw(store: Store, folder: Path) -> None:
    """scaling.png in `folder`: held-out loss against weights."""
    lines = {
        method: [(f"{weights(width) / 1e6:.2f}", [record["val_loss"]]) for width, record in by.items()]
        for method, by in points(store).items()
    }
    if lines:
        draw_panels(folder / "scaling.png", [Panel("Half a token a weight", "weights, millions",
                                                   "held-out loss, nats a token", lines)])  # fmt: skip
