"""Where and how a run computes: device, backend, compilation, threads; what was chosen and why."""

import os
import platform
import sys
from dataclasses import dataclass

import torch

from kernels import backend, fuse
from run.config import Config
from run.errors import UserError
from run.graph import unrecordable_reason

try:
    import resource
except ImportError:  # Windows
    resource = None

STEPS_WORTH_COMPILING = 300  # compiling takes about as long as it saves in that many small steps


@dataclass(frozen=True)
class Runtime:
    """The choices of a run; `reasons` are lines to print."""

    device: torch.device
    backend: str
    compile: bool
    graph: bool
    threads: int
    reasons: tuple[str, ...]

    def environment(self) -> dict[str, str | int | bool]:
        """What exact repetition is promised within: recorded in checkpoints and results."""
        return {"torch": torch.__version__, "device": self.device.type, "processor": processor(self.device),
                "backend": self.backend, "compile": self.compile, "threads": self.threads}  # fmt: skip


def choose(cfg: Config, ranks: int = 1) -> Runtime:
    """Resolve "auto" and check explicit choices for a run of so many ranks. Sets torch's threads, kernel fusing,
    malloc and, where it compiles for a CPU, deterministic algorithms for the process.

    Raises UserError for a device or backend that is not there.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    device, why_device = _device(cfg.device)
    name, why_backend = _backend(cfg.backend, device)
    compiling, why_compile = _compile(cfg, device)
    fuse.enable(compiling)
    if not compiling:
        leave_compiler_out()
    elif device.type == "cpu":
        repeat_sums()
    graph, why_graph = _graph(cfg, device, name, ranks)
    threads = torch.get_num_threads()
    reasons = (
        f"device: {device.type}, {why_device}; {threads} thread{'s' if threads > 1 else ''}",
        f"backend: {name}, {why_backend}",
        f"compile: {'on' if compiling else 'off'}, {why_compile}",
        *([f"CUDA graph: {'on' if graph else 'off'}, {why_graph}"] if device.type == "cuda" else []),
    )
    return Runtime(device, name, compiling, graph, threads, reasons)


def _device(wanted: str) -> tuple[torch.device, str]:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device = cuda: torch finds no CUDA GPU here; use --device cpu, or a CUDA build of torch", code=2
        )
    if wanted != "auto":
        return torch.device(wanted), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda"), "because torch finds a CUDA GPU"
    return torch.device("cpu"), "because torch finds no CUDA GPU"


def _backend(wanted: str, device: torch.device) -> tuple[str, str]:
    reason = backend.problem()
    if not reason and device.type == "cpu" and not backend.INTERPRETED:
        reason = "the run is on the CPU"
    if wanted == "triton" and reason:
        raise UserError(f"backend = triton: {reason}; use --backend torch, or auto", code=2)
    if wanted == "auto" and device.type == "cpu":
        reason = reason or "the run is on the CPU"
    name = "torch" if reason or wanted == "torch" else "triton"
    backend.use(name)
    if wanted != "auto":
        return name, "as asked" + (", in Triton's interpreter" if name == "triton" and backend.INTERPRETED else "")
    return name, f"because {reason}" if reason else f"because this GPU is an {torch.cuda.get_device_name()}"


def _compile(cfg: Config, device: torch.device) -> tuple[bool, str]:
    missing = device.type == "cpu" and fuse.compiler() is None
    why_missing = "no C++ compiler with Python's headers was found"
    if cfg.compile == "true":
        if missing:
            raise UserError(f"compile = true: {why_missing}; install g++ and Python's headers, or use --compile false")
        if problem := fuse.trial(device):
            raise UserError(f"compile = true: torch.compile does not work here ({problem}); use --compile false")
        return True, "as asked"
    if cfg.compile == "false":
        return False, "as asked"
    if missing:
        return False, f"because {why_missing}"
    if cfg.steps < STEPS_WORTH_COMPILING:
        return False, f"because {cfg.steps} steps are too few to earn back compiling"
    if problem := fuse.trial(device):
        return False, f"because torch.compile does not work here ({problem})"
    return True, "because torch.compile works here (the first step takes a minute, later runs find its work cached)"


def _graph(cfg: Config, device: torch.device, backend_name: str, ranks: int) -> tuple[bool, str]:
    reason = unrecordable_reason(cfg, device, backend_name, ranks)
    if cfg.cuda_graph == "true" and reason:
        raise UserError(f"cuda_graph = true: {reason}; use --cuda_graph false, or auto", code=2)
    if cfg.cuda_graph != "auto":
        return cfg.cuda_graph == "true", "as asked"
    return not reason, f"because {reason}" if reason else "because all of a step runs on the GPU"


def leave_compiler_out() -> None:
    """Keep the base class of optimizers from importing torch's compiler, which takes a second or two.

    torch wraps these methods so that its compiler does not trace them; the first call imports the compiler to do so and
    keeps the result as `__dynamo_disable`. In a run that compiles nothing, the method itself serves as well. AdamW and
    others import the compiler in `step` all the same.
    """
    optimizer = torch.optim.Optimizer
    for method in (optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain


def repeat_sums() -> None:
    """Have compiled code add floats in the same order in every run, as torch does where nothing is compiled.

    The gradient of a float embedding was added up by all threads at once, as they came, and no two runs of AdamW were
    equal. Integer layers need none of this: their sums are exact in any order.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, where it is glibc's: a step allocates what the one before it freed.

    Otherwise large tensors are mapped anew each time, and the kernel hands out (and clears) 15,000 pages a step. Those
    above 128 MiB, as a large vocabulary has them, are: smaller ones settle in the holes that they leave, and a
    process grew to twice what it held.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        if not mallopt(mmap_threshold, 2**27):
            mallopt(mmap_threshold, 2**25)  # glibc before 2.35 takes no more


