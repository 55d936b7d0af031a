"""Images as uint8 arrays on disk: decoded and resized once per source and side length, then memory-mapped.

Three files in the cache: `prepared/<name>-train.npy`, `<name>-val.npy` and `<name>.json` (labels, per-channel mean and
spread, what was left out, hashes). <name> is the start of the source's sha256, side and channels, and the format.
As with texts, the same name means the same bytes, and the json goes last: processes that prepare at the same time
replace each other's files by equal ones. The arrays are written image by image: only those held out are in memory.

Every tenth training image of each class, counted in the source's order, comes last in train.npy: the images that are
held out for tuning and those that are left are both slices of one mapped file. Mean and spread are those of the images
that are left, so that they are the same for both ways to evaluate and have never seen a held-out image.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.cache import Damaged, cache_root, open_atomic, read_record, remove_leftovers, write_record
from data.notice import notice, with_count
from run.errors import UserError

FORMAT = 3  # goes up when the same source and side give other files
HELD_OUT = 10  # one training image in so many is held out for tuning


@dataclass(frozen=True, eq=False)
class Sample:
    split: str  # "train" or "val"
    label: int
    pixels: np.ndarray  # (side, side, channels) uint8
    blank: str = ""  # the image's name, if all its pixels have one colour


@dataclass(frozen=True)
class Broken:
    """An image that is left out: its name in the source and why."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A data set that was found. `samples(side)` decodes it, in an order that depends on its bytes alone."""

    name: str
    classes: tuple[str, ...]
    channels: int
    sha256: str
    source: str  # "<where>, because <why>"
    samples: Callable[[int], Iterator[Sample | Broken]]


def decoded(
    split: str, label: int, name: str, read: Callable[[], bytes], side: int, channels: int
) -> Sample | Broken:
    """The image file that `read` gives, decoded; see data/decode.py."""
    # Only here, and with it Pillow, which images that are prepared do not need.
    from data.decode import BrokenImage, decode, is_blank

    try:
        pixels = decode(read(), side, channels)
        return Sample(split, label, pixels, name if is_blank(pixels) else "")
    except (BrokenImage, OSError) as error:
        return Broken(split, name, str(error))


@dataclass(frozen=True, eq=False)
class PreparedImages:
    train: np.ndarray  # (N, side, side, channels) uint8, read-only; train[kept:] is held out for tuning
    val: np.ndarray  # like train
    train_labels: np.ndarray  # (N,) int64
    val_labels: np.ndarray  # like train_labels
    kept: int
    mean: tuple[float, ...]  # per channel, of train[:kept] / 255
    std: tuple[float, ...]
    skipped: dict[str, list[str]]  # split -> "name: reason" of each image left out
    blank: list[str]  # names of images that have one colour only


def load_prepared(source: ImageSource, side: int) -> PreparedImages | None:
    """What an earlier run prepared, memory-mapped; None, with a notice if there is damage, when it must be made."""
    stem = _stem(source, side)
    try:
        record = read_record(_json(stem))
        remove_leftovers(stem)
        return _prepared(record, _map(_array(stem, "train"), record), _map(_array(stem, "val"), record))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, Damaged) as error:
        notice(f"the prepared files {stem}* are not used ({error}); preparing again.")
        return None


def prepare(source: ImageSource, side: int) -> PreparedImages:
    """Decodes `source` and keeps it in the cache; where that cannot be written, in memory only.

    Raises UserError when the source is damaged, or has nothing to train on or nothing to evaluate on.
    """
    stem = _stem(source, side)
    notice(f"decoding {source.name} to {side} x {side} pixels (once).")
    try:
        remove_leftovers(stem)
        with open_atomic(_array(stem, "train")) as train, open_atomic(_array(stem, "val")) as val:
            record = _write(source, side, train, val)
        for split in ("train", "val"):
            record[_array(stem, split).name] = _digest(_array(stem, split))
        write_record(_json(stem), record)
        arrays = [np.load(_array(stem, split), mmap_mode="r") for split in ("train", "val")]
    except OSError as error:
        notice(
            f"the prepared images cannot be kept in {stem.parent} ({error.strerror or error}); they are decoded again "
            "and stay in memory, in this run and in the next. NANOGFT_CACHE=FOLDER names another cache."
        )
        buffers = io.BytesIO(), io.BytesIO()
        record = _write(source, side, *buffers)
        arrays = [_from_memory(buffer) for buffer in buffers]
    return _prepared(record, *arrays)


