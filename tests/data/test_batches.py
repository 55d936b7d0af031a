"""A batch is made on the device without a value being read on the host, and every way to make it gives the same."""

import pytest
import torch
from test_image_task import task as image_task
from test_text_task import task as text_task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import resident
from kernels import backend

CPU = torch.device("cpu")
STEPS = (0, 1, 4, 5, 1000, 7)
TASKS = {
    "text": lambda **more: text_task(**more),
    "text of many tokens": lambda **more: text_task("<u4", 100_000, **more),
    "images": lambda **more: image_task(**more),
    "flips and crops": lambda **more: image_task(hflip=0.5, crop_min=0.3, **more),
    "cutmix": lambda **more: image_task(mix="cutmix", hflip=0.5, **more),
    "mixup": lambda **more: image_task(mix="mixup", mix_alpha=0.4, crop_min=0.3, **more),
    "both, few images": lambda **more: image_task(5, mix="both", **more),
}
# Operations that wait for a value, or whose result has a shape that depends on one.
REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "bincount")


class NothingIsRead(TorchDispatchMode):
    """Refuses what would make the host wait for `device`. What is inside an opaque operator is not seen."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in REFUSED and "unique" not in name, f"{name} waits for a value"
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{name} has an operand on {tensor.device}"
        if name in ("index", "index_put", "index_put_"):
            kinds = {index.dtype for index in args[1] if index is not None}
            assert not kinds & {torch.bool, torch.uint8}, "the shape of what a mask selects is a value"
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{name} leaves the device"
        return result


READS = {
    "item": lambda x: x[0].item(), "int": lambda x: int(x[1]), "if": lambda x: 2 if x[0] else 3, "unique": torch.unique,
    "nonzero": torch.nonzero, "mask": lambda x: x[x > 1], "copy": lambda x: x.to("meta"),
    "operand": lambda x: x.index_select(0, torch.arange(2, device="meta")),
    "constant": lambda x: torch.ones(2, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_the_mode_refuses(read):
    with NothingIsRead("cpu"), pytest.raises(AssertionError):
        READS[read](torch.arange(4))


@pytest.mark.parametrize(("read", "error"), [
    (torch.Tensor.tolist, NotImplementedError), (torch.Tensor.numpy, TypeError),
    (lambda x: x + torch.arange(4), RuntimeError),
])  # fmt: skip
def test_a_meta_tensor_has_no_values_to_read(read, error):
    with pytest.raises(error, match="meta"):
        read(torch.arange(4, device="meta"))


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("parts", [1, 3])
def test_nothing_is_read_on_the_host(kind, parts):
    """With the values a CPU has, and on the meta device, which has none that `tolist` could read unseen."""
    task, on_meta = (TASKS[kind](grad_accum=parts) for _ in range(2))
    for step in STEPS:
        expected = list(TASKS[kind](grad_accum=parts).batches(step, CPU))
        for made, device in ((task, CPU), (on_meta, torch.device("meta"))):
            made.prepare(step, device)
            rng = torch.tensor([1, step, 5], device=device)
            with NothingIsRead(device.type):
                pairs = [made.batch_at(rng, part) for part in range(parts)]
            for tensor, wanted in zip(sum(pairs, ()), sum(expected, ()), strict=True):
                assert tensor.device.type == device.type
                assert tensor.shape == wanted.shape and tensor.dtype == wanted.dtype
                assert device.type == "meta" or torch.equal(tensor, wanted)


@pytest.mark.parametrize("kind", ["text", "mixup"])
def test_the_triton_backend_draws_the_same(kind, on_triton, device):
    """In the interpreter on a CPU; with kernels on a GPU, where the float parts of augmentation may round otherwise."""
    made = [pair for step in (0, 5) for pair in TASKS[kind](grad_accum=2).batches(step, device)]
    backend.use("torch")
    expected = [pair for step in (0, 5) for pair in TASKS[kind](grad_accum=2).batches(step, CPU)]
    for pair, other in zip(made, expected, strict=True):
        for tensor, wanted in zip(pair, other, strict=True):
            if device.type == "cpu" or not tensor.is_floating_point():
                assert torch.equal(tensor.cpu(), wanted)
            else:
                torch.testing.assert_close(tensor.cpu(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("parts", [1, 3])
def test_data_that_do_not_fit_on_the_device_give_the_same_batches(kind, parts, monkeypatch, capsys):
    expected = [pair for step in STEPS for pair in TASKS[kind](grad_accum=parts).batches(step, CPU)]
    assert capsys.readouterr().err == ""
    task = TASKS[kind](grad_accum=parts)
    monkeypatch.setattr(resident, "fits", lambda size, device: False)
    made = [tuple(t.clone() for t in pair) for step in STEPS for pair in task.batches(step, CPU)]
    assert "would fill more than half of the GPU's free memory" in capsys.readouterr().err
    for pair, other in zip(made, expected, strict=True):
        assert all(map(torch.equal, pair, other))
