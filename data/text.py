"""A text as two arrays of token ids, one to train on and one to evaluate on."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import corpus, stdlib_text, tinyshakespeare
from data.cache import places
from data.corpus import Corpus
from data.prepare import load_prepared, prepare
from data.textfile import TextSource
from data.tokenizers import Gpt2Tokenizer, Tokenizer, tell_if_smaller
from run.errors import UserError

KNOWN = ("wikipedia_en",)  # folders with these names are looked for where data sets are
TOKEN_FILES = ("train.bin", "val.bin")  # nanoGPT's: GPT-2's tokens as uint16
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


def load_text(
    name: str, tokenizer: str, vocab_size: int, data_dir: str = "", eval_on: str = "val", threads: int = 0
) -> TextData:
    """The text `name`: a data set (tinyshakespeare, stdlib, wikipedia_en), or files and folders (data/corpus.py).

    tokenizer   "char", "bpe" (of `vocab_size` tokens, at most) or "gpt2"
    data_dir    where a person keeps the files, empty for the usual search (see data/cache.py)
    eval_on     "val": train on the first 90 % of the text, evaluate on the last 10 %, or on the files for validation.
                "tune": train on the first 81 %, evaluate on 81 to 90 %; the rest is not touched. With files for
                validation: on the first and the last tenths of what there is to train on.
                "test": train as with "val", evaluate on the files to test with.
    threads     that encode; 0: one for each processor

    The first call prepares the text and keeps it in the cache. Raises UserError for whatever a person can mend;
    the settings are those of a Config, which has checked them.
    """
    if folder := next((path for path in places(name, data_dir) if _has_tokens(path)), None):
        return _load_tokens(name, folder, tokenizer, data_dir, eval_on)
    found = find_text(name, data_dir)
    threads = threads or os.cpu_count() or 1
    try:
        digest = found.sha256()
        prepared = load_prepared(digest, tokenizer, vocab_size, data_dir) or prepare(
            found, digest, tokenizer, vocab_size, data_dir, threads
        )
    except MemoryError as error:
        raise UserError(
            f"out of memory while preparing the text {found.where} ({str(error) or 'none is left'}). It is read in "
            "small chunks, but a bpe vocabulary needs all different words at once, and without a cache on disk the "
            "tokens stay in memory. Free memory, raise its limit (ulimit -v), or give a shorter text."
        ) from error
    tell_if_smaller(prepared.tokenizer, tokenizer, vocab_size)
    ids, parts = prepared.ids, prepared.parts
    train, val = ids[: parts.tokens_90], ids[parts.tokens_90 : parts.tokens]
    if eval_on == "tune":
        train, val = ids[: parts.tokens_81], ids[parts.tokens_81 : parts.tokens_90]
    elif eval_on == "test":
        val = ids[parts.tokens :]
        if not len(val):
            raise UserError(f"eval_on = test, and {found.where} has no files to test with, called test*. Evaluate on "
                            "the validation part: --eval_on val.", 2)  # fmt: skip
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
    )


def find_text(name: str, data_dir: str = "") -> Corpus:
    """The text `name`, to be read. Raises UserError when there is no such text."""
    if name in DATA_SETS:
        found = DATA_SETS[name](data_dir)
        return Corpus((TextSource.of_bytes(found.content, found.where),), found.where, found.why)
    return corpus.find(name, data_dir, (*DATA_SETS, *KNOWN))


def _has_tokens(folder: Path) -> bool:
    try:
        return all((folder / name).is_file() for name in TOKEN_FILES)
    except (OSError, ValueError):  # the second of a null character in the name
        return False


def _load_tokens(name: str, folder: Path, kind: str, data_dir: str, eval_on: str) -> TextData:
    """nanoGPT's train.bin and val.bin as they are. Raises UserError if they are not GPT-2's tokens."""
    if kind != "gpt2":
        raise UserError(f"data = {name!r} holds tokens of GPT-2, so tokenizer = {kind} does not fit: give "
                        "--tokenizer gpt2, or the text in place of the tokens.", 2)  # fmt: skip
    tokenizer, arrays, digests = Gpt2Tokenizer(data_dir), [], []
    for path in (folder / file for file in TOKEN_FILES):
        if (size := path.stat().st_size) % 2 or size < 2 * SMALLEST_PART:
            raise UserError(f"{path} has {size:,} bytes, which are no tokens of two bytes each. Make it again.")
        ids, digest = np.memmap(path, "<u2", "r"), hashlib.sha256()
        for part in np.array_split(ids, -(-len(ids) // (1 << 20))):
            digest.update(part.data)
            if part.max() >= tokenizer.vocab_size:
                raise UserError(f"{path} has the token {part.max():,}, and GPT-2's are below {tokenizer.vocab_size:,}. "
                                "If it is of another tokenizer, give the text in place of the tokens.")  # fmt: skip
        arrays.append(ids)
        digests.append(digest.hexdigest())
    train, val = arrays
    if eval_on == "test":
        raise UserError(f"eval_on = test, and {folder} has only {' and '.join(TOKEN_FILES)}. Give --eval_on val.", 2)
    if eval_on == "tune":
        end = int(0.9 * len(train))
        train, val = train[:end], train[end:]
    sha256 = hashlib.sha256("".join(digests).encode()).hexdigest()
    return TextData(name, train, val, tokenizer, sha256, f"{folder}, because data names this folder")
