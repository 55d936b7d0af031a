"""The training program: it learns, resumes exactly, stops cleanly, and refuses what would lose something."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sample
import data.tasks as task
import train
from data import load_text
from run import checkpoint
from run.config import load
from run.errors import DIVERGED
from run.progress import Metrics
from kernels import backend, fuse

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": 12,
    "eval_every": 6, "save_every": 4, "eval_windows": 8, "sample_tokens": 8, "compile": "false", "threads": 1,
    "ortho_tile": 32, "select_tile": 32,
}  # fmt: skip
VARIANTS = {
    "gft": {},
    "gft-memory-delayed": {"memory": "int8", "delta_scale": "delayed", "grad_accum": 2},
    "adamw": {"method": "adamw"},
    "muon": {"method": "muon"},
    "ste": {"method": "ste", "bits": 2},
}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A cache and an out folder of the test's own, and the signal handlers it found."""
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(out: Path, **changes) -> list[str]:
    keys = TINY | {"out_dir": out} | changes
    return [part for key, value in keys.items() for part in (f"--{key}", str(value))]


def run(capsys, out: Path, **changes) -> tuple[int, dict, str]:
    """Exit status, final JSON (empty if there is none) and standard error of a run in this process."""
    capsys.readouterr()
    status = train.main(arguments(out, **changes))
    shown = capsys.readouterr()
    last = shown.out.strip().splitlines()[-1] if shown.out.strip() else ""
    return status, json.loads(last) if last.startswith("{") else {}, shown.err


