"""gft/learner.py: the rivals' optimizers beside AdamW, and the grids of method "ste"."""

import pytest
import torch

from gft.baselines import fake_quantize
from run.config import Config
from gft.learner import make_learner
from model import ModelConfig, make_net

VOCAB = 11


def make(**settings):
    cfg = Config(n_layer=1, n_head=2, d_model=16, context=8, steps=10, **settings)
    net = make_net(ModelConfig.from_config(cfg, VOCAB), cfg.seed)
    return net, make_learner(net, cfg)


def backward(net, learner, seed: int) -> None:
    tokens = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flip(1).flatten(), reduction="sum")
    (loss * learner.loss_scale(tokens.numel())).backward()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_signsgd_moves_by_lr_against_the_sign_and_keeps_nothing(decay):
    net, learner = make(method="signsgd", lr=0.01, lr_end=1.0, weight_decay=decay)
    backward(net, learner, 0)
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters()]
    assert learner.step(0) == sum(p.numel() for p in net.parameters())
    for p, (weight, gradient) in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), weight * (1 - 0.01 * decay) - 0.01 * gradient.sign())
    assert learner.state_bytes() == 0


def test_sgd_has_momentum_and_a_falling_rate():
    net, learner = make(method="sgd", lr=0.5, lr_end=0.0, weight_decay=0.1)
    weights = [p.detach().clone() for p in net.parameters()]
    moments = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        backward(net, learner, step)
        lr = 0.5 * (1 - step / 10)
        for weight, moment, p in zip(weights, moments, net.parameters(), strict=True):
            moment.mul_(0.9).add_(p.grad)
            weight.mul_(1 - lr * 0.1).sub_(lr * moment)
        learner.step(step)
    for weight, p in zip(weights, net.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-4, atol=1e-5)
    assert learner.state_bytes() == 4 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("method", ["sgd", "signsgd"])
def test_what_is_saved_goes_on_exactly(method):
    (net, learner), (other, later) = make(method=method, lr=0.01), make(method=method, lr=0.01)
    for step in range(4):
        backward(net, learner, step)
        learner.step(step)
        if step == 1:
            other.load_state_dict({name: t.clone() for name, t in net.state_dict().items()})
            later.load({name: t.clone() for name, t in learner.state().items()})
    for step in (2, 3):
        backward(other, later, step)
        later.step(step)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_the_grids_of_ste_are_absmean_at_two_bits_and_uniform_above():
    w = torch.tensor([-1.0, -0.3, -0.1, 0.0, 0.2, 0.8])
    mean = w.abs().mean()
    ternary = fake_quantize(w, 2)
    torch.testing.assert_close(ternary, (w / mean).round().clamp(-1, 1) * mean)
    assert ternary.unique().numel() == 3 and fake_quantize(w, 1).abs().allclose(mean)
    for bits in (4, 8):
        levels = fake_quantize(w, bits) * (2 ** (bits - 1) - 1)  # the largest weight is 1
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert (fake_quantize(w, bits) - w).abs().max() <= 0.5 / (2 ** (bits - 1) - 1) + 1e-6
