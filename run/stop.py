"""Signals that ask a run to stop."""

import contextlib
import signal
import sys


class Stop:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request; the second one ends at once.

    A signal that is ignored when the run starts, as nohup has SIGHUP, stays ignored.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

    def __init__(self) -> None:
        self.signal = 0
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        with contextlib.suppress(OSError):  # a window that was closed
            print("\nstopping after this step; press Ctrl-C again to stop now", file=sys.stderr, flush=True)