def test_final_json_and_files(capsys, tmp_path):
    status, result, _ = run(capsys, tmp_path / "o")
    assert status == 0
    keys = """config method bits steps tokens val_loss best_val_loss seconds tokens_per_second
              flips_per_weight_per_step accuracy int_weight_bytes float_param_bytes optimizer_state_bytes scale_bytes
              peak_memory_bytes weights_sha256"""
    assert not set(keys.split()) - set(result)
    assert result["float_param_bytes"] == 0 and result["optimizer_state_bytes"] == 0
    assert result["int_weight_bytes"] == result["weights"] > 12 * 32 * 32
    assert result["scale_bytes"] == 4 * 6
    assert result["tokens"] == 12 * 4 * 16
    assert 0.15 < result["flips_per_weight_per_step"] < 0.35
    assert (tmp_path / "o" / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if "val_loss" in r] == [6, 12]
    layers = records[9]["layers"]
    assert {"embedding", "blocks.0.qkv", "head"} <= set(layers)
    assert set(records[9]["monitor"]) == {"flips", "at_limit", "zeros", "saturation", "dead_rows", "undone"}
    assert result["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=1e-4)


@pytest.mark.parametrize("method", VARIANTS)
def test_bytes_of_state(capsys, tmp_path, method):
    _, result, _ = run(capsys, tmp_path / "o", steps=2, **VARIANTS[method])
    n = result["weights"]
    if method.startswith("gft"):
        assert result["float_param_bytes"] == 0
        assert result["optimizer_state_bytes"] == (n if "memory" in method else 0)
    else:
        assert result["float_param_bytes"] == 4 * n and result["int_weight_bytes"] == 0
        assert result["optimizer_state_bytes"] >= 4 * n


@pytest.mark.parametrize("method", VARIANTS)
def test_stop_and_resume_is_exact(capsys, tmp_path, monkeypatch, method):
    _, whole, _ = run(capsys, tmp_path / "whole", **VARIANTS[method])
    real = train.take_step
    made = []

    def stopping(run, *rest):
        made.append(1)
        if len(made) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *rest)

    monkeypatch.setattr(train, "take_step", stopping)
    status, nothing, _ = run(capsys, tmp_path / "parts", **VARIANTS[method])
    assert status == 128 + signal.SIGTERM and not nothing
    status, resumed, _ = run(capsys, tmp_path / "parts", resume="last", **VARIANTS[method])
    assert status == 0 and len(made) == 12
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["val_loss"] == whole["val_loss"]
    assert resumed["flips_per_weight_per_step"] == whole["flips_per_weight_per_step"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_killed_anywhere_and_resumed(tmp_path):
    """SIGKILL at several moments, resumed each time: the weights of a run that was never killed."""
    slow = {"steps": 60, "save_every": 5, "eval_every": 15}
    whole = subprocess.run([sys.executable, "train.py", *arguments(tmp_path / "whole", **slow)], cwd=ROOT, text=True,
                           capture_output=True, check=True)  # fmt: skip
    expected = json.loads(whole.stdout.splitlines()[-1])["weights_sha256"]
    out, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    for at_step in (3, 22, 41):
        resume = {"resume": "last"} if checkpoint.exists(out, "last") else {}
        process = subprocess.Popen([sys.executable, "train.py", *arguments(out, **slow, **resume)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= at_step):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.002)
        process.kill()
        process.wait()
    done = subprocess.run([sys.executable, "train.py", *arguments(out, **slow, resume="last")], cwd=ROOT, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["weights_sha256"] == expected


def test_micro_batches_give_the_same_weights(capsys, tmp_path):
    hashes = {
        run(capsys, tmp_path / str(parts), delta_scale="delayed", memory="int8", grad_accum=parts)[1]["weights_sha256"]
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
    _, held = train.choose_folder(load([*arguments(tmp_path / "o")]))
    status, _, error = run(capsys, tmp_path / "o")
    assert status == 1 and "another run is writing" in error
    held.close()
    monkeypatch.chdir(tmp_path)
    folder, held = train.choose_folder(load(arguments("")))
    assert str(folder) == "out/custom" and run(capsys, "", steps=2)[1]["out_dir"] == "out/custom-2"
    held.close()


def test_runs_of_a_config_with_brackets_in_its_name_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my[1].toml").touch()
    held = [train.choose_folder(load(["my[1].toml"])) for _ in range(3)]
    assert [str(folder) for folder, _ in held] == ["out/my[1]", "out/my[1]-2", "out/my[1]-3"]


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
    monkeypatch.setattr(train.runtime, "processor", lambda device: "Another CPU")
    _, _, error = run(capsys, tmp_path / "o", resume="last")
    assert "going on exactly is promised on one set-up only: processor " in error and "Another CPU now" in error


def test_a_damaged_log_does_not_block_a_good_checkpoint(capsys, tmp_path):
    run(capsys, tmp_path / "o")
    for damage in (b"\xff\xfe", b"null\n", b'{"loss": 1}\n'):
        (tmp_path / "o" / "metrics.jsonl").write_bytes(damage)
        assert run(capsys, tmp_path / "o", resume="last")[0] == 0


def test_a_curve_that_cannot_be_written_costs_nothing_else(capsys, tmp_path):
    (tmp_path / "o" / "loss.png").mkdir(parents=True)
    status, result, error = run(capsys, tmp_path / "o")
    assert status == 0 and result["steps"] == 12 and "loss.png cannot be written" in error


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "text_loss", lambda logits, targets: logits.sum() * float("nan"))
    status, _, error = run(capsys, tmp_path / "o")
    assert status == DIVERGED and "the loss became nan at step 1" in error and "lower --k" in error


def test_the_command_that_samples_has_letters_the_text_has(capsys, tmp_path):
    (tmp_path / "digits.txt").write_text("\n".join(f"{n} times {n}" for n in range(900)))
    capsys.readouterr()
    assert train.main(arguments(tmp_path / "o", data=tmp_path / "digits.txt", steps=1)) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("use: "))
    *_, folder, _, prompt = shlex.split(command)
    assert folder == str(tmp_path / "o") and prompt.isdigit() and int(prompt) > 700
    assert sample.main([folder, "--prompt", prompt, "--max-tokens", "1"]) == 0


def test_a_net_too_small_for_a_scale_is_told(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", d_model=2, n_head=1, bits=2)
    assert status == 2 and "first weights are equal" in error and "--d_model" in error


def test_what_cannot_fit_is_refused_before_it_is_tried(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", d_model=32768, n_layer=1000, n_head=8)
    assert status == 1 and "GiB are free" in error and not (tmp_path / "o").exists()


def test_a_compiler_that_does_not_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse, "trial", lambda: "CppCompileError: no omp.h")
    monkeypatch.setattr(fuse, "compiler", lambda: "/usr/bin/g++")
    status, result, _ = run(capsys, tmp_path / "o", compile="auto", steps=300, eval_every=300, sample_tokens=0)
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


def test_damaged_checkpoint_is_named_and_previous_works_if_asked(capsys, tmp_path):
    _, whole, _ = run(capsys, tmp_path / "o", save_every=5)
    tensors = next(p for p in (tmp_path / "o").glob("last-*12*.safetensors"))
    damaged = bytearray(tensors.read_bytes())
    damaged[-3] ^= 1
    tensors.write_bytes(damaged)
    status, _, error = run(capsys, tmp_path / "o", save_every=5, resume="last")
    assert status == 1 and tensors.name in error and "--resume previous" in error
    status, again, _ = run(capsys, tmp_path / "o", save_every=5, resume="previous")
    assert status == 0 and again["weights_sha256"] == whole["weights_sha256"]


def test_resume_without_a_run(capsys, tmp_path):
    status, _, error = run(capsys, tmp_path / "o", resume="last")
    assert status == 1 and "holds no run" in error


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

    monkeypatch.setattr(train, "take_step", exhausted)
    status, _, error = run(capsys, tmp_path / "o")
    assert status == 1 and "out of memory" in error and "--batch_size" in error


def test_triton_backend_and_missing_gpu_are_errors(capsys, tmp_path, monkeypatch):
    import torch

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
    _, result, _ = run(capsys, tmp_path / "o", n_layer=2, d_model=96, context=48, batch_size=32, steps=150,
                       ortho_tile=96, eval_windows=100, sample_tokens=0)  # fmt: skip
    assert result["val_loss"] < bigram - 0.2
