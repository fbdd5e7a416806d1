# SPDX-License-Identifier: MIT
"""PCNetwork: what a Sequential becomes, and its gradients against autograd of F written out here."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from pc_runner import PCNetwork, PCNode
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequential(*activations: nn.Module | None, widths=(7, 6, 5, 6, 4), bias: bool = True) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i, activation in enumerate(activations):
        modules.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
        modules += [] if activation is None else [activation]
    return nn.Sequential(*modules).double()


def softmax() -> nn.Module:
    return nn.Softmax(dim=-1)


def indices(batch: int = 5, classes: int = 4) -> Tensor:
    return torch.arange(batch) % classes


def data(batch: int = 5, width: int = 7) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64)


# ------------------------------------------------------------------------------- F as the paper writes it, per sample


def gaussian(phi, mu, lv=None):
    return (0.5 * (phi - mu) ** 2).sum(1)


def gaussian_diag(phi, mu, lv):
    return (0.5 * (phi - mu) ** 2 / lv.exp() + 0.5 * lv).sum(1)


def categorical(phi, mu, lv=None):
    if not phi.is_floating_point():
        return nn.functional.cross_entropy(mu, phi, reduction="none")
    p, q = torch.distributions.Categorical(logits=phi), torch.distributions.Categorical(logits=mu)
    return torch.distributions.kl_divergence(p, q)


def probabilities(phi, mu, lv=None):
    return (phi * (phi / mu).log() - phi + mu).sum(1)


def bernoulli(phi, mu, lv=None):
    p, q = torch.distributions.Bernoulli(logits=phi), torch.distributions.Bernoulli(logits=mu)
    return torch.distributions.kl_divergence(p, q).sum(1)


def laplace(phi, mu, lv=None):
    p, q = torch.distributions.Laplace(phi, torch.ones_like(phi)), torch.distributions.Laplace(mu, torch.ones_like(mu))
    return torch.distributions.kl_divergence(p, q).sum(1)


def counts(phi, mu, lv=None):
    return (mu.exp() - phi * mu + torch.where(phi > 0, phi * phi.log() - phi, 0)).sum(1)


def same(a):
    return a


SOFTMAX, TANH = torch.nn.Softmax(-1), torch.tanh
CATEGORICAL = (categorical, same, SOFTMAX)


# name: (module, from_sequential's arguments, per node (energy, act, feed), target)
CASES = {
    "m1": (
        lambda: sequential(nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh()),
        {},
        [(gaussian, TANH, same)] * 4,
        lambda: torch.eye(4, dtype=torch.float64)[indices()],
    ),
    "m2": (
        lambda: sequential(nn.Tanh(), nn.ReLU(), nn.GELU(), softmax()),
        {},
        [(gaussian, TANH, same), (gaussian, torch.relu, same), (gaussian, nn.GELU(), same), CATEGORICAL],
        indices,
    ),
    "m3": (
        lambda: sequential(nn.Tanh(), softmax(), nn.Tanh(), softmax(), bias=False),
        {},
        [(gaussian, TANH, same), CATEGORICAL, (gaussian, TANH, same), CATEGORICAL],
        indices,
    ),
    "pc_f": (
        lambda: sequential(nn.Tanh(), softmax(), nn.SiLU(), softmax()),
        {"energy": "gaussian"},
        [(gaussian, TANH, same), (gaussian, SOFTMAX, same), (gaussian, nn.SiLU(), same), (gaussian, SOFTMAX, same)],
        lambda: torch.eye(4, dtype=torch.float64)[indices()],
    ),
    "logits": (
        lambda: sequential(nn.LeakyReLU(), nn.Hardtanh(), nn.Softplus(), None),
        {"output": "categorical"},
        [*((gaussian, act, same) for act in (nn.LeakyReLU(), nn.Hardtanh(), nn.Softplus())), CATEGORICAL],
        indices,
    ),
    "families": (
        lambda: sequential(nn.Sigmoid(), softmax(), nn.Tanh(), None),
        {"energy": ["bernoulli", "categorical_probs", "laplace", "poisson"]},
        [(bernoulli, same, torch.sigmoid), (probabilities, SOFTMAX, same), (laplace, TANH, same), (counts, same, same)],
        lambda: torch.arange(20, dtype=torch.float64).reshape(5, 4) % 3,
    ),
    "variances": (
        lambda: sequential(nn.Tanh(), None, nn.Tanh(), None),
        {"energy": ["gaussian_diag", "gaussian_diag", "gaussian", "gaussian_diag"]},
        [(gaussian_diag, TANH, same), (gaussian_diag, same, same), (gaussian, TANH, same), (gaussian_diag, same, same)],
        lambda: torch.randn(5, 4, dtype=torch.float64),
    ),
    "activation first": (  # mu = W tanh(phi) + b: the activation is the node's feed
        lambda: sequential(nn.Tanh(), nn.Tanh(), nn.Tanh(), None),
        {"energy": [PCNode("gaussian", feed="tanh") for _ in range(3)] + [PCNode("gaussian")]},
        [(gaussian, same, TANH)] * 3 + [(gaussian, same, same)],
        lambda: torch.randn(5, 4, dtype=torch.float64),
    ),
}  # fmt: skip


def make(name: str) -> tuple[PCNetwork, list, Tensor, Tensor]:
    module, arguments, nodes, target = CASES[name]
    return PCNetwork.from_sequential(module(), **copy.deepcopy(arguments)), nodes, data(), target()


def layer_energies(net: PCNetwork, nodes: list, x: Tensor, phis: list[Tensor]) -> Tensor:
    """(L,) batch means, from nothing but the user's linear layers and the formulas above."""
    linears, v, found = [m for m in net.module if isinstance(m, nn.Linear)], x, []
    for linear, node, (energy, act, feed), phi in zip(linears, net.nodes, nodes, phis, strict=True):
        found.append(energy(phi, act(linear(v)), node.log_var).mean())
        v = feed(phi) if phi.is_floating_point() else phi
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_backward_adds_the_gradient_of_the_energy(name):
    net, nodes, x, y = make(name)
    for node in net.nodes:
        if node.log_var is not None:
            nn.init.uniform_(node.log_var, -0.5, 0.5)
    result = net.infer(x, y, steps=12, lr=0.05)
    energies = layer_energies(net, nodes, x, result.phis)
    assert result.energy is not None
    assert torch.allclose(result.energy[-1], energies, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(energies.sum(), list(net.parameters()))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.backward(result)
    for (key, parameter), grad in zip(net.named_parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad - 1, grad, rtol=1e-8, atol=1e-11), key


@pytest.mark.parametrize("name", CASES)
def test_inference_starts_feed_forward_and_lowers_the_energy(name):
    net, nodes, x, y = make(name)
    result = net.infer(x, y, steps=12, lr=0.05)
    still = net.infer(x, algorithm="bp")
    start = layer_energies(net, nodes, x, [*still.phis[:-1], y])
    total = result.energy.sum(1)
    assert torch.allclose(result.energy[0], start, rtol=1e-9, atol=1e-12)
    assert (total.diff() < 0).all()
    assert (result.steps, result.energy.shape) == (12, (13, 4))
    assert result.work.products >= result.work.lower_bound > 0


@pytest.mark.parametrize(("name", "loss"), [("m1", "mse"), ("m2", "ce"), ("m3", "ce"), ("logits", "ce")])
def test_bp_is_plain_backpropagation(name, loss):
    net, _, x, y = make(name)
    result = net.infer(x, y, algorithm="bp")
    net.backward(result)
    out = net(x)
    if loss == "mse":
        value = 0.5 * (out - y).square().sum(1).mean()
    else:
        value = nn.functional.nll_loss(out.log(), y) if name != "logits" else nn.functional.cross_entropy(out, y)
    for got, wanted in zip(net.parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True):
        assert torch.allclose(got.grad, wanted, rtol=1e-10, atol=1e-14)
    assert math.isclose(float(result.energy[0, -1]), value.item(), rel_tol=1e-12)
    assert (result.steps, result.backend, tuple(result.energy.shape)) == (0, "autograd", (1, 4))
    assert float(result.energy[0, :-1].abs().sum()) == 0


def test_gradients_accumulate_and_frozen_parameters_stay_without():
    net, _, x, y = make("m2")
    net.module[2].weight.requires_grad_(False)
    net.backward(net.infer(x, y, steps=3))
    once = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.backward(net.infer(x, y, steps=3))
    assert net.module[2].weight.grad is None
    assert len(once) == 7
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, 2 * once[name], rtol=1e-12)


