"""Training steps on random tokens: time, and the peak of memory. bench.py shows them.

    python -m experiments.steps shakespeare_char --bits 4      any config, any key of train.py; prints one line of JSON
    python -m experiments.steps --profile shakespeare_char     what five steps spend their time on

The loop is train.py's own, compiled if the config's run would be. Each measurement has a process of its own, because a
peak of memory is a process's; on a GPU it is that of the steps alone, without compiling.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import train
from data.text_task import TextTask
from experiments.sweep import ROOT
from run.config import Config, load
from run.device import choose
from run.errors import UserError
from run.meter import Meter
from run.progress import Metrics
from run.stop import Stop

PADDED_VOCABULARY = {"char": 65, "gpt2": 50_304}  # GPT-2's 50,257 and some that never occur, as nanoGPT has them
WARM_UP, MEASURED = {"cuda": 10, "cpu": 2}, {"cuda": 200, "cpu": 10}  # steps
PROFILED = 5
NEVER = 10**9
BYTES = ("int_weight_bytes", "float_param_bytes", "optimizer_state_bytes", "votes_bytes", "peak_memory_bytes")


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
    Step(CHARACTERS, "GFT, momentum", ("shakespeare_char_momentum",)),
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


class RandomText(TextTask):
    """Windows of random tokens. `at` has what is to be done before a step, by its number."""

    def __init__(self, cfg: Config, at: Mapping[int, Callable[[], None]]):
        vocabulary = PADDED_VOCABULARY.get(cfg.tokenizer, cfg.vocab_size)
        tokens = np.random.default_rng(1).integers(0, vocabulary, 2**20, dtype=np.uint16)
        super().__init__(cfg, SimpleNamespace(train=tokens, val=tokens, name="random", source="NumPy", sha256="",
                                              tokenizer=SimpleNamespace(vocab_size=vocabulary)))  # fmt: skip
        self.at = at

    def prepare(self, step: int, device: torch.device) -> None:
        """Does what is to be done before this step."""
        self.at.get(step, lambda: None)()
        super().prepare(step, device)

    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """Random tokens teach nothing."""
        return {"val_loss": 0.0}


def run_steps(argv: Sequence[str], profile: torch.profiler.profile | None = None) -> dict:
    """Train a config on random tokens for a few steps; `profile` sees five of them. Returns what train.py would print
    at the end, and "joules_per_step" on a GPU that counts them. Raises UserError for what train.py would refuse.
    """
    cfg = load(argv, "-m experiments.steps")
    on = choose(cfg)  # as for all the steps of the config: it decides whether to compile by their number
    kind, meter = on.device.type, Meter.on(on.device.type, on.device.index)
    first = WARM_UP[kind]

    def measure_from_here() -> None:
        torch.cuda.synchronize()
        meter.start()

    # Torch does not count what a CUDA graph uses, so the peak is that of a step before it is recorded.
    at = {2: torch.cuda.reset_peak_memory_stats, first: measure_from_here} if kind == "cuda" else {}
    if profile is not None:
        at = {first: profile.start, first + PROFILED: profile.stop}
    cfg = dataclasses.replace(
        cfg, steps=first + MEASURED[kind], warmup=0, log_every=10 if kind == "cuda" else 1, sample_tokens=0,
        eval_every=NEVER, save_every=NEVER, monitor_every=NEVER,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="nanogft-steps-") as folder:
        run = train.make_run(cfg, RandomText(cfg, at), on, Path(folder))
        run.save = lambda name: None
        found = train.train(run, Metrics(Path(folder, "metrics.jsonl"), 0), Stop())
    joules = meter.stop().joules if kind == "cuda" and profile is None else None
    return found | {"joules_per_step": joules and joules / MEASURED[kind]}


def measure(argv: Sequence[str]) -> dict:
    """Time and memory of a config's step. Raises UserError for what train.py would refuse."""
    found = run_steps(argv)
    shown = ("weights", "step_seconds", "tokens_per_second", "joules_per_step", "environment", *BYTES)
    return {"arguments": list(argv)} | {key: found[key] for key in shown}


def profile(argv: Sequence[str]) -> dict:
    """Print what five steps of a config spend their time on. Returns how often a step calls the CUDA runtime."""
    seen = torch.profiler.profile()
    run_steps(argv, seen)
    averages = seen.key_averages()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=70, max_name_column_width=100))
    return {event.key: event.count / PROFILED for event in averages if event.key.startswith("cu")}


def run_cell(arguments: Sequence[str]) -> dict:
    """`measure` in a process of its own. Raises UserError with its error."""
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
    """Measure or profile one step; returns the exit status."""
    try:
        print(json.dumps(profile(argv[1:]) if argv[:1] == ["--profile"] else measure(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
