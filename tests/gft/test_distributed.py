"""gft/distributed.py: any number of ranks moves the weights that one process moves, and what they send is exact."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from gft import distributed
from gft.layers import Delta, IntEmbedding, IntLinear
from gft.optimizer import FlipOptimizer

METHOD = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"  # spawn imports anew
ROWS, STEPS = 8, 4
VARIANTS = {  # scale of delta, micro-batches, settings
    "plain": ("step", 1, {}),
    "momentum": ("step", 1, {"momentum": 0.9, "rule": "gain"}),
    "micro-batches": ("delayed", 2, {"momentum": 0.9}),
    "many tokens": ("step", 1, {"max_tokens": 140_000}),  # votes are int64 and travel as less
}


class Twice(nn.Module):
    """With `twice`, the layer in the middle is used before and after `between`, so that its votes are complete later
    than its first pass says. Otherwise `between` has no votes."""

    def __init__(self, scale: str):
        super().__init__()
        made = {"seed": 1, "delta": Delta(scale=scale)}
        self.first, self.last = IntEmbedding(11, 12, index=0, **made), IntLinear(70, 11, index=3, **made)
        self.up, self.middle = IntLinear(12, 70, index=1, **made), IntLinear(70, 70, index=2, **made)
        self.between = IntLinear(70, 70, index=4, **made)

    def forward(self, tokens: torch.Tensor, twice: bool) -> torch.Tensor:
        x = self.middle(self.up(self.first(tokens)))
        return self.last(self.middle(self.between(x)) if twice else x)


def trained(
    variant: str, twice: bool, group, rank: int, ranks: int, resume: dict | None = None, broken=-1, early=True
) -> dict:
    """Weights, moves, final state and bytes sent of a few steps on this rank's part of the batch."""
    scale, parts, settings = VARIANTS[variant]
    net = Twice(scale)
    layers = [net.first, net.up, net.middle, net.between, net.last]
    opt = FlipOptimizer(
        [{"params": [layers[0].weight], "rule": "balanced"}, {"params": [la.weight for la in layers[1:]]}], 0.3,
        **{"ortho_tile": 64} | settings, process_group=group,
    )  # fmt: skip
    if resume:
        net.load_state_dict(resume["net"])
        opt.load_state_dict(resume["opt"])
    for step in range(STEPS):
        batch = torch.randint(0, 11, (ROWS,), generator=torch.Generator().manual_seed(step))
        for part in range(parts):
            mine = batch.chunk(parts * ranks)[part * ranks + rank]
            if opt.exchange is not None:
                opt.exchange.last_pass = early and part + 1 == parts
            loss = nn.functional.cross_entropy(net(mine, twice), (3 * mine + 1) % 11, reduction="sum")
            (loss * float("nan") if step == broken and rank == ranks - 1 else loss).backward()
        opt.step()
    sent = opt.exchange.bytes_sent if opt.exchange else 0
    weights = {name: t.clone() for name, t in net.state_dict().items()}
    return {"net": weights, "flips": int(opt.flips()), "opt": opt.state_dict(), "sent": sent,
            "kept": [len(opt.state[la.weight]) for la in layers]}  # fmt: skip


def same(a, b) -> bool:
    """Whether two trainings ended with the same weights, moves and state."""
    states = zip(a["opt"]["state"].values(), b["opt"]["state"].values(), strict=True)
    return a["flips"] == b["flips"] and all(torch.equal(t, b["net"][n]) for n, t in a["net"].items()) and all(
        one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items()) for one, two in states
    )  # fmt: skip


def work(rank: int, ranks: int, path: str) -> None:
    """One rank: every variant with 2 ranks and with all, against one process; refusals."""
    torch.set_num_threads(1)
    store = dist.FileStore(path, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    pair = dist.new_group([0, 1])
    for variant in VARIANTS:
        alone = trained(variant, False, None, 0, 1)
        assert alone["flips"] > 100
        for group, size in ((pair, 2), (dist.group.WORLD, ranks)):
            if rank >= size:
                continue
            together = trained(variant, False, group, rank, size)
            assert same(together, alone), (variant, size)
            if "momentum" in VARIANTS[variant][2]:  # a rank keeps that of its own matrices
                kept = torch.tensor([n > min(together["kept"]) for n in together["kept"]]).int()
                dist.all_reduce(kept, group=group)
                assert kept.tolist() == [1] * 5
                longer = trained(variant, False, None, 0, 1, resume=alone)
                assert same(trained(variant, False, group, rank, size, resume=alone), longer)
    stopped = trained("plain", False, dist.group.WORLD, rank, ranks, broken=1)
    assert same(stopped, trained("plain", False, None, 0, 1, broken=1))  # a NaN on one rank stops all, for a step
    if rank < 2:  # its noise depends on the split, so that only votes that leave early and late can be compared
        assert same(trained("plain", True, pair, rank, 2), trained("plain", True, pair, rank, 2, early=False))
    negative_nan = torch.tensor(-(2**22), dtype=torch.int32).view(torch.float32)
    assert distributed.Exchange(dist.group.WORLD).max(negative_nan if rank == 1 else torch.ones(())).isnan()
    weights = 11 * 12 + 12 * 70 + 2 * 70 * 70 + 70 * 11
    plain = torch.tensor(trained("plain", False, dist.group.WORLD, rank, ranks)["sent"])
    dist.all_reduce(plain)
    assert weights * 2 < int(plain) / STEPS / (ranks - 1) < weights * 3.5
    layer = IntLinear(8, 8)
    with pytest.raises(ValueError, match='update = "step"'):
        FlipOptimizer(layer.parameters(), update="backward", process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="more ranks"):
        FlipOptimizer(layer.parameters(), max_tokens=10**6, process_group=dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="torch has no gloo here")
def test_ranks_move_the_weights_that_one_process_moves(tmp_path):
    multiprocessing.start_processes(work, (4, os.fspath(tmp_path / "store")), nprocs=4, start_method=METHOD)


@pytest.mark.parametrize("largest", [0, 1, 127, 128, 32767, 32768, 2**23 - 1, 2**23, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_votes_travel_in_the_fewest_bytes_that_hold_them(largest, dtype):
    votes = torch.tensor([[largest, -largest, 0], [1, -1, largest // 2]]).clamp(-largest, largest).to(dtype)
    width = distributed._width(largest)
    packed = distributed._packed(votes, width)
    assert packed.dtype == torch.uint8 and packed.numel() == votes.numel() * width
    assert torch.equal(distributed._unpacked(packed, width).view_as(votes).to(dtype), votes)
    assert width == 1 or not torch.equal(  # a byte less would not do
        distributed._unpacked(distributed._packed(votes, width - 1), width - 1).view_as(votes).to(dtype), votes
    )
