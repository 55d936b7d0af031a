"""The energy model against counts made by hand, and its products against what torch itself counts."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gft.baselines import FloatEmbedding, FloatLinear
from gft.layers import IntEmbedding, IntLayer
from kernels.scores import orthogonalise
from model import ModelConfig, Transformer, make_net
from run import energy
from run.config import Config
from run.energy import Counts, count, count_net, per_million, picojoules, summary
from run.meter import Reading
from run.workload import Attention, Layer, Net, mlp, transformer

SMALL = Config(n_layer=2, n_head=2, d_model=32, context=16, batch_size=4)


def only(layer: Layer, **settings) -> Counts:
    """A net of one layer and no loss."""
    return count_net(Net((layer,), (), samples=0, loss_rows=0, classes=0), Config(**settings))


def described(module: nn.Module, rows: Mapping[str, int]) -> tuple[Layer, ...]:
    """The layers of `module` in its order; `rows` is what each sees in a step, by name."""
    found: list[Layer] = []
    for name, m in module.named_modules():
        if isinstance(m, IntLayer | FloatLinear | FloatEmbedding):
            table = isinstance(m, IntEmbedding | FloatEmbedding)
            down, across = m.weight.shape
            found.append(Layer(
                *((down, across) if table else (across, down)), rows[name], isinstance(m, IntLayer), table,
                getattr(m, "squared_relu", False), name.endswith((".out", ".down")), bool(found) or table,
                name.startswith("blocks."),
            ))  # fmt: skip
    return tuple(found)


def ops(counts: Counts, part: str) -> dict[str, float]:
    """What was counted in one part, zeros left out."""
    return {operation: n for (p, operation), n in counts.numbers.items() if p == part and n}


# One linear layer of 3 inputs and 2 outputs sees 5 rows: 5 * 3 * 2 = 30 products, 15 inputs, 10 outputs, 6 weights.
LINEAR = Layer(3, 2, 5)
FLOAT = dataclasses.replace(LINEAR, integer=False)


def test_integer_matrix_products():
    c = only(LINEAR)
    # y = 30 products and 10 scalings; X 15 bytes, W 6, y 4 * 10.
    assert ops(c, "forward") == {"int8_mul": 30, "int32_add": 30, "fp32_mul": 10, "bytes": 15 + 6 + 40}
    # D W: 30 products and 15 scalings; D 10 bytes, W 6, int32 result 4 * 15.
    assert ops(c, "delta") == {"int8_mul": 30, "int32_add": 30, "fp32_mul": 15, "bytes": 10 + 6 + 60}
    # D^T X: 30 products; D 10 bytes, X 15, int32 result 4 * 6.
    assert ops(c, "votes") == {"int8_mul": 30, "int32_add": 30, "bytes": 10 + 15 + 24}
    # bf16 between layers: y is 20 bytes, the delta handed on 30; votes stay int32.
    half = only(LINEAR, precision="bf16")
    assert half.of("bytes", "forward") == 15 + 6 + 20
    assert half.of("bytes", "delta") == 10 + 6 + 30
    assert half.of("bytes", "votes") == 49
    # A float layer beside integer ones stays fp32.
    assert only(FLOAT, precision="bf16").of("fp32_add", "votes") == 30


def test_a_product_with_a_weight_of_one_or_two_bits_is_an_add():
    assert ops(only(LINEAR, bits=2, levels=4), "forward") != ops(only(LINEAR, bits=2), "forward"), "-3 and 3 multiply"
    for few in (only(LINEAR, bits=2), only(LINEAR, bits=1)):
        assert ops(few, "forward") == {"int32_add": 30, "fp32_mul": 10, "bytes": 15 + 6 + 40}
        assert ops(few, "delta") == {"int32_add": 30, "fp32_mul": 15, "bytes": 10 + 6 + 60}
        assert ops(few, "votes") == ops(only(LINEAR), "votes")
    assert ops(only(FLOAT, method="ste", bits=2), "forward") == {"fp32_mul": 10, "fp32_add": 30, "bytes": 4 * 31}
    assert ops(only(FLOAT, method="ste", bits=3), "forward")["fp32_mul"] == 40
    assert ops(only(FLOAT, method="adamw", bits=2), "forward")["fp32_mul"] == 40
    assert ops(only(FLOAT, bits=2), "forward")["fp32_mul"] == 40, "a float layer beside integer ones"


def test_float_matrix_products():
    c = only(FLOAT, method="adamw")
    # 30 products and 10 multiplications by the gain each way; all of 4 bytes: 15 + 6 + 10 numbers in each product.
    assert ops(c, "forward") == {"fp32_mul": 30 + 10, "fp32_add": 30, "bytes": 4 * 31}
    assert ops(c, "delta") == {"fp32_mul": 30 + 10, "fp32_add": 30, "bytes": 4 * 31}
    assert ops(c, "votes") == {"fp32_mul": 30, "fp32_add": 30, "bytes": 4 * 31}
    half = only(FLOAT, method="adamw", precision="bf16")
    # 31 numbers of 2 bytes, and 6 weights read in fp32 and written in bf16: 6 * (4 + 2).
    assert ops(half, "forward") == {"bf16_mul": 30, "fp32_mul": 10, "fp32_add": 30, "bytes": 2 * 31 + 36}
    # The gradient stays 4 bytes: 2 * (15 + 10) + 4 * 6.
    assert ops(half, "votes") == {"bf16_mul": 30, "fp32_add": 30, "bytes": 50 + 24}


def test_norms():
    # Forwards: square, x / rms: 2 * 15 multiplies and a mean for each of 5 rows; 15 adds; 2 specials a row; x 60 bytes
    # read, X 15 written, 20 of 1 / rms. Backwards 4 * 15 + 5 multiplies, 30 adds; accumulator, x, result: 3 * 60 + 20.
    assert ops(only(LINEAR), "norms") == {
        "fp32_mul": 30 + 5 + 60 + 5, "fp32_add": 15 + 30, "special": 10, "bytes": 60 + 15 + 20 + 180 + 20}  # fmt: skip
    # fp32: x^ is 60 bytes instead of 15.
    assert ops(only(FLOAT, method="adamw"), "norms")["bytes"] == 60 + 60 + 20 + 180 + 20
    # bf16 between layers: x 30, X 15, 20; accumulator, x, result 3 * 30, 20.
    assert ops(only(LINEAR, precision="bf16"), "norms")["bytes"] == 30 + 15 + 20 + 90 + 20
    first = only(dataclasses.replace(LINEAR, hands_on=False))
    assert ops(first, "norms") == {"fp32_mul": 35, "fp32_add": 15, "special": 10, "bytes": 95}
    assert not ops(first, "delta")
    squared = only(dataclasses.replace(LINEAR, squared_relu=True))
    # A comparison and a square; backwards a comparison and three products: of 15 numbers.
    assert ops(squared, "norms")["fp32_mul"] == 100 + 60
    assert ops(squared, "norms")["fp32_add"] == 45 + 30
    # A residual sum of 10 each way, and 10 numbers of 4 bytes more to read each way.
    joined = only(dataclasses.replace(LINEAR, residual=True))
    assert ops(joined, "norms")["fp32_add"] == 45 + 20
    assert ops(joined, "norms")["bytes"] == 295 + 80


def test_rounding():
    # X: 15 scalings, 15 roundings, 30 comparisons. delta: 10 of largest, + dither, floor and two of clipping (50);
    # divided, dither scaled (20); dither added and masked (20). Bytes: 40 for the maximum, 40 read, 10 written, words
    # 4 * (5 + 2).
    expected = {"fp32_mul": 15 + 20, "fp32_add": 45 + 50, "int32_add": 20, "bytes": 40 + 40 + 10 + 28}
    assert ops(only(LINEAR), "rounding") == expected
    assert ops(only(LINEAR, delta_scale="delayed"), "rounding")["bytes"] == 118 - 40
    assert ops(only(LINEAR, delta="sign"), "rounding")["bytes"] == 118 + 10
    assert ops(only(LINEAR, precision="bf16"), "rounding")["bytes"] == 20 + 20 + 10 + 28
    # ste rounds 6 weights: read for the largest, read again, written, 12 bytes each.
    ste = only(FLOAT, method="ste")
    assert ops(ste, "rounding") == {"fp32_mul": 12, "fp32_add": 24, "bytes": 72}
    # Under bf16 the rounded weight is written in 2 bytes.
    half = only(FLOAT, method="ste", precision="bf16")
    assert ops(half, "rounding") == ops(ste, "rounding")
    assert ops(half, "forward")["bytes"] == ops(only(FLOAT, method="adamw", precision="bf16"), "forward")["bytes"]
    assert not ops(only(FLOAT, method="adamw"), "rounding")


def test_reading_fewer_bits_than_are_kept_is_paid_for():
    """Three adds and two bytes a weight, for each product that reads it."""
    plain, coarse = only(LINEAR, bits=4, keep_bits=4), only(LINEAR, bits=4)
    assert coarse.of("int32_add", "rounding") - plain.of("int32_add", "rounding") == 3 * 2 * 6
    assert coarse.of("bytes", "rounding") - plain.of("bytes", "rounding") == 2 * 2 * 6
    first = only(dataclasses.replace(LINEAR, hands_on=False), bits=4)
    assert coarse.of("bytes", "rounding") - first.of("bytes", "rounding") == 2 * 6


def test_embedding():
    table = Layer(7, 4, 5, embedding=True)  # 7 rows of 4, read by 5 tokens of 8 bytes: 20 numbers, 28 weights
    c = only(table)
    assert ops(c, "embedding") == {"fp32_mul": 20, "bytes": 20 + 80 + 40}
    assert ops(c, "votes") == {"int32_add": 20, "bytes": 20 + 40 + 4 * 28}
    assert only(table, precision="bf16").of("bytes", "embedding") == 20 + 40 + 40
    f = only(dataclasses.replace(table, integer=False), method="adamw")
    assert ops(f, "embedding") == {"bytes": 80 + 80 + 40}
    assert ops(f, "votes") == {"fp32_add": 20, "bytes": 80 + 40 + 4 * 28}


def test_selection_and_moves():
    c = only(LINEAR, rule="gain")
    # 6 weights: legality 2 int8; 4 digits of 2, a threshold and a count of ties: 10 int32. Votes 24 bytes, W 6.
    assert ops(c, "selection") == {"int8_add": 12, "int32_add": 60, "bytes": 30}
    assert ops(c, "update") == {"int8_add": 18, "bytes": 6}
    # A whole layer of 300 * 300 weights (360,000 bytes of keys) is off the chip: keys written once, read 5 times.
    large = only(Layer(300, 300, 5), rule="gain", topk_tile=0)
    assert ops(large, "selection")["bytes"] == 90_000 * (4 + 1 + 6 * 4)
    # p = (s / largest)^2: a division and a power (2 specials), a maximum and a comparison; 6 words of 4 bytes.
    assert only(LINEAR, rule="gain", flip_prob="score").of("special", "selection") == 0
    drawn = only(LINEAR, rule="gain", flip_prob="score", flip_gamma=2.0, topk_tile=0)
    assert ops(drawn, "selection") == {"int8_add": 12, "int32_add": 60, "fp32_mul": 6, "fp32_add": 12, "special": 12,
                                       "bytes": 54}  # fmt: skip


def test_random_words():
    # 5 rows, 2 columns, one tile.
    assert ops(only(LINEAR, rule="gain"), "philox") == {"philox": 5 + 2 + 1, "bytes": 4 * 8}
    # Momentum: 64 + 64 for its one tile. Drawn flips: a whole tile of 64 * 64.
    assert only(LINEAR, rule="gain", momentum=0.9).of("philox") == 8 + 128
    assert only(LINEAR, rule="gain", flip_prob="score").of("philox") == 8 + 4096
    assert only(LINEAR, rule="gain", flip_prob="score", topk_tile=0).of("philox") == 8 + 6
    # 65 x 130 weights are 2 x 3 tiles of 64.
    assert only(Layer(130, 65, 5), rule="gain").of("philox") == 5 + 65 + 6
    # Rows are drawn once for all layers: 9 samples, 9 rows, 4 + 3 columns, 2 tiles; for fp32 only the samples.
    assert count_net(mlp([5, 4, 3], 9), Config(rule="gain")).of("philox") == 9 + 9 + 7 + 2
    assert count_net(mlp([5, 4, 3], 9, int_layers=()), Config(method="adamw")).of("philox") == 9


def test_momentum():
    c = only(LINEAR, rule="gain", momentum=0.9)
    # 6 weights: M 1 byte, V 4, evidence 4, M 1, and a scale of 4 read and written; 1 tile.
    assert ops(c, "momentum") == {"fp32_mul": 18, "fp32_add": 18, "special": 1, "bytes": 60 + 8}
    plain = ops(only(LINEAR, rule="gain"), "rounding")
    more = {o: n - plain[o] for o, n in ops(c, "rounding").items()}
    assert more == {"fp32_mul": 12, "fp32_add": 24, "int32_add": 12, "bytes": 512}


def test_orthogonalisation():
    # Whole 2 x 3 matrix, five steps: X X^T 2*2*3 = 12, A A 2*2*2 = 8, P X 12 products; b A + c A A is 2 * 4 multiplies
    # and 4 adds, a X + P X 6 and 6. To unit norm 12 multiplies, 6 adds, 2 specials. 24 bytes in, 24 out.
    c = only(LINEAR, rule="spectral", ortho_tile=0)
    assert ops(c, "orthogonalisation") == {
        "fp16_mul": 5 * 32, "fp32_mul": 12 + 5 * (8 + 6), "fp32_add": 6 + 5 * 32 + 5 * (4 + 6), "special": 2,
        "bytes": 48}  # fmt: skip
    # In a tile of 16 it is padded: 3 * 16^3 products a step.
    padded = ops(only(LINEAR, ortho_tile=16), "orthogonalisation")
    assert padded["fp16_mul"] == 5 * 3 * 16**3
    assert padded["bytes"] == 8 * 256
    # Muon has the same products in bf16, from and to 2 bytes, and none for what is not hidden.
    muon = only(dataclasses.replace(FLOAT, hidden=True), method="muon")
    assert ops(muon, "orthogonalisation")["bf16_mul"] == 160
    assert ops(muon, "orthogonalisation")["bytes"] == 24
    assert not ops(only(FLOAT, method="muon"), "orthogonalisation")
    # Latent weights under Muon are the same step; momentum is read and written in 4, 1 or 0 bytes.
    moved = [ops(only(dataclasses.replace(FLOAT, hidden=True), method="ste", ste_optimizer="muon", muon_state=state),
                 "update")["bytes"] for state in ("fp32", "int8", "none")]  # fmt: skip
    assert moved == [ops(muon, "update")["bytes"] - less * FLOAT.size for less in (0, 6, 8)]
    # 512 x 512 (three matrices of 512 KiB) is off the chip: norm 4 read, scaling 4 read 2 written; five steps of 2
    # bytes: X, A | A, P | P, X, X; the last result is 4 bytes.
    n = 512 * 512
    spilled = ops(only(Layer(512, 512, 1), ortho_tile=0), "orthogonalisation")
    assert spilled["bytes"] == n * (4 + 4 + 2 + 5 * 2 * 7 + 2)


def test_what_stays_on_the_chip(monkeypatch):
    def traffic(limit: int, part: str, **settings) -> int:
        monkeypatch.setattr(energy, "ON_CHIP_BYTES", limit)
        return only(LINEAR, **settings).of("bytes", part)

    # 2 x 3: 6 numbers of 2 bytes and two squares of 4. Keys and balanced scores: 6 numbers of 4 bytes.
    assert traffic(28, "orthogonalisation", ortho_tile=0) == 48 < traffic(27, "orthogonalisation", ortho_tile=0)
    assert traffic(24, "orthogonalisation", rule="balanced") == 48
    # Six passes, each a norm (4 bytes a number) and a scaling (read and written).
    assert traffic(23, "orthogonalisation", rule="balanced") == 6 * 6 * 12
    assert traffic(24, "selection", rule="gain", topk_tile=0) == 30
    assert traffic(23, "selection", rule="gain", topk_tile=0) == 30 + 6 * 24
    # A tile's keys are 4 bytes of its side squared, whatever of it is used.
    assert traffic(256, "selection", rule="gain", topk_tile=8) == 30
    assert traffic(255, "selection", rule="gain", topk_tile=8) == 30 + 6 * 24
    monkeypatch.undo()
    assert energy.ON_CHIP_BYTES == 262_144


def test_balanced_and_contribution():
    # Six passes over 6 weights: square, sum, scale; three times 2 specials for each of 2 rows and 3 columns.
    c = only(LINEAR, rule="balanced")
    assert ops(c, "orthogonalisation") == {"fp32_mul": 72, "fp32_add": 36, "special": 30, "bytes": 48}
    # W V in 64 bits: V 24 bytes, W 6, S 48; the selection then reads 8 bytes a score.
    c = only(LINEAR, rule="contribution")
    assert ops(c, "orthogonalisation") == {"int32_mul": 6, "int32_add": 12, "bytes": 78}
    assert ops(c, "selection")["bytes"] == 48 + 6
    # The embedding has a rule of its own.
    table = Layer(3, 2, 5, embedding=True)
    assert ops(only(table, rule="gain", embedding_rule="balanced"), "orthogonalisation")["fp32_mul"] == 72


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # m 1 * and 2 +; v 3 * and 1 +; root, * and + eps; division, 2 * and 1 +. g, w, m, v read; w, m, v written.
        ("adamw", {"fp32_mul": 42, "fp32_add": 30, "special": 12, "bytes": 6 * 28}),
        ("ste", {"fp32_mul": 42, "fp32_add": 30, "special": 12, "bytes": 6 * 28}),
        ("sgd", {"fp32_mul": 12, "fp32_add": 12, "bytes": 6 * 20}),
        ("signsgd", {"fp32_add": 6, "bytes": 6 * 12}),
        # Momentum and Nesterov 2 * and 4 +, the step 1 and 1. g, m read, m written, 2 bytes out; 2 in, w read, written.
        ("muon", {"fp32_mul": 18, "fp32_add": 30, "bytes": 6 * (14 + 10)}),
    ],
)
def test_float_updates(method, expected):
    layer = dataclasses.replace(FLOAT, hidden=True)
    assert ops(only(layer, method=method), "update") == expected
    decayed = ops(only(layer, method=method, weight_decay=0.1), "update")
    assert decayed["fp32_mul"] == expected.get("fp32_mul", 0) + 6


def test_attention():
    # 1 sequence of 3, 2 heads of 4, causal: 6 pairs a head, 12 in all; q, k, v: 3 * 2 * 4 = 24 numbers in 6 rows.
    at = Attention(1, 3, 2, 4, window=3)
    assert at.pairs == 1 + 2 + 3
    c = ops(count_net(Net((), (at,), 0, 0, 0), Config()), "attention")
    # 7 products of 4 a pair (336). q and k: 10 multiplies a number and 2 a row, 5 adds. Softmax 4 and 5 a pair. / sum
    # and dy . y: 2 and 1 a number.
    assert c["fp32_mul"] == 336 + 2 * (240 + 12) + 48 + 48
    assert c["fp32_add"] == 336 + 2 * 120 + 60 + 24
    # Roots and reciprocals of q's and k's rows, reciprocals and logarithms of the sums; exp twice a pair.
    assert c["special"] == 4 * 6 + 2 * 6 + 2 * 12
    # q, k: 2 + 3 times 2 * 96 bytes, 1 / rms 4 * 24; then 4 + 8 times 96 and the logarithms 2 * 24.
    assert c["bytes"] == 5 * 192 + 96 + 12 * 96 + 48
    half = ops(count_net(Net((), (at,), 0, 0, 0), Config(method="adamw", precision="bf16")), "attention")
    assert half["bf16_mul"] == 336 and half["bytes"] == (5 * 192 + 12 * 96) / 2 + 96 + 48
    assert Attention(1, 5, 1, 4, window=2).pairs == 1 + 2 + 2 + 2 + 2
    assert Attention(1, 5, 1, 4).pairs == 25


def test_loss():
    c = ops(count_net(Net((), (), 0, 5, 7), Config()), "loss")
    # 35 logits: largest, difference, sum, and a difference backwards; exp both ways; 5 rows.
    assert c == {"fp32_mul": 35, "fp32_add": 140 + 10, "special": 70 + 5, "bytes": 3 * 140 + 5 * 24}
    half = count_net(Net((), (), 0, 5, 7), Config(method="adamw", precision="bf16"))
    assert half.of("bytes", "loss") == 3 * 70 + 5 * 24
    # 30 values are averaged over a sequence: read, and their delta written.
    assert ops(count_net(Net((), (), 0, 0, 0, 30), Config()), "norms") == {"fp32_mul": 30, "fp32_add": 30, "bytes": 240}


def test_micro_batches_read_weights_again_and_add():
    once, thrice = only(LINEAR, rule="gain"), only(LINEAR, rule="gain", grad_accum=3)
    assert thrice.of("bytes", "forward") - once.of("bytes", "forward") == 2 * 6
    # Two more times the sum of 24 bytes is read and written, and 6 numbers are added.
    assert thrice.of("bytes", "votes") - once.of("bytes", "votes") == 2 * 48
    assert thrice.of("int32_add", "votes") - once.of("int32_add", "votes") == 12
    assert thrice.of("int8_mul") == once.of("int8_mul")


def test_published_energies():
    # 45 nm: int8 0.2 + 0.1, fp32 3.7 + 0.9; 640 pJ for 4 bytes.
    c = Counts()
    c.products("forward", "int8", 1000)
    c.products("votes", "fp32", 10)
    c.add("update", bytes=8)
    assert c.joules("45nm") == pytest.approx(1e-12 * (1000 * 0.3 + 10 * 4.6 + 2 * 640))
    assert c.by_part("45nm")["update"] == {"operations": 0, "memory": pytest.approx(1280e-12)}
    # 7 nm: 0.07 + 0.03, 1.31 + 0.38; 415 pJ for 8 bytes.
    assert c.joules("7nm") == pytest.approx(1e-12 * (1000 * 0.1 + 10 * 1.69 + 415))
    assert per_million(c, 1_000_000, "7nm") == pytest.approx(c.joules("7nm"))
    assert per_million(c, 500, "7nm") == pytest.approx(2000 * c.joules("7nm"))
    assert picojoules("special", "45nm") == pytest.approx(4 * 4.6)
    assert picojoules("philox", "45nm") == pytest.approx(5 * 3.1 + 14.5 * 0.1)
    with pytest.raises(ValueError, match="int9_mul"):
        c.add("forward", int9_mul=1)
    with pytest.raises(ValueError, match="backward"):
        c.add("backward", bytes=1)


def test_counts_of_a_config_are_those_of_its_net():
    for method in ("gft", "adamw", "muon", "ste"):
        cfg = dataclasses.replace(SMALL, method=method)
        net = Transformer(ModelConfig.from_config(cfg, 65))
        at = Attention(4, 16, 2, 16, window=16)
        found = Net(described(net, defaultdict(lambda: 64)), (at, at), 4, 64, 65)
        assert count_net(found, cfg).numbers == count(cfg, 65).numbers
        # 24 d^2 products a token and block forwards (12 weights), and the head's.
        assert sum(la.size for la in found.layers) == 2 * 12 * 32**2 + 2 * 65 * 32


def test_images_and_layers_left_in_fp32():
    vit = dataclasses.replace(SMALL, data="mnist", patch=7, int_layers="patch,head")
    mlp_config = dataclasses.replace(vit, model="mlp", int_layers="all")
    for cfg, rows, at in ((vit, 64, Attention(4, 16, 2, 16)), (mlp_config, 4, None)):
        net = make_net(ModelConfig.from_config(cfg, 10, (28, 28, 1)))
        by_name = {name: rows for name, _ in net.named_modules()} | {"head": 4}
        # The ViT's 16 patches of 32 values an image are averaged.
        found = Net(described(net, by_name), (at, at) if at else (), 4, 4, 10, pooled=64 * 32 if at else 0)
        assert count_net(found, cfg).numbers == count(cfg, 10, (28, 28, 1)).numbers
    # 7 * 7 pixels and a constant to 32 in 64 rows, forwards and for votes; the head's 32 * 10 in 4 rows three times.
    assert count(vit, 10, (28, 28, 1)).of("int8_mul") == 2 * 64 * 50 * 32 + 3 * 4 * 320


def test_products_of_all_methods_are_the_same_number():
    def products(method: str) -> float:
        counts = count(dataclasses.replace(SMALL, method=method), 65)
        return counts.of("int8_mul", "forward") or counts.of("fp32_add", "forward")

    # 64 tokens through 2 blocks of 12 * 32^2 weights and a head of 65 * 32.
    assert {products(m) for m in ("gft", "adamw", "muon", "ste")} == {64 * (2 * 12 * 1024 + 65 * 32)}


def test_torch_counts_the_same_products():
    cfg = dataclasses.replace(SMALL, method="adamw")
    net = Transformer(ModelConfig.from_config(cfg, 65))
    with FlopCounterMode(display=False) as torch_counts:
        net(torch.zeros(4, 16, dtype=torch.int64)).sum().backward()
    c = count(cfg, 65)
    # A product is two operations to torch. Ours are the adds: only products add in these parts.
    ours = sum(c.of("fp32_add", part) for part in ("forward", "delta")) + c.of("fp32_add", "votes") - 64 * 32
    assert torch_counts.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * ours  # 64 * 32: the embedding's adds

    with FlopCounterMode(display=False) as torch_counts:
        orthogonalise(torch.randn(24, 40))
    ours = only(Layer(24, 40, 1), ortho_tile=0).of("fp16_mul")
    assert torch_counts.get_total_flops() == 2 * ours


@pytest.mark.parametrize("method", ["gft", "adamw", "muon", "ste"])
def test_scaling(method):
    def work(**changes) -> Counts:
        return count(dataclasses.replace(SMALL, method=method, **changes), 65)

    once, twice = work(), work(batch_size=8)
    for part in ("attention", "loss", "norms"):
        assert twice.by_part("45nm")[part]["operations"] == pytest.approx(2 * once.by_part("45nm")[part]["operations"])
    # What is done once a step does not grow with the batch.
    for part in ("orthogonalisation", "selection", "update"):
        assert twice.by_part("7nm")[part] == once.by_part("7nm")[part]
    # Memory of the products grows by less than double: weights are read once.
    assert 1.5 < twice.of("bytes", "forward") / once.of("bytes", "forward") < 2
    deep = work(n_layer=4)
    assert deep.of("special", "attention") == 2 * once.of("special", "attention")


def test_hybrid_nets_mix_both():
    shape = {"sequences": 2, "length": 4, "d_model": 8, "n_layer": 1, "n_head": 2, "classes": 3, "patch": 6}
    net = transformer(**shape, int_layers=("mlp",))
    assert [la.integer for la in net.layers] == [False, False, False, True, True, False]
    # Only the MLP, 2 * 4 * 8 * 8 weights, is multiplied in int8 (8 rows, three products); the rest has moments.
    c = count_net(net, Config(rule="gain"))
    assert c.of("int8_mul") == 3 * 8 * 512
    # patch 6 * 8, qkv 8 * 24, out 8 * 8, head 8 * 3: 28 bytes each; the MLP's 512 of one byte.
    assert c.of("bytes", "update") == 28 * (48 + 192 + 64 + 24) + 512
    assert net.loss_rows == 2 and net.layers[-1].rows == 2 and not net.layers[0].hands_on


def test_summary_is_the_steps_times_the_model():
    c = count(SMALL, 65)
    found = summary(c, 7, Reading(12.5, "RAPL"))
    assert found["energy_model_joules"] == pytest.approx(7 * c.joules("45nm"))
    assert found["energy_model_7nm_joules"] == pytest.approx(7 * c.joules("7nm"))
    assert found["energy_measured_joules"] == 12.5
    assert summary(c, 7, Reading(None, "n/a: why"))["energy_measured_joules"] is None
    assert "n/a: why" in summary(c, 7, Reading(None, "n/a: why"))["energy_note"]


def test_every_operation_has_a_price_at_every_node():
    names = ("int8_add", "int8_mul", "int32_add", "int32_mul", "bf16_add", "bf16_mul", "fp16_add", "fp16_mul",
             "fp32_add", "fp32_mul")  # fmt: skip
    published = {
        "45nm": (0.03, 0.2, 0.1, 3.1, 0.4, 1.1, 0.4, 1.1, 0.9, 3.7, 640 / 4),
        "7nm": (0.007, 0.07, 0.03, 1.48, 0.11, 0.21, 0.16, 0.34, 0.38, 1.31, (350 + 480) / 2 / 8),
    }
    assert energy.TABLES == {node: dict(zip((*names, "bytes"), row, strict=True)) for node, row in published.items()}
    old, new = energy.TABLES["45nm"], energy.TABLES["7nm"]
    # A newer process is cheaper in all, by the published 2.1 (int32 multiply) to 4.3 times (int8 add), 5.3 for bf16.
    assert set(old) == set(new) and all(2 < old[o] / new[o] < 5.3 for o in old)
    # Within a process energy grows with width.
    for table in (old, new):
        widths = [table[o] for o in ("int8_add", "int32_add", "bf16_add", "fp16_add", "fp32_add", "fp32_mul", "bytes")]
        assert widths == sorted(widths)
        widths = [table[o] for o in ("int8_mul", "bf16_mul", "fp16_mul", "fp32_mul", "bytes")]
        assert widths == sorted(widths)
