"""The one exception a program shows a person without a traceback, and what its messages are made of."""

import difflib
from collections.abc import Iterable, Sequence

DIVERGED = 3  # exit status of a training whose loss became infinite: the same command would end so again


class UserError(Exception):
    """An error the user can fix.

    The message says what was seen, what the rule is and what to do. `code` is the
    program's exit status: 2 for a configuration, DIVERGED, 1 for everything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def refuse(problems: Sequence[str]) -> None:
    """Raises UserError(code=2) with every problem, one a line, if there are any."""
    if problems:
        many = f"{len(problems)} problems with the configuration:\n  " if len(problems) > 1 else ""
        raise UserError(many + "\n  ".join(problems), code=2)


def closest(word: str, names: Iterable[str], wording: str) -> str:
    """`wording` with the name most like `word` in place of {}; empty if none is alike."""
    near = difflib.get_close_matches(word.lower(), [name for name in names if name], n=1)
    return wording.format(near[0]) if near else ""
