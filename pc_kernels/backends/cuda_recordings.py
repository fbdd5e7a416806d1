# SPDX-License-Identifier: MIT
"""Schedule (a) from CUDA graphs: two launches a step are more work for the CPU than small ones are for the GPU.

A `Recording` is one call of the op `infer_layers` as a graph that works on tensors of its own; a run copies the
caller's tensors in, replays, and copies the results out. A kind of call (everything but the tensors' contents) is
recorded when it comes for the second time, so that a single call costs nothing more; the most recent ones stay.

Two runs of a recording must not overlap: a lock orders the threads, and each stream has recordings of its own. While
the caller captures a graph himself, the launches become part of that graph.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pc_kernels.backends.lasting import elsewhere, record
from pc_kernels.backends.reference_infer import Arguments

KEPT, NOTED = 8, 64  # recordings, and kinds that came once
# Beyond these a launch takes the GPU longer than the CPU, and a recording would keep much memory
MOST_STATES = 1 << 21  # entries of all nodes: M1 at B = 1024 has 1.6 million
MOST_WEIGHTS = 1 << 23

_recordings: OrderedDict[Any, Recording] = OrderedDict()  # the least recently used first
_once: OrderedDict[Any, None] = OrderedDict()
_lock = Lock()


def serves(args: Arguments) -> bool:
    """Whether calls like this one are recorded."""
    if not args.x.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):  # torch then allocates nothing while it captures
        return False
    states = args.x.shape[0] * sum(weight.shape[0] for weight in args.weights)
    return args.steps > 1 and 0 < states <= MOST_STATES and sum(w.numel() for w in args.weights) <= MOST_WEIGHTS


def run(op: Callable[..., tuple[Any, ...]], arguments: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """`op(*arguments)`, by a recording from its second call on."""
    key = (device, _stream(device), _kind(arguments))
    with _lock:
        recording = _recorded(key, op, arguments, device)
    if recording is not None:
        return recording.run(list(_tensors(arguments)))
    found = op(*arguments)
    with _lock:
        _once[key] = None
        if len(_once) > NOTED:
            _once.popitem(last=False)
    return found


def _recorded(key: Any, op: Callable[..., Any], arguments: Sequence[Any], device: torch.device) -> Recording | None:
    """The kind's recording, made if it came before and there is memory."""
    if key in _recordings:
        _recordings.move_to_end(key)
    elif key in _once:
        try:
            _recordings[key] = elsewhere(lambda: Recording(op, arguments, device), device)
        except torch.OutOfMemoryError:  # without copies of everything the call itself may fit
            return None
        del _once[key]
        if len(_recordings) > KEPT:
            _finish(_recordings.popitem(last=False)[1])
    return _recordings.get(key)


def clear_plans() -> None:
    """Forget all recordings: their memory goes back to torch's allocator."""
    with _lock:
        _once.clear()
        while _recordings:
            _finish(_recordings.popitem()[1])


class Recording:
    """See the head of the file."""

    def __init__(self, op: Callable[..., tuple[Any, ...]], arguments: Sequence[Any], device: torch.device):
        self.device = device
        self._lock = Lock()
        self._given = [tensor.clone(memory_format=torch.contiguous_format) for tensor in _tensors(arguments)]
        own = _with(arguments, iter(self._given))
        self._found, self._graph = record(lambda: op(*own), device)

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        """The op's results for these tensors, in fresh memory."""
        with self._lock:
            _copy(self._given, tensors)
            self._graph.replay()
            own = list(_tensors(self._found))
            fresh = [torch.empty_like(tensor) for tensor in own]
            _copy(fresh, own)
        return _with(self._found, iter(fresh))


def _finish(recording: Recording) -> None:
    """Wait for the runs: what follows destroys the graph."""
    if recording.device.type == "cuda":
        torch.cuda.synchronize(recording.device)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """One launch for all float32, which are the most, and one each for the others."""
    pairs = [(a, b) for a, b in zip(to, values, strict=True) if a.numel()]
    floats = [pair for pair in pairs if pair[0].dtype == torch.float32]
    torch._foreach_copy_([a for a, _ in floats], [b for _, b in floats], non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
    for a, b in pairs:
        if a.dtype != torch.float32:
            a.copy_(b, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# arguments and results: tensors, plain values, lists of them


def _kind(entry: Any) -> Any:
    """Equal for calls that one recording serves; hashable."""
    if isinstance(entry, Tensor):
        return entry.shape, entry.dtype
    return tuple([_kind(one) for one in entry]) if isinstance(entry, (list, tuple)) else entry


def _tensors(entry: Any) -> Iterator[Tensor]:
    if isinstance(entry, Tensor):
        yield entry
    elif isinstance(entry, (list, tuple)):
        for one in entry:
            yield from _tensors(one)


def _with(entry: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(entry, Tensor):
        return next(tensors)
    return type(entry)(_with(one, tensors) for one in entry) if isinstance(entry, (list, tuple)) else entry
