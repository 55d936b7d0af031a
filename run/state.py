"""A run: its net, optimizers and progress; how it is saved and taken up again, and what it says at its end."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gft.optimizer import FlipOptimizer
from run import checkpoint
from run import device as machine
from run.config import Config, differences, to_dict
from run.distributed import ring_bytes
from run.errors import UserError
from run.optimizers import make_optimizers, state_bytes

if TYPE_CHECKING:
    from data.task import Task


class Run:
    """What a run is made of and how far it is. `net` has its first weights, and is moved to the run's device."""

    def __init__(self, cfg: Config, task: "Task", on: machine.Runtime, out: Path, net: nn.Module):
        self.cfg, self.task, self.on, self.out, self.device = cfg, task, on, out, on.device
        self.ranks = task.ranks
        self.net = net.to(on.device)
        tokens = cfg.batch_size * task.positions
        self.optimizers = make_optimizers(self.net, cfg, tokens, self.ranks, on.graph)
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
