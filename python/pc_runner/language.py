# SPDX-License-Identifier: MIT
"""What a trained language model is asked for: its perplexity, and how a text goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pc_runner.network import PCNetwork
from pc_runner.tokens import BOS, EOS, PAD, UNKNOWN, Samples, Tokeniser

PERPLEXITY = (
    "perplexity per token: exp of the mean of -ln q(next token) by the feed-forward pass, over all targets that are no "
    "padding, the end of each sentence that was not cut among them"
)


@torch.no_grad()
def perplexity(net: PCNetwork, samples: Samples, chunk: int = 64) -> float:
    """The figure that `PERPLEXITY` defines; infinite where it is beyond a float."""
    total, count = 0.0, 0
    for first in range(0, len(samples), chunk):
        part = slice(first, first + chunk)
        rows = samples.mask[part]
        logits = net(samples.inputs[part])[rows]
        total += float(F.cross_entropy(logits, samples.targets[part][rows], reduction="sum"))
        count += len(logits)
    mean = total / max(count, 1)
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Completion:
    """text: the most probable continuation, token by token. next: (piece, probability) of the likeliest next tokens."""

    text: str
    next: list[tuple[str, float]]


@torch.no_grad()
def complete(
    net: PCNetwork, tokeniser: Tokeniser, text: str, *, length: int, tokens: int = 12, top: int = 5
) -> Completion:
    """How `text` goes on. length: places of the model's input; a longer text is seen from its last length - 1 tokens.

    tokens: at most how many to add; a sentence that ends, ends it. top: how many candidates of the next token to list.
    Padding, the start of a sentence and the unknown token are never predicted; the probabilities are over the rest.
    """
    candidates: list[tuple[str, float]] = []
    ids = tokeniser.encode(text)
    for _ in range(max(tokens, 1)):
        inputs, place = tokeniser.prompt(ids, length)
        logits = net(inputs)[0, place]
        logits[[BOS, PAD, UNKNOWN]] = -torch.inf
        q = logits.softmax(-1)
        if not candidates:
            best = q.topk(min(top, len(q)))
            candidates = [(tokeniser.piece(int(i)), float(p)) for p, i in zip(*best, strict=True)]
        token = int(q.argmax())
        if token == EOS or not tokens:
            break
        ids.append(token)
    return Completion(tokeniser.decode(ids), candidates)
