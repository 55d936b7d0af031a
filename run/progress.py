"""What a run says while it goes: metrics.jsonl for programs, one progress line for people."""

import json
import math
import os
import shutil
import statistics
import sys
import time
import unicodedata
from collections import deque
from pathlib import Path

from run.curve import read_metrics
from run.errors import UserError

QUIET_SECONDS = 15.0  # between plain lines where there is no terminal to redraw


class Metrics:
    """Appends records to metrics.jsonl. Records after `step`, left by a run that was killed later, are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read_metrics(path) if r["step"] <= step] if path.exists() and step else []
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(temporary, path)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._refused(error) from None

    def write(self, record: dict) -> None:
        """Append one record. Raises UserError if the disk does not take it."""
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written: {error.strerror}; checkpoints saved before are intact. Free space or make "
            "the folder writable, then go on with --resume, or choose another --out_dir"
        )


class Progress:
    """One line about the run: redrawn on a terminal, printed every so often elsewhere.

    `seconds` is what a resumed run had trained before, as its records count on from there.
    """

    def __init__(self, steps: int, step: int, per_step: int, unit: str, seconds: float = 0.0):
        self.steps, self.per_step, self.unit = steps, per_step, unit
        self.first, self.begun = step, time.monotonic()
        self.shown = self.begun
        self.step, self.seconds = step, seconds
        self.paces: deque[float] = deque(maxlen=1000)  # seconds a step, between one record and the next
        self.latest: dict = {}
        self.terminal = sys.stdout.isatty()

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a training step: the median between records, the first of which may include compilation.

        What lies between steps, evaluations and samples, is not counted. None before there is a record.
        """
        paces = list(self.paces)
        return statistics.median(paces[1:] or paces) if paces else None

    def show(self, record: dict) -> None:
        """Show a record: "step", "loss", "flips" per weight, "seconds" of training so far, and after an evaluation
        "val_loss", "accuracy" and "monitor"."""
        self.paces.append((record["seconds"] - self.seconds) / (record["step"] - self.step))
        self.step, self.seconds = record["step"], record["seconds"]
        self.latest |= record
        evaluated, now = "val_loss" in record, time.monotonic()
        if not self.terminal and not evaluated and now - self.shown < QUIET_SECONDS:
            return
        self.shown = now
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            print("\r\x1b[K" + cut(self._text(now), columns - 1), end="\n" if evaluated else "", flush=True)
        else:
            print(self._text(now), flush=True)
        if evaluated and "monitor" in self.latest:
            m = self.latest["monitor"]
            dead = f"; dead rows {m['dead_rows']:.1%}" if "dead_rows" in m else ""
            self.line(f"    weights at the limit {m['at_limit']:.1%}, at zero {m['zeros']:.1%}; "
                      f"moves undone {m['undone']:.0%}{dead}")  # fmt: skip

    def _text(self, now: float) -> str:
        latest = self.latest
        left = int((now - self.begun) / (self.step - self.first) * (self.steps - self.step))
        speed = self.per_step / self.step_seconds if self.step_seconds else 0.0
        parts = [
            f"step {self.step:>{len(str(self.steps))}}/{self.steps}", f"loss {latest['loss']:.3f}",
            f"val {latest['val_loss']:.3f}" if "val_loss" in latest else "",
            f"{latest['bits_per_byte']:.3f} bits/byte" if self._tells_bytes() else "",
            f"right {latest['accuracy']:.1%}" if "accuracy" in latest else "",
            f"flips {latest['flips']:.3f}" if latest["flips"] < 1 else "",
            f"{speed:,.0f} {self.unit}/s", f"{left // 60}:{left % 60:02d} left",
        ]  # fmt: skip
        return "  ".join(part for part in parts if part)

    def _tells_bytes(self) -> bool:
        """Whether bits per byte are known, and are not just the loss of bytes in other units."""
        bits, nats = self.latest.get("bits_per_byte"), self.latest.get("val_loss")
        return bits is not None and abs(bits * math.log(2) - nats) > 0.01 * nats

    def line(self, text: str) -> None:
        """Print a line of its own."""
        print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def text(self, sample: str) -> None:
        """Print a sample, set off from the progress lines."""
        self.line("\n".join("    | " + line for line in sample.splitlines()))


def cut(text: str, columns: int) -> str:
    """The beginning of `text` that fits into so many columns of a terminal: wide characters take two, accents none."""
    used = 0
    for at, c in enumerate(text):
        used += 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if used > columns:
            return text[:at]
    return text
