# SPDX-License-Identifier: MIT
"""One step of an inference as straight-line code: traced once per shape, split by what depends on what.

    constants   what depends on weights, inputs and clamped nodes only: computed once per inference
    forward     what depends on the free states: mu of every node, once per step
    backward    vector-Jacobian products with dE/dmu, with respect to the states only: once per step

The trace is functional (no in-place operation survives), so a constant stays one however often the step is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pc_runner.contents import Contents
from pc_runner.node import PCNode
from pc_runner.walk import Program, State

_aten = torch.ops.aten
PRODUCTS: dict[Any, int] = {  # matrix products and convolutions in one call of an operator
    _aten.mm.default: 1,
    _aten.addmm.default: 1,
    _aten.bmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.convolution.default: 1,
    _aten._trilinear.default: 1,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
    _aten._scaled_dot_product_efficient_attention.default: 2,
    _aten._scaled_dot_product_efficient_attention_backward.default: 5,
    _aten._scaled_dot_product_flash_attention.default: 2,
    _aten._scaled_dot_product_flash_attention_backward.default: 5,
}
_COPIES = (_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten._reshape_alias.default)


class NotTraceable(RuntimeError):  # noqa: N818 - a property of the module, not a failure
    """Why this module's step has no straight-line form; `str()` says it in a line."""


@dataclass(frozen=True, eq=False)
class Step:
    """The traced step. `live[l]`: mu_l depends on a free state; `fed[i]`: free node i feeds something live.

    products: matrix products in (constants, forward, backward).
    """

    constants: Callable[..., Sequence[Tensor]]  # (*fixed) -> mus that are not live, then hoisted values
    forward: Callable[..., Sequence[Tensor]]  # (*free phis, *hoisted) -> live mus, then what backward needs
    backward: Callable[..., Sequence[Tensor]]  # (*dE/dmu of live nodes, *needed, *hoisted) -> feedback of fed nodes
    live: list[bool]
    fed: list[bool]
    products: tuple[int, int, int]


@dataclass(eq=False)
class Fixed:
    """All tensors that a step reads and that do not move: one flat list, and where its parts are."""

    module: Contents
    tensors: list[Tensor]  # of the module
    inputs: tuple[Any, ...]
    clamped: list[Tensor]  # phi of the held nodes
    extras: list[tuple[Tensor | None, Tensor | None]]  # mask and noise per node

    @classmethod
    def of(cls, program: Program, states: Sequence[State], inputs: tuple[Any, ...]) -> Fixed:
        found = program.contents()
        tensors = [tensor.detach() for tensor in found.tensors]
        clamped = [state.phi for state in states if state.held]
        return cls(found, tensors, inputs, clamped, [(state.mask, state.noise) for state in states])

    def flat(self) -> list[Tensor]:
        inputs = [value for value in pytree.tree_leaves(self.inputs) if isinstance(value, Tensor)]
        extras = [value for pair in self.extras for value in pair if value is not None]
        return [*self.tensors, *inputs, *self.clamped, *extras]

    def filled(self, values: Sequence[Tensor]) -> Fixed:
        """The same with other tensors, in `flat`'s order."""
        source = iter(values)
        tensors = [next(source) for _ in self.tensors]
        inputs = pytree.tree_map_only(Tensor, lambda _: next(source), self.inputs)
        clamped = [next(source) for _ in self.clamped]
        extras = [tuple(None if value is None else next(source) for value in pair) for pair in self.extras]
        return Fixed(self.module, tensors, inputs, clamped, extras)  # type: ignore[arg-type]

    def by_identity(self) -> dict[int, Tensor]:
        """These tensors by the identities of the module's own, for which they stand in a walk."""
        return {id(own): tensor for own, tensor in zip(self.module.tensors, self.tensors, strict=True)}


def trace_step(program: Program, states: Sequence[State], fixed: Fixed) -> Step:
    """Trace one step at these states. Raises NotTraceable where the module's code depends on values, or on chance."""
    free = [state for state in states if state.free]
    flat = fixed.flat()
    sizes = (len(flat), len(free), len(states))

    def step(*arguments: Tensor) -> list[Tensor]:
        own = fixed.filled(arguments[: sizes[0]])
        phis = arguments[sizes[0] : sizes[0] + sizes[1]]
        return _products(program, states, own, phis, arguments[sizes[0] + sizes[1] :])

    try:
        with torch.no_grad():
            example = [*flat, *(state.phi for state in free), *(torch.ones_like(state.mu) for state in states)]
            graph = make_fx(torch.func.functionalize(step))(*example).graph
    except Exception as error:
        raise NotTraceable(f"its code cannot be traced ({' '.join(str(error).split())[:120]})") from error
    chance = next((n for n in graph.nodes if _random(n)), None)
    if chance is not None:
        raise NotTraceable(f"it draws random numbers ({chance.target})")
    graph.eliminate_dead_code()
    return _split(graph, sizes)


