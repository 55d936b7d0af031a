"""Work that nothing waits for yet, on a stream of its own beside the GPU's other work.

A backward pass hands delta from layer to layer and waits for no votes until the step; it is mostly bound by memory,
sums of votes are not, and together they take less time than one after the other. On a CPU `beside` just calls.

What such work reads must stay in memory until it is done, so it may lag behind by `LAG` calls and no more.
"""

from collections.abc import Callable
from typing import Any

import torch

LAG = 1

_streams: dict[torch.device, torch.cuda.Stream] = {}
_under_way: list[tuple[torch.cuda.Event, Any]] = []  # when each call is done, and what it reads


def beside(device: torch.device, function: Callable[..., None], *arguments: Any, in_backward: bool = False) -> None:
    """Call function(*arguments), which works on tensors of `device`, beside what the current stream does from here on.

    With `in_backward` all is waited for when the running backward pass ends, else by `wait`.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        function(*arguments)
        return
    if in_backward:
        torch.autograd.Variable._execution_engine.queue_callback(wait)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function(*arguments)
    _under_way.append((stream.record_event(), arguments))
    wait(LAG)


def wait(but: int = 0) -> None:
    """Let the current stream wait for all calls `but` the newest so many."""
    while len(_under_way) > but:
        _under_way.pop(0)[0].wait()


def wait_for(tensor: torch.Tensor) -> None:
    """Let the current stream wait if a call that has `tensor` among its arguments is under way."""
    if any(tensor is argument for _, arguments in _under_way for argument in arguments):
        wait()
