"""What is done on a GPU, at which size, where results go, and which of it is finished. experiments/gpu.py does it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from experiments import steps
from experiments.rows import SEEDS, Row
from experiments.sweep import ROOT, Cell, Store, commit


def grid(name: str, config: str, *choices: dict) -> tuple[Cell, ...]:
    """Cells of one row of trainings: `choices` of settings for a config."""
    return tuple(Cell(name, config).with_(sample_tokens=0, **choice) for choice in choices)


def vit(name: str, target: str, config: str, *choices: dict) -> Row:
    """A row of trainings on images."""
    return Row(name, target, grid(name, config, *choices), (("steps", 1480), ("warmup", 100)))


IMAGE_TARGET = "AdamW - 1 point / 77.1 %, then 85 %"
# Without dropout a model of this size can learn the text by heart, so the length of the run is tuned too.
ROWS = (
    Row(steps.RIVAL, "", grid(
        steps.RIVAL, "shakespeare_char_adamw",
        {"steps": 500, "lr": 2e-3}, {"steps": 1000, "lr": 2e-3}, {"steps": 1000, "lr": 4e-3},
        {"steps": 2000, "lr": 1e-3},
    )),
    Row("GFT, no memory", "1.4697 / 1.3912", grid(
        "GFT, no memory", "shakespeare_char",
        {"steps": 1000, "k": 0.5}, {"steps": 2000, "k": 0.5}, {"steps": 5000, "k": 0.5}, {"steps": 2000, "k": 0.3},
        {"steps": 2000, "bits": 4, "k": 0.15}, {"steps": 2000, "bits": 7, "k": 0.55, "step_size": 2},
    )),
    Row("GFT, int8 memory", "1.4697 / 1.3912", grid(
        "GFT, int8 memory", "shakespeare_char_memory",
        {"steps": 1000, "k": 0.2}, {"steps": 2000, "k": 0.2}, {"steps": 5000, "k": 0.2}, {"steps": 2000, "k": 0.3},
        {"steps": 2000, "bits": 4, "k": 0.06}, {"steps": 2000, "k": 0.1},
    )),
    # A ViT at 160 x 160 pixels: 80 epochs, tuned on 20.
    vit(f"ViT, {steps.RIVAL}", "", "imagenette_adamw", {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}),
    vit("ViT, GFT, no memory", IMAGE_TARGET, "imagenette", {"memory": "none", "k": 0.3}, {"memory": "none", "k": 0.5}),
    vit("ViT, GFT, int8 memory", IMAGE_TARGET, "imagenette", {"k": 0.2}, {"k": 0.3}),
)  # fmt: skip


@cache
def code() -> str:
    """Hash of the source: what a test's or a benchmark's result holds for."""
    patterns = ("*.py", "kernels/*.py", "gft/*.py", "tests/*.py", "experiments/steps.py", "configs/**/*.toml")
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


@dataclass(frozen=True)
class Piece:
    """A test file or a benchmark: its name and what follows `python`."""

    label: str
    command: tuple[str, ...]

    def key(self) -> str:
        """Hash of the command and of the code it runs."""
        return hashlib.sha256(json.dumps([self.command, code()]).encode()).hexdigest()[:16]


class Done:
    """Finished pieces, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.records = path, {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill
                continue
            self.records[record["key"]] = record

    def get(self, piece: Piece) -> dict | None:
        """The piece's result by the code as it is, or None."""
        return self.records.get(piece.key())

    def add(self, piece: Piece, result: dict) -> dict:
        """Keep a result, at once and on disk; returns the record."""
        record = {"key": piece.key(), "label": piece.label, "command": piece.command, "commit": commit(), **result}
        self.records[piece.key()] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


@dataclass(frozen=True)
class Plan:
    """What is done, at which size, and where its results go."""

    results: Path
    out: Path = ROOT / "out" / "gpu"  # where trainings are until they are finished
    device: str = "cuda"
    tests: str = "tests/kernels/test_triton_*.py"
    bench_options: tuple[str, ...] = ()
    step_cells: Sequence[steps.Step] = steps.FULL_STEPS
    rows: Sequence[Row] = ROWS
    seeds: tuple[int, ...] = SEEDS
    short: dict = field(default_factory=dict)  # overrides of every training

    def done(self, part: str) -> Done:
        """Finished tests or benchmarks."""
        return Done(self.results / f"{part}.jsonl")

    def trainings(self) -> Store:
        """Finished trainings."""
        return Store(self.results / "train.jsonl")

    def write(self, name: str, text: str) -> None:
        """Keep a table for people."""
        self.results.mkdir(parents=True, exist_ok=True)
        (self.results / f"{name}.txt").write_text(text.rstrip() + "\n", encoding="utf-8")
