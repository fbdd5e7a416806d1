# SPDX-License-Identifier: MIT
"""The language model: energies, states, gradients against float64 autograd of F; masks; the output as one operator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode, engine
from pc_runner.head import head_energy
from pc_runner.models.transformer import build
from pc_runner.walk import State
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import nets
from tests import transformer_truth as truth

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, TOKENS = 23, 5
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two blocks of two heads": {"blocks": 2, "heads": 2},
    "tied": {"tied": True},
    "nodes on projections": {"projections": True, "heads": 2},
}


def problem(method: str, **shape: Any) -> tuple[PCNetwork, Tensor, Tensor, Tensor, truth.Shape]:
    """Network, tokens, targets, rows that count; float64. Sample 0 counts one token, sample 2 all."""
    net = build(method, VOCABULARY, seed=2, tokens=TOKENS, hidden=8, intermediate=12, **shape).double()
    gen = torch.Generator().manual_seed(0)
    for parameter in net.parameters():  # away from 0 and 1, where LayerNorms and biases start
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=gen, dtype=torch.float64)
    x, y = (torch.randint(VOCABULARY, (3, TOKENS), generator=gen) for _ in range(2))
    rows = torch.arange(TOKENS) < torch.tensor([1, 3, TOKENS])[:, None]
    kind = truth.Shape(shape.get("heads", 1), method == "pc_f", shape.get("projections", False))
    return net, x, y, rows, kind


def infer(net: PCNetwork, x: Tensor, y: Tensor, rows: Tensor, **settings: Any) -> Any:
    return net.infer(x, y, masks={"output": rows.unsqueeze(-1)}, **settings)


def parameters(net: PCNetwork) -> dict[str, Tensor]:
    """By name; a tied weight under both of its names."""
    return dict(net.module.named_parameters(remove_duplicate=False))


def gradients(p: dict[str, Tensor], total: Tensor, batch: int) -> dict[str, Tensor]:
    names = list({id(value): name for name, value in reversed(p.items())}.values())
    found = torch.autograd.grad(total / batch, [p[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["pc_fkl", "pc_f"])
def test_inference_and_gradients_are_autograd_of_f(method: str, shape: str) -> None:
    net, x, y, rows, kind = problem(method, **SHAPES[shape])
    result = infer(net, x, y, rows, steps=5, lr=0.2)
    now, trace = truth.settle(parameters(net), x, y, rows, kind, [0.2] * 5)
    assert result.names == [*now.phis, "output"]
    assert trace[0, :-1].abs().max() < 1e-20
    for name, got in zip(result.names, result.phis[:-1], strict=False):
        torch.testing.assert_close(got, now.phis[name].detach(), rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(result.energy, trace, rtol=1e-9, atol=1e-11)
    net.backward(result)
    assert nets.furthest(nets.collected(net), gradients(parameters(net), now.total, len(x))) < 1e-9


def test_one_rate_per_move() -> None:
    net, x, y, rows, kind = problem("pc_fkl")
    rates = [1.0, 1.0, 0.5, 0.1]
    result = infer(net, x, y, rows, steps=4, lr=rates)
    now, trace = truth.settle(parameters(net), x, y, rows, kind, rates)
    torch.testing.assert_close(result.energy, trace, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.phis[1], now.phis["blocks.0.intermediate"].detach(), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"lr: wanted a number, or 4 of them.*got 2 numbers"):
        infer(net, x, y, rows, steps=4, lr=[1.0, 0.1])
    with pytest.raises(ValueError, match="lr: wanted"):
        infer(net, x, y, rows, steps=2, lr=[1.0, float("nan")])


@pytest.mark.parametrize("method", ["bp", "pc_f"])
def test_backpropagation_is_autograd_of_the_whole_logits(method: str) -> None:
    net, x, y, rows, _ = problem(method)
    net.backward(infer(net, x, y, rows, algorithm="bp"))
    logits = net(x)
    if method == "bp":
        loss = F.cross_entropy(logits[rows], y[rows], reduction="sum")
    else:
        loss = 0.5 * (logits.softmax(-1) - F.one_hot(y, VOCABULARY))[rows].square().sum()
    wanted = gradients(parameters(net), loss, len(x))
    assert nets.furthest(nets.collected(net), wanted) < 1e-10


@pytest.mark.parametrize("method", ["pc_fkl", "pc_f"])
def test_the_future_has_no_part(method: str) -> None:
    """A row that sees one token, padding and later tokens: exact zeros, nothing but finite numbers."""
    net, x, y, rows, _ = problem(method)
    result = infer(net, x, y, rows, steps=6, lr=0.5)
    start = infer(net, x, y, rows, steps=0)
    hidden = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    scores, before = result.phis[0], start.phis[0]
    assert torch.equal(scores[..., hidden], before[..., hidden])  # masked entries do not move
    assert not torch.equal(scores, before)
    seen = net.module.blocks[0].attention.scores.value(scores, ~hidden)
    assert method == "pc_f" or bool((seen[..., hidden] == 0).all())
    assert all(phi.isfinite().all() for phi in result.phis)
    net.backward(result)
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    torch.testing.assert_close(net(changed)[:, :-1], net(x)[:, :-1], rtol=0, atol=0)


def test_padding_does_not_matter() -> None:
    """Whatever stands in rows that do not count, behind those that do."""
    net, x, y, rows, _ = problem("pc_fkl")
    other_x, other_y = x.clone(), y.clone()
    other_x[0, 2:], other_y[0, 1:] = 7, -1
    grads = []
    for tokens, targets in ((x, y), (other_x, other_y)):
        result = infer(net, tokens, targets, rows, steps=4, lr=0.3)
        net.backward(result)
        grads.append((result.energy[:, -1], nets.collected(net)["decoder.weight"]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_methods_start_from_the_same_weights() -> None:
    states = [build(method, VOCABULARY, seed=1, tokens=TOKENS, hidden=8).state_dict() for method in ("bp", "pc_f")]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("method", ["pc_fkl", "pc_f"])
def test_a_step_is_traced_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a chain leaves nothing in the module, which would make every inference one of a new module."""
    net, x, y, rows, _ = problem(method)
    count = []
    monkeypatch.setattr(engine, "trace_step", lambda *a, real=engine.trace_step: count.append(1) or real(*a))
    before = set(vars(net.module))
    for _ in range(3):
        infer(net, x, y, rows, steps=1)
    assert set(vars(net.module)) == before
    assert len(count) == 1


