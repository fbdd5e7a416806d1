# SPDX-License-Identifier: MIT
"""One step of a traced inference as a CUDA graph: captured once per shape and setting, replayed T times.

Not yet run on hardware. A capture that fails raises; nothing else is run instead. What cannot be captured (`tol`,
which reads back; Adam; pairs of torch.distributions; a taped module) runs launch by launch, and `explain` says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pc_runner.engine import Traced
from pc_runner.moves import Moves
from pc_runner.settle import Nodes, Settled, check_finite, finish_trace, spread


def obstacle(engine_kind: str, nodes: Nodes, moves: Moves) -> str | None:
    """Why this inference is not replayed from a CUDA graph; None if it is."""
    if not nodes.states[0].mu.is_cuda:
        return "it is not on a CUDA device"
    if engine_kind != "traced":
        return "the module's step is taped anew every time"
    if moves.tol is not None:
        return "tol reads back from the device"
    if moves.rates is not None:
        return "the lr changes from move to move"
    if moves.optimizer is not None or nodes.pairs or nodes.priors:
        return "Adam, priors and pairs of torch.distributions run launch by launch"
    return None if nodes.free and moves.steps else "nothing moves"


class Captured:
    """Buffers of fixed addresses and the graph that moves them by one step."""

    def __init__(self, engine: Traced, nodes: Nodes, moves: Moves):
        self._nodes, self._moves = nodes, moves
        self._engine = engine.static()
        self.phis = [phi.clone() for phi in nodes.phis()]
        self._speeds = [torch.zeros_like(phi) for phi in self.phis] if moves.momentum else None
        first = self.phis[nodes.free[0]]
        self.device = first.device
        self._row = torch.zeros(1, dtype=torch.int64, device=first.device)
        self._rows = first.new_zeros(moves.steps, len(nodes.states))
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # libraries set themselves up outside the capture
            self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: another thread, a loader that pins memory, may go on meanwhile
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._step()

    def _step(self) -> None:
        nodes = self._nodes
        mus = self._engine.mus([self.phis[l] for l in nodes.free])
        errors = nodes.deltas(self.phis, mus, self._engine.live, self._moves.trace)
        back = spread(self._engine.feedback(errors.grad_mu), nodes)
        if errors.energy is not None:
            self._rows.index_copy_(0, self._row, errors.energy.mean(1).unsqueeze(0).to(self._rows.dtype))
        self._row.add_(1).remainder_(max(self._moves.steps, 1))
        nodes.update(self.phis, mus, errors, back, self._moves, self._speeds)

    def run(self, engine: Traced, nodes: Nodes) -> list[Tensor]:
        """T replays from the states of `nodes`, which receive the end; the trace's rows before each move."""
        self._engine.take(engine)
        for buffer, phi in zip(self.phis, nodes.phis(), strict=True):
            buffer.copy_(phi)
        for buffer in [self._row, *(self._speeds or [])]:
            buffer.zero_()
        for _ in range(self._moves.steps):
            self._graph.replay()
        for l in nodes.free:
            nodes.states[l].phi.copy_(self.phis[l])
        return list(self._rows.clone()) if self._moves.trace else []


class Captures:
    """The captured steps of one network; the four used last are kept."""

    limit = 4

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Captured] = OrderedDict()
        self._lock = Lock()

    def settle(self, engine: Traced, nodes: Nodes, moves: Moves) -> Settled:
        """`settle`, replayed. Two runs would share buffers: threads take turns, streams have captures of their own."""
        device = nodes.states[0].mu.device
        with self._lock, torch.cuda.device(device):
            rows = self._captured(engine, nodes, moves).run(engine, nodes)
        if moves.trace:
            phis = nodes.phis()
            rows.append(nodes.energies(phis, engine.mus([phis[l] for l in nodes.free])).mean(1))
        check_finite(nodes, rows)
        return Settled(moves.steps, finish_trace(rows, moves.steps, moves), engine.products)

    def _captured(self, engine: Traced, nodes: Nodes, moves: Moves) -> Captured:
        shapes, stream = tuple(phi.shape for phi in nodes.phis()), torch.cuda.current_stream().cuda_stream
        key = (engine.step, moves, self._addresses(nodes), shapes, stream)
        if key not in self._kept:
            if len(self._kept) >= self.limit:
                self._kept.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad():  # or its buffers could not be written to afterwards
                self._kept[key] = Captured(engine, nodes, moves)
        self._kept.move_to_end(key)
        return self._kept[key]

    @staticmethod
    def _addresses(nodes: Nodes) -> tuple[int, ...]:
        """Tensors that the graph reads where they lie."""
        heads = [p for s in nodes.states if s.head is not None for p in (s.head.weight, s.head.bias)]
        read: Sequence[Tensor | None] = [*nodes.masks, *(s.hold for s in nodes.states), *nodes.log_vars, *heads]
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in read)

    def __deepcopy__(self, memo: Any) -> Captures:
        return Captures()

    def __reduce__(self) -> Any:
        return Captures, ()
