"""Data where a training step reads it: on the GPU if it fits there."""

import warnings

import numpy as np
import torch
from torch import Tensor

from data.notice import notice


def resident(array: np.ndarray, device: torch.device, what: str) -> tuple[Tensor, bool]:
    """`array` as a tensor on `device`, and True; if it does not fit there, on the CPU, and False, with a notice."""
    tensor = as_tensor(array)
    if fits(tensor.nbytes, device):
        return tensor.to(device), True
    notice(
        f"{what} ({tensor.nbytes / 2**30:.1f} GiB) would fill more than half of the GPU's free memory and stays in "
        "main memory; the host gathers each batch, which is slower."
    )
    return tensor, False


def as_tensor(array: np.ndarray) -> Tensor:
    """`array` as a tensor to read, without a copy, so that a file that is mapped stays on disk.

    Unsigned integers of more than 8 bits become signed ones with the same bits: torch can do little with the others.
    """
    if array.dtype.kind == "u" and array.itemsize > 1:
        array = array.view(array.dtype.str.replace("u", "i"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array is read-only, and the tensor is only read
        return torch.from_numpy(array)


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most half of the memory that is free on a GPU. On a CPU they are there already."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


def upload(source: Tensor, target: Tensor) -> None:
    """Copies `source`, on the CPU, into `target` without waiting for the GPU."""
    if target.device.type == "cuda":
        source = source.pin_memory()  # a new piece each time: torch keeps it until the copy is made
    target.copy_(source, non_blocking=True)
