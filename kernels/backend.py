"""Which of a kernel's two versions runs: the Triton kernel, or the torch reference beside it.

    from kernels.backend import jit, on_triton, tl

    on_triton(tensor)        whether kernels on this tensor go to Triton
    use("torch")             send everything to the references; "triton" demands Triton,
                             "auto" takes it on a GPU that can

Triton serves NVIDIA GPUs from compute capability 8.0 on. With TRITON_INTERPRET=1 in the environment when this is
imported, kernels run in Triton's interpreter, on CPU tensors and slowly: for tests, and for reading a kernel in a
debugger.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the references are all there is

    class tl:  # stands for the module
        """What kernel signatures mention."""

        constexpr = None

    triton = None

    def jit(function: Callable) -> Callable:
        """Leaves a kernel as it is; nothing calls it."""
        return function


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
SMALLEST_CAPABILITY = (8, 0)  # the first with int8 tensor cores that Triton's dot uses


def problem() -> str:
    """Why Triton kernels cannot run here; "" if they can."""
    if triton is None:
        return "triton is not installed here (it exists for Linux)"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    capability = torch.cuda.get_device_capability()
    if capability < SMALLEST_CAPABILITY:
        return f"this GPU is sm_{capability[0]}{capability[1]} and the kernels need sm_80 or newer"
    return ""


_problem = problem()
_choice = "auto"


def use(name: str) -> None:
    """Choose for the process: "auto", "torch" or "triton". Raises ValueError if it is unknown or not to be had."""
    global _choice
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {name!r}; it must be auto, torch or triton")
    if name == "triton" and _problem:
        raise ValueError(f"backend triton: {_problem}; use torch, or auto")
    _choice = name


def chosen() -> str:
    """What was last asked for: "auto", "torch" or "triton"."""
    return _choice


def on_triton(tensor: Tensor) -> bool:
    """Whether kernels on `tensor` run in Triton: on a GPU unless "torch" was chosen,
    on a CPU only if interpreted and asked for."""
    if _problem or _choice == "torch":
        return False
    return tensor.is_cuda or (INTERPRETED and _choice == "triton")


def tuned(configs: Sequence[Any], key: Sequence[str]) -> Callable:
    """triton.autotune over a few configs, its choices cached on disk; without a GPU the first config is taken."""
    if triton is None:
        return lambda kernel: kernel
    timed = not INTERPRETED and torch.cuda.is_available()
    return triton.autotune(list(configs) if timed else list(configs)[:1], key=list(key), cache_results=timed)


@dataclass(frozen=True)
class Shipped:
    """A configuration a kernel is launched in, for `kernels.check` to compile where there is no GPU.

    signature maps each argument that is not constexpr to its Triton type ("*i8", "*fp32", "i32", ...); `instructions`
    are those its machine code must contain: "int8" and "fp16" tensor-core products. `architectures` are those it is
    shipped for.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    instructions: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90, 100)
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})
