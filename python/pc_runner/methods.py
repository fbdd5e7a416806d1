# SPDX-License-Identifier: MIT
"""The algorithms of `PCNetwork.infer` on any module with nodes: how states settle, and what is then learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pc_kernels.pc_math import PROBABILITY_FLOOR
from pc_runner.algorithms import NO_TARGET
from pc_runner.arguments import check_dtype
from pc_runner.capture import Captures, obstacle
from pc_runner.engine import Engine, Taped, Traced, Traces, pull, tape
from pc_runner.inference import Result
from pc_runner.moves import Moves
from pc_runner.node import PCNode, fail
from pc_runner.settle import AdamState, Errors, Nodes, Run, Settled, check_finite, finish_trace, settle
from pc_runner.tracing import Fixed, Step
from pc_runner.walk import Program, Request, State, draws, record, same_draws


class WeightSteps(Protocol):
    """What `ipc` asks of an optimiser: torch's, or one that several processes share."""

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


class Task(NamedTuple):
    """One call of `infer` on a module with nodes, after its forward pass."""

    owner: nn.Module
    program: Program
    inputs: tuple[Any, ...]
    nodes: Nodes
    rng: list[Tensor]  # generators at t = 0: every pass draws the same
    moves: Moves
    traces: Traces
    captures: Captures
    optimizer: WeightSteps | None

    @property
    def states(self) -> list[State]:
        return self.nodes.states

    @property
    def free_phis(self) -> list[Tensor]:
        return [state.phi for state in self.states if state.free]

    @property
    def batch(self) -> int:
        return max(self.states[0].mu.shape[0], 1)


def start(
    owner: nn.Module, program: Program, request: Request, moves: Moves, traces: Traces, captures: Captures,
    optimizer: Any = None,
) -> Task:  # fmt: skip
    """The forward pass, with everything checked. Raises ValueError or TypeError that names the argument."""
    rng = draws()
    states = record(program, request)
    if not states:
        fail("module", "at least one PCNode", "none", "put one in, or pass output=PCNode(...)")
    for state in states:
        check_dtype(state.name, state.mu)
    seed = int(rng[0][:8].view(torch.int64)[0]) % 2**31 if _samples(states) else 0
    nodes = Nodes(states, seed, moves.precision)
    nodes.check()
    return Task(owner, program, request.inputs, nodes, rng, moves, traces, captures, optimizer)


def _samples(states: Sequence[State]) -> bool:
    return any(not isinstance(state.node.energy, str) for state in states)


def make_engine(task: Task) -> Engine:
    """The traced step where the module's code can be traced, the tape elsewhere; `explain` says which and why."""
    found = find_step(task)
    if isinstance(found, Step):
        return Traced(found, Fixed.of(task.program, task.states, task.inputs))
    return Taped(task.program, task.states, task.inputs, task.rng)


def find_step(task: Task) -> Any:
    """The traced `Step`, or `NotTraceable`."""
    return task.traces.find(task.program, task.states, Fixed.of(task.program, task.states, task.inputs))


def infer_pc(task: Task) -> Result:
    """T simultaneous gradient moves of all free phi on F = sum_l E_l."""
    with torch.no_grad():
        engine = make_engine(task)
        if isinstance(engine, Traced) and obstacle(engine.kind, task.nodes, task.moves) is None:
            settled = task.captures.settle(engine, task.nodes, task.moves)
        else:
            settled = settle(engine, task.nodes, task.moves)
    return _result(task, "pc", settled, engine.kind, lambda: loss_here(task))


def _result(task: Task, algorithm: str, settled: Settled, backend: str, learn: Callable[[], Tensor]) -> Result:
    phis = [state.phi for state in task.states]
    return Result(
        phis, settled.energy, algorithm, task.owner, path=backend, settled=settled, learn=learn,
        names=[state.name for state in task.states],
    )  # fmt: skip


def loss_here(task: Task) -> Tensor:
    """F / B at the present phis, as a function of the parameters: one recorded pass."""
    task.program.contents(again=True)
    _, mus = tape(task.program, task.states, task.inputs, task.free_phis, task.rng)
    return loss_of(task, mus)


