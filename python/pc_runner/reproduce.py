# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig3`: the paper's Fig. 3, test accuracy of M1, M2 and M3 over epochs for BP, PC_F and PC_FKL.

Every finished epoch is one row in `fig3.jsonl`, so the whole may be stopped, or killed, and run again until it is done:
rows that are there are not computed again, and a run in the middle continues from its checkpoint exactly.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pc_runner.classifier import ClassifierRun
from pc_runner.config import METHODS, MODELS, ConfigError, TrainConfig, machine
from pc_runner.data import Images
from pc_runner.jobs import by_epoch, check_rows, head, last_row, run_jobs
from pc_runner.metrics import append_json, read_rows
from pc_runner.plots import Line, accuracy_curves, table

SWEEP_LRS = (0.003, 0.01, 0.03, 0.1, 0.3)
SWEEP_IMAGES, SWEEP_EPOCHS, SWEEP_HELD_OUT = 10_000, 2, 5_000
DEFAULT_PHI_LR = 0.1

Row = dict[str, Any]


@dataclass(frozen=True)
class Fig3:
    """What to run: `base` gives all settings that models, methods, seeds and the sweep do not.

    methods: None for the figure's own. phi_lr: None for the best of the sweep, or 0.1 where none was made.
    """

    base: TrainConfig
    models: tuple[str, ...] = tuple(MODELS)
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    phi_lr: float | None = None
    sweep: bool = False
    sweep_lrs: tuple[float, ...] = SWEEP_LRS
    sweep_epochs: int = SWEEP_EPOCHS

    def __post_init__(self) -> None:
        for name in self.models:
            if name not in MODELS:
                raise ConfigError("models", f"names out of {', '.join(MODELS)}", repr(name), "separate them by commas")
        for name in self.methods or ():
            if name not in METHODS:
                raise ConfigError(
                    "methods", f"names out of {', '.join(METHODS)}", repr(name), "separate them by commas"
                )
            if not any(name in MODELS[model].methods for model in self.models):
                raise ConfigError("methods", f"methods of {', '.join(self.models)}", repr(name), "pc-run train --help")
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError("seeds", "whole numbers >= 0", str(min(self.seeds)), "separate them by commas")
        if any(lr < 0 for lr in self.sweep_lrs):
            raise ConfigError("sweep_lrs", "numbers >= 0", str(min(self.sweep_lrs)), "separate them by commas")
        if self.sweep_epochs < 1:
            raise ConfigError("sweep_epochs", "a whole number >= 1", str(self.sweep_epochs), "2 is the default")
        if self.phi_lr is not None:
            replace(self.base, phi_lr=self.phi_lr)  # raises for a rate out of bounds

    def pairs(self) -> list[tuple[str, str]]:
        """(model, method) in the order in which they run."""
        return [
            (model, method)
            for model in self.models
            for method in (self.methods or MODELS[model].figure)
            if method in MODELS[model].methods
        ]

    def config(self, model: str, method: str, seed: int, phi_lr: float) -> TrainConfig:
        """One run's configuration. Raises ConfigError."""
        return replace(self.base, model=model, method=method, seed=seed, phi_lr=phi_lr)


