# SPDX-License-Identifier: MIT
"""Every energy family: value and gradients against literal numbers and the float64 truth."""

from __future__ import annotations

import math

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison")

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
LOG_PROBS = ([math.log(0.5)] * 2, [math.log(0.25), math.log(0.75)])  # KL = ln(4/3) / 2
KL = 0.5 * math.log(4 / 3)
FREE_LITERALS = {
    "gaussian": ([1.0, 2.0], [0.0, 0.0], 2.5),
    "gaussian_diag": ([2.0, 0.0], [0.0, 1.0], 0.5 * (1 + LN4 + 1)),  # log_var = [ln 4, 0]
    "gaussian_full": ([1.0, 0.0], [0.0, LN2], 0.5 * (-0.5 + LN2 + 0.5)),
    "categorical": (*LOG_PROBS, KL),
    "categorical_probs": ([1.0, 0.5], [0.5, 0.25], 1.5 * LN2 - 0.75),
    "bernoulli": ([0.0, 0.0], [LN3, 0.0], KL),
    "laplace": ([1.0, 0.0], [0.0, 1.0], 2 / math.e),
    "poisson": ([LN2, 0.0], [0.0, 0.0], 2 * LN2 - 1),
}
CLAMPED_LITERALS = {
    "gaussian": FREE_LITERALS["gaussian"],
    "gaussian_diag": FREE_LITERALS["gaussian_diag"],
    "gaussian_full": ([1.0], [0.0, LN2], 0.5 * (LN2 + 0.5)),
    "categorical": ([0.0, 1.0], LOG_PROBS[1], math.log(4 / 3)),
    "categorical_probs": ([0.0, 1.0], [0.25, 0.5], LN2 - 1 + 0.75),
    "bernoulli": ([1.0, 0.5], [0.0, LN3], LN2 + KL),
    "laplace": FREE_LITERALS["laplace"],
    "poisson": ([2.0, 0.0], [0.0, 0.0], 2 * LN2 - 1 + 1),
}
DTYPES = (torch.float64, torch.float32)


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}


def _agrees(got: pck.LayerErrors, node: int, want: truth.Errors, dtype: torch.dtype) -> None:
    for name, a, b in (
        ("energy", got.energy[node], want.energy),
        ("grad_phi", got.grad_phi[node], want.grad_phi),
        ("grad_mu", got.grad_mu[node], want.grad_mu),
    ):
        assert a.dtype == dtype, name
        torch.testing.assert_close(a.double(), b, **_tolerance(dtype), msg=lambda text, n=name: f"{n}: {text}")


