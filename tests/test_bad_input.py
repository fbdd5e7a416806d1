# SPDX-License-Identifier: MIT
"""Bad input: one line that names the argument, raised before anything is changed. At least three cases per argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import ramp, two_layers, visible
from torch import Tensor

import pc_kernels as pck

V, T, E = ValueError, TypeError, (ValueError, TypeError)
NAN, INF = math.nan, math.inf
PARTNERS = {"phis": ["mus"], "x": ["layers"]}  # lengths, shapes or dtypes that disagree are the fault of either
Kind = type[Exception] | tuple[type[Exception], ...]


def _hidden_row(*shape: int) -> Tensor:
    mask = visible(*shape)
    mask[1] = False
    return mask


def _errors_arguments() -> dict[str, Any]:
    """Two nodes: categorical of width 4, gaussian_diag of width 6; three samples."""
    return {
        "phis": [ramp(3, 4), ramp(3, 6)],
        "mus": [ramp(3, 4) + 0.1, ramp(3, 6) + 0.1],
        "energies": ["categorical", "gaussian_diag"],
        "log_vars": [None, ramp(6)],
        "masks": [visible(3, 4), None],
        "clamped": [None, visible(3, 6)],
    }


def _update_arguments() -> dict[str, Any]:
    return _errors_arguments() | {
        "feedback": [ramp(3, 4), None],
        "lr": 0.1,
        "momentum": 0.5,
        "velocities": [ramp(3, 4), ramp(3, 6)],
        "step_rules": ["natural", "euclidean"],
        "lr_scales": [1.0, 0.5],
    }


def _layer_arguments() -> dict[str, Any]:
    return {
        "weight": ramp(4, 3),
        "bias": ramp(4),
        "activation": "tanh",
        "energy": "gaussian_diag",
        "feed": "identity",
        "log_var": ramp(4),
        "step": "euclidean",
        "lr_scale": 1.0,
    }


def _infer_arguments() -> dict[str, Any]:
    return {
        "x": ramp(2, 3),
        "layers": two_layers(),
        "target": torch.tensor([4, 0]),
        "phis": [ramp(2, 4), None],
        "steps": 3,
        "lr": 0.1,
        "momentum": 0.0,
        "tol": None,
        "clamp": [visible(2, 4), None],
        "masks": [None, visible(2, 5)],
        "precision": "fp32",
        "noise": ramp(2, 2),
        "trace": True,
    }


def _grads_arguments() -> dict[str, Any]:
    options = _infer_arguments()
    return {name: options[name] for name in ("x", "layers")} | {"result": pck.infer(**options), "reduction": "sum"}


def _only_name(name: str) -> None:
    with pck.use_backend(name):
        pass


LISTS = [  # entries of layer_errors, layer_energies and update_phi_ alike
    ("phis", None, T),
    ("phis", ramp(3, 4), T),
    ("phis", [], E),
    ("phis", [ramp(3, 4)], V),
    ("phis", [ramp(3, 4), "state"], T),
    ("phis", [ramp(3, 5), ramp(3, 6)], V),
    ("phis", [ramp(2, 4), ramp(3, 6)], V),
    ("phis", [ramp(3, 4, dtype=torch.float64), ramp(3, 6)], E),
    ("phis", [ramp(3, 4).long(), ramp(3, 6)], E),
    ("mus", None, T),
    ("mus", [ramp(3, 4)], V),
    ("mus", [ramp(3, 4), ramp(2, 6)], V),
    ("mus", [ramp(3, 4), torch.ones(3, 6, dtype=torch.int64)], E),
    ("mus", [ramp(3, 4), [0.0] * 6], T),
    ("energies", ["categorical"], V),
    ("energies", ["categorical", "normal"], V),
    ("energies", ["categorical", 3], E),
    ("energies", "gaussian", E),
    ("log_vars", [None, None], V),
    ("log_vars", None, V),
    ("log_vars", [None], V),
    ("log_vars", [None, ramp(5)], V),
    ("log_vars", [None, ramp(6, dtype=torch.float64)], E),
    ("log_vars", [None, 0.5], T),
    ("masks", [visible(3, 4)], V),
    ("masks", [visible(3, 5), None], V),
    ("masks", [ramp(3, 4), None], E),
    ("masks", [_hidden_row(3, 4), None], V),
    ("masks", visible(3, 4), T),
    ("clamped", [None], V),
    ("clamped", [None, visible(2, 6)], V),
    ("clamped", [None, ramp(3, 6)], E),
    ("clamped", ["all", None], T),
]
UPDATES = [
    ("feedback", ramp(3, 4), T),
    ("feedback", [ramp(3, 4)], V),
    ("feedback", [ramp(3, 5), None], V),
    ("feedback", [ramp(3, 4, dtype=torch.float64), None], E),
    ("lr", NAN, V),
    ("lr", -0.1, V),
    ("lr", INF, V),
    ("lr", "fast", T),
    ("momentum", 1.0, V),
    ("momentum", -0.1, V),
    ("momentum", NAN, V),
    ("momentum", None, T),
    ("velocities", None, V),
    ("velocities", [ramp(3, 4)], V),
    ("velocities", [ramp(3, 4), ramp(3, 5)], V),
    ("velocities", [ramp(3, 4), ramp(3, 6, dtype=torch.float64)], E),
    ("step_rules", ["natural"], V),
    ("step_rules", ["natural", "natural"], V),
    ("step_rules", ["newton", "euclidean"], V),
    ("step_rules", "natural", E),
    ("lr_scales", [1.0], V),
    ("lr_scales", [1.0, NAN], V),
    ("lr_scales", [-1.0, 1.0], V),
    ("lr_scales", [1.0, "one"], T),
]
LAYERS = [
    ("weight", None, T),
    ("weight", [[1.0]], T),
    ("weight", ramp(4), V),
    ("weight", ramp(4, 3).long(), E),
    ("bias", ramp(5), V),
    ("bias", 1.0, T),
    ("bias", ramp(4, 1), V),
    ("bias", ramp(4, dtype=torch.float64), E),
    ("activation", "swish", V),
    ("activation", torch.tanh, E),
    ("activation", None, E),
    ("energy", "normal", V),
    ("energy", 1, E),
    ("energy", None, E),
    ("feed", "sampled", V),
    ("feed", 1, E),
    ("feed", "sample", V),
    ("log_var", None, V),
    ("log_var", ramp(5), V),
    ("log_var", 0.5, T),
    ("log_var", ramp(4, dtype=torch.float64), E),
    ("step", "natural", V),
    ("step", "newton", V),
    ("step", 1, E),
    ("lr_scale", -1.0, V),
    ("lr_scale", NAN, V),
    ("lr_scale", INF, V),
    ("lr_scale", "slow", T),
]
INFERS = [
    ("x", None, T),
    ("x", ramp(2, 4), V),
    ("x", ramp(3), V),
    ("x", ramp(2, 3, dtype=torch.float64), E),
    ("x", ramp(2, 3).long(), E),
    ("layers", None, T),
    ("layers", [], E),
    ("layers", [ramp(4, 3), ramp(5, 2)], T),
    ("layers", pck.Layer(ramp(4, 3)), T),
    ("layers", [pck.Layer(ramp(4, 3)), pck.Layer(ramp(5, 3))], V),
    ("target", torch.tensor([5, 0]), V),
    ("target", torch.tensor([-1, 0]), V),
    ("target", torch.tensor([1, 2, 3]), V),
    ("target", ramp(2, 4), V),
    ("target", [4, 0], T),
    ("target", torch.tensor([1, 0], dtype=torch.int32), E),
    ("target", ramp(2, 5, dtype=torch.float64), E),
    ("phis", [ramp(2, 4)], V),
    ("phis", [ramp(2, 5), None], V),
    ("phis", [ramp(2, 4, dtype=torch.float64), None], E),
    ("phis", ramp(2, 4), T),
    ("steps", -1, V),
    ("steps", 1.5, T),
    ("steps", "3", T),
    ("steps", None, T),
    ("lr", NAN, V),
    ("lr", -1.0, V),
    ("lr", INF, V),
    ("lr", None, T),
    ("momentum", 1.0, V),
    ("momentum", -0.5, V),
    ("momentum", "heavy", T),
    ("tol", -1e-3, V),
    ("tol", NAN, V),
    ("tol", "small", T),
    ("clamp", [None], V),
    ("clamp", [visible(2, 3), None], V),
    ("clamp", [ramp(2, 4), None], E),
    ("clamp", ["all", None], T),
    ("masks", [None], V),
    ("masks", [None, visible(2, 4)], V),
    ("masks", [None, _hidden_row(2, 5)], V),
    ("masks", [None, ramp(2, 5)], E),
    ("precision", "fp16", V),
    ("precision", None, E),
    ("precision", 32, E),
    ("noise", None, V),
    ("noise", ramp(2, 4), V),
    ("noise", [None, None], V),
    ("noise", [ramp(2, 2)], V),
    ("noise", "normal", T),
    ("noise", ramp(2, 2, dtype=torch.float64), E),
    ("trace", "yes", T),
    ("trace", 2, T),
    ("trace", None, T),
]
GRADS = [
    ("x", None, T),
    ("x", ramp(3, 3), V),
    ("x", ramp(2, 4), V),
    ("x", ramp(2, 3, dtype=torch.float64), E),
    ("layers", None, T),
    ("layers", two_layers()[:1], V),
    ("layers", [pck.Layer(ramp(4, 3)), pck.Layer(ramp(6, 4))], V),
    ("result", None, T),
    ("result", [ramp(2, 4)], T),
    ("result", {}, T),
    ("reduction", "max", V),
    ("reduction", None, E),
    ("reduction", 1, E),
]
TABLE: list[tuple[Callable, Callable[[], dict[str, Any]], list[tuple[str, Any, Kind]]]] = [
    (pck.layer_errors, _errors_arguments, LISTS),
    (pck.layer_energies, _errors_arguments, LISTS),
    (pck.update_phi_, _update_arguments, LISTS + UPDATES),
    (pck.Layer, _layer_arguments, LAYERS),
    (pck.infer, _infer_arguments, INFERS),
    (pck.explain, _infer_arguments, INFERS),
    (pck.weight_grads, _grads_arguments, GRADS),
    (
        _only_name,
        lambda: {"name": "reference"},
        [("name", "fast", V), ("name", None, E), ("name", 3, E), ("name", "", V)],
    ),
]
CASES = [
    pytest.param(function, arguments, *case, id=f"{function.__name__}-{case[0]}-{number}")
    for function, arguments, cases in TABLE
    for number, case in enumerate(cases)
]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for entry in value for t in _tensors(entry)] if isinstance(value, (list, tuple)) else []


def _refused(call: Callable[[], object], kind: Kind, argument: str) -> str:
    """One line, of the right kind, that names the argument (where two disagree, one of the two)."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    names = [argument, *PARTNERS.get(argument, ())]
    assert any(re.search(rf"\b{name}\b", message) for name in names), message
    assert "\n" not in message
    assert len(message) > len(argument) + 15, message
    return message


