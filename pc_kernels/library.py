# SPDX-License-Identifier: MIT
"""The torch.library ops: schemas, fakes, autograd, once for all backends. The backend is chosen when an op runs
(dispatch.py).

The arguments are flat lists, one entry per node, already checked by `functional`. `clamped[l]`: phis[l] is the
target. `tol < 0`: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pc_kernels import dispatch
from pc_kernels.pc_math import GaussianDiag

# log_vars: of the `gaussian_diag` nodes only, in order (torch's autograd takes no gradient for a list with Nones in it)
_NODES = (
    "Tensor[] phis, Tensor[] mus, str[] energies, Tensor[] log_vars, Tensor?[] masks, Tensor?[] holds, bool[] clamped"
)
_SCHEMAS = (
    f"layer_energies({_NODES}) -> Tensor",
    f"layer_errors({_NODES}) -> (Tensor, Tensor[], Tensor[])",
    f"layer_deltas({_NODES}, bool with_energy) -> (Tensor, Tensor[])",
    "update_phi_(Tensor(a!)[] phis, Tensor[] mus, Tensor?[] feedback, str[] energies, str[] rules, "
    "float lr, float momentum, Tensor(b!)[] velocities, float[] lr_scales, "
    "Tensor?[] log_vars, Tensor?[] masks, Tensor?[] holds) -> ()",
    "infer(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str[] energies, str[] feeds, "
    "str[] rules, float[] lr_scales, Tensor?[] log_vars, Tensor?[] phis, Tensor?[] masks, Tensor?[] holds, "
    "Tensor?[] noise, bool[] clamped, float[] priors, int steps, float lr, float momentum, float tol, str precision, "
    "bool trace) "
    "-> (Tensor[], Tensor[], Tensor, Tensor)",
    "weight_grads(Tensor[] deltas, Tensor[] values, bool[] biased, float scale) -> (Tensor[], Tensor[])",
)
STATUS_SIZE = 5  # steps done, products done, backend, first diverged layer (0: none), its step (-1: not known)

_library = torch.library.Library("pc_kernels", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


def infer_task(precision: str, tol: float, priors: Sequence[float] = ()) -> str:
    """What `infer` asks of a backend: one that runs it in float32 may lack a precision, `tol` (< 0: none), priors."""
    task = "infer" if precision == "fp32" else f"infer in {precision}"
    task = task if tol < 0 else f"{task} with tol"
    return f"{task} with a prior" if any(priors) else task


def telling_of(arguments: Sequence[Any]) -> list[Tensor]:
    """What a backend is asked about of `infer`'s arguments: x, which tells dtype and device, and for each node that
    needs whole rows (softmax, gaussian_full) its transposed weight, whose last dimension is the row's width."""
    x, weights, _, activations, energies, feeds = arguments[:6]
    rows = zip(weights, activations, energies, feeds, strict=True)
    whole = ("categorical", "gaussian_full")
    return [x, *(w.T for w, act, energy, feed in rows if energy in whole or "softmax" in (act, feed))]


# One tensor tells a backend dtype and device: the public functions have checked that the others are like it.


def _run_infer(x: Tensor, *rest: Any) -> Any:
    priors, (tol, precision) = rest[-7], rest[-3:-1]
    arguments = (x, *rest)
    backend = dispatch.choose(infer_task(precision, tol, priors), telling_of(arguments), arguments)
    return dispatch.module(backend).infer(*arguments)


# The ops as the loops call them: where nobody traces, the backend directly, since the way through the dispatcher takes
# 30 us in Python.


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def infer(x: Tensor, *rest: Any) -> Any:
    """The op."""
    return torch.ops.pc_kernels.infer(x, *rest) if _traced(x) else _run_infer(x, *rest)


def layer_deltas(phis: Sequence[Tensor], mus: Sequence[Tensor], *rest: Any) -> Any:
    """The op."""
    return (torch.ops.pc_kernels.layer_deltas if _traced(mus[0]) else _run_deltas)(phis, mus, *rest)


def update_phi_(phis: Sequence[Tensor], mus: Sequence[Tensor], *rest: Any) -> None:
    """The op."""
    (torch.ops.pc_kernels.update_phi_ if _traced(mus[0]) else _run_update)(phis, mus, *rest)


