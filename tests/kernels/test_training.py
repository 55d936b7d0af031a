"""Whole trainings on the Triton kernels, at tiny shapes: they end with the weights that the torch backend ends with.

    python -m pytest -q tests/kernels/test_training.py
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gft.layers import Delta, IntEmbedding, IntLinear, int_layers
from gft.optimizer import FlipOptimizer
from kernels import backend, scores
from model import ModelConfig, Transformer
from run.monitor import Monitor
from tests.kernels.inputs import generator, kernel_test, opaque

VOCAB, CONTEXT, BATCH = 19, 8, 4
End = tuple[list[Tensor], list[int]]


class Small(nn.Module):
    """An embedding and two matrices, each a single program to flip."""

    def __init__(self, delta: Delta = Delta(), dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedding = IntEmbedding(VOCAB, 12, seed=3, index=0, dtype=dtype, delta=delta)
        self.hidden = IntLinear(12, 16, seed=3, index=1, delta=delta)
        self.head = IntLinear(16, VOCAB, squared_relu=True, seed=3, index=2, delta=delta)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (...) to logits (..., VOCAB)."""
        return self.head(self.hidden(self.embedding(tokens)))


def tiny_transformer() -> Transformer:
    return Transformer(ModelConfig(VOCAB, 1, 2, 16, CONTEXT), seed=3)


def trained(
    name: str, net: nn.Module, device: torch.device, steps: int, parts: int = 1, compiled: bool = False,
    watch: bool = False, **settings,
) -> End:  # fmt: skip
    """Weights and momenta, and the flips of each step, after `steps` steps of random tokens on the kernels of backend
    `name`; lr falls to 0."""
    backend.use(name)
    net = net.to(device)
    opt = FlipOptimizer(net.parameters(), lr=0.3, **{"ortho_tile": 64} | settings)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    forward = opaque(net) if compiled else net
    monitor = Monitor(net, 1, 1) if watch else None
    flips, before = [], 0
    for step in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=generator(step)).to(device)
        if monitor:
            monitor.before_backward(step)
        for part in tokens.chunk(parts):
            logits = forward(part[:, :-1]).float()
            cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").backward()
        if monitor:
            monitor.before_step()
        opt.step()
        schedule.step()
        if monitor:
            assert monitor.report()
        flips.append(int(opt.flips()) - before)
        before += flips[-1]
    kept = [t.cpu() for state in opt.state.values() for t in state.values()]
    return [layer.weight.detach().cpu().clone() for layer in int_layers(net)] + kept, flips


def same(a: End, b: End) -> bool:
    return a[1] == b[1] and all(torch.equal(s, t) for s, t in zip(a[0], b[0], strict=True))


def differing(a: End, b: End) -> int:
    return sum(int((s != t).sum()) for s, t in zip(a[0], b[0], strict=True))


@kernel_test
@pytest.mark.parametrize("rule, momentum, update", [("gain", 0.9, "step"), ("contribution", 0.0, "backward")])
def test_backends_train_to_the_same_weights(rule, momentum, update, device):
    """20 steps, every weight and momentum equal: what a user gets does not depend on the backend."""
    settings = {"rule": rule, "momentum": momentum, "update": update}
    reference = trained("torch", Small(), device, 20, **settings)
    assert same(trained("triton", Small(), device, 20, **settings), reference)
    assert sum(reference[1]) > 1000 and all(reference[1][:-1])


@kernel_test
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("rule", ["spectral", "balanced"])
def test_backends_begin_alike_under_the_float_rules(rule, update, device, monkeypatch):
    """One step, products of fp16 on both: few flips may differ by a score's last bits."""
    monkeypatch.setattr(scores, "dot_dtype", lambda device: torch.float16)
    a, b = (trained(name, Small(), device, 1, rule=rule, update=update) for name in ("torch", "triton"))
    assert a[1] == b[1] and a[1][0] > 100
    assert differing(a, b) <= (0.02 if rule == "spectral" else 0.01) * 2 * a[1][0]


