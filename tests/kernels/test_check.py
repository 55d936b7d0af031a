"""Every launch configuration compiles for sm_80, sm_90 and sm_100 without spills and with its tensor-core products.

And `kernels.check`, which finds that out, refuses kernels made to be refused. No GPU is needed; the compiling is done
in processes of their own, since this one's kernels belong to the interpreter.

    python -m pytest -q tests/kernels/test_check.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import check
from kernels.backend import LaunchConfig, triton
from kernels.machine_code import Compiled

pytestmark = pytest.mark.skipif(triton is None, reason="triton is not installed: there is nothing to compile with")

CONFIGURATIONS = [
    (kernel, config.name, architecture)
    for kernel in (check.known() if triton else [])
    for config, architecture in check.configurations(kernel)
]

TOY = '''
from kernels.backend import LaunchConfig, jit, mul_rn, tl


@jit
def _add_kernel(a, b, out, n, BLOCK: tl.constexpr = 256):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, mask=at < n, other=0) + tl.load(b + at, mask=at < n, other=0), mask=at < n)


@jit
def _centre_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.store(out + at, row - tl.max(row, axis=0))


@jit
def _sum_kernel(a, b, c, out, ROUNDED: tl.constexpr):
    at = tl.arange(0, 32)
    left, right = tl.load(a + at), tl.load(b + at)
    product = mul_rn(left, right) if ROUNDED else left * right
    tl.store(out + at, product + tl.load(c + at))


@jit
def _product_kernel(a, b, out, K, stride, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), dtype=out.dtype.element_ty)
    for k in range(0, K, BLOCK):
        left = tl.load(a + rows[:, None] * K + (k + ks)[None, :] * stride, mask=(k + ks < K)[None, :], other=0)
        right = tl.load(b + columns[None, :] * K + (k + ks)[:, None] * stride, mask=(k + ks < K)[:, None], other=0)
        total = tl.dot(left, right, total, out_dtype=out.dtype.element_ty)
    tl.store(out + rows[:, None] * N + columns[None, :], total)


ADD = {"a": "*i32", "b": "*i32", "out": "*i32", "n": "i32"}
INT8 = {"a": "*i8", "b": "*i8", "out": "*i32", "K": "i32"}
SUM = dict.fromkeys(("a", "b", "c", "out"), "*fp32")
ONE_WARP = {"ROUNDED": True, "num_warps": 1}
FP16 = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "K": "i32"}


def product(name, signature, m=64, n=64, block=64, architectures=(90,), stride=1, num_stages=3, **settings):
    constants = {"M": m, "N": n, "BLOCK": block, "stride": stride, "num_stages": num_stages}
    return LaunchConfig(name, _product_kernel, signature, constants, architectures=architectures, **settings)
'''

GOOD = """
def launch_configs():
    return [
        LaunchConfig("add", _add_kernel, ADD, {}),
        LaunchConfig("sum", _sum_kernel, SUM, ONE_WARP, exact=True),
        LaunchConfig("wide_sum", _sum_kernel, dict.fromkeys(SUM, "*fp64"), ONE_WARP, exact=True),
        product("int8", INT8, instructions=("int8",), architectures=(80, 90, 100)),
        product("fp16", FP16, instructions=("fp16",), architectures=(80, 90, 100)),
    ]
"""

BAD = """
def launch_configs():
    row = {"x": "*fp32", "out": "*fp32"}
    return [
        LaunchConfig("spills", _centre_kernel, row, {"BLOCK": 2048, "num_warps": 1, "maxnreg": 24}),
        LaunchConfig("has_no_dot", _add_kernel, ADD, {}, instructions=("int8",), architectures=(90,)),
        product("wrong_dot", FP16, instructions=("fp16", "int8")),
        product("too_much_shared", INT8, 64, 64, 512, (80, 90), num_stages=8),
        product("short_dot", INT8, block=16),
        LaunchConfig("fused", _sum_kernel, SUM, {"ROUNDED": False, "num_warps": 1}, exact=True, architectures=(80, 90)),
        LaunchConfig("no_type", _add_kernel, {"a": "*i32", "b": "*i32", "out": "*i32"}, {}, architectures=(90,)),
        LaunchConfig("no_argument", _add_kernel, ADD | {"m": "i32"}, {}, architectures=(90,)),
        LaunchConfig("no_product", _add_kernel, ADD, {}, instructions=("fp64",), architectures=(90,)),
    ]
