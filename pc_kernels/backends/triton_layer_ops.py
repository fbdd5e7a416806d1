# SPDX-License-Identifier: MIT
"""layer_energies, layer_errors and update_phi_ on Triton: from tensors to a table of nodes, and one launch.

The arguments are those of torch.ops.pc_kernels', already checked by functional.py: float32 or bfloat16, one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pc_kernels.backends.triton_launches import registers
from pc_kernels.backends.triton_layer_kernels import errors_kernel, update_kernel
from pc_kernels.backends.triton_math import ENERGY_CODES, HAS_OWN_TARGET
from pc_kernels.backends.triton_tables import (
    HALVES,
    SLOTS,
    WHOLE_ROWS,
    WIDE_ROWS,
    Form,
    Slot,
    float_bits,
    on_device,
    strides,
)

# Entries of a tile -> warps: the smallest tile that holds the widest softmax row, or the last. 4 entries a thread; with
# 8 ptxas spills.
LAUNCHES = {1024: 8, 2048: 16}
_NARROWEST = 16

Optionals = Sequence[Tensor | None]


@dataclass
class Node:
    """One node of a call, its tensors contiguous but for those that broadcast."""

    energy: str
    form: Form
    phi: Tensor
    mu: Tensor
    slots: list[int] = field(default_factory=lambda: [0] * SLOTS)
    kept: list[Tensor] = field(default_factory=list)  # copies that must live until the launch

    def put(self, slot: Slot, tensor: Tensor) -> None:
        self.slots[slot] = tensor.data_ptr()
        self.kept.append(tensor)

    def put_broadcast(self, slot: Slot, tensor: Tensor | None, shape: Sequence[int]) -> None:
        """A tensor that broadcasts to phi's shape."""
        if tensor is None or 0 in shape:
            return
        rows, width = self._rows_of(shape)
        view, self.slots[slot : slot + 4] = strides(tensor.expand(shape), rows, width)
        self.kept.append(view)

    @staticmethod
    def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
        return torch.Size(shape[1:-1]).numel(), shape[-1]

    def measure(self) -> None:
        """Its sizes, as its form sees them."""
        rows, width = self._rows_of(self.mu.shape)
        indexed = self.form == Form.ROW_INDEX
        self.slots[Slot.INNER] = width if indexed else self.phi.shape[-1]
        if self.form not in HALVES and self.form not in WHOLE_ROWS:
            rows, width = 1, rows * width
        self.slots[Slot.ROWS], self.slots[Slot.WIDTH] = rows, width
        self.slots[Slot.ENERGY], self.slots[Slot.FORM] = ENERGY_CODES[self.energy], self.form

    @property
    def columns(self) -> int:
        """Entries of a row that a tile takes together."""
        return self.slots[Slot.WIDTH] // (2 if self.form in HALVES else 1)


def form_of(energy: str, clamped: bool, indexed: bool) -> Form:
    """Which formulas a node takes."""
    if energy == "gaussian_full":
        return Form.PAIR_TARGET if clamped else Form.PAIR
    if energy == "categorical":
        return (Form.ROW_INDEX if indexed else Form.ROW_TARGET) if clamped else Form.ROW
    return Form.OWN_TARGET if clamped and energy in HAS_OWN_TARGET else Form.ENTRIES


def _describe(
    phi: Tensor, mu: Tensor, energy: str, form: Form, log_var: Tensor | None, mask: Tensor | None, hold: Tensor | None
) -> Node:
    """A node without its outputs."""
    node = Node(energy, form, phi, mu.contiguous())
    node.measure()
    node.put(Slot.MU, node.mu)
    indexed = form == Form.ROW_INDEX
    node.put(Slot.INDEX if indexed else Slot.PHI, phi.contiguous())
    shape = mu.shape if indexed else phi.shape
    node.put_broadcast(Slot.MASK, mask, shape)
    node.put_broadcast(Slot.HOLD, hold, shape)
    node.put_broadcast(Slot.LOG_VAR, log_var, shape)
    return node


