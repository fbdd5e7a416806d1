# SPDX-License-Identifier: MIT
"""The E-step on any module: T simultaneous moves of all free states, in two operator calls a step beside the module's.

One operator for the errors of all nodes (and their energies, where they are wanted), one for all moves. Nothing is read
back from the device inside the loop, except with `tol` every `CHECK_EVERY` moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as adam_step

import pc_kernels as pck
from pc_kernels import ops
from pc_runner.arguments import renamed
from pc_runner.distributions import Pair
from pc_runner.engine import Engine
from pc_runner.head import check_head, head_energy, head_errors
from pc_runner.moves import Moves
from pc_runner.prior import prior_energy, prior_errors
from pc_runner.walk import State

CHECK_EVERY = 8


class Errors(NamedTuple):
    """Energies (L, B), and dE/dphi, dE/dmu of all nodes; None where `Nodes.deltas` has left one out."""

    energy: Tensor | None
    grad_phi: list[Any]
    grad_mu: list[Any]


class Nodes:
    """The nodes of one inference as the operators of pc_kernels take them.

    `energies` goes through `pck.layer_energies` and with it through all checks. The loop then calls the operators that
    the public functions call: these look at values (class indices, masks), which would wait for the device every time.
    """

    def __init__(self, states: Sequence[State], seed: int = 0, precision: str = "fp32"):
        self.states, self.precision = list(states), precision
        self.seed = seed  # of the samples of Eq. 8
        self.families = [s.node.energy if isinstance(s.node.energy, str) else "" for s in states]
        self.log_vars = [s.node.log_var.detach() if s.node.log_var is not None else None for s in states]
        self.masks = [s.mask for s in states]
        self.heads = [l for l, s in enumerate(states) if s.head is not None]
        self.own = [l for l, s in enumerate(states) if not isinstance(s.node.energy, Pair) and s.head is None]
        self.pairs = [l for l, s in enumerate(states) if isinstance(s.node.energy, Pair)]
        self.free = [l for l, s in enumerate(states) if s.free]
        self.priors = [l for l in self.free if states[l].node.prior]
        self.rules = ["natural" if states[l].node.natural else "euclidean" for l in self.free]
        self.scales = [float(states[l].node.lr_scale) for l in self.free]
        self.whitened: list[int] = []  # of a Gaussian with variances: `update` takes its gradient times these

    def phis(self) -> list[Tensor]:
        return [state.phi for state in self.states]

    def errors(self, phis: Sequence[Tensor], mus: Sequence[Tensor]) -> Errors:
        """Energies and their gradients: one launch, another for each prior, autograd for pairs of
        torch.distributions."""
        found: Any = (None, [], [])
        if self.own:
            found = torch.ops.pc_kernels.layer_errors(*self._operands(phis, mus, self.own))
        if not self.pairs and not self.heads and not self.priors:
            return Errors(*found)
        return self._joined(phis, mus, self.own, *found, with_energy=True)

    def deltas(
        self, phis: Sequence[Tensor], mus: Sequence[Tensor], live: Sequence[bool] | None, with_energy: bool
    ) -> Errors:
        """What a plain move needs of `errors`: dE/dmu where it has a use (`live`; None: everywhere) and, on demand, the
        energies. dE/dphi is `update`'s own, except that of pairs."""
        at = self.own if with_energy or live is None else [l for l in self.own if live[l]]
        energy, grad_mu = ops.layer_deltas(*self._operands(phis, mus, at), with_energy) if at else (None, [])
        return self._joined(phis, mus, at, energy, [None] * len(at), grad_mu, with_energy)

    def _operands(self, phis: Sequence[Tensor], mus: Sequence[Tensor], at: Sequence[int]) -> tuple[Any, ...]:
        """Of the operators on the nodes `at`."""
        states = [self.states[l] for l in at]
        return (
            _at(phis, at), _at(mus, at), _at(self.families, at),
            [log_var for log_var in _at(self.log_vars, at) if log_var is not None],
            _at(self.masks, at), [s.hold for s in states], [s.held for s in states],
        )  # fmt: skip

    def _joined(
        self, phis: Sequence[Tensor], mus: Sequence[Tensor], at: Sequence[int], energy: Any, own_phi: Sequence[Any],
        own_mu: Sequence[Any], with_energy: bool,
    ) -> Errors:  # fmt: skip
        """One entry per node, from the operators' for the nodes `at`, and what pairs and heads add."""
        rows, by_phi, by_mu = ([None] * len(phis) for _ in range(3))
        out: tuple[list[Any], list[Any], list[Any]] = (rows, by_phi, by_mu)
        for place, l in enumerate(at):
            out[1][l], out[2][l] = own_phi[place], own_mu[place]
            if with_energy:
                out[0][l] = energy[place]
        for l in self.pairs:
            out[0][l], out[1][l], out[2][l] = pair_errors(self.states[l], phis[l], mus[l], self.seed + l)
        for l in self.heads:  # clamped: no gradient of phi
            out[0][l], out[2][l] = head_errors(self.states[l], mus[l], self.precision)
            out[1][l] = torch.zeros_like(mus[l])
        if not with_energy:  # nor any gradient of phi: `update` knows the priors
            return Errors(None, by_phi, by_mu)
        for l in self.priors:
            more, grad = prior_errors(self.states[l], phis[l])
            out[0][l] = out[0][l] + more
            out[1][l] = None if out[1][l] is None else out[1][l] + grad
        return Errors(energy if len(at) == len(phis) and not self.priors else torch.stack(out[0]), by_phi, by_mu)

    def energies(self, phis: Sequence[Tensor], mus: Sequence[Tensor], log_vars: Sequence[Any] | None = None) -> Tensor:
        """(L, B), differentiable with respect to phis, mus and log_vars. Checks everything."""
        rows = self._local_energies(phis, mus, log_vars)
        if not self.priors:
            return rows
        return torch.stack(
            [
                row + prior_energy(self.states[l], phis[l]) if l in self.priors else row
                for l, row in enumerate(rows.unbind())
            ]
        )

    def _local_energies(self, phis: Sequence[Tensor], mus: Sequence[Tensor], log_vars: Sequence[Any] | None) -> Tensor:
        rows: list[Any] = [None] * len(phis)
        if self.own:
            clamped = [True if s.held else s.hold for s in self.states]
            found = pck.layer_energies(
                _at(phis, self.own), _at(mus, self.own), _at(self.families, self.own),
                log_vars=_at(self.log_vars if log_vars is None else log_vars, self.own),
                masks=_at(self.masks, self.own), clamped=_at(clamped, self.own),
            )  # fmt: skip
            if not self.pairs and not self.heads:
                return found
            for place, l in enumerate(self.own):
                rows[l] = found[place]
        for l in self.pairs:
            state = self.states[l]
            rows[l] = state.node.energy.energy(phis[l], mus[l], state.held, self.seed + l)  # type: ignore[union-attr]
        for l in self.heads:
            rows[l] = head_energy(self.states[l], mus[l])
        return torch.stack(rows)

    def check(self) -> None:
        """Raise now, at the forward values, what the loop would raise; an output behind a linear layer is not run."""
        for l in self.heads:
            check_head(self.states[l], self.states[l].mu)
        rest = self if not self.heads else Nodes([state for state in self.states if state.head is None], self.seed)
        if not rest.states:
            return
        try:
            rest.energies(rest.phis(), [state.mu for state in rest.states])
        except (ValueError, TypeError) as error:
            own = [rest.states[l] for l in rest.own]
            targets = {f"phis[{place}]": state.target for place, state in enumerate(own) if state.target}
            raise renamed(error, [state.name for state in own], targets) from None

    def update(
        self, phis: Sequence[Tensor], mus: Sequence[Tensor], errors: Errors, feedback: Sequence[Tensor | None],
        moves: Moves, velocities: list[Tensor] | None = None, frozen: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Move every free node, in place, by one launch. frozen: (B,) bool, samples that have converged."""
        families, mus, back, log_vars = list(self.families), list(mus), list(feedback), list(self.log_vars)
        for l in self.pairs:  # a Gaussian at its own mean has no gradient of its own: what is passed is all there is
            if self.states[l].free:
                families[l], mus[l] = "gaussian", phis[l].clone()
                back[l] = errors.grad_phi[l] if back[l] is None else errors.grad_phi[l] + back[l]  # type: ignore[operator]
        for l in self.priors:  # the operator knows no prior; its gradient acts as feedback does
            grad = prior_errors(self.states[l], phis[l])[1]
            back[l] = grad if back[l] is None else grad + back[l]  # type: ignore[operator]
        for l in self.whitened:  # e^lv (e^-lv (phi - mu) + back)
            families[l], log_vars[l] = "gaussian", None
            back[l] = None if back[l] is None else self.log_vars[l].exp() * back[l]  # type: ignore[union-attr,operator]
        at = self.free
        speeds = [] if velocities is None else _at(velocities, at)
        holds = [s.hold for s in self.states] if frozen is None else self.freeze(frozen)
        if at:
            ops.update_phi_(
                _at(phis, at), _at(mus, at), _at(back, at), _at(families, at), self.rules, moves.lr, moves.momentum,
                speeds, self.scales, _at(log_vars, at), _at(self.masks, at), _at(holds, at),
            )  # fmt: skip

    def freeze(self, frozen: Tensor) -> list[Tensor]:
        """Per node what must not move: held entries, and the frozen samples."""
        rows = [frozen.view(-1, *[1] * (state.mu.ndim - 1)) for state in self.states]
        return [row if s.hold is None else row | s.hold for row, s in zip(rows, self.states, strict=True)]

    def euclidean(self, phis: Sequence[Tensor], errors: Errors, feedback: Sequence[Tensor | None]) -> list[Tensor]:
        """g = dE/dphi + feed'^T dF/dv of every free node, zero where it is held or masked."""
        found = []
        for l in self.free:
            state, back = self.states[l], feedback[l]
            if back is not None and state.node.natural:
                pull = torch.func.vjp(lambda phi, s=state: s.passes(phi, s.mask, s.noise), phis[l])[1]
                (back,) = pull(back)
            g = errors.grad_phi[l] if back is None else errors.grad_phi[l] + back
            still = _still(state, g)
            found.append(g if still is None else g.masked_fill(still, 0.0))
        return found


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[l] for l in places]


