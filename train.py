"""Train a transformer of small integers, or a baseline, on text or images.

    python train.py shakespeare_char_small                    a config of configs/, or a path
    python train.py shakespeare_char_small --bits 4 --k 0.1   any key of --help
    python train.py shakespeare_char_small --resume           go on after a kill, exactly
    python train.py mine.toml --init_from out/NAME --k 0.1    a new run that starts from the weights of another
    torchrun --standalone --nproc_per_node 4 train.py shakespeare_char_small    on four GPUs (run/distributed.py)

Writes to out/NAME: last.json, best.json and their safetensors (run/checkpoint.py), metrics.jsonl, loss.png.
The last line of standard output is one JSON object.
"""

import os
import sys

from run.config import Config, load, to_dict
from run.errors import UserError

if __name__ == "__main__":
    try:
        load(sys.argv[1:], notes=False)  # --help and mistakes are answered here, before torch is imported
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)

import dataclasses
import json
import math
import shlex
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from data.task import Task
from kernels.limits import MAX_REDUCTION
from model import ModelConfig, compiled_whole, load_net, make_net
from run import checkpoint, distributed, finite
from run import device as machine
from run.command import find_folder
from run.distributed import synchronised
from run.folder import choose_folder, sign, take_up
from run.graph import StepGraph
from run.init_from import check_shape, take_weights
from run.log import Log
from run.monitor import Monitor
from run.progress import Metrics
from run.state import Run
from run.stop import Stop


def make_run(cfg: Config, task: Task, on: machine.Runtime, out: Path) -> Run:
    """A run at its first step, with weights drawn from its seed. Raises UserError if they would all be zero."""
    try:
        net = make_net(ModelConfig.from_config(cfg, task.outputs, task.image), cfg.seed)
    except ValueError as error:
        raise UserError(f"{error}: a larger --init_std, or a wider net (--d_model)", 2) from None
    return Run(cfg, task, on, out, net)


def start_from(run: Run, given: str) -> list[str]:
    """Give a run the weights of another, whose folder or checkpoint's JSON is `given`. Returns lines that say so."""
    path = Path(given)
    one = path.suffix == ".json" and path.stem in checkpoint.LOADED
    folder, name = (path.parent, path.stem) if one else (find_folder(given), "")
    old, meta, head = load_net(folder, name, f"--init_from {shlex.quote(str(folder))}/{{}}.json")
    check_shape(run.cfg, checkpoint.config_of(meta, head), head)
    if wrong := [name for name, p in old.named_parameters() if not p.float().norm().isfinite() or not p.any()]:
        raise UserError(f"init_from: weights of {head} are not finite or all zeros: {', '.join(wrong)}; "
                        "use another")  # fmt: skip
    lines = take_weights(run.net, old, run.task.saved(), meta)
    return [f"init: {head.stem} of step {meta['step']} in {folder}", *lines]


