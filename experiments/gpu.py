"""On one GPU: the kernels' tests, bench.py and the full-size trainings, in pieces that can be done on different days.

    python -m experiments.gpu tests         the kernels' tests, a file at a time
    python -m experiments.gpu bench         bench.py: the kernels, then each training step
    python -m experiments.gpu train         10.7 M weights on Tiny Shakespeare, a ViT on Imagenette: each tuned on a
                                            held-out part, its winner trained with 3 seeds
    python -m experiments.gpu report        redraw RESULTS.md
    python -m experiments.gpu rehearsal     all of it at tiny sizes on this CPU, into a folder that is then removed

--minutes 7 ends after that time, status 75, and the same command goes on; 0 (the default) is no limit. A finished piece
is a line of results/gpu/*.jsonl and is not done again: a test or a time until the code changes, a training ever. A
training that was cut off goes on from its last checkpoint. Tables for people: results/gpu/*.txt.
"""

import argparse
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import bench
from data.imagenette import CLASSES, FILE, FOLDER
from experiments import steps
from experiments.gpu_plan import ROWS, Piece, Plan
from experiments.gpu_report import section, training_table
from experiments.rows import SEEDS, Row, finals, tuning_cells
from experiments.sweep import ROOT, Cell, Store, diverged
from run.config import IMAGES
from run.errors import DIVERGED, UserError

RESULTS = ROOT / "results" / "gpu"
PARTS = ("tests", "bench", "train", "report", "rehearsal")
UNFINISHED = 75  # EX_TEMPFAIL: the same command goes on


class OutOfTime(Exception):
    """The minutes of this call are over; the same call goes on."""


class Deadline:
    """When to stop: after `minutes`, or never with 0."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes if minutes else None

    def left(self) -> float | None:
        """Seconds left, None if there is no limit. Raises OutOfTime."""
        if self.end is None:
            return None
        if (seconds := self.end - time.monotonic()) <= 0:
            raise OutOfTime
        return seconds


def run(command: Sequence[str], seconds: float | None) -> tuple[int, list[str]]:
    """Run `python command`, showing its output; asked to stop after `seconds`. Returns status and lines of output.

    Raises OutOfTime if it was stopped.
    """
    arguments = [sys.executable, *command]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGTERM)

    timer = threading.Timer(seconds or 0, stop)
    if seconds is not None:
        timer.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    finally:  # after Ctrl-C too: a training saves before it ends
        timer.cancel()
        status = process.wait()
    if status and stopped.is_set():
        raise OutOfTime
    return status, lines


def run_tests(plan: Plan, deadline: Deadline) -> int:
    """Every file of kernel tests; returns 1 if one failed."""
    done, outcomes, failed = plan.done("tests"), [], False
    for path in sorted(ROOT.glob(plan.tests)):
        piece = Piece(path.name, ("-m", "pytest", "-q", str(path.relative_to(ROOT))))
        if done.get(piece) is None:
            status, lines = run(piece.command, deadline.left())
            if status:
                failed = True
                outcomes.append(f"{path.name}: FAILED, {lines[-1] if lines else f'status {status}'}")
                continue
            done.add(piece, {"outcome": lines[-1], "machine": bench.place(torch.device(plan.device))})
        outcomes.append(f"{path.name}: {done.get(piece)['outcome']}")
        plan.write("tests", "\n".join(outcomes))
    plan.write("tests", "\n".join(outcomes))
    print("\n".join(outcomes))
    return int(failed)


def run_bench(plan: Plan, deadline: Deadline) -> int:
    """bench.py's kernels and each of its steps; returns 1 if a result was wrong or a step failed."""
    done = plan.done("bench")
    machine = bench.place(torch.device(plan.device))
    kernels = Piece("kernels", ("bench.py", "kernels", "--json", "--device", plan.device, *plan.bench_options))
    if done.get(kernels) is None:
        status, lines = run(kernels.command, deadline.left())
        if not lines or not lines[-1].startswith("{"):
            raise UserError(f"bench.py kernels ended with status {status} and without its JSON")
        done.add(kernels, {**json.loads(lines[-1]), "machine": machine})
        plan.write("kernels", "\n".join(lines[:-1]))
    status, rows = int(any(row["wrong"] for row in done.get(kernels)["kernels"])), []
    for step in plan.step_cells:
        arguments = (*step.arguments, "--device", plan.device)
        piece = Piece(f"{step.model}: {step.method}", ("-m", "experiments.steps", *arguments))
        named = {"model": step.model, "method": step.method}
        if done.get(piece) is None:
            failed, lines = run(piece.command, deadline.left())
            if failed:
                status = 1
            else:
                done.add(piece, {**named, "wrong": "", **json.loads(lines[-1]), "machine": machine})
        rows.append(done.get(piece) or {**named, "wrong": f"status {failed}"})
        tables = "\n\n".join(f"{what}\n{steps.step_table(rows, what)}" for what in ("step", "memory"))
        plan.write("steps", tables)
    print(tables)
    return status


