"""What tells a person of decisions made for them: lines on stderr, where they never mix with results, and boxes."""

import sys
import textwrap
from collections.abc import Sequence

BOX_WIDTH = 76  # of the text; a path or an address that is longer is not broken


def notice(message: str) -> None:
    """Prints one line that opens with `data: `."""
    print(f"data: {message}", file=sys.stderr, flush=True)


def box(paragraphs: Sequence[str]) -> str:
    """The paragraphs, wrapped, in a frame of ASCII characters; those after the first keep their indentation."""
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
    width = max(map(len, lines))
    edge = f"+{'-' * (width + 2)}+"
    return "\n".join([edge, *(f"| {line:<{width}} |" for line in lines), edge])