"""

TOY_TEST = '''
import pytest
import torch

from kernels.toy import _add_kernel, _sum_kernel


@pytest.mark.usefixtures("on_triton")
def test_add(device):
    a = torch.arange(300, dtype=torch.int32, device=device)
    out = torch.empty_like(a)
    _add_kernel[(2,)](a, a, out, 300)
    assert torch.equal(out, WANTED * a)


@pytest.mark.usefixtures("on_triton")
def test_sum_without_masks(device):
    a = torch.ones(34 - WANTED, device=device)
    out = torch.empty_like(a)
    _sum_kernel[(1,)](a, a, a, out, True)
    assert (out == 2).all()
'''


@pytest.mark.parametrize(
    "kernel, name, architecture", CONFIGURATIONS, ids=[f"{k}-{n}-sm_{a}" for k, n, a in CONFIGURATIONS]
)
def test_launch_configuration(kernel, name, architecture):
    result = next(r for r in check.compiled(kernel) if (r.name, r.architecture) == (name, architecture))
    assert result.problems == []
    assert result.registers > 0


def test_configurations_have_names_of_their_own():
    assert len(set(CONFIGURATIONS)) == len(CONFIGURATIONS)


def test_every_kernel_file_has_configurations_and_tests():
    folder = check.ROOT / "kernels"
    sources = {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.py")}
    with_kernels = {name for name, source in sources.items() if re.search(r"^@jit\ndef _\w+_kernel\(", source, re.M)}
    assert with_kernels and with_kernels <= set(check.known()), "a kernel's file ends with launch_configs()"
    assert [name for name in check.known() if not check.tests_of(name).exists()] == []


LAUNCHERS = """
import importlib, re, torch
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *_: (9, 0)  # as on a GPU machine
from kernels import check
for name in check.known():
    importlib.import_module(f"kernels.{name}")
    source = (check.ROOT / "kernels" / f"{name}.py").read_text()
    for operator in re.findall(r'^@operator\\("(\\w+)"', source, re.MULTILINE):
        kernels = torch._library.triton.get_triton_kernels_for_op(f"nanogft::{operator}")
        print(operator, len(kernels))
"""


def test_torch_compile_finds_the_kernels_of_each_launcher():
    """By their source it knows a compiled graph that is out of date."""
    ran = run(check.ROOT, code=LAUNCHERS)
    found = dict(line.split() for line in ran.stdout.splitlines())
    assert {"int8_matmul", "rmsnorm_quantize", "accumulate_embedding_votes"} <= found.keys(), ran.stderr
    assert [name for name, count in found.items() if count == "0"] == []


def scratch(folder: Path, wanted: int = 2, **sources: str) -> Path:
    """A tree with check.py and toy kernel files in it. The toy's tests pass if `wanted` is 2, and not if it is 3."""
    for part in ("kernels", "tests/kernels"):
        (folder / part).mkdir(parents=True)
    for file in ("__init__.py", "backend.py", "check.py", "machine_code.py"):
        shutil.copy(check.ROOT / "kernels" / file, folder / "kernels" / file)
    for file in ("conftest.py", "addresses.py"):
        shutil.copy(check.ROOT / "tests" / file, folder / "tests" / file)
    for name, source in sources.items():
        (folder / "kernels" / f"{name}.py").write_text(TOY + source)
        test = TOY_TEST.replace("kernels.toy", f"kernels.{name}").replace("WANTED", str(wanted))
        (folder / "tests" / "kernels" / f"test_{name}.py").write_text(test)
    return folder


