# SPDX-License-Identifier: MIT
"""Figures and tables out of rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STYLES = {"bp": ("black", "-"), "pc_f": ("tab:red", "--"), "pc_fkl": ("tab:blue", "-")}
_OTHERS = (("tab:green", "-."), ("tab:orange", ":"))


@dataclass(frozen=True)
class Line:
    """One curve: `method` chooses its colour; low and high bound a band (None: no band)."""

    method: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def accuracy_curves(path: Path, panels: Mapping[str, Sequence[Line]], title: str) -> None:
    """`curves` of accuracy in percent."""
    curves(path, panels, title, "test accuracy (%)")


def curves(path: Path, panels: Mapping[str, Sequence[Line]], title: str, label: str, log: bool = False) -> None:
    """Write a PNG: one panel per entry of `panels` (title: curves over epochs). label: of the axis; log: its scale."""
    from matplotlib.figure import Figure  # not at import: matplotlib takes a second

    figure = Figure(figsize=(1.0 + 4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        others = iter(_OTHERS)
        for line in lines:
            colour, style = _STYLES.get(line.method) or next(others, ("tab:gray", ":"))
            marker = "o" if len(line.x) <= 12 else ""
            ax.plot(line.x, line.y, color=colour, linestyle=style, marker=marker, markersize=3, label=line.label)
            if line.low is not None and line.high is not None:
                ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        ax.set(title=name, xlabel="epoch", ylabel=label, yscale="log" if log else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if lines:
            ax.legend(loc="best")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Write a PNG: one panel per group, one bar per entry, its value on it; `label` names the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 2.6 * len(groups), 3.4), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for ax, (name, entries) in zip(axes, groups.items(), strict=True):
        drawn = ax.bar(list(entries), list(entries.values()), color=["0.3", *["tab:blue"] * (len(entries) - 1)])
        ax.bar_label(drawn, fmt="%.0f")
        ax.set(title=name, ylabel=label)
        ax.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text, numbers to the right; the keys are the heads."""
    if not rows:
        return "(no rows)"
    heads = list(rows[0])
    cells = [[str(row[head]) for head in heads] for row in rows]
    right = [all(not isinstance(row[head], str) or row[head][:1].isdigit() for row in rows) for head in heads]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]

    def show(line: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([show(heads), "  ".join("-" * w for w in widths), *map(show, cells)])
