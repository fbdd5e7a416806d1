# SPDX-License-Identifier: MIT
"""One pass through a module in which the nodes hold states: who is reached, in which order, predicted by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from pc_runner.arguments import (
    check_clamp,
    check_given,
    check_list,
    check_noise,
    list_targets,
    refuse_input,
    shown,
)  # fmt: skip
from pc_runner.contents import Contents, Looks
from pc_runner.node import HOLDS_PARAMETERS, PCNode, fail
from pc_runner.untouched import left_alone

Meet = Callable[[str, PCNode, Tensor], Tensor]  # (name, node, mu) -> what the node passes on


class Program(nn.Module):
    """A module with nodes inside and output nodes behind what it returns; calling it walks through all of them once.

    module: the user's. inner: its nodes by name. outputs: the nodes that what it returns predicts, in order.
    heads: linear layers by the name of the output node that they are one with: a walk passes through them.
    """

    def __init__(
        self, module: nn.Module, inner: Mapping[str, PCNode], outputs: Mapping[str, PCNode],
        heads: Mapping[str, nn.Linear] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.module = module
        self.inner, self.outputs, self.heads = dict(inner), dict(outputs), dict(heads or {})
        self.looks = Looks()
        self._contents: Contents | None = None

    def contents(self, again: bool = False) -> Contents:
        """What the module consists of and reads, looked at once per program, or `again`."""
        if self._contents is None or again:
            self._contents = self.looks.at(self.module)
        return self._contents

    @property
    def names(self) -> dict[int, str]:
        """Node identities to names."""
        return {id(node): name for name, node in [*self.inner.items(), *self.outputs.items()]}

    def walk(self, inputs: Sequence[Any], meet: Meet, tensors: Mapping[int, Tensor] | None = None) -> list[str]:
        """One pass; `meet` sees every node with its mu, the outputs last. Returns the names in order.

        tensors: what to use instead of the module's own, by these' identities (`Contents.tensors`). The module is
        afterwards what it was (`left_alone`), and the inputs are copies: what forward changes of them is lost.
        BatchNorm uses its running statistics. Raises ValueError for a node reached twice, or never.
        """
        seen: list[str] = []
        names = self.names

        def visit(node: PCNode, mu: Tensor) -> Tensor:
            name = names[id(node)]
            if name in seen:
                remedy = "a node holds one state; put a PCNode of its own at each place"
                fail(f"node {name!r}", "one call in a forward pass", "a second one", remedy)
            if not isinstance(mu, Tensor):
                fail(f"node {name!r}", "a tensor", type(mu).__name__, "a node takes one tensor", TypeError)
            seen.append(name)
            return meet(name, node, mu)

        with (
            left_alone(self.contents(), tensors, whole=tensors is None),
            _visited(self.inner.values(), visit),
            _running_statistics(self.module),
            _passed(self.heads) as reached,
        ):
            out = self.module(*map(_copied, inputs))
        for name, mu in zip(self.outputs, self._outputs(out), strict=True):
            if name in self.heads and not any(mu is v for v in reached.get(name, ())):
                remedy = "name the layer whose result the module returns as it is, or leave linear= out"
                fail(f"node {name!r}", f"the result of {self.outputs[name].linear!r}", "another tensor", remedy)
            visit(self.outputs[name], mu)
        missing = [name for name in names.values() if name not in seen]
        if missing:
            remedy = "call it in forward, or remove it from the module"
            fail(f"node {missing[0]!r}", "a call in the forward pass", "none", remedy)
        return seen

    def _outputs(self, out: Any) -> list[Tensor]:
        if not self.outputs:
            return []
        values = list(out) if isinstance(out, (tuple, list)) else [out]
        if len(values) != len(self.outputs):
            remedy = "pass output=[...], one PCNode per tensor that the module returns"
            fail("output", f"{len(values)} nodes, as the module returns", len(self.outputs), remedy)
        return values


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, torch.clone, value)


def make_program(module: nn.Module, outputs: Sequence[PCNode], targets: Any = True) -> Program:
    """The program of a module with nodes inside; a compiled module's own code is walked.

    targets: those of the outputs; a categorical one without a target (None) is an ordinary node of logits.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile(module) keeps it there
    inner, ends = name_nodes(module, outputs)
    for name, node in inner.items():
        if node.linear is not None:
            fail(f"node {name!r}", "linear=None inside a module", repr(node.linear), "pass it in output=PCNode(...)")
    given = list(targets) if isinstance(targets, (tuple, list)) else [targets] * len(outputs)
    heads = {}
    for (name, node), target in zip(ends.items(), given, strict=False):
        if node.linear is not None and target is None and node.energy == "gaussian":
            fail("y", f"a target of {name!r}, whose node has linear=", None, "its state would be probabilities")
        if node.linear is not None and target is not None:
            heads[name] = _find_linear(module, node.linear)
    return Program(module, inner, ends, heads)


