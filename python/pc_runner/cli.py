# SPDX-License-Identifier: MIT
"""The command line `pc-run`: the commands, what each prints, and one line for whatever goes wrong."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pc_kernels as pck
from pc_runner import demo
from pc_runner.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from pc_runner.cli_options import (
    BAD_INPUT,
    Parser,
    add_all_settings,
    add_common,
    add_settings,
    folder,
    given_settings,
    positive,
    print_json,
)  # fmt: skip
from pc_runner.cli_reproduce import add_reproduce
from pc_runner.config import ConfigError, LanguageConfig, TrainConfig, machine
from pc_runner.distributed import joined
from pc_runner.experiments import config_from, experiment_of, language_model, settings
from pc_runner.language import complete
from pc_runner.models.mlp import build
from pc_runner.plots import table
from pc_runner.train import CHECKPOINT, METRICS, Interrupted, interruptible, train

FAILED, INTERRUPTED = 1, 130


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


def make_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="pc-run", description="Predictive-coding networks: train, compare, reproduce.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_complete(commands)
    add_reproduce(commands)
    info = commands.add_parser(
        "info", help="versions, backends, threads", description="What is installed and would run."
    )
    add_common(info, info_command)
    return parser


def _add_demo(commands: Any) -> None:
    text = "Train M2 and M3 on handwritten digits by BP, PC_F and PC_FKL; write demo.png and demo.json."
    parser = commands.add_parser("demo", help="see PC learn in a minute", description=text)
    add_settings(
        parser, demo.DEFAULTS, ["epochs", "hidden", "batch_size", "steps", "phi_lr", "phi_momentum", "theta_lr", "seed"]
    )
    parser.add_argument("--out", type=folder, metavar="DIR", default=Path("runs/demo"), help="folder for the results")
    add_common(parser, demo_command, threads=1)


def _add_train(commands: Any) -> None:
    text = f"Train one network; --out keeps {CHECKPOINT} and {METRICS}. Ctrl-C saves; --resume continues bit for bit."
    text += " Under torchrun the processes share each batch."
    parser = commands.add_parser("train", help="train one network", description=text)
    add_all_settings(parser)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the run if not runs/MODEL-METHOD-DATA-SEED"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--checkpoint-every", type=positive, metavar="N", default=500, help="batches between checkpoints"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write --out/tensorboard")
    add_common(parser, train_command)


def _add_eval(commands: Any) -> None:
    text = "Test accuracy, loss or perplexity of a trained network."
    parser = commands.add_parser("eval", help="test a checkpoint", description=text)
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help=f"a run's folder, or its {CHECKPOINT}")
    parser.add_argument("--data", metavar="NAME", help="other data than the run's own")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files")
    add_common(parser, eval_command)


def _add_complete(commands: Any) -> None:
    text = "How a trained language model goes on with a text, and the likeliest next tokens with their probabilities."
    parser = commands.add_parser("complete", help="let a language model go on", description=text)
    parser.add_argument("text", metavar="TEXT", help="the beginning of a sentence")
    default = Path("runs") / LanguageConfig().name
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", default=default, help=f"a run's folder, or its {CHECKPOINT}"
    )
    parser.add_argument("--length", type=positive, metavar="N", default=12, help="at most so many tokens")
    parser.add_argument("--top", type=positive, metavar="K", default=5, help="candidates of the next token to list")
    add_common(parser, complete_command)


# ----------------------------------------------------------------------------------------------------------- commands


def demo_command(args: argparse.Namespace) -> int:
    base = replace(demo.DEFAULTS, **given_settings(args))
    document = demo.run_demo(base, args.out, command=args.command_line, progress=not args.json)
    if args.json:
        print_json(document)
    else:
        files = f"{args.out / 'demo.png'} and {args.out / 'demo.json'}"
        print(f"{demo.show(document)}\n\n{files}, {document['seconds']:.0f} s")
    return 0


def train_command(args: argparse.Namespace) -> int:
    given = given_settings(args)
    model = given.get("model", TrainConfig.model)
    experiment, config = experiment_of(model), settings(model, given)
    data = experiment.load(config, args.data_dir)
    out = args.out or Path("runs") / config.name
    with joined() as world, interruptible() as stop:
        run = train(
            experiment.run, config, data, out, resume=args.resume, checkpoint_every=args.checkpoint_every, stop=stop,
            tensorboard=args.tensorboard, progress=world.first and not args.json,
            report=_silent if args.json else lambda row: _print_row(row, experiment.line(row)), world=world,
        )  # fmt: skip
    if not world.first:
        return 0
    if args.json:
        about = {"out": str(out), "config": config.identity(), "note": data.note, "machine": machine()}
        print_json({**about, "rows": run.rows})
    else:
        print(f"{experiment.line(run.rows[-1])}{_noted(data.note)}; {out / CHECKPOINT}, {out / METRICS}")
    return 0


def _silent(row: dict[str, Any]) -> None:
    """Reports nothing."""


def _print_row(row: dict[str, Any], figures: str) -> None:
    print(
        f"epoch {row['epoch']}: {figures}, F {row['energy']:.4g}, {row['ms_per_step']:.1f} ms per step, "
        f"{row['seconds']:.1f} s",
        flush=True,
    )


def _noted(note: str) -> str:
    return f" ({note})" if note else ""


def _read_run(path: Path) -> tuple[Path, Checkpoint, Any]:
    """A run's checkpoint file, what is in it, and its configuration. CheckpointError for one that is of no use."""
    path = path / CHECKPOINT if path.is_dir() else path
    checkpoint = load_checkpoint(path)
    broken = [name for name, weight in checkpoint.model.items() if not weight.isfinite().all()]
    if broken:
        remedy = "train it anew, with a lower --theta-lr or --phi-lr"
        raise CheckpointError(path, f"holds weights that are not finite ({broken[0]})", remedy)
    try:
        return path, checkpoint, config_from(checkpoint.progress["config"])
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(path, f"is no training run ({error})", "give one written by pc-run train") from None


