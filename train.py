"""Train a transformer of small integers, or one of its rivals, on text or images.

    python train.py shakespeare_char_small                    a config of configs/, or a path
    python train.py shakespeare_char_small --bits 4 --k 0.1   any key of --help
    python train.py shakespeare_char_small --resume           go on after a kill, exactly

Writes to out/NAME: last.json, best.json and their safetensors (run/checkpoint.py), metrics.jsonl, loss.png.
The last line of standard output is one JSON object.
"""

import fcntl
import glob
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from run import checkpoint, energy
from run import device as runtime
from run.config import Config, differences, from_dict, load, to_dict
from run.curve import draw
from run.errors import DIVERGED, UserError
from gft.learner import FlipLearner, make_learner
from run.meter import Meter
from run.monitor import Monitor, warnings
from run.progress import Metrics, Progress
from model import ModelConfig, make_net
from data.tasks import Task, load_task


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request; the second one ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


class Run:
    """A run's net, learner and progress, and how they are saved and taken up again."""

    def __init__(self, cfg: Config, task: Task, run: runtime.Runtime, out: Path):
        self.cfg, self.task, self.run, self.out = cfg, task, run, out
        try:
            net = make_net(ModelConfig.from_config(cfg, task.outputs, task.image), cfg.seed)
        except ValueError as error:
            raise UserError(f"{error}: a larger --init_spread, or a wider net (--d_model)", 2) from None
        self.net = net.to(run.device)
        self.learner = make_learner(self.net, cfg)
        self.step, self.changed, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.weights = sum(t.numel() for t in self.weight_tensors().values())

    def weight_tensors(self) -> dict[str, Tensor]:
        """The net's weights by name: int8 for gft, fp32 for the baselines."""
        return {name: t for name, t in self.net.state_dict().items() if name.endswith("weight")}

    def save(self, name: str) -> None:
        """Write checkpoint `name` ("last" or "best")."""
        tensors = checkpoint.join(model=self.net.state_dict(), learner=self.learner.state())
        meta = {
            "step": self.step, "config": to_dict(self.cfg), "vocab_size": self.task.outputs, **self.task.saved(),
            "environment": self.run.environment(), "data": {"name": self.task.name, "sha256": self.task.sha256},
            "progress": {"changed": self.changed, "seconds": self.seconds, "losses": self.losses},
        }  # fmt: skip
        checkpoint.save(self.out, name, tensors, meta)

    def load(self, name: str) -> None:
        """Go on from checkpoint `name`. Raises UserError if it is damaged, or of another config or other data."""
        tensors, meta = checkpoint.load(self.out, name)
        where = f"checkpoint {self.out / name}.json"
        different = differences(from_dict(meta["config"]), self.cfg)
        if different:
            raise UserError(f"{where} is of another config: {'; '.join(different)}; give the same settings to go on, "
                            "or another --out_dir for a new run")  # fmt: skip
        if meta["data"]["sha256"] != self.task.sha256:
            raise UserError(f"{where} was trained on other data (sha256 {meta['data']['sha256'][:12]}..., this has "
                            f"{self.task.sha256[:12]}...); give the same, or another --out_dir")  # fmt: skip
        read = json.loads(json.dumps(self.task.saved()))
        if other := [name for name in read if meta[name] != read[name]]:
            raise UserError(f"{where} was trained on the same file, but what is read from it has changed ("
                            f"{', '.join(other)}), as other versions of a decoder can bring about; go on where it was "
                            "begun, or start anew in another --out_dir")  # fmt: skip
        now = self.run.environment()
        changed = [f"{k} {v} then, {now.get(k)} now" for k, v in meta["environment"].items() if now.get(k) != v]
        if changed:
            print(f"note: going on exactly is promised on one set-up only: {'; '.join(changed)}", file=sys.stderr)
        self.net.load_state_dict(checkpoint.group(tensors, "model"))
        self.learner.load(checkpoint.group(tensors, "learner"))
        self.step = meta["step"]
        self.changed, self.seconds, self.losses = (meta["progress"][k] for k in ("changed", "seconds", "losses"))

    def summary(self, found: dict[str, float], step_seconds: list[float]) -> dict:
        """The final JSON object; `found` is what the last evaluation gave."""
        cfg, state = self.cfg, self.net.state_dict()
        integer = sum(t.nbytes for t in state.values() if t.dtype == torch.int8)
        tokens, val_loss = self.task.per_step, found["val_loss"]
        typical = statistics.median(step_seconds) if step_seconds else None
        return {
            "config": cfg.name, "method": cfg.method, "bits": cfg.bits if cfg.method in ("gft", "ste") else 32,
            "steps": self.step, "tokens": self.step * tokens, "val_loss": val_loss,
            "best_val_loss": min([*self.losses, val_loss]), "seconds": round(self.seconds, 2),
            "step_seconds": typical and round(typical, 5), "tokens_per_second": typical and round(tokens / typical, 1),
            "flips_per_weight_per_step": self.changed / self.weights / max(self.step, 1),
            "accuracy": found.get("accuracy"), "top5": found.get("top5"),
            "weights": self.weights, "int_weight_bytes": integer,
            "packed_weight_bytes": math.ceil(integer * cfg.bits / 8),
            "float_param_bytes": sum(p.nbytes for p in self.net.parameters()),
            "optimizer_state_bytes": self.learner.state_bytes(), "scale_bytes": self.learner.scale_bytes(),
            "peak_memory_bytes": runtime.peak_memory_bytes(self.run.device),
            "weights_sha256": checkpoint.weights_sha256(self.weight_tensors()),
            "environment": self.run.environment(), "seed": cfg.seed, "eval_on": cfg.eval_on, "out_dir": str(self.out),
        }  # fmt: skip


