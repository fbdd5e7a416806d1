# SPDX-License-Identifier: MIT
"""What the README's figures are written with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def link(path: Path) -> str:
    """To a file of results."""
    return f"[{path.name}](benchmarks/results/{path.name})"
