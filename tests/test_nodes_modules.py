# SPDX-License-Identifier: MIT
"""What modules with nodes may contain, what can be clamped, and what is refused."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from pc_runner import Pair, PCNetwork, PCNode
from pc_runner.residual import mupc_scales, residual_mlp
from torch import nn
from torch.distributions import Laplace, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from tests import nets, truth

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter(TorchDispatchMode):
    """Products by operator, and every gradient that has a weight's shape, seen from outside."""

    def __init__(self, weights):
        super().__init__()
        self.shapes, self.products, self.weight_gradients = {tuple(w.shape) for w in weights}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "bmm", "convolution", "_trilinear"):
            self.products += 1
            self.weight_gradients += name == "mm" and tuple(out.shape) in self.shapes
        if name == "convolution_backward":
            self.products += sum(args[10])
            self.weight_gradients += args[10][1]
        return out


# once: all that depends on x alone. A step: one product per layer below which something moves, forward and backward.
BOUNDS = {"LeNet": (1, 3 + 3), "Residual": (1, 3 + 3), "Dag": (1, 4 + 5), "Attention": (4, 5 + 5)}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_does_the_least_products_and_no_weight_gradient(name):
    net, x, y = nets.make(name)
    net.infer(x, y, steps=1, trace=False)  # traced now
    counts = []
    for steps in (0, 1, 2, 7):
        with Counter(net.module.parameters()) as counter:
            result = net.infer(x, y, steps=steps, trace=False)
        counts.append(counter.products)
        assert counter.weight_gradients == 0
        assert result.work.products == BOUNDS[name][0] + steps * BOUNDS[name][1]
    once = counts[0]  # the forward pass among them
    assert [count - once for count in counts] == [steps * BOUNDS[name][1] for steps in (0, 1, 2, 7)]
    assert f"traced: {BOUNDS[name][0]} products once per inference" in net.explain(x, y)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop, self.n, self.m = nn.Dropout(0.5), PCNode("gaussian"), PCNode("gaussian")

    def forward(self, x):
        return self.c(self.drop(self.m(torch.tanh(self.b(self.n(self.drop(torch.tanh(self.a(x)))))))))


def test_dropout_draws_one_mask_per_inference():
    module = Dropping().double()
    net = PCNetwork(module, output="gaussian")
    x, y = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    torch.manual_seed(5)
    result = net.infer(x, y, steps=6)
    net.backward(result)
    torch.manual_seed(5)
    masks = [(torch.empty(4, 8, dtype=torch.float64).bernoulli_(0.5) * 2) for _ in range(2)]
    phis = [torch.tanh(module.a(x)).detach() * masks[0], None]
    phis[1] = torch.tanh(module.b(phis[0])).detach()
    for step in range(7):
        n, m = (p.clone().requires_grad_() for p in phis)
        mus = [torch.tanh(module.a(x)) * masks[0], torch.tanh(module.b(n)), module.c(m * masks[1])]
        total = sum(0.5 * (a - b).square().sum() for a, b in zip([n, m, y], mus, strict=True))
        if step < 6:
            phis = [p.detach() - 0.1 * g for p, g in zip([n, m], torch.autograd.grad(total, [n, m]), strict=True)]
    for got, wanted in zip(result.phis, phis, strict=False):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    for p, g in zip(module.parameters(), torch.autograd.grad(total / 4, list(module.parameters())), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)
    other = net.infer(x, y, steps=6)
    assert not torch.allclose(other.phis[0], result.phis[0])  # the next inference draws its own
    module.eval()
    assert net.infer(x, y, steps=2).backend == "cpp"  # nothing is dropped now: a chain again


def test_batch_norm_uses_its_running_statistics_and_leaves_them_alone():
    net, x, y = nets.make("LeNet")
    still = net.infer(x, y, steps=4).phis
    net.module.train()
    before = net.module.norm.running_mean.clone()
    result = net.infer(x, y, steps=4)
    net.backward(result)
    assert net.module.norm.training
    assert torch.equal(before, net.module.norm.running_mean)
    for a, b in zip(result.phis, still, strict=True):
        assert torch.equal(a, b)


class TwoEnds(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 3)
        self.mid = PCNode("gaussian")

    def forward(self, x, z):
        h = self.mid(torch.tanh(self.a(x) + self.b(z)))
        return self.c(h), self.d(h)


def test_several_inputs_and_outputs():
    module = TwoEnds().double()
    net = PCNetwork(module, output=["gaussian", "categorical"])
    x, z, y = torch.randn(3, 4).double(), torch.randn(3, 3).double(), torch.randn(3, 2).double()
    labels = torch.tensor([0, 2, 1])
    result = net.infer((x, z), (y, labels), steps=5)
    phi = torch.tanh(module.a(x) + module.b(z)).detach()
    mu = phi.clone()
    for _ in range(5):
        h = phi.clone().requires_grad_()
        ends = 0.5 * (y - module.c(h)).square().sum() + F.cross_entropy(module.d(h), labels, reduction="sum")
        phi = phi - 0.1 * torch.autograd.grad(ends + 0.5 * (h - mu).square().sum(), h)[0]
    assert torch.allclose(result.phis[0], phi, rtol=1e-10, atol=1e-12)
    assert result.names == ["mid", "output[0]", "output[1]"]
    half = net.infer((x, z), (None, labels), steps=5)
    assert torch.allclose(half.phis[1], module.c(half.phis[0]), rtol=0.5, atol=0.5)
    assert not torch.equal(half.phis[0], result.phis[0])


