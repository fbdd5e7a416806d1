# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# (the type checker reads Triton's language as Python)
"""Where the entries of a node stand in memory: what the layer kernels read and write, found through the node's table.

`node` points at the node's SLOTS of the table (triton_tables.py). ALIGNED: every tensor begins at a multiple of 16
bytes and every width is one of 8 entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends import triton_tables as tables
from pc_kernels.backends.triton_math import to_storage
from pc_kernels.backends.triton_tables import Form, Slot

SLOTS = tl.constexpr(tables.SLOTS)
AT_FIRST = tl.constexpr(int(Slot.FIRST))
AT_ENERGY = tl.constexpr(int(Slot.ENERGY))
AT_FORM = tl.constexpr(int(Slot.FORM))
AT_LOG_COLUMNS = tl.constexpr(int(Slot.LOG_COLUMNS))
AT_ROWS = tl.constexpr(int(Slot.ROWS))
AT_WIDTH = tl.constexpr(int(Slot.WIDTH))
AT_INNER = tl.constexpr(int(Slot.INNER))
AT_CLAMPED = tl.constexpr(int(Slot.CLAMPED))
AT_FLOORED = tl.constexpr(int(Slot.FLOORED))
AT_PHI = tl.constexpr(int(Slot.PHI))
AT_MU = tl.constexpr(int(Slot.MU))
AT_INDEX = tl.constexpr(int(Slot.INDEX))
AT_LOG_VAR = tl.constexpr(int(Slot.LOG_VAR))
AT_MASK = tl.constexpr(int(Slot.MASK))
AT_HOLD = tl.constexpr(int(Slot.HOLD))
AT_GRAD_PHI = tl.constexpr(int(Slot.GRAD_PHI))
AT_GRAD_MU = tl.constexpr(int(Slot.GRAD_MU))
AT_FEEDBACK = tl.constexpr(int(Slot.FEEDBACK))
AT_VELOCITY = tl.constexpr(int(Slot.VELOCITY))
AT_LR_SCALE = tl.constexpr(int(Slot.LR_SCALE))
PAIR = tl.constexpr(int(Form.PAIR))
PAIR_TARGET = tl.constexpr(int(Form.PAIR_TARGET))
ROW = tl.constexpr(int(Form.ROW))
ROW_TARGET = tl.constexpr(int(Form.ROW_TARGET))


@triton.jit
def _pointer(node, SLOT: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor in a slot of the node."""
    if BFLOAT16:
        pointer = tl.load(node + SLOT).to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = tl.load(node + SLOT).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(node, SLOT: tl.constexpr, at, valid, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries of a tensor as float32; 1, which is in every family's domain, where not valid."""
    return tl.load(_pointer(node, SLOT, BFLOAT16, ALIGNED) + at, mask=valid, other=1.0).to(tl.float32)


@triton.jit
def write(node, SLOT: tl.constexpr, at, value, valid, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """Store into a tensor of the node, if it has one there."""
    if tl.load(node + SLOT) != 0:
        tl.store(_pointer(node, SLOT, BFLOAT16, ALIGNED) + at, to_storage(value, BFLOAT16), mask=valid)


@triton.jit
def _place(node, SLOT: tl.constexpr, sample, row, column):
    """Where an entry stands in a broadcast tensor: SLOT + 1, 2, 3 are its strides over samples, rows and columns."""
    by_row = tl.load(node + SLOT + 2)
    by_column = tl.load(node + SLOT + 3)
    inner = tl.load(node + AT_INNER)
    place = (row * inner + column) * by_column
    if by_row != inner * by_column:  # rows repeat, or have gaps: a long row of entries is cut into the tensor's rows
        place = (row + column // inner) * by_row + (column % inner) * by_column
    return sample * tl.load(node + SLOT + 1) + place


@triton.jit
def flags(node, SLOT: tl.constexpr, sample, row, column, valid):
    """A bool tensor's entries within `valid`; `valid` where the node has none."""
    found = valid
    base = tl.load(node + SLOT)
    if base != 0:
        pointer = base.to(tl.pointer_type(tl.uint8))
        found = valid & (tl.load(pointer + _place(node, SLOT, sample, row, column), mask=valid, other=0) != 0)
    return found


@triton.jit
def held(node, sample, row, column, valid):
    """Where the node is held."""
    still = valid & (tl.load(node + AT_CLAMPED) != 0)
    if tl.load(node + AT_HOLD) != 0:
        still = still | flags(node, AT_HOLD, sample, row, column, valid)
    return still


@triton.jit
def log_var_of(node, sample, row, column, phi, valid, BFLOAT16: tl.constexpr):
    """The log variances of a `gaussian_diag` node; any tile where there are none."""
    log_var = phi
    if tl.load(node + AT_LOG_VAR) != 0:
        log_var = read(node, AT_LOG_VAR, _place(node, AT_LOG_VAR, sample, row, column), valid, BFLOAT16, False)
    return log_var


@triton.jit
def find_node(table, nodes, NODES: tl.constexpr):
    """The program's node: the last one whose first program does not come after this one; its table and its number."""
    ids = tl.arange(0, NODES)
    firsts = tl.load(table + ids * SLOTS + AT_FIRST, mask=ids < nodes, other=1 << 62)
    number = tl.sum((firsts <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    return table + number * SLOTS, number


@triton.jit
def tile(node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Samples and rows (ROWS, 1), columns (1, COLUMNS) of a step of this program, as int64, and the valid rows.

    PARTS: 2 for pairs, whose columns are those of half a row.
    """
    rows = tl.load(node + AT_ROWS)
    blocks = tl.cdiv(tl.load(node + AT_WIDTH) // PARTS, COLUMNS)
    program = tl.program_id(0) - tl.load(node + AT_FIRST)
    lanes = tl.arange(0, ROWS)[:, None].to(tl.int64)
    sample = program * ROWS + lanes
    row = lanes * 0
    if rows != 1:
        sample = program + lanes * 0
        row = step // blocks * ROWS + lanes
    column = step % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    return sample, row, column, (sample < batch) & (row < rows)


@triton.jit
def steps(node, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many tiles this program walks over."""
    rows = tl.load(node + AT_ROWS)
    width = tl.load(node + AT_WIDTH)
    form = tl.load(node + AT_FORM)
    width = tl.where((form == PAIR) | (form == PAIR_TARGET), width // 2, width)
    down = tl.where(rows == 1, 1, tl.cdiv(rows, ROWS))
    return (down * tl.cdiv(width, COLUMNS)).to(tl.int32)


@triton.jit
def width_of(node, ALIGNED: tl.constexpr):
    """The row's width; a multiple of 8 where everything is aligned, so that loads are of 16 bytes."""
    width = tl.load(node + AT_WIDTH)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    return width
