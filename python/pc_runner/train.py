# SPDX-License-Identifier: MIT
"""Training one network: deterministic given its configuration, resumable at any batch, bit for bit."""

from __future__ import annotations

import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pc_runner.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from pc_runner.config import METHODS, Settings, differences
from pc_runner.data import batches, count_batches
from pc_runner.distributed import Learner, World, parallel
from pc_runner.inference import Result
from pc_runner.metrics import MetricsLog, read_rows
from pc_runner.network import PCNetwork

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
ENERGY_EVERY = 25  # batches between two readings of the energy, which cost a trace and a synchronisation

Row = dict[str, Any]
R = TypeVar("R", bound="Run")


class Interrupted(RuntimeError):  # noqa: N818 - what happened, not what went wrong
    """Training stopped between two batches because it was asked to; the checkpoint, if there is one, is saved."""


class Run:
    """One training run: the network, its optimiser, and where it stands. A subclass says what is trained on what.

    config, data: what `make_net`, `__len__`, `samples` and `evaluate` of the subclass read.
    figures: the names of what `evaluate` gives, the most telling first.

    Attributes:
        net, optimizer: what is trained, and by what.
        step, epoch, batch: batches done, epochs finished, batches done of the current epoch.
        rows: one dict per finished epoch: epoch (from 1), step, energy (final F a sample in nats, mean of the batches
            read), what `evaluate` found, ms_per_step, seconds (of the epoch's training), backend.
    """

    figures: tuple[str, ...] = ()

    def __init__(self, config: Any, data: Any, world: World = World()):  # noqa: B008 - immutable
        self.config, self.data, self.world = config, data, world
        self.net = self.make_net()
        self.optimizer = make_optimizer(config, self.net)
        self._learner = parallel(self.net, world) if world.size > 1 else None
        self.step = self.epoch = self.batch = 0
        self.rows: list[Row] = []
        self.backend = ""
        self._begin_epoch()
        x, y, how = self.samples(torch.arange(1))
        self.net.infer(x, y, steps=0, **how)  # raises now what training would raise

    def make_net(self) -> PCNetwork:
        """The network with its first weights."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Training samples."""
        raise NotImplementedError

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """x and y of the training samples at `index`, and what `infer` takes beside them (masks, noise)."""
        raise NotImplementedError

    def evaluate(self) -> Row:
        """The figures of a finished epoch, by name; plain JSON values."""
        raise NotImplementedError

    def rates(self) -> float | list[float]:
        """The phi lr of every move, or one for all."""
        return self.config.phi_lr

    def keep(self) -> Row:
        """What a checkpoint holds beside the weights and the progress, for those who use the network."""
        return {}

    def _begin_epoch(self) -> None:
        self.batch, self._seconds, self._energies = 0, 0.0, []

    @property
    def batches_per_epoch(self) -> int:
        return count_batches(len(self), self.config.batch_size)

    def train_batches(self) -> Iterator[float | None]:
        """Train on the rest of the epoch; yields after every batch: F per sample where it was read, else None."""
        config = self.config
        order = batches(len(self), config.batch_size, seed=config.seed, epoch=self.epoch, skip=self.batch)
        for index in order:
            started = time.perf_counter()
            read = self.batch % ENERGY_EVERY == 0
            mine = self.world.share(index)
            result = self._learn(mine, trace=read, weight=len(mine) * self.world.size / len(index))
            energy = None
            if read:
                assert result.energy is not None  # traced
                self.backend = result.backend
                energy = self.world.mean(float(result.energy[-1].sum()), len(mine), len(index))
                self._energies.append(energy)
            self._seconds += time.perf_counter() - started
            self.batch, self.step = self.batch + 1, self.step + 1
            yield energy

    def _learn(self, index: Tensor, trace: bool, weight: float) -> Result:
        """One inference, then `weight_updates` optimiser steps at its phis."""
        config, algorithm = self.config, METHODS[self.config.method].algorithm
        x, y, how = self.samples(index)
        first: Result | None = None
        for _ in range(config.weight_updates):
            if first is None:
                settings = {"steps": config.steps, "lr": self.rates(), "momentum": config.phi_momentum}
                settings |= {**how, "algorithm": algorithm, "trace": trace}
            elif algorithm == "bp":
                settings = {**how, "algorithm": "bp", "trace": False}
            else:  # the new weights' errors at the same phis; the target gives the last
                settings = {**how, "steps": 0, "phis": [*first.phis[:-1], None], "trace": False}
            self.optimizer.zero_grad()
            result = self._gradients(x, y, settings, weight)
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.net.parameters(), config.clip)
            self.optimizer.step()
            first = first or result
        assert first is not None  # weight_updates >= 1
        return first

    def _gradients(self, x: Tensor, y: Tensor, settings: dict[str, Any], weight: float) -> Result:
        """p.grad of the joint batch, by this process alone or together with the others."""
        if self._learner is None:
            result = self.net.infer(x, y, **settings)
            self.net.backward(result)
            return result
        self._learner(x, y, weight, settings).backward()
        learner = cast("Learner", self._learner.module)
        assert learner.result is not None  # of the call above
        return learner.result

    def end_epoch(self) -> Row:
        """Evaluate, and begin the next epoch."""
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "energy": math.fsum(self._energies) / max(len(self._energies), 1),
            **self.evaluate(),
            "ms_per_step": 1000 * self._seconds / max(self.batch, 1),
            "seconds": self._seconds,
            "backend": self.backend,
        }
        self.rows.append(row)
        self._begin_epoch()
        return row

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `resume` continues exactly, with any number of processes; the first one writes.

        Raises CheckpointError.
        """
        if not self.world.first:
            return
        progress = {
            "config": self.config.identity(), "step": self.step, "epoch": self.epoch, "batch": self.batch,
            "seconds": self._seconds, "energies": self._energies, "rows": self.rows, "backend": self.backend,
            **self.keep(),
        }  # fmt: skip
        save_checkpoint(path, model=self.net.state_dict(), optimizer=self.optimizer, progress=progress)

    @classmethod
    def resume(cls, path: Path, config: Any, data: Any, world: World = World()) -> Self:  # noqa: B008
        """The run that wrote the checkpoint. Raises CheckpointError if it is damaged or of another configuration."""
        checkpoint = load_checkpoint(path)
        check_same_config(path, checkpoint.progress, config)
        run = cls(config, data, world)
        load_weights(run.net, checkpoint, path)
        try:
            progress = checkpoint.progress
            run.optimizer.load_state_dict(checkpoint.optimizer or {})
            run.step, run.epoch, run.batch = (progress[name] for name in ("step", "epoch", "batch"))
            run._seconds, run._energies = progress["seconds"], progress["energies"]
            run.rows, run.backend = progress["rows"], progress["backend"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(path, f"is no training run ({error!r})", "give one written by pc-run train") from None
        return run


def load_weights(net: PCNetwork, checkpoint: Checkpoint, path: Path) -> None:
    """Fill the network with a checkpoint's weights. Raises CheckpointError where they do not fit."""
    try:
        net.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(path, f"does not fit this network ({reason})", "check --data and --hidden") from None


