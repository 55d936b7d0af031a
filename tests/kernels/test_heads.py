"""Heads to attention and back: the references against autograd of model.heads, the kernels against the references.

    python -m pytest -q tests/kernels/test_heads.py
"""

import pytest
import torch
from torch import Tensor

from kernels.heads import heads_backward, heads_backward_torch, heads_forward, heads_forward_torch, split_heads
from kernels.measure_delta import with_largest
from model import ModelConfig, Transformer, heads, image_rope_table, rope_table
from tests.kernels.inputs import FLOATS, floats, generator, guard, kernel_test, opaque, readable, untouched
from tests.kernels.update_inputs import fenced, torch_backend, unharmed

# (B, T, H, hd): programs that end within a token, within a text and past the last, and heads of no power of two.
SHAPES = [(1, 1, 1, 2), (2, 7, 3, 32), (1, 13, 6, 64), (3, 21, 2, 20), (2, 3, 1, 132)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=readable)
types = pytest.mark.parametrize("dtype", FLOATS, ids=readable)


def inputs(shape: tuple[int, ...], device, dtype=torch.float32) -> tuple[Tensor, Tensor, int]:
    """qkv of tokens of very different sizes, one of them zeros, the table, and the number of heads."""
    batch, tokens, n_head, head_dim = shape
    qkv = floats(batch * tokens, 3 * n_head * head_dim, device, dtype).view(batch, tokens, -1)
    return qkv, rope_table(3, tokens, head_dim, device), n_head


def deltas(shape: tuple[int, ...], device, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=generator(*shape, i)).to(device, dtype) for i in range(3)]


def close(found: Tensor, expected: Tensor, size: Tensor | float = 1.0) -> bool:
    """Within the roundings of the type, of numbers as large as `size`."""
    bound = 4 * torch.finfo(found.dtype).eps * (size + expected.double().abs())
    return found.dtype == expected.dtype and bool(((found.double() - expected.double()).abs() <= bound).all())


def all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(close(*pair) for pair in zip(found, expected, strict=True))


def delta_size(shape, inv_rms: Tensor, given: list[Tensor]) -> Tensor:
    """How large the terms are that add up to each element of delta_qkv: float64 (B, T, 3 d)."""
    rest = torch.ones_like(inv_rms[:, :, :1])
    size = torch.stack(given, dim=2).abs().amax(dim=-1) * torch.cat((inv_rms, rest), dim=2)  # (B, T, 3, H)
    return size.double().repeat_interleave(shape[-1], dim=-1).flatten(2)


# The torch references


@shapes
@types
def test_reference_is_the_models_heads(shape, dtype):
    qkv, table, n_head = inputs(shape, "cpu", dtype)
    *found, inv_rms = heads_forward_torch(qkv, table, n_head)
    assert all_close(tuple(found), heads(qkv, table, n_head)) and all(x.is_contiguous() for x in found)
    assert inv_rms.shape == (*shape[:2], 2, shape[2]) and inv_rms.dtype == torch.float32