@kernel_test
@pytest.mark.parametrize("make, steps, settings", [
    (tiny_transformer, 1, {}), (Small, 2, {"momentum": 0.9, "update": "backward"}),
], ids=["transformer", "backward"])  # fmt: skip
def test_the_compiled_net_flips_as_the_plain_one(make, steps, settings, device):
    plain = trained("triton", make(), device, steps, **settings)
    assert same(trained("triton", make(), device, steps, compiled=True, **settings), plain) and sum(plain[1]) > 50


@kernel_test
@pytest.mark.parametrize("rule", ["gain", "spectral"])
def test_flips_in_the_backward_pass_are_those_of_the_step(rule, device):
    settings = {"rule": rule, "momentum": 0.9}
    at_the_step = trained("triton", Small(), device, 2, **settings)
    assert same(trained("triton", Small(), device, 2, update="backward", **settings), at_the_step)


@kernel_test
def test_watching_does_not_change_what_is_seen(device):
    plain = trained("triton", Small(), device, 1)
    assert same(trained("triton", Small(), device, 1, watch=True), plain) and plain[1][0] > 100


@kernel_test
def test_micro_batches_add_up(device):
    """Votes summed over micro-batches, then flipped, equal the one batch's; momentum included."""
    delta = Delta(scale="delayed")
    whole = trained("triton", Small(delta), device, 3, momentum=0.9)
    assert same(trained("triton", Small(delta), device, 3, parts=2, momentum=0.9), whole)
    assert whole[1][0] == 0 and sum(whole[1]) > 100, "the first step only measures delta"


@kernel_test
def test_micro_batches_with_scales_of_their_own_agree_across_backends(device):
    """The buffer of votes is rescaled to the larger scale of delta, on both alike."""
    reference = trained("torch", Small(), device, 2, parts=2, rule="gain")
    assert same(trained("triton", Small(), device, 2, parts=2, rule="gain"), reference) and sum(reference[1]) > 100


@kernel_test
def test_activations_of_16_bits_train(device):
    """Equal on a GPU; the interpreter rounds to bf16 towards zero, so there most flips agree and no more is asked."""
    a, b = (trained(name, Small(dtype=torch.bfloat16), device, 1, rule="gain") for name in ("triton", "torch"))
    assert a[1][0] > 100 and differing(a, b) <= (0 if device.type == "cuda" else 0.2 * a[1][0])


@kernel_test
@pytest.mark.parametrize("update", ["step", "backward"])
def test_settings_the_kernels_do_not_have_take_the_torch_way(update, device):
    """Whole-layer selection and flip probabilities: the forward and backward kernels stay, the flips are torch's."""
    settings = {"rule": "gain", "topk_tile": 0, "flip_prob": "score", "update": update}
    reference = trained("torch", Small(), device, 2, **settings)
    assert same(trained("triton", Small(), device, 2, **settings), reference)


@kernel_test
@pytest.mark.parametrize("update", [None, "step", "backward"])
def test_a_layer_keeps_its_input_once(update, device):
    """By columns if votes will read it so, else by rows: int8 (T, in) is all that is kept of it."""
    layer = IntLinear(16, 12).to(device)
    if update:
        FlipOptimizer(layer.parameters(), update=update)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 16, device=device))
    (x_int8,) = (t for t in kept if t.dtype == torch.int8)
    assert x_int8.shape == (5, 16) and x_int8.stride() == ((1, 5) if update else (16, 1))


@kernel_test
def test_a_layer_used_twice_is_refused_where_flips_are_in_the_backward_pass(device):
    layer = IntLinear(16, 16).to(device)
    FlipOptimizer(layer.parameters(), update="backward")
    with pytest.raises(ValueError, match="used twice in one step"):
        layer(layer(torch.randn(4, 16, device=device))).sum().backward()
