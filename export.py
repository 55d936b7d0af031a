"""A trained checkpoint as a file that other programs can run: ONNX, or a packed safetensors.

    python export.py out/shakespeare_char_small model.onnx          text: tokens and a KV cache to logits
    python export.py out/mnist digits.onnx                          images: uint8 pixels to logits
    python export.py out/NAME model.onnx --packed                   weights on disk in as many bits as they have
    python export.py out/NAME model.safetensors                     packed, for sample.py and predict.py

    python examples/onnx_generate.py model.onnx "ROMEO:"            needs onnxruntime and numpy, no torch

The graph is written node by node, in standard operators of opset 18: what gft/layers.py, kernels/rmsnorm_quantize.py
and model.py compute, in their order. An integer layer is MatMulInteger of activations, X + 128 as uint8 with a zero
point of 128, and of the int8 weights that the products *read*. docs/export.md has inputs, outputs, and what is the
same as in torch.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    import onnx
    from onnx import helper, numpy_helper
except ImportError:  # a packed safetensors needs none
    onnx = None

from data.augment import pixel_scale
from data.cache import write_atomic
from data.tokenizers import tokenizer_from_json
from gft.baselines import fake_quantize
from gft.layers import IntEmbedding, IntLayer, IntLinear
from kernels.limits import weight_limit
from model import ATTENTION_SCALE, ROPE_BASE, image_rope_table, load_net
from run.command import Parser, exit_status, find_folder
from run.errors import UserError
from run.packed import pack, packed_bytes

OPSET = 18
INT64_END = 2**63 - 1


class Graph:
    """A graph under construction; a value is the name of what a node or a constant gives."""

    def __init__(self, packed: bool):
        self.packed = packed
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def __call__(self, op: str, *inputs: str | np.ndarray, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node of operator `op`. Inputs that are arrays become constants. Returns its output, or several."""
        names = [given if isinstance(given, str) else self.constant(given) for given in inputs]
        results = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, name=f"{op}_{len(self.nodes)}", **attributes))
        return results[0] if outputs == 1 else results

    def constant(self, value: np.ndarray, name: str = "") -> str:
        """A constant, stored once however often it is used."""
        name = name or f"{value.dtype}_{'x'.join(map(str, value.shape))}_{value.tobytes().hex()}"
        if len(name) > 60:
            name = f"constant_{len(self.constants)}"
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def integers(self, name: str, weight: np.ndarray, bits: int, levels: int) -> str:
        """An int8 weight of `bits` bits (two have 3 `levels` or 4), packed (run/packed.py) where asked and of use; a
        session unpacks it once."""
        if not self.packed or bits == 8:
            return self.constant(weight, name)

        q, unit = weight_limit(bits, levels)
        planes = self.constant(pack(weight, bits, levels)[:, :, None], name)  # (bits, bytes, 1)
        eight = self("BitShift", planes, np.arange(8, dtype=np.uint8), direction="RIGHT")  # (bits, bytes, 8)
        ones = self("Cast", self("BitwiseAnd", eight, np.uint8([1])), to=TYPES["int32"])
        rows = self("Mul", self("Reshape", ones, np.int64([bits, -1])), np.int32([[unit << p] for p in range(bits)]))
        total = self("Sub", self("ReduceSum", rows, np.int64([0]), keepdims=0), np.int32([q]))
        whole = self("Slice", total, np.int64([0]), np.int64([weight.size]))
        return self("Cast", self("Reshape", whole, np.int64(weight.shape)), to=TYPES["int8"])

    def model(self, inputs: list, outputs: list, about: dict[str, Any]) -> onnx.ModelProto:
        """The whole, checked. Inputs and outputs are (name, type, shape); texts in a shape are dynamic."""
        values = [[helper.make_tensor_value_info(name, TYPES[kind], shape) for name, kind, shape in group]
                  for group in (inputs, outputs)]  # fmt: skip
        graph = helper.make_graph(self.nodes, "nanogft", *values, initializer=list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="nanogft")
        model.ir_version = 8  # the first that opset 18 was released with; any later runtime reads it
        helper.set_model_props(model, {"nanogft": json.dumps(about)})
        onnx.checker.check_model(model)
        return model

    def output(self, name: str, value: str) -> None:
        """Give `value` the name of an output."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))


TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float64": 11}  # onnx.TensorProto's numbers


def linear(g: Graph, name: str, layer: nn.Module, x: str, residual: str = "") -> str:
    """x (..., in) to (..., out), plus residual: IntLinear's `_linear`, or FloatLinear's forward."""
    if layer.squared_relu:
        relu = g("Relu", x)
        x = g("Mul", relu, relu)
    if not isinstance(layer, IntLinear):
        weight = (fake_quantize(layer.weight, layer.bits) * layer.gain).detach().numpy()
        y = g("MatMul", unit_rms(g, x), g.constant(np.ascontiguousarray(weight.T), f"{name}.weight"))
        return g("Add", residual, y) if residual else y
    # Mean and root in fp64, each rounded to fp32 once, as the reference does; a Reciprocal may be approximate.
    squares = g("Cast", g("Mul", x, x), to=TYPES["float64"])
    mean = g("ReduceMean", squares, np.int64([-1]))
    rms = g("Cast", g("Sqrt", g("Cast", g("Cast", mean, to=TYPES["float32"]), to=TYPES["float64"])),
            to=TYPES["float32"])  # fmt: skip
    safe = g("Greater", rms, np.float32(1e-15))  # of rows of zeros, which stay zeros
    inverse = g("Where", safe, g("Div", np.float32(1), rms), np.float32(0))
    rounded = g("Round", g("Mul", g("Mul", x, inverse), np.float32(127.0 / layer.act_range)))  # halves to even
    # X + 128 as uint8: onnxruntime multiplies int8 by int8 forty times as slowly on x86.
    clipped = g("Clip", rounded, np.float32(-127), np.float32(127))
    x_uint8 = g("Cast", g("Add", clipped, np.float32(128)), to=TYPES["uint8"])
    weight = g.integers(f"{name}.weight", np.ascontiguousarray(layer.read().numpy().T), layer.bits, layer.levels)
    scale = (layer.scale * (layer.act_range / 127.0)).numpy()
    y = g("Mul", g("Cast", g("MatMulInteger", x_uint8, weight, np.uint8(128)), to=TYPES["float32"]), scale)
    return g("Add", y, residual) if residual else y


def embedding(g: Graph, layer: nn.Module, tokens: str) -> str:
    """tokens (B, T) to (B, T, d)."""
    if not isinstance(layer, IntEmbedding):
        table = fake_quantize(layer.weight, layer.bits).detach().numpy()
        return g("Gather", g.constant(table, "embedding.weight"), tokens)
    rows = g("Gather", g.integers("embedding.weight", layer.read().numpy(), layer.bits, layer.levels), tokens)
    return g("Mul", g("Cast", rows, to=TYPES["float32"]), layer.scale.numpy())


def unit_rms(g: Graph, x: str) -> str:
    """torch's F.rms_norm over the last axis."""
    mean = g("ReduceMean", g("Mul", x, x), np.int64([-1]))
    return g("Div", x, g("Sqrt", g("Add", mean, np.finfo(np.float32).eps)))


