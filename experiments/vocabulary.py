"""Large vocabularies: tied weights, and another k for rare rows.

A transformer of width 128 on English Wikipedia in 8,192 tokens learned from it: of its 2.9 M weights 2.1 are embedding
and head. 1 M tokens in batches of 24 windows of 64, momentum, the part held out of the training text, one seed. Tied,
embedding and head are one matrix (experiments/variants.py), 1.8 M weights in all.
"""

from experiments.rows import NOTHING_YET, QUICK, markdown
from experiments.sweep import Cell, Store, run_cells

COMMON = {
    "data": "wikipedia_en/train_00.txt.xz", "tokenizer": "bpe", "vocab_size": 8192, "eval_on": "tune", "seed": 1,
    "steps": 650, "batch_size": 24, "eval_every": 650, "eval_windows": 1000, "compile": "true",
}  # fmt: skip
GFT = {"method": "gft", "momentum": 0.9}
ADAMW = {"method": "adamw", "warmup": 50, "weight_decay": 0.1, "lr_end": 0.0}
TIED = "tied"
SPECTRAL = GFT | {"embedding_rule": "spectral"}
ROWS = (
    ("GFT, k 0.3", GFT | {"k": 0.3}, ""),
    *((f"GFT, k 0.3, embedding's k times {f}", GFT | {"k": 0.3}, f"embedding's k times {f}") for f in (0.5, 2.0)),
    ("GFT, tied, k 0.3", GFT | {"k": 0.3}, TIED),
    ("GFT, tied, by spectral, k 0.3", SPECTRAL | {"k": 0.3}, TIED),
    *((f"AdamW, lr {lr}", ADAMW | {"lr": lr}, "") for lr in (4e-3, 8e-3, 16e-3, 32e-3)),
    *((f"AdamW, tied, lr {lr}", ADAMW | {"lr": lr}, TIED) for lr in (8e-3, 16e-3)),
)  # fmt: skip


def cells() -> list[Cell]:
    """A run for every row."""
    return [Cell(name, "shakespeare_char_small", variant=variant).with_(**COMMON | own)
            for name, own, variant in ROWS]  # fmt: skip


def run(store: Store, jobs: int, quick: bool) -> None:
    """Run every row; `quick` a few steps of three, on another text."""
    if quick:
        few = [cell.with_(**QUICK, data="stdlib", vocab_size=300) for cell in cells()]
        run_cells([few[2], few[3], few[-1]], store, jobs)
    else:
        run_cells(cells(), store, jobs)


def table(store: Store) -> str:
    """Loss and weights of the rows that are in the store, as markdown."""
    found = [r for cell in cells() if (r := store.get(cell))]
    heads = ("row", "held-out loss, nats a token", "bits a byte")
    return "\n".join(markdown(heads, [
        (r["label"], f"{r['val_loss']:.4f}", f"{r['bits_per_byte']:.4f}") for r in found
    ])) if found else NOTHING_YET  # fmt: skip
