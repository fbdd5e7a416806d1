# SPDX-License-Identifier: MIT
"""Chains of linear layers, found inside a module with nodes or made from a Sequential: they go to `pck.infer`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.nn.modules.module as global_hooks
from torch import Tensor, fx, nn

import pc_kernels as pck
from pc_runner.distributions import Pair
from pc_runner.inference import RULES, Link, is_hooked, is_plain, place_activation, read_chain
from pc_runner.node import PCNode, fail
from pc_runner.untouched import left_alone
from pc_runner.walk import Program

_FUNCTIONS: dict[Any, str] = {
    torch.tanh: "tanh", F.tanh: "tanh", torch.relu: "relu", F.relu: "relu", F.gelu: "gelu", F.silu: "silu",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.leaky_relu: "leaky_relu", F.softplus: "softplus",
    F.hardtanh: "hardtanh",
}  # fmt: skip
_METHODS = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid"}


class Stage(NamedTuple):
    """mu = act(W v + b) of one node, and what the node passes on."""

    linear: nn.Linear
    activation: str
    node: PCNode
    feed: str | None

    def layer(self) -> pck.Layer:
        node = self.node
        assert isinstance(node.energy, str)  # of every chain
        return pck.Layer(
            self.linear.weight, self.linear.bias, self.activation, node.energy, self.feed, node.log_var, node.step,
            node.lr_scale, node.prior,
        )  # fmt: skip


class ModuleChain(NamedTuple):
    """A module that comes down to linear layers with a node behind each, or the reason why it does not."""

    flatten: bool
    stages: list[Stage]
    names: list[str]  # of the nodes, in the order of the calls
    reason: str = ""


def find_chain(program: Program) -> ModuleChain:
    """The chain that the module is, if it is one; `stages` is empty otherwise, and `reason` says why.

    A node that is called twice, or never, makes no chain: a walk then refuses it.
    """
    try:
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            raise _NoChain("hooks on all modules are set")
        if any(map(is_hooked, program.module.modules())):
            raise _NoChain("a module has a forward hook, or a forward of its own")
        if program.contents().stores:  # there a symbolic value would stay
            raise _NoChain("its forward binds names outside of itself")
        with left_alone(program.contents()):
            return _read(_Tracer().trace(program.module), program)
    except _NoChain as error:
        return ModuleChain(False, [], [], str(error))
    except Exception as error:  # whatever the user's code does with a symbolic value
        return ModuleChain(False, [], [], f"its forward has no fixed form ({type(error).__name__})")


class _NoChain(Exception):  # noqa: N818 - an answer
    pass


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PCNode) or super().is_leaf_module(m, module_qualified_name)


def _read(graph: fx.Graph, program: Program) -> ModuleChain:
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    places = [node for node in graph.nodes if node.op == "placeholder"]
    if len(places) != 1 or len(program.outputs) > 1:
        raise _NoChain("it has several inputs or outputs")
    before = places[0]
    flatten, stages = False, []
    linear: nn.Linear | None = None
    acts: list[str] = []  # activations since the linear layer, or since its node
    for node in nodes:
        if node.all_input_nodes != [before] or len(before.users) != 1:
            raise _NoChain("a value is used more than once")
        before, kind = node, _kind(node, program)
        if isinstance(kind, nn.Linear):
            if linear is not None:
                raise _NoChain("two linear layers with no node between them")
            _close(stages, acts)
            linear, acts = kind, []
        elif isinstance(kind, PCNode):
            if linear is None:
                raise _NoChain("a node is not predicted by a linear layer")
            stages.append(_stage(linear, acts, kind))
            linear, acts = None, []
        elif kind == "identity":
            continue
        elif kind == "flatten" and not stages and linear is None:
            flatten = True
        elif isinstance(kind, str) and kind in pck.ACTIVATIONS:
            acts.append(kind)
        else:
            raise _NoChain(f"{node.target} is no part of a chain")
    output = next(iter(program.outputs.values()), None)
    if output is not None:
        if linear is None:
            raise _NoChain("the output is not predicted by a linear layer")
        stages.append(_stage(linear, acts, output))
    elif linear is not None or acts:
        raise _NoChain("there is more behind the last node")
    if not stages:
        raise _NoChain("it has no linear layer")
    names = program.names
    found = [names[id(stage.node)] for stage in stages]
    if sorted(found) != sorted(names.values()):
        raise _NoChain("a node is called twice, or never")
    return ModuleChain(flatten, stages, found)


def _kind(node: fx.Node, program: Program) -> Any:
    if node.op == "call_module":
        module = program.module.get_submodule(str(node.target))
        if isinstance(module, PCNode) or (type(module) is nn.Linear and is_plain(module)):
            return module
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return "flatten"
        if type(module) is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
            return "identity"
        rule = RULES.get(type(module))
        return rule.name if rule is not None and rule.fits(module) else "other"
    if len(node.args) > 1 or node.kwargs:
        whole = node.args[1:] == (1,) and not node.kwargs and node.target in ("flatten", torch.flatten)
        return "flatten" if whole else "other"
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target, "identity" if node.target is operator.pos else "other")
    return _METHODS.get(str(node.target), "other")


def _stage(linear: nn.Linear, acts: Sequence[str], node: PCNode) -> Stage:
    if node.linear is not None:
        raise _NoChain("its output is one operator with its linear layer")
    if len(acts) > 1 or isinstance(node.energy, Pair):
        raise _NoChain("two activations in a row, or a pair of torch.distributions")
    return Stage(linear, acts[0] if acts else "identity", node, node.feed)


def _close(stages: list[Stage], acts: Sequence[str]) -> None:
    """Activations behind a node are its feed, if it has none of its own."""
    if not acts:
        return
    if not stages or len(acts) > 1 or stages[-1].node.fed != "identity":
        raise _NoChain("an activation has no place in a chain")
    stages[-1] = stages[-1]._replace(feed=acts[0])


class SequentialWalk(nn.Module):
    """A Sequential's linear layers with the nodes called behind them, for the algorithms that walk through modules."""

    def __init__(self, module: nn.Sequential, nodes: Sequence[PCNode]):
        super().__init__()
        self.module = module
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: Tensor) -> Tensor:
        flatten, links = read_chain(self.module)
        v = x.flatten(1) if flatten else x
        last = len(links) - 1
        for l, (link, node) in enumerate(zip(links, self.nodes, strict=True)):
            a = link.linear(v)
            placed, _ = place_activation(link, node, l == last)  # type: ignore[arg-type]
            mu = a if link.activation is None or placed == "identity" != link.name else link.activation(a)
            v = mu if l == last else node(mu)
        return v


