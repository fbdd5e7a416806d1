# SPDX-License-Identifier: MIT
"""What outlives the call in which it is made: memory that backends keep for the next call, and CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TypeVar

import torch

T = TypeVar("T")

_capturing = Lock()  # one stream serves all captures of a device


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """`make()`, whose tensors may be written to by any later call, on the current stream.

    torch.compile(mode="reduce-overhead") runs a function once to warm up with all memory of its thread from the pool
    of its CUDA graphs, and raises if anything but the results is still in use afterwards: there another thread makes
    it.
    """
    if "torch._inductor.cudagraph_trees" in sys.modules:
        return elsewhere(make, device)
    return _made(make)


def elsewhere(make: Callable[[], T], device: torch.device) -> T:
    """`make()` by another thread, on this one's stream: its memory is from no pool that this thread is asked to use."""
    if device.type != "cuda":
        return _made(make)
    stream = torch.cuda.current_stream(device)

    def on_stream() -> T:
        with torch.cuda.stream(stream):
            return _made(make)

    with ThreadPoolExecutor(1) as other:
        return other.submit(on_stream).result()


def _made(make: Callable[[], T]) -> T:
    """Outside of inference mode, whose tensors cannot be changed once it has ended."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


def record(launches: Callable[[], T], device: torch.device) -> tuple[T, torch.cuda.CUDAGraph]:
    """What `launches` returns, as memory that each replay of the graph fills anew. Runs none of it.

    Made `elsewhere`, or what is allocated on the way would not be the graph's own.
    """
    with _capturing, torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
            found = launches()
    return found, graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same each time: torch hands out 32 in turn, and one that another thread works on would be captured, too."""
    return torch.cuda.Stream(device)
