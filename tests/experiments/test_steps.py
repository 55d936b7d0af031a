"""experiments.steps: what is said of a step, and of one that cannot be made."""

import torch

from experiments import steps
from run.errors import UserError

CPU = torch.device("cpu")


def test_a_step_that_fails_has_no_number(monkeypatch, capsys):
    def run_cell(arguments):
        if "broken" in arguments:
            raise UserError("out of memory")
        time = {"step_seconds": 0.5, "tokens_per_second": 10.0}
        return time | {"peak_memory_bytes": 2**20, "environment": {"compile": False}}

    monkeypatch.setattr(steps, "run_cell", run_cell)
    three = ((steps.BASELINE, "a"), ("GFT", "b"), ("worse", "broken"))
    rows = steps.bench_steps([steps.Step("m", method, (word,)) for method, word in three], CPU)
    assert rows[2]["wrong"] == "out of memory" and "out of memory" in capsys.readouterr().err
    table = steps.step_table(rows).splitlines()
    assert "1.00x its speed, 1.00x its memory, not compiled" in table[2]
    assert "FAILED" in table[3] and "x its" not in table[3]
    alone = steps.step_table(rows[1:]).splitlines()
    assert "its speed" not in alone[1], "without AdamW there is nothing to compare with"


def test_a_step_refuses_what_training_refuses(capsys):
    assert steps.main(["shakespeare_char_small", "--bits", "9"]) == 2
    assert "bits" in capsys.readouterr().err


def test_a_peak_of_memory_is_that_of_the_steps_alone(monkeypatch):
    done = []
    cfg = steps.load(["shakespeare_char_small", *steps.TINY])
    task = steps.RandomText(cfg, {3: lambda: done.append("reset")})
    for step in range(5):
        task.prepare(step, CPU)
        x, y = task.batch_at(torch.tensor([1, step]))
        assert x.shape == y.shape == (4, 16) and x.max() < 65
    assert done == ["reset"]
