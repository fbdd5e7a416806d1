# SPDX-License-Identifier: MIT
"""The README's figures of the autoencoders, from JSON files in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.markdown import link, markdown


def losses_section(path: Path) -> str:
    """A table of a `pc-run reproduce fig5` summary, its sweep in a line, and its picture."""
    document = json.loads(path.read_text())
    note = f" ({document['note']})" if document["note"] else ""
    rows = [
        [
            f"`{entry['model']}`",
            entry["method"],
            f"{entry['test_loss']:.3f} ({entry['lowest']:.3f} to {entry['highest']:.3f})",
            "" if entry["percent_from_bp"] is None else f"{entry['percent_from_bp']:+.2f}",
            f"{entry['reconstruction']:.3f}",
            f"{entry['kl']:.2f}",
            ", ".join(f"{entry['variances'][i]:.3f}" for i in (1, 3, 5)),
            "" if entry["phi_lr"] is None else f"{entry['phi_lr']:g}",
            str(entry["epochs"]),
            str(entry["seeds"]),
        ]
        for entry in document["summary"]
    ]
    names = ["model", "method", "test loss (seeds)", "% from BP", "reconstruction", "KL"]
    header = [*names, "variance: 5 %, median, 95 %", "phi lr", "epochs", "seeds"]
    first = document["summary"][0]
    settings = ", ".join(f"{name} {first[name]}" for name in ("output", "prior", "batch_size", "steps", "theta_lr"))
    swept = ", ".join(
        f"{row['model']} {row['method']}{'' if row['method'] == 'bp' else ' ' + format(row['phi_lr'], 'g')}: "
        + ("diverged" if row["test_loss"] is None else f"{row['test_loss']:.2f}")
        for row in document["sweep"]
    )
    lines = [f"**{document['data']}{note}, autoencoders** ({link(path)}): {settings}"]
    lines.append(
        f"`{document['command']}` on {document['machine']['cpu']}, {document['machine']['threads']} thread(s)."
    )
    lines.append(markdown(header, rows))
    if swept:
        entry = document["sweep"][0]
        lines.append(f"Sweep of the phi lr: loss after {entry['epoch']} epochs on {entry['loss_of']}: {swept}.")
    picture = path.with_suffix(".png")
    if picture.exists():
        lines.append(f"![test loss over epochs](benchmarks/results/{picture.name})")
    return "\n\n".join(lines)


def vae_section(path: Path) -> str:
    """Median and least times of the autoencoders' inference, and the engine's speed over each."""
    document = json.loads(path.read_text())
    names = list(document["rows"][0]["seconds"])
    rows = []
    for row in document["rows"]:
        ours = row["seconds"][names[0]]
        cells = [f"`{row['case']['model']}`, B = {row['case']['batch']}"]
        for name in names:
            seconds = row["seconds"][name]
            median = statistics.median(seconds)
            ratios = f"{median / statistics.median(ours):.2f}x, {min(seconds) / min(ours):.2f}x"
            cells.append(f"{median * 1e3:.1f}, {min(seconds) * 1e3:.1f} ({ratios})")
        rows.append(cells)
    machine, steps = document["machine"], document["rows"][0]["case"]["steps"]
    head = (
        f"**Inference of the autoencoders, T = {steps}**: median and least ms (times the engine's) ({link(path)})\n\n"
        f"`{document['command']}` on {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}.\n\n"
    )
    return head + markdown(["case", *names], rows)
