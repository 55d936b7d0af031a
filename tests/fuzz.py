"""Feeds mutated input to what reads files and command lines: each is read, or refused with a UserError.

    make fuzz                                                   10,000 of every kind
    python -m tests.fuzz configs data --cases 500 --seed 2      some
    python -m tests.fuzz data --seed 2 --first 417 --cases 1    one of them again, as a failure says

    configs      TOML files and command lines, read by run.config.load; what is accepted survives being written as TOML
    checkpoints  folders of a run in which one file is damaged, or forged and signed anew, read by run.checkpoint.load,
                 then saved into; checkpoints whose files are untouched stay as they were. Forged ones that can be read
                 are used as sample.py and predict.py do
    data         images, folders of them, archives, MNIST's files, texts, what is kept of texts in the cache, and a
                 run's metrics, read as the programs do
    hostile      a few inputs made by hand: enormous, endlessly nested, contradicting themselves

A failure is any other exception, more than SECONDS for a case, more than MEMORY more memory than at the start, or
something saved that is lost. A case is a function of its kind, the seed and its number.
"""

import argparse
import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import sample
from data import decode, imagenette, mnist, text
from data.cache import Found
from data.images import load_images
from data.tokenizers import CharTokenizer
from model import ModelConfig, make_net
from run import checkpoint, config
from run.curve import draw as draw_curve
from run.errors import UserError
from run.progress import Metrics

SECONDS, MEMORY = 10, 2 << 30
ROOT = Path(__file__).resolve().parents[1]
Hand = Callable[[Path], object]  # given an empty folder; False: it was refused
Case = Callable[[Random, Path], object]  # the same, and a source of choices


# Mutations

