"""Kernels and training steps against what the machine can do at best, and against the same work done the usual way.

    python bench.py                          kernels, then training steps
    python bench.py kernels --json           one section; the last line is a JSON object
    python bench.py startup                  seconds until --help, a mistyped key, and one step have been answered
    python bench.py start-to-end             seconds from `python train.py` to its end, to the loss that nanoGPT's own
                                             config for a CPU reaches; compilers' caches are empty
    python bench.py versions                 the machine and the software alone
    python bench.py --quick --device cpu     a few small cases in seconds, to see that it works

A GPU is given the sizes of real training and the Triton kernels; a CPU small sizes and the torch backend.

Kernels are timed by experiments/kernel_times.py, training steps by experiments/steps.py, whole programs by
experiments/startup.py. A kernel whose result differs from the torch backend's, or that raises, is named and not timed;
the others go on, and the exit status is 1.
"""

import argparse
import json
import sys
from typing import Any

import torch

from experiments.kernel_times import FULL, QUICK, SMALL, bench_kernels
from experiments.startup import bench_start_to_end, bench_startup
from experiments.steps import FULL_STEPS, QUICK_STEPS, SMALL_STEPS, bench_steps, step_table
from kernels import backend


def place(device: torch.device) -> dict:
    """The machine and the software, for people and JSON."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "triton": getattr(backend.triton, "__version__", None),
        "backend": "triton" if backend.on_triton(torch.empty(0, device=device)) else "torch",
        "triton_unavailable": backend.problem() if cuda else "the device is a CPU",
    }  # fmt: skip


SECTIONS = ("kernels", "step", "startup", "start-to-end", "versions")


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status: 1 if a result was wrong, 2 for arguments it does not know."""
    parser = argparse.ArgumentParser("bench.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"any of {', '.join(SECTIONS)}; none: kernels and step")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if unknown := [s for s in options.sections if s not in SECTIONS]:
        parser.error(f"section {unknown[0]!r}: it must be one of {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    device, sections = torch.device(options.device), options.sections or SECTIONS[:2]
    chosen = "quick" if options.quick else "full" if device.type == "cuda" else "small"
    sizes, steps = {"quick": (QUICK, QUICK_STEPS), "full": (FULL, FULL_STEPS), "small": (SMALL, SMALL_STEPS)}[chosen]
    result: dict[str, Any] = {**place(device), "sizes": chosen}
    why = f", because {result['triton_unavailable']}" if result["triton_unavailable"] else ""
    print(f"{result['device']}; torch {result['torch']}, triton {result['triton']}; backend {result['backend']}{why}")
    if "kernels" in sections:
        result |= bench_kernels(device, sizes)
    if "step" in sections:
        result["steps"] = bench_steps(steps, device)
        print(f"\n{step_table(result['steps'])}", flush=True)
    failed = any(row["wrong"] for row in [*result.get("kernels", ()), *result.get("steps", ())])
    for section, measure in {"startup": bench_startup, "start-to-end": bench_start_to_end}.items():
        if section in sections:
            try:
                result[section.replace("-", "_")] = measure(options.quick)
            except RuntimeError as error:  # what was measured before is not lost
                print(f"{section}: {error}", file=sys.stderr)
                failed = True
    if options.json:
        print(json.dumps(result))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
