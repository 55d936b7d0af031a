"""Predict the next token of a text: batches are windows of tokens that begin at random places."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.cache import NotFound
from data.notice import box
from data.resident import as_tensor, resident, upload
from data.task import Task
from data.text import TextData, load_text
from kernels.cross_entropy import cross_entropy
from kernels.philox import Stream, uniform_from
from kernels.tiles import joined, parts_of
from run.config import Config
from run.errors import UserError


def load(cfg: Config, named: bool = False) -> "TextTask":
    """The task of the text cfg.data, or of Python's own text where that is found nowhere and was not `named`."""
    try:
        return _load(cfg)
    except NotFound as missing:
        if named:
            raise
        return _load(dataclasses.replace(cfg, data="stdlib"), substitute_notice(missing))


def _load(cfg: Config, notice: str = "") -> "TextTask":
    data = load_text(cfg.data, cfg.tokenizer, cfg.vocab_size, cfg.data_dir, cfg.eval_on, cfg.threads)
    check_length(cfg, len(data.train), len(data.val))
    return TextTask(cfg, data, notice)


def check_length(cfg: Config, n_train: int, n_val: int) -> None:
    """Raises UserError(code=2) if a part of the text (lengths in tokens) is too short for windows of this context."""
    problems = [
        f"context = {cfg.context}: the {part} part of {cfg.data} has {n:,} tokens and must have more than "
        f"context + 1 = {cfg.context + 1:,}; use a longer text" + (f" or --context {n - 2}" if n > 2 else "")
        for part, n in (("training", n_train), ("evaluation", n_val))
        if n <= cfg.context + 1
    ]
    if problems:
        raise UserError("\n  ".join(problems), code=2)


def substitute_notice(missing: NotFound) -> str:
    """What a person must know when Python's own text takes the place of an official one."""
    file = missing.file
    return box([
        f"{missing.name} was not found, so this run uses another text: the help pages that every Python carries "
        '(data = "stdlib"). Its losses are not comparable with those of the README.',
        "",
        "Looked in:",
        *(f"  {place}" for place in missing.looked),
        "",
        f"For the real text, get {file.url} ({file.size:,} bytes), put it into a folder and add: --data_dir FOLDER",
    ])  # fmt: skip


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows of `tokens` that begin at `starts` (B,): int64 (B, context) each."""
    rows = gather(tokens, starts, context)
    return rows[:, :-1], rows[:, 1:]


def gather(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """int64 (B, context + 1). `tokens` int16 or int32 hold unsigned numbers (see `as_tensor`)."""
    places = starts[:, None] + torch.arange(context + 1, device=starts.device)
    return tokens[places].long() & ((1 << 8 * tokens.itemsize) - 1)


class TextTask(Task):
    """Windows of a text's tokens, on the GPU if the text fits there."""

    unit = "tokens"

    def __init__(self, cfg: Config, data: TextData, notice: str = ""):
        self.cfg, self.data, self.notice, self.tokenizer = cfg, data, notice, data.tokenizer
        self.per_step, self.positions = cfg.batch_size * cfg.context, cfg.context
        self.outputs, self.name, self.sha256 = data.tokenizer.vocab_size, data.name, data.sha256
        self.about = (f"{data.name} from {data.source}; {len(data.train):,} tokens to train on, {len(data.val):,} to "
                      "evaluate")  # fmt: skip
        self.loss = cross_entropy  # of (B, T, V), which its backward pass may use up, and targets (B, T)
        self._bytes_per_token: float | None = None  # of the targets that are evaluated, always the same
        self._tokens: Tensor | None = None
        self._gathered: Tensor | None = None  # (batch_size, context + 1) on the GPU, if the text is not there

    def starts(self, rng: Tensor, first: int, count: int) -> Tensor:
        """Where windows first .. first + count - 1 of a step begin: int64 (count,) on rng's device."""
        u = uniform_from(rng, Stream.BATCH, count, first)
        return (u * (len(self.data.train) - self.cfg.context)).long()

    def prepare(self, step: int, device: torch.device) -> None:
        """Gathers the step's windows if the text is not on the device that reads them."""
        cfg = self.cfg
        if self._tokens is None:
            self._tokens, there = resident(self.data.train, device, "the text")
            if not there:
                self._gathered = torch.empty(cfg.batch_size, cfg.context + 1, dtype=torch.int64, device=device)
        if self._gathered is not None:
            starts = self.starts(torch.tensor([cfg.seed, step]), 0, cfg.batch_size)
            upload(gather(self._tokens, starts, cfg.context), self._gathered)

    def batch_at(self, rng: Tensor, part: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-batch, int64 (B, context) each."""
        count = self.cfg.batch_size // self.parts
        first = (part * self.ranks.size + self.ranks.rank) * count
        if self._gathered is not None:
            rows = self._gathered[first : first + count]
            return rows[:, :-1], rows[:, 1:]
        return windows(self._tokens, self.starts(rng, first, count), self.cfg.context)

    @torch.no_grad()
    def evaluate(self, net: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss over `eval_windows` windows spread evenly over the text held out, see `measures`."""
        cfg, tokens = self.cfg, as_tensor(self.data.val)
        last = len(tokens) - cfg.context - 1
        starts = torch.linspace(0, last, min(cfg.eval_windows, last + 1), dtype=torch.float64).long()
        # A number for each window: their sum does not depend on how many a rank takes at once.
        losses = torch.zeros(len(starts), device=device)
        pieces = list(zip(*(t.split(cfg.batch_size // self.parts) for t in (starts, losses)), strict=True))
        for piece, found in pieces[self.ranks.rank :: self.ranks.size]:
            x, y = windows(tokens, piece, cfg.context)
            logits, y = net(x.to(device)), y.to(device)
            found.copy_(joined([
                F.cross_entropy(logits[:, part].float().transpose(1, 2), y[:, part], reduction="none")  # of (B, V, T)
                for _, part in parts_of((1, cfg.context, logits[:, 0].numel()), 1)
            ], dim=1).sum(1))  # fmt: skip
        return self.measures(sum(self.ranks.sum(losses).tolist()) / (len(starts) * cfg.context), starts)

    def measures(self, val_loss: float, starts: Tensor) -> dict[str, float]:
        """A loss in nats per token over the windows at `starts`, and what it is in bits per byte and as perplexity."""
        if self._bytes_per_token is None:
            lengths = torch.from_numpy(self.tokenizer.byte_lengths())
            rows = starts.split(256)  # windows at a time
            total = sum(lengths[windows(as_tensor(self.data.val), part, self.cfg.context)[1]].sum() for part in rows)
            self._bytes_per_token = int(total) / (len(starts) * self.cfg.context)
        return {
            "val_loss": val_loss, "bits_per_byte": val_loss / math.log(2) / self._bytes_per_token,
            "perplexity": math.exp(min(val_loss, 700.0)),
        }  # fmt: skip

    def usage(self, folder: Path) -> str:
        """Sample, beginning with a word of the text: its alphabet may have no other letters."""
        words = self.tokenizer.decode(self.data.val[:1000].tolist()).partition("\n")[2].split()
        word = next(filter(str.isprintable, words), "")  # control characters would act on the terminal
        return shlex.join(["sample.py", str(folder), "--prompt", word])

    def saved(self) -> dict[str, Any]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}