def is_bare(module: nn.Sequential, links: Sequence[Link]) -> bool:
    """Whether a Sequential's linear layers and activations are all that runs: no hooks, no weights made from others."""
    return all(is_plain(link.linear) for link in links) and not any(map(is_hooked, module.modules()))


def sequential_program(module: nn.Sequential, nodes: Sequence[PCNode]) -> Program:
    """The program of a network made by `PCNetwork.from_sequential`. ValueError for a hook where no walk passes."""
    links = read_chain(module).links
    passed: list[Any] = [link.linear for link in links]
    for l, (link, node) in enumerate(zip(links, nodes, strict=True)):
        placed, _ = place_activation(link, node, l == len(links) - 1)
        if link.activation is not None and placed == link.name:
            passed.append(link.activation)
    for name, child in module.named_modules():
        if is_hooked(child) and not any(child is one for one in passed):
            remedy = "no node's prediction comes through it: put PCNodes into a module and pass that to PCNetwork(...)"
            fail(f"module[{name}]" if name else "module", "no forward hook", type(child).__name__ + " with one", remedy)
    walk = SequentialWalk(module, nodes)
    inner = {f"nodes.{l}": node for l, node in enumerate(nodes[:-1])}
    return Program(walk, inner, {"output": nodes[-1]})