def run_fig3(
    wanted: Fig3,
    images: Images,
    out: Path,
    *,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Row:
    """Sweep if asked, train what is missing, and write `fig3.json` and `fig3.png`. Returns what the JSON holds.

    report: called with a line of text after every epoch. stop, progress: as in `train.epochs`; Interrupted if stopped.
    Raises ConfigError if `fig3.jsonl` holds one of these runs with other settings; nothing is trained or written then.
    """
    origin = {"command": command, "machine": machine(), "note": images.note}
    done = read_rows(out / "fig3.jsonl")
    for pair in wanted.pairs():  # before a sweep is spent on them
        for seed in wanted.seeds:
            check_rows(wanted.config(*pair, seed, DEFAULT_PHI_LR), done, besides=("phi_lr",))
    if wanted.sweep:
        _run_sweep(wanted, images, out, origin, stop=stop, progress=progress, report=report)
    rates = phi_lrs(wanted, read_rows(out / "sweep.jsonl"))
    jobs = [wanted.config(*pair, seed, rates[pair]) for seed in wanted.seeds for pair in wanted.pairs()]
    run_jobs(
        ClassifierRun, jobs, images, out / "fig3.jsonl", done, origin, report=lambda row: report(_line(row)),
        stop=stop, progress=progress,
    )  # fmt: skip
    return _finish(images.name, done, out, origin)


# -------------------------------------------------------------------------------------------------------- the phi lr


def phi_lrs(wanted: Fig3, sweep: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The phi lr of each (model, method): the one given, else the best of the sweep with these settings, else 0.1."""
    rates = {}
    for pair in wanted.pairs():
        fitting = [row for row in sweep if row["accuracy"] is not None and _swept_as(wanted, pair, row)]
        rates[pair] = max(fitting, key=lambda row: row["accuracy"])["phi_lr"] if fitting else DEFAULT_PHI_LR
        if wanted.phi_lr is not None and METHODS[pair[1]].algorithm != "bp":
            rates[pair] = wanted.phi_lr
    return rates


def _swept_as(wanted: Fig3, pair: tuple[str, str], row: Row) -> bool:
    same = row["config"] == wanted.config(*pair, seed=0, phi_lr=row["phi_lr"]).identity()
    return same and ("diverged" in row or row["epoch"] == wanted.sweep_epochs)


def _run_sweep(
    wanted: Fig3, images: Images, out: Path, origin: Row, *, report: Callable[[str], None], **how: Any
) -> None:
    """A row in `sweep.jsonl` per (model, method, phi lr): accuracy on held-out training images after `sweep_epochs`."""
    part, chosen_on = sweep_images(images)
    done = read_rows(out / "sweep.jsonl")
    todo = [(pair, lr) for pair in wanted.pairs() if METHODS[pair[1]].algorithm != "bp" for lr in wanted.sweep_lrs]
    for number, (pair, lr) in enumerate(todo, 1):
        job = wanted.config(*pair, seed=0, phi_lr=lr)
        if any(_swept_as(wanted, pair, row) and row["phi_lr"] == lr for row in done):
            continue
        label = f"[sweep {number}/{len(todo)}] {job.model} {job.method} phi lr {lr:g}"
        row = last_row(ClassifierRun, replace(job, epochs=wanted.sweep_epochs), part, label=label, **how)
        entry = {**head(job), **row, "accuracy_of": chosen_on, "config": job.identity(), **origin}
        append_json(out / "sweep.jsonl", entry)
        report("sweep " + _line(entry))


def sweep_images(images: Images) -> tuple[Images, str]:
    """The first 10,000 training images to train on, and training images after them, or their last tenth, to choose by.

    The test images take no part. Returns the images (x_test, y_test: those to choose by) and what those are, in words.
    """
    x, y = images.x_train, images.y_train
    n, last = len(y), min(len(y), SWEEP_IMAGES + SWEEP_HELD_OUT)
    first = SWEEP_IMAGES if n >= SWEEP_IMAGES + SWEEP_IMAGES // 10 else min(n, SWEEP_IMAGES) * 9 // 10
    last = last if first == SWEEP_IMAGES else min(n, SWEEP_IMAGES)
    part = replace(images, x_train=x[:first], y_train=y[:first], x_test=x[first:last], y_test=y[first:last])
    return part, f"training images {first:,} to {last:,}, trained on those before"


# -------------------------------------------------------------------------------------------------------- the result


def _line(row: Row) -> str:
    head = f"{row['model']} {row['method']} seed {row['seed']} phi lr {row['phi_lr']:g} epoch {row['epoch']}: "
    if row["accuracy"] is None:
        return head + row["diverged"]
    return head + f"{100 * row['accuracy']:.2f} %, F {row['energy']:.4g}, {row['ms_per_step']:.1f} ms per step"


def _finish(data: str, done: Sequence[Row], out: Path, origin: Row) -> Row:
    """Write the summary and the figure of all rows on this data, whichever command made them."""
    rows = [row for row in done if row["data"] == data]
    groups = {
        (model, method): [row for row in rows if (row["model"], row["method"]) == (model, method)]
        for model in MODELS
        for method in METHODS
    }
    groups = {pair: members for pair, members in groups.items() if members}
    summary = [_summarise(*pair, members) for pair, members in groups.items()]
    for entry in summary:
        bp = next((e["accuracy"] for e in summary if (e["model"], e["method"]) == (entry["model"], "bp")), None)
        both = bp is not None and entry["accuracy"] is not None
        entry["points_from_bp"] = 100 * (entry["accuracy"] - bp) if both else None
    document = {"data": data, **origin, "spread": "lowest to highest seed", "summary": summary}
    panels: dict[str, list[Line]] = {}
    for (model, method), members in groups.items():
        panels.setdefault(MODELS[model].title, []).append(_curve(method, members))
    note = f" ({origin['note']})" if origin["note"] else ""
    accuracy_curves(out / "fig3.png", panels, f"{data}{note}: mean, and lowest to highest seed")
    (out / "fig3.json").write_text(json.dumps(document, indent=1) + "\n")
    return document


def _summarise(model: str, method: str, members: Sequence[Row]) -> Row:
    accuracies = by_epoch(members, "accuracy")
    last = max(accuracies, default=0)
    values, config = accuracies.get(last, []), members[-1]["config"]
    times = [row["ms_per_step"] for row in members if "ms_per_step" in row]
    return {
        "model": model,
        "method": method,
        "phi_lr": None if METHODS[method].algorithm == "bp" else config["phi_lr"],
        "theta_lr": config["theta_lr"],
        "steps": config["steps"],
        "epochs": last,
        "seeds": len({row["seed"] for row in members}),
        "accuracy": statistics.fmean(values) if values else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "ms_per_step": statistics.median(times) if times else None,
        "backend": members[-1].get("backend", ""),
        "diverged": sum("diverged" in row for row in members),
    }


def _curve(method: str, members: Sequence[Row]) -> Line:
    found = {epoch: [100 * a for a in values] for epoch, values in by_epoch(members, "accuracy").items()}
    low, high = [min(v) for v in found.values()], [max(v) for v in found.values()]
    return Line(method, METHODS[method].title, list(found), [statistics.fmean(v) for v in found.values()], low, high)


def show(document: Row) -> str:
    """The summary as a table; the note of the data stands in its title."""
    note = f" ({document['note']})" if document["note"] else ""
    return f"{document['data']}{note}, test accuracy in percent\n{table([_cells(row) for row in document['summary']])}"


def _cells(row: Row) -> Row:
    known = row["accuracy"] is not None
    return {
        "model": row["model"].upper(),
        "method": METHODS[row["method"]].title,
        "accuracy": f"{100 * row['accuracy']:.2f}" if known else "diverged",
        "seeds' range": f"{100 * row['lowest']:.2f} to {100 * row['highest']:.2f}" if known else "",
        "from BP": "" if row["points_from_bp"] is None else f"{row['points_from_bp']:+.2f}",
        "phi lr": "" if row["phi_lr"] is None else f"{row['phi_lr']:g}",
        "theta lr": f"{row['theta_lr']:g}",
        "epochs": row["epochs"],
        "seeds": row["seeds"],
        "ms per step": "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.1f}",
    }
