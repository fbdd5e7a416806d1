# SPDX-License-Identifier: MIT
"""Algorithms and state optimisers on modules with nodes, each against its own step-by-step reference, float64."""

from __future__ import annotations

import copy

import pytest
import torch
from pc_runner import Adam, PCNetwork, PCNode
from torch import nn

from tests import nets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", nets.BODIES)
def test_ipc_moves_states_and_weights_at_once(name):
    net, x, y = nets.make(name)
    twin = copy.deepcopy(net.module)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in (net, twin))
    result = net.infer(x, y, steps=5, lr=0.1, algorithm="ipc", optimizer=mine)
    phis: dict[str, torch.Tensor] = {}
    rows = []
    for _ in range(5):
        now = nets.look(twin, x, y, phis)
        rows.append(torch.stack([e.mean() for e in now.energy.values()]).detach())
        steps = nets.moves(twin, now, y)
        theirs.zero_grad()
        (now.total / len(x)).backward()
        theirs.step()
        phis = {n: (now.phis[n] - 0.1 * g).detach().requires_grad_() for n, g in steps.items()}
    for got, wanted in zip(net.module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(result.phis, phis.values(), strict=False):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(result.energy[:5], torch.stack(rows), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="weights have moved"):
        net.backward(result)


@pytest.mark.parametrize("name", nets.BODIES)
def test_epc_is_gradient_descent_on_the_errors(name):
    net, x, y = nets.make(name)
    result = net.infer(x, y, steps=4, lr=0.05, momentum=0.5, algorithm="epc")
    errors: dict[str, torch.Tensor] = {}
    speeds: dict[str, torch.Tensor] = {}
    for _ in range(5):
        now = nets.look(net.module, x, y, {}, errors)
        free = list(errors)
        leaves = list(errors.values())
        last = {n: now.phis[n].detach() for n in free}
        grads = torch.autograd.grad(now.total, leaves)
        for n, g in zip(free, grads, strict=True):
            speeds[n] = 0.5 * speeds.get(n, 0.0) + g
            errors[n] = (errors[n] - 0.05 * speeds[n]).detach().requires_grad_()
    for got, wanted in zip(result.phis, last.values(), strict=False):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", nets.EXACT)
def test_pc_and_epc_reach_the_same_fixed_point(name):
    net, x, y = nets.make(name)
    ends = {}
    for algorithm, lr in (("pc", 0.3), ("epc", 0.1)):
        result = net.infer(x, y, steps=6000, lr=lr, tol=1e-11, algorithm=algorithm, trace=False)
        now = nets.look(net.module, x, y, _leaves(result))
        norm = torch.cat([g.flatten(1) for g in nets.moves(net.module, now, y).values()], 1).norm(dim=1).max()
        assert norm < 1e-10, (algorithm, float(norm), result.steps)
        net.backward(result)
        ends[algorithm] = (result.phis, nets.collected(net))
    for a, b in zip(ends["pc"][0], ends["epc"][0], strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-8)
    assert nets.furthest(ends["epc"][1], ends["pc"][1]) < 1e-7


def _leaves(result):
    return {
        name.removeprefix("pc."): phi.clone().requires_grad_()
        for name, phi in zip(result.names, result.phis, strict=True)
        if name != "output"
    }


@pytest.mark.parametrize("name", nets.BODIES)
def test_momentum_is_torch_sgd(name):
    net, x, y = nets.make(name)
    result = net.infer(x, y, steps=6, lr=0.05, momentum=0.7)
    now, rows = nets.settle(net.module, x, y, 6, 0.05, momentum=0.7)
    assert torch.allclose(result.energy, rows, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(result.phis, now.phis.values(), strict=True):
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", nets.BODIES)
def test_adam_is_torch_adam_on_the_directions(name):
    net, x, y = nets.make(name)
    for node in net.module.pc.values():
        node.lr_scale = 0.5
    result = net.infer(x, y, steps=6, lr=0.04, state_optimizer=Adam(betas=(0.8, 0.99)))
    now = nets.look(net.module, x, y, {})
    leaves = {n: p.detach().clone().requires_grad_() for n, p in now.phis.items() if n != "output"}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.02, betas=(0.8, 0.99))
    for _ in range(6):
        now = nets.look(net.module, x, y, leaves)
        for n, g in nets.moves(net.module, now, y).items():
            leaves[n].grad = g
        optimizer.step()
    for got, wanted in zip(result.phis, leaves.values(), strict=False):
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", nets.BODIES)
@pytest.mark.parametrize("algorithm", ["pc", "epc"])
def test_a_sample_freezes_by_itself(name, algorithm):
    """Every sample ends where it would end alone, and the largest count is reported."""
    net, x, y = nets.make(name, "euclidean")
    tol = 0.02
    together = net.infer(x, y, steps=300, lr=0.1, tol=tol, algorithm=algorithm)
    counts = []
    for b in range(len(x)):
        alone = net.infer(x[b : b + 1], y[b : b + 1], steps=300, lr=0.1, tol=tol, algorithm=algorithm)
        counts.append(alone.steps)
        for all_, one in zip(together.phis, alone.phis, strict=True):
            assert torch.allclose(all_[b : b + 1].double(), one.double(), rtol=1e-9, atol=1e-11)
    assert together.steps == max(counts) < 300
    assert len(together.energy) == 301
    assert torch.equal(together.energy[together.steps :], together.energy[-1:].expand(301 - together.steps, -1))


@pytest.mark.parametrize("name", [name for name in nets.BODIES if name != "Mlp"])  # that one is a chain
def test_tape_and_trace_agree(name):
    net, x, y = nets.make(name)
    module, traced = net.module, net.infer(x, y, steps=5)
    forward = module.forward

    def drawing(x):
        torch.rand(1)  # chance cannot be traced
        return forward(x)

    module.forward = drawing
    taped = net.infer(x, y, steps=5)
    assert (taped.backend, taped.work) == ("taped", None)
    for a, b in zip(taped.phis, traced.phis, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-14)
    assert "draws random numbers" in net.explain(x, y)


def test_algorithms_of_a_sequential_are_those_of_the_same_module():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3)).double()
    net = PCNetwork.from_sequential(chain, output="categorical")
    inside = nn.Sequential(chain[0], chain[1], PCNode("gaussian"), chain[2], PCNode("categorical"), chain[4])
    other = PCNetwork(inside, output="categorical")
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    for algorithm in ("pc", "fixed_prediction", "zil", "epc", "bp"):
        grads = []
        for one in (net, other):
            result = one.infer(x, y, steps=4, algorithm=algorithm)
            one.backward(result)
            grads.append([p.grad.clone() for p in chain.parameters()])
            chain.zero_grad()
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14), algorithm