def test_a_layer_used_twice_gets_both_gradients():
    shared = nn.Linear(4, 4).double()
    net = PCNetwork.from_sequential(nn.Sequential(shared, nn.Tanh(), shared))
    x, y = data(width=4), data(width=4)
    result = net.infer(x, y, steps=5)
    first = 0.5 * (result.phis[0] - torch.tanh(shared(x))).square().sum(1).mean()
    wanted = torch.autograd.grad(first + 0.5 * (y - shared(result.phis[0])).square().sum(1).mean(), shared.weight)
    net.backward(result)
    assert torch.allclose(shared.weight.grad, wanted[0], rtol=1e-10)


def test_learned_variances_follow_the_residuals():
    torch.manual_seed(1)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    net = PCNetwork.from_sequential(nn.Sequential(nn.Linear(3, 4)).double(), energy=["gaussian_diag"])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    x = torch.zeros(4000, 3, dtype=torch.float64)
    y = torch.randn(4000, 4, dtype=torch.float64) * spread
    for _ in range(300):
        optimizer.zero_grad()
        net.backward(net.infer(x, y, steps=0, trace=False))
        optimizer.step()
    assert torch.allclose(net.nodes[0].log_var.exp(), y.var(0, unbiased=False), rtol=1e-2)


def test_parameters_are_read_at_every_call():
    net, nodes, x, y = make("m2")
    net.infer(x, y)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    net.module[6] = nn.Linear(6, 4).double()
    result = net.infer(x, y, steps=4)
    assert torch.allclose(result.energy[-1], layer_energies(net, nodes, x, result.phis), rtol=1e-9, atol=1e-12)
    other, _, _, _ = make("m2")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.infer(x, y, steps=4).energy, result.energy)
    assert net.float().infer(x.float(), y).phis[0].dtype == torch.float32


