"""gft/baselines.py: the layers and grids of the baselines, signSGD and Muon."""

import pytest
import torch
import torch.nn.functional as F

from gft.baselines import FloatEmbedding, FloatLinear, Muon, SignSGD, fake_quantize


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "relu2"])
@pytest.mark.parametrize("bits", [None, 2])
def test_linear_is_the_formula(squared_relu, bits):
    layer = FloatLinear(24, 9, 0.7, squared_relu, bits, seed=1, index=0)
    x, residual = randn(2, 5, 24), randn(2, 5, 9, seed=1)
    h = x.clamp_min(0) ** 2 if squared_relu else x
    h = h / h.pow(2).mean(-1, keepdim=True).sqrt()
    w = layer.weight if bits is None else fake_quantize(layer.weight, bits)
    torch.testing.assert_close(layer(x), h @ w.T * 0.7)
    assert torch.equal(layer(x, residual), residual + layer(x))
    assert layer.weight.dtype == torch.float32 and layer.weight.requires_grad
    assert layer.weight.std().item() == pytest.approx(24**-0.5, rel=1e-5)


def test_beside_integer_layers_the_output_is_as_the_input():
    layer = FloatLinear(8, 4, 1.0, False, None, 1, 0)
    x = randn(5, 8).bfloat16()
    assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), layer(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(5, 8)).dtype == torch.bfloat16
    assert layer.bfloat16()(x).dtype == torch.bfloat16


def test_embedding_has_rows_of_unit_variance():
    table = FloatEmbedding(50, 64, None, seed=1, index=0)
    tokens = torch.tensor([[1, 49], [0, 1]])
    assert torch.equal(table(tokens), table.weight[tokens]) and table.weight.std().item() == pytest.approx(1, rel=1e-5)
    rounded = FloatEmbedding(50, 64, 2, seed=1, index=0)
    assert torch.equal(rounded(tokens), fake_quantize(rounded.weight, 2)[tokens])


def test_weights_are_a_function_of_seed_and_index():
    first = FloatLinear(8, 4, 1.0, False, None, 1, 0).weight
    assert torch.equal(first, FloatLinear(8, 4, 1.0, False, None, 1, 0).weight)
    assert not torch.equal(first, FloatLinear(8, 4, 1.0, False, None, 2, 0).weight)
    assert not torch.equal(first, FloatLinear(8, 4, 1.0, False, None, 1, 1).weight)


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


@pytest.mark.parametrize("bits, q", [(1, 1), (2, 1), (4, 7), (8, 127)])
def test_fake_quantize_grid_and_straight_through_gradient(bits, q):
    w = randn(9, 40, seed=1).requires_grad_()
    quantized = fake_quantize(w, bits)
    plain = w.detach()
    grid = plain.abs().mean() if bits <= 2 else plain.abs().max() / q
    level = quantized.detach() / grid
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-4)
    assert level.abs().max().round() == q and level.round().unique().numel() <= 2 * q + 1
    if bits == 1:
        assert torch.equal(level.sign(), plain.sign())
    else:
        inside = plain.abs() < grid * q
        assert ((quantized - plain).abs()[inside] <= grid * 0.5001).all()
    upstream = randn(9, 40, seed=2)
    quantized.backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_no_bits_is_no_rounding():
    w = randn(3, 3)
    assert fake_quantize(w, None) is w


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_signsgd_moves_by_lr_against_the_sign_and_keeps_nothing(decay):
    layer = FloatLinear(8, 4, 1.0, False, None, 1, 0)
    opt = SignSGD(layer.parameters(), lr=0.01, weight_decay=decay)

    before = layer.weight.detach().clone()
    opt.step()
    assert torch.equal(layer.weight, before), "without a gradient nothing moves"
    F.mse_loss(layer(randn(6, 8)), randn(6, 4, seed=1)).backward()
    opt.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.01 * decay) - 0.01 * layer.weight.grad.sign())
    assert not opt.state and opt.state_dict()["state"] == {}


def muon_run(state: str, steps: int = 3) -> tuple[Muon, torch.Tensor]:
    """Muon on one matrix of 70 x 40, more than one block of momenta, and the matrix after some steps."""
    p = torch.nn.Parameter(randn(70, 40))
    opt = Muon([p], lr=0.1, weight_decay=0.1, state=state)
    for step in range(steps):
        p.grad = randn(70, 40, seed=step + 1)
        opt.step()
    return opt, p.detach()


def test_muon_is_torchs_and_keeps_what_it_is_told():
    p = torch.nn.Parameter(randn(70, 40))
    plain = torch.optim.Muon([p], lr=0.1, weight_decay=0.1, momentum=0.95)
    for step in range(3):
        p.grad = randn(70, 40, seed=step + 1)
        plain.step()
    assert torch.equal(muon_run("fp32")[1], p.detach())
    opt, weight = muon_run("int8")
    (state,), (kept,) = opt.state.values(), plain.state.values()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "momentum_int8": (torch.int8, (70, 40)), "momentum_scale": (torch.float32, (2, 1))}  # fmt: skip
    scale = state["momentum_scale"].repeat_interleave(2048)[: 70 * 40].view(70, 40)
    # Each of three roundings is off by half a unit at most, and decays.
    assert (state["momentum_int8"] * scale - kept["momentum_buffer"]).abs().max() < 1.5 * scale.max()
    assert 0 < (weight - p.detach()).abs().max() < 0.05


def test_muon_without_state_is_the_orthogonalised_gradient_of_normalised_rows():
    opt, after = muon_run("none", steps=1)
    moved = (randn(70, 40) * (1 - 0.1 * 0.1) - after) / 0.1
    assert not any(opt.state_dict()["state"].values())
    singular = torch.linalg.svdvals(moved)
    assert 0.6 < singular.min() and singular.max() < 1.3 * (70 / 40) ** 0.5, "all directions alike"
    p = torch.nn.Parameter(randn(70, 40))
    again = Muon([p], lr=0.1, weight_decay=0.1, state="none")
    p.grad = randn(70, 40, seed=1) * torch.logspace(-3, 3, 70)[:, None]
    again.step()
    torch.testing.assert_close(p.detach(), after, rtol=1e-2, atol=1e-2)  # rows at any scale
