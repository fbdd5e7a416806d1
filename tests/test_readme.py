# SPDX-License-Identifier: MIT
"""The README keeps its promises: its code runs, its figures are those of the JSON files, its commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_there_are_examples_of_both_packages() -> None:
    assert any("pc_kernels" in block for block in BLOCKS)
    assert any("pc_runner" in block for block in BLOCKS)


def test_figures_come_from_the_json_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or "run: python -m benchmarks.report"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_every_result_names_its_command_and_machine(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["command"].split()[0] in ("pc-run", "python")
    assert {"cpu", "threads", "torch"} <= set(document["machine"])


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench"])
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
