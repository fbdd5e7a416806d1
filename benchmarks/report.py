# SPDX-License-Identifier: MIT
"""`python -m benchmarks.report`: writes the README's figures from the JSON files in benchmarks/results, and from
nothing else."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import link, markdown
from benchmarks.report_gpu import cuda_section, gpu_section
from benchmarks.report_language import memory_section, output_section, perplexity_section, step_section
from benchmarks.report_vae import losses_section, vae_section

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- figures -->", "<!-- /figures -->"


def accuracy_of(entry: dict[str, Any]) -> str:
    """Mean of the seeds, and the lowest and highest."""
    if entry["accuracy"] is None:
        return "diverged"
    spread = f" ({100 * entry['lowest']:.2f} to {100 * entry['highest']:.2f})" if entry["seeds"] > 1 else ""
    return f"{100 * entry['accuracy']:.2f}{spread}"


def accuracy_section(path: Path) -> str:
    """A table of a `pc-run reproduce fig3` summary, and its picture where there is one."""
    document = json.loads(path.read_text())
    note = f" ({document['note']})" if document["note"] else ""
    rows = [
        [
            entry["model"].upper(),
            entry["method"],
            accuracy_of(entry),
            "" if entry["points_from_bp"] is None else f"{entry['points_from_bp']:+.2f}",
            "" if entry["phi_lr"] is None else f"{entry['phi_lr']:g}",
            f"{entry['theta_lr']:g}",
            str(entry["epochs"]),
            str(entry["seeds"]),
        ]
        for entry in document["summary"]
    ]
    header = ["model", "method", "test accuracy %", "from BP", "phi lr", "theta lr", "epochs", "seeds"]
    source = f"`{document['command']}` on {document['machine']['cpu']}, {document['machine']['threads']} thread(s)."
    picture = path.with_suffix(".png")
    shown = f"\n\n![accuracy over epochs](benchmarks/results/{picture.name})" if picture.exists() else ""
    return f"**{document['data']}{note}**, T = 32 ({link(path)})\n\n{source}\n\n{markdown(header, rows)}{shown}"


def steps_section(paths: Sequence[Path]) -> str:
    """Test accuracy over T, from one summary per T and learning rate."""
    wanted = ("m2", "pc_fkl")
    entries = [(entry, path) for path in paths for entry in json.loads(path.read_text())["summary"]]
    entries = [pair for pair in entries if (pair[0]["model"], pair[0]["method"]) == wanted]
    entries.sort(key=lambda pair: (pair[0]["steps"], pair[0]["phi_lr"]))
    rows = [
        [str(entry["steps"]), f"{entry['phi_lr']:g}", accuracy_of(entry), str(entry["epochs"]), link(path)]
        for entry, path in entries
    ]
    title = (
        "**How few steps do** (MNIST, M2, PC_FKL, seed 0, at T = 32 three seeds; at T = 2 layer 1 is never reached and "
        "keeps its start)"
    )
    return f"{title}\n\n{markdown(['T', 'phi lr', 'test accuracy %', 'epochs', 'file'], rows)}"


def training_section(path: Path) -> str:
    """Median times of one whole training step."""
    document = json.loads(path.read_text())
    names = list(document["rows"][0]["seconds"])
    rows = []
    for row in document["rows"]:
        medians = {name: statistics.median(row["seconds"][name]) for name in names}
        parts = {name: statistics.median(seconds) for name, seconds in row["parts"].items()}
        cells = [f"{medians[name] * 1e3:.2f} ({medians[name] / medians['BP']:.2f})" for name in names]
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        rows.append([row["case"]["name"], str(row["case"]["steps"]), *cells, shares])
    machine = document["machine"]
    head = (
        "**A training step**: inference, weight gradients, fused Adam; median ms (times an eager backpropagation step) "
        f"({link(path)})\n\n`{document['command']}` on {machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}.\n\n"
    )
    return head + markdown(["case", "T", *names, "of PC"], rows)


def timing_section(path: Path) -> str:
    """Median times of every method and case, and the ratio to eager autograd with frozen weights."""
    document = json.loads(path.read_text())
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["seconds"]))
    rows = []
    for row in document["rows"]:
        base = statistics.median(row["seconds"]["autograd, weights frozen"])
        cells = [row["case"]["name"]]
        for name in names:
            seconds = row["seconds"].get(name)
            median = statistics.median(seconds) if seconds else 0.0
            cells.append(f"{median * 1e3:.1f} ({base / median:.2f}x)" if seconds else "gate failed")
        rate = row["flops"] / statistics.median(row["seconds"]["cpp fp32"]) * 1e-9
        cells.append(f"{rate / statistics.median(row['peak_gflops']):.0%}")
        rows.append(cells)
    machine = document["machine"]
    head = (
        f"**Inference, T = 32**, median ms and speed over eager autograd with frozen weights "
        f"({link(path)})\n\n`{document['command']}` on {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}. Last column: `cpp fp32`'s share of the FMA "
        "peak measured in the same rounds.\n\n"
    )
    return head + markdown(["case", *names, "of peak"], rows)


def resources_section(path: Path) -> str:
    """What the GPU kernels take when compiled for chips that are not here."""
    document = json.loads(path.read_text())
    targets = dict.fromkeys(kernel["target"] for kernel in document["kernels"])
    chips = [
        [
            target,
            str(len(of)),
            str(max(kernel["registers"] for kernel in of)),
            f"{max(kernel['shared'] for kernel in of) / 1024:.0f} KiB",
            str(sum(kernel["local"] > 0 for kernel in of)),
        ]
        for target in targets
        if (of := [kernel for kernel in document["kernels"] if kernel["target"] == target])
    ]
    keys = ("launches", "grid_barriers", "gflop", "mib_read", "mib_written", "workspace_mib")
    runs = [
        [entry["model"], str(entry["batch"]), entry["schedule"], *(str(entry[key]) for key in keys)]
        for entry in document["schedules"]
        if entry["precision"] == "bf16_delta" and entry["batch"] in (64, 256, 4096) and entry["model"] != "M2"
    ]
    head = (
        f"**Triton kernels, {document['note']}** ({link(path)})\n\n`{document['command']}`, Triton "
        f"{document['machine']['triton']}; {document['networks']}, T = {document['steps']}, `bf16_delta`.\n\n"
    )
    first = markdown(["compiled for", "kernels", "most registers", "most shared memory", "that use the stack"], chips)
    names = ["launches", "grid barriers", "GFLOP", "MiB read by tiles", "MiB written", "workspace MiB"]
    return head + first + "\n\n" + markdown(["network", "B", "schedule", *names], runs)


def figures() -> str:
    """The whole section."""
    parts = [accuracy_section(path) for path in sorted(RESULTS.glob("fig3_*.json"))]
    parts += [steps_section([*sorted(RESULTS.glob("steps_*.json")), RESULTS / "fig3_mnist_m2.json"])]
    parts += [losses_section(path) for path in sorted(RESULTS.glob("fig5_*.json"))]
    parts += [timing_section(path) for path in sorted(RESULTS.glob("cpu_infer*.json"))]
    parts += [training_section(path) for path in sorted(RESULTS.glob("cpu_training_step*.json"))]
    parts += [vae_section(path) for path in sorted(RESULTS.glob("cpu_vae*.json"))]
    parts += [perplexity_section(path) for path in sorted(RESULTS.glob("fig7_*.json"))]
    parts += [step_section(path) for path in sorted(RESULTS.glob("cpu_transformer*.json"))]
    parts += [output_section(path) for path in sorted(RESULTS.glob("cpu_linear_softmax*.json"))]
    parts += [memory_section(path) for path in sorted(RESULTS.glob("memory*.json"))]
    parts += [gpu_section(path) for path in sorted(RESULTS.glob("gpu_*.json"))]
    parts += [cuda_section(path) for path in sorted(RESULTS.glob("cuda_resources*.json"))]
    parts += [resources_section(path) for path in sorted(RESULTS.glob("triton_resources*.json"))]
    return "\n\n".join(parts)


def main() -> int:
    """Write it, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is not what the JSON files give")
    check: Any = parser.parse_args().check
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n{figures()}\n{END}{after}"
    if check:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
