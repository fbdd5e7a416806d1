# SPDX-License-Identifier: MIT
"""What `--benchmark-json` writes: a row per benchmark, the machine and the command, as benchmarks.run does."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from benchmarks.run import machine


def pytest_benchmark_generate_json(config: pytest.Config, benchmarks: list[Any]) -> dict[str, Any]:
    """In place of pytest-benchmark's own form, which is many times as long. Times in seconds."""
    keys = ("median", "iqr", "min", "rounds")
    return {
        "command": shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)]),
        "machine": machine(),
        "rows": [
            {
                "op": bench.group,
                "name": bench.name.split("[")[-1].rstrip("]"),
                **{key: getattr(bench.stats, key) for key in keys},
                "iterations": bench.iterations,
            }
            for bench in benchmarks
        ],
    }
