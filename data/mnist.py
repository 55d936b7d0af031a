"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28, in four gzipped IDX files.

The official hashes are those of the unpacked contents, since the same images packed by another gzip are as good.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import Found, OfficialFile, find_official, sha256
from data.prepare_images import ImageSource, Sample
from run.errors import UserError

IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # unsigned bytes in three dimensions, in one
ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
LARGEST_UNPACKED = 1 << 27  # bytes


@dataclass(frozen=True)
class GzippedFile(OfficialFile):
    """An official file whose `sha256` is that of its contents, `unpacked` bytes; `size` is the packed one."""

    unpacked: int = 0

    def fault(self, content: bytes) -> str:
        try:
            inside = _unpack(content, self.unpacked + 1)
        except (OSError, EOFError, zlib.error) as error:
            return f"truncated or not gzip ({error}): {len(content):,} bytes, sha256 {sha256(content)}"
        seen = sha256(inside)
        if seen == self.sha256:
            return ""
        size = f"{len(inside):,}" if len(inside) <= self.unpacked else f"more than {self.unpacked:,}"
        return (
            f"altered: {size} bytes when unpacked, sha256 {seen}; "
            f"the official contents have {self.unpacked:,} bytes, sha256 {self.sha256}"
        )


def _official(name: str, size: int, unpacked: int, digest: str) -> GzippedFile:
    return GzippedFile(f"mnist/{name}", ADDRESS + name, size, digest, unpacked=unpacked)


FILES = {  # split -> images, labels
    "train": (
        _official(
            "train-images-idx3-ubyte.gz", 9_912_422, 47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        _official(
            "train-labels-idx1-ubyte.gz", 28_881, 60_008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    ),
    "val": (
        _official(
            "t10k-images-idx3-ubyte.gz", 1_648_877, 7_840_016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        _official(
            "t10k-labels-idx1-ubyte.gz", 4_542, 10_008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def find(data_dir: str = "") -> ImageSource:
    """The four files and where they are. `sha256` is that of the four contents, one after the other.

    Raises UserError when a file is nowhere to be found, is damaged, or does not match the others.
    """
    way_out = "run once where the address can be reached: the cache keeps it"
    found = {split: [find_official("mnist", file, data_dir, way_out) for file in FILES[split]] for split in FILES}
    contents = {split: [_contents(file) for file in found[split]] for split in FILES}
    arrays = {split: read_idx_pair(found[split], contents[split]) for split in FILES}
    files = [file for split in FILES for file in found[split]]
    places = dict.fromkeys(f"{Path(file.where).parent}, because {file.why}" for file in files)
    return ImageSource(
        name="mnist",
        classes=tuple("0123456789"),
        channels=1,
        sha256=sha256(b"".join(contents["train"] + contents["val"])),
        source="; ".join(places),
        samples=lambda side: _samples(arrays, side),
    )


def read_idx_pair(found: list[Found], contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) and labels (N,), both uint8, from two IDX files. Raises UserError naming what does not fit."""
    images = _read_idx(found[0].where, contents[0], IMAGES_MAGIC)
    labels = _read_idx(found[1].where, contents[1], LABELS_MAGIC)
    if len(images) != len(labels):
        raise UserError(
            f"{found[0].where} has {len(images):,} images and {found[1].where} {len(labels):,} labels; they must be as "
            "many. Take both from the same place."
        )
    if labels.size and labels.max() > 9:
        where = int(labels.argmax())
        raise UserError(f"{found[1].where}: label {where} is {labels[where]}, not 0 to 9. Take the official file.")
    return images, labels


def _read_idx(where: str, content: bytes, magic: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes: magic and sizes as big-endian 32-bit numbers, then the values."""
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise UserError(f"{where} is truncated: {len(content)} bytes, its header alone has {header}. Get it again.")
    seen, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if seen != magic:
        kind = "images" if magic == IMAGES_MAGIC else "labels"
        raise UserError(
            f"{where} is not an IDX file of {kind}: it starts with 0x{seen:08x}, not 0x{magic:08x}. Were images and "
            "labels exchanged?"
        )
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected or 0 in shape:
        fault = "truncated" if len(content) < expected else "not what its header says"
        raise UserError(
            f"{where} is {fault}: {len(content):,} bytes when unpacked, where its header promises "
            f"{' x '.join(map(str, shape))} values, {expected:,} bytes in all. Get it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _samples(arrays: dict[str, tuple[np.ndarray, np.ndarray]], side: int) -> Iterator[Sample]:
    for split, (images, labels) in arrays.items():
        squares = images[..., None] if images.shape[1:] == (side, side) else _resized(images, side)
        for pixels, label in zip(squares, labels.tolist()):
            yield Sample(split, label, pixels)


def _resized(images: np.ndarray, side: int) -> Iterator[np.ndarray]:
    from PIL import Image

    from data.decode import square

    for pixels in images:
        yield np.asarray(square(Image.fromarray(pixels), side))[..., None]


def _contents(found: Found) -> bytes:
    try:
        content = _unpack(found.content, LARGEST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{found.where} is truncated or not gzip ({error}): {len(found.content):,} bytes. It must be a whole .gz "
            f"file; the official one is at {ADDRESS}."
        ) from error
    if len(content) > LARGEST_UNPACKED:
        raise UserError(f"{found.where} unpacks to more than {LARGEST_UNPACKED:,} bytes, which MNIST never has.")
    return content


def _unpack(content: bytes, limit: int) -> bytes:
    """At most `limit` bytes of what the gzip file `content` holds. Raises OSError, EOFError or zlib.error."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return file.read(limit)
