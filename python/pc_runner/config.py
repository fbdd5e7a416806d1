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

SEEDS = 2**64  # torch's generators take fewer
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
    """Raise ConfigError unless the classifier has the method."""
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
class Settings:
    """What decides the numbers of every training run. Raises ConfigError at construction.

    model, method: what is trained, and how (a key of `METHODS`). data, limit: where the samples come from, and how many
    of them are trained on. steps: inference moves T. phi_lr, phi_momentum: of the states. theta_lr, optimizer: of the
    weights, any dense first-order class of torch.optim. weight_updates: optimiser steps after each inference, at fixed
    phis. clip: the gradient's largest norm, None for any. seed: of the weights and the batches' order.
    """

    model: str = "m2"
    method: str = "pc_fkl"
    data: str = "digits"
    limit: int | None = None
    epochs: int = 10
    batch_size: int = 128
    steps: int = 32
    phi_lr: float = 0.1
    phi_momentum: float = 0.0
    theta_lr: float = 1e-4
    optimizer: str = "Adam"
    weight_updates: int = 1
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "weight_updates"):
            _check_count(name, getattr(self, name), 1)
        for name in ("steps", "seed"):
            _check_count(name, getattr(self, name), 0)
        if self.seed >= SEEDS:
            _fail("seed", "a whole number below 2^64", self.seed, "any small one will do")
        if self.limit is not None:
            _check_count("limit", self.limit, 1)
        for name in ("phi_lr", "theta_lr"):
            _check_number(name, getattr(self, name), math.inf)
        _check_number("phi_momentum", self.phi_momentum, 1.0)
        if self.clip is not None:
            _check_number("clip", self.clip, math.inf)
        if self.optimizer not in OPTIMIZERS:
            _fail("optimizer", f"one of {', '.join(OPTIMIZERS)}", repr(self.optimizer), "names are torch.optim's own")

    def identity(self) -> dict[str, Any]:
        """The settings that two pieces of one run must share: all but the number of epochs. Plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items() if name != "epochs"}

    @property
    def name(self) -> str:
        """What tells this run from the others of one experiment, for files and labels."""
        return f"{self.model}-{self.method}-{self.data}-{self.seed}".replace("/", "_").replace(":", "_")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A classifier's run. model: a key of `MODELS`. hidden: widths of the hidden layers. lr_scale: "pc_probs" nodes'
    factor on phi_lr."""

    hidden: tuple[int, ...] = DEFAULT_HIDDEN
    lr_scale: float = PROBS_LR_SCALE

    def __post_init__(self) -> None:
        check_method(self.model, self.method)
        super().__post_init__()
        _check_number("lr_scale", self.lr_scale, math.inf)
        if len(self.hidden) != len(DEFAULT_HIDDEN):
            _fail("hidden", f"{len(DEFAULT_HIDDEN)} widths", len(self.hidden), "the models have three hidden layers")
        for width in self.hidden:
            _check_count("hidden", width, 1)


LANGUAGE_METHODS = ("bp", "pc_f", "pc_fkl", "pc_fkl_euclidean")


@dataclass(frozen=True)
class LanguageConfig(Settings):
    """A language model's run. data: as in `load_corpus`.

    vocabulary, tokens: token ids, and tokens of a sample. width, blocks, heads, intermediate, tied, projections: as in
    `Transformer`. first_lr: the lr of the first L - 1 moves, L the most nodes on a way to the output, instead of
    phi_lr; None for phi_lr. weight_decay: of optimisers that have one. precision: of the decoder's products while the
    states settle, fp32 or bf16; the weights' gradients are always of fp32.
    """

    model: str = "lm"
    data: str = "pydoc"
    epochs: int = 3
    batch_size: int = 16
    steps: int = 5
    phi_lr: float = 0.003
    theta_lr: float = 2e-3
    optimizer: str = "AdamW"
    vocabulary: int = 8001
    tokens: int = 32
    width: int = 128
    blocks: int = 1
    heads: int = 1
    intermediate: int = 512
    tied: bool = False
    projections: bool = False
    first_lr: float | None = None
    weight_decay: float = 0.01
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.model != "lm":
            _fail("model", "lm", repr(self.model), "it is the one language model")
        if self.method not in LANGUAGE_METHODS:
            wanted = f"one of {', '.join(LANGUAGE_METHODS)} for {self.model}"
            _fail("method", wanted, repr(self.method), "choose one of these")
        super().__post_init__()
        _check_count("vocabulary", self.vocabulary, 5)
        for name in ("tokens", "width", "blocks", "heads", "intermediate"):
            _check_count(name, getattr(self, name), 1)
        if self.width % self.heads:
            _fail("heads", f"a divisor of the width, {self.width}", self.heads, "every head has the same width")
        _check_number("weight_decay", self.weight_decay, math.inf)
        if self.precision not in ("fp32", "bf16"):
            _fail("precision", "fp32 or bf16", repr(self.precision), "bf16 is faster where the CPU has AVX512_BF16")
        if self.first_lr is not None:
            _check_number("first_lr", self.first_lr, math.inf)

    @property
    def depth(self) -> int:
        """L: scores and intermediate of each block, the head, the output; with `projections` two more a block."""
        return 2 + self.blocks * (4 if self.projections else 2)

    @property
    def rates(self) -> float | list[float]:
        """The lr of every move."""
        if self.first_lr is None:
            return self.phi_lr
        return [self.first_lr if t < self.depth - 1 else self.phi_lr for t in range(self.steps)]


@dataclass(frozen=True)
class Autoencoder:
    """A fully connected variational autoencoder: the encoder's hidden widths, the decoder's in reverse."""

    title: str
    hidden: tuple[int, ...]


VAES = {
    "vae": Autoencoder("one hidden layer of 256 each way", (256,)),
    "vae_wide": Autoencoder("one hidden layer of 512 each way", (512,)),
}
VAE_METHODS = ("bp", "pc_fkl")


@dataclass(frozen=True)
class VaeConfig(Settings):
    """An autoencoder's run. model: a key of `VAES`.

    output: "gaussian" or "bernoulli" pixels. latent: entries of a code; the bottleneck has twice as many, means and log
    variances. prior: the weight of KL(N(u, e^s) || N(0, I)).
    """

    model: str = "vae"
    epochs: int = 60
    batch_size: int = 32
    phi_lr: float = 0.01
    output: str = "gaussian"
    latent: int = 16
    prior: float = 0.001

    def __post_init__(self) -> None:
        if self.model not in VAES:
            _fail("model", f"one of {', '.join(VAES)}", repr(self.model), "these are the autoencoders")
        if self.method not in VAE_METHODS:
            wanted = f"one of {', '.join(VAE_METHODS)} for {self.model}"
            _fail("method", wanted, repr(self.method), "choose one of these")
        super().__post_init__()
        if self.output not in ("gaussian", "bernoulli"):
            _fail("output", "gaussian or bernoulli", repr(self.output), "it is the pixels' distribution")
        _check_count("latent", self.latent, 1)
        _check_number("prior", self.prior, math.inf)


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
