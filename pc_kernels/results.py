# SPDX-License-Identifier: MIT
"""What the public functions return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pc_kernels.dispatch import BACKENDS
from pc_kernels.errors import InferenceDiverged
from pc_kernels.schedule import lower_bound


class LayerErrors(NamedTuple):
    """Energies and their gradients, one list entry per node."""

    energy: Tensor  # (L, B)
    grad_phi: list[Tensor]  # dE_l/dphi_l, shaped as phis[l]; zero where held or masked
    grad_mu: list[Tensor]  # dE_l/dmu_l, shaped as mus[l]


class LayerGrads(NamedTuple):
    """Gradient of F with respect to one layer's parameters; None where there is no such parameter."""

    weight: Tensor  # (D_l, V_{l-1})
    bias: Tensor | None  # (D_l,)
    log_var: Tensor | None  # (D_l,)


class WorkCount(NamedTuple):
    """Matrix products done by an inference, and the least that the README's section 3 leaves."""

    products: int
    lower_bound: int


@dataclass(frozen=True, eq=False)
class Inference:
    """The end of an inference.

    phis: list of L tensors (B, D_l), the states (a clamped node: the target as it was given).
    deltas: list of L tensors (B, D_l), dF/da_l at the final phis.
    energy: (T + 1, L), the batch mean of E_l before each move and after the last, with trace=True; else None.
    noise: as it was given.

    `steps`, `work` and `backend` read a small tensor that the backend filled (on a GPU the first reading waits for it).
    """

    phis: list[Tensor]
    deltas: list[Tensor]
    energy: Tensor | None
    noise: Tensor | Sequence[Tensor | None] | None
    status: Tensor = field(
        repr=False
    )  # int64: steps done, products done, backend, first diverged layer (or 0), its step
    clamped: tuple[bool, ...] = field(repr=False)
    masks: tuple[Tensor | None, ...] = field(repr=False)
    free: tuple[bool, ...] = field(repr=False)
    source: tuple[bool, ...] = field(repr=False)

    @property
    def steps(self) -> int:
        """Moves done: the largest count over the samples."""
        return int(self.status[0])

    @property
    def work(self) -> WorkCount:
        """Matrix products done, beside the lower bound for as many steps."""
        return WorkCount(int(self.status[1]), lower_bound(self.free, self.source, self.steps))

    @property
    def backend(self) -> str:
        """Name of the backend that ran."""
        return BACKENDS[int(self.status[2])]

    def check(self) -> None:
        """Raise InferenceDiverged if a state became non-finite. `infer` does so itself, except while compiling or
        capturing."""
        layer, step = self.status.tolist()[3:5]
        if layer:
            raise InferenceDiverged(layer, None if step < 0 else step)
