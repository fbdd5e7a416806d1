# SPDX-License-Identifier: MIT
"""`pc-run reproduce memory`: the memory of a training step, PC beside backpropagation (the paper's section 5).

Every figure comes from a process of its own. `held` is what a run keeps between steps: weights, the optimiser's state,
the batch. `peak` is the most bytes of tensors alive within one step, `held` among them, as torch's allocator counts
them; `rss` is by how much the process grew, from before the network was made to its largest, scratch memory that
torch does not see among it.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pc_runner.checkpoint import write_atomically
from pc_runner.config import DEFAULT_HIDDEN, METHODS, VAES, machine
from pc_runner.models import mlp, transformer, vae
from pc_runner.network import PCNetwork
from pc_runner.plots import bars, table

Row = dict[str, Any]


class Step(NamedTuple):
    """A network, one batch, and what `infer` is called with beside it."""

    net: PCNetwork
    x: Tensor
    y: Tensor
    settings: dict[str, Any]


def _mlp(model: str, method: str, hidden: Sequence[int] = DEFAULT_HIDDEN) -> Step:
    net = mlp.build(model, method, 784, 10, hidden)
    return Step(net, torch.rand(128, 784), mlp.targets(net, torch.randint(10, (128,)), 10), {"steps": 32})


def _language_model(model: str, method: str) -> Step:
    net = transformer.build(method, 8001)
    x, y = (torch.randint(8001, (64, 32)) for _ in range(2))
    return Step(net, x, y, {"steps": 5, "masks": {"output": torch.ones(64, 32, 1, dtype=torch.bool)}})


def _autoencoder(model: str, method: str) -> Step:
    net, x = vae.build(784, VAES[model].hidden, prior=0.01), torch.rand(128, 784)
    return Step(net, x, x, {"steps": 32, "noise": torch.randn(128, 16)})


CASES: dict[str, tuple[str, Callable[[str, str], Step], tuple[str, ...]]] = {
    "m1": ("M1, batch 128, T = 32", _mlp, ("bp", "pc_fkl")),
    "m2": ("M2, batch 128, T = 32", _mlp, ("bp", "pc_f", "pc_fkl")),
    "m3": ("M3, batch 128, T = 32", _mlp, ("bp", "pc_f", "pc_fkl")),
    "vae": ("autoencoder, batch 128, T = 32", _autoencoder, ("bp", "pc_fkl")),
    "lm": ("language model, batch 64, T = 5", _language_model, ("bp", "pc_f", "pc_fkl")),
}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that `run` has allocated at any time over what was there before, by torch's own count."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as record:
        run()
    assert record.profiler is not None  # after a run
    assert record.profiler.kineto_results is not None
    held = most = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most


def measure(model: str, method: str) -> Row:
    """One training step's memory, in bytes. In a process of its own, or `rss` means nothing."""
    torch.manual_seed(0)
    tiny = _mlp("m2", method, hidden=(2, 2, 2))
    _trainer(tiny, method)[0]()  # libraries load what they need at the first use
    before = _resident()
    step = CASES[model][1](model, method)
    train, optimizer = _trainer(step, method)
    for _ in range(2):  # what the first steps make, they keep
        train()
        optimizer.zero_grad(set_to_none=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held = sum(t.numel() * t.element_size() for t in [*step.net.parameters(), *kept, step.x, step.y])
    return {"model": model, "method": method, "held": held, "peak": held + peak_bytes(train), "rss": rss}


def _trainer(step: Step, method: str) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that makes one training step, and the optimiser in it."""
    optimizer = torch.optim.Adam(step.net.parameters(), lr=1e-4, fused=True)
    how = {**step.settings, "algorithm": METHODS[method].algorithm, "trace": False, "lr": 0.01}

    def train() -> None:
        step.net.backward(step.net.infer(step.x, step.y, **how))
        optimizer.step()

    return train, optimizer


def _resident() -> int:
    """Bytes of this process in memory now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def run_memory(
    out: Path, models: Sequence[str] | None = None, command: str = "", report: Callable[[str], None] = lambda line: None
) -> Row:
    """Measure every case in a fresh process; write `memory.json` and `memory.png`. Returns what the JSON holds.

    models: keys of `CASES`, None for all. report: called with a line after every case.
    """
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    for model in CASES if models is None else models:
        for method in CASES[model][2]:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(measure, model, method).result()
            bp = next((r for r in rows if (r["model"], r["method"]) == (model, "bp")), row)
            row |= {f"{name}_over_bp": row[name] / bp[name] for name in ("peak", "rss")}
            rows.append(row)
            report(f"{model} {method}: peak {row['peak'] / 2**20:.1f} MiB, {row['peak_over_bp']:.2f} of BP's")
    document = {"command": command, "machine": machine(), "unit": "bytes", "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "memory.json", (json.dumps(document, indent=1) + "\n").encode())
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(CASES[row["model"]][0], {})[METHODS[row["method"]].title] = row["peak"] / 2**20
    bars(out / "memory.png", groups, "peak of tensors alive (MiB)")
    return document


def show(document: Row) -> str:
    """The rows as a table."""
    return table(
        [
            {
                "model": CASES[row["model"]][0],
                "method": METHODS[row["method"]].title,
                "held MiB": f"{row['held'] / 2**20:.1f}",
                "peak MiB": f"{row['peak'] / 2**20:.1f}",
                "of BP's": f"{row['peak_over_bp']:.2f}",
                "RSS MiB": f"{row['rss'] / 2**20:.1f}",
                "RSS of BP's": f"{row['rss_over_bp']:.2f}",
            }
            for row in document["rows"]
        ]
    )
