"""The sweep tool: every combination once, resumed where it stopped, as a table and a plot."""

import json

import pytest

from experiments import __main__ as program
from experiments import grid, sweep
from run.config import Config
from run.errors import UserError

CONFIG = "shakespeare_char_small"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Runs that take no time: the loss is k plus a hundredth of the bits and a thousandth of the seed."""
    made = []

    def run(cell, worker=None):
        cfg = cell.resolved()
        made.append(cfg)
        loss = cfg.k + 0.01 * cfg.bits + 0.001 * cfg.seed
        return {"val_loss": loss, "accuracy": 1 - loss if cfg.data == "mnist" else None, "seconds": 7.0,
                "flips_per_weight_per_step": cfg.k / 2}  # fmt: skip

    monkeypatch.setattr(sweep, "run_cell", run)
    monkeypatch.setattr(sweep, "commit", lambda: "abc")
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "sweeps")
    return made


def test_every_combination_and_seed_is_run_once_and_shown(ran, tmp_path, capsys):
    argv = ["sweep", CONFIG, "--k", "0.3,0.1", "--bits=4,6", "--seeds", "1,2,3", "--steps", "20", "--jobs", "1"]
    assert program.main(argv) == 0
    assert len(ran) == 12 and {(c.k, c.bits, c.seed) for c in ran} == {
        (k, b, s) for k in (0.3, 0.1) for b in (4, 6) for s in (1, 2, 3)
    }
    assert all(c.steps == 20 and c.threads == 1 for c in ran)
    assert [c.seed for c in ran] == sorted(c.seed for c in ran), "all with one seed before the next"
    text = capsys.readouterr().out
    assert "| k | bits | val loss, last step | seeds |" in text
    assert "| 0.1 | 4 | **0.1420 ± 0.0010** | 3 | 0.0500 | 7 |" in text and "| 0.3 | 6 | 0.3620 ± 0.0010 | 3 |" in text
    assert (tmp_path / "sweeps" / f"{CONFIG}-k-bits.png").read_bytes().startswith(b"\x89PNG")
    assert not program.main([*argv[:-2], "--bits", "4,6,8", "--out", str(tmp_path / "a" / "b.png")])
    assert len(ran) == 18 and {c.bits for c in ran[12:]} == {8}, "what is finished is not run again"
    assert (tmp_path / "a" / "b.png").exists()


def test_a_sweep_that_was_cut_off_goes_on(ran, tmp_path, monkeypatch):
    working, argv = sweep.run_cell, [CONFIG, "--k", "0.1,0.2,0.3,0.4", "--jobs", "1"]

    def cut(cell, worker=None):
        if len(ran) == 2:
            raise KeyboardInterrupt
        return working(cell)

    monkeypatch.setattr(sweep, "run_cell", cut)
    assert program.main(["sweep", *argv]) == 130
    store = tmp_path / "sweeps" / f"{CONFIG}.jsonl"
    assert len(store.read_text().splitlines()) == 2
    with store.open("a") as file:
        file.write('{"label": "torn by a ki')
    monkeypatch.setattr(sweep, "run_cell", working)
    assert program.main(["sweep", *argv]) == 0
    assert [c.k for c in ran] == [0.1, 0.2, 0.3, 0.4]
    lines = store.read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[-1])["arguments"][0] == CONFIG


def test_images_are_judged_by_accuracy_and_one_point_is_a_table_too(ran, capsys):
    assert grid.main(["mnist", "--k", "0.2", "--bits", "4"]) == 0
    out = capsys.readouterr().out
    assert "| accuracy, last step | seeds |" in out and "| 75.90 % | 1 |" in out


def test_values_with_commas_stand_between_semicolons(ran):
    found, _ = grid.parse([CONFIG, "--int_layers", "all;attention,mlp;mlp"])
    assert [cells[0].resolved().int_layers for _, cells in found.points()] == ["all", "attention,mlp", "mlp"]


def test_a_value_spelled_twice_is_one(ran, tmp_path):
    assert grid.main([CONFIG, "--k", "0.1,0.10,0.2", "--seeds", "1,01", "--out", str(tmp_path / "x.png")]) == 0
    assert [c.k for c in ran] == [0.1, 0.2]


def test_a_plot_has_a_line_for_each_combination_of_the_other_keys(ran, tmp_path, capsys):
    wanted = grid.Sweep(CONFIG, {"k": ("0.1", "0.2"), "bits": ("4", "6"), "rule": ("gain", "spectral")})
    store = sweep.Store(tmp_path / "r.jsonl")
    sweep.run_cells([cells[0] for _, cells in wanted.points()], store, 1)
    plot = grid.panel(wanted, store)
    assert plot.x == "k" and list(plot.lines) == [
        "bits 4, rule gain", "bits 4, rule spectral", "bits 6, rule gain", "bits 6, rule spectral"]  # fmt: skip
    assert plot.lines["bits 6, rule gain"] == [("0.1", [pytest.approx(0.161)]), ("0.2", [pytest.approx(0.261)])]


WRONG = {
    "no config": ("--k 0.1,0.2", "name one config"),
    "unknown key": ("mnist --kk 0.1", "unknown key kk; did you mean k"),
    "seed": ("mnist --seed 1,2", "--seeds 1,2,3"),
    "out_dir": ("mnist --out_dir x", "--out is the plot"),
    "jobs": ("mnist --jobs 0", "--jobs 0: must be a whole number from 1"),
    "empty value": ("mnist --k 0.1,", "--k 0.1,: an empty value"),
    "bad value": ("mnist --bits 4,9", "must be a whole number from 1 to 8"),
    "bad seed": ("mnist --seeds one", "--seeds one: must be a whole number"),
    "flag": ("mnist --print-config", "train.py prints a config"),
}


@pytest.mark.parametrize(("line", "says"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_before_anything_runs(line, says, ran):
    with pytest.raises(UserError, match=says):
        grid.main(line.split())
    assert not ran


def test_a_plot_that_cannot_be_written_is_an_error_that_names_it(ran, tmp_path, capsys):
    assert program.main(["sweep", CONFIG, "--k", "0.1", "--out", str(tmp_path / "x.nothing")]) == 1
    assert "x.nothing cannot be written" in capsys.readouterr().err and len(ran) == 1
    assert program.main(["sweep", "--help"]) == 0 and "--seeds" in capsys.readouterr().out


def test_a_run_whose_loss_became_infinite_is_a_result(ran, monkeypatch, capsys):
    working = sweep.run_cell

    def run(c, worker):
        return sweep.diverged(c.resolved()) if c.resolved().k == 0.2 else working(c)

    monkeypatch.setattr(sweep, "run_cell", run)
    assert program.main(["sweep", CONFIG, "--k", "0.1,0.2", "--seeds", "1,2"]) == 0
    text = capsys.readouterr().out
    assert "| 0.2 | inf | 2 |  |  |" in text and "**0.1615" in text
    assert sweep.diverged(Config(data="mnist"))["accuracy"] == 0
