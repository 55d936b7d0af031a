"""Checks kernels one by one on any machine: their values, their machine code, and on a GPU the real thing.

    python -m kernels.check rmsnorm_quantize flip       some kernel files
    python -m kernels.check all                         every kernel file that launches Triton kernels
    python -m kernels.check flip --compile --only gain  only compile, and only configurations named "...gain..."

    values     the file's tests (tests/kernels/test_NAME.py) in Triton's interpreter, on the CPU: the torch reference
               against plain formulas, the kernel against the reference, every address against the kernel's arguments
    compiled   its `launch_configs()` for sm_80, sm_90 and sm_100, without a GPU
    gpu        the same tests on the GPU, if there is one

A configuration fails if registers spill to local memory, if a tensor-core product it names is not in the machine
code, or if it needs more shared memory than a program can have. Exit status: 0 all right, 1 a check failed, 2 no
such kernel.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from kernels import backend
from kernels.backend import LaunchConfig, triton
from kernels.machine_code import Compiled, compile_config

ROOT = Path(__file__).resolve().parents[1]
SMALL_SHARED_MEMORY = 99 * 1024  # that of sm_86, sm_89 and sm_120, which run code like sm_80's


def known() -> list[str]:
    """Names of the kernel files that have launch configurations, sorted."""
    launches = re.compile(r"^def launch_configs\(", re.MULTILINE)
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [file.stem for file in files if launches.search(file.read_text(encoding="utf-8"))]


def configurations(kernel: str, only: str = "") -> list[tuple[LaunchConfig, int]]:
    """Every (configuration, architecture) of `kernels/KERNEL.py` under a name with `only` in it."""
    configs = importlib.import_module(f"kernels.{kernel}").launch_configs()
    chosen = (config for config in configs if only in config.name)
    return [(config, architecture) for config in chosen for architecture in config.architectures]


# Compiling


def _compile_number(kernel: str, only: str, index: int) -> Compiled:
    """The index-th of the kernel's configurations, compiled; what compilers print goes to the error output."""
    with contextlib.redirect_stdout(sys.stderr):
        return compile_config(kernel, *configurations(kernel, only)[index])


