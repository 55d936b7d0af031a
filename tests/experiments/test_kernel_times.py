"""experiments.kernel_times: what counts as a wrong result, and how inputs take turns."""

import torch

from experiments.kernel_times import QUICK, Case, Timer, all_cases, measured, wrong
from kernels import backend

CPU = torch.device("cpu")


def test_triton_has_the_results_of_torch(on_triton, device):
    timer = Timer(device, 0.0)
    for case in all_cases(timer, QUICK):
        assert wrong(case, case.make()) == "", case.name


def made_up(ours, theirs, *, allowed: float = 0.0) -> Case:
    """A case whose kernel is `ours` and whose reference is `theirs`."""
    def run(t: torch.Tensor) -> torch.Tensor | None:
        return theirs(t) if backend.chosen() == "torch" else ours(t)

    return Case("made up", (1,), 0, 1, lambda: (), run, allowed=allowed)


def test_what_counts_as_wrong():
    x = torch.arange(100)
    before = backend.chosen()
    backend.use("auto")
    try:
        assert wrong(made_up(lambda t: t + 1, lambda t: t + 1), (x,)) == ""
        spoiled = lambda t: t.index_fill(0, torch.tensor([3]), -1)  # noqa: E731
        assert "1 of 100" in wrong(made_up(spoiled, torch.clone), (x,))
        assert wrong(made_up(spoiled, torch.clone, allowed=0.01), (x,)) == ""
        assert "int64 (100,) and should be torch.int32" in wrong(made_up(lambda t: t, lambda t: t.int()), (x,))
        assert "(2, 50)" in wrong(made_up(lambda t: t.view(2, 50), torch.clone), (x,))
        in_place = made_up(lambda t: t.add_(1) and None, lambda t: None)
        assert "result 2" in wrong(in_place, (x[:1] * 1,)), "what a kernel makes of its inputs counts"
        assert torch.equal(x, torch.arange(100)), "inputs are kept for the timing"
        assert backend.chosen() == "auto"
    finally:
        backend.use(before)


def test_inputs_outgrow_the_cache_and_take_turns():
    timer, seen = Timer(CPU, 0.0), []
    timer.cache = 1000
    sets = timer.sets(lambda: (timer.integers(100), 3.0))
    assert len(sets) == 11 and not torch.equal(sets[0][0], sets[1][0])
    assert timer.median(lambda t, _: seen.append(t.data_ptr()), sets) > 0
    assert seen[2:] == [t.data_ptr() for t, _ in sets[:5]], "after two calls to warm up"


def test_moves_are_undone_while_they_are_timed():
    seen = []
    case = Case("moves", (1,), 1, 1, lambda: (torch.ones(1), torch.zeros(1)),
                lambda votes, weight: seen.append(votes.item()), moves=True)  # fmt: skip
    timer = Timer(CPU, 0.0)
    timer.cache = 1
    top = {"int8_operations_per_second": 1.0, "copied_bytes_per_second": 1.0}
    assert measured(case, timer, top)["seconds"] > 0
    assert {-1.0, 1.0} == set(seen)