def loss_of(task: Task, mus: Sequence[Tensor]) -> Tensor:
    """sum_l E_l(phi_l, mu_l) / B, phi fixed, a function of the parameters through the tape that ends in mus."""
    with torch.enable_grad():
        log_vars = [state.node.log_var for state in task.states]
        phis = [phi.detach() for phi in task.nodes.phis()]
        return task.nodes.energies(phis, mus, log_vars).sum() / task.batch


# ------------------------------------------------------------------------------------- from the forward linearisation


def infer_fixed_prediction(task: Task) -> Result:
    """mu, act', feed' and v stay at their forward values; phi moves to equilibrium (Millidge et al. 2022).

    A "gaussian_diag" node, unless its step is "euclidean", moves by the gradient times its variances: lr 1 takes every
    Gaussian node to its equilibrium at once.
    """
    _forward_start(task, "fixed_prediction")
    nodes = task.nodes
    nodes.whitened = [
        l for l in nodes.free if nodes.families[l] == "gaussian_diag" and nodes.states[l].node.step is None
    ]
    leaves, mus = tape(task.program, task.states, task.inputs, task.free_phis, task.rng)
    fixed = [mu.detach() for mu in mus]

    class Forward:
        kind = "taped"
        products: tuple[int, int] | None = None
        live: Sequence[bool] | None = None

        def mus(self, phis: Sequence[Tensor]) -> list[Tensor]:
            return fixed

        def feedback(self, grad_mus: Sequence[Any]) -> list[Tensor | None]:
            return pull(mus, leaves, grad_mus, keep=True)

    with torch.no_grad():
        settled = settle(Forward(), nodes, task.moves)
    return _result(task, "fixed_prediction", settled, "taped", lambda: loss_of(task, mus))


def _forward_start(task: Task, algorithm: str) -> None:
    for state in task.states:
        if state.node.prior and algorithm != "bp":
            fail(f"node {state.name!r}", f"prior=0 with algorithm={algorithm!r}", state.node.prior, "use 'pc' or 'bp'")
        if state.given and state.free:
            fail("phis", f"None with algorithm={algorithm!r}", state.name, "it starts at the forward values")
        if state.hold is not None:
            fail("clamp", f"None or True with algorithm={algorithm!r}", state.name, "use algorithm='pc'")


def infer_zil(task: Task) -> Result:
    """Z-IL (Song et al. 2020; in a DAG, Salvatori et al. 2022): each node moves once, with lr 1, when all nodes that
    it feeds have their errors; those are taken while everything that they are predicted from is still at its forward
    value. One backward pass's worth of products."""
    _forward_start(task, "zil")
    nodes, moves = task.nodes, replace(task.moves, lr=1.0, momentum=0.0, optimizer=None)
    leaves, mus = tape(task.program, task.states, task.inputs, task.free_phis, task.rng)
    leaf_of = dict(zip(nodes.free, leaves, strict=True))
    back: list[Tensor | None] = [None] * len(mus)
    distance = [0] * len(mus)
    with torch.no_grad():
        phis, still = nodes.phis(), [mu.detach() for mu in mus]
        rows = [nodes.energies(phis, still).mean(1)] if moves.trace else []
        for l in reversed(range(len(mus))):  # the order of the calls is a topological one
            one, phi, mu = Nodes([task.states[l]], nodes.seed + l), [phis[l]], [still[l]]
            if l in leaf_of and back[l] is not None:
                one.update(phi, mu, one.errors(phi, mu), [back[l]], moves)
            _send(l, mus[l], one.errors(phi, mu).grad_mu[0], leaf_of, back, distance)
        if moves.trace:
            rows.append(nodes.energies(phis, still).mean(1))
    check_finite(nodes, rows)
    done = max(distance)
    energy = torch.stack(rows) if moves.trace else None
    return _result(task, "zil", Settled(done, energy), "taped", lambda: loss_of(task, mus))


def _send(
    l: int, mu: Tensor, grad: Tensor, leaf_of: dict[int, Tensor], back: list[Tensor | None], distance: list[int]
) -> None:
    """Node l's error to all nodes that it is predicted from."""
    below = [k for k in leaf_of if k < l]
    if not below or not mu.requires_grad:
        return
    found = torch.autograd.grad(mu, [leaf_of[k] for k in below], grad, allow_unused=True, retain_graph=True)
    for k, message in zip(below, found, strict=True):
        if message is not None:
            back[k] = message if back[k] is None else back[k] + message  # type: ignore[operator]
            distance[k] = max(distance[k], distance[l] + 1)


