"""Integer weights in few bits: how they are packed, and a net in one packed safetensors file.

    pack      W in [-Q, Q] becomes W + Q, or half of that where 0 is none of its levels (one bit: 0 for -1, 1 for 1),
              and bit p of every weight, eight to a byte, is row p of uint8 (bits, ceil(n / 8)): exactly `bits` bits a
              weight, 2 for a ternary one
    a file    packed weights as the products read them, scales and float weights as they are; its metadata holds the
              checkpoint's JSON and the SHA-256 of the tensors

What a weight keeps beyond the bits that are read serves training alone and is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from kernels.limits import weight_limit
from run.errors import UserError

if TYPE_CHECKING:
    from torch import nn

FORMAT = "nanogft-packed-1"
SHAPES = "packed"  # in a file's metadata: name of a packed tensor -> [rows, columns, bits]


def pack(weight: np.ndarray, bits: int, levels: int = 3) -> np.ndarray:
    """int8 weights that `bits` bits hold, of any shape, to uint8 (bits, ceil(n / 8)); two bits have 3 levels or 4."""
    q, unit = weight_limit(bits, levels)  # at one bit a move, from -1 to 1, is two units
    values = (weight.reshape(-1).astype(np.int16) + q) // unit
    planes = (values[None, :] >> np.arange(bits)[:, None]) & 1
    return np.packbits(planes.astype(np.uint8), axis=1, bitorder="little")


def unpack(packed: np.ndarray, shape: tuple[int, int], levels: int = 3) -> np.ndarray:
    """The inverse of `pack`: int8 of `shape`."""
    bits, count = len(packed), shape[0] * shape[1]
    q, unit = weight_limit(bits, levels)
    planes = np.unpackbits(packed, axis=1, count=count, bitorder="little").astype(np.int16)
    values = (planes << np.arange(bits, dtype=np.int16)[:, None]).sum(axis=0) * unit - q
    return values.astype(np.int8).reshape(shape)


def packed_bytes(net: nn.Module, meta: Mapping[str, Any]) -> bytes:
    """The net of a checkpoint, whose JSON is `meta`, as the content of one file."""
    from gft.layers import IntLayer

    tensors, packed = {name: tensor.numpy() for name, tensor in net.state_dict().items()}, {}
    for name, layer in net.named_modules():
        if isinstance(layer, IntLayer):
            tensors[f"{name}.weight"] = pack(layer.read().numpy(), layer.bits, layer.levels)
            packed[f"{name}.weight"] = [*layer.weight.shape, layer.bits]
    # Of what is read nothing more is kept (3 bits hold the four levels of two); init_std only made the first weights.
    bits = meta["config"]["bits"]
    keep = 3 if (bits, meta["config"].get("levels")) == (2, 4) else bits
    config = meta["config"] | {"keep_bits": keep, "init_std": 1.0}
    about = {key: meta[key] for key in meta if key not in ("progress", "environment")} | {"config": config}
    header = {"format": FORMAT, "meta": json.dumps(about), SHAPES: json.dumps(packed)}
    header["sha256"] = _sha256(tensors, header)
    return safetensors.numpy.save(tensors, header)


def load_packed(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and meta of a file, as `run.checkpoint.load_arrays` gives those of a checkpoint.

    Raises UserError if it is damaged or none of ours.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file that can be read ({error}); export it again") from None
    if header.get("format") != FORMAT:
        raise UserError(f'{path} is no packed net: its "format" is {header.get("format")!r}, not {FORMAT!r}; '
                        "python export.py out/NAME FILE.safetensors writes one")  # fmt: skip
    if (seen := _sha256(tensors, header)) != header.get("sha256"):
        raise UserError(f"{path} is damaged: its SHA-256 is {seen} and it says {header.get('sha256')}; export it again")
    meta = json.loads(header["meta"])
    levels = meta["config"].get("levels", 3)
    for name, (rows, columns, bits) in json.loads(header[SHAPES]).items():
        if tensors[name].shape != (bits, -(-rows * columns // 8)):
            raise UserError(f"{path} was not written by this program, though its hash is right: {name}")
        tensors[name] = unpack(tensors[name], (rows, columns), levels)
    return {f"model.{name}": tensor for name, tensor in tensors.items()}, meta


def _sha256(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """SHA-256 of the header and of the tensors, with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps([header.get(key) for key in ("format", "meta", SHAPES)]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
