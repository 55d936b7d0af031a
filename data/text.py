"""A text as two arrays of token ids, one to train on and one to evaluate on."""

from dataclasses import dataclass

import numpy as np

from data import stdlib_text, textfile, tinyshakespeare
from data.prepare import load_prepared, prepare
from data.textfile import TextSource
from data.tokenizers import Tokenizer, check_request, tell_if_smaller
from run.errors import UserError

DATA_SETS = {"tinyshakespeare": tinyshakespeare.find, "stdlib": stdlib_text.find}
SMALLEST_PART = 2  # tokens: one to read and one to predict


@dataclass(frozen=True, eq=False)
class TextData:
    """A text, tokenised and split."""

    name: str  # as it was asked for
    train: np.ndarray  # (tokens,) uint16 or uint32, read-only
    val: np.ndarray  # (tokens,) like train
    tokenizer: Tokenizer
    sha256: str  # of the source text's bytes
    source: str  # "<where>, because <why>"
    chars_per_token: float  # of val


def load_text(name: str, tokenizer: str, vocab_size: int, data_dir: str = "", eval_on: str = "val") -> TextData:
    """The text `name`: a data set (tinyshakespeare, stdlib) or the path of a UTF-8 file.

    tokenizer   "char", "bpe" (of `vocab_size` tokens, at most) or "gpt2"
    data_dir    where a person keeps the files, empty for the usual search (see data/cache.py)
    eval_on     "val": train on the first 90 % of the text, evaluate on the last 10 %.
                "tune": train on the first 81 %, evaluate on 81 to 90 %; the rest is not touched.

    The first call prepares the text and keeps it in the cache. Raises UserError for whatever a person can mend.
    """
    check_request(tokenizer, vocab_size)
    if eval_on not in ("val", "tune"):
        raise UserError(f"eval_on = {eval_on!r} is unknown. It is val or tune.", code=2)
    found = find_text(name, data_dir)
    try:
        digest = found.sha256()
        prepared = load_prepared(digest, tokenizer, vocab_size) or prepare(found, digest, tokenizer, vocab_size)
    except MemoryError as error:
        raise UserError(
            f"out of memory while preparing the text {found.where} ({str(error) or 'none is left'}). It is read in "
            "small chunks, but a bpe vocabulary needs all different words at once, and without a cache on disk the "
            "tokens stay in memory. Free memory, raise its limit (ulimit -v), or give a shorter text."
        ) from error
    tell_if_smaller(prepared.tokenizer, tokenizer, vocab_size)
    ids, parts = prepared.ids, prepared.parts
    if eval_on == "val":
        train, val, val_chars = ids[: parts.tokens_90], ids[parts.tokens_90 :], parts.chars - parts.chars_90
    else:
        train, val = ids[: parts.tokens_81], ids[parts.tokens_81 : parts.tokens_90]
        val_chars = parts.chars_90 - parts.chars_81
    if min(len(train), len(val)) < SMALLEST_PART:
        raise UserError(
            f"{found.where} is too short: {len(train)} tokens to train on and {len(val)} to evaluate on (eval_on = "
            f"{eval_on}), where each needs at least {SMALLEST_PART}. Give a longer text."
        )
    return TextData(
        name=name,
        train=train,
        val=val,
        tokenizer=prepared.tokenizer,
        sha256=digest,
        source=f"{found.where}, because {found.why}",
        chars_per_token=val_chars / len(val),
    )


def find_text(name: str, data_dir: str = "") -> TextSource:
    """The text `name`, to be read. Raises UserError when there is no such text."""
    if name in DATA_SETS:
        found = DATA_SETS[name](data_dir)
        return TextSource.of_bytes(found.content, found.where, found.why)
    return textfile.find(name, data_dir, DATA_SETS)
