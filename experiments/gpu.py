"""On one GPU: tests, benchmarks and trainings, in three parts that fit into a few minutes each.

    python -m experiments.gpu A               versions, kernel tests, bench.py kernels, steps of GFT and of AdamW
    python -m experiments.gpu B --again tests a piece of A once more; then a profile, trainings of the 10.7 M model to
                                              their end, GPT-2 small's shapes
    python -m experiments.gpu C               a ViT on Imagenette at 160 x 160 pixels
    python -m experiments.gpu A --rehearse    the same pieces at tiny sizes on this CPU

    --out DIR       the folder of all output (default results/gpu, of a rehearsal out/gpu)
    --seconds N     when the part ends: what is running then is stopped, the rest is skipped (default: the sum of its
                    pieces' limits)

A part is a list of pieces. Each is a process with its own time limit; whatever happens to it, the next one runs. What
it prints goes into DIR/PART.txt at once, and when it ends a line with its status and its last JSON line is added to
DIR/PART.jsonl. `python -m experiments report` draws the table in RESULTS.md from these lines.

Nothing is downloaded. Tiny Shakespeare and Imagenette are looked for in the folder that NANOGFT_DATA names.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.rows import markdown
from experiments.sweep import ROOT, commit

RESULTS = ROOT / "results" / "gpu"
GRACE = 10  # seconds between asking a piece to stop and killing it
MISSING = "not measured"

# Without dropout this model learns the text by heart, so longer runs end higher; the fewer bits are read, the later.
# The settings were chosen on a CPU, those of one bit and of dropout on GPUs, on the held-out part.
SHORT = ("--compile", "true", "--eval_every", "50")
TRAININGS = {
    "AdamW": ("shakespeare_char_adamw", "--steps", "300", "--lr", "0.002", *SHORT),
    "GFT, momentum": ("shakespeare_char_momentum", "--steps", "250", "--k", "0.3", *SHORT),
    "GFT, no momentum": ("shakespeare_char", "--steps", "300", "--k", "0.5", *SHORT),
    "GFT, ternary read, momentum": ("shakespeare_char_momentum", "--steps", "250", "--k", "0.3", "--bits", "2", *SHORT),
    "GFT, binary read, momentum": ("shakespeare_char_momentum", "--steps", "1000", "--k", "0.3", "--bits", "1", *SHORT),
    "GFT, ternary read, momentum, dropout": (
        "shakespeare_char_momentum", "--steps", "2000", "--k", "0.3", "--bits", "2", "--dropout", "0.2", *SHORT
    ),
}
TIMED = [name for name in TRAININGS if "read" not in name]  # fewer bits cost a pass over the weights, which reads them
GPT2_BATCH = ("--batch_size", "4")
GPT2 = {
    "AdamW": ("gpt2_small_bench_adamw", *GPT2_BATCH),
    "GFT, no momentum": ("gpt2_small_bench", *GPT2_BATCH),
    "GFT, no momentum, update = backward": ("gpt2_small_bench", *GPT2_BATCH, "--update", "backward"),
    "GFT, momentum": ("gpt2_small_bench", *GPT2_BATCH, "--momentum", "0.9"),
}
IMAGES = {
    "AdamW": ("imagenette_adamw",),
    "GFT, momentum": ("imagenette",),
    "GFT, no momentum": ("imagenette", "--momentum", "0", "--k", "0.3"),
}
# Twenty steps under a rule without float arithmetic, and with torch's attention heads and loss, must end in the same
# weights on both backends.
GAIN = ("shakespeare_char", "--rule", "gain", "--embedding_rule", "gain", "--steps", "20", "--compile", "false")
TINY = ("--n_layer", "1", "--n_head", "2", "--d_model", "32", "--context", "16", "--batch_size", "4",
        "--compile", "false", "--threads", "1", "--device", "cpu")  # fmt: skip
TINY_RUN = (*TINY, "--data", "stdlib", "--tokenizer", "char", "--steps", "4", "--warmup", "0", "--eval_windows", "8")


@dataclass(frozen=True)
class Piece:
    """One process: its name, what follows `python`, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: float


