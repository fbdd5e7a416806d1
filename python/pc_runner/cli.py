# SPDX-License-Identifier: MIT
"""The command line `pc-run`: options, one line for whatever is wrong with them, and what each command prints."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import pc_kernels as pck
from pc_runner import demo, reproduce
from pc_runner.checkpoint import CheckpointError, load_checkpoint
from pc_runner.config import DEFAULT_HIDDEN, METHODS, MODELS, ConfigError, TrainConfig, config_from, machine
from pc_runner.data import Images, load_images
from pc_runner.distributed import joined
from pc_runner.models.mlp import build
from pc_runner.train import CHECKPOINT, METRICS, Interrupted, accuracy, interruptible, load_weights, train

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 (failed), 2 (bad input), 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as end:  # argparse's way to say that it has answered
        return int(end.code or 0)
    args.command_line = shlex.join(["pc-run", *argv])
    program = f"pc-run {args.command}"
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return args.run(args)
    except ConfigError as error:
        option = "--" + error.field.replace("_", "-")
        return _complain(program, f"argument {option}: {error.detail}", BAD_INPUT)
    except (ValueError, pck.BackendUnavailable) as error:  # DataError and CheckpointError among them
        return _complain(program, str(error), BAD_INPUT)
    except (OSError, pck.InferenceDiverged) as error:
        return _complain(program, str(error), FAILED)
    except Interrupted as stop:
        return _complain(program, f"{stop}; go on with: {_resume_command(args)}", INTERRUPTED)
    except KeyboardInterrupt:
        return _complain(program, "interrupted", INTERRUPTED)


def _complain(program: str, message: str, code: int) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _resume_command(args: argparse.Namespace) -> str:
    needs_flag = args.command == "train" and not args.resume
    return args.command_line + (" --resume" if needs_flag else "")


# ------------------------------------------------------------------------------------------------------------ options


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
    """A folder that exists or can be made."""
    path = Path(text).expanduser()
    nearest = next((p for p in (path, *path.parents) if p.exists()), path)
    if not text or not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"wanted a folder, got {text!r}; {str(nearest)!r} is a file")
    return path


def make_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="pc-run", description="Predictive-coding networks: train, compare, reproduce.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_reproduce(commands)
    info = commands.add_parser(
        "info", help="versions, backends, threads", description="What is installed and would run."
    )
    _add_common(info, info_command)
    return parser


def _add_common(parser: argparse.ArgumentParser, run: Callable[..., int], threads: int | None = None) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else on stdout")
    parser.add_argument(
        "--threads", type=positive, metavar="N", default=threads, help="CPU threads, torch's own number if not given"
    )
    parser.set_defaults(run=run)


def _add_settings(parser: argparse.ArgumentParser, defaults: Any, names: Sequence[str]) -> None:
    """Options that are settings of a configuration, with its defaults."""
    for name in names:
        kind, meta, text = SETTINGS[name]
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, metavar=meta, default=getattr(defaults, name), help=text)


SETTINGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "model": (str, "NAME", f"one of {', '.join(MODELS)}"),
    "method": (str, "NAME", f"one of {', '.join(METHODS)} (the last two: m3 only)"),
    "data": (str, "NAME", "digits, mnist, cifar10 or hf:NAME"),
    "limit": (whole, "N", "use the first N training images only"),
    "hidden": (widths, "W[,W,W]", "widths of the hidden layers; one number for all three"),
    "epochs": (whole, "N", "passes over the training images"),
    "batch_size": (whole, "B", "images in a batch"),
    "steps": (whole, "T", "inference steps per batch"),
    "phi_lr": (real, "LR", "learning rate of the states phi"),
    "phi_momentum": (real, "M", "momentum of the states"),
    "lr_scale": (real, "S", "pc_probs: its probability nodes' lr as a part of phi's"),
    "theta_lr": (real, "LR", "learning rate of the weights"),
    "optimizer": (str, "NAME", "optimiser of the weights, a class of torch.optim"),
    "weight_updates": (whole, "K", "optimiser steps after each inference"),
    "seed": (whole, "N", "of the weights and of the order of the images"),
}


def _add_demo(commands: Any) -> None:
    text = "Train M2 and M3 on handwritten digits by BP, PC_F and PC_FKL; write demo.png and demo.json."
    parser = commands.add_parser("demo", help="see PC learn in a minute", description=text)
    _add_settings(
        parser, demo.DEFAULTS, ["epochs", "hidden", "batch_size", "steps", "phi_lr", "phi_momentum", "theta_lr", "seed"]
    )
    parser.add_argument("--out", type=folder, metavar="DIR", default=Path("runs/demo"), help="folder for the results")
    _add_common(parser, demo_command, threads=1)


def _add_train(commands: Any) -> None:
    text = f"Train one network; --out keeps {CHECKPOINT} and {METRICS}. Ctrl-C saves; --resume continues bit for bit."
    text += " Under torchrun the processes share each batch."
    parser = commands.add_parser("train", help="train one network", description=text)
    _add_settings(parser, TrainConfig(), list(TrainConfig.__dataclass_fields__))
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the run if not runs/MODEL-METHOD-DATA-SEED"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--checkpoint-every", type=positive, metavar="N", default=500, help="batches between checkpoints"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write --out/tensorboard")
    _add_common(parser, train_command)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="test a checkpoint", description="Test accuracy of a trained network.")
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help=f"a run's folder, or its {CHECKPOINT}")
    parser.add_argument("--data", metavar="NAME", help="other test images than the run's own")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    _add_common(parser, eval_command)


def _add_reproduce(commands: Any) -> None:
    text = "An experiment of the paper. Run it again to continue where it stopped; finished epochs are never repeated."
    parser = commands.add_parser("reproduce", help="an experiment of the paper", description=text)
    parser.add_argument("target", metavar="TARGET", type=str, help="fig3: M1, M2, M3 by BP, PC_F, PC_FKL")
    parser.add_argument("--models", type=several(str), metavar="A,B", default=tuple(MODELS), help="models to train")
    parser.add_argument("--methods", type=several(str), metavar="A,B", help="methods, if not those of the figure")
    parser.add_argument("--seeds", type=several(whole), metavar="N,N", default=(0, 1, 2), help="seeds")
    own = ("model", "method", "seed", "phi_lr")
    _add_settings(parser, TrainConfig(data="mnist"), [n for n in TrainConfig.__dataclass_fields__ if n not in own])
    parser.add_argument(
        "--phi-lr", type=real, metavar="LR", help="for all methods, if not the sweep's best, or 0.1 without one"
    )
    parser.add_argument("--sweep", action="store_true", help="first try --sweep-lrs on 10,000 images with seed 0")
    lrs = reproduce.SWEEP_LRS
    parser.add_argument(
        "--sweep-lrs", type=several(real), metavar="LR,LR", default=lrs, help="phi learning rates to try"
    )
    parser.add_argument("--sweep-epochs", type=whole, metavar="N", default=reproduce.SWEEP_EPOCHS, help="of each try")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", default=Path("runs/fig3"), help="folder for rows and figure"
    )
    _add_common(parser, reproduce_command)


# ----------------------------------------------------------------------------------------------------------- commands


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that are settings of a training run."""
    return {name: getattr(args, name) for name in TrainConfig.__dataclass_fields__ if hasattr(args, name)}