def infer_bp(task: Task) -> Result:
    """Backpropagation's half of an inference: the forward pass and the batch mean of F at it, that is of the outputs'
    energies and of the priors at phi = mu."""
    _forward_start(task, "bp")
    kept = {state.name: state for state in task.states}
    held = [state.name for state in task.states if state.held]
    inner = [name for name in held if name in task.program.inner and name != task.states[-1].name]
    if inner:
        fail("clamp", "None for hidden nodes with algorithm='bp'", inner[0], "it holds no states; use algorithm='pc'")
    mus: list[Tensor] = []

    def meet(name: str, node: PCNode, mu: Tensor) -> Tensor:
        mus.append(mu)
        return mu if name in task.program.outputs else node.value(mu, kept[name].mask, kept[name].noise)

    with torch.enable_grad(), same_draws(task.rng):
        task.program.walk(task.inputs, meet)
        phis = [s.phi if s.held else mu.detach() for s, mu in zip(task.states, mus, strict=True)]
        targets = [l for l, state in enumerate(task.states) if state.held]
        ends = sorted([*targets, *task.nodes.priors]) if targets else []
        outputs = Nodes([task.states[l] for l in ends])
        log_vars = [state.node.log_var for state in outputs.states]
        reached = [phis[l] if task.states[l].held else mus[l] for l in ends]
        rows = outputs.energies(reached, [mus[l] for l in ends], log_vars) if ends else None
        loss = None if rows is None else rows.sum() / task.batch
    energy = mus[0].new_zeros(len(mus), dtype=None if rows is None else rows.dtype).detach()
    if rows is not None:
        energy[ends] = rows.detach().mean(1)
    settled = Settled(0, energy.unsqueeze(0) if task.moves.trace else None)

    def learn() -> Tensor:
        if loss is None:
            raise ValueError(NO_TARGET)
        return loss

    return replace(_result(task, "bp", settled, "autograd", learn), loss=loss)


# ------------------------------------------------------------------------------------------ weights or errors that move


def infer_ipc(task: Task) -> Result:
    """Incremental PC (Salvatori et al. 2023): at every t all phi, and all weights by `optimizer`, step at once.

    The weights' gradient is that of F averaged over the batch; both steps start from the same point. With tol, they end
    when every sample is frozen.
    """
    nodes, optimizer = task.nodes, task.optimizer
    assert optimizer is not None  # check_optimizer has raised
    if task.moves.tol is not None and getattr(optimizer, "shared", False):
        remedy = "each process would stop after another move"
        fail("tol", "None where processes share the optimiser", task.moves.tol, remedy)

    class Learning(Taped):
        def feedback(self, grad_mus: Sequence[Any]) -> list[Tensor | None]:
            found = pull(self._mus, self._leaves, grad_mus, keep=True)
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = loss_of(task, self._mus)
                if loss.requires_grad:
                    loss.backward()
            return found

    def step() -> None:
        with torch.enable_grad():
            optimizer.step()

    engine = Learning(task.program, task.states, task.inputs, task.rng)
    with torch.no_grad():
        settled = settle(engine, nodes, task.moves, step)

    def learn() -> Tensor:
        raise ValueError("result: wanted one of another algorithm, got 'ipc': its weights have moved during infer")

    return _result(task, "ipc", settled, "taped", learn)


def infer_epc(task: Task) -> Result:
    """Error optimisation (Goemaere et al. 2025): e_l moves, s_l = mu_l(s) + e_l, by backpropagation through all s."""
    nodes, moves = task.nodes, task.moves
    errors_now = [(s.phi - s.mu).detach() for s in task.states if s.free]
    speeds = [torch.zeros_like(e) for e in errors_now] if moves.momentum else None
    adam = AdamState(errors_now) if moves.optimizer is not None else None
    run, done = Run(nodes, moves), moves.steps
    for step in range(moves.steps):
        found, grads = _error_pass(task, errors_now)
        run.note(found)
        if not run.still_active(step, lambda: grads):  # noqa: B023 - called here
            break
        _move_errors(nodes, errors_now, grads, moves.at(step), speeds, adam, run.active)
    found, _ = _error_pass(task, errors_now)
    run.note(found)
    check_finite(nodes, run.rows)
    done = done if run.done is None else int(run.done)
    settled = Settled(done, finish_trace(run.rows, done, moves))
    return _result(task, "epc", settled, "taped", lambda: loss_here(task))