def check_same_config(path: Path, progress: dict[str, Any], config: Settings) -> None:
    """Raise CheckpointError unless the checkpoint was written with this configuration."""
    there, here = progress.get("config"), config.identity()
    if not isinstance(there, dict):
        raise CheckpointError(path, "holds no training configuration", "give one written by pc-run train")
    different = differences(there, here)
    if different:
        remedy = "resume with the same settings, or choose another --out"
        raise CheckpointError(path, f"belongs to another run ({different})", remedy)


def make_optimizer(config: Settings, net: nn.Module) -> torch.optim.Optimizer:
    """The class of torch.optim that `config` names on the network's parameters, fused where it can be."""
    kind = getattr(torch.optim, config.optimizer)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {"fused": True} if "fused" in takes else {}
    decay = getattr(config, "weight_decay", None)
    if decay is not None and "weight_decay" in takes:
        options["weight_decay"] = decay
    return kind(net.parameters(), lr=config.theta_lr, **options)


def epochs(
    run: Run,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    label: str = "",
    progress: bool = False,
) -> Iterator[Row]:
    """Train to the configured number of epochs; yields each epoch's row, after the checkpoint with that row is on disk.

    checkpoint: file to keep up to date at every epoch's end, every `checkpoint_every` batches, and when stopped.
    stop: asked after every batch; True saves and raises Interrupted.
    progress: a bar on stderr, if that is a terminal.
    """
    while run.epoch < run.config.epochs:
        title = f"{label} epoch {run.epoch + 1}/{run.config.epochs}".strip()
        with tqdm(
            total=run.batches_per_epoch, initial=run.batch, desc=title, unit="batch", leave=False,
            disable=None if progress else True,
        ) as bar:  # fmt: skip
            for energy in run.train_batches():
                bar.update()
                if energy is not None:
                    bar.set_postfix_str(f"F {energy:.4g}", refresh=False)
                stopped = run.world.any(stop())
                due = checkpoint_every is not None and run.step % checkpoint_every == 0
                if checkpoint is not None and (stopped or due):
                    run.save(checkpoint)
                if stopped:
                    saved = "" if checkpoint is None else f", saved to {checkpoint}"
                    raise Interrupted(f"stopped at step {run.step} in epoch {run.epoch + 1}{saved}")
        row = run.end_epoch()
        if checkpoint is not None:
            run.save(checkpoint)
        yield row


def train(
    kind: type[R],
    config: Settings,
    data: Any,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_every: int | None = 500,
    stop: Callable[[], bool] = lambda: False,
    tensorboard: bool = False,
    progress: bool = False,
    report: Callable[[Row], None] = lambda row: None,
    world: World = World(),  # noqa: B008 - immutable
) -> R:
    """Train a run of `kind`, all kept in `out`: `checkpoint.safetensors` and, a line per epoch, `metrics.jsonl`.

    resume: continue from the checkpoint, as if never interrupted. report: called with each row as it comes.
    tensorboard: also write the rows for TensorBoard. Others as in `epochs`.
    Raises CheckpointError for a checkpoint that is in the way, missing, damaged or of another configuration.
    """
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise CheckpointError(checkpoint, "is there already", "add --resume to continue it, or choose another --out")
    if resume and not checkpoint.exists():
        raise CheckpointError(checkpoint, "is not there", "leave --resume out to start, or check --out")
    run = kind.resume(checkpoint, config, data, world) if resume else kind(config, data, world)
    world.any(False)  # every process has looked for the checkpoint before one is written
    if not world.first:
        for _ in epochs(run, checkpoint=checkpoint, checkpoint_every=checkpoint_every, stop=stop):
            pass
        return run
    metrics = out / METRICS
    with MetricsLog(metrics, run.step if resume else -1, tensorboard=tensorboard) as log:
        logged = {row.get("epoch") for row in read_rows(metrics)}
        for row in run.rows:  # a run killed between its checkpoint and its log
            if row["epoch"] not in logged:
                log.write(row)
        for row in epochs(
            run, checkpoint=checkpoint, checkpoint_every=checkpoint_every, stop=stop, progress=progress,
            label=f"{config.model} {config.method}",
        ):  # fmt: skip
            log.write(row)
            report(row)
    return run


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C (SIGINT) only makes the yielded function return True; the second interrupts as usual."""
    asked = False

    def note(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
