# SPDX-License-Identifier: MIT
"""The variational autoencoder of the paper's section 4.2: its bottleneck has an input-dependent variance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pc_runner.network import PCNetwork
from pc_runner.node import PCNode

BOTTLENECK = "bottleneck"  # the sampled node's name


class VAE(nn.Module):
    """Images (B, P) in [0, 1] -> what the output node predicts, (B, P): pixels, or their logits where `bernoulli`.

    Linear layers with hardtanh and a Gaussian node behind each; the bottleneck is a `gaussian_full` node (B, 2 latent)
    of means u and log variances s, which feeds on its sample z = u + e^(s/2) n.

    hidden: widths from the image to the bottleneck; the decoder has them in reverse. prior: the weight w of
    KL(N(u, e^s) || N(0, I)). bernoulli: the last layer's result is the pixels' logits, with no sigmoid behind it.
    """

    def __init__(self, pixels: int, hidden: Sequence[int], latent: int, prior: float, bernoulli: bool):
        super().__init__()
        self.encoder = _stack([pixels, *hidden], 2 * latent)
        self.bottleneck = PCNode("gaussian_full", prior=prior)
        self.decoder = _stack([latent, *reversed(hidden)], pixels)
        self.link = nn.Identity() if bernoulli else nn.Sigmoid()
        self.latent = latent

    def forward(self, x: Tensor) -> Tensor:
        return self.link(self.decoder(self.bottleneck(self.encoder(x))))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances (B, latent) of an image's code."""
        u, s = self.encoder(x).chunk(2, -1)
        return u, s

    def decode(self, z: Tensor) -> Tensor:
        """Codes (B, latent) -> pixels (B, P) in [0, 1]."""
        return torch.sigmoid(self.decoder(z))


def _stack(widths: Sequence[int], out: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        modules += [nn.Linear(narrow, wide), nn.Hardtanh(), PCNode("gaussian")]
    return nn.Sequential(*modules, nn.Linear(widths[-1], out))


def build(
    pixels: int, hidden: Sequence[int], latent: int = 16, prior: float = 0.0, output: str = "gaussian", seed: int = 0
) -> PCNetwork:
    """The network whose target is its input, `net.infer(x, x, noise=n)`, n (B, latent) drawn once per sample.

    output: "gaussian" (squared error of the pixels, half their sum) or "bernoulli" (cross-entropy less the pixels' own
    entropy). seed: of the weights; the global generator stays as it was. With algorithm="bp" the same network is the
    backpropagation twin: its loss is F at the feed-forward states.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VAE(pixels, hidden, latent, prior, output == "bernoulli")
    return PCNetwork(module, output=PCNode(output))


class Losses(NamedTuple):
    """Means over images, in nats. loss = reconstruction + w kl."""

    loss: float
    reconstruction: float
    kl: float


@torch.no_grad()
def losses(net: PCNetwork, x: Tensor, noise: Tensor, chunk: int = 2000) -> Losses:
    """THE loss of a network, BP's and PC's alike: F at the feed-forward states with the posterior sample that `noise`
    (B, latent) draws, that is the output's energy plus w KL(N(u, e^s) || N(0, I)). kl is counted also where w is 0."""
    module = vae_of(net)
    total = torch.zeros(3, dtype=torch.float64)
    for a, n in zip(x.split(chunk), noise.split(chunk), strict=True):
        energy = net.infer(a, a, algorithm="bp", noise=n).energy
        assert energy is not None  # traced
        u, s = module.posterior(a)
        kl = 0.5 * (torch.expm1(s) - s + u * u).double().sum(1).mean()
        total += len(a) * torch.stack([energy.double().sum(), energy[0, -1].double(), kl])
    return Losses(*(total / max(len(x), 1)).tolist())


def vae_of(net: PCNetwork) -> VAE:
    """The module of a network that `build` made."""
    return cast("VAE", net.module)
