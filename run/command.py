"""What the programs that use a checkpoint share: their options, the run's folder, the device, output, exit statuses.

torch is imported where it is used, so that --help and a mistyped option need not wait for it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from run.errors import UserError, closest

CHECKPOINTS = ("last", "best", "previous")  # run.checkpoint.LOADED


class Parser(argparse.ArgumentParser):
    """The options of a program that takes a run's folder first, with underscores or dashes."""

    def __init__(self, prog: str, description: str, folder: str):
        super().__init__(prog=prog, description=description)
        self.add_argument("folder", help=f"the run's folder, e.g. {folder}")

    def error(self, message: str) -> None:
        """As argparse's, for which the command line is at fault."""
        raise UserError(f"{message}; python {self.prog} --help lists the options", code=2)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The options; UserError with code 2 says which one is wrong, the rule, and the closest name."""
        self.add_argument("--checkpoint", choices=CHECKPOINTS, help="default: best, or last where there is no best")
        options = argv.index("--") if "--" in argv else len(argv)  # what follows it is none
        argv = [_with_dashes(word) for word in argv[:options]] + argv[options:]
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            hint = closest(unknown[0].split("=")[0], names, "; did you mean {}?")
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return args


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def find_folder(given: str, checkpoint: str | None = None) -> Path:
    """The run's folder: as given, or of that name in out/; or a packed file that export.py wrote.

    Raises UserError where there is none, and for a `checkpoint` of a packed file.
    """
    for path in (Path(given), Path("out") / given):
        if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
            if checkpoint and path.is_file():
                raise UserError(f"--checkpoint {checkpoint}: {path} is a packed file of one net; leave it out", code=2)
            return path
    runs = [str(path) for path in Path("out").glob("*") if path.is_dir()]
    hint = closest(given, runs, "did you mean {}?") or "give the folder that train.py wrote, e.g. out/NAME"
    raise UserError(f"{given} is not a folder: {hint}", code=2)


def choose_device(wanted: str) -> tuple[str, str]:
    """The device and why it is this one."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu or auto", code=2)
    if wanted != "auto":
        return wanted, "as asked"
    return ("cuda", "a GPU is there") if torch.cuda.is_available() else ("cpu", "torch sees no CUDA GPU")


def emit(text: str) -> None:
    """Write to standard output at once. Raises UserError where that is impossible, BrokenPipeError if nobody reads."""
    if sys.stdout is None:
        raise UserError("standard output is closed; give the results a place to go")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it exits
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write the text to standard output: {error.strerror or error}") from error


def exit_status(run: Callable[[list[str]], int | None], argv: list[str] | None, less_memory: str) -> int:
    """A program's exit status: `run`'s answer, 0 for None; 2 for a wrong option, 1 for another error, 130 after Ctrl-C.

    argv is the command line, None that of the process; `less_memory` what to do where there was too little.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not closed, and no notebook's
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return run(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the results has enough of them
        return 0
    except (MemoryError, RuntimeError) as error:
        # Only torch, once imported, raises an error of its own.
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        print(f"error: out of memory ({str(error) or 'none is left'}); {less_memory}", file=sys.stderr)
        return 1
