"""The whole learning step of a layer: int8 operands in, int8 weights changed in place.

    V = D^T X  ->  (memory)  ->  scores S  ->  top-k of legal moves in every tile  ->  W

The reference is the composition of the kernels it fuses, so the fused path and the two-kernel path (votes, then
`flip`) share one selection and agree exactly. Memory of a fused kernel: T*(in + out) + 2*out*in bytes, and twice
out*in more with the vote memory; votes and scores need none.
"""

from torch import Tensor

from kernels.contribution import votes
from kernels.flip import flip
from kernels.memory import remember_
from kernels.scores import score


def contribution_flip(
    d: Tensor, x: Tensor, weight: Tensor, top_words: Tensor, *, rule: str, bits: int, k: float, step_size: int = 1,
    ortho_tile: int = 128, select_tile: int = 64, draws: Tensor | None = None, gamma: float = 1.0,
    memory: tuple[Tensor, Tensor] | None = None, beta: float = 0.9, words: tuple[Tensor, Tensor] | None = None,
) -> int:  # fmt: skip
    """Learn from one batch: d int8 (T, out), x int8 (T, in), weight int8 (out, in), changed in place.

    top_words (flip's words), draws, k, step_size, select_tile and gamma as in `flip.flip`; rule and ortho_tile as in `scores.score`; memory is
    (stored, scale) of `memory.remember_`, changed in place, and words its dither words. Returns the number of flips.
    """
    v = votes(d, x)
    if memory is not None:
        v = remember_(*memory, v, beta, *words)
    s = score(rule, [v], [weight], ortho_tile)
    chosen = {"bits": bits, "k": k, "step_size": step_size, "select_tile": select_tile, "draws": draws, "gamma": gamma}
    return flip([weight], s, top_words, **chosen)[0]