def train(run: Run, metrics: Metrics | None, stop: Stop) -> dict | None:
    """The loop, from run.step to the last step. Returns the summary, or None if it was stopped."""
    cfg, task, device, rng, found_inf = run.cfg, run.task, run.device, run.rng, run.found_inf
    # Evaluation and samples use the net as written: shapes differ there, and compiling for each would cost minutes.
    whole = run.on.compile and compiled_whole(run.net)
    net = run.ranks.wrap(torch.compile(run.net, dynamic=False) if whole else run.net)
    # Behind integer nets the loss has a kernel of its own (kernels/cross_entropy.py), which writes over the logits.
    compiled_loss = run.on.compile and (whole or run.on.backend != "triton")
    loss_of = torch.compile(task.loss, dynamic=False) if compiled_loss else task.loss
    autocast = cfg.precision == "bf16" and cfg.method != "gft"
    # delta is not divided by the number of tokens: its int8 scale follows it anyway.
    loss_scale = 1.0 if cfg.method == "gft" else 1.0 / task.per_step
    if isinstance(net, DistributedDataParallel):
        loss_scale *= run.ranks.size  # DDP takes the mean of what is a sum here
    floats = [p for p in run.net.parameters() if p.is_floating_point()]
    monitor = Monitor(run.net, cfg.monitor_every, cfg.seed)
    log = Log(run, metrics, lambda: sample_text(run.net, task, cfg))

    def mask_rng(part: int) -> dict[str, torch.Tensor]:
        """What dropout's masks are functions of."""
        drops = cfg.dropout and cfg.model == "transformer"
        return {"rng": torch.cat([rng, rng.new_full((1,), task.first_row(part))])} if drops else {}

    def step() -> None:
        """All that the device does in a step; what is left lies in tensors that were there before."""
        for part in range(cfg.grad_accum):
            x, y = task.batch_at(rng, part)
            with synchronised(net, run.flip_optimizer, part + 1 == cfg.grad_accum):
                with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                    loss = loss_of(net(x, **mask_rng(part)), y)
                # After a loss, a delta or a gradient that is not finite, FlipOptimizer and torch's fused optimizers
                # leave all weights as they are. The host notices at its next read, and saves nothing more.
                finite.note(found_inf, loss)
                (loss * loss_scale).backward()
            log.loss += loss.detach()
        if floats:
            finite.note(found_inf, finite.largest(p.grad for p in floats))
            run.ranks.max(found_inf)  # FlipOptimizer asks the other ranks itself
        monitor.before_step()
        for optimizer, _ in run.optimizers:
            optimizer.step()
        run.net.zero_grad()
        rng[1] += 1

    def step_sizes() -> list[int | None]:
        return [group.get("step_size") for optimizer, _ in run.optimizers for group in optimizer.param_groups]

    make_step = StepGraph(step, run.on.graph, fixed=step_sizes)
    while run.step < cfg.steps:
        monitor.before_backward(run.step)
        task.prepare(run.step, device)
        make_step(as_written=monitor.looks)
        for _, schedule in run.optimizers:
            schedule.step()
        run.step += 1

        stop.signal = run.ranks.any(stop.signal)  # once a step: what comes later is for the next one, which is saved
        log.stopping = bool(stop.signal)
        if log.due():
            log.write(monitor.report())
        if log.stopping and run.step < cfg.steps:
            return None
    return log.finish()


def sample_text(net: nn.Module, task: Task, cfg: Config) -> str:
    """`sample_tokens` tokens of the net's own text, drawn from the run's seed; nothing of images."""
    if task.tokenizer is None or not cfg.sample_tokens:
        return ""
    from sample import NetSource, decoded, generate, start_ids

    tokens = generate(NetSource(net), start_ids(task.tokenizer, ""), cfg.sample_tokens, 0.8, 0, 1.0, cfg.seed)
    return "".join(decoded(task.tokenizer, (token for (token,) in tokens))).strip()


def bits_of(cfg: Config) -> str:
    """In words, the bits of a weight that are read, and that it keeps."""
    levels = " of four levels" if cfg.bits == 2 and cfg.levels == 4 else ""
    return f"{cfg.bits} bits{levels}" + (f" read of {cfg.kept_bits} kept" if cfg.bits < cfg.kept_bits else "")


