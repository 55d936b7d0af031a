"""Constants that kernels, layers and the command line share. This file imports nothing, so reading it costs nothing."""

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # products of +-127 that an int32 sum can hold: 133,144
KEPT_BITS = 6  # of a weight, unless more are read
RULES = ("contribution", "gain", "balanced", "spectral")  # how votes become scores


def kept_bits(bits: int, keep_bits: int = 0) -> int:
    """The bits a weight keeps of which `bits` are read: keep_bits, where 0 asks for at least `KEPT_BITS`."""
    return keep_bits or max(bits, KEPT_BITS)
