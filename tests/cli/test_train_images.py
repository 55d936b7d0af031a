"""train.py on images: learnt, resumed exactly, refused where they have changed; a net with float layers."""

import dataclasses
import json
import shutil

import pytest
import torch
from no_reads import NothingIsRead
from PIL import Image

import predict
import train
from data import image_task
from kernels import backend
from run import device as machine
from run.config import load
from run.progress import Metrics
from run.stop import Stop
from tests.data.inputs import CLASSES, image_data, images

VIT = ("shakespeare_char_small --data imagenette --image_side 16 --patch 4 --n_layer 2 --n_head 2 --d_model 16 "
       "--batch_size 12")  # fmt: skip
pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize("line", ["", "--int_layers attention,mlp --lr 3e-3 --dropout 0.05",
                                  "--model mlp --d_model 24 --dropout 0.05", "--method adamw --lr 3e-3"],
                         ids=["all integer", "hybrid, dropout", "mlp", "adamw"])  # fmt: skip
def test_images_are_learnt_and_resumed_exactly(line, tmp_path, capsys, monkeypatch):
    """From a third right to nearly all, and half of the way in another process' place gives the same weights."""
    monkeypatch.setattr("data.image_task.load_images", lambda *_: image_data(240))
    argv = (f"{VIT} --ortho_tile 16 --topk_tile 16 --k 0.4 --steps 60 --eval_every 30 --save_every 30 "
            f"--compile false {line}").split()  # fmt: skip
    assert train.main([*argv, "--out_dir", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert whole["accuracy"] > 0.8 and (tmp_path / "whole" / "predictions.png").stat().st_size > 10_000

    real = train.Monitor.before_backward

    def killed(self, step):
        if step == 40:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(train.Monitor, "before_backward", killed)
    assert train.main([*argv, "--out_dir", str(tmp_path / "half")]) == 130
    monkeypatch.setattr(train.Monitor, "before_backward", real)
    assert train.main([*argv, "--out_dir", str(tmp_path / "half"), "--resume"]) == 0
    half = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert half["weights_sha256"] == whole["weights_sha256"] and half["energy_note"].endswith("took the run up")


def test_images_that_are_read_otherwise_are_not_gone_on_with(tmp_path, capsys, monkeypatch):
    """The same file through another version of a decoder: other pixels, another mean."""
    argv = [*VIT.split(), "--steps", "2", "--compile", "false", "--out_dir", str(tmp_path / "o")]
    monkeypatch.setattr("data.image_task.load_images", lambda *_: image_data())
    assert train.main(argv) == 0 and train.main([*argv, "--resume"]) == 0
    other = dataclasses.replace(image_data(), mean=(0.3, 0.3, 0.31))
    monkeypatch.setattr("data.image_task.load_images", lambda *_: other)
    assert train.main([*argv, "--resume"]) == 1
    error = capsys.readouterr().err
    assert "was trained on the same file, but" in error and "(mean)" in error


def test_a_hybrid_net_counts_its_floats(tmp_path, capsys, monkeypatch):
    """Patches and head in fp32: their weights, AdamW's two moments of them, and one number of steps for each matrix."""
    monkeypatch.setattr("data.image_task.load_images", lambda *_: image_data())
    argv = f"{VIT} --int_layers attention,mlp --steps 2 --compile false --out_dir {tmp_path / 'o'}".split()
    assert train.main(argv) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    floats = 16 * (4 * 4 * 3 + 1) + 3 * 16
    assert found["float_param_bytes"] == 4 * floats and found["int_weight_bytes"] == found["weights"] - floats
    assert found["optimizer_state_bytes"] == 8 * floats + 2 * 4
    assert found["votes_bytes"] == 4 * found["int_weight_bytes"]


def test_a_step_of_images_reads_nothing_on_the_host(tmp_path, monkeypatch):
    """Mixed, cropped and mirrored on the device; with kernels as on a GPU."""
    monkeypatch.setattr("data.image_task.load_images", lambda *_: image_data())
    cfg = load(f"{VIT} --n_layer 1 --batch_size 4 --backend triton --device cpu --steps 2 --hflip 0.5 --crop_min 0.5 "
               f"--mix both --ortho_tile 32 --topk_tile 32 --out_dir {tmp_path}".split(), notes=False)  # fmt: skip
    chosen = backend.chosen()
    try:
        made = train.make_run(cfg, image_task.load(cfg), machine.choose(cfg), tmp_path)
        before = [p.clone() for p in made.net.parameters()]
        made.task.prepare(0, made.device)  # both steps are in the first epoch
        monitor = train.Monitor(made.net, 50, cfg.seed)
        monkeypatch.setattr(train, "Monitor", lambda *_: monitor)
        monkeypatch.setattr(train.Log, "due", lambda self: False)
        monkeypatch.setattr(train.Log, "finish", lambda self: {})
        monkeypatch.setattr(made.task, "prepare", lambda step, device: None)
        with NothingIsRead():
            train.train(made, Metrics(tmp_path / "m.jsonl", 0), Stop())
    finally:
        backend.use(chosen)
    assert made.step == 2 and not any(map(torch.equal, before, made.net.parameters()))


@pytest.mark.parametrize("config", ["imagenette_small --image_side 16 --n_layer 1 --n_head 2 --d_model 16 --k 0.4",
                                    "mnist --d_model 32 --crop_min 1"])  # fmt: skip
def test_a_folder_of_images_is_trained_on_and_predicted(config, tmp_path, capsys, monkeypatch):
    """Of any size, in class folders; predict.py then names the classes, without the folder."""
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    folder, names = tmp_path / "bars", ("above", "middle", "below")
    for n, (image, label) in enumerate(zip(*images(90, 36), strict=True)):
        path = folder / "train" / names[label] / f"{n}.{'png' if n % 2 else 'bmp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((36 + n, 36)).save(path)
    out = tmp_path / "out"
    argv = [*config.split(), "--data", str(folder), "--out_dir", str(out), "--batch_size", "12", "--steps", "60",
            "--compile", "false", "--device", "cpu"]  # fmt: skip
    assert train.main(argv) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["accuracy"] > 0.8
    assert "data: bars from" in said.out and f"predict.py {out}" in said.out and "| middle" in said.out
    assert train.main([*argv, "--resume"]) == 0
    photo = next((folder / "train" / "middle").glob("*.png")).rename(tmp_path / "photo.png")
    shutil.rmtree(folder)
    capsys.readouterr()
    assert predict.main([str(out), str(photo), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{photo}: middle ")


def test_a_folder_that_cannot_be_trained_on_is_an_error(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    assert train.main(["mnist", "--data", str(tmp_path / "texts"), "--device", "cpu"]) == 2
    assert "holds no images in class folders" in capsys.readouterr().err


def test_other_images_start_from_a_run(tmp_path, capsys, monkeypatch):
    """Fine-tuning on one more class: the three that were learnt are known at once."""

    def trained(out: str, more: str) -> list[dict]:
        argv = f"{VIT} --ortho_tile 16 --topk_tile 16 --compile false --eval_every 1 --out_dir {tmp_path / out} {more}"
        assert train.main(argv.split()) == 0
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    monkeypatch.setattr("data.image_task.load_images", lambda *_: image_data(240))
    first = trained("first", "--k 0.4 --steps 60 --eval_every 30")
    more = dataclasses.replace(image_data(240), classes=("new", *CLASSES), sha256="1")
    more = dataclasses.replace(more, train_labels=more.train_labels + 1, val_labels=more.val_labels + 1)
    monkeypatch.setattr("data.image_task.load_images", lambda *_: more)
    assert first[-1]["accuracy"] > 0.8 and trained("scratch", "--k 0.02 --steps 2")[0]["accuracy"] < 0.6
    capsys.readouterr()
    tuned = trained("tuned", f"--k 0.02 --steps 2 --init_from {tmp_path / 'first'}")
    assert "3 of 4 classes have their rows from there; new: 'new'" in capsys.readouterr().out
    assert tuned[0]["accuracy"] > 0.7
