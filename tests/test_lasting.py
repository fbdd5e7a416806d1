# SPDX-License-Identifier: MIT
"""Memory that backends keep: made outside of inference mode, and by another thread where torch counts this one's."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from threading import get_ident
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pc_kernels.backends.lasting import elsewhere, lasting

TREES = "torch._inductor.cudagraph_trees"
GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The streams entered, each with the thread."""
    entered = []

    @contextmanager
    def stream(which: str) -> Any:
        entered.append((which, get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device.type}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return entered


@pytest.mark.parametrize(("device", "trees"), [("cpu", True), ("cuda", False)])
def test_as_a_rule_this_thread_makes_it(
    device: str, trees: bool, streams: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, TREES, ModuleType(TREES))
    if not trees:
        monkeypatch.delitem(sys.modules, TREES)
    assert lasting(get_ident, SimpleNamespace(type=device)) == get_ident()  # type: ignore[arg-type]
    assert streams == []


def test_elsewhere_is_another_thread_on_a_gpu(streams: list) -> None:
    assert elsewhere(get_ident, SimpleNamespace(type="cpu")) == get_ident()  # type: ignore[arg-type]
    assert elsewhere(get_ident, GPU) != get_ident()  # type: ignore[arg-type]
    assert [which for which, _ in streams] == ["stream of cuda"]


def test_beside_graphs_of_torch_compile_another_does(streams: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TREES, ModuleType(TREES))
    other = lasting(get_ident, GPU)  # type: ignore[arg-type]
    assert other != get_ident()
    assert streams == [("stream of cuda", other)]
    with pytest.raises(ZeroDivisionError):
        lasting(lambda: 1 / 0, GPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("trees", [False, True])
def test_it_can_be_written_to_later(trees: bool, streams: list, monkeypatch: pytest.MonkeyPatch) -> None:
    if trees:
        monkeypatch.setitem(sys.modules, TREES, ModuleType(TREES))
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        x = torch.ones(2)
        zeros, copy, of_weight = (
            lasting(make, GPU)  # type: ignore[arg-type]
            for make in (lambda: torch.zeros(2), x.clone, weight.clone)
        )
    for tensor in (zeros, copy, of_weight):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        tensor.add_(1)
