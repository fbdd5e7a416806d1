# SPDX-License-Identifier: MIT
"""The arguments that describe nodes (states, targets, masks, clamps), checked and brought into the form that the ops
take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pc_kernels import checks
from pc_kernels.pc_math import ENERGIES


@dataclass
class Nodes:
    """Lists of the ops, one entry per node: `clamped` (phi is the target), `holds` and `masks` (bool tensors or
    None)."""

    energies: list[str]
    masks: list[Tensor | None] = field(default_factory=list)
    holds: list[Tensor | None] = field(default_factory=list)
    clamped: list[bool] = field(default_factory=list)


def names(energies: Any, n: int) -> list[str]:
    """The energies' names, one per node."""
    listed = checks.per_node("energies", energies, n)
    for l, name in enumerate(listed):
        checks.choice(f"energies[{l}]", name, ENERGIES)
    return listed


def state_lists(phis: Any, mus: Any) -> tuple[list[Any], list[Tensor]]:
    """phis and mus as lists of equal length, mus checked: one dtype, one device, one batch size."""
    if not isinstance(phis, (list, tuple)) or not phis:
        checks.fail("phis", "a non-empty list of tensors, one per node", checks.describe(phis), "", TypeError)
    phis, mus = list(phis), checks.per_node("mus", mus, len(phis))
    for l, mu in enumerate(mus):
        checks.floating(f"mus[{l}]", mu, like=mus[0] if l else None)
        if mu.ndim < 2 or 0 in mu.shape[1:]:
            remedy = "dim 0 is the sample, the last the feature"
            checks.fail(f"mus[{l}]", "at least 2 dimensions, none but the first empty", checks.describe(mu), remedy)
        if mu.shape[0] != mus[0].shape[0]:
            checks.fail(f"mus[{l}]", f"batch size {mus[0].shape[0]}", checks.describe(mu), "dim 0 is the sample")
    return phis, mus


def split_clamps(argument: str, clamped: Any, n: int) -> tuple[list[bool], list[Any]]:
    """`clamped` entries None | True | mask -> (is the whole node a target, mask of held entries)."""
    if clamped is None:
        return [False] * n, [None] * n
    entries = checks.per_node(argument, clamped, n)
    for l, entry in enumerate(entries):
        if entry is not None and not isinstance(entry, (bool, Tensor)):
            checks.fail(f"{argument}[{l}]", "None, True or a bool mask", checks.describe(entry), "", TypeError)
    return [entry is True for entry in entries], [entry if isinstance(entry, Tensor) else None for entry in entries]


def check_masks(argument: str, masks: Sequence[Any], shapes: Sequence[Sequence[int]], device: torch.device) -> None:
    """Each mask broadcasts to its node's shape, which is also the ops' view of it."""
    for l, (mask, shape) in enumerate(zip(masks, shapes, strict=True)):
        if mask is not None:
            checks.mask(f"{argument}[{l}]", mask, shape, device)


