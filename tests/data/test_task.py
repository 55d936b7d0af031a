"""Texts and images as tasks, the ViT and the MLP, and nets of which only some layers are integer."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train
from data.images import ImageData
from gft.baselines import FloatLinear
from run.config import LAYER_KINDS, load
from gft.layers import IntLayer
from gft.learner import make_learner
from model import MLP, ModelConfig, Transformer, image_rope_table, make_net, normalise_rotate, rope_table
from data.tasks import ImageTask

VIT = ("shakespeare_char_small --data imagenette --image_side 16 --patch 4 --n_layer 2 --n_head 2 --d_model 16 "
       "--batch_size 12")  # fmt: skip
CLASSES = tuple("abc")


def images(n: int, side: int = 16, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright third: above, in the middle or below, which is the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    pixels = random.integers(0, 100, (n, side, side, channels))
    for image, label in zip(pixels, labels, strict=True):
        image[label * side // 3 : (label + 1) * side // 3] += 120
    return pixels.astype(np.uint8), labels.astype(np.int64)


def data(n: int = 60, side: int = 16, channels: int = 3) -> ImageData:
    mean, std = (0.3,) * channels, (0.3,) * channels
    training, held_out = images(n, side, channels), images(30, side, channels, 1)
    return ImageData("made", *training, *held_out, CLASSES, mean, std, {}, "0", "here")


def config(line: str):
    return load(line.split(), notes=False)


def test_every_epoch_goes_once_through_all_images():
    task = ImageTask(config(VIT), data(30))  # 12 a step: 2 1/2 steps an epoch
    drawn = torch.cat([task.chosen(step) for step in range(5)])
    assert sorted(drawn[:30].tolist()) == sorted(drawn[30:].tolist()) == list(range(30))
    assert drawn[:30].tolist() != drawn[30:].tolist()
    again = ImageTask(config(VIT), data(30))
    assert torch.equal(again.chosen(3), drawn[36:48]), "a function of the step, not of the steps before"


@pytest.mark.parametrize("line", ["--flip 0.5 --crop_min 0.4", "--mix cutmix", "--mix mixup --flip 0.5"])
def test_micro_batches_are_parts_of_the_batch(line):
    whole = ImageTask(config(f"{VIT} {line}"), data())
    parts = ImageTask(config(f"{VIT} {line} --grad_accum 3"), data())
    (x, y), split = *whole.batches(4, torch.device("cpu")), list(parts.batches(4, torch.device("cpu")))
    assert len(split) == 3 and x.shape == (12, 3, 16, 16)
    assert torch.equal(torch.cat([a for a, _ in split]), x) and torch.equal(torch.cat([b for _, b in split]), y)
    if "mix " in line:
        torch.testing.assert_close(y.sum(dim=1), torch.ones(12))


def test_accuracy_is_the_share_of_right_answers():
    task = ImageTask(config(VIT), data())
    labels = torch.from_numpy(task.data.val_labels)
    wrong = torch.arange(30) < 6

    def net(x):
        here = net.at
        net.at += len(x)
        right = torch.nn.functional.one_hot(labels[here : net.at], 3).float()
        return torch.where(wrong[here : net.at, None], right.roll(1, 1), right) * 4

    net.at = 0
    found = task.evaluate(net, torch.device("cpu"))
    assert found["accuracy"] == pytest.approx(0.8) and found["top5"] == 1
    log_sum = np.log(np.exp(4) + 2)
    assert found["val_loss"] == pytest.approx(0.8 * (log_sum - 4) + 0.2 * log_sum, abs=1e-5)


def test_top_five_are_the_five_largest(monkeypatch):
    task = ImageTask(config(VIT), data(4))
    task.outputs = 10
    ranks = torch.tensor([1, 3, 5, 6])  # of the right class
    logits = torch.arange(10.0).flip(0).repeat(4, 1)
    for row, rank in zip(logits, ranks.tolist(), strict=True):
        row[0] = 9.5 - rank
    monkeypatch.setattr(task, "outputs_of", lambda *_: logits)
    task.data = dataclasses.replace(task.data, val_labels=np.zeros(4, np.int64))
    found = task.evaluate(None, torch.device("cpu"))
    assert (found["accuracy"], found["top5"]) == (0.25, 0.75)


def test_positions_of_patches_are_relative_in_rows_and_columns():
    """q . k depends on how far apart two patches lie, by row and by column, and on nothing else."""
    table = image_rope_table(4, 5, 8, torch.device("cpu"))
    assert table.shape == (2, 20, 4)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 1, 20, 8) for _ in range(2))
    scores = (normalise_rotate(q, table)[0, 0] @ normalise_rotate(k, table)[0, 0].T).view(4, 5, 4, 5)
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
    for module in net.modules():
        if isinstance(module, (IntLayer, FloatLinear)):
            module.register_forward_hook(lambda _, given, out: found.append((given[0].dtype, out.dtype)))
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
    assert not list(vit.parameters())


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


@pytest.mark.parametrize("line", ["", "--int_layers attention,mlp --lr 3e-3", "--model mlp --d_model 24",
                                  "--method adamw --lr 3e-3"],
                         ids=["all integer", "hybrid", "mlp", "adamw"])  # fmt: skip
def test_images_are_learnt_and_resumed_exactly(line, tmp_path, capsys, monkeypatch):
    """From a third right to nearly all, and half of the way in another process' place gives the same weights."""
    monkeypatch.setattr("task.load_images", lambda *_: data(240))
    argv = (f"{VIT} --ortho_tile 16 --select_tile 16 --k 0.4 --steps 60 --eval_every 30 --save_every 30 "
            f"--compile false {line}").split()  # fmt: skip
    assert train.main([*argv, "--out_dir", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert whole["accuracy"] > 0.8 and (tmp_path / "whole" / "predictions.png").stat().st_size > 10_000

    real = train.take_step

    def stopped(run, forward, loss_of):
        if run.step == 40:
            raise KeyboardInterrupt
        return real(run, forward, loss_of)

    monkeypatch.setattr(train, "take_step", stopped)
    assert train.main([*argv, "--out_dir", str(tmp_path / "half")]) == 130
    monkeypatch.setattr(train, "take_step", real)
    assert train.main([*argv, "--out_dir", str(tmp_path / "half"), "--resume"]) == 0
    half = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert half["weights_sha256"] == whole["weights_sha256"] and half["energy_note"].endswith("took the run up")


def test_images_that_are_read_otherwise_are_not_gone_on_with(tmp_path, capsys, monkeypatch):
    """The same file through another version of a decoder: other pixels, another mean."""
    argv = [*VIT.split(), "--steps", "2", "--compile", "false", "--out_dir", str(tmp_path / "o")]
    monkeypatch.setattr("task.load_images", lambda *_: data())
    assert train.main(argv) == 0 and train.main([*argv, "--resume"]) == 0
    monkeypatch.setattr("task.load_images", lambda *_: dataclasses.replace(data(), mean=(0.3, 0.3, 0.31)))
    assert train.main([*argv, "--resume"]) == 1
    assert "what is read from it has changed (mean)" in capsys.readouterr().err


def test_a_hybrid_net_counts_its_floats():
    cfg = config("shakespeare_char_small --n_layer 1 --int_layers mlp --warmup 0")
    net = make_net(ModelConfig.from_config(cfg, 11))
    learner = make_learner(net, cfg)
    floats = sum(p.numel() for p in net.parameters())
    assert floats == 2 * 11 * 128 + 4 * 128 * 128 and learner.state_bytes() == 0
    net(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert learner.step(0) > floats  # all of these, and some integers
    assert learner.state_bytes() == pytest.approx(8 * floats, rel=1e-3)
    clone = make_learner(make_net(ModelConfig.from_config(cfg, 11)), cfg)
    clone.load(learner.state())
    assert all(torch.equal(clone.state()[name], value) for name, value in learner.state().items())
