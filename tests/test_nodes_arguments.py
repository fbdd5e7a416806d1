# SPDX-License-Identifier: MIT
"""Bad arguments of `infer`: one error that names infer's own argument, the same whichever path the call takes."""

from __future__ import annotations

import pytest
import torch
from pc_runner import PCNetwork, PCNode
from torch import nn

from tests import nets

pytestmark = pytest.mark.usefixtures("one_thread")


# what is passed, from (x, y, first hidden state); the error and how its message begins; {} is the first node's name
BAD = {
    "x's width": (lambda x, y, phi: {"x": x[:, :-1]}, ValueError, "x: wanted"),
    "x's dtype": (lambda x, y, phi: {"x": x.float()}, TypeError, "x: wanted"),
    "x of bfloat16": (lambda x, y, phi: {"x": x.bfloat16()}, TypeError, "x: wanted"),
    "whole x": (lambda x, y, phi: {"x": x.long()}, TypeError, "x: wanted"),
    "x in numpy": (lambda x, y, phi: {"x": x.numpy()}, TypeError, "x: wanted"),
    "x as a list": (lambda x, y, phi: {"x": x.tolist()}, TypeError, "x: wanted"),
    "no x": (lambda x, y, phi: {"x": None}, TypeError, "x: wanted"),
    "y's length": (lambda x, y, phi: {"y": y[:2]}, ValueError, "y: wanted class indices"),
    "a class too high": (lambda x, y, phi: {"y": y + 3}, ValueError, "y: wanted class indices within 0.."),
    "y of float": (lambda x, y, phi: {"y": y.double()}, ValueError, "y: wanted shape"),
    "y of int32": (lambda x, y, phi: {"y": y.int()}, TypeError, "y: wanted int64"),
    "y in numpy": (lambda x, y, phi: {"y": y.numpy()}, TypeError, "y: wanted a tensor"),
    "two targets": (lambda x, y, phi: {"y": (y, y)}, ValueError, "y: wanted 1 targets"),
    "y as a word": (lambda x, y, phi: {"y": "a"}, TypeError, "y: wanted a tensor"),
    "held width": (lambda x, y, phi: {"clamp": True, "phis": phi[:, :-1]}, ValueError, "phis[{}]: wanted shape"),
    "held dtype": (lambda x, y, phi: {"clamp": True, "phis": phi.float()}, TypeError, "phis[{}]: wanted float64"),
    "held word": (lambda x, y, phi: {"clamp": True, "phis": "a"}, TypeError, "phis[{}]: wanted a tensor"),
    "held nothing": (lambda x, y, phi: {"clamp": True}, ValueError, "phis[{}]: wanted the values"),
    "state's width": (lambda x, y, phi: {"phis": phi[:, :-1]}, ValueError, "phis[{}]: wanted"),
    "state in numpy": (lambda x, y, phi: {"phis": phi.numpy()}, TypeError, "phis[{}]: wanted a tensor"),
    "no clamp": (lambda x, y, phi: {"clamp": False}, TypeError, "clamp[{}]: wanted None, True or a bool mask"),
    "clamp's width": (
        lambda x, y, phi: {"clamp": phi[:, :-1] > 0, "phis": phi}, ValueError, "clamp[{}]: wanted a mask that broad",
    ),
    "mask's width": (lambda x, y, phi: {"masks": phi[:, :-1] > 0}, ValueError, "masks[{}]: wanted a mask that broad"),
    "mask of float": (lambda x, y, phi: {"masks": phi}, TypeError, "masks[{}]: wanted a bool tensor"),
    "noise for it": (lambda x, y, phi: {"noise": phi}, ValueError, "noise[{}]: wanted None"),
}  # fmt: skip
PER_NODE = ("phis", "clamp", "masks", "noise")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", nets.WAYS)
def test_it_is_named_alike_on_all_paths(kind, name):
    net, x, y = nets.make_way(kind)
    fine = net.infer(x, y, steps=1)
    make, error, text = BAD[name]
    arguments = make(x, y, fine.phis[0].clone())
    others = [None] * (len(fine.phis) - 1)
    arguments |= {what: [arguments[what], *others] for what in PER_NODE if what in arguments}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(error) as caught:
        net.infer(**{"x": x, "y": y, "steps": 1, **arguments})
    message = str(caught.value)
    assert message.startswith(text.format(repr(fine.names[0])))
    assert "\n" not in message
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net.infer(x, y, steps=1).phis[0], fine.phis[0])


@pytest.mark.parametrize("what", PER_NODE)
@pytest.mark.parametrize("entries", [True, 3, "abc"])
@pytest.mark.parametrize("kind", nets.WAYS)
def test_entries_come_in_a_list(kind, what, entries):
    net, x, y = nets.make_way(kind)
    with pytest.raises(TypeError, match=f"^{what}: wanted a list"):
        net.infer(x, y, **{what: entries})


@pytest.mark.parametrize("optimizer", ["adam", 0.1, torch.optim.SGD])
@pytest.mark.parametrize("kind", nets.WAYS)
def test_ipc_wants_an_optimiser_before_any_work(kind, optimizer):
    net, x, y = nets.make_way(kind)
    net.module.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(TypeError, match=r"^optimizer: wanted a torch optimiser"):
        net.infer(x, y, algorithm="ipc", optimizer=optimizer)


@pytest.mark.parametrize("chain", [True, False])
def test_noise_fits_the_node_that_feeds_on_a_sample(chain):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), PCNode("gaussian_full"), nn.Linear(3, 4), PCNode("gaussian")]
    net = PCNetwork(nn.Sequential(*layers, *[nn.LayerNorm(4)] * (not chain), nn.Linear(4, 5)), output="gaussian")
    x, y, noise = torch.randn(7, 5), torch.randn(7, 5), torch.randn(7, 3)
    assert (net.infer(x, y, noise=noise).backend in ("traced", "taped")) is not chain
    for bad, error in (
        (None, ValueError), (noise[:, :2], ValueError), (noise[:3], ValueError), (noise.double(), TypeError),
    ):  # fmt: skip
        for entries in (bad, {"1": bad}):
            with pytest.raises(error, match=r"^noise"):
                net.infer(x, y, noise=entries)
    with pytest.raises(ValueError, match=r"^noise\['3'\]: wanted None"):
        net.infer(x, y, noise={"1": noise, "3": noise})


def test_targets_of_several_outputs_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(3, 4), nn.Linear(4, 2), PCNode("gaussian")

        def forward(self, x):
            h = self.n(self.a(x))
            return self.b(h), h.mean(1, keepdim=True)

    net, x = PCNetwork(Two(), output=["categorical", "gaussian"]), torch.randn(5, 3)
    y = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 1)
    for bad, text in (((y[0] + 2, y[1]), r"^y\[0\]: wanted class"), ((y[0], y[1][:2]), r"^y\[1\]: wanted shape")):
        with pytest.raises(ValueError, match=text):
            net.infer(x, bad)


def test_errors_of_the_modules_own_are_left_alone():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = PCNode("gaussian")

        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        PCNetwork(Own()).infer(torch.ones(2, 3))
