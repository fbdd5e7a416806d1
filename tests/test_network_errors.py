# SPDX-License-Identifier: MIT
"""PCNetwork: what is refused, and how the message names it and the remedy."""

from __future__ import annotations

import math

import pytest
import torch
from pc_runner import PCNetwork, PCNode
from torch import nn

import pc_kernels as pck


def softmax() -> nn.Module:
    return nn.Softmax(dim=-1)


LINEAR = nn.Linear(3, 3)
REFUSED = {
    "dropout": ([LINEAR, nn.Dropout(0.5)], "module[1]: Dropout", "remove it"),
    "conv": ([nn.Conv2d(1, 1, 3), LINEAR], "module[0]: Conv2d", "wanted nn.Linear"),
    "batch norm": ([LINEAR, nn.BatchNorm1d(3)], "module[1]: BatchNorm1d", "wanted nn.Linear"),
    "two activations": ([LINEAR, nn.Tanh(), nn.ReLU()], "module[2]: ReLU", "put an nn.Linear"),
    "activation first": ([nn.Tanh(), LINEAR], "module[0]: Tanh", "apply it to x"),
    "leaky slope": ([LINEAR, nn.LeakyReLU(0.2)], "module[1]: LeakyReLU", "negative_slope=0.01"),
    "gelu tanh": ([LINEAR, nn.GELU(approximate="tanh")], "module[1]: GELU", "approximate='none'"),
    "hardtanh limits": ([LINEAR, nn.Hardtanh(-2, 2)], "module[1]: Hardtanh", "max_val=1"),
    "relu6": ([LINEAR, nn.ReLU6()], "module[1]: ReLU6", "wanted nn.Linear"),
    "softplus beta": ([LINEAR, nn.Softplus(beta=2)], "module[1]: Softplus", "beta=1"),
    "softmax dim": ([LINEAR, nn.Softmax(dim=0)], "module[1]: Softmax", "dim=-1"),
    "softmax no dim": ([LINEAR, nn.Softmax()], "module[1]: Softmax", "dim=-1"),
    "late flatten": ([LINEAR, nn.Flatten()], "module[1]: Flatten", "remove it"),
    "flatten dims": ([nn.Flatten(0), LINEAR], "module[0]: Flatten", "start_dim=1"),
    "lazy": ([nn.LazyLinear(3)], "module[0]: LazyLinear", "run lazy layers once"),
    "weight norm": ([nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))], "module[0]", "parametrizations"),
    "widths": ([LINEAR, nn.Linear(4, 2)], "module[1]: Linear", "in_features=3"),
    "nested": ([LINEAR, nn.Sequential(nn.Tanh(), nn.Dropout())], "module[1.1]: Dropout", "remove it"),
    "a node inside": ([LINEAR, PCNode("gaussian")], "module", "energy=[...]"),
    "nothing": ([], "module", "add the linear layers"),
    "custom": ([LINEAR, nn.ModuleList([nn.Tanh()])], "module[1]: ModuleList", "wanted nn.Linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_modules_without_a_place_in_a_chain(name):
    modules, position, remedy = REFUSED[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        PCNetwork.from_sequential(nn.Sequential(*modules))
    message = str(caught.value)
    assert message.startswith(position)
    assert remedy in message
    assert "\n" not in message


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), softmax())


NODE = PCNode("gaussian")
BAD_ENERGIES = {
    "unknown mode": ({"energy": "KL"}, ValueError, "wanted 'kl', 'gaussian' or a list"),
    "too few": ({"energy": ["gaussian"]}, ValueError, "wanted 2 entries, one per nn.Linear, got 1"),
    "too many": ({"energy": ["gaussian"] * 3}, ValueError, "got 3"),
    "unknown family": ({"energy": ["gaussian", "cauchy"]}, ValueError, "gaussian_diag"),
    "no name": ({"energy": [None, "gaussian"]}, TypeError, "wanted names and PCNodes, got NoneType"),
    "both": ({"energy": ["gaussian"] * 2, "output": "categorical"}, ValueError, "the last entry is the output's"),
    "one node twice": ({"energy": [NODE, NODE]}, ValueError, "make a second one"),
    "logits inside": ({"energy": ["categorical", "categorical"]}, ValueError, "module[0]: wanted nn.Softmax"),
    "sigmoid missing": ({"energy": ["bernoulli", "categorical"]}, ValueError, "wanted nn.Sigmoid"),
    "sample inside": ({"energy": ["gaussian_full", "categorical"]}, ValueError, "only its output"),
    "other feed": ({"energy": [PCNode("gaussian", feed="relu"), "gaussian"]}, ValueError, "got tanh"),
    "probabilities of tanh": ({"energy": ["categorical_probs", "gaussian"]}, ValueError, "mu > 0"),
    "wrong variance": ({"energy": [PCNode("gaussian_diag", log_var=torch.zeros(3)), "gaussian"]}, ValueError, "(4,)"),
    "unknown output": ({"output": "softmax"}, ValueError, "categorical"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ENERGIES)
def test_energies_that_do_not_fit(name):
    arguments, error, text = BAD_ENERGIES[name]
    with pytest.raises(error) as caught:
        PCNetwork.from_sequential(chain(), **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cauchy",), "energy"),
        (("gaussian", "softmin"), "feed"),
        (("gaussian", "sample"), "feed"),
        (("gaussian", None, "natural"), "step"),
        (("categorical", "identity", "natural"), "step"),
        (("gaussian", None, None, -1.0), "lr_scale"),
        (("gaussian", None, None, math.nan), "lr_scale"),
        (("gaussian", None, None, 1.0, torch.zeros(3)), "log_var"),
        (("gaussian_diag", None, None, 1.0, torch.zeros(3, dtype=torch.int64)), "log_var"),
        (("gaussian_diag", None, None, 1.0, [0.0]), "log_var"),
        (("gaussian", None, None, 1.0, None, torch.ones(3)), "mask"),
        (("gaussian", None, None, 1.0, None, [True]), "mask"),
    ],
)
def test_bad_nodes(arguments, text):
    with pytest.raises((ValueError, TypeError), match=text):
        PCNode(*arguments)


