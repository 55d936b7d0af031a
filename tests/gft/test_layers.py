"""gft/layers.py against design formulas written again in float64 and int64, and what torch's users do with a layer."""

import copy

import pytest
import torch
import torch.distributed
from torch import nn

from gft import layers
from gft.layers import Delta, IntEmbedding, IntLinear, int_layers, owner_of
from gft.optimizer import FlipOptimizer
from kernels import fuse
from kernels.philox import Stream, words
from tests.kernels.update_inputs import BITS

needs_compiler = pytest.mark.skipif(fuse.compiler() is None, reason="torch.compile needs a C++ compiler")
A = 6.0
WORD = 2**23


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def optimizer(*nets: nn.Module, **settings) -> FlipOptimizer:
    """One that gives every integer layer of `nets` a buffer for its votes."""
    return FlipOptimizer([p for net in nets for p in net.parameters()], **{"rule": "gain"} | settings)


class Seen(list):
    """(D, sigma) of the backward passes, and in `grids` the X of the forward passes."""

    def __init__(self):
        super().__init__()
        self.grids = []


@pytest.fixture
def seen(monkeypatch):
    """What the layers hand to the kernels."""
    found, quantize_delta, rmsnorm_quantize = Seen(), layers.quantize_delta, layers.rmsnorm_quantize

    def quantized(delta, sigma, *rest):
        d = quantize_delta(delta, sigma, *rest)
        found.append((d, sigma.clone()))
        return d

    def on_grid(x, *rest):
        x_int8, inv_rms = rmsnorm_quantize(x, *rest)
        found.grids.append(x_int8)
        return x_int8, inv_rms

    def on_grid_twice(*given):
        x_int8, inv_rms = on_grid(*given)
        return x_int8, inv_rms, x_int8

    def quantized_twice(*given):
        d = quantized(*given)
        return d, d

    monkeypatch.setattr(layers, "quantize_delta", quantized)
    monkeypatch.setattr(layers, "quantize_delta_twice", quantized_twice)
    monkeypatch.setattr(layers, "rmsnorm_quantize", on_grid)
    monkeypatch.setattr(layers, "rmsnorm_quantize_twice", on_grid_twice)
    return found