def _error_pass(task: Task, errors_now: Sequence[Tensor]) -> tuple[Errors, list[Tensor]]:
    """Energies at s = mu + e, and dF/de through everything; the states' phis become s."""
    nodes, free = task.nodes, iter(errors_now)
    kept = {state.name: state for state in task.states}
    leaves: list[Tensor] = []
    mus: list[Tensor] = []
    phis: list[Tensor] = []

    def meet(name: str, node: PCNode, mu: Tensor) -> Tensor:
        state = kept[name]
        mus.append(mu)
        phi = state.phi
        if state.free:
            leaf, phi = _moved(state, mu, next(free))
            leaves.append(leaf)
            phi = phi if state.hold is None else torch.where(state.hold, state.phi, phi)
        phis.append(phi)
        return mu if name in task.program.outputs else state.passes(phi, state.mask, state.noise)

    with torch.enable_grad(), same_draws(task.rng):
        task.program.walk(task.inputs, meet)
    with torch.no_grad():
        found = nodes.errors([phi.detach() for phi in phis], [mu.detach() for mu in mus])
    outputs = [(p, g) for p, g in zip([*phis, *mus], [*found.grad_phi, *found.grad_mu], strict=True) if p.requires_grad]
    ends, weights = zip(*outputs, strict=True) if outputs and leaves else ((), ())
    grads = list(torch.autograd.grad(ends, leaves, weights)) if leaves else []
    for state, phi in zip(task.states, phis, strict=True):
        if state.free:
            state.phi.copy_(phi.detach())
    return found, grads


def _moved(state: State, mu: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """e as a leaf, and s = mu + e. Probabilities stay above their floor: e is raised, in place, to where s is there."""
    leaf = error.detach().requires_grad_()
    if state.node.energy != "categorical_probs":
        return leaf, mu + leaf
    least = torch.full_like(mu, PROBABILITY_FLOOR)
    if state.mask is not None:
        least = least.masked_fill(~state.mask, -torch.inf)
    lowest = least - mu.detach()
    low = error <= lowest
    error.copy_(torch.maximum(error, lowest))
    s = mu + leaf
    return leaf, s - s.detach() + torch.where(low, least, s.detach())  # the gradient is that of mu + e there, too


@torch.no_grad()
def _move_errors(
    nodes: Nodes, errors_now: list[Tensor], grads: list[Tensor], moves: Moves, speeds: list[Tensor] | None,
    adam: AdamState | None, active: Tensor | None,
) -> None:  # fmt: skip
    """e <- e - lr u, u <- m u + g, all nodes at once; a frozen sample's g and u are 0."""
    if active is not None:
        going = [active.view(-1, *[1] * (g.ndim - 1)).to(g.dtype) for g in grads]
        for values in (grads,) if speeds is None else (grads, speeds):
            torch._foreach_mul_(values, going)  # type: ignore[attr-defined]
    if adam is not None:
        adam.step(nodes, errors_now, grads, moves)
        return
    if speeds is not None:
        torch._foreach_mul_(speeds, moves.momentum)  # type: ignore[attr-defined]
        torch._foreach_add_(speeds, grads)  # type: ignore[attr-defined]
        grads = speeds
    scales = [moves.lr * nodes.states[l].node.lr_scale for l in nodes.free]
    torch._foreach_sub_(errors_now, torch._foreach_mul(grads, scales))  # type: ignore[attr-defined]


METHODS: dict[str, Callable[[Task], Result]] = {
    "pc": infer_pc,
    "ipc": infer_ipc,
    "fixed_prediction": infer_fixed_prediction,
    "zil": infer_zil,
    "epc": infer_epc,
    "bp": infer_bp,
}
UNIT_LR = ("zil", "fixed_prediction")  # algorithms whose lr is 1 unless given
KEEPS_TAPE = ("zil", "fixed_prediction", "bp")  # algorithms whose results learn from the tape of their forward pass