# ------------------------------------------------------------------------------------------ the output as one operator


class Classifier(nn.Module):
    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.up, self.out, self.node = nn.Linear(4, 5), nn.Linear(5, classes), PCNode("gaussian")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.node(torch.tanh(self.up(x))))


def twins() -> tuple[PCNetwork, PCNetwork, Tensor, Tensor]:
    """The same network with and without `linear`, float64."""
    torch.manual_seed(0)
    module = Classifier().double()
    one, whole = PCNetwork(module, output=PCNode("categorical", linear="out")), copy.deepcopy(module)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(6, (7,))
    return one, PCNetwork(whole, output=PCNode("categorical")), x, y


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("algorithm", ["pc", "fixed_prediction", "zil", "epc", "bp"])
def test_every_algorithm_takes_it(algorithm: str, soft: bool) -> None:
    one, whole, x, y = twins()
    target = torch.rand(7, 6, dtype=torch.float64).softmax(-1) if soft else y
    results = [net.infer(x, target, steps=4, algorithm=algorithm) for net in (one, whole)]
    torch.testing.assert_close(results[0].energy, results[1].energy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[0].phis[0], results[1].phis[0], rtol=1e-10, atol=1e-12)
    grads = []
    for net, result in zip((one, whole), results, strict=True):
        net.backward(result)
        grads.append(nets.collected(net))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_ipc_takes_it() -> None:
    one, whole, x, y = twins()
    for net in (one, whole):
        net.infer(x, y, steps=3, algorithm="ipc", optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    for got, wanted in zip(one.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_rows_of_different_weight() -> None:
    """`pc_runner` sums rows; whoever weighs them gets the weighted gradients, not the sum's."""
    one, _, _, y = twins()
    layer, weights = one.module.out, torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    for energy in ("categorical", "gaussian"):
        node = PCNode(energy, linear="out")
        v = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        mask = torch.arange(7)[:, None] != 3
        state = State("output", node, v.detach(), y, True, None, mask, None, False, head=layer)
        got = torch.autograd.grad((head_energy(state, v) * weights).sum(), [v, layer.weight, layer.bias])
        q, o = layer(v).softmax(-1), F.one_hot(y, 6)
        each = 0.5 * (q - o).square().sum(-1) if energy == "gaussian" else -(o * q.log()).sum(-1)
        wanted = torch.autograd.grad((each * weights * mask[:, 0]).sum(), [v, layer.weight, layer.bias])
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_without_a_target_it_is_an_ordinary_node() -> None:
    one, whole, x, _ = twins()
    free, plain = one.infer(x, steps=2), whole.infer(x, steps=2)
    torch.testing.assert_close(free.phis, plain.phis)
    assert free.phis[-1].shape == (7, 6)
    torch.testing.assert_close(one(x), whole(x))


class Elsewhere(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def net_of(energy: str, linear: str, module: type[nn.Module] = Classifier) -> PCNetwork:
    return PCNetwork(module(), output=PCNode(energy, linear=linear))


INDICES = torch.zeros(7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "y", "says"),
    [
        (lambda: net_of("categorical", "nowhere"), INDICES, r"linear: wanted.*up, out"),
        (lambda: net_of("categorical", "out", Elsewhere), INDICES, "'output': wanted the result"),
        (lambda: net_of("gaussian", "out"), None, "y: wanted a target"),
        (lambda: net_of("categorical", "out"), INDICES + 6, r"y: wanted class indices 0\.\.5, got 6"),
        (lambda: net_of("categorical", "out"), INDICES - 1, "got -1"),
        (lambda: net_of("categorical", "out"), torch.zeros(7, 5), r"y: wanted class indices \(7,\)"),
        (lambda: net_of("laplace", "out"), INDICES, "linear: wanted None unless"),
    ],
)
def test_bad_use_is_one_line(make: Any, y: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        make().infer(torch.randn(7, 4), y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["pc_fkl", "pc_f"])
def test_nothing_but_the_operator_sees_logits(method: str) -> None:
    """No tensor (..., classes) of rows is made by an inference or its backward, outside of the one operator."""
    shapes: list[torch.Size] = []
    ops: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            ops.add(str(func))
            shapes.extend(t.shape for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    net, x, y, rows, _ = problem(method)
    with Watch():
        net.backward(infer(net, x, y, rows, steps=3))
    assert "pc_kernels.linear_softmax_errors.default" in ops
    assert not [shape for shape in shapes if len(shape) > 1 and shape[-1] == VOCABULARY]
