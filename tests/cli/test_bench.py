"""bench.py: every section on a CPU, no speed for a wrong result, clear refusals."""

import json

import pytest
import torch

import bench
from experiments import steps
from run.errors import UserError

CPU = torch.device("cpu")


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_quick_run_has_every_section(monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK_STEPS", bench.QUICK_STEPS[1:])  # a process each
    assert bench.main(["--quick", "--device", "cpu", "--json"]) == 0
    result = last_line(capsys)
    assert result["sizes"] == "quick" and result["backend"] == "torch"
    assert all(value > 0 for value in result["ceilings"].values())
    names = [row["kernel"] for row in result["kernels"]]
    assert {"int8_matmul", "int8_product", "rmsnorm_quantize float32", "quantize_delta", "rmsnorm_backward", "votes",
            "contribution_flip spectral", "contribution_flip gain", "flip gain"} <= set(names)  # fmt: skip
    assert all(row["seconds"] > 0 and row["of_floor"] > 0 and row["wrong"] == "" for row in result["kernels"])
    matmul = result["kernels"][0]
    assert matmul["operations"] == 2 * 64 * 128 * 64 and matmul["bytes"] == 64 * 128 + 128 * 64 + 4 * 64 * 64
    (step,) = result["steps"]
    assert step["method"] == "GFT, no memory" and step["step_seconds"] > 0 and step["peak_memory_bytes"] > 2**20


def test_a_wrong_result_has_no_speed(monkeypatch, capsys):
    right, first = bench.int8_matmul.int8_matmul, torch.tensor([0])
    monkeypatch.setattr(bench.int8_matmul, "int8_matmul", lambda *given: right(*given).index_fill_(0, first, 0.5))
    assert bench.main(["kernels", "--quick", "--device", "cpu", "--json"]) == 1
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("int8_matmul")]
    assert "WRONG, so not timed: result 1 is not the reference's in 64 of 4,096 values" in line and " us" not in line
    rows = {row["kernel"]: row for row in json.loads(output.splitlines()[-1])["kernels"]}
    assert "seconds" not in rows["int8_matmul"] and rows["int8_product"]["seconds"] > 0


def made_up(run, reference, *inputs: torch.Tensor, allowed: float = 0.0) -> bench.Case:
    return bench.Case("made up", (1,), 0, 1, run, reference, [inputs], allowed=allowed)


def test_what_counts_as_wrong():
    x = torch.arange(100)
    assert bench.wrong(made_up(lambda t: t + 1, lambda t: t + 1, x)) == ""
    one_off = made_up(lambda t: t.index_fill(0, torch.tensor([3]), -1), lambda t: t.clone(), x)
    assert "1 of 100" in bench.wrong(one_off)
    assert bench.wrong(made_up(one_off.run, one_off.reference, x, allowed=0.01)) == ""
    assert "int64 (100,) and should be torch.int32" in bench.wrong(made_up(lambda t: t, lambda t: t.int(), x))
    assert "(2, 50)" in bench.wrong(made_up(lambda t: t.view(2, 50), lambda t: t.clone(), x))
    in_place = made_up(lambda t: t.add_(1) and None, lambda t: None, x[:1] * 1)
    assert "result 2" in bench.wrong(in_place), "what a kernel makes of its inputs counts"
    assert torch.equal(x, torch.arange(100)), "inputs are kept for the timing"


def test_inputs_outgrow_the_cache_and_take_turns():
    clock, seen = bench.Clock(CPU, 0.0), []
    clock.cache = 1000
    sets = clock.sets(lambda: (clock.int8(100), 3.0))
    assert len(sets) == 11 and not torch.equal(sets[0][0], sets[1][0])
    assert clock.median(lambda t, _: seen.append(t.data_ptr()), sets) > 0
    assert seen[2:] == [t.data_ptr() for t, _ in sets[:5]], "after two calls to warm up"


@pytest.mark.parametrize("arguments, named", [
    (["kernel"], "section 'kernel': it must be one of kernels, step, memory"),
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


def test_a_step_that_fails_has_no_number(monkeypatch, capsys):
    def run_cell(arguments):
        if "broken" in arguments:
            raise UserError("out of memory")
        time = {"step_seconds": 0.5, "tokens_per_second": 10.0}
        return time | {"peak_memory_bytes": 2**20, "environment": {"compile": False}}

    monkeypatch.setattr(steps, "run_cell", run_cell)
    three = ((steps.RIVAL, "a"), ("GFT", "b"), ("worse", "broken"))
    rows = steps.bench_steps([steps.Step("m", method, (word,)) for method, word in three], CPU)
    assert rows[2]["wrong"] == "out of memory" and "out of memory" in capsys.readouterr().err
    table = steps.step_table(rows, "step").splitlines()
    assert "1.00x its speed, not compiled" in table[2] and "FAILED" in table[3] and "x its" not in table[3]
    assert "1.00x its memory" in steps.step_table(rows, "memory").splitlines()[2]
    alone = steps.step_table(rows[1:], "step").splitlines()
    assert "its speed" not in alone[1], "without AdamW there is nothing to compare with"


def test_a_step_refuses_what_training_refuses(capsys):
    assert steps.main(["shakespeare_char_small", "--bits", "9"]) == 2
    assert "bits" in capsys.readouterr().err
