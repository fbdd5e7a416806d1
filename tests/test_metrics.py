# SPDX-License-Identifier: MIT
"""JSON lines: each row once, on disk at once, torn lines survived."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_runner.metrics import MetricsLog, append_json, read_rows


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": 0.1 + 0.2})
        assert path.read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'
        log.write({"step": 2, "loss": torch.tensor(0.5), "accuracy": np.float32(0.25), "name": "M1"})
        assert read_rows(path)[1] == {"step": 2, "loss": 0.5, "accuracy": 0.25, "name": "M1"}
    log.close()  # a second time


def test_without_resume_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for step in (1, 2):
        with MetricsLog(path) as log:
            log.write({"step": step})
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_resume_has_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "m"
    rows = [{"config": "M1"}, *({"step": step, "loss": 1 / step} for step in range(1, 8)), {"step": None}]
    with MetricsLog(path) as log:
        for row in rows:
            log.write(row)
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed here; the checkpoint is of step 4
    with MetricsLog(path, resume_step=4) as log:
        assert read_rows(path) == [*rows[:5], rows[-1]]
        for row in rows[5:8]:
            log.write(row)
    assert read_rows(path) == [*rows[:5], rows[-1], *rows[5:8]]
    assert os.listdir(tmp_path) == ["m"], "the rewrite left nothing beside it"


@pytest.mark.parametrize(("resume_step", "kept"), [(-1, []), (0, [0]), (1, [0, 1]), (9, [0, 1, 2]), (None, [0, 1, 2])])
def test_what_a_resume_keeps(resume_step: int | None, kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    MetricsLog(path, resume_step).close()
    assert [row["step"] for row in read_rows(path)] == kept


def test_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m", resume_step=3) as log:
        log.write({"step": 4})
    assert read_rows(tmp_path / "m") == [{"step": 4}]


def test_a_failed_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    text = '{"step": 0}\n{"step": 1}\n'
    path.write_text(text)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        MetricsLog(path, resume_step=0)
    assert path.read_text() == text


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 200), padding=st.sampled_from([0, 5000]))
def test_a_log_cut_anywhere_goes_on(cut: int, padding: int, tmp_path_factory: Any) -> None:
    """`padding` makes lines longer than the block in which the end of the file is searched."""
    rows = [{"step": step, "loss": 1 / step, "text": "\n\u00e9" + "x" * padding} for step in range(1, 5)]
    path = tmp_path_factory.mktemp("cut") / "m"
    for row in rows:
        append_json(path, row)
    data = path.read_bytes()
    data = data[: max(0, len(data) - cut)]
    path.write_bytes(data)
    found = read_rows(path)
    assert found == rows[: len(found)]
    assert len(found) in (data.count(b"\n"), data.count(b"\n") + 1)
    append_json(path, rows[-1])
    assert read_rows(path) == [*found, rows[-1]]


def test_a_last_line_without_newline_that_is_whole_stays(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    append_json(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["{", "[1]", "7", "\udcff"])
def test_a_bad_line_inside_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(f'{{"a": 1}}\n{line}\n{{"a": 3}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"m: line 2 is not a JSON object; mend or remove that line$"):
        read_rows(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path, resume_step=0)


def test_what_json_cannot_say_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsLog(path) as log, pytest.raises(TypeError, match=r"a Tensor cannot be written as JSON; give plain"):
        log.write({"step": 1, "loss": torch.ones(2)})
    with pytest.raises(TypeError, match=r"a object cannot be written as JSON"):
        append_json(path, {"a": object()})
    assert path.read_bytes() == b""


def test_non_finite_numbers_come_back(tmp_path: Path) -> None:
    append_json(tmp_path / "m", {"nan": math.nan, "inf": torch.tensor(-math.inf)})
    (row,) = read_rows(tmp_path / "m")
    assert math.isnan(row["nan"])
    assert row["inf"] == -math.inf


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "m", tensorboard=True) as log:
        log.write({"step": 3, "loss": 0.5, "accuracy": torch.tensor(0.25), "name": "M1", "best": True})
        log.write({"config": 1})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert len(read_rows(tmp_path / "m")) == 2


def test_tensorboard_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard was asked for .*; pip install 'pc-kernels\[tensorboard\]'"):
        MetricsLog(tmp_path / "m", tensorboard=True)
    assert os.listdir(tmp_path) == []
