# SPDX-License-Identifier: MIT
"""The GPU gate as far as it goes without a GPU: a dry run in Triton's interpreter, and the baselines that it times."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pc_kernels as pck
from benchmarks import gpu_gate, gpu_infer
from benchmarks.accuracy import errors, relative, truth_of
from benchmarks.baselines import ClosedForm
from benchmarks.cases import Case, make

ROOT = Path(__file__).parents[1]
WIDTHS = (12, 16, 15, 14, 5)
MODELS = (("gaussian", 0), ("categorical", 0), ("categorical", 2))


@pytest.mark.parametrize(("output", "softmax"), MODELS)
def test_the_closed_form_is_the_same_inference(output: str, softmax: int) -> None:
    case = Case("", WIDTHS, 9, output, steps=6, softmax=softmax)
    with torch.no_grad():
        form = ClosedForm(case, make(case, torch.float64), torch.float64)
        form.run()
    for mine, truth in zip(form.deltas, truth_of(case).deltas, strict=True):
        assert relative(mine, truth) < 1e-11


@pytest.mark.parametrize(("output", "softmax"), MODELS)
def test_the_kernels_case_is_the_same_inference(output: str, softmax: int) -> None:
    case = Case("", WIDTHS, 9, output, steps=6, softmax=softmax)
    with pck.use_backend("reference"):
        found = errors(case, make(case, torch.float64), "fp32", truth_of(case))
    assert max(*found["delta"], *found["dW"]) < 1e-11


class GraphWithoutGpu:
    """In place of torch.cuda.CUDAGraph: holds nothing of what is captured, as the real one."""

    def replay(self) -> None:
        pass


def test_a_captured_baseline_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph gives free memory back to the driver as it begins: a graph that outlives its tensors reads
    addresses that are no more."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "CUDAGraph": GraphWithoutGpu, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": nullcontext, "graph": nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    case, made = Case("", WIDTHS, 3, "gaussian", steps=2), []

    def form(*arguments: Any) -> ClosedForm:
        found = ClosedForm(*arguments)
        made.append(weakref.ref(found.phis[0]))
        return found

    monkeypatch.setattr(gpu_infer, "ClosedForm", form)
    replay = gpu_infer.closed_form(case, make(case), torch.bfloat16, False, "cuda")
    gc.collect()
    replay()
    assert made[0]() is not None
    del replay
    gc.collect()
    assert made[0]() is None


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    settings = ["--dry-run", "--rounds", "1", "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_gate", *settings],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu_gate.json").read_text())
    assert document["dry_run"]
    assert [row["case"]["name"] for row in document["rows"]] == [case.name for case in gpu_infer.cases(dry=True)]
    for row in document["rows"]:
        assert {v.name for v in gpu_infer.variants("cpu")} <= set(row["accuracy"]) <= set(row["seconds"])
        assert all(entry["products"] == entry["lower_bound"] for entry in row["accuracy"].values())
        assert f"{row['case']['name']}\n" in done.stdout
    assert {"BP", "PC triton fp32 persistent"} <= set(document["training"][0]["seconds"])


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_gate", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_that_hangs_is_on_record() -> None:
    found = gpu_gate.shell([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert found["rc"] is None
    assert "begun" in found["tail"]
    assert gpu_gate.shell(["no-such-command-here"], 2)["rc"] == 127


def test_verdicts() -> None:
    tail = "a.py::x PASSED\na.py::y FAILED\n"
    assert {"passed": 1, "failed": 1, "error": 0}.items() <= gpu_gate.counted({"rc": None, "tail": tail}).items()
    whole = tail + "== 3 failed, 20 passed, 1 skipped in 3s =="
    assert {"passed": 20, "failed": 3, "skipped": 1}.items() <= gpu_gate.counted({"rc": 1, "tail": whole}).items()


class Time:
    """In place of the module: goes on when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_steps_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(gpu_gate, "time", time)
    clock = gpu_gate.Clock(600)
    for step, share in gpu_gate.SHARES.items():
        clock.begin(step)
        assert clock.left == pytest.approx(share * (600 - time.now))
        time.now += 50
    time.now = 700
    clock.begin("benchmark")
    assert clock.left == 1  # the rest still gets a moment, and fails for want of time on record


def test_rows_end_while_there_is_time_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(gpu_gate, "time", time)
    clock, cases, seen = gpu_gate.Clock(100), gpu_infer.cases(dry=False), []
    clock.begin("benchmark")
    for case, seconds in zip(clock.rows(cases), (30, 10, 20, 15), strict=False):
        seen.append(case.name)
        time.now += seconds
    assert seen == [case.name for case in cases[:4]]
    assert next(clock.rows(cases)) == cases[0]  # one row in any case
    time.now = 60
    rows = clock.rows(cases)
    next(rows)
    time.now = 90
    assert list(rows) == []  # it took 30 seconds, and 10 are left


def test_a_row_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"case": {"name": "one"}, "flops": 1.0, "seconds": {}, "accuracy": {}}
    found = iter([first, RuntimeError("an illegal memory access")])

    def measure(*arguments: object) -> object:
        row = next(found)
        if isinstance(row, Exception):
            raise row
        return row

    monkeypatch.setattr(gpu_infer, "measure", measure)
    monkeypatch.setattr(gpu_gate, "table", str)
    report = gpu_gate.Report(tmp_path / "gpu_gate.json", {})
    gpu_gate.benchmark(report, gpu_gate.Clock(100), dry=False, rounds=1, repeats=1, only="M1")
    document = json.loads((tmp_path / "gpu_gate.json").read_text())
    assert document["rows"] == [first]
    assert document["died"] == {"case": "M1 B=256", "error": "an illegal memory access"}
    assert document["left_out"][0] == "M1 B=256"
    assert not gpu_gate.good(document)


WRONG = [
    {"sanitizer": {"memcheck": {"rc": 9, "tail": "ERROR SUMMARY: 1 error"}}},
    {"sanitizer": {"racecheck": {"rc": 1, "tail": "Traceback (most recent call last):"}}},
    {"build": {"rc": 1}},
    {"tests": {"test_a.py": {"rc": 1}}},
    {"rows": [{"accuracy": {"k": {"passes": False}}}]},
    {"rows": [{"accuracy": {"k": {"passes": True, "bitwise_equal": False}}}]},
]


@pytest.mark.parametrize("document", WRONG)
def test_what_is_wrong_fails_the_gate(document: dict) -> None:
    assert not gpu_gate.good(document)
    right = {
        "build": {"rc": 0},
        "tests": {"a": {"rc": None}},
        "sanitizer": {"refused": "it is not installed", "memcheck": {"rc": 255, "tail": "Device not supported"}},
        "rows": [{"accuracy": {"k": {"passes": True, "bitwise_equal": True}}}],
    }
    assert gpu_gate.good(right)
    assert gpu_gate.good({})