def test_names_are_the_documented_ones() -> None:
    assert pck.ENERGIES == truth.ENERGIES


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_literal_numbers(name: str, clamped: bool, layer_backend: str) -> None:
    phi, mu, value = (CLAMPED_LITERALS if clamped else FREE_LITERALS)[name]
    log_vars = [torch.tensor([LN4, 0.0], dtype=torch.float64)] if name == "gaussian_diag" else None
    phis, mus = [torch.tensor([phi], dtype=torch.float64)], [torch.tensor([mu], dtype=torch.float64)]
    got = pck.layer_energies(phis, mus, [name], log_vars=log_vars, clamped=[True] if clamped else None)
    assert got.shape == (1, 1)
    assert got.item() == pytest.approx(value, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_value_and_gradients(
    name: str, clamped: bool, dtype: torch.dtype, gen: torch.Generator, layer_backend: str
) -> None:
    mu = inputs.state(name, gen, 7, 6, dtype=dtype)
    phi = (inputs.target if clamped else inputs.state)(name, gen, 7, 6, dtype=dtype)
    lv = inputs.log_var(name, gen, 6, dtype)
    options = {"log_vars": [lv], "clamped": [clamped or None]}
    got = pck.layer_errors([phi], [mu], [name], **options)
    _agrees(got, 0, truth.errors(name, phi, mu, lv, clamped=clamped), dtype)
    torch.testing.assert_close(pck.layer_energies([phi], [mu], [name], **options), got.energy)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_autograd_matches_truth(name: str, clamped: bool, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.state(name, gen, 5, 4).requires_grad_()
    phi = (inputs.target if clamped else inputs.state)(name, gen, 5, 4).requires_grad_(not clamped)
    lv = inputs.log_var(name, gen, 4, torch.float64)
    want = truth.errors(name, phi, mu, lv, clamped=clamped)
    leaves = [t.requires_grad_() for t in (mu, None if clamped else phi, lv) if t is not None]
    expected = [g for g in (want.grad_mu, None if clamped else want.grad_phi, want.grad_log_var) if g is not None]
    energy = pck.layer_energies([phi], [mu], [name], log_vars=[lv], clamped=[clamped or None])
    for got, right in zip(torch.autograd.grad(energy.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_gradcheck(name: str, clamped: bool, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.state(name, gen, 3, 4).requires_grad_()
    phi = (inputs.target if clamped else inputs.state)(name, gen, 3, 4).requires_grad_(not clamped)
    lv = torch.tensor([0.3, -0.2, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    log_vars = [lv] if name == "gaussian_diag" else [None]

    def energies(*_: Tensor) -> Tensor:
        return pck.layer_energies([phi], [mu], [name], log_vars=log_vars, clamped=[clamped or None])

    leaves = [t for t in (phi, mu, log_vars[0]) if t is not None and t.requires_grad]
    assert torch.autograd.gradcheck(energies, leaves)


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_float32_keeps_relative_accuracy_near_mu(
    name: str, distance: float, gen: torch.Generator, layer_backend: str
) -> None:
    mu = inputs.state(name, gen, 32, 10, dtype=torch.float32)
    sign = inputs.normal(gen, 32, 10, dtype=torch.float32).sign()
    phi = mu * (1 + distance * sign).abs().clamp_min(1e-2) if name == "categorical_probs" else mu + distance * sign
    lv = torch.zeros(10) if name == "gaussian_diag" else None  # a constant would hide the quadratic part
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv])
    want = truth.errors(name, phi, mu, lv)
    torch.testing.assert_close(got.energy[0].double(), want.energy, rtol=1e-4, atol=0.0)
    for mine, right in ((got.grad_phi[0], want.grad_phi), (got.grad_mu[0], want.grad_mu)):
        error = (mine.double() - right).norm(dim=1) / right.norm(dim=1)
        assert error.max() < 1e-4, error.max()


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", [name for name in truth.ENERGIES if name != "categorical"])
def test_each_term_keeps_relative_accuracy(
    name: str, distance: float, gen: torch.Generator, layer_backend: str
) -> None:
    """One entry a sample, so that no large term hides the error of a small one; of gaussian_full the variance's."""
    mu = 0.5 + 0.2 * inputs.normal(gen, 64, 1, dtype=torch.float32).abs()
    phi = mu + distance * inputs.normal(gen, 64, 1, dtype=torch.float32).sign()
    if name == "gaussian_full":
        phi, mu = (torch.cat([torch.ones_like(t), t], 1) for t in (phi, mu))
    lv = torch.zeros(1) if name == "gaussian_diag" else None
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv])
    want = truth.errors(name, phi, mu, lv)
    for mine, right in ((got.energy[0], want.energy), (got.grad_phi[0], want.grad_phi), (got.grad_mu[0], want.grad_mu)):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("clamped", [False, True])
def test_saturated_probabilities_keep_relative_accuracy(clamped: bool, layer_backend: str) -> None:
    """sig(mu) - sig(phi) where both are nearly 1 (or 0), one entry a sample."""
    mu = torch.tensor([15.0, 17, 12, -15, -17, 30, -30, 3]).unsqueeze(1)
    free = mu + torch.tensor([1.0, 1, -2, 1, -1, 4, 4, -6]).unsqueeze(1)
    phi = (mu > 0).float() if clamped else free
    got = pck.layer_errors([phi], [mu], ["bernoulli"], clamped=[clamped or None])
    want = truth.errors("bernoulli", phi, mu, clamped=clamped)
    torch.testing.assert_close(got.grad_mu[0].double(), want.grad_mu, rtol=1e-5, atol=1e-14)  # the truth's own digits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_zero_exactly_where_phi_is_mu(name: str, dtype: torch.dtype, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.state(name, gen, 9, 14, dtype=dtype) * (1 if name == "categorical_probs" else 3)
    lv = inputs.log_var(name, gen, 14, dtype)
    got = pck.layer_errors([mu.clone()], [mu], [name], log_vars=[lv])
    constant = 0.0 if lv is None else 0.5 * lv.double().sum().item()
    if lv is None:
        assert torch.equal(got.energy, torch.zeros_like(got.energy))
    torch.testing.assert_close(
        got.energy.double(), torch.full((1, 9), constant, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(got.grad_phi[0], torch.zeros_like(mu))
    assert torch.equal(got.grad_mu[0], torch.zeros_like(mu))


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson"])
def test_large_values(name: str, clamped: bool, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.normal(gen, 16, 8, dtype=torch.float32).sign() * torch.tensor([80.0, 75, 60, 40, 20, 80, 80, 0.5])
    free = mu.flip(0).roll(1, 1)
    phi = inputs.target(name, gen, 16, 8, dtype=torch.float32) if clamped else free
    got = pck.layer_errors([phi], [mu], [name], clamped=[clamped or None])
    want = truth.errors(name, phi, mu, clamped=clamped)
    for mine, right in ((got.energy[0], want.energy), (got.grad_phi[0], want.grad_phi), (got.grad_mu[0], want.grad_mu)):
        torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=5e-5)  # 160 * 2.6 eps


@pytest.mark.parametrize("shift", [-1024.0, 32.0, 1024.0])
def test_categorical_ignores_a_shift_of_the_logits(shift: float, gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = ((inputs.normal(gen, 6, 11) * 256).round() / 256 for _ in range(2))
    phi, mu = phi.float(), mu.float()  # multiples of 1/256: the shift adds no rounding
    plain = pck.layer_errors([phi, mu], [mu, mu], ["categorical"] * 2)
    moved = pck.layer_errors([phi + shift, mu + shift], [mu, mu], ["categorical"] * 2)
    torch.testing.assert_close(moved.energy[0], plain.energy[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(moved.grad_phi[0], plain.grad_phi[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved.grad_mu[0], plain.grad_mu[0], rtol=1e-4, atol=1e-7)
    assert moved.energy[1].abs().max() < 1e-9
    assert moved.grad_phi[1].abs().max() < 1e-6


def _mask(gen: torch.Generator, *shape: int) -> Tensor:
    """Random, with one entry always visible, and a first row of exactly one visible entry."""
    mask = inputs.normal(gen, *shape) > 0
    mask[..., 0] = True
    mask[0] = False
    mask[0, ..., -1] = True
    return mask


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_masks(name: str, clamped: bool, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.state(name, gen, 6, 8)
    phi = (inputs.target if clamped else inputs.state)(name, gen, 6, 8)
    mask = _mask(gen, *phi.shape)
    if clamped and name == "categorical":
        phi = phi.masked_fill(~mask, 0.0)
    lv = inputs.log_var(name, gen, 8, torch.float64)
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv], masks=[mask], clamped=[clamped or None])
    _agrees(got, 0, truth.errors(name, phi, mu, lv, mask, clamped=clamped), torch.float64)
    assert not got.grad_phi[0][~mask].any()
    if name != "gaussian_full":
        assert not got.grad_mu[0][~mask].any()


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_a_mask_hides_whatever_stands_there(name: str, gen: torch.Generator, layer_backend: str) -> None:
    """Attention scores come with -inf where they are masked: still an exact zero, never -inf minus -inf. An entry of
    gaussian_full's mu belongs to two terms, one of which may be visible."""
    phi, mu = inputs.state(name, gen, 4, 6), inputs.state(name, gen, 4, 6)
    mask, lv = _mask(gen, 4, 6), inputs.log_var(name, gen, 6, torch.float64)
    plain = pck.layer_errors([phi], [mu], [name], log_vars=[lv], masks=[mask])
    hidden = [phi.masked_fill(~mask, -math.inf), mu if name == "gaussian_full" else mu.masked_fill(~mask, -math.inf)]
    got = pck.layer_errors(hidden[:1], hidden[1:], [name], log_vars=[lv], masks=[mask])
    for a, b in zip(
        (got.energy, *got.grad_phi, *got.grad_mu), (plain.energy, *plain.grad_phi, *plain.grad_mu), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_visible_class_has_no_energy(gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.normal(gen, 3, 5), inputs.normal(gen, 3, 5)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 2] = True
    got = pck.layer_errors([phi], [mu], ["categorical"], masks=[mask])
    for value in (got.energy, got.grad_phi[0], got.grad_mu[0]):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_held_entries_keep_their_energy_and_do_not_move(name: str, gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.state(name, gen, 6, 8), inputs.state(name, gen, 6, 8)
    hold, lv = inputs.normal(gen, 6, 8) > 0, inputs.log_var(name, gen, 8, torch.float64)
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv], clamped=[hold])
    _agrees(got, 0, truth.errors(name, phi, mu, lv, hold=hold), torch.float64)
    free = pck.layer_errors([phi], [mu], [name], log_vars=[lv])
    assert torch.equal(got.energy, free.energy)
    assert torch.equal(got.grad_mu[0], free.grad_mu[0])
    assert torch.equal(got.grad_phi[0], free.grad_phi[0].masked_fill(hold, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_index_targets_are_one_hot_targets(dtype: torch.dtype, gen: torch.Generator, layer_backend: str) -> None:
    mu = inputs.normal(gen, 5, 7, dtype=dtype)
    index = torch.tensor([0, 6, 3, 3, 1])
    by_index = pck.layer_errors([index], [mu], ["categorical"], clamped=[True])
    one_hot = torch.nn.functional.one_hot(index, 7).to(dtype)
    by_probs = pck.layer_errors([one_hot], [mu], ["categorical"], clamped=[True])
    _agrees(by_probs, 0, truth.errors("categorical", one_hot, mu, clamped=True), dtype)
    torch.testing.assert_close(by_index.energy, by_probs.energy, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(by_index.grad_mu[0], by_probs.grad_mu[0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["categorical", "categorical_probs", "bernoulli", "poisson"])
def test_zeros_in_targets_add_nothing(name: str, layer_backend: str) -> None:
    mu = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    got = pck.layer_errors([target], [mu], [name], clamped=[True])
    _agrees(got, 0, truth.errors(name, target, mu, clamped=True), torch.float64)


def test_a_categorical_target_that_does_not_sum_to_one(gen: torch.Generator, layer_backend: str) -> None:
    """grad_mu = q * sum(o) - o."""
    mu, target = inputs.normal(gen, 4, 5), inputs.target("categorical", gen, 4, 5) * 3
    got = pck.layer_errors([target], [mu], ["categorical"], clamped=[True])
    _agrees(got, 0, truth.errors("categorical", target, mu, clamped=True), torch.float64)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_trailing_dimensions(name: str, gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.state(name, gen, 3, 5, 4), inputs.state(name, gen, 3, 5, 4)
    lv, mask = inputs.log_var(name, gen, 4, torch.float64), _mask(gen, 3, 5, 4)
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv], masks=[mask])
    _agrees(got, 0, truth.errors(name, phi, mu, lv, mask), torch.float64)
    assert got.grad_phi[0].shape == got.grad_mu[0].shape == (3, 5, 4)


def test_a_mask_is_broadcast(gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.normal(gen, 3, 4, 5), inputs.normal(gen, 3, 4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool).tril()  # causal
    for name in ("categorical", "gaussian"):
        got = pck.layer_errors([phi], [mu], [name], masks=[mask])
        _agrees(got, 0, truth.errors(name, phi, mu, mask=mask), torch.float64)


@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_a_mask_is_broadcast_over_a_pair(shape: tuple[int, ...], gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    got = pck.layer_errors([phi], [mu], ["gaussian_full"], masks=[torch.ones(shape, dtype=torch.bool)])
    _agrees(got, 0, truth.errors("gaussian_full", phi, mu), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_families_and_shapes_in_one_call(dtype: torch.dtype, gen: torch.Generator, layer_backend: str) -> None:
    shapes = [(4, 2 * i + 2, *([6] if i % 3 == 1 else [])) for i in range(len(truth.ENERGIES))]
    mus = [inputs.state(n, gen, *s, dtype=dtype) for n, s in zip(truth.ENERGIES, shapes, strict=True)]
    phis = [inputs.state(n, gen, *s, dtype=dtype) for n, s in zip(truth.ENERGIES, shapes, strict=True)]
    lvs = [inputs.log_var(n, gen, s[-1], dtype) for n, s in zip(truth.ENERGIES, shapes, strict=True)]
    clamped: list = [None] * len(shapes)
    clamped[3], phis[3] = True, inputs.target("categorical", gen, *shapes[3], dtype=dtype)
    clamped[7] = inputs.normal(gen, *shapes[7]) > 0
    masks = [_mask(gen, *s) if i in (1, 5) else None for i, s in enumerate(shapes)]
    got = pck.layer_errors(phis, mus, truth.ENERGIES, log_vars=lvs, masks=masks, clamped=clamped)
    assert got.energy.shape == (8, 4)
    for i, name in enumerate(truth.ENERGIES):
        hold = clamped[7] if i == 7 else None
        _agrees(got, i, truth.errors(name, phis[i], mus[i], lvs[i], masks[i], hold, i == 3), dtype)
