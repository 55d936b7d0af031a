"""The step a run is at, and the random words that belong to it.

One clock is shared by a FlipOptimizer and its layers. It holds nothing that cannot be recomputed from
(seed, step): the words are cached for the step, never saved.
"""

import torch
from torch import Tensor

from kernels.philox import Stream, dither_words, integers, uniform


class Clock:
    """Step counter and Philox words: `rows` belong to global tokens, `columns` to the outputs of all layers."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.step = 0
        self._widths = 0
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    def reserve_columns(self, width: int) -> int:
        """Give a layer `width` columns of its own; returns the first."""
        first = self._widths
        self._widths += width
        self._columns = None
        return first

    def advance(self, step: int) -> None:
        """Move to `step`; its words are drawn when first asked for."""
        self.step = step
        self._rows = self._columns = None

    def rows(self, first: int, count: int, device: torch.device) -> Tensor:
        """Dither words of tokens first .. first + count - 1 of the step: int32 (count, 1)."""
        if self._rows is None or len(self._rows) < first + count or self._rows.device != device:
            self._rows = dither_words(self.seed, self.step, Stream.ROWS, first + count, device=device)
        return self._rows[first : first + count, None]

    def columns(self, first: int, count: int, device: torch.device) -> Tensor:
        """Dither words of columns first .. first + count - 1: int32 (count,)."""
        if self._columns is None or self._columns.device != device:
            count_all = max(self._widths, first + count)
            self._columns = dither_words(self.seed, self.step, Stream.COLUMNS, count_all, device=device)
        return self._columns[first : first + count]

    def integers(self, stream: int, count: int, start: int = 0) -> Tensor:
        """Words start .. start + count - 1 of the step for `stream`: int64 (count,) below 2^32, on the CPU."""
        return integers(self.seed, self.step, stream, count, start)

    def uniform(self, stream: int, count: int, start: int = 0) -> Tensor:
        """Uniform numbers start .. start + count - 1 of the step for `stream`: float64 (count,) on the CPU."""
        return uniform(self.seed, self.step, stream, count, start)
