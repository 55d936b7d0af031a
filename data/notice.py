"""What tells a person of decisions made for them: lines on stderr, where they never mix with results, and boxes."""

import sys
import textwrap
from collections.abc import Sequence

BOX_WIDTH = 76  # of the text; the frame takes four columns more


def notice(message: str) -> None:
    """Prints one line that opens with `data: `."""
    print(f"data: {message}", file=sys.stderr, flush=True)


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
