# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# (the type checker reads Triton's language as Python)
"""layer_errors, layer_energies and update_phi_ in Triton: all nodes, whatever their shapes and families, in one launch.

A program owns whole samples of one node, so energies need no atomics and are the same in every run. Its tile is
(ROWS, COLUMNS) of TILE entries: ROWS samples where a sample has one row, otherwise rows of one sample; it walks over
what the tile does not cover. Families of single entries see a sample as one long row; so do rows of softmax families
if they fit into a tile, otherwise see triton_wide_rows.py. Float32 or bfloat16 in memory, float32 arithmetic.

What the nodes are is read from a table of int64 (triton_tables.py), so one compiled kernel serves every list of nodes
with the same families and tile widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_access import (
    AT_ENERGY,
    AT_FEEDBACK,
    AT_FIRST,
    AT_FLOORED,
    AT_FORM,
    AT_GRAD_MU,
    AT_GRAD_PHI,
    AT_INDEX,
    AT_LOG_COLUMNS,
    AT_LR_SCALE,
    AT_MASK,
    AT_MU,
    AT_PHI,
    AT_ROWS,
    AT_VELOCITY,
    AT_WIDTH,
    PAIR,
    PAIR_TARGET,
    ROW,
    ROW_TARGET,
    find_node,
    flags,
    held,
    log_var_of,
    read,
    steps,
    tile,
    width_of,
    write,
)
from pc_kernels.backends.triton_math import (
    FLOOR,
    categorical_free,
    categorical_grad_phi,
    categorical_index,
    categorical_row,
    categorical_target,
    energy_free,
    energy_target,
    gaussian_full_free,
    gaussian_full_target,
)
from pc_kernels.backends.triton_tables import WIDE_ROWS, Form
from pc_kernels.backends.triton_wide_rows import free_part, free_row, part, wide_errors

WIDE = tl.constexpr(WIDE_ROWS)
WIDE_BIT = tl.constexpr(1 << WIDE_ROWS)
ENTRIES = tl.constexpr(int(Form.ENTRIES))
OWN_TARGET = tl.constexpr(int(Form.OWN_TARGET))
ROW_INDEX = tl.constexpr(int(Form.ROW_INDEX))
ENTRIES_BIT = tl.constexpr(1 << Form.ENTRIES)
OWN_TARGET_BIT = tl.constexpr(1 << Form.OWN_TARGET)
PAIR_BIT = tl.constexpr(1 << Form.PAIR)
PAIR_TARGET_BIT = tl.constexpr(1 << Form.PAIR_TARGET)
ROW_BIT = tl.constexpr(1 << Form.ROW)
ROW_TARGET_BIT = tl.constexpr(1 << Form.ROW_TARGET)
ROW_INDEX_BIT = tl.constexpr(1 << Form.ROW_INDEX)
ENTRY_BITS = tl.constexpr(1 << Form.ENTRIES | 1 << Form.OWN_TARGET)
ROW_BITS = tl.constexpr(1 << Form.ROW | 1 << Form.ROW_TARGET)


# ---------------------------------------------------------------------------------------------------------------------
# layer_errors, layer_energies: a tile's energies by row (ROWS, 1), gradients on the way


@triton.jit
def _put_gradients(
    node, at, sample, row, column, grad_phi, grad_mu, visible, valid, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """Both gradients, zero where masked; grad_phi zero where held."""
    moves = visible & (held(node, sample, row, column, valid) == 0)
    write(node, AT_GRAD_PHI, at, tl.where(moves, grad_phi, 0.0), valid, BFLOAT16, ALIGNED)
    write(node, AT_GRAD_MU, at, tl.where(visible, grad_mu, 0.0), valid, BFLOAT16, ALIGNED)


@triton.jit
def _entry_errors(
    node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMS: tl.constexpr, FREE: tl.constexpr,
    TARGETS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Families of single entries."""
    width = width_of(node, ALIGNED)
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 1)
    valid = inside & (column < width)
    at = sample * width + column
    phi = read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED)
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    code = tl.load(node + AT_ENERGY).to(tl.int32)
    energy = phi
    grad_phi = phi
    grad_mu = phi
    if FREE:
        log_var = log_var_of(node, sample, row, column, phi, valid, BFLOAT16)
        energy, grad_phi, grad_mu = energy_free(phi, mu, log_var, code, FREE)
    if OWN_TARGET_BIT & FORMS and tl.load(node + AT_FORM) == OWN_TARGET:
        energy, grad_mu = energy_target(phi, mu, code, TARGETS)
    visible = flags(node, AT_MASK, sample, row, column, valid)
    if GRADS:
        _put_gradients(node, at, sample, row, column, grad_phi, grad_mu, visible, valid, BFLOAT16, ALIGNED)
    return tl.sum(tl.where(visible, energy, 0.0), axis=1, keep_dims=True)


