"""Between text and token ids: characters, a BPE vocabulary learned from the text, or GPT-2's.

Every tokenizer is a list of byte strings, one per id; they differ in how they cut a text. `to_json` keeps all that
sampling needs, so a checkpoint works without the data (GPT-2's vocabulary is public and only named).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import cache
from data.bpe import PATTERN, train_bpe
from data.download import short_reason
from data.notice import notice
from run.errors import UserError

if TYPE_CHECKING:
    import tiktoken  # where it is used, it is imported: characters do without

END = "\x03"  # END OF TEXT: separates documents. A BPE vocabulary has it as byte 3, GPT-2's as <|endoftext|>.
KINDS = ("char", "bpe", "gpt2")
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_SECONDS, QUIET_SECONDS = 30, 3  # to wait for GPT-2's vocabulary, in all and before that is told


class Tokenizer(ABC):
    """Ids 0 .. vocab_size - 1, each standing for a byte string."""

    vocab_size: int
    end: int | None  # the id of END

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises UserError naming a character that has none."""

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, whose documents END separates: (len(ids),), uint16, or uint32 above 65,536 ids."""
        documents = [np.array(self.encode(document), dtype=self.dtype) for document in text.split(END)]
        ends = [np.array([self.end], dtype=self.dtype)] * len(documents)
        return np.concatenate([ids for pair in zip(documents, ends) for ids in pair][:-1])

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian unsigned type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id. Raises ValueError when it is not in 0 .. vocab_size - 1."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside 0 .. {self.vocab_size - 1}, this tokenizer's vocabulary")
        return self._bytes(int(token))

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes of each id; END is one, under every tokenizer."""
        lengths = np.array([len(self._bytes(token)) for token in range(self.vocab_size)], dtype=np.int64)
        if self.end is not None:
            lengths[self.end] = 1
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range."""
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """A decoder that is fed one id at a time."""
        return TextStream(self)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` needs to make this tokenizer again."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes: ...


class TextStream:
    """Text as its ids arrive: a character appears when its last byte does.

    All that `push` and `flush` return, put together, is `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, often none or several. Raises ValueError for an id out of range."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose last bytes never came, else nothing."""
        return self._decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """One id per character, in code point order."""

    def __init__(self, chars: str) -> None:
        """`chars`: the known characters; they are sorted, repeats do not matter."""
        self._chars = "".join(sorted(set(chars)))
        self._points = _code_points(self._chars)
        self.vocab_size = len(self._chars)
        self.end = self._chars.index(END) if END in self._chars else None

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            self._refuse(text, int(unknown.argmax()))
        return ids.astype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self._chars}

    def _bytes(self, token: int) -> bytes:
        return self._chars[token].encode("utf-8")

    def _refuse(self, text: str, position: int) -> None:
        char = text[position]
        known = repr(self._chars if len(self._chars) <= 100 else self._chars[:100] + "...")
        raise UserError(
            f"The char tokenizer does not know {char!r} (U+{ord(char):04X}), character {position + 1} of the text. "
            f"It knows the {self.vocab_size} characters of the text it was made from: {known}. "
            "Leave the character out, or train with --tokenizer bpe, which knows every byte."
        )


class BpeTokenizer(Tokenizer):
    """A byte-level BPE vocabulary, encoded by tiktoken."""

    def __init__(self, vocabulary: list[bytes], pattern: str = PATTERN) -> None:
        """`vocabulary`: byte strings in rank order. Raises ValueError when they cannot stand for every text."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(vocabulary)}
        if len(ranks) != len(vocabulary) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("a BPE vocabulary holds each of the 256 bytes and no token twice")
        self._vocabulary = vocabulary
        self._pattern = pattern
        self._encoding = tiktoken.Encoding("nanogft", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size, self.end = len(vocabulary), ranks[END.encode()]

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def to_json(self) -> dict[str, Any]:
        ranks = [base64.b64encode(token).decode("ascii") for token in self._vocabulary]
        return {"kind": "bpe", "pattern": self._pattern, "ranks": ranks}

    def _bytes(self, token: int) -> bytes:
        return self._vocabulary[token]


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's vocabulary of 50,257: from a folder of data sets, or what tiktoken fetches once and keeps."""

    def __init__(self, data_dir: str = "") -> None:
        """Raises UserError when the vocabulary is neither found nor to be fetched within GPT2_SECONDS."""
        self._encoding = _find_gpt2(data_dir) or _fetch_gpt2()
        self.vocab_size, self.end = self._encoding.n_vocab, self._encoding.n_vocab - 1

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gpt2"}

    def _bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)


def make_tokenizer(
    kind: str, vocab_size: int, chars: str, bpe_text: Iterable[str], data_dir: str = ""
) -> Tokenizer:
    """A new tokenizer of `kind`: of all `chars`, or of BPE tokens learned from `bpe_text`, in pieces cut between words.

    `vocab_size` is for "bpe" alone, `data_dir` for "gpt2". Raises UserError when gpt2 cannot be fetched.
    """
    if kind == "char":
        return CharTokenizer(chars)
    if kind == "gpt2":
        return Gpt2Tokenizer(data_dir)
    return BpeTokenizer(train_bpe((document for text in bpe_text for document in text.split(END)), vocab_size))


def tokenizer_from_json(stored: dict[str, Any], data_dir: str = "") -> Tokenizer:
    """The tokenizer whose `to_json` is `stored`; `data_dir` may have GPT-2's files.

    Raises UserError when it is damaged or of an unknown kind.
    """
    try:
        kind = stored["kind"]
        if kind == "char" and stored["chars"]:
            return CharTokenizer(stored["chars"])
        if kind == "bpe":
            vocabulary = [base64.b64decode(token, validate=True) for token in stored["ranks"]]
            return BpeTokenizer(vocabulary, stored["pattern"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"The stored tokenizer is damaged ({type(error).__name__}: {error}). Train again.") from error
    if kind == "gpt2":
        return Gpt2Tokenizer(data_dir)
    raise UserError(f"The stored tokenizer is of kind {kind!r}; known are {', '.join(KINDS)}, none of them empty.")


def tell_if_smaller(tokenizer: Tokenizer, kind: str, vocab_size: int) -> None:
    """Says so when the text was too short for the vocabulary that was asked for."""
    if kind == "bpe" and tokenizer.vocab_size < vocab_size:
        notice(
            f"the bpe vocabulary has {tokenizer.vocab_size:,} tokens, not vocab_size = {vocab_size:,}: "
            "in the training text no further pair occurs twice."
        )


def _code_points(text: str) -> np.ndarray:
    """(len(text),) uint32. Lone surrogates, which a terminal can deliver, are kept so that an error can name them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _find_gpt2(data_dir: str) -> tiktoken.Encoding | None:
    """GPT-2's encoding from the files GPT2_SHA256 in gpt2_bpe/ of a folder of data sets; None if there is none."""
    for base in filter(None, (data_dir, os.environ.get("NANOGFT_DATA"), str(cache.SHARED_DIR))):
        paths = [Path(base).expanduser() / "gpt2_bpe" / name for name in GPT2_SHA256]
        if not all(path.is_file() for path in paths):
            continue
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        if seen := [path for path in paths if cache.sha256(path.read_bytes()) != GPT2_SHA256[path.name]]:
            notice(f"{seen[0]} is not used, it is not GPT-2's.")
            continue
        keeps = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would copy the files
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(*map(str, paths))
        finally:
            os.environ.pop("TIKTOKEN_CACHE_DIR") if keeps is None else os.environ.update(TIKTOKEN_CACHE_DIR=keeps)
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={ENDOFTEXT: len(ranks)})  # fmt: skip
    return None


def _fetch_gpt2() -> tiktoken.Encoding:
    """tiktoken's own fetch has no time limit, so it runs in a thread that is waited for only so long."""
    import tiktoken

    outcome: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # the network or the disk; a file with the wrong hash
            outcome.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(min(QUIET_SECONDS, GPT2_SECONDS))
    if thread.is_alive():
        notice(f"waiting for GPT-2's vocabulary, at most {GPT2_SECONDS} s.")
        thread.join(GPT2_SECONDS - QUIET_SECONDS)
    if outcome and isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    reason = short_reason(outcome[0]) if outcome else f"no answer in {GPT2_SECONDS} s"
    raise UserError(
        f"tokenizer = 'gpt2': its vocabulary could not be fetched ({reason}). tiktoken needs the network for it once; "
        "afterwards it is kept (TIKTOKEN_CACHE_DIR names where). Or put vocab.bpe and encoder.json into gpt2_bpe/ in "
        "--data_dir. Without a network use --tokenizer bpe, which is "
        "trained on the text itself, or --tokenizer char."
    )
