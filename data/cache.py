"""Where files are looked for, how an official one is checked, and how anything is written.

An official file is looked for in this order:

    1. the folder the person gave: `data_dir`, else the environment variable NANOGFT_DATA
    2. the cache of an earlier run
    3. a `shared/data` folder beside the checkout
    4. its official address (kept in the cache)

A file in 1 is taken as it is. In 2 to 4 its sha256 must be the official one: a truncated or altered file is named
and the search goes on. Each file is written under a temporary name and renamed, so that a reader sees all of it or
none, and two processes writing the same thing leave one good copy.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.download import ANSWER_SECONDS, DownloadError, fetch
from data.notice import notice
from run.errors import UserError

SHARED_DIR = Path(__file__).resolve().parents[2] / "shared" / "data"
LEFTOVER_SECONDS = 3600  # a temporary file untouched for so long belongs to a process that was killed
OTHER_TEXTS = "train on another text: --data FILE takes any UTF-8 file, --data stdlib needs no network"


@dataclass(frozen=True)
class OfficialFile:
    """A file that everyone gets from the same address: `path` is relative to a folder of data sets."""

    path: str
    url: str
    size: int  # bytes
    sha256: str
    also: tuple[str, ...] = ()  # sha256 of other copies that are known and as good

    def fault(self, content: bytes) -> str:
        """What is wrong with `content`; empty when it is the official file."""
        seen = sha256(content)
        if seen in (self.sha256, *self.also):
            return ""
        kind = "truncated" if len(content) < self.size else "altered"
        return (
            f"{kind}: {len(content):,} bytes, sha256 {seen}; "
            f"the official file has {self.size:,} bytes, sha256 {self.sha256}"
        )


@dataclass(frozen=True)
class Found:
    """The bytes of a source file. `where` is a path or an address; `why` says in words why this one is used."""

    content: bytes
    where: str
    why: str


class NotFound(UserError):
    """No place has an official file: data set `name`, its `file`, and the places that were `looked` in, with why."""

    def __init__(self, name: str, file: OfficialFile, looked: list[str], way_out: str) -> None:
        super().__init__(
            f"data = {name!r} was found nowhere. Looked in:\n  "
            + "\n  ".join(looked)
            + f"\nPut the file into a folder and give that with --data_dir FOLDER (it may hold {file.path} or "
            f"{Path(file.path).name}), or {way_out}."
        )
        self.name, self.file, self.looked = name, file, looked


def sha256(content: bytes | memoryview) -> str:
    """Hexadecimal sha256 of bytes or of anything with the buffer protocol."""
    return hashlib.sha256(content).hexdigest()


def cache_root() -> Path:
    """$NANOGFT_CACHE, else $XDG_CACHE_HOME/nanogft, else ~/.cache/nanogft. Nothing is created.

    Raises UserError when neither variable is set and this user has no home.
    """
    if chosen := os.environ.get("NANOGFT_CACHE"):
        return Path(os.path.expanduser(chosen))
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification says to ignore a relative one
        return Path(xdg, "nanogft")
    try:
        return Path.home() / ".cache" / "nanogft"
    except RuntimeError as error:
        raise UserError("This user has no home folder to keep a cache in. Name one: NANOGFT_CACHE=FOLDER.") from error


def places(name: str, data_dir: str) -> list[Path]:
    """Where `name` is looked for: as given, and (a relative one) inside `data_dir`, else $NANOGFT_DATA, shared/data."""
    given = Path(os.path.expanduser(name))
    bases = [data_dir] if data_dir else [os.environ.get("NANOGFT_DATA", ""), str(SHARED_DIR)]
    return [given] + [Path(os.path.expanduser(base), name) for base in bases if base and not given.is_absolute()]


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Makes `path` hold `content`, whole or not at all. Raises OSError; then nothing of it is left behind."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends; when the block raises, nothing of it is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(stem: Path) -> None:
    """Deletes what processes that were killed left of files that begin like `stem`; it can be a gigabyte."""
    for path in stem.parent.glob(f".{stem.name}*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


class Damaged(Exception):
    """Prepared files that are not what was written."""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` as JSON, atomically, with a hash of itself. Raises OSError."""
    write_atomic(path, json.dumps(record | {"sha256": _record_hash(record)}).encode("utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, its hash checked. Raises OSError or Damaged."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # the second of lists in lists without end
        raise Damaged(f"{path.name} is not JSON") from error
    if not isinstance(record, dict) or record.pop("sha256", None) != _record_hash(record):
        raise Damaged(f"{path.name} has changed since it was written")
    return record


def _record_hash(record: dict[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode("utf-8"))


def find_official(name: str, file: OfficialFile, data_dir: str = "", way_out: str = OTHER_TEXTS) -> Found:
    """The official file of data set `name`, by the search order above. `way_out` ends the error's advice.

    Raises UserError when `data_dir` is given and lacks the file, and NotFound when no place has it.
    """
    failures: list[str] = []
    found = _from_folder_given(name, file, data_dir, failures)
    if found:
        return found
    cached = cache_root() / file.path
    for path, why in (
        (cached, "it is the copy an earlier run kept"),
        (SHARED_DIR / file.path, "it is in the shared/data folder beside the checkout"),
    ):
        try:
            content = path.read_bytes()
        except OSError as error:
            failures.append(f"{path}: {_reason(error)}")
            continue
        if fault := file.fault(content):
            notice(f"{path} is not used, it is {fault}. Delete it or put the official file in its place.")
            failures.append(f"{path}: {fault}")
            continue
        return Found(content, str(path), why)
    notice(f"looking for {file.url} (an answer is waited for {ANSWER_SECONDS} s).")
    try:
        content = fetch(file.url, file.size)
    except DownloadError as error:
        failures.append(f"{file.url}: not downloaded ({error})")
    else:
        if fault := file.fault(content):
            notice(f"the download from {file.url} is not used, it is {fault}.")
            failures.append(f"{file.url}: {fault}")
        else:
            return _keep(file, content, cached)
    raise NotFound(name, file, failures, way_out)


def _from_folder_given(name: str, file: OfficialFile, data_dir: str, failures: list[str]) -> Found | None:
    """The file in `data_dir` or $NANOGFT_DATA, taken as it is; None when there is none and the search may go on."""
    folder = data_dir or os.environ.get("NANOGFT_DATA", "")
    if not folder:
        return None
    setting = "data_dir" if data_dir else "NANOGFT_DATA"
    base = Path(os.path.expanduser(folder))
    looked = []
    for path in (base / file.path, base / Path(file.path).name):
        try:
            content = path.read_bytes()
        except OSError as error:
            looked.append(f"{path}: {_reason(error)}")
            continue
        taken_as_is = "" if not file.fault(content) else " (taken as it is: not the official file)"
        return Found(content, str(path), f"{setting} names its folder{taken_as_is}")
    if data_dir:
        raise UserError(
            f"data_dir = {data_dir!r} does not hold {name}. Looked for:\n  "
            + "\n  ".join(looked)
            + "\nA data_dir that is given is the only place searched: put the file there, or leave data_dir out "
            "to search the cache, shared/data and the official address.",
            code=2,
        )
    notice(f"NANOGFT_DATA = {folder} does not hold {name} ({'; '.join(looked)}); looking elsewhere.")
    failures.extend(looked)
    return None


def _keep(file: OfficialFile, content: bytes, path: Path) -> Found:
    why = "it was found nowhere nearer and was downloaded"
    try:
        write_atomic(path, content)
    except OSError as error:
        notice(
            f"the download cannot be kept as {path} ({_reason(error)}), so the next run downloads it again. "
            "NANOGFT_CACHE=FOLDER names another cache."
        )
        return Found(content, file.url, why)
    return Found(content, str(path), f"{why} from {file.url}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
