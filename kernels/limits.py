"""Constants that kernels, layers and the command line share. This file imports nothing, so reading it costs nothing."""

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # products of +-127 that an int32 sum can hold: 133,144
KEPT_BITS = 6  # of a weight, unless more are read
# Of a weight that is read at two bits, in standard deviations of first weights: up to it the smaller |W| is read.
THRESHOLDS = {3: 0.4, 4: 1.0}  # by levels
RULES = ("contribution", "gain", "balanced", "spectral")  # how votes become scores


def kept_bits(bits: int, keep_bits: int = 0) -> int:
    """The bits a weight keeps of which `bits` are read: keep_bits, where 0 asks for at least `KEPT_BITS`."""
    return keep_bits or max(bits, KEPT_BITS)


def weight_limit(bits: int, levels: int = 3) -> tuple[int, int]:
    """Q, the largest weight of `bits` bits, and the unit of a move; at two bits of 3 `levels` or of 4, -3, -1, 1, 3."""
    if bits == 2 and levels == 4:
        return 3, 2
    return (1, 2) if bits == 1 else (max(1, 2 ** (bits - 1) - 1), 1)


def threshold_of(keep_bits: int, init_std: float, levels: int = 3) -> int:
    """The largest kept weight that is read at two bits as 0 or, with 4 levels, as 1."""
    q, _ = weight_limit(keep_bits)
    return min(int(THRESHOLDS[levels] * init_std * q), q - 1)
