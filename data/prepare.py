"""A text as token ids on disk: made once per text, tokenizer and vocabulary size, then memory-mapped.

Two files in the cache, `prepared/<name>.bin` (ids, little-endian) and `<name>.json` (tokenizer, parts, hashes). <name>
is the start of the text's sha256, the tokenizer and the format. The same name always means the same bytes, so processes
that prepare at the same time replace each other's files by equal ones. The json goes last, with the hash of the ids.

The parts are cut in the text, at 81 and at 90 % of its characters, and encoded one by one. So what is evaluated is the
same stretch of text under every tokenizer, and none of it has been seen by the training of a BPE vocabulary.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import Damaged, cache_root, read_record, sha256, write_atomic, write_record
from data.notice import notice
from data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

FORMAT = 1  # goes up when the same text and settings give other files


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


def prepare(text: str, text_sha256: str, kind: str, vocab_size: int) -> Prepared:
    """Makes the tokenizer, encodes `text` and keeps both in the cache; where that cannot be written, in memory only.

    Raises UserError when the tokenizer cannot be made.
    """
    chars_81, chars_90 = int(0.81 * len(text)), int(0.9 * len(text))
    if kind == "bpe":
        notice(f"training a bpe vocabulary of {vocab_size:,} on the first 81 % of the text (once).")
    tokenizer = make_tokenizer(kind, vocab_size, text, bpe_text=text[:chars_81])
    pieces = [tokenizer.encode_array(part) for part in (text[:chars_81], text[chars_81:chars_90], text[chars_90:])]
    ids = np.concatenate(pieces)
    ids.flags.writeable = False
    tokens_81 = len(pieces[0])
    parts = Parts(tokens_81, tokens_81 + len(pieces[1]), len(ids), chars_81, chars_90, len(text))
    stem = cache_root() / "prepared" / file_stem(text_sha256, kind, vocab_size)
    record = {
        "parts": asdict(parts),
        "dtype": ids.dtype.str,
        "ids_sha256": sha256(ids.data),
        "tokenizer": tokenizer.to_json(),
    }
    try:
        write_atomic(stem.with_suffix(".bin"), ids.data)
        write_record(stem.with_suffix(".json"), record)
    except OSError as error:
        notice(
            f"the prepared text cannot be kept in {stem.parent} ({error.strerror or error}); it stays in memory, and "
            "the next run prepares it again. NANOGFT_CACHE=FOLDER names another cache."
        )
    else:
        ids = np.memmap(stem.with_suffix(".bin"), dtype=ids.dtype, mode="r")
    return Prepared(ids, parts, tokenizer)


def _map_ids(path: Path, record: dict[str, Any]) -> np.ndarray:
    """The ids, memory-mapped, size and hash checked. Raises OSError or Damaged."""
    dtype, count = np.dtype(record["dtype"]), record["parts"]["tokens"]
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise Damaged(f"{path.name} has {size:,} bytes, not {count * dtype.itemsize:,}")
    ids = np.memmap(path, dtype=dtype, mode="r")
    if sha256(ids.data) != record["ids_sha256"]:
        raise Damaged(f"{path.name} has changed since it was written")
    return ids
