"""What train.py asks of a text or of a set of images.

A batch is a function of (seed, step), the same however many micro-batches a step has. It is made on the device from
`rng`, a tensor that holds seed and step there: the host reads nothing back, so that a CUDA graph can hold a whole step.
What only the host can do for a step, such as the order of a new epoch, is `prepare`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.tokenizers import Tokenizer
from run.config import Config
from run.distributed import ALONE, Ranks


class Task(ABC):
    """Batches, loss and evaluation of one data set."""

    ranks: Ranks = ALONE  # which share each step's batch, and the work of an evaluation
    cfg: Config  # as given, but for `data` where another text took the place of one that was found nowhere
    notice: str = ""  # what a person must know of the data, in a box; to be printed before and after the run
    unit: str  # what is counted: "tokens" or "images"
    per_step: int  # so many of them
    positions: int  # of one example: tokens, patches, or 1
    outputs: int  # of the net: tokens of the vocabulary, or classes
    image: tuple[int, int, int] | None = None  # height, width, channels
    tokenizer: Tokenizer | None = None  # of a text
    name: str
    sha256: str
    about: str  # a line for people
    # (outputs, targets) -> cross-entropy summed over tokens or images, nats; its backward pass may use up the outputs
    loss: Callable[[Tensor, Tensor], Tensor]

    def batches(self, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the step's micro-batches."""
        self.prepare(step, device)
        rng = torch.tensor([self.cfg.seed, step], device=device)
        for part in range(self.cfg.grad_accum):
            yield self.batch_at(rng, part)

    @property
    def parts(self) -> int:
        """Micro-batches of a step, of all ranks: a rank's micro-batch i is part i * ranks + rank."""
        return self.cfg.grad_accum * self.ranks.size

    def first_row(self, part: int) -> int:
        """The row, a token or a patch, of the whole step that this rank's micro-batch `part` begins with."""
        return (part * self.ranks.size + self.ranks.rank) * (self.cfg.batch_size // self.parts) * self.positions

    @abstractmethod
    def prepare(self, step: int, device: torch.device) -> None:
        """What the host has to do before `batch_at` of a step, in any order of steps, without waiting for a GPU."""

    @abstractmethod
    def batch_at(self, rng: Tensor, part: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank's micro-batch `part` of the step rng[1], which has been prepared.

        rng is int64 [seed, step, ...]; what is returned is on its device. No value is read on the host.
        """

    @abstractmethod
    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """"val_loss" in nats, and for images "accuracy" and "top5", shares of 1. All ranks must call it."""

    def report(self, net: nn.Module, device: torch.device, folder: Path) -> None:
        """What there is to say and draw at the end of a run. Raises OSError if a picture cannot be written."""

    @abstractmethod
    def usage(self, folder: Path) -> str:
        """What follows `python` to use a checkpoint in `folder`."""

    @abstractmethod
    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold for the net to be used without the data."""
