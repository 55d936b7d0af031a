"""Votes and weights between the ranks of a process group: the same moves as one process makes on the same batch.

    votes     a matrix belongs to one rank, its owner. The others send it their votes, in as few bytes (1 to 4) as hold
              the largest on any rank; the owner adds them up. Integer sums have no order, so they are exact.
    moves     the owner alone makes them, and alone keeps the matrix's momentum.
    weights   the owner sends them to all, one byte each.
    delta     its scale (delta_scale = "step") is the maximum over the ranks, inside the backward pass.

So a step sends at most 4 + 1 bytes a weight, and with votes of two bytes 2 + 1, of which each of N ranks sends
(N - 1) / N on average. A ring sends 8 of fp32 gradients and 4 of bf16 ones. No collective of gloo or NCCL sums int16,
so votes travel as bytes, by all-to-all, and are summed on arrival.

Every rank must call `backward` and `step` as often as the others, on equally many rows.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.backend import opaque_operator
from kernels.limits import MAX_REDUCTION


class Place(NamedTuple):
    """Where a layer is: handle of the exchange, rank, number of ranks, number of the layer."""

    handle: int
    rank: int
    size: int
    number: int


class _Flight(NamedTuple):
    """Votes of some matrices on their way. `received` has, rank after rank, the bytes of this rank's matrices."""

    numbers: list[int]
    widths: list[int]
    received: Tensor
    sent: Tensor  # kept until it has arrived
    work: dist.Work


_exchanges: "weakref.WeakValueDictionary[int, Exchange]" = weakref.WeakValueDictionary()
_made = itertools.count()


@opaque_operator("max_over_ranks", fake=lambda value, handle: torch.empty_like(value))
def max_over_ranks(value: Tensor, handle: int) -> Tensor:
    """The maximum over ranks of value, float32 of any shape, not negative; NaN if one rank has one."""
    return _exchanges[handle].max(value)


@opaque_operator("votes_ready", fake=lambda *_: None, mutates_args=("votes",))
def votes_ready(votes: Tensor, handle: int, number: int) -> None:
    """Tell the exchange that a backward pass has added to the votes of layer `number`, which may then leave."""
    _exchanges[handle].ready(number, votes)


def noise_rng(rng: Tensor, rows: int, place: Place) -> Tensor:
    """rng with the rows of the global batch in place of those that this rank has seen: int64 (3,).

    Micro-batch i of rank r holds `rows` rows, those of part i * ranks + r of the global batch.
    """
    return torch.cat([rng[:2], rng[2:] * place.size + place.rank * rows])


