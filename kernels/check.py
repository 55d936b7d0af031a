"""Checks kernels one by one on any machine: their values, their machine code, and on a GPU the real thing.

    python -m kernels.check quantize flip               some kernel files
    python -m kernels.check all                         every kernel file that ships Triton kernels
    python -m kernels.check flip --compile --only gain  only compile, and only configurations named "...gain..."

    values     the file's tests in Triton's interpreter, on the CPU: kernels against their torch references
    compiled   every shipped configuration for sm_80, sm_90 and sm_100, without a GPU
    gpu        the same tests on the GPU, if there is one

A configuration fails if registers spill to local memory, if a tensor-core product it names is not in the machine
code, or if it needs more shared memory than a program can have. Exit status: 0 all right, 1 a check failed, 2 no
such kernel.

Configurations are the `SHIPPED` of a kernel's file, or what its function `shipped()` returns. Pointers and whole
numbers among their arguments count as divisible by 16, as Triton finds them at the launch when sizes are round; a type
that ends in ":1" ("i32:1") promises nothing, as ragged sizes do not. What is 1 when launched, such as the stride of a
contiguous axis, belongs to the constants.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels import backend
from kernels.backend import Shipped, triton

ROOT = Path(__file__).resolve().parents[1]
TESTED_WITH = {"rmsnorm": "quantize", "int8_matmul": "matmul", "contribution": "matmul", "memory": "flip"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program can have, CUDA's programming guide
SMALL_SHARED_MEMORY = 99 * 1024  # that of sm_86, sm_89 and sm_120, which run code like sm_80's
TENSOR_MEMORY = 512  # columns, sm_100

# What a tensor-core product is called in machine code (Ampere, Hopper, Blackwell) and in PTX.
ANY_PRODUCT = r"\b(?:UTC)?[A-Z]G?MMA(?:\.\w+)*"
ANY_PTX_PRODUCT = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.:\w]*"
PRODUCTS = {
    "int8": r"(?:IMMA|IGMMA|UTCIMMA)\b|.*\.s8\.s8\b|.*kind::i8\b",
    "fp16": r"(?:HMMA|HGMMA|UTCHMMA)\b(?!.*(?:BF16|TF32))|.*\.f16\.f16\b|.*kind::f16\b",
}
SPILL_BYTES = {None: 4, "8": 1, "16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Compiled:
    """What one configuration became on one architecture: memory in bytes, tensor-core `products` counted."""

    kernel: str
    name: str
    architecture: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    products: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def known() -> list[str]:
    """Names of the kernel files that ship configurations, sorted."""
    ships = re.compile(r"^(?:SHIPPED\b|def shipped\()", re.MULTILINE)
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [f.stem for f in files if f.stem != "check" and ships.search(f.read_text(encoding="utf-8"))]


def configurations(kernel: str, only: str = "") -> list[tuple[Shipped, int]]:
    """Every (configuration, architecture) that `kernels/KERNEL.py` ships under a name with `only` in it."""
    module = importlib.import_module(f"kernels.{kernel}")
    entries = module.SHIPPED if hasattr(module, "SHIPPED") else module.shipped()
    return [(entry, architecture) for entry in entries if only in entry.name for architecture in entry.architectures]


def _source(entry: Shipped) -> Any:
    """The ASTSource of a configuration. Raises ValueError if it does not fit its kernel."""
    if unknown := [name for name in entry.instructions if name not in PRODUCTS]:
        raise ValueError(f"got instructions {unknown}; known are {', '.join(PRODUCTS)}")
    kernel = entry.kernel
    while not isinstance(kernel, triton.JITFunction):  # under @autotune and @heuristics
        kernel = kernel.fn
    given = entry.signature.keys() | entry.constants.keys()
    defaults = {p.name: p.default for p in kernel.params if p.has_default and p.name not in given}
    if missing := [name for name in kernel.arg_names if name not in given | defaults.keys()]:
        raise ValueError(f"no type or constant for {', '.join(missing)}; give each argument one")
    if unknown := sorted(given - set(kernel.arg_names)):
        raise ValueError(f"{', '.join(unknown)}: not an argument; known are {', '.join(kernel.arg_names)}")
    constants = defaults | entry.constants
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, multiple = entry.signature.get(name, "constexpr").partition(":")
        signature[name] = "constexpr" if name in constants else kind
        if re.match(r"\*|[iu]\d\d", signature[name]) and multiple != "1":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, attributes)


def _tool(name: str) -> str:
    """Path of a program bundled with triton; "" without it."""
    try:
        return getattr(triton.knobs.nvidia, name).path
    except RuntimeError:
        return ""


def _from_machine_code(cubin: str, ptx: str) -> dict[str, Any]:
    """Registers, spilled bytes and products of a cubin file: spills are stores to local memory and loads from it."""

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = output(_tool("cuobjdump"), "--dump-resource-usage", cubin)
    # Disassembling takes a third of compiling, and where there is no stack nothing can have been spilled to it.
    plain = re.search(r"STACK:0\b", usage) and not re.search(ANY_PTX_PRODUCT, ptx)
    code = "" if plain else output(_tool("nvdisasm"), "-c", "-ndf", cubin)
    spilled = {"STL": 0, "LDL": 0}
    for way, width in re.findall(r"\b(STL|LDL)\b(?:\.LU)?(?:\.[SU]?(\d+))?", code):
        spilled[way] += SPILL_BYTES[width or None]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill_stores": spilled["STL"],
        "spill_loads": spilled["LDL"],
        "products": dict(Counter(re.findall(ANY_PRODUCT, code))),
    }


def _from_ptx(ptx: str, architecture: int, fused_multiply_add: bool) -> dict[str, Any]:
    """The same from the assembler's report on PTX, where triton came without the disassembler."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", source, "-o", f"{source}.o"]
        command += [] if fused_multiply_add else ["--fmad=false"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill_stores": int(re.search(r"(\d+) bytes spill stores", log).group(1)),
        "spill_loads": int(re.search(r"(\d+) bytes spill loads", log).group(1)),
        "products": dict(Counter(re.findall(ANY_PTX_PRODUCT, ptx))),
    }


