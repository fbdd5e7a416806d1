# SPDX-License-Identifier: MIT
"""Perplexity by its definition, and completions that follow the model's own distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from pc_runner import PCNetwork, PCNode
from pc_runner.language import complete, perplexity
from pc_runner.text import load_corpus
from pc_runner.tokens import BOS, EOS, PAD, UNKNOWN, Samples, Tokeniser, train_tokeniser
from torch import Tensor, nn

LENGTH = 6


class Table(nn.Module):
    """Logits of the next token from the present one alone."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.get_buffer("logits")[tokens]


def net_of(logits: Tensor) -> PCNetwork:
    return PCNetwork(Table(logits), output=PCNode("categorical"))


@pytest.fixture(scope="module")
def coder() -> Tokeniser:
    return train_tokeniser(load_corpus("pydoc").train, 500)


def test_perplexity_is_its_definition() -> None:
    """By hand: a sentence that fits (its end counts), one that was cut, chunks of any size."""
    q = torch.rand(9, 9, dtype=torch.float64).softmax(-1)
    rows = torch.tensor([[BOS, 5, 6, EOS, PAD], [BOS, 7, 8, 5, 6], [BOS, EOS, PAD, PAD, PAD]])
    pairs = [(BOS, 5), (5, 6), (6, EOS), (BOS, 7), (7, 8), (8, 5), (5, 6), (BOS, EOS)]
    wanted = math.exp(-sum(math.log(q[a, b]) for a, b in pairs) / len(pairs))
    for chunk in (1, 2, 64):
        assert perplexity(net_of(q.log()), Samples.of(rows), chunk) == pytest.approx(wanted, rel=1e-12)


def test_perplexity_of_chance_is_the_vocabulary() -> None:
    rows = torch.randint(4, 9, (7, 5))
    assert perplexity(net_of(torch.zeros(9, 9)), Samples.of(rows)) == pytest.approx(9)
    assert perplexity(net_of(torch.full((9, 9), 0.0).fill_diagonal_(1e6)), Samples.of(rows)) == math.inf


def test_completion_is_greedy_and_ends(coder: Tokeniser) -> None:
    ids = coder.encode("the value is not")
    logits = torch.zeros(coder.vocabulary, coder.vocabulary)
    chain = [ids[-1], *coder.encode("a string"), EOS]
    for a, b in pairwise(chain):
        logits[a, b] = 5.0
    found = complete(net_of(logits), coder, "the value is not", length=LENGTH, top=3)
    assert found.text == "the value is not a string"
    assert found.next[0][0] == coder.piece(chain[1])
    share = math.exp(5.0) / (math.exp(5.0) + coder.vocabulary - 4)  # three tokens are never predicted
    assert found.next[0][1] == pytest.approx(share, rel=1e-5)
    assert len(found.next) == 3
    one = complete(net_of(logits), coder, "the value is not", length=LENGTH, tokens=1)
    assert coder.encode(one.text) == [*ids, chain[1]]
    none = complete(net_of(logits), coder, "the value is not", length=LENGTH, tokens=0)
    assert (none.text, none.next[0]) == ("the value is not", pytest.approx(found.next[0], rel=1e-6))


def test_special_tokens_are_never_predicted(coder: Tokeniser) -> None:
    logits = torch.zeros(coder.vocabulary, coder.vocabulary)
    logits[:, [BOS, PAD, UNKNOWN]] = 9.0
    found = complete(net_of(logits), coder, "", length=LENGTH, tokens=3, top=coder.vocabulary)
    assert sum(p for _, p in found.next) == pytest.approx(1.0, abs=1e-4)
    assert {piece for piece, p in found.next if p == 0} == {coder.piece(i) for i in (BOS, PAD, UNKNOWN)}


def test_a_long_text_is_seen_from_its_end(coder: Tokeniser) -> None:
    seen: list[Tensor] = []

    class Watch(Table):
        def forward(self, tokens: Tensor) -> Tensor:
            seen.append(tokens)
            return super().forward(tokens)

    text = "the value of the expression is not always the same as the value of the name"
    net = PCNetwork(Watch(torch.zeros(coder.vocabulary, coder.vocabulary)), output=PCNode("categorical"))
    complete(net, coder, text, length=LENGTH, tokens=1)
    assert seen[0].tolist() == [[BOS, *coder.encode(text)[-(LENGTH - 1) :]]]
