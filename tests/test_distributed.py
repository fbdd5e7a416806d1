# SPDX-License-Identifier: MIT
"""Two processes on halves of each batch train the same weights as one process on all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pc_runner.checkpoint import load_checkpoint
from pc_runner.cli import main
from pc_runner.distributed import Learner, SharedOptimizer, World

from tests import distributed_worker

WORKER = Path(__file__).parent / "distributed_worker.py"


def torchrun(arguments: list[str]) -> None:
    """Two processes, gloo."""
    roots = [str(WORKER.parents[1] / "python"), str(WORKER.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(roots)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.safetensors").model


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def test_two_processes_are_one_on_the_joint_batch_and_resume_as_any_number(tmp_path, one_thread):
    one, two = tmp_path / "one", tmp_path / "two"
    distributed_worker.work(one, 2)
    torchrun([str(WORKER), str(two), "1"])
    by_ipc = [torch.load(folder / "ipc.pt") for folder in (one, two)]
    assert furthest(*by_ipc) < 1e-12
    alone, shared = (torch.load(folder / "own_loop.pt") for folder in (one, two))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(shared, alone, strict=True)) < 1e-12
    distributed_worker.work(two, 2, resume=True)  # another number of processes goes on
    for method in distributed_worker.METHODS:
        assert furthest(weights(two / method), weights(one / method)) < 1e-12
        logs = [(folder / method / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
        rows = [[json.loads(line) for line in log] for log in logs]
        assert [row["epoch"] for row in rows[1]] == [1, 2]
        for a, b in zip(*rows, strict=True):
            assert a["accuracy"] == b["accuracy"]
            assert a["energy"] == pytest.approx(b["energy"], rel=1e-12)


def test_the_command_line_under_torchrun(tmp_path):
    settings = ["train", "--data", "digits", "--limit", "100", "--hidden", "8", "--epochs", "1", "--steps", "3"]
    torchrun(["-m", "pc_runner", *settings, "--out", str(tmp_path / "a")])
    assert main([*settings, "--out", str(tmp_path / "b"), "--threads", "1"]) == 0
    assert furthest(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-4  # float32, Adam


def test_shares_are_the_batch():
    index = torch.arange(7)
    parts = [World(rank, 3).share(index) for rank in range(3)]
    assert torch.equal(torch.cat(parts).sort().values, index)
    assert (World().mean(2.0, 1, 4), World().any(True), World(1, 2).first) == (2.0, True, False)


def test_what_ipc_cannot_share_is_said():
    net = distributed_worker.PCNetwork(torch.nn.Linear(2, 2), output="gaussian")
    x, y = torch.ones(3, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="algorithm: wanted one with a loss after infer, got 'ipc'"):
        Learner(net)(x, y, 1.0, {"algorithm": "ipc"})
    optimizer = SharedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), World())
    with pytest.raises(ValueError, match="tol: wanted None where processes share the optimiser"):
        net.infer(x, y, algorithm="ipc", optimizer=optimizer, tol=0.1)
