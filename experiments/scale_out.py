"""Seconds of a training step on 1 to 1,024 GPUs, predicted: GFT's exchange of votes beside DDP's of float gradients.

    python -m experiments scale_out              the tables
    python -m experiments scale_out --check      the model against gloo, 2 and 4 ranks on this machine (a minute)

The alpha-beta model: a message of n bytes takes alpha + n / beta seconds, and a rank sends and receives one at a time.

compute     6 operations for each weight and token at RATE, the same for both; a third of it is the forward pass
DDP         a ring: 2 (N - 1) messages of 1 / N of the gradients, behind the backward pass where there is room
votes       to the owners, behind the backward pass too: the owner of the most weights receives N - 1 times those
weights     back to all, one byte each, after the moves: nothing hides them
sigma       4 bytes in each layer's backward pass, a tree: it stops the backward pass (delta_scale = "delayed" has none)
update      AdamW: 28 bytes of memory traffic for each weight, on every rank; spectral moves: 3,840 operations for each
            weight that a rank owns (5 Newton-Schulz steps in tiles of 128)

The owner of a matrix has all of it, as the code does today (`whole`), or an equal share of every matrix (`slices`, not
built). Tokens per GPU are fixed, so that the batch grows with the GPUs. Nothing of this was measured on a GPU.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from experiments.rows import markdown
from gft.distributed import Exchange
from gft.layers import IntLinear

RATE = 400e12  # operations a second: 40% of an H100's dense bf16 peak
MEMORY = 3.35e12  # bytes a second of an H100's HBM3
NODE = 8  # GPUs with NVLink between them
NVLINK, NETWORK = (5e-6, 450e9), (10e-6, 50e9)  # (alpha, beta) of a GPU: NVLink 4, one 400 Gb/s port
TOKENS = 8192  # per GPU and step
BACKWARD = 2 / 3  # of the compute
RANKS = (1, 8, 64, 256, 1024)
VOTE_BYTES = 3  # what votes of 100 to 100,000 tokens need (docs/distributed.md)
NETS = {"GPT-2 small": (12, 768, 50257), "1.5 B": (48, 1600, 50257), "7 B": (32, 4096, 32000)}


@dataclass(frozen=True)
class Net:
    """Weights of each matrix."""

    matrices: tuple[int, ...]

    @classmethod
    def transformer(cls, layers: int, width: int, vocab: int) -> "Net":
        """Embedding, head, and qkv, out, up and down of each block."""
        block = [size * width**2 for size in (3, 1, 4, 4)]
        return cls((vocab * width, vocab * width, *block * layers))

    @property
    def weights(self) -> int:
        """All of them."""
        return sum(self.matrices)

    def largest_share(self, ranks: int) -> int:
        """Weights of the rank that owns the most whole matrices, given out as gft/distributed.py does."""
        loads = [0] * ranks
        for size in sorted(self.matrices, reverse=True):
            loads[loads.index(min(loads))] += size
        return max(loads)


def link(ranks: int) -> tuple[float, float]:
    """alpha and beta of the slowest link between so many GPUs."""
    return NVLINK if ranks <= NODE else NETWORK


def ddp_seconds(net: Net, ranks: int, size: int) -> float:
    """A step with AdamW and gradients of `size` bytes."""
    alpha, beta = link(ranks)
    compute = 6 * net.weights * TOKENS / RATE
    ring = 2 * (ranks - 1) * (alpha + net.weights * size / ranks / beta)
    return compute + max(0.0, ring - BACKWARD * compute) + 28 * net.weights / MEMORY


def gft_seconds(net: Net, ranks: int, slices: bool, delayed: bool) -> float:
    """A step with spectral moves."""
    alpha, beta = link(ranks)
    compute = 6 * net.weights * TOKENS / RATE
    owned = math.ceil(net.weights / ranks) if slices else net.largest_share(ranks)
    sigma = 0.0 if delayed else len(net.matrices) * 2 * math.log2(ranks) * alpha
    votes = (ranks - 1) * (alpha + VOTE_BYTES * owned / beta)
    weights = (ranks - 1) * (alpha + owned / beta)
    hidden = BACKWARD * compute + sigma
    return compute + sigma + max(0.0, votes - hidden) + 3840 * owned / RATE + weights * (ranks > 1)


def tables() -> str:
    """The predictions as markdown, milliseconds a step."""
    found = []
    heads = ["GPUs", "DDP, fp32", "DDP, bf16", "GFT, whole matrices", "GFT, slices", "GFT, slices, delayed scale"]
    for name, shape in NETS.items():
        net = Net.transformer(*shape)
        rows = [
            (f"{n:,}", *(f"{1e3 * seconds:,.1f}" for seconds in (
                ddp_seconds(net, n, 4), ddp_seconds(net, n, 2), gft_seconds(net, n, False, False),
                gft_seconds(net, n, True, False), gft_seconds(net, n, True, True),
            )))
            for n in RANKS
        ]  # fmt: skip
        title = f"**{name}** ({net.weights / 1e6:,.0f} M weights, {TOKENS:,} tokens a GPU), ms a step"
        found += [title, "", *markdown(heads, rows), ""]
    return "\n".join(found)


WIDTH, LAYERS, REPEATS = 512, 8, 7  # of the exchange that is measured


def _measure(rank: int, ranks: int, store: str, results) -> None:
    """alpha, beta and seconds of an exchange, each the minimum of some repeats, between gloo ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)

    def fastest(action) -> float:
        taken = []
        for _ in range(REPEATS):
            dist.barrier()
            begun = time.perf_counter()
            action()
            taken.append(time.perf_counter() - begun)
        worst = torch.tensor(min(taken))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()

    small, large = torch.zeros(ranks, dtype=torch.uint8), torch.zeros(ranks << 21, dtype=torch.uint8)
    received = torch.empty_like(large)
    alpha = fastest(lambda: dist.all_to_all_single(torch.empty_like(small), small)) / (ranks - 1)
    beta = (1 << 21) / (fastest(lambda: dist.all_to_all_single(received, large)) / (ranks - 1) - alpha)
    exchange, layers = Exchange(dist.group.WORLD), [IntLinear(WIDTH, WIDTH, index=i) for i in range(LAYERS)]
    for layer in layers:
        layer.start_voting(torch.int32)
        layer.votes.random_(-(2**22), 2**22)  # three bytes
    exchange.adopt(layers)
    weights = [layer.weight for layer in layers]
    seconds = fastest(lambda: (exchange.collect(), [la.votes.random_(-(2**22), 2**22) for la in layers]))
    filling = fastest(lambda: [la.votes.random_(-(2**22), 2**22) for la in layers])
    back = fastest(lambda: exchange.spread(weights))
    if rank == 0:
        results.put((alpha, beta, seconds - filling + back))
    dist.barrier()
    dist.destroy_process_group()


def check() -> str:
    """The model beside an exchange of gloo ranks, as markdown. alpha and beta are those of an all-to-all here."""
    rows = []
    for ranks in (2, 4):
        results = multiprocessing.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_measure, (ranks, str(Path(folder, "store")), results), nprocs=ranks)
        alpha, beta, measured = results.get()
        net = Net((WIDTH**2,) * LAYERS)
        messages = (ranks - 1) * (2 * alpha + (VOTE_BYTES + 1) * net.largest_share(ranks) / beta)
        rows.append((str(ranks), f"{1e6 * alpha:.0f}", f"{beta / 1e9:.2f}", f"{1e3 * messages:.1f}",
                     f"{1e3 * measured:.1f}"))  # fmt: skip
    heads = ["ranks", "alpha, us", "beta, GB/s", "exchange predicted, ms", "measured, ms"]
    return "\n".join(markdown(heads, rows))


def main(argv: list[str]) -> int:
    """Print the tables, or the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments scale_out", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--check", action="store_true", help="measure an exchange between gloo ranks on this machine")
    print(check() if parser.parse_args(argv).check else tables())
    return 0
