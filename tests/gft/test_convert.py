"""gft.convert: nearly the same function after rounding, and a net that trains on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import gft
from gft.convert import ConvertedLinear


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight


def net_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Sequential(nn.Linear(40, 40, bias=False), nn.Tanh()),
                         nn.Linear(40, 5))  # fmt: skip


@pytest.mark.parametrize("bits, error", [(8, 0.03), (6, 0.06), (4, 0.2)])
def test_rounded_nets_compute_nearly_the_same(bits, error):
    net, x = net_of(), torch.randn(200, 24) * torch.logspace(-2, 2, 200)[:, None]  # rows of all sizes
    before = net(x)
    after = gft.convert(net, bits=bits)(x)
    assert ((after - before).norm(dim=1) / before.norm(dim=1)).mean() < error
    assert [type(m).__name__ for m in net] == ["ConvertedLinear", "GELU", "Sequential", "ConvertedLinear"]
    assert len(gft.int_layers(net)) == 3


def test_four_levels_are_nearer_than_three():
    x, errors = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)), []
    for levels in (3, 4):
        torch.manual_seed(1)
        layer = nn.Linear(32, 48, bias=False)
        wanted = layer(x).detach()
        found = gft.convert(nn.Sequential(layer), bits=2, levels=levels)(x)
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    assert errors[1] < errors[0] < 0.7


@pytest.mark.parametrize("reads", [
    {"bits": 1, "keep_bits": 1}, {"bits": 1}, {"bits": 2, "levels": 4}, {"bits": 1, "keep_bits": 8},
], ids=str)  # fmt: skip
def test_zeros_read_as_both_signs_where_none_can_be_read(reads):
    """A ternary matrix: what is read of its zeros must not add up."""
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, (64, 64), generator=torch.Generator().manual_seed(3)))
    ternary = layer.weight.clone()
    read = gft.convert(nn.Sequential(layer), **reads)[0].integer.read().float()
    assert read[ternary == 0].mean().abs() < 0.1 * read.abs().mean() and read.all()
    assert torch.equal(read.sign()[ternary != 0], ternary[ternary != 0])


def test_new_weights_have_products_of_the_old_size():
    net, x = net_of(), torch.randn(500, 24)
    layer = net[0]
    expected = (layer(x) - layer.bias).std()
    gft.convert(net, start="new")
    assert ((net[0](x) - net[0].bias).std() / expected - 1).abs() < 0.1
    other = gft.convert(net_of(), start="round")
    assert not torch.equal(net[0].integer.weight, other[0].integer.weight)


def test_rows_of_zeros():
    net = nn.Sequential(nn.Linear(4, 3))
    bias = net[0].bias.clone()
    x = torch.zeros(2, 4, requires_grad=True)
    y = gft.convert(net)(x)
    assert torch.equal(y, bias.expand(2, 3))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value, match", [(0.0, "all zeros"), (float("nan"), "not finite")])
def test_a_refused_weight_leaves_the_net_as_it_was(value, match):
    net = net_of()
    nn.init.constant_(net[3].weight, value)
    with pytest.raises(ValueError, match=rf"convert: 3: .*{match}.*keep=\('3',\)"):
        gft.convert(net)
    assert not gft.int_layers(net) and len(gft.int_layers(gft.convert(net, keep="3"))) == 2


def test_a_matrix_of_zeros_starts_new_as_wide_as_a_linear():
    net = nn.Sequential(nn.Linear(24, 400, bias=False))
    x = torch.randn(200, 24)
    expected = net(x).std()
    nn.init.zeros_(net[0].weight)
    assert (gft.convert(net, start="new")(x).std() / expected - 1).abs() < 0.1


def test_a_transformer_of_torch_infers_as_it_trains():
    """Without its fused inference, which reads the weights of the layers inside it."""
    torch.manual_seed(1)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    gft.convert(net)
    x, mask = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    expected = net(x, src_key_padding_mask=mask)
    with torch.no_grad():
        assert torch.allclose(net.eval()(x, src_key_padding_mask=mask), expected, atol=1e-5)


def test_delta_passes_as_through_the_float_layer():
    net, x = net_of(), torch.randn(50, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    (found,) = torch.autograd.grad(gft.convert(net, bits=8)(x).square().sum(), x)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


def test_a_converted_net_trains():
    torch.manual_seed(1)
    x = torch.randn(256, 24)
    y = (x @ torch.randn(24, 5)).argmax(1)
    net = gft.convert(net_of(), start="new")
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    flips = gft.FlipOptimizer([layer.weight for layer in gft.int_layers(net)], lr=0.2)
    adamw = torch.optim.AdamW([p for p in net.parameters() if p.is_floating_point()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(flips, 1.0, 0.0, total_iters=60)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        flips.step(), adamw.step(), schedule.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_keep_and_mistakes():
    net = gft.convert(net_of(), keep=("2", "3"))
    assert isinstance(net[0], ConvertedLinear) and type(net[2][0]) is nn.Linear and type(net[3]) is nn.Linear
    with pytest.raises(ValueError, match="'round' or 'new'"):
        gft.convert(net_of(), start="fresh")
    with pytest.raises(ValueError, match="keep names head; net has 0, 1, 2, 2.0, 2.1, 3"):
        gft.convert(net_of(), keep=("head",))
    with pytest.raises(ValueError, match="keep names head; "):
        gft.convert(net_of(), keep="head")
    with pytest.raises(ValueError, match="convert: 1: .* all 1 initial weights are equal"):
        gft.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="no nn.Linear inside it"):
        gft.convert(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="table and head share one weight"):
        gft.convert(Tied())
    assert len(gft.int_layers(gft.convert(Tied(), keep=("head",)))) == 1
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with pytest.raises(ValueError, match="convert: 1: a hook .* computes its weight; remove the hook"):
        gft.convert(nn.Sequential(nn.Linear(4, 4), pruned))
    prune.remove(pruned, "weight")
    assert len(gft.int_layers(gft.convert(nn.Sequential(pruned)))) == 1
