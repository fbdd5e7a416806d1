# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false
# (launches take Triton's own options, and plain values for constexprs)
"""Plans: all that a call of the op `infer` needs besides its tensors, kept for the next call of the same kind.

A plan owns a workspace (padded copies of inputs and weights, the state, the tables that the kernels read) and the list
of launches; on a GPU the launches of its second run are captured in a CUDA graph, which all later runs replay. A run is
a launch that copies in, the steps, and a launch that copies out into fresh tensors.

Two runs of a plan must not overlap. A lock orders the threads, and the stream orders the device: a stream has plans of
its own (the key holds it), since on two streams they could overlap. While the caller captures a graph himself, the plan
is not kept: its workspace comes from that graph's memory and its launches become part of that graph, which may be
replayed whenever, also beside other runs. There the kernels must have been compiled before: run once, then capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from pc_kernels import checks
from pc_kernels.backends import triton_launches
from pc_kernels.backends.lasting import lasting, record
from pc_kernels.backends.reference_infer import Arguments
from pc_kernels.backends.triton_infer_call import Call
from pc_kernels.backends.triton_infer_copy import SLOTS, WORDS, collect_kernel, encoded, pack_kernel, upload_kernel
from pc_kernels.backends.triton_infer_layout import COPIED, Copies, Layout
from pc_kernels.backends.triton_infer_phases import infer_kernel
from pc_kernels.backends.triton_infer_table import (
    ALL,
    PREDICT,
    PREDICT_ROWS_PHASE,
    START,
    START_ROWS,
    UPDATE,
    UPDATE_ROWS_PHASE,
)
from pc_kernels.backends.triton_launches import PERSISTENT_ROW
from pc_kernels.dispatch import BACKENDS

INTERPRETED = not isinstance(infer_kernel, triton.JITFunction)
_HIP = torch.version.hip is not None
MAX_PLANS = 16
MAX_BYTES = 1 << 30
_WARPS_OF_COPIES = 4

_plans: OrderedDict[Any, Plan] = OrderedDict()  # the least recently used first
_plans_lock = Lock()


class Plan:
    """See the head of the file. `run` does one inference."""

    def __init__(self, layout: Layout, device: torch.device, keeps: bool):
        self.layout, self.device, self._keeps = layout, device, keeps
        self.lock = Lock()
        self._nvidia = not INTERPRETED and torch.version.hip is None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self.work = self._workspace()
        self.signals = self._view(layout.signals_at, torch.int32)
        self._stages = self._view(layout.stages_at, torch.int32)
        self._table = self._view(layout.table_at, torch.int64)
        self._energies = self._view(layout.energies_at, torch.float32)
        self._scales = self._view(layout.scales_at, torch.float32)
        self._rates = self._view(layout.rates_at, torch.float32)
        self._recorded = self._view(layout.recorded_at, torch.int32)
        self._packs = [(copy, self._tables_of(copy)) for copy in layout.packs]
        self._collects = [(copy, self._tables_of(copy)) for copy in layout.collects]
        self._upload()

    def _workspace(self) -> Tensor:
        def zeros() -> Tensor:
            return torch.zeros(self.layout.size, dtype=torch.float32, device=self.device)

        return lasting(zeros, self.device) if self._keeps else zeros()

    @property
    def bytes(self) -> int:
        return 4 * self.layout.size

    def _view(self, at: int, dtype: torch.dtype) -> Tensor:
        return self.work[at:].view(dtype)

    def _upload(self) -> None:
        tables, to = self.layout.tables, self._view(self.layout.tables_at, torch.int32)
        for first in range(0, len(tables), WORDS):
            upload_kernel[(1,)](to[first:], encoded(tables[first : first + WORDS]), SIZE=WORDS, num_warps=1)

    # -- one run -------------------------------------------------------------------------------------------------

    def run(self, tensors: Sequence[Tensor], lr: float, momentum: float) -> tuple[Any, ...]:
        """Phis, deltas, trace and status of the op, from the tensors in the order of `tensors_of`."""
        with self.lock:
            self._pack(tensors, lr, momentum)
            self._runs += 1
            if self._graph is None and self._runs == 2 and self._captures():
                self._capture()
            if self._graph is None:
                self._launch()  # the first run also compiles
            else:
                self._graph.replay()
            return self._collect()

    def _pack(self, tensors: Sequence[Tensor], lr: float, momentum: float) -> None:
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
        for copy, tables in self._packs:
            pack_kernel[(copy.items,)](
                self.work, self.signals, *tables, self._scales, self._rates,
                addresses[copy.first :][:SLOTS], lr, momentum, self.layout.call.size,
                FIRST_LAUNCH=copy.first == 0, JOBS=copy.jobs, NODES=self.layout.form.NODES, BLOCK=COPIED,
                num_warps=_WARPS_OF_COPIES,
            )  # fmt: skip

    def _tables_of(self, copy: Copies) -> tuple[Tensor, Tensor]:
        return self._view(copy.jobs_at, torch.int64), self._view(copy.ends_at, torch.int32)

    def _collect(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        layout, call = self.layout, self.layout.call
        phis, deltas, trace, status = outputs(call, self.device)
        free = [(phi, delta) if phi.numel() else (delta,) for phi, delta in zip(phis, deltas, strict=True)]
        addresses = tuple([tensor.data_ptr() for group in free for tensor in group])
        for copy, tables in self._collects:
            entries = trace.numel() if copy.first == 0 else 0
            collect_kernel[(copy.items + entries,)](
                self.work, self.signals, *tables, addresses[copy.first :][:SLOTS],
                self._energies, self._recorded, trace if call.trace else self.work, status,
                call.batch, call.size, call.steps, layout.products, BACKENDS.index("triton"), layout.parts, copy.items,
                FIRST_LAUNCH=copy.first == 0, TRACE=call.trace and copy.first == 0, JOBS=copy.jobs, BLOCK=COPIED,
                num_warps=_WARPS_OF_COPIES,
            )  # fmt: skip
        return phis, deltas, trace, status

    # -- the steps -----------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        layout = self.layout
        if layout.persistent:
            self._phase(ALL, self._programs(), 0, 0)
            return
        for l in range(layout.call.size):
            for phase, items in zip((START, START_ROWS), layout.starts(l), strict=True):
                self._phase(phase, items, 0, l)
        phases = (UPDATE, UPDATE_ROWS_PHASE, PREDICT, PREDICT_ROWS_PHASE)
        for step in range(1, layout.moving_steps + 1):
            for phase, items in zip(phases, layout.totals(step), strict=True):
                self._phase(phase, items, step, 0)

    def _programs(self) -> int:
        """Of the persistent kernel: one a processor, so that all of them are resident and the barrier is passed."""
        if INTERPRETED:
            return 1  # programs run one after the other there: a second one would wait for ever
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return min(processors, self.layout.most_items)

    def _phase(self, phase: Any, items: int, step: int, layer: int) -> None:
        if items == 0:
            return
        layout, call = self.layout, self.layout.call
        launch = call.choice.launch
        by_rows = phase in (START_ROWS, UPDATE_ROWS_PHASE, PREDICT_ROWS_PHASE)
        warps = layout.row_warps if by_rows else launch.warps
        options = {"maxnreg": triton_launches.registers(warps)} if self._nvidia else {}
        infer_kernel[(items,)](
            self.work, self._table, self._stages, self._energies, self.signals,
            call.batch, call.size, layout.parts, step, layout.moving_steps, len(layout.stages), layer,
            PHASE=phase.value, BM=launch.block_m, BN=launch.block_n, BK=launch.block_k,
            ROWS=layout.rows, ROW_BLOCK=layout.row_block, FORM=layout.form,
            num_warps=warps, num_stages=launch.stages, **options,
            **({"launch_cooperative_grid": True} if phase is ALL else {}),
        )  # fmt: skip

    def _captures(self) -> bool:
        """Whether a graph is worth it: not for a plan that is thrown away, nor for one launch."""
        return self._keeps and not self.layout.persistent and self.device.type == "cuda"

    def _capture(self) -> None:
        _, self._graph = lasting(lambda: record(self._launch, self.device), self.device)

    def finish(self) -> None:
        """Wait for the runs: what follows destroys the graph."""
        if self._graph is not None:
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def _plan_for(call: Call, device: torch.device) -> Plan:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing:
        return Plan(Layout(call), device, keeps=False)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0  # makes no Stream
    key = (call, device, stream)
    with _plans_lock:
        plan = _plans.get(key)
        if plan is not None:
            _plans.move_to_end(key)
            return plan
        plan = _plans[key] = Plan(Layout(call), device, keeps=True)
        while len(_plans) > 1 and (len(_plans) > MAX_PLANS or sum(p.bytes for p in _plans.values()) > MAX_BYTES):
            _plans.popitem(last=False)[1].finish()
    return plan


def clear_plans() -> None:
    """Forget all plans: their memory goes back to torch's allocator."""
    with _plans_lock:
        while _plans:
            _plans.popitem()[1].finish()


