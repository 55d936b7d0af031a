"""Imagenette: ten easy classes of ImageNet, 9,469 training and 3,925 validation images, shorter side 160 pixels.

Images are read straight out of the archive, in its order; nothing of it is unpacked to disk. A member that lies outside
the archive's folder or is no plain file condemns the whole archive; an image that cannot be decoded is left out, and so
are hidden files and __MACOSX, which a Mac adds.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath

from data.cache import Found, OfficialFile, find_official, sha256
from data.prepare_images import Broken, ImageSource, Sample, decoded
from run.errors import UserError

SQUASHED = "76d10bfe68bbc15c10aa8438c0921a1f3085e0af57c72ee512a93b40bb9e7ef6"
FILE = OfficialFile(  # md5 e793b78cc4c9e9a4ccc0c1155377a412
    path="imagenette/imagenette2-160.tgz",
    url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
    size=99_003_388,
    sha256="64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
    also=(SQUASHED,),
)
FOLDER = "imagenette2-160"
SPLITS = ("train", "val")
CLASSES = {  # WordNet id, which names the folder, to the name for people
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
LARGEST_FILE, LARGEST_UNPACKED = 64 << 20, 1 << 29  # bytes


def find(data_dir: str = "") -> ImageSource:
    """The archive and where it is. Raises UserError when no place has it."""
    way_out = "run once where the address can be reached: the cache keeps it"
    found = find_official("imagenette", FILE, data_dir, way_out)
    digest = sha256(found.content)
    kind = " (all images, but squashed to 160 x 160 and compressed again)" if digest == SQUASHED else ""
    return ImageSource(
        name="imagenette",
        classes=tuple(CLASSES.values()),
        channels=3,
        sha256=digest,
        source=f"{found.where}{kind}, because {found.why}",
        samples=lambda side: read_archive(found, side),
    )


def read_archive(found: Found, side: int) -> Iterator[Sample | Broken]:
    """The images of the archive in its order, (side, side, 3). Raises UserError for a damaged or a hostile archive."""
    labels = {wordnet_id: label for label, wordnet_id in enumerate(CLASSES)}
    name = ""
    try:
        with (
            io.BufferedReader(_Unpacked(fileobj=io.BytesIO(found.content)), 1 << 16) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r:") as archive,
        ):
            for member in archive:
                name = member.name
                if reason := _refusal(member):
                    raise UserError(
                        f"{found.where}: its member {name!r} {reason}. An archive with such a member is not used at "
                        f"all: take the official one, {FILE.url}."
                    )
                parts = PurePosixPath(name).parts
                if not member.isfile() or len(parts) != 4 or parts[1] not in SPLITS or _of_a_mac(parts):
                    continue
                split, label = parts[1], labels[parts[2]]
                if member.size > LARGEST_FILE:
                    yield Broken(split, repr(name), f"{member.size:,} bytes are more than {LARGEST_FILE:,}")
                    continue
                content = archive.extractfile(member).read()
                yield decoded(split, label, repr(name), lambda: content, side, channels=3)
            unpacked.seek(archive.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
            if unpacked.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the header of the next one cannot be read")
            while unpacked.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError, MemoryError) as error:
        place = f"after its member {name!r}" if name else "at its start"
        raise UserError(
            f"{found.where} is damaged {place} ({error or type(error).__name__}): {len(found.content):,} bytes, sha256 "
            f"{sha256(found.content)}. It must be a whole .tgz; the official one has {FILE.size:,} bytes and is at "
            f"{FILE.url}."
        ) from error


class _Unpacked(gzip.GzipFile):
    """Raises OSError once more has come out than such an archive holds; a small file can hold terabytes of zeros."""

    def read(self, size: int = -1) -> bytes:
        if self.tell() > LARGEST_UNPACKED:
            raise gzip.BadGzipFile(f"it unpacks to more than {LARGEST_UNPACKED:,} bytes")
        return super().read(min(size, 1 << 20))


def _refusal(member: tarfile.TarInfo) -> str:
    """Why `member` may not be in such an archive; empty when it may."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return f"points outside the archive's folder {FOLDER}"
    if not (member.isfile() or member.isdir()):
        return "is a link or a device, not a file"
    if member.size < 0:  # tarfile would go back by so much, for ever
        return f"claims to have {member.size} bytes"
    if _of_a_mac(path.parts):
        return ""
    if path.parts[:1] not in ((), (FOLDER,)):
        return f"lies outside the archive's folder {FOLDER}"
    if len(path.parts) == 4 and path.parts[1] in SPLITS and path.parts[2] not in CLASSES:
        return f"is in a folder that is none of the classes {', '.join(CLASSES)}"
    return ""


def _of_a_mac(parts: tuple[str, ...]) -> bool:
    """Whether a path is one that a Mac adds to an archive: ._NAME with a file's attributes, .DS_Store, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