class _ArrayWriter:
    """A .npy file of uint8 images, written one by one; numpy pads the header so that a longer count fits later."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self._file, self._shape = file, shape
        self.labels: list[int] = []
        self._header()

    def add(self, label: int, pixels: bytes) -> None:
        self._file.write(pixels)
        self.labels.append(label)

    def finish(self) -> None:
        self._file.seek(0)
        self._header()

    def _header(self) -> None:
        shape = (len(self.labels), *self._shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write(source: ImageSource, side: int, train_file: BinaryIO, val_file: BinaryIO) -> dict[str, Any]:
    """Decodes every image into the two files; the record without the files' hashes."""
    shape = (side, side, source.channels)
    train, val = _ArrayWriter(train_file, shape), _ArrayWriter(val_file, shape)
    seen: Counter[int] = Counter()
    held_out: list[tuple[int, bytes]] = []
    total, squares = np.zeros(source.channels, np.int64), np.zeros(source.channels, np.int64)
    skipped: dict[str, list[str]] = {"train": [], "val": []}
    blank: list[str] = []
    for sample in with_count(source.samples(side), f"decoding {source.name}"):
        if isinstance(sample, Broken):
            skipped[sample.split].append(f"{sample.name}: {sample.reason}")
            continue
        if sample.blank:
            blank.append(sample.blank)
        if sample.split == "val":
            val.add(sample.label, sample.pixels.tobytes())
        else:
            seen[sample.label] += 1
            if seen[sample.label] % HELD_OUT == 0:
                held_out.append((sample.label, sample.pixels.tobytes()))
                continue
            train.add(sample.label, sample.pixels.tobytes())
            values = sample.pixels.reshape(-1, source.channels).astype(np.int64)
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
    kept = len(train.labels)
    if not kept or not val.labels:
        missing = "train on" if not kept else "evaluate on"
        broken = sum(map(len, skipped.values()))
        raise UserError(
            f"{source.source}: it holds no image to {missing} ({kept} for training, {len(val.labels)} for evaluation, "
            f"{broken} broken). Give it whole, or more images."
        )
    for label, pixels in held_out:
        train.add(label, pixels)
    for writer in (train, val):
        writer.finish()
    mean = total / (kept * side * side * 255)
    variance = squares / (kept * side * side * 255**2) - mean**2
    return {
        "train_labels": train.labels,
        "val_labels": val.labels,
        "kept": kept,
        "mean": mean.tolist(),
        "std": np.sqrt(variance.clip(1 / 255**2)).tolist(),  # at least one level: it is divided by
        "skipped": skipped,
        "blank": blank,
    }


def _prepared(record: dict[str, Any], train: np.ndarray, val: np.ndarray) -> PreparedImages:
    labels = [np.array(record[name], dtype=np.int64) for name in ("train_labels", "val_labels")]
    mean, std = tuple(record["mean"]), tuple(record["std"])
    return PreparedImages(train, val, *labels, record["kept"], mean, std, record["skipped"], record["blank"])


def _map(path: Path, record: dict[str, Any]) -> np.ndarray:
    """The array in `path`, memory-mapped, its hash checked. Raises OSError or Damaged."""
    if _digest(path) != record[path.name]:
        raise Damaged(f"{path.name} has changed since it was written")
    return np.load(path, mmap_mode="r")


def _from_memory(buffer: io.BytesIO) -> np.ndarray:
    """The array of a .npy file in memory, without a copy, read-only."""
    buffer.seek(0)
    np.lib.format.read_magic(buffer)
    shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
    array = np.frombuffer(buffer.getbuffer(), dtype, offset=buffer.tell()).reshape(shape)
    array.flags.writeable = False
    return array


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stem(source: ImageSource, side: int) -> Path:
    return cache_root() / "prepared" / f"{source.sha256[:32]}-{side}x{source.channels}-v{FORMAT}"


def _array(stem: Path, split: str) -> Path:
    return stem.with_name(f"{stem.name}-{split}.npy")


def _json(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")
