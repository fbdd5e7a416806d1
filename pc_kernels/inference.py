# SPDX-License-Identifier: MIT
"""`infer`: T steps of a chain of linear layers in one call; `weight_grads` at its end; `explain` before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pc_kernels import checks, dispatch, library
from pc_kernels.functional import Clamps, Masks
from pc_kernels.layer import Layer
from pc_kernels.node_math import feed_value
from pc_kernels.numerics import without_autocast
from pc_kernels.pc_math import ACTIVATION_TABLE, ENERGY_TABLE, GaussianDiag
from pc_kernels.problem import FLOATS, Problem, check_layers
from pc_kernels.results import Inference, LayerGrads
from pc_kernels.schedule import lower_bound

PRECISIONS = ("fp32", "tf32", "bf16", "bf16_delta")


def infer(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    target: Tensor | None = None,
    phis: Sequence[Tensor | None] | None = None,
    steps: int = 32,
    lr: float = 0.1,
    momentum: float = 0.0,
    tol: float | None = None,
    clamp: Clamps | None = None,
    masks: Masks | None = None,
    precision: str = "fp32",
    noise: Tensor | Sequence[Tensor | None] | None = None,
    trace: bool = False,
) -> Inference:
    """The E-step: `steps` simultaneous gradient moves of all free phi on F = sum_l E_l, the weights fixed.

        a_l = W_l v_{l-1} + b_l,   mu_l = act_l(a_l),   delta_l = act_l'(a_l)^T dE_l/dmu_l
        g_l = dE_l/dphi_l + feed_l'(phi_l)^T W_{l+1}^T delta_{l+1}
        phi_l <- phi_l - lr g_l                        (momentum: u <- m u + g, phi <- phi - lr u, as torch.optim.SGD)

    x: (B, V_0), float32 or float64. layers: L `Layer`s.
    target: clamps the last node: class indices (B,) int64 for "categorical", else floats (B, D_L); (B, D_L / 2) for
        "gaussian_full".
    phis: per node a state (B, D_l), or None to start at the forward value phi_l = mu_l.
    clamp: per node None (free), True (phis[l] is the target, passed on in place of the feed) or a bool mask, True =
        held at phis[l].
    masks: per node None or a bool mask, True takes part; a masked entry has no energy and does not move.
    tol: a sample stops once the Euclidean norm of its g is below it; the result's `steps` is the largest count.
    precision: of the matrix products. "fp32"; "bf16_delta" (first pre-activations exact, then differences in bfloat16:
        the fast one to trust); "tf32"; "bf16" (beware: the early layers' errors are small differences of large numbers,
        and it loses them). float64 input takes "fp32" and runs in float64 throughout. Autocast has no say.
    noise: n of the sample z = u + e^(s/2) n, (B, D/2), or one entry per node; a node that feeds on its sample needs it.
    trace: also return the energies, (steps + 1, L), batch means in nats.

    F is summed over features and never averaged over samples, so lr does not depend on B. A layer's `prior` w adds
    w KL(phi_l || N(0, I)) to a free node's E_l. Records no gradient.
    Raises ValueError or TypeError before any work, BackendUnavailable, and InferenceDiverged for a non-finite state.
    """
    problem = Problem(x, layers, target, phis, clamp, masks, noise)
    limit = _check_settings(x, steps, lr, momentum, tol, precision, trace)
    with torch.no_grad(), without_autocast(x):
        states, deltas, energy, status = library.infer(
            *problem.arguments(), steps, float(lr), float(momentum), limit, precision, trace
        )
    free, source = problem.sources()
    final = [given if held else phi for given, phi, held in zip(problem.given, states, problem.clamped, strict=True)]
    result = Inference(
        phis=final, deltas=deltas, energy=energy if trace else None, noise=noise, status=status,
        clamped=tuple(problem.clamped), masks=tuple(problem.masks), free=free, source=source,
    )  # fmt: skip
    if checks.reads_values(status):
        result.check()
    return result


def _check_settings(x: Tensor, steps: Any, lr: Any, momentum: Any, tol: Any, precision: Any, trace: Any) -> float:
    """The settings of a run; returns tol as the op takes it."""
    checks.count("steps", steps)
    checks.number("lr", lr, least=0)
    checks.number("momentum", momentum, least=0, below=1)
    checks.flag("trace", trace)
    checks.choice("precision", precision, PRECISIONS)
    if precision != "fp32" and x.dtype == torch.float64:
        remedy = "float64 runs in float64 throughout; or pass x.float()"
        checks.fail("precision", "'fp32' with float64 input", repr(precision), remedy)
    return -1.0 if tol is None else checks.number("tol", tol, least=0)


def weight_grads(x: Tensor, layers: Sequence[Layer], result: Inference, reduction: str = "mean") -> list[LayerGrads]:
    """Gradient of F at the final states: dW_l = delta_l^T v_{l-1}, db_l = sum delta_l, dlog_var_l = sum 1/2 (1 -
    (phi-mu)^2 e^-lv).

    x, layers: as passed to `infer`; result: what it returned. reduction: "mean" over the batch, or "sum".
    Returns one LayerGrads(weight, bias, log_var) per layer; None where the layer has no such parameter.
    """
    checks.floating("x", x, ndim=2, dtypes=FLOATS)
    listed = check_layers(x, layers)
    if not isinstance(result, Inference):
        checks.fail("result", "what pck.infer returned", checks.describe(result), "", TypeError)
    fits = len(result.deltas) == len(listed) and all(
        tuple(d.shape) == (x.shape[0], layer.weight.shape[0]) and checks.alike(d, x)
        for d, layer in zip(result.deltas, listed, strict=False)
    )
    if not fits:
        got = "other shapes, dtypes or devices"
        checks.fail("result", "the result of these layers and this x", got, "call infer again")
    checks.choice("reduction", reduction, ("mean", "sum"))
    scale = 1.0 if reduction == "sum" else 1.0 / max(x.shape[0], 1)
    with torch.no_grad(), without_autocast(x):
        values = [x, *(_value(l, layer, result) for l, layer in enumerate(listed[:-1]))]
        biased = [layer.bias is not None for layer in listed]
        weights, biases = torch.ops.pc_kernels.weight_grads(result.deltas, values, biased, scale)
        return [
            LayerGrads(
                weights[l],
                biases[l] if biased[l] else None,
                None if layer.log_var is None else _log_var_grad(l, layer, values[l], result).mul_(scale),
            )
            for l, layer in enumerate(listed)
        ]


def _value(l: int, layer: Layer, result: Inference) -> Tensor:
    """v_l at the final state."""
    family, phi = ENERGY_TABLE[layer.energy], result.phis[l]
    if result.clamped[l] and not family.target_is_state:
        like = result.deltas[l]
        return phi if phi.is_floating_point() else torch.nn.functional.one_hot(phi, like.shape[1]).to(like.dtype)
    noise = result.noise if result.noise is None or isinstance(result.noise, Tensor) else result.noise[l]
    assert layer.feed is not None  # resolved by Layer
    return feed_value(layer.feed, phi, noise, result.masks[l] if layer.energy == "categorical" else None)


def _log_var_grad(l: int, layer: Layer, v: Tensor, result: Inference) -> Tensor:
    """One more product recovers mu_l, which only a learned variance needs here."""
    mu = ACTIVATION_TABLE[layer.activation].value(torch.nn.functional.linear(v, layer.weight, layer.bias))
    assert layer.log_var is not None
    return GaussianDiag().grad_log_var(result.phis[l], mu, layer.log_var, result.masks[l]).sum(0)


def explain(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    target: Tensor | None = None,
    phis: Sequence[Tensor | None] | None = None,
    steps: int = 32,
    lr: float = 0.1,
    momentum: float = 0.0,
    tol: float | None = None,
    clamp: Clamps | None = None,
    masks: Masks | None = None,
    precision: str = "fp32",
    noise: Tensor | Sequence[Tensor | None] | None = None,
    trace: bool = False,
) -> str:
    """Which backend and schedule `infer` would use for these arguments, and why the others would not. Runs nothing."""
    problem = Problem(x, layers, target, phis, clamp, masks, noise)
    limit = _check_settings(x, steps, lr, momentum, tol, precision, trace)
    free, source = problem.sources()
    bound, full = lower_bound(free, source, steps), len(free) + 2 * (len(free) - 1) * steps
    widths = "-".join(str(w) for w in [x.shape[1], *(layer.weight.shape[0] for layer in layers)])
    if not any(source):
        schedule = "no target, nothing given: the forward state is a fixed point, nothing moves"
    else:
        schedule = f"all layers move at once, {steps} steps; {bound} matrix products ({full} without the light cone)"
    products = "float64" if x.dtype == torch.float64 else precision
    arguments = (*problem.arguments(), steps, float(lr), float(momentum), limit, precision, trace)
    task = library.infer_task(precision, limit, [layer.prior for layer in layers])
    telling = library.telling_of(arguments)
    lines = [
        dispatch.account(task, telling, arguments),
        f"network: {widths}, batch {x.shape[0]}, products in {products}",
        f"schedule: {schedule}",
    ]
    chosen = dispatch.chosen(task, telling, arguments)
    if chosen in ("cuda", "triton"):
        lines.append(dispatch.module(chosen).explain_infer(*arguments))
    return "\n".join(lines)
