# SPDX-License-Identifier: MIT
"""Which nodes can move when, and which matrix products that takes: the light cone of the README's section 3.

A node moves only once its own prediction error, or that of the node above, can be non-zero. After a forward
initialisation only the clamped output has an error, so at move t only nodes l >= L - t move; inner clamps, given
states, floored probabilities and priors are further sources. Backends follow `Cone`; `lower_bound` counts the products
that it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """One Jacobi move. Entry l is about node l + 1 (nodes are 1..L, lists start at 0)."""

    moves: tuple[bool, ...]  # the node's phi changes
    feedback: tuple[bool, ...]  # the product W_{l+1}^T delta_{l+1} is needed
    errors: tuple[bool, ...]  # the node's own dE/dphi can be non-zero
    refresh: tuple[bool, ...]  # phi or mu of the node changed: delta is computed anew afterwards

    @property
    def products(self) -> int:
        """Backward products now plus forward products of the pre-activations that the move changes."""
        return sum(self.feedback) + sum(self.moves[:-1])


class Cone:
    """The sequence of moves of a chain. `free[l]`: some entry of the node can move. `source[l]`: it can have an
    error at t = 0."""

    def __init__(self, free: Sequence[bool], source: Sequence[bool]):
        self._free = tuple(free)
        self._errors = tuple(source)

    def advance(self) -> Move:
        """The next move; the cone widens by it."""
        above = (*self._errors[1:], False)
        moves = tuple(f and (e or a) for f, e, a in zip(self._free, self._errors, above, strict=True))
        feedback = tuple(m and a for m, a in zip(moves, above, strict=True))
        refresh = tuple(m or below for m, below in zip(moves, (False, *moves[:-1]), strict=True))
        move = Move(moves, feedback, self._errors, refresh)
        self._errors = tuple(e or r for e, r in zip(self._errors, refresh, strict=True))
        return move


def lower_bound(free: Sequence[bool], source: Sequence[bool], steps: int) -> int:
    """Matrix products of `steps` moves: L for the first pre-activations, then the cone's (2(L-1) a move once it is
    open)."""
    cone = Cone(free, source)
    return len(free) + sum(cone.advance().products for _ in range(steps))


def sources(
    energies: Sequence[str], clamped: Sequence[bool], given: Sequence[bool], priors: Sequence[float] = ()
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """(free, source) of a chain: clamped and given states can have an error from the start, and so can floored
    probabilities; a prior pulls at its node from the start (no priors: none has one)."""
    free = tuple(not held for held in clamped)
    source = tuple(
        held or there or name == "categorical_probs" or bool(prior)
        for name, held, there, prior in zip(energies, clamped, given, priors or [0.0] * len(energies), strict=True)
    )
    return free, source