def test_the_network_is_an_ordinary_module():
    net, _, x, y = make("variances")
    assert [key for key in net.state_dict() if "module" not in key] == [f"nodes.{i}.log_var" for i in (0, 1, 3)]
    assert net.module[0].weight is dict(net.named_parameters())["module.0.weight"]
    assert torch.equal(net(x), net.module(x))
    twin, stored = copy.deepcopy(net), io.BytesIO()
    torch.save(net, stored)
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other.infer(x, y, steps=3).energy, net.infer(x, y, steps=3).energy)
        other.backward(other.infer(x, y, steps=3))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert "PCNode('gaussian_diag')" in repr(net)


def test_a_leading_flatten_nested_sequentials_and_identities():
    inner = nn.Sequential(nn.Identity(), nn.Linear(6, 5), nn.Tanh())
    net = PCNetwork.from_sequential(nn.Sequential(nn.Flatten(), inner, nn.Linear(5, 3), softmax()))
    images = torch.randn(4, 1, 2, 3)
    result = net.infer(images, indices(4, 3))
    assert [tuple(phi.shape) for phi in result.phis] == [(4, 5), (4,)]
    assert [node.energy for node in net.nodes] == ["gaussian", "categorical"]
    net.backward(result)
    assert inner[1].weight.grad is not None


