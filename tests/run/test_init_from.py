"""run/init_from.py: weights of another run, bit for bit or on another grid; rows of tokens and classes by name."""

import base64
import dataclasses

import pytest
import torch

from gft.layers import IntLinear
from model import ModelConfig, make_net
from run.config import Config
from run.errors import UserError
from run.init_from import check_shape, names_of, take_weights, to_grid

TEXT = ModelConfig(12, n_layer=2, n_head=2, d_model=32, context=8)
IMAGES = ModelConfig(3, n_layer=2, n_head=2, d_model=32, image=(8, 8, 1), patch=4)
LETTERS = {"tokenizer": {"kind": "char", "chars": "abcdefghijkl"}}
TOKENS = torch.arange(8)[None]


def net(config=TEXT, seed=1, **changes):
    return make_net(dataclasses.replace(config, **changes), seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [
    {}, {"bits": 2, "init_std": 0.6}, {"method": "adamw"}, {"method": "ste", "bits": 2},
], ids=["gft", "ternary", "adamw", "ste"])  # fmt: skip
def test_the_same_kind_of_net_is_copied_bit_for_bit(changes):
    old, new = net(seed=5, **changes), net(seed=1, **changes)
    assert not torch.equal(old(TOKENS), new(TOKENS))
    assert take_weights(new, old, LETTERS, LETTERS) == []
    assert torch.equal(old(TOKENS), new(TOKENS))


@pytest.mark.parametrize("there, here, nearness", [
    ({"method": "adamw"}, {}, 0.99), ({}, {"method": "adamw"}, 0.999), ({}, {"bits": 8}, 0.999),
    ({}, {"bits": 4, "init_std": 0.5}, 0.95), ({"method": "adamw"}, {"bits": 2, "init_std": 0.6}, 0.6),
    ({"method": "ste", "bits": 4}, {"bits": 4, "init_std": 0.5}, 0.999), ({}, {"int_layers": ("mlp",)}, 0.999),
    ({"bits": 4, "init_std": 0.5}, {"bits": 6}, 0.99), ({"bits": 1}, {"bits": 6}, 0.999), ({}, {"bits": 2}, 0.6),
    ({"bits": 1, "keep_bits": 1}, {"bits": 6}, 0.999), ({"bits": 2}, {"bits": 2, "keep_bits": 2}, 0.99),
    ({"bits": 2, "levels": 4}, {"bits": 6}, 0.999),
], ids=["float 6", "6 float", "6 8", "6 4", "float 2", "ste 4", "hybrid", "4 6", "1 6", "6 2", "1 kept 6", "2 2 kept",
        "four 6"])  # fmt: skip
