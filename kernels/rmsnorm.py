"""Delta through the parameter-free RMSNorm in front of an integer layer.

    x^ = x / rms(x)            delta_x = (delta_x^ - x^ * mean(x^ * delta_x^)) / rms(x)

Behind a squared ReLU, x = relu(y)^2 and delta_y = delta_x * 2 relu(y).
"""

import torch
from torch import Tensor

from kernels.fuse import fused
from kernels.quantize import row_mean


@fused
def rmsnorm_backward(
    accumulator: Tensor, scale: Tensor, x: Tensor, inverse_rms: Tensor, squared_relu: bool = False
) -> Tensor:
    """delta of the layer's input from the integer product D W.

    accumulator int32 (T, n), scale float32 () or (T, 1) so that delta_x^ = accumulator * scale,
    x float32 (T, n) as it entered `rmsnorm_quantize`, inverse_rms float32 (T, 1). Returns float32 (T, n).
    """
    delta_hat = accumulator.to(torch.float32) * scale
    if not squared_relu:
        x_hat = x * inverse_rms
        return (delta_hat - x_hat * row_mean(x_hat * delta_hat)) * inverse_rms
    positive = torch.relu(x)
    x_hat = positive * positive * inverse_rms
    through_norm = (delta_hat - x_hat * row_mean(x_hat * delta_hat)) * inverse_rms
    return through_norm * (2.0 * positive)
