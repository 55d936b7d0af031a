"""A training step as one CUDA graph: recorded once, then launched as a whole.

A step of a small net is hundreds of kernels of a few microseconds, which the host cannot launch as fast as the GPU runs
them. What a graph holds is fixed when it is recorded, so what changes from step to step lies in device tensors (the
seed and number of the step, learning rates), and what only the host can do comes before the graph. A setting that is
none of these and changes a few times in a run, as the size of moves does, has the graph recorded anew.
"""

from collections.abc import Callable

import torch

from gft.beside import forget
from kernels.update_rule import UpdateRule, unsupported_reason
from run.config import Config

WARM_UP = 3  # steps that run as written first: they compile, and make what optimizers keep


def unrecordable_reason(cfg: Config, device: torch.device, backend: str, ranks: int) -> str:
    """Why a step of this run cannot be a CUDA graph, "" if it can."""
    if device.type != "cuda":
        return f"the device is a {device.type.upper()}"
    if ranks > 1:
        return "ranks wait for each other on the host"
    if cfg.method == "gft" and backend != "triton":
        return "the torch backend reads values on the host"
    if cfg.method == "gft" and unsupported_reason(UpdateRule(topk_tile=cfg.topk_tile, flip_prob=cfg.flip_prob)):
        return "its moves are made in torch, which reads on the host whether to make them"
    if cfg.under_muon or cfg.method == "signsgd":
        return "this optimizer reads its learning rate on the host"
    return ""


class StepGraph:
    """Calls `step`: as written at first, then as a graph of it, unless that is not `wanted`.

    `fixed` returns the settings on the host that a recording keeps as they were: once they differ all begins again.
    `step` must leave all that outlives it in the tensors it found. Steps of one net must all go through here: they run
    on a stream of their own, as those before a recording must.
    """

    def __init__(self, step: Callable[[], None], wanted: bool, fixed: Callable[[], object] = lambda: None):
        self.step, self.wanted, self.made, self.fixed, self.held = step, wanted, 0, fixed, fixed()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if wanted else None

    def __call__(self, as_written: bool = False) -> None:
        """Make one step; `as_written` where the host looks into it."""
        if self.held != (now := self.fixed()):  # steps as written compile what the new settings need
            self.graph, self.made, self.held = None, 0, now
        if self.wanted and not as_written and self.graph is None and self.made >= WARM_UP:
            self._record()
        if self.graph is not None and not as_written:
            self.graph.replay()
        elif self.stream is None:
            self.step()
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
        self.made += 1

    def _record(self) -> None:
        """Nothing is computed while a graph is recorded. Where that fails, steps go on as written."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
            self.graph = graph
        except RuntimeError as error:
            self.wanted = False
            forget()
            print(f"note: steps are no CUDA graph, since recording one failed: {str(error).splitlines()[0][:200]}")
