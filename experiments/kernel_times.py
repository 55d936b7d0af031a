"""Kernels against what the machine can do at best, and against the same work done the usual way. bench.py shows them.

A kernel's time is the median of many calls, warm, on random data; several sets of inputs take turns, so that together
they outgrow the cache. On a GPU it is the GPU's own: CUDA events, the calls queued before the first one runs. Ceilings
are measured first: operations of a large int8 and bf16 product, bytes read plus written of a large copy. A kernel's
floor is the larger of operations / int8 ceiling and bytes / copy ceiling, bytes being the least that its inputs and
outputs allow; "of floor" is floor / time, 1 where nothing is lost.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.flip import flip
from kernels.int8_matmul import int8_matmul, int8_product
from kernels.learn import learn
from kernels.measure_delta import measure_delta
from kernels.philox import noise_from
from kernels.quantize_delta import quantize_delta
from kernels.rmsnorm_backward import rmsnorm_backward
from kernels.rmsnorm_quantize import rmsnorm_quantize
from kernels.update_rule import UpdateRule
from kernels.votes import accumulate_votes

ACT_RANGE, K = 6.0, 0.25
# Scores of the spectral rule are float: where two nearly tie, another order of summation may choose the other weight.
SPECTRAL_DIFFERENCE = 0.02  # the largest share of weights in which two backends may differ


@dataclass(frozen=True)
class Sizes:
    """How large the kernels' cases are."""

    products: tuple[tuple[int, int, int], ...]  # tokens, in, out
    rows: tuple[int, int]  # tokens, width
    learn: tuple[int, int, int]  # tokens, out, in
    ceiling: int  # side of the product that measures a ceiling
    copied: int  # bytes
    seconds: float  # spent on each time


FULL = Sizes(((4096, 4096, 4096), (16384, 768, 3072)), (65536, 768), (65536, 768, 3072), 8192, 2**31, 0.3)
SMALL = Sizes(((512, 512, 512), (2048, 128, 512)), (4096, 128), (2048, 128, 512), 1024, 2**27, 0.2)
QUICK = Sizes(((64, 128, 64),), (128, 64), (128, 64, 128), 128, 2**22, 0.01)


