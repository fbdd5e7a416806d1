# SPDX-License-Identifier: MIT
"""What the layer kernels are told about nodes: a row of int64 per node (pointers, sizes, strides, codes) on the device.

A table is a function of its contents alone, so tables are kept by contents: a call on the memory, shapes and families
of an earlier call (as a rule, in a loop: torch hands out the same memory again) copies nothing to the device; any
other call copies one small table, asynchronously, on the stream that its kernel runs on. The KEPT most recent tables
stay. While a CUDA graph is captured the table is not kept but made inside the graph, from host memory that stays for
good, since a replay reads it again.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum, auto
from threading import Lock

import torch
from torch import Tensor

from pc_kernels.backends.lasting import lasting

KEPT = 256


class Slot(IntEnum):
    """A node's row. MASK, HOLD and LOG_VAR are followed by their strides over samples, rows and columns."""

    FIRST = 0  # the node's first program
    ENERGY = auto()  # code of the family
    FORM = auto()
    LOG_COLUMNS = auto()  # log2 of its tile's columns
    ROWS = auto()  # per sample; 1 for families of single entries, which see a sample as one row
    WIDTH = auto()  # of mu's rows
    INNER = auto()  # of phi's rows as the tensors of flags and log variances see them
    CLAMPED = auto()
    FLOORED = auto()  # the state is kept above PROBABILITY_FLOOR
    PHI = auto()
    MU = auto()
    INDEX = auto()
    LOG_VAR = auto()
    MASK = LOG_VAR + 4
    HOLD = MASK + 4
    GRAD_PHI = HOLD + 4
    GRAD_MU = auto()
    FEEDBACK = auto()
    VELOCITY = auto()
    LR_SCALE = auto()  # the bits of a float32


SLOTS = 32  # room for a row; a power of two
WIDE_ROWS = 12  # in place of LOG_COLUMNS: the node's rows are wider than a tile


class Form(IntEnum):
    """Which formulas a node takes; HALVES and WHOLE_ROWS say what a tile must hold."""

    ENTRIES = 0  # single entries, free, or clamped to a target of the state's form
    OWN_TARGET = auto()  # single entries, clamped to a target of its own form
    PAIR = auto()  # gaussian_full
    PAIR_TARGET = auto()
    ROW = auto()  # categorical
    ROW_TARGET = auto()
    ROW_INDEX = auto()


HALVES = (Form.PAIR, Form.PAIR_TARGET)
WHOLE_ROWS = (Form.ROW, Form.ROW_TARGET, Form.ROW_INDEX)


def float_bits(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def strides(tensor: Tensor, rows: int, width: int) -> tuple[Tensor, list[int]]:
    """A tensor that broadcasts to (samples, rows, width), here (samples, ..., width), and its slots.

    A copy is made only where no three strides describe the tensor; the caller keeps it until the kernel runs.
    """
    view = tensor.reshape(tensor.shape[0], rows, width)
    by_sample, by_row, by_column = view.stride()
    if width == 1:
        by_column = by_row
    if rows == 1:
        by_row = width * by_column  # one long row
    return view, [view.data_ptr(), by_sample, by_row, by_column]


# ---------------------------------------------------------------------------------------------------------------------
# tables on the device

_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_captured: list[Tensor] = []  # host memory that CUDA graphs read
_lock = Lock()


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(nodes, SLOTS) int64 on the device, made now or by an earlier call on the same stream."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        host = torch.tensor(rows, dtype=torch.int64).pin_memory()
        _captured.append(host)
        return host.to(device, non_blocking=True)
    key = (device.index, stream.cuda_stream, *(value for row in rows for value in row))
    with _lock:
        table = _tables.get(key)
        if table is None:
            host = torch.tensor(rows, dtype=torch.int64).pin_memory()  # torch keeps it until the copy is done
            table = _tables[key] = lasting(lambda: host.to(device, non_blocking=True), device)
        _tables.move_to_end(key)
        while len(_tables) > KEPT:
            _tables.popitem(last=False)  # its memory goes to later work on the same stream
    return table