NUMBERS = [struct.pack(kind, value) for kind, bits in (("H", 16), ("I", 32), ("Q", 64))
           for value in (0, 1, 1 << bits // 2, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1)]  # fmt: skip
NUMBERS += [number[::-1] for number in NUMBERS]


def mutated(draw: Random, content: bytes) -> bytes:
    """`content` with a few places changed, removed, repeated or moved, or cut short."""
    for _ in range(1 + int(draw.expovariate(0.7))):
        length = draw.choice((1, 1, 2, 4, 8, 64, draw.randrange(len(content) + 1)))
        at = draw.randrange(max(1, len(content) - length + 1))
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        match draw.randrange(7):
            case 0:
                part = bytes(byte ^ 1 << draw.randrange(8) for byte in part)
            case 1:
                part = draw.randbytes(len(part))
            case 2:
                part = draw.choice(NUMBERS)
            case 3:
                part = b""
            case 4:
                part *= 2
            case 5:
                content, at = before + after, draw.randrange(len(before + after) + 1)
                before, after = content[:at], content[at:]
            case 6 if draw.random() < 0.3:
                after = b""
        content = before + part + after
    return content


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, "",
    "x", "\0", "\ud800", "..", "../last.json", "/etc/passwd", "x" * 5000, [], {}, [0], {"": 0}, nested(300),
]  # fmt: skip


def mutated_json(draw: Random, value: Any) -> Any:
    """`value` with something in it replaced, removed, added or renamed."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not keys or draw.random() < 0.1:
        return draw.choice(ODD)
    value, key = value.copy(), draw.choice(keys)
    kind = draw.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[draw.choice(("", "x", f"{key} ", "__metadata__", "step"))] = draw.choice((value[key], draw.choice(ODD)))
    else:
        value[key] = mutated_json(draw, value[key])
    return value


# Configs and command lines

WORDS = [
    "", " ", "-", "--", "---", "--=", "--=1", "-h", "-k", "--help", "--print-config", "--print_config=1", "--resume",
    "--no-such-key", "--no-such-key=1", "=", "\0", "\udcff", "--\udcff=1", "none.toml", "/", "/dev/null",
    "--bits", "@x", "%s",
]  # fmt: skip
TEXTS = [
    "", " ", "x", "0", "1", "2", "-1", "64", "1e3", "1e400", "-1e-400", "nan", "inf", "-inf", "0x10", "1_0", "1.5",
    "9" * 5000, "true", "None", "auto", "all", "mnist", "head,mlp", ",", "\0", "\n", "\udcff", "'", '"', "{}", "[1]",
    "--", "%d", "x" * 9999,
]  # fmt: skip
LITERALS = [
    "1", "-1", "0.5", "true", "nan", "-inf", "1e999", '"x"', '""', '"\\u0000"', "''", "[]", "{}", "{a = 1}", "[[1]]",
    "1979-05-27", "07:32:00", "0x" + "f" * 5000, "9" * 5000, "[" * 2000 + "]" * 2000, '"""\n"""', "",
]  # fmt: skip


@functools.cache
def _config_files() -> list[bytes]:
    return [path.read_bytes() for path in config.CONFIGS.values()]


def configs(draw: Random, folder: Path) -> object:
    content = draw.choice(_config_files())
    keys, others = [*config.FIELDS], [*config.OTHER_NAMES, "name", "a.b", "[x]", '""']
    for _ in range(draw.choice((0, 0, 1, 3))):
        content += f"\n{draw.choice(keys + others)} = {draw.choice(LITERALS)}".encode()
    path = folder / "mutated.toml"
    path.write_bytes(mutated(draw, content) if draw.random() < 0.3 else content)
    argv = [draw.choice((str(path), str(path), str(path), draw.choice(WORDS), draw.choice([*config.CONFIGS])))]
    for _ in range(draw.randrange(5)):
        key = draw.choice(keys + others if draw.random() < 0.1 else keys)
        allowed = config.FIELDS[key].metadata["allowed"] if key in config.FIELDS else ()
        beside = [str(n + d) for n in allowed if not isinstance(n, str) for d in (-1, 1)]
        value = str(draw.choice(allowed)) if allowed and draw.random() < 0.7 else draw.choice(TEXTS + beside)
        argv += [f"--{key}={value}"] if draw.random() < 0.5 else [f"--{key}", value]
    if draw.random() < 0.2:
        argv.append(draw.choice(WORDS))
        draw.shuffle(argv)
    try:
        cfg = config.load(argv)
    except SystemExit as ended:
        assert ended.code == 0, f"SystemExit({ended.code})"
        return
    path.write_text(config.to_toml(cfg), encoding="utf-8", errors="replace")
    if "?" in path.read_text(encoding="utf-8"):  # a file name of bytes that are no UTF-8, which TOML cannot have
        return
    assert config.load([str(path)], notes=False) == cfg, "what was accepted is not the same when written and read"
    assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg


# Checkpoints


def _tensors(step: int) -> dict[str, torch.Tensor]:
    weight = torch.arange(12, dtype=torch.int8).view(3, 4) + step
    return {"model.w": weight, "optimizer0.0.m": torch.ones(step), "x": torch.ones(())}


def _save(folder: Path, name: str, step: int) -> None:
    meta = {"step": step, "config": config.to_dict(config.Config()), "classes": ["a"], "losses": [1.5, None]}
    checkpoint.save(folder, name, _tensors(step), meta)


@functools.cache
def _saved_run() -> dict[str, bytes]:
    """The files of a folder with `previous`, `last` and `best` of steps 1, 2 and 2."""
    with tempfile.TemporaryDirectory() as folder:
        for step, name in ((1, "last"), (2, "last"), (2, "best")):
            _save(Path(folder), name, step)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def signed(record: Any) -> bytes:
    """A checkpoint's JSON, with a hash that fits it."""
    if isinstance(record, dict):
        record["content_sha256"] = checkpoint._content_sha256(record)
    return json.dumps(record).encode("utf-8", "surrogatepass")


def packed(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    """A safetensors file whose header says that it is so long."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + rest


def forge(files: dict[str, bytes], name: str, tensors: bytes, **changes: Any) -> None:
    """Replace the tensors of checkpoint `name`, and give its JSON the hash of these."""
    record = json.loads(files[f"{name}.json"])
    files[record["file"]] = tensors
    record |= {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()} | changes
    files[f"{name}.json"] = signed(record)


def _loaded(folder: Path, name: str) -> tuple[int, str] | None:
    """Step and tensors of a checkpoint; None if it is refused."""
    try:
        tensors, meta = checkpoint.load(folder, name)
    except UserError:
        return None
    with contextlib.suppress(UserError):
        checkpoint.config_of(meta, folder / f"{name}.json")
    return meta["step"], checkpoint.weights_sha256(tensors)


def _expected(step: int) -> tuple[int, str]:
    return step, checkpoint.weights_sha256(_tensors(step))


def runs(draw: Random, folder: Path) -> bool:
    """A folder with three checkpoints, of which one is damaged or forged, is read and then saved into."""
    files, name = dict(_saved_run()), draw.choice(checkpoint.LOADED)
    head = f"{name}.json"
    body = json.loads(files[head])["file"]
    file, kind = draw.choice((head, body)), draw.randrange(5)
    if kind == 0:
        files[file] = mutated(draw, files[file])
    elif kind == 1:
        files[file] = draw.choice((b"", b"{}", files[file][:-512], *files.values()))
    elif kind == 2:
        files[head] = signed(mutated_json(draw, json.loads(files[head])))
    elif kind == 3:
        forge(files, name, mutated(draw, files[body]))
    else:
        end = 8 + int.from_bytes(files[body][:8], "little")
        header = mutated_json(draw, json.loads(files[body][8:end]))
        forge(files, name, packed(json.dumps(header).encode(), files[body][end:]))
    for path, content in files.items():
        (folder / path).write_bytes(content)
    steps = {"previous": 1, "last": 2, "best": 2}
    damaged = {other for other in steps if any(files[path] != _saved_run()[path] for path in _files_of(other))}
    for other in steps:
        found = _loaded(folder, other)
        assert other in damaged or found == _expected(steps[other]), f"{other} is lost"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files, "loading has changed the folder"
    good = _loaded(folder, name) is not None
    if draw.random() < 0.2:
        kept = _loaded(folder, "last") or _loaded(folder, "previous")
        best = _loaded(folder, "best")
        _save(folder, "last", 3)
        assert _loaded(folder, "last") == _expected(3) and _loaded(folder, "best") == best
        assert _loaded(folder, "previous") == kept, "a good checkpoint is lost in saving"
    return good


@functools.cache
def _files_of(name: str) -> tuple[str, str]:
    return f"{name}.json", json.loads(_saved_run()[f"{name}.json"])["file"]


@functools.cache
def _saved_net(image: bool) -> dict[str, bytes]:
    """The files of a run's `last`, a very small net for images or for text."""
    words = "--data mnist --patch 14" if image else "--context 8"
    cfg = config.load([*words.split(), *"--d_model 8 --n_layer 1 --n_head 1".split()], notes=False)
    tokenizer = CharTokenizer("abc \n")
    pixels = {"image": [28, 28, 1], "mean": [0.1], "std": [0.3], "classes": list("0123456789")}
    outputs, shape = (10, (28, 28, 1)) if image else (tokenizer.vocab_size, None)
    meta = {"step": 3, "config": config.to_dict(cfg), "vocab_size": outputs}
    meta |= pixels if image else {"tokenizer": tokenizer.to_json()}
    net = make_net(ModelConfig.from_config(cfg, outputs, shape))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), "last", checkpoint.join(model=net.state_dict()), meta)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def nets(draw: Random, folder: Path) -> None:
    """A net whose JSON is forged is used as by sample.py or predict.py."""
    image = draw.random() < 0.5
    files = dict(_saved_net(image))
    record = json.loads(files["last.json"])
    files["last.json"] = signed(record | {"meta": mutated_json(draw, record["meta"])})
    for path, content in files.items():
        (folder / path).write_bytes(content)
    if image:
        found = predict.load(folder, "last", "cpu")
        found.probabilities(np.zeros((1, found.side, found.side, found.channels), np.uint8))
    else:
        source, tokenizer, _ = sample.load(folder, "last", "cpu", use_cache=draw.random() < 0.7)
        ids = sample.generate(source, sample.start_ids(tokenizer, "a"), 2, 0.8, 0, 1.0, 1)
        assert "".join(sample.decoded(tokenizer, (token for (token,) in ids)))


