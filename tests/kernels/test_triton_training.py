"""Whole trainings on the Triton kernels: on the GPU if there is one, else in the interpreter, at tiny shapes."""

import pytest
import torch

from run.config import load
from gft.layers import IntLinear
from gft.learner import FlipLearner
from run.monitor import Monitor
from gft.optimizer import FlipOptimizer
from kernels import backend, scores
from model import ModelConfig, Transformer
from data.tasks import text_loss

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

TINY = "--n_layer 1 --n_head 2 --d_model 32 --context 8 --batch_size 4 --k 0.3"
VOCAB = 19


def trained(
    name: str, device: torch.device, steps: int, settings: str = "", compiled: bool = False, watch: bool = False,
):  # fmt: skip
    """Weights and flips after `steps` steps on random tokens, with the kernels of backend `name`."""
    backend.use(name)
    cfg = load(f"shakespeare_char_small {TINY} --steps {steps} {settings}".split(), notes=False)
    torch.manual_seed(1)  # only for the tokens
    net = Transformer(ModelConfig.from_config(cfg, VOCAB), seed=3).to(device)
    learner, flips = FlipLearner(net, cfg), []
    layers = learner.optimizer.layers
    monitor = Monitor(learner.optimizer, {la.index: str(la.index) for la in layers}, 1, 1) if watch else None
    forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    for step in range(steps):
        tokens = torch.randint(VOCAB, (cfg.batch_size, cfg.context + 1)).to(device)
        if monitor:
            monitor.before(step)
        for part in tokens.chunk(cfg.grad_accum):
            text_loss(forward(part[:, :-1]), part[:, 1:]).backward()
        flips.append(learner.step(step))
        if monitor:
            monitor.report()
    return {name: t.cpu().clone() for name, t in net.state_dict().items() if t.dtype == torch.int8}, flips


def same(a, b) -> bool:
    return a[1] == b[1] and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize("rule", ["gain", "contribution"])
def test_backends_train_to_the_same_weights(rule, device):
    """20 steps, every weight equal: what a user of either backend gets does not depend on which it was."""
    settings = f"--rule {rule} --embedding_rule {rule} --memory {'int8' if rule == 'gain' else 'none'}"
    reference = trained("torch", device, 20, settings)
    assert same(trained("triton", device, 20, settings), reference) and sum(reference[1]) > 1000


def test_backends_begin_alike_under_the_float_rules(device, monkeypatch):
    """One step of spectral and balanced, products of fp16 on both:
    one flip in a hundred may differ by a score's last bits."""
    monkeypatch.setattr(scores, "dot_dtype", lambda device: torch.float16)
    a, b = (trained(name, device, 1, "--ortho_tile 32 --select_tile 32") for name in ("torch", "triton"))
    differing = sum(int((a[0][name] != b[0][name]).sum()) for name in a[0])
    assert abs(a[1][0] - b[1][0]) <= 2 and differing <= 0.01 * 2 * a[1][0]


@pytest.mark.parametrize("settings", ["", "--memory int8 --delta_scale delayed", "--flip_at backward"],
                         ids=["plain", "memory", "backward"])  # fmt: skip
def test_the_compiled_net_flips_as_the_plain_one(settings, device):
    settings += " --ortho_tile 64"
    plain = trained("triton", device, 3, settings)
    assert same(trained("triton", device, 3, settings, compiled=True), plain)


def test_watching_does_not_change_what_is_seen(device):
    """A watched step forms votes in memory (two kernels), others never do (one): the flips are the same."""
    assert same(trained("triton", device, 2, watch=True), trained("triton", device, 2))


def test_flips_in_the_backward_pass_are_those_of_the_step(device):
    assert same(trained("triton", device, 3, "--flip_at backward"), trained("triton", device, 3))


def test_micro_batches_add_up(device):
    """Contract 5 on the kernels, memory included:
    votes summed over micro-batches, then flipped, equal the one batch's."""
    settings = "--delta_scale delayed --memory int8"
    assert same(trained("triton", device, 4, settings + " --grad_accum 2"), trained("triton", device, 4, settings))


def test_activations_of_16_bits_train(device):
    """Equal on a GPU; the interpreter rounds to bf16 towards zero, so there most flips agree and no more is asked."""
    weights, flips = trained("triton", device, 1, "--precision bf16 --rule gain")
    reference, _ = trained("torch", device, 1, "--precision bf16 --rule gain")
    differing = sum(int((weights[name] != reference[name]).sum()) for name in weights)
    assert flips[0] > 3000 and differing <= (0 if device.type == "cuda" else 0.2 * flips[0])


def test_settings_the_kernels_do_not_have_take_the_torch_way(device):
    """Whole-layer selection and flip probabilities: the forward and backward kernels stay, the flips are torch's."""
    settings = "--rule gain --embedding_rule gain --select_tile 0 --flip_prob score"
    assert same(trained("triton", device, 2, settings), trained("torch", device, 2, settings))


def test_a_layer_used_twice_is_refused_where_flips_are_in_the_backward_pass(device):
    layer = IntLinear(16, 16).to(device)
    FlipOptimizer(layer, flip_at="backward")
    with pytest.raises((ValueError, RuntimeError), match="second backward pass|inplace"):
        layer(layer(torch.randn(4, 16, device=device))).sum().backward()
