"""Rows of a table: each is tuned on a held-out part of the training data, and its winner trained once for each seed.

A row that has one cell needs no tuning: what it says is known from another table. A row that asks for no more than what
another one reaches (`enough`) takes, of its cells that are as good on the held-out part, the one of least energy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.sweep import Cell, Store, badness, best_of, run_cells, show_quality

SEEDS = (1, 2, 3)
# What the tables show elsewhere, or what says nothing about the result.
HIDDEN = {"eval_on", "seed", "threads", "method", "bits", "sample_tokens", "eval_every"}
NOTHING_YET = "Nothing is finished yet."
# Overrides of a quick run.
QUICK = {"steps": 8, "warmup": 0, "batch_size": 16, "compile": "false", "n_layer": 1, "n_head": 2, "d_model": 32,
         "eval_windows": 20}  # fmt: skip
USUAL = {"shakespeare_char_small": ("--steps", "500")}  # an override that every row of a config has


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, and the cells its settings are chosen from."""

    name: str
    cells: tuple[Cell, ...]
    tuned_with: tuple[tuple[str, object], ...] = ()  # overrides while tuning: long runs are tuned on shorter ones
    enough: Cell | None = None  # whose loss (of images accuracy) on the held-out part is enough


Finished = Sequence[tuple[Row, list[dict]]]  # rows with the results of their winner, one a seed


def make_row(name: str, config: str, common: dict, *choices: dict, variant: str = "", **more: Any) -> Row:
    """A row of `config` with `common` settings and one of `choices` each; `variant` as Cell's."""
    return Row(name, tuple(Cell(name, config, variant=variant).with_(**common | choice) for choice in choices), **more)


def each(key: str, *values: float, **more: Any) -> tuple[dict, ...]:
    """A choice for each of `values` of a key, with the settings `more`."""
    return tuple(more | {key: value} for value in values)


def shortened(rows: Sequence[Row]) -> list[Row]:
    """Rows for a quick run: the first with two cells, so that something is tuned, the others with one."""
    return [replace(row, cells=row.cells[: 1 if n else 2]) for n, row in enumerate(rows)]


def tuning_cells(row: Row, **short) -> list[Cell]:
    """The row's grid on the held-out part of the training data."""
    return [_held_out(cell, **dict(row.tuned_with) | short) for cell in row.cells]


def _held_out(cell: Cell, **short) -> Cell:
    return cell.with_(eval_on="tune", seed=1, **short)


def to_tune(row: Row, **short) -> list[Cell]:
    """The cells that have to be run before the row's winner is known."""
    if len(row.cells) == 1:
        return []
    return tuning_cells(row, **short) + ([_held_out(row.enough, **short)] if row.enough else [])


def winner(row: Row, store: Store, **short) -> Cell:
    """The best cell of the row's grid, or of those that are good enough the one of least energy."""
    if len(row.cells) == 1:
        return row.cells[0]
    tried = tuning_cells(row, **short)
    if row.enough:
        goal = badness(store.get(_held_out(row.enough, **short)))
        if good := [cell for cell in tried if badness(store.get(cell)) <= goal]:
            return row.cells[tried.index(min(good, key=lambda cell: store.get(cell)["energy_model_joules"]))]
    return row.cells[tried.index(best_of(tried, store))]


def finals(row: Row, store: Store, seeds: Sequence[int], **short) -> list[Cell]:
    """The winner of the row's grid on the part that is reported, once for each seed."""
    return [winner(row, store, **short).with_(eval_on="val", seed=seed, **short) for seed in seeds]


def tune_and_train(
    rows: Sequence[Row], store: Store, jobs: int, seeds: Sequence[int], apart: bool = False, **short
) -> None:
    """Tune every row, then train its winner with each seed; all rows with one seed, then with the next.

    `apart`: each run of the first seed in a process of its own (see run_cells).
    """
    run_cells([cell for row in rows for cell in to_tune(row, **short)], store, jobs)
    last = [finals(row, store, seeds, **short) for row in rows]
    first, *others = zip(*last, strict=True)
    run_cells(first, store, jobs, apart)
    run_cells([cell for seed in others for cell in seed], store, jobs)


def train_groups(groups: Iterable[Sequence[Row]], store: Store, jobs: int, quick: bool) -> None:
    """Tune and train several tables' rows, one table after another; `quick` takes a few steps of a few cells."""
    for rows in groups:
        if quick:
            tune_and_train(shortened(rows), store, jobs, SEEDS[:1], **QUICK)
        else:
            tune_and_train(rows, store, jobs, SEEDS)


def finished(rows: Sequence[Row], store: Store, seeds: Sequence[int] = SEEDS) -> Iterator[tuple[Row, list[dict]]]:
    """The rows that are tuned, with the results of their winner; rows without any are left out."""
    for row in rows:
        if any(store.get(cell) is None for cell in to_tune(row)):
            continue
        if runs := [r for cell in finals(row, store, seeds) if (r := store.get(cell)) is not None]:
            yield row, runs


def grouped_tables(groups: Mapping[str, Sequence[Row]], store: Store, lines_of: Callable[[Finished], list[str]]) -> str:
    """For every group with finished rows its title as a heading, then `lines_of` these rows, as markdown."""
    lines = []
    for title, rows in groups.items():
        if found := list(finished(rows, store)):
            lines += ["", f"### {title}", "", *lines_of(found)]
    return "\n".join(lines).strip() or NOTHING_YET


def tuning_table(store: Store) -> str:
    """Every cell tried while tuning, with what it reached on the held-out part."""
    tuned = [r for r in store.done.values() if r["eval_on"] == "tune"]
    measures = dict.fromkeys("loss" if r.get("accuracy") is None else "accuracy" for r in tuned)
    heads = ["row", "settings", f"{' or '.join(measures)} on the held-out part"]
    return "\n".join(markdown(heads, [(r["label"], settings(r), show_quality([r])) for r in tuned]))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in markdown."""
    return [_line(heads), "|---" * len(heads) + "|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def settings(record: dict) -> str:
    """What was chosen for a run: its overrides, but usual ones and those the tables show elsewhere."""
    config, *rest = record["arguments"]
    pairs = [pair for pair in zip(rest[::2], rest[1::2], strict=True) if pair != USUAL.get(config)]
    return ", ".join(f"{key[2:]} {value}" for key, value in pairs if key[2:] not in HIDDEN)
