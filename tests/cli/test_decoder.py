"""decoder.py: the net of model.py in numpy, against that net."""

import math

import numpy as np
import pytest
import torch

from decoder import CHUNK, Decoder, read_weight, supports
from gft import weight_grid
from kernels.limits import threshold_of
from model import ModelConfig, make_net
from run.config import Config

VOCAB = 23
SMALL = dict(n_layer=2, n_head=2, d_model=32, context=8)


def make(seed: int = 1, **settings) -> tuple[torch.nn.Module, Decoder]:
    """A net with weights all over its grid, and a decoder of the same."""
    cfg = Config(**SMALL | settings)
    net = make_net(ModelConfig.from_config(cfg, VOCAB), seed)
    return net, Decoder({name: t.numpy() for name, t in net.state_dict().items()}, cfg, VOCAB)


def text(count: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, count))


def logits(net, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return net(torch.from_numpy(tokens))[:, -1].numpy()


@pytest.mark.parametrize("settings", [
    {}, {"bits": 8}, {"bits": 4}, {"bits": 2}, {"bits": 1}, {"bits": 2, "keep_bits": 2}, {"bits": 3, "keep_bits": 7},
    {"act_range": 3.0, "n_head": 4}, {"bits": 2, "init_std": 0.2},
], ids=str)  # fmt: skip
def test_logits_are_the_nets_past_the_context(settings):
    net, decoder = make(**settings)
    tokens = text(21)
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 17), (17, 18), (18, 21)):
        found, wanted = decoder.feed(tokens[:, first:last]), logits(net, tokens[:, :last])
        assert found.shape == (1, VOCAB) and found.dtype == np.float32
        # A last digit can take an activation to the next of its 255 values; most often it does not.
        assert np.abs(found - wanted).max() < 0.1 and np.median(np.abs(found - wanted)) < 1e-4


def test_a_long_prompt_in_parts_is_the_prompt_token_by_token():
    _, decoder = make(context=300)
    _, other = make(context=300)
    tokens = text(CHUNK + 40)
    whole = decoder.feed(tokens)
    for token in tokens.T:
        alone = other.feed(token[None])
    np.testing.assert_allclose(whole, alone, atol=0.05)
    assert decoder.seen == other.seen == CHUNK + 40


def test_texts_go_on_from_one_prompt_each_as_if_alone():
    _, together = make()
    together.feed(text(12))
    together.repeat(3)
    going_on = text(9, rows=3, seed=1)
    singles = []
    for row in going_on:
        _, alone = make()
        alone.feed(text(12))
        singles.append([alone.feed([[token]])[0] for token in row])
    for step, tokens in enumerate(going_on.T):
        assert np.array_equal(together.feed(tokens[:, None]), np.stack([single[step] for single in singles]))


@pytest.mark.parametrize("bits, keep, levels", [
    *((b, k, 3) for k in (2, 3, 6, 8) for b in range(1, k + 1)), (2, 3, 4), (2, 6, 4),
])  # fmt: skip
def test_what_is_read_of_a_weight_is_what_the_layers_read(bits, keep, levels):
    cfg = Config(bits=bits, keep_bits=keep, init_std=0.4, levels=levels)
    q = 2 ** (keep - 1) - 1
    weight = np.arange(-q, q + 1, dtype=np.int8)
    wanted = weight_grid.read_weight(torch.from_numpy(weight), bits, keep, threshold_of(keep, 0.4, levels), levels)
    assert np.array_equal(read_weight(weight, cfg), wanted.numpy())


def test_sums_are_exact_however_large():
    net, decoder = make(bits=8, d_model=512, n_head=2, n_layer=1, context=4)
    assert decoder.blocks[0]["down"].weight.dtype == np.float64 and decoder.head.weight.dtype == np.float32
    tokens = text(3)
    assert np.abs(decoder.feed(tokens) - logits(net, tokens)).max() < 0.1


def test_rows_of_zeros_stay_zeros():
    _, decoder = make()
    assert not decoder.head(np.zeros((2, 32), np.float32)).any()


def test_which_nets_it_runs():
    assert supports(Config()) and supports(Config(bits=2))
    for other in (dict(method="adamw"), dict(method="ste"), dict(int_layers="mlp"), dict(precision="bf16"),
                  dict(data="mnist", model="mlp")):  # fmt: skip
        assert not supports(Config(**other)), other


@pytest.mark.parametrize("name, change, says", [
    ("head.weight", None, "head is not"), ("head.weight", lambda w: w[:-1], "head is not"),
    ("blocks.1.up.weight", lambda w: w.float(), "blocks.1.up is not"), ("head.scale", lambda s: s[None], "one scale"),
    ("embedding.weight", lambda w: w + 32, "beyond 6 bits"), ("blocks.0.qkv.weight", lambda w: w * 0 - 128, "beyond"),
    ("more", lambda w: torch.zeros(1), "more belong to no layer"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(name, change, says):
    cfg = Config(**SMALL)
    state = make_net(ModelConfig.from_config(cfg, VOCAB), 1).state_dict()
    state[name] = change(state.get(name)) if change else state.pop(name)
    if change is None:
        del state[name]
    with pytest.raises(ValueError, match=says):
        Decoder({name: t.numpy() for name, t in state.items()}, cfg, VOCAB)


def test_the_last_token_of_a_chunk_sees_the_whole_window():
    """A token outside the window changes nothing; the oldest inside does."""
    _, decoder = make(n_layer=1)
    tokens = text(20)
    before, inside = tokens.copy(), tokens.copy()
    before[0, 11], inside[0, 12] = (tokens[0, 11] + 1) % VOCAB, (tokens[0, 12] + 1) % VOCAB
    results = []
    for variant in (tokens, before, inside):
        decoder.caches, decoder.seen = [(cache[0][:, :, :0], cache[1][:, :, :0]) for cache in decoder.caches], 0
        results.append(decoder.feed(variant))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])
    assert math.isfinite(results[0].sum())
