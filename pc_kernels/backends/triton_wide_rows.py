# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# (the type checker reads Triton's language as Python)
"""Softmax rows that are wider than one tile: a program walks over each row of its sample once per quantity of the row.

A row of 16,384 in one tile would need more registers than there are; the later walks find it in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_access import (
    AT_FORM,
    AT_GRAD_MU,
    AT_GRAD_PHI,
    AT_INDEX,
    AT_MASK,
    AT_MU,
    AT_PHI,
    AT_ROWS,
    ROW,
    ROW_TARGET,
    flags,
    held,
    read,
    width_of,
    write,
)
from pc_kernels.backends.triton_math import (
    categorical_change,
    categorical_free,
    categorical_gap,
    categorical_grad_phi,
    categorical_target_entry,
)
from pc_kernels.backends.triton_numerics import log, log1p, softmax_entries, softmax_more


@triton.jit
def part(node, sample, row, start, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns (1, COLUMNS) of a piece of a row, where it stands in phi and mu, what is valid and what is visible."""
    width = width_of(node, ALIGNED)
    column = start + tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    valid = column < width
    at = (sample * tl.load(node + AT_ROWS) + row) * width + column
    return column, at, valid, flags(node, AT_MASK, sample, row, column, valid)


@triton.jit
def _softmax_of(
    node, SLOT: tl.constexpr, sample, row, COLUMNS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """Maximum and sum of exponentials of the row, (1, 1)."""
    most = tl.full((1, 1), float("-inf"), tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    for start in range(0, width_of(node, ALIGNED).to(tl.int32), COLUMNS):
        _, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
        most, total = softmax_more(read(node, SLOT, at, valid, BFLOAT16, ALIGNED), visible, most, total)
    return most, total


@triton.jit
def free_part(
    node, at, valid, visible, most_p, total_p, most_q, total_q, correction, BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """phi, p, q and ln(p/q) of a piece of a free row."""
    phi = read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED)
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    p = softmax_entries(phi, visible, most_p, total_p)
    q = softmax_entries(mu, visible, most_q, total_q)
    d = categorical_gap(phi, mu, visible, most_p - most_q, log(total_p) - log(total_q))
    return phi, p, q, tl.where(visible, d - correction, 0.0)


@triton.jit
def free_row(node, sample, row, COLUMNS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """What `free_part` needs of a row, and its energy, all (1, 1)."""
    most_p, total_p = _softmax_of(node, AT_PHI, sample, row, COLUMNS, BFLOAT16, ALIGNED)
    most_q, total_q = _softmax_of(node, AT_MU, sample, row, COLUMNS, BFLOAT16, ALIGNED)
    changed = tl.zeros((1, 1), tl.float32)
    energy = tl.zeros((1, 1), tl.float32)
    width = width_of(node, ALIGNED).to(tl.int32)
    for start in range(0, width, COLUMNS):
        _, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
        _, p, q, d = free_part(
            node, at, valid, visible, most_p, total_p, most_q, total_q, changed * 0.0, BFLOAT16, ALIGNED
        )
        changed += tl.sum(categorical_change(p, q, d), axis=1, keep_dims=True)
    correction = log1p(changed)
    for start in range(0, width, COLUMNS):
        _, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
        _, p, q, log_ratio = free_part(
            node, at, valid, visible, most_p, total_p, most_q, total_q, correction, BFLOAT16, ALIGNED
        )
        terms, _ = categorical_free(p, q, log_ratio)
        energy += tl.sum(tl.where(visible, terms, 0.0), axis=1, keep_dims=True)
    return most_p, total_p, most_q, total_q, correction, energy


@triton.jit
def _free_errors(
    node, sample, row, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """A free row: its energy; gradients on the way."""
    most_p, total_p, most_q, total_q, correction, energy = free_row(node, sample, row, COLUMNS, BFLOAT16, ALIGNED)
    if GRADS:
        for start in range(0, width_of(node, ALIGNED).to(tl.int32), COLUMNS):
            column, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
            _, p, q, log_ratio = free_part(
                node, at, valid, visible, most_p, total_p, most_q, total_q, correction, BFLOAT16, ALIGNED
            )
            _, grad_mu = categorical_free(p, q, log_ratio)
            grad_phi = categorical_grad_phi(p, log_ratio, energy)
            moves = visible & (held(node, sample, row, column, valid) == 0)
            write(node, AT_GRAD_PHI, at, tl.where(moves, grad_phi, 0.0), valid, BFLOAT16, ALIGNED)
            write(node, AT_GRAD_MU, at, tl.where(visible, grad_mu, 0.0), valid, BFLOAT16, ALIGNED)
    return energy


@triton.jit
def _target_part(
    node, at, valid, visible, most, total, row_sum, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The target, energies and dE/dmu of a piece of a row clamped to probabilities."""
    mu = read(node, AT_MU, at, valid, BFLOAT16, ALIGNED)
    o = tl.where(visible, read(node, AT_PHI, at, valid, BFLOAT16, ALIGNED), 0.0)
    q = softmax_entries(mu, visible, most, total)
    energy, grad_mu = categorical_target_entry(o, q, (mu - most) - log(total), row_sum)
    return o, energy, grad_mu


@triton.jit
def _target_errors(
    node, sample, row, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """A row clamped to probabilities."""
    most, total = _softmax_of(node, AT_MU, sample, row, COLUMNS, BFLOAT16, ALIGNED)
    row_sum = tl.zeros((1, 1), tl.float32)
    energy = tl.zeros((1, 1), tl.float32)
    width = width_of(node, ALIGNED).to(tl.int32)
    for start in range(0, width, COLUMNS):
        _, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
        o, terms, _ = _target_part(node, at, valid, visible, most, total, row_sum, BFLOAT16, ALIGNED)
        row_sum += tl.sum(o, axis=1, keep_dims=True)
        energy += tl.sum(tl.where(visible, terms, 0.0), axis=1, keep_dims=True)
    if GRADS:
        for start in range(0, width, COLUMNS):
            _, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
            o, _, grad_mu = _target_part(node, at, valid, visible, most, total, row_sum, BFLOAT16, ALIGNED)
            write(node, AT_GRAD_PHI, at, o * 0.0, valid, BFLOAT16, ALIGNED)
            write(node, AT_GRAD_MU, at, tl.where(visible, grad_mu, 0.0), valid, BFLOAT16, ALIGNED)
    return energy


@triton.jit
def _index_errors(
    node, sample, row, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """A row clamped to class k: zeros where the mask hides k."""
    most, total = _softmax_of(node, AT_MU, sample, row, COLUMNS, BFLOAT16, ALIGNED)
    line = sample * tl.load(node + AT_ROWS) + row
    one = tl.zeros((1, 1), tl.int64)
    k = tl.load(tl.load(node + AT_INDEX).to(tl.pointer_type(tl.int64)) + line + one)
    width = width_of(node, ALIGNED)
    there = flags(node, AT_MASK, sample, row, k, k >= 0)
    mu_k = read(node, AT_MU, line * width + k, k >= 0, BFLOAT16, False)
    if GRADS:
        write(node, AT_GRAD_PHI, line + one, mu_k * 0.0, k >= 0, BFLOAT16, False)
        for start in range(0, width.to(tl.int32), COLUMNS):
            column, at, valid, visible = part(node, sample, row, start, COLUMNS, ALIGNED)
            q = softmax_entries(read(node, AT_MU, at, valid, BFLOAT16, ALIGNED), visible, most, total)
            grad_mu = tl.where(there & visible, q - (column == k).to(tl.float32), 0.0)
            write(node, AT_GRAD_MU, at, grad_mu, valid, BFLOAT16, ALIGNED)
    return tl.where(there, -((mu_k - most) - log(total)), 0.0)


@triton.jit
def wide_errors(
    node, energies, program, COLUMNS: tl.constexpr, GRADS: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr
):
    """One sample of a `categorical` node."""
    sample = program.to(tl.int64)
    total = tl.zeros((1, 1), tl.float32)
    form = tl.load(node + AT_FORM)
    for row in range(tl.load(node + AT_ROWS).to(tl.int32)):
        if form == ROW:
            total += _free_errors(node, sample, row, COLUMNS, GRADS, BFLOAT16, ALIGNED)
        elif form == ROW_TARGET:
            total += _target_errors(node, sample, row, COLUMNS, GRADS, BFLOAT16, ALIGNED)
        else:
            total += _index_errors(node, sample, row, COLUMNS, GRADS, BFLOAT16, ALIGNED)
    tl.store(energies + sample, tl.sum(total))
