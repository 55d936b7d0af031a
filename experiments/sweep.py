"""Run many cells, each a training run, two or more side by side; a finished cell is never run again.

A cell is a config with overrides and a seed. Its result, the final JSON of `train.py`, is one line of
`results/<set>/<experiment>.jsonl`, found again by a hash of every setting that can change the result. The settings are
in the line: a config that is edited makes new cells. Who changes a default or what a key means removes the lines made
before.
"""

import hashlib
import json
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.worker import ROOT, Worker
from run.config import FIELDS, Config, load, unmet
from run.curve import read_metrics
from run.errors import DIVERGED, UserError

# What tables show of a run besides its quality.
SHOWN = ("tokens", "seconds", "step_seconds", "tokens_per_second", "flips_per_weight_per_step", "weights",
         "int_weight_bytes", "packed_weight_bytes", "float_param_bytes", "optimizer_state_bytes", "peak_memory_bytes",
         "energy_model_joules")  # fmt: skip


def exact(bits: int) -> dict[str, int]:
    """Settings of weights that keep no more bits than are read of them."""
    return {"bits": bits, "keep_bits": bits}


@dataclass(frozen=True)
class Cell:
    """One run: a config's name or path, overrides as (key, value) pairs, and what the row of a table calls it.

    Overrides are added by `with_`, and begin with one thread. `variant` names a change of the code
    (experiments/variants.py), "" none.
    """

    label: str
    config: str
    overrides: tuple[tuple[str, Any], ...] = (("threads", 1),)
    variant: str = ""

    def with_(self, **more: Any) -> "Cell":
        """The cell with further overrides."""
        return replace(self, overrides=tuple(sorted((dict(self.overrides) | more).items())))

    def arguments(self) -> list[str]:
        """What follows `python train.py`."""
        return [self.config, *(part for key, value in self.overrides for part in (f"--{key}", str(value)))]

    @cache  # a table asks for the keys of hundreds of cells, again and again
    def resolved(self) -> Config:
        """The checked config. Raises UserError."""
        return load(self.arguments(), notes=False)

    @cache
    def settings(self) -> dict[str, Any]:
        """Every setting that can change the result and is not at its default: new keys leave old results found."""
        cfg = self.resolved()
        counts = [k for k, f in FIELDS.items() if (k in ASKED or not f.metadata.get("free")) and not unmet(cfg, f)]
        found = {k: value for k in counts if (value := getattr(cfg, k)) != FIELDS[k].default}
        if cfg.integer_kinds == cfg.layer_kinds:
            found.pop("int_layers", None)
        elif "int_layers" in found:
            found["int_layers"] = ",".join(cfg.integer_kinds)
        if Path(cfg.data).is_file():
            found["data_sha256"] = hashlib.sha256(Path(cfg.data).read_bytes()).hexdigest()
        return found | ({"variant": self.variant} if self.variant else {})

    def key(self) -> str:
        """Hash of the settings."""
        return key_of(self.settings())


# A resumed run compares what these come to, a cell what was asked for.
ASKED = ("data", "backend", "device", "compile", "threads")


def key_of(settings: dict[str, Any]) -> str:
    """Hash of a cell's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Finished cells of one experiment, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.commit = commit()  # now, before anything runs
        self.done: dict[str, dict] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # torn by a kill
                    continue
                self.done[key_of(record["settings"])] = record
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def get(self, cell: Cell) -> dict | None:
        """The cell's result, or None if it has not been run."""
        return self.done.get(cell.key())

    def add(self, cell: Cell, result: dict) -> None:
        """Keep a result, at once and on disk."""
        record = {"label": cell.label, "arguments": cell.arguments(), "settings": cell.settings(),
                  "commit": self.commit, **result}  # fmt: skip
        record.pop("out_dir", None)
        with self.lock:
            self.done[cell.key()] = record
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


