"""Kernels and training steps against their ceilings, and against the same work done the usual way.

    python bench.py                                 kernels, then training steps, then the peak memory of a step
    python bench.py kernels --json                  one section of the three; the last line is a JSON object
    python bench.py --quick --device cpu            a few small cases in seconds, to see that it works

A GPU is given the sizes of real training and the Triton kernels; a CPU small sizes and the torch backend.

A time is the median of many calls, warm, on random data, several sets of inputs taking turns so that together they
outgrow the cache. On a GPU it is the GPU's own: CUDA events, the calls queued before the first one runs. Ceilings are
measured on the spot: operations of a large torch product, int8 and bf16; bytes read plus written of a large copy. A
kernel's floor is the larger of operations / int8 ceiling and bytes / copy ceiling, bytes being the least its inputs and
outputs allow; "of floor" is floor / time, 1 where nothing is lost. A kernel whose result is not its reference's gets no
time, and the exit status is 1. Steps are those of experiments/steps.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.steps import FULL_STEPS, QUICK_STEPS, SMALL_STEPS, bench_steps, step_table
from kernels import backend, contribution, contribution_flip, flip, int8_matmul, quantize, rmsnorm
from kernels.philox import Stream, dither_words, integers
from kernels.tiles import tile_grid

SECTIONS = ("kernels", "step", "memory")
ACT_RANGE, BITS, K = 6.0, 6, 0.25
# Scores of the spectral rule are float: where two nearly tie, another order of summation may choose the other weight.
SPECTRAL_DIFFERENCE = 0.005  # the largest share of weights in which kernel and reference may differ


@dataclass(frozen=True)
class Sizes:
    """How large the kernels' cases are."""

    products: tuple[tuple[int, int, int], ...]  # tokens, in, out
    rows: tuple[int, int]  # tokens, width
    learn: tuple[int, int, int]  # tokens, out, in
    vocabulary: int
    ceiling: int  # side of the product that measures a ceiling
    copied: int  # bytes
    seconds: float  # spent on each time


FULL = Sizes(((4096, 4096, 4096), (16384, 768, 3072)), (65536, 768), (65536, 768, 3072), 50_304, 8192, 2**31, 0.3)
SMALL = Sizes(((512, 512, 512), (2048, 128, 512)), (4096, 128), (2048, 128, 512), 512, 1024, 2**27, 0.2)
QUICK = Sizes(((64, 128, 64),), (128, 64), (128, 64, 128), 65, 128, 2**22, 0.01)


class Clock:
    """Random inputs on a device, and the median time of calls on them."""

    def __init__(self, device: torch.device, budget: float):
        self.device, self.budget = device, budget
        self.random = torch.Generator(device).manual_seed(1)
        cuda = device.type == "cuda"
        self.cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size if cuda else 2**24

    def int8(self, *shape: int, largest: int = 127) -> Tensor:
        """Uniform in [-largest, largest]."""
        return torch.randint(-largest, largest + 1, shape, generator=self.random, device=self.device, dtype=torch.int8)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def int32(self, *shape: int) -> Tensor:
        """Uniform in (-10,000, 10,000)."""
        return torch.randint(-9999, 10000, shape, generator=self.random, device=self.device, dtype=torch.int32)

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

    def _cuda_median(self, run: Callable, sets: Sequence[tuple], batch: int = 10) -> float:
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
class Case:
    """A kernel at one size: what it does at least, how it is called, and the same work done the usual way."""

    name: str
    shape: tuple[int, ...]
    operations: int
    bytes: int
    run: Callable
    reference: Callable
    sets: list[tuple]
    usual: dict[str, tuple[Callable, list[tuple]]] = field(default_factory=dict)
    allowed: float = 0.0  # the share of elements in which result and reference may differ


def wrong(case: Case) -> str:
    """How the kernel's results, or what it made of its inputs, differ from the reference's; "" if they do not."""
    ours, theirs = ([t.clone() if isinstance(t, Tensor) else t for t in case.sets[0]] for _ in range(2))
    got, before = case.run(*ours), backend.chosen()
    backend.use("torch")
    try:
        expected = case.reference(*theirs)
    finally:
        backend.use(before)
    results = [r if isinstance(r, tuple) else (r,) for r in (got, expected)]
    for number, (a, b) in enumerate(zip((*results[0], *ours), (*results[1], *theirs), strict=True), 1):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {tuple(a.shape)} and should be {b.dtype} {tuple(b.shape)}"
        if (count := int((a != b).sum())) > case.allowed * a.numel():
            return f"result {number} is not the reference's in {count:,} of {a.numel():,} values"
    return ""


