# SPDX-License-Identifier: MIT
"""The kinds of training runs, by model: what `pc-run train` and `pc-run eval` need to know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pc_runner.checkpoint import Checkpoint, CheckpointError
from pc_runner.classifier import ClassifierRun, accuracy
from pc_runner.config import MODELS, VAES, ConfigError, LanguageConfig, Settings, TrainConfig, VaeConfig
from pc_runner.data import load_images
from pc_runner.language import perplexity
from pc_runner.language_run import LanguageRun, build_language_model
from pc_runner.models.mlp import build
from pc_runner.text import load_corpus
from pc_runner.tokens import Samples, Tokeniser, Tokens, tokenise, user_cache
from pc_runner.train import Row, Run, load_weights
from pc_runner.vae_run import VaeRun, build_vae, loss_line, losses_and_variances


@dataclass(frozen=True)
class Experiment:
    """One kind of run.

    config: its settings, with their defaults. run: the class of its runs. load: (config, data_dir) -> what they train
    on. test: (config, checkpoint, its path, data, data_dir) -> figures of a trained network. line: a row's, in words.
    """

    config: type[Any]
    run: type[Run]
    load: Callable[[Any, str | None], Any]
    test: Callable[[Any, Checkpoint, Path, str, str | None], Row]
    line: Callable[[Row], str]


def _load_images(config: TrainConfig | VaeConfig, data_dir: str | None) -> Any:
    return load_images(config.data, data_dir, config.limit)


def _test_classifier(config: TrainConfig, checkpoint: Checkpoint, path: Path, data: str, data_dir: str | None) -> Row:
    images = load_images(data, data_dir)
    net = build(
        config.model, config.method, images.x_test.shape[1], images.classes, config.hidden, lr_scale=config.lr_scale
    )
    load_weights(net, checkpoint, path)
    found = accuracy(net, images.x_test, images.y_test)
    return {"data": images.name, "test_images": len(images.y_test), "accuracy": found, "note": images.note}


def _load_tokens(config: LanguageConfig, data_dir: str | None) -> Tokens:
    """The tokeniser is that of the whole corpus, whatever `limit`: else every limit had a perplexity of its own."""
    return tokenise(load_corpus(config.data, data_dir), config.vocabulary, config.tokens, user_cache())


def language_model(config: LanguageConfig, checkpoint: Checkpoint, path: Path) -> tuple[Any, Tokeniser]:
    """The network and the tokeniser of a checkpoint. Raises CheckpointError where it holds none."""
    try:
        tokeniser = Tokeniser(checkpoint.progress["tokeniser"].numpy().tobytes())
    except (KeyError, AttributeError):
        raise CheckpointError(path, "holds no tokeniser", "give one of pc-run train --model lm") from None
    net = build_language_model(config, tokeniser.vocabulary)
    load_weights(net, checkpoint, path)
    return net, tokeniser


def _test_language(config: LanguageConfig, checkpoint: Checkpoint, path: Path, data: str, data_dir: str | None) -> Row:
    net, tokeniser = language_model(config, checkpoint, path)
    corpus = load_corpus(data, data_dir)
    found: Row = {"data": data, "note": corpus.note}
    for split in ("dev", "test"):
        rows = torch.from_numpy(tokeniser.rows(getattr(corpus, split), config.tokens))
        found[f"{split}_perplexity"] = perplexity(net, Samples.of(rows))
    return found


def _test_vae(config: VaeConfig, checkpoint: Checkpoint, path: Path, data: str, data_dir: str | None) -> Row:
    images = load_images(data, data_dir)
    net = build_vae(config, images.x_test.shape[1])
    load_weights(net, checkpoint, path)
    about = {"data": images.name, "test_images": len(images.x_test), "note": images.note}
    return {**about, **losses_and_variances(net, images.x_test, config.latent)}


def accuracy_line(row: Row) -> str:
    """Test accuracy in percent."""
    return f"test accuracy {100 * row['accuracy']:.2f} %"


def perplexity_line(row: Row) -> str:
    """Both perplexities."""
    return f"perplexity {row['dev_perplexity']:.1f} (dev), {row['test_perplexity']:.1f} (test)"


CLASSIFIER = Experiment(TrainConfig, ClassifierRun, _load_images, _test_classifier, accuracy_line)
LANGUAGE = Experiment(LanguageConfig, LanguageRun, _load_tokens, _test_language, perplexity_line)
AUTOENCODER = Experiment(VaeConfig, VaeRun, _load_images, _test_vae, loss_line)
EXPERIMENTS: dict[str, Experiment] = {
    **dict.fromkeys(MODELS, CLASSIFIER),
    **dict.fromkeys(VAES, AUTOENCODER),
    "lm": LANGUAGE,
}


def experiment_of(model: object) -> Experiment:
    """The model's. Raises ConfigError for a model that there is not."""
    if model not in EXPERIMENTS:
        raise ConfigError("model", f"one of {', '.join(EXPERIMENTS)}", repr(model), "see pc-run train --help")
    return EXPERIMENTS[str(model)]


def config_from(identity: dict[str, Any], epochs: int = 1) -> Settings:
    """The configuration whose `identity()` this is. Raises ConfigError or TypeError for anything else."""
    kind = experiment_of(identity.get("model")).config
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in identity.items()}
    return kind(**{**values, "epochs": epochs})


def settings(model: str, given: dict[str, Any]) -> Settings:
    """The model's configuration with what was given for it, its own defaults elsewhere.

    Raises ConfigError that names a setting that the model does not have.
    """
    kind = experiment_of(model).config
    names = {field.name for field in fields(kind)}
    for name in given:
        if name not in names:
            owners = [m for m, e in EXPERIMENTS.items() if name in {field.name for field in fields(e.config)}]
            raise ConfigError(name, f"a setting of {model}", "one of " + ", ".join(owners), "leave it out")
    return kind(**{**given, "model": model})
