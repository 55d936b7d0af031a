"""Train a config at every combination of values, and show what came of it as a table and a plot.

    python -m experiments sweep shakespeare_char_small --k 0.3,0.5 --bits 4,6 --seeds 1,2,3
    python -m experiments sweep mnist --bits 6 --momentum 0,0.9 --steps 1000 --jobs 2
    python -m experiments sweep shakespeare_char_small --int_layers "all;attention,mlp;mlp"

CONFIG is a name from configs/ or a path; every key of `python train.py --help` can be given, with one value or several
between commas, or between semicolons where a value has commas of its own.

    --seeds 1,2,3   each combination is trained once with each seed (default 1)
    --jobs 2        runs side by side (default 2), of one thread each unless --threads says otherwise
    --out FILE      the plot (default results/sweeps/CONFIG-KEYS.png): loss, of images accuracy, over the first key
                    with several values, a line for each combination of the others

Finished runs are kept in results/sweeps/CONFIG.jsonl: a sweep that was cut off goes on, and no run is made twice.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.plots import Panel, draw
from experiments.rows import markdown
from experiments.sweep import ROOT, Cell, Store, badness, drawn, run_cells, show_quality
from run.config import FIELDS
from run.errors import UserError, refuse
from run.keys import convert, key, read_argv

RESULTS = ROOT / "results" / "sweeps"
TAKEN = {"seed": "write --seeds 1,2,3", "resume": "the same command again goes on",
         "out_dir": "runs are not kept, --out is the plot", "print_config": "train.py prints a config"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is about the sweep and not about a run."""

    seeds: str = key("1", "seeds, separated by commas", group="sweep")
    jobs: int = key(2, "runs side by side", (1, 256))
    out: str = key("", "the plot's file")


@dataclass(frozen=True)
class Sweep:
    """A config, the values of each key, and the seeds."""

    config: str
    values: dict[str, tuple[str, ...]]
    seeds: tuple[str, ...] = ("1",)

    @property
    def swept(self) -> list[str]:
        """The keys that have several values."""
        return [k for k, values in self.values.items() if len(values) > 1]

    def points(self) -> list[tuple[dict[str, str], list[Cell]]]:
        """Every combination: the values of the swept keys, and its cells, one a seed. The first key varies slowest."""
        found = []
        for chosen in itertools.product(*self.values.values()):
            settings = dict(zip(self.values, chosen, strict=True))
            shown = {k: settings[k] for k in self.swept}
            label = ", ".join(f"{k} {value}" for k, value in shown.items()) or self.config
            cell = Cell(label, self.config).with_(**settings)
            found.append((shown, [cell.with_(seed=seed) for seed in self.seeds]))
        return found


def parse(argv: Sequence[str]) -> tuple[Sweep, Options]:
    """The sweep a command line asks for. Raises UserError(code=2) naming every problem."""
    own = {f.name: f for f in fields(Options)}
    given, words = read_argv(argv, FIELDS | own, "-m experiments sweep", "")
    problems = [] if len(words) == 1 else ["name one config: `python -m experiments sweep CONFIG --key value,value`"]
    values, options = {}, {}
    for k, text in {"seeds": "1", **given}.items():
        try:
            if k in TAKEN:
                problems.append(f"--{k}: a sweep sets this itself; {TAKEN[k]}")
            elif k in ("jobs", "out"):
                options[k] = convert(own[k], text)
            elif k in own or k in FIELDS:
                values[k] = once(FIELDS["seed" if k == "seeds" else k], split(text))
            else:
                values[k] = (text,)  # an unknown key, which the config refuses
        except ValueError as error:
            problems.append(f"--{k} {text}: {error}")
    refuse(problems)
    sweep = Sweep(words[0], seeds=values.pop("seeds"), values=values)
    for _, cells in sweep.points():
        cells[0].resolved()
    return sweep, Options(**options)


def split(text: str) -> tuple[str, ...]:
    """The values in `text`: between semicolons if there are any, else between commas."""
    return tuple(part.strip() for part in text.split(";" if ";" in text else ","))


def once(f: Field, texts: Sequence[str]) -> tuple[str, ...]:
    """Each value of f once, in its first spelling: 0.10 is 0.1. Raises ValueError for an empty or forbidden one."""
    if "" in texts:
        raise ValueError("an empty value; write values between commas, as in --k 0.3,0.5")
    first: dict[Any, str] = {}
    for text in texts:
        first.setdefault(convert(f, text), text)
    return tuple(first.values())


def table(sweep: Sweep, store: Store) -> str:
    """What each combination reached, as markdown, the best one in bold."""
    rows = [(shown, [r for cell in cells if (r := store.get(cell))]) for shown, cells in sweep.points()]
    rows = [(shown, runs) for shown, runs in rows if runs]
    measure = "val loss, last step" if rows[0][1][0].get("accuracy") is None else "accuracy, last step"
    best = min(mean(badness(r) for r in runs) for _, runs in rows)
    lines = []
    for shown, runs in rows:
        text = show_quality(runs)
        whole = [r for r in runs if not r.get("diverged")]
        rest = ("", "") if not whole else (f"{mean(r['flips_per_weight_per_step'] for r in whole):.4f}",
                                           f"{mean(r['seconds'] for r in whole):.0f}")  # fmt: skip
        text = f"**{text}**" if mean(badness(r) for r in runs) == best and len(rows) > 1 else text
        lines.append((*shown.values(), text, str(len(runs)), *rest))
    return "\n".join(markdown([*sweep.swept, measure, "seeds", "flips per weight and step", "seconds"], lines))


def panel(sweep: Sweep, store: Store) -> Panel:
    """The plot: the first swept key along x, a line for each combination of the others."""
    first, *others = sweep.swept or [""]
    lines: dict[str, list] = {}
    for shown, cells in sweep.points():
        runs = [r for cell in cells if (r := store.get(cell)) and not r.get("diverged")]
        if runs:
            label = ", ".join(f"{k} {shown[k]}" for k in others)
            lines.setdefault(label, []).append((shown.get(first, sweep.config), [drawn(r) for r in runs]))
    images = sweep.points()[0][1][0].resolved().of_images
    return Panel(Path(sweep.config).stem, first, "accuracy, %" if images else "validation loss, nats per token", lines)


def main(argv: Sequence[str]) -> int:
    """Run a sweep. Returns the exit status; raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    sweep, options = parse(argv)
    name = Path(sweep.config).stem
    store = Store(RESULTS / f"{name}.jsonl")
    # All combinations with one seed first: a sweep that is cut off has something of everything.
    run_cells([cells[n] for n in range(len(sweep.seeds)) for _, cells in sweep.points()], store, options.jobs)
    print(table(sweep, store))
    png = Path(options.out) if options.out else RESULTS / f"{'-'.join((name, *sweep.swept))}.png"
    try:
        draw(png, [panel(sweep, store)])
    except (OSError, ValueError) as error:
        problem = f"the plot {png} cannot be written: {error}; name another file, ending in .png, with --out"
        raise UserError(problem) from None
    print(f"plot: {png}\nruns: {store.path}", file=sys.stderr)
    return 0
