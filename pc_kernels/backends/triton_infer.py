# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (Triton's compiler reads the kernels, not Python: constexprs have attributes, tensors are overloaded)
"""The T-step kernel: all layers of a move at once, widths may differ.

A move is two phases of matrix products over tiles of (samples, entries), each with its elementwise work fused:

    UPDATE     back = W_{l+1}^T delta_{l+1};  phi_l moves, v_l = feed(phi_l)             of every node that moves
    PREDICT    a_l = W_l v_{l-1} + b_l;  mu_l, delta_l, energies                         above every node that moved

A tile of a phase reads what the other phase wrote, and of its own phase nothing that another tile writes: so each
phase is one launch ("two launches a step"), or all steps are one launch with a barrier of the whole grid between the
phases (ALL, "persistent"). Nodes that need a whole row (softmax wider than a tile, gaussian_full) leave their product
in a buffer, and a phase of rows follows. START computes layer l from l - 1 at t = 0, layer after layer.

Kernels are compiled for a Form, one tile shape and one PHASE; which node a tile belongs to, its family, widths and
pointers come from tables (triton_infer_table.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_infer_nodes import buffer, half_buffer, predict, start, update
from pc_kernels.backends.triton_infer_pairs import errors_pair, get_pair, predict_pair, start_pair, update_pair
from pc_kernels.backends.triton_infer_table import (
    BACK,
    BF16,
    BF16_DELTA,
    BIAS,
    DELTA_READ,
    FED,
    FEEDBACK,
    FIELDS,
    FLAGS,
    LD,
    PAIRED,
    PHI,
    REFRESHES,
    REFRESHES_AT_END,
    ROW_PREDICT,
    ROW_UPDATE,
    TF32,
    V_EXACT,
    WEIGHT,
    WEIGHT_EXACT,
    WEIGHT_LD,
    WIDTH,
    A,
    V,
)

# ---------------------------------------------------------------------------------------------------------------------
# matrix products


@triton.jit
def multiply(x, w, total, EXACT: tl.constexpr, FORM: tl.constexpr):
    """total + x w, accumulated in float32."""
    if FORM.INTERPRETED:  # its bfloat16 product is wrong; of rounded operands the float32 product is the same
        total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    elif not EXACT and (FORM.PRECISION == BF16 or FORM.PRECISION == BF16_DELTA):
        total = tl.dot(x, w, total)
    elif not EXACT and FORM.PRECISION == TF32:
        total = tl.dot(x, w, total, input_precision="tf32")
    else:
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def product(
    x, x_ld, w, w_ld, length, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """A tile of x w (TRANSPOSED: x w^T): x, w point to its first row and column; all padded to whole tiles."""
    row = tl.arange(0, BM)[:, None]
    column = tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    x += row * x_ld + k[None, :]
    w += (column * w_ld + k[:, None]) if TRANSPOSED else (k[:, None] * w_ld + column)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, length, BK):
        total = multiply(tl.load(x), tl.load(w), total, EXACT, FORM)
        x += BK
        w += BK if TRANSPOSED else BK * w_ld
    return total


@triton.jit
def forward_product(
    work, node, m, n, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr
):
    """W_l v_{l-1}, tile (m, n). EXACT: `bf16_delta`'s first one, in float32."""
    below = node - FIELDS
    x_ld = tl.multiple_of(tl.load(below + LD).to(tl.int32), 16)
    w_ld = tl.multiple_of(tl.load(node + WEIGHT_LD).to(tl.int32), 16)
    x_at = m.to(tl.int64) * BM * x_ld
    w_at = n.to(tl.int64) * BN * w_ld
    STEP: tl.constexpr = 32 if EXACT and BK > 32 else BK  # float32 products spill with longer ones
    length = tl.cdiv(tl.load(below + FED).to(tl.int32), STEP) * STEP
    if EXACT:
        x, w = buffer(work, below, V_EXACT, x_at), buffer(work, node, WEIGHT_EXACT, w_at)
    elif FORM.PRECISION == BF16 or FORM.PRECISION == BF16_DELTA:
        x, w = half_buffer(work, below, V, x_at), half_buffer(work, node, WEIGHT, w_at)
    else:
        x, w = buffer(work, below, V, x_at), buffer(work, node, WEIGHT, w_at)
    return product(x, x_ld, w, w_ld, length, True, EXACT, BM, BN, STEP, FORM)


