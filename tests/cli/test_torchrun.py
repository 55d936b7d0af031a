"""train.py as torchrun starts it: the weights of one process, one writer, faults that are named, runs taken up again.

The ranks are started here, with the environment that torchrun gives them: starting torchrun itself costs more than all
of these runs.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import arguments
from test_train_images import VIT
from torch import multiprocessing

import train
from run import distributed, log
from tests.data.inputs import image_data

WEIGHTS = {
    "momentum": (2, {"momentum": 0.9}),
    "four ranks, micro-batches": (4, {"delta_scale": "delayed", "grad_accum": 2, "batch_size": 8, "dropout": 0.2}),
}
METHOD = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"  # spawn imports anew
IMAGES = f"{VIT} --steps 6 --eval_every 3 --save_every 3 --compile false --threads 1 --mix both --hflip 0.5"
OTHERS = {"hybrid": {"int_layers": "attention,mlp"}, "sgd": {"method": "sgd", "lr": 0.02}}
CLOSE = 2e-3  # of losses under DDP, whose sums have another order


def called(argv: list[str]) -> tuple[int, dict, str, str]:
    """Exit status, final JSON, output and errors of a run in this process."""
    out, err, stdout = io.StringIO(), io.StringIO(), sys.stdout
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train.main(argv)
    sys.stdout = stdout
    if dist.is_initialized():  # after an error, which ends a real process
        dist.destroy_process_group()
    last = out.getvalue().strip().rpartition("\n")[2]
    return status, json.loads(last) if last.startswith("{") else {}, out.getvalue(), err.getvalue()


def at_step(number: int, action) -> None:
    """Have `action` called in the backward pass of step `number` of runs from now on; 0: nothing."""
    real = train.Monitor.before_backward

    def before_backward(self, step):
        if step + 1 == number:
            action()
        return real(self, step)

    train.Monitor.before_backward = before_backward


class Ranks:
    """Runs of this rank beside the others; every run has a store of its own, as with torchrun."""

    def __init__(self, rank: int, ports: list[int], out: str):
        self.rank, self.ports, self.out = rank, iter(ports), Path(out)

    def run(self, argv: list[str], size: int = 2, restarts: int = 0):
        """`called` on the ranks below size; None on others."""
        port = next(self.ports)
        if self.rank >= size:
            return None
        os.environ |= {
            "RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
        }  # fmt: skip
        return called(argv)

    def alone(self, argv: list[str]):
        """`called` without the other ranks, which wait at the next run."""
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        return called(argv)


def work(rank: int, ports: list[int], folder: str) -> None:
    """What a rank does in this test."""
    torch.set_num_threads(1)
    os.environ["NANOGFT_CACHE"] = f"{folder}/cache{rank}"
    log.draw, distributed.GRACE = lambda *_: None, 0.5
    ranks, out = Ranks(rank, ports, folder), Path(folder)
    for name, (size, settings) in WEIGHTS.items():
        found = ranks.run(arguments(out / name, **settings), size)
        if rank == 0:
            check_weights(ranks, name, size, settings, *found)
        elif found is not None:
            assert found[:3] == (0, {}, ""), found  # rank 0 alone speaks
    sys.modules["data.image_task"].load_images = lambda *_: image_data(60)
    found = ranks.run([*IMAGES.split(), "--out_dir", f"{folder}/images"])
    if rank == 0:
        one = ranks.alone([*IMAGES.split(), "--out_dir", f"{folder}/images alone"])
        assert found[0] == one[0] == 0, found[3] + one[3]
        for key in ("weights_sha256", "val_loss", "accuracy"):
            assert found[1][key] == one[1][key], key
    for name, settings in OTHERS.items():
        found = ranks.run(arguments(out / name, **settings))
        if rank == 0:
            one = ranks.alone(arguments(out / f"{name} alone", **settings))
            assert found[0] == one[0] == 0, found[3] + one[3]
            assert found[1]["val_loss"] == pytest.approx(one[1]["val_loss"], abs=CLOSE), name
    check_faults(ranks, rank, out)


def check_weights(ranks: Ranks, name: str, size: int, settings: dict, status: int, result: dict, _, err: str) -> None:
    """The same run in one process, from the start and from a checkpoint of several, ends with the same weights."""
    out = ranks.out
    assert status == 0, err
    one = ranks.alone(arguments(out / f"{name} alone", **settings))[1]
    for key in ("weights_sha256", "val_loss", "flips_per_weight_per_step", "optimizer_state_bytes"):
        assert result[key] == one[key], key
    assert result["world_size"] == size and 0 < result["sent_bytes_per_weight_per_step"] <= 5 * (size - 1) / size
    losses = [[r["loss"] for r in map(json.loads, (out / f / "metrics.jsonl").open())] for f in (name, f"{name} alone")]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=2e-5)
    shutil.copytree(out / name, out / f"{name} again")
    again = ranks.alone(arguments(out / f"{name} again", resume="previous", **settings))
    assert again[1]["weights_sha256"] == one["weights_sha256"], again[3]
    (out / f"{name}.json").write_text(json.dumps(one["weights_sha256"]))


def check_faults(ranks: Ranks, rank: int, out: Path) -> None:
    """Refusals, a signal that reaches one rank, a restart, a rank that hangs."""
    refused = ranks.run(arguments(out / "refused", k=0.5 - 0.25 * rank))
    if rank < 2:
        assert refused[0] == 2 and "rank 1" in refused[3] and "has k = 0.25" in refused[3], refused
    too_many = {"batch_size": 20_000, "context": 16}
    for settings, said in (({"batch_size": 3}, "batch_size = 3"), ({"update": "backward"}, "--update step"),
                           (too_many, "int32 votes hold 133,144")):
        refused = ranks.run(arguments(out / "refused", **settings))
        if rank < 2:
            assert refused[0] == 2 and said in refused[3], refused
    assert not (out / "refused").exists()

    if rank == 1:
        at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = ranks.run(arguments(out / "stopped", momentum=0.9))
    at_step(0, None)
    if rank < 2:
        assert stopped[0] == 128 + signal.SIGTERM, stopped
    restarted = ranks.run(arguments(out / "stopped", momentum=0.9), restarts=1)
    if rank == 0:
        assert "stopped at step 5 of 12" in stopped[2] and "going on from step 5" in restarted[2], (stopped, restarted)
        assert restarted[1]["weights_sha256"] == json.loads((out / "momentum.json").read_text())
    if rank == 1:
        at_step(3, lambda: time.sleep(5))
    hung = ranks.run(arguments(out / "hung", rank_timeout=2))
    if rank == 0:
        assert hung[0] == 1 and "rank 1" in hung[3] and "in step 3" in hung[3] and "Traceback" not in hung[3], hung


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="torch has no gloo here")
def test_ranks(tmp_path):
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(16)]
    multiprocessing.start_processes(work, ([s.port for s in stores], str(tmp_path)), nprocs=4, start_method=METHOD)
