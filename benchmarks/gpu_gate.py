# SPDX-License-Identifier: MIT
"""`python -m benchmarks.gpu_gate --out DIR`: everything that only a GPU can prove, in one command of ten minutes.

Builds the extension in place, runs the tests marked `gpu`, runs compute-sanitizer over a small case of every kernel,
then times a training step and inference against what there is to beat. A step gets a share of the time that is left,
and the rows of inference, the most important first, all that remains; what there was no time for is on record. One
JSON, written after every row. `--dry-run` goes the same way without a GPU at sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import pc_kernels as pck
from benchmarks import gpu_infer
from benchmarks.cases import Case
from benchmarks.gpu_training import training_cases, training_row

ROOT = Path(__file__).parents[1]
# of the time left when a step begins
SHARES = {"build": 0.8, "tests": 0.35, "sanitizer": 0.25, "training": 0.25, "benchmark": 1.0}
TEST_PROCESSES = max(1, (os.cpu_count() or 1) - 2)  # the time goes into compiling kernels, on the CPU
SANITIZERS, FINDINGS = ("memcheck", "racecheck"), 9  # and the exit code that says that there are any


class Clock:
    """The time that a step may take: a share of what is left of the whole."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self._until = self.end

    @property
    def left(self) -> float:
        """Seconds until the step has to be over."""
        return max(self._until - time.monotonic(), 1.0)

    def begin(self, step: str) -> None:
        """The step's share begins."""
        now = time.monotonic()
        self._until = now + SHARES[step] * max(self.end - now, 0)

    def rows(self, cases: Sequence[Case]) -> Iterator[Case]:
        """The cases for whose rows there is time, as far as the longest one so far tells; the first in any case."""
        longest = 0.0
        for case in cases:
            start = time.monotonic()
            if longest > self._until - start:
                return
            yield case
            longest = max(longest, time.monotonic() - start)


class Report:
    """The JSON on disk, always whole."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.document = path, head
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, value: Any) -> None:
        """Set a part and write all."""
        self.document[name] = value
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(part, self.path)


def shell(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """A command's exit code (None: it ran out of time), duration and the end of what it printed."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        code, text = None, out.decode(errors="replace") if isinstance(out, bytes) else out
    except OSError as error:
        code, text = 127, str(error)
    return {"rc": code, "seconds": round(time.perf_counter() - start, 1), "tail": text[-3000:]}


def where() -> dict[str, Any]:
    """Device, driver, versions, commit."""
    smi = shell(["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"], 20)
    git = shell(["git", "rev-parse", "HEAD"], 20)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": smi["tail"].strip() if smi["rc"] == 0 else "",
        "cpu": os.uname().machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version,
        "python": sys.version.split()[0],
        "commit": git["tail"].strip() if git["rc"] == 0 else "",
    }


# ---------------------------------------------------------------------------------------------------------------------
# the steps


def build(clock: Clock) -> dict[str, Any]:
    """The extension in place, by ninja; if its CUDA part does not build, that is on record, and the rest goes on."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    major, minor = torch.cuda.get_device_capability()
    chip = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")  # of this machine alone: the others take time
    environment = {"PC_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": chip}
    given = {name: os.environ[name] for name in environment if name in os.environ}
    found = shell(command, 0.8 * clock.left, **{**environment, **given})
    if found["rc"] != 0:
        found["without_cuda"] = shell(command, clock.left, PC_KERNELS_BUILD="cpu")
    return found


def tests(clock: Clock) -> dict[str, Any]:
    """The tests marked `gpu`: on many processes by pytest-xdist where it is there, else a process per file."""
    plain = ["-m", "gpu", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command, paths = [sys.executable, "-m", "pytest", *plain], {"PYTHONPATH": f"python{os.pathsep}."}
    if importlib.util.find_spec("xdist") is not None:
        return {"tests": counted(shell([*command, "-n", str(TEST_PROCESSES), "tests"], clock.left, **paths))}
    files = sorted((ROOT / "tests").glob("test_*.py"))

    def run(path: Path) -> tuple[str, dict[str, Any]]:
        return path.name, shell([*command, str(path)], clock.left, **paths)

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        found = {name: counted(result) for name, result in pool.map(run, files)}
    return {name: result for name, result in found.items() if result["rc"] != 5}  # 5: no test of that file is marked


def counted(result: dict[str, Any]) -> dict[str, Any]:
    """pytest's verdicts counted, also of a run that was cut short."""
    verdicts = {name: len(re.findall(rf" {name.upper()}\b", result["tail"])) for name in ("passed", "failed", "error")}
    summary = re.findall(
        r"(\d+) (passed|failed|error|skipped)", result["tail"].splitlines()[-1] if result["tail"] else ""
    )
    return {**result, **verdicts, **{name: int(count) for count, name in summary}}


