"""gft/layers.py against design formulas written again in float64 and int64."""

import copy

import pytest
import torch
from torch import nn

from gft.layers import IntEmbedding, IntLinear, initial_weight, largest_weight
from gft.optimizer import FlipOptimizer
from kernels.philox import Stream, words

A = 6.0
Q = {1: 1, 2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}
WORD = 2**23


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spy(layer) -> list:
    """The (D, operand, sigma) of every pass, as they are handed to the layer."""
    seen, hold = [], layer.hold
    layer.hold = lambda *operands: (seen.append(operands), hold(*operands))
    return seen


def run(layer, x, delta):
    """Forward and backward with dL/dy = delta. Returns y, delta_x, and the operands D, X (or tokens) and sigma."""
    y = layer(x)
    y.backward(delta)
    ((d, operand, sigma),) = layer.held
    return y.detach(), x.grad, d, operand, sigma


def normalised(x: torch.Tensor, squared_relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x^ and rms in float64."""
    x = x.double()
    if squared_relu:
        x = x.clamp_min(0) ** 2
    rms = (x**2).mean(-1, keepdim=True) ** 0.5
    return x / rms, rms


def assert_formulas(layer: IntLinear, x: torch.Tensor, delta: torch.Tensor, squared_relu: bool) -> None:
    half = x.dtype == torch.bfloat16
    delta = delta.to(x.dtype)
    y, delta_x, d, grid, sigma = run(layer, x, delta)
    delta = delta.float()
    n_in, n_out = layer.in_features, layer.out_features
    rows, delta_rows = x.detach().float().reshape(-1, n_in), delta.reshape(-1, n_out)
    w, s = layer.weight.long(), layer.scale.double()

    x_hat, rms = normalised(rows, squared_relu)
    wanted = (x_hat * 127 / A).clamp(-127, 127)
    assert grid.dtype == torch.int8 and (grid.double() - wanted).abs().max() <= 0.5 + 1e-4
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], n_out)
    exact_y = (grid.long() @ w.T).double() * (s * A / 127)
    torch.testing.assert_close(y.reshape(-1, n_out).double(), exact_y, rtol=4e-3 if half else 1e-6, atol=0)

    torch.testing.assert_close(sigma, delta.abs().max() / 127)
    scaled = delta_rows.double() / sigma.double()
    assert d.dtype == torch.int8 and d.abs().max() == 127
    assert ((d.double() - scaled).abs() < 1 + 1e-5).all(), "rounded to a neighbour on the grid"

    hat = (d.long() @ w).double() * (s * sigma.double())
    back = (hat - x_hat * (x_hat * hat).mean(-1, keepdim=True)) / rms
    if squared_relu:
        back = back * 2 * rows.double().clamp_min(0)
    assert delta_x.dtype == x.dtype and delta_x.shape == x.shape
    rounding = 2e-2 if half else 1e-5  # D W is rounded to 16 bits before the norm, delta_x after it
    back = back.reshape(x.shape)
    torch.testing.assert_close(delta_x.double(), back, rtol=rounding, atol=rounding * float(back.abs().max()) / 10)

    votes = layer.take_votes()
    assert not votes.is_floating_point() and torch.equal(votes.long(), d.long().T @ grid.long())


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "relu2"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_linear_is_the_formula(bits, squared_relu):
    layer = IntLinear(37, 13, bits, gain=0.7, squared_relu=squared_relu, seed=bits)
    x = (3 * randn(29, 37)).requires_grad_()
    assert_formulas(layer, x, randn(29, 13, seed=1), squared_relu)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_linear_takes_any_leading_shape(shape):
    x = randn(*shape, 23).requires_grad_()
    assert_formulas(IntLinear(23, 9), x, randn(*shape, 9, seed=1), False)


def test_linear_takes_what_is_not_contiguous():
    x = randn(5, 23, 3).transpose(1, 2).detach().requires_grad_()
    delta = randn(9, 3, 5, seed=1).permute(2, 1, 0)
    assert not x.is_contiguous() and not delta.is_contiguous()
    assert_formulas(IntLinear(23, 9), x, delta, False)


def test_linear_keeps_to_bf16_what_came_in_bf16():
    x = randn(11, 23).bfloat16().requires_grad_()
    assert_formulas(IntLinear(23, 9), x, randn(11, 9, seed=1), False)


def test_act_range_is_the_clip():
    """A narrow grid clips, and delta still goes straight through the clipped entries."""
    x = randn(40, 16).requires_grad_()
    layer = IntLinear(16, 8, act_range=1.0)
    y, delta_x, d, grid, sigma = run(layer, x, randn(40, 8, seed=1))
    x_hat, rms = normalised(x.detach(), False)
    clipped = x_hat.abs() > 1
    assert torch.equal(grid[clipped].double(), 127 * x_hat[clipped].sign()) and 0.2 < clipped.double().mean() < 0.5
    torch.testing.assert_close(y.double(), (grid.long() @ layer.weight.long().T) * (layer.scale.double() / 127))
    hat = (d.long() @ layer.weight.long()) * (layer.scale.double() * sigma)
    back = (hat - x_hat * (x_hat * hat).mean(-1, keepdim=True)) / rms
    torch.testing.assert_close(delta_x.double(), back, rtol=1e-4, atol=1e-6)


def test_delta_rounds_by_the_words_of_global_tokens_and_columns():
    """D = floor(delta / sigma + u): u from Philox, rows numbered on over micro-batches, columns over layers."""
    net = nn.ModuleList([IntLinear(5, 6), IntLinear(5, 4)])
    FlipOptimizer(net, seed=77)
    held = spy(net[1])
    net[1](randn(3, 5)).backward(randn(3, 4, seed=1))
    net[1](randn(8, 5)).backward(delta := randn(8, 4, seed=2))
    rows, columns = (words(77, 0, stream, 16).astype("int64") >> 9 for stream in (Stream.ROWS, Stream.COLUMNS))
    u = (torch.from_numpy(rows[3:11])[:, None] + torch.from_numpy(columns[6:10])[None, :]) % WORD / WORD
    exact = delta.double() / (delta.abs().max() / 127).double() + u
    certain = (exact - exact.round()).abs() > 1e-4
    assert certain.double().mean() > 0.9
    assert torch.equal(held[1][0][certain].double(), exact.floor().clamp(-127, 127)[certain])


def test_delta_rounding_is_right_on_average():
    layer = IntLinear(4, 64)
    delta = randn(512, 64, seed=3)
    _, _, d, _, sigma = run(layer, randn(512, 4).requires_grad_(), delta)
    error = d.double() - delta.double() / sigma.double()
    assert error.mean().abs() < 0.01 and error.abs().max() > 0.9
    assert 0.1 < error.var() < 0.22, "1/6 for uniform fractions; 1/12 would be rounding to nearest"


def test_sign_of_delta_votes_and_delta_goes_on_in_int8():
    layer = IntLinear(23, 9)
    FlipOptimizer(layer, delta="sign")
    x = randn(11, 23).requires_grad_()
    delta = randn(11, 9, seed=1)
    delta[3] = 0
    _, delta_x, d, grid, sigma = run(layer, x, delta)
    assert torch.equal(d.float(), delta.sign()) and torch.equal(layer.take_votes().long(), d.long().T @ grid.long())
    assert (delta_x[3] == 0).all() and delta_x.unique().numel() > 200


@pytest.mark.parametrize("scale", ["step", "delayed"])
def test_delta_of_few_bits_has_few_levels(scale):
    layer = IntLinear(8, 4)
    opt = FlipOptimizer(layer, rule="gain", delta_scale=scale, delta_bits=3)
    for step in range(2):
        delta = randn(64, 4, seed=step)
        layer(randn(64, 8, seed=step)).backward(delta)
        if step:
            ((d, _, sigma),) = layer.held
            values = set(d.unique().tolist())
            assert values == set(range(-3, 4)) if scale == "step" else {-1, 0, 1} <= values <= set(range(-3, 4))
            assert (d - delta / sigma).abs().max() < 1
        opt.step()


@pytest.mark.parametrize("bits, levels", [(8, 127), (3, 3)])
def test_delayed_scale_is_twice_the_largest_of_sixteen_steps(bits, levels):
    """The first step scales every row by itself and holds no vote; a later outlier is clipped."""
    layer = IntLinear(8, 4)
    opt = FlipOptimizer(layer, rule="gain", delta_scale="delayed", delta_bits=bits)
    largest = [5.0, *([1.0] * 15), 3.0, 0.5]
    for step, top in enumerate([*largest, 40.0]):
        x, delta = randn(6, 8, seed=step).requires_grad_(), randn(6, 4, seed=step + 99)
        delta *= top / delta.abs().max()
        layer(x).backward(delta)
        if step == 0:
            assert layer.take_votes() is None and (x.grad.abs().amax(-1) > 0).all()
        else:
            ((d, _, sigma),) = layer.held
            wanted = 2 * max(largest[max(step - 16, 0) : step]) / levels
            torch.testing.assert_close(sigma, torch.full_like(sigma, wanted))
            torch.testing.assert_close(d.double(), (delta / wanted).double().clamp(-levels, levels), rtol=0, atol=1)
        opt.step()


def test_first_layer_gets_votes_though_its_input_needs_no_delta():
    layer = IntLinear(8, 4)
    y = layer(randn(6, 8))
    assert y.requires_grad
    y.backward(randn(6, 4, seed=1))
    assert layer.take_votes().shape == (4, 8)


def test_no_gradient_no_votes_held():
    layer, table = IntLinear(8, 4), IntEmbedding(7, 8)
    with torch.no_grad():
        assert not layer(table(torch.arange(7))).requires_grad
    layer.eval()(randn(3, 8))
    layer(randn(3, 8).requires_grad_())
    assert layer.take_votes() is None and table.take_votes() is None and not layer.held


def test_no_parameter_and_no_float_but_the_scale():
    for layer in (IntLinear(8, 4), IntEmbedding(8, 4)):
        assert list(layer.parameters()) == []
        assert {n: b.dtype for n, b in layer.named_buffers()} == {"weight": torch.int8, "scale": torch.float32}
        assert layer.scale.numel() == 1 and set(layer.state_dict()) == {"weight", "scale"}


def test_backward_leaves_no_float_behind():
    """Between backward and step a layer holds int8 operands and one sigma."""
    layer = IntLinear(8, 4)
    run(layer, randn(6, 8).requires_grad_(), randn(6, 4, seed=1))
    ((d, grid, sigma),) = layer.held
    assert d.dtype == grid.dtype == torch.int8 and sigma.numel() == 1 and layer.summed is None


def test_scale_gives_unit_output():
    layer = IntLinear(256, 300, gain=0.5, seed=2)
    std = layer.weight.double().std(correction=0)
    assert layer.scale.item() == pytest.approx(0.5 / (16 * std.item()), rel=1e-6)
    assert layer(randn(50, 256)).std().item() == pytest.approx(0.5, rel=0.05)
    table = IntEmbedding(256, 64, gain=2.0)
    assert table.scale.item() == pytest.approx(2 / table.weight.double().std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("layer, x, seen", [
    (IntLinear(8, 4), torch.zeros(2, 7), "7.*8"),
    (IntLinear(8, 4), torch.zeros(0, 8), "empty"),
    (IntLinear(8, 4), torch.zeros(2, 0, 8), "empty"),
], ids=["width", "no rows", "no tokens"])  # fmt: skip
def test_a_wrong_input_is_named(layer, x, seen):
    with pytest.raises(ValueError, match=seen):
        layer(x)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"{bits}.*1 to 8"):
        IntLinear(8, 4, bits=bits)


def test_spread_too_small_to_tell_weights_apart():
    with pytest.raises(ValueError, match="spread"):
        IntLinear(8, 4, bits=4, spread=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_initial_weights(bits):
    q, w = Q[bits], initial_weight((200, 300), bits, 0.33, 5, 2)
    assert largest_weight(bits) == q and w.dtype == torch.int8 and w.shape == (200, 300)
    assert w.abs().max() <= q and abs(w.double().mean()) < 0.02 * q
    if bits == 1:
        assert set(w.unique().tolist()) == {-1, 1}
    else:
        z = torch.distributions.Normal(0.0, 0.33 * q)
        share = z.cdf(torch.tensor(0.5)) - z.cdf(torch.tensor(-0.5))
        assert (w == 0).double().mean().item() == pytest.approx(share.item(), abs=0.01)
    if bits >= 4:
        assert w.double().std().item() == pytest.approx(0.33 * q, rel=0.05)


def test_initial_weights_are_a_function_of_seed_and_index():
    first = initial_weight((13, 7), 6, 0.33, 5, 2)
    assert torch.equal(first, initial_weight((13, 7), 6, 0.33, 5, 2))
    assert torch.equal(first, IntLinear(7, 13, seed=5, index=2).weight)
    for seed, index in ((6, 2), (5, 3), (5, 0)):
        assert (first != initial_weight((13, 7), 6, 0.33, seed, index)).double().mean() > 0.8


@pytest.mark.parametrize("bits", [1, 2, 6, 8])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)], ids=str)
def test_embedding_is_the_formula(bits, shape):
    table = IntEmbedding(5, 9, bits, gain=1.5)
    tokens = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    delta = randn(*shape, 9, seed=1)
    y = table(tokens)
    torch.testing.assert_close(y.double(), table.weight[tokens].double() * table.scale.double(), rtol=1e-6, atol=0)
    y.backward(delta)
    ((d, held, sigma),) = table.held
    torch.testing.assert_close(sigma, delta.abs().max() / 127)
    assert ((d.double() - delta.reshape(-1, 9).double() / sigma.double()).abs() < 1 + 1e-5).all()
    wanted = torch.zeros(5, 9, dtype=torch.int64)
    for token, row in zip(tokens.flatten().tolist(), d.long(), strict=True):
        wanted[token] += row
    assert torch.equal(table.take_votes().long(), wanted)


@pytest.mark.parametrize("factors", [(1, 5), (5, 1)], ids=str)
def test_a_layer_used_twice_sums_its_votes_on_the_larger_scale(factors):
    layer = IntLinear(8, 8)
    held = spy(layer)
    x = torch.relu(layer(randn(6, 8)))
    (factors[0] * layer(x)).backward(randn(6, 8, seed=1))
    layer(randn(4, 8, seed=2)).backward(factors[1] * randn(4, 8, seed=3))
    assert len(held) == 3 and len({float(sigma) for _, _, sigma in held}) == 3
    top = max(sigma for _, _, sigma in held).double()
    wanted = sum((d.long().T @ grid.long()) * (sigma.double() / top) for d, grid, sigma in held)
    votes = layer.take_votes()
    assert (votes - wanted).abs().max() <= 2 and torch.equal(votes, layer.take_votes())


def test_a_blank_row_does_not_drown_the_others():
    """A row of zeros has no direction: its delta is 0 and does not set the scale of the layer in front."""
    front, back = IntLinear(8, 8, index=0), IntLinear(8, 8, index=1)
    x = randn(5, 8)
    x[2] = 0
    x.requires_grad_()
    back(front(x)).backward(randn(5, 8, seed=1))
    d = front.held[0][0]
    assert ((d != 0).any(-1) == torch.tensor([True, True, False, True, True])).all()
    assert (x.grad[2] == 0).all() and x.grad.abs().max() < 100


def test_a_deep_copy_keeps_its_own_votes():
    layer = IntLinear(8, 4)
    twin = copy.deepcopy(layer)
    twin(randn(6, 8)).backward(randn(6, 4, seed=1))
    assert layer.take_votes() is None and twin.take_votes() is not None


def test_an_embedding_names_an_empty_batch():
    with pytest.raises(ValueError, match="empty"):
        IntEmbedding(5, 4)(torch.zeros(2, 0, dtype=torch.int64))
