"""The folder of a run: which one it is, and the lock that keeps a second run out of it."""

import dataclasses
import glob
import re
from pathlib import Path

from filelock import FileLock, Timeout

from run import checkpoint
from run.config import Config
from run.errors import UserError

JOB = "torchrun"  # the file that names the job of a folder's run


def choose_folder(cfg: Config) -> tuple[Path, FileLock]:
    """The run's folder, and its lock, which is held until it is released or the process ends.

    Nothing saved is overwritten: a new run in a used folder is refused, or numbered if it has no --out_dir of its own;
    a resumed one takes the newest of its name. Raises UserError if there is no such folder or another run holds it.
    """
    first = Path(cfg.out_dir or Path("out", cfg.name))
    folders = [first] if cfg.out_dir else _numbered(first)
    used = [folder for folder in folders if _has_run(folder)]
    if cfg.resume and not used:
        remedy = "drop --resume to start one, or give the run's --out_dir"
        raise UserError(f"--resume {cfg.resume}: {first} contains no run; {remedy}")
    free = folders[folders.index(used[-1]) + 1 :] if used else folders
    for folder in used[-1:] if cfg.resume else free:
        if lock := _lock(folder):
            return folder, lock
        if cfg.out_dir or cfg.resume:
            raise UserError(f"another run is writing into {folder}; wait for it, or choose another --out_dir")
    raise UserError(f"{first} already holds a run; use --resume to continue it, or another --out_dir for a new run")


def take_up(cfg: Config, job: str) -> Config:
    """cfg, made to go on from `last` of the newest folder of its name that `sign` has marked with `job`, if any."""
    first = Path(cfg.out_dir or Path("out", cfg.name))
    for folder in reversed([first] if cfg.out_dir else _numbered(first)):
        mark = folder / JOB
        if checkpoint.exists(folder, "last") and mark.is_file() and mark.read_text(encoding="utf-8") == job:
            return dataclasses.replace(cfg, out_dir=str(folder), resume="last")
    return cfg


def sign(folder: Path, job: str) -> None:
    """Mark a run's folder as that of a job, which may be restarted."""
    (folder / JOB).write_text(job, encoding="utf-8")


def _numbered(first: Path) -> list[Path]:
    """first, those of first-2, first-3, ... that exist, and one more. Longer numbers are someone's dates."""
    names = [path.name for path in first.parent.glob(f"{glob.escape(first.name)}-*")]
    endings = (re.fullmatch(re.escape(first.name) + r"-([1-9]\d{0,3})", name) for name in names)
    numbers = sorted(int(ending[1]) for ending in endings if ending)
    return [first, *(first.with_name(f"{first.name}-{n}") for n in [*numbers, max([1, *numbers]) + 1])]


def _lock(folder: Path) -> FileLock | None:
    """The lock of `folder`, which is made if need be; None if another run holds it. Raises UserError if it fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:  # the second where a file system has no locks
        raise UserError(
            f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}; "
            "make it a writable folder or choose another --out_dir"
        ) from None
    return lock


def _has_run(folder: Path) -> bool:
    return any(checkpoint.exists(folder, name) for name in checkpoint.LOADED)
