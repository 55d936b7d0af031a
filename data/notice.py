"""Lines that tell a person what was decided for them; on stderr, where they never mix with results."""

import sys


def notice(message: str) -> None:
    """Prints one line that opens with `data: `."""
    print(f"data: {message}", file=sys.stderr, flush=True)
