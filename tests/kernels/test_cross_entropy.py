"""Cross-entropy and its gradient in place: the kernel against torch's own and autograd.

    python -m pytest -q tests/kernels/test_cross_entropy.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from data.image_task import image_loss
from kernels import cross_entropy as module
from kernels.cross_entropy import cross_entropy, cross_entropy_torch
from tests.kernels.inputs import FLOATS, generator, inner_block, kernel_test, opaque, readable, transposed
from tests.kernels.update_inputs import fenced, unharmed

INF, NAN = float("inf"), float("nan")
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # bfloat16 is cut in the interpreter
SHAPES = [(1, 1), (3, 2), (5, 7), (7, 8), (300, 15), (70, 65), (9, 257), (5, 1000), (2, 4097), (3, 9001)]
# numpy's, of numbers that no mask lets out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
typed_shapes = pytest.mark.parametrize(
    "shape, dtype",
    [(shape, dtype) for dtype in FLOATS for shape in (SHAPES if dtype == torch.float32 else SHAPES[3:8])],
    ids=readable,
)


def inputs(rows, V, device, dtype=torch.float32, size=4.0):
    """Logits and targets, which include the first column and the last."""
    logits = torch.randn(rows, V, generator=generator(rows, V)) * size
    targets = torch.randint(V, (rows,), generator=generator(rows, V, 1))
    targets[0], targets[-1] = V - 1, 0
    return logits.to(device, dtype), targets.to(device)


def expected(logits, targets, grad=1.0):
    """Loss and gradient as autograd has them, float32."""
    leaf = logits.detach().float().clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="sum")
    (loss * grad).backward()
    return loss.detach(), leaf.grad


def inner(logits):
    """The logits as a net hands them over: a tensor with a backward pass of its own, and memory of its own."""
    return logits.clone().requires_grad_() * 1


def gradient_of(loss, logits):
    """What the backward pass of the loss hands on to whatever made the logits."""
    (found,) = torch.autograd.grad(loss, logits)
    return found


@kernel_test
@typed_shapes
@pytest.mark.parametrize("grad", [1.0, -0.37], ids=["1", "-0.37"])
def test_loss_and_gradient(shape, dtype, grad, device):
    given, targets = inputs(*shape, device, dtype)
    loss, delta = expected(given, targets, grad)
    logits = inner(given)
    found = cross_entropy(logits, targets)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-5)
    found_delta = gradient_of(found * grad, logits)
    assert found_delta.data_ptr() == logits.data_ptr() and found_delta.dtype == dtype and logits.dtype == dtype
    torch.testing.assert_close(found_delta.float(), delta, rtol=ROUNDING[dtype], atol=1e-6)
    largest, version = found_delta.largest
    assert largest.dtype == torch.float32 and torch.equal(largest.max(), found_delta.float().abs().max())
    assert version == found_delta._version


@kernel_test
def test_largest_of_each_program(device):
    given, targets = inputs(5, 1000, device)
    rows = module._blocks(given.shape)["ROWS"]
    logits = inner(given)
    delta = gradient_of(cross_entropy(logits, targets), logits)
    parts = torch.stack([part.abs().max() for part in delta.split(rows)])
    assert len(parts) > 1 and torch.equal(delta.largest[0], parts)


@kernel_test
@pytest.mark.parametrize(
    "row",
    [
        [1e4, -1e4, 0.0], [3e38, -3e38, 3e38], [-3e38, -3e38, -3e38], [0.0, -INF, 1.0], [-INF, 0.0, 1.0],
        [-INF, -INF, 2.0], [-INF, -INF, -INF], [INF, 0.0, 1.0], [0.0, INF, 1.0], [NAN, 0.0, 0.0], [0.0, NAN, 1.0],
        [NAN, NAN, NAN],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("V", [3, 33, 4500])
def test_extreme_rows(row, V, device):
    """Between two usual rows. In long rows the three numbers are repeated, so that a piece may have only infinities."""
    given, targets = inputs(3, V, device)
    given[1] = torch.tensor(row, device=device).repeat_interleave(V // 3)
    targets[1] = 0
    loss, delta = expected(given, targets)
    logits = inner(given)
    found = cross_entropy(logits, targets)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-5, equal_nan=True)
    found_delta = gradient_of(found, logits)
    torch.testing.assert_close(found_delta, delta, rtol=3e-6, atol=1e-6, equal_nan=True)
    largest = found_delta.largest[0]
    torch.testing.assert_close(largest.amax(), found_delta.abs().amax(), rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(largest).any() == torch.isnan(delta).any()


@kernel_test
def test_a_factor_that_is_not_finite(device):
    given, targets = inputs(3, 65, device)
    for grad in (INF, NAN):
        logits = inner(given)
        delta = gradient_of(cross_entropy(logits, targets) * grad, logits)
        assert not delta.isfinite().any() and not delta.largest[0].isfinite().any()


@kernel_test
@pytest.mark.parametrize("bad", [-100, -1, 65, 2**40])
def test_a_target_outside_makes_the_loss_nan(bad, device):
    given, targets = inputs(3, 65, device)
    targets[1] = bad
    assert cross_entropy(inner(given), targets).isnan()


@kernel_test
def test_the_logits_can_be_used_once(device):
    given, targets = inputs(3, 65, device)
    logits = inner(given)
    loss, other = cross_entropy(logits, targets), logits.square().sum()
    loss.backward(retain_graph=True)
    written = logits.detach().clone()
    for again in (loss, other, cross_entropy(logits, targets) + logits.square().sum() + loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward(retain_graph=True)
    logits = inner(given)
    loss = cross_entropy(logits, targets)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    assert torch.equal(logits, written)
    logits = inner(given)
    with pytest.raises(RuntimeError, match="use cross_entropy_torch"):
        torch.autograd.grad(cross_entropy(logits, targets), logits, create_graph=True)
    assert torch.equal(logits, given)


@kernel_test
def test_logits_changed_before_the_backward_pass(device):
    given, targets = inputs(3, 65, device)
    logits = inner(given)
    loss = cross_entropy(logits, targets)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _Watch(torch.autograd.Function):
    """A layer, and what its backward pass is handed."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        largest, version = delta.largest
        ctx.seen.append((delta, largest, version == delta._version))
        return delta, None


