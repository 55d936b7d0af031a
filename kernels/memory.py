"""Vote memory: one byte per weight that remembers past votes (`memory = "int8"`).

    M  <- beta M + V            in the votes' own units
    the rule scores               V + beta M, with the new M
    stored as int8, one scale per tile: scale = max|M| / 127, rounded up or down at random (`philox.dither`)
"""

import torch
from torch import Tensor

from kernels.fuse import fused
from kernels.philox import dither
from kernels.tiles import from_tiles, to_tiles

MEMORY_TILE = 64  # one scale per tile of this side
SMALLEST_SCALE = 1e-36  # a memory faded below this is empty; 1 / scale would overflow


@fused
def remember(
    stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the memory, tile by tile.

    stored int8 (tiles, n, n), scale float32 (tiles, 1, 1), votes integer (tiles, n, n), dither words int32
    (tiles, n, 1) and (tiles, 1, n). Returns V + beta M float32, the new stored int8, the new scale.
    """
    v = votes.to(torch.float32)
    m = beta * (stored.to(torch.float32) * scale) + v
    new_scale = m.abs().amax(dim=(1, 2), keepdim=True) / 127.0
    new_scale = torch.where(new_scale > SMALLEST_SCALE, new_scale, 0.0)
    inverse = torch.where(new_scale > 0, 1.0 / new_scale, 0.0)
    rounded = torch.floor(m * inverse + dither(rows, columns)).clamp(-127, 127).to(torch.int8)
    return v + beta * m, rounded, new_scale


def remember_(stored: Tensor, scale: Tensor, votes: Tensor, beta: float, rows: Tensor, columns: Tensor) -> Tensor:
    """`remember` for a matrix, in place: stored int8 (out, in), scale float32 (tiles, 1, 1), votes integer (out, in).

    rows and columns are int32 dither words, MEMORY_TILE of each for every tile. Returns V + beta M float32 (out, in).
    """
    shape = tuple(stored.shape)
    evidence, new, new_scale = remember(
        to_tiles(stored, MEMORY_TILE), scale, to_tiles(votes, MEMORY_TILE), beta,
        rows.view(-1, MEMORY_TILE, 1), columns.view(-1, 1, MEMORY_TILE),
    )  # fmt: skip
    stored.copy_(from_tiles(new, shape))
    scale.copy_(new_scale)
    return from_tiles(evidence, shape)
