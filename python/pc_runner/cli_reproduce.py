# SPDX-License-Identifier: MIT
"""`pc-run reproduce TARGET`: the paper's experiments, each with options of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pc_runner import fig5, fig6, fig7, memory, reproduce
from pc_runner.cli_options import (
    add_common,
    add_settings,
    folder,
    given_settings,
    print_json,
    real,
    seed,
    several,
    whole,
)
from pc_runner.config import MODELS, VAE_METHODS, VAES, ConfigError, LanguageConfig, TrainConfig, VaeConfig
from pc_runner.data import load_images
from pc_runner.experiments import LANGUAGE
from pc_runner.train import interruptible


def add_reproduce(commands: Any) -> None:
    """The command and its targets."""
    text = "An experiment of the paper. Run it again to continue where it stopped; finished epochs are never repeated."
    parser = commands.add_parser("reproduce", help="an experiment of the paper", description=text)
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name, (about, add) in TARGETS.items():
        add(targets.add_parser(name, help=about, description=f"{about}. {text}"))


def _reporter(args: argparse.Namespace) -> Callable[[str], None]:
    """Prints a line as it comes; beside a JSON document, on stderr."""

    def report(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    return report


def _add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--out", type=folder, metavar="DIR", default=Path("runs") / name, help="folder for rows and figure"
    )


# --------------------------------------------------------------------------------------------------------------- fig3


def _add_fig3(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=several(str), metavar="A,B", default=tuple(MODELS), help="models to train")
    parser.add_argument("--methods", type=several(str), metavar="A,B", help="methods, if not those of the figure")
    parser.add_argument("--seeds", type=several(seed), metavar="N,N", default=(0, 1, 2), help="seeds")
    own = ("model", "method", "seed", "phi_lr")
    add_settings(parser, TrainConfig(data="mnist"), [n for n in TrainConfig.__dataclass_fields__ if n not in own])
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
    _add_out(parser, "fig3")
    add_common(parser, fig3_command)


def fig3_command(args: argparse.Namespace) -> int:
    base = TrainConfig(**{**given_settings(args), "phi_lr": reproduce.DEFAULT_PHI_LR})
    sweep = (args.sweep, args.sweep_lrs, args.sweep_epochs)
    wanted = reproduce.Fig3(base, args.models, args.methods, args.seeds, args.phi_lr, *sweep)
    images = load_images(base.data, args.data_dir, base.limit)
    with interruptible() as stop:
        document = reproduce.run_fig3(
            wanted, images, args.out, command=args.command_line, stop=stop, progress=not args.json,
            report=_reporter(args),
        )  # fmt: skip
    if args.json:
        print_json(document)
    else:
        print(f"\n{reproduce.show(document)}\n{args.out / 'fig3.png'} and {args.out / 'fig3.json'}")
    return 0


# -------------------------------------------------------------------------------------------------------- fig5, fig6


def _add_fig5(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=several(str), metavar="A,B", default=tuple(VAES), help="autoencoders to train")
    parser.add_argument("--seeds", type=several(seed), metavar="N,N", default=(0, 1, 2), help="seeds")
    _add_vae_settings(parser)
    parser.add_argument("--sweep", action="store_true", help="first try --sweep-lrs on 10,000 images with seed 0")
    lrs = fig5.SWEEP_LRS
    parser.add_argument(
        "--sweep-lrs", type=several(real), metavar="LR,LR", default=lrs, help="phi learning rates to try"
    )
    parser.add_argument("--sweep-epochs", type=whole, metavar="N", default=fig5.SWEEP_EPOCHS, help="of each try")
    _add_out(parser, "fig5")
    add_common(parser, fig5_command)


def _add_fig6(parser: argparse.ArgumentParser) -> None:
    default = next(iter(VAES))
    parser.add_argument("--model", type=str, metavar="NAME", default=default, help=f"one of {', '.join(VAES)}")
    parser.add_argument("--seed", type=seed, metavar="N", default=0, help="of the networks")
    _add_vae_settings(parser)
    _add_out(parser, "fig5")
    add_common(parser, fig6_command)


def _add_vae_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", type=several(str), metavar="A,B", default=VAE_METHODS, help=f"out of {', '.join(VAE_METHODS)}"
    )
    own = ("model", "method", "seed", "phi_lr")
    add_settings(parser, VaeConfig(), [name for name in VaeConfig.__dataclass_fields__ if name not in own])
    parser.add_argument(
        "--phi-lr", type=real, metavar="LR", help=f"of PC, if not the sweep's best, or {VaeConfig.phi_lr} without one"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")


def fig5_command(args: argparse.Namespace) -> int:
    sweep = (args.sweep, args.sweep_lrs, args.sweep_epochs)
    wanted = fig5.Fig5(_vae_base(args), args.models, args.methods, args.seeds, args.phi_lr, *sweep)
    return _run_figure(args, wanted, fig5.run_fig5, fig5.show, "fig5.png")


def fig6_command(args: argparse.Namespace) -> int:
    base = replace(_vae_base(args), model=args.model, seed=args.seed)  # raises for a bad one
    wanted = fig5.Fig5(base, (args.model,), args.methods, (args.seed,), args.phi_lr)
    return _run_figure(args, wanted, fig6.run_fig6, fig6.show, "fig6_*.png")


def _vae_base(args: argparse.Namespace) -> VaeConfig:
    """The settings that are the same for every run."""
    given = {name: value for name, value in given_settings(args).items() if name not in ("model", "seed", "phi_lr")}
    return VaeConfig(**given)


def _run_figure(args: argparse.Namespace, wanted: fig5.Fig5, run: Any, show: Any, files: str) -> int:
    images = load_images(wanted.base.data, args.data_dir, wanted.base.limit)
    with interruptible() as stop:
        document = run(
            wanted, images, args.out, command=args.command_line, stop=stop, progress=not args.json,
            report=_reporter(args),
        )  # fmt: skip
    if args.json:
        print_json(document)
    else:
        print(f"\n{show(document)}\n{args.out / files} and {args.out / (args.target + '.json')}")
    return 0


# --------------------------------------------------------------------------------------------------------------- fig7


def _add_fig7(parser: argparse.ArgumentParser) -> None:
    paper = fig7.PAPER
    parser.add_argument("--methods", type=several(str), metavar="A,B", default=paper, help="methods to train")
    parser.add_argument("--seeds", type=several(seed), metavar="N,N", default=(0, 1, 2), help="seeds")
    own = ("model", "method", "seed")
    add_settings(parser, LanguageConfig(), [n for n in LanguageConfig.__dataclass_fields__ if n not in own])
    count = len(fig7.BP_RATES)
    text = f"first try {count} pairs of learning rates for each method on a tenth of the sentences, seed 0"
    parser.add_argument("--search", action="store_true", help=text)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    _add_out(parser, "fig7")
    add_common(parser, fig7_command)


def fig7_command(args: argparse.Namespace) -> int:
    base = LanguageConfig(**given_settings(args))
    wanted = fig7.Fig7(base, args.methods, args.seeds, args.search)
    tokens = LANGUAGE.load(base, args.data_dir)
    with interruptible() as stop:
        document = fig7.run_fig7(
            wanted, tokens, args.out, command=args.command_line, stop=stop, progress=not args.json,
            report=_reporter(args),
        )  # fmt: skip
    if args.json:
        print_json(document)
    else:
        print(f"\n{fig7.show(document)}\n{args.out / 'fig7.png'} and {args.out / 'fig7.json'}")
    return 0


# ------------------------------------------------------------------------------------------------------------- memory


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=several(str), metavar="A,B", default=tuple(memory.CASES), help="models")
    _add_out(parser, "memory")
    add_common(parser, memory_command)


def memory_command(args: argparse.Namespace) -> int:
    for name in args.models:
        if name not in memory.CASES:
            wanted = f"names out of {', '.join(memory.CASES)}"
            raise ConfigError("models", wanted, repr(name), "separate them by commas")
    document = memory.run_memory(args.out, args.models, args.command_line, _reporter(args))
    if args.json:
        print_json(document)
    else:
        print(f"\n{memory.show(document)}\n{args.out / 'memory.png'} and {args.out / 'memory.json'}")
    return 0


TARGETS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "fig3": ("M1, M2, M3 by BP, PC_F, PC_FKL", _add_fig3),
    "fig5": ("Autoencoders by BP and PC: test loss over epochs", _add_fig5),
    "fig6": ("What the autoencoders have learned, in pictures", _add_fig6),
    "fig7": ("The language model by BP, PC_F, PC_FKL", _add_fig7),
    "memory": ("Memory of a training step, PC beside BP", _add_memory),
}
