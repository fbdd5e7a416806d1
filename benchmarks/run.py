# SPDX-License-Identifier: MIT
"""`python -m benchmarks.run`: inference of all cases by all methods, side by side; a table, and JSON under
benchmarks/results.

A case's accuracy is checked first; a method that fails it is not timed. Then rounds: each method a few times in
turn, so that a machine that
drifts drifts for all. The FMA peak is measured in the same rounds. JAX runs in its own process if it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pc_kernels as pck
from benchmarks.accuracy import Truth, errors, truth_of, within_rule
from benchmarks.baselines import eager_autograd
from benchmarks.cases import CASES, Case, Inputs, make

RESULTS = Path(__file__).parent / "results"
Timer = Callable[[int], list[float]]


class Jax:
    """The JAX worker, if there is one."""

    def __init__(self, threads: int):
        command = [sys.executable, "-m", "benchmarks.jax_worker"]
        flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def repeat(run: Callable[[], Any]) -> Timer:
    """A timer of `run`, after one warm-up."""
    run()

    def timer(n: int) -> list[float]:
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds

    return timer


def ours(case: Case, inputs: Inputs, backend: str, precision: str = "fp32") -> Callable[[], Any]:
    """`pck.infer` on one backend."""

    def run() -> Any:
        with pck.use_backend(backend):
            return pck.infer(
                inputs.x, inputs.layers, target=inputs.target, steps=case.steps, lr=case.lr, precision=precision
            )

    return run


def methods(case: Case, inputs: Inputs, truth: Truth, jax: Jax | None) -> tuple[dict[str, Timer], dict[str, Any]]:
    """Timers by name, and what the gate found."""
    accuracy: dict[str, Any] = {"autograd fp32": {"delta": truth.torch_deltas, "dW": truth.torch_grads}}
    with pck.use_backend("reference"):
        accuracy["reference bf16_delta"] = errors(case, inputs, "bf16_delta", truth)
    timers: dict[str, Timer] = {}
    for precision, beside in (("fp32", "autograd fp32"), ("bf16_delta", "reference bf16_delta")):
        name = f"cpp {precision}"
        with pck.use_backend("cpp"):
            accuracy[name] = errors(case, inputs, precision, truth)
        accuracy[name]["passes"] = within_rule(accuracy[name], accuracy[beside], truth)
        if accuracy[name]["passes"]:
            timers[name] = repeat(ours(case, inputs, "cpp", precision))
    timers["closed form in torch"] = repeat(ours(case, inputs, "reference"))
    timers["autograd, weights frozen"] = repeat(lambda: eager_autograd(case, inputs, weight_gradients=False))
    timers["autograd with weight gradients"] = repeat(lambda: eager_autograd(case, inputs, weight_gradients=True))
    if jax is not None:
        jax.ask({"case": asdict(case)})
        timers["jax.jit, layer 1 hoisted"] = lambda n: jax.ask({"time": n})["seconds"]
    return timers, accuracy


def measure(case: Case, jax: Jax | None, rounds: int, repeats: int) -> dict[str, Any]:
    """One case's row: seconds of every method, interleaved, and the machine's FMA peak in the same rounds."""
    inputs = make(case)
    timers, accuracy = methods(case, inputs, truth_of(case), jax)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    peak: list[float] = []
    for _ in range(rounds):
        peak.append(torch.ops.pc_kernels_native.fma_peak(0.05))
        for name, timer in timers.items():
            seconds[name] += timer(repeats)
    return {"case": asdict(case), "flops": case.flops, "peak_gflops": peak, "accuracy": accuracy, "seconds": seconds}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": pck.build_info(),
    }


def table(row: dict[str, Any]) -> str:
    """A case as text: minimum, median and spread in ms, GFLOP/s, share of the peak, ratio to autograd with frozen
    weights."""
    peak = statistics.median(row["peak_gflops"])
    base = statistics.median(row["seconds"]["autograd, weights frozen"])
    lines = [f"{row['case']['name']}  (FMA peak {peak:.0f} GF/s)"]
    for name, seconds in sorted(row["seconds"].items(), key=lambda item: statistics.median(item[1])):
        median, rate = statistics.median(seconds), row["flops"] / statistics.median(seconds) * 1e-9
        lines.append(
            f"  {name:32s} min {min(seconds) * 1e3:8.2f}  median {median * 1e3:8.2f}  max {max(seconds) * 1e3:8.2f} ms"
            f"  {rate:6.0f} GF/s  {rate / peak:5.0%}  {base / median:6.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each method in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jax", action="store_true", help="also JAX's jit (pip install jax)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_infer.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jax = Jax(args.threads) if args.jax else None
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.only in case.name:
            rows.append(measure(case, jax, args.rounds, args.repeats))
            print(table(rows[-1]), flush=True)
            document = {
                "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
                "machine": machine(),
                "rows": rows,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    if jax is not None:
        jax.close()


if __name__ == "__main__":
    main()
