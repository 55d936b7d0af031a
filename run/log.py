"""What a training reports, loss and flips, evaluations, samples, the curve, warnings, and when it saves."""

import math
import sys
import time
from collections.abc import Callable

import torch

from run import checkpoint, energy
from run.curve import draw
from run.device import resident_bytes
from run.errors import DIVERGED, UserError
from run.finite import largest, origin
from run.meter import Meter
from run.monitor import warnings
from run.progress import Metrics, Progress
from run.state import Run

MOST_REPEATED = 100  # steps made once more to find out what was not finite


class Log:
    """Logs, evaluates and saves. It reads from the device after steps that are `due`; other steps wait for nothing.

    All ranks call all of it, as they sum and evaluate together; rank 0 alone writes.
    """

    def __init__(self, run: Run, metrics: Metrics | None, sample: Callable[[], str]):
        self.run, self.metrics, self.sample, self.stopping = run, metrics, sample, False
        self.progress = Progress(run.cfg.steps, run.step, run.task.per_step, run.task.unit, run.seconds)
        self.meter = Meter.on(run.device.type, run.device.index)
        self.meter.start()  # watches the idle device for two seconds, which are no part of the training
        self.last = run.step  # that of the last read
        self.begun, self.flips = time.perf_counter(), 0
        self.loss = torch.zeros((), device=run.device)  # summed since the last read
        self.found: dict[str, float] = {}
        self.resident: list[int] = []
        self.said: set[str] = set()
        self.started, self.evaluating, self.evaluation = time.perf_counter(), 0.0, 0.0  # in all, and the last one
        self.board = None
        if run.cfg.logger == "tensorboard" and run.ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.out), purge_step=run.step + 1)

    def due(self) -> bool:
        """Whether this step is one to read after."""
        run, cfg = self.run, self.run.cfg
        every = (cfg.log_every, cfg.eval_every, cfg.save_every, cfg.monitor_every, cfg.keep_every or cfg.save_every)
        ends = run.step == cfg.steps or self.stopping
        return ends or run.step == run.first_step + 1 or any(run.step % n == 0 for n in every)

    def write(self, measured: dict) -> None:
        """Read loss and flips; evaluate, show and save where it is time to. Raises UserError if the run diverged."""
        run, cfg = self.run, self.run.cfg
        steps, loss = run.step - self.last, run.ranks.sum(self.loss).item()  # waits for the device
        self._check_finite(loss)
        run.seconds += time.perf_counter() - self.begun
        self.meter.poll()
        flips = int(run.flip_optimizer.flips()) if run.flip_optimizer else 0
        changed = flips - self.flips + steps * run.floats
        run.changed += changed
        record = {
            "step": run.step, "loss": round(loss / steps / run.task.per_step, 5),
            "flips": changed / steps / run.weights, "seconds": round(run.seconds, 4), **measured,
        }  # fmt: skip
        last = run.step == cfg.steps
        begun = time.perf_counter()
        if last or run.step % cfg.eval_every == 0 and self._has_time(begun - self.started):
            self.found = run.task.evaluate(run.net, run.device)
            if not math.isfinite(self.found["val_loss"]):
                self._diverged(f"the validation loss became {self.found['val_loss']}")
            record |= {name: round(value, 5) for name, value in self.found.items()}
            run.losses.append(self.found["val_loss"])
        if run.ranks.first:
            self.metrics.write(record)
        if self.board:
            for name, value in (record | record.get("monitor", {})).items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, run.step)
            self.board.flush()
        try:
            self.progress.show(record)
            if "val_loss" in record:
                self._evaluated()
                self.evaluation = time.perf_counter() - begun
                self.evaluating += self.evaluation
        except OSError:  # the window is closed, or what read a pipe has ended
            if run.ranks.size == 1:  # others cannot know that they should join in
                run.save("last")
            raise
        keeps = cfg.keep_every and run.step % cfg.keep_every == 0
        if run.step % cfg.save_every == 0 or last or self.stopping or keeps:
            run.save("last")
        if keeps and run.ranks.first:
            checkpoint.keep(run.out, cfg.keep_last)
        self.loss.zero_()
        self.last, self.flips, self.begun = run.step, flips, time.perf_counter()

    def _has_time(self, passed: float) -> bool:
        """Whether one more evaluation keeps all of them within eval_share of the seconds passed, on every rank."""
        late = self.evaluating + self.evaluation > self.run.cfg.eval_share * (passed + self.evaluation)
        return not self.run.ranks.any(int(late))

    def _check_finite(self, loss: float) -> None:
        """Raises UserError if loss, delta or gradient was not finite since the last read, or a float weight is not."""
        run = self.run
        floats = [p for p in run.net.parameters() if p.is_floating_point()]
        if run.found_inf.item() or floats and not largest(floats).isfinite():
            steps = range(self.last, min(run.step, self.last + MOST_REPEATED))
            batches = (batch for step in steps for batch in run.task.batches(step, run.device))
            told = "a gradient became infinite" if math.isfinite(loss) else f"the loss became {loss}"
            try:
                told = origin(run.net, batches, run.task.loss) or told
            except (MemoryError, torch.OutOfMemoryError):  # it runs uncompiled, and may need more than the run
                pass
            self._diverged(told)

    def _diverged(self, what: str) -> None:
        run = self.run
        one = run.step == self.last + 1
        steps = f"step {run.step}" if one else f"one of the steps {self.last + 1} to {run.step}"
        # Integer weights cannot grow: beside float ones, it is these that did.
        lower = "--k" if run.cfg.method == "gft" and not run.floats else "--lr"
        lower = "--muon_lr or --lr" if run.cfg.under_muon else lower
        raise UserError(
            f"{what} at {steps}; nothing after it was saved, and earlier checkpoints are intact. "
            f"Start a new run with a lower {lower} in another --out_dir", DIVERGED,
        )  # fmt: skip

    def _evaluated(self) -> None:
        """Show a sample and the curve, warn of known signs of failure, and keep the best net."""
        run, task = self.run, self.run.task
        if shown := self.sample():
            self.progress.text(shown)
        if run.ranks.first:
            draw_curve(run)
        self.resident.append(resident_bytes() or 0)
        chance = math.log(task.outputs)
        for sign, text in warnings(run.losses, run.step / run.cfg.steps, chance, self.resident).items():
            if sign not in self.said:
                self.said.add(sign)
                self.progress.line(f"warning: {text}")
        if run.losses[-1] <= min(run.losses):
            run.save("best")

    def finish(self) -> dict:
        """The summary of a run that has come to its end."""
        run = self.run
        if not self.found:  # resumed at the end
            self.found = run.task.evaluate(run.net, run.device)
        used = energy.summary(energy.count(run.cfg, run.task.outputs, run.task.image), run.step, self.meter.stop())
        if run.first_step:
            used["energy_note"] += f"; measured from step {run.first_step} on, where this process took the run up"
        return run.summary(self.found, self.progress.step_seconds) | used


def draw_curve(run: Run) -> None:
    """Draw loss.png anew; a full disk does not stop the run."""
    title = f"{run.cfg.name}: {run.cfg.method}, {run.weights / 1e6:.2f} M weights"
    try:
        draw(run.out / "metrics.jsonl", run.out / "loss.png", title, run.task.unit.removesuffix("s"))
    except OSError as error:
        print(f"note: {error.filename or 'loss.png'} cannot be written: {error.strerror}", file=sys.stderr)
