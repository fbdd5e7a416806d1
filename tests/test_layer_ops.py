# SPDX-License-Identifier: MIT
"""layer_errors and update_phi_ as operations: lists, shapes, memory, backends. Formulas: test_energies."""

from __future__ import annotations

import inputs
import pytest
import torch
import truth
from conftest import LAYER_BACKENDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison")

RULES = [(name, rule) for name in truth.ENERGIES for rule in ("euclidean", "natural")]
RULES = [(name, rule) for name, rule in RULES if rule == "euclidean" or name in ("categorical", "bernoulli")]
DTYPES = (torch.float64, torch.float32)


def _case(name: str, gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict:
    return {
        "phi": inputs.state(name, gen, *shape, dtype=dtype),
        "mu": inputs.state(name, gen, *shape, dtype=dtype),
        "feedback": 0.1 * inputs.normal(gen, *shape, dtype=dtype),
        "lv": inputs.log_var(name, gen, shape[-1], dtype),
    }


def _direction(name: str, rule: str, phi: Tensor, case: dict, mask: Tensor | None, hold: Tensor | None) -> Tensor:
    feedback = 0.0 if case["feedback"] is None else case["feedback"].double()
    if rule == "natural":
        local = phi.double() - case["mu"].double()
    else:
        local = truth.errors(name, phi, case["mu"], case["lv"], mask).grad_phi
    step = local + feedback
    for still in (None if mask is None else ~mask, hold):
        step = step if still is None else step.masked_fill(still.expand_as(step), 0.0)
    return step


def _moved(
    name: str, rule: str, case: dict, steps: int, lr: float, momentum: float, mask=None, hold=None
) -> tuple[Tensor, Tensor]:
    """phi and velocity after some updates with the same feedback, in float64."""
    phi, velocity = case["phi"].double(), torch.zeros(case["phi"].shape, dtype=torch.float64)
    for _ in range(steps):
        velocity = momentum * velocity + _direction(name, rule, phi, case, mask, hold)
        phi = phi - lr * velocity
        phi = phi.clamp_min(truth.FLOOR) if name == "categorical_probs" else phi
    return phi, velocity


def _close(got: Tensor, want: Tensor) -> None:
    tight = got.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-11 if tight else 1e-5, atol=1e-12 if tight else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_update_is_the_step_of_the_spec(
    name: str, rule: str, fed: bool, dtype: torch.dtype, gen: torch.Generator, layer_backend: str
) -> None:
    case = _case(name, gen, (5, 6), dtype)
    case["feedback"] = case["feedback"] if fed else None
    want, _ = _moved(name, rule, case, 1, 0.05, 0.0)
    phi = case["phi"].clone()
    out = pck.update_phi_(
        [phi], [case["mu"]], [case["feedback"]], [name], lr=0.05, step_rules=[rule], log_vars=[case["lv"]]
    )
    assert out is None
    _close(phi, want)
    assert not torch.equal(phi, case["phi"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_momentum_keeps_its_velocity(
    name: str, rule: str, dtype: torch.dtype, gen: torch.Generator, layer_backend: str
) -> None:
    case = _case(name, gen, (4, 6), dtype)
    want, velocity = _moved(name, rule, case, 3, 0.05, 0.9)
    phi, u = case["phi"].clone(), torch.zeros_like(case["phi"])
    for _ in range(3):
        pck.update_phi_(
            [phi], [case["mu"]], [case["feedback"]], [name], lr=0.05, momentum=0.9, velocities=[u],
            step_rules=[rule], log_vars=[case["lv"]],
        )  # fmt: skip
    _close(phi, want)
    _close(u, velocity)


def test_momentum_is_that_of_torch_sgd(gen: torch.Generator, layer_backend: str) -> None:
    start, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    theirs = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    ours, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(4):
        optimiser.zero_grad()
        (0.5 * (theirs - mu) ** 2).sum().backward()
        optimiser.step()
        pck.update_phi_([ours], [mu], [None], ["gaussian"], lr=0.1, momentum=0.9, velocities=[velocity])
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-14)


def test_default_rules(gen: torch.Generator, layer_backend: str) -> None:
    """Natural for categorical and bernoulli, Euclidean elsewhere."""
    cases = [_case(name, gen, (3, 4)) for name in truth.ENERGIES]
    phis = [case["phi"].clone() for case in cases]
    mus, feedback, lvs = ([case[key] for case in cases] for key in ("mu", "feedback", "lv"))
    pck.update_phi_(phis, mus, feedback, truth.ENERGIES, lr=0.05, log_vars=lvs)
    for name, phi, case in zip(truth.ENERGIES, phis, cases, strict=True):
        rule = "natural" if name in ("categorical", "bernoulli") else "euclidean"
        _close(phi, _moved(name, rule, case, 1, 0.05, 0.0)[0])


def test_lr_scale_of_each_node(gen: torch.Generator, layer_backend: str) -> None:
    cases = [_case("gaussian", gen, (3, 4)) for _ in range(3)]
    phis = [case["phi"].clone() for case in cases]
    scales = [0.5, 0.0, 2.0]
    pck.update_phi_(phis, [c["mu"] for c in cases], [None] * 3, ["gaussian"] * 3, lr=0.1, lr_scales=scales)
    for phi, case, scale in zip(phis, cases, scales, strict=True):
        case["feedback"] = None
        _close(phi, _moved("gaussian", "euclidean", case, 1, 0.1 * scale, 0.0)[0])


def test_lr_scale_stays_out_of_the_velocity(gen: torch.Generator, layer_backend: str) -> None:
    """u <- m u + g; phi <- phi - lr * scale * u."""
    case = _case("laplace", gen, (3, 4))
    want, velocity = _moved("laplace", "euclidean", case, 1, 0.1 * 0.25, 0.5)
    phi, u = case["phi"].clone(), torch.zeros_like(case["phi"])
    pck.update_phi_(
        [phi], [case["mu"]], [case["feedback"]], ["laplace"], lr=0.1, momentum=0.5, velocities=[u], lr_scales=[0.25]
    )
    _close(phi, want)
    _close(u, velocity)


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_masked_and_held_entries_do_not_move(name: str, rule: str, gen: torch.Generator, layer_backend: str) -> None:
    case = _case(name, gen, (6, 8))
    mask, hold = inputs.normal(gen, 6, 8) > -0.5, inputs.normal(gen, 6, 8) > 0.5
    mask[:, 0] = True
    want, velocity = _moved(name, rule, case, 2, 0.05, 0.9, mask, hold)
    phi, u = case["phi"].clone(), torch.zeros_like(case["phi"])
    for _ in range(2):
        pck.update_phi_(
            [phi], [case["mu"]], [case["feedback"]], [name], lr=0.05, momentum=0.9, velocities=[u],
            step_rules=[rule], log_vars=[case["lv"]], masks=[mask], clamped=[hold],
        )  # fmt: skip
    _close(phi, want)
    _close(u, velocity)
    still = hold | ~mask
    assert torch.equal(phi[still], case["phi"][still])
    assert (phi[~still] != case["phi"][~still]).any()


def test_a_target_does_not_move(gen: torch.Generator, layer_backend: str) -> None:
    cases = [_case("categorical", gen, (3, 4)) for _ in range(2)]
    target = inputs.target("categorical", gen, 3, 4)
    phis = [cases[0]["phi"].clone(), target.clone()]
    feedback = [case["feedback"] for case in cases]
    pck.update_phi_(phis, [c["mu"] for c in cases], feedback, ["categorical"] * 2, lr=0.1, clamped=[None, True])
    assert torch.equal(phis[1], target)
    _close(phis[0], _moved("categorical", "natural", cases[0], 1, 0.1, 0.0)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_of_categorical_probs(dtype: torch.dtype, layer_backend: str) -> None:
    phi = torch.tensor([[0.5, 0.3, 0.2]], dtype=dtype)
    push = torch.tensor([[10.0, 0.0, -1.0]], dtype=dtype)
    mu = phi.clone()
    pck.update_phi_([phi], [mu], [push], ["categorical_probs"], lr=0.1)
    torch.testing.assert_close(phi, torch.tensor([[1e-6, 0.3, 0.3]], dtype=dtype), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("view", ["transposed", "sliced", "strided"])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_in_place_on_memory_that_is_not_contiguous(
    name: str, view: str, gen: torch.Generator, layer_backend: str
) -> None:
    case = _case(name, gen, (5, 6))
    storage, window = {
        "transposed": (torch.full((6, 5), 7.0, dtype=torch.float64), lambda t: t.T),
        "sliced": (torch.full((9, 8), 7.0, dtype=torch.float64), lambda t: t[2:7, 1:7]),
        "strided": (torch.full((10, 12), 7.0, dtype=torch.float64), lambda t: t[::2, ::2]),
    }[view]
    phi, untouched = window(storage), torch.ones_like(storage, dtype=torch.bool)
    phi.copy_(case["phi"])
    window(untouched).fill_(False)
    mu = case["mu"].T.contiguous().T
    rule = "natural" if name in ("categorical", "bernoulli") else "euclidean"
    pck.update_phi_([phi], [mu], [case["feedback"]], [name], lr=0.05, log_vars=[case["lv"]])
    _close(window(storage), _moved(name, rule, case, 1, 0.05, 0.0)[0])
    assert (storage[untouched] == 7.0).all()
    got = pck.layer_errors([phi], [mu], [name], log_vars=[case["lv"]])
    want = truth.errors(name, phi, mu, case["lv"])
    for mine, right in zip(
        (got.energy[0], got.grad_phi[0], got.grad_mu[0]), (want.energy, want.grad_phi, want.grad_mu), strict=True
    ):
        _close(mine, right)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_inputs_are_left_alone(name: str, gen: torch.Generator, layer_backend: str) -> None:
    case = _case(name, gen, (3, 4))
    before = {key: None if value is None else value.clone() for key, value in case.items()}
    pck.layer_errors([case["phi"]], [case["mu"]], [name], log_vars=[case["lv"]])
    pck.update_phi_([case["phi"].clone()], [case["mu"]], [case["feedback"]], [name], lr=0.1, log_vars=[case["lv"]])
    for key, value in before.items():
        assert value is None or torch.equal(value, case[key]), key


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_an_empty_batch_returns_empties(name: str, gen: torch.Generator, layer_backend: str) -> None:
    case = _case(name, gen, (0, 4))
    got = pck.layer_errors([case["phi"]] * 2, [case["mu"]] * 2, [name] * 2, log_vars=[case["lv"]] * 2)
    assert got.energy.shape == (2, 0)
    assert [g.shape for g in (*got.grad_phi, *got.grad_mu)] == [(0, 4)] * 4
    pck.update_phi_([case["phi"]], [case["mu"]], [None], [name], lr=0.1, log_vars=[case["lv"]])


@pytest.mark.parametrize("width", [1, 2, 3, 17, 64, 513, 1000])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_odd_sizes_in_float32(name: str, width: int, gen: torch.Generator, layer_backend: str) -> None:
    width += width % 2 if name == "gaussian_full" else 0
    case = _case(name, gen, (3, width), torch.float32)
    got = pck.layer_errors([case["phi"]], [case["mu"]], [name], log_vars=[case["lv"]])
    want = truth.errors(name, case["phi"], case["mu"], case["lv"])
    torch.testing.assert_close(got.energy[0].double(), want.energy, rtol=2e-5, atol=1e-5)
    _close(got.grad_phi[0], want.grad_phi)
    _close(got.grad_mu[0], want.grad_mu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(len(LAYER_BACKENDS) < 2, reason="one backend only")
def test_backends_agree_on_a_large_call(dtype: torch.dtype, gen: torch.Generator) -> None:
    """Many rows: more than one thread's share. Each backend is within its rounding of the first."""
    cases = [_case(name, gen, (257, 130), dtype) for name in truth.ENERGIES]
    phis, mus, lvs = ([case[key] for case in cases] for key in ("phi", "mu", "lv"))
    results = []
    for backend in LAYER_BACKENDS:
        with pck.use_backend(backend):
            results.append(pck.layer_errors(phis, mus, truth.ENERGIES, log_vars=lvs))
    tight = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for other in results[1:]:
        torch.testing.assert_close(other.energy, results[0].energy, rtol=tight["rtol"], atol=0.0)
        for mine, right in zip(other.grad_phi + other.grad_mu, results[0].grad_phi + results[0].grad_mu, strict=True):
            torch.testing.assert_close(mine, right, **tight)


NODES = st.lists(
    st.tuples(st.sampled_from(truth.ENERGIES), st.lists(st.integers(1, 5), min_size=1, max_size=2), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nodes=NODES, batch=st.integers(0, 4), seed=st.integers(0, 2**20))
def test_any_list_of_nodes(nodes: list, batch: int, seed: int, layer_backend: str) -> None:
    """Families, shapes, masks and targets at random in one call; every node is its own truth."""
    gen = inputs.seeded(seed)
    phis, mus, names, lvs, masks, clamped = [], [], [], [], [], []
    for name, dims, kind in nodes:
        shape = (batch, *dims[:-1], dims[-1] * (2 if name == "gaussian_full" else 1))
        case = _case(name, gen, shape)
        target = kind == 1
        phi = inputs.target(name, gen, *shape) if target else case["phi"]
        mask = inputs.normal(gen, *phi.shape) > 0
        mask[..., 0] = True
        phis.append(phi)
        mus.append(case["mu"])
        names.append(name)
        lvs.append(case["lv"])
        masks.append(mask if kind == 2 else None)
        clamped.append(target or None)
    got = pck.layer_errors(phis, mus, names, log_vars=lvs, masks=masks, clamped=clamped)
    assert got.energy.shape == (len(nodes), batch)
    for i, name in enumerate(names):
        want = truth.errors(name, phis[i], mus[i], lvs[i], masks[i], clamped=clamped[i] is True)
        for mine, right in zip(
            (got.energy[i], got.grad_phi[i], got.grad_mu[i]), (want.energy, want.grad_phi, want.grad_mu), strict=True
        ):
            _close(mine, right)


@pytest.mark.parametrize("with_energy", [True, False])
def test_deltas_are_what_a_step_needs_of_the_errors(
    with_energy: bool, gen: torch.Generator, layer_backend: str
) -> None:
    """All families, free, masked and as targets, in one call; float64 truth."""
    names, nodes = [*truth.ENERGIES] * 3, []
    for kind in ("free", "masked", "target"):
        for name in truth.ENERGIES:
            case = _case(name, gen, (3, 2, 6))
            phi = inputs.target(name, gen, 3, 2, 6) if kind == "target" else case["phi"]
            mask = (inputs.normal(gen, 3, 2, 6) > -0.5) | (torch.arange(6) == 0) if kind == "masked" else None
            nodes.append((phi, case["mu"], case["lv"], mask, kind == "target"))
    phis, mus, lvs, masks, clamped = (list(column) for column in zip(*nodes, strict=True))
    log_vars = [lv for lv in lvs if lv is not None]
    energy, grad_mu = torch.ops.pc_kernels.layer_deltas(
        phis, mus, names, log_vars, masks, [None] * len(names), clamped, with_energy
    )
    assert energy.shape == (len(names) if with_energy else 0, 3)
    for l, name in enumerate(names):
        want = truth.errors(name, phis[l], mus[l], lvs[l], masks[l], clamped=clamped[l])
        _close(grad_mu[l], want.grad_mu)
        if with_energy:
            _close(energy[l], want.energy)