def parts(rehearse: bool = False) -> dict[str, list[Piece]]:
    """The pieces of each part, the most important ones first."""
    device = ("--device", "cpu", "--quick") if rehearse else ("--device", "cuda")
    tests = ("tests/kernels", "--ignore", "tests/kernels/test_check.py", "-n", "7", "--dist", "loadfile")
    tests = ("tests/kernels/test_tiles.py",) if rehearse else tests
    tiny, tiny_run = (TINY, (*TINY_RUN, "--backend", "torch")) if rehearse else ((), ())

    def step(name: str, *arguments: str) -> Piece:
        return Piece(name, ("-m", "experiments.steps", *arguments, *tiny), 60)

    def train(name: str, *arguments: str, limit: float) -> Piece:
        return Piece(name, ("train.py", *arguments, "--sample_tokens", "0", *tiny_run), limit)

    def same(name: str, *arguments: str) -> Piece:
        return Piece(name, ("-m", "experiments.same_weights", *arguments, "--sample_tokens", "0", *tiny_run), 60)

    return {
        "A": [
            Piece("versions", ("bench.py", "versions", "--json", *device), 60),
            Piece("tests", ("-m", "pytest", "-q", "-rfE", "--tb=short", *tests), 130),
            Piece("kernels", ("bench.py", "kernels", "--json", *device), 90),
            *(step(f"step, 10.7 M: {name}", TRAININGS[name][0]) for name in TIMED),
        ],
        "B": [
            *(same(f"same weights: {b}", *GAIN, "--backend", b) for b in ("triton", "torch")),
            *(train(f"training: {name}", *arguments, limit=120) for name, arguments in TRAININGS.items()),
            step("profile", "--profile", TRAININGS["GFT, momentum"][0]),
            *(step(f"step, GPT-2 small: {name}", *arguments) for name, arguments in GPT2.items()),
        ],
        "C": [train(f"images: {name}", *arguments, limit=400) for name, arguments in IMAGES.items()],
    }


