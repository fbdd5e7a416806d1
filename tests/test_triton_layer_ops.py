# SPDX-License-Identifier: MIT
"""The layer ops' Triton kernels against the float64 truth: interpreted without a GPU, compiled with one.

With a GPU test_layer_ops.py and test_energies.py run on this backend as well.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytest.importorskip("triton", minversion="3.6")

pytestmark = pytest.mark.usefixtures("poison", "triton_interpreter")

F32 = torch.float32
SHAPES = [(1, 2), (5, 18), (2, 130), (2, 3, 8)]
RULES = [(name, "euclidean") for name in truth.ENERGIES] + [("categorical", "natural"), ("bernoulli", "natural")]


def _case(name: str, gen: torch.Generator, shape: tuple[int, ...], clamped: bool = False) -> SimpleNamespace:
    make = inputs.target if clamped else inputs.state
    return SimpleNamespace(
        phi=make(name, gen, *shape, dtype=F32),
        mu=inputs.state(name, gen, *shape, dtype=F32),
        lv=inputs.log_var(name, gen, shape[-1], F32),
        feedback=0.1 * inputs.normal(gen, *shape, dtype=F32),
    )


def _mask(gen: torch.Generator, *shape: int) -> Tensor:
    mask = inputs.normal(gen, *shape) > 0
    mask[..., 0] = True
    return mask


def _agrees(got: pck.LayerErrors, node: int, want: truth.Errors, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    pairs = ((got.energy[node], want.energy), (got.grad_phi[node], want.grad_phi), (got.grad_mu[node], want.grad_mu))
    for mine, right in pairs:
        torch.testing.assert_close(mine.double(), right, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_value_and_gradients(name: str, clamped: bool, shape: tuple[int, ...], gen: torch.Generator) -> None:
    case = _case(name, gen, shape, clamped)
    options = {"log_vars": [case.lv], "clamped": [clamped or None]}
    got = pck.layer_errors([case.phi], [case.mu], [name], **options)
    assert [g.dtype for g in (got.energy, *got.grad_phi, *got.grad_mu)] == [F32] * 3
    _agrees(got, 0, truth.errors(name, case.phi, case.mu, case.lv, clamped=clamped))
    assert torch.equal(pck.layer_energies([case.phi], [case.mu], [name], **options), got.energy)


@pytest.mark.parametrize("width", [1, 3, 17, 1025])
@pytest.mark.parametrize("name", [name for name in truth.ENERGIES if name != "gaussian_full"])
def test_odd_widths(name: str, width: int, gen: torch.Generator) -> None:
    case = _case(name, gen, (2, width))
    got = pck.layer_errors([case.phi], [case.mu], [name], log_vars=[case.lv])
    _agrees(got, 0, truth.errors(name, case.phi, case.mu, case.lv))


@pytest.mark.parametrize("kind", ["free", "masked", "probabilities", "indices"])
def test_softmax_rows_wider_than_a_tile(kind: str, gen: torch.Generator) -> None:
    mu = inputs.normal(gen, 2, 9001, dtype=F32)
    phi, mask, clamped = inputs.normal(gen, 2, 9001, dtype=F32), None, kind in ("probabilities", "indices")
    if kind == "masked":
        mask = _mask(gen, 2, 9001)
    if kind == "probabilities":
        phi = inputs.target("categorical", gen, 2, 9001, dtype=F32)
    if kind == "indices":
        phi = torch.tensor([17, 9000])
    got = pck.layer_errors([phi], [mu], ["categorical"], masks=[mask], clamped=[clamped or None])
    _agrees(got, 0, truth.errors("categorical", phi, mu, mask=mask, clamped=clamped))


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_masks(name: str, clamped: bool, shape: tuple[int, ...], gen: torch.Generator) -> None:
    case = _case(name, gen, shape, clamped)
    mask = _mask(gen, *case.phi.shape)
    if clamped and name == "categorical":
        case.phi = case.phi.masked_fill(~mask, 0.0)
    options = {"log_vars": [case.lv], "masks": [mask], "clamped": [clamped or None]}
    got = pck.layer_errors([case.phi], [case.mu], [name], **options)
    _agrees(got, 0, truth.errors(name, case.phi, case.mu, case.lv, mask, clamped=clamped))
    assert not got.grad_phi[0][~mask].any()


@pytest.mark.parametrize("name", [name for name in truth.ENERGIES if name != "gaussian_full"])
def test_a_mask_hides_whatever_stands_there(name: str, gen: torch.Generator) -> None:
    case, mask = _case(name, gen, (3, 6)), _mask(gen, 3, 6)
    plain = pck.layer_errors([case.phi], [case.mu], [name], log_vars=[case.lv], masks=[mask])
    phi, mu = (t.masked_fill(~mask, -math.inf) for t in (case.phi, case.mu))
    got = pck.layer_errors([phi], [mu], [name], log_vars=[case.lv], masks=[mask])
    for a, b in ((got.energy, plain.energy), (got.grad_phi[0], plain.grad_phi[0]), (got.grad_mu[0], plain.grad_mu[0])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_full", "categorical"])
@pytest.mark.parametrize("shape", [(5, 6), (4, 1, 6), (1, 5, 6), (4, 5, 1), (6,)])
def test_broadcast_masks_and_holds(name: str, shape: tuple[int, ...], gen: torch.Generator) -> None:
    case = _case(name, gen, (4, 5, 6))
    mask = inputs.normal(gen, *shape) > -0.5
    if shape[-1] == 1:
        mask[:] = True
    mask[..., 0] = True
    hold = inputs.normal(gen, *shape) > 0.5
    got = pck.layer_errors([case.phi], [case.mu], [name], masks=[mask], clamped=[hold])
    _agrees(got, 0, truth.errors(name, case.phi, case.mu, mask=mask.expand(4, 5, 6), hold=hold))


@pytest.mark.parametrize("shape", [(6,), (5, 1), (5, 6), (1,)])
def test_broadcast_log_variances(shape: tuple[int, ...], gen: torch.Generator) -> None:
    phi, mu, lv = (inputs.normal(gen, *s, dtype=F32) for s in ((4, 5, 6), (4, 5, 6), shape))
    got = pck.layer_errors([phi], [mu], ["gaussian_diag"], log_vars=[lv])
    _agrees(got, 0, truth.errors("gaussian_diag", phi, mu, lv))


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_held_entries(name: str, gen: torch.Generator) -> None:
    case, hold = _case(name, gen, (4, 8)), inputs.normal(gen, 4, 8) > 0
    got = pck.layer_errors([case.phi], [case.mu], [name], log_vars=[case.lv], clamped=[hold])
    _agrees(got, 0, truth.errors(name, case.phi, case.mu, case.lv, hold=hold))
    assert not got.grad_phi[0][hold].any()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_class_indices(shape: tuple[int, ...], gen: torch.Generator) -> None:
    mu = inputs.normal(gen, *shape, dtype=F32)
    index = torch.randint(7, shape[:-1], generator=gen, device="cpu").to(mu.device)
    mask = _mask(gen, *shape).scatter(-1, index.unsqueeze(-1), True)
    for seen in (None, mask):
        got = pck.layer_errors([index], [mu], ["categorical"], masks=[seen], clamped=[True])
        _agrees(got, 0, truth.errors("categorical", index, mu, mask=seen, clamped=True))
        assert got.grad_phi[0].shape == index.shape


@pytest.mark.parametrize("distance", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_relative_accuracy_near_mu(name: str, distance: float, gen: torch.Generator) -> None:
    mu = inputs.state(name, gen, 8, 10, dtype=F32)
    sign = inputs.normal(gen, 8, 10, dtype=F32).sign()
    phi = mu * (1 + distance * sign).abs().clamp_min(1e-2) if name == "categorical_probs" else mu + distance * sign
    lv = torch.zeros(10) if name == "gaussian_diag" else None
    got, want = pck.layer_errors([phi], [mu], [name], log_vars=[lv]), truth.errors(name, phi, mu, lv)
    torch.testing.assert_close(got.energy[0].double(), want.energy, rtol=1e-4, atol=0.0)
    for mine, right in ((got.grad_phi[0], want.grad_phi), (got.grad_mu[0], want.grad_mu)):
        assert ((mine.double() - right).norm(dim=1) / right.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("width", [14, 9002])
@pytest.mark.parametrize("name", [name for name in truth.ENERGIES if name != "gaussian_diag"])
def test_zero_exactly_where_phi_is_mu(name: str, width: int, gen: torch.Generator) -> None:
    mu = inputs.state(name, gen, 2, width, dtype=F32) * (1 if name == "categorical_probs" else 3)
    got = pck.layer_errors([mu.clone()], [mu], [name])
    for value in (got.energy, got.grad_phi[0], got.grad_mu[0]):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson"])
def test_large_values(name: str, clamped: bool, gen: torch.Generator) -> None:
    mu = inputs.normal(gen, 8, 8, dtype=F32).sign() * torch.tensor([80.0, 75, 60, 40, 20, 80, 80, 0.5])
    phi = inputs.target(name, gen, 8, 8, dtype=F32) if clamped else mu.flip(0).roll(1, 1)
    got = pck.layer_errors([phi], [mu], [name], clamped=[clamped or None])
    _agrees(got, 0, truth.errors(name, phi, mu, clamped=clamped), rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_bfloat16(name: str, clamped: bool, gen: torch.Generator) -> None:
    """Float32 arithmetic on the rounded inputs: energies to float32's accuracy, gradients rounded once."""
    case = _case(name, gen, (3, 10), clamped)
    phi, mu = case.phi.bfloat16(), case.mu.bfloat16()
    lv = None if case.lv is None else case.lv.bfloat16()
    got = pck.layer_errors([phi], [mu], [name], log_vars=[lv], clamped=[clamped or None])
    want = truth.errors(name, phi, mu, lv, clamped=clamped)
    assert (got.energy.dtype, got.grad_phi[0].dtype, got.grad_mu[0].dtype) == (F32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(got.energy[0].double(), want.energy, rtol=2e-5, atol=2e-6)
    for mine, right in ((got.grad_phi[0], want.grad_phi), (got.grad_mu[0], want.grad_mu)):
        torch.testing.assert_close(mine.double(), right, rtol=2**-8, atol=1e-5)


def _list_of_nodes(gen: torch.Generator) -> dict:
    """All families, shapes from one to three dimensions, targets, masks and holds among them."""
    shapes = [(4, 2 * i + 2, *([6] if i % 3 == 1 else [])) for i in range(len(truth.ENERGIES))]
    cases = [
        _case(name, gen, shape, i == 3) for i, (name, shape) in enumerate(zip(truth.ENERGIES, shapes, strict=True))
    ]
    clamped: list = [None] * len(cases)
    clamped[3], clamped[7] = True, inputs.normal(gen, *shapes[7]) > 0
    masks = [_mask(gen, *shape) if i in (1, 5) else None for i, shape in enumerate(shapes)]
    return {"cases": cases, "masks": masks, "clamped": clamped}


def _errors_of(nodes: dict) -> pck.LayerErrors:
    phis, mus, lvs = ([getattr(case, key) for case in nodes["cases"]] for key in ("phi", "mu", "lv"))
    options = {"log_vars": lvs, "masks": nodes["masks"], "clamped": nodes["clamped"]}
    return pck.layer_errors(phis, mus, truth.ENERGIES, **options)


def test_all_families_and_shapes_in_one_call(gen: torch.Generator) -> None:
    nodes = _list_of_nodes(gen)
    got = _errors_of(nodes)
    for i, (name, case, mask) in enumerate(zip(truth.ENERGIES, nodes["cases"], nodes["masks"], strict=True)):
        hold = nodes["clamped"][7] if i == 7 else None
        _agrees(got, i, truth.errors(name, case.phi, case.mu, case.lv, mask, hold, i == 3))
    again = _errors_of(nodes)
    assert torch.equal(got.energy, again.energy)


def test_one_launch_for_all_nodes(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of a Triton kernel goes through `run` of Triton's class (interpreted or compiled): counted there."""
    from pc_kernels.backends import triton_layer_kernels as kernels

    launched: list[object] = []
    kind = type(kernels.errors_kernel)
    run = kind.run

    def counted(self: object, *args: object, **options: object) -> object:
        launched.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(kind, "run", counted)
    nodes = _list_of_nodes(gen)
    _errors_of(nodes)
    assert len(launched) == 1
    phis, mus, lvs = ([getattr(case, key) for case in nodes["cases"]] for key in ("phi", "mu", "lv"))
    feedback = [case.feedback for case in nodes["cases"]]
    options = {"log_vars": lvs, "masks": nodes["masks"], "clamped": nodes["clamped"]}
    pck.update_phi_(phis, mus, feedback, truth.ENERGIES, lr=0.1, **options)
    assert len(launched) == 2


# ---------------------------------------------------------------------------------------------------------------------
# update_phi_


def _moved(name: str, rule: str, case: SimpleNamespace, steps: int, momentum: float, still: Tensor | None) -> tuple:
    """phi and velocity after some moves of 0.05 with the same feedback, in float64."""
    phi, velocity = case.phi.double(), torch.zeros(case.phi.shape, dtype=torch.float64)
    for _ in range(steps):
        natural = phi - case.mu.double()
        local = natural if rule == "natural" else truth.errors(name, phi, case.mu, case.lv).grad_phi
        step = local + case.feedback.double()
        velocity = momentum * velocity + (step if still is None else step.masked_fill(still, 0.0))
        phi = phi - 0.05 * velocity
        phi = phi.clamp_min(truth.FLOOR) if name == "categorical_probs" else phi
    return phi, velocity


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4)])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_moves(name: str, rule: str, shape: tuple[int, ...], gen: torch.Generator) -> None:
    case = _case(name, gen, shape)
    want, velocity = _moved(name, rule, case, 3, 0.9, None)
    phi, u, version = case.phi.clone(), torch.zeros_like(case.phi), case.phi._version
    for _ in range(3):
        pck.update_phi_(
            [phi], [case.mu], [case.feedback], [name], lr=0.1, lr_scales=[0.5], momentum=0.9, velocities=[u],
            step_rules=[rule], log_vars=[case.lv],
        )  # fmt: skip
    torch.testing.assert_close(phi.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(u.double(), velocity, rtol=1e-5, atol=5e-6)
    assert phi._version > version


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_held_entries_do_not_move(name: str, rule: str, gen: torch.Generator) -> None:
    case, hold = _case(name, gen, (6, 8)), inputs.normal(gen, 6, 8) > 0.5
    want, _ = _moved(name, rule, case, 1, 0.0, hold)
    phi = case.phi.clone()
    pck.update_phi_(
        [phi], [case.mu], [case.feedback], [name], lr=0.05, step_rules=[rule], log_vars=[case.lv], clamped=[hold]
    )
    torch.testing.assert_close(phi.double(), want, rtol=1e-5, atol=2e-6)
    assert torch.equal(phi[hold], case.phi[hold])


@pytest.mark.parametrize("rule", ["euclidean", "natural"])
def test_masked_entries_do_not_move(rule: str, gen: torch.Generator) -> None:
    case, mask = _case("categorical", gen, (4, 9)), _mask(gen, 4, 9)
    grad = truth.errors("categorical", case.phi, case.mu, mask=mask).grad_phi
    local = case.phi.double() - case.mu.double() if rule == "natural" else grad
    want = torch.where(mask, case.phi.double() - 0.05 * (local + case.feedback.double()), case.phi.double())
    phi = case.phi.clone()
    options = {"lr": 0.05, "step_rules": [rule], "masks": [mask]}
    pck.update_phi_([phi], [case.mu], [case.feedback], ["categorical"], **options)
    torch.testing.assert_close(phi.double(), want, rtol=1e-5, atol=2e-6)


def test_wide_rows_move(gen: torch.Generator) -> None:
    case = _case("categorical", gen, (2, 9001))
    want, _ = _moved("categorical", "euclidean", case, 1, 0.0, None)
    pck.update_phi_([case.phi], [case.mu], [case.feedback], ["categorical"], lr=0.05, step_rules=["euclidean"])
    torch.testing.assert_close(case.phi.double(), want, rtol=1e-5, atol=2e-6)


def test_the_floor_of_categorical_probs() -> None:
    phi, push = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[10.0, 0.0, -1.0]])
    pck.update_phi_([phi], [phi.clone()], [push], ["categorical_probs"], lr=0.1)
    torch.testing.assert_close(phi, torch.tensor([[1e-6, 0.3, 0.3]]), rtol=1e-6, atol=0.0)


