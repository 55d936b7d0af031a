"""A folder of one's own images, in which each class has a folder: FOLDER/train/CLASS/* and FOLDER/val/CLASS/*, or
FOLDER/CLASS/* alone.

Without val/ a tenth of each class is held out to evaluate on: the images whose hashes are the smallest, so that copies
of an image stay together and a new image moves hardly any other. Files are read where they are. Content decides what is
an image; the others are named and left out, hidden files and __MACOSX in silence.
"""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data.cache import places
from data.notice import few, notice, with_count
from data.prepare_images import Broken, ImageSource, Sample, decoded
from run.errors import UserError

EVALUATED = ("val", "valid", "validation", "test")  # the first of them that there is, beside train
SHARE = 10  # without one, an image in so many is held out
LAYOUT = ("For images, give each class a folder of its own: FOLDER/CLASS/*, or FOLDER/train/CLASS/* and "
          "FOLDER/val/CLASS/*. For texts, give a folder of .txt or .jsonl files and no image.")  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    split: str  # "train" or "val"
    name: str  # of the class
    path: Path
    digest: bytes  # sha256 of the content


def find(name: str, data_dir: str, channels: int) -> ImageSource:
    """The images of the folder `name`, where data.cache.places says, to be decoded with 3 channels or 1.

    Raises UserError when there is no such folder, or no images of two classes in it.
    """
    top = _top(name, data_dir)
    left_out: list[str] = []
    files = _listed(top, left_out)
    if left_out:
        notice(f"{len(left_out):,} files and folders in {top} are not used: {few(left_out)}.")
    classes = _classes(top, files)
    held_out = ""
    if all(file.split == "train" for file in files):
        files = _split(files)
        held_out = f"; one in {SHARE} of each class, chosen by hash, is held out to evaluate on"
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.path.relative_to(top).as_posix()) + b"\0" + file.digest)

    def samples(side: int) -> Iterator[Sample | Broken]:
        for file in files:
            relative = ascii(file.path.relative_to(top).as_posix())
            yield decoded(file.split, classes.index(file.name), relative, file.path.read_bytes, side, channels)

    source = f"{top}, because data names this folder{held_out}"
    return ImageSource(top.name, classes, channels, digest.hexdigest(), source, samples)


def files_in(top: str | Path, fault: Callable[[str, str], None]) -> Iterator[str]:
    """The files below `top`, in the order of their names, links followed. No hidden files, nor pipes and devices, which
    might never end. `fault` is told of folders that cannot be read, and why.
    """
    seen = set()
    for folder, subfolders, names in os.walk(top, onerror=lambda e: fault(e.filename, e.strerror), followlinks=True):
        place = os.stat(folder)
        again = (place.st_dev, place.st_ino) in seen  # by a link, which may lead around for ever
        seen.add((place.st_dev, place.st_ino))
        subfolders[:] = [] if again else sorted(filter(_shown, subfolders))
        for name in [] if again else sorted(filter(_shown, names)):
            path = os.path.join(folder, name)
            if os.path.isfile(path) or not os.path.exists(path):  # a dead link is a file that cannot be read
                yield path


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _top(name: str, data_dir: str) -> Path:
    candidates = places(name, data_dir)
    for place in candidates:
        if place.is_dir():
            return place.resolve()
    looked = " and ".join(dict.fromkeys(map(str, candidates)))
    raise UserError(f"data = {name!r} names a folder of images, and there is no such folder (looked for {looked}).", 2)


def _listed(top: Path, left_out: list[str]) -> list[ImageFile]:
    """The images of all classes; `left_out` takes up the other files, each with the reason."""
    from data.decode import BrokenImage, check, read_file

    def fault(path: str, why: str) -> None:
        raise UserError(f"{path} cannot be read: {why}. Images to train on may be in it; make it readable.")

    splits = {"train": top}
    if (top / "train").is_dir() and _folders(top / "train"):  # it might be a class of that name
        splits["train"] = top / "train"
        splits |= {"val": top / name for name in EVALUATED[::-1] if (top / name).is_dir()}
        left_out += [f"{name}/: not in train/" for name in _folders(top) if top / name not in splits.values()]
    for root in dict.fromkeys((top, *splits.values())):
        left_out += [f"{name}: in no class's folder" for name in sorted(filter(_shown, os.listdir(root)))
                     if not (root / name).is_dir()]  # fmt: skip
    paths = ((split, folder, path) for split, root in splits.items() for folder in _folders(root)
             for path in files_in(root / folder, fault))  # fmt: skip
    files = []
    for split, folder, path in with_count(paths, f"reading the files in {top}"):
        try:
            content = read_file(path)
            check(content)
        except (BrokenImage, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            left_out.append(f"{ascii(os.path.relpath(path, top))}: {why}")
        else:
            files.append(ImageFile(split, _class_name(folder), Path(path), hashlib.sha256(content).digest()))
    return files


def _folders(root: Path) -> list[str]:
    return sorted(name for name in filter(_shown, os.listdir(root)) if (root / name).is_dir())


def _class_name(folder: str) -> str:
    """The folder's name as it can be compared and printed: a Mac takes letters and accents apart."""
    name = unicodedata.normalize("NFC", folder)
    return name if name.isprintable() else ascii(name)


def _classes(top: Path, files: list[ImageFile]) -> tuple[str, ...]:
    """The names of the classes, sorted. Raises UserError for fewer than two, and for one that is not trained."""
    found = {split: {file.name for file in files if file.split == split} for split in ("train", "val")}
    if not files:
        names = [os.path.relpath(path, top) for path in files_in(top, lambda path, why: None)]
        seen = f"it has {len(names):,} files ({few(names)})" if names else "it has no files"
        raise UserError(f"{top} holds no images in class folders: {seen}. {LAYOUT}", 2)
    if len(found["train"]) < 2:
        seen = ", ".join(found["train"]) or "none"
        raise UserError(f"{top} holds images to train on of fewer than two classes: {seen}. {LAYOUT}", 2)
    if unknown := sorted(found["val"] - found["train"]):
        raise UserError(f"{top}: there is nothing to train on of {few(unknown)}, which are to be evaluated on; give "
                        "both parts the same class folders.", 2)  # fmt: skip
    return tuple(sorted(found["train"]))


def _split(files: list[ImageFile]) -> list[ImageFile]:
    """The same files, a share of each class moved to "val"; at least one where a class has two that differ."""
    held_out = set()
    for name in {file.name for file in files}:
        hashes = sorted({file.digest for file in files if file.name == name})
        held_out |= {(name, digest) for digest in hashes[: max(len(hashes) // SHARE, len(hashes) > 1)]}
    return [replace(file, split="val") if (file.name, file.digest) in held_out else file for file in files]
