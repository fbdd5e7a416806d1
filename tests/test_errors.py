# SPDX-License-Identifier: MIT
"""What cannot be done is refused: impossible layers, index targets, precisions, backends, and states that explode."""

from __future__ import annotations

import math
import pickle
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


def _update(phis: list[Tensor], mus: list[Tensor], **options: Any) -> None:
    n = len(phis)
    pck.update_phi_(phis, mus, [None] * n, ["gaussian"] * n, lr=0.5, **options)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_what_cannot_be_written_to_is_named(backend: str) -> None:
    """Before the first node has moved."""
    with torch.inference_mode():
        inferred = torch.ones(2, 3)
    whole, zeros, row = torch.ones(2, 3), [torch.zeros(2, 3)] * 2, torch.ones(1, 3).expand(2, 3)
    with pck.use_backend(backend):
        for bad, says in ((row, "expanded"), (inferred, "inference mode"), (whole, r"not that of phis\[0\]")):
            with pytest.raises(V, match=rf"phis\[1\]: .*{says}"):
                _update([whole, bad], zeros)
        with pytest.raises(V, match=r"velocities\[1\]: .*expanded"):
            _update([whole, torch.ones(2, 3)], zeros, momentum=0.5, velocities=[torch.zeros(2, 3), row])
    assert torch.equal(whole, torch.ones(2, 3))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_prediction_in_a_states_memory_stays_what_it_was(backend: str) -> None:
    """As an identity between two nodes makes it: the nodes move at once, not one after the other."""
    below, above = torch.ones(2, 3), torch.zeros(2, 3)
    with pck.use_backend(backend):
        _update([below, above], [torch.zeros(2, 3), below.view(2, 3)])
    assert torch.equal(below, torch.full((2, 3), 0.5))
    assert torch.equal(above, torch.full((2, 3), 0.5))


def test_layers_without_features() -> None:
    for shape in ((0, 3), (3, 0)):
        _refused(lambda shape=shape: pck.Layer(torch.ones(shape)), V, "weight")
    _refused(lambda: pck.layer_energies([torch.ones(2, 0)], [torch.ones(2, 0)], ["categorical"]), V, "mus")


def test_targets_are_looked_at_where_they_take_part() -> None:
    """A masked entry may hold anything; NaN hides no other bad value."""
    mu, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    for name in ("poisson", "bernoulli", "categorical_probs"):
        mus = [mu + 0.5]
        pck.layer_energies([torch.tensor([[1.0, 0.0, -1.0]])], mus, [name], masks=[mask], clamped=[True])
        target = torch.tensor([[math.nan, -3.0, 0.0]])
        _refused(lambda name=name, mus=mus, t=target: pck.layer_energies([t], mus, [name], clamped=[True]), V, "phis")


def test_numbers_beyond_floating_point() -> None:
    layers = [pck.Layer(ramp(4, 3))]
    for name in ("lr", "momentum", "tol"):
        _refused(lambda name=name: pck.infer(ramp(2, 3), layers, **{name: 10**400}), V, name)
    _refused(lambda: pck.Layer(ramp(4, 3), lr_scale=10**400), V, "lr_scale")


def test_a_result_of_another_dtype() -> None:
    layers, wide = [pck.Layer(ramp(4, 3))], [pck.Layer(ramp(4, 3).double())]
    result = pck.infer(ramp(2, 3), layers, steps=1)
    _refused(lambda: pck.weight_grads(ramp(2, 3).double(), wide, result), V, "result")


def test_noise_that_nobody_takes() -> None:
    layers = [pck.Layer(ramp(4, 3), energy="gaussian_full")]
    message = _refused(lambda: pck.infer(ramp(2, 3), layers, noise=ramp(2, 2)), V, "noise")
    assert "wanted None" in message


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


def test_divergence_goes_through_a_pickle() -> None:
    """As from a worker process."""
    for step in (None, 3):
        error = pickle.loads(pickle.dumps(pck.InferenceDiverged(2, step)))
        assert (error.layer, error.step, str(error)) == (2, step, str(pck.InferenceDiverged(2, step)))


def test_a_healthy_result_checks() -> None:
    x, layers, options = _explosive()
    pck.infer(x, layers, **(options | {"steps": 3, "lr": 1e-3})).check()