@pytest.mark.parametrize("name", ["Residual", "Dag", "Attention"])
def test_any_node_can_be_clamped_whole_or_in_part(name):
    net, x, y = nets.make(name, "euclidean")
    first = next(iter(net.module.pc))
    start = net.infer(x, y, steps=0).phis[0]
    value = start + 0.3
    if net.module.families[first] == "gaussian":
        whole = net.infer(x, y, steps=5, clamp={f"pc.{first}": True}, phis={f"pc.{first}": value})
        assert torch.equal(whole.phis[0], value)
        now, _ = clamped_truth(net, x, y, first, value, torch.ones_like(value, dtype=torch.bool))
        for got, wanted in zip(whole.phis, now.phis.values(), strict=True):
            assert torch.allclose(got.double(), wanted.double(), rtol=1e-9, atol=1e-11)
    hold = torch.arange(value.shape[-1]) % 2 == 0
    part = net.infer(x, y, steps=5, clamp={f"pc.{first}": hold}, phis={f"pc.{first}": value})
    now, _ = clamped_truth(net, x, y, first, value, hold.expand_as(value))
    for got, wanted in zip(part.phis, now.phis.values(), strict=True):
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-9, atol=1e-11)


def clamped_truth(net, x, y, first, value, hold):
    phis = {first: value.clone().requires_grad_()}
    now = nets.look(net.module, x, y, phis)
    for _ in range(5):
        steps = nets.moves(net.module, now, y, natural=False)
        steps[first] = steps[first].masked_fill(hold, 0.0)
        phis = {n: (now.phis[n] - 0.1 * g).detach().requires_grad_() for n, g in steps.items()}
        now = nets.look(net.module, x, y, phis)
    return now, phis


def test_learned_variances_of_a_convolution_are_autograd_of_f():
    torch.manual_seed(2)
    node = PCNode("gaussian_diag", log_var=torch.randn(3, 1, 1).double())
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), node, nn.Flatten(), nn.Linear(48, 2)).double()
    net = PCNetwork(module, output=PCNode("gaussian_diag", log_var=torch.randn(2).double()))
    x, y = torch.randn(4, 1, 6, 6).double(), torch.randn(4, 2).double()
    result = net.infer(x, y, steps=3)
    net.backward(result)
    mu, out = torch.relu(module[0](x)), module[4](result.phis[0].flatten(1))
    total = truth.energy("gaussian_diag", result.phis[0], mu, node.log_var.expand(3, 4, 4)).sum()
    total = total + truth.energy("gaussian_diag", y, out, net.nodes[0].log_var).sum()
    parameters = list(net.parameters())
    for p, g in zip(parameters, torch.autograd.grad(total / 4, parameters), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [None, 3])
def test_pairs_of_distributions(samples):
    """Laplace states of scale 1/2 under a Normal prediction: torch knows that KL; Eq. 8 samples the cross-entropy."""
    pair = Pair(lambda phi: Laplace(phi, 0.5), lambda mu: Normal(mu, 2.0), samples)
    torch.manual_seed(0)
    a, b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    net = PCNetwork(nn.Sequential(a, nn.Tanh(), PCNode(pair), b), output="gaussian")
    x, y = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    result = net.infer(x, y, steps=4)
    mu = torch.tanh(a(x))
    d = result.phis[0] - mu
    if samples is None:  # E[(z - mu)^2] = d^2 + 2 b^2 of a Laplace variable z
        kl = 0.5 * math.log(2 * math.pi * 4) + (d * d + 0.5) / 8 - 1  # the entropy 1 + ln 2b is 1 for b = 1/2
        assert torch.allclose(result.energy[-1, 0], kl.sum(1).mean(), rtol=1e-9)
    phi = mu.detach()
    for _ in range(4):  # the samples are phi + noise, the noise drawn once: dE/dphi = (mean of samples - mu) / 4
        g = (phi - mu.detach()) / 4
        if samples is not None:
            g = g + noise_mean(result, net, mu, phi) / 4
        back = -(y - b(phi)) @ b.weight
        phi = phi - 0.1 * (g + back)
    assert torch.allclose(result.phis[0], phi.detach(), rtol=1e-8, atol=1e-10)
    net.backward(result)
    assert a.weight.grad.abs().sum() > 0


def noise_mean(result, net, mu, phi):
    """The samples' mean offset, read off one more evaluation: it is the same at every step."""
    node = net.module[2]
    leaf = phi.detach().requires_grad_()
    seed = result.learn.__closure__[0].cell_contents.nodes.seed
    value = node.energy.energy(leaf, mu.detach(), seed=seed)
    return 4 * torch.autograd.grad(value.sum(), leaf)[0] - (phi - mu.detach())


