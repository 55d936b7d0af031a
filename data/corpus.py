"""The texts that `data` names: a file, a folder, a glob or a list of these, as one stream of documents.

A file is plain UTF-8 or JSON lines with a "text" (.jsonl), as it is or compressed (gzip, xz, bzip2). A file or folder
called train, val, valid, validation or test, or so and a number or the like (train_00.txt.xz), is that part; where none
is for validation, the last tenth of what there is to train on is held out.
"""

import difflib
import glob
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from data.cache import places
from data.image_folder import files_in
from data.notice import few, notice, with_bar
from data.textfile import TextSource
from data.tokenizers import END
from run.config import TEXT_NAME
from run.errors import UserError

SPLITS = ("train", "val", "test")
SPLIT = re.compile(r"(train|val|test)(?:id|idation|ing)?(?=[_.\d-]|$)", re.I)  # at the beginning of a name
BESIDE = re.compile(r"readme|licen[cs]e|notice|source|sha256sums", re.I)  # stems of files about a folder's texts


@dataclass(frozen=True)
class Corpus:
    """Texts to read one after the other: to train on, to validate and to test. `where` they are, and `why` these are
    used, in words."""

    files: tuple[TextSource, ...]
    where: str
    why: str

    @cached_property
    def digests(self) -> list[str]:
        """sha256 of each file, as stored."""
        read = [0]
        bar = with_bar(self.files, self._size, f"reading {self.where}", lambda: read[0])
        return [file.sha256(lambda size: _add(read, size)) for file in bar]

    def sha256(self) -> str:
        """Of the file's bytes; of several, of their parts and hashes. Raises UserError if one cannot be read."""
        first = self.files[0]
        if len(self.files) == 1 and not first.split and not first.json_lines:
            return self.digests[0]
        known = [[file.split, file.json_lines, digest] for file, digest in zip(self.files, self.digests)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def chunks(self, doing: str) -> Iterator[str]:
        """The text of all files, END between those of one part; `doing` says what for. Raises as TextSource.chunks."""
        read = [0]
        texts = (text for _, texts in self._texts(read) for text in texts)
        return with_bar(texts, self._size, f"{doing} {self.where}", lambda: read[0])

    def survey(self) -> tuple[list[int], set[str]]:
        """How many characters each of SPLITS has, and which there are. Raises UserError, also where that is no text."""
        chars, alphabet, read = dict.fromkeys(SPLITS, 0), set(), [0]
        surveys = ((file.split or "train", file.survey(texts)) for file, texts in self._texts(read))
        for split, (count, here) in with_bar(surveys, self._size, f"checking {self.where}", lambda: read[0]):
            chars[split] += count
            alphabet |= here
        if not "".join(alphabet - {END}).strip():
            count = sum(chars.values())
            what = f"holds nothing but white space ({count:,} characters)" if count else "is empty"
            raise UserError(f"{self.where} {what}. A text to train on needs thousands of characters; give another.")
        if "\r" in alphabet:
            notice(f"{self.where} has carriage returns, as Windows ends lines; they are kept like other characters.")
        return list(chars.values()), alphabet

    def changed(self) -> UserError:
        return self.files[0].changed() if len(self.files) == 1 else replace(self.files[0], where=self.where).changed()

    @cached_property
    def _size(self) -> int:
        return sum(file.size() for file in self.files)

    def _texts(self, read: list[int]) -> Iterator[tuple[TextSource, Iterator[str]]]:
        """Each file and its text. With every file but the first of a part comes the END before it."""
        ended = True
        before = None

        def joined(file: TextSource, digest: str) -> Iterator[str]:
            nonlocal ended
            if not ended and before == file.split:
                yield END
            for text in file.chunks(digest, lambda size: _add(read, size)):
                ended = text.endswith(END) if text else ended
                yield text

        for file, digest in zip(self.files, self.digests):
            yield file, joined(file, digest)
            before = file.split


def _add(total: list[int], size: int) -> None:
    total[0] += size


def find(name: str, data_dir: str, known_names: Iterable[str]) -> Corpus:
    """The texts that `name` means: a file, a folder, a glob, or a list of these with commas.

    Raises UserError, with the closest name there is, when one is missing, no text is there, or it is no file.
    """
    items = list(filter(None, map(str.strip, name.split(",")))) or [name]
    whole = _found(name, data_dir)
    named = [whole] if whole else [_found(item, data_dir) or _missing(item, data_dir, known_names) for item in items]
    where = few(list(dict.fromkeys(place for place, _ in named)))
    if not whole:  # a folder's name tells the part of what is in it, where several are named
        named = [(place, [replace(file, split=file.split or _part(item)) for file in files])
                 for item, (place, files) in zip(items, named, strict=True)]  # fmt: skip
    unique = {file.where: file for file in sorted((file for _, files in named for file in files), key=_order)}
    found = sorted(unique.values(), key=_order)
    to_train_on = any(file.split in ("", "train") for file in found)
    if len(found) == 1 and (to_train_on or found[0].where == where):  # by itself any file is trained on
        return Corpus((replace(found[0], split=""),), found[0].where, "data names this file")
    if not to_train_on:
        seen = few([file.where for file in found])
        raise UserError(f"data = {name!r} has texts to validate or to test with and none to train on ({seen}). Name a "
                        "file by itself to train on it.", 2)  # fmt: skip
    found = [replace(file, split=file.split or "train") for file in found]
    about = {split: sum(file.split == split for file in found) for split in SPLITS}
    counted = ", ".join(f"{number:,} for {split}" for split, number in about.items() if number)
    return Corpus(tuple(found), where, f"data names these {len(found):,} files ({counted})")


def _part(item: str) -> str:
    """The split that an item of a list is called, such as set/val or set/val/*; "" if it is not called so."""
    literal = [part for part in Path(item).parts if not glob.has_magic(part)]
    found = SPLIT.match(literal[-1]) if literal else None
    return found[1].lower() if found else ""


def _order(file: TextSource) -> int:
    return SPLITS.index(file.split or "train")


def _found(name: str, data_dir: str) -> tuple[str, list[TextSource]] | None:
    """Where one item is, and its files, sorted by name; None if there is no such item."""
    for path in places(name, data_dir):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise UserError(f"data = {name!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if stat.S_ISDIR(mode):
            return str(path), _in_folder(path)
        if not stat.S_ISREG(mode):
            raise UserError(
                f"data = {name!r} is a pipe or a device. A text is read more than once, so it must be a file: save "
                "it as one first.",
                code=2,
            )
        return str(path), [_source(path, path.name)]
    for path in places(name, data_dir) if glob.has_magic(name) else []:
        if matches := sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)):
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            return str(path), [_source(Path(match), os.path.relpath(match, fixed)) for match in matches]
    return None


