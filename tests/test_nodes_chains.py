# SPDX-License-Identifier: MIT
"""Modules with nodes that come down to chains: which nodes, in which order, and what makes a module none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode
from torch import nn
from torch.nn.utils import prune

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
        total = total + F.cross_entropy(mus[-1], y, reduction="sum")
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


def old_weight_norm(linear):
    return nn.utils.weight_norm(linear)


def pruned(linear):
    return prune.l1_unstructured(linear, "weight", 0.5)


def old_spectral_norm(linear):
    return nn.utils.spectral_norm(linear).eval()  # in training its vectors would move at every call


def new_weight_norm(linear):
    return nn.utils.parametrizations.weight_norm(linear)


def doubling(linear):
    linear.register_forward_hook(lambda module, given, out: 2 * out)
    return linear


def shifting(linear):
    linear.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return linear


def replaced(linear):
    linear.forward = lambda v: 2 * F.linear(v, linear.weight, linear.bias)
    return linear


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.n = wrap(nn.Linear(7, 8)), wrap(nn.Linear(8, 5)), PCNode("gaussian")

    def forward(self, x):
        return self.b(self.n(torch.tanh(self.a(x))))


WRAPS = [old_weight_norm, pruned, old_spectral_norm, new_weight_norm, doubling, shifting, replaced]


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", ["nodes", "sequential"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_layers_that_are_more_than_their_weights_learn_all_that_they_have(wrap, kind):
    torch.manual_seed(1)
    x, y = data()
    if kind == "nodes":
        net = PCNetwork(Wrapped(wrap).double(), output="categorical")
        a, b = net.module.a, net.module.b
    else:
        module = nn.Sequential(wrap(nn.Linear(7, 8)), nn.Tanh(), wrap(nn.Linear(8, 5))).double()
        if wrap is new_weight_norm:
            with pytest.raises(ValueError, match=r"module\[0\]: .* is no plain nn.Linear; .* PCNetwork\(...\)"):
                PCNetwork.from_sequential(module, output="categorical")
            return
        net = PCNetwork.from_sequential(module, output="categorical")
        a, b = module[0], module[2]
    parameters = list(net.module.parameters())
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.5)  # an attribute made by the last call is old now
    result = net.infer(x, y, steps=5)
    net.backward(result)
    phi, mu = torch.tanh(a(x)).detach(), torch.tanh(a(x)).detach()
    for _ in range(5):
        leaf = phi.clone().requires_grad_()
        total = 0.5 * (leaf - mu).square().sum() + F.cross_entropy(b(leaf), y, reduction="sum")
        phi = phi - 0.1 * torch.autograd.grad(total, leaf)[0]
    assert torch.allclose(result.phis[0], phi, rtol=1e-10, atol=1e-12)
    total = 0.5 * (phi - torch.tanh(a(x))).square().sum() + F.cross_entropy(b(phi), y, reduction="sum")
    for p, g in zip(parameters, torch.autograd.grad(total / 6, parameters), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)
    for algorithm in ("bp", "zil"):
        net.zero_grad()
        net.backward(net.infer(x, y, algorithm=algorithm))
        loss = F.cross_entropy(b(torch.tanh(a(x))), y)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)


def test_hooks_that_no_prediction_comes_through_are_refused():
    x, y = data()
    for place in ("", "3", "4"):
        module = nn.Sequential(
            nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Softmax(-1), nn.Identity(), nn.Linear(6, 5)
        )
        net = PCNetwork.from_sequential(module.double(), output="categorical")
        handle = module.get_submodule(place).register_forward_hook(lambda module, given, out: 2 * out)
        for algorithm in ("pc", "bp", "zil"):
            with pytest.raises(ValueError, match="wanted no forward hook, got"):
                net.infer(x, y, algorithm=algorithm)
        handle.remove()
        net.infer(x, y)


def test_a_hook_added_and_removed_is_seen():
    x, y = data()
    net = PCNetwork(Wrapped(lambda linear: linear).double(), output="categorical")
    plain = net.infer(x, y, steps=3)
    handle = net.module.n.register_forward_hook(lambda module, given, out: 2 * out)
    assert net.infer(x, y, steps=3).backend == "traced"
    assert "forward hook" in net.explain(x, y)
    assert not torch.allclose(net.infer(x, y, steps=3).phis[0], plain.phis[0])
    handle.remove()
    assert torch.equal(net.infer(x, y, steps=3).phis[0], plain.phis[0])
    assert plain.backend == "cpp"