def run(folder: Path, *arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`python -m kernels.check` in a tree, or `code`; environment as in this process but for what is given."""
    command = ["-c", code, *arguments] if code else ["-m", "kernels.check", *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], cwd=folder, env=kept, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A tree with the kernels made to be refused, a test that fails, and a kernel file without tests."""
    nothing = "def launch_configs():\n    return []\n"
    folder = scratch(tmp_path_factory.mktemp("bad"), wanted=3, bad=BAD, untested=nothing)
    (folder / "tests" / "kernels" / "test_untested.py").unlink()
    return folder


@pytest.fixture(scope="module")
def refused(bad) -> dict[tuple[str, int], Compiled]:
    """The results of the kernels made to be refused, by name and architecture."""
    ran = run(bad, "bad", "--json")
    assert ran.returncode == 1, ran.stderr
    results = [Compiled(**json.loads(line)) for line in ran.stdout.splitlines()]
    return {(r.name, r.architecture): r for r in results}


@pytest.mark.parametrize(
    "name, architecture, words",
    [
        ("spills", 80, "spills"),
        ("spills", 90, "spills"),
        ("spills", 100, "spills"),
        ("has_no_dot", 90, "no int8 tensor-core product (found: none at all)"),
        ("wrong_dot", 90, "no int8 tensor-core product (found: HGMMA"),
        ("too_much_shared", 80, "a program has 166912"),
        ("too_much_shared", 90, "a program has 232448"),
        ("short_dot", 90, "does not compile"),
        ("fused", 80, "rounds 1 products together with sums"),
        ("fused", 90, "rounds 1 products together with sums"),
        ("no_type", 90, "no type or constant for n"),
        ("no_argument", 90, "m: not an argument; known are a, b, out, n, BLOCK"),
        ("no_product", 90, "got instructions ['fp64']; known are int8, fp16"),
    ],
    ids=lambda value: str(value).split("(")[0].strip().replace(" ", "_"),
)
def test_bad_kernels_are_refused(refused, name, architecture, words):
    problems = refused[name, architecture].problems
    assert len(problems) == 1
    assert words in problems[0]


def test_spills_are_measured(refused):
    result = refused["spills", 90]
    assert result.spill_stores > 0
    assert result.spill_loads > 0
    assert 0 < result.registers <= 24


def test_good_kernels_pass(tmp_path):
    ran = run(scratch(tmp_path, good=GOOD), "good", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "interpreter: 2 passed" in ran.stdout
    assert "IMMA" in ran.stdout
    assert "HMMA" in ran.stdout
    assert f"triton {triton.__version__}" in ran.stdout
    assert ran.stdout.endswith(f"no registers spill with triton {triton.__version__}\nall right: good\n")


def test_failures_are_named_and_end_with_1(bad):
    ran = run(bad, "all")
    assert ran.returncode == 1, ran.stderr
    assert "2 failed" in ran.stdout
    assert "_sum_kernel: load at 1 of 32 addresses outside the launch's arguments" in ran.stdout
    assert "has_no_dot on sm_90 has no int8 tensor-core product" in ran.stdout
    assert "tests/kernels/test_untested.py does not exist" in ran.stdout
    assert "registers spill in bad: spills on sm_80, bad: spills on sm_90, bad: spills on sm_100\n" in ran.stdout
    assert ran.stdout.endswith("FAILED: bad (values, compiled); untested (values, compiled)\n")


def test_part_of_a_file(bad):
    """Only some configurations, and no tests, which here would fail."""
    ran = run(bad, "bad", "--compile", "--only", "wrong_dot")
    assert ran.returncode == 1
    assert "compiled  1 in" in ran.stdout and "values" not in ran.stdout
    assert run(bad, "bad", "--compile", "--only", "nothing").stdout.endswith("FAILED: bad (compiled)\n")


def test_assembler_report_and_attributes(bad):
    """Without the bundled disassembler the same is read from PTX. Sizes count as round unless they say otherwise."""
    code = """
from kernels import bad, check, machine_code
from kernels.backend import LaunchConfig
from kernels.machine_code import ast_source
machine = list(check.compile_here("bad"))
machine_code._tool = lambda name: ""
ptx = list(check.compile_here("bad"))
for one, other in zip(machine, ptx, strict=True):
    assert len(one.problems) == len(other.problems), (one, other)
    assert abs(one.registers - other.registers) <= 8, (one, other)
    assert bool(one.products) == bool(other.products), (one, other)
plain = LaunchConfig("plain", bad._add_kernel, bad.ADD, {})
ragged = LaunchConfig("ragged", bad._add_kernel, bad.ADD | {"n": "i32:1", "a": "*i32:1"}, {})
print(sorted(ast_source(plain).attrs), sorted(ast_source(ragged).attrs))
"""
    ran = run(bad, code=code)
    assert ran.stdout == "[(0,), (1,), (2,), (3,)] [(1,), (2,)]\n", ran.stderr


def test_a_compiler_that_dies_is_reported(monkeypatch):
    config = LaunchConfig("some", None, {}, {})
    monkeypatch.setattr(check, "configurations", lambda kernel, only: [(config, 80), (config, 90)])
    line = json.dumps(check.asdict(Compiled("dying", "some", 80, registers=32)))
    ended = subprocess.CompletedProcess([], -6, f"{line}\n", "LLVM ERROR: broken\n")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: ended)
    first, second = check.compiled("dying")
    assert (first.registers, first.problems) == (32, [])
    assert second.problems == ["never reported: its compiler ended with status -6\nLLVM ERROR: broken"]


def test_unknown_name_gives_the_list(capsys):
    with pytest.raises(SystemExit) as ended:
        check.main(["quantise"])
    assert ended.value.code == 2
    assert f"no kernel quantise; there are {', '.join(check.known())}, or all" in capsys.readouterr().err


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(check, "triton", None)
    monkeypatch.setattr(check.backend, "triton", None)
    assert check.main(["all"]) == 1
    assert "triton is not installed here" in capsys.readouterr().out
