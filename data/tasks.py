"""What a run learns from, behind one interface: batches, the loss, evaluation, and something to look at.

    task = load_task(cfg)
    for x, y in task.batches(step, device):  ...  task.loss(net(x), y)
    task.evaluate(net, device)               ->  {"val_loss": ..., "accuracy": ...}

A text is windows of tokens, images are pixels and labels. Both are a function of (seed, step), the same however many
micro-batches a step has.
"""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import TextData, load_text
from data.augment import Augment, augmented, normalise
from data.images import ImageData, load_images
from data.pictures import draw_predictions, per_class_table
from run.config import IMAGES, Config, check_against_data
from kernels.philox import Stream, uniform
from sample import decoded, generate, start_ids

MNIST_SIDE = 28


class Task(Protocol):
    """What train.py asks of a text or a set of images."""

    unit: str  # what is counted: "tokens" or "images"
    per_step: int  # so many of them
    positions: int  # of one example: tokens, patches, or 1
    outputs: int  # of the net: tokens of the vocabulary, or classes
    image: tuple[int, int, int] | None  # height, width, channels
    name: str
    sha256: str
    about: str  # a line for people

    def batches(self, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the step's micro-batches."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over tokens or images, nats."""

    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """"val_loss" in nats, and for images "accuracy" and "top5", shares of 1."""

    def show(self, net: nn.Module) -> str:
        """A few lines that tell a person how the net is doing; empty for none."""

    def report(self, net: nn.Module, device: torch.device, folder: Path) -> None:
        """What there is to say and draw at the end of a run. Raises OSError if a picture cannot be written."""

    def usage(self, folder: Path) -> str:
        """What follows `python` to use a checkpoint in `folder`."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold for the net to be used without the data."""


def load_task(cfg: Config) -> Task:
    """The task of cfg.data. Raises UserError for whatever a person can mend."""
    if cfg.data in IMAGES:
        side = MNIST_SIDE if cfg.data == "mnist" else cfg.image_side
        return ImageTask(cfg, load_images(cfg.data, side, cfg.data_dir, cfg.eval_on))
    data = load_text(cfg.data, cfg.tokenizer, cfg.vocab_size, cfg.data_dir, cfg.eval_on)
    check_against_data(cfg, len(data.train), len(data.val))
    return TextTask(cfg, data)


def windows(tokens: np.ndarray, starts: Tensor, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows that begin at `starts`: int64 (B, context) each."""
    rows = torch.stack([torch.from_numpy(tokens[s : s + context + 1].astype("int64")) for s in starts.tolist()])
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, nats: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def image_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over images, nats: logits (B, classes), targets labels (B,) or shares (B, classes)."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


class TextTask:
    """Predict the next token of a text."""

    unit, image = "tokens", None

    def __init__(self, cfg: Config, data: TextData):
        self.cfg, self.data = cfg, data
        self.per_step, self.positions = cfg.batch_size * cfg.context, cfg.context
        self.outputs, self.name, self.sha256 = data.tokenizer.vocab_size, data.name, data.sha256
        self.about = (f"{data.name} from {data.source}; {len(data.train):,} tokens to train on, {len(data.val):,} to "
                      "evaluate")  # fmt: skip
        self.loss = text_loss

    def starts(self, step: int) -> Tensor:
        """Where the windows of a step begin: int64 (batch_size,)."""
        u = uniform(self.cfg.seed, step, Stream.BATCH, self.cfg.batch_size)
        return (u * (len(self.data.train) - self.cfg.context)).long()

    def batches(self, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, int64 (B, context) each, of the step's micro-batches."""
        for part in self.starts(step).chunk(self.cfg.grad_accum):
            yield windows(self.data.train, part, self.cfg.context, device)

    @torch.no_grad()
    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss over `eval_windows` windows spread evenly over the text held out."""
        cfg, tokens = self.cfg, self.data.val
        last = len(tokens) - cfg.context - 1
        starts = torch.linspace(0, last, min(cfg.eval_windows, last + 1), dtype=torch.float64).long()
        total = 0.0
        for part in starts.split(cfg.batch_size // cfg.grad_accum):
            x, y = windows(tokens, part, cfg.context, device)
            total += text_loss(net(x), y).item()
        return {"val_loss": total / (len(starts) * cfg.context)}

    def show(self, net: nn.Module) -> str:
        """`sample_tokens` tokens of the net's own text, drawn from the run's seed."""
        if not self.cfg.sample_tokens:
            return ""
        tokens = generate(net, start_ids(self.data.tokenizer, ""), self.cfg.sample_tokens, 0.8, 0, 1.0, self.cfg.seed)
        return "".join(decoded(self.data.tokenizer, tokens)).strip()

    def report(self, net: nn.Module, device: torch.device, folder: Path) -> None:
        """Nothing: samples were shown on the way."""

    def usage(self, folder: Path) -> str:
        """Sample, beginning with a word of the text: its alphabet may have no other letters."""
        words = self.data.tokenizer.decode(self.data.val[:1000].tolist()).partition("\n")[2].split()
        return shlex.join(["sample.py", str(folder), "--prompt", words[0] if words else ""])

    def saved(self) -> dict[str, Any]:
        """The tokenizer."""
        return {"tokenizer": self.data.tokenizer.to_json()}


class ImageTask:
    """Name what an image shows."""

    unit = "images"

    def __init__(self, cfg: Config, data: ImageData):
        self.cfg, self.data = cfg, data
        self.per_step, self.outputs, self.name, self.sha256 = cfg.batch_size, len(data.classes), data.name, data.sha256
        self.image = data.train.shape[1:]
        self.positions = math.prod(self.image[:2]) // cfg.patch**2 if cfg.model == "transformer" else 1
        self.augment = Augment(cfg.flip, (cfg.crop_min, 1.0), mix=cfg.mix, mix_alpha=cfg.mix_alpha)
        self.about = (f"{data.name} from {data.source}; {len(data.train):,} images to train on, {len(data.val):,} to "
                      f"evaluate, {self.image[0]} x {self.image[1]}")  # fmt: skip
        self.loss = image_loss
        self._orders: dict[int, Tensor] = {}

    def chosen(self, step: int) -> Tensor:
        """The images of a step: every epoch goes once through all of them, in an order of its own.
        int64 (batch_size,)."""
        n, first = len(self.data.train), step * self.cfg.batch_size
        parts = []
        for epoch in range(first // n, (first + self.cfg.batch_size - 1) // n + 1):
            begin, end = max(first - epoch * n, 0), min(first + self.cfg.batch_size - epoch * n, n)
            parts.append(self._order(epoch)[begin:end])
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:  # of two epochs, as a batch may reach into the next
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            draws = uniform(self.cfg.seed, epoch, Stream.BATCH, len(self.data.train))
            self._orders[epoch] = torch.argsort(draws, stable=True)
        return self._orders[epoch]

    def batches(self, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, C, H, W) and targets, labels (B,) or shares (B, classes), of the step's micro-batches."""
        data, chosen = self.data, self.chosen(step)
        for rows in torch.arange(self.cfg.batch_size).chunk(self.cfg.grad_accum):
            batch = augmented(data.train, data.train_labels, chosen, rows, self.augment, data.mean, data.std,
                              self.cfg.seed, step, device)  # fmt: skip
            yield batch.images, batch.labels if self.cfg.mix == "none" else batch.soft_targets(self.outputs)

    @torch.no_grad()
    def outputs_of(self, net: nn.Module, images: np.ndarray, device: torch.device) -> Tensor:
        """Logits (N, classes) of images (N, H, W, C) uint8."""
        at_once = self.cfg.batch_size // self.cfg.grad_accum
        parts = np.array_split(images, max(1, math.ceil(len(images) / at_once)))
        rows = (torch.from_numpy(part.copy()).to(device) for part in parts)
        return torch.cat([net(normalise(part, self.data.mean, self.data.std)).float() for part in rows])

    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss and the shares of images whose class is first, or among the first five."""
        logits = self.outputs_of(net, self.data.val, device)
        labels = torch.from_numpy(self.data.val_labels).to(device)
        best = logits.topk(min(5, self.outputs), dim=1).indices == labels[:, None]
        return {
            "val_loss": F.cross_entropy(logits, labels).item(),
            "accuracy": best[:, 0].float().mean().item(), "top5": best.any(dim=1).float().mean().item(),
        }  # fmt: skip

    def show(self, net: nn.Module) -> str:
        """Nothing: the accuracy is in the progress line."""
        return ""

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
