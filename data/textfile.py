"""A UTF-8 file as text, and the one place where bytes become text: plain, JSON lines, compressed or not.

A text is read in chunks, as often as it is needed, so that its size does not matter. Each reading sees to it that the
bytes are still the same.

Documents of a text are separated by END, one character: where the file has `<|endoftext|>`, and between JSON lines.
"""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from data.notice import notice
from data.textkind import CONTROLS, NO_TEXT, controls_advice, encoding_advice, other_format
from data.tokenizers import END
from run.errors import UserError

CHUNK = 1 << 18  # bytes; a multiple of four, the longest unit of an encoding
AROUND = 1 << 15  # bytes before and after a fault, from which an encoding is guessed
BYTE_ORDER_MARK = "\ufeff"
FEW = 1e-3  # a text with fewer control characters is used as it is
SEPARATOR = "<|endoftext|>\n"  # between documents, as GPT-2's data have it; the line end may be missing
PACKED = {b"\x1f\x8b": gzip.GzipFile, b"\xfd7zXZ\0": lzma.LZMAFile, b"BZh": bz2.BZ2File}  # by their first bytes
BROKEN = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error)  # what these raise


class Meter:
    """Counts and hashes the bytes that are read from `file`."""

    def __init__(self, file: BinaryIO, count: Callable[[int], None]):
        self.file, self.count, self.digest = file, count, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.count(len(data))
        return data