def _products(
    program: Program, states: Sequence[State], fixed: Fixed, phis: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """mu of all nodes, then for each free node J^T dE/dmu, J = dmu/dphi, or dmu/dv where the step is natural."""
    places = {state.name: l for l, state in enumerate(states)}
    clamped = iter(fixed.clamped)
    held = {state.name: next(clamped) for state in states if state.held}
    free = [state for state in states if state.free]

    def value(state: State, phi: Tensor) -> Tensor:
        return state.passes(phi, *fixed.extras[places[state.name]])

    def predictions(*leaves: Tensor) -> list[Tensor]:
        leaf = {state.name: given for state, given in zip(free, leaves, strict=True)}
        mus: list[Tensor] = []

        def meet(name: str, node: PCNode, mu: Tensor) -> Tensor:
            mus.append(mu)
            state = states[places[name]]
            if name in program.outputs:
                return mu
            if state.held:
                return value(state, held[name])
            return leaf[name].clone() if node.natural else value(state, leaf[name]).clone()  # may be changed in place

        program.walk(fixed.inputs, meet, fixed.by_identity())
        return mus

    leaves = [
        value(state, phi) if state.node.natural and state.name not in program.outputs else phi
        for state, phi in zip(free, phis, strict=True)
    ]
    found = torch.func.vjp(predictions, *leaves)
    return [*found[0], *found[1](list(grads))]


def _random(node: fx.Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


# ---------------------------------------------------------------------------------------------- splitting the graph


def _split(graph: fx.Graph, sizes: tuple[int, int, int]) -> Step:
    places = [node for node in graph.nodes if node.op == "placeholder"]
    fixed, phis = places[: sizes[0]], places[sizes[0] : sizes[0] + sizes[1]]
    grads = places[sizes[0] + sizes[1] :]
    _drop_copies(graph)
    outputs = list(next(node for node in graph.nodes if node.op == "output").args[0])
    mus, feedback = outputs[: sizes[2]], outputs[sizes[2] :]
    moving, driven = _reached(graph, phis), _reached(graph, grads)
    live = [mu in moving for mu in mus]
    fed = [back in driven for back in feedback]
    forward_nodes = [node for node in graph.nodes if node in moving and node not in driven]
    needed = _read_by(driven, [n for n in forward_nodes if n not in phis]) + [p for p in phis if set(p.users) & driven]
    live_mus = [mu for mu, is_live in zip(mus, live, strict=True) if is_live]
    live_grads = [grad for grad, is_live in zip(grads, live, strict=True) if is_live]
    backs = [back for back, is_fed in zip(feedback, fed, strict=True) if is_fed]
    still = [n for n in graph.nodes if n not in moving and n not in driven and n.op != "output"]
    hoisted = _read_by(moving | driven, still)
    still_mus = [mu for mu, is_live in zip(mus, live, strict=True) if not is_live]
    parts = (
        _extract(graph, fixed, [*still_mus, *hoisted]),
        _extract(graph, [*phis, *hoisted], [*live_mus, *needed], fresh=live_mus),
        _extract(graph, [*live_grads, *needed, *hoisted], backs),
    )
    constants, forward, backward = (part.forward for part in parts)
    counts = tuple(sum(map(_count, part.graph.nodes)) for part in parts)
    return Step(constants, forward, backward, live, fed, counts)  # type: ignore[arg-type]


def _count(node: fx.Node) -> int:
    """Products of one operator; a backward convolution does one per gradient that its mask asks for."""
    if node.target is _aten.convolution_backward.default:
        return sum(node.args[10])  # type: ignore[arg-type]
    return PRODUCTS.get(node.target, 0)


def _drop_copies(graph: fx.Graph) -> None:
    """Nothing is changed in place here, so that a copy, as a detached or aliased tensor, is what it was made from."""
    for node in list(graph.nodes):
        copies = node.target in _COPIES and len(node.args) == 1 and not node.kwargs
        if copies or (node.target in _RESHAPES and _shape(node) is not None and _shape(node) == _shape(node.args[0])):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _shape(node: Any) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None


def _reached(graph: fx.Graph, roots: Sequence[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on one of the roots, these among them."""
    found = set(roots)
    for node in graph.nodes:
        if node.op != "output" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _read_by(readers: set[fx.Node], nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of the nodes that a reader uses. What an operator with several results gives is read by its items."""
    return [node for node in nodes if any(user in readers for user in node.users)]


def _extract(
    graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node], fresh: Sequence[fx.Node] = ()
) -> fx.GraphModule:
    """A module (*inputs) -> results. `fresh` results must not share memory with an input: those change in place."""
    part, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
    wanted = _needed_for(results, set(inputs))
    for node in graph.nodes:
        if node in wanted:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    owned = graph.owning_module
    out = []
    for node in results:
        copy = copies[node]
        shared = node in fresh and _base(node) in inputs
        out.append(part.call_function(_aten.clone.default, (copy,)) if shared else copy)
    part.output(tuple(out))
    return fx.GraphModule(owned if owned is not None else torch.nn.Module(), part)


def _needed_for(results: Sequence[fx.Node], inputs: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [node for node in results if node not in inputs]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [source for source in node.all_input_nodes if source not in inputs]
    return found


def _base(node: fx.Node) -> fx.Node:
    """What a chain of views looks at."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not any(entry.alias_info is not None for entry in schema.returns):
            return node
        node = node.all_input_nodes[0]
    return node
