# SPDX-License-Identifier: MIT
"""Microbenchmarks of every op: `pytest benchmarks/test_ops.py --benchmark-only`; `--benchmark-disable` checks without
timing. What is timed has just been compared with the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pc_kernels as pck
from benchmarks.accuracy import Truth, errors, truth_of, within_rule
from benchmarks.cases import M1, Case, Inputs, make

SIZES = [(128, 512), (8, 16), (16, 32, 8, 8)]
FAMILIES = [*((name,) for name in pck.ENERGIES), pck.ENERGIES]  # each by itself, and a node of each in one call
CASES = [
    Case("tiny 8-16-16-4 B=8", (8, 16, 16, 4), 8, "categorical"),
    Case("small 64-128-128-10 B=64", (64, 128, 128, 10), 64, "categorical"),
    Case("M1 784-512x3-10 B=64", M1, 64),
    Case("M2 784-512x3-10 B=64", M1, 64, "categorical"),
]
LR = 1e-6  # the timed calls move the same states again and again: they shall stay where they are


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the benchmark on the backend."""
    try:
        with pck.use_backend(request.param):
            pck.infer(torch.zeros(2, 2), [pck.Layer(torch.zeros(2, 2))], steps=1)
            yield request.param
    except pck.BackendUnavailable as missing:
        pytest.skip(str(missing))


class Nodes:
    """Random nodes of one size, one per name."""

    def __init__(self, names: Sequence[str], size: tuple[int, ...], dtype: torch.dtype):
        gen = torch.Generator().manual_seed(0)

        def draw(name: str) -> Tensor:
            value = torch.randn(size, generator=gen)
            return (value.softmax(-1) if name == "categorical_probs" else value).to(dtype)

        self.names = list(names)
        self.phis, self.mus = [draw(name) for name in names], [draw(name) for name in names]
        self.feedback = [draw("gaussian") for _ in names]
        self.log_vars = [torch.full(size[-1:], 0.3, dtype=dtype) if n == "gaussian_diag" else None for n in names]

    def arguments(self) -> tuple[Any, ...]:
        return self.phis, self.mus, self.names

    def energies(self) -> list[Tensor]:
        return [pck.layer_energies(*self.arguments(), log_vars=self.log_vars)]

    def errors(self) -> list[Tensor]:
        found = pck.layer_errors(*self.arguments(), log_vars=self.log_vars)
        return [found.energy, *found.grad_phi, *found.grad_mu]

    def update(self, lr: float = LR) -> list[Tensor]:
        pck.update_phi_(self.phis, self.mus, self.feedback, self.names, lr=lr, log_vars=self.log_vars)
        return self.phis


def agree(names: Sequence[str], size: tuple[int, ...], run: Callable[[Nodes], list[Tensor]]) -> None:
    """The backend in float32 against the reference in float64."""
    found = run(Nodes(names, size, torch.float32))
    with pck.use_backend("reference"):
        wanted = run(Nodes(names, size, torch.float64))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


per_node = [
    pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size))),
    pytest.mark.parametrize("names", FAMILIES, ids=lambda names: names[0] if len(names) == 1 else "all"),
]


def on_nodes(test: Callable[..., None]) -> Callable[..., None]:
    """Runs the benchmark for every size and family."""
    return functools.reduce(lambda made, mark: mark(made), per_node, test)


@on_nodes
@pytest.mark.benchmark(group="layer_energies")
def test_layer_energies(benchmark: Any, backend: str, names: Sequence[str], size: tuple[int, ...]) -> None:
    agree(names, size, Nodes.energies)
    benchmark(Nodes(names, size, torch.float32).energies)


@on_nodes
@pytest.mark.benchmark(group="layer_errors")
def test_layer_errors(benchmark: Any, backend: str, names: Sequence[str], size: tuple[int, ...]) -> None:
    agree(names, size, Nodes.errors)
    benchmark(Nodes(names, size, torch.float32).errors)


@on_nodes
@pytest.mark.benchmark(group="update_phi_")
def test_update_phi_(benchmark: Any, backend: str, names: Sequence[str], size: tuple[int, ...]) -> None:
    agree(names, size, lambda nodes: nodes.update(lr=0.1))
    benchmark(Nodes(names, size, torch.float32).update)


@functools.cache
def prepared(case: Case) -> tuple[Inputs, Truth, dict[str, dict[str, list[float]]]]:
    """Inputs, the float64 truth, and per precision the errors that plain torch makes in it."""
    inputs, truth = make(case), truth_of(case)
    with pck.use_backend("reference"):
        rounded = errors(case, inputs, "bf16_delta", truth)
    return inputs, truth, {"fp32": {"delta": truth.torch_deltas, "dW": truth.torch_grads}, "bf16_delta": rounded}


@pytest.mark.parametrize("precision", ["fp32", "bf16_delta", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.benchmark(group="infer")
def test_infer(benchmark: Any, backend: str, case: Case, precision: str) -> None:
    inputs, truth, plain = prepared(case)
    settings = {"steps": case.steps, "lr": case.lr, "precision": precision}
    if precision == "float64":
        inputs, settings["precision"] = make(case, torch.float64), "fp32"
        assert max(errors(case, inputs, "fp32", truth)["delta"]) < 1e-9
    else:
        try:
            assert within_rule(errors(case, inputs, precision, truth), plain[precision], truth)
        except pck.BackendUnavailable as missing:
            pytest.skip(str(missing))
    benchmark(lambda: pck.infer(inputs.x, inputs.layers, target=inputs.target, **settings))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.benchmark(group="weight_grads")
def test_weight_grads(benchmark: Any, case: Case) -> None:
    """Torch's own products whatever the backend; `infer` before it is not timed."""
    inputs, truth, plain = prepared(case)
    result = pck.infer(inputs.x, inputs.layers, target=inputs.target, steps=case.steps, lr=case.lr)
    assert within_rule(errors(case, inputs, "fp32", truth), plain["fp32"], truth)
    benchmark(lambda: pck.weight_grads(inputs.x, inputs.layers, result))
