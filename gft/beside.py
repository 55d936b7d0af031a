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
_under_way: dict[torch.device, list[tuple[torch.cuda.Event, Any]]] = {}  # when each call is done, and what it reads


def beside(device: torch.device, function: Callable[..., None], *arguments: Any, in_backward: bool = False) -> None:
    """Call function(*arguments), which works on tensors of `device`, beside what the current stream does from here on.

    With `in_backward` all is waited for when the running backward pass ends, else by `wait`.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        function(*arguments)
        return
    if in_backward:  # if it ends in an error nothing is called, and the optimizer waits
        torch.autograd.Variable._execution_engine.queue_callback(wait)
    if device not in _streams:
        _streams[device], _under_way[device] = torch.cuda.Stream(device), []
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function(*arguments)
    _under_way[device].append((stream.record_event(), arguments))
    _wait(device, LAG)


def _wait(device: torch.device, but: int = 0) -> None:
    calls = _under_way[device]
    while len(calls) > but:
        calls[0][0].wait(torch.cuda.current_stream(device))
        del calls[0]


def wait() -> None:
    """Let the current stream of each device wait for all calls."""
    for device in _under_way:
        _wait(device)


def wait_for(tensor: torch.Tensor) -> None:
    """Let the current stream wait if a call that has `tensor` among its arguments is under way."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return
    if any(tensor is argument for _, arguments in _under_way.get(tensor.device, ()) for argument in arguments):
        _wait(tensor.device)


def forget() -> None:
    """Drop calls that will never be made, as those of a CUDA graph whose recording failed."""
    for calls in _under_way.values():
        calls.clear()
