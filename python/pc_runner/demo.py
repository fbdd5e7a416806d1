# SPDX-License-Identifier: MIT
"""`pc-run demo`: M2 and M3 learn the handwritten digits of scikit-learn by BP, PC_F and PC_FKL, side by side."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pc_runner.classifier import ClassifierRun
from pc_runner.config import METHODS, MODELS, TrainConfig, machine
from pc_runner.data import Images, load_images
from pc_runner.plots import Line, accuracy_curves, table
from pc_runner.train import epochs

MODEL_NAMES = ("m2", "m3")
LEARNT = 0.9  # the accuracy that counts as having learnt the digits


# chosen by hand so that every method learns this data; `pc-run reproduce` has a sweep
DEFAULTS = TrainConfig(
    data="digits", hidden=(128,) * 3, epochs=12, batch_size=64, steps=32, phi_lr=0.03, theta_lr=5e-3, seed=0
)


def run_demo(base: TrainConfig, out: Path, *, command: str = "", progress: bool = True) -> dict[str, Any]:
    """Train every model and method with the other settings of `base`; write `demo.png` and `demo.json` to `out`.

    Returns what the JSON holds: command, machine, settings, images, runs (model, method, and a row per epoch), summary
    (a row per run), findings (sentences), seconds.
    """
    started = time.perf_counter()
    jobs = [replace(base, model=model, method=method) for model in MODEL_NAMES for method in MODELS[model].figure]
    images = load_images(base.data, limit=base.limit)
    runs = []
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.model.upper()} {METHODS[job.method].title}"
        rows = list(epochs(ClassifierRun(job, images), label=label, progress=progress))
        runs.append({"model": job.model, "method": job.method, "rows": rows})
    document = {
        "command": command,
        "machine": machine(),
        "settings": base.identity() | {"epochs": base.epochs},
        "images": {"name": images.name, "train": len(images.y_train), "test": len(images.y_test), "note": images.note},
        "runs": runs,
        "summary": [_summary(run) for run in runs],
        "findings": findings(runs, images),
        "seconds": time.perf_counter() - started,
    }
    accuracy_curves(out / "demo.png", _panels(runs), f"{images.name}, {len(images.y_test)} test images, one seed")
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    return document


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    rows = run["rows"]
    return {
        "model": run["model"],
        "method": run["method"],
        "accuracy": rows[-1]["accuracy"],
        "learnt_in_epoch": next((row["epoch"] for row in rows if row["accuracy"] >= LEARNT), None),
        "ms_per_step": sorted(row["ms_per_step"] for row in rows)[len(rows) // 2],
        "backend": rows[-1]["backend"],
    }


def _panels(runs: Sequence[dict[str, Any]]) -> dict[str, list[Line]]:
    panels: dict[str, list[Line]] = {MODELS[name].title: [] for name in MODEL_NAMES}
    for run in runs:
        method, rows = run["method"], run["rows"]
        x, y = [row["epoch"] for row in rows], [100 * row["accuracy"] for row in rows]
        panels[MODELS[run["model"]].title].append(Line(method, METHODS[method].title, x, y))
    return panels


def show(document: dict[str, Any]) -> str:
    """The demo's result as text: a table, then the findings."""
    rows = [
        {
            "model": row["model"].upper(),
            "method": METHODS[row["method"]].title,
            "test accuracy %": f"{100 * row['accuracy']:.1f}",
            f"epochs to {100 * LEARNT:.0f} %": row["learnt_in_epoch"] or "not reached",
            "ms per training step": f"{row['ms_per_step']:.2f}",
        }
        for row in document["summary"]
    ]
    return "\n\n".join([table(rows), *(textwrap.fill(text, 100) for text in document["findings"])])


def findings(runs: Sequence[dict[str, Any]], images: Images) -> list[str]:
    """What the numbers show, and no more: sentences built from them."""
    sentences = []
    for name in MODEL_NAMES:
        of_model = {run["method"]: _summary(run) for run in runs if run["model"] == name}
        sentences.append(f"{MODELS[name].title}. {_compare(of_model, len(images.y_test))} {_learnt(of_model)}")
    ratios = _time_ratios([_summary(run) for run in runs])
    if ratios:
        sentences.append(
            f"A training step of predictive coding took {min(ratios):.1f} to {max(ratios):.1f} times as long as one "
            f"of BP (backend {runs[-1]['rows'][-1]['backend']})."
        )
    sentences.append("One seed on a small data set: `pc-run reproduce fig3` compares over seeds, on MNIST or CIFAR-10.")
    return sentences


def _compare(of_model: dict[str, dict[str, Any]], tests: int) -> str:
    """Each method's last accuracy beside BP's, with two standard errors of the difference as what counts as noise."""
    bp = of_model["bp"]["accuracy"]
    parts = []
    for method, row in of_model.items():
        if method == "bp":
            continue
        p = row["accuracy"]
        gap, noise = 100 * (p - bp), 200 * math.sqrt((p * (1 - p) + bp * (1 - bp)) / tests)
        side = "above" if gap > 0 else "below"
        verdict = "level with it" if gap == 0 else f"{abs(gap):.1f} points {side} it"
        if abs(gap) <= noise:
            verdict += f" (less than {tests} test images can resolve, +-{noise:.1f})"
        parts.append(f"{METHODS[method].title} {100 * p:.1f} %, {verdict}")
    return f"BP ends at {100 * bp:.1f} %; {'; '.join(parts)}."


def _learnt(of_model: dict[str, dict[str, Any]]) -> str:
    """Who passed the threshold, and when."""
    reached = sorted(
        (row["learnt_in_epoch"], METHODS[m].title) for m, row in of_model.items() if row["learnt_in_epoch"]
    )
    missed = [METHODS[m].title for m, row in of_model.items() if not row["learnt_in_epoch"]]
    threshold = f"{100 * LEARNT:.0f} %"
    if not reached:
        return f"None of them reached {threshold}."
    text = ", ".join(f"{title} in epoch {epoch}" for epoch, title in reached)
    return f"{threshold} was first reached by {text}" + (f"; not by {' and '.join(missed)}." if missed else ".")


def _time_ratios(summary: Sequence[dict[str, Any]]) -> list[float]:
    bp = {row["model"]: row["ms_per_step"] for row in summary if row["method"] == "bp"}
    return [row["ms_per_step"] / bp[row["model"]] for row in summary if row["method"] != "bp" and bp[row["model"]] > 0]
