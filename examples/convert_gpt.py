"""A float GPT becomes an integer one: trained with AdamW, converted with gft.convert, trained on by flips.

    python -m examples.convert_gpt                 the text is Python's own documentation
"""

import copy
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import gft

WIDTH, CONTEXT, STEPS = 48, 24, 60


class Block(nn.Module):
    """x + attention, then x + MLP."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2, self.causal = nn.LayerNorm(width), nn.LayerNorm(width), causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, hd) each
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(WIDTH, True), Block(WIDTH, True))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places.weight))


def main() -> None:
    torch.manual_seed(1)
    text = topics["lambda"] + topics["if"] + topics["while"] + topics["for"] + topics["class"] + topics["with"]
    data = torch.tensor(list(text.encode("ascii", "replace")))

    def loss_of(net: nn.Module, size: int = 16) -> torch.Tensor:
        window = data[torch.randint(len(data) - CONTEXT - 1, (size, 1)) + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def train(net: nn.Module, opts: list, schedule: LinearLR | None = None) -> float:
        for _ in range(STEPS):
            loss_of(net).backward()
            [(opt.step(), opt.zero_grad()) for opt in opts]
            schedule and schedule.step()
        return loss_of(net, 256).item()

    net = Gpt()
    print(f"float, trained: {train(net, [torch.optim.AdamW(net.parameters(), lr=6e-3)]):.2f}")
    for bits, start, k in ((6, "round", 0.05), (6, "new", 0.3)):
        integer = gft.convert(copy.deepcopy(net), bits=bits, start=start)
        before = loss_of(integer, 256).item()
        flips = gft.FlipOptimizer([layer.weight for layer in gft.int_layers(integer)], lr=k)
        adamw = torch.optim.AdamW([p for p in integer.parameters() if p.is_floating_point()], lr=1e-3)
        after = train(integer, [flips, adamw], LinearLR(flips, 1.0, 0.0, total_iters=STEPS))
        print(f"{bits} bits, {start}: {before:.2f}, after training on {after:.2f}")


if __name__ == "__main__":
    main()

# Output (the last digits vary with torch's version and the processor):
#
#     float, trained: 2.53
#     6 bits, round: 2.54, after training on 2.47
#     6 bits, new: 5.12, after training on 2.57
