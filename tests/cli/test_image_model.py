"""The ViT and the MLP, and nets of which only some layers are integer."""

import pytest
import torch

from gft.baselines import FloatLinear
from gft.layers import IntLayer
from model import MLP, ModelConfig, Transformer, image_rope_table, make_net, rope_table, rotate
from run.config import LAYER_KINDS, load

VIT = ("shakespeare_char_small --data imagenette --image_side 16 --patch 4 --n_layer 2 --n_head 2 --d_model 16 "
       "--batch_size 12")  # fmt: skip


def config(line: str):
    return load(line.split(), notes=False)


def test_positions_of_patches_are_relative_in_rows_and_columns():
    """q . k depends on how far apart two patches lie, by row and by column, and on nothing else."""
    table = image_rope_table(4, 5, 8, torch.device("cpu"))
    assert table.shape == (2, 20, 8)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 20, 1, 8) for _ in range(2))
    scores = (rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T).view(4, 5, 4, 5)
    assert torch.allclose(scores[0, 1, 1, 3], scores[2, 0, 3, 2], atol=1e-5)  # one down, two right
    assert not torch.allclose(scores[0, 1, 1, 3], scores[0, 1, 2, 2], atol=1e-3)


@pytest.mark.parametrize(("line", "image"), [(VIT, (16, 16, 3)), ("shakespeare_char_small --n_layer 1", None)],
                         ids=["vit", "text"])  # fmt: skip
def test_a_vit_looks_everywhere_and_a_text_only_back(line, image):
    net = make_net(ModelConfig.from_config(config(line), 3, image))
    head_dim = net.config.d_model // net.config.n_head
    places = rope_table(0, 16, head_dim, torch.device("cpu")) if image is None else image_rope_table(
        4, 4, head_dim, torch.device("cpu"))  # fmt: skip
    h = torch.randn(2, 16, net.config.d_model, generator=torch.Generator().manual_seed(0))
    changed = h.clone()
    changed[:, -1] += 3
    first, after = (net.blocks[0](stream, places)[:, 0] for stream in (h, changed))
    assert torch.equal(first, after) == (image is None), "the first patch sees the last one, the first token does not"


@pytest.mark.parametrize("line", [VIT, f"{VIT} --int_layers attention,mlp", "mnist",
                                  "shakespeare_char_small --n_layer 1 --int_layers attention,mlp,head"])  # fmt: skip
def test_sixteen_bits_go_from_layer_to_layer(line):
    """As run/energy.py counts them: whatever the first layer is given, integer or not."""
    cfg = config(f"{line} --precision bf16")
    image = None if cfg.data == "tinyshakespeare" else (28, 28, 1) if cfg.data == "mnist" else (16, 16, 3)
    net = make_net(ModelConfig.from_config(cfg, 3, image))
    found = []

    def seen(_, given, out):  # a tuple where the layer hands its input on
        found.append((given[0].dtype, (out[0] if isinstance(out, tuple) else out).dtype))

    for module in net.modules():
        if isinstance(module, (IntLayer, FloatLinear)):
            module.register_forward_hook(seen)
    outputs = net(torch.zeros(2, 4, dtype=torch.long) if image is None else torch.randn(2, *image[::-1]))
    outputs.float().sum().backward()
    layers = found if image is not None else [pair for pair in found if pair[0] != torch.long]
    assert len(layers) >= 2 and set(layers) == {(torch.bfloat16, torch.bfloat16)}


def test_a_vit_is_made_of_patches():
    vit = make_net(ModelConfig.from_config(config(VIT), 3, (16, 16, 3)))
    x = torch.randn(2, 3, 16, 16)
    changed = x.clone()
    changed[:, :, -1, -1] += 3
    a, b = vit.embedding.weight.shape
    assert isinstance(vit, Transformer) and (a, b) == (16, 4 * 4 * 3 + 1) and vit(x).shape == (2, 3)
    assert (vit(x) != vit(changed)).any(), "the last patch reaches the output"
    assert {p.dtype for p in vit.parameters()} == {torch.int8}


def test_the_mlp_is_the_papers():
    mlp = make_net(ModelConfig.from_config(config("mnist"), 10, (28, 28, 1)))
    assert isinstance(mlp, MLP)
    assert [tuple(la.weight.shape) for la in mlp.modules() if isinstance(la, IntLayer)] == [(256, 784), (10, 256)]


@pytest.mark.parametrize("kinds", ["all", "attention,mlp", "patch,embedding", "embedding,head", "mlp"])
def test_int_layers_are_the_kinds_asked_for(kinds):
    wanted = LAYER_KINDS if kinds == "all" else kinds.split(",")
    for line, image in ((VIT, (16, 16, 3)), ("shakespeare_char_small --n_layer 1", None)):
        net = make_net(ModelConfig.from_config(config(f"{line} --int_layers {kinds}"), 3, image))
        block = net.blocks[0]
        of_kind = {"attention": [block.qkv, block.out], "mlp": [block.up, block.down], "head": [net.head],
                   "patch" if image else "embedding": [net.embedding]}  # fmt: skip
        for kind, layers in of_kind.items():
            assert all(isinstance(layer, IntLayer) == (kind in wanted) for layer in layers), kind
