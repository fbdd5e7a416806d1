# SPDX-License-Identifier: MIT
"""Memory that outlives the call in which it is made: what backends keep for the next call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """`make()`, whose tensors may be written to by any later call, on the current stream.

    torch.compile(mode="reduce-overhead") runs a function once to warm up with all memory of its thread from the pool of
    its CUDA graphs, and raises if anything but the results is still in use afterwards: there another thread makes it.
    """
    if device.type != "cuda" or "torch._inductor.cudagraph_trees" not in sys.modules:
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
