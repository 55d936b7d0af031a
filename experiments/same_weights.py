"""train.py with the float kernels (heads, cross_entropy) left to torch on every backend.

    python -m experiments.same_weights shakespeare_char --rule gain --embedding_rule gain --backend triton

What is left to differ between the backends are kernels that promise the same bits, so both runs must end in the same
`weights_sha256`.
"""

import sys

import model
import train
from data import text_task
from kernels.cross_entropy import cross_entropy_torch


def main(argv: list[str]) -> int:
    """train.py's `main`."""
    model.split_heads, text_task.cross_entropy = model.heads, cross_entropy_torch
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
