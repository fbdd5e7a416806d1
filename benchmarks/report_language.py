# SPDX-License-Identifier: MIT
"""The README's figures of the language model and of memory, from JSON files; `benchmarks.report` puts them in."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.markdown import link, markdown


def _source(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return f"`{document['command']}` on {machine['cpu']}, {machine['threads']} thread(s)."


def perplexity_section(path: Path) -> str:
    """A table of a `pc-run reproduce fig7` summary, the definition of its figure, its picture, a few completions."""
    document = json.loads(path.read_text())
    note = f" ({document['note']})" if document["note"] else ""
    rows = [
        [
            entry["method"],
            "diverged" if entry["test"] is None else f"{entry['test']:.1f} ({entry['lowest']:.1f} to {entry['highest']:.1f})",
            "" if entry["test_over_bp"] is None else f"{entry['test_over_bp']:.3f}",
            f"{entry['theta_lr']:g}",
            "" if entry["phi_lr"] is None else f"{entry['phi_lr']:g}",
            str(entry["epochs"]),
            str(entry["seeds"]),
        ]
        for entry in document["summary"]
    ]  # fmt: skip
    header = ["method", "test perplexity (seeds)", "of BP's", "theta lr", "phi lr", "epochs", "seeds"]
    lines = [f"**Language model, {document['data']}**{note} ({link(path)})", _source(document)]
    lines += [f"Figure: {document['perplexity']}.", markdown(header, rows)]
    if path.with_suffix(".png").exists():
        lines.append(f"![dev perplexity over epochs](benchmarks/results/{path.with_suffix('.png').name})")
    texts = [[c["method"], c["text"], ", ".join(f"{piece} {p:.2f}" for piece, p in c["next"][:3])]
             for c in document["completions"]]  # fmt: skip
    if texts:
        lines.append(markdown(["method", "greedy completion of 12 tokens", "likeliest next tokens"], texts))
    return "\n\n".join(lines)


def memory_section(path: Path) -> str:
    """A table of `pc-run reproduce memory`."""
    document = json.loads(path.read_text())
    mib = 2**20
    rows = [
        [
            row["model"], row["method"], f"{row['held'] / mib:.1f}", f"{row['peak'] / mib:.1f}",
            f"{row['peak_over_bp']:.2f}", f"{row['rss'] / mib:.1f}", f"{row['rss_over_bp']:.2f}",
        ]
        for row in document["rows"]
    ]  # fmt: skip
    header = ["model", "method", "held MiB", "peak MiB", "of BP's", "RSS MiB", "of BP's"]
    text = "held: weights, Adam's state, batch; peak: with all tensors of a training step; RSS: the process's growth"
    return f"**Memory of a training step** ({link(path)})\n\n{_source(document)}\n\n{text}.\n\n{markdown(header, rows)}"


def step_section(path: Path) -> str:
    """Median times of a training step of the language model."""
    document = json.loads(path.read_text())
    names = list(document["rows"][0]["seconds"])
    rows = []
    for row in document["rows"]:
        medians = {name: statistics.median(row["seconds"][name]) for name in names}
        ours = medians["PC_FKL"]
        cells = [f"{medians[name] * 1e3:.0f} ({medians[name] / ours:.2f})" for name in names]
        rows.append([f"{row['batch']} ({row['rows']})", *cells])
    steps = document["rows"][0]["steps"]
    head = f"**A training step of the language model, T = {steps}**: median ms (times PC_FKL's) ({link(path)})"
    return f"{head}\n\n{_source(document)}\n\n{markdown(['batch (targets)', *names], rows)}"


def output_section(path: Path) -> str:
    """Median times of a language model's output layer, and its peak memory."""
    document = json.loads(path.read_text())
    names = [name for name in document["rows"][0]["seconds"] if not name.startswith(" ")]
    rows = []
    for row in document["rows"]:
        cells = [f"{row['rows']}"]
        for name in names:
            cells.append(f"{statistics.median(row['seconds'][name]) * 1e3:.0f}, {row['peak_bytes'][name] / 2**20:.0f}")
        rows.append(cells)
    first = document["rows"][0]
    head = f"**An output layer of {first['width']} x {first['classes']}**: median ms, peak MiB ({link(path)})"
    return f"{head}\n\n{_source(document)}\n\n{markdown(['rows', *names], rows)}"
