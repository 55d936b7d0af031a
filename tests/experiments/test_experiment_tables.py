"""Experiments that are more than the main table: what they run, and the tables and figures drawn from results."""

import pytest

from experiments import __main__ as program
from experiments import ablations, alternatives, few_bits, hybrid, images, scaling, small, sweep, vocabulary
from experiments.plots import spaced_by_logarithm
from experiments.rows import finals, make_row, shortened, to_tune, winner
from experiments.sweep import Cell, Store

TUNED = (images, alternatives)


def result(cell) -> dict:
    """A run that takes no time: less loss, and more accuracy, for small k and lr and for seed 1."""
    cfg = cell.resolved()
    value = 0.1 * (cfg.k if cfg.method == "gft" else cfg.lr) + 0.01 * cfg.seed
    state = {"gft": cfg.momentum > 0, "signsgd": 0, "sgd": 4}.get(cfg.method, 8)
    pictures = cfg.data in ("mnist", "imagenette")
    whole = cfg.method == "gft"
    return {
        "val_loss": value, "accuracy": 1 - value if pictures else None, "eval_on": cfg.eval_on, "method": cfg.method,
        "bits": cfg.bits if cfg.method in ("gft", "ste") else 32, "seed": cfg.seed, "steps": cfg.steps,
        "tokens": 100 * cfg.steps,
        "flips_per_weight_per_step": cfg.k / 2 if whole else 1.0, "weights": 1000, "int_weight_bytes": 1000 * whole,
        "packed_weight_bytes": 750 * whole, "float_param_bytes": 4000 * (not whole),
        "optimizer_state_bytes": 1000 * int(state),
        "step_seconds": 0.1, "seconds": 10.0, "peak_memory_bytes": 2**20,
        "energy_model_joules": (1.0 if whole else 2.0 if cfg.precision == "bf16" else 3.0) * cfg.steps,
        "energy_measured_joules": None,
        "curve": [[cfg.steps // 2, 0.0 if pictures else 9.0], [cfg.steps, 1 - value if pictures else value]],
        "environment": {"compile": False, "torch": "t", "device": "cpu", "threads": 1}, "out_dir": "x",
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    made = []

    def run(cell, worker=None):
        made.append(cell)
        return result(cell)

    monkeypatch.setattr(sweep, "run_cell", run)
    monkeypatch.setattr(sweep, "commit", lambda: "abc")
    return made


@pytest.fixture
def run_quietly(capsys):
    def run(module, store, quick=False):
        module.run(store, 2, quick)
        capsys.readouterr()
        return module.table(store)

    return run


@pytest.mark.parametrize("module", TUNED, ids=lambda m: m.__name__)
def test_rows_are_tuned_on_the_held_out_part_and_judged_on_the_other(module, ran, run_quietly, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    text = run_quietly(module, store)
    rows = [row for group in module.GROUPS.values() for row in group]
    tuned = [c for c in ran if c.resolved().eval_on == "tune"]
    assert len({c.key() for c in tuned}) == len(tuned) == len({c.key() for row in rows for c in to_tune(row)})
    assert all(c.resolved().seed == 1 for c in tuned)
    assert len(ran) - len(tuned) == 3 * len(rows)
    for row in (row for row in rows if row.enough is None):
        best = min(row.cells, key=lambda c: result(c)["val_loss"]).resolved()
        mine = [c.resolved() for c in ran if c.label == row.name and c.config == row.cells[0].config]
        last = {(c.k, c.lr, c.batch_size, c.steps) for c in mine if c.eval_on == "val"}
        assert last == {(best.k, best.lr, best.batch_size, best.steps)}
    for title, group in module.GROUPS.items():
        assert f"### {title}" in text and all(f"| {row.name} |" in text for row in group)
    before = len(ran)
    assert run_quietly(module, Store(store.path)) == text and len(ran) == before, "all is found again on disk"
    assert module.tuning_table(store).count("\n") == 1 + len(tuned)


def test_images_table(ran, run_quietly, tmp_path):
    text = run_quietly(images, Store(tmp_path / "r.jsonl"))
    assert ("| AdamW, fp32 | 97.99 ± 1.00 % | 3 | +0.00 | 8 | 1.0000 | 4,000 | 8,000 | "
            "batch_size 256, lr 0.001, steps 4700 |") in text
    assert ("| 6 bits, momentum | 97.50 ± 1.00 % | 3 | -0.49 | 4 | 0.0250 | 750 | 1,000 | "
            "batch_size 1024, k 0.05, momentum 0.9, rule balanced, steps 2350 |") in text
    assert "| 6 bits, no momentum | 96.50 ± 1.00 % | 3 |" in text and "momentum 0 " not in text
    assert "crop_min 1.0" not in text and "crop_min 1.0" in images.tuning_table(Store(tmp_path / "r.jsonl"))


def test_images_are_chosen_by_accuracy_and_an_unfinished_row_is_left_out(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    row = images.MNIST[0]
    assert images.table(store) == "Nothing is finished yet."
    for number, cell in enumerate(to_tune(row)):
        assert images.table(store) == "Nothing is finished yet."
        store.add(cell, result(cell) | {"accuracy": 0.1 * number, "val_loss": number})
    chosen = [c.resolved().lr for c in finals(row, store, (1,))]
    assert chosen == [row.cells[-1].resolved().lr], "the highest accuracy, although its loss is highest too"


def test_hybrid_has_every_kind_of_layer_and_all_in_floats(ran, run_quietly, tmp_path):
    text = run_quietly(hybrid, Store(tmp_path / "r.jsonl"))
    assert {c.resolved().eval_on for c in ran} == {"val"} and len(ran) == 3 * sum(map(len, hybrid.GROUPS.values()))
    configs = [c.resolved() for c in ran]
    chosen = {c.int_layers for c in configs if c.method == "gft" and c.data == "imagenette"}
    assert chosen == {"all", "patch,attention,mlp", "attention,mlp,head", "attention,mlp", "mlp", "attention",
                      "patch", "head"}  # fmt: skip
    assert "| none (AdamW) |" in text and "| patch, attention, mlp |" in text
    lm, vit = text.split("###")[1:]
    assert "accuracy" not in lm and "| all | 0.0700 ± 0.0100 | 3 | 0.250 |" in lm
    assert "| all | 0.0500 ± 0.0100 | 95.00 ± 1.00 % | 3 | 0.150 |" in vit


def test_alternatives_count_state_energy_and_the_way_to_adamws_loss(ran, run_quietly, tmp_path):
    text = run_quietly(alternatives, Store(tmp_path / "r.jsonl"))
    lm, mnist = text.split("### ")[1:]
    methods, energy = (
        {line.split("|")[1].strip(): line.split("|") for line in part.splitlines() if line.startswith("| ")}
        for part in lm.split("Energy")[:2]
    )
    names = ("AdamW", "SGD, momentum 0.9", "signSGD", "GFT, 6 bits", "GFT, 6 bits, momentum")
    assert [methods[name][5].strip() for name in names] == ["12.00", "8.00", "4.00", "1.00", "2.00"]
    cells = {name: [part.strip() for part in row[2:7]] for name, row in energy.items()}
    assert cells["AdamW"] == ["30000.00", "1.00x", "1500.00", "1.00x", "0.67x"]
    assert cells["AdamW, bf16"] == ["20000.00", "1.50x", "1000.00", "1.50x", "1.00x"]
    assert cells["GFT, 6 bits"] == ["10000.00", "3.00x", "not reached", "", ""]
    assert cells["GFT, ternary, momentum"] == ["10000.00", "3.00x", "500.00", "3.00x", "2.00x"]
    assert cells["Muon, bf16, as few as it takes"] == ["20000.00", "1.50x", "600.00", "2.50x", "1.67x"]
    assert "muon_lr 0.048, steps 300" in methods["Muon, bf16, as few as it takes"][8]
    assert "joules per million images" in mnist
    # One seed is not held against a mean of three.
    few = Store(tmp_path / "few.jsonl")
    few.done = {k: r for k, r in Store(tmp_path / "r.jsonl").done.items()
                if r["seed"] == 3 or r["eval_on"] == "tune" or r["label"] != "STE, 8 bits"}  # fmt: skip
    line = next(x for x in alternatives.table(few).split("Energy")[1].splitlines() if x.startswith("| STE, 8 bits"))
    assert "| seeds missing |  |  |" in line
    methods_run = {(c.resolved().method, c.resolved().bits) for c in ran}
    assert {("ste", 1), ("ste", 2), ("ste", 4), ("ste", 8), ("sgd", 6), ("signsgd", 6), ("muon", 6)} <= methods_run


def test_joules_to_a_loss():
    run = {"accuracy": None, "val_loss": 1.0, "steps": 10, "energy_model_joules": 50.0,
           "curve": [[2, 3.0], [6, 2.0], [10, 1.0]]}  # fmt: skip
    assert alternatives.joules_to([run], 2.5) == 30.0 and alternatives.joules_to([run], 0.5) is None
    assert alternatives.joules_to([run | {"accuracy": 0.9}], 2.5) == 10.0
    other = run | {"curve": [[2, 3.0], [6, 2.8], [10, 2.0]], "val_loss": 2.0}
    assert alternatives.joules_to([run, other], 2.4) == 30.0 and alternatives.joules_to([run, other], 2.3) == 50.0
    assert alternatives.joules_to([run | {"val_loss": 1.004}], 1.003) is None, "the curve is rounded, the end is not"
    assert alternatives.joules_to([run, run | {"curve": []}], 2.5) is None


def test_ablations_are_run_drawn_and_tabled(ran, run_quietly, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    text = run_quietly(ablations, store)
    ablations.draw(store, tmp_path / "figures")
    for a in ablations.ABLATIONS:
        assert f"![{a.title}](docs/figures/{a.name}.png)" in text
        assert (tmp_path / "figures" / f"{a.name}.png").read_bytes().startswith(b"\x89PNG")
        assert all(store.get(c) for place in a.places() for c in a.cells(*place))
    assert text.count("###") == len(ablations.ABLATIONS) == len({a.name for a in ablations.ABLATIONS})
    assert "| 0.1 | 0.0300 ± 0.0100 | 0.0300 ± 0.0100 | 97.00 ± 1.00 % | 97.00 ± 1.00 % |" in text
    bits = next(a for a in ablations.ABLATIONS if a.name == "bits")
    assert {c.resolved().bits for p in bits.places() for c in bits.cells(*p)} == set(range(1, 9))
    assert len({c.key() for c in ran}) == len(ran)


def test_a_figure_has_what_there_is(ran, tmp_path):
    store, first = Store(tmp_path / "r.jsonl"), ablations.ABLATIONS[0]
    assert ablations.table(store) == "Nothing is finished yet."
    place = first.places()[0]
    cells = first.cells(*place)
    store.add(cells[0], result(cells[0]))
    store.add(cells[1], sweep.diverged(cells[1].resolved()))
    (panel,) = ablations.panels(first, store)
    assert panel.title == place[0] and panel.lines == {place[1]: [(place[2], [pytest.approx(0.012)])]}
    ablations.draw(store, tmp_path)
    assert [p.name for p in tmp_path.glob("*.png")] == ["k.png"]
    assert "| inf |" in ablations.table(store) and "MNIST" not in ablations.table(store)


@pytest.mark.parametrize("module", [images, hybrid, ablations, alternatives], ids=lambda m: m.__name__)
def test_quick_is_a_few_short_runs(module, ran, run_quietly, tmp_path):
    run_quietly(module, Store(tmp_path / "r.jsonl"), quick=True)
    assert 10 < len(ran) <= 30 and all(c.resolved().steps <= 8 for c in ran)


@pytest.mark.parametrize("module", [few_bits, scaling, vocabulary], ids=lambda m: m.__name__)
def test_quick_is_one_run_of_each_kind(module, ran, run_quietly, tmp_path):
    run_quietly(module, Store(tmp_path / "r.jsonl"), quick=True)
    assert 3 <= len(ran) <= 5 and all(c.resolved().steps <= 8 for c in ran)


def test_few_bits_are_compared_with_what_nothing_changed(ran, run_quietly, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    text = run_quietly(few_bits, store)
    assert text.count("###") == len(few_bits.PLANS) and all(c.resolved().eval_on == "tune" for c in ran)
    assert "| as it is | 0.0300 | 0.1000 |" in text and "| threshold 0.2 | 0.0300 (+0.000) | 0.1000 (+0.000) |" in text
    assert "| two scales | 0.0300 (+0.000) |  |" in text


def test_points_of_the_scaling_figure_are_the_best_of_their_grid(ran, run_quietly, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    text = run_quietly(scaling, store)
    assert "| 64 | 262,144 | 17,100 | 0.0108 (lr 0.008) |" in text, "least lr, k: least loss of these made-up runs"
    assert "0.0300 (+0.019; k 0.2) |" in text
    points = scaling.points(store)
    assert {method: list(by) for method, by in points.items()} == dict.fromkeys(scaling.METHODS, list(scaling.CHOICES))
    tokens = {c.resolved().d_model: c.resolved().steps * 12 * 64 for c in ran}
    assert all(abs(t / scaling.weights(width) - 0.5) < 0.002 for width, t in tokens.items())
    scaling.draw(store, tmp_path)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.table(Store(tmp_path / "none.jsonl")) == "Nothing is finished yet."


def test_only_what_has_results_is_in_the_report(ran, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    assert program.main(["hybrid", "--jobs", "1"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Hybrid networks" in text
    assert "Ablations" not in text and "Images" not in text and "alternatives" not in text
    assert program.main(["ablations", "--jobs", "1"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Ablations" in text and (tmp_path / "docs" / "figures" / "depth.png").exists()
    assert "python -m experiments ablations" in capsys.readouterr().out + text


def test_enough_is_the_least_energy_that_is_as_good(ran, tmp_path):
    store, goal = Store(tmp_path / "r.jsonl"), Cell("goal", "mnist").with_(steps=400)
    row = make_row("r", "mnist", {}, {"steps": 100}, {"steps": 300}, {"steps": 200}, enough=goal)
    assert [c.resolved().steps for c in to_tune(row)] == [100, 300, 200, 400]
    for cell, accuracy in zip(to_tune(row), (0.90, 0.95, 0.94, 0.93), strict=True):
        store.add(cell, result(cell) | {"accuracy": accuracy})
    assert winner(row, store).resolved().steps == 200
    for cell in to_tune(row)[:3]:
        store.add(cell, result(cell) | {"accuracy": cell.resolved().steps / 1000})
    assert winner(row, store).resolved().steps == 300, "none is as good: the best"


@pytest.mark.parametrize("module", [small, images, hybrid, alternatives], ids=lambda m: m.__name__)
def test_a_run_that_diverged_is_shown(module, ran, run_quietly, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    run_quietly(module, store)
    last = [c for c in ran if c.resolved().eval_on == "val" and c.resolved().seed == 3][1]
    store.add(last, sweep.diverged(last.resolved()))
    assert "nan" not in module.table(Store(tmp_path / "none.jsonl"))
    line = next(line for line in module.table(store).splitlines() if "| nan |" in line)
    assert line.startswith(f"| {last.label.replace(',', ', ') if module is hybrid else last.label} |")


def test_a_quick_run_keeps_something_to_tune():
    rows = [make_row(name, "mnist", {}, {"k": 0.1}, {"k": 0.2}, {"k": 0.3}) for name in "ab"]
    assert [len(row.cells) for row in shortened(rows)] == [2, 1] and not to_tune(shortened(rows)[1])


def test_values_are_spaced_as_they_lie():
    for even in ([1, 2, 3, 4, 5, 6, 7, 8], [0.8, 0.9, 0.95, 0.98], [0, 1, 10]):
        assert not spaced_by_logarithm(even), even
    for doubling in ([6, 12, 24, 48], [0.02, 0.1, 0.25, 0.5, 0.8], [1, 2, 4, 8, 16, 24]):
        assert spaced_by_logarithm(doubling), doubling
