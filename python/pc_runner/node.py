# SPDX-License-Identifier: MIT
"""`PCNode`: a value node, put into a module where one belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pc_kernels as pck
from pc_runner.distributions import Pair

# torch's own functions behind the names of `pck.ACTIVATIONS`; "softmax" and "sample" take more than phi, see `value`
_FEEDS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda phi: phi,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
}
DEFAULT_FEEDS = {"categorical": "softmax", "bernoulli": "sigmoid", "gaussian_full": "sample"}
NATURAL = {("categorical", "softmax"), ("bernoulli", "sigmoid")}  # (energy, feed) whose default step is the natural one
HOLDS_PARAMETERS = ("categorical", "bernoulli", "gaussian_full", "poisson")  # a target is data, not a state, for these

Visit = Callable[["PCNode", Tensor], Tensor]


def fail(argument: str, wanted: str, got: object, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` in the one form there is: the argument, what was wanted, what came, the remedy, on one line."""
    raise error(f"{argument}: wanted {wanted}, got {got}; {remedy}")


class PCNode(nn.Module):
    """A value node: its energy family and how it moves. In a plain forward pass it is its feed applied to its input.

    energy: one of `pck.ENERGIES`, or a `Pair` of torch.distributions.
    feed: what the node passes on; None: softmax for "categorical", sigmoid for "bernoulli", a sample for
    "gaussian_full", otherwise its own value.
    step: "natural", "euclidean" or None for the family's default. lr_scale: multiplies `infer`'s lr.
    log_var: the learnable log variances of "gaussian_diag", (D,) or what broadcasts to one sample.
    mask: bool, broadcast to (B, ..., D), True takes part.
    prior: w >= 0 of a "gaussian_full" node: while it is free its energy gains w KL(phi || N(0, I)).
    linear: for an output over many classes: the name of the module's nn.Linear whose result, logits, the module
    returns. While `infer` has a target for it, mu is that layer's input (B, ..., V), and layer, softmax and energy are
    one operator (`pck.linear_softmax_errors`) that never holds all logits: "categorical" (KL), or "gaussian" (squared
    error of the probabilities, the paper's PC_F). Targets are class indices (B, ...) or probabilities; the mask has
    rows (B, ..., 1), and a row where it is False (padding) contributes nothing. A plain forward pass stays as it is.

    During `PCNetwork.infer` the input is the prediction mu (B, ...), and what the node returns is feed(phi).
    Raises ValueError or TypeError that names the bad argument.
    """

    log_var: nn.Parameter | None
    mask: Tensor | None

    def __init__(
        self,
        energy: str | Pair,
        feed: str | None = None,
        step: str | None = None,
        lr_scale: float = 1.0,
        log_var: Tensor | None = None,
        mask: Tensor | None = None,
        linear: str | None = None,
        prior: float = 0.0,
    ):
        super().__init__()
        self.energy, self.feed, self.step, self.lr_scale, self.linear = energy, feed, step, lr_scale, linear
        self.prior = prior
        if linear is not None and energy not in ("categorical", "gaussian"):
            remedy = "leave it out: the module's result is then mu"
            fail("linear", "None unless energy is 'categorical' or 'gaussian'", repr(linear), remedy)
        self._visit: Visit | None = None  # set by a walk for its duration
        self._check(log_var)
        self.log_var = log_var if log_var is None or isinstance(log_var, nn.Parameter) else nn.Parameter(log_var)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: wanted a bool tensor, got {got}; call .bool()")
        self.register_buffer("mask", mask, persistent=False)

    def _check(self, log_var: Tensor | None) -> None:
        """Raise now what an inference would raise later."""
        energy, probe = self.energy, log_var
        if isinstance(energy, Pair):
            energy = "gaussian"  # for the settings that a pair shares with every family
        if log_var is None and energy == "gaussian_diag":
            probe = torch.zeros(2)
        weight = torch.zeros(2, 1)
        if isinstance(probe, Tensor) and probe.is_floating_point():
            weight, probe = probe.new_zeros(probe.numel(), 1), probe.flatten()
        activation = "softmax" if energy == "categorical_probs" else "identity"
        pck.Layer(weight, None, activation, energy, self.feed, probe, self.step, self.lr_scale, self.prior)

    @property
    def fed(self) -> str:
        """The feed's name, the family's default resolved."""
        if self.feed is not None:
            return self.feed
        return DEFAULT_FEEDS.get(self.energy, "identity") if isinstance(self.energy, str) else "identity"

    @property
    def natural(self) -> bool:
        """Whether the node takes the natural step."""
        return self.step == "natural" or (self.step is None and (self.energy, self.fed) in NATURAL)

    def value(self, phi: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """v = feed(phi), (B, ..., D), or half that width for a sample u + e^(s/2) n; masked classes pass on 0."""
        if self.fed == "softmax":
            return (phi if mask is None else phi.masked_fill(~mask, -torch.inf)).softmax(-1)
        if self.fed == "sample":
            u, s = phi.chunk(2, -1)
            return u + (0.5 * s).exp() * (torch.randn_like(u) if noise is None else noise)
        return _FEEDS[self.fed](phi)

    def forward(self, mu: Tensor) -> Tensor:
        """feed(mu); within an inference feed(phi), and mu is recorded as this node's prediction."""
        return self.value(mu, self.mask) if self._visit is None else self._visit(self, mu)

    def extra_repr(self) -> str:
        shown = {"feed": self.feed, "step": self.step, "lr_scale": None if self.lr_scale == 1 else self.lr_scale}
        shown |= {"linear": self.linear, "prior": self.prior or None}
        return ", ".join([repr(self.energy), *(f"{k}={v!r}" for k, v in shown.items() if v is not None)])
