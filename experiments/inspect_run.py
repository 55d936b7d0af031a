"""python -m experiments inspect out/NAME: what happened in a run, drawn as one picture.

    python -m experiments inspect out/shakespeare_char_small
    python -m experiments inspect out/NAME --against out/OTHER out/THIRD      their losses beside its own

Writes out/NAME/inspect.png, from metrics.jsonl and the checkpoints; the votes' singular values need the run's data, of
which one batch goes forwards and backwards through the net of the last step.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
from data.cache import open_atomic
from gft.layers import IntLayer, int_layers
from model import load_net, make_net
from run import checkpoint
from run.command import find_folder
from run.config import Config
from run.curve import read_metrics
from run.errors import UserError

MEASURES = {"flips": "share of weights moved, by layer", "undone": "share of moves that are undoings, by layer"}


def over_time(records: list[dict], key: str) -> tuple[list[int], list[str], np.ndarray]:
    """A measurement of the monitor: its steps, the names of the layers, and its values (layers, steps)."""
    seen = [r for r in records if "layers" in r]
    names = list(seen[0]["layers"]) if seen else []
    values = [[r["layers"].get(name, {}).get(key, np.nan) for r in seen] for name in names]
    return [r["step"] for r in seen], names, np.array(values, dtype=float).reshape(len(names), len(seen))


def histograms(folder: Path, cfg: Config, net: nn.Module) -> dict[str, np.ndarray]:
    """Share of the integer weights at each value from -Q to Q, as kept: at the start and in the checkpoints."""
    found: dict[str, np.ndarray] = {}
    if not cfg.init_from:
        found["step 0"] = shares(make_net(net.config, cfg.seed))
    steps = {}
    for name in ("previous", "best", "last"):
        if checkpoint.exists(folder, name):
            other, meta, _ = load_net(folder, name)
            steps[meta["step"]] = other
    return found | {f"step {step:,}": shares(steps[step]) for step in sorted(steps) if step}


def shares(net: nn.Module) -> np.ndarray:
    """Share of all integer weights of a net at each value: float64 (2 Q + 1,)."""
    layers = int_layers(net)
    q = max(layer.q for layer in layers)
    counts = sum(torch.bincount(layer.weight.flatten().int() + q, minlength=2 * q + 1) for layer in layers)
    return (counts.double() / counts.sum()).numpy()


def singular_values(net: nn.Module, cfg: Config, step: int) -> dict[str, np.ndarray]:
    """Those of each layer's votes in the batch of `step`, as shares of the largest. Raises UserError without data."""
    task = data.load(cfg)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, IntLayer)}
    for layer in layers.values():
        layer.start_voting(torch.int64)
    for x, y in task.batches(step, torch.device("cpu")):
        task.loss(net(x), y).backward()
    values = {name: torch.linalg.svdvals(layer.votes.double()) for name, layer in layers.items()}
    return {name: (v / v[0].clamp_min(1)).numpy() for name, v in values.items()}


