# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
# (Triton's compiler reads the kernels, not Python: constexprs have attributes, tensors are overloaded)
"""What the T-step kernels do with one node on a tile of (samples, entries): its start, its errors, its move.

A tile is part of a node, or whole rows of it; a node whose family, activation or feed hangs together along the row
comes here with whole rows only. Arguments that recur: work, node: the workspace and the node's fields; base, inner:
where the tile lies, a scalar plus an offset per entry; rows, columns: (ROWS, 1) and (1, BLOCK) places of its entries;
FORM: see triton_infer_table.Form. Buffers are padded to whole tiles, so loads and stores need no mask (with one they
would not be vectorised) but for PARTIAL tiles, which overlap their neighbours. Entries beyond the batch or the width
(not `valid`) are computed on zeros and stored as zeros: the products over padded buffers rely on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_infer_table import (
    ACTIVATION,
    BF16,
    BF16_DELTA,
    CLAMPED,
    DELTA,
    DELTA_READ,
    ENERGY,
    FEED,
    FIRST,
    FLAGS,
    FP32,
    GIVEN,
    HELD,
    HOLD,
    INDEX,
    INDEXED,
    LOG_VAR,
    MASK,
    MASKED,
    MU,
    NATURAL,
    OUTPUT,
    PASSES_PHI,
    PHI,
    RATE,
    STILL,
    TARGETED,
    TF32,
    V_EXACT,
    VELOCITY,
    A,
    V,
)
from pc_kernels.backends.triton_math import (
    ACTIVATION_CODES,
    ENERGY_CODES,
    FLOOR,
    activate,
    activation_vjp,
    categorical_free,
    categorical_grad_phi,
    categorical_index,
    categorical_row,
    categorical_target,
    energy_free,
    energy_target,
    round_to_bfloat16,
    softmax_delta,
    softmax_row,
    softmax_vjp,
)

CATEGORICAL = tl.constexpr(ENERGY_CODES["categorical"])
CATEGORICAL_PROBS = tl.constexpr(ENERGY_CODES["categorical_probs"])
GAUSSIAN_DIAG = tl.constexpr(ENERGY_CODES["gaussian_diag"])
SOFTMAX = tl.constexpr(ACTIVATION_CODES["softmax"])


@triton.jit
def buffer(work, node, FIELD: tl.constexpr, base):
    """Where a tile starts in one of the node's float32 buffers: tiles start at multiples of 16 entries."""
    return tl.multiple_of(work + (tl.load(node + FIELD) + base), 16)


@triton.jit
def half_buffer(work, node, FIELD: tl.constexpr, base):
    """The same of a bfloat16 buffer."""
    return tl.multiple_of((work + tl.load(node + FIELD)).to(tl.pointer_type(tl.bfloat16)) + base, 16)


@triton.jit
def byte_buffer(work, node, FIELD: tl.constexpr, base):
    """The same of a mask."""
    return tl.multiple_of((work + tl.load(node + FIELD)).to(tl.pointer_type(tl.int8)) + base, 16)


@triton.jit
def get(pointers, inside, PARTIAL: tl.constexpr = False):
    """Load a tile."""
    return tl.load(pointers, mask=inside, other=0.0) if PARTIAL else tl.load(pointers)


@triton.jit
def put(pointers, x, inside, PARTIAL: tl.constexpr = False):
    """Store a tile."""
    if PARTIAL:
        tl.store(pointers, x, mask=inside)
    else:
        tl.store(pointers, x)


@triton.jit
def round_to_tf32(x):
    """To the 10 mantissa bits that tensor cores read, to nearest (they would cut the others off)."""
    word = (x.to(tl.int32, bitcast=True) + 0x1000) & -8192
    return tl.where(x == x, word.to(tl.float32, bitcast=True), x)


@triton.jit
def seen(work, node, flags, base, inner, inside, valid, FORM: tl.constexpr, PARTIAL: tl.constexpr = False):
    """Which entries take part; rows beyond the batch count as seen, so that no row is empty."""
    visible = valid | inside
    if FORM.MASKS and (flags & MASKED) != 0:
        there = get(byte_buffer(work, node, MASK, base) + inner, inside, PARTIAL) != 0
        visible = visible & (there | (valid == 0))
    return visible


