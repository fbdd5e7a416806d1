# SPDX-License-Identifier: MIT
"""The compiled backend called directly: float32 and float64 against the float64 truth, edges, threads, memory."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path

import inputs
import pytest
import torch
import torch.nn.functional as F
import truth
from torch import Tensor

from pc_kernels import pc_math
from pc_kernels.backends import native

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 3e-7}, torch.float64: {"rtol": 1e-11, "atol": 1e-13}}
FAMILIES = pc_math.ENERGIES

pytestmark = pytest.mark.usefixtures("poison")


# ---------------------------------------------------------------- inputs, the truth, agreement


def _inputs(
    name: str, dtype: torch.dtype, shape: tuple[int, ...] = (5, 3, 12), clamped: bool = False, spread: float = 1.0
):
    """phi (or a target) and mu of a family, mu up to `spread` away from phi."""
    gen = inputs.seeded(len(name))
    if clamped:
        return inputs.target(name, gen, *shape, dtype=dtype), inputs.state(name, gen, *shape, dtype=dtype)
    phi = inputs.state(name, gen, *shape)
    away = spread * inputs.normal(gen, *shape)
    mu = (phi.log() + away).softmax(-1) if name == "categorical_probs" else phi + away
    return phi.to(dtype), mu.to(dtype)


def _truth(*args, **rest) -> tuple[Tensor, Tensor, Tensor]:
    """energy (B,), grad_phi, grad_mu in float64."""
    found = truth.errors(*args, **rest)
    return found.energy, found.grad_phi, found.grad_mu


def _log_var(name: str, mu: Tensor) -> Tensor | None:
    return torch.randn(mu.shape[-1], dtype=mu.dtype) if name == "gaussian_diag" else None


def _mask(shape: torch.Size | tuple[int, ...], chance: float = 0.7) -> Tensor:
    mask = torch.rand(shape) < chance
    mask[..., 0] = True
    return mask


def _one(name, phi, mu, log_var=None, mask=None, hold=None, clamped=False) -> tuple[Tensor, Tensor, Tensor]:
    energy, (grad_phi,), (grad_mu,) = native.layer_errors([phi], [mu], [name], [log_var], [mask], [hold], [clamped])
    alone = native.layer_energies([phi], [mu], [name], [log_var], [mask], [hold], [clamped])
    assert torch.equal(energy, alone)
    assert {energy.dtype, grad_phi.dtype, grad_mu.dtype} == {mu.dtype}
    return energy[0], grad_phi, grad_mu


def _agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for label, a, b in zip(("energy", "grad_phi", "grad_mu"), got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[dtype], msg=lambda text, n=label: f"{n}: {text}")


# ---------------------------------------------------------------- layer_errors


def test_lists_are_those_of_pc_math() -> None:
    assert native.unavailable_reason() is None
    assert native.names() == {"energies": pc_math.ENERGIES, "activations": pc_math.ACTIVATIONS}


@pytest.mark.parametrize("clamped", [False, True], ids=["free", "clamped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, dtype: torch.dtype, clamped: bool) -> None:
    phi, mu = _inputs(name, dtype, clamped=clamped)
    log_var, mask, hold = _log_var(name, mu), _mask(phi.shape), torch.rand(phi.shape) < 0.3
    _agree(_one(name, phi, mu, log_var, clamped=clamped), _truth(name, phi, mu, log_var, clamped=clamped), dtype)
    rest = (log_var, mask, hold, clamped)
    got = _one(name, phi, mu, *rest)
    if clamped and name == "categorical":
        phi = phi.masked_fill(~mask, 0.0)  # a masked class has no part in the target either
    _agree(got, _truth(name, phi, mu, *rest), dtype)
    assert not got[1][~mask | hold].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_indices(dtype: torch.dtype) -> None:
    mu, target = torch.randn(5, 3, 12, dtype=dtype), torch.randint(0, 12, (5, 3))
    _agree(_one("categorical", target, mu, clamped=True), _truth("categorical", target, mu, clamped=True), dtype)
    mask = _mask(mu.shape) | F.one_hot(target, 12).bool()
    rest = {"mask": mask, "clamped": True}
    _agree(_one("categorical", target, mu, **rest), _truth("categorical", target, mu, **rest), dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_keeps_relative_accuracy_near_equality(name: str) -> None:
    phi, mu = _inputs(name, torch.float32, (4, 64), spread=1e-3)
    log_var = torch.zeros(64) if name == "gaussian_diag" else None
    energy, grad_phi, grad_mu = _one(name, phi, mu, log_var)
    want = _truth(name, phi, mu, log_var)
    torch.testing.assert_close(energy.double(), want[0], rtol=1e-4, atol=0)
    for got, exact in ((grad_phi, want[1]), (grad_mu, want[2])):
        assert (got - exact).norm() < 1e-4 * exact.norm()
    fixed = _one(name, phi, phi.clone(), log_var)
    assert not any(part.any() for part in fixed)  # a fixed point is exactly zero


@pytest.mark.parametrize("name", FAMILIES)
def test_far_apart_stays_finite(name: str) -> None:
    if name == "categorical_probs":
        phi, mu = torch.tensor([[1.0, 0.0]]), torch.tensor([[1e-30, 1.0]])
    else:
        phi, mu = torch.tensor([[80.0, -80.0]]), torch.tensor([[-60.0, 60.0]])
    if name == "gaussian_full":
        phi, mu = phi / 4, mu / 4
    log_var = torch.zeros(2) if name == "gaussian_diag" else None
    energy, _, grad_mu = _one(name, phi, mu, log_var)
    want = _truth(name, phi, mu, log_var)
    torch.testing.assert_close(energy.double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_mu.double(), want[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_wide_rows(name: str) -> None:
    phi, mu = _inputs(name, torch.float32, (2, 16384), spread=0.5)
    log_var = _log_var(name, mu)
    energy, grad_phi, grad_mu = _one(name, phi, mu, log_var)
    want = _truth(name, phi, mu, log_var)
    torch.testing.assert_close(energy.double(), want[0], rtol=2e-6, atol=0)
    assert (grad_phi - want[1]).norm() < 3e-6 * want[1].norm()
    assert (grad_mu - want[2]).norm() < 3e-6 * want[2].norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_pathological_masks(name: str) -> None:
    phi, mu = _inputs(name, torch.float32, (4, 300))
    log_var = _log_var(name, mu)
    mask = torch.zeros(300, dtype=torch.bool)  # one entry takes part; what the others hold is nobody's business
    mask[[7, 157]] = True
    for hidden in (math.nan, math.inf):
        poisoned = (phi.masked_fill(~mask, hidden), mu.masked_fill(~mask, -hidden))
        _agree(_one(name, *poisoned, log_var, mask), _truth(name, phi, mu, log_var, mask), torch.float32)
    single = torch.zeros(300, dtype=torch.bool).index_fill_(0, torch.tensor(7), True)
    if name == "categorical":
        assert not any(part.any() for part in _one(name, phi, mu, log_var, single))
    _agree(_one(name, phi, mu, log_var, single), _truth(name, phi, mu, log_var, single), torch.float32)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 1), (1, 3, 12), (5, 1, 1), (5, 3, 12)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    phi, mu = _inputs("gaussian", torch.float64)
    mask = torch.rand(shape) < 0.5
    _agree(_one("gaussian", phi, mu, mask=mask), _truth("gaussian", phi, mu, mask=mask), torch.float64)
    _agree(_one("gaussian", phi, mu, hold=mask), _truth("gaussian", phi, mu, hold=mask), torch.float64)


def test_any_layout_and_empty_batches() -> None:
    phi, mu = _inputs("categorical", torch.float32, (8, 6, 10))
    turned = (phi.transpose(1, 2), mu.transpose(1, 2))
    straight = tuple(t.contiguous() for t in turned)
    assert all(
        torch.equal(a, b) for a, b in zip(_one("categorical", *turned), _one("categorical", *straight), strict=True)
    )
    empty = _one("categorical", phi[:0], mu[:0])
    assert [tuple(part.shape) for part in empty] == [(0,), (0, 6, 10), (0, 6, 10)]
    assert _one("gaussian", torch.ones(3), torch.zeros(3))[0].tolist() == [0.5] * 3


# ---------------------------------------------------------------- update_phi_


def _moved(name, rule, phi, mu, feedback, log_var, mask, hold, velocity, lr, momentum) -> tuple[Tensor, Tensor | None]:
    """The step in plain float64."""
    gradient = _truth(name, phi, mu, log_var, mask)[1]
    g = (phi - mu if rule == "natural" else gradient) + (0 if feedback is None else feedback)
    u = g if velocity is None else momentum * velocity + g
    to = phi - lr * u
    to = to.clamp(min=1e-6) if name == "categorical_probs" else to
    stays = ~mask | hold
    return torch.where(stays, phi, to), None if velocity is None else torch.where(stays, velocity, u)


RULES = [*((name, "euclidean") for name in FAMILIES), ("categorical", "natural"), ("bernoulli", "natural")]


@pytest.mark.parametrize("moving", [True, False], ids=["momentum", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_update(name: str, rule: str, dtype: torch.dtype, moving: bool) -> None:
    phi, mu = _inputs(name, dtype, (6, 7, 10))
    wide = torch.empty(6, 10, 7, dtype=dtype).transpose(1, 2).copy_(phi)  # not contiguous: moved in place all the same
    log_var, mask, hold = _log_var(name, mu), _mask(phi.shape), torch.rand(phi.shape) < 0.3
    feedback = torch.randn_like(phi) if moving else None
    speeds = [torch.randn_like(phi)] if moving else []
    doubles = [t if t is None else t.double() for t in (phi, mu, feedback, log_var)]
    before = speeds[0].double() if moving else None
    want = _moved(name, rule, *doubles, mask, hold, before, 0.3 * 0.5, 0.9)
    version = wide._version
    native.update_phi_([wide], [mu], [feedback], [name], [rule], 0.3, 0.9, speeds, [0.5], [log_var], [mask], [hold])
    assert wide._version > version
    torch.testing.assert_close(wide.double(), want[0], **TOLERANCE[dtype])
    assert torch.equal(wide[~mask | hold], phi[~mask | hold])
    if moving:
        assert want[1] is not None
        torch.testing.assert_close(speeds[0].double(), want[1], **TOLERANCE[dtype])


# ---------------------------------------------------------------- threads, memory


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _many(sizes: list[tuple[int, ...]]) -> list[list]:
    """The arguments of layer_errors for all families at all sizes."""
    rows = [(*_inputs(name, torch.float32, size), name) for size in sizes for name in FAMILIES]
    phis, mus, names = (list(column) for column in zip(*rows, strict=True))
    log_vars, nothing = [_log_var(n, m) for n, m in zip(names, mus, strict=True)], [None] * len(rows)
    return [phis, mus, names, log_vars, nothing, nothing, [False] * len(rows)]


@pytest.mark.parametrize("apart", [1.0, 1e-3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 10), (2, 19, 32), (2, 17, 48), (3, 5, 129), (1, 3, 600)])
def test_rows_that_are_worked_on_together(shape: tuple[int, ...], masked: bool, apart: float) -> None:
    """float32 keeps its relative accuracy in every row of a group, near phi = mu too; masked entries are exactly 0."""
    gen = torch.Generator().manual_seed(shape[-1])
    mu = 3 * torch.randn(shape, generator=gen)
    phi = mu + apart * torch.randn(shape, generator=gen)
    mask = (torch.rand(shape, generator=gen) < 0.6) | (torch.arange(shape[-1]) < 2) if masked else None
    energy, (grad_phi,), (grad_mu,) = native.layer_errors([phi], [mu], ["categorical"], [None], [mask], [None], [False])
    want = truth.errors("categorical", phi, mu, None, mask)
    assert torch.allclose(energy[0].double(), want.energy, rtol=1e-5, atol=0)
    for got, right in ((grad_phi, want.grad_phi), (grad_mu, want.grad_mu)):
        row = right.abs().amax(-1, keepdim=True)
        assert ((got.double() - right).abs() <= 1e-5 * row).all()
        assert mask is None or not got[~mask].any()
    _, (by_phi,), (by_mu,) = native.layer_errors([mu.clone()], [mu], ["categorical"], [None], [mask], [None], [False])
    assert not by_phi.any()
    assert not by_mu.any()  # a fixed point is exactly zero


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing() -> None:
    args = _many([(67, 2, 514), (67, 10)])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        energy, grad_phi, grad_mu = native.layer_errors(*args)
        results.append([energy, *grad_phi, *grad_mu])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_does_not_grow() -> None:
    args = _many([(16, 64)])

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc/self/statm on this system")
    for rounds in (200, 2000):
        before = resident()
        for _ in range(rounds):
            native.layer_errors(*args)
    assert resident() - before < 2**20


# ---------------------------------------------------------------- callers from C++


def _call(phi: Tensor, mu: Tensor, name: str = "gaussian", **changed) -> list:
    """The arguments of a one-node call, some of them changed."""
    good = {"phis": [phi], "mus": [mu], "energies": [name], "log_vars": [None], "masks": [None], "holds": [None]}
    return list({**good, "clamped": [False], **changed}.values())


def _bad_calls() -> dict[str, list]:
    """What the message must say, and the call."""
    x, target = torch.zeros(2, 4), {"name": "categorical", "clamped": [True]}
    two = {key: [None] * 2 for key in ("log_vars", "masks", "holds")}
    two |= {"phis": [x, x], "mus": [x, torch.zeros(3, 4)], "energies": ["gaussian"] * 2, "clamped": [False] * 2}
    return {
        "mus: wanted 1 entries": _call(x, x, mus=[]),
        "energies: wanted one of gaussian": _call(x, x, "cauchy"),
        "phis: wanted shape": _call(torch.zeros(2, 5), x),
        "mus: wanted .* of batch 2": _call(x, x, **two),
        "masks: wanted a CPU mask": _call(x, x, masks=[torch.ones(3, dtype=torch.bool)]),
        "holds: wanted a CPU mask": _call(x, x, holds=[torch.ones(3, 4, dtype=torch.bool)]),
        "log_vars: wanted a tensor": _call(x, x, "gaussian_diag"),
        "log_vars: wanted None": _call(x, x, log_vars=[torch.zeros(4)]),
        "mus: wanted an even width": _call(torch.zeros(2, 3), torch.zeros(2, 3), "gaussian_full"),
        "class indices within 0..3, got 4": _call(torch.tensor([0, 4]), x, **target),
        "class indices within 0..3, got -1": _call(torch.tensor([-1, 0]), x, **target),
        "class indices .* clamped": _call(torch.tensor([1, 0]), x, "categorical"),
    }


@pytest.mark.parametrize("message", _bad_calls())
def test_bad_direct_call(message: str) -> None:
    for op in (native.layer_errors, native.layer_energies):
        with pytest.raises(ValueError, match=message):
            op(*_bad_calls()[message])


def test_bad_update_changes_nothing() -> None:
    phis, mus = [torch.ones(2, 4), torch.ones(2, 4)], [torch.zeros(2, 4)] * 2
    rest: list = [[1.0] * 2, [None] * 2, [None] * 2, [None] * 2]
    names = ["gaussian", "gaussian"]
    for rules, lr, feedback, message in (
        (["euclidean", "natural"], 0.1, [None, None], "rules"),
        (["euclidean", "sideways"], 0.1, [None, None], "rules"),
        (["euclidean"] * 2, math.nan, [None, None], "lr"),
        (["euclidean"] * 2, 0.1, [None, torch.zeros(2, 5)], "feedback"),
    ):
        with pytest.raises(ValueError, match=message):
            native.update_phi_(phis, mus, feedback, names, rules, lr, 0.0, [], *rest)
    shared = [phis[0], torch.ones(1, 4).expand(2, 4)]
    with pytest.raises(ValueError, match="own memory"):
        native.update_phi_(shared, mus, [None] * 2, names, ["euclidean"] * 2, 0.1, 0.0, [], *rest)
    assert all(torch.equal(phi, torch.ones(2, 4)) for phi in phis)
