# SPDX-License-Identifier: MIT
"""What a look at a module and a pass through it cost and meet: memory, shared memory, objects of any kind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from pc_runner import PCNetwork, engine
from pc_runner.contents import Contents
from test_nodes_contents import ALGORITHMS, Base, KeepingTaped, data
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


class Aliased(Base):
    """Two buffers in one memory: what is written to the one is read from the other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 8, dtype=torch.float64))
        self.row = self.cache[0]

    def read(self, h):
        self.row.copy_(torch.arange(8.0))
        return h + self.cache.sum(0)


class Adding(Base):
    def read(self, h):
        return h + torch.arange(8.0, dtype=torch.float64)


def test_tensors_that_share_memory_go_on_sharing_it():
    found = []
    for kind in (Aliased, Adding):
        torch.manual_seed(0)
        net, (x, y) = PCNetwork(kind().double(), output="categorical"), data()
        result = net.infer(x, y, steps=4)
        net.backward(result)
        found.append((*result.phis, net.module.a.weight.grad, result.energy))
    for mine, right in zip(*found, strict=True):
        assert torch.allclose(mine, right, rtol=1e-10, atol=1e-13)


def test_copies_end_with_their_pass_and_are_made_of_what_is_written():
    """Without the garbage collector, which tensors do not wake: a GPU's memory would run out."""
    net, (x, y) = PCNetwork(KeepingTaped().double(), output="categorical"), data()
    net.module.register_buffer("table", torch.ones(3, dtype=torch.float64))
    made, clone = [], Tensor.clone

    def counted(tensor, **options):
        copy = clone(tensor, **options)
        if tensor is net.module._buffers.get("table"):
            made.append(weakref.ref(copy))
        return copy

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "clone", counted)
            for algorithm in ALGORITHMS:
                net.backward(net.infer(x, y, steps=3, algorithm=algorithm))
        assert not [copy for copy in made if copy() is not None]
    finally:
        gc.enable()
    assert len(made) <= 2  # the passes before it was known that nobody writes to it


class Owned(Base):
    def read(self, h):
        return h * getattr(self, "scale", 1.0)


def test_a_module_that_knows_its_network(monkeypatch):
    count = []
    monkeypatch.setattr(engine, "trace_step", lambda *a, real=engine.trace_step: count.append(1) or real(*a))
    net, (x, y) = PCNetwork(Owned().double(), output="categorical"), data()
    vars(net.module)["owner"] = net
    for _ in range(4):
        net.infer(x, y, steps=2, state_optimizer="adam")
    assert len(count) == 1


class Anything:
    """A logger that answers whatever it is asked."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args):
        return Anything()


class Logging(Base):
    def __init__(self):
        super().__init__()
        self.log = Anything()

    def read(self, h):
        self.log.note("read")
        return h


LAST: Any = None


class Binding(Base):
    def read(self, h):
        global LAST
        LAST = h
        return h


@pytest.mark.parametrize("kind", [Logging, Binding])
def test_objects_of_any_kind_are_met(kind):
    net, (x, y) = PCNetwork(kind().double(), output="categorical"), data()
    for _ in range(3):
        net.backward(net.infer(x, y, steps=2))
    if kind is Binding:
        assert isinstance(LAST, Tensor)
        assert torch.isfinite(LAST).all()


class Named(Base):
    def read(self, h):
        return h + len(self.words)


def test_only_what_code_names_is_looked_at():
    net = PCNetwork(Named().double(), output="categorical")
    net.module.words, net.module.others = ["apple"] * 3, [("pear", i) for i in range(100_000)]
    key = repr(Contents(net.module).key)
    assert "apple" in key
    assert "pear" not in key


class Installed(Base):
    def __init__(self):
        super().__init__()
        self.tool = pytest  # an installed package, with many attributes

    def read(self, h):
        return h if self.tool.approx(1.0) == 1.0 else -h


def test_installed_packages_are_taken_to_stay():
    assert len(Contents(Installed().double()).key) < 1000
