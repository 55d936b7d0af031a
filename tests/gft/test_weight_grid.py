"""First weights, and what is read of one that keeps more bits: the grids, and layers and optimizers on them.

    python -m pytest -q tests/gft/test_weight_grid.py
"""

import pytest
import torch
from torch import nn

from gft import FlipOptimizer, IntEmbedding, IntLinear
from gft.weight_grid import initial_weight, read_weight
from kernels.limits import kept_bits, threshold_of, weight_limit
from tests.kernels.update_inputs import BITS


def every(keep_bits: int) -> torch.Tensor:
    """All weights of so many bits."""
    q, _ = weight_limit(keep_bits)
    return torch.tensor([w for w in range(-q, q + 1) if keep_bits > 1 or w], dtype=torch.int8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_initial_weights(bits):
    q, w = BITS[bits][0], initial_weight((200, 300), bits, 0.33, 5, 2)
    assert weight_limit(bits)[0] == q and w.dtype == torch.int8 and w.shape == (200, 300)
    assert w.abs().max() <= q and abs(w.double().mean()) < 0.02 * q
    if bits == 1:
        assert set(w.unique().tolist()) == {-1, 1}
    else:
        z = torch.distributions.Normal(0.0, 0.33 * q)
        share = z.cdf(torch.tensor(0.5)) - z.cdf(torch.tensor(-0.5))
        assert (w == 0).double().mean().item() == pytest.approx(share.item(), abs=0.01)
    if bits >= 4:
        assert w.double().std().item() == pytest.approx(0.33 * q, rel=0.05)


@pytest.mark.parametrize("bits", [1, 6])
def test_initial_weights_in_parts(bits, monkeypatch):
    """They are drawn a part at a time, and are those drawn at once."""
    whole = initial_weight((13, 37), bits, 0.33, 5, 2)
    monkeypatch.setattr("gft.weight_grid.PART", 100)
    assert torch.equal(initial_weight((13, 37), bits, 0.33, 5, 2), whole)


def test_initial_weights_are_a_function_of_seed_and_index():
    first = initial_weight((13, 7), 6, 0.33, 5, 2)
    assert torch.equal(first, initial_weight((13, 7), 6, 0.33, 5, 2))
    assert torch.equal(first, IntLinear(7, 13, seed=5, index=2).weight)
    for seed, index in ((6, 2), (5, 3), (5, 0)):
        assert (first != initial_weight((13, 7), 6, 0.33, seed, index)).double().mean() > 0.8
    assert (IntLinear(7, 13).weight != IntLinear(7, 13).weight).any(), "made one after another, layers differ"


@pytest.mark.parametrize("keep_bits", range(1, 9))
@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_read(bits, keep_bits):
    if bits > keep_bits:
        with pytest.raises(ValueError, match=f"got bits {bits} and keep_bits {keep_bits}"):
            IntLinear(8, 4, bits, keep_bits=keep_bits)
        return
    kept, (q, _), (most, _) = every(keep_bits), weight_limit(bits), weight_limit(keep_bits)
    threshold = threshold_of(keep_bits, 0.33)
    read = read_weight(kept, bits, keep_bits, threshold)
    if bits == keep_bits:
        assert read is kept
    elif bits == 1:
        assert read.tolist() == [1 if w >= 0 else -1 for w in kept.tolist()]
    elif bits == 2:
        assert threshold <= 0.4 * 0.33 * most < threshold + 1
        assert read.tolist() == [(w > threshold) - (w < -threshold) for w in kept.tolist()]
    else:
        assert read.tolist() == [round(w * q / most) for w in kept.tolist()], "no number lies halfway"
    assert read.dtype == torch.int8 and sorted(set(read.tolist())) == every(bits).tolist()


@pytest.mark.parametrize("keep_bits", range(3, 9))
def test_two_bits_may_have_four_levels(keep_bits):
    kept, (most, _), threshold = every(keep_bits), weight_limit(keep_bits), threshold_of(keep_bits, 0.33, 4)
    assert threshold <= 0.33 * most < threshold + 1
    read = read_weight(kept, 2, keep_bits, threshold, 4)
    assert read.dtype == torch.int8
    assert read.tolist() == [(3 if abs(w) > threshold else 1) * (1 if w >= 0 else -1) for w in kept.tolist()]


def test_levels_that_cannot_be():
    for wrong in ({"levels": 5}, {"levels": 4, "keep_bits": 2}):
        with pytest.raises(ValueError, match="two bits are read as 3 levels"):
            IntLinear(8, 4, 2, **wrong)
    assert IntLinear(8, 4, 6, levels=4).levels == 3, "levels are of two bits"


def test_six_bits_are_kept_unless_more_are_read():
    assert [kept_bits(bits) for bits in range(1, 9)] == [6, 6, 6, 6, 6, 6, 7, 8]


@pytest.mark.parametrize("bits, levels", [(1, 3), (2, 3), (2, 4), (4, 3)])
def test_a_layer_reads_what_its_products_use(bits, levels):
    """Output, delta and scale are those of a layer that keeps what this one reads; votes move what is kept."""
    fine = IntLinear(24, 16, bits, seed=3, levels=levels)
    coarse = IntLinear(24, 16, bits + (levels == 4), keep_bits=bits + (levels == 4), seed=3)
    coarse.load_state_dict({"weight": fine.read(), "scale": fine.scale})
    read = fine.read().double()
    assert fine.scale.item() == pytest.approx(1 / (24**0.5 * read.std(correction=0).item()))
    found = []
    for layer in (fine, coarse):
        opt = FlipOptimizer(layer.parameters(), lr=0.3, rule="gain")
        x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.backward(torch.randn(40, 16, generator=torch.Generator().manual_seed(2)))
        found.append((y.detach(), x.grad, layer.votes.clone()))
        before = layer.weight.clone()
        opt.step()
        moved = (layer.weight.int() - before.int()).abs()
        assert moved.any() and moved.max() == (2 if layer.keep_bits == 1 else 1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("init_std", [0.33, 1.0, 3.0, 100.0])
def test_a_wide_start_still_has_all_three_values(init_std):
    assert set(IntLinear(64, 64, 2, init_std=init_std).read().unique().tolist()) >= {-1, 1}


def test_an_embedding_reads_its_rows():
    table = IntEmbedding(7, 5, 2)
    assert torch.equal(table(torch.arange(7)), table.read() * table.scale)


def test_moves_of_what_is_kept_add_up_to_one_of_what_is_read():
    """Two bits read of six: a weight goes on below the threshold for some steps, then is read as another number."""
    layer = IntLinear(1, 20, 2)
    first = torch.zeros(20, 1, dtype=torch.int8)
    first[:2, 0] = torch.tensor([3, -31])
    layer.load_state_dict({"weight": first, "scale": layer.scale})
    delta = torch.zeros(1, 20)
    delta[0, :2] = torch.tensor([-1.0, 1.0])
    opt, seen = FlipOptimizer(layer.parameters(), lr=1.0, rule="gain", topk_tile=0), []
    for _ in range(4):
        layer(torch.ones(1, 1)).backward(delta)
        opt.step()
        seen.append((layer.weight.flatten().tolist()[:2], layer.read().flatten().tolist()[:2]))
    assert seen == [([4, -31], [0, -1]), ([5, -31], [1, -1]), ([6, -31], [1, -1]), ([7, -31], [1, -1])]


def test_both_ways_to_update_agree():
    ends = []
    for update in ("step", "backward"):
        net = nn.Sequential(IntLinear(40, 48, 2, index=0), IntLinear(48, 8, 1, index=1))
        opt = FlipOptimizer(net.parameters(), lr=0.3, update=update, momentum=0.9)
        for step in range(3):
            net(torch.randn(16, 40, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            opt.step()
        ends.append([layer.weight.clone() for layer in net])
    assert all(map(torch.equal, *ends)) and ends[0][0].abs().max() > 1
