"""What a training step costs in energy: all operations and all bytes, times published energies. run/meter.py measures.

    counts = count(config, vocab_size)                           one step of a Config, any method
    counts = count(config, 10, image=(28, 28, 1))                the same on images
    counts = count_net(Net(...), Config(method="adamw"))         any other net, see run/workload.py
    counts.joules("45nm"), counts.by_part("7nm"), counts.of("int8_mul", "forward")

The model, the same for all methods (docs/energy.md gives the formulas and their reasons):

operations   The algorithm is priced on a machine that has a unit for each type; what a backend without int8 units does
             instead is not. A product is one multiply and one add, with a weight of -1, 0 or 1 the add alone;
             int8 products are summed in int32, 16-bit ones in fp32. Comparing is adding; sign, absolute value, bit
             moves and conversions are free. exp, log, division and square root are one `special` each. Padding of
             tiles is computed, masked attention is not.
memory       Each kernel reads each operand once from DRAM and writes each result once. One kernel is a matrix product,
             with what is done to single elements of its operands or results; or all that is done to one block of data
             (a row, a tile, a matrix) of at most ON_CHIP_BYTES; or attention, never forming its matrix. A maximum over
             a whole tensor is a pass of its own. Votes and weight gradients are written and read again.
left out     Evaluation, sampling, checkpoints, loading data; instruction fetch, registers, caches and leakage.
"""

from collections import defaultdict

from kernels.balanced import SINKHORN_ROUNDS
from kernels.momentum import MOMENTUM_TILE
from kernels.scores import NEWTON_SCHULZ_STEPS
from kernels.tiles import tile_count
from run.config import Config
from run.meter import Reading
from run.workload import Attention, Layer, Net, net_of

PARTS = ("embedding", "forward", "delta", "votes", "norms", "attention", "loss", "rounding", "philox",
         "orthogonalisation", "selection", "momentum", "update")  # fmt: skip
ON_CHIP_BYTES = 256 * 1024  # about the shared memory and registers of one GPU core

# Picojoules. 45 nm: Horowitz, "Computing's energy problem", ISSCC 2014; bf16 is not in it and takes fp16's values.
# 7 nm: Jouppi et al., "Ten lessons from three generations shaped Google's TPUv4i", ISCA 2021, table 2; DRAM is its
# GDDR6, the middle of 350 to 480 pJ for 64 bits.
TABLES = {
    "45nm": {"int8_mul": 0.2, "int8_add": 0.03, "int32_mul": 3.1, "int32_add": 0.1, "fp16_mul": 1.1, "fp16_add": 0.4,
             "bf16_mul": 1.1, "bf16_add": 0.4, "fp32_mul": 3.7, "fp32_add": 0.9, "bytes": 640 / 4},
    "7nm": {"int8_mul": 0.07, "int8_add": 0.007, "int32_mul": 1.48, "int32_add": 0.03, "fp16_mul": 0.34,
            "fp16_add": 0.16, "bf16_mul": 0.21, "bf16_add": 0.11, "fp32_mul": 1.31, "fp32_add": 0.38, "bytes": 415 / 8},
}  # fmt: skip
# No table has these. special: a table look-up refined by a polynomial of four terms. A Philox word: a quarter of ten
# rounds of two products and four xors, and of nine bumps of two keys.
MADE_OF = {"special": {"fp32_mul": 4, "fp32_add": 4}, "philox": {"int32_mul": 20 / 4, "int32_add": (40 + 18) / 4}}
# Of one weight: multiplies, adds, specials, bytes. The weight and its gradient are read and the weight is written;
# adamw has two moments, sgd one.
UPDATES = {"adamw": (7, 5, 2, 28), "sgd": (2, 2, 0, 20), "signsgd": (0, 1, 0, 12)}


def picojoules(operation: str, node: str) -> float:
    """Energy of one operation, or of one byte to or from DRAM ("bytes"), at "45nm" or "7nm"."""
    if operation in MADE_OF:
        return sum(n * picojoules(part, node) for part, n in MADE_OF[operation].items())
    return TABLES[node][operation]


