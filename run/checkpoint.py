"""Checkpoints: safetensors for tensors, JSON for everything else, hashed, never half-written. Nothing is pickled.

A checkpoint `last` or `best` in a folder is two files:

    last-00000100.safetensors    the tensors, as they were at step 100
    last.json                    format, version, the name, SHA-256 and size of that file, meta, and
                                 content_sha256: SHA-256 of the JSON's own canonical content

Order of work in `save`. Killed between any two lines, a good checkpoint remains:

    1. last-<step>.safetensors.tmp written, flushed, renamed     not referred to by anything yet
    2. last.json.tmp and previous.json.tmp written and flushed   whatever needs disk space is done
    3. last.json.tmp renamed to last.json                        the commit
    4. previous.json.tmp renamed to previous.json                the checkpoint that `last` replaced
    5. older tensors and stale .tmp files deleted

Only a checkpoint whose hashes hold becomes `previous`: a damaged `last` never pushes out a good `previous`.
One process writes to a folder; any number may read from it meanwhile.

torch is imported where it is used: `load_arrays` does without it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from run.config import Config, from_dict
from run.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "nanogft-checkpoint", 2
PROGRAM = "0.1.0"  # the version in pyproject.toml
LOADED = ("last", "best", "previous")
BODY = re.compile(r"(last|best)-\d{8,}(-\d+)?\.safetensors")
LEFTOVER = re.compile(r"(last|best|previous)(-\d{8,}(-\d+)?\.safetensors|\.json)\.tmp")
KEPT = re.compile(r"step-\d{8,}")
REMEDIES = {
    errno.ENOSPC: "free some disk space or choose another folder with --out_dir",
    errno.EDQUOT: "free some of your disk quota or choose another folder with --out_dir",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another folder with --out_dir",
    errno.ENOTDIR: "move the file that stands where a folder is needed, or choose another folder with --out_dir",
    errno.EEXIST: "move the file that stands where a folder is needed, or choose another folder with --out_dir",
}


def save(out_dir: Path, name: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write checkpoint `name` ("last" or "best") into `out_dir`, made if it is not there.

    `tensors` may lie on any device, be strided or share memory: copies are stored. `meta` is anything JSON can
    hold (keys are strings) and has the integer "step". Returns once the checkpoint has reached the disk.
    Raises UserError where the disk is full or the folder cannot be written; earlier checkpoints are then intact.
    """
    import safetensors.torch
    import torch

    out_dir = Path(out_dir)
    data = safetensors.torch.save(
        {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    )
    record = {"format": FORMAT, "version": VERSION, "meta": meta | {"program": PROGRAM}}
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    head, previous = out_dir / f"{name}.json", out_dir / "previous.json"
    uncommitted = []
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        body = _unused(out_dir, f"{name}-{meta['step']:08d}")
        uncommitted = [body, _tmp(body), _tmp(head), _tmp(previous)]
        _write(_tmp(body), data)
        os.replace(_tmp(body), body)
        record["file"] = body.name
        _write(_tmp(head), _json_bytes(record | {"content_sha256": _content_sha256(record)}))
        replaced = _good_json(head) if name == "last" else None
        if replaced is not None:
            _write(_tmp(previous), replaced)
        _sync_folder(out_dir)
        os.replace(_tmp(head), head)
        uncommitted = []
        if replaced is not None:
            os.replace(_tmp(previous), previous)
        _sync_folder(out_dir)
        _delete_older(out_dir, name)
    except OSError as exc:
        remedy = REMEDIES.get(exc.errno, "make the folder writable or choose another one with --out_dir")
        raise UserError(
            f"cannot save checkpoint {head} ({len(data):,} bytes): {exc.strerror or exc}. "
            f"Earlier checkpoints in {out_dir} are intact. To go on, {remedy}."
        ) from exc
    finally:
        for path in uncommitted:
            with contextlib.suppress(OSError):  # what cannot be removed now, the next commit removes
                path.unlink()


def keep(out_dir: Path, limit: int) -> None:
    """Make the checkpoint `last` stay in `out_dir`/step-<step>, and delete all but `limit` of these folders.

    The new one stays; those of later steps, which a run resumed from an earlier one has left behind, go first, then the
    oldest. 0 deletes none. The files are links where the file system has them. Raises OSError where the disk is full.
    """
    record = _record(out_dir / "last.json")
    now = record["meta"]["step"]
    folder = out_dir / f"step-{now:08d}"
    folder.mkdir(exist_ok=True)
    for name in (record["file"], "last.json"):  # the JSON last: with it the folder holds a checkpoint
        (folder / name).unlink(missing_ok=True)
        try:
            os.link(out_dir / name, folder / name)
        except OSError:
            shutil.copyfile(out_dir / name, folder / name)
    steps = {int(path.name[5:]): path for path in out_dir.iterdir() if KEPT.fullmatch(path.name)}
    del steps[now]
    others = [steps[step] for step in sorted(steps, key=lambda step: (step < now, step))]
    for old in others[: max(0, len(others) + 1 - limit)] if limit else ():
        (old / "last.json").unlink(missing_ok=True)
        shutil.rmtree(old)


def load(out_dir: Path, name: str, option: str = "--resume {}") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of checkpoint "last", "best" or "previous"; both hashes are checked first.

    Raises UserError naming the file that is missing, damaged or foreign, what was seen, what was expected, and
    which other checkpoint of the folder is good; `option` is the caller's own that would choose it, {} being its name.
    """
    import safetensors.torch

    return _load(out_dir, name, option, safetensors.torch.load)


def load_arrays(out_dir: Path, name: str, option: str = "--resume {}") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`load` without torch: numpy's arrays, which are not to be written to."""
    return _load(out_dir, name, option, safetensors.numpy.load)


def _load(out_dir: Path, name: str, option: str, decode: Callable[[bytes], Any]) -> tuple[dict, dict[str, Any]]:
    head = Path(out_dir) / f"{name}.json"
    while True:
        before = _stamp(head)
        try:
            record, tensors = _verified(head, decode)
            return tensors, record["meta"]
        except UserError as exc:
            if _stamp(head) != before:  # a training run saved while this was reading: read the new one
                continue
            raise UserError(f"{exc} {_alternative(Path(out_dir), name, option)}") from None


def require(values: Mapping[str, Any], head: Path, **kinds: type) -> None:
    """Raises UserError unless what the checkpoint's JSON `head` holds under these names is of these kinds."""
    if wrong := [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]:
        raise UserError(f"{head} was not written by this program, though its hash is right: its {', '.join(wrong)}.")


def config_of(meta: Mapping[str, Any], head: Path) -> Config:
    """The settings in the meta of a checkpoint whose JSON is `head`. Raises UserError if they are another version's."""
    require(meta, head, config=dict)
    config = meta["config"]
    if "keep_bits" not in config and "bits" in config:  # before there was the key, weights kept what was read of them
        config = config | {"keep_bits": config["bits"]}
    try:
        return from_dict(config)
    except UserError as error:
        raise UserError(
            f"{head} was written by version {meta.get('program', 'unknown')} of this program, format {VERSION}, with "
            f"settings that this version, {PROGRAM}, does not have: {error}. Update this program (git pull), or use "
            "the version that wrote the file."
        ) from None


def exists(out_dir: Path, name: str) -> bool:
    """Whether `out_dir` has a checkpoint of this name, good or damaged."""
    return (Path(out_dir) / f"{name}.json").is_file()


def join(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One flat dict out of several: join(model=a, optimizer=b) has the keys "model.x" and "optimizer.y"."""
    return {f"{group}.{key}": tensor for group, tensors in groups.items() for key, tensor in tensors.items()}


def group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a joined dict that was given as `name`, under its own keys again."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def flatten(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Nested dicts of tensors and numbers, as in an optimizer's state_dict()["state"], as one dict of named tensors.

    {0: {"step": 3.0, "m": t}} becomes {"0.step": tensor(3.0), "0.m": t}; numbers are float64 or int64 tensors of no
    dimension. Raises TypeError for anything else, None and texts included: they belong into meta.
    """
    import torch
    from torch import Tensor

    tensors = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            tensors |= join(**{str(key): flatten(value)})
        elif isinstance(value, (Tensor, int, float)):
            exact = {float: torch.float64, int: torch.int64}.get(type(value))
            tensors[str(key)] = torch.as_tensor(value, dtype=exact)
        else:
            raise TypeError(f"{key}: a {type(value).__name__} is neither a tensor nor a number")
    return tensors


def unflatten(tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    """What `flatten` was given: whole numbers are integer keys again, numbers stay tensors of no dimension."""
    state: dict[Any, Any] = {}
    for path, tensor in tensors.items():
        inner = state
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = tensor
    return state


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of the names: equal only for bit-identical weights."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tmp(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _unused(out_dir: Path, stem: str) -> Path:
    """`stem`.safetensors, with -2, -3, ... where that is taken: a committed file is never written over."""
    path, count = out_dir / f"{stem}.safetensors", 1
    while path.exists():
        count += 1
        path = out_dir / f"{stem}-{count}.safetensors"
    return path


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power cut; only POSIX systems let a folder be opened for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_older(out_dir: Path, name: str) -> None:
    """Delete tensors of `name` that no JSON refers to, and what interrupted saves left."""
    used = set()
    for keeper in LOADED:
        with contextlib.suppress(UserError):  # a JSON that cannot be read keeps nothing
            used.add(_record(out_dir / f"{keeper}.json")["file"])
    for path in out_dir.iterdir():
        body = BODY.fullmatch(path.name)
        if LEFTOVER.fullmatch(path.name) or (body and body[1] == name and path.name not in used):
            with contextlib.suppress(OSError):  # the checkpoint is safe; a file left over only costs space
                path.unlink()


def _json_bytes(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def _content_sha256(record: Mapping[str, Any]) -> str:
    canonical = json.dumps({k: v for k, v in record.items() if k != "content_sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when another file is renamed to `path`; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except OSError as exc:
        raise UserError(f"{path} cannot be read: {exc.strerror or exc}.") from exc


def _record(head: Path) -> dict[str, Any]:
    """The content of a checkpoint's JSON once it is known to be ours and whole; UserError otherwise."""
    text = _read(head)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as exc:  # not UTF-8, not JSON, or lists in lists without end
        raise UserError(f"{head} is damaged: {len(text):,} bytes that are not JSON ({exc}).") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        seen = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(f'{head} is not a checkpoint of this program: "format" is {seen!r}, not {FORMAT!r}.')
    if (version := record.get("version")) != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise UserError(
            f"{head} was written by format version {version}; this program reads {VERSION}: "
            + ("update this program (git pull), or " if newer else "")
            + "use the version of the program that wrote it, or train again in another --out_dir."
        )
    seen, expected = _content_sha256(record), record.get("content_sha256")
    if seen != expected:
        raise UserError(f"{head} is damaged or was edited: its content has SHA-256 {seen}, and it says {expected}.")
    require(record, head, file=str, bytes=int, sha256=str, meta=dict)
    require(record["meta"], head, step=int)
    require({"file": BODY.fullmatch(record["file"])}, head, file=re.Match)
    return record


def _verified(head: Path, decode: Callable[[bytes], Any] = safetensors.deserialize) -> tuple[dict[str, Any], Any]:
    """A checkpoint's JSON and its tensors, both verified: the bytes checked are the bytes used."""
    record = _record(head)
    body = head.with_name(record["file"])
    data = _read(body)
    if len(data) != record["bytes"]:
        raise UserError(f"{body} is damaged: it has {len(data):,} bytes and {head.name} says {record['bytes']:,}.")
    seen = hashlib.sha256(data).hexdigest()
    if seen != record["sha256"]:
        raise UserError(f"{body} is damaged: its SHA-256 is {seen} and {head.name} says {record['sha256']}.")
    try:
        return record, decode(data)
    except (SafetensorError, KeyError) as exc:  # the second: a type of numbers that torch or numpy does not have
        raise UserError(f"{body} was not written by this program, though its hash is right ({exc}).") from None


def _good_json(head: Path) -> bytes | None:
    """The bytes of a checkpoint's JSON if the whole checkpoint is good, else None."""
    try:
        _verified(head)
    except UserError:
        return None
    return head.read_bytes()


def _alternative(out_dir: Path, name: str, option: str) -> str:
    """What to do about a checkpoint that cannot be loaded: the newest of the other good ones, or that there is none."""
    steps: dict[str, int] = {}
    for other in ("previous", "last", "best"):
        with contextlib.suppress(UserError):
            if other != name:
                steps[other] = _verified(out_dir / f"{other}.json")[0]["meta"]["step"]
    if not steps:
        return f"There is no other good checkpoint in {out_dir}: train again to make one."
    newest = max(steps, key=steps.get)
    use = option.replace("{}", newest)
    return f"A good checkpoint of step {steps[newest]} is there as {newest!r}: to use it, give {use}."
