# SPDX-License-Identifier: MIT
"""`Layer`: one linear layer of a chain together with the node that it predicts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pc_kernels import checks
from pc_kernels.node_math import FEEDS
from pc_kernels.pc_math import ACTIVATIONS, ENERGIES, ENERGY_TABLE

_POSITIVE = ("sigmoid", "softplus", "softmax")  # activations whose values `categorical_probs` can take the logarithm of


@dataclass(frozen=True, eq=False)
class Layer:
    """mu_l = act(weight v_{l-1} + bias), with node l's energy E_l and what it passes on, v_l = feed(phi_l).

    weight: (D_l, V_{l-1}); bias: (D_l,) or None. V_l = D_l, or D_l / 2 behind a sampled `gaussian_full` node.
    activation: one of `ACTIVATIONS`; energy: one of `ENERGIES`.
    feed: an activation's name or "sample" (`gaussian_full` only). None: softmax for "categorical", sigmoid for
    "bernoulli",
        the sample for "gaussian_full", identity otherwise.
    log_var: (D_l,), for "gaussian_diag" (required there).
    step: "natural" or "euclidean". None: natural for "categorical" and "bernoulli" fed by their mean map, else
    euclidean.
    lr_scale: multiplies lr for this node, >= 0.
    prior: w >= 0 of "gaussian_full": E_l of a free node gains w KL(phi || N(0, I)), the family's energy at mu = 0.

    Weights may require grad; inference never records it. ValueError or TypeError names what is wrong.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    energy: str = "gaussian"
    feed: str | None = None
    log_var: Tensor | None = None
    step: str | None = None
    lr_scale: float = 1.0
    prior: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("activation", self.activation, ACTIVATIONS)
        checks.choice("energy", self.energy, ENERGIES)
        family = ENERGY_TABLE[self.energy]
        if self.feed is None:
            object.__setattr__(self, "feed", family.feed)
        checks.choice("feed", self.feed, FEEDS)
        has_natural = family.natural and self.feed == family.feed
        if self.step is None:
            object.__setattr__(self, "step", "natural" if has_natural else "euclidean")
        checks.choice("step", self.step, ("euclidean", "natural"))
        checks.number("lr_scale", self.lr_scale, least=0)
        checks.number("prior", self.prior, least=0)
        self._check_combination(has_natural)
        self._check_tensors()

    def _check_combination(self, has_natural: bool) -> None:
        if self.step == "natural" and not has_natural:
            checks.fail(
                "step",
                "'euclidean' here",
                f"'natural' with energy={self.energy!r}, feed={self.feed!r}",
                "the natural step exists for 'categorical' fed by softmax and 'bernoulli' fed by sigmoid",
            )
        if self.feed == "sample" and self.energy != "gaussian_full":
            checks.fail(
                "feed", "an activation", f"'sample' with energy={self.energy!r}", "only 'gaussian_full' samples"
            )
        if self.prior and self.energy != "gaussian_full":
            got = f"{self.prior} with energy={self.energy!r}"
            checks.fail("prior", "0 here", got, "only 'gaussian_full' has one, KL(phi || N(0, I))")
        if self.energy == "categorical_probs" and self.activation not in _POSITIVE:
            checks.fail("activation", f"one of {_POSITIVE}", repr(self.activation), "'categorical_probs' needs mu > 0")

    def _check_tensors(self) -> None:
        checks.floating("weight", self.weight, ndim=2)
        width = self.weight.shape[0]
        if 0 in self.weight.shape:
            remedy = "leave out a layer without features"
            checks.fail("weight", "at least one row and one column", checks.describe(self.weight), remedy)
        if self.energy == "gaussian_full" and width % 2:
            checks.fail("weight", "an even number of rows", str(width), "'gaussian_full' holds [means, log variances]")
        for name, value in (("bias", self.bias), ("log_var", self.log_var)):
            if value is not None:
                checks.floating(name, value, shape=(width,), like=self.weight)
        if (self.log_var is None) == (self.energy == "gaussian_diag"):
            wanted = "a tensor (D,)" if self.log_var is None else "None"
            remedy = f"'gaussian_diag' has one, no other energy does; this is energy={self.energy!r}"
            checks.fail("log_var", wanted, "None" if self.log_var is None else "a tensor", remedy)
