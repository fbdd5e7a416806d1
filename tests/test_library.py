# SPDX-License-Identifier: MIT
"""Citizens of torch: opcheck, fake tensors, torch.compile, torch.export; choosing a backend, explaining the choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import inputs
import pytest
import torch
import truth
from conftest import ALL_BACKENDS, INFER_BACKENDS, LAYER_BACKENDS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pc_kernels as pck

OPS = torch.ops.pc_kernels
NAMES = ["gaussian", "categorical", "gaussian_diag", "gaussian_full"]
WIDTHS = [5, 4, 3, 6]


def _layer_arguments(gen: torch.Generator, grad: bool = False) -> tuple[Any, ...]:
    """Four nodes: free, masked, held in part, and a target. log_vars: one per gaussian_diag node."""
    phis = [inputs.state(n, gen, 2, w) for n, w in zip(NAMES[:3], WIDTHS[:3], strict=True)]
    mus = [inputs.state(n, gen, 2, w).requires_grad_(grad) for n, w in zip(NAMES, WIDTHS, strict=True)]
    phis = [*[phi.requires_grad_(grad) for phi in phis], inputs.normal(gen, 2, 3)]
    log_vars = [inputs.normal(gen, 3).requires_grad_(grad)]
    mask, hold = torch.ones(2, 4, dtype=torch.bool).tril(1), inputs.normal(gen, 2, 3) > 0
    return phis, mus, NAMES, log_vars, [None, mask, None, None], [None, None, hold, None], [False] * 3 + [True]


def _update_arguments(gen: torch.Generator) -> tuple[Any, ...]:
    phis, mus, names, (log_var,), masks, holds, _ = (entry[:3] for entry in _layer_arguments(gen))
    feedback = [inputs.normal(gen, 2, 5), None, None]
    velocities = [torch.zeros_like(phi) for phi in phis]
    rules = ["euclidean", "natural", "euclidean"]
    return phis, mus, feedback, names, rules, 0.1, 0.9, velocities, [1.0, 0.5, 2.0], [None, None, log_var], masks, holds


def _infer_arguments(gen: torch.Generator, trace: bool = True, tol: float = -1.0) -> tuple[Any, ...]:
    nodes = inputs.paper("M3", gen, (3, 5, 4, 6, 2))
    target = inputs.target("categorical", gen, 2, 2)
    empty: list[Tensor | None] = [None] * 4
    rules = ["natural" if node.natural else "euclidean" for node in nodes]
    return (
        inputs.normal(gen, 2, 3), [n.weight for n in nodes], [n.bias for n in nodes], [n.activation for n in nodes],
        [n.energy for n in nodes], [n.fed for n in nodes], rules, [1.0] * 4, empty, [None, None, None, target],
        empty, empty, empty, [False, False, False, True], [0.0] * 4, 3, 0.1, 0.9, tol, "fp32", trace,
    )  # fmt: skip


# ---------------------------------------------------------------- opcheck, fake tensors


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["layer_errors", "layer_energies"])
def test_opcheck_of_the_energies(op: str, grad: bool, gen: torch.Generator, layer_backend: str) -> None:
    torch.library.opcheck(getattr(OPS, op).default, _layer_arguments(gen, grad))


def test_opcheck_of_the_update(gen: torch.Generator, layer_backend: str) -> None:
    torch.library.opcheck(OPS.update_phi_.default, _update_arguments(gen))


@pytest.mark.parametrize(("trace", "tol"), [(False, -1.0), (True, -1.0), (True, 0.1)])
def test_opcheck_of_infer(trace: bool, tol: float, gen: torch.Generator, infer_backend: str) -> None:
    torch.library.opcheck(OPS.infer.default, _infer_arguments(gen, trace, tol))


def _like(value: Any) -> Any:
    """Shapes, dtypes and strides of everything an op returned."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride(), value.device
    return [_like(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    return [_faked(mode, entry) for entry in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("layer_errors", _layer_arguments),
        ("layer_energies", _layer_arguments),
        ("layer_deltas", lambda gen: (*_layer_arguments(gen), True)),
        ("layer_deltas", lambda gen: (*_layer_arguments(gen), False)),
        ("infer", _infer_arguments),
        ("infer", lambda gen: _infer_arguments(gen, False)),
    ],
)
def test_fake_tensors_have_the_real_shapes(
    op: str, arguments: Callable[[torch.Generator], tuple], dtype: torch.dtype, gen: torch.Generator
) -> None:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return [cast(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    given = cast(list(arguments(gen)))
    real = getattr(OPS, op)(*given)
    mode = FakeTensorMode()
    with mode:
        fake = getattr(OPS, op)(*_faked(mode, given))
    assert _like(fake) == _like(real)


def test_infer_without_data(gen: torch.Generator) -> None:
    """Under a FakeTensorMode nothing is read: not the labels, nor whether a state diverged."""
    with FakeTensorMode():
        layers = [pck.Layer(torch.ones(6, 4), activation="tanh"), pck.Layer(torch.ones(3, 6), energy="categorical")]
        got = pck.infer(torch.ones(5, 4), layers, target=torch.zeros(5, dtype=torch.int64), steps=2, trace=True)
        grads = pck.weight_grads(torch.ones(5, 4), layers, got)
    assert got.energy is not None
    assert [tuple(t.shape) for t in (*got.deltas, got.energy, grads[0].weight)] == [(5, 6), (5, 3), (3, 2), (6, 4)]


# ---------------------------------------------------------------- gradients of energies


def test_layer_errors_energy_is_differentiable_its_gradients_are_not(gen: torch.Generator, layer_backend: str) -> None:
    phi, mu = inputs.normal(gen, 3, 4).requires_grad_(), inputs.normal(gen, 3, 4).requires_grad_()
    got = pck.layer_errors([phi], [mu], ["categorical"])
    scale = inputs.normal(gen, 3)
    by_phi, by_mu = torch.autograd.grad((got.energy[0] * scale).sum(), (phi, mu))
    want = truth.errors("categorical", phi, mu)
    torch.testing.assert_close(by_phi, want.grad_phi * scale[:, None])
    torch.testing.assert_close(by_mu, want.grad_mu * scale[:, None])
    with pytest.raises(RuntimeError, match=r"(?i)grad"):
        pck.layer_errors([phi], [mu], ["categorical"]).grad_mu[0].sum().backward()


# ---------------------------------------------------------------- compile, export


def _energies(phi: Tensor, mu: Tensor) -> Tensor:
    return pck.layer_energies([phi, phi], [mu, mu], ["gaussian", "categorical"])


def _errors(phi: Tensor, mu: Tensor) -> list[Tensor]:
    energy, grad_phi, grad_mu = pck.layer_errors([phi], [mu], ["laplace"])
    return [energy, *grad_phi, *grad_mu]


def _update(phi: Tensor, mu: Tensor) -> Tensor:
    state = phi.clone()
    pck.update_phi_([state], [mu], [0.1 * mu], ["categorical"], lr=0.1)
    return state


def _inference(phi: Tensor, mu: Tensor) -> list[Tensor]:
    layers = [pck.Layer(mu.T @ mu, activation="tanh"), pck.Layer(phi, energy="categorical")]
    result = pck.infer(mu, layers, target=torch.softmax(mu @ phi.T, 1), steps=4, trace=True)
    grads = pck.weight_grads(mu, layers, result)
    assert result.energy is not None
    return [*result.phis, *result.deltas, result.energy, *[grad.weight for grad in grads]]


FUNCTIONS = [_energies, _errors, _update, _inference]


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_whole(function: Callable, gen: torch.Generator) -> None:
    phi, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(phi, mu), function(phi, mu), rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_inductor(gen: torch.Generator) -> None:
    """torch's own compiler around an update in place: it must see the mutation."""
    phi, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    states = [phi.clone(), phi.clone()]

    def step(state: Tensor) -> Tensor:
        before = pck.layer_energies([state], [mu], ["gaussian"])
        pck.update_phi_([state], [mu], [None], ["gaussian"], lr=0.5)
        return before

    for _ in range(2):
        got, want = torch.compile(step, fullgraph=True)(states[0]), step(states[1])
        assert torch.equal(got, want)
        assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[0], 0.25 * phi + 0.75 * mu)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_replayed_by_torch_compile(infer_backend: str, gen: torch.Generator) -> None:
    """mode="reduce-overhead": a warm-up in the memory of its graphs, a capture, replays (on the CPU compiled code)."""
    if infer_backend == "reference":
        pytest.skip("nothing of it is compiled or kept")
    weights = [inputs.normal(gen, 6, 4).float(), inputs.normal(gen, 3, 6).float()]

    def deltas(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        layers = [pck.Layer(weights[0], activation="tanh"), pck.Layer(weights[1])]
        found = pck.infer(x, layers, target=target, steps=4)
        return (*found.deltas, pck.layer_energies([found.phis[0]], [2 * found.phis[0]], ["gaussian"]))

    compiled = torch.compile(deltas, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x, target = inputs.normal(gen, 5, 4).float(), inputs.normal(gen, 5, 3).float()
        got = [tensor.clone() for tensor in compiled(x, target)]  # the next call takes its memory
        for mine, right in zip(got, deltas(x, target), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("fresh_compiler")
def test_gradients_through_a_compiled_energy(gen: torch.Generator) -> None:
    phi, mu = inputs.normal(gen, 3, 4).requires_grad_(), inputs.normal(gen, 3, 4).requires_grad_()
    compiled = torch.compile(lambda a, b: _energies(a, b).sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(phi, mu), (phi, mu))
    one, two = truth.errors("gaussian", phi, mu), truth.errors("categorical", phi, mu)
    torch.testing.assert_close(got[0], one.grad_phi + two.grad_phi)
    torch.testing.assert_close(got[1], one.grad_mu + two.grad_mu)


@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_batch_compiles_once(gen: torch.Generator) -> None:
    compiled = torch.compile(_errors, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5, 9):
        phi, mu = inputs.normal(gen, batch, 4), inputs.normal(gen, batch, 4)
        torch.testing.assert_close(compiled(phi, mu), _errors(phi, mu))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_may_change_in_compiled_code(dynamic: bool | None, gen: torch.Generator) -> None:
    """As a learning rate does that follows a schedule."""
    phi, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    layers = [pck.Layer(inputs.normal(gen, 5, 4), activation="tanh"), pck.Layer(inputs.normal(gen, 4, 5))]

    def step(phi: Tensor, mu: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        state, speed = phi.clone(), torch.zeros_like(phi)
        pck.update_phi_([state], [mu], [None], ["gaussian"], lr=lr, momentum=lr / 2, velocities=[speed])
        scaled = [pck.Layer(layers[0].weight, activation="tanh", lr_scale=1 + lr), layers[1]]
        return state, pck.infer(phi, scaled, target=mu, steps=3, lr=lr, momentum=lr, tol=lr * 1e-9).deltas[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lr in (0.1, 0.05, 0.02):
        for mine, right in zip(compiled(phi, mu, lr), step(phi, mu, lr), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, phi: Tensor, mu: Tensor) -> Any:
        return self.function(phi, mu)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_exports(function: Callable, gen: torch.Generator) -> None:
    phi, mu = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    program = torch.export.export(_Module(function), (phi, mu))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert any("pc_kernels" in str(node.target) for graph in graphs for node in graph.nodes)
    other = inputs.normal(gen, 3, 4), inputs.normal(gen, 3, 4)
    torch.testing.assert_close(program.module()(*other), function(*other), rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- which backend


def _chosen() -> str:
    return pck.infer(torch.ones(1, 2), [pck.Layer(torch.eye(2))], steps=0).backend


def test_use_backend_nests_and_restores() -> None:
    outside = _chosen()
    with pck.use_backend("reference"):
        assert _chosen() == "reference"
        with pck.use_backend("auto"):
            assert _chosen() == outside
        assert _chosen() == "reference"
        with pytest.raises(KeyError), pck.use_backend("auto"):
            raise KeyError
        assert _chosen() == "reference"
    assert _chosen() == outside


needs_a_missing_backend = pytest.mark.skipif(set(ALL_BACKENDS) == set(INFER_BACKENDS), reason="all backends run here")


@needs_a_missing_backend
def test_use_backend_is_each_threads_own() -> None:
    """A thread does not see what another one chose."""
    missing = next(name for name in ALL_BACKENDS if name not in INFER_BACKENDS)
    seen: list[str] = []
    with pck.use_backend(missing):
        thread = threading.Thread(target=lambda: seen.append(_chosen()))
        thread.start()
        thread.join()
        with pytest.raises(pck.BackendUnavailable, match=missing):
            _chosen()
    assert seen == [_chosen()]


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | env,
    )  # fmt: skip


RUN = "import torch, pc_kernels as p; print(p.infer(torch.ones(1, 2), [p.Layer(torch.eye(2))], steps=0).backend)"


def test_the_environment_variable() -> None:
    good = _python(RUN, PC_KERNELS_BACKEND="reference")
    assert (good.returncode, good.stdout.strip()) == (0, "reference"), good.stderr
    for missing in [name for name in ALL_BACKENDS if name not in INFER_BACKENDS][:1]:
        refused = _python(RUN, PC_KERNELS_BACKEND=missing)
        assert refused.returncode != 0
        assert "BackendUnavailable" in refused.stderr
    unknown = _python(RUN, PC_KERNELS_BACKEND="fastest")
    assert unknown.returncode != 0
    last = unknown.stderr.strip().splitlines()[-1]
    assert "PC_KERNELS_BACKEND" in last
    assert "fastest" in last
    assert "reference" in last


def test_import_is_quiet_and_alone() -> None:
    """No pc_runner, no compiler, no device query, nothing printed."""
    code = "import json, sys, pc_kernels; print(json.dumps(sorted(sys.modules)))"
    done = _python(code)
    assert (done.returncode, done.stderr) == (0, "")
    modules = json.loads(done.stdout)
    assert "pc_kernels" in modules
    assert not [name for name in modules if name.split(".")[0] == "pc_runner" or name == "torch._inductor"]


def test_explain_names_the_backend_and_why_not_the_others(gen: torch.Generator, layers: Callable) -> None:
    nodes, x = inputs.paper("M3", gen, (3, 5, 4, 6, 2)), inputs.normal(gen, 2, 3)
    text = pck.explain(x, layers(nodes), steps=5)
    chosen = pck.infer(x, layers(nodes), steps=5).backend
    first = text.splitlines()[0]
    assert chosen in first
    for name in ALL_BACKENDS:
        line = next(line for line in text.splitlines() if name in line)
        assert name == chosen or len(line.split(name, 1)[1].strip(" :,-")) > 10, line  # a reason stands behind it
    with pck.use_backend("reference"):
        assert "reference" in pck.explain(x, layers(nodes), steps=5).splitlines()[0]


def test_build_info() -> None:
    info = pck.build_info()
    assert {"version", "backends", "cuda_architectures", "compiler", "torch"} <= set(info)
    assert "reference" in info["backends"]
    assert set(info["backends"]) <= set(ALL_BACKENDS)
    assert {entry.split(":")[0] for entry in info["not_yet_run_on_hardware"]} <= set(info["backends"])
    json.dumps(info)
    assert pck.build_info() == info


def test_what_is_compiled_runs() -> None:
    """A compiled C++ backend that refuses float32 and float64 on the CPU would make half of these tests vacuous."""
    assert "reference" in LAYER_BACKENDS
    assert "reference" in INFER_BACKENDS
    if "cpp" in pck.build_info()["backends"]:
        assert "cpp" in LAYER_BACKENDS
        with pck.use_backend("cpp"):
            pck.layer_errors([torch.ones(2, 3).double()], [torch.ones(2, 3).double()], ["gaussian"])