def python() -> str:
    """How to call this interpreter from here: by its path if it is that of a virtual environment not activated."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "python"
    try:
        return shlex.quote(os.path.relpath(sys.executable))
    except ValueError:  # on Windows, another drive
        return shlex.quote(sys.executable)


def check_ranks(task: Task, on: machine.Runtime) -> None:
    """Raises UserError if the run cannot be shared out over its ranks, or one of them would train something else."""
    cfg, ranks = task.cfg, task.ranks
    if cfg.batch_size % task.parts:
        raise UserError(f"batch_size = {cfg.batch_size}: it must be a multiple of grad_accum x ranks = "
                        f"{cfg.grad_accum} x {ranks.size}; change one of them", 2)  # fmt: skip
    if ranks.size > 1 and cfg.method == "gft" and cfg.update == "backward":
        raise UserError('update = "backward": moves are made before ranks have added up their votes; use '
                        "--update step, or one process", 2)  # fmt: skip
    tokens = cfg.batch_size * task.positions // ranks.size
    if ranks.size > 1 and cfg.method == "gft" and tokens > MAX_REDUCTION:
        raise UserError(f"batch_size = {cfg.batch_size}: {tokens:,} tokens of a step on each of {ranks.size} ranks, "
                        f"whose int32 votes hold {MAX_REDUCTION:,}; use a smaller one, or more ranks", 2)  # fmt: skip
    settings = {key: value for key, value in to_dict(cfg).items() if key not in ("data", "data_dir", "out_dir")}
    environment = {key: value for key, value in on.environment().items() if key != "processor"}
    ranks.agree(settings | environment | {"version": checkpoint.PROGRAM, "sha256 of the data": task.sha256})


def run_config(cfg: Config, argv: list[str]) -> int:
    """Train as cfg says; argv is what was typed. Returns the exit status."""
    ranks = distributed.start(cfg.device, cfg.rank_timeout)
    if not ranks.first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    on = machine.choose(cfg, ranks.size)
    task = data.load(cfg, named=any(word.partition("=")[0] == "--data" for word in argv))
    task.ranks, cfg = ranks, task.cfg
    check_ranks(task, on)
    machine.check_memory(dataclasses.replace(cfg, batch_size=cfg.batch_size // ranks.size), task.outputs,
                         task.positions, on.device)  # fmt: skip
    lock = None

    def take_folder() -> tuple[str, str]:
        nonlocal lock
        chosen = take_up(cfg, distributed.job()) if ranks.attempt else cfg
        folder, lock = choose_folder(chosen)
        if distributed.job():
            sign(folder, distributed.job())
        return str(folder), chosen.resume

    folder, resume = ranks.from_first(take_folder)
    out, cfg = Path(folder), dataclasses.replace(cfg, resume=resume)
    run = make_run(cfg, task, on, out)
    stop = Stop(patient=bool(distributed.job()))
    started: list[str] = []
    if cfg.resume:
        run.load(cfg.resume)
    elif cfg.init_from:
        started = start_from(run, cfg.init_from)
    if task.notice:
        print(task.notice)
    print(f"data: {task.about}")
    print("\n".join(on.reasons))
    print(f"net: {run.weights:,} weights, method {cfg.method}"
          + (f", {bits_of(cfg)}, rule {cfg.rule}, momentum {cfg.momentum:g}" if cfg.method == "gft" else ""))
    for line in started:
        print(line)
    print(f"out: {out}" + (f", going on from step {run.step}" if cfg.resume else ""), flush=True)
    metrics = Metrics(out / "metrics.jsonl", run.step) if ranks.first else None
    try:
        if not cfg.resume:
            run.save("last")  # so that a kill before the first save can be resumed too
        summary = train(run, metrics, stop)
    except RuntimeError as error:
        if told := ranks.explain(error, run.step):
            raise UserError(f"{told}; checkpoints saved before are intact: --resume, or torchrun --max-restarts, goes "
                            "on from the last") from error  # fmt: skip
        raise
    if summary is None:
        again = f"--resume last --out_dir {shlex.quote(str(out))}"  # a key given twice: the last counts
        print(f"stopped at step {run.step} of {cfg.steps}, saved in {out}\n"
              f"resume with: {python()} train.py {shlex.join(argv)} {again}")  # fmt: skip
        return 128 + stop.signal
    ranks.leave()
    if not ranks.first:
        return 0
    try:
        task.report(run.net, on.device, out)
    except OSError as error:
        print(f"note: {error.filename or out} cannot be written: {error.strerror}", file=sys.stderr)
    print(f"checkpoint: {out / 'last.json'} (last step), {out / 'best.json'} (lowest validation loss)\n"
          f"curve: {out / 'loss.png'}\nmetrics: {out / 'metrics.jsonl'}")  # fmt: skip
    print(f"use: {python()} {task.usage(out)}")
    if task.notice:
        print(task.notice)
    endless = {key for key, value in summary.items() if isinstance(value, float) and not math.isfinite(value)}
    print(json.dumps(summary | dict.fromkeys(endless), allow_nan=False))  # null, as JSON has no NaN and no infinity
    return 0


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # samples are UTF-8 whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return run_config(load(argv, notes=os.environ.get("LOCAL_RANK", "0") == "0"), argv)
    except UserError as error:
        print(f"{distributed.name()}error: {error}", file=sys.stderr)
        return error.code
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _out_of_memory(error)
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130
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
    status = main(sys.argv[1:])
    if distributed.job():  # a rank sometimes aborts in gloo while its interpreter ends; torchrun then reports a failure
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