def _run_weight_grads(deltas: Sequence[Tensor], *rest: Any) -> Any:
    return dispatch.module(dispatch.choose("weight_grads", deltas[:1])).weight_grads(deltas, *rest)


def _run_update(phis: Sequence[Tensor], mus: Sequence[Tensor], *rest: Any) -> None:
    dispatch.module(dispatch.choose("update_phi_", mus[:1])).update_phi_(phis, mus, *rest)


def _run_on_nodes(op: str, phis, mus, energies, log_vars, masks, holds, clamped) -> Any:
    run = getattr(dispatch.module(dispatch.choose(op, mus[:1])), op)
    return run(phis, mus, energies, spread_log_vars(energies, log_vars), masks, holds, clamped)


def _run_deltas(phis, mus, energies, log_vars, masks, holds, clamped, with_energy) -> Any:
    """What a step needs of `layer_errors`: dE/dmu, and the energies (without: (0, B)). No derivatives."""
    backend = dispatch.module(dispatch.choose("layer_errors", mus[:1]))
    arguments = phis, mus, energies, spread_log_vars(energies, log_vars), masks, holds, clamped
    if hasattr(backend, "layer_deltas"):
        return backend.layer_deltas(*arguments, with_energy)
    energy, _, grad_mu = backend.layer_errors(*arguments)
    return energy if with_energy else energy[:0], grad_mu


def spread_log_vars(energies: Sequence[str], log_vars: Sequence[Tensor]) -> list[Tensor | None]:
    """One entry per node again, None where the family has no log variance."""
    present = iter(log_vars)
    return [next(present) if name == "gaussian_diag" else None for name in energies]


_library.impl("layer_energies", partial(_run_on_nodes, "layer_energies"), "CompositeExplicitAutograd")
_library.impl("layer_errors", partial(_run_on_nodes, "layer_errors"), "CompositeExplicitAutograd")
_library.impl("layer_deltas", _run_deltas, "CompositeExplicitAutograd")
_library.impl("update_phi_", _run_update, "CompositeExplicitAutograd")
_library.impl("infer", _run_infer, "CompositeExplicitAutograd")
_library.impl("weight_grads", _run_weight_grads, "CompositeExplicitAutograd")


# ---------------------------------------------------------------------------------------------------------------------
# fakes: shapes and dtypes without data


def _energy_dtype(mu: Tensor) -> torch.dtype:
    return torch.float64 if mu.dtype == torch.float64 else torch.float32


@torch.library.register_fake("pc_kernels::layer_energies")
def _(phis, mus, energies, log_vars, masks, holds, clamped):
    return mus[0].new_empty(len(mus), mus[0].shape[0], dtype=_energy_dtype(mus[0]))


@torch.library.register_fake("pc_kernels::layer_errors")
def _(phis, mus, energies, log_vars, masks, holds, clamped):
    energy = mus[0].new_empty(len(mus), mus[0].shape[0], dtype=_energy_dtype(mus[0]))
    grad_phi = [mu.new_empty(phi.shape) for phi, mu in zip(phis, mus, strict=True)]
    return energy, grad_phi, [mu.new_empty(mu.shape) for mu in mus]


@torch.library.register_fake("pc_kernels::layer_deltas")
def _(phis, mus, energies, log_vars, masks, holds, clamped, with_energy):
    energy = mus[0].new_empty(len(mus) if with_energy else 0, mus[0].shape[0], dtype=_energy_dtype(mus[0]))
    return energy, [mu.new_empty(mu.shape) for mu in mus]


@torch.library.register_fake("pc_kernels::update_phi_")
def _(phis, mus, feedback, energies, rules, lr, momentum, velocities, lr_scales, log_vars, masks, holds):
    return None


@torch.library.register_fake("pc_kernels::infer")
def _(
    x, weights, biases, activations, energies, feeds, rules, lr_scales, log_vars, phis, masks, holds, noise, clamped,
    priors, steps, lr, momentum, tol, precision, trace,
):  # fmt: skip
    shapes = [(x.shape[0], weight.shape[0]) for weight in weights]
    states = [x.new_empty(0 if held else shape) for shape, held in zip(shapes, clamped, strict=True)]
    rows = x.new_empty(steps + 1 if trace else 0, len(weights))
    return states, [x.new_empty(shape) for shape in shapes], rows, x.new_empty(STATUS_SIZE, dtype=torch.int64)