def check_loss(run: Run, loss: float) -> None:
    """Raises UserError if the loss is not finite, before any weight has moved by it."""
    if not math.isfinite(loss):
        calmer = "--k" if run.cfg.method == "gft" else "--lr"
        raise UserError(
            f"the loss became {loss} at step {run.step + 1}, so this step was not made; checkpoints saved before are "
            f"intact. Start anew with a lower {calmer} in another --out_dir", DIVERGED,
        )  # fmt: skip


def take_step(run: Run, forward, loss_of) -> tuple[float, int]:
    """One step over all its micro-batches. Returns the training loss in nats per token and the weights changed."""
    cfg, device = run.cfg, run.run.device
    tokens = run.task.per_step
    half = cfg.precision == "bf16" and cfg.method != "gft"
    total = 0.0
    for x, y in run.task.batches(run.step, device):
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            loss = loss_of(forward(x), y)
        if cfg.flip_at == "backward":  # weights move in there
            check_loss(run, loss.item())
        (loss * run.learner.loss_scale(tokens)).backward()
        total += loss.item()
    check_loss(run, total)
    changed = run.learner.step(run.step)
    run.step += 1
    run.changed += changed
    return total / tokens, changed


def train(run: Run, metrics: Metrics, stop: Stop) -> dict | None:
    """The loop, from run.step to the last step. Returns the summary, or None if it was stopped."""
    cfg = run.cfg
    # Evaluation and samples use the net as written: shapes differ there, and compiling for each would cost minutes.
    forward = torch.compile(run.net, dynamic=False) if run.run.compile else run.net
    loss_of = torch.compile(run.task.loss, dynamic=False) if run.run.compile else run.task.loss
    monitor = None
    if isinstance(run.learner, FlipLearner):
        names = {layer.index: name for name, layer in run.net.named_modules() if layer in run.learner.optimizer.layers}
        monitor = Monitor(run.learner.optimizer, names, cfg.monitor_every, cfg.seed)
    progress = Progress(cfg.steps, run.step, run.task.per_step, run.task.unit)
    said, resident, step_seconds, found = set(), [], [], {}
    meter, first = Meter.on(run.run.device.type, run.run.device.index), run.step
    meter.start()

    while run.step < cfg.steps:
        begun = time.perf_counter()
        if monitor:
            monitor.before(run.step)
        loss, changed = take_step(run, forward, loss_of)
        took = time.perf_counter() - begun
        run.seconds += took
        step_seconds.append(took)
        meter.poll()
        record = {
            "step": run.step, "loss": round(loss, 5), "flips": changed / run.weights, "seconds": round(run.seconds, 4),
        }  # fmt: skip
        if monitor:
            record |= monitor.report()
        last = run.step == cfg.steps
        if run.step % cfg.eval_every == 0 or last:
            found = run.task.evaluate(run.net, run.run.device)
            record |= {name: round(value, 5) for name, value in found.items()}
            run.losses.append(found["val_loss"])
        metrics.write(record)
        progress.show(record)
        if "val_loss" in record:
            if shown := run.task.show(run.net):
                progress.text(shown)
            resident.append(runtime.resident_bytes() or 0)
            chance = math.log(run.task.outputs)
            for sign, text in warnings(run.losses, run.step / cfg.steps, chance, resident).items():
                if sign not in said:
                    said.add(sign)
                    progress.line(f"warning: {text}")
            if run.losses[-1] <= min(run.losses):
                run.save("best")
        if run.step % cfg.save_every == 0 or last or stop.signal:
            run.save("last")
        if stop.signal and not last:
            return None
    if not step_seconds:  # resumed at the end
        found = run.task.evaluate(run.net, run.run.device)
    used = energy.summary(energy.count(cfg, run.task.outputs, run.task.image), run.step, meter.stop())
    if first:
        used["energy_note"] += f"; measured from step {first} on, where this process took the run up"
    return run.summary(found, step_seconds[1:]) | used


