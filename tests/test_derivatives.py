# SPDX-License-Identifier: MIT
"""Second derivatives of the energies against finite differences in float64; the first ones: test_energies.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck


def _energy_of(name: str, mask: Tensor | None, clamped: bool) -> Callable[..., Tensor]:
    def energy(phi: Tensor, mu: Tensor, *log_var: Tensor) -> Tensor:
        where: dict[str, Any] = {"masks": [mask], "clamped": [True if clamped else None]}
        return pck.layer_energies([phi], [mu], [name], log_vars=list(log_var) or None, **where)

    return energy


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_of_a_free_node(name: str, masked: bool, gen: torch.Generator) -> None:
    phi, mu, log_var = inputs.state(name, gen, 2, 4), inputs.state(name, gen, 2, 4), inputs.log_var(name, gen, 4)
    mask = torch.tensor([True, False, True, True]) if masked else None
    given = [tensor.requires_grad_() for tensor in (phi, mu, log_var) if tensor is not None]
    energy = _energy_of(name, mask, clamped=False)
    assert torch.autograd.gradgradcheck(energy, given)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_of_a_target(name: str, gen: torch.Generator) -> None:
    target, mu, log_var = inputs.target(name, gen, 2, 4), inputs.state(name, gen, 2, 4), inputs.log_var(name, gen, 4)
    given = [target, *(tensor.requires_grad_() for tensor in (mu, log_var) if tensor is not None)]
    energy = _energy_of(name, None, clamped=True)
    assert torch.autograd.gradgradcheck(energy, given)


def test_of_errors(gen: torch.Generator) -> None:
    """The energy that comes with the errors."""
    given = [inputs.normal(gen, 2, 4).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda phi, mu: pck.layer_errors([phi], [mu], ["categorical"]).energy, given)


def test_hessian_of_a_gaussian() -> None:
    def energy(phi: Tensor) -> Tensor:
        return pck.layer_energies([phi], [torch.zeros(1, 2)], ["gaussian"]).sum()

    hessian = torch.autograd.functional.hessian(energy, torch.full((1, 2), 0.5))
    assert torch.equal(hessian.view(2, 2), torch.eye(2))  # type: ignore[union-attr]
