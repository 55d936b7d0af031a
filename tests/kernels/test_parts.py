"""What torch makes in parts, to need less memory for a moment: every bit is that of the whole.

    python -m pytest -q tests/kernels/test_parts.py

Moves of weights in parts: test_flip.py.
"""

from collections.abc import Callable

import pytest
import torch

from kernels.cross_entropy import cross_entropy
from kernels.embedding import accumulate_embedding_votes
from kernels.int8_matmul import int8_matmul
from kernels.measure_delta import absmax
from kernels.philox import noise_from
from kernels.quantize_delta import quantize_delta
from kernels.votes import accumulate_votes
from tests.kernels.inputs import FLOATS, floats, generator, int8s, readable
from tests.kernels.update_inputs import some_rng


@pytest.fixture
def equal_in_parts(monkeypatch) -> Callable:
    """Calls a function twice, the second time with parts of at most 100 elements and 8 columns: are results equal?"""

    def compare(function: Callable[[], tuple[torch.Tensor, ...]]) -> bool:
        whole = function()
        for name in ("tiles", "cross_entropy"):
            monkeypatch.setattr(f"kernels.{name}.PART", 100)
        monkeypatch.setattr("kernels.int8_matmul.TORCH_COLUMNS", 8)
        return all(torch.equal(a, b) for a, b in zip(whole, function(), strict=True))

    return compare


@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
@pytest.mark.parametrize("residual", [False, True])
def test_products(residual, dtype, equal_in_parts):
    x, w, scale = int8s(13, 37), int8s(65, 37, seed=1), floats(13, 1).abs()
    added = floats(13, 65, dtype=dtype) if residual else None
    assert equal_in_parts(lambda: tuple(int8_matmul(x, w, s, added, dtype) for s in (scale, scale[0, 0])))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_delta(per_row, bits, equal_in_parts):
    delta, rng = floats(37, 65), some_rng()
    sigma = (delta.abs().amax(dim=1, keepdim=True) if per_row else absmax(delta)) / 127
    assert equal_in_parts(lambda: (quantize_delta(delta, sigma, noise_from(rng, 37, 5, 65), bits),))


@pytest.mark.parametrize("ratios", [None, (0.0, 1.0), (0.25, 1.0), (1.0, 0.3)], ids=str)
def test_votes(ratios, equal_in_parts):
    d, x, tokens = int8s(63, 37), int8s(63, 13, seed=1), torch.randint(13, (63,), generator=generator(1))
    shares = () if ratios is None else tuple(map(torch.tensor, ratios))
    start = 0 if ratios and ratios[0] == 0 else 1001

    def votes() -> tuple[torch.Tensor, torch.Tensor]:
        of_linear, of_table = (torch.full(shape, start, dtype=torch.int32) for shape in ((37, 13), (13, 37)))
        accumulate_votes(d, x, of_linear, some_rng(), *shares)
        accumulate_embedding_votes(d, tokens, of_table, *shares)
        return of_linear, of_table

    assert equal_in_parts(votes)


@pytest.mark.parametrize("dtype", FLOATS, ids=readable)
def test_loss(dtype, equal_in_parts):
    given, targets = floats(300, 65, dtype=dtype)[None], torch.randint(65, (1, 300), generator=generator(2))
    targets[0, [3, 16, 48, 256]] = -100  # torch leaves such rows out, of its sum's order too

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        logits = given.clone().requires_grad_()
        loss = cross_entropy(logits, targets)
        (0.37 * loss).backward()
        return loss.detach(), logits.grad

    assert equal_in_parts(loss_and_gradient)


def test_a_loss_in_parts_has_no_second_derivative(monkeypatch):
    monkeypatch.setattr("kernels.cross_entropy.PART", 100)
    logits = floats(37, 65).requires_grad_()
    loss = cross_entropy(logits, torch.zeros(37, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, logits, create_graph=True)
