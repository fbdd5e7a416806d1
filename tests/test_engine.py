# SPDX-License-Identifier: MIT
"""The C++ T-step engine: what its tiles, threads and packing must not change, and its reduced precision."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"no compiled backend: {native.unavailable_reason()}"
)

TILE = 32  # csrc/cpu/infer.cpp


def network(widths: tuple[int, ...], hidden: str = "gaussian") -> list[pck.Layer]:
    """tanh layers with nodes of one family, a categorical output; torch's Linear initialisation."""
    layers = []
    for inputs, width in pairwise(widths):
        module = torch.nn.Linear(inputs, width)
        last = len(layers) == len(widths) - 2
        activation, energy = ("identity", "categorical") if last else ("tanh", hidden)
        layers.append(pck.Layer(module.weight.detach(), module.bias.detach(), activation, energy))
    return layers


def batch(size: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.rand(size, width), torch.randint(0, classes, (size,))


def tensors(result: pck.Inference) -> list[Tensor]:
    """All that the engine computed."""
    traced = [] if result.energy is None else [result.energy]
    return [*result.phis, *result.deltas, *traced]


def run(x: Tensor, y: Tensor, layers: list[pck.Layer], **settings) -> pck.Inference:
    with pck.use_backend("cpp"):
        return pck.infer(x, layers, target=y, **settings)


@pytest.mark.parametrize("precision", ["fp32", "bf16_delta"])
@pytest.mark.parametrize("hidden", ["gaussian", "categorical"])
def test_a_samples_result_does_not_depend_on_its_batch(hidden: str, precision: str) -> None:
    need_bf16(precision)
    layers = network((45, 130, 67, 10), hidden)
    x, y = batch(3 * TILE + 1, 45, 10)
    whole = run(x, y, layers, steps=9, precision=precision)
    for size in (1, 2, TILE - 1, TILE, TILE + 1):
        part = run(x[:size], y[:size], layers, steps=9, precision=precision)
        for a, b in zip([*part.phis[:-1], *part.deltas], [*whole.phis[:-1], *whole.deltas], strict=True):
            assert torch.equal(a, b[:size])


@pytest.mark.parametrize("precision", ["fp32", "bf16_delta"])
def test_reruns_and_thread_counts_give_the_same_bits(precision: str) -> None:
    need_bf16(precision)
    layers = network((45, 130, 67, 10))
    x, y = batch(101, 45, 10)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(tensors(run(x, y, layers, steps=7, momentum=0.5, trace=True, precision=precision)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_python_threads_at_once() -> None:
    layers = network((20, 40, 30, 5))
    jobs = [batch(size, 20, 5) for size in (3, 40, 17, 70)] * 3
    alone = [tensors(run(x, y, layers, steps=20)) for x, y in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: tensors(run(*job, layers, steps=20)), jobs))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def resident() -> int:
    """Bytes in memory now (the high-water mark would hide growth behind earlier tests)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm on this system")
def test_memory_does_not_grow_in_10000_calls(one_thread: None) -> None:
    networks = [network(widths) for widths in ((3, 4, 2), (20, 40, 30, 5), (9, 70, 3))]
    jobs = [
        (*batch(size, layers[0].weight.shape[1], layers[-1].weight.shape[0]), layers, steps)
        for layers, size, steps in product(networks, range(1, 9), (1, 2))
    ]

    def call(times: int) -> int:
        """Resident bytes after that many calls."""
        for _, (x, y, layers, steps) in zip(range(times), cycle(jobs), strict=False):
            run(x, y, layers, steps=steps, trace=steps == 2)
        return resident()

    before = call(2000)  # micro-kernels made, allocators filled
    grown = call(10_000) - before
    assert grown < 2**20, f"{grown / 2**20:.1f} MiB more after 10,000 calls: {grown / 10_000:.0f} bytes a call"


def need_bf16(precision: str) -> None:
    if precision == "bf16_delta" and native.supports("infer in bf16_delta", []) is not None:
        pytest.skip(f"bf16_delta: {native.supports('infer in bf16_delta', [])}")


@pytest.mark.parametrize("hidden", ["gaussian", "categorical", "bernoulli"])
@pytest.mark.parametrize("widths", [(33, 65, 31, 7), (784, 512, 512, 512, 10)])
def test_bf16_delta_rounds_as_the_reference_does(widths: tuple[int, ...], hidden: str) -> None:
    """Per layer, against float64: at most twice the emulation's error (plain torch on rounded operands)."""
    need_bf16("bf16_delta")
    layers = network(widths, hidden)
    exact = [
        pck.Layer(layer.weight.double(), layer.bias.double(), layer.activation, layer.energy)  # type: ignore[union-attr]
        for layer in layers
    ]
    x, y = batch(40, widths[0], widths[-1])
    with pck.use_backend("reference"):
        truth = pck.infer(x.double(), exact, target=y, steps=16).deltas
        emulated = pck.infer(x, layers, target=y, steps=16, precision="bf16_delta").deltas
    for found, torch_made, true in zip(
        run(x, y, layers, steps=16, precision="bf16_delta").deltas, emulated, truth, strict=True
    ):
        error, allowed = (found.double() - true).norm(), (torch_made.double() - true).norm()
        assert error <= 2 * allowed
        assert error > 0 or allowed == 0
