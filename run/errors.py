"""The one exception a program shows a person without a traceback."""

DIVERGED = 3  # exit status of a training whose loss became infinite: the same command would end so again


class UserError(Exception):
    """Something the person at the keyboard can mend.

    The message says what was seen, what the rule is and what to do. `code` is the
    program's exit status: 2 for a configuration, DIVERGED, 1 for everything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
