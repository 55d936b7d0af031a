"""bench.py: every section on a CPU, no speed for a wrong result, one failing case does not stop the others."""

import json

import pytest
import torch

import bench
from experiments import kernel_times, startup


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_quick_run_has_kernels_and_steps(monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK_STEPS", bench.QUICK_STEPS[1:])  # a process each
    assert bench.main(["--quick", "--device", "cpu", "--json"]) == 0
    result = last_line(capsys)
    assert result["sizes"] == "quick" and result["backend"] == "torch"
    assert all(value > 0 for value in result["ceilings"].values())
    names = [row["kernel"] for row in result["kernels"]]
    assert {"int8_matmul", "int8_product", "rmsnorm_quantize float32", "measure_delta", "quantize_delta",
            "rmsnorm_backward", "accumulate_votes",
            "learn gain", "learn spectral", "flip gain", "flip spectral"} <= set(names)  # fmt: skip
    assert all(row["seconds"] > 0 and row["of_floor"] > 0 and row["wrong"] == "" for row in result["kernels"])
    matmul = result["kernels"][0]
    assert matmul["operations"] == 2 * 64 * 128 * 64 and matmul["bytes"] == 64 * 128 + 128 * 64 + 4 * 64 * 64
    (step,) = result["steps"]
    assert step["method"] == "GFT, no momentum" and step["step_seconds"] > 0 and step["peak_memory_bytes"] > 2**20
    assert step["int_weight_bytes"] == step["weights"] and step["votes_bytes"] == 4 * step["weights"]
    assert step["float_param_bytes"] == step["optimizer_state_bytes"] == 0


def test_a_wrong_or_failing_kernel_has_no_speed(monkeypatch, capsys):
    first, real = torch.tensor([0]), bench.backend.use

    def use(name: str) -> None:  # the reference is what runs after this
        real(name)
        spoiled.append(name)

    def product(*given: torch.Tensor) -> torch.Tensor:
        result = right(*given)
        return result if spoiled else result.index_fill_(0, first, 0.5)

    def failing(*given: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nimage")

    spoiled, right = [], kernel_times.int8_matmul
    monkeypatch.setattr(bench.backend, "use", use)
    monkeypatch.setattr(kernel_times, "int8_matmul", product)
    monkeypatch.setattr(kernel_times, "measure_delta", failing)
    assert bench.main(["kernels", "--quick", "--device", "cpu", "--json"]) == 1
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("int8_matmul")]
    assert "WRONG, so not timed: result 1 differs from the torch backend's in 64 of 4,096 values" in line
    assert " us" not in line
    rows = {row["kernel"]: row for row in json.loads(output.splitlines()[-1])["kernels"]}
    assert "seconds" not in rows["int8_matmul"] and rows["measure_delta"]["wrong"] == "RuntimeError: no kernel image"
    assert rows["int8_product"]["seconds"] > 0 and rows["flip spectral"]["seconds"] > 0


def test_inputs_that_cannot_be_made_are_told_too(monkeypatch, capsys):
    def cases(timer: kernel_times.Timer, sizes: kernel_times.Sizes) -> list[kernel_times.Case]:
        return [kernel_times.Case("large", (1,), 0, 1, lambda: (torch.empty(2**60),), lambda t: t),
                kernel_times.Case("small", (1,), 0, 1, lambda: (torch.ones(3),), lambda t: t + 1)]  # fmt: skip

    monkeypatch.setattr(kernel_times, "all_cases", cases)
    assert bench.main(["kernels", "--quick", "--device", "cpu", "--json"]) == 1
    large, small = last_line(capsys)["kernels"]
    assert large["wrong"].startswith("RuntimeError") and small["wrong"] == ""


def test_start_up_and_start_to_end(tmp_path, monkeypatch, capsys):
    ran = []
    final = '{"val_loss": 1.9, "seconds": 3.0}'

    def run(arguments, expected=0, **environment):
        ran.append((arguments, expected, environment))
        return 2.0, f"text\n{final}\n"

    monkeypatch.setattr(startup, "timed_command", run)
    assert bench.main(["startup", "start-to-end", "--device", "cpu", "--json"]) == 0
    result = last_line(capsys)
    assert set(result["startup"].values()) == {2.0} and len(result["startup"]) == 4
    assert result["start_to_end"] == {"seconds": 2.0, "training_seconds": 3.0, "val_loss": 1.9}
    arguments, _, caches = ran[-1]
    words = ("shakespeare_char_small", "--momentum", "0.9", "--k", "0.5", "--steps", "160", "--batch_size", "24")
    assert arguments[1:10] == words and set(caches) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert len(ran) == 13 and [e for _, e, _ in ran[3:9]] == [2] * 6, "mistakes end with status 2"


def test_a_command_that_fails_loses_nothing(monkeypatch, capsys):
    def run(arguments, expected=0, **environment):
        raise RuntimeError("train.py ended with status 1: words")

    monkeypatch.setattr(startup, "timed_command", run)
    monkeypatch.setattr(bench, "bench_kernels", lambda *_: {"ceilings": {"a": 1.0}, "kernels": []})
    assert bench.main(["kernels", "startup", "--device", "cpu", "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["ceilings"] == {"a": 1.0}
    assert "startup: train.py ended with status 1: words" in output.err


def test_quick_startup_runs_train(capsys):
    assert bench.main(["startup", "--quick", "--device", "cpu", "--json"]) == 0
    assert all(0 < seconds < 120 for seconds in last_line(capsys)["startup"].values())


@pytest.mark.parametrize("arguments, named", [
    (["kernel"], "section 'kernel': it must be one of kernels, step, startup, start-to-end"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--fast"], "unrecognized arguments: --fast"),
])  # fmt: skip
def test_arguments_it_does_not_know(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2 and named in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        bench.main(["--device", "cuda"])
    assert exit.value.code == 2 and "use --device cpu" in capsys.readouterr().err
