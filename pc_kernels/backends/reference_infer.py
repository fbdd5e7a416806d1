# SPDX-License-Identifier: MIT
"""The T inference steps of a chain in plain torch: the README's section 1 with the exact savings of section 3, any
dtype and
device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc_kernels.dispatch import BACKENDS
from pc_kernels.node_math import feed_value, feed_vjp, movable, node_delta, node_energy
from pc_kernels.pc_math import ACTIVATION_TABLE, ENERGY_TABLE
from pc_kernels.schedule import Cone, Move, sources


def round_tf32(x: Tensor) -> Tensor:
    """To the 10 mantissa bits that tensor cores read, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def round_bf16(x: Tensor) -> Tensor:
    """To bfloat16 and back."""
    return x.bfloat16().float()


class Products:
    """The matrix products of one inference: operands rounded as `precision` says, accumulated in the working dtype,
    counted."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], precision: str):
        rounding = {"tf32": round_tf32, "bf16": round_bf16, "bf16_delta": round_bf16}.get(precision)
        self._round = rounding or (lambda x: x)
        self._weights, self._biases = weights, biases
        self._rounded = [self._round(w) for w in weights]
        self.in_differences = precision == "bf16_delta"
        self.count = 0

    def first(self, l: int, v: Tensor) -> Tensor:
        """a_l = W_l v + b_l at the start; exact in `bf16_delta`."""
        self.count += 1
        exact = self.in_differences
        v, weight = (v, self._weights[l]) if exact else (self._round(v), self._rounded[l])
        return torch.nn.functional.linear(v, weight, self._biases[l])

    def again(self, l: int, v: Tensor, previous: Tensor, a: Tensor) -> Tensor:
        """a_l after v has changed."""
        if not self.in_differences:
            return self.first(l, v)
        self.count += 1
        return a + self._round(v - previous) @ self._rounded[l].T

    def backward(self, l: int, delta: Tensor) -> Tensor:
        """W_l^T delta_l, the feedback to the node below."""
        self.count += 1
        return self._round(delta) @ self._rounded[l]


class Arguments(NamedTuple):
    """The op's arguments by name (its schema stands in library.py)."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[str]
    energies: list[str]
    feeds: list[str]
    rules: list[str]
    lr_scales: list[float]
    log_vars: list[Tensor | None]
    phis: list[Tensor | None]
    masks: list[Tensor | None]
    holds: list[Tensor | None]
    noise: list[Tensor | None]
    clamped: list[bool]
    priors: list[float]
    steps: int
    lr: float
    momentum: float
    tol: float
    precision: str
    trace: bool


class Chain:
    """The state of one inference. Lists have one entry per node; entry l is node l + 1."""

    def __init__(self, args: Arguments):
        self.families = [ENERGY_TABLE[name] for name in args.energies]
        self.activations, self.feeds, self.rules, self.lr_scales = (
            args.activations,
            args.feeds,
            args.rules,
            args.lr_scales,
        )
        self.log_vars, self.masks, self.noise, self.clamped = args.log_vars, args.masks, args.noise, args.clamped
        self.priors = [0.0 if held else prior for prior, held in zip(args.priors, args.clamped, strict=True)]
        self.movable = [movable(mask, hold) for mask, hold in zip(args.masks, args.holds, strict=True)]
        self.products = Products(args.weights, args.biases, args.precision)
        self.size = len(args.weights)
        self.cone = Cone(*sources(args.energies, args.clamped, [phi is not None for phi in args.phis], args.priors))
        self._start(args.x, args.phis)

    def _start(self, x: Tensor, phis: Sequence[Tensor | None]) -> None:
        """Forward initialisation of every node whose state is not given, and all errors at it."""
        n = self.size
        self.a: list[Tensor] = []
        self.mu: list[Tensor] = []
        self.phi: list[Tensor] = []
        self.v: list[Tensor] = []
        v = x
        for l in range(n):
            self.a.append(self.products.first(l, v))
            self.mu.append(ACTIVATION_TABLE[self.activations[l]].value(self.a[l]))
            given = phis[l]
            phi = self.mu[l] if given is None else given
            self.phi.append(phi if self.clamped[l] else self.families[l].project(phi))
            v = self._feed(l)
            self.v.append(v)
        self.velocity: list[Tensor | None] = [None] * n
        self.delta = [self._delta(l) for l in range(n)]

    def _feed(self, l: int) -> Tensor:
        """What node l passes on; a clamped node its target, where that is what the node's feed would give (the README's
        section 1)."""
        if l == self.size - 1 or (self.clamped[l] and not self.families[l].target_is_state):
            return self.phi[l]
        return feed_value(self.feeds[l], self.phi[l], self.noise[l], self.softmax_mask(l))

    def softmax_mask(self, l: int) -> Tensor | None:
        """A categorical node's hidden classes are left out of the softmax that it feeds on, too."""
        return self.masks[l] if self.families[l].name == "categorical" else None

    def _delta(self, l: int) -> Tensor:
        phi, a, mu = self.phi[l], self.a[l], self.mu[l]
        held, mask, log_var = self.clamped[l], self.masks[l], self.log_vars[l]
        return node_delta(self.families[l], self.activations[l], phi, a, mu, log_var=log_var, mask=mask, clamped=held)

    def energies(self) -> Tensor:
        """(L, B)."""
        return torch.stack([self._energy(l) for l in range(self.size)])

    def _energy(self, l: int) -> Tensor:
        family, phi, mask = self.families[l], self.phi[l], self.masks[l]
        energy = node_energy(family, phi, self.mu[l], self.log_vars[l], mask, self.clamped[l])
        prior = self.priors[l]  # the family's energy at mu = 0
        return energy + prior * node_energy(family, phi, torch.zeros_like(phi), None, mask, False) if prior else energy

    def directions(self, move: Move) -> list[Tensor | None]:
        """What each moving node steps along: the Euclidean gradient g, or the natural one."""
        return [self._direction(l, move) if move.moves[l] else None for l in range(self.size)]

    def _direction(self, l: int, move: Move) -> Tensor:
        phi, mu, family = self.phi[l], self.mu[l], self.families[l]
        natural = self.rules[l] == "natural"
        step = phi - mu if natural else family.grad_phi(phi, mu, self.log_vars[l], self.masks[l])
        if self.priors[l]:
            step = step + self.priors[l] * family.grad_phi(phi, torch.zeros_like(phi), None, self.masks[l])
        if move.feedback[l]:
            back = self.products.backward(l + 1, self.delta[l + 1])
            step = step + (back if natural else feed_vjp(self.feeds[l], phi, self.v[l], back, self.noise[l]))
        moves = self.movable[l]
        return step if moves is None else torch.where(moves, step, 0.0)

    def norm(self, directions: Sequence[Tensor | None]) -> Tensor:
        """Per sample, the Euclidean norm of the free nodes' gradient g (also where the step is the natural one)."""
        total = self.a[0].new_zeros(self.a[0].shape[0])
        for l, step in enumerate(directions):
            if step is None:
                continue
            if self.rules[l] == "natural":
                step = self._euclidean(l, step)
            total = total + step.square().sum(1)
        return total.sqrt()

    def _euclidean(self, l: int, natural: Tensor) -> Tensor:
        step = self.families[l].fisher(self.phi[l], natural, self.masks[l])
        moves = self.movable[l]
        return step if moves is None else torch.where(moves, step, 0.0)

    def step(self, directions: Sequence[Tensor | None], lr: float, momentum: float, frozen: Tensor | None) -> None:
        """u <- m u + g; phi <- phi - lr u, for all moving nodes and the samples that are not frozen."""
        for l, step in enumerate(directions):
            if step is None:
                continue
            if momentum:
                previous = self.velocity[l]
                step = self.velocity[l] = step if previous is None else momentum * previous + step
            moved = self.families[l].project(torch.sub(self.phi[l], step, alpha=lr * self.lr_scales[l]))
            moves = self.movable[l]
            if frozen is not None:
                moves = ~frozen[:, None] if moves is None else moves & ~frozen[:, None]
            self.phi[l] = moved if moves is None else torch.where(moves, moved, self.phi[l])

    def refresh(self, move: Move) -> None:
        """Predictions above the nodes that moved, then the deltas that depend on them."""
        for l in range(self.size - 1):
            if move.moves[l]:
                previous, self.v[l] = self.v[l], self._feed(l)
                self.a[l + 1] = self.products.again(l + 1, self.v[l], previous, self.a[l + 1])
                self.mu[l + 1] = ACTIVATION_TABLE[self.activations[l + 1]].value(self.a[l + 1])
        for l in range(self.size):
            if move.refresh[l]:
                self.delta[l] = self._delta(l)


