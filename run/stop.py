"""Signals that ask a run to stop."""

import contextlib
import signal
import sys


class Stop:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request; the second one ends at once, unless `patient`: torchrun
    hands on what reached this process too, and kills it after half a minute.

    A signal that is ignored when the run starts, as nohup has SIGHUP, stays ignored.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

    def __init__(self, patient: bool = False) -> None:
        self.signal, self.patient = 0, patient
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal and not self.patient:
            raise SystemExit(128 + number)
        if self.signal:
            return
        self.signal = number
        with contextlib.suppress(OSError):  # a window that was closed
            print("\nstopping after this step; press Ctrl-C again to stop now", file=sys.stderr, flush=True)
