# SPDX-License-Identifier: MIT
"""What Triton's `infer` takes of GPUs that are not here: `python -m benchmarks.triton_resources`.

Compiles each entry of the launch tables to machine code for sm_80, sm_90, sm_100 and gfx942 (registers, spills, shared
memory), and counts launches, FLOPs and bytes moved of both schedules for the paper's networks. Nothing is run: the
JSON says so in every figure's head.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.run import machine
from pc_kernels.backends import triton_infer_table as table
from pc_kernels.backends import triton_launches as launches
from pc_kernels.backends.triton_infer_call import Call
from pc_kernels.backends.triton_infer_copy import WORDS
from pc_kernels.backends.triton_infer_layout import COPIED, Layout

OUT = Path(__file__).parent / "results" / "triton_resources.json"
NOTE = "compiled and counted, nothing measured"
STEPS = 32
BATCHES = (64, 256, 1024, 4096)
PAPER = {  # activations, energies of the three hidden nodes and the output
    "M1": (("tanh",) * 4, ("gaussian",) * 4),
    "M2": (("tanh", "tanh", "tanh", "identity"), ("gaussian", "gaussian", "gaussian", "categorical")),
    "M3": (("tanh", "identity", "tanh", "identity"), ("gaussian", "categorical", "gaussian", "categorical")),
}
PHASES = {
    "start": table.START, "start rows": table.START_ROWS, "update": table.UPDATE,
    "update rows": table.UPDATE_ROWS_PHASE, "predict": table.PREDICT, "predict rows": table.PREDICT_ROWS_PHASE,
    "persistent": table.ALL,
}  # fmt: skip
SIGNATURE = {
    "work": "*fp32", "table": "*i64", "stages": "*i32", "energies": "*fp32", "signals": "*i32", "batch": "i32",
    "layers": "i32", "slots": "i32", "step": "i32", "steps": "i32", "stage_count": "i32", "layer": "i32",
    **dict.fromkeys(("PHASE", "BM", "BN", "BK", "ROWS", "ROW_BLOCK", "FORM"), "constexpr"),
}  # fmt: skip


def _compiler() -> Any:
    """tests/triton_compile.py, which is no package's."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its own process finds it there, too
    if importlib.util.find_spec("triton_compile") is None:
        raise SystemExit("run this from the repository: tests/triton_compile.py is missing")
    return importlib.import_module("triton_compile")


def call(
    model: str,
    batch: int,
    precision: str,
    launch: launches.Launch,
    width: int = 512,
    schedule: str = launches.PERSISTENT,
) -> Call:
    """A paper network's inference with a clamped output, T = 32."""
    activations, energies = PAPER[model]
    softmax = tuple(energy == "categorical" for energy in energies)
    none, widths = (False,) * 4, (width, width, width, 10)
    return Call(
        batch=batch, inputs=784, widths=widths, activations=activations, energies=energies,
        feeds=tuple("softmax" if s else "identity" for s in softmax),
        rules=tuple("natural" if s else "euclidean" for s in softmax), lr_scales=(1.0,) * 4, biases=(True,) * 4,
        states=("", "", "", "float"), masks=none, holds=none, noise=none, clamped=(False, False, False, True),
        steps=STEPS, momentum=False, precision=precision, trace=False,
        choice=launches.Choice(schedule, launches.MEASURED, launch, False), interpreted=False,
    )  # fmt: skip


def kernel(described: Call, phase: str, hip: bool = False) -> Any:
    """One phase's kernel, as tests/triton_compile.py takes it."""
    layout, launch = Layout(described), described.choice.launch
    by_rows = phase.endswith("rows")
    shape = f"rows of {layout.row_block}" if by_rows else "{}x{}x{}".format(*launch[:3])
    warps = layout.row_warps if by_rows else launch.warps
    return _compiler().Kernel(
        "pc_kernels.backends.triton_infer_phases",
        "infer_kernel",
        SIGNATURE,
        {
            "PHASE": PHASES[phase].value, "BM": launch.block_m, "BN": launch.block_n, "BK": launch.block_k,
            "ROWS": layout.rows, "ROW_BLOCK": layout.row_block, "FORM": layout.form,
        },
        warps=warps,
        stages=launches.HIP_STAGES if hip else launch.stages,
        aligned=("work", "table", "stages", "energies", "signals"),
        options={} if hip else {"maxnreg": launches.registers(warps)},
        label=f"{described.precision} {phase} {shape}",
    )  # fmt: skip


def entries() -> Iterator[tuple[str, launches.Launch]]:
    """(precision, constants) of every entry of LAUNCHES."""
    for precision, rows in launches.LAUNCHES.items():
        for _, launch in rows:
            yield precision, launch


def tile_kernels(model: str, phases: tuple[str, ...], hip: bool) -> list[Any]:
    """The phases of tiles of every launch-table entry."""
    return [kernel(call(model, 256, p, launch), phase, hip) for p, launch in entries() for phase in phases]


def row_kernels(hip: bool) -> list[Any]:
    """The phases of rows of every entry of ROW_LAUNCHES that is longer than a tile; in M3."""
    launch = launches.LAUNCHES["bf16_delta"][0][1]
    widths = [width for width, _, _ in launches.ROW_LAUNCHES if width > launch.block_n]
    phases = ("update rows", "predict rows")
    return [kernel(call("M3", 256, "bf16_delta", launch, width), phase, hip) for width in widths for phase in phases]