def gaussian_diag_chain(log_var: float = 0.0) -> tuple[PCNetwork, torch.Tensor, torch.Tensor]:
    """Two hidden nodes with variances of their own, float64; a Sequential, which walks like any module here."""
    torch.manual_seed(5)
    layers = [nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)]
    net = PCNetwork.from_sequential(
        nn.Sequential(*layers).double(), energy=["gaussian_diag", "gaussian_diag", "categorical"]
    )
    for node in list(net.nodes)[:2]:
        node.log_var.data += log_var + 0.5 * torch.randn_like(node.log_var)
    return net, torch.randn(6, 7).double(), torch.randint(0, 5, (6,))


def test_ipc_moves_states_by_the_variances_that_they_started_from():
    net, x, y = gaussian_diag_chain()
    twin = copy.deepcopy(net)
    fc1, act, fc2, _, fc3 = twin.module
    variances = [node.log_var for node in list(twin.nodes)[:2]]
    mine, theirs = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin))
    result = net.infer(x, y, steps=6, lr=0.1, algorithm="ipc", optimizer=mine)
    phis = [mu.detach() for mu in (act(fc1(x)), act(fc2(act(fc1(x)))))]
    for _ in range(6):
        phis = [phi.requires_grad_() for phi in phis]
        mus = [act(fc1(x)), act(fc2(phis[0])), fc3(phis[1])]
        terms = [0.5 * ((p - m).square() * (-v).exp() + v) for p, m, v in zip(phis, mus, variances, strict=False)]
        total = sum(term.sum() for term in terms) + nn.functional.cross_entropy(mus[2], y, reduction="sum")
        grads = torch.autograd.grad(total, phis, retain_graph=True)
        theirs.zero_grad()
        (total / len(x)).backward(inputs=list(twin.parameters()))
        theirs.step()
        phis = [(phi - 0.1 * g).detach() for phi, g in zip(phis, grads, strict=True)]
    for got, wanted in zip([*result.phis[:2], *net.parameters()], [*phis, *twin.parameters()], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {"lr": 0.02, "state_optimizer": "adam"}])
