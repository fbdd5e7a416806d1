# SPDX-License-Identifier: MIT
"""What is compiled: pc_math.h by itself, for the host and by nvcc; setup.py; an extension that does not load."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import truth

from pc_kernels import pc_math
from pc_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float64)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


PROBE = r"""
#include <type_traits>
#include "pc_math.h"
template <class F, class T> void apply(int n, const T* a, const T* grad, T* mu, T* back) {
  if constexpr (std::is_same_v<F, pc::Softmax>) {
    pc::softmax_row<T>(n, a, mu);
    const T dot = T(pc::row_sum<T>(n, [=](int64_t i) { return mu[i] * grad[i]; }));
    for (int i = 0; i < n; ++i) back[i] = F::vjp(mu[i], grad[i], dot);
  } else {
    for (int i = 0; i < n; ++i) mu[i] = F::value(a[i]), back[i] = F::vjp(a[i], mu[i], grad[i]);
  }
}
#define ONE(name, type) if (which == int(pc::Activation::name)) apply<pc::type>(n, a, grad, mu, back);
#define ALL(T) \
  extern "C" void run_##T(int which, int n, const T* a, const T* grad, T* mu, T* back) { PC_ACTIVATIONS(ONE) }
ALL(float) ALL(double)
"""

KERNEL = r"""
#include "pc_math.h"
template <class F, class T> __device__ T errors(T a, T b, T c) {
  const auto r = F::template free<pc::kErrors>(a, b, c);
  return r.energy + r.grad_phi + r.grad_mu;
}
template <class F, class T> __device__ T target(T a, T b) {
  const auto r = F::template target<pc::kErrors>(a, b);
  return r.energy + r.grad_mu;
}
template <class F, class T> __device__ T activation(T a, T b) { return F::vjp(a, F::value(a), b); }
template <class T> __global__ void all(const T* x, T* out) {
  using namespace pc;
  const T a = x[threadIdx.x], b = x[threadIdx.x + 1], c = x[threadIdx.x + 2], d = x[threadIdx.x + 3];
  T s = errors<Gaussian>(a, b, c) + errors<GaussianDiag>(a, b, c) + errors<CategoricalProbs>(a, b, c);
  s += errors<Bernoulli>(a, b, c) + errors<Laplace>(a, b, c) + errors<Poisson>(a, b, c);
  s += target<Bernoulli>(a, b) + target<Poisson>(a, b);
  const auto pair = GaussianFull::free<kErrors>(a, b, c, d, true, a > b);
  s += pair.energy + pair.grad_phi_u + pair.grad_mu_s + GaussianFull::target<kErrors>(a, b, c, a > b).grad_mu_s;
  s += Categorical::change(a, b, c) + Categorical::free<kErrors>(a, b, c).grad_mu + Categorical::grad_phi(a, b, c);
  s += Categorical::target<kErrors>(a, b, c, d).energy + GaussianDiag::grad_log_var(a, b, c);
  s += activation<Identity>(a, b) + activation<Tanh>(a, b) + activation<Relu>(a, b) + activation<LeakyRelu>(a, b);
  s += activation<Gelu>(a, b) + activation<Silu>(a, b) + activation<Sigmoid>(a, b) + activation<Hardtanh>(a, b);
  s += activation<Softplus>(a, b);
  out[threadIdx.x] = s + Softmax::vjp(a, b, c) + Sample::value(a, b, c) + Sample::vjp_s(a, b, c);
}
template __global__ void all<float>(const float*, float*);
template __global__ void all<double>(const double*, double*);
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The activations of pc_math.h, compiled without torch and without a warning."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([CXX, *flags, str(folder / "probe.cpp"), "-o", str(folder / "probe.so")], check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", pc_math.ACTIVATIONS)
def test_activation(probe: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    a = torch.cat([3 * torch.randn(500), torch.linspace(-30, 30, 500), torch.linspace(-1e-3, 1e-3, 100)]).to(dtype)
    grad, mu, back = torch.randn_like(a), torch.empty_like(a), torch.empty_like(a)
    run = probe.run_float if dtype == torch.float32 else probe.run_double
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, grad, mu, back)]
    run(pc_math.ACTIVATIONS.index(name), a.numel(), *pointers)
    wide = a.double().clone().requires_grad_()
    # torch's own softplus is linear beyond 20
    want = torch.logaddexp(wide, 0 * wide.detach()) if name == "softplus" else truth.ACTIVATIONS[name](wide)
    want.backward(grad.double())
    rtol, atol = (4e-6, 1e-9) if dtype == torch.float32 else (1e-11, 1e-15)
    torch.testing.assert_close(mu.double(), want.detach(), rtol=rtol, atol=atol)
    assert wide.grad is not None
    torch.testing.assert_close(back.double(), wide.grad, rtol=rtol, atol=4e-7 if dtype == torch.float32 else 1e-13)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_math_compiles_for_cuda(tmp_path: Path) -> None:
    (tmp_path / "probe.cu").write_text(KERNEL)
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100")]
    flags = ["-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", f"-I{ROOT / 'csrc'}", "-c"]
    command = [str(NVCC), *archs, *flags, "probe.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


IMPOSSIBLE = [("gpu", "wanted one of auto, cpu, cuda, got 'gpu'"), ("cuda", "wanted a CUDA build, but")]


@pytest.mark.parametrize(("mode", "says"), IMPOSSIBLE)
def test_build_mode_that_cannot_be(mode: str, says: str) -> None:
    if mode == "cuda" and torch.version.cuda is not None and NVCC is not None:
        pytest.skip("a CUDA build can be had here")
    command = [sys.executable, "setup.py", "--version"]
    env = {**os.environ, "PC_KERNELS_BUILD": mode}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert says in done.stderr


def test_build_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr


# ---------------------------------------------------------------- a backend that cannot run


def test_supports_answers_with_a_reason() -> None:
    one, two = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    assert native.supports("layer_errors", [one, None, torch.zeros(2, dtype=torch.int64), one.bool()]) is None
    for op, tensors, reason in (
        ("weather", [one], "not written"),
        ("update_phi_", [one.to("meta")], "meta"),
        ("layer_errors", [one.half()], "float16"),
        ("layer_errors", [one, two], "float32 and float64"),
    ):
        assert reason in (native.supports(op, tensors) or "")


BROKEN = [
    (ModuleNotFoundError("no"), "not built"),
    (ImportError("undefined symbol: _Z1f"), "_Z1f"),
    (None, "built for torch 1.0"),
]


@pytest.mark.parametrize(("error", "reason"), BROKEN)
def test_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch, error: ImportError | None, reason: str) -> None:
    class Old:
        @staticmethod
        def build_info() -> dict:
            return {"torch": "1.0.0"}

    def load(name: str) -> type[Old]:
        if error is not None:
            raise error
        return Old

    native._load.cache_clear()
    monkeypatch.setattr(native, "import_module", load)
    try:
        why = native.supports("layer_errors", [])
        assert why is not None
        assert reason in why
        assert "pip install --no-build-isolation" in why
        assert native.build_info() == {}
        with pytest.raises(RuntimeError, match=reason):
            native.layer_energies()
    finally:
        native._load.cache_clear()
    importlib.import_module("pc_kernels._C")