@torch.library.register_fake("pc_kernels::weight_grads")
def _(deltas, values, biased, scale):
    weights = [delta.new_empty(delta.shape[1], v.shape[1]) for delta, v in zip(deltas, values, strict=True)]
    widths = [delta.shape[1] if there else 0 for delta, there in zip(deltas, biased, strict=True)]
    return weights, [delta.new_empty(width) for delta, width in zip(deltas, widths, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# autograd: dE/dphi, dE/dmu, dE/dlog_var of the energies


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    phis, mus, energies, log_vars, masks, holds, clamped = inputs
    optional = [*masks, *holds]
    ctx.save_for_backward(*phis, *mus, *log_vars, *[entry for entry in optional if entry is not None])
    ctx.present = [entry is not None for entry in optional]
    ctx.energies, ctx.log_vars, ctx.clamped = energies, len(log_vars), clamped


def _no_gradients(entries: Sequence[Tensor | None]) -> list[None] | None:
    """torch takes a list of tensors alone for a list; one with Nones (or a tuple) counts as a single argument."""
    return None if any(entry is None for entry in entries) else [None] * len(entries)


def _energies_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    n = len(ctx.energies)
    saved = iter(ctx.saved_tensors)
    phis, mus, log_vars = ([next(saved) for _ in range(size)] for size in (n, n, ctx.log_vars))
    optional = [next(saved) if there else None for there in ctx.present]
    masks, holds = optional[:n], optional[n:]
    nothing = [None] * n
    if grad is None:
        return nothing, nothing, None, [None] * ctx.log_vars, _no_gradients(masks), _no_gradients(holds), None
    if torch.is_grad_enabled():  # create_graph: by formulas in torch's ops, which have derivatives again
        spread = spread_log_vars(ctx.energies, log_vars)
        errors = dispatch.module("reference").layer_errors(phis, mus, ctx.energies, spread, masks, holds, ctx.clamped)
    else:
        errors = torch.ops.pc_kernels.layer_errors(phis, mus, ctx.energies, log_vars, masks, holds, ctx.clamped)
    _, grad_phi, grad_mu = errors

    def scaled(g: Tensor, l: int) -> Tensor:
        return g * _per_sample(grad[l], g)

    by_phi = [None if held else scaled(g, l) for l, (g, held) in enumerate(zip(grad_phi, ctx.clamped, strict=True))]
    by_mu = [scaled(g, l) for l, g in enumerate(grad_mu)]
    by_log_var = [
        _log_var_grad(phis[l], mus[l], log_var, masks[l], grad[l])
        for l, log_var in enumerate(spread_log_vars(ctx.energies, log_vars))
        if log_var is not None
    ]
    return by_phi, by_mu, None, by_log_var, _no_gradients(masks), _no_gradients(holds), None


def _per_sample(grad: Tensor, like: Tensor) -> Tensor:
    """(B,) as a factor for (B, ..., D)."""
    return grad.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _log_var_grad(phi: Tensor, mu: Tensor, log_var: Tensor, mask: Tensor | None, grad: Tensor) -> Tensor:
    """d(sum_b grad_b E_b)/dlog_var; the energies broadcast log_var over the batch and whatever else it lacks."""
    entries = GaussianDiag().grad_log_var(phi, mu, log_var, mask) * _per_sample(grad, phi)
    return entries.sum_to_size(log_var.shape).to(log_var.dtype)


def _save_errors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1], *output[2])  # no second derivatives here: they do not require grad


def _errors_backward(ctx: Any, grad: Tensor | None, by_phi: Any, by_mu: Any) -> tuple[Any, ...]:
    return _energies_backward(ctx, grad)


torch.library.register_autograd("pc_kernels::layer_energies", _energies_backward, setup_context=_save)
torch.library.register_autograd("pc_kernels::layer_errors", _errors_backward, setup_context=_save_errors)
