# SPDX-License-Identifier: MIT
"""The README's figures of GPUs, from JSON files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import link, markdown

GRAPH = "closed form fp32, graph"


def gpu_section(path: Path) -> str:
    """What ran, beside what there is to beat in the same call; then the tiles that were tried."""
    document = json.loads(path.read_text())
    machine = document["machine"]
    head = (
        f"**On an {machine['device']}**: T = {document['steps']}, {document['networks']} ({link(path)})\n\n"
        f"{document['note']}. torch {machine['torch']}, CUDA {machine['cuda']}, Triton {machine['triton']}.\n\n"
    )
    return head + _calls(document["rows"]) + "\n\n" + _tiles(document["rows"])


def _calls(rows: list[dict[str, Any]]) -> str:
    """Median ms; the ratio to the closed form in a CUDA graph, where that was measured in the same call."""
    graphs = {(row["case"], row["call"]): row["median_ms"] for row in rows if row["what"] == GRAPH}
    cells = []
    for row in rows:
        if "launch" in row:
            continue
        base = graphs.get((row["case"], row["call"]))
        spread = f" ({row['lowest_ms']:.3f} to {row['highest_ms']:.3f})" if "lowest_ms" in row else ""
        kernel = max((k["launches"] * k["mean_us"] / 1e3 for k in row.get("kernels", {}).values()), default=0)
        against = f"{base / row['median_ms']:.2f}x" if base else ""
        right = {True: "yes", False: "no"}.get(row.get("passes"), "")  # type: ignore[arg-type]
        cells.append([row["case"], row["what"], f"{row['median_ms']:.3f}{spread}", f"{kernel:.3f}" if kernel else ""])
        cells[-1] += [against, right]
    names = ["case", "what", "median ms (range)", "of it kernels", f"over {GRAPH}", "right, to float64's rule"]
    return markdown(names, cells)


def _tiles(rows: list[dict[str, Any]]) -> str:
    """Median ms of captured calls over tiles and batch sizes."""
    tried = [row for row in rows if "launch" in row]
    batches = list(dict.fromkeys(row["case"] for row in tried))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in tried:
        m, n, k, warps, stages = row["launch"]
        tile = f"{m} x {n} x {k}, {warps} warps, {stages} stages"
        found.setdefault((row["what"], tile), {})[row["case"]] = row["median_ms"]
    cells = [[*key, *(f"{of[b]:.3f}" if b in of else "" for b in batches)] for key, of in found.items()]
    return "Triton's tiles, median ms\n\n" + markdown(["what", "tile", *batches], cells)


def cuda_section(path: Path) -> str:
    """What the kernels of csrc/cuda take, compiled."""
    document = json.loads(path.read_text())
    cells = []
    for target in dict.fromkeys(kernel["target"] for kernel in document["kernels"]):
        of = [kernel for kernel in document["kernels"] if kernel["target"] == target]
        most = {name: max(kernel[name] for kernel in of) for name in ("registers", "static_shared", "stack", "spills")}
        cells.append([target, str(len(of)), *map(str, most.values())])
    head = f"**CUDA kernels, {document['note']}** ({link(path)})\n\n"
    head += f"`{document['command']}`, nvcc {document['nvcc']}.\n\n"
    names = ["most registers", "most static shared memory", "most stack", "most spilled"]
    return head + markdown(["compiled for", "kernels", *names], cells)
