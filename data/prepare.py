"""A text as token ids on disk: made once per text, tokenizer and vocabulary size, then memory-mapped.

Two files in the cache, `prepared/<name>.bin` (ids, little-endian) and `<name>.json` (tokenizer, parts, shards, hashes).
<name> is the start of the text's sha256, the tokenizer and the format, so the same name always means the same bytes.
The json goes last.

The text is read in chunks, encoded on several threads (tiktoken holds no lock of Python's), and the ids are written as
they come, so that a text of any length takes memory for a few chunks (and, for a BPE vocabulary, for the different
words of a sample). A shard is the stretch of ids of SHARD characters, with a hash of its own: a preparation that was
killed goes on behind the last whole one, and of a damaged file only the damaged shards are made again.

The parts are cut in the text: where no file of it is for validation, at 81 and at 90 % of its characters, else at 90 %
of what there is to train on and where the files change. They are encoded one by one. So what is evaluated is the same
stretch of text under every tokenizer, and none of it has been seen by the training of a BPE vocabulary.
"""

import errno
import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from data.cache import Damaged, cache_root, read_record, remove_leftovers, sha256, write_record
from data.corpus import Corpus
from data.notice import notice
from data.textfile import CHUNK
from data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json
from run.errors import UserError

FORMAT = 2  # goes up when the same text and settings give other tokens
SHARD = 1 << 24  # characters; a longer one loses more to a kill
SAMPLE = 32_000_000  # characters of a longer text that a BPE vocabulary is learned from


@dataclass(frozen=True)
class Parts:
    """Where the parts end. Tokens: [0, tokens_81), [tokens_81, tokens_90), [tokens_90, tokens); characters alike.

    tokens_90 ends what there is to train on, of which tokens_81 leaves a tenth to tune with. test_tokens are behind.
    """

    tokens_81: int
    tokens_90: int
    tokens: int
    chars_81: int
    chars_90: int
    chars: int
    test_tokens: int = 0

    @classmethod
    def of(cls, tokens: Sequence[int], ends: Sequence[int]) -> "Parts":
        """Of the tokens of each part, and the ends of the parts in characters."""
        *until, end = itertools.accumulate(tokens)
        return cls(*until, *ends[:3], end - until[-1])


@dataclass(frozen=True, eq=False)
class Prepared:
    ids: np.ndarray  # (parts.tokens + parts.test_tokens,) uint16 or uint32, read-only
    parts: Parts
    tokenizer: Tokenizer


def file_stem(text_sha256: str, kind: str, vocab_size: int) -> str:
    """The name of the prepared files, without an ending."""
    size = f"{vocab_size}" if kind == "bpe" else ""
    return f"{text_sha256[:32]}-{kind}{size}-v{FORMAT}"


def load_prepared(text_sha256: str, kind: str, vocab_size: int, data_dir: str = "") -> Prepared | None:
    """What an earlier run prepared, memory-mapped; None, with a notice if there is damage, when it must be made."""
    stem = cache_root() / "prepared" / file_stem(text_sha256, kind, vocab_size)
    bin_path = stem.with_suffix(".bin")
    try:
        record = read_record(stem.with_suffix(".json"))
        parts, dtype = Parts(**record["parts"]), np.dtype(record["dtype"])
        count, size = parts.tokens + parts.test_tokens, bin_path.stat().st_size
        if size != count * dtype.itemsize:
            raise Damaged(f"{bin_path.name} has {size:,} bytes, not {count * dtype.itemsize:,}")
        shards = record.get("shards") or [{"number": 0, "at": 0, "tokens": [count], "sha256": record["ids_sha256"]}]
        if bad := len(shards) - len(_whole(bin_path, {shard["number"]: shard for shard in shards}, dtype)):
            some = f" ({bad} of {len(shards)} shards)" if len(shards) > 1 else ""
            raise Damaged(f"{bin_path.name} has changed since it was written{some}")
        ids = _map(bin_path, dtype, count)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, Damaged, KeyError, TypeError) as error:  # the last two of another version's
        notice(f"the prepared files {stem}.* are not used ({error}); preparing again.")
        return None
    return Prepared(ids, parts, tokenizer_from_json(record["tokenizer"], data_dir))


