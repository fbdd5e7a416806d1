# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
# (Triton's compiler reads the kernels, not Python: constexprs have attributes, tensors are overloaded)
"""`gaussian_full` nodes in the T-step kernels: phi = [means, log variances]; an entry needs its partner half a row on.

The counterpart of triton_infer_nodes.py on whole rows: a tile holds the means of some samples, a second one their log
variances (`_u`, `_s`), `half` entries further on. Both overlap what lies beside them: all loads and stores are PARTIAL.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_infer_nodes import (
    SOFTMAX,
    buffer,
    get,
    move,
    put,
    report,
    seen,
    store_delta,
    store_energy,
    store_fed,
)
from pc_kernels.backends.triton_infer_table import (
    ACTIVATION,
    BACK,
    CLAMPED,
    FEED,
    FLAGS,
    FP32,
    GIVEN,
    MU,
    NOISE,
    OUTPUT,
    PASSES_PHI,
    PHI,
    STILL,
    A,
)
from pc_kernels.backends.triton_math import (
    SAMPLE_FEED,
    activate,
    activation_vjp,
    gaussian_full_free,
    gaussian_full_target,
    sample_feed,
    sample_vjp_s,
)
from pc_kernels.backends.triton_numerics import exp

SAMPLE = tl.constexpr(SAMPLE_FEED)


@triton.jit
def get_pair(work, node, FIELD: tl.constexpr, base, inner, half, inside):
    """Both halves of a buffer."""
    at = buffer(work, node, FIELD, base) + inner
    return get(at, inside, True), get(at + half, inside, True)


@triton.jit
def softmax_pair(x_u, x_s, inside):
    """Softmax over the whole row."""
    x_u = tl.where(inside, x_u, float("-inf"))
    x_s = tl.where(inside, x_s, float("-inf"))
    most = tl.maximum(tl.max(x_u, axis=1, keep_dims=True), tl.max(x_s, axis=1, keep_dims=True))
    e_u = exp(x_u - most)
    e_s = exp(x_s - most)
    scale = 1.0 / (tl.sum(e_u, axis=1, keep_dims=True) + tl.sum(e_s, axis=1, keep_dims=True))
    return e_u * scale, e_s * scale


@triton.jit
def activate_pair(x_u, x_s, code, inside, PRESENT: tl.constexpr, ROWS: tl.constexpr):
    """f(x) of both halves; ROWS: whether some node has a softmax."""
    y_u = activate(x_u, code, PRESENT)
    y_s = activate(x_s, code, PRESENT)
    if ROWS and code == SOFTMAX:
        y_u, y_s = softmax_pair(x_u, x_s, inside)
    return y_u, y_s


@triton.jit
def vjp_pair(x_u, x_s, y_u, y_s, grad_u, grad_s, code, PRESENT: tl.constexpr, ROWS: tl.constexpr):
    """f'(x)^T grad, y = f(x)."""
    out_u = activation_vjp(x_u, y_u, grad_u, code, PRESENT)
    out_s = activation_vjp(x_s, y_s, grad_s, code, PRESENT)
    if ROWS and code == SOFTMAX:
        dot = tl.sum(y_u * grad_u, axis=1, keep_dims=True) + tl.sum(y_s * grad_s, axis=1, keep_dims=True)
        out_u = y_u * (grad_u - dot)
        out_s = y_s * (grad_s - dot)
    return out_u, out_s


@triton.jit
def errors_pair(
    work, node, energies, slot, a_u, a_s, mu_u, mu_s, phi_u, phi_s, base, inner, half, inside, valid, FORM: tl.constexpr
):
    """E_l and delta_l of some rows."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    see_u = seen(work, node, flags, base, inner, inside, valid, FORM, True)
    if (flags & CLAMPED) != 0:
        energy, grad_u, grad_s = gaussian_full_target(phi_u, mu_u, mu_s, see_u)
    else:
        see_s = seen(work, node, flags, base, inner + half, inside, valid, FORM, True)
        energy, _, _, grad_u, grad_s = gaussian_full_free(phi_u, phi_s, mu_u, mu_s, see_u, see_s)
    act = tl.load(node + ACTIVATION).to(tl.int32)
    delta_u, delta_s = vjp_pair(a_u, a_s, mu_u, mu_s, grad_u, grad_s, act, FORM.ACTIVATIONS, FORM.SOFTMAX)
    store_delta(work, node, delta_u, base, inner, inside, valid, FORM, True)
    store_delta(work, node, delta_s, base, inner + half, inside, valid, FORM, True)
    store_energy(energies, slot, energy, valid, FORM)  # masked terms are zeros already


@triton.jit
def predict_pair(work, node, base, inner, half, inside, valid, FORM: tl.constexpr):
    """a, and mu = act(a), stored, of both halves."""
    a_u, a_s = get_pair(work, node, A, base, inner, half, inside)
    act = tl.load(node + ACTIVATION).to(tl.int32)
    mu_u, mu_s = activate_pair(a_u, a_s, act, inside, FORM.ACTIVATIONS, FORM.SOFTMAX)
    mu_u = tl.where(valid, mu_u, 0.0)
    mu_s = tl.where(valid, mu_s, 0.0)
    at = buffer(work, node, MU, base) + inner
    put(at, mu_u, inside, True)
    put(at + half, mu_s, inside, True)
    return a_u, a_s, mu_u, mu_s


@triton.jit
def pass_on_pair(work, node, phi_u, phi_s, base, inner, half, inside, valid, START: tl.constexpr, FORM: tl.constexpr):
    """v: the sample, a clamped node's data, or a feed of both halves."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    feed = tl.load(node + FEED).to(tl.int32)
    if (flags & OUTPUT) == 0:
        if (flags & CLAMPED) != 0:
            if FORM.PRECISION != FP32:
                store_fed(work, node, phi_u, base, inner, inside, valid, START, FORM, True)
        elif feed == SAMPLE:
            z = sample_feed(phi_u, phi_s, get(buffer(work, node, NOISE, base) + inner, inside, True))
            store_fed(work, node, z, base, inner, inside, valid, START, FORM, True)
        elif FORM.PRECISION != FP32 or (flags & PASSES_PHI) == 0:
            v_u, v_s = activate_pair(phi_u, phi_s, feed, inside, FORM.FEEDS, FORM.SOFTMAX_FEED)
            store_fed(work, node, v_u, base, inner, inside, valid, START, FORM, True)
            store_fed(work, node, v_s, base, inner + half, inside, valid, START, FORM, True)


