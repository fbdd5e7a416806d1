# SPDX-License-Identifier: MIT
"""What `reproduce memory` counts: tensors whose size is known, in processes of their own."""

from __future__ import annotations

import json

import pytest
import torch
from pc_runner.cli import main
from pc_runner.memory import CASES, measure, peak_bytes


def test_the_peak_is_what_exists_at_once() -> None:
    def run() -> None:
        first = torch.empty(1 << 20)  # 4 MiB, gone before the next two
        del first
        two = [torch.empty(1 << 18) for _ in range(2)]  # 1 MiB each
        del two

    assert peak_bytes(run) == 1 << 22
    assert peak_bytes(lambda: [torch.empty(1 << 18) for _ in range(5)]) == 5 << 20


def test_held_is_weights_optimiser_and_batch() -> None:
    row = measure("m1", "bp")
    weights = 784 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 10 + 10
    assert row["held"] == pytest.approx(4 * (3 * weights + 128 * 784 + 128 * 10), rel=1e-3)
    assert row["peak"] > row["held"] + 4 * weights  # the gradients, at the least


def test_the_command_measures_each_in_a_process_of_its_own(tmp_path, capsys) -> None:
    assert main(["reproduce", "memory", "--models", "m1", "--threads", "1", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in document["rows"]] == list(CASES["m1"][2])
    for row in document["rows"]:
        assert 1 <= row["peak_over_bp"] < 2  # the paper's bound
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert main(["reproduce", "memory", "--models", "m9"]) == 2
    assert "argument --models: wanted names out of" in capsys.readouterr().err