@pytest.mark.parametrize(("function", "arguments"), [row[:2] for row in TABLE])
def test_the_untouched_arguments_are_good(function: Callable, arguments: Callable[[], dict[str, Any]]) -> None:
    function(**arguments())


@pytest.mark.parametrize(("function", "arguments", "name", "value", "kind"), CASES)
def test_refused(function: Callable, arguments: Callable, name: str, value: Any, kind: Kind) -> None:
    given = arguments() | {name: value}
    before = [tensor.clone() for argument in given.values() for tensor in _tensors(argument)]
    _refused(lambda: function(**given), kind, name)
    after = [tensor for argument in given.values() for tensor in _tensors(argument)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_argument_has_three_cases() -> None:
    for function, arguments, cases in TABLE:
        for name in arguments():
            assert sum(case[0] == name for case in cases) >= 3, (function, name)


@pytest.mark.parametrize(
    ("function", "arguments", "name", "value", "valid"),
    [
        (pck.layer_errors, _errors_arguments, "energies", ["categorical", "normal"], pck.ENERGIES),
        (pck.update_phi_, _update_arguments, "step_rules", ["newton", "euclidean"], ("natural", "euclidean")),
        (pck.Layer, _layer_arguments, "activation", "swish", pck.ACTIVATIONS),
        (pck.Layer, _layer_arguments, "energy", "normal", pck.ENERGIES),
        (pck.Layer, _layer_arguments, "feed", "swish", (*pck.ACTIVATIONS, "sample")),
        (pck.Layer, _layer_arguments, "step", "newton", ("natural", "euclidean")),
        (pck.infer, _infer_arguments, "precision", "fp16", ("fp32", "tf32", "bf16", "bf16_delta")),
        (pck.weight_grads, _grads_arguments, "reduction", "max", ("mean", "sum")),
        (_only_name, dict, "name", "fast", ("reference", "cpp", "triton", "cuda", "auto")),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(
    function: Callable, arguments: Callable, name: str, value: Any, valid: tuple[str, ...]
) -> None:
    message = _refused(lambda: function(**(arguments() | {name: value})), V, name)
    bad = value if isinstance(value, str) else next(v for v in value if v not in valid)
    assert repr(bad) in message or f'"{bad}"' in message
    assert [word for word in valid if word not in message] == []
