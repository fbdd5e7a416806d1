# SPDX-License-Identifier: MIT
"""`Problem`: a call of `infer`, checked and brought into the form that the op takes."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from pc_kernels import checks
from pc_kernels.layer import Layer
from pc_kernels.nodes import check_masks, check_target, mask_shape, split_clamps
from pc_kernels.pc_math import ENERGY_TABLE
from pc_kernels.schedule import sources

FLOATS = (torch.float32, torch.float64)


class Problem:
    """Attributes are lists with one entry per node (entry l is node l + 1).

    given: the caller's states and targets. phis: the same as the op takes them (inner class indices as one-hot).
    masks, holds: bool tensors or None. clamped: phi is a target. noise: of nodes that feed on a sample.
    """

    def __init__(self, x: Any, layers: Any, target: Any, phis: Any, clamp: Any, masks: Any, noise: Any):
        checks.floating("x", x, ndim=2, dtypes=FLOATS)
        self.x: Tensor = x
        self.layers = check_layers(x, layers)
        self.size = len(self.layers)
        self._weights = [layer.weight for layer in self.layers]
        batch = x.shape[0]
        self._shapes = [(batch, weight.shape[0]) for weight in self._weights]
        self.given = checks.per_node("phis", phis, self.size)
        self.clamped, self.holds = split_clamps("clamp", clamp, self.size)
        self._take_target(target)
        self.masks = checks.per_node("masks", masks, self.size)
        if masks is not None or clamp is not None:
            self._check_masks()
        self.phis = [self._check_state(l) for l in range(self.size)]
        self.noise = self._check_noise(noise)

    def _take_target(self, target: Any) -> None:
        self._has_target = target is not None
        if target is None:
            return
        if self.clamped[-1] or self.holds[-1] is not None or self.given[-1] is not None:
            remedy = "the last node's values are already in phis and clamp; pass them once"
            checks.fail("target", "None", checks.describe(target), remedy)
        self.clamped[-1], self.given[-1] = True, target

    def _check_masks(self) -> None:
        nodes = zip(self.layers, self.clamped, self._shapes, strict=True)
        shapes = [mask_shape(layer.energy, held, shape) for layer, held, shape in nodes]
        check_masks("masks", self.masks, shapes, self.x.device)
        check_masks("clamp", self.holds, shapes, self.x.device)
        for l, mask in enumerate(self.masks):
            if mask is not None:
                checks.visible_rows(f"masks[{l}]", mask)

    def _check_state(self, l: int) -> Tensor | None:
        """Node l's given state or target as the op takes it."""
        given, held, shape = self.given[l], self.clamped[l], self._shapes[l]
        if given is None and not held and self.holds[l] is None:
            return None  # most nodes
        inner = l < self.size - 1
        name = "target" if self._has_target and not inner else f"phis[{l}]"
        if given is None:
            checks.fail(name, "the values to hold, since clamp holds this node", "None", "pass them in phis")
        if not held:
            checks.floating(name, given, shape=shape, like=self.x)
            return given
        check_target(name, given, self.layers[l].energy, shape, self.x, self.masks[l])
        if inner:
            self._check_passes_on(l)
            if not given.is_floating_point():
                return torch.nn.functional.one_hot(given, shape[1]).to(self.x.dtype)
        return given

    def _check_passes_on(self, l: int) -> None:
        """A target that is no state (probabilities, counts, data) stands for what the family's own feed passes on."""
        layer = self.layers[l]
        family = ENERGY_TABLE[layer.energy]
        if not family.target_is_state and layer.feed != family.feed:
            remedy = f"a {layer.energy!r} target is no state that feed={layer.feed!r} takes; hold a state by a mask"
            checks.fail(f"clamp[{l}]", "a bool mask here", "True", remedy)

    def _check_noise(self, noise: Any) -> list[Tensor | None]:
        """One noise tensor per node that feeds on its sample, None elsewhere."""
        if noise is None and "sample" not in [layer.feed for layer in self.layers]:
            return [None] * self.size  # most calls
        held = zip(self.layers[:-1], self.clamped, strict=False)
        sampled = [*(layer.feed == "sample" and not clamped for layer, clamped in held), False]
        if isinstance(noise, Tensor):
            if not any(sampled):
                checks.fail("noise", "None", checks.describe(noise), "no node here feeds on its sample")
            if sum(sampled) != 1:
                wanted, remedy = f"a list of {self.size}, one entry per node", f"{sum(sampled)} nodes feed on a sample"
                checks.fail("noise", wanted, checks.describe(noise), remedy)
            entries: list[Any] = [noise if here else None for here in sampled]
        else:
            entries = checks.per_node("noise", noise, self.size)
        for l, (entry, here) in enumerate(zip(entries, sampled, strict=True)):
            self._check_noise_entry("noise" if isinstance(noise, Tensor) else f"noise[{l}]", entry, here, l)
        return entries

    def _check_noise_entry(self, name: str, entry: Any, sampled: bool, l: int) -> None:
        batch, width = self._shapes[l]
        if sampled and entry is None:
            remedy = "the node feeds on its sample: draw it once, torch.randn(B, D // 2)"
            checks.fail(name, f"a tensor {(batch, width // 2)}", "None", remedy)
        if entry is not None and not sampled:
            checks.fail(name, "None", checks.describe(entry), "this node does not feed on a sample")
        if entry is not None:
            checks.floating(name, entry, shape=(batch, width // 2), like=self.x)

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, up to the settings of the run."""
        layers = self.layers
        return (
            self.x,
            self._weights,
            [layer.bias for layer in layers],
            [layer.activation for layer in layers],
            [layer.energy for layer in layers],
            [layer.feed for layer in layers],
            [layer.step for layer in layers],
            [float(layer.lr_scale) for layer in layers],
            [layer.log_var for layer in layers],
            self.phis,
            self.masks,
            self.holds,
            self.noise,
            self.clamped,
            [float(layer.prior) for layer in layers],
        )

    def sources(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """(free, source) of `schedule.Cone`."""
        names, priors = [layer.energy for layer in self.layers], [layer.prior for layer in self.layers]
        return sources(names, self.clamped, [phi is not None for phi in self.phis], priors)


def check_layers(x: Tensor, layers: Any) -> list[Layer]:
    """Layers that fit x and one another."""
    if not isinstance(layers, (list, tuple)) or not layers:
        checks.fail("layers", "a non-empty list of pck.Layer", checks.describe(layers), "", TypeError)
    width = x.shape[1]
    for l, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            remedy = "wrap the weight: pck.Layer(weight, bias)"
            checks.fail(f"layers[{l}]", "a pck.Layer", checks.describe(layer), remedy, TypeError)
        weight = layer.weight
        rows, columns = weight.shape
        if columns != width or not checks.alike(weight, x):
            _fail_of_weight(l, weight, width, x)
        width = rows // 2 if layer.feed == "sample" else rows
    return list(layers)


def _fail_of_weight(l: int, weight: Tensor, width: int, x: Tensor) -> NoReturn:
    name, giver = f"layers[{l}].weight", f"layers[{l - 1}]" if l else "x"
    checks.floating(name, weight, like=x)
    checks.fail(name, f"{width} columns", checks.describe(weight), f"{giver} passes {width} features on")
