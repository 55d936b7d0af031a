"""train.py on images: learnt, resumed exactly, refused where they have changed; a net with float layers."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train
from data.images import ImageData
from gft.learner import make_learner
from model import ModelConfig, make_net
from run.config import load

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


@pytest.mark.parametrize("line", ["", "--int_layers attention,mlp --lr 3e-3", "--model mlp --d_model 24",
                                  "--method adamw --lr 3e-3"],
                         ids=["all integer", "hybrid", "mlp", "adamw"])  # fmt: skip
def test_images_are_learnt_and_resumed_exactly(line, tmp_path, capsys, monkeypatch):
    """From a third right to nearly all, and half of the way in another process' place gives the same weights."""
    monkeypatch.setattr("data.image_task.load_images", lambda *_: data(240))
    argv = (f"{VIT} --ortho_tile 16 --topk_tile 16 --k 0.4 --steps 60 --eval_every 30 --save_every 30 "
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
    monkeypatch.setattr("data.image_task.load_images", lambda *_: data())
    assert train.main(argv) == 0 and train.main([*argv, "--resume"]) == 0
    monkeypatch.setattr("data.image_task.load_images", lambda *_: dataclasses.replace(data(), mean=(0.3, 0.3, 0.31)))
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