def normalised(x: torch.Tensor, squared_relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x^ and rms in float64."""
    x = x.double()
    if squared_relu:
        x = x.clamp_min(0) ** 2
    rms = (x**2).mean(-1, keepdim=True) ** 0.5
    return x / rms, rms


def assert_formulas(layer: IntLinear, x: torch.Tensor, delta: torch.Tensor, seen: Seen) -> None:
    half = x.dtype == torch.bfloat16
    delta = delta.to(x.dtype)
    optimizer(layer)
    output = layer(x)
    output.backward(delta)
    ((d, sigma),), (grid,) = seen, seen.grids
    y, delta_x, delta = output.detach(), x.grad, delta.float()
    n_in, n_out = layer.in_features, layer.out_features
    rows, delta_rows = x.detach().float().reshape(-1, n_in), delta.reshape(-1, n_out)
    w, s = layer.weight.long(), layer.scale.double()

    x_hat, rms = normalised(rows, layer.squared_relu)
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
    if layer.squared_relu:
        back = back * 2 * rows.double().clamp_min(0)
    assert delta_x.dtype == x.dtype and delta_x.shape == x.shape
    rounding = 2e-2 if half else 1e-5  # D W is rounded to 16 bits before the norm, delta_x after it
    back = back.reshape(x.shape)
    torch.testing.assert_close(delta_x.double(), back, rtol=rounding, atol=rounding * float(back.abs().max()) / 10)

    assert layer.votes.dtype == torch.int32 and torch.equal(layer.votes.long(), d.long().T @ grid.long())


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "relu2"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_linear_is_the_formula(bits, squared_relu, seen):
    layer = IntLinear(37, 13, bits, gain=0.7, squared_relu=squared_relu, seed=bits, keep_bits=bits)
    x = (3 * randn(29, 37)).requires_grad_()
    assert_formulas(layer, x, randn(29, 13, seed=1), seen)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_linear_takes_any_leading_shape(shape, seen):
    x = randn(*shape, 23).requires_grad_()
    assert_formulas(IntLinear(23, 9), x, randn(*shape, 9, seed=1), seen)


def test_linear_takes_what_is_not_contiguous(seen):
    x = randn(5, 23, 3).transpose(1, 2).detach().requires_grad_()
    delta = randn(9, 3, 5, seed=1).permute(2, 1, 0)
    assert not x.is_contiguous() and not delta.is_contiguous()
    assert_formulas(IntLinear(23, 9), x, delta, seen)


def test_linear_keeps_to_bf16_what_came_in_bf16(seen):
    x = randn(11, 23).bfloat16().requires_grad_()
    assert_formulas(IntLinear(23, 9), x, randn(11, 9, seed=1), seen)


def test_a_residual_is_added_and_gets_all_of_delta():
    layer = IntLinear(8, 4)
    x, residual, delta = randn(2, 5, 8), randn(2, 5, 4, seed=1).requires_grad_(), randn(2, 5, 4, seed=2)
    y = layer(x, residual)
    torch.testing.assert_close(y, layer(x) + residual)
    y.backward(delta)
    assert torch.equal(residual.grad, delta)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fork_adds_the_delta_that_comes_past_the_layer(dtype, compiled):
    """A residual block has the same delta and votes as where autograd adds what comes past the layer."""
    found = []
    for fork in (True, False):
        up, down = IntLinear(8, 32, index=0), IntLinear(32, 8, index=1)
        optimizer(nn.Sequential(up, down))

        def block(x, fork=fork, up=up, down=down):
            h, x = up(x, fork=True) if fork else (up(x), x)
            return down(h, residual=x)

        x = randn(3, 5, 8).to(dtype).requires_grad_()
        y = (torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block)(x)
        y.backward(randn(3, 5, 8, seed=2).to(dtype))
        found.append((y.detach(), x.grad, up.votes, down.votes))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][2].any()


def test_act_range_is_the_clip(seen):
    """A narrow grid clips, and delta still goes straight through the clipped entries."""
    x = randn(40, 16).requires_grad_()
    layer = IntLinear(16, 8, act_range=1.0)
    y = layer(x)
    y.backward(randn(40, 8, seed=1))
    ((d, sigma),), (grid,) = seen, seen.grids
    x_hat, rms = normalised(x.detach(), False)
    clipped = x_hat.abs() > 1
    assert torch.equal(grid[clipped].double(), 127 * x_hat[clipped].sign()) and 0.2 < clipped.double().mean() < 0.5
    torch.testing.assert_close(y.double(), (grid.long() @ layer.weight.long().T) * (layer.scale.double() / 127))
    hat = (d.long() @ layer.weight.long()) * (layer.scale.double() * sigma)
    back = (hat - x_hat * (x_hat * hat).mean(-1, keepdim=True)) / rms
    torch.testing.assert_close(x.grad.double(), back, rtol=1e-4, atol=1e-6)


def test_delta_rounds_by_the_words_of_global_tokens_and_columns(seen):
    """D = floor(delta / sigma + u): u from Philox, rows numbered on over micro-batches, columns over layers."""
    net = nn.ModuleList([IntLinear(5, 6, seed=77), IntLinear(5, 4, seed=77)])
    opt = optimizer(net)
    for step in range(2):
        net[1](randn(3, 5)).backward(randn(3, 4, seed=1))
        net[1](randn(8, 5)).backward(delta := randn(8, 4, seed=2))
        rows, columns = (words(77, step, stream, 16).astype("int64") >> 9 for stream in (Stream.ROWS, Stream.COLUMNS))
        u = (torch.from_numpy(rows[3:11])[:, None] + torch.from_numpy(columns[6:10])[None, :]) % WORD / WORD
        exact = delta.double() / (delta.abs().max() / 127).double() + u
        certain = (exact - exact.round()).abs() > 1e-4
        assert certain.double().mean() > 0.9
        assert torch.equal(seen[-1][0][certain].double(), exact.floor().clamp(-127, 127)[certain])
        assert net[1].rng.tolist() == [77, step, 11]
        opt.step()
    assert net[1].rng.tolist() == [77, 2, 0]


def test_delta_rounding_is_right_on_average(seen):
    layer = IntLinear(4, 64)
    delta = randn(512, 64, seed=3)
    layer(randn(512, 4)).backward(delta)
    ((d, sigma),) = seen
    error = d.double() - delta.double() / sigma.double()
    assert error.mean().abs() < 0.01 and error.abs().max() > 0.9
    assert 0.1 < error.var() < 0.22, "1/6 for uniform fractions; 1/12 would be rounding to nearest"


def test_sign_of_delta_votes_and_delta_goes_on_in_int8(seen):
    layer = IntLinear(23, 9, delta=Delta("sign"))
    optimizer(layer)
    x = randn(11, 23).requires_grad_()
    delta = randn(11, 9, seed=1)
    delta[3] = 0
    layer(x).backward(delta)
    assert torch.equal(layer.votes.long(), delta.sign().long().T @ seen.grids[0].long())
    assert (x.grad[3] == 0).all() and x.grad.unique().numel() > 200 and seen[0][0].unique().numel() > 50


@pytest.mark.parametrize("scale", ["step", "delayed"])
def test_delta_of_few_bits_has_few_values_a_row(scale, seen):
    layer = IntLinear(8, 4, delta=Delta(scale=scale, bits=3))
    opt = optimizer(layer)
    for step in range(2):
        delta = randn(64, 4, seed=step)
        layer(randn(64, 8, seed=step)).backward(delta)
        d, sigma = seen[-1]
        if step:
            powers = [2**shift for shift in range(6)]
            assert all(any((row % t == 0).all() and row.abs().max() <= 3 * t for t in powers) for row in d)
            assert d.unique().numel() > 9 and (d - delta / sigma).abs().max() < 32
        opt.step()


@pytest.mark.parametrize("bits, levels", [(8, 127), (3, 96)])
def test_delayed_scale_is_twice_the_largest_of_sixteen_steps(bits, levels, seen):
    """The first step scales every row by itself and does not vote; a later outlier is clipped."""
    layer = IntLinear(8, 4, delta=Delta(scale="delayed", bits=bits))
    opt = optimizer(layer)
    largest = [5.0, *([1.0] * 15), 3.0, 0.5]
    for step, top in enumerate([*largest, 40.0]):
        x, delta = randn(6, 8, seed=step).requires_grad_(), randn(6, 4, seed=step + 99)
        delta *= top / delta.abs().max()
        layer(x).backward(delta)
        d, sigma = seen[-1]
        if step == 0:
            torch.testing.assert_close(sigma, delta.abs().amax(-1, keepdim=True) / levels)
            assert not layer.votes.any() and (x.grad.abs().amax(-1) > 0).all()
        else:
            wanted = 2 * max(largest[max(step - 16, 0) : step]) / levels
            torch.testing.assert_close(sigma, torch.full_like(sigma, wanted))
            clipped, t = (delta / wanted).double().clamp(-levels, levels), 1 if bits == 8 else 32
            torch.testing.assert_close(d.double(), clipped, rtol=0, atol=t)
            assert torch.equal(layer.votes.long(), d.long().T @ seen.grids[-1].long())
        opt.step()


@pytest.mark.parametrize("wrong", [{"kind": "bf16"}, {"scale": "later"}, {"bits": 9}, {"bits": 1}], ids=str)
def test_a_wrong_way_to_round_delta_is_named(wrong):
    with pytest.raises(ValueError, match=f"Delta: .*{next(iter(wrong.values()))}"):
        Delta(**wrong)


def test_first_layer_gets_votes_though_its_input_needs_no_delta():
    layer = IntLinear(8, 4)
    optimizer(layer)
    y = layer(randn(6, 8))
    assert y.requires_grad
    y.backward(randn(6, 4, seed=1))
    assert layer.votes.shape == (4, 8) and layer.votes.any()


def test_without_a_backward_pass_there_are_no_votes():
    layer, table = IntLinear(8, 4), IntEmbedding(7, 8)
    optimizer(layer, table)
    with torch.no_grad():
        assert not layer(table(torch.arange(7))).requires_grad
    layer.eval()(randn(3, 8))
    layer(randn(3, 8).requires_grad_())
    assert not layer.votes.any() and not table.votes.any() and layer.rng[2] == table.rng[2] == 0


def test_a_layer_without_an_optimizer_hands_delta_on_and_keeps_nothing():
    layer, twin = IntLinear(8, 4, index=0), IntLinear(8, 4, index=0)
    optimizer(twin)
    grads = []
    for each in (layer, twin):
        x = randn(6, 8).requires_grad_()
        each(x).backward(randn(6, 4, seed=1))
        grads.append(x.grad)
    assert torch.equal(*grads) and layer.votes is None and layer.rng[2] == 0 and twin.rng[2] == 6


@pytest.mark.parametrize("delta", [Delta(), Delta(scale="delayed")], ids=["step", "delayed"])
def test_one_int8_parameter_and_no_float_but_scales(delta):
    for layer in (IntLinear(64, 32, delta=delta), IntEmbedding(64, 32, delta=delta)):
        ((name, weight),) = layer.named_parameters()
        assert name == "weight" and weight.dtype == torch.int8 and not weight.requires_grad
        assert set(layer.state_dict()) == {"weight", "scale"} and layer.scale.dtype == torch.float32
        floats = sum(b.numel() for b in layer.buffers() if b.is_floating_point())
        assert floats == 2 + (17 if delta.scale == "delayed" else 0)


def test_backward_leaves_integer_votes_and_no_gradient():
    layer = IntLinear(64, 32)
    optimizer(layer)
    x = randn(6, 64).requires_grad_()
    layer(x).backward(randn(6, 32, seed=1))
    assert layer.weight.grad is None and layer.tap.grad is None
    assert sum(b.numel() for b in layer.buffers() if b.is_floating_point()) == 2
    assert layer.votes.dtype == torch.int32 and layer.votes.shape == layer.weight.shape


def test_scale_gives_unit_output():
    layer = IntLinear(256, 300, gain=0.5, seed=2)
    std = layer.weight.double().std(correction=0)
    assert layer.scale.item() == pytest.approx(0.5 / (16 * std.item()), rel=1e-6)
    assert layer(randn(50, 256)).std().item() == pytest.approx(0.5, rel=0.05)
    table = IntEmbedding(256, 64, gain=2.0)
    assert table.scale.item() == pytest.approx(2 / table.weight.double().std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("layer, x, wrong", [
    (IntLinear(8, 4), torch.zeros(2, 7), "7.*8"),
    (IntLinear(8, 4), torch.zeros(0, 8), "empty"),
    (IntLinear(8, 4), torch.zeros(2, 0, 8), "empty"),
    (IntEmbedding(5, 4), torch.zeros(2, 0, dtype=torch.int64), "empty"),
], ids=["width", "no rows", "no tokens", "embedding"])  # fmt: skip
def test_a_wrong_input_is_named(layer, x, wrong):
    with pytest.raises(ValueError, match=wrong):
        layer(x)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"{bits}.*1 to 8"):
        IntLinear(8, 4, bits=bits)


def test_init_std_too_small_to_tell_weights_apart():
    with pytest.raises(ValueError, match="init_std"):
        IntLinear(8, 4, bits=4, init_std=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 6, 8])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)], ids=str)
def test_embedding_is_the_formula(bits, shape, seen):
    table = IntEmbedding(5, 9, bits, gain=1.5, keep_bits=bits)
    optimizer(table)
    tokens = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    delta = randn(*shape, 9, seed=1)
    y = table(tokens)
    torch.testing.assert_close(y.double(), table.weight[tokens].double() * table.scale.double(), rtol=1e-6, atol=0)
    y.backward(delta)
    ((d, sigma),) = seen
    torch.testing.assert_close(sigma, delta.abs().max() / 127)
    assert ((d.double() - delta.reshape(-1, 9).double() / sigma.double()).abs() < 1 + 1e-5).all()
    wanted = torch.zeros(5, 9, dtype=torch.int64)
    for token, row in zip(tokens.flatten().tolist(), d.long(), strict=True):
        wanted[token] += row
    assert torch.equal(table.votes.long(), wanted) and table.rng[2] == tokens.numel()


@pytest.mark.parametrize("factors", [(1, 5), (5, 1)], ids=str)
def test_a_layer_used_twice_sums_its_votes_on_the_larger_scale(factors, seen):
    layer = IntLinear(8, 8)
    optimizer(layer)
    x = torch.relu(layer(randn(6, 8)))
    (factors[0] * layer(x)).backward(randn(6, 8, seed=1))
    layer(randn(4, 8, seed=2)).backward(factors[1] * randn(4, 8, seed=3))
    used = [seen.grids[i] for i in (1, 0, 2)]  # backward passes come in the opposite order
    assert len(seen) == 3 and len({float(sigma) for _, sigma in seen}) == 3
    top = max(sigma for _, sigma in seen).double()
    parts = zip(seen, used, strict=True)
    wanted = sum((d.long().T @ grid.long()) * (sigma.double() / top) for (d, sigma), grid in parts)
    assert (layer.votes - wanted).abs().max() <= 2 and torch.equal(layer.votes_scale.double(), top)


@pytest.mark.parametrize("factors", [(1, 5), (5, 1)], ids=str)
def test_an_embedding_used_twice_sums_its_votes_on_the_larger_scale(factors, seen):
    table = IntEmbedding(3, 8)
    optimizer(table)
    tokens = [torch.tensor([0, 2, 2]), torch.tensor([1, 2])]
    for t, factor, seed in zip(tokens, factors, (1, 2), strict=True):
        table(t).backward(factor * randn(len(t), 8, seed=seed))
    top, wanted = max(sigma for _, sigma in seen).double(), torch.zeros(3, 8, dtype=torch.float64)
    for t, (d, sigma) in zip(tokens, seen, strict=True):
        wanted.index_add_(0, t, d.double() * (sigma.double() / top))
    assert (table.votes - wanted).abs().max() <= 0.51 and torch.equal(table.votes_scale.double(), top)
    assert table.rng[2] == 5


def test_a_blank_row_does_not_drown_the_others(seen):
    """A row of zeros has no direction: its delta is 0 and does not set the scale of the layer in front."""
    front, back = IntLinear(8, 8, index=0), IntLinear(8, 8, index=1)
    x = randn(5, 8)
    x[2] = 0
    x.requires_grad_()
    back(front(x)).backward(randn(5, 8, seed=1))
    d = seen[1][0]
    assert ((d != 0).any(-1) == torch.tensor([True, True, False, True, True])).all()
    assert (x.grad[2] == 0).all() and x.grad.abs().max() < 100


# What torch's users do with modules and parameters


def net_of_two() -> nn.Sequential:
    return nn.Sequential(IntEmbedding(7, 8, index=0), IntLinear(8, 4, index=1))


def vote(net: nn.Module) -> list[torch.Tensor]:
    """The votes of one backward pass."""
    out = net(torch.arange(7))
    out.backward(randn(*out.shape, seed=1).to(out.dtype))
    return [layer.votes.clone() for layer in int_layers(net)]


def assert_learns(net: nn.Module, opt: FlipOptimizer) -> None:
    """Votes come, `opt` moves every layer by them, and they are gone after the step and after zero_grad."""
    before = [layer.weight.clone() for layer in int_layers(net)]
    assert all(votes.any() for votes in vote(net))
    opt.step()
    for layer, weight in zip(int_layers(net), before, strict=True):
        assert (layer.weight != weight).any() and not layer.votes.any() and layer.votes_scale == 0
    assert all(votes.any() for votes in vote(net))
    opt.zero_grad()
    for layer in int_layers(net):
        assert not layer.votes.any() and layer.votes_scale == 0
        assert owner_of(layer.weight) is layer


def test_the_owner_of_a_weight_is_its_layer():
    layer = IntLinear(8, 4)
    assert owner_of(layer.weight) is layer
    for other in (layer.weight.data, copy.deepcopy(layer.weight), nn.Parameter(torch.zeros(2))):
        with pytest.raises(ValueError, match="belongs to no living IntLinear or IntEmbedding"):
            owner_of(other)


def test_a_deep_copy_has_votes_of_its_own():
    net = net_of_two()
    opt = optimizer(net)
    twin = copy.deepcopy(net)
    votes = vote(twin)
    assert all(v.any() for v in votes) and not any(layer.votes.any() for layer in int_layers(net))
    assert [v.tolist() for v in vote(net)] == [v.tolist() for v in votes], "the same noise for the same weights"
    opt.step()
    assert all(layer.votes.any() for layer in int_layers(twin)), "the original's step leaves the copy alone"
    assert_learns(twin, optimizer(twin))
    assert_learns(net, opt)


def test_a_copy_of_a_net_that_learns_in_the_backward_pass_does_not_move_the_original():
    net = net_of_two()
    opt = optimizer(net, update="backward")
    before = [layer.weight.clone() for layer in int_layers(net)]
    twin = copy.deepcopy(net)
    twin(torch.arange(7)).backward(randn(7, 4, seed=1))
    for each in (net, twin):
        assert all(torch.equal(layer.weight, w) for layer, w in zip(int_layers(each), before, strict=True))
    assert opt.flips() == 0


@pytest.mark.parametrize("change", [
    lambda net: net.to("cpu"), lambda net: net.to(torch.float32), lambda net: net.cpu(), lambda net: net.train(),
    lambda net: net.float(), lambda net: net.double(), lambda net: net.requires_grad_(False),
], ids=["to cpu", "to float32", "cpu", "train", "float", "double", "no gradients"])  # fmt: skip
def test_votes_are_found_after_a_change_of_the_net(change):
    net = net_of_two()
    opt = optimizer(net)
    wanted = vote(net_of_two_voting())
    assert change(net) is net
    assert [v.tolist() for v in vote(net)] == [v.tolist() for v in wanted]
    opt.zero_grad()
    assert_learns(net, opt)


def net_of_two_voting() -> nn.Sequential:
    net = net_of_two()
    optimizer(net)
    return net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [True, False], ids=["optimizer before", "optimizer after"])
def test_half_is_for_activations(dtype, before):
    """Weights stay int8, scales float32; what goes from layer to layer, and delta, has 16 bits."""
    net = net_of_two()
    scales = [layer.scale.clone() for layer in int_layers(net)]
    opt = optimizer(net, momentum=0.9) if before else None
    (net.half if dtype == torch.float16 else net.bfloat16)()
    opt = opt or optimizer(net, momentum=0.9)
    types = []
    net[1].register_forward_hook(lambda _, given, out: types.extend((given[0].dtype, out.dtype)))
    assert_learns(net, opt)
    assert set(types) == {dtype}
    for layer, scale in zip(int_layers(net), scales, strict=True):
        assert layer.weight.dtype == torch.int8 and layer.votes.dtype == torch.int32 and layer.rng.dtype == torch.int64
        assert torch.equal(layer.scale, scale) and layer.scale.dtype == layer.votes_scale.dtype == torch.float32
    assert net.float()(torch.arange(7)).dtype == torch.float32


def test_delayed_scales_keep_their_precision_in_half():
    layer = IntLinear(8, 4, delta=Delta(scale="delayed"))
    opt = optimizer(layer)
    layer(randn(6, 8)).backward(randn(6, 4, seed=1))
    opt.step()
    before = layer.delta_history.clone()
    layer.half()
    assert layer.delta_history.dtype == torch.float32 and torch.equal(layer.delta_history, before) and before.any()


def test_a_weight_cannot_be_made_float():
    with pytest.raises(TypeError, match="IntLinear.*int8.*torch.float16"):
        IntLinear(8, 4).type(torch.float16)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_get_their_votes(assign):
    """With assign=True the parameters are new ones, so the optimizer is made after it, as for any torch optimizer."""
    net, source = net_of_two(), nn.Sequential(IntEmbedding(7, 8, index=5), IntLinear(8, 4, index=6))
    opt = optimizer(net, momentum=0.9)
    state = {name: t.clone() for name, t in source.state_dict().items()}
    net.load_state_dict(state, assign=assign)
    if assign:
        vote(net)
        with pytest.raises(RuntimeError, match="FlipOptimizer: .*make the optimizer after"):
            opt.step()
        opt = optimizer(net, momentum=0.9)
    for layer, other in zip(int_layers(net), int_layers(source), strict=True):
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.scale, other.scale)
    assert_learns(net, opt)


def test_loading_leaves_votes_for_zero_grad():
    """As `.grad` of a float parameter, which load_state_dict leaves alone."""
    net = net_of_two()
    opt = optimizer(net)
    vote(net)
    net.load_state_dict(net_of_two().state_dict())
    assert all(layer.votes.any() for layer in int_layers(net))
    opt.zero_grad()
    assert not any(layer.votes.any() for layer in int_layers(net))


@pytest.mark.parametrize("wrong, error", [
    (lambda w: w.float(), r"1\.weight: got torch.float32; IntLinear takes int8 weights in \[-7, 7\]"),
    (lambda w: w.to(torch.int32), r"1\.weight: got torch.int32; IntLinear takes int8 weights"),
    (lambda w: torch.full_like(w, 8), r"1\.weight: .*4 bits hold \[-7, 7\]"),
    (lambda w: torch.full_like(w, -128), r"1\.weight: .*4 bits hold \[-7, 7\]"),
    (lambda w: w[:3], "size mismatch for 1.weight"),
], ids=["float", "int32", "too large", "-128", "shape"])  # fmt: skip
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_do_not_fit_are_refused_by_name(wrong, error, assign):
    net = nn.Sequential(IntLinear(6, 8, 4, keep_bits=4), IntLinear(8, 4, 4, keep_bits=4))
    before = net[1].weight.clone()
    state = net.state_dict()
    state["1.weight"] = wrong(state["1.weight"])
    with pytest.raises(RuntimeError, match=error):
        net.load_state_dict(state, assign=assign)
    assert torch.equal(net[1].weight, before)


def test_the_edges_of_the_grid_can_be_loaded():
    for bits, (q, _) in BITS.items():
        layer = IntLinear(8, 4, bits, keep_bits=bits)
        for value in (-q, q):
            layer.load_state_dict({"weight": torch.full_like(layer.weight, value), "scale": layer.scale})
            assert (layer.weight == value).all()


def test_int8_weights_of_another_number_of_bits_are_refused():
    with pytest.raises(RuntimeError, match=r"weight: has values up to \d+; 2 bits hold \[-1, 1\]"):
        IntLinear(8, 4, bits=2, keep_bits=2, init_std=0.6).load_state_dict(IntLinear(8, 4, bits=6).state_dict())
    with pytest.raises(RuntimeError, match="1 bit .*-1 and 1"):
        layer = IntLinear(8, 4, bits=1, keep_bits=1)
        layer.load_state_dict({"weight": torch.zeros_like(layer.weight), "scale": layer.scale})


def test_gradients_cannot_be_asked_for():
    """torch says so itself, and nothing has changed."""
    net = net_of_two()
    opt = optimizer(net)
    with pytest.raises(RuntimeError, match="floating point"):
        net.requires_grad_(True)
    assert not any(p.requires_grad for p in net.parameters())
    assert_learns(net, opt)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_torch_optimizer_leaves_integers_alone(kind):
    net = nn.Sequential(nn.Linear(6, 8), IntLinear(8, 4))
    weight, front = net[1].weight.clone(), net[0].weight.clone()
    opt = kind(net.parameters(), lr=0.1)
    flips = optimizer(net[1])
    net(randn(5, 6)).backward(randn(5, 4, seed=1))
    opt.step()
    assert torch.equal(net[1].weight, weight) and not torch.equal(net[0].weight, front)
    opt.zero_grad()
    assert net[1].votes.any(), "votes belong to the FlipOptimizer"
    flips.step()
    assert not torch.equal(net[1].weight, weight)


def test_a_frozen_layer_does_not_move_and_has_no_votes():
    net = nn.Sequential(IntLinear(8, 8, index=0), IntLinear(8, 8, index=1), IntLinear(8, 4, index=2))
    before = [layer.weight.clone() for layer in net]
    opt = FlipOptimizer([net[0].weight, net[2].weight], rule="gain")
    net(randn(5, 8)).backward(randn(5, 4, seed=1))
    assert net[1].votes is None and net[0].votes.any() and net[2].votes.any()
    opt.step()
    assert [torch.equal(layer.weight, w) for layer, w in zip(net, before, strict=True)] == [False, True, False]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "compiled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_a_row_that_is_not_finite_does_not_hide_in_int8(value, compiled):
    """As behind nn.Linear: the row is NaN, others are not touched, and no weight learns from it."""
    net = nn.Sequential(IntLinear(20, 32, index=0), nn.ReLU(), IntLinear(32, 2, index=1))
    call = torch.compile(net, dynamic=False) if compiled else net
    opt, x = optimizer(net, lr=0.5), randn(6, 20)
    clean = call(x).detach()
    x[4, 3] = value
    y = call(x)
    assert y[4].isnan().all() and torch.equal(y[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]])
    before = [layer.weight.clone() for layer in int_layers(net)]
    y.square().sum().backward()
    opt.step()
    assert all(map(torch.equal, before, net.parameters())) and opt.stopped != 0
    call(randn(6, 20)).square().sum().backward()
    opt.step()
    assert not any(map(torch.equal, before, net.parameters())) and opt.stopped == 0


@pytest.mark.parametrize("squared_relu", [False, True], ids=["plain", "squared_relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_weight_in_front_that_is_not_finite_does_not_hide(dtype, squared_relu):
    net = nn.Sequential(nn.Linear(20, 20), IntLinear(20, 2, squared_relu=squared_relu)).to(dtype)
    nn.init.constant_(net[0].weight, float("nan"))
    assert net(randn(3, 20).to(dtype)).isnan().all()


def test_ddp_of_a_net_of_integers_is_refused(tmp_path):
    """DistributedDataParallel averages gradients; torch says that there are none."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="doesn't have any parameter that requires a gradient"):
            nn.parallel.DistributedDataParallel(net_of_two())
    finally:
        torch.distributed.destroy_process_group()


def test_clipping_and_counting_see_no_gradient():
    net = net_of_two()
    optimizer(net)
    vote(net)
    assert nn.utils.clip_grad_norm_(net.parameters(), 1.0) == 0
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_net_can_be_saved_and_loaded_by_torch(tmp_path):
    net = net_of_two()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    twin = nn.Sequential(IntEmbedding(7, 8, index=8), IntLinear(8, 4, index=9))
    twin.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    tokens = torch.arange(7)
    assert torch.equal(net(tokens), twin(tokens))