def product_cases(c: Clock, sizes: Sizes) -> Iterator[Case]:
    """y = X W^T forward; D W backward."""
    scale = torch.tensor(0.01, device=c.device)
    for tokens, inner, outer in sizes.products:
        operations, read = 2 * tokens * inner * outer, tokens * inner + inner * outer
        sets = c.sets(lambda: (c.int8(tokens, inner), c.int8(outer, inner, largest=31), scale))
        usual = {
            "torch._int_mm": (lambda x, w, _: torch._int_mm(x, w.t()), sets),
            "bf16 matmul": (lambda x, w: x @ w.t(), [(x.bfloat16(), w.bfloat16()) for x, w, _ in sets]),
        }
        yield Case("int8_matmul", (tokens, inner, outer), operations, read + 4 * tokens * outer,
                   int8_matmul.int8_matmul, int8_matmul.int8_matmul_torch, sets, usual)  # fmt: skip
    sets = [(c.int8(tokens, outer), w) for _, w, _ in sets]
    usual = {"bf16 matmul": (torch.matmul, [(d.bfloat16(), w.bfloat16()) for d, w in sets])}
    yield Case("int8_product", (tokens, outer, inner), operations, tokens * outer + inner * outer + 4 * tokens * inner,
               int8_matmul.int8_product, int8_matmul.int8_product_torch, sets, usual)  # fmt: skip


def row_cases(c: Clock, sizes: Sizes) -> Iterator[Case]:
    """What touches every element once: quantizers and the norm's backward."""
    tokens, width = sizes.rows
    area, scale = tokens * width, torch.tensor(1e-4, device=c.device)
    written = 2 if backend.on_triton(scale) else 1  # the Triton kernels lay their result out for the votes too
    for dtype in (torch.float32, torch.bfloat16):
        sets = c.sets(lambda: (c.floats(tokens, width, dtype=dtype), ACT_RANGE))
        usual = {"F.rms_norm": (lambda x, _: F.rms_norm(x, x.shape[-1:]), sets)}
        yield Case(f"rmsnorm_quantize {str(dtype)[6:]}", sizes.rows, 0, area * (dtype.itemsize + written) + 4 * tokens,
                   quantize.rmsnorm_quantize, laid_out_twice(quantize.rmsnorm_quantize_torch), sets, usual)  # fmt: skip
    rows = dither_words(1, 0, Stream.ROWS, tokens).to(c.device)[:, None]
    columns = dither_words(1, 0, Stream.COLUMNS, width).to(c.device)
    sets = c.sets(lambda: (c.floats(tokens, width), torch.tensor(5.0 / 127.0, device=c.device), rows, columns))
    yield Case("quantize_delta", sizes.rows, 0, area * (4 + written),
               quantize.quantize_delta, laid_out_twice(quantize.quantize_delta_torch), sets)  # fmt: skip
    sets = c.sets(lambda: (c.int32(tokens, width), scale, c.floats(tokens, width), c.floats(tokens, 1).abs()))
    yield Case("rmsnorm_backward", sizes.rows, 0, 12 * area + 4 * tokens,
               rmsnorm.rmsnorm_backward, rmsnorm.rmsnorm_backward_torch, sets)  # fmt: skip


def laid_out_twice(quantizer: Callable) -> Callable[..., tuple]:
    """The reference of a quantizer whose public function returns its int8 result once more, laid out for the votes."""

    def plain(*inputs: Any) -> tuple:
        result = quantizer(*inputs)
        first, *others = result if isinstance(result, tuple) else (result,)
        return first, first, *others

    return plain