class Counts:
    """Operations by type, and bytes ("bytes"), of each part of a step."""

    def __init__(self) -> None:
        self.numbers: defaultdict[tuple[str, str], float] = defaultdict(int)

    def add(self, part: str, **operations: float) -> None:
        """Count `operations`, named as in TABLES and MADE_OF, towards `part`. Raises ValueError for unknown names."""
        for operation, n in operations.items():
            if part not in PARTS or operation not in (*TABLES["45nm"], *MADE_OF):
                known = ", ".join((*PARTS, *TABLES["45nm"], *MADE_OF))
                raise ValueError(f"Counts: got {part!r}, {operation!r}; known parts and operations are {known}")
            self.numbers[part, operation] += n

    def products(self, part: str, kind: str, n: float, signs: bool = False) -> None:
        """Count n multiply-adds of operands of `kind` ("int8", "fp16", "bf16", "fp32"); of adds alone if one of the two
        has no values but -1, 0 and 1 (`signs`)."""
        self.add(part, **{f"{kind}_mul": 0 if signs else n, "int32_add" if kind == "int8" else "fp32_add": n})

    def of(self, operation: str, part: str | None = None) -> float:
        """How often `operation` happens, in one part or in all."""
        return sum(n for (p, o), n in self.numbers.items() if o == operation and part in (None, p))

    def by_part(self, node: str) -> dict[str, dict[str, float]]:
        """Joules of one step: part -> {"operations", "memory"}, in the order of PARTS."""
        found = {part: {"operations": 0.0, "memory": 0.0} for part in PARTS}
        for (part, operation), n in self.numbers.items():
            found[part]["memory" if operation == "bytes" else "operations"] += 1e-12 * n * picojoules(operation, node)
        return found

    def joules(self, node: str) -> float:
        """Joules of one step."""
        return sum(row["operations"] + row["memory"] for row in self.by_part(node).values())


def count(config: Config, outputs: int, image: tuple[int, int, int] | None = None) -> Counts:
    """One step of `config` on text of `outputs` tokens, or on images (height, width, channels) of so many classes."""
    return count_net(net_of(config, outputs, image), config)


def count_net(net: Net, cfg: Config) -> Counts:
    """One training step of `net`, by the method of `cfg`, whose sizes are not read. Float layers beside integer ones
    learn by AdamW."""
    c = Counts()
    for layer in net.layers:
        _weights(c, layer, cfg)
        (_embedding if layer.embedding else _linear)(c, layer, cfg)
        _votes(c, layer, cfg)
        (_flips if layer.integer else _descent)(c, layer, cfg)
    for attention in net.attentions:
        _attention(c, attention, cfg)
    _loss(c, net, cfg)
    _philox(c, net)
    return c


def _half(cfg: Config) -> bool:
    """Whether what goes from kernel to kernel is bf16."""
    return cfg.precision == "bf16"


def _half_weights(cfg: Config) -> bool:
    """Whether the products of float layers are bf16: not of those beside integer ones."""
    return _half(cfg) and cfg.method != "gft"


def _weights(c: Counts, la: Layer, cfg: Config) -> None:
    """What a weight goes through before each use: rounding to a grid (ste, or fewer bits read than kept), to bf16."""
    if la.integer:
        if cfg.bits < cfg.kept_bits:  # two or three operations an element, for the product forwards and for delta's
            uses = (1 + la.hands_on) * la.size * cfg.grad_accum
            c.add("rounding", int32_add=3 * uses, bytes=2 * uses)
        return
    if cfg.method == "ste":
        # The grid: a maximum (or mean). The weight: divided, rounded, clipped on both sides, multiplied; in fp32.
        c.add("rounding", fp32_mul=2 * la.size * cfg.grad_accum, fp32_add=4 * la.size * cfg.grad_accum,
              bytes=(4 + 4 + 4) * la.size * cfg.grad_accum)  # fmt: skip
    if _half_weights(cfg) and not la.embedding:
        c.add("forward", bytes=(4 + 2) * la.size * cfg.grad_accum)