def draw(png: Path, title: str, losses: dict[str, list[dict]], weights: dict[str, np.ndarray],
         spectra: dict[str, np.ndarray], notes: dict[str, str]) -> None:  # fmt: skip
    """Six panels; `losses` are the records of this run and of others, `notes` says why a panel is empty."""
    from matplotlib.figure import Figure

    records = next(iter(losses.values()))
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    (loss, *maps), (states, bars, votes) = panels
    moved = over_time(records, "flips")[2]
    if train := [(r["step"], r["loss"]) for r in records if "loss" in r]:
        loss.plot(*zip(*train), color="0.8", linewidth=0.8, label="its training batches")
    for name, rows in losses.items():
        points = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
        if points:
            loss.plot(*zip(*points), marker="o", markersize=3, label=f"{name}: {points[-1][1]:.3f}")
    loss.set(title="validation loss, nats; the last value", xlabel="step")
    if loss.lines:
        loss.legend(frameon=False)
    for axes, (key, words) in zip(maps, MEASURES.items()):
        steps, names, values = over_time(records, key)
        axes.set(title=words, xlabel="step")
        if not names:
            notes[axes] = "the run's monitor measured no integer layer"
            continue
        values = np.where(moved >= 0.02, values, np.nan) if key == "undone" else values  # of a few moves: noise
        mesh = axes.pcolormesh(steps, range(len(names)), values, shading="nearest", vmin=0)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        figure.colorbar(mesh, ax=axes)
    for key, words in (("zeros", "at zero"), ("at_limit", "at the limit"), ("dead_rows", "rows without votes")):
        steps, names, values = over_time(records, key)
        if names and not np.isnan(values).all():
            states.plot(steps, np.nanmean(values, axis=0), label=words)
    states.set(title="weights as they are read, mean share", xlabel="step")
    if states.lines:
        states.set_ylim(0, None)
        states.legend(frameon=False)
    for n, (name, values) in enumerate(weights.items()):
        q = len(values) // 2
        colour = f"{0.8 - 0.8 * n / max(1, len(weights) - 1):.2f}"  # the later, the darker
        bars.plot(range(-q, q + 1), values, color=colour, marker="." if q < 10 else "", label=name)
    bars.set(title="weights that are kept, all layers", xlabel="weight", ylabel="share")
    if bars.lines:
        bars.set_ylim(0, None)
        bars.legend(frameon=False)
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in spectra))
    for name, values in spectra.items():
        kind = name.rsplit(".", 1)[-1]
        label = kind if not any(line.get_label() == kind for line in votes.lines) else None
        seen = np.where(values > 1e-5, values, np.nan)
        votes.semilogy(np.linspace(0, 1, len(seen)), seen, color=f"C{kinds.index(kind)}", linewidth=0.9, label=label)
    votes.set(title="singular values of the votes, one line a layer", xlabel="rank, as a share of all",
              ylabel="share of the largest")  # fmt: skip
    if votes.lines:
        votes.legend(frameon=False)
    for axes in (loss, states, bars, votes):
        axes.grid(alpha=0.3)
    notes |= {axes: notes[key] for key, axes in (("weights", bars), ("votes", votes)) if key in notes}
    for axes in panels.flat:
        if axes in notes or not (axes.lines or axes.collections):
            axes.text(0.5, 0.5, notes.get(axes, "nothing was measured"), ha="center", va="center", wrap=True,
                      transform=axes.transAxes)  # fmt: skip
    figure.suptitle(title)
    with open_atomic(png) as file:
        figure.savefig(file, format="png", dpi=100)


def main(argv: list[str]) -> int:
    """Draw the picture of one run; returns the exit status. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m experiments inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="the run's folder, e.g. out/shakespeare_char_small")
    parser.add_argument("--against", nargs="+", default=[], metavar="OTHER", help="folders of other runs")
    parser.add_argument("--no-votes", action="store_true", help="leave out the singular values, which need the data")
    options = parser.parse_args(argv)
    folders = [find_folder(given) for given in (options.folder, *options.against)]
    if missing := [str(f) for f in folders if not (f / "metrics.jsonl").is_file()]:
        raise UserError(f"{', '.join(missing)}: no metrics.jsonl there; give the folder that train.py wrote")
    folder = folders[0]
    net, meta, head = load_net(folder, "last")
    cfg = checkpoint.config_of(meta, head)
    notes, weights, spectra = {}, {}, {}
    if int_layers(net):
        weights = histograms(folder, cfg, net)
        try:
            if options.no_votes:
                raise UserError("left out, as asked")
            spectra = singular_values(net, cfg, meta["step"])
        except UserError as error:
            notes["votes"] = str(error)
            print(f"note: no votes: {error}", file=sys.stderr)
    else:
        notes |= dict.fromkeys(("weights", "votes"), f"method {cfg.method}: no integer layer")
    png = folder / "inspect.png"
    title = f"{folder}: {cfg.name}, {cfg.method}, {cfg.bits} bits, momentum {cfg.momentum:g}, step {meta['step']:,}"
    losses = {str(f): read_metrics(f / "metrics.jsonl") for f in folders}
    try:
        draw(png, title, losses, weights, spectra, notes)
    except OSError as error:
        raise UserError(f"{png} cannot be written: {error.strerror or error}") from error
    print(f"wrote {png}")
    return 0