def _print_json(value: Any) -> None:
    """Strict JSON: numbers that are not finite become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(plain(value), indent=1, allow_nan=False))


def demo_command(args: argparse.Namespace) -> int:
    base = replace(demo.DEFAULTS, **_settings(args))
    document = demo.run_demo(base, args.out, command=args.command_line, progress=not args.json)
    if args.json:
        _print_json(document)
    else:
        files = f"{args.out / 'demo.png'} and {args.out / 'demo.json'}"
        print(f"{demo.show(document)}\n\n{files}, {document['seconds']:.0f} s")
    return 0


def train_command(args: argparse.Namespace) -> int:
    config = TrainConfig(**_settings(args))
    images = load_images(config.data, args.data_dir, config.limit)
    name = f"{config.model}-{config.method}-{config.data}-{config.seed}".replace("/", "_").replace(":", "_")
    out = args.out or Path("runs") / name
    with joined() as world, interruptible() as stop:
        run = train(
            config, images, out, resume=args.resume, checkpoint_every=args.checkpoint_every, stop=stop,
            tensorboard=args.tensorboard, progress=world.first and not args.json,
            report=_silent if args.json else _print_row, world=world,
        )  # fmt: skip
    if not world.first:
        return 0
    if args.json:
        _print_json(
            {"out": str(out), "config": config.identity(), "note": images.note, "machine": machine(), "rows": run.rows}
        )
    else:
        print(f"test accuracy {_percent(run.rows[-1]['accuracy'], images)}; {out / CHECKPOINT}, {out / METRICS}")
    return 0


def _silent(row: dict[str, Any]) -> None:
    """Reports nothing."""


def _print_row(row: dict[str, Any]) -> None:
    print(
        f"epoch {row['epoch']}: test accuracy {100 * row['accuracy']:.2f} %, F {row['energy']:.4g}, "
        f"{row['ms_per_step']:.1f} ms per step, {row['seconds']:.1f} s",
        flush=True,
    )


def _percent(value: float, images: Images) -> str:
    return f"{100 * value:.2f} %" + (f" ({images.note})" if images.note else "")


def eval_command(args: argparse.Namespace) -> int:
    path = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    checkpoint = load_checkpoint(path)
    try:
        config = config_from(checkpoint.progress["config"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(path, f"is no training run ({error})", "give one written by pc-run train") from None
    images = load_images(config.data if args.data is None else args.data, args.data_dir)
    features = images.x_test.shape[1]
    net = build(config.model, config.method, features, images.classes, config.hidden, lr_scale=config.lr_scale)
    load_weights(net, checkpoint, path)
    found = accuracy(net, images.x_test, images.y_test)
    if args.json:
        result = {"checkpoint": str(path), "data": images.name, "test_images": len(images.y_test), "accuracy": found}
        _print_json({**result, "epoch": checkpoint.progress["epoch"], "note": images.note, "config": config.identity()})
    else:
        tests = f"{len(images.y_test):,} test images of {images.name}"
        print(f"{config.model} {config.method}: test accuracy {_percent(found, images)}, {tests}")
    return 0


def reproduce_command(args: argparse.Namespace) -> int:
    if args.target != "fig3":
        remedy = "the paper's other experiments come with later versions"
        raise ValueError(f"argument TARGET: wanted fig3, got {args.target!r}; {remedy}")
    base = TrainConfig(**{**_settings(args), "phi_lr": reproduce.DEFAULT_PHI_LR})
    sweep = (args.sweep, args.sweep_lrs, args.sweep_epochs)
    wanted = reproduce.Fig3(base, args.models, args.methods, args.seeds, args.phi_lr, *sweep)
    images = load_images(base.data, args.data_dir, base.limit)

    def report(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    with interruptible() as stop:
        document = reproduce.run_fig3(
            wanted, images, args.out, command=args.command_line, stop=stop, progress=not args.json, report=report
        )
    if args.json:
        _print_json(document)
    else:
        print(f"\n{reproduce.show(document)}\n{args.out / 'fig3.png'} and {args.out / 'fig3.json'}")
    return 0


def info_command(args: argparse.Namespace) -> int:
    net, x = build("m2", "pc_fkl", 784, 10), torch.zeros(128, 784)
    example = net.explain(x, torch.zeros(128, dtype=torch.int64))
    built, here = pck.build_info(), machine()
    if args.json:
        _print_json({"build": built, "machine": here, "numpy": np.__version__, "explain": example.splitlines()})
        return 0
    versions = f"torch {torch.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    print(f"pc-kernels {built['version']}, {versions}\n{here['cpu']}, {here['threads']} threads")
    print("\n".join(f"{key}: {value}" for key, value in built.items() if key != "version"))
    print(f"\nM2 on MNIST, batch 128, 32 steps:\n{example}")
    return 0
