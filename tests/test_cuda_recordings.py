# SPDX-License-Identifier: MIT
"""Schedule (a) of the backend `cuda` from CUDA graphs: which calls are recorded, what is kept. What a replay gives is
compared in test_infer_again.py. Without a GPU the kernels, and the graph, are played by the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import cuda_host
import inputs
import pytest
import test_precision
import torch
import truth
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import cuda_infer, cuda_recordings

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")

Layers = Callable[[list[truth.Node]], list[pck.Layer]]
Run = Callable[..., pck.Inference]
DIMS = (5, 20, 7, 6, 3)


@pytest.fixture
def run(cuda_kernels: None, monkeypatch: pytest.MonkeyPatch, gen: torch.Generator, layers: Layers) -> Iterator[Run]:
    """A call of `infer` on M3 with class indices, by two launches a step."""
    monkeypatch.setattr(cuda_recordings, "serves", lambda args: args.steps > 1)
    nodes = test_precision._float32(inputs.paper("M3", gen, DIMS))
    made, labels = layers(nodes), torch.arange(9) % DIMS[-1]

    def infer(batch: int = 9, scale: float = 1.0, **options: object) -> pck.Inference:
        x = scale * torch.linspace(-1, 1, batch * DIMS[0]).view(batch, DIMS[0])
        return pck.infer(x, made, target=labels[:batch], **{"steps": 3, **options})  # type: ignore[arg-type]

    pck.clear_plans()
    with pck.use_backend("cuda"), cuda_infer.use_schedule(cuda_infer.LAYERS):
        yield infer
    pck.clear_plans()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, cuda_kernels: None) -> list[None]:
    """An entry for each recording made."""
    made: list[None] = []
    record = cuda_recordings.record
    monkeypatch.setattr(cuda_recordings, "record", lambda *arguments: (made.append(None), record(*arguments))[1])
    return made


def test_the_second_call_of_a_kind_is_recorded(run: Run, recorded: list[None]) -> None:
    counts = []
    for _ in range(4):
        run()
        counts.append(len(recorded))
    assert counts == [0, 1, 1, 1]
    run(scale=2.0)
    assert len(recorded) == 1
    for changed in ({"batch": 4}, {"steps": 2}, {"lr": 0.03}, {"momentum": 0.5}, {"trace": True}):
        run(**changed)
        assert len(recorded) == 1, "the first of another kind"
    run(batch=4)
    assert len(recorded) == 2
    run(steps=1), run(steps=1)
    assert len(recorded) == 2


def _tensors(result: pck.Inference) -> list[Tensor]:
    assert result.energy is not None
    return [*result.phis, *result.deltas, result.energy]


def test_results_are_the_same_bits_and_the_callers_own(run: Run) -> None:
    first, second, third = run(trace=True), run(trace=True), run(trace=True)
    before = [tensor.clone() for tensor in third.deltas]
    other = run(trace=True, scale=-3.0)
    for one in (second, third):
        assert all(torch.equal(mine, right) for mine, right in zip(_tensors(one), _tensors(first), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, third.deltas, strict=True))
    assert not torch.equal(other.deltas[0], third.deltas[0])
    assert (third.steps, third.work, third.backend) == (first.steps, first.work, "cuda")


def test_a_replay_finds_what_is_not_finite(run: Run) -> None:
    run(), run()
    with pytest.raises(pck.InferenceDiverged, match="layer 1"):
        run(scale=float("inf"))
    run()


def test_recorded_in_inference_mode_it_serves_outside(run: Run) -> None:
    with torch.inference_mode():
        run(), run()
    assert torch.equal(run().deltas[0], run().deltas[0])


def test_the_most_recent_kinds_are_kept(run: Run, recorded: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_recordings, "KEPT", 2)
    for batch in (4, 5, 4, 5, 4):
        run(batch)
    assert len(recorded) == 2
    run(6), run(6), run(5)
    assert len(recorded) == 3, "5 was the least recently used, and comes as a new kind"
    assert len(cuda_recordings._recordings) == 2
    pck.clear_plans()
    assert not cuda_recordings._recordings
    run(4)
    assert len(recorded) == 3


def test_kinds_that_come_once_push_no_recording_out(run: Run, recorded: list[None]) -> None:
    run(), run()
    for i in range(cuda_recordings.NOTED + 2):
        run(lr=0.01 + 1e-4 * i)
    run()
    assert len(recorded) == 1
    assert len(cuda_recordings._once) == cuda_recordings.NOTED


def test_without_memory_for_copies_the_call_runs_itself(
    run: Run, recorded: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    first = run()
    with monkeypatch.context() as context:
        context.setattr(cuda_recordings, "record", full)
        assert torch.equal(run().deltas[0], first.deltas[0])
    run()
    assert len(recorded) == 1


def test_a_call_that_fails_is_not_recorded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("the CUDA launch failed")

    with monkeypatch.context() as broken:
        broken.setattr(cuda_infer, "_ops", lambda: SimpleNamespace(infer_layers=fails))
        with pytest.raises(RuntimeError, match="launch failed"):
            run()
    assert not cuda_recordings._recordings


@pytest.mark.parametrize(
    ("changed", "served"),
    [
        ({}, True),
        ({"batch": 1024}, True),
        ({"on_gpu": False}, False),
        ({"capturing": True}, False),
        ({"uncached": True}, False),
        ({"steps": 1}, False),
        ({"batch": 0}, False),
        ({"batch": 4096}, False),
        ({"width": 3000}, False),
    ],
)
def test_which_calls_are_recorded(changed: dict[str, int], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's network up to B = 1024; not what takes long anyhow."""
    sizes = {"batch": 64, "width": 512, "steps": 32, "on_gpu": True, "capturing": False, "uncached": False, **changed}
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1" if sizes["uncached"] else "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: sizes["capturing"])
    widths = (784, sizes["width"], sizes["width"], sizes["width"], 10)
    weights = [torch.empty(out, into, device="meta") for into, out in pairwise(widths)]
    x = SimpleNamespace(is_cuda=sizes["on_gpu"], shape=(sizes["batch"], 784))
    args = SimpleNamespace(x=x, weights=weights, steps=sizes["steps"])
    assert cuda_recordings.serves(args) is served  # type: ignore[arg-type]
