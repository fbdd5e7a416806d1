# SPDX-License-Identifier: MIT
"""Compiles Triton kernels to machine code for GPUs that are not here, and reports what each of them takes.

    kernel = Kernel("pc_kernels.backends.triton_layer_ops", "errors_kernel", signature, constexprs, warps=4)
    reports = compiled([kernel])
    assert not problems(reports)

The compiler runs in a process of its own, since the tests' own has TRITON_INTERPRET set and could only interpret.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

KIB = 1024
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TARGETS = tuple(SHARED_LIMITS)
FRAME = 8  # bytes of stack that are no spill: small `ieee` products have them with 150 registers to spare
_OK = "done: "


@dataclass(frozen=True)
class Kernel:
    """One launch configuration. signature: every parameter -> type ("*fp32", "*i64", "fp32", "i32", "constexpr");
    constexprs: name -> value (anything that pickles); aligned: arguments divisible by 16, as torch's memory is."""

    module: str
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one target. spills: bytes of registers in memory; local: bytes of stack per thread."""

    kernel: str
    target: str
    registers: int
    spills: int
    local: int
    shared: int
    error: str = ""


def compiled(kernels: Sequence[Kernel], targets: Sequence[str] = TARGETS) -> list[Report]:
    """Every kernel on every target, in a process per processor."""
    shares = [kernels[i :: os.cpu_count() or 1] for i in range(os.cpu_count() or 1)]
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda share: _compiled(share, targets) if share else [], shares)
        return [report for part in parts for report in part]


def _compiled(kernels: Sequence[Kernel], targets: Sequence[str]) -> list[Report]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TRITON_DEFAULT_FP_FUSION": "1"}
    work = pickle.dumps((tuple(kernels), tuple(targets)))
    done = subprocess.run([sys.executable, "-m", "triton_compile"], input=work, capture_output=True, env=environment)
    lines = done.stdout.decode().splitlines()
    found = [Report(**json.loads(line.removeprefix(_OK))) for line in lines if line.startswith(_OK)]
    if len(found) != len(kernels) * len(targets):
        raise RuntimeError(f"the compiler died after {len(found)} kernels:\n{done.stderr.decode()[-4000:]}")
    return found


def problems(reports: Sequence[Report]) -> list[str]:
    """One line for each kernel that does not compile, spills, or takes more shared memory than the chip has."""
    lines = []
    for report in reports:
        where = f"{report.kernel} on {report.target}"
        if report.error:
            lines.append(f"{where}: {report.error}")
        elif report.spills or report.local > FRAME:
            lines.append(f"{where}: {report.spills} bytes spilled, {report.local} bytes of stack")
        elif report.shared > SHARED_LIMITS[report.target]:
            lines.append(f"{where}: {report.shared} bytes of shared memory, {SHARED_LIMITS[report.target]} there are")
    return lines


def table(reports: Sequence[Report]) -> str:
    """For people: kernel, target, registers, spills, local, shared."""
    rows = [("kernel", "target", "registers", "spills", "local", "shared")]
    rows += [(r.kernel, r.target, r.registers, r.spills, r.local, r.shared) for r in reports]  # type: ignore[misc]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# in the compiler's process


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _build(kernel: Kernel, target: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    function = getattr(import_module(kernel.module), kernel.name)
    places = {name: place for place, name in enumerate(kernel.signature)}
    attrs = {(places[name],): [["tt.divisibility", 16]] for name in kernel.aligned}
    constexprs = {(places[name],): value for name, value in kernel.constexprs.items()}
    source = ASTSource(fn=function, signature=kernel.signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, **kernel.options}
    if not target.startswith("sm_"):
        options.pop("maxnreg", None)  # NVIDIA's alone
    return triton.compile(source, target=_gpu(target), options=options)


def _cuda_usage(cubin: bytes) -> tuple[int, int, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], 0, usage["STACK"] + usage["LOCAL"]  # a spill shows as stack


def _hip_usage(assembly: str) -> tuple[int, int, int]:
    def number(key: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)

    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return number("vgpr_count"), spills, number("private_segment_fixed_size")


def _told(error: BaseException | None) -> str:
    """The error and what caused it, each one's last lines: Triton's own says where, its cause says why."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {str(error)[-600:]}")
        error = error.__cause__ or error.__context__
    return "\n".join(lines)


def _report(kernel: Kernel, target: str) -> Report:
    name = kernel.label or kernel.name
    try:
        built = _build(kernel, target)
        usage = _cuda_usage(built.asm["cubin"]) if target.startswith("sm_") else _hip_usage(built.asm["amdgcn"])
    except Exception as error:  # whatever the compiler raises is the report
        return Report(name, target, 0, 0, 0, 0, _told(error))
    return Report(name, target, *usage, built.metadata.shared)


def _work() -> Iterator[Report]:
    kernels, targets = pickle.loads(sys.stdin.buffer.read())
    for kernel in kernels:
        for target in targets:
            yield _report(kernel, target)


def _main() -> None:
    for report in _work():
        print(_OK + json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    import triton_compile  # the module that the pickled classes belong to

    triton_compile._main()