@triton.jit
def report(signals, layer, step, layers, phi, valid, FORM: tl.constexpr):
    """Record the first non-finite state: the earliest move, then the lowest layer."""
    broken = tl.sum((valid & ~(tl.abs(phi) < float("inf"))).to(tl.int32))
    if broken > 0:
        when = step if FORM.TRACE else 0
        tl.atomic_min(signals + FIRST, when * (layers + 1) + layer)


@triton.jit
def store_delta(work, node, delta, base, inner, inside, valid, FORM: tl.constexpr, PARTIAL: tl.constexpr = False):
    """delta for the caller and as the products read it."""
    delta = tl.where(valid, delta, 0.0)
    put(buffer(work, node, DELTA, base) + inner, delta, inside, PARTIAL)
    if FORM.PRECISION == TF32:
        put(buffer(work, node, DELTA_READ, base) + inner, round_to_tf32(delta), inside, PARTIAL)
    if FORM.PRECISION == BF16 or FORM.PRECISION == BF16_DELTA:
        low = round_to_bfloat16(delta).to(tl.bfloat16)
        put(half_buffer(work, node, DELTA_READ, base) + inner, low, inside, PARTIAL)


@triton.jit
def store_energy(energies, slot, energy, taken, FORM: tl.constexpr):
    """With a trace: the tile's part of the energy, a sum in a fixed order."""
    if FORM.TRACE:
        tl.store(energies + slot, tl.sum(tl.where(taken, energy, 0.0)))


@triton.jit
def read_log_var(work, node, energy, columns, inside, phi, FORM: tl.constexpr):
    """`gaussian_diag`'s log variances; any tile where there are none."""
    log_var = phi
    if FORM.DIAGONAL and energy == GAUSSIAN_DIAG:
        log_var = tl.load(buffer(work, node, LOG_VAR, 0) + columns) + tl.zeros_like(phi)
    return log_var


