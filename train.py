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

from run.config import Config, differences, load, to_dict
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
from gft.baselines import Muon, SignSGD
from gft.layers import IntEmbedding, int_layers
from gft.optimizer import FlipOptimizer
from kernels.limits import MAX_REDUCTION
from model import ModelConfig, compiled_whole, load_net, make_net
from run import checkpoint, distributed, finite
from run import device as machine
from run.distributed import Ranks, ring_bytes, synchronised
from run.folder import choose_folder, sign, take_up
from run.graph import StepGraph
from run.init_from import check_shape, take_weights
from run.log import Log
from run.monitor import Monitor
from run.progress import Metrics
from run.schedule import Schedule
from run.stop import Stop

Optimizers = list[tuple[torch.optim.Optimizer, Schedule]]


def make_optimizers(
    net: nn.Module, cfg: Config, tokens: int, ranks: Ranks = distributed.ALONE, graph: bool = False
) -> Optimizers:
    """One or two torch optimizers, each with its schedule: integer weights learn by flips, float weights by gradients.

    `tokens` are those of a step, whose votes are summed. In a CUDA `graph` learning rates are tensors.

    adamw    torch.optim.AdamW on every weight; also on the float layers of a gft run that has some
    muon     Muon on the matrices of the blocks, AdamW on embedding and head
    sgd      torch.optim.SGD with momentum 0.9; signsgd moves every weight by lr against the sign of its gradient
    ste      AdamW or Muon on latent weights, which the layers round (gft/baselines.py)
    """
    found: Optimizers = []
    if integers := int_layers(net):
        tables = [layer.weight for layer in integers if isinstance(layer, IntEmbedding)]
        others = [layer.weight for layer in integers if not isinstance(layer, IntEmbedding)]
        groups = [{"params": tables, "rule": cfg.embedding_rule}, {"params": others, "rule": cfg.rule}]
        flips = FlipOptimizer(
            [group for group in groups if group["params"]], lr=cfg.k, momentum=cfg.momentum, ortho_tile=cfg.ortho_tile,
            topk_tile=cfg.topk_tile, step_size=cfg.step_size, flip_prob=cfg.flip_prob, flip_gamma=cfg.flip_gamma,
            update=cfg.update, max_tokens=tokens, process_group=ranks.group,
        )  # fmt: skip
        found.append((flips, Schedule(flips, cfg.steps, cfg.k_end, cfg.k_schedule, cfg.k_warmup)))
    floats = {name: p for name, p in net.named_parameters() if p.is_floating_point()}
    blocks = [p for name, p in floats.items() if cfg.under_muon and name.startswith("blocks.")]
    others = [p for p in floats.values() if not any(p is block for block in blocks)]
    if cfg.method == "sgd":
        optimizer = torch.optim.SGD(others, lr=cfg.lr, momentum=0.9, fused=True)
        # Decoupled, as AdamW's: SGD's own weight decay would be part of the gradient.
        optimizer.register_step_pre_hook(lambda opt, *_: _decay(opt, cfg.weight_decay))
    elif cfg.method == "signsgd":
        optimizer = SignSGD(others, lr=cfg.lr, weight_decay=cfg.weight_decay)
    elif others:
        betas = (0.9, cfg.beta2)
        optimizer = torch.optim.AdamW(others, lr=cfg.lr, betas=betas,
                                      weight_decay=cfg.weight_decay, fused=True, capturable=graph)  # fmt: skip
    if others:
        found.append((optimizer, Schedule(optimizer, cfg.steps, cfg.lr_end * cfg.lr, warmup=cfg.warmup)))
    if blocks:
        muon = Muon(blocks, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, state=cfg.muon_state)
        found.append((muon, Schedule(muon, cfg.steps, cfg.lr_end * cfg.muon_lr, warmup=cfg.warmup)))
    for optimizer, _ in found if graph else ():
        dtype = torch.float64 if isinstance(optimizer, FlipOptimizer) else torch.float32
        for group in optimizer.param_groups:  # tensors, which schedules then write to
            group["lr"] = torch.as_tensor(group["lr"], dtype=dtype, device=group["params"][0].device)
    return found


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.mul_(1 - group["lr"] * weight_decay)