def test_compiled_copied_and_stored_networks_infer_alike(tmp_path):
    net, x, y = nets.make("Residual")
    wanted = net.infer(x, y, steps=3).energy
    stored = io.BytesIO()
    torch.save(net, stored)
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    compiled = PCNetwork(torch.compile(net.module, backend="eager"), output="gaussian")
    assert torch.allclose(compiled(x), net(x))
    for other in (copy.deepcopy(net), loaded, compiled):
        assert torch.allclose(other.infer(x, y, steps=3).energy, wanted, rtol=1e-12)
    with torch.no_grad():
        net.module.up.weight.mul_(2)
    net.module.out = nn.Linear(6, 3).double()
    _, rows = nets.settle(net.module, x, y, 3, 0.1)
    assert torch.allclose(net.infer(x, y, steps=3).energy, rows, rtol=1e-9, atol=1e-12)  # parameters are read anew


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_what_inductor_compiles_infers_and_learns_alike():
    net, x, y = nets.make("Residual")

    def outcome(on):
        with torch.no_grad():
            found = [on(x)]
        result = on.infer(x, y, steps=3)
        on.backward(result)
        found += [*result.phis, result.energy, *(p.grad.clone() for p in net.parameters())]
        net.zero_grad()
        return found

    wanted = outcome(net)
    for compiled in (torch.compile(net), PCNetwork(torch.compile(net.module), output="gaussian")):
        for a, b in zip(outcome(compiled), wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


class Wrong(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.n, self.kind, self.unused = nn.Linear(3, 3), PCNode("gaussian"), kind, None
        if kind == "unreached":
            self.unused = PCNode("gaussian")

    def forward(self, x):
        h = self.n(self.fc(x))
        return self.n(h) if self.kind == "twice" else (h, h) if self.kind == "two" else h


X, Y = torch.randn(2, 3), torch.randn(2, 3)
REFUSED = {
    "twice": ({}, "node 'n': wanted one call in a forward pass, got a second one"),
    "unreached": ({}, "node 'unused': wanted a call in the forward pass, got none"),
    "two": ({}, "output: wanted 2 nodes, as the module returns, got 1"),
    "fine": ({"algorithm": "ipc"}, "optimizer: wanted a torch optimiser"),
    "lr": ({"algorithm": "zil", "lr": 0.5}, "lr: wanted 1 and no momentum"),
    "names": ({"clamp": {"m": True}, "phis": {"m": X}}, "wanted names out of n, output, got 'm'"),
    "values": ({"clamp": {"n": True}}, "phis['n']: wanted the values to hold"),
    "form": ({"phis": {"n": X[:, :2]}}, "phis['n']: wanted a state"),
    "momentum": ({"state_optimizer": "adam", "momentum": 0.5}, "momentum: wanted 0 with Adam"),
    "optimizer": ({"state_optimizer": "rmsprop"}, "state_optimizer: wanted None, 'sgd', 'adam'"),
    "steps": ({"steps": -1, "algorithm": "epc"}, "steps: wanted a whole number >= 0"),
    "bp": ({"algorithm": "bp", "clamp": {"n": True}, "phis": {"n": X}}, "clamp: wanted None for hidden nodes"),
    "start": ({"algorithm": "zil", "phis": {"n": X}}, "phis: wanted None with algorithm='zil'"),
    "target": ({"y": Y[:, :2]}, "y: wanted shape (2, 3)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_calls_name_the_argument(kind):
    arguments, text = REFUSED[kind]
    net = PCNetwork(Wrong(kind), output="gaussian")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        net.infer(**{"x": X, "y": Y, "algorithm": "epc" if kind == "target" else "pc", **arguments})
    assert text in str(caught.value)
    assert net.module.n._visit is None


def test_modules_without_nodes_are_refused():
    with pytest.raises(ValueError, match="module: wanted at least one PCNode inside"):
        PCNetwork(nn.Linear(2, 2))
    node = PCNode("gaussian")
    with pytest.raises(ValueError, match="output: wanted a PCNode of its own"):
        PCNetwork(nn.Sequential(node), output=node)


@pytest.mark.parametrize("depth", [8, 64])
def test_mupc_keeps_the_stream_at_one_size_whatever_the_depth(depth):
    torch.manual_seed(0)
    net = residual_mlp(50, 256, depth, 10, mupc=True)
    sizes = [float(p.square().mean()) for p in net.infer(torch.randn(64, 50), steps=0).phis[:-1]]
    assert 0.8 < sizes[0] < 1.25
    assert sizes[-1] < 2.2 * sizes[0]  # e^(1/2) for relu, whose second moment is half: depth cancels
    assert mupc_scales(50, 256, depth)[1] == pytest.approx((256 * depth) ** -0.5)
    plain = residual_mlp(50, 256, depth, 10)
    assert all(layer.bias is None for layer in plain.module.layers)
