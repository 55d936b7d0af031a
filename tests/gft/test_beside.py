"""gft/beside.py: work beside the GPU's other work, and plain calls where there is no GPU."""

import pytest
import torch

from gft import beside as module
from gft.beside import beside, wait, wait_for
from gft.layers import IntLinear
from gft.optimizer import FlipOptimizer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_it_is_a_call():
    seen = []
    beside(torch.device("cpu"), lambda *given: seen.append(given), 1, "two", in_backward=True)
    assert seen == [(1, "two")] and not any(module._under_way.values())
    wait()
    wait_for(torch.zeros(1))


@needs_gpu
def test_it_is_done_when_waited_for():
    x, y = torch.ones(2**24, device="cuda"), torch.zeros(2**24, device="cuda")
    for _ in range(5):
        beside(x.device, lambda a, b: b.add_(a), x, y)
    assert len(module._under_way[x.device]) == module.LAG
    wait_for(x)
    assert not module._under_way[x.device] and (y == 5).all()


@needs_gpu
def test_votes_are_there_after_the_backward_pass_and_equal_those_without_it(monkeypatch):
    """A layer used twice in one pass reads what its first use's votes have counted."""
    found = []
    for lag in (module.LAG, 0):
        monkeypatch.setattr(module, "LAG", lag)
        layers = [IntLinear(256, 256, seed=i).cuda() for i in range(3)]
        FlipOptimizer([layer.weight for layer in layers], rule="gain")
        x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(1)).cuda()
        for layer in (*layers, layers[0]):
            x = layer(x)
        x.sum().backward()
        found.append([layer.votes.clone() for layer in layers])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
