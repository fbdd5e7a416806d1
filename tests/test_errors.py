# SPDX-License-Identifier: MIT
"""What cannot be done is refused: impossible layers, index targets, precisions, backends, and states that explode."""

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

V, E = ValueError, (ValueError, TypeError)


def _refused(call: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...], argument: str) -> str:
    """One line, of the right kind, that names the argument."""
    with pytest.raises(kind, match=rf"\b{argument}\b") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"weight": ramp(5, 3), "energy": "gaussian_full"}, "weight"),
        ({"energy": "categorical", "feed": "identity", "step": "natural"}, "step"),
        ({"energy": "bernoulli", "feed": "tanh", "step": "natural"}, "step"),
        ({"energy": "gaussian", "step": "natural"}, "step"),
        ({"energy": "categorical_probs", "step": "natural"}, "step"),
        ({"energy": "gaussian", "feed": "sample"}, "feed"),
        ({"energy": "gaussian", "log_var": ramp(4)}, "log_var"),
    ],
)
def test_layers_that_cannot_be(changes: dict[str, Any], argument: str) -> None:
    """Odd width, natural steps elsewhere than the README's section 2 has them, samples and log variances without
    their family."""
    _refused(lambda: pck.Layer(**({"weight": ramp(4, 3)} | changes)), V, argument)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical_probs", "poisson"])
def test_indices_are_for_categorical_only(name: str) -> None:
    index = torch.tensor([1, 0])
    _refused(lambda: pck.layer_errors([index], [ramp(2, 3)], [name], clamped=[True]), E, "phis")
    _refused(
        lambda: pck.infer(ramp(2, 3), [pck.Layer(ramp(3, 3), activation="sigmoid", energy=name)], target=index),
        E,
        "target",
    )


@pytest.mark.parametrize("index", [[0, 4], [-1, 0], [0, 2**40]])
def test_class_indices_out_of_range(index: list[int]) -> None:
    """4 classes: the message says which indices there are."""
    phi = torch.tensor(index)
    message = _refused(lambda: pck.layer_errors([phi], [ramp(2, 4)], ["categorical"], clamped=[True]), V, "phis")
    assert "3" in message or "4" in message


@pytest.mark.parametrize("precision", ["tf32", "bf16", "bf16_delta"])
def test_float64_has_one_precision(precision: str) -> None:
    options = {"x": ramp(2, 3, dtype=torch.float64), "layers": two_layers(torch.float64), "steps": 1}
    noise = ramp(2, 2, dtype=torch.float64)
    _refused(lambda: pck.infer(**options, noise=noise, precision=precision), V, "precision")


def test_held_without_a_state() -> None:
    """Held parts keep the values in `phis`: there must be some."""
    layers = [pck.Layer(ramp(4, 3)), pck.Layer(ramp(5, 4))]
    for clamp in ([True, None], [visible(2, 4), None]):
        _refused(lambda clamp=clamp: pck.infer(ramp(2, 3), layers, clamp=clamp), V, "phis")


def test_a_failed_update_changes_no_state() -> None:
    """The last of three nodes is bad: the first two stay as they were."""
    phis, mus = [ramp(2, 3) for _ in range(3)], [ramp(2, 3) + 1 for _ in range(3)]
    with pytest.raises(V, match="energies"):
        pck.update_phi_(phis, mus, [None] * 3, ["gaussian", "laplace", "nothing"], lr=0.1)
    assert all(torch.equal(phi, ramp(2, 3)) for phi in phis)


# ---------------------------------------------------------------- a backend that cannot, a state that explodes


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
def test_an_explicit_backend_runs_or_says_why(name: str) -> None:
    arguments = {"x": ramp(2, 3), "layers": two_layers(), "noise": ramp(2, 2), "steps": 2}
    with pck.use_backend(name):
        try:
            assert pck.infer(**arguments).backend == name
        except pck.BackendUnavailable as refusal:
            message = str(refusal)
            assert name in message
            assert "\n" not in message
            assert len(message) > len(name) + 15
    assert issubclass(pck.BackendUnavailable, RuntimeError)


def _explosive() -> tuple[Tensor, list[pck.Layer], dict[str, Any]]:
    layers = [pck.Layer(10 * torch.eye(3)) for _ in range(3)]
    return torch.ones(2, 3), layers, {"target": torch.zeros(2, 3), "lr": 10.0, "steps": 200}


@pytest.mark.parametrize("trace", [False, True])
def test_divergence_is_named(trace: bool) -> None:
    x, layers, options = _explosive()
    with pytest.raises(pck.InferenceDiverged, match=r"layer|node") as caught:
        pck.infer(x, layers, trace=trace, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert ("step" in message or "move" in message) or not trace
    assert re.search(r"\d", message)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_input_that_is_not_finite(bad: float) -> None:
    x, layers, options = _explosive()
    x[1, 2] = bad
    with pytest.raises(pck.InferenceDiverged, match="1"):
        pck.infer(x, layers, trace=True, **(options | {"steps": 2, "lr": 1e-3}))


def test_a_healthy_result_checks() -> None:
    x, layers, options = _explosive()
    pck.infer(x, layers, **(options | {"steps": 3, "lr": 1e-3})).check()
