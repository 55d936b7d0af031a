"""A float ViT becomes an integer one: trained with AdamW, converted with gft.convert, trained on by flips.

    python -m examples.convert_vit

The images are made here: stripes of one of four directions under noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import gft
from examples.convert_gpt import Block

WIDTH, SIDE, PATCH = 32, 16, 4


class ViT(nn.Module):
    def __init__(self, classes: int = 4):
        super().__init__()
        self.patch = nn.Linear(PATCH**2, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(Block(WIDTH, False), Block(WIDTH, False))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(images, PATCH, stride=PATCH).mT  # (B, patches, pixels)
        return self.head(self.blocks(self.patch(patches) + self.places).mean(1))


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(4, (size,))
    angle = labels * (math.pi / 4) + 0.2 * torch.randn(size)
    place = torch.arange(SIDE).float()
    across = angle.cos()[:, None, None] * place + angle.sin()[:, None, None] * place[:, None]
    stripes = torch.sin(1.5 * across + 6.3 * torch.rand(size, 1, 1))
    return (stripes + 0.7 * torch.randn_like(stripes))[:, None], labels


def train(net: nn.Module, opts: list, schedule: LinearLR | None = None, steps: int = 60) -> None:
    for _ in range(steps):
        images, labels = batch(32)
        F.cross_entropy(net(images), labels).backward()
        for opt in opts:
            opt.step(), opt.zero_grad()
        schedule and schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> str:
    images, labels = batch(1000)
    return f"{(net(images).argmax(1) == labels).float().mean():.2f}"


def main() -> None:
    torch.manual_seed(1)
    net = ViT()
    train(net, [torch.optim.AdamW(net.parameters(), lr=3e-3)])
    print("float, trained:", accuracy(net))
    gft.convert(net, bits=2, keep=("head",))  # the last layer stays as it is
    print("2 bits, the last layer fp32:", accuracy(net))
    flips = gft.FlipOptimizer([layer.weight for layer in gft.int_layers(net)], lr=0.1)
    adamw = torch.optim.AdamW([p for p in net.parameters() if p.is_floating_point()], lr=1e-3)
    train(net, [flips, adamw], LinearLR(flips, 1.0, 0.0, total_iters=60))
    print("trained on:", accuracy(net))


if __name__ == "__main__":
    main()

# Output (the last digits vary with torch's version and the processor):
#
#     float, trained: 0.91
#     2 bits, the last layer fp32: 0.90
#     trained on: 0.94
