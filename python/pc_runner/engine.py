# SPDX-License-Identifier: MIT
"""What one step of an inference asks of a module: mu of all nodes, then J^T dE/dmu. Traced once, or taped each time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.modules.module as global_hooks
import torch.utils._pytree as pytree
from torch import Tensor

from pc_runner.chains import ModuleChain, find_chain
from pc_runner.contents import Looks, form
from pc_runner.node import PCNode
from pc_runner.reading import Same
from pc_runner.tracing import Fixed, NotTraceable, Step, trace_step
from pc_runner.walk import Program, State, same_draws


class Engine(Protocol):
    """One inference's module work; `products` of (set-up, one step), None where they were not counted.

    live: per node, whether `feedback` reads its dE/dmu; None: all are read.
    """

    kind: str
    products: tuple[int, int] | None
    live: Sequence[bool] | None

    def mus(self, phis: Sequence[Tensor]) -> list[Tensor]:
        """mu of all nodes at the free nodes' phis."""
        ...

    def feedback(self, grad_mus: Sequence[Any]) -> list[Tensor | None]:
        """For each free node (d mu / d phi)^T dE/dmu at the last `mus`; with respect to v where the step is natural."""
        ...


class Traced:
    """The straight-line step of tracing.py; what depends on nothing that moves was computed here, once."""

    kind = "traced"

    def __init__(self, step: Step, fixed: Fixed):
        self.step = step
        self.live: Sequence[bool] | None = step.live
        self._live = [l for l, live in enumerate(step.live) if live]
        values = list(step.constants(*fixed.flat()))
        still = [l for l, live in enumerate(step.live) if not live]
        self._all: list[Any] = [None] * len(step.live)
        for l in still:
            self._all[l] = values[still.index(l)]
        self.hoisted = values[len(still) :]
        self.products: tuple[int, int] | None = (step.products[0], step.products[1] + step.products[2])

    def static(self) -> Traced:
        """A twin whose constants have memory of their own, for a CUDA graph to read."""
        twin = copy.copy(self)
        twin.hoisted = [value.clone() for value in self.hoisted]
        twin._all = [None if value is None else value.clone() for value in self._all]
        return twin

    def take(self, other: Traced) -> None:
        """Another inference's constants, into this one's memory."""
        mine = [*self.hoisted, *(self._all[l] for l, live in enumerate(self.step.live) if not live)]
        theirs = [*other.hoisted, *(other._all[l] for l, live in enumerate(other.step.live) if not live)]
        for value, new in zip(mine, theirs, strict=True):
            value.copy_(new)

    def mus(self, phis: Sequence[Tensor]) -> list[Tensor]:
        found = self.step.forward(*phis, *self.hoisted)
        for l, mu in zip(self._live, found, strict=False):
            self._all[l] = mu
        self._needed = found[len(self._live) :]
        return list(self._all)

    def feedback(self, grad_mus: Sequence[Any]) -> list[Tensor | None]:
        found = iter(self.step.backward(*(grad_mus[l] for l in self._live), *self._needed, *self.hoisted))
        return [next(found) if fed else None for fed in self.step.fed]


class Taped:
    """Autograd's tape, anew at every step: for modules whose code cannot be traced, or that draw random numbers."""

    kind = "taped"
    products: tuple[int, int] | None = None
    live: Sequence[bool] | None = None

    def __init__(self, program: Program, states: Sequence[State], inputs: tuple[Any, ...], rng: Sequence[Tensor]):
        self._program, self._states, self._inputs, self._rng = program, states, inputs, rng

    def mus(self, phis: Sequence[Tensor]) -> list[Tensor]:
        self._leaves, self._mus = tape(self._program, self._states, self._inputs, phis, self._rng)
        return [mu.detach() for mu in self._mus]

    def feedback(self, grad_mus: Sequence[Any]) -> list[Tensor | None]:
        return pull(self._mus, self._leaves, grad_mus)


