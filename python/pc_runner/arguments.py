# SPDX-License-Identifier: MIT
"""What `PCNetwork.infer` is given, checked: an error names infer's own argument, whichever path the call takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pc_kernels as pck
from pc_runner.node import PCNode, fail

_INDEXED = re.compile(r"\b(phis|masks|clamped|clamp|noise|log_vars|mus|layers)\[(\d+)\]")
_OF_THE_NODE = {"log_vars": " log_var", "mus": "", "layers": ""}  # what is the module's own, no argument of infer


def shown(value: Any) -> str:
    """A short account of a value for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    return type(value).__name__ if not isinstance(value, str) else repr(value)


def renamed(error: Exception, names: Sequence[str], targets: dict[str, str]) -> Exception:
    """pc_kernels' ValueError or TypeError about an argument of its own, as one about infer's.

    names: of the nodes, in the order that pc_kernels was given. targets: what is called otherwise, as {"target": "y"}.
    """
    if type(error) not in (ValueError, TypeError):
        return error

    def own(found: re.Match[str]) -> str:
        what, index = found[1], int(found[2])
        if found[0] in targets or index >= len(names):
            return targets.get(found[0], found[0])
        name = repr(names[index])
        return f"node {name}{_OF_THE_NODE[what]}" if what in _OF_THE_NODE else f"{what.removesuffix('ed')}[{name}]"

    text = _INDEXED.sub(own, str(error))
    for theirs, mine in targets.items():
        text = text.replace(f"{theirs}: ", f"{mine}: ", 1) if text.startswith(f"{theirs}: ") else text
    return type(error)(text)


def check_dtype(name: str, mu: Tensor) -> None:
    """Raise TypeError for a node's prediction in 16 bits: states differ from it by less than they resolve."""
    if mu.dtype not in (torch.float32, torch.float64):
        remedy = "keep the module and x in float32 (autocast stays outside of infer)"
        fail(f"node {name!r}", "a prediction in float32 or float64", mu.dtype, remedy, TypeError)


# ---------------------------------------------------------------------------------------------------------- x and y


def chain_input(x: Any, flatten: bool, weight: Tensor) -> Tensor:
    """x as a chain's first linear layer takes it, (B, D_0)."""
    if not isinstance(x, Tensor):
        fail("x", "a tensor", shown(x), "convert it with torch.as_tensor", TypeError)
    if x.dtype != weight.dtype and weight.dtype in (torch.float32, torch.float64):
        fail("x", f"{weight.dtype}, as the weights", shown(x), f"call .to({weight.dtype})", TypeError)
    if x.device != weight.device:
        fail("x", f"a tensor on {weight.device}, as the weights", x.device, "call .to(...)")
    flat = x.flatten(1) if flatten and x.ndim > 1 else x
    if flat.ndim == 2 and flat.shape[1] != weight.shape[1]:
        fail("x", f"{weight.shape[1]} columns", shown(x), "the first linear layer takes as many")
    return flat


def refuse_input(inputs: Any, error: Exception) -> None:
    """Raise, for an error in the first pass through a module, that its forward cannot take x; return if it is another.

    What torch says of shapes and dtypes is a RuntimeError or an IndexError; what is no tensor meets a TypeError.
    """
    tensors = [shown(value) for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]
    text = " ".join(str(error).split())
    foreign = type(error) is TypeError and not tensors and ": wanted " not in text
    if type(error) not in (RuntimeError, IndexError) and not foreign:
        return
    kind = TypeError if foreign or "type" in text else ValueError
    got = ", ".join(tensors) or "no tensor"
    raise kind(f"x: wanted what the module's forward takes, got {got}; it says: {text}") from error


def list_targets(y: Any, count: int) -> list[Any]:
    """One target per output."""
    values = list(y) if isinstance(y, (tuple, list)) else [y]
    if len(values) != count:
        fail("y", f"{count} targets, one per output", len(values), "use None for an output that stays free")
    return values


# ----------------------------------------------------------------------------------------------- entries of the nodes


def check_list(what: str, entries: Any) -> None:
    """Entries of the nodes come in a list, or a dict by name."""
    if isinstance(entries, (Tensor, str)) or not isinstance(entries, Sequence):
        fail(what, "a list or a dict by node name", shown(entries), "one entry per node", TypeError)


def check_clamp(name: str, clamp: Any) -> None:
    if clamp is not None and clamp is not True and not (isinstance(clamp, Tensor) and clamp.dtype == torch.bool):
        got = repr(clamp) if isinstance(clamp, bool) else shown(clamp)
        remedy = "True holds it all, None leaves it free"
        fail(f"clamp[{name!r}]", "None, True or a bool mask", got, remedy, TypeError)


def check_given(name: str, node: PCNode, mu: Tensor, clamp: Any, given: Any, mask: Tensor | None) -> None:
    """A state, or the target that holds a node: before the module's code meets it."""
    if clamp is not None and given is None:
        fail(f"phis[{name!r}]", "the values to hold, since clamp holds this node", None, "pass them in phis")
    if given is None:
        return
    if not isinstance(given, Tensor):
        fail(f"phis[{name!r}]", "a tensor", shown(given), "convert it with torch.as_tensor", TypeError)
    if clamp is not True:
        if given.shape != mu.shape or given.dtype != mu.dtype:
            fail(f"phis[{name!r}]", f"a state {shown(mu)}", shown(given), "it has its prediction's form")
    elif isinstance(node.energy, str):
        try:
            log_var = None if node.log_var is None else node.log_var.detach()
            pck.layer_energies([given], [mu], [node.energy], log_vars=[log_var], masks=[mask], clamped=[True])
        except (ValueError, TypeError) as error:
            raise renamed(error, [name], {}) from None


def check_noise(name: str, mu: Tensor, noise: Any) -> None:
    """Of a node that feeds on its sample."""
    half = (*mu.shape[:-1], mu.shape[-1] // 2)
    if noise is None:
        fail(f"noise[{name!r}]", f"a tensor {half}", None, "the node feeds on its sample: draw it once")
    if not isinstance(noise, Tensor) or noise.dtype != mu.dtype:
        fail(f"noise[{name!r}]", f"a tensor of {mu.dtype}", shown(noise), "draw it with torch.randn", TypeError)
    if noise.shape != half:
        fail(f"noise[{name!r}]", f"a tensor {half}", shown(noise), "one number per mean")


def check_optimizer(algorithm: str, optimizer: Any) -> None:
    """ "ipc" takes one, nothing else does."""
    if algorithm != "ipc":
        if optimizer is not None:
            fail("optimizer", "None", shown(optimizer), "only 'ipc' changes weights during infer")
    elif optimizer is None:
        fail("optimizer", "a torch optimiser with algorithm='ipc'", None, "it changes the weights at every step")
    elif isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in ("zero_grad", "step")):
        remedy = "make one, as torch.optim.SGD(net.parameters(), lr=...)"
        fail("optimizer", "a torch optimiser with algorithm='ipc'", shown(optimizer), remedy, TypeError)