def learn_cases(c: Clock, sizes: Sizes) -> Iterator[Case]:
    """Votes, and the whole learning step of a layer, against a weight gradient in bf16 with AdamW."""
    tokens, outer, inner = shape = sizes.learn
    operations, read, area = 2 * tokens * outer * inner, tokens * (outer + inner), outer * inner
    # Each operand is contiguous along the tokens, as the quantizers leave it and cuBLAS likes it.
    columns = c.sets(lambda: (c.int8(outer, tokens), c.int8(inner, tokens)))
    sets = [(d.t(), x.t()) for d, x in columns]
    halves = [(d.bfloat16().contiguous(), x.bfloat16().contiguous()) for d, x in sets]
    weight = torch.nn.Parameter(c.floats(outer, inner) * 0.02)
    adamw = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def gradient_step(d: Tensor, x: Tensor) -> None:
        weight.grad = (d.t() @ x).float()
        adamw.step()

    product = {"torch._int_mm": (lambda d, x: torch._int_mm(d, x.t()), columns)}
    usual = product | {"bf16 weight gradient": (lambda d, x: d.t() @ x, halves)}
    yield Case("votes", shape, operations, read + 4 * area, contribution.votes, contribution.votes_torch, sets, usual)

    # Every set is used with its votes and with their opposite: moves undo each other and stay legal.
    weights = [c.int8(outer, inner, largest=31) for _ in sets]
    inputs = [(d * sign, x, w) for sign in (1, -1) for (d, x), w in zip(sets, weights, strict=True)]
    usual = product | {"bf16 weight gradient, fused AdamW": (gradient_step, halves)}
    for rule, allowed in (("spectral", SPECTRAL_DIFFERENCE), ("gain", 0.0)):
        yield Case(f"contribution_flip {rule}", shape, operations, read + 2 * area, learner(rule),
                   learner(rule), inputs, usual, allowed)  # fmt: skip
    if backend.on_triton(weights[0]):
        yield Case("votes, then flip spectral", shape, operations, read + 10 * area, learner("spectral", fused=False),
                   learner("spectral"), inputs, usual, SPECTRAL_DIFFERENCE)  # fmt: skip
    voted = [(contribution.votes(d, x), w) for d, x, w in inputs]
    ranked = [(v.float().view(-1, 4096), w.view(-1, 4096)) for v, w in voted]
    yield Case("flip gain", (outer, inner), 0, 6 * area, learner("gain"), learner("gain"), voted,
               {"torch.topk + scatter": (topk_scatter, ranked)})  # fmt: skip


def topk_scatter(scores: Tensor, weight: Tensor) -> None:
    """The moves of largest |S| in each row, with what torch has: scores float32, weight int8, both (tiles, n)."""
    chosen = scores.abs().topk(int(K * scores.shape[1]), dim=1).indices
    weight.scatter_(1, chosen, (weight.gather(1, chosen) - scores.gather(1, chosen).sign()).to(torch.int8))


def learner(rule: str, fused: bool | None = None) -> Callable[..., None]:
    """A function of (d, x, weight) or of (votes, weight) that makes one matrix's learning step by `rule`."""

    def learn(*given: Tensor) -> None:
        *operands, weight = given
        if backend.on_triton(weight):
            votes = tuple(operands) if len(operands) > 1 else operands[0]
            settings = {"rule": rule, "bits": BITS, "k": K, "seed": 1, "fused": fused if len(operands) > 1 else False}
            contribution_flip.learn_step([contribution_flip.Matrix(weight)], [votes], **settings)
            return
        down, across = tile_grid(tuple(weight.shape), 64)
        words = integers(1, 0, Stream.TOPK, down * across)
        if len(operands) > 1:
            contribution_flip.contribution_flip_torch(*operands, weight, words, rule=rule, bits=BITS, k=K)
        else:
            flip.flip_torch([weight], operands, words, bits=BITS, k=K)

    return learn


def ceilings(c: Clock, sizes: Sizes) -> dict[str, float]:
    """What the machine does at best: int8 and bf16 operations and copied bytes a second."""
    n, half = sizes.ceiling, sizes.copied // 2
    pairs = [(c.int8(n, n), c.int8(n, n)) for _ in range(2)]
    halves = [(a.bfloat16(), b.bfloat16()) for a, b in pairs]
    buffers = [(torch.empty(half, dtype=torch.int8, device=c.device), c.int8(half)) for _ in range(2)]
    return {
        "int8_operations_per_second": 2 * n**3 / c.median(lambda a, b: torch._int_mm(a, b.t()), pairs),
        "bf16_operations_per_second": 2 * n**3 / c.median(lambda a, b: a @ b.t(), halves),
        "copied_bytes_per_second": sizes.copied / c.median(lambda a, b: a.copy_(b), buffers),
    }