def _linear(c: Counts, la: Layer, cfg: Config) -> None:
    """The norm, the product with W and the product with its transpose."""
    read, written, n = la.rows * la.inputs, la.rows * la.outputs, la.rows * la.inputs * la.outputs
    kind, operand, value = _formats(la, cfg)
    weights = operand * la.size * cfg.grad_accum
    signs = (cfg.bits == 1 or (cfg.bits == 2 and cfg.levels == 3)) and (la.integer or cfg.method == "ste")

    # x * x, its sum, x / rms; the mean, a root and a reciprocal for each row.
    c.add("norms", fp32_mul=2 * read + la.rows, fp32_add=read, special=2 * la.rows,
          bytes=(value + operand) * read + 4 * la.rows)  # fmt: skip
    if la.integer:
        c.add("rounding", fp32_mul=read, fp32_add=3 * read)  # to the grid, round, clip on both sides
    c.products("forward", kind, n, signs)
    c.add("forward", fp32_mul=written, bytes=operand * read + weights + value * written)
    if la.residual:
        c.add("norms", fp32_add=2 * written, bytes=2 * value * written)  # forwards, and delta where the branch began

    if la.integer:
        _round_delta(c, la, cfg)
    else:
        c.add("delta", fp32_mul=written)  # by the gain
    if la.hands_on:
        c.products("delta", kind, n, signs)
        c.add("delta", fp32_mul=read if la.integer else 0, bytes=operand * written + weights + value * read)
        # x^, x^ * delta, its sum, the mean times x^, the difference, / rms.
        c.add("norms", fp32_mul=4 * read + la.rows, fp32_add=2 * read,
              bytes=3 * value * read + 4 * la.rows)  # fmt: skip
    if la.squared_relu:
        back = int(la.hands_on)
        c.add("norms", fp32_mul=(1 + 3 * back) * read, fp32_add=(1 + back) * read)


def _formats(la: Layer, cfg: Config) -> tuple[str, int, int]:
    """Type of a layer's products, bytes of their operands, bytes of other activations and deltas."""
    if la.integer:
        return "int8", 1, 2 if _half(cfg) else 4
    return ("bf16", 2, 2) if _half_weights(cfg) else ("fp32", 4, 2 if _half(cfg) else 4)


def _round_delta(c: Counts, la: Layer, cfg: Config) -> None:
    """delta to int8: a maximum; / sigma, + dither (two words added and masked, scaled), floor, clip on both sides."""
    n, value = la.rows * la.outputs, 2 if _half(cfg) else 4
    own_pass = value * n if cfg.delta_scale == "step" else 0
    c.add("rounding", fp32_mul=2 * n, fp32_add=5 * n, int32_add=2 * n,
          bytes=own_pass + (value + 1 + (cfg.delta == "sign")) * n + 4 * (la.rows + la.outputs))  # fmt: skip


def _embedding(c: Counts, la: Layer, cfg: Config) -> None:
    """Rows are gathered; a token is 8 bytes."""
    n = la.rows * la.outputs
    stored, written = 1 if la.integer else 4, 2 if _half(cfg) and not _half_weights(cfg) else 4
    c.add("embedding", fp32_mul=n if la.integer else 0, bytes=(stored + written) * n + 8 * la.rows)
    if la.integer:
        _round_delta(c, la, cfg)


def _votes(c: Counts, la: Layer, cfg: Config) -> None:
    """V = D^T X or the gradient of W; from the second micro-batch on, added to what is there."""
    kind, operand, _ = _formats(la, cfg)
    add = "int32_add" if la.integer else "fp32_add"
    matrix = 4 * la.size * (2 * cfg.grad_accum - 1)
    if la.embedding:
        delta = 1 if la.integer else 4
        c.add("votes", **{add: la.rows * la.outputs}, bytes=delta * la.rows * la.outputs + 8 * la.rows + matrix)
    else:
        c.products("votes", kind, la.rows * la.size)
        c.add("votes", bytes=operand * la.rows * (la.inputs + la.outputs) + matrix)
    c.add("votes", **{add: la.size * (cfg.grad_accum - 1)})


