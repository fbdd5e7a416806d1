# SPDX-License-Identifier: MIT
"""`Call`: everything about a call of the op `infer` that its layout depends on. Hashable: a plan's key."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property

from pc_kernels.backends.triton_launches import Choice
from pc_kernels.pc_math import ENERGY_TABLE


@dataclass(frozen=True)
class Call:
    """Everything about a call of the op `infer` but addresses, data, lr and momentum. Entry l is node l + 1."""

    batch: int
    inputs: int
    widths: tuple[int, ...]
    activations: tuple[str, ...]
    energies: tuple[str, ...]
    feeds: tuple[str, ...]
    rules: tuple[str, ...]
    lr_scales: tuple[float, ...]
    biases: tuple[bool, ...]
    states: tuple[str, ...]  # "" (none given), "float", "index"
    masks: tuple[bool, ...]
    holds: tuple[bool, ...]
    noise: tuple[bool, ...]
    clamped: tuple[bool, ...]
    steps: int
    momentum: bool
    precision: str
    trace: bool
    choice: Choice
    interpreted: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Made once: a call is looked up at every run, and its fields are many."""
        return hash(astuple(self))

    @property
    def size(self) -> int:
        return len(self.widths)

    def last(self, l: int) -> bool:
        return l == self.size - 1

    def paired(self, l: int) -> bool:
        return self.energies[l] == "gaussian_full"

    def fed(self, l: int) -> int:
        """V of node l + 1."""
        halves = self.paired(l) and (self.feeds[l] == "sample" or self.clamped[l]) and not self.last(l)
        return self.widths[l] // 2 if halves else self.widths[l]

    def passes_phi(self, l: int) -> bool:
        """v is phi: the identity, or a target that stands in place of its feed."""
        return self.feeds[l] == "identity" or (self.clamped[l] and not ENERGY_TABLE[self.energies[l]].target_is_state)

    def row_predict(self, l: int) -> bool:
        """The errors hang together along the row, and a tile does not hold one."""
        rows = self.activations[l] == "softmax" or self.energies[l] == "categorical"
        return self.paired(l) or (rows and self.widths[l] > self.choice.launch.block_n)

    def row_update(self, l: int) -> bool:
        """The move, or what is passed on, does."""
        softmax = self.feeds[l] == "softmax" and not self.last(l) and not self.passes_phi(l)
        rows = softmax or (self.euclidean_categorical(l) and not self.clamped[l])
        return self.paired(l) or (rows and self.widths[l] > self.choice.launch.block_n)

    def euclidean_categorical(self, l: int) -> bool:
        return self.energies[l] == "categorical" and self.rules[l] == "euclidean"

    @property
    def widest_row(self) -> int:
        """The longest row of the phases of rows; 0: there are none."""
        return max((w for l, w in enumerate(self.widths) if self.row_predict(l) or self.row_update(l)), default=0)


def up_to(multiple: int, size: int) -> int:
    return -(-size // multiple) * multiple


def power_of_two(least: int, size: int) -> int:
    while least < size:
        least *= 2
    return least
