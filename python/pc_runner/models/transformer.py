# SPDX-License-Identifier: MIT
"""The language model of the paper's section 4.3: BERT's block with a causal mask, value nodes where it puts them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pc_runner.config import METHODS
from pc_runner.network import PCNetwork, PCNode


class Attention(nn.Module):
    """Causal self-attention (B, T, H) -> (B, T, H). Its node holds the scores (B, heads, T, T).

    softmax: "categorical": logits after 1/sqrt(d), masked, KL energy. "gaussian": their softmax, squared error (PC_F).
    projections: Gaussian nodes on Q, K, V and on the output, too.
    """

    causal: Tensor

    def __init__(self, hidden: int, heads: int, tokens: int, softmax: str, step: str | None, projections: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.register_buffer("causal", torch.ones(tokens, tokens, dtype=torch.bool).tril(), persistent=False)
        self.scores = PCNode(softmax, step=step, mask=self.causal)
        self.q, self.k, self.v, self.o = (PCNode("gaussian") if projections else nn.Identity() for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            node(linear(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, node in ((self.query, self.q), (self.key, self.k), (self.value, self.v))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.scores.energy == "gaussian":
            scores = scores.masked_fill(~self.causal, -torch.inf).softmax(-1)
        return self.o(self.out((self.scores(scores) @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a tanh network of two layers, each added to its input and normalised (post-norm, as in BERT)."""

    def __init__(self, hidden: int, intermediate: int, attention: Attention):
        super().__init__()
        self.attention = attention
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
        self.intermediate = PCNode("gaussian")
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm1(h + self.attention(h))
        return self.norm2(h + self.down(self.intermediate(torch.tanh(self.up(h)))))


class Transformer(nn.Module):
    """Tokens (B, T) int64 -> logits of the next token (B, T, vocabulary); T is `tokens`, shorter texts are padded.

    Learned positions; LayerNorm on the embeddings; `blocks` blocks; the head transform LayerNorm(tanh(linear)), whose
    tanh is a node; the decoder, whose weight is the embedding's where `tied`.
    softmax, step, projections: as in `Attention`.
    """

    def __init__(
        self, vocabulary: int, tokens: int = 32, hidden: int = 128, blocks: int = 1, heads: int = 1,
        intermediate: int = 512, tied: bool = False, softmax: str = "categorical", step: str | None = None,
        projections: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, hidden), nn.Embedding(tokens, hidden)
        self.norm, self.head_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, intermediate, Attention(hidden, heads, tokens, softmax, step, projections))
            for _ in range(blocks)
        )
        self.transform, self.head = nn.Linear(hidden, hidden), PCNode("gaussian")
        self.decoder = nn.Linear(hidden, vocabulary)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)  # BERT's
        if tied:
            self.decoder.weight = self.embedding.weight

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T, hidden): what the decoder makes logits of."""
        h = self.norm(self.embedding(tokens) + self.position.weight)
        for block in self.blocks:
            h = block(h)
        return self.head_norm(self.head(torch.tanh(self.transform(h))))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.features(tokens))


def build(method: str, vocabulary: int, seed: int = 0, **shape: object) -> PCNetwork:
    """The language model (B, T) -> (B, T, vocabulary) as `method` trains it: `METHODS`' keys for a softmax.

    shape: of `Transformer`. seed: of the weights, which are the same for every method; the global generator stays as it
    was. Decoder, softmax and the output's energy are one operator: PC_F's squared error, else the KL.
    """
    kind = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Transformer(vocabulary, softmax=kind.softmax, step=kind.step, **shape)  # type: ignore[arg-type]
    return PCNetwork(module, output=PCNode(kind.softmax, linear="decoder"))
