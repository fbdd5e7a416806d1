# SPDX-License-Identifier: MIT
"""The layer operations: energies, errors and the phi update of ALL layers, one op call each. Checks and dispatch; no
math."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pc_kernels import checks, library
from pc_kernels.nodes import Nodes, check_log_vars, describe_nodes
from pc_kernels.pc_math import ENERGY_TABLE
from pc_kernels.results import LayerErrors

_ops = torch.ops.pc_kernels
assert library.STATUS_SIZE  # importing `library` defines the ops

Clamps = Sequence[bool | Tensor | None]
Masks = Sequence[Tensor | None]


def layer_energies(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    energies: Sequence[str],
    *,
    log_vars: Sequence[Tensor | None] | None = None,
    masks: Masks | None = None,
    clamped: Clamps | None = None,
) -> Tensor:
    """Energies E_l = D_KL[X_l(phi_l) || Xhat_l(mu_l)] of all nodes, in nats: (L, B), float32 (float64 in, float64 out).

    phis, mus: one (B, ..., D) tensor per node, shapes may differ from node to node; the energy sums over all but dim 0.
    energies: names out of `ENERGIES` (their formulas: the README's section 2). log_vars: (D,) for "gaussian_diag"
    nodes,
    None elsewhere.
    masks: None or bool, broadcast to phi; True takes part.
    clamped: None (free), True (phi is the target: probabilities, class indices, counts or data) or a bool mask, True
    = held.

    Twice differentiable with respect to phis, mus and log_vars. Raises ValueError or TypeError that names the argument.
    """
    phis, mus, nodes = describe_nodes(phis, mus, energies, masks, clamped)
    return _ops.layer_energies(phis, mus, nodes.energies, *_rest(log_vars, mus, nodes))


def layer_errors(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    energies: Sequence[str],
    *,
    log_vars: Sequence[Tensor | None] | None = None,
    masks: Masks | None = None,
    clamped: Clamps | None = None,
) -> LayerErrors:
    """Energies of all nodes together with dE/dphi and dE/dmu, the closed forms of the README's section 2.

    Arguments as in `layer_energies`. Returns LayerErrors(energy (L, B), grad_phi, grad_mu): lists shaped as phis and
    mus. grad_phi is
    the Euclidean gradient, exactly 0 where an entry is held or masked. The energy is differentiable; the gradients
    are not.
    """
    phis, mus, nodes = describe_nodes(phis, mus, energies, masks, clamped)
    return LayerErrors(*_ops.layer_errors(phis, mus, nodes.energies, *_rest(log_vars, mus, nodes)))


def _rest(log_vars: Any, mus: Sequence[Tensor], nodes: Nodes) -> tuple[Any, ...]:
    listed = check_log_vars(log_vars, mus, nodes.energies)
    return [entry for entry in listed if entry is not None], nodes.masks, nodes.holds, nodes.clamped


def update_phi_(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    feedback: Sequence[Tensor | None],
    energies: Sequence[str],
    *,
    lr: float,
    momentum: float = 0.0,
    velocities: Sequence[Tensor | None] | None = None,
    step_rules: Sequence[str | None] | None = None,
    lr_scales: Sequence[float] | None = None,
    log_vars: Sequence[Tensor | None] | None = None,
    masks: Masks | None = None,
    clamped: Clamps | None = None,
) -> None:
    """Move every node's phi by one step, in place; dE/dphi is recomputed inside.

    euclidean: phi <- phi - lr (dE/dphi + feedback), feedback = feed'^T dF/dv, v the value that the node feeds on;
    natural ("categorical" and "bernoulli"): phi <- phi - lr ((phi - mu) + feedback), feedback = dF/dv.
    momentum: u <- momentum u + g, phi <- phi - lr u, with `velocities` u (one per node, in place; None for a clamped
    node).
    step_rules: per node, None for the default (natural for "categorical" and "bernoulli", euclidean elsewhere).
    lr_scales: factors on lr per node. feedback[l] may be None (nothing above). Held and masked entries do not move,
    clamped=True nodes are left alone, "categorical_probs" stays >= 1e-6. The nodes move at once, also where a mu or a
    feedback lies in the memory of a state. Other arguments as in `layer_energies`.

    Raises ValueError or TypeError that names the bad argument, before anything is changed.
    """
    phis, mus, nodes = describe_nodes(phis, mus, energies, masks, clamped)
    n = len(phis)
    listed_log_vars = check_log_vars(log_vars, mus, nodes.energies)
    checks.number("lr", lr, least=0)
    checks.number("momentum", momentum, least=0, below=1)
    back = _check_like("feedback", feedback, mus)
    rules = _check_rules(step_rules, nodes.energies)
    scales = [1.0 if s is None else s for s in checks.per_node("lr_scales", lr_scales, n)]
    scales = [checks.number(f"lr_scales[{l}]", scale, least=0) for l, scale in enumerate(scales)]
    moving = [l for l in range(n) if not nodes.clamped[l]]
    speeds = _check_velocities(velocities, mus, momentum, moving)
    if not moving:
        return
    mus, back = _apart(phis, speeds, mus, back, moving)

    def take(values: Sequence[Any]) -> list[Any]:
        return [values[l] for l in moving]

    with torch.no_grad():
        _ops.update_phi_(
            take(phis), take(mus), take(back), take(nodes.energies), take(rules), float(lr), float(momentum), speeds,
            take(scales), take(listed_log_vars), take(nodes.masks), take(nodes.holds),
        )  # fmt: skip


def _apart(
    phis: Sequence[Tensor],
    speeds: Sequence[Tensor],
    mus: list[Tensor],
    back: list[Tensor | None],
    moving: Sequence[int],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """mus and feedback that stay what they are while the states move: copies of what lies in a state's memory.

    Fails if a state or velocity cannot be written to as a whole.
    """
    if torch.compiler.is_compiling():
        return mus, back
    written = {f"phis[{l}]": phis[l] for l in moving} | {
        f"velocities[{l}]": u for l, u in zip(moving, speeds, strict=False)
    }
    places: dict[Any, str] = {}
    for name, tensor in written.items():
        if torch._debug_has_internal_overlap(tensor) == 1:  # pyright: ignore[reportPrivateImportUsage]
            checks.fail(name, "entries with memory of their own", "an expanded tensor", "call .clone()")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            checks.fail(name, "a tensor that can be changed here", "one made in inference mode", "call .clone()")
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and places.setdefault(place, name) != name:
            checks.fail(
                name, f"memory of its own, not that of {places[place]}", checks.describe(tensor), "call .clone()"
            )
    states = {phis[l].untyped_storage()._cdata for l in moving}

    def apart(value: Any) -> Any:
        return value.clone() if value is not None and value.untyped_storage()._cdata in states else value

    return [apart(mu) for mu in mus], [apart(value) for value in back]


def _check_like(argument: str, values: Any, mus: Sequence[Tensor]) -> list[Tensor | None]:
    listed = checks.per_node(argument, values, len(mus))
    for l, (value, mu) in enumerate(zip(listed, mus, strict=True)):
        if value is not None:
            checks.floating(f"{argument}[{l}]", value, shape=mu.shape, like=mu)
    return listed


def _check_rules(step_rules: Any, energies: Sequence[str]) -> list[str]:
    rules = checks.per_node("step_rules", step_rules, len(energies))
    for l, (rule, energy) in enumerate(zip(rules, energies, strict=True)):
        natural = ENERGY_TABLE[energy].natural
        rules[l] = ("natural" if natural else "euclidean") if rule is None else rule
        checks.choice(f"step_rules[{l}]", rules[l], ("euclidean", "natural"))
        if rules[l] == "natural" and not natural:
            remedy = "the natural step exists for 'categorical' and 'bernoulli'"
            checks.fail(f"step_rules[{l}]", "'euclidean' here", f"'natural' with {energy!r}", remedy)
    return rules


def _check_velocities(velocities: Any, mus: Sequence[Tensor], momentum: float, moving: Sequence[int]) -> list[Tensor]:
    """The velocities of the moving nodes; an empty list stands for none."""
    if velocities is None:
        if momentum:
            checks.fail(
                "velocities", "a list of tensors, since momentum > 0", "None", "start with zeros_like(phi) per node"
            )
        return []
    listed = _check_like("velocities", velocities, mus)
    for l in moving:
        if listed[l] is None:
            checks.fail(f"velocities[{l}]", "a tensor", "None", "only clamped nodes may go without")
    return [listed[l] for l in moving]  # type: ignore[misc]