class Exchange:
    """What one FlipOptimizer exchanges with those of the other ranks of `group`.

    `bytes_sent` counts what this rank has sent (of reductions, what a ring sends). With `last_pass` set, the votes of a
    matrix leave during the backward pass, in the order in which matrices are ready; else all of them leave at the step.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent, self.last_pass = 0, False
        self.handle = next(_made)
        _exchanges[self.handle] = self
        self.forget()

    def forget(self) -> None:
        """Start without matrices."""
        self.layers: list[nn.Module] = []
        self.owners: list[int] = []
        self.loads = [0] * self.size  # weights that each rank owns
        self.used_twice: set[int] = set()  # their votes are not complete after one pass: they leave at the step
        self._start_step()

    def _start_step(self) -> None:
        self.measured: list[tuple[list[int], Tensor, dist.Work]] = []
        self.flights: list[_Flight] = []
        self.left: set[int] = set()

    def check(self, max_tokens: int, update: str) -> None:
        """Raises ValueError if the votes of a rank can overflow int32, or are never stored."""
        if update == "backward":
            raise ValueError(
                f'FlipOptimizer: update = "backward" moves weights before {self.size} ranks have added up their votes; '
                'use update = "step", or one process'
            )
        if max_tokens > self.size * MAX_REDUCTION:
            raise ValueError(
                f"FlipOptimizer: max_tokens is {max_tokens}, which is {-(-max_tokens // self.size)} on each of "
                f"{self.size} ranks, and int32 votes hold {MAX_REDUCTION}; use a smaller batch or more ranks"
            )

    def adopt(self, layers: Sequence[nn.Module]) -> None:
        """Give each layer its place and an owner: the largest first, always to the rank that owns the least."""
        first = len(self.layers)
        self.layers += layers
        self.owners += [0] * len(layers)
        for number in sorted(range(first, len(self.layers)), key=lambda n: -self.layers[n].weight.numel()):
            owner = self.loads.index(min(self.loads))
            self.owners[number] = owner
            self.loads[owner] += self.layers[number].weight.numel()
            self.layers[number].place = Place(self.handle, self.rank, self.size, number)

    def owns(self, number: int) -> bool:
        """Whether this rank makes the moves of layer `number`."""
        return self.owners[number] == self.rank

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks of value, float32 of any shape, not negative; NaN if one rank has one."""
        bits = value.contiguous().view(torch.int32) & 0x7FFFFFFF  # they order as the numbers do, NaN after all others
        dist.all_reduce(bits, dist.ReduceOp.MAX, self.group)
        self._count_ring(bits)
        return bits.view(torch.float32)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of value, integer of any shape, in place."""
        dist.all_reduce(value, dist.ReduceOp.SUM, self.group)
        self._count_ring(value)
        return value

    def _count_ring(self, reduced: Tensor) -> None:
        self.bytes_sent += 2 * reduced.nbytes * (self.size - 1) // self.size

    def ready(self, number: int, votes: Tensor) -> None:
        """A pass has voted: in the last one of a step the matrix is measured, and the one before it sent.

        A compiled pass may write votes elsewhere first, and into the layer's buffer at its end.
        """
        if votes.data_ptr() != self.layers[number].votes.data_ptr():
            return
        if number in self.left:  # a layer used twice
            self.used_twice.add(number)
        elif self.last_pass and number not in self.used_twice:
            self._measure([number])
            while len(self.measured) > 1:
                self._send()

    def _measure(self, numbers: list[int]) -> None:
        """Begin to agree on the largest vote of each matrix."""
        ends = [torch.stack(torch.aminmax(self.layers[n].votes)).abs().amax() for n in numbers]
        largest = torch.stack(ends).to(torch.int32)
        self.left.update(numbers)
        self.measured.append((numbers, largest, dist.all_reduce(largest, dist.ReduceOp.MAX, self.group, async_op=True)))
        self._count_ring(largest)

    def _send(self) -> None:
        """Let the matrices that were measured first leave."""
        numbers, largest, work = self.measured.pop(0)
        work.wait()
        widths = [_width(value) for value in largest.tolist()]
        parts: list[list[Tensor]] = [[] for _ in range(self.size)]  # by owner
        for number, width in zip(numbers, widths, strict=True):
            if not self.owns(number):
                parts[self.owners[number]].append(_packed(self.layers[number].votes, width))
        mine = sum(self.layers[n].weight.numel() * w for n, w in zip(numbers, widths, strict=True) if self.owns(n))
        flat = [part for owner in parts for part in owner]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=largest.device)
        incoming = [mine if rank != self.rank else 0 for rank in range(self.size)]
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=largest.device)
        outgoing = [sum(part.numel() for part in owner) for owner in parts]
        work = dist.all_to_all_single(received, sent, incoming, outgoing, self.group, async_op=True)
        self.bytes_sent += sent.numel()
        self.flights.append(_Flight(numbers, widths, received, sent, work))

    def collect(self) -> None:
        """Every owner's votes become the sum of those of all ranks; the others' votes say nothing any more."""
        if late := [n for n in range(len(self.layers)) if n not in self.left or n in self.used_twice]:
            self._measure(late)
        while self.measured:
            self._send()
        taken: set[int] = set()
        for numbers, widths, received, _, work in reversed(self.flights):  # of a layer used twice, what left last
            work.wait()
            at = 0
            for _ in range(self.size - 1):
                for number, width in zip(numbers, widths, strict=True):
                    if self.owns(number):
                        votes = self.layers[number].votes
                        end = at + votes.numel() * width
                        if number not in taken:
                            votes += _unpacked(received[at:end], width).view_as(votes)
                        at = end
            taken.update(numbers)
        self._start_step()
        self.last_pass = False

    def drop(self) -> None:
        """Forget the votes that have left since the last step."""
        for *_, work in (*self.measured, *self.flights):
            work.wait()
        self._start_step()

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Every rank gets each layer's tensor, one byte an element, from the layer's owner, in place."""
        own = [t.view(torch.uint8).flatten() for n, t in enumerate(tensors) if self.owns(n)]
        device = tensors[0].device
        mine = torch.cat(own) if own else torch.empty(0, dtype=torch.uint8, device=device)
        sizes = [sum(t.nbytes for t, o in zip(tensors, self.owners, strict=True) if o == r) for r in range(self.size)]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        # Not an all-gather, which wants equal sizes.
        dist.all_to_all_single(received, mine.repeat(self.size), sizes, [mine.numel()] * self.size, self.group)
        self.bytes_sent += mine.numel() * (self.size - 1)
        others = sorted((o, n) for n, o in enumerate(self.owners))
        for (owner, n), part in zip(others, received.split([tensors[n].nbytes for _, n in others]), strict=True):
            if owner != self.rank:
                tensors[n].copy_(part.view(tensors[n].dtype).view_as(tensors[n]))


def _width(largest: int) -> int:
    """Bytes of a signed integer that holds -largest to largest."""
    return next(width for width in (1, 2, 3, 4) if largest < 1 << (8 * width - 1))


NARROW = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _packed(votes: Tensor, width: int) -> Tensor:
    """The low `width` bytes of each vote, uint8 (votes * width,): exact where the votes fit."""
    votes = votes.flatten()
    if width in NARROW:
        return votes.to(NARROW[width]).view(torch.uint8)
    return torch.cat([votes.to(torch.int16).view(torch.uint8), (votes >> 16).to(torch.int8).view(torch.uint8)])


def _unpacked(received: Tensor, width: int) -> Tensor:
    """What `_packed` was given, as integers of 8, 16 or 32 bits."""
    received = received.clone()  # a part of a buffer may begin at an odd byte
    if width in NARROW:
        return received.view(NARROW[width])
    low, high = received.split([received.numel() // 3 * 2, received.numel() // 3])
    return (low.view(torch.int16).to(torch.int32) & 0xFFFF) + (high.view(torch.int8).to(torch.int32) << 16)