def eval_command(args: argparse.Namespace) -> int:
    path, checkpoint, config = _read_run(args.checkpoint)
    experiment = experiment_of(config.model)
    data = config.data if args.data is None else args.data
    found = experiment.test(config, checkpoint, path, data, args.data_dir)
    if args.json:
        here = {"epoch": checkpoint.progress["epoch"], "config": config.identity()}
        print_json({"checkpoint": str(path), **found, **here})
    else:
        tests = f"{found['test_images']:,} test images of " if "test_images" in found else ""
        note = _noted(found["note"])
        print(f"{config.model} {config.method}: {experiment.line(found)}{note}, {tests}{found['data']}")
    return 0


def complete_command(args: argparse.Namespace) -> int:
    path, checkpoint, config = _read_run(args.checkpoint)
    if not isinstance(config, LanguageConfig):
        raise CheckpointError(path, f"is a run of {config.model}", "give one of pc-run train --model lm")
    net, tokeniser = language_model(config, checkpoint, path)
    found = complete(net, tokeniser, args.text, length=config.tokens, tokens=args.length, top=args.top)
    if args.json:
        print_json({"checkpoint": str(path), "text": found.text, "next": found.next})
    else:
        rows = [{"next token": piece, "probability": f"{p:.4f}"} for piece, p in found.next]
        print(f"{table(rows)}\n\n{found.text}")
    return 0


def info_command(args: argparse.Namespace) -> int:
    net, x = build("m2", "pc_fkl", 784, 10), torch.zeros(128, 784)
    example = net.explain(x, torch.zeros(128, dtype=torch.int64))
    built, here = pck.build_info(), machine()
    if args.json:
        print_json({"build": built, "machine": here, "numpy": np.__version__, "explain": example.splitlines()})
        return 0
    versions = f"torch {torch.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    print(f"pc-kernels {built['version']}, {versions}\n{here['cpu']}, {here['threads']} threads")
    print("\n".join(f"{key}: {value}" for key, value in built.items() if key != "version"))
    print(f"\nM2 on MNIST, batch 128, 32 steps:\n{example}")
    return 0
