"""experiments/gpu.py: pieces that are done stay done, what is cut off goes on, and the report invents nothing."""

import json
import time
from pathlib import Path

import pytest
import torch

import bench
from data.images import load_images
from experiments import gpu, gpu_plan, gpu_report, steps
from experiments.gpu import Deadline, OutOfTime
from experiments.gpu_plan import Done, Piece, Plan, grid
from experiments.gpu_report import rows_of
from experiments.rows import Row, finals, tuning_cells

LIMITLESS = Deadline(0)


def test_a_command_is_stopped_when_time_is_over(capfd):
    assert gpu.run(("-c", "print('one'); print('two')"), None) == (0, ["one", "two"])
    assert gpu.run(("-c", "raise SystemExit(3)"), 60) == (3, [])
    begun = time.monotonic()
    with pytest.raises(OutOfTime):
        gpu.run(("-c", "import time; time.sleep(60)"), 0.2)
    assert time.monotonic() - begun < 30
    past = Deadline(1)
    past.end = time.monotonic()
    with pytest.raises(OutOfTime):
        past.left()


def test_done_pieces_stay_done_until_the_code_changes(tmp_path, monkeypatch):
    path, piece = tmp_path / "deep" / "tests.jsonl", Piece("name", ("-m", "pytest"))
    Done(path).add(piece, {"outcome": "2 passed"})
    path.write_text(path.read_text() + '{"key": "torn')
    assert Done(path).get(piece)["outcome"] == "2 passed"
    assert Done(path).get(Piece("name", ("-m", "pytest", "-x"))) is None
    monkeypatch.setattr(gpu_plan, "code", lambda: "other code")
    assert Done(path).get(piece) is None


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    cell = grid("GFT", "shakespeare_char_small", {"steps": 5, "k": 0.5}, {"steps": 5, "k": 0.3})
    rows = [Row("AdamW", "", cell), Row("GFT", "1 / 2", cell)]
    tests, one_step = "tests/run/test_schedule.py", steps.QUICK_STEPS[:1]
    return Plan(tmp_path / "gpu", tmp_path / "out", "cpu", tests, (), one_step, rows, (1, 2))


def test_a_failing_test_file_is_told_and_run_again(plan, monkeypatch, capsys):
    results = [(1, ["1 failed, 3 passed"]), (0, ["4 passed"])]
    monkeypatch.setattr(gpu, "run", lambda command, seconds: results.pop(0))
    assert gpu.run_tests(plan, LIMITLESS) == 1
    assert "test_schedule.py: FAILED, 1 failed, 3 passed" in (plan.results / "tests.txt").read_text()
    assert gpu.run_tests(plan, LIMITLESS) == 0
    assert gpu.run_tests(plan, LIMITLESS) == 0 and not results, "the third time there is nothing to run"
    assert (plan.results / "tests.txt").read_text() == "test_schedule.py: 4 passed\n"


def test_a_wrong_kernel_stays_wrong_until_the_code_changes(plan, monkeypatch):
    step = {"step_seconds": 0.5, "tokens_per_second": 8.0, "peak_memory_bytes": 2**20, "environment": {"compile": True}}
    kernel = {"kernel": "int8_matmul", "shape": [4096] * 3, "wrong": "all of it"}
    wrong, right = {"kernels": [kernel]}, {"kernels": []}
    results = [
        (1, ["votes WRONG", json.dumps(wrong)]), (1, []),
        (0, ["table", json.dumps(right)]), (0, [json.dumps(step)]),
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "run", lambda command, seconds: results.pop(0))
    assert gpu.run_bench(plan, LIMITLESS) == 1
    assert "WRONG" in (plan.results / "kernels.txt").read_text()
    assert "FAILED" in (plan.results / "steps.txt").read_text()
    assert gpu_report.targets(plan)[0][3] == "wrong result"
    monkeypatch.setattr(gpu_plan, "code", lambda: "mended")
    assert gpu.run_bench(plan, LIMITLESS) == 0
    assert gpu.run_bench(plan, LIMITLESS) == 0 and not results, "the third time there is nothing to run"
    assert (plan.results / "kernels.txt").read_text() == "table\n"
    assert "1.00x its speed" in (plan.results / "steps.txt").read_text()