@shapes
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_reference_against_autograd(shape, image):
    qkv, table, n_head = inputs(shape, "cpu")
    if image and shape[-1] % 4 == 0:
        table = image_rope_table(1, shape[1], shape[-1], torch.device("cpu"))
    given, wide = deltas(shape, "cpu"), qkv.double().requires_grad_()
    split = wide.unflatten(2, (3, n_head, -1))
    eps = torch.finfo(torch.float32).eps
    x_hat = split[:, :, :2] / (split[:, :, :2].square().mean(dim=-1, keepdim=True) + eps).sqrt()
    straight, across = table.double()[:, :, None, None]
    y = x_hat * straight + x_hat.roll(shape[-1] // 2, dims=-1) * across
    outputs = (y[:, :, 0], y[:, :, 1], split[:, :, 2])
    (expected,) = torch.autograd.grad(outputs, wide, [delta.double() for delta in given])
    q, k, _, inv_rms = heads_forward_torch(qkv, table, n_head)
    found, largest = heads_backward_torch(*given, q, k, inv_rms, table)
    assert close(found, expected.float(), 4 * delta_size(shape, inv_rms, given))
    assert torch.equal(largest, found.abs().max()[None])


# The kernels


@kernel_test
@shapes
@types
def test_kernels(shape, dtype, device):
    qkv, table, n_head = inputs(shape, device, dtype)
    found, expected = heads_forward(qkv, table, n_head), heads_forward_torch(qkv, table, n_head)
    assert all_close(found, expected) and all(x.is_contiguous() for x in found)
    assert torch.equal(found[2], expected[2])
    given, kept = deltas(shape, device, dtype), (expected[0], expected[1], expected[3], table)
    delta, largest = heads_backward(*given, *kept)
    assert close(delta, heads_backward_torch(*given, *kept)[0], delta_size(shape, expected[3], given))
    assert delta.shape == qkv.shape and delta.is_contiguous()
    assert largest.dtype == torch.float32 and torch.equal(largest.max(), delta.abs().max().float())


def as_attention_has_them(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def expanded(x: Tensor) -> Tensor:
    """One number for all, as the backward pass of a sum."""
    return x.flatten()[0].expand(x.shape)


def packed(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


@kernel_test
@pytest.mark.parametrize("layout", [as_attention_has_them, expanded, packed], ids=readable)
def test_deltas_of_any_strides(layout, device):
    shape = (2, 7, 3, 32)
    qkv, table, n_head = inputs(shape, device)
    q, k, _, inv_rms = heads_forward_torch(qkv, table, n_head)
    given = [layout(delta) for delta in deltas(shape, device)]
    for delta, expected in zip(
        heads_backward(*given, q, k, inv_rms, table),
        heads_backward(*(delta.contiguous() for delta in given), q, k, inv_rms, table),
        strict=True,
    ):
        assert torch.equal(delta, expected)
    columns_first = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(heads_forward(columns_first, table, n_head)[0], heads_forward(qkv, table, n_head)[0])


@kernel_test
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_is_seen(part, bad, device):
    shape = (2, 21, 6, 64)
    qkv, table, n_head = inputs(shape, device)
    q, k, _, inv_rms = heads_forward_torch(qkv, table, n_head)
    given = deltas(shape, device)
    given[part][1, 20, 5, 63] = bad
    delta, largest = heads_backward(*given, q, k, inv_rms, table)
    assert not largest[-1].isfinite() and largest[:-1].isfinite().all()
    assert torch.equal(largest[-1].isnan(), delta.isnan().any())


@kernel_test
def test_an_infinite_token_is_nan_as_in_torch(device):
    qkv, table, n_head = inputs((1, 3, 2, 32), device)
    qkv[0, 2, 5] = float("inf")
    found, expected = heads_forward(qkv, table, n_head), heads_forward_torch(qkv, table, n_head)
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(found, expected, strict=True))


@kernel_test
def test_nothing_outside_is_touched(device, monkeypatch):
    shape = (2, 7, 3, 20)
    qkv, table, n_head = inputs(shape, device)
    given = deltas(shape, device)
    *expected, inv_rms = heads_forward(qkv, table, n_head)
    delta, _ = heads_backward(*given, *expected[:2], inv_rms, table)
    fences = [fenced(x) for x in (qkv, table, *given, *expected[:2], inv_rms)]
    qkv, table, *rest = (inside for inside, _ in fences)
    bands = guard(monkeypatch)
    assert torch.equal(heads_forward(qkv, table, n_head)[1], expected[1])
    assert torch.equal(heads_backward(*rest, table)[0], delta)
    assert untouched(bands) and unharmed(*(band for _, band in fences))


# Through autograd


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable)
def test_gradients_are_those_of_the_models_heads(dtype, device):
    shape = (2, 13, 3, 32)
    qkv, table, n_head = inputs(shape, device, dtype)
    given, seen = deltas(shape, device, dtype), []
    qkv.requires_grad_()
    (expected,) = torch.autograd.grad(heads(qkv, table, n_head), qkv, given)
    qkv.register_hook(lambda delta: seen.append((delta.largest, delta._version)))
    found = split_heads(qkv, table, n_head)
    assert all_close(found, heads(qkv, table, n_head))
    torch.autograd.backward(found, given)
    inv_rms = heads_forward_torch(qkv.detach(), table, n_head)[3]
    assert close(qkv.grad, expected, delta_size(shape, inv_rms, given))
    (largest, version), now = seen[0]
    assert torch.equal(largest.max(), qkv.grad.abs().max().float()) and version == now


@kernel_test
def test_a_layer_gets_the_largest_delta_with_its_delta(device):
    """As it is when the layer's backward pass begins; the note is out of date once the delta is written to."""
    qkv, table, n_head = inputs((1, 5, 2, 16), device)
    seen = []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0, x.view_as(x)

        @staticmethod
        def backward(ctx, delta, beside):
            seen.append((delta.largest[0], delta.largest[1] == delta._version, delta.abs().max()))
            return delta + beside

    def loss(qkv):
        y, x = Layer.apply(qkv)
        return sum(part.square().sum() for part in split_heads(y, table, n_head)) + x.sum()

    loss(qkv.requires_grad_()).backward()
    largest, fresh, expected = seen[0]
    assert fresh and torch.equal(largest.max(), expected)
    delta = with_largest(torch.ones(3), torch.ones(1))
    delta.mul_(2)
    assert delta.largest[1] != delta._version


@kernel_test
def test_a_net_with_them_learns_as_one_without(device):
    """Gradients of a net in floats, whole and compiled; and it can be sampled from, token by token."""
    net = Transformer(ModelConfig(19, 2, 2, 16, 8, method="adamw"), seed=3).to(device)
    tokens = torch.randint(19, (2, 8), generator=generator(1)).to(device)

    def gradients(call) -> list[Tensor]:
        return torch.autograd.grad(call(tokens).square().mean(), list(net.parameters()))

    with torch_backend():
        expected = gradients(net)
    for found in (gradients(net), gradients(opaque(net))):
        for gradient, other in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    cache = net.new_cache()
    with torch.no_grad():
        parts = torch.cat([net(part, cache) for part in tokens.split((5, 1, 2), dim=1)], dim=1)
        torch.testing.assert_close(parts, net(tokens), rtol=1e-4, atol=1e-5)


@kernel_test
def test_as_torch_operators(device):
    shape = (2, 7, 3, 32)
    qkv, table, n_head = inputs(shape, device)
    torch.library.opcheck(torch.ops.nanogft.heads_forward, (qkv, table, n_head))
    q, k, _, inv_rms = heads_forward_torch(qkv, table, n_head)
    torch.library.opcheck(torch.ops.nanogft.heads_backward, (*deltas(shape, device), q, k, inv_rms, table))


@kernel_test
def test_twice_is_the_same(device):
    shape = (2, 13, 3, 32)
    given = inputs(shape, device, torch.float16)
    first, second = heads_forward(*given), heads_forward(*given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    kept = (*first[:2], first[3], given[1])
    delta = deltas(shape, device, torch.float16)
    assert torch.equal(heads_backward(*delta, *kept)[0], heads_backward(*delta, *kept)[0])


@kernel_test
def test_refusals(device):
    qkv, table, n_head = inputs((2, 7, 3, 32), device)
    for bad in (qkv[0], qkv[:0], qkv[..., :-1], qkv[..., :9]):
        with pytest.raises(ValueError, match="hd even, not empty"):
            heads_forward(bad, table, n_head)
    with pytest.raises(ValueError, match="it takes torch.float32"):
        heads_forward(qkv.double(), table, n_head)
    for bad in (table[:, :6], table.half()):
        with pytest.raises(ValueError, match=r"it is torch.float32 \(2, T, hd\)"):
            heads_forward(qkv, bad, n_head)
    q, k, v, inv_rms = heads_forward(qkv, table, n_head)
    for bad in (v[:1], v.half()):
        with pytest.raises(ValueError, match="must be as q"):
            heads_backward(q, k, bad, q, k, inv_rms, table)
