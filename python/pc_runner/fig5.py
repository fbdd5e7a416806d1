# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig5`: the paper's Fig. 5, the test loss of autoencoders over epochs for BP and PC.

As for Fig. 3, every finished epoch is one row, here in `fig5.jsonl`; it may be stopped, or killed, and run again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pc_runner.config import METHODS, VAE_METHODS, VAES, ConfigError, VaeConfig, machine
from pc_runner.data import Images
from pc_runner.jobs import by_epoch, check_rows, head, last_row, run_jobs
from pc_runner.metrics import append_json, read_rows
from pc_runner.plots import Line, curves, table
from pc_runner.reproduce import sweep_images
from pc_runner.vae_run import VaeRun, loss_line

SWEEP_LRS = (0.003, 0.01, 0.03, 0.1, 0.3)
SWEEP_EPOCHS = 6
TITLES = {"bp": "BP", "pc_fkl": "PC"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Fig5:
    """What to run: `base` gives all settings that models, methods, seeds and the sweep do not.

    phi_lr: None for the best of the sweep, or the base's where none was made.
    """

    base: VaeConfig
    models: tuple[str, ...] = tuple(VAES)
    methods: tuple[str, ...] = VAE_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    phi_lr: float | None = None
    sweep: bool = False
    sweep_lrs: tuple[float, ...] = SWEEP_LRS
    sweep_epochs: int = SWEEP_EPOCHS

    def __post_init__(self) -> None:
        for field, names, known in (("models", self.models, VAES), ("methods", self.methods, VAE_METHODS)):
            for name in names:
                if name not in known:
                    raise ConfigError(field, f"names out of {', '.join(known)}", repr(name), "separate them by commas")
        for seed in self.seeds:
            replace(self.base, seed=seed)  # raises for one out of bounds, as below
        for lr in (*self.sweep_lrs, self.base.phi_lr if self.phi_lr is None else self.phi_lr):
            replace(self.base, phi_lr=lr)
        if self.sweep_epochs < 1:
            raise ConfigError("sweep_epochs", "a whole number >= 1", str(self.sweep_epochs), "leave it out")

    def pairs(self) -> list[tuple[str, str]]:
        """(model, method) in the order in which they run."""
        return [(model, method) for model in self.models for method in self.methods]

    def config(self, model: str, method: str, seed: int, phi_lr: float) -> VaeConfig:
        """One run's configuration."""
        return replace(self.base, model=model, method=method, seed=seed, phi_lr=phi_lr)


def run_fig5(
    wanted: Fig5,
    images: Images,
    out: Path,
    *,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Row:
    """Sweep if asked, train what is missing, and write `fig5.json` and `fig5.png`. Returns what the JSON holds.

    report: called with a line of text after every epoch. stop, progress: as in `train.epochs`; Interrupted if stopped.
    Raises ConfigError if `fig5.jsonl` holds one of these runs with other settings; nothing is trained or written then.
    """
    origin = {"command": command, "machine": machine(), "note": images.note}
    done = read_rows(out / "fig5.jsonl")
    for pair in wanted.pairs():  # before a sweep is spent on them
        for seed in wanted.seeds:
            check_rows(wanted.config(*pair, seed, wanted.base.phi_lr), done, besides=("phi_lr",))
    if wanted.sweep:
        _run_sweep(wanted, images, out, origin, stop=stop, progress=progress, report=report)
    rates = phi_lrs(wanted, read_rows(out / "sweep.jsonl"))
    jobs = [wanted.config(*pair, seed, rates[pair]) for seed in wanted.seeds for pair in wanted.pairs()]
    run_jobs(
        VaeRun, jobs, images, out / "fig5.jsonl", done, origin, report=lambda row: report(_line(row)),
        stop=stop, progress=progress,
    )  # fmt: skip
    return _finish(images.name, done, read_rows(out / "sweep.jsonl"), out, origin)


# -------------------------------------------------------------------------------------------------------- the phi lr


def phi_lrs(wanted: Fig5, sweep: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The phi lr of each (model, method): the one given, else the sweep's least loss, else the base's. BP has no use
    for it: always the base's."""
    rates = {}
    for pair in wanted.pairs():
        rates[pair] = wanted.base.phi_lr
        if METHODS[pair[1]].algorithm == "bp":
            continue
        fitting = [row for row in sweep if row["test_loss"] is not None and _swept_as(wanted, pair, row)]
        if wanted.phi_lr is not None:
            rates[pair] = wanted.phi_lr
        elif fitting:
            rates[pair] = min(fitting, key=lambda row: row["test_loss"])["phi_lr"]
    return rates


def _swept_as(wanted: Fig5, pair: tuple[str, str], row: Row) -> bool:
    same = row["config"] == wanted.config(*pair, seed=0, phi_lr=row["phi_lr"]).identity()
    return same and ("diverged" in row or row["epoch"] == wanted.sweep_epochs)


def _run_sweep(
    wanted: Fig5, images: Images, out: Path, origin: Row, *, report: Callable[[str], None], **how: Any
) -> None:
    """A row in `sweep.jsonl` per (model, phi lr): the loss on held-out training images after `sweep_epochs`; one of BP
    for comparison."""
    part, chosen_on = sweep_images(images)
    done = read_rows(out / "sweep.jsonl")
    todo = [
        (pair, lr)
        for pair in wanted.pairs()
        for lr in (wanted.sweep_lrs if METHODS[pair[1]].algorithm != "bp" else (wanted.base.phi_lr,))
    ]
    for number, (pair, lr) in enumerate(todo, 1):
        job = wanted.config(*pair, seed=0, phi_lr=lr)
        if any(_swept_as(wanted, pair, row) and row["phi_lr"] == lr for row in done):
            continue
        label = f"[sweep {number}/{len(todo)}] {job.model} {job.method} phi lr {lr:g}"
        row = last_row(VaeRun, replace(job, epochs=wanted.sweep_epochs), part, label=label, **how)
        entry = {**head(job), **row, "loss_of": chosen_on, "config": job.identity(), **origin}
        append_json(out / "sweep.jsonl", entry)
        report("sweep " + _line(entry))


# -------------------------------------------------------------------------------------------------------- the result


def _line(row: Row) -> str:
    head = f"{row['model']} {row['method']} seed {row['seed']} phi lr {row['phi_lr']:g} epoch {row['epoch']}: "
    if row["test_loss"] is None:
        return head + row["diverged"]
    return head + f"{loss_line(row)}, {row['ms_per_step']:.1f} ms per step"


def _finish(data: str, done: Sequence[Row], sweep: Sequence[Row], out: Path, origin: Row) -> Row:
    """Write the summary and the figure of all rows on this data, whichever command made them."""
    rows = [row for row in done if row["data"] == data]
    pairs = [(model, method) for model in VAES for method in VAE_METHODS]
    groups = {pair: [row for row in rows if (row["model"], row["method"]) == pair] for pair in pairs}
    groups = {pair: members for pair, members in groups.items() if members}
    summary = [_summarise(*pair, members) for pair, members in groups.items()]
    for entry in summary:
        bp = next((e for e in summary if (e["model"], e["method"]) == (entry["model"], "bp")), None)
        alike = bp is not None and bp["epochs"] == entry["epochs"] and None not in (bp["test_loss"], entry["test_loss"])
        entry["percent_from_bp"] = 100 * (entry["test_loss"] / bp["test_loss"] - 1) if alike and bp else None
    swept = [
        {name: row.get(name) for name in ("model", "method", "phi_lr", "epoch", "test_loss", "loss_of", "diverged")}
        for row in sweep
        if row["data"] == data
    ]
    document = {"data": data, **origin, "spread": "lowest to highest seed", "summary": summary, "sweep": swept}
    panels: dict[str, list[Line]] = {}
    for (model, method), members in groups.items():
        panels.setdefault(VAES[model].title, []).append(_curve(method, members))
    note = f" ({origin['note']})" if origin["note"] else ""
    title = f"{data}{note}: mean, and lowest to highest seed"
    curves(out / "fig5.png", panels, title, "test loss (nats per image)")
    (out / "fig5.json").write_text(json.dumps(document, indent=1) + "\n")
    return document


def _summarise(model: str, method: str, members: Sequence[Row]) -> Row:
    found = {name: by_epoch(members, name) for name in ("test_loss", "reconstruction", "kl")}
    last = max(found["test_loss"], default=0)
    ends = {name: values.get(last, []) for name, values in found.items()}
    config, times = members[-1]["config"], [row["ms_per_step"] for row in members if "ms_per_step" in row]
    at_end = [row for row in members if row["epoch"] == last and row.get("variances")]
    settings = ("theta_lr", "steps", "batch_size", "prior", "output", "latent")
    return {
        "model": model,
        "method": method,
        "phi_lr": None if METHODS[method].algorithm == "bp" else config["phi_lr"],
        **{name: config[name] for name in settings},
        "epochs": last,
        "seeds": len({row["seed"] for row in members}),
        **{name: statistics.fmean(values) if values else None for name, values in ends.items()},
        "lowest": min(ends["test_loss"], default=None),
        "highest": max(ends["test_loss"], default=None),
        "variances": [statistics.fmean(q) for q in zip(*(row["variances"] for row in at_end), strict=True)],
        "ms_per_step": statistics.median(times) if times else None,
        "seconds": sum(row["seconds"] for row in members if "seconds" in row),
        "backend": members[-1].get("backend", ""),
        "diverged": sum("diverged" in row for row in members),
    }


def _curve(method: str, members: Sequence[Row]) -> Line:
    found = by_epoch(members, "test_loss")
    low, high = [min(v) for v in found.values()], [max(v) for v in found.values()]
    return Line(method, TITLES[method], list(found), [statistics.fmean(v) for v in found.values()], low, high)


def show(document: Row) -> str:
    """The summary as a table; the note of the data stands in its title."""
    note = f" ({document['note']})" if document["note"] else ""
    return f"{document['data']}{note}, test loss in nats\n{table([_cells(row) for row in document['summary']])}"


def _cells(row: Row) -> Row:
    known = row["test_loss"] is not None
    return {
        "model": row["model"],
        "method": TITLES[row["method"]],
        "test loss": f"{row['test_loss']:.3f}" if known else "diverged",
        "seeds' range": f"{row['lowest']:.3f} to {row['highest']:.3f}" if known else "",
        "% from BP": "" if row["percent_from_bp"] is None else f"{row['percent_from_bp']:+.2f}",
        "reconstruction": f"{row['reconstruction']:.3f}" if known else "",
        "KL": f"{row['kl']:.3f}" if known else "",
        "median variance": f"{row['variances'][3]:.3f}" if row["variances"] else "",
        "phi lr": "" if row["phi_lr"] is None else f"{row['phi_lr']:g}",
        "epochs": row["epochs"],
        "seeds": row["seeds"],
        "ms per step": "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.1f}",
    }
