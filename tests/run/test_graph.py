"""run/graph.py: which steps can be a CUDA graph, and what happens where one cannot be recorded."""

import dataclasses

import pytest
import torch

from run import device as machine
from run import graph
from run.config import Config
from run.errors import UserError
from run.graph import StepGraph, unrecordable_reason

CUDA = torch.device("cuda")


@pytest.mark.parametrize("changed, backend, ranks, reason", [
    ({}, "triton", 1, ""),
    ({"method": "adamw"}, "torch", 1, ""),
    ({"momentum": 0.9, "update": "backward"}, "triton", 1, ""),
    ({}, "torch", 1, "the torch backend"),
    ({}, "triton", 2, "ranks"),
    ({"bits": 8, "step_size": 4}, "triton", 1, ""),
    ({"topk_tile": 0}, "triton", 1, "its moves"),
    ({"flip_prob": "score"}, "triton", 1, "its moves"),
    ({"method": "muon"}, "triton", 1, "this optimizer"),
    ({"method": "ste", "ste_optimizer": "muon"}, "triton", 1, "this optimizer"),
])  # fmt: skip
def test_reasons(changed, backend, ranks, reason):
    found = unrecordable_reason(dataclasses.replace(Config(), **changed), CUDA, backend, ranks)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_a_cpu_has_none():
    assert unrecordable_reason(Config(), torch.device("cpu"), "torch", 1) == "the device is a CPU"
    assert not machine.choose(Config(device="cpu", compile="false")).graph
    with pytest.raises(UserError, match="cuda_graph = true: the device is a CPU; use --cuda_graph false, or auto"):
        machine.choose(Config(device="cpu", compile="false", cuda_graph="true"))


def test_steps_that_are_not_wanted_as_a_graph_run_as_written():
    made = []
    step = StepGraph(lambda: made.append(1), wanted=False)
    for _ in range(5):
        step()
    assert len(made) == 5 and step.graph is None


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda with a recorder in place of a GPU: what a graph holds is noted, and made again at each replay."""

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    class Recording:
        def __init__(self, graph: Graph, stream: Stream):
            pass

        def __enter__(self) -> None:
            events.append("record")

        def __exit__(self, *_: object) -> None:
            events.append("recorded")

    events: list[str] = []
    for name, value in (("Stream", Stream), ("current_stream", Stream), ("stream", lambda stream: stream),
                        ("CUDAGraph", Graph), ("graph", Recording)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return events


def test_a_step_is_recorded_after_the_warm_up_and_then_launched(recorder):
    step = StepGraph(lambda: recorder.append("step"), wanted=True)
    for number in range(6):
        step(as_written=number == 4)
    warm_up = ["step"] * graph.WARM_UP
    assert recorder == [*warm_up, "record", "step", "recorded", "replay", "step", "replay"]


def test_a_setting_that_changes_has_the_step_recorded_anew(recorder):
    size = [2]
    step = StepGraph(lambda: recorder.append("step"), wanted=True, fixed=lambda: list(size))
    for number in range(9):
        size[0] = 2 if number < 5 else 1
        step()
    run = ["step"] * graph.WARM_UP + ["record", "step", "recorded", "replay"]
    assert recorder == [*run, "replay", *run]


def test_where_recording_fails_steps_go_on_as_written(recorder, capsys):
    def work() -> None:
        recorder.append("step")
        if recorder[-2:] == ["record", "step"]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = StepGraph(work, wanted=True)
    for _ in range(5):
        step()
    assert recorder.count("record") == 1 and "replay" not in recorder and recorder.count("step") == 6
    assert "recording one failed: operation not permitted when stream is capturing" in capsys.readouterr().out
