"""Constants that kernels, layers and the command line share. This file imports nothing, so reading it costs nothing."""

MAX_REDUCTION = (2**31 - 1) // (127 * 127)  # products of +-127 that an int32 sum can hold: 133,144
RULES = ("contribution", "gain", "balanced", "spectral")  # how votes become scores
