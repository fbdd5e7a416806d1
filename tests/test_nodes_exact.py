# SPDX-License-Identifier: MIT
"""Modules with nodes: states, energies and gradients against autograd of F, float64."""

from __future__ import annotations

import pytest
import torch

from tests import nets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("step", ["natural", "euclidean"])
@pytest.mark.parametrize("name", nets.BODIES)
def test_pc_is_autograd_of_f(name, step):
    net, x, y = nets.make(name, step)
    result = net.infer(x, y, steps=7, lr=0.1)
    now, rows = nets.settle(net.module, x, y, 7, 0.1, natural=step == "natural")
    assert result.names == [n if n == "output" else f"pc.{n}" for n in now.phis]
    for got, wanted in zip(result.phis, now.phis.values(), strict=True):
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-10, atol=1e-12)
    assert torch.allclose(result.energy, rows, rtol=1e-9, atol=1e-12)
    net.backward(result)
    assert nets.furthest(nets.collected(net), nets.gradients(net.module, now.total, len(x))) < 1e-10
