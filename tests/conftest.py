# SPDX-License-Identifier: MIT
"""Fixtures of all tests: the seed, poisoned memory, and the backends that can run here."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

import cuda_host.layers
import numpy as np
import pytest
import torch
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import cuda_backend, cuda_infer, cuda_recordings

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

ALL_BACKENDS = ("reference", "cpp", "cuda", "triton")
DEVICES = {"cuda": "cuda", "triton": "cuda"}  # elsewhere the CPU


def _device(backend: str) -> str:
    return DEVICES.get(backend, "cpu") if torch.cuda.is_available() else "cpu"


def _on_gpu(backend: str) -> bool:
    return torch.cuda.is_available() and backend in INFER_BACKENDS


def _one_layer(tensor: Tensor) -> None:
    pck.layer_energies([tensor], [tensor], ["gaussian"])


def _one_step(tensor: Tensor) -> None:
    pck.infer(tensor, [pck.Layer(tensor)], steps=1)


def runs(backend: str, probe: Callable[[Tensor], None]) -> bool:
    """Whether the backend accepts the smallest float32 problem on the device it is made for.

    Triton only on a GPU: its interpreter is too slow for every test; test_triton_*.py use it.
    """
    if backend == "triton" and not torch.cuda.is_available():
        return False
    try:
        with pck.use_backend(backend):
            probe(torch.zeros(2, 2, device=_device(backend)))
    except pck.BackendUnavailable:
        return False
    return True


LAYER_BACKENDS = tuple(name for name in ALL_BACKENDS if runs(name, _one_layer))
INFER_BACKENDS = tuple(name for name in ALL_BACKENDS if runs(name, _one_step))


def _parameters(backends: tuple[str, ...]) -> list:
    """Those that run on a GPU carry the marker `gpu`."""
    return [pytest.param(name, marks=pytest.mark.gpu) if _device(name) == "cuda" else name for name in backends]


def _inside(backend: str) -> Iterator[str]:
    with pck.use_backend(backend), torch.device(_device(backend)):
        yield backend


@pytest.fixture(params=_parameters(LAYER_BACKENDS))
def layer_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend that has the layer ops, on that backend's device."""
    yield from _inside(request.param)


@pytest.fixture(params=_parameters(INFER_BACKENDS))
def infer_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend that has `infer`, on that backend's device."""
    yield from _inside(request.param)


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU the backend `cuda`; elsewhere the same with its kernels, and the recording of a CUDA graph, played by
    the CPU."""
    on_gpu = torch.cuda.is_available() and cuda_backend.unavailable_reason() is None
    if not on_gpu:
        monkeypatch.setattr(cuda_backend, "supports", lambda op, tensors: None)
        monkeypatch.setattr(cuda_infer, "_ops", lambda: cuda_host.layers.EmulatedLayers)
        monkeypatch.setattr(cuda_infer, "_cluster_device_refusal", lambda device: None)
        monkeypatch.setattr(cuda_recordings, "record", _recorded)
    with torch.device("cuda" if on_gpu else "cpu"):
        yield


def _recorded(launches: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """As `lasting.record`: the same memory is filled anew."""
    found = launches()

    def replay() -> None:
        for own, new in zip(cuda_recordings._tensors(found), cuda_recordings._tensors(launches()), strict=True):
            own.copy_(new)

    return found, SimpleNamespace(replay=replay)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the tests of Triton's and CUDA's kernels run there, too."""
    wanted = [
        name for name, backend in (("triton_interpreter", "triton"), ("cuda_kernels", "cuda")) if _on_gpu(backend)
    ]
    for item in items:
        if set(wanted) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """float64, and what a backend refuses with a reason, is for the others: on a GPU such a test is skipped."""
    try:
        return (yield)
    except pck.BackendUnavailable as refusal:
        if item.get_closest_marker("gpu") is None:
            raise
        pytest.skip(str(refusal))


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills fresh memory with NaN, so that an output which a kernel never writes fails the test."""
    filled, strict = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(strict)


@pytest.fixture
def triton_interpreter() -> Iterator[None]:
    """Runs the test on the backend triton; without a GPU in the interpreter, on CPU tensors."""
    pytest.importorskip("triton")
    device = _device("triton")
    with pck.use_backend("triton"), torch.device(device), np.errstate(all="ignore"):  # a GPU does not warn either
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small matrices, where threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def layers() -> Callable:
    """Turns the truth's nodes into pc_kernels layers."""
    names = ("weight", "bias", "activation", "energy", "feed", "log_var", "step", "lr_scale", "prior")
    return lambda nodes: [pck.Layer(**{name: getattr(node, name) for name in names}) for node in nodes]
