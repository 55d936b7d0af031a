"""Any UTF-8 text file as a data set, and the one place where bytes become text."""

import codecs
import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from data.cache import Found
from run.errors import UserError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def find(name: str, data_dir: str, known_names: Iterable[str]) -> Found:
    """Reads the file `name`: as given, or (a relative one) inside `data_dir` / $NANOGFT_DATA.

    Raises UserError, with the closest name there is, when it is missing, a folder or unreadable.
    """
    folder = data_dir or os.environ.get("NANOGFT_DATA", "")
    candidates = [Path(os.path.expanduser(name))]
    if folder and not candidates[0].is_absolute():
        candidates.append(Path(os.path.expanduser(folder), name))
    for path in candidates:
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except IsADirectoryError as error:
            texts = sorted(file.name for file in path.glob("*.txt"))
            example = path / (texts[0] if texts else "FILE")
            message = f"data = {name!r} is a folder. data names one UTF-8 file, like {example}."
            raise UserError(message, code=2) from error
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise UserError(f"data = {name!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        return Found(content, str(path), "data names this file")
    raise UserError(_missing(name, candidates, sorted(known_names)), code=2)


def decode(content: bytes, where: str) -> str:
    """The text of `content`, line ends untouched, without a leading byte order mark.

    Raises UserError naming the offset of the first byte that is not UTF-8, or when there is no text.
    """
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        encoding = "UTF-16" if content.startswith(UTF16_MARKS) else "LATIN1"
        raise UserError(
            f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start:,} (line {line:,}). "
            f"A text must be UTF-8; convert it, for instance with: iconv -f {encoding} -t UTF-8 OLD > NEW"
        ) from error
    if not text:
        raise UserError(f"{where} is empty. A text to train on needs thousands of characters; give another file.")
    return text


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