@triton.jit
def _pair_errors(
    node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr
):
    """`gaussian_full`, free."""
    half = tl.load(node + AT_WIDTH) // 2
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 2)
    valid = inside & (column < half)
    at = (sample * tl.load(node + AT_ROWS) + row) * 2 * half + column
    keep_u = flags(node, AT_MASK, sample, row, column, valid)
    keep_s = flags(node, AT_MASK, sample, row, column + half, valid)
    u = read(node, AT_PHI, at, valid, BFLOAT16, False)
    s = read(node, AT_PHI, at + half, valid, BFLOAT16, False)
    uh = read(node, AT_MU, at, valid, BFLOAT16, False)
    sh = read(node, AT_MU, at + half, valid, BFLOAT16, False)
    energy, phi_u, phi_s, mu_u, mu_s = gaussian_full_free(u, s, uh, sh, keep_u, keep_s)
    if GRADS:  # the mean's term has a part in dE/dsh: visible everywhere, the masks are in the terms
        _put_gradients(node, at, sample, row, column, phi_u, mu_u, valid, valid, BFLOAT16, False)
        _put_gradients(node, at + half, sample, row, column + half, phi_s, mu_s, valid, valid, BFLOAT16, False)
    return tl.sum(tl.where(valid, energy, 0.0), axis=1, keep_dims=True)


@triton.jit
def _pair_target_errors(
    node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr
):
    """`gaussian_full` with clamped data of half the width."""
    half = tl.load(node + AT_WIDTH) // 2
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 2)
    valid = inside & (column < half)
    line = sample * tl.load(node + AT_ROWS) + row
    keep = flags(node, AT_MASK, sample, row, column, valid)
    data = read(node, AT_PHI, line * half + column, valid, BFLOAT16, False)
    at = line * 2 * half + column
    uh = read(node, AT_MU, at, valid, BFLOAT16, False)
    sh = read(node, AT_MU, at + half, valid, BFLOAT16, False)
    energy, mu_u, mu_s = gaussian_full_target(data, uh, sh, keep)
    if GRADS:
        write(node, AT_GRAD_PHI, line * half + column, data * 0.0, valid, BFLOAT16, False)
        write(node, AT_GRAD_MU, at, mu_u, valid, BFLOAT16, False)
        write(node, AT_GRAD_MU, at + half, mu_s, valid, BFLOAT16, False)
    return tl.sum(energy, axis=1, keep_dims=True)


@triton.jit
def _row_errors(
    node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMS: tl.constexpr, GRADS: tl.constexpr,
    BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`categorical`, free or clamped to probabilities."""
    width = width_of(node, ALIGNED)
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 1)
    valid = inside & (column < width)
    at = (sample * tl.load(node + AT_ROWS) + row) * width + column
    visible = flags(node, AT_MASK, sample, row, column, valid)
    phi = read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED)
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    energy = phi
    grad_phi = phi
    grad_mu = phi
    if ROW_BIT & FORMS and (not ROW_TARGET_BIT & FORMS or tl.load(node + AT_FORM) == ROW):
        p, q, log_ratio = categorical_row(phi, mu, visible)
        energy, grad_mu = categorical_free(p, q, log_ratio)
        energy = tl.where(visible, energy, 0.0)
        grad_phi = categorical_grad_phi(p, log_ratio, tl.sum(energy, axis=1, keep_dims=True))
    if ROW_TARGET_BIT & FORMS and (not ROW_BIT & FORMS or tl.load(node + AT_FORM) == ROW_TARGET):
        energy, grad_mu = categorical_target(phi, mu, visible)
    if GRADS:
        _put_gradients(node, at, sample, row, column, grad_phi, grad_mu, visible, valid, BFLOAT16, ALIGNED)
    return tl.sum(tl.where(visible, energy, 0.0), axis=1, keep_dims=True)


@triton.jit
def _index_errors(
    node, step, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`categorical`, clamped to class indices."""
    width = width_of(node, ALIGNED)
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 1)
    valid = inside & (column < width)
    line = sample * tl.load(node + AT_ROWS) + row
    visible = flags(node, AT_MASK, sample, row, column, valid)
    mu = read(node, AT_MU, line * width + column, valid, BFLOAT16, ALIGNED)
    index = tl.load(tl.load(node + AT_INDEX).to(tl.pointer_type(tl.int64)) + line, mask=inside, other=0)
    energy, grad_mu = categorical_index(index, mu, column, visible)
    if GRADS:
        write(node, AT_GRAD_PHI, line, tl.zeros((ROWS, 1), tl.float32), inside, BFLOAT16, False)
        write(node, AT_GRAD_MU, line * width + column, tl.where(visible, grad_mu, 0.0), valid, BFLOAT16, ALIGNED)
    return tl.sum(tl.where(visible, energy, 0.0), axis=1, keep_dims=True)


