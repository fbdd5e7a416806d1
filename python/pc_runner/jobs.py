# SPDX-License-Identifier: MIT
"""The runs of an experiment: a row of a JSONL file per finished epoch, none computed twice.

A job is a configuration. A killed experiment, run again, goes on: jobs whose rows are all there are left out, and one
in the middle continues from its checkpoint exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pc_kernels as pck
from pc_runner.config import ConfigError, Settings, differences
from pc_runner.metrics import append_json
from pc_runner.train import CHECKPOINT, Row, Run, epochs


def run_jobs(
    kind: type[Run], jobs: Sequence[Settings], data: Any, file: Path, done: list[Row], origin: Row, *,
    report: Callable[[Row], None], **how: Any,
) -> None:  # fmt: skip
    """Train what is missing of `jobs`; every epoch's row goes to `file`, to `done`, which holds the file's, and to
    `report`.

    kind, data: of all jobs. origin: what every row says beside its own figures. how: stop, progress, as in
    `train.epochs`. Raises ConfigError, before any work, if `done` holds one of these runs with other settings.
    """
    for job in jobs:
        check_rows(job, done)
    for number, job in enumerate(jobs, 1):
        if not missing(job, done):
            continue
        label = f"[{number}/{len(jobs)}] {job.model} {job.method} seed {job.seed}"
        for row in _rows(kind, job, data, file.parent, label=label, **how):
            if (*_key(job), row["epoch"]) not in {(*_key_of(r), r["epoch"]) for r in done}:
                entry = {**head(job), **row, "config": job.identity(), **origin}
                append_json(file, entry)
                done.append(entry)
                report(entry)


def _rows(kind: type[Run], job: Settings, data: Any, out: Path, *, label: str, **how: Any) -> Iterator[Row]:
    """The rows of one run, from its checkpoint's first on. A run that diverges ends in a row that says so."""
    checkpoint = checkpoint_of(job, out)
    run = kind.resume(checkpoint, job, data) if checkpoint.exists() else kind(job, data)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    yield from list(run.rows)
    try:
        yield from epochs(run, checkpoint=checkpoint, checkpoint_every=500, label=label, **how)
    except pck.InferenceDiverged as error:
        yield diverged(run, error)


def checkpoint_of(job: Settings, out: Path) -> Path:
    """Where a job of the experiment in `out` keeps its checkpoint."""
    name = re.sub(r"[^\w.-]+", "_", f"{job.data}-{job.model}-{job.method}-{job.seed}")
    return out / "runs" / name / CHECKPOINT


def last_row(kind: type[Run], job: Settings, data: Any, **how: Any) -> Row:
    """Train one job of a search, without files; its last epoch's row."""
    run = kind(job, data)
    try:
        *_, row = epochs(run, **how)
    except pck.InferenceDiverged as error:
        row = diverged(run, error)
    return row


def diverged(run: Run, error: pck.InferenceDiverged) -> Row:
    """The row of an epoch that never ended."""
    return {"epoch": run.epoch + 1, "step": run.step, **dict.fromkeys(run.figures), "diverged": str(error)}


def head(job: Settings) -> Row:
    """What tells a job's rows from others'."""
    return {"data": job.data, "model": job.model, "method": job.method, "seed": job.seed, "phi_lr": job.phi_lr}


def missing(job: Settings, done: Sequence[Row]) -> bool:
    """Whether an epoch of the job is not there yet."""
    mine = [row for row in done if _key_of(row) == _key(job)]
    have = {row["epoch"] for row in mine}
    return not any("diverged" in row for row in mine) and not have.issuperset(range(1, job.epochs + 1))


def check_rows(job: Settings, done: Sequence[Row], besides: Sequence[str] = ()) -> None:
    """Raise ConfigError if a row of this run was made with other settings (those in `besides` may differ)."""
    here = {name: value for name, value in job.identity().items() if name not in besides}
    for row in done:
        different = differences(row["config"], here) if _key_of(row) == _key(job) else ""
        if different:
            wanted = f"the settings of the {job.model} {job.method} rows in it"
            raise ConfigError("out", wanted, different, "use the same settings, or another --out")


def by_epoch(members: Sequence[Row], figure: str) -> dict[int, list[float]]:
    """epoch: the figure of every seed, for the epochs that all seeds have finished."""
    seeds = {row["seed"] for row in members}
    found: dict[int, list[float]] = {}
    for row in members:
        if row[figure] is not None:
            found.setdefault(row["epoch"], []).append(row[figure])
    return {epoch: found[epoch] for epoch in sorted(found) if len(found[epoch]) == len(seeds)}


def _key(job: Settings) -> tuple[Any, ...]:
    return job.data, job.model, job.method, job.seed


def _key_of(row: Row) -> tuple[Any, ...]:
    return row["data"], row["model"], row["method"], row["seed"]
