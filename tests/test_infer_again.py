# SPDX-License-Identifier: MIT
"""`infer` again and again: what is kept from call to call (descriptions, plans, compiled launches) is never taken for
another call's. Each call is compared with the reference, which keeps nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import cuda_host
import inputs
import pytest
import torch
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import cuda_infer, cuda_recordings

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS, BATCH = (5, 8, 6), 4


@pytest.fixture
def recordings(cuda_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two launches a step in CUDA C++, from the second call of a kind on by a recording, of whatever size."""
    if cuda_host.CXX is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cuda_recordings, "serves", lambda args: True)
    with pck.use_backend("cuda"), cuda_infer.use_schedule(cuda_infer.LAYERS):
        yield


@pytest.fixture(autouse=True, params=["triton_interpreter", "recordings"])
def keeps(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backends that keep something."""
    if request.param == "triton_interpreter":
        pytest.importorskip("triton", reason="triton is not installed")
    request.getfixturevalue(request.param)
    pck.clear_plans()
    yield
    pck.clear_plans()


def _layers(gen: torch.Generator, energy: str = "categorical", **options: Any) -> list[pck.Layer]:
    weights = [inputs.normal(gen, wide, below).float() for below, wide in pairwise(DIMS)]
    last = {"activation": "softmax"} if energy == "categorical_probs" else {}
    hidden = pck.Layer(weights[0], inputs.normal(gen, DIMS[1]).float(), activation="tanh", **options)
    return [hidden, pck.Layer(weights[1], energy=energy, **last)]


def _call(gen: torch.Generator, **changed: Any) -> dict[str, Any]:
    labels = torch.arange(BATCH) % DIMS[-1]
    return {"x": inputs.normal(gen, BATCH, DIMS[0]).float(), "target": labels, "steps": 3, "trace": True} | changed


def _agrees(layers: list[pck.Layer], call: dict[str, Any]) -> list[Tensor]:
    """The states and deltas, the same as the reference's."""
    x, options = call["x"], {key: value for key, value in call.items() if key != "x"}
    got = pck.infer(x, layers, **options)
    with pck.use_backend("reference"):
        want = pck.infer(x, layers, **options)
    for mine, right in zip([*got.phis, *got.deltas, got.energy], [*want.phis, *want.deltas, want.energy], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert (got.steps, got.work, got.free, got.source) == (want.steps, want.work, want.free, want.source)
    return [*got.phis, *got.deltas]


def test_the_values_of_weights_are_read_anew(gen: torch.Generator) -> None:
    layers, call = _layers(gen), _call(gen)
    before = _agrees(layers, call)
    for change in (layers[0].weight, layers[0].bias, layers[1].weight, call["x"]):
        assert change is not None
        change.mul_(-0.5)
        after = _agrees(layers, call)
        assert not torch.equal(before[-1], after[-1])
        before = after


def test_the_values_of_flags_states_and_labels_are_read_anew(gen: torch.Generator) -> None:
    hidden = torch.arange(DIMS[1])
    mask, hold, state = hidden > 1, hidden % 2 == 0, inputs.normal(gen, BATCH, DIMS[1]).float()
    call = _call(gen, masks=[mask, None], clamp=[hold, None], phis=[state, None])
    layers = _layers(gen)
    before = _agrees(layers, call)
    for change in (mask.copy_, hold.copy_, call["target"].copy_, state.copy_):
        change(change.__self__.roll(1, 0))
        after = _agrees(layers, call)
        assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        before = after


def _changes() -> dict[str, Callable[[dict[str, Any], torch.Generator], dict[str, Any]]]:
    hidden = (BATCH, DIMS[1])
    half = torch.arange(DIMS[1]) % 2 == 0
    return {
        "the batch": lambda call, gen: {"x": call["x"][:3], "target": call["target"][:3]},
        "lr": lambda call, gen: {"lr": 0.03},
        "momentum": lambda call, gen: {"momentum": 0.5},
        "steps": lambda call, gen: {"steps": 2},
        "the target's kind": lambda call, gen: {"target": torch.full((BATCH, DIMS[-1]), 1 / DIMS[-1])},
        "no target": lambda call, gen: {"target": None},
        "a given state": lambda call, gen: {
            "phis": [inputs.normal(gen, *hidden).float(), None],
        },
        "a mask": lambda call, gen: {"masks": [half.to(call["x"].device), None]},
        "a hold": lambda call, gen: {
            "phis": [inputs.normal(gen, *hidden).float(), None], "clamp": [half.to(call["x"].device), None],
        },
        "a clamp": lambda call, gen: {"phis": [inputs.normal(gen, *hidden).float(), None], "clamp": [True, None]},
        "strides": lambda call, gen: {"x": call["x"].repeat_interleave(2, 1)[:, ::2]},
        "an odd address": lambda call, gen: {"x": torch.cat([torch.ones(1), call["x"].flatten()])[1:].view(4, 5)},
    }  # fmt: skip


@pytest.mark.parametrize("what", _changes())
def test_a_changed_argument_is_another_call(what: str, gen: torch.Generator) -> None:
    """Twice each, so that the second is served by what the first left; then as it was, which must give the same."""
    layers, call = _layers(gen), _call(gen)
    first = _agrees(layers, call)
    other = call | _changes()[what](call, gen)
    for _ in range(2):
        _agrees(layers, other)
    assert all(torch.equal(a, b) for a, b in zip(first, _agrees(layers, call), strict=True))


@pytest.mark.parametrize(
    "changed",
    [{"activation": "relu"}, {"lr_scale": 0.25}, {"feed": "tanh"}, {"bias": None}, {"energy": "bernoulli"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_changed_layer_is_another_call(changed: dict[str, Any], gen: torch.Generator) -> None:
    layers, call = _layers(gen), _call(gen)
    _agrees(layers, call)
    if "energy" in changed:
        changed = {**changed, "activation": "identity", "feed": "sigmoid", "step": "natural"}
    _agrees([replace(layers[0], **changed), layers[1]], call)


def test_checks_are_made_at_every_call(gen: torch.Generator) -> None:
    """Also of what just passed: of a wrong dtype, of labels that are out of range now."""
    layers, call = _layers(gen), _call(gen)
    _agrees(layers, call)
    with pytest.raises(TypeError, match=r"layers\[0\]\.weight: wanted float64"):
        pck.infer(call["x"].double(), layers, target=call["target"])
    with pytest.raises(ValueError, match=r"layers\[1\]\.weight: wanted 8 columns"):
        pck.infer(call["x"], [layers[0], pck.Layer(layers[1].weight[:, :7])], steps=1)
    with pytest.raises(ValueError, match=r"layers\[0\]\.weight: wanted 5 columns, got .*; x passes 5 features on"):
        pck.infer(call["x"], [pck.Layer(torch.ones(8, 4)), layers[1]], steps=1)
    call["target"][0] = DIMS[-1]
    with pytest.raises(ValueError, match="target: wanted class indices"):
        _agrees(layers, call)


def test_layers_that_were_collected_leave_nothing(gen: torch.Generator) -> None:
    """New layers may lie where old ones were: same ids, other widths and kinds."""
    call = _call(gen)
    for round_ in range(6):
        energy = ("categorical", "gaussian", "categorical_probs")[round_ % 3]
        target = call["target"] if energy == "categorical" else torch.full((BATCH, DIMS[-1]), 1 / DIMS[-1])
        _agrees(_layers(gen, energy, lr_scale=1.0 + round_ % 2), call | {"target": target})
        gc.collect()