@triton.jit
def _node_errors(
    node, energies, batch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMS: tl.constexpr, FREE: tl.constexpr,
    TARGETS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """This program's samples of a node; energies: the node's row of the output."""
    form = tl.load(node + AT_FORM)
    total = tl.zeros((ROWS, 1), tl.float32)
    for step in range(steps(node, ROWS, COLUMNS)):
        if ENTRY_BITS & FORMS and form <= OWN_TARGET:
            total += _entry_errors(
                node, step, batch, ROWS, COLUMNS, FORMS, FREE, TARGETS, GRADS, BFLOAT16, ALIGNED
            )  # fmt: skip
        if PAIR_BIT & FORMS and form == PAIR:
            total += _pair_errors(node, step, batch, ROWS, COLUMNS, GRADS, BFLOAT16)
        if PAIR_TARGET_BIT & FORMS and form == PAIR_TARGET:
            total += _pair_target_errors(node, step, batch, ROWS, COLUMNS, GRADS, BFLOAT16)
        if ROW_BITS & FORMS and ((form == ROW) | (form == ROW_TARGET)):
            total += _row_errors(node, step, batch, ROWS, COLUMNS, FORMS, GRADS, BFLOAT16, ALIGNED)
        if ROW_INDEX_BIT & FORMS and form == ROW_INDEX:
            total += _index_errors(node, step, batch, ROWS, COLUMNS, GRADS, BFLOAT16, ALIGNED)
    program = tl.program_id(0) - tl.load(node + AT_FIRST)
    sample = program * ROWS + tl.arange(0, ROWS)[:, None]
    if tl.load(node + AT_ROWS) == 1:
        tl.store(energies + sample, total, mask=sample < batch)
    else:
        tl.store(energies + program, tl.sum(total))


@triton.jit
def errors_kernel(
    table, energies, batch, nodes, FORMS: tl.constexpr, FREE: tl.constexpr, TARGETS: tl.constexpr,
    WIDTHS: tl.constexpr, NODES: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """layer_errors (GRADS) and layer_energies. table: (nodes, SLOTS) int64; energies: (nodes, batch) float32.

    Bit sets of what occurs: FORMS, FREE and TARGETS (families of ENTRIES and of OWN_TARGET), WIDTHS (log2 of the
    tiles' columns; WIDE: rows of more than TILE entries, taken in pieces of TILE). NODES: a power of two >= nodes.
    ALIGNED: every tensor to 16 bytes, every width to 8 entries.
    """
    node, number = find_node(table, nodes, NODES)
    energies += number.to(tl.int64) * batch
    for log in tl.static_range(4, 12):
        if WIDTHS & (1 << log) and (1 << log == WIDTHS or tl.load(node + AT_LOG_COLUMNS) == log):
            _node_errors(
                node, energies, batch, TILE >> log, 1 << log, FORMS, FREE, TARGETS, GRADS, BFLOAT16, ALIGNED
            )  # fmt: skip
    if WIDE_BIT & WIDTHS and (WIDE_BIT == WIDTHS or tl.load(node + AT_LOG_COLUMNS) == WIDE):
        wide_errors(node, energies, tl.program_id(0) - tl.load(node + AT_FIRST), TILE, GRADS, BFLOAT16, ALIGNED)


# ---------------------------------------------------------------------------------------------------------------------
# update_phi_


@triton.jit
def _move(node, at, sample, row, column, grad, phi, lr, momentum, valid, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """u <- m u + grad + feedback; phi <- phi - lr u, where the entry takes part and is not held."""
    moves = flags(node, AT_MASK, sample, row, column, valid) & (held(node, sample, row, column, valid) == 0)
    if tl.load(node + AT_FEEDBACK) != 0:
        grad += read(node, AT_FEEDBACK, at, valid, BFLOAT16, ALIGNED)
    if tl.load(node + AT_VELOCITY) != 0:
        grad += momentum * read(node, AT_VELOCITY, at, valid, BFLOAT16, ALIGNED)
        write(node, AT_VELOCITY, at, grad, moves, BFLOAT16, ALIGNED)
    scale = tl.load(node + AT_LR_SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    moved = phi - lr * scale * grad
    floored = tl.load(node + AT_FLOORED) != 0
    write(node, AT_PHI, at, tl.where(floored & (moved < FLOOR), FLOOR, moved), moves, BFLOAT16, ALIGNED)


@triton.jit
def _move_entries(
    node, step, batch, lr, momentum, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FREE: tl.constexpr,
    BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Families of single entries, and every natural step, which is that of `gaussian`."""
    width = width_of(node, ALIGNED)
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 1)
    valid = inside & (column < width)
    at = sample * width + column
    phi = read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED)
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    log_var = log_var_of(node, sample, row, column, phi, valid, BFLOAT16)
    _, grad, _ = energy_free(phi, mu, log_var, tl.load(node + AT_ENERGY).to(tl.int32), FREE)
    _move(node, at, sample, row, column, grad, phi, lr, momentum, valid, BFLOAT16, ALIGNED)


@triton.jit
def _move_pairs(node, step, batch, lr, momentum, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BFLOAT16: tl.constexpr):
    """`gaussian_full`."""
    half = tl.load(node + AT_WIDTH) // 2
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 2)
    valid = inside & (column < half)
    at = (sample * tl.load(node + AT_ROWS) + row) * 2 * half + column
    u = read(node, AT_PHI, at, valid, BFLOAT16, False)
    s = read(node, AT_PHI, at + half, valid, BFLOAT16, False)
    uh = read(node, AT_MU, at, valid, BFLOAT16, False)
    sh = read(node, AT_MU, at + half, valid, BFLOAT16, False)
    _, grad_u, grad_s, _, _ = gaussian_full_free(u, s, uh, sh, valid, valid)
    _move(node, at, sample, row, column, grad_u, u, lr, momentum, valid, BFLOAT16, False)
    _move(node, at + half, sample, row, column + half, grad_s, s, lr, momentum, valid, BFLOAT16, False)


@triton.jit
def _move_rows(
    node, step, batch, lr, momentum, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`categorical` by its Euclidean gradient."""
    width = width_of(node, ALIGNED)
    sample, row, column, inside = tile(node, step, batch, ROWS, COLUMNS, 1)
    valid = inside & (column < width)
    at = (sample * tl.load(node + AT_ROWS) + row) * width + column
    visible = flags(node, AT_MASK, sample, row, column, valid)
    phi = read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED)
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    p, q, log_ratio = categorical_row(phi, mu, visible)
    energy, _ = categorical_free(p, q, log_ratio)
    energy = tl.sum(tl.where(visible, energy, 0.0), axis=1, keep_dims=True)
    grad = categorical_grad_phi(p, log_ratio, energy)
    _move(node, at, sample, row, column, grad, phi, lr, momentum, valid, BFLOAT16, ALIGNED)


@triton.jit
def _move_wide_rows(node, lr, momentum, COLUMNS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """One sample of such a node whose rows are wider than a tile."""
    sample = (tl.program_id(0) - tl.load(node + AT_FIRST)).to(tl.int64)
    for row in range(tl.load(node + AT_ROWS).to(tl.int32)):
        most_p, total_p, most_q, total_q, correction, energy = free_row(node, sample, row, COLUMNS, BFLOAT16, ALIGNED)
        for start in range(0, width_of(node, ALIGNED).to(tl.int32), COLUMNS):
            column, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
            phi, p, _, log_ratio = free_part(
                node, at, valid, visible, most_p, total_p, most_q, total_q, correction, BFLOAT16, ALIGNED
            )
            grad = categorical_grad_phi(p, log_ratio, energy)
            _move(node, at, sample, row, column, grad, phi, lr, momentum, valid, BFLOAT16, ALIGNED)


@triton.jit
def _move_node(
    node, batch, lr, momentum, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMS: tl.constexpr, FREE: tl.constexpr,
    BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """This program's samples of a node."""
    form = tl.load(node + AT_FORM)
    for step in range(steps(node, ROWS, COLUMNS)):
        if ENTRIES_BIT & FORMS and form == ENTRIES:
            _move_entries(node, step, batch, lr, momentum, ROWS, COLUMNS, FREE, BFLOAT16, ALIGNED)
        if PAIR_BIT & FORMS and form == PAIR:
            _move_pairs(node, step, batch, lr, momentum, ROWS, COLUMNS, BFLOAT16)
        if ROW_BIT & FORMS and form == ROW:
            _move_rows(node, step, batch, lr, momentum, ROWS, COLUMNS, BFLOAT16, ALIGNED)


@triton.jit
def update_kernel(
    table, batch, nodes, lr, momentum, FORMS: tl.constexpr, FREE: tl.constexpr, WIDTHS: tl.constexpr,
    NODES: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """update_phi_; arguments as in `errors_kernel`."""
    node, _ = find_node(table, nodes, NODES)
    for log in tl.static_range(4, 12):
        if WIDTHS & (1 << log) and (1 << log == WIDTHS or tl.load(node + AT_LOG_COLUMNS) == log):
            _move_node(node, batch, lr, momentum, TILE >> log, 1 << log, FORMS, FREE, BFLOAT16, ALIGNED)
    if WIDE_BIT & WIDTHS and (WIDE_BIT == WIDTHS or tl.load(node + AT_LOG_COLUMNS) == WIDE):
        _move_wide_rows(node, lr, momentum, TILE, BFLOAT16, ALIGNED)