@triton.jit
def backward_product(
    work, node, m, n, wanted, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr
):
    """W_{l+1}^T delta_{l+1}, tile (m, n); zeros unless wanted."""
    above = node + FIELDS
    x_ld = tl.multiple_of(tl.load(above + LD).to(tl.int32), 16)
    w_ld = tl.multiple_of(tl.load(above + WEIGHT_LD).to(tl.int32), 16)
    x_at = m.to(tl.int64) * BM * x_ld
    w_at = n.to(tl.int64) * BN
    length = tl.where(wanted, tl.cdiv(tl.load(above + WIDTH).to(tl.int32), BK) * BK, 0)
    if FORM.PRECISION == BF16 or FORM.PRECISION == BF16_DELTA:
        x, w = half_buffer(work, above, DELTA_READ, x_at), half_buffer(work, above, WEIGHT, w_at)
    else:
        x, w = buffer(work, above, DELTA_READ, x_at), buffer(work, above, WEIGHT, w_at)
    return product(x, x_ld, w, w_ld, length, False, False, BM, BN, BK, FORM)


# ---------------------------------------------------------------------------------------------------------------------
# tiles: where one lies, and what a phase does with it


@triton.jit
def locate(ends, item, NODES: tl.constexpr):
    """The layer (from 0) that tile number `item` of a phase belongs to, and its number within it."""
    index = tl.arange(0, NODES)
    end = tl.load(ends + index)
    layer = tl.sum((end <= item).to(tl.int32))
    return layer, item - tl.max(tl.where(index < layer, end, 0))


