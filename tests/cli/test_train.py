"""The training program: it learns, resumes exactly, stops cleanly, and refuses what would lose something."""

import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from no_reads import NothingIsRead

import data
import sample
import train
from data import cache, stdlib_text, text_task, tinyshakespeare
from data.cache import OfficialFile
from data.text import load_text
from kernels import backend, fuse
from run import checkpoint, log
from run import device as machine
from run.config import load
from run.errors import DIVERGED
from run.folder import choose_folder
from run.progress import Metrics, Progress
from run.stop import Stop

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": 12,
    "log_every": 1, "eval_every": 6, "save_every": 4, "eval_windows": 8, "sample_tokens": 8, "compile": "false",
    "threads": 1, "ortho_tile": 32, "topk_tile": 32,
}  # fmt: skip
VARIANTS = {
    "gft": {},
    "gft-momentum-delayed": {"n_layer": 2, "momentum": 0.9, "delta_scale": "delayed", "grad_accum": 2, "dropout": 0.2},
    "gft-backward": {"update": "backward", "momentum": 0.9},
    "hybrid": {"int_layers": "attention,mlp"},
    "adamw": {"method": "adamw"},
    "muon": {"method": "muon"},
    "sgd": {"method": "sgd", "lr": 0.02},
    "signsgd": {"method": "signsgd", "lr": 0.005},
    "ste": {"method": "ste", "bits": 2},
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch, request, handlers):
    """A cache of the test's own; no curves, which take half of a short run, but for tests that ask for `curve`; signal
    handlers, the backend and fusing as the test found them."""
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    if "curve" not in request.fixturenames:
        monkeypatch.setattr(log, "draw", lambda *_: None)
    fusing, chosen = fuse.enabled(), backend.chosen()
    yield
    fuse.enable(fusing)
    backend.use(chosen)


@pytest.fixture
def curve():
    """Draws loss.png as a run does."""


def arguments(out: Path | str, **changes) -> list[str]:
    keys = TINY | {"out_dir": out} | changes
    return [part for key, value in keys.items() if value is not None for part in (f"--{key}", str(value))]


def run(capsys, out: Path | str, **changes) -> tuple[int, dict, str]:
    """Exit status, final JSON (empty if there is none) and standard error of a run in this process."""
    capsys.readouterr()
    status = train.main(arguments(out, **changes))
    shown = capsys.readouterr()
    last = shown.out.strip().splitlines()[-1] if shown.out.strip() else ""
    return status, json.loads(last) if last.startswith("{") else {}, shown.err


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def at_step(monkeypatch, number: int, action) -> list[int]:
    """Have `action` called between the backward pass and the update of step `number`; returns the steps made."""
    real, made = train.Monitor.before_step, []

    def before_step(self):
        made.append(1)
        if len(made) == number:
            action()
        return real(self)

    monkeypatch.setattr(train.Monitor, "before_step", before_step)
    return made


