"""python -m experiments NAME [--quick] [--jobs N]: run an experiment and redraw RESULTS.md.

    sweep         any config, any keys, any seeds: `python -m experiments sweep --help`
    small         the main table: GFT at 6, 4, 2 and 1 bits against AdamW, Muon, SWAN and STE (eight hours on two cores)
    speed         seconds per training step, each method alone on the machine (five minutes)
    images        MNIST and a small ViT at 6 to 1 bits against AdamW (an hour and a half)
    hybrid        which layers are integer, the others fp32 (about 40 minutes)
    ablations     one thing changed at a time, a figure for each (about two hours)
    alternatives  GFT against AdamW, SGD, signSGD, Muon and STE, with energy (an hour and a half)
    few_bits      other thresholds and grids for few bits of six, held out, one seed (an hour)
    scaling       loss against size, widths of 64 to 384 (four hours)
    vocabulary    8,192 tokens: tied weights, another k for the embedding (half an hour)
    scale_out     seconds of a step on 1 to 1,024 GPUs, predicted; --check compares gloo ranks here
    inspect       what happened in one run, as a picture: `python -m experiments inspect out/NAME`
    report        redraw RESULTS.md and docs/figures from the results that are there

A full run goes on where it was cut off. --quick checks that everything works in under two minutes and leaves
RESULTS.md alone. What needs a GPU: `python -m experiments.gpu`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from experiments import (
    ablations,
    alternatives,
    few_bits,
    gpu,
    grid,
    hybrid,
    images,
    inspect_run,
    scale_out,
    scaling,
    small,
    speed,
    vocabulary,
)
from experiments.sweep import ROOT, Store
from run.errors import UserError

RESULTS = ROOT / "results" / "cpu"
EXPERIMENTS = {
    "small": small, "speed": speed, "images": images, "hybrid": hybrid, "ablations": ablations,
    "alternatives": alternatives, "few_bits": few_bits, "scaling": scaling, "vocabulary": vocabulary,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status."""
    try:
        own = {"sweep": grid.main, "scale_out": scale_out.main, "inspect": inspect_run.main}
        other = own.get(argv[0] if argv else "")
        return other(argv[1:]) if other else run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nstopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    """Run one experiment, or all of its quick version; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*EXPERIMENTS, "report"])
    parser.add_argument("--quick", action="store_true", help="a few steps of a few cells, to see that it works")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default 2)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if options.quick and options.name != "report":
        return _quick(options.name, options.jobs)
    if options.name != "report":
        module = EXPERIMENTS[options.name]
        module.run(Store(RESULTS / f"{options.name}.jsonl"), options.jobs, False)
    report()
    return 0


def _quick(name: str, jobs: int) -> int:
    module = EXPERIMENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder, f"{name}.jsonl"))
        module.run(store, jobs, True)
        print(f"{module.table(store)}\n{len(store.done)} short runs went well")
    return 0


def report() -> None:
    """Write RESULTS.md from results/: each section with the command that made it."""
    text = ["# Results", "", "Every table below is redrawn by `python -m experiments report` from the lines in "
            "results/, and remade by the command under its heading. None of them was edited by hand.", ""]  # fmt: skip
    for name, module in EXPERIMENTS.items():
        store = Store(RESULTS / f"{name}.jsonl")
        if store.done:
            text += section(name, module, store)
            if hasattr(module, "draw"):
                module.draw(store, ROOT / "docs" / "figures")
    text += gpu.section(gpu.RESULTS)
    (ROOT / "RESULTS.md").write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {ROOT / 'RESULTS.md'}")


def section(name: str, module, store: Store) -> list[str]:
    """Heading, command, explanation and tables of one experiment."""
    title, *paragraphs = (module.__doc__ or "").strip().split("\n\n")
    environments = [record["environment"] for record in store.done.values() if not record.get("diverged")]
    commits = ", ".join(sorted({record["commit"] for record in store.done.values()}))
    first, processors = environments[0], sorted({e["processor"] for e in environments if "processor" in e})
    where = (f"torch {first['torch']}, {' and '.join(processors) or first['device']}, {first['threads']} thread(s) "
             f"a run; code of commit {commits}")  # fmt: skip
    lines = [f"## {title}", "", f"`python -m experiments {name}` ({where})", "",
             *"\n\n".join(paragraphs).splitlines(), "", module.table(store), ""]  # fmt: skip
    tuned = module.tuning_table(store) if hasattr(module, "tuning_table") else ""
    if tuned.count("\n") > 1:
        lines += ["<details><summary>All that was tried while tuning</summary>", "", tuned, "", "</details>", ""]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