# ---------------------------------------------------------------------------------------------------------------------
# the op


def outputs(call: Call, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Fresh tensors for phis (empty where clamped), deltas, trace and status."""
    shapes = [(call.batch, width) for width in call.widths]
    phis = [torch.empty(0 if held else shape, device=device) for shape, held in zip(shapes, call.clamped, strict=True)]
    deltas = [torch.empty(shape, device=device) for shape in shapes]
    trace = torch.empty(call.steps + 1 if call.trace else 0, call.size, device=device)
    return phis, deltas, trace, torch.empty(5, dtype=torch.int64, device=device)


_call = lru_cache(maxsize=256)(Call)  # one object for equal fields: it keeps its hash, which takes long to make


def describe(args: Arguments) -> Call:
    """The call's key."""
    batch, inputs = args.x.shape
    widths = tuple([weight.shape[0] for weight in args.weights])
    return _call(
        batch=batch,
        inputs=inputs,
        widths=widths,
        activations=tuple(args.activations),
        energies=tuple(args.energies),
        feeds=tuple(args.feeds),
        rules=tuple(args.rules),
        lr_scales=tuple(args.lr_scales),
        biases=_present(args.biases),
        states=tuple(map(_state, args.phis)),
        masks=_present(args.masks),
        holds=_present(args.holds),
        noise=_present(args.noise),
        clamped=tuple(args.clamped),
        steps=args.steps,
        momentum=args.momentum != 0,
        precision=args.precision,
        trace=args.trace,
        choice=triton_launches.choose(batch, max(widths), args.precision, INTERPRETED, _HIP),
        interpreted=INTERPRETED,
    )


def _present(entries: Sequence[Tensor | None]) -> tuple[bool, ...]:
    return tuple([entry is not None for entry in entries])


def _state(phi: Tensor | None) -> str:
    return "" if phi is None else "float" if phi.is_floating_point() else "index"


def tensors_of(args: Arguments, call: Call) -> list[Tensor]:
    """The call's tensors, contiguous, in the order in which Layout numbers their addresses."""
    masks, holds = _spread(args.masks, call), _spread(args.holds, call)
    nodes = zip(args.weights, args.biases, args.log_vars, args.phis, masks, holds, args.noise, strict=True)
    found = [args.x, *chain.from_iterable(nodes)]
    return [tensor.contiguous() for tensor in found if tensor is not None]


def _spread(masks: Sequence[Tensor | None], call: Call) -> list[Tensor | None]:
    """The masks in the full shapes of their nodes' states or targets."""
    return [None if mask is None else mask.expand(_mask_shape(call, l)) for l, mask in enumerate(masks)]


def _mask_shape(call: Call, l: int) -> tuple[int, int]:
    half = call.paired(l) and call.clamped[l]
    return call.batch, call.widths[l] // 2 if half else call.widths[l]


def _check(call: Call) -> None:
    """What the tables cannot hold."""
    if call.choice.schedule == triton_launches.PERSISTENT and call.widest_row > PERSISTENT_ROW:
        remedy = "use 'two launches a step'"
        checks.fail("schedule", f"rows of at most {PERSISTENT_ROW} in 'persistent'", f"{call.widest_row}", remedy)


def infer(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The op `pc_kernels::infer`: (phis, deltas, trace, status); a clamped node's phi comes back empty."""
    args = Arguments(*arguments)
    call = describe(args)
    _check(call)
    device = args.x.device
    if call.batch == 0:
        phis, deltas, trace, status = outputs(call, device)
        status.copy_(torch.tensor([call.steps, 0, BACKENDS.index("triton"), 0, -1]))
        return phis, deltas, trace.zero_(), status
    with _inside(device):
        return _plan_for(call, device).run(tensors_of(args, call), args.lr, args.momentum)


def _inside(device: torch.device) -> Any:
    """Makes the device the current one, unless it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def explained(*arguments: Any) -> str:
    """For `explain`: schedule, tiles and memory of a call."""
    call = describe(Arguments(*arguments))
    launch, layout = call.choice.launch, Layout(call)
    return (
        f"triton: {call.choice.schedule} ({call.choice.source}), tiles {launch.block_m} x {launch.block_n}, "
        f"products by {launch.block_k}, {launch.warps} warps; plan: {4 * layout.size / 2**20:.1f} MiB"
    )
