"""run.optimizers: every method as torch optimizers and their schedules, saved and taken up exactly."""

import pytest
import torch
from torch import nn

from gft.baselines import Muon, SignSGD
from gft.layers import int_layers
from gft.optimizer import FlipOptimizer
from kernels.limits import MAX_REDUCTION
from model import ModelConfig, make_net
from run import checkpoint
from run.config import Config
from run.optimizers import Optimizers, make_optimizers, state_bytes
from run.schedule import scheduled, step_size_at

VOCAB = 11
SETTINGS = {
    "gft": {}, "momentum": {"momentum": 0.9, "delta_scale": "delayed"}, "backward": {"update": "backward"},
    "hybrid": {"int_layers": "attention,mlp"}, "adamw": {"method": "adamw"}, "muon": {"method": "muon"},
    "sgd": {"method": "sgd", "lr": 0.02}, "signsgd": {"method": "signsgd", "lr": 0.01},
    "ste": {"method": "ste", "bits": 2}, "ste_muon": {"method": "ste", "bits": 2, "ste_optimizer": "muon"},
    "muon_int8": {"method": "muon", "muon_state": "int8"}, "swan": {"method": "muon", "muon_state": "none"},
}  # fmt: skip


def make(tokens: int = 32, **settings):
    cfg = Config(n_layer=1, n_head=2, d_model=16, context=8, **{"steps": 10} | settings)
    net = make_net(ModelConfig.from_config(cfg, VOCAB), cfg.seed)
    return net, make_optimizers(net, cfg, tokens)


def backward(net: nn.Module, seed: int, scale: float = 1 / 32) -> None:
    tokens = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flip(1).flatten(), reduction="sum")
    (loss * scale).backward()