@triton.jit
def place(node, row, column, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tile at (row, column): base, inner, rows, columns, and which entries exist."""
    ld = tl.multiple_of(tl.load(node + LD).to(tl.int32), 16)
    base = row.to(tl.int64) * ld + column
    rows = row + tl.arange(0, ROWS)[:, None]
    columns = column + tl.arange(0, BLOCK)[None, :]
    inside = columns < tl.load(node + WIDTH)
    inner = tl.arange(0, ROWS)[:, None] * ld + tl.arange(0, BLOCK)[None, :]
    return base, inner, rows, columns, inside, (rows < batch) & inside


@triton.jit
def start_tile(
    work, node, energies, slot, signals, layer, layers, tile, batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """a = W v + b of a tile at t = 0, and the rest of its node where that needs no whole row."""
    across = tl.cdiv(tl.load(node + WIDTH).to(tl.int32), BN)
    m, n = tile // across, tile % across
    total = forward_product(work, node, m, n, FORM.PRECISION == BF16_DELTA, BM, BN, BK, FORM)
    base, inner, rows, columns, inside, valid = place(node, m * BM, n * BN, batch, BM, BN)
    a = total + tl.load(buffer(work, node, BIAS, 0) + columns)
    tl.store(buffer(work, node, A, base) + inner, a)
    by_rows = False
    if FORM.ROW_PREDICTS or FORM.ROW_UPDATES:
        by_rows = (tl.load(node + FLAGS) & (ROW_PREDICT | ROW_UPDATE)) != 0
    if not by_rows:
        start(work, node, energies, slot, signals, layer, layers, a,
              base, inner, rows, columns, inside, valid, FORM)  # fmt: skip


@triton.jit
def update_tile(
    work, node, energies, slot, signals, layer, layers, step, last, role, tile, batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """W^T delta of a tile, and the move of its node where that needs no whole row."""
    across = tl.cdiv(tl.load(node + FED).to(tl.int32), BN)
    m, n = tile // across, tile % across
    back = backward_product(work, node, m, n, (role & FEEDBACK) != 0, BM, BN, BK, FORM)
    base, inner, rows, columns, inside, valid = place(node, m * BM, n * BN, batch, BM, BN)
    by_rows = False
    if FORM.ROW_UPDATES:
        by_rows = (tl.load(node + FLAGS) & ROW_UPDATE) != 0
    if by_rows:
        tl.store(buffer(work, node, BACK, base) + inner, back)
    else:
        refreshes = refreshed_here(role, last, FORM)
        watched = last | FORM.TRACE
        update(work, node, energies, slot, signals, layer, layers, step, watched, refreshes, back,
               base, inner, rows, columns, inside, valid, FORM)  # fmt: skip


@triton.jit
def refreshed_here(role, last, FORM: tl.constexpr):
    """Whether the update computes the node's errors, too: no product changes its a, or (node 1) ever will."""
    return ((role & REFRESHES) != 0) | (((role & REFRESHES_AT_END) != 0) & (last | FORM.TRACE))


@triton.jit
def predict_tile(
    work, node, energies, slot, tile, batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """a = W v + b of a tile (or a + W dv), and its node's errors where they need no whole row."""
    across = tl.cdiv(tl.load(node + WIDTH).to(tl.int32), BN)
    m, n = tile // across, tile % across
    total = forward_product(work, node, m, n, False, BM, BN, BK, FORM)
    base, inner, rows, columns, inside, valid = place(node, m * BM, n * BN, batch, BM, BN)
    stored = buffer(work, node, A, base) + inner
    a = total + (tl.load(stored) if FORM.PRECISION == BF16_DELTA else tl.load(buffer(work, node, BIAS, 0) + columns))
    tl.store(stored, a)
    by_rows = False
    if FORM.ROW_PREDICTS:
        by_rows = (tl.load(node + FLAGS) & ROW_PREDICT) != 0
    if not by_rows:
        predict(work, node, energies, slot, a, base, inner, rows, columns, inside, valid, FORM)


# ---------------------------------------------------------------------------------------------------------------------
# rows: the same for whole rows, after the products


@triton.jit
def place_pair(node, row, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the means' half of some rows: base, inner, the half's length, and which entries exist."""
    half = (tl.load(node + WIDTH) // 2).to(tl.int32)
    ld = tl.load(node + LD).to(tl.int32)
    base = row.to(tl.int64) * ld
    h = tl.arange(0, BLOCK)[None, :]
    rows = row + tl.arange(0, ROWS)[:, None]
    inside = (h < half) & (rows >= 0)  # of the tile's shape, as loads and stores want it
    return base, tl.arange(0, ROWS)[:, None] * ld + h, half, inside, (rows < batch) & inside


@triton.jit
def start_rows(
    work, node, energies, slot, signals, layer, layers, tile, batch,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """What start_tile left."""
    row = tile * ROWS
    paired = False
    if FORM.PAIRS:
        paired = (tl.load(node + FLAGS) & PAIRED) != 0
        if paired:
            base, inner, half, inside, valid = place_pair(node, row, batch, ROWS, ROW_BLOCK // 2)
            start_pair(work, node, energies, slot, signals, layer, layers, base, inner, half, inside, valid, FORM)
    if not paired:
        base, inner, rows, columns, inside, valid = place(node, row, 0, batch, ROWS, ROW_BLOCK)
        a = tl.load(buffer(work, node, A, base) + inner)
        start(work, node, energies, slot, signals, layer, layers, a,
              base, inner, rows, columns, inside, valid, FORM)  # fmt: skip


@triton.jit
def update_rows(
    work, node, energies, slot, signals, layer, layers, step, last, role, tile, batch,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """What update_tile left."""
    row = tile * ROWS
    watched = last | FORM.TRACE
    feedback = (role & FEEDBACK) != 0
    paired = False
    if FORM.PAIRS:
        paired = (tl.load(node + FLAGS) & PAIRED) != 0
        if paired:
            base, inner, half, inside, valid = place_pair(node, row, batch, ROWS, ROW_BLOCK // 2)
            update_pair(work, node, signals, layer, layers, step, watched, feedback,
                        base, inner, half, inside, valid, FORM)  # fmt: skip
    if not paired:
        base, inner, rows, columns, inside, valid = place(node, row, 0, batch, ROWS, ROW_BLOCK)
        back = tl.load(buffer(work, node, BACK, base) + inner)
        refreshes = refreshed_here(role, last, FORM) & ((tl.load(node + FLAGS) & ROW_PREDICT) == 0)
        update(work, node, energies, slot, signals, layer, layers, step, watched, refreshes, back,
               base, inner, rows, columns, inside, valid, FORM)  # fmt: skip


@triton.jit
def predict_rows(
    work, node, energies, slot, tile, batch, ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, FORM: tl.constexpr
):
    """What predict_tile left; also of a node that moved while its a stayed."""
    row = tile * ROWS
    paired = False
    if FORM.PAIRS:
        paired = (tl.load(node + FLAGS) & PAIRED) != 0
        if paired:
            base, inner, half, inside, valid = place_pair(node, row, batch, ROWS, ROW_BLOCK // 2)
            a_u, a_s, mu_u, mu_s = predict_pair(work, node, base, inner, half, inside, valid, FORM)
            phi_u, phi_s = get_pair(work, node, PHI, base, inner, half, inside)
            errors_pair(work, node, energies, slot, a_u, a_s, mu_u, mu_s, phi_u, phi_s,
                        base, inner, half, inside, valid, FORM)  # fmt: skip
    if not paired:
        base, inner, rows, columns, inside, valid = place(node, row, 0, batch, ROWS, ROW_BLOCK)
        a = tl.load(buffer(work, node, A, base) + inner)
        predict(work, node, energies, slot, a, base, inner, rows, columns, inside, valid, FORM)