def name_nodes(module: nn.Module, outputs: Sequence[PCNode]) -> tuple[dict[str, PCNode], dict[str, PCNode]]:
    """The nodes inside by their modules' names, and the outputs by theirs. ValueError for two of one name."""
    module = getattr(module, "_orig_mod", module)
    inner = {name: child for name, child in module.named_modules() if isinstance(child, PCNode)}
    ends = ["output"] if len(outputs) == 1 else [f"output[{i}]" for i in range(len(outputs))]
    for name in ends:
        if name in inner:
            remedy = "rename it: that is the output node's name"
            fail(f"node {name!r}", "another name inside the module", repr(name), remedy)
    return inner, dict(zip(ends, outputs, strict=True))


def _find_linear(module: nn.Module, name: str) -> nn.Linear:
    found = dict(module.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        names = [n for n, child in module.named_modules() if isinstance(child, nn.Linear)]
        wanted = f"the name of one of the module's nn.Linear ({', '.join(names) or 'it has none'})"
        fail("linear", wanted, repr(name), "it is the layer whose result the module returns")
    return found


@contextmanager
def _passed(heads: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each head returns its input; the tensors that came through, by the output's name."""
    reached: dict[str, list[Tensor]] = {name: [] for name in heads}

    def through(name: str) -> Callable[..., Tensor]:
        def forward(v: Tensor) -> Tensor:
            reached[name].append(v)
            return v

        return forward

    for name, linear in heads.items():
        linear.forward = through(name)  # an instance's attribute: the class keeps its own
    try:
        yield reached
    finally:
        for linear in heads.values():
            del linear.forward


@contextmanager
def _visited(nodes: Any, visit: Callable[[PCNode, Tensor], Tensor]) -> Iterator[None]:
    nodes = list(nodes)
    for node in nodes:
        node._visit = visit
    try:
        yield
    finally:
        for node in nodes:
            node._visit = None


@contextmanager
def _running_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm in evaluation: batch statistics would tie the samples together and make F depend on the batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@contextmanager
def same_draws(rng: Sequence[Tensor]) -> Iterator[None]:
    """Inside, random numbers come as they did after `rng` was taken: every pass of an inference drops the same."""
    with torch.random.fork_rng(devices=range(len(rng) - 1)):
        torch.set_rng_state(rng[0])
        for device, state in enumerate(rng[1:]):
            torch.cuda.set_rng_state(state, device)
        yield


def draws() -> list[Tensor]:
    """The random number generators' states, for `same_draws`: the CPU's, then each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


@dataclass(eq=False)
class State:
    """One node during an inference. phi: (B, ...) its state, or its target where it is held."""

    name: str
    node: PCNode
    mu: Tensor  # of the forward pass
    phi: Tensor
    held: bool  # the whole node is a target
    hold: Tensor | None  # bool, True does not move
    mask: Tensor | None
    noise: Tensor | None
    given: bool  # phi came from the caller
    target: str = ""  # what it is called where it came in y
    head: nn.Linear | None = None  # mu is this layer's input, the node's logits are its result

    @property
    def free(self) -> bool:
        return not self.held

    def passes(self, phi: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """v = feed(phi); a target that is no state (probabilities, indices, counts, data) is passed on as it is."""
        if self.held and isinstance(self.node.energy, str) and self.node.energy in HOLDS_PARAMETERS:
            if phi.is_floating_point():
                return phi
            return nn.functional.one_hot(phi, self.mu.shape[-1]).to(self.mu.dtype)
        return self.node.value(phi, mask, noise)

    @property
    def value(self) -> Tensor:
        """v at the present phi."""
        return self.passes(self.phi, self.mask, self.noise)


@dataclass
class Request:
    """What `infer` was given about the nodes: lists in the order in which they are reached, or dicts by name."""

    inputs: tuple[Any, ...]
    targets: Any = None
    phis: Any = None
    clamp: Any = None
    masks: Any = None
    noise: Any = None

    def entry(self, what: str, index: int, name: str) -> Any:
        """What was given for one node."""
        entries = getattr(self, what)
        if entries is None:
            return None
        if isinstance(entries, Mapping):
            return entries.get(name)
        check_list(what, entries)
        return entries[index] if index < len(entries) else None

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError for entries of nodes that there are not."""
        for what in ("phis", "clamp", "masks", "noise"):
            entries = getattr(self, what)
            if entries is None or (what == "noise" and isinstance(entries, Tensor)):
                continue
            if isinstance(entries, Mapping):
                unknown = [name for name in entries if name not in names]
                if unknown:
                    fail(what, f"names out of {', '.join(names)}", repr(unknown[0]), "they are the modules' own names")
                continue
            check_list(what, entries)
            if len(entries) != len(names):
                fail(what, f"{len(names)} entries, one per node", len(entries), f"the order is {', '.join(names)}")

    def check_noise(self, names: Sequence[str], sampled: Sequence[str]) -> None:
        """Raise ValueError for noise that no node takes."""
        if isinstance(self.noise, Tensor):
            if len(sampled) != 1:
                remedy = f"{len(sampled)} nodes feed on a sample"
                fail("noise", "a list or a dict by node name" if sampled else "None", shown(self.noise), remedy)
            return
        for index, name in enumerate(names):
            entry = self.entry("noise", index, name)
            if entry is not None and name not in sampled:
                fail(f"noise[{name!r}]", "None", shown(entry), "this node feeds on no sample")


def record(program: Program, request: Request) -> list[State]:
    """The forward pass that starts an inference: phi = mu except where a state or a target is given.

    Raises ValueError or TypeError that names the argument.
    """
    states: list[State] = []
    sampled: list[str] = []

    def meet(name: str, node: PCNode, mu: Tensor) -> Tensor:
        state = _state(name, node, mu, len(states), request)
        states.append(state)
        if name in program.outputs:
            return mu
        if node.fed == "sample" and not state.held:
            check_noise(name, mu, state.noise)
            sampled.append(name)
        return state.value.clone()  # the user may change it in place

    try:
        with torch.no_grad():
            names = program.walk(request.inputs, meet)
    except (RuntimeError, IndexError, TypeError) as error:
        refuse_input(request.inputs, error)
        raise
    request.check_names(names)
    request.check_noise(names, sampled)
    _take_targets(program, states, request.targets)
    for state in states:
        state.head = program.heads.get(state.name)
    return states


def _state(name: str, node: PCNode, mu: Tensor, index: int, request: Request) -> State:
    clamp, given = request.entry("clamp", index, name), request.entry("phis", index, name)
    mask, noise = request.entry("masks", index, name), request.noise
    mask = node.mask if mask is None else mask
    if not isinstance(noise, Tensor):
        noise = request.entry("noise", index, name)
    noise = noise if node.fed == "sample" else None
    check_clamp(name, clamp)
    check_given(name, node, mu, clamp, given, mask)
    if node.energy == "gaussian_diag" and node.log_var is None:
        fail(f"node {name!r}", "log_var", None, f"pass PCNode(..., log_var=torch.zeros({mu.shape[-1]}))")
    held = clamp is True
    phi = mu.clone() if given is None else given if held else given.clone()
    hold = clamp if isinstance(clamp, Tensor) else None
    return State(name, node, mu.clone(), phi, held, hold, mask, noise, given is not None)


def _take_targets(program: Program, states: list[State], targets: Any) -> None:
    """Clamp the outputs: those behind the module, or else the node reached last."""
    if targets is None:
        return
    ends = states[-max(len(program.outputs), 1) :]
    values = list_targets(targets, len(ends))
    for index, (state, target) in enumerate(zip(ends, values, strict=True)):
        if target is None:
            continue
        if state.held or state.hold is not None or state.given:
            fail("y", "None", "a tensor", f"the values of {state.name!r} are in phis and clamp already")
        state.phi, state.held = target, True
        state.target = "y" if len(ends) == 1 else f"y[{index}]"