def test_modules_without_nodes_are_sent_to_from_sequential():
    with pytest.raises(ValueError, match="from_sequential"):
        PCNetwork(chain())
    with pytest.raises(TypeError, match=r"wanted a torch\.nn\.Sequential, got Linear"):
        PCNetwork.from_sequential(nn.Linear(2, 2))


X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
BAD_CALLS = {
    "no optimiser": ({"algorithm": "ipc"}, ValueError, "optimizer: wanted a torch optimiser"),
    "zil's lr": ({"algorithm": "zil", "lr": 0.1}, ValueError, "lr: wanted 1"),
    "unknown": ({"algorithm": "adam"}, ValueError, "one of pc, ipc, fixed_prediction, zil, epc, bp"),
    "state optimiser": ({"state_optimizer": "rmsprop"}, ValueError, "state_optimizer"),
    "optimiser": ({"optimizer": object()}, ValueError, "optimizer: wanted None"),
    "steps": ({"steps": -1}, ValueError, "steps"),
    "lr": ({"lr": math.inf}, ValueError, "lr"),
    "masks": ({"masks": [None]}, ValueError, "wanted 2 entries"),
    "bp states": ({"algorithm": "bp", "phis": [None, None]}, ValueError, "phis"),
    "bp clamp": ({"algorithm": "bp", "clamp": [None, None]}, ValueError, "clamp"),
    "bp noise": ({"algorithm": "bp", "noise": torch.zeros(2, 2)}, ValueError, "noise"),
    "bp precision": ({"algorithm": "bp", "precision": "bf16"}, ValueError, "precision"),
    "bp masks": (
        {"algorithm": "bp", "masks": [torch.ones(4, dtype=torch.bool), None]}, ValueError, "hidden nodes",
    ),
    "width": ({"x": torch.zeros(2, 5)}, ValueError, "column"),
    "dtype": ({"x": torch.zeros(2, 3).double()}, TypeError, "float64"),
    "class": ({"y": torch.tensor([0, 2])}, ValueError, "0..1"),
    "class, bp": ({"y": torch.tensor([0, 2]), "algorithm": "bp"}, ValueError, "0..1"),
    "target": ({"y": torch.zeros(2, 3)}, ValueError, "(2, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    arguments, error, text = BAD_CALLS[name]
    net = PCNetwork.from_sequential(chain())
    with pytest.raises(error) as caught:
        net.infer(**{"x": X, "y": Y, **arguments})
    assert text in str(caught.value)


@pytest.mark.parametrize("algorithm", ["pc", "bp"])
def test_indices_need_a_categorical_output(algorithm):
    net = PCNetwork.from_sequential(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    with pytest.raises((ValueError, TypeError), match=r"^y: wanted"):
        net.infer(X, Y, algorithm=algorithm)


def test_backward_wants_a_result_of_this_network():
    net, other = PCNetwork.from_sequential(chain()), PCNetwork.from_sequential(chain())
    with pytest.raises(TypeError, match="what infer returned"):
        net.backward(X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another network"):
        net.backward(other.infer(X, Y))
    with pytest.raises(ValueError, match="pass y to infer"):
        net.backward(net.infer(X, algorithm="bp"))


def test_divergence_is_reported():
    net = PCNetwork.from_sequential(chain())
    with pytest.raises(pck.InferenceDiverged, match="Lower lr"):
        net.infer(X + torch.inf, Y)
