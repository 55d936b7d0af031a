"""Sweeps: a finished cell is never run again, winners are chosen on the held-out part, tables say what was run."""

import json

import pytest

from experiments import __main__ as program
from experiments import small, speed, sweep
from experiments.sweep import Cell, Store, best_of, run_cell, run_cells, spread
from run.errors import UserError

TINY = {"data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": 4,
        "eval_windows": 8, "compile": "false", "threads": 1}  # fmt: skip
CELL = Cell("row", "shakespeare_char_small").with_(**TINY)


@pytest.fixture
def made_up(monkeypatch):
    """Runs that take no time: the loss is k, or lr, with a little for the seed."""
    ran = []

    def run(cell, worker=None):
        cfg = cell.resolved()
        ran.append(cell)
        value = cfg.k if cfg.method == "gft" else cfg.lr
        return {
            "val_loss": value + 0.01 * cfg.seed, "eval_on": cfg.eval_on, "method": cfg.method, "bits": cfg.bits,
            "seed": cfg.seed,
            "flips_per_weight_per_step": cfg.k / 2, "float_param_bytes": 0, "optimizer_state_bytes": 0,
            "int_weight_bytes": 1000, "weights": 1000, "steps": cfg.steps, "curve": [[cfg.steps, value]],
            "step_seconds": 0.1 if cfg.compile == "true" else 0.2, "peak_memory_bytes": 2**20,
            "environment": {"compile": cfg.compile == "true", "torch": "t", "device": "cpu", "threads": 1,
                            **({"processor": f"Processor {cfg.seed}"} if cfg.seed > 1 else {})},
            "out_dir": "x",
        }  # fmt: skip

    monkeypatch.setattr(sweep, "run_cell", run)
    return ran


def test_finished_cells_are_not_run_again(tmp_path, made_up):
    path = tmp_path / "results" / "some.jsonl"
    cells = [CELL.with_(k=k) for k in (0.3, 0.1, 0.2)]
    first = run_cells(cells[:2], Store(path), 2)
    again = run_cells([*cells, cells[0]], Store(path), 2)
    assert len(made_up) == 3 and again[:2] == first and again[3] == first[0]
    assert [r["val_loss"] for r in again] == [pytest.approx(k + 0.01) for k in (0.3, 0.1, 0.2, 0.3)]
    assert best_of(cells, Store(path)) == cells[1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3 and all("out_dir" not in line and line["arguments"] for line in lines)


def test_a_result_names_the_code_that_was_there_when_the_sweep_began(tmp_path, made_up, monkeypatch):
    monkeypatch.setattr(sweep, "commit", lambda: "old")
    store = Store(tmp_path / "r.jsonl")
    monkeypatch.setattr(sweep, "commit", lambda: "new")
    run_cells([CELL], store, 1)
    assert store.get(CELL)["commit"] == "old"


def test_of_equal_accuracies_the_lower_loss_wins(tmp_path):
    store, cells = Store(tmp_path / "r.jsonl"), [CELL.with_(k=k) for k in (0.1, 0.2, 0.3)]
    for cell, accuracy, loss in zip(cells, (0.9, 0.9, 0.8), (0.4, 0.3, 0.1), strict=True):
        store.add(cell, {"accuracy": accuracy, "val_loss": loss})
    assert best_of(cells, store) == cells[1]


def test_a_key_is_every_setting_that_counts():
    keys = {CELL.key(), CELL.with_(k=0.4).key(), CELL.with_(seed=2).key(), CELL.with_(eval_on="tune").key()}
    assert len(keys) == 4
    assert CELL.with_(sample_tokens=5).key() == CELL.key() == CELL.with_(k=0.5).key(), (
        "a default said aloud is the same run"
    )
    assert CELL.with_(lr=0.5).key() == CELL.key() != CELL.with_(method="adamw").key(), (
        "what has no effect does not count"
    )


def test_a_key_has_the_data_and_what_runs_it():
    """A resumed run may change them, a cell's results may not be taken for another's."""
    settings = Cell("", "mnist", (("threads", "1"), ("compile", "true"))).settings()
    assert (settings["data"], settings["threads"], settings["compile"]) == ("mnist", 1, "true")


def test_kinds_of_layers_are_a_set_in_a_key():
    def keys(*kinds):
        return {CELL.with_(int_layers=k).key() for k in kinds}

    assert len(keys("attention,mlp", "mlp,attention", "mlp,attention,patch")) == 1
    assert keys("all", "embedding,attention,mlp,head") == {CELL.key()} and len(keys("all", "mlp")) == 2


def test_what_was_run_before_a_config_or_a_text_was_edited_is_not_taken_for_the_new_one(tmp_path, made_up):
    config, text, store = tmp_path / "mine.toml", tmp_path / "text.txt", tmp_path / "r.jsonl"
    config.write_text("k = 0.3"), text.write_text("one text")
    run_cells([Cell("row", str(config)).with_(data=text)], Store(store), 1)
    run_cells([Cell("row", str(config)).with_(data=text)], Store(store), 1)
    assert len(made_up) == 1
    # What a cell means is asked for once in a process, so the edited files are other cells' here.
    config.write_text("k = 0.2")
    run_cells([Cell("edited", str(config)).with_(data=text)], Store(store), 1)
    text.write_text("another text")
    run_cells([Cell("edited again", str(config)).with_(data=text)], Store(store), 1)
    assert len(made_up) == 3 and len(Store(store).done) == 3
    config.unlink()
    assert len(Store(store).done) == 3, "results outlive their config"


def test_a_real_cell_and_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path))
    result = run_cell(CELL)
    assert result["steps"] == 4 and result["val_loss"] > 1 and len(result["weights_sha256"]) == 64
    with pytest.raises(UserError, match="(?s)failed:.*neither a known data set"):
        run_cell(CELL.with_(data=str(tmp_path / "missing.txt")))


