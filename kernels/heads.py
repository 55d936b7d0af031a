"""Queries, keys and values of each head, from the layer that makes them to attention and back.

    x^ = x / sqrt(mean(x^2) + eps)         y = R x^           for queries and keys; values are copied
    g = delta_y - y * mean(y * delta_y)    delta_x = R^T g / sqrt(mean(x^2) + eps)

Means are over one head of one token. R, which depends on the token's position, rotates the pairs (i, i + hd / 2); it
changes no product of two vectors, so the backward pass takes y where the formula of a norm has x^. Attention keeps y
anyhow: with values copied too, the layer's output need not be kept.

Arithmetic is in fp32, and each result is rounded once. Memory, for qkv (T, 3 d) of b bytes an element and H heads:

                read                             written                          operations an element
    forward     3 b T d, and half the table      3 b T d + 8 T H                  6
    backward    5 b T d + 8 T H, and as much     3 b T d, and 4 a program         10

A program has the same few heads of queries, keys and values, and reads their part of the table once for both.
"""

import torch
from torch import Tensor

from kernels.backend import LaunchConfig, jit, on_triton, operator, tl, triton, wrap_triton
from kernels.measure_delta import absmax_torch, with_largest
from kernels.rmsnorm_quantize import FLOATS

EPSILON = torch.finfo(torch.float32).eps  # what torch's rms_norm adds to the mean, for 16-bit numbers too


# The torch references


