# SPDX-License-Identifier: MIT
"""`python -m benchmarks.linear_softmax`: a language model's output layer, with whole logits and without, side by side;
a table, and JSON under benchmarks/results.

Rounds: each method once in turn, so that a machine that drifts drifts for all. Every method's gradients are checked
against float64 before it is timed. Peak memory: the most bytes of tensors that an operation made and that still exist,
counted operation by operation (torch's profiler), inputs apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pc_runner.memory import peak_bytes
from torch import Tensor

import pc_kernels as pck
from benchmarks.run import RESULTS, machine
from pc_kernels.backends import reference_linear_softmax

CLASSES, WIDTH = 8001, 128
ROWS = (512, 2048, 4096)
OWN_BUDGET = reference_linear_softmax.CHUNK_ENTRIES
BUDGETS = (2**21, 2**22, 2**23, 2**24)
Method = Callable[[], tuple[Tensor, ...]]


def autograd(v: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Whole logits, F.cross_entropy, gradients by autograd."""
    v, weight = v.detach().requires_grad_(), weight.detach().requires_grad_()
    energy = torch.nn.functional.cross_entropy(v @ weight.T, target, reduction="sum")
    return torch.autograd.grad(energy, (v, weight))


def closed_form(v: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Whole logits, delta = q - o."""
    index = target[:, None]
    log_q = torch.log_softmax(v @ weight.T, -1)
    energy = -log_q.gather(1, index)
    delta = log_q.exp()
    delta.scatter_add_(1, index, torch.full_like(energy, -1.0))
    return delta @ weight, delta.T @ v


def ours(
    v: Tensor, weight: Tensor, target: Tensor, backend: str = "auto", budget: int = OWN_BUDGET, **options: Any
) -> tuple[Tensor, ...]:
    """`pck.linear_softmax_errors`; budget: logits that the reference makes at a time."""
    reference_linear_softmax.CHUNK_ENTRIES = budget
    with pck.use_backend(backend):
        got = pck.linear_softmax_errors(v, weight, None, target, **options)
    return (got.grad_v,) if got.grad_weight is None else (got.grad_v, got.grad_weight)


def autograd_of_v(v: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Whole logits, F.cross_entropy, the gradient of v alone."""
    v = v.detach().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.cross_entropy(v @ weight.T, target, reduction="sum"), v)


def methods(v: Tensor, weight: Tensor, target: Tensor) -> dict[str, Method]:
    """By name."""
    table: dict[str, Method] = {
        "whole logits, autograd": lambda: autograd(v, weight, target),
        "whole logits, closed form": lambda: closed_form(v, weight, target),
        "linear_softmax_errors, cpp": lambda: ours(v, weight, target, "cpp"),
        "linear_softmax_errors, reference": lambda: ours(v, weight, target, "reference"),
        "autograd, no dW": lambda: autograd_of_v(v, weight, target),
        "cpp, no dW": lambda: ours(v, weight, target, "cpp", weight_grads=False),
        "reference, no dW": lambda: ours(v, weight, target, "reference", weight_grads=False),
    }
    if torch.ops.pc_kernels_native.has_bf16():
        table["cpp, no dW, bf16"] = lambda: ours(v, weight, target, "cpp", weight_grads=False, precision="bf16")
    for budget in BUDGETS:
        if budget != OWN_BUDGET:
            name = f"  reference, 2^{budget.bit_length() - 1} logits at a time"
            table[name] = lambda b=budget: ours(v, weight, target, "reference", b)
    return table


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Seconds, peak bytes and errors of all methods."""
    generator = torch.Generator().manual_seed(rows)
    v = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator) / WIDTH**0.5
    target = torch.randint(CLASSES, (rows,), generator=generator)
    exact = autograd(v.double(), weight.double(), target)
    table = methods(v, weight, target)
    errors, peaks = {}, {}
    for name, run in table.items():
        pairs = zip(run(), exact, strict=False)
        errors[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if errors[name] > (1e-2 if "bf16" in name else 1e-5):
            raise RuntimeError(f"{name} is off by {errors[name]:.1e}")
        peaks[name] = peak_bytes(run)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(rounds):
        for name, run in table.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {"rows": rows, "classes": CLASSES, "width": WIDTH, "seconds": seconds, "peak_bytes": peaks, "error": errors}


def table_of(row: dict[str, Any]) -> str:
    """As text: medians, spread, ratio to autograd, peak memory."""
    base = statistics.median(row["seconds"]["whole logits, autograd"])
    lines = [f"{row['rows']} rows, {row['classes']} classes, width {row['width']}"]
    for name, seconds in row["seconds"].items():
        median = statistics.median(seconds)
        lines.append(
            f"  {name:40s} min {min(seconds) * 1e3:7.1f}  median {median * 1e3:7.1f}  max {max(seconds) * 1e3:7.1f} ms"
            f"  {base / median:5.2f}x  {row['peak_bytes'][name] / 2**20:6.1f} MiB  error {row['error'][name]:.0e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_softmax", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_linear_softmax.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = " ".join(["python -m benchmarks.linear_softmax", *sys.argv[1:]])
    document: dict[str, Any] = {"command": command, "machine": machine(), "rows": []}
    for rows in ROWS:
        document["rows"].append(measure(rows, args.rounds))
        print(table_of(document["rows"][-1]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
