"""Integer and float layers side by side in a Hugging Face Accelerate loop.

    pip install accelerate
    python -m examples.accelerate_loop

Accelerate drives FlipOptimizer as any torch optimizer. This is one process; in several FlipOptimizer needs its
process_group (docs/distributed.md). No fp16: its GradScaler scales the loss, and the error has an int8 scale of its own
(FlipOptimizer would say so).
"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from gft import FlipOptimizer, IntLinear

try:
    from accelerate import Accelerator
except ImportError:
    raise SystemExit("error: this example needs the package accelerate: pip install accelerate") from None


def main() -> None:
    torch.manual_seed(1)
    x = torch.randn(4096, 32)
    y = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4)).requires_grad_(False)(x).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)

    net = nn.Sequential(IntLinear(32, 64), nn.ReLU(), IntLinear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    flips = FlipOptimizer([*net[0].parameters(), *net[2].parameters()], lr=0.2)
    adamw = optim.AdamW(net[4].parameters(), lr=3e-3)
    epochs = 2
    schedule = optim.lr_scheduler.LinearLR(flips, 1.0, 0.0, total_iters=epochs * len(loader))

    accelerator = Accelerator(cpu=True)
    net, flips, adamw, loader, schedule = accelerator.prepare(net, flips, adamw, loader, schedule)
    for epoch in range(epochs):
        for inputs, labels in loader:
            loss = F.cross_entropy(net(inputs), labels)
            accelerator.backward(loss)
            flips.step(), adamw.step(), schedule.step()
            adamw.zero_grad()
        print(f"epoch {epoch + 1}: accuracy {(net(x).argmax(1) == y).float().mean():.2f}")
    print(f"integer weights {net[0].weight.dtype}, k at the end {flips.param_groups[0]['lr']:.2f}")


if __name__ == "__main__":
    main()

# Output (the last digits vary with torch's version and the processor):
#
#     epoch 1: accuracy 0.88
#     epoch 2: accuracy 0.91
#     integer weights torch.int8, k at the end 0.00
