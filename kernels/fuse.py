"""Fusing the torch backend's element-wise work.

A function marked `@fused` is plain torch. After `enable(True)` it runs through torch.compile, which
needs a C++ compiler on a CPU and turns a chain of passes over memory into one; before, it runs as written.
The values are those of the same formula, though a sum may be taken in another order, so a run that must
be repeated exactly keeps the setting (checkpoints record it).
"""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

_enabled = False


def enable(on: bool) -> None:
    """Switch fusing on or off for every `@fused` function of the process."""
    global _enabled
    _enabled = on


def enabled() -> bool:
    """Whether `@fused` functions are compiled."""
    return _enabled


def compiler() -> str | None:
    """Path of the C++ compiler torch.compile would use on a CPU; None without one, or without Python's headers."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def trial(device: torch.device | str = "cpu") -> str:
    """Compile one trivial function for `device`: "" if torch.compile works, else its reason in a line."""
    import torch._dynamo.exc  # torch's compiler takes a second to import
    import torch._inductor.exc

    failures = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError, OSError)
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except failures as error:
        return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return ""


def fused(function: Callable | None = None, *, dynamic: bool = True) -> Callable:
    """Mark a function of tensors whose passes over memory torch.compile may merge.

    `dynamic` is torch.compile's: False compiles anew for every shape, for functions that always see the same ones.
    """
    if function is None:
        return functools.partial(fused, dynamic=dynamic)
    compiled = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal compiled
        if not _enabled or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=dynamic)
        return compiled(*args, **kwargs)

    return call
