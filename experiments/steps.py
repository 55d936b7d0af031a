"""Training steps on random tokens: time, and the peak of memory. bench.py shows them.

    python -m experiments.steps shakespeare_char --bits 4      any config, any key of train.py; prints one line of JSON
    python -m experiments.steps --profile shakespeare_char     what five steps spend their time on

A step is train.py's own, compiled if the config's run would be. Each is measured in a process of its own, because a
peak of memory is a process's; on a GPU it is that of the steps alone, without compiling.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train
from experiments.sweep import ROOT
from run import device as runtime
from run.config import load
from run.errors import UserError
from data.tasks import TextTask

PADDED_VOCABULARY = {"char": 65, "gpt2": 50_304}  # GPT-2's 50,257 and some that never occur, as nanoGPT has them


@dataclass(frozen=True)
class Step:
    """A training step to time: the model, how it learns, and the arguments of train.py."""

    model: str
    method: str
    arguments: tuple[str, ...]


CHARACTERS, GPT2, SMALLEST = "characters, 10.7 M weights", "GPT-2 small, 124 M weights", "characters, 0.8 M weights"
BASELINE = "AdamW, bf16"
FULL_STEPS = (
    Step(CHARACTERS, BASELINE, ("shakespeare_char_adamw",)),
    Step(CHARACTERS, "GFT, no momentum", ("shakespeare_char",)),
    Step(CHARACTERS, "GFT, momentum", ("shakespeare_char_memory",)),
    Step(GPT2, BASELINE, ("gpt2_small_bench_adamw",)),
    Step(GPT2, "GFT, no momentum", ("gpt2_small_bench",)),
    Step(GPT2, "GFT, no momentum, update = backward", ("gpt2_small_bench", "--update", "backward")),
    Step(GPT2, "GFT, momentum", ("gpt2_small_bench", "--momentum", "0.9")),
)
AS_WRITTEN = ("--compile", "false")
SMALL_STEPS = (
    Step(SMALLEST, BASELINE, ("shakespeare_char_small_adamw", "--precision", "bf16", *AS_WRITTEN)),
    Step(SMALLEST, "GFT, no momentum", ("shakespeare_char_small", *AS_WRITTEN)),
    Step(SMALLEST, "GFT, momentum", ("shakespeare_char_small", "--momentum", "0.9", *AS_WRITTEN)),
)
TINY = ("--n_layer", "1", "--n_head", "2", "--d_model", "32", "--context", "16", "--batch_size", "4")
QUICK_STEPS = tuple(Step("one small layer", s.method, (*s.arguments, *TINY)) for s in SMALL_STEPS[:2])


def cell(argv: Sequence[str], seconds: float = 5.0) -> dict:
    """Time training steps of a config on random tokens. Raises UserError for what train.py would refuse."""
    cfg = load(argv, "-m experiments.steps")
    chosen = runtime.choose(cfg)
    vocabulary = PADDED_VOCABULARY.get(cfg.tokenizer, cfg.vocab_size)
    tokens = np.random.default_rng(1).integers(0, vocabulary, 2**20, dtype=np.uint16)
    tokenizer = SimpleNamespace(vocab_size=vocabulary)
    data = SimpleNamespace(train=tokens, val=tokens, tokenizer=tokenizer, name="random", source="NumPy", sha256="")
    run = train.Run(cfg, TextTask(cfg, data), chosen, Path())
    forward = torch.compile(run.net, dynamic=False) if chosen.compile else run.net
    loss_of = torch.compile(run.task.loss, dynamic=False) if chosen.compile else run.task.loss
    cuda, times, warm = chosen.device.type == "cuda", [], 8 if chosen.device.type == "cuda" else 1
    while len(times) < warm + 5 or sum(times[warm:]) < seconds and len(times) < warm + 50:
        if cuda and len(times) == warm:  # compiling and tuning needed more than a step does
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        train.take_step(run, forward, loss_of)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    typical = statistics.median(times[warm:])
    return {
        "arguments": list(argv), "weights": run.weights, "step_seconds": typical,
        "tokens_per_second": run.task.per_step / typical, "environment": chosen.environment(),
        "peak_memory_bytes": runtime.peak_memory_bytes(chosen.device),
    }  # fmt: skip


def run_cell(arguments: Sequence[str]) -> dict:
    """`cell` in a process of its own: a peak of memory is a process's. Raises UserError with its error."""
    command = [sys.executable, "-m", "experiments.steps", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"python -m experiments.steps {' '.join(arguments)} failed:\n{done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_steps(steps: Sequence[Step], device: torch.device) -> list[dict]:
    """Time every step; one that fails is told and left without a time."""
    rows = []
    for step in steps:
        row = {"model": step.model, "method": step.method, "wrong": ""}
        try:
            row |= run_cell((*step.arguments, "--device", device.type))
        except UserError as error:
            row["wrong"] = str(error)
            print(f"{step.model}, {step.method}: {error}", file=sys.stderr)
        rows.append(row)
    return rows


def step_table(rows: Sequence[dict]) -> str:
    """Time and peak memory of each step beside its model's AdamW, for people."""
    lines = [f"{'model':28}{'method':38}{'ms a step':>9}{'tokens/s':>11}{'peak, MiB':>11}   against AdamW"]
    for row in rows:
        start = f"{row['model']:28}{row['method']:38}"
        if row["wrong"]:
            lines.append(f"{start}FAILED, so no number")
            continue
        base = [r for r in rows if (r["model"], r["method"]) == (row["model"], BASELINE) and not r["wrong"]]
        notes = [f"{row['tokens_per_second'] / r['tokens_per_second']:.2f}x its speed, "
                 f"{row['peak_memory_bytes'] / r['peak_memory_bytes']:.2f}x its memory" for r in base]  # fmt: skip
        notes += [] if row["environment"]["compile"] else ["not compiled"]
        lines.append(f"{start}{1000 * row['step_seconds']:9.2f}{row['tokens_per_second']:11.0f}"
                     f"{row['peak_memory_bytes'] / 2**20:11.0f}   {', '.join(notes)}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure one step; returns the exit status."""
    try:
        print(json.dumps(cell(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
