"""Constants that kernels, layers and the command line share. This file imports nothing, so reading it costs nothing."""

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # products of +-127 that an int32 sum can hold: 133,144
KEPT_BITS = 6  # of a weight, unless more are read
TERNARY_THRESHOLD = 0.4  # of a weight that is read at two bits, in standard deviations of first weights
RULES = ("contribution", "gain", "balanced", "spectral")  # how votes become scores


def kept_bits(bits: int, keep_bits: int = 0) -> int:
    """The bits a weight keeps of which `bits` are read: keep_bits, where 0 asks for at least `KEPT_BITS`."""
    return keep_bits or max(bits, KEPT_BITS)


def weight_limit(bits: int) -> tuple[int, int]:
    """Q, the largest weight of `bits` bits, and the unit of a move."""
    return (1, 2) if bits == 1 else (max(1, 2 ** (bits - 1) - 1), 1)


def threshold_of(keep_bits: int, init_std: float) -> int:
    """The largest kept weight that is read as 0 at two bits."""
    q, _ = weight_limit(keep_bits)
    return min(int(TERNARY_THRESHOLD * init_std * q), q - 1)