def compile_here(kernel: str, only: str = "") -> Iterator[Compiled]:
    """Compile a kernel file's configurations, in this process or, with several cores, in as many forks of it."""
    cores, count = len(os.sched_getaffinity(0)), len(configurations(kernel, only))
    if min(cores, count) < 2:
        yield from (_compile_number(kernel, only, index) for index in range(count))
        return
    with ProcessPoolExecutor(min(cores, count), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(functools.partial(_compile_number, kernel, only), range(count))


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the choice of the interpreter, and with `changes`."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes


@functools.cache
def compiled(kernel: str, only: str = "") -> list[Compiled]:
    """Compile a kernel file's configurations without the interpreter: one `Compiled` for each of `configurations`.

    A configuration that the process did not live to report has the end of its error output as its problem.
    """
    command = [sys.executable, "-W", "ignore", "-m", "kernels.check", kernel, "--json", "--only", only]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    results = {}
    for line in ran.stdout.splitlines():
        result = Compiled(**json.loads(line))
        results[result.name, result.architecture] = result
    end = "\n".join(ran.stderr.strip().splitlines()[-12:])
    died = f"never reported: its compiler ended with status {ran.returncode}\n{end}"
    return [
        results.get((config.name, architecture)) or Compiled(kernel, config.name, architecture, problems=[died])
        for config, architecture in configurations(kernel, only)
    ]


def table(results: list[Compiled]) -> str:
    """The results for people: one line each, problems under the table."""
    width = max((len(r.name) for r in results), default=0)
    lines = [f"{'configuration':<{max(width, 13)}}  arch    registers  spilled st/ld  shared KiB  tensor-core products"]
    for r in results:
        products = Counter()
        for product, count in r.products.items():
            products[product.split(".")[0]] += count
        found = ", ".join(f"{count} {product}" for product, count in products.items()) or "-"
        spilled = f"{r.spill_stores}/{r.spill_loads}"
        measured = f"{r.registers:>9}  {spilled:>13}  {r.shared / 1024:>10.1f}  {found}" if r.registers else "-"
        lines.append(f"{r.name:<{max(width, 13)}}  {f'sm_{r.architecture}':<6}  {measured}")
    large = sorted({r.name for r in results if r.architecture == 80 and r.shared > SMALL_SHARED_MEMORY})
    if large:
        lines.append(f"more than the 99 KiB of sm_86 and sm_89: {', '.join(large)}")
    lines += [f"{r.name} on sm_{r.architecture} {problem}" for r in results for problem in r.problems]
    return "\n".join(lines)


# Testing


def tests_of(kernel: str) -> Path:
    """The file of a kernel's tests."""
    return ROOT / "tests" / "kernels" / f"test_{kernel}.py"


def run_tests(file: Path, interpreted: bool) -> tuple[bool, str]:
    """Run a test file in a process of its own, in the interpreter or on the GPU.

    Returns whether all passed, and pytest's last line or, of a failure, the end of its output.
    """
    if not file.exists():
        return False, f"{file.relative_to(ROOT)} does not exist: a kernel has tests"
    choice = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpreted else {}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--color=no", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(**choice))
    lines = (ran.stdout.strip() or ran.stderr.strip() or f"pytest ended with status {ran.returncode}").splitlines()
    return ran.returncode == 0, "\n".join(lines[-1:] if ran.returncode == 0 else lines[-30:])


# The command line


def check(kernel: str, only: str = "", compile_only: bool = False) -> list[str]:
    """Print the checks of one kernel file as they end. Returns the names of those that failed."""

    def show(name: str, text: str) -> None:
        print(f"  {name:<10}{text}".replace("\n", "\n" + " " * 12), flush=True)

    def show_tests(name: str, where: str, passed: bool, text: str) -> list[str]:
        show(name, f"{tests_of(kernel).relative_to(ROOT)}, {where}: {text}")
        return [] if passed else [name]

    print(kernel, flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:  # the tests need one core: compile meanwhile
        values = None if compile_only else pool.submit(run_tests, tests_of(kernel), interpreted=True)
        results = compiled(kernel, only)
        took = f"{len(results)} in {time.perf_counter() - start:.1f} s, triton {triton.__version__}"
        failed = show_tests("values", "interpreter", *values.result()) if values else []
    show("compiled", f"{took}\n{table(results)}")
    if not results or any(r.problems for r in results):
        failed.append("compiled")
    if compile_only:
        return failed
    if reason := backend.gpu_problem():
        show("gpu", f"not checked: {reason}")
        return failed
    return failed + show_tests("gpu", torch.cuda.get_device_name(), *run_tests(tests_of(kernel), interpreted=False))


def _options(arguments: list[str], names: list[str]) -> argparse.Namespace:
    about = "Check kernels: values in the interpreter, machine code without a GPU, and on a GPU the real thing."
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=about)
    parser.add_argument("kernel", nargs="+", help=f"{', '.join(names)}, or all")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile configurations with TEXT in their name")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--json", action="store_true", help="only compile, and print a JSON line for each result")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.kernel if name not in (*names, "all")]:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(names)}, or all")
    return chosen


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status: 0 all right, 1 a check failed; ends with 2 if a name is unknown."""
    names = known()
    chosen = _options(arguments, names)
    if triton is None:
        print(f"kernels.check: {backend.problem()}. The torch references are tested by `pytest tests/kernels`.")
        return 1
    names = names if "all" in chosen.kernel else list(dict.fromkeys(chosen.kernel))
    if chosen.json:
        bad = 0
        for result in (r for name in names for r in compile_here(name, chosen.only)):
            print(json.dumps(asdict(result)), flush=True)
            bad += bool(result.problems)
        return 1 if bad else 0
    failed, spilling = [], []
    for name in names:
        if parts := check(name, chosen.only, chosen.compile):
            failed.append(f"{name} ({', '.join(parts)})")
        spilling += [r for r in compiled(name, chosen.only) if r.spill_stores or r.spill_loads]
    where = ", ".join(f"{r.kernel}: {r.name} on sm_{r.architecture}" for r in spilling)
    print(f"registers spill in {where}" if spilling else f"no registers spill with triton {triton.__version__}")
    print(f"FAILED: {'; '.join(failed)}" if failed else f"all right: {', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
