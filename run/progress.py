"""What a run says while it goes: metrics.jsonl for programs, one progress line for people."""

import json
import os
import sys
import time
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
    """One line about the run: redrawn on a terminal, printed every so often elsewhere."""

    def __init__(self, steps: int, step: int, per_step: int, unit: str):
        self.steps, self.per_step, self.unit = steps, per_step, unit
        self.first, self.begun = step, time.monotonic()
        self.shown = self.begun
        self.val_loss: float | None = None
        self.accuracy: float | None = None
        self.monitor: dict[str, float] | None = None
        self.terminal = sys.stdout.isatty()

    def show(self, record: dict) -> None:
        """Show the record of a step."""
        self.val_loss = record.get("val_loss", self.val_loss)
        self.accuracy = record.get("accuracy", self.accuracy)
        self.monitor = record.get("monitor", self.monitor)
        now = time.monotonic()
        evaluated = "val_loss" in record
        if not self.terminal and not evaluated and now - self.shown < QUIET_SECONDS:
            return
        self.shown = now
        done = record["step"] - self.first
        pace = (now - self.begun) / done
        left = int(pace * (self.steps - record["step"]))
        flips = f"flips {record['flips']:.3f}  " if record["flips"] < 1 else ""
        val = f"val {self.val_loss:.3f}  " if self.val_loss is not None else ""
        val += f"right {self.accuracy:.1%}  " if self.accuracy is not None else ""
        text = (f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.3f}  {val}{flips}"
                f"{self.per_step / pace:,.0f} {self.unit}/s  {left // 60}:{left % 60:02d} left")  # fmt: skip
        if self.terminal:
            print("\r\x1b[K" + text, end="\n" if evaluated else "", flush=True)
        else:
            print(text, flush=True)
        if evaluated and self.monitor:
            m = self.monitor
            self.line(f"    weights at the limit {m['at_limit']:.1%}, at zero {m['zeros']:.1%}; "
                      f"moves undone {m['undone']:.0%}; delta saturated {m['saturation']:.2%}; "
                      f"dead rows {m['dead_rows']:.1%}")  # fmt: skip

    def line(self, text: str) -> None:
        """Print a line of its own."""
        print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def text(self, sample: str) -> None:
        """Print a sample, set off from the progress lines."""
        self.line("\n".join("    | " + line for line in sample.splitlines()))
