"""What a kernel becomes on a GPU, found without one: registers, spills, shared memory, tensor-core products.

    compile_config("int8_matmul", config, architecture=90)      a `Compiled`, with its `problems`

Triton compiles for any architecture on any machine. Registers and instructions are read from the machine code with the
disassembler that comes with triton, or where it is missing from the assembler's report.

Pointers and whole numbers among a kernel's arguments count as divisible by 16, as Triton finds them at the launch when
sizes are round. A type that ends in ":1" ("i32:1") promises nothing, as ragged sizes do not. What is 1 when launched,
such as the stride of a contiguous axis, belongs to the constants.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels import backend
from kernels.backend import LaunchConfig, triton

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program can have, CUDA's programming guide
TENSOR_MEMORY = 512  # columns, sm_100
LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True, "maxnreg": None}  # Triton's defaults

# What a tensor-core product is called in machine code (Ampere, Hopper, Blackwell) and in PTX.
ANY_PRODUCT = r"\b(?:UTC)?[A-Z]G?MMA(?:\.\w+)*"
ANY_PTX_PRODUCT = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.:\w]*"
PRODUCTS = {
    "int8": r"(?:IMMA|IGMMA|UTCIMMA)\b|.*\.s8\.s8\b|.*kind::i8\b",
    "fp16": r"(?:HMMA|HGMMA|UTCHMMA)\b(?!.*(?:BF16|TF32))|.*\.f16\.f16\b|.*kind::f16\b",
}
SPILL_BYTES = {None: 4, "8": 1, "16": 2, "64": 8, "128": 16}

# Of PTX: a product and a sum in one rounding, and a product or a sum that the assembler may join.
FUSED = re.compile(r"\s*fma\.rn(?:\.ftz)?\.f(?:32|64)\b")
FREE_PRODUCT = re.compile(r"\s*mul(?:\.ftz)?\.f(?:32|64)\s+(%\w+),")
FREE_SUM = re.compile(r"\s*(?:add|sub)(?:\.ftz)?\.f(?:32|64)\s+%\w+, (%\w+), (%\w+);")
DITHER_UNIT = "0f34000000"  # 2^-23: a whole number times this is exact, however it is rounded


@dataclass(frozen=True)
class Compiled:
    """What one configuration became on one architecture: memory in bytes, tensor-core `products` counted, and how many
    products share their rounding with a sum."""

    kernel: str
    name: str
    architecture: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    fused_sums: int = 0
    products: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def ast_source(config: LaunchConfig) -> Any:
    """The triton ASTSource of a configuration. Raises ValueError if it does not fit its kernel."""
    if unknown := [name for name in config.instructions if name not in PRODUCTS]:
        raise ValueError(f"got instructions {unknown}; known are {', '.join(PRODUCTS)}")
    kernel = config.kernel
    constants = {name: value for name, value in config.constants.items() if name not in LAUNCH}
    given = config.signature.keys() | constants.keys()
    defaults = {p.name: p.default for p in kernel.params if p.has_default and p.name not in given}
    if missing := [name for name in kernel.arg_names if name not in given | defaults.keys()]:
        raise ValueError(f"no type or constant for {', '.join(missing)}; give each argument one")
    if unknown := sorted(given - set(kernel.arg_names)):
        raise ValueError(f"{', '.join(unknown)}: not an argument; known are {', '.join(kernel.arg_names)}")
    constants |= defaults
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, multiple = config.signature.get(name, "constexpr").partition(":")
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


def _from_ptx(ptx: str, architecture: int) -> dict[str, Any]:
    """The same from the assembler's report on PTX, where triton came without the disassembler."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", source, "-o", f"{source}.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill_stores": int(re.search(r"(\d+) bytes spill stores", log).group(1)),
        "spill_loads": int(re.search(r"(\d+) bytes spill loads", log).group(1)),
        "products": dict(Counter(re.findall(ANY_PTX_PRODUCT, ptx))),
    }


def _fused_sums(ptx: str) -> int:
    """How many products are, or may be, rounded together with a sum."""
    lines = [line for line in ptx.splitlines() if DITHER_UNIT not in line]
    products = {found[1] for line in lines if (found := FREE_PRODUCT.match(line))}
    sums = [found for line in lines if (found := FREE_SUM.match(line))]
    return sum(bool(FUSED.match(line)) for line in lines) + sum(bool(products & {s[1], s[2]}) for s in sums)


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
        found = _from_ptx(binary.asm["ptx"], architecture)
    found["fused_sums"] = _fused_sums(binary.asm["ptx"])
    cache.put(json.dumps(found), file, binary=False)
    return found


def _problems(config: LaunchConfig, architecture: int, found: dict[str, Any], metadata: Any) -> list[str]:
    """What is wrong with a compiled kernel, each with its remedy."""
    problems = []
    if max(found["spill_stores"], found["spill_loads"]) > config.spills:
        stored, loaded = found["spill_stores"], found["spill_loads"]
        problems.append(
            f"spills {stored} bytes of stores and {loaded} of loads with {found['registers']} registers a thread; "
            "take smaller tiles, or more warps"
        )
    for wanted in config.instructions:
        if not any(re.match(PRODUCTS[wanted], product) for product in found["products"]):
            there = ", ".join(found["products"]) or "none at all"
            problems.append(f"has no {wanted} tensor-core product (found: {there}); look at tl.dot and its operands")
    if config.exact and found["fused_sums"]:
        problems.append(
            f"rounds {found['fused_sums']} products together with sums, which its reference does not; "
            "write a product that is added to as mul_rn(a, b)"
        )
    if metadata.shared > SHARED_MEMORY[architecture]:
        problems.append(
            f"needs {metadata.shared} bytes of shared memory, and a program has {SHARED_MEMORY[architecture]}; "
            "take smaller tiles, or fewer stages"
        )
    columns = getattr(metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:
        problems.append(f"needs {columns} columns of tensor memory, and there are {TENSOR_MEMORY}; take smaller tiles")
    return problems


def compile_config(kernel: str, config: LaunchConfig, architecture: int) -> Compiled:
    """Compile one configuration and say what is wrong with it, if anything. `kernel` is its file, for the report.

    Raises RuntimeError in a process with TRITON_INTERPRET=1.
    """
    if backend.INTERPRETED:
        raise RuntimeError("compile_config: kernels of this process are for the interpreter; unset TRITON_INTERPRET")
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {name: config.constants.get(name, default) for name, default in LAUNCH.items()}
    try:
        binary = triton.compile(ast_source(config), target=target, options=options)
    except (triton.errors.TritonError, RuntimeError, ValueError) as error:  # RuntimeError: a pass that gave up
        return Compiled(kernel, config.name, architecture, problems=[f"does not compile: {error}"])
    found = _inspect(binary, architecture)
    problems = _problems(config, architecture, found, binary.metadata)
    return Compiled(kernel, config.name, architecture, shared=binary.metadata.shared, problems=problems, **found)
