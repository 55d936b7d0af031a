"""A text as token ids on disk: made once per text, tokenizer and vocabulary size, then memory-mapped.

Two files in the cache, `prepared/<name>.bin` (ids, little-endian) and `<name>.json` (tokenizer, parts, hashes). <name>
is the start of the text's sha256, the tokenizer and the format. The same name always means the same bytes, so processes
that prepare at the same time replace each other's files by equal ones. The json goes last, with the hash of the ids.

The text is read in chunks, and the ids are written as they come, so that a text of any length takes memory for a few
chunks (and, for a BPE vocabulary, for its different words).

The parts are cut in the text, at 81 and at 90 % of its characters, and encoded one by one. So what is evaluated is the
same stretch of text under every tokenizer, and none of it has been seen by the training of a BPE vocabulary.
"""

import errno
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.cache import Damaged, cache_root, open_atomic, read_record, remove_leftovers, write_record
from data.notice import notice
from data.textfile import CHUNK, TextSource
from data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json
from run.errors import UserError

FORMAT = 2  # goes up when the same text and settings give other files


@dataclass(frozen=True)
class Parts:
    """Where the parts end. Tokens: [0, tokens_81), [tokens_81, tokens_90), [tokens_90, tokens); characters alike."""

    tokens_81: int
    tokens_90: int
    tokens: int
    chars_81: int
    chars_90: int
    chars: int


@dataclass(frozen=True, eq=False)
class Prepared:
    ids: np.ndarray  # (parts.tokens,) uint16 or uint32, read-only
    parts: Parts
    tokenizer: Tokenizer


def file_stem(text_sha256: str, kind: str, vocab_size: int) -> str:
    """The name of the prepared files, without an ending."""
    size = f"{vocab_size}" if kind == "bpe" else ""
    return f"{text_sha256[:32]}-{kind}{size}-v{FORMAT}"


def load_prepared(text_sha256: str, kind: str, vocab_size: int) -> Prepared | None:
    """What an earlier run prepared, memory-mapped; None, with a notice if there is damage, when it must be made."""
    stem = cache_root() / "prepared" / file_stem(text_sha256, kind, vocab_size)
    json_path, bin_path = stem.with_suffix(".json"), stem.with_suffix(".bin")
    try:
        record = read_record(json_path)
        ids = _map_ids(bin_path, record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, Damaged) as error:
        notice(f"the prepared files {stem}.* are not used ({error}); preparing again.")
        return None
    return Prepared(ids, Parts(**record["parts"]), tokenizer_from_json(record["tokenizer"]))


def prepare(text: TextSource, text_sha256: str, kind: str, vocab_size: int) -> Prepared:
    """Makes the tokenizer, encodes `text` and keeps both in the cache; where that cannot be written, in memory only.

    The text is read once to see what is in it, once to train a BPE vocabulary, and once to encode it. Raises UserError
    when it is none, or the tokenizer cannot be made.
    """
    chars, alphabet = text.survey(text_sha256)
    ends = int(0.81 * chars), int(0.9 * chars), chars
    if kind == "bpe":
        notice(f"training a bpe vocabulary of {vocab_size:,} on the first 81 % of the text (once).")
    with closing(parts_of(text.chunks(text_sha256, "learning the words of"), ends)) as pieces:
        learned_from = (piece for _, piece in itertools.takewhile(lambda numbered: numbered[0] == 0, pieces))
        tokenizer = make_tokenizer(kind, vocab_size, "".join(alphabet), learned_from)
    stem = cache_root() / "prepared" / file_stem(text_sha256, kind, vocab_size)
    try:
        remove_leftovers(stem)
        with open_atomic(stem.with_suffix(".bin")) as file:
            record = _encode(text, text_sha256, tokenizer, ends, file)
        write_record(stem.with_suffix(".json"), record)
    except OSError as error:
        notice(
            f"the prepared text cannot be kept in {stem.parent} ({error.strerror or error}); it stays in memory, and "
            "the next run prepares it again. NANOGFT_CACHE=FOLDER names another cache."
        )
        memory = io.BytesIO()
        record = _encode(text, text_sha256, tokenizer, ends, memory)
        ids = np.frombuffer(memory.getbuffer(), tokenizer.dtype)
        ids.flags.writeable = False
    else:
        ids = _map(stem.with_suffix(".bin"), tokenizer.dtype)
    return Prepared(ids, Parts(**record["parts"]), tokenizer)


def _encode(
    text: TextSource, text_sha256: str, tokenizer: Tokenizer, ends: tuple[int, int, int], file: BinaryIO
) -> dict[str, Any]:
    """Writes the ids to `file`; what `load_prepared` needs to know of them."""
    tokens, digest = [0, 0, 0], hashlib.sha256()
    for part, piece in parts_of(text.chunks(text_sha256, "encoding"), ends):
        try:
            ids = tokenizer.encode_array(piece)
        except UserError as error:  # a character that was not there before
            raise text.changed() from error
        tokens[part] += len(ids)
        digest.update(ids.data)
        file.write(ids.data)
    return {
        "parts": asdict(Parts(*itertools.accumulate(tokens), *ends)),
        "dtype": tokenizer.dtype.str,
        "ids_sha256": digest.hexdigest(),
        "tokenizer": tokenizer.to_json(),
    }


def parts_of(chunks: Iterable[str], ends: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The text of `chunks`, cut anew: with each piece comes the number of its part; parts end at `ends`, in characters.

    Inside a part cuts are where a word ends. No token of a BPE or of GPT-2 goes on from a sign into white space, so
    pieces have the tokens of the whole part; only a word that is longer than a chunk may be cut.
    """
    part, start, rest = 0, 0, ""
    for chunk in chunks:
        rest += chunk
        while part < len(ends) and start + len(rest) >= ends[part]:
            size = ends[part] - start
            yield part, rest[:size]
            part, start, rest = part + 1, ends[part], rest[size:]
        if part == len(ends):  # what comes now is not part of the text: `chunks` tells at its end that it has grown
            rest = ""
        blank = max(rest.rfind(" "), rest.rfind("\n"), 0)
        size = len(rest[:blank].rstrip())
        if not size and len(rest) >= CHUNK:
            size = len(rest)
        if size:
            yield part, rest[:size]
            start, rest = start + size, rest[size:]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        if error.errno == errno.ENOMEM:  # of addresses
            raise MemoryError(f"{path} cannot be mapped") from error
        raise


def _map_ids(path: Path, record: dict[str, Any]) -> np.ndarray:
    """The ids, memory-mapped, size and hash checked. Raises OSError or Damaged."""
    dtype, count = np.dtype(record["dtype"]), record["parts"]["tokens"]
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise Damaged(f"{path.name} has {size:,} bytes, not {count * dtype.itemsize:,}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record["ids_sha256"]:
            raise Damaged(f"{path.name} has changed since it was written")
    return _map(path, dtype)