def choose_folder(cfg: Config) -> tuple[Path, TextIO]:
    """The run's folder, and its lock, which is held while the file is open.

    Nothing saved is overwritten: a new run in a used folder is refused, or numbered if it has no --out_dir of its own;
    a resumed one takes the newest of its name. Raises UserError if there is no such folder or another run holds it.
    """
    first = cfg.out_path
    endings = (re.search(r"-(\d+)$", path.name) for path in first.parent.glob(f"{glob.escape(first.name)}-*"))
    numbers = [2, *(int(ending[1]) + 1 for ending in endings if ending)]
    numbered = [first, *(first.with_name(f"{first.name}-{n}") for n in range(2, max(numbers) + 1))]
    if cfg.out_dir:
        numbered = [first]
    if cfg.resume:
        used = [folder for folder in numbered if _has_run(folder)]
        if not used:
            raise UserError(
                f"--resume {cfg.resume}: {first} holds no run; start one without --resume, or name its --out_dir"
            )
        return used[-1], _lock(used[-1])
    for folder in numbered:
        if not _has_run(folder):
            try:
                return folder, _lock(folder)
            except BlockingIOError:  # a run that has not saved anything yet
                if cfg.out_dir:
                    raise
    raise UserError(f"{first} already holds a run; --resume goes on with it, another --out_dir starts anew")


def _lock(folder: Path) -> TextIO:
    """An open file only one process can hold. Raises BlockingIOError if another one does,
    UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; make it a writable folder or choose another --out_dir"
        ) from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _has_run(folder: Path) -> bool:
    return any(checkpoint.exists(folder, name) for name in ("last", "best", "previous"))


def python() -> str:
    """How to call this interpreter from here: by its path if it is that of a virtual environment not activated."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "python"
    return shlex.quote(os.path.relpath(os.path.join(sys.prefix, "bin", "python")))


def run_config(cfg: Config, argv: list[str]) -> int:
    """Train as cfg says; argv is what was typed. Returns the exit status."""
    chosen = runtime.choose(cfg)
    task = load_task(cfg)
    runtime.check_memory(cfg, task.outputs, task.positions, chosen.device)
    out, lock = choose_folder(cfg)
    run = Run(cfg, task, chosen, out)
    stop = Stop()
    if cfg.resume:
        run.load(cfg.resume)
    print(f"data: {task.about}")
    print("\n".join(chosen.reasons))
    print(f"net: {run.weights:,} weights, method {cfg.method}"
          + (f", {cfg.bits} bits, rule {cfg.rule}, memory {cfg.memory}" if cfg.method == "gft" else ""))  # fmt: skip
    print(f"out: {out}" + (f", going on from step {run.step}" if cfg.resume else ""), flush=True)
    metrics = Metrics(out / "metrics.jsonl", run.step)
    if not cfg.resume:
        run.save("last")  # so that a kill before the first save can be resumed too
    summary = train(run, metrics, stop)
    if summary is None:
        again = f"--resume last --out_dir {shlex.quote(str(out))}"  # a key given twice: the last counts
        print(f"stopped at step {run.step} of {cfg.steps}, saved in {out}\n"
              f"go on: {python()} train.py {shlex.join(argv)} {again}")  # fmt: skip
        return 128 + stop.signal
    curve, title = out / "loss.png", f"{cfg.name}: {cfg.method}, {run.weights / 1e6:.2f} M weights"
    try:
        draw(out / "metrics.jsonl", curve, title, run.task.unit.removesuffix("s"))
        task.report(run.net, chosen.device, out)
    except OSError as error:
        print(f"note: {error.filename or curve} cannot be written: {error.strerror}", file=sys.stderr)
    print(f"checkpoint: {out / 'last.json'} (last step), {out / 'best.json'} (lowest validation loss)\n"
          f"curve: {curve}\nmetrics: {out / 'metrics.jsonl'}")  # fmt: skip
    print(f"use: {python()} {task.usage(out)}")
    print(json.dumps({key: None if value != value else value for key, value in summary.items()}, allow_nan=False))
    return 0


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # samples are UTF-8 whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return run_config(load(argv), argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _out_of_memory(error)
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130
    except BlockingIOError:
        print("error: another run is writing into this folder; wait for it, or choose another --out_dir",
              file=sys.stderr)  # fmt: skip
        return 1
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = None
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; checkpoints saved before are intact",
              file=sys.stderr)  # fmt: skip
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return _out_of_memory(error)


def _out_of_memory(error: BaseException) -> int:
    reason = str(error).splitlines()[0][:200] if str(error) else "no memory left"
    print(f"error: out of memory ({reason}). Checkpoints saved before are intact. A smaller --batch_size needs less, "
          "and so does --grad_accum 2 or more with --delta_scale delayed", file=sys.stderr)  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