def test_ipc_takes_no_step_once_every_sample_is_frozen(settings):
    net, x, y = nets.make("Dag")
    before = copy.deepcopy(net)
    optimizer, moved = torch.optim.SGD(net.parameters(), lr=1e-3), []
    optimizer.register_step_post_hook(lambda *_: moved.append(True))
    result = net.infer(x, y, steps=500, tol=0.3, algorithm="ipc", optimizer=optimizer, **settings)
    assert 0 < result.steps == len(moved) < 500
    again = torch.optim.SGD(before.parameters(), lr=1e-3)
    before.infer(x, y, steps=result.steps, tol=0.3, algorithm="ipc", optimizer=again, **settings)
    for got, wanted in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("log_var", [-2.0, -1.0, 0.0, 1.0])
def test_fixed_prediction_with_lr_1_is_backpropagation_whatever_the_variances(log_var):
    net, x, y = gaussian_diag_chain(log_var)
    weights = list(net.module.parameters())
    wanted = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), weights)
    for steps in (2, 32):  # L - 1, and more
        result = net.infer(x, y, steps=steps, algorithm="fixed_prediction")
        net.backward(result)
        for p, g in zip(weights, wanted, strict=True):
            assert float((p.grad - g).norm() / g.norm()) < 1e-10
        net.zero_grad()


def test_fixed_prediction_takes_the_plain_gradient_where_it_is_asked_for():
    net, x, y = gaussian_diag_chain(0.5)
    for node in list(net.nodes)[:2]:
        node.step = "euclidean"
    result = net.infer(x, y, steps=1, lr=0.2, algorithm="fixed_prediction")
    fc1, act, fc2, _, fc3 = net.module
    first = act(fc1(x))
    second = act(fc2(first))
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(fc3(second), y, reduction="sum"), second)
    assert torch.allclose(result.phis[1], second - 0.2 * wanted, rtol=1e-12)


@pytest.mark.parametrize("lr", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_epc_keeps_probabilities_above_their_floor(lr, dtype):
    """Projected gradient descent: what is below the floor after a move is put there."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 8), nn.Softmax(-1), nn.Linear(8, 5)).to(dtype)
    net = PCNetwork.from_sequential(layers, energy=["categorical_probs", "categorical"])
    x, y = torch.randn(6, 7, dtype=dtype), torch.randint(0, 5, (6,))
    result = net.infer(x, y, steps=8, lr=lr, algorithm="epc")
    double = copy.deepcopy(layers).double()
    mu = double[1](double[0](x.double())).detach()
    phi = mu.clone()
    for _ in range(8):
        phi.requires_grad_()
        total = (phi * (phi / mu).log() - phi + mu).sum()
        total = total + nn.functional.cross_entropy(double[2](phi), y, reduction="sum")
        phi = (phi - lr * torch.autograd.grad(total, phi)[0]).detach().clamp(min=1e-6)
    assert (phi == 1e-6).any() or lr == 0.05
    assert result.phis[0].min() >= torch.tensor(1e-6, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert torch.allclose(result.phis[0].double(), phi, rtol=tolerance, atol=tolerance * 1e-2)