def _still(state: State, like: Tensor) -> Tensor | None:
    """True where an entry does not move."""
    parts = [part for part in (state.hold, None if state.mask is None else ~state.mask) if part is not None]
    return None if not parts else torch.stack([part.expand_as(like) for part in parts]).any(0)


def pair_errors(state: State, phi: Tensor, mu: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,), dE/dphi and dE/dmu of a pair of torch.distributions, by autograd."""
    with torch.enable_grad():
        mu = mu.detach().requires_grad_()
        leaf = phi if state.held else phi.detach().requires_grad_()
        energy = state.node.energy.energy(leaf, mu, state.held, seed)  # type: ignore[union-attr]
        leaves = [mu] if state.held else [mu, leaf]
        grads = torch.autograd.grad(energy.sum(), leaves)
    by_phi = torch.zeros_like(mu) if state.held else grads[1]
    if state.free and (still := _still(state, by_phi)) is not None:
        by_phi = by_phi.masked_fill(still, 0.0)
    return energy.detach(), by_phi, grads[0]


@dataclass
class Settled:
    """The end of an E-step: moves done, the trace (steps + 1, L) or None."""

    steps: int
    energy: Tensor | None
    products: tuple[int, int] | None = None  # set-up, one step

    @property
    def work(self) -> pck.WorkCount | None:
        """Products done, of a step that holds none that the states' gradients do not need.

        The lower bound is that of steps in which all nodes move: only chains use the light cone of the first ones.
        """
        if self.products is None:
            return None
        done = self.products[0] + self.products[1] * self.steps
        return pck.WorkCount(done, done)


@dataclass
class Run:
    """What a loop carries from move to move."""

    nodes: Nodes
    moves: Moves
    every: int = CHECK_EVERY
    rows: list[Tensor] = field(default_factory=list)
    active: Tensor | None = None  # (B,) with tol
    done: Tensor | None = None  # moves, on the device, with tol

    def note(self, errors: Errors) -> None:
        if self.moves.trace:
            assert errors.energy is not None  # asked for wherever there is a trace
            self.rows.append(errors.energy.mean(1))

    def still_active(self, step: int, gradients: Callable[[], list[Tensor]]) -> bool:
        """With tol: freeze samples whose gradient's norm is below it. False where all have been seen frozen, which is
        looked for every `every` moves."""
        if self.moves.tol is None:
            return True
        square = torch.stack([g.flatten(1).square().sum(1) for g in gradients()]).sum(0)
        below = square.sqrt() >= self.moves.tol
        self.active = below if self.active is None else self.active & below
        count = self.active.any().long()
        self.done = count if self.done is None else self.done + count
        return step % self.every != 0 or bool(self.active.any())


def settle(engine: Engine, nodes: Nodes, moves: Moves, learn: Callable[[], Any] | None = None) -> Settled:
    """phi <- phi - lr (dE/dphi + J^T dE/dmu), `moves.steps` times, all nodes at once; the states' phis in place.

    learn: the weights' step, taken after each of the states' (from gradients that `engine.feedback` left).
    Raises pck.InferenceDiverged for a non-finite state at the end.
    """
    phis, run = nodes.phis(), Run(nodes, moves, CHECK_EVERY if learn is None else 1)
    moving = [phis[l] for l in nodes.free]
    velocities = [torch.zeros_like(phi) for phi in phis] if moves.momentum else None
    adam = AdamState(moving) if moves.optimizer is not None else None
    plain = adam is None and moves.tol is None
    steps = moves.steps if moving else 0
    for step in range(steps):
        mus = engine.mus(moving)
        errors = nodes.deltas(phis, mus, engine.live, moves.trace) if plain else nodes.errors(phis, mus)
        run.note(errors)
        back = spread(engine.feedback(errors.grad_mu), nodes)
        if not run.still_active(step, lambda: nodes.euclidean(phis, errors, back)):  # noqa: B023 - called here
            break
        frozen = None if run.active is None else ~run.active
        if adam is None:
            nodes.update(phis, mus, errors, back, moves.at(step), velocities, frozen)
        else:
            adam.move(nodes, phis, mus, errors, back, moves.at(step), frozen)
        if learn is not None:
            learn()
    if moves.trace:
        run.note(Errors(nodes.energies(phis, engine.mus(moving)), [], []))
    done = steps if run.done is None else int(run.done)
    check_finite(nodes, run.rows)
    return Settled(done, finish_trace(run.rows, done, moves), engine.products)


def spread(feedback: Sequence[Tensor | None], nodes: Nodes) -> list[Tensor | None]:
    """One entry per node from one per free node."""
    spread: list[Tensor | None] = [None] * len(nodes.states)
    for l, back in zip(nodes.free, feedback, strict=True):
        spread[l] = back
    return spread


def finish_trace(rows: Sequence[Tensor], done: int, moves: Moves) -> Tensor | None:
    """(moves.steps + 1, L): the rows before each of the moves done, then the last, as often as nothing moved."""
    return torch.stack([*rows[:done], *[rows[-1]] * (moves.steps + 1 - done)]) if moves.trace else None


def check_finite(nodes: Nodes, rows: Sequence[Tensor]) -> None:
    """Raise InferenceDiverged for the first layer hit. The one read-back of an inference."""
    finite = [nodes.states[l].phi.isfinite().all() for l in nodes.free]
    if not finite or (finite[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    flags = torch.stack(finite).tolist()
    if all(flags):
        return
    layer = nodes.free[flags.index(False)] + 1
    steps = [t for t, row in enumerate(rows) if not bool(row.isfinite().all())]
    raise pck.InferenceDiverged(layer, steps[0] if steps else None)


class AdamState:
    """Moments of all free states, one fused call a move."""

    def __init__(self, moving: Sequence[Tensor]):
        self._mean = [torch.zeros_like(phi) for phi in moving]
        self._square = [torch.zeros_like(phi) for phi in moving]
        self._count = [torch.zeros((), dtype=torch.float32, device=phi.device) for phi in moving]

    def move(
        self, nodes: Nodes, phis: Sequence[Tensor], mus: Sequence[Tensor], errors: Errors,
        feedback: Sequence[Tensor | None], moves: Moves, frozen: Tensor | None,
    ) -> None:  # fmt: skip
        """phi <- phi - lr m / (sqrt(v) + eps), m and v the bias-corrected moments of the direction of `update_phi_`."""
        grads = nodes.euclidean(phis, errors, feedback)
        for place, l in enumerate(nodes.free):
            state = nodes.states[l]
            if state.node.natural:
                back = feedback[l]
                step = phis[l] - mus[l] if back is None else phis[l] - mus[l] + back
                still = _still(state, step)
                grads[place] = step if still is None else step.masked_fill(still, 0.0)
        moving = [phis[l] for l in nodes.free]
        before = None if frozen is None else [phi.clone() for phi in moving]
        self.step(nodes, moving, grads, moves)
        if "categorical_probs" in nodes.families:  # a move of length 0 brings probabilities back above their floor
            nodes.update(phis, mus, errors, feedback, replace(moves, lr=0.0))
        if before is not None and frozen is not None:
            for phi, old in zip(moving, before, strict=True):
                phi.copy_(torch.where(frozen.view(-1, *[1] * (phi.ndim - 1)), old, phi))

    def step(self, nodes: Nodes, moving: list[Tensor], grads: list[Tensor], moves: Moves) -> None:
        assert moves.optimizer is not None
        for scale in {nodes.states[l].node.lr_scale for l in nodes.free}:
            at = [i for i, l in enumerate(nodes.free) if nodes.states[l].node.lr_scale == scale]
            adam_step(
                [moving[i] for i in at], [grads[i].contiguous() for i in at], [self._mean[i] for i in at],
                [self._square[i] for i in at], [], [self._count[i] for i in at], fused=True, amsgrad=False,
                beta1=moves.optimizer.betas[0], beta2=moves.optimizer.betas[1], lr=moves.lr * scale,
                weight_decay=0.0, eps=moves.optimizer.eps, maximize=False,
            )  # fmt: skip
