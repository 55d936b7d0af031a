"""What a run computes with: what is chosen and why, memory, and systems that are not POSIX."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import backend, fuse
from run import device as runtime
from run.config import Config, load
from run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(fuse.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def as_before():
    """What `choose` sets for the process, as the test found it."""
    fusing, threads, exact = fuse.enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    fuse.enable(fusing)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    backend.use("auto")


def chosen(*argv: str) -> runtime.Runtime:
    return runtime.choose(load(["shakespeare_char_small", "--device", "cpu", *argv]))


def test_compiling_is_chosen_with_a_reason(monkeypatch):
    monkeypatch.setattr(fuse, "compiler", lambda: None)
    without = chosen()
    assert not without.compile and any("no C++ compiler" in reason for reason in without.reasons)
    with pytest.raises(UserError, match="--compile false"):
        chosen("--compile", "true")
    monkeypatch.setattr(fuse, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(fuse, "trial", lambda device: "")
    assert chosen().compile and fuse.enabled()
    assert not chosen("--steps", "20").compile
    monkeypatch.setattr(fuse, "trial", lambda device: "CppCompileError: no omp.h")
    broken = chosen()
    assert not broken.compile and any("no omp.h" in reason for reason in broken.reasons)
    with pytest.raises(UserError, match="no omp.h.*--compile false"):
        chosen("--compile", "true")


def test_the_trial_compiles_for_the_device_in_use(monkeypatch):
    """A CUDA run needs no C++ compiler, and none is run for it."""
    tried = []
    monkeypatch.setattr(fuse, "compiler", lambda: None)
    monkeypatch.setattr(fuse, "trial", lambda device: tried.append(torch.device(device).type) or "")
    assert runtime._compile(Config(compile="true"), torch.device("cuda"))[0]
    assert runtime._compile(Config(), torch.device("cuda"))[0]
    monkeypatch.setattr(fuse, "compiler", lambda: "/usr/bin/g++")
    assert runtime._compile(Config(), CPU)[0]
    assert runtime._compile(Config(compile="false"), CPU) == (False, "as asked")
    assert not runtime._compile(Config(steps=20), CPU)[0]
    assert tried == ["cuda", "cuda", "cpu"]


@needs_compiler
def test_the_trial_works_here():
    assert fuse.trial(CPU) == ""


def test_a_backend_or_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "problem", lambda: "this GPU is sm_75 and the kernels need sm_80 or newer")
    with pytest.raises(UserError, match="sm_75.*--backend torch"):
        chosen("--backend", "triton")
    assert chosen("--compile", "false").backend == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here; use --device cpu"):
        chosen("--device", "cuda")


def test_environment_is_what_repetition_is_promised_within():
    environment = chosen("--compile", "false").environment()
    assert set(environment) == {"torch", "device", "processor", "backend", "compile", "threads"}
    assert environment["device"] == "cpu" and environment["compile"] is False and environment["processor"]


def test_memory_is_measured():
    resident, peak = runtime.resident_bytes(), runtime.peak_memory_bytes(CPU)
    assert 2**25 < peak < 2**40 and (resident is None or resident <= peak * 1.05)


def test_what_cannot_fit_is_refused(monkeypatch):
    cfg = Config(d_model=1024, n_layer=10, batch_size=1)
    weights = 10 * 12 * 1024**2
    monkeypatch.setattr(runtime, "_free_bytes", lambda: int(5.5 * weights))
    runtime.check_memory(cfg, 64, 1, CPU)
    with pytest.raises(UserError, match="out of memory: this run needs at least .* GiB are free; a smaller"):
        runtime.check_memory(replace(cfg, momentum=0.9), 64, 1, CPU)
    runtime.check_memory(replace(cfg, momentum=0.9, update="backward"), 64, 1, CPU)
    with pytest.raises(UserError, match="out of memory"):
        runtime.check_memory(replace(cfg, method="adamw"), 64, 1, CPU)
    runtime.check_memory(replace(cfg, method="adamw"), 64, 1, torch.device("cuda"))
    monkeypatch.setattr(runtime, "_free_bytes", lambda: None)
    runtime.check_memory(replace(cfg, method="adamw"), 64, 1, CPU)


@pytest.mark.parametrize("settings, expected", [
    ({}, 5), ({"momentum": 0.9}, 6), ({"update": "backward"}, 1), ({"update": "backward", "momentum": 0.9}, 2),
    ({"method": "adamw"}, 16), ({"method": "ste"}, 16), ({"method": "muon"}, 12),
    ({"method": "muon", "muon_state": "int8"}, 9), ({"method": "signsgd"}, 8),
])  # fmt: skip
def test_bytes_of_a_weight(settings, expected):
    assert runtime._bytes_per_weight(replace(Config(), **settings)) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is set where it is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own: a tensor as large as the one freed before costs no new pages."""
    program = """
import resource, torch
from run import device as runtime
runtime.keep_freed_memory()
for _ in range(20):  # until holes of the right size are there
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 4 x 64 MiB in fresh pages of 4 KiB would be 65,536


WITHOUT_POSIX = """
import sys
import torch
for name in ("fcntl", "resource", "termios", "triton"):
    sys.modules[name] = None
import bench, predict, sample, train
from run import checkpoint, device, folder
from run.config import Config
chosen = device.choose(Config(compile="false"))
assert chosen.backend == "torch" and device.peak_memory_bytes(chosen.device) is None
device.check_memory(Config(), 65, 64, chosen.device)
path, lock = folder.choose_folder(Config(out_dir=sys.argv[1]))
checkpoint.save(path, "last", {"w": torch.zeros(3)}, {"step": 1})
assert checkpoint.load(path, "last")[1]["step"] == 1
lock.release()
print(chosen.reasons[1])
"""


def test_nothing_needs_posix(tmp_path):
    """Modules that Windows lacks are made impossible to import."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX, str(tmp_path / "o")], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "backend: torch, because triton is not installed here (it exists for Linux)\n"


@needs_compiler
def test_a_compiled_gradient_of_a_float_embedding_is_repeated():
    """Threads that add to the same rows at once gave ten different sums of ten."""
    chosen("--compile", "true", "--threads", "2")
    torch.manual_seed(0)
    tokens, delta = torch.randint(65, (4096,)), torch.randn(4096, 64)
    table = torch.randn(65, 64, requires_grad=True)
    loss = torch.compile(lambda tokens, table: (F.embedding(tokens, table) * delta).sum())
    sums = [torch.autograd.grad(loss(tokens, table), table)[0] for _ in range(10)]
    assert all(torch.equal(one, sums[0]) for one in sums)


def test_a_run_that_compiles_nothing_leaves_the_compiler_out():
    """The base class of torch's optimizers imports it on its first call, which takes a second or two."""
    program = """
import sys, torch
from run import device
from run.config import Config
device.choose(Config(compile="false"))
net = torch.nn.Linear(3, 2)
optimizer = torch.optim.Optimizer(net.parameters(), {"lr": 0.1})
net(torch.ones(3)).sum().backward()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False 1.0\n"
