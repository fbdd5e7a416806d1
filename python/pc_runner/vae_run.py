# SPDX-License-Identifier: MIT
"""Training runs of the variational autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc_runner.config import VAES, VaeConfig
from pc_runner.data import Images
from pc_runner.models.vae import build, losses, vae_of
from pc_runner.network import PCNetwork
from pc_runner.train import Row, Run

TEST_SEED = 12345  # of the noise that the test loss is taken with, one draw per test image, the same for every run
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class VaeRun(Run):
    """A run on images, whose labels play no part.

    `evaluate` gives test_loss and its parts reconstruction and kl (`models.vae.losses`, fixed noise), and the
    `QUANTILES` of all posterior variances of the test images, variances.
    """

    config: VaeConfig
    data: Images
    figures = ("test_loss", "reconstruction", "kl", "variances")

    def make_net(self) -> PCNetwork:
        self._noise: tuple[int, Tensor] | None = None
        return build_vae(self.config, self.data.x_train.shape[1])

    def __len__(self) -> int:
        return len(self.data.x_train)

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x = self.data.x_train[index]
        return x, x, {"noise": self.noise()[index]}

    def noise(self) -> Tensor:
        """One draw per training image, a function of (seed, epoch) alone: a resumed run and several processes see the
        same."""
        if self._noise is None or self._noise[0] != self.epoch:
            self._noise = self.epoch, drawn(len(self), self.config.latent, self.config.seed, self.epoch)
        return self._noise[1]

    def evaluate(self) -> Row:
        return losses_and_variances(self.net, self.data.x_test, self.config.latent)


def losses_and_variances(net: PCNetwork, x: Tensor, latent: int) -> Row:
    """What `VaeRun.evaluate` gives, of images (B, P)."""
    found = losses(net, x, drawn(len(x), latent, TEST_SEED, 0))
    parts = {"test_loss": found.loss, "reconstruction": found.reconstruction, "kl": found.kl}
    return {**parts, "variances": quantiles(variances(net, x))}


def build_vae(config: VaeConfig, pixels: int) -> PCNetwork:
    """The network of a configuration."""
    return build(pixels, VAES[config.model].hidden, config.latent, config.prior, config.output, config.seed)


def drawn(count: int, latent: int, seed: int, epoch: int) -> Tensor:
    """Standard normal numbers (count, latent), the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randn(count, latent, generator=generator)


@torch.no_grad()
def variances(net: PCNetwork, x: Tensor) -> Tensor:
    """Posterior variances e^s (B, latent) of images (B, P)."""
    return vae_of(net).posterior(x)[1].exp()


def quantiles(values: Tensor) -> list[float]:
    """The `QUANTILES` of all entries."""
    ordered = values.flatten().double().sort().values  # torch.quantile has a limit of 16 million entries
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES]


def loss_line(row: Row) -> str:
    """The test loss and its parts."""
    return f"test loss {row['test_loss']:.3f} (reconstruction {row['reconstruction']:.3f}, KL {row['kl']:.3f})"
