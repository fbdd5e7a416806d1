# SPDX-License-Identifier: MIT
"""Modules with nodes that come down to chains: which nodes, in which order, and what makes a module none."""

from __future__ import annotations

import pytest
import torch
from pc_runner import PCNetwork, PCNode
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Order(nn.Module):
    """A chain whose second node is registered first."""

    def __init__(self):
        super().__init__()
        self.n2, self.n1 = PCNode("gaussian"), PCNode("gaussian")
        self.a, self.c, self.b = nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.b(self.n2(torch.tanh(self.c(self.n1(torch.tanh(self.a(x)))))))


def data():
    torch.manual_seed(0)
    return torch.randn(6, 7).double(), torch.randint(0, 5, (6,))


def moved(phis, mus_of, x, y, steps, held=None):
    """Plain gradient moves of two Gaussian states under a categorical output; `held` does not move."""
    for _ in range(steps):
        phis = [p.detach().requires_grad_() for p in phis]
        mus = mus_of(x, phis)
        total = sum(0.5 * (p - mu).square().sum() for p, mu in zip(phis, mus, strict=False))
        total = total + nn.functional.cross_entropy(mus[-1], y, reduction="sum")
        grads = torch.autograd.grad(total, phis)
        phis = [p if l == held else p - 0.1 * g for l, (p, g) in enumerate(zip(phis, grads, strict=True))]
    return [p.detach() for p in phis]


def test_nodes_of_a_chain_are_named_in_the_order_of_their_calls():
    x, y = data()
    net = PCNetwork(Order().double(), output="categorical")
    module, value = net.module, torch.full((6, 8), 0.5).double()

    def mus_of(x, phis):
        return [torch.tanh(module.a(x)), torch.tanh(module.c(phis[0])), module.b(phis[1])]

    start = [value, torch.tanh(module.c(value)).detach()]
    wanted = moved(start, mus_of, x, y, 5, held=0)
    for settings in ({}, {"algorithm": "ipc", "optimizer": torch.optim.SGD(net.parameters(), lr=0.0)}):
        result = net.infer(x, y, steps=5, clamp={"n1": True}, phis={"n1": value}, **settings)
        assert result.names == ["n1", "n2", "output"]
        assert torch.equal(result.phis[0], value)
        assert torch.allclose(result.phis[1], wanted[1], rtol=1e-10, atol=1e-12)
    mask = torch.ones(8, dtype=torch.bool)
    mask[3:] = False
    masked = net.infer(x, y, steps=5, masks={"n2": mask.expand(6, 8)})
    start = torch.tanh(module.c(torch.tanh(module.a(x))))
    assert torch.allclose(masked.phis[1][:, 3:], start[:, 3:], rtol=1e-12)  # did not move
    assert not torch.allclose(masked.phis[0], torch.tanh(module.a(x)), rtol=1e-6)


class Calls(Order):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        h = self.n1(torch.tanh(self.a(x)))
        return self.b(self.n1(torch.tanh(self.c(h))) if self.kind == "twice" else torch.tanh(h))


@pytest.mark.parametrize("kind", ["twice", "never"])
def test_a_node_called_twice_or_never_is_an_error_on_the_way_to_a_chain(kind):
    module = Calls(kind)
    if kind == "twice":
        module.n2 = nn.Identity()
    net = PCNetwork(module, output="categorical")
    x, y = data()
    texts = {"twice": "node 'n1': wanted one call", "never": "node 'n2': wanted a call in the forward pass"}
    for call in (net.infer, net.explain):
        with pytest.raises(ValueError, match=texts[kind]):
            call(x.float(), y)


def test_two_nodes_of_one_name_are_refused_when_the_network_is_made():
    module = Order()
    module.add_module("output", PCNode("gaussian"))
    with pytest.raises(ValueError, match="node 'output': wanted another name inside the module"):
        PCNetwork(module, output="categorical")
    del module._modules["output"]
    PCNetwork(module, output="categorical")