def check_memory(cfg: Config, outputs: int, positions: int, device: torch.device) -> None:
    """Raises UserError if the run cannot fit into this machine's free memory, where the system says how much there is.

    positions is the length of one example, in tokens or patches. A lower bound: weights with their optimizer state, and
    what a backward pass keeps of each token and layer. Systems that promise more memory than they have kill a process
    without a word, so this is asked before.
    """
    free = _free_bytes()
    if free is None or device.type != "cpu":
        return
    weights = cfg.n_layer * (12 if cfg.model == "transformer" else 1) * cfg.d_model**2 + 2 * outputs * cfg.d_model
    tokens = cfg.batch_size // cfg.grad_accum * positions
    activations = cfg.n_layer * cfg.d_model * (40 if cfg.model == "transformer" else 4)
    need = weights * _bytes_per_weight(cfg) + tokens * (activations + outputs * 8)
    if need > free:
        raise UserError(f"out of memory: this run needs at least {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
                        "free; a smaller --batch_size, --d_model or --n_layer needs less, and so does --grad_accum 2 "
                        "or more")  # fmt: skip


def _bytes_per_weight(cfg: Config) -> int:
    """Memory of a weight and what belongs to it, the least there is while a step is made."""
    if cfg.method == "gft":
        return 1 + (cfg.momentum > 0) + 4 * (cfg.update == "step")  # the weight, its momentum, its int32 votes
    if cfg.under_muon:
        return 8 + {"fp32": 4, "int8": 1, "none": 0}[cfg.muon_state]
    return {"signsgd": 8, "sgd": 12}.get(cfg.method, 16)  # fp32: weight, gradient, moments


def _free_bytes() -> int | None:
    """Memory that can still be had, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def processor(device: torch.device) -> str:
    """Name of the GPU or CPU. Recorded because 16-bit products round differently on different CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory held so far: by torch on a GPU, by the process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Memory the process holds now, or None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
