"""On one GPU: the kernels' tests, bench.py and the full-size trainings, in pieces that can be done on different days.

    python -m experiments.gpu tests         the kernels' tests, a file at a time
    python -m experiments.gpu bench         bench.py: the kernels, then each training step
    python -m experiments.gpu train         10.7 M weights on Tiny Shakespeare: tuned on a held-out part, then 3 seeds
    python -m experiments.gpu report        redraw RESULTS.md
    python -m experiments.gpu rehearsal     all of it at tiny sizes on this CPU, into a folder that is then removed

--minutes 7 ends after that time, status 75, and the same command goes on; 0 (the default) is no limit. A finished piece
is a line of results/gpu/*.jsonl and is not done again: a test or a time until the code changes, a training ever. A
training that was cut off goes on from its last checkpoint. Tables for people: results/gpu/*.txt.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean

import torch

import bench
from experiments import steps
from experiments.small import Row, finals, settings, tuning_cells
from experiments.sweep import ROOT, Cell, Store, commit, show_quality
from gft.errors import UserError

RESULTS = ROOT / "results" / "gpu"
PARTS = ("tests", "bench", "train", "report", "rehearsal")
UNFINISHED = 75  # EX_TEMPFAIL: the same command goes on
SEEDS = (1, 2, 3)
MISSING = "not measured"


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
    tests: str = "tests/test_triton_*.py"
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
    if status:
        raise UserError(f"`train.py {' '.join(cell.arguments())}` ended with status {status}; the same command goes on")
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


def final_runs(plan: Plan, row: Row) -> list[dict]:
    """Finished runs of a row's winner on the part that is reported; none before the row is tuned."""
    store = plan.trainings()
    if any(store.get(cell) is None for cell in tuning_cells(row, **plan.short)):
        return []
    return [r for cell in finals(row, store, plan.seeds, **plan.short) if (r := store.get(cell)) is not None]