def rotate(g: Graph, x: str, table: tuple[str, str]) -> str:
    """model.rotate: x (B, H, T, hd); cos and signed sin (T, hd)."""
    left, right = g("Split", x, axis=-1, outputs=2, num_outputs=2)
    return g("Add", g("Mul", x, table[0]), g("Mul", g("Concat", right, left, axis=-1), table[1]))


def blocks(g: Graph, net: nn.Module, x: str, table: tuple[str, str], mask: str = "", past: str = "") -> tuple[str, ...]:
    """All blocks: x (B, T, d) to (B, T, d), then keys and values (2, L, B, H, keys, hd) where there is a past."""
    n_head, head_dim = net.config.n_head, net.config.d_model // net.config.n_head
    keys, values = [], []
    for i, block in enumerate(net.blocks):
        qkv = g("Reshape", linear(g, f"blocks.{i}.qkv", block.qkv, x), np.int64([0, 0, 3, n_head, head_dim]))
        q, k, v = g("Split", g("Transpose", qkv, perm=[2, 0, 3, 1, 4]), axis=0, outputs=3, num_outputs=3)
        q, k, v = (g("Squeeze", part, np.int64([0])) for part in (q, k, v))  # (B, H, T, hd)
        q, k = (rotate(g, unit_rms(g, part), table) for part in (q, k))
        if past:
            of_layer = g("Gather", past, np.int64(i), axis=1)  # (2, B, H, past, hd)
            k = g("Concat", g("Gather", of_layer, np.int64(0), axis=0), k, axis=2)
            v = g("Concat", g("Gather", of_layer, np.int64(1), axis=0), v, axis=2)
            keys.append(k)
            values.append(v)
        scores = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
        scores = g("Mul", scores, np.float32(ATTENTION_SCALE / head_dim**0.5))
        shares = g("Softmax", g("Add", scores, mask) if mask else scores, axis=-1)
        y = g("Reshape", g("Transpose", g("MatMul", shares, v), perm=[0, 2, 1, 3]), np.int64([0, 0, -1]))
        x = linear(g, f"blocks.{i}.out", block.out, y, x)
        x = linear(g, f"blocks.{i}.down", block.down, linear(g, f"blocks.{i}.up", block.up, x), x)
    if not past:
        return (x,)
    stacked = [g("Concat", *(g("Unsqueeze", t, np.int64([0])) for t in each), axis=0) for each in (keys, values)]
    both = g("Concat", *(g("Unsqueeze", t, np.int64([0])) for t in stacked), axis=0)
    newest = np.int64([-net.config.context])
    return x, g("Slice", both, newest, np.int64([INT64_END]), np.int64([4]))