def checkpoints(draw: Random, folder: Path) -> object:
    return draw.choices((runs, nets), (4, 1))[0](draw, folder)


# Images, archives, texts


@functools.cache
def _images() -> list[bytes]:
    """Small image files of several formats and modes, some with EXIF, text and several frames."""
    pixels = np.random.default_rng(1).integers(0, 256, (12, 9, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "someone"  # orientation, maker
    found = []
    for mode in ("RGBA", "RGB", "L", "P", "1", "LA", "CMYK", "I;16"):
        image = Image.fromarray(pixels)
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "ICO", "PPM"):
            with contextlib.suppress(OSError, ValueError, KeyError), io.BytesIO() as file:
                more = {"append_images": [image.rotate(90)], "save_all": True} if kind in ("GIF", "WEBP") else {}
                image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}), **more)
                found.append(file.getvalue())
    return found


def _decoded(content: bytes, channels: int) -> bool:
    try:
        assert decode.decode(content, 8, channels).shape == (8, 8, channels)
    except decode.BrokenImage as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__
        return False
    return True


def images(draw: Random, folder: Path) -> bool:
    return _decoded(mutated(draw, draw.choice(_images())), draw.choice((1, 3)))


def folders(draw: Random, folder: Path) -> None:
    """A folder of ten images in two classes, one of them mutated."""
    bad = draw.randrange(10)
    for number in range(10):
        content = draw.choice(_images())
        name = draw.choice(("image", "image.png", ".image", "Thumbs.db", "\udcff.jpg", "ima\nge", "é.JPG"))
        split = draw.choice(("", "", "train", "val")) if number == bad else ""
        path = folder / "mine" / split / "ab"[number % 2] / f"{number}"
        path.mkdir(parents=True)
        (path / name).write_bytes(mutated(draw, content) if number == bad else content)
    found = load_images(f"{folder / 'mine'}/", 8, channels=draw.choice((1, 3)))
    assert len(found.train) == len(found.train_labels) and found.train_labels.max() < len(found.classes)


