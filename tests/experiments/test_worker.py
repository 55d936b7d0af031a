"""A worker makes run after run: each ends as in a process of its own, and one that fails does not end the next."""

import json

from experiments.sweep import Cell, Store, run_cell, run_cells
from experiments.worker import Worker

TINY = {"data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": 4,
        "eval_windows": 8, "threads": 1}  # fmt: skip
CELL = Cell("row", "shakespeare_char_small").with_(**TINY)


def same(a: dict, b: dict) -> bool:
    return (a["weights_sha256"], a["val_loss"], a["curve"]) == (b["weights_sha256"], b["val_loss"], b["curve"])


def test_a_run_ends_as_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path))
    another = {"d_model": 64, "momentum": 0.9, "seed": 2}  # before it
    cells = [CELL.with_(compile="true", **more) for more in (another, {"bits": 2})]
    worker = Worker(1)
    try:
        after = [run_cell(cell, worker) for cell in cells][-1]
    finally:
        worker.close()
    assert same(after, run_cell(cells[-1]))


def test_a_failed_run_does_not_end_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path))
    worker = Worker(1)
    try:
        code, out, err = worker.run(["no_such_config"])
        assert code == 2 and "no_such_config" in err and not out
        process = worker.process
        assert json.loads(worker.run([*CELL.with_(compile="false").arguments(), "--out_dir", str(tmp_path / "out")])[1]
                          .splitlines()[-1])["steps"] == 4  # fmt: skip
        assert worker.process is process
        process.kill()
        code, _, err = worker.run(["mnist"])
        assert code and "ended with status -9" in err
        assert worker.run(["no_such_config"])[0] == 2, "a process that died is replaced"
    finally:
        worker.close()
    assert worker.process is None


def test_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path))
    cells = [CELL.with_(compile="false", seed=seed) for seed in (1, 2, 3)]
    together = run_cells(cells, Store(tmp_path / "a.jsonl"), 2)
    apart = run_cells(cells, Store(tmp_path / "b.jsonl"), 2, apart=True)
    assert all(same(a, b) for a, b in zip(together, apart, strict=True))
    assert len({r["weights_sha256"] for r in together}) == 3