def run(piece: Piece, seconds: float, log) -> tuple[int, list[str]]:
    """Run a piece, at most `seconds`; what it prints goes to the terminal and to `log` as it comes.

    Returns its exit status and its lines. A piece that is stopped has the negative number of the signal.
    """
    with tempfile.TemporaryDirectory(prefix="nanogft-gpu-") as folder:
        trains = piece.command[0] == "train.py" or "experiments.same_weights" in piece.command
        out = ("--out_dir", folder) if trains else ()
        process = subprocess.Popen(
            [sys.executable, "-u", *piece.command, *out], cwd=ROOT, start_new_session=True, text=True,
            encoding="utf-8", errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        timers = [threading.Timer(seconds, _send, (process, signal.SIGINT)),
                  threading.Timer(seconds + GRACE, _send, (process, signal.SIGKILL))]  # fmt: skip
        for timer in timers:
            timer.start()
        lines = []
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
                lines.append(line.rstrip("\n"))
            return process.wait(), lines
        finally:
            for timer in timers:
                timer.cancel()
            _send(process, signal.SIGKILL)  # what it started and left


def _send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and to all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_part(part: str, pieces: Sequence[Piece], out: Path, seconds: float) -> int:
    """Run every piece; returns 1 if one of them failed or was skipped."""
    end, failed = time.monotonic() + seconds, 0
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{part}.txt").open("a", encoding="utf-8") as log, (out / f"{part}.jsonl").open("a") as results:
        for piece in pieces:
            begun = time.monotonic()
            record = {"piece": piece.name, "command": piece.command, "commit": commit(), "status": "skipped"}
            if (left := end - begun - GRACE) > 0:
                print(f"\n== {piece.name}: {' '.join(piece.command)}", file=log, flush=True)
                try:
                    status, lines = run(piece, min(piece.limit, left), log)
                    record |= {"status": status, "last": next((x for x in reversed(lines) if x.strip()), ""),
                               "result": last_json(lines)}  # fmt: skip
                except Exception as error:  # a piece must not stop the next one
                    record |= {"status": f"{type(error).__name__}: {error}"}
            record["seconds"] = round(time.monotonic() - begun, 1)
            results.write(json.dumps(record) + "\n")
            results.flush()
            failed |= record["status"] != 0
            print(f"== {piece.name}: status {record['status']}, {record['seconds']} s", flush=True)
    return int(failed)


def last_json(lines: Sequence[str]) -> dict | None:
    """The last line that is a JSON object."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:  # cut off
                continue
    return None


def read(folder: Path) -> dict[str, dict]:
    """The newest record of every piece that has something to show; tests and kernels may have failed in part."""
    found = {}
    for path in sorted(folder.glob("[ABC].jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = last_json([line]) or {}  # a kill can tear a line
            if record.get("result") or record.get("last") and record["piece"] == "tests":
                found[record["piece"]] = record
    return found


def section(folder: Path) -> list[str]:
    """The GPU's part of RESULTS.md: "not measured" where there is no result."""
    found = read(folder)
    results = {name: record["result"] for name, record in found.items() if record["result"]}
    versions = results.get("versions")
    where = "{device}, torch {torch}, triton {triton}".format(**versions) if versions else "not measured yet"
    hashes = [results.get(f"same weights: {b}", {}).get("weights_sha256") for b in ("triton", "torch")]
    rows = [
        ("kernel tests", found["tests"]["last"] if "tests" in found else MISSING),
        ("20 steps under `gain`, heads and loss by torch: the same weights on both backends",
         MISSING if None in hashes else "yes" if hashes[0] == hashes[1] else "no"),
        *_kernels(results.get("kernels")),
    ]  # fmt: skip
    for model, names in (("10.7 M", TIMED), ("GPT-2 small", GPT2)):
        base = results.get(f"step, {model}: AdamW")
        steps = {n: results.get(f"step, {model}: {n}") for n in names}
        rows += [(f"a step, {model}, {n}", _step(step, base) + _card(step, versions)) for n, step in steps.items()]
    for title, kind, key, names in (("Tiny Shakespeare, 10.7 M weights, loss", "training", "val_loss", TRAININGS),
                                    ("Imagenette, ViT, accuracy", "images", "accuracy", IMAGES)):  # fmt: skip
        runs = {n: results.get(f"{kind}: {n}") for n in names}
        rows += [(f"{title}, {n}", _training(run, key) + _card(run, versions)) for n, run in runs.items()]
    return ["## On a GPU", "", f"`make gpu` ({where})", "", *markdown(("what", "measured"), rows), ""]


def _processor(result: dict | None) -> str | None:
    return (result or {}).get("environment", {}).get("processor")


def _card(result: dict | None, versions: dict | None) -> str:
    """The GPU, where it is another than that of the table."""
    card = _processor(result)
    return f", on an {card}" if card and versions and card != versions["device"] else ""


def _kernels(result: dict | None) -> list[tuple[str, str]]:
    """What bench.py measured of each kernel: against its floor, and against the usual way."""
    if result is None:
        return [("kernels against their floors", MISSING)]
    lines = []
    for row in result["kernels"]:
        text = "wrong"
        if not row["wrong"]:
            usual = [f"{s / row['seconds']:.2f}x the speed of {name}" for name, s in row["usual_seconds"].items()]
            text = ", ".join([f"{1e6 * row['seconds']:.1f} us", f"{row['of_floor']:.2f} of the floor", *usual])
        lines.append((f"{row['kernel']}, {' x '.join(map(str, row['shape']))}", text))
    return lines


def _step(result: dict | None, base: dict | None) -> str:
    """Time and memory of a step, beside AdamW's."""
    if result is None:
        return MISSING
    parts = []
    if speed := result["tokens_per_second"]:
        parts.append(f"{1000 * result['step_seconds']:.2f} ms, {speed:,.0f} tokens/s")
    if memory := result["peak_memory_bytes"]:
        parts.append(f"{memory / 2**20:,.0f} MiB")
    if joules := result["joules_per_step"]:
        parts.append(f"{joules:.2f} J")
    beside = []
    if base and _processor(base) == _processor(result) and speed and base["tokens_per_second"]:
        beside.append(f"{speed / base['tokens_per_second']:.2f}x the speed")
    if base and memory and base["peak_memory_bytes"]:
        beside.append(f"{memory / base['peak_memory_bytes']:.2f}x the memory")
    return ", ".join(parts) + (f" ({', '.join(beside)} of AdamW)" if beside else "")


def _training(result: dict | None, key: str) -> str:
    """What a training ended at, and the energy it took where the card counts it."""
    if result is None:
        return MISSING
    text = f"{result[key]:.4f} after {result['steps']:,} steps"
    seconds, joules = result["seconds"], result["energy_measured_joules"]
    return text + (f", {seconds:.0f} s" if seconds else "") + (f", {joules:.0f} J" if joules else "")


def main(argv: list[str]) -> int:
    """Run one part; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("A", "B", "C"))
    parser.add_argument("--again", nargs="*", default=[], metavar="PIECE", help="pieces of part A to run first")
    parser.add_argument("--out", type=Path, help="the folder of all output")
    parser.add_argument("--seconds", type=float, help="when the part ends")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args(argv)
    chosen = parts(options.rehearse)
    if unknown := set(options.again) - {piece.name for piece in chosen["A"]}:
        parser.error(f"--again {unknown.pop()!r}: part A has {', '.join(piece.name for piece in chosen['A'])}")
    pieces = [piece for piece in chosen["A"] if piece.name in options.again] + chosen[options.part]
    out = options.out or (ROOT / "out" / "gpu" if options.rehearse else RESULTS)
    return run_part(options.part, pieces, out, options.seconds or GRACE + sum(GRACE + p.limit for p in pieces))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