def tape(
    program: Program, states: Sequence[State], inputs: tuple[Any, ...], phis: Sequence[Tensor], rng: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """One recorded pass: the leaves (phi of each free node, v where the step is natural), and mu of all nodes."""
    free = iter(phis)
    now = {state.name: next(free) if state.free else state.phi for state in states}
    kept = {state.name: state for state in states}
    leaves: dict[str, Tensor] = {}
    mus: list[Tensor] = []

    def meet(name: str, node: PCNode, mu: Tensor) -> Tensor:
        state, phi = kept[name], now[name]
        mus.append(mu)
        if state.held:
            return mu if name in program.outputs else state.value.clone()
        leaf = phi.detach()
        if node.natural and name not in program.outputs:
            leaf = state.passes(leaf, state.mask, state.noise)
        leaves[name] = leaf.requires_grad_()
        if name in program.outputs:
            return mu
        return (leaf if node.natural else state.passes(leaf, state.mask, state.noise)).clone()

    with torch.enable_grad(), same_draws(rng):
        program.walk(inputs, meet)
    return [leaves[state.name] for state in states if state.free], mus


def pull(
    mus: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor], keep: bool = False
) -> list[Tensor | None]:
    """J^T grads with respect to each leaf; None where nothing depends on it."""
    taped = [(mu, grad) for mu, grad in zip(mus, grads, strict=True) if mu.requires_grad]
    if not taped or not leaves:
        return [None] * len(leaves)
    outputs, weights = zip(*taped, strict=True)
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True, retain_graph=keep))


class Traces:
    """The traced steps of one network, by everything that their code depends on."""

    limit = 16  # shapes in use at a time; tracing one takes a tenth of a second, keeping it some memory

    def __init__(self) -> None:
        self._steps: dict[Any, Step | NotTraceable] = {}
        self._chain: tuple[Any, ModuleChain] | None = None
        self.looks = Looks()

    def chain(self, program: Program) -> ModuleChain:
        """`find_chain`, again only when the module has changed."""
        key = program.contents().key, tuple(map(Same, program.module.modules())), _modes()
        if self._chain is None or self._chain[0] != key:
            self._chain = key, find_chain(program)
        return self._chain[1]

    def find(self, program: Program, states: Sequence[State], fixed: Fixed) -> Step | NotTraceable:
        """The step, or why there is none."""
        leaves, spec = pytree.tree_flatten(fixed.inputs)
        inputs = fixed.module.of_inputs(value for value in leaves if not isinstance(value, Tensor))
        if inputs.foreign or inputs.tensors or inputs.objects:
            return NotTraceable("an input is an object whose inside is not known")
        if fixed.module.aliased:
            return NotTraceable("tensors of the module share memory")
        key = inputs.key, spec, _key(states, fixed)
        if key not in self._steps:
            if len(self._steps) >= self.limit:
                self._steps.pop(next(iter(self._steps)))
            try:
                self._steps[key] = trace_step(program, states, fixed)
            except NotTraceable as reason:
                self._steps[key] = reason
        return self._steps[key]

    def __deepcopy__(self, memo: Any) -> Traces:
        return Traces()  # traced code is made again when it is needed

    def __reduce__(self) -> Any:
        return Traces, ()


def _key(states: Sequence[State], fixed: Fixed) -> Any:
    """Shapes, and all that forward reads: they decide what a pass does."""
    nodes = tuple(
        (s.name, s.free, repr(s.node.energy), s.node.fed, s.node.natural, s.mask is None, s.noise is None, s.head)
        for s in states
    )  # fmt: skip
    free = tuple(form(state.phi) for state in states)
    return nodes, free, tuple(map(form, fixed.flat())), fixed.module.key, _modes()


def _modes() -> tuple[Any, ...]:
    """What torch itself is set to that code depends on."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", *(("cuda",) if torch.cuda.is_initialized() else ()))
    ]
    hooks = [*global_hooks._global_forward_pre_hooks.values(), *global_hooks._global_forward_hooks.values()]
    return torch.get_default_dtype(), *autocast, *map(Same, hooks)