def test_another_kind_of_net_gives_about_the_same(there, here, nearness):
    """Logits point the same way, and are as large."""
    old, new = net(seed=5, **there), net(seed=1, **here)
    take_weights(new, old, LETTERS, LETTERS)
    a, b = old(TOKENS).detach().flatten(), new(TOKENS).detach().flatten()
    assert torch.cosine_similarity(a, b, dim=0) > nearness
    assert b.norm() / a.norm() == pytest.approx(1, abs=0.1 if nearness > 0.9 else 0.3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_to_grid(bits):
    q = max(1, 2 ** (bits - 1) - 1)
    matrix = normal(64, 48) * 0.03
    layer = IntLinear(48, 64, bits, keep_bits=bits)
    weight = to_grid(matrix, layer)
    scale = matrix.norm() / weight.float().norm()
    assert weight.dtype == torch.int8 and weight.abs().max() <= q and (bits > 1 or (weight != 0).all())
    assert (weight * scale).norm() == pytest.approx(matrix.norm().item(), rel=1e-5)
    error = (weight * scale - matrix).norm() / matrix.norm()
    assert error < {1: 0.65, 2: 0.5, 3: 0.25, 4: 0.13, 5: 0.07}.get(bits, 0.04)
    full = weight.abs().max() == q
    assert not full or torch.equal(to_grid(weight * scale, layer), weight), "what is on the grid stays there"


@pytest.mark.parametrize("there, here", [({}, {"bits": 4}), ({"bits": 2, "init_std": 0.6}, {"bits": 2})], ids=str)
def test_rows_that_are_read_otherwise_keep_their_size(there, here):
    """The head of a text with a few of the characters: what is read of the shared rows has the norm it had."""
    names = {"tokenizer": {"kind": "char", "chars": "abc" + "".join(map(chr, range(0x100, 0x180)))}}
    old, new = net(seed=5, **there), net(vocab_size=131, **here)
    take_weights(new, old, names, LETTERS)
    norms = [(n.head.read()[:3] * n.head.scale).norm().item() for n in (old, new)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_characters_keep_their_rows():
    """Those that both texts have, wherever they stand; a character with a name of three bytes counts as one."""
    here = {"tokenizer": {"kind": "char", "chars": "€zfa"}}
    old, new, untouched = net(seed=5), net(vocab_size=4), net(vocab_size=4)
    lines = take_weights(new, old, here, LETTERS)
    assert lines == ["2 of 4 tokens have their rows from there; new: 'z', '€'"]
    for name in ("embedding", "head"):
        rows, before, source = (n.get_submodule(name).weight for n in (new, untouched, old))
        assert torch.equal(rows[[0, 1]], source[[0, 5]]), "sorted: a, f, z, €"
        assert torch.equal(rows[2:], before[2:])
        assert torch.equal(new.get_submodule(name).scale, old.get_submodule(name).scale)
    assert torch.equal(new.blocks[1].down.weight, old.blocks[1].down.weight)


@pytest.mark.parametrize("changes", [{"bits": 4, "init_std": 0.5}, {"method": "adamw"}], ids=["4 bits", "float"])
def test_rows_are_matched_on_another_grid_too(changes):
    here = {"tokenizer": {"kind": "char", "chars": "azf"}}
    old, new = net(seed=5), net(vocab_size=3, **changes)
    take_weights(new, old, here, LETTERS)
    rows = new.head.weight * getattr(new.head, "scale", 1.0)
    near = torch.cosine_similarity(rows[[0, 1]].detach(), old.head.weight[[0, 5]].float(), dim=1)
    assert (near > 0.97).all()


def test_bytes_are_matched_from_characters_to_bpe():
    ranks = [base64.b64encode(bytes([n])).decode() for n in range(256)] + [base64.b64encode(b"ab").decode()]
    bpe = {"tokenizer": {"kind": "bpe", "pattern": "", "ranks": ranks}}
    old, new = net(seed=5), net(vocab_size=257)
    (line,) = take_weights(new, old, bpe, LETTERS)
    assert line.startswith("12 of 257 tokens have their rows from there; new: ") and line.endswith(", ...")
    assert torch.equal(new.head.weight[97:109], old.head.weight)
    assert names_of({"tokenizer": {"kind": "gpt2"}}) == list(range(50257))


def test_classes_keep_their_rows_and_a_first_layer_of_another_shape_is_new():
    old, new = net(IMAGES, seed=5), net(IMAGES, vocab_size=2, image=(8, 8, 3))
    untouched = net(IMAGES, vocab_size=2, image=(8, 8, 3))
    lines = take_weights(new, old, {"classes": ["dog", "cat"]}, {"classes": ["cat", "cow", "pig"]})
    first, second = lines
    assert first == "1 of 2 classes have their rows from there; new: 'dog'"
    assert second == "embedding is new: it is 32 x 49 here, 32 x 17 there"
    assert torch.equal(new.head.weight[1], old.head.weight[0])
    assert torch.equal(new.embedding.weight, untouched.embedding.weight)
    assert all(map(torch.equal, new.blocks.parameters(), old.blocks.parameters()))


def test_from_text_to_images_the_blocks_are_taken():
    old, new, untouched = net(seed=5), net(IMAGES), net(IMAGES)
    lines = take_weights(new, old, {"classes": ["dog", "cat", "a"]}, LETTERS)
    assert lines[0] == "0 of 3 classes have their rows from there; new: 'dog', 'cat', 'a'"
    assert torch.equal(new.head.weight, untouched.head.weight) and torch.equal(new.head.scale, untouched.head.scale)
    assert torch.equal(new.embedding.weight, untouched.embedding.weight)
    assert torch.equal(new.blocks[0].qkv.weight, old.blocks[0].qkv.weight)


def test_an_mlp_for_larger_images():
    mlp = ModelConfig(10, n_layer=2, d_model=16, model="mlp", image=(4, 4, 1))
    old, new = net(mlp, seed=5), net(mlp, image=(8, 8, 1))
    lines = take_weights(new, old, {"classes": list("0123456789")}, {"classes": list("0123456789")})
    assert lines == ["blocks.0 is new: it is 16 x 64 here, 16 x 16 there"]
    assert torch.equal(new.blocks[1].weight, old.blocks[1].weight) and torch.equal(new.head.weight, old.head.weight)


def test_another_shape_is_refused():
    with pytest.raises(UserError) as caught:
        check_shape(Config(d_model=64, n_head=2), Config(n_layer=3, n_head=2), "out/x/best.json")
    assert caught.value.code == 2 and str(caught.value) == (
        "init_from: out/x/best.json is a net of another shape: n_layer = 3 there, 4 here; d_model = 128 there, 64 here"
        "; to start from it, give --n_layer 3 --d_model 128"
    )
    check_shape(Config(k=0.1, bits=3, context=5, steps=9), Config(), "")
    check_shape(Config(data="mnist", model="mlp", n_head=2), Config(data="mnist", model="mlp"), "")