class Divergence:
    """Which node became non-finite first, and at which move; kept on the device."""

    def __init__(self, device: torch.device):
        self._found = torch.zeros(2, dtype=torch.int64, device=device)
        self._found[1] = -1

    def look(self, chain: Chain, step: int) -> None:
        """Record the first hit, unless there is one already. step -1: not known."""
        broken = torch.stack(
            [
                torch.zeros((), dtype=torch.bool, device=self._found.device) if held else ~torch.isfinite(phi).all()
                for phi, held in zip(chain.phi, chain.clamped, strict=True)
            ]
        )
        layer = torch.where(broken.any(), broken.to(torch.int64).argmax() + 1, 0)
        now = torch.stack([layer, torch.full_like(layer, step)])
        self._found = torch.where((self._found[0] == 0) & (layer > 0), now, self._found)

    def status(self, steps: int, products: int) -> Tensor:
        counts = torch.tensor([steps, products, BACKENDS.index("reference")], device=self._found.device)
        return torch.cat([counts, self._found])


def infer(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The op `pc_kernels::infer`: (phis, deltas, trace, status); a clamped node's phi comes back empty."""
    args = Arguments(*arguments)
    chain, divergence = Chain(args), Divergence(args.x.device)
    rows = args.x.new_zeros(args.steps + 1 if args.trace else 0, chain.size)

    def record(step: int) -> None:
        rows[step:] = chain.energies().sum(1) / max(args.x.shape[0], 1)  # rows after the last move repeat it
        divergence.look(chain, step)

    if args.trace:
        record(0)
    done = _moves(chain, args, record if args.trace else None)
    if not args.trace:
        divergence.look(chain, -1)
    phis = [args.x.new_empty(0) if held else phi.clone() for phi, held in zip(chain.phi, args.clamped, strict=True)]
    return phis, [delta.clone() for delta in chain.delta], rows, divergence.status(done, chain.products.count)


def _moves(chain: Chain, args: Arguments, record: Callable[[int], None] | None) -> int:
    """All moves; the number of them, which falls short of `steps` only where `tol` froze every sample."""
    frozen = None if args.tol < 0 else torch.zeros(args.x.shape[0], dtype=torch.bool, device=args.x.device)
    for t in range(1, args.steps + 1):
        move = chain.cone.advance()
        if not any(move.moves):  # a fixed point: nothing can move any more
            return args.steps if frozen is None else t - 1
        directions = chain.directions(move)
        if frozen is not None:
            frozen = frozen | (chain.norm(directions) < args.tol)
            if bool(frozen.all()):
                return t - 1
        chain.step(directions, args.lr, args.momentum, frozen)
        chain.refresh(move)
        if record is not None:
            record(t)
    return args.steps
