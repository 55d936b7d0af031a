"""An MLP of integer layers in a plain PyTorch loop: FlipOptimizer and LinearLR, nothing else of this repository.

    python -m examples.mlp

The task: which of the four outputs of a fixed random network is the largest?
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from gft import FlipOptimizer, IntLinear

STEPS = 120


def main() -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4)).requires_grad_(False)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, 32)
        return x, teacher(x).argmax(1)

    # An IntLinear has its own norm in front and no bias.
    net = nn.Sequential(IntLinear(32, 64), nn.ReLU(), IntLinear(64, 64), nn.ReLU(), IntLinear(64, 4))
    opt = FlipOptimizer(net.parameters(), lr=0.3)  # lr is k, the share of weights that move in a step
    schedule = LinearLR(opt, 1.0, 0.0, total_iters=STEPS)  # it must fall to zero
    for step in range(1, STEPS + 1):
        x, y = batch(128)
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()  # moves the weights and clears their votes: there is no zero_grad
        schedule.step()
        if step % 40 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    x, y = batch(4000)
    print(f"accuracy {(net(x).argmax(1) == y).float().mean():.2f}")
    print(f"first weights {net[0].weight.dtype}, from {net[0].weight.min()} to {net[0].weight.max()}")


if __name__ == "__main__":
    main()

# Output (the last digits vary with torch's version and the processor):
#
#     step 40: loss 0.35
#     step 80: loss 0.23
#     step 120: loss 0.29
#     accuracy 0.89
#     first weights torch.int8, from -31 to 31
