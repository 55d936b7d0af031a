"""experiments/scale_out.py: the model says what its formulas say, and gives matrices to owners as the exchange does."""

import pytest
from torch import nn

from experiments import scale_out
from experiments.scale_out import Net, ddp_seconds, gft_seconds
from gft.distributed import Exchange
from gft.layers import IntLinear

SMALL = Net.transformer(12, 768, 50257)


def test_one_gpu_sends_nothing():
    compute = 6 * SMALL.weights * scale_out.TOKENS / scale_out.RATE
    assert ddp_seconds(SMALL, 1, 4) == pytest.approx(compute + 28 * SMALL.weights / scale_out.MEMORY)
    moves = 3840 * SMALL.weights / scale_out.RATE
    assert gft_seconds(SMALL, 1, False, False) == gft_seconds(SMALL, 1, True, True) == pytest.approx(compute + moves)


def test_bytes_that_nothing_hides_take_their_time(monkeypatch):
    monkeypatch.setattr(scale_out, "BACKWARD", 0.0)
    monkeypatch.setattr(scale_out, "NETWORK", (0.0, 1e9))
    net, ranks = Net((10**9,) * 64), 64
    local = [f(net, ranks) - g(net) for f, g in (
        (lambda n, r: ddp_seconds(n, r, 2), lambda n: ddp_seconds(n, 1, 2)),
        (lambda n, r: gft_seconds(n, r, False, True), lambda n: gft_seconds(n, 1, False, True) - 3840 * 63e9 / 4e14),
    )]  # fmt: skip
    assert local == pytest.approx([4 * 64 * 63 / 64, (3 + 1) * 64 * 63 / 64])  # bytes a weight, in seconds at 1 GB/s
    assert gft_seconds(Net((64 * 10**9,)), ranks, False, True) > 10 * gft_seconds(net, ranks, False, True)


def test_owners_are_those_of_the_exchange():
    layers = nn.ModuleList(IntLinear(8, n) for n in (40, 8, 24, 8, 16, 32, 8))
    exchange = Exchange.__new__(Exchange)
    exchange.handle, exchange.rank, exchange.size = 0, 0, 3
    exchange.forget()
    exchange.adopt(list(layers))
    assert max(exchange.loads) == Net(tuple(la.weight.numel() for la in layers)).largest_share(3)
    assert sum(exchange.loads) == sum(la.weight.numel() for la in layers)
    assert [exchange.owners.count(rank) for rank in range(3)] != [7, 0, 0]