def test_node_options_reach_the_layers():
    module = sequential(nn.Tanh(), softmax(), nn.Tanh(), softmax())
    x, y = data(), indices()
    runs = {}
    for name, node in {
        "natural": PCNode("categorical"),
        "euclidean": PCNode("categorical", step="euclidean"),
        "slow": PCNode("categorical", lr_scale=0.5),
        "held": PCNode("categorical", lr_scale=0.0),
    }.items():
        net = PCNetwork.from_sequential(module, energy=["gaussian", node, "gaussian", "categorical"])
        runs[name] = net.infer(x, y, steps=4)
    ends = {name: float(run.energy[-1].sum()) for name, run in runs.items()}
    assert len(set(ends.values())) == 4
    assert ends["natural"] < ends["slow"] < ends["held"]
    forward = PCNetwork.from_sequential(module).infer(x, algorithm="bp").phis
    assert torch.allclose(runs["held"].phis[1], forward[1], rtol=1e-12)


def test_masks_of_nodes_and_of_calls():
    mask = torch.tensor([True, True, False, True])
    module = sequential(nn.Tanh(), nn.Tanh(), nn.Tanh(), softmax())
    net = PCNetwork.from_sequential(module, output=PCNode("categorical", mask=mask))
    x, y = data(), torch.tensor([0, 1, 3, 0, 1])
    energy = net.infer(x, y, algorithm="bp").energy[0, -1]
    logits = module[:-1](x).masked_fill(~mask, -torch.inf)
    assert torch.allclose(energy, nn.functional.cross_entropy(logits, y), rtol=1e-12)
    plain = PCNetwork.from_sequential(module)
    given = plain.infer(x, y, steps=3, masks=[None, None, None, mask])
    assert torch.equal(given.energy, net.infer(x, y, steps=3).energy)
    assert "mask" not in "".join(net.state_dict())


def test_states_may_be_given_and_nothing_records_a_gradient():
    net, _, x, y = make("m2")
    result = net.infer(x, y, steps=6)
    again = net.infer(x, y, steps=0, phis=[*result.phis[:-1], None])
    assert torch.allclose(again.energy[0], result.energy[-1], rtol=1e-10)
    assert not any(phi.requires_grad for phi in result.phis)
    longer = net.infer(x, y, steps=2, phis=[*result.phis[:-1], None])
    assert torch.allclose(longer.energy[-1], net.infer(x, y, steps=8).energy[-1], rtol=1e-9)
    assert net.infer(x, y, trace=False).energy is None
    assert "backend" in net.explain(x, y)


@pytest.mark.parametrize("algorithm", ["pc", "epc"])
def test_entries_may_be_given_by_name(algorithm):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    net = PCNetwork.from_sequential(module, output="categorical")
    x, y, value = torch.randn(4, 7).double(), torch.randint(0, 5, (4,)), torch.randn(4, 8).double()
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 4] = y == 4
    named = {"clamp": {"nodes.0": True}, "phis": {"nodes.0": value}, "masks": {"output": mask}}
    listed = {"clamp": [True, None, None], "phis": [value, None, None], "masks": [None, None, mask]}
    first, second = (net.infer(x, y, steps=4, algorithm=algorithm, **given) for given in (named, listed))
    assert torch.equal(first.phis[0], value)
    assert torch.equal(first.phis[1], second.phis[1])
    phi, mu = (torch.tanh(net.module[2](value)).detach() for _ in range(2))
    for _ in range(4):
        leaf = phi.clone().requires_grad_()
        loss = nn.functional.cross_entropy(net.module[4](leaf).masked_fill(~mask, -torch.inf), y, reduction="sum")
        phi = phi - 0.1 * torch.autograd.grad(loss + 0.5 * (leaf - mu).square().sum(), leaf)[0]
    assert torch.allclose(first.phis[1], phi, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"wanted names out of nodes\.0, nodes\.1, output, got 'n'"):
        net.infer(x, y, algorithm=algorithm, clamp={"n": True}, phis={"n": value})
