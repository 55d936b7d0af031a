"""run/finite.py: what is not finite is flagged without a read, and traced to the first place in a step that has it."""

import math

import pytest
import torch
from no_reads import NothingIsRead

from model import ModelConfig, make_net
from run.finite import largest, note, origin

NET = ModelConfig(11, n_layer=1, n_head=2, d_model=16, context=4, int_layers=("attention", "head"))


def one_batch():
    return [(torch.arange(8).view(2, 4), torch.arange(1, 9).view(2, 4))]


def loss_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("value, flag", [(1.0, 0), (math.inf, 1), (-math.inf, 1), (math.nan, 1)])
def test_the_flag_stays(value, flag):
    found, tensors = torch.zeros(()), [torch.ones(3), None, torch.full((2, 2), value), torch.zeros(1)]
    finite = torch.tensor(3.0)
    with NothingIsRead():
        note(found, largest(tensors))
        note(found, finite)
    assert found == flag and largest([torch.tensor([1.0, -7.0]), None]) == 7 and largest([None]) == 0


@pytest.mark.parametrize("value, word", [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("name, told", [
    ("blocks.0.up", "the float weights of blocks.0.up (mlp, float)"),
    ("embedding", "the float weights of embedding (embedding, float)"),
], ids=["mlp", "embedding"])  # fmt: skip
def test_a_float_weight(name, told, value, word):
    net = make_net(NET)
    assert origin(net, one_batch(), loss_of) == ""
    with torch.no_grad():
        net.get_submodule(name).weight[3, 2] = value
    assert origin(net, one_batch(), loss_of) == f"{told} became {word}"


def test_an_activation_too_large_for_its_square():
    net = make_net(NET)
    net.embedding.weight.data.fill_(1e25)
    told = "the activations behind blocks.0.qkv (attention, integer) became nan"
    assert origin(net, one_batch(), loss_of) == told
    assert not any(layer._forward_hooks for layer in net.modules())


def test_a_delta():
    """0 * sqrt'(0) is NaN, and the loss is finite."""
    net = make_net(NET)

    def loss(logits, targets):
        return loss_of(logits, targets) + (logits.sum() * 0).abs().sqrt()

    assert origin(net, one_batch(), loss) == "the error (delta) behind head (head, integer) became nan"
