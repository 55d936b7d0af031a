"""The shape of a net and of its training step, as run/energy.py counts it: layers, attention, loss.

    transformer(sequences=48, length=64, d_model=128, n_layer=4, n_head=4, classes=65, vocab=65, window=64)
    mlp([784, 256, 10], samples=128)
    Net((Layer(784, 10, rows=128),), attentions=(), samples=128, loss_rows=128, classes=10)      any other
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from run.config import LAYER_KINDS, Config


@dataclass(frozen=True)
class Layer:
    """A weight matrix and the rows it sees in a step.

    A linear layer takes `inputs` to `outputs`; an embedding has `inputs` rows of width `outputs`. `residual`: its
    output joins a residual stream. `hands_on`: delta goes on to its input. `hidden`: one of those Muon trains.
    """

    inputs: int
    outputs: int
    rows: int
    integer: bool = True
    embedding: bool = False
    squared_relu: bool = False
    residual: bool = False
    hands_on: bool = True
    hidden: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, as stored."""
        return (self.inputs, self.outputs) if self.embedding else (self.outputs, self.inputs)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """Self-attention of one block over `sequences` of `length`: causal over the last `window`, or (0) all to all."""

    sequences: int
    length: int
    heads: int
    head_dim: int
    window: int = 0

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head in one sequence."""
        return sum(min(i + 1, self.window) for i in range(self.length)) if self.window else self.length**2


@dataclass(frozen=True)
class Net:
    """A net as the model sees it, in one step: `samples` drawn, `loss_rows` predictions over `classes`.

    `pooled` is the number of values that are averaged over a sequence in front of the head.
    """

    layers: tuple[Layer, ...]
    attentions: tuple[Attention, ...]
    samples: int
    loss_rows: int
    classes: int
    pooled: int = 0


def transformer(
    *, sequences: int, length: int, d_model: int, n_layer: int, n_head: int, classes: int, vocab: int = 0,
    patch: int = 0, window: int = 0, int_layers: Sequence[str] = LAYER_KINDS,
) -> Net:  # fmt: skip
    """model.py's net: over `vocab` tokens with a prediction for each, or patches of `patch` values, one an image."""
    rows, d = sequences * length, d_model
    ints = {kind: kind in int_layers for kind in LAYER_KINDS}
    if vocab:
        layers = [Layer(vocab, d, rows, ints["embedding"], embedding=True)]
    else:
        layers = [Layer(patch, d, rows, ints["patch"], hands_on=False)]
    for _ in range(n_layer):
        layers += [
            Layer(d, 3 * d, rows, ints["attention"], hidden=True),
            Layer(d, d, rows, ints["attention"], residual=True, hidden=True),
            Layer(d, 4 * d, rows, ints["mlp"], hidden=True),
            Layer(4 * d, d, rows, ints["mlp"], squared_relu=True, residual=True, hidden=True),
        ]
    predictions = rows if vocab else sequences
    layers.append(Layer(d, classes, predictions, ints["head"]))
    attention = Attention(sequences, length, n_head, d // n_head, window)
    return Net(tuple(layers), (attention,) * n_layer, sequences, predictions, classes, 0 if vocab else rows * d)


def mlp(widths: Sequence[int], samples: int, int_layers: Sequence[str] = LAYER_KINDS) -> Net:
    """model.py's MLP: linear layers of these widths, the last the head; a squared ReLU before all but the first."""
    last = len(widths) - 2
    layers = (
        Layer(i, o, samples, ("head" if n == last else "mlp") in int_layers, squared_relu=n > 0, hands_on=n > 0,
              hidden=n < last)
        for n, (i, o) in enumerate(pairwise(widths))
    )  # fmt: skip
    return Net(tuple(layers), (), samples, samples, widths[-1])


def net_of(config: Config, outputs: int, image: tuple[int, int, int] | None = None) -> Net:
    """The net of a Config; outputs: the size of the vocabulary, or classes of images (height, width, channels)."""
    ints = config.integer_kinds
    if config.model == "mlp":
        return mlp([math.prod(image), *[config.d_model] * config.n_layer, outputs], config.batch_size, ints)
    shape = {"sequences": config.batch_size, "d_model": config.d_model, "n_layer": config.n_layer,
             "n_head": config.n_head, "classes": outputs, "int_layers": ints}  # fmt: skip
    if image is None:
        return transformer(length=config.context, window=config.context, vocab=outputs, **shape)
    patches = image[0] * image[1] // config.patch**2
    # A patch comes with a constant beside its pixels.
    return transformer(length=patches, patch=config.patch**2 * image[2] + 1, **shape)