@dataclass(frozen=True)
class TextSource:
    """A file to read. `where` is a path or an address."""

    open: Callable[[], BinaryIO]
    where: str
    split: str = ""  # "train", "val" or "test", if its name says so
    json_lines: bool = False  # documents are values of "text"

    @classmethod
    def of_bytes(cls, content: bytes, where: str) -> "TextSource":
        return cls(lambda: io.BytesIO(content), where)

    def size(self) -> int:
        """Bytes, as stored. Raises UserError if the file cannot be opened."""
        with self._told(), self.open() as file:
            return file.seek(0, os.SEEK_END)

    def sha256(self, count: Callable[[int], None] = lambda size: None) -> str:
        """Of the bytes as stored; `count` is told of those read. Raises UserError if they cannot be read."""
        with self._told(), self.open() as file:
            meter = Meter(file, count)
            while meter.read(CHUNK):
                pass
            return meter.digest.hexdigest()

    def chunks(self, sha256: str, count: Callable[[int], None] = lambda size: None) -> Iterator[str]:
        """The text, line ends untouched, without byte-order marks, its documents separated by END.

        Raises UserError naming the offset of the first byte that is not UTF-8, or the line that is no JSON, and where
        the bytes are not those of `sha256`, which are known at the end.
        """
        texts = self._text(sha256, count)
        return self._json_documents(texts) if self.json_lines else separated(texts)

    def _text(self, sha256: str, count: Callable[[int], None]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, lines = 0, 1
        for data in self._read(sha256, count):
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

    def _json_documents(self, texts: Iterable[str]) -> Iterator[str]:
        pieces, number, waiting, size = [], 0, [], 0
        for text in itertools.chain(texts, ["\n"]):
            first, *rest = text.split("\n")
            pieces.append(first)  # a line may be as long as the file
            for begun in rest:
                line, pieces = "".join(pieces), [begun]
                number += 1
                if line.strip():
                    waiting.append(self._document(line, number))
                    size += len(waiting[-1]) + 1
            if size >= CHUNK:
                yield END.join(waiting) + END
                waiting, size = [], 0
        yield END.join(waiting)

    def _document(self, line: str, number: int) -> str:
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(f'its "text" is a {type(text).__name__}')
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            seen = 'it has no "text"' if isinstance(error, KeyError) else error
            raise UserError(f'{self.where}, line {number:,}: {seen}. Each line must be a JSON object with a "text", '
                            f"which is a string; this one begins {line[:60]!r}") from None  # fmt: skip
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair has no UTF-8

    def changed(self) -> UserError:
        return UserError(f"{self.where} has changed while it was read. Wait until nothing writes to it, or copy it.")

    def survey(self, texts: Iterable[str]) -> tuple[int, set[str]]:
        """How many characters its `texts` have, and which. Raises UserError where control characters say it is none."""
        count, alphabet, controls, lines = 0, set(), 0, 1
        first = ""
        for text in texts:
            here = set(text)
            if found := (here & CONTROLS) - {END}:
                controls += sum(text.count(char) for char in found)
                if not first:
                    at = min(text.find(char) for char in found)
                    first = f"U+{ord(text[at]):04X} in line {lines + text.count(chr(10), 0, at):,}"
            alphabet |= here
            count += len(text)
            lines += text.count("\n")
        if controls:
            self._tell_controls(controls, count, first, (alphabet & CONTROLS) - {END})
        return count, alphabet

    def _tell_controls(self, controls: int, count: int, first: str, found: set[str]) -> None:
        seen = (f"{self.where} has control characters that no text should have: {controls:,} of {count:,} "
                f"({controls / count:.2%}), the first {first}")  # fmt: skip
        if controls < FEW * count:
            notice(f"{seen}. They are kept.")
            return
        raise UserError(f"{seen}. {self._advice(0) or controls_advice(found, controls / count, self.where)}")

    def _advice(self, at: int) -> str:
        with self.open() as file, unpacked(file, file) as content:
            start = max(0, at - AROUND) // 4 * 4
            content.seek(start)
            return encoding_advice(content.read(2 * AROUND), at - start, self.where)

    def _read(self, sha256: str, count: Callable[[int], None]) -> Iterator[bytes]:
        """The bytes, unpacked, in chunks of CHUNK, after the last of which comes an empty one."""
        with self._told(), self.open() as file:
            meter = Meter(file, count)
            with unpacked(file, meter) as content:
                data = content.read(CHUNK)
                if fault := other_format(data[:AROUND], self.where):
                    raise UserError(fault)
                while data:
                    yield data
                    data = content.read(CHUNK)
            follows = False  # a decompressor stops at its end
            while meter.read(CHUNK):
                follows = True
        if meter.digest.hexdigest() != sha256:
            raise self.changed()
        if follows:
            raise UserError(f"{self.where} has bytes behind the end of its compressed text, which would be left out. "
                            "Unpack it, or get it anew.")  # fmt: skip
        yield b""

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BROKEN as error:
            raise UserError(f"{self.where} is compressed and damaged: {error}. Get it anew.") from error
        except OSError as error:
            raise UserError(f"{self.where} cannot be read: {error.strerror or error}.") from error


def unpacked(file: BinaryIO, through: BinaryIO | Meter) -> BinaryIO:
    """What `file`, at its beginning, holds, decompressed if it is compressed, and read by way of `through`."""
    head = file.read(10)
    file.seek(0)
    kind = next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None)
    if kind is None or kind is bz2.BZ2File and head[4:] != b"1AY&SY":
        return contextlib.nullcontext(through)
    packed = kind(fileobj=through) if kind is gzip.GzipFile else kind(through)
    return io.BufferedReader(packed, CHUNK)  # gives as many bytes as are asked for


def separated(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, one after the other, with END in place of each SEPARATOR."""
    rest = ""
    for text in texts:
        rest += text
        if "<" in rest:
            rest = rest.replace(SEPARATOR, END)
        # What may be the beginning of a separator waits for the rest of it, but not at the end.
        hold = next((n for n in range(min(len(SEPARATOR) - 1, len(rest)), 0, -1) if rest.endswith(SEPARATOR[:n])), 0)
        yield rest[: len(rest) - hold].replace(SEPARATOR[:-1], END)
        rest = rest[len(rest) - hold :]
    yield rest.replace(SEPARATOR[:-1], END)
