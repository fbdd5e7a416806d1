# SPDX-License-Identifier: MIT
"""`pc-run reproduce TARGET`: the paper's experiments, each with options of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pc_runner import memory, reproduce, reproduce_language
from pc_runner.cli_options import add_common, add_settings, folder, given_settings, print_json, real, several, whole
from pc_runner.config import MODELS, ConfigError, LanguageConfig, TrainConfig
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
    parser.add_argument("--seeds", type=several(whole), metavar="N,N", default=(0, 1, 2), help="seeds")
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


# --------------------------------------------------------------------------------------------------------------- fig7


def _add_fig7(parser: argparse.ArgumentParser) -> None:
    paper = reproduce_language.PAPER
    parser.add_argument("--methods", type=several(str), metavar="A,B", default=paper, help="methods to train")
    parser.add_argument("--seeds", type=several(whole), metavar="N,N", default=(0, 1, 2), help="seeds")
    own = ("model", "method", "seed")
    add_settings(parser, LanguageConfig(), [n for n in LanguageConfig.__dataclass_fields__ if n not in own])
    count = len(reproduce_language.BP_RATES)
    text = f"first try {count} pairs of learning rates for each method on a tenth of the sentences, seed 0"
    parser.add_argument("--search", action="store_true", help=text)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    _add_out(parser, "fig7")
    add_common(parser, fig7_command)


def fig7_command(args: argparse.Namespace) -> int:
    base = LanguageConfig(**given_settings(args))
    wanted = reproduce_language.Fig7(base, args.methods, args.seeds, args.search)
    tokens = LANGUAGE.load(base, args.data_dir)
    with interruptible() as stop:
        document = reproduce_language.run_fig7(
            wanted, tokens, args.out, command=args.command_line, stop=stop, progress=not args.json,
            report=_reporter(args),
        )  # fmt: skip
    if args.json:
        print_json(document)
    else:
        print(f"\n{reproduce_language.show(document)}\n{args.out / 'fig7.png'} and {args.out / 'fig7.json'}")
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
    "fig7": ("The language model by BP, PC_F, PC_FKL", _add_fig7),
    "memory": ("Memory of a training step, PC beside BP", _add_memory),
}
