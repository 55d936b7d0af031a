"""Changes of the code that experiments try: each does what its name says."""

import pytest
import torch
import torch.nn.functional as F

import gft.baselines
import gft.layers
import train
from experiments import few_bits, small, variants, vocabulary
from gft.baselines import FloatLinear, fake_quantize
from gft.layers import IntEmbedding, IntLinear
from gft.optimizer import FlipOptimizer

ALL = torch.arange(-31, 32, dtype=torch.int8)


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """Whatever `use` changes is put back."""
    for where, name in ((gft.layers, "read_weight"), (gft.baselines, "fake_quantize"), (FlipOptimizer, "step"),
                        (train, "make_net")):  # fmt: skip
        monkeypatch.setattr(where, name, getattr(where, name))


@pytest.mark.parametrize("name", variants.READS)
def test_readings_rise_and_are_symmetric(name):
    read = variants.READS[name](ALL, 2, 6, 4)
    assert read.dtype == torch.int8 and (read.diff() >= 0).all()
    assert torch.equal(read[32:], -read[:31].flip(0))
    named = [int(word) for word in name.replace(",", "").split() if word.isdigit()]
    assert len(read.unique()) == (named[-1] if named else 3)


def test_two_scales_are_those_of_what_lies_there():
    read = variants.two_scales(torch.tensor([-20, -10, 0, 3, 5, 7], dtype=torch.int8), 2, 6, 4)
    assert read.tolist() == [-60, -60, 0, 0, 24, 24]


def test_a_following_threshold_is_half_of_the_mean():
    weight = torch.tensor([1, -2, 9, -12], dtype=torch.int8)  # mean 6
    assert variants.half_of_mean(weight, 2, 6, 4).tolist() == [0, 0, 1, -1]


def stepped(layer: IntLinear, steps: int = 3, lr: float = 0.5) -> list[torch.Tensor]:
    """Kept weights before and after each of some steps."""
    flips, found = FlipOptimizer([layer.weight], lr=lr, rule="gain"), []
    for group in flips.param_groups:
        group["initial_lr"] = 1.0
    for step in range(steps):
        layer(torch.randn(64, 32, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        found.append(layer.weight.clone())
        flips.step()
    return [*found, layer.weight.clone()]


def test_hysteresis_goes_further_where_another_value_is_read():
    variants.use("hysteresis 2")
    layer = IntLinear(32, 32, bits=2, index=0)
    before, after = stepped(layer)[-2:]
    turned = layer.read(before) != layer.read(after)
    assert turned.any()
    assert ((after - before)[turned].abs() == 3).all() and ((after - before)[~turned].abs() <= 1).all()


@pytest.mark.parametrize(("lr", "late"), [(0.5, False), (0.2, True)])
def test_late_in_a_run_no_more_is_kept_than_is_read(lr, late):
    variants.use("keep_bits 2 in the last fifth, k / 20")
    layer = IntLinear(32, 32, bits=2, index=0)
    weights = stepped(layer, lr=lr)
    assert (weights[-1].abs().max() == 1) == late and layer.keep_bits == (2 if late else 6)
    moved = (weights[-1] != weights[-2]).float().mean()
    assert moved < 0.02 if late else moved > 0.2


def test_the_embeddings_share():
    variants.use("embedding's k times 0.5")
    layer = IntLinear(32, 32, index=0)
    weights = stepped(layer, 1, lr=0.5)
    assert 0.2 < (weights[0] != weights[1]).float().mean() < 0.3


def test_tied_votes_are_the_gradient_of_one_matrix(monkeypatch):
    taken = []
    monkeypatch.setattr(FlipOptimizer, "step", lambda self, closure=None: taken.append(self.layers[0].votes.clone()))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = IntEmbedding(40, 32, index=0), IntLinear(32, 40, index=1)

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    monkeypatch.setattr(train, "make_net", Net)
    variants.use("tied")
    net = train.make_net()
    assert torch.equal(net.head.weight, net.embedding.weight)
    flips = FlipOptimizer(net.parameters())
    tokens, targets = torch.randint(40, (2, 512), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(net(tokens), targets).backward()
    flips.step()

    weight = net.embedding.weight.float().requires_grad_()
    hidden = F.rms_norm(weight[tokens] * net.embedding.scale, (32,))
    F.cross_entropy(hidden @ weight.t() * net.head.scale, targets).backward()
    votes = taken[0].double().flatten()
    assert F.cosine_similarity(votes, weight.grad.double().flatten(), dim=0) > 0.99
    assert votes.abs().max() == 2**30 and not net.head.votes.any()


def test_four_levels_of_latent_weights():
    """They lose less of a normal distribution than ternary ones and than levels of any other unit; gradients pass."""
    variants.use("four levels of latent weights")
    layer = FloatLinear(256, 256, 1.0, False, 2, seed=1, index=0)
    w = layer.weight.data.copy_(torch.randn(256, 256, generator=torch.Generator().manual_seed(1)))
    read = gft.baselines.fake_quantize(w, 2)
    unit = read.abs().min()
    levels = (read / unit).round()  # w + (read - w), as straight-through estimates are made, is not quite a level
    assert torch.equal(levels.unique(), torch.tensor([-3.0, -1.0, 1.0, 3.0])) and torch.allclose(levels * unit, read)
    loss = (read - w).square().mean()
    assert loss < 0.7 * (fake_quantize(w, 2) - w).square().mean()
    assert all(loss < (read * factor - w).square().mean() for factor in (0.95, 1.05))
    layer(torch.randn(4, 256)).square().sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("module", [few_bits, small, vocabulary], ids=lambda m: m.__name__)
def test_every_variant_is_one_that_there_is(module):
    cells = [cell for row in small.ROWS for cell in row.cells] if module is small else module.cells()
    used = {cell.variant for cell in cells} - {""}
    assert used and used <= {*variants.READS, *variants.OTHERS}
    assert len({cell.key() for cell in cells}) == len(cells)
