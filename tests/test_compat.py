# SPDX-License-Identifier: MIT
"""The idioms of other libraries, against the loops that they would run, written here with plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from pc_runner.compat import PCLayer, PCTrainer, pc_infer
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def make(marked: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    if marked:
        layers = [layers[0], PCLayer(), *layers[1:3], PCLayer(), *layers[3:]]
    return nn.Sequential(*layers).double()


X, Y = torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 0])


def summed(out, target):
    return nn.functional.cross_entropy(out, target, reduction="sum")


def values_loop(model, x, y, loss_fn, steps, optimizer_x, p_every_step=False, optimizer_p=None):
    """Values as parameters of one optimiser, as the trainers do it: F + loss backwards into everything."""
    parts, states, v = blocks(model), [], x
    for part in parts[:-1]:
        v = part(v)
        states.append(v.detach().clone().requires_grad_())
    moving = optimizer_x(states)
    for step in range(steps + 1):
        v, energy = x, 0.0
        for part, state in zip(parts[:-1], states, strict=True):
            energy = energy + 0.5 * (state - part(v)).square().sum()
            v = state
        total = energy + loss_fn(parts[-1](v), y)
        moving.zero_grad()
        model.zero_grad()
        total.backward()
        if step < steps:
            moving.step()
            if p_every_step:
                optimizer_p.step()
    return states, total


def blocks(model):
    parts: list[nn.Sequential] = [nn.Sequential()]
    for module in model:
        if isinstance(module, PCLayer):
            parts.append(nn.Sequential())
        else:
            parts[-1].append(module)
    return parts


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_values_settle_then_weights_step_once(kind):
    model = make(True)
    twin = copy.deepcopy(model)
    settings = {"lr": 0.1, "momentum": 0.3} if kind is torch.optim.SGD else {"lr": 0.05, "betas": (0.8, 0.9)}
    trainer = PCTrainer(
        model, T=6, optimizer_x_fn=kind, optimizer_x_kwargs=settings, update_p_at="last",
        optimizer_p_fn=torch.optim.SGD, optimizer_p_kwargs={"lr": 0.1},
    )  # fmt: skip
    report = trainer.train_on_batch(X, summed, Y)
    states, total = values_loop(twin, X, Y, summed, 5, lambda s: kind(s, **settings))
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for layer, state in zip((m for m in model if isinstance(m, PCLayer)), states, strict=True):
        assert torch.allclose(layer.get_x(), state, rtol=1e-9, atol=1e-11)
    assert float(report["energy"][-1]) == pytest.approx(total.item(), rel=1e-9)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_weights_step_with_the_values():
    model = make(True)
    twin = copy.deepcopy(model)
    trainer = PCTrainer(
        model, T=4, optimizer_x_kwargs={"lr": 0.1}, optimizer_p_fn=torch.optim.SGD, optimizer_p_kwargs={"lr": 0.05}
    )
    trainer.train_on_batch(X, summed, Y)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    values_loop(twin, X, Y, summed, 4, lambda s: torch.optim.SGD(s, lr=0.1), True, plain)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["Exact", "FixedPred", "Strict"])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_one_call_fills_grad(mode, loss_fn):
    model = make(False)
    model[0].weight.grad = torch.ones(4, 5).double()
    result = pc_infer(model, loss_fn, X, Y, mode, **({"eta": 1.0, "n": 6} if mode == "FixedPred" else {}))
    got = [p.grad.clone() for p in model.parameters()]
    got[0] -= 1
    if mode != "Strict":
        wanted = torch.autograd.grad(loss_fn(model(X), Y), list(model.parameters()))
    else:
        states, parts = result.phis[:-1], list(model)
        v, energy = X, 0.0
        for part, state in zip(parts[:-1], states, strict=True):
            energy, v = energy + 0.5 * (state - part(v)).square().sum(), state
        total = energy + summed(parts[-1](v), Y)
        wanted = torch.autograd.grad(total / (4 if loss_fn.reduction == "mean" else 1), list(model.parameters()))
        assert result.steps == 20
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"update_x_at": "first"}, "update_x_at: wanted one of all"),
        ({"update_x_at": [0, 2]}, "steps in a row"),
        ({"update_p_at": [1, 3]}, "update_p_at"),
        ({"update_p_at": [9]}, "steps within 0..4"),
        ({"optimizer_x_fn": torch.optim.RMSprop}, "optimizer_x_fn"),
        ({"optimizer_x_kwargs": {"nesterov": True}}, "optimizer_x_kwargs"),
    ],
)
def test_what_has_no_counterpart_says_so(arguments, text):
    with pytest.raises(ValueError, match=text):
        PCTrainer(make(True), T=5, **arguments)
    with pytest.raises(ValueError, match="mode: wanted one of Strict"):
        pc_infer(make(False), nn.MSELoss(), X, Y, "exact")
    with pytest.raises(ValueError, match="PCLayer"):
        PCTrainer(make(False), T=5)
