# SPDX-License-Identifier: MIT
"""The GPU's layer ops without a GPU: their device code, run by CPU threads, against the truth; machine code."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import cuda_host
import inputs
import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")

WIDTHS = [1, 3, 8, 130, 2048, 2501]  # a warp's line, in quads or not; a block's
NAN = float("nan")


class Case:
    """One node with everything that the kernels may be told of it."""

    def __init__(self, name: str, gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
        shape = (*shape[:-1], shape[-1] * 2) if name == "gaussian_full" else shape
        self.name, self.target = name, kind in ("target", "index")
        self.mu = inputs.state(name, gen, *shape, dtype=dtype)
        self.phi = inputs.target(name, gen, *shape, dtype=dtype) if self.target else self.mu.clone()
        if not self.target:
            self.phi = inputs.state(name, gen, *shape, dtype=dtype)
        if kind == "index":
            self.phi = torch.randint(shape[-1], shape[:-1], generator=gen)
        self.log_var = inputs.log_var(name, gen, shape[-1], dtype)
        like = self.mu if kind == "index" else self.phi
        self.mask = self.hold = None
        if kind in ("masked", "target"):
            self.mask = inputs.normal(gen, *like.shape) > -0.5
            self.mask[..., 0] = True
        if kind == "masked":
            self.hold = inputs.normal(gen, 1, *like.shape[1:]) > 0.5  # shared by the batch
        self.feedback = 0.1 * inputs.normal(gen, *shape, dtype=dtype)
        self.velocity = 0.1 * inputs.normal(gen, *shape, dtype=dtype)
        self.grad_phi = None if self.target else torch.full_like(self.phi, NAN)
        self.grad_mu = torch.full_like(self.mu, NAN)
        self.lines = self.log_var.expand(shape[1:]).contiguous() if self.log_var is not None else None

    def describe(self) -> cuda_host.Node:
        at, width = cuda_host.pointer, self.mu.shape[-1]
        sample = self.mu[0].numel()
        index = not self.phi.is_floating_point()
        return cuda_host.Node(
            energy=truth.ENERGIES.index(self.name), clamped=self.target, rows=sample // width, width=width,
            phi_sample=0 if index else self.phi[0].numel(), mu_sample=sample, phi=None if index else at(self.phi),
            mu=at(self.mu), index=at(self.phi) if index else None, log_var=at(self.lines), mask=at(self.mask),
            mask_sample=0 if self.mask is None else self.mask[0].numel(), hold=at(self.hold), hold_sample=0,
            grad_phi=at(self.grad_phi), grad_mu=at(self.grad_mu), state=at(self.phi), velocity=at(self.velocity),
            feedback=at(self.feedback), lr=0.05,
        )  # fmt: skip

    def errors(self) -> truth.Errors:
        return truth.errors(self.name, self.phi, self.mu, self.log_var, self.mask, self.hold, self.target)


def _run(cases: list[Case], *, move: bool, natural: bool = False) -> Tensor:
    nodes = (cuda_host.Node * len(cases))(*[case.describe() for case in cases])
    for node in nodes:
        node.natural = natural
    batch = cases[0].mu.shape[0]
    energy = torch.full((len(cases), batch), NAN)
    host = cuda_host.library("layer_ops")
    assert host.size_of_node() == ctypes.sizeof(cuda_host.Node)
    bf16 = cases[0].mu.dtype == torch.bfloat16
    counts = (ctypes.c_int64(len(cases)), ctypes.c_int64(batch), ctypes.c_void_p(energy.data_ptr()))
    host.run_layer_op(nodes, *counts, ctypes.c_double(0.9), ctypes.c_bool(move), ctypes.c_bool(bf16))
    return energy


def _close(got: Tensor, want: Tensor) -> None:
    loose = got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=5e-3 if loose else 1e-5, atol=2e-6)


def _check_errors(cases: list[Case]) -> None:
    energy = _run(cases, move=False)
    for case, got in zip(cases, energy, strict=True):
        want = case.errors()
        torch.testing.assert_close(got.double(), want.energy, rtol=2e-5, atol=1e-5)
        _close(case.grad_mu, want.grad_mu)
        if case.grad_phi is not None:
            _close(case.grad_phi, want.grad_phi)


def _kinds(name: str) -> list[str]:
    return ["free", "masked", "target", *(["index"] if name == "categorical" else [])]


KINDS = [(name, kind) for name in truth.ENERGIES for kind in _kinds(name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_errors_of_any_width(name: str, kind: str, dtype: torch.dtype, gen: torch.Generator) -> None:
    """All widths in one launch; three samples, so that a block of eight warps is not full."""
    _check_errors([Case(name, gen, (3, width), dtype, kind) for width in WIDTHS])


@pytest.mark.parametrize("kind", ["free", "masked", "target", "index"])
def test_errors_of_many_rows(kind: str, gen: torch.Generator) -> None:
    """Rows shared out over the warps of a block; rows that take the block each."""
    shapes = [(2, 3, 4, 7), (2, 5, 400), (2, 2, 1100)]
    _check_errors([Case("categorical", gen, shape, torch.float32, kind) for shape in shapes])


def _moved(case: Case, natural: bool) -> tuple[Tensor, Tensor]:
    local = (case.phi.double() - case.mu.double()) if natural else case.errors().grad_phi
    velocity = 0.9 * case.velocity.double() + local + case.feedback.double()
    phi = case.phi.double() - 0.05 * velocity
    phi = phi.clamp_min(truth.FLOOR) if case.name == "categorical_probs" else phi
    still = torch.zeros(phi.shape, dtype=torch.bool)
    still = still if case.mask is None else still | ~case.mask
    still = still if case.hold is None else still | case.hold
    return torch.where(still, case.phi.double(), phi), torch.where(still, case.velocity.double(), velocity)


RULES = [(name, False) for name in truth.ENERGIES] + [("categorical", True), ("bernoulli", True)]


@pytest.mark.parametrize("kind", ["free", "masked"])
@pytest.mark.parametrize(("name", "natural"), RULES)
def test_moves_of_any_width(name: str, natural: bool, kind: str, gen: torch.Generator) -> None:
    cases = [Case(name, gen, (3, width), torch.float32, kind) for width in WIDTHS]
    cases += [Case(name, gen, (2, 5, 400), torch.float32, kind)]
    want = [_moved(case, natural) for case in cases[:-1]]
    last = _moved(cases[-1], natural)
    _run(cases[:-1], move=True, natural=natural)
    _run(cases[-1:], move=True, natural=natural)
    for case, (phi, velocity) in zip(cases, [*want, last], strict=True):
        _close(case.phi, phi)
        _close(case.velocity, velocity)


def test_a_fixed_point_is_exactly_zero(gen: torch.Generator) -> None:
    for name in truth.ENERGIES:
        if name == "gaussian_diag":  # a cross-entropy: its energy has no zero
            continue
        case = Case(name, gen, (2, 300), torch.float32, "free")
        case.phi.copy_(case.mu)
        energy = _run([case], move=False)
        for found in (energy, case.grad_phi, case.grad_mu):
            assert found is not None
            assert not found.any(), name


@pytest.mark.parametrize("name", [name for name in truth.ENERGIES if name != "gaussian_diag"])
def test_near_a_fixed_point_errors_keep_their_digits(name: str, gen: torch.Generator) -> None:
    """phi - mu of 1e-5: the written forms would be noise."""
    case = Case(name, gen, (3, 300), torch.float32, "free")
    case.phi.copy_(case.mu * (1 + 1e-5 * inputs.normal(gen, *case.mu.shape)))
    energy, want = _run([case], move=False)[0], case.errors()
    assert case.grad_phi is not None
    for mine, right in ((energy, want.energy), (case.grad_phi, want.grad_phi), (case.grad_mu, want.grad_mu)):
        assert (mine.double() - right).norm() <= 1e-4 * right.norm()


def test_a_class_out_of_range_is_seen(gen: torch.Generator) -> None:
    """A GPU cannot raise: the sample's energy says it."""
    case = Case("categorical", gen, (3, 5), torch.float32, "index")
    case.phi[1] = 5
    assert _run([case], move=False).isnan().tolist() == [[False, True, False]]


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=6),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_any_list_of_nodes(widths: list, batch: int, seed: int) -> None:
    gen = inputs.seeded(seed)
    shapes = [((name, kind), (batch, rows, width)) for (name, kind), width, rows in widths]
    _check_errors([Case(name, gen, shape, torch.float32, kind) for (name, kind), shape in shapes])


# ---------------------------------------------------------------- machine code

ARCHITECTURES = ("80", "90a", "100")
SHARED = 48 * 1024  # bytes of static shared memory that a launch may take


@pytest.mark.skipif(cuda_host.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", sorted(path.name for path in (cuda_host.ROOT / "csrc" / "cuda").glob("*.cu")))
def test_kernels_compile_and_nothing_spills(name: str, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "--threads=2", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "-c"]
    command = [str(cuda_host.NVCC), *codes, *flags, str(cuda_host.ROOT / "csrc" / "cuda" / name), "-o", "out.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", done.stderr)]
    shared = [int(count) for count in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert len(spills) >= 2 * len(ARCHITECTURES)
    assert not any(spills), done.stderr
    assert max(shared, default=0) <= SHARED