def test_bfloat16_moves(gen: torch.Generator) -> None:
    case = _case("laplace", gen, (3, 10))
    case.phi, case.mu, case.feedback = (t.bfloat16() for t in (case.phi, case.mu, case.feedback))
    want, _ = _moved("laplace", "euclidean", case, 1, 0.0, None)
    pck.update_phi_([case.phi], [case.mu], [case.feedback], ["laplace"], lr=0.05)
    assert torch.equal(case.phi, want.float().bfloat16())


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_memory_that_is_not_contiguous(name: str, gen: torch.Generator) -> None:
    case = _case(name, gen, (5, 6))
    storage = torch.full((10, 12), 7.0)
    phi = storage[::2, ::2]
    phi.copy_(case.phi)
    rule = "natural" if name in ("categorical", "bernoulli") else "euclidean"
    mu = case.mu.T.contiguous().T
    got = pck.layer_errors([phi], [mu], [name], log_vars=[case.lv])
    _agrees(got, 0, truth.errors(name, case.phi, mu, case.lv))
    pck.update_phi_([phi], [mu], [case.feedback], [name], lr=0.05, log_vars=[case.lv])
    torch.testing.assert_close(phi.double(), _moved(name, rule, case, 1, 0.0, None)[0], rtol=1e-5, atol=2e-6)
    assert (storage[1::2] == 7.0).all()
    assert (storage[:, 1::2] == 7.0).all()


def test_an_empty_batch_returns_empties() -> None:
    mu = torch.zeros(0, 4)
    got = pck.layer_errors([mu] * 2, [mu] * 2, ["gaussian", "categorical"])
    assert got.energy.shape == (2, 0)
    assert [g.shape for g in (*got.grad_phi, *got.grad_mu)] == [(0, 4)] * 4
    pck.update_phi_([mu], [mu], [None], ["gaussian"], lr=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# who may use it


def test_refusals_say_why(gen: torch.Generator) -> None:
    mu = inputs.normal(gen, 2, 3)
    with pytest.raises(pck.BackendUnavailable, match="float64"):
        pck.layer_energies([mu], [mu], ["gaussian"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the tensors")
def test_auto_never_takes_the_interpreter() -> None:
    from pc_kernels import dispatch

    with pck.use_backend("auto"):
        assert "GPU" in (dispatch.reason("triton", "layer_errors", [torch.zeros(2, 2)]) or "")
