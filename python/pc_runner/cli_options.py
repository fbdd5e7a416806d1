# SPDX-License-Identifier: MIT
"""Options of `pc-run`: their types, what they are called, and one line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pc_runner.config import DEFAULT_HIDDEN, METHODS, SEEDS, Settings
from pc_runner.experiments import EXPERIMENTS

BAD_INPUT = 2


class Help(argparse.HelpFormatter):
    """Shows each option's default, as it would be typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value, text = action.default, action.help or ""
        if value is None or value is False or value is argparse.SUPPRESS:
            return text
        return f"{text} (default: {','.join(map(str, value)) if isinstance(value, tuple) else value})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input with one line, and takes no abbreviated options."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=Help, **settings)

    def error(self, message: str) -> NoReturn:
        remedy = "" if "; " in message else f"; {self.prog} --help lists what there is"
        self.exit(BAD_INPUT, f"{self.prog}: {' '.join(message.split())}{remedy}\n")


def whole(text: str) -> int:
    """A whole number; its range is checked where its meaning is known."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}; write it in digits") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number >= 1, got {value}; leave it out for the default")
    return value


def seed(text: str) -> int:
    """A whole number that generators take."""
    value = whole(text)
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 0 to 2^64 - 1, got {value}; a small one will do")
    return value


def real(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"wanted a finite number, got {text!r}; write it as 0.1 or 1e-4")
    return value


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A comma-separated list without repetitions."""

    def read(text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"wanted a comma-separated list, got {text!r}; write it as a,b,c")
        values = tuple(kind(part) for part in parts)
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"wanted each entry once, got {text!r}; remove the repetition")
        return values

    return read


def widths(text: str) -> tuple[int, ...]:
    """Widths of the hidden layers; one number stands for all of them."""
    values = tuple(whole(part) for part in text.split(","))
    return values * len(DEFAULT_HIDDEN) if len(values) == 1 else values


def folder(text: str) -> Path:
    """A folder that can be written, or made."""
    if not text:
        raise argparse.ArgumentTypeError("wanted a folder, got ''; name one, or leave it out for the default")
    try:
        path = Path(text).expanduser()
        nearest = next((p for p in (path, *path.parents) if p.exists()), path)
        if nearest.is_dir():
            with TemporaryDirectory(prefix=".pc-run-", dir=nearest):
                return path
        problem = f"{str(nearest)!r} is a file"
    except (OSError, RuntimeError) as error:  # the latter for the home of a user that there is not
        problem = getattr(error, "strerror", None) or str(error)
    raise argparse.ArgumentTypeError(f"wanted a folder that can be written, got {text!r}; {problem}")


SETTINGS: dict[str, tuple[Callable[[str], Any] | None, str, str]] = {  # without a type: a switch
    "model": (str, "NAME", f"one of {', '.join(EXPERIMENTS)}"),
    "method": (str, "NAME", f"one of {', '.join(METHODS)} (m1, m2 and lm: the first ones; vae: bp, pc_fkl)"),
    "data": (str, "NAME", "images: digits, mnist, cifar10 or hf:NAME; text: pydoc, files, 1bw or hf:NAME"),
    "limit": (whole, "N", "use the first N training samples only"),
    "hidden": (widths, "W[,W,W]", "widths of the hidden layers; one number for all three"),
    "epochs": (whole, "N", "passes over the training samples"),
    "batch_size": (whole, "B", "samples in a batch"),
    "steps": (whole, "T", "inference steps per batch"),
    "phi_lr": (real, "LR", "learning rate of the states phi"),
    "phi_momentum": (real, "M", "momentum of the states"),
    "first_lr": (real, "LR", "phi lr of the moves in which errors spread, the first L - 1; phi_lr if not given"),
    "output": (str, "NAME", "the pixels' distribution, gaussian or bernoulli"),
    "latent": (whole, "N", "entries of a code"),
    "prior": (real, "W", "weight of the prior, KL(code || N(0, I))"),
    "lr_scale": (real, "S", "pc_probs: its probability nodes' lr as a part of phi's"),
    "theta_lr": (real, "LR", "learning rate of the weights"),
    "optimizer": (str, "NAME", "optimiser of the weights, a class of torch.optim"),
    "weight_decay": (real, "D", "of the optimiser, where it has one"),
    "weight_updates": (whole, "K", "optimiser steps after each inference"),
    "precision": (str, "P", "of the decoder's products while states settle: fp32 or bf16"),
    "clip": (real, "NORM", "the gradient's largest norm; any if not given"),
    "vocabulary": (whole, "N", "tokens to tell apart"),
    "tokens": (whole, "N", "tokens of a sample, to which sentences are cut"),
    "width": (whole, "W", "width of the model"),
    "blocks": (whole, "N", "blocks of the transformer"),
    "heads": (whole, "N", "attention heads of a block"),
    "intermediate": (whole, "W", "width within a block"),
    "tied": (None, "", "decode with the embedding's weights"),
    "projections": (None, "", "value nodes on Q, K, V and the attention's output, too"),
    "seed": (seed, "N", "of the weights and of the order of the samples"),
}


def add_common(parser: argparse.ArgumentParser, run: Callable[..., int], threads: int | None = None) -> None:
    """--json and --threads, and the function that runs the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else on stdout")
    parser.add_argument(
        "--threads", type=positive, metavar="N", default=threads, help="CPU threads, torch's own number if not given"
    )
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser, defaults: Settings, names: Sequence[str] | None = None) -> None:
    """Options that are settings of a configuration, with its defaults. names: None for all of them."""
    for name in SETTINGS if names is None else names:
        if hasattr(defaults, name):
            _add_setting(parser, name, getattr(defaults, name), SETTINGS[name][2])


def add_all_settings(parser: argparse.ArgumentParser) -> None:
    """Options that are settings of any model. One that is not given is not in the namespace: each has its default."""
    models: dict[type[Settings], list[str]] = {}
    for model, experiment in EXPERIMENTS.items():
        models.setdefault(experiment.config, []).append(model)
    for name, (_, _, text) in SETTINGS.items():
        owners = {"/".join(names): getattr(kind, name) for kind, names in models.items() if hasattr(kind, name)}
        only = "" if len(owners) == len(models) else f"{', '.join(owners)}: "
        _add_setting(parser, name, argparse.SUPPRESS, only + text + _defaults(name, owners))


def _defaults(name: str, owners: dict[str, Any]) -> str:
    """What an option is where it is not given, for every kind of model that has it."""
    if name == "model":
        return f" (default: {Settings.model})"
    shown = {owner: _shown(value) for owner, value in owners.items() if value is not None and value is not False}
    if not shown:
        return ""
    alike = len(set(shown.values())) == 1 and len(shown) == len(owners)
    parts = list(shown.values())[:1] if alike else [f"{owner} {value}" for owner, value in shown.items()]
    return f" (default: {', '.join(parts)})"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _add_setting(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    kind, meta, _ = SETTINGS[name]
    option = "--" + name.replace("_", "-")
    if kind is None:
        parser.add_argument(option, action="store_true", default=default, help=text)
    else:
        parser.add_argument(option, type=kind, metavar=meta, default=default, help=text)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that are settings of a training run."""
    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def print_json(value: Any) -> None:
    """Strict JSON: numbers that are not finite become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(plain(value), indent=1, allow_nan=False))