def text_graph(g: Graph, net: nn.Module, cache: bool, about: dict[str, Any]) -> onnx.ModelProto:
    """tokens to logits; with `cache`, the newest tokens, the keys and values before them and how many went by."""
    c = net.config
    head_dim = c.d_model // c.n_head
    length = g("Squeeze", g("Shape", "tokens", start=1, end=2))
    before = g("Squeeze", g("Shape", "past", start=4, end=5)) if cache else np.int64(0)  # keys that are there already
    first = "seen" if cache else np.int64(0)
    place = g("Cast", g("Range", first, g("Add", first, length), np.int64(1)), to=TYPES["float32"])
    frequency = (ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)).numpy()
    angle = g("Mul", g("Unsqueeze", place, np.int64([1])), frequency)  # (T, hd / 2)
    cos, sin = g("Cos", angle), g("Sin", angle)
    table = g("Concat", cos, cos, axis=1), g("Concat", g("Neg", sin), sin, axis=1)
    end = g("Add", before, length)
    queries, keys = g("Range", before, end, np.int64(1)), g("Range", np.int64(0), end, np.int64(1))
    back = g("Sub", g("Unsqueeze", queries, np.int64([1])), keys)  # (T, keys)
    seen = g("And", g("GreaterOrEqual", back, np.int64(0)), g("Less", back, np.int64(c.context)))
    mask = g("Where", seen, np.float32(0), np.float32(-np.inf))
    x, *kept = blocks(g, net, embedding(g, net.embedding, "tokens"), table, mask, "past" if cache else "")
    g.output("logits", linear(g, "head", net.head, x))
    inputs = [("tokens", "int64", ["batch", "length"])]
    outputs = [("logits", "float32", ["batch", "length", c.vocab_size])]
    if cache:
        g.output("present", *kept)
        shape = [2, c.n_layer, "batch", c.n_head]
        inputs += [("past", "float32", [*shape, "past_length", head_dim]), ("seen", "int64", [])]
        outputs += [("present", "float32", [*shape, "present_length", head_dim])]
    return g.model(inputs, outputs, about)


def image_graph(g: Graph, net: nn.Module, pixels: tuple, about: dict[str, Any]) -> onnx.ModelProto:
    """pixels uint8 (B, side, side, channels), whose mean and std are `pixels`, to logits (B, classes)."""
    c = net.config
    side, _, channels = c.image
    factor, offset = pixel_scale(*pixels).numpy().reshape(2, -1)  # (channels,)
    flat = g("Reshape", g("Cast", "pixels", to=TYPES["float32"]), np.int64([0, side, side * channels]))
    x = g("Sub", g("Mul", flat, np.tile(factor, side)), np.tile(offset, side))  # by rows: the runtime is slow by pixels
    if c.model == "mlp":
        x = g("Reshape", x, np.int64([0, side, side, channels]))
        x = g("Flatten", g("Transpose", x, perm=[0, 3, 1, 2]))
        for i, layer in enumerate(net.blocks):
            x = linear(g, f"blocks.{i}", layer, x)
    else:
        rows, head_dim = side // c.patch, c.d_model // c.n_head
        split = g("Reshape", x, np.int64([0, rows, c.patch, rows, c.patch, channels]))
        patches = g("Reshape", g("Transpose", split, perm=[0, 1, 3, 2, 4, 5]), np.int64([0, rows**2, -1]))
        pads = np.int64([0, 0, 0, 0, 0, 1])
        x = linear(g, "embedding", net.embedding, g("Pad", patches, pads, np.float32(1)))  # see model.py
        table = image_rope_table(rows, rows, head_dim, torch.device("cpu")).numpy()
        (x,) = blocks(g, net, x, tuple(g.constant(t, f"rope.{i}") for i, t in enumerate(table)))
        x = g("ReduceMean", x, np.int64([1]), keepdims=0)
    g.output("logits", linear(g, "head", net.head, x))
    inputs = [("pixels", "uint8", ["batch", side, side, channels])]
    return g.model(inputs, [("logits", "float32", ["batch", c.vocab_size])], about)


