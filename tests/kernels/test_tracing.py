"""What torch.compile finds that a kernel writes to: its results, and nothing that it only reads.

torch.compile copies what a kernel writes to; of a tensor that is a view of a part of another it even copies, and reads,
what lies around it, which need not be there.

    python -m pytest -q tests/kernels/test_tracing.py
"""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from kernels.backend import triton
from kernels.check import ROOT, environment, known

WRITTEN = {
    "_columns_kernel": "c", "_scale_kernel": "scores", "_rows_kernel": "r squares",
    "_cross_entropy_kernel": "losses norms", "_cross_entropy_backward_kernel": "largest logits",
    "_dropout_kernel": "largest out", "_embedding_kernel": "out", "_embedding_votes_kernel": "new votes",
    "_flip_kernel": "flips momentum momentum_scale weight", "_int8_matmul_kernel": "out",
    "_learn_kernel": "flips momentum momentum_scale weight",
    "_measure_delta_kernel": "measured noise scratch votes_scale", "_momentum_kernel": "evidence momentum scale",
    "_words_kernel": "out", "_noise_kernel": "noise", "_quantize_delta_kernel": "d_int8 d_turned",
    "_rmsnorm_backward_kernel": "largest out", "_rmsnorm_quantize_kernel": "inv_rms x_int8",
    "_rmsnorm_quantize_twice_kernel": "inv_rms x_int8 x_turned", "_orthogonalise_kernel": "scores",
    "_transpose_kernel": "out", "_votes_kernel": "rng votes", "_rescale_kernel": "votes",
}  # fmt: skip
NEVER_TRACED = ("_heads_forward_kernel", "_heads_backward_kernel")  # see `attend` in model.py


def found_by_torch(kernel: str) -> list[tuple[str, list[str]]]:
    """Of each configuration of a kernel file that has no descriptors: its kernel and what torch finds it to write."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    class Device:
        """Stands for the driver of a GPU, of which only this is asked."""

        def get_current_target(self):
            return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Device())
    found = []
    for config in importlib.import_module(f"kernels.{kernel}").launch_configs():
        kinds = {name: kind.partition(":")[0] for name, kind in config.signature.items()}
        if any("tensordesc" in kind for kind in kinds.values()):
            continue
        types = {"*i8": "int8", "*i32": "int32", "*i64": "int64", "*fp16": "float16", "*bf16": "bfloat16",
                 "*fp32": "float32", "*fp64": "float64"}  # fmt: skip
        given = {name: torch.empty(16, dtype=getattr(torch, types[kind])) if kind in types else
                 0.3 if kind.startswith("fp") else 64 for name, kind in kinds.items()}  # fmt: skip
        arguments = {name: config.constants.get(name, given.get(name)) for name in config.kernel.arg_names}
        if hasattr(wrap, "identify_mutated_tensors"):  # before torch 2.12
            names = wrap.identify_mutated_tensors(config.kernel, arguments, {})
        else:
            accesses = wrap.identify_accessed_tensors(config.kernel, arguments, {})
            names = [dep.name for dep in accesses.read_writes.writes]
        found.append((config.kernel.fn.__name__, sorted(names)))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[str, list[str]]]]:
    """`found_by_torch` of all kernels, in a process without the interpreter."""
    code = "import json; from tests.kernels.test_tracing import *; "
    code += "print(json.dumps({kernel: found_by_torch(kernel) for kernel in known()}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(triton is None, reason="triton is not installed here")
@pytest.mark.parametrize("kernel", known())
def test_torch_finds_no_writes_to_what_is_only_read(kernel, found):
    for name, written in found[kernel]:
        assert name in NEVER_TRACED or set(written) <= set(WRITTEN[name].split()), (name, written)