def prepare(
    text: Corpus, text_sha256: str, kind: str, vocab_size: int, data_dir: str = "", threads: int = 1
) -> Prepared:
    """Makes the tokenizer, encodes `text` and keeps both in the cache; where that cannot be written, in memory only.

    The text is read once to see what is in it, once to train a BPE vocabulary, and once to encode it. Raises UserError
    when it is none, or the tokenizer cannot be made.
    """
    stem = cache_root() / "prepared" / file_stem(text_sha256, kind, vocab_size)
    job: Job | None = None
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with _lock(stem) as waited:
            if waited and (done := load_prepared(text_sha256, kind, vocab_size, data_dir)):
                return done
            job = _unfinished(stem, data_dir) or _new_job(text, kind, vocab_size, data_dir)
            record = _encode_to_disk(text, job, stem, threads)
    except (OSError, NotImplementedError) as error:  # the second where a file system has no locks
        notice(
            f"the prepared text cannot be kept in {stem.parent} ({getattr(error, 'strerror', None) or error}); it "
            "stays in memory, and the next run prepares it again. NANOGFT_CACHE=FOLDER names another cache."
        )
        job = job or _new_job(text, kind, vocab_size, data_dir)
        job.shards.clear()
        memory = io.BytesIO()
        record = _encode(text, job, memory, threads)
        ids = np.frombuffer(memory.getbuffer(), job.tokenizer.dtype)
        ids.flags.writeable = False
    else:
        count = sum(sum(shard["tokens"]) for shard in record["shards"])
        ids = _map(stem.with_suffix(".bin"), job.tokenizer.dtype, count)
    return Prepared(ids, Parts(**record["parts"]), job.tokenizer)


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be encoded, and which shards of it are on disk already."""

    tokenizer: Tokenizer
    ends: tuple[int, int, int, int]  # of the parts, in characters
    shards: dict[int, dict[str, Any]]  # by "number"; "at", the tokens before; "chars"; "tokens" of each part; "sha256"


def _new_job(text: Corpus, kind: str, vocab_size: int, data_dir: str) -> Job:
    (train, val, test), alphabet = text.survey()
    if val:
        ends = int(0.9 * train), train, train + val, train + val + test
    else:
        ends = int(0.81 * train), int(0.9 * train), train, train + test
    every = -(-ends[0] // SAMPLE) or 1
    if kind == "bpe":
        of = f"{SAMPLE / 1e6:.0f} million characters, spread over {train:,}" if every > 1 else "the training text"
        notice(f"training a bpe vocabulary of {vocab_size:,} on {of} (once).")
    with closing(parts_of(text.chunks("learning the words of"), ends)) as pieces:
        learned_from = (piece for _, piece in itertools.takewhile(lambda numbered: numbered[0] == 0, pieces))
        sample = itertools.islice(learned_from, 0, None, every)
        return Job(make_tokenizer(kind, vocab_size, "".join(alphabet), sample, data_dir), ends, {})


def _unfinished(stem: Path, data_dir: str) -> Job | None:
    """The job of a preparation that was killed, or of a damaged one; its good shards are in `stem`.part."""
    part = stem.with_suffix(".part")
    for ids in (part, stem.with_suffix(".bin")):
        try:
            record = read_record(ids.with_suffix(".part.json" if ids == part else ".json"))
            shards = {shard["number"]: shard for shard in record["shards"]}
            tokenizer = tokenizer_from_json(record["tokenizer"], data_dir)
            good = _whole(ids, shards, tokenizer.dtype)
            if good or ids == part:
                os.replace(ids, part)
                notice(f"going on with {part}: {len(good)} shards of it are whole.")
                return Job(tokenizer, tuple(record["ends"]), good)
        except (OSError, Damaged, KeyError, TypeError, UserError):  # KeyError, TypeError: of another version
            continue
    return None


def _encode_to_disk(text: Corpus, job: Job, stem: Path, threads: int) -> dict[str, Any]:
    """Encodes into `stem`.bin by way of `stem`.part, which stays for the next run if this one is killed."""
    part, head = stem.with_suffix(".part"), stem.with_suffix(".part.json")
    tokenizer = job.tokenizer.to_json()

    def keep() -> None:
        os.fsync(file.fileno())
        write_record(head, {"tokenizer": tokenizer, "ends": job.ends, "shards": list(job.shards.values())})

    remove_leftovers(stem)
    try:
        with open(part, "r+b" if job.shards else "wb") as file:
            record = _encode(text, job, file, threads, keep)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, stem.with_suffix(".bin"))
        write_record(stem.with_suffix(".json"), record)
    except Exception:  # but not KeyboardInterrupt: that run can be taken up
        part.unlink(missing_ok=True)
        head.unlink(missing_ok=True)
        raise
    head.unlink(missing_ok=True)
    return record


def _encode(
    text: Corpus, job: Job, file: BinaryIO, threads: int, keep: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Writes the ids to `file`; what `load_prepared` needs to know. `keep` is called before each shard of several."""
    total = [0, 0, 0, 0]
    numbered = _numbered(parts_of(text.chunks("encoding"), job.ends))
    for number, group in itertools.groupby(numbered, key=lambda piece: piece[0]):
        if number not in job.shards and job.ends[-1] > SHARD:
            file.flush()
            keep()
        if shard := job.shards.get(number):
            chars = sum(len(piece) for _, _, piece in group)
            if chars != shard["chars"]:
                raise text.changed()
        else:
            file.seek(sum(total) * job.tokenizer.dtype.itemsize)
            found = _encode_shard(text, job.tokenizer, group, file, threads)
            shard = job.shards[number] = {"number": number, "at": sum(total)} | found
        total = [a + b for a, b in zip(total, shard["tokens"])]
    file.truncate(sum(total) * job.tokenizer.dtype.itemsize)  # of a file that was added to
    shards = [job.shards[number] for number in sorted(job.shards)]
    hashes = [shard["sha256"] for shard in shards]
    return {
        "parts": asdict(Parts.of(total, job.ends)),
        "dtype": job.tokenizer.dtype.str,
        "ids_sha256": hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()),
        "ends": job.ends,
        "shards": shards,
        "tokenizer": job.tokenizer.to_json(),
    }


