# SPDX-License-Identifier: MIT
"""The variational autoencoder: against float64 autograd, the fused path against the generic one, its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
import truth
from pc_runner import PCNetwork
from pc_runner.config import ConfigError, VaeConfig
from pc_runner.data import Images, load_images
from pc_runner.models.vae import build, losses, vae_of
from pc_runner.train import Interrupted, train
from pc_runner.vae_run import TEST_SEED, VaeRun, drawn, quantiles
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

PRIORS = (0.0, 0.6)
OUTPUTS = ("gaussian", "bernoulli")
STEPS, LR = 9, 0.07
TIMES = ("ms_per_step", "seconds")
Problem = tuple[PCNetwork, Tensor, Tensor]


def _problem(output: str, prior: float, gen: torch.Generator) -> Problem:
    """A small autoencoder in float64, images and noise."""
    net = build(7, (6, 5), 3, prior, output, seed=3).double()
    x = inputs.normal(gen, 5, 7).sigmoid()
    return net, x, inputs.normal(gen, 5, 3)


def _nodes(net: PCNetwork, output: str, prior: float) -> list[truth.Node]:
    """The same network in the truth's words."""
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    last = ("identity", output) if output == "bernoulli" else ("sigmoid", output)
    kinds = [*[("hardtanh", "gaussian")] * 2, ("identity", "gaussian_full"), *[("hardtanh", "gaussian")] * 2, last]
    return [
        truth.Node(linear.weight, linear.bias, act, energy, prior=prior if energy == "gaussian_full" else 0.0)
        for linear, (act, energy) in zip(linears, kinds, strict=True)
    ]