def target_shape(energy: str, mu_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a clamped node's (float) target: mu's, or half the width for `gaussian_full`."""
    shape = tuple(mu_shape)
    return (*shape[:-1], shape[-1] // 2) if energy == "gaussian_full" else shape


def mask_shape(energy: str, clamped: bool, mu_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape that masks broadcast to: the state's, a float target's, mu's for class indices."""
    return target_shape(energy, mu_shape) if clamped else tuple(mu_shape)


def check_target(
    argument: str, target: Any, energy: str, mu_shape: Sequence[int], like: Tensor, visible: Tensor | None
) -> None:
    """A clamped node's target: class indices (`categorical` only) or floats, within the family's domain."""
    checks.tensor(argument, target)
    if not target.is_floating_point():
        _check_indices(argument, target, energy, mu_shape, like, visible)
        return
    wanted = target_shape(energy, mu_shape)
    checks.floating(argument, target, shape=wanted, like=like)
    if energy in ("categorical", "categorical_probs", "poisson"):
        checks.in_range(argument, target, 0.0, math.inf, visible)
    elif energy == "bernoulli":
        checks.in_range(argument, target, 0.0, 1.0, visible)
    if energy == "categorical" and visible is not None:
        hidden = torch.where(visible, 0.0, target)
        if checks.reads_values(hidden) and bool(hidden.any()):
            checks.fail(
                argument, "zero probability for masked classes", "more", "check the mask, or renormalise the target"
            )


def _check_indices(
    argument: str, target: Tensor, energy: str, mu_shape: Sequence[int], like: Tensor, visible: Tensor | None
) -> None:
    if energy != "categorical":
        remedy = (
            f"class indices are for 'categorical'; this node is {energy!r}: pass floats, e.g. one_hot(y, D).float()"
        )
        checks.fail(argument, "a floating-point target", checks.describe(target), remedy, TypeError)
    if target.dtype != torch.int64:
        checks.fail(
            argument, "int64 class indices or float probabilities", checks.describe(target), "call .long()", TypeError
        )
    if target.shape != tuple(mu_shape[:-1]):
        wanted = f"class indices of shape {tuple(mu_shape[:-1])}"
        checks.fail(
            argument, wanted, checks.describe(target), "one index per row, or probabilities of the node's full shape"
        )
    if target.device != like.device:
        checks.fail(argument, f"a tensor on {like.device}", checks.describe(target), f"call .to({str(like.device)!r})")
    checks.class_indices(argument, target, mu_shape[-1], visible)


def check_states(phis: Sequence[Any], mus: Sequence[Tensor], nodes: Nodes) -> None:
    """Every phi fits its mu: a state of mu's shape, or a target."""
    for l, (phi, mu, energy) in enumerate(zip(phis, mus, nodes.energies, strict=True)):
        if energy == "gaussian_full" and mu.shape[-1] % 2:
            checks.fail(
                f"mus[{l}]", "an even width", checks.describe(mu), "'gaussian_full' holds [means, log variances]"
            )
        if nodes.clamped[l]:
            check_target(f"phis[{l}]", phi, energy, mu.shape, mu, nodes.masks[l])
        else:
            checks.floating(f"phis[{l}]", phi, shape=mu.shape, like=mu)


def check_log_vars(log_vars: Any, mus: Sequence[Tensor], energies: Sequence[str]) -> list[Tensor | None]:
    """A log variance for every `gaussian_diag` node, None elsewhere."""
    listed = checks.per_node("log_vars", log_vars, len(mus))
    for l, (log_var, mu, energy) in enumerate(zip(listed, mus, energies, strict=True)):
        name = f"log_vars[{l}]"
        if (log_var is None) == (energy == "gaussian_diag"):
            wanted = "None" if log_var is not None else "a tensor (D,)"
            remedy = f"'gaussian_diag' has one, no other energy does; this node is {energy!r}"
            checks.fail(name, wanted, checks.describe(log_var), remedy)
        if log_var is not None:
            checks.floating(name, log_var, like=mu)
            inner = tuple(mu.shape[1:])
            fits = log_var.ndim <= len(inner) and all(
                a in (1, b) for a, b in zip(reversed(log_var.shape), reversed(inner), strict=False)
            )
            if not fits:
                checks.fail(
                    name, f"a shape that broadcasts to {inner}", checks.describe(log_var), "(D,), D the last dimension"
                )
    return listed


def describe_nodes(
    phis: Any, mus: Any, energies: Any, masks: Any, clamped: Any
) -> tuple[list[Any], list[Tensor], Nodes]:
    """All checks that the three layer ops share."""
    phis, mus = state_lists(phis, mus)
    n = len(phis)
    nodes = Nodes(names(energies, n), checks.per_node("masks", masks, n))
    nodes.clamped, nodes.holds = split_clamps("clamped", clamped, n)
    shapes = [mask_shape(e, c, mu.shape) for e, c, mu in zip(nodes.energies, nodes.clamped, mus, strict=True)]
    check_masks("masks", nodes.masks, shapes, mus[0].device)
    check_masks("clamped", nodes.holds, shapes, mus[0].device)
    for l, mask in enumerate(nodes.masks):
        if mask is not None:
            checks.visible_rows(f"masks[{l}]", mask)
    check_states(phis, mus, nodes)
    return phis, mus, nodes
