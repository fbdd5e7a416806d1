# SPDX-License-Identifier: MIT
"""What forward reads and changes beside its inputs: a trace follows what it reads, and no pass leaves a change."""

from __future__ import annotations

import functools
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode, engine
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = {"scale": 1.0, "decorated": 1.0}
RECORDS: list[torch.Tensor] = []


class Mode(Enum):
    ONE, FIVE = 1.0, 5.0


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k


@torch.no_grad()
def decorated():
    return SETTING["decorated"]


def helper(h):
    return h * SETTING["scale"]


class Base(nn.Module):
    """mu = tanh(a(x)), out = b(phi) + 0: no chain, so that its step is traced. Subclasses read or keep something."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Linear(7, 8), nn.Linear(8, 5), PCNode("gaussian")

    def read(self, h):
        return h

    def forward(self, x):
        return self.b(self.read(self.n(torch.tanh(self.a(x))))) + 0


def data(batch=6):
    torch.manual_seed(0)
    return torch.randn(batch, 7).double(), torch.randint(0, 5, (batch,))


def outcome(mu, out, y, parameters, steps=5):
    """phi after the moves, and dF/dp / B, by autograd of F = |phi - mu|^2 / 2 + CE(out(phi), y)."""
    phi = mu.detach().clone()
    for _ in range(steps):
        leaf = phi.clone().requires_grad_()
        total = 0.5 * (leaf - mu.detach()).square().sum() + F.cross_entropy(out(leaf), y, reduction="sum")
        phi = phi - 0.1 * torch.autograd.grad(total, leaf)[0]
    total = 0.5 * (phi - mu).square().sum() + F.cross_entropy(out(phi), y, reduction="sum")
    return phi, torch.autograd.grad(total / len(y), parameters)


def check(net, x, y, mu, out, algorithm="pc"):
    """`infer` and `backward` are autograd of F with this mu and out(phi)."""
    m = net.module
    parameters = [m.a.weight, m.a.bias, m.b.weight, m.b.bias]
    phi, grads = outcome(mu, out, y, parameters)
    net.zero_grad()
    result = net.infer(x, y, steps=5, algorithm=algorithm)
    net.backward(result)
    assert torch.allclose(result.phis[0], phi, rtol=1e-10, atol=1e-12)
    for p, g in zip(parameters, grads, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)
    return result


def scaled(net, x, y, scale):
    m = net.module
    return check(net, x, y, torch.tanh(m.a(x)), lambda phi: m.b(phi * scale))


# ------------------------------------------------------------------------------------------------- what a trace follows


class Plain(Base):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.table, self.entries, self.pair = {"a": {"b": 1.0}}, [[1.0]], (1, (1.0,))
        self.space, self.slotted, self.mode = SimpleNamespace(k=1.0), Slotted(1.0), Mode.ONE
        self.call, self.tensors = functools.partial(torch.mul, other=1.0), {"t": [torch.ones(8).double()]}

    def read(self, h):
        h = h * self.table["a"]["b"] * self.entries[0][0] * self.pair[1][0] * self.space.k * self.factor
        h = h * self.slotted.k * self.mode.value * decorated()
        return helper(self.call(h) * self.tensors["t"][0])


def change(name, net, patch):
    m = net.module
    if name == "dict":
        m.table["a"]["b"] = 5.0
    elif name == "list":
        m.entries[0][0] = 5.0
    elif name == "tuple":
        m.pair = (1, (5.0,))
    elif name == "object":
        m.space.k = 5.0
    elif name == "slot":
        m.slotted.k = 5.0
    elif name == "enumeration":
        m.mode = Mode.FIVE
    elif name == "under a library's decorator":
        patch.setitem(SETTING, "decorated", 5.0)
    elif name == "class attribute":
        patch.setattr(Plain, "factor", 5.0)
    elif name == "global of a function":
        patch.setitem(SETTING, "scale", 5.0)
    elif name == "function":
        patch.setitem(globals(), "helper", lambda h: h * 5.0)
    elif name == "partial":
        m.call = functools.partial(torch.mul, other=5.0)
    elif name == "tensor in place":
        m.tensors["t"][0].mul_(5)
    elif name == "tensor replaced":
        m.tensors["t"][0] = torch.full((8,), 5.0).double()
    elif name == "hook":
        m.n.register_forward_hook(lambda module, given, out: out * 5)
    elif name == "method":
        patch.setattr(Plain, "read", lambda self, h: h * 5)
    elif name == "forward":
        m.forward = lambda x: m.b(5 * m.n(torch.tanh(m.a(x)))) + 0
    else:
        raise AssertionError(name)


CHANGES = [
    "dict", "list", "tuple", "object", "class attribute", "global of a function", "function", "partial",
    "tensor in place", "tensor replaced", "hook", "method", "forward", "slot", "enumeration",
    "under a library's decorator",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_trace_follows_what_forward_reads(name, monkeypatch):
    net, (x, y) = PCNetwork(Plain().double(), output="categorical"), data()
    assert scaled(net, x, y, 1.0).backend == "traced"
    change(name, net, monkeypatch)
    assert scaled(net, x, y, 5.0).backend == "traced"


class Called(Base):
    act = None

    def forward(self, x):
        return self.b(self.n(self.act(self.a(x)))) + 0


def test_functions_that_come_and_go_are_not_taken_for_one_another():
    net, (x, y) = PCNetwork(Called().double(), output="categorical"), data()
    for k in range(1, 25):
        net.module.act = None  # the place in memory of the last one is free now
        net.module.act = lambda v, k=k: torch.tanh(k * v)
        check(net, x, y, torch.tanh(k * net.module.a(x)), net.module.b)
    cell = {"k": 2.0}
    net.module.act = lambda v: torch.tanh(cell["k"] * v)
    for cell["k"] in (2.0, 3.0):
        check(net, x, y, torch.tanh(cell["k"] * net.module.a(x)), net.module.b)


class Nested(Base):
    def forward(self, x, more):
        return self.b(self.n(torch.tanh(self.a(x)))) * more["w"][0] * more["k"]


class Carrier:
    def __init__(self, w):
        self.w = w


class Carried(Base):
    def forward(self, x, more):
        return self.b(self.n(torch.tanh(self.a(x)))) * more.w


def test_tensors_nested_in_the_inputs_are_inputs():
    (x, y), net = data(300), PCNetwork(Nested().double(), output="categorical")
    m, w = net.module, torch.rand(300, 5).double() + 0.5
    other = w.clone()
    other[10:-10] *= 3  # the same printed form
    for now, k in ((w, 1.0), (other, 1.0), (other, 2.0)):
        inputs = (x, {"w": [now], "k": k})
        result = check(net, inputs, y, torch.tanh(m.a(x)), lambda phi, now=now, k=k: m.b(phi) * now * k)
        assert result.backend == "traced"
    net = PCNetwork(Carried().double(), output="categorical")
    m = net.module
    for now in (w, other):
        result = check(net, (x, Carrier(now)), y, torch.tanh(m.a(x)), lambda phi, now=now: m.b(phi) * now)
        assert result.backend == "taped"


# ------------------------------------------------------------------------------------------------- what no pass changes


class Keeping(Base):
    """Everything that code may keep: a kept activation, a list, a count, buffers moved in place and replaced."""

    def __init__(self):
        super().__init__()
        self.last, self.log, self.calls, self.seen = None, [], 0, {}
        self.space, self.sub = SimpleNamespace(h=None), nn.Tanh()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("ema", torch.ones(8))
        self.register_forward_hook(lambda module, given, out: RECORDS.append(out))

    def forward(self, x):
        h = self.sub(self.a(x))
        self.sub.feature = self.space.h = self.last = h
        self.log.append(h)
        self.seen[len(self.log)] = h
        self.calls += 1
        self.count += 1
        if self.training:
            self.ema = 0.5 * self.ema + 0.5 * h.detach().mean(0)
        return self.finish(self.n(h * self.count) * self.ema)

    def finish(self, v):
        return self.b(v) + 0


class KeepingChain(Keeping):
    def forward(self, x):
        self.last = self.sub.feature = self.space.h = h = self.sub(self.a(x))
        self.log.append(h)
        self.calls += 1
        return self.b(self.n(h))


class KeepingTaped(Keeping):
    def finish(self, v):
        return self.b(v) if v.sum() > -1e9 else v


def shape_of(value):
    """All that the module is, by value."""
    if isinstance(value, nn.Module):
        return {k: shape_of(v) for k, v in vars(value).items()}
    if isinstance(value, SimpleNamespace):
        return shape_of(vars(value))
    if isinstance(value, dict):
        return {k: shape_of(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shape_of(v) for v in value]
    if isinstance(value, torch.Tensor):
        return id(value), type(value), value.tolist()
    return value


ALGORITHMS = ["pc", "epc", "zil", "fixed_prediction", "bp"]


@pytest.mark.parametrize("kind", [Keeping, KeepingChain, KeepingTaped])
def test_infer_and_backward_leave_the_module_as_it_was(kind):
    net, (x, y) = PCNetwork(kind().double(), output="categorical"), data()
    for calls in range(2):  # before the first plain pass, and after it
        before, records = shape_of(net.module), len(RECORDS)
        for algorithm in ALGORITHMS:
            net.backward(net.infer(x, y, steps=3, algorithm=algorithm))
        net.infer(x, y, steps=3, algorithm="ipc", optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
        net.explain(x, y)
        net.zero_grad()
        assert shape_of(net.module) == before
        assert len(RECORDS) == records
        net(x)
        assert net.module.calls == len(net.module.log) == calls + 1
        assert net.module.last is net.module.space.h


@pytest.mark.parametrize("kind", [Keeping, KeepingTaped])
def test_every_pass_starts_from_the_buffers_before_it(kind):
    net, (x, y) = PCNetwork(kind().double(), output="categorical"), data()
    m = net.module
    for _ in range(2):
        h = torch.tanh(m.a(x))
        ema = (0.5 * m.ema + 0.5 * h.mean(0)).detach()
        mu = h * (m.count + 1)
        result = check(net, x, y, mu, lambda phi, ema=ema: m.b(phi * ema))
        assert result.backend == ("traced" if kind is Keeping else "taped")
        net(x)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.i, self.n, self.o = nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, track_running_stats=True), None, None
        self.n, self.o = PCNode("gaussian"), nn.Linear(15, 5)

    def forward(self, x):
        return self.o(self.i(self.n(self.c(x))).flatten(1))


def test_instance_norm_keeps_its_running_statistics():
    torch.manual_seed(0)
    net, x, y = PCNetwork(Norm().double(), output="categorical"), torch.randn(6, 2, 7).double(), data()[1]
    before = {k: v.clone() for k, v in net.module.i.state_dict().items()}
    net.backward(net.infer(x, y, steps=3))
    assert all(torch.equal(v, before[k]) for k, v in net.module.i.state_dict().items())


class InPlace(Base):
    def forward(self, x):
        x.sub_(1.0)
        return self.b(self.n(torch.tanh(self.a(x)))) + 0


@pytest.mark.parametrize("algorithm", ["pc", "zil"])
def test_what_forward_changes_of_its_input_stays_its_own(algorithm):
    net, x = PCNetwork(InPlace().double(), output="gaussian"), data()[0]
    m, kept, target = net.module, x.clone(), torch.randn(6, 5).double()
    result = net.infer(x, target, steps=5, algorithm=algorithm)
    net.backward(result)
    assert torch.equal(x, kept)
    plain = PCNetwork(Base().double(), output="gaussian")
    plain.module.load_state_dict(m.state_dict())
    other = plain.infer(x - 1, target, steps=5, algorithm=algorithm)
    plain.backward(other)
    assert torch.allclose(result.phis[0], other.phis[0], rtol=1e-12, atol=1e-14)
    for p, q in zip(m.parameters(), plain.module.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_what_forward_keeps_does_not_trace_it_again(monkeypatch):
    count = []
    monkeypatch.setattr(engine, "trace_step", lambda *a, real=engine.trace_step: count.append(1) or real(*a))
    module = Keeping().double()
    module._forward_hooks.clear()
    module.forward = functools.partial(kept_once, module)
    kept = {}
    module.a.register_forward_hook(lambda module, given, out: kept.update(a=out))
    net, (x, y) = PCNetwork(module, output="categorical"), data()
    net(x)
    for _ in range(3):
        net.backward(net.infer(x, y, steps=2))
        net(x)  # another kept activation each time
    assert len(count) == 1


def kept_once(module, x):
    module.last = module.sub.feature = module.space.h = h = module.sub(module.a(x))
    module.count += 1
    return module.finish(module.n(h) * module.ema)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.LazyLinear(8), nn.LazyLinear(5), PCNode("gaussian")

    def forward(self, x):
        return self.b(self.n(torch.tanh(self.a(x)))) + 0


def test_lazy_layers_are_made_by_the_first_inference():
    net, (x, y) = PCNetwork(Lazy().double(), output="categorical"), data()
    net.infer(x, y, steps=1)
    assert type(net.module.a) is nn.Linear
    check(net, x, y, torch.tanh(net.module.a(x)), net.module.b)
