# SPDX-License-Identifier: MIT
"""Inference and gradients of a chain of linear layers, by `pck.infer` and by backpropagation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pc_kernels as pck
from pc_runner.arguments import check_clamp, check_dtype, check_optimizer, renamed
from pc_runner.inference import Link, Result
from pc_runner.node import fail


class Call(NamedTuple):
    """One call of `PCNetwork.infer`, the arguments as they came; per-node lists have one entry per node."""

    owner: nn.Module
    x: Tensor  # (B, D_0)
    y: Tensor | None
    links: Sequence[Link]
    layers: list[pck.Layer]
    masks: list[Tensor | None] | None
    settings: dict[str, Any]  # what `pck.infer` takes beside these
    names: list[str] | None = None  # of the nodes


def infer_pc(call: Call) -> Result:
    """Gradient moves of all free phi on F = sum_l E_l (`pck.infer`)."""
    names = call.names or [f"nodes.{l}" for l in range(len(call.layers) - 1)] + ["output"]
    clamps = call.settings["clamp"]
    for name, clamp in zip(names, clamps if isinstance(clamps, (list, tuple)) else (), strict=False):
        check_clamp(name, clamp)
    try:
        done = pck.infer(call.x, call.layers, target=call.y, masks=call.masks, **call.settings)
    except (ValueError, TypeError) as error:
        raise renamed(error, names, {"target": "y"}) from None
    return Result(done.phis, done.energy, "pc", call.owner, call.x, call.layers, inference=done, names=names)


def gradients_pc(result: Result) -> list[tuple[Tensor, Tensor]]:
    """(parameter, dF/dp / B) at the final states: dW_l = delta_l^T v_{l-1}, db_l = sum delta_l."""
    assert result.inference is not None  # of every "pc" result
    assert result.x is not None
    found = []
    grads = pck.weight_grads(result.x, result.layers, result.inference)
    for layer, grad in zip(result.layers, grads, strict=True):
        pairs = ((layer.weight, grad.weight), (layer.bias, grad.bias), (layer.log_var, grad.log_var))
        found += [(p, g) for p, g in pairs if p is not None and g is not None and p.requires_grad]
    return found


def backward_pc(result: Result) -> None:
    """p.grad += dF/dp / B."""
    for parameter, grad in gradients_pc(result):
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.add_(grad)


class _Known(torch.autograd.Function):
    """A number whose gradients are known already: F / B of a chain, with those of `pck.weight_grads`."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, *(g * grad for g in ctx.grads)


def loss_chain(result: Result) -> Tensor:
    """A scalar whose backward() is `backward_chain`; its value is F / B for "bp", 0 otherwise."""
    if result.algorithm == "bp":
        return bp_loss(result)
    found = gradients_pc(result)
    if not found:  # every parameter is frozen
        return result.layers[0].weight.new_zeros(())
    return _Known.apply([g for _, g in found], *(p for p, _ in found))  # type: ignore[return-value]


_STATES_ONLY = {"phis": None, "clamp": None, "noise": None, "precision": "fp32"}  # settings "bp" has no use for


def infer_bp(call: Call) -> Result:
    """Backpropagation's half of an inference: the forward pass and the batch mean of the output's energy, with graph.

    The states are the feed-forward ones; nothing moves.
    """
    for name, default in _STATES_ONLY.items():
        if call.settings[name] != default:
            raise ValueError(f"{name}: wanted {default!r} with algorithm='bp', which holds no states; leave it out")
    if call.masks is not None and any(mask is not None for mask in call.masks[:-1]):
        raise ValueError("masks: wanted None for hidden nodes with algorithm='bp', got a mask; use algorithm='pc'")
    with torch.enable_grad():
        mus = forward_nodes(call.links, call.layers, call.x)
        check_dtype("nodes.0", mus[0])
        loss = None if call.y is None else _output_energy(call, mus[-1])
    phis = [mu.detach() for mu in mus]
    energy = None
    if loss is not None and call.y is not None:
        phis[-1] = call.y
    if call.settings["trace"]:
        energy = phis[0].new_zeros(1, len(mus))
        if loss is not None:
            energy[0, -1] = loss.detach()
    return Result(phis, energy, "bp", call.owner, call.x, call.layers, loss=loss)


def forward_nodes(links: Sequence[Link], layers: Sequence[pck.Layer], x: Tensor) -> list[Tensor]:
    """mu_l (B, D_l) of all nodes by the user's own modules; an activation that is a node's feed comes after its mu."""
    mus, v = [], x
    for link, layer in zip(links, layers, strict=True):
        a = link.linear(v)
        v = a if link.activation is None else link.activation(a)
        mus.append(a if layer.activation == "identity" else v)
    return mus


def _output_energy(call: Call, mu: Tensor) -> Tensor:
    last, masks = call.layers[-1], call.masks
    try:
        energies = pck.layer_energies(
            [call.y], [mu], [last.energy], clamped=[True],  # type: ignore[list-item]
            log_vars=[last.log_var], masks=None if masks is None else [masks[-1]],
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, ["output"], {"phis[0]": "y"}) from None
    return energies.sum() / max(len(mu), 1)


NO_TARGET = "result: wanted one inferred with a target, got algorithm='bp' without y; pass y to infer"


def bp_loss(result: Result) -> Tensor:
    """E_L / B with its graph."""
    if result.loss is None:
        raise ValueError(NO_TARGET)
    return result.loss


def infer_chain(call: Call, algorithm: str) -> Result:
    """ "pc" or "bp" on a chain."""
    return (infer_pc if algorithm == "pc" else infer_bp)(call)


def backward_chain(result: Result) -> None:
    """The gradients of what `infer_chain` returned."""
    if result.algorithm == "bp":
        loss = bp_loss(result)
        if loss.requires_grad:
            loss.backward(retain_graph=True)  # the result's own, as long as it lives
    else:
        backward_pc(result)


def bad_choice(name: str, known: Collection[str], optimizer: Any) -> None:
    """Raise ValueError for an algorithm that there is not, or an optimiser where none is taken."""
    if name not in known:
        fail("algorithm", f"one of {', '.join(known)}", repr(name), "'pc' is predictive coding")
    check_optimizer(name, optimizer)