def test_final_json_and_files(capsys, tmp_path, curve):
    status, result, _ = run(capsys, tmp_path / "o")
    assert status == 0
    keys = """config method bits steps tokens val_loss best_val_loss seconds tokens_per_second
              flips_per_weight_per_step accuracy int_weight_bytes float_param_bytes optimizer_state_bytes votes_bytes
              scale_bytes peak_memory_bytes weights_sha256"""
    assert not set(keys.split()) - set(result)
    assert result["float_param_bytes"] == 0 and result["optimizer_state_bytes"] == 0
    assert result["int_weight_bytes"] == result["weights"] > 12 * 32 * 32
    assert result["votes_bytes"] == 4 * result["weights"] and result["scale_bytes"] == 4 * 6
    assert result["packed_weight_bytes"] == math.ceil(result["weights"] * 6 / 8)
    assert result["tokens"] == 12 * 4 * 16
    assert 0.15 < result["flips_per_weight_per_step"] < 0.35
    assert (tmp_path / "o" / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = metrics_of(tmp_path / "o")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if "val_loss" in r] == [6, 12]
    layers = records[9]["layers"]
    assert {"embedding", "blocks.0.qkv", "head"} <= set(layers)
    assert set(records[9]["monitor"]) == {"flips", "at_limit", "zeros", "dead_rows", "undone"}
    assert result["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=1e-4)
    assert result["flips_per_weight_per_step"] == pytest.approx(sum(r["flips"] for r in records) / 12)
    assert [r["flips"] for r in records] == pytest.approx([0.5 * (1 - step / 12) for step in range(12)], rel=0.2)


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_that_are_kept(capsys, tmp_path, name):
    _, result, _ = run(capsys, tmp_path / "o", steps=2, **VARIANTS[name])
    n, floats = result["weights"], result["float_param_bytes"] // 4
    assert result["int_weight_bytes"] == n - floats
    if name.startswith("gft"):
        assert floats == 0
        assert result["optimizer_state_bytes"] == (0 if name == "gft" else n)
        assert result["votes_bytes"] == (0 if name == "gft-backward" else 4 * n)
        delayed = 6 * 17 * 4 if name == "gft-momentum-delayed" else 0
        assert result["scale_bytes"] >= 6 * 4 + delayed and (name != "gft" or result["scale_bytes"] == 6 * 4)
    elif name == "hybrid":
        assert 0 < floats < n and result["votes_bytes"] == 4 * (n - floats)
        assert result["optimizer_state_bytes"] == pytest.approx(8 * floats, abs=64)
    else:
        assert floats == n and result["votes_bytes"] == result["scale_bytes"] == 0
        each = {"signsgd": 0, "sgd": 4, "muon": 4}.get(name, 8)
        assert each * n <= result["optimizer_state_bytes"] <= 8 * n + 64


@pytest.mark.parametrize("name", VARIANTS)
def test_stop_and_resume_is_exact(capsys, tmp_path, monkeypatch, name):
    """Every method trains; asked to stop in its seventh step it saves, and goes on to the same weights."""
    status, whole, _ = run(capsys, tmp_path / "whole", **VARIANTS[name])
    records = metrics_of(tmp_path / "whole")
    assert status == 0 and whole["val_loss"] < math.log(90) and records[-1]["loss"] < records[1]["loss"]
    made = at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, nothing, _ = run(capsys, tmp_path / "parts", **VARIANTS[name])
    assert status == 128 + signal.SIGTERM and not nothing
    assert checkpoint.load(tmp_path / "parts", "last")[1]["step"] == 7
    status, resumed, error = run(capsys, tmp_path / "parts", resume="last", **VARIANTS[name])
    assert status == 0 and len(made) == 12 and "Warning" not in error
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["val_loss"] == whole["val_loss"]
    assert resumed["flips_per_weight_per_step"] == pytest.approx(whole["flips_per_weight_per_step"], rel=1e-12)
    resumed_records = metrics_of(tmp_path / "parts")
    assert [r["step"] for r in resumed_records] == list(range(1, 13))
    assert [r["loss"] for r in resumed_records] == [r["loss"] for r in records]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_stops_a_run_after_its_step(capsys, tmp_path, monkeypatch, number):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    capsys.readouterr()
    status = train.main(arguments(tmp_path / "o", log_every=100))
    shown = capsys.readouterr()
    assert status == 128 + number and "stopping after this step" in shown.err
    *_, stopped, go_on = shown.out.strip().splitlines()
    assert stopped == f"stopped at step 3 of 12, saved in {tmp_path / 'o'}"
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 3
    words = shlex.split(go_on.removeprefix("resume with: "))
    assert words[1] == "train.py" and train.main(words[2:]) == 0, "the command that is shown works"


def test_an_ignored_hangup_is_not_heard(capsys, tmp_path, monkeypatch):
    """As nohup leaves it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run(capsys, tmp_path / "o", steps=3)[0] == 0


@pytest.mark.parametrize("error, code", [(BrokenPipeError, 141), (OSError(errno.EIO, "Input/output error"), 1)],
                         ids=["pipe", "terminal"])  # fmt: skip
@pytest.mark.parametrize("part", ["show", "text"])
def test_output_that_nobody_reads_loses_no_step(capsys, tmp_path, monkeypatch, part, error, code):
    """A closed window, a pipe whose reader has ended: the run ends, and is saved."""
    real = getattr(Progress, part)

    def gone(self, shown):
        if self.step >= 6:
            raise error
        real(self, shown)

    monkeypatch.setattr(Progress, part, gone)
    assert run(capsys, tmp_path / "o", save_every=100)[0] == code
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == (7 if part == "show" else 6)


def test_a_signal_at_the_end_of_a_step_waits_for_the_next(capsys, tmp_path, monkeypatch):
    """What is said to be saved is saved."""
    real = train.Log.due

    def due(self):
        found = real(self)
        if self.run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(train.Log, "due", due)
    capsys.readouterr()
    assert train.main(arguments(tmp_path / "o", log_every=100)) == 128 + signal.SIGTERM
    assert "stopped at step 3 of 12" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 3


def test_a_signal_in_the_last_step_changes_nothing(capsys, tmp_path, monkeypatch):
    at_step(monkeypatch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, result, _ = run(capsys, tmp_path / "o")
    assert status == 0 and result["steps"] == 12


def test_killed_anywhere_and_resumed(capsys, tmp_path):
    """SIGKILL at two moments, resumed each time: the weights of a run that was never killed."""
    slow = {"steps": 60, "save_every": 5, "eval_every": 15, "momentum": 0.9, "delta_scale": "delayed"}
    expected = run(capsys, tmp_path / "whole", **slow)[1]["weights_sha256"]
    out, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    for at_line in (3, 32):
        resume = {"resume": "last"} if checkpoint.exists(out, "last") else {}
        process = subprocess.Popen([sys.executable, "train.py", *arguments(out, **slow, **resume)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        deadline = time.monotonic() + 100
        while not (metrics.exists() and metrics.read_text().count("\n") >= at_line):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert checkpoint.load(out, "last")[1]["step"] < 60
    assert run(capsys, out, **slow, resume="last")[1]["weights_sha256"] == expected


def test_log_every_reads_less_and_changes_no_weight(capsys, tmp_path):
    """A record's loss and flips are the means since the record before; the first step is read, as is what must be."""
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    _, whole, _ = run(capsys, often)
    _, result, _ = run(capsys, seldom, log_every=5, save_every=100, monitor_every=100)
    assert result["weights_sha256"] == whole["weights_sha256"]
    assert result["flips_per_weight_per_step"] == pytest.approx(whole["flips_per_weight_per_step"])
    each, means = metrics_of(often), metrics_of(seldom)
    assert [r["step"] for r in means] == [1, 5, 6, 10, 12]
    for first, record in zip([0, 1, 5, 6, 10], means, strict=True):
        for key in ("loss", "flips"):
            part = [r[key] for r in each[first : record["step"]]]
            assert record[key] == pytest.approx(sum(part) / len(part), abs=2e-5)


def test_a_resumed_run_may_log_more_or_less_often(capsys, tmp_path, monkeypatch):
    _, whole, _ = run(capsys, tmp_path / "whole")
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(capsys, tmp_path / "o", log_every=3)
    _, result, _ = run(capsys, tmp_path / "o", resume="last", log_every=2)
    assert result["weights_sha256"] == whole["weights_sha256"]
    assert result["flips_per_weight_per_step"] == pytest.approx(whole["flips_per_weight_per_step"], rel=1e-12)


@pytest.mark.parametrize("grad_accum, update", [(2, "step"), (1, "backward")])
def test_a_step_reads_nothing_on_the_host(tmp_path, grad_accum, update):
    """The loop of train.py, from batch to schedule, with kernels as on a GPU: only what is logged waits for it."""
    cfg = load(arguments(tmp_path / "o", backend="triton", device="cpu", steps=2, grad_accum=grad_accum, update=update,
                         momentum=0.9, delta_scale="delayed", context=8, topk_tile=64, ortho_tile=64, log_every=50,
                         monitor_every=50, int_layers="embedding,attention,mlp", dropout=0.2))  # fmt: skip
    made = train.make_run(cfg, data.load(cfg), machine.choose(cfg), tmp_path / "o")
    before = [p.detach().clone() for p in made.net.parameters()]
    made.task.prepare(0, made.device)
    monitor = train.Monitor(made.net, 50, cfg.seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Monitor", lambda *_: monitor)
        patch.setattr(train.Log, "due", lambda self: False)
        patch.setattr(train.Log, "finish", lambda self: {"loss": self.loss})
        patch.setattr(made.task, "prepare", lambda step, device: None)  # the host's part of a step
        with NothingIsRead():
            found = train.train(made, Metrics(tmp_path / "m.jsonl", 0), Stop())
    assert found["loss"] > 0 and made.step == 2 and made.rng.tolist() == [1, 2]
    assert not any(map(torch.equal, before, made.net.parameters())), "the second step moves by delayed scales"


def diverging(monkeypatch, number: int, value: float = math.nan) -> None:
    """Have the loss of training pass `number` be `value`, and of no other."""
    real, passes = text_task.cross_entropy, []

    def loss(logits, targets):
        passes.append(logits.requires_grad)
        return real(logits, targets) * (value if logits.requires_grad and sum(passes) == number else 1.0)

    monkeypatch.setattr(text_task, "cross_entropy", loss)


@pytest.mark.parametrize("name", ["gft", "gft-backward", "hybrid", "adamw", "ste"])
def test_a_loss_that_is_not_finite_ends_the_run(capsys, tmp_path, monkeypatch, name):
    """At step 6, read at step 8: weights stay as they were before step 6, and the checkpoint of step 4 as it was."""
    stopped, held, real = [], [], train.train
    monkeypatch.setattr(train, "train", lambda run, *rest: (held.append(run), real(run, *rest))[1])
    diverging(monkeypatch, 6)
    at_step(monkeypatch, 6, lambda: stopped.extend(p.detach().clone() for p in held[0].net.parameters()))
    changes = {"log_every": 100, "eval_every": 100, "monitor_every": 100, "beta2": 0.98, **VARIANTS[name]}
    status, result, error = run(capsys, tmp_path / "o", **changes)
    assert status == DIVERGED == 3 and not result
    assert "the loss became nan at one of the steps 5 to 8; nothing after it was saved" in error
    assert f"lower {'--k' if name.startswith('gft') else '--lr'}" in error
    moved = [not torch.equal(a, b) for a, b in zip(stopped, held[0].net.parameters(), strict=True)]
    assert not any(moved)
    tensors, meta = checkpoint.load(tmp_path / "o", "last")
    assert meta["step"] == 4 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    monkeypatch.undo()
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    whole = run(capsys, tmp_path / "whole", **changes)[1]
    again = run(capsys, tmp_path / "o", resume="last", **changes)[1]
    assert again["weights_sha256"] == whole["weights_sha256"], "what is saved is good"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_in_the_first_step_is_told_at_once(capsys, tmp_path, monkeypatch, value):
    diverging(monkeypatch, 1, value)
    status, _, error = run(capsys, tmp_path / "o", log_every=100)
    assert status == DIVERGED and f"the loss became {value} at step 1; nothing after it was saved" in error
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 0


GROWING = {"lr": 1, "lr_end": 1, "weight_decay": 10, "steps": 60, "log_every": 10, "eval_every": 30, "save_every": 30}


@pytest.mark.parametrize("changes", [
    {"int_layers": "head"}, {"int_layers": "attention,mlp"}, {"int_layers": "attention", "update": "backward"},
    {"int_layers": "head", "precision": "bf16"}, {"method": "adamw"}, {"method": "sgd"}, {"method": "signsgd"},
    {"method": "ste"}, {"method": "muon", "muon_lr": 100},
], ids=lambda changes: "-".join(map(str, changes.values())))  # fmt: skip
def test_float_weights_that_grow_without_bound_end_the_run(capsys, tmp_path, changes):
    """Between integer layers too, whose inputs are int8; nothing that is not finite is saved."""
    status, result, error = run(capsys, tmp_path / "o", **GROWING, **changes)
    assert status == DIVERGED and not result and "lr in another --out_dir" in error and "--k" not in error
    place = r"(float weights of|activations behind|error \(delta\) behind) [\w.]+ \(\w+, (integer|float)\) became"
    assert re.search(place, error)
    for name in ("last", "best"):
        if checkpoint.exists(tmp_path / "o", name):
            tensors = checkpoint.load(tmp_path / "o", name)[0].values()
            assert all(t.isfinite().all() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("name", ["gft", "gft-backward", "gft-momentum-delayed", "hybrid", "adamw"])
def test_a_delta_that_is_not_finite_ends_the_run(capsys, tmp_path, monkeypatch, name):
    """The loss is finite. Weights are those before step 6, but for those that had moved before the error came by."""
    real, passes, held, before, real_train = text_task.cross_entropy, [], [], [], train.train

    def loss(logits, targets):  # 0 * sqrt'(0) is NaN
        passes.append(logits.requires_grad)
        bad = sum(passes) >= 6 * VARIANTS[name].get("grad_accum", 1) and logits.requires_grad
        return real(logits, targets) + ((logits.sum() * 0).abs().sqrt() if bad else 0)

    monkeypatch.setattr(text_task, "cross_entropy", loss)
    monkeypatch.setattr(train, "train", lambda run, *rest: (held.append(run), real_train(run, *rest))[1])
    at_step(monkeypatch, 6, lambda: before.extend(p.detach().clone() for p in held[0].net.parameters()))
    status, _, error = run(capsys, tmp_path / "o", log_every=100, monitor_every=100, **VARIANTS[name])
    assert status == DIVERGED and f"lower {'--k' if name.startswith('gft') else '--lr'}" in error
    assert "the error (delta) behind head (head, " in error and " became nan at one of the steps 5 to 6" in error
    assert all(map(torch.equal, before, held[0].net.parameters()))
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 4


def test_float_weights_are_looked_at_before_they_are_saved(capsys, tmp_path, monkeypatch):
    """In the last step, when no further loss will tell."""
    held, real = [], train.train
    monkeypatch.setattr(train, "train", lambda run, *rest: (held.append(run), real(run, *rest))[1])
    at_step(monkeypatch, 12, lambda: held[0].net.head.weight.data[3].fill_(math.inf))
    status, _, error = run(capsys, tmp_path / "o", int_layers="attention,mlp")
    assert status == DIVERGED and "the float weights of head (head, float) became inf at step 12" in error
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 8 and "lower --lr" in error


def test_a_validation_loss_that_is_not_finite_ends_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(text_task.TextTask, "evaluate", lambda *_: {"val_loss": math.inf})
    status, _, error = run(capsys, tmp_path / "o")
    assert status == DIVERGED and "the validation loss became inf at step 6" in error
    assert not checkpoint.exists(tmp_path / "o", "best")


@pytest.mark.parametrize("part", [1, 2])
def test_one_bad_micro_batch_is_enough(capsys, tmp_path, monkeypatch, part):
    diverging(monkeypatch, 2 + part)
    status, _, error = run(capsys, tmp_path / "o", grad_accum=2)
    assert status == DIVERGED and "at step 2" in error


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine that has no Tiny Shakespeare and reaches nothing."""
    for variable in ("NANOGFT_DATA", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cache, "SHARED_DIR", tmp_path / "shared")
    official = OfficialFile("tinyshakespeare/input.txt", "http://127.0.0.1:9/input.txt", 10, "0" * 64)
    monkeypatch.setattr(tinyshakespeare, "FILE", official)


def test_a_fresh_machine_trains_on_pythons_own_text_and_says_so(capsys, tmp_path, nowhere):
    """In a box before and after; the run can be taken up by the same command."""
    capsys.readouterr()
    argv = arguments(tmp_path / "o", data=None, steps=2)
    assert train.main(argv) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    boxes = [n for n, line in enumerate(lines) if "tinyshakespeare was not found, so this run uses another" in line]
    results = next(n for n, line in enumerate(lines) if line.startswith("step"))
    assert len(boxes) == 2 and boxes[0] < results < boxes[1] and lines[boxes[0] - 1].startswith("+----")
    assert any("--data_dir FOLDER" in line for line in lines) and json.loads(lines[-1])["steps"] == 2
    assert checkpoint.load(tmp_path / "o", "last")[1]["config"]["data"] == "stdlib"
    assert train.main([*argv, "--resume"]) == 0


def test_a_text_asked_for_by_name_is_not_replaced(capsys, tmp_path, nowhere):
    status, _, error = run(capsys, tmp_path / "o", data="tinyshakespeare")
    assert status != 0 and "tinyshakespeare" in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize("argv, code, said", [
    (["--help"], 0, "--log_every"), (["--bitz", "4"], 2, "did you mean bits?"), (["no_such_config"], 2, "is neither"),
    (["--k", "2"], 2, "k = 2: must be a number from 0 to 1"),
], ids=["help", "key", "config", "value"])  # fmt: skip
def test_help_and_mistakes_are_answered_without_torch(argv, code, said):
    program = f"""
import runpy, sys
sys.argv = ["train.py", *{argv!r}]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as ended:
    print("ended", ended.code or 0, {{"torch", "numpy", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"ended {code} set()" and said in done.stdout + done.stderr


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(capsys, tmp_path):
    run(capsys, tmp_path / "o", steps=1)
    head = tmp_path / "o" / "last.json"
    head.write_text(head.read_text().replace('"version": 2', '"version": 1'))
    status, _, error = run(capsys, tmp_path / "o", steps=1, resume="last")
    assert status == 1 and f"{head} was written by format version 1; this program reads 2" in error
    assert "another --out_dir" in error


def test_micro_batches_give_the_same_weights(capsys, tmp_path):
    hashes = {
        run(capsys, tmp_path / str(parts), delta_scale="delayed", momentum=0.9, grad_accum=parts,
            dropout=0.2)[1]["weights_sha256"]
        for parts in (1, 2, 4)
    }
    assert len(hashes) == 1


def test_same_seed_same_run_other_seed_other_run(capsys, tmp_path):
    a, b, c = (run(capsys, tmp_path / n, seed=s)[1]["weights_sha256"] for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b != c


def test_used_folder_is_refused_and_untouched(capsys, tmp_path):
    run(capsys, tmp_path / "o")
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    status, _, error = run(capsys, tmp_path / "o", seed=2)
    assert status == 1 and "already holds a run" in error and "--resume" in error
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before


def test_two_runs_do_not_share_a_folder(capsys, tmp_path, monkeypatch):
    """A run that has saved nothing yet holds its folder all the same."""
    _, held = choose_folder(load(arguments(tmp_path / "o")))
    status, _, error = run(capsys, tmp_path / "o")
    assert status == 1 and "another run is writing" in error
    held.release()
    monkeypatch.chdir(tmp_path)
    folder, held = choose_folder(load(arguments("")))
    assert str(folder) == "out/custom" and run(capsys, "", steps=2)[1]["out_dir"] == "out/custom-2"
    held.release()


def test_killed_before_the_first_save(capsys, tmp_path, monkeypatch):
    _, whole, _ = run(capsys, tmp_path / "whole")
    monkeypatch.setattr(train, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, tmp_path / "o")
    monkeypatch.undo()
    status, resumed, _ = run(capsys, tmp_path / "o", resume="last")
    assert status == 0 and resumed["weights_sha256"] == whole["weights_sha256"]


def test_resuming_a_finished_run_prints_valid_json(capsys, tmp_path):
    _, first, _ = run(capsys, tmp_path / "o")
    status, again, _ = run(capsys, tmp_path / "o", resume="last")
    assert status == 0 and again["weights_sha256"] == first["weights_sha256"] and again["step_seconds"] is None


def test_resuming_on_another_machine_says_what_is_no_longer_promised(capsys, tmp_path, monkeypatch):
    run(capsys, tmp_path / "o")
    assert "promised" not in run(capsys, tmp_path / "o", resume="last")[2]
    monkeypatch.setattr(machine, "processor", lambda device: "Another CPU")
    _, _, error = run(capsys, tmp_path / "o", resume="last")
    assert "exact resumption is not guaranteed, because the setup has changed: processor " in error
    assert "Another CPU now" in error


def test_a_damaged_log_does_not_block_a_good_checkpoint(capsys, tmp_path):
    run(capsys, tmp_path / "o")
    for damage in (b"\xff\xfe", b"null\n", b'{"loss": 1}\n'):
        (tmp_path / "o" / "metrics.jsonl").write_bytes(damage)
        assert run(capsys, tmp_path / "o", resume="last")[0] == 0


def test_a_curve_that_cannot_be_written_costs_nothing_else(capsys, tmp_path, curve):
    (tmp_path / "o" / "loss.png").mkdir(parents=True)
    status, result, error = run(capsys, tmp_path / "o")
    assert status == 0 and result["steps"] == 12 and "loss.png cannot be written" in error


def test_the_command_that_samples_has_letters_the_text_has(capsys, tmp_path):
    (tmp_path / "digits.txt").write_text("\n".join(f"{n} times {n}" for n in range(900)))
    capsys.readouterr()
    assert train.main(arguments(tmp_path / "o", data=tmp_path / "digits.txt", steps=1)) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("use: "))
    *_, folder, _, prompt = shlex.split(command)
    assert folder == str(tmp_path / "o") and prompt.isdigit() and int(prompt) > 700
    assert sample.main([folder, "--prompt", prompt, "--max-tokens", "1"]) == 0


def test_a_net_too_small_for_a_scale_is_told(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", d_model=2, n_head=1, bits=2, keep_bits=2)
    assert status == 2 and "initial weights are equal" in error and "--d_model" in error


def test_what_cannot_fit_is_refused_before_it_is_tried(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", d_model=32768, n_layer=1000, n_head=8)
    assert status == 1 and "GiB are free" in error and not (tmp_path / "o").exists()


def test_a_compiler_that_does_not_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse, "trial", lambda device: "CppCompileError: no omp.h")
    monkeypatch.setattr(fuse, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(machine, "STEPS_WORTH_COMPILING", 12)
    status, result, _ = run(capsys, tmp_path / "o", compile="auto")
    assert status == 0 and result["environment"]["compile"] is False
    status, _, error = run(capsys, tmp_path / "p", compile="true")
    assert status == 1 and "no omp.h" in error and "--compile false" in error


def test_unnamed_folder_is_numbered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("out/custom", "out/custom-2"):
        _, result, _ = run(capsys, "", steps=2)
        assert result["out_dir"] == expected
    assert run(capsys, "", steps=2, resume="last")[1]["out_dir"] == "out/custom-2"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"bits": 4}, "bits = 6 in the checkpoint, 4 now"),
        ({"steps": 20}, "steps = 12 in the checkpoint, 20 now"),
    ],
)
def test_foreign_checkpoint_is_refused(capsys, tmp_path, changes, expected):
    run(capsys, tmp_path / "o", save_every=100)
    status, _, error = run(capsys, tmp_path / "o", **{"resume": "last"} | changes)
    assert status == 1 and expected in error


def test_other_text_is_refused(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40, encoding="utf-8")
    run(capsys, tmp_path / "o", data=text)
    text.write_text("that is the question: to be or not to be. " * 40, encoding="utf-8")
    status, _, error = run(capsys, tmp_path / "o", data=text, resume="last")
    assert status == 1 and "other data" in error


def test_a_resumed_run_may_spell_its_settings_otherwise(capsys, tmp_path, monkeypatch):
    """Contents and choices count: the text has moved, the CPU is named, as are the threads and the layers."""
    whole = run(capsys, tmp_path / "whole", threads=torch.get_num_threads())[1]
    monkeypatch.chdir(tmp_path)
    text = Path("text.txt")
    text.write_bytes(stdlib_text.find("").content)
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(capsys, "o", data=text, device="auto", threads=0)
    moved = (tmp_path / "elsewhere.txt").absolute()
    text.rename(moved)
    status, result, error = run(capsys, tmp_path / "." / "o", data=moved, device="cpu", resume="last",
                                threads=torch.get_num_threads(), vocab_size=600, backend="torch",
                                int_layers="embedding,attention,mlp,head")  # fmt: skip
    assert status == 0 and "not guaranteed" not in error
    assert result["weights_sha256"] == whole["weights_sha256"]


def test_other_threads_are_told_and_do_not_stop_a_run(capsys, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(capsys, tmp_path / "o", threads=1)
    status, _, error = run(capsys, tmp_path / "o", threads=2, resume="last")
    torch.set_num_threads(before)
    assert status == 0 and "not guaranteed, because the setup has changed: threads 1 then, 2 now" in error


def with_setting(folder: Path, name: str, key: str, value: object) -> Path:
    """The checkpoint's JSON, with a setting as another version would write it and hashes that hold."""
    head = folder / f"{name}.json"
    record = json.loads(head.read_text())
    record["meta"]["config"][key] = value
    head.write_text(json.dumps(record | {"content_sha256": checkpoint._content_sha256(record)}))
    return head


def test_a_checkpoint_of_a_newer_version_is_named(capsys, tmp_path):
    run(capsys, tmp_path / "o", steps=1)
    last, best = (with_setting(tmp_path / "o", name, "layer_drop", 0.1) for name in ("last", "best"))
    status, _, error = run(capsys, tmp_path / "o", steps=1, resume="last")
    assert status == 1 and f"{last} was written by version 0.1.0" in error and "unknown key layer_drop" in error
    assert sample.main([str(tmp_path / "o")]) == 1
    assert f"{best} was written by version 0.1.0 of this program, format 2" in capsys.readouterr().err


def test_damaged_checkpoint_is_named_and_previous_works_if_asked(capsys, tmp_path):
    _, whole, _ = run(capsys, tmp_path / "o", save_every=5)
    tensors = next(p for p in (tmp_path / "o").glob("last-*12*.safetensors"))
    damaged = bytearray(tensors.read_bytes())
    damaged[-3] ^= 1
    tensors.write_bytes(damaged)
    status, _, error = run(capsys, tmp_path / "o", save_every=5, resume="last")
    assert status == 1 and tensors.name in error and "A good checkpoint of step 12 is there as 'best'" in error
    (tmp_path / "o" / "best.json").unlink()
    status, _, error = run(capsys, tmp_path / "o", save_every=5, resume="last")
    assert status == 1 and "of step 10 is there as 'previous': to use it, give --resume previous" in error
    status, again, _ = run(capsys, tmp_path / "o", save_every=5, resume="previous")
    assert status == 0 and again["weights_sha256"] == whole["weights_sha256"]


def first_loss(out: Path) -> float:
    """The loss of the first batch, which the first weights give."""
    return metrics_of(out)[0]["loss"]


def test_a_run_may_start_from_another(capsys, tmp_path, monkeypatch):
    """More steps, other k, other bits, float weights; killed and resumed by the same command."""
    monkeypatch.chdir(tmp_path)
    run(capsys, "out/first", steps=40, save_every=100, eval_every=20)
    first, learned = first_loss(Path("out/first")), metrics_of(Path("out/first"))[-1]["loss"]
    shown = []
    for name, changes in {"on": {}, "8": {"bits": 8}, "float": {"method": "adamw", "lr": 1e-3}}.items():
        assert train.main(arguments(f"out/{name}", init_from="first", k=0.1, **changes)) == 0
        shown.append(capsys.readouterr().out)
        assert first_loss(Path("out", name)) < (first + 2 * learned) / 3
    assert "\ninit: best of step 40 in out/first\n" in shown[0]
    whole = checkpoint.load(Path("out/on"), "last")[0]["model.head.weight"]
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    again = {"init_from": "out/first/best.json", "k": 0.1}
    assert run(capsys, "out/again", **again)[0] == 128 + signal.SIGTERM
    for path in Path("out/first").iterdir():
        path.unlink()
    assert run(capsys, "out/again", **again, resume="last")[0] == 0, "the weights it began with are no longer needed"
    assert torch.equal(checkpoint.load(Path("out/again"), "last")[0]["model.head.weight"], whole)


def test_a_run_on_another_text_starts_from_the_letters_both_have(capsys, tmp_path):
    run(capsys, tmp_path / "first", steps=40, save_every=100)
    (tmp_path / "text.txt").write_text("żółw and zebra, żubr and zorilla. " * 60, encoding="utf-8")
    capsys.readouterr()
    last = tmp_path / "first" / "last.json"
    assert train.main(arguments(tmp_path / "o", data=tmp_path / "text.txt", init_from=last)) == 0
    shown = capsys.readouterr().out
    assert f"init: last of step 40 in {tmp_path / 'first'}\n" in shown
    assert "15 of 18 tokens have their rows from there; new: 'ó', 'ł', 'ż'\n" in shown


def test_a_run_that_cannot_be_started_from_is_named(capsys, tmp_path):
    run(capsys, tmp_path / "first", steps=6, save_every=3)
    start = {"init_from": tmp_path / "first"}
    status, _, error = run(capsys, tmp_path / "o", n_layer=2, **start)
    assert status == 2 and "best.json is a net of another shape: n_layer = 1 there, 2 here" in error
    status, _, error = run(capsys, tmp_path / "o", init_from=tmp_path / "nowhere")
    assert status == 2 and "nowhere is not a folder" in error
    with_setting(tmp_path / "first", "previous", "layer_drop", 0.1)
    status, _, error = run(capsys, tmp_path / "o", init_from=tmp_path / "first" / "previous.json")
    assert status == 1 and "previous.json was written by version" in error
    head = tmp_path / "first" / "best.json"
    head.write_text("{}")
    status, _, error = run(capsys, tmp_path / "o", **start)
    assert status == 1 and f"to use it, give --init_from {tmp_path / 'first'}/last.json" in error
    assert not checkpoint.exists(tmp_path / "o", "last"), "and the folder can be used"


@pytest.mark.parametrize("value, said", [(math.nan, "not finite"), (0.0, "all zeros")])
def test_a_run_does_not_start_from_what_is_broken(capsys, tmp_path, value, said):
    run(capsys, tmp_path / "first", steps=1, method="adamw")
    tensors, meta = checkpoint.load(tmp_path / "first", "best")
    tensors["model.head.weight"].fill_(value)
    checkpoint.save(tmp_path / "first", "best", tensors, meta)
    status, _, error = run(capsys, tmp_path / "o", init_from=tmp_path / "first")
    assert status == 1 and "all zeros: head.weight; use another" in error and said in error


def test_resume_without_a_run(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", resume="last")
    assert status == 1 and "contains no run" in error


def test_context_longer_than_data(capsys, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("brief " * 30, encoding="utf-8")
    status, _, error = run(capsys, tmp_path / "o", data=text, context=64)
    assert status == 2 and "context" in error and not (tmp_path / "o").exists()


def test_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    status, _, error = run(capsys, tmp_path / "file" / "o")
    assert status == 1 and "cannot be written" in error and (tmp_path / "file").read_text() == "not a folder"


def test_full_disk_keeps_earlier_checkpoints(capsys, tmp_path, monkeypatch):
    real = Metrics.write

    def full(self, record):
        if record["step"] == 7:
            self.file.close()
            self.file = open("/dev/full", "a", encoding="utf-8")
        real(self, record)

    monkeypatch.setattr(Metrics, "write", full)
    status, _, error = run(capsys, tmp_path / "o")
    assert status == 1 and "No space left" in error and "--resume" in error
    assert checkpoint.load(tmp_path / "o", "last")[1]["step"] == 4


def test_out_of_memory_is_told_plainly(capsys, tmp_path, monkeypatch):
    def exhausted(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(torch.Tensor, "backward", exhausted)
    status, _, error = run(capsys, tmp_path / "o")
    assert status == 1 and "out of memory" in error and "--batch_size" in error


def test_triton_backend_and_missing_gpu_are_errors(capsys, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        status, _, error = run(capsys, tmp_path / "o", device="cuda")
        assert status == 2 and "--device cpu" in error
    monkeypatch.setattr(backend, "problem", lambda: "torch finds no CUDA GPU here")
    status, _, error = run(capsys, tmp_path / "o", backend="triton")
    assert status == 2 and "--backend torch" in error


def bigram_loss(train_tokens: np.ndarray, val_tokens: np.ndarray, vocab: int) -> float:
    """Nats per token of an add-one bigram model fitted on `train_tokens`, on `val_tokens`."""
    counts = np.ones((vocab, vocab))
    np.add.at(counts, (train_tokens[:-1], train_tokens[1:]), 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    return -log_p[val_tokens[:-1], val_tokens[1:]].mean()


def test_learns_more_than_a_bigram_model(capsys, tmp_path):
    """A short real training, all weights integer, beats a smoothed bigram model by 0.2 nats."""
    text = load_text("stdlib", "char", 512)
    bigram = bigram_loss(np.asarray(text.train), np.asarray(text.val), text.tokenizer.vocab_size)
    assert 2.0 < bigram < 3.0 < math.log(text.tokenizer.vocab_size)
    _, result, _ = run(capsys, tmp_path / "o", n_layer=2, d_model=64, context=32, batch_size=32, steps=100,
                       ortho_tile=64, log_every=50, monitor_every=100, eval_every=100, eval_windows=100,
                       sample_tokens=0)  # fmt: skip
    assert result["val_loss"] < bigram - 0.2
