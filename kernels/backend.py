"""Which of a kernel's two versions runs (the Triton kernel, or the torch reference beside it), and how it is launched.

    from kernels.backend import jit, mul_rn, on_triton, operator, tl, wrap_triton

    on_triton(tensor)                  whether kernels on this tensor go to Triton
    use("torch")                       send everything to the references; "triton" demands Triton,
                                       "auto" takes it on a GPU that can
    @operator("name")                  registers a launcher as torch.ops.nanogft.name; in the launcher,
    wrap_triton(_kernel)[grid](...)    launches a kernel
    @opaque_operator("name", fake)     registers a function that torch.compile must not look into

Triton serves NVIDIA GPUs from compute capability 8.0 on. With TRITON_INTERPRET=1 in the environment when this is
imported, kernels run in Triton's interpreter, on CPU tensors and slowly: for tests, and for reading a kernel in a
debugger.

torch.compile sees through an operator to its kernels and launches them itself, which costs the host much less than a
call from Python. It compiles every kernel so that a product and a sum may share one rounding, whatever the launcher
asks for. So a kernel whose reference rounds both writes such a product as `mul_rn(a, b)`. And it passes a Python float
as float64, where Triton's own launch passes float32: a kernel casts it (`tl.cast(beta, tl.float32)`).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


# MKL's vector functions (torch's exp, cos and others on a CPU) set themselves up in their first call. Where two threads
# make it at once, one of them now and then computes with low accuracy: in one training of ten half of a rotation's
# cosines were wrong by 1.5e-4, and so were the weights in the end (LOG.md). So one thread calls first.
torch.ones(1).exp()

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
SMALLEST_CAPABILITY = (8, 0)  # the first with int8 tensor cores that Triton's dot uses


def problem() -> str:
    """Why Triton kernels cannot run here; "" if they can."""
    if triton is None:
        return "triton is not installed here (it exists for Linux)"
    if INTERPRETED:
        return ""
    return gpu_problem()


def gpu_problem() -> str:
    """Why kernels cannot run on a GPU here; "" if they can. The interpreter does not count."""
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


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU; in the interpreter that of the GPU everything runs on."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, so that a program has several tiles there too."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def describable(*matrices: Tensor) -> bool:
    """Whether a kernel can copy tiles of these matrices by descriptor: rows and their beginnings lie on 16 bytes, the
    GPU has a copy engine and 227 KiB of shared memory a program (sm_90 and sm_100; sm_120 has 99), and no compiler
    traces, which would have to make the descriptors itself."""
    traced = any(type(m) not in (Tensor, torch.nn.Parameter) for m in matrices)
    if traced or capability_of(matrices[0])[0] not in (9, 10):
        return False
    return all(
        m.stride(1) == 1 and m.stride(0) * m.itemsize % 16 == 0 and m.stride(0) >= m.shape[1] and m.data_ptr() % 16 == 0
        for m in matrices
    )


def describe(matrix: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of tiles (rows, columns) of a matrix, for `describable` ones."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def operator(name: str, mutates_args: Iterable[str] = ()) -> Callable:
    """Register a launcher as the operator torch.ops.nanogft.NAME that changes only the arguments `mutates_args`.

    The launcher allocates its results, launches kernels through `wrap_triton` and makes no decision on values. While
    torch.compile traces, it runs on tensors without data, which gives the results' shapes. Its kernels stand above it
    in the file: they are looked up when it is registered. In the interpreter the operator is opaque, since there is no
    kernel for a compiler to see.
    """

    def register(launcher: Callable) -> Callable:
        if _problem or INTERPRETED:
            return opaque_operator(name, launcher, mutates_args)(launcher)
        return torch.library.triton_op(f"nanogft::{name}", launcher, mutates_args=mutates_args)

    return register


_library = torch.library.Library("nanogft", "FRAGMENT")


def opaque_operator(name: str, fake: Callable, mutates_args: Iterable[str] = ()) -> Callable:
    """Register a function as the operator torch.ops.nanogft.NAME, which torch.compile calls and does not look into.

    fake gives results without data, of the right shapes. Unlike torch.library.custom_op this has no autograd (integers
    have none): a call costs the host 2 us, not 30, and does not import torch's compiler.
    """

    def register(function: Callable) -> Callable:
        _library.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nanogft::{name}", fake, lib=_library)
        return getattr(torch.ops.nanogft, name)

    return register


class _InterpretedKernel:
    """A kernel in the interpreter, which leaves tensors without data alone."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable:
        def launch(*arguments: Any, **named: Any) -> None:
            given = (*arguments, *named.values())
            if not any(isinstance(value, torch._subclasses.FakeTensor) for value in given):
                self.kernel[grid](*arguments, **named)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """A kernel to launch inside an `operator`: `wrap_triton(_kernel)[grid](...)`.

    It has the name of torch's function because torch looks for this name, and for the kernel's own name in its
    argument, to tell when a compiled graph in its cache is out of date.
    """
    return _InterpretedKernel(kernel) if INTERPRETED else torch.library.wrap_triton(kernel)


if INTERPRETED:  # it has no assembly, and rounds every product

    @jit
    def mul_rn(a, b):
        """a * b, float32 or float64, rounded before anything is added to it."""
        return a * b

else:

    @jit
    def mul_rn(a, b):
        """a * b, float32 or float64, rounded before anything is added to it."""
        if a.dtype == tl.float64:
            return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
        else:
            return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched on a GPU, for `kernels.check` to compile it where there is none.

    signature maps each argument that is not constexpr to its Triton type ("*i8", "*fp32", "i32", ...); `constants` has
    the others, and what else the launch is given by name, such as num_warps. `instructions` are those its machine code
    must contain: "int8" and "fp16" tensor-core products. `architectures` are those it is launched on. `exact` says that
    the kernel equals its reference bit for bit, so that no product may share a rounding with a sum. `spills` are the
    bytes a thread may spill: 0, or a few where that happens once a block.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    instructions: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90, 100)
    exact: bool = False
    spills: int = 0