@functools.cache
def _archive() -> bytes:
    """A small archive in the form of Imagenette's, unpacked."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for number, content in enumerate(_images()[:6]):
                split, wordnet_id = imagenette.SPLITS[number % 2], list(imagenette.CLASSES)[number]
                member = tarfile.TarInfo(f"{imagenette.FOLDER}/{split}/{wordnet_id}/{number}{'é' * (number == 3)}.JPEG")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return file.getvalue()


def archives(draw: Random, folder: Path) -> bool:
    content = _archive()
    if draw.random() < 0.7:
        start = 512 * draw.randrange(len(content) // 512)  # in one block, whose checksum may be made to fit again
        block = mutated(draw, content[start : start + 512])[:512].ljust(512, b"\0")
        if draw.random() < 0.7:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            block = block[:148] + b"%06o\0 " % (total % 8**6) + block[156:]
        content = content[:start] + block + content[start + 512 :]
    content = gzip.compress(content, 1)
    if draw.random() < 0.3:
        content = mutated(draw, content)
    return _archived(content)


def _archived(content: bytes) -> bool:
    found = list(imagenette.read_archive(Found(content, "x.tgz", "y"), 8))
    return any(isinstance(one, imagenette.Sample) for one in found)


@functools.cache
def _idx() -> tuple[bytes, bytes]:
    return struct.pack(">4I", 0x803, 5, 28, 28) + bytes(range(196)) * 20, struct.pack(">2I", 0x801, 5) + bytes(range(5))


def digits(draw: Random, folder: Path) -> object:
    contents = [gzip.compress(mutated(draw, part) if draw.random() < 0.5 else part, 1) for part in _idx()]
    contents = [mutated(draw, part) if draw.random() < 0.2 else part for part in contents]
    found = [Found(content, name, "y") for content, name in zip(contents, ("images.gz", "labels.gz"))]
    pixels, labels = mnist.read_idx_pair(found, [mnist._contents(file) for file in found])
    return len(list(mnist._samples({"train": (pixels, labels)}, 8))) == len(labels)


STORY = ("Once upon a time — naïve “quotes”, 中文, 🙂\r\n\tthere was a long, long, long tail.\n\n" * 12).encode()


def texts(draw: Random, folder: Path) -> None:
    content = STORY if draw.random() < 0.3 else mutated(draw, STORY)
    if draw.random() < 0.2:
        other = draw.choice(("utf-16", "utf-32-be", "utf-16-le", "cp1252", "utf-7"))
        content = content.decode("utf-8", "replace").encode(other, "replace")
    path = folder / "text.txt"
    path.write_bytes(content)
    kind = draw.choice(("char", "bpe"))
    first = text.load_text(str(path), kind, 260)
    read = first.tokenizer.decode([*first.train.tolist(), *first.val.tolist()])
    assert read == content.decode().replace("\ufeff", ""), "another text came out"
    kept = draw.choice(sorted(path for path in (folder / "cache").rglob("*") if path.is_file()))
    if kept.suffix == ".json" and draw.random() < 0.3:
        kept.write_bytes(json.dumps(mutated_json(draw, json.loads(kept.read_bytes()))).encode())
    else:
        kept.write_bytes(mutated(draw, kept.read_bytes()))
    again = text.load_text(str(path), kind, 260, eval_on="tune")
    assert again.tokenizer.to_json() == first.tokenizer.to_json(), "a damaged file of the cache was used"


def json_lines(draw: Random, folder: Path) -> None:
    """A folder with JSON lines, compressed or not."""
    content = b"".join(json.dumps({"text": line}).encode() + b"\n" for line in STORY.decode().split("\n"))
    content = mutated(draw, content) if draw.random() < 0.5 else content
    content = draw.choice((gzip.compress, lzma.compress, bz2.compress, bytes))(content)
    (folder / "a.jsonl").write_bytes(mutated(draw, content) if draw.random() < 0.7 else content)
    loaded = text.load_text(str(folder), "char", 0)
    loaded.tokenizer.decode(loaded.val.tolist())


def metrics(draw: Random, folder: Path) -> None:
    """What a run has logged is damaged; it goes on, and draws its curve."""
    records = [{"step": step, "loss": 2.0, "flips": 0.1, "val_loss": 1.5, "seconds": 1.0} for step in range(1, 9)]
    if draw.random() < 0.5:
        records = mutated_json(draw, records)
    lines = "".join(f"{json.dumps(record)}\n" for record in records) if isinstance(records, list) else ""
    path = folder / "metrics.jsonl"
    path.write_bytes(mutated(draw, lines.encode()))
    Metrics(path, 6).write({"step": 7, "loss": 2.0})
    draw_curve(path, folder / "loss.png", "title")


def data(draw: Random, folder: Path) -> object:
    kinds = {images: 16, folders: 2, archives: 6, digits: 2, texts: 6, json_lines: 3, metrics: 1}
    return draw.choices(list(kinds), list(kinds.values()))[0](draw, folder)


# By hand


def _toml(content: str) -> Hand:
    def case(folder: Path) -> object:
        (folder / "large.toml").write_text(content)
        return config.load([str(folder / "large.toml")])

    return case


def _forged(header: bytes, length: int | None = None) -> Hand:
    def case(folder: Path) -> object:
        files = dict(_saved_run())
        forge(files, "last", packed(header, bytes(64), length))
        for path, content in files.items():
            (folder / path).write_bytes(content)
        return checkpoint.load(folder, "last")

    return case


def _json_nested(folder: Path) -> object:
    (folder / "last.json").write_bytes(b'{"format": ' + DEEP + b"}")
    return checkpoint.load(folder, "last")


def _cut(folder: Path) -> None:
    """A checkpoint cut at every kilobyte is refused, and the one before is named and loads."""
    for step in (1, 2):
        checkpoint.save(folder, "last", {"w": torch.full((8192,), step)}, {"step": step, "losses": [0.5] * 999})
    for file in (folder / "last.json", *folder.glob("last-*2.safetensors")):
        whole = file.read_bytes()
        for end in range(0, len(whole), 1024):
            file.write_bytes(whole[:end])
            with pytest.raises(UserError, match="step 1 is there as 'previous'"):
                checkpoint.load(folder, "last")
        file.write_bytes(whole)
    checkpoint.load(folder, "previous")


def _cache_nested(folder: Path) -> None:
    """A record in the cache that nests without end is replaced."""
    (folder / "text.txt").write_bytes(STORY)
    for _ in range(2):
        text.load_text(str(folder / "text.txt"), "char", 0)
        for kept in (folder / "cache").rglob("*.json"):
            kept.write_bytes(DEEP)


def _zeros(mebibytes: int) -> bytes:
    """So many of them, gzipped."""
    return gzip.compress(bytes(1 << 20)) * mebibytes


def _black(width: int, height: int) -> Hand:
    """A PNG of few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def case(_: Path) -> bool:
        pixels = zlib.compress(bytes(min((width // 8 + 2) * height, 1 << 27)), 1)
        header = struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        return _decoded(png, 3)

    return case


def _header(**tensors: tuple[list[int], int, int]) -> bytes:
    """The header of safetensors: of each its shape, where it begins and where it ends."""
    tables = {name: {"dtype": "U8", "shape": shape, "data_offsets": at} for name, (shape, *at) in tensors.items()}
    return json.dumps(tables).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE: dict[str, Hand] = {
    "a TOML of 100 MB": _toml("# nothing\n" * 10_000_000),
    "a TOML of 100 MB of keys": _toml('[[x]]\nk.a.b."c" = 0.5\n' * 4_000_000),
    "a TOML nested 100,000 deep": _toml(f"k = {DEEP.decode()}"),
    "a TOML key of 100,000 parts": _toml("k" + ".k" * 100_000 + " = 1"),
    "a number of 100,000 digits": _toml("steps = 0x" + "f" * 100_000),
    "a checkpoint's JSON nested 100,000 deep": _json_nested,
    "a checkpoint cut at every kilobyte": _cut,
    "a safetensors header of 2^60 bytes": _forged(b"{}", 2**60),
    "a safetensors header nested 100,000 deep": _forged(b'{"a": ' + DEEP + b"}"),
    "safetensors whose tensors overlap": _forged(_header(a=([48], 0, 48), b=([48], 16, 64))),
    "safetensors of 2^80 numbers": _forged(_header(a=([2**40, 2**40], 0, 64))),
    "a record in the cache nested 100,000 deep": _cache_nested,
    "64 GiB of zeros as MNIST's images": lambda _: mnist._contents(Found(_zeros(1 << 16), "images.gz", "y")),
    "64 GiB of zeros after an archive": lambda _: _archived(gzip.compress(_archive()) + _zeros(1 << 16)),
    "a PNG of 30,000 x 30,000 pixels": _black(30_000, 30_000),
    "a PNG of 2^31 - 1 x 1 pixels": _black(2**31 - 1, 1),
    "a PNG of 7,000 x 7,000 pixels": _black(7000, 7000),
}


# Running

KINDS: dict[str, Case] = {"configs": configs, "checkpoints": checkpoints, "data": data}


class TooLong(BaseException):
    """A case took more than SECONDS. No reader catches it."""


@dataclass
class Report:
    """How the cases of a kind ended."""

    accepted: int = 0
    refused: int = 0
    slowest: tuple[float, int] = (0.0, 0)  # seconds, and which case
    failures: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # by what and where: each case, in words


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Nothing is printed, MEMORY more than now can be had, and a timer that runs out raises TooLong."""

    def stop(*_: object) -> None:
        raise TooLong

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        with open(os.devnull, "w") as nothing, warnings.catch_warnings(action="ignore"):
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def where(error: BaseException) -> str:
    """An error's type and the place in this repository that it passed last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name != "stop" and ".venv" not in f.filename]
    last = next(f for f in reversed(frames) if f.filename.startswith(str(ROOT)))
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def run(kind: str, count: int, seed: int, first: int = 0) -> Report:
    """Try cases first .. first + count - 1 of a kind."""
    report = Report()
    with tempfile.TemporaryDirectory() as temporary, limits(), pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary, "case")
        patch.setenv("NANOGFT_CACHE", str(folder / "cache"))
        for number in range(first, first + count):
            draw = Random(f"{kind} {seed} {number}")
            case = list(HOSTILE.values())[number] if kind == "hostile" else functools.partial(KINDS[kind], draw)
            folder.mkdir()
            begun = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                read = case(folder) is not False
                report.accepted, report.refused = report.accepted + read, report.refused + (not read)
            except UserError as error:
                report.refused += 1
                if isinstance(error.__cause__, MemoryError):
                    report.failures.setdefault("too much memory", []).append((number, str(error)))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # Rust's panics are no Exceptions
                report.failures.setdefault(where(error), []).append((number, str(error)))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            report.slowest = max(report.slowest, (time.monotonic() - begun, number))
            shutil.rmtree(folder)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Feed mutated input to the readers.")
    names = (*KINDS, "hostile")
    parser.add_argument("kinds", nargs="*", choices=[*names, []], help=f"{', '.join(names)}; none: all of them")
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    failed = 0
    for kind in given.kinds or names:
        count = min(given.cases, len(HOSTILE) - given.first) if kind == "hostile" else given.cases
        report = run(kind, count, given.seed, given.first)
        seconds, number = report.slowest
        bad = sum(map(len, report.failures.values()))
        print(f"{kind}: {count:,} cases, {report.accepted:,} read, {report.refused:,} refused, {bad:,} failed; "
              f"the slowest, {number}, took {seconds:.2f} s", flush=True)  # fmt: skip
        for what, cases in report.failures.items():
            number, words = cases[0]
            again = f"python -m tests.fuzz {kind} --seed {given.seed} --first {number} --cases 1"
            print(f"  {what}, {len(cases):,} times; first: {words[:200]!r}\n    {again}", flush=True)
        failed += bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