def copy_kernels() -> list[Any]:
    """The launches that copy in and out, with a trace."""
    module, addresses = "pc_kernels.backends.triton_infer_copy", ("i64",) * 11
    shared = {"work": "*fp32", "signals": "*i32", "jobs": "*i64", "ends": "*i32"}
    pack = {
        **shared, "scales": "*fp32", "rates": "*fp32", "addresses": addresses, "lr": "fp32", "momentum": "fp32",
        "layers": "i32", **dict.fromkeys(("FIRST_LAUNCH", "JOBS", "NODES", "BLOCK"), "constexpr"),
    }  # fmt: skip
    collect = {
        **shared, "addresses": addresses, "energies": "*fp32", "recorded": "*i32", "trace": "*fp32", "status": "*i64",
        **dict.fromkeys(("batch", "layers", "steps", "products", "code", "parts", "copies"), "i32"),
        **dict.fromkeys(("FIRST_LAUNCH", "TRACE", "JOBS", "BLOCK"), "constexpr"),
    }  # fmt: skip
    chosen = {"FIRST_LAUNCH": True, "JOBS": 16, "BLOCK": COPIED}
    upload = {"to": "*i32", "words": ("i64",) * WORDS, "SIZE": "constexpr"}
    kernel = _compiler().Kernel
    return [
        kernel(module, "pack_kernel", pack, {**chosen, "NODES": 4}),
        kernel(module, "collect_kernel", collect, {**chosen, "TRACE": True}),
        kernel(module, "upload_kernel", upload, {"SIZE": WORDS}, warps=1),
    ]


def first_kernels(model: str, hip: bool) -> list[Any]:
    """START and ALL of the entries for small batches."""
    first = [(precision, rows[0][1]) for precision, rows in launches.LAUNCHES.items()]
    return [kernel(call(model, 256, p, launch), phase, hip) for p, launch in first for phase in ("start", "persistent")]


def groups(hip: bool) -> list[list[Any]]:
    """A move's phases of every entry of the tables; the copies; each precision's start and all steps in one launch."""
    return [
        tile_kernels("M2", ("update", "predict"), hip),
        [*row_kernels(hip), *copy_kernels()],
        first_kernels("M2", hip),
    ]


def compiled() -> Iterator[list[Any]]:
    """Reports of everything on every target, group after group."""
    compiler = _compiler()
    for hip, targets in ((True, compiler.TARGETS[3:]), (False, compiler.TARGETS[:3])):
        for wanted in groups(hip):
            found = compiler.compiled(wanted, targets)
            print(compiler.table(found), flush=True)
            yield found


def problems(reports: list[Any]) -> list[str]:
    """As tests/triton_compile.py finds them, but that AMD's scalar registers kept in lanes of vector registers (no
    scratch memory) are no spill."""
    judged = [replace(r, spills=0) if r.target == "gfx942" and not r.local else r for r in reports]
    return _compiler().problems(judged)


def moved(layout: Layout) -> dict[str, float]:
    """Of the T steps: launches, FLOPs of the products, and bytes that tiles read and write (of the caches, mostly)."""
    described, launch = layout.call, layout.call.choice.launch
    size = 2 if described.precision.startswith("bf16") else 4
    flops = read = written = 0
    for step in range(1, layout.moving_steps + 1):
        move = layout.moves[min(step, len(layout.moves)) - 1]
        for l in range(described.size):
            products = []
            if move.feedback[l]:
                products.append((described.fed(l), described.widths[l + 1]))
            if l and move.moves[l - 1]:
                products.append((described.widths[l], described.fed(l - 1)))
            for out, inner in products:
                flops += 2 * described.batch * out * inner
                read += size * layout.tiles(out) * (launch.block_m + launch.block_n) * inner
                read += 3 * 4 * described.batch * out  # phi, mu, a or the bias
                written += (3 * 4 + size) * described.batch * out
    per_step = [sum(1 for items in layout.totals(t) if items) for t in range(1, layout.moving_steps + 1)]
    phases = 2 + layout.form.ROW_UPDATES + layout.form.ROW_PREDICTS  # of a step; each ends at a barrier
    two = described.choice.schedule == launches.TWO_LAUNCHES
    started = sum(1 for l in range(described.size) for items in layout.starts(l) if items)
    return {
        "launches": started + sum(per_step) if two else 1,
        "grid_barriers": 0 if two else started + phases * layout.moving_steps,
        "gflop": round(flops / 1e9, 3),
        "mib_read": round(read / 2**20),
        "mib_written": round(written / 2**20),
        "workspace_mib": round(4 * layout.size / 2**20, 1),
    }


def schedules() -> list[dict[str, Any]]:
    """Both schedules, the paper's networks, all batches and precisions."""
    rows = []
    for model in PAPER:
        for batch in BATCHES:
            for precision in launches.LAUNCHES:
                launch = next(constants for limit, constants in launches.LAUNCHES[precision] if batch <= limit)
                for schedule in (launches.TWO_LAUNCHES, launches.PERSISTENT):
                    layout = Layout(call(model, batch, precision, launch, schedule=schedule))
                    head = {"model": model, "batch": batch, "precision": precision, "schedule": schedule}
                    rows.append({**head, **moved(layout)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the T-step kernels for GPUs that are not here.")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON to write (default: %(default)s)")
    out = parser.parse_args().out
    result = {
        "command": "python -m benchmarks.triton_resources",
        "note": NOTE,
        "machine": {**machine(), "triton": triton.__version__},
        "steps": STEPS,
        "networks": "784-512-512-512-10, output clamped; kernels: M2's tiles, M3's rows",
        "schedules": schedules(),
        "kernels": [],
    }
    found: list[str] = []
    for reports in compiled():  # written after every group: what stops it loses little
        result["kernels"] += [asdict(report) for report in reports]
        found += problems(reports)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(found) or f"no spills, everything fits; written to {out.name}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
