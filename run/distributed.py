"""Several processes that train one net together, one for each GPU, as torchrun starts them.

    torchrun --standalone --nproc_per_node 4 train.py CONFIG                    one machine
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py CONFIG     two

Process groups are torch.distributed's: NCCL between GPUs, gloo between CPUs and for what the host has to know. Rank 0
alone writes. What ranks tell each other outside a step (settings, the run's folder) is JSON in torchrun's store.
"""

import contextlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from run.errors import UserError

GRACE = 5.0  # seconds in which the ranks that still live say so
FAILURES = ("gloo", "nccl", "timed out", "timeout", "connection", "socket", "recv", "peer")


class Ranks:
    """The processes of a run, of which this one is `rank` of `size`. Of one process (`ALONE`) everything is a no-op."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, attempt: int = 0,
                 timeout: float = 0.0):  # fmt: skip
        self.rank, self.size, self.store, self.attempt, self.timeout = rank, size, store, attempt, timeout
        self.hosts = [""] * size
        self._shared = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None of one process."""
        return dist.group.WORLD if self.size > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any(self, number: int) -> int:
        """The largest `number` of all ranks, known to the host: it waits for the other hosts, not for a GPU."""
        return int(self.max(torch.tensor(number))) if self.size > 1 else number

    def share(self, value: Any) -> list[Any]:
        """What every rank gave, by rank; anything JSON can hold. Raises UserError naming a rank that gives nothing."""
        if self.size == 1:
            return [value]
        self._shared += 1
        key, found = f"share {self._shared}", []
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        for rank in range(self.size):
            try:
                found.append(json.loads(self.store.get(f"{key}/{rank}")))
            except dist.DistError:
                raise UserError(f"rank {rank} of {self.size} did not answer within {self.timeout:g} s; see its output, "
                                "or give ranks longer with --rank_timeout") from None  # fmt: skip
        return found

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, on every rank: anything JSON can hold."""
        return self.share(make() if self.first else None)[0]

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises UserError where a rank runs something else than rank 0, naming both: `about` is what must be equal."""
        everyone = self.share({"host": socket.gethostname(), "about": dict(about)})
        self.hosts = [one["host"] for one in everyone]
        first = everyone[0]["about"]
        problems = [
            f"rank {rank} ({self.hosts[rank]}) has {name} = {one['about'].get(name)!r}, rank 0 ({self.hosts[0]}) "
            f"{first.get(name)!r}"
            for rank, one in enumerate(everyone)
            for name in sorted(first.keys() | one["about"].keys())
            if one["about"].get(name) != first.get(name)
        ]
        if problems:
            raise UserError("ranks disagree, and would not train one net:\n  " + "\n  ".join(problems[:20])
                            + "\n  start all with the same code, versions, settings and data", 2)  # fmt: skip

    def explain(self, error: BaseException, step: int) -> str:
        """In words, which ranks are gone or do not answer, if that is what the error of a collective means; else ""."""
        if self.size == 1 or not any(word in str(error).lower() for word in FAILURES):
            return ""
        key, end = "failed", time.monotonic() + GRACE
        try:
            self.store.set(f"{key}/{self.rank}", "")
            missing = list(range(self.size))
            while missing and time.monotonic() < end:
                time.sleep(0.1)
                missing = [rank for rank in missing if not self.store.check([f"{key}/{rank}"])]
        except dist.DistError:
            return f"the ranks lost each other at step {step}: torchrun's store does not answer"
        names = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in missing)
        reason = str(error).splitlines()[0][:200]
        if not names:
            return f"a message between ranks was lost in step {step + 1} ({reason})"
        return f"{names} ended or did not answer within {self.timeout:g} s (--rank_timeout) in step {step + 1}"

    def wrap(self, net: nn.Module) -> nn.Module:
        """The net with float gradients that become the mean over ranks: by DDP, which refuses nets without any."""
        if self.size == 1 or not any(p.requires_grad for p in net.parameters()):
            return net
        # All ranks have made the same weights; buffers are the integer layers' own, and what is to take the place of
        # the deprecated argument still sends them once.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return DistributedDataParallel(net, broadcast_buffers=False, init_sync=False)

    def leave(self) -> None:
        """End the process groups."""
        if self.store is not None and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def name() -> str:
    """How this process begins what it says to stderr: "" without torchrun."""
    return f"rank {os.environ['RANK']}: " if job() else ""


def synchronised(net: nn.Module, flips: Any, now: bool) -> AbstractContextManager:
    """Around a micro-batch's passes: what it and those before found is sent to the other ranks if `now` (the last one).

    net is what `Ranks.wrap` gave, flips a FlipOptimizer or None.
    """
    if flips is not None and flips.exchange is not None:
        flips.exchange.last_pass = now
    return nullcontext() if now or not isinstance(net, DistributedDataParallel) else net.no_sync()


def ring_bytes(numbers: int, size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of so many numbers of `size` bytes."""
    return 2 * numbers * size * (ranks - 1) / max(ranks, 1)


def start(device: str, timeout: float) -> Ranks:
    """Join the processes that torchrun has started, each with a GPU of its own if `device` ("auto") is not "cpu".

    Without torchrun, `ALONE`. Raises UserError if there are fewer GPUs than processes, or ranks do not come.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return ALONE
    local, cuda = int(os.environ["LOCAL_RANK"]), device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"torchrun started process {local + 1} on this machine, and it has {torch.cuda.device_count()} "
                        "GPUs; give at most that as --nproc_per_node, or --device cpu", 2)  # fmt: skip
    if cuda:
        torch.cuda.set_device(local)
    wait = timedelta(seconds=math.ceil(timeout))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        store = dist.PrefixStore(f"nanogft attempt {restarts()}", store)  # it may outlive a restart
        store.set_timeout(wait)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=wait)  # fmt: skip
    except (dist.DistError, RuntimeError) as error:
        raise UserError(f"the ranks did not find each other within {timeout:g} s ({str(error).splitlines()[0][:200]}); "
                        "see the output of the others, or give them longer with --rank_timeout") from None  # fmt: skip
    return Ranks(rank, size, store, restarts(), timeout)


def restarts() -> int:
    """How often torchrun has started all ranks anew (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str:
    """What the processes of one torchrun have in common, restarted ones included; "" without torchrun.

    The --rdzv_id, or torchrun's own process if none was given.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    with contextlib.suppress(OSError):  # when it began, where the system says so: process ids are used again
        name = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {name}"
