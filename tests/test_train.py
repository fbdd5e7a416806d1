# SPDX-License-Identifier: MIT
"""Training: the steps against loops written out here; runs that were stopped or killed against runs that were not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pc_runner.checkpoint import CheckpointError, load_checkpoint
from pc_runner.classifier import ClassifierRun, accuracy
from pc_runner.cli import main
from pc_runner.config import METHODS, MODELS, OPTIMIZERS, ConfigError, TrainConfig
from pc_runner.data import Images, batches, load_images
from pc_runner.experiments import config_from
from pc_runner.metrics import read_rows
from pc_runner.models.mlp import build, targets
from pc_runner.train import CHECKPOINT, ENERGY_EVERY, METRICS, Interrupted, epochs, train
from torch import nn

import pc_kernels as pck

ROOTS = [str(Path(pck.__file__).parents[1]), str(Path(sys.modules["pc_runner"].__file__ or "").parents[1])]
SMALL = {"hidden": (12, 10, 8), "steps": 3, "theta_lr": 1e-3, "epochs": 2, "batch_size": 16}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images("digits", limit=200)


def weights(run: ClassifierRun) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.net.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def finished(config: TrainConfig, images: Images) -> ClassifierRun:
    run = ClassifierRun(config, images)
    list(epochs(run))
    return run


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("model", MODELS)
def test_the_methods_of_a_model_start_from_the_same_weights(model):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    nets = [build(model, method, 64, 10, (12, 10, 8), seed=3) for method in MODELS[model].methods]
    assert torch.equal(torch.random.get_rng_state(), state)
    other = build(model, "bp", 64, 10, (12, 10, 8), seed=4)
    for net in nets:
        assert same(list(net.parameters()), list(nets[0].parameters()))
        assert not same(list(net.parameters()), list(other.parameters()))


def test_what_the_methods_are():
    def energies(model, method):
        return [(node.energy, node.step, node.lr_scale) for node in build(model, method, 64, 10).nodes]

    plain = ("gaussian", None, 1.0)
    logits = ("categorical", None, 1.0)
    assert energies("m1", "bp") == energies("m1", "pc_f") == energies("m1", "pc_fkl") == [plain] * 4
    assert energies("m2", "bp") == energies("m2", "pc_fkl") == [plain] * 3 + [logits]
    assert energies("m2", "pc_f") == energies("m3", "pc_f") == [plain] * 4
    assert energies("m3", "pc_fkl") == [plain, logits, plain, logits]
    assert energies("m3", "pc_fkl_euclidean") == [plain, ("categorical", "euclidean", 1.0), plain, logits]
    assert energies("m3", "pc_probs") == [plain, ("categorical_probs", None, 0.003), plain, logits]
    net = build("m3", "bp", 64, 10)
    assert [type(module).__name__ for module in net.module][1::2] == ["Tanh", "Softmax", "Tanh", "Softmax"]
    assert torch.equal(targets(build("m1", "bp", 64, 10), torch.tensor([1]), 10), torch.eye(10)[[1]])


@pytest.mark.parametrize("updates", [1, 3])
def test_bp_training_is_a_plain_torch_loop(images, updates):
    config = TrainConfig(model="m2", method="bp", weight_updates=updates, **SMALL)
    run = finished(config, images)
    net = build("m2", "bp", 64, 10, config.hidden, seed=0)
    module = net.module[:-1]
    optimizer = torch.optim.Adam(module.parameters(), lr=config.theta_lr)
    for epoch in range(2):
        for index in batches(200, 16, seed=0, epoch=epoch):
            for _ in range(updates):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(images.x_train[index]), images.y_train[index]).backward()
                optimizer.step()
    for got, wanted in zip(run.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 3])
def test_pc_training_is_a_loop_of_autograd(images, updates):
    """M1: T moves of all phi on F, then `updates` steps of SGD on F's batch mean at those phis, by autograd."""
    config = TrainConfig(
        model="m1", method="pc_fkl", optimizer="SGD", weight_updates=updates, **{**SMALL, "epochs": 1, "theta_lr": 0.1}
    )
    run = finished(config, images)
    net = build("m1", "pc_fkl", 64, 10, config.hidden, seed=0)
    linears = list(net.module[::2])

    def energy(states, x):
        return sum((0.5 * (phi - torch.tanh(f(v))) ** 2).sum() for f, v, phi in zip(linears, [x, *states], states))  # noqa: B905

    for index in batches(200, 16, seed=0, epoch=0):
        x, y = images.x_train[index], nn.functional.one_hot(images.y_train[index], 10).float()
        phis, v = [], x
        for linear in linears[:-1]:
            v = torch.tanh(linear(v)).detach().requires_grad_()
            phis.append(v)
        for _ in range(config.steps):
            grads = torch.autograd.grad(energy([*phis, y], x), phis)
            phis = [(phi - config.phi_lr * g).detach().requires_grad_() for phi, g in zip(phis, grads, strict=True)]
        for _ in range(updates):
            grads = torch.autograd.grad(energy([*phis, y], x) / len(x), list(net.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(net.parameters(), grads, strict=True):
                    parameter -= config.theta_lr * grad
    for got, wanted in zip(run.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("model", "method"), [(m, k) for m in MODELS for k in MODELS[m].methods])
def test_every_method_learns(model, method):
    images = load_images("digits", limit=600)
    rates = {"hidden": (32,) * 3, "theta_lr": 5e-3, "steps": 8, "batch_size": 20, "epochs": 4 if model == "m3" else 2}
    rows = finished(TrainConfig(model=model, method=method, **rates), images).rows
    assert rows[-1]["accuracy"] > (0.25 if model == "m3" else 0.7)
    assert rows[-1]["energy"] < rows[0]["energy"]
    assert rows[-1]["backend"] == ("autograd" if METHODS[method].algorithm == "bp" else rows[-1]["backend"]) != ""


def test_rows_say_what_was_measured(images):
    config = TrainConfig(model="m1", method="pc_f", **SMALL)
    run = ClassifierRun(config, images)
    seen = list(run.train_batches())
    row = run.end_epoch()
    read = [value for value in seen if value is not None]
    assert [value is not None for value in seen] == [i % ENERGY_EVERY == 0 for i in range(13)]
    assert (row["epoch"], row["step"]) == (1, 13)
    assert row["energy"] == pytest.approx(sum(read) / len(read))
    predicted = run.net(images.x_test).argmax(1)
    assert row["accuracy"] == pytest.approx((predicted == images.y_test).double().mean().item())
    assert row["ms_per_step"] == pytest.approx(1000 * row["seconds"] / 13)
    assert accuracy(run.net, images.x_test, images.y_test, chunk=7) == row["accuracy"]
    assert accuracy(run.net, images.x_test[:0], images.y_test[:0]) == 0


def test_training_is_deterministic_and_depends_on_the_seed(images):
    config = TrainConfig(model="m3", method="pc_fkl", **SMALL)
    first = finished(config, images)
    torch.manual_seed(99)
    assert same(weights(first), weights(finished(config, images)))
    assert not same(weights(first), weights(finished(TrainConfig(model="m3", seed=1, **SMALL), images)))


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_resumes_bit_for_bit(images, tmp_path, name):
    config = TrainConfig(model="m3", method="pc_fkl", optimizer=name, **SMALL)
    whole = finished(config, images)
    run = ClassifierRun(config, images)
    with pytest.raises(Interrupted):
        list(epochs(run, checkpoint=tmp_path / CHECKPOINT, stop=lambda: run.step == 17))
    again = ClassifierRun.resume(tmp_path / CHECKPOINT, config, images)
    assert (again.step, again.epoch, again.batch) == (17, 1, 4)
    rows = list(epochs(again))
    assert same(weights(again), weights(whole))
    assert [row["epoch"] for row in rows] == [2]
    for got, wanted in zip(again.rows, whole.rows, strict=True):
        timeless = {"epoch", "step", "energy", "accuracy", "backend"}
        assert {k: got[k] for k in timeless} == {k: wanted[k] for k in timeless}


def test_more_epochs_may_be_asked_for_later(images, tmp_path):
    short = TrainConfig(**{**SMALL, "epochs": 1})
    train(ClassifierRun, short, images, tmp_path)
    run = train(ClassifierRun, TrainConfig(**SMALL), images, tmp_path, resume=True)
    assert same(weights(run), weights(finished(TrainConfig(**SMALL), images)))
    assert [row["epoch"] for row in read_rows(tmp_path / METRICS)] == [1, 2]
    assert train(ClassifierRun, TrainConfig(**SMALL), images, tmp_path, resume=True).step == run.step


def test_a_row_lost_between_checkpoint_and_log_is_written_again(images, tmp_path):
    train(ClassifierRun, TrainConfig(**SMALL), images, tmp_path)
    lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    (tmp_path / METRICS).write_text(lines[0] + lines[1][:20])
    train(ClassifierRun, TrainConfig(**SMALL), images, tmp_path, resume=True)
    assert (tmp_path / METRICS).read_text() == "".join(lines)


def test_checkpoints_in_the_way(images, tmp_path):
    config = TrainConfig(**SMALL)
    with pytest.raises(CheckpointError, match="leave --resume out"):
        train(ClassifierRun, config, images, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    train(ClassifierRun, config, images, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match="add --resume"):
        train(ClassifierRun, config, images, tmp_path)
    with pytest.raises(CheckpointError, match=r"theta_lr 0\.001 there, 0\.1 here"):
        train(ClassifierRun, TrainConfig(**{**SMALL, "theta_lr": 0.1}), images, tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    (tmp_path / CHECKPOINT).write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match="cut off"):
        train(ClassifierRun, config, images, tmp_path, resume=True)


def test_a_checkpoint_holds_its_configuration(images, tmp_path):
    config = TrainConfig(model="m1", method="bp", **SMALL)
    train(ClassifierRun, config, images, tmp_path)
    assert config_from(load_checkpoint(tmp_path / CHECKPOINT).progress["config"], epochs=2) == config


def test_tensorboard_gets_the_rows(images, tmp_path):
    pytest.importorskip("tensorboard")
    train(ClassifierRun, TrainConfig(**{**SMALL, "epochs": 1}), images, tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


ARGUMENTS = [
    "train", "--model", "m3", "--method", "pc_fkl", "--data", "digits", "--hidden", "48", "--steps", "6",
    "--epochs", "4", "--batch-size", "16", "--theta-lr", "1e-3", "--checkpoint-every", "7", "--threads", "1",
]  # fmt: skip


def start(out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS)}
    command = [sys.executable, "-W", "error", "-m", "pc_runner", *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_middle_of_an_epoch(process: subprocess.Popen[str], out: Path) -> None:
    """Returns while the run is between two checkpoints, the last of them within an epoch."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / CHECKPOINT).exists() and load_checkpoint(out / CHECKPOINT).progress["step"] >= 100:
            return
        time.sleep(0.01)
    pytest.fail(f"the run ended early: {process.communicate(timeout=5)}")


def whole_run() -> ClassifierRun:
    config = TrainConfig(
        model="m3", method="pc_fkl", hidden=(48,) * 3, steps=6, epochs=4, batch_size=16, theta_lr=1e-3
    )  # fmt: skip
    return finished(config, load_images("digits"))


def check_equals_the_whole_run(out: Path) -> None:
    assert main([*ARGUMENTS, "--out", str(out), "--resume"]) == 0
    whole, found = whole_run(), load_checkpoint(out / CHECKPOINT)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(found.model[name], value), name
    assert [row["accuracy"] for row in read_rows(out / METRICS)] == [row["accuracy"] for row in whole.rows]


def test_killed_with_sigkill_in_mid_epoch_and_resumed(tmp_path, capsys):
    process = start(tmp_path)
    wait_for_middle_of_an_epoch(process, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    progress = load_checkpoint(tmp_path / CHECKPOINT).progress
    assert progress["step"] < 360
    check_equals_the_whole_run(tmp_path)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):
    process = start(tmp_path)
    wait_for_middle_of_an_epoch(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert error.startswith("pc-run train: stopped at step")
    assert error.rstrip().endswith("--resume")
    step = load_checkpoint(tmp_path / CHECKPOINT).progress["step"]
    assert f"step {step} in epoch" in error
    check_equals_the_whole_run(tmp_path)


# ----------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "m4"), ("model", "M1"), ("model", ""),
        ("method", "pcf"), ("method", "pc_probs"), ("method", None),
        ("epochs", 0), ("epochs", -1), ("epochs", 1.5),
        ("batch_size", 0), ("batch_size", True), ("batch_size", "8"),
        ("steps", -1), ("steps", 2.0), ("steps", None),
        ("weight_updates", 0), ("weight_updates", -1), ("weight_updates", None),
        ("seed", -1), ("seed", "a"), ("seed", 0.5),
        ("limit", 0), ("limit", -5), ("limit", 2.5),
        ("phi_lr", -0.1), ("phi_lr", float("nan")), ("phi_lr", "x"),
        ("lr_scale", -1), ("lr_scale", float("inf")), ("lr_scale", None),
        ("theta_lr", -1e-4), ("theta_lr", float("inf")), ("theta_lr", True),
        ("phi_momentum", -0.1), ("phi_momentum", 1.1), ("phi_momentum", float("nan")),
        ("hidden", (8, 8)), ("hidden", (8, 0, 8)), ("hidden", (8, 8, 8, 8)),
        ("optimizer", "adam"), ("optimizer", "LBFGS"), ("optimizer", "Optimizer"),
    ],
)  # fmt: skip
def test_settings_out_of_bounds(field, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}: wanted ")
    assert "; " in message
    assert "\n" not in message


def test_the_optimisers_are_torchs():
    assert {"Adam", "AdamW", "SGD", "RMSprop", "NAdam"} <= set(OPTIMIZERS)
    assert json.dumps(TrainConfig().identity())