@kernel_test
def test_the_layer_below_is_handed_the_largest(device):
    given, targets = inputs(6, 65, device)
    leaf, seen = given.clone().requires_grad_(), []
    logits = _Watch.apply(leaf.view(2, 3, 65), seen)
    cross_entropy(logits, targets.view(2, 3)).backward()
    ((delta, largest, fresh),) = seen
    assert fresh and delta.shape == (2, 3, 65) and torch.equal(largest.max(), delta.abs().max())
    torch.testing.assert_close(leaf.grad, expected(given, targets)[1], rtol=2e-6, atol=1e-6)


@kernel_test
def test_where_the_plain_way_is_taken(device):
    """Bit for bit, and nothing is written over."""
    given, targets = inputs(5, 37, device)
    plain = F.cross_entropy(given, targets, reduction="sum")
    leaf = given.clone().requires_grad_()
    for logits in (given, leaf):  # no backward pass, and a leaf
        assert torch.equal(cross_entropy(logits, targets), plain)
    cross_entropy(leaf, targets).backward()
    assert torch.equal(leaf, given) and not hasattr(leaf.grad, "largest")
    logits = inner(given)
    compiled = opaque(lambda logits, targets: cross_entropy(logits[None], targets[None]))(logits, targets)
    compiled.backward()
    assert torch.equal(logits, given)
    torch.testing.assert_close(compiled, plain)
    shares = F.one_hot(targets, 37).float()
    torch.testing.assert_close(image_loss(inner(given), shares), plain)
    assert torch.equal(image_loss(given, targets), plain)


