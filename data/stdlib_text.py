"""The text every Python carries: the reference topics behind `help("if")`, for a machine with no network.

About half a megabyte; it differs a little from one Python version to the next, which its sha256 shows.
"""

import platform

from data.cache import Found
from run.errors import UserError


def find(data_dir: str = "") -> Found:
    """The topics in the order of their names. `data_dir` is not needed: there is nothing to look for."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "data = 'stdlib' needs the module pydoc_data.topics, which this Python was installed without. "
            "Use --data FILE with any UTF-8 text."
        ) from error
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    version = platform.python_version()
    return Found(text.encode("utf-8"), f"pydoc_data.topics of Python {version}", "every Python carries it")