@cache  # of the code that was imported, whatever is committed meanwhile
def commit() -> str:
    """The commit the code is at, with "+" if it was changed since (results aside); empty outside a git checkout."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!*.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def run_cell(cell: Cell, worker: Worker | None = None) -> dict:
    """Train the cell, by `worker` or in a process of its own. Raises UserError if it fails.

    Returns its final JSON and "curve": [step, loss (of images: accuracy)] of every evaluation. A run whose loss became
    infinite has a result too, the worst there is.
    """
    own = worker or Worker(cell.resolved().threads, cell.variant)
    with tempfile.TemporaryDirectory(prefix="nanogft-") as folder:
        # The best checkpoint, samples and frequent saves are for people; a cell is judged by its last step.
        config, *overrides = cell.arguments()
        try:
            code, out, err = own.run([config, "--eval_every", "100", *overrides, "--out_dir", folder,
                                      "--sample_tokens", "0", "--save_every", "1000000"])  # fmt: skip
        finally:
            if worker is None:
                own.close()
        metrics = Path(folder, "metrics.jsonl")
        records = read_metrics(metrics) if metrics.exists() else []
    if code == DIVERGED:
        return diverged(cell.resolved())
    if code:
        raise UserError(f"the run `train.py {' '.join(cell.arguments())}` failed:\n{err.strip()[-2000:]}")
    curve = [[r["step"], r.get("accuracy", r["val_loss"])] for r in records if "val_loss" in r]
    return json.loads(out.strip().splitlines()[-1]) | {"curve": curve}


def diverged(cfg: Config) -> dict:
    """The result of a run whose loss became infinite: the worst quality, and NaN for whatever a table shows besides."""
    same = {key: getattr(cfg, key) for key in ("method", "bits", "seed", "eval_on", "steps")}
    accuracy = 0.0 if cfg.of_images else None
    return {**dict.fromkeys(SHOWN, math.nan), **same, "diverged": True, "val_loss": math.inf, "accuracy": accuracy,
            "curve": []}  # fmt: skip


def run_cells(cells: Iterable[Cell], store: Store, jobs: int, apart: bool = False) -> list[dict]:
    """Results of `cells`, in order; those not in the store are run, `jobs` at a time.

    `apart` gives each a process of its own, for tables that show memory.
    """
    cells = list(cells)
    waiting = list({cell.key(): cell for cell in cells if store.get(cell) is None}.values())
    begun = time.monotonic()
    workers: dict[int, Worker] = {}  # one a thread, that of its last cell

    def worker_for(cell: Cell) -> Worker:
        threads, thread = cell.resolved().threads, threading.get_ident()
        if (worker := workers.get(thread)) is None or (worker.threads, worker.variant) != (threads, cell.variant):
            if worker is not None:
                worker.close()
            workers[thread] = Worker(threads, cell.variant)
        return workers[thread]

    def work(numbered: tuple[int, Cell]) -> None:
        number, cell = numbered
        worker = None if apart else worker_for(cell)
        store.add(cell, run_cell(cell, worker) | {"jobs": jobs})
        print(f"[{number}/{len(waiting)}, {time.monotonic() - begun:.0f} s] {quality(store.get(cell)):.4f}  "
              f"{cell.label}: {' '.join(cell.arguments())}", flush=True)  # fmt: skip

    try:
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(work, enumerate(waiting, 1)):
                pass
    finally:
        for worker in workers.values():
            worker.close()
    return [store.get(cell) for cell in cells]


def best_of(cells: Sequence[Cell], store: Store) -> Cell:
    """The best cell among finished ones: of lowest validation loss; of images, of highest accuracy, then loss."""
    return min(cells, key=lambda cell: (badness(store.get(cell)), store.get(cell)["val_loss"]))


def quality(record: dict) -> float:
    """What a run is judged by: its loss at the last step, of images the accuracy."""
    return record["val_loss"] if record.get("accuracy") is None else record["accuracy"]


def drawn(record: dict) -> float:
    """The same as figures have it: nats, of images percent."""
    return record["val_loss"] if record.get("accuracy") is None else 100 * record["accuracy"]


def badness(record: dict) -> float:
    """The same, less being better."""
    return record["val_loss"] if record.get("accuracy") is None else -record["accuracy"]


def steps_to(records: Sequence[dict], target: float) -> int | None:
    """The first evaluation at which the mean of runs of equal length is as good as `target` (loss, of images accuracy).

    None if there is none, or a run diverged.
    """
    # The curve is rounded; its last value is known in full. A run that diverged has none, nor have the oldest records.
    curves = [[*r["curve"][:-1], [r["steps"], quality(r)]] if r.get("curve") else [] for r in records]
    for points in zip(*curves, strict=False):
        reached = mean(value for _, value in points)
        if reached <= target if records[0].get("accuracy") is None else reached >= target:
            return points[0][0]
    return None


def show_quality(records: Sequence[dict]) -> str:
    """Mean and spread of what runs are judged by: nats, of images percent."""
    if records[0].get("accuracy") is None:
        return spread([quality(r) for r in records])
    return f"{spread([100 * quality(r) for r in records], 2)} %"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """"mean ± standard deviation" of a few runs; the mean alone of one."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(sum(values)) else text