def _close(got: Tensor | None, want: Tensor | None) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def _gradients(net: PCNetwork, result: Any) -> list[Tensor]:
    net.zero_grad()
    net.backward(result)
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_states_energies_and_gradients_against_autograd(output: str, prior: float, gen: torch.Generator) -> None:
    net, x, noise = _problem(output, prior, gen)
    want = truth.infer(_nodes(net, output, prior), x, target=x, steps=STEPS, lr=LR, noise=noise)
    fused = net.infer(x, x, steps=STEPS, lr=LR, noise=noise)
    generic = net.infer(x, x, steps=STEPS, lr=[LR] * STEPS, noise=noise)  # one lr per move: not in pck.infer
    assert fused.backend == "cpp"
    assert generic.backend == "traced"
    moved = truth.infer(_nodes(net, output, prior), x, target=x, steps=0, noise=noise)
    for result in (fused, generic):
        for got, right, start in zip(result.phis[:-1], want.phis[:-1], moved.phis[:-1], strict=True):
            _close(got, right)
            assert not torch.equal(right, start)
        _close(result.energy, want.energy)
        grads = iter(_gradients(net, result))
        for layer in want.grads:
            for name in ("weight", "bias"):
                part = layer[name]
                assert part is not None  # every layer has both
                _close(next(grads), part / len(x))
    assert fused.inference is not None  # of every chain
    for got, right in zip(fused.inference.deltas, want.deltas, strict=True):
        _close(got, right)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_backpropagation_twin(output: str, prior: float, gen: torch.Generator) -> None:
    """Its loss and gradients are those of torch's own operations, and `losses` is that loss."""
    net, x, noise = _problem(output, prior, gen)
    mine = _gradients(net, net.infer(x, x, algorithm="bp", noise=noise))
    module = vae_of(net)
    u, s = module.encoder(x).chunk(2, -1)
    a = module.decoder(u + (0.5 * s).exp() * noise)
    if output == "gaussian":
        errors = 0.5 * (a.sigmoid() - x).square()
    else:
        entropy = -torch.xlogy(x, x) - torch.xlogy(1 - x, 1 - x)
        errors = nn.functional.binary_cross_entropy_with_logits(a, x, reduction="none") - entropy
    posterior = torch.distributions.Normal(u, (0.5 * s).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    loss = errors.sum(1).mean() + prior * kl
    for got, want in zip(mine, torch.autograd.grad(loss, list(net.parameters())), strict=True):
        _close(got, want)
    found = losses(net, x, noise, chunk=2)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    assert found.kl == pytest.approx(kl.item(), rel=1e-9)
    assert found.loss == pytest.approx(found.reconstruction + prior * found.kl, rel=1e-9)


@pytest.mark.parametrize("settings", [{"momentum": 0.5}, {"tol": 0.3}])
def test_a_prior_on_the_generic_path(settings: dict[str, float], gen: torch.Generator) -> None:
    net, x, noise = _problem("gaussian", 0.6, gen)
    one, other = (net.infer(x, x, steps=STEPS, noise=noise, lr=lr, **settings) for lr in (LR, [LR] * STEPS))
    assert one.backend != other.backend
    assert one.steps == other.steps
    for a, b in zip(one.phis, other.phis, strict=True):
        _close(a, b)


def test_a_prior_and_adam(gen: torch.Generator) -> None:
    """Adam's first move is lr along the gradient's sign, the prior's part included: only that is there at first."""
    net, x, noise = _problem("gaussian", 0.6, gen)
    start, plain, adam = (
        net.infer(x, x, noise=noise, **how).phis[2]
        for how in ({"steps": 0}, {"steps": 1, "lr": 0.01}, {"steps": 1, "lr": 0.01, "state_optimizer": "adam"})
    )
    assert (plain != start).all()
    torch.testing.assert_close(adam - start, 0.01 * (plain - start).sign(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("algorithm", ["zil", "fixed_prediction"])
def test_algorithms_that_know_no_prior(algorithm: str, gen: torch.Generator) -> None:
    net, x, noise = _problem("gaussian", 0.6, gen)
    with pytest.raises(ValueError, match=r"bottleneck.*prior"):
        net.infer(x, x, algorithm=algorithm, noise=noise)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits", limit=300)


def _config(**settings: Any) -> VaeConfig:
    return VaeConfig(**{"epochs": 2, "steps": 8, "theta_lr": 1e-3, **settings})


@pytest.mark.parametrize("method", ["bp", "pc_fkl"])
def test_a_run_that_stops_goes_on_to_the_same_bits(method: str, digits: Images, tmp_path: Path) -> None:
    config = _config(method=method)
    whole = train(VaeRun, config, digits, tmp_path / "whole")
    count = 0

    def soon() -> bool:
        nonlocal count
        count += 1
        return count == 7  # in the second epoch

    with pytest.raises(Interrupted):
        train(VaeRun, config, digits, tmp_path / "parts", stop=soon)
    torch.manual_seed(99)  # the noise depends on no global state
    again = train(VaeRun, config, digits, tmp_path / "parts", resume=True)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name]), name
    figures = [[{k: v for k, v in row.items() if k not in TIMES} for row in run.rows] for run in (whole, again)]
    assert figures[0] == figures[1]
    assert whole.rows[1]["test_loss"] < whole.rows[0]["test_loss"]


def test_the_noise_differs_between_epochs_seeds_and_images() -> None:
    one = drawn(50, 16, 0, 0)
    assert not any(torch.equal(one, drawn(50, 16, *other)) for other in ((0, 1), (1, 0), (TEST_SEED, 0)))
    assert len(one.unique()) == one.numel()


def test_quantiles_are_those_of_the_sorted_entries() -> None:
    values = torch.arange(101.0)[torch.randperm(101)].view(1, -1)
    assert quantiles(values) == [0.0, 5.0, 25.0, 50.0, 75.0, 95.0, 100.0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"model": "m1"}, "model"), ({"method": "pc_f"}, "method"), ({"output": "laplace"}, "output"),
     ({"latent": 0}, "latent"), ({"prior": -1.0}, "prior")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        VaeConfig(**settings)