def _in_folder(top: Path) -> list[TextSource]:
    """The texts below `top`. Where some are named train, only those whose names or folders tell their part."""

    def fault(path: str, why: str) -> None:
        raise UserError(f"{path} cannot be read: {why}. Texts to train on may be in it; make it readable.")

    paths = (Path(path) for path in files_in(top, fault))
    found = [_source(path, str(path.relative_to(top))) for path in paths if TEXT_NAME.search(path.name)]
    if about := [text for text in found if BESIDE.fullmatch(TEXT_NAME.sub("", os.path.basename(text.where)))]:
        names = few([os.path.relpath(text.where, top) for text in about])
        notice(f"{len(about):,} texts in {top} are not used, as by their names they are about the others: {names}.")
        found = [text for text in found if text not in about]
    told = any(text.split == "train" for text in found)
    texts = [text for text in found if text.split or not told]
    if left_out := [os.path.relpath(text.where, top) for text in found if text not in texts]:
        notice(f"{len(left_out):,} texts in {top} are not used, as their names tell no part: {few(left_out)}.")
    if not texts:
        raise UserError(f"{top} is a folder without texts. They end in .txt or .jsonl, or in one of these and .gz, "
                        ".xz or .bz2; any other text can be named as a file.", 2)  # fmt: skip
    return texts


def _source(path: Path, name: str) -> TextSource:
    """A file to read; the first part of `name`, a path in the folder that was named, that tells a split gives it."""
    found = next(filter(None, map(SPLIT.match, Path(name).parts)), None)
    kind = TEXT_NAME.search(path.name)
    json_lines = bool(kind) and kind[1].lower() == "jsonl"
    return TextSource(lambda: open(path, "rb"), str(path), found[1].lower() if found else "", json_lines)


def _missing(name: str, data_dir: str, known_names: Iterable[str]) -> None:
    """Raises UserError."""
    candidates, known_names = places(name, data_dir), sorted(known_names)
    looked = " and ".join(str(path) for path in candidates)
    message = f"data = {name!r} is neither a known data set nor an existing file (looked for {looked})."
    closest = difflib.get_close_matches(name, known_names, n=1)
    for path in candidates:
        try:
            beside = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
        except OSError:
            continue
        closest += [str(path.parent / near) for near in difflib.get_close_matches(path.name, beside, n=1)]
    if closest:
        message += f" Did you mean {closest[0]}?"
    texts = "the path of any UTF-8 file, a folder of texts, a glob or a list with commas"
    raise UserError(f"{message} Data sets: {', '.join(known_names)}; or give {texts}.", code=2)