def _flips(c: Counts, la: Layer, cfg: Config) -> None:
    """Momentum, the rule's scores, the selection and the moves of one layer; random words among them."""
    n, score_bytes = la.size, 4
    if cfg.momentum:
        # M = beta M + V, V + beta M; the stored byte is scaled, divided, dithered, rounded and clipped.
        tiles = tile_count(la.shape, MOMENTUM_TILE)
        c.add("momentum", fp32_mul=3 * n, fp32_add=3 * n, special=tiles, bytes=(1 + 4 + 4 + 1) * n + 8 * tiles)
        c.add("rounding", fp32_mul=2 * n, fp32_add=4 * n, int32_add=2 * n, bytes=4 * 2 * MOMENTUM_TILE * tiles)
        _draw(c, 2 * MOMENTUM_TILE * tiles)
    rule = cfg.embedding_rule if la.embedding else cfg.rule
    if rule == "spectral":
        side = cfg.ortho_tile
        for shape in [(side, side)] * tile_count(la.shape, side) if side else [la.shape]:
            _newton_schulz(c, shape, "fp16", 4, 4)
    elif rule == "balanced":
        _sinkhorn(c, la.shape)
    elif rule == "contribution":
        score_bytes = 8
        c.add("orthogonalisation", int32_mul=n, int32_add=2 * n, bytes=(4 + 1 + score_bytes) * n)  # W V is 64 bits

    # Legal moves: the moved weight, compared. Radix selection: four digits of the key, each taken and counted; then
    # every key against the threshold and the count of ties. The move, clipped on both sides.
    side = cfg.topk_tile
    drawn = tile_count(la.shape, side) * side**2 if side else n
    spilled = 0 if 4 * (side**2 or n) <= ON_CHIP_BYTES else (1 + 4 + 1) * 4 * n
    c.add("selection", int8_add=2 * n, int32_add=(4 * 2 + 2) * n, bytes=(score_bytes + 1) * n + spilled)
    _draw(c, tile_count(la.shape, side))
    if cfg.flip_prob == "score":
        c.add("selection", fp32_mul=n, fp32_add=2 * n, special=(2 * n if cfg.flip_gamma != 1 else 0), bytes=4 * n)
        _draw(c, drawn)
    c.add("update", int8_add=3 * n, bytes=n)


def _newton_schulz(c: Counts, shape: tuple[int, int], kind: str, read: int, write: int) -> None:
    """One matrix, `read` bytes an element as it comes and `write` as it goes; operands are 16 bits wide."""
    a, b = sorted(shape)
    n, square, steps = a * b, a * a, NEWTON_SCHULZ_STEPS
    part = "orthogonalisation"
    c.add(part, fp32_mul=2 * n, fp32_add=n, special=2)  # to unit norm
    # X X^T, A A and P X; b A + c A A; a X + P X.
    c.products(part, kind, steps * (a * n + a * square + a * n))
    c.add(part, fp32_mul=steps * (2 * square + n), fp32_add=steps * (square + n))
    traffic = (read + write) * n
    if 2 * (n + 2 * square) > ON_CHIP_BYTES:
        traffic += (read + 2) * n + 2 * steps * (3 * n + 4 * square) - 2 * n
    c.add(part, bytes=traffic)


def _sinkhorn(c: Counts, shape: tuple[int, int]) -> None:
    """Rows, then columns, squared, summed, scaled: SINKHORN_ROUNDS times."""
    n, times = shape[0] * shape[1], 2 * SINKHORN_ROUNDS
    traffic = 8 * n if 4 * n <= ON_CHIP_BYTES else 12 * n * times
    c.add("orthogonalisation", fp32_mul=2 * n * times, fp32_add=n * times,
          special=2 * sum(shape) * SINKHORN_ROUNDS, bytes=traffic)  # fmt: skip