def test_trainings_are_resumed_and_winners_trained(plan, monkeypatch):
    commands = []

    def run(command, seconds):
        commands.append(command)
        option = dict(zip(command[2::2], command[3::2], strict=False))
        folder = Path(option["--out_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.json").touch()
        if len(commands) == 1:
            raise OutOfTime
        loss = float(option["--k"]) + 0.01 * int(option["--seed"])
        return 0, ["text", json.dumps({"val_loss": loss, "eval_on": option["--eval_on"], "bits": 6, "seconds": 9.0,
                                       "tokens_per_second": 100.0, "out_dir": str(folder)})]  # fmt: skip

    monkeypatch.setattr(gpu, "run", run)
    with pytest.raises(OutOfTime):
        gpu.run_train(plan, LIMITLESS)
    assert gpu.run_train(plan, LIMITLESS) == 0
    assert "--resume" not in commands[0] and commands[1] == (*commands[0], "--resume")
    assert not any("--resume" in command for command in commands[2:]) and not list(plan.out.iterdir())
    # Both rows have the same cells: two to tune, then the winner, k = 0.3, once for each seed.
    assert len(commands) == 1 + 2 + 2
    assert gpu.run_train(plan, LIMITLESS) == 0 and len(commands) == 5
    assert "0.3150 ± 0.0071 (2 seeds)" in (plan.results / "train.txt").read_text()


def test_a_training_that_fails_says_so(plan, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda command, seconds: (1, []))
    with pytest.raises(gpu.UserError, match="train.py shakespeare_char_small .* ended with status 1"):
        gpu.run_train(plan, LIMITLESS)


def test_a_training_that_diverged_is_a_result(plan, monkeypatch):
    def run(command, seconds):
        option = dict(zip(command[2::2], command[3::2], strict=False))
        Path(option["--out_dir"]).mkdir(parents=True)
        done = {"val_loss": 1.5, "eval_on": option["--eval_on"], "bits": 6, "seconds": 9.0, "tokens_per_second": 1.0}
        return (gpu.DIVERGED, []) if option["--k"] == "0.5" else (0, [json.dumps(done)])

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.run_train(plan, LIMITLESS) == 0 and not list(plan.out.iterdir())
    text = (plan.results / "train.txt").read_text()
    assert "| k 0.3, steps 5 | 1.5000 ± 0.0000 (2 seeds)" in text and "| k 0.5, steps 5 | inf |" in text


def test_images_for_the_rehearsal_are_enough(tmp_path):
    gpu.few_images(tmp_path / gpu.FILE.path)
    images = load_images("imagenette", 32, str(tmp_path), "tune")
    assert images.train.shape == (90, 32, 32, 3) and images.val.shape == (10, 32, 32, 3)


def test_the_report_invents_nothing(tmp_path):
    text = gpu_report.section(Plan(tmp_path))
    rows = [line for line in text if line.startswith("| ") and "must" not in line]
    assert len(rows) == 17 and all(line.endswith("| not measured |") for line in rows)
    assert "`make gpu` (Not measured yet)" in text


def test_the_report_compares_as_the_table_says(tmp_path):
    plan = Plan(tmp_path)
    kernels = [
        {"kernel": "int8_matmul", "shape": [4096] * 3, "wrong": "", "seconds": 2.0,
         "usual_seconds": {"torch._int_mm": 1.8}},
        {"kernel": "contribution_flip spectral", "shape": list(bench.FULL.learn), "wrong": "", "seconds": 3.0,
         "usual_seconds": {"torch._int_mm": 2.0, "bf16 weight gradient, fused AdamW": 9.0}},
    ]  # fmt: skip
    machine = bench.place(torch.device("cpu")) | {"device": "a GPU"}
    done = plan.done("bench")
    done.add(Piece("kernels", ("a",)), {"kernels": kernels, "machine": machine})
    for method, speed, memory in ((steps.RIVAL, 100.0, 8), ("GFT, no memory", 150.0, 2)):
        done.add(Piece(f"{steps.GPT2}: {method}", ("a", method)), {
            "model": steps.GPT2, "method": method, "tokens_per_second": speed, "peak_memory_bytes": memory,
            "machine": machine,
        })  # fmt: skip
    text = "\n".join(gpu_report.section(plan))
    assert "a GPU, torch" in text
    assert "| int8_matmul at 4096 x 4096 x 4096, against torch._int_mm | 0.85x its speed | 1.0x | 0.90x |" in text
    assert "| at most 2x its time | 1.2x | 1.50x |" in text and "| 2x its speed | 4x | 3.00x |" in text
    assert "| 1.3x | 2x | 1.50x |" in text and "| 0.5x | 0.25x | 0.25x |" in text
    assert text.count("not measured |") == 12


def test_trainings_on_images_are_compared_by_accuracy(tmp_path):
    plan = Plan(tmp_path)
    store = plan.trainings()
    for n, row in enumerate(rows_of(plan, "imagenette")):
        result = {"val_loss": 1.0, "accuracy": 0.7 + 0.01 * n, "bits": 6, "tokens_per_second": 1.0, "seconds": 2.0}
        for cell in tuning_cells(row):
            assert cell.resolved().steps == 1480
            store.add(cell, result | {"eval_on": "tune"})
        for cell in finals(row, store, plan.seeds):
            assert cell.resolved().steps == 5920
            store.add(cell, result | {"eval_on": "val"})
    text = "\n".join(gpu_report.section(plan))
    assert ("ViT, GFT, int8 memory | 1 point less than AdamW, 70.00 ± 0.00 % (3 seeds) | 77.1 %, then 85 % | "
            "72.00 ± 0.00 % (3 seeds) |") in text


def test_without_a_gpu_it_points_to_the_rehearsal(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["bench"]) == 1
    assert "make gpu-rehearsal" in capsys.readouterr().err