def _turned(x: Tensor, table: Tensor, back: bool = False) -> Tensor:
    """The pairs (i, i + hd / 2) of x float32 (B, T, n, H, hd) rotated as `table` says, or back."""
    straight, across = table[:, :, None, None]  # (T, 1, 1, hd) each
    return x * straight + x.roll(x.shape[-1] // 2, dims=-1) * (-across if back else across)


def heads_forward_torch(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`heads_forward` in torch."""
    split = qkv.unflatten(2, (3, n_head, -1))  # (B, T, 3, H, hd)
    wide = split[:, :, :2].to(torch.float32)
    inv_rms = torch.rsqrt(wide.square().mean(dim=-1) + EPSILON)
    q, k = _turned(wide * inv_rms[..., None], table).to(qkv.dtype).unbind(2)
    return q.contiguous(), k.contiguous(), split[:, :, 2].contiguous(), inv_rms


def heads_backward_torch(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, inv_rms: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """`heads_backward` in torch."""
    y, delta = (torch.stack(pair, dim=2).to(torch.float32) for pair in ((q, k), (dq, dk)))  # (B, T, 2, H, hd)
    across = delta - y * (y * delta).mean(dim=-1, keepdim=True)
    turned = _turned(across, table, back=True) * inv_rms[..., None]
    dqkv = torch.cat((turned.to(q.dtype), dv[:, :, None]), dim=2).flatten(2)
    return dqkv, absmax_torch(dqkv)[None]


# The kernels


@jit
def _block(
    table, rows, tokens, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program's ROWS of the T * H heads: their place in q, in qkv and in inv_rms, two masks, and how they turn."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]  # of the first half; in the second, sin has the other sign
    token = row // HEADS
    head = row - token * HEADS
    inside = row < rows
    mask = inside & (column < HALF)
    angle = table + token % tokens * (2 * HALF) + column
    cos = tl.load(angle, mask=mask, other=0.0)
    sin = tl.load(angle + tl.cast(tokens, tl.int64) * (2 * HALF), mask=mask, other=0.0)
    in_qkv = (token * (3 * HEADS) + head) * (2 * HALF) + column
    return row * (2 * HALF) + column, in_qkv, token * (2 * HEADS) + head, inside, mask, cos, sin


@jit
def _load(x, mask, HALF: tl.constexpr):
    """The two halves of heads, float32."""
    low, high = tl.load(x, mask=mask, other=0.0), tl.load(x + HALF, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@jit
def _store(out, low, high, mask, HALF: tl.constexpr):
    """Stores two halves and returns the larger bits of what is stored, without the sign: as integers those order as the
    numbers do, and those of a NaN come after all of them."""
    low, high = low.to(out.dtype.element_ty), high.to(out.dtype.element_ty)
    tl.store(out, low, mask=mask)
    tl.store(out + HALF, high, mask=mask)
    low, high = low.to(tl.float32).to(tl.int32, bitcast=True), high.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum(low & 0x7FFFFFFF, high & 0x7FFFFFFF)


@jit
def _forward(x, y, inv_rms, inside, mask, cos, sin, HALF: tl.constexpr, EPSILON: tl.constexpr):
    """Heads at x, normalised and rotated, to y; 1 / rms to inv_rms."""
    low, high = _load(x, mask, HALF)
    inverse = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * HALF) + EPSILON)[:, None]
    tl.store(inv_rms, inverse, mask=inside)
    low, high = low * inverse, high * inverse
    _store(y, low * cos + high * sin, high * cos - low * sin, mask, HALF)


@jit
def _backward(delta, y, inv_rms, out, inside, mask, cos, sin, HALF: tl.constexpr):
    """The delta of heads y, back through the rotation and the norm, to out; `_store`'s bits."""
    low, high = _load(delta, mask, HALF)
    y_low, y_high = _load(y, mask, HALF)
    inverse = tl.load(inv_rms, mask=inside, other=0.0)
    mean = (tl.sum(y_low * low + y_high * high, axis=1) / (2 * HALF))[:, None]
    low, high = low - y_low * mean, high - y_high * mean
    return _store(out, (low * cos - high * sin) * inverse, (high * cos + low * sin) * inverse, mask, HALF)


@jit
def _heads_forward_kernel(
    qkv, table, q, k, v, inv_rms, rows, tokens, EPSILON: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of queries, of keys and of values."""
    place, in_qkv, kept, inside, mask, cos, sin = _block(table, rows, tokens, HEADS, HALF, ROWS, COLUMNS)
    d: tl.constexpr = HEADS * 2 * HALF
    _forward(qkv + in_qkv, q + place, inv_rms + kept, inside, mask, cos, sin, HALF, EPSILON)
    _forward(qkv + in_qkv + d, k + place, inv_rms + kept + HEADS, inside, mask, cos, sin, HALF, EPSILON)
    low, high = _load(qkv + in_qkv + 2 * d, mask, HALF)
    _store(v + place, low, high, mask, HALF)


@jit
def _heads_backward_kernel(
    dq, dk, dv, q, k, inv_rms, table, dqkv, largest, rows, tokens, HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of queries, of keys and of values, and the largest |delta| among them."""
    place, in_qkv, kept, inside, mask, cos, sin = _block(table, rows, tokens, HEADS, HALF, ROWS, COLUMNS)
    d: tl.constexpr = HEADS * 2 * HALF
    out, kept = dqkv + in_qkv, inv_rms + kept
    of_q = _backward(dq + place, q + place, kept, out, inside, mask, cos, sin, HALF)
    of_k = _backward(dk + place, k + place, kept + HEADS, out + d, inside, mask, cos, sin, HALF)
    low, high = _load(dv + place, mask, HALF)
    bits = tl.maximum(tl.maximum(of_q, of_k), _store(out + 2 * d, low, high, mask, HALF))
    tl.store(largest + tl.program_id(0), tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True))


# Launching


def _blocks(head_dim: int) -> dict[str, int]:
    """HALF of a head, COLUMNS that hold it, ROWS of a program and num_warps."""
    columns = triton.next_power_of_2(head_dim // 2)
    rows = max(1, 1024 // columns)
    return {"HALF": head_dim // 2, "COLUMNS": columns, "ROWS": rows, "num_warps": max(4, rows * columns // 512)}


@operator("heads_forward")
def _heads_forward(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    blocks, rows = _blocks(width // (3 * n_head)), batch * tokens * n_head
    shape = (batch, tokens, n_head, width // (3 * n_head))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    inv_rms = torch.empty((batch, tokens, 2, n_head), dtype=torch.float32, device=qkv.device)
    wrap_triton(_heads_forward_kernel)[(triton.cdiv(rows, blocks["ROWS"]),)](
        qkv=qkv,
        table=table,
        q=q,
        k=k,
        v=v,
        inv_rms=inv_rms,
        rows=rows,
        tokens=tokens,
        EPSILON=EPSILON,
        HEADS=n_head,
        **blocks,
    )
    return q, k, v, inv_rms


@operator("heads_backward")
def _heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, inv_rms: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    batch, tokens, n_head, head_dim = q.shape
    blocks, rows = _blocks(head_dim), batch * tokens * n_head
    programs = triton.cdiv(rows, blocks["ROWS"])
    dqkv = torch.empty((batch, tokens, 3 * n_head * head_dim), dtype=q.dtype, device=q.device)
    largest = torch.empty((programs,), dtype=torch.float32, device=q.device)
    wrap_triton(_heads_backward_kernel)[(programs,)](
        dq=dq,
        dk=dk,
        dv=dv,
        q=q,
        k=k,
        inv_rms=inv_rms,
        table=table,
        dqkv=dqkv,
        largest=largest,
        rows=rows,
        tokens=tokens,
        HEADS=n_head,
        **blocks,
    )
    return dqkv, largest


def heads_forward(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys, normalised and rotated, and values.

    qkv float (B, T, 3 d) of any strides; table float32 (2, T, hd), a rotation's cos and signed sin: cos, cos and -sin,
    sin in the two halves of hd = d / n_head. Returns q, k and v (B, T, H, hd) of qkv's type, and 1 / rms of queries and
    keys float32 (B, T, 2, H) for the backward pass. Raises ValueError on other shapes or types, or an empty batch.
    """
    if qkv.dim() != 3 or 0 in qkv.shape or qkv.shape[2] % (6 * n_head):
        raise ValueError(
            f"heads_forward: got qkv {tuple(qkv.shape)} for {n_head} heads; it is (B, T, 3 H hd), hd even, not empty"
        )
    if qkv.dtype not in FLOATS:
        raise ValueError(f"heads_forward: got {qkv.dtype}; it takes {', '.join(str(dtype) for dtype in FLOATS)}")
    if table.shape != (2, qkv.shape[1], qkv.shape[2] // (3 * n_head)) or table.dtype != torch.float32:
        raise ValueError(
            f"heads_forward: got table {table.dtype} {tuple(table.shape)} for qkv {tuple(qkv.shape)}; "
            f"it is torch.float32 (2, T, hd)"
        )
    if not on_triton(qkv):
        return heads_forward_torch(qkv, table, n_head)
    return _heads_forward(qkv.contiguous(), table.contiguous(), n_head)


def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, inv_rms: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The delta of qkv from those of q, k and v.

    dq, dk and dv (B, T, H, hd) of any strides, of q's type; q, k and inv_rms from `heads_forward`, table as given to
    it. Returns delta (B, T, 3 d), contiguous, and the largest |delta| of each part of it as it is stored, float32
    (parts,), NaN where one is NaN. Raises ValueError where a delta is not as q.
    """
    for delta in (dq, dk, dv):
        if delta.shape != q.shape or delta.dtype != q.dtype:
            raise ValueError(f"heads_backward: got a delta {delta.dtype} {tuple(delta.shape)}; it must be as q, "
                             f"{q.dtype} {tuple(q.shape)}")  # fmt: skip
    if not on_triton(q):
        return heads_backward_torch(dq, dk, dv, q, k, inv_rms, table)
    deltas = (delta.contiguous() for delta in (dq, dk, dv))  # as torch's attention kernels return them, laid out as q
    return _heads_backward(*deltas, q, k, inv_rms, table.contiguous())


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, n_head):
        q, k, v, inv_rms = heads_forward(qkv, table, n_head)
        ctx.save_for_backward(q, k, inv_rms, table)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        return with_largest(*heads_backward(dq, dk, dv, *ctx.saved_tensors)), None, None


def split_heads(qkv: Tensor, table: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `heads_forward`, with a backward pass that leaves the largest |delta| with the delta of qkv."""
    return _Heads.apply(qkv, table, n_head)


def launch_configs() -> list[LaunchConfig]:
    """Heads of several widths and types."""
    found = []
    for float_, heads, head_dim in (("fp32", 6, 64), ("bf16", 6, 64), ("fp16", 5, 20), ("bf16", 4, 256)):
        blocks = _blocks(head_dim)
        pointers = dict.fromkeys(("q", "k"), f"*{float_}") | {"inv_rms": "*fp32", "table": "*fp32"}
        shape, constants = {"rows": "i32", "tokens": "i32"}, {"HEADS": heads} | blocks
        name = f"{float_} {heads} x {head_dim}"
        signature = {"qkv": f"*{float_}", "v": f"*{float_}"} | pointers | shape
        forward = constants | {"EPSILON": EPSILON}
        found.append(LaunchConfig(f"heads_forward {name}", _heads_forward_kernel, signature, forward))
        signature = dict.fromkeys(("dq", "dk", "dv", "dqkv"), f"*{float_}") | {"largest": "*fp32"} | pointers | shape
        found.append(LaunchConfig(f"heads_backward {name}", _heads_backward_kernel, signature, constants))
    return found
