# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig7`: the paper's Fig. 7, perplexity of the language model by BP, PC_F and PC_FKL.

First a search, the same number of tries for every method, on the first tenth of the training sentences; then the
runs. Every try and every finished epoch is a row of a JSONL file, so the whole may be killed and run again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pc_runner.checkpoint import load_checkpoint, write_atomically
from pc_runner.config import LANGUAGE_METHODS, METHODS, ConfigError, LanguageConfig, machine
from pc_runner.experiments import language_model
from pc_runner.jobs import by_epoch, check_rows, checkpoint_of, head, last_row, missing, run_jobs
from pc_runner.language import PERPLEXITY, complete
from pc_runner.language_run import LanguageRun
from pc_runner.metrics import append_json, read_rows
from pc_runner.plots import Line, curves, table
from pc_runner.tokens import Tokens

PAPER = ("bp", "pc_f", "pc_fkl")
BP_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 8e-3)  # theta lr
THETA_RATES = (2e-3, 4e-3)  # with each of the phi lrs
PHI_RATES = {"pc_f": (0.01, 0.1, 1.0)}  # its errors are smaller by far: those of probabilities, where q saturates
OTHER_PHI_RATES = (0.001, 0.003, 0.01)
PROMPTS = ("The president of the United", "He said that the", "In the first half of the", "The company has")

Row = dict[str, Any]


@dataclass(frozen=True)
class Fig7:
    """What to run: `base` gives all settings that methods, seeds and the search do not.

    search: try the rates above for every method; without it all take the base's.
    """

    base: LanguageConfig
    methods: tuple[str, ...] = PAPER
    seeds: tuple[int, ...] = (0, 1, 2)
    search: bool = False

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in LANGUAGE_METHODS:
                wanted = f"names out of {', '.join(LANGUAGE_METHODS)}"
                raise ConfigError("methods", wanted, repr(name), "separate them by commas")
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError("seeds", "whole numbers >= 0", str(min(self.seeds)), "separate them by commas")

    def config(self, method: str, seed: int, rates: tuple[float, float]) -> LanguageConfig:
        """One run's; rates: theta lr, phi lr."""
        return replace(self.base, method=method, seed=seed, theta_lr=rates[0], phi_lr=rates[1])

    def samples(self, tokens: Tokens) -> int:
        """How many training sentences the runs see."""
        return min(self.base.limit or len(tokens.train), len(tokens.train))

    def tries(self, method: str) -> list[tuple[float, float]]:
        """(theta lr, phi lr) of the search: as many for every method."""
        if METHODS[method].algorithm == "bp":
            return [(theta, self.base.phi_lr) for theta in BP_RATES]
        return [(theta, phi) for theta in THETA_RATES for phi in PHI_RATES.get(method, OTHER_PHI_RATES)]


def run_fig7(
    wanted: Fig7, tokens: Tokens, out: Path, *, command: str = "", stop: Callable[[], bool] = lambda: False,
    progress: bool = True, report: Callable[[str], None] = lambda line: None,
) -> Row:  # fmt: skip
    """Search if asked, train what is missing, and write `fig7.json` and `fig7.png`. Returns what the JSON holds.

    report: called with a line after every try and epoch. stop, progress: as in `train.epochs`; Interrupted if stopped.
    Raises ConfigError if `fig7.jsonl` holds one of these runs with other settings; nothing is trained then.
    """
    used = wanted.samples(tokens)
    part = [] if used == len(tokens.train) else [f"first {used:,} training sentences"]
    origin = {"command": command, "machine": machine(), "note": ", ".join(filter(None, [tokens.note, *part]))}
    done = read_rows(out / "fig7.jsonl")
    own = (wanted.base.theta_lr, wanted.base.phi_lr)
    for method in wanted.methods:
        for seed in wanted.seeds:
            check_rows(wanted.config(method, seed, own), done, besides=("theta_lr", "phi_lr"))
    how = {"stop": stop, "progress": progress}
    rates = dict.fromkeys(wanted.methods, own)
    if wanted.search:
        rates = {m: _search(wanted, m, tokens, out / "search.jsonl", origin, report, **how) for m in wanted.methods}
    jobs = [wanted.config(method, seed, rates[method]) for seed in wanted.seeds for method in wanted.methods]
    run_jobs(LanguageRun, jobs, tokens, out / "fig7.jsonl", done, origin, report=lambda r: report(_line(r)), **how)
    return _finish(wanted, tokens, done, jobs, out, origin)