class Timer:
    """Random inputs on a device, and the median time of calls on them."""

    def __init__(self, device: torch.device, budget: float):
        self.device, self.budget = device, budget
        self.random = torch.Generator(device).manual_seed(1)
        cuda = device.type == "cuda"
        self.cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size if cuda else 2**24

    def integers(self, *shape: int, largest: int = 127, dtype: torch.dtype = torch.int8) -> Tensor:
        """Uniform in [-largest, largest]."""
        return torch.randint(-largest, largest + 1, shape, generator=self.random, device=self.device, dtype=dtype)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def number(self, value: float) -> Tensor:
        """A float32 scalar."""
        return torch.tensor(value, device=self.device)

    def rng(self) -> Tensor:
        """A seed, a step and no rows, as kernels read them."""
        return torch.tensor([1, 0, 0], device=self.device)

    def sets(self, make: Callable[[], tuple]) -> list[tuple]:
        """Sets of inputs that together outgrow the cache: 3 to 16 of them."""
        first = make()
        size = sum(t.nbytes for t in first if isinstance(t, Tensor))
        return [first, *(make() for _ in range(min(15, max(2, -(-self.cache // size)))))]

    def median(self, run: Callable, sets: Sequence[tuple]) -> float:
        """Seconds of run(*inputs)."""
        for inputs in sets[:2]:
            run(*inputs)
        if self.device.type == "cuda":
            return self._cuda_median(run, sets)
        times, end = [], time.perf_counter() + self.budget
        while len(times) < 5 or time.perf_counter() < end:
            begun = time.perf_counter()
            run(*sets[len(times) % len(sets)])
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def _cuda_median(self, run: Callable, sets: Sequence[tuple]) -> float:
        batch = 10  # calls that are queued together
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for i in range(batch):
            run(*sets[i % len(sets)])
        queued = time.perf_counter() - begun
        torch.cuda.synchronize()
        rounds = min(100, max(3, round(self.budget / (time.perf_counter() - begun))))
        times = []
        for first in range(0, rounds * batch, batch):
            # The GPU sleeps while a batch is queued, or a short kernel's time would be that of its launch.
            torch.cuda._sleep(int(min(2 * queued, 0.02) * 2e9))
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(batch + 1)]
            marks[0].record()
            for i in range(batch):
                run(*sets[(first + i) % len(sets)])
                marks[i + 1].record()
            marks[-1].synchronize()
            times += [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return statistics.median(times)


@dataclass(frozen=True)
class Usual:
    """The usual way to do a kernel's work: `run`, and how its inputs are made from a set of the kernel's."""

    run: Callable
    convert: Callable[..., tuple] = lambda *inputs: inputs


@dataclass(frozen=True)
class Case:
    """A kernel at one size: `run` on inputs that `make` makes, and the operations and bytes it needs at least."""

    name: str
    shape: tuple[int, ...]
    operations: int
    bytes: int
    make: Callable[[], tuple]
    run: Callable
    usual: dict[str, Usual] = field(default_factory=dict)
    moves: bool = False  # run changes weights by its first input, whose opposite then undoes the moves
    allowed: float = 0.0  # the share of elements in which two backends may differ


def wrong(case: Case, inputs: tuple) -> str:
    """How the kernel's results, or what it makes of its inputs, differ from the torch backend's; "" if they do not."""
    ours, theirs = ([t.clone() if isinstance(t, Tensor) else t for t in inputs] for _ in range(2))
    got, before = case.run(*ours), backend.chosen()
    backend.use("torch")
    try:
        expected = case.run(*theirs)
    finally:
        backend.use(before)
    results = [r if isinstance(r, tuple) else (r,) for r in (got, expected)]
    for number, (a, b) in enumerate(zip((*results[0], *ours), (*results[1], *theirs), strict=True), 1):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {tuple(a.shape)} and should be {b.dtype} {tuple(b.shape)}"
        if (count := int((a != b).sum())) > case.allowed * a.numel():
            return f"result {number} differs from the torch backend's in {count:,} of {a.numel():,} values"
    return ""


def product_cases(t: Timer, sizes: Sizes) -> list[Case]:
    """y = X W^T forward; D W backward."""
    found, scale = [], t.number(0.01)
    int_mm = {"torch._int_mm": Usual(lambda x, w, _: torch._int_mm(x, w.t()))}
    for tokens, inner, outer in sizes.products:
        halves = {"bf16 matmul": Usual(lambda x, w: x @ w.t(), lambda x, w, _: (x.bfloat16(), w.bfloat16()))}
        found.append(Case(
            "int8_matmul", (tokens, inner, outer), 2 * tokens * inner * outer,
            tokens * inner + inner * outer + 4 * tokens * outer,
            lambda m=tokens, k=inner, n=outer: (t.integers(m, k), t.integers(n, k, largest=31), scale),
            int8_matmul, int_mm | halves,
        ))  # fmt: skip
    halves = {"bf16 matmul": Usual(torch.matmul, lambda d, w: (d.bfloat16(), w.bfloat16()))}
    found.append(Case(
        "int8_product", (tokens, outer, inner), 2 * tokens * inner * outer,
        tokens * outer + inner * outer + 4 * tokens * inner,
        lambda: (t.integers(tokens, outer), t.integers(outer, inner, largest=31)), int8_product, halves,
    ))  # fmt: skip
    return found


def row_cases(t: Timer, sizes: Sizes) -> list[Case]:
    """What touches every element once: quantizers and the norm's backward."""
    tokens, width = sizes.rows
    area, scale, sigma = tokens * width, t.number(1e-4), t.number(5.0 / 127.0)
    norm = {"F.rms_norm": Usual(lambda x, _: F.rms_norm(x, x.shape[-1:]))}
    return [
        *(Case(
            f"rmsnorm_quantize {str(dtype)[6:]}", sizes.rows, 0, area * (dtype.itemsize + 1) + 4 * tokens,
            lambda dtype=dtype: (t.floats(tokens, width, dtype=dtype), ACT_RANGE), rmsnorm_quantize, norm,
        ) for dtype in (torch.float32, torch.bfloat16)),
        Case("measure_delta", sizes.rows, 0, 4 * area,
             lambda: (t.floats(tokens, width), scale, t.number(1e6), t.integers(1, 2, largest=0, dtype=torch.int32)),
             measure_delta, {"abs().amax()": Usual(lambda x, *_: x.abs().amax())}),
        Case("quantize_delta", sizes.rows, 0, 5 * area,
             lambda: (t.floats(tokens, width), sigma, noise_from(t.rng(), tokens, 0, width)), quantize_delta),
        Case("rmsnorm_backward", sizes.rows, 0, 12 * area + 4 * tokens,
             lambda: (t.integers(tokens, width, largest=9999, dtype=torch.int32), scale, t.floats(tokens, width),
                      t.floats(tokens, 1).abs()),
             rmsnorm_backward),
    ]  # fmt: skip


def learn_cases(t: Timer, sizes: Sizes) -> list[Case]:
    """Votes, and the whole learning step of a matrix, against a weight gradient in bf16 with AdamW."""
    tokens, outer, inner = shape = sizes.learn
    operations, read, area = 2 * tokens * outer * inner, tokens * (outer + inner), outer * inner
    k, zero = torch.tensor(K, dtype=torch.float64, device=t.device), torch.zeros(1, dtype=torch.int64, device=t.device)
    settings = (k, t.rng(), zero, t.number(0.0))

    def with_rule(update: Callable, rule: str) -> Callable[..., None]:
        def run(*inputs: Tensor) -> None:
            update(*inputs, *settings, UpdateRule(rule))

        return run

    def operands() -> tuple[Tensor, Tensor]:
        return t.integers(tokens, outer), t.integers(tokens, inner)

    def weight() -> Tensor:
        return t.integers(1, outer, inner, largest=31)

    # cuBLAS multiplies int8 only where both operands are contiguous along the tokens.
    product = {"torch._int_mm": Usual(lambda d, x: torch._int_mm(d, x.t()),
                                      lambda d, x, *_: (d.t().contiguous(), x.t().contiguous()))}  # fmt: skip
    gradient = {"bf16 weight gradient": Usual(lambda d, x: d.t() @ x, lambda d, x, *_: (d.bfloat16(), x.bfloat16()))}
    adamw = {"bf16 weight gradient, fused AdamW": Usual(gradient_step, gradient_inputs)}
    topk = {"torch.topk + scatter": Usual(topk_scatter, topk_inputs)}
    cases = [Case("accumulate_votes", shape, operations, read + 8 * area,
                  lambda: (*operands(), torch.zeros(outer, inner, dtype=torch.int32, device=t.device), t.rng()),
                  accumulate_votes, product | gradient)]  # fmt: skip
    for rule, allowed in (("gain", 0.0), ("spectral", SPECTRAL_DIFFERENCE)):
        cases.append(Case(f"learn {rule}", shape, operations, read + 2 * area, lambda: (*operands(), weight()),
                          with_rule(learn, rule), product | adamw, moves=True, allowed=allowed))  # fmt: skip
        cases.append(Case(f"flip {rule}", (outer, inner), 0, 6 * area,
                          lambda: (t.integers(1, outer, inner, largest=9999, dtype=torch.int32), weight()),
                          with_rule(flip, rule), topk, moves=True, allowed=allowed))  # fmt: skip
    return cases


def gradient_inputs(d: Tensor, x: Tensor, weight: Tensor, *_: Tensor) -> tuple:
    """A set for `gradient_step`: operands in bf16, a float weight and its optimizer."""
    parameter = torch.nn.Parameter(weight[0].float() * 0.02)
    return d.bfloat16(), x.bfloat16(), parameter, torch.optim.AdamW([parameter], lr=1e-3, fused=True)


def gradient_step(d: Tensor, x: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """What `learn` replaces: a weight gradient, and a step of AdamW."""
    parameter.grad = (d.t() @ x).float()
    optimizer.step()


def topk_inputs(votes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A set for `topk_scatter`: as many weights in a row as in a tile."""
    return votes.float().view(-1, 4096), weight.view(-1, 4096).clone()


def topk_scatter(scores: Tensor, weight: Tensor) -> None:
    """The moves of largest |S| in each row, with what torch has: scores float32, weight int8, both (tiles, n)."""
    chosen = scores.abs().topk(int(K * scores.shape[1]), dim=1).indices
    weight.scatter_(1, chosen, (weight.gather(1, chosen) - scores.gather(1, chosen).sign()).to(torch.int8))


def all_cases(t: Timer, sizes: Sizes) -> list[Case]:
    """Every kernel's cases."""
    return [case for of in (product_cases, row_cases, learn_cases) for case in of(t, sizes)]


def ceilings(t: Timer, sizes: Sizes) -> dict[str, float]:
    """What the machine does at best: int8 and bf16 operations and copied bytes a second."""
    n, half = sizes.ceiling, sizes.copied // 2
    pairs = [(t.integers(n, n), t.integers(n, n)) for _ in range(2)]
    halves = [(a.bfloat16(), b.bfloat16()) for a, b in pairs]
    buffers = [(torch.empty(half, dtype=torch.int8, device=t.device), t.integers(half)) for _ in range(2)]
    return {
        "int8_operations_per_second": 2 * n**3 / t.median(lambda a, b: torch._int_mm(a, b.t()), pairs),
        "bf16_operations_per_second": 2 * n**3 / t.median(lambda a, b: a @ b.t(), halves),
        "copied_bytes_per_second": sizes.copied / t.median(lambda a, b: a.copy_(b), buffers),
    }


def bench_kernels(device: torch.device, sizes: Sizes) -> dict:
    """Measure every case, printing a line for each: {"ceilings": ..., "kernels": [...]}."""
    t = Timer(device, sizes.seconds)
    top = ceilings(t, sizes)
    print(f"kernels; ceilings: int8 {top['int8_operations_per_second'] / 1e12:.4g} Top/s, "
          f"bf16 {top['bf16_operations_per_second'] / 1e12:.4g} Tflop/s, "
          f"copy {top['copied_bytes_per_second'] / 1e9:.4g} GB/s")  # fmt: skip
    print(f"{'kernel':27}{'shape':20}{'time':>12}{'Top/s':>10}{'GB/s':>10}{'of floor':>10}  "
          "the usual way: its time (times ours)")  # fmt: skip
    rows = []
    for case in all_cases(t, sizes):
        row = {"kernel": case.name, "shape": case.shape, "operations": case.operations, "bytes": case.bytes}
        try:
            row |= measured(case, t, top)
        except Exception as error:  # one kernel must not stop the others
            row["wrong"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(row)
        print(kernel_line(row), flush=True)
    return {"ceilings": top, "kernels": rows}


def measured(case: Case, t: Timer, top: dict[str, float]) -> dict:
    """What a case's line has besides its name; no time if its result is wrong."""
    sets = t.sets(case.make)
    if problem := wrong(case, sets[0]):
        return {"wrong": problem}
    usual = {name: t.median(way.run, [way.convert(*inputs) for inputs in sets]) for name, way in case.usual.items()}
    if case.moves:
        sets += [(-first, *others) for first, *others in sets]
    seconds = t.median(case.run, sets)
    floor = max(case.operations / top["int8_operations_per_second"], case.bytes / top["copied_bytes_per_second"])
    return {
        "wrong": "", "seconds": seconds, "operations_per_second": case.operations / seconds,
        "bytes_per_second": case.bytes / seconds, "of_floor": floor / seconds, "usual_seconds": usual,
    }  # fmt: skip


def kernel_line(row: dict) -> str:
    """A case's line for people."""
    start = f"{row['kernel']:27}{' x '.join(map(str, row['shape'])):20}"
    if row["wrong"]:
        return f"{start}  WRONG, so not timed: {row['wrong']}"
    usual = [f"{name} {1e6 * s:.1f} us ({s / row['seconds']:.2f}x)" for name, s in row["usual_seconds"].items()]
    operations = f"{row['operations_per_second'] / 1e12:10.4g}" if row["operations"] else " " * 10
    return (f"{start}{1e6 * row['seconds']:9.1f} us{operations}"
            f"{row['bytes_per_second'] / 1e9:10.4g}{row['of_floor']:10.2f}  {', '.join(usual)}")  # fmt: skip