def run_training(plan: Plan, cell: Cell, store: Store, deadline: Deadline) -> None:
    """Train one cell, or go on with it, and keep its result."""
    if store.get(cell) is not None:
        return
    folder = plan.out / cell.key()
    resume = ("--resume",) if (folder / "last.json").exists() else ()
    status, lines = run(("train.py", *cell.arguments(), "--out_dir", str(folder), *resume), deadline.left())
    if status == DIVERGED:  # as it would again
        store.add(cell, diverged(cell.resolved()))
    elif status:
        raise UserError(f"`train.py {' '.join(cell.arguments())}` ended with status {status}; the same command goes on")
    else:
        store.add(cell, json.loads(lines[-1]))
    shutil.rmtree(folder)


def run_train(plan: Plan, deadline: Deadline) -> int:
    """Tune every row on the held-out part, then train its winner with each seed on the part that is reported."""
    store = plan.trainings()
    for row in plan.rows:
        for cell in tuning_cells(row, **plan.short):
            run_training(plan, cell, store, deadline)
    for seed in plan.seeds:
        for row in plan.rows:
            for cell in finals(row, store, (seed,), **plan.short):
                run_training(plan, cell, store, deadline)
    plan.write("train", training_table(plan))
    print(training_table(plan))
    return 0


def few_images(path: Path) -> None:
    """An archive as Imagenette's, of grey squares: ten in each class to train on, one to validate."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for n, (split, wordnet_id) in enumerate(itertools.product(["train"] * 10 + ["val"], CLASSES)):
            picture = io.BytesIO()
            Image.new("L", (32, 32), 2 * n).save(picture, "JPEG")
            member = tarfile.TarInfo(f"{FOLDER}/{split}/{wordnet_id}/{n}.JPEG")
            member.size = picture.tell()
            picture.seek(0)
            archive.addfile(member, picture)


def rehearse() -> int:
    """Every part at tiny sizes on the CPU, each twice: the second time there must be nothing left to do."""
    tiny = {"n_layer": 1, "n_head": 2, "d_model": 32, "batch_size": 4, "steps": 6, "warmup": 0, "eval_every": 3,
            "save_every": 3, "eval_windows": 8, "compile": "false", "threads": 1}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as name:
        folder = Path(name)
        few_images(folder / FILE.path)

        def few(row: Row) -> Row:
            text = row.cells[0].resolved().data not in IMAGES
            data = {"data": "stdlib", "context": 16} if text else {"data_dir": folder, "image_side": 32, "patch": 8}
            return Row(row.name, row.target, tuple(cell.with_(**data) for cell in row.cells[:2]))

        plan = Plan(folder, folder / "out", "cpu", "tests/kernels/test_triton_philox.py", ("--quick",), steps.QUICK_STEPS,
                    [few(row) for row in ROWS], SEEDS[:1], tiny)  # fmt: skip
        for attempt in ("first", "second"):
            for part in (run_tests, run_bench, run_train):
                begun = time.monotonic()
                if status := part(plan, Deadline(0)):
                    return status
                print(f"rehearsal: {part.__name__}, {attempt} time, {time.monotonic() - begun:.1f} s", flush=True)
        print("\n".join(section(plan)))
    return 0


def main(argv: list[str]) -> int:
    """Run one part; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=0, help="end after this time (0: no limit)")
    options = parser.parse_args(argv)
    try:
        if options.part == "rehearsal":
            return rehearse()
        if options.part == "report":
            from experiments.__main__ import report

            report()
            return 0
        if not torch.cuda.is_available():
            raise UserError("torch finds no CUDA GPU here; `make gpu-rehearsal` does the same at tiny sizes on a CPU")
        part = {"tests": run_tests, "bench": run_bench, "train": run_train}[options.part]
        return part(Plan(RESULTS), Deadline(options.minutes))
    except OutOfTime:
        print(f"not finished after {options.minutes:g} minutes; the same command goes on from here", file=sys.stderr)
        return UNFINISHED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nstopped; finished pieces are kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