def sanitizer(clock: Clock) -> dict[str, Any]:
    """compute-sanitizer over a small case of every kernel, or the machine's refusal."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"refused": "compute-sanitizer is not installed"}
    command, watched = [sys.executable, "-m", "benchmarks.gpu_small"], {}
    environment = {"PYTHONPATH": f"python{os.pathsep}.", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    shell(command, 0.4 * clock.left, **environment)  # compiles the kernels outside the tool
    for name, share in zip(SANITIZERS, (0.5, 1.0), strict=True):
        under = [tool, "--tool", name, "--error-exitcode", str(FINDINGS), *command]
        watched[name] = shell(under, share * clock.left, **environment)
    return watched


def benchmark(report: Report, clock: Clock, dry: bool, rounds: int, repeats: int, only: str) -> None:
    """A row per case, as many as there is time for."""
    device, rows = "cpu" if dry else "cuda", []
    wanted = [case for case in gpu_infer.cases(dry) if only in case.name]
    for case in clock.rows(wanted):
        try:
            rows.append(gpu_infer.measure(case, device, rounds, repeats))
        except RuntimeError as error:  # of CUDA, as a rule, after which this process can use the device no more
            report.put("died", {"case": case.name, "error": str(error)[:500]})
            print(f"{case.name}: {error}", flush=True)
            break
        report.put("rows", rows)
        print(table(rows[-1]), flush=True)
    report.put("left_out", [case.name for case in wanted[len(rows) :]])


def training(report: Report, clock: Clock, dry: bool, rounds: int, repeats: int) -> None:
    """PC's training step beside backpropagation's."""
    rows: list[Any] = []
    for case in clock.rows(training_cases(dry)):
        rows.append(training_row(case, dry, rounds, repeats))
        report.put("training", rows)
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in rows[-1]["seconds"].items()}
        print(case.name, ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items()), flush=True)


def table(row: dict[str, Any]) -> str:
    """A case as text: fastest first, with the ratios to the two baselines; then what failed."""
    medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
    graph, eager = medians["closed form fp32, graph"], medians["eager autograd"]
    lines = [row["case"]["name"]]
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        low, high = min(row["seconds"][name]), max(row["seconds"][name])
        rate = row["flops"] / median * 1e-12
        lines.append(
            f"  {name:34s} {median * 1e3:8.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f})  {rate:7.2f} TF/s"
            f"  {graph / median:6.2f}x graph  {eager / median:7.2f}x eager"
        )
    failed = {name: found for name, found in row["accuracy"].items() if not found["passes"]}
    lines += [f"  {name}: {found.get('error', 'not accurate enough')}" for name, found in failed.items()]
    return "\n".join(lines)


def main() -> int:
    """The exit code says whether everything asked for was right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_gate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for gpu_gate.json")
    parser.add_argument("--steps", default=",".join(SHARES), help=f"some of {','.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="of each method in a round")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: Triton's interpreter, tiny sizes")
    args = parser.parse_args()
    wanted = args.steps.split(",")
    if not set(wanted) <= set(SHARES):
        parser.error(f"--steps: wanted some of {','.join(SHARES)}, got {args.steps}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run goes the same way without one")
    command = " ".join(["python -m benchmarks.gpu_gate", *sys.argv[1:]])
    report = Report(args.out / "gpu_gate.json", {"command": command, "machine": where(), "dry_run": args.dry_run})
    clock = Clock(60 * args.minutes)
    outside: dict[str, Callable[[Clock], dict[str, Any]]] = {"build": build, "tests": tests, "sanitizer": sanitizer}
    for name, run in outside.items():
        if name in wanted and not args.dry_run:
            clock.begin(name)
            report.put(name, run(clock))
            print(name, json.dumps(report.document[name])[:2000], flush=True)
    report.put("build_info", pck.build_info())
    if "training" in wanted:
        clock.begin("training")
        training(report, clock, args.dry_run, args.rounds, args.repeats)
    if "benchmark" in wanted:
        clock.begin("benchmark")
        benchmark(report, clock, args.dry_run, args.rounds, args.repeats, args.only)
    return 0 if good(report.document) else 1


def good(document: dict[str, Any]) -> bool:
    """Nothing that ran was wrong. A sanitizer that was refused, tests cut short, rows left out are on record, not
    wrong."""
    steps = [document.get("build", {"rc": 0}), *document.get("tests", {}).values()]
    found = [entry for row in document.get("rows", []) for entry in row["accuracy"].values()]
    # a tool that cannot run here ends before gpu_small says anything
    watched = [run for run in document.get("sanitizer", {}).values() if isinstance(run, dict)]
    if any(run["rc"] == FINDINGS or "Traceback" in run["tail"] for run in watched):
        return False
    right = all(entry["passes"] and entry.get("bitwise_equal") for entry in found)
    return right and "died" not in document and all(step["rc"] in (0, None) for step in steps)


if __name__ == "__main__":
    sys.exit(main())