def _search(
    wanted: Fig7, method: str, tokens: Tokens, file: Path, origin: Row, report: Callable[[str], None], **how: Any
) -> tuple[float, float]:
    """The rates with the least dev perplexity after one epoch of the first tenth of the training sentences, seed 0."""
    whole = wanted.samples(tokens)
    found: dict[tuple[float, float], float] = {}
    for number, rates in enumerate(tries := wanted.tries(method), 1):
        job = replace(wanted.config(method, 0, rates), limit=max(1, whole // 10), epochs=1)
        rows = [row for row in read_rows(file) if row["config"] == job.identity()]
        if not rows:
            label = f"[search {number}/{len(tries)}] {method}"
            rows = [{**head(job), **last_row(LanguageRun, job, tokens, label=label, **how), "config": job.identity()}]
            append_json(file, {**rows[0], **origin})
            report("search " + _line(rows[0]))
        if rows[0]["dev_perplexity"] is not None:
            found[rates] = rows[0]["dev_perplexity"]
    return min(found, key=lambda r: found[r]) if found else (wanted.base.theta_lr, wanted.base.phi_lr)


def _line(row: Row) -> str:
    rates = f"theta lr {row['config']['theta_lr']:g} phi lr {row['phi_lr']:g}"
    text = f"{row['method']} seed {row['seed']} {rates} epoch {row['epoch']}: "
    if row["dev_perplexity"] is None:
        return text + row["diverged"]
    return text + f"perplexity {row['dev_perplexity']:.1f} (dev), {row['ms_per_step']:.0f} ms per step"


def _finish(
    wanted: Fig7, tokens: Tokens, done: Sequence[Row], jobs: Sequence[LanguageConfig], out: Path, origin: Row
) -> Row:
    """Write the summary, the completions and the figure of all rows on this data, whichever command made them."""
    rows = [row for row in done if row["data"] == wanted.base.data]
    groups = {m: [row for row in rows if row["method"] == m] for m in LANGUAGE_METHODS}
    groups = {method: members for method, members in groups.items() if members}
    summary = [_summarise(method, members) for method, members in groups.items()]
    bp = next((entry["test"] for entry in summary if entry["method"] == "bp"), None)
    for entry in summary:
        entry["test_over_bp"] = entry["test"] / bp if bp and entry["test"] else None
    ready = [job for job in jobs if not missing(job, done)]
    document = {
        "data": wanted.base.data, **origin, "perplexity": PERPLEXITY, "spread": "lowest to highest seed",
        "vocabulary": tokens.vocabulary, "training_samples": wanted.samples(tokens), "summary": summary,
        "completions": _completions(ready, out),
    }  # fmt: skip
    lines = [_curve(method, members) for method, members in groups.items()]
    curves(out / "fig7.png", {"language model": lines}, f"{wanted.base.data}: dev perplexity, mean and range of seeds",
           "dev perplexity", log=True)  # fmt: skip
    write_atomically(out / "fig7.json", (json.dumps(document, indent=1) + "\n").encode())
    return document


def _summarise(method: str, members: Sequence[Row]) -> Row:
    tests, devs = by_epoch(members, "test_perplexity"), by_epoch(members, "dev_perplexity")
    last = max(tests, default=0)
    values, config = tests.get(last, []), members[-1]["config"]
    times = [row["ms_per_step"] for row in members if "ms_per_step" in row]
    return {
        "method": method,
        "theta_lr": config["theta_lr"],
        "phi_lr": None if METHODS[method].algorithm == "bp" else config["phi_lr"],
        "steps": config["steps"],
        "epochs": last,
        "seeds": len({row["seed"] for row in members}),
        "dev": statistics.fmean(devs[last]) if last in devs else None,
        "test": statistics.fmean(values) if values else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "ms_per_step": statistics.median(times) if times else None,
        "diverged": sum("diverged" in row for row in members),
    }


def _curve(method: str, members: Sequence[Row]) -> Line:
    found = by_epoch(members, "dev_perplexity")
    low, high = [min(v) for v in found.values()], [max(v) for v in found.values()]
    return Line(method, METHODS[method].title, list(found), [statistics.fmean(v) for v in found.values()], low, high)


def _completions(jobs: Sequence[LanguageConfig], out: Path) -> list[Row]:
    """How the finished runs of the first seed go on with `PROMPTS`."""
    found: list[Row] = []
    for job in (job for job in jobs if job.seed == jobs[0].seed):
        path = checkpoint_of(job, out)
        if path.exists():
            net, tokeniser = language_model(job, load_checkpoint(path), path)
            for prompt in PROMPTS:
                text = complete(net, tokeniser, prompt, length=job.tokens, tokens=12)
                found.append({"method": job.method, "prompt": prompt, "text": text.text, "next": text.next})
    return found


def show(document: Row) -> str:
    """The summary and the completions as text, the definition of the figure with them."""
    note = f" ({document['note']})" if document["note"] else ""
    rows = table([_cells(row) for row in document["summary"]])
    texts = "\n".join(f"{METHODS[c['method']].title}: {c['text']}" for c in document["completions"])
    return f"{document['data']}{note}\n{document['perplexity']}\n\n{rows}\n\n{texts}"


def _cells(row: Row) -> Row:
    known = row["test"] is not None
    return {
        "method": METHODS[row["method"]].title,
        "test perplexity": f"{row['test']:.1f}" if known else "diverged",
        "seeds' range": f"{row['lowest']:.1f} to {row['highest']:.1f}" if known else "",
        "of BP's": "" if row["test_over_bp"] is None else f"{row['test_over_bp']:.3f}",
        "theta lr": f"{row['theta_lr']:g}",
        "phi lr": "" if row["phi_lr"] is None else f"{row['phi_lr']:g}",
        "epochs": row["epochs"],
        "seeds": row["seeds"],
        "ms per step": "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.0f}",
    }