def _encode_shard(
    text: Corpus, tokenizer: Tokenizer, group: Iterable[tuple[int, int, str]], file: BinaryIO, threads: int
) -> dict[str, Any]:
    chars, tokens, digest = 0, [0, 0, 0, 0], hashlib.sha256()
    waiting: deque[tuple[int, Future[np.ndarray]]] = deque()

    def write(part: int, encoded: Future[np.ndarray]) -> None:
        try:
            ids = encoded.result()
        except UserError as error:  # a character that was not there before
            raise text.changed() from error
        tokens[part] += len(ids)
        digest.update(ids.data)
        file.write(ids.data)

    with ThreadPoolExecutor(threads) as pool:
        for _, part, piece in group:
            chars += len(piece)
            waiting.append((part, pool.submit(tokenizer.encode_array, piece)))
            if len(waiting) > 2 * threads:
                write(*waiting.popleft())
        for encoded in waiting:
            write(*encoded)
    return {"chars": chars, "tokens": tokens, "sha256": digest.hexdigest()}


def _numbered(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    """Each piece with its part and, before that, the number of its shard."""
    number, size = 0, 0
    for part, piece in pieces:
        yield number, part, piece
        size += len(piece)
        if size >= SHARD:
            number, size = number + 1, 0


@contextmanager
def _lock(stem: Path) -> Iterator[bool]:
    """Keeps other processes from preparing the same; True if one was waited for."""
    lock, waited = FileLock(stem.with_suffix(".lock")), False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notice("another process is preparing this text; waiting for it.")
        lock.acquire()
        waited = True
    try:
        yield waited
    finally:
        lock.release()


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


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    except OSError as error:
        if error.errno == errno.ENOMEM:  # of addresses
            raise MemoryError(f"{path} cannot be mapped") from error
        raise


def _whole(path: Path, shards: dict[int, dict[str, Any]], dtype: np.dtype) -> dict[int, dict[str, Any]]:
    """Those of the shards whose ids in `path` have their hash."""
    good = {}
    with open(path, "rb") as file:
        for number, shard in sorted(shards.items()):
            digest, left = hashlib.sha256(), sum(shard["tokens"]) * dtype.itemsize
            file.seek(shard["at"] * dtype.itemsize)
            while left and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            if not left and digest.hexdigest() == shard["sha256"]:
                good[number] = shard
    return good