def test_small_tunes_on_the_held_out_part_and_reports_on_the_other(tmp_path, made_up):
    store = Store(tmp_path / "small.jsonl")
    small.run(store, 2, False)
    tuned = [c for c in made_up if c.resolved().eval_on == "tune"]
    finals = [c for c in made_up if c.resolved().eval_on == "val"]
    assert len(tuned) == sum(len(row.cells) for row in small.ROWS)
    seeds = {row.name: {c.resolved().seed for c in finals if c.label == row.name} for row in small.ROWS}
    assert all(of == {1, 2, 3} | ({4, 5} if name in small.CLOSE else set()) for name, of in seeds.items())
    assert set(small.CLOSE) <= set(seeds) and len(finals) == 3 * len(small.ROWS) + 2 * len(small.CLOSE)
    row = next(r for r in small.ROWS if r.name == "GFT, 4 bits")
    winners = {c.resolved().k for c in finals if c.label == row.name}
    assert winners == {min(c.resolved().k for c in row.cells)}
    text = small.table(store)
    assert text.count("\n") == len(small.ROWS) + 1 and "| 5 | +0.0000 |" in text
    assert small.tuning_table(store).count("\n") == 1 + len(tuned)


def test_updates_until_adamws_loss():
    run = {"steps": 100, "curve": [[50, 1.5], [100, 1.2]], "val_loss": 1.2, "method": "adamw",
           "flips_per_weight_per_step": 1.0}  # fmt: skip
    assert [small.updates_until([run], goal) for goal in (1.5, 1.2, 1.1)] == ["50", "100", ""]
    gft = run | {"method": "gft", "flips_per_weight_per_step": 0.4}
    assert [small.updates_until([gft], goal) for goal in (1.5, 1.2)] == ["30", "40"], "most moves come first"


def test_speed_takes_each_method_at_its_fastest(tmp_path, made_up):
    store = Store(tmp_path / "speed.jsonl")
    speed.run(store, 2, False)
    assert {c.resolved().threads for c in made_up} == {0}, "as many as torch takes"
    text = speed.table(store)
    assert "| AdamW, fp32 | 100.0 | 200.0 | 1.00x | 1 |" in text and text.count("\n") == 1 + len(speed.METHODS)


def test_report_is_drawn_from_the_store(tmp_path, made_up, monkeypatch, capsys):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    assert program.main(["speed"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "python -m experiments speed" in text and "100.0" in text and "not measured" in text
    assert "(torch t, Processor 2 and Processor 3, 1 thread(s) a run" in text, "of runs that say where they were made"
    made_up.clear()
    assert program.main(["speed"]) == 0 and not made_up
    assert program.main(["small", "--quick", "--jobs", "1"]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == text, "a quick run leaves the report alone"


def test_spread():
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and spread([1.5], 1) == "1.5"
