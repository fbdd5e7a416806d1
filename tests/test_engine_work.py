# SPDX-License-Identifier: MIT
"""The C++ engine's matrix products, counted from outside: a library loaded before torch stands in for its micro-kernel,
keeps every call's sizes and passes the call on. What must be there follows from the float64 truth: which nodes really
move, and which errors really differ from zero."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any

import inputs
import pytest
import truth

from pc_kernels.backends import native

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
WHY_NOT = native.unavailable_reason()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no compiled backend: {WHY_NOT}"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
]
TILE, PANEL = 32, 64  # samples and columns of a micro-kernel call: csrc/cpu/infer.cpp, product.h

SHIM = r"""
#include <dlfcn.h>
#include <atomic>
#include <cstdint>
#include <cstdlib>
namespace c10 { struct BFloat16; }
namespace {
constexpr int64_t kMost = 1 << 18;
int64_t calls[kMost][5];
std::atomic<int64_t> made{0};
void note(int64_t bf16, int64_t m, int64_t n, int64_t k, bool add) {
  const int64_t i = made++;
  if (i >= kMost) abort();
  calls[i][0] = bf16, calls[i][1] = m, calls[i][2] = n, calls[i][3] = k, calls[i][4] = add;
}
void* find(const char* name) {  // torch's libraries are not in the global scope, so RTLD_NEXT would not see them
  void* real = dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), name);
  if (!real) abort();
  return real;
}
}  // namespace
extern "C" int64_t calls_made() { return made.exchange(0); }
extern "C" const int64_t* call(int64_t i) { return calls[i]; }
namespace at::native::cpublas {
#define SIZES int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add
#define STAND_IN(T, bf16, name) \
  void brgemm(SIZES, const T* a, const T* b, float* c, bool vnni) { \
    static const auto real = reinterpret_cast<void (*)(SIZES, const T*, const T*, float*, bool)>(find(name)); \
    note(bf16, m, n, k, add); \
    real(m, n, k, lda, ldb, ldc, add, a, b, c, vnni); \
  }
STAND_IN(float, 0, "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb")
STAND_IN(c10::BFloat16, 1, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb")
}  // namespace at::native::cpublas
"""

WORKER = r"""
import ctypes, json, sys
import torch
import pc_kernels as pck
shim = ctypes.CDLL(sys.argv[1])
shim.calls_made.restype, shim.call.restype = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64 * 5)
torch.manual_seed(0)
for line in sys.stdin:
    case = json.loads(line)
    widths, batch = case["widths"], case["batch"]
    weights = [torch.randn(b, a) / a**0.5 for a, b in zip(widths, widths[1:])]
    layers = [pck.Layer(w, torch.zeros(len(w)), "tanh") for w in weights[:-1]]
    layers.append(pck.Layer(weights[-1], energy="categorical"))
    states = [torch.randn(batch, d) if l in case["given"] + case["clamped"] else None for l, d in enumerate(widths[1:])]
    clamp = [True if l in case["clamped"] else None for l in range(len(layers))]
    target = torch.arange(batch) % widths[-1] if case["target"] else None
    torch.set_num_threads(case["threads"])
    x = torch.rand(batch, widths[0])
    shim.calls_made()
    settings = {"clamp": clamp, "steps": case["steps"], "precision": case["precision"]}
    with pck.use_backend("cpp"), torch.profiler.profile() as profile:
        work = pck.infer(x, layers, target=target, phis=states, **settings).work
    calls = [list(shim.call(i).contents) for i in range(shim.calls_made())]
    ops = [event.key for event in profile.key_averages()]
    print(json.dumps({"calls": calls, "products": work.products, "bound": work.lower_bound, "ops": ops}))
