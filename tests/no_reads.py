"""A mode that refuses what makes the host wait for a GPU, so that a test on a CPU finds it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that wait for a value, or whose result has a shape that depends on one.
READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2")
# A constant made on the host: copied to a GPU, it waits for what is in the queue.
CONSTANTS = ("lift_fresh",)


class NothingIsRead(TorchDispatchMode):
    """Refuses to read the value of a tensor. What is inside an opaque operator is not seen."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in READS, f"{name} waits for a value"
        assert name not in CONSTANTS, "a constant of the host waits for the device"
        if name in ("index", "index_put", "index_put_"):
            kinds = {index.dtype for index in args[1] if index is not None}
            assert not kinds & {torch.bool, torch.uint8}, "the shape of what a mask selects is a value"
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        """Also refuses tolist and numpy, which are no operations, outside Triton's interpreter."""
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "__array__"):
            self.patch.setattr(torch.Tensor, name, _refused(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


def _refused(name):
    def refuse(*_, **__):
        raise AssertionError(f"{name} waits for a value")

    return refuse