def _descent(c: Counts, la: Layer, cfg: Config) -> None:
    """The optimizer step of a float weight. ste is AdamW or Muon; Muon has AdamW for what is not hidden."""
    n = la.size
    if cfg.weight_decay:
        c.add("update", fp32_mul=n)
    if cfg.under_muon and la.hidden:
        # Momentum (SWAN: rows to unit norm), then Nesterov's mixture; the gradient is read, a bf16 matrix written.
        kept = {"fp32": 4, "int8": 1, "none": 0}[cfg.muon_state]
        c.add("update", fp32_mul=2 * n, fp32_add=4 * n, bytes=(4 + 2 * kept + 2) * n)
        _newton_schulz(c, la.shape, "bf16", 2, 2)
        c.add("update", fp32_mul=n, fp32_add=n, bytes=(2 + 4 + 4) * n)
        return
    mul, add, special, moved = UPDATES[cfg.method if cfg.method in UPDATES else "adamw"]
    c.add("update", fp32_mul=mul * n, fp32_add=add * n, special=special * n, bytes=moved * n)


def _attention(c: Counts, at: Attention, cfg: Config) -> None:
    """Queries and keys normalised and rotated; then the scores, softmax and mixture of values, and their way back."""
    kind, value = ("bf16", 2) if _half(cfg) else ("fp32", 4)
    rows = at.sequences * at.length * at.heads
    n, pairs = rows * at.head_dim, at.sequences * at.heads * at.pairs
    # Both ways for q and k: the norm (2 multiplies and an add; 4 and 2) and the rotation (2 and 1 each way).
    c.add("attention", fp32_mul=2 * ((2 + 4 + 2 + 2) * n + 2 * rows), fp32_add=2 * (1 + 2 + 1 + 1) * n,
          special=4 * rows, bytes=2 * value * (2 + 3) * n + 4 * 4 * rows)  # fmt: skip
    # Forwards q k and p v; backwards q k again, dy v, p dy, ds k, ds q.
    c.products("attention", kind, (2 + 5) * pairs * at.head_dim)
    # Scale, largest, difference, exp, sum; backwards scale, difference, exp, then p (dp - d) scaled.
    c.add("attention", fp32_mul=(1 + 3) * pairs, fp32_add=(3 + 2) * pairs, special=2 * pairs)
    # / sum forwards, d = dy . y backwards; q k v y, then q k v y dy and dq dk dv; sums' logarithms.
    c.add("attention", fp32_mul=2 * n, fp32_add=n, special=2 * rows, bytes=value * (4 + 8) * n + 2 * 4 * rows)


def _loss(c: Counts, net: Net, cfg: Config) -> None:
    """Cross-entropy: largest, difference, exp, sum, logarithm; backwards difference, exp, scale. And pooling."""
    n, value = net.loss_rows * net.classes, 2 if _half(cfg) else 4
    c.add("loss", fp32_mul=n, fp32_add=4 * n + 2 * net.loss_rows, special=2 * n + net.loss_rows,
          bytes=3 * value * n + (8 + 4 + 8 + 4) * net.loss_rows)  # fmt: skip
    c.add("norms", fp32_mul=net.pooled, fp32_add=net.pooled, bytes=2 * value * net.pooled)


def _philox(c: Counts, net: Net) -> None:
    """Words of the batch, of delta's rows (once for all layers) and of the columns of every integer layer."""
    ints = [la for la in net.layers if la.integer]
    _draw(c, net.samples + max((la.rows for la in ints), default=0) + sum(la.outputs for la in ints))


def _draw(c: Counts, words: int) -> None:
    c.add("philox", philox=words, bytes=4 * words)


def per_million(counts: Counts, tokens: int, node: str) -> float:
    """Joules for a million tokens (or images), where one step sees `tokens`."""
    return counts.joules(node) * 1e6 / tokens


def summary(counts: Counts, steps: int, reading: Reading) -> dict[str, float | str | None]:
    """The energy keys of a run's final JSON: `counts` is one step, `steps` those made under the meter of `reading`."""
    return {
        "energy_model_joules": steps * counts.joules("45nm"), "energy_model_7nm_joules": steps * counts.joules("7nm"),
        "energy_measured_joules": reading.joules,
        "energy_note": f"modelled: training steps only, see docs/energy.md; measured: {reading.note}",
    }  # fmt: skip
