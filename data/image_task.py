"""Name what an image shows: batches are augmented images and their labels, every epoch all of them once."""

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Augment, augmented, normalise, pixel_scale
from data.images import ImageData, load_images
from data.pictures import draw_predictions, per_class_table
from data.resident import resident, upload
from data.task import Task
from kernels.cross_entropy import cross_entropy
from kernels.philox import Stream, uniform
from run.config import Config
from run.distributed import ALONE, Ranks

MNIST_SIDE = 28


def load(cfg: Config) -> "ImageTask":
    """The task of the images cfg.data."""
    side = MNIST_SIDE if cfg.data == "mnist" else cfg.image_side
    channels = 1 if cfg.color == "grey" else 3  # of a folder; the data sets have their own
    return ImageTask(cfg, load_images(cfg.data, side, cfg.data_dir, cfg.eval_on, channels))


def image_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over images, nats: logits (B, classes), which its backward pass may use up; targets are
    labels (B,) or shares (B, classes)."""
    if targets.is_floating_point():
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return cross_entropy(logits, targets)


class Epochs:
    """The order of each epoch, in which every image comes once. A step may reach into the next epoch, or over several
    if the images are fewer than a batch, so that some are kept at a time: epoch e in row e % len(orders)."""

    def __init__(self, images: int, batch: int, seed: int, device: torch.device):
        self.images, self.batch, self.seed = images, batch, seed
        self.orders = torch.zeros((batch - 1) // images + 2, images, dtype=torch.int64, device=device)
        self.held = [-1] * len(self.orders)  # which epoch is in which row

    def prepare(self, step: int) -> None:
        """Draws the orders that the step needs and that are not held."""
        first, last = step * self.batch // self.images, ((step + 1) * self.batch - 1) // self.images
        for epoch in range(first, last + 1):
            row = epoch % len(self.orders)
            if self.held[row] != epoch:
                draws = uniform(self.seed, epoch, Stream.BATCH, self.images)
                upload(torch.argsort(draws, stable=True), self.orders[row])
                self.held[row] = epoch

    def chosen(self, step: Tensor) -> Tensor:
        """The images of a step that is prepared, int64 (batch,) on the device of `step`, int64 ()."""
        place = step * self.batch + torch.arange(self.batch, device=step.device)
        return self.orders[(place // self.images) % len(self.orders), place % self.images]


class ImageTask(Task):
    """Images and labels, on the GPU if the images fit there."""

    unit = "images"

    def __init__(self, cfg: Config, data: ImageData):
        self.cfg, self.data = cfg, data
        self.per_step, self.outputs, self.name, self.sha256 = cfg.batch_size, len(data.classes), data.name, data.sha256
        self.image = data.train.shape[1:]
        self.positions = math.prod(self.image[:2]) // cfg.patch**2 if cfg.model == "transformer" else 1
        self.augment = Augment(cfg.hflip, (cfg.crop_min, 1.0), mix=cfg.mix, mix_alpha=cfg.mix_alpha)
        self.about = (f"{data.name} from {data.source}; {len(data.train):,} images to train on, {len(data.val):,} to "
                      f"evaluate, {self.image[0]} x {self.image[1]}")  # fmt: skip
        self.loss = image_loss
        self._epochs: Epochs | None = None

    def _place(self, device: torch.device) -> None:
        """Puts on the device what the batches are made of."""
        data, cfg = self.data, self.cfg
        self._scale = pixel_scale(data.mean, data.std, device)
        self._rows = torch.arange(cfg.batch_size, device=device)
        self._images, there = resident(data.train, device, "the images")
        self._labels = torch.from_numpy(data.train_labels).to(self._images.device)
        self._epochs = Epochs(len(data.train), cfg.batch_size, cfg.seed, self._images.device)
        self._batch: tuple[Tensor, Tensor] | None = None  # on the device, if the images are not
        if not there:
            pixels = torch.empty(cfg.batch_size, *self.image, dtype=torch.uint8, device=device)
            self._batch = pixels, torch.empty(cfg.batch_size, dtype=torch.int64, device=device)

    def prepare(self, step: int, device: torch.device) -> None:
        """Draws the order of a new epoch, and gathers the step's images if they are not on the device."""
        if self._epochs is None:
            self._place(device)
        self._epochs.prepare(step)
        if self._batch is not None:
            chosen = self._epochs.chosen(torch.tensor(step))
            for source, target in zip((self._images, self._labels), self._batch, strict=True):
                upload(source.index_select(0, chosen), target)

    def batch_at(self, rng: Tensor, part: int = 0) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W) and targets of a micro-batch, labels (B,) or shares (B, classes)."""
        if self._batch is None:
            images, labels, chosen = self._images, self._labels, self._epochs.chosen(rng[1])
        else:
            images, labels, chosen = *self._batch, self._rows
        rows = self._rows.chunk(self.parts)[part * self.ranks.size + self.ranks.rank]
        batch = augmented(images, labels, chosen, rows, self.augment, self._scale, rng)
        return batch.images, batch.labels if self.cfg.mix == "none" else batch.soft_targets(self.outputs)

    @torch.no_grad()
    def outputs_of(self, net: nn.Module, images: np.ndarray, device: torch.device, ranks: Ranks = ALONE) -> Tensor:
        """Logits (N, classes) of images (N, H, W, C) uint8, shared out over ranks."""
        at_once = max(1, self.cfg.batch_size // (self.cfg.grad_accum * ranks.size))
        scale = pixel_scale(self.data.mean, self.data.std, device)
        parts = np.array_split(images, max(1, math.ceil(len(images) / at_once)))
        logits = torch.zeros(len(images), self.outputs, device=device)
        rows = logits.split([len(p) for p in parts])
        for i in range(ranks.rank, len(parts), ranks.size):
            rows[i].copy_(net(normalise(torch.from_numpy(parts[i].copy()).to(device), scale)))
        return ranks.sum(logits)

    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss and the shares of images whose class is first, or among the first five."""
        logits = self.outputs_of(net, self.data.val, device, self.ranks)
        labels = torch.from_numpy(self.data.val_labels).to(device)
        best = logits.topk(min(5, self.outputs), dim=1).indices == labels[:, None]
        return {
            "val_loss": F.cross_entropy(logits, labels).item(),
            "accuracy": best[:, 0].float().mean().item(), "top5": best.any(dim=1).float().mean().item(),
        }  # fmt: skip

    def report(self, net: nn.Module, device: torch.device, folder: Path) -> None:
        """How often each class is right, and predictions.png: images with what the net takes them for."""
        data = self.data
        p = self.outputs_of(net, data.val, device).softmax(dim=1).cpu().numpy()
        print(per_class_table(data.val_labels, p.argmax(axis=1), data.classes))
        draw_predictions(folder / "predictions.png", data.val, data.val_labels, p, data.classes)
        print(f"predictions: {folder / 'predictions.png'}")

    def usage(self, folder: Path) -> str:
        """Classify images."""
        return f"{shlex.join(['predict.py', str(folder)])} IMAGE..."

    def saved(self) -> dict[str, Any]:
        """The names of the classes and what pixels are normalised by."""
        data = self.data
        return {
            "classes": list(data.classes), "image": list(self.image), "mean": list(data.mean), "std": list(data.std),
        }  # fmt: skip