def training_table(plan: Plan) -> str:
    """The trainings as markdown: winners, then all that was tried."""
    lines = [
        "| row | bits | settings chosen on the held-out part | val loss or accuracy, last step | must / aim | "
        "tokens or images/s | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in plan.rows:
        if runs := final_runs(plan, row):
            lines.append(
                f"| {row.name} | {runs[0]['bits']} | {settings(runs[0])} | {outcome(runs)} | {row.target} | "
                f"{mean(r['tokens_per_second'] or 0 for r in runs):,.0f} | {mean(r['seconds'] for r in runs):.0f} |"
            )
    tuned = [r for r in plan.trainings().done.values() if r["eval_on"] == "tune"]
    tried = [f"| {r['label']} | {settings(r)} | {show_quality([r])} |" for r in tuned]
    return "\n".join([*lines, "", "| row | tried | the same on the held-out part |", "|---|---|---|", *tried])


def outcome(runs: Sequence[dict]) -> str:
    """Their loss, of images accuracy, at the last step, "not measured" of none."""
    return f"{show_quality(runs)} ({len(runs)} seeds)" if runs else MISSING


def targets(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(what, must, aim, measured) of all a GPU is to show; "not measured" where results/gpu/ has nothing."""
    kernels, times = {}, {}
    for record in plan.done("bench").records.values():  # of several, the newest
        if record["label"] == "kernels":
            kernels = {(k["kernel"], tuple(k["shape"])): k for k in record["kernels"]}
        else:
            times[record["model"], record["method"]] = record

    def kernel(name: str, shape: tuple[int, ...], value: Callable[[dict], float], unit: str = "x") -> str:
        row = kernels.get((name, shape))
        if row and row["wrong"]:
            return "wrong result"
        return f"{value(row):.2f}{unit}" if row else MISSING

    def faster(usual: str) -> Callable[[dict], float]:
        return lambda row: row["usual_seconds"][usual] / row["seconds"]

    def step(model: str, method: str, key: str) -> str:
        ours, rival = times.get((model, method)), times.get((model, steps.RIVAL))
        return f"{ours[key] / rival[key]:.2f}x" if ours and rival else MISSING

    sizes, flips, plain, memory = bench.FULL, "contribution_flip spectral", "GFT, no memory", "GFT, int8 memory"
    rows = [
        (f"int8_matmul at {' x '.join(map(str, shape))}, against torch._int_mm", "0.85x its speed", "1.0x",
         kernel("int8_matmul", shape, faster("torch._int_mm")))
        for shape in sizes.products
    ] + [
        (f"quantize with RMSNorm from {dtype}, against the measured copy bandwidth", "0.7", "0.9",
         kernel(f"rmsnorm_quantize {dtype}", sizes.rows, lambda row: row["of_floor"], ""))
        for dtype in ("float32", "bfloat16")
    ] + [
        ("contribution_flip at 768 x 3072 with 65,536 tokens, against the plain int8 matmul of that shape",
         "at most 2x its time", "1.2x", kernel(flips, sizes.learn, lambda row: 1 / faster("torch._int_mm")(row))),
        ("the same, against bf16 weight gradient and fused AdamW step", "2x its speed", "4x",
         kernel(flips, sizes.learn, faster("bf16 weight gradient, fused AdamW"))),
    ]  # fmt: skip
    for model, name in ((steps.CHARACTERS, "of the 10.7 M character model"), (steps.GPT2, "at GPT-2 small shapes")):
        rows += [(f"a training step {name}, {method}: tokens/s against bf16, torch.compile, fused AdamW", "1.3x",
                  "2x", step(model, method, "tokens_per_second")) for method in (plain, memory)]  # fmt: skip
    rows += [(f"peak memory at GPT-2 small shapes, {method}", "0.5x", "0.25x",
              step(steps.GPT2, method, "peak_memory_bytes"))
             for method in (plain, f"{plain}, flips in backward", memory)]  # fmt: skip
    texts, images = (rows_of(plan, start) for start in ("shakespeare", "imagenette"))
    rows += [(f"Tiny Shakespeare, 10.7 M weights, full length, last step, {row.name}", "at most 1.4697",
              "at most 1.3912", outcome(final_runs(plan, row))) for row in texts[1:]]  # fmt: skip
    rival = final_runs(plan, images[0]) if images else []
    must = "1 point less than AdamW" + (f", {outcome(rival)}" if rival else "")
    return rows + [(f"Imagenette, 160 x 160 pixels, 80 epochs, last step, {row.name}",
                    must, "77.1 %, then 85 %", outcome(final_runs(plan, row)))
                   for row in images[1:]]  # fmt: skip


def rows_of(plan: Plan, start: str) -> list[Row]:
    """The plan's rows whose configs' names begin with `start`; the rival is the first."""
    return [row for row in plan.rows if row.cells[0].config.startswith(start)]


def section(plan: Plan) -> list[str]:
    """The GPU's part of RESULTS.md."""
    machines = [r["machine"] for part in ("tests", "bench") for r in plan.done(part).records.values()]
    where = "{device}, torch {torch}, triton {triton}".format(**machines[-1]) if machines else "Not measured yet"
    lines = ["## On a GPU", "", f"`make gpu` ({where})", "", "| | must | aim | measured |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in targets(plan)]
    titles = {"tests": "Kernel tests", "kernels": "bench.py: kernels", "steps": "bench.py: steps and memory"}
    for name, title in titles.items():
        if (path := plan.results / f"{name}.txt").exists():
            lines += ["", f"### {title}", "", "```", path.read_text(encoding="utf-8").rstrip(), "```"]
    if plan.trainings().done:
        lines += ["", "### Trainings", "", training_table(plan)]
    return [*lines, ""]


def rehearse() -> int:
    """Every part at tiny sizes on the CPU, each twice: the second time there must be nothing left to do."""
    tiny = {
        "data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": 6,
        "warmup": 0, "eval_every": 3, "save_every": 3, "eval_windows": 8, "compile": "false", "threads": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as name:
        folder = Path(name)
        plan = Plan(folder, folder / "out", "cpu", "tests/test_triton_philox.py", ("--quick",), steps.QUICK_STEPS,
                    [Row(row.name, row.target, row.cells[:2]) for row in ROWS], SEEDS[:1], tiny)  # fmt: skip
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
