# SPDX-License-Identifier: MIT
"""M1, M2 and M3 of the paper's section 4.1: fully connected classifiers, each with every way of training it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pc_runner.config import DEFAULT_HIDDEN, METHODS, MODELS, PROBS_LR_SCALE, Method, check_method
from pc_runner.network import PCNetwork, PCNode

_ACTIVATIONS = {"tanh": nn.Tanh, "softmax": lambda: nn.Softmax(dim=-1)}


def build(
    model: str,
    method: str,
    in_features: int,
    classes: int,
    hidden: Sequence[int] = DEFAULT_HIDDEN,
    seed: int = 0,
    lr_scale: float = PROBS_LR_SCALE,
) -> PCNetwork:
    """The network (B, in_features) -> (B, classes) of one experiment, with torch's default initialisation.

    model, method: keys of `MODELS` and `METHODS`. hidden: one width per hidden layer.
    seed: of the weights, which are the same for every method; the global generator stays as it was.
    lr_scale: of "pc_probs", its nodes' lr over the phi lr.

    Raises ValueError for an unknown model or method, one that the model does not have, or another number of widths.
    """
    check_method(model, method)
    activations = MODELS[model].activations
    if len(hidden) != len(activations) - 1:
        wanted = f"{len(activations) - 1} widths, one per hidden layer"
        raise ValueError(f"hidden: wanted {wanted}, got {len(hidden)}; the models are fixed at this depth")
    widths = [in_features, *hidden, classes]
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for narrow, wide, activation in zip(widths, widths[1:], activations, strict=False):
            modules += [nn.Linear(narrow, wide), _ACTIVATIONS[activation]()]
    nodes = [_node(activation, METHODS[method], lr_scale) for activation in activations]
    if METHODS[method].softmax != "gaussian" and activations[-1] == "softmax":
        nodes[-1] = PCNode("categorical")  # clamped: its step and the form of its state make no difference
    return PCNetwork.from_sequential(nn.Sequential(*modules), energy=nodes)


def _node(activation: str, method: Method, lr_scale: float) -> PCNode:
    if activation != "softmax":
        return PCNode("gaussian")
    scale = lr_scale if method.softmax == "categorical_probs" else 1.0
    return PCNode(method.softmax, step=method.step, lr_scale=scale)


def targets(net: PCNetwork, y: Tensor, classes: int) -> Tensor:
    """Class indices y (N,) as the output takes them: unchanged for a categorical one, else one-hot (N, classes)."""
    output = net.nodes[-1]
    assert isinstance(output, PCNode)
    if output.energy == "categorical":
        return y
    return nn.functional.one_hot(y, classes).float()