def bench_kernels(device: torch.device, sizes: Sizes) -> dict:
    """Measure every case, printing a line for each: {"ceilings": ..., "kernels": [...]}."""
    c = Clock(device, sizes.seconds)
    top = ceilings(c, sizes)
    print(f"kernels; ceilings: int8 {top['int8_operations_per_second'] / 1e12:.4g} Top/s, "
          f"bf16 {top['bf16_operations_per_second'] / 1e12:.4g} Tflop/s, "
          f"copy {top['copied_bytes_per_second'] / 1e9:.4g} GB/s")  # fmt: skip
    print(f"{'kernel':27}{'shape':20}{'time':>12}{'Top/s':>9}{'GB/s':>9}{'of floor':>10}  "
          "the usual way: its time (times ours)")  # fmt: skip
    rows = []
    for cases in (product_cases, row_cases, learn_cases):
        for case in cases(c, sizes):
            rows.append(row := measured(case, c, top))
            print(kernel_line(row), flush=True)
    return {"ceilings": top, "kernels": rows}


def measured(case: Case, c: Clock, top: dict[str, float]) -> dict:
    """A case's line as JSON; no time if its result is wrong."""
    row = {"kernel": case.name, "shape": case.shape, "operations": case.operations, "bytes": case.bytes}
    row["wrong"] = wrong(case)
    if row["wrong"]:
        return row
    seconds = c.median(case.run, case.sets)
    floor = max(case.operations / top["int8_operations_per_second"], case.bytes / top["copied_bytes_per_second"])
    return row | {
        "seconds": seconds, "operations_per_second": case.operations / seconds, "of_floor": floor / seconds,
        "bytes_per_second": case.bytes / seconds,
        "usual_seconds": {name: c.median(run, sets) for name, (run, sets) in case.usual.items()},
    }  # fmt: skip


def kernel_line(row: dict) -> str:
    """A case's line for people."""
    start = f"{row['kernel']:27}{' x '.join(map(str, row['shape'])):20}"
    if row["wrong"]:
        return f"{start}  WRONG, so not timed: {row['wrong']}"
    usual = [f"{name} {1e6 * s:.1f} us ({s / row['seconds']:.2f}x)" for name, s in row["usual_seconds"].items()]
    operations = f"{row['operations_per_second'] / 1e12:9.4g}" if row["operations"] else " " * 9
    return (f"{start}{1e6 * row['seconds']:9.1f} us{operations}"
            f"{row['bytes_per_second'] / 1e9:9.4g}{row['of_floor']:10.2f}  {', '.join(usual)}")  # fmt: skip


def place(device: torch.device) -> dict:
    """The machine and the software, for people and JSON."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "triton": getattr(backend.triton, "__version__", None),
        "backend": "triton" if backend.on_triton(torch.empty(0, device=device)) else "torch",
        "why_not_triton": backend.problem() if cuda else "the device is a CPU",
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status: 1 if a result was wrong, 2 for arguments it does not know."""
    parser = argparse.ArgumentParser("bench.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if unknown := [s for s in options.sections if s not in SECTIONS]:
        parser.error(f"section {unknown[0]!r}: it must be one of {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    device, sections = torch.device(options.device), options.sections or SECTIONS
    chosen = "quick" if options.quick else "full" if device.type == "cuda" else "small"
    sizes, steps = {"quick": (QUICK, QUICK_STEPS), "full": (FULL, FULL_STEPS), "small": (SMALL, SMALL_STEPS)}[chosen]
    result: dict[str, Any] = {**place(device), "sizes": chosen}
    why = f", because {result['why_not_triton']}" if result["why_not_triton"] else ""
    print(f"{result['device']}; torch {result['torch']}, triton {result['triton']}; backend {result['backend']}{why}")
    if "kernels" in sections:
        result |= bench_kernels(device, sizes)
    if {"step", "memory"} & set(sections):
        result["steps"] = bench_steps(steps, device)
        for section in [s for s in ("step", "memory") if s in sections]:
            print(f"\n{section}\n{step_table(result['steps'], section)}", flush=True)
    if options.json:
        print(json.dumps(result))
    return int(any(row["wrong"] for row in [*result.get("kernels", ()), *result.get("steps", ())]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
