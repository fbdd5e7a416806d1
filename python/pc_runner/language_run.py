# SPDX-License-Identifier: MIT
"""Training runs of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc_runner.config import METHODS, LanguageConfig
from pc_runner.language import perplexity
from pc_runner.models.transformer import build
from pc_runner.network import PCNetwork
from pc_runner.tokens import Tokens
from pc_runner.train import Row, Run


class LanguageRun(Run):
    """A run on sentences. `evaluate` gives dev_perplexity and test_perplexity (`language.PERPLEXITY`)."""

    config: LanguageConfig
    data: Tokens
    figures = ("dev_perplexity", "test_perplexity")

    def make_net(self) -> PCNetwork:
        return build_language_model(self.config, self.data.vocabulary)

    def __len__(self) -> int:
        return len(self.data.train) if self.config.limit is None else min(self.config.limit, len(self.data.train))

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        train = self.data.train
        how: dict[str, Any] = {"masks": {"output": train.mask[index].unsqueeze(-1)}}
        if METHODS[self.config.method].algorithm == "pc":
            how["precision"] = self.config.precision
        return train.inputs[index], train.targets[index], how

    def rates(self) -> float | list[float]:
        return self.config.rates

    def evaluate(self) -> Row:
        splits = {"dev": self.data.dev, "test": self.data.test}
        return {f"{name}_perplexity": perplexity(self.net, split) for name, split in splits.items()}

    def keep(self) -> Row:
        proto = torch.frombuffer(bytearray(self.data.tokeniser.model_proto), dtype=torch.uint8)
        return {"tokeniser": proto, "vocabulary": self.data.vocabulary}


def build_language_model(config: LanguageConfig, vocabulary: int) -> PCNetwork:
    """The network of a configuration, for a vocabulary that the tokeniser has reached."""
    names = ("tokens", "blocks", "heads", "intermediate", "tied", "projections")
    shape = {name: getattr(config, name) for name in names}
    return build(config.method, vocabulary, config.seed, hidden=config.width, **shape)
