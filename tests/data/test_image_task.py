"""Images as a task: every epoch all of them once, micro-batches, accuracy."""

import dataclasses

import numpy as np
import pytest
import torch

from data.image_task import Epochs, ImageTask
from run.config import Config
from tests.data.inputs import image_data

CPU = torch.device("cpu")
VIT = Config(data="imagenette", image_side=16, patch=4, n_layer=2, n_head=2, d_model=16, batch_size=12)


def task(n: int = 60, **settings) -> ImageTask:
    return ImageTask(dataclasses.replace(VIT, **settings), image_data(n))


def chosen(epochs: Epochs, step: int) -> torch.Tensor:
    epochs.prepare(step)
    return epochs.chosen(torch.tensor(step))


def test_every_epoch_goes_once_through_all_images():
    epochs = Epochs(30, 12, 1, CPU)  # 2 1/2 steps an epoch
    drawn = torch.cat([chosen(epochs, step) for step in range(5)])
    assert sorted(drawn[:30].tolist()) == sorted(drawn[30:].tolist()) == list(range(30))
    assert drawn[:30].tolist() != drawn[30:].tolist()
    again = Epochs(30, 12, 1, CPU)
    assert torch.equal(chosen(again, 3), drawn[36:48]), "a function of the step, not of the steps before"
    assert torch.equal(chosen(again, 1), drawn[12:24])


@pytest.mark.parametrize("batch", [1, 6, 7, 8, 20, 21, 50])
def test_a_batch_may_reach_over_several_epochs(batch):
    epochs = Epochs(7, batch, 3, CPU)
    drawn = torch.cat([chosen(epochs, step) for step in range(42 // batch + 2)])
    for epoch in range(len(drawn) // 7):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))


def test_an_order_is_drawn_once_an_epoch(monkeypatch):
    epochs = Epochs(30, 12, 1, CPU)
    made = []
    monkeypatch.setattr("data.image_task.upload", lambda source, target: made.append(source))
    for step in range(10):  # 120 images
        epochs.prepare(step)
    assert len(made) == 4


@pytest.mark.parametrize(
    "settings", [{"hflip": 0.5, "crop_min": 0.4}, {"mix": "cutmix"}, {"mix": "mixup", "hflip": 0.5}], ids=str
)
def test_micro_batches_are_parts_of_the_batch(settings):
    (x, y), split = *task(**settings).batches(4, CPU), list(task(grad_accum=3, **settings).batches(4, CPU))
    assert len(split) == 3 and x.shape == (12, 3, 16, 16)
    assert torch.equal(torch.cat([a for a, _ in split]), x) and torch.equal(torch.cat([b for _, b in split]), y)
    if "mix" in settings:
        torch.testing.assert_close(y.sum(dim=1), torch.ones(12))


def test_a_batch_without_changes_is_the_images():
    made, given = task(), image_data()
    ((x, y),) = made.batches(2, CPU)
    order = chosen(Epochs(60, 12, 1, CPU), 2)
    expected = (torch.from_numpy(given.train)[order].permute(0, 3, 1, 2) / 255 - 0.3) / 0.3
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    assert torch.equal(y, torch.from_numpy(given.train_labels)[order])


def test_accuracy_is_the_share_of_right_answers():
    made = task()
    labels = torch.from_numpy(made.data.val_labels)
    wrong = torch.arange(30) < 6

    def net(x):
        here = net.at
        net.at += len(x)
        right = torch.nn.functional.one_hot(labels[here : net.at], 3).float()
        return torch.where(wrong[here : net.at, None], right.roll(1, 1), right) * 4

    net.at = 0
    found = made.evaluate(net, CPU)
    assert found["accuracy"] == pytest.approx(0.8) and found["top5"] == 1
    log_sum = np.log(np.exp(4) + 2)
    assert found["val_loss"] == pytest.approx(0.8 * (log_sum - 4) + 0.2 * log_sum, abs=1e-5)


def test_top_five_are_the_five_largest(monkeypatch):
    made = task(4)
    made.outputs = 10
    ranks = torch.tensor([1, 3, 5, 6])  # of the right class
    logits = torch.arange(10.0).flip(0).repeat(4, 1)
    for row, rank in zip(logits, ranks.tolist(), strict=True):
        row[0] = 9.5 - rank
    monkeypatch.setattr(made, "outputs_of", lambda *_: logits)
    made.data = dataclasses.replace(made.data, val_labels=np.zeros(4, np.int64))
    found = made.evaluate(None, CPU)
    assert (found["accuracy"], found["top5"]) == (0.25, 0.75)
