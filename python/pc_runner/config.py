# SPDX-License-Identifier: MIT
"""The experiments as data: models, methods, and what defines one training run."""

from __future__ import annotations

import math
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

DEFAULT_HIDDEN = (512, 512, 512)
PROBS_LR_SCALE = 0.003  # a node lr of 3e-4 where phi's is 0.1 (README, section 2)


class ConfigError(ValueError):
    """A setting out of bounds. `str()` is one line: the `field`, what was wanted, what came, the remedy."""

    def __init__(self, field: str, wanted: str, got: object, remedy: str):
        self.field, self.detail = field, f"wanted {wanted}, got {got}; {remedy}"
        super().__init__(f"{field}: {self.detail}")


@dataclass(frozen=True)
class Model:
    """A fully connected classifier: the activation of every node, the output last, and the methods that train it."""

    title: str
    activations: tuple[str, ...]
    methods: tuple[str, ...]
    figure: tuple[str, ...]  # those of the paper's Fig. 3


@dataclass(frozen=True)
class Method:
    """A way of training: the algorithm, and what holds the softmax nodes (all others are Gaussian)."""

    title: str
    algorithm: str
    softmax: str
    step: str | None = None


METHODS = {
    "bp": Method("BP", "bp", "categorical"),
    "pc_f": Method("PC_F", "pc", "gaussian"),
    "pc_fkl": Method("PC_FKL", "pc", "categorical"),
    "pc_fkl_euclidean": Method("PC_FKL, Euclidean step", "pc", "categorical", "euclidean"),
    "pc_probs": Method("PC_FKL, probabilities", "pc", "categorical_probs"),
}

_PLAIN = ("bp", "pc_f", "pc_fkl")
MODELS = {
    # without a softmax PC_F and PC_FKL are the same computation: the figure has it once
    "m1": Model("M1: tanh, squared error (PC_F = PC_FKL)", ("tanh",) * 4, _PLAIN, ("bp", "pc_fkl")),
    "m2": Model("M2: softmax output", ("tanh", "tanh", "tanh", "softmax"), _PLAIN, _PLAIN),
    "m3": Model(
        "M3: softmax output and hidden layer 2", ("tanh", "softmax", "tanh", "softmax"), tuple(METHODS), _PLAIN
    ),
}

_NOT_HERE = ("LBFGS", "Muon", "Optimizer", "SparseAdam")  # need a closure, matrices only, abstract, sparse gradients
OPTIMIZERS = tuple(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in _NOT_HERE
)


def check_method(model: str, method: str) -> None:
    """Raise ConfigError unless the model has the method."""
    if model not in MODELS:
        raise ConfigError("model", f"one of {', '.join(MODELS)}", repr(model), "see pc-run train --help")
    valid = MODELS[model].methods
    if method not in valid:
        known = method in METHODS
        remedy = (
            "it differs from pc_fkl only where a hidden layer is a softmax, as in m3"
            if known
            else "choose one of these"
        )
        raise ConfigError("method", f"one of {', '.join(valid)} for {model}", repr(method), remedy)


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the numbers of a training run. Raises ConfigError at construction.

    model, method: keys of `MODELS`, `METHODS`. data, limit: as in `load_images`. hidden: widths of the hidden layers.
    steps: inference moves T. phi_lr, phi_momentum: of the states. lr_scale: "pc_probs" nodes' factor on phi_lr.
    theta_lr, optimizer: of the weights, any dense first-order class of torch.optim.
    weight_updates: optimiser steps after each inference, at fixed phis. seed: of the weights and the batches' order.
    """

    model: str = "m2"
    method: str = "pc_fkl"
    data: str = "digits"
    limit: int | None = None
    hidden: tuple[int, ...] = DEFAULT_HIDDEN
    epochs: int = 10
    batch_size: int = 128
    steps: int = 32
    phi_lr: float = 0.1
    phi_momentum: float = 0.0
    lr_scale: float = PROBS_LR_SCALE
    theta_lr: float = 1e-4
    optimizer: str = "Adam"
    weight_updates: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_method(self.model, self.method)
        for name in ("epochs", "batch_size", "weight_updates"):
            _check_count(name, getattr(self, name), 1)
        for name in ("steps", "seed"):
            _check_count(name, getattr(self, name), 0)
        if self.limit is not None:
            _check_count("limit", self.limit, 1)
        for name in ("phi_lr", "lr_scale", "theta_lr"):
            _check_number(name, getattr(self, name), math.inf)
        _check_number("phi_momentum", self.phi_momentum, 1.0)
        if len(self.hidden) != len(DEFAULT_HIDDEN):
            _fail("hidden", f"{len(DEFAULT_HIDDEN)} widths", len(self.hidden), "the models have three hidden layers")
        for width in self.hidden:
            _check_count("hidden", width, 1)
        if self.optimizer not in OPTIMIZERS:
            _fail("optimizer", f"one of {', '.join(OPTIMIZERS)}", repr(self.optimizer), "names are torch.optim's own")

    def identity(self) -> dict[str, Any]:
        """The settings that two pieces of one run must share: all but the number of epochs. Plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items() if name != "epochs"}


def config_from(identity: dict[str, Any], epochs: int = 1) -> TrainConfig:
    """The configuration whose `identity()` this is. Raises ConfigError or TypeError for anything else."""
    return TrainConfig(**{**identity, "hidden": tuple(identity["hidden"]), "epochs": epochs})


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings of `here` that differ `there`, in words; empty if none does."""
    return ", ".join(f"{k} {there.get(k)!r} there, {here[k]!r} here" for k in here if there.get(k) != here[k])


def _fail(field: str, wanted: str, got: object, remedy: str) -> NoReturn:
    raise ConfigError(field, wanted, got, remedy)


def _check_count(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _fail(field, f"a whole number >= {least}", repr(value), "see --help for the default")


def _check_number(field: str, value: object, most: float) -> None:
    bounds = "a finite number >= 0" + ("" if math.isinf(most) else f" and <= {most:g}")
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= most
    if not ok:
        _fail(field, bounds, repr(value), "see --help for the default")


def machine() -> dict[str, Any]:
    """What a measured number depends on beside the code: cpu, threads, torch, python."""
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
