"""What tells a person of decisions made for them: lines on stderr, where they never mix with results, and boxes."""

import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Piece = TypeVar("Piece")

BOX_WIDTH = 76  # of the text; the frame takes four columns more
PATIENCE = 2.0  # seconds that work may take without a progress bar
REDRAW, QUIET = 0.2, 15.0  # seconds between two bars on a terminal, and between two lines elsewhere
NAMED = 5  # so many of a list of names are told


def notice(message: str) -> None:
    """Prints one line that opens with `data: `."""
    print(f"data: {message}", file=sys.stderr, flush=True)


def with_bar(
    pieces: Iterable[Piece], size: int, doing: str, done_of: Callable[[], int] | None = None
) -> Iterator[Piece]:
    """Yields the `pieces`, of `size` bytes together, and shows on stderr how far their reader is if that takes long.

    `done_of` tells how many bytes that is, if not those of the pieces.
    """
    begun, done, terminal = time.monotonic(), 0, sys.stderr.isatty()
    due = begun + (PATIENCE if terminal else QUIET)
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    drawn = False
    try:
        for piece in pieces:
            yield piece
            done = done_of() if done_of else done + len(piece)
            now = time.monotonic()
            if now >= due:
                share = min(done / size, 1) if size else 1
                left = (now - begun) * (1 / share - 1)
                bar = f"[{'#' * int(20 * share):<20}] {share:4.0%}, {left:.0f} s left"
                print(f"{start}data: {doing} {bar}", end=end, file=sys.stderr, flush=True)
                due, drawn = now + (REDRAW if terminal else QUIET), True
    finally:
        if drawn and terminal:
            print(start, end="", file=sys.stderr, flush=True)


def with_count(items: Iterable[Any], doing: str) -> Iterator[Any]:
    """Yields the `items`, and says every QUIET seconds how many there have been."""
    due = time.monotonic() + QUIET
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() >= due:
            due = time.monotonic() + QUIET
            notice(f"{doing}: {count:,} so far.")


def few(names: Sequence[str]) -> str:
    """The first NAMED of the names, and how many more there are."""
    more = len(names) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more:,} more" if more > 0 else "")


def box(paragraphs: Sequence[str]) -> str:
    """The paragraphs, wrapped and with their indentation, in a frame of ASCII characters.

    A path or an address that is too long for a line is not broken: it runs over the right edge.
    """
    lines = []
    for text in paragraphs:
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(
            text.strip(),
            BOX_WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    edge = f"+{'-' * (BOX_WIDTH + 2)}+"
    inside = [f"| {line:<{BOX_WIDTH}} |" if len(line) <= BOX_WIDTH else f"| {line}" for line in lines]
    return "\n".join([edge, *inside, edge])
