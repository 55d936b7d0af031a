"""Float rows to int8: activations on a fixed grid, delta on one scale per tensor.

    activations  x^ = x / rms(x),  rms over a row;   X = clip(round(x^ * 127 / A), -127, 127)
    delta        D  = clip(floor(delta / sigma + u), -127, 127),   sigma = max|delta| / 127,  u from `philox.dither`

Rounding of activations is to nearest, halves to even. With `squared_relu` the norm is taken of
relu(x)^2, so an MLP's hidden layer is read once. A row of zeros has x^ = 0 and 1 / rms = 0: no delta passes it.
"""

import torch
from torch import Tensor

from kernels.fuse import fused
from kernels.philox import dither

SMALLEST_SCALE = 1e-36  # a smaller sigma counts as zero; 1 / sigma would overflow
SMALLEST_MEAN_SQUARE = 1e-30  # below this a row counts as zeros, which have no direction to normalise


def _squared_relu(x: Tensor) -> Tensor:
    r = torch.relu(x)
    return r * r


def row_mean(products: Tensor) -> Tensor:
    """Mean of each row, float32 (T, n) to (T, 1), summed in fp64: rounded to fp32, it no longer depends on the order.

    So the reference, the interpreter and a GPU find the same number, but for one row in some hundred million. Compiled
    for a CPU, fp32 sums in the compiler's order take its place: they save a twentieth of a step.
    """
    if torch.compiler.is_compiling() and not products.is_cuda:
        return products.mean(dim=-1, keepdim=True)
    return products.to(torch.float64).mean(dim=-1, keepdim=True).to(torch.float32)


@fused
def rmsnorm_quantize(x: Tensor, act_range: float, squared_relu: bool = False) -> tuple[Tensor, Tensor]:
    """Normalise rows and put them on the int8 grid.

    x float32 (T, n), act_range = A. Returns X int8 (T, n) and 1 / rms float32 (T, 1), 0 for rows of zeros.
    """
    if squared_relu:
        x = _squared_relu(x)
    mean_square = row_mean(x * x)
    inverse_rms = torch.where(mean_square > SMALLEST_MEAN_SQUARE, 1.0 / torch.sqrt(mean_square), 0.0)
    grid = torch.round(x * inverse_rms * (127.0 / act_range))
    return grid.clamp(-127, 127).to(torch.int8), inverse_rms


@fused
def absmax(delta: Tensor) -> Tensor:
    """max |delta| as a float32 scalar tensor; exact, so it does not depend on how the rows are split."""
    return delta.abs().amax()


@fused
def quantize_delta(delta: Tensor, sigma: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """delta / sigma rounded up or down at random: delta float32 (T, n), words int32 (T, 1) and (n,).

    sigma is float32 () for the tensor or (T, 1) for each row. Returns D int8 (T, n); a sigma of 0 gives D = 0.
    """
    inverse = torch.where(sigma > SMALLEST_SCALE, 1.0 / sigma, 0.0)
    return torch.floor(delta * inverse + dither(rows, columns)).clamp(-127, 127).to(torch.int8)
