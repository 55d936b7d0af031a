"""The integers a weight can be: its first values, and what the products read of it.

A weight keeps `keep_bits` bits, and votes move it by one unit of that grid. The products may read a coarser grid of
`bits` bits, formed from the kept weight each time:

    1 bit      -1 below 0, else +1
    2 bits     0 up to the threshold of 0.4 init_std Q (0.4 standard deviations of first weights), beyond it the sign;
               with 4 levels the sign, times 3 beyond a threshold of init_std Q
    3 to 7     round(W q / Q), Q and q the limits of the two grids

The bits that are not read remember votes until they add up to a step of the coarse grid, as the latent fp32 weights of
quantization-aware training do. With keep_bits = bits nothing is remembered.
"""

import torch
from torch import Tensor

from kernels.limits import weight_limit
from kernels.philox import Stream, normal
from kernels.tiles import PART


def initial_weight(shape: tuple[int, int], bits: int, init_std: float, seed: int, index: int) -> Tensor:
    """round(N(0, init_std * Q)) clipped to [-Q, Q], or the sign at one bit: int8 of `shape`, from Philox."""
    q, _ = weight_limit(bits)
    weight = torch.empty(shape[0] * shape[1], dtype=torch.int8)
    for number, part in enumerate(weight.split(PART)):
        z = normal(seed, 0, Stream.INIT + 16 * index, len(part), number * PART)
        part.copy_(torch.where(z < 0, -1, 1) if bits == 1 else torch.round(z * (init_std * q)).clamp(-q, q))
    return weight.view(shape)


def read_weight(weight: Tensor, bits: int, keep_bits: int, threshold: int, levels: int = 3) -> Tensor:
    """What the products read of a kept weight, int8 of the same shape: the weight itself where the grids agree.

    `levels` are those at two bits.
    """
    if bits == keep_bits:
        return weight
    if bits == 1:
        return (weight >> 7) | 1
    if bits == 2 and levels == 4:
        return ((weight >> 7) | 1) * (1 + 2 * (weight.abs() > threshold)).to(torch.int8)
    if bits == 2:
        return torch.sign(weight - weight.clamp(-threshold, threshold))
    return torch.round(weight.to(torch.float32) * (weight_limit(bits)[0] / weight_limit(keep_bits)[0])).to(torch.int8)
