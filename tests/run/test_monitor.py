"""What the monitor measures, against counts by hand, and when it warns."""

import math
import platform
import subprocess
import sys

import pytest
import torch

from run import device as runtime
from run.config import load
from run.errors import UserError
from gft.layers import IntLinear
from run.monitor import Monitor, warnings
from gft.optimizer import FlipOptimizer
from kernels import backend, fuse


def trained(steps: int, every: int, **settings):
    layer = IntLinear(8, 6, bits=3, index=0)
    optimizer = FlipOptimizer(layer, rule="gain", k=0.5, k_schedule="constant", steps=steps, **settings)
    monitor = Monitor(optimizer, {0: "only"}, every, seed=1)
    history = [layer.weight.clone()]
    for step in range(steps):
        monitor.before(step)
        generator = torch.Generator().manual_seed(step)
        delta = torch.randn(16, 6, generator=generator)
        delta[:, 2] = 0
        layer(torch.randn(16, 8, generator=generator)).backward(delta)
        optimizer.step()
        history.append(layer.weight.clone())
        yield step, monitor.report(), history, layer


def test_shares_are_those_of_the_weights():
    seen = 0
    for step, report, history, layer in trained(6, 3):
        assert bool(report) == (step in (2, 5))
        if not report:
            continue
        seen += 1
        row, weight = report["layers"]["only"], layer.weight
        assert report["monitor"] == row
        assert row["flips"] == pytest.approx((history[-1] != history[-2]).float().mean().item(), abs=1e-5)
        assert row["at_limit"] == pytest.approx((weight.abs() == 3).float().mean().item(), abs=1e-5)
        assert row["zeros"] == pytest.approx((weight == 0).float().mean().item(), abs=1e-5)
        assert row["dead_rows"] == pytest.approx(1 / 6, abs=1e-5)
        assert 1 / (16 * 6) - 1e-5 <= row["saturation"] < 0.1
    assert seen == 2


def test_undone_moves_are_counted():
    """By hand on every weight; the monitor follows a sample drawn with replacement, here of the whole layer's size."""
    *_, (_, report, history, _) = trained(8, 8)
    moves = [(b.int() - a.int()).sign() for a, b in zip(history, history[1:])]
    last, undone, moved = torch.zeros_like(moves[0]), 0, 0
    for move in moves:
        undone += int(((move != 0) & (move == -last)).sum())
        moved += int((move != 0).sum())
        last = torch.where(move != 0, move, last)
    assert 0 < undone < moved
    assert report["layers"]["only"]["undone"] == pytest.approx(undone / moved, abs=0.15)


FALLING = [3.0, 2.5, 2.3, 2.2, 2.1, 2.0, 1.95]
FLAT = [3.0, 2.4, 2.4, 2.4, 2.4, 2.4]
MEGA = 2**20


@pytest.mark.parametrize(
    "losses, progress, resident, expected",
    [
        (FALLING, 0.5, [500 * MEGA] * 7, set()),
        (FLAT, 0.3, [], {"plateau"}),
        (FLAT, 0.9, [], set()),
        ([3.0, 2.4, 2.3, 2.9], 0.3, [], {"collapse"}),
        ([4.1, 4.1], 0.3, [], {"collapse"}),
        ([4.1], 0.02, [], set()),
        ([3.0, math.nan], 0.3, [], {"collapse"}),
        (FALLING, 0.5, [400 * MEGA, 500 * MEGA, 550 * MEGA, 700 * MEGA], {"memory"}),
        (FALLING, 0.5, [100 * MEGA, 500 * MEGA, 510 * MEGA, 520 * MEGA], set()),
    ],
)
def test_warnings(losses, progress, resident, expected):
    found = warnings(losses, progress, math.log(65), resident)
    assert set(found) == expected
    assert all(len(text) > 20 for text in found.values())


def test_runtime_says_what_it_chose_and_why(monkeypatch):
    before = fuse.enabled()
    try:
        monkeypatch.setattr(fuse, "compiler", lambda: None)
        chosen = runtime.choose(load(["shakespeare_char_small", "--device", "cpu"]))
        assert not chosen.compile and any("no C++ compiler" in reason for reason in chosen.reasons)
        with pytest.raises(UserError, match="--compile false"):
            runtime.choose(load(["shakespeare_char_small", "--device", "cpu", "--compile", "true"]))
        monkeypatch.setattr(fuse, "compiler", lambda: "/usr/bin/g++")
        assert runtime.choose(load(["shakespeare_char_small", "--device", "cpu"])).compile and fuse.enabled()
        assert not runtime.choose(load(["shakespeare_char_small", "--device", "cpu", "--steps", "20"])).compile
        monkeypatch.setattr(backend, "problem", lambda: "this GPU is sm_75 and the kernels need sm_80 or newer")
        with pytest.raises(UserError, match="sm_75.*--backend torch"):
            runtime.choose(load(["shakespeare_char_small", "--backend", "triton"]))
        assert runtime.choose(load(["shakespeare_char_small", "--device", "cpu"])).backend == "torch"
    finally:
        fuse.enable(before)
        backend.use("auto")


def test_memory_is_measured():
    resident, peak = runtime.resident_bytes(), runtime.peak_memory_bytes(torch.device("cpu"))
    assert 2**25 < peak < 2**40 and (resident is None or resident <= peak * 1.05)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is set where it is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own: a tensor as large as the one freed before costs no new pages."""
    program = """
import resource, torch
from run import device as runtime
runtime.keep_freed_memory()
for _ in range(20):  # until holes of the right size are there
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 4 x 64 MiB in fresh pages of 4 KiB would be 65,536