@triton.jit
def errors(work, node, energies, slot, a, mu, phi, base, inner, rows, columns, inside, valid, FORM: tl.constexpr):
    """E_l and delta_l = act'(a)^T dE/dmu of a tile."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    code = tl.load(node + ENERGY).to(tl.int32)
    act = tl.load(node + ACTIVATION).to(tl.int32)
    visible = seen(work, node, flags, base, inner, inside, valid, FORM)
    log_var = read_log_var(work, node, code, columns, inside, phi, FORM)
    energy, _, grad = energy_free(phi, mu, log_var, code, FORM.ENERGIES)
    if FORM.TARGETS and (flags & TARGETED) != 0:
        energy, grad = energy_target(phi, mu, code, FORM.TARGETS)
    if FORM.CATEGORICAL and code == CATEGORICAL:
        if (flags & INDEXED) != 0:
            index = tl.load((work + tl.load(node + INDEX)).to(tl.pointer_type(tl.int32)) + rows)
            energy, grad = categorical_index(index, mu, columns, visible)
        elif (flags & CLAMPED) != 0:
            energy, grad = categorical_target(phi, mu, visible)
        else:
            p, q, log_ratio = categorical_row(phi, mu, visible)
            energy, grad = categorical_free(p, q, log_ratio)
    grad = tl.where(visible, grad, 0.0)
    delta = activation_vjp(a, mu, grad, act, FORM.ACTIVATIONS)
    if FORM.SOFTMAX and act == SOFTMAX:
        delta = softmax_vjp(mu, grad)
        if FORM.PROBABILITIES and code == CATEGORICAL_PROBS:
            delta = softmax_delta(phi, mu, visible)
    store_delta(work, node, delta, base, inner, inside, valid, FORM)
    store_energy(energies, slot, energy, valid & visible, FORM)


@triton.jit
def prediction(work, node, a, base, inner, inside, valid, FORM: tl.constexpr):
    """mu = act(a), stored."""
    act = tl.load(node + ACTIVATION).to(tl.int32)
    mu = activate(a, act, FORM.ACTIVATIONS)
    if FORM.SOFTMAX and act == SOFTMAX:
        mu, _, _ = softmax_row(a, inside)
    mu = tl.where(valid, mu, 0.0)
    tl.store(buffer(work, node, MU, base) + inner, mu)
    return mu


@triton.jit
def store_fed(
    work, node, v, base, inner, inside, valid, START: tl.constexpr, FORM: tl.constexpr, PARTIAL: tl.constexpr = False
):
    """v as the products read it; in `bf16_delta` the rounded change since it was read last."""
    v = tl.where(valid, v, 0.0)
    if FORM.PRECISION == FP32:
        put(buffer(work, node, V, base) + inner, v, inside, PARTIAL)
    if FORM.PRECISION == TF32:
        put(buffer(work, node, V, base) + inner, round_to_tf32(v), inside, PARTIAL)
    if FORM.PRECISION == BF16:
        put(half_buffer(work, node, V, base) + inner, round_to_bfloat16(v).to(tl.bfloat16), inside, PARTIAL)
    if FORM.PRECISION == BF16_DELTA:
        exact = buffer(work, node, V_EXACT, base) + inner
        if not START:
            change = round_to_bfloat16(v - get(exact, inside, PARTIAL)).to(tl.bfloat16)
            put(half_buffer(work, node, V, base) + inner, change, inside, PARTIAL)
        put(exact, v, inside, PARTIAL)


@triton.jit
def pass_on(work, node, phi, visible, base, inner, inside, valid, START: tl.constexpr, FORM: tl.constexpr):
    """v = feed(phi), stored; a `categorical` node's hidden classes are left out of its softmax."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    if (flags & OUTPUT) == 0:
        feed = tl.load(node + FEED).to(tl.int32)
        v = phi
        if (flags & PASSES_PHI) == 0:
            v = activate(phi, feed, FORM.FEEDS)
            if FORM.SOFTMAX_FEED and feed == SOFTMAX:
                categorical = tl.load(node + ENERGY) == CATEGORICAL
                v, _, _ = softmax_row(phi, tl.where(categorical, visible, inside))
        if FORM.PRECISION != FP32 or (flags & PASSES_PHI) == 0:  # there, v and phi are one buffer
            store_fed(work, node, v, base, inner, inside, valid, START, FORM)


@triton.jit
def project(node, phi, FORM: tl.constexpr):
    """The state brought back into its family's domain."""
    if FORM.PROBABILITIES and tl.load(node + ENERGY) == CATEGORICAL_PROBS:
        phi = tl.where(phi < FLOOR, FLOOR, phi)
    return phi


