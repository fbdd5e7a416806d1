# SPDX-License-Identifier: MIT
"""Modules with nodes: states, energies and gradients against autograd of F, float64."""

from __future__ import annotations

import pytest
import torch

from tests import nets, truth

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


@pytest.mark.parametrize("algorithm", ["zil", "fixed_prediction", "bp"])
@pytest.mark.parametrize("name", nets.BODIES)
def test_these_are_backpropagation_for_gaussian_hidden_nodes(algorithm, name, capsys):
    net, x, y = nets.make(name)
    result = net.infer(x, y, algorithm=algorithm)
    net.backward(result)
    got, wanted = nets.collected(net), nets.backprop(net, x, y)
    if name in nets.EXACT or algorithm == "bp":
        assert nets.furthest(got, wanted) < 1e-10
    else:
        with capsys.disabled():
            print(f" {algorithm} {name}: cosine with backpropagation {nets.cosine(got, wanted):.4f}", end="")
    assert net.infer(x, y, algorithm="zil").steps == 3  # the longest way from a node to the output


@pytest.mark.parametrize("name", nets.BODIES)
def test_zil_moves_every_node_once_in_the_order_of_its_distance(name):
    """The step-by-step reference: Jacobi moves with lr 1, dW_l taken when node l has moved once (exact in a DAG, too,
    since what a node is predicted from lies further from the output)."""
    net, x, y = nets.make(name)
    forward = nets.look(net.module, x, y, {})
    phis = {n: mu.detach().clone().requires_grad_() for n, mu in forward.mus.items() if n != "output"}
    inner, grads = list(phis), {n: torch.zeros_like(p) for n, p in net.module.named_parameters()}
    for node in ["output", *reversed(inner)]:
        if node != "output":  # nodes behind it have moved, those before it have not
            at_forward = {n: forward.phis[n].detach().requires_grad_() for n in inner}
            phis[node] = zil_move(net, x, y, node, at_forward, phis)
        now = nets.look(net.module, x, y, {**{n: forward.phis[n] for n in inner}, node: phis.get(node)})
        values = list(net.module.parameters())
        found = torch.autograd.grad(now.energy[node].sum() / len(x), values, allow_unused=True)
        for total, g in zip(grads.values(), found, strict=True):
            total += 0 if g is None else g
    net.backward(net.infer(x, y, algorithm="zil"))
    assert nets.furthest(nets.collected(net), grads) < 1e-10


def zil_move(net, x, y, node, at_forward, phis):
    """phi - (dF/dphi or, natural, dF/dv): only its own and the energies of nodes already moved, each at the values
    that its prediction was made from."""
    total = 0.0
    now = nets.look(net.module, x, y, at_forward)
    for child in now.energy:
        if child != node:
            moved = nets.look(net.module, x, y, {**at_forward, child: phis[child]} if child != "output" else at_forward)
            natural = net.module.families[node] == "categorical"
            leaf = moved.values[node] if natural else moved.phis[node]
            (g,) = torch.autograd.grad(moved.energy[child].sum(), leaf, allow_unused=True)
            total = total + (0.0 if g is None else g)
    mask = nets.mask_of(net.module, node)
    step = total if mask is None else total.masked_fill(~mask, 0.0)
    return (now.phis[node] - step).detach()


@pytest.mark.parametrize("name", nets.BODIES)
def test_fixed_prediction_step_by_step(name):
    net, x, y = nets.make(name)
    module = net.module
    first = nets.look(module, x, y, {})
    phis = {n: p.detach().clone() for n, p in first.phis.items() if n != "output"}
    for _ in range(3):
        errors = fixed_errors(module, first, {**phis, "output": y})
        step = {}
        for n in phis:
            natural = module.families[n] == "categorical"
            leaf = first.values[n] if natural else first.phis[n]
            back = torch.autograd.grad(list(first.mus.values()), leaf, errors, retain_graph=True, allow_unused=True)[0]
            own = phis[n] - first.mus[n].detach()  # dE/dphi of a Gaussian, and the natural step's own part
            mask = nets.mask_of(module, n)
            g = own + back
            step[n] = g if mask is None else g.masked_fill(~mask, 0.0)
        phis = {n: phi - 0.5 * step[n] for n, phi in phis.items()}
    result = net.infer(x, y, algorithm="fixed_prediction", lr=0.5, steps=3)
    for got, wanted in zip(result.phis, phis.values(), strict=False):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    net.backward(result)
    errors = fixed_errors(module, first, {**phis, "output": y})
    grads = torch.autograd.grad(list(first.mus.values()), list(module.parameters()), [e / len(x) for e in errors])
    assert nets.furthest(nets.collected(net), dict(zip(dict(module.named_parameters()), grads, strict=True))) < 1e-10


def fixed_errors(module, first, phis):
    found = []
    for n, mu in first.mus.items():
        family = module.output if n == "output" else module.families[n]
        held = n == "output"
        phi = phis[n]
        phi = torch.nn.functional.one_hot(phi, mu.shape[-1]).to(mu) if not phi.is_floating_point() else phi
        found.append(truth.errors(family, phi, mu.detach(), None, nets.mask_of(module, n), clamped=held).grad_mu)
    return found