def _inspect(binary: Any, architecture: int) -> dict[str, Any]:
    """What is in a compiled kernel's code; kept beside it in Triton's cache."""
    has_tools = bool(_tool("cuobjdump") and _tool("nvdisasm"))
    cache = triton.runtime.cache.get_cache_manager(binary.hash)
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    file = f"check-{version}-{'code' if has_tools else 'ptx'}.json"
    if path := cache.get_file(file):
        return json.loads(Path(path).read_text())
    if has_tools:
        cubin = next(path for path in binary.metadata_group.values() if path.endswith(".cubin"))
        found = _from_machine_code(cubin, binary.asm["ptx"])
    else:
        found = _from_ptx(binary.asm["ptx"], architecture, binary.metadata.enable_fp_fusion)
    cache.put(json.dumps(found), file, binary=False)
    return found


def compile_entry(kernel: str, entry: Shipped, architecture: int) -> Compiled:
    """Compile one configuration and say what is wrong with it, if anything. `kernel` is its file, for the report.

    Raises RuntimeError in a process with TRITON_INTERPRET=1.
    """
    if backend.INTERPRETED:
        raise RuntimeError("compile_entry: kernels of this process are for the interpreter; unset TRITON_INTERPRET")
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options}
    try:
        binary = triton.compile(_source(entry), target=target, options=options)
    except (triton.errors.TritonError, RuntimeError, ValueError) as error:  # RuntimeError: a pass that gave up
        return Compiled(kernel, entry.name, architecture, problems=[f"does not compile: {error}"])
    found = _inspect(binary, architecture)
    problems = []
    if found["spill_stores"] or found["spill_loads"]:
        stored, loaded = found["spill_stores"], found["spill_loads"]
        problems.append(
            f"spills {stored} bytes of stores and {loaded} of loads with {found['registers']} registers a thread; "
            "take smaller tiles, or more warps"
        )
    for wanted in entry.instructions:
        if not any(re.match(PRODUCTS[wanted], product) for product in found["products"]):
            there = ", ".join(found["products"]) or "none at all"
            problems.append(f"has no {wanted} tensor-core product (found: {there}); look at tl.dot and its operands")
    if binary.metadata.shared > SHARED_MEMORY[architecture]:
        problems.append(
            f"needs {binary.metadata.shared} bytes of shared memory, and a program has {SHARED_MEMORY[architecture]}; "
            "take smaller tiles, or fewer stages"
        )
    columns = getattr(binary.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:
        problems.append(f"needs {columns} columns of tensor memory, and there are {TENSOR_MEMORY}; take smaller tiles")
    return Compiled(kernel, entry.name, architecture, shared=binary.metadata.shared, problems=problems, **found)


def _compile_number(kernel: str, only: str, index: int) -> Compiled:
    """The index-th of the kernel's configurations, compiled; what compilers print goes to the error output."""
    with contextlib.redirect_stdout(sys.stderr):
        return compile_entry(kernel, *configurations(kernel, only)[index])


def compile_here(kernel: str, only: str = "") -> Iterator[Compiled]:
    """Compile what a kernel file ships, in this process or, with several cores, in as many forks of it."""
    cores, count = len(os.sched_getaffinity(0)), len(configurations(kernel, only))
    if min(cores, count) < 2:
        yield from (_compile_number(kernel, only, index) for index in range(count))
        return
    with ProcessPoolExecutor(min(cores, count), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(functools.partial(_compile_number, kernel, only), range(count))


def _environment(**changes: str) -> dict[str, str]:
    """This process's environment without the choice of the interpreter, and with `changes`."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes


@functools.cache
def compiled(kernel: str, only: str = "") -> list[Compiled]:
    """Compile what a kernel file ships, without the interpreter: one `Compiled` for each of `configurations`.

    A configuration that the process did not live to report has the end of its error output as its problem.
    """
    command = [sys.executable, "-W", "ignore", "-m", "kernels.check", kernel, "--json", "--only", only]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment())
    results = {}
    for line in ran.stdout.splitlines():
        result = Compiled(**json.loads(line))
        results[result.name, result.architecture] = result
    end = "\n".join(ran.stderr.strip().splitlines()[-12:])
    died = f"never reported: its compiler ended with status {ran.returncode}\n{end}"
    return [
        results.get((entry.name, architecture)) or Compiled(kernel, entry.name, architecture, problems=[died])
        for entry, architecture in configurations(kernel, only)
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


def tests_of(kernel: str) -> Path:
    """The file of a kernel's tests."""
    return ROOT / "tests" / "kernels" / f"test_triton_{TESTED_WITH.get(kernel, kernel)}.py"


@functools.cache
def run_tests(file: Path, interpreted: bool) -> tuple[bool, str]:
    """Run a test file in a process of its own, in the interpreter or on the GPU.

    Returns whether all passed, and pytest's last line or, of a failure, the end of its output.
    """
    if not file.exists():
        return False, f"{file.relative_to(ROOT)} does not exist: a kernel has tests"
    choice = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpreted else {}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--color=no", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(**choice))
    lines = (ran.stdout.strip() or ran.stderr.strip() or f"pytest ended with status {ran.returncode}").splitlines()
    return ran.returncode == 0, "\n".join(lines[-1:] if ran.returncode == 0 else lines[-30:])


def no_gpu() -> str:
    """Why kernels cannot run on a GPU here; "" if they can. The interpreter does not count."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    capability = torch.cuda.get_device_capability()
    return f"this GPU is sm_{capability[0]}{capability[1]}" if capability < backend.SMALLEST_CAPABILITY else ""


def check(kernel: str, only: str = "", compile_only: bool = False) -> list[str]:
    """Print the checks of one kernel file as they end. Returns the names of those that failed."""

    def show(name: str, text: str) -> None:
        print(f"  {name:<10}{text}".replace("\n", "\n" + " " * 12), flush=True)

    def tested(name: str, where: str, interpreted: bool) -> list[str]:
        passed, text = run_tests(tests_of(kernel), interpreted)
        show(name, f"{tests_of(kernel).relative_to(ROOT)}, {where}: {text}")
        return [] if passed else [name]

    print(kernel, flush=True)
    failed = [] if compile_only else tested("values", "interpreter", interpreted=True)
    start = time.perf_counter()
    results = compiled(kernel, only)
    show("compiled", f"{len(results)} in {time.perf_counter() - start:.1f} s\n{table(results)}")
    if not results or any(r.problems for r in results):
        failed.append("compiled")
    if compile_only:
        return failed
    if reason := no_gpu():
        show("gpu", f"not checked: {reason}")
        return failed
    return failed + tested("gpu", torch.cuda.get_device_name(), interpreted=False)


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status: 0 all right, 1 a check failed; ends with 2 if a name is unknown."""
    names = known()
    about = "Check kernels: values in the interpreter, machine code without a GPU, and on a GPU the real thing."
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=about)
    parser.add_argument("kernel", nargs="+", help=f"{', '.join(names)}, or all")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile configurations with TEXT in their name")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--json", action="store_true", help="only compile, and print a JSON line for each result")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.kernel if name not in (*names, "all")]:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(names)}, or all")
    if triton is None:
        print(f"kernels.check: {backend.problem()}. The torch references are tested by `pytest tests/kernels/test_kernels.py`.")
        return 1
    names = names if "all" in chosen.kernel else list(dict.fromkeys(chosen.kernel))
    if chosen.json:
        bad = 0
        for result in (r for name in names for r in compile_here(name, chosen.only)):
            print(json.dumps(asdict(result)), flush=True)
            bad += bool(result.problems)
        return 1 if bad else 0
    failed = []
    for name in names:
        if parts := check(name, chosen.only, chosen.compile):
            failed.append(f"{name} ({', '.join(parts)})")
    print(f"FAILED: {'; '.join(failed)}" if failed else f"all right: {', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