"""


@dataclass(frozen=True)
class Case:
    """A chain of tanh layers, Gaussian nodes, a categorical output. `given`, `clamped`: inner nodes, counted from 0."""

    widths: tuple[int, ...]
    batch: int
    steps: int
    target: bool = True
    given: tuple[int, ...] = ()
    clamped: tuple[int, ...] = ()
    precision: str = "fp32"
    threads: int = 1


NETWORKS = ((45, 130, 10), (33, 65, 31, 7), (20, 70, 129, 64, 5), (17, 66, 31, 130, 3, 9))
STEPS, BATCHES = (0, 1, 2, 5, 32), (1, 31, 33, 97)
BF16 = ("bf16_delta",) if native.supports("infer in bf16_delta", []) is None else ()
CASES = [
    *(Case(*what) for what in product(NETWORKS, BATCHES, STEPS)),
    *(Case(*what, target=False) for what in product(NETWORKS, (1, 33), STEPS)),
    *(Case(*what, clamped=(1,)) for what in product(NETWORKS[1:], BATCHES, STEPS)),
    *(Case(*what, target=False, clamped=(1, 2)) for what in product(NETWORKS[2:], (33,), STEPS)),
    *(Case(*what, target=False, given=(1,)) for what in product(NETWORKS[1:], (33,), STEPS)),
    *(Case(*what, given=tuple(range(len(what[0]) - 2))) for what in product(NETWORKS, (31,), STEPS)),
    *(Case(*what, threads=2) for what in product(NETWORKS, BATCHES, (0, 5))),
    *(Case(*what, precision=name) for name in BF16 for what in product(NETWORKS, BATCHES, STEPS)),
    *(Case(*what, clamped=(1,), precision=name) for name in BF16 for what in product(NETWORKS[1:], (33,), STEPS)),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    """What the shipping extension called in every case, in a process of its own."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    shim = str(folder / "shim.so")
    subprocess.run(
        [str(CXX), "-std=c++17", "-O1", "-shared", "-fPIC", str(folder / "shim.cpp"), "-ldl", "-o", shim], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", WORKER, shim], input="\n".join(json.dumps(asdict(case)) for case in CASES),
        env={**os.environ, "LD_PRELOAD": shim}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@functools.cache
def _states(count: int, steps: int, target: bool, given: tuple[int, ...], clamped: tuple[int, ...]) -> truth.Result:
    """Any numbers will do. All nodes Gaussian: their errors at phi = mu are zero to the last bit, by autograd, too."""
    gen = inputs.seeded()
    nodes = [inputs.node("gaussian", gen, 4, 4, "tanh") for _ in range(count)]
    x, phis = inputs.normal(gen, 2, 4), [inputs.normal(gen, 2, 4) for _ in range(count)]
    return truth.infer(
        nodes, x, target=inputs.normal(gen, 2, 4) if target else None, steps=steps,
        phis=[phi if l in given + clamped else None for l, phi in enumerate(phis)],
        clamp=[True if l in clamped else None for l in range(count)],
    )  # fmt: skip


def needed(case: Case) -> list[tuple[str, int]]:
    """The products that no exact method can do without, as (direction, layer): all layers forward; then for every move
    W^T delta where delta differs from zero and the node below may move, and W v where v has changed."""
    count = len(case.widths) - 1
    products = [("once", 0), *(("start", l) for l in range(1, count))]
    open_after = 2 * count  # the cone has long reached every node that it can reach
    for t in range(1, case.steps + 1):
        at = min(t, open_after)
        before, after = (_states(count, s, case.target, case.given, case.clamped) for s in (at - 1, at))
        for l in range(1, count):
            if l - 1 not in case.clamped and before.deltas[l].any():
                products.append(("back", l))
            if not before.phis[l - 1].equal(after.phis[l - 1]):
                products.append(("forward", l))
    return products


def panels(width: int) -> list[int]:
    return [PANEL] * (width // PANEL) + [width % PANEL] * (width % PANEL > 0)


def tiles(batch: int, threads: int) -> tuple[int, int]:
    """(number, samples of each): a power of two that gives every thread a tile, and no more than TILE."""
    size = next(s for s in (1, 2, 4, 8, 16, TILE) if s == TILE or s >= batch / threads)
    return -(-batch // size), size


def expected(case: Case) -> Counter[tuple[int, ...]]:
    """How often each (bfloat16, M, N, K, adds) is called."""
    number, rows = tiles(case.batch, case.threads)
    calls: Counter[tuple[int, ...]] = Counter()
    for direction, l in needed(case):
        inputs_, width = case.widths[l], case.widths[l + 1]
        half = case.precision == "bf16_delta" and direction in ("back", "forward")
        inner, outer = (width, inputs_) if direction == "back" else (inputs_, width)
        inner += inner % 2 if half else 0  # bfloat16 operands come in pairs
        for columns in panels(outer):
            sizes = (columns, rows) if direction == "once" else (rows, columns)
            calls[(int(half), *sizes, inner, int(half and direction == "forward"))] += number
    return calls


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
def test_micro_kernel_calls_are_the_lower_bound(case: Case, counted: dict[Case, Any]) -> None:
    found, calls = counted[case], expected(case)
    assert Counter(map(tuple, found["calls"])) == calls
    assert found["products"] == found["bound"] == len(needed(case))
    assert not [op for op in found["ops"] if op.endswith(("mm", "matmul", "linear", "mv", "bmm", "conv1d"))]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("widths", NETWORKS)
def test_flops(widths: tuple[int, ...], steps: int, counted: dict[Case, Any]) -> None:
    """One tile: layer 1 once, 2 (L - 1) products a move once the cone is open, no weight gradient."""
    forward = [a * b for a, b in pairwise(widths)]
    moves = [sum(2 * size for size in forward[len(forward) - min(t, len(forward) - 1) :]) for t in range(1, steps + 1)]
    calls = counted[Case(widths, 31, steps)]["calls"]
    assert sum(2 * m * n * k for _, m, n, k, _ in calls) == 2 * TILE * (sum(forward) + sum(moves))
