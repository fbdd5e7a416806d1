# SPDX-License-Identifier: MIT
"""The benchmarks still run and still agree with the truth; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _python(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ops() -> None:
    said = _python("pytest", "benchmarks/test_ops.py", "--benchmark-disable", "-p", "no:cacheprovider")
    assert " failed" not in said


def test_training_step(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    once = ("--only", "small 64", "--rounds", "1", "--repeats", "1", "--threads", "1")
    _python("benchmarks.training_step", *once, "--out", str(out))
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["case"]["steps"] for row in rows] == [8, 32]
    assert all(len(seconds) == 1 for row in rows for seconds in row["seconds"].values())
