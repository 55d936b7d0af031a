"""Seconds from a command to its answer: of a start, and of a whole training run. bench.py shows them."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.sweep import ROOT

CONFIG = "shakespeare_char_small"
TINY_NET = ("--data", "stdlib", "--n_layer", "1", "--d_model", "32", "--context", "16", "--eval_windows", "8")


def timed_command(arguments: Sequence[str], expected: int = 0, **environment: str) -> tuple[float, str]:
    """Seconds and output of `python ARGUMENTS`. Raises RuntimeError if its exit status is not `expected`."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})  # fmt: skip
    seconds = time.perf_counter() - begun
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return seconds, done.stdout


def bench_startup(quick: bool) -> dict[str, float]:
    """Seconds until train.py has answered: the median of three runs each (`quick`: one)."""
    one_step = (CONFIG, "--steps", "1", "--compile", "false", *(TINY_NET if quick else ()))
    found = {}
    with tempfile.TemporaryDirectory(prefix="nanogft-bench-") as folder:
        for name, arguments, status in (("--help", ("--help",), 0), ("a mistyped key", (CONFIG, "--stepz", "5"), 2),
                                        ("a mistyped config", ("shakespear",), 2),
                                        ("one step, not compiled", one_step, 0)):  # fmt: skip
            times = []
            for number in range(1 if quick else 3):
                out = ("--out_dir", str(Path(folder, str(number)))) if status == 0 and arguments is one_step else ()
                times.append(timed_command(("train.py", *arguments, *out), status)[0])
            found[name] = statistics.median(times)
            print(f"{name:27}{found[name]:8.2f} s", flush=True)
    return found


def bench_start_to_end(quick: bool) -> dict[str, float]:
    """Seconds of one training run as a person starts it, and its loss. The compilers' caches are empty."""
    steps = ("--steps", "2", *TINY_NET) if quick else ("--steps", "160")
    with tempfile.TemporaryDirectory(prefix="nanogft-bench-") as folder:
        caches = {name: str(Path(folder, name)) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        seconds, output = timed_command(
            ("train.py", CONFIG, "--momentum", "0.9", "--k", "0.5", *steps, "--batch_size", "24", "--out_dir",
             str(Path(folder, "out"))), **caches)  # fmt: skip
    final = json.loads(output.splitlines()[-1])
    print(f"loss {final['val_loss']:.4f} in {seconds:.1f} s, start to end, of which {final['seconds']:.1f} s of steps; "
          "nanoGPT's own config for a CPU ends at 1.88")  # fmt: skip
    return {"seconds": seconds, "training_seconds": final["seconds"], "val_loss": final["val_loss"]}