def test_the_torch_backend_is_as_it_was():
    given, targets = inputs(6, 65, "cpu", torch.bfloat16)
    logits = inner(given)
    found = cross_entropy(logits.view(2, 3, 65), targets.view(2, 3))
    plain = F.cross_entropy(logits.float(), targets, reduction="sum")
    assert torch.equal(found, plain) and torch.equal(found, cross_entropy_torch(logits, targets))
    assert torch.equal(gradient_of(found, logits), gradient_of(plain, logits)) and torch.equal(logits, given)


@kernel_test
@pytest.mark.parametrize("layout", [inner_block, transposed], ids=readable)
def test_other_layouts_are_copied(layout, device):
    given, targets = inputs(5, 65, device)
    leaf = given.clone().requires_grad_()
    logits = layout(leaf * 1)
    loss = cross_entropy(logits, targets)
    torch.testing.assert_close(gradient_of(loss, leaf), expected(given, targets)[1], rtol=2e-6, atol=1e-6)


@kernel_test
@pytest.mark.parametrize("V", [7, 65, 4097])
def test_nothing_outside_is_touched(V, device):
    given, targets = inputs(3, V, device)
    inside, bands = fenced(given)
    grad = torch.tensor(1.0, device=device)
    losses, norms = module._cross_entropy(inside, targets)
    assert torch.equal(inside, given)
    module._cross_entropy_backward(inside, targets, norms, grad)
    loss, delta = expected(given, targets)
    torch.testing.assert_close(losses.sum(), loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(inside, delta, rtol=2e-6, atol=1e-6)
    assert unharmed(bands)


@kernel_test
@pytest.mark.parametrize("shape", [(7, 257), (4, 3, 37), (4, 8, 65), (3, 8, 4097), (5, 1000), (64, 10)], ids=readable)
def test_splitting_a_batch_changes_no_bit(shape, device):
    """Wherever the examples of a part lie in memory."""
    given, targets = inputs(math.prod(shape[:-1]), shape[-1], device)
    given, targets = given.view(shape), targets.view(shape[:-1])
    logits = inner(given)
    whole = gradient_of(cross_entropy(logits, targets), logits)
    for part in (slice(0, 1), slice(1, None)):
        logits = inner(given[part])
        assert torch.equal(gradient_of(cross_entropy(logits, targets[part]), logits), whole[part])


@kernel_test
@pytest.mark.parametrize("n", range(1, 9))
def test_rows_that_begin_anywhere(n, device):
    """An example of 8 rows whose number of columns is odd: its rows begin at every place of a group."""
    for V in (n, n + 8, 16 * n + 1):
        given, targets = inputs(16, V, device)
        logits = inner(given.view(2, 8, V))
        loss, delta = expected(given, targets)
        found = cross_entropy(logits, targets.view(2, 8))
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradient_of(found, logits).view(16, V), delta, rtol=2e-6, atol=1e-6)


@kernel_test
def test_as_torch_operators(device):
    given, targets = inputs(5, 65, device)
    torch.library.opcheck(torch.ops.nanogft.cross_entropy, (given, targets))
    _, norms = module._cross_entropy(given, targets)
    grad = torch.tensor(1.0, device=device)
    torch.library.opcheck(torch.ops.nanogft.cross_entropy_backward, (given, targets, norms, grad))


@kernel_test
def test_refusals(device):
    given, targets = inputs(5, 65, device)
    for logits, wanted in ((given, targets[:4]), (given[0], targets[0]), (given[:0], targets[:0])):
        with pytest.raises(ValueError, match="not empty"):
            cross_entropy(logits, wanted)
    for logits, wanted in ((given.double(), targets), (given, targets.int())):
        with pytest.raises(ValueError, match="logits are float32, float16 or bfloat16, targets int64"):
            cross_entropy(logits, wanted)


@kernel_test
def test_a_view_of_a_parameter_is_left_alone(device):
    parameter = torch.randn(6, 65, device=device, requires_grad=True)
    before, targets = parameter.detach().clone(), torch.arange(3, device=device)
    cross_entropy(parameter[:3], targets).backward()
    assert torch.equal(parameter.detach(), before)
    expected = torch.autograd.grad(cross_entropy_torch(parameter[:3], targets), parameter)[0]
    torch.testing.assert_close(parameter.grad, expected)