@triton.jit
def start_pair(
    work, node, energies, slot, signals, layer, layers, base, inner, half, inside, valid, FORM: tl.constexpr
):
    """The node at t = 0."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    a_u, a_s, mu_u, mu_s = predict_pair(work, node, base, inner, half, inside, valid, FORM)
    phi_u = mu_u
    phi_s = mu_s
    if (flags & GIVEN) != 0:
        phi_u, phi_s = get_pair(work, node, PHI, base, inner, half, inside)
    if (flags & CLAMPED) == 0:
        at = buffer(work, node, PHI, base) + inner
        put(at, phi_u, inside, True)
        put(at + half, phi_s, inside, True)
        if FORM.TRACE or (flags & STILL) != 0:
            report(signals, layer, 0, layers, phi_u, valid, FORM)
            report(signals, layer, 0, layers, phi_s, valid, FORM)
    pass_on_pair(work, node, phi_u, phi_s, base, inner, half, inside, valid, True, FORM)
    errors_pair(work, node, energies, slot, a_u, a_s, mu_u, mu_s, phi_u, phi_s, base, inner, half, inside, valid, FORM)


@triton.jit
def pulled_pair(work, node, phi_u, phi_s, role_feedback, base, inner, half, inside, FORM: tl.constexpr):
    """feed'(phi)^T of the feedback, to both halves; zeros where there is none."""
    feed = tl.load(node + FEED).to(tl.int32)
    back_u = tl.zeros_like(phi_u)
    back_s = tl.zeros_like(phi_s)
    if role_feedback:
        back_u = get(buffer(work, node, BACK, base) + inner, inside, True)
        if feed == SAMPLE:
            back_s = sample_vjp_s(phi_s, get(buffer(work, node, NOISE, base) + inner, inside, True), back_u)
        else:
            back_s = get(buffer(work, node, BACK, base) + inner + half, inside, True)
            v_u, v_s = activate_pair(phi_u, phi_s, feed, inside, FORM.FEEDS, FORM.SOFTMAX_FEED)
            back_u, back_s = vjp_pair(phi_u, phi_s, v_u, v_s, back_u, back_s, feed, FORM.FEEDS, FORM.SOFTMAX_FEED)
    return back_u, back_s


@triton.jit
def update_pair(
    work, node, signals, layer, layers, step, watched, role_feedback,
    base, inner, half, inside, valid, FORM: tl.constexpr,
):  # fmt: skip
    """One move of the node; its errors are the business of the rows' prediction phase."""
    flags = tl.load(node + FLAGS).to(tl.int32)
    phi_u, phi_s = get_pair(work, node, PHI, base, inner, half, inside)
    mu_u, mu_s = get_pair(work, node, MU, base, inner, half, inside)
    see_u = seen(work, node, flags, base, inner, inside, valid, FORM, True)
    see_s = seen(work, node, flags, base, inner + half, inside, valid, FORM, True)
    back_u, back_s = pulled_pair(work, node, phi_u, phi_s, role_feedback, base, inner, half, inside, FORM)
    _, grad_u, grad_s, _, _ = gaussian_full_free(phi_u, phi_s, mu_u, mu_s, see_u, see_s)
    phi_u = move(work, node, phi_u, grad_u + back_u, see_u, base, inner, inside, valid, FORM, True)
    phi_s = move(work, node, phi_s, grad_s + back_s, see_s, base, inner + half, inside, valid, FORM, True)
    if watched:
        report(signals, layer, step, layers, phi_u, valid, FORM)
        report(signals, layer, step, layers, phi_s, valid, FORM)
    pass_on_pair(work, node, phi_u, phi_s, base, inner, half, inside, valid, False, FORM)
