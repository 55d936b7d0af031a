"""Any UTF-8 text file as a data set, and the one place where bytes become text.

A text is read in chunks, as often as it is needed, so that its size does not matter. Each reading sees to it that the
bytes are still the same.
"""

import codecs
import difflib
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.notice import notice, with_bar
from data.textkind import CONTROLS, NO_TEXT, controls_advice, encoding_advice, other_format
from run.errors import UserError

CHUNK = 1 << 18  # bytes; a multiple of four, the longest unit of an encoding
AROUND = 1 << 15  # bytes before and after a fault, from which an encoding is guessed
BYTE_ORDER_MARK = "\ufeff"
FEW = 1e-3  # a text with fewer control characters is used as it is


@dataclass(frozen=True)
class TextSource:
    """A text to read. `where` is a path or an address; `why` says in words why this one is used."""

    open: Callable[[], BinaryIO]
    where: str
    why: str

    @classmethod
    def of_bytes(cls, content: bytes, where: str, why: str) -> "TextSource":
        return cls(lambda: io.BytesIO(content), where, why)

    def sha256(self) -> str:
        """Of the bytes. Raises UserError if they cannot be read, or are known not to be a text."""
        digest = hashlib.sha256()
        for data in self._read("reading"):
            digest.update(data)
        return digest.hexdigest()

    def chunks(self, sha256: str, doing: str) -> Iterator[str]:
        """The text, line ends untouched, without byte-order marks; `doing` says what for.

        Raises UserError naming the offset of the first byte that is not UTF-8, and where the bytes are not those of
        `sha256`, which are known at the end.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        digest, offset, lines = hashlib.sha256(), 0, 1
        for data in self._read(doing):
            digest.update(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = error.start - (len(error.object) - len(data))  # negative in a character begun by the last chunk
                lines += error.object.count(b"\n", 0, error.start)
                raise UserError(
                    f"{self.where} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + at:,} "
                    f"(line {lines:,}). A text must be UTF-8. {self._advice(offset + at) or NO_TEXT}"
                ) from None
            yield text.replace(BYTE_ORDER_MARK, "")
            offset += len(data)
            lines += data.count(b"\n")
        if digest.hexdigest() != sha256:
            raise self.changed()

    def changed(self) -> UserError:
        return UserError(f"{self.where} has changed while it was read. Wait until nothing writes to it, or copy it.")

    def survey(self, sha256: str) -> tuple[int, set[str]]:
        """How many characters the text has, and which. Raises UserError, as `chunks` does, and where it is no text."""
        count, alphabet, controls, lines = 0, set(), 0, 1
        first = ""
        for text in self.chunks(sha256, "checking"):
            here = set(text)
            if found := here & CONTROLS:
                controls += sum(text.count(char) for char in found)
                if not first:
                    at = min(text.find(char) for char in found)
                    first = f"U+{ord(text[at]):04X} in line {lines + text.count(chr(10), 0, at):,}"
            alphabet |= here
            count += len(text)
            lines += text.count("\n")
        if not "".join(alphabet).strip():
            what = f"holds nothing but white space ({count:,} characters)" if count else "is empty"
            raise UserError(f"{self.where} {what}. A text to train on needs thousands of characters; give another.")
        if controls:
            self._tell_controls(controls, count, first, alphabet & CONTROLS)
        if "\r" in alphabet:
            notice(f"{self.where} has carriage returns, as Windows ends lines; they are kept like other characters.")
        return count, alphabet

    def _tell_controls(self, controls: int, count: int, first: str, found: set[str]) -> None:
        seen = (f"{self.where} has control characters that no text should have: {controls:,} of {count:,} "
                f"({controls / count:.2%}), the first {first}")  # fmt: skip
        if controls < FEW * count:
            notice(f"{seen}. They are kept.")
            return
        raise UserError(f"{seen}. {self._advice(0) or controls_advice(found, controls / count, self.where)}")

    def _advice(self, at: int) -> str:
        with self.open() as file:
            start = max(0, at - AROUND) // 4 * 4
            file.seek(start)
            return encoding_advice(file.read(2 * AROUND), at - start, self.where)

    def _read(self, doing: str) -> Iterator[bytes]:
        """The bytes in chunks, the last of which is empty."""
        try:
            with self.open() as file:
                if fault := other_format(file.read(AROUND), self.where):
                    raise UserError(fault)
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                yield from with_bar(iter(lambda: file.read(CHUNK), b""), size, f"{doing} {self.where}")
        except OSError as error:
            raise UserError(f"{self.where} cannot be read: {error.strerror or error}.") from error
        yield b""


def find(name: str, data_dir: str, known_names: Iterable[str]) -> TextSource:
    """The file `name`: as given, or (a relative one) inside `data_dir` / $NANOGFT_DATA.

    Raises UserError, with the closest name there is, when it is missing, a folder or anything else that is no file.
    """
    folder = data_dir or os.environ.get("NANOGFT_DATA", "")
    candidates = [Path(os.path.expanduser(name))]
    if folder and not candidates[0].is_absolute():
        candidates.append(Path(os.path.expanduser(folder), name))
    for path in candidates:
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise UserError(f"data = {name!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if stat.S_ISDIR(mode):
            texts = sorted(file.name for file in path.glob("*.txt"))
            example = path / (texts[0] if texts else "FILE")
            raise UserError(f"data = {name!r} is a folder. data names one UTF-8 file, like {example}.", code=2)
        if not stat.S_ISREG(mode):
            raise UserError(
                f"data = {name!r} is a pipe or a device. A text is read more than once, so it must be a file: save "
                "it as one first.",
                code=2,
            )
        return TextSource(lambda: open(path, "rb"), str(path), "data names this file")
    raise UserError(_missing(name, candidates, sorted(known_names)), code=2)


def _missing(name: str, candidates: list[Path], known_names: list[str]) -> str:
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
    return message + f" Data sets: {', '.join(known_names)}; or give the path of any UTF-8 file."
