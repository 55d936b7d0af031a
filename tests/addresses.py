"""Watches Triton's interpreter: a kernel may touch the tensors of its launch and nothing else.

The interpreter reads and writes whatever address a kernel computes. After `watch` it compares every address of every
load, store and atomic, descriptors' too, with the launch's arguments first: from a tensor's first element to its last,
so that what surrounds a view counts as outside. An address in another argument passes, or between the rows of a view.
"""

from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

# The builder's methods that touch memory, which its others call; the places of the addresses and of the mask.
OPERATIONS = {
    "create_masked_load": ("load", 0, 1),
    "create_masked_store": ("store", 0, 2),
    "create_atomic_rmw": ("atomic", 1, 3),
    "create_atomic_cas": ("atomic_cas", 0, None),
}

_kernel = ""
_extents: dict[str, tuple[int, int]] = {}  # of every tensor of the launch: its first byte, and the one after its last


def watch() -> None:
    """From now on a kernel that leaves its arguments ends with an InterpreterError that says so."""
    arguments = interpreter.GridExecutor._init_args_hst

    def noted(self: Any, given: tuple, named: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        global _kernel
        on_host = arguments(self, given, named)
        _kernel = self.fn.__name__
        _extents.clear()
        for name, value in (*zip(self.arg_names, on_host[0], strict=False), *on_host[1].items()):
            _note(name, value)
        return on_host

    interpreter.GridExecutor._init_args_hst = noted
    for method, places in OPERATIONS.items():
        _watch_method(method, *places)


def _note(name: str, value: Any) -> None:
    """Note the extent of an argument that is a tensor, or of those in a tuple, a descriptor or a reinterpreted one."""
    if isinstance(value, tuple):
        for number, part in enumerate(value):
            _note(f"{name}[{number}]", part)
    elif isinstance(tensor := getattr(value, "base", value), torch.Tensor) and tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        _extents[name] = (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def _watch_method(method: str, operation: str, pointer: int, mask: int | None) -> None:
    touch = getattr(interpreter.InterpreterBuilder, method)

    def checked(self: Any, *given: Any, **options: Any) -> Any:
        addresses = given[pointer].data
        if mask is not None:
            addresses = addresses[np.broadcast_to(given[mask].data.astype(bool), addresses.shape)]
        if addresses.size:
            _check(operation, addresses, max(1, given[pointer].get_element_ty().primitive_bitwidth // 8))
        return touch(self, *given, **options)

    setattr(interpreter.InterpreterBuilder, method, checked)


def _check(operation: str, addresses: np.ndarray, size: int) -> None:
    low, high = int(addresses.min()), int(addresses.max()) + size
    if any(first <= low and high <= end for first, end in _extents.values()):
        return
    inside = np.zeros(addresses.shape, bool)
    for first, end in _extents.values():
        inside |= (addresses >= first) & (addresses <= end - size)
    if not inside.all():
        wrong = int(addresses[~inside].flat[0])
        distances = {max(first - wrong, wrong - end + 1): name for name, (first, end) in _extents.items()}
        raise AssertionError(
            f"{_kernel}: {operation} at {np.sum(~inside)} of {inside.size} addresses outside the launch's arguments, "
            f"the first {min(distances)} bytes from {distances[min(distances)]}"
        )