class Run:
    """A run's net, optimizers and progress, and how they are saved and taken up again."""

    def __init__(self, cfg: Config, task: Task, on: machine.Runtime, out: Path):
        self.cfg, self.task, self.on, self.out, self.device = cfg, task, on, out, on.device
        self.ranks = task.ranks
        try:
            net = make_net(ModelConfig.from_config(cfg, task.outputs, task.image), cfg.seed)
        except ValueError as error:
            raise UserError(f"{error}: a larger --init_std, or a wider net (--d_model)", 2) from None
        self.net = net.to(on.device)
        self.optimizers = make_optimizers(self.net, cfg, cfg.batch_size * task.positions, self.ranks, on.graph)
        self.flip_optimizer = next((o for o, _ in self.optimizers if isinstance(o, FlipOptimizer)), None)
        self.floats = sum(p.numel() for p in self.net.parameters() if p.is_floating_point())
        self.weights = sum(p.numel() for p in self.net.parameters())
        self.step, self.changed, self.seconds = 0, 0, 0.0
        self.first_step = 0  # of this process
        self.losses: list[float] = []
        # On the device: seed and step for the batches, and the flag of what is not finite.
        self.rng = torch.tensor([cfg.seed, 0], device=on.device)
        self.found_inf = self.flip_optimizer.found_inf if self.flip_optimizer else torch.zeros((), device=on.device)
        for optimizer, _ in self.optimizers:
            optimizer.found_inf = self.found_inf
        if self.flip_optimizer:
            self.flip_optimizer.register_step_post_hook(lambda flips, *_: self.found_inf.copy_(flips.stopped != 0))

    def start_from(self, given: str) -> list[str]:
        """Take the first weights from the run in a folder, or from a checkpoint's JSON. Returns lines that say so."""
        from sample import find_folder

        path = Path(given)
        one = path.suffix == ".json" and path.stem in checkpoint.LOADED
        folder, name = (path.parent, path.stem) if one else (find_folder(given), "")
        old, meta, head = load_net(folder, name, f"--init_from {shlex.quote(str(folder))}/{{}}.json")
        check_shape(self.cfg, checkpoint.config_of(meta, head), head)
        if wrong := [name for name, p in old.named_parameters() if not p.float().norm().isfinite() or not p.any()]:
            raise UserError(f"init_from: weights of {head} are not finite or all zeros: {', '.join(wrong)}; "
                            "use another")  # fmt: skip
        lines = take_weights(self.net, old, self.task.saved(), meta)
        return [f"init: {head.stem} of step {meta['step']} in {folder}", *lines]

    def save(self, name: str) -> None:
        """Write checkpoint `name` ("last" or "best"): rank 0, with what the others keep."""
        states = {
            f"optimizer{i}": checkpoint.flatten(optimizer.state_dict()["state"])
            for i, (optimizer, _) in enumerate(self.optimizers)
        }
        if not self.ranks.first:
            return
        meta = {
            "step": self.step, "config": to_dict(self.cfg), "vocab_size": self.task.outputs, **self.task.saved(),
            "environment": self.on.environment(), "data": {"name": self.task.name, "sha256": self.task.sha256},
            "progress": {"changed": self.changed, "seconds": self.seconds, "losses": self.losses},
        }  # fmt: skip
        checkpoint.save(self.out, name, checkpoint.join(model=self.net.state_dict(), **states), meta)

    def load(self, name: str) -> None:
        """Go on from checkpoint `name`. Raises UserError if it is damaged, or of another config or other data."""
        tensors, meta = checkpoint.load(self.out, name)
        where = f"checkpoint {self.out / name}.json"
        different = differences(checkpoint.config_of(meta, self.out / f"{name}.json"), self.cfg)
        if different:
            raise UserError(f"{where} was trained with other settings: {'; '.join(different)}; use the same to "
                            "resume, or another --out_dir for a new run")  # fmt: skip
        if meta["data"]["sha256"] != self.task.sha256:
            raise UserError(f"{where} was trained on other data (sha256 {meta['data']['sha256'][:12]}..., this has "
                            f"{self.task.sha256[:12]}...); give the same, or another --out_dir")  # fmt: skip
        read = json.loads(json.dumps(self.task.saved()))
        if other := [name for name in read if meta[name] != read[name]]:
            raise UserError(f"{where} was trained on the same file, but it now decodes differently ("
                            f"{', '.join(other)}), perhaps because of another library version; resume with the "
                            "original versions, or start a new run in another --out_dir")  # fmt: skip
        now = self.on.environment()
        changed = [f"{k} {v} then, {now.get(k)} now" for k, v in meta["environment"].items() if now.get(k) != v]
        if changed:
            print(f"note: exact resumption is not guaranteed, because the setup has changed: {'; '.join(changed)}",
                  file=sys.stderr)  # fmt: skip
        self.net.load_state_dict(checkpoint.group(tensors, "model"))
        self.step = self.first_step = meta["step"]
        self.rng[1] = self.step
        for i, (optimizer, schedule) in enumerate(self.optimizers):
            state = checkpoint.unflatten(checkpoint.group(tensors, f"optimizer{i}"))
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})  # its settings are the config's
            schedule.go_to(self.step)
        self.changed, self.seconds, self.losses = (meta["progress"][k] for k in ("changed", "seconds", "losses"))

    def summary(self, found: dict[str, float], typical: float | None) -> dict:
        """The final JSON object; `found` is what the last evaluation gave, `typical` the seconds of a step."""
        cfg, flips = self.cfg, self.flip_optimizer
        layers = flips.layers if flips else []
        integer = sum(layer.weight.nbytes for layer in layers)
        tokens, val_loss = self.task.per_step, found["val_loss"]
        state, scales = state_bytes([optimizer for optimizer, _ in self.optimizers])
        return {
            "config": cfg.name, "method": cfg.method, "bits": cfg.bits if cfg.method in ("gft", "ste") else 32,
            "keep_bits": cfg.kept_bits if layers else None,
            "steps": self.step, "tokens": self.step * tokens, "val_loss": val_loss,
            "best_val_loss": min([*self.losses, val_loss]), "seconds": round(self.seconds, 2),
            "step_seconds": typical and round(typical, 5), "tokens_per_second": typical and round(tokens / typical, 1),
            "flips_per_weight_per_step": self.changed / self.weights / max(self.step, 1),
            **{name: found.get(name) for name in ("bits_per_byte", "perplexity", "accuracy", "top5")},
            "weights": self.weights, "int_weight_bytes": integer,
            "packed_weight_bytes": math.ceil(integer * cfg.bits / 8),
            "float_param_bytes": 4 * self.floats, "optimizer_state_bytes": state,
            "votes_bytes": flips.votes_bytes() if flips else 0,
            "scale_bytes": scales + sum(layer.scale.nbytes for layer in layers),
            "peak_memory_bytes": machine.peak_memory_bytes(self.device),
            "weights_sha256": checkpoint.weights_sha256(dict(self.net.named_parameters())),
            "environment": self.on.environment(), "seed": cfg.seed, "eval_on": cfg.eval_on, "out_dir": str(self.out),
            "world_size": self.ranks.size, **self.traffic(),
        }  # fmt: skip

    def traffic(self) -> dict[str, float]:
        """Bytes that a rank sends for a weight in a step, on average, beside what DDP would; nothing of one process."""
        size, exchange = self.ranks.size, self.flip_optimizer and self.flip_optimizer.exchange
        if size == 1:
            return {}
        votes = int(self.ranks.sum(torch.tensor(exchange.bytes_sent if exchange else 0))) / size
        sent = votes / max(self.step - self.first_step, 1) + ring_bytes(self.floats, 4, size)
        return {"sent_bytes_per_weight_per_step": round(sent / self.weights, 4),
                "ddp_fp32_bytes": ring_bytes(1, 4, size), "ddp_bf16_bytes": ring_bytes(1, 2, size)}  # fmt: skip


def bits_of(cfg: Config) -> str:
    """In words, the bits of a weight that are read, and that it keeps."""
    levels = " of four levels" if cfg.bits == 2 and cfg.levels == 4 else ""
    return f"{cfg.bits} bits{levels}" + (f" read of {cfg.kept_bits} kept" if cfg.bits < cfg.kept_bits else "")


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """Bytes that optimizers keep between steps: of state, and of scales."""
    states = [state for o in optimizers for state in o.state_dict()["state"].values()]
    kept = [item for state in states for item in state.items() if item[0] != "rng"]
    scales = sum(tensor.nbytes for name, tensor in kept if name in ("momentum_scale", "delta_history"))
    return sum(tensor.nbytes for _, tensor in kept) - scales, scales


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
                # After a loss, a delta or a gradient that is not finite, FlipOptimizer and AdamW leave all weights as
                # they are. The host notices at its next read and saves nothing more.
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
    run = Run(cfg, task, on, out)
    stop = Stop(patient=bool(distributed.job()))
    started: list[str] = []
    if cfg.resume:
        run.load(cfg.resume)
    elif cfg.init_from:
        started = run.start_from(cfg.init_from)
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
