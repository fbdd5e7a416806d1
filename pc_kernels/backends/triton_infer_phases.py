# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
# (Triton's compiler reads the kernels, not Python: constexprs have attributes, tensors are overloaded)
"""The kernel itself: one phase a launch, or all steps in one launch. See triton_infer.py."""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_infer import (
    locate,
    predict_rows,
    predict_tile,
    start_rows,
    start_tile,
    update_rows,
    update_tile,
)
from pc_kernels.backends.triton_infer_table import (
    ALL,
    ARRIVED,
    FIELDS,
    FLAGS,
    PREDICT,
    PREDICT_ROWS,
    PREDICT_ROWS_PHASE,
    PREDICTS,
    ROLES,
    ROW_PREDICT,
    ROW_UPDATE,
    STAGE_LISTS,
    START,
    START_ROWS,
    UPDATE,
    UPDATE_ROWS,
    UPDATE_ROWS_PHASE,
    UPDATES,
    WIDTH,
)


@triton.jit
def run_item(
    work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count, item, last_item, layer,
    PHASE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Tile number `item` of a phase. `layer` (from 0): whose start it is; elsewhere the stage's lists tell."""
    zero = tl.full((), 0, tl.int32)
    item, step = zero + item, zero + step  # tensors also in the interpreter, whose `range` gives Python's numbers
    if FORM.REVERSE:  # for tests: a phase must not depend on the order of its tiles
        item = last_item - item
    role = 0
    tile = item
    if PHASE != START and PHASE != START_ROWS:
        stage = stages + (tl.minimum(step, stage_count) - 1) * (STAGE_LISTS * FORM.NODES)
        kind: tl.constexpr = (
            UPDATES
            if PHASE == UPDATE
            else UPDATE_ROWS
            if PHASE == UPDATE_ROWS_PHASE
            else PREDICTS
            if PHASE == PREDICT
            else PREDICT_ROWS
        )
        layer, tile = locate(stage + kind * FORM.NODES, item, FORM.NODES)
        role = tl.load(stage + ROLES * FORM.NODES + layer)
    node = table + (layer + 1) * FIELDS  # node 0 is the input
    slot = (step.to(tl.int64) * layers + layer) * slots + tile
    last = step == steps
    if PHASE == START:
        start_tile(work, node, energies, slot, signals, layer + 1, layers, tile, batch, BM, BN, BK, FORM)
    elif PHASE == START_ROWS:
        start_rows(work, node, energies, slot, signals, layer + 1, layers, tile, batch, ROWS, ROW_BLOCK, FORM)
    elif PHASE == UPDATE:
        update_tile(work, node, energies, slot, signals, layer + 1, layers, step, last, role, tile, batch,
                    BM, BN, BK, FORM)  # fmt: skip
    elif PHASE == UPDATE_ROWS_PHASE:
        update_rows(work, node, energies, slot, signals, layer + 1, layers, step, last, role, tile, batch,
                    ROWS, ROW_BLOCK, FORM)  # fmt: skip
    elif PHASE == PREDICT:
        predict_tile(work, node, energies, slot, tile, batch, BM, BN, BK, FORM)
    else:
        predict_rows(work, node, energies, slot, tile, batch, ROWS, ROW_BLOCK, FORM)


@triton.jit
def count_items(stages, step, stage_count, layers, KIND: tl.constexpr, FORM: tl.constexpr):
    """Tiles of a phase: where the last layer's end."""
    stage = stages + (tl.minimum(step, stage_count) - 1) * (STAGE_LISTS * FORM.NODES)
    return tl.load(stage + KIND * FORM.NODES + layers - 1)


@triton.jit
def meet(signals, goal):
    """Wait until all programs of the grid have come here and their stores can be seen; goal: arrivals so far.

    Only for grids that are resident as a whole (a cooperative launch). The counter only grows: no reset, no race.
    """
    tl.debug_barrier()
    tl.atomic_add(signals + ARRIVED, 1, sem="release", scope="gpu")
    while tl.atomic_add(signals + ARRIVED, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()


@triton.jit
def run_phase(
    work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count, items, layer, arrivals,
    PHASE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """All tiles of a phase, shared out among the grid's programs, then the barrier."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        run_item(work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count,
                 item, items - 1, layer, PHASE, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
    arrivals += tl.num_programs(0)
    meet(signals, arrivals)
    return arrivals


@triton.jit
def run_all(
    work, table, stages, energies, signals, batch, layers, slots, steps, stage_count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The start, layer after layer, and all steps."""
    arrivals = 0
    zero = steps * 0
    for layer in range(layers):
        node = table + (layer + 1) * FIELDS
        tiles = tl.cdiv(batch, BM) * tl.cdiv(tl.load(node + WIDTH).to(tl.int32), BN)
        arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, zero, steps, stage_count,
                             tiles, layer, arrivals, START, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
        if (FORM.ROW_PREDICTS or FORM.ROW_UPDATES) and (tl.load(node + FLAGS) & (ROW_PREDICT | ROW_UPDATE)) != 0:
            arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, zero, steps, stage_count,
                                 tl.cdiv(batch, ROWS), layer, arrivals,
                                 START_ROWS, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
    for step in range(1, steps + 1):
        items = count_items(stages, step, stage_count, layers, UPDATES, FORM)
        arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count,
                             items, 0, arrivals, UPDATE, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
        if FORM.ROW_UPDATES:
            items = count_items(stages, step, stage_count, layers, UPDATE_ROWS, FORM)
            arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, step, steps,
                                 stage_count, items, 0, arrivals,
                                 UPDATE_ROWS_PHASE, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
        items = count_items(stages, step, stage_count, layers, PREDICTS, FORM)
        arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count,
                             items, 0, arrivals, PREDICT, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
        if FORM.ROW_PREDICTS:
            items = count_items(stages, step, stage_count, layers, PREDICT_ROWS, FORM)
            arrivals = run_phase(work, table, stages, energies, signals, batch, layers, slots, step, steps,
                                 stage_count, items, 0, arrivals,
                                 PREDICT_ROWS_PHASE, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip


@triton.jit(do_not_specialize=["batch", "layers", "slots", "step", "steps", "stage_count", "layer"])
def infer_kernel(
    work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count, layer,
    PHASE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """One program: a tile of PHASE at move `step` (0: the start of `layer`), or its share of ALL.

    work: the workspace (float32). table: the nodes' fields (int64). stages: lists of tiles (int32). energies: partial
    sums (steps + 1, layers, slots) of a trace (float32). signals: see triton_infer_table.FIRST, ARRIVED (int32).
    Tiles are BM x BN, products advance by BK; a phase of rows takes ROWS rows of up to ROW_BLOCK entries a program.
    """
    if PHASE == ALL:
        run_all(work, table, stages, energies, signals, batch, layers, slots, steps, stage_count,
                BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
    else:
        run_item(work, table, stages, energies, signals, batch, layers, slots, step, steps, stage_count,
                 tl.program_id(0), tl.num_programs(0) - 1, layer,
                 PHASE, BM, BN, BK, ROWS, ROW_BLOCK, FORM)  # fmt: skip