@dataclass
class Launch:
    """Nodes ready to be launched."""

    table: Tensor
    programs: int
    batch: int
    constants: dict[str, Any]
    on: AbstractContextManager[Any]


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def launch_of(nodes: Sequence[Node], batch: int) -> Launch:
    """The table on the device, the grid and the kernels' constants. Gives each node its tile and its programs."""
    wide = max((node.columns for node in nodes if node.form in WHOLE_ROWS), default=0)
    tile = next((size for size in LAUNCHES if size >= wide), max(LAUNCHES))
    programs = 0
    for node in nodes:
        log = _power_of_two(min(node.columns, tile), _NARROWEST).bit_length() - 1
        samples = tile >> log if node.slots[Slot.ROWS] == 1 else 1
        if node.form in WHOLE_ROWS and node.columns > tile:
            log, samples = WIDE_ROWS, 1
        node.slots[Slot.LOG_COLUMNS], node.slots[Slot.FIRST] = log, programs
        programs += -(-batch // samples)
    device = nodes[0].mu.device
    constants = {
        "FORMS": _bits(node.form for node in nodes),
        "FREE": _bits(node.slots[Slot.ENERGY] for node in nodes if node.form == Form.ENTRIES),
        "WIDTHS": _bits(node.slots[Slot.LOG_COLUMNS] for node in nodes),
        "NODES": _power_of_two(len(nodes), 1),
        "BFLOAT16": nodes[0].mu.dtype == torch.bfloat16,
        "ALIGNED": all(_aligned(node) for node in nodes),
        "TILE": tile,
        "num_warps": LAUNCHES[tile],
        **({} if device.type == "cpu" or torch.version.hip else {"maxnreg": registers(LAUNCHES[tile])}),
    }
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on:
        table = on_device([node.slots for node in nodes], device)
    return Launch(table, programs, batch, constants, on)


def _bits(codes: Any) -> int:
    return sum(1 << code for code in set(codes))


def _aligned(node: Node) -> bool:
    pointers = (Slot.PHI, Slot.MU, Slot.GRAD_PHI, Slot.GRAD_MU, Slot.FEEDBACK, Slot.VELOCITY)
    return node.slots[Slot.WIDTH] % 8 == 0 and all(node.slots[slot] % 16 == 0 for slot in pointers)


# ---------------------------------------------------------------------------------------------------------------------
# the ops


def _nodes(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    energies: Sequence[str],
    log_vars: Optionals,
    masks: Optionals,
    holds: Optionals,
    clamped: Sequence[bool],
) -> list[Node]:
    nodes = []
    for phi, mu, *rest, target in zip(phis, mus, energies, log_vars, masks, holds, clamped, strict=True):
        energy, log_var, mask, hold = rest
        form = form_of(energy, target, not phi.is_floating_point())
        node = _describe(phi, mu, energy, form, log_var, mask, hold)
        node.slots[Slot.CLAMPED] = int(target)
        nodes.append(node)
    return nodes


def _run_errors(nodes: Sequence[Node], grads: bool) -> Tensor:
    batch = nodes[0].mu.shape[0]
    energy = torch.empty(len(nodes), batch, dtype=torch.float32, device=nodes[0].mu.device)
    if batch:
        launch = launch_of(nodes, batch)
        targets = _bits(node.slots[Slot.ENERGY] for node in nodes if node.form == Form.OWN_TARGET)
        with launch.on:
            constants: dict[str, Any] = {**launch.constants, "TARGETS": targets, "GRADS": grads}
            errors_kernel[(launch.programs,)](launch.table, energy, batch, len(nodes), **constants)
    return energy


def layer_energies(phis: Sequence[Tensor], mus: Sequence[Tensor], *rest: Any) -> Tensor:
    """(L, B) float32: E_l per sample."""
    return _run_errors(_nodes(phis, mus, *rest), grads=False)


def layer_errors(
    phis: Sequence[Tensor], mus: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Energies (L, B) float32, dE/dphi and dE/dmu per node in mu's dtype."""
    nodes = _nodes(phis, mus, *rest)
    grad_phi = [torch.empty(phi.shape, dtype=mu.dtype, device=mu.device) for phi, mu in zip(phis, mus, strict=True)]
    grad_mu = [torch.empty(mu.shape, dtype=mu.dtype, device=mu.device) for mu in mus]
    for node, by_phi, by_mu in zip(nodes, grad_phi, grad_mu, strict=True):
        node.put(Slot.GRAD_PHI, by_phi)
        node.put(Slot.GRAD_MU, by_mu)
    return _run_errors(nodes, grads=True), grad_phi, grad_mu


def update_phi_(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    feedback: Optionals,
    energies: Sequence[str],
    rules: Sequence[str],
    lr: float,
    momentum: float,
    velocities: Sequence[Tensor],
    lr_scales: Sequence[float],
    log_vars: Optionals,
    masks: Optionals,
    holds: Optionals,
) -> None:
    """One move of every node, in place. A state or velocity that is not contiguous is moved in a copy, then copied
    back."""
    if mus[0].shape[0] == 0:
        return
    nodes, moved = [], []
    for l, (phi, mu) in enumerate(zip(phis, mus, strict=True)):
        node = _described_move(phi, mu, energies[l], rules[l], log_vars[l], masks[l], holds[l])
        node.slots[Slot.LR_SCALE] = float_bits(lr_scales[l])
        moved.append((phi, node.kept[1]))
        back = feedback[l]
        if back is not None:
            node.put(Slot.FEEDBACK, back.contiguous())
        if velocities:
            node.put(Slot.VELOCITY, velocities[l].contiguous())
            moved.append((velocities[l], node.kept[-1]))
        nodes.append(node)
    launch = launch_of(nodes, mus[0].shape[0])
    with launch.on:
        update_kernel[(launch.programs,)](
            launch.table, launch.batch, len(nodes), float(lr), float(momentum), **launch.constants
        )
    for original, tensor in moved:
        if tensor is original:
            torch.autograd.graph.increment_version(original)  # torch has not seen the kernel write
        else:
            original.copy_(tensor)


def _described_move(phi: Tensor, mu: Tensor, energy: str, rule: str, *rest: Any) -> Node:
    """A natural step has the form of `gaussian`'s, entry by entry."""
    form = Form.ENTRIES if rule == "natural" else form_of(energy, False, False)
    node = _describe(phi, mu, "gaussian" if rule == "natural" else energy, form, *rest)
    node.slots[Slot.FLOORED] = int(energy == "categorical_probs")
    return node