def steps(net: nn.Module, optimizers: Optimizers, first: int, last: int) -> None:
    for step in range(first, last):
        backward(net, step)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
        net.zero_grad()


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as a checkpoint has it."""
    return checkpoint.flatten(optimizer.state_dict()["state"])


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("settings, kinds", [
    ({}, [FlipOptimizer]),
    ({"int_layers": "mlp"}, [FlipOptimizer, torch.optim.AdamW]),
    ({"int_layers": "embedding,head"}, [FlipOptimizer, torch.optim.AdamW]),
    ({"method": "adamw"}, [torch.optim.AdamW]),
    ({"method": "ste"}, [torch.optim.AdamW]),
    ({"method": "muon"}, [torch.optim.AdamW, Muon]),
    ({"method": "ste", "ste_optimizer": "muon"}, [torch.optim.AdamW, Muon]),
    ({"method": "sgd"}, [torch.optim.SGD]),
    ({"method": "signsgd"}, [SignSGD]),
], ids=str)  # fmt: skip
def test_every_parameter_has_one_optimizer(settings, kinds):
    net, optimizers = make(**settings)
    assert [type(optimizer) for optimizer, _ in optimizers] == kinds
    given = [p for optimizer, _ in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len(list(net.parameters())) and {id(p) for p in given} == {id(p) for p in net.parameters()}
    for optimizer, _ in optimizers:
        floating = {p.is_floating_point() for group in optimizer.param_groups for p in group["params"]}
        assert floating == {not isinstance(optimizer, FlipOptimizer)}
    if Muon in kinds:
        blocks = {id(p) for name, p in net.named_parameters() if name.startswith("blocks.")}
        assert {id(p) for p in optimizers[1][0].param_groups[0]["params"]} == blocks


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_method_learns(settings):
    """The loss of one batch falls. A step of no gradient and no votes is not counted on."""
    net, optimizers = make(steps=40, k=0.3, **settings)
    tokens = torch.arange(VOCAB).repeat(3)[:32].view(4, 8)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        (loss * (1 if settings.get("method") else 32)).backward()
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
        net.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_saved_goes_on_exactly(settings):
    (net, optimizers), (other, later) = make(**settings), make(**settings)
    steps(net, optimizers, 0, 2)
    other.load_state_dict({name: t.clone() for name, t in net.state_dict().items()})
    for (optimizer, _), (late, schedule) in zip(optimizers, later, strict=True):
        saved = {name: t.clone() for name, t in tensors(optimizer).items()}
        late.load_state_dict({"state": checkpoint.unflatten(saved), "param_groups": late.state_dict()["param_groups"]})
        schedule.go_to(2)
        assert tensors(late).keys() == saved.keys()
    steps(net, optimizers, 2, 5)
    steps(other, later, 2, 5)
    assert all(map(torch.equal, weights(net), weights(other)))
    for (a, _), (b, _) in zip(optimizers, later, strict=True):
        saved, resumed = tensors(a), tensors(b)
        assert all(torch.equal(t, resumed[name]) for name, t in saved.items())
        assert [group["lr"] for group in a.param_groups] == [group["lr"] for group in b.param_groups]


@pytest.mark.parametrize("name, settings", SETTINGS.items(), ids=SETTINGS)
def test_bytes_of_state_and_scales(name, settings):
    net, optimizers = make(**settings)
    steps(net, optimizers, 0, 2)
    state, scales = state_bytes([optimizer for optimizer, _ in optimizers])
    n, floats = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.parameters() if p.requires_grad)
    layers, others = len(int_layers(net)), 2 * VOCAB * 16  # embedding and head, which Muon leaves to AdamW
    wanted = {
        "gft": (0, 0), "backward": (0, 0), "hybrid": (8 * floats, 0), "adamw": (8 * n, 0), "ste": (8 * n, 0),
        "momentum": (n, layers * 4 * (1 + 17)), "muon": (4 * n + 4 * others, 0), "sgd": (4 * n, 0),
        "signsgd": (0, 0), "ste_muon": (4 * n + 4 * others, 0), "swan": (8 * others, 0),
        "muon_int8": (n + 7 * others, 4 * 4),
    }[name]  # fmt: skip
    assert state == pytest.approx(wanted[0], abs=64) and scales == wanted[1], "64: AdamW's numbers of steps"
    if name in ("gft", "momentum", "backward", "signsgd"):
        assert state == wanted[0]


def test_embeddings_have_a_rule_of_their_own():
    net, ((flips, _),) = make(rule="gain", embedding_rule="balanced", momentum=0.5, k=0.3)
    assert [group["rule"] for group in flips.param_groups] == ["balanced", "gain"]
    assert flips.param_groups[0]["params"] == [net.embedding.weight]
    assert {(group["momentum"], group["lr"]) for group in flips.param_groups} == {(0.5, 0.3)}


@pytest.mark.parametrize("tokens, each", [(MAX_REDUCTION, 4), (MAX_REDUCTION + 1, 8)])
def test_votes_are_as_wide_as_a_step_has_tokens(tokens, each):
    net, ((flips, _),) = make(tokens)
    assert flips.votes_bytes() == each * sum(p.numel() for p in net.parameters())
    assert make(tokens, update="backward")[1][0][0].votes_bytes() == 0


def test_k_and_step_size_follow_their_schedule():
    _, ((flips, schedule),) = make(k=0.4, k_end=0.1, k_schedule="quadratic", k_warmup=2, step_size=5, bits=8)
    for step in range(11):
        assert flips.param_groups[1]["lr"] == pytest.approx(scheduled(0.4, 0.1, "quadratic", step, 10, 2))
        assert flips.param_groups[1]["step_size"] == step_size_at(5, step, 10)
        flips.step()
        schedule.step()


def test_sgd_has_momentum_decoupled_decay_and_a_falling_rate():
    net, optimizers = make(method="sgd", lr=0.5, lr_end=0.0, weight_decay=0.1)
    wanted = weights(net)
    moments = [torch.zeros_like(w) for w in wanted]
    for step in range(3):
        backward(net, step)
        lr = 0.5 * (1 - step / 10)
        for weight, moment, p in zip(wanted, moments, net.parameters(), strict=True):
            moment.mul_(0.9).add_(p.grad)
            weight.mul_(1 - lr * 0.1).sub_(lr * moment)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
        net.zero_grad()
    for weight, p in zip(wanted, net.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, key, rate", [
    ("adamw", "lr", 8e-3), ("ste", "lr", 8e-3), ("signsgd", "lr", 8e-3), ("muon", "muon_lr", 1.6e-2),
])  # fmt: skip
def test_rates_warm_up_and_fall_to_their_share(method, key, rate):
    _, optimizers = make(method=method, warmup=3, lr_end=0.2)
    optimizer, schedule = optimizers[-1]
    for step in range(11):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduled(rate, 0.2 * rate, "linear", step, 10, 3))
        optimizer.step()
        schedule.step()


def test_adamw_has_the_betas_and_the_decay_of_the_config():
    _, ((adamw, _),) = make(method="adamw", beta2=0.97, weight_decay=0.3)
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["weight_decay"]) == ((0.9, 0.97), 0.3)


def test_a_hybrid_net_learns_with_both():
    net, optimizers = make(int_layers="mlp", k=0.3)
    before = weights(net)
    steps(net, optimizers, 0, 1)
    assert not any(map(torch.equal, before, weights(net)))
    assert {p.dtype for p in net.parameters()} == {torch.int8, torch.float32}
