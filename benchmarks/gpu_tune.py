# SPDX-License-Identifier: MIT
"""`python -m benchmarks.gpu_tune --out DIR`: which launch constants a GPU likes, for `triton_launches.LAUNCHES`.

The paper's M1, T = 32, each call of `pck.infer` captured in a CUDA graph, so that Python's time is out of it. The
kernels are compiled first, a process for each candidate. One JSON, written after every row.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pc_kernels as pck
from benchmarks.cases import M1, Case, make
from benchmarks.gpu_gate import Report, where
from benchmarks.gpu_infer import captured, infer, timer_of
from pc_kernels.backends.triton_launches import TWO_LAUNCHES, Launch, use_schedule

CANDIDATES: dict[str, tuple[Launch, ...]] = {
    "bf16_delta": (
        Launch(16, 32, 128, 4, 4), Launch(16, 64, 128, 4, 3), Launch(16, 64, 256, 4, 2), Launch(32, 32, 128, 4, 4),
        Launch(32, 64, 64, 4, 4), Launch(32, 64, 128, 4, 3), Launch(64, 64, 64, 4, 4), Launch(64, 64, 128, 8, 3),
        Launch(64, 128, 64, 8, 3), Launch(128, 64, 64, 8, 3),
    ),
    "fp32": (
        Launch(16, 64, 32, 4, 3), Launch(32, 32, 32, 4, 3), Launch(32, 64, 32, 4, 3), Launch(32, 64, 32, 8, 3),
        Launch(64, 32, 32, 4, 3), Launch(64, 64, 32, 8, 3),
    ),
    "tf32": (Launch(32, 32, 32, 4, 4), Launch(32, 64, 32, 4, 4), Launch(64, 64, 32, 4, 4), Launch(64, 64, 32, 8, 4)),
}  # fmt: skip


def milliseconds(precision: str, launch: Launch, batch: int) -> float:
    """The median of a captured call."""
    case = Case(f"M1 B={batch}", M1, batch)
    inputs = make(case, device="cuda")
    with pck.use_backend("triton"), use_schedule(TWO_LAUNCHES, launch):
        run = partial(infer, case, inputs, precision)
        run()
        return 1e3 * statistics.median(timer_of(captured(run, "cuda"), "cuda")(15))


def compile_all(precisions: list[str]) -> None:
    """Into Triton's cache."""
    command = [sys.executable, "-m", "benchmarks.gpu_tune", "--compile"]
    candidates = [(precision, launch) for precision in precisions for launch in CANDIDATES[precision]]
    work = [subprocess.Popen([*command, f"{p}:{','.join(map(str, launch))}"]) for p, launch in candidates]
    for process in work:
        process.wait()


def main() -> int:
    """Rows in the order of the candidates."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for gpu_tune.json")
    parser.add_argument("--precisions", default="bf16_delta,fp32,tf32")
    parser.add_argument("--batches", default="64,256,1024,4096")
    parser.add_argument("--compile", metavar="PRECISION:LAUNCH", help="one candidate; nothing is measured")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if args.compile:
        precision, numbers = args.compile.split(":")
        milliseconds(precision, Launch(*map(int, numbers.split(","))), 64)
        return 0
    precisions, rows = args.precisions.split(","), list[dict[str, Any]]()
    command = " ".join(["python -m benchmarks.gpu_tune", *sys.argv[1:]])
    report = Report(args.out / "gpu_tune.json", {"command": command, "machine": where()})
    compile_all(precisions)
    for precision in precisions:
        for launch in CANDIDATES[precision]:
            for batch in map(int, args.batches.split(",")):
                rows.append({"precision": precision, "launch": launch, "batch": batch})
                rows[-1]["ms"] = milliseconds(precision, launch, batch)
                report.put("rows", rows)
                print(precision, *launch, f"B={batch}: {rows[-1]['ms']:.3f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
