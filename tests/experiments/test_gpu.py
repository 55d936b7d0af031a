"""experiments/gpu.py: no piece stops another one, all output is kept as it comes, and the report invents nothing."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import gpu, steps
from experiments.gpu import Piece, last_json, parts, run, run_part, section
from run.config import load

FINE = Piece("fine", ("-c", "print('text'); print('{\"val_loss\": 1.5}')"), 60)
FAILING = Piece("failing", ("-c", "import sys; print('words', file=sys.stderr); sys.exit(3)"), 60)
ENDLESS = Piece("endless", ("-c", "import time; print('begun'); time.sleep(60)"), 3)
DEAF = Piece("deaf", ("-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"), 3)


def test_no_piece_stops_another_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "GRACE", 5)  # a busy machine needs seconds to end on Ctrl-C
    missing = Piece("missing", ("-c", "\0"), 60)  # cannot even be started
    pieces = [FAILING, ENDLESS, DEAF, missing, FINE]
    assert run_part("A", pieces, tmp_path / "deep" / "out", 100) == 1
    records = [json.loads(line) for line in (tmp_path / "deep" / "out" / "A.jsonl").read_text().splitlines()]
    assert [r["piece"] for r in records] == [p.name for p in pieces]
    statuses = [r["status"] for r in records]
    assert statuses[0] == 3 and statuses[2] == -signal.SIGKILL and statuses[4] == 0
    assert statuses[1] in (1, -signal.SIGINT) and statuses[3].startswith("ValueError")
    assert records[4]["result"] == {"val_loss": 1.5} and records[1]["last"] and records[0]["result"] is None
    log = (tmp_path / "deep" / "out" / "A.txt").read_text()
    assert "words" in log and "begun" in log and "== fine: -c" in log


def test_what_time_does_not_allow_is_skipped_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0)
    assert run_part("B", [FINE], tmp_path, 0) == 1
    assert json.loads((tmp_path / "B.jsonl").read_text())["status"] == "skipped"
    assert run_part("B", [FINE], tmp_path, 60) == 0, "a later call adds to what is there"
    assert len((tmp_path / "B.jsonl").read_text().splitlines()) == 2
    assert gpu.read(tmp_path)["fine"]["result"] == {"val_loss": 1.5}


def test_output_is_kept_as_it_comes(tmp_path):
    seen = []

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            seen.append((time.monotonic(), text))
            return len(text)

    slow = Piece("slow", ("-c", "import time; print('one'); time.sleep(1.5); print('two')"), 60)
    assert run(slow, 60, Log()) == (0, ["one", "two"])
    assert seen[1][0] - seen[0][0] > 1


def test_what_a_piece_started_ends_with_it(tmp_path):
    start = (f"import subprocess; print(subprocess.Popen(['{sys.executable}', '-c', 'import time; time.sleep(60)'], "
             "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)")  # fmt: skip
    status, (child,) = run(Piece("parent", ("-c", start), 60), 60, io.StringIO())
    assert status == 0

    def alive() -> bool:
        state = Path(f"/proc/{child}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    end = time.monotonic() + 20
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive()


def test_last_json():
    assert last_json(["{}", '{"a": 1}', "text", '{"torn": ']) == {"a": 1} and last_json(["text"]) is None


@pytest.mark.parametrize("rehearse", [False, True], ids=["full", "rehearsal"])
def test_every_command_is_one_that_train_and_bench_accept(rehearse):
    pieces = [piece for part in parts(rehearse).values() for piece in part]
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names) and {"versions", "tests", "kernels", "profile"} <= set(names)
    for piece in pieces:
        words = [word for word in piece.command if word not in ("-m", "experiments.steps", "--profile", "train.py")]
        if piece.command[0] == "train.py" or "experiments.steps" in piece.command:
            cfg = load(words, notes=False)
            assert cfg.d_model == 32 if rehearse else cfg.d_model > 128
        else:
            assert all((gpu.ROOT / word).exists() for word in words if "/" in word or word.endswith(".py"))


def test_the_rehearsal_of_part_a(tmp_path, monkeypatch, capfd):
    chosen = [p for p in parts(rehearse=True)["A"] if p.name in ("versions", "tests", "step, 10.7 M: GFT, momentum")]
    assert len(chosen) == 3
    monkeypatch.setattr(gpu, "parts", lambda rehearse: {"A": chosen})
    assert gpu.main(["A", "--rehearse", "--out", str(tmp_path), "--seconds", "200"]) == 0, capfd.readouterr().out
    found = gpu.read(tmp_path)
    assert "passed" in found["tests"]["last"] and found["versions"]["result"]["backend"] == "torch"
    assert found["step, 10.7 M: GFT, momentum"]["result"]["step_seconds"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"A.txt", "A.jsonl"}
    text = "\n".join(section(tmp_path))
    assert "`make gpu` (CPU, " in text and "passed" in text and "| a step, 10.7 M, GFT, momentum | " in text


def test_pieces_of_a_can_be_run_again_in_b(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "run_part", lambda part, pieces, out, seconds: ran.append([p.name for p in pieces]) or 0)
    assert gpu.main(["B", "--again", "kernels", "tests", "--out", str(tmp_path)]) == 0
    assert ran[0][:2] == ["tests", "kernels"] and "training: AdamW" in ran[0]
    with pytest.raises(SystemExit):
        gpu.main(["B", "--again", "kernel"])
    assert "part A has versions, tests, kernels" in capsys.readouterr().err


def test_the_report_invents_nothing(tmp_path):
    text = section(tmp_path)
    rows = [line for line in text if line.startswith("| ") and "| measured |" not in line]
    assert len(rows) == 19 and all(line.endswith("| not measured |") for line in rows)
    assert "`make gpu` (not measured yet)" in text


def test_the_report_compares_with_adamw(tmp_path):
    def add(part: str, piece: str, status=0, last="", **result) -> None:
        record = {"piece": piece, "status": status, "last": last, "result": result or None}
        with (tmp_path / f"{part}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    add("A", "tests", status=1, last="1 failed, 9 passed")
    add("A", "versions", device="a GPU", torch="2", triton="3")
    add("A", "kernels", status=1, kernels=[
        {"kernel": "int8_matmul", "shape": [4096] * 3, "wrong": "", "seconds": 2e-6, "of_floor": 0.5,
         "usual_seconds": {"torch._int_mm": 1.8e-6}},
        {"kernel": "absmax", "shape": [9], "wrong": "all of it"},
    ])  # fmt: skip
    for name, speed, memory in (("AdamW", 100.0, 8 * 2**20), ("GFT, momentum", 150.0, 2 * 2**20)):
        add("B", f"step, GPT-2 small: {name}", step_seconds=0.01, tokens_per_second=speed, peak_memory_bytes=memory,
            joules_per_step=3.5 if name == "AdamW" else None)  # fmt: skip
    add("B", "same weights: triton", weights_sha256="a")
    add("B", "same weights: torch", weights_sha256="b")
    add("B", "training: AdamW", status=3, last="error: the loss became inf")
    add("B", "training: GFT, momentum", val_loss=1.5, steps=250, seconds=9.0, energy_measured_joules=800.0)
    add("B", "training: GFT, momentum", status=-9)
    with (tmp_path / "B.jsonl").open("a") as file:
        file.write('{"piece": "torn by a ki\n')
    add("C", "images: AdamW", accuracy=0.75, steps=5920, seconds=90.0, energy_measured_joules=None)
    text = "\n".join(section(tmp_path))
    assert "`make gpu` (a GPU, torch 2, triton 3)" in text
    assert "| int8_matmul, 4096 x 4096 x 4096 | 2.0 us, 0.50 of the floor, 0.90x the speed of torch._int_mm |" in text
    assert "| kernel tests | 1 failed, 9 passed |" in text
    assert "| absmax, 9 | wrong |" in text and "same weights on both backends | no |" in text
    assert ("| a step, GPT-2 small, GFT, momentum | 10.00 ms, 150 tokens/s, 2 MiB (1.50x the speed, 0.25x the memory "
            "of AdamW) |") in text
    assert "| a step, GPT-2 small, AdamW | 10.00 ms, 100 tokens/s, 8 MiB, 3.50 J (1.00x" in text
    assert "loss, GFT, momentum | 1.5000 after 250 steps, 9 s, 800 J |" in text
    assert "loss, AdamW | not measured |" in text and "accuracy, AdamW | 0.7500 after 5,920 steps, 90 s |" in text


def test_the_profile_shows_where_time_goes(capsys):
    assert steps.main(["--profile", "shakespeare_char_small", *steps.TINY, "--compile", "false"]) == 0
    assert "aten::" in capsys.readouterr().out


def test_failures_of_parallel_tests_are_named_when_they_happen(tmp_path):
    """So that a run that is cut off has them."""
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert 1 == 2\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "tests.conftest", "--no-summary", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    assert "FAILED" in ran.stdout and "test_it.py::test_it (call)" in ran.stdout and "assert 1 == 2" in ran.stdout