def plain_tokenizer(stored: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's JSON with its vocabulary in it, which of GPT-2's is only a name."""
    if stored["kind"] != "gpt2":
        return stored
    tokenizer = tokenizer_from_json(stored)
    # The pattern of GPT-2 itself, from its published encoder.py.
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokens = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    return {"kind": "bpe", "pattern": pattern, "ranks": [base64.b64encode(t).decode("ascii") for t in tokens]}


def onnx_model(net: nn.Module, meta: dict[str, Any], packed: bool = False, cache: bool = True) -> onnx.ModelProto:
    """The ONNX model of a checkpoint's net and meta, as model.load_net gives them."""
    c = net.config
    about = {"name": meta["config"]["name"], "step": meta["step"]}
    if "classes" in meta:
        about |= {"classes": list(meta["classes"])}
        return image_graph(Graph(packed), net, (meta["mean"], meta["std"]), about)
    about |= {"tokenizer": plain_tokenizer(meta["tokenizer"]), "context": c.context}
    return text_graph(Graph(packed), net, cache, about)


def notes(net: nn.Module, graph: bool) -> list[str]:
    """What must be said of an exported net; `graph` where other programs than this one compute it."""
    layers = {name: layer for name, layer in net.named_modules() if hasattr(layer, "weight")}
    integer = [layer for layer in layers.values() if isinstance(layer, IntLayer)]
    floats = [name for name, layer in layers.items() if not isinstance(layer, IntLayer)]
    lines = [f"{len(integer)} integer layers, {sum(layer.weight.numel() for layer in integer):,} weights"]
    if floats:
        lines.append(f"note: {len(floats)} layers are exported in fp32, as they were trained: {', '.join(floats)}")
    if graph and net.config.activations != torch.float32:
        lines.append("note: the net was trained with bf16 between layers; an exported one computes in fp32")
    if graph and any(layer.bits == 8 for layer in integer):
        lines.append("note: sums of 8-bit weights may saturate on x86 processors without VNNI; of fewer bits never")
    return lines


def run(argv: list[str]) -> None:
    """Everything main does, errors aside."""
    parser = Parser("export.py", "Write a trained checkpoint as ONNX or packed.", "out/shakespeare_char_small")
    parser.add_argument("file", type=Path, help="NAME.onnx, or NAME.safetensors (packed, for sample.py and predict.py)")
    parser.add_argument("--packed", action="store_true", help="ONNX with weights on disk in as many bits as they have")
    parser.add_argument("--no-cache", action="store_true", help="ONNX of text without a KV cache: tokens to logits")
    args = parser.read(argv)
    kind = args.file.suffix
    if kind not in (".onnx", ".safetensors"):
        raise UserError(f"{args.file}: the name must end in .onnx or .safetensors, which says what to write", code=2)
    for option, given in (("--packed", args.packed), ("--no-cache", args.no_cache)):
        if given and kind == ".safetensors":
            raise UserError(f"{option} is for ONNX: a .safetensors file is always packed and has no graph", code=2)
    if kind == ".onnx" and onnx is None:
        raise UserError(f"{args.file}: an ONNX file needs the package onnx, which is not installed: pip install onnx "
                        "onnxruntime; or name a .safetensors file, which needs nothing more")  # fmt: skip
    net, meta, head = load_net(find_folder(args.folder, args.checkpoint), args.checkpoint or "")
    text, cache = "tokenizer" in meta, not args.no_cache
    if not text and not cache:
        raise UserError(f"--no-cache: {head} is a net for images, which has no cache; leave it out", code=2)
    if kind == ".onnx":
        data = onnx_model(net, meta, args.packed, cache).SerializeToString()
    else:
        data = packed_bytes(net, meta)
    try:
        write_atomic(args.file, data)
    except OSError as error:
        raise UserError(f"{args.file} cannot be written ({error}); choose another place") from error
    net_line, *more = notes(net, kind == ".onnx")
    if args.packed and (plain := onnx_model(net, meta, cache=cache).ByteSize()) <= len(data):
        more.append(f"note: --packed saves nothing here: {plain:,} bytes without it")
    print(f"checkpoint {head.stem} of step {meta['step']}: {net_line}")
    for note in more:
        print(note, file=sys.stderr)
    print(f"wrote {args.file}, {len(data):,} bytes")
    if kind == ".safetensors":
        print(f"use: python {'sample.py' if text else 'predict.py'} {args.file}{'' if text else ' IMAGE'}")
    elif text and cache:
        print(f'use: python examples/onnx_generate.py {args.file} "A text to continue"')


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a wrong option, 1 for another error, 130 after Ctrl-C."""
    return exit_status(run, argv, "free some")


if __name__ == "__main__":
    sys.exit(main())
