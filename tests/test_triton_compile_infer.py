# SPDX-License-Identifier: MIT
"""The T-step kernels as machine code of GPUs that are not here: no spills, shared memory within the chip's.

Here each launch-table entry's largest phase; `python -m benchmarks.triton_resources` compiles the others too and fails
likewise, and what it wrote has to be about the tables as they are.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton_compile

from benchmarks import triton_resources
from pc_kernels.backends import triton_launches


@pytest.mark.parametrize("hip", [False, True])
def test_every_entry_compiles(hip: bool) -> None:
    """A move's fused update; M2 has rows in a tile's epilogue."""
    targets = [t for t in triton_compile.TARGETS if t.startswith("gfx") == hip]
    kernels = triton_resources.tile_kernels("M2", ("update",), hip)
    reports = triton_compile.compiled(kernels, targets)
    assert len(reports) == sum(len(rows) for rows in triton_launches.LAUNCHES.values()) * len(targets)
    assert not triton_resources.problems(reports), triton_compile.table(reports)


def test_all_steps_in_one_launch_compile() -> None:
    """The kernel with all phases and the grid's barrier, in the precision that has two kinds of products."""
    launch = triton_launches.LAUNCHES["bf16_delta"][0][1]
    kernel = triton_resources.kernel(triton_resources.call("M1", 256, "bf16_delta", launch), "persistent")
    reports = triton_compile.compiled([kernel], ["sm_90"])
    assert not triton_resources.problems(reports), triton_compile.table(reports)


def test_the_committed_table_is_about_these_launches() -> None:
    """All entries, all phases, all targets, without problems, and called what it is."""
    written = json.loads(triton_resources.OUT.read_text())
    assert "nothing measured" in written["note"]
    reports = [triton_compile.Report(**entry) for entry in written["kernels"]]
    assert not triton_resources.problems(reports)
    for target in triton_compile.TARGETS:
        found = {report.kernel for report in reports if report.target == target}
        groups = triton_resources.groups(target.startswith("gfx"))
        wanted = [kernel.label or kernel.name for kernels in groups for kernel in kernels]
        assert not [label for label in wanted if label not in found]
