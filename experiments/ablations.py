"""Ablations: one setting changes at a time, on the character model and on the MNIST network.

Short runs, 200 steps of 24 windows on Tiny Shakespeare (0.8 M weights) and 4 epochs of MNIST: they compare choices and
do not show the best result possible. Three seeds (mean ± standard deviation), one where a table has no spread. The
measures are the loss in nats and the accuracy after the last step, on data held out of the training part: settings may
be chosen from these tables, and the splits that other tables report stay untouched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import Panel
from experiments.plots import draw as draw_panels
from experiments.rows import NOTHING_YET, QUICK, SEEDS, markdown
from experiments.small import PAPER
from experiments.sweep import Cell, Store, drawn, exact, run_cells, show_quality

COMMON = {"eval_on": "tune", "eval_every": 1000, "compile": "true"}
NETS = {
    "Tiny Shakespeare": ("shakespeare_char_small", COMMON | {"steps": 200, "batch_size": 24}),
    "MNIST": ("mnist", COMMON | {"steps": 940, "batch_size": 256, "crop_min": 1.0}),
}
LM, MNIST = NETS
MEASURES = {LM: "held-out loss, nats", MNIST: "held-out accuracy, %"}

Lines = Mapping[str, Mapping[str, dict]]  # line -> point -> settings


@dataclass(frozen=True)
class Ablation:
    """What is changed (`x`), in which lines and points, and on which nets."""

    name: str
    title: str
    x: str
    nets: Mapping[str, Lines]
    seeds: tuple[int, ...] = SEEDS

    def cells(self, net: str, line: str, point: str, **short) -> list[Cell]:
        """The runs of one point, one a seed."""
        config, common = NETS[net]
        settings = common | self.nets[net][line][point] | short
        cell = Cell(", ".join(part for part in (self.name, line, point) if part), config).with_(**settings)
        return [cell.with_(seed=seed) for seed in self.seeds]

    def places(self) -> list[tuple[str, str, str]]:
        """Every (net, line, point)."""
        return [(net, line, point) for net, lines in self.nets.items() for line in lines for point in lines[line]]


def values(key: str, *of: float | str) -> dict[str, dict]:
    """Points that set one key."""
    return {str(value): {key: value} for value in of}


def cross(points: Mapping[str, dict], lines: Mapping[str, dict]) -> Lines:
    """Every line at every point; what a point says counts."""
    return {line: {point: common | own for point, own in points.items()} for line, common in lines.items()}


def both(points: Mapping[str, dict], lm: Mapping[str, dict], mnist: Mapping[str, dict]) -> dict[str, Lines]:
    """The same points on both nets."""
    return {LM: cross(points, lm), MNIST: cross(points, mnist)}


def by_bits(plain: Sequence[float], momentum: Sequence[float]) -> Lines:
    """1 to 8 bits with k for each; 7 and 8 bits begin with moves of 2 and 4 units."""
    def points(ks: Sequence[float], more: dict) -> dict[str, dict]:
        size = {7: 2, 8: 4}
        return {
            str(b): more | (exact(b) if b < 6 else {"bits": b})
            | {"k": k, "init_std": spread(b), "step_size": size.get(b, 1)}
            for b, k in enumerate(ks, 1)
        }  # fmt: skip

    def spread(bits: int) -> float:
        return 0.6 if bits <= 2 else 0.5 if bits <= 4 else 0.33

    decaying = points(momentum, {"momentum": 0.9})
    few = {bits: decaying[bits] | {"momentum": 0.95} for bits in ("1", "2")}
    return {"no momentum": points(plain, {}), "momentum": decaying | few}


# k for the 6 bits of the configs, from the tables above: half as much with momentum.
NONE_LM, MOMENTUM_LM = {"k": 0.5}, {"k": 0.3, "momentum": 0.9}
NONE_MNIST, MOMENTUM_MNIST = {"k": 0.3}, {"k": 0.1, "momentum": 0.9}
TWO = ({"no momentum": NONE_LM, "momentum": MOMENTUM_LM}, {"no momentum": NONE_MNIST, "momentum": MOMENTUM_MNIST})
ONE = ({"": NONE_LM}, {"": NONE_MNIST})
RULES = values("rule", "contribution", "gain", "balanced", "spectral") | {"paper mode": PAPER}
DECAYS = {"none": {"momentum": 0}} | values("momentum", 0.8, 0.9, 0.95, 0.98)
ORTHO = values("ortho_tile", 32, 64, 128) | {"whole": {"ortho_tile": 0}}
SELECT = {f"top k in {side or 'layer'}": {"topk_tile": side} for side in (64, 0)}
GAMMA = {"certain": {}} | {f"p ~ s^{g}": {"flip_prob": "score", "flip_gamma": g} for g in (0.25, 0.5, 1.0, 2.0)}
FEWER = {"6 bits": {}, "4 bits": {**exact(4), "k": 0.1}, "ternary": {**exact(2), "k": 0.015}}
ADAMW = {"method": "adamw", "lr_end": 0.0, "warmup": 50}
DEEP = {"d_model": 64}
MLP_DEPTHS = (1, 2, 4, 8, 16, 24)


def schedules(k: float) -> Lines:
    """The shapes of k_t, from k on."""
    shapes = values("k_schedule", "linear", "quadratic", "cosine", "constant")
    shapes |= {"constant, half k": {"k_schedule": "constant", "k": k / 2}, "linear to 0.1 k": {"k_end": k / 10},
               "linear to 0.3 k": {"k_end": 3 * k / 10}}  # fmt: skip
    return cross(shapes, {"": {"k": k}})


def batches(base: int, steps: int, sizes: Sequence[int], lines: Mapping[str, dict]) -> Lines:
    """Batches of these sizes, with as many steps as see the same number of examples."""
    return cross({str(size): {"batch_size": size, "steps": base * steps // size} for size in sizes}, lines)


ABLATIONS = (
    Ablation("k", "k: the share of the weights selected", "k at the start", both(
        values("k", 0.02, 0.1, 0.25, 0.5, 0.8), *TWO)),
    Ablation("k_schedule", "k: its way to the end", "schedule", {LM: schedules(0.5), MNIST: schedules(0.3)}),
    Ablation("bits", "Bits of a weight", "bits", {
        LM: by_bits((0.01, 0.015, 0.08, 0.15, 0.3, 0.5, 0.55, 0.6), (0.005, 0.01, 0.03, 0.06, 0.15, 0.3, 0.3, 0.4)),
        MNIST: by_bits((0.005, 0.01, 0.03, 0.05, 0.15, 0.3, 0.4, 0.4),
                       (0.002, 0.005, 0.02, 0.03, 0.06, 0.1, 0.15, 0.2))}),
    Ablation("rule", "The rule, and the paper mode", "rule", both(
        RULES, {"k 0.5": {"k": 0.5}, "k 0.1": {"k": 0.1}}, {"k 0.3": {"k": 0.3}, "k 0.05": {"k": 0.05}})),
    Ablation("momentum", "Momentum of the votes", "momentum", both(
        DECAYS,
        {"k 0.3": MOMENTUM_LM, "k 0.1": MOMENTUM_LM | {"k": 0.1}},
        {"k 0.1": MOMENTUM_MNIST, "k 0.03": MOMENTUM_MNIST | {"k": 0.03}})),
    Ablation("tiles", "Tiles of the orthogonalisation and of the selection", "side of the tiles orthogonalised", {
        LM: cross(ORTHO, {line: NONE_LM | own for line, own in SELECT.items()}),
        MNIST: cross(ORTHO, {line: NONE_MNIST | own | {"rule": "spectral"} for line, own in SELECT.items()})}),
    Ablation("depth", "Depth: blocks of width 64, hidden layers of width 256 (no residual path)", "layers", {
        LM: cross(values("n_layer", 2, 6, 12, 24), {line: DEEP | own for line, own in (
            TWO[0] | {"AdamW": ADAMW | {"lr": 8e-3}}).items()}),
        MNIST: cross(values("n_layer", *MLP_DEPTHS), TWO[1] | {"AdamW": ADAMW | {"lr": 1e-3}})
        | {f"{line}, k / layers": {str(n): own | {"n_layer": n, "k": own["k"] / n} for n in MLP_DEPTHS}
           for line, own in TWO[1].items()}}),
    Ablation("flip_prob", "Flips with a probability", "probability of a selected weight, s its score", both(
        GAMMA, {"k 0.5": NONE_LM, "k 0.9": {"k": 0.9}}, {"k 0.3": NONE_MNIST, "k 0.6": {"k": 0.6}}), (1,)),
    Ablation("batch", "Batch size, at the same number of examples", "batch size", {
        LM: batches(24, 200, (6, 12, 24, 48), TWO[0] | {"ternary, no momentum": {**exact(2), "k": 0.015}}),
        MNIST: batches(256, 940, (64, 256, 1024, 4096), TWO[1] | {"ternary, no momentum": {**exact(2), "k": 0.01}})},
        (1,)),
    Ablation("init_std", "Standard deviation of the first weights, of the limit", "init_std", both(
        values("init_std", 0.2, 0.33, 0.5, 0.8, 1.2),
        {line: NONE_LM | own for line, own in FEWER.items()},
        {line: NONE_MNIST | own for line, own in FEWER.items()}), (1,)),
    Ablation("delta", "The error: its bits, its scale", "delta", both(
        {f"{bits} bits": {"delta_bits": bits} for bits in (8, 6, 4, 3, 2)}
        | {"delayed scale": {"delta_scale": "delayed"}, "sign votes": {"delta": "sign"}}, *TWO), (1,)),
    Ablation("activations", "Activations: 8 bits over a range, of which twice as much is a bit less", "act_range", both(
        values("act_range", 1.5, 3, 6, 12, 24, 48, 96), *ONE), (1,)),
)  # fmt: skip

# Written after looking at the tables and figures.
SAID = {
    "k":
        "k, the fraction of weights selected per step, acts like a learning rate; setting it too low hurts most. "
        "Without momentum the text needs k = 0.5 or more, and the digits 0.25. With momentum the digits do best at "
        "0.1, and 0.5 costs them over a point, while the text, to our surprise, still accepts 0.8.",
    "k_schedule":
        "k should fall to zero, but how it falls hardly matters: linear, cosine, and linear to a tenth of k differ by "
        "less than the noise. A constant k costs 0.1 nats on the text and 0.3 to 0.5 points on the digits, and half "
        "that k does not help. Falling faster (quadratic) costs 0.06 nats: the moves in the middle of the run matter.",
    "bits":
        "Six bits are enough: 7 and 8 bits, where moves begin with 2 and 4 units, gain nothing beyond the noise. "
        "Momentum helps most where bits are few: 0.30 nats and 2.5 points at one bit, 0.08 nats and 0.3 points at "
        "six. Ternary weights with momentum equal 3 bits without it on the text, and beat 4 bits on the digits.",
    "rule":
        "On the text `spectral` gains 0.14 nats over `balanced` and 0.18 over `gain`; on the digits the three are "
        "equal. At k = 0.1 `balanced` is no worse than `spectral`: what orthogonalising adds is that large steps do "
        "not hurt. The paper's rule, under which only a weight at zero moves away from it, fails on both, and so does "
        "the paper mode, in which we had to guess what the paper leaves open.",
    "momentum":
        "A decay of 0.8 or 0.9 is best at the larger k, 0.9 or 0.95 at the smaller: a longer average needs smaller "
        "steps. 0.98 averages over more steps than these short runs have to spare. At the same k momentum gains 0.13 "
        "to 0.2 nats; against the best k without it, 0.07.",
    "tiles":
        "On the text, orthogonalising in tiles of 128 is best, 0.02 nats ahead of 64; to our surprise, orthogonalising "
        "whole matrices is worse than any of these tiles. Taking the top k in tiles of 64 or in the whole layer makes "
        "no difference, so the cheaper one is free. On the digits nothing here makes a difference.",
    "depth":
        "Integer transformers train at 24 blocks without changes: each depth is better than the one before or level "
        "with it, at the k of the shallow ones. (AdamW has one learning rate here, not tuned for these nets; its row "
        "shows the trend.) A plain chain of layers without a residual path is different: at the same k it degrades "
        "from 8 hidden layers on and fails at 16, sooner with momentum. Dividing k by the number of layers recovers "
        "most of it, 95 % at 16 and 89 % at 24, where AdamW keeps 97 %. Deep chains are the open problem.",
    "flip_prob":
        "On the text moving every selected weight is best, and the more closely the probability follows the score the "
        "worse: 0.12 nats at the paper's exponent of 1. A larger k makes up for part of it. On the digits a small "
        "exponent with twice the k is as good.",
    "batch":
        "For the same number of examples small batches learn more, because a short run has too few steps: at 6 bits "
        "12 windows are 0.14 nats better than 48, and 6 are no better than 12. Few bits need less noise in the votes: "
        "ternary weights do best with 24 to 48 windows and 1,024 digits, 6 bits with 12 windows and 256 digits.",
    "init_std":
        "Six bits are not sensitive: 0.2 and 0.33 are equal, and wide starts cost 0.1 nats. Ternary weights need 0.5 "
        "or more, because one move is half of their range; from 0.2 they do not recover within the run.",
    "delta":
        "On the text, 6 or 4 bits of delta cost 0.03 nats without momentum and 0.04 or 0.09 with it in runs this "
        "short; 3 cost 0.1 to 0.15, 2 or the sign alone 0.35 to 0.75. On the digits 3 bits are enough. A delayed "
        "scale, which makes the sum over micro-batches exact, costs 0.01 to 0.02 nats.",
    "activations":
        "Activations need fewer bits than delta: ranges of 6, 12 and 24, which leave typical values 8, 7 and 6 bits, "
        "differ by less than 0.01 nats, and 4 bits cost 0.09. Clipping at 3 costs 0.01, at 1.5 0.05.",
}


def run(store: Store, jobs: int, quick: bool) -> None:
    """Every ablation with one seed, then all with the next: cut off, it has something of everything."""
    if quick:  # the last point of the last line on the first net, and some on the second
        chosen = [(a, [p for p in a.places() if p[0] == LM][-1]) for a in ABLATIONS]
        chosen += [(a, a.places()[-1]) for a in ABLATIONS[::3]]
        run_cells([a.cells(*place, **QUICK)[0] for a, place in chosen], store, jobs)
        return
    cells = [ablation.cells(*place) for ablation in ABLATIONS for place in ablation.places()]
    run_cells([seeds[n] for n in range(len(SEEDS)) for seeds in cells if n < len(seeds)], store, jobs)


def results(ablation: Ablation, store: Store) -> dict[tuple[str, str, str], list[dict]]:
    """Finished runs by (net, line, point)."""
    found = {p: [r for c in ablation.cells(*p) if (r := store.get(c))] for p in ablation.places()}
    return {place: runs for place, runs in found.items() if runs}


def table(store: Store) -> str:
    """Title, figure and table of every ablation that has results, as markdown."""
    lines = []
    for ablation in ABLATIONS:
        if found := results(ablation, store):
            lines += ["", f"### {ablation.title}", "", SAID[ablation.name], "",
                      f"![{ablation.title}](docs/figures/{ablation.name}.png)", "",
                      *_table(ablation, found)]  # fmt: skip
    return "\n".join(lines).strip() or NOTHING_YET


def _table(ablation: Ablation, found: Mapping[tuple[str, str, str], list[dict]]) -> list[str]:
    columns = list(dict.fromkeys((net, line) for net, line, _ in found))
    there = {point for _, _, point in found}
    points = list(dict.fromkeys(point for _, _, point in ablation.places() if point in there))
    if all(point.replace(".", "", 1).isdigit() for point in points):
        points.sort(key=float)
    heads = (ablation.x, *(f"{net}, {line}" if line else net for net, line in columns))
    return markdown(heads, [
        (point, *(show_quality(runs) if (runs := found.get((*column, point))) else "" for column in columns))
        for point in points
    ])  # fmt: skip


def panels(ablation: Ablation, store: Store) -> list[Panel]:
    """A panel for each net that has results; runs that diverged are not drawn."""
    found = []
    for net in ablation.nets:
        lines: dict[str, list] = {}
        for (where, line, point), runs in results(ablation, store).items():
            if where == net and (whole := [drawn(r) for r in runs if not r.get("diverged")]):
                lines.setdefault(line, []).append((point, whole))
        if lines:
            found.append(Panel(net, ablation.x, MEASURES[net], lines))
    return found


def draw(store: Store, folder: Path) -> None:
    """One figure for every ablation that has results, NAME.png in `folder`."""
    for ablation in ABLATIONS:
        if shown := panels(ablation, store):
            draw_panels(folder / f"{ablation.name}.png", shown)
