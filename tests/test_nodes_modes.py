# SPDX-License-Identifier: MIT
"""Modes of torch around `infer` and `backward`, tensors with a history, a result used twice, and frozen weights."""

from __future__ import annotations

import pytest
import torch
from pc_runner import PCNetwork
from pc_runner.methods import METHODS
from torch import Tensor, nn

from tests import nets

pytestmark = pytest.mark.usefixtures("one_thread")
ALGORITHMS = [name for name in METHODS if name != "ipc"]


def outcome(net: PCNetwork, result) -> list[Tensor]:
    """States, energies and gradients; the latter are cleared."""
    found = [*result.phis, result.energy, *(p.grad for p in net.parameters())]
    assert all(tensor is not None for tensor in found)
    net.zero_grad()
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("learn_inside", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_inference_mode_changes_nothing(kind, algorithm, learn_inside):
    net, x, y = nets.make_way(kind)
    result = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(result)
    wanted = outcome(net, result)
    with torch.inference_mode():
        made_there = x * 1.0
        result = net.infer(made_there, y, steps=3, algorithm=algorithm)
        net.loss(result), net.explain(made_there, y)
        if learn_inside:
            net.backward(result)
    if not learn_inside:
        net.backward(result)
    for got, one in zip(outcome(net, result), wanted, strict=True):
        assert torch.equal(got, one)
        assert not got.is_inference()
    result = net.infer((made_there,) if kind == "dag" else made_there, y, steps=3, algorithm=algorithm)
    net.backward(result)
    for got, one in zip(outcome(net, result), wanted, strict=True):
        assert torch.equal(got, one)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_autocast_changes_nothing(kind, algorithm):
    net, x, y = nets.make_way(kind, torch.float32)
    result = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(result)
    wanted = outcome(net, result)
    for inside in [(True, True), (True, False), (False, True)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside[0]):
            result = net.infer(x, y, steps=3, algorithm=algorithm)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside[1]):
            net.backward(result)
        for got, one in zip(outcome(net, result), wanted, strict=True):
            assert got.dtype == one.dtype
            assert torch.equal(got, one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_modules_of_16_bits_are_refused(kind, algorithm, dtype):
    net, x, y = nets.make_way(kind, dtype)
    with pytest.raises(TypeError, match="float32") as caught:
        net.infer(x, y, steps=3, algorithm=algorithm)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_nothing_is_learned_through_the_inputs(kind, algorithm):
    net, x, y = nets.make_way(kind)
    wanted = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(wanted)
    expected = outcome(net, wanted)
    y = nn.functional.one_hot(y, net(x).shape[-1]).to(x)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y)]
    result = net.infer(leaves[0] * 1.0, leaves[1] * 1.0, steps=3, algorithm=algorithm)
    net.backward(result)
    assert [leaf.grad for leaf in leaves] == [None, None]
    for got, one in zip(outcome(net, result)[len(result.phis) :], expected[len(result.phis) :], strict=True):
        assert torch.allclose(got, one, rtol=1e-12, atol=1e-15)
    if algorithm == "pc" and kind != "sequential":
        inner = list(zip(result.names, result.phis, strict=True))[:-1]
        given = {name: phi.clone().requires_grad_() for name, phi in inner}
        net.backward(net.infer(x, y, steps=3, phis=given))
        assert all(phi.grad is None for phi in given.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_backward_adds_as_often_as_it_is_called(kind, algorithm):
    net, x, y = nets.make_way(kind)
    result = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(result)
    once = [p.grad.clone() for p in net.parameters()]
    net.backward(result)
    net.loss(result).backward()
    for p, grad in zip(net.parameters(), once, strict=True):
        assert torch.allclose(p.grad, 3 * grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("algorithm", ["zil", "fixed_prediction", "bp"])
@pytest.mark.parametrize("kind", nets.WAYS)
def test_a_tape_of_other_weights_is_refused(kind, algorithm):
    net, x, y = nets.make_way(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    result = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(result)
    optimizer.step()
    optimizer.zero_grad()
    for call in (net.backward, net.loss):
        with pytest.raises(ValueError, match="result: wanted the weights that infer saw, got changed ones"):
            call(result)
    assert all(p.grad is None for p in net.parameters())
    net.backward(net.infer(x, y, steps=3, algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_frozen_weights_have_a_loss_and_no_gradient(kind, algorithm):
    net, x, y = nets.make_way(kind)
    net.requires_grad_(False)
    result = net.infer(x, y, steps=3, algorithm=algorithm)
    net.backward(result)
    loss = net.loss(result)
    assert (loss.shape, loss.dtype) == (torch.Size(), torch.float64)
    assert all(p.grad is None for p in net.parameters())