@triton.jit
def start(
    work, node, energies, slot, signals, layer, layers, a, base, inner, rows, columns, inside, valid, FORM: tl.constexpr
):
    """The node at t = 0: mu, phi where it is not given, what it passes on, its errors."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    mu = prediction(work, node, a, base, inner, inside, valid, FORM)
    state = buffer(work, node, PHI, base) + inner
    phi = mu
    if (flags & GIVEN) != 0:
        phi = tl.load(state)
    if (flags & CLAMPED) == 0:
        phi = tl.where(valid, project(node, phi, FORM), 0.0)
        tl.store(state, phi)
        if FORM.TRACE or (flags & STILL) != 0:
            report(signals, layer, 0, layers, phi, valid, FORM)
    visible = seen(work, node, flags, base, inner, inside, valid, FORM)
    pass_on(work, node, phi, visible, base, inner, inside, valid, True, FORM)
    errors(work, node, energies, slot, a, mu, phi, base, inner, rows, columns, inside, valid, FORM)


@triton.jit
def local_step(work, node, phi, mu, visible, columns, inside, FORM: tl.constexpr):
    """dE/dphi, or phi - mu for the natural step."""
    code = tl.load(node + ENERGY).to(tl.int32)
    flags = tl.load(node + FLAGS).to(tl.int32)
    log_var = read_log_var(work, node, code, columns, inside, phi, FORM)
    _, step, _ = energy_free(phi, mu, log_var, code, FORM.ENERGIES)
    if FORM.EUCLIDEAN_CATEGORICAL and code == CATEGORICAL and (flags & NATURAL) == 0:
        p, q, log_ratio = categorical_row(phi, mu, visible)
        energy, _ = categorical_free(p, q, log_ratio)
        total = tl.sum(tl.where(visible, energy, 0.0), axis=1, keep_dims=True)
        step = categorical_grad_phi(p, log_ratio, total)
    return tl.where((flags & NATURAL) != 0, phi - mu, step)


@triton.jit
def through_feed(work, node, phi, back, visible, inside, FORM: tl.constexpr):
    """feed'(phi)^T back; the natural step takes back as it is."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    feed = tl.load(node + FEED).to(tl.int32)
    pulled = activation_vjp(phi, activate(phi, feed, FORM.FEEDS), back, feed, FORM.FEEDS)
    if FORM.EUCLIDEAN_SOFTMAX_FEED and feed == SOFTMAX and (flags & NATURAL) == 0:
        categorical = tl.load(node + ENERGY) == CATEGORICAL
        p, _, _ = softmax_row(phi, tl.where(categorical, visible, inside))
        pulled = softmax_vjp(p, back)
    return tl.where((flags & NATURAL) != 0, back, pulled)


@triton.jit
def move(work, node, phi, step, visible, base, inner, inside, valid, FORM: tl.constexpr, PARTIAL: tl.constexpr = False):
    """u <- m u + step; phi <- phi - lr u where the entry takes part and is not held; stored."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    free = visible & valid
    if FORM.MASKS and (flags & HELD) != 0:
        free = free & (get(byte_buffer(work, node, HOLD, base) + inner, inside, PARTIAL) == 0)
    step = tl.where(free, step, 0.0)
    rates = work + tl.load(node + RATE)
    if FORM.MOMENTUM:
        velocity = buffer(work, node, VELOCITY, base) + inner
        step = tl.load(rates + 1) * get(velocity, inside, PARTIAL) + step
        put(velocity, step, inside, PARTIAL)
    phi = tl.where(free, project(node, phi - tl.load(rates) * step, FORM), phi)
    put(buffer(work, node, PHI, base) + inner, phi, inside, PARTIAL)
    return phi


@triton.jit
def update(
    work, node, energies, slot, signals, layer, layers, step, watched, refreshes, back,
    base, inner, rows, columns, inside, valid, FORM: tl.constexpr,
):  # fmt: skip
    """One move of the node, given back = W^T delta of the layer above, and what it passes on.

    watched: look whether the state is finite. refreshes: nobody else computes its errors after this move.
    """
    flags = tl.load(node + FLAGS).to(tl.int32)
    phi = tl.load(buffer(work, node, PHI, base) + inner)
    mu = tl.load(buffer(work, node, MU, base) + inner)
    visible = seen(work, node, flags, base, inner, inside, valid, FORM)
    direction = local_step(work, node, phi, mu, visible, columns, inside, FORM)
    direction += through_feed(work, node, phi, back, visible, inside, FORM)
    phi = move(work, node, phi, direction, visible, base, inner, inside, valid, FORM)
    if watched:
        report(signals, layer, step, layers, phi, valid, FORM)
    pass_on(work, node, phi, visible, base, inner, inside, valid, False, FORM)
    if refreshes:
        a = tl.load(buffer(work, node, A, base) + inner)
        errors(work, node, energies, slot, a, mu, phi, base, inner, rows, columns, inside, valid, FORM)


@triton.jit
def predict(work, node, energies, slot, a, base, inner, rows, columns, inside, valid, FORM: tl.constexpr):
    """The node's mu and errors after a_l has changed."""
    mu = prediction(work, node, a, base, inner, inside, valid, FORM)
    phi = tl.load(buffer(work, node, PHI, base) + inner)
    errors(work, node, energies, slot, a, mu, phi, base, inner, rows, columns, inside, valid, FORM)
